"""The command line: what it prints and writes, and what it refuses."""

import json
import shlex
import subprocess
import sys

import pytest
import soundfile

from profiling.__main__ import main


@pytest.fixture
def arguments(model_folders, tmp_path, monkeypatch, tone):
    """A short comparison on the small models, given by paths relative to the current folder."""
    (code_model, code_adapters), (speech_model, speech_adapters) = model_folders["code"], model_folders["speech"]
    monkeypatch.chdir(code_model.parent)
    soundfile.write("hum.wav", tone, 16000)
    rows = [{"prompt": "it's `nasty` $HOME \"x\"\n", "adapter": "lua"}, {"audio": "hum.wav", "adapter": "cs"}]
    (tmp_path / "batch.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def given(adapters):
        return [f"{tag}={path.relative_to(code_model.parent)}" for tag, paths in adapters.items() for path in paths]

    return [
        *("compare", "--code-model", code_model.name, "--speech-model", speech_model.name),
        *("--code-adapters", *given(code_adapters), "--speech-adapters", *given(speech_adapters)),
        *("--batch", str(tmp_path / "batch.jsonl"), "--max-new-tokens", "5", "--warmup", "1", "--threads", "1"),
    ]


def test_it_prints_the_machine_the_figures_and_the_command(arguments, capsys, tmp_path):
    rows, page = tmp_path / "rows.jsonl", tmp_path / "report.html"
    assert main([*arguments, "--base", "--json", str(rows), "--report", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "1 thread ·" in printed.splitlines()[0] and "step / base model" in printed
    assert "n = 4 paired decode steps, 1 warm-up steps" in printed
    records = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(records) == 9 and page.stat().st_size > 1_000_000
    for record in records:
        assert record["agreement"]["tokens"] == record["agreement"]["agreeing"]


def test_the_command_it_prints_makes_the_same_comparison_again(arguments, capsys, tmp_path, monkeypatch):
    main([*arguments, "--json", str(tmp_path / "first.jsonl")])
    command = capsys.readouterr().out.strip().splitlines()[-1]
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "profiling", "compare"] and str(tmp_path.parent) not in command
    rows = [json.loads(word) for option, word in zip(words, words[1:], strict=False) if option == "--row"]
    assert rows[0]["prompt"] == "it's `nasty` $HOME \"x\"\n" and rows[1]["audio"] == "hum.wav"
    assert main([*words[3:], "--json", str(tmp_path / "second.jsonl")]) == 0
    first, second = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in ("first.jsonl", "second.jsonl")
    )
    for one, other in zip(first, second, strict=True):
        for key in ("method", "kind", "batch", "num_new_tokens", "ranks", "models", "seed", "warmup_steps", "num_steps", "command"):
            assert one[key] == other[key], key


def test_rows_on_standard_output_stay_alone_there(arguments, capsys):
    assert main([*arguments, "--methods", "flora", "--json", "-"]) == 0
    assert [json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()] == ["code", "speech", "all"]


def test_a_row_that_cannot_run_is_named_and_the_rest_runs(arguments, capsys, tmp_path):
    (tmp_path / "batch.jsonl").write_text('{"prompt": "a", "adapter": "klingon"}\n{"prompt": "b", "adapter": "lua"}\n')
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "Request 1 was left out" in printed.out and "klingon" in printed.out and "batch of 1" in printed.out


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--methods", "flora", "magic"], "no method 'magic'"),
        (["--methods", "flora", "flora"], "given twice"),
        (["--threads", "0"], "--threads"),
        (["--threads", "many"], "--threads"),
        (["--repeats", "0"], "repeats"),
        (["--warmup", "-3"], "warm-up"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--batch", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--row", "{}"], "--batch or --row"),
        (["--code-model", "nowhere"], "nowhere"),
        (["--code-model", "speech-model", "--code-adapters", "cs=speech/cs/flora"], "give a code model"),
        (["--code-adapters", "lua"], "TAG=FOLDER"),
        (["--code-adapters", "lua=./no/such/place"], "no such folder"),
        (["--report", "report.pdf"], "report"),
        (["--json", "no/such/folder/rows.jsonl"], "cannot write"),
        (["--dtype", "float13"], "float13"),
        (["--device", "toaster"], "toaster"),
        (["--unknown"], "--unknown"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, capsys, extra, words):
    with pytest.raises(SystemExit) as caught:
        main([*arguments, *extra])
    error = capsys.readouterr().err
    lines = error.splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and words in lines[0], error
    assert "Traceback" not in error


def test_a_fresh_process_says_one_line_too():
    command = [sys.executable, "-m", "profiling", "compare", "--row", '{"audio": "nowhere.wav"}']
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 2 and run.stdout == "" and len(run.stderr.splitlines()) == 1, run.stderr


@pytest.mark.parametrize("arguments_alone", [[], ["sing"]])
def test_without_a_known_command_it_says_what_there_is(arguments_alone, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments_alone)
    assert caught.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_help_tells_the_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["compare", "--help"])
    assert caught.value.code == 0 and "default: 48" in capsys.readouterr().out
