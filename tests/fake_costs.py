"""What a machine would take that always reaches its limits: for tests that need a cost model and no measurement."""

from __future__ import annotations

import itertools
import math

from profiling.calibration import AXES, BATCHED_ROWS
from profiling.cost_model import MachineCosts, Table

BANDWIDTH, RATE, LAUNCH_S = 10e9, 100e9, 5e-6
SIZE = 4


def roofline(num_bytes: float, operations: float) -> float:
    return LAUNCH_S + max(num_bytes / BANDWIDTH, operations / RATE)


def _seconds(name: str, sizes: tuple[float, ...]) -> float:
    if name == "product":
        rows, numbers = sizes
        return roofline(SIZE * (numbers + 2 * rows * math.sqrt(numbers)), 2 * rows * numbers)
    if name == "modulation":
        rank, numbers = sizes
        return roofline(4 * SIZE * numbers, (2 * rank + 1) * numbers)
    if len(sizes) == 3:
        tokens, rank, width = sizes
        rows = BATCHED_ROWS if name.startswith("batched") else 1
        moved = rank * width + tokens * width * (2 if name.endswith("up") else 1) + rows * tokens * rank
        return roofline(SIZE * moved, 2 * tokens * rank * width)
    return roofline(2 * SIZE * sizes[0], sizes[0])


def fake_costs(device: str = "cpu", dtype: str = "float32") -> MachineCosts:
    tables = {
        name: Table(axes, tuple(_seconds(name, sizes) for sizes in itertools.product(*axes))) for name, axes in AXES.items()
    }
    return MachineCosts(device, dtype, SIZE, BANDWIDTH, RATE, LAUNCH_S, 0.0, 1 << 10, tables)
