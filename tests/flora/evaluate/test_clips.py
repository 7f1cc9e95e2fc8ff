"""Clips from folders, tables, data sets and the corpus: what is read, what is left out by name, and when that is too much."""

import json
import shutil

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from flora.audio import load_audio
from flora.corpus.speech import LANGUAGES
from flora.errors import EvaluationError, ModelError
from flora.evaluate.clips import corpus_clips, dataset_clips, example_clips, folder_clips
from flora.names import PROJECT

SHIPPED = PROJECT / "assets" / "clips"


def write_clip(path, seconds=0.5, rate=16000):
    """A noise of its own for every name."""
    random = np.random.default_rng(sum(path.name.encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * random.standard_normal(int(seconds * rate)), rate)
    return path


def read(clips):
    """name → text of all that can be used."""
    return {clip.name: clip.text for clip in clips}


def fill(folder, number):
    """So many clips with a NAME.txt beside them."""
    for index in range(number):
        write_clip(folder / f"{index:03}.wav", 0.05).with_suffix(".txt").write_text(f"word {index}", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_of_pairs(tmp_path):
    write_clip(tmp_path / "b.wav", 0.7, 44100).with_suffix(".txt").write_text("dva tři\n", encoding="utf-8-sig")
    write_clip(tmp_path / "speaker" / "a.flac").with_suffix(".txt").write_text("Jedna.", encoding="utf-8")
    (tmp_path / "README.md").write_text("not a clip")
    clips = folder_clips("cs", tmp_path, window_s=1.0)
    assert (clips.number, clips.source) == (2, tmp_path.name)
    first, second = clips
    assert (first.name, first.text, first.language) == ("b.wav", "dva tři\n", "cs")
    assert (second.name, second.text) == ("speaker/a.flac", "Jedna.")
    assert first.samples.shape == (11200,) and first.samples.dtype == np.float32
    assert not clips.skipped and clips.used == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", 'file_name,text\na.wav,"one said ""no"", twice"\nclips/b.wav,two\n'),
        ("metadata.tsv", 'client_id\tpath\tsentence\n1\ta.wav\tone said "no", twice\n2\tb.wav\ttwo\n'),
        ("metadata.jsonl", '{"audio": "a.wav", "text": "one said \\"no\\", twice"}\n\n{"file_name": "b.wav", "text": "two"}\n'),
    ],
)
def test_a_folder_with_a_table(tmp_path, name, content):
    """Quotation marks are CSV's own, and text in a TSV; files lie beside the table or in clips/."""
    write_clip(tmp_path / "a.wav")
    write_clip(tmp_path / "clips" / "b.wav")
    (tmp_path / name).write_text(content, encoding="utf-8")
    expected = ['one said "no", twice', "two"]
    assert list(read(folder_clips("en", tmp_path, 1.0)).values()) == expected
    table = (tmp_path / name).rename(tmp_path / name.replace("metadata", "test"))
    assert list(read(folder_clips("en", table, 1.0)).values()) == expected


