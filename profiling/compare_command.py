"""What `python -m profiling compare` does with its options."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from flora.engine import Engine, Request
from flora.errors import RequestError
from flora.names import public_name
from profiling import hardware, report, workload
from profiling.compare import checked_methods, compare
from profiling.compare_report import report_of
from profiling.comparison import ComparisonResult
from profiling.events import Finished, Progress
from profiling.loading import load_engine, set_threads


def run(options: argparse.Namespace) -> int:
    """Load, compare, print and write; 0 for done, 130 when interrupted. Raises a FloraError for bad input."""
    methods = checked_methods([*options.methods, *(["base"] if options.base and "base" not in options.methods else [])])
    set_threads(options.threads)
    report.check(options)
    engines, requests, audio_names = _load(options)
    print(hardware.summary(hardware.environment(engines)), end="\n\n", file=report.said(options))
    result = _run(engines, requests, methods, options, audio_names)
    if not result.methods and not result.stopped:
        raise RequestError("no row of the batch could be measured")
    report.deliver(report_of(result), options)
    return 130 if result.stopped else 0


def _load(options: argparse.Namespace) -> tuple[dict[str, Engine], list[Request], dict[int, str]]:
    """Engines of the kinds that the batch needs, its requests, and the names of its clips."""
    folder, rows = ".", None
    if options.batch and options.row:
        raise RequestError("give --batch or --row, not both")
    if options.batch:
        folder, rows = Path(options.batch).parent, workload.read_rows(options.batch)
    elif options.row:
        try:
            rows = [json.loads(row) for row in options.row]
        except json.JSONDecodeError as error:
            raise RequestError(f"--row takes a JSON object: {error.msg}") from error
    requests = [workload.request_from_row(row, folder, options.max_new_tokens) for row in rows or ()]
    engines = {}
    for kind in ("code", "speech"):
        if rows is None or kind in map(workload.kind_of, requests):
            engines[kind] = load_engine(kind, options)
    if rows is None:
        rows = workload.ready_rows(
            {kind: engine.adapters for kind, engine in engines.items()}, max_new_tokens=options.max_new_tokens
        )
        requests = [workload.request_from_row(row, folder, options.max_new_tokens) for row in rows]
    names = {index: row["audio"] for index, row in enumerate(rows) if row.get("audio") is not None}
    return engines, requests, {index: public_name(workload.find_clip(name, folder)) for index, name in names.items()}


def _run(
    engines: Mapping[str, Engine],
    requests: Sequence[Request],
    methods: Sequence[str],
    options: argparse.Namespace,
    audio_names: Mapping[int, str],
) -> ComparisonResult:
    """Run the comparison with a progress bar on a terminal. Ctrl-C ends it early and keeps what was measured."""
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
