"""How the start and the learning rate decide what an adapter becomes: python -m flora.finetune.study speech

Short runs of fLoRA from each start, of LoRA and of IA3, with the same seeds and at as many learning rates on a logarithmic grid,
on languages of the project's corpus. Each run's held-out score becomes a row of JSONL the moment it is there; a study that was cut
off goes on with the runs that are missing. In the end there is a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torch import nn
from tqdm import tqdm

from flora.errors import DataError, DivergenceError, FloraError, TrainingError
from flora.evaluate.report import text_table
from flora.evaluate.rows import versions
from flora.finetune import load_base
from flora.finetune.__main__ import Parser, quiet
from flora.finetune.adapters import add_adapter, remove_adapter, round_to_half
from flora.finetune.recipe import KINDS, Recipe, model_fingerprint
from flora.finetune.tasks import CLIPS_FOLDER, Task, make_task
from flora.finetune.training import train


@dataclass(frozen=True)
class Arm:
    """One way to train. rates: half decades, as many for each arm, around where it is known to learn."""

    method: str
    rates: tuple[float, ...]
    init: str | None = None
    init_std: float | None = None


_MULTIPLICATIVE = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
ARMS = {
    "identity": Arm("flora", _MULTIPLICATIVE, "identity"),
    "noise-0.1": Arm("flora", _MULTIPLICATIVE, "noise", 0.1),
    "noise-0.5": Arm("flora", _MULTIPLICATIVE, "noise", 0.5),
    "ones": Arm("flora", _MULTIPLICATIVE, "ones"),
    "lora": Arm("lora", (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "ia3": Arm("ia3", _MULTIPLICATIVE),
}
"""identity is summed over components; noise and ones are averaged, as the paper's code does."""

LANGUAGES = {"code": ("lua", "rkt"), "speech": ("cs", "hi")}
JUDGED_BY = {"code": ("whole completions right", max), "speech": ("word error rate", min)}
"""Kind → the metric that the table shows, and which of two values is the better one."""

SETTINGS = (
    "task", "language", "arm", "rank", "learning_rate", "steps", "batch_size", "seed", "held_out", "weights", "data", "dtype",
)  # fmt: skip
"""What makes a row the same run, measured before."""

STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
"""The 97.5 % quantile of Student's t for 1, 2, … degrees of freedom."""


# ------------------------------------------------------------------------------------------------------------------- rows


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The rows of a study's file; none where there is no file. A last line that was never finished is cut off.

    TrainingError, with the line's number, for a file that is not a study's.
    """
    if not path.exists():
        return []
    try:
        content = path.read_bytes()
        finished = content[: content.rfind(b"\n") + 1]
        rows = [json.loads(line) for line in finished.decode("utf-8").split("\n") if line]
        missing = next((number for number, row in enumerate(rows, 1) if row.get("kind") != "run" or set(SETTINGS) - set(row)), None)
    except OSError as error:
        raise TrainingError(f"{path.name} cannot be read ({error.strerror}): name another file with --results") from error
    except (ValueError, AttributeError) as error:
        raise TrainingError(f"{path.name} is no study's file: name another with --results") from error
    if missing is not None:
        raise TrainingError(f"{path.name}, line {missing}, is no run of a study: name another file with --results")
    if finished != content:
        os.truncate(path, len(finished))
    return rows


def append_run(path: Path, row: dict[str, Any]) -> None:
    """Add a row in one write, so that two processes may share a file. TrainingError where it cannot be written."""
    line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if os.write(handle, line) != len(line):
                raise OSError(0, "the disk is full")
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise TrainingError(f"{path.name} cannot be written ({error.strerror}): make room, or name another --results") from error


def key_of(row: dict[str, Any]) -> tuple:
    """What makes it the same run, measured before."""
    return tuple(row[name] for name in SETTINGS)


# ------------------------------------------------------------------------------------------------------------------- runs


def study(
    recipes: Iterable[Recipe],
    arms: dict[str, Arm],
    seeds: Sequence[int],
    results: Path,
    clips_folder: str | Path = CLIPS_FOLDER,
    command: str = "",
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Every arm at each of its rates with every seed, language by language: each run's row, and whether it was there before.

    recipes: one per language, all of one kind, with what all arms share: rank, steps, batch size. The base model is loaded once, a
    language's data once. A run whose loss is no number has a row too, without a score.
    """
    done = {key_of(row): row for row in read_runs(results)}
    tried = [(name, arm, rate) for name, arm in arms.items() for rate in arm.rates]
    loaded = None
    for shared in recipes:
        loaded = loaded or load_base(shared, "cpu")
        shared = shared.for_model(loaded.model)
        task = make_task(shared, loaded, clips_folder)
        base_score = None
        for seed, (name, arm, rate) in itertools.product(seeds, tried):
            recipe = replace(
                shared,
                method=arm.method,
                rank=None if arm.method == "ia3" else shared.rank,
                init=arm.init,
                init_std=arm.init_std,
                learning_rate=rate,
                seed=seed,
            )
            row = _settings(recipe, name, task, loaded.model)
            if key_of(row) in done:
                yield done[key_of(row)], True
                continue
            base_score = base_score or task.score(loaded.model)
            score, problem = _run(recipe, task, loaded.model)
            row |= {"score": score, "problem": problem, "base_score": base_score, "versions": versions(), "command": command}
            append_run(results, row)
            yield row, False


