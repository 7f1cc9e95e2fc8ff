"""How a live load looks: samples in, values of the page's live components out. Pure Python: no gradio, no device.

Times are seconds before now, so that the axes stand still and the lines move.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from profiling.dashboard import status as status_line
from profiling.dashboard.code_html import highlighted
from profiling.dashboard.live_cells import cells_value
from profiling.dashboard.live_plot import plot_value
from profiling.dashboard.own_request import OwnRequest
from profiling.dashboard.results import milliseconds, tokens_per_second
from profiling.dashboard.status import clock, plain_status
from profiling.figures import METHOD_STYLES, axis_ceiling, chart_layout
from profiling.load import LATENCY_WINDOW_S, Sample
from profiling.load_metrics import Record
from profiling.saturation import Saturation

WINDOW_S = 60.0  # what the charts show
RATE_S = 3.0  # requests per second are those of so many seconds
BEHIND_S = 10.0  # over which a queue that grows is called by its name
BEHIND_WAITING = 4
SHRINK = 0.4  # an axis shrinks only where less than this of it is used
MAX_TAGS = 15  # adapters with a colour of their own in the chart
CHARTS = ("requests", "queue", "tokens", "ttft", "tpot", "batch")

_WORDED = ("requests", "tokens")  # the charts that say what was changed; the others show when
_FEWEST = 4  # requests that an axis has room for, so that it counts in whole ones
_TICKS = [-60, -45, -30, -15, 0]
_ARRIVING, _EVERYBODY, _WAITING = "#6d879f", "#8c959d", "#c08a4e"
_PERCENTILES = {"p50": ("solid", 2.2), "p90": ("dash", 1.6), "p99": ("dot", 1.4)}
# Calm and of middling lightness, so that they read on white and on black; none is a method's.
_TAG_COLOURS = (
    "#6f94bd", "#c98d6a", "#62a892", "#c9ae5e", "#9b86bb", "#cc8798", "#8aa25f", "#5fa5b5",
    "#a88677", "#9dbbdc", "#e0b498", "#9bcdbc", "#ded093", "#c2b3da", "#e3b3bf",
)  # fmt: skip
_OTHERS, _NO_ADAPTER = "#8c959d", "#b9c0c6"
_NOTHING = "–"
_NO_TAG = "no adapter"
_OTHER_TAGS = "others"


@dataclass(frozen=True)
class Mark:
    """From this moment on something else is sent. words: what the visitor changed; empty at the start."""

    time_s: float
    words: str
    method: str


@dataclass
class Look:
    """What stays as it is while a load's charts move: the ends of their axes, which grow at once and shrink late, and the colour
    of each adapter."""

    ends: dict[str, float] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)

    def end(self, chart: str, highest: float) -> float:
        """The end of the chart's y axis that holds `highest`."""
        end, wanted = self.ends.get(chart, 0.0), axis_ceiling(highest)
        if wanted > end or highest < SHRINK * end:
            self.ends[chart] = wanted
        return self.ends[chart]

    def colour(self, tag: str) -> str:
        """The tag's colour: the next one for one that was never seen."""
        if tag == _NO_TAG:
            return _NO_ADAPTER
        return _TAG_COLOURS[self.places.setdefault(tag, len(self.places)) % len(_TAG_COLOURS)]


@dataclass(frozen=True)
class Moment:
    """A load as it stands. samples, records: the last ones. num_loads: of all visitors, this one's among them."""

    number: int
    samples: Sequence[Sample]
    records: Sequence[Record]
    marks: Sequence[Mark]
    limits: Mapping[str, float]
    saturation: Saturation | None
    state: str  # running | stopped | done | failed
    failure: str
    max_s: float
    num_loads: int

    @property
    def now_s(self) -> float:
        return self.samples[-1].time_s if self.samples else 0.0

    @property
    def method(self) -> str:
        return self.marks[-1].method

    def method_at(self, time_s: float) -> str:
        """The method that was asked for at a moment."""
        return next((mark.method for mark in reversed(self.marks) if mark.time_s <= time_s), self.marks[0].method)

    def window(self) -> list[Sample]:
        """The samples that the charts show."""
        return [sample for sample in self.samples if sample.time_s >= self.now_s - WINDOW_S]

    def before(self, seconds: float) -> Sample | None:
        """The newest sample at least so old; the oldest where none is."""
        return _before(self.samples, len(self.samples) - 1, seconds)


