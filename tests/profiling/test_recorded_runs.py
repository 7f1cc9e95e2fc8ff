"""The panel of recorded runs: what ships is shown with where it was measured, and what is no row of ours is left out and named."""

from __future__ import annotations

from profiling import workload
from profiling.dashboard.recorded_runs import COMPARISONS, LOADS, recorded_runs
from profiling.recorded import Recording, recordings

HOSTILE = "<img src=x onerror=alert(1)>"


def test_the_comparisons_that_ship_are_told_line_by_line():
    found = recordings(workload.ASSETS / "results", "compare").found
    cells = recorded_runs(found, "compare", COMPARISONS)["cells"]
    assert cells["note"] == "" and "compare_ready_batch" in cells["runs"] and "python -m profiling compare" in cells["runs"]
    assert cells["runs"].count("<tr>") == len(found) + sum(len(one.rows) for one in found)
    bmm = next(row for row in found[0].rows if row["method"] == "bmm-lora" and row["kind"] == "code")
    assert f"<td>{bmm['tokens_per_s']:,.0f}</td>" in cells["runs"]
    assert f"<td>{bmm['ratio_to_first']['median']:.2f} [" in cells["runs"]


def test_loads_have_their_percentiles_and_goodput():
    row = {"method": "flora", "kind": "code", "tokens_per_s": 1234.5, "ttft_s": {"p50": 0.01, "p99": 0.2}}
    row |= {"tpot_s": {"p50": 0.004, "p99": None}, "goodput": {"share": 0.97}, "hardware": {"device_name": HOSTILE, "torch": "2"}}
    load = Recording("load_code", "load", f"python -m profiling load {HOSTILE}", (row,))
    cells = recorded_runs([load], "load", LOADS)["cells"]
    for told in ("fLoRA", "1,234", "10 ms", "200 ms", "4 ms", "97 %", "torch 2"):
        assert told in cells["runs"]
    assert "<img" not in cells["runs"]


def test_what_is_none_of_ours_is_left_out_and_named():
    assert recorded_runs([], "load", LOADS)["cells"] == {"note": "Nothing is recorded.", "runs": ""}
    broken = [Recording(HOSTILE, "load", "x", (row,)) for row in ({"method": "magic"}, {"method": []}, {"method": "flora"})]
    cells = recorded_runs(broken, "load", LOADS)["cells"]
    assert cells["runs"] == "" and cells["note"].count("left out") == 3 and "<img" not in cells["note"]
