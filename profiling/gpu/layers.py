"""Single layers of the paper's models: every method in turn, decode and prefill, beside what the hardware allows.

On a GPU each method's call is captured in a CUDA graph and replayed, so that the host's time is in no number, and what other calls
left in the L2 cache is flushed before each. Times are those of device events; `empty_s` of a row is what they say of a graph that
does next to nothing. A method that cannot be captured is timed as the host launches it, and its row says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch

from flora.cost import work
from profiling.gpu.budget import Budget, Pace
from profiling.gpu.int8_reference import EIGHT_BIT, eight_bit_call
from profiling.gpu.session import Session, ratio_row
from profiling.problem import GATHERED, Problem
from profiling.rounds import WARMUP_ROUNDS, Rounds, captured
from profiling.timing import median, quantiles

METHODS = ("base", "flora", "flora-expand", "flora-modulate", "bmm-lora", GATHERED, "loop-lora", "sgmv-lora")
NOTHING = "nothing"
WIDTHS = {6144: "starcoder", 4096: "llama-2-7b", 2048: "starcoderbase-1b", 5120: "llama-2-13b", 2816: "starcoderbase-3b"}
"""d_in = d_out → the model that has such layers, the most telling first."""
RANKS = (1, 4, 16, 2, 8, 64, 32)
BATCHES = (1, 8, 32, 4, 64, 16, 2)
PREFILL_BATCHES = (4, 1, 16)
PREFILL_TOKENS = 512  # of each row, which has an adapter of its own
FEWEST_ROUNDS, MOST_ROUNDS = 9, 40
DRY_ROUNDS = 2
MAX_EXPANDED_TOKENS = 1 << 15  # beyond, the expanded form of a prefill takes seconds and gigabytes


@dataclass(frozen=True)
class LayerPoint:
    """One setting. tokens: of each row; every row has an adapter of its own."""

    phase: str  # "decode" or "prefill"
    kind: str  # "bfloat16" or "int8"
    width: int
    batch: int
    tokens: int
    rank: int


def points() -> list[LayerPoint]:
    """The whole grid, the most telling points first: what is promised, then the others from coarse to fine."""
    found: list[tuple[int, LayerPoint]] = []
    for width_place, width in enumerate(WIDTHS):
        for rank_place, rank in enumerate(RANKS):
            fine = (rank_place + 1) // 3 + width_place
            for batch_place, batch in enumerate(BATCHES):
                for kind in ("bfloat16", "int8"):
                    level = fine + (batch_place + 1) // 3 + 2 * (kind == "int8")
                    found.append((level, LayerPoint("decode", kind, width, batch, 1, rank)))
            for batch_place, batch in enumerate(PREFILL_BATCHES):
                for kind in ("bfloat16", "int8"):
                    level = fine + 2 * batch_place + 3 * (kind == "int8")
                    found.append((level, LayerPoint("prefill", kind, width, batch, PREFILL_TOKENS, rank)))
    return [point for _, point in sorted(found, key=lambda one: one[0])]  # a stable sort: always the same order


def tiny_points() -> list[LayerPoint]:
    """For an interpreter: every phase and kind."""
    return [
        LayerPoint("decode", "bfloat16", 64, 2, 1, 2),
        LayerPoint("prefill", "bfloat16", 64, 2, 17, 8),
        LayerPoint("decode", "int8", 64, 2, 1, 2),
        LayerPoint("prefill", "int8", 64, 2, 17, 4),
    ]


def work_of(point: LayerPoint, method: str, computed_as: str) -> tuple[float, float]:
    """Bytes that must move at least, and operations, of a method that is computed as another one or its own."""
    rank, weight_size = 0 if method == "base" else point.rank, 1 if point.kind == "int8" else 2
    shape = (point.batch, point.tokens, rank, point.batch, point.width, point.width)
    return work(computed_as, *shape, element_size=2, weight_element_size=weight_size)


def measure(session: Session, kernels: ModuleType, budget: Budget) -> Iterator[list[dict]]:
    """Measure one point after the other, for as long as the budget lasts, and yield each one's rows, a row for each method."""
    wanted = tiny_points() if session.dry_run else points()
    fewest, most = (DRY_ROUNDS, DRY_ROUNDS) if session.dry_run else (FEWEST_ROUNDS, MOST_ROUNDS)
    pace, rounds = Pace(budget, len(wanted), fewest, most), Rounds(session.device, 0 if session.dry_run else WARMUP_ROUNDS)
    for point in wanted:
        repeats = pace.repeats()
        if repeats is None:
            return
        started = time.perf_counter()
        rows, repeats_s = _measure_point(session, kernels, rounds, point, repeats)
        pace.took(time.perf_counter() - started, repeats_s, repeats)
        yield rows


def _measure_point(
    session: Session, kernels: ModuleType, rounds: Rounds, point: LayerPoint, repeats: int
) -> tuple[list[dict], float]:
    """Its rows, and the seconds that the repeats took."""
    slots, ranks = range(1, point.batch + 1), [0, *[point.rank] * point.batch]
    shape = (point.tokens, point.width, point.width)
    problem = Problem(kernels, session.device, point.kind, list(slots), *shape, ranks, session.seed)
    calls: dict[str, Callable[[], object]] = {}
    launched: dict[str, str] = {}
    with torch.inference_mode():
        for method in (*METHODS, EIGHT_BIT):
            call = eight_bit_call(problem) if method == EIGHT_BIT else problem.call_of(method)
            expands = method in ("flora-expand", EIGHT_BIT) and problem.form_of(method) is None
            if call is None or (expands and point.rank * point.batch * point.tokens > MAX_EXPANDED_TOKENS):
                continue
            calls[method], launched[method] = captured(call, session.device)
        calls[NOTHING], _ = captured(partial(torch.zeros(1, device=session.device).add_, 1.0), session.device)
        started = time.perf_counter()
        seconds = rounds.seconds(calls, repeats)
        repeats_s = time.perf_counter() - started
    empty_s = median(seconds.pop(NOTHING))
    rows = []
    for method, taken in seconds.items():
        form, middle = problem.form_of(method), median(taken)
        computed_as = "flora-expand" if method == EIGHT_BIT else problem.computed_as(method)
        num_bytes, operations = work_of(point, method, computed_as)
        over = {f"over_{name}": ratio_row(taken, seconds[name], session.seed) for name in ("base", "flora")}
        rows.append(
            session.record(
                "layers",
                {
                    "measures": "layer",
                    "phase": point.phase,
                    "model": None if session.dry_run else WIDTHS[point.width],
                    "d_in": point.width,
                    "d_out": point.width,
                    "batch": point.batch,
                    "tokens": point.tokens,
                    "rank": point.rank,
                    "popularity": "distinct",
                    "method": method,
                    "form": form,
                    "computed_as": computed_as,
                    "dtype": str(problem.dtype).removeprefix("torch."),
                    "quantize": "int8" if point.kind == "int8" else None,
                    "launched": launched[method],
                    "repeats": repeats,
                    "empty_s": empty_s,
                    "median_s": middle,
                    "quantiles": quantiles(taken),
                    **over,
                    "bytes": num_bytes,
                    "operations": operations,
                    "bandwidth_share": session.bandwidth_share(num_bytes, middle),
                    "matrix_share": session.matrix_share(operations, middle, str(problem.dtype).removeprefix("torch.")),
                },
            )
        )
    return rows, repeats_s
