"""Runs of every method on the same requests, and what is put together from them."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
from fake_serving import ServingEngine, adapters

from flora.errors import RequestError
from profiling import report
from profiling.load_report import LEFT_TO_JSON
from profiling.load_result import LoadResult
from profiling.load_runs import LoadProgress, LoadSettings, MethodRun, run_load, servable_by
from profiling.saturation import Saturation
from profiling.traffic import Lengths, Prompt, Prompts, Traffic

SOURCES = {"code": Prompts(str.split, " ".join, 99, [Prompt(f"prompt {n}", 2, 3 + n) for n in range(5)])}
TAGS = ("lua", "rb", "d")
SETTINGS = LoadSettings(Traffic(num_requests=30, rate=400.0, new_tokens=Lengths.parse("uniform:2-5")), warmup_requests=4)


@pytest.fixture
def engine():
    engine = ServingEngine(adapters=adapters(*TAGS))
    yield engine
    engine.close()


def measured(engine, settings=SETTINGS, **options):
    events = list(run_load({"code": engine}, SOURCES, {"code": TAGS}, settings, **options))
    return [event for event in events if isinstance(event, MethodRun)], events


def test_every_method_is_given_the_same_requests_in_turns_after_a_warm_up(engine):
    runs, events = measured(engine, replace(SETTINGS, repeats=2))
    assert [(run.method, run.repeat) for run in runs] == [("flora", 0), ("bmm-lora", 0), ("flora", 1), ("bmm-lora", 1)]
    plans = [[record.planned for record in run.records] for run in runs]
    assert plans[0] == plans[1] == plans[2] == plans[3] and len(plans[0]) == 30
    sent = Counter(one.method for one in engine.submitted)
    assert sent == {"flora": 68, "bmm-lora": 68}, "the warm-up's four are sent and not counted"
    assert {one.method for one in engine.submitted[:34]} == {"flora"}
    warmups = [event for event in events if isinstance(event, LoadProgress) and event.sample is None]
    assert len(warmups) == 4 and all((event.done, event.total) == (0, 30) for event in warmups)
    last = [event for event in events if isinstance(event, LoadProgress)][-1]
    assert (last.method, last.repeat, last.done, last.total) == ("bmm-lora", 1, 30, 30)


def test_without_a_warm_up_nothing_but_the_plan_is_sent(engine):
    measured(engine, replace(SETTINGS, methods=("flora",), warmup_requests=0))
    assert len(engine.submitted) == 30


def test_the_banks_counts_are_those_of_the_run(engine):
    runs, _ = measured(engine, replace(SETTINGS, warmup_requests=0))
    first, second = (run.adapters["code"] for run in runs)
    asked = Counter(record.planned.adapter for record in runs[0].records)
    assert {tag: counters.misses for tag, counters in first.items()} == dict.fromkeys(TAGS, 1)
    assert {tag: counters.misses for tag, counters in second.items()} == dict.fromkeys(TAGS, 0), (
        "in their slots since the first run"
    )
    assert {tag: counters.hits for tag, counters in second.items()} == asked


def test_a_closed_loop_of_some_seconds_has_as_many_requests_as_it_takes(engine):
    traffic = replace(SETTINGS.traffic, rate=math.inf)
    settings = LoadSettings(traffic, ("flora",), concurrency=3, duration_s=0.3, warmup_requests=0)
    (run,), events = measured(engine, settings)
    assert len(run.records) > 3 and engine.most_at_once == 3 and not run.interrupted
    assert all(event.total is None for event in events if isinstance(event, LoadProgress))


def test_a_stop_keeps_what_was_measured_and_begins_nothing_else(engine):
    settings = replace(SETTINGS, traffic=replace(SETTINGS.traffic, num_requests=2000, rate=20.0), warmup_requests=0)
    (run,), _ = measured(engine, settings, should_stop=lambda: len(engine.submitted) > 5)
    assert run.method == "flora" and run.interrupted and 5 < len(run.records) < 200
    runs, _ = measured(engine, replace(settings, warmup_requests=3), should_stop=lambda: True)
    assert runs == [], "stopped while warming up"


def test_an_over_saturated_method_is_not_run_again_and_the_next_one_is(engine, monkeypatch):
    found = Saturation(1.0, "the queue grew")
    verdict = lambda monitor: found if engine.submitted[-1].method == "flora" else None  # noqa: E731
    monkeypatch.setattr("profiling.load.SaturationMonitor.verdict", verdict)
    monkeypatch.setattr("profiling.load.VERDICT_EVERY", 1)
    settings = replace(SETTINGS, traffic=replace(SETTINGS.traffic, num_requests=60, rate=100.0), repeats=2, warmup_requests=0)
    runs, _ = measured(engine, settings)
    assert [(run.method, run.repeat) for run in runs] == [("flora", 0), ("bmm-lora", 0), ("bmm-lora", 1)]
    assert runs[0].saturation == found and len(runs[0].records) < 60 == len(runs[1].records)
    result = LoadResult.of(runs, settings, {"code": engine}, "command")
    assert result.methods["flora"].saturation == "the queue grew" and result.methods["bmm-lora"].saturation is None
    engine.submitted.clear()
    runs, _ = measured(engine, replace(settings, stop_when_saturated=False, repeats=1))
    assert [len(run.records) for run in runs] == [60, 60] and runs[0].saturation == found


def test_all_at_once_is_over_saturated_by_intent_and_goes_on(engine, monkeypatch):
    monkeypatch.setattr("profiling.load.SaturationMonitor.verdict", lambda monitor: Saturation(1.0, "the queue grew"))
    runs, _ = measured(engine, replace(SETTINGS, traffic=replace(SETTINGS.traffic, rate=math.inf)))
    assert [len(run.records) for run in runs] == [30, 30]


def test_only_adapters_that_every_method_serves_are_asked_for():
    engine = ServingEngine(
        adapters=adapters("a", families=("flora",)) | adapters("b") | adapters("c", families=("lora",)) | adapters("d")
    )
    assert servable_by({"code": engine}, ("flora", "bmm-lora")) == {"code": ("b", "d")}
    assert servable_by({"code": engine}, ("flora", "flora-expand")) == {"code": ("a", "b", "d")}
    assert servable_by({"code": engine}, ("merged", "base"), most=3) == {"code": ("a", "b", "c")}
    engine.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ()}, "needs a method"),
        ({"methods": ("magic",)}, "no method 'magic'"),
        ({"methods": ("flora", "flora")}, "twice"),
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": 4}, "not both"),
        ({"duration_s": 5.0}, "ends with its last request"),
        ({"duration_s": 0.0}, "duration"),
        ({"duration_s": math.inf}, "duration"),
        ({"warmup_requests": -1}, "warm-up"),
        ({"repeats": 0}, "repeat"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(RequestError, match=words):
        replace(SETTINGS, **changes)


# ------------------------------------------------------------------------------------------------------------- results


def test_a_result_holds_all_that_is_needed_to_read_and_repeat_it(engine):
    settings = replace(SETTINGS, repeats=2, limits={"ttft": 60.0, "e2e": 1e-9})
    runs, _ = measured(engine, settings)
    result = LoadResult.of(runs, settings, {"code": engine}, "python -m profiling load")
    flora = result.methods["flora"]
    assert list(result.methods) == ["flora", "bmm-lora"] and flora.figures.outcomes == {"finished": 60}
    assert flora.by_kind["code"] == flora.figures and len(flora.by_repeat) == 2
    assert flora.figures.duration_s == pytest.approx(sum(run.duration_s for run in runs if run.method == "flora"))
    assert flora.figures.goodput.share == 0.0 and flora.ranks == {"code": (4,)}
    assert sum(counts["requests"] for counts in flora.adapters["code"].values()) == 60
    assert 0.5 < flora.hit_rate <= 1.0 and flora.queue["max"] >= flora.queue["p99"] >= 0
    assert len(result.ratios("bmm-lora")) == 2 and all(ratio > 0 for ratio in result.ratios("bmm-lora"))
    rows = [json.loads(line) for line in report.lines_of(result.to_rows()).splitlines()]
    assert [(row["method"], row["kind"]) for row in rows] == [
        ("flora", "code"), ("flora", "all"), ("bmm-lora", "code"), ("bmm-lora", "all"),
    ]  # fmt: skip
    for row in rows:
        for name in ("hardware", "models", "dtype", "ranks", "batch", "popularity", "seed", "repeats", "command", "rate", "ttft_s"):
            assert row[name] not in (None, {}, []), name
        assert row["rate"] == 400.0 and row["concurrency"] is None and row["planned_requests"] == 30
        assert len({len(series) for series in row["timeline"].values()}) == 1 <= len(row["timeline"]["time_s"])
    frame, requests = report.frame(result.to_rows(), LEFT_TO_JSON), result.requests_frame()
    assert len(frame) == 4 and "ttft_s.p99" in frame and "timeline.time_s" not in frame
    assert len(requests) == 120 and set(requests["method"]) == {"flora", "bmm-lora"} and (requests["outcome"] == "finished").all()


def test_infinite_numbers_are_words_in_a_row(engine):
    settings = replace(SETTINGS, methods=("base",), traffic=replace(SETTINGS.traffic, rate=math.inf, burstiness=math.inf))
    runs, _ = measured(engine, settings)
    result = LoadResult.of(runs, settings, {"code": engine}, "c")
    row = json.loads(report.lines_of(result.to_rows()).splitlines()[0])
    assert row["rate"] == row["burstiness"] == "inf" and row["ranks"] == []
    assert result.late_s("base") is None


def test_a_generator_that_falls_behind_is_told(engine):
    runs, _ = measured(engine, replace(SETTINGS, methods=("flora",)))
    for record in runs[0].records:
        record.due_s = record.sent_s
    assert LoadResult.of(runs, SETTINGS, {"code": engine}, "c").late_s("flora") is None
    for record in runs[0].records:
        record.due_s = record.sent_s - 0.25
    assert LoadResult.of(runs, SETTINGS, {"code": engine}, "c").late_s("flora") == pytest.approx(0.25)


def test_a_long_timeline_keeps_few_moments(engine):
    runs, _ = measured(engine, replace(SETTINGS, methods=("flora",)))
    long = replace(runs[0], samples=tuple(replace(runs[0].samples[0], time_s=float(second)) for second in range(1001)))
    timeline = LoadResult.of([long], SETTINGS, {"code": engine}, "c").methods["flora"].timeline
    assert len(timeline["time_s"]) == 240 and timeline["time_s"][0] == 0 and timeline["time_s"][-1] == 1000


def test_no_run_is_an_empty_result(engine):
    result = LoadResult.of([], SETTINGS, {"code": engine}, "c")
    assert result.methods == {} and result.to_rows() == [] and not result.interrupted and len(result.requests_frame()) == 0
