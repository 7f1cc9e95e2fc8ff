"""Single layers of the paper's models: every method in turn, decode and prefill, beside what the hardware allows.

On a GPU a method's calls are captured in one CUDA graph and replayed: several of them, each of a layer of its own, as in a model.
So a launch is shared by many, and each reads its weight from memory; what was in the L2 cache before is flushed. Times are those of
device events, divided by the number of calls. `single_s` of a row is one call in a graph of its own, `empty_s` a graph that does
next to nothing. A method that cannot be captured is timed as the host launches it, and its row says so and why.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from flora.cost import work
from flora.engine.graphs import CudaCapture
from profiling.gpu.budget import Budget, Pace
from profiling.gpu.int8_reference import EIGHT_BIT, STAND_IN, eight_bit_call, stand_in_call
from profiling.gpu.session import Session, ratio_row
from profiling.problem import GATHERED, Problem
from profiling.rounds import WARMUP_ROUNDS, Rounds, captured, in_a_row
from profiling.timing import median, quantiles

METHODS = ("base", "flora", "flora-expand", "flora-modulate", "bmm-lora", GATHERED, "loop-lora", "sgmv-lora")
INT8_METHODS = (*METHODS, EIGHT_BIT, STAND_IN)
NOTHING, SINGLE = "nothing", "single call of "
TOLD_SINGLE = ("base", "flora")
WIDTHS = {6144: "starcoder", 4096: "llama-2-7b", 2048: "starcoderbase-1b", 5120: "llama-2-13b", 2816: "starcoderbase-3b"}
"""d_in = d_out → the model that has such layers, the most telling first."""
FEED_FORWARD = {(6144, 24576): "starcoder", (24576, 6144): "starcoder", (4096, 11008): "llama-2-7b"}
PROMISED_WIDTH = 6144
FEW_COMPONENTS = 128  # batch · rank up to which a decode step reads the weight and does little else
RANKS = (1, 4, 16, 2, 8, 64, 32)
BATCHES = (1, 8, 32, 4, 64, 16, 2)
PREFILL_BATCHES = (4, 1, 16)
PREFILL_TOKENS = 512  # of each row, which has an adapter of its own
FEWEST_ROUNDS, MOST_ROUNDS = 9, 40
DRY_ROUNDS = 1
MAX_EXPANDED_TOKENS = 1 << 15  # beyond, the expanded form of a prefill takes seconds and gigabytes
CALLS, CALLS_OF_SMALL, SMALL_BYTES = 8, 16, 16 << 20  # in a graph; of weights so small that eight would stay in the cache
PREFILL_GRAPH_TOKENS = 4096  # a graph with so many tokens takes far longer than a launch
DRY_CALLS = 2


@dataclass(frozen=True)
class LayerPoint:
    """One setting. tokens: of each row; every row has an adapter of its own."""

    phase: str  # "decode" or "prefill"
    kind: str  # "bfloat16" or "int8"
    d_in: int
    d_out: int
    batch: int
    tokens: int
    rank: int

    def __str__(self) -> str:
        return f"{self.phase}, {self.kind}, {self.d_in} → {self.d_out}, batch {self.batch}, rank {self.rank}"

    @property
    def calls(self) -> int:
        """How many of a method's are in one graph."""
        if self.phase == "prefill":
            return max(1, PREFILL_GRAPH_TOKENS // (self.batch * self.tokens))
        weight_bytes = self.d_in * self.d_out * (1 if self.kind == "int8" else 2)
        return CALLS_OF_SMALL if weight_bytes < SMALL_BYTES else CALLS

    @classmethod
    def of_row(cls, row: dict) -> LayerPoint:
        kind = row["quantize"] or row["dtype"]
        return cls(row["phase"], kind, *(row[name] for name in ("d_in", "d_out", "batch", "tokens", "rank")))


def promised_points() -> list[LayerPoint]:
    """What is promised of single layers, in the order in which the promises are complete soonest: the smallest of them first."""
    square, grid = (PROMISED_WIDTH, PROMISED_WIDTH), list(itertools.product(sorted(RANKS), sorted(BATCHES)))
    few = [(rank, batch) for rank, batch in grid if rank * batch <= FEW_COMPONENTS]
    decode, int8 = ([LayerPoint("decode", kind, *square, batch, 1, rank) for rank, batch in few] for kind in ("bfloat16", "int8"))
    prefill = [
        LayerPoint("prefill", "bfloat16", *square, batch, PREFILL_TOKENS, rank)
        for batch, rank in itertools.product(sorted(PREFILL_BATCHES), sorted(RANKS))
    ]
    return decode + prefill + int8


def points() -> list[LayerPoint]:
    """The whole grid: what is promised, then feed-forward layers, then all others from coarse to fine."""
    beyond = [
        LayerPoint("decode", kind, *shape, batch, 1, rank)
        for kind, shape, rank, batch in itertools.product(("bfloat16", "int8"), FEED_FORWARD, (1, 4, 16), (8, 32))
    ]
    beyond += [
        LayerPoint("prefill", "bfloat16", *shape, 4, PREFILL_TOKENS, rank)
        for shape, rank in itertools.product(FEED_FORWARD, (1, 4, 16))
    ]
    found: list[tuple[int, LayerPoint]] = []
    for width_place, width in enumerate(WIDTHS):
        for rank_place, rank in enumerate(RANKS):
            fine = (rank_place + 1) // 3 + width_place
            for batch_place, batch in enumerate(BATCHES):
                for kind in ("bfloat16", "int8"):
                    level = fine + (batch_place + 1) // 3 + 2 * (kind == "int8")
                    found.append((level, LayerPoint("decode", kind, width, width, batch, 1, rank)))
            for batch_place, batch in enumerate(PREFILL_BATCHES):
                for kind in ("bfloat16", "int8"):
                    level = fine + 2 * batch_place + 3 * (kind == "int8")
                    found.append((level, LayerPoint("prefill", kind, width, width, batch, PREFILL_TOKENS, rank)))
    ordered = [point for _, point in sorted(found, key=lambda one: one[0])]  # a stable sort: always the same order
    return list(dict.fromkeys([*promised_points(), *beyond, *ordered]))


def tiny_points() -> list[LayerPoint]:
    """For an interpreter: every phase and kind."""
    return [
        LayerPoint("decode", "bfloat16", 64, 64, 2, 1, 2),
        LayerPoint("prefill", "bfloat16", 64, 64, 2, 17, 8),
        LayerPoint("decode", "int8", 64, 64, 2, 1, 2),
        LayerPoint("prefill", "int8", 64, 64, 2, 17, 4),
    ]


def work_of(point: LayerPoint, method: str, computed_as: str) -> tuple[float, float]:
    """Bytes that must move at least, and operations, of a method that is computed as another one or its own."""
    rank, weight_size = 0 if method == "base" else point.rank, 1 if point.kind == "int8" else 2
    shape = (point.batch, point.tokens, rank, point.batch, point.d_in, point.d_out)
    return work(computed_as, *shape, element_size=2, weight_element_size=weight_size)


def measure(session: Session, kernels: ModuleType, budget: Budget) -> Iterator[list[dict]]:
    """Measure one point after the other, for as long as the budget lasts, and yield each one's rows, a row for each method: none
    of a point that failed. What is promised comes first, with as many rounds as there is time for.
    """
    wanted = tiny_points() if session.dry_run else points()
    num_first = 0 if session.dry_run else len(promised_points())
    with collections_made_cheap():
        for some in (wanted[:num_first], wanted[num_first:]):
            yield from _measure_points(session, kernels, budget, some)


@contextmanager
def collections_made_cheap() -> Iterator[None]:
    """Each capture of a graph begins with a collection of garbage, in PyTorch before 2.9: what is there now is left out of it."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _measure_points(session: Session, kernels: ModuleType, budget: Budget, wanted: list[LayerPoint]) -> Iterator[list[dict]]:
    fewest, most = (DRY_ROUNDS, DRY_ROUNDS) if session.dry_run else (FEWEST_ROUNDS, MOST_ROUNDS)
    pace, rounds = Pace(budget, len(wanted), fewest, most), Rounds(session.device, 0 if session.dry_run else WARMUP_ROUNDS)
    for point in wanted:
        repeats = pace.repeats()
        if repeats is None:
            return
        started, repeats_s, rows = time.perf_counter(), 0.0, []
        with session.isolated("layers", str(point), **asdict(point)), torch.inference_mode():
            rows, repeats_s = _measure_point(session, kernels, rounds, point, repeats)
        pace.took(time.perf_counter() - started, repeats_s, repeats)
        yield rows


def _measure_point(
    session: Session, kernels: ModuleType, rounds: Rounds, point: LayerPoint, repeats: int
) -> tuple[list[dict], float]:
    """Its rows, and the seconds that the repeats took. A method that fails is left out."""
    slots, ranks = range(1, point.batch + 1), [0, *[point.rank] * point.batch]
    shape = (point.tokens, point.d_in, point.d_out)
    problem = Problem(kernels, session.device, point.kind, list(slots), *shape, ranks, session.seed)
    num_calls = DRY_CALLS if session.dry_run else point.calls
    layers = [problem, *(problem.beside() for _ in range(num_calls - 1))]
    capture = _captures(session)
    calls: dict[str, Callable[[], object]] = {}
    launched: dict[str, str] = {}
    for method in INT8_METHODS if point.kind == "int8" else METHODS:
        with session.isolated("layers", f"{method}: {point}", method=method, **asdict(point)):
            own = [_call_of(layer, method, point) for layer in layers]
            if None in own:
                continue
            calls[method], launched[method] = captured(in_a_row(own), session.device, capture)
            if method in TOLD_SINGLE:
                calls[SINGLE + method], _ = captured(own[0], session.device, capture)
        if launched.get(method) != "graph":
            capture = _captures(session)  # where one could not be captured, its memory is not to be shared with others
    calls[NOTHING], _ = captured(partial(torch.zeros(1, device=session.device).add_, 1.0), session.device, capture)
    started = time.perf_counter()
    seconds = rounds.seconds(calls, repeats)
    repeats_s = time.perf_counter() - started
    empty_s = median(seconds.pop(NOTHING))
    singles = {method: median(seconds.pop(SINGLE + method)) for method in TOLD_SINGLE if SINGLE + method in seconds}
    rows = []
    for method, of_all in seconds.items():
        taken = [one / num_calls for one in of_all]
        middle = median(taken)
        computed_as = "flora-expand" if method in (EIGHT_BIT, STAND_IN) else problem.computed_as(method)
        num_bytes, operations = work_of(point, method, computed_as)
        dtype = str(problem.dtype).removeprefix("torch.")
        over = {f"over_{name}": ratio_row(of_all, seconds.get(name), session.seed) for name in ("base", "flora")}
        row = {
            "measures": "layer",
            "phase": point.phase,
            "model": None if session.dry_run else FEED_FORWARD.get((point.d_in, point.d_out)) or WIDTHS[point.d_in],
            "d_in": point.d_in,
            "d_out": point.d_out,
            "batch": point.batch,
            "tokens": point.tokens,
            "rank": point.rank,
            "popularity": "distinct",
            "method": method,
            "form": problem.form_of(method),
            "product": _product(problem, method),
            "computed_as": computed_as,
            "dtype": dtype,
            "quantize": "int8" if point.kind == "int8" else None,
            "launched": launched[method],
            "calls": num_calls,
            "repeats": repeats,
            "empty_s": empty_s,
            "single_s": singles.get(method),
            "median_s": middle,
            "quantiles": quantiles(taken),
            **over,
            "bytes": num_bytes,
            "operations": operations,
            "bandwidth_share": session.bandwidth_share(num_bytes, middle),
            "matrix_share": session.matrix_share(operations, middle, dtype),
        }
        rows.append(session.record("layers", row))
    return rows, repeats_s


def _captures(session: Session) -> CudaCapture | None:
    """What captures the methods of a point, in memory that they share."""
    return CudaCapture(session.device) if session.device.type == "cuda" else None


def _call_of(problem: Problem, method: str, point: LayerPoint) -> Callable[[], Tensor] | None:
    """None where there is no way, and where it would take too long."""
    others = {EIGHT_BIT: eight_bit_call, STAND_IN: stand_in_call}
    expands = method in ("flora-expand", *others) and problem.form_of(method) is None
    if expands and point.rank * point.batch * point.tokens > MAX_EXPANDED_TOKENS:
        return None
    return others[method](problem) if method in others else problem.call_of(method)


def _product(problem: Problem, method: str) -> str:
    """What multiplies with the weight: the same method may be measured as more than one thing does it."""
    if method == EIGHT_BIT:
        return "bitsandbytes"
    if method == STAND_IN:
        return "torch._int_mm, a stand-in for bitsandbytes' layer"
    form = problem.form_of(method)
    if problem.scales is not None and form in (None, "sgmv"):
        return "our own int8 kernel, without an adapter"  # PyTorch has no product of bfloat16 and int8
    return "PyTorch" if form in (None, "sgmv") else "our own kernel"
