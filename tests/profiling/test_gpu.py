"""What `python -m profiling gpu` does without a GPU: every path in a dry run, the time it gives out, the rows it keeps.

A dry run has Triton interpret the kernels, which is settled when they are defined: it has a process of its own, which also lacks
what a bare GPU machine lacks.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flora import Request
from flora.errors import RequestError
from profiling import peaks, rounds
from profiling.__main__ import main
from profiling.gpu import command, int8_reference, kernel_check, layers, models, promises
from profiling.gpu.adapters import add_random_copies
from profiling.gpu.board import ASKED, board_facts, read_board
from profiling.gpu.budget import Budget, Longest, Pace
from profiling.gpu.command import WEIGHTS
from profiling.gpu.int8_reference import STAND_IN
from profiling.gpu.layers import LayerPoint
from profiling.gpu.session import DeviceLostError, RowsLostError, Session
from profiling.loading import add_random_adapters
from profiling.promise import Figure

REPOSITORY = Path(__file__).resolve().parents[2]

BARE_MACHINE = """
import sys

MISSING = {"gradio", "gradio_client", "plotly", "pandas", "bitsandbytes", "soundfile", "soxr", "datasets", "jiwer", "pyarrow"}


class Without:
    "Finds what another finder finds, but nothing that is missing."

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in MISSING else self.finder.find_spec(name, *rest)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch

torch.set_num_threads(1)
from profiling.__main__ import main

