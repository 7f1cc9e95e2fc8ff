"""AdapterBank: the adapters on the device, stacked by slot, so that one batch can use any of them.

For every family and every layer that an adapter of that family touches, the bank holds A (slots, r, d_in) and B (slots, r,
d_out), r the largest rank seen, and the true rank of each slot. Slot 0 is the identity adapter: rank 0, its first flora component
all ones and its lora components zeros. A tag holds one slot, with an adapter of each family or of one.

There may be thousands of tags over a few slots. A request pins its adapter's slot for as long as it runs; a slot that nobody pins
keeps its adapter until another needs the place, the least recently used first. What a request runs with never changes under it:
a tag that is replaced or removed meanwhile leaves its slot only when the last request has let go. Below the device, adapters are
in host memory and on disk (`flora.store`).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from flora import ops
from flora.errors import AdapterError, UnknownAdapterError
from flora.formats import Adapter
from flora.layers import AdaptedLinear, LayerPlan, ServingHolder
from flora.routing import Routing, route
from flora.store import AdapterCounters, AdapterStore, Layout, PackedAdapter, PackedFactors, Reload, StoredAdapter, pack

IDENTITY_SLOT = 0

KEPT_BYTES = 128 << 20
"""A batch's gathered factors are kept from step to step where those of all layers together are no more than this."""

RANK_OF_ANY_LAYER = 64
"""A rank that is taken however narrow the layer: a fused layer of few heads may be narrower than its adapters' rank."""

MAX_LISTED_TAGS = 20
"""How many tags an error lists before it only counts them."""


@dataclass(frozen=True)
class AdapterInfo:
    """What the bank says of one tag."""

    name: str
    families: tuple[str, ...]
    ranks: dict[str, int]  # by family, the largest over the layers
    layers: dict[str, int]  # number of adapted layers by family
    size_bytes: int
    sources: tuple[str, ...]
    peft_types: tuple[str | None, ...]  # as `families`: what each checkpoint calls itself
    base_models: tuple[str | None, ...]  # as `families`: what each checkpoint says it was made for
    any_base_model: bool = False  # it was added whatever it says of that


@dataclass(frozen=True)
class PreparedAdapter:
    """A tag that was checked and copied by `AdapterBank.prepare`, and that `commit` makes known."""

    info: AdapterInfo
    stored: StoredAdapter


@dataclass
class _Stack:
    """One family's factors of one layer, all slots."""

    A: Tensor  # (slots, r, d_in)
    B: Tensor  # (slots, r, d_out)
    ranks: list[int]  # true rank by slot; 0 where the slot has nothing on this layer
    biases: dict[int, Tensor] = field(default_factory=dict)  # slot → (d_out,), where it is not the layer's own
    rank_stride: int = field(init=False)  # r: the largest rank that a slot has room for
    slot_bytes: int = field(init=False)  # of A and B together
    _rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _, self.rank_stride, d_in = self.A.shape
        self.slot_bytes = self.rank_stride * (d_in + self.B.shape[2]) * self.A.element_size()

    def rows(self, slot: int) -> tuple[Tensor, Tensor]:
        """A slot's part of A (r · d_in,) and of B (r · d_out,), to be written to."""
        if slot not in self._rows:
            self._rows[slot] = (self.A[slot].flatten(), self.B[slot].flatten())
        return self._rows[slot]

    def grow(self, rank: int) -> None:
        """Make room for a larger rank, in new tensors: whoever holds the old ones keeps what it has."""
        grown = [side.new_zeros(side.shape[0], rank, side.shape[2]) for side in (self.A, self.B)]
        for new, old in zip(grown, (self.A, self.B), strict=True):
            new[:, : old.shape[1]] = old
        self.A, self.B = grown
        self._rows.clear()
        self.__post_init__()


class MergedWeights(dict[str, Tensor]):
    """Layer → (d_out, d_in): the model's weights with one adapter merged in, as far as they were asked for. All batches of that
    adapter share them, and they are gone with the last."""

    __slots__ = ("__weakref__",)


