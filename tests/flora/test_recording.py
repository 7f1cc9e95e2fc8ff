"""Recorded decode steps answer like the steps themselves, whoever joins, leaves or is replaced; what cannot be runs as ever."""

from __future__ import annotations

import logging
import random
import time

import pytest
import torch
from torch.nn.functional import dropout, linear, relu

from flora import Engine, Request, ops
from flora.engine import recording, server
from flora.engine.recording import RecordedCapture, Recording
from flora.errors import ServingError

TAGS = ("aa", None, "cc", "aa", "bb")


def capture(function, *of_batch: torch.Tensor) -> Recording:
    with torch.inference_mode():
        return RecordedCapture()(function, of_batch)


def replay(recorded: Recording) -> torch.Tensor:
    with torch.inference_mode():
        return recorded.replay()


# --------------------------------------------------------------------------------------------------- calls, one by one


def test_what_is_read_at_each_step_is_read_where_it_lies():
    x, weight = torch.randn(3, 5), torch.randn(7, 5)
    recorded = capture(lambda: relu(linear(x.view(3, 1, 5), weight)).sum(1))
    for _ in range(2):
        x.normal_()
        weight.normal_()
        assert torch.equal(replay(recorded), relu(x @ weight.T).view(3, 1, 7).sum(1))


def test_writing_in_place_is_repeated():
    kept, x, places = torch.zeros(6, 2), torch.randn(2, 2), torch.tensor([1, 4])

    def write():
        kept.index_copy_(0, places, x)
        kept[0] = x[1]
        mask = torch.zeros(6).masked_fill_(places[0] == torch.arange(6), -1.0)
        out = torch.empty(6, 2)
        torch.add(kept, mask[:, None], out=out)
        out += 1
        return out * 2

    recorded = capture(write)
    for new in ([0, 5], [3, 2]):
        kept.zero_(), x.normal_(), places.copy_(torch.tensor(new))
        y = replay(recorded)
        expected = torch.zeros(6, 2)
        expected[new], expected[0] = x, x[1]
        assert torch.equal(kept, expected)
        mask = torch.zeros(6)
        mask[new[0]] = -1.0
        assert torch.equal(y, (expected + mask[:, None] + 1) * 2)


def test_what_the_batch_alone_changes_is_made_once_a_batch():
    factors, slots, x = torch.randn(4, 3), torch.tensor([1, 2]), torch.randn(2, 3)
    recorded = capture(lambda: (factors.index_select(0, slots) * 2 * x).sum(0), factors, slots)
    x.normal_()
    expected = (factors[[1, 2]] * 2 * x).sum(0)
    assert torch.equal(replay(recorded), expected)
    slots.copy_(torch.tensor([3, 0]))
    assert torch.equal(replay(recorded), expected), "it was gathered anew though nobody said that the batch had changed"
    recorded.forget_batch()
    assert torch.equal(replay(recorded), (factors[[3, 0]] * 2 * x).sum(0))


def test_what_is_written_into_is_made_at_each_step():
    factors, x = torch.randn(2, 3), torch.randn(2, 3)

    def modulated():
        return (factors * 2).mul_(x)

    recorded = capture(modulated, factors)
    for _ in range(3):
        assert torch.equal(replay(recorded), factors * 2 * x)


def test_factors_that_are_too_large_are_not_kept(monkeypatch):
    monkeypatch.setattr(recording, "KEPT_BYTES", 20)
    factors, slots, x = torch.randn(4, 3), torch.tensor([1, 2]), torch.randn(2, 3)
    recorded = capture(lambda: factors.index_select(0, slots) * x, factors, slots)
    slots.copy_(torch.tensor([3, 0]))
    assert torch.equal(replay(recorded), factors[[3, 0]] * x)


def test_several_results_constants_and_what_comes_back_as_it_was():
    x = torch.randn(2, 6)

    def split():
        left, middle, _ = dropout(x, 0.5, training=False).contiguous().split([2, 2, 2], dim=-1)
        largest, where = middle.max(-1)
        return torch.cat([left, largest[:, None], where[:, None] + torch.arange(2)], dim=-1)

    recorded = capture(split)
    x.normal_()
    assert torch.equal(replay(recorded), split())


def test_results_that_nobody_reads_any_more_make_room():
    """A step of a large model would else hold all of its layers' activations at once."""
    x, most = torch.ones(1000), 0

    class Counting(torch.overrides.TorchFunctionMode):
        alive: set = set()

        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal most
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                import weakref

                self.alive.add(id(result))
                weakref.finalize(result, self.alive.discard, id(result))
                most = max(most, len(self.alive))
            return result

    def chain():
        y = x
        for _ in range(50):
            y = y + 1
        return y

    recorded = capture(chain)
    with Counting():
        assert replay(recorded)[0] == 51
    assert most <= 3


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: int(x.sum()),
        lambda x: float(x.sum()),
        lambda x: [1, 2, 3][x.abs().sum().long().clamp_max(2)],
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: torch.equal(x, x),
        lambda x: x.sum() in (1, 2),
    ],
    ids=["item", "bool", "int", "float", "index", "tolist", "numpy", "equal", "in"],
)
def test_reading_values_is_refused(read):
    x = torch.randn(4)

    def function():
        read(x * 1)
        return x + 1

    with pytest.raises(RuntimeError, match="reads a tensor's values"):
        capture(function)


