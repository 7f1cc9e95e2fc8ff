"""The *Compare* tab: one batch, two methods side by side, live."""

from __future__ import annotations

import html
import itertools
import logging
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from flora.engine import Engine, Request
from flora.errors import AudioError, FloraError, RequestError
from flora.ops import METHODS
from profiling import report, workload
from profiling.compare import ComparisonResult, compare
from profiling.dashboard.batch import BatchEditor
from profiling.dashboard.device import SERVER_ERROR, Device, StopSignals
from profiling.dashboard.live_cells import LiveCells, cells_value
from profiling.dashboard.live_plot import LivePlot
from profiling.figures import METHOD_STYLES
from profiling.dashboard.results import FIGURES_TEMPLATE, REPRODUCE_TEMPLATE, STATUS_TEMPLATE, TABLE_TEMPLATE, Results, Row

logger = logging.getLogger(__name__)

UPDATE_S = 0.35  # how often the page is told what happened
MAX_NEW_TOKENS = 256
WARMUP_STEPS = 5
_DOWNLOADS = ("JSONL", "CSV", "report.html")

_run_numbers = itertools.count(1)


def build_compare_tab(engines: Mapping[str, Engine], device: Device, stops: StopSignals) -> None:
    """Lay out the tab and wire it; call it inside a `gr.Blocks` context.

    engines: kind -> engine. device: the thread all comparisons of this process share. stops: each browser session's Stop button.
    """
    empty = Results()

    with gr.Row(equal_height=False, elem_classes="bench"):
        with gr.Column(scale=4, min_width=300, elem_classes="instrument batch-panel"):
            batch = BatchEditor({kind: list(engine.adapters) for kind, engine in engines.items()})
            with gr.Row(elem_classes="controls"):
                left = gr.Dropdown(_method_choices(), value="flora", label="left", min_width=90, elem_id="left-method", interactive=True)
                right = gr.Dropdown(_method_choices(), value="bmm-lora", label="right", min_width=90, elem_id="right-method", interactive=True)
                max_new_tokens = gr.Number(
                    workload.MAX_NEW_TOKENS, label="new tokens", minimum=1, maximum=MAX_NEW_TOKENS, precision=0, min_width=60, elem_id="max-new-tokens"
                )
                temperature = gr.Number(0, label="temperature", minimum=0, maximum=2, step=0.1, min_width=60, elem_id="temperature")
            with gr.Row(elem_classes="run-buttons"):
                run = gr.Button("Run", variant="primary", scale=2, min_width=90, elem_id="run")
                stop = gr.Button("Stop", variant="secondary", scale=1, min_width=70, interactive=False, elem_id="stop")
        with gr.Column(scale=8, min_width=300, elem_classes="instrument"):
            status = LiveCells(STATUS_TEMPLATE, empty.status(), elem_id="status")
            figures = LiveCells(FIGURES_TEMPLATE, empty.figures(), elem_id="figures")
            chart = LivePlot(empty.chart(), file_name="flora-live-steps.csv", elem_id="chart")
            table = LiveCells(TABLE_TEMPLATE, empty.table(), elem_id="results")
    with gr.Row(elem_classes="instrument footer-panel", equal_height=True):
        reproduce = LiveCells(REPRODUCE_TEMPLATE, cells_value({"command": "after a run, the command that repeats it stands here"}), elem_id="reproduce")
        downloads = [
            gr.DownloadButton(name, size="sm", scale=0, min_width=70, interactive=False, elem_id=f"download-{name.split('.')[0].lower()}")
            for name in _DOWNLOADS
        ]

    batch.connect()
    views = [status, figures, chart, table, reproduce, *downloads, stop]

    def arm(request: gr.Request):
        """Answers the button at once, before the run has its turn on the device."""
        stops.arm(request.session_hash)
        waiting = Results()
        waiting.state, waiting.words = "waiting", "waiting for the device"
        return waiting.status(), gr.Button(interactive=True)

    def handler(request: gr.Request, left_method: str, right_method: str, num_tokens: float | None, heat: float | None, *values: Any):
        yield from _run(engines, device, stops, request.session_hash, batch.rows(values), (left_method, right_method), num_tokens, heat)

    quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    run.click(arm, None, [status, stop], **quiet).then(
        handler,
        [left, right, max_new_tokens, temperature, *batch.inputs],
        views,
        concurrency_id="device",
        concurrency_limit=1,
        show_progress="minimal",
        show_progress_on=status,
        api_visibility="private",
    )

    def stop_run(request: gr.Request):
        stops.raise_flag(request.session_hash)
        return gr.Button(interactive=False)

    stop.click(stop_run, None, [stop], **quiet)


