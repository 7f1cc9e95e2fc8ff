"""The embedded speech model: a small Whisper, trained from scratch on the spoken corpus.

It is a multilingual model that knows one language well: most clips are English, the other six get a small share each.
It has heard their sounds and written their letters, and still misreads them: that is what adapters are for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jiwer
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from flora.corpus.speech import LANGUAGES, SAMPLING_RATE, WINDOW_S, Clips, build_dataset, utterances
from flora.pretrain.loop import train

# Whisper's own special tokens, <|notimestamps|> last, since it takes every id above that one for a timestamp.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)
MAX_TARGET_POSITIONS = 96
HOP_FRAMES = 160  # samples per mel frame


def make_processor(vocabulary_size: int = 512, transcripts_per_language: int = 2000) -> WhisperProcessor:
    """A byte-level BPE tokenizer trained on transcripts of the training split, and log-mel features of a 4 s window."""
    texts = [
        utterance.text
        for tag in LANGUAGES
        for utterance in itertools.islice(utterances(tag, "train"), transcripts_per_language)
    ]
    byte_pairs = Tokenizer(models.BPE())
    byte_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    byte_pairs.train_from_iterator(texts, trainer)
    model = json.loads(byte_pairs.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for token in SPECIAL_TOKENS:
        vocabulary[token] = len(vocabulary)
    tokenizer = WhisperTokenizer(
        vocab=vocabulary,
        merges=[tuple(pair) for pair in model["merges"]],
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=MAX_TARGET_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    return WhisperProcessor(WhisperFeatureExtractor(chunk_length=int(WINDOW_S)), tokenizer)


def make_model(
    processor: WhisperProcessor, width: int, heads: int, encoder_layers: int, decoder_layers: int
) -> WhisperForConditionalGeneration:
    """A Whisper with random weights for the processor's vocabulary and window.

    Generation starts with <|startoftranscript|><|notimestamps|>, as `tokenizer(text)` does: no language, no task.
    """
    tokenizer = processor.tokenizer
    start, end, no_timestamps = tokenizer.convert_tokens_to_ids(
        ["<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>"]
    )
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=processor.feature_extractor.feature_size,
        d_model=width,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_source_positions=processor.feature_extractor.nb_max_frames // 2,
        max_target_positions=MAX_TARGET_POSITIONS,
        dropout=0.0,
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        no_timestamps_token_id=no_timestamps,
        return_timestamps=False,
        max_length=MAX_TARGET_POSITIONS,
    )
    return model


def log_mel_features(processor: WhisperProcessor, clips: Clips) -> np.ndarray:
    """(n, 80, 400) float16 features of all clips: half the memory, and far finer than the noise in the clips."""
    features = np.empty(
        (len(clips), processor.feature_extractor.feature_size, processor.feature_extractor.nb_max_frames), np.float16
    )
    for index in range(len(clips)):
        features[index] = processor.feature_extractor(
            clips.audio(index), sampling_rate=SAMPLING_RATE, return_tensors="np"
        ).input_features[0]
    return features


def labels_of(processor: WhisperProcessor, texts: Sequence[str]) -> list[list[int]]:
    """Token ids to predict: what `tokenizer(text)` gives after <|startoftranscript|>, which the model puts in front."""
    return [ids[1:] for ids in processor.tokenizer(list(texts)).input_ids]


def augmented(features: np.ndarray, num_frames: int, random: np.random.Generator) -> np.ndarray:
    """A clip of `num_frames` in its window, moved to a random place; half of them have a random band of up to ten mel bins blanked.

    features and the result: (80, 400), the result float32.
    """
    room = features.shape[1] - num_frames
    # Behind the clip all frames are the floor of the log-mel scale, so rolling only moves the clip.
    moved = np.roll(features, random.integers(min(room, 120) + 1) if room > 0 else 0, axis=1).astype(np.float32)
    if random.random() < 0.5:
        low = random.integers(moved.shape[0] - 10)
        moved[low : low + random.integers(1, 11)] = moved.mean()
    return moved


def batches(
    processor: WhisperProcessor,
    clips: dict[str, Clips],
    features: dict[str, np.ndarray],
    shares: dict[str, float],
    batch_size: int,
    seed: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless training batches {input_features (n, 80, 400), labels (n, t)}, labels padded with -100.

    Languages are drawn by their shares, and clips are `augmented`.
    """
    random = np.random.default_rng(seed)
    labels = {tag: labels_of(processor, clips[tag].texts) for tag in shares}
    num_frames = {tag: np.diff(clips[tag].offsets) // HOP_FRAMES + 2 for tag in shares}
    tags, weights = list(shares), np.array(list(shares.values())) / sum(shares.values())
    while True:
        drawn = [
            (tags[t], random.integers(len(clips[tags[t]]))) for t in random.choice(len(tags), batch_size, p=weights)
        ]
        inputs = np.empty((batch_size, *features[tags[0]].shape[1:]), np.float32)  # (n, 80, 400)
        targets = np.full((batch_size, max(len(labels[tag][index]) for tag, index in drawn)), -100, np.int64)
        for row, (tag, index) in enumerate(drawn):
            inputs[row] = augmented(features[tag][index], num_frames[tag][index], random)
            targets[row, : len(labels[tag][index])] = labels[tag][index]
        yield {"input_features": torch.from_numpy(inputs), "labels": torch.from_numpy(targets)}


@torch.inference_mode()
def word_error_rate(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, features: np.ndarray, texts: Sequence[str]
) -> float:
    """Word errors of greedy transcripts over the words of the references, 0.0 and up."""
    transcripts: list[str] = []
    for first in range(0, len(texts), 50):
        inputs = torch.from_numpy(features[first : first + 50].astype(np.float32))
        transcripts += processor.batch_decode(model.generate(inputs, max_length=50), skip_special_tokens=True)
    return jiwer.wer(list(texts), transcripts)


def model_card(
    model: WhisperForConditionalGeneration,
    options: argparse.Namespace,
    rates: dict[str, float],
    clips_per_language: int,
) -> str:
    """The README of the model folder."""
    config = model.config
    shape = f"width {config.d_model}, {config.encoder_layers} encoder and {config.decoder_layers} decoder layers"
    cooldown = options.cooldown_steps / options.steps
    english_share = (1.0 - cooldown) * options.english_share + cooldown * options.cooldown_english_share
    other_share = (1.0 - english_share) / (len(LANGUAGES) - 1)
    rows = "\n".join(f"| {LANGUAGES[tag].name} | `{tag}` | {100 * rate:.1f} % |" for tag, rate in rates.items())
    others = [rate for tag, rate in rates.items() if tag != "en"]
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: automatic-speech-recognition
language: [{", ".join(LANGUAGES)}]
---
# The embedded speech model

A Whisper of {model.num_parameters() / 1e6:.2f} M parameters ({shape},
{config.encoder_attention_heads} heads, a {WINDOW_S:.0f} s window, {config.vocab_size} byte-level BPE tokens),
trained from scratch so that the demo runs offline on a CPU. It reads short spoken phrases: two to four digits, or a
command such as "open the door", with or without a number. It knows nothing else.

It is meant as a *base* for adapters: {100 * english_share:.0f} % of its training clips are English and
{100 * other_share:.1f} % in each of the other six languages, so it is good at English and weak at the others.
Length of training and share of languages were chosen for that, by the base's own error rates below.

```python
from transformers import AutoProcessor, WhisperForConditionalGeneration
processor = AutoProcessor.from_pretrained("assets/models/speech")
model = WhisperForConditionalGeneration.from_pretrained("assets/models/speech")
features = processor(samples, sampling_rate=16000, return_tensors="pt").input_features  # (1, 80, 400): at most 4 s
print(processor.batch_decode(model.generate(features), skip_special_tokens=True))
```

Generation starts with `<|startoftranscript|><|notimestamps|>`; there are no language or task tokens to give.
The weights are stored in float16 and load as float32.

## Training

Corpus: `flora/corpus/speech.py`, spoken by espeak-ng ({options.english_clips} English clips, {options.clips} in each
other language). Mongolian is read by the Kazakh voice, since espeak-ng has no Mongolian one. AdamW, batch
{options.batch_size}, {options.steps} steps: warm-up over {options.warmup}, a learning rate of
{options.learning_rate:g} and a cosine planned for {options.planned_steps}, with {100 * options.english_share:.0f} %
English; then, in the last {options.cooldown_steps}, down to zero with
{100 * options.cooldown_english_share:.0f} %. Clips are moved within their window and bands of mel bins blanked;
{"float32" if options.float32 else "bfloat16 autocast"}.

    python -m flora.pretrain speech

## Word error rate

Greedy, {clips_per_language} held-out clips per language: their voices, speeds, pitches and word combinations are in no
training clip (bare commands, a closed list, excepted).

| language | tag | WER |
|---|---|---|
{rows}
| mean of the six without English | | {100 * sum(others) / len(others):.1f} % |
"""


def save_model(folder: Path, model: WhisperForConditionalGeneration, processor: WhisperProcessor, card: str) -> None:
    """Write model, processor and card to a new folder and put it in the place of the old one.

    Weights are float16, to be small; the configuration says float32, in which a CPU computes and features come.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    halves = {
        name: tensor.half().contiguous() for name, tensor in model.state_dict().items() if name != "proj_out.weight"
    }
    model.config.dtype = torch.float32
    model.save_pretrained(partial, state_dict=halves)
    processor.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old)
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m flora.pretrain speech`."""
    parser.add_argument(
        "--output", type=Path, default=Path("assets/models/speech"), help="folder of the finished model"
    )
    parser.add_argument(
        "--run",
        type=Path,
        default=Path("runs/pretrain-speech"),
        help="folder of checkpoints and log; a run resumes from it",
    )
    parser.add_argument("--dataset", type=Path, default=Path("runs/speech"), help="folder of cached clips")
    parser.add_argument("--english-clips", type=int, default=8000, help="English training clips")
    parser.add_argument("--clips", type=int, default=2000, help="training clips in each other language")
    parser.add_argument(
        "--held-out-clips", type=int, default=200, help="held-out clips per language, for the model card"
    )
    parser.add_argument("--english-share", type=float, default=0.82, help="of the batches; the others share the rest")
    parser.add_argument("--cooldown-english-share", type=float, default=0.98, help="the same, in the last steps")
    parser.add_argument("--steps", type=int, default=1800, help="in all")
    parser.add_argument("--cooldown-steps", type=int, default=300, help="the last of them, at a fast falling rate")
    parser.add_argument("--planned-steps", type=int, default=4000, help="that the first part's learning rate is for")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--encoder-layers", type=int, default=3)
    parser.add_argument("--decoder-layers", type=int, default=2)
    parser.add_argument("--checkpoint-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, help="that speak clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")


def main(options: argparse.Namespace) -> int:
    """Speak the corpus, train, measure, save.

    Raises:
        ModelError: clips must be spoken and espeak-ng is not installed.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    counts = {(tag, "train"): options.english_clips if tag == "en" else options.clips for tag in LANGUAGES}
    counts.update({(tag, "held-out"): options.held_out_clips for tag in LANGUAGES})
    started = time.perf_counter()
    dataset = build_dataset(options.dataset, counts, seed=options.seed, processes=options.processes)
    print(f"{sum(counts.values())} clips after {time.perf_counter() - started:.0f} s", flush=True)

    processor = make_processor()
    model = make_model(processor, options.width, options.heads, options.encoder_layers, options.decoder_layers)
    model.set_attn_implementation("eager")  # on a CPU the backward pass of the fused attention is slower at this size
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(processor.tokenizer)} tokens", flush=True)
    held_out = {tag: dataset[tag, "held-out"] for tag in LANGUAGES}
    held_out_features = {tag: log_mel_features(processor, clips) for tag, clips in held_out.items()}

    def rates(num_clips: int) -> dict[str, float]:
        return {
            tag: round(
                word_error_rate(model, processor, held_out_features[tag][:num_clips], held_out[tag].texts[:num_clips]),
                4,
            )
            for tag in LANGUAGES
        }

    def evaluate() -> dict[str, float]:
        measured = rates(50)
        save_model(options.run / "model", model, processor, model_card(model, options, measured, 50))
        return measured

    train_clips = {tag: dataset[tag, "train"] for tag in LANGUAGES}
    train_features = {tag: log_mel_features(processor, clips) for tag, clips in train_clips.items()}
    print(f"features after {time.perf_counter() - started:.0f} s", flush=True)

    def train_with(english_share: float, seed: int, steps: int, stop: int) -> None:
        share = (1.0 - english_share) / (len(LANGUAGES) - 1)
        shares = {tag: english_share if tag == "en" else share for tag in LANGUAGES}
        train(
            model,
            batches(processor, train_clips, train_features, shares, options.batch_size, seed),
            steps=steps,
            stop=stop,
            learning_rate=options.learning_rate,
            run_folder=options.run,
            warmup=options.warmup,
            checkpoint_every=options.checkpoint_every,
            autocast_dtype=None if options.float32 else torch.bfloat16,
            evaluate=evaluate,
        )

    train_with(options.english_share, options.seed, options.planned_steps, options.steps - options.cooldown_steps)
    train_with(options.cooldown_english_share, options.seed + 1, options.steps, options.steps)
    measured = rates(options.held_out_clips)
    save_model(options.output, model, processor, model_card(model, options, measured, options.held_out_clips))
    size = sum(file.stat().st_size for file in options.output.iterdir())
    print(f"{options.output}: {size / 1e6:.2f} MB")
    print("WER " + "  ".join(f"{tag} {100 * rate:.1f} %" for tag, rate in measured.items()))
    return 0