def _before(samples: Sequence[Sample], place: int, seconds: float) -> Sample | None:
    if not samples:
        return None
    then = place
    while then > 0 and samples[then].time_s > samples[place].time_s - seconds:
        then -= 1
    return samples[then]


# -------------------------------------------------------------------------------------------------------------- status


def idle_status() -> dict[str, Any]:
    return plain_status("idle", "nothing is sent")


def status(moment: Moment) -> dict[str, Any]:
    """What goes on, in words, and how far the load is from its end."""
    state, words = verdict(moment)
    others = moment.num_loads - (moment.state == "running")
    company = "" if others < 1 else f" · {others} other visitor{'s' if others > 1 else ''} sending too"
    since = f"{clock(moment.now_s)} of at most {clock(moment.max_s)}{company}"
    return status_line.status(state, words, moment.now_s / moment.max_s, since)


def verdict(moment: Moment) -> tuple[str, str]:
    """How the load stands: the state that gives the line its colour, and a sentence that says what to do."""
    if moment.state == "failed":
        return "failed", moment.failure
    if moment.state == "stopped":
        return "stopped", "Stopped; what was seen stays here, and each chart's data button holds the whole run."
    if moment.state == "done":
        return "done", f"Ended by itself after {moment.max_s / 60:g} minutes; each chart's data button holds the whole run."
    if not moment.samples:
        return "running", "sending"
    arriving, answered = your_rates(moment.samples, len(moment.samples) - 1, BEHIND_S)
    if moment.saturation is not None:
        return "saturated", (
            f"Over-saturated: {moment.saturation.reason}. Lower the rate ({answered:.3g} of your requests a second are answered "
            "now) or ask for fewer tokens; until then the latencies only say how long this has lasted."
        )
    last, then = moment.samples[-1], moment.before(BEHIND_S)
    before_p50, p50 = then.ttft_s.get("p50"), last.ttft_s.get("p50")
    grew = last.num_waiting >= BEHIND_WAITING and last.num_waiting > 1.25 * then.num_waiting + 1
    if grew and before_p50 and p50 and p50 > 1.1 * before_p50:
        return "behind", (
            f"Queue and TTFT are rising: {arriving:.3g} a second arrive and {answered:.3g} are answered. "
            "If that lasts, lower the rate or ask for fewer tokens."
        )
    failed = last.outcomes.get("failed", 0)
    if failed:
        message = next((record.message for record in reversed(moment.records) if record.outcome == "failed"), None)
        return "running", f"sending · {failed} failed{f', the last one: {message}' if message else ''}"
    return "running", "sending · " + ("all is answered as it comes" if last.num_waiting == 0 else "some have to wait")


def duration(seconds: float | None) -> str:
    """Seconds as "19.1 ms", or as "4.47 s" where there are that many."""
    return milliseconds(seconds) if seconds is None or seconds < 1 else f"{seconds:.3g} s"


def your_rates(samples: Sequence[Sample], place: int, seconds: float) -> tuple[float, float]:
    """Of this visitor's requests, how many were sent and how many answered a second, in the seconds before a sample."""
    now, then = samples[place], _before(samples, place, seconds)
    took = now.time_s - then.time_s
    if took <= 0:
        return 0.0, 0.0
    answered = now.outcomes.get("finished", 0) - then.outcomes.get("finished", 0)
    return (now.num_sent - then.num_sent) / took, answered / took


# ------------------------------------------------------------------------------------------------ a request of one's own

OWN_TEMPLATE = (
    '<div class="own idle" data-cell="own"><div class="output absent" data-cell="answer" role="region" aria-label="answer" '
    'tabindex="0"></div><p class="words" data-cell="words" role="status" aria-live="polite"></p></div>'
)


