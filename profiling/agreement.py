"""Do two runs of the same comparison agree? Each runs in a process of its own, as two visitors or two days would.

Two runs agree about a ratio where their 95 % intervals overlap: then neither claims what the other excludes. A stricter count is
told beside it: each run's median lies within the other's interval, which even ideal intervals of 95 % do less often than in 95 %
of pairs, since both medians are off. Runs are paired as they come, the first with the second, the third with the fourth, so that no
run is in two pairs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from flora.errors import RequestError, first_line
from profiling import hardware, report
from profiling.document import text_table
from profiling.timing import Ratio

PROMISED = 0.9  # of pairs
_PROMPTS = {"lua": "local function total(xs)\n", "rb": "def total(xs)\n", "r": "total <- function(xs) {\n", "pl": "sub total {\n"}
_ROWS = [word for tag, prompt in _PROMPTS.items() for word in ("--row", json.dumps({"prompt": prompt, "adapter": tag}))]
MEASUREMENTS = {
    "embedded code model": ("compare", "--base", "--repeats", "4", "--max-new-tokens", "32", *_ROWS),
    "Whisper-large, decode": ("oplab", "--model", "whisper-large-v3", "--rows", "8", "--rank", "4"),
    "StarCoderBase 1B, 64 tokens": ("oplab", "--model", "starcoderbase-1b", "--rows", "4", "--length", "16", "--rank", "1"),
}
"""Name → words of a `python -m profiling` line that writes ratios."""
REPEATABLE = ("compare", "oplab")
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Pair:
    """One ratio as two runs found it."""

    measurement: str
    ratio: str  # which, such as "bmm-lora / flora, code"
    first: Ratio
    second: Ratio

    @property
    def agree(self) -> bool:
        """Whether the intervals overlap."""
        return self.first.low <= self.second.high and self.second.low <= self.first.high

    @property
    def cover(self) -> bool:
        """Whether each one's median lies in the other's interval."""
        inside = self.second.low <= self.first.median <= self.second.high
        return inside and self.first.low <= self.second.median <= self.first.high


def ratios_of(rows: Sequence[dict]) -> dict[str, Ratio]:
    """All ratios of the JSONL rows of a run, by name: of `compare`'s and the Op lab's."""
    found = {}
    kinds = {row.get("kind") for row in rows} - {None, "all"}
    for row in rows:
        if row.get("kind") == "all" and len(kinds) == 1:
            continue  # the same again
        place = [str(row[key]) for key in ("kind", "layer") if row.get(key)]
        if row.get("rank"):
            place.append(f"rank {row['rank']}")
        for name, key in (("first", "ratio_to_first"), ("base", "ratio_to_base"), ("first", "over_first"), ("base", "over_base")):
            value = row.get(key)
            if value is None:
                continue
            other = row.get("first", "first") if name == "first" else "base"
            ratio = Ratio(**value) if isinstance(value, dict) else Ratio(*value, n=row["rounds"])
            found[f"{row['method']} / {other}, {', '.join(place)}"] = ratio
    return found


def pairs_of(measurement: str, runs: Sequence[dict[str, Ratio]]) -> list[Pair]:
    """The ratios of every two runs, the first with the second, the third with the fourth."""
    pairs = []
    for first, second in zip(runs[::2], runs[1::2], strict=False):
        pairs += [Pair(measurement, name, first[name], second[name]) for name in first if name in second]
    return pairs


def run_once(words: Sequence[str]) -> list[dict]:
    """The rows of one run of `python -m profiling …` in a process of its own. RequestError with its message where it fails."""
    with tempfile.TemporaryDirectory(prefix="flora-live-") as folder:
        file = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "profiling", *words, "--json", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise RequestError(f"a run of {words[0]} took longer than {TIMEOUT_S:g} s: ask for less") from error
        if done.returncode or not file.is_file():
            raise RequestError(f"a run failed: {first_line(done.stderr) or f'{words[0]} ended with {done.returncode}'}")
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def measure(
    measurements: dict[str, Sequence[str]],
    num_pairs: int,
    run: Callable[[Sequence[str]], list[dict]] = run_once,
    told: Callable[[], object] = lambda: None,
) -> list[Pair]:
    """Run every measurement 2 · num_pairs times, all of them in turn. told: called after each run."""
    runs: dict[str, list[dict[str, Ratio]]] = {name: [] for name in measurements}
    for _ in range(2 * num_pairs):
        for name, words in measurements.items():
            runs[name].append(ratios_of(run(words)))
            told()
    return [pair for name in measurements for pair in pairs_of(name, runs[name])]


def table(pairs: Sequence[Pair]) -> str:
    """A line for each ratio: how often two runs agreed about it."""
    lines = []
    for name in dict.fromkeys((pair.measurement, pair.ratio) for pair in pairs):
        own = [pair for pair in pairs if (pair.measurement, pair.ratio) == name]
        medians = [ratio.median for pair in own for ratio in (pair.first, pair.second)]
        widths = [(ratio.high - ratio.low) / ratio.median for pair in own for ratio in (pair.first, pair.second)]
        lines.append(
            [
                *name,
                f"{sum(pair.agree for pair in own)} of {len(own)}",
                f"{sum(pair.cover for pair in own)} of {len(own)}",
                f"{min(medians):.2f}–{max(medians):.2f}",
                f"{100 * sum(widths) / len(widths):.0f} %",
            ]
        )
    heads = ("measurement", "ratio", "overlap", "cover each other", "medians", "width of an interval")
    return text_table(heads, lines)


def run(options: argparse.Namespace) -> int:
    """What `python -m profiling agreement` does. 1 where runs agree less often than is promised. A FloraError for bad input."""
    if options.pairs < 1:
        raise RequestError("--pairs must be at least 1")
    if options.words and options.words[0] not in REPEATABLE:
        raise RequestError(f"runs of {' and '.join(REPEATABLE)} have ratios to compare, not {options.words[0]!r}")
    if "--dry-run" in options.words:
        raise RequestError("leave out --dry-run behind --: it measures nothing that two runs could agree about")
    if "--json" in options.words:
        raise RequestError("leave out --json behind --: what each run finds is read from its rows")
    measurements = {options.words[0]: tuple(options.words)} if options.words else MEASUREMENTS
    facts = hardware.environment()
    print(hardware.summary(facts), end="\n\n", flush=True)
    with tqdm(total=2 * options.pairs * len(measurements), leave=False, disable=None, unit="run") as bar:
        pairs = measure(measurements, options.pairs, told=bar.update)
    if not pairs:
        raise RequestError("no run had a ratio: compare two methods")
    agreeing, covering = sum(pair.agree for pair in pairs), sum(pair.cover for pair in pairs)
    share = agreeing / len(pairs)
    print(table(pairs), end="\n\n")
    print(
        f"two runs' intervals overlap in {agreeing} of {len(pairs)} ({100 * share:.0f} %; {100 * PROMISED:.0f} % is promised); "
        f"each median lies in the other's interval in {covering} of {len(pairs)} ({100 * covering / len(pairs):.0f} %)"
    )
    if options.json:
        shared = {"measures": "agreement", "hardware": facts, "command": report.own_command()}
        rows = [asdict(pair) | {"agree": pair.agree, "cover": pair.cover} | shared for pair in pairs]
        report.write_text(options.json, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return 0 if share >= PROMISED else 1
