"""Turns on a device: in the order they were asked for, for whoever asks, and never lost."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from flora import Request
from flora.engine import device
from flora.engine.device import ComputeThread, TurnLock, apart, turns_on

PATIENCE_S = 30.0


def stand_in_line(lock: TurnLock, number: int) -> None:
    end = time.perf_counter() + PATIENCE_S
    while len(lock._line) != number:
        assert time.perf_counter() < end
        time.sleep(0.001)


def is_free(lock: TurnLock) -> bool:
    """As another thread finds it."""
    found = []

    def look() -> None:
        found.append(lock.take_if_free())
        if found[0]:
            lock.__exit__()

    looking = threading.Thread(target=look)
    looking.start()
    looking.join(PATIENCE_S)
    return found[0]


def test_turns_come_in_the_order_they_were_asked_for():
    lock, order = TurnLock(), []

    def take(number: int) -> None:
        with lock:
            order.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    with lock:
        for number, thread in enumerate(threads):
            thread.start()
            stand_in_line(lock, number + 1)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert order == list(range(6)) and is_free(lock)


def test_a_loop_lets_others_in_between():
    lock, turns, stop = TurnLock(), [], threading.Event()

    def loop(name: str) -> None:
        while not stop.is_set():
            with lock:
                turns.append(name)
                time.sleep(0.0005)
                if len(turns) >= 300:
                    stop.set()

    threads = [threading.Thread(target=loop, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    counts = [turns[20:].count(name) for name in "abc"]
    assert max(counts) - min(counts) < 60, counts


def test_it_can_be_taken_again_by_who_has_it():
    lock = TurnLock()
    with lock:
        with lock, lock:
            assert not is_free(lock)
        assert not is_free(lock), "it was given back with the inner one"
        assert not lock.take_if_free(), "a finaliser in the midst of a step"
    assert is_free(lock)


def test_one_at_a_time():
    lock, inside, most = TurnLock(), [], []

    def work() -> None:
        for _ in range(200):
            with lock:
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert (len(most), max(most)) == (800, 1) and is_free(lock)


class Interrupt(BaseException):
    """As KeyboardInterrupt is."""


class Gate:
    """What a thread waits at for its turn, interrupted there: before the turn is handed over, or in the moment after."""

    def __init__(self, after: bool) -> None:
        self.after, self.lock, self.num_asked = after, threading.Lock(), 0

    def acquire(self) -> None:
        self.num_asked += 1
        if self.num_asked == 1 or self.after:
            self.lock.acquire()
        if self.num_asked == 2:
            raise Interrupt

    def release(self) -> None:
        self.lock.release()


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_while_waiting_leaves_the_line_or_hands_the_turn_on(after, monkeypatch):
    lock, gate, ended = TurnLock(), Gate(after), []

    def wait() -> None:
        try:
            with lock:
                ended.append("had it")
        except Interrupt:
            ended.append("interrupted")

    with lock:
        interrupted, behind = threading.Thread(target=wait), threading.Thread(target=wait)
        with monkeypatch.context() as patched:
            patched.setattr(device, "threading", SimpleNamespace(Lock=lambda: gate, get_ident=threading.get_ident))
            interrupted.start()
            if after:
                stand_in_line(lock, 1)
            else:
                interrupted.join(PATIENCE_S)
                assert ended == ["interrupted"]
        behind.start()
        stand_in_line(lock, 2 if after else 1)
    interrupted.join(PATIENCE_S)
    behind.join(PATIENCE_S)
    assert sorted(ended) == ["had it", "interrupted"] and is_free(lock)


def test_the_lock_of_a_device():
    assert turns_on(torch.device("cpu")) is turns_on(torch.device("cpu"))
    assert turns_on(torch.device("cpu")) is not turns_on(torch.device("meta"))


def test_one_thread_computes_for_all():
    """Whoever calls, forwards, loading and checks are on the same thread, which is nobody's own."""
    compute = ComputeThread()
    with ThreadPoolExecutor(4) as callers:
        threads = set(callers.map(lambda _: compute.run(threading.current_thread), range(40)))
    assert len(threads) == 1 and threading.current_thread() not in threads
    assert compute.run(lambda: compute.run(threading.current_thread)) in threads, "a call from there waits for itself"
    with pytest.raises(ZeroDivisionError):
        compute.run(lambda: 1 / 0)
    with pytest.raises(SystemExit):
        compute.run(sys.exit)
    assert compute.run(threading.current_thread) in threads, "a failed call ended the thread"


def test_the_engines_forwards_are_all_there(checkpoints, monkeypatch):
    engine = checkpoints["code"].engine("aa")
    threads: list[str] = []
    engine.model.register_forward_pre_hook(lambda *_: threads.append(threading.current_thread().name))
    requests = [Request("x = ", adapter="aa", max_new_tokens=3, ignore_eos=True)]
    (completion,) = engine.generate(requests)
    own = engine.start(requests)
    while not own.done:
        own.step()
    assert engine.verify(requests, [completion.token_ids], "flora").agrees
    assert threads == ["flora-compute"] * (3 + 3 + 1)


def test_work_apart_is_on_a_thread_that_ends():
    thread = apart(threading.current_thread)
    assert thread is not threading.current_thread() and not thread.is_alive()
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 / 0)
