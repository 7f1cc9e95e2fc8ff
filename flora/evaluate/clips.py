"""Spoken clips with their transcripts: from a folder, from a data set of the hub, or from the project's own held-out corpus.

A clip that cannot be scored (unreadable, silent, longer than the model hears, without text) is named, counted and left out; with
more than `LARGEST_BAD_SHARE` of them the evaluation fails rather than score what is left.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flora.audio import load_audio
from flora.corpus.speech import LANGUAGES, SAMPLING_RATE, build_dataset
from flora.errors import AudioError, EvaluationError, first_line
from flora.names import last_part
from flora.tables import LARGEST_BAD_SHARE, cells, json_lines, with_sound_as_files

FILE_COLUMNS = ("file_name", "path", "audio", "file", "audio_filepath")
TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "normalized_text")
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.tsv")
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".mp4", ".webm", ".aac", ".aiff", ".aif", ".amr"}


@dataclass(frozen=True)
class Clip:
    """A clip and what is said in it. samples: mono float32 (n,) at 16 kHz. file: where it lies, if it is a file of the project."""

    name: str
    language: str
    text: str
    samples: np.ndarray
    file: str | None = None


@dataclass(frozen=True)
class _Entry:
    """A clip that has not been read yet. read: its samples; raises AudioError. problem: why it cannot be used, known beforehand."""

    name: str
    text: str | None = None
    read: Callable[[float], np.ndarray] | None = None
    problem: str | None = None


@dataclass
class Clips:
    """The clips of one language, read one after another, and what was wrong with those left out.

    number: how many will be tried, None where that is known at the end only. After the iteration, `skipped` has a sentence for
    every clip that was left out. EvaluationError, during it, where too many are.
    """

    language: str
    source: str
    window_s: float
    number: int | None
    _entries: Iterable[_Entry] = field(repr=False)
    skipped: list[str] = field(default_factory=list)
    used: int = 0

    def __iter__(self) -> Iterator[Clip]:
        for entry in self._entries:
            problem = entry.problem
            if problem is None and not (entry.text or "").strip():
                problem = f"the clip {entry.name!r} has no text: write its transcript beside it"
            if problem is None:
                try:
                    samples = entry.read(self.window_s)
                except AudioError as error:
                    problem = str(error)
            if problem is None:
                self.used += 1
                yield Clip(entry.name, self.language, entry.text, samples)
            else:
                self.skipped.append(problem)
                if self.number is not None:
                    self._refuse_too_many(self.number)
        self._refuse_too_many(self.used + len(self.skipped))
        if not self.used:
            raise EvaluationError(f"{self.source} has no clip with a text: give audio files and their transcripts")

    def _refuse_too_many(self, number: int) -> None:
        if len(self.skipped) > LARGEST_BAD_SHARE * number:
            raise EvaluationError(
                f"{len(self.skipped)} of the {number} clips of {self.source} cannot be scored, and more than "
                f"{100 * LARGEST_BAD_SHARE:g} % is too many: {'; '.join(self.skipped[:3])}{'; …' if len(self.skipped) > 3 else ''}"
            )


# --------------------------------------------------------------------------------------------------------------- folders


def folder_clips(language: str, path: str | Path, window_s: float, limit: int | None = None, seed: int = 0) -> Clips:
    """Clips of a folder with metadata.csv, .jsonl or .tsv (columns as in `FILE_COLUMNS` and `TEXT_COLUMNS`), or with pairs of
    NAME.wav and NAME.txt; or of such a metadata file itself, such as Common Voice's test.tsv with its folder clips/ beside it.

    limit: at most so many, drawn by the seed. EvaluationError for a folder or file without any of these.
    """
    path = Path(path)
    if not path.exists():
        raise EvaluationError(f"there is no folder {path.name!r}: give one with audio files and their transcripts")
    metadata = path if path.is_file() else next((path / name for name in METADATA_FILES if (path / name).is_file()), None)
    entries = _listed(metadata) if metadata else _pairs(path)
    if not entries:
        raise EvaluationError(
            f"the folder {path.name!r} has no clips: it needs {METADATA_FILES[0]} with the columns file_name and text, "
            "or a NAME.txt beside every NAME.wav"
        )
    if limit is not None and limit < len(entries):
        entries = random.Random(seed).sample(entries, limit)
    return Clips(language, path.name, window_s, len(entries), entries)


def _read_file(path: Path, window_s: float) -> np.ndarray:
    return load_audio(path, window_s)[0]


def _pairs(folder: Path) -> list[_Entry]:
    entries = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in AUDIO_SUFFIXES or not path.is_file():
            continue
        name, transcript = path.relative_to(folder).as_posix(), path.with_suffix(".txt")
        if not transcript.is_file():
            entries.append(_Entry(name, problem=f"the clip {name!r} has no {transcript.name} beside it"))
            continue
        try:
            text = transcript.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            entries.append(_Entry(name, problem=f"{transcript.name} cannot be read as UTF-8 text"))
            continue
        entries.append(_Entry(name, text, partial(_read_file, path)))
    return entries


def _listed(metadata: Path) -> list[_Entry]:
    """The clips that a metadata file names; a broken line is an entry with a problem."""
    try:
        content = metadata.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{metadata.name} cannot be read as UTF-8 text: save it again") from error
    is_json = metadata.suffix.lower() in (".jsonl", ".json")
    rows = json_lines(content.split("\n")) if is_json else _table_rows(content, metadata)
    entries = []
    for number, row in rows:
        place = f"{metadata.name}, line {number}"
        file, text = (_first(row, columns) for columns in (FILE_COLUMNS, TEXT_COLUMNS)) if isinstance(row, dict) else (None, None)
        if isinstance(row, str):
            entries.append(_Entry(place, problem=f"{place}: this is not a JSON object"))
        elif not isinstance(file, str) or not file.strip():
            entries.append(_Entry(place, problem=f"{place} names no file; its column is one of {', '.join(FILE_COLUMNS)}"))
        elif not isinstance(text, str):
            entries.append(_Entry(place, problem=f"{place} has no text; its column is one of {', '.join(TEXT_COLUMNS)}"))
        else:
            candidates = (metadata.parent / file, metadata.parent / "clips" / file)
            path = next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
            entries.append(_Entry(file, text, partial(_read_file, path)))
    return entries


def _first(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    return next((row[column] for column in columns if row.get(column) is not None), None)


def _table_rows(content: str, metadata: Path) -> Iterator[tuple[int, dict]]:
    """(line number, row) of a CSV, or of a TSV, in which quotation marks are text as in Common Voice's."""
    tabs = metadata.suffix.lower() == ".tsv"
    reader = cells(io.StringIO(content, newline=""), tabs, strict=True)
    try:
        known = {*FILE_COLUMNS} & {*(reader.fieldnames or ())} and {*TEXT_COLUMNS} & {*(reader.fieldnames or ())}
        if not known:
            raise EvaluationError(
                f"{metadata.name} has no columns for the file and its text: name them {FILE_COLUMNS[0]} and {TEXT_COLUMNS[0]} "
                "in its first line"
            )
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise EvaluationError(f"{metadata.name}, line {reader.line_num}: {error}; save the table again") from error


