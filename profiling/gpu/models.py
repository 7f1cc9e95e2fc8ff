"""Whole models at their true shapes with random weights: decode steps side by side, then throughput and latency by rank.

Decode steps are paired: every method has the same batch and a cache of its own, and their steps take turns. Throughput and latency
are a sweep's, as `python -m profiling sweep` measures them: the shape of the paper's Figures 2 and 3. All adapters of a rank hold
the same numbers, each in a slot of its own: what a step costs does not depend on what they hold.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from flora import Request
from flora.backend import kernels_on
from flora.engine import Engine, Generation
from flora.engine.graphs import DecodeSteps
from profiling import hardware, workload
from profiling.gpu.adapters import add_random_copies
from profiling.gpu.budget import Budget, Longest
from profiling.gpu.int8_reference import bitsandbytes
from profiling.gpu.model_bytes import decode_bytes
from profiling.gpu.session import Session, ratio_row, release
from profiling.load_runs import LoadSettings, sources_of
from profiling.sweep import PAPER_RATES, Sweep, SweepSettings
from profiling.sweep_points import LATENCY, THROUGHPUT
from profiling.timing import median, quantiles, timed
from profiling.traffic import Clip, Clips, Lengths, PlannedRequest, Source, Traffic

METHODS = ("base", "flora", "bmm-lora", "sgmv-lora")
SWEPT, LATENCY_METHODS = METHODS[1:], ("flora", "bmm-lora")  # the paper's two take half the time of an arrival rate
NOT_KEPT = ("hardware", "command", "seed", "models", "timeline", "adapters", "setting")
"""Of a sweep's rows: what a session's rows say in their own way, and what has many values."""

BATCH = 32
CLIP_S = 10.0
SAMPLING_RATE = 16_000
PREPARED_STEPS = 3  # a shape's first step runs as ever, its second is captured, its third replayed
NO_TIME = "there was no time left"


@dataclass(frozen=True)
class Size:
    """How much of everything. length: what rows call it, so that no short run is taken for the paper's figures."""

    length: str
    batch: int = BATCH
    prompt_tokens: int = 64
    new_tokens: int = 32  # of the load
    warmup_steps: int = 4  # a shape's second step is captured
    steps: int = 24
    requests: int = 2 * BATCH  # of a throughput: full batches
    rate_s: float = 4.0  # of a latency: so long requests arrive
    warmup_requests: int = 8

    def requests_at(self, rate: float) -> int:
        """Of a run; rate: infinite where all are there from the start."""
        return self.requests if math.isinf(rate) else max(1, round(rate * self.rate_s))


SHORT, FIGURES = Size("short"), Size("figures", new_tokens=128, rate_s=6.0)
TINY = Size("tiny", batch=2, prompt_tokens=4, new_tokens=4, warmup_steps=5, steps=2, requests=2, rate_s=0.04, warmup_requests=1)


@dataclass(frozen=True)
class Job:
    """What is measured of one model. weight: of its share of the time. step_ranks: of paired steps; ranks, rates: of throughput and
    latency. graphs: whether decode steps are captured in CUDA graphs.
    """

    model: str
    weight: float
    step_ranks: tuple[int, ...]
    ranks: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    graphs: bool = True
    quantize: str | None = None
    kind: str = "code"


JOBS = (  # the most telling first, and of each its most telling ranks
    Job("starcoder", 14, (1, 4, 16, 2, 32, 8, 64), (1, 8), PAPER_RATES[:1]),
    Job("starcoder", 1, (1, 4, 16), graphs=False),
    Job("starcoderbase-3b", 6, (1, 4, 16), (1, 8), PAPER_RATES),
    Job("llama-2-13b", 3, (1, 4, 8, 16), (1, 8)),
    Job("whisper-large-v2", 2, (1, 4, 16), (1, 4), kind="speech"),
    Job("starcoderbase-1b", 1.5, (1, 4, 16), (1,)),
    Job("llama-2-7b", 1.5, (1, 4, 8, 16), (1,)),
    Job("starcoder", 1, (1, 4), quantize="int8"),
    Job("starcoderbase-1b", 0.5, (1, 4), graphs=False),
    Job("whisper-large-v2", 0.5, (1, 4), graphs=False, kind="speech"),
)

