"""What the parts of a run share: where they compute, what that allows, and the file that their rows go to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

import torch

from flora.errors import RequestError
from profiling.peaks import Peaks
from profiling.timing import paired_ratio


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

    @property
    def dtype(self) -> str:
        """Of the models."""
        return "float32" if self.device.type == "cpu" else "bfloat16"

    def record(self, part: str, row: dict) -> dict:
        """Keep a row, and write it at once: what ends this run leaves it whole. RequestError where the file takes no more."""
        whole = {"part": part, "dry_run": self.dry_run, **row, "seed": self.seed, **self.facts}
        self.rows.append(whole)
        if self.file is not None:
            try:
                self.file.write(json.dumps(whole, ensure_ascii=False, allow_nan=False) + "\n")
                self.file.flush()
            except OSError as error:
                raise RequestError(f"cannot write the rows: {error.strerror}") from error
        return whole

    def bandwidth_share(self, num_bytes: float, seconds: float) -> float:
        """Of the copy bandwidth that was measured."""
        return num_bytes / seconds / self.peaks.copy_bytes_per_s

    def matrix_share(self, operations: float, seconds: float, dtype: str) -> float:
        """Of the rate of matrix products that was measured in a dtype."""
        return operations / seconds / self.peaks.matrix_flops_per_s[dtype]


def ratio_row(numerator: Sequence[float], denominator: Sequence[float], seed: int) -> list[float]:
    """The median pairwise ratio of two series and the ends of its interval, for a row."""
    ratio = paired_ratio(numerator, denominator, seed)
    return [ratio.median, ratio.low, ratio.high]
