"""What is promised of a GPU, and what a run's rows say about it: of each promise the worst of its points."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from profiling.gpu.int8_reference import EIGHT_BIT
from profiling.gpu.layers import PREFILL_TOKENS
from profiling.gpu.models import BATCH
from profiling.promise import Figure
from profiling.sweep_points import crossing

BASE_STEP, BANDWIDTH, BESIDE_BMM, PREFILL, INT8, TOKENS, CROSSOVER = 1.15, 0.7, 1.5, 1.25, 2.0, 0.9, 16
FEW_COMPONENTS = 128  # batch · rank up to which a decode step reads the weight and does little else


@dataclass(frozen=True)
class Subject:
    """What the promises are about. A dry run has other shapes, and promises nothing."""

    width: int = 6144
    prefill_tokens: int = PREFILL_TOKENS
    model: str = "starcoder"
    batch: int = BATCH
    graphs: bool = True


TINY = Subject(64, 17, "code", 2, graphs=False)


def promises(rows: Iterable[dict], subject: Subject = Subject()) -> list[Figure]:
    """Each promise and what was measured of it."""
    rows = list(rows)
    layers = [row for row in rows if row["part"] == "layers" and row["d_in"] == subject.width]
    decode = [row for row in layers if row["phase"] == "decode" and row["batch"] * row["rank"] <= FEW_COMPONENTS]
    prefill = [row for row in layers if row["phase"] == "prefill" and row["tokens"] == subject.prefill_tokens]
    bf16, int8 = ([row for row in decode if row["quantize"] == one] for one in (None, "int8"))
    width = subject.width
    return [
        _worst("layers", f"decode, width {width}, bfloat16: flora over the bare layer", bf16, "flora", _over_base, BASE_STEP, True),
        _worst("layers", "  its share of the copy bandwidth", bf16, "flora", _bandwidth, BANDWIDTH, unit="%"),
        _worst("layers", "  bmm-lora over flora, rank 8 and below", _up_to(bf16, 8), "bmm-lora", _over_flora, BESIDE_BMM),
        _worst("layers", "  sgmv-lora over flora, rank 4 and below", _up_to(bf16, 4), "sgmv-lora", _over_flora, 1.0),
        _worst(
            *("layers", f"prefill, {subject.prefill_tokens} rows an adapter: flora over the bare layer"),
            *([row for row in prefill if row["quantize"] is None], "flora", _over_base, PREFILL, True),
        ),
        _worst("layers", "int8 decode: r-fold rows through bitsandbytes' layer over flora", int8, EIGHT_BIT, _over_flora, INT8),
        *_of_models(rows, subject),
    ]


def _of_models(rows: list[dict], subject: Subject) -> list[Figure]:
    steps = [
        row
        for row in rows
        if row["part"] == "models" and row["measures"] == "decode step" and row["model"]["name"] == subject.model
        if row["cuda_graphs"] == subject.graphs and row["batch"] == subject.batch and row["quantize"] is None
    ]
    what = f"{subject.model}, {subject.batch} adapters"
    tokens = _worst(
        *("models", f"{what}: tokens/s of flora over the base model's, rank 4 and below"),
        *(_up_to(steps, 4), "flora", _tokens_over_base, TOKENS),
    )
    by_rank = sorted((row["rank"], row["over_flora"][0]) for row in steps if row["method"] == "bmm-lora")
    crossed = crossing([(math.log(rank), math.log(ratio)) for rank, ratio in by_rank])
    # Beyond the highest rank that was measured, there is nothing to say but that it lies beyond.
    value = None if crossed is None else min(crossed, by_rank[-1][0])
    crossover = Figure(
        "models", f"{what}: rank up to which flora is not behind bmm-lora", value, None, None, len(by_rank), CROSSOVER, unit=""
    )
    return [tokens, crossover]


def _worst(
    part: str,
    what: str,
    rows: list[dict],
    method: str,
    value_of: Callable[[dict], tuple[float, float, float]],
    target: float,
    at_most: bool = False,
    unit: str = "×",
) -> Figure:
    found = [(value_of(row), row) for row in rows if row["method"] == method]
    if not found:
        return Figure(part, what, None, None, None, 0, target, at_most, unit)
    (value, low, high), row = (max if at_most else min)(found, key=lambda one: one[0][0])
    where = f", at worst: batch {row['batch']}, rank {row['rank']}"
    # What the host has to launch piece by piece is slower for that alone: whoever reads the figure should know.
    where += ", launched by the host" if row.get("launched") == "eager" else ""
    return Figure(part, what + where, value, low, high, len(found), target, at_most, unit)


def _up_to(rows: list[dict], rank: int) -> list[dict]:
    return [row for row in rows if row["rank"] <= rank]


def _over_base(row: dict) -> tuple[float, float, float]:
    return tuple(row["over_base"])


def _over_flora(row: dict) -> tuple[float, float, float]:
    return tuple(row["over_flora"])


def _bandwidth(row: dict) -> tuple[float, float, float]:
    middle = row["bandwidth_share"]
    # A share is inversely proportional to the time that was taken.
    return middle, middle * row["median_s"] / row["quantiles"]["p90"], middle * row["median_s"] / row["quantiles"]["p10"]


def _tokens_over_base(row: dict) -> tuple[float, float, float]:
    middle, low, high = row["over_base"]
    return 1 / middle, 1 / high, 1 / low
