"""FloraLinear by itself: against the formula in float64, in every precision, on plain and quantised layers, merged and not."""

from __future__ import annotations

import copy

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from flora import FloraConfig, RequestError
from flora.cost import cheaper_form
from flora.tuner import FloraLinear
from flora.tuner.quantised import plain_weight

D_IN, D_OUT, RANK = 12, 9, 3
MANY = 400  # tokens, for which the weight is modulated


class BlackBox(nn.Linear):
    """Stands for a layer that nobody but itself knows how to multiply by."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def conv1d(d_in: int, d_out: int, bias: bool = True) -> Conv1D:
    layer = Conv1D(d_out, d_in)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    if not bias:
        layer.bias = None
        layer.forward = lambda x: x @ layer.weight
    return layer


KINDS = {"linear": nn.Linear, "conv1d": conv1d, "black box": BlackBox}


def adapted(base: nn.Module, rank: int = RANK, combine: str = "sum", name: str = "default") -> FloraLinear:
    """The layer with an adapter far from the identity, in evaluation mode."""
    layer = FloraLinear(base.requires_grad_(False), name, FloraConfig(r=rank, combine=combine), rank).eval()
    randomise(layer, name)
    return layer


def randomise(layer: FloraLinear, name: str) -> None:
    with torch.no_grad():
        for side in (layer.flora_A, layer.flora_B):
            side[name].normal_(0.0, 0.3)
            side[name][0] += 1.0


def true_weight(base: nn.Module) -> torch.Tensor:
    """(d_out, d_in) float64."""
    return (base.weight.T if isinstance(base, Conv1D) else base.weight).detach().double()


def truth(layer: FloraLinear, x: torch.Tensor, *names: str) -> torch.Tensor:
    """The formula, component by component, in float64; several adapters multiply."""
    weight = true_weight(layer.base_layer)
    for name in names:
        A, B = layer.flora_A[name].double(), layer.flora_B[name].double()
        components = torch.stack([torch.outer(b, a) for a, b in zip(A, B, strict=True)])  # (r, d_out, d_in)
        weight = weight * (components.mean(0) if layer.combine[name] == "mean" else components.sum(0))
    y = x.double() @ weight.T
    return y if layer.base_layer.bias is None else y + layer.base_layer.bias.double()


def assert_close(y: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert y.shape == expected.shape
    max_diff = (y.double() - expected).abs().max().item() if y.numel() else 0.0
    assert max_diff <= tolerance * (expected.abs().max().item() if y.numel() else 1.0), f"max_diff {max_diff:.3g}"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# -------------------------------------------------------------------------------------------------------------- formula


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4), (0,), (2, 0), (MANY,), (2, MANY)], ids=str)
@pytest.mark.parametrize("combine", ["sum", "mean"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_formula(kind, bias, combine, shape):
    layer = adapted(KINDS[kind](D_IN, D_OUT, bias=bias).double(), combine=combine)
    assert layer.flora_A["default"].dtype == torch.float64
    x = torch.randn(*shape, D_IN, dtype=torch.float64)
    assert_close(layer(x), truth(layer, x, "default"))


def test_few_tokens_are_expanded_and_many_modulated(monkeypatch):
    """What the other tests rest on: their sizes reach both forms, and a black box is never modulated."""
    from flora import ops

    called = []
    for name in ("flora_expand", "flora_modulate", "expand_around"):
        function = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, function=function, name=name: (called.append(name), function(*args))[1])
    assert cheaper_form([(5, RANK)], 4, "cpu") == "flora-expand" and cheaper_form([(MANY, RANK)], 8, "cpu") == "flora-modulate"
    layer, box = adapted(nn.Linear(D_IN, D_OUT)), adapted(BlackBox(D_IN, D_OUT))
    for tokens, expected in ((5, ["flora_expand", "expand_around"]), (MANY, ["flora_modulate"])):
        called.clear()
        layer(torch.randn(tokens, D_IN))
        assert called == expected
        called.clear()
        box(torch.randn(tokens, D_IN))
        assert called == ["expand_around"]


@pytest.mark.parametrize("tokens", [2, MANY])
@pytest.mark.parametrize("kind", KINDS)
def test_several_active_adapters_multiply(kind, tokens):
    layer = adapted(KINDS[kind](D_IN, D_OUT).double(), rank=3, combine="sum", name="a")
    layer.update_layer("b", FloraConfig(r=2, combine="mean"), 2)
    randomise(layer, "b")
    x = torch.randn(tokens, D_IN, dtype=torch.float64)
    for names in (["a"], ["b"], ["a", "b"], ["b", "a"], ["a", "elsewhere"]):
        layer.set_adapter(names)
        assert_close(layer(x), truth(layer, x, *(name for name in names if name != "elsewhere")))
    layer.set_adapter(["elsewhere"])
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 200), (6, 2, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_has_an_adapter_of_its_own(kind, shape):
    layer = adapted(KINDS[kind](D_IN, D_OUT).double(), rank=3, combine="mean", name="a")
    layer.update_layer("b", FloraConfig(r=1), 1)
    randomise(layer, "b")
    x = torch.randn(*shape, D_IN, dtype=torch.float64)
    names = ["b", "__base__", "a", "elsewhere", "a", "b"]
    served = layer(x, adapter_names=names)
    for row, name in enumerate(names):
        assert_close(served[row], truth(layer, x[row], *([name] if name in "ab" else [])))
    for everyone in ("a", "b"):
        assert_close(layer(x, adapter_names=[everyone] * 6), truth(layer, x, everyone))
    assert torch.equal(layer(x, adapter_names=["__base__"] * 6), layer.base_layer(x)), "no adapter is not the base layer"


def test_a_batch_whose_rows_and_names_differ_is_refused():
    layer = adapted(nn.Linear(D_IN, D_OUT), name="a")
    with pytest.raises(RequestError, match="adapter_names has 2 names for 6 rows"):
        layer(torch.randn(6, D_IN), adapter_names=["a", "__base__"])


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("tokens", [4, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_float64(kind, tokens):
    base = KINDS[kind](3, 2).double().requires_grad_(False)
    layer = FloraLinear(base, "a", FloraConfig(r=4, combine="mean"), 4)
    layer.update_layer("b", FloraConfig(r=1), 1)
    layer.set_adapter(["a", "b"])
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=tokens < 10)
    names = [name for name, _ in layer.named_parameters() if name.startswith("flora_")]
    factors = [torch.randn_like(parameter, requires_grad=True) for name, parameter in layer.named_parameters() if name in names]
    if kind != "black box":
        assert cheaper_form([(tokens, 4)], 8, "cpu") == ("flora-expand" if tokens == 4 else "flora-modulate")

    def forward(x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, factors, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *factors))


def gradients(layer: FloraLinear, x: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    layer.zero_grad()
    (layer(x).double() * weights).sum().backward()
    return [layer.flora_A["default"].grad, layer.flora_B["default"].grad]


@pytest.mark.parametrize("precision", ["bfloat16 layer", "bfloat16 autocast"])
@pytest.mark.parametrize("tokens", [4, MANY])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_precision_beside_float32_factors(kind, tokens, precision):
    """Result as the base layer's dtype; outputs and float32 gradients within bfloat16's rounding of the true ones."""
    exact = adapted(KINDS[kind](64, 48).bfloat16().double())
    x, weights = torch.randn(tokens, 64).bfloat16(), torch.randn(tokens, 48).double()
    base = copy.deepcopy(exact.base_layer).to(torch.bfloat16 if precision == "bfloat16 layer" else torch.float32)
    layer = adapted(base)
    for side, exact_side in ((layer.flora_A, exact.flora_A), (layer.flora_B, exact.flora_B)):
        assert side["default"].dtype == torch.float32
        side["default"] = nn.Parameter(exact_side["default"].float())
    exact_gradients = gradients(exact, x.double(), weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16 autocast"):
        given = x if precision == "bfloat16 layer" else x.float()
        y = layer(given)
        assert y.dtype == layer.base_layer(given).dtype == torch.bfloat16
        found = gradients(layer, given, weights)
    assert_close(y, truth(exact, x, "default"), 0.03)
    for side, exact_side in zip(found, exact_gradients, strict=True):
        assert side.dtype == torch.float32
        assert_close(side, exact_side, 0.03)


@pytest.mark.parametrize("tokens", [4, MANY])
def test_small_changes_are_not_rounded_away(tokens):
    """0.3 % is less than half of bfloat16's step above one: factors of that precision would be ones."""
    layer = FloraLinear(nn.Linear(256, 256).bfloat16().requires_grad_(False), "default", FloraConfig(r=1), 1)
    layer.flora_A["default"] = nn.Parameter(torch.full((1, 256), 1.003))
    layer.flora_B["default"] = nn.Parameter(torch.ones(1, 256))
    nn.init.zeros_(layer.base_layer.bias)
    for _ in range(2):
        x = torch.randn(tokens, 256).bfloat16()
        base, y = layer.base_layer(x).double(), layer(x).double()
        assert ((y * base).sum() / (base * base).sum()).item() == pytest.approx(1.003, abs=1e-3)


