"""What `python -m profiling load` does with its options."""

from __future__ import annotations

import argparse
import math
import shlex
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from flora.errors import RequestError
from flora.names import public_name
from profiling import hardware, report, workload
from profiling.load_metrics import parse_limits
from profiling.load_report import report_of
from profiling.load_result import LoadResult
from profiling.load_runs import LoadProgress, LoadSettings, MethodRun, run_load, servable_by, sources_of
from profiling.loading import RANDOM_RANK, add_random_adapters, load_engine, set_threads
from profiling.options import weight_words
from profiling.traffic import Lengths, Traffic, parse_mix

if TYPE_CHECKING:
    from flora.engine import Engine, Request

PAPER_RATE = 8.0  # requests a second, of its Figures 2 and 3
NUM_REQUESTS = 200
NUM_RANDOM_ADAPTERS = 8
MAX_WAITING = 256
HOST_ADAPTERS_MB = 2048


def run(options: argparse.Namespace) -> int:
    """Load, send, print and write; 0 for done, 130 when interrupted. Raises a FloraError for bad input."""
    settings = settings_from(options)
    set_threads(options.threads)
    check_numbers(options, ("adapters", "rank", "host_adapters_mb"))
    report.check(options)
    requests = _own_requests(options)
    engines: dict[str, Engine] = {}
    try:
        for kind in settings.traffic.mix:
            engines[kind] = load_engine(kind, options, **_engine_options(options, settings))
        adapters = _adapters(engines, settings, options)
        print(hardware.summary(hardware.environment(engines)), end="\n\n", file=report.said(options))
        runs, interrupted = _run(engines, adapters, settings, requests)
        result = LoadResult.of(runs, settings, engines, command_line(settings, options))
    finally:
        for engine in engines.values():
            engine.close(timeout_s=0.0)
    if not runs and not interrupted:
        raise RequestError("nothing was measured: the warm-up did not end")
    report.deliver(report_of(result), options)
    if options.per_request:
        report.write_text(options.per_request, report.frame_csv(result.requests_frame()))
    return 130 if interrupted else 0


def check_numbers(options: argparse.Namespace, names: Sequence[str]) -> None:
    """RequestError, before anything is loaded, for one of these options that is below 1."""
    for name in names:
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise RequestError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")


def settings_from(options: argparse.Namespace) -> LoadSettings:
    """What the options ask to be measured; RequestError for what makes no sense."""
    if options.rate is not None and options.concurrency is not None:
        raise RequestError("a closed loop sends a request when another is done: give --concurrency or --rate, not both")
    if options.duration is not None and options.requests is not None:
        raise RequestError("a run ends after a number of requests or of seconds: give --requests or --duration, not both")
    if options.concurrency is not None:
        rate = math.inf
    else:
        rate = PAPER_RATE if options.rate is None else options.rate
    num_requests = NUM_REQUESTS if options.requests is None else options.requests
    duration_s = options.duration
    if duration_s is not None and options.concurrency is None:
        if not (0 < rate < math.inf and 0 < duration_s < math.inf):
            raise RequestError("--duration needs a number of seconds above 0, and a finite --rate or a --concurrency")
        num_requests, duration_s = max(1, round(rate * duration_s)), None
    traffic = Traffic(
        num_requests=num_requests,
        rate=rate,
        burstiness=options.burstiness,
        prompt_tokens=Lengths.parse(options.prompt_tokens),
        new_tokens=Lengths.parse(options.new_tokens),
        popularity=options.popularity,
        all_adapters=options.adapters is not None,
        mix=parse_mix(options.mix),
        seed=options.seed,
    )
    return LoadSettings(
        traffic=traffic,
        methods=tuple(options.methods),
        concurrency=options.concurrency,
        duration_s=duration_s,
        warmup_requests=options.warmup,
        repeats=options.repeats,
        limits=parse_limits(options.goodput),
        stop_when_saturated=not options.no_saturation_stop,
    )


