"""A live load on paper: what was seen of it, by method, and every sample that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from profiling.dashboard.live_load_views import Moment, run_table, verdict
from profiling.figures import METHOD_STYLES
from profiling.load import Sample
from profiling.load_figures import over_time
from profiling.report import Note, Report, Table, TitledChart

NOTE = (
    "Seen while the page was open: a visitor's own load in the batch that everybody shares, changed by hand. The command measures "
    "the last setting again, alone, for a minute. TTFT and TPOT are medians over time of the medians of the last seconds; tokens/s "
    "and the queue are everybody's."
)


def report_of(moment: Moment, command: str, environment: Mapping[str, Any]) -> Report | None:
    """None where nothing was seen."""
    if not moment.samples:
        return None
    heads, *lines = run_table(moment)
    shared = {"hardware": {name: value for name, value in environment.items() if name != "models"}, "command": command}
    by_method = _by_method(moment)
    series = {
        name: {method: ([one.time_s for one in own], [getattr(one, name) for one in own]) for method, own in by_method.items()}
        for name in ("tokens_per_s", "num_running", "num_waiting")
    }
    tokens = over_time(series["tokens_per_s"], "New tokens per second", "tokens/s", "higher is better")
    charts = [
        TitledChart("Tokens per second", tokens),
        TitledChart("Batch", over_time(series["num_running"], "Requests running", "requests", "a full batch is busy")),
        TitledChart("Queue length", over_time(series["num_waiting"], "Requests waiting", "requests")),
    ]
    last = moment.samples[-1]
    outcomes = ", ".join(f"{count:,} {name}" for name, count in last.outcomes.items() if count) or "none ended"
    return Report(
        title="a live load",
        sentences=[verdict(moment)[1]],
        conditions=f"{moment.now_s:.0f} seconds, {last.num_sent:,} requests sent, {outcomes}, one run",
        parts=[Table(*_table(by_method), num_names=1), *charts, Note(NOTE)],
        environment=environment,
        command=command,
        rows=[dict(zip(heads, line, strict=True)) | shared for line in lines],
    )


def _by_method(moment: Moment) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in moment.samples:
        found.setdefault(moment.method_at(sample.time_s), []).append(sample)
    return found


def _table(by_method: Mapping[str, Sequence[Sample]]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for method, own in by_method.items():
        waiting = [sample.num_waiting for sample in own]
        numbers = [f"{mean(sample.tokens_per_s for sample in own):,.0f}", f"{mean(sample.num_running for sample in own):.1f}"]
        numbers += [f"{mean(waiting):.1f}", str(max(waiting))]
        for summaries in ([sample.ttft_s for sample in own], [sample.tpot_s for sample in own]):
            known = [1000 * summary["p50"] for summary in summaries if summary]
            numbers.append(f"{median(known):.2f}" if known else "–")
        lines.append([METHOD_STYLES[method].label, str(len(own)), *numbers])
    return ["method", "samples", "tokens/s", "running", "waiting", "waiting max", "TTFT ms", "TPOT ms"], lines
