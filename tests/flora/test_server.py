"""One engine, many callers: in line, cancelled, late, refused, shut down, forked; and adapters that change meanwhile."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

import flora
from flora import Engine, Request
from flora.engine import FailEvent, FinishEvent, Ticket, TokenEvent, server
from flora.errors import BusyError, DeadlineError, RequestError, ServingError, UnknownAdapterError

PATIENCE_S = 30.0


def ask(prompt: str = "def f(", adapter: str | None = None, length: int = 8) -> Request:
    return Request(prompt, adapter=adapter, max_new_tokens=length, ignore_eos=True)


class Held:
    """Decode steps wait until they are let go."""

    def __init__(self, engine: Engine, monkeypatch) -> None:
        self.gate, self.num_steps, decode = threading.Event(), 0, engine.runner.decode

        def held(*args):
            assert self.gate.wait(PATIENCE_S), "nobody let the step go"
            self.num_steps += 1
            return decode(*args)

        monkeypatch.setattr(engine.runner, "decode", held)

    def let_go(self) -> None:
        self.gate.set()


def until(condition) -> None:
    end = time.perf_counter() + PATIENCE_S
    while not condition():
        assert time.perf_counter() < end, "it does not come"
        time.sleep(0.001)


def assert_at_rest(engine: Engine) -> None:
    """Nothing runs, waits, is pinned or unaccounted for."""
    until(lambda: not engine._server._tickets)
    snapshot = engine.snapshot()
    assert (snapshot.waiting, snapshot.running, snapshot.batch) == (0, 0, {})
    assert snapshot.num_arrived == snapshot.num_finished + snapshot.num_failed + snapshot.num_cancelled
    assert not engine.bank._users


@pytest.fixture
def make(checkpoints):
    """options → an engine, closed at the end. Its decode steps run as they are: tests stand in their way."""
    made = []

    def make(*tags: str, **options) -> Engine:
        made.append(checkpoints["code"].engine(*tags, capture_steps=False, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close(0)
        assert_at_rest(engine)


def tokens(tiny_engines, *requests: Request, method: str = "flora") -> list[list[int]]:
    return [tiny_engines["code"].generate([request], method)[0].token_ids for request in requests]


# --------------------------------------------------------------------------------------------------------------- tickets


def test_a_ticket_tells_tokens_then_the_end_and_when(make, tiny_engines):
    ticket = make().submit(ask(adapter="aa"))
    *told, last = ticket
    assert all(isinstance(event, TokenEvent) for event in told) and isinstance(last, FinishEvent)
    (expected,) = tokens(tiny_engines, ask(adapter="aa"))
    assert [event.token_id for event in told] == expected == ticket.token_ids == last.completion.token_ids
    assert ticket.state == "done" and ticket.completion is last.completion is ticket.result() and ticket.error is None
    times = ticket.times
    assert times.arrival_s <= times.admitted_s <= times.token_s[0] and times.token_s[-1] <= times.finished_s
    assert len(times.token_s) == len(ticket.chosen_logits) == 8
    assert last.completion.ttft_s == times.token_s[0] - times.arrival_s
    ticket.cancel()
    assert ticket.result().finish_reason == "length", "it was done before it was cancelled"


def test_whoever_iterates_again_comes_to_the_end(make):
    ticket = make().submit(ask(length=3))
    assert len(list(ticket)) == 4
    assert [type(event) for event in ticket] == [FinishEvent]
    failed = make("aa").submit(ask(adapter="aa"))
    failed._server.close(0)
    for _ in range(2):
        with pytest.raises(ServingError, match="shut down"):
            list(failed)


def test_a_listener_gets_the_events_and_nobody_waits_for_them_in_vain(make):
    told = []
    ticket = make().submit(ask(length=3), listener=told.append, index=7)
    with pytest.raises(RequestError, match="go to its listener"):
        iter(ticket)
    ticket.result(PATIENCE_S)
    assert [type(event) for event in told] == [TokenEvent] * 3 + [FinishEvent]
    assert {event.index for event in told} == {7}


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_a_listener_that_raises_harms_nobody(error, make, tiny_engines):
    def faulty(event):
        raise error("a fault of the listener's")

    engine = make()
    with_fault, other = engine.submit(ask(adapter="aa"), listener=faulty), engine.submit(ask(adapter="bb"))
    expected = tokens(tiny_engines, ask(adapter="aa"), ask(adapter="bb"))
    assert [with_fault.result(PATIENCE_S).token_ids, other.result(PATIENCE_S).token_ids] == expected


def test_result_waits_no_longer_than_it_is_told(make, monkeypatch):
    engine = make()
    held = Held(engine, monkeypatch)
    ticket = engine.submit(ask())
    with pytest.raises(TimeoutError, match=r"not done after 0.01 s"):
        ticket.result(0.01)
    held.let_go()
    assert len(ticket.result(PATIENCE_S).token_ids) == 8


# ---------------------------------------------------------------------------------------------------------------- cancel


def test_cancel_before_while_and_after_it_runs(make, monkeypatch, tiny_engines):
    engine = make(max_batch_size=2)
    held = Held(engine, monkeypatch)
    with engine.exclusive():  # all are there when the first step begins
        stays, runs, waits = (engine.submit(ask(adapter=tag)) for tag in ("aa", "bb", "cc"))
    until(lambda: len(stays.token_ids) == len(runs.token_ids) == 1)
    assert (stays.state, runs.state, waits.state) == ("running", "running", "waiting")
    waits.cancel()
    runs.cancel()
    runs.cancel()
    held.let_go()
    cancelled = [waits.result(PATIENCE_S), runs.result(PATIENCE_S)]
    assert [completion.finish_reason for completion in cancelled] == ["cancelled", "cancelled"]
    assert (cancelled[0].token_ids, cancelled[0].ttft_s, waits.times.admitted_s) == ([], 0.0, None)
    running, staying = tokens(tiny_engines, ask(adapter="bb"), ask(adapter="aa"))
    assert cancelled[1].token_ids == running[: len(cancelled[1].token_ids)] and len(cancelled[1].token_ids) < 8
    assert stays.result(PATIENCE_S).token_ids == staying
    stays.cancel()
    assert engine.submit(ask(adapter="cc", length=2)).result(PATIENCE_S).finish_reason == "length"
    assert engine.snapshot().num_cancelled == 2


def test_leaving_the_iteration_early_cancels(make, monkeypatch):
    engine = make()
    held = Held(engine, monkeypatch)
    ticket = engine.submit(ask())
    for event in ticket:
        assert event.num_new_tokens == 1
        break
    held.let_go()
    assert ticket.result(PATIENCE_S).finish_reason == "cancelled" and 1 <= len(ticket.token_ids) < 8


# -------------------------------------------------------------------------------------------------------- too late, busy


def test_deadlines_of_requests_that_wait_and_that_run(make, monkeypatch):
    engine = make(max_batch_size=1)
    held, late_s = Held(engine, monkeypatch), 0.0
    monkeypatch.setattr(server, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + late_s))
    runs = engine.submit(ask("def g("), deadline_s=60)
    waits, later = engine.submit(ask(), deadline_s=60), engine.submit(ask(), deadline_s=600)
    until(lambda: runs.token_ids)
    late_s = 90.0
    held.let_go()
    with pytest.raises(DeadlineError, match=r"^the request had [12] tokens after \d{2,3}\.\d s, its deadline: allow it more time$"):
        runs.result(PATIENCE_S)
    with pytest.raises(DeadlineError, match="had 0 tokens"):
        waits.result(PATIENCE_S)
    assert len(later.result(PATIENCE_S).token_ids) == 8
    assert engine.snapshot().num_failed == 2


@pytest.mark.parametrize("deadline_s", [0, -1, float("nan")])
def test_a_deadline_in_the_past_is_refused(deadline_s, make):
    with pytest.raises(RequestError, match="deadline_s must be more than 0 seconds"):
        make("aa").submit(ask(), deadline_s=deadline_s)


@pytest.mark.parametrize("session", [[], ("a", {})])
def test_a_session_that_nobody_can_look_up_is_refused(session, make):
    engine = make("aa")
    with pytest.raises(RequestError, match="session must be hashable"):
        engine.submit(ask(), session=session)
    assert len(engine.generate([ask()])[0].token_ids) == 8


def test_a_full_queue_says_that_it_is_busy(make, monkeypatch):
    engine = make(max_batch_size=1, max_waiting=2)
    held = Held(engine, monkeypatch)
    first = engine.submit(ask())
    until(lambda: first.state == "running")
    waiting = [engine.submit(ask()) for _ in range(2)]
    with pytest.raises(BusyError, match="the engine is busy, 2 requests wait already"):
        engine.submit(ask())
    with pytest.raises(BusyError):
        engine.generate([ask()])
    assert engine.snapshot().waiting == 2
    held.let_go()
    assert all(len(ticket.result(PATIENCE_S).token_ids) == 8 for ticket in [first, *waiting])
    assert len(engine.generate([ask()])) == 1


def test_a_long_list_goes_through_a_short_queue(make, tiny_engines):
    engine = make(max_batch_size=4, max_waiting=5)
    requests = [ask("x" * (1 + place % 7), ("aa", "bb", None)[place % 3], 1 + place % 2) for place in range(300)]
    answers = [completion.token_ids for completion in engine.generate(requests)]
    distinct = list(dict.fromkeys(requests))
    expected = dict(zip(distinct, tokens(tiny_engines, *distinct), strict=True))
    assert answers == [expected[request] for request in requests]


# -------------------------------------------------------------------------------------------------------------- fairness


def test_nobody_fills_the_line(make, monkeypatch):
    """Of s sessions in line each may have an (s + 1)-th of it: whoever comes next finds room."""
    engine = make(max_batch_size=1, max_waiting=12)
    held = Held(engine, monkeypatch)
    running = engine.submit(ask())
    until(lambda: running.state == "running")
    tickets = []
    for session, share in (("a", 6), ("b", 4), ("c", 2)):  # of the last one's 3, the first two left 2
        with pytest.raises(BusyError) as refused:
            for _ in range(12):
                tickets.append(engine.submit(ask(length=1), session=session))
        assert engine.snapshot().waiting == len(tickets)
        assert sum(ticket._row.session == session for ticket in tickets) == share
        if session != "c":
            assert f"{share} of your requests wait already and your share of the line is {share}" in str(refused.value)
    held.let_go()
    assert [ticket.result(PATIENCE_S).finish_reason for ticket in tickets] == ["length"] * 12
    assert engine.submit(ask(length=1), session="a").result(PATIENCE_S).finish_reason == "length"


def test_a_list_goes_through_beside_a_crowd(make, monkeypatch):
    """Where the line has no room for all that a list would send at once, it goes on with what is taken."""
    engine = make(max_batch_size=4, max_waiting=8)
    held = Held(engine, monkeypatch)
    crowd = [engine.submit(ask(length=3), session="crowd") for _ in range(4)]
    answers = engine.stream([ask(length=2) for _ in range(20)])
    held.let_go()
    assert sum(isinstance(event, FinishEvent) for event in answers) == 20
    assert all(ticket.result(PATIENCE_S).finish_reason == "length" for ticket in crowd)


def test_a_crowd_does_not_keep_out_who_asks_once(make, monkeypatch):
    engine = make(max_batch_size=1)
    held = Held(engine, monkeypatch)
    ends: list[str] = []

    def note(who: str):
        return lambda event: ends.append(who) if isinstance(event, FinishEvent) else None

    crowd = [engine.submit(ask(length=2), session="crowd", listener=note("crowd")) for _ in range(12)]
    one = [engine.submit(ask(length=2), session="one", listener=note("one")) for _ in range(2)]
    held.let_go()
    for ticket in [*crowd, *one]:
        ticket.result(PATIENCE_S)
    assert ends.count("crowd") == 12 and [place for place, who in enumerate(ends) if who == "one"] in ([1, 3], [2, 4])


def test_a_full_slot_set_lets_others_pass_and_starves_nobody(make, monkeypatch):
    """One slot, held by long answers: those without adapter pass the one that waits for it, which has its turn in the end."""
    engine = make(adapter_slots=1, max_batch_size=2)
    order: list[str] = []
    sent = threading.Event()
    prefill = engine.runner.prefill
    monkeypatch.setattr(engine.runner, "prefill", lambda *args: (sent.wait(PATIENCE_S), prefill(*args))[1])

    def send(name: str, adapter: str | None, length: int) -> Ticket:
        return engine.submit(
            ask(adapter=adapter, length=length), listener=lambda e: order.append(name) if isinstance(e, FinishEvent) else None
        )

    first, stuck = send("first", "aa", 6), send("stuck", "bb", 2)
    others = [send("other", None, 1) for _ in range(8)]
    same = [send("same", "aa", 6) for _ in range(6)]
    sent.set()
    for ticket in [first, stuck, *others, *same]:
        ticket.result(PATIENCE_S)
    assert order.index("other") < order.index("first") < order.index("stuck"), "the queue stood still behind its head"
    assert "same" in order[order.index("stuck") :], f"it had to wait for all that had the slot: {order}"


def test_merged_serves_one_adapter_after_another(make, monkeypatch, tiny_engines):
    engine = make()
    batches: list[set[str | None]] = []
    decode = engine.runner.decode

    def watched(*args):
        batches.append(set(engine.snapshot().batch))
        return decode(*args)

    monkeypatch.setattr(engine.runner, "decode", watched)
    requests = [ask(adapter=tag, length=3 + place) for place, tag in enumerate(("aa", "bb", None, "aa", "cc", "bb"))]
    tickets = [engine.submit(request, "merged") for request in requests]
    answers = [ticket.result(PATIENCE_S).token_ids for ticket in tickets]
    assert answers == tokens(tiny_engines, *requests, method="merged")
    assert all(len(batch) == 1 for batch in batches) and len(set.union(*batches)) == 4


# -------------------------------------------------------------------------------------------------- adapters that change


@pytest.mark.parametrize("method", ["flora", "merged"])
def test_an_adapter_replaced_meanwhile(method, make, checkpoints, monkeypatch, tiny_engines):
    """Who runs with it finishes with the old one, who waits gets the new one, beside it or after it."""
    engine = make("aa", "bb", max_batch_size=2)
    held = Held(engine, monkeypatch)
    with engine.exclusive():  # both are there when the first step begins
        runs = engine.submit(ask("def g(", "aa"), method)
        other = engine.submit(ask(adapter="bb" if method == "flora" else "aa", length=3), method)
    until(lambda: runs.token_ids and other.token_ids)
    waits = engine.submit(ask(adapter="aa"), method)
    changing = threading.Thread(target=engine.add_adapter, args=("aa", list(checkpoints["code"].adapters["cc"].values())))
    changing.start()
    until(lambda: len(engine._turns._line) > 0)  # it asks for its turn, between two steps
    held.let_go()
    changing.join()
    (old, new) = tokens(tiny_engines, ask("def g(", "aa"), ask(adapter="cc"), method=method)
    assert runs.result(PATIENCE_S).token_ids == old
    assert waits.result(PATIENCE_S).token_ids == new
    assert engine.submit(ask(adapter="aa"), method).result(PATIENCE_S).token_ids == new


def test_an_adapter_removed_meanwhile(make, monkeypatch, tiny_engines):
    engine = make("aa", "bb", max_batch_size=1)
    held = Held(engine, monkeypatch)
    runs, waits, other = (engine.submit(ask(adapter=tag)) for tag in ("aa", "aa", "bb"))
    until(lambda: runs.token_ids)
    removing = threading.Thread(target=engine.remove_adapter, args=("aa",))
    removing.start()
    until(lambda: len(engine._turns._line) > 0)
    held.let_go()
    removing.join()
    assert [runs.result(PATIENCE_S).token_ids, other.result(PATIENCE_S).token_ids] == tokens(
        tiny_engines, ask(adapter="aa"), ask(adapter="bb")
    )
    with pytest.raises(UnknownAdapterError, match="unknown adapter 'aa'; loaded: bb"):
        waits.result(PATIENCE_S)
    assert waits.times.admitted_s is None


# --------------------------------------------------------------------------------------------------------------- the end


def test_closing_lets_what_is_there_finish(make):
    engine = make(max_batch_size=2)
    tickets = [engine.submit(ask(adapter=tag)) for tag in ("aa", "bb", "cc", None)]
    engine.close(PATIENCE_S)
    assert [len(ticket.completion.token_ids) for ticket in tickets] == [8] * 4
    assert not engine._server._thread.is_alive()
    with pytest.raises(BusyError, match="shutting down"):
        engine.submit(ask())
    with pytest.raises(BusyError, match="shutting down"):
        engine.generate([ask()])
    engine.close()


def test_closing_fails_by_name_what_takes_too_long(make, monkeypatch):
    engine = make(max_batch_size=1)
    held = Held(engine, monkeypatch)
    runs, waits = engine.submit(ask("def g(", "aa")), engine.submit(ask(adapter="bb"))
    until(lambda: runs.token_ids)

    def let_go_too_late() -> None:
        until(lambda: engine._server._closing_s is not None and time.perf_counter() >= engine._server._closing_s)
        held.let_go()

    threading.Thread(target=let_go_too_late).start()
    engine.close(0.02)
    for ticket in (runs, waits):
        with pytest.raises(ServingError, match="shut down before the request was done"):
            ticket.result(0)


def test_a_list_that_was_taken_is_finished_while_the_engine_shuts_down(make, monkeypatch):
    engine = make()
    held = Held(engine, monkeypatch)
    answers = []
    generating = threading.Thread(target=lambda: answers.extend(engine.generate([ask(), ask(adapter="aa")])))
    generating.start()
    until(lambda: engine.snapshot().running == 2)

    def let_go_in_time() -> None:
        until(lambda: engine._server._closing_s is not None)
        held.let_go()

    threading.Thread(target=let_go_in_time).start()
    engine.close(PATIENCE_S)
    generating.join(PATIENCE_S)
    assert [len(completion.token_ids) for completion in answers] == [8, 8]


def test_an_engine_that_is_forgotten_is_gone(checkpoints, monkeypatch):
    """Its thread ends when it has been idle, and keeps it no longer."""
    monkeypatch.setattr(server, "IDLE_S", 0.05)
    engine = checkpoints["code"].engine("aa")
    for _ in range(2):  # the thread begins again after it ended
        assert len(engine.generate([ask(adapter="aa")])[0].token_ids) == 8
        until(lambda engine=engine: engine._server._thread is None)
    assert engine._server.cores == [], "caches are kept though nobody runs"
    forgotten = weakref.ref(engine)
    del engine
    gc.collect()
    assert forgotten() is None


def test_the_interpreter_ends_while_requests_run(checkpoints):
    program = (
        "from flora import Engine, Request; "
        f"engine = Engine.from_pretrained({str(checkpoints['code'].model)!r}, device='cpu'); "
        "tickets = [engine.submit(Request('x', max_new_tokens=90, ignore_eos=True), 'base') for _ in range(200)]; "
        "next(iter(tickets[0]))"
    )
    root = Path(flora.__file__).parent.parent
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-500:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_serves_on_its_own(make, tiny_engines):
    """Forked while requests run: the child has neither them nor their pins, and the parent goes on."""
    engine = make(adapter_slots=2)
    (expected,) = tokens(tiny_engines, ask(adapter="cc"))
    with engine.exclusive():  # both are there when the first step begins
        tickets = [engine.submit(ask(adapter=tag, length=60)) for tag in ("aa", "bb")]
    until(lambda: all(ticket.token_ids for ticket in tickets))
    child = os.fork()
    if child == 0:  # no assertion may leave this branch
        try:
            at_rest = not engine.bank._users and engine.snapshot().running == 0 and engine.snapshot().waiting == 0
            right = engine.generate([ask(adapter="cc")])[0].token_ids == expected
            engine.close()
            os._exit(0 if at_rest and right else 3)
        finally:
            os._exit(4)
    assert [len(ticket.result(PATIENCE_S).token_ids) for ticket in tickets] == [60, 60]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert engine.generate([ask(adapter="cc")])[0].token_ids == expected


# ------------------------------------------------------------------------------------------------- a fault of the engine


def test_a_step_that_breaks_fails_what_ran_by_name_and_the_engine_goes_on(make, monkeypatch, tiny_engines):
    engine = make(max_batch_size=2)
    core_class = server.Core
    step, broken = core_class.step, []

    def faulty(core):
        told = step(core)
        if not broken and any(len(row.token_ids) == 3 for row in core.running):
            broken.append(True)
            raise KeyError("a fault of the engine's")
        return told

    monkeypatch.setattr(core_class, "step", faulty)
    events: list[object] = []
    with engine.exclusive():  # all are there when the first step begins
        tickets = [engine.submit(ask(adapter=tag)) for tag in ("aa", "bb", "cc")]
        listening = engine.submit(ask(), listener=events.append)
    for ticket in [*tickets, listening]:
        with pytest.raises(ServingError, match=r"^the engine failed while the request ran \(KeyError\): send it again$"):
            ticket.result(PATIENCE_S)
        assert ticket.times.finished_s is not None
    assert isinstance(events[-1], FailEvent)
    assert engine.snapshot().num_failed == 4
    assert engine.generate([ask(adapter="cc")])[0].token_ids == tokens(tiny_engines, ask(adapter="cc"))[0]
    assert_at_rest(engine)


def test_a_step_that_breaks_loses_no_token_that_it_had_told(make, monkeypatch):
    engine = make()
    step = server.Core.step

    def faulty(core):
        step(core)
        raise KeyError("a fault of the engine's")

    monkeypatch.setattr(server.Core, "step", faulty)
    events = []
    with pytest.raises(ServingError):
        engine.submit(ask(), listener=events.append).result(PATIENCE_S)
    assert [type(event) for event in events] == [TokenEvent, FailEvent]


def test_no_request_is_lost_where_one_cannot_be_taken_in(make, monkeypatch):
    engine = make("aa")
    make_core, attempts = engine._server._make_core, []

    def faulty(method: str):
        attempts.append(method)
        if method == "base":
            raise MemoryError
        return make_core(method)

    monkeypatch.setattr(engine._server, "_make_core", faulty)
    held = Held(engine, monkeypatch)
    before = engine.submit(ask("def g(", "aa"))
    until(lambda: before.token_ids)
    refused, after = engine.submit(ask(), "base"), engine.submit(ask(adapter="aa"))
    held.let_go()
    with pytest.raises(ServingError, match=r"the engine failed while the request ran \(MemoryError\)"):
        refused.result(PATIENCE_S)
    assert len(after.result(PATIENCE_S).token_ids) == 8
    with pytest.raises(ServingError):
        before.result(PATIENCE_S)


def test_counts_add_up_while_it_serves(make):
    """At every moment somebody looks, and at the end to the last request."""
    engine, stop, seen = make(max_batch_size=3), threading.Event(), []

    def look():
        while not stop.is_set():
            seen.append(engine.snapshot())
            for generation in [engine.start([ask(length=1)])]:
                generation.close()

    looking = threading.Thread(target=look)
    looking.start()
    tickets = [engine.submit(ask(adapter=tag, length=length)) for length in range(1, 9) for tag in ("aa", "bb", None)]
    for ticket in tickets[::5]:
        ticket.cancel()
    ends = Counter(ticket.result(PATIENCE_S).finish_reason for ticket in tickets)
    stop.set()
    looking.join()
    assert all(0 <= snapshot.running <= 4 and 0 <= snapshot.waiting <= len(tickets) for snapshot in seen)
    assert all(sum(snapshot.batch.values()) == snapshot.running for snapshot in seen)
    assert [snapshot.num_tokens for snapshot in seen] == sorted(snapshot.num_tokens for snapshot in seen)
    last = engine.snapshot()
    assert (last.num_finished, last.num_tokens) == (ends["length"], sum(len(ticket.token_ids) for ticket in tickets))


# ----------------------------------------------------------------------------------------------------------- two engines


def test_two_engines_on_one_device_take_turns(checkpoints, tiny_engines, monkeypatch):
    """Never two forwards at once, and neither waits for the other's whole answer."""
    engines = [checkpoints["code"].engine("aa", capture_steps=False) for _ in range(2)]
    inside, steps = [], []
    for place, engine in enumerate(engines):

        def watched(*args, place=place, decode=engine.runner.decode):
            inside.append(place)
            assert len(inside) == 1, "two forwards at once"
            steps.append(place)
            time.sleep(0.001)
            inside.remove(place)
            return decode(*args)

        monkeypatch.setattr(engine.runner, "decode", watched)
    (expected,) = tokens(tiny_engines, ask(adapter="aa", length=30))
    with engines[0].exclusive():  # the device's, not the engine's: both have their request when the first step begins
        tickets = [engine.submit(ask(adapter="aa", length=30)) for engine in engines]
    assert [ticket.result(PATIENCE_S).token_ids for ticket in tickets] == [expected, expected]
    switches = sum(a != b for a, b in zip(steps, steps[1:], strict=False))
    assert switches > 20, f"they do not take turns: {switches} switches in {len(steps)} steps"
    for engine in engines:
        engine.close()


