"""A sweep on paper: its table, what it says, the charts of throughput and latency by rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from profiling.figures import METHOD_STYLES, Chart, axis_ceiling, chart_layout
from profiling.load_report import LEFT_TO_JSON, conditions_of
from profiling.report import Note, Report, Table, TitledChart
from profiling.sweep import THROUGHPUT, SweepPoint, SweepResult, crossover

NOTE = (
    "Throughput: all requests are there from the start. Latency: requests arrive at a rate, and s/token is end-to-end seconds per "
    "new token, waiting included, the mean over requests, as in the paper's Figures 2 and 3. The methods took turns at every rank "
    "and rate."
)


def report_of(result: SweepResult) -> Report:
    """All that is said and drawn of a sweep."""
    throughput = by_rank(result.at(THROUGHPUT), "Throughput by rank", "tokens/s", "higher is better")
    charts = [TitledChart("Throughput by rank", throughput)]
    for rate in result.rates:
        title = f"Latency by rank, {rate:g} requests a second"
        charts.append(TitledChart(title, by_rank(result.at(rate), title, "s/token", "lower is better")))
    saturated = any(point.saturation for point in result.points)
    note = "* over-saturated: the number grows with the length of the run." if saturated else ""
    return Report(
        title="throughput and latency by rank",
        sentences=verdicts(result),
        conditions=conditions(result),
        parts=[*charts, Table(*table(result), note=note), Note(NOTE)],
        environment=result.environment,
        command=result.command,
        rows=result.rows,
        left_to_json=LEFT_TO_JSON,
    )


def by_rank(points: Mapping[str, Sequence[SweepPoint]], title: str, unit: str, direction: str) -> Chart:
    """A line per method over the ranks; hollow marks are over-saturated runs, bars the range over repeats."""
    traces, found, values, ranks = [], [], [], sorted({point.rank for own in points.values() for point in own})
    for method, own in points.items():
        style, measured = METHOD_STYLES[method], [point for point in own if point.value]
        trace = {
            "type": "scatter",
            "mode": "lines+markers",
            "name": style.label,
            "x": [point.rank for point in measured],
            "y": [float(f"{point.value:.5g}") for point in measured],
            "line": {"color": style.colour, "dash": style.dash, "width": 2},
            "marker": {
                "color": style.colour,
                "size": 9,
                "symbol": [style.symbol + "-open" * bool(point.saturation) for point in measured],
                "line": {"width": 1.5},
            },
            "text": [" (over-saturated)" if point.saturation else "" for point in measured],
            "hovertemplate": f"rank %{{x}}: %{{y:.4g}} {unit}%{{text}}<extra>{style.label}</extra>",
        }
        if any(point.range for point in measured):
            ranges = [point.range or (point.value, point.value) for point in measured]
            trace["error_y"] = {
                "type": "data",
                "symmetric": False,
                "array": [max(0.0, most - point.value) for (_, most), point in zip(ranges, measured, strict=True)],
                "arrayminus": [max(0.0, point.value - least) for (least, _), point in zip(ranges, measured, strict=True)],
                "color": style.colour,
                "thickness": 1.2,
                "width": 3,
            }
        traces.append(trace)
        values += [max(point.range or (point.value,)) for point in measured]
        if measured:
            ends = [measured[0], measured[-1]] if len(measured) > 1 else measured
            found.append(f"{style.label} {' to '.join(f'{point.value:.4g} at rank {point.rank}' for point in ends)}")
    ends = (math.log10(min(ranks, default=1)) - 0.05, math.log10(max(ranks, default=1)) + 0.05)
    layout = chart_layout(title, "rank", unit, ends, (0, axis_ceiling(max(values, default=0.0))))
    layout["xaxis"] |= {"type": "log", "tickmode": "array", "tickvals": ranks, "ticktext": [str(rank) for rank in ranks]}
    layout["height"] = 360
    if not found:
        return Chart({"data": traces, "layout": layout}, f"{title}: nothing measured yet.")
    saturated = any(point.saturation for own in points.values() for point in own)
    hollow = "; hollow marks are over-saturated, and grow with the length of the run" if saturated else ""
    return Chart({"data": traces, "layout": layout}, f"{title}, in {unit}: {'; '.join(found)}; {direction}{hollow}.")


def verdicts(result: SweepResult) -> list[str]:
    """Where the first method stops being better than each other one, a sentence for each and each rate."""
    said = []
    for rate in (THROUGHPUT, *result.rates):
        points = result.at(rate)
        methods = [method for method, own in points.items() if own]
        for other in methods[1:]:
            said.append(
                _verdict(points[methods[0]], points[other], rate, METHOD_STYLES[methods[0]].label, METHOD_STYLES[other].label)
            )
    return said


def _verdict(first: Sequence[SweepPoint], second: Sequence[SweepPoint], rate: float, label: str, other: str) -> str:
    measure = "Throughput" if math.isinf(rate) else f"Latency at {rate:g} requests/s"
    better = "higher" if math.isinf(rate) else "lower"
    rank = crossover(first, second)
    if rank is None:
        return f"{measure}: nothing to compare."
    if math.isinf(rank):
        highest = max(point.rank for point in first)
        return f"{measure}: {label}'s is {better} than {other}'s up to the highest rank measured, {highest}."
    if rank == 0.0:
        return f"{measure}: {label}'s is not {better} than {other}'s at any rank measured."
    return f"{measure}: {label}'s is {better} than {other}'s up to a rank of about {rank:.2g}."


def table(result: SweepResult) -> tuple[list[str], list[list[str]]]:
    """Heads and cells, a line per rank and method."""
    heads = ["rank", "method", "tokens/s", *(f"s/token at {rate:g}/s" for rate in result.rates)]
    lines = []
    for rank in result.settings.ranks:
        for method in result.settings.load.methods:
            own = {point.rate: point for point in result.points if point.rank == rank and point.method == method}
            cells = [_cell(own.get(rate), 0 if math.isinf(rate) else 4) for rate in (THROUGHPUT, *result.rates)]
            if own:
                lines.append([str(rank), METHOD_STYLES[method].label, *cells])
    return heads, lines


def _cell(point: SweepPoint | None, digits: int) -> str:
    if point is None or point.value is None:
        return "–"
    return f"{point.value:,.{digits}f}{' *' if point.saturation else ''}"


def conditions(result: SweepResult) -> str:
    """n, warm-up and the rest of what must stand beside the numbers, in one line."""
    load = result.settings.load
    parts = [f"{load.traffic.num_requests} requests a run", *conditions_of(load)]
    parts += [f"batch of {result.max_batch_size}", f"{result.settings.num_adapters} random adapters of each rank"]
    if result.capacity:
        shares = " and ".join(f"{rate:g}/s" for rate in result.rates)
        parts.append(f"rates {shares}, shares of the {result.capacity:.3g} requests/s that every method served at the lowest rank")
    return ", ".join(parts + ["stopped by hand before the end"] * result.interrupted)
