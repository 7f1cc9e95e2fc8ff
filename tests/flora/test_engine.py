"""A batch's tokens are those of each request alone, its adapter merged into the weights of a plain transformers model."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import pytest
import tiny_models
import torch
from tiny_bank import pinned_batch
from transformers import AutoTokenizer, WhisperProcessor

from flora import Engine, Request, ops
from flora.errors import AdapterError, RequestError, UnknownAdapterError

ARCHITECTURES = ("code", "llama", "qwen2", "speech")
FLORA_METHODS = ("flora", "flora-expand", "flora-modulate")
LORA_METHODS = ("bmm-lora", "loop-lora", "sgmv-lora")

# Prompts of different lengths, or clips; both kinds of adapter at ranks 1, 3 and 8 and none; different numbers of new tokens.
PROMPTS = (
    "def total(xs):",
    "x",
    "for i in range(",
    "-- lua\nlocal",
    "def total(xs):",
    "a prompt longer than all of the others, ",
    "return",
)
TAGS = ("aa", None, "cc", "bb", "cc", "aa", "bb")
LENGTHS = (9, 14, 20, 6, 12, 17, 1)


@pytest.fixture(scope="module")
def requests_of(clips):
    """architecture → its batch of seven."""

    def make(name: str, **options) -> list[Request]:
        inputs = [{"audio": clips[place % 4]} for place in range(7)] if name == "speech" else [{"prompt": text} for text in PROMPTS]
        return [
            Request(**what, adapter=tag, max_new_tokens=length, **options)
            for what, tag, length in zip(inputs, TAGS, LENGTHS, strict=True)
        ]

    return make


@pytest.fixture(scope="module")
def alone(checkpoints):
    """(architecture, request, family or None) → the new tokens that transformers' own `generate` gives, without the stop token."""
    processors = {
        name: (WhisperProcessor if name == "speech" else AutoTokenizer).from_pretrained(checkpoints[name].model)
        for name in ARCHITECTURES
    }

    @cache
    def merged(name: str, tag: str | None, family: str | None) -> torch.nn.Module:
        made = checkpoints[name]
        return tiny_models.load_merged(made.model, made.adapters[tag][family] if tag and family else None)

    known: dict[tuple, list[int]] = {}

    def generate(name: str, request: Request, family: str | None) -> list[int]:
        family = family if request.adapter else None
        what = request.prompt if request.audio is None else id(request.audio)  # the session's clips: they outlive this
        key = (name, what, request.adapter, family, request.max_new_tokens)
        if key not in known:
            known[key] = compute(name, request, family)
        return known[key]

    def compute(name: str, request: Request, family: str | None) -> list[int]:
        model = merged(name, request.adapter, family)
        options = {"max_new_tokens": request.max_new_tokens, "do_sample": False}
        if name == "speech":
            features = processors[name](request.audio, sampling_rate=16000, return_tensors="pt").input_features
            tokens = model.generate(features, **options)[0].tolist()
            start = model.generation_config.decoder_start_token_id
            tokens = tokens[1:] if tokens[0] == start else tokens
        else:
            ids = processors[name](request.prompt, return_tensors="pt").input_ids
            tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
        stop = model.generation_config.eos_token_id
        return tokens[: tokens.index(stop)] if stop in tokens else tokens

    return generate


def token_ids(engine: Engine, requests: list[Request], method: str, **options) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(requests, method, **options)]


@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_are_those_of_each_request_alone_with_merged_weights(name, method, tiny_engines, requests_of, alone):
    family = "flora" if method in ("merged", "mixed") else ops.FAMILY[method]
    requests = requests_of(name)
    expected = [alone(name, request, family) for request in requests]
    assert token_ids(tiny_engines[name], requests, method) == expected
    if family:  # every adapter must matter, or the test shows nothing
        for request, tokens in zip(requests, expected, strict=True):
            if request.adapter is not None:
                assert tokens != alone(name, request, None), f"adapter {request.adapter} leaves the answer as it is"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_serves_lora_where_a_tag_has_no_flora(name, checkpoints, requests_of, alone):
    made = checkpoints[name]
    engine = Engine.from_pretrained(made.model, {tag: families["lora"] for tag, families in made.adapters.items()}, device="cpu")
    requests = requests_of(name)
    assert token_ids(engine, requests, "merged") == [alone(name, request, "lora") for request in requests]


