"""Train an adapter of a base model: python -m flora.finetune code lua --method flora

    recipe = Recipe("code", data="my.jsonl", model="bigcode/starcoderbase-1b", method="flora")
    result = finetune(recipe, output="adapters/mine")          # a PEFT folder with a card
    result.score, result.base_score                            # on what was held out

The base model is frozen, whole or quantised. LoRA and IA3 are PEFT's, fLoRA is `flora.tuner`'s, the loop is transformers' Trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from peft import prepare_model_for_kbit_training

from flora.finetune.adapters import add_adapter, refuse_used_output, round_to_half, whole_or_nothing, write_adapter
from flora.finetune.card import adapter_card
from flora.finetune.recipe import MODELS, Recipe, label, run_identity, short_hash
from flora.finetune.tasks import CLIPS_FOLDER, make_task
from flora.finetune.training import Log, explained_full_disk, run_folder, train
from flora.layers import is_adaptable
from flora.models import LoadedModel, choose_device, load_model
from flora.tuner.quantised import keep_trainable

__all__ = ["Recipe", "Result", "finetune", "load_base"]


@dataclass(frozen=True)
class Result:
    """What came of a run.

    recipe: with every value filled in. score, base_score: metrics on the held-out items, by name. resumed_at: the step that the run
    went on from, 0 if it began.
    """

    recipe: Recipe
    output: Path
    score: dict[str, float]
    base_score: dict[str, float]
    resumed_at: int


def load_base(recipe: Recipe, device: str = "auto") -> LoadedModel:
    """The recipe's frozen base model, ready to be trained on."""
    chosen = choose_device(device)
    on_cpu = chosen.type == "cpu"
    dtype = "bfloat16" if recipe.bfloat16 and not on_cpu else "float32"
    name, threshold = recipe.model or MODELS[recipe.kind], recipe.llm_int8_threshold
    loaded = load_model(name, chosen, dtype, recipe.quantize, llm_int8_threshold=threshold)
    if recipe.quantize is not None:
        for module in loaded.model.modules():
            if is_adaptable(module):
                keep_trainable(module)
        prepare_model_for_kbit_training(loaded.model, gradient_checkpointing_kwargs={"use_reentrant": False})
    elif on_cpu:
        loaded.model.set_attn_implementation("eager")  # on a CPU the fused attention's backward pass is the slower one
    return loaded


def finetune(
    recipe: Recipe,
    output: str | Path,
    *,
    run: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    checkpoint_every: int = 100,
    device: str = "auto",
    json_file: str | Path | None = None,
    clips_folder: str | Path = CLIPS_FOLDER,
    progress: TextIO | None = None,
) -> Result:
    """Train one adapter and write it to `output`, a folder that is empty or does not exist, whole or not at all.

    run: the folder of checkpoints; by default one under runs/ that is this recipe's own. A run that was killed goes on from its
    last one. overwrite: an output that is there may be replaced. restart: begin again. json_file: for the log and the score, as
    JSONL. progress: a stream to show the training on. Raises FloraError, in one sentence, for whatever cannot be done.
    """
    output = Path(output)
    refuse_used_output(output, overwrite)
    loaded = load_base(recipe, device)
    given, recipe = recipe, recipe.for_model(loaded.model)
    task = make_task(recipe, loaded, clips_folder)
    identity = run_identity(recipe, loaded.model, task.fingerprint)
    title = f"{label(recipe)} {recipe.method}"
    folder = Path(run or f"runs/finetune-{recipe.kind}-{label(recipe)}-{recipe.method}-{short_hash(identity)}")
    with explained_full_disk(folder), run_folder(folder, identity, restart):
        log = Log(None if json_file is None else Path(json_file))
        try:
            log.write("recipe", {"recipe": recipe.as_dict()})
            base_score = task.score(loaded.model)
            model = add_adapter(recipe, loaded.model)
            resumed_at = train(model, task, recipe, folder, checkpoint_every, log, title, progress)
            round_to_half(model)
            score = task.score(loaded.model)
            layers = sorted(model.peft_config["default"].target_modules)
            card = adapter_card(given, recipe, task, layers, score, base_score)
            refuse_used_output(output, overwrite)  # it may have been filled in the meantime
            with explained_full_disk(output), whole_or_nothing(output) as partial:
                write_adapter(partial, model, card)
            log.write("score", {"items": task.num_held_out, "score": score, "base_score": base_score, "resumed_at": resumed_at})
        finally:
            log.close()
    return Result(recipe, output, score, base_score, resumed_at)
