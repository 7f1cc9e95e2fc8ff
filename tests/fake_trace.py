"""Chrome traces as torch.profiler writes them, made by hand, so that their tables are known."""

from __future__ import annotations

import random
from typing import Any


class FakeTrace:
    """Events in the order in which they are added; times in µs."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def op(self, name: str, start: float, duration: float, dims: list | None = None, thread: int = 1) -> None:
        self._add("cpu_op", name, start, duration, thread, {} if dims is None else {"Input Dims": dims})

    def annotation(self, name: str, start: float, duration: float, thread: int = 1) -> None:
        self._add("user_annotation", name, start, duration, thread, {})

    def launch(self, start: float, duration: float, correlation: int, name: str = "cudaLaunchKernel") -> None:
        self._add("cuda_runtime", name, start, duration, 1, {"correlation": correlation})

    def kernel(
        self, name: str, start: float, duration: float, correlation: int, stream: int = 7, category: str = "kernel"
    ) -> None:
        self._add(category, name, start, duration, stream, {"correlation": correlation, "stream": stream, "device": 0}, pid=0)

    def memory(self, time: float, num_bytes: int, total: int, device: int = 0) -> None:
        args = {"Bytes": num_bytes, "Total Allocated": total, "Device Type": device, "Device Id": -1}
        self.events.append({"ph": "i", "s": "t", "name": "[memory]", "pid": 1, "tid": 1, "ts": time, "args": args})

    def _add(self, category: str, name: str, start: float, duration: float, thread: int, args: dict, pid: int = 1) -> None:
        self.events.append(
            {"ph": "X", "cat": category, "name": name, "pid": pid, "tid": thread, "ts": start, "dur": duration, "args": args}
        )

    @property
    def document(self) -> dict[str, Any]:
        return {"schemaVersion": 1, "host_name": "a-machine", "traceName": "/somewhere/t.json", "traceEvents": self.events}


def two_methods() -> FakeTrace:
    """Two decode steps of fLoRA, 100 µs each, and two of bmm-LoRA, 80 µs each: one GEMM of 32 rows, and one of 8 with two bmm."""
    trace = FakeTrace()
    for start in (0.0, 1000.0):
        trace.annotation("step | flora | decode", start, 100)
        trace.op("attention | transformer.h.0.attn.c_attn", start + 10, 70)
        trace.op("aten::linear", start + 20, 50, [[8, 4, 256], [768, 256], []])
        trace.op("aten::mm", start + 25, 40, [[32, 256], [256, 768]])
        trace.op("aten::mul", start + 85, 10, [[8, 1, 256], [8, 4, 256]])
        trace.memory(start + 30, 4096, 5096)
        trace.memory(start + 40, 1000, 6096)
        trace.memory(start + 60, -5096, 1000)
    for start in (500.0, 1500.0):
        trace.annotation("step | bmm-lora | decode", start, 80)
        trace.op("attention | transformer.h.0.attn.c_attn", start + 5, 70)
        trace.op("aten::addmm", start + 10, 20, [[768], [8, 256], [256, 768], [], []])
        trace.op("aten::bmm", start + 35, 10, [[8, 1, 256], [8, 256, 4]])
        trace.op("aten::bmm", start + 50, 10, [[8, 1, 4], [8, 4, 768]])
        trace.op("aten::view", start + 62, 2, [[8, 768]])
    return trace


def large(num_events: int = 200_000, num_steps: int = 4) -> dict[str, Any]:
    """A trace of so many events, four operators deep, with thousands of different shapes; as others record them."""
    rng, trace, time = random.Random(0), FakeTrace(), 0.0
    names = ("aten::linear", "aten::addmm", "aten::mul", "aten::bmm", "aten::copy_", "aten::sum", "aten::view", "lib::own")
    for step in range(num_steps):
        began = time
        while len(trace.events) < (step + 1) * num_events // num_steps - 1:
            for depth in range(4):
                dims = [[768], [8, 256], [256, rng.randint(1, 3000)], [], []]
                trace.op(rng.choice(names), time + depth, 10 - 2 * depth, dims)
            time += 10 + rng.random()
        trace.annotation(f"ProfilerStep#{step}", began, time - began)
    return trace.document
