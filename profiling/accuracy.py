"""Accuracy as it was recorded here, and as the paper printed it: reading a results folder, means with intervals, tidy frames.

What is recorded here comes from `python -m flora.evaluate code|speech --report`. The paper's tables are for other and far larger
models on other items: they tell how methods rank, and are never drawn on one axis with ours.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from flora.corpus.code import LANGUAGES as CODE_LANGUAGES
from flora.corpus.speech import LANGUAGES as SPEECH_LANGUAGES
from flora.errors import EvaluationError
from flora.evaluate.rows import METHODS, Answer, Item, Mean, Row, Score, read_rows

if TYPE_CHECKING:
    import pandas

TASKS = ("code", "speech")
METRICS = {"code": ("pass@1",), "speech": ("WER", "WER, normalised")}
"""Task → the metrics that are shown, the one that is drawn first."""
HIGHER_IS_BETTER = {"code": True, "speech": False}


# ------------------------------------------------------------------------------------------------------------ the paper


@dataclass(frozen=True)
class PaperTable:
    """One model's columns of a table of the paper. values: language's tag → method → per cent, as printed, without intervals."""

    task: str
    model: str
    benchmark: str
    values: Mapping[str, Mapping[str, float]]


def _columns(order: tuple[str, ...], values: Mapping[str, tuple[float, ...]]) -> dict[str, dict[str, float]]:
    return {tag: dict(zip(order, row, strict=True)) for tag, row in values.items()}


_CODE_ORDER = ("base", "flora", "ia3", "lora")
_SPEECH_TAGS = ("ar", "cs", "lt", "mr", "mn", "hi")
_SPEECH_COLUMNS = {
    "base": (46.03, 23.19, 46.09, 84.84, 115.20, 43.41),
    "flora": (30.21, 10.76, 20.39, 33.17, 42.12, 23.58),
    "ia3": (30.48, 11.61, 21.41, 35.03, 46.47, 25.64),
    "lora": (30.18, 10.77, 20.50, 31.94, 41.57, 23.82),
}

PAPER = "Wen & Chaudhuri, Batched Low-Rank Adaptation of Foundation Models, ICLR 2024, arXiv 2312.05677"
PAPER_TABLES = (
    PaperTable(
        "code",
        "StarCoder 15B",
        "MultiPL-E (HumanEval)",
        _columns(
            _CODE_ORDER,
            {
                "d": (14.13, 17.26, 15.26, 17.15),
                "pl": (17.05, 21.44, 17.71, 21.46),
                "rb": (1.39, 24.94, 20.80, 23.76),
                "rs": (22.40, 26.24, 23.53, 26.87),
                "rkt": (10.20, 12.41, 11.53, 12.51),
                "swift": (16.91, 20.38, 18.13, 20.35),
                "jl": (23.31, 26.56, 23.90, 25.62),
                "lua": (26.60, 30.20, 28.40, 29.04),
                "r": (16.07, 17.55, 16.65, 18.60),
            },
        ),
    ),
    PaperTable(
        "code",
        "StarCoderBase 3B",
        "MultiPL-E (HumanEval)",
        _columns(
            _CODE_ORDER,
            {
                "d": (5.65, 5.72, 5.72, 6.97),
                "pl": (10.73, 13.01, 11.46, 13.31),
                "rb": (5.33, 14.48, 7.88, 13.89),
                "rs": (17.18, 21.00, 17.28, 20.67),
                "rkt": (8.04, 9.16, 8.40, 8.80),
                "swift": (10.04, 15.69, 12.54, 15.04),
                "jl": (15.62, 19.11, 16.72, 19.77),
                "lua": (17.63, 19.46, 18.04, 20.23),
                "r": (10.00, 10.70, 9.98, 10.06),
            },
        ),
    ),
    PaperTable(
        "speech",
        "Whisper-large 1.5B",
        "Common Voice",
        {tag: {method: column[place] for method, column in _SPEECH_COLUMNS.items()} for place, tag in enumerate(_SPEECH_TAGS)},
    ),
)
PAPER_RECIPES = {
    "code": "Trained on The Stack: 1,500 steps, batch 8, 8-bit base, rank 1, Racket and Lua rank 4; "
    "pass@1 from 100 samples at temperature 0.1",
    "speech": "Trained on Common Voice: about 5,000 steps, batch 6, 8-bit base, every fully-connected layer, rank 1, "
    "Marathi rank 4",
}


def paper_tables(task: str) -> tuple[PaperTable, ...]:
    """The paper's tables of a task, the largest model first."""
    return tuple(table for table in PAPER_TABLES if table.task == task)


