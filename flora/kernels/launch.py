"""What all kernels' wrappers need: launches, tile sizes, how many programs fill the device, checks of what is handed over.

What Triton compiles a kernel anew for, besides types and what is `constexpr`: a number that is 1 or divisible by 16, and a pointer
to 16 bytes. So numbers that follow from the batch are marked `do_not_specialize`, lists start at 16 bytes (`flora.tiles`), and sums
are cut in a power of two of parts: a batch like none before is then served by what is compiled already. Sizes of the layer, and
`part`, which is whole steps, are not so marked: that they are divisible is what loads of 16 bytes at once follow from.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

RESERVED = 1 << 10
"""Bytes of shared memory that the system takes of each program's."""

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
    resident: int = 1  # programs that a processor has room for at once: so many fill it


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that it is launched with."""

    kernel: Any  # triton.JITFunction, or what the interpreter has in its place
    grid: tuple[int, ...]
    arguments: tuple
    meta: dict

    def run(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.meta)

    def compile(self) -> None:
        """For the current device, unless that was done before. Nothing is read: tensors may be on PyTorch's device "meta"."""
        self.kernel.warmup(*self.arguments, grid=self.grid, **self.meta)


def split_of(config: Config, num_programs: int, d_in: int, device: torch.device, most: int, fewest_steps: int) -> int:
    """Into how many parts the sum over d_in is cut, so that `num_programs` tiles fill the device: a power of two, at most `most`.

    A part has at least `fewest_steps`: what each one writes must stay small beside what it reads. All have equally many, where
    d_in is whole steps: then no load needs a mask.
    """
    if config.split_k:
        return config.split_k
    steps, rest = triton.cdiv(d_in, config.block_k), d_in % config.block_k
    wanted = min(most, steps // fewest_steps, config.resident * num_processors(device) // max(1, num_programs))
    split_k = 1
    while 2 * split_k <= wanted and (rest or steps % (2 * split_k) == 0):
        split_k *= 2
    return split_k


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


def stages_for(step: int, operands: int, most: int, device: torch.device, resident: int = 1) -> int:
    """How many steps along d_in may be under way at once, `most` at the most: each but one waits in shared memory.

    step: bytes that are loaded for one; operands: bytes of what is multiplied, which lies there too; resident: programs that share
    the memory, of which the system takes a KiB for each.
    """
    room = (shared_memory(device) + RESERVED) // resident - RESERVED
    return max(1, min(most, 1 + (room - operands) // step))


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
