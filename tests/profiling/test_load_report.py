"""Every format of a load report, its charts, and that nothing a user names gets through unescaped."""

import csv
import dataclasses
import io
import json
import math
import re

import pytest
from plotly.offline import get_plotlyjs

from flora.store import AdapterCounters
from profiling import hardware, load_figures, load_report, report
from profiling.load import Sample
from profiling.load_metrics import Record
from profiling.load_report import report_of
from profiling.load_result import LoadResult
from profiling.load_runs import LoadSettings, MethodRun
from profiling.saturation import Saturation
from profiling.traffic import PlannedRequest, Prompt, Traffic

NASTY = "</script><script>alert(1)</script> | <img src=x onerror=alert(1)>"


def sample(second, waiting=0, running=2):
    return Sample(float(second), 4, {"finished": 1}, {"code": waiting}, {"code": running}, 8.0, 50.0 + second, {}, {}, {"code": {}})


def record(index, took_s, outcome="finished", error=None, adapter="lua"):
    planned = PlannedRequest(index, 0.1 * index, "code", adapter, Prompt("a", 10, 4), 2)
    tokens = [0.1 * index + took_s / 2, 0.1 * index + took_s] if outcome == "finished" else []
    return Record(planned, 0.1 * index, 0.1 * index, tokens, 0.1 * index + took_s, outcome, error)


def run_of(method, took_s, repeat=0, **changes):
    records = [record(0, took_s), record(1, 2 * took_s), record(2, 3 * took_s, adapter=NASTY)]
    adapters = {"code": {"lua": AdapterCounters(hits=3, misses=1, loads=1, load_s=0.25)}}
    run = MethodRun(method, repeat, tuple(records), tuple(sample(second, second) for second in range(4)), 3.0, None, adapters)
    return dataclasses.replace(run, **changes)


class Engine:
    """What a result asks of an engine."""

    import torch

    max_batch_size, adapters, device = 32, {}, torch.device("cpu")

    def snapshot(self):
        return type("Snapshot", (), {"adapter_slots": 64})


@pytest.fixture
def result(monkeypatch):
    facts = {"name": NASTY, "dtype": "float32", "hidden_size": 8}
    monkeypatch.setattr(hardware, "environment", lambda engines: {"torch": "2.0", "threads": 2, "models": {"code": facts}})
    return make


def make(*runs, command="python -m profiling load", **settings):
    runs = runs or (run_of("flora", 0.2), run_of("bmm-lora", 0.3))
    methods = tuple(dict.fromkeys(run.method for run in runs))
    traffic = settings.pop("traffic", Traffic(num_requests=3, rate=10.0))
    return LoadResult.of(runs, LoadSettings(traffic, methods, **settings), {"code": Engine()}, command)


def test_the_html_report_is_whole_and_harmless(result):
    page = report.html_page(report_of(result(command=f"python -m profiling load {NASTY}")))
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page), "nothing is fetched"
    own = page.replace(get_plotlyjs(), "")
    assert own.count("<script>") == 2 and "alert(1)</script>" not in own and "<img" not in own
    assert "http" not in own and "&lt;/script&gt;" in own, "the name is there, as text"
    assert own.count("Plotly.newPlot") == 7 == own.count('role="img"') and "prefers-color-scheme: dark" in own


def test_the_tables_by_hand(result):
    found = result(limits={"e2e": 0.45})
    heads, lines = load_report.rates_table(found)
    first, second = (dict(zip(heads, line, strict=True)) for line in lines)
    assert first == {
        "kind": "code", "method": "fLoRA", "rank": "", "finished": "3 / 3", "requests/s": "1.00",
        "tokens/s": "2", "s/token": "0.2000", "goodput/s": "0.67", "goodput": "66.7 %", "waiting": "1.5",
        "waiting max": "3", "running": "2.0", "slot hits": "75.0 %",
    }  # fmt: skip
    assert second["s/token"] == "0.3000" and second["goodput"] == "33.3 %"
    heads, lines = load_report.latencies_table(found)
    table = {(line[1], line[2]): line[3:] for line in lines}
    assert heads[3:] == ["mean", "p50", "p90", "p99"] and len(lines) == 10
    assert table["fLoRA", "TTFT"] == ["200.00", "200.00", "280.00", "298.00"]  # 100, 200 and 300 ms
    assert table["fLoRA", "E2E"] == ["400.00", "400.00", "560.00", "596.00"]
    assert table["bmm-LoRA", "TPOT"][0] == "300.00"
    heads, lines = load_report.adapters_table(found)
    assert lines[0] == ["fLoRA", "code", "lua", "2", "3", "1", "0", "1", "250.00"] and lines[1][2] == NASTY