# ------------------------------------------------------------------------------------------------------- whole engines


@pytest.fixture
def engine_of(checkpoints):
    """architecture, tags, options → an engine on the CPU, and the `DecodeGraphs` of all its cores."""
    engines = []

    def make(name: str = "code", *tags: str, **options) -> tuple[Engine, list]:
        engine, made = checkpoints[name].engine(*tags, **options), []
        make_core = engine._make_core

        def noting(*arguments, **named):
            core = make_core(*arguments, **named)
            made.append(core.graphs)
            return core

        engine._server._make_core = lambda method: noting(
            method, max_rows=engine.max_batch_size, max_batch_tokens=engine.max_batch_tokens
        )
        engine._make_core = noting
        engines.append(engine)
        return engine, made

    yield make
    for engine in engines:
        engine.close(0)
        assert not engine.bank._users


@pytest.fixture(scope="module")
def plain(checkpoints):
    """architecture → an engine whose steps are never captured."""
    engines: dict[str, Engine] = {}

    def get(name: str = "code") -> Engine:
        if name not in engines:
            engines[name] = checkpoints[name].engine(capture_steps=False)
        return engines[name]

    yield get
    for engine in engines.values():
        engine.close(0)


def asked(name: str, clips, tags=TAGS) -> list[Request]:
    """Rows of every kind, two adapters of other ranks, one of them twice, and none; they leave at different steps."""
    what = [{"audio": clips[place % 4]} if name == "speech" else {"prompt": "ab(" * (1 + place)} for place in range(len(tags))]
    return [
        Request(**one, adapter=tag, max_new_tokens=8 + 2 * place, ignore_eos=True)
        for place, (one, tag) in enumerate(zip(what, tags, strict=True))
    ]


def tokens(engine: Engine, requests: list[Request], method: str) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(requests, method)]


@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize("name", ["code", "speech"])
def test_every_method_answers_as_without(name, method, engine_of, plain, clips):
    engine, made = engine_of(name)
    requests = asked(name, clips, ("aa", "cc", "aa") if method == "merged" else TAGS)
    assert tokens(engine, requests, method) == tokens(plain(name), requests, method)
    assert made[0].failure is None and made[0].num_replayed > made[0].num_captured > 0


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_other_models(name, engine_of, plain, clips):
    engine, made = engine_of(name)
    requests = asked(name, clips)
    for method in ("flora", "bmm-lora"):
        assert tokens(engine, requests, method) == tokens(plain(name), requests, method)
    assert all(graphs.failure is None and graphs.num_replayed for graphs in made)


def test_what_was_captured_serves_the_next_requests(engine_of, plain, clips):
    """Other adapters of the same ranks in other rows: nothing is captured anew, nothing stale is answered."""
    engine, made = engine_of("code", "aa", "bb", "cc")
    for tags in (("aa", "aa", None), ("bb", "bb", None), (None, None, "aa")):
        requests = [Request("ab(", adapter=tag, max_new_tokens=12, ignore_eos=True) for tag in tags]
        for _ in range(2):
            captured = made[0].num_captured if made else 0
            assert tokens(engine, requests, "bmm-lora") == tokens(plain(), requests, "bmm-lora")
        assert made[0].num_captured == captured, "the same batch a second time was captured a second time"
    assert len(made) == 1


@pytest.mark.parametrize("method", ["flora", "bmm-lora"])
def test_fewer_adapters_for_as_many_rows(method, engine_of, plain, caplog):
    """No forward fails on the way: one that did would be tried again in halves, and answer all the same."""
    engine, made = engine_of("code", "aa", "bb", max_batch_size=3)
    for tags in (("aa", "bb", "aa"), ("aa", "aa", "aa"), ("bb", "aa", "aa")):
        requests = [Request("ab(", adapter=tag, max_new_tokens=12, ignore_eos=True) for tag in tags]
        assert tokens(engine, requests, method) == tokens(plain(), requests, method)
    assert made[0].failure is None and not caplog.records


def test_an_adapter_replaced_while_others_are_served(engine_of, plain, checkpoints):
    engine, made = engine_of("code", "aa", "bb")
    request = Request("ab(", adapter="aa", max_new_tokens=12, ignore_eos=True)
    tokens(engine, [request], "bmm-lora")
    engine.add_adapter("aa", list(checkpoints["code"].adapters["bb"].values()))
    expected = tokens(plain(), [Request("ab(", adapter="bb", max_new_tokens=12, ignore_eos=True)], "bmm-lora")
    assert tokens(engine, [request], "bmm-lora") == expected
    assert made[0].num_replayed


