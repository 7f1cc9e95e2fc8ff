"""AdaptedLinear and `inject`: linear layers are swapped from outside, the model's code is never touched.

An AdaptedLinear knows its base layer and its name. What to do in a forward, it reads from the `Serving` that the runner has put
on the bank for that forward: the method, and for this layer the factors and the routing. Without one it is its base layer.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from flora import backend, ops
from flora.errors import AdapterError
from flora.routing import Routing


@dataclass
class LayerPlan:
    """What one layer does in a batch's forwards: its factors and which of them serve which row."""

    A: Tensor  # (slots, r, d_in)
    B: Tensor  # (slots, r, d_out)
    routing: Routing
    merged_weight: Tensor | None = None  # (d_out, d_in), method `merged` only: the whole batch has one adapter
    bias: Tensor | None = None  # where an adapter changes the layer's own: (d_out,), or (n, 1, d_out) where rows differ
    added: ops.AddedRows | None = None  # method `mixed` only: the rows whose adapters add


class Serving(Protocol):
    """What the bank hands to every layer during a forward."""

    method: str

    def plan(self, layer: str) -> LayerPlan | None:
        """The layer's part, or None where no row of the batch has an adapter on that layer."""


class ServingHolder:
    """The one place where all layers of a model look for the forward's `Serving`; None outside of `AdapterBank.serve`."""

    def __init__(self) -> None:
        self.current: Serving | None = None


class AdaptedLinear(nn.Module):
    """A linear layer whose rows may each be served with an adapter of their own.

    base: `nn.Linear`, transformers' `Conv1D`, or a layer with a private weight format (bitsandbytes), used as a black box.
    x: (n, l, d_in), n the batch's rows, in the batch's order. Returns (n, l, d_out).
    """

    def __init__(self, base: nn.Module, name: str, holder: ServingHolder) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.holder = holder
        self.is_black_box = is_black_box(base)
        self.in_features, self.out_features = features_of(base)

    @property
    def weight(self) -> Tensor:
        """(d_out, d_in), whatever the base layer's own layout. AdapterError for a quantised layer, which has no such matrix."""
        if self.is_black_box:
            raise AdapterError(
                f"layer {self.name} is quantised ({type(self.base).__name__}) and has no plain weight: "
                "use flora, flora-expand, bmm-lora, loop-lora, sgmv-lora, mixed or base, or load the model without quantize"
            )
        return weight_of(self.base)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        serving = self.holder.current
        plan = None if serving is None else serving.plan(self.name)
        if plan is None:
            return self.base(x)
        bias = self.bias if plan.bias is None else plan.bias
        if bias is not None and bias.ndim > 1:
            return self._serve(x, serving.method, plan, None) + bias
        return self._serve(x, serving.method, plan, bias)

    def _serve(self, x: Tensor, method: str, plan: LayerPlan, bias: Tensor | None) -> Tensor:
        if plan.merged_weight is not None:
            return linear(x, plan.merged_weight, bias)
        if x.shape[0] != plan.routing.slots.shape[0]:
            raise AdapterError(
                f"layer {self.name} got {x.shape[0]} rows for a batch of {plan.routing.slots.shape[0]}: "
                "this architecture reshapes its batch before the layer, which per-row adapters cannot follow"
            )
        form = self._kernel(method, x.shape[1], plan.routing)
        if form is not None:
            product = partial(product_of, self.base)
            return backend.kernels_on(x.device.type).serve(form, x, self._matrix(), product, plan.A, plan.B, plan.routing, bias)
        more = {} if plan.added is None else {"added": plan.added}
        if self.is_black_box:
            around = ops.around_function_of(method)
            if around is None:
                _ = self.weight  # says what the method needs
            return around(partial(product_of, self.base), x, plan.A, plan.B, plan.routing, bias, **more)
        return ops.function_of(method)(x, self.weight, plan.A, plan.B, plan.routing.slots, bias, plan.routing, **more)

    def _kernel(self, method: str, length: int, routing: Routing) -> str | None:
        """Which kernel serves rows of `length` tokens here, or None for PyTorch's own products, which alone have gradients."""
        kernels = backend.kernels_on(routing.slots.device.type)
        if kernels is None or torch.is_grad_enabled():
            return None
        return kernels.form_of(method, length, routing, self._matrix() is not None)

    def _matrix(self) -> tuple[Tensor, Tensor | None] | None:
        """The weight (d_out, d_in) as kernels read it, and the scales of an int8 one; None where only the layer itself knows it."""
        if not self.is_black_box:
            return weight_of(self.base), None
        return int8_of(self.base)

    def decode_reads(self, method: str, routing: Routing) -> tuple[Hashable, Tensor] | None:
        """What a decode step of this layer takes of a routing: all that is not in its tensor, and the tensor with the rest.

        None where a captured graph cannot be replayed for another batch: the layer's product may wait for the device, or the
        method finds its factors by numbers of the host.
        """
        form = self._kernel(method, 1, routing)
        if self.is_black_box and form not in ("decode", "modulate"):
            return None
        if form is not None:
            return backend.kernels_on(routing.slots.device.type).reads(form, routing)
        if method == "flora":
            method = routing.cheaper_form(1, self.weight.element_size(), routing.slots.device.type)
        layout = routing.layout(method)
        return None if layout is None else ((method, layout), routing.read_by(method))

    def merge(self, family: str, A: Tensor, B: Tensor) -> Tensor:
        """A new weight (d_out, d_in) with one adapter of `family` merged in: A (r, d_in), B (r, d_out)."""
        merge = ops.merge_flora if family == "flora" else ops.merge_lora
        return merge(self.weight, A, B)

    def store_by_input(self) -> None:
        """Store a plain float32 weight on a CPU with each input's column in one piece; its shape stays (d_out, d_in).

        For the few rows of a decode step, MKL's product with a weight that lies so is up to a third faster.
        """
        weight = self.base.weight
        if type(self.base) is nn.Linear and weight.device.type == "cpu" and weight.dtype == torch.float32:
            weight.data = stored_by_input(weight.data)

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.name}"


