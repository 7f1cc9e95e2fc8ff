"""Long work on the page: a button that starts it, a line that says how far it is and how long it takes yet, a button that stops it.

A tab brings a `Work`: a generator that measures, and what keeps and draws what comes of it.

    measure()   runs on the device's one thread, when its turn has come. It yields events: `HowFar` moves the bar and gives the
                estimate of what is left, `GIVE_WAY` between two parts lets others by, all else is the tab's own. It asks
                `should_stop()` as often as it can and then ends by itself, keeping what it has.
    take()      is given the tab's own events, in order, on the page's side: it keeps them for the tab's `show`.

The page asks for news with a timer, as *Live load* does, and is not sent it by a generator, as in *Compare*: a sweep lasts minutes,
may stand in line as long, and a generator would hold one of the server's threads and of gradio's queue's places all the while. A
tick takes what waits, touches no device, and is never behind anybody's measurement. A visitor who leaves is forgotten: what stood
in line never begins, what was under way stops at its next step.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import gradio as gr

from flora.errors import FloraError
from profiling.dashboard.device import Device, Run, in_line
from profiling.dashboard.live_cells import LiveCells
from profiling.dashboard.results import sentence
from profiling.dashboard.status import STATUS_TEMPLATE, clock, plain_status, status
from profiling.events import HowFar

logger = logging.getLogger(__name__)

UPDATE_S = 0.4  # how often the page asks for what is new
EARLIER = 8  # of a visitor's measurements of a tab, those that are kept to be shown beside the next
BROKE_OFF = "Something went wrong on the server; the measurement was not finished. Try again."
_END_S = 0.1
_ESTIMATE_AFTER_S = 2.0  # before, a guess would be a wild one
_QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

_numbers = itertools.count(1)


class Work(Protocol):
    """What a tab measures, and what has come of it."""

    def measure(self, should_stop: Callable[[], bool]) -> Iterator[Any]:
        """On the device's thread. Raises a FloraError that says what cannot be measured."""

    def take(self, event: Any) -> None:
        """One event of `measure` that is neither `HowFar` nor `GIVE_WAY`. Never called twice at once."""


class Measurement:
    """One visitor's measurement, from Start to its end. number: of all in this process. how_far: None before the first word."""

    def __init__(self, device: Device, work: Work, session: str = "") -> None:
        self.session = session  # whose it is
        self.number = next(_numbers)
        self.work = work
        self.how_far: HowFar | None = None
        self._device = device
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._run: Run = device.start(lambda: work.measure(self._should_stop))

    def _should_stop(self) -> bool:
        return self._stop.is_set() or self._device.closing.is_set()

    def update(self) -> None:
        """Take what has come since, without waiting."""
        with self._lock:
            for event in self._run.fetch(0.0):
                if isinstance(event, HowFar):
                    self.how_far = event
                else:
                    self.work.take(event)

    def stop(self) -> None:
        """End at the next step; at once where it stands in line."""
        self._stop.set()
        if self._device.num_ahead(self._run):
            self._run.abandoned = True

    def abandon(self) -> None:
        """End, and keep nothing: nobody looks any more."""
        self._stop.set()
        self._run.abandoned = True

    @property
    def state(self) -> str:
        """waiting (in line, before its first turn or between two) | running | stopped | done | failed, as of the last `update`."""
        if self._run.done:
            return "failed" if self._run.error is not None else "stopped" if self._should_stop() else "done"
        if self._stop.is_set() and self._run.abandoned:
            return "stopped"
        return "waiting" if self._device.num_ahead(self._run) or not self._run.begun else "running"

    @property
    def ended(self) -> bool:
        return self.state in ("stopped", "done", "failed")

    @property
    def failure(self) -> str:
        """Why it failed, a sentence; the server's insides stay in its log."""
        error = self._run.error
        return "" if error is None else sentence(error) if isinstance(error, FloraError) else BROKE_OFF

    @property
    def error(self) -> Exception | None:
        return self._run.error

    def remaining_s(self) -> float | None:
        """How long it still needs the device, judged by what it has needed so far; None as long as that would be a wild guess."""
        share = self.how_far.share if self.how_far else 0.0
        if self._run.active_s < _ESTIMATE_AFTER_S or not 0 < share <= 1:
            return None
        return self._run.active_s * (1 - share) / share

    def status(self) -> dict[str, Any]:
        """The value of the tab's status line."""
        share = self.how_far.share if self.how_far else 0.0
        words = self.how_far.words if self.how_far else "beginning"
        match self.state:
            case "failed":
                return plain_status("failed", self.failure)
            case "done":
                return status("done", "done", 1.0)
            case "stopped":
                return status("stopped", "stopped; what was measured is kept", share)
            case "waiting":
                so_far = f" · {100 * share:.0f} % is measured" if share else ""
                return status("waiting", f"{in_line(self._device.num_ahead(self._run))}{so_far}", share)
        left_s = self.remaining_s()
        stopping = "stopping · " if self._stop.is_set() else ""
        return status("running", f"{stopping}{words}", share, "" if left_s is None else _left(left_s))


