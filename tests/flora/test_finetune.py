"""Fine-tuning end to end on the embedded code model: the command, its checkpoints, and the folder it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from flora import Engine, Request
from flora.finetune import main
from flora.formats import read_adapter

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
