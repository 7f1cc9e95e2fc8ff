"""Which adapter serves which row of a batch, and all that follows from it: worked out on the host once a step, for every layer.

Rows are looked at in several ways, as the methods need them: one by one, segment by segment (the rows of one adapter), in blocks of
segments of one shape, in groups of one rank, and expanded, with a row for each component.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flora.cost import cheaper_form, cheaper_kernel
from flora.tiles import ExpandedTiles, SegmentTiles, expanded_tiles, segment_tiles


@dataclass(frozen=True)
class Segment:
    """The rows of a batch that share one adapter."""

    slot: int
    rank: int  # 0: the identity adapter, the bare layer
    rows: Tensor  # (n_segment,) int64
    span: slice | None  # the same rows where they stand side by side: a view instead of a gather

    def of(self, x: Tensor) -> Tensor:
        """The segment's rows of x (n, l, d)."""
        return x[self.rows] if self.span is None else x[self.span]


@dataclass(frozen=True)
class SegmentBlock:
    """Segments of one rank and equally many rows: one batched product serves them together."""

    rank: int  # 0: the bare layer
    slots: Tensor  # (c,) int64
    shape: tuple[int, int]  # segments, rows of each
    rows: Tensor | None  # (c · rows of each,) int64, segment by segment; None: the batch's rows as they stand


@dataclass(frozen=True)
class RankGroup:
    """The rows of a batch whose adapters have one rank."""

    rank: int
    rows: Tensor | None  # (n_group,) int64; None: every row of the batch
    slots: Tensor  # (n_group,) int64


@dataclass(frozen=True)
class Routing:
    """Which adapter serves which row, and all that follows from it. Made by `route`."""

    slots: Tensor  # (n,) int64
    segments: tuple[Segment, ...]
    blocks: tuple[SegmentBlock, ...]
    rank_groups: tuple[RankGroup, ...]  # adapters of rank 0 left out
    expanded_row: Tensor  # (m,) int64, the row each expanded row copies; m = Σ max(rank, 1)
    expanded_component: Tensor  # (m,) int64, slot · r + k of its factors in A and B seen as (slots · r, d)

    uniform_rank: int | None  # the rank that every row has, or None where ranks differ
    restore: Tensor | None  # (n,) int64, where each row stands when blocks are laid end to end; None: where it stands anyway
    row_slots: tuple[int, ...]  # `slots`, on the host
    row_ranks: tuple[int, ...]  # of each row, on the host
    rank_stride: int  # the r of A and B (slots, r, d) as stored
    max_rank: int  # of the rows
    order: Tensor  # (n,) int64, the rows segment by segment
    numbers: Tensor  # int64, every tensor above, end to end: they are parts of it
    _forms: dict[tuple[int, int, str], str] = field(default_factory=dict, repr=False, compare=False)
    _tiles: dict[tuple, ExpandedTiles | SegmentTiles | None] = field(default_factory=dict, repr=False, compare=False)
    _kept: dict[tuple[str, int], Tensor] | None = field(default=None, repr=False, compare=False)

    def cheaper_form(self, length: int, element_size: int, device_type: str) -> str:
        """`flora.cost.cheaper_form` for rows of `length` tokens, worked out once: every layer of a step asks the same."""
        key = (length, element_size, device_type)
        if key not in self._forms:
            tokens_and_ranks = [(segment.rows.shape[0] * length, segment.rank) for segment in self.segments]
            self._forms[key] = cheaper_form(tokens_and_ranks, element_size, device_type)
        return self._forms[key]

    def cheaper_kernel(self, length: int) -> str:
        """`flora.cost.cheaper_kernel` for rows of `length` tokens, worked out once."""
        key = (length, 0, "kernel")
        if key not in self._forms:
            self._forms[key] = cheaper_kernel((segment.rows.shape[0] * length, segment.rank) for segment in self.segments)
        return self._forms[key]

    def expanded_tiles(self) -> ExpandedTiles | None:
        """Every component's place in the tiles of a decode kernel; None where a rank is too large for them."""
        if () not in self._tiles:
            self._tiles[()] = expanded_tiles(self.row_slots, self.row_ranks, self.rank_stride, self.slots.device)
        return self._tiles[()]

    def segment_tiles(self, length: int, num_tokens: int | None) -> SegmentTiles:
        """Every segment of rows of `length` tokens, cut in tiles of `num_tokens`; None: of what is cheapest to modulate."""
        key = (length, num_tokens)
        if key not in self._tiles:
            self._tiles[key] = segment_tiles(self.row_slots, self.row_ranks, length, num_tokens, self.slots.device)
        return self._tiles[key]

    def layout(self, form: str) -> Hashable | None:
        """What `form` in PyTorch's own products takes of this routing besides the numbers that it reads; None where slots are part
        of it. form: a method, of `flora` the one of its forms that is taken."""
        if form == "bmm-lora":
            return tuple((group.rank, group.slots.shape[0]) for group in self.rank_groups)
        if form == "flora-expand":
            return self.uniform_rank, self.expanded_row.shape[0]
        if form == "flora-modulate":
            blocks = tuple((block.rank, *block.shape, block.rows is None) for block in self.blocks)
            return blocks, self.uniform_rank, self.expanded_row.shape[0], self.restore is None
        return None

    def read_by(self, form: str) -> Tensor:
        """The part of `numbers` that a step of `form` reads; as long as that of any other routing of the same layout.

        How many adapters share rows is nothing to `bmm-lora` nor `flora-expand`, but what others read is longer with each of them.
        """
        if form == "bmm-lora":
            num_read = 2 * sum(group.slots.shape[0] for group in self.rank_groups)  # rows and slots of the groups, the last ones
            return self.numbers[self.numbers.shape[0] - num_read :]
        if form == "flora-expand":  # each row's slot, and each expanded row's row and component, the first ones
            num_read = self.slots.shape[0] + (2 * self.expanded_row.shape[0] if self.uniform_rank is None else 0)
            return self.numbers[:num_read]
        return self.numbers

    def for_one_layer(self) -> Routing:
        """The same routing, for many steps of one layer whose factors do not change: what is gathered in the first step is kept."""
        return replace(self, _kept={})

    def gather(self, side: str, factors: Tensor, rank: int, slots: Tensor) -> Tensor:
        """Each row's first `rank` components: factors (slots, r, d), the side "A" or "B", and slots (n,) → (n, rank, d)."""
        if self._kept is None:
            return gather_components(factors, slots, rank)
        if (side, rank) not in self._kept:  # rows of one rank are always the same ones
            self._kept[side, rank] = gather_components(factors, slots, rank)
        return self._kept[side, rank]

    def gather_expanded(self, side: str, factors: Tensor) -> Tensor:
        """The components of all rows, one after another, whatever their ranks: factors (slots, r, d) → (m, d)."""
        if self._kept is None:
            return factors.flatten(0, 1)[self.expanded_component]
        if (side, 0) not in self._kept:
            self._kept[side, 0] = factors.flatten(0, 1)[self.expanded_component]
        return self._kept[side, 0]


