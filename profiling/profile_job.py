"""A profile in a process of its own: its maker's end, and the process itself (`python -m profiling.profile_job`).

Where others are served, nothing may be profiled beside them: the profiler slows its whole process, and working through a large
trace would hold Python's lock for seconds. The process is told its job on its standard input and tells what goes on, a JSON
document a line, on its standard output; what it made lies in a folder. It ends when whoever started it ends, or closes the input.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from profiling.trace_file import TraceError, read_trace, write_trace

logger = logging.getLogger(__name__)

PROFILE, TRACE = "profile.json", "trace.json.gz"
OPEN_LIMIT_S = 120.0
OPEN_MEMORY_BYTES = 6 << 30  # of addresses, which are more than what is held
_POLL_S = 0.1
_STARTED, _STARTS_IN_S = 0.4, 5.0  # the share and the usual time of what tells nothing: importing torch and the models' libraries
_PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class RecordJob:
    """Load an engine and profile it. model, adapters: where they lie, not what they are called; command: how to do it by hand.

    rank: with random adapters of this rank instead of the given ones.
    """

    kind: str
    model: str
    adapters: dict[str, list[str]]
    methods: list[str]
    rows: int
    rank: int | None
    prefills: int
    steps: int
    warmup: int
    device: str
    dtype: str
    weights: str
    quantize: str | None
    llm_int8_threshold: float | None
    captured: bool
    threads: int
    command: str


@dataclass(frozen=True)
class OpenJob:
    """Work through a trace that somebody else recorded."""

    path: str


@dataclass(frozen=True)
class JobProgress:
    """How far it is. share: of the whole job, 0 to 1."""

    words: str
    share: float


@dataclass
class JobFailed(Exception):
    """The job could not be done; `words` is a sentence for whoever asked. ours: it is a fault of the program's, told in its log."""

    words: str
    ours: bool = field(default=False)


def do(job: RecordJob | OpenJob, folder: Path, should_stop: Callable[[], bool] = lambda: False) -> Iterator[JobProgress]:
    """Do a job in a process of its own; what it makes lies in `folder` at the end: PROFILE, and of a recording TRACE.

    should_stop: asked ten times a second; the process is killed then, as it is when the iterator is closed. Raises JobFailed.
    """
    kind = "record" if isinstance(job, RecordJob) else "open"
    path = os.pathsep.join(filter(None, (str(_PROJECT), os.environ.get("PYTHONPATH"))))
    # What serves has been loaded already: nothing is fetched again.
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    log = folder / "log.txt"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "profiling.profile_job"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            cwd=folder,
        )
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(process.stdout, lines), name="profile-job", daemon=True).start()
    began_s = time.monotonic()
    until = began_s + OPEN_LIMIT_S if kind == "open" else float("inf")
    started = kind == "open"
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"do": kind, "folder": str(folder), **asdict(job)}).encode() + b"\n")
            process.stdin.flush()
        while not should_stop():
            if time.monotonic() > until:
                raise JobFailed(f"the trace was not worked through within {OPEN_LIMIT_S:g} s: record fewer steps")
            try:
                line = lines.get(timeout=_POLL_S)
            except queue.Empty:
                if not started:
                    passed = (time.monotonic() - began_s) / _STARTS_IN_S
                    yield JobProgress("starting a process of its own", _STARTED * passed / (1 + passed))
                continue
            if line is None:
                logger.error("a profiling process broke off: %s", log.read_text(errors="replace")[-3000:])
                raise JobFailed("the profiling process broke off", ours=True)
            told = json.loads(line)
            if "failed" in told:
                raise JobFailed(told["failed"])
            if "done" in told:
                return
            started = True
            yield JobProgress(told["words"], told["share"])
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


def _read(stream: Any, lines: queue.SimpleQueue[bytes | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


# ----------------------------------------------------------------------------------------------------- the process itself


def main() -> int:
    """Do the job that stands on standard input."""
    gc.disable()  # millions of events come and none goes: looking for rubbish among them would take most of the time
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints stays out of the way

    def tell(**news: Any) -> None:
        print(json.dumps(news), file=told, flush=True)

    try:
        document = (_record if job["do"] == "record" else _open)(job, tell)
    except JobFailed as error:
        tell(failed=error.words)
        return 1
    from profiling.trace import read_profile

    folder = Path(job["folder"])
    try:
        tell(words="reading the trace", share=0.96)
        profile = read_profile(document)
        if job["do"] == "record":
            tell(words="writing the trace", share=0.98)
            write_trace(folder / TRACE, document)
        (folder / PROFILE).write_text(json.dumps(profile.as_dict()), encoding="utf-8")
    except TraceError as error:
        tell(failed=str(error))
        return 1
    except MemoryError:
        tell(failed="the trace needs more memory than there is: record fewer steps")
        return 1
    tell(done=True)
    return 0


def _end_with_input() -> None:
    """End at once when whoever started this ends."""
    sys.stdin.buffer.read()
    os._exit(1)


def _open(job: dict[str, Any], tell: Callable[..., None]) -> dict[str, Any]:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (OPEN_MEMORY_BYTES, OPEN_MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # a system without this limit: the size of the file is limited all the same
    os.nice(5)  # who is served comes first
    tell(words="reading the file", share=0.05)
    try:
        document = read_trace(job["path"])
    except TraceError as error:
        raise JobFailed(str(error)) from error
    except MemoryError as error:
        raise JobFailed("the trace needs more memory than there is: record fewer steps") from error
    return document


def _record(job: dict[str, Any], tell: Callable[..., None]) -> dict[str, Any]:
    import torch

    from flora.engine import Engine
    from flora.errors import FloraError
    from profiling.profile_run import batch_of, record

    tell(words="loading the model", share=_STARTED)
    torch.set_num_threads(job["threads"])
    loading = {name: job[name] for name in ("device", "dtype", "weights", "quantize", "llm_int8_threshold")}
    try:
        engine = Engine.from_pretrained(
            job["model"],
            {} if job["rank"] is not None else job["adapters"],
            max_batch_size=job["rows"],
            adapter_slots=max(8, job["rows"]),
            check_base_model=False,
            capture_steps=None if job["captured"] else False,
            **loading,
        )
        requests = batch_of(engine, job["methods"], job["rows"], job["rank"])
        document = record(
            engine,
            requests,
            job["methods"],
            prefills=job["prefills"],
            steps=job["steps"],
            warmup=job["warmup"],
            on_progress=lambda words, done, total: tell(words=words, share=0.5 + 0.45 * done / total),
        )
    except FloraError as error:
        raise JobFailed(" ".join(str(error).split())) from error
    except torch.OutOfMemoryError as error:
        raise JobFailed(
            "the device has no room for a second copy of the model, which profiles in a process of its own need: load a smaller "
            "one, or quantised"
        ) from error
    document["floraLive"]["command"] = job["command"]
    return document


if __name__ == "__main__":
    sys.exit(main())
