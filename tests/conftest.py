"""Tiny real checkpoints and the engines that serve them, made once per test run. No test reaches the network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from hypothesis import HealthCheck, settings

from flora import Engine

transformers.utils.logging.disable_progress_bar()
# A machine that is busy with something else makes examples slow, not wrong.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
# Tiny models gain nothing from a second thread, and a test's own computations would have their team beside that of the engines'
# (`flora.engine.device.ComputeThread`): on two cores both are slower then. Processes that tests start have as many as anywhere.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def as_many_threads_as_before():
    """A command line's --threads is torch's setting for the whole process, and another number of threads rounds in another way."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


RANKS = {"aa": {"flora": 1, "lora": 8}, "bb": {"flora": 3, "lora": 1}, "cc": {"flora": 8, "lora": 3}}
"""Tags of every tiny model, each with an adapter of both families; `bb`'s fLoRA was trained with the mean over components."""


@dataclass(frozen=True)
class Checkpoints:
    """A tiny base model's folder and its adapters' folders, tag → family → folder."""

    model: Path
    layers: tuple[str, ...]  # the names of the adapted layers
    adapters: dict[str, dict[str, Path]]

    def sources(self, *tags: str) -> dict[str, list[Path]]:
        """What `Engine.from_pretrained` takes; without tags, all of them."""
        return {tag: list(self.adapters[tag].values()) for tag in tags or self.adapters}

    def engine(self, *tags: str, **options) -> Engine:
        """An engine of one's own, for a test that changes it."""
        return Engine.from_pretrained(self.model, self.sources(*tags), device="cpu", **options)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Checkpoints]:
    """By architecture: "code" (GPTBigCode), "llama", "qwen2" and "speech" (Whisper)."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {}
    for name, save, layers in (
        ("code", tiny_models.save_code_model, tiny_models.CODE_LAYERS),
        ("llama", tiny_models.save_llama_model, tiny_models.LLAMA_LAYERS),
        ("qwen2", tiny_models.save_qwen2_model, tiny_models.QWEN2_LAYERS),
        ("speech", tiny_models.save_speech_model, tiny_models.SPEECH_LAYERS),
    ):
        folder = save(root / name)
        model = tiny_models.load_plain(folder)
        adapters: dict[str, dict[str, Path]] = {}
        for seed, (tag, ranks) in enumerate(RANKS.items()):
            place = root / f"{name}-adapters" / tag
            combine = "mean" if tag == "bb" else "sum"
            adapters[tag] = {
                "flora": tiny_models.save_flora_adapter(place / "flora", model, layers, ranks["flora"], seed, combine),
                "lora": tiny_models.save_peft_lora(place / "lora", folder, layers, ranks["lora"], seed),
            }
        made[name] = Checkpoints(folder, layers, adapters)
    return made


@pytest.fixture(scope="session")
def tiny_engines(checkpoints) -> dict[str, Engine]:
    """One engine per architecture with all adapters, shared by all tests: leave its adapters as they are."""
    return {name: made.engine() for name, made in checkpoints.items()}


@pytest.fixture(scope="session")
def clips() -> list[np.ndarray]:
    """Four clips of 0.3 to 1 s at 16 kHz, (samples,) float32, different enough to be told apart."""
    rng = np.random.default_rng(0)
    made = []
    for place, seconds in enumerate((1.0, 0.3, 0.7, 0.5)):
        t = np.arange(int(16000 * seconds)) / 16000
        tone = np.sin(2 * np.pi * (200 + 700 * place) * t) * (1 + np.sin(2 * np.pi * 3 * t))
        made.append((0.2 * tone + 0.02 * rng.normal(size=t.shape)).astype(np.float32))
    return made
