"""Which recorded measurements a folder holds, whatever else lies there."""

from __future__ import annotations

import json

import pytest

from profiling import recorded, workload
from profiling.recorded import measurement_of, recordings

SWEEP, OTHER = "python -m profiling sweep --ranks 1 2", "python -m profiling sweep --ranks '4'"
ROW = {"command": SWEEP, "dtype": "float32", "hardware": {"device_name": "A CPU", "threads": 2}}


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def test_the_rows_of_one_command_are_one_recording(tmp_path):
    write(tmp_path / "b.jsonl", ROW | {"n": 1}, ROW | {"n": 2, "command": OTHER}, "\n", ROW | {"n": 3}, {"command": 3}, {})
    write(tmp_path / "a.jsonl", ROW | {"command": "python -m profiling compare"})
    write(tmp_path / "c.csv", "not looked at")
    found, complaints = recordings(tmp_path, "sweep")
    assert [(one.name, one.command, [row["n"] for row in one.rows]) for one in found] == [("b", SWEEP, [1, 3]), ("b", OTHER, [2])]
    assert found[0].where == "A CPU, 2 threads, float32" and complaints == []
    assert [one.name for one in recordings(tmp_path, "compare").found] == ["a"] and recordings(tmp_path, "load").found == []
    assert recordings(tmp_path / "nowhere", "sweep") == ([], [])


@pytest.mark.parametrize("content", ["{broken", "[1]\n", "3\n", b"\xff\xfe", "x" * 40])
def test_a_broken_file_is_named_and_the_others_are_read(tmp_path, content, monkeypatch):
    monkeypatch.setattr(recorded, "MAX_BYTES", 1000 if content != "x" * 40 else 20)
    (tmp_path / "bad.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    if content != "x" * 40:
        write(tmp_path / "good.jsonl", ROW)
    (tmp_path / "folder.jsonl").mkdir()
    found, complaints = recordings(tmp_path, "sweep")
    assert len(found) == (content != "x" * 40) and len(complaints) == 2
    assert complaints[0].startswith("bad.jsonl could not be read and is left out: ") and str(tmp_path) not in "".join(complaints)


def test_where_nothing_is_known_it_says_so(tmp_path):
    write(tmp_path / "a.jsonl", {"command": SWEEP}, {"command": OTHER, "hardware": "odd", "dtype": 3})
    assert [one.where for one in recordings(tmp_path, "sweep").found] == ["an unknown machine"] * 2


@pytest.mark.parametrize(
    ("command", "measurement"),
    [(SWEEP, "sweep"), ("python -m flora.evaluate code", None), ("python -m profiling", None), ("'unfinished", None), ("", None)],
)
def test_a_command_says_what_it_measures(command, measurement):
    assert measurement_of(command) == measurement


def test_what_ships_can_be_read():
    found, complaints = recordings(workload.ASSETS / "results", "compare")
    assert complaints == [] and len(found) == 1 and found[0].where.endswith("2 threads, float32")
