"""What `python -m profiling sweep` does with its options."""

from __future__ import annotations

import argparse
import math
import shlex

import torch
from tqdm import tqdm

from flora.errors import RequestError
from profiling import hardware, report
from profiling.load_command import MAX_WAITING, check_numbers, interruptible, model_words, show_progress
from profiling.load_runs import LoadSettings, sources_of
from profiling.loading import load_engine, set_threads
from profiling.options import weight_words
from profiling.sweep import Sweep, SweepSettings
from profiling.sweep_report import report_of
from profiling.traffic import Lengths, Traffic


def run(options: argparse.Namespace) -> int:
    """Load, measure, print and write; 0 for done, 130 when interrupted. Raises a FloraError for bad input."""
    check_numbers(options, ("adapters",))
    report.check(options)
    settings = settings_from(options)
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
        with interruptible() as interrupts, tqdm(leave=False, disable=None, unit="request") as bar:
            sweep = Sweep(engine, source, settings, command_line(settings, options), lambda: bool(interrupts))
            for progress in sweep.run():
                rate = "all at once" if math.isinf(progress.rate) else f"{progress.rate:g}/s"
                where = f"run {progress.run + 1}/{progress.num_runs}, rank {progress.rank}, {rate}, "
                show_progress(bar, progress.load, settings.load.repeats, where)
        result = sweep.result()
    finally:
        engine.close(timeout_s=0.0)
    report.deliver(report_of(result), options)
    return 130 if result.interrupted else 0


def settings_from(options: argparse.Namespace) -> SweepSettings:
    """What the options ask to be measured; RequestError for what makes no sense."""
    rates: tuple[float, ...] | None = None
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
    return SweepSettings(load, tuple(options.ranks), rates, options.adapters)


def command_line(settings: SweepSettings, options: argparse.Namespace) -> str:
    """The `python -m profiling sweep …` that measures the same again, quoted for a shell, without where it writes."""
    load, traffic = settings.load, settings.load.traffic
    words = ["python", "-m", "profiling", "sweep", "--methods", *load.methods]
    words += model_words(options, [settings.kind])
    words += ["--kind", settings.kind, "--ranks", *map(str, settings.ranks), "--rate"]
    words += ["auto"] if settings.rates is None else [f"{rate:g}" for rate in settings.rates]
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
