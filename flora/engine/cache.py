"""A key/value cache in which every running request has a row and its own position, behind transformers' `Cache` interface.

A forward reads and writes a range of consecutive rows. A prompt, or a piece of one, is written from its row's position on; decoding
writes one token a row. The mask hides what lies beyond each row's position: padding, or what another request left there. Nothing is
allocated in a step: rows and positions are reserved when a request is admitted, each time twice what there was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from flora.engine.device import free_bytes

Padding = Literal["none", "positions", "rows and positions"]
"""What steps that decode are padded in. On a CPU, rows that nobody asked for cost as much as the others."""

POSITIONS_AT_ONCE = 64
"""Positions are reserved in multiples of this."""

SHARE_OF_FREE_MEMORY = 0.5
"""How much of it a cache may take for rows that nobody has asked for yet."""


class Window:
    """Which part of the cache the next forward touches, shared by all of its layers."""

    def __init__(self) -> None:
        self.rows = slice(0, 0)
        self.width = 0  # positions that this forward may look at, 0 … width - 1
        self.whole_prompts = False  # every row starts at position 0: there is nothing before to look at
        self.positions: Tensor | None = None  # (n,) int64 of the one token each row gets, or None for prompts
        self.places: dict[tuple[int, int], Tensor] = {}  # by shape of a layer, where those tokens are written
        self.tokens: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # row, position; row and place in the input
        self.num_rows, self.num_positions = 0, 0  # reserved

    def places_in(self, num_heads: int, num_positions: int) -> Tensor:
        """(n · heads,) int64: where this step's tokens stand in (rows, heads, positions, d_head) seen as (…, d_head).

        All of it is made in the step itself: a captured one may read nothing that another step made.
        """
        key = (num_heads, num_positions)
        if key not in self.places:
            first, last = self.rows.start * num_heads, self.rows.stop * num_heads  # heads, counted through all rows
            starts = torch.arange(first, last, device=self.positions.device).view(-1, num_heads) * num_positions
            self.places[key] = (starts + self.positions[:, None]).flatten()
        return self.places[key]


class RowLayer(CacheLayerMixin):
    """One layer's keys and values (rows, heads, positions, d_head)."""

    is_sliding = False

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (self.window.num_rows, key_states.shape[1], self.window.num_positions)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])  # zeros: what is masked is still multiplied by 0
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write (n, heads, l, d_head) and return all that this forward may look at, (n, heads, width, d_head)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self.window
        if window.positions is not None:
            places = window.places_in(*self.keys.shape[1:3])
            for kept, new in ((self.keys, key_states), (self.values, value_states)):
                width = new.shape[-1]
                kept.view(-1, width).index_copy_(0, places, new.reshape(-1, width))
        elif window.whole_prompts:
            self.keys[window.rows, :, : window.width] = key_states
            self.values[window.rows, :, : window.width] = value_states
            return key_states, value_states
        else:
            row, position, source_row, source_place = window.tokens
            self.keys[row, :, position] = key_states[source_row, :, source_place]
            self.values[row, :, position] = value_states[source_row, :, source_place]
        return self.keys[window.rows, :, : window.width], self.values[window.rows, :, : window.width]

    @property
    def addresses(self) -> tuple[int, ...]:
        return (self.keys.data_ptr(), self.values.data_ptr()) if self.is_initialized else ()

    @property
    def row_bytes(self) -> int:
        return (self.keys[:1].nbytes + self.values[:1].nbytes) if self.is_initialized else 0

    def resize(self, num_rows: int, num_positions: int) -> None:
        if self.is_initialized:
            self.keys = _resized(self.keys, num_rows, num_positions)
            self.values = _resized(self.values, num_rows, num_positions)

    def move(self, source: int, target: int, length: int) -> None:
        if self.is_initialized:
            self.keys[target, :, :length] = self.keys[source, :, :length]
            self.values[target, :, :length] = self.values[source, :, :length]

    def clear(self, row: int) -> None:
        if self.is_initialized:
            self.keys[row], self.values[row] = 0.0, 0.0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.width, 0

    def get_seq_length(self) -> int:
        return 0 if self.window.whole_prompts else max(0, self.window.width - 1)

    def get_max_length(self) -> int:
        return self.window.num_positions

    def get_max_cache_shape(self) -> int:
        """The name that transformers before 5 has for `get_max_length`."""
        return self.window.num_positions


