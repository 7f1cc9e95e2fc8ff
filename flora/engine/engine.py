"""Engine: one base model, its adapters, and requests in batches. `step` is schedule → run → postprocess."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from flora import ops
from flora.bank import AdapterBank, AdapterInfo
from flora.engine.generation import BatchGeneration, Event, Generation, Row, SequentialGeneration, Vocabulary, masked_logits
from flora.engine.request import Completion, FinishEvent, Request
from flora.engine.runner import make_runner
from flora.engine.scheduler import group_by_adapter, schedule
from flora.errors import RequestError
from flora.formats import read_adapter
from flora.layers import ServingHolder, inject
from flora.models import LoadedModel, load_model

LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""By how much a chosen token's logit may lie below the reference's best and still agree: the rounding of a whole model's depth."""

EMPTY_BATCH = "the batch is empty: add at least one request"


@dataclass(frozen=True)
class Agreement:
    """How a batch's tokens compare with the reference: every request alone, its adapter merged into the weights.

    agreeing of tokens were the reference's own choice, given the tokens before them. max_logit_difference: between the logit each
    token was chosen by and the reference's logit of that token; None where the batch's logits were not given.
    """

    tokens: int
    agreeing: int
    max_logit_difference: float | None

    @property
    def agrees(self) -> bool:
        return self.agreeing == self.tokens


class Engine:
    """Serves many adapters of one base model in one batch.

    Calls from several threads are safe: forwards take turns, step by step.
    """

    def __init__(self, loaded: LoadedModel, max_batch_size: int = 32) -> None:
        if max_batch_size < 1:
            raise RequestError(f"max_batch_size must be at least 1, not {max_batch_size}")
        self.kind, self.name = loaded.kind, loaded.name
        self.model, self.processor, self.tokenizer = loaded.model, loaded.processor, loaded.tokenizer
        self.device, self.dtype = loaded.model.device, loaded.model.dtype
        self.max_batch_size = max_batch_size
        holder = ServingHolder()
        layers = inject(loaded.model, holder, skip=(loaded.model.get_output_embeddings(),))
        self.bank = AdapterBank(layers, holder, self.device, self.dtype)
        self.runner = make_runner(loaded, self.bank)
        self._vocabulary = _vocabulary_of(loaded)
        self._lock = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        adapters: Mapping[str, str | Path | Sequence[str | Path]] | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantize: str | None = None,
        weights: str = "pretrained",
        max_batch_size: int = 32,
    ) -> Engine:
        """Load a base model (folder, hub id or short name) and its adapters: tag → one checkpoint, or one of each family.

        Raises ModelError, AdapterError or CheckpointError, each naming what is wrong.
        """
        engine = cls(load_model(name, device, dtype, quantize, weights), max_batch_size)
        for tag, sources in (adapters or {}).items():
            engine.add_adapter(tag, sources)
        return engine

    # ---------------------------------------------------------------------------------------------------- adapters

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """What is loaded, by tag."""
        return self.bank.info

    def add_adapter(self, name: str, sources: str | Path | Sequence[str | Path]) -> AdapterInfo:
        """Load one checkpoint, or one of each family, under a tag; a tag that exists is replaced for batches that start later."""
        paths = [sources] if isinstance(sources, str | Path) else list(sources)
        adapters = [read_adapter(path) for path in paths]
        with self._lock:
            return self.bank.add(name, adapters)

    def remove_adapter(self, name: str) -> None:
        """Forget a tag. Batches that use it finish with it. UnknownAdapterError where there is none."""
        with self._lock:
            self.bank.remove(name)

    # --------------------------------------------------------------------------------------------------- generation

    @property
    def context_length(self) -> int:
        """Positions of the decoder: a prompt's tokens plus the new ones."""
        return self.runner.context_length

    @property
    def window_s(self) -> float | None:
        """Seconds of the longest clip, for a speech model."""
        return getattr(self.runner, "window_s", None)

    def validate(self, request: Request, method: str = "flora") -> None:
        """Raise the named error that `start` would raise for this request."""
        self._encode(request, method)

    def _encode(self, request: Request, method: str):
        if method not in ops.METHODS:
            raise RequestError(f"unknown method {method!r}; methods are {', '.join(ops.METHODS)}")
        if not isinstance(request, Request):
            raise RequestError(f"expected a flora.Request, not {type(request).__name__}")
        if request.adapter is not None:
            self.bank.family_for(request.adapter, method)
        if method in ("flora-modulate", "merged"):
            for layer in self.bank.layers.values():
                _ = layer.weight  # a quantised layer says that it has none
        return self.runner.encode(request)

    def start(self, requests: Sequence[Request], method: str = "flora", seed: int = 0, first_index: int = 0) -> Generation:
        """Check and encode a batch; nothing is run yet. Raises a RequestError or AdapterError before anything runs.

        first_index: the batch's place in a longer list; what is sampled depends on the seed and on a request's place in that list.
        """
        if not requests:
            raise RequestError(EMPTY_BATCH)
        if len(requests) > self.max_batch_size:
            raise RequestError(f"the batch has {len(requests)} requests and this engine takes {self.max_batch_size} at once")
        rows = []
        for index, request in enumerate(requests):
            encoded = self._encode(request, method)
            room = self.context_length - len(encoded.prompt_ids)
            sampler = _sampler(seed, first_index + index) if request.temperature > 0 else None
            rows.append(Row(index, request, encoded, min(request.max_new_tokens, room), sampler))
        batch = partial(BatchGeneration, self.runner, self.bank, self._vocabulary)
        with self._lock:
            if method != "merged":
                return _Locked(batch(rows, method), self._lock)
            groups = group_by_adapter([request.adapter for request in requests])
            generations = [batch([rows[index] for index in group], method) for group in groups]
            return _Locked(SequentialGeneration(generations), self._lock)

    def stream(self, requests: Sequence[Request], method: str = "flora", seed: int = 0) -> Iterator[Event]:
        """Run requests in batches and yield each token and each completion as it comes; `index` is the place in `requests`."""
        requests = list(requests)
        if not requests:
            raise RequestError(EMPTY_BATCH)
        for request in requests:
            self._encode(request, method)  # everything is checked before anything runs
        for batch in schedule(requests, self.max_batch_size):
            generation = self.start(batch.items, method, seed, first_index=batch.indices[0])
            try:
                while not generation.done:
                    for event in generation.step():
                        yield replace(event, index=batch.indices[event.index])
            finally:
                generation.close()

    def generate(self, requests: Sequence[Request], method: str = "flora", seed: int = 0) -> list[Completion]:
        """Run requests to their end; completions in the requests' order."""
        completions: dict[int, Completion] = {}
        for event in self.stream(requests, method, seed):
            if isinstance(event, FinishEvent):
                completions[event.index] = event.completion
        return [completions[index] for index in range(len(requests))]

    # ------------------------------------------------------------------------------------------------- verification

    @torch.inference_mode()
    def verify(
        self,
        requests: Sequence[Request],
        token_ids: Sequence[Sequence[int]],
        method: str,
        chosen_logits: Sequence[Sequence[float]] | None = None,
    ) -> Agreement:
        """Read each answer with the reference, given its own tokens so far, and count the tokens it would have chosen too.

        The reference is each request alone with its adapter merged into the weights; for `base`, the base model. (A quantised
        model, whose weights cannot be merged, serves it alone with `method`.) token_ids, chosen_logits: each request's new tokens
        and the logits they were chosen by.
        """
        tolerance = LOGIT_TOLERANCE.get(self.dtype, LOGIT_TOLERANCE[torch.bfloat16])
        quantised = any(layer.is_black_box for layer in self.bank.layers.values())
        tokens = agreeing = 0
        difference: float | None = None
        for index, (request, ids) in enumerate(zip(requests, token_ids, strict=True)):
            if not ids:
                continue
            encoded = self._encode(request, method)
            with self._lock:
                adapter = None if method == "base" else request.adapter
                serving = self.bank.serving([adapter], method if quantised else "merged", family=ops.FAMILY[method])
                try:
                    (logits,) = self.runner.score([encoded], [list(ids)], serving)  # (tokens, vocabulary)
                finally:
                    self.bank.release(serving)
            logits = logits.float()
            best = torch.cat(
                [masked_logits(logits[:1], self._vocabulary, True), masked_logits(logits[1:], self._vocabulary, False)]
            )
            chosen = logits.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0]  # (tokens,)
            gap = best.max(-1).values - chosen
            if chosen_logits is not None:
                own = torch.tensor(chosen_logits[index], device=logits.device)
                own_difference = (own - chosen).abs()
                difference = max(difference or 0.0, own_difference.max().item())
            if request.temperature > 0 and chosen_logits is not None:
                gap = own_difference  # sampled: the token need not be the best, but its logit must be the reference's
            tokens += len(ids)
            agreeing += int((gap <= tolerance).sum())
        return Agreement(tokens, agreeing, difference)


