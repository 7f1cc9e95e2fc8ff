"""Which requests run in the next step: plain Python, no torch.

A step takes one token from every request that is decoding, and spends what is left of its token budget on prompts: a long prompt
is read in pieces, so that nobody who is decoding waits for the whole of it. Requests are admitted where a row of the cache is free:
the sessions take turns, within a session the first comes first. A request that cannot run yet, because no slot is free for its
adapter, lets others pass, but only so many: then nobody is admitted before it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """What the scheduler knows of a request."""

    session: Hashable  # whose it is
    num_prompt_tokens: int  # what its prompt costs of a step's budget
    num_prefilled: int  # prompt tokens that have been read; the scheduler only reads it
    divisible: bool  # its prompt may be read in pieces
    num_passes: int  # requests admitted while it stood in front of them; the scheduler counts


Item = TypeVar("Item", bound=Schedulable)


@dataclass(frozen=True)
class Chunk(Generic[Item]):
    """A piece of a prompt: tokens start … start + length - 1."""

    item: Item
    start: int
    length: int

    @property
    def is_last(self) -> bool:
        return self.start + self.length == self.item.num_prompt_tokens


@dataclass(frozen=True)
class Plan(Generic[Item]):
    """What one step runs: pieces of prompts, and one more token for each that is decoding."""

    prefill: tuple[Chunk[Item], ...] = ()
    decode: tuple[Item, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.prefill or self.decode)


@dataclass(eq=False)
class Scheduler(Generic[Item]):
    """max_rows: requests that run at once. max_batch_tokens: of one step, decoded and prompt tokens together."""

    max_rows: int
    max_batch_tokens: int
    decoding: list[Item] = field(default_factory=list)  # rows 0, 1, … of the cache
    prefilling: list[Item] = field(default_factory=list)  # the rows behind those
    num_waiting: int = 0
    _waiting: OrderedDict[Hashable, deque[Item]] = field(default_factory=OrderedDict)  # by session, the next one's turn first

    @property
    def max_passes(self) -> int:
        """So many may be admitted before a request that waits for its adapter; then all wait for it."""
        return 2 * self.max_rows

    @property
    def num_running(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    def waiting_by_session(self) -> dict[Hashable, int]:
        """How many of each session stand in line."""
        return {session: len(queue) for session, queue in self._waiting.copy().items()}

    def waiting(self) -> Iterator[Item]:
        """In the order of admission: every session's first, then every session's second, and so on."""
        rounds = [iter(queue) for queue in self._waiting.values()]
        while rounds:
            still_there = []
            for session in rounds:
                item = next(session, None)
                if item is not None:
                    yield item
                    still_there.append(session)
            rounds = still_there

    def add(self, item: Item) -> None:
        """Stand in line."""
        self._waiting.setdefault(item.session, deque()).append(item)
        self.num_waiting += 1

    def withdraw(self, item: Item) -> None:
        """Leave the line."""
        queue = self._waiting[item.session]
        queue.remove(item)
        self.num_waiting -= 1
        if not queue:
            del self._waiting[item.session]

    def schedule(self, admit: Callable[[Item], bool]) -> Plan[Item]:
        """The next step. admit(item): take it in if it can run now, and say whether it was taken.

        The rows are in their final order once this returns: `decoding`, then `prefilling`.
        """
        decode = tuple(self.decoding)
        budget = self.max_batch_tokens - len(decode)
        chunks: list[Chunk[Item]] = []
        for item in self.prefilling:
            budget = self._take_chunk(item, budget, chunks)
        if budget > 0 and self.num_running < self.max_rows and self._waiting:
            self._admit(admit, budget, chunks)
        return Plan(tuple(chunks), decode)

    def _take_chunk(self, item: Item, budget: int, chunks: list[Chunk[Item]]) -> int:
        """Append the piece of a prompt that the budget allows; what is left of it, 0 once a prompt had to be cut or put off.

        A prompt that cannot be cut is read whole, alone in its step where it is larger than the budget.
        """
        remaining = item.num_prompt_tokens - item.num_prefilled
        if budget <= 0 or (not item.divisible and remaining > budget and chunks):
            return 0
        length = min(remaining, budget) if item.divisible else remaining
        chunks.append(Chunk(item, item.num_prefilled, length))
        return budget - length

    def _admit(self, admit: Callable[[Item], bool], budget: int, chunks: list[Chunk[Item]]) -> None:
        admitted: list[Item] = []
        passed: list[Item] = []
        for item in list(self.waiting()):
            if budget <= 0 or self.num_running >= self.max_rows:
                break
            if not item.divisible and item.num_prompt_tokens > budget and chunks:
                break
            if not admit(item):
                if item.num_passes >= self.max_passes:
                    break  # it has let enough others pass
                passed.append(item)
                continue
            self.prefilling.append(item)
            admitted.append(item)
            for other in passed:
                other.num_passes += 1
            budget = self._take_chunk(item, budget, chunks)
        for item in admitted:
            self.withdraw(item)
        for session in dict.fromkeys(item.session for item in admitted):  # who was served goes to the end of the line
            if session in self._waiting:
                self._waiting.move_to_end(session)

    def prefilled(self, count: int) -> None:
        """The first `count` of `prefilling` have read their prompts and decode from now on; their rows stay where they are."""
        self.decoding += self.prefilling[:count]
        del self.prefilling[:count]

    def remove(self, item: Item) -> list[tuple[int, int]]:
        """Take a running request out and close the gap; returns the (from, to) moves of rows that this needs, in their order."""
        moves: list[tuple[int, int]] = []
        if item in self.decoding:
            place, last = self.decoding.index(item), len(self.decoding) - 1
            if place < last:
                self.decoding[place] = self.decoding[last]
                moves.append((last, place))
            self.decoding.pop()
            gap = last
        else:
            place = self.prefilling.index(item)
            self.prefilling.pop(place)
            gap = len(self.decoding) + place
        # Those behind the gap move up one by one and keep their order: what has been read of their prompts is little or nothing.
        moves += [(row + 1, row) for row in range(gap, self.num_running)]
        return moves


def group_by_adapter(adapters: Sequence[Hashable]) -> list[tuple[int, ...]]:
    """The indices of equal adapters, in the order of their first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for index, adapter in enumerate(adapters):
        groups.setdefault(adapter, []).append(index)
    return [tuple(indices) for indices in groups.values()]
