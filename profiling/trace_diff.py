"""One method's steps beside another's: what is launched instead, what no longer, and where time was won and lost. Pure Python."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from profiling.categories import BMM, CATEGORIES, GEMM, HOST
from profiling.trace_profile import Kernel, StepGroup

_SAME_CALLS = 0.01  # per step: means over steps need not be equal to the last digit


@dataclass(frozen=True)
class Change:
    """A kernel with its shapes in the two groups: calls per step and ms per step."""

    name: str
    category: str
    shapes: str
    calls: float
    other_calls: float
    ms: float
    other_ms: float

    @property
    def gained_ms(self) -> float:
        """Of the first group over the other; below 0: lost."""
        return self.other_ms - self.ms


@dataclass(frozen=True)
class Products:
    """The matrix products of a step: how many, and the rows that most of their time goes to; None where no shapes are known."""

    gemms: float
    rows: int | None
    gemms_of_rows: float
    bmms: float


@dataclass(frozen=True)
class TraceDiff:
    """The first group beside the other, both of one phase. Time gained is the other's minus the first's; below 0 it is lost."""

    first: StepGroup
    other: StepGroup
    gained_ms: dict[str, float]  # by category, of those that either has
    instead: tuple[Change, ...]  # only the first launches them; the most expensive first
    no_longer: tuple[Change, ...]  # only the other launches them
    changed: tuple[Change, ...]  # both do, not equally often
    first_products: Products
    other_products: Products

    @property
    def total_gained_ms(self) -> float:
        return self.other.mean_ms - self.first.mean_ms

    @property
    def is_noise(self) -> bool:
        """Whether the steps differ by no more than chance alone lets them."""
        return abs(self.total_gained_ms) <= _noise(self.first.error_ms, self.other.error_ms)


def diff(first: StepGroup, other: StepGroup) -> TraceDiff:
    """What the first group's steps do instead of the other's. What only the host does, such as views, is not told one by one."""
    used = [name for name in CATEGORIES if first.categories.get(name) or other.categories.get(name)]
    gained = {name: other.categories.get(name, 0.0) - first.categories.get(name, 0.0) for name in used}
    own, others = _by_what(first.kernels), _by_what(other.kernels)
    changes = []
    for key in dict.fromkeys([*own, *others]):
        (calls, ms), (other_calls, other_ms) = own.get(key, (0.0, 0.0)), others.get(key, (0.0, 0.0))
        if abs(calls - other_calls) > _SAME_CALLS:
            changes.append(Change(*key, calls, other_calls, ms, other_ms))
    changes.sort(key=lambda change: -max(change.ms, change.other_ms))
    return TraceDiff(
        first=first,
        other=other,
        gained_ms=gained,
        instead=tuple(change for change in changes if not change.other_calls),
        no_longer=tuple(change for change in changes if not change.calls),
        changed=tuple(change for change in changes if change.calls and change.other_calls),
        first_products=products_of(first),
        other_products=products_of(other),
    )


def _by_what(kernels: Iterable[Kernel]) -> dict[tuple[str, str, str], tuple[float, float]]:
    found: dict[tuple[str, str, str], tuple[float, float]] = {}
    for kernel in kernels:
        if kernel.category != HOST:
            found[kernel.name, kernel.category, kernel.shapes] = (kernel.calls, kernel.us / 1000.0)
    return found


def products_of(group: StepGroup) -> Products:
    """Count a group's matrix products."""
    gemms = bmms = 0.0
    by_rows: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])  # rows → [µs, calls]
    for kernel in group.kernels:
        gemms += kernel.calls * (kernel.category == GEMM)
        bmms += kernel.calls * (kernel.category == BMM)
        if kernel.category == GEMM and kernel.product is not None:
            by_rows[kernel.product[1]][0] += kernel.us
            by_rows[kernel.product[1]][1] += kernel.calls
    rows = max(by_rows, key=lambda number: by_rows[number][0]) if by_rows else None
    return Products(gemms, rows, by_rows[rows][1] if rows is not None else 0.0, bmms)


def sentence(difference: TraceDiff, first_label: str, other_label: str) -> str:
    """What wins here and why, in one sentence, from what was measured."""
    first, other = difference.first, difference.other
    gained = difference.total_gained_ms
    winner, share = (first_label, gained / other.mean_ms) if gained >= 0 else (other_label, -gained / first.mean_ms)
    if difference.is_noise:
        parts = [f"The {first.phase} steps of {first_label} and {other_label} do not differ beyond noise"]
    else:
        parts = [f"{winner}'s {first.phase} step is {abs(gained):.2f} ms shorter ({100 * share:.0f} %)"]
    own, others = difference.first_products, difference.other_products
    if own.gemms or others.gemms:
        parts.append(f"{first_label} runs {_products(own)} where {other_label} runs {_products(others)}")
    told = {
        name: ms
        for name, ms in difference.gained_ms.items()
        if abs(ms) > max(0.005, _noise(first.errors[name], other.errors[name]))
    }
    largest = sorted(told.items(), key=lambda item: -abs(item[1]))[:4]
    if largest:
        words = [f"{abs(ms):.2f} ms {'won' if ms > 0 else 'lost'} in {_CATEGORY_WORDS.get(name, name)}" for name, ms in largest]
        parts.append(f"for {first_label} that is {', '.join(words)}")
    return "; ".join(parts) + "."


def _noise(first_error: float, other_error: float) -> float:
    """What a difference of two means must exceed to be told."""
    return 2.0 * math.hypot(first_error, other_error)


_CATEGORY_WORDS = {
    GEMM: "GEMMs",
    "element-wise": "element-wise work",
    "norm, softmax, sum": "norms, softmax and sums",
    HOST: "the host's gaps",
}


def _products(products: Products) -> str:
    """Such as "20 GEMMs of 32 rows, 1 other and 40 bmm"."""
    parts = []
    if products.rows is not None:
        rest = products.gemms - products.gemms_of_rows
        parts.append(f"{products.gemms_of_rows:.4g} GEMM{'s' if products.gemms_of_rows != 1 else ''} of {products.rows} rows")
        parts += [f"{rest:.4g} other{'s' if rest > 1.01 else ''}"] if rest > _SAME_CALLS else []
    elif products.gemms:
        parts.append(f"{products.gemms:.4g} GEMMs")
    parts += [f"{products.bmms:.4g} bmm"] if products.bmms else []
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]])) or "no matrix product"
