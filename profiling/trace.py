"""What a trace of torch.profiler says about steps: where their time went, which kernels ran, and when. Pure Python, no torch.

Steps of one method and phase form a group, and all its figures are means over its steps; of our own steps, which are all alike,
those that something else on the machine held up are left out. On a CPU a "kernel" is an operator, and its time is its self-time:
without the operators that it calls. What no operator takes is the host's: Python, dispatch. So self-times and the host's gap add up
to the step. On a GPU a kernel is what ran on the device; where two overlap, the time is the first one's, and the gap is the time
without any.
"""

from __future__ import annotations

import bisect
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from profiling.categories import ATTENTION, BMM, CATEGORIES, GEMM, HOST
from profiling.trace_events import LAYER, Events, Instant, Node, Step, read_events
from profiling.trace_profile import Kernel, Lane, Memory, StepGroup, TraceProfile, TreeNode, facts_of, standard_error

MAX_KERNELS = 300  # lines of a group's table; the rest is one line
MAX_NODES = 220  # of a group's tree
MAX_SEGMENTS = 450  # of a lane
HELD_UP = 1.4  # a step of ours that takes so many times the median was held up by something else

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=_)\d+$")
_ALLOCATES = frozenset(f"aten::{name}" for name in ("empty", "empty_strided", "empty_like", "resize_", "new_empty"))


def read_profile(document: Mapping[str, Any]) -> TraceProfile:
    """Work through a trace, as `trace_file.read_trace` returns it. Raises TraceError where it holds no operator and no kernel."""
    events = read_events(document)
    groups = (_group(method, phase, steps, events) for (method, phase), steps in events.steps.items())
    return TraceProfile("gpu" if events.on_gpu else "cpu", tuple(groups), len(document["traceEvents"]), facts_of(document))


