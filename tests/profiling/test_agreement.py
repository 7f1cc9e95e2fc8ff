"""Whether two runs agree: what counts as that, whose ratios are compared with whose, and what the command says."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from profiling import agreement
from profiling.__main__ import main
from profiling.agreement import Pair, measure, pairs_of, ratios_of
from profiling.timing import Ratio


def ratio(low: float, median: float, high: float) -> Ratio:
    return Ratio(median, low, high, 9)


@pytest.mark.parametrize(
    ("first", "second", "agree", "cover"),
    [
        (ratio(1.0, 1.1, 1.2), ratio(1.05, 1.15, 1.25), True, True),
        (ratio(1.0, 1.1, 1.2), ratio(1.15, 1.19, 1.25), True, False),
        (ratio(1.0, 1.1, 1.2), ratio(1.2, 1.3, 1.4), True, False),
        (ratio(1.0, 1.1, 1.2), ratio(1.21, 1.3, 1.4), False, False),
        (ratio(1.0, 1.1, 1.2), ratio(0.5, 1.1, 9.0), True, True),
    ],
)
def test_two_runs_agree_where_neither_excludes_what_the_other_claims(first, second, agree, cover):
    for pair in (Pair("m", "r", first, second), Pair("m", "r", second, first)):
        assert pair.agree is agree and pair.cover is cover


def rows(median: float, width: float = 0.1) -> list[dict]:
    """Of a comparison and of the Op lab."""
    facts = {"median": median, "low": median - width, "high": median + width, "n": 9}
    first = {"method": "flora", "kind": "code", "ratio_to_first": None, "ratio_to_base": facts}
    lab = {"method": "bmm-lora", "layer": "c_attn", "rank": 4, "rounds": 9, "first": "flora"}
    lab |= {"over_first": [median, 1, 9], "over_base": None}
    return [first, {**first, "method": "bmm-lora", "ratio_to_first": facts}, lab]


def test_every_ratio_of_the_rows_is_found_by_its_name():
    found = ratios_of(rows(1.5))
    compared = {"flora / base, code", "bmm-lora / base, code", "bmm-lora / first, code"}
    assert set(found) == compared | {"bmm-lora / flora, c_attn, rank 4"}
    assert found["bmm-lora / flora, c_attn, rank 4"] == Ratio(1.5, 1, 9, 9)
    assert ratios_of([{"method": "flora"}]) == {}
    assert set(ratios_of([*rows(1.5), {**rows(1.5)[0], "kind": "all"}])) == set(found), "all of one kind is that kind again"
    both = ratios_of([{**rows(1.5)[0], "kind": kind} for kind in ("code", "speech", "all")])
    assert set(both) == {f"flora / base, {kind}" for kind in ("code", "speech", "all")}


def test_no_run_is_in_two_pairs_and_measurements_take_turns():
    order = []

    def run(words):
        order.append(words[0])
        return rows(float(len(order)))

    pairs = measure({"one": ("compare",), "other": ("oplab",)}, 2, run)
    assert order == ["compare", "oplab"] * 4
    of_one = [pair for pair in pairs if pair.measurement == "one" and pair.ratio == "bmm-lora / base, code"]
    assert [(pair.first.median, pair.second.median) for pair in of_one] == [(1, 3), (5, 7)]
    assert pairs_of("m", [ratios_of(rows(1.0)), {}]) == []


@pytest.fixture
def answers(monkeypatch):
    """What the runs find, one after another, instead of runs."""
    found: list = []
    monkeypatch.setattr(agreement, "measure", lambda all_of, pairs, told: measure(all_of, pairs, lambda words: found.pop(0), told))
    return found


def test_the_command_says_how_often_and_fails_below_what_is_promised(answers, capsys, tmp_path):
    file = tmp_path / "rows.jsonl"
    answers += [rows(1.0), rows(1.05)]
    assert main(["agreement", "--pairs", "1", "--json", str(file), "--", "compare", "--repeats", "2"]) == 0
    assert "overlap in 4 of 4 (100 %" in capsys.readouterr().out
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(written) == 4 and all(row["agree"] and row["hardware"]["torch"] for row in written)
    assert written[0]["command"].startswith("python -m profiling")
    answers += [rows(1.0), rows(2.0)]
    assert main(["agreement", "--pairs", "1", "--", "oplab"]) == 1
    assert "overlap in 1 of 4 (25 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pairs", "0"], "--pairs must be at least 1"),
        (["--", "load"], "not 'load'"),
        (["--", "compare", "--json", "x"], "leave out --json"),
        (["--", "oplab", "--dry-run"], "leave out --dry-run"),
    ],
)
def test_bad_input_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["agreement", *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and said in error


def test_a_run_that_fails_is_told_in_its_own_words(capsys, monkeypatch):
    commands = []

    def fails(command, **keywords):
        commands.append(command)
        return subprocess.CompletedProcess(command, 2, "", "there is no method 'magic'\nand more")

    monkeypatch.setattr(agreement.subprocess, "run", fails)
    with pytest.raises(SystemExit) as stopped:
        main(["agreement", "--pairs", "1", "--", "compare", "--methods", "magic"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "a run failed: there is no method 'magic'" in error
    assert commands[0][1:6] == ["-m", "profiling", "compare", "--methods", "magic"] and "--json" in commands[0]


def test_a_run_is_a_process_whose_rows_are_read(monkeypatch):
    def writes(command, **keywords):
        Path(command[-1]).write_text("".join(json.dumps(row) + "\n" for row in rows(1.5)))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(agreement.subprocess, "run", writes)
    assert agreement.run_once(("compare",)) == rows(1.5)
