"""Whisper as transformers serves it: start tokens, language detection, suppressed tokens, and clips of every make."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch
from transformers import WhisperProcessor

from flora import Engine, ModelError, Request

LENGTH = 12


def theirs(folder, clip: np.ndarray, adapter=None) -> tuple[list[int], list[int]]:
    """(start tokens, new tokens without the stop token) of transformers' `generate`, the adapter merged by hand."""
    model = tiny_models.load_merged(folder, adapter)
    features = WhisperProcessor.from_pretrained(folder)(clip, sampling_rate=16000, return_tensors="pt").input_features
    seen: list[list[int]] = []
    forward = model.model.decoder.forward

    def watched(input_ids=None, **rest):
        seen.append(input_ids[0].tolist())
        return forward(input_ids=input_ids, **rest)

    model.model.decoder.forward = watched
    tokens = model.generate(features, max_new_tokens=LENGTH, do_sample=False)[0].tolist()
    start = max(seen, key=len)  # the prompt is read in one piece, all else token by token
    if tokens[: len(start)] == start:
        tokens = tokens[len(start) :]
    stop = model.generation_config.eos_token_id
    return start, tokens[: tokens.index(stop)] if stop in tokens else tokens


def ours(engine: Engine, clips: list[np.ndarray], tags: list[str | None]) -> tuple[list[list[int]], list[list[int]]]:
    """The same of one batch."""
    starts, decoder = [], engine.runner._decoder

    def watched(ids, *rest):
        starts.append(ids.tolist())
        return decoder(ids, *rest)

    engine.runner._decoder = watched
    requests = [Request(audio=clip, adapter=tag, max_new_tokens=LENGTH) for clip, tag in zip(clips, tags, strict=True)]
    completions = engine.generate(requests)
    engine.runner._decoder = decoder
    return max(starts, key=lambda ids: len(ids[0])), [completion.token_ids for completion in completions]


EN, CS, LT, HI, TRANSLATE, TRANSCRIBE, NO_TIMESTAMPS = range(258, 265)  # behind two other specials and the bytes

GENERATION_OPTIONS = {
    "language and task detected": {},
    "task named": {"task": "translate"},
    "language by its code": {"language": "cs"},
    "language by its token": {"language": "<|lt|>"},
    "language by its English name": {"language": "Hindi"},
    "language and task": {"language": "lithuanian", "task": "translate"},
    "forced, with the language detected": {"forced_decoder_ids": [[1, None], [2, TRANSCRIBE]]},
    "forced": {"forced_decoder_ids": [[1, CS], [2, TRANSCRIBE], [3, NO_TIMESTAMPS]]},
    "forced, and overruled": {"forced_decoder_ids": [[1, CS], [2, TRANSCRIBE]], "language": "hi"},
    "suppressed tokens": {"suppress_tokens": list(range(20, 120))},
    "suppressed at the beginning": {"begin_suppress_tokens": list(range(0, 240))},
}


@pytest.mark.parametrize("options", GENERATION_OPTIONS)
def test_a_multilingual_model_starts_and_speaks_as_in_transformers(options, clips, tmp_path):
    folder = tiny_models.save_speech_model(tmp_path / "model", 3, tiny_models.LANGUAGES, **GENERATION_OPTIONS[options])
    plain = tiny_models.load_plain(folder)
    adapters = {
        tag: tiny_models.save_flora_adapter(tmp_path / tag, plain, tiny_models.SPEECH_LAYERS, rank, seed=rank)
        for tag, rank in (("aa", 1), ("bb", 4))
    }
    engine = Engine.from_pretrained(folder, adapters, device="cpu")
    tags = ["aa", None, "bb", "bb"]
    expected = [theirs(folder, clip, adapters.get(tag)) for clip, tag in zip(clips, tags, strict=True)]
    starts, tokens = ours(engine, clips, tags)
    assert starts == [start for start, _ in expected]
    assert tokens == [new for _, new in expected]
    if "detected" in options:
        assert len({start[1] for start in starts}) > 1, "all clips are taken for one language: the test shows nothing"


@pytest.mark.parametrize("option", ["suppress_tokens", "begin_suppress_tokens"])
def test_suppressed_tokens_are_never_chosen(option, clips, tmp_path):
    engine = Engine.from_pretrained(tiny_models.save_speech_model(tmp_path / "free", 3), device="cpu")
    requests = [Request(audio=clip, max_new_tokens=LENGTH, temperature=2.0, ignore_eos=True) for clip in clips] * 4
    free = [completion.token_ids for completion in engine.generate(requests)]
    banned = sorted({token for row in free for token in (row if option == "suppress_tokens" else row[:1])})
    folder = tiny_models.copy_with_generation_options(tmp_path / "free", tmp_path / "banned", **{option: banned})
    engine = Engine.from_pretrained(folder, device="cpu")
    completions = engine.generate(requests)
    chosen = {token for completion in completions for token in completion.token_ids}
    first = {completion.token_ids[0] for completion in completions}
    assert not first & set(banned)
    assert bool(chosen & set(banned)) == (option == "begin_suppress_tokens"), "later tokens are free, where only the first is bound"
    agreement = engine.verify(requests[:1], [engine.generate([Request(audio=clips[0], ignore_eos=True)])[0].token_ids], "flora")
    assert agreement.agrees, "verify forgets what is suppressed"


