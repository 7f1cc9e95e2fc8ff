"""Rows of other people's data, read the same way for training and for judging: lines of JSON, CSV and TSV, sound in data sets."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from typing import Any

LARGEST_BAD_SHARE = 0.01
"""Of the rows that may be left out; with more of them the data is taken for another kind than what was meant."""

NOT_JSON, NOT_AN_OBJECT = "is not JSON", "is not a JSON object"


def json_lines(lines: Iterable[str | bytes]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line's number, row) of JSONL, and in place of a row that is none what is wrong with the line. Empty lines are no rows."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8") if isinstance(line, bytes) else line)
        except (ValueError, RecursionError):  # of which UnicodeDecodeError and JSONDecodeError are kinds
            yield number, NOT_JSON
        else:
            yield number, row if isinstance(row, dict) else NOT_AN_OBJECT


def cells(file: Iterable[str], tabs: bool, strict: bool = False) -> csv.DictReader:
    """The rows of a CSV, or of a TSV, by the names in the first line; cells of any length. csv.Error, when read, for a broken one.

    Quotation marks enclose a CSV's cells. In a TSV they are text, as in Common Voice's. strict: whether a CSV's cell that is never
    closed is an error.
    """
    csv.field_size_limit(2**31 - 1)  # a program may be longer than the 128 kB that are usual
    if tabs:
        return csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.DictReader(file, strict=strict)


def with_sound_as_files(data: Any) -> Any:
    """A data set of the `datasets` library with the content of files in place of decoded sound: `flora.audio` reads all sound."""
    import datasets  # heavy, and needed here only

    for column, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Audio):
            data = data.cast_column(column, datasets.Audio(decode=False))
    return data
