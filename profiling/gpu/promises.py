"""What is promised of a GPU, and what a run's rows say about it: of each promise the worst of its points, once all are there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from profiling.gpu import layers
from profiling.gpu.int8_reference import EIGHT_BIT, STAND_IN
from profiling.gpu.layers import FEW_COMPONENTS, LayerPoint
from profiling.gpu.models import BATCH
from profiling.promise import Figure
from profiling.sweep_points import crossing

BASE_STEP, BANDWIDTH, BESIDE_BMM, PREFILL, INT8, TOKENS, CROSSOVER = 1.15, 0.7, 1.5, 1.25, 2.0, 0.9, 16
BMM_RANK, SGMV_RANK = 8, 4  # up to which a promise beside them is made
TOKENS_RANKS = (1, 2, 4)

Interval = tuple[float, float, float]  # a value and the ends of its interval


@dataclass(frozen=True)
class Subject:
    """What the promises are about. A dry run has other shapes, and promises nothing."""

    points: tuple[LayerPoint, ...] = tuple(layers.promised_points())
    model: str = "starcoder"
    batch: int = BATCH
    graphs: bool = True

    def of_layers(self, phase: str, kind: str, rank: int = FEW_COMPONENTS) -> list[LayerPoint]:
        """The points of a promise, up to a rank."""
        return [point for point in self.points if (point.phase, point.kind) == (phase, kind) and point.rank <= rank]


TINY = Subject(tuple(layers.tiny_points()), "code", 2)


def promises(rows: Iterable[dict], subject: Subject = Subject()) -> list[Figure]:
    """Each promise and what was measured of it. Times of a kernel that is wrong are not counted: they are no measurements."""
    rows = list(rows)
    wrong = {(row["form"], _kind(row)) for row in rows if row["measures"] == "agreement" and not row["agrees"]}
    found: dict[str, dict[LayerPoint, dict]] = {}
    for row in rows:
        if row["measures"] == "layer" and (row["form"], _kind(row)) not in wrong:
            found.setdefault(row["method"], {})[LayerPoint.of_row(row)] = row
    flora = found.get("flora", {})
    # Beside a wrong kernel of flora's, no other method's time says anything either.
    found = {method: {at: row for at, row in own.items() if at in flora} for method, own in found.items()}
    decode, prefill = (subject.of_layers(phase, "bfloat16") for phase in ("decode", "prefill"))
    int8 = subject.of_layers("decode", "int8")
    beside_bmm, beside_sgmv = (subject.of_layers("decode", "bfloat16", rank) for rank in (BMM_RANK, SGMV_RANK))
    width = f"width {decode[0].d_in}, bfloat16"
    return [
        _worst(f"decode, {width}: flora over the bare layer", decode, flora, _over_base, BASE_STEP, at_most=True),
        _worst("  its share of the copy bandwidth", decode, flora, _bandwidth, BANDWIDTH, unit="%"),
        _worst("  bmm-lora over flora, rank 8 and below", beside_bmm, found.get("bmm-lora", {}), _over_flora, BESIDE_BMM),
        _worst("  sgmv-lora over flora, rank 4 and below", beside_sgmv, found.get("sgmv-lora", {}), _over_flora, 1.0),
        _worst(
            f"prefill, {prefill[0].tokens} rows an adapter: flora over the bare layer",
            *(prefill, flora, _over_base, PREFILL),
            at_most=True,
        ),
        _beside_int8(int8, found),
        *_of_models([row for row in rows if row["measures"] == "decode step"], subject, wrong),
    ]


def _kind(row: dict) -> str:
    return row["quantize"] or row["dtype"]


def _beside_int8(points: list[LayerPoint], found: dict[str, dict[LayerPoint, dict]]) -> Figure:
    """Beside bitsandbytes' own layer where it was measured, else beside what stands in for it, which is then said."""
    method = EIGHT_BIT if found.get(EIGHT_BIT) or not found.get(STAND_IN) else STAND_IN
    layer = "bitsandbytes' layer" if method == EIGHT_BIT else "a stand-in for bitsandbytes' layer (torch._int_mm)"
    what = f"int8 decode: r-fold rows through {layer} over flora"
    return _worst(what, points, found.get(method, {}), _over_flora, INT8)


