"""A sweep over ranks: what is measured in which order, what is kept of an earlier one, what is refused."""

import json
import math
from dataclasses import replace

import pytest
from fake_serving import ServingEngine, adapters

from flora.errors import RequestError
from profiling import report, sweep, sweep_report
from profiling.events import HowFar
from profiling.load_runs import LoadSettings, sources_of
from profiling.sweep import Measured, Sweep, SweepSettings, rows_from
from profiling.sweep_points import LATENCY, STEP_TIME, THROUGHPUT, points_of
from profiling.traffic import Lengths, Prompt, Prompts, Traffic

SOURCE = Prompts(str.split, " ".join, 99, [Prompt(f"prompt {n}", 2, 3) for n in range(5)])
LOAD = LoadSettings(Traffic(num_requests=8, new_tokens=Lengths.parse("3"), popularity="distinct"), warmup_requests=2)
LOADS = (THROUGHPUT, LATENCY)
SETTINGS = SweepSettings(LOAD, ranks=(4, 1), rates=(200.0, 100.0), num_adapters=3, measures=LOADS)


@pytest.fixture
def engine(monkeypatch):
    """One whose adapters come and go by name."""
    engine = ServingEngine(adapters={})
    engine.added = []

    def add(engine, count, rank, methods, seed):
        tags = tuple(f"r{rank}-{number}" for number in range(count))
        engine.adapters |= adapters(*tags, rank=rank)
        engine.added.append((count, rank, tuple(methods), seed))
        return tags

    monkeypatch.setattr(sweep, "add_random_adapters", add)
    engine.remove_adapter = lambda tag: engine.adapters.pop(tag)
    yield engine
    engine.close()


def swept(engine, settings=SETTINGS, **options):
    one = Sweep(engine, SOURCE, settings, "python -m profiling sweep", **options)
    return list(one.run()), one.result()


def of(rows):
    return [(row["rank"], row["measures"], row["rate"], row["method"]) for row in rows]


def test_every_rank_is_measured_in_turn_with_adapters_of_its_own(engine):
    events, result = swept(engine)
    assert engine.added == [(3, 1, ("flora", "bmm-lora"), 0), (3, 4, ("flora", "bmm-lora"), 0)] and engine.adapters == {}
    assert of(result.rows) == [
        (rank, name, rate, method)
        for rank in (1, 4)
        for name, rate in ((THROUGHPUT, "inf"), (LATENCY, 200.0), (LATENCY, 100.0))
        for method in ("flora", "bmm-lora")
    ]
    assert {one.request.adapter for one in engine.submitted} == {f"r{rank}-{number}" for rank in (1, 4) for number in range(3)}
    assert all(point.value > 0 for point in result.points) and len(result.points) == 12
    assert sum(isinstance(event, Measured) for event in events) == 6 and not result.interrupted and result.capacity is None
    shares = [event.share for event in events if isinstance(event, HowFar)]
    assert 0 == shares[0] and max(shares) <= 1 and shares[-1] > 0.7
    rows = [json.loads(line) for line in report.lines_of(result.rows).splitlines()]
    assert all(row["ranks"] == [row["rank"]] and row["num_requests"] == 8 and row["hardware"] for row in rows) and len(rows) == 12
    assert points_of(rows) == result.points and all(row["setting"] == rows[0]["setting"] for row in rows)


def test_only_what_is_missing_is_measured_and_only_rows_of_the_same_setting_are_kept(engine):
    _, before = swept(engine, should_stop=lambda: len(engine.added) > 1)
    assert {row["rank"] for row in before.rows} == {1}
    kept = json.loads(json.dumps(before.rows))
    engine.added.clear()
    sweep = Sweep(engine, SOURCE, SETTINGS, "again", rows=kept)
    assert sweep.num_missing == 3
    events = list(sweep.run())
    assert [rank for _, rank, _, _ in engine.added] == [4] and sum(isinstance(event, Measured) for event in events) == 3
    assert len(sweep.rows) == 12 and list(sweep.rows[:6]) == [row | {"command": "again"} for row in kept]
    assert Sweep(engine, SOURCE, replace(SETTINGS, num_adapters=2), "c", rows=kept).rows == ()
    full = Sweep(engine, SOURCE, SETTINGS, "c", rows=sweep.rows)
    assert full.num_missing == 0 and list(full.run()) == []


