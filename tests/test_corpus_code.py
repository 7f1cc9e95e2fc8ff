"""The code corpus: programs that are right in every language at hand, splits that do not meet, a tokenizer that loses nothing."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys

import pytest

from flora.corpus.code import FAMILIES, LANGUAGES, example_prompts, names, problems, render, runnable
from flora.corpus.code.nodes import Choice, Function, Name, Number, Text, evaluate, operation

NUM_PROBLEMS = 80


def some_problems(split: str = "train", count: int = NUM_PROBLEMS, seed: int = 3):
    """Problems whose functions have different names, so that they fit in one file."""
    unique = {}
    for problem in itertools.islice(problems(split, seed), count):
        unique.setdefault(problem.function.name, problem)
    return list(unique.values())


def run(tag: str, source: str, folder) -> subprocess.CompletedProcess[str]:
    """Run a source file, compiled first where the language is."""
    language = LANGUAGES[tag]
    path = folder / f"program{language.suffix}"
    path.write_text(source, encoding="utf-8")
    if tag in ("rs", "d"):
        built = folder / "program"
        command = ["rustc", "-A", "warnings", "-o", str(built), str(path)] if tag == "rs" else ["ldc2", f"-of={built}", str(path)]
        made = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return made if made.returncode else subprocess.run([str(built)], capture_output=True, text=True, timeout=20)
    command = (sys.executable,) if tag == "py" else language.command
    return subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=60)


def available(tag: str) -> bool:
    tool = {"rs": "rustc", "d": "ldc2", "py": sys.executable}.get(tag) or LANGUAGES[tag].command[0]
    return shutil.which(tool) is not None


@pytest.mark.parametrize("tag", LANGUAGES)
def test_programs_pass_their_cases(tag, tmp_path):
    if not available(tag):
        pytest.skip(f"no toolchain for {LANGUAGES[tag].name} here")
    chosen = some_problems(count=40 if tag in ("rs", "d") else NUM_PROBLEMS)
    language = LANGUAGES[tag]
    sources = [program.prompt + program.completion for program in (render(problem, tag) for problem in chosen)]
    result = run(tag, language.file(sources, [(problem.function, problem.cases) for problem in chosen]), tmp_path)
    assert result.returncode == 0, result.stderr[-800:]


@pytest.mark.parametrize("tag", LANGUAGES)
def test_a_wrong_program_fails_its_cases(tag, tmp_path):
    if not available(tag):
        pytest.skip(f"no toolchain for {LANGUAGES[tag].name} here")
    problem = next(p for p in problems("train", 0) if p.family == "clamp_number")
    assert run(tag, runnable(problem, tag, render(problem, tag).completion), tmp_path).returncode == 0
    wrong = "".join("0" if letter.isdigit() else letter for letter in render(problem, tag).completion)
    assert run(tag, runnable(problem, tag, wrong), tmp_path).returncode != 0


@pytest.mark.parametrize("tag", LANGUAGES)
def test_every_family_is_written_in_every_language(tag):
    wanted, found = {family.__name__ for family, _ in FAMILIES}, set()
    for problem in itertools.islice(problems("train", 5), 600):
        program = render(problem, tag)
        found.add(problem.family)
        assert program.prompt.startswith(LANGUAGES[tag].comment)
        assert problem.function.name in program.prompt
        assert program.prompt.endswith("\n")
        assert not program.completion.endswith("\n")
        assert all(name in program.prompt for name, _ in problem.function.parameters)
    assert found == wanted


def test_splits_share_neither_tasks_nor_names():
    streams = {split: list(itertools.islice(problems(split, 11), 800)) for split in names.SPLITS}
    for part in (
        lambda p: {p.key},
        lambda p: {p.function.name},
        lambda p: {name for name, _ in p.function.parameters},
    ):
        train, held_out = (set().union(*(part(p) for p in stream)) for stream in streams.values())
        assert not train & held_out
    assert all(names.split_of(p.key) == "held-out" for p in streams["held-out"])


def test_the_same_seed_gives_the_same_problems():
    first, again, other = ([render(p, "lua") for p in itertools.islice(problems("train", seed), 50)] for seed in (1, 1, 2))
    assert first == again != other


def test_unknown_split_and_language_are_named():
    with pytest.raises(ValueError, match="test"):
        next(problems("test", 0))
    with pytest.raises(KeyError, match="cobol"):
        render(next(problems("train", 0)), "cobol")


def test_cases_are_the_references_answers():
    for problem in some_problems(count=60):
        assert len(problem.cases) >= 3
        for arguments, expected in problem.cases:
            assert evaluate(problem.function, arguments) == expected


def test_parentheses_keep_the_meaning():
    a, b = Name("a"), Name("b")
    value = operation("-", a, operation("-", b, operation("*", operation("+", a, 1), 2)))
    function = Function("f", (("a", "int"), ("b", "int")), "int", Choice(value))
    namespace: dict = {}
    exec(LANGUAGES["py"].signature(function) + "\n" + LANGUAGES["py"].completion(function), namespace)
    assert namespace["f"](5, 3) == evaluate(function, (5, 3)) == 14
    reversed_pair = operation("reverse", operation("concat", a, Text("xy")))
    assert LANGUAGES["py"].write(reversed_pair) == '(a + "xy")[::-1]'
    assert LANGUAGES["rkt"].write(operation("+", a, Number(1))) == "(+ a 1)"


def test_example_prompts_are_short_and_complete():
    prompts = example_prompts()
    assert set(prompts) == set(LANGUAGES)
    for tag, texts in prompts.items():
        assert len(texts) == 3 == len(set(texts))
        assert all(text.startswith(LANGUAGES[tag].comment) and len(text) < 250 for text in texts)
