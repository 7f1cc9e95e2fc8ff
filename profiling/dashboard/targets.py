"""The app against its promises: how soon the first page is there, how long the ready batch takes, how much memory it needs.

The app runs as a visitor's does, in a process of its own, and is asked over HTTP.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import psutil
from gradio_client import Client, handle_file

from flora.engine import Engine
from flora.errors import FloraError, RequestError
from profiling import hardware, report, workload
from profiling.compare import compare
from profiling.dashboard import page_overhead as open_page
from profiling.events import Finished
from profiling.loading import set_threads

PROMISES = {"first page": 15.0, "ready batch": 15.0, "peak memory": 2000.0}
UNITS = {"first page": "s", "ready batch": "s", "peak memory": "MB"}
PAGE_OVERHEAD = 5.0  # percent of tokens/s, at most
HALF_S = 2.0  # of a round, with a page and without
DECODE_STEP = 2.0  # at most so many times the bare base model's, on the ready batch


@dataclass(frozen=True)
class Kept:
    """One promise and what was measured."""

    what: str
    measured: float
    promised: float
    unit: str

    @property
    def kept(self) -> bool:
        return self.measured <= self.promised

    def as_dict(self) -> dict:
        return asdict(self) | {"kept": self.kept}

    def __str__(self) -> str:
        verdict = "kept" if self.kept else "BROKEN"
        return f"{self.what}: {self.measured:.2f} {self.unit}, at most {self.promised:g} {self.unit} promised: {verdict}"


def measure(max_new_tokens: int = workload.MAX_NEW_TOKENS, timeout_s: float = 120.0) -> list[Kept]:
    """Start the app, load its first page, run the ready batch with fLoRA and bmm-LoRA twice, and hold it against `PROMISES`.

    The ready batch's time is the first run's, which a first visitor waits for: upload, queue, warm-up and the check included.
    Peak memory is the resident memory of the app's process and its children, sampled 20 times a second. Raises FloraError where
    the app does not come up within timeout_s.
    """
    with _running_app(timeout_s) as (url, first_page_s, process):
        with _peak_memory(process) as peak:
            client = Client(url, verbose=False)
            adapters = client.predict(api_name="/adapters")
            rows = workload.ready_rows(adapters, max_new_tokens=max_new_tokens)
            started = time.perf_counter()
            result = client.predict(_uploaded(rows), ["flora", "bmm-lora"], max_new_tokens, api_name="/compare")
            seconds = time.perf_counter() - started
            if result["failures"]:
                raise FloraError(f"the ready batch failed: {next(iter(result['failures'].values()))}")
            client.predict(_uploaded(rows), ["flora", "bmm-lora"], max_new_tokens, api_name="/compare")
        measured = {"first page": first_page_s, "ready batch": seconds, "peak memory": peak[0] / 1e6}
    return [Kept(what, measured[what], PROMISES[what], UNITS[what]) for what in PROMISES]


def _uploaded(rows: list[dict]) -> list[dict]:
    requests = []
    for row in rows:
        source = (
            {"prompt": row["prompt"]} if "prompt" in row else {"audio": handle_file(str(workload.ASSETS.parent / row["audio"]))}
        )
        requests.append(source | {"adapter": row["adapter"]})
    return requests


@contextmanager
def _running_app(timeout_s: float) -> Iterator[tuple[str, float, subprocess.Popen]]:
    """The app on a free port: its address, the seconds until its first page was read, its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(workload.ASSETS.parent / "app.py"), "--host", "127.0.0.1", "--port", str(port)]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"GRADIO_ANALYTICS_ENABLED": "0"}
    )
    try:
        url = f"http://127.0.0.1:{port}/"
        while True:
            try:
                with urllib.request.urlopen(url, timeout=5) as page:
                    if page.status == 200 and b"fLoRA Live" in page.read():
                        break
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
            if process.poll() is not None or time.perf_counter() - started > timeout_s:
                raise FloraError(f"the app did not come up within {timeout_s:g} s: run `python app.py` to see why")
        yield url, time.perf_counter() - started, process
    finally:
        process.terminate()
        process.wait(timeout=20)


@contextmanager
def _peak_memory(process: subprocess.Popen) -> Iterator[list[int]]:
    """A list whose one entry is the most resident memory, in bytes, the process and its children held meanwhile."""
    peak, stop = [0], threading.Event()

    def watch() -> None:
        root = psutil.Process(process.pid)
        while not stop.wait(0.05):
            resident = 0
            for member in [root, *root.children(recursive=True)]:
                try:
                    resident += member.memory_info().rss
                except psutil.NoSuchProcess:
                    continue  # a child that has just ended holds nothing
            peak[0] = max(peak[0], resident)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()


def decode_steps(max_new_tokens: int, repeats: int) -> list[Kept]:
    """Each method's decode step over the bare base model's, on the ready batch, in one interleaved run in this process."""
    assets = workload.ASSETS
    engines = {
        kind: Engine.from_pretrained(assets / "models" / kind, adapters=workload.discover_adapters(assets / "adapters" / kind))
        for kind in ("code", "speech")
    }
    rows = workload.ready_rows({kind: engine.adapters for kind, engine in engines.items()}, max_new_tokens=max_new_tokens)
    requests = [workload.request_from_row(row) for row in rows]
    for event in compare(engines, requests, ("flora", "bmm-lora", "base"), repeats=repeats):
        if isinstance(event, Finished):
            result = event.result
    return [
        Kept(f"{method} decode step over the base model's, {kind}", figures.ratio_to_base.median, DECODE_STEP, "×")
        for method in ("flora", "bmm-lora")
        for kind, figures in {**result.methods[method].by_kind, "both": result.methods[method]}.items()
    ]


def page_overhead(rounds: int, draws: bool) -> list[Kept]:
    """The share of tokens/s that an open page with moving charts costs the engine; the promise is for the median.

    draws: also what it costs to draw them, on the engine's cores.
    """
    ratio = open_page.measure(rounds, HALF_S, draws)
    lost, least, most = (100 * (1 - part) for part in (ratio.median, ratio.high, ratio.low))
    where = "drawn on the same cores" if draws else "drawn elsewhere"
    what = f"tokens/s lost to an open page with live charts, {where} [{least:.1f}, {most:.1f}], {ratio.n} rounds"
    return [Kept(what, lost, PAGE_OVERHEAD, "%")]


def run(options: argparse.Namespace) -> int:
    """What `python -m profiling targets` does. 1 where a promise is broken. Raises a FloraError for bad input."""
    if options.max_new_tokens < 2 or options.repeats < 1 or options.rounds < 1:
        raise RequestError("--max-new-tokens must be at least 2, --repeats and --rounds at least 1")
    set_threads(options.threads)
    facts = hardware.environment()
    print(hardware.summary(facts), end="\n\n")
    parts = {
        "app": lambda: measure(options.max_new_tokens),
        "steps": lambda: decode_steps(options.max_new_tokens, options.repeats),
        "page": lambda: page_overhead(options.rounds, options.draw_here),
    }
    promises: list[Kept] = []
    for part in options.part:
        found = parts[part]()
        print(*found, sep="\n", flush=True)
        promises += found
    if options.json:
        shared = {"repeats": options.repeats, "rounds": options.rounds, "hardware": facts, "command": report.own_command()}
        rows = [json.dumps(promise.as_dict() | shared, ensure_ascii=False) for promise in promises]
        report.write_text(options.json, "\n".join(rows) + "\n")
    return 0 if all(promise.kept for promise in promises) else 1
