"""Load runs on paper: their tables, what is said of them, their charts."""

from __future__ import annotations

import math

import numpy as np

from profiling import load_figures
from profiling.figures import METHOD_STYLES
from profiling.load_result import LoadResult, MethodLoad
from profiling.load_runs import LoadSettings
from profiling.report import Note, Report, Table, TitledChart

LATENCIES = {"TTFT": "ttft_s", "TPOT": "tpot_s", "ITL": "itl_s", "E2E": "e2e_s", "s/token": "s_per_token"}
MOST_ADAPTERS = 30  # lines of the table of adapters
LEFT_TO_JSON = frozenset({"timeline", "adapters", "by_repeat"})  # of a row, what has many values

NOTE = (
    "Times are a client's: from when a request was sent to when the engine handed its tokens over, waiting included. TTFT, TPOT, "
    "ITL, E2E and goodput are as vLLM's bench serve defines them; s/token is end-to-end seconds per new token, the mean over "
    "requests, the paper's latency. Every method was given the same requests at the same times, one method after the other."
)
ADAPTERS_NOTE = (
    "A hit found its adapter in a slot on the device, a miss had it copied there, a load had it read from disk first. "
    f"At most {MOST_ADAPTERS} a method are listed."
)


def report_of(result: LoadResult) -> Report:
    """All that is said and drawn of load runs."""
    tokens = load_figures.over_time(_timelines(result, "tokens_per_s"), "New tokens per second", "tokens/s", "higher is better")
    batch = load_figures.over_time(_timelines(result, "running"), "Requests running", "requests", "a full batch is busy")
    queue = load_figures.over_time(_timelines(result, "waiting"), "Requests waiting", "requests")
    parts = [
        Table(*rates_table(result)),
        Table(*latencies_table(result), num_names=3),
        Note(NOTE),
        TitledChart("Queue length", queue),
        TitledChart("Batch", batch),
        TitledChart("Tokens per second", tokens),
    ]
    for name in ("TTFT", "TPOT", "E2E"):
        chart = load_figures.spread(_milliseconds(result, LATENCIES[name]), name)
        parts.append(TitledChart(f"{name} of the requests", chart))
    parts.append(TitledChart("Popularity", load_figures.requests_by_adapter(_requests_by_adapter(result))))
    lost, adapters = outcomes_table(result), adapters_table(result)
    parts += [Table(*lost, title="What did not finish", detail=True)] if lost[1] else []
    parts += [Table(*adapters, title="Adapters", note=ADAPTERS_NOTE, detail=True)] if adapters[1] else []
    return Report(
        title="under load",
        sentences=[headline(result), *warnings(result)],
        conditions=conditions(result),
        parts=parts,
        environment=result.environment,
        command=result.command,
        rows=result.to_rows(),
        left_to_json=LEFT_TO_JSON,
    )


def rates_table(result: LoadResult) -> tuple[list[str], list[list[str]]]:
    """Heads and cells, a line per kind and method: what was served, how fast, and how long the queue was."""
    heads = ["kind", "method", "rank", "finished", "requests/s", "tokens/s", "s/token"]
    heads += ["goodput/s", "goodput"] if result.settings.limits else []
    heads += ["waiting", "waiting max", "running", "slot hits"]
    lines = []
    for kind, method, load, figures in _parts(result):
        line = [kind, METHOD_STYLES[method].label, _ranks(load, kind)]
        line += [f"{figures.outcomes.get('finished', 0)} / {figures.num_requests}", f"{figures.requests_per_s:.2f}"]
        line += [f"{figures.tokens_per_s:,.0f}", _number(figures.s_per_token.get("mean"), 4)]
        if figures.goodput is not None:
            line += [f"{figures.goodput.requests_per_s:.2f}", f"{100 * figures.goodput.share:.1f} %"]
        line += [_number(load.queue.get("mean"), 1), _number(load.queue.get("max"), 0), _number(load.running.get("mean"), 1)]
        line += ["–" if load.hit_rate is None else f"{100 * load.hit_rate:.1f} %"]
        lines.append(line)
    return heads, lines


