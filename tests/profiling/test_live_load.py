"""The Live load tab without a browser: what a visitor may ask for, whose load runs when, and what the samples look like."""

from __future__ import annotations

import re
import shlex
import time
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from fake_serving import ServingEngine, adapters

from flora.errors import BusyError, FloraError, RequestError
from profiling import __main__ as command_line
from profiling import report
from profiling.dashboard import live_load, live_load_report, live_load_views, own_request
from profiling.dashboard.live_load import LiveLoads, Wish
from profiling.dashboard.live_load_views import CHARTS, Look, Mark, Moment
from profiling.dashboard.status import notice
from profiling.load import Sample
from profiling.load_command import settings_from
from profiling.load_metrics import Record
from profiling.saturation import Saturation
from profiling.traffic import Clip, Clips, PlannedRequest, Prompt, Prompts


class Engine(ServingEngine):
    """What a visitor's requests are checked by, too."""

    max_batch_tokens = 2048
    deadline_s = None  # of the last request

    def submit(self, request, method="flora", *, deadline_s=None, **options):
        self.deadline_s = deadline_s
        return super().submit(request, method, **options)

    def validate(self, request, method="flora"):
        if request.max_new_tokens > 100:
            raise RequestError("the model has no room for so many new tokens")


@pytest.fixture
def engines(monkeypatch):
    engines = {
        "code": Engine(adapters=adapters("lua", "rb", "d")),
        "speech": Engine(kind="speech", name="speech", adapters=adapters("cs", "hi")),
    }
    for engine in engines.values():
        engine.bank.slot_capacity = 8
    sources = {
        "code": Prompts(str.split, " ".join, 200, [Prompt("a b c", 3, 3, "lua"), Prompt("d e", 2, 3, "rb")]),
        "speech": Clips([Clip("c.wav", 3, samples=np.ones(4, np.float32))], 50),
    }
    monkeypatch.setattr(live_load, "sources_of", lambda wanted: {kind: sources[kind] for kind in wanted})
    monkeypatch.setattr(live_load, "UPDATE_S", 0.02)
    yield engines
    for engine in engines.values():
        engine.close()


@pytest.fixture
def loads(engines):
    loads = LiveLoads(engines)
    yield loads
    loads.close()


QUICK = Wish(rate=50.0, new_tokens=3, num_adapters=2)


def wait_until(condition, seconds=20.0):
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "it never came"
        time.sleep(0.005)


# ---------------------------------------------------------------------------------------------------------------- wishes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rate", 0.0), ("rate", 51), ("rate", None), ("rate", float("nan")), ("rate", "9"), ("rate", True),
        ("num_adapters", 0), ("num_adapters", 2.5), ("prompt_tokens", -1), ("new_tokens", 100_000), ("speech_percent", 101),
        ("ttft_limit_ms", 0), ("tpot_limit_ms", float("inf")), ("method", "magic"), ("method", None), ("method", ["flora"]),
        ("popularity", "zipf:9e9"), ("popularity", {}),
    ],
)  # fmt: skip
def test_a_wish_that_makes_no_sense_is_refused_by_name(name, value):
    with pytest.raises(RequestError, match="must be a|there is no such"):
        replace(Wish(), **{name: value})


@pytest.mark.parametrize(
    ("kinds", "percent", "mix"),
    [
        (("code", "speech"), 25, {"code": 0.75, "speech": 0.25}),
        (("code", "speech"), 0, {"code": 1.0}),
        (("code", "speech"), 100, {"speech": 1.0}),
        (("code",), 70, {"code": 1.0}),
        (("speech",), 0, {"speech": 1.0}),
    ],
)
def test_the_mix_is_of_the_models_there_are(kinds, percent, mix):
    assert replace(Wish(), speech_percent=percent).mix(kinds) == mix


def test_what_was_changed_is_said_in_words():
    other = replace(Wish(), method="bmm-lora", rate=7.5, prompt_tokens=9, ttft_limit_ms=1)
    assert Wish().changes(other) == ["bmm-LoRA", "7.5/s", "prompts 9"]
    assert other.changes(replace(other, tpot_limit_ms=3)) == []


