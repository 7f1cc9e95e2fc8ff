"""A comparison on paper: its table, its finding, its conditions, what was written, its charts."""

from __future__ import annotations

from profiling import figures
from profiling.comparison import ComparisonResult, MethodFigures
from profiling.report import Note, Report, Table, TitledChart
from profiling.timing import Ratio

NOTE = (
    "Seconds are the method's own engine time, the device synchronised on both sides: prefill and decode, without "
    "preparing the batch. A ratio is the median over paired decode steps with its 95 % bootstrap interval; above 1 means "
    "slower than what it is compared with."
)


def report_of(result: ComparisonResult) -> Report:
    """All that is said and drawn of a comparison."""
    methods, num_steps = list(result.methods), max((step.step for step in result.steps), default=0) + 1
    left_out = [f"Request {index + 1} was left out: {message}" for index, message in result.failures.items()]
    return Report(
        title="a comparison",
        sentences=[headline(result), *left_out],
        conditions=conditions(result),
        parts=[
            Table(*figures_table(result)),
            Note(NOTE),
            TitledChart("Tokens per second", figures.live_tokens_per_s(result.steps, methods, num_steps)),
            TitledChart("Step times", figures.step_times(result.steps, methods, num_steps)),
            Table(*_texts_table(result), title="What was written", written="text", detail=True),
        ],
        environment=result.environment,
        command=result.command,
        rows=result.to_rows(),
    )


def figures_table(result: ComparisonResult) -> tuple[list[str], list[list[str]]]:
    """Heads and cells, a line per kind and method, as text with units in the heads. The same table in every format."""
    first = next(iter(result.methods), None)
    beside_base = "base" in result.methods and first != "base"  # else the column before says it
    heads = [
        "kind",
        "method",
        "rank",
        "tokens/s",
        "decode tokens/s",
        "TTFT ms",
        "TPOT ms",
        "step ms p50",
        "step ms p90",
    ]
    heads += [f"step / {figures.METHOD_STYLES[first].label}"] if first and len(result.methods) > 1 else []
    heads += ["step / base model"] if beside_base else []
    heads += ["agree with reference", "max |Δ logit|"]
    kinds = list(next(iter(result.methods.values())).by_kind) if result.methods else []
    lines = []
    for kind in kinds if len(kinds) == 1 else [*kinds, "all"]:
        for method, over_all in result.methods.items():
            part = over_all if kind == "all" else over_all.by_kind[kind]
            line = [kind, figures.METHOD_STYLES[method].label, _ranks(part)]
            line += [
                _number(part.tokens_per_s, 0),
                _number(part.decode_tokens_per_s, 0),
                _milliseconds(part.ttft_s),
                _milliseconds(part.tpot_s),
            ]
            line += [_milliseconds(part.step_quantiles.get("p50")), _milliseconds(part.step_quantiles.get("p90"))]
            line += [_ratio(part.ratio_to_first, method == first)] if len(result.methods) > 1 else []
            line += [_ratio(part.ratio_to_base, method == "base")] if beside_base else []
            line += list(_agreement(part))
            lines.append(line)
    return heads, lines


def conditions(result: ComparisonResult) -> str:
    """n, warm-up and the rest of what a reader must know beside the numbers, in one line."""
    parts = [f"n = {result.num_steps} paired decode steps", f"{result.warmup_steps} warm-up steps"]
    parts += [_times(result.repeats), f"batch of {result.batch} ({result.popularity} adapters)"]
    parts += [f"seed {result.seed}", f"peak memory {result.peak_memory_bytes / 1e6:.0f} MB ({result.peak_memory_of})"]
    return ", ".join(parts + ["stopped early"] * result.stopped)


def headline(result: ComparisonResult) -> str:
    """The finding in one sentence."""
    if result.ratio is None:
        return "Nothing to compare: no two methods were measured on a decode step."
    first, second = (figures.METHOD_STYLES[method].label for method in list(result.methods)[:2])
    ratio = result.ratio
    if ratio.low <= 1.0 <= ratio.high:
        return f"No difference shown: {second}'s decode step takes {ratio} times {first}'s (n = {ratio.n})."
    faster = first if ratio.median > 1 else second
    return f"{faster} is faster: {second}'s decode step takes {ratio} times {first}'s (n = {ratio.n})."


def _times(repeats: int) -> str:
    return "1 repeat" if repeats == 1 else f"{repeats} repeats"


def _ranks(part: MethodFigures) -> str:
    ranks = sorted(set(part.ranks))
    return ", ".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]}–{ranks[-1]}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:.2f}"


def _ratio(ratio: Ratio | None, is_reference: bool) -> str:
    return "1" if is_reference else "–" if ratio is None else str(ratio)


def _agreement(part: MethodFigures) -> tuple[str, str]:
    if part.agreement is None:
        return "not checked", "–"
    difference = part.agreement.max_logit_difference
    return (
        f"{part.agreement.agreeing} / {part.agreement.tokens} tokens",
        "–" if difference is None else f"{difference:.1e}",
    )


def _texts_table(result: ComparisonResult) -> tuple[list[str], list[list[str]]]:
    heads = ["request", "adapter", "method", "text", "tokens", "TTFT ms", "TPOT ms"]
    lines = [
        [
            f"{row['index'] + 1} ({row['kind']})",
            row["adapter"] or "none",
            figures.METHOD_STYLES[row["method"]].label,
            row["text"],
            str(row["num_new_tokens"]),
            _milliseconds(row["ttft_s"]),
            _milliseconds(row["tpot_s"]),
        ]
        for row in result.rows
    ]
    return heads, lines
