"""The Op lab's tab without a browser: what its controls may say, how a measurement goes on, and what was recorded."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from fake_costs import fake_costs

from flora.errors import RequestError
from profiling import op_lab, peaks
from profiling.cost_model import LayerShape
from profiling.dashboard import op_lab as tab
from profiling.dashboard import op_lab_views as views
from profiling.dashboard.op_lab import FREE, OpLabWork, setting_of
from profiling.events import HowFar
from profiling.op_lab import OpLabResult, Setting, measure
from profiling.op_lab_recorded import Recorded, RecordedPoint, read_recorded
from profiling.recorded import Recording
from profiling.report import lines_of

CPU = torch.device("cpu")
SETTING = Setting(LayerShape(24, 16, rows=3, length=1, rank=2, adapters=3))
SIZES = (8, 1, 4, 8)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(op_lab, "FEWEST_ROUNDS", 1)
    monkeypatch.setattr(op_lab, "MOST_ROUNDS", 1)
    monkeypatch.setattr(peaks, "_last_cache", lambda: 1 << 16)


@pytest.fixture(scope="module")
def result() -> OpLabResult:
    return measure(SETTING, CPU, fake_costs(), ("flora", "bmm-lora"), "python -m profiling oplab --rows 3", budget_s=0.02)


# -------------------------------------------------------------------------------------------------------------- controls


def test_what_the_controls_say_is_a_setting():
    setting = setting_of("llama-2-7b", "o_proj", 7, 7, SIZES, "bfloat16")
    assert (setting.shape, setting.dtype, setting.layer) == (LayerShape(4096, 4096, *SIZES), "bfloat16", "o_proj")
    assert setting_of(FREE, "left over", 33.0, 7, SIZES, "float32").shape == LayerShape(33, 7, *SIZES)
    assert setting_of("starcoder", None, None, None, SIZES, "float32").layer == "c_attn"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("starcoder", "c_attn", None, None, (None, 1, 4, 8), "float32"), "rows must be a whole number from 1 to 1024"),
        (("starcoder", "c_attn", None, None, (8, 1.5, 4, 8), "float32"), "length must be a whole number"),
        (("starcoder", "c_attn", None, None, (8, 1, True, 8), "float32"), "rank must be a whole number"),
        (("starcoder", "c_attn", None, None, (8, 1, 4, "8"), "float32"), "adapters must be a whole number"),
        (("starcoder", "c_attn", None, None, (8, 1, 4, 9), "float32"), "8 rows cannot have 9 adapters"),
        (("starcoder", "c_attn", None, None, (8, 1, 4000, 8), "float32"), "rank may be 256 at most"),
        (("starcoder", "c_attn", None, None, (8, 1, float("nan"), 8), "float32"), "rank must be a whole number"),
        (("starcoder", "c_attn", None, None, (8, 1, float("inf"), 8), "float32"), "rank must be a whole number"),
        (("starcoder", "q_proj", None, None, SIZES, "float32"), "no layer 'q_proj'"),
        ((["starcoder"], None, None, None, SIZES, "float32"), "there is no model"),
        ((None, None, None, None, SIZES, "float32"), "there is no model"),
        ((FREE, None, None, 8, SIZES, "float32"), "d_in must be a whole number"),
        ((FREE, None, 8, -8, SIZES, "float32"), "d_out must be at least 1"),
        (("starcoder", "c_attn", None, None, SIZES, "float13"), "choose a dtype among"),
        (("starcoder", "c_attn", None, None, SIZES, ["float32"]), "choose a dtype among"),
    ],
)
def test_what_makes_no_sense_is_a_sentence(values, words):
    with pytest.raises(RequestError, match=words):
        setting_of(*values)


# ----------------------------------------------------------------------------------------------------------- measurement


def known(device, dtype):
    """A machine that is measured in two steps."""
    yield 0.0
    yield 0.5
    return fake_costs()


def test_a_machine_that_is_not_known_is_measured_first(monkeypatch):
    monkeypatch.setattr(tab, "costs_in_steps", known)
    monkeypatch.setattr(op_lab, "BUDGET_S", 0.02)
    work = OpLabWork(SETTING, CPU)
    assert work.report() is None
    *shares, found = work.measure(lambda: False)
    assert all(isinstance(event, HowFar) for event in shares)
    assert [event.share for event in shares] == sorted(event.share for event in shares) and "once" in shares[0].words
    work.take(found)
    assert isinstance(found, OpLabResult) and work.report().command == work.command == found.command
    assert "--d-in 24 --d-out 16 --rows 3 --length 1 --rank 2 --adapters 3" in work.command


def test_stop_ends_it_while_the_machine_is_measured_and_while_the_layer_is(monkeypatch):
    monkeypatch.setattr(tab, "costs_in_steps", known)
    assert [event.share for event in OpLabWork(SETTING, CPU).measure(lambda: True)] == [0.0]
    answers = iter([False, False, True, True])
    events = list(OpLabWork(SETTING, CPU).measure(lambda: next(answers)))
    assert all(isinstance(event, HowFar) for event in events) and len(events) == 3


# ----------------------------------------------------------------------------------------------------------------- views


def test_a_points_table_has_a_line_for_each_method_and_says_what_is_left_out(result):
    shown = views.table(replace(result, left_out={"sgmv-lora": "<b>too slow</b>"}))["cells"]
    assert shown["table"].count("<tr") == 1 + 3 + 1 and "&lt;b&gt;too slow" in shown["table"] and "<b>too" not in shown["table"]
    assert shown["heading"].endswith("live") and "n = " in shown["conditions"] and "WRONG" not in shown["table"]
    wrong = replace(result.methods["flora"], error=float("nan"))
    assert "WRONG" in views.table(replace(result, methods=result.methods | {"flora": wrong}))["cells"]["table"]
    assert "Fastest here" in views.verdict(result)["cells"]["verdict"]
    roofline, predictions = views.charts([result, result])
    assert len(predictions["data"][1]["x"]) == 2 and len(roofline["data"][1]["x"]) == 1, "the roofline is the last point's"


def test_what_was_recorded_is_read_and_shown_as_that(result, tmp_path):
    assert "Nothing is recorded" in views.recorded(read_recorded(tmp_path))["cells"]["note"]
    rows = result.to_rows()
    other = [row | {"rank": 1, "model": "<i>x</i>", "layer": "y"} for row in rows]
    (tmp_path / "oplab.jsonl").write_text(lines_of([*rows, *other]))
    found = read_recorded(tmp_path)
    assert [point.setting.shape.rank for point in found.points] == [2, 1] and not found.complaint
    assert found.points[0].setting == SETTING and set(found.points[0].rows) == {"base", "flora", "bmm-lora"}
    shown = views.recorded(found)["cells"]
    assert shown["heading"] == "recorded, not live" and "2 points, measured on" in shown["note"]
    assert "&lt;i&gt;x" in shown["table"] and "<i>" not in shown["table"]


def gpu_recording(**changed) -> Recording:
    row = {"part": "layers", "method": "flora", "phase": "decode", "d_in": 6144, "batch": 8, "rank": 4, "tokens": 1}
    row |= {"quantize": None, "over_base": [1.1, 1.05, 1.12], "bandwidth_share": 0.75, "median_s": 1e-4, "measures": "layer"}
    row |= {"d_out": 6144, "dtype": "bfloat16", "form": "decode", "over_flora": [1.0, 1.0, 1.0]}
    row |= {"quantiles": {"p10": 1e-4, "p90": 1e-4}, "dry_run": False, "hardware": {"device_name": "<b>a GPU</b>"}}
    return Recording("gpu_rows", "gpu", "python -m profiling gpu", (row | changed,))


def test_a_recording_of_one_part_hides_no_other_and_devices_stay_apart():
    full = replace(gpu_recording(), rows=(*gpu_recording().rows, *gpu_recording(batch=16).rows), name="full")
    part = Recording("figures", "gpu", "python -m profiling gpu --part figures", ({**full.rows[0], "measures": "peaks"},))
    other = gpu_recording(hardware={"device_name": "another"}, over_base=[1.3, 1.3, 1.3])
    cells = views.promised_on_a_gpu([full, gpu_recording(), part, other])["cells"]
    assert "2 of 34 points" in cells["table"] and "1.3× [1.3×, 1.3×], 1 of 34 points" in cells["table"]
    assert cells["table"].count("<td>another</td>") == 8 and "yes" not in cells["table"] and "NO" not in cells["table"]
    assert all(f"{name}, " in cells["note"] for name in ("full", "gpu_rows", "figures"))


def test_what_is_promised_on_a_gpu_is_not_yet_measured_until_it_is():
    for recorded in ([], [gpu_recording(dry_run=True)]):
        cells = views.promised_on_a_gpu(recorded)["cells"]
        assert cells["table"].count("not yet measured") == 8 and "No GPU has been measured yet" in cells["note"]
    cells = views.promised_on_a_gpu([gpu_recording(over_base=[9.0, 9.0, 9.0]), gpu_recording()])["cells"]  # the later of two
    assert cells["table"].count("not yet measured") == 6 and "75 %" in cells["table"]
    assert "1.1× [1.05×, 1.12×], 1 of 34 points" in cells["table"]
    assert "Recorded, not live: gpu_rows" in cells["note"] and "<b>" not in cells["note"]
    broken = views.promised_on_a_gpu([gpu_recording(over_base=3)])["cells"]
    assert broken["table"].count("not yet measured") == 8 and "left out" in broken["note"]


def test_a_lead_within_the_gap_is_no_win(result):
    point = RecordedPoint(result.setting, {row["method"]: row for row in result.to_rows()})
    for row, seconds in (("flora", 1.0), ("bmm-lora", 1.1)):
        point.rows[row] = point.rows[row] | {"median_s": seconds, "predicted_s": seconds}
    assert point.fastest() == "neither" and point.fastest("predicted_s") == "flora"
    point.rows["bmm-lora"]["median_s"] = 0.5
    assert point.fastest() == "bmm-lora"
    del point.rows["flora"]
    assert point.fastest() is None and point.fastest("predicted_s") is None
    table = views.recorded(Recorded((point,)))["cells"]["table"]
    assert "neither" not in table and table.count("<td>–</td>") >= 3


@pytest.mark.parametrize(
    "change",
    ["not json", "[]", {"measures": "peaks"}, {"median_s": 0}, {"median_s": "1"}, {"predicted_s": None}, {"rank": 0},
     {"dtype": "x"}, {"method": 3}, {"hardware": "cpu"}, {"rows": "8"}, {"over_first": "x"}, {"first": None}, {"d_in": 1e9},
     {"model": ["x"]}],
)  # fmt: skip
def test_a_line_that_is_no_row_is_left_out_and_complained_of(change, result, tmp_path):
    rows = result.to_rows()
    bad = change if isinstance(change, str) else json.dumps(rows[2] | change)
    (tmp_path / "oplab.jsonl").write_text(lines_of(rows[:2]) + bad + "\n")
    found = read_recorded(tmp_path)
    assert set(found.points[0].rows) == {"base", "flora"} and "1 of 3 lines" in found.complaint
    assert views.recorded(found)["cells"]["table"]
    (tmp_path / "oplab.jsonl").write_bytes(b"\xff\xfe")
    assert "cannot be read" in read_recorded(tmp_path).complaint
