"""The edges of fLoRA as a PEFT method: layers that an adapter would not reach, tied and offloaded weights, tasks, and what PEFT
offers to some methods only, refused by name."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from accelerate import cpu_offload
from packaging.version import Version
from peft import PeftModel, PeftType, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    MambaConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.mamba.modeling_mamba import MambaMixer

from flora import AdapterError, FloraConfig
from flora.tuner import FloraModel

PEFT = Version(peft.__version__)
FAR = {"init": "noise", "init_std": 0.5}
"""A start that is far from the base model."""


def differ(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(10, 20)), FloraConfig(target_modules=["0"], **FAR)).eval()


# ------------------------------------------------------------------------------------------------------ layers, weights


def mixer() -> nn.Module:
    return MambaMixer(MambaConfig(hidden_size=8, state_size=2, num_hidden_layers=1), layer_idx=0)


@pytest.mark.parametrize(
    "module, targets, message",
    [
        (nn.MultiheadAttention(8, 2), ["out_proj"], "layer 0.out_proj cannot be adapted: MultiheadAttention multiplies"),
        (nn.MultiheadAttention(8, 2), ["0"], "layer 0 is MultiheadAttention, and fLoRA adapts linear layers"),
        (nn.TransformerEncoderLayer(8, 2, 16), "all-linear", "cannot be adapted: .* or name it in exclude_modules"),
        (mixer(), ["in_proj", "out_proj"], "layer 0.out_proj cannot be adapted: MambaMixer multiplies"),
        (mixer(), ["x_proj"], "layer 0.x_proj cannot be adapted: MambaMixer multiplies"),
        (nn.Conv1d(1, 1, 2), ["0"], "layer 0 is Conv1d, and fLoRA adapts linear layers"),
        (nn.GRU(3, 3), ["0"], "layer 0 is GRU, and fLoRA adapts linear layers"),
        (nn.Bilinear(3, 3, 3), ["0"], "layer 0 is Bilinear, and fLoRA adapts linear layers"),
    ],
    ids=["attention's output", "attention", "encoder", "mixer's output", "mixer", "convolution", "recurrent", "bilinear"],
)
def test_layers_that_an_adapter_would_not_reach_are_named(module, targets, message):
    with pytest.raises(AdapterError, match=message):
        get_peft_model(nn.Sequential(module), FloraConfig(target_modules=targets))


def test_layers_beside_those_are_adapted():
    model = get_peft_model(nn.Sequential(mixer()), FloraConfig(target_modules="all-linear", exclude_modules=r".*(x|dt|out)_proj"))
    assert model.targeted_module_names == ["0.in_proj"]
    encoder = nn.ModuleDict({"encoder": nn.TransformerEncoderLayer(8, 2, 16), "head": nn.Linear(8, 3)})
    model = get_peft_model(encoder, FloraConfig(target_modules="all-linear", exclude_modules=r"encoder\..*"))
    assert model.targeted_module_names == ["head"]


def test_an_output_head_that_is_tied_to_the_embedding(tmp_path):
    """Merging changes the head and not the embedding, and unmerging ties them again."""
    torch.manual_seed(0)
    ids = torch.arange(2, 10)[None]
    plain = GPTBigCodeForCausalLM(
        GPTBigCodeConfig(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3)
    ).eval()
    assert plain.lm_head.weight is plain.transformer.wte.weight
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = get_peft_model(copy.deepcopy(plain), FloraConfig(target_modules=["lm_head"], **FAR)).eval()
    expected, embedding = model(ids).logits, plain.transformer.wte.weight
    assert differ(expected, plain(ids).logits) > 0.1
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model.merge_adapter()
    inner = model.get_base_model()
    assert differ(model(ids).logits, expected) < 1e-5 and torch.equal(inner.transformer.wte.weight, embedding)
    model.unmerge_adapter()
    assert inner.lm_head.base_layer.weight is inner.transformer.wte.weight and torch.equal(inner.transformer.wte.weight, embedding)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        merged = model.merge_and_unload()
    assert differ(merged(ids).logits, expected) < 1e-5


def test_the_representation_names_the_parts(model):
    layer = model.base_model.model[0]
    text = repr(layer)
    assert text.startswith("flora.FloraLinear(") and "(base_layer): Linear(in_features=10, out_features=20, bias=True)" in text
    assert "(flora_A): ParameterDict" in text and "(flora_B): ParameterDict" in text
    assert (layer.in_features, layer.out_features) == (10, 20) and layer.weight is layer.base_layer.weight


# ------------------------------------------------------------------------------------------- tasks, devices, PEFT's tools


def test_an_encoder_decoder_with_rows_of_their_own():
    """As PEFT's class for the task takes them, forward and with beams; T5 looks at its layers' weights."""
    torch.manual_seed(0)
    plain = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0)
    ).eval()
    # PEFT's class for the task calls what transformers 5 has no more, until this version.
    task = "SEQ_2_SEQ_LM" if PEFT >= Version("0.21.2") else None
    model = get_peft_model(plain, FloraConfig(task_type=task, target_modules=["q", "wi", "wo"], **FAR)).eval()
    model.add_adapter("second", FloraConfig(task_type=task, r=2, **FAR))  # the architecture's own layers
    given = {"input_ids": torch.arange(2, 14).reshape(3, 4)}
    names = ["second", "__base__", "default"]
    options = {"num_beams": 2, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    labels = torch.arange(3, 9).reshape(3, 2)
    with torch.no_grad():
        mixed = model(**given, decoder_input_ids=labels, adapter_names=names).logits
        generated = model.generate(**given, **options, adapter_names=names)
        seen = []
        for row, name in enumerate(names):
            one = {key: value[row : row + 1] for key, value in given.items()}
            if name == "__base__":
                with model.disable_adapter():
                    logits, tokens = model(**one, decoder_input_ids=labels[row : row + 1]).logits, model.generate(**one, **options)
            else:
                model.set_adapter(name)
                logits, tokens = model(**one, decoder_input_ids=labels[row : row + 1]).logits, model.generate(**one, **options)
            assert differ(mixed[row], logits[0]) < 1e-4 * logits.abs().max() and torch.equal(generated[row], tokens[0]), name
            seen.append(logits[0])
    assert differ(seen[0], seen[1]) > 1e-2 and differ(seen[1], seen[2]) > 1e-2


def test_a_classifier_saves_its_head(tmp_path):
    config = GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2, num_labels=3, pad_token_id=0)
    torch.manual_seed(0)
    plain = GPT2ForSequenceClassification(config).eval()
    model = get_peft_model(copy.deepcopy(plain), FloraConfig(task_type="SEQ_CLS", **FAR)).eval()
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.add_(1.0)
    ids = torch.arange(2, 10).reshape(2, 4)
    model.save_pretrained(tmp_path)
    assert any("score" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits) and differ(model(ids).logits, plain(ids).logits) > 1e-3


class BlackBox(nn.Linear):
    """A layer of a class of its own, as the quantised ones are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def test_weights_that_accelerate_keeps_elsewhere(x):
    """Offloaded weights and factors are brought up for every forward and for merging, and put away behind it."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), BlackBox(12, 5)).eval()
    model = get_peft_model(plain, FloraConfig(target_modules=["0", "2"], **FAR)).eval()
    names = ["default", "__base__", "default", "default"]
    expected, mixed = model(x), model(x, adapter_names=names)
    cpu_offload(model, execution_device="cpu")
    away = [parameter.device.type for parameter in model.parameters()]
    assert set(away) == {"meta"}
    for _ in range(2):
        assert differ(model(x), expected) == 0 and differ(model(x, adapter_names=names), mixed) == 0
        assert [parameter.device.type for parameter in model.parameters()] == away
    model.merge_adapter()
    assert differ(model(x), expected) < 1e-5
    model.unmerge_adapter()
    assert differ(model(x), expected) == 0
    assert differ(model.merge_and_unload()(x), expected) < 1e-5


def test_what_is_lora_only_is_refused(model, x, tmp_path):
    """By name, with nothing changed; PEFT's own words where it asks the method first."""
    expected = model(x)
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="fLoRA adapters multiply, add_weighted_adapter adds: make several active"):
        model.add_weighted_adapter(["default"], [0.5], "half")
    with pytest.raises(ValueError, match="FLORA"):
        hotswap_adapter(model, tmp_path, "default")
    with pytest.raises(ValueError, match="scaling"), rescale_adapter_scale(model, 0.5):
        pass
    if PEFT >= Version("0.19"):
        with pytest.raises(TypeError, match="FloraLinear"):
            peft.convert_to_lora(model, rank=2)
    assert torch.equal(model(x), expected) and list(model.peft_config) == ["default"]


def test_everything_that_a_method_defines_is_defined(model):
    """What PEFT's base classes declare, and every one of its tables that has an entry for each method."""
    declared = [name for name in BaseTuner.__annotations__ if not hasattr(FloraModel, name)]
    assert not declared and not FloraModel.__abstractmethods__
    layer = model.base_model.model[0]
    assert not [name for name in BaseTunerLayer.__annotations__ if not hasattr(layer, name)]
    assert all(hasattr(layer, name) for name in (*layer.adapter_layer_names, *layer.other_param_names))
    ordinary = {"LORA", "IA3", "LOHA", "OFT", "VERA", "BONE", "MISS", "ROAD"} & set(PeftType.__members__)
    tables = {
        (name, key): table
        for name, module in (("peft", peft), ("mapping", peft.mapping), ("utils", peft.utils), ("constants", peft.utils.constants))
        for key, table in vars(module).items()
        if isinstance(table, dict) and ordinary <= {str(getattr(entry, "value", entry)) for entry in table}
    }
    assert len(tables) >= 3, "PEFT's tables of methods were not found: this shows nothing"
    assert not [name for name, table in tables.items() if PeftType.FLORA not in table]
