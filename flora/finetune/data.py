"""Data of one's own: rows from a file, a folder or the hub, each one checked; the bad ones counted, named and left out.

    code     a text column, or a prompt and a completion column: then only the completion is learnt
    speech   an audio column (a file's name, or the sound itself as data sets hold it) and a text column

Sources: JSONL, CSV or Parquet files; folders of them; folders of sound with metadata.csv or metadata.jsonl beside it; folders that
`datasets` saved; data sets on the hub. Nothing that is read here is ever run or unpickled.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from flora.audio import load_audio
from flora.errors import AudioError, DataError, first_line
from flora.names import last_part
from flora.tables import LARGEST_BAD_SHARE, cells, json_lines, with_sound_as_files

NAMED = 5  # bad rows that a message names
PEEKED = 50  # rows that show which columns there are
TEXT_COLUMNS = ("text", "content", "code", "sentence", "transcription", "transcript")
PROMPT_COLUMNS = ("prompt", "instruction")
COMPLETION_COLUMNS = ("completion", "response", "output")
AUDIO_COLUMNS = ("audio", "file_name", "file", "path", "audio_path")
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class Source:
    """Where rows come from: a path or hub id, and the names of its columns where they are not the usual ones.

    split, config, directory: of a data set with several. limit: rows to read at most. enough: rows after which a data set on the
    hub, which may be huge, is read no further where there is no limit.
    """

    name: str
    split: str = "train"
    config: str | None = None
    directory: str | None = None
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    audio: str | None = None
    limit: int | None = None
    enough: int | None = None

    @property
    def display(self) -> str:
        """The last part of a path; a hub id as it is."""
        return last_part(self.name)


@dataclass(frozen=True)
class Text:
    """A text to learn. Only the completion is predicted; the prompt may be empty."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Clip:
    """A clip to transcribe. audio: its file, or a file's content."""

    audio: Path | bytes
    text: str
    place: str


@dataclass(frozen=True)
class Row:
    """One row of a source. place: what a message calls it. problem: why there are no fields."""

    place: str
    fields: dict[str, Any] | None = None
    problem: str | None = None
    folder: Path | None = None  # that file names in the row are relative to


@dataclass
class Tally:
    """How many rows were read, and which of them were left out, and why."""

    name: str
    read: int = 0
    bad: list[str] = field(default_factory=list)

    def check(self) -> None:
        """DataError where more than 1 % of the rows are bad, or there are none at all."""
        if self.read == 0:
            raise DataError(f"data {self.name} holds no rows")
        if len(self.bad) > LARGEST_BAD_SHARE * self.read:
            raise DataError(f"data {self.name}: {self}; more than {LARGEST_BAD_SHARE:.0%} are bad, so nothing was trained")

    def __str__(self) -> str:
        named = "; ".join(self.bad[:NAMED])
        more = f"; and {len(self.bad) - NAMED} more" if len(self.bad) > NAMED else ""
        return f"{len(self.bad)} of {self.read} rows left out ({named}{more})" if self.bad else f"{self.read} rows, none left out"


Example = TypeVar("Example", Text, Clip)


class BadRow(Exception):
    """Why a row is left out."""


def read_texts(source: Source, refuse: Callable[[str], str | None]) -> tuple[list[Text], Tally]:
    """All texts of a source that are fit to learn from, and the tally of those that are not. DataError where too many are not.

    refuse: why a prompt leaves no room for a completion, or None where it does.
    """

    def choose(columns: set[str]) -> Callable[[Row], Text]:
        prompt = _column(columns, source, "prompt", PROMPT_COLUMNS)
        completion = _column(columns, source, "completion", COMPLETION_COLUMNS)
        way_out = "--text-column, or --prompt-column and --completion-column"
        if source.text is None and prompt is not None and completion is not None:
            return lambda row: _text(row, prompt, completion, refuse)
        if source.prompt is not None or source.completion is not None:
            raise _no_column(source, columns, "completion" if completion is None else "prompt", way_out)
        text = _column(columns, source, "text", TEXT_COLUMNS)
        if text is None:
            raise _no_column(source, columns, "text", way_out)
        return lambda row: Text("", _string(row, text))

    return _read(source, choose)


