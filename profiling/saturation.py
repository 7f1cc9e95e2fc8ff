"""Is an engine given more than it can serve? Then its queue grows for as long as the load lasts, and no number measured after that
says anything but how long it lasted.

The test. A queue that keeps up goes up and down too, for minutes at high load, and a trend test that takes its lengths for
independent (a regression, Mann-Kendall) finds a trend in any such stretch. What is nearly independent are a queue's *changes*
from one moment to the next: while the engine is busy, arrivals less departures. So the run so far is cut into `NUM_CHANGES` parts
of equal length, and Student's t of the mean change is taken, against the hypothesis that the queue is a random walk that does not
grow on average. An engine that keeps up lies beyond that hypothesis, its queue is drawn back to zero, and comes nowhere near the
critical value: in simulated queues of 1, 8 and 32 servers at 80 and 90 % load, Poisson or in bursts (burstiness 0.25), 100 runs
each looked at 48 times, the largest t was 2.6. At 150 % load the critical value was passed in every run, after 220 to 500 requests
in the median. The same test is made on the waiting times (TTFT) of as many groups of requests, in the order in which they were
answered. Both must be significant, over `MIN_REQUESTS` answered requests at least.

A queue that is full cannot grow. So an engine that refused more than `MAX_REFUSED` of the requests is over-saturated too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

NUM_CHANGES = 20
CRITICAL_T = 3.5  # one-sided p = 0.0012 with 19 degrees of freedom; a run is looked at many times
MIN_REQUESTS = 100
MAX_REFUSED = 0.05


@dataclass(frozen=True)
class Saturation:
    """Why a run counts as over-saturated. queue_t, ttft_t: Student's t of the growth of queue and TTFT; None where requests were
    refused instead."""

    time_s: float
    reason: str
    queue_t: float | None = None
    ttft_t: float | None = None


def growth_t(levels: Sequence[float]) -> float:
    """Student's t of the mean change from each level to the next, (n,) levels; 0 where nothing changes, infinite where all
    change by the same."""
    changes = np.diff(np.asarray(levels, dtype=float))
    if len(changes) < 2 or not changes.any():
        return 0.0
    spread = changes.std(ddof=1)
    return float(changes.mean() / spread * math.sqrt(len(changes))) if spread > 0 else math.copysign(math.inf, changes.mean())


@dataclass
class SaturationMonitor:
    """Told what happens in a run, it says when the run is over-saturated."""

    num_sent: int = 0
    num_refused: int = 0
    _times: list[float] = field(default_factory=list)
    _queue: list[int] = field(default_factory=list)
    _ttfts: list[float] = field(default_factory=list)

    def add_queue(self, time_s: float, waiting: int) -> None:
        """The queue's length at a moment; moments come in order."""
        self._times.append(time_s)
        self._queue.append(waiting)

    def add_ttft(self, ttft_s: float) -> None:
        """The next request's time to its first token."""
        self._ttfts.append(ttft_s)

    def add_sent(self) -> None:
        """One more request was sent."""
        self.num_sent += 1

    def add_refused(self) -> None:
        """A request was refused since the queue was full."""
        self.num_refused += 1

    def verdict(self) -> Saturation | None:
        """Over-saturated so far? None: no, or too early to tell."""
        if self.num_sent >= MIN_REQUESTS and self.num_refused > MAX_REFUSED * self.num_sent:
            reason = f"the queue is full: {self.num_refused} of {self.num_sent} requests were refused"
            return Saturation(self._times[-1] if self._times else 0.0, reason)
        ttfts = list(self._ttfts)  # another thread may add to it
        if len(ttfts) < MIN_REQUESTS or len(self._queue) <= NUM_CHANGES:
            return None
        moments = np.linspace(self._times[0], self._times[-1], NUM_CHANGES + 1)
        last_seen = np.searchsorted(self._times, moments, side="right") - 1
        queue_t = growth_t(np.asarray(self._queue)[last_seen])
        if queue_t <= CRITICAL_T:
            return None
        ttft_t = growth_t([group.mean() for group in np.array_split(np.asarray(ttfts), NUM_CHANGES + 1)])
        if ttft_t <= CRITICAL_T:
            return None
        seconds = self._times[-1] - self._times[0]
        reason = (
            f"the queue grew to {self._queue[-1]} requests in {seconds:.0f} s and TTFT grew with it "
            f"(t = {queue_t:.1f} and {ttft_t:.1f}, critical {CRITICAL_T:g})"
        )
        return Saturation(self._times[-1], reason, queue_t, ttft_t)
