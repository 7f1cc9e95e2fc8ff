"""What each kind of adapter means: from a checkpoint's tensors and configuration to factors.

Keys of tensors are `base_model.model.<layer>.<factor>`. Shapes as PEFT, or this project, saves them:

    LoRA     lora_A.weight (r, d_in), lora_B.weight (d_out, r), with lora_bias lora_B.bias (d_out,);
             scale of B and its bias lora_alpha / r, or lora_alpha / √r with use_rslora
    IA3      ia3_l, of a feed-forward layer (1, d_in), scales its input; of another (d_out, 1), scales its output, the bias with it:
             fLoRA of rank 1 whose other side is all ones
    HiRA     hira_A (r, d_in), hira_B (d_out, r), never scaled: W + W ∘ (B A) is fLoRA with one more component, of ones
    fLoRA    flora_A (r, d_in), flora_B (r, d_out); `combine` says whether it was trained with the sum or the mean over components
    authors' be_alpha.weight, input side, and be_gamma.weight, output side: (adapters, d) of rank 1, else (r, adapters, d), the mean
             over r (trishullab/flora, whose PEFT type is "FLora"); one file may hold several adapters
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flora.errors import CheckpointError, first_line, quoted

KEY_PREFIX = "base_model.model."
SERVED = "LoRA, IA3, HiRA and fLoRA"

PEFT_ALPHA = 8
"""PEFT's lora_alpha where a configuration says nothing of it."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read, before anybody knows what it means."""

    name: str  # what errors call it
    config: dict
    tensors: dict[str, Tensor]
    index: int | None  # which of its adapters is meant, None: the only one


@dataclass(frozen=True)
class Meaning:
    """What an `Adapter` says of a checkpoint's tensors."""

    family: str
    factors: dict[str, tuple[Tensor | None, Tensor | None]]
    scaled_biases: set[str] = field(default_factory=set)
    added_biases: dict[str, Tensor] = field(default_factory=dict)


