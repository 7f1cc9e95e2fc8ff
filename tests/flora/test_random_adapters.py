"""Random adapters: the same ones every time, as strong as they were asked to be, and checkpoints that PEFT loads."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import tiny_models
import torch
from peft import PeftModel

from flora import AdapterError, Engine, Request
from flora.formats import CONFIG_FILE, Adapter, read_adapter
from flora.layers import AdaptedLinear, ServingHolder, inject
from flora.random_adapters import RandomAdapters

CODE_MODEL = Path(__file__).parents[2] / "assets/models/code"
KINDS = ("code", "llama", "speech")
FAMILIES = ("flora", "lora")
METHOD = {"flora": "flora", "lora": "bmm-lora"}


def wide_layers(**widths: tuple[int, int]) -> dict[str, AdaptedLinear]:
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({name: torch.nn.Linear(*sizes) for name, sizes in widths.items()}).requires_grad_(False)
    return inject(net, ServingHolder())


def assert_same(one: Adapter, other: Adapter) -> None:
    assert (one.family, one.factors.keys()) == (other.family, other.factors.keys())
    for layer, pair in one.factors.items():
        for side, other_side in zip(pair, other.factors[layer], strict=True):
            assert side.dtype == torch.float32 and torch.equal(side, other_side), layer


def change(layer: AdaptedLinear, family: str, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """What the adapter adds to the layer's weight, (d_out, d_in)."""
    product = B.double().T @ A.double()
    return layer.weight.double() * (product - 1) if family == "flora" else product


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_depends_on_its_number_and_the_seed_alone(tiny_engines, family):
    layers = tiny_engines["code"].bank.layers
    made = RandomAdapters(layers, family, 3, seed=5)
    ten = made.adapters(10)
    again = RandomAdapters(layers, family, 3, seed=5)
    for number in (9, 0, 4):
        assert_same(again.adapter(number), ten[number])
        assert ten[number].source == again.tag(number)
    firsts = [next(iter(entry.factors.values()))[0] for entry in ten]
    firsts += [next(iter(RandomAdapters(layers, family, 3, seed=seed).adapter(0).factors.values()))[0] for seed in (0, 6, 2**40)]
    assert len({tuple(first.flatten().tolist()) for first in firsts}) == 13, "two of them are the same"
    assert len({made.tag(number) for number in range(20000)}) == 20000