def _group(method: str | None, phase: str, steps: Sequence[Step], events: Events) -> StepGroup:
    num_steps, gpu = len(steps), events.on_gpu
    if method is not None:
        usual = statistics.median_low([step.end - step.start for step in steps])
        steps = [step for step in steps if step.end - step.start <= HELD_UP * usual]
    count = len(steps)
    by_step = [dict.fromkeys(CATEGORIES, 0.0) for _ in steps]  # ms
    table: dict[tuple[str, str, str], list[Any]] = {}  # (name, category, shapes) → [calls, µs, places, product]
    tree = _Branch("step")
    launches = host_calls = 0
    for step, categories in zip(steps, by_step, strict=True):
        taken = 0.0
        for work in _work_on_gpu(step) if gpu else _work_on_cpu(step):
            categories[work.category] += work.own_us / 1000.0
            taken += work.own_us
            launches += work.is_launch
            shapes, product = _shapes(work.dims, work.category), _product(work.dims, work.category)
            line = table.setdefault((work.name, work.category, shapes), [0, 0.0, set(), product])
            line[0] += 1
            line[1] += work.us
            line[2].add(_place(work.chain))
            tree.add(work.chain, work.own_us).child(work.name, work.category).count(work.own_us)
        categories[HOST] += (step.end - step.start - taken) / 1000.0
        for node in step.nodes:
            if node.kind == "range":
                on_host = 0.0 if gpu else node.self_us  # on a GPU, a range is as long as its kernels
                tree.add(node.chain(), on_host).calls += 1
        tree.us += step.end - step.start
        if gpu:
            host_calls += sum(node.kind == "call" and "launch" in node.name.lower() for node in step.nodes)
    tree.calls = count
    lines = sorted(table.items(), key=lambda entry: -entry[1][1])
    kernels = [
        Kernel(
            name=name,
            category=category,
            shapes=shapes,
            calls=calls / count,
            us=us / count,
            where=", ".join(sorted(places - {""})),
            product=product,
        )
        for (name, category, shapes), (calls, us, places, product) in lines
    ]
    middle = sorted(steps, key=lambda step: step.end - step.start)[(count - 1) // 2]
    return StepGroup(
        method=method,
        phase=phase,
        step_ms=tuple((step.end - step.start) / 1000.0 for step in steps),
        num_held_up=num_steps - count,
        categories={name: sum(own[name] for own in by_step) / count for name in CATEGORIES},
        errors={name: standard_error([own[name] for own in by_step]) for name in CATEGORIES},
        kernels=tuple(kernels[:MAX_KERNELS]),
        launches=launches / count,
        host_calls=host_calls / count if gpu else None,
        tree=tree.frozen(count),
        lanes=tuple(_lanes(middle, gpu)),
        lane_ms=(middle.end - middle.start) / 1000.0,
        memory=_memory(steps, events.instants),
        num_kernels_left_out=max(0, len(kernels) - MAX_KERNELS),
    )


def _main_thread(step: Step) -> set[int]:
    """The nodes that the step's time is divided among: those of its own thread, by id."""
    if step.node is not None:
        mine: set[int] = {id(step.node)}
        for node in step.nodes:  # in order of start: a parent comes before its children
            if node.parent is not None and id(node.parent) in mine:
                mine.add(id(node))
        return mine
    by_root: dict[int, list[Node]] = {}
    roots = [node for node in step.nodes if node.parent is None]
    # The whole trace is the step: its time is divided among the operators that overlap with no earlier one.
    until = -math.inf
    for node in roots:
        if node.start >= until:
            by_root[id(node)] = [node]
            until = node.end
    mine = set(by_root)
    for node in step.nodes:
        if node.parent is not None and id(node.parent) in mine:
            mine.add(id(node))
    return mine


@dataclass(frozen=True)
class _Work:
    """Something that computed in a step. own_us: of the step's time. chain: the ranges and operators around it, outermost first."""

    name: str
    category: str
    dims: Any
    us: float
    own_us: float
    chain: list[Node]
    is_launch: bool


def _work_on_cpu(step: Step) -> Iterator[_Work]:
    """Its operators, each with its self-time; those of other threads than the step's take nothing of the step's time."""
    main = _main_thread(step)
    for node in step.nodes:
        if node.kind == "op":
            us = max(0.0, node.self_us)
            own_us = us if id(node) in main else 0.0
            yield _Work(node.name, node.category, node.dims, us, own_us, node.chain()[:-1], node.category != HOST)


def _work_on_gpu(step: Step) -> Iterator[_Work]:
    """Its kernels and copies; where two overlap, the step's time is the earlier one's."""
    until = step.start
    for event in step.device:
        end = min(event.end, step.end)
        own_us = max(0.0, end - max(until, event.start))
        until = max(until, end)
        chain = event.launcher.chain() if event.launcher is not None else []
        dims = next((node.dims for node in reversed(chain) if node.dims), None)
        yield _Work(event.name, event.category, dims, event.end - event.start, own_us, chain, True)


def _place(chain: Iterable[Node]) -> str:
    """The kind of layer that something ran in."""
    for node in chain:
        if node.kind == "range" and (found := LAYER.fullmatch(node.name)) is not None:
            return found["kind"]
    return ""


def _shapes(dims: Any, category: str) -> str:
    """The shapes of an operator's inputs, such as "8×1×256 · 256×768"; of attention, which reads more at every step, the first."""
    shapes = []
    for entry in dims if isinstance(dims, list) else ():
        if isinstance(entry, list) and entry and all(isinstance(size, int) for size in entry):
            shapes.append("×".join(map(str, entry[:8])))
        elif isinstance(entry, list) and entry and isinstance(entry[0], list):
            first = "×".join(map(str, entry[0][:8]))
            shapes.append(f"{len(entry)} of {first}" if first else f"a list of {len(entry)}")
    return " · ".join(shapes[: 1 if category == ATTENTION else 4])[:160]


def _product(dims: Any, category: str) -> tuple[int, int, int, int] | None:
    """batch, rows, inner, columns of a matrix product by the shapes of its inputs."""
    if category not in (GEMM, BMM) or not isinstance(dims, list):
        return None
    shapes = [entry for entry in dims if isinstance(entry, list) and entry and all(isinstance(size, int) for size in entry)]
    pairs = [(a, b) for a, b in zip(shapes, shapes[1:], strict=False) if len(a) == len(b) and len(a) in (2, 3) and a[-1] == b[-2]]
    if not pairs:
        return None
    a, b = pairs[-1]
    return (a[0] if len(a) == 3 else 1, a[-2], a[-1], b[-1])


# ---------------------------------------------------------------------------------------------------------------- tree


class _Branch:
    """A node of the tree while it grows."""

    __slots__ = ("name", "category", "us", "calls", "children")

    def __init__(self, name: str, category: str = "") -> None:
        self.name, self.category = name, category
        self.us = self.calls = 0.0
        self.children: dict[str, _Branch] = {}

    def child(self, name: str, category: str) -> _Branch:
        found = self.children.get(name)
        if found is None:
            found = self.children[name] = _Branch(name, category)
        return found

    def add(self, chain: Iterable[Node], us: float) -> _Branch:
        """Time that was spent in these ranges and operators, the outermost first; the branch of the innermost."""
        branch = self
        for node in chain:
            if node.kind != "call":
                branch = branch.child(_shared_name(node), node.category if node.kind == "op" else "")
                branch.us += us
        return branch

    def count(self, us: float) -> None:
        self.us += us
        self.calls += 1

    def frozen(self, num_steps: int) -> TreeNode:
        """As it stays, means over the steps: without branches too small to be seen."""
        least = sorted((branch.us for branch in self._all()), reverse=True)[:MAX_NODES][-1]
        return self._frozen(num_steps, max(least, 1e-9))

    def _all(self) -> Iterator[_Branch]:
        yield self
        for child in self.children.values():
            yield from child._all()

    def _frozen(self, num_steps: int, least_us: float) -> TreeNode:
        kept = sorted((child for child in self.children.values() if child.us >= least_us), key=lambda child: -child.us)
        children = tuple(child._frozen(num_steps, least_us) for child in kept)
        return TreeNode(self.name, self.category, self.us / num_steps, self.calls / num_steps, children)


def _shared_name(node: Node) -> str:
    """The name that layers of the same kind share: `h.0.attn` and `h.1.attn` are `h.*.attn`."""
    return _NUMBER.sub("*", node.name) if node.kind == "range" else node.name


# ------------------------------------------------------------------------------------------------------------ timeline

Segment = tuple[float, float, str, str]


def _lanes(step: Step, gpu: bool) -> Iterator[Lane]:
    """A step on its time axis: layers and what is in them, then what computed."""
    span = step.end - step.start
    outer, inner, whole_ops, leaves = [], [], [], []
    most = _most_of(step)
    for node in step.nodes:
        if node.kind == "call":
            continue
        begin, duration = node.start - step.start, node.end - node.start
        parent_is_step = node.parent is None or (step.node is not None and node.parent is step.node)
        if node.kind == "range":
            (outer if parent_is_step else inner).append((begin, duration, "", node.name))
        elif node.parent is None or node.parent.kind == "range":
            whole_ops.append((begin, duration, most[id(node)], node.name))
    if not gpu:
        leaves = list(_own_time(step))
    for name, segments in (("layers", outer), ("in layers", inner), ("operators", whole_ops), ("innermost", leaves)):
        if segments:
            yield Lane(name, tuple(_thinned(segments, span)))
    streams: dict[str, list[Segment]] = defaultdict(list)
    for event in step.device:
        duration = min(event.end, step.end) - event.start
        streams[event.stream].append((event.start - step.start, duration, event.category, event.name))
    for stream, segments in sorted(streams.items(), key=lambda item: -len(item[1]))[:6]:
        yield Lane(f"GPU stream {stream.partition('.')[2]}", tuple(_thinned(segments, span)))


def _most_of(step: Step) -> dict[int, str]:
    """For each operator that no other called, by id: the category that most of its time went to."""
    spent: dict[int, dict[str, float]] = {}
    outermost: dict[int, int] = {}
    for node in step.nodes:  # in order of start: who calls comes before whom it calls
        if node.kind == "op":
            called = node.parent is not None and node.parent.kind == "op"
            place = outermost[id(node)] = outermost.get(id(node.parent), id(node)) if called else id(node)
            own = spent.setdefault(place, defaultdict(float))
            own[node.category] += node.self_us
    return {place: max(own, key=own.__getitem__) for place, own in spent.items()}


def _own_time(step: Step) -> Iterator[Segment]:
    """The stretches of time that operators spend themselves, not in what they call."""
    children: dict[int, list[Node]] = defaultdict(list)
    ops = [node for node in step.nodes if node.kind == "op"]
    for node in ops:
        if node.parent is not None and node.parent.kind == "op":
            children[id(node.parent)].append(node)
    stretches = []
    for node in ops:
        at = node.start
        for child in children[id(node)]:
            if child.start > at:
                stretches.append((at - step.start, child.start - at, node.category, node.name))
            at = max(at, child.end)
        if node.end > at:
            stretches.append((at - step.start, node.end - at, node.category, node.name))
    yield from sorted(stretches)


def _thinned(segments: Sequence[Segment], span: float) -> Iterator[Segment]:
    """At most MAX_SEGMENTS or so: where there are more, neighbours that are too short to be seen become one stretch, divided among
    their categories."""
    ordered = sorted(segments)
    if len(ordered) <= MAX_SEGMENTS:
        yield from map(_rounded, ordered)
        return
    shortest, waiting = 4 * span / MAX_SEGMENTS, []
    for segment in ordered:
        is_long = segment[1] >= shortest
        if waiting and (is_long or segment[0] - waiting[0][0] >= shortest):
            yield from _as_one(waiting)
            waiting = []
        if is_long:
            yield _rounded(segment)
        else:
            waiting.append(segment)
    yield from _as_one(waiting)


def _as_one(segments: Sequence[Segment]) -> Iterator[Segment]:
    """Neighbours as one stretch, with a piece for each category, the largest first; as long as they took, so gaps come last."""
    if len(segments) < 2:
        yield from map(_rounded, segments)
        return
    by_category: dict[str, list[float]] = defaultdict(list)
    for _, duration, category, _ in segments:
        by_category[category].append(duration)
    at = segments[0][0]
    for category, durations in sorted(by_category.items(), key=lambda item: -sum(item[1])):
        yield _rounded((at, sum(durations), category, f"{len(durations)} short ones together"))
        at += sum(durations)


def _rounded(segment: Segment) -> Segment:
    start, duration, category, name = segment
    return (round(start, 2), round(duration, 2), category, name)


# -------------------------------------------------------------------------------------------------------------- memory


def _memory(steps: Sequence[Step], instants: Sequence[Instant]) -> Memory | None:
    """None where the trace does not tell."""
    if not instants:
        return None
    times = [instant.time for instant in instants]
    peak, allocated, allocations = 0, 0, 0
    by_op: dict[str, int] = defaultdict(int)
    for step in steps:
        first, last = bisect.bisect_left(times, step.start), bisect.bisect_left(times, step.end)
        own = instants[first:last]
        if not own:
            continue
        before = own[0].total - own[0].num_bytes
        peak = max([peak, *(instant.total - before for instant in own)])
        asked = [instant for instant in own if instant.num_bytes > 0]
        allocated += sum(instant.num_bytes for instant in asked)
        allocations += len(asked)
        for instant, name in zip(asked, _askers(step, asked), strict=True):
            by_op[name] += instant.num_bytes
    largest = sorted(by_op.items(), key=lambda item: -item[1])[:12]
    count = len(steps)
    return Memory(peak, allocated / count, allocations / count, tuple((name, num_bytes / count) for name, num_bytes in largest))


def _askers(step: Step, asked: Sequence[Instant]) -> Iterator[str]:
    """For each allocation, the operator that asked for it: the innermost one that does more than allocate."""
    open_nodes: list[Node] = []
    following = iter([node for node in step.nodes if node.kind == "op"])
    node = next(following, None)
    for instant in asked:
        while node is not None and node.start <= instant.time:
            open_nodes.append(node)
            node = next(following, None)
        open_nodes = [one for one in open_nodes if one.end > instant.time]
        yield next((one.name for one in reversed(open_nodes) if one.name not in _ALLOCATES), "outside of operators")