@pytest.mark.parametrize("method", ["flora", "bmm-lora", "loop-lora"])
def test_requests_that_come_and_go_as_they_like(method, engine_of, plain):
    """Forty requests of random lengths, a few at a time, with adapters of all ranks: each answers as if it were alone."""
    engine, made = engine_of(max_batch_size=5)
    generator = random.Random(7)
    lengths, tags = generator.choices(range(1, 25), k=40), generator.choices(TAGS, k=40)
    requests = [
        Request("xyz("[place % 4 :], adapter=tag, max_new_tokens=length, ignore_eos=True)
        for place, (length, tag) in enumerate(zip(lengths, tags, strict=True))
    ]
    tickets = [engine.submit(request, method) for request in requests]
    answers = [ticket.result(60).token_ids for ticket in tickets]
    assert answers == [tokens(plain(), [request], method)[0] for request in requests]
    assert all(graphs.failure is None for graphs in made) and sum(graphs.num_replayed for graphs in made) > 0


def test_a_row_that_goes_wrong_in_a_replay_ends_alone(engine_of, plain):
    engine, made = engine_of("code", "aa", "bb")
    fine, spoiled = (Request("ab(", adapter=tag, max_new_tokens=80, ignore_eos=True) for tag in ("aa", "bb"))
    with engine.exclusive():
        tickets = [engine.submit(request, "bmm-lora") for request in (fine, spoiled)]
    end = time.perf_counter() + 60
    while len(tickets[1].token_ids) < 20:
        assert time.perf_counter() < end
        time.sleep(0.001)
    with engine.exclusive():
        assert made[0].num_replayed > 5
        (core,) = engine._server.cores
        for name in engine.bank.layers:
            engine.bank.stack("lora", name).B[core.running[1].slot] = torch.nan
        core._decode_serving = None  # as if somebody had come
    assert tickets[0].result(60).token_ids == tokens(plain(), [fine], "bmm-lora")[0]
    with pytest.raises(ServingError, match="'bb' the model's output is infinite or not a number"):
        tickets[1].result(60)
    assert made[0].failure is None


def test_a_model_that_goes_by_more_than_shapes_is_found_out(engine_of, plain, monkeypatch, caplog):
    """Python of its own counts the steps: a recording would repeat one of them for ever."""
    engine, made = engine_of("code", "aa")
    steps = iter(range(1000))
    head = engine.model.get_output_embeddings()
    head.register_forward_hook(lambda module, given, logits: logits.roll(next(steps) % 7, -1))
    request = Request("ab(", adapter="aa", max_new_tokens=20, ignore_eos=True)
    with caplog.at_level(logging.WARNING):
        answer = tokens(engine, [request], "flora")
    assert "differ" in made[0].failure and "could not be captured" in caplog.text and made[0].num_replayed == 1
    assert len(answer[0]) == 20


def test_a_model_that_reads_values_runs_as_ever(engine_of, caplog):
    engine, made = engine_of("code", "aa")
    head = engine.model.get_output_embeddings()
    head.register_forward_hook(lambda module, given, logits: logits * float(logits.isfinite().all()))
    request = Request("ab(", adapter="aa", max_new_tokens=9, ignore_eos=True)
    assert len(tokens(engine, [request], "flora")[0]) == 9
    assert "reads a tensor's values" in made[0].failure and made[0].num_captured == 0


def test_merged_weights_are_let_go_with_their_batch(engine_of):
    engine, made = engine_of("code", "aa")
    tokens(engine, [Request("ab(", adapter="aa", max_new_tokens=20, ignore_eos=True)], "merged")
    assert made[0].num_replayed and not any(not isinstance(graph, int) for graph in made[0]._graphs.values())


def test_a_method_that_nobody_asks_for_keeps_nothing(engine_of, monkeypatch):
    monkeypatch.setattr(server, "IDLE_S", 0.1)
    engine, _ = engine_of("code", "aa")
    tokens(engine, [Request("ab(", max_new_tokens=2, ignore_eos=True)], "base")
    busy = [Request("ab(", adapter="aa", max_new_tokens=60, ignore_eos=True)]
    end = time.perf_counter() + 30
    while {core.method for core in engine._server.cores} != {"flora"}:
        assert time.perf_counter() < end
        tokens(engine, busy, "flora")


def test_quantised_layers_are_not_captured(checkpoints):
    """Only such a layer itself knows what it does."""
    engine = checkpoints["code"].engine("aa", quantize="nf4")
    generation = engine.start([Request("ab(", adapter="aa", max_new_tokens=8, ignore_eos=True)], "flora")
    graphs = generation.core.graphs
    while not generation.done:
        generation.step()
    assert graphs.num_captured == 0 and graphs.failure is None
    engine.close(0)


def test_steps_are_captured_where_they_can_be(checkpoints):
    for options, expected in (({}, True), ({"static_shapes": True}, True), ({"capture_steps": False}, False)):
        engine = checkpoints["code"].engine(**options)
        core = engine._make_core("flora", 4, 512)
        assert engine.capture_steps == expected == (core.graphs is not None)
        assert core.cache.padding == ("rows and positions" if options.get("static_shapes") else "positions" if expected else "none")
        engine.close(0)
