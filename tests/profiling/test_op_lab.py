"""The Op lab: every method right against float64, what does not fit is told, what is found is said, and the command's input."""

from __future__ import annotations

import json
from dataclasses import replace

import psutil
import pytest
import torch
from fake_costs import fake_costs

from flora.errors import RequestError
from profiling import op_lab, op_lab_command, op_lab_report, peaks, report
from profiling.__main__ import main
from profiling.cost_model import METHODS, LayerShape
from profiling.op_lab import OpLabResult, Setting, measure
from profiling.op_lab_grid import GRID_MODELS, Wins, grid, summary
from profiling.op_lab_report import report_of

CPU = torch.device("cpu")
ODD = LayerShape(33, 129, rows=7, length=3, rank=2, adapters=3)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few calls of each, and a cache that is flushed at once."""
    monkeypatch.setattr(op_lab, "FEWEST_ROUNDS", 2)
    monkeypatch.setattr(op_lab, "MOST_ROUNDS", 2)
    monkeypatch.setattr(peaks, "_last_cache", lambda: 1 << 16)


def found(shape: LayerShape = ODD, dtype: str = "float32", **keywords) -> OpLabResult:
    return measure(Setting(shape, dtype), CPU, fake_costs(dtype=dtype), **keywords)


# --------------------------------------------------------------------------------------------------------------- measure


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "shape", [ODD, LayerShape(64, 40, 5, 1, 3, 5), LayerShape(16, 8, 1, 1, 1, 1), LayerShape(40, 16, 4, 9, 6, 1)]
)
def test_every_method_agrees_with_float64(shape, dtype):
    result = found(shape, dtype)
    assert set(result.methods) == set(METHODS) and not result.left_out
    for point in result.methods.values():
        assert point.agrees and 0 <= point.error <= point.allowed, point
        assert point.low_s <= point.seconds <= point.high_s and point.seconds > 0
        assert point.bandwidth_share == pytest.approx(point.num_bytes / point.seconds / 10e9)
    assert result.rounds == 2 * op_lab.LAYOUTS and result.methods["base"].ratio_to_base is None
    assert result.first == "flora" and result.methods["bmm-lora"].ratio_to_first.n == result.rounds


def test_a_wrong_method_is_found(monkeypatch):
    bmm_lora = op_lab.Problem.call_of

    def off(problem, method):
        call = bmm_lora(problem, method)
        return (lambda: call() * 1.001) if method == "bmm-lora" else call

    monkeypatch.setattr(op_lab.Problem, "call_of", off)
    result = found()
    assert [point.method for point in result.methods.values() if not point.agrees] == ["bmm-lora"]
    assert "WRONG" in report.text(report_of([result], ""))


def test_of_a_large_layer_a_part_from_all_over_is_checked(monkeypatch):
    monkeypatch.setattr(op_lab, "CHECKED", 5000)
    shape = replace(ODD, rank=4)
    result = found(shape)
    assert 0 < result.checked_outputs <= 5000 / (33 * 4) and all(point.agrees for point in result.methods.values())
    assert f"{result.checked_outputs} outputs" in op_lab_report.conditions(result)


def test_what_takes_too_long_or_too_much_memory_is_left_out_and_told(monkeypatch):
    shape = LayerShape(512, 512, rows=8, length=8, rank=64, adapters=8)
    result = found(shape, budget_s=0.02)
    assert "flora-expand" in result.left_out and "would take about" in result.left_out["flora-expand"]
    assert set(result.methods) | set(result.left_out) == set(METHODS) and "base" in result.methods
    assert "is left out" in report.text(report_of([result], ""))
    with pytest.raises(RequestError, match="does not fit: a call would take"):
        found(shape, budget_s=1e-6)
    memory = psutil.virtual_memory()._replace(available=1 << 20)
    monkeypatch.setattr(op_lab.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(RequestError, match="does not fit: it would need 0.0 GiB, more than may be used"):
        found(shape)


def test_a_visitor_who_stops_gets_nothing():
    assert found(should_stop=lambda: True) is None


def test_only_the_methods_that_were_asked_for():
    result = found(methods=("bmm-lora", "flora"))
    assert list(result.methods) == ["base", "bmm-lora", "flora"] and result.first == "bmm-lora"
    with pytest.raises(RequestError, match="'merged'"):
        found(methods=("merged",))


def test_rows_hold_everything_and_are_json():
    rows = json.loads(json.dumps(found().to_rows(), allow_nan=False))
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        facts = (row["d_in"], row["d_out"], row["rows"], row["tokens"], row["rank"], row["adapters"], row["dtype"])
        assert facts == (33, 129, 7, 3, 2, 3, "float32")
        assert row["hardware"]["torch"] == torch.__version__ and row["predicted_s"] > 0 and row["agrees"] is True
        assert row["popularity"] == "uniform" and (row["over_base"] is None) == (row["method"] == "base")


# ---------------------------------------------------------------------------------------------------------------- layers


def test_layers_of_known_models():
    setting = Setting.of_model("starcoder", rows=8, rank=4, adapters=8)
    assert (setting.shape.d_in, setting.shape.d_out) == (6144, 6400) and setting.name == "starcoder c_attn, 6144 → 6400"
    assert Setting.of_model("llama-2-13b", "down_proj", adapters=1).shape.d_in == 13824
    assert Setting.of_model("whisper-large-v3", "fc1", adapters=1).shape.d_out == 5120
    assert Setting(ODD).name == "33 → 129"
    for model, layer, words in (("gpt-5", None, "no model 'gpt-5'"), ("starcoder", "q_proj", "no layer 'q_proj'")):
        with pytest.raises(RequestError, match=words):
            Setting.of_model(model, layer)
    with pytest.raises(RequestError, match="rank may be 256 at most"):
        Setting(replace(ODD, rank=257))
    with pytest.raises(RequestError, match="float13"):
        Setting(ODD, "float13")


# ------------------------------------------------------------------------------------------------------------------ words


def timed(result: OpLabResult, **seconds: float) -> OpLabResult:
    """The same result with other times of some methods."""
    methods = dict(result.methods)
    for name, second in seconds.items():
        method = name.replace("_", "-")
        methods[method] = replace(methods[method], seconds=second)
    return replace(result, methods=methods)


def test_the_sentences_say_who_wins_and_why():
    result = found(LayerShape(512, 512, 8, 1, 4, 8))
    slow = {"flora_expand": 4.0, "flora_modulate": 5.0, "bmm_lora": 2.0, "loop_lora": 3.0, "sgmv_lora": 2.1}
    winner, why, crossing = op_lab_report.verdict(timed(result, **slow))
    assert winner.startswith("Fastest here: bmm-LoRA, 2,000 ms, level with sgmv-LoRA")
    assert "bound by bandwidth" in why and "sends 32 rows through it instead of 8" in why
    assert f"from rank {result.crossover} on" in crossing and f"{result.eq7_crossover:.2f}" in crossing
    winner = op_lab_report.verdict(timed(result, **slow | {"flora_expand": 1.0}))[0]
    assert winner.startswith("Fastest here: fLoRA expand, 1,000 ms, 100 % before bmm-LoRA")
    rank_1 = op_lab_report.verdict(found(LayerShape(512, 512, 8, 1, 1, 8)))
    assert "At rank 1 fLoRA sends no more rows" in rank_1[1]
    many = op_lab_report.verdict(found(LayerShape(64, 64, 2, 256, 8, 1)))
    assert "forms a weight of its own for each of the 1 adapter" in many[1]
    assert len(op_lab_report.verdict(found(methods=("base",)))) == 2


def test_the_charts_hold_every_method_below_the_roof_that_was_measured():
    result = found()
    for chart in (op_lab_report.roofline([result]), op_lab_report.predictions([result])):
        names = [trace["name"] for trace in chart.figure["data"]]
        assert len(names) == 1 + len(METHODS) and json.dumps(chart.figure, allow_nan=False)
        assert chart.figure["layout"]["xaxis"]["type"] == "log" and chart.description.endswith(".")
    roof = op_lab_report.roofline([result]).figure["data"][0]
    assert roof["y"][1] == pytest.approx(100) and roof["x"][1] == pytest.approx(10)
    assert op_lab_report.roofline([]).description == op_lab_report.predictions([]).description == "Nothing is measured yet."


# -------------------------------------------------------------------------------------------------------------------- grid


def test_the_grid_has_every_model_batch_and_rank_once():
    settings = grid()
    assert len(set(settings)) == len(settings) == 15 * len(GRID_MODELS)
    assert [setting.model for setting in settings[: len(GRID_MODELS)]] == list(GRID_MODELS)


def test_a_grid_counts_errors_and_winners():
    result = found()
    def predicted(name):
        return result.methods[name].predicted.seconds

    def measured(bmm: float) -> OpLabResult:
        exact = {name.replace("-", "_"): predicted(name) for name in METHODS}
        return timed(result, **exact | {"bmm_lora": bmm * exact["bmm_lora"]})

    right = summary([measured(1.0)])
    assert right.error == pytest.approx(0) and right.kept and set(right.by_method) == set(METHODS)
    wrong = summary([measured(1.0), measured(1000.0)])
    assert wrong.by_method["bmm-lora"] == pytest.approx((0 + 0.999) / 2) and wrong.points == 2
    assert wrong.paper_wins.decided >= 1 and wrong.paper_wins.named < wrong.paper_wins.decided and not wrong.kept
    assert "promised" in " ".join(op_lab_report.summary_sentences(wrong))
    assert str(Wins(0, 0)) == "no lead was that large" and str(Wins(10, 9)) == "9 of 10 (90 %)"
    alone = summary([found(methods=("sgmv-lora",))])
    assert alone.eq7_error is None and alone.all_wins.share is None


# ----------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Run the command with a machine whose costs are known; its exit code and what it printed."""
    monkeypatch.setattr(op_lab_command, "machine_costs", lambda device, dtype, fresh: fake_costs())
    monkeypatch.setattr(peaks, "cache_folder", lambda: tmp_path / "cache")
    return lambda *words: main(["oplab", "--threads", "1", "--device", "cpu", *words])


