"""The adapter's README: what it is, how it was made, and what it scores beside its base model."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import version
from pathlib import Path

from flora.finetune.recipe import MODELS, Recipe
from flora.finetune.tasks import Task
from flora.models import KNOWN_MODELS

NAMES = {"flora": "fLoRA", "lora": "LoRA", "ia3": "IA3"}
SHOWN = {
    "loss": "loss, nats per token",
    "next tokens right": "next tokens right, given the true ones before",
    "whole completions right": "whole completions right, token by token",
    "word error rate": "word error rate of greedy transcripts",
}
"""Metric → its line on the card. Shares are shown in per cent, the loss as it is."""

STARTS = {
    "identity": "from the base model exactly: component 1 all ones, B of the others zero; components are summed",
    "noise": "from ones with noise; components are averaged",
    "ones": "from ones, as the paper's code: every component stays the same; components are averaged",
}


def command(recipe: Recipe) -> str:
    """The line that trains the same adapter again, without the folders of this machine."""
    words = recipe.arguments()
    for index, word in enumerate(words):
        if word.startswith("/"):
            words[index] = Path(word).name
    return shlex.join(["python", "-m", "flora.finetune", *words])


def adapter_card(
    given: Recipe, recipe: Recipe, task: Task, layers: list[str], score: dict[str, float], base_score: dict[str, float]
) -> str:
    """The card. given: the recipe as it was asked for; recipe: with every value filled in. layers: names of the adapted ones."""
    name = NAMES[recipe.method]
    rank = "" if recipe.rank is None else f" of rank {recipe.rank}"
    learnt = f": {task.language}" if task.language else ""
    licence = "license: apache-2.0\n" if recipe.data is None and recipe.model == MODELS[recipe.kind] else ""
    computed = ", computed in bfloat16" if recipe.bfloat16 else ""
    base = "" if recipe.quantize is None else f" in {recipe.quantize}"
    accumulated = "" if recipe.gradient_accumulation == 1 else f" × {recipe.gradient_accumulation}"
    start = f"\nThe factors start {STARTS[recipe.init]}." if recipe.method == "flora" else ""
    base_model = Path(recipe.model).name if Path(recipe.model).is_absolute() else KNOWN_MODELS.get(recipe.model, recipe.model)
    rows = "\n".join(
        f"| {SHOWN[metric]} | {_shown(metric, base_score[metric])} | {_shown(metric, value)} |" for metric, value in score.items()
    )
    unfit = [f"{tally.name}: {len(tally.bad)} of {tally.read} rows were unfit and left out." for tally in task.tallies if tally.bad]
    notes = "".join(f"\n{note}" for note in [*unfit, *task.notes])
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "peft"))
    return f"""---
{licence}library_name: peft
base_model: {json.dumps(base_model, ensure_ascii=False)}
tags: [{recipe.method}]
---
# {name} adapter{learnt}

{name}{rank} on `{base_model}`{base}, on the layers {", ".join(f"`{layer}`" for layer in layers)}.{start}

## Score

{task.num_held_out} items that training never saw. The adapter's values are rounded to float16, as they are saved.

| | base model | with this adapter |
|---|---|---|
{rows}

## Recipe

    {command(given)}

Trained on {task.source}: {recipe.steps} steps of {recipe.batch_size}{accumulated} examples, AdamW, learning rate
{recipe.learning_rate:g} after {recipe.warmup} steps of warm-up, falling as a cosine, seed {recipe.seed}{computed}.{notes}
Made with {versions}.
"""


def _shown(metric: str, value: float) -> str:
    return f"{value:.3f}" if metric == "loss" else f"{100 * value:.1f} %"