FIGURE_RANKS = (1, 8, 4, 16, 2)
FIGURE_JOBS = (  # throughput of all of them: the paper's Figures 2 and 3, left
    Job("starcoder", 10, (), FIGURE_RANKS, PAPER_RATES[:1]),  # Figure 2, right
    Job("starcoderbase-3b", 10, (), FIGURE_RANKS, PAPER_RATES),  # Figure 3, right
    Job("llama-2-13b", 5, (), FIGURE_RANKS),
    Job("llama-2-7b", 3, (), FIGURE_RANKS),
    Job("starcoderbase-1b", 2, (), FIGURE_RANKS),
    Job("whisper-large-v2", 2, (), FIGURE_RANKS[:3], kind="speech"),
)


def tiny_jobs(part: str = "models") -> tuple[Job, ...]:
    """Of the embedded models' shapes: every path of a part, the smallest of everything."""
    folders = {kind: str(workload.ASSETS / "models" / kind) for kind in ("code", "speech")}
    if part == "figures":
        return (Job(folders["code"], 1, (), (1,), (50.0,)),)
    return (
        Job(folders["code"], 1, (2,), (1,), (50.0,)),
        Job(folders["speech"], 1, (1,), (1,), kind="speech", graphs=False),
    )


def measure(session: Session, budget: Budget, jobs: Sequence[Job], size: Size) -> Iterator[dict]:
    """Measure one job after the other, each within its share of the budget, and yield each row as it comes; a row tells of what was
    left out, and of what failed.
    """
    longest = Longest(budget.clock)  # of all jobs: a smaller model's are no longer
    for place, job in enumerate(jobs):
        own = budget.share(job.weight, sum(other.weight for other in jobs[place + 1 :]))
        measured = _Measured(session, job, size, own, longest)
        if job.quantize == "int8" and bitsandbytes() is None:
            yield measured.left_out("everything", "bitsandbytes, which makes 8-bit layers, is not installed")
            continue
        if budget.left_s <= longest.expected_s("loading"):
            yield measured.left_out("everything", NO_TIME)
            continue
        with session.isolated("models", f"{job.model}: loading", model=job.model, quantize=job.quantize):
            yield from measured.rows()
        release(session.device)


