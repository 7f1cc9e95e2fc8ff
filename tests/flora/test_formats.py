"""Adapter checkpoints: PEFT's answers are ours, and every broken folder is named before anything is loaded."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import peft
import psutil
import pytest
import tiny_models
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_bank import pinned_batch

from flora import AdapterError, CheckpointError, Engine
from flora.formats import CONFIG_FILE, WEIGHTS_FILE, read_adapter, write_flora, write_lora
from flora.models import load_model

# ------------------------------------------------------------------------------------------------------ PEFT's answers

PEFT_OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"{last}": 5, r".*\.0\..*{first}": 2}},
    "alpha_pattern": {"alpha_pattern": {"{last}": 1, r".*\.1\..*{first}": 11}},
    "patterns that overlap": {"alpha_pattern": {"{last}": 1, r".*\.1\..*{last}": 11}},
    "both patterns with rslora": {"use_rslora": True, "rank_pattern": {"{last}": 6}, "alpha_pattern": {"{first}": 3}},
}


def logits(model: torch.nn.Module, name: str, rows: int = 1) -> torch.Tensor:
    """(rows, tokens, vocabulary) of a fixed input, the same in every row."""
    ids = torch.arange(2, 14).repeat(rows, 1)
    inputs = {"input_ids": ids}
    if name == "speech":
        features = torch.sin(torch.arange(20 * 100).float()).reshape(1, 20, 100).repeat(rows, 1, 1)
        inputs = {"input_features": features, "decoder_input_ids": ids}
    with torch.no_grad():
        return model(**inputs).logits


def served_logits(engine, name: str, tag: str, method: str) -> torch.Tensor:
    with pinned_batch(engine.bank, [tag], method) as batch, engine.bank.serve(batch):
        return logits(engine.model, name)


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor, base: torch.Tensor) -> None:
    max_diff, effect = (ours - theirs).abs().max().item(), (theirs - base).abs().max().item()
    assert effect > 0.1, "the adapter changes next to nothing: the test shows nothing"
    assert max_diff < 1e-3 * effect, f"max_diff {max_diff:.3g}, of an effect of {effect:.3g}"


@pytest.mark.parametrize("options", PEFT_OPTIONS)
@pytest.mark.parametrize("name", ["code", "llama", "speech"])
def test_peft_lora_is_served_as_peft_serves_it(name, options, checkpoints, tmp_path):
    made = checkpoints[name]
    first, last = made.layers[0], made.layers[-1]
    filled = {
        key: {pattern.format(first=first, last=last): number for pattern, number in value.items()} if key != "use_rslora" else value
        for key, value in PEFT_OPTIONS[options].items()
    }
    folder = tiny_models.save_peft_lora(tmp_path / "lora", made.model, made.layers, rank=3, seed=7, **filled)
    peft_model = PeftModel.from_pretrained(tiny_models.load_plain(made.model), folder).eval()
    engine = made.engine("aa")
    info = engine.add_adapter("new", folder)
    assert info.families == ("lora",) and info.layers["lora"] == len(engine.bank.layers)
    theirs, base = logits(peft_model, name), logits(tiny_models.load_plain(made.model), name)
    for method in ("bmm-lora", "loop-lora", "merged"):
        assert_same_logits(served_logits(engine, name, "new", method), theirs, base)


def test_our_lora_files_are_read_by_peft(checkpoints, tmp_path):
    made = checkpoints["llama"]
    shapes = tiny_models.target_layers(tiny_models.load_plain(made.model), made.layers)
    generator = torch.Generator().manual_seed(3)
    factors = {
        layer: (torch.randn(rank, d_in, generator=generator), torch.randn(rank, d_out, generator=generator) * 0.3)
        for rank, (layer, (d_in, d_out)) in zip(cycle((4, 3)), shapes.items(), strict=False)
    }
    write_lora(tmp_path, factors, {"target_modules": list(made.layers), "bias": "none"})
    for layer, (A, B) in read_adapter(tmp_path).factors.items():
        assert torch.equal(A, factors[layer][0]) and torch.equal(B, factors[layer][1]), "the scale is not 1"
    theirs = logits(PeftModel.from_pretrained(tiny_models.load_plain(made.model), tmp_path).eval(), "llama")
    base = logits(tiny_models.load_plain(made.model), "llama")
    engine = made.engine("aa")
    engine.add_adapter("new", tmp_path)
    assert_same_logits(served_logits(engine, "llama", "new", "bmm-lora"), theirs, base)


def test_without_lora_alpha_the_scale_is_pefts(checkpoints, tmp_path):
    made = checkpoints["llama"]
    folder = tiny_models.save_peft_lora(tmp_path / "lora", made.model, made.layers, rank=2, seed=3)
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text())
    del config["lora_alpha"]
    path.write_text(json.dumps(config))
    theirs = logits(PeftModel.from_pretrained(tiny_models.load_plain(made.model), folder).eval(), "llama")
    base = logits(tiny_models.load_plain(made.model), "llama")
    engine = made.engine("aa")
    engine.add_adapter("new", folder)
    assert_same_logits(served_logits(engine, "llama", "new", "bmm-lora"), theirs, base)


# ------------------------------------------------------------------------------------------------------------- PEFT's IA3

SAVE = {
    "code": tiny_models.save_code_model,
    "gpt2": tiny_models.save_gpt2_model,  # Conv1D
    "llama": tiny_models.save_llama_model,  # no biases
    "speech": tiny_models.save_speech_model,
}
ALL_LAYERS = {
    "code": tiny_models.CODE_LAYERS,
    "gpt2": tiny_models.CODE_LAYERS,
    "llama": tiny_models.LLAMA_LAYERS,
    "speech": tiny_models.SPEECH_LAYERS,
}
FEED_FORWARD = {"code": ["c_fc", "c_proj"], "gpt2": ["c_fc", "c_proj"], "llama": ["down_proj"], "speech": ["fc1", "fc2"]}


def save_peft_ia3(folder: Path, model_folder: Path, seed: int = 0, **options) -> torch.nn.Module:
    """An IA3 checkpoint made and saved by PEFT, with scales far from one; PEFT's model, in evaluation mode."""
    torch.manual_seed(seed)
    peft_model = get_peft_model(tiny_models.load_plain(model_folder), IA3Config(**options)).eval()
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "ia3_l" in name:
                parameter.normal_(1.0, 0.3)
    peft_model.save_pretrained(folder)
    return peft_model