sys.argv[0] = "profiling"
code = main(sys.argv[1:])
assert not MISSING & {name.partition(".")[0] for name in sys.modules}
sys.exit(code)
"""


def bare_machine(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    places = [str(REPOSITORY), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places)), "CUDA_VISIBLE_DEVICES": ""} | environment
    command = [sys.executable, "-c", BARE_MACHINE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=240, check=False)


# ------------------------------------------------------------------------------------------------------------- dry run


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> tuple[subprocess.CompletedProcess, list[dict]]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    file = tmp_path_factory.mktemp("gpu") / "rows.jsonl"
    arguments = ("gpu", "--dry-run", "--part", *WEIGHTS, "--json", str(file))
    done = bare_machine(*arguments, XDG_CACHE_HOME=str(file.parent / "cache"))
    assert not (file.parent / "cache").exists(), "what a dry run says of the hardware is not kept"
    return done, [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_dry_run_takes_every_path_on_a_bare_machine(dry_run):
    done, rows = dry_run
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["part"] for row in rows} == {"hardware", "kernels", "layers", "models", "promises"}
    checked = [row for row in rows if row["part"] == "kernels"]
    assert all(row["agrees"] and row["form"] for row in checked)
    assert {(row["form"], row["quantize"] or row["dtype"]) for row in checked} >= {
        (form, kind) for form in ("decode", "modulate") for kind in ("bfloat16", "float16", "float32", "int8")
    }
    timed = [row for row in rows if row["part"] == "layers"]
    assert {row["form"] for row in timed if row["method"] == "flora"} == {"decode", "modulate"}
    for phase in ("decode", "prefill"):
        methods = {row["method"] for row in timed if row["phase"] == phase and row["quantize"] is None}
        assert methods == set(layers.METHODS), phase
        assert {row["quantize"] for row in timed if row["phase"] == phase} == {None, "int8"}
    served = [row for row in rows if row["part"] == "models"]
    assert {row["measures"] for row in served} == {"decode step", "throughput", "latency"}
    assert {row["kind"] for row in served} == {"code", "speech"}
    assert {(row["kind"], row["cuda_graphs"]) for row in served} == {("code", True), ("speech", False)}
    steps = [row for row in served if row["measures"] == "decode step"]
    assert all(row["static_shapes"] and row["replayed"] is row["cuda_graphs"] for row in steps), "one thing differs, and is true"
    for row in steps:  # an encoder, and a table of which a step reads a few rows, are no part of it
        read = row["weight_bytes"] / (4 * row["model"]["num_parameters"])
        assert row["bytes"] == row["weight_bytes"] + row["key_value_bytes"] and row["adapted_bytes"] < row["weight_bytes"]
        assert read < 0.8 if row["kind"] == "speech" else 0.8 < read <= 1
    assert {row["length"] for row in served if "length" in row} == {"tiny"}
    eight_bit = {row["method"]: row["product"] for row in timed if row["quantize"] == "int8"}
    assert "stand-in" in eight_bit[STAND_IN] and "our own int8 kernel" in eight_bit["base"]
    assert not any(row["measures"] == "failed" for row in rows)
    assert {row["method"] for row in served} == {"base", "flora", "bmm-lora", "sgmv-lora"}


def test_no_row_of_a_dry_run_can_be_taken_for_a_measurement(dry_run):
    done, rows = dry_run
    assert rows and all(row["dry_run"] is True for row in rows)
    assert "no number here is a measurement" in done.stdout


def test_every_row_says_what_it_was_measured_on(dry_run):
    _, rows = dry_run
    for row in rows:
        assert row["seed"] == 0 and row["command"] == f"python -m profiling gpu --dry-run --part {' '.join(WEIGHTS)}"
        facts = row["hardware"]
        assert facts["device"] == "cpu" and all(facts[name] for name in ("device_name", "torch", "transformers", "peft", "triton"))
        if row["part"] in ("layers", "models"):
            assert all(row[name] is not None for name in ("dtype", "method", "rank", "batch", "popularity", "repeats"))
        if row["measures"] in ("layer", "decode step"):
            assert set(row["quantiles"]) == {"p10", "p50", "p90", "p99"} and row["median_s"] == row["quantiles"]["p50"]
            assert row["bytes"] > 0 and row["bandwidth_share"] > 0
            assert row["over_base"][1] <= row["over_base"][0] <= row["over_base"][2]


def test_a_dry_run_comes_to_every_promise(dry_run):
    """Where bitsandbytes is not installed, with its stand-in, which is said; a crossover may lie beyond what is measured here."""
    done, rows = dry_run
    told = {row["what"]: row["value"] for row in rows if row["part"] == "promises"}
    assert len(told) == 8
    assert all(value is not None for what, value in told.items() if "rank up to" not in what)
    assert sum("a stand-in for bitsandbytes' layer" in what for what in told) == 1
    assert all(what in done.stdout for what in told)
    assert not any(row["target"] or row["holds"] for row in rows if row["part"] == "promises"), "and none of them is judged"


# ----------------------------------------------------------------------------------------------------------- bad input


def test_without_a_gpu_it_says_so_and_names_the_way_out(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(["gpu"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "GPU" in said and "--dry-run" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes must be"),
        (["--minutes", "nan"], "--minutes must be"),
        (["--minutes", "inf"], "--minutes must be"),
        (["--seed", "-1"], "--seed must be"),
        (["--part", "speed"], "invalid choice: 'speed'"),
        (["--dry-run", "--json", str(REPOSITORY / "README.md")], "'README.md' is there already"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["gpu", *arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------- rows


def session(tmp_path: Path, **options) -> Session:
    limits = peaks.Peaks("cpu", "a CPU", "2", None, 1, 1e10, 1 << 20, None, {"bfloat16": 1e12}, {"bfloat16": 64}, 1e-6, 1 << 30, 1)
    return Session(torch.device("cpu"), True, 0, limits, {"hardware": {}, "command": "this"}, **options)


def test_a_run_that_is_cut_off_keeps_every_row_it_had(tmp_path):
    """Each is in the file before the next thing begins: the file is never closed here."""
    path = tmp_path / "rows.jsonl"
    file = path.open("w", encoding="utf-8")
    one = session(tmp_path, file=file)
    for number in range(3):
        one.record("layers", {"number": number})
        assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == list(range(number + 1))
    file.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line(tmp_path):
    file = open("/dev/full", "w", encoding="utf-8")
    with pytest.raises(RequestError, match="cannot write the rows: No space left"):
        session(tmp_path, file=file).record("layers", {})
    with pytest.raises(OSError):  # what it still held
        file.close()


# -------------------------------------------------------------------------------------------------------------- budget


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_share_is_of_what_is_left():
    clock = Clock()
    whole = Budget(100.0, clock)
    first = whole.share(1, 3)
    assert first.seconds == 25.0
    clock.now = 10.0  # the first part was done sooner: the others have more
    assert whole.share(1, 2).seconds == 30.0
    clock.now = 120.0
    assert whole.left_s == 0.0 and whole.share(1, 0).left_s == 0.0


@pytest.mark.parametrize("fixed_s, repeat_s", [(0.1, 0.01), (2.0, 0.01), (0.01, 0.5), (0.0, 0.001)])
def test_many_points_end_within_their_time(fixed_s, repeat_s):
    clock = Clock()
    pace = Pace(Budget(60.0, clock), 200, fewest=9, most=40)
    taken = []
    for _ in range(200):
        repeats = pace.repeats()
        if repeats is None:
            break
        taken.append(repeats)
        clock.now += fixed_s + repeats * repeat_s
        pace.took(fixed_s + repeats * repeat_s, repeats * repeat_s, repeats)
    first_s = fixed_s + 40 * repeat_s  # of which nothing is known before
    assert clock.now <= max(60.0, first_s)
    assert all(9 <= repeats <= 40 for repeats in taken)
    assert len(taken) == 200 or clock.now + fixed_s + 9 * repeat_s > 60.0, "it stops only where no other point fits"


def test_the_most_telling_points_come_first_and_always_in_the_same_order():
    found = layers.points()
    assert found == layers.points() and len(set(found)) == len(found)
    assert {point.d_in for point in found if point.d_in == point.d_out} == set(layers.WIDTHS)
    assert set(layers.FEED_FORWARD) == {(point.d_in, point.d_out) for point in found if point.d_in != point.d_out}
    assert {point.rank for point in found} == {1, 2, 4, 8, 16, 32, 64} and {point.batch for point in found} == {
        1,
        2,
        4,
        8,
        16,
        32,
        64,
    }
    assert found[0] == LayerPoint("decode", "bfloat16", 6144, 6144, 1, 1, 1)
    promised = layers.promised_points()
    assert found[: len(promised)] == promised
    few = [point.rank for point in promised[:34]]
    assert few == sorted(few) and {point.phase for point in promised[:34]} == {"decode"}, "what holds for few ranks is there sooner"
    assert len([point for point in promised if point.phase == "prefill"]) == 21
    early = found[: len(found) // 4]
    assert {(point.phase, point.kind) for point in early} == {
        (phase, kind) for phase in ("decode", "prefill") for kind in ("bfloat16", "int8")
    }


# ------------------------------------------------------------------------------------------------------------ promises


def layer_row(method: str, batch: int, rank: int, over_base: float, over_flora: float, **other) -> dict:
    row = {"part": "layers", "measures": "layer", "phase": "decode", "d_in": 6144, "d_out": 6144, "batch": batch, "rank": rank}
    row |= {"tokens": 1, "quantize": None, "dtype": "bfloat16", "form": "decode" if method.startswith("flora") else None}
    row |= {"method": method, "over_base": [over_base] * 3, "over_flora": [over_flora] * 3, "bandwidth_share": 0.8}
    return row | {"median_s": 1.0, "quantiles": {"p10": 1.0, "p90": 1.0}} | other


def step_row(method: str, rank: int, over_base: float, over_flora: float, **other) -> dict:
    row = {"part": "models", "measures": "decode step", "model": {"name": "starcoder"}, "cuda_graphs": True, "batch": 32}
    row |= {"quantize": None, "replayed": True, "method": method, "rank": rank}
    return row | {"over_base": [over_base] * 3, "over_flora": [over_flora] * 3} | other


def test_a_promise_is_held_against_its_worst_point():
    rows = [
        layer_row("flora", 8, 4, 1.1, 1.0),
        layer_row("flora", 32, 4, 1.2, 1.0, bandwidth_share=0.6),
        layer_row("flora", 32, 16, 9.0, 1.0),  # more components than are promised for
        layer_row("bmm-lora", 8, 4, 2.0, 1.8),
        layer_row("bmm-lora", 8, 16, 2.0, 0.2),  # a higher rank than is promised for
        layer_row("sgmv-lora", 8, 4, 1.2, 1.05),
        layer_row("flora", 4, 64, 1.24, 1.0, phase="prefill", tokens=512),
    ]
    figures = {figure.what.partition(", at worst")[0].strip(): figure for figure in promises.promises(rows)}
    decode = figures["decode, width 6144, bfloat16: flora over the bare layer"]
    assert decode.value == 1.2 and decode.holds is None and (decode.n, decode.points) == (2, 34), "two points are not all"
    assert decode.cells()[2].endswith("2 of 34 points")
    assert "batch 32, rank 4" in decode.what
    assert figures["its share of the copy bandwidth"].value == 0.6
    bmm = figures["bmm-lora over flora, rank 8 and below"]
    assert (bmm.value, bmm.n, bmm.points) == (1.8, 1, 25)
    assert figures["sgmv-lora over flora, rank 4 and below"].value == 1.05
    assert figures["prefill, 512 rows an adapter: flora over the bare layer"].value == 1.24
    assert sum(figure.value is None and figure.holds is None for figure in figures.values()) == 3, "what was not measured is told"


def all_promised(method: str, over_base: float = 1.1, over_flora: float = 2.0) -> list[dict]:
    rows = []
    for point in layers.promised_points():
        facts = {"phase": point.phase, "tokens": point.tokens, "quantize": "int8" if point.kind == "int8" else None}
        rows.append(layer_row(method, point.batch, point.rank, over_base, over_flora, **facts))
    return rows


def test_a_promise_is_judged_once_all_its_points_are_there_and_no_kernel_is_wrong():
    rows = [row for method in ("flora", "bmm-lora", "sgmv-lora", STAND_IN) for row in all_promised(method)]
    figures = promises.promises(rows)[:6]
    assert [figure.holds for figure in figures] == [True] * 6 and [figure.n for figure in figures] == [34, 34, 25, 20, 21, 34]
    assert "a stand-in" in figures[5].what
    some = [row for row in rows if not (row["method"] == "flora" and row["rank"] == 4 and row["batch"] == 8)]
    assert [figure.holds for figure in promises.promises(some)[:4]] == [None] * 4
    wrong = {"part": "kernels", "measures": "agreement", "form": "decode", "dtype": "bfloat16", "quantize": None, "agrees": False}
    judged = promises.promises([*rows, wrong])[:6]
    assert [figure.n for figure in judged[:4]] == [0] * 4 and judged[5].holds is True, "int8 has kernels of its own"
    failed = [row | {"over_base": None} if row["rank"] == 8 else row for row in rows]
    assert promises.promises(failed)[0].holds is None, "beside a base that failed, there is no ratio"


@pytest.mark.parametrize("ranks, value, holds", [((1, 4), None, None), ((1, 16), None, None), ((1, 32), 32.0, True)])
def test_without_a_loss_only_a_rank_above_the_promised_one_tells(ranks, value, holds):
    rows = [step_row(method, rank, 1.0, 2.0) for rank in ranks for method in ("base", "flora", "bmm-lora")]
    crossover = promises.promises(rows)[-1]
    assert crossover.value == value and crossover.holds is holds
    assert Figure("models", "", 16.0, None, None, 2, 16, strictly=True).holds is False, "above 16 is not 16"


def test_steps_that_were_not_replayed_are_none_of_graphs():
    rows = [step_row(method, rank, 1.0, 2.0) for rank in (1, 2, 4) for method in ("base", "flora")]
    assert promises.promises(rows)[-2].holds is True
    rows[2] |= {"replayed": False}  # the base model's of rank 2
    tokens = promises.promises(rows)[-2]
    assert tokens.holds is None and (tokens.n, tokens.points) == (2, 3)


@pytest.mark.parametrize(
    ("ratios", "rank", "holds"),
    [({1: 2.0, 16: 1.2, 32: 1.05}, 32.0, True), ({1: 2.0, 8: 1.0 / 2.0}, math.sqrt(8), False), ({1: 0.9, 16: 0.5}, 0.0, False)],
)
def test_the_crossover_is_where_bmm_lora_begins_to_be_faster(ratios, rank, holds):
    rows = [step_row("bmm-lora", one, 1.0, ratio) for one, ratio in ratios.items()]
    rows += [step_row("flora", one, 1.05, 1.0) for one in {*ratios, 2, 4}]
    rows += [step_row("base", one, 1.0, 1.0) for one in (1, 2, 4)]
    rows += [step_row("bmm-lora", 64, 1.0, 0.1, cuda_graphs=False), step_row("flora", 64, 1.0, 1.0)]
    tokens, crossover = promises.promises(rows)[-2:]
    assert crossover.value == pytest.approx(rank) and crossover.holds is holds
    assert tokens.value == pytest.approx(1 / 1.05) and tokens.holds is True


# ---------------------------------------------------------------------------------------------------------------- work


def test_work_is_counted_as_it_is_computed():
    point = LayerPoint("decode", "bfloat16", 64, 64, 3, 1, 4)
    num_bytes, operations = layers.work_of(point, "base", "base")
    assert (num_bytes, operations) == (2 * 64 * 64 + 2 * 2 * 3 * 64, 2 * 3 * 64 * 64)
    more_bytes, more_operations = layers.work_of(point, "flora", "flora-expand")
    assert more_bytes == num_bytes + 2 * 2 * 3 * 4 * 64 and more_operations == 2 * 3 * 4 * (64 * 64 + 2 * 64)
    assert layers.work_of(LayerPoint("decode", "int8", 64, 64, 3, 1, 4), "base", "base")[0] == num_bytes - 64 * 64


# ------------------------------------------------------------------------------------------- what only a GPU does, in parts


def test_on_a_gpu_times_are_those_of_events_around_each_call(monkeypatch):
    """A stand-in for a GPU's events: each call moves its clock, and so does what flushes the cache, before the clock is read."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    class Buffer:
        def sum(self) -> None:
            now[0] += 1000.0

    def takes(milliseconds: float) -> None:
        now[0] += milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    turns = rounds.Rounds(torch.device("cpu"))
    turns._flushed, turns._by_events = Buffer(), True
    seconds = turns.seconds({"one": lambda: takes(2.0), "other": lambda: takes(5.0)}, 3)
    assert seconds == {"one": [0.002] * 3, "other": [0.005] * 3}


