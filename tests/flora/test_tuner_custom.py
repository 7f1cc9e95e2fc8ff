"""What PEFT's own suite asks of every method on custom models, asked of fLoRA: models that are no transformers', have no `config`,
and name their layers as they like; and what PEFT offers beside training and serving, done right or refused by name."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import peft
import pytest
import torch
from packaging.version import Version
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from flora import AdapterError, FloraConfig, UnknownAdapterError
from flora.tuner import FloraLinear

PEFT = Version(peft.__version__)
FAR = {"init": "noise", "init_std": 0.5}
"""A start that is far from the base model."""


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.last = nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.relu(self.first(x)))


class Convolved(nn.Module):
    """An embedding, transformers' Conv1D, a normalisation and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.convolution, self.norm, self.last = nn.Embedding(30, 8), Conv1D(6, 8), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.convolution(self.embedding((10 * x).long().abs() % 30)).mean(1)))


class Deep(nn.Module):
    """Blocks in a list of a name that PEFT does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.rungs = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(10, 12), "down": nn.Linear(12, 10)}) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for rung in self.rungs:
            x = x + rung["down"](rung["up"](x).tanh())
        return x


def base(kind: type[nn.Module] = Perceptron) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 10, generator=torch.Generator().manual_seed(1))


CASES = {
    "one layer": (Perceptron, {"target_modules": ["first"]}),
    "an expression": (Perceptron, {"target_modules": ".*t$", "r": 2, "combine": "mean"}),
    "all-linear": (Perceptron, {"target_modules": "all-linear", "r": 1}),
    "a layer beside it": (Perceptron, {"target_modules": ["first"], "modules_to_save": ["last"]}),
    "conv1d": (Convolved, {"target_modules": ["convolution"], "r": 3}),
    "conv1d, embedding": (Convolved, {"target_modules": ["convolution", "last"], "modules_to_save": ["embedding"]}),
    "deep": (Deep, {"target_modules": ["up", "down"], "exclude_modules": r"rungs\.3\..*"}),
}
EVERY = pytest.mark.parametrize("case", CASES)


def adapted(case: str, adapter_name: str = "default", **options) -> PeftModel:
    kind, chosen = CASES[case]
    torch.manual_seed(2)
    return get_peft_model(base(kind), FloraConfig(**{**FAR, **chosen, **options}), adapter_name).eval()


def differ(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


# ------------------------------------------------------------------------------------------------------ train and forward


@EVERY
def test_training_moves_all_of_the_adapter_and_nothing_else(case, x):
    model = adapted(case, init="identity", init_std=1.0, combine="sum").train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):  # a component that starts with B = 0 gives its A no gradient in the first
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        trained = ".flora_" in name or ".modules_to_save.default." in name
        assert parameter.requires_grad == trained == (parameter.grad is not None), name
        assert torch.equal(parameter, before[name]) != trained, name


@EVERY
def test_the_forward_is_deterministic_in_training_too(case, x):
    model = adapted(case)
    assert torch.equal(model(x), model(x)) and torch.equal(model.train()(x), model(x))
    assert differ(model(x), base(CASES[case][0])(x)) > 1e-3, "the adapter changes next to nothing: the tests show nothing"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", ["the model", "the adapter"])
def test_half_precision_before_and_after_the_adapter(first, dtype, x):
    """The base model's dtype comes out; a model that is cast whole has its factors cast, as its user says."""
    if first == "the model":
        model = get_peft_model(base().to(dtype), FloraConfig(r=2, target_modules="all-linear", **FAR)).eval()
    else:
        model = get_peft_model(base(), FloraConfig(r=2, target_modules="all-linear", **FAR)).eval().to(dtype)
    factors = {parameter.dtype for name, parameter in model.named_parameters() if ".flora_" in name}
    assert factors == {torch.float32 if first == "the model" else dtype}
    exact = copy.deepcopy(model).float()
    y, expected = model(x.to(dtype)), exact(x.to(dtype).float())
    assert y.dtype == dtype and differ(y, expected) < 0.05 * expected.abs().max()
    mixed = model(x.to(dtype), adapter_names=["default", "__base__", "default", "default"])
    assert mixed.dtype == dtype and differ(mixed[[0, 2, 3]], expected[[0, 2, 3]]) < 0.05 * expected.abs().max()
    y.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)


def test_compiled(x):
    """One graph, with a gradient; the backend that generates no code shows what can be captured."""
    model = adapted("an expression")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(x)
    assert differ(compiled(x), expected) < 1e-6
    expected.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    compiled(x).sum().backward()
    assert all(differ(parameter.grad, gradients[name]) < 1e-5 for name, parameter in model.named_parameters() if name in gradients)


# ------------------------------------------------------------------------------------------------------- save and load


