"""The comparison: its events, its figures on a known clock, failures and stopping."""

import json

import numpy as np
import pytest
from fake_engine import Clock, FakeEngine

from flora.engine import Request
from flora.errors import FloraError, RequestError
from profiling import report
from profiling.compare import compare
from profiling.events import Finished, Progress, RowFailed, RowText, Started, StepTimed


def run(*arguments, **options):
    events = list(compare(*arguments, **options))
    assert isinstance(events[-1], Finished) and sum(isinstance(event, Finished) for event in events) == 1
    return events, events[-1].result


def of(events, kind):
    return [event for event in events if isinstance(event, kind)]


def prompts(*lengths):
    return [Request(prompt="p", adapter="lua", max_new_tokens=length) for length in lengths]


SPEEDS = {"flora": 2.0, "bmm-lora": 3.0, "base": 1.0}


def steady(method, step):
    """A prefill ten times as long as a decode step."""
    return SPEEDS[method] * (1 if step else 10)


@pytest.fixture
def fake(clock: Clock) -> FakeEngine:
    return FakeEngine(clock, step_s=steady)


# ---------------------------------------------------------------------------------------------------- on a known clock


def test_the_methods_take_turns_and_their_warm_up_comes_first_and_apart(fake):
    run({"code": fake}, prompts(4), warmup_steps=2)
    methods = [method for _, method in fake.log]
    assert methods == ["flora"] * 3 + ["bmm-lora"] * 3 + ["flora", "bmm-lora"] * 4


def test_every_figure_follows_from_the_steps(fake):
    _, result = run({"code": fake}, prompts(5, 5, 3), warmup_steps=2)
    flora, bmm = result.methods["flora"], result.methods["bmm-lora"]
    # fLoRA: a prefill of 20 s, then four decode steps of 2 s; 13 tokens, 10 of them decoded.
    assert flora.num_new_tokens == 13
    assert flora.tokens_per_s == pytest.approx(13 / 28) and bmm.tokens_per_s == pytest.approx(13 / 42)
    assert flora.decode_tokens_per_s == pytest.approx(10 / 8)
    assert flora.ttft_s == pytest.approx(20) and flora.tpot_s == pytest.approx(2) and bmm.tpot_s == pytest.approx(3)
    assert flora.s_per_token == pytest.approx(np.mean([28 / 5, 28 / 5, 24 / 3]))
    assert flora.prefill_s == pytest.approx(20)
    assert flora.step_quantiles["p50"] == pytest.approx(2)
    assert result.ratio.median == pytest.approx(1.5), "prefill does not count"
    assert (result.ratio.n, result.num_steps, result.warmup_steps) == (4, 4, 2)
    assert flora.ranks == (1, 1, 1) and bmm.ranks == (4, 4, 4)
    assert {kind: own.tokens_per_s for kind, own in flora.by_kind.items()} == {"code": flora.tokens_per_s}
    assert flora.ratio_to_first is None and bmm.ratio_to_first == result.ratio


def test_both_kinds_step_side_by_side_and_each_keeps_its_own_clock(clock, tone):
    code = FakeEngine(clock, "code", steady)
    speech = FakeEngine(clock, "speech", lambda method, step: 4 * steady(method, step))
    speech.log = code.log
    clip = Request(audio=tone, sampling_rate=16000, adapter="cs", max_new_tokens=3)
    events, result = run({"code": code, "speech": speech}, [*prompts(3), clip], warmup_steps=0)
    assert set(code.log[:4]) == {("code", "flora"), ("speech", "flora"), ("code", "bmm-lora"), ("speech", "bmm-lora")}
    assert [method for kind, method in code.log if kind == "speech"] == ["flora", "bmm-lora"] * 3
    flora = result.methods["flora"]
    assert flora.by_kind["code"].ttft_s == pytest.approx(20) and flora.by_kind["speech"].ttft_s == pytest.approx(80)
    assert flora.step_quantiles["p50"] == pytest.approx(2 + 8), "both models' forwards of one step"
    assert flora.tokens_per_s == pytest.approx(6 / (24 + 96))
    assert result.ratio.n == 2 and set(result.ratio_by_kind) == {"code", "speech"}
    assert {event.kind for event in of(events, StepTimed)} == {"code", "speech"}


def test_a_kind_that_ends_early_leaves_the_other_alone_in_the_pairs(clock, tone):
    code = FakeEngine(clock, "code", steady)
    speech = FakeEngine(clock, "speech", lambda method, step: 7.0)
    clip = Request(audio=tone, sampling_rate=16000, max_new_tokens=3)
    _, result = run({"code": code, "speech": speech}, [*prompts(6), clip], warmup_steps=0)
    assert result.ratio.n == 5 and result.ratio_by_kind["speech"].n == 2
    assert result.ratio_by_kind["speech"].median == pytest.approx(1.0)
    assert result.ratio.median == pytest.approx(1.5), "three of five steps are the code model's alone"


