"""The *Op lab* tab: one layer at true widths, every method measured in turn in a second or two, beside what the machine allows."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from flora.errors import RequestError
from flora.models import KNOWN_MODELS
from profiling import op_lab
from profiling.calibration import costs_in_steps
from profiling.cost_model import LayerShape
from profiling.dashboard import op_lab_views as views
from profiling.dashboard.downloads import Downloads
from profiling.dashboard.live_cells import LiveCells, cells_value
from profiling.dashboard.live_plot import LivePlot
from profiling.dashboard.measuring import Measurement, Measurements, Measuring
from profiling.dashboard.menus import Menu
from profiling.dashboard.results import REPRODUCE_TEMPLATE
from profiling.events import HowFar
from profiling.op_lab import DTYPES, MOST, OpLabResult, Setting, command_line, model_layers
from profiling.op_lab_recorded import read_recorded
from profiling.op_lab_report import report_of
from profiling.recorded import recordings
from profiling.report import Report

TAB = "oplab"
FREE = "free widths"
_FIRST_MODEL = "starcoderbase-1b"
_CHART_PX = 320
_CALIBRATION_SHARE = 0.85  # of a first measurement's time
_QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
_SIZES = ("rows", "length", "rank", "adapters")


class OpLabWork:
    """One point, for `Measuring`: the machine's costs, where they are not known yet, then the layer.

    earlier: the points that the visitor has measured before.
    """

    def __init__(self, setting: Setting, device: torch.device, earlier: Sequence[OpLabResult] = ()) -> None:
        self.setting, self.device, self.earlier = setting, device, list(earlier)
        self.result: OpLabResult | None = None

    @property
    def command(self) -> str:
        return command_line(self.setting, self.device)

    def measure(self, should_stop: Callable[[], bool]) -> Iterator[Any]:
        steps, before = costs_in_steps(self.device, getattr(torch, self.setting.dtype)), 0.0
        words = f"measuring what this machine allows in {self.setting.dtype}, once"
        while True:
            try:
                share = next(steps)
            except StopIteration as end:
                costs = end.value
                break
            before = _CALIBRATION_SHARE
            yield HowFar(words, _CALIBRATION_SHARE * share)
            if should_stop():
                return
        yield HowFar(f"measuring {self.setting.name}", before)
        result = op_lab.measure(self.setting, self.device, costs, command=self.command, should_stop=should_stop)
        if result is not None:
            yield result

    def take(self, event: OpLabResult) -> None:
        self.result = event

    def report(self) -> Report | None:
        """What there is to download; None where nothing was measured."""
        return None if self.result is None else report_of([self.result], self.command)


def setting_of(model: Any, layer: Any, d_in: Any, d_out: Any, sizes: Sequence[Any], dtype: Any) -> Setting:
    """What the controls say; RequestError, a sentence, for what makes no sense."""
    free = model == FREE
    named = dict(zip(_SIZES, sizes, strict=True)) | ({"d_in": d_in, "d_out": d_out} if free else {})
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
            raise RequestError(f"{name} must be a whole number from 1 to {MOST[name]}")
    named = {name: int(value) for name, value in named.items()}
    if dtype not in DTYPES:
        raise RequestError(f"choose a dtype among {', '.join(DTYPES)}")
    if free:
        return Setting(LayerShape(**named), dtype)
    return Setting.of_model(str(model), None if layer is None else str(layer), dtype, **named)


def build_op_lab_tab(tab: gr.Tab, measurements: Measurements, device: Callable[[], torch.device], results_folder: Path) -> None:
    """Lay out the tab and wire it; call it inside `tab`'s context.

    device: what computes now. results_folder: where recorded points are; it is read when the tab is opened, and not before.
    """
    measuring = Measuring(measurements, TAB, "choose a layer and a batch, and press Measure")
    first = _layer_choices(_FIRST_MODEL)
    with gr.Row(equal_height=False, elem_classes="bench load lab"):
        with gr.Column(scale=4, min_width=300, elem_classes="load-side"), gr.Column(elem_classes="instrument load-panel"):
            gr.HTML('<h2 class="panel-title">layer and batch</h2>', apply_default_css=False)
            with gr.Row(elem_classes="controls one-control"):
                model = gr.Dropdown(
                    [*KNOWN_MODELS, FREE], value=_FIRST_MODEL, label="model", min_width=90, elem_id="oplab-model", interactive=True
                )
            with gr.Row(elem_classes="controls one-control"):
                layer = Menu(first, value=first[0][1], label="layer", min_width=90, elem_id="oplab-layer", interactive=True)
            with gr.Row(elem_classes="controls load-menus", visible=False) as widths:
                d_in = _number(1024, "width in", "oplab-d-in")
                d_out = _number(1024, "width out", "oplab-d-out")
            with gr.Row(elem_classes="controls load-menus"):
                rows = _number(8, "rows", "oplab-rows")
                length = _number(1, "tokens of each row", "oplab-length")
            with gr.Row(elem_classes="controls load-menus"):
                rank = _number(4, "rank", "oplab-rank")
                adapters = _number(8, "adapters", "oplab-adapters")
            with gr.Row(elem_classes="controls load-menus"):
                dtype = gr.Dropdown(
                    list(DTYPES), value=DTYPES[0], label="dtype", min_width=90, elem_id="oplab-dtype", interactive=True
                )
            measuring.buttons()
        with gr.Column(scale=8, min_width=300, elem_classes="instrument"):
            measuring.status_line()
            verdict = LiveCells(views.VERDICT_TEMPLATE, views.idle_verdict(), elem_id="oplab-verdict")
            with gr.Column(visible=False, elem_id="oplab-found") as found:
                table = LiveCells(views.TABLE_TEMPLATE, views.idle_table(), elem_id="oplab-table")
                with gr.Row(elem_classes="load-charts", elem_id="oplab-charts"):
                    charts = [
                        LivePlot(value, file_name=f"flora-live-{name}.csv", height_px=_CHART_PX, elem_id=f"oplab-{name}")
                        for name, value in zip(("roofline", "predictions"), views.charts([]), strict=True)
                    ]
    with gr.Row(elem_classes="instrument footer-panel", equal_height=True):
        shown = command_line(setting_of(_FIRST_MODEL, first[0][1], None, None, (8, 1, 4, 8), DTYPES[0]), device())
        reproduce = LiveCells(REPRODUCE_TEMPLATE, cells_value({"command": html.escape(shown)}), elem_id="oplab-reproduce")
        downloads = Downloads("oplab")
    with gr.Column(elem_classes="instrument lab-panel"):
        recorded = LiveCells(views.RECORDED_TEMPLATE, elem_id="oplab-recorded")
    with gr.Column(elem_classes="instrument lab-panel"):
        promised = LiveCells(views.GPU_TEMPLATE, elem_id="oplab-gpu")

    def choose(name: str | None) -> list[Any]:
        """Another model has other layers; free widths have none."""
        free = name == FREE
        choices = [] if free or name not in KNOWN_MODELS else _layer_choices(name)
        return [gr.Dropdown(choices=choices, value=choices[0][1] if choices else None, visible=not free), gr.Row(visible=free)]

    def begin(session: str, name: Any, part: Any, wide_in: Any, wide_out: Any, *values: Any) -> OpLabWork:
        setting = setting_of(name, part, wide_in, wide_out, values[:-1], values[-1])
        before = [*measurements.earlier(session, TAB), measurements.of(session, TAB)]
        return OpLabWork(setting, device(), [one.work.result for one in before if one and one.work.result])

    def show(measurement: Measurement) -> list[Any]:
        work: OpLabWork = measurement.work
        if work.result is None:
            return [*[gr.skip()] * 4, *views.charts(work.earlier)]
        return [
            views.verdict(work.result),
            gr.Column(visible=True),
            views.table(work.result),
            cells_value({"command": html.escape(work.command)}),
            *views.charts([*work.earlier, work.result]),
        ]

    controls = [model, layer, d_in, d_out, rows, length, rank, adapters, dtype]
    measuring.connect(controls, begin, [verdict, found, table, reproduce, *charts], show)
    measuring.at_the_end(downloads.buttons, lambda measurement: downloads.offer(measurement.work.report()))
    model.input(choose, [model], [layer, widths], **_QUIET)

    def opened() -> list[Any]:
        gpu = recordings(results_folder, "gpu").found
        return [views.recorded(read_recorded(results_folder)), views.promised_on_a_gpu(gpu)]

    tab.select(opened, None, [recorded, promised], **_QUIET)


def _number(value: int, label: str, name: str) -> gr.Number:
    return gr.Number(value, label=label, precision=0, minimum=1, min_width=90, elem_id=name, interactive=True)


def _layer_choices(model: str) -> list[tuple[str, str]]:
    """ "c_attn · 2048 → 2304" and its name."""
    return [(f"{name} · {d_in} → {d_out}", name) for name, (d_in, d_out) in model_layers(model).items()]