@pytest.mark.parametrize("rank", [1, 2, 7, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_changes_each_weight_by_its_strength(family, rank):
    layers = wide_layers(square=(256, 256), wide=(128, 777), tall=(1024, 100))
    for strength in (0.03, 0.3):
        made = RandomAdapters(layers, family, rank, strength=strength)
        for name, (A, B) in made.adapter(1).factors.items():
            assert A.shape == (rank, layers[name].in_features) and B.shape == (rank, layers[name].out_features)
            weight = layers[name].weight.double()
            relative = (change(layers[name], family, A, B).square().mean() / weight.square().mean()).sqrt().item()
            assert 0.8 * strength < relative < 1.25 * strength, f"{name}: {relative}"


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_has_the_rank_that_it_says(family, rank):
    for A, B in RandomAdapters(wide_layers(layer=(64, 48)), family, rank).adapter(0).factors.values():
        assert torch.linalg.matrix_rank(B.double().T @ A.double()) == rank
        assert len(A) == len(B) == rank


def test_which_layers_are_adapted(tiny_engines):
    layers = tiny_engines["code"].bank.layers
    chosen = {
        None: set(layers),
        ("c_attn",): {name for name in layers if name.endswith(".c_attn")},
        ("mlp.c_proj", "c_attn"): {name for name in layers if name.endswith((".c_attn", ".mlp.c_proj"))},
        (next(iter(layers)),): {next(iter(layers))},
    }
    for targets, expected in chosen.items():
        entry = RandomAdapters(layers, "flora", 1, targets=targets).adapter(0)
        assert expected and list(entry.factors) == [name for name in layers if name in expected]


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_model_has_them_too(family, quantize, tmp_path):
    folder = tiny_models.save_code_model(tmp_path, width=64, inner_width=128)
    engine = Engine.from_pretrained(folder, device="cpu", quantize=quantize)
    engine.bank.add("random", [RandomAdapters(engine.bank.layers, family, 2).adapter(0)])
    requests = [Request("def", adapter=tag, max_new_tokens=4, ignore_eos=True) for tag in (None, "random")]
    without, with_adapter = engine.generate(requests, METHOD[family])
    assert len(with_adapter.token_ids) == 4 and engine.bank.counters()["random"].misses == 1
    assert [completion.adapter for completion in (without, with_adapter)] == [None, "random"]


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_is_made(kind, family, tiny_engines, tmp_path):
    made = RandomAdapters(tiny_engines[kind].bank.layers, family, 3, seed=2)
    written = made.write(tmp_path / "many", 3)
    assert list(written) == [made.tag(number) for number in range(3)]
    for number, folder in enumerate(written.values()):
        assert folder.parent == tmp_path / "many"
        assert_same(read_adapter(folder), made.adapter(number))
    assert made.write(tmp_path / "many", 3) == written, "they cannot be written again"


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
def test_peft_loads_random_lora_and_answers_as_the_engine(kind, checkpoints, tmp_path):
    folder = tiny_models.save_gpt2_model(tmp_path / "gpt2") if kind == "gpt2" else checkpoints[kind].model
    engine = Engine.from_pretrained(folder, device="cpu")
    made = RandomAdapters(engine.bank.layers, "lora", 3, strength=0.5)
    base_model, task_type = f"some/{folder.name}", None if kind == "speech" else "CAUSAL_LM"
    (path,) = made.write(tmp_path, 1, base_model, task_type).values()
    config = json.loads((path / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == base_model and config["fan_in_fan_out"] == (kind == "gpt2")
    engine.add_adapter("random", path)
    plain = tiny_models.load_plain(folder)
    ids = torch.arange(2, 14)[None]
    inputs = {"input_ids": ids}
    if kind == "speech":
        inputs = {"input_features": torch.sin(torch.arange(2000.0)).reshape(1, 20, 100), "decoder_input_ids": ids}
    slot = engine.bank.pin("random", "bmm-lora")
    with torch.no_grad():
        base = plain(**inputs).logits
        theirs = PeftModel.from_pretrained(plain, path).eval()(**inputs).logits
        with engine.bank.serve(engine.bank.arrange([slot], "bmm-lora")):
            ours = engine.model(**inputs).logits
    max_diff, effect = (ours - theirs).abs().max().item(), (theirs - base).abs().max().item()
    assert effect > 0.1, "the adapter changes next to nothing: the test shows nothing"
    assert max_diff < 1e-3 * effect, f"max_diff {max_diff:.3g}, of an effect of {effect:.3g}"


def test_a_folder_that_is_a_file(tiny_engines, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match=r"random-flora-r1-s0-0000 could not be written \(Not a directory\)") as caught:
        RandomAdapters(tiny_engines["code"].bank.layers, "flora", 1).write(tmp_path / "file", 1)
    assert str(tmp_path) not in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- served


@pytest.mark.parametrize("family", FAMILIES)
def test_the_embedded_code_model_still_answers_sensibly_and_for_each_adapter_differently(family):
    """Sensibly: with the adapter, it finds real text little more surprising than without."""
    engine = Engine.from_pretrained(CODE_MODEL, device="cpu")
    made = RandomAdapters(engine.bank.layers, family, 4)
    text = "def total(values):\n    result = 0\n    for value in values:\n        result += value\n    return result\n"
    ids = torch.tensor([engine.tokenizer(text)["input_ids"]])

    def loss(name: str | None) -> tuple[float, torch.Tensor]:
        slot = engine.bank.pin(name, METHOD[family])
        with torch.no_grad(), engine.bank.serve(engine.bank.arrange([slot], METHOD[family])):
            answer = engine.model(input_ids=ids, labels=ids)
        engine.bank.unpin(slot)
        return answer.loss.item(), answer.logits

    base, base_logits = loss(None)
    logits = [base_logits]
    for number in range(4):
        engine.bank.add(made.tag(number), [made.adapter(number)])
        with_adapter, own = loss(made.tag(number))
        assert with_adapter < base + 0.3, f"{made.tag(number)}: {with_adapter:.2f} nats a token, {base:.2f} without"
        for other in logits:
            assert (own - other).abs().max() > 0.1, "two of them answer alike"
        logits.append(own)


def test_they_need_no_disk_to_be_read_again(checkpoints):
    """What was dropped from the device and from host memory is made again, to the last bit."""
    engine = checkpoints["code"].engine()
    made = RandomAdapters(engine.bank.layers, "flora", 2)
    prompts = []
    for number in range(5):
        engine.bank.add(made.tag(number), [made.adapter(number)], reload=lambda number=number: [made.adapter(number)])
        prompts.append(Request("x = [", adapter=made.tag(number), max_new_tokens=6, ignore_eos=True))
    before = [completion.token_ids for completion in engine.generate(prompts)]
    for number in range(5):
        engine.bank._store._drop(engine.bank._adapters[made.tag(number)].stored)
    for seed in range(70):
        engine.bank.add(f"other{seed}", [made.adapter(100 + seed)])
        engine.bank.unpin(engine.bank.pin(f"other{seed}", "flora"))
    assert [completion.token_ids for completion in engine.generate(prompts)] == before
    assert all(engine.bank.counters()[made.tag(number)].loads == 1 for number in range(5))


# ------------------------------------------------------------------------------------------------------------ nonsense


@pytest.mark.parametrize(
    "options, message",
    [
        ({"family": "ia3"}, "family 'ia3' cannot be made: families are flora and lora"),
        ({"rank": 0}, "at least 1, not 0"),
        ({"rank": 2.0}, "whole number of at least 1, not 2.0"),
        ({"strength": 0.0}, "a positive number, not 0.0"),
        ({"strength": float("nan")}, "a positive number, not nan"),
        ({"targets": []}, r"must be a list of names or None for all, not \[\]"),
        ({"targets": "c_attn"}, "must be a list of names or None for all, not 'c_attn'"),
        ({"targets": ["c_attn", "q_proj"]}, "is called 'q_proj'; names end in c_attn, c_fc, c_proj$"),
        ({"targets": ["attn"]}, "is called 'attn'"),
        ({"layers": {}}, "this model has none"),
    ],
    ids=str,
)
def test_nonsense_is_refused(tiny_engines, options, message):
    made = partial(RandomAdapters, **{"layers": tiny_engines["code"].bank.layers, "family": "flora", "rank": 2, **options})
    with pytest.raises(AdapterError, match=message):
        made()