def test_what_cannot_be_captured_is_launched_and_says_so(monkeypatch):
    def capture(device):
        def take(function):
            if function is waits:
                raise RuntimeError("operation not permitted when stream is capturing")
            return SimpleNamespace(replay=lambda: "replayed")

        return take

    def waits() -> str:
        return "launched"

    monkeypatch.setattr(rounds, "CudaCapture", capture)
    gpu = torch.device("cuda")
    call, how = rounds.captured(waits, gpu)
    assert (call(), how) == ("launched", "eager: RuntimeError: operation not permitted when stream is capturing")
    call, how = rounds.captured(lambda: "launched", gpu)
    assert (call(), how) == ("replayed", "graph")
    assert rounds.captured(waits, torch.device("cpu"))[1] == "eager"

    def full(device):
        def take(function):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return take

    monkeypatch.setattr(rounds, "CudaCapture", full)
    with pytest.raises(torch.OutOfMemoryError):  # which says nothing of whether it can be captured
        rounds.captured(waits, gpu)


def test_a_failure_is_a_row_and_the_next_goes_on_but_not_on_a_lost_device(tmp_path, capsys):
    class OutOfResources(Exception):
        """As Triton's, which is no RuntimeError."""

    one = session(tmp_path)
    with one.isolated("layers", "a point", rank=4):
        raise OutOfResources("out of resource: shared memory\nHint: reduce /opt/somewhere/x.py")
    assert one.num_failed == 1
    (row,) = one.rows
    assert (row["measures"], row["what"], row["rank"]) == ("failed", "a point", 4)
    assert row["error"] == "OutOfResources: out of resource: shared memory"
    assert "FAILED: layers, a point" in capsys.readouterr().out
    with pytest.raises(DeviceLostError), one.isolated("layers", "the part"), one.isolated("layers", "a point"):
        raise RuntimeError("CUDA error: device-side assert triggered")
    assert one.num_failed == 2, "told once"
    with pytest.raises(RowsLostError), one.isolated("layers", "a point"):
        raise RowsLostError("cannot write the rows")
    with pytest.raises(KeyboardInterrupt), one.isolated("layers", "a point"):
        raise KeyboardInterrupt


