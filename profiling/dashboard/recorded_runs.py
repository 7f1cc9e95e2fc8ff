"""The panel *recorded, not live* of a tab whose measurements are told in a line for each method: comparisons, and load."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from profiling.dashboard.live_cells import LiveCells, cells_value
from profiling.figures import METHOD_STYLES
from profiling.recorded import Recording, recordings

_TEMPLATE = (
    '<h2 class="panel-title">recorded, not live</h2><p class="lab-note" data-cell="note"></p>'
    '<div class="recorded-runs" data-cell="runs" tabindex="0" role="region" aria-label="recorded, not live"></div>'
)
_NOTHING = "–"


class Column(NamedTuple):
    """A head, and what a row has under it. Whatever a row that is none of ours makes it raise is caught."""

    head: str
    cell: Callable[[Mapping[str, Any]], str]


def _ms(value: float | None) -> str:
    return _NOTHING if value is None else f"{1000 * value:.3g} ms"


def _method(row: Mapping[str, Any]) -> str:
    return METHOD_STYLES[row["method"]].label


def _ratio(value: Mapping[str, float] | None) -> str:
    return _NOTHING if value is None else f"{value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def _rate(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:,.0f}"


COMPARISONS = (
    Column("method", _method),
    Column("requests", lambda row: f"{row['batch']} {row['kind']}"),
    Column("tokens/s", lambda row: _rate(row["tokens_per_s"])),
    Column("TTFT", lambda row: _ms(row["ttft_s"])),
    Column("TPOT", lambda row: _ms(row["tpot_s"])),
    Column("step ÷ first's", lambda row: _ratio(row["ratio_to_first"])),
    Column("step ÷ base's", lambda row: _ratio(row["ratio_to_base"])),
)
LOADS = (
    Column("method", _method),
    Column("model", lambda row: row["kind"]),
    Column("tokens/s", lambda row: _rate(row["tokens_per_s"])),
    Column("TTFT, median", lambda row: _ms(row["ttft_s"]["p50"])),
    Column("TTFT, p99", lambda row: _ms(row["ttft_s"]["p99"])),
    Column("TPOT, median", lambda row: _ms(row["tpot_s"]["p50"])),
    Column("TPOT, p99", lambda row: _ms(row["tpot_s"]["p99"])),
    Column("goodput", lambda row: _NOTHING if row["goodput"] is None else f"{100 * row['goodput']['share']:.0f} %"),
)


def build_recorded_panel(folder: Path, measurement: str, columns: Sequence[Column]) -> None:
    """Lay out the panel with what is recorded when the page is built. measurement: the sub-command, such as "compare"."""
    value = recorded_runs(recordings(folder, measurement).found, measurement, columns)
    with gr.Column(elem_classes="instrument lab-panel"):
        LiveCells(_TEMPLATE, value, elem_id=f"{measurement}-recorded")


def recorded_runs(found: Sequence[Recording], measurement: str, columns: Sequence[Column]) -> dict[str, Any]:
    """Value of the panel: each recording with where it was measured, its command, and a line for each row."""
    shown, left_out = [], []
    for recording in found:
        try:
            lines = [[column.cell(row) for column in columns] for row in recording.rows]
        except (KeyError, TypeError, ValueError):
            left_out.append(f"{recording.name} holds rows that `python -m profiling {measurement}` did not write, and is left out.")
            continue
        shown.append(_one(recording, columns, lines))
    note = " ".join([*([] if shown else ["Nothing is recorded."]), *left_out])
    return cells_value({"note": html.escape(note), "runs": "".join(shown)})


def _one(recording: Recording, columns: Sequence[Column], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(column.head)}</th>' for column in columns)
    body = ""
    for first, *rest in lines:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        body += f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>'
    facts = recording.hardware
    versions = [f"{name} {facts[name]}" for name in ("torch", "transformers") if name in facts]
    where = html.escape(", ".join([recording.name, recording.where, *versions]))
    return (
        f'<p class="lab-note">{where}<br><code>{html.escape(recording.command)}</code></p><div class="table-scroll">'
        f'<table class="figures lab"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
