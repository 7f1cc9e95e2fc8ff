"""Programming problems in MultiPL-E's format: from the hub, from JSONL files, or from the project's own corpus.

A program is prompt + completion + tests; the completion ends before the first of the problem's stop tokens.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora.errors import EvaluationError
from flora.evaluate.toolchains import RECIPES
from flora.tables import LARGEST_BAD_SHARE

HUB = "nuprl/MultiPL-E"
BENCHMARKS = ("humaneval", "mbpp")
CORPUS = "corpus held-out"
NAMED = 3  # bad problems that a message names
TAGS = tuple(tag for tag in RECIPES if tag != "py")
"""The nine languages of the paper, by MultiPL-E's tags."""


@dataclass(frozen=True)
class Problem:
    """One problem in one language.

    tests: what a program has behind the completion. stop_tokens: texts that end a completion and are no part of it. header: what a
    program has before the prompt. reference: a right completion, where one is known.
    """

    name: str
    language: str
    prompt: str
    tests: str
    stop_tokens: tuple[str, ...] = ()
    header: str = ""
    reference: str | None = None

    def is_complete(self, text: str) -> bool:
        """Whether a stop token has come."""
        return any(token in text for token in self.stop_tokens)

    def completion(self, text: str) -> str:
        """What a model wrote, up to the first stop token, as MultiPL-E cuts it. text: without the prompt."""
        return text[: min((at for token in self.stop_tokens if (at := text.find(token)) >= 0), default=len(text))]

    def program(self, completion: str) -> str:
        """The whole source file, which passes or does not."""
        return f"{self.header}{self.prompt}{completion}\n{self.tests}"


def held_out_problems(tags: Sequence[str], count: int, seed: int) -> list[Problem]:
    """`count` problems of the corpus that training never saw, in each language: the same problems in all, in the same order."""
    from flora.corpus.code import LANGUAGES, problems, render, runnable

    unknown = [tag for tag in tags if tag not in LANGUAGES]
    if unknown:
        raise EvaluationError(f"the corpus has no language {unknown[0]!r}; there are {', '.join(LANGUAGES)}")
    drawn = list(itertools.islice(problems("held-out", seed), count))
    made = []
    for tag in tags:
        for number, problem in enumerate(drawn, 1):
            program = render(problem, tag)
            header, tests = runnable(problem, tag, "").split(program.prompt, 1)
            made.append(Problem(f"held-out {number}", tag, program.prompt, tests, (), header, program.completion))
    return made


def read_problems(path: str | Path) -> tuple[list[Problem], list[str]]:
    """The problems of a JSONL file, one {name, language, prompt, tests, stop_tokens} a line, and a sentence for each bad line.

    EvaluationError for a file that cannot be read, holds nothing, or has more bad lines than `LARGEST_BAD_SHARE`.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: text may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise EvaluationError(f"{path.name} cannot be read: {reason}") from error
    rows = ((f"{path.name}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip())
    return _problems(rows, path.name)


def hub_problems(tags: Sequence[str], benchmark: str = "humaneval") -> tuple[list[Problem], list[str]]:
    """MultiPL-E's problems in each language from the hub, and a sentence for each bad row. benchmark: of `BENCHMARKS`.

    EvaluationError where it is out of reach, or where too many rows are bad.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise EvaluationError(
            f"{HUB} is read with the package datasets: pip install datasets, or name a JSONL file of problems"
        ) from error
    from huggingface_hub.errors import HfHubHTTPError

    found, skipped = [], []
    for tag in tags:
        name = f"{benchmark}-{tag}"
        try:
            rows = load_dataset(HUB, name, split="test")
        except (OSError, ValueError, HfHubHTTPError) as error:  # offline, not cached, no such configuration
            raise EvaluationError(
                f"{HUB} has no {name} that can be reached from here: check the network, or name a JSONL file of problems"
            ) from error
        good, bad = _problems(((f"{name}, row {number}", row) for number, row in enumerate(rows, 1)), f"{HUB} {name}")
        found += good
        skipped += bad
    return found, skipped


def _problems(rows: Iterable[tuple[str, Any]], source: str) -> tuple[list[Problem], list[str]]:
    """The problems of `rows`, each (where it is, its fields or a line of JSON), and a sentence for each that is none."""
    found, skipped = [], []
    for place, fact in rows:
        try:
            found.append(_problem(json.loads(fact) if isinstance(fact, str) else fact, place))
        except (json.JSONDecodeError, RecursionError):
            skipped.append(f"{place}: not JSON")
        except EvaluationError as error:
            skipped.append(str(error))
    number = len(found) + len(skipped)
    if len(skipped) > LARGEST_BAD_SHARE * number:
        named = "; ".join(skipped[:NAMED]) + ("; …" if len(skipped) > NAMED else "")
        raise EvaluationError(
            f"{len(skipped)} of the {number} problems of {source} cannot be used, "
            f"and more than {LARGEST_BAD_SHARE:.0%} is too many: {named}"
        )
    if not found:
        raise EvaluationError(f"{source} holds no problem")
    return found, skipped


def _problem(fact: Any, place: str) -> Problem:
    """A problem from its fields, each checked."""
    if not isinstance(fact, dict):
        raise EvaluationError(f"{place}: not a JSON object with name, language, prompt, tests and stop_tokens")

    def value(name: str, is_right: Callable[[Any], bool], kind: str) -> Any:
        if name not in fact:
            raise EvaluationError(f"{place}: no {name}")
        if not is_right(fact[name]):
            raise EvaluationError(f"{place}: {name} is not {kind}")
        return fact[name]

    name, language, prompt, tests = (
        value(field, lambda text: isinstance(text, str) and text.strip() != "", "text that is not empty")
        for field in ("name", "language", "prompt", "tests")
    )
    stops = value("stop_tokens", _is_list_of_texts, "a list of texts that are not empty")
    if language not in RECIPES:
        raise EvaluationError(f"{place}: no language {language!r}; there are {', '.join(RECIPES)}")
    return Problem(name, language, prompt, tests, tuple(stops))


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)
