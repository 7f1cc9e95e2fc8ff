"""What an evaluation says on a terminal: aligned tables of scores, and whether each promise of the embedded models holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flora.evaluate.intervals import Interval
from flora.evaluate.rows import METHODS, Mean, Score
from flora.evaluate.tasks import Key

Tally = TypeVar("Tally")


def per_cent(interval: Interval | Mean) -> str:
    """A fraction as "78.0 % [69.0, 86.0]"."""
    ends = "" if interval.low is None else f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    return f"{100 * interval.value:.1f} %{ends}"


def points(interval: Interval | Mean) -> str:
    """A difference of fractions as "-0.6 points [-3.1, +1.9]"."""
    ends = "" if interval.low is None else f" [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
    return f"{100 * interval.value:+.1f} points{ends}"


# --------------------------------------------------------------------------------------------------------------- tables


def text_table(heads: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns for a terminal, the first `left` of them to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    rows = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (heads, *lines)
    ]
    return "\n".join([rows[0], "  ".join("-" * width for width in widths), *rows[1:]])


def score_table(scores: Iterable[Score], metric: str) -> str:
    """Languages × methods: each one's own adapter, in per cent with its interval, and the mean over the languages all methods have.

    A language that could not be graded says so. Empty where no row has the metric.
    """
    own = {
        (score.language, score.method): score
        for score in scores
        if score.metric == metric and (score.adapter in (None, score.language))
    }
    methods = [method for method in METHODS if any(method == column for _, column in own)]
    languages = list(dict.fromkeys(language for language, _ in own))
    if not own:
        return ""
    lines = [[language, *(_cell(own.get((language, method))) for method in methods)] for language in languages]
    common = [tag for tag in languages if all((tag, m) in own and own[tag, m].value is not None for m in methods)]
    if common:
        means = [sum(own[tag, method].value for tag in common) / len(common) for method in methods]
        lines.append([f"mean of {len(common)}", *(f"{100 * mean:.1f} %" + " " * _INTERVAL_WIDTH for mean in means)])
    return text_table([metric, *methods], lines)


_INTERVAL_WIDTH = len(" [100.0, 100.0]")


def _cell(score: Score | None) -> str:
    if score is None:
        return "–" + " " * _INTERVAL_WIDTH
    if not score.graded or score.value is None:
        return "not graded" + " " * _INTERVAL_WIDTH
    interval = "" if score.low is None or score.high is None else f" [{100 * score.low:.1f}, {100 * score.high:.1f}]"
    return f"{100 * score.value:.1f} %" + interval.ljust(_INTERVAL_WIDTH)


def means_table(means: Iterable[Mean], metric: str) -> str:
    """Each method's mean with its interval; empty where there are no means of several languages."""
    lines = {mean.method: mean for mean in means if mean.metric == metric and mean.versus is None and len(mean.languages) > 1}
    if not lines:
        return ""
    number = len(next(iter(lines.values())).languages)
    return text_table(
        ["method", f"mean {metric} of {number} languages"], [[method, per_cent(mean)] for method, mean in lines.items()], left=2
    )


def confusion_table(scores: Iterable[Score], metric: str, method: str = "flora") -> str:
    """Languages × adapters of one method, in per cent; empty without a row of another language's adapter."""
    cells = {(score.language, score.adapter): score for score in scores if score.metric == metric and score.method == method}
    if all(language == adapter for language, adapter in cells):
        return ""
    languages = list(dict.fromkeys(language for language, _ in cells))
    adapters = [tag for tag in languages if any(tag == adapter for _, adapter in cells)]
    adapters += [tag for tag in dict.fromkeys(adapter for _, adapter in cells) if tag not in languages]
    lines = []
    for language in languages:
        row = [cells.get((language, adapter)) for adapter in adapters]
        lines.append([language, *("–" if cell is None or cell.value is None else f"{100 * cell.value:.1f}" for cell in row)])
    return text_table([f"{metric} %, {method}", *(f"{adapter}'s" for adapter in adapters)], lines)


# -------------------------------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """A promise and whether it holds; measured None where it could not be measured."""

    what: str
    measured: str | None
    met: bool | None


def target_table(targets: Sequence[Target]) -> str:
    """One line per promise."""
    words = {True: "met", False: "NOT MET", None: "not measured"}
    return text_table(
        ["target", "measured", "holds"], [[target.what, target.measured or "–", words[target.met]] for target in targets], left=3
    )


@dataclass(frozen=True)
class Promise:
    """What a mean, or a difference of two, is to be. what: with {mean} where the mean's name is to stand. holds: of a fraction."""

    what: str
    method: str
    versus: str | None
    holds: Callable[[float], bool]


def mean_targets(promises: Iterable[Promise], means: Iterable[Mean], metric: str, languages: Collection[str]) -> list[Target]:
    """Whether the promises hold over all of `languages`; a mean over others is not what was promised."""
    found = {(m.method, m.versus): m for m in means if m.metric == metric and languages and set(m.languages) == set(languages)}
    targets = []
    for promise in promises:
        mean = found.get((promise.method, promise.versus))
        what = promise.what.format(mean=f"mean {metric} of {len(languages)} languages")
        if mean is None:
            targets.append(Target(what, None, None))
        else:
            shown = per_cent(mean) if promise.versus is None else points(mean)
            targets.append(Target(what, shown, promise.holds(mean.value)))
    return targets


def needed_target(
    tallies: Mapping[Key, Tally],
    languages: Sequence[str],
    adapters: Sequence[str],
    worse_by: Callable[[Tally, Tally], Interval],
    behind: str = "",
) -> Target:
    """Whether each adapter is needed: on no language does another one's come near its own.

    tallies: what each method counted with each adapter. worse_by: by how much the second one, of a wrong adapter, is worse than the
    first, on the items of the second; clearly so where its interval leaves out 0.
    """
    what = "every other language's fLoRA adapter is clearly worse"
    pairs = [(tag, other) for tag in languages for other in adapters if other != tag]
    if not pairs or any((tag, "flora", adapter) not in tallies for tag, other in pairs for adapter in (tag, other)):
        return Target(what, None, None)
    leads = {(tag, other): worse_by(tallies[tag, "flora", tag], tallies[tag, "flora", other]) for tag, other in pairs}
    worse = sum(lead.low is not None and lead.low > 0.0 for lead in leads.values())
    (tag, other), nearest = min(leads.items(), key=lambda pair: pair[1].value)
    return Target(what, f"{worse} of {len(pairs)}; nearest: {other}'s on {tag} {points(nearest)}{behind}", worse == len(pairs))