# ------------------------------------------------------------------------------------------- linear layers of any kind


def is_adaptable(module: nn.Module) -> bool:
    """Whether a module is a linear layer that adapters can be put on: plain, bitsandbytes', or Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def is_black_box(layer: nn.Module) -> bool:
    """Whether only the layer itself knows how to multiply by its weight, as a quantised one."""
    return not isinstance(layer, Conv1D) and type(layer) is not nn.Linear


def features_of(layer: nn.Module) -> tuple[int, int]:
    """d_in and d_out."""
    return tuple(layer.weight.shape) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


def stored_by_input(weight: Tensor) -> Tensor:
    """weight (d_out, d_in) with each input's column in one piece."""
    return weight.T.contiguous().T


def weight_of(layer: nn.Module) -> Tensor:
    """(d_out, d_in), whatever the layer's own layout; only for a layer that is no black box."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def int8_of(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The weight (d_out, d_in) and the scales (d_out,) of bitsandbytes' 8-bit layer, weight · scale / 127 each; else None."""
    if type(layer).__name__ != "Linear8bitLt" or layer.weight.dtype != torch.int8:
        return None
    # The scales move from the weight to the layer's state at its first forward.
    return layer.weight.data, layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB


def product_of(layer: nn.Module, x: Tensor) -> Tensor:
    """x @ weight.T through the layer itself, without its bias: the way around a black box."""
    bias = layer.bias  # before the call: accelerate may put an offloaded layer's away behind it
    y = layer(x)
    return y if bias is None else y - bias.to(y.dtype)


def inject(model: nn.Module, holder: ServingHolder, skip: tuple[nn.Module, ...] = ()) -> dict[str, AdaptedLinear]:
    """Swap every linear layer of `model` for an AdaptedLinear, in place; `skip` names the modules to leave (the output head).

    Returns the new layers by their module name in the model, in the model's order. A second call finds nothing left to swap.
    """
    layers: dict[str, AdaptedLinear] = {}

    def visit(parent: nn.Module, prefix: str) -> None:
        for child_name, child in parent.named_children():
            name = f"{prefix}{child_name}"
            if isinstance(child, AdaptedLinear) or any(child is module for module in skip):
                continue
            if is_adaptable(child):
                layers[name] = AdaptedLinear(child, name, holder)
                setattr(parent, child_name, layers[name])
            else:
                visit(child, f"{name}.")

    with torch.no_grad():
        visit(model, "")
    return layers
