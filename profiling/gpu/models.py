"""Whole models at their true shapes with random weights: decode steps side by side, then throughput and latency by rank.

Decode steps are paired: every method has the same batch and a cache of its own, and their steps take turns. Throughput and latency
are a sweep's, as `python -m profiling sweep` measures them: the shape of the paper's Figures 2 and 3. All adapters of a rank hold
the same numbers, each in a slot of its own: what a step costs does not depend on what they hold.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from flora.engine import Engine, Generation
from profiling import hardware, workload
from profiling.gpu.adapters import add_random_copies
from profiling.gpu.budget import Budget
from profiling.gpu.int8_reference import bitsandbytes
from profiling.gpu.session import Session, ratio_row
from profiling.load_runs import LoadSettings, sources_of
from profiling.sweep import PAPER_RATES, Sweep, SweepSettings
from profiling.sweep_points import LATENCY, THROUGHPUT
from profiling.timing import median, quantiles, timed
from profiling.traffic import Clip, Clips, Lengths, PlannedRequest, Source, Traffic

METHODS = ("base", "flora", "bmm-lora", "sgmv-lora")
SWEPT = METHODS[1:]
NOT_KEPT = ("hardware", "command", "seed", "models", "timeline", "adapters", "setting")
"""Of a sweep's rows: what a session's rows say in their own way, and what has many values."""

BATCH = 32
CLIP_S = 10.0
SAMPLING_RATE = 16_000


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    batch: int = BATCH
    prompt_tokens: int = 64
    new_tokens: int = 32  # of the sweep
    warmup_steps: int = 4  # a shape's second step is captured
    steps: int = 24
    requests: int = 40  # of each run of the sweep
    warmup_requests: int = 8


TINY = Size(batch=2, prompt_tokens=4, new_tokens=4, warmup_steps=1, steps=2, requests=2, warmup_requests=1)


@dataclass(frozen=True)
class Job:
    """What is measured of one model. weight: of its share of the time. step_ranks: of paired steps; ranks, rates: of the sweep.

    graphs: whether decode steps are captured in CUDA graphs.
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
    Job("starcoder", 14, (1, 4, 16, 2, 32, 8, 64), (1, 4, 16, 8, 2), PAPER_RATES[:1]),  # Figure 2
    Job("starcoder", 1, (1, 4, 16), graphs=False),
    Job("starcoderbase-3b", 8, (1, 4, 16), (1, 4, 16, 8), PAPER_RATES),  # Figure 3, right
    Job("llama-2-13b", 3, (1, 4, 8, 16), (1, 8, 4)),  # Figure 3, left
    Job("whisper-large-v2", 2, (1, 4, 16), (1, 4), kind="speech"),
    Job("starcoderbase-1b", 1.5, (1, 4, 16), (1, 8)),
    Job("llama-2-7b", 1.5, (1, 4, 8, 16), (1, 8)),
    Job("starcoder", 1, (1, 4), quantize="int8"),
    Job("starcoderbase-1b", 0.5, (1, 4), graphs=False),
    Job("whisper-large-v2", 0.5, (1, 4), graphs=False, kind="speech"),
)


def tiny_jobs() -> tuple[Job, ...]:
    """Of the embedded models' shapes: every path, the smallest of everything."""
    folders = {kind: str(workload.ASSETS / "models" / kind) for kind in ("code", "speech")}
    return (
        Job(folders["code"], 1, (2,), (1,), (50.0,)),
        Job(folders["speech"], 1, (1,), (1,), kind="speech", graphs=False),
    )


def measure(session: Session, budget: Budget) -> Iterator[dict]:
    """Measure one job after the other, each within its share of the budget, and yield each row as it comes."""
    jobs = tiny_jobs() if session.dry_run else JOBS
    size = TINY if session.dry_run else Size()
    loading_s = 0.0  # the longest so far
    for place, job in enumerate(jobs):
        own = budget.share(job.weight, sum(other.weight for other in jobs[place + 1 :]))
        if job.quantize == "int8" and bitsandbytes() is None:
            yield _told(session, job, "bitsandbytes, which makes 8-bit layers, is not installed")
            continue
        if budget.left_s <= loading_s:
            yield _told(session, job, "there was no time left")
            continue
        measured = _Measured(session, job, size, own)
        try:
            yield from measured.rows()
        except torch.cuda.OutOfMemoryError:
            yield _told(session, job, "the GPU's memory does not hold it")
        loading_s = max(loading_s, measured.loading_s)
        gc.collect()
        if session.device.type == "cuda":
            torch.cuda.empty_cache()


def _told(session: Session, job: Job, reason: str) -> dict:
    return session.record("models", {"measures": "nothing", "model": job.model, "quantize": job.quantize, "reason": reason})