def test_every_model_is_asked_for_equally_many_adapters(loads):
    both = replace(QUICK, num_adapters=3, speech_percent=50.0)
    assert loads.adapters(both) == {"code": ("lua", "rb"), "speech": ("cs", "hi")}
    assert loads.adapters(replace(both, speech_percent=0.0)) == {"code": ("lua", "rb", "d")}


def test_a_method_that_serves_none_of_the_adapters_is_never_the_base_model_in_silence(engines, loads):
    engines["code"].adapters = adapters("lua", families=("lora",))
    with pytest.raises(RequestError, match="fLoRA"):
        loads.start("me", QUICK)
    assert loads.of("me") is None and not engines["code"].submitted


@pytest.mark.parametrize(
    "wish", [QUICK, replace(QUICK, speech_percent=30.0, prompt_tokens=20, popularity="skewed", method="loop-lora")]
)
def test_the_command_asks_for_the_same_traffic(loads, wish):
    words = shlex.split(loads.command(wish))
    assert words[:3] == ["python", "-m", "profiling"]
    options = command_line._parser().parse_args(words[3:])
    settings = settings_from(options)
    traffic = wish.traffic(["code", "speech"])
    assert settings.traffic == replace(traffic, rate=wish.rate, num_requests=3000)
    assert settings.methods == (wish.method,) and settings.limits == wish.limits
    assert options.adapters == 2 and options.max_batch_size == 4 and options.code_model is None


# ----------------------------------------------------------------------------------------------------------------- loads


def test_a_load_sends_on_its_sessions_behalf_until_it_is_stopped(engines, loads):
    load = loads.start("me", QUICK)
    wait_until(lambda: load.driver.samples and load.driver.samples[-1].outcomes.get("finished", 0) > 5)
    assert loads.num_running == 1 and load.moment(1).state == "running"
    assert {(one.session, one.method) for one in engines["code"].submitted} == {("me", "flora")}
    assert {one.request.adapter for one in engines["code"].submitted} <= {"lua", "rb"}
    loads.stop("me")
    wait_until(lambda: not load.driver.running)
    sent = len(engines["code"].submitted)
    time.sleep(0.1)
    assert len(engines["code"].submitted) == sent and load.moment(0).state == "stopped" and loads.num_running == 0


def test_every_control_takes_effect_while_it_runs(engines, loads):
    load = loads.start("me", replace(QUICK, rate=0.5))
    wait_until(lambda: load.driver.started_s is not None)
    assert len(engines["code"].submitted) <= 1
    loads.change("me", replace(QUICK, rate=50.0, method="bmm-lora", new_tokens=5, speech_percent=100.0))
    wait_until(lambda: len(engines["speech"].submitted) > 5)
    late = list(engines["speech"].submitted)[-1]
    assert (late.method, late.request.max_new_tokens) == ("bmm-lora", 5)
    assert load.marks[-1].method == "bmm-lora" and load.wish.rate == 50.0
    before = len(load.marks)
    loads.change("me", replace(load.wish, ttft_limit_ms=7.0))
    assert len(load.marks) == before and load.moment(1).limits["ttft"] == 0.007


def test_a_change_that_cannot_be_served_leaves_the_load_as_it_is(loads):
    load = loads.start("me", QUICK)
    for wish in (replace(QUICK, prompt_tokens=190, new_tokens=64), replace(QUICK, new_tokens=101)):
        with pytest.raises(RequestError):
            loads.change("me", wish)
        assert load.wish == QUICK and load.driver.running
    loads.change("nobody", QUICK)
    assert loads.of("nobody") is None


def test_only_so_many_visitors_send_at_once_and_each_once(loads, monkeypatch):
    monkeypatch.setattr(live_load, "MAX_LOADS", 2)
    first = loads.start("one", QUICK)
    assert loads.start("one", QUICK) is first
    loads.start("two", QUICK)
    with pytest.raises(RequestError, match="2 visitors"):
        loads.start("three", QUICK)
    loads.forget("one")
    assert loads.of("one") is None
    wait_until(lambda: not first.driver.running)
    assert loads.start("three", QUICK).driver.running


