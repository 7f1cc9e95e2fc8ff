"""The study of starts and learning rates: its runs, its file, how it goes on, and the table's numbers by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from flora.finetune import study
from flora.finetune.study import main, mean_and_half_width, read_runs, table

WORDS = ["code", "--languages", "lua", "--steps", "2", "--batch-size", "2", "--held-out", "3", "--rank", "2", "--threads", "1"]


@pytest.fixture
def words(roomy_model, tmp_path):
    return [*WORDS, "--model", str(roomy_model), "--results", str(tmp_path / "study.jsonl")]


def a_row(arm, rate, seed, value, language="lua", base=0.2):
    score = None if value is None else {"loss": 1.0, "whole completions right": value}
    return {"arm": arm, "learning_rate": rate, "seed": seed, "language": language, "score": score, "steps": 5,
            "base_score": {"whole completions right": base}}  # fmt: skip


def test_every_arm_has_as_many_rates_on_a_logarithmic_grid():
    assert len({len(arm.rates) for arm in study.ARMS.values()}) == 1
    for arm in study.ARMS.values():
        ratios = [second / first for first, second in zip(arm.rates, arm.rates[1:], strict=False)]
        assert all(ratio == pytest.approx(10**0.5, rel=0.06) for ratio in ratios), "half decades"
    assert {arm.method for arm in study.ARMS.values()} == {"flora", "lora", "ia3"}


def test_a_study_that_was_cut_off_goes_on_with_what_is_missing(words, tmp_path, capsys, monkeypatch):
    path, part = tmp_path / "study.jsonl", [*words, "--arms", "noise-0.5", "lora", "--rates", "1e-2", "1e30"]
    assert main([*part, "--seeds", "0", "1"]) == 0
    full_table, lines = capsys.readouterr().out, path.read_text().splitlines()
    rows = list(map(json.loads, lines))
    assert [(row["seed"], row["arm"], row["init_std"], row["learning_rate"]) for row in rows] == [
        (seed, *arm, rate) for seed in (0, 1) for arm in (("noise-0.5", 0.5), ("lora", None)) for rate in (0.01, 1e30)
    ]
    for row in rows:
        if row["learning_rate"] == 1e30:
            assert row["score"] is None and row["problem"]
        else:
            assert math.isfinite(row["score"]["loss"]) and row["problem"] is None
        assert row["base_score"] == rows[0]["base_score"], "every run leaves the base model as it was"
        assert str(tmp_path) not in row["command"] and row["command"].startswith("python -m flora.finetune.study code")
    path.write_text("\n".join(lines[:5]) + "\n" + lines[5][:40])  # killed while it wrote the sixth row
    ran, run = [], study._run
    monkeypatch.setattr(study, "_run", lambda recipe, *rest: ran.append(recipe) or run(recipe, *rest))
    assert main([*part, "--seeds", "0", "1"]) == 0
    assert len(ran) == 3 and capsys.readouterr().out == full_table
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows, "the same runs have the same scores"
    assert main([*words, "--seeds", "0", "--rates", "1e-2", "--arms", "lora"]) == 0
    assert len(ran) == 3, "a part of a study that is done is only shown"
    assert main([*words, "--seeds", "2", "--rates", "1e-2", "--arms", "lora"]) == 0
    assert len(ran) == 4


def test_the_numbers_of_a_study_are_those_of_one_run_alone(words, tmp_path):
    """Many adapters after each other on one base model: the last scores as if it had been the first."""
    assert main([*words, "--seeds", "0", "--rates", "1e-2", "--arms", "identity", "lora", "ia3"]) == 0
    (tmp_path / "alone").mkdir()
    alone = [*words[:-1], str(tmp_path / "alone" / "study.jsonl"), "--seeds", "0", "--rates", "1e-2", "--arms", "ia3"]
    assert main(alone) == 0
    last, first = read_runs(tmp_path / "study.jsonl")[-1], read_runs(tmp_path / "alone" / "study.jsonl")[0]
    assert last["arm"] == first["arm"] == "ia3" and last["score"] == first["score"]


def test_the_table_is_means_over_languages_with_intervals_over_seeds():
    rows = [a_row("identity", 0.01, seed, value) for seed, value in enumerate((0.5, 0.6, 0.7))]
    rows += [a_row("identity", 0.1, seed, value) for seed, value in enumerate((0.4, 0.4, 0.4))]
    rows += [a_row("identity", 1.0, seed, value) for seed, value in enumerate((0.9, None, 0.9))]
    rows += [a_row("lora", 0.01, seed, 0.3) for seed in range(3)] + [a_row("lora", 0.1, seed, 0.8) for seed in range(3)]
    rows += [{**found, "language": "rkt", "base_score": {"whole completions right": 0.4}} for found in rows]
    lines = table("code", rows).splitlines()
    assert lines[0] == (
        "whole completions right in %, mean over lua, rkt, with its 95 % interval over 3 seeds; 5 steps; base model 30.0; "
        "* best rate of the arm"
    )
    half = 100 * 4.303 * 0.1 / math.sqrt(3)
    assert lines[4].split() == ["identity", "60.0", "±", f"{half:.1f}*", "40.0", "±", "0.0", "diverged"]
    assert lines[5].split() == ["lora", "30.0", "±", "0.0", "80.0", "±", "0.0*"]
    assert lines[-1] == "Best at the edge of its rates, which may not be its best: identity, lora"


def test_the_table_of_speech_takes_the_lowest_rate():
    rows = [
        {**a_row("ia3", rate, 0, 0.0), "score": {"word error rate": value}, "base_score": {"word error rate": 0.5}}
        for rate, value in ((0.01, 0.3), (0.1, 0.1), (1.0, 0.2))
    ]
    assert table("speech", rows).splitlines()[-1].split() == ["ia3", "30.0", "10.0*", "20.0"]


def test_the_interval_is_students():
    assert mean_and_half_width([0.25]) == (0.25, None)
    mean, half = mean_and_half_width([1.0, 2.0])
    assert mean == 1.5 and half == pytest.approx(12.706 * 0.5)
    random = torch.Generator().manual_seed(0)
    means = torch.randn(5_000, 4, generator=random).double()
    covered = sum(abs(mean) <= half for mean, half in map(mean_and_half_width, means.tolist())) / len(means)
    assert covered == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--arms", "zeros"], "no arm 'zeros': choose from identity, noise-0.1"),
        (["--rates", "0"], "--learning-rate must be above 0"),
        (["--seeds", "-1"], "--seed must be at least 0"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--languages", "cobol"], "no code language 'cobol'"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_2(more, said, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*words, *more])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and said in line and not (tmp_path / "study.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [("not JSON\n", "is no study's file"), ("[]\n", "is no study's file"), ('{"kind": "score"}\n', "line 1, is no run of a study")],
)
def test_a_file_of_something_else_is_left_alone(content, said, words, tmp_path, capsys):
    path = tmp_path / "study.jsonl"
    path.write_text(content)
    with pytest.raises(SystemExit):
        main(words)
    assert said in capsys.readouterr().err and path.read_text() == content
