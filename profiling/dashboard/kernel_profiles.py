"""What each visitor of the *Kernels* tab looks at: a profile of the model that serves, a trace that they opened, or a recording."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flora.engine import Engine
from flora.errors import RequestError
from flora.names import public_name
from profiling import workload
from profiling.compare import checked_methods
from profiling.dashboard.trace_exports import ServedTrace, ServedTraces
from profiling.events import HowFar
from profiling.load_runs import servable_by
from profiling.loading import source_of
from profiling.options import weight_words
from profiling.profile_job import PROFILE, TRACE, JobFailed, OpenJob, RecordJob, do
from profiling.recorded import Recording, recordings
from profiling.trace_file import SUFFIXES, TraceError
from profiling.trace_profile import TraceProfile, profile_of_rows

PREFILLS, STEPS, WARMUP = 4, 8, 3
MOST_ROWS, MOST_METHODS = 32, 4
RANKS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class ProfileWish:
    """What a visitor's controls say. rank: of random adapters; 0 for the model's own."""

    kind: str
    methods: Sequence[str]
    rows: float
    rank: int
    captured: bool

    def __post_init__(self) -> None:
        methods = [method for method in self.methods or () if isinstance(method, str)]
        if not 2 <= len(methods) <= MOST_METHODS:
            raise RequestError(f"choose two to {MOST_METHODS} methods, to be seen side by side")
        checked_methods(methods)
        if isinstance(self.rows, bool) or not isinstance(self.rows, int | float) or not 1 <= self.rows <= MOST_ROWS:
            raise RequestError(f"the number of rows must be from 1 to {MOST_ROWS}")
        if self.rank not in (0, *RANKS):
            raise RequestError(f"the rank of random adapters must be one of {', '.join(map(str, RANKS))}")


@dataclass(frozen=True)
class Found:
    """A profile that a visitor looks at. folder: where its files lie, the owner's to remove; None for a recorded one, whose trace
    was not kept. source: live, opened or recorded. number: of all in this process."""

    profile: TraceProfile
    folder: Path | None
    trace: ServedTrace | None
    source: str
    number: int


class ProfileWork:
    """A `measuring.Work`: one job in a process of its own, and what came of it. root: where it makes its folder. keep: given that,
    with what was made."""

    def __init__(self, job: RecordJob | OpenJob, root: str, keep: Callable[[RecordJob | OpenJob, Path], Found]) -> None:
        self._job, self._root, self._keep = job, root, keep
        self.found: Found | None = None

    def measure(self, should_stop: Callable[[], bool]) -> Iterator[Any]:
        folder = Path(tempfile.mkdtemp(dir=self._root))
        try:
            for progress in do(self._job, folder, should_stop):
                yield HowFar(progress.words, progress.share)
            if (folder / PROFILE).is_file() and not should_stop():
                yield folder
                folder = None
        except JobFailed as error:
            if error.ours:
                raise
            raise RequestError(error.words) from error
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def take(self, event: Path) -> None:
        self.found = self._keep(self._job, event)


class KernelProfiles:
    """What each visitor looks at: the last profile that was recorded or opened, and its files."""

    def __init__(self, engines: Mapping[str, Engine], results_folder: Path) -> None:
        """results_folder: where recorded results are."""
        self.engines, self._results_folder = engines, results_folder
        self.traces = ServedTraces()
        self.root = tempfile.TemporaryDirectory(prefix="flora-live-")  # of all folders, also of results that nobody fetched
        self._lock = threading.Lock()
        self._found: dict[str, Found] = {}
        self._number = 0

    def of(self, session: str) -> Found | None:
        return self._found.get(session)

    def keep(self, session: str, job: RecordJob | OpenJob, folder: Path) -> Found:
        """Let a session look at what a job has left in a folder, from now on."""
        profile = TraceProfile.from_dict(json.loads((folder / PROFILE).read_bytes()))
        if isinstance(job, OpenJob):
            source = "opened from a file of yours, not measured here"
            trace = self.traces.add(Path(job.path), "trace.json" + ".gz" * job.path.lower().endswith(".gz"))
        else:
            source = "live, on this machine, under torch.profiler"
            trace = self.traces.add(folder / TRACE, "flora-live-trace.json.gz")
        return self._look_at(session, profile, folder, trace, source)

    def look_at_recorded(self, session: str, name: str) -> Found:
        """Let a session look at a recording. Raises RequestError where it is not there, or makes no sense."""
        recording = next((one for one in self.recorded() if one.name == name), None)
        if recording is None:
            raise RequestError("this recording is no longer there: choose another")
        try:
            profile = profile_of_rows(recording.rows)
        except TraceError as error:
            raise RequestError(f"{name}: {error}") from error
        return self._look_at(session, profile, None, None, f"recorded, not live: {name}")

    def recorded(self) -> list[Recording]:
        """The profiles among the recorded results."""
        return recordings(self._results_folder, "kernels").found

    def _look_at(self, session: str, profile: TraceProfile, folder: Path | None, trace: ServedTrace | None, source: str) -> Found:
        with self._lock:
            self._number += 1
            found = Found(profile, folder, trace, source, self._number)
            before, self._found[session] = self._found.get(session), found
        if before is not None:
            self._remove(before)
        return found

    def forget(self, session: str) -> None:
        """The browser has gone: keep nothing of it."""
        with self._lock:
            found = self._found.pop(session, None)
        if found is not None:
            self._remove(found)

    def close(self) -> None:
        """The server is going down."""
        for session in list(self._found):
            self.forget(session)
        self.root.cleanup()

    def _remove(self, found: Found) -> None:
        if found.folder is not None:
            self.traces.remove(found.trace)
            shutil.rmtree(found.folder, ignore_errors=True)

    def record(self, session: str, wish: ProfileWish) -> ProfileWork:
        """What profiles the model that serves now. Raises a FloraError that says what cannot be profiled."""
        return ProfileWork(self.job(wish), self.root.name, partial(self.keep, session))

    def open(self, session: str, path: Any) -> ProfileWork:
        """What reads a visitor's trace, in line with what is measured, since on a CPU it would take from that.

        path: where gradio has put the upload.
        """
        if not isinstance(path, str) or not path:
            raise RequestError("choose a trace first: a .json or .json.gz file, as torch.profiler's export_chrome_trace writes it")
        if not path.lower().endswith(SUFFIXES):
            raise RequestError("a trace is a .json or .json.gz file, as torch.profiler's export_chrome_trace writes it")
        return ProfileWork(OpenJob(path), self.root.name, partial(self.keep, session))

    def job(self, wish: ProfileWish) -> RecordJob:
        """The wish with all that another process needs to load the engine that serves."""
        if wish.kind not in self.engines:
            raise RequestError("no model of this kind serves here: choose another")
        engine = self.engines[wish.kind]
        tags = servable_by({wish.kind: engine}, wish.methods)[wish.kind]
        if not tags and not wish.rank and any(method != "base" for method in wish.methods):
            raise RequestError("no adapter of the model can be served by each of these methods: choose random ones")
        sources = {tag: list(engine.adapters[tag].sources) for tag in tags[:MOST_ROWS]}
        # Random adapters lie nowhere: the other process makes some of the same rank.
        lies = all(Path(source.partition("#")[0]).exists() or source.count("/") == 1 for own in sources.values() for source in own)
        rank = wish.rank or (None if lies else max(max(engine.adapters[tag].ranks.values()) for tag in sources))
        return RecordJob(
            kind=wish.kind,
            model=source_of(engine),
            adapters={tag: [_absolute(one) for one in own] for tag, own in sources.items()},
            methods=list(wish.methods),
            rows=int(wish.rows),
            rank=rank,
            prefills=PREFILLS,
            steps=STEPS,
            warmup=WARMUP,
            device=engine.device.type,
            dtype=str(engine.dtype).removeprefix("torch."),
            weights=engine.weights,
            quantize=engine.quantize,
            llm_int8_threshold=engine.llm_int8_threshold,
            captured=bool(wish.captured),
            threads=torch.get_num_threads(),
            command=self.command(wish, rank),
        )

    def command(self, wish: ProfileWish, rank: int | None = None) -> str:
        """The `python -m profiling kernels …` that profiles the same, quoted for a shell."""
        engine, rank = self.engines[wish.kind], rank or wish.rank
        words = ["python", "-m", "profiling", "kernels", "--methods", *wish.methods, "--kind", wish.kind]
        if engine.name != wish.kind:  # the embedded models' folders are named after their kind
            words += [f"--{wish.kind}-model", public_name(engine.name)]
        given = [] if rank else workload.adapters_given(engine, wish.kind, set(engine.adapters))
        words += [f"--{wish.kind}-adapters", *given] if given else []
        words += ["--rows", str(int(wish.rows)), *(["--rank", str(rank)] if rank else []), *["--captured"] * bool(wish.captured)]
        words += ["--device", engine.device.type, "--dtype", str(engine.dtype).removeprefix("torch."), *weight_words(engine)]
        return shlex.join([*words, "--threads", str(torch.get_num_threads())])


def _absolute(source: str) -> str:
    """A checkpoint's folder, seen from anywhere; a hub id as it is."""
    return str(Path(source).resolve()) if Path(source.partition("#")[0]).exists() else source
