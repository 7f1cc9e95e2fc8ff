"""AdapterBank: the adapters on the device, stacked by slot, so that one batch can use any of them.

For every family and every layer that an adapter of that family touches, the bank holds A (slots, r, d_in) and B (slots, r,
d_out), r the largest rank seen, and the true rank of each slot. Slot 0 is the identity adapter: rank 0, its first flora component
all ones. A tag holds one slot, with an adapter of each family or of one. A slot in use by a batch is never overwritten: it is
freed when the last batch lets go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flora import ops
from flora.errors import AdapterError, UnknownAdapterError
from flora.formats import Adapter
from flora.layers import AdaptedLinear, LayerPlan, ServingHolder

IDENTITY_SLOT = 0


@dataclass(frozen=True)
class AdapterInfo:
    """What the bank says of one tag."""

    name: str
    families: tuple[str, ...]
    ranks: dict[str, int]  # by family, the largest over the layers
    layers: dict[str, int]  # number of adapted layers by family
    size_bytes: int
    sources: tuple[str, ...]


@dataclass
class _Stack:
    """One family's factors of one layer, all slots."""

    A: Tensor  # (slots, r, d_in)
    B: Tensor  # (slots, r, d_out)
    ranks: list[int]  # true rank by slot; 0 where the slot has nothing on this layer
    biases: dict[int, Tensor] = field(default_factory=dict)  # slot → (d_out,), where it is not the layer's own


class BatchServing:
    """One batch's adapters, ready for every layer: made by `AdapterBank.serving`, used through `AdapterBank.serve`.

    Each layer's plan is worked out at its first use and kept: later steps of the same batch only look it up. Layers whose slots
    have the same ranks share one routing.
    """

    def __init__(self, bank: AdapterBank, slots: Sequence[int], method: str, family: str | None) -> None:
        self.bank = bank
        self.slots = tuple(slots)
        self.method = method
        self.family = family
        self._plans: dict[str, LayerPlan | None] = {}
        self._routings: dict[tuple[tuple[int, ...], int], ops.Routing] = {}

    def plan(self, layer: str) -> LayerPlan | None:
        if layer not in self._plans:
            self._plans[layer] = self._make_plan(layer)
        return self._plans[layer]

    def _make_plan(self, layer: str) -> LayerPlan | None:
        stack = None if self.family is None else self.bank.stack(self.family, layer)
        if stack is None or not any(stack.ranks[slot] for slot in self.slots):
            return None
        # A slot without factors on this layer runs as the identity there.
        slots = tuple(slot if stack.ranks[slot] else IDENTITY_SLOT for slot in self.slots)
        key = (tuple((slot, stack.ranks[slot]) for slot in slots), stack.A.shape[1])
        if key not in self._routings:
            self._routings[key] = ops.route(slots, stack.ranks, stack.A.shape[1], self.bank.device)
        merged_weight = None
        if self.method == "merged":
            (slot,) = set(slots)
            rank = stack.ranks[slot]
            merged_weight = self.bank.layers[layer].merge(self.family, stack.A[slot, :rank], stack.B[slot, :rank])
        return LayerPlan(stack.A, stack.B, self._routings[key], merged_weight, self._changed_bias(layer, stack, slots))

    def _changed_bias(self, layer: str, stack: _Stack, slots: Sequence[int]) -> Tensor | None:
        """(d_out,) or (n, 1, d_out), as `LayerPlan.bias`; None where every row has the layer's own."""
        if not any(slot in stack.biases for slot in slots):
            return None
        if len(set(slots)) == 1:
            return stack.biases[slots[0]]
        own = self.bank.layers[layer].bias.to(self.bank.dtype)
        return torch.stack([stack.biases.get(slot, own) for slot in slots]).unsqueeze(1)