def test_an_architecture_of_conv1d_layers(tmp_path):
    """GPT-2, whose layers hold their matrices transposed and whose attention is one fused layer."""
    made = tiny_models.save_gpt2_model(tmp_path / "gpt2")
    plain = tiny_models.load_plain(made)
    layers = tiny_models.CODE_LAYERS
    sources = {
        tag: [
            tiny_models.save_flora_adapter(tmp_path / tag / "flora", plain, layers, rank, seed),
            tiny_models.save_peft_lora(tmp_path / tag / "lora", made, layers, rank, seed, fan_in_fan_out=True),
        ]
        for seed, (tag, rank) in enumerate({"aa": 1, "bb": 4}.items())
    }
    engine = Engine.from_pretrained(made, sources, device="cpu")
    requests = [Request("def f(", adapter=tag, max_new_tokens=10, ignore_eos=True) for tag in ("aa", "bb", None)]
    for place, family, methods in ((0, "flora", FLORA_METHODS), (1, "lora", LORA_METHODS)):
        expected = []
        for request in requests:
            folder = None if request.adapter is None else sources[request.adapter][place]
            ids = engine.tokenizer(request.prompt, return_tensors="pt").input_ids
            model = tiny_models.load_merged(made, folder)
            model.generation_config.eos_token_id = None
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, pad_token_id=0)
            expected.append(out[0, ids.shape[1] :].tolist())
        assert expected[0] != expected[1] != expected[2]
        for method in methods:
            assert token_ids(engine, requests, method) == expected, f"{family}, {method}"


# ------------------------------------------------------------------------------------------- no row knows its neighbours


@pytest.mark.parametrize(
    ("name", "method"),
    [("code", method) for method in ("flora", "flora-modulate", "bmm-lora", "loop-lora", "merged")]
    + [(name, method) for name in ("llama", "qwen2", "speech") for method in ("flora", "bmm-lora")],
)
def test_an_answer_does_not_depend_on_who_else_is_in_the_batch(name, method, tiny_engines, requests_of):
    engine, requests = tiny_engines[name], requests_of(name)
    together = token_ids(engine, requests, method)
    choose = random.Random(f"{name} {method}")
    for size in (1, 3, 7):
        rows = choose.sample(range(len(requests)), size)
        assert token_ids(engine, [requests[row] for row in rows], method) == [together[row] for row in rows], f"rows {rows}"


@pytest.mark.parametrize(("name", "method"), [("code", "flora"), ("code", "bmm-lora"), ("code", "merged"), ("speech", "flora")])
def test_nor_does_a_sampled_answer_at_its_place(name, method, tiny_engines, requests_of):
    engine = tiny_engines[name]
    hot = requests_of(name, temperature=1.5, ignore_eos=True)
    sampled = token_ids(engine, hot, method, seed=5)
    for row in (1, 4, 6):
        others = [hot[row] if place == row else other for place, other in enumerate(reversed(requests_of(name)))]
        assert token_ids(engine, others, method, seed=5)[row] == sampled[row]
    assert token_ids(engine, hot, method, seed=5) == sampled, "the same seed gives other tokens"
    assert token_ids(engine, hot, method, seed=6) != sampled, "another seed gives the same tokens"
    assert token_ids(engine, requests_of(name, ignore_eos=True), method) != sampled, "a temperature changes nothing"
    twins = token_ids(engine, [hot[2], hot[2]], method, seed=5)
    assert twins[0] != twins[1], "two samples of one request are the same"


