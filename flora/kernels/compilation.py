"""Kernels compiled before they are needed, and how many were compiled so far: a time that a compiler is part of is no kernel's.

Triton compiles a kernel when it is launched with types, constants or alignments that are new: a second or two each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flora import kernels
from flora.kernels import decode, modulate, sgmv
from flora.kernels.launch import INTERPRETED, Launch
from flora.routing import Routing, route

KERNELS = (decode._decode_kernel, decode._sum_parts_kernel, modulate._modulate_kernel, sgmv._shrink_kernel, sgmv._expand_kernel)

META = torch.device("meta")


@dataclass(frozen=True)
class LayerShape:
    """What of a layer its kernels are compiled for."""

    d_in: int
    d_out: int
    has_bias: bool = False
    is_int8: bool = False
    by_input: bool = False  # each input's column in one piece, as `Conv1D` has its weight
    has_matrix: bool = True  # False: only the layer itself knows its weight

    @classmethod
    def of(cls, d_in: int, d_out: int, matrix: tuple[Tensor, Tensor | None] | None, bias: Tensor | None) -> LayerShape:
        """Of a layer's weight and scales as `flora.kernels.serve` takes them, and its bias."""
        if matrix is None:
            return cls(d_in, d_out, bias is not None, has_matrix=False)
        return cls(d_in, d_out, bias is not None, matrix[1] is not None, matrix[0].stride(0) == 1 < d_in)


def num_compiled() -> int | None:
    """How many variants of this package's kernels this process has compiled, or loaded from Triton's cache on disk.

    Whoever times something compares the number before and after. None where this version of Triton does not tell; 0 in the
    interpreter, which compiles nothing.
    """
    if INTERPRETED:
        return 0
    caches = [getattr(kernel, "device_caches", None) for kernel in KERNELS]
    if not all(isinstance(of_devices, dict) for of_devices in caches):
        return None
    return sum(len(of_device[0]) for of_devices in caches for of_device in of_devices.values())


def batches(ranks: Iterable[int], batch_sizes: Iterable[int]) -> Iterator[Routing]:
    """Batches of every size and rank, from all rows with one adapter to each with its own, in steps of two."""
    ranks = list(ranks)
    for size in batch_sizes:
        for rank in ranks:
            adapters = 1
            while True:
                adapters = min(adapters, size)
                yield route([1 + row % adapters for row in range(size)], [0] + [rank] * adapters, max(1, rank))
                if adapters == size:
                    break
                adapters *= 2


def prepare(
    device: torch.device,
    layers: Iterable[LayerShape],
    dtype: torch.dtype,
    routings: Iterable[Routing],
    lengths: Iterable[int] = (1,),
    methods: Iterable[str] = kernels.METHODS,
    factors: torch.dtype | None = None,
) -> int:
    """Compile what these layers launch for these batches, and return how many variants were new. Nothing runs on the device.

    layers: a model's, each shape once or oftener. dtype: of x; factors: of A and B, as x's by default. routings: `batches` makes
    them; a batch whose tiles have other sizes compiles when it comes. lengths: tokens of a row. 0 on what is no GPU.
    """
    if device.type != "cuda":
        return 0
    before = num_compiled() or 0
    layers, lengths, methods, seen = list(dict.fromkeys(layers)), list(lengths), list(methods), set()
    with torch.cuda.device(device):
        for routing in routings:
            for one in {
                (form, length, layer)
                for length in lengths
                for layer in layers
                for method in methods
                if (form := kernels.form_of(method, length, routing, layer.has_matrix)) is not None
            }:
                form, length, layer = one
                key = (*one, routing.slots.shape[0], kernels.tiles_of(form, length, routing).shape)
                if key not in seen:
                    seen.add(key)
                    for launch in launches_of(form, layer, length, routing, dtype, factors or dtype, device):
                        launch.compile()
    return (num_compiled() or 0) - before


def launches_of(
    form: str, layer: LayerShape, length: int, routing: Routing, dtype: torch.dtype, factors: torch.dtype, device: torch.device
) -> list[Launch]:
    """What `flora.kernels.serve` launches on a device, with tensors that hold nothing."""

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=META)

    n, d_in, d_out = routing.slots.shape[0], layer.d_in, layer.d_out
    x, A, B = tensor(n, length, d_in), tensor(1, 1, d_in, dtype=factors), tensor(1, 1, d_out, dtype=factors)
    tiles = kernels.tiles_of(form, length, routing)
    lists = [one.to(META) for one in tiles.lists]
    if form == "sgmv":
        return sgmv.launches(tensor(n, length, d_out), x, A, B, *lists, tiles.rank_tile, device=device)
    stored = torch.int8 if layer.is_int8 else dtype
    weight = tensor(d_in, d_out, dtype=stored).T if layer.by_input else tensor(d_out, d_in, dtype=stored)
    scales = tensor(d_out, dtype=torch.float32) if layer.is_int8 else None
    bias = tensor(d_out) if layer.has_bias else None
    if form == "decode":
        return decode.launches(x[:, 0], weight, scales, A, B, bias, *lists, tiles.num_tiles, device=device)[1]
    return modulate.launches(x, weight, scales, A, B, bias, *lists, tiles.num_tokens, tiles.rank_tile, device=device)[1]
