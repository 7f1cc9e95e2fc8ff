"""A sweep over ranks: what is measured in which order, where methods cross, what is said and drawn of it."""

import csv
import io
import json
import math
import re
from dataclasses import replace

import pytest
from fake_serving import ServingEngine, adapters
from plotly.offline import get_plotlyjs

from flora.errors import RequestError
from profiling import report, sweep, sweep_report
from profiling.load_metrics import figures_of
from profiling.load_runs import LoadSettings
from profiling.sweep import THROUGHPUT, Sweep, SweepPoint, SweepResult, SweepSettings, crossover
from profiling.sweep_report import report_of
from profiling.traffic import Lengths, Prompt, Prompts, Traffic

SOURCE = Prompts(str.split, " ".join, 99, [Prompt(f"prompt {n}", 2, 3) for n in range(5)])
LOAD = LoadSettings(Traffic(num_requests=8, new_tokens=Lengths.parse("3"), popularity="distinct"), warmup_requests=2)
SETTINGS = SweepSettings(LOAD, ranks=(4, 1), rates=(200.0, 100.0), num_adapters=3)


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


def test_every_rank_is_measured_in_turn_with_adapters_of_its_own(engine):
    events, result = swept(engine)
    assert engine.added == [(3, 1, ("flora", "bmm-lora"), 0), (3, 4, ("flora", "bmm-lora"), 0)] and engine.adapters == {}
    assert [(point.rank, point.rate, point.method) for point in result.points] == [
        (rank, rate, method) for rank in (1, 4) for rate in (THROUGHPUT, 200.0, 100.0) for method in ("flora", "bmm-lora")
    ]
    assert {one.request.adapter for one in engine.submitted} == {f"r{rank}-{number}" for rank in (1, 4) for number in range(3)}
    assert all(point.figures.outcomes == {"finished": 8} and point.value > 0 for point in result.points)
    assert {event.num_runs for event in events} == {12} and [event.run for event in events] == sorted(event.run for event in events)
    assert events[-1].run == 11 and not result.interrupted and result.capacity is None
    rows = [json.loads(line) for line in report.lines_of(result.rows).splitlines()]
    assert [(row["rank"], row["measures"], row["rate"]) for row in rows[:6:2]] == [
        (1, "throughput", "inf"), (1, "latency", 200.0), (1, "latency", 100.0),
    ]  # fmt: skip
    assert all(row["ranks"] == [row["rank"]] and row["num_requests"] == 8 and row["hardware"] for row in rows) and len(rows) == 12


def test_the_methods_take_turns_at_every_rank_and_rate(engine):
    swept(engine, replace(SETTINGS, load=replace(LOAD, repeats=2), ranks=(2,), rates=(300.0,)))
    order = [one.method for one in engine.submitted]
    changes = [method for place, method in enumerate(order) if place == 0 or order[place - 1] != method]
    assert changes == ["flora", "bmm-lora"] * 4


def test_rates_are_shares_of_what_every_method_served_at_the_lowest_rank(engine):
    _, result = swept(engine, replace(SETTINGS, rates=None))
    at_rank_1 = [point.figures.requests_per_s for point in result.points if point.rank == 1 and point.rate == THROUGHPUT]
    assert result.capacity == min(at_rank_1) and len(result.points) == 12
    assert result.rates == tuple(float(f"{share * result.capacity:.2g}") for share in (0.5, 0.8))
    assert {point.rate for point in result.points if point.rank == 4} == {THROUGHPUT, *result.rates}


