"""Known shapes: they are the published models', nothing is downloaded for them, and their made-up tokenizers read and write."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from flora import Engine, Request, models, shapes
from flora.engine.runner import _StartTokens
from flora.models import KNOWN_MODELS
from flora.shapes import SHAPES, generation_of, processor_of
from profiling.loading import add_random_adapters

NUM_PARAMETERS = {
    "starcoder": 15_517_456_384,
    "starcoderbase-3b": 3_043_311_104,
    "starcoderbase-1b": 1_137_207_296,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "qwen2.5-coder-1.5b": 1_543_714_304,
    "whisper-large-v2": 1_543_304_960,
    "whisper-large-v3": 1_543_490_560,
}
"""As the hub counts them, tied weights once."""


def test_every_short_name_has_its_shapes():
    assert set(KNOWN_MODELS) == set(NUM_PARAMETERS) and set(KNOWN_MODELS.values()) == set(SHAPES)


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_the_parameters_are_as_many_as_the_published_models(name):
    config = SHAPES[KNOWN_MODELS[name]]()
    with torch.device("meta"):
        if config.model_type == "whisper":
            model = WhisperForConditionalGeneration(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert model.num_parameters() == NUM_PARAMETERS[name]


@pytest.mark.parametrize("name", ["starcoderbase-1b", "llama-2-7b", "qwen2.5-coder-1.5b"])
def test_a_made_up_tokenizer_reads_what_it_writes(name):
    config = SHAPES[KNOWN_MODELS[name]]()
    tokenizer = processor_of(config)
    text = "def größe(x):\n\treturn '🎛️'"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert len(tokenizer) == config.vocab_size and tokenizer.eos_token_id == config.eos_token_id
    specials = {config.bos_token_id, config.eos_token_id}
    shown = [tokenizer.decode([index]) for index in range(0, config.vocab_size, 97) if index not in specials]
    assert all(shown), "a token shows as nothing"
    assert tokenizer.decode([config.eos_token_id], skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("name", "start", "transcribe", "no_timestamps", "num_languages"),
    [("whisper-large-v2", 50258, 50359, 50363, 99), ("whisper-large-v3", 50258, 50360, 50364, 100)],
)
def test_whispers_tokens_lie_where_the_published_ones_do(name, start, transcribe, no_timestamps, num_languages):
    config = SHAPES[KNOWN_MODELS[name]]()
    processor, generation = processor_of(config), generation_of(config)
    tokenizer = processor.tokenizer
    assert len(tokenizer) == config.vocab_size and config.decoder_start_token_id == start
    for token, index in {
        "<|startoftranscript|>": start,
        "<|en|>": 50259,
        "<|cs|>": 50283,
        "<|transcribe|>": transcribe,
        "<|notimestamps|>": no_timestamps,
        "<|0.00|>": no_timestamps + 1,
        "<|30.00|>": config.vocab_size - 1,
    }.items():
        assert tokenizer.convert_tokens_to_ids(token) == index, token
    assert len(generation.lang_to_id) == num_languages and generation.lang_to_id["<|cs|>"] == 50283
    starts = _StartTokens(generation, config)
    assert len(starts.language_ids) == num_languages
    assert starts.known[0] == start and starts.known[-1] == no_timestamps
    assert processor.feature_extractor.feature_size == config.num_mel_bins
    assert tokenizer.decode([start, 50259, 300, 301], skip_special_tokens=True).strip()


@pytest.fixture
def narrow(monkeypatch) -> None:
    """Known models under their own names, narrower and shallower, with their own vocabularies and windows, and no hub."""
    whisper = SHAPES["openai/whisper-large-v3"]().to_dict() | {
        **{"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    }
    made = {
        "bigcode/starcoderbase-1b": lambda: shapes._starcoder(128, 2),
        "meta-llama/Llama-2-7b-hf": lambda: shapes._llama_2(128, 192, 2),
        "Qwen/Qwen2.5-Coder-1.5B": lambda: shapes._qwen_2(64, 128, 2, 4, 2),
        "openai/whisper-large-v3": lambda: WhisperConfig(**whisper),
    }
    monkeypatch.setattr(models, "SHAPES", made)
    for loader in (AutoConfig, AutoTokenizer, AutoProcessor, AutoModelForCausalLM, WhisperForConditionalGeneration):
        monkeypatch.setattr(loader, "from_pretrained", lambda *_, **__: pytest.fail("the hub was asked"))


@pytest.mark.parametrize(
    ("name", "quantize"),
    [(name, None) for name in ("starcoderbase-1b", "llama-2-7b", "qwen2.5-coder-1.5b", "whisper-large-v3")]
    + [("starcoderbase-1b", "int8"), ("llama-2-7b", "nf4"), ("qwen2.5-coder-1.5b", "int8"), ("whisper-large-v3", "nf4")],
)
def test_random_weights_of_a_known_model_serve_adapters_without_the_hub(name, quantize, narrow, clips):
    engine = Engine.from_pretrained(name, device="cpu", weights="random", quantize=quantize, max_batch_size=4)
    assert (engine.name, engine.weights, engine.quantize) == (name, "random", quantize)
    assert {layer.is_black_box for layer in engine.bank.layers.values()} == {quantize is not None}
    assert type(engine.model.get_output_embeddings()) is torch.nn.Linear
    tags = add_random_adapters(engine, 2, 2, ("flora", "bmm-lora"))
    given = {"audio": clips[1]} if engine.kind == "speech" else {"prompt": "def größe("}
    requests = [Request(**given, adapter=tag, max_new_tokens=3, ignore_eos=True) for tag in (*tags, None)]
    for method in ("flora", "bmm-lora"):
        completions = engine.generate(requests, method)
        assert [len(completion.token_ids) for completion in completions] == [3, 3, 3]
    assert any(completion.text.strip() for completion in completions)
    engine.close()
