"""Measurements that were recorded, in `assets/results/` or another folder: which there are, what was measured, and on what.

A recording is the rows that one command wrote, as JSONL; every row says by which command and on which hardware. They are shown
beside what is measured now, under their own name, and never mixed with it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MAX_BYTES = 20_000_000  # of a file; a recording is a fraction of it


@dataclass(frozen=True)
class Recording:
    """The rows of one command. name: the file's, without its suffix. measurement: the sub-command, such as "sweep"."""

    name: str
    measurement: str
    command: str
    rows: tuple[dict[str, Any], ...]

    @property
    def hardware(self) -> Mapping[str, Any]:
        """What it was measured on; empty where the rows do not tell."""
        facts = self.rows[0].get("hardware")
        return facts if isinstance(facts, dict) else {}

    @property
    def where(self) -> str:
        """What it was measured on, in a few words for beside its name; no day and no place."""
        facts = self.hardware
        threads = facts.get("threads")
        parts = [facts.get("device_name"), None if threads is None else f"{threads} thread{'s' if threads != 1 else ''}"]
        dtypes = dict.fromkeys(row["dtype"] for row in self.rows if isinstance(row.get("dtype"), str))
        return ", ".join(str(part)[:60] for part in [*parts, *dtypes] if part) or "an unknown machine"


class Recordings(NamedTuple):
    """What a folder holds of one kind of measurement, and a sentence for each file that could not be read."""

    found: list[Recording]
    complaints: list[str]


def recordings(folder: Path, measurement: str) -> Recordings:
    """Every recording of `python -m profiling <measurement> …` in a folder, by file name; never raises for what the files hold.

    The rows of a file that were written by the same command are one recording, in their order. A folder that is not there is empty.
    """
    found: list[Recording] = []
    complaints: list[str] = []
    for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else ():
        try:
            rows = _rows(path)
        except (OSError, ValueError) as error:
            complaints.append(f"{path.name} could not be read and is left out: {_reason(error)}.")
            continue
        by_command: dict[str, list[dict]] = {}
        for row in rows:
            if isinstance(row.get("command"), str) and measurement_of(row["command"]) == measurement:
                by_command.setdefault(row["command"], []).append(row)
        found += [Recording(path.stem, measurement, command, tuple(own)) for command, own in by_command.items()]
    return Recordings(found, complaints)


def measurement_of(command: str) -> str | None:
    """The sub-command of a `python -m profiling …` line; None for another line."""
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    return words[3] if words[:3] == ["python", "-m", "profiling"] and len(words) > 3 else None


def _rows(path: Path) -> list[dict]:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 1_000_000} MB")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no JSON object")
    return rows


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return "a line is no JSON"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return str(getattr(error, "strerror", None) or error)