@pytest.fixture(scope="module")
def ia3_models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ia3")
    return {name: save(root / name) for name, save in SAVE.items()}


@pytest.mark.parametrize(
    "name, scaled",
    [(name, scaled) for name in SAVE for scaled in ("outputs", "inputs", "both")]
    + [(name, "PEFT's default") for name in ("code", "gpt2", "llama")],  # there is none for Whisper
)
def test_peft_ia3_is_served_as_peft_serves_it(name, scaled, ia3_models, tmp_path):
    """PEFT scales a layer's whole output, its bias too; all four kinds of linear layers here have biases, but Llama's."""
    layers, feed_forward = ALL_LAYERS[name], FEED_FORWARD[name]
    options = {
        "outputs": {"target_modules": list(layers), "feedforward_modules": []},
        "inputs": {"target_modules": feed_forward, "feedforward_modules": feed_forward},
        "both": {"target_modules": list(layers), "feedforward_modules": feed_forward},
        "PEFT's default": {},
    }[scaled]
    peft_model = save_peft_ia3(tmp_path / "ia3", ia3_models[name], **options)
    engine = Engine.from_pretrained(ia3_models[name], {"ia3": tmp_path / "ia3"}, device="cpu")
    info = engine.adapters["ia3"]
    assert info.families == ("flora",) and info.ranks == {"flora": 1}
    trained = [parameter for key, parameter in peft_model.named_parameters() if "ia3_l" in key]
    assert info.size_bytes == 4 * sum(parameter.numel() for parameter in trained) and info.layers == {"flora": len(trained)}
    theirs, base = logits(peft_model, name), logits(tiny_models.load_plain(ia3_models[name]), name)
    for method in ("flora", "flora-expand", "flora-modulate", "merged"):
        assert_same_logits(served_logits(engine, name, "ia3", method), theirs, base)


@pytest.mark.parametrize("name", ["code", "gpt2", "speech"])
def test_ia3_beside_flora_and_no_adapter_in_one_batch(name, ia3_models, tmp_path):
    """Rows of one batch have biases of their own: scaled by IA3, the layer's own for fLoRA and for no adapter."""
    model = tiny_models.load_plain(ia3_models[name])
    layers = ALL_LAYERS[name]
    options = {"target_modules": list(layers), "feedforward_modules": FEED_FORWARD[name][:1]}
    peft_models = [save_peft_ia3(tmp_path / f"ia3-{seed}", ia3_models[name], seed, **options) for seed in (1, 2)]
    flora = tiny_models.save_flora_adapter(tmp_path / "flora", model, layers, rank=3, seed=3)
    sources = {"first": tmp_path / "ia3-1", "second": tmp_path / "ia3-2", "flora": flora}
    engine = Engine.from_pretrained(ia3_models[name], sources, device="cpu")
    tags = ["second", None, "flora", "first", "second"]
    alone = {"first": peft_models[0], "second": peft_models[1], "flora": tiny_models.load_merged(ia3_models[name], flora)}
    truth = torch.cat([logits(alone.get(tag, model), name) for tag in tags])
    for method in ("flora", "flora-expand", "flora-modulate"):
        with pinned_batch(engine.bank, tags, method) as batch, engine.bank.serve(batch):
            served = logits(engine.model, name, rows=len(tags))
        max_diff = (served - truth).abs().amax((1, 2))
        assert max_diff.max() < 1e-4 * truth.abs().max(), f"{method}: max_diff by row {max_diff.tolist()}"


