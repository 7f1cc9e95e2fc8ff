"""A batch on its way from prompts to completions: every `step` is one forward for all of its rows, then the postprocessing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from flora.bank import AdapterBank
from flora.engine.request import Completion, FinishEvent, Request, TokenEvent
from flora.engine.runner import EncodedRequest, Runner, State

Event = TokenEvent | FinishEvent

CONTEXT_TOKENS = 5
"""How many of the prompt's tokens the new ones are decoded behind: one would do, were it not for tokens that show nothing."""


@dataclass(frozen=True)
class Vocabulary:
    """The model's special tokens and how its tokens become text."""

    stop_ids: frozenset[int]
    suppressed: tuple[int, ...]  # never chosen
    suppressed_at_begin: tuple[int, ...]  # not chosen as the first new token
    decode: Callable[[Sequence[int]], str]

    def text(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """The text of the tokens after a prompt.

        They are decoded behind the prompt's last tokens, since some tokenizers (Llama-2's) drop the space that a text begins with.
        """
        context = [*prompt_ids[-CONTEXT_TOKENS:]]
        before, whole = self.decode(context), self.decode([*context, *token_ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode(token_ids)

    def text_so_far(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """`text`, without a last character of which not all bytes have come."""
        return self.text(prompt_ids, token_ids).rstrip("\ufffd")


@dataclass
class Row:
    """One request in a running batch."""

    index: int
    request: Request
    encoded: EncodedRequest
    max_new_tokens: int  # the request's own, or what the context has room for
    sampler: torch.Generator | None
    token_ids: list[int] = field(default_factory=list)
    chosen_logits: list[float] = field(default_factory=list)
    text_end: int | None = None  # number of tokens before the first stop token
    position: int = 0  # of the next token to write
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    completion: Completion | None = None


class Generation(Protocol):
    """A running batch. `step` until `done`; then `completions`. `cancel` ends rows early, `close` gives everything back."""

    done: bool
    phase: str

    def step(self) -> list[Event]: ...
    def cancel(self, index: int | None = None) -> list[Event]: ...
    def close(self) -> None: ...

    @property
    def completions(self) -> list[Completion]: ...
    @property
    def chosen_logits(self) -> list[list[float]]: ...


class BatchGeneration:
    """One forward per step for the whole batch, whatever its adapters.

    Rows that are done stay in the batch, computed and ignored, until half of it is done; then the cache is compacted.
    """

    def __init__(self, runner: Runner, bank: AdapterBank, vocabulary: Vocabulary, rows: list[Row], method: str) -> None:
        self.runner, self.bank, self.vocabulary, self.method = runner, bank, vocabulary, method
        self.rows = rows
        self._running = list(rows)  # the rows of the batch as the model sees it, in order
        self._serving = bank.serving([row.request.adapter for row in rows], method)
        self._state: State | None = None
        self._tokens: Tensor | None = None  # (n,) the tokens to feed next
        self._started_s: float | None = None

    @property
    def done(self) -> bool:
        return all(row.completion is not None for row in self.rows)

    @property
    def phase(self) -> str:
        """Of the next step: "prefill" or "decode"."""
        return "prefill" if self._state is None else "decode"

    @property
    def completions(self) -> list[Completion]:
        return [row.completion for row in self.rows if row.completion is not None]

    @property
    def chosen_logits(self) -> list[list[float]]:
        return [row.chosen_logits for row in self.rows]

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Run one forward and hand out a token per running row. The first step is the prefill and gives the first tokens."""
        if self.done:
            return []
        if self._state is None:
            self._started_s = time.perf_counter()
            logits = self._prefill()
        else:
            self._compact()
            positions = torch.tensor([row.position for row in self._running], device=self.runner.device)
            width = max(row.position for row in self._running) + 1
            logits = self.runner.decode(self._tokens, positions, width, self._state, self._serving)
            for row in self._running:
                row.position += row.completion is None  # a row that is done writes over its last token
        events = self._postprocess(logits)
        if self.done:
            self.close()
        return events

    def _prefill(self) -> Tensor:
        capacity = max(len(row.encoded.prompt_ids) + row.max_new_tokens for row in self.rows)
        logits, self._state, lengths = self.runner.prefill([row.encoded for row in self.rows], self._serving, capacity)
        for row, length in zip(self.rows, lengths, strict=True):
            row.position = length
        return logits

    def _compact(self) -> None:
        kept = [place for place, row in enumerate(self._running) if row.completion is None]
        if len(kept) > len(self._running) // 2:
            return
        places = torch.tensor(kept, device=self.runner.device)
        self._state.select(places)
        self._tokens = self._tokens[places]
        self._running = [self._running[place] for place in kept]
        self._serving = self.bank.narrow(self._serving, kept)

    def _postprocess(self, logits: Tensor) -> list[Event]:
        """Choose a token for each running row from logits (n, vocabulary), note it, and end the rows that are done."""
        first = not any(row.token_ids for row in self._running)
        logits = masked_logits(logits.float(), self.vocabulary, first)
        values, tokens = logits.max(-1)
        for place, row in enumerate(self._running):
            if row.sampler is not None and row.completion is None:
                below_best = (logits[place] - values[place]).cpu().double()  # at most 0: no temperature, however low, overflows
                probabilities = torch.softmax(below_best / row.request.temperature, -1)
                tokens[place] = torch.multinomial(probabilities, 1, generator=row.sampler).item()
                values[place] = logits[place, tokens[place]]
        self._tokens = tokens
        now, events = time.perf_counter(), []
        for row, token, value in zip(self._running, tokens.tolist(), values.tolist(), strict=True):
            if row.completion is None:
                events += self._take(row, token, value, now)
        return events

    def _take(self, row: Row, token: int, value: float, now: float) -> list[Event]:
        row.first_token_s = row.first_token_s or now
        is_stop = token in self.vocabulary.stop_ids
        if is_stop and row.text_end is None:
            row.text_end = len(row.token_ids)
        if is_stop and not row.request.ignore_eos:
            return [self._finish(row, "stop")]
        row.last_token_s = now  # the stop token is none of the tokens that TPOT counts
        row.token_ids.append(token)
        row.chosen_logits.append(value)
        events: list[Event] = [
            TokenEvent(
                index=row.index,
                token_id=token,
                num_new_tokens=len(row.token_ids),
                stopped=row.text_end is not None,
                _token_ids=tuple(row.token_ids[: row.text_end]),
                _decode=partial(self.vocabulary.text_so_far, row.encoded.prompt_ids),
            )
        ]
        if len(row.token_ids) == row.max_new_tokens:
            events.append(self._finish(row, "length"))
        return events

    def _finish(self, row: Row, reason: str) -> FinishEvent:
        num_tokens = len(row.token_ids)
        started = self._started_s if self._started_s is not None else row.first_token_s
        row.completion = Completion(
            text=self.vocabulary.text(row.encoded.prompt_ids, row.token_ids),
            token_ids=list(row.token_ids),
            finish_reason=reason,
            ttft_s=row.first_token_s - started if row.first_token_s else 0.0,
            tpot_s=(row.last_token_s - row.first_token_s) / (num_tokens - 1) if num_tokens > 1 else 0.0,
            adapter=row.request.adapter,
        )
        return FinishEvent(row.index, row.completion)

    def cancel(self, index: int | None = None) -> list[Event]:
        """End one row, or all that still run, as "cancelled", with the tokens they have."""
        rows = [row for row in self.rows if row.completion is None and index in (None, row.index)]
        events: list[Event] = [self._finish(row, "cancelled") for row in rows]
        if self.done:
            self.close()
        return events

    def close(self) -> None:
        """Give the adapters' slots and the cache back. Called by itself when the batch is done; calling it again does nothing."""
        if self._serving is not None:
            self.bank.release(self._serving)
            self._serving = None
        self._state = self._state and State(cache=None)
        self._tokens = None


class SequentialGeneration:
    """Groups of one adapter each, with the weights merged: every step runs each group's forward, one after another.

    That is what serving merged weights costs when several adapters are wanted at once: one forward per adapter and step.
    """

    def __init__(self, groups: list[BatchGeneration]) -> None:
        self.groups = groups

    @property
    def done(self) -> bool:
        return all(group.done for group in self.groups)

    @property
    def phase(self) -> str:
        """Of the next step; groups that were cancelled before their prefill do not count."""
        return next((group.phase for group in self.groups if not group.done), "decode")

    @property
    def completions(self) -> list[Completion]:
        return [row.completion for row in self._rows() if row.completion is not None]

    @property
    def chosen_logits(self) -> list[list[float]]:
        return [row.chosen_logits for row in self._rows()]

    def _rows(self) -> list[Row]:
        return sorted((row for group in self.groups for row in group.rows), key=lambda row: row.index)

    def step(self) -> list[Event]:
        return [event for group in self.groups for event in group.step()]

    def cancel(self, index: int | None = None) -> list[Event]:
        return [event for group in self.groups for event in group.cancel(index)]

    def close(self) -> None:
        for group in self.groups:
            group.close()


def masked_logits(logits: Tensor, vocabulary: Vocabulary, first: bool) -> Tensor:
    """The model's own suppressions (Whisper's generation configuration): those tokens cannot be chosen. logits: (n, vocabulary)."""
    suppressed = vocabulary.suppressed + (vocabulary.suppressed_at_begin if first else ())
    if suppressed:
        logits = logits.clone()
        logits[:, list(suppressed)] = float("-inf")
    return logits
