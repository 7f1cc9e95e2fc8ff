"""What load runs found, method by method, and everything that is needed to make them again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from flora.ops import FAMILY
from flora.store import AdapterCounters
from profiling import hardware
from profiling.load import Sample
from profiling.load_metrics import LoadFigures, figures_of, summary
from profiling.load_runs import LoadSettings, MethodRun

if TYPE_CHECKING:
    import pandas

    from flora.engine import Engine

MAX_MOMENTS = 240  # of a row's timeline; longer ones keep equally spaced samples
LATE_SHARE = 0.1  # a generator is late when 1 % of its requests came later than this share of the mean interval …
LATE_S = 0.01  # … and than this


@dataclass(frozen=True)
class MethodLoad:
    """What one method did, all repeats together, over all kinds or (in `by_kind`) on one."""

    method: str
    figures: LoadFigures
    by_kind: dict[str, LoadFigures]
    by_repeat: tuple[dict[str, float | None], ...]  # tokens_per_s, requests_per_s, s_per_token of each
    queue: dict[str, float]  # requests waiting, over time: mean, p50, p90, p99, max
    running: dict[str, float]
    saturation: str | None  # why it counts as over-saturated
    interrupted: bool
    ranks: dict[str, tuple[int, ...]]  # by kind, of the adapters that were asked for
    adapters: dict[str, dict[str, dict]]  # kind → tag → requests, hits, misses, evictions, loads, …
    timeline: dict[str, list[float]]  # of the first repeat: time_s, waiting, running, arrivals_per_s, tokens_per_s

    @property
    def hit_rate(self) -> float | None:
        """Of the times a request was given its adapter's slot, the share in which the adapter was there already."""
        counted = [counts for adapters in self.adapters.values() for counts in adapters.values()]
        pins = sum(counts["hits"] + counts["misses"] for counts in counted)
        return sum(counts["hits"] for counts in counted) / pins if pins else None


@dataclass(frozen=True)
class LoadResult:
    """All that load runs found."""

    settings: LoadSettings
    runs: tuple[MethodRun, ...]
    methods: dict[str, MethodLoad]  # in the order given
    engines: dict[str, dict]  # kind → max_batch_size, adapter_slots, num_adapters
    environment: dict
    peak_memory_bytes: int
    peak_memory_of: str
    command: str

    @classmethod
    def of(cls, runs: Sequence[MethodRun], settings: LoadSettings, engines: Mapping[str, Engine], command: str) -> LoadResult:
        """Put the runs' figures together."""
        used = {kind: engines[kind] for kind in settings.traffic.mix}
        methods = {}
        for method in settings.methods:
            own = [run for run in runs if run.method == method]
            if own:
                methods[method] = _method_load(method, own, settings, used)
        peak_bytes, peak_of = hardware.peak_memory([engine.device for engine in used.values()])
        return cls(
            settings=settings,
            runs=tuple(runs),
            methods=methods,
            engines={kind: _engine_facts(engine) for kind, engine in used.items()},
            environment=hardware.environment(used),
            peak_memory_bytes=peak_bytes,
            peak_memory_of=peak_of,
            command=command,
        )

    @property
    def interrupted(self) -> bool:
        return any(load.interrupted for load in self.methods.values())

    def late_s(self, method: str) -> float | None:
        """By how much the generator fell behind its plan, where that matters: the 99th percentile. None where it kept up."""
        rate, lag_s = self.settings.traffic.rate, self.methods[method].figures.lag_s.get("p99", 0.0)
        if math.isinf(rate):
            return None  # all at once, or as they are answered: there is no plan to fall behind
        return lag_s if lag_s > max(LATE_S, LATE_SHARE / rate) else None

    def ratios(self, method: str) -> list[float]:
        """s/token of a method over the first method's, of each repeat in which both ran: above 1 the first is faster."""
        first = next(iter(self.methods.values())).by_repeat
        pairs = zip(self.methods[method].by_repeat, first, strict=False)
        return [one["s_per_token"] / other["s_per_token"] for one, other in pairs if one["s_per_token"] and other["s_per_token"]]

    def to_rows(self) -> list[dict]:
        """One record per method and kind ("code", "speech", "all"), each with everything it was measured on."""
        settings, traffic = self.settings, self.settings.traffic
        environment = {key: value for key, value in self.environment.items() if key != "models"}
        shared = {
            "popularity": traffic.popularity,
            "rate": None if settings.concurrency else "inf" if math.isinf(traffic.rate) else traffic.rate,
            "burstiness": "inf" if math.isinf(traffic.burstiness) else traffic.burstiness,
            "concurrency": settings.concurrency,
            "planned_requests": None if settings.duration_s else traffic.num_requests,
            "planned_duration_s": settings.duration_s,
            "prompt_lengths": str(traffic.prompt_tokens),
            "new_lengths": str(traffic.new_tokens),
            "mix": dict(traffic.mix),
            "seed": traffic.seed,
            "repeats": settings.repeats,
            "warmup_requests": settings.warmup_requests,
            "peak_memory_bytes": self.peak_memory_bytes,
            "peak_memory_of": self.peak_memory_of,
            "hardware": environment,
            "command": self.command,
        }
        rows = []
        for method, load in self.methods.items():
            for kind, figures in {**load.by_kind, "all": load.figures}.items():
                kinds = list(load.by_kind) if kind == "all" else [kind]
                models = {one: self.environment["models"][one] for one in kinds}
                rows.append(
                    {
                        "method": method,
                        "kind": kind,
                        "ranks": sorted({rank for one in kinds for rank in load.ranks[one]}),
                        "batch": {one: self.engines[one]["max_batch_size"] for one in kinds},
                        "adapter_slots": {one: self.engines[one]["adapter_slots"] for one in kinds},
                        "num_adapters": {one: self.engines[one]["num_adapters"] for one in kinds},
                        "dtype": " + ".join(dict.fromkeys(model["dtype"] for model in models.values())),
                        "models": models,
                        **asdict(figures),
                        "queue": load.queue,
                        "running": load.running,
                        "saturation": load.saturation,
                        "interrupted": load.interrupted,
                        "by_repeat": list(load.by_repeat),
                        "adapters": {one: load.adapters[one] for one in kinds},
                        "timeline": load.timeline,
                        **shared,
                    }
                )
        return rows

    def requests_frame(self) -> pandas.DataFrame:
        """A line per request and run: when it was due, sent and answered, and what became of it."""
        import pandas

        rows = [{"method": run.method, "repeat": run.repeat} | record.as_row() for run in self.runs for record in run.records]
        return pandas.DataFrame(rows)