class BatchServing:
    """One batch's adapters, ready for every layer: made by `AdapterBank.arrange`, used through `AdapterBank.serve`.

    Each layer's plan is worked out at its first use and kept: later steps of the same batch only look it up. Layers whose slots
    have the same ranks share one routing; which those are is looked up once for each kind of adapter in the batch, not for each
    row. Use it only while its slots are pinned.
    """

    def __init__(self, bank: AdapterBank, slots: Sequence[int], method: str, family: str | None, num_spare: int = 0) -> None:
        self.bank = bank
        self.slots, self.num_spare = tuple(slots), num_spare
        self.method = method
        self.family = family
        self._layouts = [] if family is None else list(dict.fromkeys(bank.layouts(self.slots, family)))
        self._plans: dict[str, LayerPlan | None] = {}
        self._routings: dict[tuple[tuple[int, ...], int], Routing] = {}
        self._merged_weights = bank.merged_weights(self.slots, family) if method == "merged" and family is not None else None

    def plan(self, layer: str) -> LayerPlan | None:
        """What a layer does for this batch; None where no row has an adapter on it."""
        if layer not in self._plans:
            self._plans[layer] = self._make_plan(layer)
        return self._plans[layer]

    def _make_plan(self, layer: str) -> LayerPlan | None:
        ranks = tuple([layout.ranks.get(layer, 0) for layout in self._layouts])
        if not any(ranks):
            return None
        stack = self.bank.stack(self.family, layer)
        key = (ranks, stack.rank_stride)
        if key not in self._routings:
            # A slot without factors on this layer runs as the identity there.
            slots = [slot if stack.ranks[slot] else IDENTITY_SLOT for slot in self.slots]
            self._routings[key] = route(slots, stack.ranks, stack.rank_stride, self.bank.device, self.num_spare)
        merged_weight = None if self._merged_weights is None else self._merged(layer, stack)
        routing = self._routings[key]
        if self._keeps_factors(stack):
            routing = routing.for_one_layer()
        return LayerPlan(stack.A, stack.B, routing, merged_weight, self._changed_bias(layer, stack))

    def _keeps_factors(self, stack: _Stack) -> bool:
        """On a CPU, gathering them at each step would be a tenth of a small model's step; those of a large one are too many."""
        per_layer = len(self.slots) * stack.slot_bytes
        return self.bank.device.type == "cpu" and per_layer * len(self.bank.layers) <= KEPT_BYTES

    def _merged(self, layer: str, stack: _Stack) -> Tensor:
        if layer not in self._merged_weights:
            slot = self.slots[0]  # as all others
            A, B = stack.A[slot, : stack.ranks[slot]], stack.B[slot, : stack.ranks[slot]]
            self._merged_weights[layer] = self.bank.layers[layer].merge(self.family, A, B)
        return self._merged_weights[layer]

    def _changed_bias(self, layer: str, stack: _Stack) -> Tensor | None:
        """(d_out,) or (n, 1, d_out), as `LayerPlan.bias`; None where every row has the layer's own."""
        if not stack.biases or not any(slot in stack.biases for slot in self.slots):
            return None
        if len(set(self.slots)) == 1:
            return stack.biases[self.slots[0]]
        own = self.bank.own_bias(layer).to(self.bank.dtype)
        return torch.stack([stack.biases.get(slot, own) for slot in self.slots]).unsqueeze(1)


class MixedServing(BatchServing):
    """One batch whose rows' adapters are of either family: for every layer the part of those that multiply, the others served by
    the identity there, and the part of those that add."""

    def __init__(self, bank: AdapterBank, slots: Sequence[int]) -> None:
        super().__init__(bank, slots, "mixed", None)
        adds = [bank.preferred_family(slot) == "lora" for slot in slots]
        self._multiplied = BatchServing(bank, _others_bare(slots, adds, False), "flora-expand", "flora")
        self._added = BatchServing(bank, _others_bare(slots, adds, True), "bmm-lora", "lora")
        self._adds = torch.tensor(adds, device=bank.device)[:, None, None]  # (n, 1, 1)
        self._bare = route([IDENTITY_SLOT] * len(slots), [0], 1, bank.device)

    def _make_plan(self, layer: str) -> LayerPlan | None:
        multiplied, added = self._multiplied.plan(layer), self._added.plan(layer)
        if added is None:
            return multiplied
        rows = ops.AddedRows(added.A, added.B, added.routing)
        if multiplied is None:
            return LayerPlan(added.A, added.B, self._bare, bias=added.bias, added=rows)
        bias = added.bias if multiplied.bias is None else multiplied.bias
        if multiplied.bias is not None and added.bias is not None:
            bias = torch.where(self._adds, added.bias, multiplied.bias)
        return replace(multiplied, bias=bias, added=rows)


def _others_bare(slots: Sequence[int], adds: Sequence[bool], wanted: bool) -> list[int]:
    """The rows' slots, the identity's for rows that are not wanted."""
    return [slot if one is wanted else IDENTITY_SLOT for slot, one in zip(slots, adds, strict=True)]


