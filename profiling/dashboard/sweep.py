"""The *Sweep* tab: step time, throughput and latency by rank, and where fLoRA stops winning."""

from __future__ import annotations

import argparse
import html
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gradio as gr

from flora.engine import Engine
from flora.errors import RequestError
from flora.ops import METHODS
from profiling import hardware
from profiling.calibration import costs_in_steps
from profiling.cost_model import MachineCosts
from profiling.dashboard import sweep_views as views
from profiling.dashboard.device import GIVE_WAY
from profiling.dashboard.downloads import Downloads
from profiling.dashboard.live_cells import LiveCells, cells_value
from profiling.dashboard.live_plot import LivePlot
from profiling.dashboard.measuring import Measurement, Measurements, Measuring
from profiling.dashboard.menus import MultiMenu
from profiling.dashboard.results import REPRODUCE_TEMPLATE
from profiling.events import HowFar
from profiling.figures import METHOD_STYLES
from profiling.load_command import options_of
from profiling.load_runs import LoadSettings, sources_of
from profiling.loading import load_engine, source_of
from profiling.op_lab import DTYPES
from profiling.report import Note, Report
from profiling.sweep import Measured, Sweep, SweepResult, SweepSettings
from profiling.sweep_command import command_line
from profiling.sweep_figures import Beside
from profiling.sweep_points import MEASURES, STEP_TIME, THROUGHPUT, SweepPoint
from profiling.sweep_predictions import Predictions, predictable, predictions
from profiling.sweep_report import report_of
from profiling.traffic import POPULARITIES, Lengths, Traffic

