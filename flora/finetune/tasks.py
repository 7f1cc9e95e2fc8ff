"""What an adapter learns: examples of code or of speech, batches of them, and a score on what was held out.

A task knows its data and the model's tokenizer or processor, never the adapter: the model to score is handed in.
"""

from __future__ import annotations

import itertools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from flora.audio import SAMPLING_RATE, load_audio
from flora.corpus.code import LANGUAGES, problems, render
from flora.corpus.speech import LANGUAGES as SPOKEN_LANGUAGES
from flora.corpus.speech import build_dataset
from flora.errors import DataError
from flora.finetune.data import Clip, Source, Tally, Text, fingerprint, read_clips, read_texts, split_by_text
from flora.finetune.recipe import Recipe
from flora.models import LoadedModel
from flora.pretrain.speech import HOP_FRAMES, augmented, log_mel_features

IGNORED = -100  # a label that has no loss
SCORED_AT_ONCE = 20  # examples
SCORED_TOKENS = 8192  # of a batch, padding among them: each has logits over the whole vocabulary
GROUPED_BATCHES = 16  # batches whose examples are sorted by length among themselves
HELD_OUT_SEED = 1
CLIPS_FOLDER = Path("runs/speech")
DEFAULT_LENGTH = 1024  # tokens of a text of one's own


class Task(ABC):
    """Examples by number, batches of them, and a score.

    source: what the data is called on the card. language: its name, where it is known. notes: what else the card has to say of it.
    tallies: of data of one's own, what was read and what was left out. fingerprint: tells other data apart.
    """

    source: str
    language: str | None
    notes: tuple[str, ...] = ()
    tallies: Sequence[Tally] = ()
    fingerprint: str
    num_held_out: int

    @abstractmethod
    def __len__(self) -> int:
        """How many different examples there are to learn from."""

    @abstractmethod
    def example(self, index: int, random: np.random.Generator) -> Any:
        """Example `index`, changed at random where the task does that."""

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """A batch, as the model's keywords."""

    @abstractmethod
    def score(self, model: nn.Module) -> dict[str, float]:
        """Metrics on the held-out items, by name. model: in evaluation mode; its adapter, where it has one, at work."""

    def lengths(self) -> np.ndarray | None:
        """(n,) of each example, where batches of like length are cheaper."""
        return None


class RunData(Dataset):
    """The examples of a run, in its order: place i is the same example, changed alike, however often the run was interrupted."""

    def __init__(self, task: Task, recipe: Recipe) -> None:
        self.task, self.seed = task, recipe.seed
        self.order = run_order(len(task), recipe.num_examples, recipe.seed)
        lengths = task.lengths()
        if lengths is not None:
            self.order = group_by_length(self.order, lengths, recipe.batch_size, recipe.seed)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Any:
        return self.task.example(int(self.order[place]), np.random.default_rng((self.seed, place)))


