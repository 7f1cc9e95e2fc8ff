"""The *Kernels* tab: steps of two or more methods under torch.profiler, which kernels they run, and what one launches instead."""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from flora.errors import RequestError
from flora.ops import METHODS
from profiling.dashboard import kernels_views as views
from profiling.dashboard.downloads import Downloads
from profiling.dashboard.kernel_profiles import MOST_METHODS, MOST_ROWS, RANKS, Found, KernelProfiles, ProfileWish, ProfileWork
from profiling.dashboard.live_cells import LiveCells, cells_value
from profiling.dashboard.live_plot import LivePlot
from profiling.dashboard.measuring import Measurement, Measurements, Measuring
from profiling.dashboard.menus import Menu
from profiling.dashboard.results import REPRODUCE_TEMPLATE, sentence
from profiling.dashboard.sortable_table import SortableTable
from profiling.dashboard.trace_exports import TraceExports
from profiling.figures import METHOD_STYLES
from profiling.kernels_report import OPEN_COMMAND, label, report_of

_CHARTS = {"breakdown": 196, "gains": 236, "timeline": 360, "tree": 300}  # heights in pixels
_QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
_RECORD, _OPEN = "kernels", "kernels-open"  # names of the two measurements that a visitor may have here


def build_kernels_tab(tab: gr.Tab, profiles: KernelProfiles, measurements: Measurements) -> None:
    """Lay out the tab and wire it; call it inside `tab`'s context."""
    kinds = list(profiles.engines)
    first = ProfileWish(kinds[0], ("flora", "bmm-lora"), 8, 0, False)
    recording = Measuring(measurements, _RECORD, idle="nothing is profiled")
    opening = Measuring(measurements, _OPEN, idle="no trace is opened")

    with gr.Row(equal_height=False, elem_classes="bench load"):
        with gr.Column(scale=4, min_width=300, elem_classes="load-side"):
            with gr.Column(min_width=280, elem_classes="instrument load-panel"):
                gr.HTML('<h2 class="panel-title">profile</h2>', apply_default_css=False)
                kind = gr.Radio(
                    kinds,
                    value=first.kind,
                    label="model",
                    show_label=False,
                    container=False,
                    visible=len(kinds) > 1,
                    elem_id="kernels-kind",
                    elem_classes="switch",
                    interactive=True,
                )
                methods = gr.Dropdown(
                    [(METHOD_STYLES[method].label, method) for method in METHODS],
                    value=list(first.methods),
                    multiselect=True,
                    max_choices=MOST_METHODS,
                    label="methods, the first beside the others",
                    elem_id="kernels-methods",
                    elem_classes="kernels-methods",
                    interactive=True,
                )
                with gr.Row(elem_classes="controls load-menus"):
                    rows = gr.Number(
                        first.rows,
                        label=f"rows, 1 to {MOST_ROWS}",
                        precision=0,
                        min_width=90,
                        elem_id="kernels-rows",
                        interactive=True,
                    )
                    rank = gr.Dropdown(
                        [("the model's own", 0), *((f"random, rank {rank}", rank) for rank in RANKS)],
                        value=0,
                        label="adapters",
                        min_width=90,
                        elem_id="kernels-rank",
                        interactive=True,
                    )
                captured = gr.Checkbox(
                    False, label="captured, as served: without layers", elem_id="kernels-captured", elem_classes="kernels-captured"
                )
                recording.buttons("Profile")
                recording.status_line()
            with gr.Column(min_width=280, elem_classes="instrument load-panel"):
                gr.HTML('<h2 class="panel-title">open a trace</h2>', apply_default_css=False)
                file = gr.File(
                    file_count="single",
                    file_types=[".json", ".gz"],
                    label=".json or .json.gz, as torch.profiler exports it",
                    height=84,
                    elem_id="kernels-file",
                    elem_classes="adapter-files kernels-file",
                    interactive=True,
                )
                opening.buttons("Open")
                opening.status_line()
            with gr.Column(min_width=280, elem_classes="instrument load-panel", visible=False) as recorded_panel:
                gr.HTML('<h2 class="panel-title">recorded</h2>', apply_default_css=False)
                with gr.Row(elem_classes="controls one-control"):
                    recorded = Menu(
                        [], label="recorded profiles", show_label=False, min_width=90, elem_id="kernels-recorded", interactive=True
                    )
                recorded_words = LiveCells(views.RECORDED_TEMPLATE, elem_id="kernels-recorded-words")
        with gr.Column(scale=8, min_width=300, elem_classes="load-side"):
            with gr.Column(min_width=300, elem_classes="instrument"):
                phase = gr.Radio(
                    [],
                    label="phase",
                    show_label=False,
                    container=False,
                    visible=False,
                    elem_id="kernels-phase",
                    elem_classes="switch",
                    interactive=True,
                )
                headline = LiveCells(views.HEADLINE_TEMPLATE, views.blank_headline(), elem_id="kernels-headline")
            with gr.Column(visible=False, elem_classes="kernels-found") as area:
                plots = {}
                with gr.Row(equal_height=False, elem_classes="kernels-charts"):
                    with gr.Column(min_width=280, elem_classes="instrument"):
                        plots["breakdown"] = _plot("breakdown")
                    with gr.Column(min_width=280, elem_classes="instrument") as gains:
                        other = gr.Radio(
                            [],
                            label="beside",
                            show_label=False,
                            container=False,
                            visible=False,
                            elem_id="kernels-other",
                            elem_classes="switch",
                            interactive=True,
                        )
                        plots["gains"] = _plot("gains")
                with gr.Column(elem_classes="instrument") as instead:
                    diff = LiveCells(views.DIFF_TEMPLATE, elem_id="kernels-diff")
                with gr.Column(elem_classes="instrument"):
                    gr.HTML('<h2 class="panel-title">timeline</h2>', apply_default_css=False)
                    plots["timeline"] = _plot("timeline")
                with gr.Column(elem_classes="instrument"):
                    with gr.Row(elem_classes="table-head"):
                        gr.HTML('<h2 class="panel-title">what calls what</h2>', apply_default_css=False)
                        method = gr.Radio(
                            [],
                            label="method",
                            show_label=False,
                            container=False,
                            elem_id="kernels-method",
                            elem_classes="switch",
                            interactive=True,
                        )
                    plots["tree"] = _plot("tree")
                with gr.Column(elem_classes="instrument"):
                    gr.HTML('<h2 class="panel-title">kernels</h2>', apply_default_css=False)
                    table = SortableTable("kernels", file_name="flora-live-kernels.csv", elem_id="kernels-table")
    with gr.Row(elem_classes="instrument footer-panel kernels-footer", equal_height=True):
        reproduce = LiveCells(
            REPRODUCE_TEMPLATE, cells_value({"command": html.escape(profiles.command(first))}), elem_id="kernels-reproduce"
        )
        exports = TraceExports(elem_id="kernels-exports")
        downloads = Downloads("kernels")

    charts = [plots[name] for name in views.CHARTS]
    redrawn = [headline, gains, instead, method, other, *charts, diff, table]
    shown = [area, phase, *redrawn, reproduce, exports]

    def begin(session: str, *values: Any) -> ProfileWork:
        return profiles.record(session, ProfileWish(*values))

    def show(measurement: Measurement) -> list[Any]:
        """All of what was found, once it is there; nothing before."""
        work: ProfileWork = measurement.work
        if work.found is None or not measurement.ended:
            return [gr.skip()] * len(shown)
        return _everything(work.found)

    @contextmanager
    def finish(measurement: Measurement) -> Iterator[list[Any]]:
        found = measurement.work.found
        with downloads.offer(None if found is None else report_of(found.profile)) as files:
            yield files

    for part, inputs, start in (
        (recording, [kind, methods, rows, rank, captured], begin),
        (opening, [file], profiles.open),
    ):
        part.connect(inputs, start, shown, show)
        part.at_the_end(downloads.buttons, finish)

    def opened() -> list[Any]:
        """The recordings there are."""
        choices = [(f"{one.name} · {one.where}", one.name) for one in profiles.recorded()]
        return [gr.Column(visible=bool(choices)), gr.Dropdown(choices=choices)]

    def look_at_recorded(request: gr.Request, name: str | None) -> list[Any]:
        try:
            found = profiles.look_at_recorded(request.session_hash, name or "")
        except RequestError as error:
            return [views.recorded_words(sentence(error)), *[gr.skip()] * len(shown)]
        return [views.recorded_words(""), *_everything(found)]

    def offer(request: gr.Request) -> Iterator[list[Any]]:
        found = profiles.of(request.session_hash)
        with downloads.offer(None if found is None else report_of(found.profile)) as files:
            yield files

    tab.select(opened, None, [recorded_panel, recorded], **_QUIET)
    recorded.input(look_at_recorded, [recorded], [recorded_words, *shown], **_QUIET).then(
        offer, None, downloads.buttons, show_progress="hidden", api_visibility="private"
    )

    def redraw(request: gr.Request, chosen: str | None, tree: str | None, beside: str | None) -> list[Any]:
        found = profiles.of(request.session_hash)
        if found is None:
            return [gr.skip()] * len(redrawn)
        return _of_phase(found, chosen if chosen in found.profile.phases else found.profile.phases[0], tree, beside)

    def adjust(*values: Any) -> Any:
        try:
            return cells_value({"command": html.escape(profiles.command(ProfileWish(*values)))})
        except RequestError:
            return gr.skip()  # Profile says what is wrong

    looks = [phase, method, other]
    for control in looks:
        control.input(redraw, looks, redrawn, **_QUIET)
    controls = [kind, methods, rows, rank, captured]
    gr.on([control.change for control in controls], adjust, controls, [reproduce], trigger_mode="always_last", **_QUIET)


