"""The cost model: what it says of the forms, and that its formulas count what the ops do."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flora import ops
from flora.cost import MULTIPLY_ADDS_PER_BYTE, cheaper_form, cheaper_kernel, multiply_adds

MACHINES = sorted(MULTIPLY_ADDS_PER_BYTE)  # (device, bytes of a weight)
aten = torch.ops.aten


@pytest.mark.parametrize("device, element_size", MACHINES)
@pytest.mark.parametrize("num_adapters", [1, 3, 8])
@pytest.mark.parametrize("rank", [8, 16, 64])
@pytest.mark.parametrize("tokens", [64, 65, 512])
def test_a_long_prefill_at_high_rank_is_modulated(device, element_size, num_adapters, rank, tokens):
    assert cheaper_form([(tokens, rank)] * num_adapters, element_size, device) == "flora-modulate"


@pytest.mark.parametrize("device, element_size", MACHINES)
@pytest.mark.parametrize("num_adapters", [1, 8, 32])
@pytest.mark.parametrize("rank", [1, 4, 8, 16])
def test_decoding_one_token_per_adapter_is_expanded(device, element_size, num_adapters, rank):
    assert cheaper_form([(1, rank)] * num_adapters, element_size, device) == "flora-expand"


@pytest.mark.parametrize("device, element_size", MACHINES)
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_rank_one_is_never_modulated(device, element_size, tokens):
    """At rank 1 expanding costs no more products than the bare layer."""
    assert cheaper_form([(tokens, 1)], element_size, device) == "flora-expand"


def test_rows_without_an_adapter_do_not_sway_the_choice():
    for tokens in (1, 2, 8, 32, 64, 256):
        alone = cheaper_form([(tokens, 8)], 4, "cpu")
        assert cheaper_form([(tokens, 8), (100_000, 0)], 4, "cpu") == alone


@pytest.mark.parametrize("device, element_size", MACHINES)
def test_once_modulating_pays_more_tokens_never_undo_it(device, element_size):
    forms = [cheaper_form([(tokens, 8)], element_size, device) for tokens in range(1, 200)]
    first = forms.index("flora-modulate")
    assert set(forms[:first]) == {"flora-expand"} and set(forms[first:]) == {"flora-modulate"}


@pytest.mark.parametrize("rank", [2, 4, 16, 64])
def test_kernels_modulate_prompts_and_expand_single_tokens_of_many_adapters(rank):
    assert cheaper_kernel([(512, rank)] * 8) == "flora-modulate"
    assert cheaper_kernel([(1, rank)] * 32) == "flora-expand"


def test_a_kernel_modulates_where_many_rows_share_an_adapter():
    assert cheaper_kernel([(32, 4)]) == "flora-modulate"  # 32 + 16 rows instead of 128
    assert cheaper_kernel([(32, 1)]) == "flora-expand"  # 48 instead of 32
    assert cheaper_kernel([(4, 4)] * 8) == "flora-expand", "a tile of tokens each, however few they are"


# ------------------------------------------------------------------------------------------- formulas against the ops


class Count(TorchDispatchMode):
    """Counts the multiply-adds of matrix products, and the single products that scale a tensor by another, as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.scalings = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (aten.mm.default, aten.bmm.default):
            self.products += result.numel() * args[0].shape[-1]
        elif function in (aten.addmm.default, aten.baddbmm.default):
            self.products += result.numel() * args[1].shape[-1]
        elif function in (aten.mul.Tensor, aten.mul_.Tensor):
            self.scalings += result.numel()
        return result


def counted(method: str, rank: int, batch: int, l: int, d_in: int, d_out: int) -> Count:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, l, d_in), (d_out, d_in), (2, 4, d_in), (2, 4, d_out))
    x, weight, A, B = (torch.randn(*shape, generator=generator) for shape in shapes)
    routing = ops.route([1] * batch, [0, rank], 4)
    with torch.no_grad(), Count() as count:
        ops.function_of(method)(x, weight, A, B, routing.slots, None, routing)
    return count


@pytest.mark.parametrize("method", ["flora-expand", "flora-modulate", "bmm-lora", "loop-lora", "sgmv-lora"])
@pytest.mark.parametrize("rank", [0, 1, 2, 4])
@pytest.mark.parametrize("batch, l, d_in, d_out", [(1, 1, 5, 7), (3, 1, 11, 4), (2, 6, 8, 8)])
def test_formulas_count_what_the_ops_do(method, rank, batch, l, d_in, d_out):
    count = counted(method, rank, batch, l, d_in, d_out)
    total = count.products + count.scalings
    if method == "flora-modulate" and rank:
        # The formula leaves out the one product per element of weight ∘ (Bᵀ A), as PAPER does: (r + n) · d², not (r + 1 + n) · d².
        assert count.scalings == d_in * d_out
        total -= d_in * d_out
    expected = multiply_adds(method, batch * l, rank, d_in, d_out)
    assert total == expected, f"{method} does {total} multiply-adds, the formula says {expected}"


def test_the_base_layer_costs_one_product_whatever_the_rank():
    assert multiply_adds("base", 6, 8, 5, 7) == 6 * 5 * 7


def test_an_unknown_form_has_no_cost():
    with pytest.raises(KeyError, match="sgmv"):
        multiply_adds("sgmv", 1, 1, 1, 1)


def test_the_paper_example():
    """PAPER: a prefill of 256 tokens at rank 16 takes 15 times fewer multiply-adds modulated than expanded."""
    expand, modulate = (multiply_adds(form, 256, 16, 4096, 4096) for form in ("flora-expand", "flora-modulate"))
    assert math.isclose(expand / modulate, 15, rel_tol=0.03)
