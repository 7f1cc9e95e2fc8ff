"""Every kernel against the plain reference in float64, on shapes that fit no tile. A wrong one ends the run: nothing is timed."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Case:
    """What is checked: rows of `length` tokens through d_in → d_out, by a method in a dtype."""

    method: str
    kind: str
    slots: tuple[int, ...]
    length: int
    d_in: int
    d_out: int
    ranks: tuple[int, ...] = RANKS


def cases(small: bool) -> list[Case]:
    """The most telling first. small: for an interpreter."""
    several, one_each = tuple((5 * row + 3) % len(RANKS) for row in range(7)), (3, 0, 3, 8)
    wide = (129, 33) if small else (2049, 1031)
    shapes = [  # method, slots, length, d_in, d_out, ranks
        ("flora", several, 1, *wide, RANKS),
        ("flora-modulate", one_each, 10, *wide, RANKS),
        ("sgmv-lora", several, 1, *wide, RANKS),
        ("flora", (1, 0, 2, 3, 1, 4), 1, 33, 40, LARGE_RANKS),
        ("sgmv-lora", one_each, 10, 33, 257, RANKS),
        ("flora-modulate", (1, 0, 2), 9, 33, 150, LARGE_RANKS),
        ("flora", (0,), 1, 1, 1, RANKS),
        ("flora", several if small else tuple(row % 9 for row in range(65)), 1, 257, 16, RANKS),
        ("flora-modulate", several, 1, 129, 33, RANKS),
        ("flora-modulate", one_each, 3 if small else 133, 128, 16, RANKS),
        ("sgmv-lora", (1, 0, 2, 3, 1, 4), 5, 33, 40, LARGE_RANKS),
    ]
    kinds = ("bfloat16", "int8", "float16", "float32")
    checked = [(kind, shape) for kind in kinds for shape in (shapes[:6] if small else shapes)]
    # A layer whose weight only the layer itself reads has the same two launches beside it: int8 adds nothing to sgmv-lora.
    return [
        Case(method, kind, slots, length, d_in, d_out, ranks)
        for kind, (method, slots, length, d_in, d_out, ranks) in checked
        if not (kind == "int8" and method == "sgmv-lora")
    ]


def check(session: Session, kernels: ModuleType, budget: Budget) -> Iterator[dict]:
    """Check one case after the other, for as long as the budget lasts, and yield its row; `agrees` says what came of it."""
    for case in cases(small=session.dry_run):
        if not budget.left_s:
            return
        problem = Problem(
            *(kernels, session.device, case.kind, case.slots, case.length, case.d_in, case.d_out, case.ranks, session.seed)
        )
        form = problem.form_of(case.method)
        with torch.inference_mode():
            y = problem.call_of(case.method)()
        truth, size = problem.truth(FAMILY[case.method])
        difference = (y.double() - truth).abs()
        error = (difference / size.clamp_min(1e-300)).max().item()
        allowed = TOLERANCE[problem.dtype]
        agrees = form is not None and y.shape == truth.shape and error <= allowed  # NaN agrees with nothing
        yield session.record(
            "kernels",
            {
                "measures": "agreement",
                "method": case.method,
                "form": form,
                "dtype": str(problem.dtype).removeprefix("torch."),
                "quantize": "int8" if case.kind == "int8" else None,
                "batch": len(case.slots),
                "tokens": case.length,
                "d_in": case.d_in,
                "d_out": case.d_out,
                "ranks": [case.ranks[slot] for slot in case.slots],
                "error": error if error == error else None,
                "allowed": allowed,
                "agrees": agrees,
            },
        )
