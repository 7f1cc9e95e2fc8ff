"""A stand-in for CUDA graphs on the CPU, as strict as they are: it notes the operations on tensors as they run, and repeats those
alone, on the same memory, into the same results. No line of the model's Python runs again, and what was there before the capture is
there at a replay only if somebody else keeps it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from flora import Engine
from flora.engine.cache import RowCache, SpeechCache
from flora.engine.graphs import DecodeGraphs


class Recorder(TorchDispatchMode):
    """Every operation that runs, with the tensors it had and those it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@dataclass(frozen=True)
class Outside:
    """A tensor in memory that was there before the capture: where it lies, and nothing that keeps it there."""

    storage: weakref.ref[torch.UntypedStorage]
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Outside:
        storage = weakref.ref(tensor.untyped_storage())
        return cls(storage, tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())

    def tensor(self) -> torch.Tensor:
        storage = self.storage()
        assert storage is not None, f"a replayed step reads memory that was given back: {self.dtype} {self.shape}"
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.strides)


def memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Record:
    """What repeats the work; the first time it has not been done yet, as with a CUDA graph.

    pool: all records whose results lie in one memory pool: only what one of them returned last is there to be read.
    """

    def __init__(self, calls: list, output: torch.Tensor, pool: weakref.WeakSet[Record]) -> None:
        self.made: set[int] = set()  # memory that was taken during the capture
        for _, args, kwargs, result in calls:
            given = {memory_of(tensor) for tensor in tensors((args, kwargs))}
            self.made |= {memory_of(tensor) for tensor in tensors(result)} - given
        read = {memory_of(tensor) for call in calls for tensor in tensors(call)} - self.made
        for other in pool:
            assert not read & other.made, "a step reads what an earlier one computed on its way: the next capture overwrites that"

        def kept(leaf):
            return Outside.of(leaf) if isinstance(leaf, torch.Tensor) and memory_of(leaf) not in self.made else leaf

        self.calls = [(operation, *tree_map(kept, rest)) for operation, *rest in calls]
        self.output, self.pool = output, pool
        pool.add(self)

    @property
    def outside(self) -> list[Outside]:
        """All that it reads or writes and did not make."""
        return [leaf for call in self.calls for leaf in tree_leaves(call) if isinstance(leaf, Outside)]

    @torch.inference_mode()
    def replay(self) -> torch.Tensor:
        for other in self.pool:
            other.output.fill_(torch.nan)
        for operation, *given, old in self.calls:
            args, kwargs = tree_map(lambda leaf: leaf.tensor() if isinstance(leaf, Outside) else leaf, given)
            homes = {memory_of(tensor) for tensor in tensors((args, kwargs))}
            new = operation(*args, **kwargs)
            for was, now in zip(tree_leaves(old), tree_leaves(new), strict=True):
                # Else it is a view, or what was written in place.
                if isinstance(was, torch.Tensor) and memory_of(was) not in homes:
                    was.copy_(now)
        return self.output

    def forget_batch(self) -> None:
        """All is done anew."""


class AsStrictAsCuda:
    """A `Capture`."""

    on_host, first_steps, most = False, 1, 128

    def __init__(self) -> None:
        self.pool: weakref.WeakSet[Record] = weakref.WeakSet()

    def __call__(self, function, of_batch=()) -> Record:
        with Recorder() as recorder:
            output = function()
        output.fill_(torch.nan)  # until it is replayed
        return Record(recorder.calls, output, self.pool)


def assert_all_is_known(engine: Engine, core_graphs: DecodeGraphs, cache: RowCache | SpeechCache) -> None:
    """All that a captured step reads or writes lies in the model, in the cache, or in what the graph itself keeps."""
    own = cache.own if isinstance(cache, SpeechCache) else cache
    heard = cache.cross_attention_cache.layers if isinstance(cache, SpeechCache) else []
    lasting = [*engine.model.parameters(), *engine.model.buffers()]
    lasting += [side for layer in own.layers for side in (layer.keys, layer.values)]
    lasting += [side for layer in heard for side in (layer._keys, layer._values)]
    known = {memory_of(tensor) for tensor in lasting}
    for graph in core_graphs._graphs.values():
        if not isinstance(graph, int):
            needs = graph.needs
            kept = {memory_of(one) for one in (graph.inputs, *needs.numbers, *needs.biases, *needs.factors)}
            for one in graph.captured.outside:
                assert one.storage() is not None and one.storage()._cdata in known | kept, f"whose is {one.dtype} {one.shape}?"


@contextmanager
def strict_engines(checkpoints) -> Iterator[Callable[..., tuple[Engine, list[DecodeGraphs]]]]:
    """kind, tags, options → an engine whose decode steps are captured so strictly, and the `DecodeGraphs` that it made.

    In the end, whatever was captured has to have read only what it may.
    """
    engines, seen = [], []

    def make(kind: str = "code", *tags: str, **options) -> tuple[Engine, list[DecodeGraphs]]:
        engine, made = checkpoints[kind].engine(*tags, static_shapes=True, **options), []
        make_core = engine._make_core

        def noting(*arguments, **named):
            core = make_core(*arguments, **named)
            made.append(core.graphs)
            seen.append((engine, core.graphs, core.cache))
            return core

        engine.new_capture, engine._make_core = AsStrictAsCuda, noting
        limits = {"max_rows": engine.max_batch_size, "max_batch_tokens": engine.max_batch_tokens}
        engine._server._make_core = partial(noting, **limits)
        engines.append(engine)
        return engine, made

    try:
        yield make
    finally:
        for engine in engines:
            engine.close(0)
    for engine, graphs, cache in seen:
        assert_all_is_known(engine, graphs, cache)
