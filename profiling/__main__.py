"""The measuring command line: `python -m profiling compare …`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    """Bad input: one line, exit 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m profiling", description="Measure fLoRA beside other ways to serve many adapters at once.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Parser)
    compare = commands.add_parser(
        "compare",
        help="methods side by side on one batch, their steps taking turns",
        description="Run one batch under several methods, paired and interleaved, and print what each did. "
        "Without --batch or --row: the ready batch, four code prompts and four clips with an adapter each.",
    )
    compare.add_argument("--methods", nargs="+", default=["flora", "bmm-lora"], metavar="METHOD", help="default: flora bmm-lora")
    compare.add_argument(
        "--base",
        action="store_true",
        help="take part with the bare base model too: each decode step relative to its step",
    )
    for kind in ("code", "speech"):
        compare.add_argument(f"--{kind}-model", metavar="MODEL", help=f"folder or hub id; default: the embedded {kind} model")
        compare.add_argument(
            f"--{kind}-adapters",
            nargs="+",
            metavar="TAG=FOLDER",
            help="a tag may be given twice, once per family; default: the adapters that ship",
        )
    compare.add_argument("--batch", metavar="FILE", help="JSON or JSONL rows {prompt or audio, adapter, max_new_tokens}")
    compare.add_argument("--row", action="append", metavar="JSON", help="one such row; may be given many times")
    compare.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="for rows that do not say; default: 48")
    compare.add_argument("--warmup", type=int, default=5, metavar="STEPS", help="decode steps before the clocks start; default: 5")
    compare.add_argument("--repeats", type=int, default=1, metavar="N", help="generate the batch so often; default: 1")
    compare.add_argument("--seed", type=int, default=0, metavar="N")
    compare.add_argument("--threads", type=int, metavar="N", help="torch's CPU threads; default: torch's own choice")
    compare.add_argument("--device", default="auto", help="auto, cpu, cuda, mps; default: auto")
    compare.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16; default: auto")
    compare.add_argument("--json", metavar="FILE", help="write a JSONL row per method and kind")
    compare.add_argument("--report", metavar="FILE", help="write a report; the suffix says which: .html, .md or .csv")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; 0 for done, 2 with one line on stderr for bad input, 130 when interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    # At import it warns on every CPU that an optional kernel is missing; 4-bit weights, which would use it, need a GPU here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Torch and the models' libraries take seconds to import: --help and a mistyped option answer at once.
    from flora.errors import FloraError
    from profiling import compare_command

    try:
        return compare_command.run(options)
    except FloraError as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    sys.exit(main())
