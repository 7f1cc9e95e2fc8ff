"""The model's forward: requests → prompts, prompts and tokens → logits. One runner per kind of model, one interface.

A runner knows the model's inputs and nothing of adapters beyond putting the batch's `BatchServing` on the bank for the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import soxr
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from flora.bank import AdapterBank, BatchServing
from flora.engine.cache import RowCache, prompt_mask, token_mask
from flora.engine.request import Request
from flora.errors import AudioError, ModelError, RequestError
from flora.models import LoadedModel

SILENCE = 1e-4
"""A clip whose loudest sample is below this (full scale is 1) is silent: -80 dB."""


@dataclass(frozen=True)
class EncodedRequest:
    """A request as the model reads it. features: (mel bins, frames) of a clip, None for a prompt."""

    prompt_ids: tuple[int, ...]
    features: Tensor | None = None


@dataclass
class State:
    """What a batch carries from one forward to the next."""

    cache: Any
    encoder_states: Tensor | None = None  # (n, frames, d)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows (n_kept,) int64."""
        if isinstance(self.cache, EncoderDecoderCache):
            self.cache.self_attention_cache.select(rows)
            for layer in self.cache.cross_attention_cache.layers:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]
            self.encoder_states = self.encoder_states[rows]
        else:
            self.cache.select(rows)


class Runner(Protocol):
    """What `Generation` needs of a model."""

    device: torch.device
    context_length: int

    def encode(self, request: Request) -> EncodedRequest:
        """Turn a request into the model's inputs; raises a RequestError for one that cannot be served."""

    def prefill(self, encoded: Sequence[EncodedRequest], serving: BatchServing, capacity: int) -> tuple[Tensor, State, list[int]]:
        """Logits (n, vocabulary) after each prompt, the state to go on with, and the length of each row's prompt."""

    def decode(self, tokens: Tensor, positions: Tensor, width: int, state: State, serving: BatchServing) -> Tensor:
        """Logits (n, vocabulary) after one more token per row. tokens, positions (n,) int64; width: largest position plus one."""

    def score(
        self, encoded: Sequence[EncodedRequest], continuations: Sequence[Sequence[int]], serving: BatchServing
    ) -> list[Tensor]:
        """In one forward, the logits (tokens, vocabulary) that each row's tokens were chosen from, given those before them."""


def make_runner(loaded: LoadedModel, bank: AdapterBank) -> Runner:
    return SpeechRunner(loaded, bank) if loaded.kind == "speech" else CodeRunner(loaded, bank)