def test_sampling_follows_the_models_probabilities(tiny_engines):
    """1,200 first tokens at temperature 0.7 against the softmax of the model's own logits."""
    engine, temperature = tiny_engines["code"], 0.7
    requests = [Request("x = ", adapter="bb", max_new_tokens=1, temperature=temperature, ignore_eos=True)] * 30
    counts = torch.zeros(257)
    for seed in range(40):
        for (token,) in token_ids(engine, requests, "flora", seed=seed):
            counts[token] += 1
    with pinned_batch(engine.bank, ["bb"], "flora") as batch, engine.bank.serve(batch), torch.no_grad():
        logits = engine.model(engine.tokenizer("x = ", return_tensors="pt").input_ids).logits[0, -1]
    probabilities = torch.softmax(logits / temperature, -1)
    distance = 0.5 * (counts / counts.sum() - probabilities).abs().sum().item()  # total variation
    untempered = 0.5 * (counts / counts.sum() - torch.softmax(logits, -1)).abs().sum().item()
    assert distance < 0.1 < untempered, f"total variation {distance:.3f}, at temperature 1 it would be {untempered:.3f}"


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 5e-324])
def test_a_temperature_near_0_is_greedy(temperature, tiny_engines, requests_of):
    engine = tiny_engines["code"]
    greedy = token_ids(engine, requests_of("code"), "flora")
    assert token_ids(engine, requests_of("code", temperature=temperature), "flora") == greedy


@pytest.mark.parametrize("max_batch_size", [1, 2, 5])
def test_more_requests_than_fit_a_batch_are_served_in_turn(max_batch_size, checkpoints, tiny_engines, requests_of):
    engine = checkpoints["code"].engine(max_batch_size=max_batch_size)
    requests = requests_of("code", temperature=0.9)[:3] + requests_of("code")[3:]
    assert token_ids(engine, requests, "flora", seed=3) == token_ids(tiny_engines["code"], requests, "flora", seed=3)
    with pytest.raises(RequestError, match=f"the batch has 7 requests and this engine takes {max_batch_size} at once"):
        engine.start(requests)


def test_any_whole_number_is_a_seed(tiny_engines):
    request = [Request("x", max_new_tokens=3, temperature=1.0)]
    answers = [token_ids(tiny_engines["code"], request, "flora", seed=seed) for seed in (0, -1, 2**40, 2**63, 10**30)]
    assert len({str(answer) for answer in answers}) == len(answers)


def test_threads_generate_at_once(tiny_engines, requests_of):
    """Four threads, each with its own batches and methods, on one engine."""
    engine, requests = tiny_engines["code"], requests_of("code")
    methods = ("flora", "bmm-lora", "merged", "flora-modulate")
    expected = {method: token_ids(engine, requests, method) for method in methods}
    start = threading.Barrier(len(methods))

    def work(method: str) -> list[bool]:
        start.wait()
        order = random.Random(method)
        right = []
        for _ in range(4):
            rows = order.sample(range(len(requests)), 4)
            answer = token_ids(engine, [requests[row] for row in rows], method)
            right.append(answer == [expected[method][row] for row in rows])
        return right

    with ThreadPoolExecutor(len(methods)) as pool:
        results = dict(zip(methods, pool.map(work, methods), strict=True))
    assert all(all(right) for right in results.values()), results
    assert not engine.bank._users


# ------------------------------------------------------------------------------------------------- where an answer ends


def test_the_stop_token_ends_an_answer_and_is_left_out(checkpoints, tmp_path):
    """Any of several stop tokens, as generation_config.json names them, where transformers stops too."""
    probe = checkpoints["code"].engine("cc")
    request = Request("for i in range(", adapter="cc", max_new_tokens=20, ignore_eos=True)
    (free,) = token_ids(probe, [request], "flora")
    at = next(place for place in range(4, 20) if free[place] not in free[:place])  # a token that comes here for the first time
    folder = tiny_models.copy_with_generation_options(checkpoints["code"].model, tmp_path / "code", eos_token_id=[0, free[at]])
    engine = Engine.from_pretrained(folder, checkpoints["code"].sources("cc"), device="cpu")
    go_on, stop = engine.generate([request, Request("for i in range(", adapter="cc", max_new_tokens=20)])
    assert (stop.token_ids, stop.finish_reason) == (free[:at], "stop")
    assert (go_on.token_ids, go_on.finish_reason) == (free, "length")
    assert stop.text == engine.tokenizer.decode(free[:at], skip_special_tokens=True)
    merged = tiny_models.load_merged(folder, checkpoints["code"].adapters["cc"]["flora"])
    ids = engine.tokenizer(request.prompt, return_tensors="pt").input_ids
    theirs = merged.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert theirs[0, ids.shape[1] :].tolist() == [*free[:at], free[at]]


