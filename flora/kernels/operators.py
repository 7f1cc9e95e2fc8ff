"""The kernels as PyTorch operators, which torch.compile and CUDA graphs take: `torch.ops.flora.decode`, `.modulate`, `.sgmv_add_`.

No operator waits for the device, and no shape depends on what a tensor holds: all that varies comes in as numbers from the host.
"""

from __future__ import annotations

from torch import Tensor
from torch.library import custom_op

from flora.kernels import decode as decode_kernel
from flora.kernels import modulate as modulate_kernel
from flora.kernels import sgmv as sgmv_kernel
from flora.kernels.launch import device_of


@custom_op("flora::decode", mutates_args=())
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
) -> Tensor:
    """x (n, d_in) → (n, d_out), as `flora.kernels.decode.decode`."""
    with device_of(x):
        return decode_kernel.decode(x, weight, scales, A, B, bias, row, component, owner, tile_row, num_tiles)


@decode.register_fake
def _(x, weight, scales, A, B, bias, row, component, owner, tile_row, num_tiles):
    return x.new_empty(x.shape[0], weight.shape[0])


@custom_op("flora::modulate", mutates_args=())
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
) -> Tensor:
    """x (n, l, d_in) → (n, l, d_out), as `flora.kernels.modulate.modulate`."""
    with device_of(x):
        return modulate_kernel.modulate(x, weight, scales, A, B, bias, order, slot, rank, first, count, num_tokens, rank_tile)


@modulate.register_fake
def _(x, weight, scales, A, B, bias, order, slot, rank, first, count, num_tokens, rank_tile):
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[0])


@custom_op("flora::sgmv_add_", mutates_args=("y",))
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
) -> None:
    """Adds to y (n, l, d_out) in place, as `flora.kernels.sgmv.sgmv_add_`."""
    with device_of(x):
        sgmv_kernel.sgmv_add_(y, x, A, B, order, slot, rank, first, count, rank_tile)


@sgmv_add_.register_fake
def _(y, x, A, B, order, slot, rank, first, count, rank_tile):
    return None
