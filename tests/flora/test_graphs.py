"""The decode step as a graph: what is recorded once answers like the step itself, and nothing stale is ever replayed.

There is no CUDA graph on a CPU: `strict_capture` stands in for it.
"""

from __future__ import annotations

import itertools
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from strict_capture import AsStrictAsCuda, strict_engines
from torch import nn

from flora import Engine, Request, backend, ops
from flora.bank import BatchServing
from flora.engine.graphs import StaticServing, needs_of
from flora.engine.runner import PromptPiece
from flora.layers import AdaptedLinear, LayerPlan, ServingHolder


@pytest.fixture
def recording(checkpoints):
    with strict_engines(checkpoints) as make:
        yield make


def code_requests(num_tokens: int = 9) -> list[Request]:
    """Rows of every kind: two adapters of other ranks, one of them twice, and none; they leave at different steps."""
    tags = ("aa", None, "cc", "aa", "bb")
    return [
        Request(prompt=text, adapter=tag, max_new_tokens=num_tokens + place, ignore_eos=True)
        for place, (text, tag) in enumerate(zip(("a", "bc" * 5, "def", "g" * 12, "hi"), tags, strict=True))
    ]


def speech_requests(clips) -> list[Request]:
    return [
        Request(audio=clip, sampling_rate=16000, adapter=tag, max_new_tokens=6, ignore_eos=True)
        for clip, tag in zip(clips, ("aa", None, "cc", "aa"), strict=True)
    ]


def tokens_of(engine: Engine, requests: list[Request], method: str) -> list[list[int]]:
    """Each request's tokens, of a batch stepped to its end."""
    generation = engine.start(requests, method)
    while not generation.done:
        generation.step()
    return [completion.token_ids for completion in generation.completions]


@pytest.mark.parametrize("method", ["flora", "flora-expand", "flora-modulate", "bmm-lora", "base"])
@pytest.mark.parametrize("kind", ["code", "speech"])
def test_a_replayed_step_answers_like_the_step_itself(kind, method, recording, clips, tiny_engines):
    """Rows leave, and those that stay are captured in a smaller shape; spare rows change nothing."""
    engine, made = recording(kind)
    requests = code_requests() if kind == "code" else speech_requests(clips)
    assert tokens_of(engine, requests, method) == tokens_of(tiny_engines[kind], requests, method)
    assert made[0].failure is None and made[0].num_replayed > made[0].num_captured > 0


@pytest.mark.parametrize("method", ["loop-lora", "sgmv-lora", "mixed", "merged"])
def test_what_cannot_be_captured_runs_as_ever(method, recording, tiny_engines):
    engine, made = recording()
    requests = [request for request in code_requests(3) if request.adapter is not None]
    assert tokens_of(engine, requests, method) == tokens_of(tiny_engines["code"], requests, method)
    assert made and not any(own.num_captured for own in made)


@pytest.mark.parametrize("method", ["flora", "flora-modulate", "sgmv-lora"])
def test_the_kernels_are_captured_and_take_other_batches_of_their_shape(method, monkeypatch):
    """One layer: rows change places, and the adapter of one becomes another's."""
    from kernels_on_cpu import DEVICE, kernels

    monkeypatch.setattr(backend, "kernels_on", lambda device_type: kernels)
    torch.manual_seed(0)
    layers = {"mlp": AdaptedLinear(nn.Linear(16, 24).to(DEVICE), "mlp", ServingHolder())}
    A, B, x = (torch.randn(*shape, device=DEVICE) for shape in ((4, 3, 16), (4, 3, 24), (4, 1, 16)))

    def serving(slots: list[int]) -> EachLayer:
        return EachLayer(method, {"mlp": LayerPlan(A, B, ops.route(slots, [0, 1, 3, 3], 3, DEVICE))})

    with torch.inference_mode():
        static = StaticServing(serving([1, 0, 2, 3]), layers)
        layers["mlp"].holder.current = static
        captured = AsStrictAsCuda()(lambda: layers["mlp"](x))
        own = needs_of(static, layers)
        for slots in ([3, 2, 0, 1], [0, 3, 1, 2]):
            other = serving(slots)
            needs = needs_of(other, layers)
            assert needs.layout == own.layout and needs.addresses == own.addresses
            for place, new in zip(own.numbers, needs.numbers, strict=True):
                place.copy_(new)
            y = captured.replay()
            layers["mlp"].holder.current = other
            max_diff = (y - layers["mlp"](x)).abs().max().item()
            assert max_diff < 1e-6, f"max_diff {max_diff:.3g}"


@dataclass
class EachLayer:
    method: str
    plans: dict[str, LayerPlan]

    def plan(self, layer: str) -> LayerPlan:
        return self.plans[layer]


# ----------------------------------------------------------------------------------------------------- nothing stale


