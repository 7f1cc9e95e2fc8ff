"""A comparison on paper: plain text for a terminal, JSONL, CSV, Markdown, and one HTML page that needs nothing from
anywhere else.
"""

from __future__ import annotations

import html
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora.errors import RequestError
from profiling import figures
from profiling.comparison import ComparisonResult, MethodFigures
from profiling.document import HtmlDocument, text_table
from profiling.timing import Ratio

if TYPE_CHECKING:
    import pandas

NOTE = (
    "Seconds are the method's own engine time, the device synchronised on both sides: prefill and decode, without "
    "preparing the batch. A ratio is the median over paired decode steps with its 95 % bootstrap interval; above 1 means "
    "slower than what it is compared with."
)


# -------------------------------------------------------------------------------------------------------------- tables


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


# ------------------------------------------------------------------------------------------------------------- formats


def text(result: ComparisonResult) -> str:
    """For a terminal: an aligned table, the finding, the conditions, the command."""
    return "\n".join(
        [
            text_table(*figures_table(result)),
            "",
            headline(result),
            conditions(result),
            "",
            NOTE,
            "",
            "Reproduce:",
            result.command,
        ]
    )


def jsonl(result: ComparisonResult) -> str:
    """A JSON document per method and kind."""
    return result.to_jsonl()


def csv(result: ComparisonResult) -> str:
    """`ComparisonResult.to_frame()`."""
    return frame_csv(result.to_frame())


def frame_csv(frame: pandas.DataFrame) -> str:
    """A frame as CSV; a cell that a spreadsheet would take for a formula starts with an apostrophe."""
    return frame.map(_no_formula).to_csv(index=False)


def _no_formula(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def markdown(result: ComparisonResult) -> str:
    """For a notebook or a bug report: finding, table, texts, environment, command."""
    heads, lines = figures_table(result)
    parts = [
        "# Comparison",
        "",
        headline(result),
        "",
        conditions(result) + ".",
        "",
        *_markdown_table(heads, lines),
        "",
        NOTE,
        "",
    ]
    parts += ["## What was written", "", *_markdown_table(*_texts_table(result)), ""]
    parts += [f"- request {index + 1} was left out: {_markdown_cell(message)}" for index, message in result.failures.items()]
    parts += ["## Measured on", "", *_markdown_table(["fact", "value"], environment_lines(result.environment)), ""]
    parts += ["## Reproduce", "", *(f"    {line}" for line in result.command.splitlines()), ""]
    return "\n".join(parts)


def _markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [heads, ["---"] * len(heads), *lines]
    return ["| " + " | ".join(cell if cell == "---" else _markdown_cell(cell) for cell in row) + " |" for row in rows]


def _markdown_cell(cell: str) -> str:
    escaped = html.escape(cell, quote=False).replace("\\", "\\\\")
    for sign in "|`*_[]~$!":
        escaped = escaped.replace(sign, f"\\{sign}")
    return "<br>".join(escaped.splitlines())


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


def environment_lines(environment: Mapping[str, Any]) -> list[list[str]]:
    """`hardware.environment(...)` as lines of a table, fact and value."""
    lines = [[name, str(value)] for name, value in environment.items() if name != "models"]
    for kind, model in environment["models"].items():
        lines += [[f"{kind} model's {name}", str(value)] for name, value in model.items()]
    return lines


def html_page(result: ComparisonResult) -> str:
    """One file with tables, charts and plotly.js inside; nothing is fetched. All text is escaped."""
    methods = list(result.methods)
    num_steps = max((step.step for step in result.steps), default=0) + 1
    page = HtmlDocument("fLoRA Live: a comparison", "A comparison, recorded")
    page.paragraph(headline(result))
    page.paragraph(f"{conditions(result)}.", soft=True)
    for index, message in result.failures.items():
        page.paragraph(f"Request {index + 1} was left out: {message}")
    page.table(*figures_table(result))
    page.paragraph(NOTE, soft=True)
    page.chart("Tokens per second", figures.live_tokens_per_s(result.steps, methods, num_steps))
    page.chart("Step times", figures.step_times(result.steps, methods, num_steps))
    page.heading("What was written")
    page.table(*_texts_table(result), written="text")
    page.heading("Measured on")
    page.table(["fact", "value"], environment_lines(result.environment))
    page.heading("Reproduce")
    page.code(result.command)
    return page.render()


_FORMATS: dict[str, Callable[[ComparisonResult], str]] = {
    ".html": html_page,
    ".md": markdown,
    ".csv": csv,
    ".jsonl": jsonl,
}


def check_suffix(path: str | os.PathLike) -> None:
    """Raise RequestError where `path` does not end in a format that `render` knows."""
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise RequestError(f"a report cannot be written as {suffix or 'a file without a suffix'}: choose {', '.join(_FORMATS)}")


def render(result: ComparisonResult, path: str | os.PathLike) -> str:
    """The report in the format that the suffix of `path` asks for."""
    check_suffix(path)
    return _FORMATS[Path(path).suffix.lower()](result)


def write_report(result: ComparisonResult, path: str | os.PathLike) -> None:
    """Write the report in the format that the suffix of `path` asks for; RequestError where it cannot be written."""
    write_text(path, render(result, path))


def write_text(path: str | os.PathLike, content: str) -> None:
    """Write a file as it is, or raise RequestError with the reason."""
    try:
        Path(path).write_bytes(content.encode("utf-8"))
    except OSError as error:
        raise RequestError(f"cannot write {Path(path).name!r}: {error.strerror}") from error


def own_command() -> str:
    """The `python -m profiling …` line that is running, without where it writes its rows: for the rows themselves."""
    words = sys.argv[1:]
    while "--json" in words:
        place = words.index("--json")
        del words[place : place + 2]
    return shlex.join(["python", "-m", "profiling", *words])