def test_a_point_is_printed_and_written(command, capsys, tmp_path):
    rows = tmp_path / "rows.jsonl"
    page, sheet = tmp_path / "report.html", tmp_path / "rows.csv"
    files = ("--json", str(rows), "--report", str(page), "--csv", str(sheet))
    assert command("--d-in", "96", "--d-out", "64", "--rank", "2", "--seconds", "0.05", *files) == 0
    assert page.read_text().count("Plotly.newPlot(") == 2 and len(sheet.read_text().splitlines()) == 1 + len(METHODS)
    printed = capsys.readouterr().out
    assert "96 → 64: 8 rows of 1 token, rank 2, 8 adapters, float32" in page.read_text() and "Fastest here" in printed
    assert [json.loads(line)["method"] for line in rows.read_text().splitlines()] == list(METHODS)
    assert command("--d-in", "96", "--d-out", "64", "--methods", "flora", "--seconds", "0.05", "--json", "-") == 0
    assert [json.loads(line)["method"] for line in capsys.readouterr().out.splitlines()] == ["base", "flora"]


def test_a_dry_run_predicts_and_measures_nothing(command, capsys, monkeypatch):
    monkeypatch.setattr(op_lab_command, "measure", None)
    assert command("--model", "starcoder", "--dry-run") == 0
    assert "nothing was measured" in (printed := capsys.readouterr().out) and "starcoder c_attn" in printed
    assert command("--grid", "--dry-run", "--model", "llama-2-7b") == 0
    assert capsys.readouterr().out.count("llama-2-7b q_proj") == 15


