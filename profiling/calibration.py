"""What the stages of `profiling.cost_model` take on this machine: every kind of stage over a few sizes, measured once and kept.

Some ten seconds for a dtype. The widths are powers of two and none that a known model has, so that what is predicted for a model's
layer was never measured itself. Products find their weight in memory, other stages what they work on in the cache; what it costs
them that it is not, the first time after another layer, is one number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from flora.layers import stored_by_input
from flora.ops import merge_flora
from profiling import peaks
from profiling.cost_model import OF_WEIGHTS, MachineCosts, Table
from profiling.rounds import Rounds, alone_on, cached_weight_bytes, captured
from profiling.timing import median

REPEATS = 9
QUANTILE = 0.25  # of the repeats: what is kept for long should not remember a moment in which the machine did something else
LONGEST_S = 0.1  # a stage that takes so long is not measured at larger sizes: it goes on in proportion

PRODUCT_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PRODUCT_WIDTHS = (256, 1024, 3584)
MODULATION_RANKS = (1, 4, 16, 64)
THIN_TOKENS = (1, 4, 16, 64)
THIN_RANKS = (1, 4, 16, 64)
THIN_WIDTHS = (512, 2048, 8192)
BATCHED_ROWS = 8
PASS_NUMBERS = (1 << 12, 1 << 15, 1 << 18, 1 << 21, 1 << 24)
PASS_WIDTH = 4096
PASS_RANK = 4
VERSION = 2  # of what is measured: another one is another calibration


@dataclass(frozen=True)
class Calibration:
    """`MachineCosts`, what it holds for, and how long it took."""

    identity: dict
    costs: MachineCosts
    repeats: int

    def as_row(self) -> dict:
        """A record; `Calibration.of_row` reads it back."""
        return {**self.identity, "repeats": self.repeats, "costs": asdict(self.costs)}

    @classmethod
    def of_row(cls, row: dict) -> Calibration:
        """From `as_row`; ValueError for anything that no calibration gives."""
        try:
            identity = {name: value for name, value in row.items() if name not in ("repeats", "costs")}
            costs = dict(row["costs"])
            rows = costs.pop("tables").items()
            tables = {name: Table(tuple(map(tuple, row["axes"])), tuple(row["seconds"])) for name, row in rows}
            return cls(identity, MachineCosts(**costs, tables=tables), row["repeats"])
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError("this is no calibration") from error


def machine_costs(device: torch.device, dtype: torch.dtype, fresh: bool = False) -> MachineCosts:
    """What was measured on this machine before, or what is measured now, which takes some ten seconds. fresh: in any case."""
    steps = costs_in_steps(device, dtype, fresh)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def costs_in_steps(device: torch.device, dtype: torch.dtype, fresh: bool = False) -> Generator[float, None, MachineCosts]:
    """`machine_costs`, which tells the share of it that is done, and can be left between two steps; then nothing is kept."""
    identity = peaks.identity_of(device) | {"dtype": str(dtype).removeprefix("torch."), "version": VERSION}
    found = None if fresh else peaks.find("costs", identity, Calibration)
    if found is None:
        found = yield from _measure(device, dtype, identity)
        peaks.keep("costs", identity, found.as_row())
    return found.costs


def _measure(device: torch.device, dtype: torch.dtype, identity: dict) -> Generator[float, None, Calibration]:
    """Every kind of stage anew."""
    yield 0.0
    limits = alone_on(device, partial(peaks.peaks, device))
    stages, tables, done = _Stages(device, dtype), {}, 0
    total = sum(math.prod(map(len, axes)) for axes in AXES.values())
    for name, axes in AXES.items():
        seconds: dict[tuple[float, ...], float] = {}
        for sizes in itertools.product(*axes):
            seconds[sizes] = alone_on(device, partial(stages.seconds, name, sizes, seconds))
            done += 1
            yield done / total
        tables[name] = Table(axes, tuple(seconds.values()))
    costs = MachineCosts(
        device=device.type,
        dtype=identity["dtype"],
        element_size=dtype.itemsize,
        copy_bytes_per_s=limits.copy_bytes_per_s,
        matrix_flops_per_s=limits.matrix_flops_per_s[identity["dtype"]],
        launch_s=limits.launch_s,
        cold_s=alone_on(device, stages.cold_s),
        cached_weight_bytes=cached_weight_bytes(device),
        tables=tables,
    )
    return Calibration(identity, costs, REPEATS)


class _Stages:
    """Every kind of stage as a call for given sizes, by its name, and the seconds that it takes."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._warm, self._cold = Rounds(device), Rounds(device, cold=True)

    def seconds(self, name: str, sizes: tuple[float, ...], smaller: Mapping[tuple[float, ...], float]) -> float:
        """Of a stage of these sizes. smaller: what those took that were measured before."""
        for place, axis in enumerate(AXES[name]):
            index = axis.index(sizes[place])
            less = (*sizes[:place], axis[index - 1], *sizes[place + 1 :])
            if index and smaller[less] > LONGEST_S:  # not measured: in proportion, as `Table` goes on
                return smaller[less] * sizes[place] / less[place]
        cold = name in OF_WEIGHTS and sizes[-1] * self.dtype.itemsize > cached_weight_bytes(self.device)
        return self._measured(name, sizes, cold)

    def cold_s(self) -> float:
        """How much longer a small stage takes where neither its code nor its inputs are in the cache: the median over all kinds."""
        longer = []
        for name, axes in AXES.items():
            if name not in OF_WEIGHTS:
                sizes = tuple(axis[1] for axis in axes)
                longer.append(self._measured(name, sizes, cold=True) - self._measured(name, sizes, cold=False))
        return max(0.0, median(longer))

    def _measured(self, name: str, sizes: tuple[float, ...], cold: bool) -> float:
        call, _ = captured(getattr(self, name.replace(" ", "_"))(*sizes), self.device)
        taken = (self._cold if cold else self._warm).seconds({name: call}, REPEATS)[name]
        return float(np.quantile(taken, QUANTILE))

    def _ones(self, *shape: int) -> Tensor:
        """Numbers of no importance, but no denormal ones."""
        return torch.ones(*shape, dtype=self.dtype, device=self.device)

    def product(self, rows: int, numbers: int) -> Callable[[], Tensor]:
        x, weight = self._ones(1, rows, math.isqrt(numbers)), self._weight(numbers)
        return lambda: linear(x, weight)

    def _weight(self, numbers: int) -> Tensor:
        """Laid out as the engine has it."""
        weight = self._ones(math.isqrt(numbers), math.isqrt(numbers))
        return stored_by_input(weight) if self.device.type == "cpu" and self.dtype == torch.float32 else weight

    def modulation(self, rank: int, numbers: int) -> Callable[[], Tensor]:
        width, weight = math.isqrt(numbers), self._weight(numbers)
        a, b = self._ones(1, rank, width), self._ones(1, rank, width)
        return lambda: merge_flora(weight, a, b)

    def batched_down(self, tokens: int, rank: int, numbers: int) -> Callable[[], Tensor]:
        width = numbers // BATCHED_ROWS
        x, a = self._ones(BATCHED_ROWS, tokens, width), self._ones(BATCHED_ROWS, rank, width)
        return lambda: torch.bmm(x, a.transpose(1, 2))

    def batched_up(self, tokens: int, rank: int, numbers: int) -> Callable[[], Tensor]:
        width = numbers // BATCHED_ROWS
        y, h = self._ones(BATCHED_ROWS, tokens, width), self._ones(BATCHED_ROWS, tokens, rank)
        b = self._ones(BATCHED_ROWS, rank, width)
        return lambda: torch.baddbmm(y, h, b)

    def down(self, tokens: int, rank: int, width: int) -> Callable[[], Tensor]:
        x, a = self._ones(1, tokens, width), self._ones(rank, width)
        return lambda: x @ a.T

    def up(self, tokens: int, rank: int, width: int) -> Callable[[], Tensor]:
        h, b = self._ones(1, tokens, rank), self._ones(rank, width)
        return lambda: h @ b

    def gather(self, numbers: int) -> Callable[[], Tensor]:
        rows = self._ones(numbers // PASS_WIDTH, PASS_WIDTH)
        places = torch.arange(rows.shape[0], device=self.device)
        return lambda: rows.index_select(0, places)

    def copies(self, numbers: int) -> Callable[[], Tensor]:
        x, a = self._expanded(numbers)
        return lambda: x[:, :1] * a

    def scale(self, numbers: int) -> Callable[[], Tensor]:
        expanded, b = self._expanded(numbers)
        return lambda: expanded.mul_(b)

    def sum(self, numbers: int) -> Callable[[], Tensor]:
        expanded, _ = self._expanded(numbers)
        return lambda: expanded.sum(1)

    def scatter(self, numbers: int) -> Callable[[], Tensor]:
        y, added = self._ones(numbers // PASS_WIDTH, 1, PASS_WIDTH), self._ones(numbers // PASS_WIDTH, 1, PASS_WIDTH)
        places = torch.arange(y.shape[0], device=self.device)
        return lambda: y.index_add_(0, places, added)

    def _expanded(self, numbers: int) -> tuple[Tensor, Tensor]:
        """Copies of a few rows, and factors for them: (rows, rank, tokens, width) and (rows, rank, 1, width)."""
        expanded_rows = numbers // PASS_WIDTH
        rank = min(PASS_RANK, expanded_rows)
        rows = min(BATCHED_ROWS, expanded_rows // rank)
        shape = (rows, rank, expanded_rows // rank // rows, PASS_WIDTH)
        return self._ones(*shape), self._ones(rows, rank, 1, PASS_WIDTH)


_BATCHED = tuple(BATCHED_ROWS * width for width in THIN_WIDTHS)
AXES = {
    "product": (PRODUCT_ROWS, tuple(width**2 for width in PRODUCT_WIDTHS)),
    "modulation": (MODULATION_RANKS, tuple(width**2 for width in PRODUCT_WIDTHS)),
    "batched down": (THIN_TOKENS, THIN_RANKS, _BATCHED),
    "batched up": (THIN_TOKENS, THIN_RANKS, _BATCHED),
    "down": (THIN_TOKENS, THIN_RANKS, THIN_WIDTHS),
    "up": (THIN_TOKENS, THIN_RANKS, THIN_WIDTHS),
    "gather": (PASS_NUMBERS,),
    "copies": (PASS_NUMBERS,),
    "scale": (PASS_NUMBERS,),
    "sum": (PASS_NUMBERS,),
    "scatter": (PASS_NUMBERS,),
}
"""The sizes that are measured, of every kind of stage."""
