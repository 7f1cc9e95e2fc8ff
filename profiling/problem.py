"""One layer and a batch for it: random numbers, every method as a call, and the truth in float64.
The weight lies in memory as the engine has it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear

from flora import ops
from flora.layers import stored_by_input

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.bfloat16}
"""What a layer holds → what it computes in."""

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
"""Largest |error| as a share of Σ |terms|: a few roundings of the dtype."""

GATHERED = "bmm-lora, factors gathered before"
"""The paper's baseline without its gather of every row's factors, which is timed apart this way."""


class Problem:
    """A layer d_in → d_out and a batch of rows of `length` tokens, row i with the adapter in slots[i].

    kind: of KINDS; int8 as bitsandbytes stores it, whole numbers and a scale for each output. ranks: true rank by slot, 0 for the
    identity. kernels: `flora.kernels`, None where PyTorch serves every method. with_bias: whether the layer has one. by_input:
    whether each input's column of the weight lies in one piece, as transformers' `Conv1D` has it.
    """

    def __init__(
        self,
        kernels: ModuleType | None,
        device: torch.device,
        kind: str,
        slots: Sequence[int],
        length: int,
        d_in: int,
        d_out: int,
        ranks: Sequence[int],
        seed: int,
        with_bias: bool = False,
        by_input: bool = False,
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.kernels, self.dtype = kernels, KINDS[kind]
        stride = max(1, *ranks)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(self.dtype)

        self.x = normal(len(slots), length, d_in)
        self.weight, self.scales = (normal(d_out, d_in).float() / math.sqrt(d_in)).to(self.dtype), None
        if kind == "int8":
            self.scales = self.weight.float().abs().amax(1)
            self.weight = (self.weight.float() * (127 / self.scales[:, None])).round().to(torch.int8)
        elif by_input or (device.type == "cpu" and self.dtype == torch.float32):
            self.weight = stored_by_input(self.weight)
        self.A, self.B = normal(len(ranks), stride, d_in), normal(len(ranks), stride, d_out)
        self.bias = normal(d_out) if with_bias else None
        self.routing = ops.route(slots, ranks, stride, device)
        self._identities: dict[int, ops.Routing] = {}

    def form_of(self, method: str) -> str | None:
        """The kernel that serves a method, None where none does."""
        return None if self.kernels is None else self.kernels.form_of(method, self.x.shape[1], self.routing)

    def computed_as(self, method: str) -> str:
        """The method whose multiply-adds it has: of `flora`, the form that it takes here."""
        kernel = {"decode": "flora-expand", "modulate": "flora-modulate", "sgmv": "sgmv-lora"}.get(self.form_of(method) or "")
        if kernel is None and method == "flora" and self.scales is None:
            return self.routing.cheaper_form(self.x.shape[1], self.weight.element_size(), self.x.device.type)
        return kernel or {GATHERED: "bmm-lora", "flora": "flora-expand"}.get(method, method)

    def call_of(self, method: str) -> Callable[[], Tensor] | None:
        """The method as the engine serves it on a GPU: by its kernel, else by PyTorch. None where there is no way.

        The products around an int8 weight are those of our own kernel, without an adapter.
        """
        if method == "base":
            return partial(self._base, self.x)
        form = self.form_of(method)
        if form is not None:
            return partial(self.kernels.serve, form, self.x, *(self._matrix, self.product, self.A, self.B, self.routing, self.bias))
        routing = self.routing
        if method == GATHERED:
            method, routing = "bmm-lora", routing.for_one_layer()
        if self.scales is None:
            function = ops.function_of(method)
            return partial(function, self.x, self.weight, self.A, self.B, routing.slots, self.bias, routing)
        around = ops.around_function_of(method)
        return None if around is None else partial(around, self.product, self.x, self.A, self.B, routing, self.bias)

    def laid_out_anew(self) -> Problem:
        """The same numbers elsewhere in memory."""
        other = copy.copy(self)
        other.x, other.weight, other.A, other.B = (one.clone() for one in (self.x, self.weight, self.A, self.B))
        return other

    def beside(self) -> Problem:
        """Another layer for the same rows: its weight and factors lie elsewhere in memory, the rows where they lay."""
        other = copy.copy(self)
        other.weight, other.A, other.B = (one.clone() for one in (self.weight, self.A, self.B))
        return other

    @property
    def _matrix(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.scales

    def _base(self, x: Tensor) -> Tensor:
        return self.product(x) if self.bias is None else self.product(x) + self.bias

    def product(self, x: Tensor) -> Tensor:
        """x (n, l, d_in) @ weight.T."""
        if self.scales is None:
            return linear(x, self.weight)
        n, length, _ = x.shape
        rows, form = (x, "modulate") if length > 16 else (x.reshape(n * length, 1, -1), "decode")
        number = rows.shape[0]
        if number not in self._identities:
            self._identities[number] = ops.route([0] * number, [0], self.A.shape[1], x.device)
        y = self.kernels.serve(form, rows, self._matrix, self.product, self.A, self.B, self._identities[number])
        return y.reshape(n, length, -1)

    def truth(
        self, family: str | None, rows: slice = slice(None), tokens: slice = slice(None), outputs: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """The plain reference in float64 (rows, tokens, outputs), and the same of every number's absolute value.

        family: None for the bare layer.
        """
        A, B = self.A.double(), self.B[..., outputs].double()
        weight = self.weight[outputs].double()
        if self.scales is not None:
            weight *= self.scales[outputs].double()[:, None] / 127
        for slot, rank in zip(self.routing.row_slots, self.routing.row_ranks, strict=True):
            A[slot, rank:] = B[slot, rank:] = 0.0
            if rank == 0 and family == "flora":
                A[slot, 0] = B[slot, 0] = 1.0
        if family is None:
            B.zero_()  # LoRA that adds nothing
        reference = ops.flora_reference if family == "flora" else ops.lora_reference
        numbers = (self.x[rows, tokens].double(), weight, A, B)
        slots = self.routing.slots[rows]
        y, size = reference(*numbers, slots), reference(*(one.abs() for one in numbers), slots)
        if self.bias is None:
            return y, size
        bias = self.bias[outputs].double()
        return y + bias, size + bias.abs()
