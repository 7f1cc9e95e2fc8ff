"""The points of a sweep, read back from its rows, and where two methods cross.

Rows are what a sweep measures, keeps, goes on from and is drawn from, live or recorded: there is no other way to a point.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from profiling.timing import Ratio, paired_ratio

STEP_TIME, THROUGHPUT, LATENCY = "step time", "throughput", "latency"
MEASURES = (STEP_TIME, THROUGHPUT, LATENCY)
FEWEST_REPEATS = 3  # of throughput and latency, for an interval of their ratio


@dataclass(frozen=True)
class Measure:
    """What is measured at a rank. rate: requests a second of a latency; infinite for throughput, None for the step time."""

    name: str
    rate: float | None = None

    @property
    def unit(self) -> str:
        return {STEP_TIME: "ms", THROUGHPUT: "tokens/s", LATENCY: "s/token"}[self.name]

    @property
    def higher_is_better(self) -> bool:
        return self.name == THROUGHPUT

    def __str__(self) -> str:
        """Such as: Latency at 8 requests/s."""
        return {
            STEP_TIME: "Decode step",
            THROUGHPUT: "Throughput",
            LATENCY: f"Latency at {self.rate:g} requests/s" if self.rate else "Latency",
        }[self.name]


@dataclass(frozen=True)
class SweepPoint:
    """One method at one rank. value: milliseconds of a decode step, tokens/s, or s/token; None where no request finished.

    range: the least and the most over repeats, of a step time its 10th and 90th percentile; None where there was one repeat.
    by_repeat: the value of each repeat, in turns with the other methods'; of a step time empty. ratio: its step over that of the
    sweep's first method, paired step by step.
    """

    measure: Measure
    rank: int
    method: str
    value: float | None
    range: tuple[float, float] | None = None
    by_repeat: tuple[float | None, ...] = ()
    ratio: Ratio | None = None
    saturation: str | None = None

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> SweepPoint:
        """From a row of a sweep; ValueError for anything that no sweep writes."""
        try:
            name, rank, method = row["measures"], row["rank"], row["method"]
            if name not in MEASURES or not isinstance(method, str) or type(rank) is not int or rank < 1:
                raise ValueError("this is no row of a sweep")
            if name == STEP_TIME:
                quantiles, ratio = row["step_quantiles"], row["ratio_to_first"]
                value, *ends = (1000 * _number(quantiles[quantile]) for quantile in ("p50", "p10", "p90"))
                if ratio is not None:
                    ratio = Ratio(*(_number(ratio[part]) for part in ("median", "low", "high")), int(ratio["n"]))
                return cls(Measure(name), rank, method, value, (ends[0], ends[1]), ratio=ratio)
            throughput = name == THROUGHPUT
            field = "tokens_per_s" if throughput else "s_per_token"
            value = row["tokens_per_s"] or None if throughput else row["s_per_token"].get("mean")
            by_repeat = tuple(None if not repeat[field] else _number(repeat[field]) for repeat in row["by_repeat"])
            known = [one for one in by_repeat if one is not None]
            return cls(
                measure=Measure(name, math.inf if throughput else _number(row["rate"])),
                rank=rank,
                method=method,
                value=None if value is None else _number(value),
                range=(min(known), max(known)) if len(known) > 1 else None,
                by_repeat=by_repeat,
                saturation=None if row["saturation"] is None else str(row["saturation"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("this is no row of a sweep") from error


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError("a measured value is a number from 0")
    return float(value)


def points_of(rows: Iterable[Mapping[str, Any]]) -> tuple[SweepPoint, ...]:
    """By rank, in the order of MEASURES, then by rate; ValueError as `SweepPoint.of_row`."""
    points = [SweepPoint.of_row(row) for row in rows]
    return tuple(sorted(points, key=lambda point: (point.rank, MEASURES.index(point.measure.name), point.measure.rate or 0.0)))


def measures_of(points: Iterable[SweepPoint]) -> list[Measure]:
    """What was measured, each once: step time, throughput, latency by rate."""
    found = dict.fromkeys(point.measure for point in points)
    return sorted(found, key=lambda measure: (MEASURES.index(measure.name), measure.rate or 0.0))


def by_method(points: Iterable[SweepPoint], measure: Measure) -> dict[str, list[SweepPoint]]:
    """method → its points of one measure, by rank."""
    found: dict[str, list[SweepPoint]] = {}
    for point in points:
        if point.measure == measure:
            found.setdefault(point.method, []).append(point)
    return {method: sorted(own, key=lambda point: point.rank) for method, own in found.items()}


# ----------------------------------------------------------------------------------------------------------- crossovers


@dataclass(frozen=True)
class Advantage:
    """How many times as good the first method is as another at a rank, above 1 better, with its interval where there is one."""

    rank: int
    times: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Crossover:
    """The rank from which on the first method is worse; 0 where it is so from the lowest on, infinite where not at the highest.

    low, high: the same where every advantage is at the low, and at the high end of its 95 % interval; None where one has no
    interval. From low on the first may be worse, from high on it is.
    """

    rank: float
    low: float | None = None
    high: float | None = None


def advantages(first: Sequence[SweepPoint], second: Sequence[SweepPoint]) -> list[Advantage]:
    """Of one method over another, at the ranks that both have; both of one measure, by rank."""
    others, found = {point.rank: point for point in second}, []
    for point in first:
        other = others.get(point.rank)
        if other is None or not point.value or not other.value:
            continue
        ratio = other.ratio if point.measure.name == STEP_TIME and point.ratio is None else _ratio_of_repeats(point, other)
        if ratio is not None:
            found.append(Advantage(point.rank, ratio.median, ratio.low, ratio.high))
        else:
            times = point.value / other.value
            found.append(Advantage(point.rank, times if point.measure.higher_is_better else 1 / times))
    return found


def _ratio_of_repeats(first: SweepPoint, second: SweepPoint) -> Ratio | None:
    """Repeat by repeat; None where there are too few for an interval."""
    pairs = [(one, other) for one, other in zip(first.by_repeat, second.by_repeat, strict=False) if one and other]
    if len(pairs) < FEWEST_REPEATS:
        return None
    own, others = ([pair[side] for pair in pairs] for side in (0, 1))
    return paired_ratio(own, others) if first.measure.higher_is_better else paired_ratio(others, own)


def crossover(found: Sequence[Advantage]) -> Crossover | None:
    """Where an advantage is lost; None without a rank. Where it is lost more often than once, the last time counts.

    Between two measured ranks it is where the logarithm of the advantage, drawn as a line over the logarithm of the rank, passes 0.
    """
    if not found:
        return None
    with_interval = all(one.low is not None and one.high is not None for one in found)
    return Crossover(
        crossing([(math.log(one.rank), math.log(one.times)) for one in found]),
        crossing([(math.log(one.rank), math.log(one.low)) for one in found]) if with_interval else None,
        crossing([(math.log(one.rank), math.log(one.high)) for one in found]) if with_interval else None,
    )


def crossing(advantages: Sequence[tuple[float, float]]) -> float | None:
    """The rank from which on an advantage is lost: (log rank, log of how much better) by rank; 0, infinite, None as `crossover`."""
    ratios = list(advantages)
    if not ratios:
        return None
    if ratios[-1][1] >= 0:
        return math.inf
    for (left, above), (right, below) in zip(ratios[-2::-1], ratios[:0:-1], strict=True):
        if above >= 0:
            return math.exp(left + (right - left) * above / (above - below))
    return 0.0
