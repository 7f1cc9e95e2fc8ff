"""Many tokens per adapter: each tile of the weight is multiplied by its tile of Bᵀ A on its way into the product.

    y[i] = x[i] @ (weight ∘ (B[s_i]ᵀ A[s_i])).T + bias

A program has a tile of tokens that share an adapter (`flora.tiles.SegmentTiles`) and a tile of outputs. At each step along d_in a
small product over the rank makes the modulation of the weight's tile, in float32, and only the modulated tile is rounded to x's
dtype. Nothing of size d_out · d_in is written anywhere.

Traffic, t tokens in tiles of T, rank r rounded up to R = 16, 32, 64 …, element size e:
    from memory     d_in · d_out · e of the weight and t · d_in · e of x, more often where the cache does not hold them;
                    r · (d_in + d_out) · e for each adapter
    to memory       t · d_out · e
Multiply-adds: (T + R) · d_in · d_out for each tile of tokens: beside the product itself, R / T more.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from flora.kernels.choices import chosen, key_of
from flora.kernels.launch import Config, Launch, check_product, product_dtype, shared_memory, stages_for

TILES_TOGETHER = 8
"""Tiles of outputs whose programs run together, token tile by token tile, so that both x and the weight are found in the cache."""


@triton.jit(do_not_specialize=["num_tiles", "length", "rank_stride"])
def _modulate_kernel(
    # pointers
    x,
    weight,
    scales,
    A,
    B,
    bias,
    y,
    order_list,
    slot_list,
    rank_list,
    first_list,
    count_list,
    # sizes
    num_tiles,
    length,
    d_in,
    d_out,
    rank_stride,
    # strides
    x_row,
    x_token,
    weight_out,
    weight_in,
    # meta
    PRODUCT: tl.constexpr,
    MODULATION: tl.constexpr,
    IS_INT8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    program = tl.program_id(0)
    band = program // (TOGETHER * num_tiles)
    in_band = program % (TOGETHER * num_tiles)
    block = band * TOGETHER + in_band % TOGETHER
    tile = in_band // TOGETHER
    count = tl.load(count_list + tile)
    if (count == 0) | (block * BLOCK_N >= d_out):
        return
    slot = tl.load(slot_list + tile).to(tl.int64)
    rank = tl.load(rank_list + tile)

    places = tl.arange(0, BLOCK_M)
    is_used = places < count
    token = tl.load(first_list + tile) + places
    row = tl.load(order_list + token // length, is_used, 0).to(tl.int64)
    outputs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = outputs < d_out
    inputs = tl.arange(0, BLOCK_K)
    components = tl.arange(0, BLOCK_R)
    is_component = components < rank
    # The identity is one component of ones, which nobody has to read.
    absent = tl.where((components == 0) & (rank == 0), 1.0, 0.0)

    x_tile = x + (row * x_row + (token % length) * x_token)[:, None] + inputs[None, :]
    w_tile = weight + outputs.to(tl.int64)[None, :] * weight_out + inputs[:, None] * weight_in
    a_tile = A + (slot * rank_stride + components)[None, :] * d_in + inputs[:, None]
    b_tile = B + (slot * rank_stride + components)[:, None] * d_out + outputs[None, :]
    b_mask = is_component[:, None] & is_output[None, :]
    b = tl.where(b_mask, tl.load(b_tile, b_mask, 0.0).to(tl.float32), absent[:, None]).to(MODULATION)  # (R, outputs)
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for step in range(0, d_in, BLOCK_K):
        a_mask = is_component[None, :]
        x_mask, w_mask = is_used[:, None], is_output[None, :]
        if not EVEN:
            is_input = inputs + step < d_in
            a_mask = a_mask & is_input[:, None]
            x_mask, w_mask = x_mask & is_input[None, :], w_mask & is_input[:, None]
        a = tl.where(a_mask, tl.load(a_tile, a_mask, 0.0).to(tl.float32), absent[None, :]).to(MODULATION)  # (inputs, R)
        modulation = tl.dot(a, b, input_precision="ieee")  # (inputs, outputs)
        w = (tl.load(w_tile, w_mask, 0).to(tl.float32) * modulation).to(PRODUCT)
        total = tl.dot(tl.load(x_tile, x_mask, 0.0).to(PRODUCT), w, total, input_precision="ieee")
        x_tile += BLOCK_K
        w_tile += BLOCK_K * weight_in
        a_tile += BLOCK_K

    if IS_INT8:
        total *= tl.load(scales + outputs, is_output, 0.0)[None, :] * (1 / 127)
    if HAS_BIAS:
        total += tl.load(bias + outputs, is_output, 0.0).to(tl.float32)[None, :]
    y_tile = y + (row * length + token % length)[:, None] * d_out + outputs[None, :]
    tl.store(y_tile, total.to(y.dtype.element_ty), is_used[:, None] & is_output[None, :])


CANDIDATES = {
    16: (Config(128, 64, num_warps=4), Config(64, 128, num_warps=4), Config(64, 64, num_warps=4, resident=2)),
    32: (Config(128, 64, num_warps=4), Config(64, 128, num_warps=4), Config(64, 64, num_warps=4, resident=2)),
    64: (Config(128, 64, num_warps=8), Config(128, 64, num_warps=4, resident=2), Config(128, 32, num_warps=8)),
    128: (Config(128, 64, num_warps=8), Config(128, 32, num_warps=8), Config(64, 64, num_warps=8)),
    256: (Config(128, 64, num_warps=8), Config(128, 32, num_warps=8), Config(64, 64, num_warps=8)),
}
"""By the tokens of a tile, how a product of two bytes a number may be cut; the first, until `flora.kernels.tuning` has measured.
`num_stages` is as large as there is room for, 3 at the most."""


@cache
def configs_for(num_tokens: int, rank_tile: int, element_size: int, device: torch.device) -> tuple[Config, ...]:
    """The candidates for a tile of tokens, a rank and elements of x of so many bytes, the one to take unmeasured first."""
    if element_size == 4:
        return (Config(block_n=64, block_k=32, num_warps=8, num_stages=1),)
    found = []
    for config in CANDIDATES[num_tokens]:
        block_n, block_k = config.block_n, config.block_k
        step = (num_tokens + block_n + rank_tile) * block_k * element_size
        operands = (num_tokens * block_k + block_k * block_n + rank_tile * block_n) * element_size
        if operands <= shared_memory(device):
            found.append(replace(config, num_stages=stages_for(step, operands, 3, device, config.resident)))
    return tuple(found)


def launches(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    order: Tensor,
    slot: Tensor,
    rank: Tensor,
    first: Tensor,
    count: Tensor,
    num_tokens: int,
    rank_tile: int,
    config: Config | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, list[Launch]]:
    """What `modulate` returns, and the launch that fills it. device: which one it is for, where tensors are on none ("meta")."""
    check_product(x, weight, scales, A, B, bias)
    (n, length, d_in), d_out = x.shape, weight.shape[0]
    device = device or x.device
    y = x.new_empty(n, length, d_out)
    if not y.numel():
        return y, []
    if config is None:
        key = key_of("modulate", d_in, d_out, x.dtype, (num_tokens, rank_tile), weight)
        config = chosen(device, key, configs_for(num_tokens, rank_tile, x.element_size(), device))
    blocks = triton.cdiv(d_out, config.block_n)
    together = min(TILES_TOGETHER, blocks)
    product = Launch(
        _modulate_kernel,
        (triton.cdiv(blocks, together) * together * slot.shape[0],),
        (
            *(x, weight, scales, A, B, bias, y, order, slot, rank, first, count),
            *(slot.shape[0], length, d_in, d_out, A.shape[1]),
            *(x.stride(0), x.stride(1), *weight.stride()),
        ),
        {
            "PRODUCT": product_dtype(x.dtype),
            "MODULATION": product_dtype(A.dtype),
            "IS_INT8": scales is not None,
            "HAS_BIAS": bias is not None,
            "EVEN": d_in % config.block_k == 0,
            "TOGETHER": together,
            "BLOCK_M": num_tokens,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "BLOCK_R": rank_tile,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
    return y, [product]


def modulate(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    order: Tensor,
    slot: Tensor,
    rank: Tensor,
    first: Tensor,
    count: Tensor,
    num_tokens: int,
    rank_tile: int,
    config: Config | None = None,
) -> Tensor:
    """x (n, l, d_in), weight (d_out, d_in) of any strides, scales (d_out,) float32 for an int8 weight → (n, l, d_out), x's dtype.

    order … rank_tile: `flora.tiles.SegmentTiles` for rows of l tokens.
    """
    y, filling = launches(x, weight, scales, A, B, bias, order, slot, rank, first, count, num_tokens, rank_tile, config)
    for launch in filling:
        launch.run()
    return y