# -------------------------------------------------------------------------------------------------------------- data sets


def dataset_clips(language: str, name: str, config: str | None, split: str, window_s: float, limit: int | None = None) -> Clips:
    """Clips of a data set, streamed: a hub id or a local folder that the `datasets` library reads, such as Common Voice.

    The column with audio is the one of that type, the text's one of `TEXT_COLUMNS`. limit: the first so many.

    EvaluationError where it is not reachable, has no such configuration or split, or no such columns.
    """
    import datasets  # heavy, and needed here only

    shown = last_part(name)
    source = ":".join([shown, *([config] if config else []), split])
    try:
        data = datasets.load_dataset(name, config, split=split, streaming=True)
        features = data.features or {}
    except ConnectionError as error:
        raise EvaluationError(
            f"the data set {shown} cannot be reached: check the network, or download it and give its folder with --data"
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise EvaluationError(
            f"there is no data set {shown}, or it is gated: check its name, accept its terms and log in with `hf auth login`"
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise EvaluationError(
            f"the data set {source} cannot be opened ({first_line(error)}): check its configuration and split"
        ) from error
    text_column = next((column for column in TEXT_COLUMNS if column in features), None)
    audio_column = next((column for column, kind in features.items() if isinstance(kind, datasets.Audio)), None)
    audio_column = audio_column or next((column for column in FILE_COLUMNS if column in features), None)
    if text_column is None or audio_column is None:
        raise EvaluationError(
            f"the data set {source} has the columns {', '.join(features) or 'none'}: it needs audio, and its text in one of "
            f"{', '.join(TEXT_COLUMNS)}"
        )
    data = with_sound_as_files(data).select_columns([audio_column, text_column])
    data = data if limit is None else data.take(limit)
    return Clips(language, source, window_s, None, _streamed(data, source, audio_column, text_column))


def _streamed(data: Iterable[Mapping[str, Any]], source: str, audio_column: str, text_column: str) -> Iterator[_Entry]:
    from datasets.exceptions import DatasetsError

    rows, index = iter(data), -1
    while True:
        try:
            row = next(rows, None)
        except (OSError, ValueError, DatasetsError) as error:
            raise EvaluationError(
                f"the data set {source} broke off after {index + 1} clips ({first_line(error)}): try again"
            ) from error
        if row is None:
            return
        audio, index = row[audio_column], index + 1
        path, content = (audio.get("path"), audio.get("bytes")) if isinstance(audio, dict) else (audio, None)
        name = Path(path).name if path else f"row {index}"
        if content is None and path is None:
            yield _Entry(name, problem=f"{name} has no audio")
        else:
            yield _Entry(name, row[text_column], partial(_read_content, content if content is not None else path, name))


def _read_content(source: bytes | str, name: str, window_s: float) -> np.ndarray:
    return load_audio(source, window_s, name)[0]


# --------------------------------------------------------------------------------------------------------------- corpus


def corpus_clips(languages: Sequence[str], number: int, seed: int, folder: str | Path, window_s: float) -> dict[str, Clips]:
    """The first `number` held-out clips of the spoken corpus in each language, spoken by espeak-ng into the cache `folder`.

    Their voices, speeds, pitches and word combinations are in no training clip; see `flora.corpus.speech`. EvaluationError for a
    language it does not have, ModelError without espeak-ng.
    """
    unknown = [tag for tag in languages if tag not in LANGUAGES]
    if unknown:
        raise EvaluationError(f"the spoken corpus has no language {unknown[0]!r}; it has {', '.join(LANGUAGES)}")
    spoken = build_dataset(folder, {(tag, "held-out"): number for tag in languages}, seed=seed)
    return {
        tag: Clips(
            tag,
            "corpus held-out",
            window_s,
            number,
            [_Entry(f"held-out {index}", text, partial(_spoken, clips, index)) for index, text in enumerate(clips.texts)],
        )
        for (tag, _), clips in spoken.items()
    }


def _spoken(clips: Any, index: int, window_s: float) -> np.ndarray:
    samples = clips.audio(index)
    if len(samples) > window_s * SAMPLING_RATE:
        raise AudioError(f"the clip 'held-out {index}' is longer than the {window_s:g} s that the model hears")
    return samples


def example_clips(folder: str | Path) -> list[Clip]:
    """The clips that ship: those of clips.json in `folder`. EvaluationError or AudioError where one is missing."""
    folder = Path(folder)
    try:
        entries = json.loads((folder / "clips.json").read_text(encoding="utf-8"))
        return [
            Clip(Path(entry["file"]).stem, entry["tag"], entry["text"], load_audio(folder / entry["file"])[0], entry["file"])
            for entry in entries
        ]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise EvaluationError("clips.json cannot be read: make it with `python -m flora.corpus.speech --clips`") from error
