"""The *Live load* tab: requests arrive at a rate the visitor chooses, and charts show what the engines do with them."""

from __future__ import annotations

import html
import itertools
import logging
import math
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Any

import gradio as gr
import torch

from flora.corpus.code import example_prompts
from flora.engine import Engine, Request
from flora.errors import DeadlineError, FloraError, RequestError
from flora.names import public_name
from flora.ops import FAMILY, METHODS
from profiling import hardware, workload
from profiling.dashboard import live_load_views as views
from profiling.dashboard.compare import check_prompt_length
from profiling.dashboard.device import SERVER_ERROR, StopSignals
from profiling.dashboard.downloads import Downloads
from profiling.dashboard.live_cells import LiveCells, cells_value
from profiling.dashboard.live_load_report import report_of
from profiling.dashboard.live_plot import LivePlot
from profiling.dashboard.menus import NO_ADAPTER, Follower, Menu, adapter_choices
from profiling.dashboard.own_request import DEADLINE_S, MAX_AT_ONCE, OwnRequest
from profiling.dashboard.results import REPRODUCE_TEMPLATE, sentence
from profiling.dashboard.status import STATUS_TEMPLATE, notice, plain_status
from profiling.figures import METHOD_STYLES
from profiling.load import Driver
from profiling.load_runs import servable_by, sources_of
from profiling.options import weight_words
from profiling.traffic import POPULARITIES, EndlessTraffic, Lengths, Source, Traffic

logger = logging.getLogger(__name__)

SAMPLE_EVERY_S = 0.5
UPDATE_S = 1.0  # how often the page asks for what is new: each answer takes some 20 ms of a core from the engine
MAX_S = 600.0  # a load stops itself after so long
MAX_LOADS = 6  # visitors that send load at once
MIN_RATE, MAX_RATE = 0.5, 50.0  # requests a second
MAX_ADAPTERS = 64
MAX_PROMPT_TOKENS = 192
MAX_NEW_TOKENS = 128
MAX_LIMIT_MS = 60_000
BLOCK = 64  # requests that are planned at a time
NUM_RECORDS = 2000  # of the last requests, for goodput
REPRODUCED_S = 60.0  # how long the command's run takes
MARK_APART_S = 1.5  # what changes sooner is one change: a slider on its way
_CHART_PX = 176
_END_S = 0.1
_QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

_load_numbers = itertools.count(1)


