"""Base models: known names, where they come from, and how they are loaded."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    WhisperForConditionalGeneration,
)

from flora.errors import ModelError, first_line
from flora.quantised import check_layers, check_quantisation, quantisation_config, threshold_of
from flora.random_weights import random_weights
from flora.shapes import SHAPES, generation_of, processor_of

KNOWN_MODELS = {
    "starcoder": "bigcode/starcoder",
    "starcoderbase-3b": "bigcode/starcoderbase-3b",
    "starcoderbase-1b": "bigcode/starcoderbase-1b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "qwen2.5-coder-1.5b": "Qwen/Qwen2.5-Coder-1.5B",
    "whisper-large-v2": "openai/whisper-large-v2",
    "whisper-large-v3": "openai/whisper-large-v3",
}
"""Short names of base models on the hub: the paper's, and a newer one."""

WEIGHTS = ("pretrained", "random")


@dataclass(frozen=True)
class LoadedModel:
    """A base model in evaluation mode with what turns requests into its inputs.

    kind: "code" (a decoder-only language model) or "speech" (Whisper). processor: the tokenizer, or Whisper's processor. weights,
    quantize, llm_int8_threshold: how it was loaded; the threshold is None unless its weights have 8 bits.
    """

    kind: str
    name: str
    model: PreTrainedModel
    processor: Any
    weights: str = "pretrained"
    quantize: str | None = None
    llm_int8_threshold: float | None = None

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer if self.kind == "speech" else self.processor


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto": the first GPU, else the CPU. ModelError for a device this machine does not have."""
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"device {device!r} is unknown: use auto, cpu or cuda") from error
    if chosen.type not in ("cpu", "cuda") and not (chosen.type == "mps" and torch.backends.mps.is_available()):
        raise ModelError(f"device {chosen.type} is none that this machine can run a model on: use auto, cpu or cuda")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("device cuda was asked for, but this machine has no GPU that PyTorch can use; use --device cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {chosen} was asked for, but this machine has {torch.cuda.device_count()} GPUs, counted from 0")
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device, config: PreTrainedConfig) -> torch.dtype:
    """ "auto": float32 on a CPU; on a GPU the checkpoint's half precision, or bfloat16 where it was saved in float32."""
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        saved = getattr(config, "dtype", None)
        return saved if saved in (torch.float16, torch.bfloat16) else torch.bfloat16
    chosen = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if chosen not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ModelError(f"dtype {dtype!r} is unknown: use auto, float32, bfloat16 or float16")
    return chosen


def load_model(
    name: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    weights: str = "pretrained",
    seed: int = 0,
    llm_int8_threshold: float | None = None,
) -> LoadedModel:
    """Load a model by short name, hub id or local folder. safetensors only.

    quantize: "int8" or "nf4", all linear layers but the output head, by bitsandbytes. llm_int8_threshold: from which size on an
    input of an 8-bit layer is an outlier, 0.0 for never; None: 6.0. weights="random" builds the true shapes without reading any
    weight: created without storage, then filled in place in the final dtype; for the models of `KNOWN_MODELS` nothing at all is
    read, and a byte is a token. Raises ModelError with the way out for an unknown name, a gated model, an architecture that is not
    served, or nonsense options.
    """
    check_quantisation(quantize, llm_int8_threshold)
    if weights not in WEIGHTS:
        raise ModelError(f"weights {weights!r} is unknown: use pretrained or random")
    source = KNOWN_MODELS.get(str(name), str(name))
    display = str(name) if source != str(name) or not Path(source).exists() else Path(source).resolve().name
    if not Path(source).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        known = ", ".join(KNOWN_MODELS)
        raise ModelError(f"model {Path(source).name!r} is neither a folder here nor a hub id; short names are {known}")
    chosen_device = choose_device(device)
    is_offline = weights == "random" and source in SHAPES and not Path(source).is_dir()
    config = SHAPES[source]() if is_offline else _explained(AutoConfig.from_pretrained, source, display)
    chosen_dtype = choose_dtype(dtype, chosen_device, config)
    quantisation = None if quantize is None else quantisation_config(quantize, chosen_dtype, llm_int8_threshold)
    kind = "speech" if config.model_type == "whisper" else "code"
    auto_model = WhisperForConditionalGeneration if kind == "speech" else AutoModelForCausalLM
    if is_offline:
        processor = processor_of(config)
    else:
        processor = _explained(
            AutoProcessor.from_pretrained if kind == "speech" else AutoTokenizer.from_pretrained, source, display
        )
    if weights == "random":
        model = random_weights(auto_model, config, chosen_device, chosen_dtype, seed, quantisation)
        if is_offline:
            model.generation_config = generation_of(config)
    else:
        options: dict[str, Any] = {"dtype": chosen_dtype, "use_safetensors": True, "attn_implementation": "sdpa"}
        if quantisation is not None:
            options |= {"quantization_config": quantisation, "device_map": {"": chosen_device}}
        model, info = _explained(auto_model.from_pretrained, source, display, output_loading_info=True, **options)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ModelError(
                f"model {display} lacks {len(missing)} of its weights, {missing[0]} first, which would be random: download it again"
            )
        if quantisation is None:
            model = model.to(chosen_device)
    check_layers(model, display)
    model.eval().requires_grad_(False)
    return LoadedModel(kind, display, model, processor, weights, quantize, threshold_of(model))


def _explained(load: Any, source: str, display: str, **options: Any) -> Any:
    """Call a transformers loader; turn what it raises into one sentence with the way out."""
    try:
        return load(source, **options)
    except OSError as error:  # HfHubHTTPError and GatedRepoError among them
        if any(isinstance(cause, GatedRepoError) for cause in _causes(error)):
            way_out = "; its speed can be measured without it, with random weights" if source in SHAPES else ""
            raise ModelError(
                f"model {display} is gated: accept its licence on huggingface.co/{source} and log in with `hf auth login`{way_out}"
            ) from error
        logging.getLogger(__name__).info("loading %s failed", display, exc_info=error)
        raise ModelError(
            f"model {display} could not be loaded: check the name, the network and that the folder holds config.json, "
            "model.safetensors and the tokenizer's files"
        ) from error
    except SafetensorError as error:
        raise ModelError(f"model {display}: its .safetensors file is truncated or not one; download it again") from error
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        logging.getLogger(__name__).info("loading %s failed", display, exc_info=error)
        place = str(Path(source).absolute())  # where the folder lies is nobody's business
        reason = first_line(str(error).replace(place, display))
        raise ModelError(f"model {display} could not be loaded ({type(error).__name__}: {reason})") from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it was raised from: transformers raises an OSError from what the hub's client raised."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