def idle_own() -> dict[str, Any]:
    words = "With the method and as many new tokens as above. It joins the batch that everybody's requests share."
    return cells_value({"answer": "", "words": words})


def own_words(state: str, words: str, keep_answer: bool = True) -> dict[str, Any]:
    """What stands below the answer, which stays as it is or goes. state: waiting | running | done | stopped | failed."""
    return cells_value(
        {"words": html.escape(words)}, {"own": f"own {state}"} | ({} if keep_answer else {"answer": "output absent"})
    )


def own_answer(own: OwnRequest, prompt: str, tag: str | None, method: str) -> dict[str, Any]:
    """A request as it stands: its text so far; at the end its times, and who ran beside it."""
    if own.completion is None:
        begun = own.num_new_tokens > 0
        words = "answering, one token a step" if begun else "waiting for its place in the batch"
        return _own("running" if begun else "waiting", prompt, own.text, tag, words)
    stopped = own.completion.finish_reason == "cancelled"
    if own.num_new_tokens:
        words = (
            f"{own.num_new_tokens} token{'s' if own.num_new_tokens > 1 else ''}, the first after {duration(own.completion.ttft_s)}"
        )
        words += f", then {duration(own.completion.tpot_s)} a token" if own.num_new_tokens > 1 else ""
        words = f"{'Stopped after ' if stopped else ''}{words}. {_company(own, method)}"
    else:
        words = (
            "Stopped before the first token." if stopped else "The model had nothing to add: its first token was the stop token."
        )
    return _own("stopped" if stopped else "done", prompt, own.text, tag, words)


def _company(own: OwnRequest, method: str) -> str:
    """Who ran beside it, and how."""
    mean, most = own.others or (0.0, 0)
    if most == 0:
        return "Nobody else's request ran meanwhile: the batch was this one alone."
    others = f"{mean:.1f} other requests on average, {most} at most" if most > 1 else "one other request at most"
    if method == "merged":
        return f"Beside it ran {others}; with merged weights, one adapter's after another's."
    return f"Beside it ran {others}; everybody's with {METHOD_STYLES[method].label} in the same forward."


def _own(state: str, prompt: str, text: str, tag: str | None, words: str) -> dict[str, Any]:
    answer = {"answer": highlighted(prompt, text, tag), "words": html.escape(words)}
    return cells_value(answer, {"own": f"own {state}", "answer": "output"})


# ------------------------------------------------------------------------------------------------------------ readouts

_READOUTS = {
    "tokens": ("tokens/s", "new tokens of everybody's requests in the last second"),
    "arriving": ("arriving", f"requests a second, the last {RATE_S:g} seconds"),
    "answered": ("answered", f"your requests a second, the last {RATE_S:g} seconds"),
    "engine": ("in the engine", "requests that run or wait, everybody's"),
    "ttft": ("TTFT", f"time to the first token, median of your requests of the last {LATENCY_WINDOW_S:g} seconds"),
    "tpot": ("TPOT", f"time per output token after the first, median of your requests of the last {LATENCY_WINDOW_S:g} seconds"),
    "goodput": ("goodput", f"share of your requests of the last {LATENCY_WINDOW_S:g} seconds that were answered within the limits"),
    "requests": ("your requests", "since the start"),
}

READOUTS_TEMPLATE = (
    '<dl class="readouts">'
    + "".join(
        f'<div data-cell="{name}_box" class="readout"><dt><abbr title="{title}">{words}</abbr></dt>'
        f'<dd data-cell="{name}"></dd><dd class="small" data-cell="{name}_small"></dd></div>'
        for name, (words, title) in _READOUTS.items()
    )
    + '</dl><div class="load-facts" data-cell="facts"></div>'
)


def idle_readouts(facts: str) -> dict[str, Any]:
    cells = {name: _NOTHING for name in _READOUTS} | {f"{name}_small": "&nbsp;" for name in _READOUTS}
    return cells_value(cells | {"facts": html.escape(facts)})


