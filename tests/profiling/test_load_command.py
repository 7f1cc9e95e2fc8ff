"""`python -m profiling load` on real engines: what it prints and writes, and what it refuses."""

import csv
import json
import os
import re
import shlex
import signal
import threading

import pytest
import soundfile
from plotly.offline import get_plotlyjs

from profiling import load_command
from profiling.__main__ import _parser as main_parser
from profiling.__main__ import main
from profiling.load_runs import LoadSettings
from profiling.traffic import Traffic


@pytest.fixture
def folder(model_folders, monkeypatch):
    """The small models' folder, which is the current one."""
    monkeypatch.chdir(model_folders["code"][0].parent)
    return model_folders["code"][0].parent


@pytest.fixture
def arguments(model_folders, folder):
    """A short load on the small models, all at once."""
    words = ["load"]
    for kind, (model, adapters) in model_folders.items():
        words += [f"--{kind}-model", model.name, f"--{kind}-adapters"]
        words += [f"{tag}={path.relative_to(folder)}" for tag, paths in adapters.items() for path in paths]
    words += ["--requests", "12", "--rate", "inf", "--new-tokens", "uniform:2-6", "--warmup", "2", "--threads", "1"]
    return [*words, "--max-batch-size", "4"]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_prints_and_writes_what_was_measured(arguments, capsys, tmp_path):
    files = {name: tmp_path / f"load{suffix}" for name, suffix in (("json", ".jsonl"), ("csv", ".csv"), ("report", ".html"))}
    files["per-request"] = tmp_path / "requests.csv"
    options = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    assert main([*arguments, "--mix", "code=0.75,speech=0.25", "--goodput", "ttft:60000", "--repeats", "2", *options]) == 0
    printed = capsys.readouterr().out
    assert "1 thread ·" in printed.splitlines()[0] and "Requests all at once" in printed and "TTFT" in printed
    rows = rows_of(files["json"])
    assert [(row["method"], row["kind"]) for row in rows] == [
        (method, kind) for method in ("flora", "bmm-lora") for kind in ("code", "speech", "all")
    ]
    for row, planned in zip(rows, (9, 3, 12) * 2, strict=True):
        assert row["outcomes"] == {"finished": 2 * planned} and row["goodput"]["share"] == 1.0 and row["errors"] == {}
        assert row["repeats"] == 2 == len(row["by_repeat"]) and row["warmup_requests"] == 2 and row["rate"] == "inf"
        assert row["hardware"]["torch"] and row["models"] and row["command"] in printed
        for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s", "s_per_token"):
            assert set(row[name]) == {"mean", "p50", "p90", "p99"} and row[name]["p50"] > 0, name
    assert rows[0]["num_new_tokens"] == rows[3]["num_new_tokens"], "every method makes the same number of tokens"
    assert rows[0]["ranks"] == [1, 2] and rows[3]["ranks"] == [2] and rows[2]["batch"] == {"code": 4, "speech": 4}
    assert sum(counts["requests"] for counts in rows[0]["adapters"]["code"].values()) == 18
    assert sum(counts["hits"] + counts["misses"] for counts in rows[0]["adapters"]["code"].values()) == 18
    with files["per-request"].open() as file:
        requests = list(csv.DictReader(file))
    assert len(requests) == 48 and {row["outcome"] for row in requests} == {"finished"}
    first, second = ([row for row in requests if row["method"] == method] for method in ("flora", "bmm-lora"))
    asked = ("index", "kind", "adapter", "num_prompt_tokens", "num_new_tokens")
    assert [[row[name] for name in asked] for row in first] == [[row[name] for name in asked] for row in second]
    with files["csv"].open() as file:
        assert len(list(csv.DictReader(file))) == 6
    own = files["report"].read_text().replace(get_plotlyjs(), "")
    assert "Plotly.newPlot" in own and not re.search(r"<(script|link|img)[^>]+(src|href)=", own) and "http" not in own


def test_the_command_it_prints_asks_for_the_same_again(arguments, capsys, tmp_path):
    extra = [
        "--popularity",
        "uniform",
        "--adapters",
        "2",
        "--prompt-tokens",
        "normal:9,2",
        "--burstiness",
        "0.5",
        "--goodput",
        "e2e:99",
    ]
    extra += ["--rate", "500", "--methods", "flora", "merged", "base", "--no-saturation-stop", "--seed", "3", "--dtype", "float32"]
    assert main([*arguments, *extra, "--json", str(tmp_path / "first.jsonl")]) == 0
    command = capsys.readouterr().out.strip().splitlines()[-1]
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "profiling", "load"] and str(tmp_path.parent) not in command and "--json" not in words
    assert main([*words[3:], "--json", str(tmp_path / "second.jsonl")]) == 0
    first, second = rows_of(tmp_path / "first.jsonl"), rows_of(tmp_path / "second.jsonl")
    assert [row["method"] for row in first if row["kind"] == "code"] == ["flora", "merged", "base"]
    for one, other in zip(first, second, strict=True):
        for name in (
            "method",
            "kind",
            "num_new_tokens",
            "num_prompt_tokens",
            "prompt_lengths",
            "seed",
            "rate",
            "burstiness",
            "command",
        ):
            assert one[name] == other[name], name
        requests = [{tag: counts["requests"] for tag, counts in row["adapters"]["code"].items()} for row in (one, other)]
        assert requests[0] == requests[1] == {"lua": 6, "rb": 6}


