"""A running batch: what it tells of each token, when rows end or are cancelled, what it gives back, and what its clock says."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flora import Engine, Request
from flora.engine import FinishEvent, TokenEvent, core, generation, server
from flora.engine.runner import EncodedRequest
from flora.errors import ServingError

STOP = 0
PROMPTS = ("def a(", "x = [", "while", "a longer prompt than the others")
TAGS = ("aa", None, "cc", "bb")
LENGTHS = (4, 11, 7, 9)


def batch(**options) -> list[Request]:
    return [
        Request(prompt, adapter=tag, **{"max_new_tokens": length, "ignore_eos": True, **options})
        for prompt, tag, length in zip(PROMPTS, TAGS, LENGTHS, strict=True)
    ]


def run(running) -> list:
    events = []
    while not running.done:
        events += running.step()
    return events


def tokens_of(running) -> list[list[int]]:
    return [completion.token_ids for completion in running.completions]


def assert_nothing_pinned(engine: Engine) -> None:
    """Every slot can be had: as many adapters as there are slots find one."""
    assert not engine.bank._users


# ---------------------------------------------------------------------------------------------- a model that is a script


class ScriptedCache:
    """Which script stands in which row, and nothing else."""

    def __init__(self) -> None:
        self.scripts: dict[int, int] = {}

    def reserve(self, num_rows: int, num_positions: int) -> None:
        pass

    def move(self, source: int, target: int, length: int) -> None:
        self.scripts[target] = self.scripts[source]

    def step_shape(self, first_row: int, num_rows: int, width: int) -> tuple[int, int]:
        return num_rows, width


class ScriptedRunner:
    """Says, row by row, the tokens it was given, then the stop token for ever. A prompt is its row's number."""

    device = torch.device("cpu")
    context_length = 500
    reads_pieces = True

    def __init__(self, scripts: Sequence[Sequence[int]], clock=None, seconds: Sequence[float] = ()) -> None:
        self.scripts, self.clock, self.seconds = scripts, clock, list(seconds)

    def encode(self, request: Request) -> EncodedRequest:
        return EncodedRequest((int(request.prompt),))

    def cost(self, encoded: EncodedRequest) -> int:
        return 1

    def new_cache(self, max_rows: int, padding: str = "none") -> ScriptedCache:
        return ScriptedCache()

    def _logits(self, rows: list[int], places: list[int]) -> torch.Tensor:
        if self.clock:
            self.clock.now += self.seconds.pop(0)
        logits = torch.zeros(len(rows), 257)
        for position, (row, place) in enumerate(zip(rows, places, strict=True)):
            script = self.scripts[row]
            logits[position, script[place] if place < len(script) else STOP] = 9.0
        return logits

    def prefill(self, pieces, cache, first_row, serving):
        rows = [piece.encoded.prompt_ids[0] for piece in pieces]
        cache.scripts |= {first_row + place: row for place, row in enumerate(rows)}
        return self._logits(rows, [0] * len(rows))

    def decode(self, tokens, positions, cache, first_row, serving):
        return self._logits([cache.scripts[first_row + place] for place in range(len(tokens))], positions)


@pytest.fixture
def scripted(checkpoints):
    """scripts → an engine whose model says them."""

    def make(*scripts: Sequence[int], **options) -> Engine:
        engine = checkpoints["code"].engine("aa", capture_steps=False)
        engine.runner = ScriptedRunner(scripts, **options)
        return engine

    return make


def spell(tokenizer, text: str) -> list[int]:
    """The byte tokens of a text."""
    return tokenizer(text)["input_ids"]


# ----------------------------------------------------------------------------------------------------------------- events


