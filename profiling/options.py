"""Options that the app and the measuring commands share. argparse alone: `--help` and a mistyped option answer at once."""

from __future__ import annotations

import argparse
from typing import Any

RIGHTS = {
    "upload": "adding an adapter by upload",
    "hub": "adding an adapter from the hub",
    "folders": "adapters and models from the server's folders",
    "models": "loading another model for everybody",
    "manage": "replacing and removing adapters that others added, or that ship",
}
"""What visitors of the page can be allowed, and what each is in words."""

ELSEWHERE = frozenset({"upload"})
"""What anybody may do on a page that others can reach, unless the command line says otherwise."""


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


def add_base_model_check(parser: argparse.ArgumentParser) -> None:
    """Whether adapters may name another base model, as `profiling.loading` reads it."""
    parser.add_argument(
        "--any-base-model",
        action="store_true",
        help="take every adapter that fits, also one that says that it was made for another base model",
    )


def weight_words(loaded: Any, any_base_model: bool = False) -> list[str]:
    """The options above as words of a command line, without what is assumed anyway. loaded: an engine, or parsed options.

    any_base_model: whether adapters are asked for that name another base model.
    """
    words = ["--weights", loaded.weights] if loaded.weights != "pretrained" else []
    words += ["--quantize", loaded.quantize] if loaded.quantize is not None else []
    threshold = loaded.llm_int8_threshold
    words += [] if threshold is None else ["--llm-int8-threshold", f"{threshold:g}"]
    return words + ["--any-base-model"] * any_base_model


def add_rights(parser: argparse.ArgumentParser) -> None:
    """--allow, as `profiling.dashboard.policy.Policy.of_command_line` reads it."""
    parser.add_argument(
        "--allow",
        nargs="+",
        choices=(*RIGHTS, "all", "none"),
        metavar="WHAT",
        help=f"what visitors may change: {', '.join(f'{name} ({words})' for name, words in RIGHTS.items())}; or all, or none. "
        f"Default: all for whoever sits at this machine while the page is served to it alone, else {' '.join(ELSEWHERE)}",
    )