def _method_load(method: str, runs: Sequence[MethodRun], settings: LoadSettings, engines: Mapping[str, Engine]) -> MethodLoad:
    records = [record for run in runs for record in run.records]
    duration_s = sum(run.duration_s for run in runs)
    samples = [sample for run in runs for sample in run.samples]
    by_kind = {
        kind: figures_of((record for record in records if record.planned.kind == kind), duration_s, settings.limits)
        for kind in engines
    }
    by_repeat = []
    for run in runs:
        figures = figures_of(run.records, run.duration_s)
        by_repeat.append(
            {
                "tokens_per_s": figures.tokens_per_s,
                "requests_per_s": figures.requests_per_s,
                "s_per_token": figures.s_per_token.get("mean"),
            }
        )
    asked = {kind: Counter(record.planned.adapter for record in records if record.planned.kind == kind) for kind in engines}
    return MethodLoad(
        method=method,
        figures=figures_of(records, duration_s, settings.limits),
        by_kind=by_kind,
        by_repeat=tuple(by_repeat),
        queue=_over_time([sample.num_waiting for sample in samples]),
        running=_over_time([sample.num_running for sample in samples]),
        saturation=next((run.saturation.reason for run in runs if run.saturation), None),
        interrupted=any(run.interrupted for run in runs),
        ranks={kind: _ranks(engine, asked[kind], method) for kind, engine in engines.items()},
        adapters={kind: _adapters(asked[kind], [run.adapters[kind] for run in runs]) for kind in engines},
        timeline=_timeline(runs[0].samples),
    )


def _over_time(values: Sequence[int]) -> dict[str, float]:
    return summary(values) | {"max": float(max(values))} if values else {}


def _ranks(engine: Engine, tags: Iterable[str | None], method: str) -> tuple[int, ...]:
    """The ranks of the adapters that served these requests; none without an adapter."""
    ranks = set()
    for tag in tags:
        if tag is not None and tag in engine.adapters and method != "base":
            own = engine.adapters[tag].ranks
            family = FAMILY[method] or ("flora" if "flora" in own else "lora")  # merged: the fLoRA adapter where there is one
            ranks.add(own[family])
    return tuple(sorted(ranks))


def _adapters(asked: Counter, counted: Sequence[Mapping]) -> dict[str, dict]:
    """tag → what was asked of it and what the bank counted, the most asked for first; counted: of each repeat."""
    tags = [tag for tag, _ in asked.most_common() if tag is not None]
    tags += [tag for counters in counted for tag in counters if tag not in asked]  # used by others meanwhile
    merged: dict[str, dict] = {}
    for tag in dict.fromkeys(tags):
        merged[tag] = {"requests": asked[tag], **asdict(AdapterCounters())}
        for counters in counted:
            for name, value in asdict(counters[tag]).items() if tag in counters else ():
                merged[tag][name] += value
    return merged


def _timeline(samples: Sequence[Sample]) -> dict[str, list[float]]:
    places = np.unique(np.linspace(0, len(samples) - 1, min(MAX_MOMENTS, len(samples))).round().astype(int)) if samples else ()
    kept = [samples[place] for place in places]
    return {
        "time_s": [round(sample.time_s, 3) for sample in kept],
        "waiting": [sample.num_waiting for sample in kept],
        "running": [sample.num_running for sample in kept],
        "arrivals_per_s": [round(sample.arrivals_per_s, 3) for sample in kept],
        "tokens_per_s": [round(sample.tokens_per_s, 3) for sample in kept],
    }


def _engine_facts(engine: Engine) -> dict:
    return {
        "max_batch_size": engine.max_batch_size,
        "adapter_slots": engine.snapshot().adapter_slots,
        "num_adapters": len(engine.adapters),
    }
