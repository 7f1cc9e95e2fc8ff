"""Steps of several methods under torch.profiler, on one batch and in turn: what `profiling.trace` reads.

A profiler slows what it looks at, so it is never on where anything else is timed: this runs in a process of its own, and the same
steps are timed without it first. Ranges tell the phase of each step and the kind and name of each layer; they are put around the
layers by hooks, which exist only while the profiler is on.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch._C._profiler import _RecordFunctionFast
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from flora.engine import Engine, Request
from flora.engine.device import compute_on
from flora.errors import ModelError, RequestError
from flora.layers import AdaptedLinear
from flora.ops import FAMILY
from profiling import hardware, workload
from profiling.load_runs import servable_by
from profiling.loading import add_random_adapters
from profiling.timing import median, synchronise, timed

MAX_ROWS, MAX_STEPS = 64, 64
CAPTURING = 6  # decode steps after which one is captured and proven
Progress = Callable[[str, int, int], None]
"""Told what goes on, how many turns are done, and of how many."""


def batch_of(engine: Engine, methods: Sequence[str], num_rows: int, rank: int | None = None) -> list[Request]:
    """`num_rows` requests with an adapter each that all of the methods can serve, the same one again only where there are fewer.

    rank: with random adapters of this rank instead, which are added to the engine. Raises RequestError where the methods have no
    adapter in common.
    """
    if rank is not None:
        tags = add_random_adapters(engine, min(num_rows, engine.bank.slot_capacity), rank, methods)
    else:
        tags = servable_by({engine.kind: engine}, methods)[engine.kind]
    if not tags and any(FAMILY[method] is not None for method in methods):
        raise RequestError(
            f"no adapter of the {engine.kind} model can be served by each of {', '.join(methods)}: give a rank, for random adapters"
        )
    rows = workload.ready_rows({engine.kind: tags}, rows_per_kind=len(workload.languages(engine.kind)))
    own = [row for row in rows if row["adapter"] is not None]
    chosen = list(itertools.islice(itertools.cycle(own or rows), num_rows))
    if not own:
        chosen = [row | {"adapter": tags[i % len(tags)] if tags else None} for i, row in enumerate(chosen)]
    return [workload.request_from_row(row) for row in chosen]


def check_counts(*counts: int) -> None:
    """RequestError where `record` takes no such number of prefills, steps or warm-up steps."""
    if not all(1 <= count <= MAX_STEPS for count in counts):
        raise RequestError(f"prefills, steps and warm-up steps must be from 1 to {MAX_STEPS} each")


def record(
    engine: Engine,
    requests: Sequence[Request],
    methods: Sequence[str],
    *,
    prefills: int = 4,
    steps: int = 8,
    warmup: int = 3,
    on_progress: Progress = lambda words, done, total: None,
) -> dict[str, Any]:
    """A Chrome trace of `prefills` prefills and `steps` decode steps of each method, in turn; what was measured beside it is in its
    "floraLive".

    warmup: decode steps of each method before anything is timed, and as many again under the profiler before it records; of an
    engine that captures its steps at least as many as that takes. Such steps run without the model's Python, so only their phase
    is told, not their layers. Raises a FloraError where a method cannot serve the batch, or its answers are too short for so many
    steps, and where the trace of a GPU is without kernels.
    """
    check_counts(prefills, steps, warmup)
    if engine.device.type not in ("cpu", "cuda"):
        raise ModelError(f"torch.profiler sees no kernels of the device {engine.device.type!r}: profile on a CPU or an NVIDIA GPU")
    warmup = max(warmup, CAPTURING) if engine.capture_steps else warmup
    num_tokens = 1 + 2 * warmup + 2 * steps
    requests = [replace(request, max_new_tokens=num_tokens, temperature=0.0, ignore_eos=True) for request in requests]
    run = _Run(engine, requests, methods, prefills, steps, warmup, on_progress)
    document = compute_on(engine.device)(run.record)  # a thread's operators are seen by a profiler that was started there
    require_kernels(document, engine.device.type)
    return document | {"floraLive": run.facts()}


def require_kernels(document: dict[str, Any], device: str) -> None:
    """Raise ModelError for a trace of a GPU without its kernels: torch.profiler says nothing where it could not see them."""
    kernels = any(event.get("cat") == "kernel" for event in document["traceEvents"])
    if device == "cuda" and not kernels:
        raise ModelError(
            "the profiler saw no kernel of the GPU, so there is nothing to show: another profiler may hold it (CUPTI serves one at "
            "a time), or the driver allows profiling to administrators only"
        )


class _Run:
    """One call of `record`."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        methods: Sequence[str],
        prefills: int,
        steps: int,
        warmup: int,
        on_progress: Progress,
    ) -> None:
        self.engine, self.requests, self.methods = engine, requests, methods
        self.prefills, self.steps, self.warmup, self.on_progress = prefills, steps, warmup, on_progress
        self.plain_s: dict[str, list[float]] = {}  # by method and phase, without the profiler
        self._done = 0

    def record(self) -> dict[str, Any]:
        with ExitStack() as stack:
            self._generations = {
                method: stack.enter_context(_closing(self.engine.start(self.requests, method))) for method in self.methods
            }
            for method in self.methods:  # its first prefill and decode steps are the warm-up
                self._generations[method].step()
                self._tell("warming up, not measured")
            for method in list(self.methods) * self.warmup:
                self._decode(method)
                self._tell("warming up, not measured")
            for method in list(self.methods) * self.prefills:
                self._time(method, "prefill")
            for method in list(self.methods) * self.steps:
                self._time(method, "decode")
            return self._profiled()

    def _profiled(self) -> dict[str, Any]:
        # The profiler is first prepared, with real work: a warm-up without any can lose every kernel of a GPU, and nobody is told.
        before = [("prefill", method) for method in self.methods] + [("decode", method) for method in self.methods] * self.warmup
        recorded = [("prefill", method) for method in self.methods] * self.prefills
        recorded += [("decode", method) for method in self.methods] * self.steps
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.engine.device.type == "cuda")
        with tempfile.TemporaryDirectory(prefix="flora-live-") as folder:
            path = Path(folder) / "trace.json"
            with (
                layer_ranges(self.engine.model),
                profile(
                    activities=activities,
                    schedule=schedule(wait=0, warmup=len(before), active=len(recorded), repeat=1),
                    on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
                    record_shapes=True,
                    profile_memory=True,
                ) as profiler,
            ):
                for phase, method in before + recorded:
                    (self._prefill if phase == "prefill" else self._decode)(method)
                    profiler.step()
                    self._tell("under the profiler")
            return json.loads(path.read_bytes())

    def _prefill(self, method: str) -> float:
        with _closing(self.engine.start(self.requests, method)) as generation:
            return self._step(generation, method, "prefill")

    def _decode(self, method: str) -> float:
        return self._step(self._generations[method], method, "decode")

    def _step(self, generation: Any, method: str, phase: str) -> float:
        """The seconds of one step, the device synchronised on both sides."""
        if generation.done:
            raise RequestError(
                f"the answers end before so many steps: of {self.engine.context_length} tokens the longest prompt leaves too few, "
                "ask for fewer steps"
            )
        synchronise(self.engine.device)
        with record_function(f"step | {method} | {phase}"):
            _, seconds = timed(generation.step, self.engine.device)
        return seconds

    def _time(self, method: str, phase: str) -> None:
        seconds = (self._prefill if phase == "prefill" else self._decode)(method)
        self.plain_s.setdefault(f"{method} {phase}", []).append(seconds)
        self._tell("timed without the profiler")

    def _tell(self, words: str) -> None:
        self._done += 1
        # First prefill and warm-up; timed; the profiler's warm-up; recorded.
        turns = (1 + self.warmup) * 2 + (self.prefills + self.steps) * 2
        self.on_progress(words, self._done, len(self.methods) * turns)

    def facts(self) -> dict[str, Any]:
        """What was measured beside the trace, and on what."""
        engine = self.engine
        tags = [request.adapter for request in self.requests]
        of_batch = [info.ranks for tag, info in engine.adapters.items() if tag in tags]
        return {
            "methods": list(self.methods),
            "kind": engine.kind,
            "batch": len(self.requests),
            "adapters": len({tag for tag in tags if tag}),
            "popularity": workload.popularity(tags),
            "ranks": {
                method: sorted({rank for ranks in of_batch for family, rank in ranks.items() if FAMILY[method] in (None, family)})
                for method in self.methods
                if method != "base"
            },
            "prefills": self.prefills,
            "steps": self.steps,
            "warmup": self.warmup,
            "plain_ms": {name: 1000.0 * median(seconds) for name, seconds in self.plain_s.items()},
            "implementation": engine.implementation,
            "captured": engine.capture_steps,
            "hardware": hardware.environment({engine.kind: engine}),
        }


