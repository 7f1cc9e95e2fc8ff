"""The timing helpers: pairs, intervals, quantiles."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from profiling import timing
from profiling.timing import median, median_interval, paired_ratio, quantiles, timed


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


def autocorrelated(random: np.random.Generator, n: int, likeness: float) -> np.ndarray:
    """(n,) of an autoregression of first order: what disturbs a step disturbs the next ones too."""
    noise, values = random.normal(0.0, 1.0, n), np.empty(n)
    values[0] = noise[0]
    for place in range(1, n):
        values[place] = likeness * values[place - 1] + np.sqrt(1 - likeness**2) * noise[place]
    return np.exp(0.1 * values)


def test_disturbances_that_last_widen_the_interval():
    random = np.random.default_rng(5)
    series = [autocorrelated(random, 100, 0.6) for _ in range(100)]
    hits = sum(low <= 1 <= high for _, low, high in map(median_interval, series))
    alone = sum(low <= 1 <= high for _, low, high in (median_interval(random.permutation(one)) for one in series))
    assert hits >= 82, f"{hits} of 100 intervals hold the true median"
    assert alone <= hits - 8, "the test has something to find: neighbours taken apart, it holds far less often"


def test_groups_that_differ_widen_the_interval_so_that_two_runs_agree():
    random = np.random.default_rng(3)

    def one_run() -> tuple[np.ndarray, list[int]]:
        groups = np.repeat(range(3), 10)
        return np.exp(0.02 * random.normal(0, 1, 30) + 0.1 * random.normal(0, 1, 3)[groups]), groups.tolist()

    def overlaps(with_groups: bool) -> int:
        agreeing = 0
        for _ in range(100):
            runs = [median_interval(values, 0, groups if with_groups else None) for values, groups in (one_run(), one_run())]
            agreeing += runs[0][1] <= runs[1][2] and runs[1][1] <= runs[0][2]
        return agreeing

    assert overlaps(True) >= max(90, overlaps(False) + 5)


@pytest.mark.parametrize("num_groups", [3, 4, 8])
def test_few_groups_that_differ_are_stretched_to_hold_the_true_median(num_groups, monkeypatch):
    groups = np.repeat(range(num_groups), 10)
    random = np.random.default_rng(4)
    runs = [0.02 * random.normal(0, 1, len(groups)) + 0.1 * random.normal(0, 1, num_groups)[groups] for _ in range(100)]

    def hits() -> int:
        return sum(low <= 0 <= high for _, low, high in (median_interval(values, 0, groups) for values in runs))

    stretched = hits()
    monkeypatch.setattr(timing, "_stretch", lambda num_groups: 1.0)
    assert stretched >= 88 and stretched > hits(), "of 100 intervals of 95 %"


def test_groups_that_are_alike_are_not_stretched():
    values, groups = np.random.default_rng(5).normal(1, 0.1, 400), np.repeat(range(4), 100)
    (_, low, high), (_, lowest, highest) = median_interval(values, 0), median_interval(values, 0, groups)
    assert highest - lowest < 2 * (high - low)


def test_groups_of_different_sizes_in_any_order():
    values, groups = [1.0, 5.0, 1.0, 5.0, 1.0, 1.0], [0, 1, 0, 1, 0, 0]
    assert median_interval(values, 0, groups) == (1.0, 1.0, 5.0)
    assert median_interval([3.0], 0, [7]) == (3.0, 3.0, 3.0)
    assert paired_ratio([2.0, 6.0], [1.0, 3.0], groups=[0, 1]) == paired_ratio([2.0], [1.0]).__class__(2.0, 2.0, 2.0, 2)


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
