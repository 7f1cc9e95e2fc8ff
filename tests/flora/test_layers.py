"""Linear layers are swapped from outside, whatever their kind, and behave as their base layer where no adapter is at work."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from tiny_bank import pinned_batch
from torch import nn
from transformers.pytorch_utils import Conv1D

from flora import AdapterError, ops
from flora.layers import AdaptedLinear, LayerPlan, ServingHolder, inject

D_IN, D_OUT, RANK = 12, 9, 3
SLOTS = [1, 0, 2]
RANKS = [0, 1, 3]  # by slot


class Quantised(nn.Linear):
    """Stands for a layer with a private weight format: integers and a scale that nobody but its own forward knows."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__(D_IN, D_OUT, bias=bias)
        self.scale = 0.01
        self.weight = nn.Parameter(torch.randint(-127, 128, (D_OUT, D_IN), dtype=torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.float() * self.scale, self.bias)


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(D_IN, D_OUT, bias=bias)


def conv1d(bias: bool = True) -> Conv1D:
    layer = Conv1D(D_OUT, D_IN)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    if not bias:
        layer.bias = None
        layer.forward = lambda x: x @ layer.weight
    return layer


def true_weight(layer: nn.Module) -> torch.Tensor:
    """(d_out, d_in) float64."""
    if isinstance(layer, Quantised):
        return layer.weight.double() * layer.scale
    return layer.weight.double().T if isinstance(layer, Conv1D) else layer.weight.double()


@dataclass
class OnePlan:
    """A serving whose every layer has the same part."""

    method: str
    part: LayerPlan | None

    def plan(self, layer: str) -> LayerPlan | None:
        return self.part


@contextmanager
def serving(holder: ServingHolder, method: str, part: LayerPlan | None):
    holder.current = OnePlan(method, part)
    try:
        yield
    finally:
        holder.current = None


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def plan() -> LayerPlan:
    A, B = torch.randn(3, RANK, D_IN), torch.randn(3, RANK, D_OUT)
    A[0, 0] = B[0, 0] = 1.0
    for slot, rank in enumerate(RANKS):
        A[slot, max(rank, 1) :] = B[slot, max(rank, 1) :] = 0.0
    return LayerPlan(A, B, ops.route(SLOTS, RANKS, RANK))


def expected(layer: nn.Module, plan: LayerPlan, x: torch.Tensor, family: str) -> torch.Tensor:
    A, B = plan.A.double(), plan.B.double()
    if family == "lora":
        A, B = A.clone(), B.clone()
        A[0] = B[0] = 0.0
    reference = ops.flora_reference if family == "flora" else ops.lora_reference
    bias = None if layer.bias is None else layer.bias.detach().double()
    return reference(x.double(), true_weight(layer).detach(), A, B, torch.tensor(SLOTS), bias)


BATCHED = [method for method, family in ops.FAMILY.items() if family is not None]
KINDS = {"linear": linear, "conv1d": conv1d, "quantised": Quantised}


@pytest.mark.parametrize("method", BATCHED)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_serves_every_method(kind, bias, method, plan):
    base, holder = KINDS[kind](bias), ServingHolder()
    adapted = AdaptedLinear(base, "layer", holder)
    assert adapted.is_black_box == (kind == "quantised")
    x = torch.randn(3, 4, D_IN)
    with serving(holder, method, plan):
        if kind == "quantised" and method == "flora-modulate":
            with pytest.raises(AdapterError, match=r"layer layer is quantised \(Quantised\).*flora-expand"):
                adapted(x)
            return
        y = adapted(x)
    truth = expected(base, plan, x, ops.FAMILY[method])
    max_diff = (y.double() - truth).abs().max().item()
    assert max_diff < 1e-5 * truth.abs().max(), f"max_diff {max_diff:.3g}"


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("family", ["flora", "lora"])
def test_merged_weights_serve_the_batch_and_leave_the_base_alone(kind, bias, family, plan):
    base, holder = KINDS[kind](bias), ServingHolder()
    adapted, before = AdaptedLinear(base, "layer", holder), base.weight.detach().clone()
    merged = adapted.merge(family, plan.A[2], plan.B[2])
    assert merged.shape == (D_OUT, D_IN)
    everyone = LayerPlan(plan.A, plan.B, ops.route([2, 2, 2], RANKS, RANK), merged)
    x = torch.randn(3, 4, D_IN)
    with serving(holder, "merged", everyone):
        y = adapted(x)
    reference = ops.flora_reference if family == "flora" else ops.lora_reference
    bias_of = None if base.bias is None else base.bias.detach().double()
    truth = reference(x.double(), true_weight(base).detach(), plan.A.double(), plan.B.double(), torch.tensor([2, 2, 2]), bias_of)
    max_diff = (y.double() - truth).abs().max().item()
    assert max_diff < 1e-5 * truth.abs().max(), f"max_diff {max_diff:.3g}"
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_part_it_is_the_base_layer_exactly(kind):
    base, holder = KINDS[kind](), ServingHolder()
    adapted = AdaptedLinear(base, "layer", holder)
    x = torch.randn(3, 4, D_IN)
    assert torch.equal(adapted(x), base(x))
    with serving(holder, "flora", None):
        assert torch.equal(adapted(x), base(x))


@pytest.mark.parametrize("rows", [1, 2, 4, 12])
def test_a_batch_of_another_size_is_an_error(rows, plan):
    """Where an architecture folds its batch before a layer, rows would get each other's adapters."""
    holder = ServingHolder()
    adapted = AdaptedLinear(linear(), "experts.gate", holder)
    with serving(holder, "flora", plan), pytest.raises(AdapterError, match=rf"experts\.gate got {rows} rows for a batch of 3"):
        adapted(torch.randn(rows, 4, D_IN))


# -------------------------------------------------------------------------------------------------------------- inject


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"query": nn.Linear(D_IN, D_IN), "out": Conv1D(D_IN, D_IN)})
        self.norm = nn.LayerNorm(D_IN)
        self.quantised = Quantised()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, D_IN)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(D_IN, 5, bias=False)


