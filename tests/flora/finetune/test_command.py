"""`python -m flora.finetune` as its users call it: what it trains, writes, prints and refuses."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from peft import PeftModel
from transformers import AutoProcessor, AutoTokenizer

from flora import Engine, Request
from flora.audio import load_audio
from flora.finetune.__main__ import main
from flora.formats import read_adapter

from .conftest import write_lines

PROJECT = Path(__file__).resolve().parents[3]
MODELS = PROJECT / "assets" / "models"
PROMPT = "-- Return the sum of the numbers in xs.\nlocal function total(xs)\n"
METHODS = ("flora", "lora", "ia3")
SERVED_BY = {"flora": "flora", "lora": "bmm-lora", "ia3": "flora"}
SHORT = ["--steps", "4", "--batch-size", "2", "--held-out", "2", "--checkpoint-every", "2", "--device", "cpu"]


def places(folder: Path, method: str) -> list[str]:
    rank = [] if method == "ia3" else ["--rank", "2"]
    return ["--method", method, *rank, "--output", str(folder / method), "--run-folder", str(folder / f"run-{method}")]


def refused(capsys, *words: str) -> str:
    """The one line of an exit with 2."""
    with pytest.raises(SystemExit) as stopped:
        main(words)
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert stopped.value.code == 2 and not captured.out and line.startswith("python -m flora.finetune: ")
    return line.partition(": ")[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Adapters of the embedded code model for Lua, one per method."""
    folder = tmp_path_factory.mktemp("trained")
    for method in METHODS:
        assert main(["code", "lua", "--model", str(MODELS / "code"), *SHORT, *places(folder, method)]) == 0
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


@pytest.mark.parametrize("method", METHODS)
def test_the_engine_answers_as_peft_does(method, trained):
    prompt = AutoTokenizer.from_pretrained(MODELS / "code")(PROMPT, return_tensors="pt")
    model = PeftModel.from_pretrained(tiny_models.load_plain(MODELS / "code").float(), trained / method).eval()
    theirs = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :].tolist()
    engine = Engine.from_pretrained(MODELS / "code", adapters={"lua": trained / method}, device="cpu")
    (ours,) = engine.generate([Request(prompt=PROMPT, adapter="lua", max_new_tokens=12)], SERVED_BY[method])
    assert ours.token_ids == theirs[: len(ours.token_ids)]


def test_every_component_learns(trained):
    flora, lora = read_adapter(trained / "flora"), read_adapter(trained / "lora")
    assert all((B[1:] != 0).any() for _, B in flora.factors.values()), "the second component did not move"
    assert all(B.abs().max() > 0 for _, B in lora.factors.values()), "LoRA's B did not move"


def test_the_card_tells_the_recipe_and_the_score_and_its_command_makes_the_same_adapter(trained, tmp_path, capsys, monkeypatch):
    card = (trained / "flora" / "README.md").read_text()
    assert "# fLoRA adapter: Lua" in card and "4 steps of 2 examples" in card and "learning rate\n0.01 after 1 steps" in card
    assert "| loss, nats per token |" in card and "| whole completions right, token by token |" in card
    assert str(trained) not in card and str(PROJECT) not in card
    (command,) = re.findall(r"^    python -m flora\.finetune (.+)$", card, re.MULTILINE)
    monkeypatch.chdir(MODELS)  # where the model's name alone is found
    assert main([*command.split(), "--output", str(tmp_path / "again"), "--run-folder", str(tmp_path / "run")]) == 0
    first, again = (read_adapter(folder).factors for folder in (trained / "flora", tmp_path / "again"))
    assert all(torch.equal(first[layer][0], A) and torch.equal(first[layer][1], B) for layer, (A, B) in again.items())
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"loss: base \d\.\d{3}, with the adapter \d\.\d{3}", printed[0])
    assert printed[-1] == f"written to {tmp_path / 'again'}"


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """The Czech clips that ship, as data of one's own."""
    entries = json.loads((PROJECT / "assets" / "clips" / "clips.json").read_text(encoding="utf-8"))
    rows = [
        {"path": str(PROJECT / "assets" / "clips" / entry["file"]), "sentence": entry["text"]}
        for entry in entries
        if entry["tag"] == "cs"
    ]
    return write_lines(tmp_path_factory.mktemp("czech") / "czech.jsonl", rows)