def run_order(num_examples: int, length: int, seed: int) -> np.ndarray:
    """(length,) int64: which example comes when. All are shuffled and taken once, then shuffled and taken again, and so on."""
    random = np.random.default_rng(seed)
    rounds = -(-length // num_examples)
    return np.concatenate([random.permutation(num_examples) for _ in range(rounds)])[:length]


def group_by_length(order: np.ndarray, lengths: np.ndarray, batch_size: int, seed: int) -> np.ndarray:
    """`order` with neighbours of like length, so that batches need little padding: sorted within a window of batches, and the
    batches of a window shuffled. What comes last and fills no batch stays where it is.
    """
    random, grouped = np.random.default_rng(seed), []
    for window in np.split(order, range(GROUPED_BATCHES * batch_size, len(order), GROUPED_BATCHES * batch_size)):
        whole = len(window) // batch_size * batch_size
        by_length = window[:whole][np.argsort(lengths[window[:whole]], kind="stable")]
        grouped.append(random.permutation(by_length.reshape(-1, batch_size)).reshape(-1))
        grouped.append(window[whole:])
    return np.concatenate(grouped)


def make_task(recipe: Recipe, loaded: LoadedModel, clips_folder: str | Path = CLIPS_FOLDER) -> Task:
    """The task of a complete recipe. Says on stderr what of the data was left out. DataError for data that cannot be used.

    clips_folder: where the corpus's clips are kept once they are spoken.
    """
    if loaded.kind != recipe.kind:
        raise DataError(f"model {loaded.name} is a {loaded.kind} model: say `{loaded.kind}`, or give another --model")
    task = CodeTask(recipe, loaded) if recipe.kind == "code" else SpeechTask(recipe, loaded, clips_folder)
    for tally in task.tallies:
        if tally.bad:
            print(f"data {tally.name}: {tally}", file=sys.stderr)
    return task


def _own_data(recipe: Recipe, read: Any) -> tuple[list, list, list[Tally]]:
    """(to learn from, held out, tallies) of data of one's own. read: a source → its examples and tally."""
    columns = {role: getattr(recipe, f"{role}_column") for role in ("text", "prompt", "completion", "audio")}
    place = {"split": recipe.data_split, "config": recipe.data_config, "directory": recipe.data_dir, "limit": recipe.limit}
    try:
        share = float(recipe.validation)
    except ValueError:
        train, tally = read(Source(recipe.data, enough=recipe.num_examples, **place, **columns))
        held_out, other = read(Source(recipe.validation, enough=recipe.held_out, **place, **columns))
        return train, held_out, [tally, other]
    if not 0 < share < 1:
        raise DataError(f"--validation is a share between 0 and 1, or a source, not {recipe.validation}")
    train, tally = read(Source(recipe.data, enough=math.ceil(recipe.num_examples / (1 - share)), **place, **columns))
    train, held_out = split_by_text(train, share)
    return train, held_out, [tally]


def _own_source(tallies: Sequence[Tally], num_train: int, num_held_out: int) -> str:
    return f"{tallies[0].name} ({num_train} to learn from, {num_held_out} held out)"


# --------------------------------------------------------------------------------------------------------------------- code


class CodeTask(Task):
    """Texts of a language model. An example is (tokens of the prompt, tokens of the completion); the loss is the completion's."""

    def __init__(self, recipe: Recipe, loaded: LoadedModel) -> None:
        self.tokenizer = loaded.tokenizer
        self.end = self.tokenizer.eos_token_id
        context = getattr(loaded.model.config, "max_position_embeddings", None) or DEFAULT_LENGTH
        self.max_length = min(context, recipe.max_length or max(DEFAULT_LENGTH, 0 if recipe.data else context))
        if recipe.data is None:
            train, held_out = _corpus_programs(recipe)
            self.source = f"the `{recipe.language}` part of `flora/corpus/code`"
            self.language = LANGUAGES[recipe.language].name
        else:
            train, held_out, self.tallies = _own_data(recipe, lambda source: read_texts(source, self._refuse))
            self.source, self.language = _own_source(self.tallies, len(train), len(held_out)), recipe.language
        self.fingerprint = fingerprint([*train, *held_out])
        self.has_prompts = any(text.prompt for text in held_out)
        self.train = self._encode(train)
        self.held_out = self._encode(held_out[: recipe.held_out])
        self.num_held_out = len(self.held_out)

    def _refuse(self, prompt: str) -> str | None:
        length = len(self.tokenizer(prompt)["input_ids"])
        return None if length < self.max_length else f"has a prompt of {length} tokens, where an example has {self.max_length}"

    def _encode(self, texts: Sequence[Text]) -> list[tuple[list[int], list[int]]]:
        """Token ids. A text without a prompt that is too long becomes several; a completion that is too long is cut at its end."""
        if not texts:
            return []
        prompts = self.tokenizer([text.prompt for text in texts])["input_ids"]
        completions = self.tokenizer([text.completion for text in texts], add_special_tokens=False)["input_ids"]
        examples = []
        for text, prompt, completion in zip(texts, prompts, completions, strict=True):
            if len(prompt) >= self.max_length:  # of the corpus; in data of one's own it was a bad row
                raise DataError(
                    f"the corpus has a prompt of {len(prompt)} tokens, where an example has {self.max_length}: take a model with a "
                    "longer context"
                )
            completion = completion + ([] if self.end is None else [self.end])
            if text.prompt:
                examples.append((prompt, completion[: self.max_length - len(prompt)]))
            else:
                whole = prompt + completion  # an empty prompt may still have a start token
                pieces = [whole[first : first + self.max_length] for first in range(0, len(whole), self.max_length)]
                examples += [(piece[:1], piece[1:]) for piece in pieces if len(piece) > 1]
        return examples

    def __len__(self) -> int:
        return len(self.train)

    def lengths(self) -> np.ndarray:
        return np.array([len(prompt) + len(completion) for prompt, completion in self.train])

    def example(self, index: int, random: np.random.Generator) -> tuple[list[int], list[int]]:
        return self.train[index]

    def collate(self, examples: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """{input_ids, labels}, each (n, l), padded on the right: causal attention never sees the padding, so there is no mask."""
        length = max(len(prompt) + len(completion) for prompt, completion in examples)
        ids = torch.full((len(examples), length), self.end or 0)
        labels = torch.full_like(ids, IGNORED)
        for row, (prompt, completion) in enumerate(examples):
            end = len(prompt) + len(completion)
            ids[row, :end] = torch.tensor(prompt + completion)
            labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
        return {"input_ids": ids, "labels": labels}

    @torch.inference_mode()
    def score(self, model: nn.Module) -> dict[str, float]:
        """Nats per token, the share of tokens, and of whole completions, that are the model's first choice given the true ones
        before them."""
        loss = tokens = right_tokens = right = 0
        by_length = sorted(self.held_out, key=lambda example: len(example[0]) + len(example[1]))
        longest = len(by_length[-1][0]) + len(by_length[-1][1])
        at_once = max(1, min(SCORED_AT_ONCE, SCORED_TOKENS // longest))
        for first in range(0, len(by_length), at_once):
            batch = self.collate(by_length[first : first + at_once])
            logits = model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits[:, :-1].float().cpu()
            targets = batch["labels"][:, 1:]  # (n, l - 1)
            counted = targets != IGNORED
            is_right = (logits.argmax(-1) == targets) & counted
            loss += cross_entropy(logits[counted], targets[counted], reduction="sum").item()
            tokens += int(counted.sum())
            right_tokens += int(is_right.sum())
            right += int((is_right == counted).all(-1).sum())
        metrics = {"loss": loss / tokens, "next tokens right": right_tokens / tokens}
        return {**metrics, "whole completions right": right / len(by_length)} if self.has_prompts else metrics


def _corpus_programs(recipe: Recipe) -> tuple[list[Text], list[Text]]:
    """As many training programs as the run takes, none twice but by chance, and the held-out ones."""
    if recipe.language not in LANGUAGES:
        raise DataError(f"there is no code language {recipe.language!r} in the corpus: choose one of {', '.join(LANGUAGES)}")

    def texts(split: str, seed: int, count: int) -> list[Text]:
        programs = (render(problem, recipe.language) for problem in itertools.islice(problems(split, seed), count))
        return [Text(program.prompt, program.completion) for program in programs]

    return texts("train", recipe.seed, recipe.num_examples), texts("held-out", HELD_OUT_SEED, recipe.held_out)


# ------------------------------------------------------------------------------------------------------------------- speech


class SpeechTask(Task):
    """Clips and transcripts of a Whisper. An example is (features (mel bins, frames) float32, labels)."""

    def __init__(self, recipe: Recipe, loaded: LoadedModel, clips_folder: str | Path) -> None:
        self.processor, config = loaded.processor, loaded.model.config
        self.extractor = self.processor.feature_extractor
        self.context = config.max_target_positions
        self.window_s = config.max_source_positions * 2 * self.extractor.hop_length / self.extractor.sampling_rate
        self.generate_options = self._set_language(recipe, loaded)
        self.augment = recipe.data is None
        if recipe.data is None:
            self._read_corpus(recipe, clips_folder)
        else:
            self._read_own(recipe)
        self.train_labels, self.held_out_labels = self._labels(self.train_texts), self._labels(self.held_out_texts)
        self.num_held_out = len(self.held_out_texts)

    def _set_language(self, recipe: Recipe, loaded: LoadedModel) -> dict[str, str]:
        """Tell a multilingual Whisper's tokenizer the language, so that labels begin as a transcript in it does; and `generate`."""
        if not getattr(loaded.model.generation_config, "lang_to_id", None):
            return {}
        if recipe.language is None:
            raise DataError("this Whisper is multilingual: say the clips' language, as in `speech cs --data SOURCE`")
        try:
            self.processor.tokenizer.set_prefix_tokens(language=recipe.language, task="transcribe", predict_timestamps=False)
        except ValueError as error:
            raise DataError(f"this Whisper has no language {recipe.language!r}: give its code, such as cs") from error
        return {"language": recipe.language, "task": "transcribe"}

    def _read_corpus(self, recipe: Recipe, clips_folder: str | Path) -> None:
        tag = recipe.language
        if tag not in SPOKEN_LANGUAGES:
            raise DataError(f"there is no spoken language {tag!r} in the corpus: choose one of {', '.join(SPOKEN_LANGUAGES)}")
        counts = {(tag, "train"): recipe.clips, (tag, "held-out"): max(200, recipe.held_out)}
        clips = build_dataset(clips_folder, counts, seed=0, processes=1)
        train, held_out = clips[tag, "train"], clips[tag, "held-out"]
        self.source = f"{recipe.clips} clips of the `{tag}` part of `flora/corpus/speech.py`"
        self.language = SPOKEN_LANGUAGES[tag].name
        self.notes = (SPOKEN_LANGUAGES[tag].note,) if SPOKEN_LANGUAGES[tag].note else ()
        self.train_texts, self.held_out_texts = train.texts, held_out.texts[: recipe.held_out]
        self.num_frames = np.diff(train.offsets) // HOP_FRAMES + 2
        self.train_features = log_mel_features(self.processor, train)  # made once: (n, 80, 400) float16
        self.held_out_features = log_mel_features(self.processor, held_out)[: recipe.held_out]
        named = [Clip(b"", text, str(index)) for index, text in enumerate([*self.train_texts, *self.held_out_texts])]
        self.fingerprint = fingerprint(named)

    def _read_own(self, recipe: Recipe) -> None:
        train, held_out, self.tallies = _own_data(recipe, lambda source: read_clips(source, self.window_s, self._refuse))
        self.source, self.language = _own_source(self.tallies, len(train), len(held_out)), recipe.language
        self.fingerprint = fingerprint([*train, *held_out])
        held_out = held_out[: recipe.held_out]
        self.train_texts, self.held_out_texts = [clip.text for clip in train], [clip.text for clip in held_out]
        self.train_features, self.held_out_features = _LazyFeatures(self, train), _LazyFeatures(self, held_out)

    def _refuse(self, text: str) -> str | None:
        length = len(self._labels([text])[0])
        return None if length < self.context else f"has a text of {length} tokens, and the model writes {self.context}"

    def _labels(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids to predict: what the tokenizer gives after the start token, which the model puts in front itself."""
        return [ids[1:] for ids in self.processor.tokenizer(list(texts)).input_ids]

    def features_of(self, clip: Clip) -> np.ndarray:
        """(mel bins, frames) float32 of a clip that was found to be whole."""
        samples, _ = load_audio(clip.audio, self.window_s, name=clip.place)
        return self.extractor(samples, sampling_rate=SAMPLING_RATE, return_tensors="np").input_features[0]

    def __len__(self) -> int:
        return len(self.train_texts)

    def example(self, index: int, random: np.random.Generator) -> tuple[np.ndarray, list[int]]:
        features = self.train_features[index]
        if self.augment:
            features = augmented(features, self.num_frames[index], random)
        return features, self.train_labels[index]

    def collate(self, examples: Sequence[tuple[np.ndarray, list[int]]]) -> dict[str, Tensor]:
        """{input_features (n, mel bins, frames) float32, labels (n, t)}."""
        labels = torch.full((len(examples), max(len(ids) for _, ids in examples)), IGNORED)
        for row, (_, ids) in enumerate(examples):
            labels[row, : len(ids)] = torch.tensor(ids)
        features = np.stack([features for features, _ in examples]).astype(np.float32)
        return {"input_features": torch.from_numpy(features), "labels": labels}

    @torch.inference_mode()
    def score(self, model: nn.Module) -> dict[str, float]:
        """Nats per token, and the word error rate of greedy transcripts."""
        import jiwer

        loss = tokens = 0
        transcripts = []
        longest = max(len(ids) for ids in self.held_out_labels)
        limit = min(self.context - 8, 2 * longest + 8)  # a model that runs on is cut, twice as late as the longest truth
        for first in range(0, len(self.held_out_texts), SCORED_AT_ONCE):
            rows = range(first, min(first + SCORED_AT_ONCE, len(self.held_out_texts)))
            batch = self.collate([(self.held_out_features[row], self.held_out_labels[row]) for row in rows])
            features, labels = batch["input_features"].to(model.device, model.dtype), batch["labels"]
            states = model.get_encoder()(features)
            logits = model(encoder_outputs=states, labels=labels.to(model.device), use_cache=False).logits.float().cpu()
            counted = labels != IGNORED
            loss += cross_entropy(logits[counted], labels[counted], reduction="sum").item()
            tokens += int(counted.sum())
            made = model.generate(features, max_new_tokens=limit, do_sample=False, use_cache=True, **self.generate_options)
            transcripts += self.processor.batch_decode(made, skip_special_tokens=True)
        transcripts = [" ".join(text.split()) for text in transcripts]
        return {"loss": loss / tokens, "word error rate": jiwer.wer(self.held_out_texts, transcripts)}


class _LazyFeatures:
    """Features of clips by number, made when they are asked for: at Whisper's size they would not all fit into memory."""

    def __init__(self, task: SpeechTask, clips: Sequence[Clip]) -> None:
        self.task, self.clips = task, clips

    def __getitem__(self, index: int) -> np.ndarray:
        return self.task.features_of(self.clips[index])
