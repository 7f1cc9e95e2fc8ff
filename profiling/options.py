"""Options that the app and the measuring commands share. argparse alone: `--help` and a mistyped option answer at once."""

from __future__ import annotations

import argparse


def add_weights(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Which weights the models have, as `profiling.loading.load_engine` reads them."""
    parser.add_argument(
        "--weights",
        choices=("pretrained", "random"),
        default="pretrained",
        help="random: the model's true shapes without any download, for measuring speed; default: pretrained",
    )
    parser.add_argument("--quantize", choices=("int8", "nf4"), help="load the weights in 8 or 4 bits; default: as they are")
