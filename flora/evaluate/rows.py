"""What an evaluation leaves behind: scores, their means, the items it looked at, and what each method answered, as rows of JSONL.

A file holds rows of all four kinds. Evaluating a part again replaces that part's rows and keeps the others, and a file is written
whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import tempfile
from collections import abc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Union, get_args, get_origin, get_type_hints

from flora.errors import EvaluationError
from flora.names import public_name

if TYPE_CHECKING:
    from flora.engine import Engine

METHODS = ("base", "ia3", "lora", "flora")
OUTCOMES = ("passed", "failed", "error", "timeout", "memory", "not graded")


@dataclass(frozen=True)
class Score:
    """One number: a metric of one method with one adapter on one language.

    method: base, ia3, lora or flora. adapter: the language the adapter was trained on, None for base; another one than `language`
    is a cell of the confusion matrix. value, low, high: fractions, WER may exceed 1; None where not graded, for the `reason`.
    items: how many were scored, each from `samples` answers. source: where the items came from.
    """

    kind: ClassVar[str] = "score"

    task: str
    language: str
    method: str
    adapter: str | None
    metric: str
    value: float | None
    low: float | None
    high: float | None
    confidence: float
    items: int
    samples: int
    temperature: float
    graded: bool
    reason: str | None
    model: str
    checkpoint: str | None
    rank: int | None
    source: str
    seed: int
    dtype: str
    device: str
    versions: Mapping[str, str]
    command: str

    @property
    def key(self) -> tuple:
        """What makes it the same number, measured again."""
        return (self.kind, self.task, self.language, self.method, self.adapter, self.metric)


@dataclass(frozen=True)
class Mean:
    """The mean of a method's scores over `languages`, each with its own adapter and counted the same; or a difference of two.

    versus: the method whose mean is subtracted, None for the mean itself. value, low, high: fractions. The interval is of items
    drawn again in all languages, of a difference the same items for both methods: the languages' own intervals do not tell as much.
    low and high are None where one item says nothing of others. items: how many were scored, of all languages together. source:
    where they came from.
    """

    kind: ClassVar[str] = "mean"

    task: str
    method: str
    versus: str | None
    metric: str
    value: float
    low: float | None
    high: float | None
    confidence: float
    languages: tuple[str, ...]
    items: int
    model: str
    source: str
    seed: int
    command: str

    @property
    def key(self) -> tuple:
        return (self.kind, self.task, self.method, self.versus, self.metric)

    @property
    def scores(self) -> set[tuple]:
        """The keys of the scores it is taken of."""
        methods = (self.method,) if self.versus is None else (self.method, self.versus)
        return {
            (Score.kind, self.task, language, method, None if method == "base" else language, self.metric)
            for language in self.languages
            for method in methods
        }


@dataclass(frozen=True)
class Item:
    """A problem or a clip: what was asked, and the answer wanted. clip: the file, seen from the project's folder."""

    kind: ClassVar[str] = "item"

    task: str
    language: str
    item: str
    prompt: str | None
    reference: str
    clip: str | None = None

    @property
    def key(self) -> tuple:
        return (self.kind, self.task, self.language, self.item)


@dataclass(frozen=True)
class Answer:
    """What a method answered to an item. passed: None where not graded. outcome: of code, one of `OUTCOMES`. wer: of speech."""

    kind: ClassVar[str] = "answer"

    task: str
    language: str
    item: str
    method: str
    adapter: str | None
    text: str
    passed: bool | None
    outcome: str | None = None
    wer: float | None = None

    @property
    def key(self) -> tuple:
        return (self.kind, self.task, self.language, self.item, self.method, self.adapter)


Row = Score | Mean | Item | Answer
_KINDS: dict[str, type] = {row.kind: row for row in (Score, Mean, Item, Answer)}


# ---------------------------------------------------------------------------------------------------------------- files


