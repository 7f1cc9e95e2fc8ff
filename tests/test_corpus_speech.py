"""The spoken corpus, the shipped example clips, and the embedded speech model's tokenizer."""

import json
import shutil
import unicodedata
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile

from flora.corpus import speech
from flora.corpus.speech import LANGUAGES, PITCHES, SAMPLING_RATE, SPEEDS, VARIANTS, WINDOW_S, speak, utterances
from flora.errors import ModelError

ROOT = Path(__file__).parents[1]
CLIPS = ROOT / "assets" / "clips"
MODEL = ROOT / "assets" / "models" / "speech"
SIX = ("ar", "cs", "lt", "mr", "mn", "hi")

needs_espeak = pytest.mark.skipif(
    shutil.which("espeak-ng") is None,
    reason="espeak-ng is NOT INSTALLED: the spoken corpus is not tested (apt install espeak-ng)",
)


def bare_commands(tag):
    return {speech.written(command) for command in LANGUAGES[tag].commands()}


def test_six_languages_and_english():
    assert set(LANGUAGES) == {*SIX, "en"}


@pytest.mark.parametrize("tag", LANGUAGES)
def test_splits_share_no_voice_speed_pitch_or_word_combination(tag):
    train, held_out = (list(islice(utterances(tag, split), 400)) for split in ("train", "held-out"))
    for aspect in ("voice", "speed", "pitch"):
        shared = {getattr(u, aspect) for u in train} & {getattr(u, aspect) for u in held_out}
        assert not shared, f"{tag}: {aspect} {shared} in both splits"
    assert {u.text for u in train} & {u.text for u in held_out} <= bare_commands(tag)
    assert sum(u.text not in bare_commands(tag) for u in held_out) > 250


def test_split_constants_are_disjoint():
    for choices in (VARIANTS, SPEEDS, PITCHES):
        assert not set(choices["train"]) & set(choices["held-out"])


@pytest.mark.parametrize("tag", LANGUAGES)
def test_transcripts_are_lower_case_normalised_and_without_punctuation(tag):
    for utterance in islice(utterances(tag), 200):
        text = utterance.text
        assert text == unicodedata.normalize("NFC", text).lower() and text == " ".join(text.split())
        assert not [c for c in text if unicodedata.category(c)[0] in "PSN"], text


@pytest.mark.parametrize("tag", LANGUAGES)
def test_every_word_of_the_held_out_split_is_spoken_in_training(tag):
    train, held_out = (
        {w for u in islice(utterances(tag, split), 800) for w in u.text.split()} for split in ("train", "held-out")
    )
    assert held_out <= train


def test_the_same_seed_gives_the_same_utterances():
    first, again, other = (list(islice(utterances("cs", "train", seed), 20)) for seed in (3, 3, 4))
    assert first == again and first != other


def test_an_unknown_language_or_split_is_named():
    with pytest.raises(ValueError, match="'xx'"):
        next(utterances("xx"))
    with pytest.raises(ValueError, match="'test'"):
        next(utterances("cs", "test"))


