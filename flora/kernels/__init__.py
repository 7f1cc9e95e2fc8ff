"""Triton's kernels behind the methods of `flora.ops`, for serving: no gradients. `flora.backend` says when they are used.

    flora, flora-expand    one token per row: `decode`, one launch
    flora, flora-modulate  more of them: `modulate`, one launch
    sgmv-lora              `sgmv`, two launches beside the layer's own product

What no kernel is made for (`form_of` is None) is served by PyTorch's own products: several tokens per row in the expanded form, and
ranks above 128.

`flora.kernels.tuning` measures which tiles are fastest on a GPU; `flora.kernels.compilation` compiles ahead and counts what was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from functools import cache

from torch import Tensor
from torch.nn.functional import linear

from flora.kernels import operators
from flora.kernels.sgmv import TILE
from flora.routing import Routing
from flora.tiles import MAX_PLACES, ExpandedTiles, SegmentTiles

logger = logging.getLogger(__name__)

METHODS = ("flora", "flora-expand", "flora-modulate", "sgmv-lora")
"""Those that have kernels."""


@cache
def _tell_of_rank() -> None:
    """Once: what is slow for this reason should not be taken for the kernels' speed."""
    logger.warning(f"adapters of a rank above {MAX_PLACES} are served by PyTorch's own products, not by the Triton kernels")


def form_of(method: str, length: int, routing: Routing, has_matrix: bool = True) -> str | None:
    """Which kernel serves rows of `length` tokens: "decode", "modulate", "sgmv", or None where none does.

    has_matrix: whether kernels can read the layer's weight; where only the layer itself knows it, there is just "sgmv".
    """
    if method not in METHODS or not (has_matrix or method == "sgmv-lora"):
        return None
    if routing.max_rank > MAX_PLACES:
        _tell_of_rank()
        return None
    if method == "sgmv-lora":
        return "sgmv"
    if method == "flora-modulate" or (method == "flora" and routing.cheaper_kernel(length) == "flora-modulate"):
        return "modulate"
    return "decode" if length == 1 else None


def serve(
    form: str,
    x: Tensor,
    matrix: tuple[Tensor, Tensor | None] | None,
    product: Callable[[Tensor], Tensor],
    A: Tensor,
    B: Tensor,
    routing: Routing,
    bias: Tensor | None = None,
) -> Tensor:
    """x (n, l, d_in) → (n, l, d_out) by the kernel that `form_of` named; the other arguments are those of `flora.ops`.

    matrix: weight (d_out, d_in) of any strides and None, or an int8 weight and its scales (d_out,) float32, weight · scale / 127
    each; None where only `product`, x → x @ weight.T, knows them.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    n, length, _ = x.shape
    tiles = tiles_of(form, length, routing)
    if form == "decode":
        return operators.decode(x[:, 0], *matrix, A, B, bias, *tiles.lists, tiles.num_tiles).unsqueeze(1)
    if form == "modulate":
        return operators.modulate(x, *matrix, A, B, bias, *tiles.lists, tiles.num_tokens, tiles.rank_tile)
    if matrix is not None and matrix[1] is None:
        y = linear(x, matrix[0], bias)
    else:
        y = product(x) if bias is None else product(x) + bias
    y = y.contiguous()
    operators.sgmv_add_(y, x, A, B, *tiles.lists, tiles.rank_tile)
    return y


def reads(form: str, routing: Routing) -> tuple[Hashable, Tensor]:
    """What a decode step by this kernel takes of a routing: a tensor with its numbers, and all that is not in that tensor."""
    tiles = tiles_of(form, 1, routing)
    return (form, *tiles.shape), tiles.numbers


def tiles_of(form: str, length: int, routing: Routing) -> ExpandedTiles | SegmentTiles:
    """How a kernel finds a batch of rows of `length` tokens."""
    return routing.expanded_tiles() if form == "decode" else routing.segment_tiles(length, TILE if form == "sgmv" else None)
