"""Step time, throughput and latency by rank: the shape of the paper's Figures 2 and 3, for any model.

For each rank the engine gets as many random adapters of that rank, each in every family that the methods serve. A decode step is
measured on one full batch, the methods' steps in turn, as a comparison does: that is the honest measurement of where methods cross.
Throughput is measured with all requests there from the start, latency with requests that arrive at a rate; the methods take turns
at every rank and rate, so that a drift of the machine hits all alike. Random weights cost what trained ones cost.

What is measured are rows, each with all that it was measured on. A sweep that is given the rows of an earlier one keeps those that
were measured in the same way, and measures only what is missing.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flora.engine import Engine, Request
from flora.errors import RequestError
from profiling import hardware
from profiling.compare import compare
from profiling.events import Finished, HowFar, Progress
from profiling.load_result import LoadResult
from profiling.load_runs import LoadProgress, LoadSettings, MethodRun, run_load
from profiling.loading import add_random_adapters
from profiling.sweep_points import LATENCY, MEASURES, STEP_TIME, THROUGHPUT, Measure, SweepPoint, points_of
from profiling.traffic import Source

PAPER_RATES = (8.0, 15.0)  # requests a second, of its Figures 2 and 3
CAPACITY_SHARES = (0.5, 0.8)
NUM_STEPS = 32
WARMUP_STEPS = 4


@dataclass(frozen=True)
class SweepSettings:
    """What is to be measured. RequestError for what makes no sense.

    load: methods, repeats, warm-up and traffic of every run; its rate is replaced. ranks: sorted here. rates: requests a second;
    None: CAPACITY_SHARES of what every method served at the lowest rank. num_adapters: of each rank. measures: of MEASURES.
    num_steps: new tokens of a row, the prefill's among them, where steps are timed.
    """

    load: LoadSettings
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16)
    rates: tuple[float, ...] | None = PAPER_RATES
    num_adapters: int = 8
    measures: tuple[str, ...] = MEASURES
    num_steps: int = NUM_STEPS

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1:
            raise RequestError("a sweep needs ranks of at least 1")
        if len(set(self.ranks)) < len(self.ranks):
            raise RequestError("a rank is given twice: name each once")
        object.__setattr__(self, "ranks", tuple(sorted(self.ranks)))
        unknown = [name for name in self.measures if name not in MEASURES]
        if unknown or not self.measures:
            raise RequestError(f"a sweep measures {', '.join(MEASURES)}: name at least one of them, and nothing else")
        if LATENCY not in self.measures:
            object.__setattr__(self, "rates", ())
        if self.rates is None and THROUGHPUT not in self.measures:
            raise RequestError("rates of its own are shares of the throughput: measure that too, or name the rates")
        if self.num_steps < 2:
            raise RequestError(f"a row needs at least 2 new tokens for a decode step to be timed, not {self.num_steps}")
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
class SweepResult:
    """All that a sweep found.

    capacity: requests a second that every method served at the lowest rank; None where rates were not taken from it. rates: at
    which latency was measured. rows: a dict per rank, measure, rate and method; points: the same to be drawn.
    """

    settings: SweepSettings
    capacity: float | None
    rates: tuple[float, ...]
    rows: tuple[dict, ...]
    max_batch_size: int
    environment: dict
    command: str
    interrupted: bool

    @property
    def points(self) -> tuple[SweepPoint, ...]:
        return points_of(self.rows)


@dataclass(frozen=True)
class Measured:
    """One measure of all methods at one rank is done. rows: one for each method."""

    rows: tuple[dict, ...]


class Sweep:
    """One sweep of one engine, which has to have room for a rank's adapters and a queue for all of a run's requests.

    command: what makes it again. should_stop: as `run_load` takes it; what was measured by then is the result. add_adapters: what
    registers a rank's, by default `add_random_adapters`. rows: of an earlier sweep, kept where they were measured in the same way.
    """

    def __init__(
        self,
        engine: Engine,
        source: Source,
        settings: SweepSettings,
        command: str,
        should_stop: Callable[[], bool] = lambda: False,
        add_adapters: Callable[..., Sequence[str]] | None = None,
        rows: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.add_adapters = add_adapters or add_random_adapters
        self.engine, self.source, self.settings, self.command, self.should_stop = engine, source, settings, command, should_stop
        self.capacity: float | None = None
        self.rates = settings.rates
        self.interrupted = False
        self._environment = hardware.environment({settings.kind: engine})
        self.setting = self._conditions()
        self._rows: list[dict] = [dict(row) | {"command": command} for row in rows if row.get("setting") == self.setting]
        self._seconds: dict[str, list[float]] = {}  # measure → what it took at each rank

    def run(self) -> Iterator[HowFar | Measured]:
        """Measure what is missing, and yield how far it is and what has come, rank by rank."""
        for rank in self.settings.ranks:
            tags: Sequence[str] = ()
            try:
                for measure in self._measures():
                    if self.interrupted or self._has(rank, measure):
                        continue
                    if not tags:
                        tags = self.add_adapters(
                            self.engine, self.settings.num_adapters, rank, self.settings.load.methods, self._seed
                        )
                    began_s = time.monotonic()
                    rows = yield from self._measure(rank, measure, tags)
                    if rows:
                        self._seconds.setdefault(measure.name, []).append(time.monotonic() - began_s)
                        self._rows = [row for row in self._rows if not _is_of(row, rank, measure)] + rows
                        yield Measured(tuple(rows))
            finally:
                for tag in tags:
                    self.engine.remove_adapter(tag)

    @property
    def rows(self) -> tuple[dict, ...]:
        """Those of `result`, as they come."""
        return tuple(self._rows)

    @property
    def num_missing(self) -> int:
        """Measures of ranks that are still to come, as far as the rates are known."""
        return sum(not self._has(rank, measure) for rank in self.settings.ranks for measure in self._planned())

    def result(self) -> SweepResult:
        """What has been measured so far."""
        return SweepResult(
            settings=self.settings,
            capacity=self.capacity,
            rates=self.rates or (),
            rows=tuple(self._rows),
            max_batch_size=self.engine.max_batch_size,
            environment=self._environment,
            command=self.command,
            interrupted=self.interrupted,
        )

    # ------------------------------------------------------------------------------------------------ what is missing

    @property
    def _seed(self) -> int:
        return self.settings.load.traffic.seed

    def _conditions(self) -> dict[str, Any]:
        """What two rows must have in common to be points of one sweep."""
        load, facts = self.settings.load, self._environment
        traffic = load.traffic
        return {
            "first": load.methods[0],
            "model": facts["models"][self.settings.kind],
            "hardware": {name: facts.get(name) for name in ("device", "device_name", "threads", "torch")},
            "batch": self.engine.max_batch_size,
            "num_adapters": self.settings.num_adapters,
            "popularity": traffic.popularity,
            "prompt_lengths": str(traffic.prompt_tokens),
            "new_lengths": str(traffic.new_tokens),
            "num_steps": self.settings.num_steps,
            "num_requests": traffic.num_requests,
            "burstiness": "inf" if math.isinf(traffic.burstiness) else traffic.burstiness,
            "repeats": load.repeats,
            "seed": traffic.seed,
        }

    def _measures(self) -> Iterator[Measure]:
        """Of one rank. Rates that are shares of a capacity are known once the lowest rank's throughput is."""
        if STEP_TIME in self.settings.measures:
            yield Measure(STEP_TIME)
        if THROUGHPUT in self.settings.measures:
            yield Measure(THROUGHPUT, math.inf)
        if self.rates is None and not self.interrupted:
            self.rates = self._rates_of_capacity()
        yield from (Measure(LATENCY, rate) for rate in self.rates or ())

    def _planned(self) -> list[Measure]:
        rates = [0.0] * len(CAPACITY_SHARES) if self.rates is None else self.rates  # at rates that are not known yet
        latencies = [Measure(LATENCY, rate) for rate in rates] if LATENCY in self.settings.measures else []
        loads = [Measure(THROUGHPUT, math.inf)] if THROUGHPUT in self.settings.measures else []
        return [*([Measure(STEP_TIME)] if STEP_TIME in self.settings.measures else []), *loads, *latencies]

    def _has(self, rank: int, measure: Measure) -> bool:
        """Whether every method was measured: they are measured in turn, and one alone would be beside nothing."""
        return set(self.settings.load.methods) <= {row["method"] for row in self._rows if _is_of(row, rank, measure)}

    def _rates_of_capacity(self) -> tuple[float, ...]:
        """CAPACITY_SHARES of what the slowest method served at the lowest rank, to two digits, as one would ask for it again."""
        lowest = [row for row in self._rows if row["measures"] == THROUGHPUT and row["rank"] == self.settings.ranks[0]]
        self.capacity = min((row["requests_per_s"] for row in lowest), default=0.0)
        if not self.capacity:
            raise RequestError("no request finished at the lowest rank, so there is no capacity to take rates from: give --rate")
        return tuple(float(f"{share * self.capacity:.2g}") for share in CAPACITY_SHARES)

    # -------------------------------------------------------------------------------------------------------- measure

    def _measure(self, rank: int, measure: Measure, tags: Sequence[str]) -> Iterator[HowFar]:
        """All methods in turn; returns their rows, none where it was stopped before its end."""
        before = self._share()
        timing = self._steps(rank, tags) if measure.name == STEP_TIME else self._load(measure.rate, tags)
        while True:
            try:
                words, part = next(timing)
            except StopIteration as end:
                rows = end.value
                break
            yield HowFar(f"rank {rank}, {words}", before + part * self._share_of(measure))
        if self.interrupted:
            return []
        shared = {"measures": measure.name, "rank": rank, "setting": self.setting}
        return [shared | row for row in rows if row["kind"] == self.settings.kind]

    def _steps(self, rank: int, tags: Sequence[str]) -> Iterator[tuple[str, float]]:
        """Decode steps of one full batch; yields words and the part that is done, returns rows."""
        load, kind, num = self.settings.load, self.settings.kind, self.engine.max_batch_size
        traffic = replace(load.traffic, num_requests=num, rate=math.inf, all_adapters=True)
        planned = traffic.plan({kind: self.source}, {kind: tags})
        requests = [self._full_length(one.request()) for one in planned]
        options = {"warmup_steps": WARMUP_STEPS, "repeats": load.repeats, "seed": traffic.seed, "verify": False}
        result = None
        for event in compare({kind: self.engine}, requests, load.methods, should_stop=self._asks_to_stop, **options):
            if isinstance(event, Progress):
                yield f"step time: {event.stage} {event.done} of {event.total}", event.done / max(1, event.total)
            elif isinstance(event, Finished):
                result = event.result
        if result.failures:
            raise RequestError(next(iter(result.failures.values())))
        facts = {"rate": None, "prompt_lengths": str(traffic.prompt_tokens), "num_adapters": {kind: len(tags)}}
        return [row | facts | {"command": self.command} for row in result.to_rows()]

    def _full_length(self, request: Request) -> Request:
        return replace(request, max_new_tokens=self.settings.num_steps)

    def _load(self, rate: float, tags: Sequence[str]) -> Iterator[tuple[str, float]]:
        """Runs at a rate; yields words and the part that is done, returns rows."""
        load, kind = self.settings.load, self.settings.kind
        settings = replace(load, traffic=replace(load.traffic, rate=rate, all_adapters=True))
        runs: list[MethodRun] = []
        num_runs = len(load.methods) * load.repeats
        called = "throughput" if math.isinf(rate) else f"latency at {rate:g}/s"
        for event in run_load({kind: self.engine}, {kind: self.source}, {kind: tags}, settings, self._asks_to_stop):
            if isinstance(event, LoadProgress):
                doing = f"{event.done} of {event.total} requests" if event.sample else "warm-up"
                part = event.done / event.total if event.sample and event.total else 0.0
                yield f"{called}: {event.method}, {doing}", (len(runs) + part) / num_runs
            elif not event.interrupted:
                runs.append(event)
        return LoadResult.of(runs, settings, {kind: self.engine}, self.command).to_rows()

    def _asks_to_stop(self) -> bool:
        self.interrupted = self.interrupted or bool(self.should_stop())
        return self.interrupted

    # -------------------------------------------------------------------------------------------------------- how far

    def _expected_s(self, measure: Measure) -> float:
        """What it takes at a rank: as long as at the ranks before, or as all measures on average, or a second."""
        known = self._seconds.get(measure.name) or [one for own in self._seconds.values() for one in own] or [1.0]
        return sum(known) / len(known)

    def _expected(self) -> tuple[float, float]:
        """Seconds that were needed, and that are still to come."""
        missing = [measure for rank in self.settings.ranks for measure in self._planned() if not self._has(rank, measure)]
        return sum(one for own in self._seconds.values() for one in own), sum(map(self._expected_s, missing))

    def _share(self) -> float:
        done, to_come = self._expected()
        return done / (done + to_come) if done + to_come else 1.0

    def _share_of(self, measure: Measure) -> float:
        done, to_come = self._expected()
        return self._expected_s(measure) / (done + to_come) if done + to_come else 0.0


def _is_of(row: Mapping[str, Any], rank: int, measure: Measure) -> bool:
    return row["rank"] == rank and SweepPoint.of_row(row).measure == measure


def rows_from(path: str | os.PathLike) -> list[dict]:
    """The rows of a sweep in a file, none where there is no file yet; RequestError where it holds anything else."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        points_of(rows)
    except OSError as error:
        raise RequestError(f"cannot read {path.name!r}: {error.strerror}") from error
    except ValueError as error:
        raise RequestError(f"{path.name!r} holds no rows of a sweep: name a file that `sweep --resume` wrote") from error
    return rows
