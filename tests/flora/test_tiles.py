"""Tiles hold every component, and every token, exactly once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flora import ops
from flora.tiles import MAX_PLACES, cheapest_tile, expanded_tiles, power_of_two

STRIDE = MAX_PLACES
quick = settings(max_examples=60)


@st.composite
def batches(draw):
    """The rows' slots, and the rank of each slot; small ranks are likelier."""
    ranks = draw(st.lists(st.one_of(st.integers(0, 4), st.integers(0, MAX_PLACES)), min_size=5, max_size=5))
    return draw(st.lists(st.integers(0, 4), min_size=1, max_size=40)), ranks


@quick
@given(batches())
def test_every_component_has_one_place(batch):
    slots, ranks = batch
    tiles = ops.route(slots, ranks, STRIDE).expanded_tiles()
    row, component, owner = (
        part.reshape(tiles.num_tiles, tiles.num_places).tolist() for part in (tiles.row, tiles.component, tiles.owner)
    )
    seen = [
        (one_row, one_component)
        for rows, components in zip(row, component, strict=True)
        for one_row, one_component in zip(rows, components, strict=True)
        if one_row >= 0
    ]
    wanted = [
        (at, component)
        for at, slot in enumerate(slots)
        for component in (range(slot * STRIDE, slot * STRIDE + ranks[slot]) if ranks[slot] else [-1])
    ]
    assert sorted(seen) == sorted(wanted)
    homes = [{one for one in rows if one >= 0} for rows in row]
    assert sum(len(home) for home in homes) == len(slots), "a row's places are in two tiles"
    if tiles.num_rows:
        tile_row = tiles.tile_row.reshape(tiles.num_tiles, tiles.num_rows).tolist()
        for rows, owners, written in zip(row, owner, tile_row, strict=True):
            assert all(written[o] == r for r, o in zip(rows, owners, strict=True) if r >= 0)
            assert Counter(one for one in written if one >= 0) == Counter({one for one in rows if one >= 0})
            assert all((r < 0) == (o < 0) for r, o in zip(rows, owners, strict=True))
    else:
        assert max(ranks[slot] for slot in slots) <= 1
    # An empty tile is known by its first place.
    assert all(rows[0] >= 0 or max(rows) < 0 for rows in row)


@quick
@given(batches(), st.integers(1, 40), st.sampled_from([16, 32, None]))
def test_every_token_is_in_one_tile(batch, length, num_tokens):
    slots, ranks = batch
    tiles = ops.route(slots, ranks, STRIDE).segment_tiles(length, num_tokens)
    order = tiles.order.tolist()
    assert sorted(order) == list(range(len(slots)))
    seen = []
    for slot, rank, first, count in zip(
        *(part.tolist() for part in (tiles.slot, tiles.rank, tiles.first, tiles.count)), strict=True
    ):
        assert 0 <= count <= tiles.num_tokens
        for token in range(first, first + count):
            assert slots[order[token // length]] == slot and ranks[slot] == rank <= tiles.rank_tile
            seen.append(token)
    assert sorted(seen) == list(range(len(slots) * length))


def test_batches_of_one_shape_differ_in_their_numbers_alone():
    """What a captured graph needs: another batch's numbers fit into the same tensors."""
    one, other = (ops.route(slots, [0, 2, 2, 2], 2) for slots in ([1, 2, 3, 0], [2, 0, 1, 3]))
    expanded, segments = ("row", "component", "owner", "tile_row"), ("order", "slot", "rank", "first", "count")
    for a, b, names in (
        (one.expanded_tiles(), other.expanded_tiles(), expanded),
        (one.segment_tiles(1, 16), other.segment_tiles(1, 16), segments),
    ):
        assert a.shape == b.shape and a.numbers.shape == b.numbers.shape and not torch.equal(a.numbers, b.numbers)
        a.numbers.copy_(b.numbers)
        for name in names:
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_tiles_are_no_larger_than_the_batch_needs():
    assert expanded_tiles([1] * 32, [4] * 32, 4, "cpu").shape == (1, 128, 32)
    assert expanded_tiles([1] * 32, [1] * 32, 1, "cpu").shape == (1, 32, 0)
    assert expanded_tiles([1] * 64, [64] * 64, 64, "cpu").shape == (32, 128, 16)
    assert expanded_tiles([1, 1], [3, MAX_PLACES + 1], MAX_PLACES + 1, "cpu") is None
    assert [power_of_two(number) for number in (0, 1, 2, 3, 4, 5)] == [1, 1, 2, 4, 4, 8]


@pytest.mark.parametrize("tokens, size", [([1], 16), ([16] * 8, 16), ([512, 512], 256), ([300], 64), ([40] * 3, 64)])
def test_the_tile_is_the_cheapest(tokens, size):
    assert cheapest_tile(tokens, 16) == size
