"""What 8-bit weights cost the way the paper served them: r-fold rows through an 8-bit layer that is a black box.

Where bitsandbytes is installed, that is its own layer. A stand-in, which needs nothing but PyTorch, is measured in any case:
the same work, step by step, without what bitsandbytes does for outliers.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from flora.layers import product_of
from flora.ops import expand_around
from profiling.problem import Problem

EIGHT_BIT = "flora-expand, bitsandbytes' layer"
STAND_IN = "flora-expand, rows quantised around torch._int_mm"
FEWEST_ROWS = 32  # of torch._int_mm, which takes no fewer than 17 on a GPU


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


def stand_in_call(problem: Problem) -> Callable[[], Tensor] | None:
    """The same by PyTorch alone: rows are quantised, multiplied in int8, and scaled back; None for a layer that is not int8."""
    if problem.scales is None:
        return None
    product = partial(quantised_product, problem.weight, problem.scales)
    return partial(expand_around, product, problem.x, problem.A, problem.B, problem.routing)


def quantised_product(weight: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    """x (…, d_in) @ weight.T for int8 weights (d_out, d_in) with scales (d_out,), weight · scale / 127 each.

    Each row of x becomes whole numbers from -127 to 127, with a scale of its own, as LLM.int8() has it (Dettmers et al., 2022).
    """
    rows = x.flatten(0, -2)  # (m, d_in)
    largest = rows.abs().amax(1, keepdim=True).float().clamp_min(1e-12)  # (m, 1)
    codes = (rows * (127.0 / largest)).round().to(torch.int8)
    padded = pad(codes, (0, 0, 0, max(0, FEWEST_ROWS - len(codes))))
    sums = torch._int_mm(padded, weight.T)[: len(codes)]  # (m, d_out) int32
    return (sums * (largest * scales / (127.0 * 127.0))).to(x.dtype).unflatten(0, x.shape[:-1])