# ------------------------------------------------------------------------------------------------------------ quantised


def quantised(kind: str, plain: nn.Linear | None = None) -> nn.Module:
    """A bitsandbytes layer of 64 → 96 with the weights of `plain`, or its own."""
    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(64, 96, has_fp16_weights=False, threshold=6.0)
    else:
        layer = bitsandbytes.nn.Linear4bit(64, 96, quant_type="nf4", compress_statistics=kind == "nf4 twice")
    if plain is not None:
        layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")  # which is when bitsandbytes quantises


QUANTISED = ["int8", "nf4", "nf4 twice"]
TOLERANCE = {"int8": 0.02, "nf4": 1e-5, "nf4 twice": 1e-5}
"""int8 rounds what comes in, too."""


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_layers(kind):
    layer = adapted(quantised(kind))
    assert layer.flora_A["default"].dtype == layer.flora_B["default"].dtype == torch.float32
    exact = copy.deepcopy(layer)
    exact.base_layer = nn.Linear(64, 96)
    exact.base_layer.weight.data, exact.base_layer.bias.data = plain_weight(layer.base_layer), layer.base_layer.bias.data
    x, weights = torch.randn(7, 64), torch.randn(7, 96).double()
    assert_close(layer(x), truth(exact, x, "default"), TOLERANCE[kind])
    for found, expected in zip(gradients(layer, x, weights), gradients(exact, x, weights), strict=True):
        assert_close(found, expected.double(), TOLERANCE[kind])
    mixed = layer(x, adapter_names=["default", "__base__", "default", "__base__", "default", "default", "default"])
    assert_close(mixed[[1, 3]], truth(exact, x)[[1, 3]], TOLERANCE[kind])
    assert_close(mixed[[0, 2, 4]], truth(exact, x, "default")[[0, 2, 4]], TOLERANCE[kind])


