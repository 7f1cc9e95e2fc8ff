"""A key/value cache in which every row stands at its own position, behind transformers' `Cache` interface.

Prompts are padded on the right, so position p of a row is always its p-th token. The prompt is written in one piece; afterwards
each row writes its token at its own position, over what padding left there, and the attention mask hides everything beyond it.
The memory is allocated once, for the longest row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class Positions:
    """Where the next forward writes, shared by all layers of a cache."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows: Tensor | None = None  # (n,) int64, 0 … n - 1
        self.current: Tensor | None = None  # (n,) int64; None: a prompt, written from position 0
        self.width = 0  # positions any row has filled, this forward's included

    def begin_prompt(self, length: int) -> None:
        self.current, self.width = None, length

    def begin_token(self, current: Tensor, width: int) -> None:
        """current: (n,) int64, each row's position. width: the largest of them, plus one."""
        if self.rows is None or self.rows.shape != current.shape:
            self.rows = torch.arange(current.shape[0], device=current.device)
        self.current, self.width = current, width


class RowLayer(CacheLayerMixin):
    """One layer's keys and values (n, heads, capacity, d_head)."""

    is_sliding = False

    def __init__(self, positions: Positions) -> None:
        super().__init__()
        self.positions = positions

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        n, heads, _, _ = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        capacity = self.positions.capacity
        self.keys = key_states.new_zeros(n, heads, capacity, key_states.shape[-1])
        self.values = value_states.new_zeros(n, heads, capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write (n, heads, l, d_head) and return all that this forward may attend to, (n, heads, width, d_head)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        positions = self.positions
        if positions.current is None:
            self.keys[:, :, : positions.width] = key_states
            self.values[:, :, : positions.width] = value_states
            return key_states, value_states
        self.keys[positions.rows, :, positions.current] = key_states[:, :, 0]
        self.values[positions.rows, :, positions.current] = value_states[:, :, 0]
        return self.keys[:, :, : positions.width], self.values[:, :, : positions.width]

    def select(self, rows: Tensor) -> None:
        """Keep only these rows (n_kept,) int64."""
        if self.is_initialized:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.positions.width, 0

    def get_seq_length(self) -> int:
        return 0 if self.positions.current is None else self.positions.width - 1

    def get_max_length(self) -> int:
        return self.positions.capacity

    def get_max_cache_shape(self) -> int:
        """The name that transformers before 5 has for `get_max_length`."""
        return self.positions.capacity


class RowCache(Cache):
    """All layers' `RowLayer`s. capacity: positions per row; the longest row's prompt and new tokens."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.positions = Positions(capacity)
        super().__init__(layers=[RowLayer(self.positions) for _ in range(num_layers)])

    def select(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.select(rows)


def prompt_mask(length: int, device: torch.device) -> Tensor:
    """(1, 1, l, l) bool, True where a query may look: itself and what stands before it. Padding stands behind every real token."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]


def token_mask(current: Tensor, width: int) -> Tensor:
    """(n, 1, 1, width) bool for one new token per row at positions current (n,)."""
    return (torch.arange(width, device=current.device) <= current[:, None])[:, None, None]
