"""Calls that take turns, each timed by itself: on a CPU as the host calls them, on a GPU as device events see them replayed.

On a GPU a call is captured in a CUDA graph, so that the host's time is in no number, and what other calls left in the L2 cache is
flushed before each. On a CPU nothing is flushed: `Problem` has several copies of its weight instead, so that each call finds
another one in memory, as the layers of a model follow one another, while what a call itself works with stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flora.engine.graphs import CudaCapture
from profiling.timing import timed

WARMUP_ROUNDS = 2
FLUSHED_BYTES = 256 << 20  # at least; several times the L2 of any GPU, and a head start for the host


class Rounds:
    """Calls in turn, round after round, each timed by itself. warmup: rounds before them, not counted."""

    def __init__(self, device: torch.device, warmup: int = WARMUP_ROUNDS) -> None:
        self.device, self.warmup = device, warmup
        self._flushed: Tensor | None = None
        if device.type == "cuda":
            size = max(FLUSHED_BYTES, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
            self._flushed = torch.zeros(size // 4, device=device)

    def seconds(self, calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        """(rounds,) seconds of each."""
        taken: dict[str, list[float]] = {name: [] for name in calls}
        events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        for round_number in range(-self.warmup, rounds):
            for name, call in calls.items():
                if self._flushed is None:
                    _, seconds = timed(call, self.device)
                    taken[name] += [seconds] if round_number >= 0 else []
                    continue
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flushed.sum()  # read, not written: what is dirty would be written back on the next call's time
                begin.record()
                call()
                end.record()
                if round_number >= 0:
                    events.append((name, begin, end))
        if events:
            torch.cuda.synchronize(self.device)
        for name, begin, end in events:
            taken[name].append(begin.elapsed_time(end) / 1000)
        return taken


def captured(call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], str]:
    """A call to repeat, and how it is launched: by a "graph", or "eager" where there are none or it cannot be captured."""
    call()  # compiles its kernels
    if device.type != "cuda":
        return call, "eager"
    try:
        return CudaCapture(device)(call).replay, "graph"
    except RuntimeError:  # what waits for the device cannot be captured; the row says that it was not
        return call, "eager"