NAMES = [f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attention.query", "attention.out", "quantised")]


def test_inject_swaps_every_linear_layer_but_the_head():
    model, holder = Model(), ServingHolder()
    layers = inject(model, holder, skip=(model.head,))
    assert list(layers) == NAMES
    for name, layer in layers.items():
        assert model.get_submodule(name) is layer and layer.name == name and layer.holder is holder
    assert type(model.head) is nn.Linear and type(model.embedding) is nn.Embedding
    assert (layers[NAMES[0]].in_features, layers[NAMES[0]].out_features) == (D_IN, D_IN)
    assert (layers[NAMES[2]].in_features, layers[NAMES[2]].out_features) == (D_IN, D_OUT)


def test_a_second_inject_finds_nothing_to_swap():
    model = Model()
    inject(model, ServingHolder(), skip=(model.head,))
    swapped = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    assert inject(model, ServingHolder(), skip=(model.head,)) == {}
    assert [module for module in model.modules() if isinstance(module, AdaptedLinear)] == swapped


def test_inject_without_a_head_to_skip():
    assert list(inject(Model(), ServingHolder(), skip=(None,))) == [*NAMES, "head"]


@pytest.mark.parametrize("name", ["code", "llama", "speech"])
def test_the_real_architectures_are_swapped_whole(name, checkpoints, tiny_engines):
    """Every linear layer that PEFT could adapt is there under the name a checkpoint gives it, and the output head is not."""
    import tiny_models

    plain = tiny_models.load_plain(checkpoints[name].model)
    engine = tiny_engines[name]
    wanted = tiny_models.target_layers(plain, checkpoints[name].layers)
    assert wanted and set(wanted) == set(engine.bank.layers)
    assert {layer: (engine.bank.layers[layer].in_features, engine.bank.layers[layer].out_features) for layer in wanted} == wanted
    assert not isinstance(engine.model.get_output_embeddings(), AdaptedLinear)


@pytest.mark.parametrize("name", ["code", "llama"])
def test_after_serving_the_model_is_the_base_model_again(name, checkpoints):
    """Also where a forward fails half-way."""
    engine = checkpoints[name].engine("aa")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        before = engine.model(input_ids=ids).logits
        with pinned_batch(engine.bank, ["aa"], "flora") as batch:
            with engine.bank.serve(batch):
                served = engine.model(input_ids=ids).logits
            assert not torch.equal(served, before), "the adapter changes nothing: the test shows nothing"
            assert torch.equal(engine.model(input_ids=ids).logits, before)
            with pytest.raises(AdapterError, match="got 2 rows for a batch of 1"), engine.bank.serve(batch):
                engine.model(input_ids=ids.expand(2, -1))
            assert torch.equal(engine.model(input_ids=ids).logits, before)


# -------------------------------------------------------------------------------------------------------- bitsandbytes


@pytest.fixture
def int8_layer():
    """bitsandbytes' own 8-bit layer, on the CPU, and the matrix it stands for."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain = nn.Linear(64, 48)
    layer = bitsandbytes.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu"), plain


@pytest.mark.parametrize("method", ["flora", "flora-expand", "bmm-lora", "loop-lora", "sgmv-lora"])
def test_an_8_bit_layer_is_served_through_its_own_product(int8_layer, method):
    layer, plain = int8_layer
    holder = ServingHolder()
    adapted = AdaptedLinear(layer, "mlp", holder)
    assert adapted.is_black_box
    x, A, B = torch.randn(3, 4, 64), torch.randn(3, RANK, 64) * 0.3, torch.randn(3, RANK, 48) * 0.3
    part = LayerPlan(A, B, ops.route([2, 1, 2], [0, RANK, RANK], RANK))
    with serving(holder, method, part):
        y = adapted(x)
    reference = ops.flora_reference if ops.FAMILY[method] == "flora" else ops.lora_reference
    truth = reference(x, plain.weight.detach(), A, B, torch.tensor([2, 1, 2]), plain.bias.detach())
    max_diff = (y - truth).abs().max().item()
    assert max_diff < 0.03 * truth.abs().max(), f"max_diff {max_diff:.3g} of {truth.abs().max():.3g}"
    with pytest.raises(AdapterError, match="mlp is quantised"):
        _ = adapted.weight
