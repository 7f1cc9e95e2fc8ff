"""Adapter checkpoints ↔ bank entries: PEFT's LoRA and IA3 and this project's fLoRA, from a folder or the hub, safetensors only.

A checkpoint is a PEFT folder: adapter_config.json and adapter_model.safetensors, keys `base_model.model.<layer>.<factor>`.

    LoRA   lora_A.weight (r, d_in), lora_B.weight (d_out, r); scale lora_alpha / r, or lora_alpha / √r with use_rslora
    fLoRA  flora_A (r, d_in), flora_B (r, d_out); `combine` says whether it was trained with the sum or the mean over components
    IA3    ia3_l, of a feed-forward layer (1, d_in), scales its input; of another (d_out, 1), scales its output, the bias with it:
           fLoRA of rank 1 whose other side is all ones

No pickle is ever opened: a folder that has only adapter_model.bin is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flora.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")
KEY_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """One adapter, ready for the bank.

    factors: layer → A (r, d_in), B (r, d_out), float32, every scale folded into B; None stands for a side that is all ones, as
    wide as the layer. source: the folder or hub id as it was given. scaled_biases: the layers whose bias is multiplied too, by
    the sum of B over components (IA3 that scales an output); everywhere else the bias is added as it is. peft_type: what the
    checkpoint calls itself, such as "LORA"; None for factors that were read from none.
    """

    family: str
    factors: dict[str, tuple[Tensor | None, Tensor | None]]
    base_model: str | None
    source: str
    scaled_biases: frozenset[str] = frozenset()
    peft_type: str | None = None

    @property
    def rank(self) -> int:
        """The largest rank over the layers."""
        return max(side.shape[0] for side in self._sides())

    @property
    def num_parameters(self) -> int:
        return sum(side.numel() for side in self._sides())

    def _sides(self) -> list[Tensor]:
        return [side for pair in self.factors.values() for side in pair if side is not None]


def read_adapter(source: str | Path) -> Adapter:
    """Read a checkpoint from a folder or, where no such folder exists and the name has the form owner/name, from the hub.

    Raises CheckpointError, naming the folder by its last part only, for whatever is wrong with it.
    """
    folder = _locate(source)
    name = _display_name(source)
    config = _read_config(folder, name)
    peft_type = config.get("peft_type")
    if peft_type is None:
        raise CheckpointError(f"adapter {name}: {CONFIG_FILE} has no peft_type; save it again with PEFT")
    if not isinstance(peft_type, str) or peft_type not in _READERS:
        raise CheckpointError(f"adapter {name}: PEFT type {peft_type} is not supported; supported are {', '.join(_READERS)}")
    if config.get("modules_to_save"):
        raise CheckpointError(
            f"adapter {name} replaces whole modules (modules_to_save={config['modules_to_save']!r}), which cannot be served per row"
        )
    tensors = _read_tensors(folder, name)
    if not tensors:
        raise CheckpointError(f"adapter {name}: {WEIGHTS_FILE} holds no adapter weights")
    family, factors, scaled_biases = _READERS[peft_type](config, tensors, name)
    return Adapter(family, factors, config.get("base_model_name_or_path"), str(source), scaled_biases, peft_type)


def write_flora(folder: str | Path, factors: dict[str, tuple[Tensor, Tensor]], config: dict) -> None:
    """Write a fLoRA checkpoint. factors: layer → A (r, d_in), B (r, d_out). config: what `read_adapter` needs beyond them."""
    tensors = {}
    for layer, (A, B) in factors.items():
        tensors[f"{KEY_PREFIX}{layer}.flora_A"] = A.detach().contiguous().cpu()
        tensors[f"{KEY_PREFIX}{layer}.flora_B"] = B.detach().contiguous().cpu()
    _write(Path(folder), tensors, {"peft_type": "FLORA", "combine": "sum", **config})


def write_lora(folder: str | Path, factors: dict[str, tuple[Tensor, Tensor]], config: dict) -> None:
    """Write a LoRA checkpoint that PEFT loads. factors: layer → A (r, d_in), B (r, d_out) with scale 1 (lora_alpha = r)."""
    tensors = {}
    for layer, (A, B) in factors.items():
        tensors[f"{KEY_PREFIX}{layer}.lora_A.weight"] = A.detach().contiguous().cpu()
        tensors[f"{KEY_PREFIX}{layer}.lora_B.weight"] = B.detach().T.contiguous().cpu()
    _write(Path(folder), tensors, {"peft_type": "LORA", **config})


def _write(folder: Path, tensors: dict[str, Tensor], config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- reading


def _display_name(source: str | Path) -> str:
    """The last two parts of a path or a hub id: enough to recognise, nothing of the server's folders."""
    return "/".join(Path(str(source)).parts[-2:]).lstrip("/")


