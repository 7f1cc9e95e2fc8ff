"""What goes into the engine and what comes out: Request, the events of a running batch, Completion. Plain data, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flora.errors import FloraError, RequestError

LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000
"""Sampling rates in Hz outside of which no recorder works: a wrong number, which would squeeze or stretch the clip to nothing."""


@dataclass(frozen=True)
class Request:
    """One user's request: a prompt for a code model, or a clip for a speech model, and the adapter that should answer it.

    audio: mono samples, a one-dimensional float array. sampling_rate: Hz. adapter: a tag the engine holds, None for the base model.
    max_new_tokens: the request ends earlier where the model's context is full. temperature: 0 is greedy.
    ignore_eos: go on after the stop token, so that methods can be compared over the same number of tokens.
    """

    prompt: str | None = None
    audio: Any = None
    sampling_rate: int | None = None
    adapter: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.audio is None):
            raise RequestError("a request needs either a prompt or audio, and not both")
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise RequestError(f"the prompt must be text, not {type(self.prompt).__name__}")
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise RequestError(f"the adapter must be a tag or None, not {type(self.adapter).__name__}")
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens must be a whole number of at least 1, not {self.max_new_tokens!r}")
        if not isinstance(self.temperature, int | float) or not math.isfinite(self.temperature) or self.temperature < 0:
            raise RequestError(f"temperature must be a finite number of at least 0, not {self.temperature!r}")
        if self.sampling_rate is not None and (
            not isinstance(self.sampling_rate, int) or not LOWEST_RATE <= self.sampling_rate <= HIGHEST_RATE
        ):
            raise RequestError(
                f"sampling_rate must be a whole number of Hz from {LOWEST_RATE} to {HIGHEST_RATE}, not {self.sampling_rate!r}"
            )


@dataclass(frozen=True)
class Completion:
    """A request's answer.

    token_ids: the new tokens only, the stop token left out. finish_reason: "stop" (the model's stop token came), "length"
    (max_new_tokens reached, or the context is full) or "cancelled". ttft_s: seconds to the first token, from when the request was
    submitted, or, in a batch of its caller's own, from the batch's first step. tpot_s: mean seconds per further token, 0 with fewer
    than two tokens.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    ttft_s: float
    tpot_s: float
    adapter: str | None


@dataclass(frozen=True)
class TokenEvent:
    """One more token of one request.

    index: the request's place in its list. stopped: the stop token has come, now or, with ignore_eos, before.
    text: all of the request's text so far, up to its stop; decoded when asked for.
    """

    index: int
    token_id: int
    num_new_tokens: int
    stopped: bool
    _token_ids: tuple[int, ...] = field(repr=False)
    _decode: Callable[[tuple[int, ...]], str] = field(repr=False, compare=False)

    @property
    def text(self) -> str:
        return self._decode(self._token_ids)


@dataclass(frozen=True)
class FinishEvent:
    """A request is done."""

    index: int
    completion: Completion


@dataclass(frozen=True)
class FailEvent:
    """A request has failed, and by what; the others go on."""

    index: int
    error: FloraError


Event = TokenEvent | FinishEvent | FailEvent