def test_a_slot_that_held_ia3_has_the_layers_own_bias_again(ia3_models, tmp_path):
    save_peft_ia3(tmp_path / "ia3", ia3_models["gpt2"], target_modules=["c_fc"], feedforward_modules=[])
    flora = tiny_models.save_flora_adapter(tmp_path / "flora", tiny_models.load_plain(ia3_models["gpt2"]), ("c_fc",), 2, 0)
    engine = Engine.from_pretrained(ia3_models["gpt2"], {"tag": tmp_path / "ia3"}, device="cpu")
    first_slot = engine.bank.pin("tag", "flora")
    engine.bank.unpin(first_slot)
    engine.remove_adapter("tag")
    engine.add_adapter("tag", flora)
    assert first_slot == engine.bank.pin("tag", "flora"), "the slot was not used again: the test shows nothing"
    truth = logits(tiny_models.load_merged(ia3_models["gpt2"], flora), "gpt2")
    assert_same_logits(
        served_logits(engine, "gpt2", "tag", "flora"), truth, logits(tiny_models.load_plain(ia3_models["gpt2"]), "gpt2")
    )


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_ia3_on_a_quantised_model(quantize, tmp_path):
    """The base layer adds its own bias and knows no other way: what is scaled is that bias too."""
    folder = tiny_models.save_code_model(tmp_path / "wide", width=64, inner_width=128)
    save_peft_ia3(tmp_path / "ia3", folder, target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"])
    engine = Engine.from_pretrained(folder, {"ia3": tmp_path / "ia3"}, device="cpu", quantize=quantize)
    theirs = PeftModel.from_pretrained(load_model(folder, "cpu", "float32", quantize).model, tmp_path / "ia3").eval()
    base = logits(load_model(folder, "cpu", "float32", quantize).model, "code")
    served, truth = served_logits(engine, "code", "ia3", "flora"), logits(theirs, "code")
    effect, max_diff = (truth - base).abs().max().item(), (served - truth).abs().max().item()
    assert max_diff < 0.02 * effect, f"max_diff {max_diff:.3g}, of an effect of {effect:.3g}"


@pytest.fixture
def ia3_folder(ia3_models, tmp_path) -> Path:
    save_peft_ia3(tmp_path / "my-ia3", ia3_models["code"], target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"])
    return tmp_path / "my-ia3"


IA3_KEY = "base_model.model.transformer.h.1.mlp.c_fc.ia3_l"


@pytest.mark.parametrize("shape", [(48,), (1, 1), (2, 48), (1, 0), (48, 1, 1, 1)], ids=str)
def test_ia3_that_scales_no_linear_layer(ia3_folder, shape):
    change_tensors(ia3_folder, lambda tensors: tensors.update({IA3_KEY: torch.ones(shape)}))
    assert_refused(ia3_folder, rf"layer transformer.h.1.mlp.c_fc has a scale of shape {re.escape(str(shape))}")


def test_ia3_of_another_width(ia3_models, ia3_folder):
    change_tensors(ia3_folder, lambda tensors: tensors.update({IA3_KEY: torch.ones(1, 50)}))
    with pytest.raises(AdapterError, match=r"does not fit layer transformer.h.1.mlp.c_fc: it maps 50 → 80, the model's .* 48 → 80"):
        Engine.from_pretrained(ia3_models["code"], {"ia3": ia3_folder}, device="cpu")


def test_ia3_with_tensors_of_another_kind(ia3_folder):
    change_tensors(ia3_folder, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(3, 4)}))
    assert_refused(ia3_folder, "tensor base_model.model.lm_head.weight is of no supported kind")


def test_ia3_that_replaces_whole_modules(ia3_models, tmp_path):
    options = {"target_modules": ["c_attn"], "feedforward_modules": [], "modules_to_save": ["ln_f"]}
    save_peft_ia3(tmp_path / "my-ia3", ia3_models["code"], **options)
    assert_refused(tmp_path / "my-ia3", r"replaces whole modules \(modules_to_save=\['ln_f'\]\)")


# ------------------------------------------------------------------------------------------- LoRA with a bias, and HiRA


def save_biased_lora(folder: Path, model_folder: Path, layers: tuple[str, ...], rank: int = 2, **options) -> Path:
    with warnings.catch_warnings():  # PEFT takes a bias for a matrix that was cut
        warnings.filterwarnings("ignore", message=".*invalid shape")
        return tiny_models.save_peft_lora(folder, model_folder, layers, rank=rank, seed=3, lora_bias=True, **options)


@pytest.fixture
def biased_lora(checkpoints, tmp_path) -> Path:
    return save_biased_lora(tmp_path / "my-lora", checkpoints["code"].model, ("c_fc",))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"c_fc": 7}}], ids=str)