class _Measured:
    """One job. How long each kind of work took in the jobs so far says whether another one fits into the budget."""

    def __init__(self, session: Session, job: Job, size: Size, budget: Budget, longest: Longest) -> None:
        self.session, self.job, self.size, self.budget, self.longest = session, job, size, budget, longest

    def rows(self) -> Iterator[dict]:
        job, session, size = self.job, self.session, self.size
        with self.longest.timed("loading"):
            engine = Engine.from_pretrained(
                job.model,
                device=session.device,
                dtype=session.dtype,
                quantize=job.quantize,
                weights="random",
                max_batch_size=size.batch,
                adapter_slots=size.batch,
                max_waiting=4 * max(map(size.requests_at, (math.inf, *job.rates))),
                static_shapes=True,
                capture_steps=job.graphs,
            )
        try:
            source = clips(engine) if job.kind == "speech" else sources_of({job.kind: engine})[job.kind]
            for rank in job.step_ranks:
                yield from self._timed("steps", rank, lambda rank=rank: self._steps(engine, source, rank))
            for rank, rate in itertools.product(job.ranks, (math.inf, *job.rates)):
                yield from self._timed(_load_name(rate), rank, lambda rank=rank, rate=rate: self._load(engine, source, rank, rate))
        finally:
            engine.close(timeout_s=0.0)

    def left_out(self, work: str, reason: str, rank: int | None = None) -> dict:
        job = self.job
        facts = {"model": job.model, "quantize": job.quantize, "graphs": job.graphs, "rank": rank, "work": work, "reason": reason}
        return self.session.record("models", {"measures": "nothing", **facts})

    def _timed(self, work: str, rank: int, measure_rows: Callable[[], Iterator[dict]]) -> Iterator[dict]:
        """The rows of one piece of work, or the row that says that there was no time for it."""
        kind = f"{work}, {self.job.kind}"
        if self.budget.left_s <= self.longest.expected_s(kind):
            yield self.left_out(work, NO_TIME, rank)
            return
        with self.longest.timed(kind), self._isolated(work, rank):
            yield from measure_rows()

    def _isolated(self, what: str, rank: int, **setting: Any) -> AbstractContextManager[None]:
        job = self.job
        setting = {"model": job.model, "quantize": job.quantize, "graphs": job.graphs, "rank": rank, **setting}
        return self.session.isolated("models", f"{job.model}, rank {rank}: {what}", **setting)

    def _facts(self, engine: Engine, rank: int) -> dict:
        """What every row of the job says."""
        return {
            "model": hardware.model_facts(engine),
            "kind": self.job.kind,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "quantize": self.job.quantize,
            "implementation": engine.implementation,
            "static_shapes": engine.static_shapes,
            "cuda_graphs": engine.capture_steps,
            "rank": rank,
            "batch": engine.max_batch_size,
            "popularity": "distinct",
        }

    # ------------------------------------------------------------------------------------------------------------ steps

    def _steps(self, engine: Engine, source: Source, rank: int) -> Iterator[dict]:
        """Paired decode steps of all methods: a batch of distinct adapters of a rank, each method with a cache of its own. A method
        that fails is left out from then on.
        """
        size, kind = self.size, self.job.kind
        hardware.reset_peak_memory([engine.device])
        num_new = size.warmup_steps + size.steps + 2
        tags = add_random_copies(engine, size.batch, rank, METHODS, self.session.seed)
        rng = np.random.default_rng(self.session.seed)
        asked = [source.draw(None, size.prompt_tokens, num_new, rng) for _ in tags]
        requests = [
            PlannedRequest(n, 0.0, kind, tag, one, num_new).request() for n, (tag, one) in enumerate(zip(tags, asked, strict=True))
        ]
        runs: dict[str, _Steps] = {}
        try:
            for method in METHODS:
                with self._isolated(f"the prompts of {method}", rank, method=method):
                    prepare(engine, requests, method)
                    runs[method] = _Steps.begun(engine, requests, method)
            for step in range(-size.warmup_steps, size.steps):
                for method, run in list(runs.items()):
                    with self._isolated(f"a step of {method}", rank, method=method):
                        run.step(is_counted=step >= 0)
                        continue
                    runs.pop(method).generation.close()
            rows = [self._row(engine, rank, method, run, runs) for method, run in runs.items()]
        finally:
            for run in runs.values():
                run.generation.close()
            for tag in tags:
                engine.remove_adapter(tag)
        peak_bytes, peak_of = hardware.peak_memory([engine.device])
        for row in rows:
            yield self.session.record("models", row | {"peak_memory_bytes": peak_bytes, "peak_memory_of": peak_of})

    def _row(self, engine: Engine, rank: int, method: str, run: _Steps, runs: Mapping[str, _Steps]) -> dict:
        size, seed, middle = self.size, self.session.seed, median(run.seconds)
        positions = run.prompt_tokens + size.warmup_steps + size.steps / 2
        must_read = decode_bytes(engine, run.generation.core.cache, size.batch, positions)
        return {
            "measures": "decode step",
            "method": method,
            **self._facts(engine, rank),
            "prompt_tokens": run.prompt_tokens,
            "repeats": size.steps,
            "warmup_steps": size.warmup_steps,
            "median_s": middle,
            "quantiles": quantiles(run.seconds),
            "tokens_per_s": size.batch / middle,
            **{
                f"over_{name}": ratio_row(run.seconds, runs[name].seconds if name in runs else None, seed)
                for name in ("base", "flora")
            },
            "prefill_s": run.prefill_s,
            "bytes": must_read.all,
            "weight_bytes": must_read.weights,
            "adapted_bytes": must_read.adapted,
            "key_value_bytes": must_read.keys_and_values,
            "bandwidth_share": self.session.bandwidth_share(must_read.all, middle),
            "graphs": _graphs_of(run.generation),
            "replayed": run.is_replayed,
        }

    # ------------------------------------------------------------------------------------------------------------- load

    def _load(self, engine: Engine, source: Source, rank: int, rate: float) -> Iterator[dict]:
        """Throughput, or latency at a rate, all methods in turn; a row says so where the time ended before all were measured."""
        size, at_once = self.size, math.isinf(rate)
        traffic = Traffic(
            num_requests=size.requests_at(rate),
            prompt_tokens=Lengths("fixed", size.prompt_tokens, size.prompt_tokens),
            new_tokens=Lengths("fixed", size.new_tokens, size.new_tokens),
            popularity="distinct",
            all_adapters=True,
            mix={self.job.kind: 1.0},
            seed=self.session.seed,
        )
        load = LoadSettings(traffic, SWEPT if at_once else LATENCY_METHODS, warmup_requests=size.warmup_requests)
        measure_name, rates = (THROUGHPUT, ()) if at_once else (LATENCY, (rate,))
        settings = SweepSettings(load, (rank,), rates, size.batch, (measure_name,))
        command = self.session.facts["command"]
        ready = _Ready(load.methods, size.prompt_tokens + size.new_tokens, self._isolated)
        sweep = Sweep(engine, source, settings, command, lambda: self.budget.left_s <= 0, ready.add_adapters)
        for _ in sweep.run():
            pass
        notes = {"length": size.length, "compiled": ready.compiled(engine)}
        if self.job.kind == "speech":
            notes["includes"] = "log-mel features, which the host makes of each clip"
        for row in sweep.rows:
            if num_failed := row["outcomes"].get("failed", 0):
                what = f"{self.job.model}, rank {rank}: {_load_name(rate)}, {row['method']}"
                reason = f"{num_failed} of {row['num_requests']} requests failed ({', '.join(row['errors'])})"
                self.session.failed("models", what, reason, model=self.job.model, rank=rank, method=row["method"])
            own = {key: value for key, value in row.items() if key not in NOT_KEPT}
            steps = ready.decode_steps(engine, row["method"])
            yield self.session.record("models", own | self._facts(engine, rank) | notes | {"decode_steps": steps})
        if sweep.interrupted:
            yield self.left_out(_load_name(rate), NO_TIME, rank)


