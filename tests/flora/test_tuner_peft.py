"""What PEFT promises of a method, asked of fLoRA: on plain linear layers, Conv1D and bitsandbytes layers of real architectures.

These are the checks of PEFT's own suite that apply to any method, and the ones that only a method with mixed batches has.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import tiny_models
import torch
import transformers
from packaging.version import Version
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from tiny_bank import pinned_batch
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

from flora import AdapterError, Engine, FloraConfig, Request, RequestError, UnknownAdapterError
from flora.formats import read_adapter
from flora.models import load_model
from flora.tuner import FloraLinear

SAVE = {
    "code": tiny_models.save_code_model,
    "gpt2": tiny_models.save_gpt2_model,  # Conv1D
    "llama": tiny_models.save_llama_model,
    "speech": tiny_models.save_speech_model,
}
LAYERS = {
    "code": tiny_models.CODE_LAYERS,
    "gpt2": tiny_models.CODE_LAYERS,
    "llama": tiny_models.LLAMA_LAYERS,
    "speech": tiny_models.SPEECH_LAYERS,
}
EVERY = pytest.mark.parametrize("name", SAVE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save(root / name) for name, save in SAVE.items()}


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A code model of widths that bitsandbytes takes."""
    return tiny_models.save_code_model(tmp_path_factory.mktemp("wide") / "model", width=64, inner_width=128)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def inputs(name: str, rows: int = 3) -> dict[str, torch.Tensor]:
    """Another prompt, or clip and prompt, in each row."""
    ids = torch.arange(2, 14) + 7 * torch.arange(rows)[:, None]
    if name == "speech":
        features = torch.sin(torch.arange(20 * 100).float() * (1 + torch.arange(rows)[:, None])).reshape(rows, 20, 100)
        return {"input_features": features, "decoder_input_ids": ids}
    return {"input_ids": ids}


def logits(model: nn.Module, name: str, **more) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(name), **more).logits


