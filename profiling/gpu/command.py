"""What `python -m profiling gpu` does with its options."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import re
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
from profiling.gpu.board import board_facts
from profiling.gpu.budget import Budget
from profiling.gpu.session import DeviceLostError, Session
from profiling.problem import GATHERED

WEIGHTS = {"kernels": 1.5, "layers": 2.5, "models": 6.0, "figures": 6.0}
"""Of each part's share of the time, in their order."""
DEFAULT_PARTS = ("kernels", "layers", "models")
TABLE_METHODS = ("flora", "bmm-lora", GATHERED, "sgmv-lora", "loop-lora")
PRINTED_WIDTHS = (6144,)
"""Of the table of layers: there are hundreds of settings, which are all in the rows."""
NOTHING_MEASURED = "dry run: every path was taken, with tiny shapes on the CPU; no number here is a measurement"


def run(options: argparse.Namespace) -> int:
    """Check, measure, print and write; 0 for done, 1 where a kernel is wrong, something failed or a promise is not kept, 130 when
    interrupted. What was measured until then is written and held against the promises in any case.

    Raises a FloraError for bad input, and where there is no GPU.
    """
    if not 0 < options.minutes < math.inf:
        raise RequestError(f"--minutes must be a number above 0, not {options.minutes:g}")
    if options.seed < 0:
        raise RequestError(f"--seed must be at least 0, not {options.seed}")
    kernels, device = _kernels(options.dry_run)
    budget = Budget(60 * options.minutes)
    transformers_logging.disable_progress_bar()
    with _rows_file(_path(options, device)) as file:
        session = _session(options, device, file)
        print(hardware.summary(session.facts["hardware"]), peaks.table(session.peaks), sep="\n\n", end="\n\n", flush=True)
        session.record("hardware", {"measures": "peaks", **session.peaks.as_row(), "board": board_facts(device)})
        code = 0
        try:
            _measure(session, kernels, options.part, budget)
            session.record("hardware", {"measures": "board", "board": board_facts(device)})
        except KeyboardInterrupt:
            print("interrupted: what was measured before is kept")
            code = 130
        except DeviceLostError as lost:
            print(f"the GPU answers no more, so all else is left out: {lost}")
            code = 1
        finally:
            kept = _promises(session)
        if session.num_failed:
            print(f"{session.num_failed} measurements failed; each has a row, and a line above")
        return code or int(not kept or session.num_failed > 0)


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
    # Never what was measured on another day: shares are ratios within one run. A dry run's are no measurements, and told once.
    limits = peaks.measure(device, repeats=1) if options.dry_run else peaks.peaks(device, fresh=True)
    facts = hardware.environment() | {"device": device.type, "device_name": hardware.device_name(device)}
    facts |= {"triton": importlib.import_module("triton").__version__, "cuda": torch.version.cuda}
    facts |= {name: fact for name, fact in board_facts(device).items() if name in ("driver", "power_limit_w")}
    return Session(device, options.dry_run, options.seed, limits, {"hardware": facts, "command": report.own_command()}, file)


def _path(options: argparse.Namespace, device: torch.device) -> Path | None:
    """Where the rows go: nobody should lose what took eight minutes. A dry run's go nowhere, unless a file is named."""
    if options.json is not None:
        return Path(options.json)
    if options.dry_run:
        return None
    parts = [] if list(options.part) == list(DEFAULT_PARTS) else [part for part in WEIGHTS if part in options.part]
    words = re.findall("[a-z0-9]+", hardware.device_name(device).lower())
    return Path("_".join(["gpu", *words, *parts]) + ".jsonl")


@contextmanager
def _rows_file(path: Path | None) -> Iterator[TextIO | None]:
    """The file that rows are written to as they come; RequestError where there can be none, and where there is one already."""
    if path is None:
        yield None
        return
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError as error:
        raise RequestError(f"{path.name!r} is there already, and is kept: move it, or name another with --json") from error
    except OSError as error:
        raise RequestError(f"cannot write {path.name!r}: {error.strerror}") from error
    try:
        with file:
            yield file
        print(f"rows: {path.name}")
    finally:
        if not path.stat().st_size:
            path.unlink()  # nothing came of it: the same command may be given again


def _measure(session: Session, kernels: ModuleType, parts: Sequence[str], budget: Budget) -> None:
    """Every part that was asked for, each within its share of the time, and each whatever became of the others."""
    for place, part in enumerate(chosen := [part for part in WEIGHTS if part in parts]):
        own = budget.share(WEIGHTS[part], sum(WEIGHTS[other] for other in chosen[place + 1 :]))
        with session.isolated(part, "the rest of this part"):
            if part == "kernels":
                _check(session, kernels, own)
            elif part == "layers":
                _layers(session, kernels, own)
            else:
                _models(session, own, part)


