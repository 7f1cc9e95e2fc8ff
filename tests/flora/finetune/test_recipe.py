"""What a recipe fills in for a method and a model, and what it refuses."""

from __future__ import annotations

import pytest
from torch import nn

from flora.errors import TrainingError
from flora.finetune.__main__ import make_parser
from flora.finetune.recipe import KINDS, METHODS, Recipe, run_identity, short_hash

NARROW, WIDE = nn.Linear(10, 10), nn.Linear(5000, 5000, device="meta")
PAPER = {
    ("code", "flora"): 8e-3, ("code", "lora"): 1e-4, ("code", "ia3"): 5e-3,
    ("speech", "flora"): 6e-3, ("speech", "lora"): 2e-4, ("speech", "ia3"): 4e-3,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "method"), PAPER)
def test_a_large_model_gets_the_papers_recipe(kind, method):
    recipe = Recipe(kind, "lua", method=method).for_model(WIDE)
    assert recipe.learning_rate == PAPER[kind, method]
    assert (recipe.steps, recipe.batch_size) == {"code": (1500, 8), "speech": (5000, 6)}[kind]
    assert recipe.target_layers == (("default",) if kind == "code" else ("all",))
    assert recipe.rank == (None if method == "ia3" else 4)
    assert recipe.init == ("identity" if method == "flora" else None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_model_learns_faster_on_all_its_layers(kind):
    for method in METHODS:
        recipe = Recipe(kind, "lua", method=method).for_model(NARROW)
        assert recipe.learning_rate > PAPER[kind, method] and recipe.target_layers == ("all",)
        assert recipe.num_examples == recipe.steps * recipe.batch_size


def test_what_was_given_stays():
    given = Recipe("code", "lua", rank=2, steps=7, learning_rate=0.5, target_layers=("c_fc",), warmup=0, batch_size=3, init="ones")
    filled = given.for_model(NARROW)
    for name in ("rank", "steps", "learning_rate", "target_layers", "warmup", "batch_size", "init"):
        assert getattr(filled, name) == getattr(given, name)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("code", "lua"),
        Recipe("speech", "cs", method="ia3", learning_rate=2.5e-3, bfloat16=True, seed=7, clips=30),
        Recipe("code", data="my data.jsonl", model="a/b", quantize="nf4", rank=8, init="noise", init_std=0.5, held_out=5),
        Recipe("speech", "cs", data="clips", target_layers=("q_proj", "fc1"), validation="held out.csv", audio_column="wav"),
    ],
    ids=["corpus", "ia3", "own code", "own speech"],
)
def test_its_arguments_make_the_same_recipe_on_the_command_line(recipe):
    options = vars(make_parser().parse_args(recipe.arguments()))
    options["target_layers"] = options["target_layers"] and tuple(options["target_layers"])
    assert Recipe(**{name: options[name] for name in recipe.as_dict()}) == recipe


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "video"}, "no kind 'video': choose one of code, speech"),
        ({"method": "dora"}, "no method 'dora': choose one of flora, lora, ia3"),
        ({"quantize": "int4"}, "--quantize int4 is unknown"),
        ({"init": "zeros"}, "--init zeros is unknown: choose one of identity, noise, ones"),
        ({"rank": 0}, "--rank must be at least 1, not 0"),
        ({"steps": -1}, "--steps must be at least 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"gradient_accumulation": 0}, "--gradient-accumulation must be at least 1"),
        ({"learning_rate": 0.0}, "--learning-rate must be above 0"),
        ({"learning_rate": float("nan")}, "--learning-rate must be above 0, not nan"),
        ({"init_std": float("inf")}, "--init-std must be above 0"),
        ({"max_length": 4}, "--max-length must be at least 8"),
        ({"warmup": -1}, "--warmup"),
        ({"seed": -1}, "--seed"),
        ({"target_layers": ()}, "--target-layers"),
        ({"method": "lora", "init": "ones"}, "--init is fLoRA's: leave it out with --method lora"),
        ({"method": "ia3", "rank": 4}, "IA3 has no rank"),
        ({"language": None}, "say what to learn from"),
    ],
    ids=str,
)
def test_nonsense_is_refused_by_its_name_on_the_command_line(options, said):
    with pytest.raises(TrainingError) as error:
        Recipe(**{"kind": "code", "language": "lua", **options})
    assert said in str(error.value)


def test_every_setting_makes_another_run():
    first = Recipe("code", "lua").for_model(NARROW)
    others = [Recipe("code", "rb").for_model(NARROW), Recipe("code", "lua", seed=1).for_model(NARROW)]
    identities = [run_identity(recipe, NARROW, "data") for recipe in (first, *others)]
    identities += [run_identity(first, nn.Linear(10, 10), "data"), run_identity(first, NARROW, "other data")]
    assert len({short_hash(identity) for identity in identities}) == 5
    assert short_hash(run_identity(first, NARROW, "data")) == short_hash(identities[0])
