"""An engine whose every step takes exactly as long as a test says: for the turns, clocks, stops and failures of measuring."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from flora.engine import Agreement, Completion, FinishEvent, TokenEvent
from flora.errors import UnknownAdapterError


@dataclass
class Clock:
    """A clock that stands still until a step moves it."""

    now: float = 100.0

    def perf_counter(self) -> float:
        return self.now


@dataclass
class FakeEngine:
    """Steps take `step_s(method, step)` seconds of a Clock. `log` keeps who stepped; `started` and `closed` count generations."""

    clock: Clock
    kind: str = "code"
    step_s: object = None
    refuses: dict = field(default_factory=dict)  # method → exception that start raises
    disagreeing: int = 0
    turn_s: float = 0.0  # that pass before somebody else gives up the device
    has_turn: bool = False
    log: list = field(default_factory=list)
    started: int = 0
    closed: int = 0
    verified: list = field(default_factory=list)

    def __post_init__(self):
        self.device, self.dtype, self.name = torch.device("cpu"), torch.float32, self.kind
        facts = {"ranks": {"flora": 1, "lora": 4}, "sources": (), "any_base_model": False}
        self.adapters = {tag: SimpleNamespace(**facts) for tag in ("lua", "cs")}
        self.weights, self.quantize, self.llm_int8_threshold = "pretrained", None, None
        self.model = torch.nn.Linear(2, 2)
        self.model.num_parameters = lambda: 6
        self.model.config = SimpleNamespace(hidden_size=2, num_hidden_layers=1)

    def validate(self, request, method):
        if request.adapter is not None and request.adapter not in self.adapters:
            raise UnknownAdapterError(f"unknown adapter {request.adapter!r}")

    @contextmanager
    def exclusive(self):
        if self.has_turn:
            yield
            return
        self.clock.now += self.turn_s
        self.has_turn = True
        try:
            yield
        finally:
            self.has_turn = False

    def start(self, requests, method, seed=0):
        if method in self.refuses:
            raise self.refuses[method]
        self.started += 1
        with self.exclusive():
            return FakeGeneration(self, list(requests), method)

    def verify(self, requests, token_ids, method, chosen_logits=None):
        self.verified.append((method, [list(ids) for ids in token_ids]))
        tokens = sum(map(len, token_ids))
        return Agreement(tokens, tokens - self.disagreeing, 0.5)


class FakeGeneration:
    def __init__(self, engine, requests, method):
        self.engine, self.requests, self.method, self.taken, self.is_closed = engine, requests, method, 0, False
        self.chosen_logits = [[] for _ in requests]

    @property
    def done(self):
        return self.taken >= max(request.max_new_tokens for request in self.requests)

    @property
    def phase(self):
        return "decode" if self.taken else "prefill"

    def step(self):
        assert all(request.ignore_eos for request in self.requests)
        self.engine.log.append((self.engine.kind, self.method))
        with self.engine.exclusive():
            self.engine.clock.now += self.engine.step_s(self.method, self.taken)
        self.taken += 1
        events = []
        for index, request in enumerate(self.requests):
            if self.taken <= request.max_new_tokens:
                ids = tuple(range(self.taken))
                self.chosen_logits[index].append(0.0)
                events.append(TokenEvent(index, self.taken - 1, self.taken, False, ids, lambda ids: "x" * len(ids)))
            if self.taken == request.max_new_tokens:
                completion = Completion("x" * self.taken, list(range(self.taken)), "length", 0.0, 0.0, request.adapter)
                events.append(FinishEvent(index, completion))
        return events

    def close(self):
        self.engine.closed += not self.is_closed
        self.is_closed = True
