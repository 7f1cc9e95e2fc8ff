"""The events of a trace, sorted out: operators and ranges in each other, steps, and each kernel with what launched it.

A step is a range that `profiling.profile_run` named, else one of torch.profiler's own (`ProfilerStep#3`), else the whole trace.
Times are µs, as in the file.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from profiling.categories import ATTENTION, HOST, category_of_kernel, category_of_op
from profiling.trace_file import TraceError

MAX_EVENTS = 2_000_000
MAX_GROUPS = 40  # of steps: methods times phases
MAX_DEPTH = 100  # of operators in each other; what is deeper counts as its caller's own

STEP = re.compile(r"step \| (?P<method>[^|]{1,60}) \| (?P<phase>[^|]{1,60})")
"""The name of a step's range."""

LAYER = re.compile(r"(?P<kind>attention|MLP|norm|embedding|convolution|output head) \| (?P<name>.{1,200})", re.DOTALL)
"""The name of a layer's range."""

_PROFILER_STEP = re.compile(r"ProfilerStep#\d+")
_MODULE = "nn.Module: "
_DEVICE = frozenset(("kernel", "gpu_memcpy", "gpu_memset", "memcpy", "memset"))
_CALLS = frozenset(("cuda_runtime", "cuda_driver", "runtime", "hip_runtime"))
_MAX_NAME = 240
_MAX_NUMBER = 1e18  # of µs, which are counted from 1970, or of bytes


class Node:
    """An operator, a range or a call of the driver on a thread, with what it is nested in. Times in µs."""

    __slots__ = ("name", "kind", "start", "end", "parent", "nested_us", "category", "dims", "step", "correlation")

    def __init__(self, name: str, kind: str, start: float, end: float, args: Mapping[str, Any]) -> None:
        self.name, self.kind, self.start, self.end = name, kind, start, end  # kind: op | range | call
        self.parent: Node | None = None
        self.nested_us = 0.0  # of its direct children
        self.category = category_of_op(name) if kind == "op" else HOST
        self.dims = args.get("Input Dims", args.get("Input dims")) if kind == "op" else None
        self.step: Step | None = None
        self.correlation = _correlation(args) if kind == "call" else None

    @property
    def self_us(self) -> float:
        return self.end - self.start - self.nested_us

    def chain(self) -> list[Node]:
        """Itself and what it is nested in up to its step, the outermost first."""
        chain, node = [], self
        while node is not None and not (node.step is not None and node is node.step.node):
            chain.append(node)
            node = node.parent
        return chain[::-1]


class Step:
    """One step: its range, and what belongs to it."""

    __slots__ = ("node", "start", "end", "nodes", "device")

    def __init__(self, node: Node | None, start: float, end: float) -> None:
        self.node, self.start, self.end = node, start, end
        self.nodes: list[Node] = []  # in order of their start, of all threads
        self.device: list[DeviceEvent] = []  # in order of their start


class DeviceEvent:
    """A kernel or a copy on a GPU. launcher: the operator that it was launched in, where that is known."""

    __slots__ = ("name", "start", "end", "stream", "correlation", "category", "launcher")

    def __init__(self, name: str, start: float, end: float, args: Mapping[str, Any]) -> None:
        self.name, self.start, self.end = name, start, end
        self.stream = f"{args.get('device', 0)}.{args.get('stream', 0)}"[:40].encode(errors="replace").decode()
        self.correlation = _correlation(args)
        self.category = ""
        self.launcher: Node | None = None


class Instant:
    """A change of what is allocated. total: after it."""

    __slots__ = ("time", "thread", "total", "num_bytes")

    def __init__(self, time: float, thread: tuple, total: int, num_bytes: int) -> None:
        self.time, self.thread, self.total, self.num_bytes = time, thread, total, num_bytes


@dataclass(frozen=True)
class Events:
    """A trace's steps with all that is in them, by method (None in a trace that is not ours) and phase, each in order of time."""

    steps: dict[tuple[str | None, str], list[Step]]
    instants: list[Instant]  # of the memory where the kernels ran, in order of time
    on_gpu: bool


def read_events(document: Mapping[str, Any]) -> Events:
    """Sort out a trace, as `trace_file.read_trace` returns it. Raises TraceError where it holds no operator and no kernel."""
    events = document["traceEvents"]
    if len(events) > MAX_EVENTS:
        raise TraceError(f"the trace has {len(events):,} events, more than {MAX_EVENTS:,}: record fewer steps")
    threads, device, instants = _sorted_out(events)
    if not device and not any(node.kind == "op" for nodes in threads.values() for node in nodes):
        raise TraceError("the trace holds no operator and no kernel: profile a step that runs, with CPU or CUDA activities")
    threads = {thread: _nested(nodes) for thread, nodes in threads.items()}
    steps = _steps(threads, device)
    _give_to_steps(threads, steps, device)
    return Events(steps, instants, bool(device))