def test_a_slow_moment_hits_one_pair_and_not_the_median(clock):
    def with_a_hiccup(method, step):
        return steady(method, step) + (500 if step == 3 and method == "flora" else 0)

    _, result = run({"code": FakeEngine(clock, step_s=with_a_hiccup)}, prompts(12), warmup_steps=0)
    assert result.ratio.median == pytest.approx(1.5)


def test_repeats_pool_their_steps_and_reuse_the_warm_up(fake):
    events, result = run({"code": fake}, prompts(4), warmup_steps=1, repeats=3)
    assert fake.started == 2 * (1 + 3) == fake.closed
    assert result.ratio.n == 9 and result.num_steps == 9 and result.repeats == 3
    assert result.methods["flora"].tokens_per_s == pytest.approx(12 / (3 * 26))
    assert [event.step for event in of(events, StepTimed)][-1] == 11 and of(events, Started)[0].num_steps == 12
    assert result.rows[0]["num_new_tokens"] == 4


def test_base_takes_part_and_every_method_is_set_against_it(fake):
    _, result = run({"code": fake}, prompts(4), methods=("flora", "bmm-lora", "base"), warmup_steps=0)
    assert result.methods["flora"].ratio_to_base.median == pytest.approx(2)
    assert result.methods["bmm-lora"].ratio_to_base.median == pytest.approx(3)
    assert result.methods["base"].ratio_to_base is None and result.methods["base"].ranks == (0,)
    assert result.ratio.median == pytest.approx(1.5), "the headline is still second over first"


def test_waiting_for_the_device_is_on_no_clock(clock):
    waiting, alone = (
        run({"code": FakeEngine(clock, step_s=steady, turn_s=turn_s)}, prompts(4), warmup_steps=1)[1] for turn_s in (1000.0, 0.0)
    )
    for method in ("flora", "bmm-lora"):
        assert waiting.methods[method].prepare_s == alone.methods[method].prepare_s == 0
        assert waiting.methods[method].ttft_s == pytest.approx(alone.methods[method].ttft_s)
        assert waiting.methods[method].step_quantiles == pytest.approx(alone.methods[method].step_quantiles)
        assert waiting.methods[method].tokens_per_s == pytest.approx(alone.methods[method].tokens_per_s)


def test_one_method_alone_has_figures_and_no_ratio(fake):
    _, result = run({"code": fake}, prompts(4), methods=("flora",), warmup_steps=0)
    assert result.ratio is None and result.methods["flora"].tpot_s == pytest.approx(2)


def test_a_single_token_has_a_first_and_no_further_one(fake):
    _, result = run({"code": fake}, prompts(1), warmup_steps=5)
    flora = result.methods["flora"]
    assert flora.ttft_s == pytest.approx(20) and flora.tpot_s is None and flora.decode_tokens_per_s is None
    assert result.ratio is None and result.warmup_steps == 0, "a warm-up is no longer than the request"


def test_a_slow_listener_is_on_no_clock(clock):
    fake = FakeEngine(clock, step_s=steady)
    for event in compare({"code": fake}, prompts(6), warmup_steps=2):
        clock.now += 1000  # a slow listener
        if isinstance(event, Finished):
            result = event.result
    assert result.ratio.median == pytest.approx(1.5) and result.methods["flora"].ttft_s == pytest.approx(20)


# ------------------------------------------------------------------------------------------------------------ stopping


