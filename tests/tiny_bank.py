"""A net of two layers, adapters for it, and what a slot of its bank must hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from flora.bank import IDENTITY_SLOT, AdapterBank, BatchServing
from flora.formats import Adapter
from flora.layers import ServingHolder, inject

D = 6
LAYERS = ("first", "second")
SHAPES = {"first": (D, D + 2), "second": (D + 2, D)}
NUM_FACTORS = 2 * (2 * D + 2)
"""Numbers of an adapter of rank 1 on both layers."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D + 2), nn.Linear(D + 2, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def make_bank(net: Net | None = None, dtype: torch.dtype = torch.float32, **options) -> AdapterBank:
    holder = ServingHolder()
    return AdapterBank(inject(net or make_net(), holder), holder, torch.device("cpu"), dtype, **options)


@contextmanager
def pinned_batch(bank: AdapterBank, names: Sequence[str | None], method: str) -> Iterator[BatchServing]:
    """A batch of one tag (or None) per row, each row's slot pinned during this context."""
    slots: list[int] = []
    try:
        for name in names:
            slots.append(bank.pin_now(name, method))
        yield bank.arrange(slots, method)
    finally:
        for slot in slots:
            bank.unpin(slot)


def adapter(family: str, rank: int = 1, seed: int = 0, layers: tuple[str, ...] = LAYERS, shapes: dict | None = None) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in layers:
        d_in, d_out = (shapes or SHAPES)[layer]
        factors[layer] = (torch.randn(rank, d_in, generator=generator), torch.randn(rank, d_out, generator=generator))
    return Adapter(family, factors, None, f"{family}-{seed}")


def assert_holds(bank: AdapterBank, slot: int, *adapters: Adapter) -> None:
    """The slot holds exactly these adapters, one of a family: nothing of another is left on any layer."""
    assert slot != IDENTITY_SLOT
    expected = {(entry.family, layer): factors for entry in adapters for layer, factors in entry.factors.items()}
    for family in ("flora", "lora"):
        for layer in LAYERS:
            stack = bank.stack(family, layer)
            if (family, layer) not in expected:
                assert stack is None or stack.ranks[slot] == 0, f"slot {slot} has something left on {layer}"
                continue
            rank = stack.ranks[slot]
            A, B = expected[family, layer]
            assert rank == len(A), f"slot {slot} has rank {rank} on {layer}, not {len(A)}"
            assert torch.equal(stack.A[slot, :rank], A) and torch.equal(stack.B[slot, :rank], B), f"slot {slot}, {layer}"
