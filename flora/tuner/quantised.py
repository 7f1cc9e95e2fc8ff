"""The weights of linear layers as plain tensors and back, quantised ones included: what merging takes.

A bitsandbytes layer's weight is read back exactly; what is stored is quantised anew, with the layer's own settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flora.layers import weight_of


@dataclass(frozen=True)
class Stored:
    """A layer's weight as the layer keeps it."""

    data: Any  # a plain layer's tensor; a quantised layer's parameter with its statistics
    scales: Tensor | None = None  # (d_out,), int8 only


def stored_weight(layer: nn.Module) -> Stored:
    """What `restore_weight` takes to put the weight back to the last bit."""
    kind = get_bnb_param_type(layer.weight)
    if not kind:
        return Stored(layer.weight.data)
    return Stored(layer.weight, _int8_scales(layer) if kind == "8bit" else None)


def restore_weight(layer: nn.Module, stored: Stored) -> None:
    """Put back what `stored_weight` gave, on the device the layer has now."""
    device, kind = layer.weight.device, get_bnb_param_type(layer.weight)
    if not kind:
        layer.weight.data = stored.data.to(device, layer.weight.dtype)
        return
    layer.weight = stored.data.to(device)
    if kind == "8bit":
        layer.weight.CB, layer.weight.SCB = layer.weight.data, stored.scales.to(device)
        _forget_int8_state(layer)


def plain_weight(layer: nn.Module) -> Tensor:
    """(d_out, d_in), floating point."""
    kind = get_bnb_param_type(layer.weight)
    if not kind:
        return weight_of(layer)
    unpack(layer)
    if kind == "8bit":
        layer.state.SCB = _int8_scales(layer)
    return dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None))


def store_weight(layer: nn.Module, weight: Tensor) -> None:
    """Make weight (d_out, d_in) the layer's, in the layer's layout and dtype, or quantised as the layer is."""
    old, kind = layer.weight, get_bnb_param_type(layer.weight)
    if not kind:
        layer.weight.data = (weight.T if isinstance(layer, Conv1D) else weight).to(old.dtype).contiguous()
        return
    cpu = weight.to("cpu")  # bitsandbytes quantises what is moved from there
    if kind == "8bit":
        layer.weight = type(old)(cpu, requires_grad=False, has_fp16_weights=False).to(old.device)
        _forget_int8_state(layer)
    else:
        layer.weight = type(old)(
            cpu,
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=layer,
        ).to(old.device)


def unpack(layer: nn.Module) -> None:
    """Undo the layout that a 4-bit layer gives its weight for inference on a CPU, which has no gradient and cannot be read back."""
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        layer.state_dict()  # unpacks as it saves; the function that does it is private


def _int8_scales(layer: nn.Module) -> Tensor:
    """(d_out,). They move from the weight to the layer's state at its first forward."""
    return layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB


def _forget_int8_state(layer: nn.Module) -> None:
    """The next forward takes the weight and its scales from the parameter again."""
    layer.state.CB = layer.state.SCB = None
