"""A measurement on paper: what was found, on what, and how to do it again, in five formats of the same content.

.html    one page with charts and plotly.js inside, which needs nothing from anywhere else
.md      for a notebook or a bug report
.csv     a line per row, for a spreadsheet
.jsonl   the rows as they are, a JSON document each
text     for a terminal
"""

from __future__ import annotations

import argparse
import html
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from flora.errors import RequestError
from profiling.document import HtmlDocument, text_table
from profiling.figures import Chart

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Table:
    """Heads and lines of cells, as text with units in the heads: the same table in every format.

    title: a heading of its own. note: what must be known to read it. num_names: columns of words, which a terminal aligns left.
    written: the column of generated text, whose line breaks and spaces are kept. detail: too much for a terminal.
    """

    heads: Sequence[str]
    lines: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    num_names: int = 2
    written: str | None = None
    detail: bool = False


@dataclass(frozen=True)
class TitledChart:
    """A chart under a heading. Formats without pictures have its sentence."""

    title: str
    chart: Chart


@dataclass(frozen=True)
class Note:
    """How what stands above it was measured and is to be read."""

    text: str


@dataclass(frozen=True)
class Report:
    """What a measurement found, and all that is needed to make it again.

    title: what was measured. sentences: the findings, the headline first. conditions: n, warm-up and the rest of what must stand
    beside the numbers. parts: from top to bottom. environment: `hardware.environment(...)`. command: what measures the same again.
    rows: the numbers, each with everything it was measured on. left_to_json: entries of a row with many values, which a spreadsheet
    goes without.
    """

    title: str
    sentences: Sequence[str]
    conditions: str
    parts: Sequence[Table | TitledChart | Note]
    environment: Mapping[str, Any]
    command: str
    rows: Sequence[Mapping[str, Any]]
    left_to_json: frozenset[str] = field(default=frozenset())


# ------------------------------------------------------------------------------------------------------------- formats


def html_page(report: Report) -> str:
    """One file with tables, charts and plotly.js inside; nothing is fetched. All text is escaped."""
    page = HtmlDocument(f"fLoRA Live: {report.title}", f"{report.title[:1].upper()}{report.title[1:]}, recorded")
    for sentence in report.sentences:
        page.paragraph(sentence)
    page.paragraph(f"{report.conditions}.", soft=True)
    for part in report.parts:
        match part:
            case Table():
                if part.title:
                    page.heading(part.title)
                page.table(part.heads, part.lines, part.written)
                if part.note:
                    page.paragraph(part.note, soft=True)
            case TitledChart():
                page.chart(part.title, part.chart)
            case Note():
                page.paragraph(part.text, soft=True)
    page.heading("Measured on")
    page.table(["fact", "value"], environment_lines(report.environment))
    page.heading("Reproduce")
    page.code(report.command)
    return page.render()


def markdown(report: Report) -> str:
    """Findings, tables, the charts' sentences, environment, command."""
    lines = [f"# {_markdown_cell(report.title[:1].upper() + report.title[1:])}", ""]
    for sentence in report.sentences:
        lines += [_markdown_cell(sentence), ""]
    lines += [f"{_markdown_cell(report.conditions)}.", ""]
    for part in report.parts:
        match part:
            case Table():
                lines += [f"## {part.title}", ""] if part.title else []
                lines += [*_markdown_table(part.heads, part.lines), ""]
                lines += [_markdown_cell(part.note), ""] if part.note else []
            case TitledChart():
                lines += [_markdown_cell(part.chart.description), ""]
            case Note():
                lines += [_markdown_cell(part.text), ""]
    lines += ["## Measured on", "", *_markdown_table(["fact", "value"], environment_lines(report.environment)), ""]
    return "\n".join([*lines, "## Reproduce", "", *(f"    {line}" for line in report.command.splitlines()), ""])


def csv(report: Report) -> str:
    """A line per row; nested facts become dotted columns such as `agreement.agreeing`."""
    return frame_csv(frame(report.rows, report.left_to_json))


def jsonl(report: Report) -> str:
    """A JSON document per row."""
    return lines_of(report.rows)