def latencies_table(result: LoadResult) -> tuple[list[str], list[list[str]]]:
    """Heads and cells, a line per kind, method and latency, in milliseconds."""
    lines = []
    for kind, method, _, figures in _parts(result):
        for name, field in LATENCIES.items():
            summary = getattr(figures, field)
            lines.append(
                [kind, METHOD_STYLES[method].label, name, *(_ms(summary.get(one)) for one in ("mean", "p50", "p90", "p99"))]
            )
    return ["kind", "method", "ms", "mean", "p50", "p90", "p99"], lines


def outcomes_table(result: LoadResult) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: what did not finish, by method and name; no lines where all did."""
    lines = []
    for method, load in result.methods.items():
        for outcome, count in load.figures.outcomes.items():
            if outcome != "finished":
                errors = sorted(
                    {
                        record.error
                        for run in result.runs
                        if run.method == method
                        for record in run.records
                        if record.outcome == outcome
                    }
                    - {None}
                )
                lines.append([METHOD_STYLES[method].label, outcome, ", ".join(errors) or "–", str(count)])
    return ["method", "requests", "by", "number"], lines


def adapters_table(result: LoadResult) -> tuple[list[str], list[list[str]]]:
    """Heads and cells, a line per method and adapter, the most asked for first, at most MOST_ADAPTERS a method."""
    lines = []
    for method, load in result.methods.items():
        counted = [(kind, tag, counts) for kind, adapters in load.adapters.items() for tag, counts in adapters.items()]
        for kind, tag, counts in sorted(counted, key=lambda one: -one[2]["requests"])[:MOST_ADAPTERS]:
            numbers = [str(counts[name]) for name in ("requests", "hits", "misses", "evictions", "loads")]
            lines.append([METHOD_STYLES[method].label, kind, tag, *numbers, _ms(counts["load_s"])])
    return ["method", "kind", "adapter", "requests", "hits", "misses", "evictions", "loads", "load ms"], lines


def _parts(result: LoadResult):
    """(kind, method, what it did, its figures of that kind), all kinds together at the end where there are two."""
    kinds = list(result.settings.traffic.mix)
    for kind in kinds if len(kinds) == 1 else [*kinds, "all"]:
        for method, load in result.methods.items():
            yield kind, method, load, load.figures if kind == "all" else load.by_kind[kind]


# ------------------------------------------------------------------------------------------------------------ sentences


def arrivals(result: LoadResult) -> str:
    """How the requests came, in words."""
    settings, traffic = result.settings, result.settings.traffic
    if settings.concurrency is not None:
        ended = f", for {settings.duration_s:g} s" if settings.duration_s is not None else ""
        return f"{settings.concurrency} at a time (closed loop){ended}"
    if math.isinf(traffic.rate):
        return "all at once"
    pattern = "Poisson" if traffic.burstiness == 1 else f"burstiness {traffic.burstiness:g}"
    return f"{traffic.rate:g} requests/s ({pattern})"


def headline(result: LoadResult) -> str:
    """The finding in one sentence."""
    if not result.methods or not any(load.figures.s_per_token for load in result.methods.values()):
        return "Nothing to tell: no request finished."
    said = []
    for method, load in result.methods.items():
        figures, label = load.figures, METHOD_STYLES[method].label
        if not figures.s_per_token:
            said.append(f"{label} finished no request")
            continue
        words = f"{label} {figures.s_per_token['mean']:.4f} s/token and {figures.tokens_per_s:,.0f} tokens/s"
        ratios = result.ratios(method) if method != next(iter(result.methods)) else []
        if ratios:
            first = METHOD_STYLES[next(iter(result.methods))].label
            between = f" (between {min(ratios):.2f} and {max(ratios):.2f} over {len(ratios)} repeats)" if len(ratios) > 1 else ""
            words += f", {np.median(ratios):.2f} times {first}'s seconds{between}"
        said.append(words)
    return f"Requests {arrivals(result)}: {'; '.join(said)}."


def warnings(result: LoadResult) -> list[str]:
    """What a reader must know before believing the numbers, a sentence each."""
    said = []
    for method, load in result.methods.items():
        label = METHOD_STYLES[method].label
        if load.saturation:
            said.append(
                f"{label} was over-saturated: {load.saturation}. Its latencies say how long the run was, not how fast it is."
            )
        if (late_s := result.late_s(method)) is not None:
            said.append(
                f"The generator was late with {label}: one request in a hundred was sent {1000 * late_s:.0f} ms or more after its "
                "time, so the load was kinder than planned."
            )
        missing = {name: count for name, count in load.figures.outcomes.items() if name != "finished"}
        if missing:
            counts = ", ".join(f"{count} {name}" for name, count in missing.items())
            errors = ", ".join(f"{name} {count}" for name, count in load.figures.errors.items())
            said.append(f"{label} did not finish all: {counts}{f' ({errors})' if errors else ''}.")
        if load.interrupted:
            said.append(f"{label} was stopped by hand before its end.")
    return said


def conditions(result: LoadResult) -> str:
    """n, warm-up and the rest of what must stand beside the numbers, in one line."""
    settings = result.settings
    slots = ", ".join(
        f"{kind}: batch of {facts['max_batch_size']}, {facts['num_adapters']} adapters in {facts['adapter_slots']} slots"
        for kind, facts in result.engines.items()
    )
    num = sorted({len(run.records) for run in result.runs})
    requests = f"{num[0]}" if len(num) == 1 else f"{num[0]} to {num[-1]}" if num else "0"
    parts = [f"{requests} requests a run", *conditions_of(settings), slots]
    if settings.limits:
        limits = ", ".join(f"{name} {1000 * most:g} ms" for name, most in settings.limits.items())
        parts.append(f"goodput within {limits}")
    parts.append(f"peak memory {result.peak_memory_bytes / 1e6:.0f} MB ({result.peak_memory_of})")
    return ", ".join(parts)


def conditions_of(settings: LoadSettings) -> list[str]:
    """What every run had in common."""
    traffic = settings.traffic
    mix = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in traffic.mix.items())
    parts = ["1 repeat" if settings.repeats == 1 else f"{settings.repeats} repeats", f"{settings.warmup_requests} warm-up requests"]
    parts += [f"adapters {traffic.popularity}", mix, f"prompts {traffic.prompt_tokens}", f"new tokens {traffic.new_tokens}"]
    return [*parts, f"seed {traffic.seed}"]


def _ranks(load: MethodLoad, kind: str) -> str:
    kinds = load.ranks if kind == "all" else [kind]
    ranks = sorted({rank for one in kinds for rank in load.ranks[one]})
    return ", ".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]}–{ranks[-1]}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:,.2f}"


def _timelines(result: LoadResult, name: str) -> dict[str, tuple[list[float], list[float]]]:
    return {method: (load.timeline["time_s"], load.timeline[name]) for method, load in result.methods.items()}


def _milliseconds(result: LoadResult, field: str) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {method: [] for method in result.methods}
    for run in result.runs:
        for record in run.records:
            value = getattr(record, field) if record.outcome == "finished" else None
            values[run.method] += [] if value is None else [1000 * value]
    return values


def _requests_by_adapter(result: LoadResult) -> dict[str, int]:
    """Of the first run: every method is asked for the same."""
    counts: dict[str, int] = {}
    for record in result.runs[0].records if result.runs else ():
        if record.planned.adapter is not None:
            counts[record.planned.adapter] = counts.get(record.planned.adapter, 0) + 1
    return counts