def randomise(model: nn.Module, adapter: str = "default", seed: int = 1) -> None:
    """Far from the identity, reproducibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".flora_" in key and key.endswith(f".{adapter}"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
                parameter[0] += 1.0


def adapted(folder: Path, name: str, seed: int = 1, **options) -> PeftModel:
    """A model in evaluation mode with one adapter on all of its linear layers, unless the options say otherwise."""
    config = FloraConfig(**{"r": 3, "target_modules": list(LAYERS[name]), **options})
    model = get_peft_model(tiny_models.load_plain(folder), config).eval()
    randomise(model, seed=seed)
    return model


def adapted_layers(model: nn.Module) -> dict[str, FloraLinear]:
    return {key.removeprefix("base_model.model."): m for key, m in model.named_modules() if isinstance(m, FloraLinear)}


def assert_close(found: torch.Tensor, expected: torch.Tensor, base: torch.Tensor, tolerance: float = 1e-4) -> None:
    effect, max_diff = (expected - base).abs().max().item(), (found - expected).abs().max().item()
    assert effect > 0.1, "the adapter changes next to nothing: the test shows nothing"
    assert max_diff < tolerance * effect, f"max_diff {max_diff:.3g}, of an effect of {effect:.3g}"


# -------------------------------------------------------------------------------------------------- which layers, ranks


@pytest.mark.parametrize(
    "name, expected",
    [("code", {"c_attn"}), ("gpt2", {"c_attn"}), ("llama", {"q_proj", "v_proj"}), ("speech", set(tiny_models.SPEECH_LAYERS))],
)
def test_the_architectures_own_layers(name, expected, folders):
    model = get_peft_model(tiny_models.load_plain(folders[name]), FloraConfig())
    layers = adapted_layers(model)
    assert {layer.rsplit(".", 1)[-1] for layer in layers} == expected
    assert len(layers) == len(tiny_models.target_layers(tiny_models.load_plain(folders[name]), tuple(expected)))


@EVERY
def test_all_linear(name, folders):
    """Every linear layer but the output head, for a second adapter too."""
    model = get_peft_model(tiny_models.load_plain(folders[name]), FloraConfig(target_modules="all-linear"))
    expected = set(tiny_models.target_layers(tiny_models.load_plain(folders[name]), LAYERS[name]))
    assert set(adapted_layers(model)) == expected
    model.add_adapter("second", FloraConfig(target_modules="all-linear", r=2))
    assert set(adapted_layers(model)) == expected
    assert all(set(layer.flora_A) == {"default", "second"} for layer in adapted_layers(model).values())


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"target_modules": ["c_attn"], "layers_to_transform": [1]}, {"transformer.h.1.attn.c_attn": 3}),
        ({"target_modules": r".*h\.0\.mlp\.c_.*"}, {"transformer.h.0.mlp.c_fc": 3, "transformer.h.0.mlp.c_proj": 3}),
        ({"target_modules": ["c_fc", "c_attn"], "exclude_modules": r".*h\.0.*|.*attn"}, {"transformer.h.1.mlp.c_fc": 3}),
        (
            {"target_modules": ["c_fc"], "rank_pattern": {r"h\.1\.mlp\.c_fc": 5}},
            {"transformer.h.0.mlp.c_fc": 3, "transformer.h.1.mlp.c_fc": 5},
        ),
    ],
    ids=["layers", "expression", "exclusion", "rank pattern"],
)
def test_layers_and_ranks_as_the_configuration_says(options, expected, folders, tmp_path):
    model = adapted(folders["code"], "code", **options)
    assert {name: layer.r["default"] for name, layer in adapted_layers(model).items()} == expected
    model.save_pretrained(tmp_path)
    assert {name: A.shape[0] for name, (A, _) in read_adapter(tmp_path).factors.items()} == expected
    again = PeftModel.from_pretrained(tiny_models.load_plain(folders["code"]), tmp_path).eval()
    assert torch.equal(logits(again, "code"), logits(model, "code"))


def test_layers_that_cannot_be_adapted_are_named(folders):
    with pytest.raises(AdapterError, match="layer transformer.wte is Embedding, and fLoRA adapts linear layers"):
        adapted(folders["code"], "code", target_modules=["wte", "c_attn"])
    with pytest.raises(ValueError, match="no_such_layer"):
        adapted(folders["code"], "code", target_modules=["no_such_layer"])


def test_an_architecture_without_default_layers_asks_for_them():
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3)), FloraConfig())


# ------------------------------------------------------------------------------------------------------- start and save


@EVERY
def test_the_default_start_is_the_base_model(name, folders):
    base = logits(tiny_models.load_plain(folders[name]), name)
    model = get_peft_model(tiny_models.load_plain(folders[name]), FloraConfig(r=4, target_modules="all-linear")).eval()
    max_diff = (logits(model, name) - base).abs().max().item()
    assert max_diff < 1e-4, f"max_diff {max_diff}"
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {key for key, _ in model.named_parameters() if ".flora_A." in key or ".flora_B." in key}


@pytest.mark.parametrize("combine", ["sum", "mean"])
@EVERY
def test_what_is_saved_is_served_by_everyone(name, combine, folders, tmp_path):
    """PEFT again, weights merged by a formula of the tests' own, and the engine: all give what was saved."""
    model = adapted(folders[name], name, combine=combine)
    expected, base = logits(model, name), logits(tiny_models.load_plain(folders[name]), name)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["combine"]) == ("FLORA", 3, combine)
    keys = {f"base_model.model.{layer}.flora_{side}" for layer in adapted_layers(model) for side in "AB"}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == keys

    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(
            tiny_models.load_plain(folders[name]), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert torch.equal(logits(again, name), expected)
        assert not any(parameter.requires_grad for parameter in again.parameters())
    assert_close(logits(tiny_models.load_merged(folders[name], tmp_path), name), expected, base)

    engine = Engine.from_pretrained(folders[name], {"tag": tmp_path}, device="cpu")
    for method in ("flora", "flora-expand", "flora-modulate", "merged"):
        with pinned_batch(engine.bank, ["tag"] * 3, method) as batch, engine.bank.serve(batch):
            assert_close(logits(engine.model, name), expected, base)


def test_the_tokens_are_the_engines(folders, tmp_path):
    model = adapted(folders["code"], "code")
    model.save_pretrained(tmp_path)
    engine = Engine.from_pretrained(folders["code"], {"tag": tmp_path}, device="cpu")
    (completion,) = engine.generate([Request(prompt="local function", adapter="tag", max_new_tokens=20, ignore_eos=True)])
    ids = engine.tokenizer("local function", return_tensors="pt")["input_ids"]
    generated = model.generate(input_ids=ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert generated[0, ids.shape[1] :].tolist() == completion.token_ids


def test_each_adapter_is_saved_in_its_folder(folders, tmp_path):
    model = adapted(folders["code"], "code")
    model.add_adapter("second", FloraConfig(r=2, target_modules=["c_fc"], combine="mean"))
    randomise(model, "second", seed=2)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert not (tmp_path / "adapter_config.json").exists()
    model.set_adapter("second")
    again = PeftModel.from_pretrained(tiny_models.load_plain(folders["code"]), tmp_path / "second", adapter_name="other").eval()
    assert torch.equal(logits(again, "code"), logits(model, "code"))


def test_loading_for_training(folders, tmp_path):
    adapted(folders["code"], "code").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_models.load_plain(folders["code"]), tmp_path, is_trainable=True)
    trainable = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all(".flora_" in key for key in trainable)
    automatic = AutoPeftModelForCausalLM.from_pretrained(tmp_path)  # finds the base model by the adapter's configuration
    assert type(automatic.get_base_model()) is type(tiny_models.load_plain(folders["code"])) and adapted_layers(automatic)


def test_modules_to_save_are_trained_saved_and_loaded(folders, tmp_path):
    model = adapted(folders["code"], "code", modules_to_save=["ln_f"])
    with torch.no_grad():
        model.base_model.model.transformer.ln_f.modules_to_save["default"].weight += 0.5
    expected = logits(model, "code")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_models.load_plain(folders["code"]), tmp_path).eval()
    assert torch.equal(logits(again, "code"), expected)
    with pytest.raises(AdapterError, match=r"replaces whole modules \(modules_to_save=\['ln_f'\]\)"):
        read_adapter(tmp_path)


