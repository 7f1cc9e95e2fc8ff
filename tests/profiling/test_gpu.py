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
from profiling.gpu import layers, models, promises
from profiling.gpu.adapters import add_random_copies
from profiling.gpu.budget import Budget, Pace
from profiling.gpu.layers import LayerPoint
from profiling.gpu.session import Session
from profiling.loading import add_random_adapters

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
    done = bare_machine("gpu", "--dry-run", "--json", str(file), XDG_CACHE_HOME=str(file.parent / "cache"))
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
    assert {row["static_shapes"] for row in served} == {True, False}
    assert {row["method"] for row in served} == {"base", "flora", "bmm-lora", "sgmv-lora"}


def test_no_row_of_a_dry_run_can_be_taken_for_a_measurement(dry_run):
    done, rows = dry_run
    assert rows and all(row["dry_run"] is True for row in rows)
    assert "no number here is a measurement" in done.stdout


def test_every_row_says_what_it_was_measured_on(dry_run):
    _, rows = dry_run
    for row in rows:
        assert row["seed"] == 0 and row["command"] == "python -m profiling gpu --dry-run"
        facts = row["hardware"]
        assert facts["device"] == "cpu" and all(facts[name] for name in ("device_name", "torch", "transformers", "peft", "triton"))
        if row["part"] in ("layers", "models"):
            assert all(row[name] is not None for name in ("dtype", "method", "rank", "batch", "popularity", "repeats"))
        if row["measures"] in ("layer", "decode step"):
            assert set(row["quantiles"]) == {"p10", "p50", "p90", "p99"} and row["median_s"] == row["quantiles"]["p50"]
            assert row["bytes"] > 0 and row["bandwidth_share"] > 0
            assert row["over_base"][1] <= row["over_base"][0] <= row["over_base"][2]


def test_a_dry_run_comes_to_every_promise(dry_run):
    """But that of bitsandbytes' layers, which a bare machine does not have."""
    done, rows = dry_run
    told = {row["what"]: row["value"] for row in rows if row["part"] == "promises"}
    assert len(told) == 8
    assert [what for what, value in told.items() if value is None] == [
        "int8 decode: r-fold rows through bitsandbytes' layer over flora"
    ]
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
    assert {point.width for point in found} == set(layers.WIDTHS)
    assert {point.rank for point in found} == {1, 2, 4, 8, 16, 32, 64} and {point.batch for point in found} == {
        1,
        2,
        4,
        8,
        16,
        32,
        64,
    }
    assert found[0] == LayerPoint("decode", "bfloat16", 6144, 1, 1, 1)
    early = found[: len(found) // 4]
    assert {(point.phase, point.kind) for point in early} == {
        (phase, kind) for phase in ("decode", "prefill") for kind in ("bfloat16", "int8")
    }


# ------------------------------------------------------------------------------------------------------------ promises


def layer_row(method: str, batch: int, rank: int, over_base: float, over_flora: float, **other) -> dict:
    row = {"part": "layers", "phase": "decode", "d_in": 6144, "batch": batch, "rank": rank, "tokens": 1, "quantize": None}
    row |= {"method": method, "over_base": [over_base] * 3, "over_flora": [over_flora] * 3, "bandwidth_share": 0.8}
    return row | {"median_s": 1.0, "quantiles": {"p10": 1.0, "p90": 1.0}} | other


def step_row(method: str, rank: int, over_base: float, over_flora: float, **other) -> dict:
    row = {"part": "models", "measures": "decode step", "model": {"name": "starcoder"}, "cuda_graphs": True, "batch": 32}
    return (
        row
        | {"quantize": None, "method": method, "rank": rank, "over_base": [over_base] * 3, "over_flora": [over_flora] * 3}
        | other
    )


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
    assert decode.value == 1.2 and decode.holds is False and decode.n == 2
    assert "batch 32, rank 4" in decode.what
    assert figures["its share of the copy bandwidth"].value == 0.6
    assert figures["bmm-lora over flora, rank 8 and below"].holds is True
    assert figures["sgmv-lora over flora, rank 4 and below"].value == 1.05
    assert figures["prefill, 512 rows an adapter: flora over the bare layer"].holds is True
    assert sum(figure.value is None and figure.holds is None for figure in figures.values()) == 3, "what was not measured is told"


@pytest.mark.parametrize(
    ("ratios", "rank", "holds"),
    [({1: 2.0, 16: 1.2, 32: 1.05}, 32.0, True), ({1: 2.0, 8: 1.0 / 2.0}, math.sqrt(8), False), ({1: 0.9, 16: 0.5}, 0.0, False)],
)
def test_the_crossover_is_where_bmm_lora_begins_to_be_faster(ratios, rank, holds):
    rows = [step_row("bmm-lora", one, 1.0, ratio) for one, ratio in ratios.items()]
    rows += [step_row("bmm-lora", 64, 1.0, 0.1, cuda_graphs=False), step_row("flora", 1, 1.05, 1.0)]
    tokens, crossover = promises.promises(rows)[-2:]
    assert crossover.value == pytest.approx(rank) and crossover.holds is holds
    assert tokens.value == pytest.approx(1 / 1.05) and tokens.holds is True


# ---------------------------------------------------------------------------------------------------------------- work


def test_work_is_counted_as_it_is_computed():
    point = LayerPoint("decode", "bfloat16", 64, 3, 1, 4)
    num_bytes, operations = layers.work_of(point, "base", "base")
    assert (num_bytes, operations) == (2 * 64 * 64 + 2 * 2 * 3 * 64, 2 * 3 * 64 * 64)
    more_bytes, more_operations = layers.work_of(point, "flora", "flora-expand")
    assert more_bytes == num_bytes + 2 * 2 * 3 * 4 * 64 and more_operations == 2 * 3 * 4 * (64 * 64 + 2 * 64)
    assert layers.work_of(LayerPoint("decode", "int8", 64, 3, 1, 4), "base", "base")[0] == num_bytes - 64 * 64


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
    assert (call(), how) == ("launched", "eager")
    call, how = rounds.captured(lambda: "launched", gpu)
    assert (call(), how) == ("replayed", "graph")
    assert rounds.captured(waits, torch.device("cpu"))[1] == "eager"


def test_a_model_that_cannot_be_measured_is_told_of_and_the_others_are(tmp_path, monkeypatch):
    """One does not fit into memory, one needs a package that is not there, and for one there is no time."""

    class Measured:
        loading_s = 5.0

        def __init__(self, session, job, size, budget) -> None:
            self.session, self.job = session, job

        def rows(self):
            if self.job.model == "large":
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
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
    monkeypatch.setattr(models, "tiny_jobs", lambda: jobs)
    monkeypatch.setattr(models, "bitsandbytes", lambda: None)
    rows = list(models.measure(session(tmp_path), Budget(10.0, clock)))
    assert [(row["model"], row["measures"]) for row in rows] == [
        ("large", "nothing"),
        ("small", "decode step"),
        ("small", "nothing"),
        ("last", "nothing"),
    ]
    reasons = [row["reason"] for row in rows if row["measures"] == "nothing"]
    assert ["memory" in reasons[0], "bitsandbytes" in reasons[1], "no time" in reasons[2]] == [True] * 3


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