def _engine_options(options: argparse.Namespace, settings: LoadSettings) -> dict[str, int]:
    """What the engine is asked for: a queue, for requests that all come at once, that holds them."""
    at_once = settings.traffic.num_requests if math.isinf(settings.traffic.rate) else 0
    held = max(MAX_WAITING, settings.concurrency or at_once, settings.warmup_requests)
    return {
        "max_batch_size": options.max_batch_size,
        "adapter_slots": options.adapter_slots,
        "host_adapter_bytes": options.host_adapters_mb << 20,
        "max_batch_tokens": options.max_batch_tokens,
        "max_waiting": held if options.max_waiting is None else options.max_waiting,
    }


def _own_requests(options: argparse.Namespace) -> list[tuple[str, Request]] | None:
    """The requests of `--prompts`, named by their clip's file; None without."""
    if options.prompts is None:
        return None
    folder, requests = Path(options.prompts).parent, []
    for row in workload.read_rows(options.prompts):
        request = workload.request_from_row(row, folder)
        if request.adapter is not None or request.temperature:
            raise RequestError(
                "a row of --prompts has prompt or audio and max_new_tokens: who asks which adapter is for --popularity"
            )
        requests.append((public_name(row["audio"]) if row.get("audio") else "", request))
    return requests


def _adapters(engines: Mapping[str, Engine], settings: LoadSettings, options: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """By kind the tags to ask for: those there are, then random ones up to `--adapters`; with `--rank` only random ones."""
    folder = None if options.adapter_folder is None else Path(options.adapter_folder)
    adapters = servable_by(engines, settings.methods, options.adapters)
    for kind, tags in adapters.items():
        own = tags if options.rank is None else ()
        wanted = options.adapters or (len(tags) if options.rank is None else NUM_RANDOM_ADAPTERS)
        if wanted > len(own):
            rank = RANDOM_RANK if options.rank is None else options.rank
            place = folder and folder / kind
            made = add_random_adapters(engines[kind], wanted - len(own), rank, settings.methods, settings.traffic.seed, place)
            adapters[kind] = own + made
    return adapters


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Ctrl-C is written down instead of raised: the list is empty until then."""
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def _run(
    engines: Mapping[str, Engine],
    adapters: Mapping[str, tuple[str, ...]],
    settings: LoadSettings,
    requests: list[tuple[str, Request]] | None,
) -> tuple[list[MethodRun], bool]:
    """Run with a progress bar on a terminal; the runs, and whether Ctrl-C ended them early."""
    runs: list[MethodRun] = []
    with interruptible() as interrupts, tqdm(leave=False, disable=None, unit="request") as bar:
        for event in run_load(engines, sources_of(engines, requests), adapters, settings, lambda: bool(interrupts)):
            if isinstance(event, LoadProgress):
                show_progress(bar, event, settings.repeats)
            else:
                runs.append(event)
    return runs, bool(interrupts)


def show_progress(bar: tqdm, progress: LoadProgress, repeats: int, where: str = "") -> None:
    """Put a run's progress on a bar. where: in a row of runs, said first."""
    repeat = f" {progress.repeat + 1}/{repeats}" if repeats > 1 else ""
    sample = progress.sample
    bar.set_description(f"{where}{progress.method}{repeat}{'' if sample else ': warm-up'}", refresh=False)
    if sample is not None:
        bar.set_postfix_str(
            f"{sample.num_running} running, {sample.num_waiting} waiting, {sample.tokens_per_s:.0f} tokens/s", refresh=False
        )
    bar.total, bar.n = progress.total, progress.done
    bar.refresh()


def options_of(engines: Mapping[str, Engine], num_adapters: int | None = None) -> argparse.Namespace:
    """The options with which the command would load these engines: for the `command_line` of runs that were not started by one.

    num_adapters: how many are asked for; None: all there are.
    """
    options = argparse.Namespace(prompts=None, adapters=num_adapters, rank=None, adapter_folder=None, max_waiting=None)
    for kind in ("code", "speech"):
        setattr(options, f"{kind}_model", None)
        setattr(options, f"{kind}_adapters", None)
    for kind, engine in engines.items():
        if engine.name != kind:  # the embedded models' folders are named after their kind
            setattr(options, f"{kind}_model", engine.name)
        setattr(options, f"{kind}_adapters", workload.adapters_given(engine, kind, engine.adapters) or None)
    options.max_batch_size = max(engine.max_batch_size for engine in engines.values())
    options.max_batch_tokens = max(engine.max_batch_tokens for engine in engines.values())
    options.adapter_slots = max(engine.bank.slot_capacity for engine in engines.values())
    options.host_adapters_mb = max(engine.bank.host_bytes for engine in engines.values()) >> 20
    options.device = next(iter(engines.values())).device.type
    options.dtype = str(next(iter(engines.values())).dtype).removeprefix("torch.")
    options.any_base_model = any(info.any_base_model for engine in engines.values() for info in engine.adapters.values())
    for name in ("weights", "quantize", "llm_int8_threshold"):
        setattr(options, name, getattr(next(iter(engines.values())), name))
    return options


def command_line(settings: LoadSettings, options: argparse.Namespace) -> str:
    """The `python -m profiling load …` that makes the same runs again, quoted for a shell; what the command assumes anyway is left
    out, and where it writes. Models, adapters and prompts of the visitor's own appear by name only."""
    traffic = settings.traffic
    words = ["python", "-m", "profiling", "load", "--methods", *settings.methods]
    words += model_words(options, traffic.mix)
    if settings.concurrency is not None:
        words += ["--concurrency", str(settings.concurrency)]
    else:
        words += ["--rate", f"{traffic.rate:g}"]
        words += ["--burstiness", f"{traffic.burstiness:g}"] if traffic.burstiness != 1 else []
    if settings.duration_s is not None:
        words += ["--duration", f"{settings.duration_s:g}"]
    else:
        words += ["--requests", str(traffic.num_requests)]
    words += ["--prompt-tokens", str(traffic.prompt_tokens), "--new-tokens", str(traffic.new_tokens)]
    words += ["--prompts", public_name(options.prompts)] if options.prompts is not None else []
    words += ["--popularity", traffic.popularity]
    words += ["--adapters", str(options.adapters)] if options.adapters is not None else []
    words += ["--rank", str(options.rank)] if options.rank is not None else []
    words += ["--adapter-folder", public_name(options.adapter_folder)] if options.adapter_folder is not None else []
    words += ["--mix", ",".join(f"{kind}={share:g}" for kind, share in traffic.mix.items())]
    words += ["--max-batch-size", str(options.max_batch_size), "--adapter-slots", str(options.adapter_slots)]
    words += ["--host-adapters-mb", str(options.host_adapters_mb)] if options.host_adapters_mb != HOST_ADAPTERS_MB else []
    words += ["--max-batch-tokens", str(options.max_batch_tokens)]
    words += ["--max-waiting", str(options.max_waiting)] if options.max_waiting is not None else []
    if settings.limits:
        words += ["--goodput", *(f"{name}:{1000 * most:g}" for name, most in settings.limits.items())]
    words += ["--warmup", str(settings.warmup_requests), "--repeats", str(settings.repeats), "--seed", str(traffic.seed)]
    words += [] if settings.stop_when_saturated else ["--no-saturation-stop"]
    words += ["--device", options.device] if options.device != "auto" else []
    words += ["--dtype", options.dtype] if options.dtype != "auto" else []
    words += weight_words(options, options.any_base_model)
    return shlex.join([*words, "--threads", str(torch.get_num_threads())])


def model_words(options: argparse.Namespace, kinds: Iterable[str]) -> list[str]:
    """--code-model, --code-adapters and the speech model's, where they were given."""
    words: list[str] = []
    for kind in kinds:
        model, given = getattr(options, f"{kind}_model"), getattr(options, f"{kind}_adapters", None)
        words += [f"--{kind}-model", public_name(model)] if model else []
        entries = (entry.partition("=") for entry in given or ())
        words += [f"--{kind}-adapters", *(f"{tag}={public_name(folder)}" for tag, _, folder in entries)] if given else []
    return words
