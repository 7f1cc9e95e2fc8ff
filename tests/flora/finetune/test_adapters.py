"""Which layers a recipe adapts and how; what is written of it, and where nothing is."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import tiny_models
import torch
from peft import PeftModel
from safetensors.torch import load_file

from flora.errors import TrainingError
from flora.finetune.adapters import (
    add_adapter,
    linear_layers,
    refuse_used_output,
    remove_adapter,
    round_to_half,
    whole_or_nothing,
    write_adapter,
)
from flora.finetune.recipe import Recipe

EVERY_LAYER = {"code": tiny_models.CODE_LAYERS, "llama": tiny_models.LLAMA_LAYERS, "speech": tiny_models.SPEECH_LAYERS}


def recipe_for(model, kind="code", method="flora", **options) -> Recipe:
    return Recipe(kind, "lua", model="tiny", method=method, **options).for_model(model)


def adapted(model: PeftModel) -> set[str]:
    return {name for name, module in model.get_base_model().named_modules() if hasattr(module, "base_layer")}


@pytest.mark.parametrize("method", ["flora", "lora", "ia3"])
@pytest.mark.parametrize("name", ["code", "llama", "speech"])
def test_all_linear_layers_but_the_output_head(name, method, checkpoints):
    base = tiny_models.load_plain(checkpoints[name].model)
    everything = set(linear_layers(base))
    assert {layer.rpartition(".")[2] for layer in everything} == set(EVERY_LAYER[name])
    model = add_adapter(recipe_for(base, "speech" if name == "speech" else "code", method), base)
    assert adapted(model) == everything
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all({"flora": ".flora_", "lora": ".lora_", "ia3": ".ia3_"}[method] in key for key in trained)


@pytest.mark.parametrize("method", ["flora", "lora", "ia3"])
def test_the_default_layers_are_pefts(method, checkpoints):
    base = tiny_models.load_plain(checkpoints["code"].model)
    model = add_adapter(recipe_for(base, method=method, target_layers=("default",)), base)
    expected = {"c_attn", "mlp.c_proj"} if method == "ia3" else {"c_attn"}
    assert set(model.peft_config["default"].target_modules) == expected


def test_named_layers_alone_are_adapted(checkpoints):
    base = tiny_models.load_plain(checkpoints["code"].model)
    model = add_adapter(recipe_for(base, target_layers=("mlp.c_proj", "c_fc")), base)
    assert {name.rpartition("h.")[2][2:] for name in adapted(model)} == {"mlp.c_proj", "mlp.c_fc"}


def test_an_unknown_layer_is_refused_with_those_there_are(checkpoints):
    base = tiny_models.load_plain(checkpoints["code"].model)
    with pytest.raises(TrainingError, match="model tiny has no linear layer 'q_proj'; there are c_attn, c_fc, c_proj: name some"):
        add_adapter(recipe_for(base, target_layers=("c_attn", "q_proj")), base)


def test_an_architecture_without_default_layers_says_so(checkpoints):
    base = tiny_models.load_plain(checkpoints["speech"].model)
    with pytest.raises(TrainingError, match="PEFT knows no default layers of whisper for ia3: give --target-layers all, or names"):
        add_adapter(recipe_for(base, "speech", "ia3", target_layers=("default",)), base)


@pytest.mark.parametrize(("name", "at_input"), [("code", "mlp.c_proj"), ("llama", "mlp.down_proj"), ("speech", "fc2")])
def test_ia3_scales_the_input_of_the_feed_forward_blocks_last_layer_alone(name, at_input, checkpoints):
    base = tiny_models.load_plain(checkpoints[name].model)
    model = add_adapter(recipe_for(base, "speech" if name == "speech" else "code", "ia3"), base)
    layers = {key: module for key, module in model.named_modules() if hasattr(module, "is_feedforward")}
    assert {key for key, layer in layers.items() if layer.is_feedforward} == {key for key in layers if key.endswith(at_input)}


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_transposed_layers_are_told_to_peft(method, tmp_path, recwarn):
    base = tiny_models.load_plain(tiny_models.save_gpt2_model(tmp_path / "gpt2"))
    model = add_adapter(recipe_for(base, method=method), base)
    assert model.peft_config["default"].fan_in_fan_out
    assert not [warning for warning in recwarn if "fan_in_fan_out" in str(warning.message)]


@pytest.mark.parametrize("method", ["flora", "lora", "ia3"])
def test_the_start_is_the_base_model_and_the_seed_decides_it(method, checkpoints):
    ids = torch.arange(1, 12)[None]
    base = tiny_models.load_plain(checkpoints["code"].model).double()
    with torch.no_grad():
        expected = base(ids).logits
        starts = []
        for seed in (0, 0, 1):
            model = add_adapter(recipe_for(base, method=method, seed=seed), base).eval()
            assert torch.allclose(model(ids).logits, expected, rtol=1e-12, atol=1e-12)
            starts.append([parameter.clone() for parameter in model.parameters() if parameter.requires_grad])
            remove_adapter(model)
        assert torch.equal(base(ids).logits, expected), "taking the adapter out leaves the model as it was"
    assert all(map(torch.equal, starts[0], starts[1]))
    assert method == "ia3" or not all(map(torch.equal, starts[0], starts[2]))


@pytest.mark.parametrize("method", ["flora", "lora", "ia3"])
def test_what_is_written_is_half_precision_and_the_same_each_time(method, checkpoints, tmp_path):
    base = tiny_models.load_plain(checkpoints["code"].model)
    model = add_adapter(recipe_for(base, method=method), base).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    round_to_half(model)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name, model, "# a card\n")
    files = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert files["README.md"] == b"# a card\n" and (tmp_path / "first" / "README.md").stat().st_mode & 0o777 == 0o644
    tensors = load_file(tmp_path / "first" / "adapter_model.safetensors")
    assert tensors and all(tensor.dtype == torch.float16 for tensor in tensors.values())
    ids = torch.arange(1, 12)[None]
    read = PeftModel.from_pretrained(tiny_models.load_plain(checkpoints["code"].model), tmp_path / "first").eval()
    with torch.no_grad():
        assert torch.equal(read(ids).logits, model(ids).logits), "what is scored is what is saved"


# ------------------------------------------------------------------------------------------------------------ the output


def an_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("old")
    return folder


def test_only_an_adapter_is_overwritten_and_only_when_told(tmp_path):
    folder = an_adapter(tmp_path / "lua")
    with pytest.raises(TrainingError, match="output folder lua is not empty: name another with --output, or give --overwrite"):
        refuse_used_output(folder, overwrite=False)
    refuse_used_output(folder, overwrite=True)
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(TrainingError, match="output folder lua holds thesis.tex, which is no adapter's"):
        refuse_used_output(folder, overwrite=True)
    with pytest.raises(TrainingError, match="output thesis.tex is a file"):
        refuse_used_output(folder / "thesis.tex", overwrite=True)
    with pytest.raises(TrainingError, match="cannot be made in thesis.tex"):
        refuse_used_output(folder / "thesis.tex" / "below", overwrite=False)
    (tmp_path / "empty").mkdir()
    refuse_used_output(tmp_path / "empty", overwrite=False)
    refuse_used_output(tmp_path / "a" / "b", overwrite=False)


def test_the_current_folder_is_never_replaced_by_an_adapter(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "app.py").write_text("")
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(TrainingError, match="output folder work holds app.py"):
        refuse_used_output(Path("."), overwrite=True)


@pytest.mark.parametrize("there", ["nothing", "empty", "adapter"])
def test_a_folder_is_written_whole_or_not_at_all(there, tmp_path):
    folder = tmp_path / "out" / "lua"
    if there == "empty":
        folder.mkdir(parents=True)
    elif there == "adapter":
        an_adapter(folder)
    before = sorted(path.name for path in folder.iterdir()) if folder.exists() else None
    with pytest.raises(OSError), whole_or_nothing(folder) as partial:
        (partial / "adapter_config.json").write_text("new")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (sorted(path.name for path in folder.iterdir()) if folder.exists() else None) == before
    assert [path.name for path in folder.parent.iterdir()] == ([] if there == "nothing" else ["lua"])
    with whole_or_nothing(folder) as partial:
        (partial / "adapter_config.json").write_text("new")
    assert [path.name for path in folder.parent.iterdir()] == ["lua"]
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"adapter_config.json": "new"}