class AdapterBank:
    """Adapters by tag over the layers of one model.

    layers: what `inject` returned. device, dtype: where and how the factors are kept. num_slots: how many adapters are on the
    device at once, the identity not counted; a layer's stacks are made for all of them when the first adapter touches it.
    host_bytes: how much host memory adapters may take; beyond it, those that can be read again are dropped, the least recently
    used first.

    Any thread may call; what changes slots is for the one that runs the model.
    """

    def __init__(
        self,
        layers: dict[str, AdaptedLinear],
        holder: ServingHolder,
        device: torch.device,
        dtype: torch.dtype,
        num_slots: int = 64,
        host_bytes: int = 2 << 30,
    ) -> None:
        if num_slots < 1:
            raise AdapterError(f"the number of adapter slots must be at least 1, not {num_slots}")
        if host_bytes < 0:
            raise AdapterError(f"the host memory for adapters must be a number of bytes, not {host_bytes}")
        self.layers = layers
        self.holder = holder
        self.device = device
        self.dtype = dtype
        self.num_slots = num_slots
        self._store = AdapterStore(host_bytes, dtype, pin_memory=device.type == "cuda")
        self._adapters: dict[str, PreparedAdapter] = {}
        self._stacks: dict[tuple[str, str], _Stack] = {}
        self._slot_of: dict[StoredAdapter, int] = {}
        self._held: dict[int, tuple[StoredAdapter, dict[str, Layout]]] = {}  # slot → what it holds, by family
        self._free = list(range(num_slots, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # slots in use that nobody pins, least recently used first
        self._users: dict[int, int] = {}  # slot → requests that pin it
        self._merged_weights: WeakValueDictionary[tuple[StoredAdapter, str], MergedWeights] = WeakValueDictionary()

    # ---------------------------------------------------------------------------------------------------- adapters

    @property
    def info(self) -> dict[str, AdapterInfo]:
        """What was added, by tag."""
        with self._store.lock:
            return {name: prepared.info for name, prepared in self._adapters.items()}

    def add(self, name: str, adapters: Sequence[Adapter], reload: Reload | None = None) -> AdapterInfo:
        """Make a tag known: one adapter, or one of each family. A tag that exists is replaced: requests that have it pinned finish
        with the old version, all others get the new one.

        reload: reads the same adapters again, on another thread, after they were dropped from host memory; without it they never
        are. Raises AdapterError before anything changes where two adapters share a family, a layer or a shape does not fit the
        model, or a number is not finite in the bank's dtype.
        """
        return self.commit(self.prepare(name, adapters, reload))

    def prepare(self, name: str, adapters: Sequence[Adapter], reload: Reload | None = None) -> PreparedAdapter:
        """The slow part of `add`, which changes nothing: check the adapters and copy them to host memory."""
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
        packed = pack(name, adapters, self.dtype, self._store.pin_memory)
        info = AdapterInfo(
            name=name,
            families=tuple(families),
            ranks={adapter.family: adapter.rank for adapter in adapters},
            layers={adapter.family: len(adapter.factors) for adapter in adapters},
            size_bytes=packed.size_bytes,
            sources=tuple(adapter.source for adapter in adapters),
            peft_types=tuple(adapter.peft_type for adapter in adapters),
            base_models=tuple(adapter.base_model for adapter in adapters),
        )
        digest = None if reload is None else packed.digest()
        return PreparedAdapter(info, StoredAdapter(name, packed, packed.size_bytes, reload, digest))

    def commit(self, prepared: PreparedAdapter) -> AdapterInfo:
        """The fast part of `add`, once for what `prepare` made: from here on, requests get this version."""
        name, stored = prepared.info.name, prepared.stored
        with self._store.lock:
            if name in self._adapters:
                stored.counters = self._adapters[name].stored.counters
                self._let_go(self._adapters[name].stored)
            self._adapters[name] = prepared
            self._store.put(stored)
        return prepared.info

    def remove(self, name: str) -> None:
        """Forget a tag. Requests that have it pinned finish with it; its slot is used again after them."""
        with self._store.lock:
            self._require(name)
            self._let_go(self._adapters.pop(name).stored)

    def _let_go(self, stored: StoredAdapter) -> None:
        self._store.forget(stored)
        slot = self._slot_of.get(stored)
        if slot is not None and slot not in self._users:
            self._clear(slot)

    def family_for(self, name: str, method: str) -> str | None:
        """Which of a tag's adapters `method` serves; UnknownAdapterError for an unknown tag, AdapterError for a missing family."""
        available = self._require(name).info.families
        if method == "base":
            return None
        family = ops.FAMILY[method]
        if family is None:
            return _preferred_family(available)
        if family not in available:
            having = [tag for tag, info in self.info.items() if family in info.families]
            raise AdapterError(
                f"adapter {name!r} has no {family} checkpoint, which method {method} needs; "
                + (f"tags that have one: {_listed(having)}" if having else "no tag has one")
            )
        return family

    def _require(self, name: str) -> PreparedAdapter:
        prepared = self._adapters.get(name)
        if prepared is None:
            raise UnknownAdapterError(f"unknown adapter {name!r}; loaded: {_listed(self.info) or 'none'}")
        return prepared

    def _check(self, name: str, adapter: Adapter) -> None:
        if not adapter.factors:
            raise AdapterError(f"adapter {name!r} has no weights: train it, or export it again")
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
            if A is not None and B is not None and len(A) != len(B):
                raise AdapterError(f"adapter {name!r}: layer {layer} has rank {len(A)} on its A side and {len(B)} on its B side")
            # What a larger rank does, a smaller one does too; HiRA has one more component. Every slot has room for the largest.
            rank, most = len(B if A is None else A), max(RANK_OF_ANY_LAYER, min(expected) + 1)
            if rank > most:
                raise AdapterError(
                    f"adapter {name!r} has rank {rank:,} on layer {layer}, which maps {expected[0]} → {expected[1]} and takes "
                    f"{most:,} at most: train it with a smaller rank"
                )
        for layer, bias in adapter.added_biases.items():
            if layer not in adapter.factors or bias.shape != (self.layers[layer].out_features,):
                raise AdapterError(
                    f"adapter {name!r}: its bias of shape {tuple(bias.shape)} is not that of a layer that it adapts: {layer}"
                )

    # ----------------------------------------------------------------------------------------------------- pinning

    @property
    def slot_capacity(self) -> int:
        """How many adapters the device holds at once; the identity has a slot besides."""
        return self.num_slots

    @property
    def slots_used(self) -> int:
        """How many of them it holds now, pinned or not."""
        return len(self._held)

    @property
    def host_bytes(self) -> int:
        """How much host memory adapters take that can be read again, before the least recently used are dropped."""
        return self._store.capacity_bytes

    @property
    def host_bytes_used(self) -> int:
        """What the adapters in host memory take now."""
        with self._store.lock:
            return self._store.bytes_used

    def pin(self, name: str | None, method: str) -> int | None:
        """A slot that holds a tag's adapters and keeps them until `unpin`, for one request; slot 0 for no adapter and for `base`.

        None: not now. Every slot is pinned, or the adapter has to be read from disk first, which happens in the background from
        here on. Raises UnknownAdapterError, AdapterError for a missing family, and AdapterError where that read has failed since
        the last call, or found other numbers than were added; the next call tries again.
        """
        with self._store.lock:
            stored = self._stored_for(name, method)
            if stored is None:
                return IDENTITY_SLOT
            slot = self._pin_stored(stored)
            if slot is None and stored.packed is None:
                failure = self._store.take_failure(stored)
                if failure is not None:
                    raise failure
                self._store.ask(stored, ahead=not self._has_place)
            return slot

    def pin_now(self, name: str | None, method: str) -> int:
        """`pin` that reads from disk in place. AdapterError where every slot is pinned."""
        while True:
            with self._store.lock:
                stored = self._stored_for(name, method)
                if stored is None:
                    return IDENTITY_SLOT
                slot = self._pin_stored(stored)
                if slot is not None:
                    return slot
                if not self._has_place:
                    raise AdapterError(
                        f"adapter {name!r} has to wait: all {self.num_slots} adapter slots are in use; "
                        "run fewer adapters at once, or give the engine more slots"
                    )
            self._store.read_now(stored)

    def unpin(self, slot: int) -> None:
        """Let go of a slot that `pin` gave, once for each time it did. A version that was replaced or removed is gone with its last
        user."""
        if slot == IDENTITY_SLOT:
            return
        with self._store.lock:
            if slot not in self._users:
                raise ValueError(f"slot {slot} is not pinned")
            self._users[slot] -= 1
            if self._users[slot] == 0:
                del self._users[slot]
                if self._held[slot][0].is_current:
                    self._idle[slot] = None
                else:
                    self._clear(slot)

    def prefetch(self, names: Iterable[str | None]) -> None:
        """Have the background reader fetch what is neither on the device nor in host memory, in this order; returns at once.

        Tags that are unknown, such as one removed meanwhile, are passed over, and so is what host memory has no room for.
        """
        with self._store.lock:
            for name in names:
                prepared = self._adapters.get(name)
                if prepared is not None and prepared.stored not in self._slot_of:
                    self._store.ask(prepared.stored, ahead=True)

    def wait_until_ready(self, timeout_s: float | None) -> bool:
        """Sleep until a background read has ended, well or not, since the last call; False where none has within `timeout_s`."""
        return self._store.wait(timeout_s)

    def counters(self) -> dict[str, AdapterCounters]:
        """What happened to each tag since it was added."""
        with self._store.lock:
            return {name: replace(prepared.stored.counters) for name, prepared in self._adapters.items()}

    def close(self, timeout_s: float = 5.0) -> None:
        """End the background reader, waiting at most `timeout_s` for a read that it is at. Idempotent."""
        self._store.close(timeout_s)

    def _stored_for(self, name: str | None, method: str) -> StoredAdapter | None:
        """The version that a request of this tag gets; None for no adapter."""
        if name is None or self.family_for(name, method) is None:
            return None
        return self._adapters[name].stored

    @property
    def _has_place(self) -> bool:
        return bool(self._free or self._idle)

    def _pin_stored(self, stored: StoredAdapter) -> int | None:
        """Its slot, pinned, where it is on the device or can be put there from host memory."""
        slot = self._slot_of.get(stored)
        if slot is None and not self._has_place:
            return None
        packed = self._store.use(stored)
        if slot is not None:
            stored.counters.hits += 1
        elif packed is None:
            return None
        else:
            started_s = time.perf_counter()
            slot = self._place(stored, packed)
            stored.counters.misses += 1
            stored.counters.copy_s += time.perf_counter() - started_s
        self._users[slot] = self._users.get(slot, 0) + 1
        self._idle.pop(slot, None)
        return slot

    # ----------------------------------------------------------------------------------------------------- serving

    def arrange(self, slots: Sequence[int], method: str, family: str | None = None, num_spare: int = 0) -> BatchServing:
        """What the layers need to serve rows with these slots, in their order; the slots stay pinned by whoever pinned them.

        family: for `merged`, which of the adapter's is merged where it has two; other methods have their own. num_spare: of the
        last rows, which have slot 0 and are nobody's. Raises AdapterError where the rows of `merged` differ, or where a slot is not
        pinned or holds nothing of the family: it would run as the base model, unnoticed.
        """
        distinct = set(slots) - {IDENTITY_SLOT}
        if method == "merged" and len(set(slots)) > 1:
            raise AdapterError("weights are merged with one adapter at a time: group the batch by adapter first")
        if method == "base" or not distinct:
            return BatchServing(self, slots, method, None)
        for slot in distinct:
            if slot not in self._users:
                raise AdapterError(f"slot {slot} is pinned by no request: its adapter may be gone; pin it first")
        if method == "mixed":
            return MixedServing(self, slots)
        if method != "merged":
            family = ops.FAMILY[method]
        elif family is None:
            family = self.preferred_family(slots[0])
        for slot in distinct:
            stored, layouts = self._held[slot]
            if family not in layouts:
                raise AdapterError(f"adapter {stored.name!r} has no {family} checkpoint, which method {method} needs")
        return BatchServing(self, slots, method, family, num_spare)

    @contextmanager
    def serve(self, serving: BatchServing) -> Iterator[None]:
        """During this context, a forward of the model serves this batch."""
        self.holder.current = serving
        try:
            yield
        finally:
            self.holder.current = None

    def stack(self, family: str, layer: str) -> _Stack | None:
        """All slots' factors of one family on one layer, or None where no adapter was ever put there."""
        return self._stacks.get((family, layer))

    def layouts(self, slots: Iterable[int], family: str) -> list[Layout]:
        """What each of these slots holds of one family, the identity left out."""
        return [self._held[slot][1][family] for slot in slots if slot != IDENTITY_SLOT]

    def preferred_family(self, slot: int) -> str | None:
        """Which of a slot's adapters `mixed` and `merged` serve; None for the identity."""
        return None if slot == IDENTITY_SLOT else _preferred_family(self._held[slot][1])

    def own_bias(self, layer: str) -> Tensor:
        """(d_out,), zeros where the layer has none."""
        adapted = self.layers[layer]
        return torch.zeros(adapted.out_features, device=self.device) if adapted.bias is None else adapted.bias

    def merged_weights(self, slots: Sequence[int], family: str) -> MergedWeights:
        """The weights that batches of these slots' one adapter share."""
        key = (self._held[slots[0]][0], family)
        merged = self._merged_weights.get(key)
        if merged is None:
            merged = self._merged_weights[key] = MergedWeights()
        return merged

    # ------------------------------------------------------------------------------------------------------- slots

    def _place(self, stored: StoredAdapter, packed: PackedAdapter) -> int:
        """Copy an adapter to a free slot, or to that of the least recently used that nobody pins."""
        if not self._free:
            slot = next(iter(self._idle))
            self._held[slot][0].counters.evictions += 1
            self._clear(slot)
        slot = self._free.pop()
        self._held[slot] = (stored, {factors.layout.family: factors.layout for factors in packed.factors})
        self._slot_of[stored] = slot
        try:
            for factors in packed.factors:
                self._write(slot, factors)
        except BaseException as error:
            self._clear(slot)
            if isinstance(error, torch.OutOfMemoryError):
                raise AdapterError(
                    f"adapter {stored.name!r} does not fit on the device beside the others: give the engine fewer adapter slots"
                ) from error
            raise
        return slot

    @torch.no_grad()
    def _write(self, slot: int, factors: PackedFactors) -> None:
        """Fill a slot. Components beyond an adapter's rank are left as they are: nobody reads them."""
        # Stacks that were made in inference mode could never be written outside of it.
        with torch.inference_mode(False):
            targets, layout, added = [], factors.layout, {}
            for part in layout.layers:
                stack = self._stack_with_room(layout.family, part.layer, part.rank)
                fills_slot = part.rank == stack.rank_stride
                for row, size in zip(stack.rows(slot), (part.size_A, part.size_B), strict=True):
                    if size == 0:
                        row.fill_(1.0)
                    else:
                        targets.append(row if fills_slot else row[:size])
                stack.ranks[slot] = part.rank
                if part.size_bias:
                    added[part.layer] = torch.empty(part.size_bias, device=self.device, dtype=self.dtype)
                    targets.append(added[part.layer])
                if part.scales_bias and self.layers[part.layer].bias is not None:
                    scale = factors.bias_scales[part.layer].to(self.device)
                    stack.biases[slot] = (self.layers[part.layer].bias * scale).to(self.dtype)
            numbers = factors.numbers.to(self.device, non_blocking=True)
            torch._foreach_copy_(targets, list(numbers.split(layout.sizes)))
            for layer, bias in added.items():
                self._stacks[layout.family, layer].biases[slot] = (self.own_bias(layer) + bias).to(self.dtype)

    def _stack_with_room(self, family: str, layer: str, rank: int) -> _Stack:
        stack = self._stacks.get((family, layer))
        if stack is None:
            adapted, slots = self.layers[layer], self.num_slots + 1
            A, B = (
                torch.zeros(slots, rank, width, device=self.device, dtype=self.dtype)
                for width in (adapted.in_features, adapted.out_features)
            )
            if family == "flora":
                A[IDENTITY_SLOT, 0] = 1.0
                B[IDENTITY_SLOT, 0] = 1.0
            stack = self._stacks[family, layer] = _Stack(A, B, [0] * slots)
        elif rank > stack.rank_stride:
            stack.grow(rank)
        return stack

    def _clear(self, slot: int) -> None:
        """Make a slot free that nobody pins."""
        stored, layouts = self._held.pop(slot)
        del self._slot_of[stored]
        self._idle.pop(slot, None)
        for family, layout in layouts.items():
            for layer in layout.ranks:
                stack = self._stacks.get((family, layer))
                if stack is not None:  # else the device was full before it was made
                    stack.ranks[slot] = 0
                    stack.biases.pop(slot, None)
        self._free.append(slot)


def _preferred_family(available: Iterable[str]) -> str:
    return "flora" if "flora" in available else "lora"


def _listed(tags: Iterable[str]) -> str:
    """Tags in their order, of very many the first ones."""
    ordered = sorted(tags)
    listed = ", ".join(ordered[:MAX_LISTED_TAGS])
    return listed if len(ordered) <= MAX_LISTED_TAGS else f"{listed} and {len(ordered) - MAX_LISTED_TAGS:,} more"
