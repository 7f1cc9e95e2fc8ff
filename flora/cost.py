"""What each method costs, before it runs: multiply-adds and bytes, the paper's Eq. 7, and which of fLoRA's exact forms is cheaper.

For rows that share one adapter of rank r, t tokens in all, and a layer of d_in × d_out (two exact forms):

    expand     r · t · d_in · d_out multiply-adds, one read of the weight
    modulate   (r + t) · d_in · d_out multiply-adds, and weight ∘ (Bᵀ A) is formed in memory: the product Bᵀ A is written and read,
               the weight is read, the modulated weight is written and read again by the product: 5 passes over it

The common factor d_in · d_out drops out: what decides is rows, rank, and how many multiply-adds the machine does per byte moved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

MULTIPLY_ADDS_PER_BYTE = {("cpu", 4): 3.0, ("cpu", 2): 40.0, ("cuda", 4): 8.0, ("cuda", 2): 40.0}
"""Multiply-adds a device does in the time it moves one byte to or from memory, by bytes of a weight: the balance of its roofline.
cpu: read off `python -m profiling forms` on server cores of two makers with AVX-512 (float32) and on one with AMX (bfloat16);
cuda: from data sheets (float32 without TF32; half precision at a tenth of an H100's dense peak, as small products reach), to be
replaced by a measurement."""

MODULATE_PASSES = 5

KERNEL_TILE = 16
"""Tokens, and components, of the smallest product that tensor cores take: what the kernels round up to."""

MODULATED_TOKENS = 256
"""Tokens that share one modulated tile of the weight in the kernel, at most."""


def multiply_adds(form: str, tokens: int, rank: int, d_in: int, d_out: int) -> int:
    """Multiply-adds of one adapter's rows (tokens in all) in one layer, by form; rank 0 is the bare layer."""
    if rank == 0 or form == "base":
        return tokens * d_in * d_out
    if form == "flora-expand":
        return rank * tokens * d_in * d_out + rank * tokens * (d_in + d_out)
    if form == "flora-modulate":
        return (rank + tokens) * d_in * d_out
    if form in ("bmm-lora", "loop-lora", "sgmv-lora"):
        return tokens * d_in * d_out + rank * tokens * (d_in + d_out)
    raise KeyError(form)


def work(
    form: str,
    rows: int,
    length: int,
    rank: int,
    adapters: int,
    d_in: int,
    d_out: int,
    element_size: int,
    weight_element_size: int | None = None,
) -> tuple[float, float]:
    """Bytes that must move at least, and operations (multiplications and additions), of one call of one layer.

    rows of `length` tokens each, adapters distinct ones of one rank among them; form: as `multiply_adds` takes it. What must move
    is the weight, the input, the output and the adapters' factors, each once; what a form writes and reads again is its own.
    """
    num_bytes = d_in * d_out * (weight_element_size or element_size)
    num_bytes += element_size * (rows * length + adapters * rank) * (d_in + d_out)
    each, one_more = divmod(rows, adapters)  # rows of an adapter; so many have one more
    multiplied = one_more * multiply_adds(form, (each + 1) * length, rank, d_in, d_out)
    multiplied += (adapters - one_more) * multiply_adds(form, each * length, rank, d_in, d_out)
    return float(num_bytes), 2.0 * multiplied


def eq7_seconds(method: str, tokens: int, rank: int, d_in: int, d_out: int, c1: float, c2: float) -> float:
    """Seconds of "flora" or "bmm-lora" by the paper's Eq. 7. c2: of a multiply-add of the shared product, c1: of one of bmm.

    With d_in = d_out = d: c2 · r · tokens · d² and 2 · c1 · d · tokens · r + c2 · tokens · d².
    """
    if method == "flora":
        return c2 * rank * tokens * d_in * d_out
    if method == "bmm-lora":
        return c1 * (d_in + d_out) * tokens * rank + c2 * tokens * d_in * d_out
    raise KeyError(method)


def eq7_crossover(d_in: int, d_out: int, c1: float, c2: float) -> float:
    """The rank at which both cost the same by Eq. 7, 2 · c1 / (d · c2) + 1 / r = 1; infinite where fLoRA is always cheaper."""
    saved = c1 * (d_in + d_out) / (c2 * d_in * d_out)
    return 1 / (1 - saved) if saved < 1 else math.inf


def cheaper_form(tokens_and_ranks: Iterable[tuple[int, int]], element_size: int, device_type: str) -> str:
    """ "flora-expand" or "flora-modulate": the form with the lower estimate for one call.

    tokens_and_ranks: for every adapter in the batch, its tokens (rows · length) and its rank (0: identity).
    element_size: bytes of one weight. device_type: "cpu" or "cuda". Costs are in multiply-adds per element of the weight.
    """
    balance = MULTIPLY_ADDS_PER_BYTE["cuda" if device_type == "cuda" else "cpu", 4 if element_size >= 4 else 2]
    expand = modulate = 0.0
    for tokens, rank in tokens_and_ranks:
        expand += max(1, rank) * tokens
        modulate += tokens if rank == 0 else rank + tokens + MODULATE_PASSES * element_size * balance
    return "flora-modulate" if modulate < expand else "flora-expand"


def cheaper_kernel(tokens_and_ranks: Iterable[tuple[int, int]]) -> str:
    """ "flora-expand" or "flora-modulate": the kernel with fewer multiply-adds for one call.

    Neither forms anything in memory, and both read the weight once: arithmetic is what they differ in. tokens_and_ranks: as
    `cheaper_form`. Expanded components of all adapters share tiles; an adapter that is modulated has tiles of its own.
    """
    expand = modulate = 0
    for tokens, rank in tokens_and_ranks:
        expand += max(1, rank) * tokens
        modulate += _in_tiles(tokens) + _in_tiles(max(1, rank)) * -(-tokens // MODULATED_TOKENS)
    return "flora-modulate" if modulate < expand else "flora-expand"


def _in_tiles(number: int) -> int:
    return -(-number // KERNEL_TILE) * KERNEL_TILE
