"""The ready batch, batch files, and clips of every kind, good and bad."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from flora.engine import Request
from flora.errors import AudioError, RequestError
from profiling import workload


def spoken(rate, seconds=0.5, channels=1):
    """A 440 Hz tone: (frames, channels) float64."""
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)
    return np.repeat(tone[:, None], channels, axis=1)


def loudest_frequency(samples, rate):
    return np.fft.rfftfreq(len(samples), 1 / rate)[np.abs(np.fft.rfft(samples)).argmax()]


# --------------------------------------------------------------------------------------------------------------- clips


@pytest.mark.parametrize(
    ("name", "rate", "channels", "subtype"),
    [
        ("mono.wav", 16000, 1, "PCM_16"),
        ("stereo.wav", 44100, 2, "PCM_16"),
        ("telephone.wav", 8000, 1, "PCM_U8"),
        ("deep.wav", 48000, 2, "PCM_32"),
        ("float.wav", 22050, 1, "FLOAT"),
        ("six.flac", 16000, 6, "PCM_24"),
        ("clip.ogg", 48000, 1, None),
        ("clip.mp3", 44100, 2, None),
        ("no_suffix_at_all", 16000, 1, "PCM_16"),
    ],
)
def test_every_usual_clip_becomes_mono_float32_at_16_khz(tmp_path, name, rate, channels, subtype):
    path = tmp_path / name
    soundfile.write(path, spoken(rate, channels=channels), rate, subtype=subtype, format=None if "." in name else "WAV")
    samples, sampling_rate = workload.load_audio(path, window_s=4.0)
    assert sampling_rate == 16000 and samples.dtype == np.float32 and samples.ndim == 1
    assert len(samples) == pytest.approx(8000, rel=0.15), len(samples)
    assert loudest_frequency(samples, 16000) == pytest.approx(440, abs=6)
    assert np.abs(samples).max() == pytest.approx(0.3, abs=0.05)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
@pytest.mark.parametrize("name", ["clip.m4a", "clip.webm"])
def test_what_libsndfile_does_not_read_ffmpeg_does(tmp_path, name):
    soundfile.write(tmp_path / "source.wav", spoken(16000, 1.0), 16000)
    encode = ["ffmpeg", "-nostdin", "-v", "error", "-i", tmp_path / "source.wav", tmp_path / name]
    subprocess.run(encode, check=True, timeout=30)
    samples, _ = workload.load_audio(tmp_path / name, window_s=4.0)
    assert loudest_frequency(samples, 16000) == pytest.approx(440, abs=6)
    with pytest.raises(AudioError, match="longer than the 0.2 s"):
        workload.load_audio(tmp_path / name, window_s=0.2)


def broken(tmp_path, what):
    path = tmp_path / f"{what}.wav"
    if what == "missing":
        return path
    if what == "empty":
        path.touch()
    elif what == "text":
        path.write_text("this is not sound\n" * 50)
    elif what == "zero-length":
        soundfile.write(path, np.zeros((0, 1)), 16000)
    elif what == "silent":
        soundfile.write(path, np.full(16000, 0.25), 16000)  # a constant is not sound either
    elif what in ("nan", "infinite"):
        samples = spoken(16000)
        samples[100] = np.nan if what == "nan" else np.inf
        soundfile.write(path, samples, 16000, subtype="FLOAT")
    elif what == "long":
        soundfile.write(path, spoken(16000, 4.2), 16000)
    elif what == "corrupt":
        path = tmp_path / "corrupt.flac"
        soundfile.write(path, spoken(16000, 2.0) + np.random.default_rng(0).normal(0, 0.1, (32000, 1)), 16000)
        path.write_bytes(path.read_bytes()[:9000] + b"\0" * 20000)
    elif what == "picture":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    elif what == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", "there is no clip"),
        ("folder", "there is no clip"),
        ("empty", "empty file"),
        ("text", "not audio"),
        ("picture", "not audio"),
        ("zero-length", "no sound at all"),
        ("silent", "silent"),
        ("nan", "not finite"),
        ("infinite", "not finite"),
        ("long", "longer than the 4 s"),
        ("corrupt", "corrupt"),
    ],
)
def test_a_bad_clip_is_named_in_one_sentence_without_its_path(tmp_path, what, words):
    path = broken(tmp_path, what)
    with pytest.raises(AudioError, match=words) as caught:
        workload.load_audio(path, window_s=4.0)
    message = str(caught.value)
    assert path.name in message and str(tmp_path) not in message and "\n" not in message and len(message) < 160


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
@pytest.mark.parametrize(
    "text", ["#EXTM3U\n#EXTINF:1,\n{name}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {name}\n", "[playlist]\nFile1={name}\n"]
)
def test_a_playlist_cannot_fetch_another_file_of_this_machine(tmp_path, text):
    soundfile.write(tmp_path / "private.wav", spoken(16000), 16000)
    for target in ("private.wav", tmp_path / "private.wav"):
        path = tmp_path / "clip.wav"
        path.write_text(text.format(name=target))
        with pytest.raises(AudioError, match="not audio"):
            workload.load_audio(path, window_s=4.0)


def test_without_ffmpeg_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    path = broken(tmp_path, "text")
    with pytest.raises(AudioError, match="without ffmpeg: save it as WAV"):
        workload.load_audio(path)


def test_a_clip_beyond_full_scale_is_brought_down_to_it(tmp_path):
    soundfile.write(tmp_path / "loud.wav", 40 * spoken(16000), 16000, subtype="FLOAT")
    samples, _ = workload.load_audio(tmp_path / "loud.wav")
    assert np.abs(samples).max() == pytest.approx(1.0)


def test_the_clips_that_ship_can_all_be_read():
    clips = workload.example_clips()
    assert {clip["tag"] for clip in clips} >= {"ar", "cs", "lt", "mr", "mn", "hi"}
    for clip in clips:
        samples, rate = workload.load_audio(workload.ASSETS / "clips" / clip["file"])
        assert 0.3 < len(samples) / rate < 30, clip


# ------------------------------------------------------------------------------------------------------------ adapters


def test_adapters_are_found_by_tag_and_family_and_nothing_else_is(tmp_path):
    for folder in ("lua/flora", "lua/lora", "rb/lora", "own", "empty", "notes/flora"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("lua/flora", "lua/lora", "rb/lora", "own"):
        (tmp_path / folder / "adapter_config.json").write_text("{}")
    found = workload.discover_adapters(tmp_path)
    assert {tag: [path.relative_to(tmp_path).as_posix() for path in paths] for tag, paths in found.items()} == {
        "lua": ["lua/flora", "lua/lora"],
        "rb": ["rb/lora"],
        "own": ["own"],
    }
    assert workload.discover_adapters(tmp_path / "nowhere") == {}


# ------------------------------------------------------------------------------------------------------------- batches


def test_the_ready_batch_prefers_languages_with_an_adapter():
    rows = workload.ready_rows({"code": ["lua", "rb", "d", "r", "jl"], "speech": ["cs"]})
    code, speech = [row for row in rows if "prompt" in row], [row for row in rows if "audio" in row]
    assert len(code) == len(speech) == 4 and all(row["adapter"] in ("lua", "rb", "d", "r", "jl") for row in code)
    assert [row["adapter"] for row in speech] == ["cs", None, None, None], "the rest asks the base model"
    assert all(workload.request_from_row(row).max_new_tokens == 48 for row in rows)
    assert all("audio" not in row for row in workload.ready_rows({"code": ["lua"]})), "a kind without an engine has no rows"


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_a_batch_is_read_from_a_file(tmp_path, form):
    soundfile.write(tmp_path / "own.wav", spoken(16000), 16000)
    rows = [{"prompt": "def f", "adapter": "rb", "max_new_tokens": 7}, {"audio": "own.wav", "adapter": None}]
    path = tmp_path / f"batch.{form}"
    path.write_text(json.dumps(rows, indent=1) if form == "json" else "\n\n".join(map(json.dumps, rows)) + "\n")
    requests = [workload.request_from_row(row, tmp_path, 9) for row in workload.read_rows(path)]
    assert (requests[0].prompt, requests[0].adapter, requests[0].max_new_tokens) == ("def f", "rb", 7)
    assert requests[1].sampling_rate == 16000 and requests[1].max_new_tokens == 9


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no rows"),
        ("[]", "no rows"),
        ('{"prompt": "a"}\n{oops}', "line 2"),
        ("[1,\n2", "line 2"),
        ("\xff\xfe\0", "cannot be read"),
    ],
)
def test_a_bad_batch_file_is_named_with_its_line(tmp_path, content, words):
    path = tmp_path / "batch.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RequestError, match=words) as caught:
        workload.read_rows(path)
    assert "batch.jsonl" in str(caught.value) and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"prompt": "a", "audio": "b.wav"},
        {"prompt": 3},
        {"prompt": "a", "adaptor": "lua"},
        {"prompt": "a", "max_new_tokens": "many"},
        {"prompt": "a", "max_new_tokens": True},
        {"prompt": "a", "max_new_tokens": 0},
        {"prompt": "a", "temperature": -1},
        ["prompt", "a"],
        {"audio": "nowhere.wav"},
    ],
)
def test_a_row_that_makes_no_sense_is_refused(row):
    with pytest.raises(RequestError):
        workload.request_from_row(row)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), st.lists, max_leaves=4)
fields = st.sampled_from(["prompt", "audio", "adapter", "max_new_tokens", "temperature", "other"])


@given(st.dictionaries(fields, json_values) | json_values)
def test_any_row_makes_a_request_or_a_request_error(row):
    try:
        assert isinstance(workload.request_from_row(row), Request)
    except RequestError as error:
        assert str(error)


def test_popularity_in_words():
    assert workload.popularity(["a", "b", None]) == "distinct"
    assert workload.popularity(["a", "a"]) == "identical"
    assert workload.popularity(["a", "a", "b"]) == "as given"
    assert workload.popularity([None, None]) == workload.popularity([]) == "no"
