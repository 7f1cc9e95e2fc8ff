"""Made-up rows of an evaluation, of the form that `python -m flora.evaluate … --report` writes; for the page that shows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flora.corpus.code import problems, render
from flora.evaluate.rows import METHODS, Answer, Item, Mean, Row, Score, write_rows
from profiling import workload

TAGS = {"code": ("d", "pl", "rb", "rs", "rkt", "swift", "jl", "lua", "r"), "speech": ("ar", "cs", "lt", "mr", "mn", "hi")}
NOT_GRADED = {"swift": "swift is not installed", "jl": "julia is not installed"}
TRUE = {  # the rate that the made-up numbers lie around
    "code": {"base": 0.40, "ia3": 0.62, "lora": 0.80, "flora": 0.79},
    "speech": {"base": 0.62, "ia3": 0.23, "lora": 0.08, "flora": 0.07},
}
ITEMS = 100


def score(task: str, language: str, method: str, adapter: str | None, value: float | None, **other) -> Score:
    """A row with a plausible interval around `value`; None for a language that could not be graded."""
    half = None if value is None else 1.96 * float(np.sqrt(max(value * (1 - min(value, 0.9)), 0.002) / ITEMS))
    facts = {
        "metric": "pass@1" if task == "code" else "WER",
        "value": value,
        "low": None if value is None else max(0.0, value - half),
        "high": None if value is None else (min(1.0, value + half) if task == "code" else value + half),
        "confidence": 0.95,
        "items": 0 if value is None else ITEMS,
        "samples": 1,
        "temperature": 0.0,
        "graded": value is not None,
        "reason": NOT_GRADED.get(language) if value is None else None,
        "model": f"assets/models/{task}",
        "checkpoint": None if adapter is None else f"assets/adapters/{task}/{adapter}/{method}",
        "rank": None if adapter is None else 1 if method == "ia3" else 4,
        "source": "corpus held-out",
        "seed": 1,
        "dtype": "float32",
        "device": "cpu",
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.1.0", "peft": "0.21.0"},
        "command": f"python -m flora.evaluate {task} --report",
    }
    return Score(task, language, method, adapter, **(facts | other))


def scores(task: str) -> list[Score]:
    """Every method on every language, and fLoRA's adapters on each other's languages."""
    random, rows = np.random.default_rng(3), []
    for tag in TAGS[task]:
        shift = random.normal(scale=0.05)
        for method in METHODS:
            rate = abs(TRUE[task][method] + shift * (1 if task == "code" else TRUE[task][method]) + random.normal(scale=0.01))
            value = None if tag in NOT_GRADED else round(min(rate, 0.99) if task == "code" else rate, 4)
            adapter = None if method == "base" else tag
            rows.append(score(task, tag, method, adapter, value))
            if task == "speech":
                rows.append(score(task, tag, method, adapter, round(0.96 * value, 4), metric="WER, normalised"))
        for other in TAGS[task]:
            if other != tag:
                near = 0.22 + 0.25 * random.random() if task == "code" else 0.6 + 0.6 * random.random()
                rows.append(score(task, tag, "flora", other, None if tag in NOT_GRADED else round(near, 4)))
    return rows


def means(task: str) -> list[Mean]:
    """The means of `scores`, and fLoRA's differences: with narrower intervals than the languages' own would give."""
    made = []
    metrics = ("pass@1",) if task == "code" else ("WER", "WER, normalised")
    tags = tuple(tag for tag in TAGS[task] if tag not in NOT_GRADED)
    for metric in metrics:
        rows = [row for row in scores(task) if row.metric == metric and row.adapter in (None, row.language) and row.graded]
        values = {method: sum(row.value for row in rows if row.method == method) / len(tags) for method in METHODS}
        for method, versus in [*((method, None) for method in METHODS), *(("flora", method) for method in METHODS[:-1])]:
            value, half = (values[method], 0.02) if versus is None else (values[method] - values[versus], 0.005)
            facts = {name: getattr(rows[0], name) for name in ("confidence", "model", "source", "seed", "command")}
            ends = {"value": round(value, 6), "low": round(value - half, 6), "high": round(value + half, 6)}
            made.append(Mean(task, method, versus, metric, **ends, languages=tags, items=ITEMS * len(tags), **facts))
    return made


def code_answers(per_language: int = 3) -> list[Row]:
    rows: list[Row] = []
    found = list(zip(range(per_language * 9), problems("held-out", seed=7), strict=False))
    for place, tag in enumerate(TAGS["code"]):
        for number, problem in found[place * per_language : (place + 1) * per_language]:
            program = render(problem, tag)
            name = f"held-out {number}"
            rows.append(Item("code", tag, name, program.prompt, program.completion))
            wrong = program.completion.replace("+", "-").replace("0", "1")
            for method in METHODS:
                good = method in ("lora", "flora") and number % 5
                text = program.completion if good else wrong if method != "base" else "    pass\n" * 2
                outcome = "not graded" if tag in NOT_GRADED else "passed" if good else "timeout" if number % 5 == 0 else "failed"
                passed = None if tag in NOT_GRADED else outcome == "passed"
                adapter = None if method == "base" else tag
                rows.append(Answer("code", tag, name, method, adapter, text, passed, outcome))
    return rows


def speech_answers() -> list[Row]:
    rows: list[Row] = []
    for clip in workload.example_clips():
        if clip["tag"] not in TAGS["speech"]:
            continue
        tag, name, words = clip["tag"], clip["file"].split(".")[0], clip["text"].split()
        rows.append(Item("speech", tag, name, None, clip["text"], f"assets/clips/{clip['file']}"))
        heard = {"base": ["do", words[0], "na"], "ia3": [*words[:-1], "nula"], "lora": words, "flora": words}
        for method in METHODS:
            wer = {"base": 1.0, "ia3": 1 / len(words)}.get(method, 0.0)
            adapter = None if method == "base" else tag
            rows.append(Answer("speech", tag, name, method, adapter, " ".join(heard[method]), wer == 0, wer=wer))
    return rows


def write_results(folder: Path) -> Path:
    """All four files in `folder`."""
    for task, answers in (("code", code_answers()), ("speech", speech_answers())):
        write_rows(folder / f"accuracy_{task}.jsonl", [*scores(task), *means(task)])
        write_rows(folder / f"answers_{task}.jsonl", answers)
    return folder