@pytest.mark.parametrize("method", ["flora", "bmm-lora", "merged"])
def test_events_tell_the_completions_token_by_token(tiny_engines, method):
    engine = tiny_engines["code"]
    running = engine.start(batch(ignore_eos=False), method)
    assert running.phase == "prefill"
    first = running.step()
    assert sorted(event.index for event in first if isinstance(event, TokenEvent)) == [0, 1, 2, 3], (
        "a token per row from the prefill"
    )
    assert running.phase == "decode"
    events = first + run(running)
    for index, completion in enumerate(running.completions):
        own = [event for event in events if event.index == index]
        assert isinstance(own[-1], FinishEvent) and own[-1].completion == completion
        told = own[:-1]
        assert all(isinstance(event, TokenEvent) for event in told)
        assert [event.token_id for event in told] == completion.token_ids
        assert [event.num_new_tokens for event in told] == list(range(1, len(told) + 1))
        assert told[-1].text == completion.text.rstrip("\ufffd")
        assert not any(event.stopped for event in told)
        assert len(running.chosen_logits[index]) == len(completion.token_ids)
    assert running.step() == [], "a batch that is done does something"


def test_stream_numbers_events_by_the_whole_list(checkpoints, tiny_engines):
    engine = checkpoints["code"].engine(max_batch_size=3)
    events = list(engine.stream(batch()))
    for index, expected in enumerate(tiny_engines["code"].generate(batch())):
        own = [event for event in events if event.index == index]
        assert [event.token_id for event in own[:-1]] == expected.token_ids
        assert own[-1].completion.token_ids == expected.token_ids


def test_streaming_hands_out_tokens_as_they_come(tiny_engines):
    """The first event arrives after one forward, not after the last one."""
    engine = tiny_engines["code"]
    stream = engine.stream(batch())
    event = next(stream)
    assert isinstance(event, TokenEvent) and event.num_new_tokens == 1
    assert engine.snapshot().running == 4, "the batch is over"
    stream.close()


def test_the_stop_token_ends_the_text_though_ignore_eos_goes_on(scripted):
    engine = scripted([70, 71, STOP, 72, STOP, 73])
    free = Request("0", max_new_tokens=6, ignore_eos=True)
    events = list(engine.stream([free]))
    told = events[:-1]
    assert [event.token_id for event in told] == [70, 71, STOP, 72, STOP, 73] == events[-1].completion.token_ids
    assert [event.stopped for event in told] == [False, False, True, True, True, True]
    text = engine.tokenizer.decode([70, 71])
    assert [event.text for event in told] == [text[:1], text, text, text, text, text]
    (stopped,) = engine.generate([Request("0", max_new_tokens=6)])
    assert (stopped.token_ids, stopped.text, stopped.finish_reason) == ([70, 71], text, "stop")


def test_an_answer_that_stops_at_once_is_empty(scripted):
    engine = scripted([STOP], [70, 71])
    empty, other = engine.generate([Request("0", max_new_tokens=5), Request("1", max_new_tokens=2)])
    assert (empty.token_ids, empty.text, empty.finish_reason, empty.tpot_s) == ([], "", "stop", 0.0)
    assert (other.token_ids, other.finish_reason) == ([70, 71], "length")


# ------------------------------------------------------------------------------------------------------------------- text

MANY_BYTES = "naïve – £5, €7, 日本語, 🙂👍🏽, ∑ x²!"


def test_a_character_of_several_tokens_is_never_shown_broken(scripted):
    script = spell(scripted().tokenizer, MANY_BYTES)
    assert len(script) > len(MANY_BYTES), "the tokenizer does not split characters: the test shows nothing"
    engine = scripted(script)
    texts = []
    for event in engine.stream([Request("0", max_new_tokens=200)]):
        if isinstance(event, TokenEvent):
            assert "\ufffd" not in event.text, f"after {event.num_new_tokens} tokens: {event.text!r}"
            assert MANY_BYTES.startswith(event.text)
            texts.append(event.text)
        else:
            assert event.completion.text == MANY_BYTES
    assert texts[-1] == MANY_BYTES and set(MANY_BYTES[: n + 1] for n in range(len(MANY_BYTES))) == set(texts) - {""}


