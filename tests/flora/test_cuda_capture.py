"""What `CudaCapture` asks of CUDA: pools, streams and garbage, with the device's part played as strictly as the device plays it."""

from __future__ import annotations

import gc
import itertools
from contextlib import contextmanager

import pytest
import torch

from flora.engine.graphs import CudaCapture


class Device:
    """Streams by name, and memory pools by number, as `torch.cuda` and its allocator keep them."""

    def __init__(self) -> None:
        self.current = "default"
        self.users: dict[int, int] = {}  # of each pool
        self.new_pools = itertools.count()
        self.pools_used: list[int] = []
        self.ends_well = True

    def take(self, pool: int | None) -> int:
        """What the allocator does as a capture begins."""
        pool = next(self.new_pools) if pool is None else pool
        assert self.users.get(pool, 1) > 0, "use_count > 0 INTERNAL ASSERT FAILED"
        self.users[pool] = self.users.get(pool, 0) + 1
        self.pools_used.append(pool)
        return pool

    def stream(self, device):
        return FakeStream("side", device)

    def current_stream(self, device):
        return FakeStream(self.current, device)

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def capturing(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        before, self.current = self.current, stream.name
        graph.number = self.take(pool)
        try:
            yield
        finally:
            if not self.ends_well:  # torch.cuda.graph leaves its stream current then
                raise RuntimeError("operation failed due to a previous error during capture")
            self.current = before


class FakeStream:
    def __init__(self, name: str, device) -> None:
        self.name, self.device = name, device

    def wait_stream(self, other) -> None:
        pass


@pytest.fixture
def device(monkeypatch) -> Device:
    device = Device()

    class FakeGraph:
        number = -1  # of no pool yet

        def pool(self) -> int:
            return self.number

        def replay(self) -> None:
            pass

        def __del__(self) -> None:
            if self.number in device.users:
                device.users[self.number] -= 1

    monkeypatch.setattr(torch.cuda, "Stream", device.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", device.current_stream)
    monkeypatch.setattr(torch.cuda, "stream", device.on)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", device.capturing)
    return device


def test_graphs_share_a_pool_for_as_long_as_one_of_them_lives(device):
    """A pool whose graphs are all gone is not there any more, though a tensor of it may be: asked for it, the allocator fails."""
    capture = CudaCapture(torch.device("cuda", 0))
    first, second = (capture(lambda: torch.ones(1)) for _ in range(2))
    del first
    third = capture(lambda: torch.ones(1))
    assert device.pools_used == [0, 0, 0]
    del second, third
    graphs = [capture(lambda: torch.ones(1)) for _ in range(2)]
    assert device.pools_used[3:] == [1, 1] and graphs[0].replay() == 1.0


def test_it_runs_once_before_it_is_captured_and_both_on_the_same_stream(device):
    streams = []
    CudaCapture(torch.device("cuda", 0))(lambda: streams.append(device.current))
    assert streams == ["side", "side"] and device.current == "default"


def test_no_garbage_is_collected_in_the_midst_of_a_capture(device):
    seen = []
    capture = CudaCapture(torch.device("cuda", 0))
    capture(lambda: seen.append(gc.isenabled()))
    assert seen == [True, False] and gc.isenabled()
    gc.disable()
    try:
        capture(lambda: None)
        assert not gc.isenabled(), "who turned it off finds it on"
    finally:
        gc.enable()


def test_a_capture_that_fails_leaves_everything_as_it_was(device):
    capture, device.ends_well = CudaCapture(torch.device("cuda", 0)), False
    with pytest.raises(RuntimeError, match="during capture"):
        capture(lambda: torch.ones(1))
    assert device.current == "default" and gc.isenabled()
