"""A checkpoint's folder: where it is, its configuration and its tensors, read with care and written as PEFT writes them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from flora.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FLOATING_POINT = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
)
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")


def split_index(source: str | Path) -> tuple[str | Path, int | None]:
    """A source and which of its adapters is meant: "folder#2" is the third in a checkpoint that holds several, None the only one.

    A folder whose own name ends so is that folder.
    """
    match = re.fullmatch(r"(.+)#(\d{1,9})", str(source))
    return (source, None) if match is None or os.path.exists(source) else (match[1], int(match[2]))


def display_name(source: str | Path) -> str:
    """The last two parts of a path or a hub id: enough to recognise, nothing of the server's folders."""
    return "/".join(Path(str(source)).parts[-2:]).lstrip("/")


def locate(source: str | Path) -> Path:
    """The folder that a source names, downloaded from the hub where it is a hub id and no folder here."""
    folder = Path(source)
    name = display_name(source)
    if len(name) > 255:
        raise CheckpointError(f"adapter {name[:40]}…: there is no such folder, and no name is that long")
    if os.path.isdir(folder):  # pathlib's raises for names that are too long and folders that may not be looked into
        return folder
    if os.path.exists(folder):
        raise CheckpointError(f"adapter {name} is a file; give the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise CheckpointError(f"adapter {name}: there is no such folder")
    try:
        return Path(snapshot_download(str(source), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = "the hub cannot be reached" if isinstance(error, LocalEntryNotFoundError) else type(error).__name__
        raise CheckpointError(f"adapter {name} is neither a folder here nor readable on the hub ({reason})") from error


def read_config(folder: Path, name: str) -> dict:
    """What adapter_config.json says; name: what errors call the adapter."""
    path = folder / CONFIG_FILE
    if not os.path.isfile(path):
        raise CheckpointError(f"adapter {name}: {CONFIG_FILE} is missing; give a folder that PEFT's save_pretrained wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = type(error).__name__
        raise CheckpointError(f"adapter {name}: {CONFIG_FILE} cannot be read ({reason}); check who may read it") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise CheckpointError(f"adapter {name}: {CONFIG_FILE} is not valid JSON; save the adapter again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"adapter {name}: {CONFIG_FILE} is not a JSON object; save the adapter again")
    return config


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """All tensors of adapter_model.safetensors, in float32 on the host; CheckpointError where one is no number or not finite."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = [file for file in PICKLE_FILES if (folder / file).exists()]
        if pickles:
            raise CheckpointError(
                f"adapter {name} has its weights in {pickles[0]}, a pickle, and pickles are never loaded; save it as safetensors"
            )
        raise CheckpointError(f"adapter {name}: {WEIGHTS_FILE} is missing")
    try:
        # Tensor by tensor, safetensors 0.8 keeps some bytes of each for ever; all at once, they come in another order each time.
        tensors = dict(sorted(load(path.read_bytes()).items()))
    except KeyError as error:
        precision = error.args[0]
        raise CheckpointError(f"adapter {name}: {WEIGHTS_FILE} holds {precision}, not floating point of 8 to 64 bits") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"adapter {name}: {WEIGHTS_FILE} is truncated or not a safetensors file; save it again") from error
    if not tensors:
        raise CheckpointError(f"adapter {name}: {WEIGHTS_FILE} holds no adapter weights")
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATING_POINT:
            raise CheckpointError(f"adapter {name}: tensor {key} is {tensor.dtype}, not floating point of 8 to 64 bits")
        tensors[key] = tensor.float()
        if not torch.isfinite(tensors[key]).all():
            raise CheckpointError(f"adapter {name}: tensor {key} has NaN or infinite weights")
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """Write both files, making the folder where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