def _run(
    engines: Mapping[str, Engine],
    device: Device,
    stops: StopSignals,
    session: str,
    rows: Sequence[Mapping[str, Any]],
    methods: tuple[str, str],
    max_new_tokens: float | None,
    temperature: float | None,
) -> Iterator[list[Any]]:
    """Run one batch and yield the values of the tab's views a few times a second."""
    stopped = stops.flag(session)
    try:
        yield from _run_batch(engines, device, stopped, rows, methods, max_new_tokens, temperature)
    except Exception:  # a fault of ours: in the server's log in full, on the page one sentence without the server's insides
        logger.exception("the Compare tab broke off")
        broken = Results()
        broken.fail(SERVER_ERROR)
        yield [broken.status(), *(gr.skip() for _ in range(4 + len(_DOWNLOADS))), gr.Button(interactive=False)]


def _run_batch(
    engines: Mapping[str, Engine],
    device: Device,
    stopped: threading.Event,
    rows: Sequence[Mapping[str, Any]],
    methods: tuple[str, str],
    max_new_tokens: float | None,
    temperature: float | None,
) -> Iterator[list[Any]]:
    shown = [Row(row["kind"], row["adapter"], row.get("prompt") or "", Path(row.get("audio") or "").name) for row in rows]
    requests, positions, audio_names = [], [], {}
    for position, row in enumerate(rows):
        try:
            made = _request(row, engines, max_new_tokens, temperature)
        except FloraError as error:
            shown[position].error = str(error)
        else:
            if row["kind"] == "speech":
                audio_names[len(requests)] = _shown_name(row["audio"])
            requests.append(made)
            positions.append(position)
    results = Results(methods if len(set(methods)) == 2 else (), shown, positions, run=next(_run_numbers))

    def views(running: bool, files: Sequence[Any] | None = None, command: str | None = None) -> list[Any]:
        reproduce = gr.skip() if command is None else cells_value({"command": html.escape(command)})
        buttons = [gr.skip()] * 3 if files is None else list(files)
        return [results.status(), results.figures(), results.chart(), results.table(), reproduce, *buttons, gr.Button(interactive=running)]

    refusal = None
    if not rows:
        refusal = "The batch is empty: add a code prompt or an audio clip."
    elif not requests:
        refusal = "No row can run: see the red lines."
    elif len(set(methods)) < 2:
        refusal = f"Both sides are set to {methods[0]}: choose two different methods."
    elif stopped.is_set():
        refusal = "Stopped before it began."
    if refusal is not None:
        results.fail(refusal)
        yield views(running=False)
        return

    results.state, results.words = "running", "preparing the batch"
    yield views(running=True, files=[gr.DownloadButton(interactive=False)] * 3)
    comparison = partial(
        compare, engines, requests, methods, warmup_steps=WARMUP_STEPS, should_stop=stopped.is_set, audio_names=audio_names
    )
    under_way = device.start(comparison)
    try:
        while not under_way.done:
            for event in under_way.fetch(UPDATE_S):
                results.apply(event)
            if not under_way.done:
                yield views(running=True)
    finally:
        stopped.set()  # also when the browser has gone: the device must not go on for nobody
    if isinstance(under_way.error, FloraError):
        results.fail(str(under_way.error))
    elif under_way.error is not None:
        logger.error("a comparison broke off", exc_info=under_way.error)
        results.fail(SERVER_ERROR)
    if results.result is None or not results.result.methods:
        yield views(running=False)
        return
    with tempfile.TemporaryDirectory(prefix="flora-live-") as folder:  # gradio copies the files while this generator waits in `yield`
        files = [gr.DownloadButton(value=str(path), interactive=True) for path in _write_downloads(results.result, Path(folder))]
        yield views(running=False, files=files, command=results.result.command)


def _method_choices() -> list[tuple[str, str]]:
    return [(METHOD_STYLES[method].label, method) for method in METHODS]


def _shown_name(path: str) -> str:
    """A shipped clip by its place in the project, a visitor's by its name alone."""
    name = Path(path).name
    shipped = workload.ASSETS / "clips" / name
    return f"assets/clips/{name}" if shipped.is_file() else name


def _request(row: Mapping[str, Any], engines: Mapping[str, Engine], max_new_tokens: float | None, temperature: float | None) -> Request:
    """The engine's request of a visible row. Raises the named error of what is wrong with it."""
    if max_new_tokens is None or not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
        raise RequestError(f"Max new tokens must be a whole number from 1 to {MAX_NEW_TOKENS}.")
    options = {"adapter": row["adapter"], "max_new_tokens": int(max_new_tokens), "temperature": float(temperature or 0)}
    if row["kind"] == "code":
        if not (row["prompt"] or "").strip():
            raise RequestError("The prompt is empty: type the beginning of a function, or remove the row.")
        return Request(prompt=row["prompt"], **options)
    if row["audio"] is None:
        raise AudioError("This row has no clip: record or upload one, choose an example, or remove the row.")
    samples, sampling_rate = workload.load_audio(row["audio"], engines["speech"].window_s)
    return Request(audio=samples, sampling_rate=sampling_rate, **options)


def _write_downloads(result: ComparisonResult, folder: Path) -> list[Path]:
    """JSONL, CSV and report of a run as files in `folder`."""
    paths = [folder / "comparison.jsonl", folder / "comparison.csv", folder / "report.html"]
    for path in paths:
        path.write_text(report.render(result, path), encoding="utf-8")
    return paths