def _settings(recipe: Recipe, arm: str, task: Task, base: nn.Module) -> dict[str, Any]:
    """The row of a run before there is a score."""
    given = ("language", "method", "init", "init_std", "rank", "learning_rate", "steps", "batch_size", "seed", "model")
    return {
        "kind": "run",
        "task": recipe.kind,
        "arm": arm,
        **{name: getattr(recipe, name) for name in given},
        "held_out": task.num_held_out,
        "weights": model_fingerprint(base)[:12],
        "data": task.fingerprint[:12],
        "dtype": "bfloat16 autocast" if recipe.bfloat16 else "float32",
    }


def _run(recipe: Recipe, task: Task, base: nn.Module) -> tuple[dict[str, float] | None, str | None]:
    """(score, None) of one adapter on what was held out, or (None, why there is none). The base model is left as it was."""
    model = add_adapter(recipe, base)
    try:
        with tempfile.TemporaryDirectory() as folder:
            train(model, task, recipe, Path(folder), checkpoint_every=None)
        round_to_half(model)
        score = task.score(base)
        if not all(map(math.isfinite, score.values())):
            raise DivergenceError("the adapter's values are too large for float16")
        return score, None
    except DivergenceError as error:
        return None, str(error).partition(":")[0]
    finally:
        remove_adapter(model)


# ------------------------------------------------------------------------------------------------------------------ table


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95 % interval by Student's t; None for a single value."""
    if len(values) < 2:
        return values[0], None
    t = STUDENT_T[len(values) - 2] if len(values) - 2 < len(STUDENT_T) else 1.96
    return fmean(values), t * stdev(values) / math.sqrt(len(values))


def table(kind: str, rows: Sequence[dict[str, Any]]) -> str:
    """Arms × learning rates: the mean over languages and seeds, and its interval over seeds, in per cent; the best rate's marked.

    rows: of one study. A rate of which a run had no score has none itself.
    """
    metric, better = JUDGED_BY[kind]
    rates = sorted({row["learning_rate"] for row in rows})
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    scores: dict[tuple[str, float], dict[int, list[float | None]]] = {}  # (arm, rate) → seed → one value per language
    for row in rows:
        by_seed = scores.setdefault((row["arm"], row["learning_rate"]), {})
        by_seed.setdefault(row["seed"], []).append(row["score"][metric] if row["score"] else None)
    cells = {
        place: None if any(None in values for values in by_seed.values()) else mean_and_half_width([*map(fmean, by_seed.values())])
        for place, by_seed in scores.items()
    }
    lines, at_the_edge = [], []
    for arm in arms:
        tried = [rate for rate in rates if (arm, rate) in cells]
        scored = [rate for rate in tried if cells[arm, rate] is not None]
        best = better(scored, key=lambda rate: cells[arm, rate][0]) if scored else None
        if len(tried) > 1 and best in (tried[0], tried[-1]):
            at_the_edge.append(arm)
        lines.append([arm, *(_cell(cells, arm, rate, rate == best) for rate in rates)])
    languages = list(dict.fromkeys(row["language"] for row in rows))
    first = {row["language"]: row["base_score"][metric] for row in reversed(rows)}
    seeds = len({row["seed"] for row in rows})
    over = "of one seed" if seeds == 1 else f"with its 95 % interval over {seeds} seeds"
    text = f"{metric} in %, mean over {', '.join(languages)}, {over}; "
    text += f"{rows[0]['steps']} steps; base model {100 * fmean(first.values()):.1f}; * best rate of the arm\n\n"
    text += text_table(["arm \\ learning rate", *(f"{rate:g}" for rate in rates)], lines)
    return text + (f"\n\nBest at the edge of its rates, which may not be its best: {', '.join(at_the_edge)}" if at_the_edge else "")


