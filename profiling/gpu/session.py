"""What the parts of a run share: where they compute, what that allows, the file that their rows go to, and what failed so far."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from tqdm import tqdm

from flora.errors import RequestError
from profiling.peaks import Peaks
from profiling.rounds import first_line
from profiling.timing import paired_ratio, synchronise

LOST = ("device-side assert", "illegal memory access", "unspecified launch failure", "misaligned address", "illegal instruction")
"""What an error says after which a GPU answers this process no more."""


class RowsLostError(RequestError):
    """The file takes no more rows: nothing that is measured from now on would be kept."""


class DeviceLostError(Exception):
    """The device answers no more: whatever was tried from now on would fail for the same reason."""


@dataclass
class Session:
    """One run. dry_run: tiny shapes on a CPU, whose rows are never measurements. facts: go with every row."""

    device: torch.device
    dry_run: bool
    seed: int
    peaks: Peaks
    facts: dict  # hardware, versions, command
    file: TextIO | None = None
    rows: list[dict] = field(default_factory=list)
    num_failed: int = 0

    @property
    def dtype(self) -> str:
        """Of the models."""
        return "float32" if self.device.type == "cpu" else "bfloat16"

    def record(self, part: str, row: dict) -> dict:
        """Keep a row, and write it at once: what ends this run leaves it whole. RowsLostError where the file takes no more.

        A number that is infinite or none at all is None in the row: no JSON has it, and no measurement gives it.
        """
        whole = _finite({"part": part, "dry_run": self.dry_run, **row, "seed": self.seed, **self.facts})
        self.rows.append(whole)
        if self.file is not None:
            try:
                self.file.write(json.dumps(whole, ensure_ascii=False, allow_nan=False) + "\n")
                self.file.flush()
            except OSError as error:
                raise RowsLostError(f"cannot write the rows: {error.strerror}") from error
        return whole

    @contextmanager
    def isolated(self, part: str, what: str, **setting: Any) -> Iterator[None]:
        """One measurement, which fails alone: a row and a line tell of it, and the next one goes on.

        part, what, setting: of the row. DeviceLostError where the device answers no more.
        """
        try:
            yield
            return
        except (RowsLostError, DeviceLostError):
            raise  # of which was told where it arose
        # Whatever kernels and libraries raise here (out of resources, a compiler's error, out of memory by any name) says something
        # of this one measurement and nothing of those after it, and nothing slower is timed in its place.
        except Exception as error:
            self.failed(part, what, first_line(error), **setting)
            if self._is_lost(error):
                raise DeviceLostError(first_line(error)) from error
        release(self.device)  # now that the error no longer holds what was there when it arose

    def failed(self, part: str, what: str, reason: str, **setting: Any) -> None:
        """Keep a row and print a line of what could not be measured."""
        self.num_failed += 1
        self.record(part, {"measures": "failed", "what": what, **setting, "error": reason})
        tqdm.write(f"FAILED: {part}, {what}: {reason}")

    def _is_lost(self, error: Exception) -> bool:
        """Whether the device is of no more use. It remembers such an error: the next call, whatever it is, fails too."""
        if any(words in str(error) for words in LOST):
            return True
        try:
            synchronise(self.device)
        except RuntimeError:
            return True
        return False

    def bandwidth_share(self, num_bytes: float, seconds: float) -> float:
        """Of the copy bandwidth that was measured."""
        return num_bytes / seconds / self.peaks.copy_bytes_per_s

    def matrix_share(self, operations: float, seconds: float, dtype: str) -> float:
        """Of the rate of matrix products that was measured in a dtype."""
        return operations / seconds / self.peaks.matrix_flops_per_s[dtype]


def release(device: torch.device) -> None:
    """Let go of memory that nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ratio_row(numerator: Sequence[float], denominator: Sequence[float] | None, seed: int) -> list[float] | None:
    """The median pairwise ratio of two series and the ends of its interval, for a row; None without one of them."""
    ratio = None if denominator is None else paired_ratio(numerator, denominator, seed)
    return None if ratio is None else [ratio.median, ratio.low, ratio.high]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value
