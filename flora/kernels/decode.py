"""One token per row: every component of every row against one read of the weight, in one launch.

    y[i] = Σ_k B[s_i,k] ∘ ((A[s_i,k] ∘ x[i]) @ weight.T) + bias

The rows of the product are places: one for each component of each row (`flora.tiles.ExpandedTiles`). A program has one tile of
places and one of outputs. It walks along d_in, forms A_k ∘ x for its places as it goes, multiplies with the weight's tile, and at
the end scales by B_k, sums each row's places, and adds the bias. An int8 weight (bitsandbytes' layout: CB and the row scales SCB)
becomes floating point in registers; its scale belongs to an output, and is applied at the end.

Traffic, n rows, m places, element size e:
    from memory     d_in · d_out · e of the weight, once where m ≤ 128; A and B of the batch's adapters, m · (d_in + d_out) · e
    from the cache  for each tile of outputs, m · d_in · 2e again: the places' x and A. A tile of outputs as wide as that of places
                    reads twice as much from the cache as from memory
    to memory       n · d_out · e; where the sum is cut in s parts, s · n · d_out · 4 more, written and read
Multiply-adds: m · d_in · d_out for the product, and for the sums 32 · m · d_out or fewer beside d_in · m · d_out.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from flora.kernels.choices import chosen, key_of
from flora.kernels.launch import Config, Launch, check_product, part_width, product_dtype, shared_memory, split_of, stages_for

REDUCED_AT_ONCE = 1024

SUMMED_BYTES = 4
"""Shared memory that summing each row's places takes, for each place and output of a tile, at the most."""


