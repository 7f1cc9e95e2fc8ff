"""Small data of one's own: programs that a tiny model can learn, and clips that it can hear."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny_models
import torch
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM


@pytest.fixture(scope="session", autouse=True)
def imported_modules_are_no_garbage():
    """Every Trainer has Python look through all objects there are; those of the libraries need not be looked at."""
    gc.freeze()
    yield
    gc.unfreeze()


def write_lines(path: Path, rows: list[dict | str]) -> Path:
    """A JSONL file; a row that is a string is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def programs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"-- add {number}\n", "completion": f"return x + {number}"} for number in range(count)]


@pytest.fixture(scope="session")
def code_file(tmp_path_factory) -> Path:
    """Forty different programs, each a prompt and a completion."""
    return write_lines(tmp_path_factory.mktemp("programs") / "programs.jsonl", programs(40))


@pytest.fixture(scope="session")
def roomy_model(tmp_path_factory) -> Path:
    """A GPTBigCode of one layer on bytes, whose context holds the corpus's programs."""
    folder = tmp_path_factory.mktemp("roomy") / "model"
    torch.manual_seed(0)
    config = GPTBigCodeConfig(
        vocab_size=257, n_positions=2048, n_embd=16, n_layer=1, n_head=2, n_inner=24, bos_token_id=0, eos_token_id=0
    )
    GPTBigCodeForCausalLM(config).save_pretrained(folder)
    tiny_models.byte_tokenizer().save_pretrained(folder)
    return folder


def write_clip(path: Path, seconds: float = 0.6, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    soundfile.write(path, 0.1 * random.standard_normal(round(16_000 * seconds)), 16_000)
    return path


@pytest.fixture(scope="session")
def clips_folder(tmp_path_factory) -> Path:
    """Twelve clips of noise with metadata.jsonl beside them."""
    folder = tmp_path_factory.mktemp("clips")
    words = ("dva", "tři", "pět", "osm")
    for index in range(12):
        write_clip(folder / f"{index}.wav", 0.4 + 0.04 * index, index)
    rows = [{"file_name": f"{index}.wav", "text": f"{words[index % 4]} {words[index // 4]}"} for index in range(12)]
    write_lines(folder / "metadata.jsonl", rows)
    return folder