# --------------------------------------------------------------------------------------------------------- the recorded


@dataclass(frozen=True)
class Recorded:
    """What a results folder holds of one task. complaints: a sentence for each file that is missing or could not be read."""

    task: str
    scores: tuple[Score, ...] = ()
    items: tuple[Item, ...] = ()
    answers: tuple[Answer, ...] = ()
    complaints: tuple[str, ...] = ()
    means: tuple[Mean, ...] = ()


def report_command(task: str) -> str:
    """The command that records a task's rows."""
    return f"python -m flora.evaluate {task} --report"


def read_recorded(folder: str | Path, task: str) -> Recorded:
    """`accuracy_<task>.jsonl` and `answers_<task>.jsonl` of a results folder. Never raises for what the files hold, or lack."""
    if task not in TASKS:
        raise ValueError(f"a task is one of {', '.join(TASKS)}, not {task!r}")
    scores, no_scores = _read(Path(folder) / f"accuracy_{task}.jsonl", "scores")
    answers, no_answers = _read(Path(folder) / f"answers_{task}.jsonl", "answers")
    rows = [row for row in scores + answers if row.task == task]
    return Recorded(
        task,
        tuple(row for row in rows if isinstance(row, Score)),
        tuple(row for row in rows if isinstance(row, Item)),
        tuple(row for row in rows if isinstance(row, Answer)),
        tuple(filter(None, (no_scores, no_answers))),
        tuple(row for row in rows if isinstance(row, Mean)),
    )


def _read(path: Path, what: str) -> tuple[list[Row], str]:
    """The rows of a file, or none and the sentence that says why."""
    if not path.is_file():
        return [], f"No {what} are recorded yet: there is no {path.name}."
    try:
        rows = read_rows(path)
    except EvaluationError as error:
        return [], f"The recorded {what} cannot be shown: {error}."
    return rows, "" if rows else f"No {what} are recorded yet: {path.name} is empty."


# ------------------------------------------------------------------------------------------------------------ selecting


def language_name(task: str, tag: str) -> str:
    """A language in English; the tag itself where it is none of ours."""
    languages = CODE_LANGUAGES if task == "code" else SPEECH_LANGUAGES
    return languages[tag].name if tag in languages else tag


def languages(task: str, tags: Iterable[str]) -> list[str]:
    """`tags` without repetition, in the paper's order; those it does not have come last, as they come."""
    known = list(paper_tables(task)[0].values)
    return sorted(dict.fromkeys(tags), key=lambda tag: known.index(tag) if tag in known else len(known))


def own_scores(scores: Iterable[Score], metric: str) -> dict[tuple[str, str], Score]:
    """(language, method) → the score of the language's own adapter, or of no adapter."""
    return {
        (score.language, score.method): score
        for score in scores
        if score.metric == metric and score.method in METHODS and score.adapter in (None, score.language)
    }


def cross_scores(scores: Iterable[Score], metric: str, method: str) -> dict[tuple[str, str | None], Score]:
    """(language, adapter) → score of one method's adapters on every language, with the base model's as adapter None.

    Empty where no language was tried with another one's adapter.
    """
    cells: dict[tuple[str, str | None], Score] = {
        (score.language, score.adapter): score for score in scores if score.metric == metric and score.method in (method, "base")
    }
    return cells if any(adapter not in (None, language) for language, adapter in cells) else {}


def cross_method(scores: Iterable[Score]) -> str | None:
    """The method whose adapters were tried on other languages: fLoRA where it was; None where none was."""
    methods = {score.method for score in scores if score.adapter not in (None, score.language)}
    return next((method for method in ("flora", "lora", "ia3") if method in methods), None)


