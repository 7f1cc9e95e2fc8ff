"""`python -m flora.finetune` as its users call it: what it trains, writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from flora import Engine, Request
from flora.finetune.__main__ import main
from flora.formats import read_adapter

MODEL = Path(__file__).resolve().parents[3] / "assets" / "models" / "code"
PROMPT = "-- Return the sum of the numbers in xs.\nlocal function total(xs)\n"
METHODS = ("flora", "lora", "ia3")


def command(folder: Path, method: str, *more: str) -> list[str]:
    rank = [] if method == "ia3" else ["--rank", "2"]
    short = ["--steps", "4", "--batch-size", "2", "--held-out", "2", "--checkpoint-every", "2", "--device", "cpu"]
    places = ["--output", str(folder / method), "--run-folder", str(folder / f"run-{method}")]
    return ["code", "lua", "--model", str(MODEL), "--method", method, *rank, *short, *places, *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    for method in METHODS:
        assert main(command(folder, method)) == 0
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_is_small_and_says_what_it_is(method, trained):
    sizes = {path.name: path.stat().st_size for path in (trained / method).iterdir()}
    assert set(sizes) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert sum(sizes.values()) < 1e6
    config = json.loads((trained / method / "adapter_config.json").read_text())
    assert config["peft_type"] == method.upper() and config["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    if method == "flora":
        assert (config["r"], config["combine"], config["init"]) == (2, "sum", "identity")
    card = (trained / method / "README.md").read_text()
    assert "Lua" in card and "4 steps" in card and "with this adapter" in card
    assert str(trained) not in card and str(MODEL.parent) not in card


@pytest.mark.parametrize(("method", "served_by"), [("flora", "flora"), ("lora", "bmm-lora"), ("ia3", "flora")])
def test_the_engine_answers_as_peft_does(method, served_by, trained):
    prompt = AutoTokenizer.from_pretrained(MODEL)(PROMPT, return_tensors="pt")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"), trained / method).eval()
    theirs = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :].tolist()
    engine = Engine.from_pretrained(MODEL, adapters={"lua": trained / method}, device="cpu")
    (ours,) = engine.generate([Request(prompt=PROMPT, adapter="lua", max_new_tokens=12)], served_by)
    assert ours.token_ids == theirs[: len(ours.token_ids)]


def test_every_component_learns(trained):
    flora, lora = read_adapter(trained / "flora"), read_adapter(trained / "lora")
    assert all((B[1:] != 0).any() for _, B in flora.factors.values()), "the second component did not move"
    assert all(B.abs().max() > 0 for _, B in lora.factors.values()), "LoRA's B did not move"


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
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--run-folder", str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m flora.finetune: ") and said in line
    assert not (tmp_path / "out").exists()
