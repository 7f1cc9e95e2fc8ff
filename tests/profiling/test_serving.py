"""The engine beside what it has to beat: what is measured, what is printed and kept. How fast it is, the command says."""

from __future__ import annotations

import json

import pytest

from profiling import serving
from profiling.__main__ import main
from profiling.serving import Figure
from profiling.timing import Ratio


def test_a_figure_is_held_against_its_target():
    ratio = Ratio(3.2, 3.0, 3.5, 5)
    assert Figure.of_ratio("peft", "faster", ratio, 3.0).holds is True
    assert Figure.of_ratio("peft", "faster", ratio, 4.0).holds is False
    assert Figure.of_ratio("peft", "told", ratio, None).holds is None
    share = Figure("overhead", "own share", 0.2, None, None, 9, 0.15, at_most=True, unit="%")
    assert share.holds is False
    assert share.cells() == ["overhead", "own share", "20 %", "at most 15 %", "NO"]
    assert Figure.of_ratio("peft", "faster", ratio, 3.0).cells()[2:] == ["3.2× [3×, 3.5×]", "at least 3×", "yes"]


def test_the_command_measures_every_part_and_keeps_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serving, "MANY_ADAPTERS", 20)
    monkeypatch.setattr(serving, "BATCH", 4)
    monkeypatch.setattr(serving, "ROUNDS_OF_LOAD", 1)
    monkeypatch.setattr(serving, "NUM_ADAPTERS", 2)
    path = tmp_path / "serving.jsonl"
    code = main(["serving", "--rounds", "1", "--max-new-tokens", "8", "--threads", "1", "--json", str(path)])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {row["part"] for row in rows} == set(serving.MEASURES)
    same = [row for row in rows if "tokens that are PEFT's" in row["what"]]
    assert [row["part"] for row in same] == ["peft", "hira"]
    assert all(row["value"] == 1.0 and row["n"] == 2 * 8 for row in same), "the engine and PEFT serve the same adapters"
    assert all(row["value"] > 0 for row in rows if row["part"] != "goodput"), "a machine busy with other tests may keep no limit"
    kept = [row["value"] for row in rows if row["part"] == "goodput"]
    assert len(kept) == len(serving.METHODS) and all(value is None or 0 <= value <= 1 for value in kept)
    assert all(row["hardware"]["torch"] for row in rows)
    for method in serving.METHODS:
        own = next(row for row in rows if row["part"] == "overhead" and row["what"].startswith(method))
        assert own["n"] == 6 and own["value"] < 1, "the decode steps between the first and the last"
    assert code == int(any(row["holds"] is False for row in rows))
    printed = capsys.readouterr().out
    assert all(row["what"] in printed for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds at least 1"),
        (["--max-new-tokens", "4"], "--max-new-tokens must be at least 8"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--part", "speed"], "invalid choice: 'speed'"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["serving", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
