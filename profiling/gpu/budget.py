"""Time that is given out: to parts of a run, to the many points of one, to work that is like earlier work, so that a run ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Budget:
    """Some seconds, from now on."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds, self.clock = seconds, clock
        self._started_s = clock()

    @property
    def spent_s(self) -> float:
        return self.clock() - self._started_s

    @property
    def left_s(self) -> float:
        return max(0.0, self.seconds - self.spent_s)

    def share(self, weight: float, others: float) -> Budget:
        """A part's budget: its weight's share of what is left, beside that of the parts after it."""
        return Budget(self.left_s * weight / (weight + others), self.clock)


class Pace:
    """How often each of many points is repeated: as often as leaves time for the others; where even the fewest repeats of each do
    not fit, the last points are left out.

    Call `repeats` before each point, and `took` after it.
    """

    def __init__(self, budget: Budget, num_points: int, fewest: int, most: int) -> None:
        self._budget, self._num_left = budget, num_points
        self._fewest, self._most = fewest, most
        self._num_done = self._num_repeats = 0
        self._fixed_s = self._repeats_s = 0.0

    def repeats(self) -> int | None:
        """Of the next point; None where there is no time for it."""
        if not self._num_done:
            return self._most if self._budget.left_s > 0 else None
        fixed_s, repeat_s = self._fixed_s / self._num_done, self._repeats_s / self._num_repeats
        if self._budget.left_s < fixed_s + self._fewest * repeat_s:
            return None
        for_repeats = self._budget.left_s / max(1, self._num_left) - fixed_s
        return max(self._fewest, min(self._most, int(for_repeats / repeat_s) if repeat_s > 0 else self._most))

    def took(self, total_s: float, repeats_s: float, repeats: int) -> None:
        """A point took so long in all, of which so much for its repeats."""
        self._num_left -= 1
        self._num_done += 1
        self._num_repeats += repeats
        self._repeats_s += repeats_s
        self._fixed_s += total_s - repeats_s


class Longest:
    """How long each kind of work took so far, at the longest: whether another one still fits."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._seconds = clock, {}

    def expected_s(self, work: str) -> float:
        """0 for what was never done."""
        return self._seconds.get(work, 0.0)

    @contextmanager
    def timed(self, work: str) -> Iterator[None]:
        started = self._clock()
        try:
            yield
        finally:
            self._seconds[work] = max(self.expected_s(work), self._clock() - started)
