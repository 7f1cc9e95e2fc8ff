"""Rows: what they look like in a file, how they are read, merged and written."""

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from flora.errors import EvaluationError, FloraError
from flora.evaluate import rows
from flora.evaluate.rows import (
    Answer,
    Item,
    Mean,
    Score,
    command_line,
    environment,
    merge_rows,
    read_rows,
    to_line,
    write_rows,
)

SCORE = Score(
    task="code", language="lua", method="flora", adapter="lua", metric="pass@1", value=0.78, low=0.69, high=0.86, confidence=0.95,
    items=100, samples=1, temperature=0.0, graded=True, reason=None, model="assets/models/code",
    checkpoint="assets/adapters/code/lua/flora", rank=4, source="corpus held-out", seed=1, dtype="float32", device="cpu",
    versions={"python": "3.11", "torch": "2.13"}, command="python -m flora.evaluate code",
)  # fmt: skip
MEAN = Mean(
    task="code", method="flora", versus="lora", metric="pass@1", value=-0.01, low=-0.03, high=0.02, confidence=0.95,
    languages=("lua", "rb"), items=200, model="assets/models/code", source="corpus held-out", seed=1,
    command="python -m flora.evaluate code",
)  # fmt: skip
ITEM = Item("speech", "cs", "cs_1", None, "dva tři", "assets/clips/cs_1.flac")
ANSWER = Answer("speech", "cs", "cs_1", "flora", "cs", "dva tři", True, wer=0.0)
FOR_CODE = Answer("code", "lua", "held-out 17", "base", None, "return 1\u2028\x85\nend", None, outcome="not graded")


def score(language, method, value, adapter=None, **changes):
    own = None if method == "base" else language
    ends = {} if value is None else {"low": value - 0.05, "high": value + 0.05}
    return replace(SCORE, language=language, method=method, adapter=adapter or own, value=value, **(ends | changes))


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_line_has_the_agreed_fields_in_their_order():
    assert (
        list(json.loads(to_line(SCORE)))
        == (
            "kind task language method adapter metric value low high confidence items samples temperature graded reason model "
            "checkpoint rank source seed dtype device versions command"
        ).split()
    )
    assert (
        list(json.loads(to_line(MEAN)))
        == "kind task method versus metric value low high confidence languages items model source seed command".split()
    )
    assert list(json.loads(to_line(ITEM))) == "kind task language item prompt reference clip".split()
    common = "kind task language item method adapter text passed".split()
    assert list(json.loads(to_line(ANSWER))) == [*common, "wer"]
    assert list(json.loads(to_line(FOR_CODE))) == [*common, "outcome"]
    assert "tři" in to_line(ANSWER), "scripts stay readable"


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "new folder" / "rows.jsonl"
    not_graded = replace(SCORE, value=None, low=None, high=None, graded=False, reason="swift")
    written = [SCORE, not_graded, MEAN, ITEM, ANSWER, FOR_CODE]
    assert write_rows(path, written) == written == read_rows(path)
    assert path.read_bytes().count(b"\n") == 6 and path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


def test_fields_of_a_later_version_do_no_harm(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**json.loads(to_line(ITEM)), "speaker": "m6"}) + "\n\n")
    assert read_rows(tmp_path / "rows.jsonl") == [ITEM]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "7",
        "null",
        '{"task": "code"}',
        '{"kind": "other"}',
        '{"kind": "item", "task": "code"}',
        '{"kind": ["score"]}',
        "[" * 9999,
        '{"kind": "item", "task": ' + "9" * 9999 + "}",
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(to_line(ITEM) + "\n" + line + "\n")
    with pytest.raises(EvaluationError, match="rows.jsonl, line 2 is not a row") as caught:
        read_rows(path)
    assert isinstance(caught.value, FloraError) and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "field", "value"),
    [
        (SCORE, "value", "0.7"),
        (SCORE, "value", math.nan),
        (SCORE, "value", math.inf),
        (SCORE, "value", 10**400),
        (SCORE, "value", True),
        (SCORE, "confidence", None),
        (SCORE, "low", [0.1]),
        (SCORE, "language", 7),
        (SCORE, "graded", "yes"),
        (SCORE, "items", None),
        (SCORE, "items", True),
        (SCORE, "items", 1.5),
        (SCORE, "rank", -math.inf),
        (SCORE, "versions", "2.13"),
        (SCORE, "versions", {"torch": 2.13}),
        (SCORE, "adapter", {}),
        (SCORE, "command", None),
        (MEAN, "languages", "lua"),
        (MEAN, "languages", ["lua", 7]),
        (MEAN, "value", None),
        (MEAN, "versus", 1),
        (MEAN, "high", math.nan),
        (ITEM, "reference", None),
        (ITEM, "clip", 3),
        (ANSWER, "passed", "yes"),
        (ANSWER, "wer", math.nan),
        (FOR_CODE, "outcome", 1),
    ],
)
def test_a_field_of_another_type_is_named_with_its_line(tmp_path, row, field, value):
    path = tmp_path / "rows.jsonl"
    path.write_text(to_line(row) + "\n" + json.dumps(json.loads(to_line(row)) | {field: value}) + "\n")
    said = f"rows.jsonl, line 2, of kind {row.kind}, has a {field} that makes no sense: evaluate again"
    with pytest.raises(EvaluationError, match=said) as caught:
        read_rows(path)
    assert str(tmp_path) not in str(caught.value)