def test_so_many_clips_are_drawn_by_the_seed(tmp_path):
    fill(tmp_path, 20)
    drawn = [list(read(folder_clips("cs", tmp_path, 1.0, 5, seed))) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and all(len(set(names)) == 5 for names in drawn)
    assert len(read(folder_clips("cs", tmp_path, 1.0, 50))) == 20


@pytest.fixture(scope="module")
def two_hundred(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    fill(folder, 200)
    return folder


BAD = {
    "no transcript": "'bad.wav' has no bad.txt beside it",
    "empty text": "'bad.wav' has no text",
    "not UTF-8": "bad.txt cannot be read as UTF-8",
    "not audio": "'bad.wav' is not audio",
    "empty file": "'bad.wav' is an empty file",
    "silent": "'bad.wav' is silent",
    "too long": "'bad.wav' lasts 1.5 s, longer than the 1 s",
}


def write_bad_clip(folder, what):
    path = folder / "bad.wav"
    if what == "not audio":
        path.write_bytes(b"RIFF but no sound")
    elif what == "empty file":
        path.touch()
    elif what == "silent":
        soundfile.write(path, np.zeros(8000), 16000)
    else:
        write_clip(path, 1.5 if what == "too long" else 0.5)
    if what != "no transcript":
        text = {"empty text": b" \n", "not UTF-8": bytes([255, 254, 250])}.get(what, b"text")
        path.with_suffix(".txt").write_bytes(text)


@pytest.mark.parametrize("what", BAD)
def test_a_bad_clip_is_named_and_left_out_and_a_third_one_is_too_many(two_hundred, tmp_path, what):
    folder = tmp_path / "clips"
    shutil.copytree(two_hundred, folder)
    write_bad_clip(folder, what)
    clips = folder_clips("cs", folder, window_s=1.0)
    assert len(read(clips)) == clips.used == 200
    assert len(clips.skipped) == 1 and BAD[what] in clips.skipped[0], clips.skipped
    assert str(tmp_path) not in clips.skipped[0] and "\n" not in clips.skipped[0]
    for name in ("001", "002"):
        (folder / f"{name}.txt").unlink()
    with pytest.raises(EvaluationError, match="3 of the 201 clips of clips cannot be scored, and more than 1 % is too many"):
        read(folder_clips("cs", folder, window_s=1.0))


def test_broken_lines_of_a_table_are_named_by_number(two_hundred, tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(two_hundred, folder)
    lines = [json.dumps({"file_name": f"{index:03}.wav", "text": f"word {index}"}) for index in range(200)]
    (folder / "metadata.jsonl").write_text("\n".join([*lines[:4], "{broken", *lines[4:], '{"text": "no file"}']))
    clips = folder_clips("cs", folder, 1.0)
    assert len(read(clips)) == 200
    assert "metadata.jsonl, line 5: this is not a JSON object" in clips.skipped[0]
    assert "metadata.jsonl, line 202 names no file" in clips.skipped[1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, None, "has no clips: it needs metadata.csv with the columns file_name and text"),
        ("metadata.csv", "one,two\n1,2\n", "metadata.csv has no columns for the file and its text"),
        ("metadata.csv", "", "metadata.csv has no columns"),
        ("metadata.csv", 'file_name,text\na.wav,"never closed\n', "metadata.csv, line 1: unexpected end of data"),
        ("metadata.csv", "file_name,text\n", "has no clips"),
        ("metadata.csv", "file_name,text\nnowhere.wav,one\n", "there is no clip 'nowhere.wav'"),
        ("metadata.csv", "file_name,text\na.wav\n", "line 2 has no text"),
        ("metadata.jsonl", "\n\n", "has no clips"),
    ],
)
def test_a_folder_that_holds_no_clips_is_said(tmp_path, name, content, words):
    folder = tmp_path / "own"
    folder.mkdir()
    if name:
        (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(EvaluationError, match=words) as caught:
        read(folder_clips("cs", folder, 1.0))
    assert str(tmp_path) not in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_that_is_no_text_is_said(tmp_path):
    (tmp_path / "metadata.tsv").write_bytes(b"path\tsentence\n" + bytes([255, 254]))
    with pytest.raises(EvaluationError, match="metadata.tsv cannot be read as UTF-8"):
        folder_clips("cs", tmp_path, 1.0)


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(EvaluationError, match="there is no folder 'nowhere'"):
        folder_clips("cs", tmp_path / "nowhere", 1.0)


# ------------------------------------------------------------------------------------------------------------ data sets


def write_dataset(folder, texts, text_column="sentence", content=None):
    """A data set as the hub has it: test.parquet with the clips' bytes, typed as audio."""
    folder.mkdir(parents=True)
    audio = [
        {"bytes": content or write_clip(folder.parent / f"{index}.flac", 0.05).read_bytes(), "path": f"{index}.flac"}
        for index in range(len(texts))
    ]
    text = datasets.Value("string")
    features = datasets.Features({"client_id": text, "audio": datasets.Audio(), text_column: text})
    table = pyarrow.table({"client_id": ["a"] * len(texts), "audio": audio, text_column: texts})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features.to_dict()}})})
    pyarrow.parquet.write_table(table, folder / "test.parquet")
    return folder


