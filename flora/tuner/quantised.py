"""The weights of linear layers as plain tensors and back, quantised ones included: what merging takes.

A bitsandbytes layer's weight is read back exactly; what is stored is quantised anew, with the layer's own settings.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flora.layers import weight_of


@dataclass(frozen=True)
class Stored:
    """A layer's weight as the layer keeps it."""

    weight: nn.Parameter  # a quantised layer's with its statistics
    scales: Tensor | None = None  # (d_out,), int8 only


def stored_weight(layer: nn.Module) -> Stored:
    """What `restore_weight` takes to put the weight back to the last bit."""
    return Stored(layer.weight, _int8_scales(layer) if get_bnb_param_type(layer.weight) == "8bit" else None)


def restore_weight(layer: nn.Module, stored: Stored) -> None:
    """Put back what `stored_weight` gave, on the device the layer has now."""
    device, dtype, kind = layer.weight.device, layer.weight.dtype, get_bnb_param_type(layer.weight)
    if not kind:
        layer.weight = stored.weight
        layer.weight.data = stored.weight.data.to(device, dtype)
        return
    layer.weight = stored.weight.to(device)
    if kind == "8bit":
        layer.weight.CB, layer.weight.SCB = layer.weight.data, stored.scales.to(device)
        _forget_int8_state(layer)


def plain_weight(layer: nn.Module) -> Tensor:
    """(d_out, d_in), floating point."""
    kind = get_bnb_param_type(layer.weight)
    if not kind:
        return weight_of(layer)
    if kind == "8bit":
        layer.state.SCB = _int8_scales(layer)
    return dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None))


def store_weight(layer: nn.Module, weight: Tensor) -> None:
    """Make weight (d_out, d_in) the layer's, in the layer's layout and dtype, or quantised as the layer is.

    As a new parameter: the old one may be tied to another module's, an output head's to the embedding.
    """
    old, kind = layer.weight, get_bnb_param_type(layer.weight)
    if not kind:
        data = (weight.T if isinstance(layer, Conv1D) else weight).to(old.dtype).contiguous()
        layer.weight = nn.Parameter(data, old.requires_grad)
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


def keep_trainable(layer: nn.Module) -> None:
    """Make a 4-bit layer stay in the layout that has a gradient and can be read back.

    On a CPU with AVX512-BF16, bitsandbytes gives it another one at its first forward in evaluation, rounds its scales to bfloat16,
    and from then on nothing can be trained through it.
    """
    if get_bnb_param_type(layer.weight) != "4bit":
        return
    layer.support_avx512bf16_for_cpu = False
    state = layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        layer.state_dict()  # unpacks as it saves
        state = layer.weight.quant_state
        if state.absmax.ndim == 2:  # scales that are not quantised themselves are left in the other layout
            state.absmax = state.absmax.T.flatten().float()


def _int8_scales(layer: nn.Module) -> Tensor:
    """(d_out,). They move from the weight to the layer's state at its first forward."""
    return layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB


def _forget_int8_state(layer: nn.Module) -> None:
    """The next forward takes the weight and its scales from the parameter again."""
    layer.state.CB = layer.state.SCB = None
