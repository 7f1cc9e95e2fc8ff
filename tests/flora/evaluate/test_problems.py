"""Problems from files, from the hub and from the corpus; MultiPL-E's real ones with completions written by hand."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora.corpus.code import LANGUAGES
from flora.errors import EvaluationError
from flora.evaluate.problems import HUB, TAGS, Problem, held_out_problems, hub_problems, read_problems
from flora.evaluate.sandbox import find_sandbox
from flora.evaluate.toolchains import RECIPES, Grader
from flora.names import PROJECT

MULTIPL_E = PROJECT.parent / "shared" / "data" / "multipl_e"
ROW = {"name": "one", "language": "lua", "prompt": "function f()\n", "tests": "f()", "stop_tokens": ["\nlocal", "\n\n"]}


def write(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def many(count: int) -> list[dict]:
    return [{**ROW, "name": f"problem {number}"} for number in range(count)]


# --------------------------------------------------------------------------------------------------------------- programs


@pytest.mark.parametrize(
    ("stop_tokens", "text", "completion"),
    [
        (("\nlocal", "\n\n"), "  return 1\nend\n\nlocal x", "  return 1\nend"),
        (("\n\n", "\nlocal"), "  return 1\nend\nlocal x\n\n", "  return 1\nend"),
        (("\n}",), "    1\n}\nfn main() {}", "    1"),
        (("\nlocal",), "  local x = 1\nend", "  local x = 1\nend"),
        (("\nend",), "\nend", ""),
        ((), "all of it\n\n", "all of it\n\n"),
        (("é\n",), "aé\nb", "a"),
    ],
)
def test_a_completion_ends_before_the_first_stop_token(stop_tokens, text, completion):
    problem = Problem("one", "lua", "", "", stop_tokens)
    assert problem.completion(text) == completion
    assert problem.is_complete(text) == (completion != text)


@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=4))
def test_a_completion_is_the_longest_start_without_a_stop_token(text, stop_tokens):
    problem = Problem("one", "lua", "", "", tuple(stop_tokens))
    completion = problem.completion(text)
    starts = [text[:length] for length in range(len(text) + 1)]
    assert completion == min((text[: text.find(token)] for token in stop_tokens if token in text), key=len, default=text)
    assert problem.is_complete(text) == any(problem.is_complete(start) for start in starts)


def test_a_program_is_header_prompt_completion_and_tests():
    assert (
        Problem("one", "lua", "prompt\n", "tests", header="header\n").program("completion") == "header\nprompt\ncompletion\ntests"
    )


# ------------------------------------------------------------------------------------------------------------------ files


def test_a_file_of_problems_is_read(tmp_path):
    found, skipped = read_problems(write(tmp_path / "some.jsonl", ROW, "", {**ROW, "name": "two", "doctests": "transform"}))
    assert [problem.name for problem in found] == ["one", "two"] and skipped == []
    assert found[0] == Problem("one", "lua", "function f()\n", "f()", ("\nlocal", "\n\n"))


def test_separators_that_are_no_line_ends_stay_in_the_text(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps({**ROW, "prompt": "a\u2028b\x85c\x0cd"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_problems(path)[0][0].prompt == "a\u2028b\x85c\x0cd"


BAD = [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[1]", "not a JSON object with name, language, prompt, tests and stop_tokens"),
    ("null", "not a JSON object with name, language, prompt, tests and stop_tokens"),
    ({**ROW, "language": "cobol"}, "no language 'cobol'; there are d, pl"),
    ({**ROW, "prompt": ""}, "prompt is not text that is not empty"),
    ({**ROW, "prompt": " \n"}, "prompt is not text that is not empty"),
    ({**ROW, "tests": None}, "tests is not text that is not empty"),
    ({**ROW, "name": 3}, "name is not text that is not empty"),
    ({**ROW, "stop_tokens": "\n\n"}, "stop_tokens is not a list of texts that are not empty"),
    ({**ROW, "stop_tokens": [""]}, "stop_tokens is not a list of texts that are not empty"),
    *[({name: value for name, value in ROW.items() if name != missing}, f"no {missing}") for missing in ROW],
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_line_among_many_is_named_and_left_out(tmp_path, row, reason):
    found, skipped = read_problems(write(tmp_path / "some.jsonl", *many(60), row, *many(39)))
    assert len(found) == 99 and len(skipped) == 1
    assert skipped[0].startswith(f"some.jsonl, line 61: {reason}")


def test_more_than_one_bad_line_in_a_hundred_is_too_many(tmp_path):
    with pytest.raises(EvaluationError) as error:
        read_problems(write(tmp_path / "some.jsonl", *many(150), "{", {**ROW, "tests": ""}))
    assert str(error.value) == (
        "2 of the 152 problems of some.jsonl cannot be used, and more than 1% is too many: "
        "some.jsonl, line 151: not JSON; some.jsonl, line 152: tests is not text that is not empty"
    )
    with pytest.raises(EvaluationError, match=r"9 of the 9 .*line 1: not JSON; .*line 3: not JSON; …$"):
        read_problems(write(tmp_path / "none.jsonl", *["{"] * 9))


@pytest.mark.parametrize("content", (b"", b"\n\n \n"))
def test_a_file_without_problems_is_refused(tmp_path, content):
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(EvaluationError, match="^empty.jsonl holds no problem$"):
        read_problems(tmp_path / "empty.jsonl")


def test_a_file_that_cannot_be_read_is_named_without_its_folder(tmp_path):
    for name, reason in (("missing.jsonl", "No such file or directory"), ("binary.jsonl", "it is not text in UTF-8")):
        (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe{}")
        with pytest.raises(EvaluationError) as error:
            read_problems(tmp_path / name)
        assert str(error.value) == f"{name} cannot be read: {reason}"
    with pytest.raises(EvaluationError, match="Is a directory"):
        read_problems(tmp_path)


# -------------------------------------------------------------------------------------------------------------------- hub


def test_the_hubs_problems_are_read_by_language_and_benchmark(monkeypatch):
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        return datasets.Dataset.from_list([{**ROW, "language": configuration.split("-")[1]}] * 2)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found, skipped = hub_problems(["lua", "rs"], "mbpp")
    assert asked == [(HUB, "mbpp-lua", "test"), (HUB, "mbpp-rs", "test")] and skipped == []
    assert [problem.language for problem in found] == ["lua", "lua", "rs", "rs"] and found[0].stop_tokens == ("\nlocal", "\n\n")


@pytest.mark.parametrize(
    "error", (ConnectionError("offline"), ValueError("BuilderConfig 'x' not found"), FileNotFoundError("gone"))
)
def test_a_hub_out_of_reach_is_one_sentence(monkeypatch, error):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(EvaluationError, match="^nuprl/MultiPL-E has no humaneval-lua that can be reached from here"):
        hub_problems(["lua"])


def test_bad_rows_of_the_hub_are_counted_too(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [ROW, {**ROW, "prompt": ""}])
    with pytest.raises(
        EvaluationError, match="1 of the 2 problems of nuprl/MultiPL-E humaneval-lua .*humaneval-lua, row 2: prompt"
    ):
        hub_problems(["lua"])


# ----------------------------------------------------------------------------------------------------------------- corpus


def test_the_corpus_asks_the_same_of_all_languages():
    found = held_out_problems(TAGS, 5, seed=3)
    assert [problem.language for problem in found] == [tag for tag in TAGS for _ in range(5)]
    assert [problem.name for problem in found[:5]] == [f"held-out {number}" for number in range(1, 6)]
    assert all(problem.reference and problem.tests.strip() and not problem.stop_tokens for problem in found)
    assert found == held_out_problems(TAGS, 5, seed=3)
    assert found[:5] != held_out_problems(TAGS[:1], 5, seed=4)


def test_more_problems_are_the_first_ones_and_others():
    assert held_out_problems(["lua"], 9, seed=1)[:4] == held_out_problems(["lua"], 4, seed=1)


def test_a_language_that_the_corpus_lacks_is_named():
    with pytest.raises(EvaluationError, match="the corpus has no language 'cobol'; there are"):
        held_out_problems(["lua", "cobol"], 1, seed=1)
    assert set(TAGS) | {"py"} == set(RECIPES) and set(TAGS) <= set(LANGUAGES)


# -------------------------------------------------------------------------------------------------------------- MultiPL-E

RIGHT = {  # what a model would go on to write behind the completion is there, too: it is cut off
    ("d", "HumanEval_27_flip_case"): """{
    import std.ascii, std.algorithm, std.array, std.conv;
    return string.map!(c => isLower(c) ? toUpper(c) : toLower(c)).array.to!(immutable(char)[]);
}

