"""Every kind of adapter that PEFT makes, in one batch: logits and greedy tokens are PEFT's own, and those of merged weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import peft
import pytest
import tiny_models
import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from flora import AdapterError, Engine, FloraConfig, Request, ops

NUM_NEW_TOKENS = 6


@dataclass(frozen=True)
class Architecture:
    """A tiny model and the ends of its layers' names. attention, feed_forward: as PEFT's default for IA3 would have them."""

    save: Callable[[Path], Path]
    attention: list[str]
    feed_forward: list[str]


ARCHITECTURES = {
    "code": Architecture(tiny_models.save_code_model, ["c_attn"], ["c_fc", "mlp.c_proj"]),  # fused, multi-query
    "gpt2": Architecture(tiny_models.save_gpt2_model, ["c_attn"], ["c_fc", "mlp.c_proj"]),  # Conv1D
    "llama": Architecture(tiny_models.save_llama_model, ["q_proj", "v_proj"], ["up_proj", "down_proj"]),  # no biases
    "qwen2": Architecture(tiny_models.save_qwen2_model, ["q_proj", "k_proj", "v_proj"], ["gate_proj", "down_proj"]),  # some
    "speech": Architecture(tiny_models.save_speech_model, ["q_proj", "v_proj", "encoder_attn.k_proj"], ["fc1", "fc2"]),
}


def configs(one: Architecture) -> dict[str, PeftConfig]:
    """tag → what PEFT makes: kinds, ranks 1, 3 and 8, with and without bias, on attention, feed-forward or all layers."""
    attention, feed_forward = one.attention, one.feed_forward
    patterns = {"rank_pattern": {feed_forward[0]: 3}, "alpha_pattern": {feed_forward[-1]: 5}}
    hira = {}
    if hasattr(peft, "HiraConfig"):  # since PEFT 0.20
        hira = {
            "hira-1": peft.HiraConfig(r=1, target_modules="all-linear"),
            "hira-3": peft.HiraConfig(r=3, target_modules=feed_forward),
            "hira-8-pattern": peft.HiraConfig(r=8, target_modules=attention + feed_forward, rank_pattern={feed_forward[0]: 2}),
        }
    return hira | {
        "lora-1": LoraConfig(r=1, lora_alpha=2, target_modules="all-linear"),
        "lora-3-rs": LoraConfig(r=3, lora_alpha=4, target_modules=attention, use_rslora=True),
        "lora-8-patterns": LoraConfig(r=8, lora_alpha=8, target_modules=attention + feed_forward, **patterns),
        "lora-3-bias": LoraConfig(r=3, lora_alpha=6, target_modules=attention, lora_bias=True),
        "lora-8-bias": LoraConfig(r=8, lora_alpha=4, target_modules="all-linear", lora_bias=True, use_rslora=True),
        "ia3-outputs": IA3Config(target_modules=attention + feed_forward, feedforward_modules=[]),
        "ia3-both": IA3Config(target_modules=attention + feed_forward, feedforward_modules=feed_forward[-1:]),
        "flora-1": FloraConfig(r=1, target_modules="all-linear"),
        "flora-3-mean": FloraConfig(r=3, target_modules=attention, combine="mean"),
        "flora-8": FloraConfig(r=8, target_modules=attention + feed_forward, rank_pattern={feed_forward[-1]: 1}),
    }


STRENGTH = 0.3


@torch.no_grad()
def made_by_peft(base: nn.Module, config: PeftConfig, seed: int) -> nn.Module:
    """PEFT's model, its adapter filled with random numbers that matter: around one where they multiply, else around zero."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():  # of Conv1D, and of lora_bias on a layer without a bias, which could not be merged
        warnings.simplefilter("ignore")
        model = get_peft_model(deepcopy(base), config).eval()
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "ia3_", "hira_", "flora_")):
            parameter.normal_(0.0, STRENGTH)
            if "ia3_" in name:
                parameter.add_(1.0)
            elif "flora_" in name:
                parameter[0].add_(1.0)
                if config.combine == "mean":
                    parameter.add_(0.7)
    return model


def save(model: nn.Module, folder: Path) -> None:
    with warnings.catch_warnings():  # PEFT takes the bias of lora_bias for a matrix that was cut
        warnings.filterwarnings("ignore", message=".*invalid shape")
        model.save_pretrained(folder)


@dataclass
class Truth:
    """What PEFT and plain transformers say of one request."""

    base: Tensor  # without the adapter, as `logits`
    logits: Tensor  # (NUM_NEW_TOKENS, vocabulary) each token was chosen from, given those before it
    merged: Tensor | None  # the same after `merge_and_unload`, None where PEFT cannot merge
    half: Tensor  # the same as `logits`, with the model and the adapter in bfloat16


