"""Small models and adapters with random weights, saved as real checkpoints, so that tests load what users load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from flora.formats import write_flora

CODE_LAYERS = ("c_attn", "c_proj", "c_fc")
LLAMA_LAYERS = QWEN2_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPEECH_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LANGUAGES = ("en", "cs", "lt", "hi")


def byte_vocabulary(specials: tuple[str, ...]) -> dict[str, int]:
    """Special tokens first, then one token per byte."""
    symbols = list(specials) + sorted(pre_tokenizers.ByteLevel.alphabet())
    return {symbol: index for index, symbol in enumerate(symbols)}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab=byte_vocabulary(("<|endoftext|>",)), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


def save_code_model(folder: Path, seed: int = 0, width: int = 48, inner_width: int = 80) -> Path:
    """A GPTBigCode of two layers with multi-query attention, biases that are not zero, and weights large enough to disagree."""
    torch.manual_seed(seed)
    config = GPTBigCodeConfig(
        vocab_size=257, n_positions=96, n_embd=width, n_layer=2, n_head=4, n_inner=inner_width, multi_query=True,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return _save(GPTBigCodeForCausalLM(config), byte_tokenizer(), folder)


def save_gpt2_model(folder: Path, seed: int = 0) -> Path:
    """A GPT-2 of two layers: its linear layers are Conv1D."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=257, n_positions=96, n_embd=48, n_layer=2, n_head=4, n_inner=80, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return _save(GPT2LMHeadModel(config), byte_tokenizer(), folder)


def save_llama_model(folder: Path, seed: int = 0) -> Path:
    """A Llama of two layers with grouped-query attention."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257, max_position_embeddings=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return _save(LlamaForCausalLM(config), byte_tokenizer(), folder)


def save_qwen2_model(folder: Path, seed: int = 0) -> Path:
    """A Qwen2 of two layers: as Llama, with biases on q, k and v alone, and the output head tied to the embedding."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=257, max_position_embeddings=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return _save(Qwen2ForCausalLM(config), byte_tokenizer(), folder)


def save_speech_model(folder: Path, seed: int = 0, languages: tuple[str, ...] = (), **generation_options) -> Path:
    """A Whisper of two and two layers with a window of one second.

    languages: for a multilingual one, with tokens for them and for its tasks. generation_options: into generation_config.json.
    """
    torch.manual_seed(seed)
    vocabulary = byte_vocabulary(("<|endoftext|>", "<|startoftranscript|>"))
    specials = ["<|startoftranscript|>"]
    if languages:
        named = [f"<|{language}|>" for language in languages]
        specials += [*named, "<|translate|>", "<|transcribe|>", "<|notimestamps|>"]
        for token in specials[1:]:  # behind the bytes: what comes after the last of them is a timestamp to transformers
            vocabulary[token] = len(vocabulary)
        generation_options = {
            "is_multilingual": True,
            "lang_to_id": {token: vocabulary[token] for token in named},
            "task_to_id": {task: vocabulary[f"<|{task}|>"] for task in ("translate", "transcribe")},
            "no_timestamps_token_id": vocabulary["<|notimestamps|>"],
            **generation_options,
        }
    tokenizer = WhisperTokenizerFast(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    extractor = WhisperFeatureExtractor(feature_size=20, chunk_length=1)
    config = WhisperConfig(
        vocab_size=max(len(tokenizer), 258), num_mel_bins=20, d_model=48, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=80, decoder_ffn_dim=80,
        max_source_positions=50, max_target_positions=40, decoder_start_token_id=1, bos_token_id=0, eos_token_id=0,
        pad_token_id=0, dropout=0.0, init_std=0.2, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    if generation_options:
        model.generation_config._from_model_config = False  # else it is made anew from config.json at loading
        for option, value in generation_options.items():
            setattr(model.generation_config, option, value)
    return _save(model, WhisperProcessor(extractor, tokenizer), folder)


def _save(model, processor, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1, generator=generator)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def copy_with_generation_options(source: Path, folder: Path, **options) -> Path:
    """The same model with other values in its generation_config.json."""
    shutil.copytree(source, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_from_model_config": False, **options}))
    return folder


def load_plain(folder: Path) -> torch.nn.Module:
    """The model as transformers alone loads it."""
    is_whisper = json.loads((folder / "config.json").read_text())["model_type"] == "whisper"
    auto = WhisperForConditionalGeneration if is_whisper else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


def load_merged(folder: Path, adapter: Path | None) -> torch.nn.Module:
    """The plain model with one adapter merged into its weights by means of its own: the truth that the engine is held against.

    LoRA is merged by PEFT. fLoRA: weight ∘ Σ_k B_k A_kᵀ, or the mean over k, read from the file without flora's help.
    """
    model = load_plain(folder)
    if adapter is None:
        return model
    config = json.loads((adapter / "adapter_config.json").read_text())
    if config["peft_type"] == "LORA":
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()
    tensors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for key in [key for key in tensors if key.endswith(".flora_A")]:
            A, B = tensors[key], tensors[key.replace("flora_A", "flora_B")]  # (r, d_in), (r, d_out)
            multiplier = torch.einsum("ko,ki->oi", B, A) / (len(A) if config["combine"] == "mean" else 1)
            layer = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".flora_A"))
            layer.weight *= multiplier.T if isinstance(layer, Conv1D) else multiplier
    return model


def target_layers(model: torch.nn.Module, names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Every linear layer whose name ends in one of `names`, with (d_in, d_out)."""
    found = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in names:
            if isinstance(module, Conv1D):
                found[name] = tuple(module.weight.shape)
            elif isinstance(module, torch.nn.Linear):
                found[name] = (module.in_features, module.out_features)
    return found


def save_flora_adapter(
    folder: Path, model: torch.nn.Module, names: tuple[str, ...], rank: int, seed: int, combine: str = "sum"
) -> Path:
    """A random fLoRA checkpoint, far enough from the identity to change the answer."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, (d_in, d_out) in target_layers(model, names).items():
        A = torch.randn(rank, d_in, generator=generator) * 0.3
        B = torch.randn(rank, d_out, generator=generator) * 0.3
        A[0] += 1.0
        B[0] += 1.0
        factors[name] = (A, B)
    write_flora(folder, factors, {"r": rank, "combine": combine, "target_modules": list(names)})
    return folder


def save_peft_lora(folder: Path, model_folder: Path, names: tuple[str, ...], rank: int, seed: int, **options) -> Path:
    """A LoRA checkpoint made and saved by PEFT itself, with random weights on both sides."""
    torch.manual_seed(seed)
    model = load_plain(model_folder)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(names), init_lora_weights=False, **options)
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    peft_model.save_pretrained(folder)
    return folder
