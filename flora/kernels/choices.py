"""Which of its candidates a kernel takes: the first, or what `flora.kernels.tuning` found fastest on this device and kept.

Nothing is measured here. What was kept is read once in a process, at the first launch; `remember` adds to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import triton
from torch import Tensor

from flora import user_cache
from flora.kernels.launch import Config

Choice = TypeVar("Choice", Config, tuple[Config, Config])


def key_of(form: str, d_in: int, d_out: int, dtype: torch.dtype, tile: tuple[int, ...], weight: Tensor | None = None) -> str:
    """What a choice holds for: the layer's size, x's dtype, the tile, and how the weight is stored where the kernel reads it."""
    return _key(form, d_in, d_out, dtype, tile, None if weight is None else (weight.dtype, weight.stride(0) == 1 < d_in))


@cache
def _key(
    form: str, d_in: int, d_out: int, dtype: torch.dtype, tile: tuple[int, ...], stored: tuple[torch.dtype, bool] | None
) -> str:
    words = [f"{d_in} to {d_out}", str(dtype).removeprefix("torch.")]
    if stored is not None:
        words += [f"{stored[0]} weight".removeprefix("torch.")] * (stored[0] != dtype) + ["by input"] * stored[1]
    return f"{form}: {', '.join(words)}, tile of {' x '.join(str(number) for number in tile)}"


def chosen(device: torch.device, key: str, candidates: Sequence[Choice]) -> Choice:
    """The one that was kept for a key on this device, if it still is a candidate; else the first."""
    kept = _kept(device).get(key)
    if kept is None:
        return candidates[0]
    return next((one for one in candidates if described(one) == kept), candidates[0])


def remember(device: torch.device, key: str, choice: Choice) -> None:
    """From now on, and in processes to come, as far as there is a place to keep it."""
    kept = _kept(device)
    kept[key] = described(choice)
    file = _file(device)
    if file is not None:
        user_cache.write(file, {**_identity(device), "choices": kept})


@cache
def described(choice: Config | tuple[Config, ...]) -> str:
    """In words, for whoever records which configuration a number was made with."""
    if isinstance(choice, Config):
        tile = " x ".join(str(size) for size in (choice.block_n, choice.block_k) if size)
        warps, stages = f"{choice.num_warps} warps", f"{choice.num_stages} stages"
        return f"{tile}, split {choice.split_k or 'auto'}, {warps}, {stages}, {choice.resident} resident"
    return "; ".join(described(one) for one in choice)


@cache
def _kept(device: torch.device) -> dict[str, str]:
    """What was kept for this device and these versions."""
    file = _file(device)
    found = None if file is None else user_cache.read(file)
    if not isinstance(found, dict) or not _identity(device).items() <= found.items() or not isinstance(found.get("choices"), dict):
        return {}
    return found["choices"]


def _identity(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device_name": name, "torch": str(torch.__version__), "triton": triton.__version__}


def _file(device: torch.device) -> Path | None:
    """None on a CPU: an interpreter's times say nothing of a kernel."""
    folder = user_cache.cache_folder() if device.type == "cuda" else None
    digest = hashlib.sha256(json.dumps(_identity(device), sort_keys=True).encode()).hexdigest()[:16]
    return None if folder is None else folder / f"kernels-{digest}.json"
