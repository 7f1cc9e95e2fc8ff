"""The decode step captured once for each of its shapes and replayed by one call: a CUDA graph on a GPU, recorded calls on a CPU.

A step of a large model is some thousand small launches; captured, they cost the host nothing. A graph reads and writes the tensors
that it was captured with, so what changes from step to step has places of its own, which are filled before each replay: tokens,
positions and targets, and, with another batch, the numbers that tell which adapter serves which row. All else must lie where it
lay: the cache, the bank's factors. Where one of these has moved, every graph is forgotten, and the next steps are captured anew.

What was captured on the host follows from more than shapes as far as Python worked out more than shapes. So it has to prove itself:
its first replay stands beside the step as ever, and must give the same logits to the last bit. In return it may take what the rows
of one batch alone are known by, for as long as that batch lasts.
"""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Protocol
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor

from flora.bank import BatchServing
from flora.engine.cache import RowCache, SpeechCache
from flora.engine.runner import Runner, token_inputs
from flora.layers import AdaptedLinear, LayerPlan, Serving

logger = logging.getLogger(__name__)


class Captured(Protocol):
    """Work that can be repeated."""

    def replay(self) -> Tensor:
        """Repeat it; what the captured function returned, good until the next replay."""

    def forget_batch(self) -> None:
        """The tensors that change with the batch hold other values from now on."""


class Capture(Protocol):
    """Captures the work of a function. RuntimeError where it cannot be captured."""

    on_host: bool  # what is captured are calls from the host, with all that Python worked out for them
    first_steps: int  # of a shape that run as ever, before it pays to capture one
    most: int  # shapes that are kept captured, the least recently used forgotten first

    def __call__(self, function: Callable[[], Tensor], of_batch: Sequence[Tensor]) -> Captured:
        """of_batch: the tensors whose values change with the batch alone."""


@dataclass(frozen=True, eq=False)
class _CudaGraph:
    graph: torch.cuda.CUDAGraph
    output: Tensor

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.output

    def forget_batch(self) -> None:
        """It does everything anew with each replay."""