def test_a_batch_that_is_dropped_while_the_device_is_busy_is_closed_by_the_next_step(make):
    engine = make("aa", adapter_slots=1)
    own = engine.start([ask(adapter="aa")])
    own.step()
    with engine.exclusive():  # as a finaliser finds it that runs amid somebody's step
        del own
        gc.collect()
        assert engine.bank._users, "it was closed while somebody had the device"
    engine.submit(ask()).result(PATIENCE_S)
    assert not engine.bank._users, "its slot is lost to all others"


def test_an_end_that_a_fault_kept_from_its_caller_is_told_all_the_same(checkpoints, monkeypatch):
    """The engine's own fault comes after a request has ended and before its caller hears of it: nobody waits for ever."""
    engine = checkpoints["code"].engine()
    tell, broken = server.Server._tell, []

    def breaks_once(self, told):
        if any(isinstance(event, FinishEvent) for _, event in told) and not broken:
            broken.append(told)
            raise RuntimeError("a fault of the engine's own")
        tell(self, told)

    monkeypatch.setattr(server.Server, "_tell", breaks_once)
    with engine.exclusive():  # both are there when the first step begins, so the first one ends while the second runs
        tickets = [engine.submit(ask(length=count)) for count in (2, 8)]
    assert len(tickets[0].result(PATIENCE_S).token_ids) == 2 and broken
    with pytest.raises(ServingError, match="the engine failed while the request ran"):
        tickets[1].result(PATIENCE_S)
    assert engine.generate([ask(length=2)])[0].finish_reason == "length"
    engine.close(0)


@pytest.mark.parametrize("deadline_s", [60.0, math.inf])
def test_deadlines_of_requests_that_have_ended_are_dropped(deadline_s, checkpoints):
    engine = checkpoints["code"].engine(max_waiting=1000)
    for _ in range(3):
        for ticket in [engine.submit(Request("x", max_new_tokens=1), deadline_s=deadline_s) for _ in range(100)]:
            ticket.result(60)
    assert len(engine._server._deadlines) <= 2 * 100 + server.KEPT_DEADLINES
    engine.generate([Request("x", max_new_tokens=2)])
    assert len(engine._server._deadlines) <= server.KEPT_DEADLINES * (deadline_s < math.inf)
    engine.close(0)


def test_a_ticket_keeps_no_clip_on_the_device(checkpoints, clips):
    engine = checkpoints["speech"].engine()
    tickets = [engine.submit(Request(audio=clips[0], sampling_rate=16000, max_new_tokens=count)) for count in (3, 30)]
    tickets[0].result(60)
    tickets[1].cancel()
    tickets[1].result(60)
    assert all(ticket._row.encoded.features is None for ticket in tickets)
    engine.close(0)