@dataclass
class Served:
    """One architecture with all its adapters, what the engine answered in one batch, and what PEFT says of that."""

    engine: Engine
    folder: Path
    sources: dict[str, Path]
    requests: list[Request]
    token_ids: list[list[int]]
    truths: list[Truth] = field(default_factory=list)

    def logits(self, engine: Engine, method: str, places: list[int]) -> list[Tensor]:
        """The engine's own, of these requests in one batch, as `Truth.logits`."""
        slots = [engine.bank.pin_now(self.requests[place].adapter, method) for place in places]
        try:
            encoded = [engine.runner.encode(self.requests[place]) for place in places]
            with torch.inference_mode():
                ids = [self.token_ids[place] for place in places]
                return [row.float() for row in engine.runner.score(encoded, ids, engine.bank.arrange(slots, method))]
        finally:
            for slot in slots:
                engine.bank.unpin(slot)


@torch.no_grad()
def plain_logits(model: nn.Module, inputs: dict, num_prompt_tokens: int) -> Tensor:
    return model(**inputs).logits[0, num_prompt_tokens - 1 :].float()


def compute_truth(base: nn.Module, config: PeftConfig, seed: int, inputs: dict, num_prompt_tokens: int) -> Truth:
    model = made_by_peft(base, config, seed)
    bare = plain_logits(base, inputs, num_prompt_tokens)
    logits = plain_logits(model, inputs, num_prompt_tokens)
    half_inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    half = plain_logits(deepcopy(model).bfloat16(), half_inputs, num_prompt_tokens)
    biased = [module for module in model.modules() if any(getattr(module, "lora_bias", {}).values())]
    if any(module.get_base_layer().bias is None for module in biased):
        return Truth(bare, logits, None, half)
    return Truth(bare, logits, plain_logits(model.merge_and_unload(), inputs, num_prompt_tokens), half)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(request, tmp_path_factory, clips) -> Served:
    name, one = request.param, ARCHITECTURES[request.param]
    root = tmp_path_factory.mktemp(f"kinds-{name}")
    folder = one.save(root / name)
    base = tiny_models.load_plain(folder)
    sources = {}
    for seed, (tag, config) in enumerate(configs(one).items()):
        sources[tag] = root / "adapters" / tag
        save(made_by_peft(base, config, seed), sources[tag])
    engine = Engine.from_pretrained(folder, sources, device="cpu")
    asked = partial(Request, max_new_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    if name == "speech":
        requests = [asked(audio=clips[place % 4], sampling_rate=16000, adapter=tag) for place, tag in enumerate(sources)]
    else:
        requests = [asked(prompt="def f(x):\n"[: 3 + place % 7], adapter=tag) for place, tag in enumerate(sources)]
    answers = [completion.token_ids for completion in engine.generate(requests, "mixed")]
    made = Served(engine, folder, sources, requests, answers)
    for seed, (one_request, ids, config) in enumerate(zip(requests, answers, configs(one).values(), strict=True)):
        if name == "speech":
            features = engine.processor(one_request.audio, sampling_rate=16000, return_tensors="pt").input_features
            start = [base.generation_config.decoder_start_token_id]
            inputs = {"input_features": features, "decoder_input_ids": torch.tensor([start + ids[:-1]])}
        else:
            start = engine.tokenizer(one_request.prompt)["input_ids"]
            inputs = {"input_ids": torch.tensor([start + ids[:-1]])}
        made.truths.append(compute_truth(base, config, seed, inputs, len(start)))
    return made


def test_greedy_tokens_are_peft_s(served):
    """Each token is what PEFT chooses after the ones before it: all of them together are PEFT's greedy answer."""
    for request, ids, truth in zip(served.requests, served.token_ids, served.truths, strict=True):
        assert ids == truth.logits.argmax(-1).tolist(), request.adapter
    assert len({tuple(ids) for ids in served.token_ids}) > len(served.token_ids) // 2, "adapters that leave the answer as it is"


def test_logits_are_peft_s_and_those_of_merged_weights(served):
    logits = served.logits(served.engine, "mixed", list(range(len(served.requests))))
    for request, own, truth in zip(served.requests, logits, served.truths, strict=True):
        scale = truth.logits.abs().max().item()
        assert (truth.logits - truth.base).abs().max() > 0.03 * scale, f"{request.adapter} changes next to nothing"
        max_diff = (own - truth.logits).abs().max().item()
        assert max_diff < 2e-5 * scale, f"{request.adapter}: max_diff {max_diff:.3g} of {scale:.3g}"
        if truth.merged is not None:
            max_diff = (own - truth.merged).abs().max().item()
            assert max_diff < 2e-5 * scale, f"{request.adapter}: max_diff {max_diff:.3g} of {scale:.3g} to merged weights"
    unmergeable = {request.adapter for request, truth in zip(served.requests, served.truths, strict=True) if truth.merged is None}
    assert unmergeable <= {"lora-3-bias", "lora-8-bias"}


@pytest.mark.parametrize("method", ["flora", "flora-modulate", "bmm-lora", "loop-lora"])
def test_the_methods_of_one_family_give_the_same(served, method):
    families = [served.engine.adapters[request.adapter].families for request in served.requests]
    places = [place for place, own in enumerate(families) if own == (ops.FAMILY[method],)]
    assert len(places) > 4
    for place, own in zip(places, served.logits(served.engine, method, places), strict=True):
        truth = served.truths[place].logits
        max_diff = (own - truth).abs().max().item()
        assert max_diff < 2e-5 * truth.abs().max(), f"{served.requests[place].adapter}: max_diff {max_diff:.3g}"


def test_merged_weights_of_the_engine_give_the_same(served):
    """Biases too: IA3's scaled ones and those that a LoRA adds, on layers with a bias and without."""
    for place, (request, truth) in enumerate(zip(served.requests, served.truths, strict=True)):
        (own,) = served.logits(served.engine, "merged", [place])
        max_diff = (own - truth.logits).abs().max().item()
        assert max_diff < 2e-5 * truth.logits.abs().max(), f"{request.adapter}: max_diff {max_diff:.3g}"


def test_in_bfloat16_no_less_exact_than_peft(served):
    """Both round: what counts is how far each is from the logits in float32, over all adapters."""
    engine = Engine.from_pretrained(served.folder, served.sources, device="cpu", dtype="bfloat16")
    logits = served.logits(engine, "mixed", list(range(len(served.requests))))
    own = np.array([(row - truth.logits).abs().max().item() for row, truth in zip(logits, served.truths, strict=True)])
    peft = np.array([(truth.half - truth.logits).abs().max().item() for truth in served.truths])
    scale = max(truth.logits.abs().max().item() for truth in served.truths)
    assert own.max() < 0.1 * scale, f"max_diff {own.max():.3g} of {scale:.3g}"
    assert np.median(own / peft) < 1.25, f"max_diff {own.round(3)}, PEFT's {peft.round(3)}"
    assert peft.min() > 0, "PEFT did not round: the test shows nothing"


def test_in_float16_it_rounds_no_more_than_its_dtype(served):
    engine = Engine.from_pretrained(served.folder, served.sources, device="cpu", dtype="float16")
    logits = served.logits(engine, "mixed", list(range(len(served.requests))))
    for request, own, truth in zip(served.requests, logits, served.truths, strict=True):
        max_diff, scale = (own - truth.logits).abs().max().item(), truth.logits.abs().max().item()
        assert 0 < max_diff < 0.02 * scale, f"{request.adapter}: max_diff {max_diff:.3g} of {scale:.3g}"


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_quantised_model_serves_them_together_as_one_by_one(quantize, tmp_path):
    """Its layers can only be asked for their product; in int8 what they round depends on the whole batch."""
    folder = tiny_models.save_code_model(tmp_path / "code", width=64, inner_width=128)
    base, made = tiny_models.load_plain(folder), configs(ARCHITECTURES["code"])
    tags = ["flora-8", "lora-8-bias", "ia3-both", "lora-3-rs", "flora-3-mean"]
    for seed, tag in enumerate(tags):
        save(made_by_peft(base, made[tag], seed), tmp_path / tag)
    engine = Engine.from_pretrained(folder, {tag: tmp_path / tag for tag in tags}, device="cpu", quantize=quantize)
    requests = [Request(prompt="def f(x):", adapter=tag, max_new_tokens=4) for tag in [*tags, None]]
    batch = Served(engine, folder, {}, requests, [[3, 1, 4, 1]] * len(requests))
    together = batch.logits(engine, "mixed", list(range(len(requests))))
    for place, own in enumerate(together):
        (alone,) = batch.logits(engine, "mixed", [place])
        max_diff, scale = (own - alone).abs().max().item(), alone.abs().max().item()
        assert max_diff < (0.05 if quantize == "int8" else 1e-4) * scale, f"{requests[place].adapter}: max_diff {max_diff:.3g}"
    assert (together[0] - together[-1]).abs().max() > 0.3 * scale, "the adapters change next to nothing: the test shows nothing"
    with pytest.raises(AdapterError, match="is quantised .*mixed or base"):
        engine.generate(requests, "merged")
