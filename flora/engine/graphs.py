"""CUDA graphs of the decode step: what a step launches is recorded once for each of its shapes, and replayed by one call.

A step of a large model is some thousand small launches; recorded, they cost the host nothing. A graph reads and writes the tensors
that it was captured with, so what changes from step to step has places of its own, which are filled before each replay: tokens,
positions and targets, and the numbers that tell which adapter serves which row. All else must lie where it lay: the cache, the
bank's factors. Where one of these has moved, every graph is forgotten, and the next steps are captured anew.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flora.bank import BatchServing
from flora.engine.cache import RowCache, SpeechCache
from flora.engine.runner import Runner, token_inputs
from flora.layers import AdaptedLinear, LayerPlan, Serving

logger = logging.getLogger(__name__)

MAX_GRAPHS = 64
"""Graphs that are kept, the least recently used forgotten first. They share their memory, but each takes some of its own."""

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Takes a function, and returns what repeats the work that it gave the device, and the tensor that it returned."""


class CudaCapture:
    """A `Capture` in CUDA graphs, whose memory is one pool: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool: tuple[int, int] | None = None

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        # What the libraries set up at a first call must not be captured: the function runs once before, on the same stream.
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process may use the device meanwhile: another engine, or adapters on their way to it.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = function()
        self._pool = graph.pool()
        return graph.replay, output


@dataclass(frozen=True)
class _Needs:
    """What a decode step takes of a batch's serving."""

    layout: Hashable  # what the step launches depends on: a graph serves all batches for which it is the same
    addresses: tuple[int, ...]  # of tensors that a graph reads where they are
    numbers: tuple[Tensor, ...]  # each different one, in the layers' order: what is copied before a replay
    biases: tuple[Tensor, ...]  # likewise


class StaticServing:
    """A batch's serving with numbers and biases of its own, over which another batch's are copied."""

    def __init__(self, serving: Serving, layers: dict[str, AdaptedLinear]) -> None:
        self.method = serving.method
        self._plans: dict[str, LayerPlan | None] = {}
        copies: dict = {}  # what layers share, they share in the copy
        for name in layers:
            plan = serving.plan(name)
            if plan is not None:
                # What a layer keeps of one batch's factors is none of another's.
                routing = deepcopy(replace(plan.routing, _kept=None), copies)
                plan = replace(plan, routing=routing, bias=None if plan.bias is None else plan.bias.clone())
            self._plans[name] = plan

    def plan(self, layer: str) -> LayerPlan | None:
        return self._plans[layer]


def needs_of(serving: Serving, layers: dict[str, AdaptedLinear]) -> _Needs | None:
    """What a decode step of this batch takes; None where it cannot be captured."""
    layout: list[Hashable] = [serving.method]
    addresses: list[int] = []
    numbers: dict[int, Tensor] = {}  # by address, each once
    biases: list[Tensor] = []
    for name, layer in layers.items():
        plan = serving.plan(name)
        if plan is None:
            if layer.is_black_box:
                return None  # its product may wait for the device
            layout.append(None)
            continue
        shape_of_bias = None
        if plan.bias is not None:
            shape_of_bias = tuple(plan.bias.shape)
            biases.append(plan.bias)
        reads = None if plan.merged_weight is not None else layer.decode_reads(serving.method, plan.routing)
        if reads is None:
            return None  # with merged weights, a graph would keep a whole model's for as long as it is kept itself
        own_layout, own_numbers = reads
        numbers.setdefault(own_numbers.data_ptr(), own_numbers)
        # Layers that share their numbers in one batch must share them in the next.
        layout.append((own_layout, list(numbers).index(own_numbers.data_ptr()), shape_of_bias))
        addresses += (plan.A.data_ptr(), plan.B.data_ptr(), plan.A.shape[1])
    return _Needs(tuple(layout), tuple(addresses), tuple(numbers.values()), tuple(biases))