# -------------------------------------------------------------------------------------------------- merge, disable, unload


@pytest.mark.parametrize("safe_merge", [False, True])
@EVERY
def test_merge_and_unload(name, safe_merge, folders, tmp_path):
    plain = tiny_models.load_plain(folders[name])
    model = adapted(folders[name], name, combine="mean")
    expected, base = logits(model, name), logits(plain, name)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert type(merged) is type(plain) and not adapted_layers(merged)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert_close(logits(merged, name), expected, base)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(tiny_models.load_plain(tmp_path), name), logits(merged, name))


@EVERY
def test_unload_is_the_base_model(name, folders):
    plain = tiny_models.load_plain(folders[name])
    unloaded = adapted(folders[name], name).unload()
    assert not adapted_layers(unloaded) and torch.equal(logits(unloaded, name), logits(plain, name))


@EVERY
def test_merging_in_place_and_back(name, folders):
    model = adapted(folders[name], name)
    expected, base = logits(model, name), logits(tiny_models.load_plain(folders[name]), name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.merge_adapter()
    assert_close(logits(model, name), expected, base)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, name), base), "disabled, a merged model is not the base model"
    assert torch.equal(logits(model, name), expected)


def test_a_merge_that_is_not_finite_is_refused(folders):
    model = adapted(folders["code"], "code")
    next(iter(adapted_layers(model).values())).flora_A["default"].data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.merge_and_unload(safe_merge=True)


