"""Whatever a visitor sends wrong: one sentence of a named class, before anything runs, and the engine serves on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flora import AdapterError, AudioError, Engine, FloraError, Request, RequestError, UnknownAdapterError

NOISE = (0.1 * np.random.default_rng(0).normal(size=8000)).astype(np.float32)  # half a second


def spoilt(value: float) -> np.ndarray:
    clip = NOISE.copy()
    clip[4000] = value
    return clip


BAD_PROMPTS = {
    "empty": ("", RequestError, "the prompt is empty"),
    "blank": (" \n\t ", RequestError, "the prompt is empty"),
    "as long as the context": ("x" * 96, RequestError, "the prompt has 96 tokens and the model's context holds 96"),
    "over the context": ("€" * 1000, RequestError, "the prompt has 3000 tokens and the model's context holds 96.*shorten it"),
    "half a surrogate pair": ("print('\ud83d')", RequestError, "the prompt is not valid text"),
}

BAD_CLIPS = {
    "no samples": ([], AudioError, "the clip is empty"),
    "no samples in two channels": (np.zeros((0, 2)), AudioError, "the clip is empty"),
    "silent": (np.zeros(8000), AudioError, "the clip is silent"),
    "almost silent": (np.full(8000, 1e-5), AudioError, "the clip is silent"),
    "silent 16-bit": (np.zeros(8000, np.int16), AudioError, "the clip is silent"),
    "silent 8-bit": (np.full(8000, 128, np.uint8), AudioError, "the clip is silent"),
    "NaN": (spoilt(np.nan), AudioError, "NaN or infinite"),
    "infinite": (spoilt(np.inf), AudioError, "NaN or infinite"),
    "beyond single precision": (spoilt(1.0).astype(np.float64) * 1e300, AudioError, "NaN or infinite"),
    "all NaN": (np.full(8000, np.nan), AudioError, "NaN or infinite"),
    "over the window": (np.tile(NOISE, 3), AudioError, r"the clip is 1\.5 s long and the model hears 1 s: trim it"),
    "an image": (np.ones((100, 80)), AudioError, r"not an array of shape \(100, 80\)"),
    "three dimensions": (np.ones((2, 100, 80)), AudioError, r"not an array of shape \(2, 100, 80\)"),
    "one number": (0.5, AudioError, r"not an array of shape \(\)"),
    "a file's name": ("clip.wav", AudioError, "an array of numbers, not of"),
    "a file's bytes": (b"RIFF....WAVE", AudioError, "an array of numbers, not of"),
    "words": (["one", "two"], AudioError, "an array of numbers, not of"),
    "nothings": ([None, None], AudioError, "an array of numbers, not of"),
    "a dictionary": ({"array": NOISE}, AudioError, "an array of numbers, not of"),
    "truths": (np.ones(8000, bool), AudioError, "an array of numbers, not of"),
    "complex numbers": (NOISE * 1j, AudioError, "an array of numbers, not of"),
    "rows of different lengths": ([[0.1, 0.2], [0.3]], AudioError, "rows of different lengths"),
    "64-bit integers": ((NOISE * 32767).astype(np.int64), AudioError, "int64, whose full scale is unknown"),
    "a NaN tensor": (torch.full((8000,), torch.nan), AudioError, "NaN or infinite"),
}

GOOD = {"code": {"prompt": "x = "}, "speech": {"audio": NOISE}}


def assert_refused(engine: Engine, requests: list[Request], error: type, message: str, monkeypatch, method: str = "flora") -> None:
    """By every way in; no forward runs, nothing is pinned, and the same engine serves the good requests afterwards."""

    def prefill(*args):
        raise AssertionError("the model ran")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "prefill", prefill)
        for way in (engine.generate, lambda *args: list(engine.stream(*args)), engine.start):
            with pytest.raises(error, match=message) as caught:
                way(requests, method)
            assert isinstance(caught.value, FloraError) and type(caught.value) is error
            assert "\n" not in str(caught.value)
    assert not engine.bank._users
    kind = engine.kind
    assert len(engine.generate([Request(**GOOD[kind], max_new_tokens=2, ignore_eos=True)], method)[0].token_ids) == 2


@pytest.mark.parametrize("bad", BAD_PROMPTS)
def test_bad_prompts(bad, tiny_engines, monkeypatch):
    prompt, error, message = BAD_PROMPTS[bad]
    request = Request(prompt)
    good = Request("x = ", max_new_tokens=2)
    assert_refused(tiny_engines["code"], [good, request], error, message, monkeypatch)
    with pytest.raises(error, match=message):
        tiny_engines["code"].validate(request)
    tiny_engines["code"].validate(good)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("bad", BAD_CLIPS)
def test_bad_clips(bad, tiny_engines, monkeypatch):
    audio, error, message = BAD_CLIPS[bad]
    request = Request(audio=audio)
    good = Request(audio=NOISE, max_new_tokens=2)
    assert_refused(tiny_engines["speech"], [good, request], error, message, monkeypatch)
    with pytest.raises(error, match=message):
        tiny_engines["speech"].validate(request)
    tiny_engines["speech"].validate(good)


def test_the_window_is_counted_at_the_clips_own_rate(tiny_engines, monkeypatch):
    engine = tiny_engines["speech"]
    engine.validate(Request(audio=NOISE, sampling_rate=8000))  # 1 s
    too_long = Request(audio=np.tile(NOISE, 2), sampling_rate=8000)
    assert_refused(engine, [too_long], AudioError, r"the clip is 2\.0 s long", monkeypatch)


@pytest.mark.parametrize("kind", ["code", "speech"])
def test_empty_batches(kind, tiny_engines, monkeypatch):
    assert_refused(tiny_engines[kind], [], RequestError, "the batch is empty: add at least one request", monkeypatch)


@pytest.mark.parametrize("method", ["flora", "bmm-lora", "merged", "base"])
@pytest.mark.parametrize("kind", ["code", "speech"])
def test_unknown_tags(kind, method, tiny_engines, monkeypatch):
    """`base` uses no adapter, but a tag that is not there is an error all the same, never the base model's answer in silence."""
    requests = [Request(**GOOD[kind], adapter="aa"), Request(**GOOD[kind], adapter="fortran")]
    message = "unknown adapter 'fortran'; loaded: aa, bb, cc"
    assert_refused(tiny_engines[kind], requests, UnknownAdapterError, message, monkeypatch, method)


