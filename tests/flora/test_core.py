"""What goes wrong with one request ends that request, by name: its neighbours' tokens are as if nothing had been."""

from __future__ import annotations

import random
import weakref
from dataclasses import replace

import pytest
import tiny_models
import torch

from flora import Engine, Request
from flora.engine import TokenEvent
from flora.errors import AdapterError, FloraError, ServingError
from flora.formats import read_adapter

PATIENCE_S = 30.0
TAGS = ("aa", None, "cc", "bb", "aa")
LENGTHS = (5, 9, 12, 7, 3)
BAD = 2
"""The place of the request that something happens to."""


@pytest.fixture(params=["code", "speech"])
def kind(request) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["exact-shapes", "static-shapes"])
def make(checkpoints, request):
    """kind, options → an engine, closed at the end with nothing left behind."""
    made = []

    def make(kind: str, **options) -> Engine:
        made.append(checkpoints[kind].engine(static_shapes=request.param, capture_steps=False, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close(0)
        snapshot = engine.snapshot()
        assert (snapshot.waiting, snapshot.running) == (0, 0) and not engine.bank._users
        assert snapshot.num_arrived == snapshot.num_finished + snapshot.num_failed + snapshot.num_cancelled


def batch(kind: str, clips, bad_tag: str = TAGS[BAD]) -> list[Request]:
    tags = [bad_tag if place == BAD else tag for place, tag in enumerate(TAGS)]
    asked = [{"audio": clips[place % 4]} if kind == "speech" else {"prompt": "ab("[: 1 + place % 3] * 3} for place in range(5)]
    return [
        Request(**one, adapter=tag, max_new_tokens=length, ignore_eos=True)
        for one, tag, length in zip(asked, tags, LENGTHS, strict=True)
    ]


def answers(engine: Engine, requests: list[Request], method: str = "flora") -> list[list[int] | FloraError]:
    """Of requests that run together: tokens, or the error."""
    with engine.exclusive():  # so that they are all there when the first step comes
        tickets = [engine.submit(request, method) for request in requests]
    ended = []
    for ticket in tickets:
        try:
            ended.append(ticket.result(PATIENCE_S).token_ids)
        except FloraError as error:
            ended.append(error)
    return ended


def fail_on(monkeypatch, engine: Engine, request: Request, phase: str, error: Exception, at: int = 4) -> list[int]:
    """Make every forward raise that has this request in it: its prompt, or its token number `at`. Returns those forwards' sizes."""
    sizes, encoded = [], engine.runner.encode(request)
    prefill, decode = engine.runner.prefill, engine.runner.decode

    def is_it(other) -> bool:
        same_clip = encoded.features is None or torch.equal(other.features, encoded.features)
        return other.prompt_ids == encoded.prompt_ids and same_clip

    def faulty_prefill(pieces, *args):
        if any(is_it(piece.encoded) for piece in pieces):
            sizes.append(len(pieces))
            raise error
        return prefill(pieces, *args)

    def faulty_decode(tokens, positions, cache, first_row, serving):
        (core,) = engine._server.cores
        rows = core.scheduler.decoding[first_row : first_row + len(tokens)]
        if any(row.request is request and len(row.token_ids) >= at for row in rows):
            sizes.append(len(tokens))
            raise error
        return decode(tokens, positions, cache, first_row, serving)

    if phase == "prefill":
        monkeypatch.setattr(engine.runner, "prefill", faulty_prefill)
    else:
        monkeypatch.setattr(engine.runner, "decode", faulty_decode)
    return sizes


NO_MEMORY = "the device's memory did not suffice for a request with adapter 'cc': shorten it, or try again later"
FAULTS = (
    (ZeroDivisionError("x"), "the model failed on this request with adapter 'cc' (ZeroDivisionError): try another one"),
    (torch.OutOfMemoryError("x"), NO_MEMORY),
    (MemoryError(), NO_MEMORY),
    (AdapterError("it has moved"), "it has moved"),
)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_forward_that_raises_ends_the_request_that_is_at_fault(phase, kind, make, clips, tiny_engines, monkeypatch):
    engine, requests = make(kind), batch(kind, clips)
    expected = answers(tiny_engines[kind], requests)
    for error, message in FAULTS:
        with monkeypatch.context() as patched:
            sizes = fail_on(patched, engine, requests[BAD], phase, error)
            got = answers(engine, requests)
            assert isinstance(got[BAD], FloraError) and str(got[BAD]) == message
            assert sizes[-1] == 1 < sizes[0], f"forwards of {sizes} requests: it has to be found among the others"
            assert [row for place, row in enumerate(got) if place != BAD] == expected[:BAD] + expected[BAD + 1 :]
            (alone,) = answers(engine, [requests[BAD]])
            assert str(alone) == message
    assert answers(engine, requests) == expected, "the engine does not go on"


def test_a_forward_that_fails_on_all_fails_them_all(make, clips, monkeypatch, kind):
    engine, requests = make(kind), batch(kind, clips)
    with monkeypatch.context() as patched:
        patched.setattr(engine.runner, "decode", lambda *args: 1 / 0)
        assert all(isinstance(error, ServingError) for error in answers(engine, requests))
    assert all(isinstance(tokens, list) for tokens in answers(engine, requests))


@pytest.mark.parametrize("seed", [0, 2])
def test_a_batch_that_is_too_large_is_run_in_parts(seed, kind, make, clips, tiny_engines, monkeypatch):
    """Memory that suffices for some rows and not for all of them: every answer comes, and is the same, sampled ones too."""
    engine, choose = make(kind), random.Random(seed)
    requests = [replace(request, temperature=choose.choice((0.0, 1.2))) for request in batch(kind, clips)]
    expected = [completion.token_ids for completion in tiny_engines[kind].generate(requests, seed=seed)]
    most = choose.randint(1, 3)
    for name in ("prefill", "decode"):
        forward = getattr(engine.runner, name)

        def limited(rows, *args, forward=forward):
            if len(rows) > most:
                raise torch.OutOfMemoryError("x")
            return forward(rows, *args)

        monkeypatch.setattr(engine.runner, name, limited)
    assert [completion.token_ids for completion in engine.generate(requests, seed=seed)] == expected


def test_a_piece_of_a_prompt_that_fails(make, clips, tiny_engines, monkeypatch):
    """In the midst of a long prompt, others before and behind it in the cache."""
    engine = make("code", max_batch_size=4, max_batch_tokens=12)
    requests = [Request(text, adapter="aa", max_new_tokens=6, ignore_eos=True) for text in ("x" * 5, "y" * 60, "z" * 40, "w" * 7)]
    expected = answers(tiny_engines["code"], requests)
    prefill = engine.runner.prefill

    def faulty(pieces, *args):
        if any(piece.encoded.prompt_ids == (pieces[0].encoded.prompt_ids[0],) * 60 and piece.start > 20 for piece in pieces):
            raise RuntimeError
        return prefill(pieces, *args)

    monkeypatch.setattr(engine.runner, "prefill", faulty)
    got = answers(engine, requests)
    assert isinstance(got[1], ServingError)
    assert [got[0], *got[2:]] == [expected[0], *expected[2:]]


# ------------------------------------------------------------------------------------------------------ poisoned adapters


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("family", ["flora", "lora"])
def test_weights_that_are_no_numbers_are_refused_while_serving(number, family, kind, make, checkpoints, clips, tiny_engines):
    engine, requests = make(kind), batch(kind, clips)
    adapter = read_adapter(checkpoints[kind].adapters["cc"][family])
    next(iter(adapter.factors.values()))[1][0, 0] = number
    with pytest.raises(AdapterError, match="adapter 'cc' has NaN or infinite weights on layer"):
        engine.bank.add("cc", [adapter])
    assert answers(engine, requests) == answers(tiny_engines[kind], requests), "the adapter of that name is not as it was"


def poison(engine: Engine, folder, factor: float) -> None:
    """An adapter of finite numbers so large that what is computed with them is not."""
    adapter = read_adapter(folder)
    factors = {layer: (A * factor, B * factor) for layer, (A, B) in adapter.factors.items()}
    engine.bank.add("poison", [replace(adapter, factors=factors)])


@pytest.mark.parametrize(("family", "method"), [("flora", "flora"), ("flora", "merged"), ("lora", "bmm-lora")])
def test_numbers_that_overflow_end_their_request_and_spoil_nobodys_row(
    family, method, kind, make, checkpoints, clips, tiny_engines
):
    engine, requests = make(kind, max_batch_size=5), batch(kind, clips, "poison")
    poison(engine, checkpoints[kind].adapters["cc"][family], 1e19)
    expected = answers(tiny_engines[kind], batch(kind, clips), method)
    for _ in range(2):  # the next ones get the poisoned row
        got = answers(engine, requests, method)
        assert isinstance(got[BAD], ServingError)
        assert "with adapter 'poison' the model's output is infinite or not a number" in str(got[BAD])
        assert [row for place, row in enumerate(got) if place != BAD] == expected[:BAD] + expected[BAD + 1 :]
        assert answers(engine, batch(kind, clips), method) == expected


def test_a_poisoned_prompt_in_pieces_leaves_a_clean_row(make, checkpoints, tiny_engines):
    engine = make("code", max_batch_size=2, max_batch_tokens=8)
    poison(engine, checkpoints["code"].adapters["cc"]["flora"], 1e19)
    bad = Request("p" * 50, adapter="poison", max_new_tokens=5)
    good = [Request(text, adapter="aa", max_new_tokens=20, ignore_eos=True) for text in ("a", "b" * 30, "c" * 3)]
    expected = answers(tiny_engines["code"], good)
    for order in ([bad, *good], [good[0], bad, *good[1:]], [bad, bad, *good]):
        got = answers(engine, order)
        assert [row for row in got if isinstance(row, list)] == expected
        assert sum(isinstance(row, ServingError) for row in got) == order.count(bad)


def test_what_a_request_leaves_in_its_row_never_reaches_the_next(make, tiny_engines, monkeypatch):
    """However large it is, at positions behind the answer's end."""
    engine = make("code", max_batch_size=2)
    requests = [Request(text, adapter="aa", max_new_tokens=12, ignore_eos=True) for text in ("a", "bc" * 12)]
    expected = answers(tiny_engines["code"], requests)
    decode = engine.runner.decode

    def leaving(tokens, positions, cache, first_row, serving):
        logits = decode(tokens, positions, cache, first_row, serving)
        for layer in cache.layers:  # a padded prompt writes there, too
            for place, position in enumerate(positions):
                layer.keys[first_row + place, :, position + 1 :] = 1e30
                layer.values[first_row + place, :, position + 1 :] = -1e30
        return logits

    monkeypatch.setattr(engine.runner, "decode", leaving)
    for _ in range(2):
        assert answers(engine, requests) == expected


# ---------------------------------------------------------------------------------------------------------------- others


def test_a_tokenizer_that_cannot_spell_an_answer_spells_the_others(make, tiny_engines, monkeypatch):
    engine = make("code")
    requests = [Request(text, adapter="aa", max_new_tokens=4, ignore_eos=True) for text in ("x", "yy", "z")]
    expected = answers(tiny_engines["code"], requests)
    decode, answer = engine._vocabulary.decode, [*engine.tokenizer("yy")["input_ids"], *expected[1]]

    def faulty(ids):
        if list(ids) == answer:
            raise OverflowError("out of range")
        return decode(ids)

    object.__setattr__(engine._vocabulary, "decode", faulty)
    got = answers(engine, requests)
    assert str(got[1]) == "the tokenizer could not decode the answer (OverflowError): try again"
    assert [got[0], got[2]] == [expected[0], expected[2]]


def test_a_cache_that_cannot_grow_refuses_the_request_that_needs_it(make, clips, tiny_engines, monkeypatch, kind):
    engine, requests = make(kind), batch(kind, clips)
    expected = answers(tiny_engines[kind], requests)
    cache_class = type(engine.runner.new_cache(1))
    reserve = cache_class.reserve

    def limited(cache, num_rows, num_positions):
        if num_rows > 2:
            raise torch.OutOfMemoryError("x")
        reserve(cache, num_rows, num_positions)

    with monkeypatch.context() as patched:
        patched.setattr(cache_class, "reserve", limited)
        got = answers(engine, requests)
        assert got[:2] == expected[:2]
        for error in got[2:]:
            assert str(error) == "there is no memory left for this request: shorten it, or try again later"
    assert answers(engine, requests) == expected


@pytest.mark.parametrize("method", ["flora", "bmm-lora", "merged"])
def test_requests_that_join_at_every_step(method, kind, make, clips, tiny_engines):
    """The next one is sent with each token of the first."""
    engine, requests = make(kind, max_batch_size=3), batch(kind, clips)
    first = replace(requests[2], max_new_tokens=30)
    expected = answers(tiny_engines[kind], [first, *requests], method)
    tickets = []
    for event in engine.submit(first, method):
        if isinstance(event, TokenEvent) and len(tickets) < len(requests):
            tickets.append(engine.submit(requests[len(tickets)], method))
        last = event
    assert last.completion.token_ids == expected[0]
    assert [ticket.result(PATIENCE_S).token_ids for ticket in tickets] == expected[1:]


def test_a_language_is_heard_for_each_clip_alone(tmp_path, clips):
    """A multilingual Whisper: clips that join later, in rows behind others."""
    folder = tiny_models.save_speech_model(tmp_path / "many", languages=tiny_models.LANGUAGES)
    engine = Engine.from_pretrained(folder, device="cpu", max_batch_size=3)
    requests = [Request(audio=clip, max_new_tokens=6 + place, ignore_eos=True) for place, clip in enumerate(clips)]
    alone = [engine.generate([request], "base")[0].token_ids for request in requests]
    assert answers(engine, requests, "base") == alone
    engine.close()


@pytest.mark.parametrize("kind", ["code", "speech"])
def test_static_shapes_are_few_and_change_no_token(kind, checkpoints, clips, tiny_engines):
    """Requests of many lengths that come and go: rows in powers of two, positions in multiples of 64, and the same tokens."""
    engine = checkpoints[kind].engine(static_shapes=True, max_batch_size=6)
    asked = [{"audio": clips[place % 4]} if kind == "speech" else {"prompt": "ab(" * (1 + place % 5)} for place in range(11)]
    most = engine.context_length - 20
    requests = [
        Request(**one, adapter=TAGS[place % 5], max_new_tokens=min(most, 1 + 7 * place), ignore_eos=True)
        for place, one in enumerate(asked)
    ]
    expected = [completion.token_ids for completion in tiny_engines[kind].generate(requests)]
    shapes, decode = set(), engine.model.forward

    def watched(*args, **inputs):
        ids = inputs["input_ids"] if kind == "code" else inputs["decoder_input_ids"]
        mask = inputs["attention_mask"] if kind == "code" else inputs["decoder_attention_mask"]
        if ids.shape[1] == 1 < mask.shape[-1]:  # and no prompt of one token
            shapes.add((ids.shape[0], mask.shape[-1]))
        return decode(*args, **inputs)

    engine.model.forward = watched
    try:
        assert [completion.token_ids for completion in engine.generate(requests)] == expected
    finally:
        engine.close(0)
    widths = {width for _, width in shapes}
    assert {rows for rows, _ in shapes} <= {1, 2, 4, 6} and len(shapes) < 4 * len(widths) + 1, shapes
    assert all(width % 64 == 0 or width == engine.context_length for width in widths), shapes


def test_what_a_failed_forward_held_is_gone_before_its_halves_are_tried(checkpoints, monkeypatch):
    """Where memory ran out, the halves need what the whole had taken: the error, and all that its frames hold, must not live on."""
    engine = checkpoints["code"].engine(capture_steps=False)
    decode, held = engine.runner.decode, []

    class Activations:
        pass

    def full(tokens, positions, cache, first_row, serving):
        assert all(one() is None for one in held), "what an earlier attempt took is still there"
        if len(tokens) > 1:
            taken = Activations()
            held.append(weakref.ref(taken))
            raise torch.OutOfMemoryError("the device is full")
        return decode(tokens, positions, cache, first_row, serving)

    monkeypatch.setattr(engine.runner, "decode", full)
    answers = engine.generate([Request(text, max_new_tokens=3) for text in ("a", "b", "c", "d")])
    assert len(held) > 1 and [len(answer.token_ids) for answer in answers] == [3] * 4
    engine.close(0)
