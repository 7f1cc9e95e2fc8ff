"""The adapter of a recipe: which layers, which PEFT configuration, and the folder it is written to.

LoRA and IA3 are PEFT's own. fLoRA is this project's method, `flora.tuner`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flora.errors import TrainingError
from flora.finetune.recipe import Recipe
from flora.formats import CONFIG_FILE, WEIGHTS_FILE
from flora.layers import is_adaptable
from flora.tuner import FloraConfig

CARD_FILE = "README.md"
ADAPTER_FILES = {CONFIG_FILE, WEIGHTS_FILE, CARD_FILE}


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear layer of a model by its name, but the output head."""
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if is_adaptable(module) and module is not head}


def adapter_config(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    """The PEFT configuration of a complete recipe. TrainingError for layers that the model does not have."""
    layers = linear_layers(model)
    targets = _targets(recipe, layers, model)
    shared: dict[str, Any] = {
        "target_modules": targets,
        "task_type": "CAUSAL_LM" if recipe.kind == "code" else None,
    }
    transposed = any(isinstance(layer, Conv1D) for layer in layers.values())  # PEFT's own methods want to be told
    if recipe.method == "lora":
        return LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, fan_in_fan_out=transposed, **shared)
    if recipe.method == "ia3":
        return IA3Config(feedforward_modules=_scaled_at_input(targets, model), fan_in_fan_out=transposed, **shared)
    std = {} if recipe.init_std is None else {"init_std": recipe.init_std}
    return FloraConfig(r=recipe.rank, init=recipe.init, **std, **shared)


def add_adapter(recipe: Recipe, model: PreTrainedModel) -> PeftModel:
    """The model with the recipe's adapter in it, the only part that is trained; the same start for the same seed."""
    config = adapter_config(recipe, model)
    torch.manual_seed(recipe.seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        if config.target_modules is None:
            raise TrainingError(
                f"PEFT knows no default layers of {model.config.model_type} for {recipe.method}: give --target-layers all, or names"
            ) from error
        raise TrainingError(f"PEFT cannot adapt this model: {str(error).partition(chr(10))[0][:200]}") from error


def remove_adapter(model: PeftModel) -> None:
    """Take the adapter out of the model, which is as it was before."""
    base = model.base_model.unload()
    vars(base).pop("peft_config", None)  # where PEFT leaves it, the next adapter would be taken for a second one


def _targets(recipe: Recipe, layers: dict[str, nn.Module], model: PreTrainedModel) -> list[str] | None:
    """Last parts of layers' names; None leaves the choice to PEFT's table of architectures."""
    if recipe.target_layers == ("default",):
        return None
    last_parts = sorted({name.rpartition(".")[2] for name in layers})
    if recipe.target_layers == ("all",):
        return last_parts
    for wanted in recipe.target_layers:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in layers):
            raise TrainingError(
                f"model {Path(recipe.model).name} has no linear layer {wanted!r}; there are {', '.join(last_parts)}: name some of "
                "these, or say all or default"
            )
    return sorted(recipe.target_layers)


def _scaled_at_input(targets: list[str] | None, model: PreTrainedModel) -> str | None:
    """Of IA3's layers, those whose input is scaled and not their output: an expression; None for PEFT's default.

    As the method has it, and PEFT in its table, it is the last layer of a feed-forward block, whose input are the activations. An
    architecture that the table lacks has all outputs scaled.
    """
    if targets is None:
        return None
    table = {**TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING, "whisper": ["fc2"]}
    names = table.get(model.config.model_type, [])
    return rf"(.*\.)?({'|'.join(re.escape(name) for name in names)})" if names else "(?!)"


# ------------------------------------------------------------------------------------------------------------------- writing


def round_to_half(model: PeftModel) -> None:
    """Round the adapter's values to float16, as they are written: what is scored is what is saved."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.half())


def write_adapter(folder: Path, model: PeftModel, card: str) -> None:
    """Write the PEFT folder, values in float16, with its card. `folder` exists."""
    halves = {name: value.half() for name, value in model.state_dict().items() if value.is_floating_point()}
    model.save_pretrained(folder, state_dict=halves, save_embedding_layers=False)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    for name, value in config.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            config[name] = sorted(value)  # PEFT keeps sets, whose order changes from run to run
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone


def refuse_used_output(folder: Path, overwrite: bool) -> None:
    """TrainingError where a result could not be put into `folder`, or not without losing what is there.

    overwrite: an adapter that is there may be replaced; a folder with anything else in it never is.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"output {folder.name} is a file: name a folder that is empty or does not exist")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise TrainingError(f"output folder {folder.name} is not empty: name another with --output, or give --overwrite")
        others = sorted({path.name for path in folder.iterdir()} - ADAPTER_FILES)
        if others:
            raise TrainingError(
                f"output folder {folder.name} holds {others[0]}, which is no adapter's: --overwrite replaces nothing but an adapter"
            )
    above = next(place for place in folder.parents if place.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise TrainingError(f"output folder {folder.name} cannot be made in {above.name or above}: name another with --output")


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A new folder to write into, that takes `folder`'s place, files settled on the disk, once all went well."""
    folder = Path(os.path.abspath(folder))  # the current folder, too, has a name
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        settle(partial)
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`, whatever is there."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def settle(folder: Path) -> None:
    """Have the disk write down every file of a folder, so that not even a power cut leaves half of one behind its name."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
