"""Every kernel against the plain reference in float64: shapes that fit no tile, and those of production. Of a form that is wrong,
or fails, in one dtype, no promise is judged there: its times are no measurements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from flora.ops import FAMILY
from profiling.gpu.budget import Budget
from profiling.gpu.session import Session
from profiling.problem import TOLERANCE, Problem

RANKS = (0, 1, 2, 3, 4, 5, 6, 7, 8)  # by slot; slot 0 is the identity
LARGE_RANKS = (0, 16, 64, 1, 128)
MOST_CHECKED = 1 << 22  # numbers of a weight; of a larger one, a part of the outputs is checked
KINDS = ("bfloat16", "int8", "float16", "float32")


@dataclass(frozen=True)
class Shape:
    """Rows of `length` tokens through d_in → d_out by a method. ranks: by slot. bias, by_input: as `Problem` takes them."""

    method: str
    slots: tuple[int, ...]
    length: int
    d_in: int
    d_out: int
    ranks: tuple[int, ...] = RANKS
    bias: bool = False
    by_input: bool = False


@dataclass(frozen=True)
class Case:
    """A shape in a dtype or, as "int8", on such weights."""

    kind: str
    shape: Shape

    @property
    def name(self) -> str:
        shape = self.shape
        extras = ", bias" * shape.bias + ", weight by input" * shape.by_input
        return f"{shape.method}, {self.kind}, {len(shape.slots)} × {shape.length} tokens, {shape.d_in} → {shape.d_out}{extras}"

    def as_row(self) -> dict:
        shape, dtype = self.shape, "bfloat16" if self.kind == "int8" else self.kind
        return {
            "method": shape.method,
            "dtype": dtype,
            "quantize": "int8" if self.kind == "int8" else None,
            "batch": len(shape.slots),
            "tokens": shape.length,
            "d_in": shape.d_in,
            "d_out": shape.d_out,
            "ranks": [shape.ranks[slot] for slot in shape.slots],
            "bias": shape.bias,
            "by_input": shape.by_input,
        }


def cases(small: bool) -> list[Case]:
    """The most telling first: what serves in production, then odd shapes, and last a few in float32. small: for an interpreter."""
    several, one_each = tuple((5 * row + 3) % len(RANKS) for row in range(7)), (3, 0, 3, 8)
    wide = (129, 33) if small else (2049, 1031)
    odd = [
        Shape("flora", several, 1, *wide, bias=True),
        Shape("flora-modulate", one_each, 10, *wide, by_input=True),
        Shape("sgmv-lora", several, 1, *wide, bias=True),
        Shape("flora", (1, 0, 2, 3, 1, 4), 1, 33, 40, LARGE_RANKS, by_input=True),
        Shape("sgmv-lora", one_each, 10, 33, 257, by_input=True),
        Shape("flora-modulate", (1, 0, 2, 4), 9, 33, 150, LARGE_RANKS, bias=True),
    ]
    if small:
        return [Case(kind, shape) for kind in KINDS for shape in odd if _adds(kind, shape)]
    full, fuller = tuple(range(1, 65)), tuple(range(1, 129))  # each row with an adapter of its own
    of_rank_4, of_rank_1 = (0, *[4] * 64), (0, *[1] * 128)
    production = [
        Shape("flora", full, 1, 6144, 6144, of_rank_4, bias=True, by_input=True),
        Shape("flora", fuller, 1, 6144, 6144, of_rank_1, bias=True, by_input=True),
        Shape("flora-modulate", (1, 2), 256, 6144, 6144, (0, 4, 64), bias=True, by_input=True),
        Shape("sgmv-lora", full, 1, 6144, 6144, of_rank_4, bias=True, by_input=True),
        Shape("sgmv-lora", (1, 2), 256, 6144, 6144, (0, 4, 64), bias=True, by_input=True),
        Shape("flora", full, 1, 4096, 11008, of_rank_4),
    ]
    edges = [
        Shape("flora", (0,), 1, 1, 1),
        Shape("flora", tuple(row % 9 for row in range(65)), 1, 257, 16),
        Shape("flora-modulate", several, 1, 129, 33),
        Shape("flora-modulate", one_each, 133, 128, 16),
        Shape("sgmv-lora", (1, 0, 2, 3, 1, 4), 5, 33, 40, LARGE_RANKS),
    ]
    found = [Case(kind, shape) for kind in KINDS[:2] for shape in (*production, *odd, *edges)]
    found += [Case("float16", shape) for shape in (*production[:3], *odd)]
    found += [Case("float32", shape) for shape in odd[:3]]
    return [case for case in found if _adds(case.kind, case.shape)]


def _adds(kind: str, shape: Shape) -> bool:
    """Whether a case tells anything new: beside a layer that alone reads its weight, sgmv-lora has the same two launches."""
    return not (kind == "int8" and shape.method == "sgmv-lora")


def check(session: Session, kernels: ModuleType, budget: Budget) -> Iterator[dict | None]:
    """Check one case after the other, for as long as the budget lasts, and yield its row; `agrees` says what came of it. None for
    one that failed, of which a row tells.
    """
    for case in cases(small=session.dry_run):
        if not budget.left_s:
            return
        row = None
        with session.isolated("kernels", case.name, **case.as_row()), torch.inference_mode():
            row = _checked(session, kernels, case)
        yield row


def _checked(session: Session, kernels: ModuleType, case: Case) -> dict:
    shape = case.shape
    problem = Problem(
        *(kernels, session.device, case.kind, shape.slots, shape.length, shape.d_in, shape.d_out, shape.ranks, session.seed),
        **{"with_bias": shape.bias, "by_input": shape.by_input},
    )
    form = problem.form_of(shape.method)
    y = problem.call_of(shape.method)()
    outputs = slice(None, None, max(1, shape.d_in * shape.d_out // MOST_CHECKED))
    truth, size = problem.truth(FAMILY[shape.method], outputs=outputs)
    error = ((y[..., outputs].double() - truth).abs() / size.clamp_min(1e-300)).max().item()
    allowed = TOLERANCE[problem.dtype]
    return session.record(
        "kernels",
        {
            "measures": "agreement",
            "form": form,
            **case.as_row(),
            "error": error if math.isfinite(error) else None,
            "allowed": allowed,
            "agrees": form is not None and tuple(y.shape) == (len(shape.slots), shape.length, shape.d_out) and error <= allowed,
        },
    )
