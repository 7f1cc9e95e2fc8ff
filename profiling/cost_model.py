"""What one call of one layer should take, by method: predicted stage by stage from what this machine was measured to do.

A method is a few stages, such as gathering factors, scaling copies of the input and one product with the weight. Each of them moves
bytes and does operations, and takes max(bytes / bandwidth, operations / rate) and a launch. Neither bandwidth nor rate is one
number: a product of one row runs at a small part of the rate of one of a thousand rows, and a pass over what fits into a cache at
several times the memory's bandwidth. So `profiling.calibration` measures every kind of stage over a few sizes, once for a machine,
and `Table` reads the sizes between them off. No shape of a real model is among the measured ones.

The stages are those of PyTorch's own products. Where `flora.kernels` serves a method, on a GPU, one launch does what is counted
here as several, and the prediction is too high.

The paper's own model, Eq. 7, has two numbers, c1 and c2 (`coefficients`). Both models are held against measurements by
`python -m profiling oplab --grid`.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace

from flora.cost import cheaper_form, eq7_crossover, eq7_seconds
from flora.errors import RequestError

METHODS = ("base", "flora", "flora-expand", "flora-modulate", "bmm-lora", "loop-lora", "sgmv-lora")
"""Those that a cost can be predicted for."""
COEFFICIENT_RANKS = (1, 2, 4, 8, 16, 32, 64)
"""Over which c1 is averaged: the paper's model has one number for all of them."""
HIGHEST_RANK = 256


@dataclass(frozen=True)
class LayerShape:
    """One call of one layer: rows of `length` tokens, row i with the (i mod adapters)-th of so many adapters of one rank.

    RequestError for what makes no sense.
    """

    d_in: int
    d_out: int
    rows: int = 8
    length: int = 1
    rank: int = 4
    adapters: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise RequestError(f"{field.name} must be at least 1, not {value}")
        if self.adapters > self.rows:
            raise RequestError(f"{self.rows} rows cannot have {self.adapters} adapters: give at most one for each")

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def weight_numbers(self) -> int:
        return self.d_in * self.d_out