@dataclass(frozen=True)
class Wish:
    """What a visitor's controls say. prompt_tokens: 0 for prompts as long as they are. speech_percent: of the requests."""

    method: str = "flora"
    rate: float = 4.0
    popularity: str = "zipf:1.5"
    num_adapters: int = MAX_ADAPTERS
    prompt_tokens: int = 0
    new_tokens: int = 32
    speech_percent: float = 0.0
    ttft_limit_ms: float = 500.0
    tpot_limit_ms: float = 100.0

    def __post_init__(self) -> None:
        for name, words, least, most in (
            ("rate", "rate", MIN_RATE, MAX_RATE),
            ("num_adapters", "number of adapters", 1, MAX_ADAPTERS),
            ("prompt_tokens", "number of prompt tokens", 0, MAX_PROMPT_TOKENS),
            ("new_tokens", "number of new tokens", 1, MAX_NEW_TOKENS),
            ("speech_percent", "share of speech", 0, 100),
            ("ttft_limit_ms", "limit of TTFT in milliseconds", 1, MAX_LIMIT_MS),
            ("tpot_limit_ms", "limit of TPOT in milliseconds", 1, MAX_LIMIT_MS),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not (least <= value <= most):
                raise RequestError(f"the {words} must be a number from {least:g} to {most:g}")
            if isinstance(getattr(Wish, name), int) and value != int(value):
                raise RequestError(f"the {words} must be a whole number")
        if self.method not in METHODS:
            raise RequestError(f"there is no such method: choose among {', '.join(METHODS)}")
        if self.popularity not in POPULARITIES:
            raise RequestError(f"there is no such popularity: choose among {', '.join(POPULARITIES)}")

    @property
    def limits(self) -> dict[str, float]:
        """Of goodput, in seconds."""
        return {"ttft": self.ttft_limit_ms / 1000.0, "tpot": self.tpot_limit_ms / 1000.0}

    def mix(self, kinds: Sequence[str]) -> dict[str, float]:
        """kind → share, of the kinds that have an engine."""
        speech = self.speech_percent / 100.0 if "code" in kinds else 1.0
        shares = {"code": 1.0 - speech, "speech": speech} if "speech" in kinds else {"code": 1.0}
        return {kind: share for kind, share in shares.items() if share}

    def traffic(self, kinds: Sequence[str]) -> Traffic:
        """One block of it, planned for one request a second: the driver's clock makes the rate of it."""
        return Traffic(
            num_requests=BLOCK,
            rate=1.0,
            prompt_tokens=Lengths.parse(str(int(self.prompt_tokens))) if self.prompt_tokens else Lengths(),
            new_tokens=Lengths.parse(str(int(self.new_tokens))),
            popularity=self.popularity,
            all_adapters=True,
            mix=self.mix(kinds),
        )

    def changes(self, other: Wish) -> list[str]:
        """What is different in `other`, in its words."""
        words = {
            "method": lambda: METHOD_STYLES[other.method].label,
            "rate": lambda: f"{other.rate:g}/s",
            "popularity": lambda: other.popularity,
            "num_adapters": lambda: f"{other.num_adapters:g} adapters",
            "prompt_tokens": lambda: f"prompts {f'{other.prompt_tokens:g}' if other.prompt_tokens else 'as given'}",
            "new_tokens": lambda: f"{other.new_tokens:g} new",
            "speech_percent": lambda: f"{other.speech_percent:g} % speech",
        }
        return [words[name]() for name in words if getattr(self, name) != getattr(other, name)]


class LiveLoad:
    """One visitor's load, from Start to its end. `wish` is what is sent now; `marks` says what was changed when."""

    def __init__(self, wish: Wish, driver: Driver, traffic: EndlessTraffic) -> None:
        self.wish, self.driver, self._traffic = wish, driver, traffic
        self.number = next(_load_numbers)
        self.marks: deque[views.Mark] = deque([views.Mark(0.0, "", wish.method)], maxlen=200)
        self.was_stopped = False
        self.ended_by = ""  # why it was stopped by somebody else
        self.look = views.Look()

    def change(self, wish: Wish, traffic: Traffic, adapters: Mapping[str, Sequence[str]]) -> None:
        """Go on with another wish, at once."""
        words = self.wish.changes(wish)
        self.wish = wish
        if not words:
            return  # a limit of goodput: it is for the eye only
        self._traffic.change(traffic, adapters)
        self.driver.method = wish.method
        self.driver.set_rate(wish.rate)
        now = time.perf_counter() - (self.driver.started_s or time.perf_counter())
        last = self.marks[-1]
        if len(self.marks) > 1 and now - last.time_s < MARK_APART_S:
            self.marks[-1] = views.Mark(last.time_s, words[-1], wish.method)
        else:
            self.marks.append(views.Mark(now, ", ".join(words), wish.method))

    def moment(self, num_loads: int) -> views.Moment:
        """How it stands now. num_loads: of all visitors together."""
        driver, failure, ended = self.driver, self.ended_by, not self.driver.running
        if ended:
            try:
                driver.join(0.0)
            except FloraError as error:
                failure = sentence(error)
            except Exception:  # a fault of ours: in the server's log in full, on the page one sentence
                logger.exception("a live load broke off")
                failure = SERVER_ERROR
        return views.Moment(
            number=self.number,
            samples=list(driver.samples),
            records=list(driver.records),
            marks=list(self.marks),
            limits=self.wish.limits,
            saturation=driver.saturation,
            state="failed" if failure and ended else "stopped" if ended and self.was_stopped else "done" if ended else "running",
            failure=failure,
            max_s=MAX_S,
            num_loads=num_loads,
        )


class LiveLoads:
    """Every visitor's load, by session: at most one each, and `MAX_LOADS` at once; and the requests of their own."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = engines
        self._lock = threading.Lock()
        self._loads: dict[str, LiveLoad] = {}
        self._sources: dict[str, Source] = {}
        self.own_stops = StopSignals()  # of the requests of visitors' own
        self._closed = False

    @property
    def num_running(self) -> int:
        return sum(load.driver.running for load in list(self._loads.values()))

    def of(self, session: str) -> LiveLoad | None:
        """The session's load, running or ended."""
        return self._loads.get(session)

    def start(self, session: str, wish: Wish) -> LiveLoad:
        """Begin to send. Raises a FloraError that says what cannot be served, or that too many visitors send already."""
        with self._lock:
            running = self._loads.get(session)
            if running is not None and running.driver.running:
                return running
            if self._closed:
                raise RequestError("the server is going down: try again later")
            if self.num_running >= MAX_LOADS:
                raise RequestError(
                    f"{MAX_LOADS} visitors send load already, and more would stand in each other's way: try again in a few minutes"
                )
            traffic, adapters = self._plan(wish)
            endless = EndlessTraffic(traffic, self._sources, adapters)
            driver = Driver(
                self.engines,
                wish.method,
                endless,
                duration_s=MAX_S,
                session=session,
                sample_every_s=SAMPLE_EVERY_S,
                num_records=NUM_RECORDS,
            )
            driver.set_rate(wish.rate)
            load = self._loads[session] = LiveLoad(wish, driver, endless)
            driver.start()
            return load

    def change(self, session: str, wish: Wish) -> None:
        """The session's load goes on as `wish` says; nothing where none runs. Raises a FloraError and leaves it as it is."""
        with self._lock:
            load = self._loads.get(session)
            if load is not None and load.driver.running:
                load.change(wish, *self._plan(wish))

    def stop(self, session: str) -> None:
        """Send nothing more on the session's behalf, and cancel what is on its way."""
        with self._lock:
            load = self._loads.get(session)
            if load is not None and load.driver.running:
                load.was_stopped = True
                load.driver.stop()

    def replaced(self, kind: str) -> None:
        """Another model serves this kind: end the loads that were planned for the old one, and keep nothing of it."""
        with self._lock:
            self._sources.pop(kind, None)
            for load in self._loads.values():
                if load.driver.running and kind in load.wish.mix(list(self.engines)):
                    load.ended_by = f"The {kind} model was replaced by another: press Start again."
                    load.driver.stop()

    def forget(self, session: str) -> None:
        """The browser has gone: stop its load and keep nothing."""
        self.stop(session)
        self.own_stops.forget(session)
        with self._lock:
            self._loads.pop(session, None)

    def close(self) -> None:
        """The server is going down: stop everybody's."""
        self._closed = True
        for session in list(self._loads):
            self.stop(session)

    def answer(self, session: str, prompt: Any, tag: str | None, method: str, new_tokens: Any) -> Iterator[dict[str, Any]]:
        """One request of the visitor's own to the code model, beside everybody's: values of its place on the page as it comes.

        Raises a FloraError that says what cannot be served, or by what it failed. Its Stop is the session's of `own_stops`.
        """
        stopped = self.own_stops.flag(session)
        if self._closed:
            raise RequestError("the server is going down: try again later")
        Wish(method=method, new_tokens=new_tokens)  # what the load's controls may not say, this may not either
        if not isinstance(prompt, str) or not prompt.strip():
            raise RequestError("the prompt is empty: type the beginning of a function")
        check_prompt_length(prompt)
        request = Request(prompt=prompt, adapter=tag or None, max_new_tokens=int(new_tokens))
        own = OwnRequest(self.engines["code"], request, method, (session, "own"))  # not behind all that the visitor's load has sent
        with closing(own.updates(lambda: stopped.is_set() or self._closed)) as updates:
            try:
                for _ in updates:
                    yield views.own_answer(own, prompt, request.adapter, method)
            except DeadlineError as error:
                raise DeadlineError(
                    f"it was not done within {DEADLINE_S:g} s, so many stand in line: lower the load's rate, or try again later"
                ) from error

    def adapters(self, wish: Wish) -> dict[str, tuple[str, ...]]:
        """By kind the tags that are asked for, equally many of each. Raises RequestError where the method serves none."""
        kinds = list(wish.mix(list(self.engines)))
        tags = servable_by({kind: self.engines[kind] for kind in kinds}, [wish.method])
        for kind in kinds:
            if not tags[kind] and self.engines[kind].adapters:
                raise RequestError(
                    f"no adapter of the {kind} model is one that {METHOD_STYLES[wish.method].label} serves "
                    f"(it needs the {FAMILY[wish.method]} family): choose another method"
                )
        num_adapters = min([int(wish.num_adapters), *(len(own) for own in tags.values() if own)])
        return {kind: own[:num_adapters] for kind, own in tags.items()}

    def _plan(self, wish: Wish) -> tuple[Traffic, dict[str, tuple[str, ...]]]:
        """What is to be sent; checked here, since the thread that sends can ask nobody."""
        traffic, adapters = wish.traffic(list(self.engines)), self.adapters(wish)
        for kind in traffic.mix:
            if kind not in self._sources:  # read once, when it is first wanted
                self._sources |= sources_of({kind: self.engines[kind]})
            self._sources[kind].check(traffic.prompt_tokens, traffic.new_tokens)
        seen: set[str] = set()
        for planned in replace(traffic, num_requests=8).plan(self._sources, adapters):
            if planned.kind not in seen:
                seen.add(planned.kind)
                self.engines[planned.kind].validate(planned.request(), wish.method)
        return traffic, adapters

    def command(self, wish: Wish) -> str:
        """The `python -m profiling load …` that measures the same traffic for a minute, quoted for a shell."""
        mix, adapters = wish.mix(list(self.engines)), self.adapters(wish)
        engines = {kind: self.engines[kind] for kind in mix}
        engine = next(iter(engines.values()))
        words = ["python", "-m", "profiling", "load", "--methods", wish.method]
        for kind, one in engines.items():
            if one.name != kind:  # the embedded models' folders are named after their kind
                words += [f"--{kind}-model", public_name(one.name)]
            given = workload.adapters_given(one, kind, adapters[kind])
            words += [f"--{kind}-adapters", *given] if given else []
        words += ["--rate", f"{wish.rate:g}", "--duration", f"{REPRODUCED_S:g}", "--popularity", wish.popularity]
        num_adapters = max(map(len, adapters.values()))
        words += ["--adapters", str(num_adapters)] if num_adapters else []
        words += ["--mix", ",".join(f"{kind}={share:g}" for kind, share in mix.items())]
        words += ["--prompt-tokens", str(int(wish.prompt_tokens))] if wish.prompt_tokens else []
        words += ["--new-tokens", str(int(wish.new_tokens))]
        words += ["--goodput", f"ttft:{wish.ttft_limit_ms:g}", f"tpot:{wish.tpot_limit_ms:g}"]
        words += ["--max-batch-size", str(engine.max_batch_size), "--adapter-slots", str(engine.bank.slot_capacity)]
        words += ["--device", engine.device.type, "--dtype", str(engine.dtype).removeprefix("torch.")]
        asked = [one.adapters[tag] for kind, one in engines.items() for tag in adapters[kind]]
        words += weight_words(engine, any(info.any_base_model for info in asked))
        return shlex.join([*words, "--threads", str(torch.get_num_threads())])


def build_live_load_tab(loads: LiveLoads, device_line: Callable[[], str]) -> list[Follower]:
    """Lay out the tab and wire it; call it inside a `gr.Blocks` context. device_line: says what computes, in words."""
    engines = loads.engines
    both = {"code", "speech"} <= set(engines)

    def most_adapters() -> int:
        return min(MAX_ADAPTERS, max((len(engine.adapters) for engine in engines.values()), default=1))

    def facts() -> str:
        batch = " and ".join(dict.fromkeys(str(engine.max_batch_size) for engine in engines.values()))
        return f"{device_line()} · at most {batch} requests a batch · live, not recorded"

    first = Wish(num_adapters=max(1, most_adapters()), speech_percent=20.0 if both else 0.0)

    with gr.Row(equal_height=False, elem_classes="bench load"):
        with gr.Column(scale=4, min_width=300, elem_classes="load-side"):
            with gr.Column(scale=4, min_width=300, elem_classes="instrument load-panel"):
                gr.HTML('<h2 class="panel-title">load</h2>', apply_default_css=False)
                with gr.Row(elem_classes="controls load-menus"):
                    method = gr.Dropdown(
                        [(METHOD_STYLES[name].label, name) for name in METHODS],
                        value=first.method,
                        label="method",
                        min_width=90,
                        elem_id="load-method",
                        interactive=True,
                    )
                    popularity = gr.Dropdown(
                        list(POPULARITIES),
                        value=first.popularity,
                        label="popularity of adapters",
                        min_width=90,
                        elem_id="load-popularity",
                        interactive=True,
                    )
                rate = _slider(MIN_RATE, MAX_RATE, first.rate, "rate, requests a second", "load-rate", step=0.5)
                num_adapters = _slider(1, max(2, most_adapters()), first.num_adapters, "adapters, of each model", "load-adapters")
                new_tokens = _slider(1, MAX_NEW_TOKENS, first.new_tokens, "new tokens", "load-new-tokens")
                prompt_tokens = _slider(
                    0, MAX_PROMPT_TOKENS, first.prompt_tokens, "prompt tokens (0: as the prompts are)", "load-prompt-tokens"
                )
                speech = _slider(0, 100, first.speech_percent, "speech among the requests, %", "load-speech", visible=both)
                note = LiveCells(views.NOTE_TEMPLATE, views.note(loads.adapters(first)), elem_id="load-note")
                with gr.Row(elem_classes="controls load-limits"):
                    ttft_limit = gr.Number(
                        first.ttft_limit_ms, label="goodput: TTFT, ms", precision=0, min_width=90, elem_id="load-ttft-limit"
                    )
                    tpot_limit = gr.Number(
                        first.tpot_limit_ms, label="and TPOT, ms", precision=0, min_width=90, elem_id="load-tpot-limit"
                    )
                with gr.Row(elem_classes="run-buttons"):
                    start = gr.Button("Start", variant="primary", scale=2, min_width=90, elem_id="load-start")
                    stop = gr.Button("Stop", variant="secondary", scale=1, min_width=70, interactive=False, elem_id="load-stop")
            followers = [_build_own_request(loads, method, new_tokens)] if "code" in engines else []
        with gr.Column(scale=8, min_width=300, elem_classes="instrument"):
            status = LiveCells(STATUS_TEMPLATE, views.idle_status(), elem_id="load-status")
            readouts = LiveCells(views.READOUTS_TEMPLATE, views.idle_readouts(facts()), elem_id="load-readouts")
            explanation = gr.HTML(views.explanation(MAX_S), apply_default_css=False, elem_id="load-explanation")
            with gr.Column(visible=False, elem_id="load-charts", elem_classes="load-charts") as area:
                charts = [
                    LivePlot(views.blank(), file_name=f"flora-live-{name}.csv", height_px=_CHART_PX, elem_id=f"load-{name}")
                    for name in views.CHARTS
                ]
    with gr.Row(elem_classes="instrument footer-panel", equal_height=True):
        reproduce = LiveCells(
            REPRODUCE_TEMPLATE, cells_value({"command": html.escape(loads.command(first))}), elem_id="load-reproduce"
        )
        downloads = Downloads("load")
    timer = gr.Timer(UPDATE_S, active=False)
    end_timer = gr.Timer(_END_S, active=False)  # ticks once when a load has ended

    controls = [method, rate, popularity, num_adapters, prompt_tokens, new_tokens, speech, ttft_limit, tpot_limit]
    assert len(controls) == len(fields(Wish))
    moving = [status, readouts, *charts, timer, start, stop, end_timer]

    def wish_of(values: Sequence[Any]) -> Wish:
        return Wish(*values)

    def arm():
        """Answers the button at once: the first start of all reads the prompts and clips, which takes a moment."""
        return plain_status("waiting", "beginning"), gr.Button(interactive=False)

    def begin(request: gr.Request, *values: Any) -> list[Any]:
        buttons = [gr.Button(interactive=True), gr.Button(interactive=False)]
        nothing = [gr.skip(), gr.skip(), gr.Timer(active=False), *buttons]
        try:
            loads.start(request.session_hash, wish_of(values))
        except FloraError as error:
            return [plain_status("failed", sentence(error)), *nothing]
        except Exception:  # a fault of ours: in the server's log in full, on the page one sentence without the server's insides
            logger.exception("a live load could not begin")
            return [plain_status("failed", SERVER_ERROR), *nothing]
        begun = [gr.Column(visible=True), gr.HTML(visible=False), gr.Timer(active=True)]
        return [plain_status("running", "sending"), *begun, gr.Button(interactive=False), gr.Button(interactive=True)]

    def could_not_begin():
        """Gradio itself refused: what the browser sent makes no sense; a notice says which."""
        return plain_status("failed", "The load could not begin: check the numbers, or reload the page."), gr.Button(
            interactive=True
        )

    def tick(request: gr.Request) -> list[Any]:
        load = loads.of(request.session_hash)
        if load is None:  # nothing of this page's is known here: the server was started anew
            gone = plain_status("failed", "The server no longer knows this load: press Start again.")
            buttons = [gr.Timer(active=False), gr.Button(interactive=True), gr.Button(interactive=False)]
            return [gone, *[gr.skip()] * (1 + len(charts)), *buttons, gr.skip()]
        moment = load.moment(loads.num_running)
        ended = moment.state != "running"
        figures = views.charts(moment, load.look)
        buttons = [gr.skip()] * 4
        if ended:
            buttons = [gr.Timer(active=False), gr.Button(interactive=True), gr.Button(interactive=False), gr.Timer(active=True)]
        return [views.status(moment), views.readouts(moment, facts()), *(figures[name] for name in views.CHARTS), *buttons]

    def adjust(request: gr.Request, *values: Any) -> list[Any]:
        try:
            wish = wish_of(values)
            command = loads.command(wish)
            loads.change(request.session_hash, wish)
        except FloraError as error:
            return [gr.skip(), gr.skip(), notice(sentence(error))]
        except Exception:  # as above: the load itself goes on as it was
            logger.exception("a live load could not be changed")
            return [gr.skip(), gr.skip(), notice(SERVER_ERROR)]
        return [cells_value({"command": html.escape(command)}), views.note(loads.adapters(wish)), notice("")]

    def offer(request: gr.Request) -> Iterator[list[Any]]:
        """The report of a load that has ended."""
        load = loads.of(request.session_hash)
        found = None
        if load is not None:
            try:
                used = {kind: engines[kind] for kind in load.wish.mix(list(engines))}
                moment = load.moment(loads.num_running)
                found = report_of(moment, loads.command(load.wish), hardware.environment(used))
            except FloraError:  # what it was sent to is not here any more: there is no line that repeats it
                logger.info("a live load's model or adapters have gone: no report is offered")
        with downloads.offer(found) as files:
            yield [gr.Timer(active=False), *files]

    def end(request: gr.Request):
        loads.stop(request.session_hash)
        return gr.Button(interactive=False)

    begun = start.click(arm, None, [status, start], **_QUIET).then(
        begin, controls, [status, area, explanation, timer, start, stop], **_QUIET
    )
    begun.failure(could_not_begin, None, [status, start], **_QUIET)
    stop.click(end, None, [stop], **_QUIET)
    timer.tick(tick, None, moving, **_QUIET)
    end_timer.tick(offer, None, [end_timer, *downloads.buttons], show_progress="hidden", api_visibility="private")
    gr.on(
        [control.change for control in controls],
        adjust,
        controls,
        [reproduce, note, status],
        trigger_mode="always_last",
        **_QUIET,
    )

    def follow(values: Sequence[Any], opened: bool) -> list[Any]:
        """The most adapters there are to ask for, and what depends on it; a page that was just opened asks for all."""
        most = max(2, most_adapters())
        anew = opened and most_adapters() != first.num_adapters
        slider = gr.Slider(maximum=most, value=max(1, most_adapters())) if anew else gr.Slider(maximum=most)
        return [slider, cells_value({"facts": html.escape(facts())})]

    return [*followers, Follower([num_adapters, readouts], follow)]


def _build_own_request(loads: LiveLoads, method: gr.Dropdown, new_tokens: gr.Slider) -> Follower:
    """The panel that sends one request of the visitor's own, with the load's method and as many new tokens."""
    engines = loads.engines
    adapters = engines["code"].adapters
    examples = {tag: texts[0] for tag, texts in example_prompts().items() if texts}
    first = next((tag for tag, info in adapters.items() if FAMILY["flora"] in info.families), NO_ADAPTER)

    def example(tag: str | None) -> str:
        """What the tag's language begins a function with; the base model's own language for a tag that is none's."""
        return examples.get(tag or "", examples["py"])

    with gr.Column(min_width=280, elem_classes="instrument load-panel own-panel"):
        gr.HTML('<h2 class="panel-title">a request of your own</h2>', apply_default_css=False)
        prompt = gr.Textbox(
            example(first),
            label="prompt of your own request",
            show_label=False,
            container=False,
            lines=3,
            max_lines=3,
            placeholder="the beginning of a function",
            elem_id="own-prompt",
            elem_classes="own-prompt",
            interactive=True,
        )
        with gr.Row(elem_classes="controls run-buttons own-buttons"):
            adapter = Menu(
                adapter_choices("code", engines),
                value=first,
                label="adapter of your own request",
                show_label=False,
                container=False,
                min_width=90,
                filterable=True,
                elem_id="own-adapter",
                interactive=True,
            )
            send = gr.Button("Send", variant="primary", min_width=60, elem_id="own-send")
            stop = gr.Button("Stop", variant="secondary", min_width=60, interactive=False, elem_id="own-stop")
        answer = LiveCells(views.OWN_TEMPLATE, views.idle_own(), elem_id="own-answer")
    views_of_it = [answer, send, stop]

    def ended(value: Any) -> list[Any]:
        return [value, gr.Button(interactive=True), gr.Button(interactive=False)]

    def arm(request: gr.Request):
        """Answers the button at once, so that it is not pressed twice."""
        loads.own_stops.arm(request.session_hash)
        return views.own_words("waiting", "sending"), gr.Button(interactive=False), gr.Button(interactive=True)

    def handler(request: gr.Request, words: str | None, tag: str | None, chosen: str | None, tokens: float | None):
        value: Any = None
        try:
            with closing(loads.answer(request.session_hash, words, tag, chosen, tokens)) as values:
                for value in values:
                    yield [value, gr.skip(), gr.skip()]
        except FloraError as error:
            value = views.own_words("failed", sentence(error), keep_answer=value is not None)
        except Exception:  # a fault of ours: in the server's log in full, on the page one sentence without the server's insides
            logger.exception("a request of a visitor's own broke off")
            value = views.own_words("failed", SERVER_ERROR, keep_answer=value is not None)
        yield ended(value)

    def could_not_begin() -> list[Any]:
        """Gradio itself refused: too many wait, or what the browser sent makes no sense; a notice says which."""
        return ended(views.own_words("failed", "The request could not be sent: try again in a moment, or reload the page."))

    def stop_it(request: gr.Request):
        loads.own_stops.raise_flag(request.session_hash)
        return gr.Button(interactive=False)

    def show_example(tag: str | None, words: str | None):
        """The chosen language's example, where nothing of the visitor's own stands there."""
        return example(tag) if not (words or "").strip() or words in examples.values() else gr.skip()

    send.click(arm, None, views_of_it, **_QUIET).then(
        handler,
        [prompt, adapter, method, new_tokens],
        views_of_it,
        concurrency_id="own-request",
        concurrency_limit=MAX_AT_ONCE,
        show_progress="hidden",
        api_visibility="private",
    ).failure(could_not_begin, None, views_of_it, **_QUIET)
    stop.click(stop_it, None, [stop], **_QUIET)
    adapter.input(show_example, [adapter, prompt], [prompt], **_QUIET)

    def follow(values: Sequence[Any], opened: bool) -> list[Any]:
        chosen = values[0]
        if opened and chosen not in engines["code"].adapters:
            return [gr.Dropdown(choices=adapter_choices("code", engines), value=NO_ADAPTER)]
        return [gr.Dropdown(choices=adapter_choices("code", engines, chosen))]

    return Follower([adapter], follow, [adapter], [adapter])


def _slider(least: float, most: float, value: float, label: str, elem_id: str, step: float = 1, visible: bool = True) -> gr.Slider:
    return gr.Slider(
        least,
        most,
        value=min(max(value, least), most),
        step=step,
        precision=None if step != math.floor(step) else 0,
        label=label,
        elem_id=elem_id,
        elem_classes="load-slider",
        visible=visible,
        interactive=True,
        buttons=[],
    )
