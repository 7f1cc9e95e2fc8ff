"""What `python -m profiling gpu` does with its options."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TextIO

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from flora import backend
from flora.errors import RequestError
from profiling import hardware, peaks, report
from profiling.document import text_table
from profiling.gpu import kernel_check, layers, models, promises
from profiling.gpu.budget import Budget
from profiling.gpu.session import Session
from profiling.problem import GATHERED

WEIGHTS = {"kernels": 1.5, "layers": 2.5, "models": 6.0}
"""Of each part's share of the time."""
TABLE_METHODS = ("flora", "bmm-lora", GATHERED, "sgmv-lora", "loop-lora")
PRINTED_WIDTHS = (6144,)
"""Of the table of layers: there are hundreds of settings, which are all in the rows."""
NOTHING_MEASURED = "dry run: every path was taken, with tiny shapes on the CPU; no number here is a measurement"


def run(options: argparse.Namespace) -> int:
    """Check, measure, print and write; 0 for done, 1 where a kernel is wrong or a promise is not kept, 130 when interrupted.

    Raises a FloraError for bad input, and where there is no GPU.
    """
    if not 0 < options.minutes < math.inf:
        raise RequestError(f"--minutes must be a number above 0, not {options.minutes:g}")
    if options.seed < 0:
        raise RequestError(f"--seed must be at least 0, not {options.seed}")
    kernels, device = _kernels(options.dry_run)
    budget = Budget(60 * options.minutes)
    transformers_logging.disable_progress_bar()
    with _rows_file(options.json) as file:
        session = _session(options, device, file)
        print(hardware.summary(session.facts["hardware"]), peaks.table(session.peaks), sep="\n\n", end="\n\n", flush=True)
        session.record("hardware", {"measures": "peaks", **session.peaks.as_row()})
        try:
            is_right = _measure(session, kernels, options.part, budget)
        except KeyboardInterrupt:
            print("interrupted: what was measured before is kept")
            return 130
        if not is_right:
            return 1
        return _promises(session)


def _kernels(dry_run: bool) -> tuple[ModuleType, torch.device]:
    """`flora.kernels`, and the device that they run on."""
    if dry_run:
        if importlib.util.find_spec("triton") is None:
            raise RequestError("the kernels are interpreted by Triton, which is not installed: pip install triton")
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, which is here
        return importlib.import_module("flora.kernels"), torch.device("cpu")
    if not torch.cuda.is_available():
        raise RequestError("this measures a GPU, and here is none that PyTorch can use: --dry-run takes every path on the CPU")
    kernels = backend.kernels_on("cuda")
    if kernels is None:
        raise RequestError("the Triton kernels are off or Triton is not installed, and they are what is measured here")
    return kernels, torch.device("cuda", torch.cuda.current_device())


def _session(options: argparse.Namespace, device: torch.device, file: TextIO | None) -> Session:
    # A dry run's rows are no measurements: neither is what it says of the hardware, nor is it kept.
    limits = peaks.measure(device, repeats=1) if options.dry_run else peaks.peaks(device, options.fresh)
    facts = hardware.environment() | {"device": device.type, "device_name": hardware.device_name(device)}
    facts |= {"triton": importlib.import_module("triton").__version__, "cuda": torch.version.cuda}
    return Session(device, options.dry_run, options.seed, limits, {"hardware": facts, "command": report.own_command()}, file)


