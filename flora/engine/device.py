"""Whose turn it is on a device: every forward of every engine in this process that uses it."""

from __future__ import annotations

import threading
from collections import deque

import torch


class TurnLock:
    """A reentrant lock that is handed over in the order it was asked for.

    A loop that gives it back and takes it again lets everybody in between who was waiting; `threading.RLock` would let none.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._line: deque[tuple[int, threading.Lock]] = deque()  # (thread, the gate it stands at)
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> TurnLock:
        me = threading.get_ident()
        with self._guard:
            if self._owner in (None, me):
                self._owner, self._depth = me, self._depth + 1
                return self
            gate = threading.Lock()
            gate.acquire()
            self._line.append((me, gate))
        try:
            gate.acquire()
        except BaseException:  # an interrupt while waiting: leave the line, or hand on what has just been handed over
            with self._guard:
                if (me, gate) in self._line:
                    self._line.remove((me, gate))
                    raise
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._depth -= 1
            if self._depth:
                return
            self._owner = None
            if self._line:
                self._owner, gate = self._line.popleft()
                self._depth = 1
                gate.release()

    def after_fork(self) -> None:
        """In a forked process, whose one thread has it: those who stood in line are not there."""
        self._guard = threading.Lock()
        self._line.clear()

    def take_if_free(self) -> bool:
        """Take it if nobody has it, without waiting; give it back as any other. For finalisers, which run at any moment."""
        if not self._guard.acquire(blocking=False):
            return False
        try:
            if self._owner is not None:
                return False
            self._owner, self._depth = threading.get_ident(), 1
            return True
        finally:
            self._guard.release()


_locks: dict[str, TurnLock] = {}
_guard = threading.Lock()


def turns_on(device: torch.device) -> TurnLock:
    """The lock of a device: two engines on one device do not compute at once, which would make both slower and no time true."""
    with _guard:
        return _locks.setdefault(str(device), TurnLock())
