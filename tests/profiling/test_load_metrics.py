"""Latencies, rates and goodput, by hand and as NumPy has them."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora.errors import RequestError
from profiling.load_metrics import Goodput, Record, figures_of, parse_limits, summary
from profiling.traffic import PlannedRequest, Prompt


def record(index, sent_s, token_s, outcome="finished", num_prompt_tokens=10, due_s=None, error=None):
    planned = PlannedRequest(index, 0.0, "code", "lua", Prompt("x", num_prompt_tokens, 5), max(1, len(token_s)))
    return Record(planned, sent_s if due_s is None else due_s, sent_s, list(token_s), None, outcome, error)


THREE = [
    record(0, 1.0, [1.5, 1.75, 2.0]),  # TTFT 0.5, TPOT 0.25, E2E 1
    record(1, 2.0, [2.25], num_prompt_tokens=20),  # TTFT 0.25, no TPOT, E2E 0.25
    record(2, 3.0, [4.0, 4.5], num_prompt_tokens=30),  # TTFT 1, TPOT 0.5, E2E 1.5
]


def test_a_request_by_hand():
    first, second, third = THREE
    assert (first.ttft_s, first.tpot_s, first.e2e_s, first.s_per_token) == pytest.approx((0.5, 0.25, 1.0, 1 / 3))
    assert (second.ttft_s, second.tpot_s, second.e2e_s, second.s_per_token) == (0.25, None, 0.25, 0.25)
    assert third.s_per_token == 0.75
    nothing = record(3, 1.0, [], "refused")
    assert (nothing.ttft_s, nothing.tpot_s, nothing.e2e_s, nothing.s_per_token) == (None, None, None, None)


def test_the_figures_of_three_requests_by_hand():
    figures = figures_of(THREE, duration_s=5.0)
    assert figures.outcomes == {"finished": 3} and figures.errors == {} and figures.num_requests == 3
    assert (figures.num_prompt_tokens, figures.num_new_tokens) == (60, 6)
    assert (figures.requests_per_s, figures.tokens_per_s, figures.total_tokens_per_s) == pytest.approx((0.6, 1.2, 13.2))
    assert figures.ttft_s == pytest.approx({"mean": 1.75 / 3, "p50": 0.5, "p90": 0.9, "p99": 0.99})
    assert figures.tpot_s == pytest.approx({"mean": 0.375, "p50": 0.375, "p90": 0.475, "p99": 0.4975})
    assert figures.itl_s == pytest.approx({"mean": 1 / 3, "p50": 0.25, "p90": 0.45, "p99": 0.495})
    assert figures.e2e_s["mean"] == pytest.approx(2.75 / 3) and figures.s_per_token["mean"] == pytest.approx(4 / 9)
    assert figures.goodput is None and figures.lag_s == {"mean": 0, "p50": 0, "p90": 0, "p99": 0}


def test_what_did_not_finish_is_counted_by_name_and_is_in_no_latency():
    others = [
        record(3, 1.0, [], "refused", error="BusyError"),
        record(4, 1.0, [1.1, 9.0], "failed", error="ServingError"),
        record(5, 1.0, [1.1], "cancelled"),
        record(6, 1.0, [], "unanswered"),
        record(7, 1.0, [], "refused", error="BusyError"),
    ]
    alone, together = figures_of(THREE, 5.0, {"e2e": 1.2}), figures_of([*THREE, *others], 5.0, {"e2e": 1.2})
    assert together.outcomes == {"finished": 3, "refused": 2, "failed": 1, "cancelled": 1, "unanswered": 1}
    assert together.errors == {"BusyError": 2, "ServingError": 1} and together.num_requests == 8
    for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s", "s_per_token", "tokens_per_s", "requests_per_s", "num_prompt_tokens"):
        assert getattr(alone, name) == getattr(together, name), name
    assert alone.goodput.share == pytest.approx(2 / 3) and together.goodput.share == pytest.approx(2 / 8)
    assert alone.goodput.requests_per_s == together.goodput.requests_per_s == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 0.5}, 2),  # a limit may be reached
        ({"ttft": 0.499}, 1),
        ({"tpot": 0.25}, 2),  # one token: TPOT counts as 0
        ({"tpot": 0.5, "e2e": 1.0}, 2),
        ({"ttft": 1.0, "tpot": 0.5, "e2e": 1.5}, 3),
        ({"e2e": 0.2}, 0),
    ],
)
def test_goodput_counts_the_requests_that_keep_every_limit(limits, good):
    assert figures_of(THREE, 5.0, limits).goodput == Goodput(limits, good, good / 5, good / 3)


def test_lag_is_how_late_the_generator_was():
    figures = figures_of([record(0, 1.25, [2.0], due_s=1.0), record(1, 2.0, [3.0], due_s=2.0)], 3.0)
    assert figures.lag_s["mean"] == 0.125 and figures.lag_s["p50"] == 0.125


def test_nothing_measured_is_empty_and_not_zero():
    figures = figures_of([], 0.0, {"ttft": 1.0})
    assert figures.ttft_s == figures.itl_s == figures.new_tokens == {} and figures.tokens_per_s == 0.0
    assert figures.goodput.share == 0.0
    assert json.loads(json.dumps(asdict(figures), allow_nan=False))
    assert figures_of([record(0, 1.0, [], "refused")], 2.0).ttft_s == {}


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=50))
def test_percentiles_are_numpys(values):
    found = summary(values)
    assert found == {
        "mean": float(np.mean(values)),
        "p50": float(np.percentile(values, 50)),
        "p90": float(np.percentile(values, 90)),
        "p99": float(np.percentile(values, 99)),
    }


def test_limits_are_given_in_milliseconds_as_vllm_takes_them():
    assert parse_limits(["ttft:500", "tpot:50.5"]) == {"ttft": 0.5, "tpot": 0.0505}
    assert parse_limits(["e2el:1000"]) == parse_limits(["e2e:1000"]) == {"e2e": 1.0}
    assert parse_limits([]) == {}


@pytest.mark.parametrize("words", [["ttft"], ["ttft:"], ["ttft:fast"], ["ttft:-1"], ["ttft:0"], ["ttft:nan"], ["ttft:inf"]])
def test_a_limit_that_is_no_number_is_refused(words):
    with pytest.raises(RequestError, match="above 0"):
        parse_limits(words)


@pytest.mark.parametrize("words", [["itl:5"], [""], ["500"], ["ttft:5", "ttft:6"], ["e2e:5", "e2el:6"]])
def test_a_limit_of_nothing_known_or_twice_is_refused(words):
    with pytest.raises(RequestError, match="once each"):
        parse_limits(words)


def test_a_row_per_request_is_flat():
    row = record(0, 1.0, [1.5, 2.0]).as_row()
    assert row["ttft_s"] == 0.5 and row["num_new_tokens"] == 2 and row["adapter"] == "lua"
    assert json.loads(json.dumps(row)) == row
