"""Small functions in ten programming languages: what the embedded code model and its adapters learn from.

    for problem in problems("train", seed=0):
        program = render(problem, "lua")          # program.prompt + program.completion is the source
        arguments, expected = problem.cases[0]

A prompt is, as in MultiPL-E, the task in English as a comment and the function's signature; the completion is the rest of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from flora.corpus.code.languages import LANGUAGES, Language
from flora.corpus.code.problems import FAMILIES, Problem, problems

__all__ = [
    "FAMILIES",
    "LANGUAGES",
    "Language",
    "Problem",
    "Program",
    "example_prompts",
    "problems",
    "render",
    "runnable",
]


@dataclass(frozen=True)
class Program:
    """A function in one language: `prompt` ends with a newline, `completion` ends with the function, without one."""

    prompt: str
    completion: str


def language(tag: str) -> Language:
    """The language of a tag; raises KeyError with the known ones."""
    if tag not in LANGUAGES:
        raise KeyError(f"no language {tag!r}; there are {', '.join(LANGUAGES)}")
    return LANGUAGES[tag]


def render(problem: Problem, tag: str) -> Program:
    """The problem as a program of the language `tag`."""
    writer = language(tag)
    return Program(writer.prompt(problem.function, problem.description), writer.completion(problem.function))


def runnable(problem: Problem, tag: str, completion: str) -> str:
    """A complete source file that exits 0 if and only if the prompt with this completion passes all of `problem.cases`."""
    writer = language(tag)
    source = writer.prompt(problem.function, problem.description) + completion
    return writer.file([source], [(problem.function, problem.cases)])


@cache
def example_prompts(count: int = 3) -> dict[str, list[str]]:
    """A few held-out prompts per language, of different families, for an examples menu. Everybody gets the same one: leave it."""
    families = ("fold_numbers", "collect_numbers", "label_number", "count_numbers", "change_text", "common_divisor")
    slots = [(tag, families[(i * count + j) % len(families)]) for i, tag in enumerate(LANGUAGES) for j in range(count)]
    chosen: dict[str, list[str]] = {tag: [] for tag in LANGUAGES}
    for problem in problems("held-out", seed=2024):
        plain = not any(word in problem.description for word in (" or ", "different")) and len(problem.function.name) < 16
        tag = next((tag for tag, family in slots if family == problem.family), None)
        if tag is not None and plain and len(problem.description) < 90:
            slots.remove((tag, problem.family))
            chosen[tag].append(render(problem, tag).prompt)
        if not slots:
            break
    return chosen