def test_a_load_ends_by_itself(loads, monkeypatch):
    monkeypatch.setattr(live_load, "MAX_S", 0.2)
    load = loads.start("me", QUICK)
    wait_until(lambda: not load.driver.running)
    moment = load.moment(0)
    assert moment.state == "done" and "by itself" in live_load_views.verdict(moment)[1]
    assert set(moment.samples[-1].outcomes) == {"finished"}, "what was sent is still answered"


def test_a_load_that_breaks_says_so_without_the_servers_insides(loads, monkeypatch, caplog):
    load = loads.start("me", QUICK)
    monkeypatch.setattr(load._traffic, "_sources", {})
    loads.change("me", replace(QUICK, popularity="identical"))
    wait_until(lambda: not load.driver.running)
    state, words = live_load_views.verdict(load.moment(0))
    assert state == "failed" and "KeyError" not in words and "server" in words and "KeyError" in caplog.text


def test_closing_stops_everybodys_and_begins_no_other(loads):
    load = loads.start("me", QUICK)
    loads.close()
    wait_until(lambda: not load.driver.running)
    with pytest.raises(FloraError, match="going down"):
        loads.start("me", QUICK)


# ------------------------------------------------------------------------------------------------- requests of one's own


def own_value(loads, session="me", prompt="local x", tag="lua", method="flora", new_tokens=6):
    """What the page shows in the end, and how often it was told."""
    *before, last = loads.answer(session, prompt, tag, method, new_tokens)
    return last, len(before)


def test_a_request_of_ones_own_is_answered_in_everybodys_batch(engines, loads):
    engines["code"].step_s = 0.01
    load = loads.start("somebody", replace(QUICK, new_tokens=30, speech_percent=0.0))
    wait_until(lambda: engines["code"].snapshot().running > 2)
    value, _ = own_value(loads)
    mine = next(one for one in engines["code"].submitted if one.session == ("me", "own"))
    assert (mine.method, mine.request.adapter, mine.request.max_new_tokens, mine.request.temperature) == ("flora", "lua", 6, 0.0)
    assert value["classes"] == {"own": "own done", "answer": "output"} and value["cells"]["answer"].endswith("xxxxxx</pre>")
    words = value["cells"]["words"]
    assert re.match(r"6 tokens, the first after .*s, then .*s a token\. Beside it ran ", words), words
    most = int(re.search(r"(\d) at most", words)[1])
    assert 1 < most <= engines["code"].max_batch_size - 1 and words.endswith("everybody&#x27;s with fLoRA in the same forward.")
    assert load.driver.running


def test_a_request_of_ones_own_comes_as_it_is_written_and_alone_it_says_so(engines, loads, monkeypatch):
    monkeypatch.setattr(own_request, "UPDATE_S", 0.02)
    engines["code"].step_s = 0.1
    *texts, last = [value["cells"]["answer"].count("x") for value in loads.answer("me", "f(", None, "flora", 5)]
    assert texts == sorted(texts) and len(set(texts)) > 2 and last == 5
    words = own_value(loads, method="merged")[0]["cells"]["words"]
    assert "this one alone" in words


@pytest.mark.parametrize(
    ("wanted", "word"),
    [
        ({"prompt": ""}, "empty"), ({"prompt": " \n"}, "empty"), ({"prompt": None}, "empty"), ({"prompt": "x" * 20_001}, "20,001"),
        ({"tag": "nope"}, "nope"), ({"tag": 7}, "adapter"), ({"method": "magic"}, "method"), ({"method": None}, "method"),
        ({"new_tokens": 0}, "new tokens"), ({"new_tokens": None}, "new tokens"), ({"new_tokens": 1.5}, "whole number"),
    ],
)  # fmt: skip
def test_a_request_of_ones_own_that_cannot_be_served_is_refused_by_name(engines, loads, wanted, word):
    with pytest.raises(RequestError, match=word):
        own_value(loads, **wanted)
    assert engines["code"].snapshot().num_arrived == 0


