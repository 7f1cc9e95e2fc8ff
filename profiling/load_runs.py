"""Load runs: every method is given the same requests, in turn, and what becomes of them is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from flora.audio import load_audio
from flora.engine import Request
from flora.errors import RequestError
from flora.ops import FAMILY
from profiling import workload
from profiling.compare import checked_methods
from profiling.load import Driver, Sample
from profiling.load_metrics import Record
from profiling.saturation import Saturation
from profiling.traffic import Clip, Clips, EndlessTraffic, PlannedRequest, Prompt, Prompts, Source, Traffic

if TYPE_CHECKING:
    from flora.engine import Engine
    from flora.store import AdapterCounters

_WARMUP_BLOCK = 1_000_003  # a draw of the traffic that no run comes to
_WARMUP_CONCURRENCY = 8


@dataclass(frozen=True)
class LoadSettings:
    """What is to be measured. RequestError for what makes no sense.

    traffic: what every method is given. concurrency: a closed loop with so many requests at once, where the traffic's times do not
    count; None: an open loop. duration_s: of a closed loop that goes on, with as many requests as it takes. warmup_requests: served
    before each run, not counted. repeats: runs of each method, the methods taking turns. limits: of goodput, in seconds.
    """

    traffic: Traffic
    methods: tuple[str, ...] = ("flora", "bmm-lora")
    concurrency: int | None = None
    duration_s: float | None = None
    warmup_requests: int = 16
    repeats: int = 1
    limits: Mapping[str, float] = field(default_factory=dict)
    stop_when_saturated: bool = True

    def __post_init__(self) -> None:
        checked_methods(self.methods)
        if self.concurrency is not None and self.concurrency < 1:
            raise RequestError(f"the concurrency must be at least 1 request, not {self.concurrency}")
        if self.concurrency is not None and not math.isinf(self.traffic.rate):
            raise RequestError("a closed loop sends a request when another is done: give a concurrency or a rate, not both")
        if self.concurrency is not None and self.traffic.burstiness != 1:
            raise RequestError("a closed loop sends a request when another is done: burstiness needs a rate, not a concurrency")
        if self.duration_s is not None and not 0 < self.duration_s < math.inf:
            raise RequestError(f"the duration must be a number of seconds above 0, not {self.duration_s:g}")
        if self.duration_s is not None and self.concurrency is None:
            raise RequestError("an open loop ends with its last request: give the number of requests, or a concurrency")
        if self.warmup_requests < 0 or self.repeats < 1:
            raise RequestError("the warm-up cannot have fewer than 0 requests, nor the run fewer than 1 repeat")


@dataclass(frozen=True)
class MethodRun:
    """One run of one method. adapters: kind → tag → what the bank counted during the run; tags that were not used are left out."""

    method: str
    repeat: int
    records: tuple[Record, ...]
    samples: tuple[Sample, ...]
    duration_s: float
    saturation: Saturation | None
    adapters: dict[str, dict[str, AdapterCounters]]
    interrupted: bool = False


@dataclass(frozen=True)
class LoadProgress:
    """A run has come so far. sample: None while warming up. done, total: requests; total None where there is no end but time."""

    method: str
    repeat: int
    done: int
    total: int | None
    sample: Sample | None = None


LoadEvent = LoadProgress | MethodRun


def servable_by(engines: Mapping[str, Engine], methods: Sequence[str], most: int | None = None) -> dict[str, tuple[str, ...]]:
    """By kind, the first `most` tags that every one of the methods can serve (None: all of them), in the engine's order."""
    families = {FAMILY[method] for method in methods} - {None}
    return {
        kind: tuple(tag for tag, info in engine.adapters.items() if families <= set(info.families))[:most]
        for kind, engine in engines.items()
    }


def sources_of(engines: Mapping[str, Engine], requests: Sequence[tuple[str, Request]] | None = None) -> dict[str, Source]:
    """By kind, what there is to ask: the corpus' held-out prompts and the clips that ship, or `requests` of one's own, named.

    The answer to a request of one's own is as long as its max_new_tokens. Raises RequestError where a kind has none.
    """
    return {kind: (_prompts if kind == "code" else _clips)(engine, requests) for kind, engine in engines.items()}


