"""Times that can be trusted: the device waits on both sides, steps are compared in pairs, and every ratio carries its
interval.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

Result = TypeVar("Result")

QUANTILES = (0.1, 0.5, 0.9, 0.99)
NUM_RESAMPLES = 2000
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


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float], seed: int = 0) -> Ratio | None:
    """The median of numerator[i] / denominator[i] with its interval; None without a pair.

    numerator, denominator: (n,) seconds, where entry i of both was measured back to back. The interval is the 2.5th to
    the 97.5th percentile of the medians of `NUM_RESAMPLES` resamples of the n ratios. It treats the pairs as
    independent, and says nothing about a run on another machine or another day.
    """
    if len(numerator) != len(denominator):
        raise ValueError(f"pairs need two equally long series, not {len(numerator)} and {len(denominator)} entries")
    if not len(numerator):
        return None
    ratios = np.asarray(numerator, dtype=np.float64) / np.asarray(denominator, dtype=np.float64)  # (n,)
    random = np.random.default_rng(seed)
    n = len(ratios)
    medians = np.empty(NUM_RESAMPLES)
    chunk = max(1, _RESAMPLED_AT_ONCE // n)
    for first in range(0, NUM_RESAMPLES, chunk):
        rows = min(chunk, NUM_RESAMPLES - first)
        medians[first : first + rows] = np.median(ratios[random.integers(0, n, (rows, n))], axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return Ratio(median=float(np.median(ratios)), low=float(low), high=float(high), n=n)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """{"p10": …, "p50": …, "p90": …, "p99": …} of `values`, in their unit; empty without values."""
    if not len(values):
        return {}
    return {f"p{round(100 * q)}": float(v) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}


def median(values: Sequence[float]) -> float | None:
    """The median of `values`, None without values."""
    return float(np.median(values)) if len(values) else None
