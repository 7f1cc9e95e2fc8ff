"""The driver: what it sends, when, to whom, and what it says of it."""

import math
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from fake_serving import ServingEngine, adapters

from profiling import load
from profiling.load import Driver
from profiling.saturation import Saturation
from profiling.traffic import Clip, Clips, EndlessTraffic, Lengths, PlannedRequest, Prompt, Prompts, Traffic


@pytest.fixture
def engine():
    engine = ServingEngine(adapters=adapters("lua", "rb"))
    yield engine
    engine.close()


def planned(num, interval_s=0.0, adapter="lua", tokens=3, kind="code"):
    asked = Prompt("x", 2, 3) if kind == "code" else Clip("c", 3, samples=np.zeros(4, np.float32))
    return [PlannedRequest(index, index * interval_s, kind, adapter, asked, tokens) for index in range(num)]


def outcomes(driver):
    return Counter(record.outcome for record in driver.records)


def wait_until(condition, seconds=20.0):
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "it never came"
        time.sleep(0.002)


def test_every_request_is_sent_once_in_order_and_answered(engine):
    driver = Driver({"code": engine}, "flora", planned(20), session="me", sample_every_s=0.01)
    samples = list(driver.watch())
    assert [one.index for one in engine.submitted] == list(range(20))
    assert {(one.method, one.session) for one in engine.submitted} == {("flora", "me")}
    assert outcomes(driver) == {"finished": 20} and samples[-1].outcomes == {"finished": 20} and samples[-1].num_sent == 20
    for record in driver.records:
        assert len(record.token_s) == 3 and record.sent_s <= record.token_s[0] <= record.token_s[-1] <= record.ended_s
    assert driver.ended_s == max(record.ended_s for record in driver.records)
    assert list(driver.samples) == samples and all(
        one.time_s < other.time_s for one, other in zip(samples, samples[1:], strict=False)
    )


def test_an_open_loop_sends_when_due_whatever_the_engine_does(engine):
    engine.hold(True)
    driver = Driver({"code": engine}, "flora", planned(10, interval_s=0.01))
    driver.start()
    wait_until(lambda: len(engine.submitted) == 10)
    engine.hold(False)
    assert driver.join(20)
    sent = [record.sent_s for record in driver.records]
    assert all(record.due_s == pytest.approx(0.01 * record.planned.index, abs=1e-6) for record in driver.records)
    assert all(record.lag_s >= 0 for record in driver.records) and sent == sorted(sent) and sent[-1] >= 0.09


def test_the_generator_tells_how_late_it_was(engine):
    """A request that takes its time to be checked makes the next ones late."""
    quick = engine.submit

    def slow(request, *arguments, **options):
        time.sleep(0.03)
        return quick(request, *arguments, **options)

    engine.submit = slow
    driver = Driver({"code": engine}, "flora", planned(4, interval_s=0.001))
    list(driver.watch())
    lags = [record.lag_s for record in driver.records]
    assert lags[3] > lags[0] + 0.08


def test_a_closed_loop_keeps_its_number_of_requests_with_the_engine(engine):
    driver = Driver({"code": engine}, "flora", planned(30, interval_s=100.0), concurrency=3)
    list(driver.watch())
    assert outcomes(driver) == {"finished": 30} and engine.most_at_once == 3
    assert all(record.lag_s == 0 for record in driver.records)


def test_a_closed_loop_without_end_stops_sending_when_its_time_is_over(engine):
    endless = EndlessTraffic(Traffic(num_requests=5), {"code": Prompts(str.split, " ".join, 99, [Prompt("a b", 2, 3)])}, {})
    driver = Driver({"code": engine}, "base", endless, concurrency=2, duration_s=0.15)
    list(driver.watch())
    assert set(outcomes(driver)) == {"finished"} and len(driver.records) > 2
    assert max(record.sent_s for record in driver.records) < 0.15 + 1.0


