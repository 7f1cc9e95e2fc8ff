"""LoRA's two products for a mixed batch, segment by segment inside the kernels, as Punica, S-LoRA and vLLM do it.

    y[i] += (x[i] @ A[s_i].T) @ B[s_i]

Two launches. *Shrink*: a program has at most 16 tokens of one adapter and a part of d_in; what comes out, (parts, tokens, r), is
float32, in adapter order. *Expand*: a program has the same tokens and a tile of outputs; it sums the parts, multiplies, and adds to
y where it stands. Neither x nor A nor B is copied: rows are found through their numbers.

Traffic, t tokens in tiles of 16, rank r, s parts of d_in, element size e:
    shrink    t · d_in · e of x and r · d_in · e for each tile read, s · t · r · 4 written
    expand    s · t · r · 4 for each tile of outputs (from the cache) and r · d_out · e for each tile read, t · d_out · 2e for y
Multiply-adds: t · r · (d_in + d_out), r rounded up to 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flora.kernels.choices import chosen, key_of
from flora.kernels.launch import Config, Launch, check_factors, part_width, product_dtype, split_of

TILE = 16
"""Tokens of a tile."""

MOST_PARTS = 64
"""Of the sum over d_in: as many as vLLM has for small batches. A tile is narrow: without them, few programs would read all of A."""

CANDIDATES = (
    (Config(block_n=0, block_k=128, split_k=0, num_warps=4, resident=2), Config(block_n=128, block_k=0, num_warps=4, num_stages=2)),
    (Config(block_n=0, block_k=64, split_k=0, num_warps=4, resident=2), Config(block_n=128, block_k=0, num_warps=4, num_stages=2)),
    (Config(block_n=0, block_k=256, split_k=0, num_warps=4, resident=1), Config(block_n=64, block_k=0, num_warps=2, num_stages=2)),
    (Config(block_n=0, block_k=128, split_k=0, num_warps=4, resident=4), Config(block_n=256, block_k=0, num_warps=4, num_stages=2)),
)
"""How shrink and expand may cut their work; the first, until `flora.kernels.tuning` has measured them."""


@triton.jit(do_not_specialize=["num_tokens", "length", "rank_stride"])
def _shrink_kernel(
    # pointers
    x,
    A,
    shrunk,
    order_list,
    slot_list,
    rank_list,
    first_list,
    count_list,
    # sizes
    num_tokens,
    length,
    d_in,
    part,
    rank_stride,
    # strides
    x_row,
    x_token,
    # meta
    PRODUCT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    count, rank = tl.load(count_list + tile), tl.load(rank_list + tile)
    if (count == 0) | (rank == 0):
        return
    slot = tl.load(slot_list + tile).to(tl.int64)
    places = tl.arange(0, BLOCK_M)
    is_used = places < count
    token = tl.load(first_list + tile) + places
    row = tl.load(order_list + token // length, is_used, 0).to(tl.int64)
    components = tl.arange(0, BLOCK_R)
    is_component = components < rank
    inputs = split * part + tl.arange(0, BLOCK_K)

    x_tile = x + (row * x_row + (token % length) * x_token)[:, None] + inputs[None, :]
    a_tile = A + (slot * rank_stride + components)[None, :] * d_in + inputs[:, None]
    total = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)
    for step in range(0, part, BLOCK_K):
        x_mask, a_mask = is_used[:, None], is_component[None, :]
        if not EVEN:
            is_input = inputs + step < d_in
            x_mask, a_mask = x_mask & is_input[None, :], a_mask & is_input[:, None]
        values, a = tl.load(x_tile, x_mask, 0.0), tl.load(a_tile, a_mask, 0.0)
        total = tl.dot(values.to(PRODUCT), a.to(PRODUCT), total, input_precision="ieee")
        x_tile += BLOCK_K
        a_tile += BLOCK_K
    target = shrunk + (split * num_tokens + token).to(tl.int64)[:, None] * BLOCK_R + components[None, :]
    tl.store(target, total, is_used[:, None])


@triton.jit(do_not_specialize=["num_tokens", "length", "rank_stride"])
def _expand_kernel(
    # pointers
    shrunk,
    B,
    y,
    order_list,
    slot_list,
    rank_list,
    first_list,
    count_list,
    # sizes
    num_tokens,
    length,
    d_out,
    rank_stride,
    # meta
    PRODUCT: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    count, rank = tl.load(count_list + tile), tl.load(rank_list + tile)
    if (count == 0) | (rank == 0):
        return
    slot = tl.load(slot_list + tile).to(tl.int64)
    places = tl.arange(0, BLOCK_M)
    is_used = places < count
    token = tl.load(first_list + tile) + places
    row = tl.load(order_list + token // length, is_used, 0).to(tl.int64)
    components = tl.arange(0, BLOCK_R)
    outputs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = outputs < d_out

    total = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)
    for split in tl.static_range(SPLIT_K):  # always in this order: the same answer every time
        source = shrunk + (split * num_tokens + token).to(tl.int64)[:, None] * BLOCK_R + components[None, :]
        total += tl.load(source, is_used[:, None], 0.0)
    b_tile = B + (slot * rank_stride + components)[:, None] * d_out + outputs[None, :]
    b = tl.load(b_tile, (components < rank)[:, None] & is_output[None, :], 0.0)
    added = tl.dot(total.to(PRODUCT), b.to(PRODUCT), input_precision="ieee")
    y_tile = y + (row * length + token % length)[:, None] * d_out + outputs[None, :]
    y_mask = is_used[:, None] & is_output[None, :]
    tl.store(y_tile, (tl.load(y_tile, y_mask, 0.0).to(tl.float32) + added).to(y.dtype.element_ty), y_mask)


def configs_for(element_size: int) -> tuple[tuple[Config, Config], ...]:
    """The candidates for elements of x of so many bytes, the one to take unmeasured first."""
    return CANDIDATES if element_size < 4 else CANDIDATES[:1]


def launches(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    order: Tensor,
    slot: Tensor,
    rank: Tensor,
    first: Tensor,
    count: Tensor,
    rank_tile: int,
    config: tuple[Config, Config] | None = None,
    device: torch.device | None = None,
) -> list[Launch]:
    """Those that add to y. device: which one they are for, where tensors are on none ("meta")."""
    (n, length, d_in), d_out = x.shape, y.shape[-1]
    device = device or x.device
    check_factors(A, B, d_in, d_out)
    if y.shape[:2] != x.shape[:2] or y.dtype != x.dtype or not y.is_contiguous() or x.stride(-1) != 1:
        raise ValueError(f"y {y.dtype} {tuple(y.shape)} must be contiguous and have the rows and the dtype of x {tuple(x.shape)}")
    if not y.numel() or not d_in:
        return []
    if config is None:
        key = key_of("sgmv", d_in, d_out, x.dtype, (TILE, rank_tile))
        config = chosen(device, key, configs_for(x.element_size()))
    shrink, expand = config
    num_tiles = slot.shape[0]
    split_k = split_of(shrink, num_tiles, d_in, device, most=MOST_PARTS, fewest_steps=1)
    part = part_width(shrink, d_in, split_k)
    shrunk = x.new_empty((split_k, n * length, rank_tile), dtype=torch.float32)
    first_launch = Launch(
        _shrink_kernel,
        (num_tiles, split_k),
        (
            *(x, A, shrunk, order, slot, rank, first, count),
            *(n * length, length, d_in, part, A.shape[1]),
            *(x.stride(0), x.stride(1)),
        ),
        {
            "PRODUCT": product_dtype(x.dtype),
            "EVEN": part * split_k == d_in,
            "BLOCK_M": TILE,
            "BLOCK_K": shrink.block_k,
            "BLOCK_R": rank_tile,
            "num_warps": shrink.num_warps,
            "num_stages": shrink.num_stages,
        },
    )
    second_launch = Launch(
        _expand_kernel,
        (num_tiles, triton.cdiv(d_out, expand.block_n)),
        (shrunk, B, y, order, slot, rank, first, count, n * length, length, d_out, A.shape[1]),
        {
            "PRODUCT": product_dtype(x.dtype),
            "SPLIT_K": split_k,
            "BLOCK_M": TILE,
            "BLOCK_N": expand.block_n,
            "BLOCK_R": rank_tile,
            "num_warps": expand.num_warps,
            "num_stages": expand.num_stages,
        },
    )
    return [first_launch, second_launch]


def sgmv_add_(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    order: Tensor,
    slot: Tensor,
    rank: Tensor,
    first: Tensor,
    count: Tensor,
    rank_tile: int,
    config: tuple[Config, Config] | None = None,
) -> None:
    """Add, in place, to y (n, l, d_out) what the adapters make of x (n, l, d_in). y and x have one dtype.

    order … rank_tile: `flora.tiles.SegmentTiles` of 16 tokens for rows of l tokens.
    """
    for launch in launches(y, x, A, B, order, slot, rank, first, count, rank_tile, config):
        launch.run()