def test_a_method_that_fails_takes_no_other_with_it(tmp_path, monkeypatch):
    real = layers._call_of

    def call_of(problem, method, point):
        if method == "bmm-lora":
            raise ValueError("a compiler's error")
        return real(problem, method, point)

    monkeypatch.setattr(layers, "_call_of", call_of)
    monkeypatch.setattr(layers, "tiny_points", lambda: [LayerPoint("decode", "bfloat16", 16, 8, 2, 1, 2)])
    one = session(tmp_path)
    (rows,) = layers.measure(one, None, Budget(60.0))
    assert {row["method"] for row in rows} == set(layers.METHODS) - {"bmm-lora"}
    assert [row["method"] for row in one.rows if row["measures"] == "failed"] == ["bmm-lora"]


@pytest.mark.parametrize("ends", [DeviceLostError("gone"), KeyboardInterrupt(), None])
def test_promises_are_told_whatever_ends_a_run(ends, tmp_path, monkeypatch, capsys):
    def measure(one, *rest):
        one.failed("layers", "a point", "no reason")
        if ends is not None:
            raise ends

    monkeypatch.setattr(command, "_measure", measure)
    monkeypatch.setattr(command, "_kernels", lambda dry_run: (None, torch.device("cpu")))
    monkeypatch.setattr(command, "_session", lambda options, device, file: session(tmp_path, file=file))
    monkeypatch.setattr(command.hardware, "summary", lambda facts: "")
    file = tmp_path / "rows.jsonl"
    assert main(["gpu", "--dry-run", "--json", str(file)]) == (130 if isinstance(ends, KeyboardInterrupt) else 1)
    assert "1 measurements failed" in capsys.readouterr().out
    written = [json.loads(line)["measures"] for line in file.read_text().splitlines()]
    assert written.count("promise") == 8 and "failed" in written
    with pytest.raises(SystemExit):
        main(["gpu", "--dry-run", "--json", str(file)])
    assert "rows.jsonl' is there already" in capsys.readouterr().err


