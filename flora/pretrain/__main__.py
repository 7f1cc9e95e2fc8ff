"""python -m flora.pretrain code|speech: train an embedded base model from scratch."""

from __future__ import annotations

import argparse
import importlib
import sys

KINDS = {"code": "a GPTBigCode on generated programs", "speech": "a Whisper on synthesised phrases"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flora.pretrain", description=__doc__)
    subparsers = parser.add_subparsers(dest="kind", required=True, metavar="code|speech")
    words = sys.argv[1:] if argv is None else argv
    for kind, description in KINDS.items():
        subparser = subparsers.add_parser(
            kind, help=description, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        if kind in words[:1]:  # the other kind's libraries are not needed
            module = importlib.import_module(f"flora.pretrain.{kind}")
            module.add_arguments(subparser)
    arguments = parser.parse_args(words)
    try:
        return module.main(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