def test_a_data_set_is_streamed_and_its_audio_decoded_here(tmp_path):
    """As Common Voice: columns audio and sentence, bytes of files, and no decoder but soundfile."""
    folder = write_dataset(tmp_path / "voice", ["dva tři", "", "čtyři"] + ["pět"] * 97)
    clips = dataset_clips("cs", str(folder), None, "test", 1.0)
    made = list(clips)
    assert [clip.text for clip in made[:2]] == ["dva tři", "čtyři"] and len(made) == 99
    assert np.array_equal(made[1].samples, load_audio(tmp_path / "2.flac")[0])
    assert clips.skipped == ["the clip '1.flac' has no text: write its transcript beside it"] and clips.source == "voice:test"
    assert len(list(dataset_clips("cs", str(folder), None, "test", 1.0, limit=1))) == 1
    with pytest.raises(EvaluationError, match="1 of the 2 clips of voice:test"):
        list(dataset_clips("cs", str(folder), None, "test", 1.0, limit=2))


def test_a_data_set_with_broken_audio_fails_by_name(tmp_path):
    folder = write_dataset(tmp_path / "voice", ["dva", "tři"], content=b"no sound")
    with pytest.raises(EvaluationError, match="'0.flac' is not audio"):
        list(dataset_clips("cs", str(folder), None, "test", 1.0))


@pytest.mark.parametrize(
    ("text_column", "config", "split", "words"),
    [
        ("sentence", None, "validation", "voice:validation cannot be opened"),
        ("sentence", "hsb", "test", "voice:hsb:test cannot be opened"),
        ("words", None, "test", "it needs audio, and its text in one of text, sentence"),
    ],
)
def test_a_data_set_without_that_part_is_said(tmp_path, text_column, config, split, words):
    folder = write_dataset(tmp_path / "voice", ["dva"], text_column)
    with pytest.raises(EvaluationError, match=words) as caught:
        dataset_clips("cs", str(folder), config, split, 1.0)
    assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_said_with_the_way_out():
    """The tests are offline."""
    with pytest.raises(EvaluationError, match="common_voice_17_0 cannot be reached: check the network, or download it"):
        dataset_clips("cs", "mozilla-foundation/common_voice_17_0", "cs", "test", 1.0)


# --------------------------------------------------------------------------------------------------------------- corpus


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_the_corpus_gives_held_out_clips(tmp_path):
    clips = corpus_clips(["mn", "cs"], 3, 5, tmp_path, 4.0)
    for tag, part in clips.items():
        made = list(part)
        assert (len(made), part.source, part.number) == (3, "corpus held-out", 3)
        assert [clip.name for clip in made] == ["held-out 0", "held-out 1", "held-out 2"]
        assert all(clip.language == tag and clip.text and 0 < len(clip.samples) <= 64000 for clip in made)
    with pytest.raises(EvaluationError, match="longer than the 0.1 s that the model hears"):
        list(corpus_clips(["cs"], 3, 5, tmp_path, 0.1)["cs"])


def test_the_corpus_says_what_it_lacks(tmp_path, monkeypatch):
    with pytest.raises(EvaluationError, match="no language 'xx'; it has ar, cs"):
        corpus_clips(["cs", "xx"], 3, 5, tmp_path, 4.0)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelError, match="apt install espeak-ng"):
        corpus_clips(["cs"], 3, 5, tmp_path, 4.0)


def test_the_clips_that_ship_are_read(tmp_path):
    clips = example_clips(SHIPPED)
    assert {clip.language for clip in clips} == set(LANGUAGES)
    assert all((SHIPPED / clip.file).is_file() and clip.text and len(clip.samples) for clip in clips)
    with pytest.raises(EvaluationError, match="python -m flora.corpus.speech --clips"):
        example_clips(tmp_path)