def test_refused_and_failed_requests_are_counted_by_name(engine):
    engine.max_waiting, engine.fails = 2, ("rb",)
    engine.hold(True)
    requests = [*planned(4), *planned(1, adapter="klingon")]
    driver = Driver({"code": engine}, "flora", requests)
    driver.start()
    wait_until(lambda: len(engine.submitted) == 5)
    engine.hold(False)
    driver.join(20)
    assert outcomes(driver) == {"finished": 2, "refused": 2, "failed": 1}
    assert Counter(record.error for record in driver.records if record.error) == {"BusyError": 2, "UnknownAdapterError": 1}
    assert "klingon" in driver.records[-1].message
    failing = Driver({"code": engine}, "flora", planned(2, adapter="rb"), concurrency=1)
    list(failing.watch())
    assert [(one.outcome, one.error, len(one.token_s)) for one in failing.records] == [("failed", "ServingError", 2)] * 2


def test_stopping_cancels_what_is_not_answered_and_sends_no_more(engine):
    engine.hold(True)
    driver = Driver({"code": engine}, "flora", [*planned(3), *planned(5, interval_s=1000.0)[1:]])
    driver.start()
    wait_until(lambda: len(engine.submitted) == 3)
    assert driver.running
    driver.stop()
    assert driver.join(20) and not driver.running
    assert outcomes(driver) == {"cancelled": 3} and len(engine.submitted) == 3 and engine.num_cancelled == 3


def test_whoever_stops_looking_stops_the_load(engine):
    before = set(threading.enumerate())
    driver = Driver({"code": engine}, "flora", planned(50, interval_s=10.0), sample_every_s=0.01)
    for _ in driver.watch():
        break
    assert set(outcomes(driver)) <= {"finished", "cancelled"} and len(driver.records) == 1
    assert not set(threading.enumerate()) - before, "threads are left behind"


def test_the_rate_changes_while_it_runs(engine):
    driver = Driver({"code": engine}, "flora", planned(12, interval_s=1.0), planned_rate=1.0)
    driver.start()
    wait_until(lambda: len(engine.submitted) == 1)
    driver.set_rate(0.0)
    driver.set_rate(100.0)
    assert driver.join(20)
    assert len(engine.submitted) == 12 and driver.ended_s < 5.0, "eleven seconds at the rate that was planned"
    assert all(record.lag_s < 2.0 for record in driver.records)
    still = Driver({"code": engine}, "flora", planned(3, interval_s=0.05), planned_rate=20.0)
    still.start()
    wait_until(lambda: len(still.records) == 1)
    still.set_rate(0.0)
    time.sleep(0.2)
    sent = len(still.records)
    time.sleep(0.1)
    assert len(still.records) == sent < 3, "nothing is sent at rate 0"
    still.stop()
    assert still.join(20)


def test_a_rate_set_before_the_start_is_the_rate_from_the_start(engine):
    driver = Driver({"code": engine}, "flora", planned(4, interval_s=100.0), planned_rate=0.01)
    driver.set_rate(20.0)
    list(driver.watch())
    sent = [record.sent_s for record in driver.records]
    assert sent[3] >= 0.15 and driver.ended_s < 5.0, "not all at once, and not 300 seconds"


def test_traffic_changes_while_it_runs(engine):
    sources = {"code": Prompts(str.split, " ".join, 99, [Prompt("a b", 2, 3)])}
    traffic = Traffic(num_requests=50, rate=200.0, popularity="identical", new_tokens=Lengths.parse("2"))
    endless = EndlessTraffic(traffic, sources, {"code": ("lua",)})
    driver = Driver({"code": engine}, "flora", endless, planned_rate=200.0, num_records=7)
    driver.start()
    wait_until(lambda: len(engine.submitted) > 20)
    endless.change(replace(traffic, popularity="distinct"), {"code": ("rb",)})
    wait_until(lambda: sum(one.request.adapter == "rb" for one in list(engine.submitted)) > 20)
    driver.stop()
    assert driver.join(20) and len(driver.records) == 7, "only the last ones are kept"
    asked = [one.request.adapter for one in engine.submitted]
    assert asked == sorted(asked, key=["lua", "rb"].index), "first all of the one, then all of the other"


