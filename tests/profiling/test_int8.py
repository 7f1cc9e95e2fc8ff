"""The methods in 8 bits: the cost over the bare layer, and what depends on the batch."""

from __future__ import annotations

import json

import pytest

from flora import backend
from profiling.__main__ import main
from profiling.int8 import METHODS, measure_batch


def test_the_cost_is_written_by_method_rank_and_threshold(capsys, tmp_path):
    rows_file = tmp_path / "rows.jsonl"
    arguments = ["int8", "--part", "cost", "--layers", "64x96", "--tokens", "1", "3", "--ranks", "1", "4", "--rows", "2"]
    assert main([*arguments, "--rounds", "3", "--threads", "1", "--json", str(rows_file)]) == 0
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    settings = {(row["llm_int8_threshold"], row["tokens"], row["rank"], row["method"]) for row in rows}
    assert settings == {(t, n, r, m) for t in (6.0, 0.0) for n in (1, 3) for r in (1, 4) for m in METHODS} and len(rows) == 16
    for row in rows:
        assert row["implementation"] == backend.implementation("cpu") == "pytorch"
        assert 0 < row["low"] <= row["ratio"] <= row["high"] and row["bare_s"] > 0 and (row["d_in"], row["d_out"]) == (64, 96)
        assert row["rounds"] == 3 and row["hardware"]["torch"] and row["command"].startswith("python -m profiling")
    printed = capsys.readouterr()
    assert printed.out.count("64 × 96") == 8 and "MatMul8bitLt" not in printed.err


def test_only_the_threshold_makes_a_request_depend_on_its_batch():
    points = list(measure_batch("speech", rows=2, max_new_tokens=3))
    assert len(points) == 12 and all(point.tokens >= point.same_tokens > 0 for point in points)
    by_weights: dict = {}
    for point in points:
        by_weights.setdefault((point.quantize, point.llm_int8_threshold), []).append(point.median_difference)
    assert max(by_weights[None, None] + by_weights["nf4", None] + by_weights["int8", 0.0]) < 1e-3
    assert max(by_weights["int8", 6.0]) > 1e-3
    with_threshold = [point for point in points if point.llm_int8_threshold == 6.0]
    shares = {point.method: point.calls_with_outliers for point in with_threshold}
    assert shares["flora"] > shares["base"] > 0, "fLoRA's copies have outliers of their own"
    assert all(point.calls_with_outliers is None for point in points if not point.llm_int8_threshold)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--layers", "64"], "--layers takes widths such as 2048x8192, not '64'"),
        (["--layers", "0x64"], "--layers takes widths"),
        (["--ranks", "0"], "--ranks must be at least 1"),
        (["--rounds", "-1"], "--rounds must be at least 1"),
        (["--part", "all"], "invalid choice"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(extra, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["int8", *extra])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and len(error.splitlines()) == 1 and words in error, error
