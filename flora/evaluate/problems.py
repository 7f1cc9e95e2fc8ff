"""Programming problems in MultiPL-E's format: from the hub, from JSONL files, or from the project's own corpus.

A program is prompt + completion + tests; the completion ends before the first of the problem's stop tokens.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora.errors import EvaluationError
from flora.evaluate.toolchains import RECIPES

HUB = "nuprl/MultiPL-E"
BENCHMARKS = ("humaneval", "mbpp")
CORPUS = "corpus held-out"
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


def read_problems(path: str | Path) -> list[Problem]:
    """The problems of a JSONL file, one {name, language, prompt, tests, stop_tokens} a line.

    EvaluationError for a file that cannot be read, and for a line that is none, by its number.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: text may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise EvaluationError(f"{path.name} cannot be read: {reason}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path.name}, line {number}"
            try:
                fact = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise EvaluationError(f"{place} is not JSON: a problem is one JSON object a line") from error
            found.append(_problem(fact, place))
    if not found:
        raise EvaluationError(f"{path.name} holds no problem")
    return found


def hub_problems(tags: Sequence[str], benchmark: str = "humaneval") -> list[Problem]:
    """MultiPL-E's problems in each language from the hub. benchmark: of `BENCHMARKS`. EvaluationError where it is out of reach."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise EvaluationError(
            f"{HUB} is read with the package datasets: pip install datasets, or name a JSONL file of problems"
        ) from error
    from huggingface_hub.errors import HfHubHTTPError

    found = []
    for tag in tags:
        try:
            rows = load_dataset(HUB, f"{benchmark}-{tag}", split="test")
        except (OSError, ValueError, HfHubHTTPError) as error:  # offline, not cached, no such configuration
            raise EvaluationError(
                f"{HUB} has no {benchmark}-{tag} that can be reached from here: check the network, or name a JSONL file of problems"
            ) from error
        found += [_problem(row, f"{HUB}, {benchmark}-{tag}, row {number}") for number, row in enumerate(rows)]
    return found


def _problem(fact: Any, place: str) -> Problem:
    """A problem from its fields, each checked."""
    if not isinstance(fact, dict):
        raise EvaluationError(f"{place} is not a JSON object with the fields name, language, prompt, tests and stop_tokens")

    def value(name: str, is_right: Callable[[Any], bool], kind: str) -> Any:
        if name not in fact:
            raise EvaluationError(f"{place} lacks the field {name!r}")
        if not is_right(fact[name]):
            raise EvaluationError(f"{place}: {name} must be {kind}")
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
