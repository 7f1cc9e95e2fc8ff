"""A batch of its caller's own: it is stepped by whoever started it, and nothing joins it. What comparisons are made of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from flora.engine.core import Core, Row
from flora.engine.request import Completion, Event


class Generation(Protocol):
    """A running batch. `step` until `done`; then `completions`. `cancel` ends rows early, `close` gives everything back."""

    done: bool
    phase: str

    def step(self) -> list[Event]: ...
    def cancel(self, index: int | None = None) -> list[Event]: ...
    def close(self) -> None: ...

    @property
    def completions(self) -> list[Completion]: ...
    @property
    def chosen_logits(self) -> list[list[float]]: ...


class BatchGeneration:
    """One forward per step for the whole batch, whatever its adapters. The first step is the prefill and gives the first tokens.

    core: of its own. rows: their adapters' slots pinned. A request that fails raises its error from `step`.
    """

    def __init__(self, core: Core, rows: Sequence[Row]) -> None:
        self.core, self.rows = core, list(rows)
        self.phase = "prefill"  # of the next step; then "decode"
        self._closed = False
        for row in self.rows:
            core.add(row)

    @property
    def done(self) -> bool:
        return all(row.done for row in self.rows)

    @property
    def completions(self) -> list[Completion]:
        return [row.completion for row in self.rows if row.completion is not None]

    @property
    def chosen_logits(self) -> list[list[float]]:
        return [row.chosen_logits for row in self.rows]

    def step(self) -> list[Event]:
        if self.done or self._closed:
            return []
        if self.phase == "prefill":
            now = time.perf_counter()
            for row in self.rows:
                row.times.arrival_s = now
        events = [event for _, event in self.core.step()]
        self.phase = "decode"
        failed = next((row.error for row in self.rows if row.error is not None), None)
        if failed is not None:
            self.close()
            raise failed
        if self.done:
            self.close()
        return events

    def cancel(self, index: int | None = None) -> list[Event]:
        """End one row, or all that still run, as "cancelled", with the tokens they have."""
        rows = [row for row in self.rows if index in (None, row.index)]
        events = [event for row in rows for _, event in self.core.cancel(row)]
        if self.done:
            self.close()
        return events

    def close(self) -> None:
        """Give the adapters' slots and the cache back. Called by itself when the batch is done; calling it again does nothing."""
        if not self._closed:
            self._closed = True
            self.core.close()


class SequentialGeneration:
    """Groups of one adapter each, with the weights merged: every step runs each group's forward, one after another.

    That is what serving merged weights costs when several adapters are wanted at once: one forward per adapter and step.
    """

    def __init__(self, groups: Sequence[BatchGeneration]) -> None:
        self.groups = list(groups)

    @property
    def done(self) -> bool:
        return all(group.done for group in self.groups)

    @property
    def phase(self) -> str:
        """Of the next step; groups that were cancelled before their prefill do not count."""
        return next((group.phase for group in self.groups if not group.done), "decode")

    @property
    def completions(self) -> list[Completion]:
        return [row.completion for row in self._rows() if row.completion is not None]

    @property
    def chosen_logits(self) -> list[list[float]]:
        return [row.chosen_logits for row in self._rows()]

    def _rows(self) -> list[Row]:
        return sorted((row for group in self.groups for row in group.rows), key=lambda row: row.index)

    def step(self) -> list[Event]:
        return [event for group in self.groups for event in group.step()]

    def cancel(self, index: int | None = None) -> list[Event]:
        return [event for group in self.groups for event in group.cancel(index)]

    def close(self) -> None:
        for group in self.groups:
            group.close()
