"""Confidence intervals of scores: a percentile bootstrap over items, vectorised, with a fixed seed.

Every score here is a ratio of two sums over items: pass@k is Σ pass@k of a problem / problems, WER is Σ word errors of a clip /
words. What is drawn again with replacement is the item (or a cluster of items), so that a long clip counts by its words and several
samples of one problem are not taken for independent problems. Two methods on the same items are compared in the same resamples.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
_DRAWN_AT_ONCE = 4_000_000  # counts, so that many items need no more than some 32 MB


@dataclass(frozen=True)
class Interval:
    """A score over n items (or clusters) and its interval; low and high are None where one item says nothing of others."""

    value: float
    low: float | None
    high: float | None
    n: int
    confidence: float = CONFIDENCE

    def __str__(self) -> str:
        return f"{self.value:.3f}" if self.low is None else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(successes: float, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a rate: successes of n trials, 0 ≤ successes ≤ n."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a rate needs 0 ≤ successes ≤ n and n ≥ 1, not {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return (
        0.0 if successes == 0 else max(0.0, centre - half),
        1.0 if successes == n else min(1.0, centre + half),
    )


def pass_rate(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    weights: Sequence[float] | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """The mean of per-item rates in [0, 1], such as pass@k of each problem. values (n,). weights (n,): by default all the same.

    Where all items failed or all passed every resample is the same and the bootstrap's interval has no width: Wilson's is given.
    """
    weights = np.ones(len(values)) if weights is None else weights
    interval = ratio(np.multiply(values, weights), weights, clusters, confidence, seed)
    if interval.value in (0.0, 1.0):
        low, high = wilson(interval.value * interval.n, interval.n, confidence)
        return Interval(interval.value, low, high, interval.n, confidence)
    return interval


def ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Σ numerators / Σ denominators, the items drawn again: WER from word errors and words of each clip.

    numerators (n,), denominators (n,), both ≥ 0, the denominators not all 0. clusters (n,): items that are drawn together, such as
    several clips of one speaker. Without a single error in n clips the bootstrap's interval has no width: its upper end is then
    Wilson's for 0 of n, as if a clip were either right or all wrong. ValueError for no items or unequal lengths.
    """
    top, bottom = _clustered([numerators], denominators, clusters)
    value, n = float(top.sum() / bottom.sum()), len(bottom)
    if value == 0.0:
        return Interval(0.0, 0.0, wilson(0, n, confidence)[1], n, confidence)
    if n == 1:
        return Interval(value, None, None, n, confidence)
    low, high = _quantiles(_resampled_ratios(top, bottom, seed)[:, 0], confidence)
    return Interval(value, low, high, n, confidence)


def ratio_difference(
    first: Sequence[float],
    second: Sequence[float],
    denominators: Sequence[float] | None = None,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Σ first / Σ denominators − Σ second / Σ denominators of two methods over the same items, in the same resamples.

    first, second (n,): pass@k, or word errors, of each item under each method. denominators (n,): words, or None for a mean over
    items. An interval that leaves out 0 is a difference that these items show.
    """
    weights = np.ones(len(first)) if denominators is None else denominators
    top, bottom = _clustered([first, second], weights, clusters)
    value, n = float((top[0].sum() - top[1].sum()) / bottom.sum()), len(bottom)
    if n == 1:
        return Interval(value, None, None, n, confidence)
    ratios = _resampled_ratios(top, bottom, seed)  # (resamples, 2)
    low, high = _quantiles(ratios[:, 0] - ratios[:, 1], confidence)
    return Interval(value, low, high, n, confidence)


def mean_of_ratios(
    numerators: Sequence[Sequence[float]], denominators: Sequence[Sequence[float]], confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """The mean over groups (languages) of each one's Σ numerators / Σ denominators; items are drawn again within their group.

    numerators, denominators: a sequence of items for each group. The groups themselves are not a sample: they are all there is.
    `n` is the number of items. Negative numerators, such as differences of two methods' errors, are allowed.
    """
    if len(numerators) != len(denominators) or not len(numerators):
        raise ValueError(f"groups need numerators and denominators, not {len(numerators)} and {len(denominators)} of them")
    values, total, n = [], 0.0, 0
    for index, (top, bottom) in enumerate(zip(numerators, denominators, strict=True)):
        group_top, group_bottom = _clustered([top], bottom, None)
        values.append(group_top.sum() / group_bottom.sum())
        total = total + _resampled_ratios(group_top, group_bottom, seed + index)[:, 0]
        n += len(group_bottom)
    value = float(np.mean(values))
    low, high = _quantiles(total / len(values), confidence)
    return Interval(value, low, high, n, confidence)


def _clustered(
    numerators: Sequence[Sequence[float]], denominators: Sequence[float], clusters: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Sums by cluster, or by item: numerators (m, n), denominators (n,), float64."""
    bottom = np.asarray(denominators, dtype=np.float64)
    if not len(bottom):
        raise ValueError("a score needs at least one item")
    if any(len(row) != len(bottom) for row in numerators) or (clusters is not None and len(clusters) != len(bottom)):
        raise ValueError(f"a score over {len(bottom)} items needs as many values of each kind")
    top = np.asarray(numerators, dtype=np.float64)
    if not (np.isfinite(top).all() and np.isfinite(bottom).all() and (bottom >= 0).all() and bottom.sum() > 0):
        raise ValueError("a score needs finite values, and denominators of at least 0 that are not all 0")
    if clusters is None:
        return top, bottom
    place = {cluster: index for index, cluster in enumerate(dict.fromkeys(clusters))}
    members = np.array([place[cluster] for cluster in clusters])  # (n,)
    return (
        np.stack([np.bincount(members, weights=row, minlength=len(place)) for row in top]),
        np.bincount(members, weights=bottom, minlength=len(place)),
    )


def _resampled_ratios(numerators: np.ndarray, denominators: np.ndarray, seed: int) -> np.ndarray:
    """(resamples, m): the ratios of `NUM_RESAMPLES` resamples of n items. numerators (m, n), denominators (n,).

    How often each item is drawn is multinomial. A resample whose denominators are all 0 is left out.
    """
    random, n = np.random.default_rng(seed), len(denominators)
    rows = max(1, _DRAWN_AT_ONCE // n)
    parts = []
    for first in range(0, NUM_RESAMPLES, rows):
        counts = random.multinomial(n, np.full(n, 1.0 / n), size=min(rows, NUM_RESAMPLES - first))  # (rows, n)
        bottom = counts @ denominators
        parts.append((counts @ numerators.T)[bottom > 0] / bottom[bottom > 0, None])
    return np.concatenate(parts)


def _quantiles(resampled: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(resampled, (0.5 - confidence / 2, 0.5 + confidence / 2))
    return float(low), float(high)