def text(report: Report) -> str:
    """For a terminal: aligned tables, the findings, the conditions, the command."""
    said: list[str] = []
    for part in report.parts:
        if isinstance(part, Table) and not part.detail:
            said += [text_table(part.heads, part.lines, part.num_names), *([part.note] if part.note else []), ""]
    said += [*report.sentences, report.conditions, ""]
    for part in report.parts:
        if isinstance(part, Note):
            said += [part.text, ""]
    return "\n".join([*said, "Reproduce:", report.command])


_FORMATS: dict[str, Callable[[Report], str]] = {".html": html_page, ".md": markdown, ".csv": csv, ".jsonl": jsonl}


def check_suffix(path: str | os.PathLike) -> None:
    """Raise RequestError where `path` does not end in a format that `render` knows."""
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise RequestError(f"a report cannot be written as {suffix or 'a file without a suffix'}: choose {', '.join(_FORMATS)}")


def render(report: Report, path: str | os.PathLike) -> str:
    """The report in the format that the suffix of `path` asks for."""
    check_suffix(path)
    return _FORMATS[Path(path).suffix.lower()](report)


def check(options: argparse.Namespace) -> None:
    """RequestError, before anything is loaded, where `deliver` could not write what the options ask for."""
    if options.report:
        check_suffix(options.report)


def deliver(report: Report, options: argparse.Namespace) -> None:
    """Print the report for a terminal, and write the files that --json, --csv and --report name.

    Rows that `--json -` puts on standard output stay alone there.
    """
    print(text(report), file=said(options))
    if options.json == "-":
        sys.stdout.write(jsonl(report))
    elif options.json:
        write_text(options.json, jsonl(report))
    if getattr(options, "csv", None):
        write_text(options.csv, csv(report))
    if options.report:
        write(report, options.report)


def said(options: argparse.Namespace) -> TextIO:
    """Where words go: away from standard output where `--json -` has it."""
    return sys.stderr if options.json == "-" else sys.stdout


def write(report: Report, path: str | os.PathLike) -> None:
    """Write the report in the format that the suffix of `path` asks for; RequestError where it cannot be written."""
    write_text(path, render(report, path))


# -------------------------------------------------------------------------------------------------------------- pieces


def write_text(path: str | os.PathLike, content: str) -> None:
    """Write a file as it is, or raise RequestError with the reason."""
    try:
        Path(path).write_bytes(content.encode("utf-8"))
    except OSError as error:
        raise RequestError(f"cannot write {Path(path).name!r}: {error.strerror}") from error


def lines_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """JSONL; ValueError for a number that JSON has not."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def frame(rows: Iterable[Mapping[str, Any]], without: frozenset[str] = frozenset()) -> pandas.DataFrame:
    """Rows as a table, without the entries named."""
    import pandas

    return pandas.json_normalize([{key: value for key, value in row.items() if key not in without} for row in rows])


def frame_csv(frame: pandas.DataFrame) -> str:
    """A frame as CSV; a cell that a spreadsheet would take for a formula starts with an apostrophe."""
    return frame.map(_no_formula).to_csv(index=False)


def _no_formula(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [heads, ["---"] * len(heads), *lines]
    return ["| " + " | ".join(cell if cell == "---" else _markdown_cell(cell) for cell in row) + " |" for row in rows]


def _markdown_cell(cell: str) -> str:
    escaped = html.escape(cell, quote=False).replace("\\", "\\\\")
    for sign in "|`*_[]~$!":
        escaped = escaped.replace(sign, f"\\{sign}")
    return "<br>".join(escaped.splitlines())


def environment_lines(environment: Mapping[str, Any]) -> list[list[str]]:
    """`hardware.environment(...)` as lines of a table, fact and value."""
    lines = [[name, str(value)] for name, value in environment.items() if name != "models"]
    for kind, model in environment["models"].items():
        lines += [[f"{kind} model's {name}", str(value)] for name, value in model.items()]
    return lines


def own_command() -> str:
    """The `python -m profiling …` line that is running, without where it writes its rows: for the rows themselves."""
    words = sys.argv[1:]
    while "--json" in words:
        place = words.index("--json")
        del words[place : place + 2]
    return shlex.join(["python", "-m", "profiling", *words])
