"""The cost model: tables that are read between their sizes, stages that add up to a method's work, Eq. 7, and what is kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from fake_costs import BANDWIDTH, LAUNCH_S, RATE, fake_costs, roofline
from hypothesis import given
from hypothesis import strategies as st

from flora.cost import eq7_crossover, eq7_seconds, multiply_adds, work
from flora.errors import RequestError
from profiling import calibration, peaks
from profiling.calibration import Calibration, machine_costs
from profiling.cost_model import (
    METHODS,
    TABLES,
    LayerShape,
    Table,
    coefficients,
    crossover,
    eq7,
    eq7_crossover_of,
    predict,
    predict_model,
)

COSTS = fake_costs()
DECODE = LayerShape(4096, 4096, rows=8, length=1, rank=4, adapters=8)
PREFILL = LayerShape(4096, 4096, rows=4, length=512, rank=8, adapters=4)


# ---------------------------------------------------------------------------------------------------------------- tables


def test_a_table_gives_what_was_measured_and_goes_on_in_proportion():
    table = Table(((1, 2, 4), (10, 1000)), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    assert [table.at(rows, numbers) for rows in (1, 2, 4) for numbers in (10, 1000)] == pytest.approx([1, 2, 3, 4, 5, 6])
    assert table.at(1, 100) == pytest.approx(math.sqrt(2)), "half way by the logarithm"
    assert table.at(8, 2000) == pytest.approx(6 * 2 * 2) and table.at(0.5, 3) == pytest.approx(1)


@given(st.floats(0.1, 1e4), st.floats(1, 1e6))
def test_a_table_of_a_power_law_is_that_law_between_its_sizes(rows, numbers):
    axes = ((1.0, 3.0, 50.0), (10.0, 400.0, 1e5))
    table = Table(axes, tuple(1e-6 * one**0.7 * other**0.9 for one in axes[0] for other in axes[1]))
    inside = min(max(rows, 1.0), 50.0) ** 0.7 * min(max(numbers, 10.0), 1e5) ** 0.9
    assert table.at(rows, numbers) == pytest.approx(1e-6 * inside * max(1.0, rows / 50.0) * max(1.0, numbers / 1e5))


@pytest.mark.parametrize(
    ("axes", "seconds"),
    [(((2, 1),), (1.0, 1.0)), (((1, 1),), (1.0, 1.0)), (((0, 1),), (1.0, 1.0)), (((1, 2),), (1.0,)), (((1,),), (0.0,)),
     (((1,),), (math.inf,)), (((1,),), ("1",)), (((),), ())],
)  # fmt: skip
def test_a_table_of_anything_else_is_refused(axes, seconds):
    with pytest.raises(ValueError):
        Table(axes, seconds)


# --------------------------------------------------------------------------------------------------------------- predict


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [DECODE, PREFILL, LayerShape(2048, 8192, 7, 3, 5, 3), LayerShape(64, 33, 1, 1, 1, 1)])
def test_stages_add_up_to_the_methods_multiply_adds_and_to_its_time(method, shape):
    found = predict(method, shape, COSTS)
    _, operations = work(found.form, shape.rows, shape.length, shape.rank, shape.adapters, shape.d_in, shape.d_out, 4)
    products = sum(s.operations for s, _ in found.stages if s.kind in ("product", "down", "up", "batched down", "batched up"))
    if found.form == "flora-modulate":
        products += sum(2 * s.times * shape.rank * shape.weight_numbers for s, _ in found.stages if s.kind == "modulation")
    scaled = 2 * shape.rank * shape.tokens * (shape.d_in + shape.d_out) if found.form == "flora-expand" else 0
    assert products + scaled == pytest.approx(operations)
    assert found.seconds == pytest.approx(sum(seconds for _, seconds in found.stages)) and found.seconds > 0


def test_a_bare_product_takes_what_the_limits_say():
    for rows, bound in ((1, "bandwidth"), (256, "arithmetic")):
        shape = LayerShape(3584, 3584, rows, 1, 1, 1)
        found = predict("base", shape, COSTS)
        assert found.seconds == pytest.approx(roofline(4 * (3584**2 + 2 * rows * 3584), 2 * rows * 3584**2))
        assert found.bound == bound and found.launches == 1


def test_small_stages_are_cold_after_another_layer_and_not_in_a_model_that_stays_in_the_cache():
    cold = replace(COSTS, cold_s=1.0)
    assert predict("base", DECODE, cold) == predict("base", DECODE, COSTS), "the product is measured cold"
    more = predict("loop-lora", DECODE, cold).seconds - predict("loop-lora", DECODE, COSTS).seconds
    assert more == pytest.approx(3), "down, up and scatter, the first time of each"
    small = LayerShape(16, 16, 8, 1, 4, 8)
    assert predict("loop-lora", small, cold) == predict("loop-lora", small, COSTS)


def test_flora_is_the_form_that_it_chooses_and_more_rank_costs_more():
    assert predict("flora", DECODE, COSTS).form == "flora-expand"
    assert predict("flora", PREFILL, COSTS).form == "flora-modulate"
    assert predict("flora", PREFILL, COSTS, "flora-expand").form == "flora-expand"
    for method in METHODS[1:]:
        times = [predict(method, replace(DECODE, rank=rank), COSTS).seconds for rank in (1, 4, 16, 64, 256)]
        assert times == sorted(times), method


def test_a_model_is_its_layers():
    layers = [(2048, 2304), (2048, 8192)]
    apart = [predict("flora", replace(DECODE, d_in=d_in, d_out=d_out), COSTS).seconds for d_in, d_out in layers]
    assert predict_model("flora", layers, DECODE, COSTS) == pytest.approx(sum(apart))


def test_the_crossover_is_the_first_rank_from_which_on_bmm_lora_is_faster():
    rank = crossover(DECODE, COSTS)

    def is_slower(rank):
        at_rank = replace(DECODE, rank=rank)
        return predict("flora", at_rank, COSTS).seconds > predict("bmm-lora", at_rank, COSTS).seconds

    assert is_slower(rank) and is_slower(rank + 10) and not is_slower(rank - 1)
    assert crossover(DECODE, COSTS, "base", "loop-lora") is None, "the bare layer is never slower"


def test_what_makes_no_sense_is_refused():
    with pytest.raises(RequestError, match="rank must be at least 1"):
        replace(DECODE, rank=0)
    with pytest.raises(RequestError, match="8 rows cannot have 9 adapters"):
        replace(DECODE, adapters=9)
    with pytest.raises(RequestError, match="merged"):
        predict("merged", DECODE, COSTS)


# ------------------------------------------------------------------------------------------------------------------ Eq. 7


def test_eq7_as_the_paper_has_it():
    d, tokens, rank, c1, c2 = 512, 7, 3, 5e-9, 2e-11
    assert eq7_seconds("bmm-lora", tokens, rank, d, d, c1, c2) == pytest.approx(2 * c1 * d * tokens * rank + c2 * tokens * d**2)
    assert eq7_seconds("flora", tokens, rank, d, d, c1, c2) == pytest.approx(c2 * rank * tokens * d**2)
    assert math.isinf(eq7_crossover(d, d, c2 * d / 2, c2)), "from 2 · c1 = d · c2 on fLoRA is always cheaper"
    crossing = eq7_crossover(d, d, c1 := c2 * d / 4, c2)
    assert crossing == pytest.approx(2) and 2 * c1 / (d * c2) + 1 / crossing == pytest.approx(1)
    for rank in (1.9, 2.1):
        at_rank = {method: eq7_seconds(method, tokens, rank, d, d, c1, c2) for method in ("flora", "bmm-lora")}
        assert (at_rank["flora"] < at_rank["bmm-lora"]) == (rank < crossing)
    with pytest.raises(KeyError):
        eq7_seconds("sgmv-lora", tokens, 1, d, d, c1, c2)


def test_c1_and_c2_are_seconds_of_a_multiply_add_here():
    shape = LayerShape(3584, 3584, rows=256, length=1, rank=4, adapters=8)
    c1, c2 = coefficients(shape, COSTS)
    assert c2 == pytest.approx(2 / RATE, rel=0.01), "at 256 rows the product is bound by arithmetic"
    assert c1 > c2 and eq7("flora", shape, COSTS) == pytest.approx(4 * c2 * 256 * 3584**2)
    assert eq7("flora-expand", shape, COSTS) == eq7("flora", shape, COSTS) and eq7("loop-lora", shape, COSTS) is None
    assert eq7_crossover_of(shape, COSTS) == eq7_crossover(3584, 3584, c1, c2)


def test_work_counts_every_adapters_factors_and_rows_once():
    num_bytes, operations = work("flora-modulate", 7, 2, 3, 2, 64, 32, 4)
    assert num_bytes == 4 * (64 * 32 + 14 * 96 + 2 * 3 * 96)
    assert operations == 2 * (multiply_adds("flora-modulate", 8, 3, 64, 32) + multiply_adds("flora-modulate", 6, 3, 64, 32))
    assert work("base", 7, 2, 0, 1, 64, 32, 2, 1)[0] == 64 * 32 + 2 * 14 * 96


# ------------------------------------------------------------------------------------------------------------ calibration


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A cache folder of the test's own, and sizes that take no time."""
    monkeypatch.setattr(peaks, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(peaks, "MIN_CPU_BUFFER", 1 << 18)
    monkeypatch.setattr(peaks, "_last_cache", lambda: 1 << 16)
    monkeypatch.setattr(peaks, "CPU_WIDTHS", (32, 16))
    monkeypatch.setattr(peaks, "NUM_LAUNCHES", 5)
    monkeypatch.setattr(calibration, "REPEATS", 1)
    thin, numbers = ((1, 4), (1, 4), (64, 128)), (64, 256)
    axes = {name: {2: ((1, 2), numbers), 3: thin, 1: ((1 << 12, 1 << 13),)}[len(sizes)] for name, sizes in TABLES.items()}
    monkeypatch.setattr(calibration, "AXES", axes)
    return tmp_path / "cache"


def test_what_was_measured_is_kept_for_the_dtype_and_read_back(small, monkeypatch):
    cpu, seen, measure = torch.device("cpu"), [], calibration._measure
    monkeypatch.setattr(calibration, "_measure", lambda *arguments: seen.append(arguments) or measure(*arguments))
    first = machine_costs(cpu, torch.float32)
    assert machine_costs(cpu, torch.float32) == first and len(seen) == 1
    assert machine_costs(cpu, torch.bfloat16).element_size == 2 and len(seen) == 2
    assert machine_costs(cpu, torch.float32, fresh=True).dtype == "float32" and len(seen) == 3
    assert first.ridge == first.matrix_flops_per_s / first.copy_bytes_per_s
    (file,) = [one for one in small.glob("costs-*") if '"float32"' in one.read_text()]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"costs": {"tables": {}}}))
    assert machine_costs(cpu, torch.float32) and len(seen) == 4, "what is no good is measured anew"


