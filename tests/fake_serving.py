"""An engine that serves on a thread of its own and takes exactly the steps it is told to: for drivers of load."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from flora.engine import Completion, FailEvent, FinishEvent, TokenEvent
from flora.errors import BusyError, ServingError, UnknownAdapterError
from flora.store import AdapterCounters


@dataclass(eq=False)
class FakeTicket:
    engine: ServingEngine
    request: object
    index: int
    listener: object
    num_tokens: int = 0
    state: str = "waiting"
    cancelled: bool = False

    def cancel(self):
        with self.engine.lock:
            self.cancelled = True
            self.engine.lock.notify_all()


@dataclass(eq=False)
class ServingEngine:
    """Every step gives each of up to `max_batch_size` running requests one token, after `step_s` seconds.

    held: while set, no step is taken. fails: adapters whose requests fail at their second token. submitted: (method, request,
    index, session, time) of each request that came.
    """

    kind: str = "code"
    step_s: float = 0.0005
    max_batch_size: int = 4
    max_waiting: int = 1000
    adapters: dict = field(default_factory=dict)
    fails: tuple[str, ...] = ()
    context_length: int = 512
    adapter_slots: int = 8
    name: str = "code"

    def __post_init__(self):
        self.lock = threading.Condition()
        self.held = False
        self.submitted, self._waiting, self._running = [], [], []
        self.num_arrived = self.num_finished = self.num_failed = self.num_cancelled = self.num_tokens = self.num_steps = 0
        self.most_at_once = 0
        self.closed = False
        self._counters = defaultdict(AdapterCounters)
        self.bank = SimpleNamespace(counters=lambda: {tag: AdapterCounters(c.hits, c.misses) for tag, c in self._counters.items()})
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.weights, self.quantize, self.llm_int8_threshold = "pretrained", None, None
        self.model = torch.nn.Linear(2, 2)
        self.model.num_parameters = lambda: 6
        self.model.config = SimpleNamespace(hidden_size=2, num_hidden_layers=1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def submit(self, request, method="flora", *, session=None, deadline_s=None, seed=0, index=0, listener=None):
        with self.lock:
            self.submitted.append(
                SimpleNamespace(method=method, request=request, index=index, session=session, at=time.perf_counter())
            )
            if request.adapter is not None and request.adapter not in self.adapters:
                raise UnknownAdapterError(f"unknown adapter {request.adapter!r}")
            if self.closed or len(self._waiting) >= self.max_waiting:
                raise BusyError("the queue is full: try again later")
            ticket = FakeTicket(self, request, index, listener)
            self._waiting.append(ticket)
            self.num_arrived += 1
            self.most_at_once = max(self.most_at_once, len(self._waiting) + len(self._running))
            self.lock.notify_all()
            return ticket

    def snapshot(self):
        with self.lock:
            return SimpleNamespace(
                time_s=time.perf_counter(),
                waiting=len(self._waiting),
                running=len(self._running),
                num_arrived=self.num_arrived,
                num_finished=self.num_finished,
                num_failed=self.num_failed,
                num_cancelled=self.num_cancelled,
                num_tokens=self.num_tokens,
                num_steps=self.num_steps,
                batch=dict(Counter(ticket.request.adapter for ticket in self._running)),
                adapter_slots=self.adapter_slots,
                adapter_slots_used=len(self.adapters),
            )

    def close(self, timeout_s=None):
        with self.lock:
            self.closed = True
            self.held = False
            self.lock.notify_all()

    def hold(self, held):
        """Stop stepping, or go on."""
        with self.lock:
            self.held = held
            self.lock.notify_all()

    def _serve(self):
        while True:
            with self.lock:
                self.lock.wait_for(lambda: self._gone() or self.closed or (not self.held and (self._waiting or self._running)))
                gone = self._gone()
                if self.closed and not self._waiting and not self._running:
                    return
                for ticket in gone:
                    (self._waiting if ticket in self._waiting else self._running).remove(ticket)
                    self.num_cancelled += 1
                if not self.held:
                    while self._waiting and len(self._running) < self.max_batch_size:
                        ticket = self._waiting.pop(0)
                        ticket.state = "running"
                        if ticket.request.adapter is not None:
                            counters = self._counters[ticket.request.adapter]
                            counters.misses += counters.misses == 0
                            counters.hits += counters.misses > 0
                        self._running.append(ticket)
                running = [] if self.held else list(self._running)
            for ticket in gone:
                ticket.listener(FinishEvent(ticket.index, self._completion(ticket, "cancelled")))
            if running:
                self._step(running)

    def _gone(self):
        return [ticket for ticket in (*self._waiting, *self._running) if ticket.cancelled]

    def _step(self, running):
        time.sleep(self.step_s)
        for ticket in running:
            ticket.num_tokens += 1
            done = ticket.num_tokens == ticket.request.max_new_tokens
            fails = ticket.request.adapter in self.fails and (ticket.num_tokens == 2 or done)
            with self.lock:
                self.num_tokens += 1
                if done or fails:
                    self._running.remove(ticket)
                    self.num_finished, self.num_failed = self.num_finished + (not fails), self.num_failed + fails
            ids = tuple(range(ticket.num_tokens))
            ticket.listener(TokenEvent(ticket.index, 0, ticket.num_tokens, False, ids, lambda ids: "x" * len(ids)))
            if fails:
                ticket.listener(FailEvent(ticket.index, ServingError("its logits were no numbers")))
            elif done:
                ticket.listener(FinishEvent(ticket.index, self._completion(ticket, "length")))
        with self.lock:
            self.num_steps += 1

    def _completion(self, ticket, reason):
        return Completion("x" * ticket.num_tokens, list(range(ticket.num_tokens)), reason, 0.0, 0.0, ticket.request.adapter)


def adapters(*tags, families=("flora", "lora"), rank=4):
    """What an engine says of its adapters."""
    return {
        tag: SimpleNamespace(families=families, ranks=dict.fromkeys(families, rank), sources=(), any_base_model=False)
        for tag in tags
    }
