"""A soak run loses nothing on engines that are well, and says what is lost or leaked on those that are not."""

from __future__ import annotations

import json
import math

import pytest

from flora import Engine, Request
from flora.engine import server
from profiling import __main__ as command
from profiling import soak
from profiling.load_runs import sources_of
from profiling.soak import Soak, capacity
from profiling.traffic import EndlessTraffic, Lengths, Traffic


@pytest.fixture
def engines(checkpoints):
    """A code and a speech engine with fewer slots than adapters."""
    made = {kind: checkpoints[kind].engine(max_batch_size=4, adapter_slots=2) for kind in ("code", "speech")}
    yield made
    for engine in made.values():
        engine.close(0)


def endless(engines: dict[str, Engine], clips, rate: float) -> EndlessTraffic:
    asked = [(str(place), Request("def f(" * (1 + place), max_new_tokens=6)) for place in range(3)]
    asked += [(str(place), Request(audio=clip, sampling_rate=16000, max_new_tokens=6)) for place, clip in enumerate(clips)]
    mix = {kind: 1 / len(engines) for kind in engines}
    traffic = Traffic(rate=rate, new_tokens=Lengths("uniform", 2, 20), popularity="uniform", all_adapters=True, mix=mix)
    return EndlessTraffic(traffic, sources_of(engines, asked), {kind: ["aa", "bb", "cc"] for kind in engines})


def test_nothing_is_lost_while_everything_comes_and_goes(engines, clips, monkeypatch):
    monkeypatch.setattr(soak, "CHANGE_ADAPTERS_EVERY_S", 0.05)
    monkeypatch.setattr(soak, "MEMORY_GROWTH", 1.0)  # two seconds say nothing of memory
    run = Soak(engines, "flora", endless(engines, clips, rate=40), duration_s=2.0, report_every_s=0.4)
    rows = list(run.run())
    last = rows[-1]
    assert run.wrong == []
    assert last.sent > 20 and last.open == last.waiting == last.running == 0
    assert sum(last.outcomes.values()) == last.sent and last.outcomes["finished"] > last.sent / 3
    assert last.outcomes["cancelled"] > 0 and last.adapter_changes > 5
    assert set(last.outcomes) <= {"finished", "cancelled", "refused", "UnknownAdapterError", "AdapterError"}
    assert [row.time_s for row in rows] == sorted(row.time_s for row in rows) and len(rows) == 6
    assert last.tokens > 0 and last.rss_mb > 10 and last.threads > 1


def test_a_request_that_never_ends_is_told(engines, clips, monkeypatch):
    """An engine that forgets every fifth of its requests, with their slots."""
    monkeypatch.setattr(soak, "SETTLE_S", 0.2)
    tell, seen = server.Server._tell, []

    def forgetful(self, told):
        kept = []
        for row, event in told:
            ends = isinstance(event, server.FinishEvent | server.FailEvent)
            seen.append(ends)
            if ends and sum(seen) % 5 == 0:
                self._bank.pin("bb", "flora")
                del self._tickets[row]
            else:
                kept.append((row, event))
        tell(self, kept)

    monkeypatch.setattr(server.Server, "_tell", forgetful)
    monkeypatch.setattr(soak, "LEFT", 0.0)
    code = {"code": engines["code"]}
    monkeypatch.setattr(soak.Soak, "_change_adapters", lambda self: None)
    run = Soak(code, "flora", endless(code, clips, rate=40), duration_s=0.8, report_every_s=0.4)
    rows = list(run.run())
    assert rows[-1].open > 0
    assert any(sentence == f"{rows[-1].open} of {rows[-1].sent} requests never ended" for sentence in run.wrong)
    assert any("adapter slots of the code model are held by requests that have ended" in sentence for sentence in run.wrong)


def test_a_thread_of_the_run_that_breaks_is_told(engines, clips, monkeypatch):
    code = {"code": engines["code"]}
    monkeypatch.setattr(soak, "CHANGE_ADAPTERS_EVERY_S", 0.01)
    monkeypatch.setattr(engines["code"], "add_adapter", lambda *args: 1 / 0)
    run = Soak(code, "flora", endless(code, clips, rate=5), duration_s=20.0, report_every_s=5.0)
    list(run.run())
    assert "the run broke (ZeroDivisionError: division by zero)" in run.wrong


@pytest.mark.parametrize(("mb", "grows"), [([100, 130, 131, 130, 130], False), ([100, 130, 140, 150, 160], True)])
def test_memory_that_grows_after_the_start_is_told(mb, grows, engines):
    run = Soak(engines, "flora", iter(()), duration_s=100.0)
    run._started_s = 0.0
    row = run._row()
    run.rows = [soak.replace(row, time_s=25.0 * place, rss_mb=value) for place, value in enumerate(mb)]
    run._judge()
    assert any("memory grew by" in sentence for sentence in run.wrong) == grows, run.wrong


def test_capacity_counts_what_is_finished(engines, clips):
    measured = capacity(engines, "flora", endless(engines, clips, rate=math.inf), seconds=0.8, concurrency=6)
    assert 1 < measured < 5000


def test_the_command(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(soak, "MEMORY_GROWTH", 1.0)
    made, rows = checkpoints["code"], tmp_path / "rows.jsonl"
    options = ["--minutes", "0.02", "--calibrate", "0.5", "--mix", "code", "--new-tokens", "uniform:2-6", "--load", "0.3"]
    adapters = [f"aa={made.adapters['aa']['flora']}", f"bb={made.adapters['bb']['flora']}"]
    models = ["--code-model", str(made.model), "--code-adapters", *adapters, "--device", "cpu", "--max-batch-size", "4"]
    assert command.main(["soak", *options, *models, "--json", str(rows)]) == 0
    said = capsys.readouterr().out
    assert "requests/s; serving" in said and "nothing lost, nothing leaked" in said
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert written[-1]["wrong"] == [] and written[-1]["open"] == 0 and written[-1]["environment"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "0"], "--minutes must be a number above 0"),
        (["--load", "nan"], "--load must be a number above 0"),
        (["--calibrate", "-1"], "--calibrate must be a number above 0"),
        (["--json", "nowhere/rows.jsonl"], "there is no such folder"),
        (["--mix", "video"], "a mix names code and speech"),
    ],
)
def test_nonsense_is_refused_before_anything_is_loaded(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["soak", *options])
    assert ended.value.code == 2 and message in capsys.readouterr().err
