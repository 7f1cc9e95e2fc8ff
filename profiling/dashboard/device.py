"""The one thread that runs comparisons, so that a slow browser never slows a measured step and two runs never share the device."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from flora.errors import RequestError
from profiling.events import CompareEvent

MAX_IN_LINE = 20  # runs, the one under way among them
SERVER_ERROR = "Something went wrong on the server; the batch was not finished. Try again, or try a smaller batch."


class StopSignals:
    """A flag per browser session, raised by *Stop* and read by that session's comparison before each step."""

    def __init__(self) -> None:
        self._flags: dict[str, threading.Event] = {}

    def arm(self, session: str) -> threading.Event:
        """A fresh flag for a run that is about to begin."""
        self._flags[session] = threading.Event()
        return self._flags[session]

    def flag(self, session: str) -> threading.Event:
        """The session's present flag; a fresh one where it has none."""
        return self._flags.get(session) or self.arm(session)

    def raise_flag(self, session: str) -> None:
        """Stop the session's run at its next step, or before its first."""
        if session in self._flags:
            self._flags[session].set()

    def forget(self, session: str) -> None:
        """The browser has gone: stop its run and keep nothing."""
        self.raise_flag(session)
        self._flags.pop(session, None)


class Run:
    """A comparison in line for the device or under way on its thread; its events wait here until the page fetches them."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[CompareEvent | None] = queue.SimpleQueue()
        self.abandoned = False  # its visitor stopped it, or left, before it began
        self.done = False
        self.error: Exception | None = None  # read it once `done`

    def fetch(self, seconds: float) -> list[CompareEvent]:
        """Every event of the next `seconds`; returns earlier when the comparison ends, which sets `done`."""
        events: list[CompareEvent] = []
        until = time.monotonic() + seconds
        while not self.done:
            try:
                event = self._events.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if event is None:
                self.done = True
            else:
                events.append(event)
        return events


class Device:
    """Runs comparisons one after another on a thread of its own; the others stand in line, first come, first served."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._lock = threading.Lock()
        self._line: list[Run] = []  # the one under way first
        self.closing = threading.Event()  # the server is going down: comparisons have to stop at their next step

    def start(self, comparison: Callable[[], Iterator[CompareEvent]]) -> Run:
        """Put `comparison()` in line. Raises RequestError where too many wait already, or the server is going down."""
        run = Run()
        if self.closing.is_set():
            raise RequestError("the server is going down: try again later")
        with self._lock:
            if len(self._line) >= MAX_IN_LINE:
                raise RequestError(f"{len(self._line)} runs are in line for the device already: try again in a minute")
            self._line.append(run)
        self._executor.submit(self._work, run, comparison)
        return run

    def num_ahead(self, run: Run) -> int:
        """How many runs stand before this one; 0 for the one under way, or done."""
        with self._lock:
            return self._line.index(run) if run in self._line else 0

    def close(self) -> None:
        """Stop the run under way, begin no other, and let the thread end."""
        self.closing.set()
        with self._lock:
            for run in self._line:
                run.abandoned = True
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _work(self, run: Run, comparison: Callable[[], Iterator[CompareEvent]]) -> None:
        try:
            if not run.abandoned:
                for event in comparison():
                    run._events.put(event)
        except Exception as error:  # handed over to whoever fetches, who tells named errors from unexpected ones
            run.error = error
        finally:
            with self._lock:
                self._line.remove(run)
            run._events.put(None)