class AdapterBank:
    """Adapters by tag over the layers of one model.

    layers: what `inject` returned. device, dtype: where and how the factors are kept.
    """

    def __init__(self, layers: dict[str, AdaptedLinear], holder: ServingHolder, device: torch.device, dtype: torch.dtype) -> None:
        self.layers = layers
        self.holder = holder
        self.device = device
        self.dtype = dtype
        self.num_slots = 1
        self._stacks: dict[tuple[str, str], _Stack] = {}
        self._slot_of: dict[str, int] = {}
        self._info: dict[str, AdapterInfo] = {}
        self._free: list[int] = []
        self._users: dict[int, int] = {}  # slot → batches that use it
        self._retired: set[int] = set()  # removed by name, still used by a batch

    # ---------------------------------------------------------------------------------------------------- adapters

    @property
    def info(self) -> dict[str, AdapterInfo]:
        return dict(self._info)

    def add(self, name: str, adapters: Sequence[Adapter]) -> AdapterInfo:
        """Put a tag on the device: one adapter, or one of each family. A tag that exists is replaced, for batches that start later.

        Raises AdapterError before anything changes where two adapters share a family or a layer or shape does not fit the model.
        """
        if not isinstance(name, str) or not name.strip():
            raise AdapterError(f"an adapter's tag must be a word, not {name!r}: requests could never name it")
        if not adapters:
            raise AdapterError(f"adapter {name!r} has no checkpoint: name at least one folder or hub id")
        families = [adapter.family for adapter in adapters]
        for family in families:
            if families.count(family) > 1:
                raise AdapterError(f"adapter {name!r} has two checkpoints of the family {family}: give one of each family")
        for adapter in adapters:
            self._check(name, adapter)
        slot = self._free.pop() if self._free else self._grow_slots()
        for adapter in adapters:
            for layer, (A, B) in adapter.factors.items():
                self._write(adapter.family, layer, slot, A, B, scales_bias=layer in adapter.scaled_biases)
        if name in self._slot_of:
            self.remove(name)
        self._slot_of[name] = slot
        self._info[name] = AdapterInfo(
            name=name,
            families=tuple(families),
            ranks={adapter.family: adapter.rank for adapter in adapters},
            layers={adapter.family: len(adapter.factors) for adapter in adapters},
            size_bytes=sum(adapter.num_parameters for adapter in adapters) * self.dtype.itemsize,
            sources=tuple(adapter.source for adapter in adapters),
        )
        return self._info[name]

    def remove(self, name: str) -> None:
        """Forget a tag. Batches that use it finish with it; its slot is reused after them."""
        self._require(name)
        slot = self._slot_of.pop(name)
        del self._info[name]
        if self._users.get(slot):
            self._retired.add(slot)
        else:
            self._clear(slot)

    def family_for(self, name: str, method: str) -> str | None:
        """Which of a tag's adapters `method` serves; UnknownAdapterError for an unknown tag, AdapterError for a missing family."""
        self._require(name)
        if method == "base":
            return None
        available = self._info[name].families
        if method == "merged":
            return "flora" if "flora" in available else "lora"
        family = ops.FAMILY[method]
        if family not in available:
            having = sorted(tag for tag, info in self._info.items() if family in info.families)
            raise AdapterError(
                f"adapter {name!r} has no {family} checkpoint, which method {method} needs; "
                + (f"tags that have one: {', '.join(having)}" if having else "no tag has one")
            )
        return family

    def _require(self, name: str) -> None:
        if name not in self._slot_of:
            known = ", ".join(sorted(self._slot_of)) or "none"
            raise UnknownAdapterError(f"unknown adapter {name!r}; loaded: {known}")

    def _check(self, name: str, adapter: Adapter) -> None:
        for layer, (A, B) in adapter.factors.items():
            if layer not in self.layers:
                raise AdapterError(
                    f"adapter {name!r} has weights for layer {layer!r}, which this model does not have or cannot adapt"
                )
            expected = (self.layers[layer].in_features, self.layers[layer].out_features)
            given = tuple(width if side is None else side.shape[1] for side, width in zip((A, B), expected, strict=True))
            if given != expected:
                raise AdapterError(
                    f"adapter {name!r} does not fit layer {layer}: it maps {given[0]} → {given[1]}, "
                    f"the model's layer maps {expected[0]} → {expected[1]}; it was made for another base model"
                )

    # ----------------------------------------------------------------------------------------------------- serving

    def serving(self, names: Sequence[str | None], method: str, family: str | None = None) -> BatchServing:
        """Pin the slots of a batch: one tag (or None) per row. Give it back with `release`.

        All rows of a `merged` batch have the same adapter, since the weights are merged once; `family` says which of the tag's
        adapters is merged where it has two.
        """
        families = {self.family_for(name, method) for name in names if name is not None} - {None}
        if method == "merged" and len(set(names)) > 1:
            raise AdapterError("weights are merged with one adapter at a time: group the batch by adapter first")
        if method == "merged" and family is not None and families:
            families = {family}
        slots = [IDENTITY_SLOT if name is None or not families else self._slot_of[name] for name in names]
        return self._pinned(BatchServing(self, slots, method, families.pop() if families else None))

    def narrow(self, serving: BatchServing, kept: Sequence[int]) -> BatchServing:
        """The same batch with only the rows at these places; replaces `serving`, whose pins are given back."""
        narrowed = self._pinned(BatchServing(self, [serving.slots[place] for place in kept], serving.method, serving.family))
        self.release(serving)
        return narrowed

    def _pinned(self, serving: BatchServing) -> BatchServing:
        for slot in serving.slots:
            self._users[slot] = self._users.get(slot, 0) + 1
        return serving

    def release(self, serving: BatchServing) -> None:
        """Let go of a batch's slots; those removed meanwhile become free."""
        for slot in serving.slots:
            self._users[slot] -= 1
            if self._users[slot] == 0:
                del self._users[slot]
                if slot in self._retired:
                    self._retired.discard(slot)
                    self._clear(slot)

    @contextmanager
    def serve(self, serving: BatchServing) -> Iterator[None]:
        """During this context, a forward of the model serves this batch."""
        self.holder.current = serving
        try:
            yield
        finally:
            self.holder.current = None

    def stack(self, family: str, layer: str) -> _Stack | None:
        """All slots' factors of one family on one layer, or None where no adapter has any."""
        return self._stacks.get((family, layer))

    # ----------------------------------------------------------------------------------------------------- storage

    def _grow_slots(self) -> int:
        self.num_slots += 1
        for stack in self._stacks.values():
            if len(stack.ranks) < self.num_slots:
                self._reshape(stack, max(self.num_slots, 2 * stack.A.shape[0]), stack.A.shape[1])
        return self.num_slots - 1

    def _write(self, family: str, layer: str, slot: int, A: Tensor | None, B: Tensor | None, scales_bias: bool) -> None:
        """Place A (rank, d_in) and B (rank, d_out), None for all ones, in a free slot; tensors that running batches hold are never
        changed under them except in slots they do not use."""
        adapted, rank = self.layers[layer], (B if A is None else A).shape[0]
        stack = self._stacks.get((family, layer))
        if stack is None:
            stack = _Stack(*self._allocate(self.num_slots, rank, adapted), ranks=[0] * self.num_slots)
            stack.A[IDENTITY_SLOT, 0] = 1.0
            stack.B[IDENTITY_SLOT, 0] = 1.0
            self._stacks[family, layer] = stack
        if rank > stack.A.shape[1]:
            self._reshape(stack, stack.A.shape[0], rank)
        stack.A[slot], stack.B[slot] = 0.0, 0.0
        stack.A[slot, :rank] = 1.0 if A is None else A.to(self.device, self.dtype)
        stack.B[slot, :rank] = 1.0 if B is None else B.to(self.device, self.dtype)
        stack.ranks[slot] = rank
        if scales_bias and adapted.bias is not None:
            stack.biases[slot] = (adapted.bias * B.sum(0).to(self.device)).to(self.dtype)

    def _allocate(self, slots: int, rank: int, layer: AdaptedLinear) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros
        return (
            zeros(slots, rank, layer.in_features, device=self.device, dtype=self.dtype),
            zeros(slots, rank, layer.out_features, device=self.device, dtype=self.dtype),
        )

    @staticmethod
    def _reshape(stack: _Stack, slots: int, rank: int) -> None:
        for side in ("A", "B"):
            old = getattr(stack, side)
            new = old.new_zeros(slots, rank, old.shape[2])
            new[: old.shape[0], : old.shape[1]] = old
            setattr(stack, side, new)
        stack.ranks = stack.ranks + [0] * (slots - len(stack.ranks))

    def _clear(self, slot: int) -> None:
        for stack in self._stacks.values():
            if slot < len(stack.ranks):
                stack.ranks[slot] = 0
                stack.biases.pop(slot, None)
        self._free.append(slot)