def _sorted_out(
    events: Sequence[Any],
) -> tuple[dict[tuple, list[Node]], list[DeviceEvent], list[Instant]]:
    """Nodes by thread, device events and changes of memory, each in order of time; anything that makes no sense is left out."""
    threads: dict[tuple, list[Node]] = defaultdict(list)
    device: list[DeviceEvent] = []
    instants: dict[Any, list[Instant]] = defaultdict(list)
    for event in events:
        if not isinstance(event, dict):
            continue
        phase, name, start = event.get("ph"), event.get("name"), event.get("ts")
        if phase not in ("X", "i") or not isinstance(name, str) or not _is_time(start):
            continue
        args = event.get("args")
        args = args if isinstance(args, dict) else {}
        thread = (str(event.get("pid")), str(event.get("tid")))
        if phase == "i":
            total, num_bytes = args.get("Total Allocated"), args.get("Bytes")
            if name == "[memory]" and _is_time(total) and _is_time(num_bytes):
                instants[args.get("Device Type") == 1].append(Instant(start, thread, int(total), int(num_bytes)))
            continue
        duration, category = event.get("dur"), str(event.get("cat", "")).lower()
        if not _is_time(duration) or duration < 0:
            continue
        name = name[:_MAX_NAME].encode(errors="replace").decode()  # half a surrogate pair could be sent to no browser
        if category in _DEVICE:
            device.append(DeviceEvent(name, start, start + duration, args))
        elif category in ("cpu_op", "operator", "user_annotation") or (category == "python_function" and name.startswith(_MODULE)):
            is_op = category in ("cpu_op", "operator") and "::" in name and not LAYER.fullmatch(name)
            threads[thread].append(Node(name, "op" if is_op else "range", start, start + duration, args))
        elif category in _CALLS:
            threads[thread].append(Node(name, "call", start, start + duration, args))
    device.sort(key=lambda event: event.start)
    own = instants[bool(device)]
    own.sort(key=lambda instant: instant.time)
    return dict(threads), device, own


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MAX_NUMBER <= value <= _MAX_NUMBER


def _correlation(args: Mapping[str, Any]) -> int | str | None:
    """What a kernel and the call that launched it share."""
    value = args.get("correlation")
    return value if isinstance(value, int | str) else None


def _nested(nodes: list[Node]) -> list[Node]:
    """A thread's nodes in order and put into each other, down to MAX_DEPTH. One that ends after what it began in, by rounding, ends
    with it."""
    nodes.sort(key=lambda node: (node.start, -node.end))
    open_nodes: list[Node] = []
    kept: list[Node] = []
    for node in nodes:
        while open_nodes and open_nodes[-1].end <= node.start:
            open_nodes.pop()
        if len(open_nodes) == MAX_DEPTH:
            continue
        if open_nodes:
            node.parent = parent = open_nodes[-1]
            node.end = min(node.end, parent.end)
            if node.kind != "call":  # what the driver does belongs to the operator that asked for it
                parent.nested_us += node.end - node.start
            if parent.category == ATTENTION and node.kind == "op" and node.category != HOST:
                node.category = ATTENTION
        open_nodes.append(node)
        kept.append(node)
    return kept


def _steps(
    threads: Mapping[tuple, list[Node]], device: Sequence[DeviceEvent]
) -> dict[tuple[str | None, str], list[Step]]:
    """(method, phase) → steps, in order of time: our own ranges, else the profiler's, else everything as one."""
    ranges = sorted((node for nodes in threads.values() for node in nodes if node.kind == "range"), key=lambda node: node.start)
    steps: dict[tuple[str | None, str], list[Step]] = defaultdict(list)
    for node in ranges:
        if (found := STEP.fullmatch(node.name)) is not None:
            steps[found["method"], found["phase"]].append(Step(node, node.start, node.end))
    if len(steps) > MAX_GROUPS:
        raise TraceError(f"the trace has steps of {len(steps):,} methods and phases, more than {MAX_GROUPS}: record fewer")
    if not steps:
        for node in ranges:
            if _PROFILER_STEP.fullmatch(node.name):
                steps[None, "step"].append(Step(node, node.start, node.end))
    if not steps:
        spans: list[Node | DeviceEvent] = [node for nodes in threads.values() for node in nodes]
        spans += device
        whole = Step(None, min(span.start for span in spans), max(span.end for span in spans))
        steps[None, "whole trace"].append(whole)
    return {key: [step for step in own if step.end > step.start] or own for key, own in steps.items()}


def _give_to_steps(
    threads: Mapping[tuple, list[Node]],
    steps: Mapping[tuple, Sequence[Step]],
    device: Sequence[DeviceEvent],
) -> None:
    """Each node and each kernel to the step that it began in, and each kernel to the operator that launched it."""
    ordered = sorted((step for own in steps.values() for step in own), key=lambda step: step.start)
    starts = [step.start for step in ordered]

    def step_at(time: float) -> Step | None:
        place = bisect.bisect_right(starts, time) - 1
        return ordered[place] if place >= 0 and time < ordered[place].end else None

    launchers: dict[Any, Node] = {}
    for nodes in threads.values():
        for node in nodes:
            node.step = step_at(node.start)
            if node.kind == "call":
                if node.correlation is not None:
                    launchers[node.correlation] = node
            if node.step is not None and node is not node.step.node:
                node.step.nodes.append(node)
    for step in ordered:
        step.nodes.sort(key=lambda node: node.start)
    for event in device:
        call = launchers.get(event.correlation) if event.correlation is not None else None
        event.launcher = call.parent if call is not None else None
        while event.launcher is not None and event.launcher.kind == "call":
            event.launcher = event.launcher.parent
        known = _launching_category(event.launcher)
        event.category = category_of_kernel(event.name, known)
        step = step_at(event.start)
        if step is not None:
            step.device.append(event)


def _launching_category(node: Node | None) -> str | None:
    """The category of the operator that launched a kernel: of the nearest one that does more than call others."""
    while node is not None and node.kind == "op":
        if node.category != HOST:
            return node.category
        node = node.parent
    return None
