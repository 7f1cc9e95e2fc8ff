"""Who answers what: each item by the base model and its language's adapters, the first few by other languages' adapters too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Generic, Protocol, TypeVar

from flora.evaluate.checkpoints import Checkpoint

Key = tuple[str, str, "str | None"]
"""Whose answers they are: (language of the items, method, language of the adapter or None for the base model)."""


class OfLanguage(Protocol):
    """What can be asked: a problem, or a clip."""

    @property
    def language(self) -> str: ...


Item = TypeVar("Item", bound=OfLanguage)


@dataclass(frozen=True)
class Task(Generic[Item]):
    """An item and who answers it: a method with a checkpoint, or the base model with None. sample: from 0."""

    item: Item
    checkpoint: Checkpoint | None
    sample: int = 0

    @property
    def method(self) -> str:
        return self.checkpoint.method if self.checkpoint else "base"

    @property
    def adapter(self) -> str | None:
        """What the engine calls the adapter."""
        return self.checkpoint.name if self.checkpoint else None

    @property
    def key(self) -> Key:
        return (self.item.language, self.method, self.checkpoint.language if self.checkpoint else None)


def tasks_of(
    items: Mapping[str, Iterable[Item]],
    checkpoints: Sequence[Checkpoint],
    base: bool = True,
    confusion: int = 0,
    samples: int = 1,
) -> Iterator[Task[Item]]:
    """Every item for the base model and its language's adapters, and the first `confusion` items of each language for the fLoRA
    adapters of all others too; each of them `samples` times.

    Languages take turns, so that a batch holds adapters of several. Items are taken as they come: no more of them is held here.
    """
    own = {tag: [checkpoint for checkpoint in checkpoints if checkpoint.language == tag] for tag in items}
    others = {tag: [c for c in checkpoints if c.language != tag and c.method == "flora"] for tag in items}
    for index, row in enumerate(zip_longest(*items.values())):
        for item in row:
            if item is None:
                continue
            who = [*([None] if base else []), *own[item.language], *(others[item.language] if index < confusion else [])]
            for checkpoint in who:
                for sample in range(samples):
                    yield Task(item, checkpoint, sample)


def number_of_tasks(
    numbers: Mapping[str, int | None], checkpoints: Sequence[Checkpoint], base: bool = True, confusion: int = 0
) -> int | None:
    """How many tasks of one sample there are for so many items of each language; None where a number is not known."""
    total = 0
    for tag, number in numbers.items():
        if number is None:
            return None
        own = sum(checkpoint.language == tag for checkpoint in checkpoints)
        others = sum(checkpoint.language != tag and checkpoint.method == "flora" for checkpoint in checkpoints)
        total += number * (base + own) + min(number, confusion) * others
    return total
