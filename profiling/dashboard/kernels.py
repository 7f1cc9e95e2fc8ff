"""The *Kernels* tab: steps of two or more methods under torch.profiler, which kernels they run, and what one launches instead."""

from __future__ import annotations

import html
import json
import shlex
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from flora.engine import Engine
from flora.errors import RequestError
from flora.models import KNOWN_MODELS
from flora.names import public_name
from flora.ops import METHODS
from profiling import workload
from profiling.compare import checked_methods
from profiling.dashboard import kernels_views as views
from profiling.dashboard.downloads import Downloads
from profiling.dashboard.live_cells import LiveCells, cells_value
from profiling.dashboard.live_plot import LivePlot
from profiling.dashboard.measuring import Measurement, Measurements, Measuring
from profiling.dashboard.menus import Menu
from profiling.dashboard.results import REPRODUCE_TEMPLATE, sentence
from profiling.dashboard.sortable_table import SortableTable
from profiling.dashboard.trace_exports import ServedTrace, ServedTraces, TraceExports
from profiling.events import HowFar
from profiling.figures import METHOD_STYLES
from profiling.kernels_report import OPEN_COMMAND, label, report_of
from profiling.load_runs import servable_by
from profiling.options import weight_words
from profiling.profile_job import PROFILE, TRACE, JobFailed, OpenJob, RecordJob, do
from profiling.recorded import Recording, recordings
from profiling.trace_file import SUFFIXES, TraceError
from profiling.trace_profile import TraceProfile, profile_of_rows

PREFILLS, STEPS, WARMUP = 4, 8, 3
MOST_ROWS, MOST_METHODS = 32, 4
RANKS = (1, 2, 4, 8, 16, 32)
_CHARTS = {"breakdown": 196, "gains": 236, "timeline": 360, "tree": 300}  # heights in pixels
_QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
_RECORD, _OPEN = "kernels", "kernels-open"  # names of the two measurements that a visitor may have here


@dataclass(frozen=True)
class ProfileWish:
    """What a visitor's controls say. rank: of random adapters; 0 for the model's own."""

    kind: str
    methods: Sequence[str]
    rows: float
    rank: int
    captured: bool

    def __post_init__(self) -> None:
        methods = [method for method in self.methods or () if isinstance(method, str)]
        if not 2 <= len(methods) <= MOST_METHODS:
            raise RequestError(f"choose two to {MOST_METHODS} methods, to be seen side by side")
        checked_methods(methods)
        if isinstance(self.rows, bool) or not isinstance(self.rows, int | float) or not 1 <= self.rows <= MOST_ROWS:
            raise RequestError(f"the number of rows must be from 1 to {MOST_ROWS}")
        if self.rank not in (0, *RANKS):
            raise RequestError(f"the rank of random adapters must be one of {', '.join(map(str, RANKS))}")


@dataclass(frozen=True)
class Found:
    """A profile that a visitor looks at. folder: where its files lie, the owner's to remove; None for a recorded one, whose trace
    was not kept. source: live, opened or recorded. number: of all in this process."""

    profile: TraceProfile
    folder: Path | None
    trace: ServedTrace | None
    source: str
    number: int


class ProfileWork:
    """A `measuring.Work`: one job in a process of its own, and what came of it. root: where it makes its folder. keep: given that,
    with what was made."""

    def __init__(self, job: RecordJob | OpenJob, root: str, keep: Callable[[RecordJob | OpenJob, Path], Found]) -> None:
        self._job, self._root, self._keep = job, root, keep
        self.found: Found | None = None

    def measure(self, should_stop: Callable[[], bool]) -> Iterator[Any]:
        folder = Path(tempfile.mkdtemp(dir=self._root))
        try:
            for progress in do(self._job, folder, should_stop):
                yield HowFar(progress.words, progress.share)
            if (folder / PROFILE).is_file() and not should_stop():
                yield folder
                folder = None
        except JobFailed as error:
            if error.ours:
                raise
            raise RequestError(error.words) from error
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def take(self, event: Path) -> None:
        self.found = self._keep(self._job, event)