def test_another_method_is_measured_beside_all_others_again(engine):
    _, before = swept(engine, replace(SETTINGS, ranks=(2,), measures=(THROUGHPUT,)))
    wider = replace(SETTINGS, ranks=(2,), measures=(THROUGHPUT,), load=replace(LOAD, methods=("flora", "bmm-lora", "sgmv-lora")))
    sweep = Sweep(engine, SOURCE, wider, "c", rows=before.rows)
    assert sweep.num_missing == 1
    list(sweep.run())
    assert [row["method"] for row in sweep.rows] == ["flora", "bmm-lora", "sgmv-lora"] and sweep.rows[0] not in before.rows


def test_steps_are_paired_on_one_full_batch(engines):
    settings = SweepSettings(replace(LOAD, repeats=2), (2, 1), num_adapters=2, measures=(STEP_TIME,), num_steps=4)
    real = engines["code"].beside(max_batch_size=3, adapter_slots=2)
    try:
        events = list((one := Sweep(real, sources_of(engines)["code"], settings, "c")).run())
    finally:
        real.close()
    result = one.result()
    assert of(result.rows) == [(rank, STEP_TIME, None, method) for rank in (1, 2) for method in ("flora", "bmm-lora")]
    assert real.adapters == {} and "random" not in "".join(engines["code"].adapters)
    for row in report.lines_of(result.rows).splitlines():
        row = json.loads(row)
        assert row["batch"] == 3 and row["ranks"] == [row["rank"]] * 3 and row["num_steps"] == 6 and row["agreement"] is None
    first, second = result.points[:2]
    assert first.ratio is None and second.ratio.n == 6 and second.ratio.low <= second.ratio.median <= second.ratio.high
    assert first.range[0] <= first.value <= first.range[1] and isinstance(events[-1], Measured)


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    assert rows_from(tmp_path / "none yet.jsonl") == []
    for content in ("{broken", "[1]", '{"measures": "magic"}', json.dumps({"measures": STEP_TIME, "rank": 1, "method": "flora"})):
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(RequestError, match="'rows.jsonl' holds no rows of a sweep"):
            rows_from(tmp_path / "rows.jsonl")
    with pytest.raises(RequestError, match="cannot read"):
        rows_from(tmp_path)


def test_the_methods_take_turns_at_every_rank_and_rate(engine):
    swept(engine, replace(SETTINGS, load=replace(LOAD, repeats=2), ranks=(2,), rates=(300.0,)))
    order = [one.method for one in engine.submitted]
    changes = [method for place, method in enumerate(order) if place == 0 or order[place - 1] != method]
    assert changes == ["flora", "bmm-lora"] * 4


def test_rates_are_shares_of_what_every_method_served_at_the_lowest_rank(engine):
    _, result = swept(engine, replace(SETTINGS, rates=None))
    at_rank_1 = [row["requests_per_s"] for row in result.rows if row["rank"] == 1 and row["measures"] == THROUGHPUT]
    assert result.capacity == min(at_rank_1) and len(result.rows) == 12
    assert result.rates == tuple(float(f"{share * result.capacity:.2g}") for share in (0.5, 0.8))
    assert {row["rate"] for row in result.rows if row["rank"] == 4} == {"inf", *result.rates}


def test_a_stop_keeps_the_ranks_that_were_done(engine):
    _, result = swept(engine, should_stop=lambda: len(engine.added) > 1)
    assert result.interrupted and {row["rank"] for row in result.rows} == {1} and engine.adapters == {}
    assert "stopped by hand" in sweep_report.conditions(result)


def test_a_sweep_that_is_left_takes_its_adapters_with_it(engine):
    run = Sweep(engine, SOURCE, SETTINGS, "c").run()
    next(run)
    assert len(engine.adapters) == 3
    run.close()
    assert engine.adapters == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks": ()}, "ranks"),
        ({"ranks": (0, 1)}, "ranks"),
        ({"ranks": (1, 1)}, "rank is given twice"),
        ({"rates": (0.0,)}, "rate"),
        ({"rates": (math.inf,)}, "finite"),
        ({"rates": (math.nan,)}, "finite"),
        ({"rates": (8.0, 8.0)}, "rate is given twice"),
        ({"num_adapters": 0}, "adapter"),
        ({"measures": ()}, "a sweep measures"),
        ({"measures": ("magic",)}, "a sweep measures"),
        ({"measures": (STEP_TIME, LATENCY), "rates": None}, "shares of the throughput"),
        ({"num_steps": 1}, "at least 2"),
        ({"load": replace(LOAD, concurrency=2)}, "concurrency"),
        ({"load": replace(LOAD, traffic=replace(LOAD.traffic, mix={"code": 0.5, "speech": 0.5}))}, "one kind"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(RequestError, match=words):
        replace(SETTINGS, **changes)
    assert SETTINGS.ranks == (1, 4), "sorted"
