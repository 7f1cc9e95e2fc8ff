"""The timing helpers: pairs, intervals, quantiles."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from profiling.timing import median, paired_ratio, quantiles, timed


def test_the_ratio_is_the_median_of_pairs_not_the_ratio_of_medians():
    ratio = paired_ratio([2.0, 20.0, 9.0], [1.0, 10.0, 3.0])
    assert ratio.median == 2.0 and ratio.n == 3
    assert ratio.low <= ratio.median <= ratio.high


def test_a_constant_ratio_has_no_width_however_much_the_machine_drifts():
    drift = np.linspace(1.0, 7.0, 48)
    ratio = paired_ratio(1.5 * drift, drift)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(7)
    hits = 0
    for _ in range(200):
        noise = np.exp(random.normal(0.0, 0.2, 47))
        ratio = paired_ratio(1.2 * noise, np.ones(47))
        hits += ratio.low <= 1.2 <= ratio.high
    assert 0.90 <= hits / 200 <= 0.99, f"{hits} of 200 intervals hold the true ratio"


def test_the_same_seed_gives_the_same_interval_and_long_runs_fit_in_memory():
    random = np.random.default_rng(0)
    first, second = random.uniform(1, 2, 5000), random.uniform(1, 2, 5000)
    assert paired_ratio(first, second, seed=3) == paired_ratio(first, second, seed=3)


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=1, max_size=40))
def test_the_interval_always_lies_within_the_pairs(pairs):
    ratios = [a / b for a, b in pairs]
    ratio = paired_ratio([a for a, _ in pairs], [b for _, b in pairs])
    assert min(ratios) <= ratio.low * (1 + 1e-9) and ratio.high <= max(ratios) * (1 + 1e-9)


def test_nothing_measured_is_none_and_uneven_series_are_refused():
    assert paired_ratio([], []) is None and median([]) is None and quantiles([]) == {}
    with pytest.raises(ValueError, match="3 and 2"):
        paired_ratio([1, 2, 3], [1, 2])


def test_the_collector_rests_while_timing_and_returns_even_after_an_error():
    def fail():
        assert not gc.isenabled()
        raise RuntimeError("broken step")

    result, seconds = timed(gc.isenabled, torch.device("cpu"))
    assert result is False and seconds >= 0 and gc.isenabled()
    with pytest.raises(RuntimeError):
        timed(fail, torch.device("cpu"))
    assert gc.isenabled()
    gc.disable()
    try:
        timed(int, torch.device("cpu"))
        assert not gc.isenabled(), "a collector that was off stays off"
    finally:
        gc.enable()


def test_quantiles_are_named_after_their_percent():
    assert quantiles(list(range(101))) == {"p10": 10.0, "p50": 50.0, "p90": 90.0, "p99": 99.0}