def test_a_language_without_a_token_is_an_error(tmp_path):
    folder = tiny_models.save_speech_model(tmp_path / "model", 3, tiny_models.LANGUAGES, language="klingon")
    with pytest.raises(ModelError, match="language 'klingon', for which it has no token"):
        Engine.from_pretrained(folder, device="cpu")


# ------------------------------------------------------------------------------------------------------------------ clips


def transcript(engine: Engine, audio, **options) -> list[int]:
    (completion,) = engine.generate([Request(audio=audio, adapter="bb", max_new_tokens=6, ignore_eos=True, **options)])
    return completion.token_ids


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """0.6 s of a chirp, (9600,) float32."""
    t = np.arange(9600) / 16000
    return (0.4 * np.sin(2 * np.pi * (300 + 1200 * t) * t)).astype(np.float32)


MADE_OTHERWISE = {
    "list": lambda x: x.tolist(),
    "double": lambda x: x.astype(np.float64),
    "half": lambda x: x.astype(np.float16),
    "int16": lambda x: np.round(x * 32768).astype(np.int16),
    "int32": lambda x: np.round(x.astype(np.float64) * 2**31).astype(np.int32),
    "tensor": torch.tensor,
    "tensor that wants a gradient": lambda x: torch.tensor(x, requires_grad=True),
    "int16 tensor": lambda x: torch.tensor(x * 32768).round().to(torch.int16),
    "stereo": lambda x: np.stack([x, x], axis=1),
    "stereo, channels first": lambda x: np.stack([1.5 * x, 0.5 * x]),
    "int16 stereo": lambda x: np.round(np.stack([x, x], axis=1) * 32768).astype(np.int16),
    "one column": lambda x: x[:, None],
}


@pytest.mark.parametrize("make", MADE_OTHERWISE)
def test_the_same_clip_made_otherwise_is_the_same(make, clip, tiny_engines):
    engine = tiny_engines["speech"]
    features = [
        engine.runner.encode(Request(audio=audio, sampling_rate=rate)).features
        for audio, rate in ((clip, None), (MADE_OTHERWISE[make](clip), 16000))
    ]
    max_diff = (features[0] - features[1]).abs().max().item()
    assert max_diff < 0.02, f"max_diff of the log-mel features {max_diff:.3g}"
    assert transcript(engine, MADE_OTHERWISE[make](clip)) == transcript(engine, clip)


def test_8_bit_samples_are_centred(clip, tiny_engines):
    """Eight bits are noisy, so the spectrum is compared where the clip is louder than the rounding."""
    runner = tiny_engines["speech"].runner
    eight_bit = np.round(clip * 128 + 128).clip(0, 255).astype(np.uint8)
    exact, rounded = (runner.encode(Request(audio=audio)).features for audio in (clip, eight_bit))
    loud = exact > exact.max() - 0.5
    max_diff = (exact - rounded)[loud].abs().max().item()
    assert max_diff < 0.05, f"max_diff of the log-mel features {max_diff:.3g}"


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_other_sampling_rates_are_resampled(rate, tiny_engines):
    """A 700 Hz tone recorded at another rate has the spectrum of one recorded at 16 kHz."""

    def tone(rate: int) -> np.ndarray:
        return (0.4 * np.sin(2 * np.pi * 700 * np.arange(int(0.6 * rate)) / rate)).astype(np.float32)

    runner = tiny_engines["speech"].runner
    expected = runner.encode(Request(audio=tone(16000))).features  # (mel bins, frames)
    features = runner.encode(Request(audio=tone(rate), sampling_rate=rate)).features
    assert features.shape == expected.shape
    middle = slice(5, 50)  # frames within the tone
    assert torch.equal(features[:, middle].argmax(0), expected[:, middle].argmax(0)), "the tone lies in another mel bin"
    max_diff = (features[:, middle].max(0).values - expected[:, middle].max(0).values).abs().max().item()
    assert max_diff < 0.02, f"max_diff of the loudest bin {max_diff:.3g}"
    assert len(transcript(tiny_engines["speech"], tone(rate), sampling_rate=rate)) == 6


@pytest.mark.parametrize("seconds", [1.0, 0.01, 1 / 16000])
def test_clips_as_long_as_the_window_and_as_short_as_a_sample(seconds, tiny_engines):
    assert len(transcript(tiny_engines["speech"], np.full(round(16000 * seconds), 0.3, np.float32))) == 6
