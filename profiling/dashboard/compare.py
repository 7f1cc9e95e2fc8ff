"""The *Compare* tab: one batch, two methods side by side, live."""

from __future__ import annotations

import html
import itertools
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from flora.engine import Engine, Request
from flora.errors import AudioError, FloraError, RequestError
from flora.ops import METHODS
from profiling import workload
from profiling.compare import compare
from profiling.compare_report import report_of
from profiling.dashboard.batch import BatchEditor
from profiling.dashboard.device import MAX_IN_LINE, SERVER_ERROR, Device, StopSignals, in_line
from profiling.dashboard.downloads import Downloads
from profiling.dashboard.live_cells import LiveCells, cells_value
from profiling.dashboard.live_plot import LivePlot
from profiling.dashboard.menus import Follower
from profiling.dashboard.results import (
    FIGURES_TEMPLATE,
    REPRODUCE_TEMPLATE,
    STATUS_TEMPLATE,
    TABLE_TEMPLATE,
    Results,
    Row,
    sentence,
)
from profiling.figures import METHOD_STYLES

logger = logging.getLogger(__name__)

UPDATE_S = 0.35  # how often the page is told what happened
MAX_NEW_TOKENS = 256
MAX_TEMPERATURE = 2
MAX_PROMPT_CHARACTERS = 20_000
WARMUP_STEPS = 5

_run_numbers = itertools.count(1)


def build_compare_tab(engines: Mapping[str, Engine], device: Device, stops: StopSignals) -> Follower:
    """Lay out the tab and wire it; call it inside a `gr.Blocks` context.

    engines: kind -> engine. device: the thread all comparisons of this process share. stops: each browser session's Stop button.
    """
    empty = Results()

    with gr.Row(equal_height=False, elem_classes="bench"):
        with gr.Column(scale=4, min_width=300, elem_classes="instrument batch-panel"):
            batch = BatchEditor(engines)
            with gr.Row(elem_classes="controls"):
                left = gr.Dropdown(
                    _method_choices(), value="flora", label="left", min_width=90, elem_id="left-method", interactive=True
                )
                right = gr.Dropdown(
                    _method_choices(), value="bmm-lora", label="right", min_width=90, elem_id="right-method", interactive=True
                )
                # Their limits are checked in the handler, which can say what is wrong beside the button.
                max_new_tokens = gr.Number(
                    workload.MAX_NEW_TOKENS, label="new tokens", precision=0, min_width=60, elem_id="max-new-tokens"
                )
                temperature = gr.Number(0, label="temperature", step=0.1, min_width=60, elem_id="temperature")
            with gr.Row(elem_classes="run-buttons"):
                run = gr.Button("Run", variant="primary", scale=2, min_width=90, elem_id="run")
                stop = gr.Button("Stop", variant="secondary", scale=1, min_width=70, interactive=False, elem_id="stop")
        with gr.Column(scale=8, min_width=300, elem_classes="instrument"):
            status = LiveCells(STATUS_TEMPLATE, empty.status(), elem_id="status")
            figures = LiveCells(FIGURES_TEMPLATE, empty.figures(), elem_id="figures")
            chart = LivePlot(empty.chart(), file_name="flora-live-steps.csv", elem_id="chart")
            table = LiveCells(TABLE_TEMPLATE, empty.table(), elem_id="results")
    with gr.Row(elem_classes="instrument footer-panel", equal_height=True):
        reproduce = LiveCells(
            REPRODUCE_TEMPLATE,
            cells_value({"command": "after a run, the command that repeats it stands here"}),
            elem_id="reproduce",
        )
        downloads = Downloads("compare")

    batch.connect()
    views = [status, figures, chart, table, reproduce, *downloads.buttons, run, stop]

    def arm(request: gr.Request):
        """Answers the button at once, before the run has its turn on the device."""
        stops.arm(request.session_hash)
        return _status("waiting", "waiting for the device"), gr.Button(interactive=False), gr.Button(interactive=True)

    def handler(request: gr.Request, left_method: str, right_method: str, num_tokens, heat, *values: Any):
        wanted = _Wanted(tuple(batch.rows(values)), (left_method, right_method), num_tokens, heat)
        try:
            yield from _run(engines, device, stops.flag(request.session_hash), wanted, downloads)
        except Exception:  # a fault of ours: in the server's log in full, on the page one sentence without the server's insides
            logger.exception("the Compare tab broke off")
            untouched = [gr.skip()] * (len(views) - 3)
            yield [_status("failed", SERVER_ERROR), *untouched, gr.Button(interactive=True), gr.Button(interactive=False)]

    def could_not_begin():
        """Gradio itself refused the run: too many wait, or what the browser sent makes no sense; a notice says which."""
        refused = _status("failed", "The run could not begin: try again in a minute, or reload the page.")
        return refused, gr.Button(interactive=True), gr.Button(interactive=False)

    def stop_run(request: gr.Request):
        stops.raise_flag(request.session_hash)
        return gr.Button(interactive=False)

    quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    running = run.click(arm, None, [status, run, stop], **quiet).then(
        handler,
        [left, right, max_new_tokens, temperature, *batch.inputs],
        views,
        concurrency_id="device",
        concurrency_limit=MAX_IN_LINE,  # a run that waits its turn says so; the device itself takes one at a time
        show_progress="hidden",
        api_visibility="private",
    )
    running.failure(could_not_begin, None, [status, run, stop], **quiet)
    stop.click(stop_run, None, [stop], **quiet)
    return batch.follower()