def _plot(name: str) -> LivePlot:
    return LivePlot(
        views.blank_plot(), file_name=f"flora-live-kernels-{name}.csv", height_px=_CHARTS[name], elem_id=f"kernels-{name}"
    )


def _everything(found: Found) -> list[Any]:
    """Values of all that shows a profile, at the phase that is looked at first: decode, where there is one."""
    profile = found.profile
    phase = "decode" if "decode" in profile.phases else profile.phases[0]
    switch = gr.Radio(choices=list(profile.phases), value=phase, visible=len(profile.phases) > 1)
    command = cells_value({"command": html.escape(profile.facts.get("command", OPEN_COMMAND))})
    title = f"fLoRA Live: {' and '.join(label(group.method) for group in profile.of(phase))}"
    export = None if found.trace is None else found.trace.value(title, f"flora-live.{found.number}.pt.trace.json.gz")
    return [gr.Column(visible=True), switch, *_of_phase(found, phase, None, None), command, export]


def _of_phase(found: Found, phase: str, tree: str | None, other: str | None) -> list[Any]:
    profile = found.profile
    methods = [group.method or "" for group in profile.of(phase)]
    tree = tree if tree in methods else methods[0]
    other = other if other in methods[1:] else next(iter(methods[1:]), None)
    charts = views.charts(profile, phase, tree or None, other, found.number)
    named = [(label(one or None), one) for one in methods]
    beside = [(f"beside {words}", one) for words, one in named[1:]]
    return [
        views.headline(profile, phase, found.source),
        *[gr.Column(visible=len(methods) > 1)] * 2,
        gr.Radio(choices=named, value=tree, visible=len(methods) > 1),
        gr.Radio(choices=beside, value=other, visible=len(methods) > 2),
        *(charts[name] for name in views.CHARTS),
        views.difference(profile, phase, other),
        views.kernels_table(profile, phase),
    ]
