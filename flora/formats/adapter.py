"""Adapter: one checkpoint's factors, ready for the bank; reading and writing them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from flora.errors import CheckpointError, quoted
from flora.formats.files import CONFIG_FILE, display_name, locate, read_config, read_tensors, split_index, write
from flora.formats.kinds import KEY_PREFIX, KINDS, MAY_HOLD_SEVERAL, SERVED, Checkpoint


@dataclass(frozen=True)
class Adapter:
    """One adapter, ready for the bank.

    factors: layer → A (r, d_in), B (r, d_out), float32, every scale folded into B; None stands for a side that is all ones, as
    wide as the layer. source: the folder or hub id as it was given. scaled_biases: the layers whose bias is multiplied too, by
    the sum of B over components (IA3 that scales an output). peft_type: what the checkpoint calls itself, such as "LORA"; None for
    factors that were read from none. added_biases: layer → (d_out,), float32, added to the layer's own bias (LoRA with lora_bias).
    On every other layer the bias is the layer's own.
    """

    family: str
    factors: dict[str, tuple[Tensor | None, Tensor | None]]
    base_model: str | None
    source: str
    scaled_biases: frozenset[str] = frozenset()
    peft_type: str | None = None
    added_biases: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank over the layers."""
        return max(side.shape[0] for side in self._sides())

    @property
    def num_parameters(self) -> int:
        return sum(numbers.numel() for numbers in [*self._sides(), *self.added_biases.values()])

    def _sides(self) -> list[Tensor]:
        return [side for pair in self.factors.values() for side in pair if side is not None]


def read_adapter(source: str | Path) -> Adapter:
    """Read a checkpoint from a folder or, where no such folder exists and the name has the form owner/name, from the hub.

    "source#2" is the third adapter of a checkpoint that holds several, as the authors' may. Raises CheckpointError, naming the
    folder by its last two parts only, for whatever is wrong with it.
    """
    place, index = split_index(source)
    folder, name = locate(place), display_name(place)
    config = read_config(folder, name)
    peft_type = config.get("peft_type")
    if peft_type is None:
        raise CheckpointError(f"adapter {name}: {CONFIG_FILE} has no peft_type; save it again with PEFT")
    kind = KINDS.get(peft_type) if isinstance(peft_type, str) else None
    if kind is None:
        raise CheckpointError(f"adapter {name}: PEFT type {quoted(peft_type)} cannot be served per row; {SERVED} can")
    if index is not None and peft_type not in MAY_HOLD_SEVERAL:
        raise CheckpointError(f"adapter {name} holds one adapter: leave #{index} out")
    if config.get("modules_to_save"):
        raise CheckpointError(
            f"adapter {name} replaces whole modules (modules_to_save={quoted(config['modules_to_save'])}), "
            "which cannot be served per row"
        )
    meaning = kind(Checkpoint(name, config, read_tensors(folder, name), index))
    base_model = config.get("base_model_name_or_path")
    return Adapter(
        family=meaning.family,
        factors=meaning.factors,
        base_model=base_model if isinstance(base_model, str) else None,
        source=str(source),
        scaled_biases=frozenset(meaning.scaled_biases),
        peft_type=peft_type,
        added_biases=meaning.added_biases,
    )


def write_flora(folder: str | Path, factors: dict[str, tuple[Tensor, Tensor]], config: dict) -> None:
    """Write a fLoRA checkpoint. factors: layer → A (r, d_in), B (r, d_out). config: what `read_adapter` needs beyond them."""
    tensors = {}
    for layer, (A, B) in factors.items():
        tensors[f"{KEY_PREFIX}{layer}.flora_A"] = A.detach().contiguous().cpu()
        tensors[f"{KEY_PREFIX}{layer}.flora_B"] = B.detach().contiguous().cpu()
    write(Path(folder), tensors, {"peft_type": "FLORA", "combine": "sum", **config})


def write_lora(folder: str | Path, factors: dict[str, tuple[Tensor, Tensor]], config: dict) -> None:
    """Write a LoRA checkpoint that PEFT loads. factors: layer → A (r, d_in), B (r, d_out) with scale 1 (lora_alpha = r, which is
    written whatever `config` says; a layer of another rank than the largest has a pattern of its own)."""
    tensors = {}
    for layer, (A, B) in factors.items():
        tensors[f"{KEY_PREFIX}{layer}.lora_A.weight"] = A.detach().contiguous().cpu()
        tensors[f"{KEY_PREFIX}{layer}.lora_B.weight"] = B.detach().T.contiguous().cpu()
    ranks = {layer: len(A) for layer, (A, _) in factors.items()}
    largest = max(ranks.values(), default=1)
    others = {re.escape(layer): rank for layer, rank in ranks.items() if rank != largest}
    about = {"r": largest, "lora_alpha": largest, "rank_pattern": others, "alpha_pattern": others}
    write(Path(folder), tensors, {"peft_type": "LORA", **config, **about})
