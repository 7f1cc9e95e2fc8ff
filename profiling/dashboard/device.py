"""The one thread that runs comparisons, so that a slow browser never slows a measured step and two runs never share the device."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from profiling.compare import CompareEvent

logger = logging.getLogger(__name__)

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
    """A comparison under way on the device's thread; its events wait here until the page fetches them."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[CompareEvent | None] = queue.SimpleQueue()
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
    """Runs comparisons one after another on a thread of its own."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")

    def start(self, comparison: Callable[[], Iterator[CompareEvent]]) -> Run:
        """Begin `comparison()` as soon as the device is free."""
        run = Run()

        def work() -> None:
            try:
                for event in comparison():
                    run._events.put(event)
            except Exception as error:  # handed over to whoever fetches, who tells named errors from unexpected ones
                run.error = error
            finally:
                run._events.put(None)

        self._executor.submit(work)
        return run

    def close(self) -> None:
        """Let the thread end with the process."""
        self._executor.shutdown(wait=False, cancel_futures=True)