def to_line(row: Row) -> str:
    """A row as one line of JSON, without the line's end; of an answer, only the fields of its task."""
    fact = {"kind": row.kind, **asdict(row)}
    if isinstance(row, Answer):
        del fact["wer" if row.task == "code" else "outcome"]
    return json.dumps(fact, ensure_ascii=False, allow_nan=False)


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a JSONL file, in its order.

    EvaluationError, with the line's number, for a file that is not of this kind: with a line that is no row, or a field, which is
    named, that is of another type or no finite number, as what was written by hand or by another tool may be.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: text may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path.name} cannot be read as text: {_reason(error)}") from error
    return [_row(line, f"{path.name}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _row(line: str, place: str) -> Row:
    try:
        fact = json.loads(line)
        kind = _KINDS[fact.pop("kind")]
        types = _field_types(kind)
        row = kind(**{name: value for name, value in fact.items() if name in types})
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:  # JSONDecodeError is a kind of the first
        raise EvaluationError(f"{place} is not a row of an evaluation: delete the file, or take another") from error
    wrong = next((name for name, wanted in types.items() if not _fits(getattr(row, name), wanted)), None)
    if wrong is not None:
        raise EvaluationError(f"{place}, of kind {kind.kind}, has a {wrong} that makes no sense: evaluate again")
    return replace(row, languages=tuple(row.languages)) if isinstance(row, Mean) else row


@cache
def _field_types(kind: type) -> dict[str, Any]:
    types = get_type_hints(kind)
    return {field.name: types[field.name] for field in fields(kind)}


def _fits(value: object, wanted: Any) -> bool:
    """Whether a value of a JSON document is of a field's type. json.loads makes numbers of NaN and Infinity: they are none here."""
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, list) and all(_fits(part, parts[0]) for part in value)
    if origin is abc.Mapping:
        return isinstance(value, dict) and all(_fits(part, parts[1]) for part in value.values())
    if wanted is int or wanted is float:
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
        return whole or (wanted is float and isinstance(value, float) and math.isfinite(value))
    return isinstance(value, wanted)


def merge_rows(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """`old` with every row that was done again replaced in its place, and the others of `new` behind.

    Where an item of the same name is another one now, the answers to the old one go with it; where a score is measured again, so do
    the means that were taken of the old one.
    """
    old, fresh = list(old), {row.key: row for row in new}
    changed = {
        (row.task, row.language, row.item) for row in old if isinstance(row, Item) and row.key in fresh and fresh[row.key] != row
    }
    again = {row.key for row in fresh.values() if isinstance(row, Score)}
    merged = []
    for row in old:
        if row.key in fresh:
            merged.append(fresh.pop(row.key))
        elif isinstance(row, Answer) and (row.task, row.language, row.item) in changed:
            continue
        elif isinstance(row, Mean) and not row.scores.isdisjoint(again):
            continue
        else:
            merged.append(row)
    return merged + list(fresh.values())


def write_rows(path: str | Path, rows: Iterable[Row], merge: bool = False) -> list[Row]:
    """Write a JSONL file, all of it or none; `merge` keeps what it holds already and is not among `rows`. Returns what it holds.

    EvaluationError where it cannot be written, with the old file as it was.
    """
    path, rows = Path(path), list(rows)
    if merge and path.exists():
        rows = merge_rows(read_rows(path), rows)
    text = "".join(to_line(row) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(partial, 0o644)  # mkstemp writes for the owner alone
            os.replace(partial, path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise EvaluationError(f"{path.name} cannot be written: {_reason(error)}; make room or name another file") from error
    return rows


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__


# ---------------------------------------------------------------------------------------------------------- environment


def versions(*more: str) -> dict[str, str]:
    """The versions a number depends on: Python, torch, transformers, PEFT, and the distributions named besides."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "peft", *more)}}


def environment(engine: Engine, *more: str) -> dict[str, Any]:
    """dtype, device and versions of what an engine computes, as a Score's fields."""
    return {
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": engine.device.type,
        "versions": versions(*more),
    }


def command_line(arguments: Sequence[str]) -> str:
    """The command that makes the same rows again, with no folder of this machine in it. arguments: behind the module's name."""
    shown = []
    for argument in arguments:
        head, equals, tail = argument.rpartition("=")
        shown.append(head + equals + (public_name(tail) if tail.startswith("/") else tail))
    return shlex.join(["python", "-m", "flora.evaluate", *shown])
