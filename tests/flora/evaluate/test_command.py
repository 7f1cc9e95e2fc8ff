"""`python -m flora.evaluate speech` as its users call it: what it prints, writes and refuses."""

import json
import shutil

import numpy as np
import pytest
import soundfile

from flora.evaluate import __main__ as command
from flora.evaluate.rows import Answer, Item, Mean, Score, read_rows
from flora.names import PROJECT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three clips with transcripts, none longer than the tiny model's second."""
    folder = tmp_path_factory.mktemp("spoken")
    random = np.random.default_rng(0)
    for index, text in enumerate(("dva tři", "Jedna.", "otevři okno pět")):
        soundfile.write(folder / f"{index}.wav", 0.1 * random.standard_normal(6000 + 3000 * index), 16000)
        (folder / f"{index}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def tiny(checkpoints, folder):
    """The arguments that name the tiny model, its adapters of two tags, and the clips."""
    speech = checkpoints["speech"]
    words = ["speech", "--model", str(speech.model), "--device", "cpu", "--max-new-tokens", "9"]
    for tag in ("aa", "bb"):
        words += [f"--adapter={tag}={path}" for path in speech.adapters[tag].values()] + ["--data", f"{tag}={folder}"]
    return words


def refused(capsys, words):
    """The one line of an exit with 2."""
    with pytest.raises(SystemExit) as stopped:
        command.main(words)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and not captured.out
    (line,) = captured.err.splitlines()
    assert line.startswith("python -m flora.evaluate")
    return line


def test_a_folder_is_scored_for_each_method(tiny, folder, tmp_path, capsys):
    path = tmp_path / "scores.jsonl"
    assert command.main([*tiny, "--json", str(path), "--batch-size", "4"]) == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()[2:5]] == ["aa", "bb", "mean"]
    assert "lora" in printed.out and "flora" in printed.out and "Hindi and Marathi" in printed.out
    assert "adapter's" not in printed.out and not printed.err, "no confusion matrix, no bar where there is no terminal"
    rows = read_rows(path)
    scores, means = ([row for row in rows if isinstance(row, kind)] for kind in (Score, Mean))
    pairs = [("base", None), ("lora", None), ("flora", None), ("flora", "base"), ("flora", "lora")]
    assert [(m.metric, m.method, m.versus) for m in means] == [(metric, *p) for metric in ("WER", "WER, normalised") for p in pairs]
    assert {(m.languages, m.items, m.source, m.command) for m in means} == {(("aa", "bb"), 6, folder.name, scores[0].command)}
    assert [(s.language, s.method, s.adapter) for s in scores[::2]] == [
        ("aa", "base", None), ("aa", "lora", "aa"), ("aa", "flora", "aa"),
        ("bb", "base", None), ("bb", "lora", "bb"), ("bb", "flora", "bb"),
    ]  # fmt: skip
    for score in scores:
        assert isinstance(score, Score) and score.metric in ("WER", "WER, normalised")
        assert score.items == 3 and score.graded and score.value >= 0 and score.low <= score.value <= score.high
        assert (score.device, score.dtype, score.seed, score.samples, score.temperature) == ("cpu", "float32", 1, 1, 0.0)
        assert score.source == folder.name and score.command.startswith("python -m flora.evaluate speech --model ")
    assert str(tmp_path.parent) not in path.read_text(), "no folder of this machine"


def test_rows_on_the_terminal_stand_alone(tiny, capsys):
    assert command.main([*tiny, "--json", "-", "--methods", "flora", "--confusion", "2"]) == 0
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    scores = [row for row in rows if row["kind"] == "score"]
    raw = [(row["language"], row["adapter"], row["items"]) for row in scores if row["metric"] == "WER"]
    assert raw == [("aa", "aa", 3), ("aa", "bb", 2), ("bb", "bb", 3), ("bb", "aa", 2)]
    assert {row["method"] for row in rows} == {"flora"} and "aa's" in printed.err, "the tables go elsewhere"