def test_engines_that_no_command_loaded_have_a_command_too(engines, model_folders, folder):
    """As the page's: the models' and adapters' names, and what differs from the defaults."""
    settings = LoadSettings(Traffic(num_requests=5, rate=2.0), ("flora",))
    words = shlex.split(load_command.command_line(settings, load_command.options_of({"code": engines["code"]}, 2)))
    assert words[words.index("--code-model") + 1] == "code-model" and "--speech-model" not in words
    assert words[words.index("--code-adapters") + 1] == "lua=code/lua/flora" and words[words.index("--adapters") + 1] == "2"
    assert "--host-adapters-mb" not in words and words[words.index("--adapter-slots") + 1] == "64"
    given = main_parser().parse_args(words[3:])
    assert given.code_adapters == [f"{tag}=code/{tag}/{family}" for tag in ("lua", "rb") for family in ("flora", "lora")]


def test_a_closed_loop_for_some_seconds(arguments, capsys, tmp_path):
    words = arguments[: arguments.index("--requests")] + arguments[arguments.index("--new-tokens") :]
    options = ["--concurrency", "2", "--duration", "0.5", "--methods", "flora", "--json", "-"]
    assert main([*words, *options]) == 0
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert rows[0]["concurrency"] == 2 and rows[0]["rate"] is None and rows[0]["planned_duration_s"] == 0.5
    assert rows[0]["outcomes"]["finished"] > 2 and "2 at a time (closed loop), for 0.5 s" in printed.err
    assert "--concurrency 2 --duration 0.5" in rows[0]["command"] and "--requests" not in rows[0]["command"]