def test_two_kinds_have_a_line_each_and_one_together(result, monkeypatch):
    monkeypatch.setattr(hardware, "environment", lambda engines: {"models": {"code": {"dtype": "a"}, "speech": {"dtype": "b"}}})
    traffic = Traffic(num_requests=3, rate=10.0, mix={"code": 0.5, "speech": 0.5})
    run = run_of("flora", 0.2, adapters={"code": {}, "speech": {}})
    spoken = dataclasses.replace(run.records[2], planned=dataclasses.replace(run.records[2].planned, kind="speech"))
    run = dataclasses.replace(run, records=(*run.records[:2], spoken))
    found = LoadResult.of([run], LoadSettings(traffic, ("flora",)), {"code": Engine(), "speech": Engine()}, "c")
    assert [line[:2] + [line[3]] for line in load_report.rates_table(found)[1]] == [
        ["code", "fLoRA", "2 / 2"], ["speech", "fLoRA", "1 / 1"], ["all", "fLoRA", "3 / 3"],
    ]  # fmt: skip
    assert [json.loads(line)["dtype"] for line in report.jsonl(report_of(found)).splitlines()] == ["a", "b", "a + b"]


def test_the_headline_says_the_rate_and_the_ratio_and_its_range(result):
    assert load_report.headline(result()) == (
        "Requests 10 requests/s (Poisson): fLoRA 0.2000 s/token and 2 tokens/s; "
        "bmm-LoRA 0.3000 s/token and 2 tokens/s, 1.50 times fLoRA's seconds."
    )
    runs = [run_of("flora", 0.2), run_of("bmm-lora", 0.3), run_of("flora", 0.2, 1), run_of("bmm-lora", 0.2, 1)]
    assert "1.25 times fLoRA's seconds (between 1.00 and 1.50 over 2 repeats)" in load_report.headline(result(*runs, repeats=2))
    closed = Traffic(num_requests=3)
    assert load_report.headline(result(traffic=closed, concurrency=4)).startswith("Requests 4 at a time (closed loop): ")
    assert load_report.headline(result(traffic=closed)).startswith("Requests all at once: ")
    bursts = Traffic(num_requests=3, rate=2.0, burstiness=0.5)
    assert "2 requests/s (burstiness 0.5)" in load_report.headline(result(traffic=bursts))


def test_what_spoils_the_numbers_is_said(result):
    lost = [
        record(0, 0.2),
        record(1, 0.2, "refused", "BusyError"),
        record(2, 0.2, "failed", "ServingError"),
        record(3, 1, "cancelled"),
    ]
    saturated = run_of("flora", 0.2, records=tuple(lost), saturation=Saturation(1.0, "the queue grew to 40"), interrupted=True)
    late = run_of("bmm-lora", 0.2)
    for one in late.records:
        one.sent_s += 0.5
    found = result(saturated, late)
    said = " ".join(load_report.warnings(found))
    assert "fLoRA was over-saturated: the queue grew to 40." in said and "fLoRA was stopped by hand" in said
    assert "fLoRA did not finish all: 1 refused, 1 failed, 1 cancelled (BusyError 1, ServingError 1)." in said
    assert "The generator was late with bmm-LoRA" in said and "500 ms" in said
    assert load_report.outcomes_table(found)[1] == [
        ["fLoRA", "refused", "BusyError", "1"], ["fLoRA", "failed", "ServingError", "1"], ["fLoRA", "cancelled", "–", "1"],
    ]  # fmt: skip
    page = report.html_page(report_of(found))
    assert "What did not finish" in page and "What did not finish" not in report.html_page(report_of(result()))
    assert load_report.warnings(result()) == []