@pytest.mark.parametrize("kind", ["nf4", "nf4 twice"])
def test_a_4_bit_layer_trains_after_it_was_evaluated(kind):
    """On some CPUs bitsandbytes changes the weight's layout at the first forward in evaluation, and then knows no gradient."""
    evaluated = quantised(kind).eval()
    weight = plain_weight(copy.deepcopy(evaluated))
    with torch.no_grad():
        evaluated(torch.randn(2, 64))
    layer = adapted(evaluated)
    assert_close(plain_weight(layer.base_layer), weight.double(), 0.005)  # what was rounded stays rounded
    x, weights = torch.randn(5, 64, requires_grad=True), torch.randn(5, 96).double()
    before = [*gradients(layer, x, weights), x.grad.clone()]
    with torch.no_grad():
        layer.eval()(x)
    x.grad = None
    after = [*gradients(layer.train(), x, weights), x.grad]
    for first, second in zip(before, after, strict=True):
        assert torch.equal(first, second), "evaluating changed what is trained"


# -------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_and_back(kind, safe_merge):
    layer = adapted(KINDS[kind](D_IN, D_OUT).double(), name="a", combine="mean")
    layer.update_layer("b", FloraConfig(r=2), 2)
    randomise(layer, "b")
    weight, x = layer.base_layer.weight.clone(), torch.randn(5, D_IN, dtype=torch.float64)
    expected = truth(layer, x, "a"), truth(layer, x, "a", "b")
    layer.merge(safe_merge)
    assert layer.merged_adapters == ["a"] and layer.base_layer.weight.is_contiguous()
    assert_close(layer(x), expected[0])
    assert_close(layer.base_layer(x), expected[0])
    layer.merge(safe_merge, ["a", "b"])
    assert layer.merged_adapters == ["a", "b"], "what was merged is merged again"
    assert_close(layer(x), expected[1])
    with pytest.raises(RequestError, match="while adapters are merged"):
        layer(x, adapter_names=["a"] * 5)
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.base_layer.weight, weight)
    assert_close(layer(x), expected[0])
    with pytest.warns(UserWarning, match="No adapter is merged"):
        layer.unmerge()


@pytest.mark.parametrize("kind", QUANTISED)
def test_merging_quantised_layers(kind):
    """What is merged is quantised anew, as a layer of these weights would be; the way back is exact."""
    layer = adapted(quantised(kind))
    x = torch.randn(5, 64)
    before, weight = layer(x), plain_weight(layer.base_layer)
    modulated = nn.Linear(64, 96)
    modulated.weight.data = weight * (layer.flora_B["default"].T @ layer.flora_A["default"]).detach()
    modulated.bias.data = layer.base_layer.bias.data
    fresh = quantised(kind, modulated).train(kind != "int8")  # int8 rounds its input in evaluation only, nf4 its scales
    for _ in range(2):
        layer.merge(safe_merge=True)
        assert torch.equal(plain_weight(layer.base_layer), plain_weight(fresh))
        assert torch.equal(layer(x), fresh(x))
        layer.unmerge()
        assert torch.equal(plain_weight(layer.base_layer), weight) and torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "int8", "nf4"])
def test_a_safe_merge_refuses_what_is_not_finite(kind):
    layer = adapted(KINDS[kind](64, 96) if kind in KINDS else quantised(kind))
    weight = plain_weight(layer.base_layer).clone()
    layer.flora_B["default"].data[1, 3] = float("nan")
    with pytest.raises(ValueError, match="adapters default make weights that are NaN or infinite: nothing was merged"):
        layer.merge(safe_merge=True)
    assert not layer.merged and torch.equal(plain_weight(layer.base_layer), weight)


def test_a_half_precision_layer_is_merged_in_the_factors_precision():
    layer = adapted(nn.Linear(64, 48).bfloat16())
    expected = true_weight(layer.base_layer) * (layer.flora_B["default"].T @ layer.flora_A["default"]).double()
    layer.merge()
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.base_layer.weight, expected.bfloat16()), "rounded more than once"