@triton.jit(do_not_specialize=["n"])
def _decode_kernel(
    # pointers
    x,
    weight,
    scales,
    A,
    B,
    bias,
    y,
    row_list,
    component_list,
    owner_list,
    tile_row_list,
    # sizes
    n,
    d_in,
    d_out,
    part,
    # strides
    x_row,
    weight_out,
    weight_in,
    # meta
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMMED: tl.constexpr,
    IS_INT8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(2)  # tiles of places are neighbours: the weight's tile is still in the cache
    if tl.load(row_list + tile * BLOCK_M) < 0:
        return
    places = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(row_list + places)
    component = tl.load(component_list + places)
    is_used, is_scaled = row >= 0, component >= 0
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = outputs < d_out
    inputs = split * part + tl.arange(0, BLOCK_K)

    x_tile = x + row.to(tl.int64)[:, None] * x_row + inputs[None, :]
    a_tile = A + component.to(tl.int64)[:, None] * d_in + inputs[None, :]
    w_tile = weight + outputs.to(tl.int64)[None, :] * weight_out + inputs[:, None] * weight_in
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for step in range(0, part, BLOCK_K):
        if EVEN:
            x_mask, a_mask, w_mask = is_used[:, None], is_scaled[:, None], is_output[None, :]
        else:
            is_input = inputs + step < d_in
            x_mask, a_mask = is_used[:, None] & is_input[None, :], is_scaled[:, None] & is_input[None, :]
            w_mask = is_output[None, :] & is_input[:, None]
        scaled = tl.load(x_tile, x_mask, 0.0).to(tl.float32) * tl.load(a_tile, a_mask, 1.0).to(tl.float32)
        w = tl.load(w_tile, w_mask, 0)
        total = tl.dot(scaled.to(PRODUCT), w.to(PRODUCT), total, input_precision=PRECISION)
        x_tile += BLOCK_K
        a_tile += BLOCK_K
        w_tile += BLOCK_K * weight_in

    b_tile = B + component.to(tl.int64)[:, None] * d_out + outputs[None, :]
    total *= tl.load(b_tile, is_scaled[:, None] & is_output[None, :], 1.0).to(tl.float32)
    if IS_INT8:
        total *= tl.load(scales + outputs, is_output, 0.0)[None, :] * (1 / 127)
    if NUM_ROWS > 0:
        # Each row's places are summed by a product with ones and zeros. A number that is not finite would spoil its neighbours
        # there, 0 · ∞: it is counted apart, and only its own row is spoilt. A float32 is the sum of three bfloat16, each what those
        # before it leave; what only the first would round to ∞ counts as not finite.
        owner = tl.load(owner_list + places)
        is_own = (owner[:, None] == tl.arange(0, NUM_ROWS)[None, :]).to(SUMMED)  # (places, rows)
        is_finite = tl.abs(total) < 3.389e38
        num_broken = tl.dot(tl.trans(tl.where(is_finite, 0.0, 1.0).to(SUMMED)), is_own, input_precision="ieee")
        rest = tl.where(is_finite, total, 0.0)
        summed = tl.full((BLOCK_N, NUM_ROWS), 0.0, tl.float32)
        for _ in range(3):
            piece = rest.to(tl.bfloat16)
            summed = tl.dot(tl.trans(piece.to(SUMMED)), is_own, summed, input_precision="ieee")
            rest -= piece.to(tl.float32)
        total = tl.trans(tl.where(num_broken > 0, float("nan"), summed))
        row = tl.load(tile_row_list + tile * NUM_ROWS + tl.arange(0, NUM_ROWS))
    y_tile = (split * n + row.to(tl.int64))[:, None] * d_out + outputs[None, :]
    y_mask = (row >= 0)[:, None] & is_output[None, :]
    if HAS_BIAS:
        total += tl.load(bias + outputs, is_output, 0.0).to(tl.float32)[None, :]
    tl.store(y + y_tile, total.to(y.dtype.element_ty), y_mask)


@triton.jit
def _sum_parts_kernel(
    # pointers
    parts,
    bias,
    y,
    # sizes
    size,
    d_out,
    # meta
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_used = places < size
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for split in tl.static_range(SPLIT_K):  # always in this order: the same answer every time
        total += tl.load(parts + split * size + places, is_used, 0.0)
    if HAS_BIAS:
        total += tl.load(bias + places % d_out, is_used, 0.0).to(tl.float32)
    tl.store(y + places, total.to(y.dtype.element_ty), is_used)


CANDIDATES = {
    16: (Config(64, 128, 0, 4, resident=2), Config(32, 128, 0, 4, resident=2), Config(128, 64, 0, 4, resident=2)),
    32: (Config(64, 128, 0, 4, resident=2), Config(128, 64, 0, 4, resident=2), Config(64, 128, 0, 4)),
    64: (Config(256, 64, 0, 8), Config(128, 64, 0, 8), Config(128, 64, 0, 4, resident=2)),
    128: (Config(128, 64, 0, 8), Config(256, 64, 0, 8), Config(128, 64, 0, 8, resident=2)),
}
"""By the places of a tile, how a product of two bytes a number may be cut; the first, until `flora.kernels.tuning` has measured.

The more places there are, the wider should a tile of outputs be, so that x and A are read from the cache as much less often; but
256 outputs of 128 places leave no registers for the sums of rows. `num_stages` is as large as there is room for."""


@cache
def configs_for(num_places: int, element_size: int, device: torch.device) -> tuple[Config, ...]:
    """The candidates for a tile of so many places and elements of x of so many bytes, the one to take unmeasured first."""
    if element_size == 4:
        return (Config(block_n=64, block_k=32, split_k=0, num_warps=8, num_stages=1),)
    found = []
    for config in CANDIDATES[num_places]:
        step = (2 * num_places + config.block_n) * config.block_k * element_size
        operands = (num_places + config.block_n) * config.block_k * element_size
        if max(operands, num_places * config.block_n * SUMMED_BYTES) <= shared_memory(device):
            found.append(replace(config, num_stages=stages_for(step, operands, 4, device, config.resident)))
    return tuple(found)


def launches(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    row: Tensor,
    component: Tensor,
    owner: Tensor,
    tile_row: Tensor,
    num_tiles: int,
    config: Config | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, list[Launch]]:
    """What `decode` returns, and the launches that fill it. device: which one they are for, where tensors are on none ("meta")."""
    check_product(x, weight, scales, A, B, bias)
    (n, d_in), d_out = x.shape, weight.shape[0]
    device = device or x.device
    y = x.new_empty(n, d_out)
    if not y.numel():
        return y, []
    num_places, num_rows = row.shape[0] // num_tiles, tile_row.shape[0] // num_tiles
    if config is None:
        key = key_of("decode", d_in, d_out, x.dtype, (num_places,), weight)
        config = chosen(device, key, configs_for(num_places, x.element_size(), device))
    blocks = triton.cdiv(d_out, config.block_n)
    split_k = split_of(config, num_tiles * blocks, d_in, device, most=8, fewest_steps=4)
    part = part_width(config, d_in, split_k)
    target, target_bias = y, bias
    if split_k > 1:  # the bias is added to the sum of the parts
        target, target_bias = x.new_empty((split_k, n, d_out), dtype=torch.float32), None
    product = Launch(
        _decode_kernel,
        (num_tiles, blocks, split_k),
        (
            *(x, weight, scales, A, B, target_bias, target, row, component, owner, tile_row),
            *(n, d_in, d_out, part),
            *(x.stride(0), *weight.stride()),
        ),
        {
            "PRODUCT": product_dtype(x.dtype),
            "PRECISION": "ieee",
            "SUMMED": product_dtype(torch.bfloat16),
            "IS_INT8": scales is not None,
            "HAS_BIAS": target_bias is not None,
            "EVEN": part * split_k == d_in,
            "NUM_ROWS": num_rows,
            "BLOCK_M": num_places,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
    if split_k == 1:
        return y, [product]
    summed = Launch(
        _sum_parts_kernel,
        (triton.cdiv(y.numel(), REDUCED_AT_ONCE),),
        (target, bias, y, y.numel(), d_out),
        {"HAS_BIAS": bias is not None, "SPLIT_K": split_k, "BLOCK": REDUCED_AT_ONCE},
    )
    return y, [product, summed]


def decode(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    row: Tensor,
    component: Tensor,
    owner: Tensor,
    tile_row: Tensor,
    num_tiles: int,
    config: Config | None = None,
) -> Tensor:
    """x (n, d_in), weight (d_out, d_in) of any strides, scales (d_out,) float32 for an int8 weight → (n, d_out), x's dtype.

    row … tile_row: the lists of `flora.tiles.ExpandedTiles`. Every row must be in them: what is not is not written.
    """
    y, filling = launches(x, weight, scales, A, B, bias, row, component, owner, tile_row, num_tiles, config)
    for launch in filling:
        launch.run()
    return y
