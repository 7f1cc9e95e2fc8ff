"""What two cost models say of a sweep's decode steps: the paper's Eq. 7 with c1 and c2 measured here, and the one by stages.

A step does more than its adapted layers. What it does besides is what the base model's step takes beyond its own layers';
so a method's step is predicted as the base model's measured step plus what its layers are predicted to take more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from flora.engine import Engine
from profiling.cost_model import HIGHEST_RANK, METHODS, LayerShape, MachineCosts, coefficients, predict_model
from profiling.figures import METHOD_STYLES
from profiling.sweep import SweepSettings
from profiling.sweep_points import STEP_TIME, Measure, SweepPoint, by_method

BASE = "base"


@dataclass(frozen=True)
class Predictions:
    """c1, c2: seconds of a multiply-add, the mean over the layers' work. eq7_crossover: infinite where fLoRA is always cheaper.
    crossover: of the model by stages, None where it is at no rank up to HIGHEST_RANK. errors: |predicted / measured − 1| of every
    point; empty without the base model's steps."""

    c1: float
    c2: float
    eq7_crossover: float
    crossover: int | None
    errors: tuple[float, ...]

    def sentence(self) -> str:
        """All of it in words."""
        eq7 = "at no rank" if math.isinf(self.eq7_crossover) else f"above rank {self.eq7_crossover:.2g}"
        stages = f"at no rank up to {HIGHEST_RANK}" if self.crossover is None else f"from rank {self.crossover} on"
        lora = METHOD_STYLES["bmm-lora"].label
        said = (
            f"Predicted for this model's decode step: the paper's Eq. 7, with c1 = {1e9 * self.c1:.3g} and c2 = "
            f"{1e9 * self.c2:.3g} ns a multiply-add measured on this machine, has {lora} ahead {eq7}; the model by stages (bytes, "
            f"operations, launches) {stages}."
        )
        if not self.errors:
            return f"{said} Choose the base model too, and its error is told here."
        return (
            f"{said} By stages, a step is predicted within {100 * median(self.errors):.0f} % in the median of "
            f"{len(self.errors)} points, the worst within {100 * max(self.errors):.0f} %."
        )


def predictable(engine: Engine, settings: SweepSettings) -> bool:
    """Whether both models speak of it: a decoder whose layers are all called at each step, unquantised, adapters spread evenly."""
    plain = engine.kind == "code" and engine.quantize is None and engine.device.type in ("cpu", "cuda")
    return plain and settings.load.traffic.popularity in ("distinct", "identical") and STEP_TIME in settings.measures


def predictions(engine: Engine, settings: SweepSettings, points: Sequence[SweepPoint], costs: MachineCosts) -> Predictions:
    """For the engine's layers and a full batch. costs: of its device and dtype."""
    layers = [(layer.in_features, layer.out_features) for layer in engine.bank.layers.values()]
    batch = engine.max_batch_size
    adapters = 1 if settings.load.traffic.popularity == "identical" else min(batch, settings.num_adapters)
    shape = LayerShape(*layers[0], rows=batch, length=1, rank=1, adapters=adapters)

    def seconds(method: str, rank: int) -> float:
        return predict_model(method, layers, replace(shape, rank=rank), costs)

    winning = [rank for rank in range(1, HIGHEST_RANK + 1) if seconds("flora", rank) <= seconds("bmm-lora", rank)]
    lowest = max(winning, default=0) + 1
    own = by_method(points, Measure(STEP_TIME))
    base = {point.rank: point.value for point in own.get(BASE, ())}
    errors = [
        abs((base[point.rank] / 1000 + seconds(method, point.rank) - seconds(BASE, point.rank)) / (point.value / 1000) - 1)
        for method, measured in own.items()
        for point in measured
        if method != BASE and method in METHODS and base.get(point.rank) and point.value
    ]
    return Predictions(*_eq7(layers, shape, costs), lowest if lowest <= HIGHEST_RANK else None, tuple(errors))


def _eq7(layers: Sequence[tuple[int, int]], shape: LayerShape, costs: MachineCosts) -> tuple[float, float, float]:
    """c1 and c2 over all layers together, and where Eq. 7 has both methods at the same cost."""
    shared = added = shared_work = added_work = 0.0  # seconds, and multiply-adds, of rank 1
    for d_in, d_out in layers:
        c1, c2 = coefficients(replace(shape, d_in=d_in, d_out=d_out), costs)
        shared += c2 * shape.tokens * d_in * d_out
        added += c1 * shape.tokens * (d_in + d_out)
        shared_work += shape.tokens * d_in * d_out
        added_work += shape.tokens * (d_in + d_out)
    # r · shared = shared + r · added
    return added / added_work, shared / shared_work, shared / (shared - added) if shared > added else math.inf