@contextmanager
def _closing(generation: Any) -> Iterator[Any]:
    try:
        yield generation
    finally:
        generation.close()


@contextmanager
def layer_ranges(model: nn.Module) -> Iterator[None]:
    """While this is open, each of the model's layers is a range of the profiler's, such as "attention | h.0.attn.c_attn"."""
    handles = []
    try:
        for name, kind in layer_kinds(model).items():
            # Of torch's two kinds of ranges the quick one: a step has dozens, and the other would take a sixth of it.
            layer_range = _RecordFunctionFast(f"{kind} | {name}")
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(partial(_enter, layer_range)))
            handles.append(module.register_forward_hook(partial(_leave, layer_range), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(layer_range: _RecordFunctionFast, module: nn.Module, inputs: Any) -> None:
    layer_range.__enter__()


def _leave(layer_range: _RecordFunctionFast, module: nn.Module, inputs: Any, output: Any) -> None:
    layer_range.__exit__(None, None, None)


def layer_kinds(model: nn.Module) -> dict[str, str]:
    """The layers that get a range, by their names in the model: attention and what is in it, MLP, norm, embedding, output head."""
    kinds: dict[str, str] = {}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        words = type(module).__name__
        within = next((kind for parent, kind in kinds.items() if kind == "attention" and name.startswith(f"{parent}.")), None)
        if module is head:
            kinds[name] = "output head"
        elif words.endswith("Attention"):
            kinds[name] = "attention"
        elif isinstance(module, AdaptedLinear):
            kinds[name] = within or "MLP"
        elif words.endswith("MLP"):
            kinds[name] = "MLP"
        elif "Norm" in words:
            kinds[name] = "norm"
        elif isinstance(module, nn.Embedding):
            kinds[name] = "embedding"
        elif isinstance(module, nn.Conv1d):
            kinds[name] = "convolution"
    return kinds