class CudaCapture:
    """A `Capture` in CUDA graphs, whose memory is one pool: only one of them runs at a time. Each takes some of its own besides."""

    on_host, first_steps, most = False, 1, 128

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._alive: WeakSet[_CudaGraph] = WeakSet()

    def __call__(self, function: Callable[[], Tensor], of_batch: Sequence[Tensor] = ()) -> Captured:
        # What the libraries set up at a first call must not be captured: the function runs once before, on the same stream.
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # A pool is gone with the last of its graphs, and its number never to be used again: one of them is held meanwhile.
        sharing = next(iter(self._alive), None)
        pool = None if sharing is None else sharing.graph.pool()
        # Other threads of this process may use the device meanwhile: another engine, or adapters on their way to it. The stream
        # that was current is so again even where the capture fails, which torch.cuda.graph alone does not see to.
        with (
            _no_garbage_collection(),
            torch.cuda.stream(current),
            torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            output = function()
        captured = _CudaGraph(graph, output)
        self._alive.add(captured)
        return captured


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What it would free, another graph or an event among it, may call the device in a way that ends a capture as invalid."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


_WAITS = "layer {} is quantised, and its own product may wait for the device"


@dataclass(frozen=True)
class _Needs:
    """What a decode step takes of a batch's serving."""

    layout: Hashable  # what the step launches depends on: a graph serves all batches for which it is the same
    addresses: tuple[int, ...]  # of tensors that a graph reads where they are
    numbers: tuple[Tensor, ...]  # each different one, in the layers' order: what is copied before a replay
    biases: tuple[Tensor, ...]  # likewise
    factors: tuple[Tensor, ...] = ()  # that change with the batch, where they are
    of_one_batch: bool = False  # the layout is that of one batch alone


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


@dataclass
class DecodeSteps:
    """Of one method: how many of its decode steps were captured, were replayed, or ran as ever, and why the last one did, where
    that will not change."""

    captured: int = 0
    replayed: int = 0
    ran: int = 0
    reason: str | None = None


def needs_of(serving: Serving, layers: dict[str, AdaptedLinear]) -> _Needs | str:
    """What a decode step of this batch takes, or why it cannot be captured."""
    layout: list[Hashable] = [serving.method]
    addresses: list[int] = []
    numbers: dict[int, Tensor] = {}  # by address, each once
    biases: list[Tensor] = []
    factors: list[Tensor] = []
    for name, layer in layers.items():
        plan = serving.plan(name)
        if plan is None:
            if layer.is_black_box:
                return _WAITS.format(name)
            layout.append(None)
            continue
        shape_of_bias = None
        if plan.bias is not None:
            shape_of_bias = tuple(plan.bias.shape)
            biases.append(plan.bias)
        if plan.merged_weight is not None:
            return "a captured step would keep a whole model of merged weights for as long as it is kept itself"
        reads = layer.decode_reads(serving.method, plan.routing)
        if reads is None:
            return _WAITS.format(name) if layer.is_black_box else f"{serving.method} finds its factors by numbers of the host"
        own_layout, own_numbers = reads
        numbers.setdefault(own_numbers.data_ptr(), own_numbers)
        # Layers that share their numbers in one batch must share them in the next.
        layout.append((own_layout, list(numbers).index(own_numbers.data_ptr()), shape_of_bias))
        addresses += (plan.A.data_ptr(), plan.B.data_ptr(), plan.A.shape[1])
        factors += (plan.A, plan.B)
    return _Needs(tuple(layout), tuple(addresses), tuple(numbers.values()), tuple(biases), tuple(factors))


def needs_of_one_batch(serving: Serving, layers: dict[str, AdaptedLinear]) -> _Needs | str:
    """What is captured of this batch alone, with all that it has, or why it cannot be."""
    for name, layer in layers.items():
        if layer.is_black_box:
            return _WAITS.format(name)
    return _Needs((serving.method, object()), (), (), (), of_one_batch=True)


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
        needs: _Needs,
    ) -> None:
        self.inputs = inputs.clone()
        self.needs, static = needs, serving
        if not needs.of_one_batch:
            static = StaticServing(serving, runner.bank.layers)
            self.needs = needs_of(static, runner.bank.layers)
        of_batch = (*self.needs.numbers, *self.needs.biases, *self.needs.factors)
        self.captured = capture(lambda: runner.read_tokens(self.inputs, width, cache, first_row, static), of_batch)
        self.is_proven = not capture.on_host
        self._batch: ReferenceType[BatchServing] = ref(serving)

    def replay(self, inputs: Tensor, serving: BatchServing, needs: _Needs) -> Tensor:
        """The step for these inputs and this batch, which are copied to where the graph reads them."""
        self.inputs.copy_(inputs)
        if self._batch() is not serving:
            for place, new in zip((*self.needs.numbers, *self.needs.biases), (*needs.numbers, *needs.biases), strict=True):
                place.copy_(new)
            self._batch = ref(serving)
            self.captured.forget_batch()
        return self.captured.replay()