def _right_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(n, longest) int64; what stands in the padding is never looked at."""
    longest = max(len(ids) for ids in sequences)
    return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences], device=device)


def _sliding_window(config: Any) -> int | None:
    """Positions that a token can look back, for a model that limits them."""
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


class CodeRunner:
    """Decoder-only language models: GPTBigCode, Llama, and others that take a 4-D mask and position_ids."""

    def __init__(self, loaded: LoadedModel, bank: AdapterBank) -> None:
        self.model, self.tokenizer, self.bank = loaded.model, loaded.tokenizer, bank
        self.device = loaded.model.device
        config = loaded.model.config
        # Within a sliding window, attention is the full one; beyond it the mask of a batch would have to know the window.
        self.context_length = min(config.max_position_embeddings, _sliding_window(config) or config.max_position_embeddings)
        self.num_layers = config.num_hidden_layers

    def encode(self, request: Request) -> EncodedRequest:
        if request.prompt is None:
            raise RequestError("this model continues text: give a prompt, not audio")
        if not request.prompt.strip():
            raise RequestError("the prompt is empty: write at least one character")
        try:
            request.prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError("the prompt is not valid text: it has half of a surrogate pair") from error
        ids = self.tokenizer(request.prompt)["input_ids"]
        if not ids:
            raise RequestError("the prompt has no tokens: write at least one character that the model's tokenizer knows")
        if len(ids) >= self.context_length:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and the model's context holds {self.context_length}, "
                "with room for at least one new token: shorten it"
            )
        return EncodedRequest(tuple(ids))

    def prefill(self, encoded: Sequence[EncodedRequest], serving: BatchServing, capacity: int) -> tuple[Tensor, State, list[int]]:
        lengths = [len(row.prompt_ids) for row in encoded]
        ids = _right_padded([row.prompt_ids for row in encoded], self.device)  # (n, l)
        state = State(RowCache(self.num_layers, capacity))
        state.cache.positions.begin_prompt(ids.shape[1])
        last = torch.tensor(lengths, device=self.device) - 1  # (n,)
        kept, place = last.unique(return_inverse=True)
        with self.bank.serve(serving):
            output = self.model(
                input_ids=ids,
                attention_mask=prompt_mask(ids.shape[1], self.device),
                position_ids=torch.arange(ids.shape[1], device=self.device).expand_as(ids),
                past_key_values=state.cache,
                use_cache=True,
                logits_to_keep=kept,
            )
        return output.logits[torch.arange(len(encoded), device=self.device), place], state, lengths

    def decode(self, tokens: Tensor, positions: Tensor, width: int, state: State, serving: BatchServing) -> Tensor:
        state.cache.positions.begin_token(positions, width)
        with self.bank.serve(serving):
            output = self.model(
                input_ids=tokens[:, None],
                attention_mask=token_mask(positions, width),
                position_ids=positions[:, None],
                past_key_values=state.cache,
                use_cache=True,
            )
        return output.logits[:, 0]

    def score(
        self, encoded: Sequence[EncodedRequest], continuations: Sequence[Sequence[int]], serving: BatchServing
    ) -> list[Tensor]:
        ids = _right_padded([row.prompt_ids + tuple(new) for row, new in zip(encoded, continuations, strict=True)], self.device)
        with self.bank.serve(serving):
            logits = self.model(
                input_ids=ids,
                attention_mask=prompt_mask(ids.shape[1], self.device),
                position_ids=torch.arange(ids.shape[1], device=self.device).expand_as(ids),
                use_cache=False,
            ).logits
        starts = [len(row.prompt_ids) - 1 for row in encoded]
        return [logits[i, start : start + len(new)] for i, (start, new) in enumerate(zip(starts, continuations, strict=True))]


class SpeechRunner:
    """Whisper: a clip through the encoder once, then its decoder token by token, from the model's own start tokens."""

    def __init__(self, loaded: LoadedModel, bank: AdapterBank) -> None:
        self.model, self.bank = loaded.model, bank
        self.device, self.dtype = loaded.model.device, loaded.model.dtype
        self.extractor = loaded.processor.feature_extractor
        config = loaded.model.config
        self.context_length = config.max_target_positions
        self.num_layers = config.decoder_layers
        self.window_s = config.max_source_positions * 2 * self.extractor.hop_length / self.extractor.sampling_rate
        self._start = _StartTokens(loaded.model.generation_config, config)

    def encode(self, request: Request) -> EncodedRequest:
        if request.audio is None:
            raise RequestError("this model transcribes speech: give audio, not a prompt")
        rate = self.extractor.sampling_rate
        samples = check_samples(request.audio)
        given_rate = request.sampling_rate or rate
        seconds = samples.shape[0] / given_rate
        if seconds > self.window_s + 0.01:
            raise AudioError(f"the clip is {seconds:.1f} s long and the model hears {self.window_s:g} s: trim it")
        if given_rate != rate:
            samples = soxr.resample(samples, given_rate, rate)
        features = self.extractor(samples, sampling_rate=rate, return_tensors="pt").input_features[0]
        return EncodedRequest(self._start.known, features.to(self.device, self.dtype))

    def _encoder_states(self, encoded: Sequence[EncodedRequest]) -> Tensor:
        features = torch.stack([row.features for row in encoded])  # (n, mel bins, frames)
        return self.model.get_encoder()(features).last_hidden_state  # (n, positions, d)

    def _start_ids(self, states: Tensor) -> Tensor:
        """(n, l) int64. A multilingual Whisper names the language first: the likeliest after the start, as `generate` does."""
        n = states.shape[0]
        ids = torch.tensor([self._start.known] * n, device=self.device)
        if not self._start.language_ids:
            return ids
        logits = self._decoder(ids[:, :1], states, prompt_mask(1, self.device), None, None)[:, -1]  # (n, vocabulary)
        languages = torch.tensor(self._start.language_ids, device=self.device)
        ids[:, 1] = languages[logits[:, languages].argmax(-1)]
        return ids

    def _decoder(self, ids: Tensor, states: Tensor, mask: Tensor, positions: Tensor | None, cache: Any) -> Tensor:
        if positions is None:
            positions = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
        return self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            decoder_input_ids=ids,
            decoder_attention_mask=mask,
            decoder_position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits

    def prefill(self, encoded: Sequence[EncodedRequest], serving: BatchServing, capacity: int) -> tuple[Tensor, State, list[int]]:
        with self.bank.serve(serving):
            states = self._encoder_states(encoded)
            ids = self._start_ids(states)
            own = RowCache(self.num_layers, capacity)
            own.positions.begin_prompt(ids.shape[1])
            cache = EncoderDecoderCache(own, DynamicCache())
            logits = self._decoder(ids, states, prompt_mask(ids.shape[1], self.device), None, cache)
        return logits[:, -1], State(cache, states), [ids.shape[1]] * len(encoded)

    def decode(self, tokens: Tensor, positions: Tensor, width: int, state: State, serving: BatchServing) -> Tensor:
        state.cache.self_attention_cache.positions.begin_token(positions, width)
        with self.bank.serve(serving):
            mask = token_mask(positions, width)
            return self._decoder(tokens[:, None], state.encoder_states, mask, positions[:, None], state.cache)[:, 0]

    def score(
        self, encoded: Sequence[EncodedRequest], continuations: Sequence[Sequence[int]], serving: BatchServing
    ) -> list[Tensor]:
        with self.bank.serve(serving):
            states = self._encoder_states(encoded)
            start = self._start_ids(states)
            new = _right_padded([tuple(ids) or (0,) for ids in continuations], self.device)
            ids = torch.cat([start, new], dim=1)
            logits = self._decoder(ids, states, prompt_mask(ids.shape[1], self.device), None, None)
        first = start.shape[1] - 1
        return [logits[i, first : first + len(ids)] for i, ids in enumerate(continuations)]


