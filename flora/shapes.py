"""The shapes of known base models, and tokenizers that need no file: what random weights are built from without a network.

The numbers are those of the models' published configurations; weights, vocabularies and merges are not here. A tokenizer made here
reads a byte as a token, so a prompt has more tokens than under the model's own. Every token of the vocabulary shows as something:
what random weights write can be seen.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPTBigCodeConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from flora.layers import features_of, is_adaptable


def _starcoder(width: int, layers: int) -> GPTBigCodeConfig:
    """Heads of 128, one key and value head for all of them, a context of 8192 tokens."""
    return GPTBigCodeConfig(
        vocab_size=49152, n_positions=8192, n_embd=width, n_layer=layers, n_head=width // 128, n_inner=4 * width,
        multi_query=True, activation_function="gelu_pytorch_tanh", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def _llama_2(width: int, inner_width: int, layers: int) -> LlamaConfig:
    """Heads of 128, each with a key and value of its own, a context of 4096 tokens."""
    return LlamaConfig(
        vocab_size=32000, max_position_embeddings=4096, hidden_size=width, intermediate_size=inner_width,
        num_hidden_layers=layers, num_attention_heads=width // 128, num_key_value_heads=width // 128, rms_norm_eps=1e-5,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _qwen_2(width: int, inner_width: int, layers: int, heads: int, key_value_heads: int) -> Qwen2Config:
    """A context of 32768 tokens, the output head tied to the embedding."""
    return Qwen2Config(
        vocab_size=151936, max_position_embeddings=32768, hidden_size=width, intermediate_size=inner_width,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_value_heads, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, tie_word_embeddings=True,
        bos_token_id=151643, eos_token_id=151643,
    )  # fmt: skip


def _whisper_large(mel_bins: int, vocabulary_size: int) -> WhisperConfig:
    """32 and 32 layers of width 1280, a window of 30 seconds."""
    return WhisperConfig(
        vocab_size=vocabulary_size, num_mel_bins=mel_bins, d_model=1280, encoder_layers=32, decoder_layers=32,
        encoder_attention_heads=20, decoder_attention_heads=20, encoder_ffn_dim=5120, decoder_ffn_dim=5120,
        max_source_positions=1500, max_target_positions=448, decoder_start_token_id=END_OF_TEXT + 1, bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT, pad_token_id=END_OF_TEXT, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip


END_OF_TEXT = 50257
"""Of a multilingual Whisper; the start of a transcript, the languages, the tasks and the timestamps come after it."""

SHAPES: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "bigcode/starcoder": lambda: _starcoder(6144, 40),
    "bigcode/starcoderbase-3b": lambda: _starcoder(2816, 36),
    "bigcode/starcoderbase-1b": lambda: _starcoder(2048, 24),
    "meta-llama/Llama-2-7b-hf": lambda: _llama_2(4096, 11008, 32),
    "meta-llama/Llama-2-13b-hf": lambda: _llama_2(5120, 13824, 40),
    "Qwen/Qwen2.5-Coder-1.5B": lambda: _qwen_2(1536, 8960, 28, 12, 2),
    "openai/whisper-large-v2": lambda: _whisper_large(80, 51865),
    "openai/whisper-large-v3": lambda: _whisper_large(128, 51866),
}
"""Hub id → the configuration with that model's shapes."""


def layer_widths(name: str) -> dict[str, tuple[int, int]]:
    """The linear layers of one block of a model of known shapes, "c_attn" → (d_in, d_out), without its output head.

    name: its hub id. A Whisper's encoder and decoder have layers of the same names and widths.
    """
    config = SHAPES[name]()
    for count in ("n_layer", "num_hidden_layers", "encoder_layers", "decoder_layers"):
        if hasattr(config, count):
            setattr(config, count, 1)
    build = WhisperForConditionalGeneration if config.model_type == "whisper" else AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = build(config)
    head = model.get_output_embeddings()
    linear = {path: module for path, module in model.named_modules() if is_adaptable(module) and module is not head}
    return {_shortest(path, linear): features_of(module) for path, module in linear.items()}


def _shortest(path: str, paths: Mapping[str, Any]) -> str:
    """The last part of a layer's name; its last two where another layer has the same last and other widths."""
    same = {features_of(module) for other, module in paths.items() if other.rpartition(".")[2] == path.rpartition(".")[2]}
    return ".".join(path.split(".")[-1 if len(same) == 1 else -2 :])


def generation_of(config: PreTrainedConfig) -> GenerationConfig:
    """How a model of known shapes generates: a Whisper finds out the language first and then transcribes, as the real ones do."""
    generation = GenerationConfig.from_model_config(config)
    if config.model_type == "whisper":
        tokens = _whisper_specials(config)
        generation.is_multilingual = True
        generation.lang_to_id = {f"<|{code}|>": tokens[f"<|{code}|>"] for code in _languages(config)}
        generation.task_to_id = {task: tokens[f"<|{task}|>"] for task in ("translate", "transcribe")}
        generation.no_timestamps_token_id = tokens["<|notimestamps|>"]
    return generation


def processor_of(config: PreTrainedConfig) -> Any:
    """A tokenizer for a model of known shapes, or a Whisper's processor: its tokenizer and its own feature extractor."""
    if config.model_type == "whisper":
        extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
        return WhisperProcessor(extractor, _whisper_tokenizer(config))
    specials = {config.bos_token_id: "<|begin|>", config.eos_token_id: "<|endoftext|>"}
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(config.vocab_size, specials), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    begin, end = specials[config.bos_token_id], specials[config.eos_token_id]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=end)


def _vocabulary(size: int, specials: Mapping[int, str]) -> dict[str, int]:
    """`size` tokens: the special ones where they belong, then one for every byte, then made-up words of four letters."""
    words = ("Ġ" + "".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))  # Ġ: a space, bytewise
    rest = itertools.chain(sorted(pre_tokenizers.ByteLevel.alphabet()), words)
    return {specials[index] if index in specials else next(rest): index for index in range(size)}


def _languages(config: WhisperConfig) -> list[str]:
    """99 languages; of large-v3, which has one token more than the others, 100."""
    return list(LANGUAGES)[: 100 if config.vocab_size > 51865 else 99]


def _whisper_specials(config: WhisperConfig) -> dict[str, int]:
    """The special tokens, in the order that all multilingual Whispers share, from the end of text on."""
    names = ["endoftext", "startoftranscript", *_languages(config)]
    names += ["translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps"]
    return {f"<|{name}|>": END_OF_TEXT + place for place, name in enumerate(names)}


def _whisper_tokenizer(config: WhisperConfig) -> PreTrainedTokenizerBase:
    specials = _whisper_specials(config)
    behind = END_OF_TEXT + len(specials)
    timestamps = {index: f"<|{0.02 * (index - behind):.2f}|>" for index in range(behind, config.vocab_size)}
    tokens = {index: token for token, index in specials.items()} | timestamps
    tokenizer = WhisperTokenizer(vocab=_vocabulary(config.vocab_size, tokens), merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    return tokenizer
