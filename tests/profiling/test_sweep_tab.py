"""The Sweep tab without a browser: what its controls may say, a sweep on it beside the engine that serves, what is shown."""

import json
import threading
import time
from dataclasses import replace

import pytest
import torch
from fake_costs import fake_costs

from flora.errors import RequestError
from profiling import report, workload
from profiling.cost_model import LayerShape, predict_model
from profiling.dashboard import sweep_views as views
from profiling.dashboard.device import Device
from profiling.dashboard.measuring import Measurement
from profiling.dashboard.sweep import SweepWork, Wish
from profiling.sweep_figures import Beside
from profiling.sweep_paper import beside as beside_the_paper
from profiling.sweep_points import STEP_TIME, THROUGHPUT, Measure, SweepPoint
from profiling.sweep_predictions import Predictions, predictable, predictions

WISH = Wish("code", ranks=(2, 1), measures=(STEP_TIME,), batch=2, new_tokens=4, popularity="uniform")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ["flora"]}, "two methods"),
        ({"methods": ["flora", "magic"]}, "no such method"),
        ({"methods": None}, "two methods"),
        ({"ranks": []}, "at least one rank"),
        ({"ranks": [3]}, "no such rank"),
        ({"measures": ["<b>"]}, "no such measure"),
        ({"batch": 0}, "batch"),
        ({"batch": None}, "batch"),
        ({"batch": 2.5}, "whole"),
        ({"new_tokens": 1e9}, "new tokens"),
        ({"prompt_tokens": -1}, "prompt tokens"),
        ({"rate": float("nan")}, "rate"),
        ({"popularity": "magic"}, "no such popularity"),
        ({"weights": "int3"}, "no such weights"),
    ],
)
def test_controls_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(RequestError, match=words):
        replace(WISH, **changes)


@pytest.fixture(scope="module")
def swept(engines):
    """A sweep from start to end on the device's thread, and whether anybody else saw its adapters."""
    device, before = Device(), dict(engines["code"].adapters)
    measurement = Measurement(device, SweepWork(engines, WISH, ()))
    until, seen = time.monotonic() + 60, set()
    while not measurement.ended and time.monotonic() < until:
        measurement.update()
        seen |= set(engines["code"].adapters) - before.keys()
        time.sleep(0.01)
    measurement.update()
    assert seen == set() and measurement.state == "done", measurement.failure
    device.close()
    return measurement.work


def test_a_sweep_runs_beside_the_engine_that_serves(swept, engines):
    assert [(row["rank"], row["method"]) for row in swept.rows] == [(r, m) for r in (1, 2) for m in WISH.methods]
    assert swept.result.max_batch_size == 2 and "--max-batch-size 2" in swept.command() and "--code-adapters" not in swept.command()
    for suffix in (".html", ".md", ".csv", ".jsonl"):
        assert report.render(swept.report(), f"sweep{suffix}")
    assert SweepWork(engines, WISH, ()).report() is None
    with pytest.raises(RequestError, match="no such model"):
        SweepWork({}, WISH, ())


def test_what_is_measured_already_is_kept_and_said(swept, engines):
    wider = SweepWork(engines, replace(WISH, ranks=(4, 2, 1)), swept.rows)
    for event in wider.measure(threading.Event().is_set):
        if hasattr(event, "rows"):
            wider.take(event)
    assert [row["rank"] for row in wider.rows] == [1] * 3 + [2] * 3 + [4] * 3 and wider.rows[0]["step_quantiles"] == swept.rows[0][
        "step_quantiles"
    ]
    with pytest.raises(RequestError, match="measured already"):
        list(SweepWork(engines, WISH, swept.rows).measure(lambda: False))


def test_other_weights_are_those_of_the_model_loaded_once_more(engines):
    work = SweepWork(engines, replace(WISH, weights="bfloat16", ranks=(1,)), ())
    for event in work.measure(threading.Event().is_set):
        if hasattr(event, "rows"):
            work.take(event)
    assert len(work.rows) == 3 and {row["setting"]["model"]["dtype"] for row in work.rows} == {"bfloat16"}
    assert "--dtype bfloat16" in work.command() and engines["code"].dtype == torch.float32
    assert "--quantize int8" in SweepWork(engines, replace(WISH, weights="int8"), ()).command()
    assert "--dtype" not in SweepWork(engines, replace(WISH, weights="float32"), ()).command().replace("--dtype float32", "")


