"""transformers' Trainer trains fLoRA adapters: evaluation in between, checkpoints of the adapter alone, and on after a stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from flora import FloraConfig
from flora.formats import read_adapter
from flora.models import load_model

STEPS = 8


class Sequences(Dataset):
    """Numbers that go up by one, mod 97, from another place in each item."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(10) + 6 * index) % 97 + 2
        return {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.save_code_model(tmp_path_factory.mktemp("base") / "model", width=64, inner_width=128)


def trainer(folder: Path, output: Path, quantize: str | None = None, **options) -> Trainer:
    torch.manual_seed(0)
    base = load_model(folder, "cpu", "float32", quantize).model
    if quantize is not None:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(base, FloraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=Sequences(), eval_dataset=Sequences())


def evaluation_losses(trained: Trainer) -> list[float]:
    return [entry["eval_loss"] for entry in trained.state.log_history if "eval_loss" in entry]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"quantize": "int8"},
        {"quantize": "nf4"},
    ],
    ids=str,
)
def test_the_trainer_trains(options, folder, tmp_path):
    trained = trainer(folder, tmp_path, **options)
    trained.train()
    losses = evaluation_losses(trained)
    assert len(losses) == STEPS // 2 and losses[-1] < 0.9 * losses[0], f"the loss does not fall: {losses}"
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    assert not (checkpoint / "model.safetensors").exists() and all(".flora_" in key for key in tensors)
    assert read_adapter(checkpoint).factors.keys() == set(
        tiny_models.target_layers(tiny_models.load_plain(folder), tiny_models.CODE_LAYERS)
    )


def test_a_stopped_training_goes_on(folder, tmp_path):
    """From its checkpoint to the same weights as without a stop."""
    whole = trainer(folder, tmp_path / "whole")
    whole.train()
    resumed = trainer(folder, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    expected = load_file(tmp_path / "whole" / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    found = load_file(tmp_path / "resumed" / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    halfway = load_file(tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, rtol=1e-5, atol=1e-6), key
        assert not torch.equal(halfway[key], tensor), f"{key} did not move in the second half"


def test_the_best_checkpoint_is_loaded_in_the_end(folder, tmp_path):
    trained = trainer(folder, tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss")
    trained.train()
    best = PeftModel.from_pretrained(tiny_models.load_plain(folder), trained.state.best_model_checkpoint).eval()
    ids = Sequences()[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(trained.model.eval()(ids).logits, best(ids).logits)
