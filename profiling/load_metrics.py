"""What a load run's requests say: latencies, rates and goodput, as vLLM's `bench serve` defines them.

For a request that was sent at s and whose n new tokens came at t_1 … t_n:
    TTFT       t_1 - s
    TPOT       (t_n - t_1) / (n - 1), of requests with two tokens or more
    ITL        every t_i+1 - t_i, of all requests together
    E2E        t_n - s
    s/token    (t_n - s) / n, the mean over requests: the paper's latency
Throughput is what finished requests asked and got, over the seconds from the run's start to its last answer. Goodput counts the
requests that keep every limit given; a request of one token has TPOT 0 there. Requests that were refused, failed or were cancelled
are counted by name and keep no limit; what they had got is in no figure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flora.errors import RequestError
from profiling.traffic import PlannedRequest

LIMITS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2e": "e2e_s"}  # what goodput may limit → the property that is limited
LIMIT_ALIASES = {"e2el": "e2e"}  # as vLLM calls it
OUTCOMES = ("finished", "refused", "failed", "cancelled", "unanswered")
PERCENTILES = (50, 90, 99)


@dataclass(eq=False)
class Record:
    """One request of one run. Times in seconds after the run's start.

    outcome: one of OUTCOMES; "unanswered" while it runs. error: the class of what it failed with, or was refused by.
    """

    planned: PlannedRequest
    due_s: float
    sent_s: float
    token_s: list[float] = field(default_factory=list)
    ended_s: float | None = None
    outcome: str = "unanswered"
    error: str | None = None
    message: str | None = None

    @property
    def lag_s(self) -> float:
        """How much later than planned it was sent."""
        return self.sent_s - self.due_s

    @property
    def ttft_s(self) -> float | None:
        return self.token_s[0] - self.sent_s if self.token_s else None

    @property
    def e2e_s(self) -> float | None:
        return self.token_s[-1] - self.sent_s if self.token_s else None

    @property
    def tpot_s(self) -> float | None:
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1) if len(self.token_s) > 1 else None

    @property
    def s_per_token(self) -> float | None:
        return self.e2e_s / len(self.token_s) if self.token_s else None

    def keeps(self, limits: Mapping[str, float]) -> bool:
        """Whether it finished within every limit; limits: "ttft", "tpot", "e2e" → seconds."""
        return self.outcome == "finished" and all((getattr(self, LIMITS[name]) or 0.0) <= most for name, most in limits.items())

    def as_row(self) -> dict:
        """Flat facts, for a table with a line per request."""
        planned = self.planned
        return {
            "index": planned.index,
            "kind": planned.kind,
            "adapter": planned.adapter,
            "num_prompt_tokens": planned.num_prompt_tokens,
            "num_new_tokens": len(self.token_s),
            "due_s": self.due_s,
            "sent_s": self.sent_s,
            "ended_s": self.ended_s,
            "outcome": self.outcome,
            "error": self.error,
            "ttft_s": self.ttft_s,
            "tpot_s": self.tpot_s,
            "e2e_s": self.e2e_s,
            "s_per_token": self.s_per_token,
        }


@dataclass(frozen=True)
class Goodput:
    """Requests that kept every limit. limits: name → seconds. share: of all that were sent."""

    limits: dict[str, float]
    num_requests: int
    requests_per_s: float
    share: float


@dataclass(frozen=True)
class LoadFigures:
    """What some requests say together. Summaries are {"mean", "p50", "p90", "p99"} in seconds, empty where nothing was measured."""

    num_requests: int  # sent
    outcomes: dict[str, int]
    errors: dict[str, int]  # by the error's name
    duration_s: float
    num_prompt_tokens: int  # of finished requests
    num_new_tokens: int  # of finished requests
    requests_per_s: float
    tokens_per_s: float  # new ones
    total_tokens_per_s: float  # prompts and new ones
    ttft_s: dict[str, float]
    tpot_s: dict[str, float]
    itl_s: dict[str, float]
    e2e_s: dict[str, float]
    s_per_token: dict[str, float]
    goodput: Goodput | None
    prompt_tokens: dict[str, float]  # per finished request
    new_tokens: dict[str, float]
    lag_s: dict[str, float]  # of sending, behind the plan


def summary(values: Sequence[float]) -> dict[str, float]:
    """{"mean", "p50", "p90", "p99"} of the values; empty without any. Percentiles as NumPy's, by linear interpolation."""
    if not len(values):
        return {}
    percentiles = np.percentile(values, PERCENTILES)
    return {"mean": float(np.mean(values))} | {f"p{p}": float(v) for p, v in zip(PERCENTILES, percentiles, strict=True)}


def figures_of(records: Iterable[Record], duration_s: float, limits: Mapping[str, float] | None = None) -> LoadFigures:
    """The figures of these requests over `duration_s` seconds of load, of all repeats together. limits: of goodput, in seconds."""
    records = list(records)
    finished = [record for record in records if record.outcome == "finished"]
    asked = [record.planned.num_prompt_tokens for record in finished]
    got = [len(record.token_s) for record in finished]
    goodput = None
    if limits:
        good = sum(record.keeps(limits) for record in records)
        goodput = Goodput(dict(limits), good, _rate(good, duration_s), good / len(records) if records else 0.0)

    def of(name: str) -> dict[str, float]:
        return summary([value for record in finished if (value := getattr(record, name)) is not None])

    return LoadFigures(
        num_requests=len(records),
        outcomes=dict(Counter(record.outcome for record in records)),
        errors=dict(Counter(record.error for record in records if record.error)),
        duration_s=duration_s,
        num_prompt_tokens=sum(asked),
        num_new_tokens=sum(got),
        requests_per_s=_rate(len(finished), duration_s),
        tokens_per_s=_rate(sum(got), duration_s),
        total_tokens_per_s=_rate(sum(asked) + sum(got), duration_s),
        ttft_s=of("ttft_s"),
        tpot_s=of("tpot_s"),
        itl_s=summary(np.concatenate([np.diff(record.token_s) for record in finished]) if finished else []),
        e2e_s=of("e2e_s"),
        s_per_token=of("s_per_token"),
        goodput=goodput,
        prompt_tokens=summary(asked),
        new_tokens=summary(got),
        lag_s=summary([record.lag_s for record in records]),
    )


def parse_limits(words: Sequence[str]) -> dict[str, float]:
    """Goodput's limits in seconds, by name, from words such as "ttft:500" in milliseconds; RequestError for anything else."""
    limits: dict[str, float] = {}
    for word in words:
        name, _, most = word.partition(":")
        name = LIMIT_ALIASES.get(name, name)
        if name not in LIMITS or name in limits:
            raise RequestError(f"goodput limits {', '.join(LIMITS)} once each in milliseconds, such as ttft:500, not {word!r}")
        try:
            limits[name] = float(most) / 1000.0
        except ValueError:
            limits[name] = float("nan")
        if not 0 < limits[name] < float("inf"):
            raise RequestError(f"goodput's limit {word!r} needs a number of milliseconds above 0, such as {name}:500")
    return limits


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