def test_a_grid_ends_with_what_it_says_of_the_model(command, capsys, monkeypatch):
    monkeypatch.setattr(op_lab_command, "grid", lambda *arguments, **keywords: [Setting(ODD), Setting(replace(ODD, rank=1))])
    assert command("--grid", "--methods", "flora", "bmm-lora") == 0
    assert "2 points: predictions are off by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--d-in", "96"], "--d-in and --d-out together"),
        (["--d-in", "96", "--d-out", "0"], "d_out must be at least 1"),
        (["--d-in", "96", "--d-out", "9", "--model", "starcoder"], "--model and --layer instead"),
        (["--model", "gpt-5"], "no model 'gpt-5'"),
        (["--model", "starcoder", "--layer", "lm_head"], "no layer 'lm_head'"),
        (["--rows", "0"], "rows must be at least 1"),
        (["--adapters", "9"], "cannot have 9 adapters"),
        (["--rank", "100000"], "rank may be 256 at most"),
        (["--dtype", "float13"], "--dtype takes float32, bfloat16, float16"),
        (["--methods", "magic"], "no method 'magic'"),
        (["--seconds", "nan"], "--seconds must be a number above 0"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--grid", "--layer", "c_fc"], "--grid has layers of its own"),
        (["--device", "abacus"], "abacus"),
        (["--json", "no/such/folder/x"], "cannot write"),
        (["--report", "report.pdf"], "cannot be written as .pdf"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(command, capsys, words, said):
    with pytest.raises(SystemExit) as stopped:
        command(*words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and said in error
