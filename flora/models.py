"""Base models: known names, where they come from, how they are loaded, and random weights at true shapes."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    WhisperForConditionalGeneration,
)

from flora.errors import ModelError, first_line

KNOWN_MODELS = {
    "starcoder": "bigcode/starcoder",
    "starcoderbase-3b": "bigcode/starcoderbase-3b",
    "starcoderbase-1b": "bigcode/starcoderbase-1b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "whisper-large-v2": "openai/whisper-large-v2",
    "whisper-large-v3": "openai/whisper-large-v3",
}
"""Short names of the paper's base models on the hub."""

QUANTIZATIONS = (None, "int8", "nf4")
WEIGHTS = ("pretrained", "random")


@dataclass(frozen=True)
class LoadedModel:
    """A base model in evaluation mode with what turns requests into its inputs.

    kind: "code" (a decoder-only language model) or "speech" (Whisper). processor: the tokenizer, or Whisper's processor.
    """

    kind: str
    name: str
    model: PreTrainedModel
    processor: Any

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
) -> LoadedModel:
    """Load a model by short name, hub id or local folder. safetensors only.

    weights="random" builds the true shapes without reading any weight: created without storage, then filled in place in the final
    dtype. Raises ModelError with the way out for an unknown name, a gated model, an architecture that is not served, or nonsense
    options.
    """
    if quantize not in QUANTIZATIONS:
        raise ModelError(f"quantize {quantize!r} is unknown: use int8, nf4 or None")
    if weights not in WEIGHTS:
        raise ModelError(f"weights {weights!r} is unknown: use pretrained or random")
    if weights == "random" and quantize is not None:
        raise ModelError("random weights cannot be quantised; choose weights='pretrained' or quantize=None")
    source = KNOWN_MODELS.get(str(name), str(name))
    display = str(name) if source != str(name) or not Path(source).exists() else Path(source).resolve().name
    if not Path(source).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        known = ", ".join(KNOWN_MODELS)
        raise ModelError(f"model {Path(source).name!r} is neither a folder here nor a hub id; short names are {known}")
    chosen_device = choose_device(device)
    config = _explained(AutoConfig.from_pretrained, source, display)
    chosen_dtype = choose_dtype(dtype, chosen_device, config)
    kind = "speech" if config.model_type == "whisper" else "code"
    auto_model = WhisperForConditionalGeneration if kind == "speech" else AutoModelForCausalLM
    processor = _explained(AutoProcessor.from_pretrained if kind == "speech" else AutoTokenizer.from_pretrained, source, display)
    if weights == "random":
        model = random_weights(auto_model, config, chosen_device, chosen_dtype, seed)
    else:
        options: dict[str, Any] = {"dtype": chosen_dtype, "use_safetensors": True, "attn_implementation": "sdpa"}
        if quantize is not None:
            options["quantization_config"] = _quantization(quantize, chosen_dtype)
            options["device_map"] = {"": chosen_device}
        model, info = _explained(auto_model.from_pretrained, source, display, output_loading_info=True, **options)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ModelError(
                f"model {display} lacks {len(missing)} of its weights, {missing[0]} first, which would be random: download it again"
            )
        if quantize is None:
            model = model.to(chosen_device)
    return LoadedModel(kind, display, model.eval().requires_grad_(False), processor)


def random_weights(
    auto_model: Any, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    """A model of `config`'s shapes with normal weights (0, initializer_range), allocated once, in `dtype`, on `device`."""
    config._attn_implementation = "sdpa"
    build = getattr(auto_model, "_from_config", None) or auto_model.from_config
    with init_empty_weights(include_buffers=False):  # rotary frequencies and causal masks are computed, not learnt
        model = build(config)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    std = getattr(config, "initializer_range", None) or getattr(config, "init_std", 0.02)
    made: dict[int, torch.nn.Parameter] = {}  # by the id of the parameter without storage: tied weights stay one
    for module in model.modules():
        for name, empty in module.named_parameters(recurse=False):
            if id(empty) not in made:
                values = torch.empty(empty.shape, dtype=dtype, device=device)
                if isinstance(module, torch.nn.LayerNorm) or "norm" in type(module).__name__.lower():
                    values.fill_(0.0 if name == "bias" else 1.0)
                elif values.ndim < 2:
                    values.zero_()
                else:
                    values.normal_(0.0, std, generator=generator)
                made[id(empty)] = torch.nn.Parameter(values, requires_grad=False)
            setattr(module, name, made[id(empty)])
    return model.to(device)


def _quantization(quantize: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _explained(load: Any, source: str, display: str, **options: Any) -> Any:
    """Call a transformers loader; turn what it raises into one sentence with the way out."""
    try:
        return load(source, **options)
    except GatedRepoError as error:
        raise ModelError(
            f"model {display} is gated: accept its licence on huggingface.co/{source} and log in with `hf auth login`"
        ) from error
    except (OSError, HfHubHTTPError) as error:
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
