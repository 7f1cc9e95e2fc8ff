"""What the *Op lab* tab says: a point's table and sentences, and the table of recorded points. Pure Python, all text escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from profiling import op_lab_report
from profiling.dashboard.live_cells import cells_value
from profiling.dashboard.live_plot import plot_value
from profiling.figures import METHOD_STYLES, Chart
from profiling.gpu.promises import promises
from profiling.op_lab import MethodPoint, OpLabResult
from profiling.op_lab_grid import GAP
from profiling.op_lab_recorded import Recorded, RecordedPoint
from profiling.op_lab_report import batch_words, count, milliseconds
from profiling.promise import Figure
from profiling.recorded import Recording

VERDICT_TEMPLATE = '<div class="lab-verdict" data-cell="verdict"></div>'
TABLE_TEMPLATE = (
    '<h2 class="panel-title" data-cell="heading"></h2><div class="table-scroll" data-cell="table"></div>'
    '<p class="lab-note" data-cell="conditions"></p>'
)
RECORDED_TEMPLATE = (
    '<h2 class="panel-title" data-cell="heading"></h2><p class="lab-note" data-cell="note"></p>'
    '<div class="table-scroll lab-recorded" data-cell="table" tabindex="0" role="region" aria-label="recorded points"></div>'
)
GPU_TEMPLATE = (
    '<h2 class="panel-title">promised on a GPU</h2><p class="lab-note" data-cell="note"></p>'
    '<div class="table-scroll lab-recorded" data-cell="table" tabindex="0" role="region" aria-label="promised on a GPU"></div>'
)
_NOTHING = "–"
_COLUMNS = (
    ("method", ""),
    ("time, ms", "median of single calls, with its 95 % interval"),
    ("÷ base", "median of paired calls over the bare layer's"),
    ("÷ first", "median of paired calls over the first method's"),
    ("error", "the largest against float64, as a share of the size of the terms"),
    ("GFLOP", "multiplications and additions"),
    ("MB", "what must move at least: weight, input, output, factors"),
    ("bandwidth", "share of the copy bandwidth measured on this machine"),
    ("matrix rate", "share of the rate of matrix products measured on this machine"),
    ("predicted, ms", "by the cost model"),
    ("bound by", "what the longest stage waits for, by the machine's limits"),
)


def explanation() -> str:
    """Before anything is measured."""
    return (
        "<p>One layer at a model's true widths, without its weights: random numbers take the same time. Every method serves the "
        "same batch in turn; the table sets each beside the bare layer, float64, and what this machine allows.</p>"
        "<p>The first measurement on a machine takes some ten seconds longer: what its products and its passes over memory take is "
        "measured once for a dtype, and kept. From that the times are predicted; where they are far off, the machine was busy "
        "then: <code>python -m profiling oplab --fresh</code> measures it anew.</p>"
    )


def idle_table() -> dict[str, Any]:
    return cells_value({"heading": "methods", "table": "", "conditions": ""})


def method_label(point: MethodPoint) -> str:
    """The method with its colour, and the form of fLoRA that it is."""
    style = METHOD_STYLES[point.method]
    return f'<span class="swatch" style="--accent: {style.colour}"></span>{html.escape(op_lab_report.label(point))}'


def table(result: OpLabResult) -> dict[str, Any]:
    """The table of a point, and under which conditions it was measured."""
    head = "".join(f'<th scope="col" title="{html.escape(title)}">{html.escape(name)}</th>' for name, title in _COLUMNS)
    body = "".join(f'<tr><th scope="row">{method_label(point)}</th>{_cells(point)}</tr>' for point in result.methods.values())
    for method, why in result.left_out.items():
        cell = f'<td colspan="{len(_COLUMNS) - 1}">left out: {html.escape(why)}</td>'
        body += f'<tr class="left-out"><th scope="row">{html.escape(METHOD_STYLES[method].label)}</th>{cell}</tr>'
    setting = result.setting
    return cells_value(
        {
            "heading": html.escape(f"{setting.name} · {batch_words(setting.shape)} · {setting.dtype} · live"),
            "table": f'<table class="figures lab"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>',
            "conditions": html.escape(f"{op_lab_report.conditions(result)} {op_lab_report.NOTE}"),
        }
    )


def _cells(point: MethodPoint) -> str:
    interval = f"{milliseconds(point.low_s)} to {milliseconds(point.high_s)}"
    right = "" if point.agrees else ' <b class="wrong">WRONG</b>'
    cells = [
        f"{milliseconds(point.seconds)} <small>{interval}</small>",
        _ratio(point.ratio_to_base),
        _ratio(point.ratio_to_first),
        f"{point.error:.0e}{right}",
        f"{point.operations / 1e9:.3g}",
        f"{point.num_bytes / 1e6:.3g}",
        f"{100 * point.bandwidth_share:.0f} %",
        f"{100 * point.matrix_share:.0f} %",
        f"{milliseconds(point.predicted.seconds)} <small>{100 * point.prediction_error:.0f} % off</small>",
        html.escape(point.predicted.bound),
    ]
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _ratio(found: Any) -> str:
    return "1" if found is None else f"{found.median:.2f} <small>{found.low:.2f} to {found.high:.2f}</small>"


def verdict(result: OpLabResult) -> dict[str, Any]:
    """Who wins here and why: the first sentence is the finding."""
    first, *others = op_lab_report.verdict(result)
    rest = f"<p>{html.escape(' '.join(others))}</p>" if others else ""
    return cells_value({"verdict": f"<p><b>{html.escape(first)}</b></p>{rest}"})


def idle_verdict() -> dict[str, Any]:
    return cells_value({"verdict": explanation()})


def plot(chart: Chart) -> dict[str, Any]:
    return plot_value(chart.figure, chart.description)


# ------------------------------------------------------------------------------------------------------------- recorded


def recorded(found: Recorded) -> dict[str, Any]:
    """The recorded points, a line each: where they were measured, who won, and how good the predictions were."""
    heading = "recorded, not live"
    if not found.points:
        return cells_value({"heading": heading, "note": html.escape(f"Nothing is recorded. {found.complaint}"), "table": ""})
    heads = ("layer", "batch", "dtype", "base, ms", "fLoRA", "bmm-LoRA", "bmm-LoRA ÷ fLoRA", "faster", "predicted", "model off")
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heads)
    body = "".join(f"<tr>{_recorded_cells(point)}</tr>" for point in found.points)
    machines = dict.fromkeys(
        f"{point.hardware.get('device_name', 'an unknown device')}, {point.hardware.get('threads', '?')} threads, "
        f"torch {point.hardware.get('torch', '?')}"
        for point in found.points
    )
    note = f"{count(len(found.points), 'point')}, measured on {' and on '.join(machines)}. {found.complaint}"
    return cells_value(
        {
            "heading": heading,
            "note": html.escape(f"{note} A lead of {100 * GAP:.0f} % or less is counted as none."),
            "table": f'<table class="figures lab"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>',
        }
    )


def promised_on_a_gpu(recordings: Sequence[Recording]) -> dict[str, Any]:
    """What `python -m profiling gpu` holds against its promises, which are about one H200: of each device that was recorded, the
    recording that tells most of a promise, the later one of two; or not yet measured.
    """
    by_device: dict[str, list[list[Figure]]] = {}  # device → of each recording its promises
    told, left_out = [], []
    for recording in [one for one in recordings if not one.rows[0].get("dry_run")]:
        try:
            found = promises(recording.rows)
        except (KeyError, TypeError, ValueError, IndexError):
            left_out.append(f"{recording.name} holds rows that `python -m profiling gpu` did not write, and is left out.")
            continue
        by_device.setdefault(str(recording.hardware.get("device_name", "an unknown device"))[:60], []).append(found)
        told.append(f"{recording.name}, {recording.where}")
    note = f"Recorded, not live: {'; '.join(told)}." if told else "No GPU has been measured yet."
    note += " Promised is what one H200 should reach. python -m profiling gpu measures a GPU in eight minutes, and writes its "
    note += "rows to a file such as gpu_nvidia_h200.jsonl, in the folder it starts in; this page shows those in assets/results/. "
    note += " ".join(left_out)
    head = "".join(f'<th scope="col">{name}</th>' for name in ("promise", "on", "measured", "promised", "kept"))
    body = ""
    for device, found in (by_device or {_NOTHING: [promises(())]}).items():
        for same in zip(*found, strict=True):
            figure = max(reversed(same), key=lambda one: (one.is_complete, one.value is not None, one.n))
            _, what, measured, wanted, holds = figure.cells()
            what = f"the same: {what.strip()}" if what.startswith(" ") else what  # on paper, it stands indented below
            first = f'<th scope="row">{html.escape(what)}</th>'
            cells = [device, "not yet measured" if figure.value is None else measured, wanted, holds or _NOTHING]
            body += f"<tr>{first}{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
    table = f'<table class="figures lab promised"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return cells_value({"note": html.escape(note.strip()), "table": table})


def _recorded_cells(point: RecordedPoint) -> str:
    shown = [point.rows.get(name) for name in ("base", "flora", "bmm-lora")]
    times = [_NOTHING if row is None else milliseconds(row["median_s"]) for row in shown]
    faster, predicted = point.fastest(), point.fastest("predicted_s")
    over = shown[2]["over_first"] if shown[2] and shown[2]["first"] == "flora" else None
    cells = [
        batch_words(point.setting.shape),
        point.setting.dtype,
        *times,
        _NOTHING if not over else f"{over[0]:.2f} [{over[1]:.2f}, {over[2]:.2f}]",
        _named(faster),
        _named(predicted),
        f"{100 * point.prediction_error:.0f} %",
    ]
    first = f'<th scope="row">{html.escape(point.setting.name)}</th>'
    return first + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)


def _named(method: str | None) -> str:
    return METHOD_STYLES[method].label if method in METHOD_STYLES else method or _NOTHING


def charts(results: Sequence[OpLabResult]) -> list[dict[str, Any]]:
    """The roofline of the last point, and predictions beside times of all points of this visit."""
    return [plot(op_lab_report.roofline(results[-1:])), plot(op_lab_report.predictions(results))]
