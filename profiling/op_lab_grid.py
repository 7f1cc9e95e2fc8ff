"""Many points of the Op lab: how far predictions are from what was measured, and how often the predicted winner won."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from profiling.cost_model import METHODS, MachineCosts
from profiling.op_lab import MethodPoint, OpLabResult, Setting, measure
from profiling.timing import median

GRID_MODELS = ("starcoderbase-1b", "whisper-large-v3", "llama-2-7b", "starcoderbase-3b", "llama-2-13b", "starcoder")
GRID_BATCHES = ((8, 1, 8), (1, 1, 1), (32, 1, 32), (8, 1, 2), (4, 16, 4))
"""Rows, tokens of each, adapters among them."""
GRID_RANKS = (1, 4, 16)
GAP = 0.15  # a smaller lead is no win: two runs may disagree about it
PAPERS = ("flora", "bmm-lora")
"""The paper's two contestants, whom its Eq. 7 speaks of."""

MEDIAN_ERROR_PROMISED, WINNERS_PROMISED = 0.25, 0.9


def grid(
    models: Sequence[str] = GRID_MODELS, dtype: str = "float32", ranks: Sequence[int] = GRID_RANKS, seed: int = 0
) -> list[Setting]:
    """The first adapted layer of each model, for every batch and rank; a setting of each model before the next of any."""
    return [
        Setting.of_model(model, None, dtype, seed, rows=rows, length=length, rank=rank, adapters=adapters)
        for (rows, length, adapters), rank, model in itertools.product(GRID_BATCHES, ranks, models)
    ]


def measure_grid(
    settings: Sequence[Setting],
    device: torch.device,
    costs: MachineCosts,
    methods: Sequence[str] = METHODS,
    command: str = "",
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[OpLabResult]:
    """Each point as it is done, until `should_stop` says so."""
    for setting in settings:
        result = measure(setting, device, costs, methods, command, should_stop=should_stop)
        if result is None:
            return
        yield result


@dataclass(frozen=True)
class Wins:
    """Of the points where one of some methods led by more than GAP: how many there were, and in how many it was predicted."""

    decided: int
    named: int

    @property
    def share(self) -> float | None:
        return self.named / self.decided if self.decided else None

    def __str__(self) -> str:
        return "no lead was that large" if self.share is None else f"{self.named} of {self.decided} ({100 * self.share:.0f} %)"


@dataclass(frozen=True)
class GridSummary:
    """What a grid says of the models. Errors are medians of |predicted − measured| / measured over methods and points.

    by_method: of the better model. eq7_error: of the paper's, over its two methods; paper_error: of the better one, over the same.
    paper_wins, all_wins, pair_wins: the better model between the paper's two methods, among all that serve adapters, and between
    every two of them; eq7_wins: Eq. 7.
    """

    points: int
    error: float
    by_method: dict[str, float]
    paper_error: float | None
    eq7_error: float | None
    paper_wins: Wins
    eq7_wins: Wins
    all_wins: Wins
    pair_wins: Wins

    @property
    def kept(self) -> bool:
        """Whether the better model is as good as is promised, however winners are counted."""
        shares = [wins.share for wins in (self.paper_wins, self.all_wins, self.pair_wins) if wins.share is not None]
        return self.error < MEDIAN_ERROR_PROMISED and all(share >= WINNERS_PROMISED for share in shares)


def summary(results: Sequence[OpLabResult]) -> GridSummary:
    """Of one point at least."""
    points = [point for result in results for point in result.methods.values()]
    papers = [point for point in points if point.eq7_s is not None and point.method in PAPERS]
    return GridSummary(
        points=len(results),
        error=median([point.prediction_error for point in points]),
        by_method={
            method: median([point.prediction_error for point in points if point.method == method])
            for method in dict.fromkeys(point.method for point in points)
        },
        paper_error=median([point.prediction_error for point in papers]),
        eq7_error=median([abs(point.eq7_s - point.seconds) / point.seconds for point in papers]),
        paper_wins=_wins([_only(result.methods, PAPERS) for result in results], _predicted_s),
        eq7_wins=_wins([_only(result.methods, PAPERS) for result in results], lambda point: point.eq7_s),
        all_wins=_wins([list(result.contestants.values()) for result in results], _predicted_s),
        pair_wins=_wins(
            [pair for result in results for pair in itertools.combinations(result.contestants.values(), 2)], _predicted_s
        ),
    )


def _only(methods: dict[str, MethodPoint], names: Sequence[str]) -> list[MethodPoint]:
    return [methods[name] for name in names if name in methods]


def _predicted_s(point: MethodPoint) -> float:
    return point.predicted.seconds


def _wins(contests: Sequence[Sequence[MethodPoint]], predicted_s: Callable[[MethodPoint], float]) -> Wins:
    decided = named = 0
    for contest in contests:
        by_time = sorted(contest, key=lambda point: point.seconds)
        if len(by_time) > 1 and by_time[1].seconds > (1 + GAP) * by_time[0].seconds:
            decided += 1
            named += min(contest, key=predicted_s) is by_time[0]
    return Wins(decided, named)
