"""`python -m profiling sweep` on real engines: what it prints and writes, and what it refuses."""

import json
import os
import shlex
import signal

import pytest
from fake_costs import fake_costs

from profiling import sweep_command
from profiling.__main__ import main
from profiling.sweep_points import MEASURES


@pytest.fixture
def arguments(model_folders, monkeypatch):
    """A short sweep of the small code model."""
    monkeypatch.chdir(model_folders["code"][0].parent)
    monkeypatch.setattr(sweep_command, "machine_costs", lambda device, dtype: fake_costs())
    words = ["sweep", "--code-model", model_folders["code"][0].name, "--speech-model", model_folders["speech"][0].name]
    words += ["--ranks", "3", "1", "--rate", "100", "--requests", "6", "--new-tokens", "2", "--warmup", "1", "--threads", "1"]
    return [*words, "--adapters", "2", "--max-batch-size", "2", "--steps", "3"]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["code", "speech"])
def test_it_prints_and_writes_what_was_measured(arguments, capsys, tmp_path, kind):
    files = {suffix: tmp_path / f"sweep.{suffix}" for suffix in ("jsonl", "csv", "html")}
    options = ["--kind", kind, "--json", str(files["jsonl"]), "--csv", str(files["csv"]), "--report", str(files["html"])]
    assert main([*arguments, *options]) == 0
    printed = capsys.readouterr().out
    said = ["s/token at 100/s", "step ms", "2 random adapters of each rank", "Throughput: fLoRA's is", "Decode step: fLoRA's is"]
    said += ["Eq. 7, with c1 = "] if kind == "code" else []
    for words in said:
        assert words in printed, words
    rows = rows_of(files["jsonl"])
    assert [(row["rank"], row["measures"], row["method"]) for row in rows] == [
        (rank, what, method) for rank in (1, 3) for what in MEASURES for method in ("flora", "bmm-lora")
    ]
    for row in (row for row in rows if row["measures"] != "step time"):
        assert row["ranks"] == [row["rank"]] and row["outcomes"] == {"finished": 6} and row["num_new_tokens"] == 12
        assert row["kind"] == kind and set(row["adapters"][kind]) == {f"random-r{row['rank']}-000{number}" for number in (0, 1)}
    assert len(files["csv"].read_text().splitlines()) == 13 and "Plotly.newPlot" in files["html"].read_text()


def test_the_command_it_prints_measures_the_same_again(arguments, capsys, tmp_path):
    extra = ["--rate", "auto", "--methods", "bmm-lora", "merged", "--repeats", "2", "--popularity", "identical", "--seed", "4"]
    extra += ["--prompt-tokens", "5", "--burstiness", "2", "--no-saturation-stop", "--dtype", "float32", "--device", "cpu"]
    assert main([*arguments, *extra, "--json", str(tmp_path / "first.jsonl")]) == 0
    command = capsys.readouterr().out.strip().splitlines()[-1]
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "profiling", "sweep"] and "--json" not in words
    assert main([*words[3:], "--json", str(tmp_path / "second.jsonl")]) == 0
    first, second = rows_of(tmp_path / "first.jsonl"), rows_of(tmp_path / "second.jsonl")
    assert len(first) == 16 and "shares of the" in capsys.readouterr().out
    for one, other in zip(first, second, strict=True):
        for name in ("rank", "measures", "method", "num_new_tokens", "seed", "repeats", "popularity", "command", "setting"):
            assert one[name] == other[name], name


def test_rows_on_standard_output_stay_alone_there_and_an_interrupt_keeps_them(arguments, capsys, monkeypatch):
    shown = sweep_command.show_progress

    def interrupting(bar, progress):
        if "rank 3" in progress.words:
            os.kill(os.getpid(), signal.SIGINT)
        shown(bar, progress)

    monkeypatch.setattr(sweep_command, "show_progress", interrupting)
    assert main([*arguments, "--json", "-"]) == 130
    printed = capsys.readouterr()
    assert {json.loads(line)["rank"] for line in printed.out.splitlines()} == {1}
    assert "stopped by hand" in printed.err


def test_a_file_is_gone_on_with_where_it_ended(arguments, capsys, tmp_path):
    kept, steps = tmp_path / "kept.jsonl", [*arguments, "--measures", "step"]
    assert main([*steps, "--ranks", "1", "--resume", str(kept)]) == 0
    first = rows_of(kept)
    assert [row["rank"] for row in first] == [1, 1]
    assert main([*steps, "--resume", str(kept), "--report", str(tmp_path / "sweep.md")]) == 0
    rows = rows_of(kept)
    assert [row["rank"] for row in rows] == [1, 1, 3, 3] and len({row["command"] for row in rows}) == 1
    assert [row["step_quantiles"] for row in rows[:2]] == [row["step_quantiles"] for row in first], "not measured again"
    assert "Decode step: fLoRA's is" in (tmp_path / "sweep.md").read_text()
    with pytest.raises(SystemExit) as ended:
        main([*steps, "--resume", str(kept), "--steps", "4"])
    assert ended.value.code == 2 and "another num steps" in capsys.readouterr().err and rows_of(kept) == rows


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--methods", "magic"], "no method 'magic'"),
        (["--measures", "magic"], "--measures takes step, throughput, latency, not 'magic'"),
        (["--measures", "step", "latency", "--rate", "auto"], "shares of the throughput"),
        (["--ranks", "0"], "ranks"),
        (["--ranks", "2", "2"], "twice"),
        (["--ranks", "many"], "--ranks"),
        (["--rate", "auto", "8"], "auto alone"),
        (["--rate", "fast"], "--rate"),
        (["--rate", "inf"], "finite"),
        (["--rate", "0"], "rate"),
        (["--kind", "video"], "--kind"),
        (["--requests", "0"], "at least 1 request"),
        (["--adapters", "0"], "--adapters"),
        (["--new-tokens", "9000"], "ask for shorter"),
        (["--popularity", "fame"], "popularity"),
        (["--repeats", "0"], "repeat"),
        (["--report", "page.pdf"], "choose .html"),
        (["--json", "no/such/rows.jsonl"], "cannot write"),
        (["--csv", "no/such/rows.csv"], "cannot write"),
        (["--code-model", "nowhere"], "nowhere"),
        (["--code-model", "speech-model"], "give a code model"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, capsys, extra, words):
    with pytest.raises(SystemExit) as caught:
        main([*arguments, *extra])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and len(error.splitlines()) == 1 and words in error, error
