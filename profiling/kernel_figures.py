"""Charts of a profile as plain dicts that plotly.js draws, each with the sentence that says what it shows. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from profiling.categories import ATTENTION, BMM, CATEGORIES, COPIES, ELEMENTWISE, GEMM, HOST, INDEXING, NORMALISATION, OTHER
from profiling.figures import GRID_COLOUR, METHOD_STYLES, Chart, chart_layout
from profiling.trace_diff import TraceDiff
from profiling.trace_profile import StepGroup, TreeNode

CATEGORY_COLOURS = {
    GEMM: "#5b7fb5",
    BMM: "#c9845a",
    ATTENTION: "#7fa66b",
    ELEMENTWISE: "#c2a83e",
    NORMALISATION: "#9a80b8",
    INDEXING: "#5ba3a8",
    COPIES: "#c27a92",
    OTHER: "#8b7d70",
    HOST: "#b4bbc1",
}
"""Calm and of middling lightness, so that they read on white and on black; none is a method's."""

_LAYER_COLOUR = "#8c98a4"
_ROW_PX, _LANE_PX = 46, 24


def _label(group: StepGroup) -> str:
    return METHOD_STYLES[group.method].label if group.method in METHOD_STYLES else group.method or "the trace"


def _used(groups: Sequence[StepGroup]) -> list[str]:
    return [name for name in CATEGORIES if any(group.categories.get(name, 0.0) > 0 for group in groups)]


def breakdown(groups: Sequence[StepGroup]) -> Chart:
    """A bar per method: the mean step's milliseconds by category. groups: of one phase."""
    labels = [_label(group) for group in groups]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": labels,
            "x": [round(group.categories.get(name, 0.0), 4) for group in groups],
            "marker": {"color": CATEGORY_COLOURS[name]},
            "hovertemplate": f"%{{y}}: %{{x:.3f}} ms<extra>{name}</extra>",
        }
        for name in _used(groups)
    ]
    longest = max((group.mean_ms for group in groups), default=1.0)
    phase, words = (groups[0].phase, groups[0].words) if groups else ("", "step")
    layout = chart_layout(f"breakdown {phase}", "ms per step", "", (0, 1.02 * longest), (len(groups) - 0.5, -0.5))
    layout |= {"barmode": "stack", "height": 150 + _ROW_PX * len(groups), "bargap": 0.35}
    layout["legend"]["traceorder"] = "normal"
    layout["margin"] |= {"l": 110, "t": 62}
    layout["yaxis"] |= {"title": {"text": ""}, "ticks": "", "fixedrange": True}
    parts = [f"{_label(group)} {group.mean_ms:.2f} ms, {100 * group.busy:.0f} % of it computing" for group in groups]
    return Chart({"data": traces, "layout": layout}, f"Where the mean {words} goes: {'; '.join(parts)}.")


def gains(difference: TraceDiff, first: str, other: str) -> Chart:
    """Milliseconds that the first method wins (to the right) or loses in each category, and in all."""
    values = {**difference.gained_ms, "in all": difference.total_gained_ms}
    names = list(values)
    won, lost = "#4d9a6a", "#c0604d"
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": names,
        "x": [round(ms, 4) for ms in values.values()],
        "marker": {"color": [won if ms >= 0 else lost for ms in values.values()]},
        "text": [f"{ms:+.2f}" for ms in values.values()],
        "textposition": "outside",
        "cliponaxis": False,
        "showlegend": False,
        "hovertemplate": "%{y}: %{x:+.3f} ms<extra></extra>",
    }
    reach = 1.3 * max(0.001, *(abs(ms) for ms in values.values()))
    title = f"gains {difference.first.phase}"
    layout = chart_layout(title, f"ms per step that {first} wins over {other}", "", (-reach, reach), (len(names) - 0.4, -0.6))
    layout |= {"height": 110 + 26 * len(names), "bargap": 0.3}
    layout["margin"] |= {"l": 130, "t": 12}
    layout["yaxis"] |= {"title": {"text": ""}, "ticks": "", "fixedrange": True}
    layout["xaxis"] |= {"zeroline": True, "zerolinecolor": GRID_COLOUR}
    total = f"{abs(difference.total_gained_ms):.2f} ms per step"
    verdict = f"it {'wins' if difference.total_gained_ms >= 0 else 'loses'} {total}"
    if difference.is_noise:
        verdict = f"{total}, which is within noise"
    sentence = f"Where {first} wins (right) and loses (left) time against {other}: in all {verdict}."
    return Chart({"data": [trace], "layout": layout}, sentence)