void other() {""",
    ("d", "HumanEval_35_max_element"): """{
    long most = l[0];
    foreach (x; l) if (x > most) most = x;
    return most;
}

unittest {""",
    ("pl", "HumanEval_27_flip_case"): """    $string =~ tr/a-zA-Z/A-Za-z/;
    return $string;
}

sub other {""",
    ("pl", "HumanEval_35_max_element"): """    my $most = $l->[0];
    for my $x (@$l) { $most = $x if $x > $most; }
    return $most;
}
# the end""",
    ("rb", "HumanEval_27_flip_case"): "    string.swapcase\nend\n\ndef other",
    ("rb", "HumanEval_35_max_element"): "  l.max\nend\nclass Other",
    ("rs", "HumanEval_27_flip_case"): """    string
        .chars()
        .map(|c| if c.is_lowercase() { c.to_ascii_uppercase() } else { c.to_ascii_lowercase() })
        .collect()
}

fn other() {""",
    ("rs", "HumanEval_35_max_element"): "    *l.iter().max().unwrap()\n}\n",
    ("rkt", "HumanEval_27_flip_case"): """  (list->string
    (for/list ([c string])
      (if (char-lower-case? c) (char-upcase c) (char-downcase c)))))

(define (other)""",
    ("rkt", "HumanEval_35_max_element"): "  (apply max l))\n\n; the end",
    ("swift", "HumanEval_27_flip_case"): """    return String(string.map { c in
        let other = c.isLowercase ? c.uppercased() : c.lowercased()
        return Character(other)
    })
}
""",
    ("swift", "HumanEval_35_max_element"): "    return l.max()!\n}\n",
    ("jl", "HumanEval_27_flip_case"): "    return map(c -> islowercase(c) ? uppercase(c) : lowercase(c), string)\nend\n\nother",
    ("jl", "HumanEval_35_max_element"): "    return maximum(l)\nend\nfunction other",
    ("lua", "HumanEval_27_flip_case"): """  return (string:gsub("%a", function(c)
    if c == c:lower() then return c:upper() end
    return c:lower()
  end))
end

function other()""",
    ("lua", "HumanEval_35_max_element"): "  return math.max(table.unpack(l))\nend\nlocal function other()",
    ("r", "HumanEval_27_flip_case"): "\n    return(chartr('a-zA-Z', 'A-Za-z', string))\n}\n# the end",
    ("r", "HumanEval_35_max_element"): "\n    max(l)\n}\n```",
}
WRONG = {  # the right form, the wrong answer
    "d": "{\n    return l[0];\n}",
    "pl": "    return $l->[0];\n}",
    "rb": "  l.min\nend",
    "rs": "    l[0]",
    "rkt": "  (first l))",
    "swift": "    return l[0]",
    "jl": "    return l[1]\nend",
    "lua": "  return l[1]\nend",
    "r": "\n    min(l)\n}",
}