@pytest.mark.parametrize("row", [{}, [], None, {"costs": 1, "repeats": 1}, {"costs": {"tables": {}}, "repeats": 1}])
def test_no_calibration_is_made_of_anything_else(row):
    with pytest.raises(ValueError):
        Calibration.of_row(row)


def test_a_stage_that_takes_too_long_is_not_measured_at_larger_sizes(small, monkeypatch):
    monkeypatch.setattr(calibration, "LONGEST_S", 0.0)
    table = machine_costs(torch.device("cpu"), torch.float32).tables["product"]
    smallest = table.at(1, 64)
    assert table.at(2, 64) == pytest.approx(2 * smallest) and table.at(2, 256) == pytest.approx(8 * smallest)


def test_it_tells_how_far_it_is_and_can_be_left(small):
    shares = list(calibration.costs_in_steps(torch.device("cpu"), torch.float32))
    assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares)
    assert list(calibration.costs_in_steps(torch.device("cpu"), torch.float32)) == [], "it was kept"
    left = calibration.costs_in_steps(torch.device("cpu"), torch.bfloat16)
    next(left), next(left)
    left.close()
    assert not [one for one in small.glob("costs-*") if '"bfloat16"' in one.read_text()]


def test_no_width_of_a_known_model_is_calibrated():
    from flora.shapes import SHAPES, layer_widths

    widths = {width for name in SHAPES for pair in layer_widths(name).values() for width in pair}
    assert not widths & set(calibration.PRODUCT_WIDTHS) - {256}  # Qwen's key and value have 256 outputs, of 1536 inputs


def test_limits_decide_what_a_stage_is_bound_by():
    assert (BANDWIDTH, RATE, LAUNCH_S) == (COSTS.copy_bytes_per_s, COSTS.matrix_flops_per_s, COSTS.launch_s)
    assert predict("base", LayerShape(16, 16, 1, 1, 1, 1), COSTS).bound == "launches"
