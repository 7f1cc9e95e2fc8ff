"""FloraLinear: a linear layer with trainable fLoRA adapters, as PEFT's tuners wrap it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flora import ops
from flora.errors import AdapterError, RequestError
from flora.layers import features_of, is_black_box, product_of, weight_of
from flora.routing import Routing, route
from flora.tuner.config import FloraConfig, initial_factors
from flora.tuner.quantised import Stored, keep_trainable, plain_weight, restore_weight, store_weight, stored_weight

BASE_ROW = "__base__"
"""PEFT's name, among `adapter_names`, for a row that no adapter serves."""


class FloraLinear(nn.Module, BaseTunerLayer):
    """`nn.Linear`, transformers' `Conv1D`, or a bitsandbytes layer, with fLoRA adapters by name.

    y = Σ_k B_k ∘ ((A_k ∘ x) @ weight.T) + bias, or the mean over k. x: (…, d_in). Several active adapters multiply: the weight is
    modulated by each. A weight that is a plain tensor is modulated, or x expanded, whichever `flora.cost` finds cheaper; a
    quantised layer is always given the expanded x. Factors are float32, beside half precision and quantised layers too, or
    float64 beside a float64 layer.
    """

    adapter_layer_names = ("flora_A", "flora_B")
    other_param_names = ("r", "combine")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: FloraConfig, rank: int) -> None:
        super().__init__()
        keep_trainable(base_layer)
        self.base_layer = base_layer
        self.in_features, self.out_features = features_of(base_layer)
        self.flora_A = nn.ParameterDict()  # adapter → (r, d_in)
        self.flora_B = nn.ParameterDict()  # adapter → (r, d_out)
        self.r: dict[str, int] = {}
        self.combine: dict[str, str] = {}
        self.merged_adapters: list[str] = []
        self._weight_before_merge: Stored | None = None
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, rank)

    def update_layer(self, adapter_name: str, config: FloraConfig, rank: int) -> None:
        """Give the layer one more adapter, or an adapter of that name a new start."""
        A, B = initial_factors(config, self.in_features, self.out_features, rank=rank)
        self.flora_A[adapter_name], self.flora_B[adapter_name] = nn.Parameter(A), nn.Parameter(B)
        self.r[adapter_name], self.combine[adapter_name] = rank, config.combine
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's own rounds what it moves to the layer's dtype, and around one half precision has steps of a percent."""
        weight = self.base_layer.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        for side in (self.flora_A, self.flora_B):
            old = side[adapter_name]
            if old.device.type != "meta":  # a place for what is loaded later
                side[adapter_name] = nn.Parameter(old.detach().to(device or weight.device, dtype), old.requires_grad)

    def factors(self, adapter_names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """A (r, d_in) and B (r, d_out) of one adapter, the mean folded into B, or of the product of several, whose ranks multiply.

        (Σ_i b_i a_iᵀ) ∘ (Σ_j b'_j a'_jᵀ) = Σ_ij (b_i ∘ b'_j)(a_i ∘ a'_j)ᵀ: the product of modulations is a modulation.
        """
        A = B = None
        for name in adapter_names:
            a, b = self.flora_A[name], self.flora_B[name]
            if self.combine[name] == "mean":
                b = b / self.r[name]
            A = a if A is None else (A.unsqueeze(1) * a).flatten(0, 1)
            B = b if B is None else (B.unsqueeze(1) * b).flatten(0, 1)
        return A, B

    # ------------------------------------------------------------------------------------------------------ forward

    def forward(self, x: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor:
        """adapter_names: for each row of x the adapter that serves it, in one pass; without, every row gets the active adapters."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x)
        # What accelerate offloads is brought up by hooks around a module's own call, and the factors and weights are not called.
        hooks = [(module, module._hf_hook) for module in self.children() if getattr(module, "_hf_hook", None) is not None]
        for module, hook in hooks:
            hook.pre_forward(module)
        try:
            return self._forward_active(x) if adapter_names is None else self._forward_mixed(x, adapter_names)
        finally:
            for module, hook in hooks:
                hook.post_forward(module, None)

    def _forward_active(self, x: Tensor) -> Tensor:
        active = [name for name in self.active_adapters if name in self.flora_A]
        if self.merged or not active:
            return self.base_layer(x)
        A, B = self.factors(active)
        # To the op, one row of many tokens: all have the same adapter.
        rows = x.reshape(1, x.shape[:-1].numel(), self.in_features)
        y = self._serve(rows, A[None], B[None], _routing((0,), (A.shape[0],), A.shape[0], x.device))
        return y.reshape(*x.shape[:-1], self.out_features)

    def _forward_mixed(self, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        if self.merged:
            raise RequestError("adapter_names cannot be served while adapters are merged into the weights: unmerge them first")
        if len(adapter_names) != x.shape[0]:
            raise RequestError(
                f"adapter_names has {len(adapter_names)} names for {x.shape[0]} rows: give one per row "
                "(an architecture that reshapes its batch before the layer cannot be served so)"
            )
        names = list(dict.fromkeys(name for name in adapter_names if name in self.flora_A))
        if not names:
            return self.base_layer(x)
        ones = x.new_ones(1, self.in_features, dtype=self.flora_A[names[0]].dtype)
        pairs = [(ones, ones.new_ones(1, self.out_features)), *(self.factors([name]) for name in names)]
        A, B = (pad_sequence(side, batch_first=True) for side in zip(*pairs, strict=True))  # slot 0: the identity
        slot_of = {name: slot for slot, name in enumerate(names, start=1)}
        slots = tuple(slot_of.get(name, 0) for name in adapter_names)
        ranks = (0, *(self.r[name] for name in names))
        rows = x.reshape(x.shape[0], x.shape[1:-1].numel(), self.in_features)
        y = self._serve(rows, A, B, _routing(slots, ranks, A.shape[1], x.device))
        return y.reshape(*x.shape[:-1], self.out_features)

    def _serve(self, x: Tensor, A: Tensor, B: Tensor, routing: Routing) -> Tensor:
        base = self.base_layer
        if is_black_box(base):
            return ops.expand_around(partial(product_of, base), x, A, B, routing, base.bias)
        return ops.flora(x, weight_of(base), A, B, routing.slots, base.bias, routing)

    # ------------------------------------------------------------------------------------------------------ merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Multiply the base weight by adapters (default: the active ones). The weight before is kept, so that unmerging is exact.

        safe_merge: AdapterError, with nothing changed, where the merged weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.flora_A]
        if not names:
            return
        base = self.base_layer
        with torch.no_grad():
            weight = ops.merge_flora(plain_weight(base), *self.factors(names))
        if safe_merge and not torch.isfinite(weight).all():
            raise AdapterError(f"adapters {', '.join(names)} make weights that are NaN or infinite: nothing was merged")
        if not self.merged:
            self._weight_before_merge = stored_weight(base)
        store_weight(base, weight)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base weight back as it was before the first merge, to the last bit."""
        if not self.merged:
            warnings.warn("No adapter is merged: there is nothing to undo.", stacklevel=2)
            return
        restore_weight(self.base_layer, self._weight_before_merge)
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return f"flora.{super().__repr__()}"


@lru_cache(maxsize=256)
def _routing(slots: tuple[int, ...], ranks: tuple[int, ...], rank_stride: int, device: torch.device) -> Routing:
    """`flora.routing.route`, once for all layers and steps that ask the same."""
    with torch.inference_mode(False):  # its tensors may later be saved for a backward pass
        return route(slots, ranks, rank_stride, device)