@EVERY
def test_what_is_saved_is_what_is_loaded(case, x, tmp_path):
    """Tensors of the adapter alone, under keys without its name, and equal answers from them, also where a model waits for them."""
    model = adapted(case, "mine")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.requires_grad
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "mine" / "adapter_model.safetensors")
    saved = CASES[case][1].get("modules_to_save", [])
    assert all("mine" not in key for key in tensors)
    assert all(key.endswith((".flora_A", ".flora_B")) or key.split(".")[-2] in saved for key in tensors)
    assert sum(tensor.numel() for tensor in tensors.values()) == model.get_nb_trainable_parameters()[0]
    for low_cpu_mem_usage in (False, True):
        plain = base(CASES[case][0])
        torch.manual_seed(3)  # what is not loaded starts differently
        loaded = PeftModel.from_pretrained(plain, tmp_path / "mine", "other", low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(loaded(x), model(x))


@EVERY
def test_a_state_goes_from_model_to_model(case, x):
    model, other = adapted(case), adapted(case, init_std=0.1)
    state = get_peft_model_state_dict(model)
    found = set_peft_model_state_dict(other, dict(state))  # older versions take entries out of it
    assert not found.unexpected_keys and not [key for key in found.missing_keys if ".flora_" in key]
    assert torch.equal(other(x), model(x))
    nowhere = get_peft_model(base(CASES[case][0]), model.peft_config["default"], low_cpu_mem_usage=True)
    assert {parameter.device.type for name, parameter in nowhere.named_parameters() if ".flora_" in name} == {"meta"}
    set_peft_model_state_dict(nowhere, dict(state), low_cpu_mem_usage=True)
    assert torch.equal(nowhere.eval()(x), model(x))


@pytest.mark.parametrize("name", ["flora", "A", "default_2", "firs", "0"])
@pytest.mark.filterwarnings("ignore:Adapter name")
def test_an_adapters_name_makes_no_difference(name, x, tmp_path):
    """Names that are parts of the parameters', the layers' and the other adapter's, too."""
    model = adapted("an expression", "default")
    model.add_adapter(name, FloraConfig(r=3, target_modules=["first"], **FAR))
    model.set_adapter(name)
    expected = model(x)
    model.save_pretrained(tmp_path)
    plain = base()
    torch.manual_seed(3)  # what is not loaded starts differently
    loaded = PeftModel.from_pretrained(plain, tmp_path, "default").eval()  # "default" has no folder of its own
    loaded.load_adapter(tmp_path / name, name)
    loaded.set_adapter(name)
    assert torch.equal(loaded(x), expected)
    model.set_adapter("default")
    loaded.set_adapter("default")
    assert torch.equal(loaded(x), model(x))


def test_a_files_configuration(tmp_path):
    """Fields of a newer version are left out, nonsense is refused, another method's file is that method's configuration."""
    path = tmp_path / "adapter_config.json"
    FloraConfig(r=2, target_modules=["first"]).save_pretrained(tmp_path)
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "of_a_newer_version": 1}))
    for config_class in (FloraConfig, PeftConfig):
        config = config_class.from_pretrained(tmp_path)
        assert isinstance(config, FloraConfig) and config.r == 2
    nonsense = [("r", 0), ("r", True), ("init", ["noise"]), ("init_std", "1"), ("rank_pattern", ["first"]), ("combine", 3)]
    for field, value in nonsense:
        path.write_text(json.dumps({**saved, field: value}))
        with pytest.raises(AdapterError, match=field.removesuffix("_pattern")):
            PeftConfig.from_pretrained(tmp_path)
    LoraConfig(target_modules=["first"]).save_pretrained(tmp_path)
    assert isinstance(FloraConfig.from_pretrained(tmp_path), LoraConfig)
    with pytest.raises(ValueError, match="peft types"):
        model = adapted("one layer")
        get_peft_model(base(), LoraConfig(target_modules=["first"])).save_pretrained(tmp_path / "other")
        model.load_adapter(tmp_path / "other", "other")


def test_a_configuration_is_copied_and_pickled():
    config = FloraConfig(r=2, target_modules=["first"], rank_pattern={"last": 3})
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config)):
        assert other == config and other.peft_type is PeftType.FLORA
    assert replace(config, r=5).r == 5


# ------------------------------------------------------------------------------------------------------ several adapters


def two(x: torch.Tensor, first: list[str], second: list[str]) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """A model with adapters "one" (active) and "two", and what each of them, both, and none answer, merged by hand in float64."""
    model = get_peft_model(base(), FloraConfig(r=2, target_modules=first, **FAR), "one").eval()
    model.add_adapter("two", FloraConfig(r=3, target_modules=second, **FAR))
    answers = {}
    for active in ((), ("one",), ("two",), ("one", "two")):
        plain = base().double()
        for name in ("first", "last"):
            for adapter in active:
                layer = model.base_model.model.get_submodule(name)
                if isinstance(layer, FloraLinear) and adapter in layer.flora_A:
                    A, B = layer.flora_A[adapter].double(), layer.flora_B[adapter].double()
                    plain.get_submodule(name).weight.data *= (B.T @ A / len(A)).detach()
        answers["+".join(active)] = plain(x.double())
    return model, answers


