"""`python -m profiling soak`: long serving near capacity while everything comes and goes, and what was lost or leaked on the way.

Requests for both models arrive at random at a fraction of the measured capacity. Some are cancelled at a random moment, of some the
reader leaves in the midst of the answer, and meanwhile adapters are added, replaced and removed. Every request has to end in an
answer or in a named error; memory, threads and adapter slots have to be at the end what they were near the start.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import psutil

from flora.engine import FailEvent, FinishEvent
from flora.errors import BusyError, FloraError, RequestError
from profiling import hardware, report
from profiling.compare import checked_methods
from profiling.load import Driver
from profiling.load_runs import servable_by, sources_of
from profiling.loading import load_engine, set_threads
from profiling.traffic import EndlessTraffic, Lengths, PlannedRequest, Traffic, parse_mix

if TYPE_CHECKING:
    from flora.engine import Engine, Ticket
    from flora.engine.request import Event

REPORT_EVERY_S = 60.0
CANCELLED, LEFT, WITH_DEADLINE = 0.10, 0.10, 0.33
"""Shares of requests that are cancelled, whose reader leaves, and that have a deadline, which is far away."""

CANCEL_AFTER_S = 0.5  # on average
CHANGE_ADAPTERS_EVERY_S = 0.5  # on average
SETTLE_S = 60.0
"""How long the last requests may take to end."""

WARM_SHARE = 0.4
"""Of the run, at its start: caches and allocators grow to what the traffic needs, and memory is compared from then on."""

MEMORY_GROWTH = 0.1
"""By how much of itself memory may grow from then to the end: allocators, and a queue that was never as long before."""

MAX_WAITING = 64
"""So few that the queue, with the clips in it, is as long as it can be while the capacity is measured."""

HOST_ADAPTER_BYTES = 1 << 20
"""So little that adapters are read from disk while it serves."""


@dataclass(frozen=True)
class SoakRow:
    """Everything since the start, at one moment."""

    time_s: float
    sent: int
    outcomes: dict[str, int]  # finished, cancelled, refused, or the error's name
    open: int  # sent and not ended
    waiting: int
    running: int
    tokens: int
    adapter_changes: int
    adapter_slots_used: int
    rss_mb: float
    threads: int


class Soak:
    """One run. plan: requests in the order of arrival. Follow it with `run`, which yields a row every `report_every_s` seconds."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        method: str,
        plan: Iterator[PlannedRequest],
        duration_s: float,
        seed: int = 0,
        report_every_s: float = REPORT_EVERY_S,
    ) -> None:
        self.engines, self.method, self.plan, self.duration_s = engines, method, plan, duration_s
        self.report_every_s = report_every_s
        self.rows: list[SoakRow] = []
        self.wrong: list[str] = []  # what is wrong, in words
        self._choose = random.Random(seed)
        self._lock = threading.Lock()
        self._outcomes: Counter[str] = Counter()
        self._open: set[int] = set()
        self._to_cancel: list[tuple[float, int, Ticket]] = []  # a heap: when, number, which
        self._num_sent = self._num_changes = 0
        self._stop = threading.Event()
        self._broken: list[BaseException] = []
        self._process = psutil.Process()
        self._tags = {kind: list(engine.adapters) for kind, engine in engines.items()}
        self._sources = {kind: [list(info.sources) for info in engine.adapters.values()] for kind, engine in engines.items()}

    def run(self) -> Iterator[SoakRow]:
        """Serve for the time given, then judge."""
        started_s = time.perf_counter()
        workers = [threading.Thread(target=self._guard, args=(work,)) for work in (self._send, self._change_adapters)]
        self._started_s = started_s
        for worker in workers:
            worker.start()
        try:
            for number in itertools.count(1):
                due_s = min(number * self.report_every_s, self.duration_s)
                self._stop.wait(max(0.0, started_s + due_s - time.perf_counter()))
                self.rows.append(self._row())
                yield self.rows[-1]
                if self._stop.is_set() or due_s >= self.duration_s:
                    break
        finally:
            self._stop.set()
            for worker in workers:
                worker.join()
        end_s = time.perf_counter() + SETTLE_S
        while self._open and time.perf_counter() < end_s:
            time.sleep(0.01)
        self.rows.append(self._row())
        yield self.rows[-1]
        self._judge()

    def _guard(self, work) -> None:
        try:
            work()
        except BaseException as error:  # told by the verdict: nobody looks at this thread
            self._broken.append(error)
            self._stop.set()

    # --------------------------------------------------------------------------------------------------------- requests

    def _send(self) -> None:
        with ThreadPoolExecutor(8, thread_name_prefix="visitor") as visitors:
            for planned in self.plan:
                if not self._wait_until(self._started_s + planned.arrival_s):
                    return
                fate, number = self._choose.random(), self._num_sent
                self._num_sent += 1
                with self._lock:
                    self._open.add(number)
                leaves_after = self._choose.randint(1, 16) if fate < LEFT else None
                try:
                    ticket = self.engines[planned.kind].submit(
                        planned.request(),
                        self.method,
                        session=self._choose.randrange(8),
                        deadline_s=SETTLE_S if self._choose.random() < WITH_DEADLINE else None,
                        listener=None if leaves_after else partial(self._listen, number),
                    )
                except FloraError as error:
                    self._end(number, "refused" if isinstance(error, BusyError) else type(error).__name__)
                    continue
                if leaves_after:
                    visitors.submit(self._guard, partial(self._visit, number, ticket, leaves_after))
                elif fate < LEFT + CANCELLED:
                    cancel_s = time.perf_counter() + self._choose.expovariate(1 / CANCEL_AFTER_S)
                    heapq.heappush(self._to_cancel, (cancel_s, number, ticket))

    def _wait_until(self, due_s: float) -> bool:
        """Wait for a moment of time.perf_counter and cancel what is to be cancelled until then; False where the run is over."""
        while True:
            now = time.perf_counter()
            while self._to_cancel and self._to_cancel[0][0] <= now:
                heapq.heappop(self._to_cancel)[2].cancel()
            if now >= due_s:
                return not self._stop.is_set()
            next_s = min(due_s, self._to_cancel[0][0]) if self._to_cancel else due_s
            if self._stop.wait(next_s - now):
                return False

    def _visit(self, number: int, ticket: Ticket, leaves_after: int) -> None:
        try:
            for seen, _ in enumerate(ticket, start=1):
                if seen == leaves_after:
                    break
            completion = ticket.result(SETTLE_S)
        except FloraError as error:
            self._end(number, type(error).__name__)
        except TimeoutError:
            return  # it stays open, and that is told
        else:
            self._end(number, "cancelled" if completion.finish_reason == "cancelled" else "finished")

    def _listen(self, number: int, event: Event) -> None:
        if isinstance(event, FinishEvent):
            self._end(number, "cancelled" if event.completion.finish_reason == "cancelled" else "finished")
        elif isinstance(event, FailEvent):
            self._end(number, type(event.error).__name__)

    def _end(self, number: int, outcome: str) -> None:
        with self._lock:
            self._open.remove(number)
            self._outcomes[outcome] += 1

    # --------------------------------------------------------------------------------------------------------- adapters

    def _change_adapters(self) -> None:
        """Replace a tag, or remove one, which is added again by the next change; who asks for it meanwhile fails by name."""
        choose = random.Random(self._choose.random())
        kinds = [kind for kind, tags in self._tags.items() if tags]
        while kinds and not self._stop.wait(choose.expovariate(1 / CHANGE_ADAPTERS_EVERY_S)):
            kind = choose.choice(kinds)
            engine, tags = self.engines[kind], self._tags[kind]
            missing = [tag for tag in tags if tag not in engine.adapters]
            tag = choose.choice(missing or tags)
            if not missing and choose.random() < 0.3:
                engine.remove_adapter(tag)
            else:
                engine.add_adapter(tag, choose.choice(self._sources[kind]))
            self._num_changes += 1

    # ---------------------------------------------------------------------------------------------------------- account

    def _row(self) -> SoakRow:
        snapshots = [engine.snapshot() for engine in self.engines.values()]
        with self._lock:
            outcomes, num_open = dict(sorted(self._outcomes.items())), len(self._open)
        return SoakRow(
            time_s=time.perf_counter() - self._started_s,
            sent=self._num_sent,
            outcomes=outcomes,
            open=num_open,
            waiting=sum(snapshot.waiting for snapshot in snapshots),
            running=sum(snapshot.running for snapshot in snapshots),
            tokens=sum(snapshot.num_tokens for snapshot in snapshots),
            adapter_changes=self._num_changes,
            adapter_slots_used=sum(snapshot.adapter_slots_used for snapshot in snapshots),
            rss_mb=self._process.memory_info().rss / 2**20,
            threads=self._process.num_threads(),
        )

    def _judge(self) -> None:
        wrong, last = self.wrong, self.rows[-1]
        wrong += [f"the run broke ({type(error).__name__}: {error})" for error in self._broken]
        if last.open:
            wrong.append(f"{last.open} of {last.sent} requests never ended")
        if sum(last.outcomes.values()) + last.open != last.sent:
            wrong.append(f"{last.sent} requests were sent and {sum(last.outcomes.values())} ended")
        if last.waiting or last.running:
            wrong.append(f"{last.waiting} requests wait and {last.running} run, though all have ended")
        warm = [row for row in self.rows if row.time_s >= WARM_SHARE * self.duration_s]
        if len(warm) > 2:
            growth = _slope([row.time_s for row in warm], [row.rss_mb for row in warm]) * (warm[-1].time_s - warm[0].time_s)
            if growth > MEMORY_GROWTH * warm[0].rss_mb:
                wrong.append(f"memory grew by {growth:.0f} MB, from {warm[0].rss_mb:.0f} MB, after the first part of the run")
            if last.threads > max(row.threads for row in warm[: len(warm) // 2 + 1]):
                wrong.append(f"there are {last.threads} threads, and were {warm[0].threads}")
        for kind, engine in self.engines.items():
            for tag in list(engine.adapters):
                engine.remove_adapter(tag)
            if engine.bank.slots_used:  # what nobody uses is gone with its tag
                wrong.append(f"{engine.bank.slots_used} adapter slots of the {kind} model are held by requests that have ended")


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(x, y, 1)[0])


def capacity(engines: Mapping[str, Engine], method: str, plan: Iterator[PlannedRequest], seconds: float, concurrency: int) -> float:
    """Requests a second that the engines finish when there are always more: measured for so many seconds, after a warm-up."""
    driver = Driver(engines, method, plan, concurrency=concurrency, duration_s=seconds)
    for _ in driver.watch():
        pass
    ends = sorted(record.ended_s for record in driver.records if record.outcome == "finished" and record.ended_s <= seconds)
    counted = [end_s for end_s in ends if end_s >= seconds / 4]
    if not counted:
        raise RequestError("no request was done while the capacity was measured: allow it more seconds with --calibrate")
    return len(counted) / (seconds * 3 / 4)


def run(options: argparse.Namespace) -> int:
    """Measure the capacity, serve, print and write; 0 where nothing was lost or leaked, 1 otherwise. FloraError for bad input."""
    for name, most in (("minutes", 10_000), ("load", 2), ("calibrate", 3600)):
        if not 0 < getattr(options, name) <= most:
            raise RequestError(f"--{name} must be a number above 0 and at most {most}, not {getattr(options, name):g}")
    checked_methods([options.method])
    mix = parse_mix(options.mix)
    set_threads(options.threads)
    engines: dict[str, Engine] = {}
    try:
        for kind in mix:
            engines[kind] = load_engine(
                kind,
                options,
                max_batch_size=options.max_batch_size,
                adapter_slots=options.adapter_slots,
                host_adapter_bytes=HOST_ADAPTER_BYTES,
                max_waiting=MAX_WAITING,
            )
        facts = hardware.environment(engines)
        print(hardware.summary(facts), flush=True)
        adapters, sources = servable_by(engines, [options.method]), sources_of(engines)
        traffic = Traffic(new_tokens=Lengths.parse(options.new_tokens), popularity="zipf:1.5", mix=mix, seed=options.seed)
        concurrency = MAX_WAITING
        measured = capacity(engines, options.method, EndlessTraffic(traffic, sources, adapters), options.calibrate, concurrency)
        rate = options.load * measured
        print(f"capacity {measured:.2f} requests/s; serving {rate:.2f} for {options.minutes:g} min", flush=True)
        plan = EndlessTraffic(replace(traffic, rate=rate, seed=options.seed + 1), sources, adapters)
        soak = Soak(engines, options.method, plan, 60 * options.minutes, options.seed, min(REPORT_EVERY_S, 6 * options.minutes))
        for row in soak.run():
            print(text_of(row), flush=True)
    finally:
        for engine in engines.values():
            engine.close(timeout_s=0.0)
    for sentence in soak.wrong:
        print(f"wrong: {sentence}", file=sys.stderr)
    if not soak.wrong:
        print(f"nothing lost, nothing leaked: {soak.rows[-1].sent} requests, {soak.rows[-1].adapter_changes} adapter changes")
    if options.json:
        shared = {"method": options.method, "load": options.load, "capacity": measured, "rate": rate, "seed": options.seed}
        lines = [json.dumps({**asdict(row), **shared, "wrong": soak.wrong, "environment": facts}) for row in soak.rows]
        report.write_text(options.json, "\n".join(lines) + "\n")
    return 1 if soak.wrong else 0


def text_of(row: SoakRow) -> str:
    """One line."""
    outcomes = "  ".join(f"{name} {count}" for name, count in row.outcomes.items())
    return (
        f"{row.time_s:7.0f} s  sent {row.sent}  {outcomes}  open {row.open}  waiting {row.waiting}  running {row.running}  "
        f"adapter changes {row.adapter_changes}  slots {row.adapter_slots_used}  {row.rss_mb:.0f} MB  threads {row.threads}"
    )
