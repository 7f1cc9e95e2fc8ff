"""How a batch's rows lie in the tiles of a kernel: lists of numbers, worked out on the host once a step and sent in one piece.

What a list holds depends on the batch, how long it is only on the few numbers in its `shape`: a captured graph is replayed for
another batch of the same shape by copying that batch's `numbers` over those it was captured with. Every list starts at 16 bytes:
Triton compiles a kernel anew for a pointer that does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.cost import KERNEL_TILE as SMALLEST_TILE
from flora.cost import MODULATED_TOKENS

ALIGNED = 4
"""Numbers in 16 bytes."""

MAX_PLACES = 128
"""Components in a tile of `ExpandedTiles`, and so the largest rank that has tiles."""


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


@dataclass(frozen=True)
class ExpandedTiles:
    """One place for each component of each row, `num_places` to a tile. A row's places are side by side, in one tile.

    In all lists, -1 stands for nothing: an empty place, a place whose row is not scaled, a row that a tile lacks.
    """

    num_tiles: int  # a power of two
    num_places: int  # of each tile: 16, 32, 64 or 128
    num_rows: int  # that a tile has room for; 0: every row has one place, and nothing is summed
    numbers: Tensor  # int32, the lists below one after another
    row: Tensor  # (num_tiles · num_places,) the row that a place reads
    component: Tensor  # (num_tiles · num_places,) slot · r + k of its factors
    owner: Tensor  # (num_tiles · num_places,) which of the tile's rows it is summed into
    tile_row: Tensor  # (num_tiles · num_rows,) the rows that a tile writes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.num_tiles, self.num_places, self.num_rows

    @property
    def lists(self) -> tuple[Tensor, ...]:
        return self.row, self.component, self.owner, self.tile_row


def expanded_tiles(
    slots: Sequence[int], ranks: Sequence[int], rank_stride: int, device: torch.device | str
) -> ExpandedTiles | None:
    """Lay out a batch's components. slots, ranks: of each row; rank_stride: the r of A and B (slots, r, d) as stored.

    None where a rank is above MAX_PLACES: a row would not fit into a tile.
    """
    if max(ranks) > MAX_PLACES:
        return None
    num_places = min(MAX_PLACES, max(SMALLEST_TILE, power_of_two(sum(max(1, rank) for rank in ranks))))
    tiles: list[list[int]] = []  # the rows of each
    used = num_places
    # By rank, so that tiles fill up; rows of one adapter side by side, so that its factors are read once.
    for row in sorted(range(len(slots)), key=lambda row: (-ranks[row], slots[row])):
        size = max(1, ranks[row])
        if used + size > num_places:
            tiles.append([])
            used = 0
        tiles[-1].append(row)
        used += size
    num_tiles = power_of_two(len(tiles))
    sums = any(rank > 1 for rank in ranks)
    num_rows = max(SMALLEST_TILE, power_of_two(max(len(rows) for rows in tiles))) if sums else 0
    places: list[tuple[int, int, int]] = []
    tile_rows: list[int] = []
    for rows in tiles:
        for owner, row in enumerate(rows):
            if ranks[row] == 0:
                places.append((row, -1, owner))
            places += [(row, slots[row] * rank_stride + k, owner) for k in range(ranks[row])]
        places += [(-1, -1, -1)] * (-len(places) % num_places)
        if sums:
            tile_rows += rows + [-1] * (num_rows - len(rows))
    places += [(-1, -1, -1)] * (num_tiles * num_places - len(places))
    tile_rows += [-1] * (num_tiles * num_rows - len(tile_rows))
    columns = [list(column) for column in zip(*places, strict=True)]
    numbers, (row, component, owner, tile_row) = _on_device([*columns, tile_rows], device)
    return ExpandedTiles(num_tiles, num_places, num_rows, numbers, row, component, owner, tile_row)


@dataclass(frozen=True)
class SegmentTiles:
    """Tokens of one adapter, at most `num_tokens` to a tile: the batch's rows in adapter order, cut where the adapter changes."""

    num_tiles: int  # in a decode step rounded up to a power of two; the last ones are empty
    num_tokens: int  # of each tile, a power of two
    rank_tile: int  # a power of two, at least 16, that no rank exceeds
    numbers: Tensor  # int32, the lists below one after another
    order: Tensor  # (n,) the rows in adapter order
    slot: Tensor  # (num_tiles,)
    rank: Tensor  # (num_tiles,) 0: the identity
    first: Tensor  # (num_tiles,) its first token, counted through all rows in adapter order
    count: Tensor  # (num_tiles,) its tokens; 0: nothing to do

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.order), self.num_tiles, self.num_tokens, self.rank_tile

    @property
    def lists(self) -> tuple[Tensor, ...]:
        return self.order, self.slot, self.rank, self.first, self.count


def segment_tiles(
    slots: Sequence[int], ranks: Sequence[int], length: int, num_tokens: int | None, device: torch.device | str
) -> SegmentTiles:
    """Cut a batch into tiles. slots, ranks: of each row; length: tokens of each row.

    num_tokens: of each tile, a power of two; None: as many as make the modulated product cheapest.
    """
    rank_tile = max(SMALLEST_TILE, power_of_two(max(ranks)))
    if num_tokens is None:
        num_tokens = cheapest_tile([length * rows for rows in Counter(slots).values()], rank_tile)
    order = sorted(range(len(slots)), key=slots.__getitem__)
    tiles: list[tuple[int, int, int, int]] = []  # slot, rank, first, count
    start = 0
    for place, row in enumerate(order):
        if place + 1 == len(order) or slots[order[place + 1]] != slots[row]:
            end = (place + 1) * length
            tiles += [(slots[row], ranks[row], at, min(num_tokens, end - at)) for at in range(start, end, num_tokens)]
            start = end
    if length == 1:
        tiles += [(0, 0, 0, 0)] * (power_of_two(len(tiles)) - len(tiles))
    columns = [list(column) for column in zip(*tiles, strict=True)]
    numbers, (in_order, slot, rank, first, count) = _on_device([order, *columns], device)
    return SegmentTiles(len(tiles), num_tokens, rank_tile, numbers, in_order, slot, rank, first, count)


def cheapest_tile(tokens: Sequence[int], rank_tile: int) -> int:
    """The tile, in tokens, with the fewest multiply-adds for adapters with so many tokens each, modulating included.

    A tile is computed whole, however few of its places are used, and forms its modulated weight anew.
    """
    sizes = [SMALLEST_TILE << k for k in range((MODULATED_TOKENS // SMALLEST_TILE).bit_length())]
    return min(sizes, key=lambda size: sum(-(-number // size) for number in tokens) * (size + rank_tile))


def _on_device(lists: Sequence[list[int]], device: torch.device | str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All lists in one int32 tensor, one copy to the device, and each as a part of it that starts at 16 bytes."""
    lengths = [len(one) for one in lists]
    padded = [one + [0] * (-len(one) % ALIGNED) for one in lists]
    numbers = torch.tensor([number for one in padded for number in one], dtype=torch.int32, device=device)
    parts = numbers.split([len(one) for one in padded])
    return numbers, tuple(part[:length] for part, length in zip(parts, lengths, strict=True))