def _locate(source: str | Path) -> Path:
    folder = Path(source)
    name = _display_name(source)
    if len(name) > 255:
        raise CheckpointError(f"adapter {name[:40]}…: there is no such folder, and no name is that long")
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"adapter {name} is a file; give the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise CheckpointError(f"adapter {name}: there is no such folder")
    try:
        return Path(snapshot_download(str(source), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = "the hub cannot be reached" if isinstance(error, LocalEntryNotFoundError) else type(error).__name__
        raise CheckpointError(f"adapter {name} is neither a folder here nor readable on the hub ({reason})") from error


def _read_config(folder: Path, name: str) -> dict:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"adapter {name}: {CONFIG_FILE} is missing; give a folder that PEFT's save_pretrained wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"adapter {name}: {CONFIG_FILE} is not valid JSON; save the adapter again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"adapter {name}: {CONFIG_FILE} is not a JSON object; save the adapter again")
    return config


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = [file for file in PICKLE_FILES if (folder / file).exists()]
        if pickles:
            raise CheckpointError(
                f"adapter {name} has its weights in {pickles[0]}, a pickle, and pickles are never loaded; save it as safetensors"
            )
        raise CheckpointError(f"adapter {name}: {WEIGHTS_FILE} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"adapter {name}: {WEIGHTS_FILE} is truncated or not a safetensors file; save it again") from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"adapter {name}: tensor {key} is {tensor.dtype}, not floating point")
        tensors[key] = tensor.float()
        if not torch.isfinite(tensors[key]).all():
            raise CheckpointError(f"adapter {name}: tensor {key} has NaN or infinite weights")
    return tensors


def _pairs(tensors: dict[str, Tensor], suffix_A: str, suffix_B: str, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Sort tensors into layer → (A-side tensor, B-side tensor); anything else in the file, or a side without the other, is an
    error."""
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for side, suffix in (("A", suffix_A), ("B", suffix_B)):
            if key.endswith(suffix):
                sides.setdefault(key.removesuffix(suffix).removeprefix(KEY_PREFIX), {})[side] = tensor
                break
        else:
            raise _unknown_tensor(key, name)
    for layer, pair in sides.items():
        missing = {"A": suffix_A, "B": suffix_B}.keys() - pair.keys()
        if missing:
            raise CheckpointError(f"adapter {name}: layer {layer} lacks its {missing.pop()} side; the file is incomplete")
        if pair["A"].ndim != 2 or pair["B"].ndim != 2:
            raise CheckpointError(
                f"adapter {name}: layer {layer} has factors of {pair['A'].ndim} and {pair['B'].ndim} dimensions, not 2"
            )
        if pair["A"].shape[0] == 0:
            raise CheckpointError(f"adapter {name}: layer {layer} has rank 0; the file is incomplete")
    return {layer: (pair["A"], pair["B"]) for layer, pair in sides.items()}


def _unknown_tensor(key: str, name: str) -> CheckpointError:
    return CheckpointError(f"adapter {name}: tensor {key} is of no supported kind; only plain linear-layer factors are served")


def _alpha(config: dict, layer: str, rank: int, name: str) -> float:
    """PEFT's lora_alpha, or that of the first alpha_pattern whose key, a regular expression, matches the layer's name's end."""
    alpha, pattern = config.get("lora_alpha", rank), config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise CheckpointError(f"adapter {name}: alpha_pattern is not an object; save the adapter again")
    for key, value in pattern.items():
        try:
            matches = re.match(rf"(.*\.)?({key})$", layer)
        except re.error as error:
            raise CheckpointError(f"adapter {name}: alpha_pattern {key!r} is not a regular expression ({error.msg})") from error
        if matches:
            alpha = value
            break
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"adapter {name}: the lora_alpha of layer {layer} is {alpha!r}, not a finite number")
    return alpha


_Read = tuple[str, dict[str, tuple[Tensor | None, Tensor | None]], frozenset[str]]
"""Family, factors and scaled biases, as an `Adapter` has them."""


def _read_lora(config: dict, tensors: dict[str, Tensor], name: str) -> _Read:
    for flag, what in (
        ("use_dora", "DoRA"),
        ("use_qalora", "QALoRA"),
        ("lora_bias", "a LoRA bias"),
        ("alora_invocation_tokens", "aLoRA"),
        ("use_bdlora", "block-diagonal LoRA"),
        ("kasa_config", "KaSA"),
        ("layer_replication", "replicated layers"),
    ):
        if config.get(flag):
            raise CheckpointError(f"adapter {name} uses {what}, which is not of the form x Aᵀ B and cannot be served")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(("pissa", "corda", "olora", "lora_ga", "loftq")):
        raise CheckpointError(
            f"adapter {name} was trained on a base model that its start ({start}) had changed; "
            "convert it to a plain LoRA with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f"adapter {name} trains the base model's biases (bias={config['bias']!r}), which cannot be served per row"
        )
    factors = {}
    for layer, (A, B) in _pairs(tensors, ".lora_A.weight", ".lora_B.weight", name).items():
        rank = A.shape[0]
        if B.shape[1] != rank:
            raise CheckpointError(f"adapter {name}: layer {layer} has rank {rank} on its A side and {B.shape[1]} on its B side")
        alpha = _alpha(config, layer, rank, name)
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        factors[layer] = (A, B.T.contiguous() * scale)
    return "lora", factors, frozenset()


def _read_flora(config: dict, tensors: dict[str, Tensor], name: str) -> _Read:
    combine = config.get("combine")
    if combine not in ("sum", "mean"):
        raise CheckpointError(
            f"adapter {name}: combine is {combine!r}; a fLoRA checkpoint says whether it takes the 'sum' or the 'mean'"
        )
    factors = {}
    for layer, (A, B) in _pairs(tensors, ".flora_A", ".flora_B", name).items():
        if A.shape[0] != B.shape[0]:
            raise CheckpointError(
                f"adapter {name}: layer {layer} has rank {A.shape[0]} on its A side and {B.shape[0]} on its B side"
            )
        factors[layer] = (A, B / A.shape[0] if combine == "mean" else B)
    return "flora", factors, frozenset()


def _read_ia3(config: dict, tensors: dict[str, Tensor], name: str) -> _Read:
    factors: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    scaled_biases = set()
    for key, scale in tensors.items():
        if not key.endswith(".ia3_l"):
            raise _unknown_tensor(key, name)
        layer = key.removesuffix(".ia3_l").removeprefix(KEY_PREFIX)
        if scale.ndim != 2 or list(scale.shape).count(1) != 1 or scale.numel() == 0:
            raise CheckpointError(
                f"adapter {name}: layer {layer} has a scale of shape {tuple(scale.shape)}, not that of a linear layer, "
                "(1, d_in) or (d_out, 1)"
            )
        if scale.shape[0] == 1:
            factors[layer] = (scale, None)
        else:
            factors[layer] = (None, scale.T.contiguous())
            scaled_biases.add(layer)
    return "flora", factors, frozenset(scaled_biases)


_READERS: dict[str, Callable[[dict, dict[str, Tensor], str], _Read]] = {
    "LORA": _read_lora,
    "IA3": _read_ia3,
    "FLORA": _read_flora,
}