def test_a_request_of_ones_own_that_fails_or_finds_no_room_says_why(engines, loads):
    engines["code"].fails = ("rb",)
    with pytest.raises(FloraError, match="no numbers"):
        own_value(loads, tag="rb")
    engines["code"].max_waiting = 0
    with pytest.raises(BusyError, match="full"):
        own_value(loads)
    loads.close()
    with pytest.raises(RequestError, match="going down"):
        own_value(loads)


@pytest.mark.parametrize("end", ["stop", "forget", "close", "leave"])
def test_a_request_of_ones_own_that_nobody_waits_for_is_cancelled(engines, loads, monkeypatch, end):
    monkeypatch.setattr(own_request, "UPDATE_S", 0.02)
    engines["code"].step_s = 0.02
    values = loads.answer("me", "local x", "lua", "flora", 100)
    next(value for value in values if value["classes"]["own"] == "own running")
    assert engines["code"].snapshot().running == 1
    if end == "leave":
        values.close()
    else:
        {"stop": loads.own_stops.raise_flag, "forget": loads.forget, "close": lambda _: loads.close()}[end]("me")
        *_, last = values
        assert last["classes"]["own"] == "own stopped" and last["cells"]["words"].startswith("Stopped after ")
    wait_until(lambda: engines["code"].snapshot().num_cancelled == 1)
    assert engines["code"].snapshot().running == 0 and engines["code"].deadline_s == own_request.DEADLINE_S


def test_a_request_of_ones_own_that_was_stopped_before_its_turn_has_no_token(engines, loads, monkeypatch):
    monkeypatch.setattr(own_request, "UPDATE_S", 0.02)
    engines["code"].hold(True)
    values = loads.answer("me", "local x", "lua", "flora", 6)
    assert "waiting" in next(values)["classes"]["own"]
    loads.own_stops.raise_flag("me")
    engines["code"].hold(False)
    *_, last = values
    assert last["cells"]["words"] == "Stopped before the first token."


# ----------------------------------------------------------------------------------------------------------------- views


HOSTILE = '<img src=x onerror="alert(1)">'


def sample(second, waiting=0, running=3, outcomes=None, sent=0, ttft=0.05, batch=None, tokens=100.0):
    latency = {"mean": ttft, "p50": ttft, "p90": 2 * ttft, "p99": 3 * ttft} if ttft else {}
    tags = {"lua": running} if batch is None else batch
    return Sample(
        time_s=float(second), num_sent=sent, outcomes=outcomes or {}, waiting={"code": waiting}, running={"code": running},
        arrivals_per_s=5.0, tokens_per_s=tokens, ttft_s=latency, tpot_s=latency, batch={"code": tags},
    )  # fmt: skip


def moment(samples, **options):
    facts = {
        "number": 1, "samples": samples, "records": [], "marks": [Mark(0.0, "", "flora")], "limits": {"ttft": 0.5, "tpot": 0.1},
        "saturation": None, "state": "running", "failure": "", "max_s": 600.0, "num_loads": 1,
    }  # fmt: skip
    return Moment(**(facts | options))


def steady(seconds, **options):
    """Five requests a second, sent and answered."""
    return [
        sample(0.5 * half, sent=int(2.5 * half), outcomes={"finished": int(2.5 * half)}, **options)
        for half in range(2 * seconds + 1)
    ]


def test_the_windows_axes_stand_still_and_hold_at_most_a_minute():
    look, layouts = Look(), []
    for seconds in (0, 1, 30, 61, 300):
        shown = live_load_views.charts(moment(steady(seconds)), look)
        assert tuple(shown) == CHARTS
        layouts.append({name: (value["layout"]["xaxis"]["range"], value["layout"]["margin"]) for name, value in shown.items()})
        for value in shown.values():
            for trace in value["data"]:
                assert len(trace["x"]) == len(trace["y"]) <= 121 and all(-60 <= x <= 0 for x in trace["x"])
            assert value["summary"].endswith(".") and value["layout"]["uirevision"] == "load 1"
    assert all(layout == layouts[0] for layout in layouts)


