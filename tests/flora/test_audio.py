"""Clips of every kind, good and bad."""

import shutil
import subprocess

import numpy as np
import pytest
import soundfile

from flora.audio import load_audio
from flora.errors import AudioError


def spoken(rate, seconds=0.5, channels=1):
    """A 440 Hz tone: (frames, channels) float64."""
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)
    return np.repeat(tone[:, None], channels, axis=1)


def loudest_frequency(samples, rate):
    return np.fft.rfftfreq(len(samples), 1 / rate)[np.abs(np.fft.rfft(samples)).argmax()]


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
    samples, sampling_rate = load_audio(path, window_s=4.0)
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
    samples, _ = load_audio(tmp_path / name, window_s=4.0)
    assert loudest_frequency(samples, 16000) == pytest.approx(440, abs=6)
    with pytest.raises(AudioError, match="longer than the 0.2 s"):
        load_audio(tmp_path / name, window_s=0.2)


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
        load_audio(path, window_s=4.0)
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
            load_audio(path, window_s=4.0)


def test_without_ffmpeg_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    path = broken(tmp_path, "text")
    with pytest.raises(AudioError, match="without ffmpeg: save it as WAV"):
        load_audio(path)


def test_a_clip_beyond_full_scale_is_brought_down_to_it(tmp_path):
    soundfile.write(tmp_path / "loud.wav", 40 * spoken(16000), 16000, subtype="FLOAT")
    samples, _ = load_audio(tmp_path / "loud.wav")
    assert np.abs(samples).max() == pytest.approx(1.0)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
def test_bytes_are_read_like_the_file_they_came_from(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, spoken(44100, channels=2), 44100)
    of_file, of_bytes = load_audio(path)[0], load_audio(path.read_bytes(), name="clip")[0]
    assert np.array_equal(of_file, of_bytes) and len(of_bytes)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
def test_bytes_that_libsndfile_does_not_read_ffmpeg_does(tmp_path):
    soundfile.write(tmp_path / "source.wav", spoken(16000, 1.0), 16000)
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-i", tmp_path / "source.wav", tmp_path / "clip.m4a"], check=True)
    samples, _ = load_audio((tmp_path / "clip.m4a").read_bytes(), name="clip")
    assert loudest_frequency(samples, 16000) == pytest.approx(440, abs=6)


@pytest.mark.parametrize(("content", "words"), [(b"", "empty file"), (b"no sound" * 40, "not audio"), (b"RIFF", "not audio")])
def test_bad_bytes_are_named(content, words):
    with pytest.raises(AudioError, match=words) as caught:
        load_audio(content, name="row 7")
    assert "'row 7'" in str(caught.value)