@EVERY
def test_disabling(name, folders):
    model = adapted(folders[name], name)
    expected, base = logits(model, name), logits(tiny_models.load_plain(folders[name]), name)
    with model.disable_adapter():
        assert torch.equal(logits(model, name), base)
    assert torch.equal(logits(model, name), expected)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model, name), base)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model, name), expected)


# ------------------------------------------------------------------------------------------------------ several adapters


THREE = {
    "first": {"r": 3},
    "second": {"r": 1, "combine": "mean", "target_modules": ["c_attn", "c_fc"]},
    "third": {"r": 5, "combine": "mean", "target_modules": ["c_proj"]},
}
"""Adapters of other ranks on other layers of the code model."""


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory) -> tuple[Path, dict[str | None, torch.Tensor]]:
    """Each of them in its folder, and what each, or none, answers alone."""
    root = tmp_path_factory.mktemp("three")
    alone = {None: logits(tiny_models.load_plain(folders["code"]), "code")}
    for seed, (name, options) in enumerate(THREE.items()):
        one = adapted(folders["code"], "code", seed=seed, **options)
        one.save_pretrained(root / name)
        alone[name] = logits(one, "code")
    return root, alone


@pytest.fixture
def three(folders, saved) -> tuple[PeftModel, dict[str | None, torch.Tensor]]:
    """A code model with the three adapters, and what each answers alone; "first" is active."""
    root, alone = saved
    plain = tiny_models.load_plain(folders["code"])
    model = PeftModel.from_pretrained(plain, root / "first", adapter_name="first", is_trainable=True)
    for name in ("second", "third"):
        model.load_adapter(root / name, name)
    return model.eval(), alone


