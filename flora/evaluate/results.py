"""From what was counted to the rows that are kept: a `Score` for every language, method and adapter, and their `Mean`s."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flora.evaluate import intervals
from flora.evaluate.checkpoints import Checkpoint
from flora.evaluate.intervals import Interval
from flora.evaluate.rows import METHODS, Mean, Score, environment
from flora.evaluate.tasks import Key
from flora.names import public_name

if TYPE_CHECKING:
    from flora.engine import Engine

_DIGITS = 6  # of a fraction that are kept

MeanOf = Callable[[str, "str | None", str, Sequence[str]], "Interval | None"]
"""(method, the method to subtract or None, metric, languages) → the mean over the languages; None where one of them is missing."""


@dataclass(frozen=True)
class Measured:
    """A number before it is a row. interval: None where it could not be measured, for the `reason`. items: how many were scored."""

    interval: Interval | None
    items: int
    reason: str | None = None


def _ends(interval: Interval | None) -> dict[str, float | None]:
    """value, low and high as fields of a row."""
    ends = {name: getattr(interval, name, None) for name in ("value", "low", "high")}
    return {name: None if end is None else round(end, _DIGITS) for name, end in ends.items()}


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
                    **_ends(number.interval),
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


def mean_rows(scores: Sequence[Score], mean_of: MeanOf) -> list[Mean]:
    """For each metric the mean of every method that has all languages, and fLoRA's lead on every other method.

    scores: of one run. The languages are those in which one of the methods could be scored with the language's own adapter.
    """
    rows = []
    for metric in dict.fromkeys(score.metric for score in scores):
        own = {
            (score.language, score.method): score
            for score in scores
            if score.metric == metric and score.value is not None and score.adapter in (None, score.language)
        }
        languages = tuple(dict.fromkeys(language for language, _ in own))
        pairs = [(method, None) for method in METHODS] + [("flora", method) for method in METHODS if method != "flora"]
        for method, versus in pairs if languages else ():
            if (interval := mean_of(method, versus, metric, languages)) is None:
                continue
            of_method = [own[language, method] for language in languages]
            rows.append(
                Mean(
                    task=of_method[0].task,
                    method=method,
                    versus=versus,
                    metric=metric,
                    **_ends(interval),
                    confidence=interval.confidence,
                    languages=languages,
                    items=sum(score.items for score in of_method),
                    model=of_method[0].model,
                    source=" ".join(dict.fromkeys(score.source for score in of_method)),
                    seed=of_method[0].seed,
                    command=of_method[0].command,
                )
            )
    return rows