@dataclass(frozen=True)
class Table:
    """Seconds that were measured over a grid of sizes, (len(axes[0]) · len(axes[1]) · …,), the last axis fastest.

    Between two sizes the logarithms are interpolated; beyond the largest it goes on in proportion; below the smallest it stays.
    """

    axes: tuple[tuple[float, ...], ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        sorted_sizes = all(list(axis) == sorted(set(axis)) and axis[0] > 0 for axis in self.axes if axis)
        if not sorted_sizes or not all(self.axes) or len(self.seconds) != math.prod(map(len, self.axes)):
            raise ValueError("a table needs its sizes in order, and a time for each of their combinations")
        if not all(isinstance(second, int | float) and 0 < second < math.inf for second in self.seconds):
            raise ValueError("a time is a number above 0")

    def at(self, *sizes: float) -> float:
        """Seconds for these sizes, one for each axis."""
        factor, corners = 1.0, [[(0, 1.0)] for _ in self.axes]
        for place, (axis, size) in enumerate(zip(self.axes, sizes, strict=True)):
            factor *= max(1.0, size / axis[-1])
            inside = min(max(size, axis[0]), axis[-1])
            above = min(bisect.bisect_left(axis, inside), len(axis) - 1)
            below = max(0, above - 1) if axis[above] != inside else above
            share = 0.0 if below == above else math.log(inside / axis[below]) / math.log(axis[above] / axis[below])
            corners[place] = [(below, 1 - share), (above, share)] if share else [(below, 1.0)]
        logarithm = 0.0
        for corner in itertools.product(*corners):
            index = 0
            for axis, (step, _) in zip(self.axes, corner, strict=True):
                index = index * len(axis) + step
            logarithm += math.prod(weight for _, weight in corner) * math.log(self.seconds[index])
        return factor * math.exp(logarithm)


TABLES = {
    "product": ("rows", "numbers of the weight"),
    "modulation": ("rank", "numbers of the weight"),
    "batched down": ("tokens of each row", "rank", "rows · d_in"),
    "batched up": ("tokens of each row", "rank", "rows · d_out"),
    "down": ("tokens", "rank", "d_in"),
    "up": ("tokens", "rank", "d_out"),
    "gather": ("numbers written",),
    "copies": ("numbers written",),
    "scale": ("numbers",),
    "sum": ("numbers read",),
    "scatter": ("numbers added",),
}
"""Kind of stage → the sizes that its time depends on."""

OF_WEIGHTS = ("product", "modulation")
"""Stages that read the weight, and are measured with it in memory."""


@dataclass(frozen=True)
class MachineCosts:
    """What the stages take on one machine in one dtype. Made by `profiling.calibration`.

    copy_bytes_per_s, matrix_flops_per_s, launch_s: the machine's limits, as `profiling.peaks` measured them. tables: of stages
    whose inputs another stage has just written, the weight in memory. cold_s: how much longer a small stage takes where neither its
    code nor its inputs are in the cache, since other layers' weights have passed through it. cached_weight_bytes: a weight of at
    most so many bytes is of a model that stays in the cache, where nothing is cold.
    """

    device: str  # "cpu", "cuda", …
    dtype: str
    element_size: int
    copy_bytes_per_s: float
    matrix_flops_per_s: float
    launch_s: float
    cold_s: float
    cached_weight_bytes: int
    tables: dict[str, Table]

    def __post_init__(self) -> None:
        if set(self.tables) != set(TABLES):
            raise ValueError("a table is missing, or there is one too many")

    @property
    def ridge(self) -> float:
        """Operations for each byte, above which a product can be bound by arithmetic."""
        return self.matrix_flops_per_s / self.copy_bytes_per_s


@dataclass(frozen=True)
class Stage:
    """A part of a method: what is done, how often, of which sizes; bytes and operations of all times together."""

    kind: str  # of TABLES
    sizes: tuple[float, ...]
    num_bytes: float
    operations: float
    times: int = 1

    def seconds(self, costs: MachineCosts, cold: bool) -> float:
        """cold: after another layer. Only the first time: then its code is in the cache."""
        first_s = costs.cold_s if cold and self.kind not in OF_WEIGHTS else 0.0
        return first_s + self.times * costs.tables[self.kind].at(*self.sizes)

    def bound(self, costs: MachineCosts) -> str:
        """What takes most of its time, as far as limits say: "bandwidth", "arithmetic" or "launches"."""
        floors = {
            "bandwidth": self.num_bytes / costs.copy_bytes_per_s,
            "arithmetic": self.operations / costs.matrix_flops_per_s,
            "launches": self.times * costs.launch_s,
        }
        return max(floors, key=floors.__getitem__)


@dataclass(frozen=True)
class Prediction:
    """What a method should take. form: the method that it is computed as; stages: in order, with the seconds of each."""

    method: str
    form: str
    stages: tuple[tuple[Stage, float], ...]
    bound: str  # of the stage that takes longest

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.stages)

    @property
    def launches(self) -> int:
        return sum(stage.times for stage, _ in self.stages)


# ------------------------------------------------------------------------------------------------------------- predict


def predict(method: str, shape: LayerShape, costs: MachineCosts, form: str | None = None) -> Prediction:
    """What one call should take. form: the method whose stages it has, by default its own and for `flora` the form it chooses.

    Raises RequestError for a method that there is no model of.
    """
    if method not in METHODS:
        raise RequestError(f"there is no cost model of the method {method!r}: choose among {', '.join(METHODS)}")
    form = form or _form_of(method, shape, costs)
    cold = shape.weight_numbers * costs.element_size > costs.cached_weight_bytes
    timed = tuple((stage, stage.seconds(costs, cold)) for stage in _STAGES[form](shape, costs.element_size))
    longest, _ = max(timed, key=lambda one: one[1])
    return Prediction(method, form, timed, longest.bound(costs))