def test_a_lora_bias_is_scaled_as_b_is(options, checkpoints, tmp_path):
    folder = save_biased_lora(tmp_path / "lora", checkpoints["code"].model, ("c_fc",), **options)
    adapter, stored = read_adapter(folder), load_file(folder / WEIGHTS_FILE)
    scale = {"use_rslora": 4 / 2**0.5, "alpha_pattern": 7 / 2}.get(next(iter(options), ""), 2.0)
    for layer, bias in adapter.added_biases.items():
        key = f"base_model.model.{layer}.lora_B"
        assert torch.allclose(bias, scale * stored[f"{key}.bias"]) and bias.abs().max() > 0.1
        assert torch.allclose(adapter.factors[layer][1], scale * stored[f"{key}.weight"].T)
    assert adapter.added_biases.keys() == adapter.factors.keys()
    assert adapter.num_parameters == sum(tensor.numel() for tensor in stored.values())


@pytest.mark.parametrize("change", ["missing", "wide", "matrix", "alone", "unpromised"])
def test_a_lora_bias_that_does_not_fit_is_refused(biased_lora, change):
    key = f"base_model.model.{LAYER}.lora_B.bias"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        bias = tensors.pop(key)
        if change == "alone":
            tensors["base_model.model.transformer.h.7.mlp.c_fc.lora_B.bias"] = bias.clone()
        if change != "missing":
            tensors[key] = {"wide": torch.cat([bias, bias]), "matrix": bias[None]}.get(change, bias)

    change_tensors(biased_lora, spoil)
    if change == "unpromised":
        set_config(biased_lora, lora_bias=False)
    message = {
        "missing": rf"layer {LAYER} has no bias, and lora_bias promises one of shape \(80,\)",
        "wide": rf"layer {LAYER} has a bias of shape \(160,\)",
        "matrix": rf"layer {LAYER} has a bias of shape \(1, 80\)",
        "alone": r"layer transformer\.h\.7\.mlp\.c_fc has a bias and no factors",
        "unpromised": r"tensor .*lora_B\.bias is of no supported kind",
    }[change]
    assert_refused(biased_lora, message)


def test_hira_is_flora_with_one_more_component_of_ones(hira_folder):
    adapter, stored = read_adapter(hira_folder), load_file(hira_folder / WEIGHTS_FILE)
    assert (adapter.family, adapter.peft_type, adapter.rank) == ("flora", "HIRA", 4)
    for layer, (A, B) in adapter.factors.items():
        key = f"base_model.model.{layer}.hira_"
        modulation = 1 + stored[f"{key}B"] @ stored[f"{key}A"]  # (d_out, d_in)
        assert torch.allclose(B.T @ A, modulation, atol=1e-6) and A.shape[0] == B.shape[0] == 4
        assert A[0].eq(1).all() and B[0].eq(1).all()
    assert not adapter.scaled_biases and not adapter.added_biases


@pytest.fixture(scope="module")
def hira_folder(checkpoints, tmp_path_factory) -> Path:
    if not hasattr(peft, "HiraConfig"):
        pytest.skip("HiRA came with PEFT 0.20")
    folder = tmp_path_factory.mktemp("hira") / "my-hira"
    config = peft.HiraConfig(r=3, target_modules=["c_fc"], init_weights=False)
    get_peft_model(tiny_models.load_plain(checkpoints["code"].model), config).save_pretrained(folder)
    return folder


def test_only_the_authors_layout_holds_several(hira_folder):
    assert_refused(Path(f"{hira_folder}#1"), "my-hira holds one adapter: leave #1 out")


# --------------------------------------------------------------------------------------------------- the authors' layout


def save_authors(folder: Path, rank: int, count: int, **config) -> dict[str, torch.Tensor]:
    """A checkpoint as trishullab/flora saves it, on two layers of the tiny GPTBigCode: layer → (r, adapters, d) of both sides."""
    generator = torch.Generator().manual_seed(rank + count)
    tensors, sides = {}, {}
    for layer, widths in (("transformer.h.0.attn.c_attn", (48, 72)), (LAYER, (48, 80))):
        for name, width in zip(("be_alpha", "be_gamma"), widths, strict=True):
            side = 1 + 0.3 * torch.randn(rank, count, width, generator=generator)
            sides[f"{layer}.{name}"] = side
            tensors[f"base_model.model.{layer}.{name}.weight"] = (side[0] if rank == 1 else side).contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS_FILE)
    about = {"peft_type": "FLora", "r": rank, "num_heads": count, "bias": "none", "base_model_name_or_path": "bigcode/code"}
    (folder / CONFIG_FILE).write_text(json.dumps(about | config))
    return sides


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_authors_layout_is_the_mean_over_its_components(rank, count, checkpoints, tmp_path):
    sides = save_authors(tmp_path / "theirs", rank, count)
    engine, name = checkpoints["code"].engine(), "code"
    base = logits(tiny_models.load_plain(checkpoints["code"].model), name)
    for index in range(count):
        source = tmp_path / "theirs" if count == 1 else f"{tmp_path / 'theirs'}#{index}"
        info = engine.add_adapter(f"theirs-{index}", source)
        assert (info.families, info.ranks, info.layers) == (("flora",), {"flora": rank}, {"flora": 2})
        model = tiny_models.load_plain(checkpoints["code"].model)
        with torch.no_grad():
            for layer in ("transformer.h.0.attn.c_attn", LAYER):
                alpha, gamma = (sides[f"{layer}.{side}"][:, index] for side in ("be_alpha", "be_gamma"))
                model.get_submodule(layer).weight *= torch.einsum("ko,ki->oi", gamma, alpha) / rank
        for method in ("flora", "mixed", "merged"):
            assert_same_logits(served_logits(engine, name, f"theirs-{index}", method), logits(model, name), base)


