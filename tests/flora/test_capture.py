"""`Engine.capture`: steps that are captured before requests come, and what `Engine.captured` says of them afterwards."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from strict_capture import strict_engines

from flora import Engine, Request, backend
from flora.engine import server
from flora.errors import BusyError, RequestError, UnknownAdapterError


@pytest.fixture
def recording(checkpoints):
    with strict_engines(checkpoints) as make:
        yield make


def requests_of(engine: Engine, clips, tag: str | None, number: int, num_tokens: int = 1) -> list[Request]:
    """Of lengths that differ, so that one row after another leaves."""
    speech = engine.kind == "speech"
    asked = [{"audio": clips[place % 4]} if speech else {"prompt": "ab("[: 1 + place % 3]} for place in range(number)]
    return [Request(**one, adapter=tag, max_new_tokens=num_tokens + place, ignore_eos=True) for place, one in enumerate(asked)]


def tokens_of(engine: Engine, requests: list[Request], method: str) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(requests, method)]


@pytest.mark.parametrize("method", ["flora", "bmm-lora", "base"])
@pytest.mark.parametrize("kind", ["code", "speech"])
def test_no_step_of_any_batch_size_is_captured_while_requests_wait(kind, method, recording, clips, tiny_engines):
    """Rows come one after another and leave one after another, up to all that there may be: every step is a replay."""
    engine, made = recording(kind, max_batch_size=6)
    num_positions = 40
    assert engine.capture(method, ["bb"], num_positions) == made[0].num_captured > 0
    requests = requests_of(engine, clips, "bb", 9, 4)
    before = engine.captured(method)
    assert tokens_of(engine, requests, method) == tokens_of(tiny_engines[kind], requests, method)
    after = engine.captured(method)
    assert after == replace(before, replayed=after.replayed) and after.replayed > before.replayed and after.reason is None
    assert len(made) == 1 and engine.snapshot().num_captured == after.captured
    assert engine.capture(method, ["bb"], num_positions) == 0, "what was captured is there"


@pytest.mark.parametrize("method", ["base", "bmm-lora"])
def test_sixty_four_rows(method, recording, clips, tiny_engines):
    """1, 2, 4 … 64 rows, and nothing in between: a graph of the next larger one serves that."""
    engine, made = recording("code", "aa", max_batch_size=64)
    assert engine.capture(method, ["aa"], 64) == 7
    requests = [replace(one, max_new_tokens=3 + place // 8) for place, one in enumerate(requests_of(engine, clips, "aa", 64))]
    assert tokens_of(engine, requests, method) == tokens_of(tiny_engines["code"], requests, method)
    assert made[0].num_captured == 7 and made[0].failure is None


def test_rows_without_adapters_are_captured_apart(recording, clips, tiny_engines):
    """A batch of the base model alone has steps of its own, in which no layer looks for factors."""
    engine, made = recording("code", "aa", max_batch_size=4)
    assert engine.capture("bmm-lora", ["aa"], 64) == engine.capture("bmm-lora", num_positions=64) == 3
    for tag in (None, "aa"):
        requests = requests_of(engine, clips, tag, 4)
        assert tokens_of(engine, requests, "bmm-lora") == tokens_of(tiny_engines["code"], requests, "bmm-lora")
    assert made[0].num_captured == 6


def test_every_width_is_captured(recording):
    engine, made = recording("code", "aa", max_batch_size=1)
    assert engine.capture("flora", ["aa"], 96) == 2, "64 positions and 96, all that the model has"
    tokens_of(engine, [Request("ab(", adapter="aa", max_new_tokens=90, ignore_eos=True)], "flora")
    assert made[0].num_captured == 2 and engine.captured("flora").ran == 1, "only the very first step ran as ever"


def test_the_kernels_of_a_whole_model_are_captured(recording, monkeypatch, tiny_engines):
    """All that they read besides the model and the cache lies in what the graph keeps."""
    from kernels_on_cpu import DEVICE, kernels

    if DEVICE != "cpu":
        pytest.skip("the stand-in is one for a CPU")
    monkeypatch.setattr(backend, "kernels_on", lambda device_type: kernels)
    engine, made = recording("code", "aa", "bb", max_batch_size=2)
    for method in ("flora", "sgmv-lora"):
        assert engine.capture(method, ["bb"], 16)
        requests = [Request("ab", adapter="bb", max_new_tokens=length, ignore_eos=True) for length in (2, 4)]
        before = engine.captured(method)
        answers = tokens_of(engine, requests, method)
        assert engine.captured(method).ran == before.ran and engine.captured(method).captured == before.captured
        assert answers == tokens_of(tiny_engines["code"], requests, method)


def test_recorded_calls_can_be_made_ahead_too(checkpoints, clips, tiny_engines):
    """On a CPU as it is, where rows are not padded."""
    engine = checkpoints["code"].engine("aa", max_batch_size=3)
    assert engine.capture("flora", ["aa"], 64) == 3
    before, requests = engine.captured("flora"), requests_of(engine, clips, "aa", 3, 5)
    assert tokens_of(engine, requests, "flora") == tokens_of(tiny_engines["code"], requests, "flora")
    after = engine.captured("flora")
    assert (after.captured, after.ran) == (before.captured, before.ran) and after.replayed > before.replayed
    engine.close(0)


# ------------------------------------------------------------------------------------------------------- what is not captured


@pytest.mark.parametrize("method", ["loop-lora", "merged", "mixed"])
def test_a_method_whose_steps_cannot_be_captured_says_so(method, recording, clips):
    engine, _ = recording("code", "aa", max_batch_size=2)
    assert engine.capture(method, ["aa"], 64) == 0
    tokens_of(engine, requests_of(engine, clips, "aa", 2, 3), method)
    steps = engine.captured(method)
    assert steps.ran > 0 == steps.replayed == steps.captured
    assert ("merged weights" if method == "merged" else "numbers of the host") in steps.reason


def test_quantised_layers_say_so(checkpoints, clips):
    engine = checkpoints["code"].engine("aa", quantize="nf4")
    assert engine.capture("bmm-lora", ["aa"], 64) == 0
    tokens_of(engine, requests_of(engine, clips, "aa", 1, 3), "bmm-lora")
    steps = engine.captured("bmm-lora")
    assert steps.replayed == 0 < steps.ran and "is quantised, and its own product may wait" in steps.reason
    engine.close(0)


def test_an_engine_that_captures_nothing(checkpoints, clips):
    engine = checkpoints["code"].engine("aa", capture_steps=False)
    assert engine.capture("flora", ["aa"], 64) == 0
    assert engine.captured("flora").reason == "the engine was made not to capture its steps" and not engine._server.cores
    tokens_of(engine, requests_of(engine, clips, "aa", 1, 3), "flora")
    assert engine.captured("flora").ran == 2 and engine.captured("flora").replayed == 0
    engine.close(0)


def test_what_a_failed_capture_says(recording, monkeypatch, clips):
    engine, _ = recording("code", "aa", max_batch_size=2)

    def fails(self, function, of_batch=()):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("strict_capture.AsStrictAsCuda.__call__", fails)
    assert engine.capture("flora", ["aa"], 64) == 0
    assert "not permitted" in engine.captured("flora").reason
    assert len(tokens_of(engine, requests_of(engine, clips, "aa", 2, 3), "flora")) == 2


def test_nonsense_is_refused(recording):
    engine, _ = recording("code", "aa")
    for arguments, message in (
        (("fast",), "unknown method 'fast'"),
        (("flora", ["aa"], 0), "num_positions must be 1 to 96"),
        (("flora", ["aa"], 97), "num_positions must be 1 to 96"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.capture(*arguments)
    with pytest.raises(UnknownAdapterError):
        engine.capture("flora", ["zz"], 64)
    with pytest.raises(RequestError, match="unknown method"):
        engine.captured("fast")
    assert not engine._server.cores


# ----------------------------------------------------------------------------------------------------------------- when


def test_what_was_captured_ahead_is_kept_while_nobody_asks(recording, monkeypatch, clips):
    monkeypatch.setattr(server, "IDLE_S", 0.05)
    engine, made = recording("code", "aa", max_batch_size=2)
    engine.capture("flora", ["aa"], 64)
    end = time.perf_counter() + 30
    while engine._server._thread is not None:
        assert time.perf_counter() < end
        time.sleep(0.01)
    captured = made[0].num_captured
    tokens_of(engine, requests_of(engine, clips, "aa", 2, 3), "flora")
    assert len(made) == 1 and made[0].num_captured == captured


def test_not_while_requests_with_the_method_run(recording):
    engine, _ = recording("code", "aa", max_batch_size=2)
    with engine.exclusive():
        ticket = engine.submit(Request("ab(", adapter="aa", max_new_tokens=80, ignore_eos=True))
    next(iter(ticket))  # it runs; whoever leaves cancels it
    ticket = engine.submit(Request("ab(", adapter="aa", max_new_tokens=90, ignore_eos=True))
    while ticket.state == "waiting":
        time.sleep(0.001)
    with pytest.raises(BusyError, match="requests with flora are on their way"):
        engine.capture("flora", ["aa"], 64)
    ticket.cancel()


def test_not_once_the_engine_shuts_down(recording):
    engine, _ = recording("code", "aa")
    engine.close(0)
    with pytest.raises(BusyError, match="shutting down"):
        engine.capture("flora", ["aa"], 64)
