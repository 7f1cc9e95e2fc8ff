"""What the *Kernels* tab says and draws of a profile: values of its live components. Pure Python, all text escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from profiling import kernel_figures as figures
from profiling.categories import HOST
from profiling.dashboard.live_cells import cells_value
from profiling.dashboard.live_plot import plot_value
from profiling.dashboard.sortable_table import Column, table_value
from profiling.figures import METHOD_STYLES, Chart
from profiling.kernels_report import conditions, label, note
from profiling.trace_diff import Change, TraceDiff, diff, sentence
from profiling.trace_profile import StepGroup, TraceProfile

CHARTS = ("breakdown", "gains", "timeline", "tree")
_NOTHING = "–"
_LISTED = 9  # kernels of each side of the diff
_BLANK = {"data": [], "layout": {}}

COLUMNS = (
    Column("kernel", "the operator on a CPU, the kernel on a GPU"),
    Column("method"),
    Column("category", choose=True, swatches=figures.CATEGORY_COLOURS),
    Column("calls", "calls per step", digits=2),
    Column("mean µs", "of one call; on a CPU its self-time", digits=2),
    Column("µs/step", "all calls of a step together", digits=1),
    Column("share %", "of the mean step", digits=2),
    Column("shapes", "of its inputs"),
    Column("in", "kinds of layer that it ran in"),
)


def method_label(method: str | None) -> str:
    """The method's name with its colour, where it is one of ours."""
    name = html.escape(label(method))
    style = METHOD_STYLES.get(method or "")
    return name if style is None else f'<span class="swatch" style="--accent: {style.colour}"></span>{name}'


# ------------------------------------------------------------------------------------------------------------ headline

HEADLINE_TEMPLATE = (
    '<p class="kernels-finding" data-cell="finding" role="status"></p>'
    '<div class="wide" data-cell="table" tabindex="0" role="region" aria-label="steps of each method"></div>'
    '<div class="facts kernels-facts" data-cell="facts"></div>'
)


def blank_headline() -> dict[str, Any]:
    words = (
        "Profile steps of two methods, or open a trace: which kernels run, how long, and what one method launches instead of the "
        "other. It runs in a process of its own, so that nobody else's numbers are slowed by the profiler."
    )
    return cells_value({"finding": html.escape(words), "table": "", "facts": ""}, {"finding": "kernels-finding nothing"})


def headline(profile: TraceProfile, phase: str, source: str) -> dict[str, Any]:
    """What wins here and why; steps, launches and memory of each method; on what. source: live, recorded or opened."""
    groups = profile.of(phase)
    sentences = [sentence(diff(groups[0], other), label(groups[0].method), label(other.method)) for other in groups[1:]]
    if not sentences:
        group = groups[0]
        top = group.kernels[0] if group.kernels else None
        most = f"; most of it goes to {top.name} ({top.us / 1000:.2f} ms)" if top else ""
        sentences = [f"The {group.words} takes {group.mean_ms:.2f} ms, {100 * group.busy:.0f} % of it computing{most}."]
    facts = " · ".join([source, *conditions(profile)])
    return cells_value(
        {
            "finding": "<br>".join(html.escape(words) for words in sentences),
            "table": _steps_table(profile, groups),
            "facts": f"{html.escape(facts)}.<br>{html.escape(note(profile))}",
        },
        {"finding": "kernels-finding"},
    )


def _steps_table(profile: TraceProfile, groups: Sequence[StepGroup]) -> str:
    gpu = profile.device == "gpu"
    launches = "kernels and copies on the GPU" if gpu else "operators that compute"
    heads = [
        ("method", ""),
        ("step", "mean of the steps that count, with its standard error, under the profiler"),
        ("without profiler", "the median of as many steps, timed just before the profiler was on"),
        ("launches", f"per step: {launches}"),
        *([("driver calls", "launches as the host made them, fewer with CUDA graphs")] if gpu else []),
        ("GPU busy" if gpu else "computing", "share of the step in which kernels run"),
        ("peak memory", "the most that a step allocated at once, beyond what there was at its start"),
        ("asked of the allocator", "per step, whether freed or not, and the operators that asked for most"),
    ]
    head = "".join(f'<th scope="col"><abbr title="{html.escape(title)}">{words}</abbr></th>' for words, title in heads)
    body = ""
    for group in groups:
        plain = profile.facts.get("plain_ms", {}).get(group.name)
        error = f" <small>± {group.error_ms:.2f}</small>" if len(group.step_ms) > 1 else ""
        cells = [f"{group.mean_ms:.2f} ms{error}", _NOTHING if plain is None else f"{plain:.2f} ms", _count(group.launches)]
        cells += [_count(group.host_calls)] if gpu else []
        cells += [f"{100 * group.busy:.0f} %", *_memory_cells(group)]
        body += f'<tr><th scope="row">{method_label(group.method)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
    return f'<table class="figures steps"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def _memory_cells(group: StepGroup) -> list[str]:
    if group.memory is None:
        return [_NOTHING, _NOTHING]
    largest = ", ".join(f"{name.removeprefix('aten::')} {num_bytes(size)}" for name, size in group.memory.by_op[:3])
    asked = f"{num_bytes(group.memory.allocated_bytes)} <small>{html.escape(largest)}</small>"
    return [num_bytes(group.memory.peak_bytes), asked]


