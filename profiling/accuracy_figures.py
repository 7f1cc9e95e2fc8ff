"""Accuracy as dots: a row for each language, a dot for each method. Pure functions, as in `profiling.figures`.

What was measured here is drawn filled, what the paper printed is drawn hollow, and never the two on one axis.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from flora.evaluate.rows import METHODS, Mean, Score
from profiling.accuracy import (
    HIGHER_IS_BETTER,
    METRICS,
    Estimate,
    Means,
    language_name,
    languages,
    means,
    own_scores,
    paper_mean,
    paper_tables,
    reasons,
)
from profiling.figures import GRID_COLOUR, METHOD_STYLES, TEXT_COLOUR, MethodStyle

ADAPTER_STYLES: dict[str, MethodStyle] = {
    "base": replace(METHOD_STYLES["base"], label="base"),
    "ia3": MethodStyle("IA3", "#009E73", "dashdot", "triangle-up"),
    "lora": replace(METHOD_STYLES["bmm-lora"], label="LoRA"),
    "flora": METHOD_STYLES["flora"],
}
"""How what was trained looks: fLoRA and the base model as everywhere, LoRA as its batched form. No chart shows these beside the
ways of serving, of which one has IA3's green."""

_MARKS = {"star": "★☆", "triangle-up": "▲△", "square": "■□", "circle": "●○"}
METRIC_WORDS = {"pass@1": "pass@1", "WER": "word error rate", "WER, normalised": "word error rate, normalised"}
NARROW_SPACE = "\N{NARROW NO-BREAK SPACE}"  # between a number and its unit
_SPREAD = 0.6  # of a language's row is used by its dots
_TOP, _BOTTOM, _LEFT = 28, 40, 84  # margins in pixels, the same in every dot plot: rows of two that stand side by side align


class TabledChart(NamedTuple):
    """A figure for plotly.js, one sentence that says what it shows, and what it draws as lines of a table, heads first."""

    figure: dict
    description: str
    table: list[list]


class _Dot(NamedTuple):
    """A number in per cent, its interval where there is one, and what is said of it."""

    value: float
    low: float | None
    high: float | None
    words: str


def measured_dots(task: str, scores: Iterable[Score], recorded_means: Iterable[Mean] = ()) -> TabledChart:
    """Each language's own adapters, as they scored here, with their intervals; a language that was not graded says why."""
    metric, scores = METRICS[task][0], [score for score in scores if score.metric == METRICS[task][0]]
    own, missing = own_scores(scores, metric), reasons(scores)
    tags = languages(task, (language for language, _ in own) if own else paper_tables(task)[0].values)
    dots = {
        place: _Dot(*(None if end is None else 100 * end for end in (score.value, score.low, score.high)), _score_words(score))
        for place, score in own.items()
        if score.value is not None
    }
    ends = [end for dot in dots.values() for end in (dot.value, dot.high) if end is not None]
    highest = 100.0 if HIGHER_IS_BETTER[task] else max(100.0, *ends, 0.0)
    title = " + ".join(models(scores)) or f"embedded {task} model"
    figure = _dot_plot(task, tags, [(title, dots)], missing, highest, hollow=False)
    table = [["language", "method", "metric", "value", "low", "high", "confidence", "items", "not graded because"]]
    for tag in tags:
        for method in METHODS:
            if (score := own.get((tag, method))) is not None:
                numbers = [score.value, score.low, score.high, score.confidence, score.items]
                table.append([tag, method, metric, *numbers, score.reason if score.value is None else None])
    return TabledChart(figure, _measured_sentence(task, own, means(scores, recorded_means, metric), missing), table)


