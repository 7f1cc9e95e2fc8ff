"""How a sweep looks: rows in, values of the page's components out. Pure Python: no gradio, no device."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from profiling.dashboard.live_cells import cells_value
from profiling.dashboard.live_plot import plot_value
from profiling.figures import Chart
from profiling.recorded import recordings
from profiling.sweep_figures import Beside, by_rank, crossing_chart
from profiling.sweep_paper import beside as beside_the_paper
from profiling.sweep_points import LATENCY, STEP_TIME, THROUGHPUT, Measure, SweepPoint, measures_of, points_of
from profiling.sweep_report import NOTE, headline, table

CHARTS = ("steps", "throughput", "latency")
_NAMES = {"steps": STEP_TIME, "throughput": THROUGHPUT, "latency": LATENCY}

HEADLINE_TEMPLATE = (
    '<p class="sweep-headline" data-cell="headline" role="status" aria-live="polite"></p>'
    '<div class="sweep-facts" data-cell="facts"></div>'
)
DETAILS_TEMPLATE = (
    '<div class="wide" data-cell="table"></div><div class="sweep-facts" data-cell="predicted"></div>'
    '<div class="sweep-facts" data-cell="paper"></div>'
    '<div class="sweep-facts" data-cell="note"></div>'
)


def recorded(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(label, {"rows", "points"}) of every recorded sweep that can be drawn; others are left out."""
    found = []
    for one in recordings(folder, "sweep").found:
        try:
            points = points_of(one.rows)
        except ValueError:
            continue  # a sweep of another kind of row
        found.append((f"recorded: {one.name} ({one.where})", {"rows": one.rows, "points": points}))
    return found


def label_of(rows: Sequence[Mapping[str, Any]], number: int) -> str:
    """What an earlier sweep of the session is called: its conditions, no time."""
    setting = rows[0]["setting"]
    prompts = "as given" if setting["prompt_lengths"] == "given" else setting["prompt_lengths"]
    parts = [f"batch {setting['batch']}", f"prompts {prompts}", f"{setting['num_steps']} new", setting["popularity"]]
    return f"earlier: sweep {number} ({setting['model']['name']}, {', '.join(map(str, parts))})"


def first_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The method that the others are compared with."""
    setting = rows[0].get("setting") if rows else None
    return setting["first"] if isinstance(setting, dict) else "flora"


def said(rows: Sequence[Mapping[str, Any]], points: Sequence[SweepPoint], beside: Sequence[Beside], facts: str) -> dict[str, Any]:
    """The sentence on top, and where its numbers are from."""
    if points:
        words = headline(points, first_of(rows)) or "Measuring: a second method at a rank, and there is something to compare."
        return cells_value({"headline": html.escape(words), "facts": html.escape(f"{facts} · live, measured here")})
    for other in beside:
        words = headline(other.points, "flora")
        if words:
            return cells_value({"headline": html.escape(words), "facts": html.escape(f"{other.label} · not measured here")})
    return cells_value({"headline": "Press Sweep: where does fLoRA stop winning on this machine?", "facts": html.escape(facts)})


def paper(rows: Sequence[Mapping[str, Any]], points: Sequence[SweepPoint]) -> str:
    """The paper's figures beside these, or why they are not."""
    setting = rows[0]["setting"]
    return beside_the_paper(setting["model"], setting["hardware"], measures_of(points))


def details(rows: Sequence[Mapping[str, Any]], points: Sequence[SweepPoint], predicted: str = "") -> dict[str, Any]:
    """The numbers as a table, what was predicted and what the paper has beside them, and how they were measured."""
    if not points:
        return cells_value({"table": "", "predicted": "", "paper": "", "note": html.escape(NOTE)})
    heads, lines = table(points)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in heads)
    shown = f'<table class="figures sweep-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    words = {"predicted": predicted, "paper": paper(rows, points), "note": NOTE}
    return cells_value({"table": shown} | {name: html.escape(text) for name, text in words.items()})


def charts(
    points: Sequence[SweepPoint], ranks: Sequence[int], first: str, beside: Sequence[Beside], number: int
) -> list[dict[str, Any]]:
    """The crossover chart, and one for each of CHARTS; a latency at the lowest rate that was measured. number: of the sweep."""
    everything = [*points, *(point for other in beside for point in other.points)]
    known = measures_of(points) or measures_of(everything)
    crossing = crossing_chart(points, known[0] if known else Measure(STEP_TIME), ranks, first, beside)
    values = [_value(crossing, f"crossing {number}", "crossing")]
    for name in CHARTS:
        measure = next((one for one in known if one.name == _NAMES[name]), None)
        measure = measure or next((one for one in measures_of(everything) if one.name == _NAMES[name]), None)
        rate = {STEP_TIME: None, THROUGHPUT: float("inf"), LATENCY: 0.0}[_NAMES[name]]
        chart = by_rank(points, measure or Measure(_NAMES[name], rate), ranks, beside)
        values.append(_value(chart, f"{name} {number}", str(measure or _NAMES[name]).lower()))
    return values


def _value(chart: Chart, revision: str, title: str) -> dict[str, Any]:
    layout = {key: value for key, value in chart.figure["layout"].items() if key not in ("height", "font")}
    layout |= {"uirevision": revision, "margin": {"l": 60, "r": 12, "t": 44, "b": 38}}
    layout["legend"] = layout["legend"] | {"font": {"size": 10}}
    if title != "crossing":
        layout["title"] = {"text": title, "x": 0, "xanchor": "left", "yref": "container", "y": 0.985, "font": {"size": 11}}
    return plot_value({"data": chart.figure["data"], "layout": layout}, chart.description)
