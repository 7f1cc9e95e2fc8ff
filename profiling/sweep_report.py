"""A sweep on paper: its table, what it says, the charts of where methods cross and of each measure by rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from profiling.figures import METHOD_STYLES
from profiling.load_report import LEFT_TO_JSON, conditions_of
from profiling.report import Note, Report, Table, TitledChart
from profiling.sweep import SweepResult
from profiling.sweep_figures import by_rank, crossing_chart
from profiling.sweep_points import (
    LATENCY,
    STEP_TIME,
    Crossover,
    Measure,
    SweepPoint,
    advantages,
    by_method,
    crossover,
    measures_of,
)

NOTE = (
    "Step time: the median decode step of one full batch, the methods' steps in turn, the device synchronised on both sides; a "
    "crossover's interval is where the 95 % bootstrap intervals of the paired ratios cross 1. Throughput: all requests are there "
    "from the start. Latency: requests arrive at a rate, and s/token is end-to-end seconds per new token, waiting included, the "
    "mean over requests, as in the paper's Figures 2 and 3. The methods took turns at every rank and rate."
)


def report_of(result: SweepResult, more: Iterable[Table | Note] = ()) -> Report:
    """All that is said and drawn of a sweep. more: what follows the charts."""
    points, ranks, first = result.points, result.settings.ranks, result.settings.load.methods[0]
    measures = measures_of(points)
    charts = []
    if measures and len(result.settings.load.methods) > 1:
        charts.append(TitledChart("Where methods cross", crossing_chart(points, measures[0], ranks, first)))
    charts += [TitledChart(f"{measure} by rank", by_rank(points, measure, ranks)) for measure in measures]
    saturated = any(point.saturation for point in points)
    note = "* over-saturated: the number grows with the length of the run." if saturated else ""
    return Report(
        title="a sweep over ranks",
        sentences=verdicts(points, first) or ["Nothing was measured."],
        conditions=conditions(result),
        parts=[*charts, Table(*table(points), note=note), Note(NOTE), *more],
        environment=result.environment,
        command=result.command,
        rows=result.rows,
        left_to_json=LEFT_TO_JSON | {"setting"},
    )


def verdicts(points: Sequence[SweepPoint], first: str) -> list[str]:
    """Where the first method stops being better than each other one, a sentence for each and each measure."""
    said = []
    for measure in measures_of(points):
        own = by_method(points, measure)
        for method in own:
            if method not in (first, "base") and first in own:
                said.append(_verdict(measure, first, method, own))
    return said


def _verdict(measure: Measure, first: str, other: str, own: Mapping[str, Sequence[SweepPoint]]) -> str:
    label, than = METHOD_STYLES[first].label, METHOD_STYLES[other].label
    better = {STEP_TIME: "shorter", LATENCY: "lower"}.get(measure.name, "higher")
    found = advantages(own[first], own[other])
    crossed = crossover(found)
    if crossed is None:
        return f"{measure}: nothing to compare."
    lowest, highest = found[0].rank, found[-1].rank
    shown = f"{measure}: {label}'s is"
    if _within_noise(crossed):
        return f"{shown} not told from {than}'s beyond noise at any rank up to {highest}."
    if math.isinf(crossed.rank):
        doubt = "" if crossed.low is None or math.isinf(crossed.low) else f", beyond noise up to {crossed.low:.2g}"
        return f"{shown} {better} than {than}'s up to the highest rank measured, {highest}{doubt}."
    if crossed.rank == 0.0:
        doubt = f", beyond noise from {crossed.high:.2g} on" if crossed.high else ""
        return f"{shown} not {better} than {than}'s at any rank measured{doubt}."
    return f"{shown} {better} than {than}'s up to a rank of about {crossed.rank:.2g}{_interval(crossed, lowest, highest)}."


def _within_noise(crossed: Crossover) -> bool:
    """Whether the intervals hold both, that the first method never wins and that it never loses."""
    return crossed.low == 0.0 and crossed.high is not None and math.isinf(crossed.high)


def _interval(crossed: Crossover, lowest: int, highest: int) -> str:
    """Such as " [4.9, 6.8]", where there is one that says more than the sentence."""
    if crossed.low is None or crossed.high is None or crossed.low == crossed.high:
        return ""
    low = f"below {lowest}" if crossed.low == 0.0 else f"above {highest}" if math.isinf(crossed.low) else f"{crossed.low:.2g}"
    high = f"above {highest}" if math.isinf(crossed.high) else f"below {lowest}" if crossed.high == 0.0 else f"{crossed.high:.2g}"
    return f" [{low}, {high}]"


def headline(points: Sequence[SweepPoint], first: str) -> str:
    """Where the first method stops winning, in one sentence: by the step time, else by what was measured instead.

    What the intervals leave open is said as open.
    """
    label, measures = METHOD_STYLES[first].label, measures_of(points)
    own = by_method(points, measures[0]) if measures else {}
    others = [method for method in own if method not in (first, "base")]
    said = []
    for method in others if first in own else ():
        found = advantages(own[first], own[method])
        crossed = crossover(found)
        if crossed is not None:
            said.append(_clause(crossed, METHOD_STYLES[method].label, found[0].rank, found[-1].rank))
    if not said:
        return ""
    what = {STEP_TIME: "In decode steps", LATENCY: f"In latency at {measures[0].rate or 0:g} requests/s"}
    return f"{what.get(measures[0].name, 'In throughput')}, {label} {_listed(said)}."


def _clause(crossed: Crossover, other: str, lowest: int, highest: int) -> str:
    """What becomes of the first method beside another one, as the rank grows."""
    if _within_noise(crossed):
        return f"is within noise of {other} up to rank {highest}"
    if math.isinf(crossed.rank):
        if crossed.low is None or math.isinf(crossed.low):
            return f"loses to {other} at no rank up to {highest}"
        return f"is ahead of {other} beyond noise up to a rank of {crossed.low:.2g}, and does not lose to it up to {highest}"
    if crossed.rank == 0.0:
        doubt = f" (beyond noise from {crossed.high:.2g} on)" if crossed.high else ""
        return f"loses to {other} from the lowest rank on, {lowest}{doubt}"
    return f"loses to {other} from a rank of about {crossed.rank:.2g} on{_interval(crossed, lowest, highest)}"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def table(points: Sequence[SweepPoint]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells, a line per rank and method."""
    measures = measures_of(points)
    heads = ["rank", "method"]
    for measure in measures:
        heads += ["step ms", "step / the first's"] if measure.name == STEP_TIME else []
        heads += [] if measure.name == STEP_TIME else [f"s/token at {measure.rate:g}/s" if measure.name == LATENCY else "tokens/s"]
    at = {(point.rank, point.method, point.measure): point for point in points}
    lines = []
    for rank, method in dict.fromkeys((point.rank, point.method) for point in points):
        line = [str(rank), METHOD_STYLES[method].label]
        for measure in measures:
            point = at.get((rank, method, measure))
            line.append(_cell(point, {STEP_TIME: 2, LATENCY: 4}.get(measure.name, 0)))
            if measure.name == STEP_TIME:
                line.append("–" if point is None else "1" if point.ratio is None else str(point.ratio))
        lines.append(line)
    return heads, lines


def _cell(point: SweepPoint | None, digits: int) -> str:
    if point is None or point.value is None:
        return "–"
    return f"{point.value:,.{digits}f}{' *' if point.saturation else ''}"


def conditions(result: SweepResult) -> str:
    """n, warm-up and the rest of what must stand beside the numbers, in one line."""
    settings = result.settings
    load = settings.load
    parts = [f"batch of {result.max_batch_size}", f"{settings.num_adapters} random adapters of each rank"]
    parts += [f"{settings.num_steps} new tokens a row where steps are timed"] if STEP_TIME in settings.measures else []
    runs = set(settings.measures) != {STEP_TIME}
    parts += [f"{load.traffic.num_requests} requests a run"] if runs else []
    parts += conditions_of(load)
    if result.capacity:
        shares = " and ".join(f"{rate:g}/s" for rate in result.rates)
        parts.append(f"rates {shares}, shares of the {result.capacity:.3g} requests/s that every method served at the lowest rank")
    return ", ".join(parts + ["stopped by hand before the end"] * result.interrupted)