@dataclass(frozen=True)
class _Wanted:
    """What the visitor asked for when Run was pressed."""

    rows: tuple[Mapping[str, Any], ...]  # of BatchEditor.rows
    methods: tuple[str, str]
    max_new_tokens: float | None
    temperature: float | None

    def refusal(self) -> str | None:
        """Why nothing of it can run, or None."""
        if not self.rows:
            return "The batch is empty: add a code prompt or an audio clip."
        if len(set(self.methods)) < 2:
            return f"Both sides are set to {METHOD_STYLES[self.methods[0]].label}: choose two different methods."
        if self.max_new_tokens is None or not 1 <= self.max_new_tokens <= MAX_NEW_TOKENS:
            return f"New tokens must be a whole number from 1 to {MAX_NEW_TOKENS}."
        if self.temperature is None or not 0 <= self.temperature <= MAX_TEMPERATURE:
            return f"The temperature must be a number from 0, always the likeliest token, to {MAX_TEMPERATURE}."
        return None


def _status(state: str, words: str) -> dict[str, Any]:
    """The status line alone, for when there are no results to go with it."""
    results = Results()
    results.state, results.words = state, words
    return results.status()


def _run(
    engines: Mapping[str, Engine], device: Device, stopped: threading.Event, wanted: _Wanted, downloads: Downloads
) -> Iterator[list[Any]]:
    """Run one batch and yield the values of the tab's views a few times a second."""
    refusal = wanted.refusal()
    shown = [Row(row["kind"], row["adapter"], row.get("prompt") or "", Path(row.get("audio") or "").name) for row in wanted.rows]
    requests, positions, audio_names = [], [], {}
    for position, row in enumerate(wanted.rows if refusal is None else ()):
        try:
            made = _request(row, engines, wanted)
        except FloraError as error:
            shown[position].error = sentence(error)
        else:
            if row["kind"] == "speech":
                audio_names[len(requests)] = _shown_name(row["audio"])
            requests.append(made)
            positions.append(position)
    results = Results(() if refusal else wanted.methods, () if refusal else shown, positions, run=next(_run_numbers))

    def views(running: bool, files: Sequence[Any] | None = None, command: str | None = None) -> list[Any]:
        reproduce = gr.skip() if command is None else cells_value({"command": html.escape(command)})
        buttons = [gr.skip()] * len(downloads.buttons) if files is None else list(files)
        live = [results.status(), results.figures(), results.chart(), results.table()]
        return [*live, reproduce, *buttons, gr.Button(interactive=not running), gr.Button(interactive=running)]

    if refusal is None and not requests:
        refusal = "No row can run: see the red lines."
    if refusal is not None or stopped.is_set():
        results.fail(refusal or "Stopped before it began.")
        yield views(running=False)
        return

    results.state, results.words = "running", "preparing the batch"
    yield views(running=True, files=downloads.none())
    comparison = partial(
        compare,
        engines,
        requests,
        wanted.methods,
        warmup_steps=WARMUP_STEPS,
        should_stop=lambda: stopped.is_set() or device.closing.is_set(),
        audio_names=audio_names,
    )
    try:
        under_way = device.start(comparison)
    except RequestError as error:
        results.fail(sentence(error))
        yield views(running=False)
        return
    try:
        while ahead := device.num_ahead(under_way):
            if stopped.is_set():
                results.fail("Stopped before it began.")
                yield views(running=False)
                return
            results.state = "waiting"
            results.words = in_line(ahead)
            yield views(running=True)
            time.sleep(UPDATE_S)
        while not under_way.done:
            for event in under_way.fetch(UPDATE_S):
                results.apply(event)
            if not under_way.done:
                yield views(running=True)
    finally:  # also when the browser has gone: the device must not go on for nobody
        under_way.abandoned = True
        stopped.set()
    if isinstance(under_way.error, FloraError):
        results.fail(sentence(under_way.error))
    elif under_way.error is not None:
        logger.error("a comparison broke off", exc_info=under_way.error)
        results.fail(SERVER_ERROR)
    if results.result is None or not results.result.methods:
        yield views(running=False)
        return
    with downloads.offer(report_of(results.result)) as files:
        yield views(running=False, files=files, command=results.result.command)


def _method_choices() -> list[tuple[str, str]]:
    return [(METHOD_STYLES[method].label, method) for method in METHODS]


def _shown_name(path: str) -> str:
    """A shipped clip by its place in the project, a visitor's by its name alone."""
    name = Path(path).name
    shipped = workload.ASSETS / "clips" / name
    return f"assets/clips/{name}" if shipped.is_file() else name


def _request(row: Mapping[str, Any], engines: Mapping[str, Engine], wanted: _Wanted) -> Request:
    """The engine's request of a visible row. Raises the named error of what is wrong with it."""
    options = {
        "adapter": row["adapter"],
        "max_new_tokens": int(wanted.max_new_tokens),
        "temperature": float(wanted.temperature),
    }
    if row["kind"] == "code":
        prompt = row["prompt"] or ""
        if not prompt.strip():
            raise RequestError("the prompt is empty: type the beginning of a function, or remove the row")
        check_prompt_length(prompt)
        return Request(prompt=prompt, **options)
    if row["audio"] is None:
        raise AudioError("this row has no clip: record or upload one, choose an example, or remove the row")
    samples, sampling_rate = workload.load_audio(row["audio"], engines["speech"].window_s)
    return Request(audio=samples, sampling_rate=sampling_rate, **options)


def check_prompt_length(prompt: str) -> None:
    """Raise RequestError for a prompt so long that even counting its tokens would hold up the others."""
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise RequestError(
            f"the prompt has {len(prompt):,} characters, more than the {MAX_PROMPT_CHARACTERS:,} allowed: shorten it"
        )
