"""Fine-tuning end to end on the embedded code model: the command, its checkpoints, and the folder it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from flora import Engine, Request
from flora.finetune import AdapterTraining, main, parse
from flora.formats import read_adapter
from flora.models import load_model
from flora.pretrain.loop import load_checkpoint
from flora.tuner import FloraConfig

MODEL = Path(__file__).resolve().parents[2] / "assets" / "models" / "code"
PROMPT = "-- Return the sum of the numbers in xs.\nlocal function total(xs)\n"


def command(folder: Path, method: str, *more: str) -> list[str]:
    shared = [
        "--model",
        str(MODEL),
        "--rank",
        "2",
        "--steps",
        "4",
        "--batch-size",
        "2",
        "--held-out",
        "2",
        "--checkpoint-every",
        "2",
    ]
    output = ["--output", str(folder / method), "--run-folder", str(folder / f"run-{method}"), "--threads", "1"]
    return ["code", "lua", "--method", method, *shared, *output, *more]


def groups_of(training: AdapterTraining) -> list[dict]:
    """The optimizer's groups as the training loop makes them: matrices, then vectors."""
    parameters = [parameter for parameter in training.parameters() if parameter.requires_grad]
    return [{"params": [p for p in parameters if p.ndim >= 2]}, {"params": [p for p in parameters if p.ndim < 2]}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    for method in ("flora", "lora"):
        assert main(command(folder, method)) == 0
    return folder


def test_both_families_are_served_and_agree_with_merged_weights(trained):
    engine = Engine.from_pretrained(MODEL, adapters={"lua": [trained / "flora", trained / "lora"]}, device="cpu")
    assert engine.adapters["lua"].ranks == {"flora": 2, "lora": 2}
    requests = [Request(prompt=PROMPT, adapter="lua", max_new_tokens=12), Request(prompt=PROMPT, max_new_tokens=12)]
    for method in ("flora", "bmm-lora"):
        completions = engine.generate(requests, method)
        assert engine.verify(requests, [completion.token_ids for completion in completions], method).agrees


def test_training_changed_the_adapter(trained):
    flora, lora = read_adapter(trained / "flora"), read_adapter(trained / "lora")
    assert all((B[1:] != 0).any() for _, B in flora.factors.values()), "the second component did not move"
    assert all(B.abs().max() > 0 for _, B in lora.factors.values()), "LoRA's B did not move"


def test_peft_loads_the_lora_folder_and_answers_alike(trained):
    prompt = AutoTokenizer.from_pretrained(MODEL)(PROMPT, return_tensors="pt")
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, trained / "lora").eval()
    theirs = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :].tolist()
    engine = Engine.from_pretrained(MODEL, adapters={"lua": trained / "lora"}, device="cpu")
    (ours,) = engine.generate([Request(prompt=PROMPT, adapter="lua", max_new_tokens=12)], "bmm-lora")
    assert ours.token_ids == theirs[: len(ours.token_ids)]


def test_card_and_configuration_tell_the_recipe(trained):
    config = json.loads((trained / "flora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["combine"], config["init"]) == ("FLORA", 2, "sum", "identity")
    card = (trained / "flora" / "README.md").read_text()
    assert "Lua" in card and "4 steps" in card and "with this adapter" in card
    assert str(trained) not in card


def test_finished_run_resumes_at_its_end(trained, capsys):
    before = read_adapter(trained / "flora").factors
    assert main(command(trained, "flora")) == 0  # the checkpoint says that all four steps are done
    after = read_adapter(trained / "flora").factors
    assert all(torch.equal(before[layer][0], after[layer][0]) for layer in before)


def test_an_adapter_that_learns_the_mean_is_served_as_the_mean(tmp_path):
    """What is trained is what is served: the held-out score of the card, again, from the saved folder."""
    assert main(command(tmp_path, "flora", "--init", "noise")) == 0
    assert json.loads((tmp_path / "flora" / "adapter_config.json").read_text())["combine"] == "mean"
    options = parse(command(tmp_path, "flora", "--init", "noise"))
    loaded = load_model(MODEL, device="cpu", dtype="float32")
    training = AdapterTraining(loaded, "flora", 2, FloraConfig(r=2, init="noise"), seed=0)
    load_checkpoint(options.run_folder, training, torch.optim.AdamW(groups_of(training)))
    ids = AutoTokenizer.from_pretrained(MODEL)(PROMPT, return_tensors="pt").input_ids
    with training.serving(1) as model, torch.inference_mode():
        trained = model(ids).logits
    engine = Engine.from_pretrained(MODEL, adapters={"lua": tmp_path / "flora"}, device="cpu")
    serving = engine.bank.serving(["lua"], "flora")
    with engine.bank.serve(serving), torch.inference_mode():
        served = engine.model(ids).logits
    difference = (trained - served).abs().max().item()
    assert difference < 0.05 * trained.abs().max().item(), f"max_diff {difference}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["code", "cobol"], "cobol"),
        (["code", "lua", "--model", "no/such/folder"], "model 'folder'"),
        (["code", "lua", "--rank", "0"], "--rank"),
        (["video", "lua"], "video"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        raise SystemExit(main([*arguments, "--run-folder", str(tmp_path / "run"), "--output", str(tmp_path / "out")]))
    assert exit_info.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