class _Graph:
    """One captured step."""

    def __init__(
        self,
        capture: Capture,
        runner: Runner,
        inputs: Tensor,
        width: int,
        cache: RowCache | SpeechCache,
        first_row: int,
        serving: BatchServing,
    ) -> None:
        layers = runner.bank.layers
        self.inputs = inputs.clone()
        self.serving = StaticServing(serving, layers)
        self.needs = needs_of(self.serving, layers)
        self.replay, self.logits = capture(lambda: runner.read_tokens(self.inputs, width, cache, first_row, self.serving))

    def fill(self, inputs: Tensor, needs: _Needs) -> None:
        """Copy a step's inputs and its batch's numbers to where the graph reads them."""
        self.inputs.copy_(inputs)
        for place, new in zip((*self.needs.numbers, *self.needs.biases), (*needs.numbers, *needs.biases), strict=True):
            place.copy_(new)


class DecodeGraphs:
    """`Runner.decode` by replay, for one cache. A shape's first step runs as ever, its second is captured, later ones are replayed.

    capture: what captures; `CudaCapture` on a GPU. Logits are good until the next step. Batches that cannot be captured run as
    ever. Where capturing fails, that is logged, `failure` says why, and all steps run as ever from then on.
    """

    def __init__(self, runner: Runner, capture: Capture) -> None:
        self._runner, self._capture = runner, capture
        self._addresses: tuple[int, ...] = ()  # of the cache
        self._graphs: OrderedDict[Hashable, _Graph | None] = OrderedDict()  # None: its first step has run
        self._needs: WeakKeyDictionary[BatchServing, _Needs | None] = WeakKeyDictionary()
        self.num_captured = self.num_replayed = 0
        self.failure: str | None = None

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        cache: RowCache | SpeechCache,
        first_row: int,
        serving: BatchServing,
    ) -> Tensor:
        """As `Runner.decode`."""
        needs = None if self.failure is not None else self._needs_of(serving)
        if needs is None:
            return self._runner.decode(tokens, positions, cache, first_row, serving)
        inputs, width = token_inputs(tokens, positions, cache, first_row, self._runner.device)
        key = (first_row, inputs.shape[1], width, needs.layout)
        graph = self._find(key, cache, needs)
        if graph is None and key in self._graphs:
            graph = self._captured(key, inputs, width, cache, first_row, serving)
        if graph is None:
            self._graphs.setdefault(key, None)
            return self._runner.read_tokens(inputs, width, cache, first_row, serving)[: len(tokens)]
        graph.fill(inputs, needs)
        graph.replay()
        self.num_replayed += 1
        return graph.logits[: len(tokens)]

    def _needs_of(self, serving: BatchServing) -> _Needs | None:
        if serving not in self._needs:
            self._needs[serving] = needs_of(serving, self._runner.bank.layers)
        return self._needs[serving]

    def _find(self, key: Hashable, cache: RowCache | SpeechCache, needs: _Needs) -> _Graph | None:
        """The graph of a shape, if all that it reads is still where it was."""
        addresses = cache.addresses
        graph = self._graphs.get(key)
        if addresses != self._addresses or (graph is not None and graph.needs.addresses != needs.addresses):
            self._graphs.clear()
            self._addresses = addresses
            return None
        if graph is not None:
            self._graphs.move_to_end(key)
        return graph

    def _captured(
        self,
        key: Hashable,
        inputs: Tensor,
        width: int,
        cache: RowCache | SpeechCache,
        first_row: int,
        serving: BatchServing,
    ) -> _Graph | None:
        try:
            graph = _Graph(self._capture, self._runner, inputs, width, cache, first_row, serving)
        except (
            RuntimeError
        ) as error:  # what PyTorch raises where a step cannot be captured; the step itself is sound: it runs as ever
            self.failure = f"{type(error).__name__}: {error}"
            self._graphs.clear()
            logger.warning("the decode step could not be captured in a CUDA graph: it runs without, more slowly", exc_info=error)
            return None
        self._graphs[key] = graph
        self._graphs.move_to_end(key)
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        self.num_captured += 1
        return graph