def _resized(old: Tensor, num_rows: int, num_positions: int) -> Tensor:
    new = old.new_zeros(num_rows, old.shape[1], num_positions, old.shape[3])
    # Where the device was full in the midst of an earlier attempt, some layers are larger already than the cache says.
    num_rows, num_positions = min(num_rows, old.shape[0]), min(num_positions, old.shape[2])
    new[:num_rows, :, :num_positions] = old[:num_rows, :, :num_positions]
    return new


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class RowCache(Cache):
    """All layers' `RowLayer`s.

    max_rows, max_positions: what may be reserved at most. padding: of decoding, see `step_shape`.
    """

    def __init__(self, num_layers: int, max_rows: int, max_positions: int, padding: Padding = "none") -> None:
        self.window = Window()
        self.max_rows, self.max_positions, self.padding = max_rows, max_positions, padding
        super().__init__(layers=[RowLayer(self.window) for _ in range(num_layers)])

    def reserve(self, num_rows: int, num_positions: int, other_row_bytes: int = 0) -> None:
        """Make room for this many rows of this many positions; what they hold stays. Whatever the device raises when it is full.

        other_row_bytes: what each row takes elsewhere.
        """
        window = self.window
        if num_rows <= window.num_rows and num_positions <= window.num_positions:
            return
        positions = window.num_positions
        if num_positions > positions:
            positions = min(self._padded(max(num_positions, 2 * positions)), self.max_positions)
        rows = self._rows_to_reserve(num_rows, positions, other_row_bytes)
        for layer in self.layers:
            layer.resize(rows, positions)
        window.num_rows, window.num_positions = rows, positions

    def _rows_to_reserve(self, num_rows: int, num_positions: int, other_row_bytes: int) -> int:
        """Twice what there was. Where rows are padded, and so steps captured that are lost when the cache moves, all that there may
        ever be, as far as free memory allows."""
        there = self.window.num_rows
        free = free_bytes(self.layers[0].device) if self.padding == "rows and positions" and self.row_bytes else None
        if free is None:
            return there if num_rows <= there else min(max(num_rows, 2 * there), self.max_rows)
        row_bytes = self.row_bytes * num_positions // self.window.num_positions + other_row_bytes
        free += there * (self.row_bytes + other_row_bytes)  # what is there is given back
        return max(num_rows, min(self.max_rows, int(SHARE_OF_FREE_MEMORY * free) // row_bytes))

    @property
    def row_bytes(self) -> int:
        """What a row takes in all layers as it is reserved now; 0 before anything was written."""
        return sum(layer.row_bytes for layer in self.layers)

    def step_shape(self, first_row: int, num_rows: int, width: int) -> tuple[int, int]:
        """Rows and positions of a step that decodes `num_rows` rows and looks at `width` positions.

        Each such shape can be captured once and replayed. Padded rows are a power of two, or all there are, padded positions a
        multiple of 64, or all there are; with padded rows, of a quarter of the last power of two where that is more, so that
        there are four widths to each doubling. What the spare rows compute is written to `spare_position`.
        """
        if self.padding == "none":
            return num_rows, width
        rows = num_rows
        if self.padding == "rows and positions":
            rows = min(1 << (num_rows - 1).bit_length(), self.window.num_rows - first_row)
        return rows, min(self._padded(width), self.window.num_positions)

    def _padded(self, width: int) -> int:
        quarter = (1 << (width - 1).bit_length()) // 8 if self.padding == "rows and positions" else 0
        return _rounded(width, max(POSITIONS_AT_ONCE, quarter))

    def step_widths(self, num_positions: int) -> list[int]:
        """Every width that `step_shape` gives to steps that look at up to `num_positions` positions, of those that are reserved."""
        widths, most = [self.step_shape(0, 1, 1)[1]], min(num_positions, self.window.num_positions)
        while widths[-1] < most:
            widths.append(self.step_shape(0, 1, widths[-1] + 1)[1])
        return widths

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the keys and values lie, and in what shape: what a captured graph reads and writes as long as this is the same."""
        return (self.window.num_rows, self.window.num_positions, *(one for layer in self.layers for one in layer.addresses))

    @property
    def spare_position(self) -> int:
        """Where no request has anything: its last token is never read again, and so never written."""
        return self.window.num_positions - 1

    def begin_prompts(self, first_row: int, starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        """The next forward reads a piece of one prompt per row: `lengths` tokens from position `starts` on, padded on the right."""
        window, n = self.window, len(starts)
        window.rows, window.positions = slice(first_row, first_row + n), None
        window.whole_prompts = not any(starts)
        window.width = max(start + length for start, length in zip(starts, lengths, strict=True))
        if not window.whole_prompts:
            tokens = [
                (first_row + row, start + place, row, place)
                for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
                for place in range(length)
            ]
            window.tokens = tuple(torch.tensor(tokens, device=device).unbind(1))

    def begin_tokens(self, first_row: int, positions: Tensor, width: int) -> None:
        """The next forward reads one token a row. positions: (n,) int64, where each is written; width: the largest, plus one."""
        window = self.window
        window.rows, window.positions, window.width = slice(first_row, first_row + positions.shape[0]), positions, width
        window.places.clear()
        window.whole_prompts = False

    def move(self, source: int, target: int, length: int) -> None:
        """Row `target` becomes what row `source` is up to position `length`."""
        for layer in self.layers:
            layer.move(source, target, length)

    def clear(self, row: int) -> None:
        """Forget a row whose numbers are not finite: masked or not, they would spoil whoever has the row next."""
        for layer in self.layers:
            layer.clear(row)


class CrossLayer(CacheLayerMixin):
    """One decoder layer's keys and values of what the encoder heard (rows, heads, frames, d_head).

    The model writes them with a prompt and afterwards reads `keys` and `values`, which are those of the window's rows.
    """

    is_sliding = False

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def keys(self) -> Tensor | None:
        return None if self._keys is None else self._keys[self.window.rows]

    @keys.setter
    def keys(self, value: None) -> None:
        """CacheLayerMixin's constructor sets it to None."""

    @property
    def values(self) -> Tensor | None:
        return None if self._values is None else self._values[self.window.rows]

    @values.setter
    def values(self, value: None) -> None:
        """CacheLayerMixin's constructor sets it to None."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._keys = key_states.new_zeros(self.window.num_rows, *key_states.shape[1:])
        self._values = value_states.new_zeros(self.window.num_rows, *value_states.shape[1:])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._keys[self.window.rows] = key_states
        self._values[self.window.rows] = value_states
        return key_states, value_states

    @property
    def addresses(self) -> tuple[int, ...]:
        return (self._keys.data_ptr(), self._values.data_ptr()) if self.is_initialized else ()

    @property
    def row_bytes(self) -> int:
        return (self._keys[:1].nbytes + self._values[:1].nbytes) if self.is_initialized else 0

    def resize(self, num_rows: int, num_positions: int) -> None:
        if self.is_initialized and num_rows != self._keys.shape[0]:
            self._keys = _resized(self._keys, num_rows, self._keys.shape[2])
            self._values = _resized(self._values, num_rows, self._values.shape[2])

    def move(self, source: int, target: int, length: int) -> None:
        if self.is_initialized and length:
            self._keys[target] = self._keys[source]
            self._values[target] = self._values[source]

    def clear(self, row: int) -> None:
        if self.is_initialized:
            self._keys[row], self._values[row] = 0.0, 0.0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (0 if self._keys is None else self._keys.shape[2]), 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return 0 if self._keys is None else self._keys.shape[2]

    def get_max_cache_shape(self) -> int:
        """The name that transformers before 5 has for `get_max_length`."""
        return self.get_max_length()


class SpeechCache(EncoderDecoderCache):
    """A `RowCache` of what the decoder wrote, and beside it what it looks up of each clip."""

    def __init__(self, num_layers: int, max_rows: int, max_positions: int, padding: Padding = "none") -> None:
        self.own = RowCache(num_layers, max_rows, max_positions, padding)
        super().__init__(self.own, Cache(layers=[CrossLayer(self.own.window) for _ in range(num_layers)]))

    def reserve(self, num_rows: int, num_positions: int) -> None:
        """As `RowCache.reserve`."""
        self.own.reserve(num_rows, num_positions, sum(layer.row_bytes for layer in self.cross_attention_cache.layers))
        for layer in self.cross_attention_cache.layers:
            layer.resize(self.own.window.num_rows, 0)

    def step_shape(self, first_row: int, num_rows: int, width: int) -> tuple[int, int]:
        """As `RowCache.step_shape`."""
        return self.own.step_shape(first_row, num_rows, width)

    def step_widths(self, num_positions: int) -> list[int]:
        """As `RowCache.step_widths`."""
        return self.own.step_widths(num_positions)

    @property
    def addresses(self) -> tuple[int, ...]:
        """As `RowCache.addresses`, of what was heard too."""
        return (*self.own.addresses, *(one for layer in self.cross_attention_cache.layers for one in layer.addresses))

    @property
    def spare_position(self) -> int:
        """As `RowCache.spare_position`."""
        return self.own.spare_position

    def begin_prompts(self, first_row: int, starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        """As `RowCache.begin_prompts`; the clips' keys and values are written, too."""
        self.own.begin_prompts(first_row, starts, lengths, device)
        self.is_updated = dict.fromkeys(self.is_updated, False)

    def begin_tokens(self, first_row: int, positions: Tensor, width: int) -> None:
        """As `RowCache.begin_tokens`; the clips' keys and values are read."""
        self.own.begin_tokens(first_row, positions, width)
        self.is_updated = dict.fromkeys(self.is_updated, True)

    def move(self, source: int, target: int, length: int) -> None:
        """As `RowCache.move`."""
        self.own.move(source, target, length)
        for layer in self.cross_attention_cache.layers:
            layer.move(source, target, length)

    def clear(self, row: int) -> None:
        """As `RowCache.clear`."""
        self.own.clear(row)
        for layer in self.cross_attention_cache.layers:
            layer.clear(row)


def prompt_mask(starts: Sequence[int], length: int, width: int, device: torch.device) -> Tensor:
    """Where each token of a prompt's piece may look: itself and all before it.

    starts: each row's first position. Returns (n, 1, length, width) bool; (1, 1, length, width) where all start at 0.
    """
    first = torch.tensor(list(starts) if any(starts) else [0], device=device)
    own = first[:, None] + torch.arange(length, device=device)  # (n, length)
    return (torch.arange(width, device=device) <= own[:, :, None])[:, None]


def token_mask(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(n, 1, 1, width) for one new token per row at `positions` (n,): what is added to the scores; no layer has to convert it."""
    beyond = torch.arange(width, device=positions.device) > positions[:, None]
    return torch.zeros(beyond.shape, dtype=dtype, device=beyond.device).masked_fill_(beyond, -torch.inf)[:, None, None]