def _cell(cells: dict, arm: str, rate: float, is_best: bool) -> str:
    if (arm, rate) not in cells:
        return ""
    if cells[arm, rate] is None:
        return "diverged "
    mean, half = cells[arm, rate]
    return f"{100 * mean:.1f}" + ("" if half is None else f" ± {100 * half:.1f}") + ("*" if is_best else " ")


# ----------------------------------------------------------------------------------------------------------- command line


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m flora.finetune.study",
        description="Compare the starts of fLoRA with LoRA and IA3, each at several learning rates, on an embedded model.",
        epilog="A study that was cut off goes on with the runs that its file lacks: give the same command again.",
    )
    parser.add_argument("kind", metavar="code|speech")
    parser.add_argument("--languages", nargs="+", metavar="TAG", help="default: lua rkt, or cs hi")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), metavar="ARM", help=f"default: {' '.join(ARMS)}")
    parser.add_argument(
        "--rates", nargs="+", type=float, metavar="RATE", help="learning rates of all arms; default: each one's own"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--steps", type=int, default=150, metavar="N", help="of each run; default: 150")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="default: 16")
    parser.add_argument("--rank", type=int, default=4, metavar="R", help="of fLoRA and LoRA; default: 4")
    parser.add_argument("--held-out", type=int, default=100, metavar="N", help="items to score on; default: 100")
    parser.add_argument("--clips", type=int, default=2000, metavar="N", help="of the spoken corpus, to train on; default: 2000")
    parser.add_argument("--dataset", type=Path, default=CLIPS_FOLDER, metavar="FOLDER", help=f"of clips; default: {CLIPS_FOLDER}")
    parser.add_argument("--model", metavar="MODEL", help="default: the embedded one")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16 where that is safe")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's CPU threads; default: torch's own choice")
    parser.add_argument("--results", type=Path, metavar="FILE", help="default: assets/results/study_KIND.jsonl")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing of a study and print its table; 0 for done, 2 with one line on stderr for bad input, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    options = parser.parse_args(words)
    quiet(options.threads)
    try:
        arms = _arms(options)
        recipes = _recipes(options)
        results = options.results or Path("assets/results") / f"study_{options.kind}.jsonl"
        shown = [Path(word).name if word.startswith("/") else word for word in words]
        command = shlex.join(["python", "-m", "flora.finetune.study", *shown])
        total = len(recipes) * len(options.seeds) * sum(len(arm.rates) for arm in arms.values())
        rows = []
        with tqdm(total=total, unit="run", disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
            for row, was_there in study(recipes, arms, options.seeds, results, options.dataset, command):
                rows.append(row)
                bar.update()
                if not was_there:
                    bar.write(_line(row), file=sys.stderr)
    except FloraError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command goes on with the runs that are missing", file=sys.stderr)
        return 130
    print(table(options.kind, rows))
    return 0


def _arms(options: argparse.Namespace) -> dict[str, Arm]:
    unknown = [name for name in options.arms if name not in ARMS]
    if unknown:
        raise DataError(f"there is no arm {unknown[0]!r}: choose from {', '.join(ARMS)}")
    rates = options.rates and tuple(sorted(set(options.rates)))
    return {name: Arm(arm.method, rates or arm.rates, arm.init, arm.init_std) for name, arm in ARMS.items() if name in options.arms}


def _recipes(options: argparse.Namespace) -> list[Recipe]:
    """What all runs of each language share. The data is the same for every seed, which decides its order."""
    if options.kind not in KINDS:
        raise DataError(f"there is no kind {options.kind!r}: choose one of {', '.join(KINDS)}")
    for rate in options.rates or ():
        Recipe(options.kind, "any", learning_rate=rate)  # refuses what is no rate
    for seed in options.seeds:
        Recipe(options.kind, "any", seed=seed)
    shared = {name: getattr(options, name) for name in ("model", "rank", "steps", "batch_size", "held_out", "clips", "bfloat16")}
    return [Recipe(options.kind, language, **shared) for language in dict.fromkeys(options.languages or LANGUAGES[options.kind])]


def _line(row: dict[str, Any]) -> str:
    metric, _ = JUDGED_BY[row["task"]]
    found = row["problem"] or f"{metric} {100 * row['score'][metric]:.1f} %"
    return f"{row['language']} {row['arm']}, rate {row['learning_rate']:g}, seed {row['seed']}: {found}"


if __name__ == "__main__":
    sys.exit(main())
