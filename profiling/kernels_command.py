"""What `python -m profiling kernels` does with its options."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import torch
from tqdm import tqdm

from flora.errors import RequestError
from profiling import hardware, kernels_report, report
from profiling.compare import checked_methods
from profiling.load_command import model_words
from profiling.loading import load_engine, set_threads
from profiling.options import weight_words
from profiling.profile_run import MAX_ROWS, batch_of, check_counts, record
from profiling.trace import read_profile
from profiling.trace_file import SUFFIXES, TraceError, read_trace, write_tensorboard_run, write_trace


def run(options: argparse.Namespace) -> int:
    """Profile, or open a trace; print and write. 0 for done, 130 when interrupted. Raises a FloraError for bad input."""
    _check(options)
    try:
        document = read_trace(options.open) if options.open else _recorded(options)
        report.deliver(kernels_report.report_of(read_profile(document)), options)
        if options.trace:
            write_trace(options.trace, document)
        if options.tensorboard:
            folder = write_tensorboard_run(options.tensorboard, document).parent.name
            logs = shlex.quote(str(options.tensorboard))
            print(f"\nTensorBoard shows {folder} with: make tensorboard LOGDIR={logs}", file=report.said(options))
    except TraceError as error:
        raise RequestError(str(error)) from error
    except KeyboardInterrupt:
        return 130
    return 0


def _check(options: argparse.Namespace) -> None:
    """What can be told before anything is loaded."""
    if not options.open:
        methods = checked_methods(options.methods)
        if len(methods) < 2:
            raise RequestError("--methods takes two or more, to be seen side by side")
        if not 1 <= options.rows <= MAX_ROWS:
            raise RequestError(f"--rows must be from 1 to {MAX_ROWS}")
        if options.rank is not None and not 1 <= options.rank <= 128:
            raise RequestError("--rank must be from 1 to 128")
        check_counts(options.prefills, options.steps, options.warmup)
    report.check(options)
    if options.trace and not options.trace.endswith(SUFFIXES):
        raise RequestError(f"--trace takes a file that ends in {' or '.join(SUFFIXES)}, not {Path(options.trace).name!r}")
    if options.tensorboard and Path(options.tensorboard).is_file():
        raise RequestError(f"--tensorboard takes a folder, and {Path(options.tensorboard).name!r} is a file")


def _recorded(options: argparse.Namespace) -> dict:
    set_threads(options.threads)
    engine = load_engine(options.kind, options, max_batch_size=options.rows, capture_steps=None if options.captured else False)
    try:
        print(hardware.summary(hardware.environment({options.kind: engine})), end="\n\n", file=report.said(options))
        requests = batch_of(engine, options.methods, options.rows, options.rank)
        with tqdm(leave=False, disable=None, unit="step") as bar:

            def tell(words: str, done: int, total: int) -> None:
                bar.set_description(words, refresh=False)
                bar.total, bar.n = total, done
                bar.refresh()

            counts = {"prefills": options.prefills, "steps": options.steps, "warmup": options.warmup}
            document = record(engine, requests, options.methods, **counts, on_progress=tell)
    finally:
        engine.close(timeout_s=0.0)
    document["floraLive"]["command"] = command_line(options)
    return document


def command_line(options: argparse.Namespace) -> str:
    """The `python -m profiling kernels …` that profiles the same again, quoted for a shell, without where it writes."""
    words = ["python", "-m", "profiling", "kernels", "--methods", *options.methods, "--kind", options.kind]
    words += model_words(options, [options.kind])
    words += ["--any-base-model"] if options.any_base_model else []
    words += ["--rows", str(options.rows)]
    words += ["--rank", str(options.rank)] if options.rank is not None else []
    words += ["--prefills", str(options.prefills), "--steps", str(options.steps), "--warmup", str(options.warmup)]
    words += ["--captured"] if options.captured else []
    words += ["--device", options.device] if options.device != "auto" else []
    words += ["--dtype", options.dtype] if options.dtype != "auto" else []
    return shlex.join([*words, *weight_words(options), "--threads", str(torch.get_num_threads())])
