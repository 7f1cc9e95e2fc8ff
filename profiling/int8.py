"""The methods in 8 bits: what r copies cost over the bare layer, and how far a request's answer depends on who shares its batch.

Cost: one 8-bit layer of bitsandbytes, bare and served with `flora` and `bmm-lora`, one call of each in turn, round after round, on
the same inputs. Batch: the embedded models, the same requests alone and together. Both with and without a threshold of outliers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from bitsandbytes.nn import Linear8bitLt
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from flora import backend, ops
from flora.engine import Engine, Request
from flora.errors import RequestError
from flora.layers import AdaptedLinear, LayerPlan, ServingHolder
from flora.models import choose_device
from flora.quantised import LLM_INT8_THRESHOLD, quantisation_config
from profiling import hardware, report, workload
from profiling.loading import set_threads
from profiling.timing import Ratio, median, paired_ratio, timed

METHODS = ("flora", "bmm-lora")
PARTS = ("cost", "batch")
THRESHOLDS = (LLM_INT8_THRESHOLD, 0.0)
WARMUP_ROUNDS = 2
MAX_NEW_TOKENS = 24


@dataclass(frozen=True)
class CostPoint:
    """One setting: the time of a served layer over that of the bare 8-bit layer, with its 95 % interval."""

    d_in: int
    d_out: int
    rows: int  # of the batch, each with an adapter of its own
    tokens: int  # of each row: 1 is a decode step
    rank: int
    method: str
    llm_int8_threshold: float
    rounds: int
    bare_s: float
    ratio: float
    low: float
    high: float


class _Serving:
    """All rows of a batch with one method and one plan."""

    def __init__(self, method: str, plan: LayerPlan) -> None:
        self.method, self._plan = method, plan

    def plan(self, layer: str) -> LayerPlan:
        return self._plan


def measure_cost(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    ranks: Sequence[int],
    rows: int = 8,
    rounds: int = 9,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    thresholds: Sequence[float] = THRESHOLDS,
    seed: int = 0,
) -> Iterator[CostPoint]:
    """Every combination of shapes (d_in, d_out), thresholds, tokens per row and ranks; a `CostPoint` per method as each is done."""
    quantisation_config("int8", dtype, None)  # it keeps bitsandbytes from logging at every call
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    for (d_in, d_out), threshold in itertools.product(shapes, thresholds):
        layer = Linear8bitLt(d_in, d_out, bias=False, has_fp16_weights=False, threshold=threshold)
        layer.weight.data = torch.randn(d_out, d_in, generator=generator) / d_in**0.5
        holder = ServingHolder()
        adapted = AdaptedLinear(layer.to(device).eval().requires_grad_(False), "layer", holder)
        for length, rank in itertools.product(tokens, ranks):
            x = normal(rows, length, d_in)
            A, B = normal(rows, rank, d_in), 0.05 * normal(rows, rank, d_out)
            A[:, 0], B[:, 0] = 1 + 0.1 * A[:, 0], 1 + B[:, 0]  # as an adapter that was trained from the identity
            routing = ops.route(range(rows), [rank] * rows, rank, device)
            seconds: dict[str, list[float]] = {name: [] for name in ("bare", *METHODS)}
            with torch.inference_mode():
                for round_number in range(-WARMUP_ROUNDS, rounds):
                    for name, taken in seconds.items():
                        holder.current = None if name == "bare" else _Serving(name, LayerPlan(A, B, routing))
                        _, second = timed(lambda adapted=adapted, x=x: adapted(x), torch.device(device))
                        if round_number >= 0:
                            taken.append(second)
            for method in METHODS:
                ratio: Ratio = paired_ratio(seconds[method], seconds["bare"], seed)
                facts = (d_in, d_out, rows, length, rank, method, threshold, rounds, median(seconds["bare"]))
                yield CostPoint(*facts, ratio.median, ratio.low, ratio.high)


@dataclass(frozen=True)
class BatchPoint:
    """The same requests alone and together, with one method of one engine.

    same_tokens of tokens: before the first that differs. median_difference, max_difference: of the logits they were chosen by.
    calls_with_outliers: the share of the adapted layers' calls, in the batch, that had any; None where no threshold is.
    """

    kind: str
    quantize: str | None
    llm_int8_threshold: float | None
    method: str
    requests: int
    tokens: int
    same_tokens: int
    median_difference: float
    max_difference: float
    calls_with_outliers: float | None


def measure_batch(kind: str, rows: int = 8, max_new_tokens: int = MAX_NEW_TOKENS, device: str = "cpu") -> Iterator[BatchPoint]:
    """The embedded model of a kind as it is, in 8 bits with the default threshold and without, and in 4 bits."""
    adapters = workload.discover_adapters(workload.ASSETS / "adapters" / kind)
    for quantize, threshold in ((None, None), *(("int8", threshold) for threshold in THRESHOLDS), ("nf4", None)):
        engine = Engine.from_pretrained(
            workload.ASSETS / "models" / kind, adapters, device=device, quantize=quantize, llm_int8_threshold=threshold
        )
        ready = workload.ready_rows({kind: engine.adapters}, rows, max_new_tokens)
        requests = [workload.request_from_row(row) for row in ready]
        for method in ("base", *METHODS):
            yield _alone_and_together(engine, requests, method)
        engine.close()


def _alone_and_together(engine: Engine, requests: Sequence[Request], method: str) -> BatchPoint:
    counts = [0, 0]  # calls with outliers, and all
    threshold = engine.llm_int8_threshold

    def count(layer: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        counts[0] += bool((given[0].abs() >= threshold).any())
        counts[1] += 1

    layers = engine.bank.layers.values() if threshold else ()
    hooks = [layer.base.register_forward_pre_hook(count) for layer in layers]
    together = _run(engine, requests, method)
    for hook in hooks:
        hook.remove()
    same, tokens, differences = 0, 0, []
    for request, (ids, logits) in zip(requests, together, strict=True):
        ((alone_ids, alone_logits),) = _run(engine, [request], method)
        agreeing = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, alone_ids, strict=False)))
        same, tokens = same + agreeing, tokens + max(len(ids), len(alone_ids))
        differences += [abs(one - other) for one, other in zip(logits[:agreeing], alone_logits[:agreeing], strict=True)]
    share = counts[0] / counts[1] if counts[1] else None
    facts = (engine.kind, engine.quantize, threshold, method, len(requests), tokens, same)
    return BatchPoint(*facts, median(differences), max(differences), share)


def _run(engine: Engine, requests: Sequence[Request], method: str) -> list[tuple[list[int], list[float]]]:
    """Each request's new tokens and the logits they were chosen by."""
    generation = engine.start(requests, method)
    while not generation.done:
        generation.step()
    answers = [completion.token_ids for completion in generation.completions]
    return [(ids, logits[: len(ids)]) for ids, logits in zip(answers, generation.chosen_logits, strict=True)]