def read_clips(source: Source, window_s: float, refuse: Callable[[str], str | None]) -> tuple[list[Clip], Tally]:
    """All clips of a source that can be heard and have a transcript, and the tally of those that have not.

    Every clip is decoded once: a broken one is found now, not in the middle of the run. window_s: what the model hears at most.
    refuse: why a transcript cannot be learnt, or None where it can.
    """

    def choose(columns: set[str]) -> Callable[[Row], Clip]:
        audio = _column(columns, source, "audio", AUDIO_COLUMNS)
        text = _column(columns, source, "text", TEXT_COLUMNS)
        if audio is None:
            raise _no_column(source, columns, "audio", "--audio-column")
        if text is None:
            raise _no_column(source, columns, "text", "--text-column")
        return lambda row: _clip(row, audio, text, window_s, refuse)

    return _read(source, choose)


def fingerprint(examples: Sequence[Text | Clip]) -> str:
    """A hash of what there is to learn: texts, and where clips come from."""
    digest = hashlib.sha256()
    for example in examples:
        parts = (example.prompt, example.completion) if isinstance(example, Text) else (example.place, example.text)
        digest.update("\x00".join(parts).encode("utf-8", "surrogatepass") + b"\x01")
    return digest.hexdigest()


def split_by_text(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """(to learn from, held out): about `share` of the texts, at least one, chosen by their hash. The same text is never in both."""

    def key(example: Text | Clip) -> str:
        text = example.prompt + "\x00" + example.completion if isinstance(example, Text) else example.text
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    keys = sorted({key(example) for example in examples})
    if len(keys) < 2:
        raise DataError("the data has fewer than two different texts: nothing could be held out; give more, or --validation SOURCE")
    held_out = set(keys[: min(len(keys) - 1, max(1, round(share * len(keys))))])
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[key(example) in held_out].append(example)
    return sides


# ---------------------------------------------------------------------------------------------------------- rows to examples


def _read(source: Source, choose: Callable[[set[str]], Callable[[Row], Example]]) -> tuple[list[Example], Tally]:
    """Every row through what `choose` makes of the columns; rows that refuse are tallied."""
    tally, examples = Tally(source.display), []
    try:
        rows = itertools.islice(_rows(source), source.limit)
        first = list(itertools.islice(rows, PEEKED))
        columns = set().union(*(row.fields for row in first if row.fields is not None))
        make = choose(columns) if columns else None
        for row in itertools.chain(first, rows):
            tally.read += 1
            try:
                if row.fields is None or make is None:
                    raise BadRow(row.problem or "has no columns")
                examples.append(make(row))
            except BadRow as reason:
                tally.bad.append(f"{row.place} {reason}")
    except OSError as error:
        raise DataError(f"data {source.display} cannot be read: {error.strerror or type(error).__name__}") from error
    tally.check()
    return examples, tally


def _column(columns: set[str], source: Source, role: str, usual: tuple[str, ...]) -> str | None:
    """The column of a role: the one the source names, which must be there, else the first usual one that is."""
    named = getattr(source, role)
    if named is not None and named not in columns:
        raise _no_column(source, columns, named, f"another one with --{role}-column")
    return named or next((column for column in usual if column in columns), None)


def _no_column(source: Source, columns: set[str], wanted: str, way_out: str) -> DataError:
    there = ", ".join(sorted(columns)) or "none"
    return DataError(f"data {source.display} has no column {wanted!r}; its columns are {there}: name {way_out}")


def _string(row: Row, column: str, may_be_empty: bool = False) -> str:
    value = row.fields.get(column)
    if value is None:
        raise BadRow(f"has no {column}")
    if not isinstance(value, str):
        raise BadRow(f"has a {column} that is not text")
    if not may_be_empty and not value.strip():
        raise BadRow(f"has an empty {column}")
    return value


def _text(row: Row, prompt_column: str, completion_column: str, refuse: Callable[[str], str | None]) -> Text:
    prompt, completion = _string(row, prompt_column, may_be_empty=True), _string(row, completion_column)
    if prompt and (reason := refuse(prompt)):
        raise BadRow(reason)
    return Text(prompt, completion)


def _clip(row: Row, audio_column: str, text_column: str, window_s: float, refuse: Callable[[str], str | None]) -> Clip:
    text = " ".join(_string(row, text_column).split())
    if reason := refuse(text):
        raise BadRow(reason)
    value = row.fields.get(audio_column)
    if isinstance(value, dict):  # as `datasets` holds it: the file's content, or its path
        value = value.get("bytes") or value.get("path")
    if not value or not isinstance(value, str | bytes):
        raise BadRow(f"has no {audio_column}")
    audio = value if isinstance(value, bytes) else (row.folder or Path()) / value
    try:
        load_audio(audio, window_s, name=None if isinstance(audio, Path) else row.place)
    except AudioError as error:
        raise BadRow(f"has audio that cannot be used: {error}") from error
    except OSError as error:
        raise BadRow(f"has audio that cannot be read: {error.strerror or type(error).__name__}") from error
    return Clip(audio, text, row.place if isinstance(audio, bytes) else f"{row.place} {Path(value).name}")


# ------------------------------------------------------------------------------------------------------------ sources to rows


def _rows(source: Source) -> Iterator[Row]:
    path = Path(source.name)
    if path.is_dir():
        return _folder_rows(path, source)
    if path.is_file():
        return _file_rows(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source.name) and path.suffix not in TABLE_SUFFIXES:
        return _hub_rows(source)
    raise DataError(f"data {path.name!r} is neither a file or folder here nor a data set's id on the hub (owner/name)")


def _folder_rows(folder: Path, source: Source) -> Iterator[Row]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_rows(folder, source)
    for name in METADATA_FILES:
        if (folder / name).is_file():
            return _file_rows(folder / name)
    files = sorted(path for path in folder.iterdir() if path.suffix in TABLE_SUFFIXES and path.is_file())
    if not files:
        raise DataError(
            f"data folder {folder.name} holds no {', '.join(METADATA_FILES)}, no {', '.join(TABLE_SUFFIXES)} files and no data set "
            "that datasets saved"
        )
    return itertools.chain.from_iterable(_file_rows(path, f"{path.name} ") for path in files)


def _file_rows(path: Path, prefix: str = "") -> Iterator[Row]:
    if path.suffix not in TABLE_SUFFIXES:
        raise DataError(f"data {path.name} is of no known kind: give {', '.join(TABLE_SUFFIXES)}")
    if path.suffix == ".parquet":
        return _parquet_rows(path, prefix)
    return _csv_rows(path, prefix) if path.suffix in (".csv", ".tsv") else _json_rows(path, prefix)


def _json_rows(path: Path, prefix: str) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, fields in json_lines(file):
            place = f"{prefix}line {number}"
            yield Row(place, problem=fields) if isinstance(fields, str) else Row(place, fields, folder=path.parent)


def _csv_rows(path: Path, prefix: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = cells(file, tabs=path.suffix == ".tsv")
        try:
            for fields in reader:
                place = f"{prefix}line {reader.line_num}"
                if any("\udc80" <= letter <= "\udcff" for value in fields.values() for letter in str(value)):
                    yield Row(place, problem="is not UTF-8")
                elif None in fields:
                    yield Row(place, problem="has more cells than there are columns")
                else:
                    yield Row(place, fields, folder=path.parent)
        except csv.Error as error:
            raise DataError(f"data {path.name}, line {reader.line_num}, is not CSV: {error}") from error


def _parquet_rows(path: Path, prefix: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for fields in batch.to_pylist():
                number += 1
                yield Row(f"{prefix}row {number}", fields, folder=path.parent)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"data {path.name} is truncated or not a Parquet file: {first_line(error)}") from error


def _saved_rows(folder: Path, source: Source) -> Iterator[Row]:
    import datasets
    import pyarrow

    try:
        data = datasets.load_from_disk(str(folder))
        if isinstance(data, datasets.DatasetDict):
            if source.split not in data:
                raise DataError(f"data folder {folder.name} has no split {source.split!r}; there are {', '.join(data)}")
            data = data[source.split]
        yield from _dataset_rows(data, source)
    except (OSError, KeyError, TypeError, ValueError, pyarrow.ArrowException) as error:
        if isinstance(error, DataError):  # a ValueError too
            raise
        raise DataError(f"data folder {folder.name} is not whole, or not what datasets saved ({type(error).__name__})") from error


def _hub_rows(source: Source) -> Iterator[Row]:
    """Streamed: as many rows as are needed are fetched, and no more."""
    import datasets

    try:
        data = datasets.load_dataset(source.name, source.config, data_dir=source.directory, split=source.split, streaming=True)
        yield from itertools.islice(_dataset_rows(data, source), source.limit or source.enough)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:  # its own errors are kinds of these
        raise DataError(
            f"data set {source.name} could not be read from the hub: check the name, --data-config, --data-split, the network and "
            f"your login ({type(error).__name__}: {first_line(error)})"
        ) from error


def _dataset_rows(data: Any, source: Source) -> Iterator[Row]:
    for number, fields in enumerate(with_sound_as_files(data), 1):
        yield Row(f"row {number}", fields)
