"""Engine: one base model, its adapters, and whoever sends requests. The face of what the other files of this room do."""

from __future__ import annotations

import copy
import itertools
import queue
import random
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from flora import backend, ops
from flora.bank import AdapterBank, AdapterInfo, PreparedAdapter
from flora.engine.core import NOT_ASKED_FOR, Core, Counts, Row
from flora.engine.device import TurnLock, apart, compute_on, turns_on
from flora.engine.generation import BatchGeneration, Generation, SequentialGeneration
from flora.engine.graphs import Capture, CudaCapture, DecodeSteps
from flora.engine.recording import RecordedCapture
from flora.engine.request import Completion, Event, FailEvent, FinishEvent, Request
from flora.engine.runner import EncodedRequest, make_runner
from flora.engine.scheduler import group_by_adapter
from flora.engine.server import Listener, Server, Ticket
from flora.engine.vocabulary import vocabulary_of
from flora.errors import BusyError, FloraError, RequestError
from flora.formats import Adapter, read_adapter, require_base_model
from flora.layers import ServingHolder, inject
from flora.models import LoadedModel, load_model

LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""By how much a chosen token's logit may lie below the reference's best and still agree: the rounding of a whole model's depth."""

INT8_LOGIT_TOLERANCE = 0.5
"""The same in 8 bits, where what is rounded depends on the rows of a forward: docs/int8.md has the differences as measured."""

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


@dataclass(frozen=True)
class EngineSnapshot:
    """An engine at one moment: the requests that were submitted, and batches of their callers' own."""

    time_s: float  # of time.perf_counter
    waiting: int
    running: int
    num_arrived: int
    num_finished: int
    num_failed: int
    num_cancelled: int
    num_tokens: int  # new ones, so far
    num_steps: int
    batch: dict[str | None, int]  # adapter → requests that run with it
    adapter_slots: int
    adapter_slots_used: int
    num_captured: int  # steps that decode, see `Engine.captured`
    num_replayed: int


