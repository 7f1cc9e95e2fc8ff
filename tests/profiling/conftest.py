"""Real engines on small random models, and an engine whose every step takes exactly as long as a test says."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, WhisperForConditionalGeneration

from flora.engine import Agreement, Completion, Engine, FinishEvent, Request, TokenEvent
from flora.errors import UnknownAdapterError


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """{kind: (model folder, {tag: [fLoRA folder, LoRA folder]})}"""
    root = tmp_path_factory.mktemp("models")
    folders = {}
    for kind, save, auto, layers, tags in (
        ("code", tiny_models.save_code_model, AutoModelForCausalLM, tiny_models.CODE_LAYERS, ("lua", "rb")),
        ("speech", tiny_models.save_speech_model, WhisperForConditionalGeneration, tiny_models.SPEECH_LAYERS, ("cs", "lt")),
    ):
        model_folder = save(root / f"{kind}-model")
        model = auto.from_pretrained(model_folder)
        adapters = {}
        for seed, tag in enumerate(tags):
            flora = tiny_models.save_flora_adapter(root / kind / tag / "flora", model, layers, rank=1 + seed, seed=seed)
            lora = tiny_models.save_peft_lora(root / kind / tag / "lora", model_folder, layers, rank=2, seed=seed)
            adapters[tag] = [flora, lora]
        folders[kind] = (model_folder, adapters)
    return folders


@pytest.fixture(scope="session")
def engines(model_folders):
    return {kind: Engine.from_pretrained(model, adapters) for kind, (model, adapters) in model_folders.items()}


@pytest.fixture
def tone() -> np.ndarray:
    """Half a second of a 440 Hz tone at 16 kHz: (8000,) float32."""
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)).astype(np.float32)


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
    log: list = field(default_factory=list)
    started: int = 0
    closed: int = 0
    verified: list = field(default_factory=list)

    def __post_init__(self):
        self.device, self.dtype, self.name = torch.device("cpu"), torch.float32, self.kind
        self.adapters = {tag: SimpleNamespace(ranks={"flora": 1, "lora": 4}, sources=()) for tag in ("lua", "cs")}
        self.model = torch.nn.Linear(2, 2)
        self.model.config = SimpleNamespace(hidden_size=2, num_hidden_layers=1)

    def validate(self, request, method):
        if request.adapter is not None and request.adapter not in self.adapters:
            raise UnknownAdapterError(f"unknown adapter {request.adapter!r}")

    def start(self, requests, method, seed=0):
        if method in self.refuses:
            raise self.refuses[method]
        self.started += 1
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


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The clock that the comparison reads in this test."""
    clock = Clock()
    monkeypatch.setattr("profiling.timing.time", clock)
    monkeypatch.setattr("profiling.compare.time", clock)
    return clock


@pytest.fixture
def mixed_batch(tone) -> list[Request]:
    return [
        Request(prompt="local x", adapter="lua", max_new_tokens=6),
        Request(audio=tone, sampling_rate=16000, adapter="cs", max_new_tokens=6),
        Request(prompt="def f", adapter="rb", max_new_tokens=6),
        Request(audio=tone[:4000], sampling_rate=16000, max_new_tokens=6),
    ]