def test_nothing_is_drawn_before_the_first_sample():
    shown = live_load_views.charts(moment([]), Look())
    assert not any(trace["x"] for value in shown.values() for trace in value["data"])
    assert live_load_views.readouts(moment([]), "cpu")["cells"]["tokens"] == "–"


def test_an_axis_grows_at_once_and_shrinks_late():
    look = Look()
    assert look.end("ttft", 90.0) == 100.0 and look.end("ttft", 45.0) == 100.0
    assert look.end("ttft", 700.0) == 800.0 and look.end("ttft", 400.0) == 800.0 and look.end("ttft", 90.0) == 100.0


def test_a_change_of_method_changes_the_colour_from_there_on():
    marks = [Mark(0.0, "", "flora"), Mark(5.0, "bmm-LoRA", "bmm-lora")]
    shown = live_load_views.charts(moment(steady(10), marks=marks), Look())
    first, second = shown["tokens"]["data"]
    assert (first["name"], second["name"]) == ("fLoRA", "bmm-LoRA") and first["line"]["color"] != second["line"]["color"]
    at = first["x"].index(-5.0)
    assert first["y"][at - 1] == 100.0 and first["y"][at + 1] is None
    assert second["y"][at - 1] is None and second["y"][at] == first["y"][at] == 100.0, "the two lines meet"
    assert shown["tokens"]["layout"]["annotations"][0]["text"] == "bmm-LoRA"


def test_your_rates_and_everybodys():
    samples = [sample(0.5 * half, sent=4 * half, outcomes={"finished": 2 * half, "refused": half}) for half in range(21)]
    assert live_load_views.your_rates(samples, 20, 3.0) == pytest.approx((8.0, 4.0))
    assert live_load_views.your_rates(samples, 0, 3.0) == (0.0, 0.0)
    cells = live_load_views.readouts(moment(samples), "cpu")
    assert cells["cells"]["arriving"] == "8.0/s" and "5.0/s" in cells["cells"]["arriving_small"]
    assert "20 refused" in cells["cells"]["requests_small"] and cells["classes"]["requests_box"] == "readout bad"
    assert "20 of them yours" in cells["cells"]["engine_small"]


def test_goodput_is_of_the_last_seconds_and_leaves_out_what_was_cancelled():
    def record(ended_s, first_s, outcome="finished"):
        planned = PlannedRequest(0, 0.0, "code", "lua", Prompt("x", 1, 1), 2)
        return Record(planned, 0.0, ended_s - 1.0, [ended_s - 1.0 + first_s, ended_s], ended_s, outcome)

    quick = replace(moment(steady(30)), limits={"ttft": 0.5, "tpot": 5.0})
    records = [
        record(29.0, 0.1),
        record(28.0, 0.1),
        record(27.0, 0.9),
        record(26.0, 0.1, "refused"),
        record(25.0, 0.1, "cancelled"),
    ]
    cells = live_load_views.readouts(replace(quick, records=[record(5.0, 0.9), *records]), "cpu")["cells"]
    assert cells["goodput"] == "50 %" and "500 ms TTFT" in cells["goodput_small"]


def test_an_over_saturated_engine_is_said_in_words_with_what_to_do():
    calm = live_load_views.verdict(moment(steady(20)))
    assert calm == ("running", "sending · all is answered as it comes")
    rising = [
        sample(0.5 * half, waiting=2 * half, sent=5 * half, outcomes={"finished": 2 * half}, ttft=0.1 * (1 + half))
        for half in range(41)
    ]
    state, words = live_load_views.verdict(moment(rising))
    assert state == "behind" and "10 a second arrive and 4 are answered" in words and "lower the rate" in words
    state, words = live_load_views.verdict(moment(rising, saturation=Saturation(20.0, "the queue grew to 80 requests")))
    assert state == "saturated" and "the queue grew to 80 requests" in words and "Lower the rate" in words
    value = live_load_views.status(moment(rising, saturation=Saturation(20.0, "grew"), num_loads=3))
    assert value["classes"]["status"] == "status saturated" and "2 other visitors" in value["cells"]["since"]


class Tags(HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.found = set()
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)