@pytest.mark.parametrize(
    "method, family", [("flora", "flora"), ("flora-modulate", "flora"), ("bmm-lora", "lora"), ("loop-lora", "lora")]
)
def test_tags_without_the_methods_family(method, family, checkpoints, monkeypatch):
    made = checkpoints["code"]
    other = "lora" if family == "flora" else "flora"
    engine = Engine.from_pretrained(made.model, {"aa": made.adapters["aa"][other], "bb": made.adapters["bb"][family]}, device="cpu")
    message = f"adapter 'aa' has no {family} checkpoint, which method {method} needs; tags that have one: bb$"
    assert_refused(engine, [Request("x", adapter="bb"), Request("x", adapter="aa")], AdapterError, message, monkeypatch, method)


@pytest.mark.parametrize("method", ["", "lora", "FLORA", "sgmv", None, ["flora"]])
def test_unknown_methods(method, tiny_engines, monkeypatch):
    engine = tiny_engines["code"]
    for way in (engine.generate, engine.start, lambda *args: list(engine.stream(*args))):
        with pytest.raises(RequestError, match=r"unknown method .*; methods are flora, flora-expand, .*, base"):
            way([Request("x")], method)
    with pytest.raises(RequestError, match="unknown method"):
        engine.validate(Request("x"), method)


def test_a_request_of_the_other_kind(tiny_engines, monkeypatch):
    assert_refused(tiny_engines["code"], [Request(audio=NOISE)], RequestError, "give a prompt, not audio", monkeypatch)
    assert_refused(tiny_engines["speech"], [Request("x")], RequestError, "give audio, not a prompt", monkeypatch)


@pytest.mark.parametrize("thing", ["x = ", {"prompt": "x"}, None, 3], ids=repr)
def test_things_that_are_no_requests(thing, tiny_engines, monkeypatch):
    assert_refused(tiny_engines["code"], [thing], RequestError, "expected a flora.Request, not", monkeypatch)


BAD_FIELDS = {
    "nothing at all": ({}, "either a prompt or audio"),
    "both kinds": ({"prompt": "x", "audio": NOISE}, "either a prompt or audio"),
    "a prompt that is no text": ({"prompt": 5}, "the prompt must be text, not int"),
    "bytes": ({"prompt": b"x"}, "the prompt must be text, not bytes"),
    "a list of tags": ({"prompt": "x", "adapter": ["lua"]}, "the adapter must be a tag or None, not list"),
    **{
        f"max_new_tokens {value!r}": (
            {"prompt": "x", "max_new_tokens": value},
            "max_new_tokens must be a whole number of at least 1",
        )
        for value in (0, -1, 1.5, "8", None, True, float("nan"))
    },
    **{
        f"temperature {value!r}": ({"prompt": "x", "temperature": value}, "temperature must be a finite number of at least 0")
        for value in (-0.1, float("nan"), float("inf"), "warm", None)
    },
    **{
        f"sampling_rate {value!r}": ({"audio": NOISE, "sampling_rate": value}, "sampling_rate must be a whole number of Hz")
        for value in (0, -16000, 1, 999, 768_001, 2_000_000_000, 16000.0, "16000", True, float("nan"))
    },
}


@pytest.mark.parametrize("bad", BAD_FIELDS)
def test_bad_fields(bad):
    fields, message = BAD_FIELDS[bad]
    with pytest.raises(RequestError, match=message) as caught:
        Request(**fields)
    assert "\n" not in str(caught.value)


def test_a_bad_request_among_more_than_a_batch_stops_all_before_the_first_runs(checkpoints, monkeypatch):
    engine = checkpoints["code"].engine("aa", max_batch_size=2)
    requests = [Request("x", max_new_tokens=2)] * 4 + [Request("x", adapter="zz")]
    ran = []
    monkeypatch.setattr(engine.runner, "prefill", lambda *args: ran.append(args))
    with pytest.raises(UnknownAdapterError, match="'zz'"):
        engine.generate(requests)
    assert not ran


@pytest.mark.parametrize("size", [0, -1])
def test_batches_must_hold_someone(size, checkpoints):
    with pytest.raises(RequestError, match="max_batch_size must be at least 1"):
        checkpoints["code"].engine("aa", max_batch_size=size)