class Engine:
    """Serves many adapters of one base model in one batch.

    Any number of threads may submit, stream and generate at once: their requests join one batch per method, on a thread that owns
    the device. max_batch_size: requests that run at once. adapter_slots: adapters on the device at once. host_adapter_bytes: of
    adapters kept in memory besides; the rest is read from disk when it is wanted. max_waiting: requests that may stand in line.
    max_batch_tokens: decoded and prompt tokens of one step; longer prompts are read in pieces. static_shapes: whether steps that
    decode are padded to few shapes of rows and positions; by default on a GPU. capture_steps: whether they are captured, and then
    replayed without the model's Python: as CUDA graphs on a GPU, which needs static_shapes, as recorded calls on a CPU; by default
    where they can be.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        max_batch_size: int = 32,
        adapter_slots: int = 64,
        host_adapter_bytes: int = 2 << 30,
        max_waiting: int = 256,
        max_batch_tokens: int = 2048,
        static_shapes: bool | None = None,
        capture_steps: bool | None = None,
    ) -> None:
        for name, value in (("max_batch_size", max_batch_size), ("adapter_slots", adapter_slots), ("max_waiting", max_waiting)):
            if value < 1:
                raise RequestError(f"{name} must be at least 1, not {value}")
        if max_batch_tokens <= max_batch_size:
            raise RequestError(
                f"max_batch_tokens must be more than the {max_batch_size} tokens that a step may decode, not {max_batch_tokens}"
            )
        self.kind, self.name = loaded.kind, loaded.name
        self.weights, self.quantize, self.llm_int8_threshold = loaded.weights, loaded.quantize, loaded.llm_int8_threshold
        self.model, self.processor, self.tokenizer = loaded.model, loaded.processor, loaded.tokenizer
        self.device, self.dtype = loaded.model.device, loaded.model.dtype
        self.max_batch_size, self.max_batch_tokens = max_batch_size, max_batch_tokens
        self.static_shapes = self.device.type == "cuda" if static_shapes is None else static_shapes
        can_capture = self.device.type == "cpu" or (self.device.type == "cuda" and self.static_shapes)
        if capture_steps and not can_capture:
            raise RequestError("steps are captured on a CPU, or with static_shapes on a GPU that knows CUDA graphs")
        self.capture_steps = can_capture if capture_steps is None else capture_steps
        on_gpu = self.device.type == "cuda"
        self.new_capture: Callable[[], Capture] = partial(CudaCapture, self.device) if on_gpu else RecordedCapture
        holder = ServingHolder()
        layers = inject(loaded.model, holder, skip=(loaded.model.get_output_embeddings(),))
        for layer in layers.values():
            layer.store_by_input()
        self._vocabulary = vocabulary_of(loaded)
        self._turns, self._compute = turns_on(self.device), compute_on(self.device)
        self._serve(loaded, AdapterBank(layers, holder, self.device, self.dtype, adapter_slots, host_adapter_bytes), max_waiting)

    def _serve(self, loaded: LoadedModel | Engine, bank: AdapterBank, max_waiting: int) -> None:
        """Begin with these adapters, an empty line and no batch."""
        self.bank = bank
        self.runner = make_runner(loaded, bank)
        self._counts = Counts()
        self._own_batches: weakref.WeakSet[Core] = weakref.WeakSet()  # of `start`
        self._own_batches_guard = threading.Lock()  # one thread adds while another looks
        make_core = partial(self._make_core, max_rows=self.max_batch_size, max_batch_tokens=self.max_batch_tokens)
        self._server = Server(make_core, bank, self._turns, self._compute, max_waiting)

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
        llm_int8_threshold: float | None = None,
        check_base_model: bool = True,
        **serving: int | bool | None,
    ) -> Engine:
        """Load a base model (folder, hub id or short name) and its adapters: tag → one checkpoint, or one of each family.

        quantize: "int8" or "nf4". weights: "random" for true shapes without any download. llm_int8_threshold: of 8-bit weights, see
        docs/int8.md; None: 6.0. check_base_model: as in `add_adapter`. serving: adapter_slots, host_adapter_bytes, max_waiting,
        max_batch_tokens, static_shapes and capture_steps, as the class explains them.
        Raises ModelError, AdapterError or CheckpointError, each naming what is wrong.
        """
        load = partial(load_model, name, device, dtype, quantize, weights, llm_int8_threshold=llm_int8_threshold)
        engine = cls(apart(load), max_batch_size, **serving)  # the steps of other engines go on meanwhile
        for tag, sources in (adapters or {}).items():
            engine.add_adapter(tag, sources, check_base_model)
        return engine

    def beside(self, max_batch_size: int, adapter_slots: int, max_waiting: int = 256) -> Engine:
        """Another engine of the same base model, in the same memory, with adapters, a line and batches of its own.

        Both take turns at every step, as any two engines on one device do, and neither sees the other's adapters: so adapters can
        be tried and measured beside those that are served. Close it when it is done.
        """
        other = copy.copy(self)
        other.max_batch_size, other.max_batch_tokens = max_batch_size, max(self.max_batch_tokens, max_batch_size + 1)
        bank = AdapterBank(self.bank.layers, self.bank.holder, self.device, self.dtype, adapter_slots)
        other._serve(self, bank, max_waiting)
        return other

    def _make_core(self, method: str, max_rows: int, max_batch_tokens: int) -> Core:
        padding = "rows and positions" if self.static_shapes else "positions" if self.capture_steps else "none"
        settings = (method, max_rows, max_batch_tokens, self._counts, padding)
        return Core(self.runner, self.bank, self._vocabulary, *settings, self.new_capture() if self.capture_steps else None)

    @property
    def implementation(self) -> str:
        """ "triton" or "pytorch": what serves the methods that have kernels of their own, on this engine's device."""
        return backend.implementation(self.device.type)

    def close(self, timeout_s: float = 10.0) -> None:
        """Take no more requests; those that wait or run may finish for `timeout_s` seconds, then they fail by name."""
        self._server.close(timeout_s)
        self.bank.close()

    # ---------------------------------------------------------------------------------------------------- adapters

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """What is registered, by tag."""
        return self.bank.info

    def add_adapter(self, name: str, sources: str | Path | Sequence[str | Path], check_base_model: bool = True) -> AdapterInfo:
        """Register one checkpoint, or one of each family, under a tag; a tag that exists is replaced for requests admitted later.

        It is read and checked before the engine's thread is held up, and only for as long as its name takes to be changed. One that
        fits, and yet names another base model than the engine's, is an AdapterError, unless check_base_model is False.
        """
        paths = [sources] if isinstance(sources, str | Path) else list(sources)

        def read() -> list[Adapter]:
            return [read_adapter(path) for path in paths]

        def prepare() -> PreparedAdapter:
            adapters = read()
            prepared = self.bank.prepare(name, adapters, reload=read)
            if not check_base_model:
                return replace(prepared, info=replace(prepared.info, any_base_model=True))
            require_base_model(name, adapters, (self.name, self.model.name_or_path))
            return prepared

        prepared = apart(prepare)
        with self._turns:
            return self.bank.commit(prepared)

    def remove_adapter(self, name: str) -> None:
        """Forget a tag. Requests that run with it finish with it. UnknownAdapterError where there is none."""
        with self._turns:
            self.bank.remove(name)

    # --------------------------------------------------------------------------------------------------- requests

    @property
    def context_length(self) -> int:
        """Positions of the decoder: a prompt's tokens plus the new ones."""
        return self.runner.context_length

    @property
    def window_s(self) -> float | None:
        """Seconds of the longest clip, for a speech model."""
        return getattr(self.runner, "window_s", None)

    def validate(self, request: Request, method: str = "flora") -> None:
        """Raise the named error that `submit` or `start` would raise for this request."""
        self._encode(request, method)

    def _encode(self, request: Request, method: str) -> EncodedRequest:
        _check_method(method)
        if not isinstance(request, Request):
            raise RequestError(f"expected a flora.Request, not {type(request).__name__}")
        if request.adapter is not None:
            self.bank.family_for(request.adapter, method)
        if method in ("flora-modulate", "merged"):
            for layer in self.bank.layers.values():
                _ = layer.weight  # a quantised layer says that it has none
        return self.runner.encode(request)

    def _row(self, request: Request, method: str, seed: int, index: int, place: int, session: Hashable) -> Row:
        """place: in the list that a seed is for; what is sampled depends on both."""
        encoded = self._encode(request, method)
        room = self.context_length - len(encoded.prompt_ids)
        sampler = _sampler(seed, place) if request.temperature > 0 else None
        return Row(index, request, encoded, min(request.max_new_tokens, room), sampler, session)

    def submit(
        self,
        request: Request,
        method: str = "flora",
        *,
        session: Hashable = None,
        deadline_s: float | None = None,
        seed: int = 0,
        index: int = 0,
        listener: Listener | None = None,
    ) -> Ticket:
        """Put a request in line and return at once. It joins whatever runs with the same method.

        session: whose request it is; sessions take turns, and none fills the line. deadline_s: seconds from now after which it
        fails by name. seed, index: what is sampled depends on both, and `index` is what its events carry. listener: called with
        every event on the engine's thread, which waits for it, instead of keeping them for whoever iterates over the ticket.
        Raises RequestError, AudioError or AdapterError for what cannot be served, BusyError where too many wait.
        """
        if deadline_s is not None and not deadline_s > 0:
            raise RequestError(f"deadline_s must be more than 0 seconds, not {deadline_s}")
        try:
            hash(session)
        except TypeError as error:
            raise RequestError(f"session must be hashable, such as a string, not {type(session).__name__}") from error
        row = self._row(request, method, seed, index, index, session)
        return self._server.submit([row], method, deadline_s, listener)[0]

    def stream(self, requests: Sequence[Request], method: str = "flora", seed: int = 0) -> Iterator[Event]:
        """Submit requests and yield each token and each completion as it comes; `index` is the place in `requests`.

        They share the batch with everybody else's. A request that fails raises its error and cancels the others.
        """
        requests = list(requests)
        if not requests:
            raise RequestError(EMPTY_BATCH)
        for request in requests:
            self._encode(request, method)  # everything is checked before anything runs
        return self._stream(requests, method, seed)

    def _stream(self, requests: list[Request], method: str, seed: int) -> Iterator[Event]:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        session, tickets, at_once = object(), {}, min(2 * self.max_batch_size, self._server.max_waiting)
        ready: list[Row] = []  # encoded, and waiting for a place in the queue
        following = iter(enumerate(requests))
        try:
            while True:
                # Of a long list the next ones are ready, and no more of them in everybody's way.
                for place, request in itertools.islice(following, at_once - len(tickets) - len(ready)):
                    ready.append(self._row(request, method, seed, place, place, session))
                # Where the line has no room for all of them, the first is enough to go on; else those that were taken are waited
                # for: an engine that shuts down finishes them.
                for count in dict.fromkeys((len(ready), min(1, len(ready)))):
                    try:
                        submitted = self._server.submit(ready[:count], method, None, events.put) if count else []
                    except BusyError:
                        if not tickets and count == 1:
                            raise
                    else:
                        tickets |= {row.index: ticket for row, ticket in zip(ready[:count], submitted, strict=True)}
                        ready = ready[count:]
                        break
                if not tickets:
                    return
                event = events.get()
                if isinstance(event, FailEvent):
                    raise event.error
                if isinstance(event, FinishEvent):
                    del tickets[event.index]
                yield event
        finally:
            for ticket in tickets.values():
                ticket.cancel()

    def generate(self, requests: Sequence[Request], method: str = "flora", seed: int = 0) -> list[Completion]:
        """Run requests to their end; completions in the requests' order."""
        completions: dict[int, Completion] = {}
        for event in self.stream(requests, method, seed):
            if isinstance(event, FinishEvent):
                completions[event.index] = event.completion
        return [completions[index] for index in range(len(completions))]

    def snapshot(self) -> EngineSnapshot:
        """How the engine stands at this moment; from any thread, and without waiting for a step."""
        with self._own_batches_guard:
            own_batches = list(self._own_batches)
        counts, cores = self._counts, [*self._server.cores, *own_batches]
        running = [row.request.adapter for core in cores for row in core.running]
        return EngineSnapshot(
            time_s=time.perf_counter(),
            waiting=self._server.num_waiting,
            running=len(running),
            num_arrived=counts.arrived,
            num_finished=counts.finished,
            num_failed=counts.failed,
            num_cancelled=counts.cancelled,
            num_tokens=counts.tokens,
            num_steps=counts.steps,
            batch=dict(Counter(running)),
            adapter_slots=self.bank.slot_capacity,
            adapter_slots_used=self.bank.slots_used,
            num_captured=sum(steps.captured for steps in list(counts.decode.values())),
            num_replayed=sum(steps.replayed for steps in list(counts.decode.values())),
        )

    # --------------------------------------------------------------------------------------------- captured steps

    def capture(self, method: str = "flora", adapters: Sequence[str | None] = (), num_positions: int = 256) -> int:
        """Capture a method's decode steps before requests come, so that no request has to wait for it; returns how many were.

        They are the steps of 1, 2, 4 … max_batch_size rows (on a CPU, where rows are not padded, of every number of rows) at every
        width up to `num_positions`, the prompt and new tokens of the longest request. adapters: of the rows, one after another in
        turn; none: the base model. A batch whose adapters have other ranks is another step. The cache has room for them all from
        then on, and both are kept however long nobody asks for the method. They are those of the requests that are submitted, not
        of the batches that `start` makes. Where the method's steps cannot be captured, nothing is, and `captured` says why.
        Not for listeners: it waits for the engine's thread. Raises RequestError or AdapterError for what cannot be served,
        BusyError while requests with the method are on their way, ServingError where the device has not the memory.
        """
        _check_method(method)
        if not 1 <= num_positions <= self.context_length:
            raise RequestError(f"num_positions must be 1 to {self.context_length}, the model's context, not {num_positions}")
        tags = list(adapters) or [None]
        for tag in tags:
            if tag is not None:
                self.bank.family_for(tag, method)
        if not self.capture_steps:
            return 0
        return self._server.prepare(method, lambda core: core.capture(tags, num_positions))

    def captured(self, method: str = "flora") -> DecodeSteps:
        """How many of a method's decode steps were captured, replayed, or ran as ever so far, in batches of all kinds, and why the
        last one ran, where that will not change. Two of them, before and after, say what happened between."""
        _check_method(method)
        return replace(self._counts.decode.get(method, DecodeSteps(reason=None if self.capture_steps else NOT_ASKED_FOR)))

    # ---------------------------------------------------------------------------------------- a batch of one's own

    def exclusive(self) -> TurnLock:
        """A context in which no other forward runs on the engine's device: for steps that are timed."""
        return self._turns

    def start(self, requests: Sequence[Request], method: str = "flora", seed: int = 0, first_index: int = 0) -> Generation:
        """Check and encode a batch that its caller steps and nobody joins; nothing is run yet.

        Raises a RequestError or AdapterError before anything runs. first_index: the batch's place in a longer list; what is sampled
        depends on the seed and on a request's place in that list.
        """
        if not requests:
            raise RequestError(EMPTY_BATCH)
        if len(requests) > self.max_batch_size:
            raise RequestError(f"the batch has {len(requests)} requests and this engine takes {self.max_batch_size} at once")
        rows = [
            self._row(request, method, seed, index, first_index + index, session=None) for index, request in enumerate(requests)
        ]
        with self._turns:
            self._server.close_abandoned()
            try:
                for row in rows:
                    row.slot = self._compute(partial(self.bank.pin_now, row.request.adapter, method))
            except FloraError:
                for row in rows:
                    if row.slot is not None:
                        self.bank.unpin(row.slot)
                raise
            if method != "merged":
                return _Locked(self._own_batch(rows, method), self)
            groups = group_by_adapter([request.adapter for request in requests])
            return _Locked(SequentialGeneration([self._own_batch([rows[i] for i in group], method) for group in groups]), self)

    def _own_batch(self, rows: Sequence[Row], method: str) -> BatchGeneration:
        # All prompts are read in the first step, as one batch: no budget.
        core = self._make_core(method, len(rows), sum(self.runner.cost(row.encoded) for row in rows) + len(rows))
        with self._own_batches_guard:
            self._own_batches.add(core)
        return BatchGeneration(core, rows)

    # ------------------------------------------------------------------------------------------------- verification

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
        tokens = agreeing = 0
        difference: float | None = None
        for index, (request, ids) in enumerate(zip(requests, token_ids, strict=True)):
            if not ids:
                continue
            encoded = self._encode(request, method)
            own_logits = None if chosen_logits is None else chosen_logits[index]
            with self._turns:
                one = self._compute(partial(self._verify_one, request, encoded, list(ids), method, own_logits))
            tokens, agreeing = tokens + one.tokens, agreeing + one.agreeing
            if one.max_logit_difference is not None:
                difference = max(difference or 0.0, one.max_logit_difference)
        return Agreement(tokens, agreeing, difference)

    @torch.inference_mode()
    def _verify_one(
        self, request: Request, encoded: EncodedRequest, ids: list[int], method: str, own_logits: Sequence[float] | None
    ) -> Agreement:
        adapter = None if method == "base" else request.adapter
        reference = method if any(layer.is_black_box for layer in self.bank.layers.values()) else "merged"
        slot = self.bank.pin_now(adapter, reference)
        try:
            serving = self.bank.arrange([slot], reference, ops.FAMILY[method])
            (logits,) = self.runner.score([encoded], [ids], serving)  # (tokens, vocabulary)
        finally:
            self.bank.unpin(slot)
        logits = logits.float()
        best = torch.cat([self._vocabulary.masked(logits[:1], first=True), self._vocabulary.masked(logits[1:], first=False)])
        chosen = logits.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0]  # (tokens,)
        gap, difference = best.max(-1).values - chosen, None
        if own_logits is not None:
            own_difference = (torch.tensor(own_logits, device=logits.device) - chosen).abs()
            difference = own_difference.max().item()
            if request.temperature > 0:
                gap = own_difference  # sampled: the token need not be the best, but its logit must be the reference's
        tolerance = LOGIT_TOLERANCE.get(self.dtype, LOGIT_TOLERANCE[torch.bfloat16])
        if self.quantize == "int8":
            tolerance = max(tolerance, INT8_LOGIT_TOLERANCE)
        return Agreement(len(ids), int((gap <= tolerance).sum()), difference)