TARGETS = pytest.mark.parametrize("first, second", [(["first"], ["first"]), (["first"], ["last"]), (["first", "last"], ["last"])])


@TARGETS
def test_one_after_the_other_and_together(first, second, x):
    model, answers = two(x, first, second)
    for names in (["one"], ["two"], ["one", "two"], ["two", "one"]):
        model.base_model.set_adapter(names)
        expected = answers["+".join(sorted(names))]
        assert differ(model(x), expected) < 1e-4 * expected.abs().max()
        trainable = {name.rsplit(".", 1)[-1] for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable == set(names)


@TARGETS
def test_merging_those_that_are_named(first, second, x):
    model, answers = two(x, first, second)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for names in (["two"], ["one"], ["one", "two"]):
        model.base_model.set_adapter(names)  # a layer that has none of the names goes on with the active ones
        model.merge_adapter(names, safe_merge=True)
        expected = answers["+".join(names)]
        for _ in range(2):
            assert differ(model(x), expected) < 1e-4 * expected.abs().max()
            model.merge_adapter(names)  # again: nothing is merged twice
        model.unmerge_adapter()
        assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=names)
        assert type(merged) is Perceptron and differ(merged(x), expected) < 1e-4 * expected.abs().max()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UnknownAdapterError, match="unknown adapters nobody; loaded: one, two"):
            merge(adapter_names=["one", "nobody"])
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_unloaded_and_wrapped_again(x):
    model, answers = two(x, ["first"], ["last"])
    bare = model.unload()
    assert type(bare) is Perceptron and differ(bare(x), answers[""]) < 1e-5
    again = get_peft_model(bare, FloraConfig(target_modules=["last"], **FAR))
    assert differ(again(x), answers[""]) > 1e-3
    assert PEFT < Version("0.19") or list(again.peft_config) == ["default"], "what was unloaded is still listed"


def test_what_is_trained(x, tmp_path):
    """set_requires_grad, set_adapter for inference, adding and loading train what they say, on layers that one has alone too."""
    model, _ = two(x, ["first"], ["first", "last"])

    def trained() -> set[str]:
        return {name.rsplit(".", 1)[-1] for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trained() == {"one"}
    model.set_requires_grad("two")
    assert trained() == {"one", "two"}
    model.set_requires_grad(["one", "two"], requires_grad=False)
    assert trained() == set()
    model.set_adapter("two")
    assert trained() == {"two"}
    model.set_adapter("one")
    model.base_model.set_adapter("one", inference_mode=True)
    assert trained() == set() and model.active_adapters == ["one"]
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "two", "third", is_trainable=True)
    model.add_adapter("fourth", FloraConfig(target_modules=["first", "last"]))
    assert model.active_adapters == ["one"] and "fourth" not in trained()


def test_deleted_to_the_last_one(x):
    model, answers = two(x, ["first", "last"], ["last"])
    model.delete_adapter("two")
    assert differ(model(x), answers["one"]) < 1e-4 and not any(name.endswith(".two") for name in model.state_dict())
    model.delete_adapter("one")
    assert differ(model.base_model(x), answers[""]) < 1e-5 and not any(".flora_" in name for name in model.state_dict())
    model.add_adapter("third", FloraConfig(target_modules=["first"], **FAR))
    model.set_adapter("third")
    assert differ(model(x), answers[""]) > 1e-3


@pytest.mark.skipif(PEFT < Version("0.21"), reason="an older peft lets a merged adapter be deleted")
def test_a_merged_adapter_is_not_deleted(x):
    model, answers = two(x, ["first"], ["last"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("one")
    assert differ(model(x), answers["one"]) < 1e-4


def test_disabled_until_the_end_of_the_block(x):
    """Also where it ends by an error, and for rows that name their adapters."""
    model, answers = two(x, ["first"], ["last"])
    with pytest.raises(KeyError, match="meant"), model.disable_adapter():
        assert differ(model(x), answers[""]) < 1e-5
        assert differ(model(x, adapter_names=["one", "two", "one", "two"]), answers[""]) < 1e-5
        raise KeyError("meant")
    assert differ(model(x), answers["one"]) < 1e-4


# --------------------------------------------------------------------------------------------------------- which layers


def test_blocks_of_any_name():
    """The blocks to adapt are counted in the list that layers_pattern names."""
    options = {"target_modules": ["up"], "layers_to_transform": [1, 3], "layers_pattern": "rungs"}
    model = get_peft_model(nn.ModuleDict({"inner": base(Deep)}), FloraConfig(rank_pattern={"rungs.3.up": 2}, **options))
    found = {name: module.r for name, module in model.base_model.model.named_modules() if isinstance(module, FloraLinear)}
    assert found == {"inner.rungs.1.up": {"default": 4}, "inner.rungs.3.up": {"default": 2}}
