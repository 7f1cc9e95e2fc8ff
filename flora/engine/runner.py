"""The model's forward: requests → prompts, prompts and tokens → logits. One runner per kind of model, one interface.

A runner knows the model's inputs and the cache's rows, and nothing of adapters beyond putting the batch's `BatchServing` on the
bank for the forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from flora.bank import AdapterBank, BatchServing
from flora.engine.cache import Padding, RowCache, SpeechCache, prompt_mask, token_mask
from flora.engine.device import apart
from flora.engine.request import Request
from flora.errors import AudioError, ModelError, RequestError
from flora.layers import Serving
from flora.models import LoadedModel

SILENCE = 1e-4
"""A clip whose loudest sample is below this (full scale is 1) is silent: -80 dB."""


@dataclass(frozen=True)
class EncodedRequest:
    """A request as the model reads it. features: (mel bins, frames) of a clip, None for a prompt."""

    prompt_ids: tuple[int, ...]
    features: Tensor | None = None


@dataclass(frozen=True)
class PromptPiece:
    """Tokens start … start + length - 1 of a prompt; all of it, where the model reads prompts whole."""

    encoded: EncodedRequest
    start: int
    length: int

    @property
    def ids(self) -> tuple[int, ...]:
        return self.encoded.prompt_ids[self.start : self.start + self.length]


class Runner(Protocol):
    """What the engine needs of a model."""

    device: torch.device
    context_length: int
    reads_pieces: bool  # a prompt may be read piece by piece

    def encode(self, request: Request) -> EncodedRequest:
        """Turn a request into the model's inputs; raises a RequestError for one that cannot be served."""

    def blank(self) -> EncodedRequest:
        """A request that says nothing, the shortest there is."""

    def cost(self, encoded: EncodedRequest) -> int:
        """Positions that the model computes to read the prompt, the encoder's among them."""

    def new_cache(self, max_rows: int, padding: Padding = "none") -> RowCache | SpeechCache:
        """An empty cache for up to `max_rows` running requests; memory is taken as it is reserved."""

    def prefill(
        self, pieces: Sequence[PromptPiece], cache: RowCache | SpeechCache, first_row: int, serving: BatchServing
    ) -> Tensor:
        """Read a piece of a prompt into each row from `first_row` on; the logits (n, vocabulary) after each piece's last token."""

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], cache: RowCache | SpeechCache, first_row: int, serving: BatchServing
    ) -> Tensor:
        """Read one more token into each row from `first_row` on, at its position; the logits (n, vocabulary) after it.

        serving: for as many rows as the cache's `step_shape` says, the spare ones behind those that decode.
        """

    def read_tokens(self, inputs: Tensor, width: int, cache: RowCache | SpeechCache, first_row: int, serving: Serving) -> Tensor:
        """The part of `decode` that the device does, spare rows included: what `token_inputs` gives → logits (rows, vocabulary).

        It never waits for the device, and what runs there depends on the arguments' shapes, not on what `inputs` holds.
        """

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


def token_inputs(
    tokens: Sequence[int], positions: Sequence[int], cache: RowCache | SpeechCache, first_row: int, device: torch.device
) -> tuple[Tensor, int]:
    """What a step that decodes reads, (3, rows) int64: tokens, their positions, where each is written; and the positions in sight.

    A spare row reads token 0 at position 0, sees nothing but that place, and is written where nobody looks.
    """
    rows, width = cache.step_shape(first_row, len(tokens), max(positions) + 1)
    spare = [0] * (rows - len(tokens))
    targets = [*positions, *[cache.spare_position] * len(spare)]
    return torch.tensor(([*tokens, *spare], [*positions, *spare], targets), device=device), width