class Steps:
    """One engine's decode steps, made by hand: a prompt in each row, then token after token."""

    def __init__(self, engine: Engine, tags, method: str = "flora", max_rows: int = 8) -> None:
        self.engine, self.method = engine, method
        self.slots = [engine.bank.pin_now(tag, method) for tag in tags]
        self.core = engine._make_core(method, max_rows, 512)
        self.cache, self.graphs, self.runner = self.core.cache, self.core.graphs, engine.runner
        self.serving = engine.bank.arrange(self.slots, method)
        self.cache.reserve(len(tags), 32)
        hum = np.sin(np.arange(8000) / 9)
        asked = Request(audio=hum, sampling_rate=16000) if engine.kind == "speech" else Request(prompt="ab")
        encoded = engine.runner.encode(asked)
        self.position = len(encoded.prompt_ids)
        with torch.inference_mode():
            engine.runner.prefill([PromptPiece(encoded, 0, self.position)] * len(tags), self.cache, 0, self.serving)
        self.servings: dict[int, BatchServing] = {}  # of fewer rows

    @torch.inference_mode()
    def step(self, num_rows: int | None = None) -> str:
        """One step, and what it was: "ran", "captured" or "replayed". Its logits are those of the step itself, or this fails.

        num_rows: only of the first ones.
        """
        n, serving = len(self.slots), self.serving
        if num_rows is not None:
            n = num_rows
            serving = self.servings.setdefault(n, self.engine.bank.arrange(self.slots[:n], self.method))
        arguments = ([self.position + place for place in range(n)], [self.position] * n, self.cache, 0, serving)
        captured, replayed = self.graphs.num_captured, self.graphs.num_replayed
        logits = self.graphs.decode(*arguments).clone()
        expected = self.runner.decode(*arguments)
        max_diff = (logits - expected).abs().max().item()
        assert max_diff < 1e-5, f"max_diff {max_diff:.3g}"
        self.position += 1
        if self.graphs.num_captured > captured:
            return "captured"
        return "replayed" if self.graphs.num_replayed > replayed else "ran"


def test_first_it_runs_then_it_is_captured_then_replayed(recording):
    steps = Steps(recording()[0], ["aa", None])
    assert [steps.step() for _ in range(4)] == ["ran", "captured", "replayed", "replayed"]


@pytest.mark.parametrize("kind", ["code", "speech"])
def test_steps_of_several_row_counts_take_turns(kind, recording):
    """A step of one shape leaves nothing behind that a captured step of another shape reads, and takes nothing away."""
    steps = Steps(recording(kind)[0], ["aa", None, "cc", "aa"])
    for num_rows in (4, 2, 1):
        assert [steps.step(num_rows) for _ in range(3)] == ["ran", "captured", "replayed"]
    assert [steps.step(num_rows) for num_rows in (4, 1, 2, 4)] == ["replayed"] * 4


def test_more_positions_in_sight_are_another_shape(recording):
    steps = Steps(recording()[0], ["aa", None])
    steps.cache.reserve(2, 128)
    for _ in range(3):
        steps.step()
    steps.position = 64
    assert [steps.step() for _ in range(3)] == ["captured", "replayed", "replayed"], "rows that lasted until now will be there"


def test_layers_that_differ_are_told_apart_however_alike_their_layouts():
    """An adapter that leaves out one of two layers: each has numbers of its own then, and a graph must copy both."""
    layers = {name: AdaptedLinear(nn.Linear(16, 24), name, ServingHolder()) for name in ("up", "down")}
    A, B = torch.randn(3, 1, 16), torch.randn(3, 1, 24)
    one, other = (LayerPlan(A, B, ops.route(slots, [0, 1, 1], 1)) for slots in ([1, 0], [0, 2]))
    assert one.routing.layout("bmm-lora") == other.routing.layout("bmm-lora")
    alike = needs_of(EachLayer("bmm-lora", {"up": one, "down": one}), layers)
    different = needs_of(EachLayer("bmm-lora", {"up": one, "down": other}), layers)
    assert alike.layout != different.layout
    assert len(alike.numbers) == 1 and len(different.numbers) == 2


def test_another_batch_of_the_same_layout_is_replayed(recording):
    """Two rows change places, and with them their adapters; the rows' numbers are copied, not captured anew."""
    engine, _ = recording()
    steps = Steps(engine, ["aa", "cc"], "bmm-lora")
    for _ in range(2):
        steps.step()
    slots = {tag: engine.bank.pin_now(tag, "bmm-lora") for tag in ("aa", "cc")}
    steps.serving = engine.bank.arrange([slots["cc"], slots["aa"]], "bmm-lora")
    assert steps.step() == "replayed"
    # Other ranks are another layout.
    steps.serving = engine.bank.arrange([slots["cc"], slots["cc"]], "bmm-lora")
    assert [steps.step() for _ in range(3)] == ["ran", "captured", "replayed"]


