"""Points of a sweep, where methods cross, and what is said and drawn of it."""

import csv
import io
import json
import math
import re
from dataclasses import replace

import pytest
from plotly.offline import get_plotlyjs

from profiling import report, sweep_report
from profiling.load_runs import LoadSettings
from profiling.sweep import SweepResult, SweepSettings
from profiling.sweep_figures import Beside, by_rank, crossing_chart
from profiling.sweep_points import (
    LATENCY,
    STEP_TIME,
    THROUGHPUT,
    Advantage,
    Measure,
    SweepPoint,
    advantages,
    by_method,
    crossing,
    crossover,
    measures_of,
    points_of,
)
from profiling.sweep_report import report_of
from profiling.traffic import Lengths, Traffic

NASTY = "</script><script>alert(1)</script>"
AT_ONCE, AT_8, STEPS = Measure(THROUGHPUT, math.inf), Measure(LATENCY, 8.0), Measure(STEP_TIME)


def row(measure, method, rank, value, ratio=None, by_repeat=None, saturation=None):
    """What a sweep writes of one point."""
    facts = {"measures": measure.name, "rank": rank, "method": method, "rate": "inf" if measure == AT_ONCE else measure.rate}
    if measure == STEPS:
        quantiles = {"p10": 0.8e-3 * value, "p50": 1e-3 * value, "p90": 2e-3 * value}
        pair = None if ratio is None else {"median": ratio[0], "low": ratio[1], "high": ratio[2], "n": 60}
        return facts | {"step_quantiles": quantiles, "ratio_to_first": pair}
    own = "tokens_per_s" if measure == AT_ONCE else "s_per_token"
    figures = {"tokens_per_s": value or 0.0} if measure == AT_ONCE else {"s_per_token": {} if value is None else {"mean": value}}
    return facts | figures | {"by_repeat": [{own: one} for one in by_repeat or (value,)], "saturation": saturation}


def rows(measure, method, ratios=None, **values):
    """One for every rank, from r1=…, r2=…"""
    return [
        row(measure, method, int(name[1:]), value, ratio=None if ratios is None else ratios[place])
        for place, (name, value) in enumerate(values.items())
    ]


def cross(first, second):
    own = points_of([*first, *second])
    found = by_method(own, own[0].measure)
    return crossover(advantages(found["flora"], found["bmm-lora"]))


def test_methods_cross_between_the_ranks_where_their_order_changes():
    first = rows(AT_ONCE, "flora", r1=400.0, r4=200.0, r16=50.0)
    for others, rank in (
        ({"r1": 100.0, "r4": 100.0, "r16": 100.0}, 8.0),  # 2 and 1/2: half-way in log rank
        ({"r1": 500.0, "r4": 400.0, "r16": 100.0}, 0.0),
        ({"r1": 1.0, "r4": 1.0, "r16": 50.0}, math.inf),
        ({"r1": 500.0, "r4": 100.0, "r16": 100.0}, 8.0),  # the last time
        ({"r1": 100.0, "r16": None}, math.inf),  # only where both were measured
    ):
        crossed = cross(first, rows(AT_ONCE, "bmm-lora", **others))
        assert crossed.rank == pytest.approx(rank) and crossed.low is None, others
    assert crossover([]) is None and crossing([]) is None
    assert advantages(points_of(first), points_of(rows(AT_ONCE, "bmm-lora", r2=1.0))) == []


def test_of_times_the_lower_is_better():
    rising, level = rows(AT_8, "flora", r1=0.1, r16=1.6), rows(AT_8, "bmm-lora", r1=0.4, r16=0.4)
    assert cross(rising, level).rank == pytest.approx(4.0)


def test_a_crossover_has_the_interval_in_which_the_advantages_intervals_cross():
    first = rows(STEPS, "flora", r1=1.0, r4=2.0, r16=4.0)
    crossed = cross(first, rows(STEPS, "bmm-lora", [(2, 1.9, 2.1), (1, 0.5, 2), (0.5, 0.4, 0.6)], r1=2.0, r4=2.0, r16=2.0))
    assert crossed.rank == pytest.approx(4.0) and 1 < crossed.low < 4.0 < crossed.high < 16
    unsure = [Advantage(1, 1.1, 0.9, 1.2), Advantage(4, 0.9, 0.8, 1.1)]
    assert crossover(unsure).low == 0.0 and crossover(unsure).high == math.inf
    assert crossover([*unsure, Advantage(8, 0.5)]).low is None


def test_repeats_are_paired_where_there_are_enough_for_an_interval():
    def both(repeats):
        own = [row(AT_ONCE, "flora", 1, 200.0, by_repeat=[200.0, 220.0, 180.0][:repeats])]
        own += [row(AT_ONCE, "bmm-lora", 1, 100.0, by_repeat=[100.0, 100.0, 100.0][:repeats])]
        found = by_method(points_of(own), AT_ONCE)
        return advantages(found["flora"], found["bmm-lora"])[0]

    assert both(3).times == pytest.approx(2.0) and 1.8 <= both(3).low <= both(3).high <= 2.2
    assert both(2).low is None and both(2).times == 2.0