def test_a_hostile_name_is_text():
    failed = SimpleNamespace(outcome="failed", message=HOSTILE, ended_s=None)
    bad = moment([sample(1, batch={HOSTILE: 2}, outcomes={"failed": 1}, sent=1)], records=[failed])
    own = SimpleNamespace(completion=None, text=HOSTILE, num_new_tokens=1, others=None)
    shown = live_load_views.own_answer(own, HOSTILE, "lua", "flora")
    assert Tags(shown["cells"]["answer"]).found == {"pre", "span"}
    refused = live_load_views.own_words("failed", HOSTILE)
    for value in (live_load_views.status(bad), live_load_views.note({"code": [HOSTILE]}), notice(HOSTILE), refused):
        assert Tags("".join(value["cells"].values())).found <= {"code"}
    trace = live_load_views.charts(bad, Look())["batch"]["data"][0]
    assert "<" not in trace["name"] and "<" not in trace["hovertemplate"].removesuffix("</extra>").replace("<extra>", "")


def test_many_adapters_share_the_last_colour_and_keep_their_own():
    look = Look()
    many = moment([sample(second, batch={None: 1, **{f"t{tag:03}": 40 - tag for tag in range(40)}}) for second in range(3)])
    traces = live_load_views.charts(many, look)["batch"]["data"]
    assert len(traces) == live_load_views.MAX_TAGS + 1 and traces[-1]["name"] == "others"
    assert sum(trace["y"][0] for trace in traces) == 1 + sum(range(1, 41))
    before = {trace["name"]: trace["fillcolor"] for trace in traces}
    few = moment([sample(4, batch={"t003": 1, "zz": 1})])
    after = {trace["name"]: trace["fillcolor"] for trace in live_load_views.charts(few, look)["batch"]["data"]}
    assert after["t003"] == before["t003"] and set(after) == {"t003", "zz"}


def test_an_ended_load_hands_out_the_whole_run():
    shown = live_load_views.charts(moment(steady(90), state="stopped"), Look())
    heads, *lines = shown["ttft"]["table"]
    assert len(lines) == 181 and all(len(line) == len(heads) for line in lines)
    last = dict(zip(heads, lines[-1], strict=True))
    assert (last["time_s"], last["method"], last["ttft_p90_ms"], last["runs:lua"]) == (90.0, "flora", 100.0, 3)
    assert "table" not in live_load_views.charts(moment(steady(90)), Look())["ttft"]


@pytest.mark.parametrize("template", ["READOUTS_TEMPLATE", "NOTE_TEMPLATE", "OWN_TEMPLATE"])
def test_what_is_written_has_a_place(template):
    cells = set(re.findall(r'data-cell="([^"]+)"', getattr(live_load_views, template)))
    value = {
        "STATUS_TEMPLATE": live_load_views.status(moment(steady(3))),
        "READOUTS_TEMPLATE": live_load_views.readouts(moment(steady(3)), "cpu"),
        "NOTE_TEMPLATE": live_load_views.note({"code": ["lua"]}),
        "OWN_TEMPLATE": live_load_views.own_words("failed", "no", keep_answer=False),
    }[template]
    assert {*value["cells"], *value["classes"], *value["attributes"]} <= cells


def test_a_load_that_has_ended_is_a_report_in_every_format():
    marks = [Mark(0.0, "", "flora"), Mark(2.0, HOSTILE, "bmm-lora")]
    seen = moment([sample(second, tokens=100.0 + second) for second in range(5)], marks=marks, state="stopped")
    found = live_load_report.report_of(seen, "python -m profiling load", {"torch": "2.0", "models": {}})
    assert [line[:3] for line in found.parts[0].lines] == [["fLoRA", "2", "100"], ["bmm-LoRA", "3", "103"]]
    assert len(found.rows) == 5 and all(row["hardware"] == {"torch": "2.0"} and row["command"] for row in found.rows)
    for suffix in (".html", ".md", ".csv", ".jsonl"):
        assert report.render(found, f"load{suffix}")
    assert live_load_report.report_of(moment([]), "c", {"models": {}}) is None
