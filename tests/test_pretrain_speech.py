"""Pretraining of the embedded speech model: batches, word errors, and what is saved."""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, WhisperForConditionalGeneration

from flora.corpus.speech import LANGUAGES, Clips
from flora.pretrain.speech import batches, log_mel_features, make_model, make_processor, save_model, word_error_rate


@pytest.fixture(scope="module")
def processor():
    return make_processor(vocabulary_size=400, transcripts_per_language=100)


def noise_clips(tag, lengths, texts):
    samples = np.random.default_rng(0).integers(-3000, 3000, sum(lengths)).astype(np.int16)
    return Clips(tag, "train", samples, np.cumsum([0, *lengths]), list(texts), ["none"] * len(texts))


class Heard:
    """A model and its processor in one: what it hears stands in the features."""

    texts = ("one two three", "", "one three", "one two two three", "two one three") * 11

    def generate(self, inputs, max_length):
        return inputs

    def batch_decode(self, inputs, skip_special_tokens):
        return [self.texts[int(number)] for number in inputs[:, 0, 0]]


def test_the_word_error_rate_is_that_of_all_clips_together():
    """None, three, one, one and two errors in three words."""
    features = np.arange(55, dtype=np.float16)[:, None, None] * np.ones((1, 2, 3), np.float16)
    assert word_error_rate(Heard(), Heard(), features, ["one two three"] * 55) == pytest.approx(7 / 15)


def test_batches_hold_whole_clips_and_their_labels(processor):
    clips = {
        "en": noise_clips("en", [16000, 64000], ["one two", "open the door"]),
        "hi": noise_clips("hi", [30000], ["एक"]),
    }
    features = {tag: log_mel_features(processor, of_tag) for tag, of_tag in clips.items()}
    assert features["en"].shape == (2, 80, 400) and features["en"].dtype == np.float16
    batch = next(batches(processor, clips, features, {"en": 0.5, "hi": 0.5}, batch_size=16, seed=0))
    assert batch["input_features"].shape == (16, 80, 400) and batch["input_features"].dtype == torch.float32
    assert torch.isfinite(batch["input_features"]).all()
    start, no_timestamps, end = processor.tokenizer.convert_tokens_to_ids(
        ["<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"]
    )
    read = set()
    for labels in batch["labels"]:
        ids = labels[labels != -100].tolist()
        assert ids[0] == no_timestamps and ids[-1] == end and start not in ids
        read.add(processor.decode(ids, skip_special_tokens=True))
    assert read == {"one two", "open the door", "एक"}


def test_a_saved_model_loads_with_plain_transformers_and_is_replaced_whole(processor, tmp_path):
    model = make_model(processor, width=32, heads=2, encoder_layers=1, decoder_layers=1).eval()
    folder = tmp_path / "model"
    save_model(folder, model, processor, "first")
    save_model(folder, model, processor, "second")
    assert (folder / "README.md").read_text(encoding="utf-8") == "second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    loaded = WhisperForConditionalGeneration.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].half().float()), name
    texts = [" ".join(language.digits[:2]) for tag, language in LANGUAGES.items() if tag != "ar"]
    again = AutoProcessor.from_pretrained(folder)
    assert again.batch_decode(again.tokenizer(texts).input_ids, skip_special_tokens=True) == texts
    features = again(np.zeros(16000, np.float32), sampling_rate=16000, return_tensors="pt").input_features
    tokens = loaded.generate(features, max_new_tokens=5)
    assert tokens.shape[0] == 1 and tokens.shape[1] <= 7
