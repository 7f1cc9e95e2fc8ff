"""What a comparison found: figures by method and kind, and everything that is needed to make it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flora.engine import Agreement
from profiling.events import StepTimed
from profiling.timing import Ratio

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class MethodFigures:
    """What one method did, over all kinds or (in `by_kind`) on one. Times in seconds; None where there was nothing to
    measure.
    """

    method: str
    num_requests: int
    num_new_tokens: int
    tokens_per_s: float | None  # prefill and decode
    decode_tokens_per_s: float | None
    ttft_s: float | None  # median over requests
    tpot_s: float | None  # median over requests
    s_per_token: float | None  # mean over requests
    prepare_s: float  # tokeniser, spectrograms, empty cache: on no clock
    prefill_s: float | None  # median over repeats; of two kinds the sum
    step_quantiles: dict[str, float]  # of a decode step; of two kinds their steps' sum
    ratio_to_first: Ratio | None  # this method's decode step / the first method's; above 1 the first is faster
    ratio_to_base: Ratio | None  # this method's decode step / the bare base model's, where `base` took part
    agreement: Agreement | None  # with every request alone, its adapter merged into the weights; None: not checked
    ranks: tuple[int, ...]  # per request of the batch; 0 for none
    by_kind: dict[str, MethodFigures] = field(default_factory=dict)

    @property
    def agrees(self) -> bool | None:
        """Whether every checked token is the reference's; None where none was checked."""
        return None if self.agreement is None else self.agreement.agrees

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ComparisonResult:
    """All that a comparison found, and all that is needed to make it again."""

    methods: dict[str, MethodFigures]  # in the order given; empty when no request could be measured
    ratio: Ratio | None  # decode step of the second method / of the first, over both kinds; above 1 the first is faster
    ratio_by_kind: dict[str, Ratio | None]
    rows: tuple[dict, ...]  # per request and method: index, kind, adapter, method, text, ttft_s, tpot_s, num_new_tokens, …
    failures: dict[int, str]  # request's index → message
    steps: tuple[StepTimed, ...]
    num_steps: int  # decode steps timed, all repeats together
    warmup_steps: int  # decode steps before the clocks started, per method and kind, besides a prefill
    repeats: int
    seed: int
    stopped: bool
    batch: int  # requests measured
    popularity: str
    peak_memory_bytes: int
    peak_memory_of: str  # what it is the peak of
    environment: dict
    command: str

    def as_dict(self) -> dict:
        """Everything but the single steps, for JSON."""
        shallow = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("steps", "methods")}
        for name in ("ratio", "ratio_by_kind"):
            shallow[name] = _plain(shallow[name])
        return shallow | {"methods": {method: figures.as_dict() for method, figures in self.methods.items()}}

    def to_rows(self) -> list[dict]:
        """One flat record per method and kind ("code", "speech", "all"), each with everything it was measured on."""
        environment = {key: value for key, value in self.environment.items() if key != "models"}
        shared = {
            "warmup_steps": self.warmup_steps,
            "num_steps": self.num_steps,
            "repeats": self.repeats,
            "seed": self.seed,
            "stopped": self.stopped,
            "popularity": self.popularity,
            "peak_memory_bytes": self.peak_memory_bytes,
            "peak_memory_of": self.peak_memory_of,
            "hardware": environment,
            "command": self.command,
        }
        records = []
        for method, figures in self.methods.items():
            for kind, part in {**figures.by_kind, "all": figures}.items():
                facts = _plain(part)
                del facts["by_kind"], facts["method"]
                models = self.environment["models"]
                used = {k: models[k] for k in figures.by_kind if kind in (k, "all")}
                identity = {
                    "method": method,
                    "kind": kind,
                    "batch": facts.pop("num_requests"),
                    "dtype": " + ".join(dict.fromkeys(model["dtype"] for model in used.values())),
                    "models": used,
                }
                records.append(identity | facts | shared)
        return records

    def steps_frame(self) -> pandas.DataFrame:
        """Every timed step: step, repeat, kind, method, phase, seconds, num_new_tokens. What the charts draw."""
        import pandas

        names = [f.name for f in dataclasses.fields(StepTimed)]
        return pandas.DataFrame([dataclasses.asdict(step) for step in self.steps], columns=names)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return {key: _plain(entry) for key, entry in value.items()} if isinstance(value, Mapping) else value