def readouts(moment: Moment, facts: str) -> dict[str, Any]:
    """The strip of numbers: yours where they say so, everybody's else."""
    if not moment.samples:
        return idle_readouts(facts)
    last = moment.samples[-1]
    place = len(moment.samples) - 1
    arriving, answered = your_rates(moment.samples, place, RATE_S)
    outcomes = last.outcomes
    yours = last.num_sent - sum(outcomes.values())
    missed = {name: outcomes.get(name, 0) for name in ("refused", "failed", "cancelled")}
    cells = {
        "tokens": tokens_per_second(last.tokens_per_s),
        "tokens_small": "everybody's",
        "arriving": f"{arriving:.1f}/s",
        "arriving_small": f"yours · everybody's let in {everybody_arriving(moment.samples, place):.1f}/s",
        "answered": f"{answered:.1f}/s",
        "answered_small": "yours",
        "engine": f"{last.num_running} <small>run</small> {last.num_waiting} <small>wait</small>",
        "engine_small": f"everybody's · {yours} of them yours",
        "goodput": _NOTHING,
        "goodput_small": _limits(moment.limits),
        "requests": f"{outcomes.get('finished', 0):,} <small>answered</small>",
        "requests_small": " · ".join(f"{count:,} {name}" for name, count in missed.items()),
        "facts": html.escape(facts),
    }
    for name, summary in (("ttft", last.ttft_s), ("tpot", last.tpot_s)):
        cells[name] = duration(summary.get("p50"))
        cells[f"{name}_small"] = f"p90 {duration(summary.get('p90'))} · p99 {duration(summary.get('p99'))}"
    ended = [record for record in moment.records if record.ended_s is not None and record.ended_s > moment.now_s - LATENCY_WINDOW_S]
    ended = [record for record in ended if record.outcome != "cancelled"]
    if ended:
        good = sum(record.keeps(moment.limits) for record in ended)
        cells["goodput"] = f"{100 * good / len(ended):.0f} %"
        cells["goodput_small"] = f"{good / min(LATENCY_WINDOW_S, max(moment.now_s, 1.0)):.1f}/s {_limits(moment.limits)}"
    bad = missed["refused"] or missed["failed"]
    return cells_value(cells, {"requests_box": "readout bad" if bad else "readout"})


def _limits(limits: Mapping[str, float]) -> str:
    return "within " + ", ".join(f"{1000 * limit:g} ms {name.upper()}" for name, limit in limits.items())


def everybody_arriving(samples: Sequence[Sample], place: int) -> float:
    """Requests a second of everybody's that the engines took in, over the seconds before a sample, which knows its last second."""
    recent: list[float] = []
    for then in range(place, -1, -1):
        if samples[then].time_s <= samples[place].time_s - RATE_S:
            break
        recent.append(samples[then].arrivals_per_s)
    return sum(recent) / len(recent)


# -------------------------------------------------------------------------------------------------------------- charts

NOTE_TEMPLATE = '<p class="load-note" data-cell="note"></p>'