def test_switching(three):
    model, alone = three
    assert torch.equal(logits(model, "code"), alone["first"])
    for name in ("third", "first", "second"):
        model.set_adapter(name)
        assert torch.equal(logits(model, "code"), alone[name])
        trainable = {key.rsplit(".", 1)[-1] for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable == {name}, "not the active adapter alone is trained"


def test_deleting(three):
    model, alone = three
    model.delete_adapter("second")
    assert torch.equal(logits(model, "code"), alone["first"])
    with pytest.warns(UserWarning, match="first was active which is now deleted"):
        model.delete_adapter("first")
    assert list(model.peft_config) == ["third"] and not any(".first" in key or ".second" in key for key in model.state_dict())
    model.set_adapter("third")
    assert torch.equal(logits(model, "code"), alone["third"])
    with pytest.raises(ValueError, match="nobody does not exist"):
        model.delete_adapter("nobody")


def test_several_at_once_multiply(three):
    """As merging one after the other does."""
    model, alone = three
    model.base_model.set_adapter(["first", "second"])
    both = logits(model, "code")
    assert_close(both, both, alone["first"])
    model.merge_adapter(["second"])
    model.merge_adapter(["first"])
    assert_close(logits(model, "code"), both, alone["first"])
    assert_close(logits(model.merge_and_unload(), "code"), both, alone["first"])


def test_status(three):
    model, _ = three
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == ("GPTBigCodeForCausalLM", "FloraModel")
    assert status.peft_types == {"first": "FLORA", "second": "FLORA", "third": "FLORA"}
    assert status.active_adapters == ["first"] and status.merged_adapters == [] and status.enabled is True
    layers = model.get_layer_status()
    assert len(layers) == 8 and {layer.module_type for layer in layers} == {"flora.FloraLinear"}
    assert sorted(map(tuple, (layer.available_adapters for layer in layers)))[0] == ("first", "second")


def test_other_kinds_beside_it_are_refused(three, folders):
    model, _ = three
    with pytest.raises(ValueError, match="FLORA.*LORA"):
        model.add_adapter("lora", LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(ValueError, match="FLORA"):
        get_peft_model(tiny_models.load_plain(folders["code"]), FloraConfig(), mixed=True)


def test_copies_and_pickles(three, tmp_path):
    model, alone = three
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(logits(other, "code"), alone["first"])
        other.set_adapter("second")
        assert torch.equal(logits(other, "code"), alone["second"])
    assert torch.equal(logits(model, "code"), alone["first"])


# -------------------------------------------------------------------------------------------------------- mixed batches


def test_each_row_with_its_adapter_in_one_pass(three, monkeypatch):
    model, alone = three
    passes = []
    serve = FloraLinear._serve
    monkeypatch.setattr(FloraLinear, "_serve", lambda self, *args: (passes.append(self), serve(self, *args))[1])
    for names in (["third", "first", "second"], ["__base__", "second", "second"], ["first"] * 3, ["__base__"] * 3):
        passes.clear()
        mixed = logits(model, "code", adapter_names=names)
        for row, name in enumerate(names):
            expected = alone[None if name == "__base__" else name][row]
            max_diff = (mixed[row] - expected).abs().max().item()
            assert max_diff < 1e-4 * expected.abs().max(), f"{names}, row {row}: max_diff {max_diff}"
        assert len(passes) == len(set(passes)), "a layer was computed more than once"
        assert names == ["__base__"] * 3 or passes, "nothing was counted"
    assert torch.equal(logits(model, "code"), alone["first"]), "the rows' adapters stayed"


@pytest.mark.parametrize("name", ["gpt2", "llama", "speech"])
def test_mixed_batches_of_every_architecture(name, folders):
    model = adapted(folders[name], name)
    model.add_adapter("second", FloraConfig(r=1, target_modules=list(LAYERS[name])))
    randomise(model, "second", seed=2)
    alone = {"__base__": logits(tiny_models.load_plain(folders[name]), name)}
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        alone[adapter] = logits(model, name)
    names = ["second", "__base__", "default"]
    mixed = logits(model, name, adapter_names=names)
    expected = torch.stack([alone[adapter][row] for row, adapter in enumerate(names)])
    assert_close(mixed, expected, alone["__base__"])


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"generation_config": {"num_beams": 2}}, {"own": 3}],
    ids=["greedy", "beams", "several beams", "beams of a configuration", "the model's own beams"],
)
@pytest.mark.parametrize("name", ["code", "speech"])
def test_generating_with_mixed_rows(name, options, folders):
    """Beams repeat the rows of the decoder only, Whisper's sequences those of the encoder too."""
    model = adapted(folders[name], name)
    model.add_adapter("second", FloraConfig(r=1, target_modules=list(LAYERS[name])))
    randomise(model, "second", seed=2)
    given = {key: value for key, value in inputs(name).items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    if "generation_config" in options:
        config = copy.deepcopy(model.get_base_model().generation_config)
        config.update(**options["generation_config"])
        options["generation_config"] = config
    model.get_base_model().generation_config.num_beams = options.pop("own", None)
    names = ["second", "__base__", "default"]
    generated = model.generate(**given, **options, adapter_names=names)
    copies = options.get("num_return_sequences", 1)
    assert generated.shape[0] == 3 * copies
    for row, adapter in enumerate(names):
        one = {key: value[row : row + 1] for key, value in given.items()}
        if adapter == "__base__":
            with model.disable_adapter():
                expected = model.generate(**one, **options)
        else:
            model.set_adapter(adapter)
            expected = model.generate(**one, **options)
        assert torch.equal(generated[row * copies : (row + 1) * copies], expected), f"row {row}, {adapter}"


def test_sampling_several_sequences_a_row(three):
    model, _ = three
    given = inputs("code")
    names = ["third", "__base__", "second"]
    generated = model.generate(**given, adapter_names=names, do_sample=True, num_return_sequences=2, max_new_tokens=2)
    assert generated.shape[0] == 6


def test_mixed_batches_with_modules_to_save(folders):
    model = adapted(folders["llama"], "llama", modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight *= 1.5
    expected, base = logits(model, "llama"), logits(tiny_models.load_plain(folders["llama"]), "llama")
    mixed = logits(model, "llama", adapter_names=["default", "__base__", "default"])
    assert_close(mixed, torch.stack([expected[0], base[1], expected[2]]), base)


@pytest.mark.parametrize(
    "names, error, message",
    [
        (["first", "nobody", "somebody"], UnknownAdapterError, "unknown adapters nobody, somebody; loaded: first, second, third"),
        (["first", "second"], RequestError, "adapter_names has 2 names for 3 rows"),
        ("first", RequestError, "adapter_names is 'first': give a list"),
        ([], RequestError, "adapter_names is empty"),
    ],
    ids=["unknown", "too few", "no list", "none"],
)
def test_names_that_cannot_be_served(three, names, error, message):
    model, alone = three
    with pytest.raises(error, match=message):
        logits(model, "code", adapter_names=names)
    assert torch.equal(logits(model, "code"), alone["first"]), "the refused names stayed"


def test_mixed_batches_are_not_trained_and_not_merged(three):
    model, _ = three
    names = ["first", "second", "third"]
    with pytest.raises(RequestError, match="in evaluation only"):
        logits(model.train(), "code", adapter_names=names)
    model.eval().merge_adapter()
    with pytest.raises(RequestError, match="while adapters are merged"):
        logits(model, "code", adapter_names=names)


# ------------------------------------------------------------------------------------------------------------- training


def loss_of(model: nn.Module, name: str = "code") -> torch.Tensor:
    given = inputs(name)
    return model(**given, labels=given.get("input_ids", given.get("decoder_input_ids"))).loss


@EVERY
def test_training_moves_the_adapter_and_nothing_else(name, folders):
    model = get_peft_model(tiny_models.load_plain(folders[name]), FloraConfig(r=2, target_modules="all-linear")).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = loss_of(model, name)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], f"the loss does not fall: {losses}"
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if ".flora_" in key}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["code", "speech"])
def test_gradient_checkpointing_changes_no_gradient(name, use_reentrant, folders):
    gradients = []
    for checkpointing in (False, True):
        base = tiny_models.load_plain(folders[name])
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model = get_peft_model(base, FloraConfig(r=2, target_modules=list(LAYERS[name]))).train()
        randomise(model)
        loss_of(model, name).backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for key, gradient in plain.items():
        assert torch.allclose(gradient, checkpointed[key], rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("name", ["code", "llama"])
def test_a_half_precision_model_has_float32_factors(name, folders):
    """The model computes and answers in its own dtype, in training and in mixed batches."""
    model = get_peft_model(tiny_models.load_plain(folders[name]).bfloat16(), FloraConfig(r=2, target_modules="all-linear"))
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    loss = loss_of(model.train(), name)
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    assert logits(model.eval(), name).dtype == logits(model, name, adapter_names=["default", "__base__", "default"]).dtype
    assert logits(model, name).dtype == torch.bfloat16


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
def test_factors_are_never_rounded_to_half_precision(autocast_adapter_dtype, low_cpu_mem_usage, folders, tmp_path):
    adapted(folders["code"], "code").save_pretrained(tmp_path)
    base = tiny_models.load_plain(folders["code"]).bfloat16()
    options = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
    model = PeftModel.from_pretrained(base, tmp_path, **options).eval()
    for name, (A, B) in read_adapter(tmp_path).factors.items():
        layer = model.get_base_model().get_submodule(name)
        assert torch.equal(layer.flora_A["default"], A) and torch.equal(layer.flora_B["default"], B), name
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert logits(model, "code").dtype == torch.bfloat16


def test_autocast(folders):
    model = adapted(folders["llama"], "llama").train()
    loss_of(model, "llama").backward()
    exact = {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, "llama").backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            cosine = torch.cosine_similarity(parameter.grad.flatten(), exact[key].flatten(), dim=0).item()
            assert parameter.grad.dtype == torch.float32 and cosine > 0.98, f"{key}: cosine {cosine}"


# ------------------------------------------------------------------------------------------------------------ quantised


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_quantised_model_from_start_to_server(quantize, wide, tmp_path):
    base_model = load_model(wide, "cpu", "float32", quantize).model
    base = logits(base_model, "code")
    model = prepare_model_for_kbit_training(base_model, use_gradient_checkpointing=quantize == "nf4")
    model = get_peft_model(model, FloraConfig(r=2, target_modules="all-linear")).train()
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=3e-2)
    losses = []
    for _ in range(6):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], f"the loss does not fall: {losses}"
    expected = logits(model.eval(), "code")
    model.save_pretrained(tmp_path)

    again = PeftModel.from_pretrained(load_model(wide, "cpu", "float32", quantize).model, tmp_path).eval()
    mixed = logits(again, "code", adapter_names=["default", "__base__", "default"])
    served = logits(again, "code")
    tolerance = 0.05  # what comes before the layer decides how int8 rounds, and evaluation before training how nf4 does
    with again.disable_adapter():
        assert_close(base + served - logits(again, "code"), expected, base, tolerance)
    assert_close(served, expected, base, tolerance)
    assert_close(mixed, torch.stack([expected[0], base[1], expected[2]]), base, tolerance)
    engine = Engine.from_pretrained(wide, {"tag": tmp_path}, device="cpu", quantize=quantize)
    with pinned_batch(engine.bank, ["tag"] * 3, "flora") as batch, engine.bank.serve(batch):
        assert_close(logits(engine.model, "code"), expected, base, tolerance)

    again.merge_adapter()
    merged = logits(again, "code")
    again.unmerge_adapter()
    assert torch.equal(logits(again, "code"), served), "not what it was before merging"
    assert torch.equal(logits(again.merge_and_unload(), "code"), merged)
    assert (merged - expected).norm() < (0.1 if quantize == "int8" else 0.5) * (expected - base).norm()


