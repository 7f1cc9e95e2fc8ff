"""What happened in one comparison, event by event, and how the page shows it. Pure Python: no gradio, no device."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flora.engine import Agreement
from profiling.comparison import ComparisonResult
from profiling.dashboard.code_html import highlighted, transcript
from profiling.dashboard.live_cells import cells_value
from profiling.dashboard.live_plot import plot_value
from profiling.events import CompareEvent, Finished, Progress, RowFailed, RowText, Started, StepTimed
from profiling.explain import why
from profiling.figures import METHOD_STYLES, live_tokens_per_s

SIDES = ("left", "right")
_NOTHING = "–"
_STAGES = {  # stage -> (share of the bar where it begins, where it ends, words)
    "warm-up": (0.0, 0.1, "warming up, not timed"),
    "prefill": (0.1, 0.15, "prefill"),
    "decode": (0.15, 0.85, "decoding"),
    "checking": (0.85, 1.0, "checking against the reference"),
}


@dataclass
class Row:
    """One request of the batch as the page shows it."""

    kind: str  # "code" | "speech"
    adapter: str | None
    prompt: str = ""
    clip: str = ""  # the clip's file name
    error: str = ""
    texts: dict[str, str] = field(default_factory=dict)  # method -> text so far
    num_new_tokens: dict[str, int] = field(default_factory=dict)
    stopped: dict[str, bool] = field(default_factory=dict)
    times: dict[str, str] = field(default_factory=dict)  # method -> "TTFT … TPOT …", known at the end


def sentence(message: object) -> str:
    """An error's message as a sentence for the page: capital letter first, full stop last."""
    text = " ".join(str(message).split())
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def method_label(method: str) -> str:
    """The method's name with its colour, for a head of a column."""
    style = METHOD_STYLES[method]
    return f'<span class="swatch" style="--accent: {style.colour}"></span>{html.escape(style.label)}'


def milliseconds(seconds: float | None) -> str:
    """Seconds as "19.1 ms", three significant digits; a dash where there is nothing."""
    if seconds is None:
        return _NOTHING
    value = 1000 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def tokens_per_second(value: float | None) -> str:
    """A rate as "412", with a decimal below ten."""
    if value is None:
        return _NOTHING
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