@dataclass
class _Steps:
    """The decode steps of one method. captured, replayed: how many steps were, while they were timed."""

    generation: Generation
    device: torch.device
    prompt_tokens: int
    prefill_s: float
    seconds: list[float] = field(default_factory=list)
    captured: int = 0
    replayed: int = 0

    @classmethod
    def begun(cls, engine: Engine, requests: Sequence[Request], method: str) -> _Steps:
        """The prompts are read, in a time that is measured, too."""
        generation = engine.start(requests, method)
        prompt_tokens = len(generation.rows[0].encoded.prompt_ids)
        try:
            _, prefill_s = timed(generation.step, engine.device)
        except BaseException:
            generation.close()
            raise
        return cls(generation, engine.device, prompt_tokens, prefill_s)

    def step(self, is_counted: bool) -> None:
        graphs = self.generation.core.graphs
        before = (0, 0) if graphs is None else (graphs.num_captured, graphs.num_replayed)
        _, taken = timed(self.generation.step, self.device)
        if not is_counted:
            return
        self.seconds.append(taken)
        if graphs is not None:
            self.captured += graphs.num_captured - before[0]
            self.replayed += graphs.num_replayed - before[1]

    @property
    def is_replayed(self) -> bool:
        """Whether every step that was timed was one captured before."""
        graphs = self.generation.core.graphs
        return graphs is not None and graphs.failure is None and not self.captured and self.replayed == len(self.seconds)