class DecodeGraphs:
    """`Runner.decode` by replay, for one cache. A shape's first steps run as ever, then one is captured, later ones are replayed.

    capture: what captures; `CudaCapture` on a GPU, `RecordedCapture` on a CPU. steps: where its steps are counted, besides. Logits
    are good until the next step. Batches that cannot be captured run as ever. Where capturing fails, that is logged, `failure` says
    why, and all steps run as ever from then on.
    """

    def __init__(self, runner: Runner, capture: Capture, steps: DecodeSteps | None = None) -> None:
        self._runner, self._capture = runner, capture
        self._addresses: tuple[int, ...] = ()  # of the cache
        self._graphs: OrderedDict[Hashable, _Graph | int] = OrderedDict()  # an int: steps that ran as ever so far
        self._needs: WeakKeyDictionary[BatchServing, _Needs | str] = WeakKeyDictionary()
        self._steps = DecodeSteps() if steps is None else steps
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
        needs = self._needs_of(serving) if self.failure is None else self.failure
        if isinstance(needs, str):
            self._steps.ran, self._steps.reason = self._steps.ran + 1, needs
            return self._runner.decode(tokens, positions, cache, first_row, serving)
        inputs, width = token_inputs(tokens, positions, cache, first_row, self._runner.device)
        key = (first_row, inputs.shape[1], width, needs.layout)
        graph = self._find(key, cache, needs)
        is_new = isinstance(graph, int) and graph >= (0 if self._lasts(key) else self._capture.first_steps)
        if is_new:
            graph = self._captured(key, inputs, width, cache, first_row, serving, needs)
        if isinstance(graph, _Graph) and (is_new or graph.is_proven):
            logits = graph.replay(inputs, serving, needs)
            self._keep(key, graph)
            self.num_replayed += 1
            self._steps.replayed, self._steps.reason = self._steps.replayed + 1, None
            return logits[: len(tokens)]
        logits = self._runner.read_tokens(inputs, width, cache, first_row, serving)
        if isinstance(graph, _Graph):
            self._prove(graph, logits, graph.replay(inputs, serving, needs))
        elif graph is not None:
            self._keep(key, graph + 1)
        self._steps.ran, self._steps.reason = self._steps.ran + 1, self.failure
        return logits[: len(tokens)]

    def prepare(self, num_rows: int, width: int, cache: RowCache | SpeechCache, serving: BatchServing) -> None:
        """Have steps of the first rows of `cache` captured that look at `width` positions; nothing where they cannot be.

        What the rows hold at position `width` - 1 is overwritten.
        """
        for _ in range(self._capture.first_steps + 2):  # it runs as ever, is captured, and proves itself
            needs = self._needs_of(serving) if self.failure is None else self.failure
            if isinstance(needs, str) or needs.of_one_batch:
                return
            graph = self._graphs.get((0, *cache.step_shape(0, num_rows, width), needs.layout))
            if isinstance(graph, _Graph) and graph.is_proven:
                return
            self.decode([0] * num_rows, [width - 1] * num_rows, cache, 0, serving)

    def _lasts(self, key: tuple[int, int, int, Hashable]) -> bool:
        """Whether the rows of this step were captured already, when they looked at fewer positions: they will be there for long."""
        first_row, rows, _, layout = key
        captured = [key for key, graph in self._graphs.items() if isinstance(graph, _Graph)]
        return (first_row, rows, layout) in [(one[0], one[1], one[3]) for one in captured]

    def forget_batches(self) -> None:
        """Let go what was captured of one batch alone, and with it all that the batch had."""
        for key in [key for key, graph in self._graphs.items() if isinstance(graph, _Graph) and graph.needs.of_one_batch]:
            del self._graphs[key]

    def _needs_of(self, serving: BatchServing) -> _Needs | str:
        if serving not in self._needs:
            for graph in self._graphs.values():
                if isinstance(graph, _Graph):
                    graph.captured.forget_batch()  # else each shape would keep what the rows of its last batch had gathered
            layers = self._runner.bank.layers
            needs = needs_of(serving, layers)
            if isinstance(needs, str) and self._capture.on_host:
                self.forget_batches()
                needs = needs_of_one_batch(serving, layers)
            self._needs[serving] = needs
        return self._needs[serving]

    def _find(self, key: Hashable, cache: RowCache | SpeechCache, needs: _Needs) -> _Graph | int:
        """The graph of a shape, if all that it reads is still where it was; else how many of its steps have run."""
        addresses = cache.addresses
        graph = self._graphs.get(key, 0)
        if addresses != self._addresses or (isinstance(graph, _Graph) and graph.needs.addresses != needs.addresses):
            self._graphs.clear()
            self._addresses = addresses
            return 0
        return graph

    def _keep(self, key: Hashable, graph: _Graph | int) -> None:
        """As the one that was used last."""
        self._graphs[key] = graph
        self._graphs.move_to_end(key)
        if len(self._graphs) > self._capture.most:
            self._graphs.popitem(last=False)

    def _captured(
        self,
        key: Hashable,
        inputs: Tensor,
        width: int,
        cache: RowCache | SpeechCache,
        first_row: int,
        serving: BatchServing,
        needs: _Needs,
    ) -> _Graph | None:
        try:
            graph = _Graph(self._capture, self._runner, inputs, width, cache, first_row, serving, needs)
        except RuntimeError as error:  # what PyTorch and recordings raise; the step itself is sound: it runs as ever
            self._give_up(f"{type(error).__name__}: {error}", error)
            return None
        self.num_captured += 1
        self._steps.captured += 1
        return graph

    def _prove(self, graph: _Graph, expected: Tensor, replayed: Tensor) -> None:
        """Take a graph into use that gives, for another step than its own, what the step gives."""
        graph.is_proven = torch.allclose(replayed, expected, rtol=0.0, atol=0.0, equal_nan=True)
        if not graph.is_proven:
            difference = (replayed - expected).abs().max().item()
            self._give_up(f"a replayed step's logits differ from the step's own by {difference:.3g}")

    def _give_up(self, why: str, error: RuntimeError | None = None) -> None:
        self.failure = why
        self._graphs.clear()
        logger.warning("the decode step could not be captured (%s): it runs as it is, more slowly", why, exc_info=error)