def _check(session: Session, kernels: ModuleType, budget: Budget) -> None:
    wrong, checked, failed = [], 0, 0
    for row in tqdm(kernel_check.check(session, kernels, budget), leave=False, disable=None, unit="case", desc="kernels"):
        checked += 1
        failed += row is None
        if row is not None and not row["agrees"]:
            wrong.append(row)
    wanted = len(kernel_check.cases(session.dry_run))
    agreeing = f"kernels: {checked - len(wrong) - failed} of {checked} cases agree with float64"
    print(agreeing + f", {wanted} there are" * (checked < wanted))
    for row in wrong:
        names = ("method", "form", "dtype", "quantize", "batch", "tokens", "d_in", "d_out", "ranks", "bias", "by_input")
        error = "not a number" if row["error"] is None else f"{row['error']:.3g} of the terms' size"
        print(f"WRONG: {error}, allowed is {row['allowed']:g}: {json.dumps({name: row[name] for name in names})}")
    print(flush=True)


def _layers(session: Session, kernels: ModuleType, budget: Budget) -> None:
    lines, num_points = [], 0
    bar = tqdm(layers.measure(session, kernels, budget), leave=False, disable=None, unit="setting", desc="layers")
    try:
        for rows in bar:
            num_points += 1
            by_method = {row["method"]: row for row in rows}
            if {"base", "flora"} <= by_method.keys() and (rows[0]["d_in"] in PRINTED_WIDTHS or session.dry_run):
                lines.append(_line_of(by_method))
    finally:
        heads = ["phase", "weights", "d_in", "d_out", "batch", "rank", "base µs", "bandwidth", *TABLE_METHODS]
        heads += ["flora's bandwidth", "matrix rate", "form"]
        total = len(layers.tiny_points() if session.dry_run else layers.points())
        widths = "" if session.dry_run else f", those of d_in {' and '.join(map(str, PRINTED_WIDTHS))} here"
        print(f"layers: {num_points} of {total} settings{widths}; times over the bare layer's, shares of what was measured above")
        print(text_table(heads, lines), end="\n\n", flush=True)


def _line_of(by_method: dict[str, dict]) -> list[str]:
    base, flora = by_method["base"], by_method["flora"]
    line = [base["phase"], base["quantize"] or base["dtype"], *(str(base[name]) for name in ("d_in", "d_out", "batch", "rank"))]
    line += [f"{1e6 * base['median_s']:,.1f}", f"{100 * base['bandwidth_share']:.0f} %"]
    line += [f"{by_method[name]['over_base'][0]:.2f}" if name in by_method else "" for name in TABLE_METHODS]
    return line + [f"{100 * flora['bandwidth_share']:.0f} %", f"{100 * flora['matrix_share']:.0f} %", flora["form"] or "PyTorch"]


def _models(session: Session, budget: Budget, part: str) -> None:
    if session.dry_run:
        jobs, size = models.tiny_jobs(part), models.TINY
    else:
        jobs, size = (models.JOBS, models.SHORT) if part == "models" else (models.FIGURE_JOBS, models.FIGURES)
    what = "decode steps in turn, then throughput and latency" if part == "models" else "throughput and latency by rank"
    print(f"{part}: random weights at true shapes; {what}", flush=True)
    for row in models.measure(session, budget, jobs, size):
        print(f"  {', '.join(_words_of(row))}", flush=True)
    print(flush=True)


def _words_of(row: dict) -> list[str]:
    """What is printed of a model's row."""
    if row["measures"] == "nothing":
        rank = [] if row["rank"] is None else [f"rank {row['rank']}"]
        return [row["model"], *([row["quantize"]] if row["quantize"] else []), *rank, f"{row['work']} not measured", row["reason"]]
    weights, graphs = row["quantize"] or row["dtype"], "graphs" if row["cuda_graphs"] else "no graphs"
    words = [row["model"]["name"], weights, graphs, f"rank {row['rank']}", row["method"], row["measures"]]
    if row["measures"] == "decode step":
        words += [f"{1000 * row['median_s']:.2f} ms"]
        words += [f"{row['over_base'][0]:.2f} of base"] if row["over_base"] else []
        words += [f"{100 * row['bandwidth_share']:.0f} % of the bandwidth"]
        failure = row["graphs"] and row["graphs"]["failure"]
        words += [f"not captured: {failure}"] if failure else []
        words += ["not replayed"] if row["cuda_graphs"] and not row["replayed"] and not failure else []
    elif row["measures"] == "throughput":
        words.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    else:
        latency = row["s_per_token"].get("mean")
        words += [f"at {row['rate']:g}/s", "nothing finished" if latency is None else f"{latency:.3f} s/token"]
        words += ["over-saturated"] if row["saturation"] else []
    return words


def _promises(session: Session) -> bool:
    """Print and keep what came of each promise; whether none is broken, and no kernel wrong."""
    subject = promises.TINY if session.dry_run else promises.Subject()
    figures = promises.promises(session.rows, subject)
    if session.dry_run:
        figures = [replace(figure, target=None) for figure in figures]
    print(text_table(("part", "promise", "measured", "target", "holds"), [figure.cells() for figure in figures]))
    if session.dry_run:
        print("", NOTHING_MEASURED, sep="\n")
    for figure in figures:
        row = figure.as_row()
        session.record("promises", {"measures": "promise", "of": row.pop("part"), **row})
    wrong = any(row["measures"] == "agreement" and not row["agrees"] for row in session.rows)
    return not wrong and not any(figure.holds is False for figure in figures)