TAB = "sweep"
RANKS = (1, 2, 4, 8, 16, 32, 64)
MAX_BATCH, MAX_NEW_TOKENS, MAX_PROMPT_TOKENS = 32, 96, 192
MIN_RATE, MAX_RATE = 0.5, 50.0
AS_SERVED = "as served"
WEIGHTS = (AS_SERVED, *DTYPES, "int8")
NUM_REQUESTS, WARMUP_REQUESTS = 24, 4
CHART_PX, CROSSING_PX = 210, 300
_QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Wish:
    """What a visitor's controls say. RequestError for what makes no sense.

    prompt_tokens: 0 for prompts as long as they are. weights: of WEIGHTS; other than as they serve, the model is loaded once more.
    """

    kind: str
    methods: Sequence[str] = ("flora", "bmm-lora", "sgmv-lora")
    ranks: Sequence[int] = (1, 2, 4, 8, 16)
    measures: Sequence[str] = (STEP_TIME, THROUGHPUT)
    batch: float = 8
    new_tokens: float = 32
    prompt_tokens: float = 0
    popularity: str = "distinct"
    rate: float = 8.0
    weights: str = AS_SERVED
    keep: bool = True

    def __post_init__(self) -> None:
        for name, words, least, most in (
            ("batch", "batch", 1, MAX_BATCH),
            ("new_tokens", "number of new tokens", 4, MAX_NEW_TOKENS),
            ("prompt_tokens", "number of prompt tokens", 0, MAX_PROMPT_TOKENS),
            ("rate", "rate", MIN_RATE, MAX_RATE),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise RequestError(f"the {words} must be a number from {least:g} to {most:g}")
            if name != "rate" and value != int(value):
                raise RequestError(f"the {words} must be a whole number")
        if not isinstance(self.methods, list | tuple) or len(self.methods) < 2:
            raise RequestError("choose at least two methods: a sweep is about where they cross")
        for name, offered, words in (("ranks", RANKS, "rank"), ("measures", MEASURES, "measure"), ("methods", METHODS, "method")):
            chosen = getattr(self, name)
            if not isinstance(chosen, list | tuple) or not chosen:
                raise RequestError(f"choose at least one {words}")
            if any(one not in offered for one in chosen):
                raise RequestError(f"there is no such {words}: choose among {', '.join(map(str, offered))}")
        if self.popularity not in POPULARITIES:
            raise RequestError(f"there is no such popularity: choose among {', '.join(POPULARITIES)}")
        if self.weights not in WEIGHTS:
            raise RequestError(f"there are no such weights: choose among {', '.join(WEIGHTS)}")

    def settings(self) -> SweepSettings:
        """What is to be measured; every method's requests are the same."""
        batch = int(self.batch)
        traffic = Traffic(
            num_requests=NUM_REQUESTS,
            prompt_tokens=Lengths.parse(str(int(self.prompt_tokens))) if self.prompt_tokens else Lengths(),
            new_tokens=Lengths.parse(str(int(self.new_tokens))),
            popularity=self.popularity,
            all_adapters=True,
            mix={self.kind: 1.0},
        )
        load = LoadSettings(traffic, methods=tuple(dict.fromkeys(self.methods)), warmup_requests=WARMUP_REQUESTS)
        ranks, rates = tuple(dict.fromkeys(self.ranks)), (float(self.rate),)
        return SweepSettings(load, ranks, rates, batch, tuple(self.measures), int(self.new_tokens))


class SweepWork:
    """One visitor's sweep, on an engine of its own beside the one that serves: nobody sees its adapters, nobody joins its batch."""

    def __init__(self, engines: Mapping[str, Engine], wish: Wish, kept: Sequence[Mapping[str, Any]]) -> None:
        """kept: rows of the visitor's earlier sweeps."""
        if wish.kind not in engines:
            raise RequestError("no such model is loaded here: choose another")
        self.wish, self.settings = wish, wish.settings()
        self.rows: tuple[dict, ...] = ()
        self.points: tuple[SweepPoint, ...] = ()
        self.result: SweepResult | None = None
        self.predicted = ""
        self._engines, self._kept = engines, kept

    def _options(self) -> argparse.Namespace:
        """What `python -m profiling sweep` would be given to load the model that serves now, with these weights."""
        options = options_of({self.wish.kind: self._engines[self.wish.kind]})
        setattr(options, f"{self.wish.kind}_adapters", None)  # it makes its own
        options.max_batch_size = int(self.wish.batch)
        if self.wish.weights == "int8":
            options.quantize = "int8"
        elif self.wish.weights != AS_SERVED:
            options.dtype, options.quantize = self.wish.weights, None
        return options

    def command(self) -> str:
        """The `python -m profiling sweep …` that measures the same with the model that serves now."""
        return command_line(self.settings, self._options())

    def _own_engine(self, engine: Engine) -> Engine:
        """Beside the one that serves: of its weights, where it may be, else of the model loaded once more."""
        batch, options = int(self.wish.batch), self._options()
        room = {"adapter_slots": batch, "max_waiting": max(NUM_REQUESTS, batch)}
        if (options.dtype, options.quantize) == (str(engine.dtype).removeprefix("torch."), engine.quantize):
            return engine.beside(batch, **room)
        setattr(options, f"{self.wish.kind}_model", source_of(engine))
        return load_engine(self.wish.kind, options, with_adapters=False, max_batch_size=batch, **room)

    def measure(self, should_stop: Callable[[], bool]) -> Iterator[Any]:
        engine = self._engines[self.wish.kind]
        source = sources_of({self.wish.kind: engine})[self.wish.kind]
        source.check(self.settings.load.traffic.prompt_tokens, self.settings.load.traffic.new_tokens)
        own = self._own_engine(engine)
        try:
            sweep = Sweep(own, source, self.settings, self.command(), should_stop, rows=self._kept)
            yield sweep.result()
            if not sweep.num_missing:
                raise RequestError("all of it is measured already: clear the box below the controls to measure it anew")
            for event in sweep.run():
                if self._engines[self.wish.kind] is not engine:
                    raise RequestError(f"the {self.wish.kind} model was replaced by another: start the sweep again")
                if isinstance(event, Measured):
                    yield sweep.result()
                    yield GIVE_WAY
                else:
                    yield event
            result = sweep.result()
            yield result
            if predictable(own, self.settings) and not should_stop():
                steps = costs_in_steps(own.device, own.dtype)
                costs = yield from _calibrating(steps, should_stop)
                if costs is not None:
                    yield predictions(own, self.settings, result.points, costs)
        finally:
            own.close(timeout_s=0.0)

    def take(self, event: SweepResult | Predictions) -> None:
        if isinstance(event, Predictions):
            self.predicted = event.sentence()
        else:
            self.result, self.rows, self.points = event, event.rows, event.points

    def report(self) -> Report | None:
        """On paper; None where nothing was measured."""
        if self.result is None or not self.rows:
            return None
        return report_of(self.result, [Note(words) for words in (self.predicted, views.paper(self.rows, self.points)) if words])


def _calibrating(
    steps: Generator[float, None, MachineCosts], should_stop: Callable[[], bool]
) -> Generator[Any, None, MachineCosts | None]:
    """What stages cost on this machine, measured or known; None where it was stopped."""
    while not should_stop():
        try:
            share = next(steps)
        except StopIteration as end:
            return end.value
        yield HowFar("measuring what this machine allows, once", share)
        yield GIVE_WAY
    return None


def build_sweep_tab(
    tab: gr.Tab, engines: Mapping[str, Engine], measurements: Measurements, results_folder: Path, device_line: Callable[[], str]
) -> None:
    """Lay out the tab and wire it; call it inside `tab`'s context.

    results_folder: where recorded sweeps lie; it is read when the tab is opened. device_line: says what computes, in words.
    """
    kinds = list(engines)
    first = Wish(kinds[0])
    measuring = Measuring(measurements, TAB, "nothing is measured")
    with gr.Row(equal_height=False, elem_classes="bench load sweep"):
        with gr.Column(scale=4, min_width=300, elem_classes="instrument load-panel sweep-panel"):
            gr.HTML('<h2 class="panel-title">sweep over ranks</h2>', apply_default_css=False)
            with gr.Row(elem_classes="controls load-menus"):
                kind = gr.Dropdown(kinds, value=kinds[0], label="model", min_width=90, elem_id="sweep-kind", interactive=True)
                popularity = gr.Dropdown(
                    list(POPULARITIES),
                    value=first.popularity,
                    label="popularity of adapters",
                    min_width=90,
                    elem_id="sweep-popularity",
                    interactive=True,
                )
            methods = gr.CheckboxGroup(
                [(METHOD_STYLES[name].label, name) for name in METHODS],
                value=list(first.methods),
                label="methods, the first beside all others",
                elem_id="sweep-methods",
                elem_classes="chips",
                interactive=True,
            )
            ranks = gr.CheckboxGroup(
                [(str(rank), rank) for rank in RANKS],
                value=list(first.ranks),
                label="ranks",
                elem_id="sweep-ranks",
                elem_classes="chips",
                interactive=True,
            )
            measures = gr.CheckboxGroup(
                list(MEASURES),
                value=list(first.measures),
                label="measures",
                elem_id="sweep-measures",
                elem_classes="chips",
                interactive=True,
            )
            batch = _slider(1, MAX_BATCH, first.batch, "batch, each row with an adapter", "sweep-batch")
            new_tokens = _slider(4, MAX_NEW_TOKENS, first.new_tokens, "new tokens", "sweep-new-tokens")
            prompt_tokens = _slider(
                0, MAX_PROMPT_TOKENS, first.prompt_tokens, "prompt tokens (0: as the prompts are)", "sweep-prompt-tokens"
            )
            rate = _slider(MIN_RATE, MAX_RATE, first.rate, "latency at so many requests a second", "sweep-rate", step=0.5)
            with gr.Row(elem_classes="controls one-control"):
                weights = gr.Dropdown(
                    list(WEIGHTS), value=AS_SERVED, label="weights", min_width=90, elem_id="sweep-weights", interactive=True
                )
            keep = gr.Checkbox(
                label="keep what was measured with the same settings",
                value=True,
                container=False,
                elem_id="sweep-keep",
                elem_classes="plain-box",
                interactive=True,
            )
            measuring.buttons("Sweep")
        with gr.Column(scale=8, min_width=300, elem_classes="instrument"):
            measuring.status_line()
            top = LiveCells(views.HEADLINE_TEMPLATE, views.said((), (), (), device_line()), elem_id="sweep-headline")
            with gr.Row(elem_classes="controls one-control"):
                beside = MultiMenu(
                    multiselect=True,
                    choices=[],
                    value=[],
                    label="compare with",
                    elem_id="sweep-beside",
                    elem_classes="sweep-beside",
                    interactive=True,
                )
            blank = views.charts((), first.ranks, "flora", (), 0)
            crossing = LivePlot(blank[0], file_name="flora-live-crossover.csv", height_px=CROSSING_PX, elem_id="sweep-crossing")
            with gr.Column(elem_classes="load-charts sweep-charts"):
                charts = [
                    LivePlot(value, file_name=f"flora-live-{name}-by-rank.csv", height_px=CHART_PX, elem_id=f"sweep-{name}")
                    for name, value in zip(views.CHARTS, blank[1:], strict=True)
                ]
            details = LiveCells(views.DETAILS_TEMPLATE, views.details((), ()), elem_id="sweep-details")
    with gr.Row(elem_classes="instrument footer-panel", equal_height=True):
        reproduce = LiveCells(REPRODUCE_TEMPLATE, elem_id="sweep-reproduce")
        downloads = Downloads("sweep")

    controls = [kind, methods, ranks, measures, batch, new_tokens, prompt_tokens, popularity, rate, weights, keep]
    assert len(controls) == len(fields(Wish))
    shown = [top, crossing, *charts, details, reproduce]

    def others(session: str) -> dict[str, Sequence[SweepPoint]]:
        """What there is to compare with, by label: recorded ones, and this visitor's earlier ones."""
        found = {label: one["points"] for label, one in views.recorded(results_folder)}
        for measurement in measurements.earlier(session, TAB):
            if measurement.work.rows:
                found[views.label_of(measurement.work.rows, measurement.number)] = measurement.work.points
        return found

    def drawn(session: str, measurement: Measurement | None, chosen: Sequence[str]) -> list[Any]:
        found = others(session)
        drawn_beside = [Beside(label, found[label]) for label in chosen if label in found]
        work = None if measurement is None else measurement.work
        rows, points = (work.rows, work.points) if work else ((), ())
        wanted = work.settings.ranks if work else ()
        number = measurement.number if measurement else 0
        command = cells_value({"command": html.escape(work.command())}) if work else gr.skip()
        facts = device_line()
        if work and points:
            setting = rows[0]["setting"]
            batch = f"batch of {setting['batch']}, {setting['popularity']} adapters, {setting['num_steps']} new tokens"
            facts = f"{hardware.summary(work.result.environment)} · {batch}"
        return [
            views.said(rows, points, drawn_beside, facts),
            *views.charts(points, wanted, work.settings.load.methods[0] if work else "flora", drawn_beside, number),
            views.details(rows, points, work.predicted if work else ""),
            command,
        ]

    def begin(session: str, *values: Any) -> SweepWork:
        wish = Wish(*values)
        kept: dict[tuple, list[dict]] = {}
        before = [*measurements.earlier(session, TAB), measurements.of(session, TAB)] if wish.keep else []
        for measurement in before:
            fresh: dict[tuple, list[dict]] = {}
            for row in measurement.work.rows if measurement is not None else ():
                fresh.setdefault((row["measures"], row["rank"], row["rate"], str(row["setting"])), []).append(row)
            kept |= fresh  # the methods of one measure and rank were measured in turn: all of them, or none
        return SweepWork(engines, wish, [row for rows in kept.values() for row in rows])

    def show(measurement: Measurement, chosen: Sequence[str]) -> list[Any]:
        return drawn(measurement.session, measurement, chosen)

    def redraw(request: gr.Request, chosen: Sequence[str]) -> list[Any]:
        return drawn(request.session_hash, measurements.of(request.session_hash, TAB), chosen)

    def offered(request: gr.Request) -> gr.Dropdown:
        return gr.Dropdown(choices=list(others(request.session_hash)))

    def open_tab(request: gr.Request, chosen: Sequence[str]) -> list[Any]:
        """What there is, with the recorded ones chosen where nothing was measured yet."""
        session = request.session_hash
        measurement, labels = measurements.of(session, TAB), list(others(session))
        if measurement is None and not chosen:
            chosen = labels[:1]
        return [gr.Dropdown(choices=labels, value=chosen), *drawn(session, measurement, chosen)]

    def finish(measurement: Measurement) -> AbstractContextManager[list[Any]]:
        return downloads.offer(measurement.work.report())

    measuring.connect(controls, begin, shown, show, [beside])
    measuring.at_the_end(downloads.buttons, finish)
    beside.input(redraw, [beside], shown, **_QUIET)
    beside.focus(offered, None, [beside], **_QUIET)
    tab.select(open_tab, [beside], [beside, *shown], **_QUIET)


def _slider(least: float, most: float, value: float, label: str, elem_id: str, step: float = 1) -> gr.Slider:
    return gr.Slider(
        least,
        most,
        value=value,
        step=step,
        precision=None if step != math.floor(step) else 0,
        label=label,
        elem_id=elem_id,
        elem_classes="load-slider",
        interactive=True,
        buttons=[],
    )
