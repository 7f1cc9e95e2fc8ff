"""What `python -m flora.evaluate code` and `speech` share: options and their checks, adapters, the engine, rows left behind."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TextIO

import torch
from transformers.utils import logging as transformers_logging

from flora.engine import Engine
from flora.errors import AdapterError, EvaluationError, ModelError
from flora.evaluate.checkpoints import Checkpoint, find_checkpoints, given_checkpoints, shipped_adapters, shipped_model
from flora.evaluate.rows import METHODS, Row, to_line, write_rows
from flora.names import PROJECT

# -------------------------------------------------------------------------------------------------------------- options


def whole(lowest: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number of at least `lowest`."""

    def whole(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = lowest - 1
        if number < lowest:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {lowest}, not {text!r}")
        return number

    return whole


def temperature(text: str) -> float:
    """The type of an option that takes a finite number of at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not (math.isfinite(number) and number >= 0.0):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, not {text!r}")
    return number


def add_who(parser: argparse.ArgumentParser, title: str, task: str, items: str, confusion: int) -> argparse._ArgumentGroup:
    """The options that say who is judged. items: what is asked, in the plural. confusion: how many of them with --report."""
    who = parser.add_argument_group(title)
    who.add_argument("--model", metavar="MODEL", help=f"folder, hub id or short name; default: the embedded {task} model")
    who.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="TAG[/METHOD]=FOLDER",
        help="an adapter of a language, folder or hub id; may be given many times",
    )
    who.add_argument("--adapters", type=Path, metavar="FOLDER", help="folder of adapters TAG/METHOD; default: those that ship")
    who.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=f"default: {' '.join(METHODS)}"
    )
    who.add_argument(
        "--confusion",
        type=whole(0),
        metavar="N",
        help=f"every language's fLoRA adapter on N {items} of every other; default: {confusion} with --report, else 0",
    )
    return who


def add_how(how: argparse._ArgumentGroup, answers: str) -> None:
    """The options of the engine. answers: what a batch is made of, in the plural."""
    how.add_argument("--device", default="auto", help="auto, cpu, cuda; default: auto")
    how.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16; default: auto")
    how.add_argument("--quantize", choices=("int8", "nf4"), help="load the base model quantised")
    how.add_argument(
        "--llm-int8-threshold",
        type=float,
        metavar="SIZE",
        help="with --quantize int8: inputs of this size or more are computed unquantised; 0: none; default: 6",
    )
    how.add_argument("--batch-size", type=whole(1), default=32, metavar="N", help=f"{answers} at once; default: 32")
    how.add_argument("--threads", type=whole(1), metavar="N", help="torch's CPU threads; default: torch's own choice")


def add_out(parser: argparse.ArgumentParser, task: str, answered: str) -> None:
    """The options for what stays. answered: what the recorded answers are to."""
    out = parser.add_argument_group("what is left behind")
    out.add_argument("--json", metavar="FILE", help="write the scores and their means as JSONL rows; - for the terminal")
    out.add_argument(
        "--report",
        action="store_true",
        help=f"also the confusion matrix, answers to {answered}, and whether each target holds; written to --results",
    )
    out.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help=f"where --report merges accuracy_{task}.jsonl and answers_{task}.jsonl; default: assets/results",
    )


# ---------------------------------------------------------------------------------------------------------------- start


def begin(options: argparse.Namespace) -> TextIO:
    """Check and apply what needs no model; returns where tables are printed: rows on stdout stay alone there."""
    embedded = not (options.model or options.adapter or options.adapters or options.data or options.dataset)
    if options.report and options.results is None and not embedded:
        raise EvaluationError("name a folder with --results: only the embedded model's own report goes to assets/results")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    return sys.stderr if options.json == "-" else sys.stdout


def number_of_confusion(options: argparse.Namespace, with_report: int) -> int:
    """How many items of each language the other languages' adapters answer."""
    return options.confusion if options.confusion is not None else with_report if options.report else 0


def chosen_checkpoints(
    options: argparse.Namespace, languages: Sequence[str], tags: Iterable[str], confusion: int, idle: Callable[[str], str]
) -> tuple[list[Checkpoint], list[str]]:
    """The adapters to judge on `languages`, with `confusion` the fLoRA adapters of others too; and the names of what is missing.

    tags: the languages whose adapters may ship. idle: language → the end of the sentence for a given adapter without items.
    EvaluationError where there is nobody to answer, or somebody with nothing to answer.
    """
    missing: list[str] = []
    if options.adapter:
        checkpoints = [checkpoint for checkpoint in given_checkpoints(options.adapter) if checkpoint.method in options.methods]
    elif options.model and not options.adapters:
        checkpoints = []
    else:
        folder = options.adapters or shipped_adapters(options.task)
        if not folder.is_dir():
            raise AdapterError(f"there is no folder {folder.name!r}: give one that holds adapters as TAG/METHOD")
        checkpoints, missing = find_checkpoints(folder, dict.fromkeys([*languages, *tags]), options.methods)
        missing = [name for name in missing if name.partition("/")[0] in languages]
    used = [c for c in checkpoints if c.language in languages or (confusion and c.method == "flora")]
    if options.adapter and len(used) < len(checkpoints):
        unused = next(checkpoint for checkpoint in checkpoints if checkpoint not in used)
        raise EvaluationError(f"adapter {unused.name} has no {idle(unused.language)}")
    if not used and "base" not in options.methods:
        raise EvaluationError(f"nothing to evaluate: there is no adapter of {', '.join(languages)} by {', '.join(options.methods)}")
    return used, missing


def say_what_is_missing(missing: Sequence[str]) -> None:
    """One line on stderr for the adapters that are not there."""
    if missing:
        print(f"left out, since there is no such adapter: {', '.join(missing)}", file=sys.stderr)


def model_name(options: argparse.Namespace) -> str | Path:
    """The model to load: a given one, or the one that ships."""
    return options.model or shipped_model(options.task)


def load_engine(options: argparse.Namespace, checkpoints: Sequence[Checkpoint], wanted: str) -> Engine:
    """The model with all adapters, under the names of their checkpoints. wanted: what to give, for a model of the other kind."""
    engine = Engine.from_pretrained(
        model_name(options),
        {checkpoint.name: checkpoint.source for checkpoint in checkpoints},
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        llm_int8_threshold=options.llm_int8_threshold,
        max_batch_size=options.batch_size,
    )
    if engine.kind != options.task:
        raise ModelError(f"--model names the {engine.kind} model {engine.name!r}: give {wanted}")
    return engine


# ------------------------------------------------------------------------------------------------------------------ end


def write_json(options: argparse.Namespace, rows: Sequence[Row]) -> None:
    """What --json asks for."""
    if options.json == "-":
        sys.stdout.writelines(to_line(row) + "\n" for row in rows)
    elif options.json:
        write_rows(options.json, rows)


def merge_results(options: argparse.Namespace, kind: str, rows: Sequence[Row]) -> None:
    """Into what --report keeps. kind: accuracy or answers."""
    folder = options.results or PROJECT / "assets" / "results"
    write_rows(folder / f"{kind}_{options.task}.jsonl", rows, merge=True)