def test_the_authors_layout_is_read_strictly(tmp_path):
    def refused(message: str, which: str = "", change: Callable | None = None, rank: int = 2, count: int = 3, **config) -> None:
        shutil.rmtree(tmp_path / "theirs", ignore_errors=True)
        save_authors(tmp_path / "theirs", rank, count, **config)
        if change is not None:
            change_tensors(tmp_path / "theirs", change)
        assert_refused(Path(f"{tmp_path / 'theirs'}{which}"), message)

    key = f"base_model.model.{LAYER}.be_gamma.weight"
    refused(r"theirs holds 3 adapters: name one of .*theirs#0 to .*theirs#2")
    refused("theirs holds 3 adapters, counted from 0, and no #3", "#3")
    refused("theirs holds 1 adapters, counted from 0, and no #1", "#1", count=1)
    refused("trains the base model's biases", "#0", bias="be_only")
    refused("replaces whole modules", "#0", modules_to_save=["lm_head"])
    refused(f"layer {LAYER} lacks its B side", "#0", lambda tensors: tensors.pop(key))
    refused(f"layer {LAYER} has rank 2 on its A side and 3", "#0", lambda tensors: tensors.update({key: torch.ones(3, 3, 80)}))
    refused(f"layer {LAYER} has 3 adapters on its A side and 2", "#0", lambda tensors: tensors.update({key: torch.ones(2, 2, 80)}))
    refused("factors of 3 and 1 dimensions, not 2 or 3", "#0", lambda tensors: tensors.update({key: torch.ones(80)}))
    refused("is of no supported kind", "#0", lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(3)}))


def test_a_folder_whose_name_ends_as_an_index_is_that_folder(checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints["code"].adapters["aa"]["flora"], tmp_path / "version#2"))
    assert read_adapter(folder).rank == 1


# ------------------------------------------------------------------------------------------------------ our own format


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_flora_round_trip(combine, dtype, tmp_path):
    """What is written comes back in float32; a mean over components is folded into B."""
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"h.{layer}.fc": (torch.randn(rank, 6, generator=generator).to(dtype), torch.randn(rank, 4, generator=generator).to(dtype))
        for layer, rank in enumerate((1, 3, 8))
    }
    write_flora(tmp_path, factors, {"r": 8, "combine": combine, "base_model_name_or_path": "some/model"})
    adapter = read_adapter(tmp_path)
    assert (adapter.family, adapter.base_model, adapter.rank) == ("flora", "some/model", 8)
    assert adapter.num_parameters == (1 + 3 + 8) * 10
    assert adapter.factors.keys() == factors.keys()
    for layer, (A, B) in factors.items():
        read_A, read_B = adapter.factors[layer]
        assert read_A.dtype == read_B.dtype == torch.float32
        assert torch.equal(read_A, A.float())
        assert torch.allclose(read_B * (len(B) if combine == "mean" else 1), B.float(), rtol=1e-6)
        modulation = torch.stack([torch.outer(b, a) for a, b in zip(A.float(), B.float(), strict=True)])  # (r, d_out, d_in)
        expected = modulation.sum(0) if combine == "sum" else modulation.mean(0)
        max_diff = (read_B.T @ read_A - expected).abs().max().item()
        assert max_diff < 1e-5, f"{layer}: max_diff {max_diff:.3g}"


@pytest.mark.parametrize("tag", ["aa", "bb", "cc"])
@pytest.mark.parametrize("name", ["code", "llama", "speech"])
def test_flora_is_served_as_its_merged_weights(name, tag, checkpoints, tiny_engines):
    """Ranks 1, 3 (trained with the mean) and 8, against a merge that shares no code with ours."""
    made = checkpoints[name]
    truth = logits(tiny_models.load_merged(made.model, made.adapters[tag]["flora"]), name)
    base = logits(tiny_models.load_plain(made.model), name)
    for method in ("flora", "flora-expand", "flora-modulate", "merged"):
        assert_same_logits(served_logits(tiny_engines[name], name, tag, method), truth, base)


# ------------------------------------------------------------------------------------------------------ broken folders


LAYER = "transformer.h.1.mlp.c_fc"
FACTORS = {
    "lora": ("lora_A.weight", "lora_B.weight"),
    "flora": ("flora_A", "flora_B"),
    "hira": ("hira_A", "hira_B"),
    "ia3": ("ia3_l", "ia3_l"),
    "authors": ("be_alpha.weight", "be_gamma.weight"),
}
KEY = {
    kind: {side: f"base_model.model.{LAYER}.{factor}" for side, factor in zip("AB", sides, strict=True)}
    for kind, sides in FACTORS.items()
}


