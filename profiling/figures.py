"""Charts as plain dicts that plotly.js draws, each with the sentence that says what it shows. Pure functions: numbers
in, figure out.

Backgrounds are transparent and the text is a grey that reads on white and on black; a page that knows its theme
overrides the text's colour by CSS.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from profiling.events import StepTimed

MAX_POINTS = 1000  # per trace; longer series are drawn as medians of equally many neighbours
SPIKE = 3.0  # the axis ends at so many times the 90th percentile at most
TEXT_COLOUR = "#7d7d7d"
GRID_COLOUR = "rgba(128, 128, 128, 0.22)"


@dataclass(frozen=True)
class MethodStyle:
    """How a method looks, everywhere. colour: Okabe-Ito's palette, its yellow as dark as it must be to read on white, and two greys
    for what is not a contender."""

    label: str
    colour: str
    dash: str
    symbol: str


METHOD_STYLES: dict[str, MethodStyle] = {
    "flora": MethodStyle("fLoRA", "#0072B2", "solid", "circle"),
    "flora-expand": MethodStyle("fLoRA expand", "#56B4E9", "dash", "triangle-up"),
    "flora-modulate": MethodStyle("fLoRA modulate", "#009E73", "dashdot", "triangle-down"),
    "bmm-lora": MethodStyle("bmm-LoRA", "#D55E00", "dash", "square"),
    "loop-lora": MethodStyle("loop-LoRA", "#E69F00", "dot", "diamond"),
    "mixed": MethodStyle("mixed", "#9C8F00", "longdashdot", "hexagon"),
    "sgmv-lora": MethodStyle("sgmv-LoRA", "#CC79A7", "longdash", "cross"),
    "merged": MethodStyle("merged", "#999999", "longdashdot", "x"),
    "base": MethodStyle("base model", "#767676", "dot", "star"),
}


class Chart(NamedTuple):
    """A figure for plotly.js, {"data": …, "layout": …}, and one sentence that says what it shows."""

    figure: dict
    description: str


def live_tokens_per_s(steps: Iterable[StepTimed], methods: Sequence[str], num_steps: int) -> Chart:
    """New tokens per second at every decode step, a line per method; both kinds' requests counted together.

    steps: those timed so far. num_steps: those there will be, so that the axis stands still.
    """
    series = {
        method: {step: tokens / seconds for step, (tokens, seconds) in points.items() if seconds > 0}
        for method, points in _decode_steps(steps, methods).items()
    }
    return _chart(series, num_steps, "tokens/s", "Tokens per second at each decode step", "%{y:.0f} tokens/s", "higher is better")


def step_times(steps: Iterable[StepTimed], methods: Sequence[str], num_steps: int) -> Chart:
    """Milliseconds of every decode step, a line per method; of two kinds the sum of their two forwards."""
    series = {
        method: {step: 1000.0 * seconds for step, (_, seconds) in points.items()}
        for method, points in _decode_steps(steps, methods).items()
    }
    return _chart(series, num_steps, "ms per step", "Milliseconds of each decode step", "%{y:.2f} ms", "lower is better")


def _decode_steps(steps: Iterable[StepTimed], methods: Sequence[str]) -> dict[str, dict[int, tuple[int, float]]]:
    """method → step → (new tokens, seconds), over the kinds that decoded in it."""
    points: dict[str, dict[int, tuple[int, float]]] = {method: {} for method in methods}
    for step in steps:
        if step.phase == "decode" and step.method in points:
            tokens, seconds = points[step.method].get(step.step, (0, 0.0))
            points[step.method][step.step] = (tokens + step.num_new_tokens, seconds + step.seconds)
    return points


def _chart(series: Mapping[str, Mapping[int, float]], num_steps: int, unit: str, title: str, hover: str, direction: str) -> Chart:
    traces, medians, drawn, longest = [], [], [], 0
    for method, points in series.items():
        style = METHOD_STYLES[method]
        x, y = thinned(np.array(list(points), dtype=float), np.array(list(points.values()), dtype=float))
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": style.label,
                "x": [round(value, 1) for value in x.tolist()],
                "y": [float(f"{value:.5g}") for value in y.tolist()],
                "line": {"color": style.colour, "dash": style.dash, "width": 2},
                "marker": {"color": style.colour, "symbol": style.symbol, "size": 5},
                "hovertemplate": f"step %{{x:.0f}}: {hover}<extra>{style.label}</extra>",
            }
        )
        if points:
            medians.append(f"{style.label} {np.median(list(points.values())):.4g}")
            drawn += y.tolist()
            longest = max(longest, len(points))
    # A rare spike would press all other points to the floor: it lies above the chart then, and the sentence says so.
    usual = SPIKE * float(np.quantile(drawn, 0.9)) if drawn else 0.0
    ceiling = axis_ceiling(min(usual, max(drawn, default=0.0)))
    layout = chart_layout(title, "step", unit, (0, max(1, num_steps)), (0, ceiling))
    if not medians:
        return Chart({"data": traces, "layout": layout}, f"{title}: nothing measured yet.")
    plural = "steps" if longest != 1 else "step"
    found = f"{title}: {', '.join(medians)} in the median of {longest} {plural}; {direction}"
    spikes = sum(value > ceiling for value in drawn)
    beyond = f"; {spikes} {'points lie' if spikes > 1 else 'point lies'} above the axis" if spikes else ""
    return Chart({"data": traces, "layout": layout}, f"{found}{beyond}.")


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points: medians of neighbours where there are more."""
    if len(x) <= MAX_POINTS:
        return x, y
    groups = np.array_split(np.arange(len(x)), MAX_POINTS)
    return np.array([np.median(x[group]) for group in groups]), np.array([np.median(y[group]) for group in groups])


def axis_ceiling(highest: float) -> float:
    """The end of an axis that holds `highest`: a round number, so that a live chart's axis moves seldom."""
    if highest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(highest))
    return next(step * power for step in (1.5, 2, 3, 4, 5, 6, 8, 10, 15) if step * power >= 1.05 * highest)


def chart_layout(title: str, x_title: str, y_title: str, x_range: tuple[float, float], y_range: tuple[float, float]) -> dict:
    """The look every chart has: no background, a quiet grid, the legend above, fixed ranges."""
    axis = {
        "gridcolor": GRID_COLOUR,
        "zeroline": False,
        "linecolor": GRID_COLOUR,
        "ticks": "outside",
        "tickcolor": GRID_COLOUR,
    }
    return {
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "font": {"color": TEXT_COLOUR, "size": 13},
        "margin": {"l": 60, "r": 16, "t": 36, "b": 44},
        "height": 300,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
        "xaxis": {**axis, "title": {"text": x_title}, "range": list(x_range)},
        "yaxis": {**axis, "title": {"text": y_title}, "range": list(y_range)},
        "uirevision": title,
    }