class KernelProfiles:
    """What each visitor looks at: the last profile that was recorded or opened, and its files."""

    def __init__(self, engines: Mapping[str, Engine], results_folder: Path) -> None:
        """results_folder: where recorded results are."""
        self.engines, self._results_folder = engines, results_folder
        self.traces = ServedTraces()
        self.root = tempfile.TemporaryDirectory(prefix="flora-live-")  # of all folders, also of results that nobody fetched
        self._lock = threading.Lock()
        self._found: dict[str, Found] = {}
        self._number = 0

    def of(self, session: str) -> Found | None:
        return self._found.get(session)

    def keep(self, session: str, job: RecordJob | OpenJob, folder: Path) -> Found:
        """Let a session look at what a job has left in a folder, from now on."""
        profile = TraceProfile.from_dict(json.loads((folder / PROFILE).read_bytes()))
        if isinstance(job, OpenJob):
            source = "opened from a file of yours, not measured here"
            trace = self.traces.add(Path(job.path), "trace.json" + ".gz" * job.path.lower().endswith(".gz"))
        else:
            source = "live, on this machine, under torch.profiler"
            trace = self.traces.add(folder / TRACE, "flora-live-trace.json.gz")
        return self._look_at(session, profile, folder, trace, source)

    def look_at_recorded(self, session: str, name: str) -> Found:
        """Let a session look at a recording. Raises RequestError where it is not there, or makes no sense."""
        recording = next((one for one in self.recorded() if one.name == name), None)
        if recording is None:
            raise RequestError("this recording is no longer there: choose another")
        try:
            profile = profile_of_rows(recording.rows)
        except TraceError as error:
            raise RequestError(f"{name}: {error}") from error
        return self._look_at(session, profile, None, None, f"recorded, not live: {name}")

    def recorded(self) -> list[Recording]:
        """The profiles among the recorded results."""
        return recordings(self._results_folder, "kernels").found

    def _look_at(self, session: str, profile: TraceProfile, folder: Path | None, trace: ServedTrace | None, source: str) -> Found:
        with self._lock:
            self._number += 1
            found = Found(profile, folder, trace, source, self._number)
            before, self._found[session] = self._found.get(session), found
        if before is not None:
            self._remove(before)
        return found

    def forget(self, session: str) -> None:
        """The browser has gone: keep nothing of it."""
        with self._lock:
            found = self._found.pop(session, None)
        if found is not None:
            self._remove(found)

    def close(self) -> None:
        """The server is going down."""
        for session in list(self._found):
            self.forget(session)
        self.root.cleanup()

    def _remove(self, found: Found) -> None:
        if found.folder is not None:
            self.traces.remove(found.trace)
            shutil.rmtree(found.folder, ignore_errors=True)

    def record(self, session: str, wish: ProfileWish) -> ProfileWork:
        """What profiles the model that serves now. Raises a FloraError that says what cannot be profiled."""
        return ProfileWork(self.job(wish), self.root.name, partial(self.keep, session))

    def open(self, session: str, path: Any) -> ProfileWork:
        """What reads a visitor's trace. path: where gradio has put the upload."""
        if not isinstance(path, str) or not path:
            raise RequestError("choose a trace first: a .json or .json.gz file, as torch.profiler's export_chrome_trace writes it")
        if not path.lower().endswith(SUFFIXES):
            raise RequestError("a trace is a .json or .json.gz file, as torch.profiler's export_chrome_trace writes it")
        return ProfileWork(OpenJob(path), self.root.name, partial(self.keep, session))

    def job(self, wish: ProfileWish) -> RecordJob:
        """The wish with all that another process needs to load the engine that serves."""
        if wish.kind not in self.engines:
            raise RequestError("no model of this kind serves here: choose another")
        engine = self.engines[wish.kind]
        tags = servable_by({wish.kind: engine}, wish.methods)[wish.kind]
        if not tags and not wish.rank and any(method != "base" for method in wish.methods):
            raise RequestError("no adapter of the model can be served by each of these methods: choose random ones")
        sources = {tag: list(engine.adapters[tag].sources) for tag in tags[:MOST_ROWS]}
        # Random adapters lie nowhere: the other process makes some of the same rank.
        lies = all(Path(source.partition("#")[0]).exists() or source.count("/") == 1 for own in sources.values() for source in own)
        rank = wish.rank or (None if lies else max(max(engine.adapters[tag].ranks.values()) for tag in sources))
        here = Path(engine.model.name_or_path or ".")
        is_folder = bool(engine.model.name_or_path) and here.is_dir() and engine.name not in KNOWN_MODELS
        return RecordJob(
            kind=wish.kind,
            model=str(here.resolve()) if is_folder else engine.name,
            adapters={tag: [_absolute(one) for one in own] for tag, own in sources.items()},
            methods=list(wish.methods),
            rows=int(wish.rows),
            rank=rank,
            prefills=PREFILLS,
            steps=STEPS,
            warmup=WARMUP,
            device=engine.device.type,
            dtype=str(engine.dtype).removeprefix("torch."),
            weights=engine.weights,
            quantize=engine.quantize,
            llm_int8_threshold=engine.llm_int8_threshold,
            captured=bool(wish.captured),
            threads=torch.get_num_threads(),
            command=self.command(wish, rank),
        )

    def command(self, wish: ProfileWish, rank: int | None = None) -> str:
        """The `python -m profiling kernels …` that profiles the same, quoted for a shell."""
        engine, rank = self.engines[wish.kind], rank or wish.rank
        words = ["python", "-m", "profiling", "kernels", "--methods", *wish.methods, "--kind", wish.kind]
        if engine.name != wish.kind:  # the embedded models' folders are named after their kind
            words += [f"--{wish.kind}-model", public_name(engine.name)]
        given = [] if rank else workload.adapters_given(engine, wish.kind, set(engine.adapters))
        words += [f"--{wish.kind}-adapters", *given] if given else []
        words += ["--rows", str(int(wish.rows)), *(["--rank", str(rank)] if rank else []), *["--captured"] * bool(wish.captured)]
        words += ["--device", engine.device.type, "--dtype", str(engine.dtype).removeprefix("torch."), *weight_words(engine)]
        return shlex.join([*words, "--threads", str(torch.get_num_threads())])