def predict_model(method: str, layers: Iterable[tuple[int, int]], shape: LayerShape, costs: MachineCosts) -> float:
    """Seconds of all layers (d_in, d_out) of a model together, each called with the rows, length, rank and adapters of `shape`.

    A model does more in a step than its adapted layers: what two methods differ in, this says; what they share, it does not.
    """
    return sum(predict(method, replace(shape, d_in=d_in, d_out=d_out), costs).seconds for d_in, d_out in layers)


def crossover(shape: LayerShape, costs: MachineCosts, first: str = "flora", second: str = "bmm-lora") -> int | None:
    """The lowest rank from which on `second` is predicted to be faster than `first`; None where that is at no rank up to 256."""

    def loses(rank: int) -> bool:
        at_rank = replace(shape, rank=rank)
        return predict(second, at_rank, costs).seconds < predict(first, at_rank, costs).seconds

    losing = [rank for rank in range(1, HIGHEST_RANK + 1) if loses(rank)]
    winning = {rank for rank in range(1, HIGHEST_RANK + 1)} - set(losing)
    lowest = max(winning, default=0) + 1
    return lowest if lowest <= HIGHEST_RANK else None


def coefficients(shape: LayerShape, costs: MachineCosts) -> tuple[float, float]:
    """The paper's c1 and c2 as measured on this machine for the rows, length and widths of `shape`, seconds of a multiply-add each.

    c2 is that of the product with the weight, c1 that of both batched products, the geometric mean over COEFFICIENT_RANKS. The
    paper calls them coefficients of the machine and gives no values; they depend on the shape far more than on the machine.
    """
    product = costs.tables["product"].at(shape.tokens, shape.weight_numbers)
    logarithms = []
    for rank in COEFFICIENT_RANKS:
        stages = [stage for stage in _bmm_lora(replace(shape, rank=rank), costs.element_size) if stage.kind.startswith("batched")]
        multiply_adds = rank * shape.tokens * (shape.d_in + shape.d_out)
        logarithms.append(math.log(sum(stage.seconds(costs, False) for stage in stages) / multiply_adds))
    return math.exp(sum(logarithms) / len(logarithms)), product / (shape.tokens * shape.weight_numbers)


def eq7(method: str, shape: LayerShape, costs: MachineCosts) -> float | None:
    """Seconds by the paper's Eq. 7 with this machine's c1 and c2; None for a method that it does not speak of."""
    named = {"flora": "flora", "flora-expand": "flora", "bmm-lora": "bmm-lora"}.get(method)
    if named is None:
        return None
    return eq7_seconds(named, shape.tokens, shape.rank, shape.d_in, shape.d_out, *coefficients(shape, costs))


def eq7_crossover_of(shape: LayerShape, costs: MachineCosts) -> float:
    """The rank at which Eq. 7 has both methods at the same cost here; infinite where fLoRA is always cheaper."""
    return eq7_crossover(shape.d_in, shape.d_out, *coefficients(shape, costs))


def _form_of(method: str, shape: LayerShape, costs: MachineCosts) -> str:
    if method != "flora":
        return method
    return cheaper_form([(rows * shape.length, shape.rank) for rows in _split(shape)], costs.element_size, costs.device)


# -------------------------------------------------------------------------------------------------------------- stages


def _split(shape: LayerShape) -> Iterator[int]:
    """Rows of each adapter."""
    each, one_more = divmod(shape.rows, shape.adapters)
    yield from [each + 1] * one_more + [each] * (shape.adapters - one_more)


def _in_order(shape: LayerShape) -> bool:
    """Whether rows of one adapter stand side by side."""
    return shape.adapters in (1, shape.rows)


def _pass(kind: str, numbers: float, size: int, times_moved: float = 2.0, times: int = 1) -> Stage:
    """A pass over numbers, each moved so often, mostly read and written."""
    return Stage(kind, (numbers,), times * numbers * times_moved * size, times * numbers, times)


def _product(tokens: float, shape: LayerShape, size: int, times: int = 1) -> Stage:
    num_bytes = size * (shape.weight_numbers + tokens * (shape.d_in + shape.d_out))
    return Stage("product", (tokens, shape.weight_numbers), times * num_bytes, times * 2.0 * tokens * shape.weight_numbers, times)


