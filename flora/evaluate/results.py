"""From what was counted to the rows that are kept: a `Score` for every language, method and adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flora.evaluate import intervals
from flora.evaluate.checkpoints import Checkpoint
from flora.evaluate.intervals import Interval
from flora.evaluate.rows import METHODS, Score, environment, public_name
from flora.evaluate.tasks import Key

if TYPE_CHECKING:
    from flora.engine import Engine

_DIGITS = 6  # of a fraction that are kept


@dataclass(frozen=True)
class Measured:
    """A number before it is a row. interval: None where it could not be measured, for the `reason`. items: how many were scored."""

    interval: Interval | None
    items: int
    reason: str | None = None

    @property
    def ends(self) -> dict[str, float | None]:
        """value, low and high as fields of a row."""
        found = (None, None, None) if self.interval is None else (self.interval.value, self.interval.low, self.interval.high)
        return {
            name: None if end is None else round(end, _DIGITS) for name, end in zip(("value", "low", "high"), found, strict=True)
        }


def score_rows(
    task: str,
    measured: Mapping[Key, Mapping[str, Measured]],
    engine: Engine,
    checkpoints: Sequence[Checkpoint],
    sources: Mapping[str, str],
    facts: Mapping[str, object],
    *libraries: str,
) -> list[Score]:
    """A row for each metric of every language, method and adapter: languages and methods in order, the right adapter first.

    measured: whose answers → metric → number. sources: language → where its items are from, in the order of the rows. facts: the
    fields of `Score` that are the same in all rows. libraries: distributions that the numbers depend on besides the usual ones.
    """
    by_name = {checkpoint.name: checkpoint for checkpoint in checkpoints}
    surroundings = environment(engine, *libraries)
    order = {tag: index for index, tag in enumerate(sources)}
    keys = sorted(measured, key=lambda key: (order[key[0]], METHODS.index(key[1]), key[2] not in (None, key[0]), key[2] or ""))
    rows = []
    for language, method, adapter in keys:
        checkpoint = by_name.get(f"{adapter}/{method}")
        for metric, number in measured[language, method, adapter].items():
            rows.append(
                Score(
                    task=task,
                    language=language,
                    method=method,
                    adapter=adapter,
                    metric=metric,
                    **number.ends,
                    confidence=intervals.CONFIDENCE,
                    items=number.items,
                    graded=number.interval is not None,
                    reason=number.reason,
                    checkpoint=None if checkpoint is None else public_name(checkpoint.source),
                    rank=None if checkpoint is None else max(engine.adapters[checkpoint.name].ranks.values()),
                    source=sources[language],
                    **facts,
                    **surroundings,
                )
            )
    return rows
