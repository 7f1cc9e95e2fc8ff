"""A driver that sends planned requests to engines and keeps what becomes of each.

An open loop sends each request when it is due and never waits for the engine. A generator that is late would measure a kinder
load than it says, so each request's lag is kept. A closed loop has a fixed number of requests with the engine, and sends the next
when one is done. Times are taken where the events are: a token's on the engine's thread, when the engine hands it over.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from flora.engine import FailEvent, FinishEvent
from flora.errors import BusyError, FloraError
from profiling.load_metrics import Record, summary
from profiling.saturation import Saturation, SaturationMonitor
from profiling.traffic import PlannedRequest

if TYPE_CHECKING:
    from flora.engine import Engine, Ticket
    from flora.engine.request import Event

SAMPLE_EVERY_S = 0.25
RATE_WINDOW_S = 1.0  # arrivals and tokens per second are those of the last second
LATENCY_WINDOW_S = 10.0  # recent TTFT and TPOT are those of the last ten
NUM_SAMPLES = 2400  # ten minutes
VERDICT_EVERY = 4  # samples
SETTLE_S = 30.0  # how long a stopped run waits for its requests' last events


@dataclass(frozen=True)
class Sample:
    """A moment of a run. Counts of requests are the driver's own, since its start; what the engines are doing is everybody's."""

    time_s: float  # since the start
    num_sent: int
    outcomes: dict[str, int]  # finished, refused, failed, cancelled
    waiting: dict[str, int]  # by kind
    running: dict[str, int]
    arrivals_per_s: float  # over the last second
    tokens_per_s: float  # new ones, over the last second
    ttft_s: dict[str, float]  # {"mean", "p50", "p90", "p99"} over the last ten seconds; empty where nothing came
    tpot_s: dict[str, float]
    batch: dict[str, dict[str | None, int]]  # kind → adapter, None for none → running requests

    @property
    def num_waiting(self) -> int:
        return sum(self.waiting.values())

    @property
    def num_running(self) -> int:
        return sum(self.running.values())


@dataclass
class _Totals:
    """What engines have counted by a moment."""

    time_s: float
    arrived: int
    tokens: int


@dataclass(eq=False)
class Driver:
    """Sends planned requests to engines, once.

    Follow it with `watch`, which sends everything and yields a sample every `sample_every_s` until all is answered; or `start` it
    in a thread of its own and look at `samples`, from any thread, until `stop`.

    engines: kind → engine. requests: in order of arrival; they may have no end. concurrency: None for an open loop; else a closed
    one with so many requests at once, whose arrival times do not count. planned_rate: the rate the arrival times were planned for,
    which `set_rate` changes. duration_s: nothing is sent after so many seconds; what was sent is still answered. session: on whose
    behalf the engine admits the requests. num_records, num_samples: how many of the last ones are kept; None: all.
    """

    engines: Mapping[str, Engine]
    method: str
    requests: Iterable[PlannedRequest]
    concurrency: int | None = None
    planned_rate: float = 1.0
    duration_s: float | None = None
    session: Hashable = None
    seed: int = 0
    sample_every_s: float = SAMPLE_EVERY_S
    stop_when_saturated: bool = False
    num_records: int | None = None
    num_samples: int | None = NUM_SAMPLES

    records: deque[Record] = field(init=False)
    samples: deque[Sample] = field(init=False)
    saturation: Saturation | None = field(init=False, default=None)  # while it is over-saturated; for good where that stopped it
    started_s: float | None = field(init=False, default=None)  # on time.perf_counter
    ended_s: float | None = field(init=False, default=None)  # since the start: the last answer

    def __post_init__(self) -> None:
        self.records, self.samples = deque(maxlen=self.num_records), deque(maxlen=self.num_samples)
        self._monitor = SaturationMonitor()
        self._condition = threading.Condition()
        self._open: dict[Record, Ticket | None] = {}  # sent and not answered
        self._outcomes: Counter[str] = Counter()
        self._recent: dict[str, deque[tuple[float, float]]] = {"ttft": deque(), "tpot": deque()}  # (time, seconds)
        self._totals: deque[_Totals] = deque()
        self._num_sent = 0
        self._all_sent = self._stopping = False
        self._give_up_s = math.inf  # on time.perf_counter: requests that have not ended by then are unanswered
        self._broken: BaseException | None = None
        self._speed, self._plan_s, self._plan_set_s = 1.0, 0.0, 0.0  # the plan's clock: how fast, how far, and when that was
        self._watcher: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------------------ control

    def start(self) -> None:
        """Run in a thread of its own."""
        self._watcher = threading.Thread(target=self._watch_alone, name="load", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """Send nothing more and cancel what is not answered. Returns at once; `join` waits for the end."""
        with self._condition:
            self._stopping = True
            self._give_up_s = min(self._give_up_s, time.perf_counter() + SETTLE_S)
            tickets = [ticket for ticket in self._open.values() if ticket is not None]
            self._condition.notify_all()
        for ticket in tickets:
            ticket.cancel()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until a started driver has ended; whether it has. Raises what broke it."""
        if self._watcher is not None:
            self._watcher.join(timeout_s)
        if self._broken is not None:
            raise self._broken
        return not self.running

    @property
    def running(self) -> bool:
        """Whether a started driver still works."""
        return self._watcher is not None and self._watcher.is_alive()

    def set_rate(self, rate: float) -> None:
        """From now on so many requests a second: the plan's clock goes faster or slower. Nothing is sent while it is 0."""
        with self._condition:
            now = time.perf_counter()
            self._plan_s, self._plan_set_s = 0.0 if self.started_s is None else self._plan_position(now), now
            self._speed = rate / self.planned_rate
            self._monitor = SaturationMonitor()  # another load begins
            self.saturation = None
            self._condition.notify_all()

    # -------------------------------------------------------------------------------------------------------- watch

    def watch(self) -> Iterator[Sample]:
        """Send everything, yield samples, and end when all is answered or the driver was stopped. Left early, it stops too."""
        with self._condition:
            self.started_s = self._plan_set_s = time.perf_counter()
        sender = threading.Thread(target=self._send_all, name="load generator", daemon=True)
        sender.start()
        try:
            num_samples, done = 0, False
            while not done:
                num_samples += 1
                due_s = self.started_s + num_samples * self.sample_every_s
                with self._condition:
                    done = self._condition.wait_for(self._is_done, timeout=max(0.0, due_s - time.perf_counter()))
                done = done or time.perf_counter() > self._give_up_s
                sample = self._sample()
                self.samples.append(sample)
                if num_samples % VERDICT_EVERY == 0 and self.concurrency is None:
                    self.saturation = self._monitor.verdict()
                if self.saturation and self.stop_when_saturated and not self._stopping:
                    self.stop()
                yield sample
        finally:
            self.stop()
            sender.join()
            with self._condition:
                self._condition.wait_for(self._is_done, timeout=max(0.0, self._give_up_s - time.perf_counter()))
            self.ended_s = max((record.ended_s for record in self.records if record.ended_s is not None), default=0.0)
        if self._broken is not None:
            raise self._broken

    def _watch_alone(self) -> None:
        try:
            for _ in self.watch():
                pass
        except BaseException as error:  # raised again where somebody waits for the driver: `join`
            self._broken = error

    def _is_done(self) -> bool:
        return self._all_sent and not self._open

    def _sample(self) -> Sample:
        snapshots = {kind: engine.snapshot() for kind, engine in self.engines.items()}
        now = self._now()
        self._monitor.add_queue(now, sum(snapshot.waiting for snapshot in snapshots.values()))
        totals = _Totals(
            now,
            sum(snapshot.num_arrived for snapshot in snapshots.values()),
            sum(snapshot.num_tokens for snapshot in snapshots.values()),
        )
        self._totals.append(totals)
        while len(self._totals) > 2 and self._totals[1].time_s <= now - RATE_WINDOW_S:
            self._totals.popleft()
        before = self._totals[0]
        seconds = totals.time_s - before.time_s
        with self._condition:
            recent = {}
            for name, series in self._recent.items():
                while series and series[0][0] < now - LATENCY_WINDOW_S:
                    series.popleft()
                recent[name] = [value for _, value in series]
            num_sent, outcomes = self._num_sent, dict(self._outcomes)
        return Sample(
            time_s=now,
            num_sent=num_sent,
            outcomes=outcomes,
            waiting={kind: snapshot.waiting for kind, snapshot in snapshots.items()},
            running={kind: snapshot.running for kind, snapshot in snapshots.items()},
            arrivals_per_s=(totals.arrived - before.arrived) / seconds if seconds > 0 else 0.0,
            tokens_per_s=(totals.tokens - before.tokens) / seconds if seconds > 0 else 0.0,
            ttft_s=summary(recent["ttft"]),
            tpot_s=summary(recent["tpot"]),
            batch={kind: dict(snapshot.batch) for kind, snapshot in snapshots.items()},
        )

    def _now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started_s

    # --------------------------------------------------------------------------------------------------------- send

    def _send_all(self) -> None:
        try:
            for planned in self.requests:
                if not self._wait_until_due(planned):
                    break
                self._send(planned)
        except BaseException as error:  # raised again by `watch`: nobody looks at this thread
            self._broken = error
        finally:
            with self._condition:
                self._all_sent = True
                self._condition.notify_all()

    def _plan_position(self, now: float) -> float:
        """How far the plan's clock has come; `now` on time.perf_counter."""
        return self._plan_s + (now - self._plan_set_s) * self._speed

    def _wait_until_due(self, planned: PlannedRequest) -> bool:
        """Wait for the request's time, or in a closed loop for a free place; False where it is not to be sent any more."""
        with self._condition:
            while not self._stopping:
                now = time.perf_counter()
                if self.duration_s is not None and now - self.started_s >= self.duration_s:
                    return False
                left_s = None if self.duration_s is None else self.started_s + self.duration_s - now
                if self.concurrency is not None:
                    if len(self._open) < self.concurrency:
                        return True
                    wait_s = None
                else:
                    early_s = planned.arrival_s - self._plan_position(now)
                    if early_s <= 0:
                        return True
                    wait_s = early_s / self._speed if self._speed > 0 else None
                self._condition.wait(min((s for s in (wait_s, left_s) if s is not None), default=None))
        return False

    def _send(self, planned: PlannedRequest) -> None:
        request = planned.request()
        now = time.perf_counter()
        with self._condition:
            # A request that fell due at the plan's old speed is late by what the clock has passed it, at the new one.
            late_s = 0.0 if self.concurrency else max(0.0, (self._plan_position(now) - planned.arrival_s) / (self._speed or 1.0))
            sent_s = now - self.started_s
            record = Record(planned, due_s=sent_s - late_s, sent_s=sent_s)
            self.records.append(record)
            self._open[record] = None
            self._num_sent += 1
            self._monitor.add_sent()
        try:
            ticket = self.engines[planned.kind].submit(
                request,
                self.method,
                session=self.session,
                seed=self.seed,
                index=planned.index,
                listener=partial(self._listen, record),
            )
        except FloraError as error:
            self._settle(record, "refused" if isinstance(error, BusyError) else "failed", error)
            return
        with self._condition:
            if record in self._open:  # it may be answered already
                self._open[record] = ticket
            stopping = self._stopping
        if stopping:
            ticket.cancel()

    def _listen(self, record: Record, event: Event) -> None:
        """An event of one request, on the engine's thread."""
        if isinstance(event, FinishEvent):
            self._settle(record, "cancelled" if event.completion.finish_reason == "cancelled" else "finished")
        elif isinstance(event, FailEvent):
            self._settle(record, "refused" if isinstance(event.error, BusyError) else "failed", event.error)
        else:
            now = self._now()
            record.token_s.append(now)
            if len(record.token_s) == 1:
                self._monitor.add_ttft(record.ttft_s)
                with self._condition:
                    self._recent["ttft"].append((now, record.ttft_s))

    def _settle(self, record: Record, outcome: str, error: FloraError | None = None) -> None:
        now = self._now()
        record.ended_s, record.outcome = now, outcome
        if error is not None:
            record.error, record.message = type(error).__name__, str(error)
        with self._condition:
            del self._open[record]
            self._outcomes[outcome] += 1
            if outcome == "refused":
                self._monitor.add_refused()
            if outcome == "finished" and record.tpot_s is not None:
                self._recent["tpot"].append((now, record.tpot_s))
            self._condition.notify_all()