def _thin(kind: str, tokens: float, width: int, rank: int, size: int, rows: int = 1, times: int = 1) -> Stage:
    """A product from a width down to a rank, or back up: rows of so many tokens, each with factors of its own."""
    num_bytes = size * rows * (tokens * width * (2 if kind.endswith("up") else 1) + rank * width + tokens * rank)
    return Stage(kind, (tokens, rank, rows * width), times * num_bytes, times * 2.0 * rows * tokens * width * rank, times)


def _base(shape: LayerShape, size: int) -> list[Stage]:
    return [_product(shape.tokens, shape, size)]


def _expand(shape: LayerShape, size: int) -> list[Stage]:
    copies = shape.rows * shape.rank
    stages = [
        _pass("gather", copies * shape.d_in, size),
        _pass("gather", copies * shape.d_out, size),
        _pass("copies", copies * shape.length * shape.d_in, size),
        _product(copies * shape.length, shape, size),
        _pass("scale", copies * shape.length * shape.d_out, size),
    ]
    return [*stages, *([_pass("sum", copies * shape.length * shape.d_out, size, 1.0)] if shape.rank > 1 else [])]


def _modulate(shape: LayerShape, size: int) -> list[Stage]:
    # Bᵀ A is written, read and written again with the weight read; what is formed is read by the product.
    formed = Stage(
        "modulation",
        (shape.rank, shape.weight_numbers),
        4.0 * size * shape.adapters * shape.weight_numbers,
        shape.adapters * (2.0 * shape.rank + 1) * shape.weight_numbers,
        shape.adapters,
    )
    stages = [formed, _product(shape.tokens / shape.adapters, shape, size, shape.adapters)]
    if not _in_order(shape):
        stages += [_pass("gather", shape.tokens * shape.d_in, size), _pass("gather", shape.tokens * shape.d_out, size)]
    return [*stages, *([_pass("gather", shape.tokens * shape.d_out, size)] if shape.adapters > 1 else [])]


def _bmm_lora(shape: LayerShape, size: int) -> list[Stage]:
    return [
        _product(shape.tokens, shape, size),
        _pass("gather", shape.rows * shape.rank * shape.d_in, size),
        _pass("gather", shape.rows * shape.rank * shape.d_out, size),
        _thin("batched down", shape.length, shape.d_in, shape.rank, size, rows=shape.rows),
        _thin("batched up", shape.length, shape.d_out, shape.rank, size, rows=shape.rows),
    ]


def _loop_lora(shape: LayerShape, size: int) -> list[Stage]:
    tokens, adapters = shape.tokens / shape.adapters, shape.adapters
    stages = [
        _product(shape.tokens, shape, size),
        _thin("down", tokens, shape.d_in, shape.rank, size, times=adapters),
        _thin("up", tokens, shape.d_out, shape.rank, size, times=adapters),
        _pass("scatter", tokens * shape.d_out, size, 3.0, adapters),
    ]
    return stages if _in_order(shape) else [*stages, _pass("gather", tokens * shape.d_in, size, times=adapters)]


def _sgmv_lora(shape: LayerShape, size: int) -> list[Stage]:
    tokens, adapters = shape.tokens / shape.adapters, shape.adapters
    return [
        _product(shape.tokens, shape, size),
        _pass("gather", shape.tokens * shape.d_in, size),
        _thin("down", tokens, shape.d_in, shape.rank, size, times=adapters),
        _thin("up", tokens, shape.d_out, shape.rank, size, times=adapters),
        _pass("gather", shape.tokens * shape.d_out, size),
        _pass("scatter", shape.tokens * shape.d_out, size, 3.0),
    ]


_STAGES: dict[str, Callable[[LayerShape, int], list[Stage]]] = {
    "base": _base,
    "flora-expand": _expand,
    "flora-modulate": _modulate,
    "bmm-lora": _bmm_lora,
    "loop-lora": _loop_lora,
    "sgmv-lora": _sgmv_lora,
}
