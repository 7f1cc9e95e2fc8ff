"""Intervals against closed forms, tiny cases counted by hand, and how often they hold the truth."""

import numpy as np
import pytest

from flora.evaluate import intervals
from flora.evaluate.intervals import mean_of_ratios, pass_rate, ratio, ratio_difference, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 1, 0.2065, 1.0), (80, 100, 0.7112, 0.8666)],
)
def test_wilson_against_published_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_a_rate_needs_trials(successes, n):
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, n)


def test_of_two_items_the_resamples_can_be_counted():
    """Σ over two draws of (1, 3) errors in (2, 2) words: 1/2, 1 and 3/2 with 1/4, 1/2 and 1/4."""
    interval = ratio([1, 3], [2, 2])
    assert (interval.value, interval.low, interval.high, interval.n) == (1.0, 0.5, 1.5, 2)
    assert (ratio([1, 3], [2, 2], confidence=0.4).low, ratio([1, 3], [2, 2], confidence=0.4).high) == (1.0, 1.0)


def test_a_ratio_of_sums_is_not_a_mean_of_ratios():
    assert ratio([0, 4], [1, 9]).value == pytest.approx(0.4)
    assert pass_rate([0, 0.25, 1, 1]).value == pytest.approx(0.5625)


def test_of_many_items_it_is_the_normal_interval():
    values = np.random.default_rng(0).random(400)
    interval = pass_rate(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.003)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.003)


def test_the_interval_holds_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 400)
    random = np.random.default_rng(1)
    held = {"rate": 0, "ratio": 0}
    for trial in range(200):
        interval = pass_rate((random.random(60) < 0.7).astype(float), seed=trial)
        held["rate"] += interval.low <= 0.7 <= interval.high
        words = random.integers(1, 10, 60)
        interval = ratio(random.binomial(words, 0.2), words, seed=trial)
        held["ratio"] += interval.low <= 0.2 <= interval.high
    assert all(178 <= count <= 199 for count in held.values()), held


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 7, 133])
def test_where_all_items_agree_the_interval_keeps_its_width(value, n):
    interval = pass_rate([value] * n)
    assert (interval.low, interval.high) == pytest.approx(wilson(n * value, n))
    assert interval.high - interval.low > 0.02


def test_without_a_word_error_the_upper_end_is_not_zero():
    interval = ratio([0] * 20, [3] * 20)
    assert (interval.value, interval.low) == (0.0, 0.0) and interval.high == pytest.approx(wilson(0, 20)[1])


def test_one_item_says_nothing_of_others():
    interval = ratio([3], [2])
    assert (interval.value, interval.low, interval.high, interval.n) == (1.5, None, None, 1)
    assert str(interval) == "1.500" and ratio_difference([1], [0]).low is None


def test_clusters_are_drawn_whole():
    """Ten copies of each item are no more evidence than one."""
    random = np.random.default_rng(2)
    values, speakers = random.random(30), [f"speaker {i}" for i in range(30)]
    alone = pass_rate(values)
    copied = pass_rate(np.repeat(values, 10), clusters=np.repeat(speakers, 10))
    assert (copied.value, copied.low, copied.high, copied.n) == pytest.approx((alone.value, alone.low, alone.high, 30))
    independent = pass_rate(np.repeat(values, 10))
    assert independent.high - independent.low < 0.5 * (copied.high - copied.low)


def test_a_difference_is_of_the_same_items():
    """Two methods whose errors come together differ by little, however much the items do."""
    random = np.random.default_rng(3)
    words = random.integers(2, 8, 100)
    hard = random.integers(0, 3, 100)
    first, second = hard + (random.random(100) < 0.2), hard
    paired = ratio_difference(first, second, words)
    assert paired.value == pytest.approx(first.sum() / words.sum() - second.sum() / words.sum())
    assert 0 < paired.low < paired.value < paired.high
    apart = ratio(first, words).high - ratio(first, words).low
    assert paired.high - paired.low < 0.7 * apart
    same = ratio_difference(hard, hard, words)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    swapped = ratio_difference(second, first, words)
    assert (swapped.low, swapped.high) == pytest.approx((-paired.high, -paired.low))
    assert ratio_difference([1, 0, 1], [0, 0, 1]).value == pytest.approx(1 / 3)


def test_a_mean_over_languages_weighs_each_the_same():
    interval = mean_of_ratios([[1, 0, 1, 0], [2, 2]], [[1, 1, 1, 1], [10, 10]])
    assert interval.value == pytest.approx((0.5 + 0.2) / 2) and interval.n == 6
    assert interval.low >= 0.1, "only the first group varies"
    one = mean_of_ratios([[1, 0, 3]], [[2, 4, 3]], seed=5)
    alone = ratio([1, 0, 3], [2, 4, 3], seed=5)
    assert (one.low, one.high) == pytest.approx((alone.low, alone.high))
    below = mean_of_ratios([[-1, -1, 0, -2], [0, -1, -1, -1]], [[4] * 4, [3] * 4])
    assert below.value == pytest.approx((-0.25 - 0.25) / 2) and below.high < 0


def test_the_seed_decides_and_pieces_do_not(monkeypatch):
    errors, words = np.random.default_rng(4).random(50), np.full(50, 3)
    first = ratio(errors, words, seed=7)
    assert ratio(errors, words, seed=7) == first != ratio(errors, words, seed=8)
    monkeypatch.setattr(intervals, "_DRAWN_AT_ONCE", 333)
    assert ratio(errors, words, seed=7) == first


def test_a_clip_without_words_counts_its_errors_only():
    interval = ratio([1, 0, 2], [2, 0, 0])
    assert interval.value == 1.5 and np.isfinite([interval.low, interval.high]).all()


@pytest.mark.parametrize(
    ("errors", "words"),
    [([], []), ([1], [1, 2]), ([1.0, np.nan], [1, 1]), ([1, 1], [0, 0]), ([1, 1], [-1, 3]), ([1, 1], [np.inf, 1])],
)
def test_what_has_no_ratio_is_refused(errors, words):
    with pytest.raises(ValueError, match="a score"):
        ratio(errors, words)


def test_clusters_and_groups_must_match():
    with pytest.raises(ValueError, match="as many"):
        pass_rate([1, 0], clusters=["a"])
    with pytest.raises(ValueError, match="groups"):
        mean_of_ratios([], [])
    with pytest.raises(ValueError, match="groups"):
        mean_of_ratios([[1]], [[1], [2]])
