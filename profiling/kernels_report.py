"""A profile on paper: where steps went, which kernels ran, what wins why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from profiling import kernel_figures as figures
from profiling.categories import CATEGORIES
from profiling.figures import METHOD_STYLES
from profiling.report import Note, Report, Table, TitledChart
from profiling.trace_diff import diff, sentence
from profiling.trace_profile import StepGroup, TraceProfile

_LINES = 25  # kernels of a group on a page; the rows have them all
OPEN_COMMAND = "python -m profiling kernels --open TRACE.json.gz"
"""What reads a trace again that does not say how it was recorded."""


def label(method: str | None) -> str:
    """A method as it is called on paper; the name as it is, where it is none of ours."""
    return "the trace" if method is None else METHOD_STYLES[method].label if method in METHOD_STYLES else method


def note(profile: TraceProfile) -> str:
    """What the numbers are of."""
    if profile.device == "gpu":
        return (
            "Kernels are what ran on the GPU, with their own time; the gap is the time of a step in which none ran. Categories add "
            "up to the step."
        )
    return (
        "On a CPU a kernel is an operator, with its self-time: without the operators that it calls. The gap is what no operator "
        "that computes takes: Python, dispatch, views, allocations. Categories add up to the step."
    )


def conditions(profile: TraceProfile) -> list[str]:
    """Where and how it was measured, part by part."""
    facts = profile.facts
    if not facts:
        return [f"an opened trace of {profile.num_events:,} events, measured elsewhere; it does not say on what"]
    hardware: Mapping[str, Any] = facts["hardware"]
    dtype = " + ".join(dict.fromkeys(model["dtype"] for model in hardware["models"].values()))
    threads = f", {hardware['threads']} thread{'s' if hardware['threads'] != 1 else ''}" if hardware["device"] == "cpu" else ""
    ranks = ", ".join(f"{label(method)} {' + '.join(map(str, own))}" for method, own in facts["ranks"].items() if own)
    parts = [f"{hardware['device_name']}{threads}", f"{dtype}, {facts['implementation']}"]
    parts += ["decode steps captured, as they are served" if facts["captured"] else "decode steps not captured, through each layer"]
    parts += [f"{facts['kind']} model {' + '.join(model['name'] for model in hardware['models'].values())}"]
    parts += [f"batch of {facts['batch']} ({facts['popularity']} adapters{f', rank: {ranks}' if ranks else ''})"]
    parts += [f"{facts['prefills']} prefills and {facts['steps']} decode steps of each method, in turn"]
    parts += [f"{facts['warmup']} warm-up steps before, and again under the profiler", f"torch {hardware['torch']}"]
    if any(group.error_ms > 0.05 * group.mean_ms for group in profile.groups):
        parts.append("the steps differ much from each other: something else uses this machine, so measure again")
    if held_up := sum(group.num_held_up for group in profile.groups):
        parts.append(f"{held_up} step{'s' if held_up > 1 else ''} held up by something else and left out")
    return parts


def summary_table(profile: TraceProfile) -> tuple[list[str], list[list[str]]]:
    """A line per phase and method: step, launches, busy share, ms by category."""
    used = [name for name in CATEGORIES if any(group.categories.get(name, 0) > 0 for group in profile.groups)]
    heads = ["phase", "method", "step ms", "without profiler", "steps", "launches"]
    heads += ["calls of the driver"] if profile.device == "gpu" else []
    heads += ["busy", *used, "peak memory kB"]
    lines = []
    for group in profile.groups:
        plain = profile.facts.get("plain_ms", {}).get(group.name)
        line = [group.phase, label(group.method), f"{group.mean_ms:.2f}", "–" if plain is None else f"{plain:.2f}"]
        line += [str(len(group.step_ms)), f"{group.launches:.4g}"]
        line += [f"{group.host_calls:.4g}"] if profile.device == "gpu" else []
        line += [f"{100 * group.busy:.0f} %", *(f"{group.categories[name]:.2f}" for name in used)]
        lines.append([*line, "–" if group.memory is None else f"{group.memory.peak_bytes / 1000:,.0f}"])
    return heads, lines


def kernel_table(group: StepGroup, num_lines: int | None = None) -> tuple[list[str], list[list[str]]]:
    """A line per kernel and shapes, the most expensive first."""
    heads = ["kernel", "category", "calls/step", "mean µs", "µs/step", "share %", "shapes", "in"]
    lines = [
        [
            kernel.name,
            kernel.category,
            f"{kernel.calls:.4g}",
            f"{kernel.mean_us:.2f}",
            f"{kernel.us:.1f}",
            f"{kernel.us / group.mean_ms / 10:.2f}",
            kernel.shapes,
            kernel.where,
        ]
        for kernel in group.kernels[:num_lines]
    ]
    return heads, lines


def findings(profile: TraceProfile) -> list[str]:
    """A sentence for each phase and each method beside the first."""
    found = []
    for phase in profile.phases:
        groups = profile.of(phase)
        found += [sentence(diff(groups[0], other), label(groups[0].method), label(other.method)) for other in groups[1:]]
    return found


def report_of(profile: TraceProfile) -> Report:
    """All that is said and drawn of a profile."""
    return Report(
        title="kernels, step by step",
        sentences=findings(profile),
        conditions=" · ".join(conditions(profile)),
        parts=list(_parts(profile)),
        environment=profile.facts.get("hardware", {"models": {}}),
        command=profile.facts.get("command", OPEN_COMMAND),
        rows=rows_of(profile),
        left_to_json=frozenset(("group", "hardware", "plain_ms", "methods")),
    )


def _parts(profile: TraceProfile) -> Iterator[Table | TitledChart | Note]:
    yield Table(*summary_table(profile))
    yield Note(note(profile))
    for phase in profile.phases:
        groups = profile.of(phase)
        yield TitledChart(f"Where a {phase} step's time goes", figures.breakdown(groups))
        for other in groups[1:]:
            first, second = label(groups[0].method), label(other.method)
            chart = figures.gains(diff(groups[0], other), first, second)
            yield TitledChart(f"Won and lost, {phase}: {first} beside {second}", chart)
        yield TitledChart(f"One {phase} step on its time axis", figures.timeline(groups))
        for group in groups:
            yield TitledChart(f"What calls what: {label(group.method)}, {phase}", figures.icicle(group))
            yield Table(*kernel_table(group, _LINES), title=f"Kernels: {label(group.method)}, {phase}", detail=True)


def rows_of(profile: TraceProfile) -> list[dict[str, Any]]:
    """A record per phase and method: all that was found, and all that it was measured on. `profile_of_rows` reads them."""
    return [
        {
            "method": group.method,
            "phase": group.phase,
            "step_ms": group.mean_ms,
            "plain_step_ms": profile.facts.get("plain_ms", {}).get(group.name),
            "num_steps": len(group.step_ms),
            "num_held_up": group.num_held_up,
            "categories_ms": group.categories,
            "standard_errors_ms": group.errors,
            "launches": group.launches,
            "host_calls": group.host_calls,
            "busy": group.busy,
            "peak_memory_bytes": group.memory and group.memory.peak_bytes,
            "group": asdict(group),
            "kernels_on": profile.device,
            "num_events": profile.num_events,
        }
        | profile.facts
        for group in profile.groups
    ]