@pytest.fixture
def folder_of(checkpoints, tmp_path, request) -> Callable[[str], Path]:
    """A copy, to be broken, of a good checkpoint of a kind."""

    def copy(kind: str) -> Path:
        folder = tmp_path / f"my-{kind}"
        if kind == "ia3":
            request.getfixturevalue("ia3_folder")
        elif kind == "authors":
            save_authors(folder, rank=2, count=1)
        elif kind == "hira":
            shutil.copytree(request.getfixturevalue("hira_folder"), folder)
        else:
            made = checkpoints["code"].adapters
            shutil.copytree({"lora": made["aa"]["lora"], "flora": made["bb"]["flora"]}[kind], folder)
        return folder

    return copy


@pytest.fixture
def folder(kind, folder_of) -> Path:
    return folder_of(kind)


@pytest.fixture
def folders(folder_of) -> dict[str, Path]:
    """Copies of a good LoRA (rank 8) and a good fLoRA (rank 3) checkpoint, to be broken."""
    return {family: folder_of(family) for family in ("lora", "flora")}


def assert_refused(folder: Path, message: str) -> None:
    """The error names the folder by its last part and never tells where the server keeps it, and it is one line."""
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(folder)
    said = str(caught.value)
    assert folder.name.partition("#")[0] in said and "\n" not in said
    assert str(folder) not in said and str(folder.parent) not in said, f"tells a path: {said}"


def set_config(folder: Path, **values) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize("kind", FACTORS)
def test_the_copies_are_good(kind, folder_of):
    adapter = read_adapter(folder_of(kind))
    assert adapter.family == ("lora" if kind == "lora" else "flora") and LAYER in adapter.factors


@pytest.mark.parametrize("kind", FACTORS)
class TestBrokenFiles:
    def test_no_such_folder(self, kind, tmp_path):
        assert_refused(tmp_path / "nowhere", "there is no such folder")

    def test_an_over_long_name(self, kind):
        with pytest.raises(CheckpointError, match="there is no such folder"):
            read_adapter("x" * 5000)
        with pytest.raises(CheckpointError, match="there is no such folder"):
            read_adapter(f"{'x' * 300}#1")
        with pytest.raises(CheckpointError, match="there is no such folder"):
            read_adapter(f"{'x' * 300}/a/b")

    def test_a_file_instead_of_a_folder(self, kind, folder):
        assert_refused(folder / CONFIG_FILE, "is a file; give the folder")

    def test_no_config(self, kind, folder):
        (folder / CONFIG_FILE).unlink()
        assert_refused(folder, "adapter_config.json is missing")

    @pytest.mark.parametrize(
        "content",
        [b"{", b"", b"\xff\xfe\xfa", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}"],
        ids=["cut", "empty", "not text", "nested", "a number without end"],
    )
    def test_broken_json(self, kind, folder, content):
        (folder / CONFIG_FILE).write_bytes(content)
        assert_refused(folder, "adapter_config.json is not valid JSON")

    def test_a_config_that_may_not_be_read(self, kind, folder, monkeypatch):
        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied", str(folder / CONFIG_FILE))

        monkeypatch.setattr(Path, "read_text", refuse)
        assert_refused(folder, r"adapter_config.json cannot be read \(PermissionError\)")

    @pytest.mark.parametrize("content", ["[]", "3", "null", '"LORA"'])
    def test_json_that_is_no_object(self, kind, folder, content):
        (folder / CONFIG_FILE).write_text(content)
        assert_refused(folder, "not a JSON object")

    def test_no_peft_type(self, kind, folder):
        set_config(folder, peft_type=None)
        assert_refused(folder, "has no peft_type")

    @pytest.mark.parametrize(
        "peft_type", ["OFT", "PREFIX_TUNING", "LOHA", "ADALORA", "VERA", "lora", "flora", 5, ["LORA"], "X" * 500, "a\nb"]
    )
    def test_an_unsupported_type(self, kind, folder, peft_type):
        set_config(folder, peft_type=peft_type)
        assert_refused(folder, r"PEFT type .* cannot be served per row; LoRA, IA3, HiRA and fLoRA can")

    def test_no_weights(self, kind, folder):
        (folder / WEIGHTS_FILE).unlink()
        assert_refused(folder, "adapter_model.safetensors is missing")

    @pytest.mark.parametrize("size", [0, 4, 200, -8])
    def test_truncated_weights(self, kind, folder, size):
        path = folder / WEIGHTS_FILE
        path.write_bytes(path.read_bytes()[:size])
        assert_refused(folder, "truncated or not a safetensors file")

    def test_no_tensors(self, kind, folder):
        change_tensors(folder, lambda tensors: tensors.clear())
        assert_refused(folder, "holds no adapter weights")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_weights_that_are_not_finite(self, kind, folder, value):
        def spoil(tensors: dict[str, torch.Tensor]) -> None:
            tensors[KEY[kind]["B"]][0, 0] = value

        change_tensors(folder, spoil)
        assert_refused(folder, rf"tensor .*{LAYER}.* has NaN or infinite weights")

    def test_weights_too_large_for_single_precision(self, kind, folder):
        key = KEY[kind]["A"]
        change_tensors(folder, lambda tensors: tensors.update({key: tensors[key].double() * 1e300}))
        assert_refused(folder, rf"tensor .*{LAYER}.* has NaN or infinite weights")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
    def test_integer_weights(self, kind, folder, dtype):
        key = KEY[kind]["A"]
        change_tensors(folder, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
        assert_refused(folder, f"tensor {key} is {dtype}, not floating point")

    @pytest.mark.parametrize(
        "key",
        ["base_model.model.lm_head.weight", "base_model.model.transformer.wte.lora_embedding_A", f"base_model.model.{LAYER}.bias"],
    )
    def test_tensors_of_another_kind(self, kind, folder, key):
        change_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(3, 4)}))
        assert_refused(folder, f"tensor {key} is of no supported kind")