def _lora(checkpoint: Checkpoint) -> Meaning:
    name, config = checkpoint.name, checkpoint.config
    for flag, what in (
        ("use_dora", "DoRA"),
        ("use_qalora", "QALoRA"),
        ("alora_invocation_tokens", "aLoRA"),
        ("use_bdlora", "block-diagonal LoRA"),
        ("kasa_config", "KaSA"),
        ("arrow_config", "Arrow"),
        ("layer_replication", "replicated layers"),
    ):
        if config.get(flag):
            raise CheckpointError(
                f"adapter {name} uses {what}, which is not of the form x Aᵀ B and cannot be served per row; {SERVED} can"
            )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(("pissa", "corda", "olora", "lora_ga", "loftq")):
        raise CheckpointError(
            f"adapter {name} was trained on a base model that its start ({start[:80]}) had changed; "
            "convert it to a plain LoRA with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    _refuse_trained_biases(checkpoint)
    suffix = ".lora_B.bias"
    biases = {key: tensor for key, tensor in checkpoint.tensors.items() if config.get("lora_bias") and key.endswith(suffix)}
    of_layer = {_layer(key, suffix): bias for key, bias in biases.items()}
    factors: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    added_biases: dict[str, Tensor] = {}
    alpha_of = _alphas(config, name)
    for layer, (A, B) in _pairs(checkpoint, ".lora_A.weight", ".lora_B.weight", ignore=biases).items():
        rank = _common_rank(layer, A.shape[0], B.shape[1], name)
        alpha = alpha_of(layer)
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        factors[layer] = (A, B.T.contiguous() * scale)
        if config.get("lora_bias"):
            bias = of_layer.pop(layer, None)
            if bias is None or bias.shape != B.shape[:1]:
                found = "no bias" if bias is None else f"a bias of shape {tuple(bias.shape)}"
                raise CheckpointError(
                    f"adapter {name}: layer {layer} has {found}, and lora_bias promises one of shape ({B.shape[0]},); "
                    "the file is incomplete"
                )
            added_biases[layer] = bias * scale
    if of_layer:
        raise CheckpointError(f"adapter {name}: layer {min(of_layer)} has a bias and no factors; the file is incomplete")
    return Meaning("lora", factors, added_biases=added_biases)


def _ia3(checkpoint: Checkpoint) -> Meaning:
    meaning = Meaning("flora", {})
    for key, scale in checkpoint.tensors.items():
        if not key.endswith(".ia3_l"):
            raise _unknown_tensor(key, checkpoint.name)
        layer = _layer(key, ".ia3_l")
        if scale.ndim != 2 or list(scale.shape).count(1) != 1 or scale.numel() == 0:
            raise CheckpointError(
                f"adapter {checkpoint.name}: layer {layer} has a scale of shape {tuple(scale.shape)}, not that of a linear layer, "
                "(1, d_in) or (d_out, 1)"
            )
        if scale.shape[0] == 1:
            meaning.factors[layer] = (scale, None)
        else:
            meaning.factors[layer] = (None, scale.T.contiguous())
            meaning.scaled_biases.add(layer)
    return meaning


def _hira(checkpoint: Checkpoint) -> Meaning:
    factors: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for layer, (A, B) in _pairs(checkpoint, ".hira_A", ".hira_B").items():
        _common_rank(layer, A.shape[0], B.shape[1], checkpoint.name)
        factors[layer] = (torch.cat([A.new_ones(1, A.shape[1]), A]), torch.cat([B.new_ones(1, B.shape[0]), B.T]))
    return Meaning("flora", factors)


def _flora(checkpoint: Checkpoint) -> Meaning:
    combine = checkpoint.config.get("combine")
    if combine not in ("sum", "mean"):
        raise CheckpointError(
            f"adapter {checkpoint.name}: combine is {quoted(combine)}; "
            "a fLoRA checkpoint says whether it takes the 'sum' or the 'mean'"
        )
    factors: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for layer, (A, B) in _pairs(checkpoint, ".flora_A", ".flora_B").items():
        rank = _common_rank(layer, A.shape[0], B.shape[0], checkpoint.name)
        factors[layer] = (A, B / rank if combine == "mean" else B)
    return Meaning("flora", factors)


def _authors_flora(checkpoint: Checkpoint) -> Meaning:
    _refuse_trained_biases(checkpoint)
    name, factors = checkpoint.name, {}
    for layer, sides in _pairs(checkpoint, ".be_alpha.weight", ".be_gamma.weight", dimensions=(2, 3)).items():
        A, B = (side.unsqueeze(0) if side.ndim == 2 else side for side in sides)  # (r, adapters, d)
        rank = _common_rank(layer, A.shape[0], B.shape[0], name)
        count, count_B = A.shape[1], B.shape[1]
        if count != count_B:
            raise CheckpointError(f"adapter {name}: layer {layer} has {count} adapters on its A side and {count_B} on its B side")
        if checkpoint.index is None and count > 1:
            raise CheckpointError(f"adapter {name} holds {count} adapters: name one of {name}#0 to {name}#{count - 1}")
        if (checkpoint.index or 0) >= count:
            raise CheckpointError(f"adapter {name} holds {count} adapters, counted from 0, and no #{checkpoint.index}")
        which = checkpoint.index or 0
        factors[layer] = (A[:, which].contiguous(), B[:, which] / rank)
    return Meaning("flora", factors)


KINDS: dict[str, Callable[[Checkpoint], Meaning]] = {
    "LORA": _lora,
    "IA3": _ia3,
    "HIRA": _hira,
    "FLORA": _flora,
    "FLora": _authors_flora,
}
"""By what a configuration calls it, its peft_type."""

MAY_HOLD_SEVERAL = ("FLora",)
"""The kinds whose checkpoints may hold several adapters."""


# -------------------------------------------------------------------------------------------------------------- shared


def _layer(key: str, suffix: str) -> str:
    return key.removesuffix(suffix).removeprefix(KEY_PREFIX)


def _pairs(
    checkpoint: Checkpoint,
    suffix_A: str,
    suffix_B: str,
    ignore: dict[str, Tensor] | None = None,
    dimensions: tuple[int, ...] = (2,),
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sort tensors into layer → (A-side tensor, B-side tensor); anything else in the file but what is to be ignored, a side
    without the other, or a tensor of other dimensions, is an error."""
    name, sides = checkpoint.name, {}
    for key, tensor in checkpoint.tensors.items():
        if ignore is not None and key in ignore:
            continue
        for side, suffix in (("A", suffix_A), ("B", suffix_B)):
            if key.endswith(suffix):
                sides.setdefault(_layer(key, suffix), {})[side] = tensor
                break
        else:
            raise _unknown_tensor(key, name)
    for layer, pair in sides.items():
        missing = {"A", "B"} - pair.keys()
        if missing:
            raise CheckpointError(f"adapter {name}: layer {layer} lacks its {missing.pop()} side; the file is incomplete")
        if pair["A"].ndim not in dimensions or pair["B"].ndim not in dimensions:
            raise CheckpointError(
                f"adapter {name}: layer {layer} has factors of {pair['A'].ndim} and {pair['B'].ndim} dimensions, "
                f"not {' or '.join(map(str, dimensions))}"
            )
        if 0 in pair["A"].shape[:-1]:
            raise CheckpointError(f"adapter {name}: layer {layer} has rank 0; the file is incomplete")
    return {layer: (pair["A"], pair["B"]) for layer, pair in sides.items()}


def _common_rank(layer: str, rank_A: int, rank_B: int, name: str) -> int:
    if rank_A != rank_B:
        raise CheckpointError(f"adapter {name}: layer {layer} has rank {rank_A} on its A side and {rank_B} on its B side")
    return rank_A


def _unknown_tensor(key: str, name: str) -> CheckpointError:
    return CheckpointError(f"adapter {name}: tensor {key} is of no supported kind; only plain linear-layer factors are served")


def _refuse_trained_biases(checkpoint: Checkpoint) -> None:
    bias = checkpoint.config.get("bias", "none")
    if bias != "none":
        raise CheckpointError(
            f"adapter {checkpoint.name} trains the base model's biases (bias={quoted(bias)}), which cannot be served per row"
        )


def _alphas(config: dict, name: str) -> Callable[[str], float]:
    """layer → PEFT's lora_alpha, or that of the first alpha_pattern whose key, a regular expression, matches the layer's
    name's end."""
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise CheckpointError(f"adapter {name}: alpha_pattern is not an object; save the adapter again")
    compiled = []
    for key, alpha in pattern.items():
        try:
            compiled.append((re.compile(rf"(.*\.)?({key})$"), alpha))
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"adapter {name}: alpha_pattern {quoted(key)} is not a regular expression ({first_line(error)})"
            ) from error

    def alpha_of(layer: str) -> float:
        alpha = next((value for expression, value in compiled if expression.match(layer)), config.get("lora_alpha", PEFT_ALPHA))
        if not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:  # nor NaN, nor a whole number beyond
            raise CheckpointError(f"adapter {name}: the lora_alpha of layer {layer} is {quoted(alpha)}, not a finite number")
        return alpha

    return alpha_of