def _left(seconds: float) -> str:
    return f"about {max(1, round(seconds))} s left" if seconds < 90 else f"about {clock(seconds)} min left"


class Measurements:
    """Every visitor's measurements, by browser session and tab: at most one at a time of each, and the last few that have ended."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._now: dict[tuple[str, str], Measurement] = {}
        self._earlier: dict[tuple[str, str], deque[Measurement]] = {}

    def start(self, session: str, tab: str, work: Work) -> Measurement:
        """Put it in line; the one that is under way goes on instead, where there is one. Raises RequestError as `Device.start`."""
        with self._lock:
            before = self._now.get((session, tab))
            if before is not None and not before.ended:
                return before
            self._now[session, tab] = measurement = Measurement(self._device, work, session)
            if before is not None:
                self._earlier.setdefault((session, tab), deque(maxlen=EARLIER)).append(before)
            return measurement

    def of(self, session: str, tab: str) -> Measurement | None:
        """The session's measurement of a tab, under way or ended."""
        return self._now.get((session, tab))

    def earlier(self, session: str, tab: str) -> list[Measurement]:
        """Those before it, the oldest first, whatever became of them."""
        return list(self._earlier.get((session, tab), ()))

    def stop(self, session: str, tab: str) -> None:
        """End the session's measurement of a tab; what has been measured stays."""
        if (measurement := self.of(session, tab)) is not None:
            measurement.stop()

    def forget(self, session: str) -> None:
        """The browser has gone: stop what it had asked for and keep nothing."""
        with self._lock:
            for key in [key for key in self._now if key[0] == session]:
                self._now.pop(key).abandon()
                self._earlier.pop(key, None)


