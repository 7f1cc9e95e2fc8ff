"""What all kernels' wrappers need: tile sizes, how many programs fill the device, and checks of what is handed over."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, as set when they were defined (TRITON_INTERPRET=1): on a CPU, for tests."""


@dataclass(frozen=True)
class Config:
    """How a kernel cuts its work. split_k: programs that share one sum over d_in, or 0: as many as fill the device."""

    block_n: int  # outputs of a tile
    block_k: int  # inputs of a step
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3


def split_of(config: Config, num_programs: int, d_in: int, device: torch.device) -> int:
    """Into how many parts the sum over d_in is cut, so that `num_programs` tiles fill the device.

    A part has at least four steps: what each one writes must stay small beside what it reads.
    """
    if config.split_k:
        return config.split_k
    most = max(1, d_in // (4 * config.block_k))
    return max(1, min(8, most, num_processors(device) // max(1, num_programs)))


def part_width(config: Config, d_in: int, split_k: int) -> int:
    """Inputs of one part: whole steps."""
    return triton.cdiv(d_in, split_k * config.block_k) * config.block_k


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the interpreter, which has nothing to fill."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; an H100's for the interpreter, which has no such limit."""
    if device.type != "cuda":
        return 227 << 10
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


def stages_for(step: int, operands: int, most: int, device: torch.device) -> int:
    """How many steps along d_in may be under way at once, `most` at the most: each but one waits in shared memory.

    step: bytes that are loaded for one; operands: bytes of what is multiplied, which lies there too.
    """
    return max(1, min(most, 1 + (shared_memory(device) - operands) // step))


def device_of(x: Tensor) -> AbstractContextManager:
    """A context in which launches go to the device that x is on: Triton takes the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def product_dtype(dtype: torch.dtype) -> tl.dtype:
    """In which dtype tiles of `dtype` are multiplied; sums are always float32. The interpreter cannot multiply bfloat16."""
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else DTYPES[dtype]


def check_product(x: Tensor, weight: Tensor, scales: Tensor | None, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
    """ValueError where shapes, dtypes or layouts are none that the kernels read."""
    d_out, d_in = weight.shape
    if x.dtype not in DTYPES or x.shape[-1] != d_in or x.stride(-1) != 1:
        raise ValueError(f"x must be (…, {d_in}) of float16, bfloat16 or float32, tokens in one piece: {x.dtype} {tuple(x.shape)}")
    if (scales is None) != (weight.dtype == x.dtype) or (scales is not None and weight.dtype != torch.int8):
        raise ValueError(f"the weight must be {x.dtype}, or int8 with one scale for each output, not {weight.dtype}")
    if scales is not None and (scales.shape != (d_out,) or scales.dtype != torch.float32 or not scales.is_contiguous()):
        raise ValueError(f"int8 weights need ({d_out},) float32 scales, not {tuple(scales.shape)} {scales.dtype}")
    check_factors(A, B, d_in, d_out)
    if bias is not None and (bias.shape != (d_out,) or not bias.is_contiguous()):
        raise ValueError(f"the bias must be ({d_out},) in one piece, not {tuple(bias.shape)}")


def check_factors(A: Tensor, B: Tensor, d_in: int, d_out: int) -> None:
    """ValueError where A (slots, r, d_in) and B (slots, r, d_out) do not fit the layer, each other, or lie in pieces."""
    if A.shape[:2] != B.shape[:2] or A.shape[2] != d_in or B.shape[2] != d_out or A.dtype != B.dtype or A.dtype not in DTYPES:
        raise ValueError(f"factors {A.dtype} {tuple(A.shape)} and {B.dtype} {tuple(B.shape)} do not fit a {d_in} → {d_out} layer")
    if not (A.is_contiguous() and B.is_contiguous()):
        raise ValueError("factors must be contiguous: a kernel finds a component by its number")
