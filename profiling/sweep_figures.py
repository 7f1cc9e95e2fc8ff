"""Charts of a sweep: where methods cross, and each measure by rank. Pure functions, as in `profiling.figures`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from profiling.figures import METHOD_STYLES, Chart, axis_ceiling, chart_layout
from profiling.sweep_points import Measure, SweepPoint, advantages, by_method, crossover

LOSING = "rgba(168, 33, 28, 0.09)"  # the region where the first method is the slower one
EVEN = "rgba(128, 128, 128, 0.9)"  # the line on which it is neither
FAINT, ALONE = 0.4, 0.85  # opacity of what was measured before, beside a sweep at hand and without one
TOP, BOTTOM = 4.0, 0.08  # what the crossover chart shows at the most


@dataclass(frozen=True)
class Beside:
    """Another sweep to be drawn fainter under the one at hand. label: what it is, such as "recorded: sweep_code"."""

    label: str
    points: Sequence[SweepPoint]


def crossing_chart(
    points: Sequence[SweepPoint], measure: Measure, ranks: Sequence[int], first: str, beside: Sequence[Beside] = ()
) -> Chart:
    """How many times the first method's seconds every other one needs, by rank: below 1 the first one loses, which is shaded.

    points: of one sweep. ranks: those that there will be, so that the axis stands still. Bars are 95 % intervals.
    """
    label = METHOD_STYLES[first].label
    what = {True: "as many tokens/s", False: "the seconds"}[measure.higher_is_better]
    traces, found, highest, lowest = [], [], 1.5, 1 / 1.5
    drawn_ranks, faint = set(ranks), FAINT if points else ALONE
    for source in (*beside, Beside("", points)):
        own = by_method(source.points, measure)
        for method in own:
            if method == first or first not in own:
                continue
            all_advantages = advantages(own[first], own[method])
            drawn_ranks |= {one.rank for one in all_advantages}
            style = METHOD_STYLES[method]
            name = _named(style.label, source)
            trace = {
                "type": "scatter",
                "mode": "lines+markers",
                "name": _plain(name),
                "x": [one.rank for one in all_advantages],
                "y": [float(f"{one.times:.4g}") for one in all_advantages],
                "line": {"color": style.colour, "dash": style.dash, "width": 1.2 if source.label else 2.2},
                "marker": {"color": style.colour, "symbol": style.symbol, "size": 6 if source.label else 9},
                "opacity": faint if source.label else 1,
                "hovertemplate": f"rank %{{x}}: %{{y:.2f}} times<extra>{_plain(name)}</extra>",
            }
            if all_advantages and not source.label and all(one.low is not None for one in all_advantages):
                trace["error_y"] = {
                    "type": "data",
                    "symmetric": False,
                    "array": [one.high - one.times for one in all_advantages],
                    "arrayminus": [one.times - one.low for one in all_advantages],
                    "color": style.colour,
                    "thickness": 1.2,
                    "width": 3,
                }
            traces.append(trace)
            highest = max([highest, *(one.high or one.times for one in all_advantages)])
            lowest = min([lowest, *(one.low or one.times for one in all_advantages)])
            crossed = crossover(all_advantages)
            if not source.label and crossed is not None:
                found.append(f"{style.label} {_ends(all_advantages)}")
    title = f"{measure}: times {label}'s seconds"
    top, bottom = min(TOP, 1.1 * highest), max(BOTTOM, lowest / 1.1)
    layout = chart_layout(title, "rank", f"times {label}'s", _log_ends(drawn_ranks), (math.log10(bottom), math.log10(top)))
    layout["xaxis"] |= _rank_axis(drawn_ranks)
    steps = (0.1, 0.17, 0.25, 0.5, 1, 2, 4) if bottom < 0.4 else (0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 3, 4)
    ticks = [tick for tick in steps if bottom <= tick <= top]
    layout["yaxis"] |= {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": [f"{tick:g}×" for tick in ticks]}
    across = {"xref": "paper", "x0": 0, "x1": 1, "y1": 1}
    layout["shapes"] = [
        across | {"type": "rect", "y0": bottom, "fillcolor": LOSING, "line": {"width": 0}, "layer": "below"},
        across | {"type": "line", "y0": 1, "line": {"color": EVEN, "width": 1.5}},
    ]
    words = {"x": 1, "xref": "paper", "xanchor": "right", "xshift": -6, "showarrow": False, "font": {"size": 11}}
    layout["annotations"] = [
        words | {"y": math.log10(1), "yanchor": "top", "text": f"{label} loses below this line"},
    ]
    if not found:
        return Chart({"data": traces, "layout": layout}, f"{title}: nothing to compare yet{_only(beside)}.")
    sentence = (
        f"What each method needs beside {label}, {what} as times, by rank: {'; '.join(found)}; in the shaded region {label} loses"
    )
    return Chart({"data": traces, "layout": layout}, f"{sentence}{'; bars are 95 % intervals' if _with_bars(traces) else ''}.")


def by_rank(points: Sequence[SweepPoint], measure: Measure, ranks: Sequence[int], beside: Sequence[Beside] = ()) -> Chart:
    """A line per method over the ranks; hollow marks are over-saturated runs, bars the range over repeats or steps."""
    title, unit = f"{measure} by rank", measure.unit
    direction = "higher is better" if measure.higher_is_better else "lower is better"
    traces, found, values, drawn_ranks = [], [], [], set(ranks)
    faint = FAINT if points else ALONE
    for source in (*beside, Beside("", points)):
        for method, own in by_method(source.points, measure).items():
            style, measured = METHOD_STYLES[method], [point for point in own if point.value]
            name = _named(style.label, source)
            traces.append(_line(_plain(name), method, measured, unit, faint if source.label else None))
            drawn_ranks |= {point.rank for point in measured}
            values += [max(point.range or (point.value,)) for point in measured]
            if measured and not source.label:
                ends = [measured[0], measured[-1]] if len(measured) > 1 else measured
                found.append(f"{style.label} {' to '.join(f'{point.value:.4g} at rank {point.rank}' for point in ends)}")
    layout = chart_layout(title, "rank", unit, _log_ends(drawn_ranks), (0, axis_ceiling(max(values, default=0.0))))
    layout["xaxis"] |= _rank_axis(drawn_ranks)
    layout["height"] = 360
    if not found:
        return Chart({"data": traces, "layout": layout}, f"{title}: nothing measured yet{_only(beside)}.")
    saturated = any(point.saturation for point in points if point.measure == measure)
    hollow = "; hollow marks are over-saturated, and grow with the length of the run" if saturated else ""
    return Chart({"data": traces, "layout": layout}, f"{title}, in {unit}: {'; '.join(found)}; {direction}{hollow}.")


def _line(name: str, method: str, measured: Sequence[SweepPoint], unit: str, faint: float | None) -> dict:
    """faint: the opacity of what was measured before."""
    style = METHOD_STYLES[method]
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": [point.rank for point in measured],
        "y": [float(f"{point.value:.5g}") for point in measured],
        "line": {"color": style.colour, "dash": style.dash, "width": 1.2 if faint else 2},
        "marker": {
            "color": style.colour,
            "size": 6 if faint else 9,
            "symbol": [style.symbol + "-open" * bool(point.saturation) for point in measured],
            "line": {"width": 1.5},
        },
        "text": [" (over-saturated)" if point.saturation else "" for point in measured],
        "hovertemplate": f"rank %{{x}}: %{{y:.4g}} {unit}%{{text}}<extra>{name}</extra>",
        "opacity": faint or 1,
        "showlegend": faint is None,  # its look says which method it is
    }
    if not faint and any(point.range for point in measured):
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
    return trace


def _only(beside: Sequence[Beside]) -> str:
    return "; what is drawn was measured before" if beside else ""


def _named(label: str, source: Beside) -> str:
    """A method's line of a source, short enough for a legend: what is in brackets stands in the menu."""
    return f"{label} · {source.label.partition(' (')[0]}" if source.label else label


def _ends(found: Sequence) -> str:
    ends = [found[0], found[-1]] if len(found) > 1 else found
    return " to ".join(f"{one.times:.2f} at rank {one.rank}" for one in ends)


def _with_bars(traces: Sequence[Mapping]) -> bool:
    return any("error_y" in trace for trace in traces)


def _rank_axis(ranks: set[int]) -> dict:
    ordered = sorted(ranks)
    return {"type": "log", "tickmode": "array", "tickvals": ordered, "ticktext": [str(rank) for rank in ordered]}


def _log_ends(ranks: set[int]) -> tuple[float, float]:
    return math.log10(min(ranks, default=1)) - 0.05, math.log10(max(ranks, default=1)) + 0.05


def _plain(text: str) -> str:
    """A label as plotly.js shows it: it reads a few HTML tags in text."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
