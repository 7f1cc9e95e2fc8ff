"""What the Op lab found, as tables, sentences and charts: who wins at a point and why, the roofline, predictions beside times."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from profiling.cost_model import LayerShape
from profiling.figures import GRID_COLOUR, METHOD_STYLES, Chart, chart_layout
from profiling.op_lab import MethodPoint, OpLabResult
from profiling.op_lab_grid import GAP, MEDIAN_ERROR_PROMISED, WINNERS_PROMISED, GridSummary
from profiling.report import Note, Report, Table, TitledChart
from profiling.timing import Ratio, median

NOTE = (
    "A time is the median of single calls, the device synchronised on both sides, with its 95 % bootstrap interval; the methods "
    "took turns, and a ratio is the median over paired calls. Bytes are those that must move at least: the weight, the input, the "
    "output and the adapters' factors, each once. Shares are of the copy bandwidth and the matrix rate measured on this machine."
)
_FORM_WORDS = {"flora-expand": "expand", "flora-modulate": "modulate"}


def label(point: MethodPoint) -> str:
    """A method, and of `flora` the form that it took."""
    name = METHOD_STYLES[point.method].label
    return f"{name} ({_FORM_WORDS[point.form]})" if point.method == "flora" else name


# -------------------------------------------------------------------------------------------------------------- tables

HEADS = (
    "method", "ms", "95 %", "÷ base", "÷ first", "error", "GFLOP", "MB", "% bandwidth", "% matrix rate", "predicted ms", "bound by",
)  # fmt: skip


def cells(point: MethodPoint) -> list[str]:
    """One method's line below HEADS."""
    return [
        label(point),
        milliseconds(point.seconds),
        f"{milliseconds(point.low_s)}–{milliseconds(point.high_s)}",
        ratio(point.ratio_to_base),
        ratio(point.ratio_to_first),
        f"{point.error:.1e}{'' if point.agrees else ' WRONG'}",
        f"{point.operations / 1e9:.3g}",
        f"{point.num_bytes / 1e6:.3g}",
        f"{100 * point.bandwidth_share:.0f}",
        f"{100 * point.matrix_share:.0f}",
        milliseconds(point.predicted.seconds),
        point.predicted.bound,
    ]


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{float(f'{1000 * seconds:.3g}'):,g}"


def ratio(found: Ratio | None) -> str:
    return "1" if found is None else str(found)


def point_table(result: OpLabResult) -> Table:
    """A point as a table, for every format."""
    title = f"{result.setting.name}: {batch_words(result.setting.shape)}, {result.setting.dtype}"
    left_out = [f"{METHOD_STYLES[method].label} is left out: {why}." for method, why in result.left_out.items()]
    lines = [cells(point) for point in result.methods.values()]
    return Table(HEADS, lines, title, " ".join([*left_out, conditions(result)]), num_names=1)


def grid_table(results: Sequence[OpLabResult]) -> Table:
    """A line for each point: what each method took, and beside it what was predicted."""
    methods = list(dict.fromkeys(method for result in results for method in result.methods))
    lines = []
    for result in results:
        points = [result.methods.get(method) for method in methods]
        times = ["–" if p is None else f"{milliseconds(p.seconds)} ({milliseconds(p.predicted.seconds)})" for p in points]
        lines.append([result.setting.name, batch_words(result.setting.shape), *times])
    heads = ("layer", "batch", *(METHOD_STYLES[method].label for method in methods))
    return Table(heads, lines, "Points", "Milliseconds, in brackets as predicted; –: left out, since it would have taken too long.")


def report_of(results: Sequence[OpLabResult], command: str, found: GridSummary | None = None) -> Report:
    """Points, one or a grid with its summary, in every format. At least one point."""
    one = results[0]
    what = one.setting.name if found is None else f"a grid of {len(results)} points"
    batch = [batch_words(one.setting.shape)] if found is None else []
    charts = [TitledChart("Roofline", roofline(results)), TitledChart("Predicted and measured", predictions(results))]
    return Report(
        title=f"the Op lab, {what}",
        sentences=verdict(one) if found is None else summary_sentences(found),
        conditions=", ".join([what, *batch, one.setting.dtype, one.environment["device_name"], f"seed {one.setting.seed}"]),
        parts=[point_table(one) if found is None else grid_table(results), *charts, Note(NOTE)],
        environment=one.environment,
        command=command,
        rows=[row for result in results for row in result.to_rows()],
        left_to_json=frozenset({"hardware"}),
    )


def batch_words(shape: LayerShape) -> str:
    """Such as "8 rows of 1 token, rank 4, 8 adapters"."""
    counts = (count(shape.rows, "row"), count(shape.length, "token"), count(shape.adapters, "adapter"))
    return f"{counts[0]} of {counts[1]}, rank {shape.rank}, {counts[2]}"


