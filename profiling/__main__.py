"""The measuring command line: `python -m profiling compare …`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from flora.errors import FloraError, ModelError, RequestError


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
    compare.set_defaults(run=_compare)
    return parser


def _compare(options: argparse.Namespace) -> int:
    # Heavy imports wait until the command line is known to be good: --help and a mistyped option answer at once.
    import torch

    from profiling import hardware, report
    from profiling.compare import checked_methods

    methods = checked_methods([*options.methods, *(["base"] if options.base and "base" not in options.methods else [])])
    if options.threads is not None:
        if options.threads < 1:
            raise RequestError("--threads must be at least 1")
        torch.set_num_threads(options.threads)
    if options.report:
        report.check_suffix(options.report)

    engines, requests, audio_names = _load(options)
    said = sys.stderr if options.json == "-" else sys.stdout  # rows on stdout stay alone there
    print(hardware.summary(hardware.environment(engines)), end="\n\n", file=said)
    result = _run(engines, requests, methods, options, audio_names)
    for index, message in result.failures.items():
        print(f"row {index + 1} is left out: {message}", file=sys.stderr)
    if not result.methods and not result.stopped:
        raise RequestError("no row of the batch could be measured")
    print(report.text(result), file=said)
    if options.json == "-":
        sys.stdout.write(result.to_jsonl())
    elif options.json:
        report.write_text(options.json, result.to_jsonl())
    if options.report:
        report.write_report(result, options.report)
    return 130 if result.stopped else 0


def _load(options: argparse.Namespace) -> tuple[dict, list, dict[int, str]]:
    """Engines of the kinds that the batch needs, its requests, and the names of its clips."""
    import json

    from flora.engine import Engine
    from profiling import workload

    folder, rows = ".", None
    if options.batch and options.row:
        raise RequestError("give --batch or --row, not both")
    if options.batch:
        folder, rows = workload.Path(options.batch).parent, workload.read_rows(options.batch)
    elif options.row:
        try:
            rows = [json.loads(row) for row in options.row]
        except json.JSONDecodeError as error:
            raise RequestError(f"--row takes a JSON object: {error.msg}") from error
    requests = [workload.request_from_row(row, folder, options.max_new_tokens) for row in rows or ()]
    engines = {}
    for kind in ("code", "speech"):
        if rows is None or kind in map(workload.kind_of, requests):
            model = getattr(options, f"{kind}_model")
            given = getattr(options, f"{kind}_adapters")
            # The adapters that ship fit the models that ship.
            shipped = {} if model else workload.discover_adapters(workload.ASSETS / "adapters" / kind)
            adapters = _adapters(given) if given else shipped
            source = model or workload.ASSETS / "models" / kind
            engine = Engine.from_pretrained(source, adapters=adapters, device=options.device, dtype=options.dtype)
            if engine.kind != kind:
                raise ModelError(f"--{kind}-model names the {engine.kind} model {engine.name!r}: give a {kind} model")
            engines[kind] = engine
    if rows is None:
        rows = workload.ready_rows(
            {kind: engine.adapters for kind, engine in engines.items()}, max_new_tokens=options.max_new_tokens
        )
        requests = [workload.request_from_row(row, folder, options.max_new_tokens) for row in rows]
    return engines, requests, {index: row["audio"] for index, row in enumerate(rows) if row.get("audio") is not None}


def _adapters(given: Sequence[str]) -> Mapping[str, list[str]]:
    adapters: dict[str, list[str]] = {}
    for entry in given:
        tag, equals, folder = entry.partition("=")
        if not (tag and equals and folder):
            raise RequestError(f"an adapter is given as TAG=FOLDER, not {entry!r}")
        adapters.setdefault(tag, []).append(folder)
    return adapters


def _run(
    engines: Mapping,
    requests: Sequence,
    methods: Sequence[str],
    options: argparse.Namespace,
    audio_names: Mapping[int, str],
):
    """Run the comparison with a progress bar on a terminal. Ctrl-C ends it early and keeps what was measured."""
    import signal

    from tqdm import tqdm

    from profiling.compare import Finished, Progress, compare

    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    bar = tqdm(leave=False, disable=None, unit="step")
    try:
        for event in compare(
            engines,
            requests,
            methods,
            warmup_steps=options.warmup,
            repeats=options.repeats,
            seed=options.seed,
            should_stop=lambda: bool(interrupts),
            audio_names=audio_names,
            model_names={kind: getattr(options, f"{kind}_model") for kind in engines if getattr(options, f"{kind}_model")},
        ):
            if isinstance(event, Progress):
                bar.set_description(event.stage, refresh=False)
                bar.total, bar.n = event.total, event.done
                bar.refresh()
            elif isinstance(event, Finished):
                return event.result
    finally:
        bar.close()
        signal.signal(signal.SIGINT, before)
    raise AssertionError("a comparison ends with Finished")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; 0 for done, 2 with one line on stderr for bad input, 130 when interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except FloraError as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    sys.exit(main())
