"""When a run counts as over-saturated: simulated queues whose load is known."""

import heapq
import math

import numpy as np
import pytest

from profiling.saturation import CRITICAL_T, MIN_REQUESTS, Saturation, SaturationMonitor, growth_t

LOOKS, SAMPLES_PER_LOOK = 40, 10


def first_verdict(load, burstiness, servers, seed, num_requests=1600) -> Saturation | None:
    """Simulate a queue of `servers` that each take an exponential time of mean 1 s, and ask `LOOKS` times."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.gamma(burstiness, 1 / (load * servers * burstiness), num_requests))
    free_at = [0.0] * servers
    starts = np.empty(num_requests)
    for index, (arrival, taken) in enumerate(zip(arrivals, rng.exponential(size=num_requests), strict=True)):
        starts[index] = max(heapq.heappop(free_at), arrival)
        heapq.heappush(free_at, starts[index] + taken)
    moments = np.linspace(0, arrivals[-1], LOOKS * SAMPLES_PER_LOOK)
    sent = np.searchsorted(arrivals, moments, side="right")
    answered = np.searchsorted(starts, moments, side="right")
    monitor, told = SaturationMonitor(), 0
    for place, moment in enumerate(moments):
        monitor.add_queue(moment, sent[place] - answered[place])
        if place % SAMPLES_PER_LOOK == SAMPLES_PER_LOOK - 1:
            for ttft in (starts - arrivals)[told : answered[place]]:
                monitor.add_ttft(ttft)
            told = answered[place]
            if found := monitor.verdict():
                return found
    return None


@pytest.mark.parametrize("burstiness", [1.0, 0.25])
@pytest.mark.parametrize("servers", [1, 8])
def test_a_queue_that_keeps_up_raises_no_alarm_and_one_that_does_not_is_found(servers, burstiness):
    for seed in range(25):
        assert first_verdict(0.8, burstiness, servers, seed) is None, f"false alarm with seed {seed}"
    found = [first_verdict(1.5, burstiness, servers, seed) for seed in range(25)]
    assert all(found), f"{found.count(None)} overloads were missed"
    assert all(min(one.queue_t, one.ttft_t) > CRITICAL_T and "queue grew" in one.reason for one in found)


def test_the_t_of_growth_is_students():
    assert growth_t([0, 1, 3, 4, 6]) == pytest.approx(1.5 / (math.sqrt(1 / 3) / 2))  # changes 1 2 1 2: mean 1.5, variance 1/3
    assert growth_t([5, 4, 2, 1, -1]) == pytest.approx(-1.5 / (math.sqrt(1 / 3) / 2))
    assert growth_t([0, 1, 2, 3]) == math.inf and growth_t([3, 2, 1]) == -math.inf
    assert growth_t([7, 7, 7]) == growth_t([7]) == growth_t([]) == 0.0


def test_a_full_queue_counts_as_over_saturated_but_a_few_refusals_do_not():
    monitor = SaturationMonitor()
    for _ in range(5):
        monitor.add_refused()
    for _ in range(MIN_REQUESTS):
        assert monitor.verdict() is None
        monitor.add_sent()
    assert monitor.verdict() is None, "5 %"
    monitor.add_refused()
    found = monitor.verdict()
    assert "6 of 100 requests were refused" in found.reason and found.queue_t is None


def growing(ttfts, queue):
    monitor = SaturationMonitor()
    for index, (ttft, waiting) in enumerate(zip(ttfts, queue, strict=True)):
        monitor.add_queue(0.1 * index, waiting)
        monitor.add_ttft(ttft)
    return monitor.verdict()


def test_both_the_queue_and_ttft_must_rise_over_enough_requests():
    n = 2 * MIN_REQUESTS
    rising, level = np.arange(n), np.arange(n) % 7
    assert growing(rising, rising) is not None
    assert growing(level, rising) is None and growing(rising, level) is None
    assert growing(rising[: MIN_REQUESTS - 1], rising[: MIN_REQUESTS - 1]) is None, "too early to tell"
    assert growing(-rising, -rising) is None, "a queue that is worked off"