@settings(max_examples=30)
@given(
    text=st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufffd"), min_size=1, max_size=12),
    data=st.data(),
)
def test_text_that_is_still_coming_ends_before_an_unfinished_character(tiny_engines, text, data):
    tokenizer = tiny_engines["code"].tokenizer
    script = spell(tokenizer, text)
    length = data.draw(st.integers(1, len(script)))
    whole = text.encode()[:length].decode(errors="ignore")
    vocabulary = tiny_engines["code"]._vocabulary
    assert vocabulary.text_so_far(spell(tokenizer, "x = "), script[:length]) == whole


def test_the_space_that_an_answer_begins_with_is_kept(checkpoints, tmp_path):
    """A tokenizer in the manner of Llama-2's, whose decoder drops the first space of whatever it is given."""
    symbols = ["<|endoftext|>", *"▁defnumix(:)=1\n", "é"]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    folder = shutil.copytree(checkpoints["llama"].model, tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    engine = Engine.from_pretrained(folder, device="cpu")
    prompt, answer = "def num(x):", "  num = x\n    é = 1"
    prompt_ids = engine.tokenizer(prompt)["input_ids"]
    token_ids = [symbols.index(symbol) for symbol in answer.replace(" ", "▁")]
    assert engine.tokenizer.decode(token_ids) == answer[1:], "this tokenizer drops nothing: the test shows nothing"
    for length in range(len(token_ids) + 1):
        assert engine._vocabulary.text(prompt_ids, token_ids[:length]) == answer[:length]
    (completion,) = engine.generate([Request(prompt, max_new_tokens=9, ignore_eos=True)])
    whole = engine.tokenizer.decode([*prompt_ids, *completion.token_ids], skip_special_tokens=True)
    assert prompt + completion.text == whole


# --------------------------------------------------------------------------------------------------------- cancel, close


@pytest.mark.parametrize("method", ["flora", "bmm-lora", "merged"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_cancelling_a_row_leaves_the_others_as_they_are(tiny_engines, method, steps):
    engine = tiny_engines["code"]
    whole = engine.start(batch(), method)
    run(whole)
    expected = tokens_of(whole)
    running = engine.start(batch(), method)
    for _ in range(steps):
        running.step()
    (event,) = running.cancel(1)
    assert (event.index, event.completion.finish_reason) == (1, "cancelled")
    assert event.completion.token_ids == expected[1][:steps]
    assert running.cancel(1) == [], "a row is cancelled twice"
    later = run(running)
    assert all(event.index != 1 for event in later), "a cancelled row goes on"
    assert [row for place, row in enumerate(tokens_of(running)) if place != 1] == [expected[0], expected[2], expected[3]]
    assert [completion.finish_reason for completion in running.completions] == ["length", "cancelled", "length", "length"]
    assert_nothing_pinned(engine)


@pytest.mark.parametrize("method", ["flora", "merged"])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_cancelling_all_ends_the_batch_and_gives_its_slots_back(tiny_engines, method, steps):
    engine = tiny_engines["code"]
    expected = [completion.token_ids for completion in engine.generate(batch(), method)]
    running = engine.start(batch(), method)
    for _ in range(steps):
        running.step()
    events = running.cancel()
    assert sorted(event.index for event in events) == [index for index in range(4) if LENGTHS[index] > steps]
    assert running.done and running.step() == [] and running.cancel() == []
    for completion, tokens, length in zip(running.completions, expected, LENGTHS, strict=True):
        assert completion.token_ids == tokens[:steps]
        assert completion.finish_reason == ("cancelled" if length > steps else "length")
    assert_nothing_pinned(engine)


def test_phase_of_a_merged_batch_whose_first_group_is_cancelled(tiny_engines):
    running = tiny_engines["code"].start(batch(), "merged")
    running.cancel(0)
    assert running.phase == "prefill"
    running.step()
    assert running.phase == "decode"
    running.cancel()


@pytest.mark.parametrize("how", ["stream closed", "generation closed", "generation forgotten", "forward fails"])
def test_a_batch_given_up_gives_its_slots_back(checkpoints, how, monkeypatch):
    engine = checkpoints["code"].engine(capture_steps=False)
    if how == "stream closed":
        stream = engine.stream(batch(max_new_tokens=40))
        next(stream)
        assert engine.snapshot().running
        stream.close()
        engine.close()  # waits for the engine's thread
    elif how == "forward fails":
        monkeypatch.setattr(engine.runner, "decode", lambda *args: 1 / 0)
        with pytest.raises(ServingError, match=r"the model failed on this request with adapter 'aa' \(ZeroDivisionError\)"):
            engine.generate(batch())
        engine.close()
    else:
        running = engine.start(batch())
        running.step()
        assert engine.snapshot().batch == {"aa": 1, "bb": 1, "cc": 1, None: 1}
        if how == "generation closed":
            running.close()
            running.close()  # a second time does nothing
        else:
            del running
            gc.collect()
    assert engine.snapshot().running == 0
    assert_nothing_pinned(engine)


def test_a_refused_request_pins_nothing(tiny_engines):
    engine = tiny_engines["code"]
    with pytest.raises(ValueError, match="unknown adapter"):
        engine.start([*batch(), Request("x", adapter="zz")])
    assert_nothing_pinned(engine)


def test_finished_rows_are_dropped_from_the_forward(checkpoints, monkeypatch):
    """Only rows that still run are computed, over no more positions than they have."""
    engine = checkpoints["code"].engine(capture_steps=False)
    shapes, decode = [], engine.runner.decode

    def watched(tokens, positions, cache, first_row, serving):
        shapes.append((len(tokens), max(positions) + 1))
        return decode(tokens, positions, cache, first_row, serving)

    monkeypatch.setattr(engine.runner, "decode", watched)
    short, long = Request("a" * 40, max_new_tokens=2, ignore_eos=True), Request("b", max_new_tokens=6, ignore_eos=True)
    (_, alone) = engine.generate([short, long])
    assert shapes == [(2, 41), (1, 3), (1, 4), (1, 5), (1, 6)], "(rows, positions attended to) of each decode forward"
    assert alone.token_ids == engine.generate([long])[0].token_ids


# ------------------------------------------------------------------------------------------------------------------- time


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for module in (core, generation, server):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_times_of_answers_that_end_apart(scripted, clock):
    """A prefill of 5 s, then decode steps of 1, 2, 3 and 4 s."""
    engine = scripted([70, 71, 72, 73, 74], [70, 71], [70], [STOP], clock=clock, seconds=(5, 1, 2, 3, 4))
    full, stopped, short, empty = engine.generate([Request(str(row), max_new_tokens=5) for row in range(4)])
    assert [completion.ttft_s for completion in (full, stopped, short, empty)] == [5.0] * 4
    assert full.tpot_s == (1 + 2 + 3 + 4) / 4
    assert (stopped.finish_reason, stopped.tpot_s) == ("stop", 1.0), "the step that brings the stop token brings no token"
    assert (short.tpot_s, empty.tpot_s) == (0.0, 0.0), "no further token, no time per further token"


def test_times_of_a_cancelled_answer(scripted, clock):
    engine = scripted([70, 71, 72, 73], clock=clock, seconds=(5, 1, 2, 3))
    running = engine.start([Request("0", max_new_tokens=4)])
    for _ in range(3):
        running.step()
    clock.now += 50
    (event,) = running.cancel()
    assert (event.completion.ttft_s, event.completion.tpot_s) == (5.0, 1.5)


def test_the_clock_starts_with_the_first_step(scripted, clock):
    engine = scripted([70], clock=clock, seconds=(5,))
    running = engine.start([Request("0", max_new_tokens=1)])
    clock.now += 50
    running.step()
    assert running.completions[0].ttft_s == 5.0