def test_a_point_has_a_value_and_a_range():
    step, throughput, latency = points_of(
        [row(AT_ONCE, "flora", 1, 100.0, by_repeat=(90.0, 110.0)), row(AT_8, "flora", 1, 0.25), row(STEPS, "flora", 1, 5.0)]
    )
    assert throughput.value == 100.0 and throughput.range == (90.0, 110.0)
    assert latency.value == 0.25 and latency.range is None
    assert step.value == pytest.approx(5.0) and step.range == pytest.approx((4.0, 10.0)) and step.ratio is None
    assert points_of([row(AT_8, "flora", 1, None)])[0].value is None and points_of([row(AT_ONCE, "flora", 1, 0.0)])[0].value is None
    assert measures_of([latency, throughput, step]) == [STEPS, AT_ONCE, AT_8]


@pytest.mark.parametrize(
    "change",
    [{"rank": 0}, {"rank": True}, {"rank": "1"}, {"measures": "magic"}, {"method": 3}, {"step_quantiles": None},
     {"ratio_to_first": 1}, {"step_quantiles": {"p50": math.nan, "p10": 1, "p90": 1}}],
)  # fmt: skip
def test_what_is_no_row_of_a_sweep_is_refused(change):
    with pytest.raises(ValueError, match="row of a sweep|number"):
        SweepPoint.of_row(row(STEPS, "flora", 1, 1.0) | change)


# -------------------------------------------------------------------------------------------------------------- report


@pytest.fixture
def result():
    measured = [
        *rows(STEPS, "flora", r1=2.0, r4=4.0, r16=9.0),
        *rows(STEPS, "bmm-lora", [(2, 1.9, 2.1), (1, 0.9, 1.1), (0.5, 0.4, 0.6)], r1=4.0, r4=4.0, r16=4.5),
        *rows(AT_ONCE, "flora", r1=400.0, r4=200.0, r16=50.0),
        *rows(AT_ONCE, "bmm-lora", r1=100.0, r4=100.0, r16=100.0),
        *rows(AT_8, "flora", r1=0.1, r4=0.2),
        row(AT_8, "flora", 16, 3.0, saturation="the queue grew"),
        *rows(AT_8, "bmm-lora", r1=0.2, r4=0.3, r16=4.0),
    ]
    load = LoadSettings(Traffic(num_requests=8, new_tokens=Lengths.parse("3"), popularity="distinct"), warmup_requests=2)
    settings = SweepSettings(load, ranks=(1, 4, 16), rates=(8.0,), num_adapters=3)
    facts = {"torch": "2.0", "models": {"code": {"name": NASTY}}}
    measured = tuple(one | {"command": "=1+1"} for one in measured)
    return SweepResult(settings, None, (8.0,), measured, 32, facts, f"c {NASTY}", False)


def test_the_verdicts_say_where_the_first_method_stops_being_better(result):
    assert sweep_report.verdicts(result.points, "flora") == [
        "Decode step: fLoRA's is shorter than bmm-LoRA's up to a rank of about 4 [3.3, 5].",
        "Throughput: fLoRA's is higher than bmm-LoRA's up to a rank of about 8.",
        "Latency at 8 requests/s: fLoRA's is lower than bmm-LoRA's up to the highest rank measured, 16.",
    ]
    worse = points_of([*rows(AT_8, "flora", r1=0.5), *rows(AT_8, "bmm-lora", r1=0.2)])
    assert sweep_report.verdicts(worse, "flora") == [
        "Latency at 8 requests/s: fLoRA's is not lower than bmm-LoRA's at any rank measured."
    ]
    assert sweep_report.verdicts((), "flora") == [] and sweep_report.headline((), "flora") == ""
    said = sweep_report.headline
    assert said(result.points, "flora") == "In decode steps, fLoRA loses to bmm-LoRA from a rank of about 4 on [3.3, 5]."
    assert said(worse, "flora") == "In latency at 8 requests/s, fLoRA loses to bmm-LoRA from the lowest rank on, 1."