def test_rows_are_kept_by_default_under_the_device_s_name(monkeypatch, tmp_path):
    monkeypatch.setattr(command.hardware, "device_name", lambda device: "NVIDIA H200 (x/../y)")
    options = {"json": None, "dry_run": False, "part": list(command.DEFAULT_PARTS)}
    assert command._path(SimpleNamespace(**options), torch.device("cpu")) == Path("gpu_nvidia_h200_x_y.jsonl")
    figures = SimpleNamespace(**options | {"part": ["figures"]})
    assert command._path(figures, torch.device("cpu")) == Path("gpu_nvidia_h200_x_y_figures.jsonl")
    assert command._path(SimpleNamespace(**options | {"dry_run": True}), torch.device("cpu")) is None
    with command._rows_file(tmp_path / "empty.jsonl"):
        pass
    assert not (tmp_path / "empty.jsonl").exists(), "what came to nothing does not stand in the way of the next run"


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_a_kernel_that_gives_no_number_is_wrong_and_is_told(wrong, tmp_path, monkeypatch):
    class Broken(kernel_check.Problem):
        def form_of(self, method):
            return "decode"

        def call_of(self, method):
            return lambda: torch.full((*self.x.shape[:2], self.weight.shape[0]), wrong)

    monkeypatch.setattr(kernel_check, "Problem", Broken)
    one = session(tmp_path, file=(tmp_path / "rows.jsonl").open("w"))
    row = kernel_check._checked(one, None, kernel_check.cases(small=True)[0])
    assert row["agrees"] is False and row["error"] is None
    one.file.close()