def reasons(scores: Iterable[Score]) -> dict[str, str]:
    """Language → why nothing of it could be graded, for the languages without a single graded score."""
    scores = list(scores)
    graded = {score.language for score in scores if score.value is not None}
    return {score.language: score.reason or "not graded" for score in scores if score.language not in graded}


# -------------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Estimate:
    """A value and its interval, as fractions; low and high None where an interval is missing."""

    value: float
    low: float | None = None
    high: float | None = None

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference, the two taken as independent; where both were measured on the same items that is the wider interval."""
        value = self.value - other.value
        if None in (self.low, self.high, other.low, other.high):
            return Estimate(value)
        below = math.hypot(self.value - self.low, other.high - other.value)
        above = math.hypot(self.high - self.value, other.value - other.low)
        return Estimate(value, value - below, value + above)


def common_languages(own: Mapping[tuple[str, str], Score]) -> list[str]:
    """The languages in which every method that has scores at all was graded: the ones a mean may be taken over."""
    methods = {method for _, method in own}
    tags = dict.fromkeys(language for language, _ in own)
    return [tag for tag in tags if all((tag, method) in own and own[tag, method].value is not None for method in methods)]


def mean(own: Mapping[tuple[str, str], Score], method: str, tags: Collection[str]) -> Estimate:
    """The mean over languages of a method's scores. Each language counts the same.

    The interval is the languages' own, combined: their distances to their ends add up as squares (the method of variance estimates
    recovery, Zou & Donner 2008), as errors of independent sets of items do. ValueError for no languages.
    """
    if not tags:
        raise ValueError("a mean needs at least one language")
    scores = [own[tag, method] for tag in tags]
    value = sum(score.value for score in scores) / len(scores)
    if any(score.low is None or score.high is None for score in scores):
        return Estimate(value)
    below = math.sqrt(sum((score.value - score.low) ** 2 for score in scores)) / len(scores)
    above = math.sqrt(sum((score.high - score.value) ** 2 for score in scores)) / len(scores)
    return Estimate(value, value - below, value + above)


@dataclass(frozen=True)
class Means:
    """What a metric's means over `tags` are. estimates: (method, the method subtracted or None) → estimate.

    combined: not all of them are recorded, and what is missing was put together here from the languages' intervals.
    """

    tags: tuple[str, ...]
    estimates: Mapping[tuple[str, str | None], Estimate]
    combined: bool


def means(scores: Iterable[Score], recorded: Iterable[Mean], metric: str) -> Means:
    """The mean of every method, and fLoRA's differences to the others, over the languages that all of them have.

    A recorded mean is taken where it is over these languages: it knows the items, and which of them two methods share. There is
    none where the languages were evaluated in several runs.
    """
    own = own_scores(scores, metric)
    tags = tuple(common_languages(own))
    if not tags:
        return Means((), {}, False)
    methods = [method for method in METHODS if (tags[0], method) in own]
    pairs: list[tuple[str, str | None]] = [(method, None) for method in methods]
    if "flora" in methods:
        pairs += [("flora", method) for method in methods if method != "flora"]
    known = {
        (row.method, row.versus): Estimate(row.value, row.low, row.high)
        for row in recorded
        if row.metric == metric and set(row.languages) == set(tags)
    }
    estimates = {}
    for method, versus in pairs:
        if (method, versus) in known:
            estimates[method, versus] = known[method, versus]
        else:
            estimate = mean(own, method, tags)
            estimates[method, versus] = estimate if versus is None else estimate - mean(own, versus, tags)
    return Means(tags, estimates, not set(pairs) <= set(known))


def paper_mean(table: PaperTable, method: str) -> float:
    """The mean over the table's languages, in per cent."""
    return sum(row[method] for row in table.values.values()) / len(table.values)


# --------------------------------------------------------------------------------------------------------------- frames


def scores_frame(scores: Iterable[Score]) -> pandas.DataFrame:
    """A row per score with its fields as columns, the versions as `versions.torch` and the like."""
    import pandas

    records = [{field.name: getattr(score, field.name) for field in fields(Score)} for score in scores]
    if not records:
        return pandas.DataFrame(columns=[field.name for field in fields(Score)])
    return pandas.json_normalize(records)