def num_bytes(count: float) -> str:
    """Bytes as "1.2 MB"."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


RECORDED_TEMPLATE = '<p class="load-note" data-cell="words" role="status"></p>'


def recorded_words(words: str) -> dict[str, Any]:
    """Why a recording cannot be shown; empty where it is."""
    return cells_value({"words": html.escape(words)})


# -------------------------------------------------------------------------------------------------------------- charts


def blank_plot(words: str = "Nothing is drawn yet.") -> dict[str, Any]:
    return plot_value(_BLANK, words, [])


def charts(profile: TraceProfile, phase: str, method: str | None, other: str | None, number: int) -> dict[str, dict[str, Any]]:
    """By name of CHARTS. method: whose tree is drawn; that of the first where it has none. other: which the first is compared with;
    the second where it is none of them. number: of what is shown, with which the visitor's zoom goes."""
    groups = profile.of(phase)
    tree = next((group for group in groups if group.method == method), groups[0])
    found = {
        "breakdown": _plot(figures.breakdown(groups), number, figures.breakdown_table(groups)),
        "timeline": _plot(figures.timeline(groups), number, figures.timeline_table(groups)),
        "tree": _plot(figures.icicle(tree), number, figures.tree_table(tree)),
    }
    if len(groups) > 1:
        second = _other(groups, other)
        chart = figures.gains(diff(groups[0], second), label(groups[0].method), label(second.method))
        found["gains"] = _plot(chart, f"{number} {second.method}")
    else:
        found["gains"] = blank_plot("There is one group of steps alone, so nothing to compare it with.")
    return found


def _other(groups: Sequence[StepGroup], method: str | None) -> StepGroup:
    """The group that the first one is compared with."""
    return next((group for group in groups[1:] if group.method == method), groups[1])


def _plot(chart: Chart, number: int | str, table: Sequence[Sequence[Any]] | None = None) -> dict[str, Any]:
    layout = {key: value for key, value in chart.figure["layout"].items() if key not in ("height", "font")}
    layout["uirevision"] = f"{number} {layout['uirevision']}"
    return plot_value({"data": chart.figure["data"], "layout": layout}, chart.description, table)


# ---------------------------------------------------------------------------------------------------------------- diff

DIFF_TEMPLATE = (
    '<div class="kernels-diff" data-cell="diff"><section><h3 data-cell="instead_head"></h3><div class="wide" data-cell="instead">'
    '</div></section><section><h3 data-cell="no_longer_head"></h3><div class="wide" data-cell="no_longer"></div></section></div>'
)


def difference(profile: TraceProfile, phase: str, other: str | None = None) -> dict[str, Any]:
    """What the first method launches instead of another's kernels, and what it no longer launches. other: as in `charts`."""
    groups = profile.of(phase)
    if len(groups) < 2:
        return cells_value({}, {"diff": "absent"})
    beside = _other(groups, other)
    found: TraceDiff = diff(groups[0], beside)
    first, second = label(groups[0].method), label(beside.method)
    changed = found.changed
    more = [change for change in changed if change.calls > change.other_calls]
    fewer = [change for change in changed if change.calls < change.other_calls]
    return cells_value(
        {
            "instead_head": f"what {html.escape(first)} launches instead",
            "instead": _changes_table([*found.instead, *more], own=True),
            "no_longer_head": f"what {html.escape(first)} no longer launches, and {html.escape(second)} does",
            "no_longer": _changes_table([*found.no_longer, *fewer], own=False),
        },
        {"diff": "kernels-diff"},
    )


def _changes_table(changes: Sequence[Change], own: bool) -> str:
    """own: the first method's calls and time."""
    if not changes:
        return '<p class="nothing">nothing</p>'
    ordered = sorted(changes, key=lambda change: -(change.ms if own else change.other_ms))
    body = ""
    for change in ordered[:_LISTED]:
        calls, others, ms = (change.calls, change.other_calls, change.ms)
        if not own:
            calls, others, ms = change.other_calls, change.calls, change.other_ms
        beside = f" <small>and {others:.4g}</small>" if others else ""
        colour = figures.CATEGORY_COLOURS.get(change.category, "")
        name = html.escape(change.name.removeprefix("aten::"))
        swatch = f'<span class="swatch" style="--accent: {colour}"></span>'
        body += (
            f'<tr><th scope="row" title="{html.escape(change.name)}">{swatch}{name}</th>'
            f'<td>{calls:.4g}×{beside}</td><td>{ms:.3f} ms</td><td class="shapes">{html.escape(change.shapes)}</td></tr>'
        )
    rest = ordered[_LISTED:]
    if rest:
        ms = sum(change.ms if own else change.other_ms for change in rest)
        body += f'<tr><th scope="row">{len(rest)} more</th><td></td><td>{ms:.3f} ms</td><td></td></tr>'
    return f'<table class="changes"><tbody>{body}</tbody></table>'


# --------------------------------------------------------------------------------------------------------------- table


def kernels_table(profile: TraceProfile, phase: str) -> dict[str, Any]:
    """Every kernel of the phase, the most expensive first."""
    lines: list[list[str | float]] = []
    for group in profile.of(phase):
        for kernel in group.kernels:
            share = 100 * kernel.us / 1000 / group.mean_ms if group.mean_ms else 0.0
            numbers = [round(kernel.calls, 3), round(kernel.mean_us, 3), round(kernel.us, 2), round(share, 3)]
            lines.append([kernel.name, label(group.method), kernel.category, *numbers, kernel.shapes, kernel.where])
        if group.num_kernels_left_out:
            words = f"{group.num_kernels_left_out:,} more, each cheaper than these"
            lines.append([words, label(group.method), HOST, 0, 0, 0, 0, "", ""])
    lines.sort(key=lambda line: -line[5])
    return table_value(COLUMNS, lines)