def paper_dots(task: str) -> TabledChart:
    """The paper's tables of a task: a plot beside the other for each model, all with the same axis."""
    tables = paper_tables(task)
    metric = METRICS[task][0]
    plots = []
    for table in tables:
        dots = {}
        for tag, row in table.values.items():
            for method, value in row.items():
                words = f"{_name(task, tag)}, {ADAPTER_STYLES[method].label}: {percent(value / 100, 2)}"
                dots[tag, method] = _Dot(value, None, None, f"{words}<br>{table.model}, as printed")
        plots.append((table.model, dots))
    highest = max(dot.value for _, dots in plots for dot in dots.values())
    figure = _dot_plot(task, list(tables[0].values), plots, {}, highest, hollow=True)
    found = []
    for table in tables:
        means = (f"{ADAPTER_STYLES[method].label} {percent(paper_mean(table, method) / 100)}" for method in reversed(METHODS))
        found.append(f"{table.model}: {', '.join(means)}")
    sentence = (
        f"Mean {METRIC_WORDS[metric]} as the paper printed it, on {tables[0].benchmark}: {'; '.join(found)}. "
        "The paper prints no intervals. Other models and other items than ours: compare how the methods rank, not the numbers."
    )
    table = [["model", "benchmark", "language", "method", "metric", "per cent"]]
    table += [
        [entry.model, entry.benchmark, tag, method, metric, row[method]]
        for entry in tables
        for tag, row in entry.values.items()
        for method in METHODS
    ]
    return TabledChart(figure, sentence, table)


def models(scores: Iterable[Score]) -> list[str]:
    """The models that were scored, in words: one that ships has no name of its own."""
    return list(dict.fromkeys(f"embedded {row.task} model" if row.model.startswith("assets/") else row.model for row in scores))


def marks(hollow: bool) -> list[tuple[str, str, str]]:
    """The legend of a dot plot: (mark, colour, label) of every method."""
    return [(_MARKS[style.symbol][hollow], style.colour, style.label) for style in ADAPTER_STYLES.values()]


def _name(task: str, tag: str) -> str:
    return html.escape(language_name(task, tag))


def percent(value: float, digits: int = 1) -> str:
    """A fraction as "78.3 %", in one piece."""
    return f"{100 * value:.{digits}f}{NARROW_SPACE}%"