class _Locked:
    """A generation whose forwards take turns with all others on the device."""

    def __init__(self, generation: BatchGeneration | SequentialGeneration, engine: Engine) -> None:
        self._generation, self._engine = generation, engine

    def __getattr__(self, name: str):
        return getattr(self._generation, name)

    def step(self) -> list[Event]:
        with self._engine._turns:
            return self._engine._compute(self._generation.step)

    def cancel(self, index: int | None = None) -> list[Event]:
        with self._engine._turns:
            return self._generation.cancel(index)

    def close(self) -> None:
        with self._engine._turns:
            self._generation.close()

    def __del__(self) -> None:
        if sys.is_finalizing():  # the modules that closing needs may be gone
            return
        # Whoever drops the last reference may hold any lock: where it is not free, the batch is closed when the next one starts.
        if self._engine._turns.take_if_free():
            with self._engine._turns:
                self._generation.close()
            self._engine._turns.__exit__()
        else:
            self._engine._server.abandoned.append(self._generation)


def _check_method(method: str) -> None:
    if method not in ops.METHODS:
        raise RequestError(f"unknown method {method!r}; methods are {', '.join(ops.METHODS)}")


def _sampler(seed: int, place: int) -> torch.Generator:
    """The random numbers of the request at this place. PyTorch's generator looks at 32 bits only: both numbers are hashed first."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {place}").getrandbits(32))