@cache
def real_problems(tag: str) -> dict[str, Problem]:
    path = MULTIPL_E / f"humaneval-{tag}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path.name} is not here")
    found, skipped = read_problems(path)
    assert skipped == [] and {problem.language for problem in found} == {tag}
    return {problem.name: problem for problem in found}


@pytest.fixture(scope="module")
def grader() -> Grader:
    try:
        return Grader(find_sandbox())
    except EvaluationError as error:
        pytest.skip(str(error))


def grade(grader: Grader, tag: str, name: str, text: str):
    problem = real_problems(tag)[name]
    program = problem.program(problem.completion(text))
    if (reason := grader.reason(tag, program)) is not None:
        pytest.skip(reason)
    return grader.grade(tag, program)


@pytest.mark.parametrize(("tag", "name"), RIGHT)
def test_a_right_completion_of_a_real_problem_passes(grader, tag, name):
    result = grade(grader, tag, name, RIGHT[tag, name])
    assert result.passed, result.detail


@pytest.mark.parametrize("tag", TAGS)
def test_a_wrong_completion_of_a_real_problem_fails(grader, tag):
    result = grade(grader, tag, "HumanEval_35_max_element", WRONG[tag])
    assert result.outcome == "failed" or (tag == "swift" and result.outcome == "error"), result


@pytest.mark.parametrize("tag", TAGS)
def test_all_real_problems_can_be_read(tag):
    found = real_problems(tag)
    assert len(found) == 30 and all(problem.stop_tokens and not problem.is_complete("\n    x") for problem in found.values())
