"""The one thread that measures, so that a slow browser never slows a measured step and two measurements never share the device."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flora.errors import RequestError

MAX_IN_LINE = 20  # runs, the one under way among them
SERVER_ERROR = "Something went wrong on the server; the batch was not finished. Try again, or try a smaller batch."


class _GiveWay:
    """The event that says: whoever waits may have the device now."""


GIVE_WAY = _GiveWay()
"""What a long measurement yields between its parts, holding nothing that others need: where others wait it goes to the end of the
line, and on from there when its turn has come again."""


def in_line(ahead: int) -> str:
    """What a visitor reads whose run stands in line behind `ahead` others."""
    return f"measuring, {ahead} ahead of you" if ahead else "your turn begins"


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
    """A measurement in line for the device or under way on its thread; its events wait here until the page fetches them."""

    def __init__(self, measurement: Callable[[], Iterator[Any]]) -> None:
        self._measurement = measurement
        self._generator: Iterator[Any] | None = None
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._active_s = 0.0  # of the turns that are over
        self._turn_began_s: float | None = None
        self.begun = False  # it has had the device
        self.abandoned = False  # its visitor stopped it, or left: it does not begin, or goes no further
        self.done = False
        self.error: Exception | None = None  # read it once `done`

    @property
    def active_s(self) -> float:
        """The seconds that it has had the device so far."""
        began_s = self._turn_began_s
        return self._active_s + (0.0 if began_s is None else time.monotonic() - began_s)

    def fetch(self, seconds: float) -> list[Any]:
        """Every event of the next `seconds`; returns earlier when the measurement ends, which sets `done`."""
        events: list[Any] = []
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

    def take_turn(self, may_give_way: Callable[[], bool]) -> bool:
        """Go on until the end, or until it gives way; whether it has ended. On the device's thread."""
        self._turn_began_s = time.monotonic()
        try:
            if not self.begun and not self.abandoned:
                self.begun = True
                self._generator = self._measurement()
            while not self.abandoned:
                event = next(self._generator, None)
                if event is None:
                    break
                if event is not GIVE_WAY:
                    self._events.put(event)
                elif may_give_way():
                    return False
            if self.abandoned and hasattr(self._generator, "close"):
                self._generator.close()  # what it has set up is taken down
        except Exception as error:  # handed over to whoever fetches, who tells named errors from unexpected ones
            self.error = error
        finally:
            self._active_s, self._turn_began_s = self.active_s, None
        return True

    def end(self) -> None:
        """Nothing more comes."""
        self._events.put(None)


class Device:
    """Runs measurements one after another on a thread of its own; the others stand in line, first come, first served."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._lock = threading.Lock()
        self._line: list[Run] = []  # the one under way first
        self.closing = threading.Event()  # the server is going down: measurements have to stop at their next step

    def start(self, measurement: Callable[[], Iterator[Any]]) -> Run:
        """Put `measurement()` in line. Raises RequestError where too many wait already, or the server is going down.

        It is an iterator of whatever the page wants to be told, never None; `GIVE_WAY` among them lets others by.
        """
        run = Run(measurement)
        with self._lock:
            if self.closing.is_set():
                raise RequestError("the server is going down: try again later")
            if len(self._line) >= MAX_IN_LINE:
                raise RequestError(f"{len(self._line)} runs are in line for the device already: try again in a minute")
            self._line.append(run)
            self._executor.submit(self._work, run)
        return run

    def num_ahead(self, run: Run) -> int:
        """How many runs stand before this one; 0 for the one under way, or done."""
        with self._lock:
            return self._line.index(run) if run in self._line else 0

    def close(self) -> None:
        """Stop the run under way, begin no other, and let the thread end."""
        with self._lock:
            self.closing.set()
            for run in self._line:
                run.abandoned = True
            self._executor.shutdown(wait=False)  # those that wait end at once, each in its turn

    def _work(self, run: Run) -> None:
        if run.take_turn(lambda: self._to_the_end_of_the_line(run)):
            with self._lock:
                self._line.remove(run)
            run.end()

    def _to_the_end_of_the_line(self, run: Run) -> bool:
        """Whether somebody waits who is let by now."""
        with self._lock:
            if len(self._line) == 1 or self.closing.is_set():
                return False
            self._line.remove(run)
            self._line.append(run)
            self._executor.submit(self._work, run)
            return True