def test_float32_comes_last_and_production_first():
    found = kernel_check.cases(small=False)
    assert [case.kind for case in found[-3:]] == ["float32"] * 3 and sum(case.kind == "float32" for case in found) == 3
    assert found[0].shape.d_in == 6144 and {len(case.shape.slots) for case in found} >= {64, 128}
    assert any(case.shape.length == 256 and case.shape.method == "flora-modulate" for case in found)


@pytest.mark.parametrize("rows", [1, 7, 33])
def test_the_stand_in_for_bitsandbytes_layer_multiplies(rows):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 3, 64), torch.randint(-127, 128, (24, 64), dtype=torch.int8)
    scales = torch.rand(24) + 0.5
    truth = x.double() @ (weight.double() * scales.double()[:, None] / 127).T
    y = int8_reference.quantised_product(weight, scales, x)
    error = ((y - truth).abs() / (x.double().abs() @ (weight.double().abs() * scales.double()[:, None] / 127).T)).max()
    assert y.shape == (rows, 3, 24) and error < 0.01


def test_what_the_driver_tells_is_read_and_what_it_does_not_is_left_out():
    assert board_facts(torch.device("cpu")) == {}
    said = "570.86.15, 1980, 1980, 3201, 700.00, 121.53, [N/A]\n"
    assert read_board(said) == {
        "driver": "570.86.15",
        **{"sm_clock_mhz": 1980.0, "max_sm_clock_mhz": 1980.0, "memory_clock_mhz": 3201.0},
        **{"power_limit_w": 700.0, "power_w": 121.53},
    }
    assert len(ASKED) == 7 and read_board("") == read_board("No devices were found") == {}