def cost_table(points: Sequence[CostPoint]) -> str:
    """Time over the bare 8-bit layer's, a line per shape, threshold, tokens and rank."""
    lines = [
        f"{'layer':>13} {'threshold':>9} {'rows × tokens':>14} {'rank':>5} {'bare ms':>9}  "
        + "  ".join(f"{name:>18}" for name in METHODS)
    ]
    for _, group in itertools.groupby(points, key=lambda p: (p.d_in, p.d_out, p.llm_int8_threshold, p.tokens, p.rank)):
        by_method = {point.method: point for point in group}
        p = next(iter(by_method.values()))
        ratios = (str(Ratio(by_method[name].ratio, by_method[name].low, by_method[name].high, p.rounds)) for name in METHODS)
        layer = f"{f'{p.d_in} × {p.d_out}':>13} {p.llm_int8_threshold:>9g}"
        head = f"{layer} {f'{p.rows} × {p.tokens}':>14} {p.rank:>5} {1e3 * p.bare_s:>9.3f}  "
        lines.append(head + "  ".join(f"{ratio:>18}" for ratio in ratios))
    return "\n".join(lines)


def batch_table(points: Sequence[BatchPoint]) -> str:
    """How far the same request's tokens and logits are apart, alone and together."""
    heads = f"{'model':>7} {'weights':>19} {'method':>9} {'same tokens':>12} {'median |Δ logit|':>17} {'most':>8}"
    lines = [f"{heads} {'calls with outliers':>20}"]
    for p in points:
        threshold = "" if p.llm_int8_threshold is None else f", threshold {p.llm_int8_threshold:g}"
        share = "" if p.calls_with_outliers is None else f"{p.calls_with_outliers:.0%}"
        lines.append(
            f"{p.kind:>7} {(p.quantize or 'float32') + threshold:>19} {p.method:>9} {f'{p.same_tokens} / {p.tokens}':>12} "
            f"{p.median_difference:>17.1e} {p.max_difference:>8.1e} {share:>20}"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """What `python -m profiling int8` does. Raises a FloraError for bad input."""
    for name in ("tokens", "ranks", "rows", "rounds"):
        values = getattr(options, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            raise RequestError(f"--{name} must be at least 1")
    shapes = []
    for shape in options.layers:
        if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)):
            raise RequestError(f"--layers takes widths such as 2048x8192, not {shape!r}")
        shapes.append((int(match[1]), int(match[2])))
    set_threads(options.threads)
    device = str(choose_device(options.device))
    facts = hardware.environment() | {"device": device, "device_name": hardware.device_name(torch.device(device))}
    print(hardware.summary(facts), end="\n\n")
    rows: list[dict] = []
    if "cost" in options.part:
        total = len(METHODS) * len(THRESHOLDS) * len(shapes) * len(options.tokens) * len(options.ranks)
        measured = measure_cost(shapes, options.tokens, options.ranks, options.rows, options.rounds, device)
        costs = list(tqdm(measured, total=total, leave=False, disable=None, unit="ratio"))
        print("time over the bare 8-bit layer's, with 95 % intervals", cost_table(costs), sep="\n", end="\n\n")
        rows += [{"part": "cost", "dtype": "float32", **asdict(point)} for point in costs]
    if "batch" in options.part:
        transformers_logging.disable_progress_bar()  # the models that ship load in a blink
        batches = [point for kind in ("code", "speech") for point in measure_batch(kind, device=device)]
        print("the same request alone and in a batch", batch_table(batches), sep="\n")
        rows += [{"part": "batch", "dtype": "float32", **asdict(point)} for point in batches]
    if options.json:
        implementation = backend.implementation(torch.device(device).type)
        shared = {"seed": 0, "implementation": implementation, "hardware": facts, "command": report.own_command()}
        report.write_text(options.json, "".join(json.dumps(row | shared, ensure_ascii=False) + "\n" for row in rows))
    return 0
