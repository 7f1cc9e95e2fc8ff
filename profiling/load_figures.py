"""Charts of load: what happened over time, how latencies are spread, who was asked. Pure functions, as in `profiling.figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from profiling.figures import METHOD_STYLES, SPIKE, Chart, axis_ceiling, chart_layout, thinned

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""method → x and y of the same length."""

SPREAD_POINTS = 200
MOST_ADAPTERS = 40


def over_time(series: Series, title: str, unit: str, direction: str = "lower is better") -> Chart:
    """A line per method over the seconds since its run began. unit: of y. direction: said in the sentence."""
    traces, found, drawn, last = [], [], [], 1.0
    for method, (times, values) in series.items():
        x, y = thinned(np.asarray(times, dtype=float), np.asarray(values, dtype=float))
        traces.append(_line(method, x, y, f"%{{x:.1f}} s: %{{y:.4g}} {unit}"))
        if len(y):
            found.append(f"{METHOD_STYLES[method].label} {np.mean(values):.4g} in the mean, {np.max(values):.4g} at most")
            drawn += y.tolist()
            last = max(last, float(x[-1]))
    layout = chart_layout(title, "seconds", unit, (0, last), (0, axis_ceiling(max(drawn, default=0.0))))
    sentence = f"{title}, in {unit}: {'; '.join(found)}; {direction}." if found else f"{title}: nothing measured yet."
    return Chart({"data": traces, "layout": layout}, sentence)


def spread(values: Mapping[str, Sequence[float]], title: str) -> Chart:
    """For every method the share of requests that took at most so long. values: method → milliseconds, in any order."""
    traces, found, ends, beyond = [], [], [], 0
    shares = np.linspace(0, 1, SPREAD_POINTS)
    for method, own in values.items():
        x = np.quantile(own, shares) if len(own) else np.array([])
        traces.append(_line(method, x, shares[: len(x)], "%{y:.0%} within %{x:.4g} ms", markers=False))
        if len(own):
            median, most = np.quantile(own, (0.5, 0.99))
            found.append(f"{METHOD_STYLES[method].label} {median:.4g} ms in the median, {most:.4g} ms for the slowest hundredth")
            ends.append(min(float(np.max(own)), SPIKE * float(np.quantile(own, 0.9))))
    end = axis_ceiling(max(ends, default=0.0))
    beyond = sum(int(np.sum(np.asarray(own) > end)) for own in values.values())
    layout = chart_layout(title, "ms", "share of requests", (0, end), (0, 1.02))
    layout["yaxis"]["tickformat"] = ".0%"
    sentence = f"{title}: {'; '.join(found)}; further left is better" if found else f"{title}: nothing measured yet"
    beyond_words = f"; {beyond} {'lie' if beyond > 1 else 'lies'} beyond the axis" if beyond else ""
    return Chart({"data": traces, "layout": layout}, f"{sentence}{beyond_words}.")


def requests_by_adapter(counts: Mapping[str, int]) -> Chart:
    """How many requests asked for each adapter, the most popular first. counts: tag → requests."""
    ordered = sorted(counts.items(), key=lambda one: -one[1])
    shown = ordered[:MOST_ADAPTERS]
    title = "Requests by adapter"
    trace = {
        "type": "bar",
        "x": [_plain(tag) for tag, _ in shown],
        "y": [count for _, count in shown],
        "marker": {"color": METHOD_STYLES["base"].colour},
        "hovertemplate": "%{x}: %{y} requests<extra></extra>",
        "showlegend": False,
    }
    layout = chart_layout(
        title, "adapter", "requests", (-0.5, max(1, len(shown)) - 0.5), (0, axis_ceiling(max(counts.values(), default=0)))
    )
    layout["xaxis"]["type"] = "category"
    if not ordered:
        return Chart({"data": [trace], "layout": layout}, f"{title}: none was asked for.")
    total = sum(counts.values())
    sentence = f"{title}: {len(counts)} of them, the most popular with {100 * shown[0][1] / total:.0f} % of {total} requests"
    return Chart(
        {"data": [trace], "layout": layout},
        f"{sentence}{f'; the first {MOST_ADAPTERS} are drawn' * (len(ordered) > MOST_ADAPTERS)}.",
    )


def _line(method: str, x: np.ndarray, y: np.ndarray, hover: str, markers: bool = True) -> dict:
    style = METHOD_STYLES[method]
    return {
        "type": "scatter",
        "mode": "lines+markers" if markers else "lines",
        "name": style.label,
        "x": [float(f"{value:.5g}") for value in x.tolist()],
        "y": [float(f"{value:.5g}") for value in y.tolist()],
        "line": {"color": style.colour, "dash": style.dash, "width": 2},
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 4},
        "hovertemplate": f"{hover}<extra>{style.label}</extra>",
    }


def _plain(tag: str) -> str:
    """A tag as plotly.js shows it: it reads a few HTML tags in text."""
    return tag.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