def test_a_sample_says_what_everybody_gets(engine):
    engine.hold(True)
    driver = Driver(
        {"code": engine}, "flora", [*planned(5), *planned(2, adapter="rb"), *planned(1, adapter=None)], sample_every_s=0.02
    )
    engine.submit(planned(1)[0].request(), listener=lambda event: None)  # a visitor's own
    driver.start()
    wait_until(lambda: driver.samples and driver.samples[-1].num_sent == 8)
    held = driver.samples[-1]
    assert (held.waiting, held.running, held.num_waiting, held.batch) == ({"code": 9}, {"code": 0}, 9, {"code": {}})
    assert held.ttft_s == {} and held.tokens_per_s == 0 and held.outcomes == {}
    engine.step_s = 0.03
    engine.hold(False)
    wait_until(lambda: any(sample.batch["code"] for sample in list(driver.samples)))
    busy = next(sample for sample in list(driver.samples) if sample.batch["code"])
    assert busy.batch["code"] == {"lua": 4} and busy.num_running == 4
    assert driver.join(20)
    last = driver.samples[-1]
    assert last.outcomes == {"finished": 8} and last.tokens_per_s > 0 and last.arrivals_per_s >= 0
    assert set(last.ttft_s) == set(last.tpot_s) == {"mean", "p50", "p90", "p99"}


def test_two_kinds_go_to_two_engines(engine):
    other = ServingEngine(kind="speech", adapters=adapters("cs"))
    sources = {"code": Prompts(str.split, " ".join, 99, [Prompt("a b", 2, 3)]), "speech": Clips([Clip("c", 3)], 20)}
    traffic = Traffic(num_requests=10, mix={"code": 0.7, "speech": 0.3})
    plan = traffic.plan(sources, {"code": ("lua", "rb"), "speech": ("cs",)})
    sounding = [
        replace(one, asked=replace(one.asked, samples=np.ones(4, np.float32))) if one.kind == "speech" else one for one in plan
    ]
    driver = Driver({"code": engine, "speech": other}, "flora", sounding)
    *_, last = driver.watch()
    assert len(engine.submitted) == 7 and len(other.submitted) == 3 and last.outcomes == {"finished": 10}
    assert set(last.waiting) == set(last.batch) == {"code", "speech"}
    assert {one.request.adapter for one in other.submitted} == {"cs"}
    other.close()


def test_a_driver_that_breaks_says_so_and_leaves_nothing_behind(engine):
    def broken():
        yield from planned(2)
        raise RuntimeError("no more prompts")

    with pytest.raises(RuntimeError, match="no more prompts"):
        list(Driver({"code": engine}, "flora", broken()).watch())
    driver = Driver({"code": engine}, "flora", broken())
    driver.start()
    with pytest.raises(RuntimeError, match="no more prompts"):
        driver.join(20)
    assert outcomes(driver) == {"finished": 2}


def test_an_engine_that_never_answers_is_not_waited_for_after_a_stop(engine, monkeypatch):
    monkeypatch.setattr(load, "SETTLE_S", 0.1)
    engine.hold(True)
    quick = engine.submit

    def deaf(*arguments, **options):
        ticket = quick(*arguments, **options)
        ticket.cancel = lambda: None
        return ticket

    engine.submit = deaf
    driver = Driver({"code": engine}, "flora", planned(2), sample_every_s=0.01)
    driver.start()
    wait_until(lambda: len(engine.submitted) == 2)
    driver.stop()
    assert driver.join(20) and outcomes(driver) == {"unanswered": 2}


@pytest.mark.parametrize("stops", [True, False])
def test_an_over_saturated_run_stops_itself_where_it_is_told_to(engine, monkeypatch, stops):
    verdict = Saturation(1.0, "the queue grew")
    monkeypatch.setattr(load.SaturationMonitor, "verdict", lambda self: verdict if len(engine.submitted) > 3 else None)
    driver = Driver({"code": engine}, "flora", planned(40, interval_s=0.01), sample_every_s=0.01, stop_when_saturated=stops)
    list(driver.watch())
    assert driver.saturation == verdict and (len(engine.submitted) < 40) is stops


def test_the_monitor_is_told_the_queue_the_waiting_times_and_the_refusals(engine, monkeypatch):
    engine.max_waiting = 1
    engine.hold(True)
    driver = Driver({"code": engine}, "flora", planned(3), sample_every_s=0.01)
    driver.start()
    wait_until(lambda: len(driver.samples) > 3)
    engine.hold(False)
    driver.join(20)
    monitor = driver._monitor
    assert (monitor.num_sent, monitor.num_refused) == (3, 2) and max(monitor._queue) == 1
    assert monitor._ttfts == [driver.records[0].ttft_s] and len(monitor._queue) == len(driver.samples)
    assert driver.saturation is None and not math.isnan(driver.ended_s)