def _prompts(engine: Engine, requests: Sequence[tuple[str, Request]] | None) -> Prompts:
    tokenizer = engine.tokenizer  # not the engine, which may be replaced while a load's prompts are kept

    def encode(text: str) -> Sequence[int]:
        return tokenizer(text)["input_ids"]

    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if requests is None:
        return Prompts.of_corpus(encode, decode, engine.context_length)
    texts = [(request.prompt, request.max_new_tokens) for _, request in requests if request.prompt is not None]
    if not texts:
        raise RequestError("there is no prompt for the code model among the requests: add one, or leave code out of the mix")
    prompts = [Prompt(text, len(encode(text)), most) for text, most in texts]
    for prompt in prompts:
        engine.validate(Request(prompt=prompt.text), "base")
    return Prompts(encode, decode, engine.context_length, prompts)


def _clips(engine: Engine, requests: Sequence[tuple[str, Request]] | None) -> Clips:
    if requests is None:
        clips = []
        for row in workload.example_clips():
            samples, rate = load_audio(workload.ASSETS / "clips" / row["file"])
            spoken = engine.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            heard = samples[: int(rate * engine.window_s)]  # how long a clip is matters here, not how it ends
            clips.append(Clip(row["file"], max(1, len(spoken)), row["tag"], heard, rate))
    else:
        given = [(name, request) for name, request in requests if request.audio is not None]
        clips = [Clip(name, one.max_new_tokens, None, one.audio, one.sampling_rate) for name, one in given]
    if not clips:
        raise RequestError("there is no clip for the speech model among the requests: add one, or leave speech out of the mix")
    for clip in clips:
        encoded = engine.runner.encode(Request(audio=clip.samples, sampling_rate=clip.sampling_rate))
    return Clips(clips, engine.context_length - len(encoded.prompt_ids))


def run_load(
    engines: Mapping[str, Engine],
    sources: Mapping[str, Source],
    adapters: Mapping[str, Sequence[str]],
    settings: LoadSettings,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[LoadEvent]:
    """Give every method the same requests, in turn, and yield how far each is and each run as it ends.

    engines, sources, adapters: by kind, as `Traffic.plan` takes them. should_stop: asked a few times a second; once true, the run
    that is on ends with what it has and no other begins. A method that was over-saturated is not run again. Raises RequestError
    before anything runs.
    """
    traffic = settings.traffic
    plan = traffic.plan(sources, adapters)
    warmup = replace(traffic, num_requests=max(1, settings.warmup_requests), rate=math.inf)
    warmup_plan = warmup.plan(sources, adapters, block=_WARMUP_BLOCK)[: settings.warmup_requests]
    used = {kind: engines[kind] for kind in traffic.mix}
    total = None if settings.duration_s is not None else len(plan)
    saturated: set[str] = set()
    stopped = False

    def driver_of(method: str, requests: Iterable[PlannedRequest], **options) -> Driver:
        return Driver(used, method, requests, seed=traffic.seed, **options)

    for repeat in range(settings.repeats):
        for method in settings.methods:
            if stopped or method in saturated:
                continue
            warming = driver_of(method, warmup_plan, concurrency=_WARMUP_CONCURRENCY)
            yield LoadProgress(method, repeat, 0, total)
            for _ in warming.watch():
                if should_stop():
                    warming.stop()
                    stopped = True
            if stopped:
                continue
            before = {kind: engine.bank.counters() for kind, engine in used.items()}
            driver = driver_of(
                method,
                EndlessTraffic(traffic, sources, adapters) if total is None else plan,
                concurrency=settings.concurrency,
                duration_s=settings.duration_s,
                num_samples=None,
                stop_when_saturated=settings.stop_when_saturated and math.isfinite(traffic.rate),
            )
            for sample in driver.watch():
                stopped = stopped or should_stop()
                if stopped:
                    driver.stop()
                yield LoadProgress(method, repeat, sum(sample.outcomes.values()), total, sample)
            if driver.saturation is not None and settings.stop_when_saturated:
                saturated.add(method)
            yield MethodRun(
                method=method,
                repeat=repeat,
                records=tuple(driver.records),
                samples=tuple(driver.samples),
                duration_s=driver.ended_s,
                saturation=driver.saturation,
                adapters=_counted(before, {kind: engine.bank.counters() for kind, engine in used.items()}),
                interrupted=stopped,
            )


def _counted(
    before: dict[str, dict[str, AdapterCounters]], after: dict[str, dict[str, AdapterCounters]]
) -> dict[str, dict[str, AdapterCounters]]:
    """What was counted between two moments."""
    counted: dict[str, dict[str, AdapterCounters]] = {}
    for kind, counters in after.items():
        counted[kind] = {}
        for tag, now in counters.items():
            then = before[kind].get(tag)
            difference = (
                now if then is None else replace(now, **{name: value - getattr(then, name) for name, value in asdict(now).items()})
            )
            if any(asdict(difference).values()):
                counted[kind][tag] = difference
    return counted