def test_a_report_merges_into_what_is_there(tiny, tmp_path, capsys):
    results = tmp_path / "results"
    for methods in (["base"], ["lora", "flora"]):
        assert command.main([*tiny, "--report", "--results", str(results), "--methods", *methods]) == 0
    scores = [row for row in read_rows(results / "accuracy_speech.jsonl") if isinstance(row, Score)]
    assert {(s.method, s.adapter) for s in scores if s.language == "aa"} == {
        ("base", None), ("lora", "aa"), ("flora", "aa"), ("flora", "bb"),
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.count("not measured") == 10, "the promises are about the six languages"
    assert [path.name for path in results.iterdir()] == ["accuracy_speech.jsonl"], "the clips that ship are of other languages"


@pytest.mark.parametrize(
    ("place", "asked"),
    [
        ("owner/voice", ("owner/voice", "aa", "test")),  # Common Voice's configurations are its languages
        ("owner/voice:cs_cz", ("owner/voice", "cs_cz", "test")),
        ("owner/voice:cs_cz:validation", ("owner/voice", "cs_cz", "validation")),
        ("owner/voice::validation", ("owner/voice", "aa", "validation")),
        (".", (".", None, "test")),  # a folder
    ],
)
def test_a_data_set_is_named_with_its_part(checkpoints, folder, place, asked, monkeypatch, capsys):
    from flora.evaluate import speech

    calls = []

    def recorded(language, name, config, split, window_s, limit):
        calls.append((name, config, split))
        return speech.folder_clips(language, folder, window_s, limit)

    monkeypatch.setattr(speech, "dataset_clips", recorded)
    words = ["speech", "--model", str(checkpoints["speech"].model), "--device", "cpu", "--max-new-tokens", "1"]
    assert command.main([*words, "--dataset", f"aa={place}", "--clips", "2"]) == 0
    assert calls == [asked] and "base" in capsys.readouterr().out


def test_clips_left_out_are_named(tiny, folder, tmp_path, capsys):
    many = tmp_path / "many"
    many.mkdir()
    for index in range(100):
        for suffix in ("wav", "txt"):
            shutil.copy(folder / f"0.{suffix}", many / f"{index}.{suffix}")
    (many / "99.txt").write_text(" ")
    words = [*tiny[: tiny.index("--device")], "--device", "cpu", "--data", f"aa={many}", "--max-new-tokens", "1"]
    assert command.main(words) == 0
    assert capsys.readouterr().err == "left out: the clip '99.wav' has no text: write its transcript beside it\n"
    (many / "98.wav").write_bytes(b"no sound")
    assert "2 of the 100 clips of many cannot be scored" in refused(capsys, words)


def test_an_interrupted_run_says_so(tiny, monkeypatch):
    from flora.evaluate import speech

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(speech, "measure", interrupted)
    assert command.main(tiny) == 130


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required"),
        (["song"], "invalid choice: 'song'"),
        (["speech", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["speech", "--clips", "0"], "--clips: must be a whole number of at least 1, not '0'"),
        (["speech", "--batch-size", "many"], "--batch-size: must be a whole number"),
        (["speech", "--methods", "prefix"], "invalid choice: 'prefix'"),
        (["speech", "--languages", "xx"], "the spoken corpus has no language 'xx'"),
        (["speech", "--data", "cs"], "--data takes TAG=FOLDER, not 'cs'"),
        (["speech", "--dataset", "=a/b"], "--dataset takes TAG=ID[:CONFIG[:SPLIT]], not '=a/b'"),
        (["speech", "--data", "cs=a", "--data", "cs=b"], "two sources of cs"),
        (["speech", "--data", "cs=a", "--languages", "cs"], "--languages chooses of the project's corpus"),
        (["speech", "--data", "cs=nowhere"], "there is no folder 'nowhere'"),
        (["speech", "--data", "cs=nowhere", "--report"], "name a folder with --results"),
        (["speech", "--adapters", "nowhere"], "there is no folder 'nowhere'"),
        (["speech", "--adapter", "cs"], "an adapter is given as TAG=FOLDER"),
        (["speech", "--adapter", "cs=nowhere"], "adapter nowhere has no adapter_config.json here; name its method"),
        (["speech", "--adapter", "cs/prefix=nowhere"], "adapter cs/prefix: the method 'prefix' is unknown"),
        (["speech", "--adapter", "cs/lora=a", "--adapter", "cs/lora=b"], "there are two adapters cs/lora"),
        (["speech", "--adapter", "cs/lora=nowhere", "--languages", "cs"], "adapter nowhere: there is no such folder"),
        (
            ["speech", "--adapter", "hi/lora=nowhere", "--languages", "cs"],
            "adapter hi/lora has no clips: give some with --data hi=",
        ),
        (["speech", "--languages", "en", "--methods", "lora"], "nothing to evaluate: there is no adapter of en by lora"),
        (["speech", "--model", "nowhere", "--languages", "cs"], "model 'nowhere' is neither a folder here nor a hub id"),
        (["speech", "--model", "assets/models/code", "--languages", "cs"], "--model names the code model 'code'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(words, said, capsys, monkeypatch):
    monkeypatch.chdir(PROJECT)
    assert said in refused(capsys, words)


def test_without_espeak_the_way_out_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    words = ["speech", "--languages", "cs", "--methods", "base", "--corpus", str(tmp_path)]
    assert "apt install espeak-ng" in refused(capsys, words)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_the_embedded_model_is_judged_on_the_corpus(capsys, tmp_path):
    """Two languages, a few clips, base and fLoRA, with the other language's adapters: the shape of the report, not its numbers."""
    words = ["speech", "--report", "--languages", "cs", "hi", "--methods", "base", "flora", "--clips", "6", "--confusion", "2"]
    assert command.main([*words, "--corpus", str(tmp_path / "spoken"), "--results", str(tmp_path)]) == 0
    rows = [row for row in read_rows(tmp_path / "accuracy_speech.jsonl") if row.metric == "WER"]
    scores = [row for row in rows if isinstance(row, Score)]
    assert [(m.method, m.versus, m.languages) for m in rows if isinstance(m, Mean)] == [
        (method, versus, ("cs", "hi")) for method, versus in (("base", None), ("flora", None), ("flora", "base"))
    ]
    assert {(s.language, s.method, s.adapter) for s in scores if s.language == "cs"} == {
        ("cs", "base", None), *(("cs", "flora", tag) for tag in ("ar", "cs", "lt", "mr", "mn", "hi")),
    }  # fmt: skip
    by_key = {(s.language, s.method, s.adapter): s for s in scores}
    assert by_key["cs", "flora", "cs"].value < by_key["cs", "flora", "hi"].value
    assert by_key["cs", "flora", "cs"].checkpoint == "assets/adapters/speech/cs/flora"
    assert by_key["cs", "base", None].model == "assets/models/speech" and by_key["cs", "base", None].source == "corpus held-out"
    rows = read_rows(tmp_path / "answers_speech.jsonl")
    items = [row for row in rows if isinstance(row, Item)]
    assert {item.language for item in items} == {"cs", "hi"} and all((PROJECT / item.clip).is_file() for item in items)
    answers = [row for row in rows if isinstance(row, Answer)]
    assert len(answers) == 2 * len(items) and {answer.adapter for answer in answers} == {None, "cs", "hi"}
    printed = capsys.readouterr().out
    assert "hi's" in printed and "base model: mean WER of 6 languages at least 40 %" in printed


def test_help_names_what_is_there(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["speech", "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    for option in ("--data", "--dataset", "--model", "--adapter", "--methods", "--report", "--results", "--json"):
        assert option in shown