class Measuring:
    """The Start and Stop buttons, the status line and the timer of one tab's measurements.

    Put the parts where they belong, `buttons()` and `status_line()`, once each, then `connect()`, and `at_the_end()` for what is
    wanted only then.
    """

    def __init__(self, measurements: Measurements, tab: str, idle: str = "nothing is measured") -> None:
        """tab: its name in `measurements`, and the beginning of the elements' ids. idle: what the line says at first."""
        self._measurements, self.tab, self._idle = measurements, tab, idle
        self._timer = gr.Timer(UPDATE_S, active=False)
        self._end = gr.Timer(_END_S, active=False)  # ticks once when a measurement has ended

    def buttons(self, start: str = "Measure") -> None:
        """Lay out Start and Stop, beside each other."""
        with gr.Row(elem_classes="run-buttons"):
            self.start = gr.Button(start, variant="primary", scale=2, min_width=90, elem_id=f"{self.tab}-start")
            self.stop = gr.Button("Stop", variant="secondary", scale=1, min_width=70, interactive=False, elem_id=f"{self.tab}-stop")

    def status_line(self) -> None:
        """Lay out the line that says how far it is."""
        self.line = LiveCells(STATUS_TEMPLATE, plain_status("idle", self._idle), elem_id=f"{self.tab}-status")

    def connect(
        self,
        inputs: Sequence[gr.components.Component],
        begin: Callable[..., Work],
        outputs: Sequence[gr.components.Component],
        show: Callable[..., list[Any]],
        looks: Sequence[gr.components.Component] = (),
    ) -> None:
        """Wire it.

        begin: (session, *values of inputs) → what is to be measured; raises a FloraError for what makes no sense, before anything
        stands in line. show: (the measurement as it stands, *values of looks) → values of outputs, a few times a second and once at
        its end. looks: what the visitor may choose while it runs, of how it is shown.
        """
        running = [gr.update(interactive=False), gr.update(interactive=True)]
        resting = [gr.update(interactive=True), gr.update(interactive=False)]

        def arm():
            """Answers the button at once."""
            return plain_status("waiting", "beginning"), gr.Button(interactive=False)

        def start(request: gr.Request, *values: Any) -> list[Any]:
            try:
                self._measurements.start(request.session_hash, self.tab, begin(request.session_hash, *values))
            except FloraError as error:
                return [plain_status("failed", sentence(error)), gr.Timer(active=False), *resting]
            except Exception:  # a fault of ours: in the server's log in full, on the page one sentence
                logger.exception("a measurement of the %s tab could not begin", self.tab)
                return [plain_status("failed", BROKE_OFF), gr.Timer(active=False), *resting]
            return [gr.skip(), gr.Timer(active=True), *running]

        def could_not_begin() -> list[Any]:
            """Gradio itself refused: what the browser sent makes no sense; a notice says which."""
            return [plain_status("failed", "It could not begin: check the numbers, or reload the page."), gr.skip(), *resting]

        def tick(request: gr.Request, *chosen: Any) -> list[Any]:
            measurement = self._measurements.of(request.session_hash, self.tab)
            if measurement is None:  # nothing of this page's is known here: the server was started anew
                gone = plain_status("failed", "The server no longer knows this measurement: start it again.")
                return [gone, gr.Timer(active=False), *resting, *[gr.skip()] * (1 + len(outputs))]
            try:
                measurement.update()
                ended = measurement.ended
                values = show(measurement, *chosen)
            except Exception:  # as above, and nothing more of it is shown
                logger.exception("a measurement of the %s tab could not be shown", self.tab)
                measurement.abandon()
                broken = plain_status("failed", BROKE_OFF)
                return [broken, gr.Timer(active=False), *resting, *[gr.skip()] * (1 + len(outputs))]
            if not ended:
                return [measurement.status(), *[gr.skip()] * 4, *values]
            if measurement.error is not None and not isinstance(measurement.error, FloraError):
                logger.error("a measurement of the %s tab broke off", self.tab, exc_info=measurement.error)
            return [measurement.status(), gr.Timer(active=False), *resting, gr.Timer(active=True), *values]

        def end(request: gr.Request):
            self._measurements.stop(request.session_hash, self.tab)
            return gr.Button(interactive=False)

        frame = [self.line, self._timer, self.start, self.stop]
        begun = self.start.click(arm, None, [self.line, self.start], **_QUIET)
        begun.then(start, list(inputs), frame, **_QUIET).failure(could_not_begin, None, frame, **_QUIET)
        self.stop.click(end, None, [self.stop], **_QUIET)
        self._timer.tick(tick, list(looks), [*frame, self._end, *outputs], **_QUIET)

    def at_the_end(
        self, outputs: Sequence[gr.components.Component], finish: Callable[[Measurement], AbstractContextManager[list[Any]]]
    ) -> None:
        """Once a measurement has ended: what `finish` gives for outputs, in whose context gradio takes it over, files too."""

        def finished(request: gr.Request) -> Iterator[list[Any]]:
            measurement = self._measurements.of(request.session_hash, self.tab)
            if measurement is None:
                yield [gr.Timer(active=False), *[gr.skip()] * len(outputs)]
                return
            with finish(measurement) as values:
                yield [gr.Timer(active=False), *values]

        self._end.tick(finished, None, [self._end, *outputs], show_progress="hidden", api_visibility="private")