def _of_models(rows: list[dict], subject: Subject, wrong: set[tuple[str, str]]) -> list[Figure]:
    """Of decode steps, where both that are compared were replayed, if that is promised."""
    steps: dict[str, dict[int, dict]] = {}  # method → rank → row
    for row in rows:
        is_subject = row["model"]["name"] == subject.model and row["batch"] == subject.batch and row["quantize"] is None
        if is_subject and row["cuda_graphs"] == subject.graphs and (row["replayed"] or not subject.graphs):
            steps.setdefault(row["method"], {})[row["rank"]] = row
    if any(kind in ("bfloat16", "float32") and form == "decode" for form, kind in wrong):
        steps.pop("flora", None)
    flora, base, bmm = (steps.get(method, {}) for method in ("flora", "base", "bmm-lora"))
    what = f"{subject.model}, {subject.batch} adapters"
    over_base = {rank: row for rank, row in flora.items() if rank in TOKENS_RANKS and rank in base and row["over_base"]}
    tokens = _worst_of(
        f"{what}: tokens/s of flora over the base model's, rank 4 and below",
        [(_tokens_over_base(row), row) for row in over_base.values()],
        *(len(TOKENS_RANKS), TOKENS),
        part="models",
    )
    by_rank = sorted((rank, row["over_flora"][0]) for rank, row in bmm.items() if rank in flora and row["over_flora"])
    return [tokens, _crossover(f"{what}: rank up to which flora is not behind bmm-lora", by_rank)]


def _crossover(what: str, by_rank: list[tuple[int, float]]) -> Figure:
    """by_rank: how many times as long bmm-lora's step takes. Without a loss anywhere, only a rank above the promised one tells."""
    crossed = crossing([(math.log(rank), math.log(ratio)) for rank, ratio in by_rank])
    if crossed == math.inf and by_rank[-1][0] <= CROSSOVER:
        return Figure(
            *("models", f"{what}, not lost up to rank {by_rank[-1][0]}", None, None, None, len(by_rank), CROSSOVER),
            **{"unit": "", "strictly": True},
        )
    if crossed == math.inf:
        what, crossed = f"{what}, beyond the highest that was measured", float(by_rank[-1][0])
    return Figure("models", what, crossed, None, None, len(by_rank), CROSSOVER, unit="", strictly=True)


def _worst(
    what: str,
    points: list[LayerPoint],
    rows: dict[LayerPoint, dict],
    value_of: Callable[[dict], Interval | None],
    target: float,
    at_most: bool = False,
    unit: str = "×",
) -> Figure:
    """Of single layers: one method's rows, at the points that are promised."""
    found = [(value, rows[point]) for point in points if point in rows and (value := value_of(rows[point])) is not None]
    return _worst_of(what, found, len(points), target, at_most, unit)


def _worst_of(
    what: str,
    found: list[tuple[Interval, dict]],
    num_points: int,
    target: float,
    at_most: bool = False,
    unit: str = "×",
    part: str = "layers",
) -> Figure:
    if not found:
        return Figure(part, what, None, None, None, 0, target, at_most, unit, num_points)
    (value, low, high), row = (max if at_most else min)(found, key=lambda one: one[0][0])
    where = f", at worst: batch {row['batch']}, rank {row['rank']}"
    # What the host has to launch piece by piece is slower for that alone: whoever reads the figure should know.
    where += ", launched by the host" if row.get("launched", "graph") != "graph" else ""
    return Figure(part, what + where, value, low, high, len(found), target, at_most, unit, num_points)


def _over_base(row: dict) -> Interval | None:
    return row["over_base"] and tuple(row["over_base"])


def _over_flora(row: dict) -> Interval | None:
    return row["over_flora"] and tuple(row["over_flora"])


def _bandwidth(row: dict) -> Interval:
    middle = row["bandwidth_share"]
    # A share is inversely proportional to the time that was taken.
    return middle, middle * row["median_s"] / row["quantiles"]["p90"], middle * row["median_s"] / row["quantiles"]["p10"]


def _tokens_over_base(row: dict) -> Interval:
    middle, low, high = row["over_base"]
    return 1 / middle, 1 / high, 1 / low
