"""One layer at true widths: every method in turn on the same batch, beside float64, the machine's limits and what was predicted.

A layer needs no weights of a model, only its widths: random numbers take the same time. Methods take turns, each call with
caches flushed (`profiling.rounds`), and each call is timed by itself. A method whose calls would take too long or need too much
memory is left out, and says so; a layer that does not fit at all is an error.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import psutil
import torch

from flora import backend
from flora.cost import work
from flora.errors import RequestError
from flora.models import KNOWN_MODELS
from flora.ops import FAMILY
from flora.shapes import layer_widths
from profiling import hardware
from profiling.cost_model import METHODS, LayerShape, MachineCosts, Prediction, crossover, eq7, eq7_crossover_of, predict
from profiling.problem import TOLERANCE, Problem
from profiling.rounds import Rounds, alone_on, captured
from profiling.timing import Ratio, median, median_interval, paired_ratio, quantiles

BUDGET_S = 1.2  # of the timed calls of a point
FEWEST_ROUNDS, MOST_ROUNDS = 3, 30  # of each layout
LAYOUTS = 3  # times that everything is laid out anew in memory: how it lies is part of what a run finds
LONGEST_ROUND = 0.25  # of the budget, all methods once: the slowest are left out where they would take longer
MEMORY_SHARE = 0.4  # of what is free
CHECKED = 2e8  # multiply-adds of the check in float64, about; of a larger layer a part of the outputs is checked
MOST = {"d_in": 65536, "d_out": 65536, "rows": 1024, "length": 4096, "rank": 256, "adapters": 1024}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Setting:
    """What is measured. model, layer: a short name of `KNOWN_MODELS` and one of its layers; None for free widths."""

    shape: LayerShape
    dtype: str = "float32"
    model: str | None = None
    layer: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RequestError(f"there is no dtype {self.dtype!r} here: choose among {', '.join(DTYPES)}")
        for name, most in MOST.items():
            if (value := getattr(self.shape, name)) > most:
                raise RequestError(f"{name} may be {most} at most here, not {value}")

    @classmethod
    def of_model(cls, model: str, layer: str | None = None, dtype: str = "float32", seed: int = 0, **sizes: int) -> Setting:
        """A layer of a known model, by default its first. RequestError for one that is not known."""
        widths = model_layers(model)
        layer = layer or next(iter(widths))
        if layer not in widths:
            raise RequestError(f"{model} has no layer {layer!r}: choose among {', '.join(widths)}")
        d_in, d_out = widths[layer]
        return cls(LayerShape(d_in, d_out, **sizes), dtype, model, layer, seed)

    @property
    def name(self) -> str:
        """Such as "starcoder c_attn, 6144 → 6400"."""
        widths = f"{self.shape.d_in} → {self.shape.d_out}"
        return f"{self.model} {self.layer}, {widths}" if self.model else widths


def model_layers(model: str) -> dict[str, tuple[int, int]]:
    """Layer → (d_in, d_out) of a known model; RequestError for another."""
    if model not in KNOWN_MODELS:
        raise RequestError(f"there is no model {model!r} here: choose among {', '.join(KNOWN_MODELS)}, or give widths")
    return layer_widths(KNOWN_MODELS[model])


def command_line(setting: Setting, device: torch.device) -> str:
    """The `python -m profiling oplab …` that measures the same again, quoted for a shell."""
    shape, words = setting.shape, ["python", "-m", "profiling", "oplab"]
    if setting.model:
        words += ["--model", setting.model, "--layer", setting.layer]
    else:
        words += ["--d-in", str(shape.d_in), "--d-out", str(shape.d_out)]
    for name in ("rows", "length", "rank", "adapters"):
        words += [f"--{name}", str(getattr(shape, name))]
    words += ["--dtype", setting.dtype, *(["--seed", str(setting.seed)] if setting.seed else []), "--device", device.type]
    return shlex.join([*words, *(["--threads", str(torch.get_num_threads())] if device.type == "cpu" else [])])


@dataclass(frozen=True)
class MethodPoint:
    """What one method did. error: the largest against float64, as a share of the size of the terms; allowed: a few roundings.

    num_bytes, operations: what must move at least, and what is computed. bandwidth_share, matrix_share: of what was measured as the
    machine's limits. predicted: by `profiling.cost_model`; eq7_s: by the paper's Eq. 7, of the methods that it speaks of.
    """

    method: str
    form: str
    seconds: float
    low_s: float
    high_s: float
    quantiles: dict[str, float]
    ratio_to_base: Ratio | None
    ratio_to_first: Ratio | None
    error: float
    allowed: float
    num_bytes: float
    operations: float
    bandwidth_share: float
    matrix_share: float
    launched: str
    predicted: Prediction
    eq7_s: float | None

    @property
    def agrees(self) -> bool:
        return self.error <= self.allowed  # NaN agrees with nothing

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.operations / self.seconds

    @property
    def intensity(self) -> float:
        """Operations for each byte that must move."""
        return self.operations / self.num_bytes

    @property
    def prediction_error(self) -> float:
        """|predicted − measured| over measured."""
        return abs(self.predicted.seconds - self.seconds) / self.seconds


@dataclass(frozen=True)
class OpLabResult:
    """All that was found at a point. first: the method that the others are compared with; left_out: method → why."""

    setting: Setting
    first: str
    methods: dict[str, MethodPoint]
    left_out: dict[str, str]
    rounds: int
    layouts: int
    checked_outputs: int
    cached: bool
    costs: MachineCosts
    environment: dict
    command: str

    @property
    def contestants(self) -> dict[str, MethodPoint]:
        """The methods that serve adapters, each once: `flora` is one of its two forms."""
        return {name: point for name, point in self.methods.items() if name not in ("base", "flora")}

    @property
    def crossover(self) -> int | None:
        """The rank from which on bmm-LoRA is predicted to be faster than fLoRA."""
        return crossover(self.setting.shape, self.costs)

    @property
    def eq7_crossover(self) -> float:
        return eq7_crossover_of(self.setting.shape, self.costs)

    def to_rows(self) -> list[dict]:
        """A flat record per method, each with everything it was measured on."""
        shape, setting = self.setting.shape, self.setting
        shared = {
            "model": setting.model,
            "layer": setting.layer,
            "d_in": shape.d_in,
            "d_out": shape.d_out,
            "rows": shape.rows,
            "tokens": shape.length,
            "rank": shape.rank,
            "adapters": shape.adapters,
            "popularity": "distinct" if shape.adapters == shape.rows else "identical" if shape.adapters == 1 else "uniform",
            "dtype": setting.dtype,
            "seed": setting.seed,
            "rounds": self.rounds,
            "layouts": self.layouts,
            "cached": self.cached,
            "checked_outputs": self.checked_outputs,
            "first": self.first,
            "predicted_crossover": self.crossover,
            "eq7_crossover": None if math.isinf(self.eq7_crossover) else self.eq7_crossover,
            "copy_bytes_per_s": self.costs.copy_bytes_per_s,
            "matrix_flops_per_s": self.costs.matrix_flops_per_s,
            "hardware": self.environment,
            "command": self.command,
        }
        return [{"measures": "layer", "method": name, **_facts(point), **shared} for name, point in self.methods.items()]


def _facts(point: MethodPoint) -> dict:
    return {
        "form": point.form,
        "median_s": point.seconds,
        "median_low_s": point.low_s,
        "median_high_s": point.high_s,
        "quantiles": point.quantiles,
        "over_base": _ends(point.ratio_to_base),
        "over_first": _ends(point.ratio_to_first),
        "error": point.error if math.isfinite(point.error) else None,
        "allowed": point.allowed,
        "agrees": point.agrees,
        "bytes": point.num_bytes,
        "operations": point.operations,
        "bandwidth_share": point.bandwidth_share,
        "matrix_share": point.matrix_share,
        "launched": point.launched,
        "predicted_s": point.predicted.seconds,
        "predicted_bound": point.predicted.bound,
        "predicted_launches": point.predicted.launches,
        "eq7_s": point.eq7_s,
    }


def _ends(ratio: Ratio | None) -> list[float] | None:
    return None if ratio is None else [ratio.median, ratio.low, ratio.high]


# ------------------------------------------------------------------------------------------------------------- measure


def measure(
    setting: Setting,
    device: torch.device,
    costs: MachineCosts,
    methods: Sequence[str] = METHODS,
    command: str = "",
    budget_s: float = BUDGET_S,
    should_stop: Callable[[], bool] = lambda: False,
) -> OpLabResult | None:
    """Measure every method of `methods` that fits, in turn, for about `budget_s`; None where `should_stop` said so.

    Raises RequestError for a method that there is none of, and where the bare layer does not fit into memory or time.
    """
    methods = checked_methods(methods)
    kept, left_out = _that_fit(methods, setting, device, costs, budget_s)
    taken: dict[str, list[float]] = {method: [] for method in kept}
    groups: list[int] = []  # of each round, its layout
    cached = setting.shape.weight_numbers * costs.element_size <= costs.cached_weight_bytes
    rounds = Rounds(device, warmup=0, cold=not cached)
    problem = alone_on(device, partial(_problem, setting, device))
    errors, checked_outputs = alone_on(device, partial(_errors, problem, kept))
    started = time.perf_counter()
    for layout in range(LAYOUTS):
        if layout:
            problem = alone_on(device, problem.laid_out_anew)
        calls, launched = alone_on(device, partial(_calls, problem, kept, device))
        alone_on(device, partial(rounds.seconds, calls, 1))
        until, done = started + budget_s * (layout + 1) / LAYOUTS, 0
        while done < FEWEST_ROUNDS or (done < MOST_ROUNDS and time.perf_counter() < until):
            if should_stop():
                return None
            for method, seconds in alone_on(device, partial(rounds.seconds, calls, 1)).items():
                taken[method] += seconds
            groups.append(layout)
            done += 1
    first = next((method for method in kept if method != "base"), "base")
    points = {
        method: _point(method, setting, problem, costs, taken, groups, first, errors[method], launched[method]) for method in kept
    }
    facts = hardware.environment() | {"device": device.type, "device_name": hardware.device_name(device)}
    facts["implementation"] = backend.implementation(device.type)
    counts = (len(groups), LAYOUTS, checked_outputs, cached)
    return OpLabResult(setting, first, points, left_out, *counts, costs, facts, command)


def checked_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """The methods with `base` before them; RequestError for an unknown one."""
    for method in methods:
        if method not in METHODS:
            raise RequestError(f"the Op lab has no method {method!r}: choose among {', '.join(METHODS)}")
    return tuple(dict.fromkeys(("base", *methods)))


def _that_fit(
    methods: Sequence[str], setting: Setting, device: torch.device, costs: MachineCosts, budget_s: float
) -> tuple[list[str], dict[str, str]]:
    """The methods that are measured, and why others are not; RequestError where not even two are."""
    shape, size = setting.shape, costs.element_size
    weight_bytes = size * shape.weight_numbers
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    room = MEMORY_SHARE * free - 2 * weight_bytes  # two while it is laid out anew
    seconds = {method: predict(method, shape, costs).seconds for method in methods}
    left_out: dict[str, str] = {}
    for method in methods:
        needed = size * _numbers_held(predict(method, shape, costs).form, shape)
        if needed > room:
            left_out[method] = f"it would need {(needed + 2 * weight_bytes) / 2**30:.1f} GiB, more than may be used here"
    most_s = LONGEST_ROUND * budget_s
    while sum(seconds[method] for method in methods if method not in left_out) > most_s:
        slowest = max((method for method in methods if method not in left_out), key=seconds.__getitem__)
        left_out[slowest] = f"a call would take about {_duration(seconds[slowest])}"
    kept = [method for method in methods if method not in left_out]
    if "base" not in kept or len(kept) < min(2, len(methods)):
        why = next(iter(left_out.values()))
        raise RequestError(f"{setting.name} with {shape.tokens} tokens does not fit: {why}; take fewer tokens or a smaller layer")
    return kept, {method: left_out[method] for method in methods if method in left_out}


def _numbers_held(form: str, shape: LayerShape) -> int:
    """How many a form writes at most at a time, besides the layer's own."""
    numbers = shape.tokens * (shape.d_in + shape.d_out) + shape.rows * shape.rank * (shape.d_in + shape.d_out)
    if form == "flora-expand":
        return numbers + 2 * shape.tokens * shape.rank * (shape.d_in + shape.d_out)
    return numbers + (3 * shape.weight_numbers if form == "flora-modulate" else 0)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _problem(setting: Setting, device: torch.device) -> Problem:
    shape = setting.shape
    slots = [1 + row % shape.adapters for row in range(shape.rows)]
    ranks = [0, *[shape.rank] * shape.adapters]  # slot 0 is the identity
    sizes = (shape.length, shape.d_in, shape.d_out)
    return Problem(backend.kernels_on(device.type), device, setting.dtype, slots, *sizes, ranks, setting.seed)


