"""What a machine allows: numbers that make sense, kept for this machine alone, and measured anew where what was kept is no good."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import pytest
import torch

from profiling import peaks as limits
from profiling.__main__ import main
from profiling.peaks import Peaks, peaks

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder of the test's own, and small tensors."""
    monkeypatch.setattr(limits, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(limits, "MIN_CPU_BUFFER", 1 << 20)
    monkeypatch.setattr(limits, "_last_cache", lambda: 1 << 18)
    monkeypatch.setattr(limits, "CPU_WIDTHS", (64, 32))
    monkeypatch.setattr(limits, "NUM_LAUNCHES", 10)
    return tmp_path / "cache"


@pytest.fixture
def measurements(monkeypatch):
    """How often something was measured."""
    seen, measure = [], limits.measure
    monkeypatch.setattr(limits, "measure", lambda *arguments: seen.append(arguments) or measure(*arguments))
    return seen


def test_rates_are_work_over_the_clocks_seconds(folder):
    """A clock that moves by a second whenever it is read: every round of calls takes one."""
    now = iter(range(10_000))
    found = limits.measure(CPU, clock=lambda: float(next(now)))
    assert found.copy_buffer_bytes == 1 << 20 and found.copy_bytes_per_s == 2 << 20, "read and written"
    assert found.launch_s == 0.1, "ten in a row"
    assert set(found.matrix_width.values()) == {32}, "too slow for more"
    assert set(found.matrix_flops_per_s.values()) == {2.0 * 32**3}


def test_the_copied_tensor_is_several_times_the_last_cache_and_a_part_of_memory(folder, monkeypatch):
    monkeypatch.setattr(limits, "_last_cache", lambda: 3 << 20)
    assert limits.measure(CPU).copy_buffer_bytes == limits.CACHE_MULTIPLE * (3 << 20)
    monkeypatch.setattr(limits, "_memory", lambda device: (3 << 20, 1 << 30, 5 << 20))
    assert limits.measure(CPU).copy_buffer_bytes == int(limits.MEMORY_SHARE * (5 << 20)) // 4096 * 4096


def test_what_was_measured_is_kept_and_read_back(folder, measurements):
    first = peaks(CPU)
    assert peaks(CPU) == first and len(measurements) == 1
    assert peaks(CPU, fresh=True).device_name == first.device_name and len(measurements) == 2
    assert not list(folder.glob("*.part"))
    numbers = (first.copy_bytes_per_s, first.launch_s, first.memory_bytes, *first.matrix_flops_per_s.values())
    assert all(math.isfinite(number) and number > 0 for number in numbers)


def test_another_number_of_threads_is_another_measurement(folder, measurements):
    peaks(CPU)
    torch.set_num_threads(torch.get_num_threads() + 1)
    assert peaks(CPU).threads == torch.get_num_threads() and len(measurements) == 2


@pytest.mark.parametrize("change", ["", "{", "[]", "null", "launch_s", "copy_bytes_per_s", "matrix_flops_per_s", "threads", "more"])
def test_a_file_that_is_no_good_is_measured_anew(change, folder, measurements):
    good = peaks(CPU).as_row()
    (file,) = folder.iterdir()
    bad = {
        "launch_s": good | {"launch_s": math.inf},
        "copy_bytes_per_s": good | {"copy_bytes_per_s": 0},
        "matrix_flops_per_s": good | {"matrix_flops_per_s": {}},
        "threads": good | {"threads": 99},
        "more": good | {"more": 1},
    }
    file.write_text(json.dumps(bad[change]) if change in bad else change)
    again = peaks(CPU)
    assert len(measurements) == 2 and again.threads == good["threads"] and again.launch_s < 1
    assert Peaks.of_row(json.loads(file.read_text())) == again


def test_without_a_place_to_keep_it_it_is_measured_every_time(folder, measurements, monkeypatch):
    folder.write_text("a file where the folder should be")
    assert peaks(CPU) and peaks(CPU) and len(measurements) == 2
    monkeypatch.setattr(limits, "cache_folder", lambda: None)
    assert peaks(CPU) and len(measurements) == 3


@pytest.mark.parametrize(
    ("platform", "variables", "place"),
    [
        ("linux", {"XDG_CACHE_HOME": "/x/cache"}, "/x/cache/flora-live"),
        ("linux", {"HOME": "/x"}, "/x/.cache/flora-live"),
        ("darwin", {"HOME": "/x"}, "/x/Library/Caches/flora-live"),
        ("win32", {"LOCALAPPDATA": "/x/local"}, "/x/local/flora-live"),
    ],
)
def test_the_cache_is_where_the_platform_has_it(platform, variables, place, monkeypatch):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert str(limits.cache_folder()) == place


def test_the_command_prints_and_writes_what_was_measured(folder, tmp_path, capsys, monkeypatch):
    file = tmp_path / "hardware.jsonl"
    arguments = ["hardware", "--device", "cpu", "--threads", "1", "--fresh", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["profiling", *arguments])
    assert main(arguments) == 0
    row = json.loads(file.read_text())
    names = {field.name for field in dataclasses.fields(Peaks)}
    assert Peaks.of_row({name: row[name] for name in names}) == peaks(CPU)
    assert row["threads"] == 1 and row["hardware"]["torch"] == torch.__version__
    assert row["command"] == "python -m profiling hardware --device cpu --threads 1 --fresh"
    printed = capsys.readouterr().out
    assert "copy bandwidth" in printed and "matrix rate, bfloat16" in printed and "launch" in printed


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--device", "abacus"]])
def test_bad_options_are_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["hardware", *arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