def test_a_stop_keeps_the_ranks_that_were_done(engine):
    _, result = swept(engine, should_stop=lambda: len(engine.added) > 1)
    assert result.interrupted and {point.rank for point in result.points} == {1} and engine.adapters == {}
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
        ({"load": replace(LOAD, concurrency=2)}, "concurrency"),
        ({"load": replace(LOAD, traffic=replace(LOAD.traffic, mix={"code": 0.5, "speech": 0.5}))}, "one kind"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(RequestError, match=words):
        replace(SETTINGS, **changes)
    assert SETTINGS.ranks == (1, 4), "sorted"


# ----------------------------------------------------------------------------------------------------------- crossing


def points(rate, method="flora", saturated=(), by_repeat=None, **values):
    """One per rank, from r1=…, r2=…"""
    name = "tokens_per_s" if math.isinf(rate) else "s_per_token"
    made = []
    for rank, value in ((int(rank[1:]), value) for rank, value in values.items()):
        empty = figures_of([], 1.0)
        figures = (
            replace(empty, tokens_per_s=value) if math.isinf(rate) else replace(empty, s_per_token={"mean": value} if value else {})
        )
        repeats = tuple({name: one} for one in by_repeat or (value,))
        made.append(SweepPoint(rank, rate, method, figures, repeats, "the queue grew" if rank in saturated else None))
    return made


def test_methods_cross_between_the_ranks_where_their_order_changes():
    first = points(THROUGHPUT, r1=400.0, r4=200.0, r16=50.0)
    assert crossover(first, points(THROUGHPUT, r1=100.0, r4=100.0, r16=100.0)) == pytest.approx(
        8.0
    )  # 2 and 1/2: half-way in log rank
    assert crossover(first, points(THROUGHPUT, r1=500.0, r4=400.0, r16=100.0)) == 0.0
    assert crossover(first, points(THROUGHPUT, r1=1.0, r4=1.0, r16=50.0)) == math.inf
    assert crossover(first, points(THROUGHPUT, r2=1.0)) is None and crossover([], first) is None
    assert crossover(first, points(THROUGHPUT, r1=500.0, r4=100.0, r16=100.0)) == pytest.approx(8.0), "the last time"
    assert crossover(first, points(THROUGHPUT, r1=100.0, r16=None)) == math.inf, "only where both were measured"


def test_of_latencies_the_lower_is_better():
    rising, level = points(8.0, r1=0.1, r16=1.6), points(8.0, r1=0.4, r16=0.4)
    assert crossover(rising, level) == pytest.approx(4.0) and crossover(level, rising) == math.inf


def test_a_point_has_a_value_and_a_range_over_repeats():
    (throughput,), (latency,) = points(THROUGHPUT, by_repeat=(90.0, 110.0), r1=100.0), points(8.0, r1=0.25)
    assert throughput.value == 100.0 and throughput.range == (90.0, 110.0)
    assert latency.value == 0.25 and latency.range is None
    (nothing,) = points(8.0, r1=None)
    assert nothing.value is None and points(THROUGHPUT, r1=0.0)[0].value is None


# -------------------------------------------------------------------------------------------------------------- report

NASTY = "</script><script>alert(1)</script>"


@pytest.fixture
def result():
    measured = [
        *points(THROUGHPUT, r1=400.0, r4=200.0, r16=50.0),
        *points(THROUGHPUT, "bmm-lora", r1=100.0, r4=100.0, r16=100.0),
        *points(8.0, saturated=(16,), r1=0.1, r4=0.2, r16=3.0),
        *points(8.0, "bmm-lora", r1=0.2, r4=0.3, r16=4.0),
    ]
    settings = replace(SETTINGS, ranks=(1, 4, 16), rates=(8.0,))
    facts = {"torch": "2.0", "models": {"code": {"name": NASTY}}}
    return SweepResult(
        settings, None, (8.0,), tuple(measured), ({"command": "=1+1", "method": "flora"},), 32, facts, f"c {NASTY}", False
    )


def test_the_verdicts_say_where_the_first_method_stops_being_better(result):
    assert sweep_report.verdicts(result) == [
        "Throughput: fLoRA's is higher than bmm-LoRA's up to a rank of about 8.",
        "Latency at 8 requests/s: fLoRA's is lower than bmm-LoRA's up to the highest rank measured, 16.",
    ]
    worse = replace(result, points=tuple(points(8.0, r1=0.5) + points(8.0, "bmm-lora", r1=0.2)))
    assert sweep_report.verdicts(worse) == ["Latency at 8 requests/s: fLoRA's is not lower than bmm-LoRA's at any rank measured."]
    assert sweep_report.verdicts(replace(result, points=())) == []


def test_the_table_has_a_line_per_rank_and_method_and_marks_what_is_over_saturated(result):
    heads, lines = sweep_report.table(result)
    assert heads == ["rank", "method", "tokens/s", "s/token at 8/s"] and len(lines) == 6
    assert lines[0] == ["1", "fLoRA", "400", "0.1000"] and lines[4] == ["16", "fLoRA", "50", "3.0000 *"]
    text = report.text(report_of(result))
    assert "* over-saturated" in text and "3 random adapters of each rank" in text and text.endswith(result.command)
    missing = replace(result, points=result.points[:1])
    assert sweep_report.table(missing)[1] == [["1", "fLoRA", "400", "–"]] and "* over" not in report.text(report_of(missing))


def test_the_chart_has_every_methods_own_look(result):
    chart = sweep_report.by_rank(result.at(8.0), "Latency", "s/token", "lower is better")
    first, second = chart.figure["data"]
    assert first["x"] == [1, 4, 16] and first["y"] == [0.1, 0.2, 3.0] and "error_y" not in first
    assert first["marker"]["symbol"] == ["circle", "circle", "circle-open"] and second["line"]["dash"] == "dash"
    assert chart.figure["layout"]["xaxis"]["type"] == "log" and chart.figure["layout"]["xaxis"]["tickvals"] == [1, 4, 16]
    assert "fLoRA 0.1 at rank 1 to 3 at rank 16" in chart.description and "hollow marks are over-saturated" in chart.description
    assert json.loads(json.dumps(chart.figure, allow_nan=False)) == chart.figure
    repeated = {"flora": points(THROUGHPUT, by_repeat=(90.0, 130.0), r1=100.0, r2=None)}
    bars = sweep_report.by_rank(repeated, "Throughput", "tokens/s", "higher is better").figure["data"][0]
    assert (bars["error_y"]["array"], bars["error_y"]["arrayminus"], bars["x"]) == ([30.0], [10.0], [1])
    assert sweep_report.by_rank({"flora": []}, "Throughput", "tokens/s", "x").description == "Throughput: nothing measured yet."


def test_the_page_is_whole_and_harmless_and_the_csv_runs_nothing(result):
    page = report.html_page(report_of(result))
    own = page.replace(get_plotlyjs(), "")
    assert own.count("Plotly.newPlot") == 2 and "alert(1)</script>" not in own and "http" not in own
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page) and "&lt;/script&gt;" in own
    assert next(csv.DictReader(io.StringIO(report.csv(report_of(result)))))["command"] == "'=1+1"
    assert report.html_page(report_of(replace(result, points=(), rows=())))