def test_work_that_took_long_once_is_expected_to_again():
    clock = Clock()
    longest = Longest(clock)
    for seconds in (2.0, 5.0, 3.0):
        with pytest.raises(ValueError), longest.timed("steps"):
            clock.now += seconds
            raise ValueError  # even where it failed
    assert longest.expected_s("steps") == 5.0 and longest.expected_s("loading") == 0.0


def test_a_model_that_cannot_be_measured_is_told_of_and_the_others_are(tmp_path, monkeypatch):
    """One does not fit into memory, one needs a package that is not there, and for one there is no time."""

    class Measured(models._Measured):

        def rows(self):
            if self.job.model == "large":
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            with self.longest.timed("loading"):
                clock.now += 7.0
            yield self.session.record("models", {"measures": "decode step", "model": self.job.model})

    clock = Clock()
    jobs = [
        models.Job("large", 1, ()),
        models.Job("small", 1, ()),
        models.Job("small", 1, (), quantize="int8"),
        models.Job("last", 1, ()),
    ]
    monkeypatch.setattr(models, "_Measured", Measured)
    monkeypatch.setattr(models, "bitsandbytes", lambda: None)
    one = session(tmp_path)
    told = list(models.measure(one, Budget(10.0, clock), jobs, models.TINY))
    rows = one.rows
    assert told == rows[1:], "what failed is told where it failed"
    assert [(row["model"], row["measures"]) for row in rows] == [
        ("large", "failed"),
        ("small", "decode step"),
        ("small", "nothing"),
        ("last", "nothing"),
    ]
    assert "CUDA out of memory" in rows[0]["error"]
    reasons = [row["reason"] for row in rows if row["measures"] == "nothing"]
    assert ["bitsandbytes" in reasons[0], "no time" in reasons[1]] == [True] * 2


def test_copies_are_made_once_and_have_a_slot_each(checkpoints):
    """What they answer is what the first random adapter of that rank answers."""
    engine = checkpoints["code"].engine(adapter_slots=3, max_batch_size=3)
    tags = add_random_copies(engine, 3, 2, ("flora", "bmm-lora"), seed=5)
    assert tags == ("random-r2-0000", "random-r2-0001", "random-r2-0002")
    packed = {id(engine.bank._adapters[tag].stored.packed) for tag in tags}
    assert len(packed) == 1, "one in host memory"
    requests = [Request("x = 1", adapter=tag, max_new_tokens=6, ignore_eos=True) for tag in tags]
    for method in ("flora", "bmm-lora"):
        answers = [completion.token_ids for completion in engine.generate(requests, method)]
        assert engine.snapshot().adapter_slots_used == 3
        assert answers[0] == answers[1] == answers[2]
        (first,) = engine.generate(requests[:1], method)
        for tag in tags:
            engine.remove_adapter(tag)
        (own,) = add_random_adapters(engine, 1, 2, ("flora", "bmm-lora"), seed=5)
        assert engine.generate(requests[:1], method)[0].token_ids == first.token_ids
        engine.remove_adapter(own)
        tags = add_random_copies(engine, 3, 2, ("flora", "bmm-lora"), seed=5)
    engine.close()
