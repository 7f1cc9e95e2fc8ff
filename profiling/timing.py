"""Times that can be trusted: the device waits on both sides, steps are compared in pairs, and every ratio carries its
interval.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

Result = TypeVar("Result")

QUANTILES = (0.1, 0.5, 0.9, 0.99)
NUM_RESAMPLES = 2000
_NORMAL = 1.96  # the 97.5th percentile of the normal distribution
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # the same of Student's t with 1, 2 … 10 degrees
_RESAMPLED_AT_ONCE = 2_000_000  # numbers, so that the bootstrap of a long run needs no more than some 30 MB


@dataclass(frozen=True)
class Ratio:
    """A median pairwise ratio with its 95 % bootstrap confidence interval [low, high], over n pairs."""

    median: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def synchronise(device: torch.device) -> None:
    """Wait until `device` has finished all that was given to it; on a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(function: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Call `function`; return what it returns and the seconds it took, the device synchronised on both sides.

    Python's garbage collector is held back meanwhile, so that no collection is charged to whichever method it happens
    to hit.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        synchronise(device)
        started = time.perf_counter()
        result = function()
        synchronise(device)
        return result, time.perf_counter() - started
    finally:
        if collects:
            gc.enable()


def paired_ratio(
    numerator: Sequence[float], denominator: Sequence[float], seed: int = 0, groups: Sequence[int] | None = None
) -> Ratio | None:
    """The median of numerator[i] / denominator[i] with its interval; None without a pair.

    numerator, denominator: (n,) seconds, where entry i of both was measured back to back, in the order of time. groups: as
    `median_interval` takes them. It says nothing about a run on another machine or another day.
    """
    if len(numerator) != len(denominator):
        raise ValueError(f"pairs need two equally long series, not {len(numerator)} and {len(denominator)} entries")
    if not len(numerator):
        return None
    ratios = np.asarray(numerator, dtype=np.float64) / np.asarray(denominator, dtype=np.float64)  # (n,)
    return Ratio(*median_interval(ratios, seed, groups), n=len(ratios))


def median_interval(values: Sequence[float], seed: int = 0, groups: Sequence[int] | None = None) -> tuple[float, float, float]:
    """The median of values, (n,) in the order of time, and its 95 % bootstrap interval: (median, low, high).

    The ends are the 2.5th and 97.5th percentile of the medians of `NUM_RESAMPLES` resamples. What is resampled are blocks of
    neighbours, the longer the more alike neighbours are: what disturbs one step often disturbs the next one too. groups: (n,),
    which values were measured under the same circumstances, such as one repeat with its own caches in memory; with two or more,
    groups are resampled first, so that the interval tells how far they are apart. A few groups, resampled, tell too little of
    that: the part of the interval's width that comes from it is stretched to Student's t of so few, but to no value that was not
    measured.
    """
    values = np.asarray(values, dtype=np.float64)
    if groups is not None:
        order = np.argsort(groups, kind="stable")
        values, sizes = values[order], np.unique(np.asarray(groups)[order], return_counts=True)[1]
    else:
        sizes = np.array([len(values)])
    random, block, middle = np.random.default_rng(seed), _block_length(values, sizes), float(np.median(values))
    ends = _percentiles(values, random, sizes, block, moves_groups=True)
    if len(sizes) > 1:
        inside = np.abs(_percentiles(values, random, sizes, block, moves_groups=False) - middle) ** 2
        between = np.maximum(0.0, np.abs(ends - middle) ** 2 - inside)
        far = np.sqrt(inside + _stretch(len(sizes)) ** 2 * between)
        ends = np.clip(middle + np.array([-1, 1]) * far, values.min(), values.max())
    return middle, float(ends[0]), float(ends[1])


def _percentiles(
    values: np.ndarray, random: np.random.Generator, sizes: np.ndarray, block: int, moves_groups: bool
) -> np.ndarray:
    """The 2.5th and 97.5th percentile of resamples' medians. moves_groups: groups are resampled too, not only values in each."""
    medians = np.empty(NUM_RESAMPLES)
    chunk = max(1, _RESAMPLED_AT_ONCE // len(values))
    for first in range(0, NUM_RESAMPLES, chunk):
        rows = min(chunk, NUM_RESAMPLES - first)
        medians[first : first + rows] = np.median(values[_resample(random, rows, sizes, block, moves_groups)], axis=1)
    return np.quantile(medians, (0.025, 0.975))


def _stretch(num_groups: int) -> float:
    """How much wider an interval of 95 % for a mean of so few groups is than what resampling them gives: Student's t for the normal
    distribution's quantile, and n − 1 for n in the variance."""
    degrees = num_groups - 1
    t = _STUDENT[degrees - 1] if degrees <= len(_STUDENT) else _NORMAL + (_NORMAL**3 + _NORMAL) / (4 * degrees)
    return t / _NORMAL * math.sqrt(num_groups / degrees)


def _block_length(values: np.ndarray, sizes: np.ndarray) -> int:
    """Of the moving block bootstrap: Carlstein's rule for an autoregression of first order, of ranks, so that no spike decides."""
    starts = np.cumsum(sizes) - sizes
    before, after = [], []
    for start, size in zip(starts, sizes, strict=True):
        ranks = np.argsort(np.argsort(values[start : start + size])) - (size - 1) / 2
        before.append(ranks[:-1])
        after.append(ranks[1:])
    before, after = np.concatenate(before), np.concatenate(after)
    spread = math.sqrt(float(before @ before) * float(after @ after))
    if spread == 0:
        return 1
    likeness = min(0.95, max(0.0, float(before @ after) / spread))
    length = (2 * likeness / (1 - likeness**2)) ** (2 / 3) * len(values) ** (1 / 3)
    return int(min(max(1, round(length)), max(1, sizes.min() // 3)))


def _resample(random: np.random.Generator, rows: int, sizes: np.ndarray, block: int, moves_groups: bool) -> np.ndarray:
    """Places of values, (rows, n): groups drawn with replacement, of each as many values as the one in its place has, by blocks.
    moves_groups: False: every group in its own place."""
    starts = np.cumsum(sizes) - sizes
    parts = []
    for place, size in enumerate(sizes):
        drawn = random.integers(0, len(sizes), rows) if moves_groups else np.full(rows, place)  # (rows,) of groups
        firsts = random.integers(0, sizes[drawn][:, None], (rows, -(-size // block)))  # (rows, blocks)
        if block > 1:
            firsts = (firsts[:, :, None] + np.arange(block)).reshape(rows, -1)[:, :size] % sizes[drawn][:, None]
        parts.append(firsts + starts[drawn][:, None])
    return np.concatenate(parts, axis=1)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """{"p10": …, "p50": …, "p90": …, "p99": …} of `values`, in their unit; empty without values."""
    if not len(values):
        return {}
    return {f"p{round(100 * q)}": float(v) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}


def median(values: Sequence[float]) -> float | None:
    """The median of `values`, None without values."""
    return float(np.median(values)) if len(values) else None
