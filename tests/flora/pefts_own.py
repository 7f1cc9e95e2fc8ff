"""PEFT's own tests of custom models, with FloraConfig in the place of PEFT's methods; `make test-peft` runs this with the newest.

They come with PEFT's source distribution, whose folder of tests must be importable as `peft_tests`. What PEFT asks of each method
is asked; what it asks of one other method is left out, and so are the few tests listed first, where fLoRA differs.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType

import pytest

from flora import FloraConfig

DIFFERENT = {
    "test_adapter_dtype_autocast": "factors are float32 beside half precision, also where PEFT would round them",
    "test_mixed_adapter_batches_length_mismatch_raises": "the error says it in other words",
    "test_mixed_adapter_batches_training_mode_raises": "the error says it in other words",
    "test_mixed_adapter_batches_merged_raises": "the error says it in other words",
    "test_mixed_adapter_batches_unsupported_layer_raises": "of LoRA's recurrent layers",
    "test_mixed_adapter_batches_mha_raises": "of LoRA's attention layers",
    "test_mixed_adapter_batches_lora_conv1d_emb": "of LoRA's embedding layers",
    "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save": "of LoRA's embedding layers",
    "test_mixed_adapter_batches_lora_conv2d": "of LoRA's convolutions",
    "test_mixed_adapter_batches_lora_opt_timing": "of a model on the hub",
    "test_default_target_modules_list_of_str": "changes the tables of other methods",
    "test_default_target_modules_str": "changes the tables of other methods",
}
FAR = {"init": "noise", "init_std": 0.5}
"""What PEFT's tests mean by weights that are not initialised: a start that is far from the base model."""

METHODS = [
    ("fLoRA, one layer", "MLP", FloraConfig, {"target_modules": "lin0", "combine": "sum"}),
    ("fLoRA, rank 1", "MLP", FloraConfig, {"target_modules": ["lin0"], "r": 1, "combine": "mean"}),
    ("fLoRA, all layers, mean", "MLP", FloraConfig, {"target_modules": ["lin0", "lin1"], "r": 3, "combine": "mean"}),
    ("fLoRA, modules to save", "MLP", FloraConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "combine": "sum"}),
    ("fLoRA, Conv1D", "EmbConv1D", FloraConfig, {"target_modules": ["conv1d"], "combine": "sum"}),
]
PAIRS = [
    ("fLoRA, same layer", "flora", FloraConfig, {"target_modules": ["lin0"], **FAR}, {"target_modules": ["lin0"], **FAR}),
    ("fLoRA, other layers", "flora", FloraConfig, {"target_modules": ["lin0"], **FAR}, {"target_modules": ["lin1"], **FAR}),
]


def mixed(first: list[str], second: list[str]) -> tuple[str, FloraConfig, FloraConfig]:
    return f"{first}, {second}", FloraConfig(target_modules=first, **FAR), FloraConfig(target_modules=second, r=1, **FAR)


VALUES = {
    "test_name, model_id, config_cls, config_kwargs": METHODS,
    "test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2": PAIRS,
    "test_name, config0, config1": [mixed(["lin0"], ["lin0"]), mixed(["lin0"], ["lin1"]), mixed(["lin0", "lin1"], ["lin1"])],
    "config_cls": [FloraConfig],
}
"""How PEFT's tests name what they are run with → what they are run with here."""


def asked_of_flora(test_class: type) -> type:
    """The class with the tests that are run with every method, run with fLoRA."""
    for name, function in inspect.getmembers(test_class, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        marks = getattr(function, "pytestmark", [])
        if name in DIFFERENT or not any(mark.name == "parametrize" and mark.args[0] in VALUES for mark in marks):
            delattr(test_class, name)
            continue
        function.pytestmark = [
            pytest.mark.parametrize(mark.args[0], VALUES[mark.args[0]]).mark
            if mark.name == "parametrize" and mark.args[0] in VALUES
            else mark
            for mark in marks
        ]
    return test_class


if "diffusers" not in sys.modules:  # imported by PEFT's tests, of other models
    sys.modules["diffusers"] = ModuleType("diffusers")
    sys.modules["diffusers"].StableDiffusionPipeline = object
custom_models = importlib.import_module("peft_tests.test_custom_models")
custom_models.set_init_weights_false = lambda config_cls, options: {**options, **FAR}
for name, member in list(vars(custom_models).items()):
    if inspect.isclass(member) and name.startswith("Test"):
        globals()[name] = asked_of_flora(member)


def test_nothing_is_left_out_for_a_reason_that_is_gone():
    source = inspect.getsource(custom_models)
    assert [name for name in DIFFERENT if f"def {name}(" not in source] == []
