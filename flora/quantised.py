"""Base models in 8 or 4 bits, by bitsandbytes: what may be asked for, what is refused, and weights quantised one layer at a time.

What 8 bits do to a batch's answers, and `llm_int8_threshold` with it, is in docs/int8.md.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from flora.errors import ModelError

if TYPE_CHECKING:  # a bare GPU machine, which measures what is not quantised, need not have it
    from bitsandbytes.nn import Int8Params, Params4bit

QUANTIZATIONS = (None, "int8", "nf4")
LLM_INT8_THRESHOLD = 6.0
"""An input of this size or more is an outlier: bitsandbytes' own default, from the LLM.int8() paper."""

_CPU_OUT_MULTIPLE, _CPU_IN_MULTIPLE = 32, 64
"""What d_out and d_in of a 4-bit layer must be multiples of, where bitsandbytes packs it for a CPU with bfloat16 products."""

_QUANTISED_AT_ONCE = 1 << 18
"""Elements: quantising one takes up to a hundred bytes for a moment."""
_ROWS_MULTIPLE = 64  # so that blocks of 4-bit weights begin and end with the rows


def check_quantisation(quantize: str | None, llm_int8_threshold: float | None) -> None:
    """ModelError for an unknown `quantize`, or a threshold that is no number of at least 0 or is not for int8."""
    if quantize not in QUANTIZATIONS:
        raise ModelError(f"quantize {quantize!r} is unknown: use int8, nf4 or None")
    if quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"quantize {quantize!r} needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if llm_int8_threshold is None:
        return
    if quantize != "int8":
        raise ModelError("llm_int8_threshold is a setting of 8-bit weights: give quantize='int8' with it, or leave it out")
    is_number = isinstance(llm_int8_threshold, int | float) and not isinstance(llm_int8_threshold, bool)
    if not is_number or not math.isfinite(llm_int8_threshold) or llm_int8_threshold < 0:
        raise ModelError(
            f"llm_int8_threshold {llm_int8_threshold!r} is no threshold: use a number above 0, such as 6.0, or 0.0 for no outliers"
        )


def quantisation_config(quantize: str, dtype: torch.dtype, llm_int8_threshold: float | None) -> BitsAndBytesConfig:
    """What transformers is told. dtype: that of the 4-bit layers' products. llm_int8_threshold: None for the default."""
    if quantize == "int8":
        # bitsandbytes logs at every call of every layer that it reads inputs through float16; docs/int8.md says it once.
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_not_about_the_cast)
        threshold = LLM_INT8_THRESHOLD if llm_int8_threshold is None else float(llm_int8_threshold)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _is_not_about_the_cast(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in str(record.msg)


def prepare_layers(model: PreTrainedModel, config: BitsAndBytesConfig) -> None:
    """Swap the linear layers of a model without storage for bitsandbytes', as transformers does: all but the output head."""
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    quantizer.postprocess_model(model)


def is_quantised_weight(parameter: nn.Parameter) -> bool:
    """Whether a parameter is, or will be, quantised."""
    return type(parameter).__name__ in ("Int8Params", "Params4bit")


def quantised_parameter(
    draw: Callable[[int], Tensor], prepared: Int8Params | Params4bit, layer: nn.Module, device: torch.device
) -> nn.Parameter:
    """A weight (d_out, d_in), quantised as it is made, some rows at a time, as bitsandbytes would quantise it whole.

    draw: n → the next n rows (n, d_in) on `device`. prepared: the parameter of `layer`, without storage, that the result replaces.
    """
    from bitsandbytes import functional
    from bitsandbytes.nn import Int8Params, Params4bit

    d_out, d_in = layer.out_features, layer.in_features
    rows = _ROWS_MULTIPLE * max(1, _QUANTISED_AT_ONCE // (_ROWS_MULTIPLE * d_in))
    pieces = [min(rows, d_out - first) for first in range(0, d_out, rows)]
    if isinstance(prepared, Int8Params):
        codes = torch.empty(d_out, d_in, dtype=torch.int8, device=device)
        scales = torch.empty(d_out, dtype=torch.float32, device=device)
        for into, scale, count in zip(codes.split(pieces), scales.split(pieces), pieces, strict=True):
            quantised, row_scales, _ = functional.int8_vectorwise_quant(draw(count).half())
            into.copy_(quantised)
            scale.copy_(row_scales)
        return Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    packed = torch.empty((d_out * d_in + 1) // 2, 1, dtype=torch.uint8, device=device)
    block_scales = []
    for into, count in zip(packed.split([(count * d_in + 1) // 2 for count in pieces]), pieces, strict=True):
        quantised, state = functional.quantize_4bit(draw(count), blocksize=prepared.blocksize, quant_type=prepared.quant_type)
        into.copy_(quantised)
        block_scales.append(state.absmax)
    state.absmax, state.shape = torch.cat(block_scales), torch.Size((d_out, d_in))
    options = vars(prepared) | {"quant_state": state, "bnb_quantized": True, "module": layer}
    layer.quant_state = state
    return Params4bit(packed, requires_grad=False, **options)


def check_layers(model: nn.Module, display: str) -> None:
    """ModelError for a model with a 4-bit layer that bitsandbytes cannot compute on this CPU. display: the model's name."""
    for name, layer in model.named_modules():
        if type(layer).__name__ != "Linear4bit" or layer.weight.device.type != "cpu":
            continue
        packs = getattr(layer, "support_avx512bf16_for_cpu", False)
        if packs and (layer.out_features % _CPU_OUT_MULTIPLE or layer.in_features % _CPU_IN_MULTIPLE):
            raise ModelError(
                f"model {display} cannot be served in nf4 on this CPU: layer {name} is {layer.in_features} → {layer.out_features} "
                f"wide, and bitsandbytes takes multiples of {_CPU_IN_MULTIPLE} → {_CPU_OUT_MULTIPLE} here; use int8 or none"
            )


def threshold_of(model: nn.Module) -> float | None:
    """The threshold of a model's 8-bit layers, None where it has none."""
    return next((layer.state.threshold for layer in model.modules() if type(layer).__name__ == "Linear8bitLt"), None)