def _cache_argument(model: PreTrainedModel) -> str:
    """What a model's forward calls its cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _sliding_window(config: Any) -> int | None:
    """Positions that a token can look back, for a model that limits them."""
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


class CodeRunner:
    """Decoder-only language models: GPTBigCode, Llama, and others that take a 4-D mask and position_ids."""

    reads_pieces = True

    def __init__(self, loaded: LoadedModel, bank: AdapterBank) -> None:
        self.model, self.tokenizer, self.bank = loaded.model, loaded.tokenizer, bank
        self.device, self.dtype = loaded.model.device, loaded.model.dtype
        config = loaded.model.config
        # Within a sliding window, attention is the full one; beyond it the mask of a batch would have to know the window.
        self.context_length = min(config.max_position_embeddings, _sliding_window(config) or config.max_position_embeddings)
        self.num_layers = config.num_hidden_layers
        self._cache_argument = _cache_argument(loaded.model)

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

    def blank(self) -> EncodedRequest:
        return EncodedRequest((0,))

    def cost(self, encoded: EncodedRequest) -> int:
        return len(encoded.prompt_ids)

    def new_cache(self, max_rows: int, padding: Padding = "none") -> RowCache:
        return RowCache(self.num_layers, max_rows, self.context_length, padding)

    def prefill(self, pieces: Sequence[PromptPiece], cache: RowCache, first_row: int, serving: BatchServing) -> Tensor:
        ids = _right_padded([piece.ids for piece in pieces], self.device)  # (n, l)
        starts = [piece.start for piece in pieces]
        cache.begin_prompts(first_row, starts, [piece.length for piece in pieces], self.device)
        positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(ids.shape[1], device=self.device)  # (n, l)
        last = torch.tensor([piece.length for piece in pieces], device=self.device) - 1  # (n,)
        kept, place = last.unique(return_inverse=True)
        with self.bank.serve(serving):
            output = self.model(
                input_ids=ids,
                attention_mask=prompt_mask(starts, ids.shape[1], cache.window.width, self.device),
                position_ids=positions.clamp_max(self.context_length - 1),  # padding may stand behind the context's end
                **{self._cache_argument: cache},
                use_cache=True,
                logits_to_keep=kept,
            )
        return output.logits[torch.arange(len(pieces), device=self.device), place]

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], cache: RowCache, first_row: int, serving: BatchServing
    ) -> Tensor:
        inputs, width = token_inputs(tokens, positions, cache, first_row, self.device)
        return self.read_tokens(inputs, width, cache, first_row, serving)[: len(tokens)]

    def read_tokens(self, inputs: Tensor, width: int, cache: RowCache, first_row: int, serving: Serving) -> Tensor:
        ids, places, written = inputs
        cache.begin_tokens(first_row, written, width)
        with self.bank.serve(serving):
            output = self.model(
                input_ids=ids[:, None],
                attention_mask=token_mask(places, width, self.dtype),
                position_ids=places[:, None],
                **{self._cache_argument: cache},
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
                attention_mask=prompt_mask((0,), ids.shape[1], ids.shape[1], self.device),
                position_ids=torch.arange(ids.shape[1], device=self.device).expand_as(ids),
                use_cache=False,
            ).logits
        starts = [len(row.prompt_ids) - 1 for row in encoded]
        return [logits[i, start : start + len(new)] for i, (start, new) in enumerate(zip(starts, continuations, strict=True))]


class SpeechRunner:
    """Whisper: a clip through the encoder once, then its decoder token by token, from the model's own start tokens."""

    reads_pieces = False

    def __init__(self, loaded: LoadedModel, bank: AdapterBank) -> None:
        self.model, self.bank = loaded.model, bank
        self.device, self.dtype = loaded.model.device, loaded.model.dtype
        self.extractor = loaded.processor.feature_extractor
        config = loaded.model.config
        self.context_length = config.max_target_positions
        self.num_layers, self.num_frames, self.width = config.decoder_layers, config.max_source_positions, config.d_model
        self.num_bins = config.num_mel_bins
        self.window_s = config.max_source_positions * 2 * self.extractor.hop_length / self.extractor.sampling_rate
        self._cache_argument = _cache_argument(loaded.model)
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
            import soxr  # only here: a machine that measures speed may have none

            samples = soxr.resample(samples, given_rate, rate)
        extract = partial(self.extractor, samples, sampling_rate=rate, return_tensors="pt")
        features = apart(extract).input_features[0]  # the caller's own thread would keep a team of OpenMP threads
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
        mask = prompt_mask((0,), 1, 1, self.device)
        logits = self._decoder(ids[:, :1], states, mask, None, None)[:, -1]  # (n, vocabulary)
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
            **{self._cache_argument: cache},
            use_cache=cache is not None,
        ).logits

    def blank(self) -> EncodedRequest:
        # The encoder's convolutions halve the frames once.
        features = torch.zeros(self.num_bins, 2 * self.num_frames, device=self.device, dtype=self.dtype)
        return EncodedRequest(self._start.known, features)

    def cost(self, encoded: EncodedRequest) -> int:
        return self.num_frames + len(encoded.prompt_ids)

    def new_cache(self, max_rows: int, padding: Padding = "none") -> SpeechCache:
        return SpeechCache(self.num_layers, max_rows, self.context_length, padding)

    def prefill(self, pieces: Sequence[PromptPiece], cache: SpeechCache, first_row: int, serving: BatchServing) -> Tensor:
        with self.bank.serve(serving):
            states = self._encoder_states([piece.encoded for piece in pieces])
            ids = self._start_ids(states)  # (n, l), as many for every clip
            n, length = ids.shape
            cache.begin_prompts(first_row, [0] * n, [length] * n, self.device)
            return self._decoder(ids, states, prompt_mask((0,), length, length, self.device), None, cache)[:, -1]

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], cache: SpeechCache, first_row: int, serving: BatchServing
    ) -> Tensor:
        inputs, width = token_inputs(tokens, positions, cache, first_row, self.device)
        return self.read_tokens(inputs, width, cache, first_row, serving)[: len(tokens)]

    def read_tokens(self, inputs: Tensor, width: int, cache: SpeechCache, first_row: int, serving: Serving) -> Tensor:
        ids, places, written = inputs
        cache.begin_tokens(first_row, written, width)
        # What the encoder heard is in the cache: the decoder asks for its states and does not look at them.
        states = torch.empty(len(ids), 0, self.width, device=self.device, dtype=self.dtype)
        with self.bank.serve(serving):
            return self._decoder(ids[:, None], states, token_mask(places, width, self.dtype), places[:, None], cache)[:, 0]

    def score(
        self, encoded: Sequence[EncodedRequest], continuations: Sequence[Sequence[int]], serving: BatchServing
    ) -> list[Tensor]:
        with self.bank.serve(serving):
            states = self._encoder_states(encoded)
            start = self._start_ids(states)
            new = _right_padded([tuple(ids) or (0,) for ids in continuations], self.device)
            ids = torch.cat([start, new], dim=1)
            mask = prompt_mask((0,), ids.shape[1], ids.shape[1], self.device)
            logits = self._decoder(ids, states, mask, None, None)
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
