"""The evaluating command line: `python -m flora.evaluate code|speech …`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from flora.errors import FloraError
from flora.evaluate.rows import command_line

TASKS = {
    "code": "pass@k of generated programs, each run in a sandbox",
    "speech": "word error rate of transcripts",
}
"""Sub-command → what it measures. Its module, `flora.evaluate.<name>`, has `add_arguments(parser)` and `main(options) -> int`."""


class _Parser(argparse.ArgumentParser):
    """Bad input: one line, exit 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; 0 for done, 2 with one line on stderr for bad input, 130 when interrupted.

    The sub-command's options have `command`, the line that makes the same rows again.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser(
        prog="python -m flora.evaluate", description="Judge a base model and its adapters on items held out of training."
    )
    commands = parser.add_subparsers(dest="task", required=True, metavar="code|speech", parser_class=_Parser)
    for name, description in TASKS.items():
        command = commands.add_parser(name, help=description, description=f"Measure the {description}.")
        if name in words[:1]:  # the other one's libraries are not needed
            module = importlib.import_module(f"flora.evaluate.{name}")
            module.add_arguments(command)
    options = parser.parse_args(words)
    options.command = command_line(words)
    try:
        return module.main(options)
    except FloraError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