@pytest.mark.parametrize("kind", ["lora", "flora", "hira"])
class TestBrokenSides:
    @pytest.mark.parametrize("side", ["A", "B"])
    def test_a_missing_side(self, kind, folder, side):
        change_tensors(folder, lambda tensors: tensors.pop(KEY[kind][side]))
        assert_refused(folder, f"layer {LAYER} lacks its {side} side")

    @pytest.mark.parametrize("side", ["A", "B"])
    def test_sides_of_different_rank(self, kind, folder, side):
        def cut(tensors: dict[str, torch.Tensor]) -> None:
            key = KEY[kind][side]
            columns = kind != "flora" and side == "B"
            tensors[key] = (tensors[key][:, :-1] if columns else tensors[key][:-1]).contiguous()

        change_tensors(folder, cut)
        assert_refused(folder, f"layer {LAYER} has rank . on its A side and . on its B side")

    def test_rank_0(self, kind, folder):
        def empty(tensors: dict[str, torch.Tensor]) -> None:
            for side, key in KEY[kind].items():
                tensors[key] = (tensors[key][:, :0] if kind != "flora" and side == "B" else tensors[key][:0]).contiguous()

        change_tensors(folder, empty)
        assert_refused(folder, f"layer {LAYER} has rank 0")

    @pytest.mark.parametrize("shape", [(8,), (2, 2, 2), ()], ids=str)
    def test_factors_that_are_no_matrices(self, kind, folder, shape):
        change_tensors(folder, lambda tensors: tensors.update({KEY[kind]["A"]: torch.zeros(shape)}))
        assert_refused(folder, f"layer {LAYER} has factors of {len(shape)} and 2 dimensions")


@pytest.mark.parametrize("combine", [None, "max", 2, ["sum"]])
def test_flora_that_does_not_say_how_components_combine(folders, combine):
    set_config(folders["flora"], combine=combine)
    assert_refused(folders["flora"], "'sum' or the 'mean'")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"use_dora": True}, "uses DoRA.*LoRA, IA3, HiRA and fLoRA can"),
        ({"use_qalora": True}, "uses QALoRA"),
        ({"alora_invocation_tokens": [1, 2]}, "uses aLoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "uses block-diagonal LoRA"),
        ({"kasa_config": {"beta": 1.0}}, "uses KaSA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "uses replicated layers"),
        ({"bias": "all"}, "trains the base model's biases"),
        ({"bias": "lora_only"}, "trains the base model's biases"),
        ({"modules_to_save": ["lm_head"]}, r"replaces whole modules \(modules_to_save=\['lm_head'\]\)"),
        ({"modules_to_save": "lm_head"}, r"replaces whole modules \(modules_to_save='lm_head'\)"),
        ({"modules_to_save": [1]}, "replaces whole modules"),
        ({"lora_alpha": None}, "lora_alpha of layer .* is None, not a finite number"),
        ({"lora_alpha": "16"}, "lora_alpha of layer .* is '16', not a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha of layer .* is nan, not a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha of layer .* is 10+.*, not a finite number"),
        ({"alpha_pattern": {"c_fc": [2]}}, r"lora_alpha of layer .*c_fc is \[2\], not a finite number"),
        ({"alpha_pattern": ["c_fc"]}, "alpha_pattern is not an object"),
        ({"alpha_pattern": {"c_fc(": 2}}, r"alpha_pattern 'c_fc\(' is not a regular expression"),
        ({"alpha_pattern": {"x{99999999999}": 4}}, r"alpha_pattern 'x\{9+\}' is not a regular expression"),
    ],
    ids=str,
)
def test_lora_that_is_not_plain(folders, values, message):
    set_config(folders["lora"], **values)
    assert_refused(folders["lora"], message)