def test_what_is_shown_has_its_place_and_says_whether_it_is_live(swept):
    beside = [Beside("recorded: <b> (a machine)", swept.points)]
    live = views.said(swept.rows, swept.points, (), "a CPU")
    assert "In decode steps, fLoRA " in live["cells"]["headline"] and live["cells"]["facts"] == "a CPU · live, measured here"
    recorded = views.said((), (), beside, "a CPU")
    assert "In decode steps, fLoRA " in recorded["cells"]["headline"] and "&lt;b&gt;" in recorded["cells"]["facts"]
    assert "not measured here" in recorded["cells"]["facts"] and "Press Sweep" in views.said((), (), (), "")["cells"]["headline"]
    for value, template in (
        (live, views.HEADLINE_TEMPLATE),
        (views.details(swept.rows, swept.points, "said"), views.DETAILS_TEMPLATE),
        (views.details((), ()), views.DETAILS_TEMPLATE),
    ):
        assert all(f'data-cell="{key}"' in template for key in value["cells"])
        assert not set("`\\") & set(template) and "${" not in template
    charts = views.charts(swept.points, (1, 2), "flora", beside, 3)
    assert len(charts) == 4 and json.loads(json.dumps(charts, allow_nan=False)) == charts
    assert "earlier: sweep 3 (" in views.label_of(swept.rows, 3)


def test_the_recorded_sweep_that_ships_is_there():
    ((label, found), *_) = views.recorded(workload.ASSETS / "results")
    assert label.startswith("recorded: sweep_code (") and {point.measure.name for point in found["points"]} >= {
        STEP_TIME,
        THROUGHPUT,
    }
    assert "sgmv-LoRA" in views.said((), (), [Beside(label, found["points"])], "")["cells"]["headline"]


def test_the_papers_figures_stand_beside_where_the_set_up_is_its_own():
    model = {"name": "bigcode/starcoder", "dtype": "float16", "quantize": None, "weights": "pretrained"}
    said = beside_the_paper(model, {"device_name": "NVIDIA H100 80GB"}, [Measure(THROUGHPUT, float("inf"))])
    assert "Figure 2, left: bmm-LoRA overtakes at rank 8" in said and "Not the same here" not in said
    said = beside_the_paper(model | {"dtype": "float32", "weights": "random"}, {"device_name": "A CPU"}, [Measure("latency", 8.0)])
    assert "2, right" in said and "Not the same here: A CPU instead of an H100, float32 instead of float16, random weights." in said
    assert "measured nothing that compares" in beside_the_paper({"name": "code"}, {}, [Measure(STEP_TIME)])


def test_a_step_is_predicted_from_the_base_models_and_what_the_layers_take_more(engines):
    costs, settings = fake_costs(), replace(WISH, popularity="distinct").settings()
    own = engines["code"].beside(2, adapter_slots=2)
    try:
        assert predictable(own, settings) and not predictable(own, WISH.settings())
        layers = [(layer.in_features, layer.out_features) for layer in own.bank.layers.values()]
        shape = LayerShape(*layers[0], rows=2, length=1, rank=4, adapters=2)
        more = predict_model("flora", layers, shape, costs) - predict_model("base", layers, shape, costs)
        steps = {"base": 0.01, "flora": (0.01 + more) / 1.25}
        points = [SweepPoint(Measure(STEP_TIME), 4, method, 1000 * seconds) for method, seconds in steps.items()]
        found = predictions(own, settings, points, costs)
        assert found.errors == pytest.approx((0.25,)) and predictions(own, settings, points[1:], costs).errors == ()
        assert found.c1 > 0 and found.c2 > 0 and found.eq7_crossover > 1
    finally:
        own.close()


def test_predictions_in_words():
    said = Predictions(2e-9, 1e-9, 1.5, 3, (0.1, 0.3, 0.2)).sentence()
    assert (
        "c1 = 2 and c2 = 1 ns" in said
        and "above rank 1.5" in said
        and "from rank 3 on" in said
        and "within 20 % in the median" in said
    )
    never = Predictions(2e-9, 1e-9, float("inf"), None, ()).sentence()
    assert "at no rank;" in never and "at no rank up to" in never and "Choose the base model too" in never
