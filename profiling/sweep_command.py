"""What `python -m profiling sweep` does with its options."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import torch
from tqdm import tqdm

from flora.errors import RequestError
from profiling import hardware, report
from profiling.calibration import machine_costs
from profiling.events import HowFar
from profiling.load_command import MAX_WAITING, check_numbers, interruptible, model_words
from profiling.load_runs import LoadSettings, sources_of
from profiling.loading import load_engine, set_threads
from profiling.options import weight_words
from profiling.report import Note
from profiling.sweep import Sweep, SweepSettings, rows_from
from profiling.sweep_paper import beside as beside_the_paper
from profiling.sweep_points import LATENCY, STEP_TIME, THROUGHPUT, measures_of
from profiling.sweep_predictions import predictable, predictions
from profiling.sweep_report import report_of
from profiling.traffic import Lengths, Traffic

MEASURE_NAMES = {"step": STEP_TIME, "throughput": THROUGHPUT, "latency": LATENCY}
_BAR = "{desc} {percentage:3.0f}%|{bar}| {remaining} left"


def run(options: argparse.Namespace) -> int:
    """Load, measure, print and write; 0 for done, 130 when interrupted. Raises a FloraError for bad input."""
    check_numbers(options, ("adapters",))
    report.check(options)
    settings = settings_from(options)
    kept = rows_from(options.resume) if options.resume else []
    set_threads(options.threads)
    engine = load_engine(
        settings.kind,
        options,
        with_adapters=False,
        max_batch_size=options.max_batch_size,
        adapter_slots=options.adapters,
        max_waiting=max(MAX_WAITING, settings.load.traffic.num_requests, settings.load.warmup_requests),
        max_batch_tokens=options.max_batch_tokens,
    )
    try:
        print(hardware.summary(hardware.environment({settings.kind: engine})), end="\n\n", file=report.said(options))
        source = sources_of({settings.kind: engine})[settings.kind]
        with interruptible() as interrupts, tqdm(total=100, leave=False, disable=None, bar_format=_BAR) as bar:
            command = command_line(settings, options)
            sweep = Sweep(engine, source, settings, command, lambda: bool(interrupts), rows=kept)
            _check_kept(kept, sweep, options)
            for event in sweep.run():
                if isinstance(event, HowFar):
                    show_progress(bar, event)
                elif options.resume:  # what was measured before an end is kept
                    report.write_text(options.resume, report.lines_of(sweep.rows))
        result, more = sweep.result(), []
        if predictable(engine, settings) and not result.interrupted:
            costs = machine_costs(engine.device, engine.dtype)
            more = [Note(predictions(engine, settings, result.points, costs).sentence())]
        if result.points:
            model = result.environment["models"][settings.kind]
            more.append(Note(beside_the_paper(model, result.environment, measures_of(result.points))))
    finally:
        engine.close(timeout_s=0.0)
    report.deliver(report_of(result, more), options)
    return 130 if result.interrupted else 0


def _check_kept(kept: list[dict], sweep: Sweep, options: argparse.Namespace) -> None:
    """RequestError where a file's rows were not measured in the way that is asked for now: they would be written over."""
    lost = [row for row in kept if row.get("setting") != sweep.setting]
    if lost:
        before = lost[0].get("setting") or {}
        differs = next((name for name, value in sweep.setting.items() if before.get(name) != value), "setting")
        raise RequestError(
            f"{Path(options.resume).name!r} was measured with another {differs.replace('_', ' ')}: name another file, or give the "
            "options that it was measured with"
        )


def show_progress(bar: tqdm, progress: HowFar) -> None:
    """Put how far the sweep is on a bar of 100 %."""
    bar.set_description(progress.words, refresh=False)
    bar.n = round(100 * progress.share)
    bar.refresh()


def settings_from(options: argparse.Namespace) -> SweepSettings:
    """What the options ask to be measured; RequestError for what makes no sense."""
    rates: tuple[float, ...] | None = None
    unknown = [name for name in options.measures if name not in MEASURE_NAMES]
    if unknown:
        raise RequestError(f"--measures takes {', '.join(MEASURE_NAMES)}, not {unknown[0]!r}")
    if options.rate != ["auto"]:
        try:
            rates = tuple(float(rate) for rate in options.rate)
        except ValueError as error:
            raise RequestError(f"--rate takes requests a second, or auto alone, not {' '.join(options.rate)!r}") from error
    traffic = Traffic(
        num_requests=options.requests,
        burstiness=options.burstiness,
        prompt_tokens=Lengths.parse(options.prompt_tokens),
        new_tokens=Lengths.parse(options.new_tokens),
        popularity=options.popularity,
        all_adapters=True,
        mix={options.kind: 1.0},
        seed=options.seed,
    )
    load = LoadSettings(
        traffic,
        methods=tuple(options.methods),
        warmup_requests=options.warmup,
        repeats=options.repeats,
        stop_when_saturated=not options.no_saturation_stop,
    )
    measures = tuple(MEASURE_NAMES[name] for name in options.measures)
    return SweepSettings(load, tuple(options.ranks), rates, options.adapters, measures, options.steps)


def command_line(settings: SweepSettings, options: argparse.Namespace) -> str:
    """The `python -m profiling sweep …` that measures the same again, quoted for a shell, without where it writes."""
    load, traffic = settings.load, settings.load.traffic
    words = ["python", "-m", "profiling", "sweep", "--methods", *load.methods]
    words += model_words(options, [settings.kind])
    words += ["--kind", settings.kind, "--ranks", *map(str, settings.ranks)]
    words += ["--measures", *(name for name, measure in MEASURE_NAMES.items() if measure in settings.measures)]
    if LATENCY in settings.measures:
        words += ["--rate", *(["auto"] if settings.rates is None else [f"{rate:g}" for rate in settings.rates])]
    words += ["--steps", str(settings.num_steps)] if STEP_TIME in settings.measures else []
    words += ["--burstiness", f"{traffic.burstiness:g}"] if traffic.burstiness != 1 else []
    words += ["--requests", str(traffic.num_requests), "--prompt-tokens", str(traffic.prompt_tokens)]
    words += ["--new-tokens", str(traffic.new_tokens), "--popularity", traffic.popularity, "--adapters", str(settings.num_adapters)]
    words += ["--max-batch-size", str(options.max_batch_size), "--max-batch-tokens", str(options.max_batch_tokens)]
    words += ["--warmup", str(load.warmup_requests), "--repeats", str(load.repeats), "--seed", str(traffic.seed)]
    words += [] if load.stop_when_saturated else ["--no-saturation-stop"]
    words += ["--device", options.device] if options.device != "auto" else []
    words += ["--dtype", options.dtype] if options.dtype != "auto" else []
    words += weight_words(options)
    return shlex.join([*words, "--threads", str(torch.get_num_threads())])