class _Locked:
    """A generation whose forwards take turns with those of other threads on the same engine."""

    def __init__(self, generation: BatchGeneration | SequentialGeneration, lock: threading.RLock) -> None:
        self._generation, self._lock = generation, lock

    def __getattr__(self, name: str):
        return getattr(self._generation, name)

    def step(self) -> list[Event]:
        with self._lock:
            return self._generation.step()

    def cancel(self, index: int | None = None) -> list[Event]:
        with self._lock:
            return self._generation.cancel(index)

    def close(self) -> None:
        with self._lock:
            self._generation.close()

    def __del__(self) -> None:
        self.close()


def _sampler(seed: int, place: int) -> torch.Generator:
    """The random numbers of the request at this place. PyTorch's generator looks at 32 bits only: both numbers are hashed first."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {place}").getrandbits(32))


def _vocabulary_of(loaded: LoadedModel) -> Vocabulary:
    generation = loaded.model.generation_config
    stop = generation.eos_token_id if generation.eos_token_id is not None else loaded.tokenizer.eos_token_id
    stops = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
    return Vocabulary(
        stop_ids=frozenset(stops),
        suppressed=tuple(getattr(generation, "suppress_tokens", None) or ()),
        suppressed_at_begin=tuple(getattr(generation, "begin_suppress_tokens", None) or ()),
        decode=partial(loaded.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False),
    )
