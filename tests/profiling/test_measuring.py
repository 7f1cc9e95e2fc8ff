"""Long work on the page without a browser: its turns on the device, its states and words, and what becomes of it unwatched."""

from __future__ import annotations

import threading
import time

import pytest

from flora.errors import RequestError
from profiling.dashboard import measuring
from profiling.dashboard.device import GIVE_WAY, Device, in_line
from profiling.dashboard.measuring import BROKE_OFF, Measurement, Measurements
from profiling.events import HowFar

SESSION, TAB = "session", "sweep"


@pytest.fixture
def device():
    device = Device()
    yield device
    device.close()


class Counting:
    """A work of `num` parts that gives way between them; each waits for the gate, where there is one."""

    def __init__(self, num=3, gate=None, error=None, log=None, name=""):
        self.num, self.gate, self.error, self.name = num, gate, error, name
        self.log = [] if log is None else log
        self.taken, self.closed = [], threading.Event()

    def measure(self, should_stop):
        try:
            for part in range(self.num):
                if should_stop():
                    return
                yield HowFar(f"part {part}", part / self.num)
                if self.gate is not None:
                    assert self.gate.wait(20)
                self.log.append(f"{self.name}{part}")
                yield part
                yield GIVE_WAY
            if self.error is not None:
                raise self.error
        finally:
            self.closed.set()

    def take(self, event):
        self.taken.append(event)


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def ended(measurement):
    until(lambda: measurement.update() or measurement.ended)
    return measurement.state


def test_parts_of_two_measurements_take_turns_on_the_device(device):
    log, gate = [], threading.Event()
    first = Measurement(device, Counting(3, gate, log=log, name="a"))
    until(lambda: first._run.begun)
    second = Measurement(device, Counting(2, log=log, name="b"))
    assert second.state == "waiting" and in_line(1) in second.status()["cells"]["words"]
    gate.set()
    assert ended(first) == ended(second) == "done"
    assert log == ["a0", "b0", "a1", "b1", "a2"]
    assert first.work.taken == [0, 1, 2] and second.work.taken == [0, 1] and first.number < second.number


def test_one_that_waits_between_two_parts_says_how_far_it_is_and_may_be_stopped_there(device):
    gate, others = threading.Event(), threading.Event()
    measurement = Measurement(device, Counting(2, gate))
    until(lambda: measurement.update() or measurement.how_far)
    other = device.start(lambda: iter([others.wait(20)]))
    measurement.how_far = HowFar("half", 0.5)
    gate.set()
    until(lambda: measurement.update() or measurement.work.taken)
    until(lambda: measurement.state == "waiting")
    measurement.how_far = HowFar("half", 0.5)
    assert measurement.status()["cells"]["words"] == "measuring, 1 ahead of you · 50 % is measured"
    measurement.stop()
    assert measurement.state == "stopped" and measurement.ended, "at once, though the other has the device"
    others.set()
    until(lambda: other.fetch(0.0) or other.done)
    until(measurement.work.closed.is_set)
    assert ended(measurement) == "stopped" and measurement.work.taken == [0]


def test_it_says_what_is_measured_and_how_long_it_still_takes(device, monkeypatch):
    gate = threading.Event()
    measurement = Measurement(device, Counting(4, gate))
    until(lambda: measurement.update() or measurement.how_far)
    assert measurement.state == "running" and measurement.remaining_s() is None
    assert measurement.status()["cells"] == {"words": "part 0", "since": ""}
    monkeypatch.setattr(measuring, "_ESTIMATE_AFTER_S", 0.0)
    measurement.how_far = HowFar("<b>", 0.25)
    left_s = measurement.remaining_s()
    assert left_s == pytest.approx(3 * measurement._run.active_s, rel=0.5) and left_s > 0
    shown = measurement.status()
    assert shown["cells"]["words"] == "&lt;b&gt;" and shown["cells"]["since"] == "about 1 s left"
    assert shown["attributes"]["bar"]["style"] == "width: 25.0%"
    gate.set()
    assert ended(measurement) == "done" and measurement.status()["attributes"]["bar"]["style"] == "width: 100.0%"