@contextmanager
def _rows_file(path: str | None) -> Iterator[TextIO | None]:
    """The file that rows are written to as they come; RequestError where there can be none."""
    if path is None:
        yield None
        return
    try:
        file = Path(path).open("w", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot write {Path(path).name!r}: {error.strerror}") from error
    with file:
        yield file


def _measure(session: Session, kernels: ModuleType, parts: Sequence[str], budget: Budget) -> bool:
    """Every part that was asked for, each within its share of the time; whether every kernel is right."""
    for place, part in enumerate(chosen := [part for part in WEIGHTS if part in parts]):
        own = budget.share(WEIGHTS[part], sum(WEIGHTS[other] for other in chosen[place + 1 :]))
        if part == "kernels" and not _check(session, kernels, own):
            return False
        if part == "layers":
            _layers(session, kernels, own)
        if part == "models":
            _models(session, own)
    return True


def _check(session: Session, kernels: ModuleType, budget: Budget) -> bool:
    wrong, checked = [], 0
    for row in tqdm(kernel_check.check(session, kernels, budget), leave=False, disable=None, unit="case", desc="kernels"):
        checked += 1
        if not row["agrees"]:
            wrong.append(row)
    wanted = len(kernel_check.cases(session.dry_run))
    print(f"kernels: {checked - len(wrong)} of {checked} cases agree with float64" + f", {wanted} there are" * (checked < wanted))
    for row in wrong:
        case = {name: row[name] for name in ("method", "form", "dtype", "quantize", "batch", "tokens", "d_in", "d_out", "ranks")}
        error = "not a number" if row["error"] is None else f"{row['error']:.3g} of the terms' size"
        print(f"WRONG: {error}, allowed is {row['allowed']:g}: {json.dumps(case)}")
    print(flush=True)
    return not wrong


def _layers(session: Session, kernels: ModuleType, budget: Budget) -> None:
    lines, num_points = [], 0
    bar = tqdm(layers.measure(session, kernels, budget), leave=False, disable=None, unit="setting", desc="layers")
    for rows in bar:
        num_points += 1
        by_method = {row["method"]: row for row in rows}
        first, base = rows[0], by_method["base"]
        if first["d_in"] not in PRINTED_WIDTHS and not session.dry_run:
            continue
        line = [first["phase"], first["quantize"] or first["dtype"], str(first["d_in"]), str(first["batch"]), str(first["rank"])]
        line += [f"{1e6 * base['median_s']:,.1f}", f"{100 * base['bandwidth_share']:.0f} %"]
        line += [f"{by_method[name]['over_base'][0]:.2f}" if name in by_method else "" for name in TABLE_METHODS]
        flora = by_method["flora"]
        line += [f"{100 * flora['bandwidth_share']:.0f} %", f"{100 * flora['matrix_share']:.0f} %", flora["form"] or "PyTorch"]
        lines.append(line)
    heads = ["phase", "weights", "width", "batch", "rank", "base µs", "bandwidth", *TABLE_METHODS]
    heads += ["flora's bandwidth", "matrix rate", "form"]
    total = len(layers.tiny_points() if session.dry_run else layers.points())
    widths = "" if session.dry_run else f", those of width {' and '.join(map(str, PRINTED_WIDTHS))} here"
    print(f"layers: {num_points} of {total} settings{widths}; times over the bare layer's, shares of what was measured above")
    print(text_table(heads, lines), end="\n\n", flush=True)


def _models(session: Session, budget: Budget) -> None:
    print("models: random weights at true shapes; decode steps in turn, then throughput and latency", flush=True)
    for row in models.measure(session, budget):
        if row["measures"] == "nothing":
            print(f"  {row['model']}: not measured, {row['reason']}", flush=True)
            continue
        weights, graphs = row["quantize"] or row["dtype"], "graphs" if row["cuda_graphs"] else "no graphs"
        words = [f"  {row['model']['name']}", weights, graphs, f"rank {row['rank']}", row["method"], row["measures"]]
        if row["measures"] == "decode step":
            words += [f"{1000 * row['median_s']:.2f} ms", f"{row['over_base'][0]:.2f} of base"]
            words += [f"{100 * row['bandwidth_share']:.0f} % of the bandwidth"]
            failure = row["graphs"] and row["graphs"]["failure"]
            words += [f"not captured: {failure}"] if failure else []
        elif row["measures"] == "throughput":
            words.append(f"{row['tokens_per_s']:,.0f} tokens/s")
        else:
            latency = row["s_per_token"].get("mean")
            words += [f"at {row['rate']:g}/s", "nothing finished" if latency is None else f"{latency:.3f} s/token"]
            words += ["over-saturated"] if row["saturation"] else []
        print(", ".join(words), flush=True)
    print(flush=True)


def _promises(session: Session) -> int:
    subject = promises.TINY if session.dry_run else promises.Subject()
    figures = promises.promises(session.rows, subject)
    if session.dry_run:
        figures = [replace(figure, target=None) for figure in figures]
    for figure in figures:
        row = figure.as_row()
        session.record("promises", {"measures": "promise", "of": row.pop("part"), **row})
    print(text_table(("part", "promise", "measured", "target", "holds"), [figure.cells() for figure in figures]))
    if session.dry_run:
        print("", NOTHING_MEASURED, sep="\n")
        return 0
    return 1 if any(figure.holds is False for figure in figures) else 0
