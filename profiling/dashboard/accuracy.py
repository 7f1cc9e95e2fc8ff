"""The *Accuracy* tab: how good each language's adapters are, as recorded here and as the paper printed it, and what they answer."""

from __future__ import annotations

import html
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from flora.evaluate.rows import Item, to_line
from profiling import accuracy, report, workload
from profiling.accuracy import Recorded, read_recorded
from profiling.accuracy_figures import TabledChart, measured_dots, paper_dots
from profiling.dashboard import accuracy_views as views
from profiling.dashboard.live_cells import LiveCells, cells_value
from profiling.dashboard.live_plot import LivePlot, plot_value
from profiling.dashboard.menus import Menu
from profiling.dashboard.results import REPRODUCE_TEMPLATE

_TASKS = {"Code": "code", "Speech": "speech"}
_CHART_PX = 380
_DOWNLOADS = ("scores JSONL", "scores CSV", "answers JSONL")
_QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def build_accuracy_tab(tab: gr.Tab, results_folder: Path) -> None:
    """Lay out the tab and wire it; call it inside `tab`'s context.

    results_folder: where `python -m flora.evaluate` left its rows. It is read when the tab is opened, and not before.
    """
    blank = TabledChart({"data": [], "layout": {}}, "Nothing is drawn yet.", [])
    with gr.Row(elem_classes="accuracy-top"):
        task = gr.Radio(
            list(_TASKS),
            value="Code",
            label="task",
            show_label=False,
            container=False,
            elem_id="accuracy-task",
            elem_classes="switch",
            interactive=True,
        )
        downloads = [
            gr.DownloadButton(
                name, size="sm", scale=0, min_width=70, interactive=False, elem_id=f"accuracy-{name}".replace(" ", "-")
            )
            for name in _DOWNLOADS
        ]
    status = LiveCells(views.STATUS_TEMPLATE, elem_id="accuracy-status")
    with gr.Column(elem_classes="instrument"):
        headline = LiveCells(views.HEADLINE_TEMPLATE, elem_id="accuracy-headline")
    with gr.Row(equal_height=False, elem_classes="accuracy-charts"):
        with gr.Column(min_width=300, elem_classes="instrument"):
            measured_heading = LiveCells(views.MEASURED_TEMPLATE, elem_id="accuracy-measured-heading")
            measured = LivePlot(_plot(blank), file_name="flora-live-accuracy.csv", height_px=_CHART_PX, elem_id="accuracy-measured")
            reproduce = LiveCells(REPRODUCE_TEMPLATE, elem_id="accuracy-reproduce")
        with gr.Column(min_width=300, elem_classes="instrument"):
            printed_heading = LiveCells(views.PRINTED_TEMPLATE, elem_id="accuracy-printed-heading")
            printed = LivePlot(_plot(blank), file_name="paper-accuracy.csv", height_px=_CHART_PX, elem_id="accuracy-printed")
            recipe = LiveCells(views.RECIPE_TEMPLATE, elem_id="accuracy-recipe")
    with gr.Row(equal_height=False, elem_classes="accuracy-details"):
        with gr.Column(min_width=300, elem_classes="instrument"):
            matrix = LiveCells(views.MATRIX_TEMPLATE, elem_id="accuracy-matrix")
        with gr.Column(min_width=300, elem_classes="instrument"):
            gr.HTML('<h2 class="panel-title">what each one answers</h2>', apply_default_css=False)
            with gr.Row(elem_classes="controls"):
                language = Menu([], label="language", min_width=90, elem_id="accuracy-language", interactive=True)
                item = Menu([], label="item", min_width=160, elem_id="accuracy-item", interactive=True)
            clip = gr.Audio(
                type="filepath",
                label="the clip",
                show_label=False,
                container=False,
                interactive=False,
                visible=False,
                buttons=[],
                elem_id="accuracy-clip",
                elem_classes="clip-box",
                waveform_options=gr.WaveformOptions(waveform_color="#8a97a3", waveform_progress_color="#0072B2"),
            )
            answers = LiveCells(views.ANSWERS_TEMPLATE, elem_id="accuracy-answers")

    headings = [measured_heading, printed_heading, recipe]
    browser = [language, item, clip, answers]
    everything = [status, headline, *headings, measured, printed, reproduce, matrix, *browser]

    def show(choice: str, tag: str | None, name: str | None) -> list[Any]:
        recorded = read_recorded(results_folder, _TASKS[choice])
        command = "\n".join(views.commands(recorded))
        return [
            views.status(recorded),
            views.headline(recorded),
            *[views.headings(recorded)] * len(headings),
            _plot(measured_dots(recorded.task, recorded.scores, recorded.means)),
            _plot(paper_dots(recorded.task)),
            cells_value({"command": html.escape(command)}),
            views.matrix(recorded),
            *_browse(recorded, tag, name),
        ]

    def browse(choice: str, tag: str | None, name: str | None) -> list[Any]:
        return _browse(read_recorded(results_folder, _TASKS[choice]), tag, name)

    def offer(choice: str):
        recorded = read_recorded(results_folder, _TASKS[choice])
        with tempfile.TemporaryDirectory(prefix="flora-live-") as folder:  # gradio copies the files while this waits in `yield`
            yield _downloads(recorded, Path(folder))

    chosen = [task, language, item]
    for event in (tab.select, task.input):
        event(show, chosen, everything, **_QUIET).then(offer, task, downloads, show_progress="hidden", api_visibility="private")
    for menu in (language, item):
        menu.input(browse, chosen, browser, **_QUIET)


def _plot(chart: TabledChart) -> dict[str, Any]:
    return plot_value(chart.figure, chart.description, chart.table)


def _browse(recorded: Recorded, tag: str | None, name: str | None) -> list[Any]:
    """The item browser's menus, player and answers; a language or item that is not there is replaced by one that is."""
    tags = views.item_languages(recorded)
    tag = tag if tag in dict(map(reversed, tags)) else tags[0][1] if tags else None
    titles = views.item_titles(recorded, tag)
    name = name if name in dict(map(reversed, titles)) else views.telling_item(recorded, tag)
    item = next((item for item in recorded.items if (item.language, item.item) == (tag, name)), None)
    clip = _clip_file(item)
    return [
        gr.Dropdown(choices=tags, value=tag),
        gr.Dropdown(choices=titles, value=name),
        gr.Audio(value=clip, visible=clip is not None),
        views.answers(recorded, item, playable=clip is not None),
    ]


def _clip_file(item: Item | None) -> str | None:
    """The item's clip where it is one that ships; never another file that a row may name."""
    if item is None or item.clip is None:
        return None
    clips = (workload.ASSETS / "clips").resolve()
    file = (workload.ASSETS.parent / item.clip).resolve()
    return str(file) if file.is_relative_to(clips) and file.is_file() else None


def _downloads(recorded: Recorded, folder: Path) -> list[gr.DownloadButton]:
    """The rows as files in `folder`; a button without rows stays grey."""
    task = recorded.task
    files = {
        folder / f"accuracy_{task}.jsonl": "".join(to_line(row) + "\n" for row in recorded.scores + recorded.means),
        folder / f"accuracy_{task}.csv": report.frame_csv(accuracy.scores_frame(recorded.scores)) if recorded.scores else "",
        folder / f"answers_{task}.jsonl": "".join(to_line(row) + "\n" for row in recorded.items + recorded.answers),
    }
    for path, text in files.items():
        report.write_text(path, text)
    return [gr.DownloadButton(value=str(path) if text else None, interactive=bool(text)) for path, text in files.items()]