def test_a_number_of_seconds_is_a_number_of_requests_at_a_rate(arguments, capsys):
    words = arguments[: arguments.index("--requests")] + arguments[arguments.index("--new-tokens") :]
    assert main([*words, "--rate", "30", "--duration", "0.4", "--methods", "base", "--json", "-"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert row["planned_requests"] == 12 == row["num_requests"] and row["duration_s"] >= 0.4


def test_prompts_of_ones_own(arguments, capsys, tmp_path, tone):
    soundfile.write(tmp_path / "hum.wav", tone, 16000)
    rows = [{"prompt": "its own", "max_new_tokens": 3}, {"audio": "hum.wav", "max_new_tokens": 4}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--prompts", str(tmp_path / "own.jsonl"), "--new-tokens", "given", "--mix", "code=1,speech=1", "--methods", "flora"]
    assert main([*arguments, *options, "--json", "-"]) == 0
    by_kind = {row["kind"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert by_kind["code"]["new_tokens"]["mean"] == 3 and by_kind["speech"]["new_tokens"]["mean"] == 4


@pytest.mark.parametrize("on_disk", [False, True])
def test_more_adapters_than_there_are_become_random_ones(arguments, capsys, tmp_path, on_disk):
    options = ["--adapters", "20", "--adapter-slots", "3", "--popularity", "uniform", "--methods", "flora", "bmm-lora"]
    options += ["--adapter-folder", str(tmp_path / "made")] if on_disk else []
    assert main([*arguments, *options, "--json", "-"]) == 0
    rows = [row for row in map(json.loads, capsys.readouterr().out.splitlines()) if row["kind"] == "code"]
    for row in rows:
        asked = {tag: counts["requests"] for tag, counts in row["adapters"]["code"].items() if counts["requests"]}
        assert row["outcomes"] == {"finished": 12} and row["num_adapters"] == {"code": 20} and set(row["ranks"]) <= {1, 2, 4}
        assert set(asked.values()) == {1} and sum(tag.startswith("random-r4-") for tag in asked) >= 10
        assert row["adapter_slots"] == {"code": 3}
    assert len(list((tmp_path / "made" / "code").glob("*/adapter_config.json"))) == (36 if on_disk else 0)


def test_adapters_of_a_rank_are_random_ones_only(arguments, capsys):
    assert main([*arguments, "--rank", "3", "--popularity", "distinct", "--methods", "base", "merged", "--json", "-"]) == 0
    rows = [row for row in map(json.loads, capsys.readouterr().out.splitlines()) if row["kind"] == "code"]
    assert [row["ranks"] for row in rows] == [[], [3]] and rows[0]["command"].count("--rank 3") == 1
    assert set(rows[0]["adapters"]["code"]) == {f"random-r3-{number:04}" for number in range(8)}


def test_refused_requests_are_counted_and_said(arguments, capsys):
    assert main([*arguments, "--max-waiting", "3", "--requests", "40", "--warmup", "0", "--methods", "flora", "--json", "-"]) == 0
    printed = capsys.readouterr()
    row = json.loads(printed.out.splitlines()[0])
    assert row["errors"]["BusyError"] == row["outcomes"]["refused"] > 0 and sum(row["outcomes"].values()) == 40
    assert "fLoRA did not finish all" in printed.err and "BusyError" in printed.err


def test_an_interrupt_keeps_what_was_measured(arguments, capsys, monkeypatch):
    shown = load_command.show_progress

    def interrupting(bar, progress, repeats):
        if progress.done >= 2:
            os.kill(os.getpid(), signal.SIGINT)
        shown(bar, progress, repeats)

    monkeypatch.setattr(load_command, "show_progress", interrupting)
    before = signal.getsignal(signal.SIGINT)
    assert main([*arguments, "--rate", "10", "--requests", "500", "--warmup", "0", "--json", "-"]) == 130
    printed = capsys.readouterr()
    (row,) = [row for row in map(json.loads, printed.out.splitlines()) if row["kind"] == "code"]
    assert row["interrupted"] and 2 <= row["num_requests"] < 100 and "stopped by hand" in printed.err
    assert signal.getsignal(signal.SIGINT) is before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load")], "no driver is left"


def test_the_embedded_model_is_served_in_its_adapters_languages(capsys):
    words = ["load", "--requests", "10", "--rate", "inf", "--new-tokens", "uniform:2-4", "--prompt-tokens", "40", "--warmup", "0"]
    assert main([*words, "--mix", "code=0.6,speech=0.4", "--threads", "1", "--methods", "flora", "--json", "-"]) == 0
    printed = capsys.readouterr()
    code, speech, _ = map(json.loads, printed.out.splitlines())
    assert "longer than the specified maximum" not in printed.err
    assert code["outcomes"] == {"finished": 6} and speech["outcomes"] == {"finished": 4}
    assert code["prompt_tokens"] == dict.fromkeys(("mean", "p50", "p90", "p99"), 40.0), "cut to the token"
    assert code["num_adapters"] == {"code": 9} and code["models"]["code"]["name"] == "code"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--methods", "flora", "magic"], "no method 'magic'"),
        (["--methods", "flora", "flora"], "given twice"),
        (["--rate", "0"], "rate"),
        (["--rate", "fast"], "--rate"),
        (["--rate", "nan"], "rate"),
        (["--burstiness", "0"], "burstiness"),
        (["--rate", "3", "--concurrency", "2"], "not both"),
        (["--requests", "0"], "at least 1 request"),
        (["--duration", "3"], "not both"),
        (["--prompt-tokens", "some"], "a length is"),
        (["--new-tokens", "uniform:9-3"], "a length is"),
        (["--prompt-tokens", "5000"], "ask for shorter"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--mix", "video"], "mix"),
        (["--popularity", "zipf:0.5"], "popularity"),
        (["--adapters", "0"], "--adapters"),
        (["--rank", "0"], "--rank"),
        (["--host-adapters-mb", "0"], "--host-adapters-mb"),
        (["--rank", "2", "--adapter-folder", "code-model/config.json"], "could not be written"),
        (["--max-batch-size", "0"], "max_batch_size"),
        (["--adapter-slots", "0"], "adapter_slots"),
        (["--max-waiting", "0"], "max_waiting"),
        (["--max-batch-tokens", "1"], "max_batch_tokens"),
        (["--goodput", "ttft"], "ttft"),
        (["--warmup", "-1"], "warm-up"),
        (["--repeats", "0"], "repeat"),
        (["--seed", "-1"], "seed"),
        (["--threads", "0"], "--threads"),
        (["--report", "page.pdf"], "choose .html"),
        (["--json", "no/such/folder/rows.jsonl"], "cannot write"),
        (["--csv", "no/such/folder/rows.csv"], "cannot write"),
        (["--per-request", "no/such/folder/rows.csv"], "cannot write"),
        (["--code-model", "nowhere"], "nowhere"),
        (["--code-adapters", "lua"], "TAG=FOLDER"),
        (["--device", "toaster"], "toaster"),
        (["--dtype", "float13"], "float13"),
        (["--unknown"], "--unknown"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, capsys, extra, words):
    with pytest.raises(SystemExit) as caught:
        main([*arguments, *extra])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and len(error.splitlines()) == 1 and words in error, error


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "adapter": "lua"}, "--popularity"),
        ({"prompt": "a", "temperature": 1}, "--prompts"),
        ({"prompt": " "}, "empty"),
        ({"audio": "nowhere.wav"}, "nowhere.wav"),
        ({"adapter": "lua"}, "prompt or an audio"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_refused(arguments, capsys, tmp_path, row, words):
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    with pytest.raises(SystemExit):
        main([*arguments, "--prompts", str(tmp_path / "own.jsonl")])
    assert words in capsys.readouterr().err


def test_a_kind_that_the_prompts_lack_is_named(arguments, capsys, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"prompt": "a"}')
    with pytest.raises(SystemExit):
        main([*arguments, "--prompts", str(tmp_path / "own.jsonl"), "--mix", "speech"])
    assert "no clip for the speech model" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["load", "--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    for option in ("--rate", "--burstiness", "--concurrency", "--popularity", "--goodput", "--per-request", "--no-saturation-stop"):
        assert option in printed