@pytest.mark.parametrize("method", ["flora", "merged"])
def test_every_request_ends_at_its_own_length(method, tiny_engines, requests_of):
    completions = tiny_engines["code"].generate(requests_of("code", ignore_eos=True), method)
    assert [len(completion.token_ids) for completion in completions] == list(LENGTHS)
    assert {completion.finish_reason for completion in completions} == {"length"}
    assert [completion.adapter for completion in completions] == list(TAGS)


@pytest.mark.parametrize("name", ["code", "llama"])
def test_a_full_context_ends_an_answer(name, tiny_engines, alone):
    """The context holds 96 tokens, one per byte: the answer takes what the prompt leaves, and others go on."""
    engine = tiny_engines[name]
    assert engine.context_length == 96
    requests = [
        Request("x" * length, adapter=tag, max_new_tokens=wanted, ignore_eos=True)
        for length, tag, wanted in ((95, "aa", 5), (90, None, 500), (2, "cc", 20), (50, "bb", 46))
    ]
    completions = engine.generate(requests)
    assert [len(completion.token_ids) for completion in completions] == [1, 6, 20, 46]
    assert {completion.finish_reason for completion in completions} == {"length"}
    expected = alone(name, Request("x" * 90, max_new_tokens=6), None)
    assert completions[1].token_ids[: len(expected)] == expected


def test_a_full_context_ends_a_transcript(tiny_engines, clips):
    (completion,) = tiny_engines["speech"].generate([Request(audio=clips[0], adapter="aa", max_new_tokens=500, ignore_eos=True)])
    assert tiny_engines["speech"].context_length == 40
    assert (len(completion.token_ids), completion.finish_reason) == (39, "length")  # behind one start token


# ---------------------------------------------------------------------------------------------------------- verification


@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize("name", ["code", "speech"])
def test_verify_agrees_with_every_method(name, method, tiny_engines, requests_of):
    engine, requests = tiny_engines[name], requests_of(name, ignore_eos=True)
    generation = engine.start(requests, method)
    while not generation.done:
        generation.step()
    tokens = [completion.token_ids for completion in generation.completions]
    agreement = engine.verify(requests, tokens, method, generation.chosen_logits)
    assert agreement.agrees and agreement.tokens == agreement.agreeing == sum(LENGTHS)
    assert agreement.max_logit_difference < 1e-3, f"max_diff {agreement.max_logit_difference:.3g}"
    without = engine.verify(requests, tokens, method)
    assert without.agrees and without.max_logit_difference is None
    assert not engine.bank._users


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_verify_of_sampled_tokens(name, tiny_engines, requests_of):
    """They need not be the best ones, but each must have been chosen by the reference's own logit."""
    engine, requests = tiny_engines[name], requests_of(name, ignore_eos=True, temperature=1.5)
    generation = engine.start(requests, "flora", seed=1)
    while not generation.done:
        generation.step()
    tokens, logits = [completion.token_ids for completion in generation.completions], generation.chosen_logits
    assert engine.verify(requests, tokens, "flora", logits).agrees
    wrong = [[value + 0.01 for value in row] for row in logits]
    assert engine.verify(requests, tokens, "flora", wrong).agreeing == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_verify_disagrees_with_tampered_tokens(name, tiny_engines, requests_of):
    engine, requests = tiny_engines[name], requests_of(name, ignore_eos=True)
    tokens = token_ids(engine, requests, "flora")
    tampered = [list(row) for row in tokens]
    tampered[2][7] = (tampered[2][7] + 1) % 257
    agreement = engine.verify(requests, tampered, "flora")
    assert not agreement.agrees and agreement.tokens - agreement.agreeing >= 1


