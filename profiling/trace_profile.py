"""What was found in a trace: steps of each method and phase, their kernels, tree, timeline and memory, as JSON and back."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from profiling.categories import CATEGORIES, HOST
from profiling.trace_file import TraceError


@dataclass(frozen=True)
class Kernel:
    """A kernel, or on a CPU an operator, with one set of shapes; times in µs, means over the group's steps."""

    name: str
    category: str
    shapes: str  # of its inputs, such as "8×256 · 256×768"; empty where the trace has none
    calls: float  # per step
    us: float  # per step, all calls together
    where: str  # the kinds of layer that it ran in, such as "attention, MLP"
    product: tuple[int, int, int, int] | None = None  # of a matrix product: batch, rows, inner, columns

    @property
    def mean_us(self) -> float:
        return self.us / self.calls if self.calls else 0.0


@dataclass(frozen=True)
class TreeNode:
    """A range or an operator and what ran within, layers of the same name together. us: per step, with its children."""

    name: str
    category: str  # empty for a range
    us: float
    calls: float
    children: tuple[TreeNode, ...] = ()


@dataclass(frozen=True)
class Lane:
    """One row of the timeline: (start, duration, category, name), µs since the step's start, in order."""

    name: str
    segments: tuple[tuple[float, float, str, str], ...]


@dataclass(frozen=True)
class Memory:
    """What a step took of the allocator. by_op: bytes per step by the operator that asked for them, the largest first."""

    peak_bytes: int  # the most that was allocated at once, beyond what there was at the step's start
    allocated_bytes: float  # per step, freed or not
    allocations: float  # per step
    by_op: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class StepGroup:
    """The steps of one method and phase. method: None in a trace that is not ours."""

    method: str | None
    phase: str
    step_ms: tuple[float, ...]  # each step that counts
    num_held_up: int  # steps that do not
    categories: dict[str, float]  # ms per step, in the order of CATEGORIES; they add up to the mean step
    errors: dict[str, float]  # standard errors of the same means, 0 for a single step
    kernels: tuple[Kernel, ...]  # the most expensive first
    launches: float  # per step: kernels and copies on a GPU, computing operators on a CPU
    host_calls: float | None  # per step: launches as the host made them, fewer with CUDA graphs; None on a CPU
    tree: TreeNode
    lanes: tuple[Lane, ...]
    lane_ms: float  # how long the step of the lanes took: the one in the middle
    memory: Memory | None
    num_kernels_left_out: int = 0

    @property
    def name(self) -> str:
        return self.phase if self.method is None else f"{self.method} {self.phase}"

    @property
    def words(self) -> str:
        """What one of them is called: "decode step", "step", "whole trace"."""
        return self.phase if self.method is None else f"{self.phase} step"

    @property
    def mean_ms(self) -> float:
        return sum(self.step_ms) / len(self.step_ms)

    @property
    def error_ms(self) -> float:
        """The standard error of the mean step."""
        return standard_error(self.step_ms)

    @property
    def busy(self) -> float:
        """The share of a step in which kernels ran."""
        return 1.0 - self.categories.get(HOST, 0.0) / self.mean_ms if self.mean_ms else 0.0


@dataclass(frozen=True)
class TraceProfile:
    """All that was read from a trace. facts: what `profiling.profile_run` wrote into it; empty in a trace that is not ours."""

    device: str  # "cpu" | "gpu": what its kernels ran on
    groups: tuple[StepGroup, ...]
    num_events: int
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def phases(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(group.phase for group in self.groups))

    def of(self, phase: str) -> tuple[StepGroup, ...]:
        """The phase's groups, in the order of their methods."""
        return tuple(group for group in self.groups if group.phase == phase)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> TraceProfile:
        """What `as_dict` made, perhaps by way of JSON."""
        return cls(**{**document, "groups": tuple(map(_group_from_dict, document["groups"]))})


def profile_of_rows(rows: Sequence[Mapping[str, Any]]) -> TraceProfile:
    """What `kernels_report.rows_of` made rows of, and somebody recorded. Raises TraceError for rows that make no sense."""
    try:
        groups = tuple(_group_from_dict(row["group"]) for row in rows)
        device, num_events = rows[0]["kernels_on"], int(rows[0]["num_events"])
        for group in groups:
            sum(group.step_ms) + sum(group.categories[name] + group.errors[name] for name in CATEGORIES)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise TraceError("the recorded rows are none of `python -m profiling kernels --json`") from error
    return TraceProfile(device, groups, num_events, facts_of({"floraLive": dict(rows[0])}))


def _group_from_dict(group: Mapping[str, Any]) -> StepGroup:
    def node(tree: Mapping[str, Any]) -> TreeNode:
        return TreeNode(**{**tree, "children": tuple(map(node, tree["children"]))})

    def kernel(line: Mapping[str, Any]) -> Kernel:
        return Kernel(**{**line, "product": None if line["product"] is None else tuple(line["product"])})

    memory = group["memory"]
    return StepGroup(
        **{
            **group,
            "step_ms": tuple(group["step_ms"]),
            "kernels": tuple(map(kernel, group["kernels"])),
            "tree": node(group["tree"]),
            "lanes": tuple(Lane(lane["name"], tuple(map(tuple, lane["segments"]))) for lane in group["lanes"]),
            "memory": memory and Memory(**{**memory, "by_op": tuple(map(tuple, memory["by_op"]))}),
        }
    )


_FACTS = {"kind": str, "batch": int, "adapters": int, "popularity": str, "prefills": int, "steps": int, "warmup": int}
_FACTS |= {"implementation": str, "captured": bool, "methods": list, "ranks": dict, "plain_ms": dict, "hardware": dict}
_HARDWARE = {"device": str, "device_name": str, "threads": int, "torch": str, "models": dict}


def facts_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """What `profiling.profile_run` wrote beside the events; empty where that is missing, or somebody changed it into nonsense."""
    facts = document.get("floraLive")
    if not _has(facts, _FACTS) or not _has(facts["hardware"], _HARDWARE) or not isinstance(facts.get("command", ""), str):
        return {}
    ranks, plain, models = facts["ranks"], facts["plain_ms"], facts["hardware"]["models"]
    sound = all(isinstance(own, list) and all(isinstance(rank, int) for rank in own) for own in ranks.values())
    sound = sound and all(isinstance(ms, int | float) and -1e18 < ms < 1e18 for ms in plain.values())
    sound = sound and all(_has(model, {"name": str, "dtype": str}) for model in models.values())
    if not sound:
        return {}
    own = json.dumps({name: facts[name] for name in (*_FACTS, "command") if name in facts}, ensure_ascii=False)
    return json.loads(own.encode(errors="replace"))  # half a surrogate pair could be sent to no browser


def _has(value: Any, types: Mapping[str, type]) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in types.items())


# ------------------------------------------------------------------------------------------------------------- figures


def standard_error(values: Sequence[float]) -> float:
    """Of their mean; 0 for one value alone."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