@pytest.mark.parametrize("option", ["modules_to_save", "bias", "lora_alpha", "peft_type"])
@pytest.mark.parametrize("value", ["x" * 1000, ["x" * 1000] * 100, [[[["x" * 50] * 6] * 6] * 6] * 6], ids=["long", "wide", "deep"])
def test_what_is_quoted_is_short(folders, option, value):
    set_config(folders["lora"], **{option: value})
    assert_refused(folders["lora"], "^.{1,300}$")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_lora_trained_on_a_changed_base_is_refused(checkpoints, tmp_path, start):
    """PEFT subtracts the start from the base weights; on the plain base the same factors give other answers."""
    made = checkpoints["llama"]
    config = LoraConfig(r=2, target_modules=list(made.layers), init_lora_weights=start)
    get_peft_model(tiny_models.load_plain(made.model), config).save_pretrained(tmp_path / "my-lora")
    assert_refused(tmp_path / "my-lora", f"its start \\({start}\\) had changed")


def test_dora_made_by_peft_is_refused(checkpoints, tmp_path):
    made = checkpoints["llama"]
    folder = tiny_models.save_peft_lora(tmp_path / "dora", made.model, made.layers, rank=2, seed=0, use_dora=True)
    assert_refused(folder, "uses DoRA")


def test_an_exotic_precision_is_refused_by_name(folders):
    key = KEY["lora"]["A"]
    change_tensors(folders["lora"], lambda tensors: tensors.update({key: tensors[key].view(torch.float8_e8m0fnu)}))
    assert_refused(folders["lora"], "holds F8_E8M0, not floating point of 8 to 64 bits")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_lower_precisions_are_read(folders, dtype):
    key = KEY["lora"]["A"]
    A = load_file(folders["lora"] / WEIGHTS_FILE)[key].to(dtype)
    change_tensors(folders["lora"], lambda tensors: tensors.update({key: A}))
    read_A, _ = read_adapter(folders["lora"]).factors[LAYER]
    assert read_A.dtype == torch.float32 and torch.equal(read_A, A.float())


# -------------------------------------------------------------------------------------------------------------- pickles


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin"])
def test_a_pickle_is_never_opened(folders, file, tmp_path):
    folder, trap = folders["lora"], tmp_path / "trapped"
    (folder / WEIGHTS_FILE).unlink()
    (folder / file).write_bytes(pickle.dumps(Malicious(trap)))
    assert_refused(folder, rf"has its weights in {file}, a pickle, and pickles are never loaded; save it as safetensors")
    assert not trap.exists(), "the pickle was run"
    pickle.loads((folder / file).read_bytes()).close()
    assert trap.exists(), "the trap does not work: the test shows nothing"


def test_a_pickle_under_the_safe_name_is_not_opened_either(folders, tmp_path):
    folder, trap = folders["lora"], tmp_path / "trapped"
    (folder / WEIGHTS_FILE).write_bytes(pickle.dumps(Malicious(trap)))
    assert_refused(folder, "truncated or not a safetensors file")
    assert not trap.exists(), "the pickle was run"


def test_a_pickle_beside_safe_weights_is_ignored(folders, tmp_path):
    folder, trap = folders["lora"], tmp_path / "trapped"
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Malicious(trap)))
    assert read_adapter(folder).family == "lora"
    assert not trap.exists(), "the pickle was run"


# ---------------------------------------------------------------------------------------------------------- the hub, off


def test_a_hub_id_without_a_network_is_an_error_that_says_so():
    with pytest.raises(CheckpointError, match=r"adapter someone/some-adapter is neither a folder here nor readable on the hub"):
        read_adapter("someone/some-adapter")


# ----------------------------------------------------------------------------------------------------- through the engine


def test_a_broken_checkpoint_leaves_the_engine_as_it_was(checkpoints, folders):
    """Of a tag's two checkpoints the second is broken, or was made for another model."""
    engine = checkpoints["code"].engine("aa")
    before = engine.adapters
    change_tensors(folders["lora"], lambda tensors: tensors.pop(KEY["lora"]["B"]))
    with pytest.raises(CheckpointError, match="lacks its B side"):
        engine.add_adapter("aa", [folders["flora"], folders["lora"]])
    with pytest.raises(AdapterError, match="which this model does not have"):
        engine.add_adapter("new", checkpoints["llama"].adapters["aa"]["lora"])
    assert engine.adapters == before


def test_an_adapter_of_a_wider_model_does_not_fit(checkpoints, folders):
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[KEY["flora"]["A"]] = torch.ones(3, 50)

    change_tensors(folders["flora"], widen)
    engine = checkpoints["code"].engine("aa")
    with pytest.raises(AdapterError, match=rf"'new' does not fit layer {LAYER}: it maps 50 → 80, the model's layer maps 48 → 80"):
        engine.add_adapter("new", folders["flora"])


def test_reading_keeps_nothing(tmp_path):
    """Adapters are read again and again while an engine serves: what a read leaves behind adds up."""
    write_lora(tmp_path, {f"layers.{number}.c": (torch.ones(1, 4), torch.ones(1, 4)) for number in range(100)}, {"lora_alpha": 1})
    process, sizes = psutil.Process(), []
    for _ in range(2):
        for _ in range(200):
            read_adapter(tmp_path)
        sizes.append(process.memory_info().rss)
    assert sizes[1] - sizes[0] < 1 << 20, f"{sizes[1] - sizes[0]} bytes after 200 reads"
