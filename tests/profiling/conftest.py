"""Real engines on small random models, and a clock that a test moves."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
from fake_engine import Clock
from transformers import AutoModelForCausalLM, WhisperForConditionalGeneration

from flora.engine import Engine, Request


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
