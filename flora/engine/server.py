"""The thread that owns the device: any number of callers submit requests to it, and they run together."""

from __future__ import annotations

import atexit
import heapq
import itertools
import logging
import math
import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from weakref import WeakSet

import torch

from flora.bank import AdapterBank
from flora.engine.core import Core, RequestTimes, Row, Told
from flora.engine.device import TurnLock
from flora.engine.generation import Generation
from flora.engine.request import Completion, Event, FailEvent, FinishEvent, Request, TokenEvent
from flora.errors import BusyError, DeadlineError, FloraError, RequestError, ServingError

logger = logging.getLogger(__name__)

Listener = Callable[[Event], None]

WAIT_FOR_ADAPTERS_S = 0.05
"""How long the thread sleeps at most when no request can run before an adapter has been read."""

KEPT_DEADLINES = 64
"""How many deadlines of requests that have ended are kept, besides as many again as there are requests, before they are dropped."""

IDLE_S = 10.0
"""How long the thread waits for work before it ends, and keeps its engine no longer; the next request starts another. As long as
that a method that nobody asks for keeps its cache, and the steps that were captured with it, unless they were captured ahead."""

EXIT_S = 5.0
"""How long the end of the interpreter waits for the thread."""

_SERVERS: WeakSet[Server] = WeakSet()
_SERVERS_LOCK = threading.Lock()


class Ticket:
    """A submitted request: iterate over its events as they come, wait for its `result`, or `cancel` it.

    Its events are handed out once: to the listener, or to whoever iterates.
    """

    def __init__(self, server: Server, row: Row, method: str, listener: Listener | None) -> None:
        self._server, self._row, self._listener = server, row, listener
        self.method = method
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._done = threading.Event()

    @property
    def request(self) -> Request:
        return self._row.request

    @property
    def times(self) -> RequestTimes:
        return self._row.times

    @property
    def completion(self) -> Completion | None:
        """Once it is done, unless it failed."""
        return self._row.completion

    @property
    def error(self) -> FloraError | None:
        """What it failed by."""
        return self._row.error

    @property
    def token_ids(self) -> list[int]:
        """The new tokens so far."""
        return list(self._row.token_ids)

    @property
    def chosen_logits(self) -> list[float]:
        """The logit that each new token was chosen by."""
        return list(self._row.chosen_logits)

    @property
    def state(self) -> str:
        """ "waiting", "running" or "done"."""
        if self._row.done:
            return "done"
        return "waiting" if self._row.times.admitted_s is None else "running"

    def __iter__(self) -> Iterator[TokenEvent | FinishEvent]:
        """Its events up to the FinishEvent; raises the error it failed with. To leave before the end cancels it.

        RequestError where a listener gets them.
        """
        if self._listener is not None:
            raise RequestError("the request's events go to its listener: wait for its result, or submit it without one")
        return self._iterate()

    def _iterate(self) -> Iterator[TokenEvent | FinishEvent]:
        try:
            while True:
                event = self._events.get()
                if not isinstance(event, TokenEvent):
                    self._events.put(event)  # whoever iterates again comes to the end, too
                if isinstance(event, FailEvent):
                    raise event.error
                yield event
                if isinstance(event, FinishEvent):
                    return
        finally:
            self.cancel()

    def result(self, timeout_s: float | None = None) -> Completion:
        """Wait for its end. Raises the error it failed with; TimeoutError where it is not done in time, and goes on."""
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"the request is not done after {timeout_s:g} s")
        if self._row.error is not None:
            raise self._row.error
        return self._row.completion

    def cancel(self) -> None:
        """End it as "cancelled" with the tokens it has, at the next step; nothing where it is done."""
        if not self._row.done:
            self._server.cancel(self)

    def _tell(self, event: Event) -> None:
        if self._listener is None:
            self._events.put(event)
        else:
            try:
                self._listener(event)
            except BaseException:  # whatever it is: a listener's fault must not stop the others' requests
                logger.exception("a listener failed")
        if not isinstance(event, TokenEvent):
            self._done.set()


