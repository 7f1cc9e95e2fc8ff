"""Throughput and latency by rank: the shape of the paper's Figures 2 and 3, for any model.

For each rank the engine gets as many random adapters of that rank, each in every family that the methods serve. Throughput is
measured with all requests there from the start, latency with requests that arrive at a rate; the methods take turns at every rank
and rate, so that a drift of the machine hits all alike. Random weights cost what trained ones cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from flora.engine import Engine
from flora.errors import RequestError
from profiling import hardware
from profiling.load_metrics import LoadFigures
from profiling.load_result import LoadResult
from profiling.load_runs import LoadProgress, LoadSettings, MethodRun, run_load
from profiling.loading import add_random_adapters
from profiling.traffic import Source

PAPER_RATES = (8.0, 15.0)  # requests a second, of its Figures 2 and 3
CAPACITY_SHARES = (0.5, 0.8)
THROUGHPUT = math.inf  # the rate at which throughput is measured


@dataclass(frozen=True)
class SweepSettings:
    """What is to be measured. RequestError for what makes no sense.

    load: methods, repeats, warm-up and traffic of every run; its rate is replaced. ranks: sorted here. rates: requests a second;
    None: CAPACITY_SHARES of what every method served at the lowest rank. num_adapters: of each rank.
    """

    load: LoadSettings
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16)
    rates: tuple[float, ...] | None = PAPER_RATES
    num_adapters: int = 8

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1:
            raise RequestError("a sweep needs ranks of at least 1")
        if len(set(self.ranks)) < len(self.ranks):
            raise RequestError("a rank is given twice: name each once")
        object.__setattr__(self, "ranks", tuple(sorted(self.ranks)))
        for rate in self.rates or ():
            if not 0 < rate < math.inf:
                raise RequestError(f"latency is measured at a finite rate above 0, not {rate:g}")
        if self.rates is not None and len(set(self.rates)) < len(self.rates):
            raise RequestError("a rate is given twice: name each once")
        if self.num_adapters < 1:
            raise RequestError(f"there must be at least 1 adapter of each rank, not {self.num_adapters}")
        if self.load.concurrency is not None:
            raise RequestError("a sweep's requests arrive at a rate or all at once: give no concurrency")
        if len(self.load.traffic.mix) > 1:
            raise RequestError("a sweep measures one model: choose one kind")

    @property
    def kind(self) -> str:
        return next(iter(self.load.traffic.mix))


@dataclass(frozen=True)
class SweepPoint:
    """One method at one rank, at one rate, infinite for throughput. Ranges are over repeats."""

    rank: int
    rate: float
    method: str
    figures: LoadFigures
    by_repeat: tuple[dict[str, float | None], ...]  # tokens_per_s, requests_per_s, s_per_token
    saturation: str | None

    @property
    def value(self) -> float | None:
        """tokens/s of a throughput, s/token of a latency; None where no request finished."""
        return self.figures.tokens_per_s or None if math.isinf(self.rate) else self.figures.s_per_token.get("mean")

    @property
    def range(self) -> tuple[float, float] | None:
        """The least and the most over repeats; None where there was one."""
        name = "tokens_per_s" if math.isinf(self.rate) else "s_per_token"
        values = [repeat[name] for repeat in self.by_repeat if repeat[name]]
        return (min(values), max(values)) if len(values) > 1 else None


@dataclass(frozen=True)
class SweepResult:
    """All that a sweep found.

    capacity: requests a second that every method served at the lowest rank; None where that was not measured. rates: at which
    latency was measured. rows: as `LoadResult.to_rows`, with the rank.
    """

    settings: SweepSettings
    capacity: float | None
    rates: tuple[float, ...]
    points: tuple[SweepPoint, ...]
    rows: tuple[dict, ...]
    max_batch_size: int
    environment: dict
    command: str
    interrupted: bool

    def at(self, rate: float) -> dict[str, list[SweepPoint]]:
        """method → its points at a rate, by rank."""
        return {
            method: [point for point in self.points if point.rate == rate and point.method == method]
            for method in self.settings.load.methods
        }


@dataclass(frozen=True)
class SweepProgress:
    """How far a sweep is. run: of num_runs, from 0."""

    rank: int
    rate: float
    run: int
    num_runs: int
    load: LoadProgress


class Sweep:
    """One sweep of one engine, which has to have room for a rank's adapters and a queue for all of a run's requests.

    command: what makes it again. should_stop: as `run_load` takes it; what was measured by then is the result. add_adapters: what
    registers a rank's, by default `add_random_adapters`.
    """

    def __init__(
        self,
        engine: Engine,
        source: Source,
        settings: SweepSettings,
        command: str,
        should_stop: Callable[[], bool] = lambda: False,
        add_adapters: Callable[..., Sequence[str]] | None = None,
    ) -> None:
        self.add_adapters = add_adapters or add_random_adapters
        self.engine, self.source, self.settings, self.command, self.should_stop = engine, source, settings, command, should_stop
        self.capacity: float | None = None
        self.rates = settings.rates
        self.interrupted = False
        self._points: list[SweepPoint] = []
        self._rows: list[dict] = []
        self._num_runs_done = 0

    @property
    def num_runs(self) -> int:
        """Of all methods, at all ranks and rates, all repeats."""
        num_rates = 1 + len(CAPACITY_SHARES if self.settings.rates is None else self.settings.rates)
        return len(self.settings.ranks) * num_rates * len(self.settings.load.methods) * self.settings.load.repeats

    def run(self) -> Iterator[SweepProgress]:
        """Measure everything and yield how far it is."""
        for rank in self.settings.ranks:
            tags = self.add_adapters(
                self.engine, self.settings.num_adapters, rank, self.settings.load.methods, self.settings.load.traffic.seed
            )
            try:
                yield from self._measure(rank, THROUGHPUT, tags)
                if self.rates is None and not self.interrupted:
                    self.rates = self._rates_of_capacity()
                for rate in self.rates or ():
                    yield from self._measure(rank, rate, tags)
            finally:
                for tag in tags:
                    self.engine.remove_adapter(tag)

    @property
    def rows(self) -> tuple[dict, ...]:
        """Those of `result`, as they come."""
        return tuple(self._rows)

    def result(self) -> SweepResult:
        """What has been measured so far."""
        return SweepResult(
            settings=self.settings,
            capacity=self.capacity,
            rates=self.rates or (),
            points=tuple(self._points),
            rows=tuple(self._rows),
            max_batch_size=self.engine.max_batch_size,
            environment=hardware.environment({self.settings.kind: self.engine}),
            command=self.command,
            interrupted=self.interrupted,
        )

    def _rates_of_capacity(self) -> tuple[float, ...]:
        """CAPACITY_SHARES of what the slowest method served at the lowest rank, to two digits, as one would ask for it again."""
        self.capacity = min(point.figures.requests_per_s for point in self._points)
        if not self.capacity:
            raise RequestError("no request finished at the lowest rank, so there is no capacity to take rates from: give --rate")
        return tuple(float(f"{share * self.capacity:.2g}") for share in CAPACITY_SHARES)

    def _measure(self, rank: int, rate: float, tags: Sequence[str]) -> Iterator[SweepProgress]:
        """All methods in turn at one rank and rate."""
        if self.interrupted:
            return
        load, kind = self.settings.load, self.settings.kind
        settings = replace(load, traffic=replace(load.traffic, rate=rate, all_adapters=True))
        runs: list[MethodRun] = []
        for event in run_load({kind: self.engine}, {kind: self.source}, {kind: tags}, settings, self._asks_to_stop):
            if isinstance(event, LoadProgress):
                yield SweepProgress(rank, rate, self._num_runs_done + len(runs), self.num_runs, event)
            elif not event.interrupted:
                runs.append(event)
        self._num_runs_done += len(load.methods) * load.repeats
        found = LoadResult.of(runs, settings, {kind: self.engine}, self.command)
        for method, one in found.methods.items():
            self._points.append(SweepPoint(rank, rate, method, one.figures, one.by_repeat, one.saturation))
        measures = "throughput" if math.isinf(rate) else "latency"
        self._rows += [{"measures": measures, "rank": rank} | row for row in found.to_rows() if row["kind"] == kind]

    def _asks_to_stop(self) -> bool:
        self.interrupted = self.interrupted or bool(self.should_stop())
        return self.interrupted


def crossover(first: Sequence[SweepPoint], second: Sequence[SweepPoint]) -> float | None:
    """The rank from which on the first method is worse than the second; both by rank, at the same rate.

    Between two measured ranks it is where the logarithm of the methods' ratio, drawn as a line over the logarithm of the rank,
    passes zero. 0 where the first is worse from the lowest rank on, infinite where it is not at the highest; None without a rank
    that both have. Where the lines cross more often, the last time counts.
    """
    others = {point.rank: point for point in second}
    ratios: list[tuple[float, float]] = []  # (log rank, log of how much better the first is)
    for point in first:
        other = others.get(point.rank)
        if point.value and other is not None and other.value:
            advantage = math.log(point.value / other.value)
            ratios.append((math.log(point.rank), advantage if math.isinf(point.rate) else -advantage))
    return crossing(ratios)


def crossing(advantages: Sequence[tuple[float, float]]) -> float | None:
    """The rank from which on an advantage is lost: (log rank, log of how much better) by rank; as `crossover`."""
    ratios = list(advantages)
    if not ratios:
        return None
    if ratios[-1][1] >= 0:
        return math.inf
    for (left, above), (right, below) in zip(ratios[-2::-1], ratios[:0:-1], strict=True):
        if above >= 0:
            return math.exp(left + (right - left) * above / (above - below))
    return 0.0