class Results:
    """Takes the events of one comparison and gives the values of the page's live components.

    methods: left and right. rows: every visible row of the batch, also those that failed before the comparison began.
    positions: request index, as `compare` counts, -> index in `rows`.
    """

    def __init__(self, methods: Sequence[str] = (), rows: Sequence[Row] = (), positions: Sequence[int] = (), run: int = 0):
        self.methods = tuple(methods)
        self.rows = list(rows)
        self.positions = list(positions)
        self.run = run
        self.num_steps = 0
        self.steps: list[StepTimed] = []
        self.newest_step = 0  # which may still lack one kind's or one method's part
        self.words = ""
        self.fraction = 0.0
        self.state = "idle"  # idle | waiting | running | done | stopped | failed
        self.result: ComparisonResult | None = None

    # ------------------------------------------------------------------------------------------------ events in

    def apply(self, event: CompareEvent) -> None:
        """Take one event of `compare`."""
        match event:
            case Started():
                self.state = "running"
                self.num_steps = event.num_steps
            case Progress():
                begin, end, words = _STAGES[event.stage]
                share = event.done / event.total if event.total else 1.0
                self.fraction = begin + (end - begin) * share
                count = f" · {event.done} of {event.total}" if event.total else ""
                self.words = f"{words}{count}"
            case StepTimed():
                self.steps.append(event)
                self.newest_step = event.step
            case RowText():
                row = self.rows[self.positions[event.index]]
                row.texts[event.method] = event.text
                row.num_new_tokens[event.method] = event.num_new_tokens
                row.stopped[event.method] = event.stopped
            case RowFailed():
                self.rows[self.positions[event.index]].error = sentence(event.message)
            case Finished():
                self.finish(event.result)

    def finish(self, result: ComparisonResult) -> None:
        """The comparison has ended, by itself or by Stop."""
        self.result = result
        self.fraction = 1.0
        failed = sum(bool(row.error) for row in self.rows)
        for facts in result.rows:
            times = f"TTFT {milliseconds(facts['ttft_s'])} · TPOT {milliseconds(facts['tpot_s'])}"
            self.rows[self.positions[facts["index"]]].times[facts["method"]] = times
        self.state = "stopped" if result.stopped else "done"
        self.words = "stopped; what came so far is kept" if result.stopped else "done"
        if failed:
            self.words += f" · {failed} of {len(self.rows)} rows could not run, see the red lines"

    def fail(self, sentence: str) -> None:
        """Nothing could run, or the run broke off: say why."""
        self.state, self.words, self.fraction = "failed", sentence, 0.0

    # ------------------------------------------------------------------------------------------------ values out

    def status(self) -> dict[str, Any]:
        """The progress bar and its words."""
        return cells_value(
            cells={"words": html.escape(self.words)},
            classes={"status": f"status {self.state}"},
            attributes={"bar": {"style": f"width: {100 * self.fraction:.1f}%"}},
        )

    def _decode_seconds(self, method: str) -> dict[int, float]:
        """Decode step -> the method's seconds, kinds added up; only steps that both methods have finished."""
        seconds: dict[str, dict[int, float]] = {name: {} for name in self.methods}
        for step in self.steps:
            if step.phase == "decode" and step.step < self.newest_step:
                seconds[step.method][step.step] = seconds[step.method].get(step.step, 0.0) + step.seconds
        shared = set.intersection(*(set(series) for series in seconds.values()))
        return {step: seconds[method][step] for step in sorted(shared)}

    def chart(self) -> dict[str, Any]:
        """Tokens per second of both methods, decode step by decode step."""
        steps = [step for step in self.steps if self.result is not None or step.step < self.newest_step]
        chart = live_tokens_per_s(steps, self.methods, max(self.num_steps, 10))
        layout = {key: value for key, value in chart.figure["layout"].items() if key not in ("height", "font")}
        layout |= {"uirevision": f"run {self.run}", "margin": {"l": 52, "r": 10, "t": 26, "b": 38}}
        return plot_value({"data": chart.figure["data"], "layout": layout}, chart.description)

    def figures(self) -> dict[str, Any]:
        """The strip of key figures."""
        cells = {"ratio": _NOTHING, "ratio_words": "Press Run to measure.", "facts": "nothing measured yet"}
        for side in SIDES:
            cells |= {f"{side}_{name}": _NOTHING for name in ("method", "rate", "ttft", "tpot", "agreement")}
        for side, method in zip(SIDES, self.methods, strict=False):
            cells[f"{side}_method"] = method_label(method)
            cells |= {f"{side}_{name}": text for name, text in self._method_figures(method).items()}
        if self.methods:
            cells |= self._ratio_cells() | {"facts": self._facts()}
        return cells_value(cells=cells)

    def _method_figures(self, method: str) -> dict[str, str]:
        if self.result is not None and method in self.result.methods:
            figures = self.result.methods[method]
            return {
                "rate": tokens_per_second(figures.tokens_per_s),
                "ttft": milliseconds(figures.ttft_s),
                "tpot": milliseconds(figures.tpot_s),
                "agreement": _agreement(figures.agreement),
            }
        own = [step for step in self.steps if step.method == method]
        prefills = [step.seconds for step in own if step.phase == "prefill"]
        decodes = list(self._decode_seconds(method).values())
        return {
            "rate": tokens_per_second(
                sum(step.num_new_tokens for step in own) / sum(step.seconds for step in own) if own else None
            ),
            "ttft": milliseconds(statistics.median(prefills) if prefills else None),
            "tpot": milliseconds(statistics.median(decodes) if decodes else None),
            "agreement": _NOTHING,
        }

    def _ratio_cells(self) -> dict[str, str]:
        first, second = (html.escape(METHOD_STYLES[method].label) for method in self.methods)
        if self.result is not None and self.result.ratio is not None:
            ratio = self.result.ratio
            value = f"{ratio.median:.2f}× <small>[{ratio.low:.2f}, {ratio.high:.2f}]</small>"
            if ratio.low <= 1 <= ratio.high:
                verdict = "no difference beyond noise"
            else:
                verdict = f"{first} is faster" if ratio.median > 1 else f"{first} is slower"
            return {"ratio": value, "ratio_words": f"step time of {second} ÷ {first}: {verdict}"}
        words = {"ratio_words": f"step time of {second} ÷ {first}"}
        first_s, second_s = (self._decode_seconds(method).values() for method in self.methods)
        if not first_s:
            return {"ratio": _NOTHING} | words
        pairs = [b / a for a, b in zip(first_s, second_s, strict=True)]
        return {"ratio": f"{statistics.median(pairs):.2f}× <small>so far</small>"} | words

    def _facts(self) -> str:
        if self.result is None:
            return f"n = {len(self._decode_seconds(self.methods[0]))} paired steps so far · live"
        result = self.result
        pairs = result.ratio.n if result.ratio else 0
        facts = " · ".join(
            [
                f"peak memory {result.peak_memory_bytes / 1e6:,.0f} MB ({html.escape(result.peak_memory_of)})",
                f"n = {pairs} paired decode steps after {result.warmup_steps} warm-up steps",
                "ratio: median of the pairs, 95 % bootstrap interval",
                "live, on this machine",
            ]
        )
        return f"{facts}<br>{html.escape(why(result))}"

    def table(self) -> dict[str, Any]:
        """The results table: one row per request, a cell per method."""
        cells: dict[str, str] = {}
        classes: dict[str, str] = {}
        for side, method in zip(SIDES, self.methods, strict=False):
            cells[f"head_{side}"] = method_label(method)
        for i in range(MAX_ROWS):
            if i >= len(self.rows):
                classes[f"row{i}"] = "absent"
                continue
            row = self.rows[i]
            classes[f"row{i}"] = f"{row.kind} failed" if row.error else row.kind
            tag = html.escape(row.adapter) if row.adapter else "base"
            given = (
                html.escape(row.prompt.strip().splitlines()[0] if row.prompt.strip() else "")
                if row.kind == "code"
                else html.escape(row.clip)
            )
            cells[f"row{i}_request"] = f'<span class="tag {row.kind}">{tag}</span> <span class="given-name">{given}</span>'
            cells[f"row{i}_error"] = html.escape(row.error)
            for side, method in zip(SIDES, self.methods, strict=False):
                cells[f"row{i}_{side}"] = self._output(row, method)
                cells[f"row{i}_{side}_meta"] = self._meta(row, method)
                cells[f"row{i}_{side}_name"] = method_label(method)
        classes["empty"] = "absent" if self.rows else "empty"
        return cells_value(cells, classes)

    def _output(self, row: Row, method: str) -> str:
        text = row.texts.get(method, "")
        if row.kind == "code":
            return highlighted(row.prompt, text, row.adapter)
        return transcript(text, row.adapter)

    def _meta(self, row: Row, method: str) -> str:
        parts = []
        if method in row.num_new_tokens:
            parts.append(f"{row.num_new_tokens[method]} tokens")
        if method in row.times:
            parts.append(row.times[method])
        return " · ".join(parts) or "&nbsp;"


