"""The app against its promises: how soon the first page is there, how long the ready batch takes, how much memory it needs.

The app runs as a visitor's does, in a process of its own, and is asked over HTTP.
"""

from __future__ import annotations

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

from flora.errors import FloraError
from profiling import workload

PROMISES = {"first page": 15.0, "ready batch": 15.0, "peak memory": 2000.0}
UNITS = {"first page": "s", "ready batch": "s", "peak memory": "MB"}


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
        return f"{self.what}: {self.measured:.1f} {self.unit}, promised at most {self.promised:g} {self.unit}: " + (
            "kept" if self.kept else "BROKEN"
        )


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