def icicle(group: StepGroup) -> Chart:
    """The group's tree: each box is as wide as what it took with all that it called; layers of one name are one box."""
    ids, labels, parents, values, colours, texts = [], [], [], [], [], []

    def put(node: TreeNode, parent: str) -> None:
        name = f"{parent}/{len(ids)}"
        ids.append(name)
        parents.append(parent)
        labels.append(short_name(node.name) if parent else f"{_label(group)}, {group.words}")
        values.append(round(node.us, 2))
        colours.append(CATEGORY_COLOURS.get(node.category, _LAYER_COLOUR))
        calls = f"{node.calls:.4g} call{'s' if node.calls != 1 else ''} a step, " if node.calls else ""
        texts.append(f"{calls}{node.category}" if node.category else calls.removesuffix(", "))
        for child in node.children:
            put(child, name)

    put(group.tree, "")
    trace = {
        "type": "icicle",
        "ids": ids,
        "labels": labels,
        "parents": parents,
        "values": values,
        "branchvalues": "total",
        "marker": {"colors": colours, "line": {"width": 0.5}},
        "text": texts,
        "textinfo": "label",
        "hovertemplate": "%{label}<br>%{value:.1f} µs a step, %{percentRoot:.1%}<br>%{text}<extra></extra>",
        "tiling": {"orientation": "v"},
        "pathbar": {"visible": False},
        "sort": True,
        "maxdepth": 7,
    }
    layout = chart_layout(f"icicle {group.name}", "", "", (0, 1), (0, 1)) | {"height": 300}
    layout["margin"] = {"l": 4, "r": 4, "t": 4, "b": 4}
    for axis in ("xaxis", "yaxis"):
        layout.pop(axis)
    unit = "the time of its kernels" if group.host_calls is not None else "its time"
    sentence = (
        f"What calls what in {_label(group)}'s {group.words}: a box is as wide as {unit}, what it calls is below it, and "
        "layers of one name are one box. A click opens a box."
    )
    return Chart({"data": [trace], "layout": layout}, sentence)


def short_name(name: str) -> str:
    """`attention | transformer.h.*.attn.c_attn` as "c_attn", `aten::addmm` as "addmm"."""
    if " | " in name:
        kind, _, path = name.partition(" | ")
        last = path.rpartition(".")[2]
        return last if last not in ("*", "") else kind
    return name.removeprefix("aten::")


def timeline(groups: Sequence[StepGroup]) -> Chart:
    """One step of each method on a common time axis, its lanes under each other; the step in the middle of those measured."""
    rows = [(f"{_label(group)} {lane.name}", lane) for group in groups for lane in group.lanes]
    by_category: dict[str, list[tuple[str, float, float, str]]] = {}
    for row, lane in rows:
        for start, duration, category, name in lane.segments:
            by_category.setdefault(category, []).append((row, start, duration, name))
    traces = []
    for category in ("", *CATEGORIES):
        if category not in by_category:
            continue
        own = by_category[category]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": category or "layers",
                "y": [row for row, *_ in own],
                "base": [round(start / 1000, 5) for _, start, _, _ in own],
                "x": [round(duration / 1000, 5) for _, _, duration, _ in own],
                "customdata": [name if " | " not in name else name.replace(" | ", " ") for *_, name in own],
                "marker": {"color": CATEGORY_COLOURS.get(category, _LAYER_COLOUR), "line": {"width": 0}},
                "hovertemplate": f"%{{customdata}}<br>%{{x:.4f}} ms from %{{base:.4f}} ms on<extra>{category or 'layer'}</extra>",
            }
        )
    longest = max((group.lane_ms for group in groups), default=1.0)
    phase, words = (groups[0].phase, groups[0].words) if groups else ("", "step")
    layout = chart_layout(f"timeline {phase}", "ms since the step began", "", (0, 1.01 * longest), (len(rows) - 0.5, -0.5))
    layout |= {"barmode": "overlay", "bargap": 0.18, "height": 100 + _LANE_PX * len(rows), "dragmode": "zoom"}
    layout["legend"]["traceorder"] = "normal"
    layout["margin"] |= {"l": 190, "t": 60}
    layout["yaxis"] |= {
        "title": {"text": ""},
        "type": "category",
        "categoryorder": "array",
        "categoryarray": [row for row, _ in rows],
        "fixedrange": True,
        "ticks": "",
    }
    steps = "; ".join(f"{_label(group)}'s took {group.lane_ms:.2f} ms" for group in groups)
    return Chart(
        {"data": traces, "layout": layout},
        f"One {words} of each on the same time axis: {steps}. Drag over a stretch to zoom, double click to see all again.",
    )


def breakdown_table(groups: Sequence[StepGroup]) -> list[list[str | float]]:
    """The breakdown as lines for a download, heads first."""
    used = _used(groups)
    lines = [[_label(group), round(group.mean_ms, 5), *(round(group.categories[name], 5) for name in used)] for group in groups]
    return [["method", "step ms", *(f"{name} ms" for name in used)], *lines]


def tree_table(group: StepGroup) -> list[list[str | float]]:
    """The tree as lines for a download, heads first."""

    def lines(node: TreeNode, above: str) -> Iterator[list[str | float]]:
        path = f"{above} > {node.name}" if above else node.name
        yield [path, node.category, round(node.us, 3), round(node.calls, 3)]
        for child in node.children:
            yield from lines(child, path)

    return [["path", "category", "µs per step", "calls per step"], *lines(group.tree, "")]


def timeline_table(groups: Sequence[StepGroup]) -> list[list[str | float]]:
    """The timeline as lines for a download, heads first."""
    lines = [
        [_label(group), lane.name, name, category, start, duration]
        for group in groups
        for lane in group.lanes
        for start, duration, category, name in lane.segments
    ]
    return [["method", "lane", "name", "category", "start µs", "duration µs"], *lines]