@pytest.mark.parametrize("wrong", ["another adapter", "no adapter", "the other family"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_verify_disagrees_with_the_wrong_adapter(name, wrong, tiny_engines, requests_of):
    engine, requests = tiny_engines[name], requests_of(name, ignore_eos=True)
    swapped = {"aa": "cc", "cc": "bb", "bb": "aa", None: "aa"} if wrong == "another adapter" else dict.fromkeys((*TAGS, None))
    served = [
        Request(
            request.prompt, request.audio, adapter=swapped[request.adapter], max_new_tokens=request.max_new_tokens, ignore_eos=True
        )
        for request in requests
    ]
    tokens = token_ids(engine, requests, "bmm-lora") if wrong == "the other family" else token_ids(engine, served, "flora")
    agreement = engine.verify(requests, tokens, "flora")
    assert agreement.agreeing < 0.7 * agreement.tokens, agreement


def test_verify_of_base_takes_the_base_model_as_reference(tiny_engines, requests_of):
    engine, requests = tiny_engines["code"], requests_of("code", ignore_eos=True)
    assert engine.verify(requests, token_ids(engine, requests, "base"), "base").agrees
    assert not engine.verify(requests, token_ids(engine, requests, "flora"), "base").agrees


@pytest.mark.parametrize("method", ["flora", "flora-modulate", "bmm-lora"])
@pytest.mark.parametrize("name", ["code", "speech"])
def test_half_precision(name, method, checkpoints, requests_of):
    """bfloat16 rounds, so tokens may differ from the reference where two are close; its own logits say how close."""
    engine = checkpoints[name].engine(dtype="bfloat16")
    assert engine.dtype == torch.bfloat16
    requests = requests_of(name, ignore_eos=True)
    generation = engine.start(requests, method)
    while not generation.done:
        generation.step()
    tokens = [completion.token_ids for completion in generation.completions]
    agreement = engine.verify(requests, tokens, method, generation.chosen_logits)
    assert agreement.agreeing >= 0.9 * agreement.tokens, agreement


# --------------------------------------------------------------------------------------------------------------- adapters


def test_adapters_come_and_go_by_name(checkpoints, requests_of, alone):
    made = checkpoints["code"]
    engine = made.engine("aa")
    request = requests_of("code")[2]
    with pytest.raises(UnknownAdapterError, match="'cc'; loaded: aa"):
        engine.generate([request])
    info = engine.add_adapter("cc", made.adapters["cc"]["flora"])
    assert (info.name, info.families, info.ranks) == ("cc", ("flora",), {"flora": 8})
    assert engine.adapters.keys() == {"aa", "cc"} and engine.adapters["cc"] == info
    assert token_ids(engine, [request], "flora") == [alone("code", request, "flora")]
    with pytest.raises(AdapterError, match="'cc' has no lora checkpoint.*: aa"):
        engine.generate([request], "bmm-lora")
    engine.remove_adapter("cc")
    with pytest.raises(UnknownAdapterError, match="'cc'; loaded: aa"):
        engine.generate([request])


def test_what_the_engine_says_of_itself(tiny_engines):
    code, speech = tiny_engines["code"], tiny_engines["speech"]
    assert (code.kind, code.name, code.window_s, code.dtype, code.device.type) == ("code", "code", None, torch.float32, "cpu")
    assert (speech.kind, speech.window_s) == ("speech", 1.0)
    assert {tag: info.ranks for tag, info in code.adapters.items()} == {
        "aa": {"flora": 1, "lora": 8},
        "bb": {"flora": 3, "lora": 1},
        "cc": {"flora": 8, "lora": 3},
    }


def test_an_engine_beside_another_shares_its_weights_and_nothing_else(tiny_engines, requests_of):
    engine = tiny_engines["code"]
    other = engine.beside(max_batch_size=2, adapter_slots=1)
    try:
        assert other.adapters == {} and other.model is engine.model and other.max_batch_size == 2
        before, (request,) = dict(engine.adapters), requests_of("code")[:1]
        other.add_adapter("its own", engine.adapters[request.adapter].sources)
        assert list(other.adapters) == ["its own"] and engine.adapters == before
        expected = engine.generate([request])[0].token_ids
        assert other.generate([replace(request, adapter="its own")])[0].token_ids == expected
        with pytest.raises(UnknownAdapterError):
            other.generate([request])
        assert other.snapshot().num_finished == 1
    finally:
        other.close()
    assert engine.generate([request])[0].token_ids == expected