def test_a_missing_espeak_is_said_with_the_way_out(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(speech.shutil, "which", lambda name: None)
    with pytest.raises(ModelError, match="apt install espeak-ng"):
        speak(next(utterances("cs")))
    with pytest.raises(SystemExit) as stopped:
        speech.main(["--clips", str(tmp_path)])
    assert stopped.value.code == 2 and "apt install espeak-ng" in capsys.readouterr().err


@needs_espeak
@pytest.mark.parametrize("tag", LANGUAGES)
def test_a_spoken_clip_is_finite_mono_and_of_plausible_length(tag):
    for split in ("train", "held-out"):
        for utterance in islice(utterances(tag, split, seed=5), 3):
            clip = speak(utterance)
            assert clip.ndim == 1 and clip.dtype == np.float32 and np.isfinite(clip).all()
            assert 0.4 < len(clip) / SAMPLING_RATE < 1.4 * WINDOW_S
            assert 0.1 < np.abs(clip).max() <= 1.0
            assert np.array_equal(clip, speak(utterance)), "the same utterance is spoken the same way"


@needs_espeak
def test_an_unknown_voice_is_named():
    from dataclasses import replace

    with pytest.raises(ModelError, match="no-such-voice"):
        speak(replace(next(utterances("cs")), voice="no-such-voice"))


@needs_espeak
def test_a_dataset_is_spoken_once_and_then_read(tmp_path, monkeypatch):
    counts = {("cs", "train"): 4, ("ar", "held-out"): 3}
    expected = speak(next(utterances("cs", "train")))
    made = speech.build_dataset(tmp_path, counts)
    assert {key: len(clips) for key, clips in made.items()} == counts
    monkeypatch.setattr(speech.shutil, "which", lambda name: None)  # no espeak-ng: what is cached must do
    read = speech.build_dataset(tmp_path, counts)
    for key, clips in read.items():
        assert clips.texts == made[key].texts == [u.text for u in islice(utterances(*key), counts[key])]
        for index in range(len(clips)):
            audio = clips.audio(index)
            assert audio.dtype == np.float32 and 0.4 * SAMPLING_RATE < len(audio) <= WINDOW_S * SAMPLING_RATE
            assert np.array_equal(audio, made[key].audio(index))
    assert np.abs(read["cs", "train"].audio(0) - expected).max() < 1e-4
    assert not list(tmp_path.glob("*.partial"))


@needs_espeak
def test_the_command_writes_the_example_clips(tmp_path):
    assert speech.main(["--clips", str(tmp_path)]) == 0
    written, shipped = (json.loads((folder / "clips.json").read_text(encoding="utf-8")) for folder in (tmp_path, CLIPS))
    assert written == shipped
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in CLIPS.iterdir()}


def test_the_shipped_clips_are_small_and_held_out():
    entries = json.loads((CLIPS / "clips.json").read_text(encoding="utf-8"))
    tags = [entry["tag"] for entry in entries]
    assert {tag: tags.count(tag) for tag in LANGUAGES} == {tag: 2 if tag == "en" else 4 for tag in LANGUAGES}
    for tag in LANGUAGES:
        assert len({entry["voice"] for entry in entries if entry["tag"] == tag}) == (2 if tag == "en" else 3)
    for entry in entries:
        path = CLIPS / entry["file"]
        samples, rate = soundfile.read(path, dtype="float32")
        assert rate == SAMPLING_RATE and samples.ndim == 1 and 0.5 < len(samples) / rate <= WINDOW_S
        assert path.stat().st_size <= 64_000
        assert entry["voice"].split("+")[1] in VARIANTS["held-out"]
        assert speech.is_held_out(entry["text"])


def test_the_processor_reads_every_transcript_back():
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(MODEL)
    for tag in LANGUAGES:
        texts = [utterance.text for utterance in islice(utterances(tag, "held-out"), 100)]
        ids = processor.tokenizer(texts).input_ids
        assert processor.batch_decode(ids, skip_special_tokens=True) == texts
        assert max(map(len, ids)) < 40
    names = processor.tokenizer.convert_ids_to_tokens(ids[0])
    assert names[:2] == ["<|startoftranscript|>", "<|notimestamps|>"] and names[-1] == "<|endoftext|>"


def test_the_shipped_model_is_small_and_transcribes_the_english_clips():
    import torch
    from transformers import AutoProcessor, WhisperForConditionalGeneration

    processor = AutoProcessor.from_pretrained(MODEL)
    model = WhisperForConditionalGeneration.from_pretrained(MODEL)
    assert model.num_parameters() <= 5_000_000
    assert sum(file.stat().st_size for file in MODEL.rglob("*")) <= 10_000_000
    entries = [e for e in json.loads((CLIPS / "clips.json").read_text(encoding="utf-8")) if e["tag"] == "en"]
    for entry in entries:
        samples, rate = soundfile.read(CLIPS / entry["file"], dtype="float32")
        features = processor(samples, sampling_rate=rate, return_tensors="pt").input_features
        assert features.shape == (1, 80, round(WINDOW_S * 100))
        generated = model.generate(features)
        assert processor.batch_decode(generated, skip_special_tokens=True) == [entry["text"]]
        first = torch.tensor([processor.tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|notimestamps|>"])])
        step = model(input_features=features, decoder_input_ids=first).logits[0, -1].argmax()
        assert step == processor.tokenizer(entry["text"]).input_ids[2], "generation starts as training did"