def count(number: int, what: str) -> str:
    """ "1 row", "8 rows"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def conditions(result: OpLabResult) -> str:
    """What a reader must know beside the numbers, in a line."""
    checked = f"errors of {result.checked_outputs:,} outputs against float64, as a share of the size of their terms"
    flushed = "the weight is left in the cache, being so small" if result.cached else "caches are flushed before each call"
    return f"n = {result.rounds} calls of each in turn, in {result.layouts} layouts in memory; {flushed}; {checked}."


# --------------------------------------------------------------------------------------------------------------- words


def verdict(result: OpLabResult) -> list[str]:
    """Who wins here, why, and where the crossover is predicted: a sentence each."""
    return [sentence for sentence in (_winner(result), _why(result), _crossovers(result)) if sentence]


def _winner(result: OpLabResult) -> str:
    by_time = sorted(result.contestants.values(), key=lambda point: point.seconds)
    if not by_time:
        return ""
    fastest = by_time[0]
    said = f"Fastest here: {label(fastest)}, {milliseconds(fastest.seconds)} ms"
    if len(by_time) > 1:
        lead = by_time[1].seconds / fastest.seconds - 1
        said += f", {100 * lead:.0f} % before {label(by_time[1])}" if lead > GAP else f", level with {label(by_time[1])}"
    flora, bmm = result.methods.get("flora"), result.methods.get("bmm-lora")
    if result.first == "flora" and flora and bmm:
        over = bmm.ratio_to_first
        differs = "no difference shown" if over.low <= 1 <= over.high else "slower" if over.low > 1 else "faster"
        said += f". bmm-LoRA takes {over} times as long as {label(flora)}: {differs}"
    return f"{said}."


def _why(result: OpLabResult) -> str:
    base, costs, shape = result.methods["base"], result.costs, result.setting.shape
    bytes_s, operations_s = base.num_bytes / costs.copy_bytes_per_s, base.operations / costs.matrix_flops_per_s
    bound = "bandwidth" if bytes_s >= operations_s else "arithmetic"
    said = (
        f"The bare layer is bound by {bound}: moving its {base.num_bytes / 1e6:.3g} MB takes {milliseconds(bytes_s)} ms at the "
        f"measured {costs.copy_bytes_per_s / 1e9:.3g} GB/s, its {base.operations / 1e9:.3g} GFLOP {milliseconds(operations_s)} ms "
        f"at {costs.matrix_flops_per_s / 1e9:.3g} GFLOP/s."
    )
    flora = result.methods.get("flora")
    if flora is None:
        return said
    if flora.form == "flora-modulate":
        return f"{said} fLoRA forms a weight of its own for each of the {count(shape.adapters, 'adapter')} and multiplies by it."
    if shape.rank == 1:
        return f"{said} At rank 1 fLoRA sends no more rows through it than the bare layer has."
    more_s = flora.operations / costs.matrix_flops_per_s
    beside = "less than reading the weight takes" if more_s <= bytes_s else "more than reading the weight takes"
    return (
        f"{said} fLoRA sends {shape.tokens * shape.rank} rows through it instead of {shape.tokens}: {milliseconds(more_s)} ms of "
        f"arithmetic at that rate, {beside}."
    )


def _crossovers(result: OpLabResult) -> str:
    better, eq7 = result.crossover, result.eq7_crossover
    words = "at no rank up to 256" if better is None else f"from rank {better} on"
    paper = "never" if math.isinf(eq7) else f"at {eq7:.2f}"
    return (
        f"By the cost model bmm-LoRA is faster than fLoRA {words} for this batch; the paper's Eq. 7, with c1 and c2 measured here, "
        f"has the crossover {paper}."
    )


def summary_sentences(found: GridSummary) -> list[str]:
    """What a grid says of the models."""

    def percent(error: float | None) -> str:
        return "–" if error is None else f"{100 * error:.0f} %"

    by_method = ", ".join(f"{METHOD_STYLES[method].label} {percent(error)}" for method, error in found.by_method.items())
    return [
        f"{count(found.points, 'point')}: predictions are off by {percent(found.error)} of the measured time, the median over "
        f"methods and points (under {percent(MEDIAN_ERROR_PROMISED)} is promised): {by_method}.",
        f"Of fLoRA and bmm-LoRA alone {percent(found.paper_error)}, and by Eq. 7 with c1 and c2 measured here "
        f"{percent(found.eq7_error)}.",
        f"Where one led by more than {percent(GAP)}, the winner was named (in {percent(WINNERS_PROMISED)} at least is promised): "
        f"of fLoRA and bmm-LoRA in {found.paper_wins}, by Eq. 7 in {found.eq7_wins}; of all methods with adapters in "
        f"{found.all_wins}; of every two of them in {found.pair_wins}.",
        "What is promised is kept." if found.kept else "Not all that is promised is kept.",
    ]


# -------------------------------------------------------------------------------------------------------------- charts


def roofline(results: Sequence[OpLabResult]) -> Chart:
    """Operations a second by operations for each byte that must move, of every method and point, under the measured roof."""
    title = "roofline"
    points = [point for result in results for point in result.methods.values()]
    if not points:
        return _blank(title, "FLOP per byte", "GFLOP/s")
    costs = results[-1].costs
    intensities = [point.intensity for point in points]
    low = min(min(intensities), costs.ridge) / 3
    high = max(max(intensities), costs.ridge) * 3
    roof_x = [low, costs.ridge, high]
    roof_y = [min(costs.matrix_flops_per_s, x * costs.copy_bytes_per_s) / 1e9 for x in roof_x]
    traces = [
        {
            "type": "scatter", "mode": "lines", "name": "measured limits", "x": roof_x, "y": roof_y,
            "line": {"color": "#8a97a3", "width": 2}, "hovertemplate": "%{x:.3g} FLOP/B: at most %{y:.3g} GFLOP/s<extra></extra>",
        }
    ]  # fmt: skip
    traces += _markers(points, lambda point: (point.intensity, point.rate / 1e9), "%{x:.3g} FLOP/B, %{y:.3g} GFLOP/s")
    y_low = min(min(point.rate for point in points) / 1e9, roof_y[0]) / 2
    y_high = 2 * max(roof_y[-1], *(point.rate / 1e9 for point in points))
    layout = _log_log(chart_layout(title, "FLOP per byte", "GFLOP/s", (low, high), (y_low, y_high)))
    best = max(points, key=lambda point: point.rate / min(costs.matrix_flops_per_s, point.intensity * costs.copy_bytes_per_s))
    share = best.rate / min(costs.matrix_flops_per_s, best.intensity * costs.copy_bytes_per_s)
    sentence = (
        f"Roofline: {costs.copy_bytes_per_s / 1e9:.3g} GB/s and {costs.matrix_flops_per_s / 1e9:.3g} GFLOP/s ({costs.dtype}) were "
        f"measured on this machine and meet at {costs.ridge:.3g} FLOP per byte; {label(best)} comes nearest, at "
        f"{100 * share:.0f} % of them."
    )
    return Chart({"data": traces, "layout": layout}, sentence)


def predictions(results: Sequence[OpLabResult]) -> Chart:
    """Predicted by measured time, of every method and point, and the line on which they are equal."""
    title = "predicted and measured"
    points = [point for result in results for point in result.methods.values()]
    if not points:
        return _blank(title, "measured ms", "predicted ms")
    times = [1000 * seconds for point in points for seconds in (point.seconds, point.predicted.seconds)]
    low, high = min(times) / 2, max(times) * 2
    traces = [
        {
            "type": "scatter", "mode": "lines", "name": "equal", "x": [low, high], "y": [low, high],
            "line": {"color": GRID_COLOUR, "width": 2}, "hoverinfo": "skip",
        }
    ]  # fmt: skip
    hover = "measured %{x:.3g} ms, predicted %{y:.3g} ms"
    traces += _markers(points, lambda point: (1000 * point.seconds, 1000 * point.predicted.seconds), hover)
    middle = median([point.prediction_error for point in points])
    layout = _log_log(chart_layout(title, "measured ms", "predicted ms", (low, high), (low, high)))
    return Chart(
        {"data": traces, "layout": layout},
        f"Predicted beside measured times: they differ by {100 * middle:.0f} % of the measured one in the median of {len(points)}.",
    )


def _markers(points: Sequence[MethodPoint], place: Callable[[MethodPoint], tuple[float, float]], hover: str) -> list[dict]:
    """A trace for each method. place: of a point, its x and y."""
    traces = []
    for method in dict.fromkeys(point.method for point in points):
        style, places = METHOD_STYLES[method], [place(point) for point in points if point.method == method]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": style.label,
                "x": [float(f"{x:.4g}") for x, _ in places],
                "y": [float(f"{y:.4g}") for _, y in places],
                "marker": {"color": style.colour, "symbol": style.symbol, "size": 9},
                "hovertemplate": f"{hover}<extra>{style.label}</extra>",
            }
        )
    return traces


def _blank(title: str, x_title: str, y_title: str) -> Chart:
    return Chart({"data": [], "layout": chart_layout(title, x_title, y_title, (0, 1), (0, 1))}, "Nothing is measured yet.")


def _log_log(layout: dict) -> dict:
    """Both axes by the logarithm, the same ranges."""
    for axis in ("xaxis", "yaxis"):
        layout[axis] = layout[axis] | {"type": "log", "range": [math.log10(end) for end in layout[axis]["range"]]}
    return layout
