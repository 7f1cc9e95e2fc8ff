"""Points of the Op lab that were recorded: read from JSONL, a row per method, and told from what is measured now."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from flora.errors import RequestError
from profiling.cost_model import LayerShape
from profiling.op_lab import Setting
from profiling.op_lab_grid import GAP, PAPERS
from profiling.timing import median

FILE_NAME = "oplab.jsonl"
_SHARED = ("model", "layer", "d_in", "d_out", "rows", "tokens", "rank", "adapters", "dtype", "seed")
_NUMBERS = ("median_s", "predicted_s")


@dataclass(frozen=True)
class RecordedPoint:
    """One point. rows: method → its row, as `OpLabResult.to_rows` wrote it."""

    setting: Setting
    rows: dict[str, dict]

    @property
    def hardware(self) -> dict:
        return next(iter(self.rows.values()))["hardware"]

    @property
    def prediction_error(self) -> float:
        """The median over its methods."""
        return median([abs(row["predicted_s"] - row["median_s"]) / row["median_s"] for row in self.rows.values()])

    def fastest(self, key: str = "median_s") -> str | None:
        """Of the paper's two methods, the faster one by a row's key; "neither" where none leads by more than GAP, None where one of
        them was not measured."""
        times = {method: self.rows[method][key] for method in PAPERS if method in self.rows}
        by_time = sorted(times, key=times.__getitem__)
        if len(by_time) < 2:
            return None
        if key == "median_s" and times[by_time[1]] <= (1 + GAP) * times[by_time[0]]:
            return "neither"
        return by_time[0]


@dataclass(frozen=True)
class Recorded:
    """Every point that could be read, and what is wrong with the rest of the file; empty: nothing."""

    points: tuple[RecordedPoint, ...]
    complaint: str = ""


def read_recorded(folder: Path) -> Recorded:
    """The points of `folder`'s file, in its order. A line that is no row of the Op lab is left out, and complained of."""
    file = folder / FILE_NAME
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return Recorded((), f"{FILE_NAME} is not there.")
    except (OSError, UnicodeDecodeError):
        return Recorded((), f"{FILE_NAME} cannot be read.")
    points: dict[Setting, dict[str, dict]] = {}
    bad = 0
    for line in lines:
        try:
            setting, row = _row(line)
            points.setdefault(setting, {})[row["method"]] = row
        except (ValueError, TypeError, KeyError, RequestError):
            bad += 1
    complaint = f"{bad} of {len(lines)} lines of {FILE_NAME} are no rows of the Op lab." if bad else ""
    return Recorded(tuple(RecordedPoint(setting, rows) for setting, rows in points.items()), complaint)


def _row(line: str) -> tuple[Setting, dict]:
    """A line's setting and the row itself; ValueError, TypeError, KeyError or RequestError for anything else."""
    row = json.loads(line)
    if row["measures"] != "layer" or not isinstance(row["method"], str) or not isinstance(row["hardware"], dict):
        raise ValueError("this is no row of the Op lab")
    if not all(isinstance(row[key], int | float) and 0 < row[key] < float("inf") for key in _NUMBERS):
        raise ValueError("a time is a number above 0")
    over = row["over_first"] if isinstance(row["first"], str) else False
    if over is not None and not (isinstance(over, list) and len(over) == 3 and all(isinstance(end, int | float) for end in over)):
        raise ValueError("a ratio has a median and two ends")
    model, layer, d_in, d_out, rows, tokens, rank, adapters, dtype, seed = (row[name] for name in _SHARED)
    return Setting(LayerShape(d_in, d_out, rows, tokens, rank, adapters), dtype, model, layer, seed), row
