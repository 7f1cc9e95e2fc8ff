"""Core: the requests of one method on one model, from prompts to answers. `step` is schedule → run → postprocess.

Requests join and leave at every step. Running ones have consecutive rows of the cache, those that decode first: a step is one
forward for all of them, and one for the pieces of prompts that fit its token budget. What goes wrong with a request ends that
request, by name, and no other.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from flora.bank import IDENTITY_SLOT, AdapterBank, BatchServing
from flora.engine.cache import Padding
from flora.engine.graphs import Capture, DecodeGraphs, DecodeSteps
from flora.engine.request import Completion, Event, FailEvent, FinishEvent, Request, TokenEvent
from flora.engine.runner import EncodedRequest, PromptPiece, Runner
from flora.engine.scheduler import Chunk, Scheduler
from flora.engine.vocabulary import Vocabulary, choose_tokens
from flora.errors import BusyError, FloraError, ServingError

logger = logging.getLogger(__name__)

NOT_ASKED_FOR = "the engine was made not to capture its steps"


@dataclass
class RequestTimes:
    """When what happened to a request, in seconds of `time.perf_counter`."""

    arrival_s: float | None = None
    admitted_s: float | None = None
    token_s: list[float] = field(default_factory=list)  # of each new token
    finished_s: float | None = None


@dataclass(eq=False)
class Row:
    """One request on its way: what the scheduler, the cache and its caller need to know of it."""

    index: int  # its place in its caller's list
    request: Request
    encoded: EncodedRequest
    max_new_tokens: int  # the request's own, or what the context has room for
    sampler: torch.Generator | None = None
    session: Hashable = None
    num_prompt_tokens: int = 0  # what the prompt costs of a step's budget
    divisible: bool = True
    num_prefilled: int = 0
    num_passes: int = 0
    slot: int | None = None  # of its adapter, pinned; None while it waits
    position: int = 0  # where its last token is written next
    token_ids: list[int] = field(default_factory=list)
    chosen_logits: list[float] = field(default_factory=list)
    text_end: int | None = None  # number of tokens before the first stop token
    first_s: float | None = None  # when its first token came, be it the stop token
    times: RequestTimes = field(default_factory=RequestTimes)
    completion: Completion | None = None
    error: FloraError | None = None

    @property
    def done(self) -> bool:
        return self.completion is not None or self.error is not None

    @property
    def length(self) -> int:
        """Positions it may fill in the cache."""
        return len(self.encoded.prompt_ids) + self.max_new_tokens

    def forget_clip(self) -> None:
        """Let the features of its clip go, which nobody reads again: whoever keeps its ticket need not keep them on the device."""
        if self.encoded.features is not None:
            self.encoded = replace(self.encoded, features=None)

    @property
    def num_cached(self) -> int:
        """Positions it has filled."""
        read = self.num_prefilled if self.divisible else len(self.encoded.prompt_ids) * bool(self.num_prefilled)
        return self.position or read


Told = tuple[Row, Event]
"""What happened, and to which request."""


@dataclass
class Counts:
    """What an engine has done so far, over all of its cores."""

    steps: int = 0
    tokens: int = 0  # new ones
    arrived: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    decode: dict[str, DecodeSteps] = field(default_factory=dict)  # by method


class Core:
    """Serves requests with one method. Everything but `add` happens on the thread that steps it.

    max_rows: requests that run at once. max_batch_tokens: of one step. counts: where it notes what it has done. padding: of steps
    that decode, to fewer shapes. capture: replay those shapes, captured by this.
    """

    def __init__(
        self,
        runner: Runner,
        bank: AdapterBank,
        vocabulary: Vocabulary,
        method: str,
        max_rows: int,
        max_batch_tokens: int,
        counts: Counts,
        padding: Padding = "none",
        capture: Capture | None = None,
    ) -> None:
        self.runner, self.bank, self.vocabulary, self.method, self.counts = runner, bank, vocabulary, method, counts
        self.scheduler: Scheduler[Row] = Scheduler(max_rows, max_batch_tokens)
        self.cache = runner.new_cache(max_rows, padding)
        self._decode_steps = counts.decode.setdefault(method, DecodeSteps())
        self.graphs = None if capture is None else DecodeGraphs(runner, capture, self._decode_steps)
        self._decode_serving: BatchServing | None = None  # of the rows that decode; None once one has come or gone
        self._merged_serving: BatchServing | None = None  # method `merged`: of the one adapter that is being served
        self.told: list[Told] = []  # of the step under way

    # ------------------------------------------------------------------------------------------------- coming and going

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.num_running or self.scheduler.num_waiting)

    @property
    def running(self) -> list[Row]:
        """In the order of their rows."""
        return [*self.scheduler.decoding, *self.scheduler.prefilling]

    def add(self, row: Row) -> None:
        """Put a request in line."""
        row.num_prompt_tokens, row.divisible = self.runner.cost(row.encoded), self.runner.reads_pieces
        self.scheduler.add(row)
        self.counts.arrived += 1

    @torch.inference_mode()
    def cancel(self, row: Row) -> list[Told]:
        """End a request with what it has; nothing for one that is done."""
        if row.done:
            return []
        self._leave(row)
        return [(row, self._finish(row, "cancelled"))]

    @torch.inference_mode()
    def fail(self, row: Row, error: FloraError) -> list[Told]:
        """End a request by an error; nothing for one that is done."""
        if row.done:
            return []
        self._leave(row)
        return [(row, self._failed(row, error))]

    def close(self) -> None:
        """Let every request go, unfinished, and give the cache back."""
        for row in [*self.running[::-1], *self.scheduler.waiting()]:  # from the last row on: none has to move
            self._leave(row)
            self.counts.cancelled += 1
        self.cache = self.graphs = self._decode_serving = self._merged_serving = None

    def _leave(self, row: Row) -> None:
        row.forget_clip()
        if row.times.admitted_s is None:
            self.scheduler.withdraw(row)
        else:
            for source, target in self.scheduler.remove(row):
                length = self.running[target].num_cached
                if length:
                    self.cache.move(source, target, length)
            self._decode_serving = None
            if not self.scheduler.num_running:
                self._merged_serving = None
                if self.graphs is not None:
                    self.graphs.forget_batches()
        if row.slot is not None:
            self.bank.unpin(row.slot)
            row.slot = None

    @torch.inference_mode()
    def capture(self, adapters: Sequence[str | None], num_positions: int) -> int:
        """Capture what decodes 1 … max_rows requests of up to `num_positions` positions before there are any; how many shapes were.

        adapters: of the rows, one after another in turn. From then on the cache has room for all of them.
        """
        if self.graphs is None or self.method == "merged":
            return 0
        if self.busy:
            raise BusyError(f"requests with {self.method} are on their way: capture its steps before they are sent, or after")
        num_captured, max_rows = self.graphs.num_captured, self.scheduler.max_rows
        slots: list[int] = []
        try:
            for _, adapter in zip(range(max_rows), itertools.cycle(adapters), strict=False):
                slots.append(self.bank.pin_now(adapter, self.method))
            blank = self.runner.blank()
            self.cache.reserve(1, len(blank.prompt_ids))
            piece = PromptPiece(blank, 0, len(blank.prompt_ids))
            self.runner.prefill([piece], self.cache, 0, self.bank.arrange(slots[:1], self.method))  # the cache takes its memory
            self.cache.reserve(max_rows, num_positions)
            for num_rows in range(max_rows, 0, -1):
                num_spare = self.cache.step_shape(0, num_rows, 1)[0] - num_rows
                serving = self._arranged(slots[:num_rows], num_spare)
                for width in self.cache.step_widths(num_positions):
                    self.graphs.prepare(num_rows, width, self.cache, serving)
            for row in range(max_rows):
                self.cache.clear(row)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ServingError(
                f"the device has no memory for {max_rows} requests of {num_positions} positions: capture fewer, or shorter ones"
            ) from error
        finally:
            for slot in slots:
                self.bank.unpin(slot)
        return self.graphs.num_captured - num_captured

    # ------------------------------------------------------------------------------------------------------------- step

    @torch.inference_mode()
    def step(self) -> list[Told]:
        """One forward for all that decode, one for the prompts whose turn it is; what came of it, each event with its request."""
        self.told = []
        plan = self.scheduler.schedule(self._admit)
        if plan.decode:
            self._decode(plan.decode)
        if plan.prefill:
            self._prefill(plan.prefill)
        self.counts.steps += bool(plan)
        return self.told

    def _admit(self, row: Row) -> bool:
        """Take a waiting request in, if its adapter has a slot; one that can never run fails here."""
        others = self.running
        if self.method == "merged" and others and others[0].request.adapter != row.request.adapter:
            return False  # the weights hold one adapter at a time
        try:
            if row.slot is None:
                row.slot = self.bank.pin(row.request.adapter, self.method)
                if row.slot is None:
                    return False
            if self.method == "merged" and others and others[0].slot != row.slot:  # the same tag, loaded anew
                self.bank.unpin(row.slot)
                row.slot = None
                return False
            self.cache.reserve(len(others) + 1, row.length)
        except FloraError as error:
            self.told += self.fail(row, error)
            return False
        except (RuntimeError, MemoryError) as error:  # PyTorch's allocators raise no other kind when a device is full
            logger.warning("no room in the cache for one more request", exc_info=error)
            self.told += self.fail(row, ServingError("there is no memory left for this request: shorten it, or try again later"))
            return False
        row.times.admitted_s = time.perf_counter()
        return True

    def _serving(self, rows: Sequence[Row], num_spare: int = 0) -> BatchServing:
        slots = [row.slot for row in rows]
        if self.method != "merged":
            return self._arranged(slots, num_spare)
        if self._merged_serving is None:
            self._merged_serving = self.bank.arrange(slots[:1], "merged")
        return self._merged_serving

    def _arranged(self, slots: Sequence[int], num_spare: int) -> BatchServing:
        return self.bank.arrange([*slots, *[IDENTITY_SLOT] * num_spare], self.method, num_spare=num_spare)

    # --------------------------------------------------------------------------------------------------------------- run

    def _decode(self, rows: Sequence[Row]) -> None:
        def serving_of(start: int, stop: int) -> BatchServing:
            num_rows, _ = self.cache.step_shape(start, stop - start, 1)
            return self._serving(rows[start:stop], num_rows - (stop - start))

        if self._decode_serving is None:
            self._decode_serving = serving_of(0, len(rows))

        def forward(start: int, stop: int) -> Tensor:
            part = rows[start:stop]
            serving = self._decode_serving if len(part) == len(rows) else serving_of(start, stop)
            tokens, positions = [row.token_ids[-1] for row in part], [row.position for row in part]
            if self.graphs is not None:
                return self.graphs.decode(tokens, positions, self.cache, start, serving)
            self._decode_steps.ran, self._decode_steps.reason = self._decode_steps.ran + 1, NOT_ASKED_FOR
            return self.runner.decode(tokens, positions, self.cache, start, serving)

        outcomes = self._isolate(forward, rows, first=False)
        for row in rows:  # before any leaves: those behind it move, with all that they have cached
            row.position += 1
        for row, outcome in zip(rows, outcomes, strict=True):
            self._take(row, outcome)

    def _prefill(self, chunks: Sequence[Chunk[Row]]) -> None:
        first_row = len(self.scheduler.decoding)
        pieces = [PromptPiece(chunk.item.encoded, chunk.start, chunk.length) for chunk in chunks]
        rows = [chunk.item for chunk in chunks]

        def forward(start: int, stop: int) -> Tensor:
            return self.runner.prefill(pieces[start:stop], self.cache, first_row + start, self._serving(rows[start:stop]))

        outcomes = self._isolate(forward, rows, first=True)
        for chunk in chunks:  # before any leaves: those behind it move, with all that they have cached
            chunk.item.num_prefilled += chunk.length
        for chunk, outcome in zip(chunks, outcomes, strict=True):
            row = chunk.item
            if isinstance(outcome, _Token):
                if not chunk.is_last:
                    continue
                row.position = len(row.encoded.prompt_ids)
                row.forget_clip()
                self.scheduler.prefilled(1)  # the chunks are those of the first that wait for their prefill, in order
                self._decode_serving = None
            self._take(row, outcome)

    def _isolate(self, forward: Callable[[int, int], Tensor], rows: Sequence[Row], first: bool) -> list[_Token | FloraError]:
        """What came of each row. Where the forward of several raises, the halves are tried apart, down to the row at fault."""

        def attempt(start: int, stop: int) -> list[_Token | FloraError]:
            try:
                part = rows[start:stop]
                ids, values = choose_tokens(
                    forward(start, stop),
                    self.vocabulary,
                    first,
                    [row.request.temperature for row in part],
                    [row.sampler for row in part],
                )
                return [
                    _Token(token, value) if math.isfinite(value) else _not_finite(row)
                    for row, token, value in zip(part, ids, values, strict=True)
                ]
            except Exception as error:  # whatever it is, it ends the request it came from, by name, and no other
                if stop - start == 1:
                    logger.warning("a request's forward failed", exc_info=error)
                    return [_forward_error(rows[start], error)]
                # Without the traceback: whoever kept it would keep what the failed forward held.
                what = type(error).__name__
                logger.warning("the forward of %d requests failed (%s): their halves are tried apart", stop - start, what)
            # Out here the error is gone, and with it what the failed forward held: where memory ran out, the halves have it.
            middle = (start + stop) // 2
            return attempt(start, middle) + attempt(middle, stop)

        return attempt(0, len(rows))

    # ------------------------------------------------------------------------------------------------------- postprocess

    def _take(self, row: Row, outcome: _Token | FloraError) -> None:
        """Note a row's next token, or what went wrong; end the row where it is done."""
        if isinstance(outcome, FloraError):
            self.cache.clear(self.running.index(row))
            self.told += self.fail(row, outcome)
            return
        now = time.perf_counter()
        row.first_s = now if row.first_s is None else row.first_s
        is_stop = outcome.token_id in self.vocabulary.stop_ids
        if is_stop and row.text_end is None:
            row.text_end = len(row.token_ids)
        if is_stop and not row.request.ignore_eos:
            self._end(row, "stop")
            return
        row.times.token_s.append(now)  # the stop token is none of the tokens that TPOT counts
        row.token_ids.append(outcome.token_id)
        row.chosen_logits.append(outcome.logit)
        self.counts.tokens += 1
        event = TokenEvent(
            index=row.index,
            token_id=outcome.token_id,
            num_new_tokens=len(row.token_ids),
            stopped=row.text_end is not None,
            _token_ids=tuple(row.token_ids[: row.text_end]),
            _decode=partial(self.vocabulary.text_so_far, row.encoded.prompt_ids),
        )
        self.told.append((row, event))
        if len(row.token_ids) == row.max_new_tokens:
            self._end(row, "length")

    def _end(self, row: Row, reason: str) -> None:
        self._leave(row)
        self.told.append((row, self._finish(row, reason)))

    def _finish(self, row: Row, reason: str) -> FinishEvent | FailEvent:
        times, num_tokens = row.times, len(row.token_ids)
        times.finished_s = time.perf_counter()
        try:
            text = self.vocabulary.text(row.encoded.prompt_ids, row.token_ids)
        except Exception as error:  # a tokenizer that cannot spell this answer spells the others
            logger.warning("a request's text could not be decoded", exc_info=error)
            return self._failed(row, ServingError(f"the tokenizer could not decode the answer ({type(error).__name__}): try again"))
        row.completion = Completion(
            text=text,
            token_ids=list(row.token_ids),
            finish_reason=reason,
            ttft_s=0.0 if row.first_s is None or times.arrival_s is None else row.first_s - times.arrival_s,
            tpot_s=(times.token_s[-1] - times.token_s[0]) / (num_tokens - 1) if num_tokens > 1 else 0.0,
            adapter=row.request.adapter,
        )
        self.counts.cancelled += reason == "cancelled"
        self.counts.finished += reason != "cancelled"
        return FinishEvent(row.index, row.completion)

    def _failed(self, row: Row, error: FloraError) -> FailEvent:
        row.error = error
        row.times.finished_s = time.perf_counter()
        self.counts.failed += 1
        return FailEvent(row.index, error)


@dataclass(frozen=True)
class _Token:
    token_id: int
    logit: float


def _with(row: Row) -> str:
    return "the base model" if row.request.adapter is None else f"adapter {row.request.adapter!r}"


def _forward_error(row: Row, error: Exception) -> FloraError:
    if isinstance(error, FloraError):
        return error
    # A CPU's allocator raises a plain RuntimeError.
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error):
        return ServingError(f"the device's memory did not suffice for a request with {_with(row)}: shorten it, or try again later")
    return ServingError(f"the model failed on this request with {_with(row)} ({type(error).__name__}): try another one")


def _not_finite(row: Row) -> FloraError:
    return ServingError(
        f"with {_with(row)} the model's output is infinite or not a number: the weights do not suit the precision it runs in"
    )
