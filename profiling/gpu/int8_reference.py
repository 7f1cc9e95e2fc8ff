"""What 8-bit weights cost the way the paper served them: r-fold rows through bitsandbytes' own layer, where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from types import ModuleType

from torch import Tensor

from flora.layers import product_of
from flora.ops import expand_around
from profiling.problem import Problem

EIGHT_BIT = "flora-expand, bitsandbytes' layer"


def bitsandbytes() -> ModuleType | None:
    """The package's layers, None where it is not installed."""
    return None if importlib.util.find_spec("bitsandbytes") is None else importlib.import_module("bitsandbytes.nn")


def eight_bit_call(problem: Problem) -> Callable[[], Tensor] | None:
    """The problem's int8 layer as bitsandbytes computes it, in the expanded form; None for any other, and without the package."""
    layers = bitsandbytes() if problem.scales is not None else None
    if layers is None:
        return None
    d_out, d_in = problem.weight.shape
    layer = layers.Linear8bitLt(d_in, d_out, bias=False, has_fp16_weights=False, device="meta")
    codes, scales = problem.weight, problem.scales
    layer.weight = layers.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    return partial(expand_around, partial(product_of, layer), problem.x, problem.A, problem.B, problem.routing)