def note(adapters: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Which adapters are asked for. adapters: by kind."""
    parts = []
    for kind, tags in adapters.items():
        named = " ".join(tags[:MAX_TAGS]) + (" …" if len(tags) > MAX_TAGS else "")
        parts.append(f"{kind} <code>{html.escape(named)}</code>" if tags else f"{kind} without adapters")
    return cells_value({"note": f"asked for: {', '.join(parts)}"})


def explanation(max_s: float) -> str:
    """What stands where the charts will be."""
    return (
        '<div class="load-explanation"><p>Press <b>Start</b>: requests begin to arrive at the rate you chose, each asking for an '
        "adapter, and the engine batches them as they come, together with every other visitor's. Six charts move while it runs:</p>"
        "<ul><li><b>requests a second</b>, arriving and answered, yours and everybody's;</li>"
        "<li><b>the queue</b>: how many run and how many wait;</li><li><b>tokens a second</b> of the whole engine;</li>"
        "<li><b>TTFT</b> and <b>TPOT</b>: the median, the slowest tenth and the slowest hundredth of your requests;</li>"
        "<li><b>the batch</b>, by adapter.</li></ul>"
        "<p>Every control may be moved while it runs and takes effect with the next request. Raise the rate until the queue grows "
        "and TTFT with it, then change the method; or change the popularity from <i>identical</i> to <i>distinct</i> and watch the "
        f"batch. A load ends when you press Stop or leave the page, and by itself after {max_s / 60:g} minutes.</p></div>"
    )


def blank() -> dict[str, Any]:
    """A chart before its first sample."""
    return plot_value({"data": [], "layout": {}}, "Nothing is drawn yet.")


def charts(moment: Moment, look: Look) -> dict[str, dict[str, Any]]:
    """Every chart's value, by its name in CHARTS; of a load that has ended, each with the whole run as its data."""
    window = moment.window()
    first = len(moment.samples) - len(window)
    times = [round(sample.time_s - moment.now_s, 2) for sample in window]
    table = None if moment.state == "running" else run_table(moment)

    def value(
        name: str, title: str, unit: str, traces: list[dict], highest: float, words: str, order: str = "normal"
    ) -> dict[str, Any]:
        layout = chart_layout(title, "seconds, 0 is now", unit, (-WINDOW_S, 0.0), (0, look.end(name, highest)))
        layout |= {
            "margin": {"l": 42, "r": 16, "t": 44, "b": 22},
            "uirevision": f"load {moment.number}",
            **_marks(moment, name in _WORDED),
        }
        heading = {"text": f"{title}, {unit}", "x": 0, "xanchor": "left", "yref": "container", "y": 0.985, "font": {"size": 11}}
        layout["title"] = heading
        layout["legend"] |= {"x": 0, "y": 1.01, "font": {"size": 10}, "traceorder": order}
        layout["xaxis"] |= {"tickvals": _TICKS, "ticktext": [*(f"−{-tick} s" for tick in _TICKS[:-1]), "now"]}
        layout["xaxis"]["title"] = {"text": ""}
        layout["yaxis"] |= {"title": {"text": ""}, "nticks": 5}
        for key in ("height", "font"):
            del layout[key]
        return plot_value({"data": traces, "layout": layout}, words, table)

    return {
        "requests": _requests(moment, window, first, times, value),
        "queue": _queue(moment, window, times, value),
        "tokens": _tokens(moment, window, times, value),
        "ttft": _latency("ttft", "time to the first token", moment, window, times, value),
        "tpot": _latency("tpot", "time per output token after the first", moment, window, times, value),
        "batch": _batch(look, window, times, value),
    }


Value = Callable[..., dict[str, Any]]  # of a chart: its layout around its traces


def _requests(moment: Moment, window: list[Sample], first: int, times: list[float], value: Value) -> dict[str, Any]:
    yours = [your_rates(moment.samples, first + place, RATE_S) for place in range(len(window))]
    everybody = [everybody_arriving(moment.samples, first + place) for place in range(len(window))]
    colour = METHOD_STYLES[moment.method].colour
    traces = [
        _line("everybody's", times, everybody, _EVERYBODY, "dot", 1.4, "%{y:.1f}/s"),
        _line("arriving", times, [arriving for arriving, _ in yours], _ARRIVING, "dash", 1.8, "%{y:.1f}/s"),
        _line("answered", times, [answered for _, answered in yours], colour, "solid", 2, "%{y:.1f}/s"),
    ]
    highest = max([*everybody, *(max(pair) for pair in yours)], default=0.0)
    arriving, answered = yours[-1] if yours else (0.0, 0.0)
    words = (
        f"{arriving:.1f} of your requests a second arrive and {answered:.1f} are answered; "
        f"of everybody's {everybody[-1] if everybody else 0:.1f} are let in. Where answered stays below arriving, the queue grows."
    )
    return value("requests", "requests", "a second", traces, highest, words)


def _queue(moment: Moment, window: list[Sample], times: list[float], value: Value) -> dict[str, Any]:
    running, waiting = [sample.num_running for sample in window], [sample.num_waiting for sample in window]
    yours = [sample.num_sent - sum(sample.outcomes.values()) for sample in window]
    colour = METHOD_STYLES[moment.method].colour
    traces = [
        _area("running", times, running, colour) | {"fillcolor": _faint(colour)},
        _area("waiting", times, waiting, _WAITING) | {"fillcolor": _faint(_WAITING)},
        _line("yours of both", times, yours, _EVERYBODY, "dot", 1.4, "%{y}"),
    ]
    highest = max((one + other for one, other in zip(running, waiting, strict=True)), default=0)
    words = "Nothing is in the engine yet."
    if window:
        words = (
            f"{running[-1]} run and {waiting[-1]} wait, everybody's; {yours[-1]} of them are yours. "
            "A queue that only grows: more arrives than is answered."
        )
    return value("queue", "in the engine", "requests", traces, max(highest, *yours, _FEWEST) if window else _FEWEST, words)


def _tokens(moment: Moment, window: list[Sample], times: list[float], value: Value) -> dict[str, Any]:
    rates = [sample.tokens_per_s for sample in window]
    traces = [
        _line(METHOD_STYLES[method].label, times, own, METHOD_STYLES[method].colour, "solid", 2, "%{y:.0f} tokens/s")
        for method, own in _by_method(moment, window, rates).items()
    ]
    for trace in traces:
        trace["showlegend"] = len(traces) > 1
    words = "No token has come yet."
    if window:
        words = (
            f"{rates[-1]:,.0f} new tokens a second for everybody, {sum(rates) / len(rates):,.0f} in the mean of what is drawn; "
            f"{METHOD_STYLES[moment.method].label} now; higher is better."
        )
    return value("tokens", "new tokens", "a second", traces, max(rates, default=0.0), words)


def _latency(name: str, meaning: str, moment: Moment, window: list[Sample], times: list[float], value: Value) -> dict[str, Any]:
    summaries = [getattr(sample, f"{name}_s") for sample in window]
    traces, highest = [], 0.0
    for percentile, (dash, width) in reversed(_PERCENTILES.items()):
        values = [1000.0 * summary[percentile] if summary else None for summary in summaries]
        highest = max([highest, *(one for one in values if one is not None)])
        for method, own in _by_method(moment, window, values).items():
            style = METHOD_STYLES[method]
            label = percentile if method == moment.method else f"{percentile} {style.label}"
            trace = _line(label, times, own, style.colour, dash, width, "%{y:.4g} ms")
            traces.append(trace | {"showlegend": method == moment.method})
    last = summaries[-1] if summaries else {}
    words = f"{name.upper()}, {meaning}: no request has been that far yet."
    if last:
        words = (
            f"{name.upper()}, {meaning}, of your requests of the last {LATENCY_WINDOW_S:g} s: half took at most "
            f"{duration(last['p50'])}, nine of ten {duration(last['p90'])}, 99 of 100 {duration(last['p99'])}; "
            "lower is better."
        )
    return value(name, name.upper(), "ms", traces, highest, words, order="reversed")


def _batch(look: Look, window: list[Sample], times: list[float], value: Value) -> dict[str, Any]:
    counts = [_tags(sample) for sample in window]
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    shown = sorted(tag for tag, _ in total.most_common(MAX_TAGS))
    traces = []
    for tag in shown:
        traces.append(_area(_plain(tag), times, [count[tag] for count in counts], look.colour(tag)))
    if len(total) > len(shown):
        others = [sum(number for tag, number in count.items() if tag not in shown) for count in counts]
        traces.append(_area(_OTHER_TAGS, times, others, _OTHERS))
    words = "No request runs yet."
    if counts:
        now = counts[-1].most_common()
        listed = ", ".join(f"{tag} {number}" for tag, number in now[:8]) + (" and others" if len(now) > 8 else "")
        words = f"The batch now, everybody's requests by adapter: {listed or 'none'}. One colour per adapter."
    highest = max((sum(count.values()) for count in counts), default=0)
    return value("batch", "the batch, by adapter", "requests", traces, max(highest, _FEWEST), words)


def _tags(sample: Sample) -> Counter[str]:
    """What runs, by adapter."""
    return Counter({(_NO_TAG if tag is None else tag): number for batch in sample.batch.values() for tag, number in batch.items()})


def _by_method(moment: Moment, window: list[Sample], values: Sequence[float | None]) -> dict[str, list[float | None]]:
    """method → the values while it was asked for, None elsewhere; neighbours meet where it was changed."""
    methods = [moment.method_at(sample.time_s) for sample in window]
    series: dict[str, list[float | None]] = {}
    for method in dict.fromkeys(methods):
        own = [
            value if here == method or (place and methods[place - 1] == method) else None
            for place, (here, value) in enumerate(zip(methods, values, strict=True))
        ]
        series[method] = own
    return series or {moment.method: []}


def _marks(moment: Moment, worded: bool) -> dict[str, list]:
    """A line where the visitor changed something, and what it was."""
    shapes, annotations = [], []
    for place, mark in enumerate(moment.marks):
        x = round(mark.time_s - moment.now_s, 2)
        if not mark.words or x < -WINDOW_S:
            continue
        line = {"color": _EVERYBODY, "width": 1, "dash": "dot"}
        shapes.append({"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line})
        at = {"x": x, "y": 1 - 0.13 * (place % 3), "yref": "paper"}  # neighbours are written at different heights
        at |= {"xanchor": "right" if x > -WINDOW_S / 5 else "left", "yanchor": "top", "showarrow": False}
        annotations.append(at | {"text": mark.words, "font": {"size": 10, "color": _EVERYBODY}})
    return {"shapes": shapes, "annotations": annotations if worded else []}


def _line(name: str, x: list[float], y: Sequence[float | None], colour: str, dash: str, width: float, hover: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": x,
        "y": [None if value is None else float(f"{value:.4g}") for value in y],
        "line": {"color": colour, "dash": dash, "width": width},
        "hovertemplate": f"%{{x:.0f}} s: {hover}<extra>{name}</extra>",
    }


def _area(name: str, x: list[float], y: Sequence[int], colour: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": x,
        "y": list(y),
        "stackgroup": "all",
        "fillcolor": colour,
        "line": {"color": colour, "width": 0, "shape": "hv"},
        "hovertemplate": f"%{{x:.0f}} s: %{{y}}<extra>{name}</extra>",
    }


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.45)"


def _plain(tag: str) -> str:
    """A tag as plotly.js shows it: it reads a few HTML tags in text."""
    return tag.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def run_table(moment: Moment) -> list[list[Any]]:
    """Every sample that is kept as a line, heads first."""
    percentiles = [f"{name}_{percentile}_ms" for name in ("ttft", "tpot") for percentile in _PERCENTILES]
    tags = sorted({tag for sample in moment.samples for tag in _tags(sample)})
    counted = ("finished", "refused", "failed", "cancelled")
    rates = ["your_arriving_per_s", "your_answered_per_s", "arriving_per_s", "tokens_per_s"]
    counts = ["running", "waiting", "your_sent", *(f"your_{name}" for name in counted)]
    lines: list[list[Any]] = [["time_s", "method", *rates, *counts, *percentiles, *(f"runs:{tag}" for tag in tags)]]
    for place, sample in enumerate(moment.samples):
        arriving, answered = your_rates(moment.samples, place, RATE_S)
        numbers = [arriving, answered, everybody_arriving(moment.samples, place), sample.tokens_per_s]
        latencies = [
            round(1000 * summary[percentile], 3) if summary else ""
            for summary in (sample.ttft_s, sample.tpot_s)
            for percentile in _PERCENTILES
        ]
        batch = _tags(sample)
        lines.append(
            [
                round(sample.time_s, 2),
                moment.method_at(sample.time_s),
                *(round(number, 3) for number in numbers),
                sample.num_running,
                sample.num_waiting,
                sample.num_sent,
                *(sample.outcomes.get(name, 0) for name in counted),
                *latencies,
                *(batch[tag] for tag in tags),
            ]
        )
    return lines