def route(
    slots: Sequence[int], ranks: Sequence[int], rank_stride: int, device: torch.device | str = "cpu", num_spare: int = 0
) -> Routing:
    """Work out a batch's routing on the host.

    slots: each row's slot. ranks: each slot's true rank; 0 marks the identity adapter, whose first component must be ones where
    adapters multiply. rank_stride: the r of A and B (slots, r, d) as stored. num_spare: of the last rows, which nobody looks at. In
    rank groups they are of the largest rank, so that a step padded to as many rows has one layout however many are spare; where
    adapters add, the identity's components must be zeros for that.
    """
    slots = list(slots)
    by_slot: dict[int, list[int]] = {}
    by_rank: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        by_slot.setdefault(slot, []).append(row)
        by_rank.setdefault(ranks[slot], []).append(row)
    used = len(slots) - num_spare
    groups = [(rank, [row for row in rows if row < used]) for rank, rows in sorted(by_rank.items()) if rank > 0]
    if groups:
        groups[-1][1].extend(range(used, len(slots)))
    by_shape: dict[tuple[int, int], list[int]] = {}  # (rank, rows of each) → slots
    for slot, rows in by_slot.items():
        by_shape.setdefault((ranks[slot], len(rows)), []).append(slot)
    block_rows = [[row for slot in shared for row in by_slot[slot]] for shared in by_shape.values()]
    laid_out = [row for rows in block_rows for row in rows]
    in_order = laid_out == list(range(len(slots)))
    expanded = [(row, slot * rank_stride + k) for row, slot in enumerate(slots) for k in range(max(1, ranks[slot]))]
    lists = [
        slots,
        [row for row, _ in expanded],
        [component for _, component in expanded],
        sorted(range(len(slots)), key=laid_out.__getitem__),
        [row for rows in by_slot.values() for row in rows],
        *by_slot.values(),
        *by_shape.values(),
        *block_rows,
        *(rows for _, rows in groups),
        *([slots[row] for row in rows] for _, rows in groups),
    ]
    # All of them travel to the device at once: on a GPU, each copy from the host costs as much as a small kernel.
    numbers = torch.tensor([number for one in lists for number in one], dtype=torch.int64, device=device)
    tensors = iter(numbers.split([len(one) for one in lists]))
    row_slots, expanded_row, expanded_component, restore, order = (next(tensors) for _ in range(5))
    segments = tuple(Segment(slot, ranks[slot], next(tensors), _span(rows)) for slot, rows in by_slot.items())
    block_slots, blocks_rows = [next(tensors) for _ in by_shape], [next(tensors) for _ in by_shape]
    group_rows = [next(tensors) for _ in groups]
    return Routing(
        slots=row_slots,
        segments=segments,
        blocks=tuple(
            SegmentBlock(rank, shared, (len(shared), of_each), None if in_order and len(by_shape) == 1 else rows)
            for (rank, of_each), shared, rows in zip(by_shape, block_slots, blocks_rows, strict=True)
        ),
        rank_groups=tuple(
            RankGroup(rank, None if len(rows) == len(slots) else places, next(tensors))
            for (rank, rows), places in zip(groups, group_rows, strict=True)
        ),
        expanded_row=expanded_row,
        expanded_component=expanded_component,
        uniform_rank=next(iter(by_rank)) if len(by_rank) == 1 else None,
        restore=None if in_order else restore,
        row_slots=tuple(slots),
        row_ranks=tuple([ranks[slot] for slot in slots]),
        rank_stride=rank_stride,
        max_rank=max(by_rank, default=0),
        order=order,
        numbers=numbers,
    )


def _span(rows: Sequence[int]) -> slice | None:
    """The rows as a slice where they are consecutive and ascending."""
    start, stop = rows[0], rows[0] + len(rows)
    return slice(start, stop) if list(rows) == list(range(start, stop)) else None


def gather_components(factors: Tensor, slots: Tensor, rank: int) -> Tensor:
    """Each row's first `rank` components: factors (slots, r, d) → (n, rank, d)."""
    stored = factors if rank == factors.shape[1] else factors[:, :rank]
    return stored.index_select(0, slots)  # several times faster than indexing with [slots, :rank] at decode sizes
