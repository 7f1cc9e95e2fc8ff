"""Which of its candidate tiles is fastest for a kernel, measured on the GPU at hand, and kept for it: see `flora.kernels.choices`.

It runs where somebody calls `tune`, never by itself: what serves must not stop to measure, nor change what is being measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora import kernels
from flora.kernels import choices, decode, modulate, sgmv
from flora.kernels.launch import Config, Launch, device_of
from flora.routing import Routing

REPEATS = 15
FLUSHED_BYTES = 256 << 20  # more than any last cache has


@dataclass(frozen=True)
class Trial:
    """A candidate and what it took."""

    config: Config | tuple[Config, Config]
    seconds: float  # the median

    def __str__(self) -> str:
        return f"{1e6 * self.seconds:.1f} µs: {choices.described(self.config)}"


def candidates(
    form: str, x: Tensor, matrix: tuple[Tensor, Tensor | None] | None, B: Tensor, routing: Routing
) -> tuple[str, Sequence[Config] | Sequence[tuple[Config, Config]]]:
    """Under which key a choice is kept, and what there is to choose from; the arguments are those of `flora.kernels.serve`."""
    layer, tiles, size = (x.shape[2], B.shape[2], x.dtype), kernels.tiles_of(form, x.shape[1], routing), x.element_size()
    if form == "decode":
        key = choices.key_of(form, *layer, (tiles.num_places,), matrix[0])
        return key, decode.configs_for(tiles.num_places, size, x.device)
    tile = (tiles.num_tokens, tiles.rank_tile)
    if form == "modulate":
        return choices.key_of(form, *layer, tile, matrix[0]), modulate.configs_for(*tile, size, x.device)
    return choices.key_of(form, *layer, tile), sgmv.configs_for(size)


def tune(
    form: str,
    x: Tensor,
    matrix: tuple[Tensor, Tensor | None] | None,
    A: Tensor,
    B: Tensor,
    routing: Routing,
    bias: Tensor | None = None,
) -> list[Trial]:
    """Time every candidate of a kernel on this problem, keep the fastest, and return all, fastest first.

    form: "decode", "modulate" or "sgmv"; the other arguments are those of `flora.kernels.serve`. Nothing is measured nor kept, and
    the list is empty, where x is on no GPU. The caches are flushed before each repeat, as in a model, whose other layers do it.
    """
    if not x.is_cuda:
        return []
    key, configs = candidates(form, x, matrix, B, routing)
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=x.device)
    with device_of(x):
        trials = [Trial(one, _seconds(_launches(form, one, x, matrix, A, B, routing, bias), flushed)) for one in configs]
    trials.sort(key=lambda trial: trial.seconds)
    choices.remember(x.device, key, trials[0].config)
    return trials


def used(form: str, x: Tensor, matrix: tuple[Tensor, Tensor | None] | None, B: Tensor, routing: Routing) -> str:
    """The configuration that `flora.kernels.serve` takes for this problem now, in words, for the record of a measurement."""
    key, configs = candidates(form, x, matrix, B, routing)
    return choices.described(choices.chosen(x.device, key, configs))


def _launches(
    form: str,
    config: Config | tuple[Config, Config],
    x: Tensor,
    matrix: tuple[Tensor, Tensor | None] | None,
    A: Tensor,
    B: Tensor,
    routing: Routing,
    bias: Tensor | None,
) -> list[Launch]:
    tiles = kernels.tiles_of(form, x.shape[1], routing)
    if form == "decode":
        return decode.launches(x[:, 0], *matrix, A, B, bias, *tiles.lists, tiles.num_tiles, config)[1]
    if form == "modulate":
        return modulate.launches(x, *matrix, A, B, bias, *tiles.lists, tiles.num_tokens, tiles.rank_tile, config)[1]
    y = x.new_zeros(*x.shape[:2], B.shape[2])
    return sgmv.launches(y, x, A, B, *tiles.lists, tiles.rank_tile, config)


def _seconds(launches: list[Launch], flushed: Tensor) -> float:
    for launch in launches:
        launch.run()  # compiles
    taken = []
    for _ in range(REPEATS):
        flushed.zero_()
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started.record()
        for launch in launches:
            launch.run()
        ended.record()
        ended.synchronize()
        taken.append(started.elapsed_time(ended) / 1e3)
    return statistics.median(taken)