class _Ready:
    """Makes an engine ready for a sweep once its adapters are there: decode steps are captured, and what they launch is compiled.

    Afterwards it says how many were captured or compiled all the same while requests ran. isolated(what, rank): a context for what
    may fail alone. positions: of the longest request.
    """

    def __init__(self, methods: Sequence[str], positions: int, isolated: Callable[..., AbstractContextManager[None]]) -> None:
        self.methods, self.positions, self.isolated = methods, positions, isolated
        self.before: dict[str, DecodeSteps] = {}
        self.compiled_before: int | None = None

    def add_adapters(self, engine: Engine, count: int, rank: int, methods: Sequence[str], seed: int) -> list[str]:
        """As `add_random_copies`, which a sweep calls before it sends any request."""
        tags = add_random_copies(engine, count, rank, methods, seed)
        for method in self.methods:
            with self.isolated(f"capturing {method}", rank, method=method):
                engine.capture(method, tags, min(self.positions, engine.context_length))
        self.before = {method: engine.captured(method) for method in self.methods}
        self.compiled_before = _num_compiled(engine)
        return tags

    def decode_steps(self, engine: Engine, method: str) -> dict | None:
        """Of a method's decode steps since then, those before the timed requests included: how many were captured, replayed, or run
        as ever, and why the last of these, where that will not change."""
        if method not in self.before:
            return None
        before, now = self.before[method], engine.captured(method)
        counts = {name: getattr(now, name) - getattr(before, name) for name in ("captured", "replayed", "ran")}
        return counts | {"reason": now.reason}

    def compiled(self, engine: Engine) -> int | None:
        """Kernels since then, of all methods; None where none serve, or Triton does not tell."""
        now = _num_compiled(engine)
        return None if now is None or self.compiled_before is None else now - self.compiled_before


def _num_compiled(engine: Engine) -> int | None:
    if kernels_on(engine.device.type) is None:
        return None
    from flora.kernels.compilation import num_compiled  # needs Triton, which is there where kernels serve

    return num_compiled()


def prepare(engine: Engine, requests: Sequence[Request], method: str) -> None:
    """Before a method of a model is timed: what happens only once happens here, such as kernels that are compiled and libraries
    that are set up, for the prompts and for the steps after them.
    """
    generation = engine.start(requests, method)
    try:
        for _ in range(1 + PREPARED_STEPS):
            generation.step()
    finally:
        generation.close()


def clips(engine: Engine) -> Clips:
    """Noise for a speech model to write down: no file is read, and what is heard changes nothing of what a step costs."""
    seconds = min(CLIP_S, engine.window_s)
    samples = np.random.default_rng(0).normal(0.0, 0.1, math.floor(seconds * SAMPLING_RATE)).astype(np.float32)
    clip = Clip("noise", 16, None, samples, SAMPLING_RATE)
    encoded = engine.runner.encode(PlannedRequest(0, 0.0, "speech", None, clip, 1).request())
    return Clips([clip], engine.context_length - len(encoded.prompt_ids))


def _load_name(rate: float) -> str:
    return "throughput" if math.isinf(rate) else f"latency at {rate:g}/s"


def _graphs_of(generation: Generation) -> dict | None:
    """How many graphs a batch has captured and replayed, and why none, where that failed; None without graphs."""
    graphs = generation.core.graphs
    if graphs is None:
        return None
    return {"captured": graphs.num_captured, "replayed": graphs.num_replayed, "failure": graphs.failure}