def interval(estimate: Estimate, digits: int = 1) -> str:
    """The interval of an estimate in per cent, "[69.0, 86.0]"; empty where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"[{100 * estimate.low:.{digits}f}, {100 * estimate.high:.{digits}f}]"


def _score_words(score: Score) -> str:
    name = f"{_name(score.task, score.language)}, {ADAPTER_STYLES[score.method].label}"
    ends = interval(Estimate(score.value, score.low, score.high))
    rank = f", rank {score.rank}" if score.rank else ""
    return f"{name}: {percent(score.value)} {ends}<br>{score.items} items{rank}"


def _measured_sentence(task: str, own: Mapping[tuple[str, str], Score], found_means: Means, missing: Mapping[str, str]) -> str:
    metric, estimates = METRICS[task][0], found_means.estimates
    if not estimates:
        return f"{METRIC_WORDS[metric].capitalize()} of each language's own adapters: nothing recorded yet."
    methods = [method for method in reversed(METHODS) if (method, None) in estimates]
    found = ", ".join(f"{ADAPTER_STYLES[method].label} {percent(estimates[method, None].value)}" for method in methods)
    confidence = max(score.confidence for score in own.values())
    parts = [f"Mean {METRIC_WORDS[metric]} over {len(found_means.tags)} languages on items held out of training: {found}"]
    parts.append(f"bars are {percent(confidence, 0)} intervals")
    if missing:
        parts.append("not graded: " + ", ".join(language_name(task, tag) for tag in missing))
    return "; ".join(parts) + ("; higher is better." if HIGHER_IS_BETTER[task] else "; lower is better.")


def _dot_plot(
    task: str,
    tags: Sequence[str],
    plots: Sequence[tuple[str, Mapping[tuple[str, str], _Dot]]],
    missing: Mapping[str, str],
    highest: float,
    hollow: bool,
) -> dict:
    """Plots beside each other with one row per language. plots: title and (language, method) → dot. missing: language → reason."""
    methods = [method for method in METHODS if any(column == method for _, dots in plots for _, column in dots)]
    step = _SPREAD / max(1, len(METHODS) - 1)
    gap = 0.07 if len(plots) > 1 else 0.0
    width = (1 - gap * (len(plots) - 1)) / len(plots)
    traces, annotations, axes = [], [], {}
    for number, (title, dots) in enumerate(plots):
        suffix = str(number + 1) if number else ""
        start = number * (width + gap)
        axes[f"xaxis{suffix}"] = _x_axis(task, (start, start + width), highest)
        annotations.append(
            {
                "text": f"<b>{html.escape(title)}</b>",
                "xref": "paper",
                "yref": "paper",
                "x": start,
                "y": 1,
                "xanchor": "left",
                "yanchor": "bottom",
                "yshift": 4,
                "showarrow": False,
            }
        )
        for method in methods:
            style = ADAPTER_STYLES[method]
            shift = (METHODS.index(method) - (len(METHODS) - 1) / 2) * step
            shown = [(place, dots[tag, method]) for place, tag in enumerate(tags) if (tag, method) in dots]
            trace = {
                "type": "scatter",
                "mode": "markers",
                "name": style.label,
                "x": [round(dot.value, 3) for _, dot in shown],
                "y": [round(place + shift, 3) for place, _ in shown],
                "xaxis": f"x{suffix}",
                "text": [dot.words for _, dot in shown],
                "hovertemplate": "%{text}<extra></extra>",
                "cliponaxis": False,  # a mark at the end of the axis is whole
                "marker": {
                    "color": style.colour,
                    "symbol": style.symbol + ("-open" if hollow else ""),
                    "size": 9 if style.symbol in ("star", "triangle-up") else 8,
                    "line": {"width": 1.6 if hollow else 0},
                },
            }
            if any(dot.low is not None and dot.high is not None for _, dot in shown):
                trace["error_x"] = {
                    "type": "data",
                    "symmetric": False,
                    "array": [0 if dot.high is None else round(dot.high - dot.value, 3) for _, dot in shown],
                    "arrayminus": [0 if dot.low is None else round(dot.value - dot.low, 3) for _, dot in shown],
                    "color": style.colour,
                    "thickness": 1.4,
                    "width": 2,
                }
            traces.append(trace)
    for place, tag in enumerate(tags):
        if tag in missing:
            words = html.escape(f"not graded: {missing[tag]}")
            annotations.append(
                {"text": words, "x": 0, "y": place, "xref": "x", "yref": "y", "xanchor": "left", "xshift": 6, "showarrow": False}
            )
    layout = {
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "font": {"color": TEXT_COLOUR, "size": 13},
        "margin": {"l": _LEFT, "r": 12, "t": _TOP, "b": _BOTTOM},
        "showlegend": False,  # `marks` says it beside the chart, where it takes one line on a phone too
        "hovermode": "closest",
        "hoverlabel": {"align": "left"},
        "yaxis": {
            "range": [max(1, len(tags)) - 0.5, -0.5],
            "tickmode": "array",
            "tickvals": list(range(len(tags))),
            "ticktext": [_name(task, tag) for tag in tags],
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        },
        **axes,
        "shapes": [_band(place) for place in range(0, len(tags), 2)],
        "annotations": annotations,
        "uirevision": f"{task} {'paper' if hollow else 'measured'}",
    }
    return {"data": traces, "layout": layout}


def _x_axis(task: str, domain: tuple[float, float], highest: float) -> dict:
    metric = METRICS[task][0]
    margin = 0.02 * highest
    return {
        "domain": [round(end, 4) for end in domain],
        "anchor": "y",
        "title": {"text": f"{metric}, %", "standoff": 6},
        "range": [-margin, highest + margin],
        "gridcolor": GRID_COLOUR,
        "zeroline": False,
        "nticks": 7,
        "fixedrange": True,
    }


def _band(place: int) -> dict:
    """A faint stripe behind every other language's row."""
    return {
        "type": "rect",
        "xref": "paper",
        "yref": "y",
        "x0": 0,
        "x1": 1,
        "y0": place - 0.5,
        "y1": place + 0.5,
        "fillcolor": "rgba(128, 128, 128, 0.07)",
        "line": {"width": 0},
        "layer": "below",
    }