class _Measured:
    """One job. The longest of each kind of work so far says whether another one fits into the budget."""

    def __init__(self, session: Session, job: Job, size: Size, budget: Budget) -> None:
        self.session, self.job, self.size, self.budget = session, job, size, budget
        self.loading_s = 0.0
        self._longest: dict[str, float] = {}

    def rows(self) -> Iterator[dict]:
        job, session, size = self.job, self.session, self.size
        on_gpu, started = session.device.type == "cuda", time.perf_counter()
        engine = Engine.from_pretrained(
            job.model,
            device=session.device,
            dtype=session.dtype,
            quantize=job.quantize,
            weights="random",
            max_batch_size=size.batch,
            adapter_slots=size.batch,
            max_waiting=4 * max(size.requests, BATCH),
            static_shapes=job.graphs,
            capture_steps=job.graphs and on_gpu,
        )
        self.loading_s = time.perf_counter() - started
        try:
            source = clips(engine) if job.kind == "speech" else sources_of({job.kind: engine})[job.kind]
            for rank in job.step_ranks:
                if self._fits("steps"):
                    yield from self._timed("steps", self._steps(engine, source, rank))
            for rank in job.ranks:
                if self._fits("sweep"):
                    yield from self._timed("sweep", self._sweep(engine, source, rank))
        finally:
            engine.close(timeout_s=0.0)

    def _fits(self, work: str) -> bool:
        return self.budget.left_s > self._longest.get(work, 0.0)

    def _timed(self, work: str, rows: Iterator[dict]) -> Iterator[dict]:
        started = time.perf_counter()
        yield from rows
        self._longest[work] = max(self._longest.get(work, 0.0), time.perf_counter() - started)

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
        """Paired decode steps of all methods: a batch of distinct adapters of a rank, each method with a cache of its own."""
        size, kind = self.size, self.job.kind
        hardware.reset_peak_memory([engine.device])
        num_new = size.warmup_steps + size.steps + 2
        tags = add_random_copies(engine, size.batch, rank, METHODS, self.session.seed)
        rng = np.random.default_rng(self.session.seed)
        generations: dict[str, Generation] = {}
        try:
            asked = [source.draw(None, size.prompt_tokens, num_new, rng) for _ in tags]
            planned = [
                PlannedRequest(n, 0.0, kind, tag, one, num_new) for n, (tag, one) in enumerate(zip(tags, asked, strict=True))
            ]
            generations = {method: engine.start([one.request() for one in planned], method) for method in METHODS}
            prefill_s = {method: timed(generation.step, engine.device)[1] for method, generation in generations.items()}
            seconds: dict[str, list[float]] = {method: [] for method in METHODS}
            for step in range(-size.warmup_steps, size.steps):
                for method, generation in generations.items():
                    _, taken = timed(generation.step, engine.device)
                    seconds[method] += [taken] if step >= 0 else []
            captured = {method: _graphs_of(generation) for method, generation in generations.items()}
        finally:
            for generation in generations.values():
                generation.close()
            for tag in tags:
                engine.remove_adapter(tag)
        peak_bytes, peak_of = hardware.peak_memory([engine.device])
        weight_bytes = sum(parameter.nbytes for parameter in engine.model.parameters())
        for method, taken in seconds.items():
            over = {f"over_{name}": ratio_row(taken, seconds[name], self.session.seed) for name in ("base", "flora")}
            yield self.session.record(
                "models",
                {
                    "measures": "decode step",
                    "method": method,
                    **self._facts(engine, rank),
                    "prompt_tokens": size.prompt_tokens if kind == "code" else None,
                    "repeats": size.steps,
                    "warmup_steps": size.warmup_steps,
                    "median_s": median(taken),
                    "quantiles": quantiles(taken),
                    "tokens_per_s": size.batch / median(taken),
                    **over,
                    "prefill_s": prefill_s[method],
                    "bytes": weight_bytes,
                    "bandwidth_share": self.session.bandwidth_share(weight_bytes, median(taken)),
                    "graphs": captured[method],
                    "peak_memory_bytes": peak_bytes,
                    "peak_memory_of": peak_of,
                },
            )

    # ------------------------------------------------------------------------------------------------------------ sweep

    def _sweep(self, engine: Engine, source: Source, rank: int) -> Iterator[dict]:
        """Throughput, and latency at each rate, all methods in turn."""
        size = self.size
        traffic = Traffic(
            num_requests=size.requests,
            prompt_tokens=Lengths("fixed", size.prompt_tokens, size.prompt_tokens),
            new_tokens=Lengths("fixed", size.new_tokens, size.new_tokens),
            popularity="distinct",
            all_adapters=True,
            mix={self.job.kind: 1.0},
            seed=self.session.seed,
        )
        load = LoadSettings(traffic, SWEPT, warmup_requests=size.warmup_requests)
        settings = SweepSettings(load, (rank,), self.job.rates, size.batch, (THROUGHPUT, LATENCY))
        command = self.session.facts["command"]
        sweep = Sweep(engine, source, settings, command, lambda: self.budget.left_s <= 0, add_random_copies)
        num_kept = 0
        for _ in itertools.chain(sweep.run(), (None,)):
            for row in sweep.rows[num_kept:]:
                num_kept += 1
                own = {key: value for key, value in row.items() if key not in NOT_KEPT}
                yield self.session.record("models", own | self._facts(engine, rank))


def clips(engine: Engine) -> Clips:
    """Noise for a speech model to write down: no file is read, and what is heard changes nothing of what a step costs."""
    seconds = min(CLIP_S, engine.window_s)
    samples = np.random.default_rng(0).normal(0.0, 0.1, math.floor(seconds * SAMPLING_RATE)).astype(np.float32)
    clip = Clip("noise", 16, None, samples, SAMPLING_RATE)
    encoded = engine.runner.encode(PlannedRequest(0, 0.0, "speech", None, clip, 1).request())
    return Clips([clip], engine.context_length - len(encoded.prompt_ids))


def _graphs_of(generation: Generation) -> dict | None:
    """How many graphs a batch has captured and replayed, and why none, where that failed; None without graphs."""
    graphs = generation.core.graphs
    if graphs is None:
        return None
    return {"captured": graphs.num_captured, "replayed": graphs.num_replayed, "failure": graphs.failure}
