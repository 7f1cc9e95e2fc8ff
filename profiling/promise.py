"""A measured figure and what is promised of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from profiling.timing import Ratio


@dataclass(frozen=True)
class Figure:
    """One measured figure and what it should be.

    value: None where nothing was measured that says it. n: what it was measured from: pairs, rounds, points. target: at least that,
    with at_most at most that, with strictly more than that; None: told, not judged. points: how many the promise is about; as long
    as n is less, it is told, and not judged.
    """

    part: str
    what: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    target: float | None
    at_most: bool = False
    unit: str = "×"
    points: int | None = None
    strictly: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether all that it is about was measured."""
        return self.value is not None and (self.points is None or self.n >= self.points)

    @property
    def holds(self) -> bool | None:
        if self.target is None or not self.is_complete:
            return None
        if self.strictly:
            return self.value > self.target
        return self.value <= self.target if self.at_most else self.value >= self.target

    @classmethod
    def of_ratio(cls, part: str, what: str, ratio: Ratio, target: float | None) -> Figure:
        return cls(part, what, ratio.median, ratio.low, ratio.high, ratio.n, target)

    def as_row(self) -> dict:
        return asdict(self) | {"holds": self.holds}

    def cells(self) -> list[str]:
        def number(value: float) -> str:
            return f"{100 * value:.0f} %" if self.unit == "%" else f"{value:.3g}{self.unit}"

        interval = "" if self.low is None else f" [{number(self.low)}, {number(self.high)}]"
        bound = "at most" if self.at_most else "above" if self.strictly else "at least"
        wanted = "" if self.target is None else f"{bound} {number(self.target)}"
        holds = {None: "", True: "yes", False: "NO"}[self.holds]
        measured = "not measured" if self.value is None else number(self.value) + interval
        if self.points is not None and 0 < self.n < self.points:
            measured += f", {self.n} of {self.points} points"
        return [self.part, self.what, measured, wanted, holds]