class Server:
    """Runs the submitted requests, method by method in turn, on a thread of its own that begins with the first of them.

    make_core: method → an empty Core. compute: calls a step where the device's work is done. max_waiting: requests that may stand
    in line.
    """

    def __init__(
        self,
        make_core: Callable[[str], Core],
        bank: AdapterBank,
        turns: TurnLock,
        compute: Callable[[Callable[[], list[Told]]], list[Told]],
        max_waiting: int,
    ) -> None:
        self._make_core, self._bank, self._turns, self._compute = make_core, bank, turns, compute
        self.max_waiting = max_waiting
        self.abandoned: deque[Generation] = deque()  # batches that nobody has any more, to be closed when the device is free
        self._news = threading.Condition()
        self._arrived: deque[Ticket] = deque()
        self._cancelled: deque[Ticket] = deque()
        self._preparing: deque[tuple[str, Callable[[Core], int], Future[int]]] = deque()
        self._closing_s: float | None = None  # when what still runs will be ended
        self._thread: threading.Thread | None = None
        # What follows belongs to the thread.
        self._cores: dict[str, Core] = {}
        self._prepared: set[str] = set()  # methods whose cores are kept, however long nobody asks for them
        self._used_s: dict[str, float] = {}  # method → when its core last had a request, of time.perf_counter
        self._tickets: dict[Row, Ticket] = {}
        self._deadlines: list[tuple[float, int, Ticket]] = []
        self._order = itertools.count()
        with _SERVERS_LOCK:
            _SERVERS.add(self)

    # ----------------------------------------------------------------------------------------------------- any thread

    def submit(self, rows: Sequence[Row], method: str, deadline_s: float | None, listener: Listener | None) -> list[Ticket]:
        """Put the requests of one session in line together.

        BusyError where too many stand there already, of all sessions or of this one, or where the engine is shutting down.
        """
        tickets = [Ticket(self, row, method, listener) for row in rows]
        now = time.perf_counter()
        with self._news:
            if self._closing_s is not None:
                raise BusyError("the engine is shutting down: it takes no more requests")
            if (num_waiting := self.num_waiting) + len(tickets) > self.max_waiting:
                raise BusyError(f"the engine is busy, {num_waiting} requests wait already: try again in a moment")
            self._check_share(rows[0].session, len(rows))
            self._start_thread()
            for ticket in tickets:
                ticket.times.arrival_s = now
                self._arrived.append(ticket)
                if deadline_s is not None and deadline_s < math.inf:
                    heapq.heappush(self._deadlines, (now + deadline_s, next(self._order), ticket))
            self._news.notify()
        self._bank.prefetch([row.request.adapter for row in rows if row.request.adapter is not None])
        return tickets

    def _check_share(self, session: Hashable, num_more: int) -> None:
        """BusyError where a session would have more in line than its share: there is always room for those who come next.

        Of s sessions in line, each may have an (s + 1)-th of it. Requests without a session belong to nobody in particular.
        """
        if session is None:
            return
        waiting = Counter(ticket._row.session for ticket in list(self._arrived))
        for core in self.cores:
            waiting.update(core.scheduler.waiting_by_session())
        share = max(1, self.max_waiting // (len(waiting.keys() | {session}) + 1))
        if waiting[session] + num_more > share:
            raise BusyError(
                f"the engine is busy, {waiting[session]} of your requests wait already and your share of the line is {share}: "
                "try again in a moment"
            )

    def cancel(self, ticket: Ticket) -> None:
        with self._news:
            self._cancelled.append(ticket)
            self._news.notify()

    def prepare(self, method: str, work: Callable[[Core], int]) -> int:
        """Have the thread do some work on a method's core between two steps, wait, and return what it returns.

        The core is kept from then on, however long nobody asks for the method. BusyError where the engine is shutting down; raises
        what the work raises.
        """
        result: Future[int] = Future()
        with self._news:
            if self._closing_s is not None:
                raise BusyError("the engine is shutting down: it takes no more requests")
            self._start_thread()
            self._preparing.append((method, work, result))
            self._news.notify()
        return result.result()

    def close(self, timeout_s: float, join_s: float | None = None) -> None:
        """Take no more requests; what runs may finish for `timeout_s`, then it fails by name. Waits for the thread, `join_s` at
        most."""
        with self._news:
            until = time.perf_counter() + timeout_s
            self._closing_s = until if self._closing_s is None else min(self._closing_s, until)
            self._news.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(join_s)

    def close_abandoned(self) -> None:
        """Give back what abandoned batches hold; the caller has the device."""
        while self.abandoned:
            self.abandoned.popleft().close()

    @property
    def cores(self) -> list[Core]:
        """Those that have had requests lately."""
        return list(self._cores.values())

    @property
    def num_waiting(self) -> int:
        """Requests that stand in line."""
        return len(self._arrived) + sum(core.scheduler.num_waiting for core in self.cores)

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="flora-engine", daemon=True)
            self._thread.start()

    # ------------------------------------------------------------------------------------------------------ its thread

    @torch.inference_mode()
    def _work(self) -> None:
        going_on = True
        while going_on:
            try:
                going_on = self._round()
            except Exception as error:  # a fault of the engine's own: its requests end by name, and it begins afresh
                logger.exception("the engine's thread failed")
                with self._turns:
                    methods = {ticket.method for ticket in self._tickets.values()}
                    told = [told for method in methods for told in self._abandon(method, error)]
                self._tell(told)

    def _round(self) -> bool:
        """Take in what has come, end what has to end, and run a step; False once all is done and the engine is closing."""
        with self._news:
            if not self._news.wait_for(self._has_work, IDLE_S):
                self._thread = None
                for method in self._cores.keys() - self._prepared:
                    del self._cores[method]
                return False
            cancelled = list(self._cancelled)
            self._cancelled.clear()
            overdue = self._overdue()
            closing_s = self._closing_s
        with self._turns:
            self.close_abandoned()
            self._prepare()
            self._take_in()
            self._end(cancelled, overdue, closing_s)
        if self._tickets and not self._step():
            self._bank.wait_until_ready(WAIT_FOR_ADAPTERS_S)
        self._drop_idle_cores()
        if self._tickets or closing_s is None:
            return True
        self._cores.clear()
        return False

    def _drop_idle_cores(self) -> None:
        now = time.perf_counter()
        for method, core in list(self._cores.items()):
            if core.busy or method in self._prepared:
                self._used_s[method] = now
            elif now - self._used_s[method] > IDLE_S:
                del self._cores[method]

    def _has_work(self) -> bool:
        return bool(self._arrived or self._cancelled or self._preparing or self._tickets or self._closing_s is not None)

    def _overdue(self) -> list[Ticket]:
        now, overdue = time.perf_counter(), []
        while self._deadlines and self._deadlines[0][0] <= now:
            overdue.append(heapq.heappop(self._deadlines)[2])
        if len(self._deadlines) > 2 * (len(self._tickets) + len(self._arrived)) + KEPT_DEADLINES:  # most of them have ended before
            self._deadlines = [entry for entry in self._deadlines if not entry[2]._row.done]
            heapq.heapify(self._deadlines)
        return overdue

    def _prepare(self) -> None:
        while self._preparing:
            method, work, result = self._preparing.popleft()
            try:
                result.set_result(self._compute(partial(work, self._core(method))))
                self._prepared.add(method)
            except BaseException as error:  # it is its caller's, who raises it
                result.set_exception(error)

    def _core(self, method: str) -> Core:
        if method not in self._cores:
            self._cores[method] = self._make_core(method)
        self._used_s[method] = time.perf_counter()
        return self._cores[method]

    def _take_in(self) -> None:
        while self._arrived:  # one by one: whatever is wrong with one, the next is still there
            ticket = self._arrived.popleft()
            self._tickets[ticket._row] = ticket
            self._core(ticket.method).add(ticket._row)

    def _end(self, cancelled: list[Ticket], overdue: list[Ticket], closing_s: float | None) -> None:
        """End requests before their time: those that were cancelled, those whose deadline has passed, or all at the end."""
        for ticket in cancelled:
            if ticket._row in self._tickets:
                self._tell(self._cores[ticket.method].cancel(ticket._row))
        for ticket in overdue:
            if ticket._row in self._tickets:
                taken, num_tokens = time.perf_counter() - ticket.times.arrival_s, len(ticket._row.token_ids)
                error = DeadlineError(f"the request had {num_tokens} tokens after {taken:.1f} s, its deadline: allow it more time")
                self._tell(self._cores[ticket.method].fail(ticket._row, error))
        if closing_s is not None and time.perf_counter() >= closing_s:
            for row, ticket in list(self._tickets.items()):
                error = ServingError("the engine was shut down before the request was done: send it again later")
                self._tell(self._cores[ticket.method].fail(row, error))

    def _step(self) -> bool:
        """One step of each core that has requests, one after another; False where none could run."""
        moved = False
        for method, core in list(self._cores.items()):
            if not core.busy:
                continue
            with self._turns:
                try:
                    told = self._compute(core.step)
                except Exception as error:  # a fault of the engine's own: its requests end by name, and it begins afresh
                    logger.exception("a step of the engine failed")
                    tokens = [one for one in core.told if isinstance(one[1], TokenEvent)]
                    told = [*tokens, *self._abandon(method, error)]  # which tells every end
            moved = moved or bool(told) or bool(core.scheduler.num_running)
            self._tell(told)
        return moved

    def _abandon(self, method: str, error: Exception) -> list[Told]:
        """Drop a core that is in disorder and fail its requests."""
        core = self._cores.pop(method, None)
        told: list[Told] = []
        sentence = f"the engine failed while the request ran ({type(error).__name__}): send it again"
        for row, ticket in self._tickets.items():
            if ticket.method != method:
                continue
            if not row.done:
                row.error, row.times.finished_s = ServingError(sentence), time.perf_counter()
                if core is not None:
                    core.counts.failed += 1
            # Whoever is still in `_tickets` has not been told of an end, be it one that came before the fault.
            ended = FailEvent(row.index, row.error) if row.completion is None else FinishEvent(row.index, row.completion)
            told.append((row, ended))
            if row.slot is not None:
                self._bank.unpin(row.slot)
                row.slot = None
        return told

    def _tell(self, told: list[Told]) -> None:
        for row, event in told:
            self._tickets[row]._tell(event)
            if not isinstance(event, TokenEvent):
                del self._tickets[row]

    def _after_fork(self) -> None:
        """In the child, which has not the thread, and whose parent answers the requests."""
        self._news, self._thread = threading.Condition(), None
        self._turns.after_fork()
        for core in self.cores:
            core.close()
        self._arrived.clear()
        self._cancelled.clear()
        self._preparing.clear()
        self._prepared.clear()
        self._deadlines.clear()
        self._cores, self._tickets = {}, {}


def _close_all() -> None:
    """Before the interpreter ends: it would end the threads in the midst of a forward, and the process with them."""
    for server in list(_SERVERS):
        server.close(0.0, join_s=EXIT_S)
        server._bank.close()


atexit.register(_close_all)

# A process is forked only between steps: the child would get a batch that is half computed, and locks that are held for ever.

_forking: list[Server] = []


def _before_fork() -> None:
    _SERVERS_LOCK.acquire()
    _forking.extend(_SERVERS)
    for server in _forking:
        server._turns.__enter__()
    for server in _forking:
        server._news.acquire()


def _after_fork_in_parent() -> None:
    for server in _forking:
        server._news.release()
        server._turns.__exit__()
    _forking.clear()
    _SERVERS_LOCK.release()


def _after_fork_in_child() -> None:
    for server in _forking:
        server._after_fork()
        server._turns.__exit__()
    _forking.clear()
    _SERVERS_LOCK.release()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
