"""Calls that take turns, each timed by itself: on a CPU as the host calls them, on a GPU as device events see them replayed.

On a GPU a call is captured in a CUDA graph, so that the host's time is in no number. What other calls left in the last cache is
flushed before each, the weight among it, as the other layers of a model do: without that, a call of a small layer would find its
weight in the cache, and the call after one that writes much would wait for that to reach memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from flora.engine.device import compute_on, turns_on
from flora.engine.graphs import CudaCapture
from profiling import peaks
from profiling.timing import timed

Result = TypeVar("Result")

WARMUP_ROUNDS = 2
CPU_CACHE_MULTIPLE = 2
CACHED_LAYERS = 64  # a model of so many layers that fits into the last cache stays there
MOST_TOLD = 200  # letters of an error
FLUSHED_BYTES = 256 << 20  # at least; several times the L2 of any GPU, and a head start for the host


class Rounds:
    """Calls in turn, round after round, each timed by itself.

    warmup: rounds before them, not counted. cold: flush the last cache before each call; None: on a GPU.
    """

    def __init__(self, device: torch.device, warmup: int = WARMUP_ROUNDS, cold: bool | None = None) -> None:
        self.device, self.warmup, self._by_events = device, warmup, device.type == "cuda"
        self._flushed: Tensor | None = None
        if self._by_events if cold is None else cold:
            size = CPU_CACHE_MULTIPLE * peaks.last_cache_bytes()
            if self._by_events:
                size = max(FLUSHED_BYTES, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
            self._flushed = torch.zeros(size // 4, device=device)

    def seconds(self, calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        """(rounds,) seconds of each."""
        taken: dict[str, list[float]] = {name: [] for name in calls}
        events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        for round_number in range(-self.warmup, rounds):
            for name, call in calls.items():
                if self._flushed is not None:
                    self._flushed.sum()  # read, not written: what is dirty would be written back on the next call's time
                if not self._by_events:
                    _, seconds = timed(call, self.device)
                    taken[name] += [seconds] if round_number >= 0 else []
                    continue
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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


def alone_on(device: torch.device, function: Callable[[], Result]) -> Result:
    """Call a function where the device's work is done, without gradients, while no engine of this process computes there."""

    def work() -> Result:
        with torch.inference_mode():
            return function()

    with turns_on(device):
        return compute_on(device)(work)


def cached_weight_bytes(device: torch.device) -> int:
    """How large a weight may be to be in the cache when its turn comes, as in a small model: then nothing is flushed."""
    return peaks.last_cache_bytes() // CACHED_LAYERS if device.type == "cpu" else 0


def captured(
    call: Callable[[], Tensor], device: torch.device, capture: CudaCapture | None = None
) -> tuple[Callable[[], object], str]:
    """A call to repeat, and how it is launched: by a "graph", or "eager" where there are none; "eager:" and why where it cannot be
    captured. capture: what others were captured by, with which it then shares memory; None: one of its own.

    Raises what the call itself raises, and OutOfMemoryError, which says nothing about whether it can be captured.
    """
    call()  # compiles its kernels
    if device.type != "cuda":
        return call, "eager"
    try:
        return (capture or CudaCapture(device))(call).replay, "graph"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what waits for the device cannot be captured; the row says so
        return call, f"eager: {first_line(error)}"


def in_a_row(calls: Sequence[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """All of them as one call, that returns what the last one does: what a launch costs is then shared by many."""

    def work() -> Tensor:
        for call in calls[:-1]:
            call()
        return calls[-1]()

    return work


def first_line(error: BaseException) -> str:
    """What went wrong, for a row: the kind of error, and the first line of what it says, without a path."""
    says = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    words = " ".join(word.rsplit("/", 1)[-1] if word.count("/") > 1 else word for word in says.split())
    return f"{type(error).__name__}: {words[:MOST_TOLD]}" if words else type(error).__name__