def test_stop_ends_one_at_its_next_step_and_keeps_what_it_has(device):
    gate = threading.Event()
    measurement = Measurement(device, Counting(3, gate))
    until(lambda: measurement.update() or measurement.how_far)
    measurement.stop()
    assert measurement.status()["cells"]["words"] == "stopping · part 0"
    gate.set()
    assert ended(measurement) == "stopped" and measurement.work.taken == [0] and measurement.work.closed.is_set()
    assert "kept" in measurement.status()["cells"]["words"]


def test_stop_in_line_is_heard_at_once_and_it_never_begins(device):
    gate = threading.Event()
    device.start(lambda: iter([gate.wait(20)]))
    measurement = Measurement(device, Counting())
    measurement.stop()
    assert measurement.ended and measurement.state == "stopped"
    gate.set()
    until(lambda: measurement._run.fetch(0.0) or measurement._run.done)
    assert measurement.state == "stopped" and measurement.work.taken == [] and not measurement._run.begun


@pytest.mark.parametrize(
    ("error", "words"),
    [(RequestError("the rank is <odd>"), "The rank is <odd>."), (ZeroDivisionError("ours"), BROKE_OFF)],
)
def test_what_goes_wrong_is_one_sentence_without_the_servers_insides(device, error, words):
    measurement = Measurement(device, Counting(1, error=error))
    assert ended(measurement) == "failed" and measurement.failure == words and measurement.work.taken == [0]
    assert "<odd>" not in measurement.status()["cells"]["words"] and measurement.error is error
    assert ended(Measurement(device, Counting(1))) == "done", "the device is free"


def test_a_visitor_has_one_at_a_time_of_each_tab_and_the_last_few_are_kept(device):
    measurements, gate = Measurements(device), threading.Event()
    first = measurements.start(SESSION, TAB, Counting(1, gate))
    assert measurements.start(SESSION, TAB, Counting()) is first and measurements.of(SESSION, TAB) is first
    other = measurements.start(SESSION, "kernels", Counting(1, gate))
    assert other is not first and measurements.of("nobody", TAB) is None
    gate.set()
    assert ended(first) == ended(other) == "done" and measurements.earlier(SESSION, TAB) == []
    second = measurements.start(SESSION, TAB, Counting(1))
    assert measurements.earlier(SESSION, TAB) == [first] and measurements.earlier("nobody", TAB) == []
    assert ended(second) == "done"
    for _ in range(measuring.EARLIER + 1):
        ended(measurements.start(SESSION, TAB, Counting(1)))
    assert len(measurements.earlier(SESSION, TAB)) == measuring.EARLIER and first not in measurements.earlier(SESSION, TAB)


def test_a_visitor_who_leaves_is_forgotten_and_frees_the_device(device):
    measurements, gate = Measurements(device), threading.Event()
    under_way = measurements.start(SESSION, TAB, Counting(100, gate))
    until(lambda: under_way._run.begun)
    in_the_line = measurements.start(SESSION, "kernels", Counting(log=(log := [])))
    stays = measurements.start("another", TAB, Counting(1))
    measurements.forget(SESSION)
    assert measurements.of(SESSION, TAB) is None and measurements.of(SESSION, "kernels") is None
    gate.set()
    assert ended(stays) == "done" and under_way.work.closed.is_set() and log == []
    assert len(under_way.work.log) <= 1 and not in_the_line._run.begun


def test_a_server_that_goes_down_ends_all_of_them():
    device = Device()
    measurements, gate = Measurements(device), threading.Event()
    both = [measurements.start(name, TAB, Counting(100, gate)) for name in "ab"]
    until(lambda: both[0]._run.begun)
    device.close()
    gate.set()
    assert [ended(one) for one in both] == ["stopped", "stopped"] and both[0].work.closed.is_set()
    with pytest.raises(RequestError, match="going down"):
        measurements.start("c", TAB, Counting())