def test_whole_numbers_are_fractions_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(to_line(replace(SCORE, value=1, low=0, high=1, temperature=0)) + "\n")
    assert read_rows(path) == [replace(SCORE, value=1.0, low=0.0, high=1.0)]


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(EvaluationError, match="rows.jsonl cannot be read"):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch, step):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [ITEM])

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rows.os, step, full)
    with pytest.raises(EvaluationError, match="No space left on device"):
        write_rows(path, [SCORE])
    assert read_rows(path) == [ITEM] and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EvaluationError, match="rows.jsonl cannot be written"):
        write_rows(tmp_path / "file" / "rows.jsonl", [ITEM])


# ---------------------------------------------------------------------------------------------------------------- merge


def test_rows_done_again_take_the_place_of_the_old_ones(tmp_path):
    path = tmp_path / "rows.jsonl"
    old = [
        score("lua", "base", 0.3),
        score("lua", "flora", 0.7),
        score("rb", "flora", 0.6),
        score("lua", "flora", 0.1, adapter="rb"),
    ]
    write_rows(path, old)
    again, new = replace(old[1], value=0.9, seed=2), score("rb", "lora", 0.5)
    merged = write_rows(path, [again, new], merge=True)
    assert merged == [old[0], again, old[2], old[3], new] == read_rows(path)
    assert write_rows(tmp_path / "new.jsonl", [new], merge=True) == [new]
    assert write_rows(path, [new]) == [new], "without merge, the file is what was given"


@pytest.mark.parametrize(
    "change", [{"task": "speech"}, {"language": "d"}, {"method": "lora"}, {"adapter": "rb"}, {"metric": "pass@10"}]
)
def test_what_makes_a_score_another_one(change):
    assert merge_rows([SCORE], [replace(SCORE, **change)]) == [SCORE, replace(SCORE, **change)]


def test_answers_to_another_problem_of_the_same_name_are_dropped():
    old = [ITEM, ANSWER, replace(ANSWER, method="base", adapter=None), replace(ANSWER, item="cs_2")]
    same = merge_rows(old, [ITEM, replace(ANSWER, text="dva")])
    assert same == [ITEM, replace(ANSWER, text="dva"), old[2], old[3]]
    other = replace(ITEM, reference="tři")
    assert merge_rows(old, [other, replace(ANSWER, text="tři")]) == [other, replace(ANSWER, text="tři"), old[3]]


def test_a_mean_goes_with_the_scores_it_was_taken_of():
    others = [replace(MEAN, versus=None), replace(MEAN, method="base", versus=None), replace(MEAN, versus="ia3")]
    old = [score("lua", "flora", 0.7), MEAN, *others, replace(MEAN, metric="pass@10"), replace(MEAN, languages=("rb", "d"))]
    old[-1] = replace(old[-1], task="speech")
    again = score("lua", "flora", 0.8)
    assert merge_rows(old, [again]) == [again, others[1], *old[-2:]]
    lora = score("rb", "lora", 0.8)
    assert merge_rows(old, [lora]) == [old[0], *old[2:], lora], "the one it is compared with counts as well"
    base = score("rb", "base", 0.8)
    assert merge_rows(old, [base]) == [*old[:3], *old[4:], base]
    fresh = [again, replace(MEAN, value=0.5)]
    assert merge_rows(old, fresh) == [*fresh, others[1], *old[-2:]], "a mean that is measured again takes the old one's place"


@pytest.mark.parametrize(
    "other", [score("lua", "flora", 0.1, adapter="rb"), score("lua", "ia3", 0.1), score("d", "flora", 0.1), ITEM]
)
def test_what_a_mean_is_not_taken_of_leaves_it(other):
    assert merge_rows([MEAN], [other]) == [MEAN, other]


@pytest.mark.parametrize("change", [{"task": "speech"}, {"method": "ia3"}, {"versus": None}, {"metric": "pass@10"}])
def test_what_makes_a_mean_another_one(change):
    assert merge_rows([MEAN], [replace(MEAN, **change)]) == [MEAN, replace(MEAN, **change)]
    assert merge_rows([MEAN], [replace(MEAN, languages=("lua",))]) == [replace(MEAN, languages=("lua",))]


# ---------------------------------------------------------------------------------------------------------- environment


def test_the_environment_of_an_engine(tiny_engines):
    facts = environment(tiny_engines["speech"], "jiwer")
    assert (facts["dtype"], facts["device"]) == ("float32", "cpu")
    assert set(facts["versions"]) == {"python", "torch", "transformers", "peft", "jiwer"}


def test_no_folder_of_this_machine_is_in_a_command(tmp_path):
    elsewhere = str(Path(tmp_path.anchor, "secret", "own", "clips"))
    line = command_line(
        ["speech", "--data", f"cs={elsewhere}", "--model", elsewhere, "--adapter", "cs/lora=runs/a b", "--seed", "3"]
    )
    assert "secret" not in line and "cs=own/clips" in line and line.startswith("python -m flora.evaluate speech ")
    assert line.endswith("--model own/clips --adapter 'cs/lora=runs/a b' --seed 3")
