"""Which requests run together: plain Python, no torch.

Requests are taken in their order, as many as fit a batch. Where the weights can hold one adapter at a time (`merged`), a batch is
split into groups of one adapter each, which the runner serves one after another.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch(Generic[Item]):
    """Requests that run together. indices: their places in the caller's list."""

    indices: tuple[int, ...]
    items: tuple[Item, ...]


def schedule(items: Sequence[Item], max_batch_size: int) -> Iterator[Batch[Item]]:
    """Cut a list of requests into batches of at most `max_batch_size`, in order."""
    for start in range(0, len(items), max_batch_size):
        indices = tuple(range(start, min(start + max_batch_size, len(items))))
        yield Batch(indices, tuple(items[index] for index in indices))


def group_by_adapter(adapters: Sequence[Hashable]) -> list[tuple[int, ...]]:
    """The indices of equal adapters, in the order of their first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for index, adapter in enumerate(adapters):
        groups.setdefault(adapter, []).append(index)
    return [tuple(indices) for indices in groups.values()]