@pytest.mark.parametrize("after", [0, 1, 2, 3, 7, 8, 9, 12])
def test_stop_is_asked_before_every_forward_and_keeps_what_was_measured(fake, after):
    asked = []

    def should_stop():
        asked.append(True)
        return len(asked) > after

    _, result = run({"code": fake}, prompts(20), warmup_steps=2, should_stop=should_stop)
    assert len(fake.log) == after and result.stopped
    assert fake.started == fake.closed, "every cache is given back"
    assert not fake.verified
    pairs = max(0, (after - 6) // 2 - 1)
    assert (result.ratio.n if result.ratio else 0) == pairs
    if after <= 6:
        assert result.methods == {} and result.rows == ()


def test_leaving_early_gives_the_caches_back(fake):
    events = compare({"code": fake}, prompts(20), warmup_steps=0)
    next(event for event in events if isinstance(event, StepTimed))
    events.close()
    assert fake.started == fake.closed == 2


# ----------------------------------------------------------------------------------------------------------- failures


def test_a_bad_row_fails_alone(fake, tone):
    bad = Request(prompt="p", adapter="klingon", max_new_tokens=4)
    clip = Request(audio=tone, sampling_rate=16000, max_new_tokens=4)
    events, result = run({"code": fake}, [bad, *prompts(4), clip], warmup_steps=0)
    failed = {event.index: event.message for event in of(events, RowFailed)}
    assert set(failed) == {0, 2} == set(result.failures)
    assert "klingon" in failed[0] and "no speech model" in failed[2]
    assert {row["index"] for row in result.rows} == {1} == {event.index for event in of(events, RowText)}
    assert set(of(events, Started)[0].rows[0]["method_errors"]) == {"flora", "bmm-lora"}
    assert result.batch == 1


def test_a_batch_the_engine_refuses_fails_and_the_other_kind_runs(clock, tone):
    refusal = RequestError("the batch has 40 requests and this engine takes 32 at once")
    code, speech = FakeEngine(clock, "code", steady, {"bmm-lora": refusal}), FakeEngine(clock, "speech", steady)
    clip = Request(audio=tone, sampling_rate=16000, max_new_tokens=4)
    for warmup_steps in (0, 2):
        events, result = run({"code": code, "speech": speech}, [*prompts(4), clip], warmup_steps=warmup_steps)
        assert [event.index for event in of(events, RowFailed)] == [0]
        assert set(result.methods["flora"].by_kind) == {"speech"} and result.ratio.n == 3
        assert code.started == code.closed


def test_when_every_row_fails_the_result_is_empty_and_nothing_is_raised(fake):
    events, result = run({"code": fake}, [Request(prompt="p", adapter="klingon")])
    assert result.methods == {} and result.ratio is None and result.rows == () and not result.stopped
    assert result.to_rows() == [] and result.steps_frame().empty
    json.dumps(events[-1].as_dict())


@pytest.mark.parametrize(
    ("methods", "requests", "options", "words"),
    [
        (("flora", "flora"), prompts(2), {}, "given twice"),
        (("flora", "merged-lora"), prompts(2), {}, "no method 'merged-lora'"),
        ((), prompts(2), {}, "needs a method"),
        (("flora", "bmm-lora"), [], {}, "batch is empty"),
        (("flora", "bmm-lora"), prompts(2), {"warmup_steps": -1}, "warm-up"),
        (("flora", "bmm-lora"), prompts(2), {"repeats": 0}, "repeats"),
    ],
)
def test_nonsense_is_refused_at_once(fake, methods, requests, options, words):
    with pytest.raises(FloraError, match=words):
        compare({"code": fake}, requests, methods, **options)


def test_disagreement_with_the_reference_shows(fake):
    fake.disagreeing = 1
    _, result = run({"code": fake}, prompts(4, 4), warmup_steps=0)
    agreement = result.methods["flora"].agreement
    assert (agreement.tokens, agreement.agreeing) == (8, 7) and result.methods["flora"].agrees is False
    assert fake.verified[0] == ("flora", [[0, 1, 2, 3], [0, 1, 2, 3]])


# ------------------------------------------------------------------------------------------------------ on real models


def test_a_mixed_batch_on_real_models(engines, mixed_batch):
    events, result = run(engines, mixed_batch, warmup_steps=2, methods=("flora", "bmm-lora", "base"))
    assert result.failures == {}
    assert len(result.rows) == 4 * 3 and result.ratio.n == 5
    for figures in result.methods.values():
        assert figures.num_new_tokens == 24 and figures.agrees, figures.agreement
        assert figures.tokens_per_s > 0 and figures.prepare_s > 0
    stages = {event.stage for event in of(events, Progress)}
    assert stages == {"warm-up", "prefill", "decode", "checking"}
    assert all(0 <= event.done <= event.total for event in of(events, Progress))
    texts = {(event.index, event.method): event.text for event in of(events, RowText)}
    for row in result.rows:
        assert texts[row["index"], row["method"]] == row["text"]
    json.dumps([event.as_dict() for event in events])


def test_the_texts_are_those_of_the_engine_alone(engines, mixed_batch):
    _, result = run(engines, mixed_batch, warmup_steps=1)
    for row in result.rows:
        request = mixed_batch[row["index"]]
        (alone,) = engines[row["kind"]].generate([request], method=row["method"])
        assert row["text"] == alone.text.rstrip("\ufffd"), "a character that is not whole yet is held back"


def test_records_hold_all_that_a_number_needs_and_nothing_that_names_a_person(engines, mixed_batch):
    _, result = run(engines, mixed_batch, warmup_steps=1, seed=3)
    records = [json.loads(line) for line in report.lines_of(result.to_rows()).splitlines()]
    assert {(record["method"], record["kind"]) for record in records} == {
        (method, kind) for method in ("flora", "bmm-lora") for kind in ("code", "speech", "all")
    }
    for record in records:
        for key in ("hardware", "dtype", "models", "ranks", "batch", "popularity", "seed", "repeats", "step_quantiles", "command"):
            assert key in record, key
        assert record["popularity"] == "distinct" and record["seed"] == 3 and record["hardware"]["torch"]
        assert record["models"]["code" if record["kind"] != "speech" else "speech"]["hidden_size"] == 48
    import getpass
    import socket

    text = report.lines_of(result.to_rows())
    assert socket.gethostname() not in text and f"/{getpass.getuser()}/" not in text and "/tmp/" not in text
    assert len(report.frame(result.to_rows())) == 6 and len(result.steps_frame()) == 2 * 2 * 6