def _absolute(source: str) -> str:
    """A checkpoint's folder, seen from anywhere; a hub id as it is."""
    return str(Path(source).resolve()) if Path(source.partition("#")[0]).exists() else source


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
    redrawn = [headline, gains, instead, method, *charts, diff, table]
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

    def redraw(request: gr.Request, chosen: str | None, tree: str | None) -> list[Any]:
        found = profiles.of(request.session_hash)
        if found is None:
            return [gr.skip()] * len(redrawn)
        return _of_phase(found, chosen if chosen in found.profile.phases else found.profile.phases[0], tree)

    def adjust(*values: Any) -> Any:
        try:
            return cells_value({"command": html.escape(profiles.command(ProfileWish(*values)))})
        except RequestError:
            return gr.skip()  # Profile says what is wrong

    for control in (phase, method):
        control.input(redraw, [phase, method], redrawn, **_QUIET)
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
    return [gr.Column(visible=True), switch, *_of_phase(found, phase, None), command, export]


def _of_phase(found: Found, phase: str, tree: str | None) -> list[Any]:
    profile = found.profile
    methods = [group.method or "" for group in profile.of(phase)]
    tree = tree if tree in methods else methods[0]
    charts = views.charts(profile, phase, tree or None, found.number)
    return [
        views.headline(profile, phase, found.source),
        *[gr.Column(visible=len(methods) > 1)] * 2,
        gr.Radio(choices=[(label(one or None), one) for one in methods], value=tree, visible=len(methods) > 1),
        *(charts[name] for name in views.CHARTS),
        views.difference(profile, phase),
        views.kernels_table(profile, phase),
    ]