@pytest.mark.parametrize("method", ["flora", "ia3"])
def test_an_adapter_of_the_embedded_speech_model_on_clips_of_ones_own(method, clips, tmp_path):
    words = ["speech", "cs", "--model", str(MODELS / "speech"), "--data", str(clips), "--validation", "0.5", "--bfloat16"]
    assert main([*words, *SHORT, *places(tmp_path, method), "--json", str(tmp_path / "log.jsonl")]) == 0
    score = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert score["kind"] == "score" and set(score["score"]) == {"loss", "word error rate"}
    card = (tmp_path / method / "README.md").read_text()
    assert "word error rate of greedy transcripts" in card and "czech.jsonl (2 to learn from, 2 held out)" in card
    assert "license" not in card, "the data's licence is not ours to say"
    samples, rate = load_audio(json.loads(clips.read_text().splitlines()[0])["path"])
    processor = AutoProcessor.from_pretrained(MODELS / "speech")
    features = processor(samples, sampling_rate=rate, return_tensors="pt").input_features
    model = PeftModel.from_pretrained(tiny_models.load_plain(MODELS / "speech").float(), tmp_path / method).eval()
    theirs = model.generate(input_features=features, max_new_tokens=12, do_sample=False)
    engine = Engine.from_pretrained(MODELS / "speech", adapters={"cs": tmp_path / method}, device="cpu")
    (ours,) = engine.generate([Request(audio=samples, sampling_rate=rate, adapter="cs", max_new_tokens=12)], SERVED_BY[method])
    assert ours.text.strip() == processor.batch_decode(theirs, skip_special_tokens=True)[0].strip()


# ---------------------------------------------------------------------------------------------------------------- bad input

BAD = {
    "no kind 'video'": ["video", "lua"],
    "no code language 'cobol' in the corpus": ["code", "cobol"],
    "model 'folder' is neither a folder here nor a hub id": ["code", "lua", "--model", "no/such/folder"],
    "--rank must be at least 1": ["code", "lua", "--rank", "0"],
    "--method: choose": ["code", "lua", "--method", "dora"],
    "no linear layer 'q_proj'; there are c_attn, c_fc, c_proj": ["code", "lua", "--steps", "1", "--target-layers", "q_proj"],
    "say what to learn from": ["code"],
    "data 'absent.jsonl' is neither": ["code", "--data", "absent.jsonl"],
    "is a code model: say `code`": ["speech", "cs", "--steps", "1"],
    "device 'abacus' is unknown": ["code", "lua", "--device", "abacus"],
    "invalid int value": ["code", "lua", "--steps", "many"],
    "--checkpoint-every must be at least 1": ["code", "lua", "--checkpoint-every", "0"],
    "unrecognized arguments": ["code", "lua", "--raknk", "4"],
}


@pytest.mark.parametrize("said", BAD)
def test_bad_input_is_one_line_and_exit_2(said, roomy_model, tmp_path, capsys):
    words = BAD[said]
    words = words if "--model" in words else [*words, "--model", str(roomy_model)]
    line = refused(capsys, *words, "--output", str(tmp_path / "out"), "--run-folder", str(tmp_path / "run"))
    assert said.replace("--method: choose", "no method 'dora': choose one of flora, lora, ia3") in line
    assert not (tmp_path / "out").exists()


def test_data_that_is_too_broken_trains_nothing(checkpoints, tmp_path, capsys):
    data = write_lines(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b"}, "{", {"text": ""}])
    words = ["code", "--data", str(data), "--model", str(checkpoints["code"].model), "--output", str(tmp_path / "out")]
    line = refused(capsys, *words, "--run-folder", str(tmp_path / "run"))
    bad = "2 of 4 rows left out (line 3 is not JSON; line 4 has an empty text)"
    assert line == f"data x.jsonl: {bad}; more than 1% are bad, so nothing was trained"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.jsonl"]


def test_a_model_that_cannot_hold_the_corpus_s_programs_says_so(checkpoints, tmp_path, capsys):
    line = refused(
        capsys, "code", "lua", "--model", str(checkpoints["code"].model), "--steps", "1", "--output", str(tmp_path / "out")
    )
    assert re.fullmatch(r"the corpus has a prompt of \d+ tokens, where an example has 96: take a model with a longer context", line)


def test_an_output_that_holds_something_is_left_alone(trained, capsys):
    before = {path.name: path.read_bytes() for path in (trained / "lora").iterdir()}
    line = refused(capsys, "code", "lua", *SHORT, *places(trained, "lora"))
    assert line == "output folder lora is not empty: name another with --output, or give --overwrite"
    assert {path.name: path.read_bytes() for path in (trained / "lora").iterdir()} == before


def test_an_adapter_of_ones_own_needs_a_place(code_file, capsys):
    assert refused(capsys, "code", "--data", str(code_file)) == "say where the adapter goes: --output FOLDER"
    assert refused(capsys, "code", "lua", "--model", "a/b") == "say where the adapter goes: --output FOLDER"


def test_an_interruption_says_how_to_go_on(trained, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("flora.finetune.finetune", interrupted)
    assert main(["code", "lua", *SHORT, *places(trained, "flora")]) == 130
    assert "the same command goes on from the last checkpoint" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_help_names_every_option_and_gives_examples(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("flora.finetune", run_name="__main__")
    shown = capsys.readouterr()
    assert stopped.value.code == 0 and not shown.err
    for option in ("--method", "--quantize", "--target-layers", "--data", "--validation", "--gradient-accumulation", "--overwrite"):
        assert f"\n  {option} " in shown.out
    assert "python -m flora.finetune speech cs --data clips/" in shown.out
