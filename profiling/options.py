"""Options that the app and the measuring commands share. argparse alone: `--help` and a mistyped option answer at once."""

from __future__ import annotations

import argparse
from typing import Any


def add_weights(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Which weights the models have, as `profiling.loading.load_engine` reads them."""
    parser.add_argument(
        "--weights",
        choices=("pretrained", "random"),
        default="pretrained",
        help="random: the model's true shapes without any download, for measuring speed; default: pretrained",
    )
    parser.add_argument("--quantize", choices=("int8", "nf4"), help="load the weights in 8 or 4 bits; default: as they are")
    parser.add_argument(
        "--llm-int8-threshold",
        type=float,
        metavar="SIZE",
        help="with --quantize int8: inputs of this size or more are computed unquantised, see docs/int8.md; 0: none; default: 6",
    )


def weight_words(loaded: Any) -> list[str]:
    """The options above as words of a command line, without what is assumed anyway. loaded: an engine, or parsed options."""
    words = ["--weights", loaded.weights] if loaded.weights != "pretrained" else []
    words += ["--quantize", loaded.quantize] if loaded.quantize is not None else []
    threshold = loaded.llm_int8_threshold
    return words + ([] if threshold is None else ["--llm-int8-threshold", f"{threshold:g}"])