# ------------------------------------------------------------------------------------------------ without a PeftModel


def test_injected_into_a_model_that_stays_itself(folders, tmp_path):
    adapted(folders["code"], "code").save_pretrained(tmp_path)
    expected = logits(PeftModel.from_pretrained(tiny_models.load_plain(folders["code"]), tmp_path).eval(), "code")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in saved.items()}
    config = FloraConfig(r=3, target_modules=list(LAYERS["code"]))
    model = inject_adapter_in_model(config, tiny_models.load_plain(folders["code"]))
    set_peft_model_state_dict(model, tensors)
    assert torch.equal(logits(model.eval(), "code"), expected)
    again = get_peft_model_state_dict(model)
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
    by_keys = inject_adapter_in_model(config, tiny_models.load_plain(folders["code"]), state_dict=tensors)
    assert set(adapted_layers(by_keys)) == set(adapted_layers(model))


def transformers_refusal() -> str:
    """What transformers' own adapter methods say to the installed peft where they want a newer one, be it not released yet."""
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as refusal:
        return str(refusal)
    return ""


@pytest.mark.skipif(Version(peft.__version__) < Version("0.20"), reason="transformers' own adapter methods need a newer peft")
@pytest.mark.skipif(transformers_refusal() != "", reason=f"transformers {transformers.__version__}: {transformers_refusal()}")
def test_transformers_own_adapter_methods(folders, tmp_path):
    adapted(folders["code"], "code").save_pretrained(tmp_path)
    expected = logits(PeftModel.from_pretrained(tiny_models.load_plain(folders["code"]), tmp_path).eval(), "code")
    model = tiny_models.load_plain(folders["code"])
    base = logits(model, "code")
    model.load_adapter(tmp_path)
    assert torch.equal(logits(model, "code"), expected)
    model.disable_adapters()
    assert torch.equal(logits(model, "code"), base)
    model.enable_adapters()
    model.add_adapter(FloraConfig(r=2, target_modules=["c_fc"]), "second")
    model.set_adapter("second")
    assert_close(logits(model, "code"), base, expected)
