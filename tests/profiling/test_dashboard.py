"""The page's parts that need neither a browser nor a model: text as HTML, events as figures, the line for the device."""

from __future__ import annotations

import re
import threading
import time
from html.parser import HTMLParser

import pytest
import soundfile
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from flora.engine import Agreement, Request
from flora.errors import RequestError
from profiling.dashboard import device as device_module
from profiling.dashboard import own_request, page
from profiling.dashboard.code_html import highlighted, transcript
from profiling.dashboard.device import Device, StopSignals
from profiling.dashboard.live_plot import LivePlot, plot_value
from profiling.dashboard.menus import Menu
from profiling.dashboard.results import (
    FIGURES_TEMPLATE,
    MAX_ROWS,
    REPRODUCE_TEMPLATE,
    STATUS_TEMPLATE,
    TABLE_TEMPLATE,
    Results,
    Row,
    _agreement,
    milliseconds,
    sentence,
)
from profiling.events import Progress, RowFailed, RowText, Started, StepTimed

METHODS = ("flora", "bmm-lora")


class Text(HTMLParser):
    """The text of a piece of HTML, and the names of its elements."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text, self.tags = "", set()
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


HOSTILE = '<script>alert("1")</script>\n\t& </pre> \' "quoted" \u202e'


@pytest.mark.parametrize("tag", ["d", "pl", "rb", "rs", "rkt", "swift", "jl", "lua", "r", "py", None, "no such language"])
@pytest.mark.parametrize("prompt", ["", "x = 1\n\n", '-- "unfinished', HOSTILE])
def test_highlighting_keeps_every_character_and_runs_none(tag, prompt):
    shown = Text(highlighted(prompt, HOSTILE, tag))
    assert shown.text == prompt + HOSTILE
    assert shown.tags <= {"pre", "span"}
    given = re.match(
        r'<pre class="code"><span class="given">(.*?)</span>(?:<span class="[a-z]">|[^<])', highlighted(prompt, "1", tag), re.S
    )
    assert given is not None


def test_the_prompt_ends_where_it_ends_even_inside_a_token():
    shown = highlighted('x = "ab', 'cd"\n', "py")
    given, written = shown.split("</span></span>", 1)
    assert Text(given).text == 'x = "ab'
    assert Text(written).text == 'cd"\n'


def test_a_transcript_has_its_language_and_direction():
    assert transcript("تسعة <b>", "ar") == '<p class="transcript" dir="auto" lang="ar">تسعة &lt;b&gt;</p>'


def test_sentences_and_units():
    assert sentence("the clip 'a.wav' is silent") == "The clip 'a.wav' is silent."
    assert sentence("Done.") == "Done."
    assert [milliseconds(s) for s in (None, 0.0021, 0.0191, 0.412)] == ["–", "2.10 ms", "19.1 ms", "412 ms"]


def test_agreement_badges():
    assert "✓ 48 of 48" in _agreement(Agreement(48, 48, 1e-6))
    assert "✗ 47 of 48" in _agreement(Agreement(48, 47, None))
    assert "not checked" in _agreement(None)


def keys(template: str) -> set[str]:
    return set(re.findall(r'data-cell="([^"]+)"', template))


def some_results() -> Results:
    rows = [
        Row("code", "lua", prompt="-- <b>\nfunction f()"),
        Row("code", None, error="Bad."),
        Row("speech", "cs", clip="a<b>.flac"),
    ]
    return Results(METHODS, rows, positions=[0, 2], run=7)


def test_every_value_has_its_place_in_the_templates():
    results = some_results()
    for value, template in (
        (results.status(), STATUS_TEMPLATE),
        (results.figures(), FIGURES_TEMPLATE),
        (results.table(), TABLE_TEMPLATE),
    ):
        used = set(value["cells"]) | set(value["classes"]) | set(value["attributes"])
        assert used <= keys(template), used - keys(template)
    # gradio's own template language must find nothing to replace
    for template in (STATUS_TEMPLATE, FIGURES_TEMPLATE, TABLE_TEMPLATE, REPRODUCE_TEMPLATE):
        assert not set("`\\") & set(template) and "${" not in template and "{{" not in template


def test_events_become_text_figures_and_errors():
    results = some_results()
    results.apply(Started(rows=(), methods=METHODS, num_steps=4))
    for step in range(4):
        results.apply(Progress("prefill" if step == 0 else "decode", step, 4))
        for kind in ("code", "speech"):
            for method, seconds in zip(METHODS, (0.010, 0.020), strict=True):
                results.apply(StepTimed(step, kind, method, "decode" if step else "prefill", seconds, 1))
        results.apply(RowText(1, "flora", "jedna" + "." * step, step + 1, False))
    results.apply(RowFailed(0, "the prompt is too long"))
    assert results.figures()["cells"]["ratio"].startswith("2.00×")
    assert results.figures()["cells"]["left_tpot"] == "20.0 ms", "of two kinds the sum"
    table = results.table()
    assert "jedna..." in table["cells"]["row2_left"] and table["cells"]["row2_left_meta"] == "4 tokens"
    assert table["classes"]["row0"] == "code failed" and table["cells"]["row0_error"] == "The prompt is too long."
    assert table["classes"]["row1"] == "code failed" and table["classes"]["row3"] == "absent"
    assert "&lt;b&gt;" in table["cells"]["row2_request"] and "<b>" not in "".join(table["cells"].values())
    assert 0 < results.fraction < 1 and "decoding" in results.words
    chart = results.chart()
    assert [trace["x"] for trace in chart["data"]] == [[1, 2], [1, 2]], "the newest step may still lack a part"
    assert chart["layout"]["uirevision"] == "run 7" and "fLoRA" in chart["summary"]


def test_there_is_a_table_row_for_every_row_of_a_full_batch():
    from profiling.dashboard.batch import KINDS, ROWS_PER_KIND

    assert ROWS_PER_KIND * len(KINDS) <= MAX_ROWS


def test_the_plot_names_no_place_on_this_machine():
    plot = LivePlot(plot_value({"data": [], "layout": {}}, 'a "sentence"'))
    assert "gradio_api/instrument/plotly.min.js?v=" in plot.html_template
    assert "site-packages" not in plot.html_template and 'aria-label="a &quot;sentence&quot;"' in plot.html_template


# ------------------------------------------------------------------------------------------------------------- the device


def finish(run, seconds=10):
    events = []
    until = time.monotonic() + seconds
    while not run.done and time.monotonic() < until:
        events += run.fetch(0.05)
    return events


def test_runs_wait_in_line_and_an_abandoned_one_never_starts(monkeypatch):
    device, gate, began = Device(), threading.Event(), []

    def comparison(name):
        began.append(name)
        gate.wait(10)
        yield Progress("decode", 1, 1)

    runs = [device.start(lambda name=name: comparison(name)) for name in "abc"]
    assert [device.num_ahead(run) for run in runs] == [0, 1, 2]
    runs[1].abandoned = True
    monkeypatch.setattr(device_module, "MAX_IN_LINE", 3)
    with pytest.raises(RequestError, match="in line"):
        device.start(lambda: comparison("d"))
    gate.set()
    assert [len(finish(run)) for run in runs] == [1, 0, 1]
    assert began == ["a", "c"] and all(run.error is None for run in runs)
    assert device.num_ahead(runs[2]) == 0


def test_a_comparison_that_breaks_hands_over_its_error_and_frees_the_device():
    device = Device()

    def broken():
        yield Progress("decode", 1, 2)
        raise ZeroDivisionError("ours")

    run = device.start(broken)
    assert len(finish(run)) == 1 and isinstance(run.error, ZeroDivisionError)
    after = device.start(lambda: iter([Progress("decode", 1, 1)]))
    assert len(finish(after)) == 1 and after.error is None


def test_closing_stops_the_run_under_way_and_begins_no_other():
    device = Device()

    def endless():
        while not device.closing.is_set():
            yield Progress("decode", 1, 1)
            time.sleep(0.01)

    runs = [device.start(endless), device.start(endless)]
    assert runs[0].fetch(0.2)
    device.close()
    finish(runs[0])
    assert runs[0].done and runs[0].error is None
    with pytest.raises(RequestError, match="going down"):
        device.start(endless)


def test_stop_signals_are_per_session_and_fresh_for_each_run():
    stops = StopSignals()
    first = stops.arm("session")
    stops.raise_flag("session")
    stops.raise_flag("another")
    assert first.is_set() and stops.flag("session") is first
    assert not stops.arm("session").is_set()
    second = stops.flag("session")
    stops.forget("session")
    assert second.is_set() and stops.flag("session") is not second


def test_a_choice_from_before_a_menu_changed_is_told_and_what_is_no_choice_is_not():
    menu = Menu(["cs_1", "cs_2"], render=False)
    assert menu.preprocess("ar_1") == "ar_1" and menu.preprocess("cs_2") == "cs_2"
    assert [menu.preprocess(value) for value in (None, 7, ["cs_1"], {"a": 1})] == [None] * 4
    assert menu.get_block_name() == "dropdown"


# ------------------------------------------------------------------------------------------------- requests of programs


@pytest.fixture(scope="module")
def client(engines, tmp_path_factory):
    demo = page.build(engines, tmp_path_factory.mktemp("no results"))
    demo.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **page.launch_options(demo))
    yield Client(demo.local_url, verbose=False)
    demo.close(verbose=False)


def test_programs_requests_run_together_and_are_answered_as_each_alone(client, engines):
    tags = ["lua", "rb", None, "lua", "rb", None, "lua", "rb"]
    wanted = [Request(prompt=f"local x{i} = ", adapter=tag, max_new_tokens=48) for i, tag in enumerate(tags)]
    alone = [engines["code"].generate([request])[0] for request in wanted]
    before = engines["code"].snapshot()
    with engines["code"].exclusive():  # so that the first ones wait for the last
        jobs = [client.submit(one.prompt, one.adapter, "flora", 48, api_name="/generate") for one in wanted]
        until = time.monotonic() + 20
        while engines["code"].snapshot().waiting < len(jobs):
            assert time.monotonic() < until, "they never came"
            time.sleep(0.01)
    answers = [job.result(timeout=60) for job in jobs]
    after = engines["code"].snapshot()
    assert [answer["text"] for answer in answers] == [completion.text for completion in alone]
    assert [answer["finish_reason"] for answer in answers] == [completion.finish_reason for completion in alone]
    num_tokens = sum(answer["num_new_tokens"] for answer in answers)
    assert num_tokens == sum(len(completion.token_ids) for completion in alone) == after.num_tokens - before.num_tokens
    assert after.num_steps - before.num_steps < num_tokens / 3
    assert max(answer["others_max"] for answer in answers) > 1
    assert all(answer["ttft_s"] > 0 and answer["tpot_s"] >= 0 for answer in answers)


def test_an_answer_streams_and_ends_with_its_times(client, monkeypatch):
    monkeypatch.setattr(own_request, "UPDATE_S", 0.005)
    job = client.submit("local x", None, "base", 100, api_name="/generate")
    assert job.result(timeout=60)["finish_reason"] in ("stop", "length")
    *before, last = job.outputs()
    assert any(0 < value["num_new_tokens"] < last["num_new_tokens"] for value in before)
    assert all(set(value) == {"text", "num_new_tokens", "finish_reason"} for value in before)
    assert all(value["finish_reason"] is None and last["text"].startswith(value["text"].rstrip("\ufffd")) for value in before)
    assert set(last) == {"text", "num_new_tokens", "finish_reason", "ttft_s", "tpot_s", "others_mean", "others_max"}


def test_a_clip_is_answered_by_the_speech_model(client, engines, tone, tmp_path):
    soundfile.write(tmp_path / "tone.wav", tone, 16_000, subtype="FLOAT")
    answer = client.predict(audio=handle_file(str(tmp_path / "tone.wav")), adapter="cs", max_new_tokens=6, api_name="/generate")
    alone = engines["speech"].generate([Request(audio=tone, sampling_rate=16_000, adapter="cs", max_new_tokens=6)])[0]
    assert (answer["text"], answer["finish_reason"]) == (alone.text, alone.finish_reason)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({}, "either a prompt or audio"), ({"prompt": "  "}, "empty"), ({"prompt": 7}, "must be text"),
        ({"prompt": "x" * 20_001}, "20,001"), ({"adapter": "nope"}, "nope"), ({"adapter": 7}, "adapter"),
        ({"method": "magic"}, "magic"), ({"method": ["flora"]}, "method"), ({"method": None}, "method"),
        ({"max_new_tokens": 0}, "256"), ({"max_new_tokens": "9"}, "whole number"), ({"max_new_tokens": 100_000}, "256"),
        ({"prompt": None, "audio": {"path": "/etc/passwd"}}, "uploaded"), ({"prompt": None, "audio": 7}, "uploaded"),
        ({"audio": 7}, "one of the two"),
    ],
)  # fmt: skip
def test_what_a_program_may_not_send_is_named(client, arguments, word):
    with pytest.raises(AppError, match=word) as refusal:
        client.predict(api_name="/generate", **({"prompt": "x"} if arguments else {}) | arguments)
    assert "/etc" not in str(refusal.value) and str(refusal.value).endswith(".")


def test_a_fault_of_ours_is_logged_and_told_without_the_servers_insides(client, engines, monkeypatch, caplog):
    def broken(*_, **__):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(engines["code"], "submit", broken)
    with pytest.raises(AppError, match="went wrong on the server"):
        client.predict("x", api_name="/generate")
    assert "ZeroDivisionError" in caplog.text