class _StartTokens:
    """The tokens a Whisper decoder starts from, as its generation configuration says and `generate` reads it.

    known: with a placeholder for the language where it has to be detected. language_ids: the candidates, empty where it has not.
    """

    def __init__(self, generation_config: Any, config: Any) -> None:
        start = generation_config.decoder_start_token_id
        ids = [config.decoder_start_token_id if start is None else start]
        language = getattr(generation_config, "language", None)
        task = getattr(generation_config, "task", None)
        lang_to_id = getattr(generation_config, "lang_to_id", None) or {}
        task_to_id = getattr(generation_config, "task_to_id", None) or {}
        self.language_ids: list[int] = []
        if language is None and task is None:
            forced = getattr(generation_config, "forced_decoder_ids", None) or []
            ids += [token for _, token in sorted(forced)]
        if language is not None:
            ids[1:2] = [_language_id(language, lang_to_id)]
        elif lang_to_id and (len(ids) == 1 or ids[1] is None):
            self.language_ids = sorted(lang_to_id.values())
            ids[1:2] = [self.language_ids[0]]
        if task_to_id and (task is not None or language is not None) and not set(ids) & set(task_to_id.values()):
            ids.append(task_to_id[task or "transcribe"])
        no_timestamps = getattr(generation_config, "no_timestamps_token_id", None)
        if no_timestamps is not None and not getattr(generation_config, "return_timestamps", False) and ids[-1] != no_timestamps:
            ids.append(no_timestamps)
        self.known = tuple(token for token in ids if token is not None)


def _language_id(language: str, lang_to_id: dict[str, int]) -> int:
    """The token of a language given as its token, its code or its English name, as `generate` takes them."""
    code = str(language).lower()
    for candidate in (code, f"<|{code}|>", f"<|{TO_LANGUAGE_CODE.get(code)}|>"):
        if candidate in lang_to_id:
            return lang_to_id[candidate]
    raise ModelError(f"the model's generation configuration asks for the language {language!r}, for which it has no token")


def check_samples(audio: Any) -> np.ndarray:
    """Mono float32 samples in -1 … 1 from whatever array came: integers are scaled, channels averaged.

    Unsigned integers are PCM around the middle of their range, as 8-bit WAV files are; 64-bit integers have no known full scale.
    AudioError for what is no speech.
    """
    if isinstance(audio, Tensor):
        audio = audio.detach().cpu()
        audio = (audio.float() if audio.is_floating_point() else audio).numpy()  # NumPy has no bfloat16
    try:
        samples = np.asarray(audio)
    except ValueError as error:
        raise AudioError("audio must be one row of samples, not rows of different lengths") from error
    if samples.dtype.kind in "iu" and samples.dtype.itemsize <= 4:
        full_scale = 2.0 ** (8 * samples.dtype.itemsize - 1)
        samples = (samples.astype(np.float64) - (full_scale if samples.dtype.kind == "u" else 0.0)) / full_scale
    elif samples.dtype.kind in "iu":
        raise AudioError(
            f"the clip's samples are {samples.dtype}, whose full scale is unknown: give floats in -1 … 1, int16 or int32"
        )
    elif samples.dtype.kind != "f":
        raise AudioError(f"audio must be an array of numbers, not of {samples.dtype}")
    if samples.size == 0:
        raise AudioError("the clip is empty: it has no samples")
    if samples.ndim == 2 and min(samples.shape) <= 8:
        samples = samples.mean(axis=int(np.argmin(samples.shape)))
    if samples.ndim != 1:
        raise AudioError(f"audio must be one row of samples, not an array of shape {samples.shape}")
    samples = samples.astype(np.float32)
    if not np.isfinite(samples).all():
        raise AudioError("the clip has samples that are NaN or infinite: export it again")
    if np.abs(samples).max() < SILENCE:
        raise AudioError("the clip is silent: check the microphone or choose another file")
    return samples