def _calls(problem: Problem, methods: Sequence[str], device: torch.device) -> tuple[dict[str, Callable], dict[str, str]]:
    """Each method as a call to repeat, and how it is launched."""
    calls, launched = {}, {}
    for method in methods:
        calls[method], launched[method] = captured(problem.call_of(method), device)
    return calls, launched


def _errors(problem: Problem, methods: Sequence[str]) -> tuple[dict[str, float], int]:
    """The largest error of each method as a share of the size of its terms, and over how many outputs."""
    sample = _sample(problem)
    truths = {}
    errors = {}
    for method in methods:
        family = FAMILY[method]
        if family not in truths:
            truths[family] = problem.truth(family, *sample)
        truth, size = truths[family]
        y = problem.call_of(method)()[sample[0], sample[1]][..., sample[2]].double()
        errors[method] = ((y - truth).abs() / size.clamp_min(1e-300)).max().item()
    return errors, next(iter(truths.values()))[0].numel()


def _sample(problem: Problem) -> tuple[slice, slice, slice]:
    """Rows, tokens and outputs to check: as many as CHECKED allows, from all over."""
    rows, length, d_in = problem.x.shape
    sizes = [rows, length, problem.weight.shape[0]]
    kept = list(sizes)
    while math.prod(kept) * d_in * problem.A.shape[1] > CHECKED and max(kept) > 1:
        largest = kept.index(max(kept))
        kept[largest] = -(-kept[largest] // 2)
    return tuple(slice(None, None, -(-size // number)) for size, number in zip(sizes, kept, strict=True))


def _point(
    method: str,
    setting: Setting,
    problem: Problem,
    costs: MachineCosts,
    taken: Mapping[str, Sequence[float]],
    groups: Sequence[int],
    first: str,
    error: float,
    launched: str,
) -> MethodPoint:
    shape, seconds = setting.shape, median(taken[method])
    form = problem.computed_as(method)
    rank, adapters = (0, 1) if method == "base" else (shape.rank, shape.adapters)
    num_bytes, operations = work(form, shape.rows, shape.length, rank, adapters, shape.d_in, shape.d_out, costs.element_size)
    _, low_s, high_s = median_interval(taken[method], setting.seed, groups)
    over = [
        None if other == method else paired_ratio(taken[method], taken[other], setting.seed, groups) for other in ("base", first)
    ]
    return MethodPoint(
        method=method,
        form=form,
        seconds=seconds,
        low_s=low_s,
        high_s=high_s,
        quantiles=quantiles(taken[method]),
        ratio_to_base=over[0],
        ratio_to_first=over[1],
        error=error,
        allowed=TOLERANCE[problem.dtype],
        num_bytes=num_bytes,
        operations=operations,
        bandwidth_share=num_bytes / seconds / costs.copy_bytes_per_s,
        matrix_share=operations / seconds / costs.matrix_flops_per_s,
        launched=launched,
        predicted=predict(method, shape, costs, form),
        eq7_s=eq7(method, shape, costs),
    )