def test_the_terminal_text_is_aligned_and_complete(result):
    text = report.text(report_of(result(limits={"ttft": 0.5}, warmup_requests=7)))
    rates, latencies = text.split("\n\n")[:2]
    for table in (rates, latencies):
        assert len({line.index("LoRA") for line in table.splitlines()[1:] if "fLoRA" in line}) == 1
        assert len(table.splitlines()[1]) == len(table.splitlines()[2]), "numbers end at the same column"
    for words in (
        "3 requests a run",
        "7 warm-up requests",
        "1 repeat",
        "adapters zipf:1.5",
        "seed 0",
        "goodput within ttft 500 ms",
    ):
        assert words in text, words
    assert text.endswith("Reproduce:\npython -m profiling load") and "vLLM's bench serve" in text


def test_the_csv_opens_in_a_spreadsheet_without_running_anything(result):
    rows = list(csv.DictReader(io.StringIO(report.csv(report_of(result(command="=HYPERLINK(1)"))))))
    assert [row["method"] for row in rows] == ["flora", "flora", "bmm-lora", "bmm-lora"]
    assert all(row["command"] == "'=HYPERLINK(1)" for row in rows) and float(rows[0]["ttft_s.p50"]) == pytest.approx(0.2)


def test_a_result_without_a_finished_request_still_makes_every_report(result):
    empty = result(run_of("flora", 0.2, records=(), samples=()))
    nothing = LoadResult.of([], LoadSettings(Traffic(), ("flora",)), {"code": Engine()}, "c")
    for found in (empty, nothing):
        assert "no request finished" in load_report.headline(found)
        for suffix in (".html", ".md", ".csv", ".jsonl"):
            assert isinstance(report.render(report_of(found), f"load{suffix}"), str)
        assert report.text(report_of(found))


# -------------------------------------------------------------------------------------------------------------- charts


def lengths_agree(figure):
    return all(len(trace["x"]) == len(trace["y"]) <= 1000 for trace in figure["data"])


@pytest.mark.parametrize("num", [0, 1, 5, 5000])
def test_a_chart_over_time_is_plain_json_with_fixed_ranges_and_a_sentence(num):
    series = {"flora": (list(range(num)), [3.0] * num), "bmm-lora": ([], [])}
    chart = load_figures.over_time(series, "Requests waiting", "requests")
    assert json.loads(json.dumps(chart.figure, allow_nan=False)) == chart.figure and lengths_agree(chart.figure)
    assert chart.description.endswith(".") and ("fLoRA 3 in the mean, 3 at most" in chart.description) is bool(num)
    assert chart.figure["layout"]["yaxis"]["range"] == [0, 4 if num else 1.0] and "bmm-LoRA" not in chart.description


def test_a_spread_says_which_share_took_how_long():
    chart = load_figures.spread({"flora": [30.0, 10.0, 20.0], "bmm-lora": []}, "TTFT")
    line = chart.figure["data"][0]
    assert (line["x"][0], line["x"][-1], line["y"][0], line["y"][-1]) == (10.0, 30.0, 0.0, 1.0) and lengths_agree(chart.figure)
    assert "fLoRA 20 ms in the median" in chart.description and chart.figure["layout"]["yaxis"]["range"] == [0, 1.02]
    slow = load_figures.spread({"flora": [10.0] * 99 + [5000.0]}, "TTFT")
    assert slow.figure["layout"]["xaxis"]["range"][1] < 100 and slow.description.endswith("1 lies beyond the axis.")
    assert load_figures.spread({}, "TTFT").description == "TTFT: nothing measured yet."


def test_popularity_is_drawn_for_the_first_adapters_only_and_escaped():
    chart = load_figures.requests_by_adapter({f"a{place}": 100 - place for place in range(60)} | {NASTY: 200})
    (bars,) = chart.figure["data"]
    assert len(bars["x"]) == 40 and bars["y"][0] == 200 and "<" not in bars["x"][0]
    assert "61 of them, the most popular with 5 % of 4430 requests" in chart.description and "first 40" in chart.description
    assert load_figures.requests_by_adapter({}).description.endswith("none was asked for.")
    assert math.isfinite(chart.figure["layout"]["yaxis"]["range"][1])