@pytest.mark.parametrize(
    ("by_rank", "verdict", "headline"),
    [
        (
            [(1.02, 0.9, 1.1), (1.0, 0.9, 1.1), (0.98, 0.9, 1.1)],
            "not told from bmm-LoRA's beyond noise at any rank up to 16.",
            "is within noise of bmm-LoRA up to rank 16.",
        ),
        (
            [(2, 1.9, 2.1), (1.2, 1.1, 1.3), (1.05, 0.9, 1.1)],
            "shorter than bmm-LoRA's up to the highest rank measured, 16, beyond noise up to 7.7.",
            "is ahead of bmm-LoRA beyond noise up to a rank of 7.7, and does not lose to it up to 16.",
        ),
        (
            [(0.95, 0.9, 1.1), (0.8, 0.7, 0.9), (0.5, 0.4, 0.6)],
            "not shorter than bmm-LoRA's at any rank measured, beyond noise from 1.9 on.",
            "loses to bmm-LoRA from the lowest rank on, 1 (beyond noise from 1.9 on).",
        ),
        (
            [(2, 1.9, 2.1), (1.5, 1.4, 1.6), (1.2, 1.1, 1.3)],
            "shorter than bmm-LoRA's up to the highest rank measured, 16.",
            "loses to bmm-LoRA at no rank up to 16.",
        ),
    ],
)
def test_what_the_intervals_leave_open_is_said_as_open(by_rank, verdict, headline):
    measured = [*rows(STEPS, "flora", r1=2.0, r4=4.0, r16=9.0), *rows(STEPS, "bmm-lora", by_rank, r1=4.0, r4=4.0, r16=4.5)]
    found = points_of(measured)
    assert sweep_report.verdicts(found, "flora") == [f"Decode step: fLoRA's is {verdict}"]
    assert sweep_report.headline(found, "flora") == f"In decode steps, fLoRA {headline}"


def test_the_table_has_a_line_per_rank_and_method_and_marks_what_is_over_saturated(result):
    heads, lines = sweep_report.table(result.points)
    assert heads == ["rank", "method", "step ms", "step / the first's", "tokens/s", "s/token at 8/s"] and len(lines) == 6
    assert lines[0] == ["1", "fLoRA", "2.00", "1", "400", "0.1000"]
    assert lines[1][:4] == ["1", "bmm-LoRA", "4.00", "2.00 [1.90, 2.10]"] and lines[4][-1] == "3.0000 *"
    text = report.text(report_of(result))
    assert "* over-saturated" in text and "3 random adapters of each rank" in text and text.endswith(result.command)
    missing = replace(result, rows=result.rows[6:7])
    assert sweep_report.table(missing.points)[1] == [["1", "fLoRA", "400"]] and "* over" not in report.text(report_of(missing))


def plain_json(figure):
    return json.loads(json.dumps(figure, allow_nan=False)) == figure


def test_the_chart_of_a_measure_has_every_methods_own_look(result):
    chart = by_rank(result.points, AT_8, (1, 4, 16, 64))
    first, second = chart.figure["data"]
    assert first["x"] == [1, 4, 16] and first["y"] == [0.1, 0.2, 3.0] and "error_y" not in first
    assert first["marker"]["symbol"] == ["circle", "circle", "circle-open"] and second["line"]["dash"] == "dash"
    assert chart.figure["layout"]["xaxis"]["type"] == "log" and chart.figure["layout"]["xaxis"]["tickvals"] == [1, 4, 16, 64]
    assert "fLoRA 0.1 at rank 1 to 3 at rank 16" in chart.description and "hollow marks are over-saturated" in chart.description
    assert plain_json(chart.figure)
    repeated = points_of([row(AT_ONCE, "flora", 1, 100.0, by_repeat=(90.0, 130.0)), row(AT_ONCE, "flora", 2, None)])
    bars = by_rank(repeated, AT_ONCE, (1, 2)).figure["data"][0]
    assert (bars["error_y"]["array"], bars["error_y"]["arrayminus"], bars["x"]) == ([30.0], [10.0], [1])
    assert by_rank((), AT_ONCE, ()).description == "Throughput by rank: nothing measured yet."


def test_the_crossover_chart_shades_where_the_first_method_loses_and_draws_others_fainter(result):
    beside = [Beside(f"recorded: {NASTY}", result.points)]
    chart = crossing_chart(result.points, STEPS, (1, 4, 16), "flora", beside)
    faint, own = chart.figure["data"]
    assert own["y"] == [2.0, 1.0, 0.5] and own["opacity"] == 1 and own["error_y"]["array"] == pytest.approx([0.1, 0.1, 0.1])
    assert faint["opacity"] < 1 and "error_y" not in faint and "<script>" not in faint["name"] and "recorded: " in faint["name"]
    region, line = chart.figure["layout"]["shapes"]
    assert region["y1"] == line["y0"] == 1 and region["y0"] < 0.5 and plain_json(chart.figure)
    assert (
        "bmm-LoRA 2.00 at rank 1 to 0.50 at rank 16; in the shaded region fLoRA loses; bars are 95 % intervals."
        in chart.description
    )
    assert crossing_chart((), STEPS, (1, 2), "flora").description.endswith("nothing to compare yet.")


def test_the_page_is_whole_and_harmless_and_the_csv_runs_nothing(result):
    page = report.html_page(report_of(result))
    own = page.replace(get_plotlyjs(), "")
    assert own.count("Plotly.newPlot") == 4 and "alert(1)</script>" not in own and "http" not in own
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page) and "&lt;/script&gt;" in own
    assert next(csv.DictReader(io.StringIO(report.csv(report_of(result)))))["command"] == "'=1+1"
    empty = report_of(replace(result, rows=()))
    assert report.html_page(empty) and report.markdown(empty) and empty.sentences == ["Nothing was measured."]