def _agreement(agreement: Agreement | None) -> str:
    """The badge: whether each generated token is also the merged reference's choice."""
    if agreement is None:
        return '<span title="only tokens chosen at temperature 0 can be compared, once a run has ended">not checked</span>'
    words = f"{agreement.agreeing} of {agreement.tokens} tokens"
    name, sign = ("agrees", "✓") if agreement.agreeing == agreement.tokens else ("differs", "✗")
    difference = agreement.max_logit_difference
    title = "" if difference is None else f' title="largest difference of a chosen token\'s logit: {difference:.1e}"'
    return f'<span class="badge {name}"{title}>{sign} {words}</span>'


MAX_ROWS = 16

STATUS_TEMPLATE = (
    '<div class="status idle" data-cell="status"><div class="track"><div class="bar" data-cell="bar"></div></div>'
    '<div class="words" data-cell="words" role="status" aria-live="polite"></div></div>'
)

FIGURES_TEMPLATE = (
    '<div class="strip"><div class="ratio-block"><div class="ratio" data-cell="ratio"></div>'
    '<div class="ratio-words" data-cell="ratio_words"></div></div>'
    '<table class="figures"><thead><tr><th scope="col">method</th><th scope="col">tokens/s</th>'
    '<th scope="col"><abbr title="time to the first token, median over requests">TTFT</abbr></th>'
    '<th scope="col"><abbr title="time per output token after the first, median over requests">TPOT</abbr></th>'
    '<th scope="col"><abbr title="the reference: the same tokens through the base model with each adapter merged into its weights">'
    "agrees with reference</abbr></th></tr></thead><tbody>"
    + "".join(
        f'<tr><th scope="row" data-cell="{side}_method"></th>'
        + "".join(f'<td data-cell="{side}_{name}"></td>' for name in ("rate", "ttft", "tpot", "agreement"))
        + "</tr>"
        for side in SIDES
    )
    + '</tbody></table><div class="facts" data-cell="facts"></div></div>'
)

TABLE_TEMPLATE = (
    '<table class="results" role="table"><thead role="rowgroup"><tr role="row"><th scope="col" role="columnheader">request</th>'
    + "".join(f'<th scope="col" role="columnheader" data-cell="head_{side}"></th>' for side in SIDES)
    + '</tr></thead><tbody role="rowgroup">'
    + "".join(
        f'<tr role="row" class="absent" data-cell="row{i}">'
        f'<th scope="row" role="rowheader"><div data-cell="row{i}_request"></div></th>'
        + "".join(
            f'<td role="cell"><div class="narrow-name" data-cell="row{i}_{side}_name"></div>'
            f'<div class="output" data-cell="row{i}_{side}" tabindex="0"></div>'
            f'<div class="meta" data-cell="row{i}_{side}_meta"></div></td>'
            for side in SIDES
        )
        + f'<td role="cell" class="error" colspan="2" data-cell="row{i}_error"></td></tr>'
        for i in range(MAX_ROWS)
    )
    + '</tbody></table><p class="empty" data-cell="empty">What both methods write appears here, side by side, token by token.</p>'
)

REPRODUCE_TEMPLATE = (
    '<div class="reproduce"><span class="prompt-sign">reproduce</span><code data-cell="command" tabindex="0"></code>'
    '<button type="button" class="quiet-button" data-copy="command">copy</button></div>'
)