@pytest.mark.parametrize("grows", ["rows", "positions"])
def test_a_cache_that_has_grown_is_captured_anew(grows, recording):
    steps = Steps(recording()[0], ["aa", None])
    for _ in range(3):
        steps.step()
    steps.cache.reserve(*((6, 32) if grows == "rows" else (2, 100)))
    assert [steps.step() for _ in range(3)] == ["ran", "captured", "replayed"]


def test_a_bank_that_has_grown_is_captured_anew(recording, checkpoints):
    """An adapter of a larger rank moves every layer's factors."""
    engine, _ = recording("code", "aa")
    steps = Steps(engine, ["aa", None])
    for _ in range(3):
        steps.step()
    before = engine.bank.stack("flora", next(iter(engine.bank.layers))).A.data_ptr()
    engine.add_adapter("cc", [checkpoints["code"].adapters["cc"]["flora"]])
    engine.bank.pin_now("cc", "flora")
    assert engine.bank.stack("flora", next(iter(engine.bank.layers))).A.data_ptr() != before
    assert steps.step() == "replayed", "this batch still has the factors it was arranged with"
    steps.serving = engine.bank.arrange(steps.slots, "flora")
    assert [steps.step() for _ in range(3)] == ["ran", "captured", "replayed"]


def test_a_step_that_cannot_be_captured_is_told_of_and_runs(recording, caplog):
    steps = Steps(recording()[0], ["aa", None])

    class Fails(AsStrictAsCuda):
        def __call__(self, function, of_batch=()):
            raise RuntimeError("operation not permitted when stream is capturing")

    steps.graphs._capture = Fails()
    assert [steps.step() for _ in range(4)] == ["ran"] * 4
    assert "not permitted" in steps.graphs.failure
    assert len(caplog.records) == 1 and "could not be captured" in caplog.text


def test_only_the_graphs_used_last_are_kept(recording, monkeypatch):
    monkeypatch.setattr(AsStrictAsCuda, "most", 2)
    engine, _ = recording()
    steps = Steps(engine, ["aa", "aa"])
    one = steps.serving
    others = [engine.bank.arrange([steps.slots[0], 0], "flora"), engine.bank.arrange([0, 0], "flora")]
    for steps.serving in (one, *others):
        assert [steps.step() for _ in range(2)] == ["ran", "captured"]
    assert steps.step() == "replayed"
    steps.serving = one
    assert steps.step() == "ran"


def test_a_bias_that_an_adapter_changes_is_copied_too(recording):
    """An adapter may scale a layer's output after its bias: rows with it and rows without it change places."""
    engine, _ = recording("code", "aa")
    steps = Steps(engine, ["aa", None], "bmm-lora")
    name = next(name for name, layer in engine.bank.layers.items() if layer.bias is not None)
    slot = steps.slots[0]
    bias = engine.bank.layers[name].bias
    engine.bank.stack("lora", name).biases[slot] = bias + torch.linspace(-1, 1, len(bias))
    for slots in ([slot, 0], [0, slot]):
        steps.serving = engine.bank.arrange(slots, "bmm-lora")
        seen = [steps.step() for _ in range(3)]
    assert seen == ["replayed"] * 3


@pytest.mark.parametrize("form", ["flora-expand", "flora-modulate", "bmm-lora"])
def test_layouts_say_all_that_is_not_in_the_numbers(form):
    """Two routings of one layout: the numbers of one, copied over the other's, make it serve the other's batch."""
    torch.manual_seed(0)
    ranks = [0, 2, 2, 1, 1]
    A, B = torch.randn(2, 5, 2, 3, dtype=torch.float64).unbind()
    A[0, 0] = B[0, 0] = 1.0  # the identity adapter
    x, weight = torch.randn(5, 1, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    seen = {}
    num_pairs = 0
    for slots in itertools.product(range(5), repeat=5):
        routing = ops.route(slots, ranks, 2)
        layout = routing.layout(form)
        if layout not in seen:
            seen[layout] = routing
        elif slots[0] == slots[2] or slots[4] == 3:  # some hundred of them
            other = deepcopy(seen[layout])
            other.read_by(form).copy_(routing.read_by(form))
            served, expected = (ops.function_of(form)(x, weight, A, B, one.slots, None, one) for one in (other, routing))
            torch.testing.assert_close(served, expected, rtol=0.0, atol=0.0)
            num_pairs += 1
    assert num_pairs > 500


def test_how_many_adapters_share_the_rows_is_no_matter_of_a_captured_step():
    ranks = [0, 2, 2, 2]
    for form in ("flora-expand", "bmm-lora"):
        assert ops.route([1, 1, 1], ranks, 2).layout(form) == ops.route([1, 2, 3], ranks, 2).layout(form)
        assert ops.route([1, 1, 0], ranks, 2).layout(form) == ops.route([0, 2, 3], ranks, 2).layout(form)


def test_a_loop_over_adapters_has_no_layout():
    routing = ops.route([1, 0], [0, 2], 2)
    assert routing.layout("loop-lora") is routing.layout("sgmv-lora") is None
