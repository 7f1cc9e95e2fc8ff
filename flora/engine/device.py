"""Whose turn it is on a device, the thread that computes, and the memory that is free: for every engine in this process."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


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


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that nobody has, what PyTorch keeps for later included; None where that is not known."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class _Call:
    """A function that is called on another thread, and what came of it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()


class ComputeThread:
    """The one thread that computes on the CPU.

    PyTorch's OpenMP keeps a team of threads for every thread that ever computed. With more of them than processors, they no longer
    wait for each other actively but go to sleep at every small product, and a decode step takes twice as long. So whoever has work
    has it done here: prompts, steps, checks.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Without a thread, which the first call makes: at first, and in a forked process, which has not its parent's."""
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()

    def run(self, function: Callable[[], Result]) -> Result:
        """Call the function there, wait, and return what it returns or raise what it raises."""
        if threading.current_thread() is self._thread:
            return function()
        with self._guard:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, args=(self._calls,), name="flora-compute", daemon=True)
                self._thread.start()
        call = _Call(function)
        self._calls.put(call)
        call.done.acquire()
        if call.error is not None:
            raise call.error
        return call.result

    @staticmethod
    def _work(calls: queue.SimpleQueue[_Call]) -> None:
        while True:
            call = calls.get()
            try:
                call.result = call.function()
            except BaseException as error:  # it is its caller's, who raises it
                call.error = error
            call.done.release()
            del call  # and with it what it returned


def apart(function: Callable[[], Result]) -> Result:
    """Call a function on a thread that ends with it, and with that its OpenMP team: for slow work that no step should wait for."""
    call = _Call(function)

    def work() -> None:
        try:
            call.result = call.function()
        except BaseException as error:  # it is its caller's, who raises it
            call.error = error

    thread = threading.Thread(target=work, name="flora-apart")
    thread.start()
    thread.join()
    if call.error is not None:
        raise call.error
    return call.result


_cpu = ComputeThread()
if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_cpu.begin)


def compute_on(device: torch.device) -> Callable[[Callable[[], Result]], Result]:
    """What calls a function where this device's work is done: on a CPU its one thread, else at once."""
    return _cpu.run if device.type == "cpu" else _at_once


def _at_once(function: Callable[[], Result]) -> Result:
    return function()
