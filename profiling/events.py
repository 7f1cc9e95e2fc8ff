"""What a measurement tells while it runs: plain data, each with `as_dict()` for JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from profiling.comparison import ComparisonResult


@dataclass(frozen=True)
class Started:
    """The comparison begins. rows: per request {index, kind, adapter, method_errors: method → why that method cannot
    serve it}.
    """

    rows: tuple[dict, ...]
    methods: tuple[str, ...]
    num_steps: int  # the longest request's steps, prefill among them, times the repeats

    def as_dict(self) -> dict:
        return _as_dict(self)


@dataclass(frozen=True)
class Progress:
    """How far a stage is: "warm-up", "prefill", "decode" or "checking"."""

    stage: str
    done: int
    total: int

    def as_dict(self) -> dict:
        return _as_dict(self)


@dataclass(frozen=True)
class HowFar:
    """How far a long measurement is as a whole. words: what is measured now. share: of the measuring that is done, 0 to 1."""

    words: str
    share: float

    def as_dict(self) -> dict:
        return _as_dict(self)


@dataclass(frozen=True)
class StepTimed:
    """One timed forward of one method on one kind of model."""

    step: int  # counts on through the repeats; a repeat's first step of a kind is its prefill
    kind: str
    method: str
    phase: str  # "prefill" or "decode"
    seconds: float
    num_new_tokens: int
    repeat: int = 0

    def as_dict(self) -> dict:
        return _as_dict(self)


@dataclass(frozen=True)
class RowText:
    """What one method has written for one request so far."""

    index: int
    method: str
    text: str
    num_new_tokens: int
    stopped: bool  # the stop token has come: the text is complete, though the measurement goes on

    def as_dict(self) -> dict:
        return _as_dict(self)


@dataclass(frozen=True)
class RowFailed:
    """A request that is not measured, and why, in one sentence."""

    index: int
    message: str

    def as_dict(self) -> dict:
        return _as_dict(self)


@dataclass(frozen=True)
class Finished:
    """The last event."""

    result: ComparisonResult

    def as_dict(self) -> dict:
        return {"event": "Finished", "result": self.result.as_dict()}


CompareEvent = Started | Progress | StepTimed | RowText | RowFailed | Finished


def _as_dict(event: Any) -> dict:
    return {"event": type(event).__name__, **dataclasses.asdict(event)}
