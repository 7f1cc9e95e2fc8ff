"""Random adapters of any rank for the layers of a model: thousands of them for load, one of each rank for a sweep.

An adapter depends on the seed, its number and what it is made for alone: the first ten of a thousand are the ten that one gets of
ten. Each changes a weight by `strength` of its own size, so that a trained model still answers sensibly, and differently for each.

    fLoRA  M = Σ_k B_k A_kᵀ lies around one by `strength`: the first component is near one, as after training from the identity;
           A of the others is standard normal and B small
    LoRA   Bᵀ A is as large as `strength` times the weight; the entries of A have variance 1 / d_in
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.pytorch_utils import Conv1D

from flora.errors import AdapterError, first_line
from flora.formats import Adapter, write_flora, write_lora
from flora.layers import AdaptedLinear

FAMILIES = ("flora", "lora")

STRENGTH = 0.1
"""A tenth of a weight: it changes greedy answers, and a trained model finds real text hardly more surprising."""


class RandomAdapters:
    """An endless, numbered row of random adapters that were made alike.

    layers: those of a model that may be adapted, as `AdapterBank.layers`. family: "flora" or "lora". targets: the ends of the names
    of those that are ("c_attn", "mlp.c_fc"); None: all. strength: the root mean square of what is added to a weight, relative to
    that of the weight; of a quantised layer, whose weight cannot be read, to 1 / √d_in. Raises AdapterError for nonsense.
    """

    def __init__(
        self,
        layers: Mapping[str, AdaptedLinear],
        family: str,
        rank: int,
        seed: int = 0,
        targets: Sequence[str] | None = None,
        strength: float = STRENGTH,
    ) -> None:
        if family not in FAMILIES:
            raise AdapterError(f"random adapters of family {family!r} cannot be made: families are {' and '.join(FAMILIES)}")
        if not isinstance(rank, int) or rank < 1:
            raise AdapterError(f"the rank of random adapters must be a whole number of at least 1, not {rank!r}")
        if not math.isfinite(strength) or strength <= 0:
            raise AdapterError(f"the strength of random adapters must be a positive number, not {strength!r}")
        self.family, self.rank, self.seed, self.strength = family, rank, seed, strength
        self.layers = _targeted(layers, targets)
        self._sizes = [rank * width for layer in self.layers.values() for width in (layer.in_features, layer.out_features)]
        # What standard normal numbers are multiplied by: A, B of every layer.
        self._scales = [self._scales_of(layer) for layer in self.layers.values()]

    def _scales_of(self, layer: AdaptedLinear) -> tuple[float, float]:
        if self.family == "flora":
            return 1.0, self.strength / math.sqrt(self.rank)
        d_in = layer.in_features
        size = 1 / math.sqrt(d_in)
        if not layer.is_black_box:
            size = layer.weight.detach().float().square().mean().sqrt().item()
        return 1 / math.sqrt(d_in), self.strength * size * math.sqrt(d_in / self.rank)

    @torch.no_grad()
    def adapter(self, number: int) -> Adapter:
        """The adapter of this number, in float32 on the host."""
        # PyTorch's generator looks at 32 bits of its seed only: seed and number are hashed first.
        bits = random.Random(f"{self.family} {self.rank} {self.seed} {number}").getrandbits(32)
        generator = torch.Generator().manual_seed(bits)
        sides = iter(torch.randn(sum(self._sizes), generator=generator).split(self._sizes))
        factors = {}
        for layer, (scale_A, scale_B) in zip(self.layers, self._scales, strict=True):
            A, B = (next(sides).view(self.rank, -1) for _ in range(2))  # (r, d_in), (r, d_out)
            B *= scale_B
            if self.family == "flora":
                # (1 + a)(1 + b) ≈ 1 + a + b: of the same size as one of the other components
                A[0] = 1 + A[0] * (scale_B / math.sqrt(2))
                B[0] = 1 + B[0] / math.sqrt(2)
            else:
                A *= scale_A
            factors[layer] = (A, B)
        return Adapter(self.family, factors, None, self.tag(number))

    def adapters(self, count: int) -> list[Adapter]:
        """The first `count` of them."""
        return [self.adapter(number) for number in range(count)]

    def tag(self, number: int) -> str:
        """What an adapter is called: its folder, and its tag unless it is given another."""
        return f"random-{self.family}-r{self.rank}-s{self.seed}-{number:04}"

    def write(self, folder: str | Path, count: int, base_model: str | None = None, task_type: str | None = None) -> dict[str, Path]:
        """Write the first `count` as PEFT checkpoints, tag → folder/tag, replacing those that are there.

        base_model, task_type: for PEFT, as in its configurations; "CAUSAL_LM" for a language model. Raises AdapterError where the
        folder cannot be written to.
        """
        transposed = any(isinstance(layer.base, Conv1D) for layer in self.layers.values())
        config = {
            "base_model_name_or_path": base_model,
            "task_type": task_type,
            "r": self.rank,
            "target_modules": list(self.layers),
            "inference_mode": True,
        }
        if self.family == "lora":
            config |= {"bias": "none", "fan_in_fan_out": transposed}
        write = write_flora if self.family == "flora" else write_lora
        written = {}
        for number in range(count):
            adapter = self.adapter(number)
            path = written[adapter.source] = Path(folder) / adapter.source
            try:
                write(path, adapter.factors, config)
            except (OSError, SafetensorError) as error:
                reason = first_line(getattr(error, "strerror", None) or type(error).__name__)
                raise AdapterError(f"adapter {adapter.source} could not be written ({reason}): choose another folder") from error
        return written


def _targeted(layers: Mapping[str, AdaptedLinear], targets: Sequence[str] | None) -> dict[str, AdaptedLinear]:
    """The layers whose name is, or ends in, one of `targets`, in the model's order."""
    if not layers:
        raise AdapterError("random adapters need layers to adapt, and this model has none")
    if targets is None:
        return dict(layers)
    if not targets or isinstance(targets, str):
        raise AdapterError(f"the layers of random adapters must be a list of names or None for all, not {targets!r}")
    for target in targets:
        if not any(_ends_in(name, target) for name in layers):
            ends = sorted({name.rpartition(".")[2] for name in layers})
            raise AdapterError(f"no layer of this model is called {target!r}; names end in {', '.join(ends)}")
    return {name: layer for name, layer in layers.items() if any(_ends_in(name, target) for target in targets)}


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
