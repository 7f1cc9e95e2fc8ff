"""Methods side by side on one batch, paired and interleaved.

Both methods take the same requests and make the same number of tokens (`ignore_eos`). Each has its own generation, so
its own KV cache, and their steps alternate: a drift of the machine hits both. A batch may hold both kinds of request;
then a step is one forward of the code model and one of the speech model.

The clocks. Every method has one clock per kind of model, which runs only while that method's own step of that kind
runs: prefill and decode, device synchronised on both sides. Preparing a batch (tokeniser, log-mel spectrograms, empty
cache) is on no clock, it is reported as `prepare_s`.
    TTFT       the clock of the request's kind at its first token; a batch is prefilled together: the prefill's time
    TPOT       (clock at the last token - clock at the first) / (tokens - 1), as vLLM defines it
    s/token    clock at the last token / tokens, the mean over requests: the paper's latency
    tokens/s   new tokens / the sum of the clocks: of both kinds together, the rate of two models that take turns
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from flora.engine import Agreement, Engine, FinishEvent, Request, TokenEvent
from flora.errors import FloraError, RequestError
from flora.ops import FAMILY, METHODS
from profiling import hardware, workload
from profiling.comparison import ComparisonResult, MethodFigures
from profiling.events import CompareEvent, Finished, Progress, RowFailed, RowText, Started, StepTimed
from profiling.timing import Ratio, median, paired_ratio, quantiles, timed

if TYPE_CHECKING:
    from flora.engine import Generation

BASE = "base"


@dataclass
class _Batch:
    """The requests of one kind, which take every step together."""

    kind: str
    engine: Engine
    indices: list[int]  # in the requests given
    requests: list[Request]


@dataclass
class _Row:
    """One request under one method, as far as it has come in one repeat."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    stopped: bool = False
    finish_reason: str = "cancelled"
    first_s: float | None = None  # its clock at the first token
    last_s: float | None = None  # its clock at the last token

    @property
    def tpot_s(self) -> float | None:
        return (self.last_s - self.first_s) / (len(self.token_ids) - 1) if len(self.token_ids) > 1 else None

    @property
    def s_per_token(self) -> float | None:
        return self.last_s / len(self.token_ids) if self.token_ids else None


def compare(
    engines: Mapping[str, Engine],
    requests: Sequence[Request],
    methods: Sequence[str] = ("flora", "bmm-lora"),
    *,
    warmup_steps: int = 5,
    repeats: int = 1,
    seed: int = 0,
    verify: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
    audio_names: Mapping[int, str] | None = None,
    model_names: Mapping[str, str] | None = None,
) -> Iterator[CompareEvent]:
    """Run `requests` under every method, paired and interleaved, and yield what happens; the last event is `Finished`.

    engines: kind → engine; prompts go to "code", clips to "speech". methods: the first two give the headline ratio.
    warmup_steps: decode steps, after a prefill, that each method takes on each kind before any clock runs.
    repeats: how often the whole batch is generated; steps and times of all repeats count. seed: for sampling (plus the
    repeat) and the bootstrap. verify: hold the last repeat's tokens against merged weights. should_stop: asked before
    every forward; once true, what was measured so far is the result, with `stopped` set. audio_names (index → the clip's
    file) and model_names (kind → what the model was loaded by) are for the command that reproduces the run.

    A request that a method cannot serve fails alone (`RowFailed`); the rest runs. Raises RequestError at once for an
    empty batch, an unknown method, a method given twice, or nonsense counts.
    """
    methods = checked_methods(methods)
    if not len(requests):
        raise RequestError("the batch is empty: add a code prompt or an audio clip")
    if warmup_steps < 0 or repeats < 1:
        raise RequestError("the warm-up cannot be shorter than 0 steps, nor the repeats fewer than 1")
    command = workload.command_line(
        engines, requests, methods, warmup_steps, repeats, seed, audio_names=audio_names or {}, model_names=model_names or {}
    )
    comparison = _Comparison(engines, list(requests), methods, warmup_steps, repeats, seed, verify, should_stop, command)
    return comparison.run()


def checked_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """The methods as given; RequestError where there is none, an unknown one, or one twice."""
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise RequestError(f"there is no method {unknown[0]!r}: choose among {', '.join(METHODS)}")
    if not methods:
        raise RequestError("a comparison needs a method: choose two")
    twice = [method for method in methods if list(methods).count(method) > 1]
    if twice:
        raise RequestError(f"the method {twice[0]!r} is given twice: compare two different ones")
    return tuple(methods)


class _Comparison:
    """One run of `compare`."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        requests: list[Request],
        methods: tuple[str, ...],
        warmup_steps: int,
        repeats: int,
        seed: int,
        verify: bool,
        should_stop: Callable[[], bool],
        command: str,
    ) -> None:
        self.engines, self.requests, self.methods = engines, requests, methods
        self.repeats, self.seed, self.should_stop, self.command = repeats, seed, should_stop, command
        self.wanted_warmup_steps, self.verify = warmup_steps, verify
        self.stopped = False
        self.failures: dict[int, str] = {}
        self.warmups: list[int] = []  # decode steps of each warm-up
        self.steps: list[StepTimed] = []
        self.step = 0
        self.prepare_s: dict[tuple[str, str], list[float]] = {}  # (kind, method) → per repeat
        self.rows: dict[tuple[int, str], list[_Row]] = {}  # (index, method) → per repeat
        self.chosen_logits: dict[tuple[str, str], list[list[float]]] = {}  # (kind, method) → per request, last repeat
        self.agreements: dict[tuple[str, str], Agreement] = {}  # (kind, method)

    def run(self) -> Iterator[CompareEvent]:
        rows, self.batches = self._sort_out()
        longest = max((request.max_new_tokens for batch in self.batches for request in batch.requests), default=0)
        self.planned_steps = longest * self.repeats
        yield Started(rows=tuple(rows), methods=self.methods, num_steps=self.planned_steps)
        yield from self._failed(self.failures)
        hardware.reset_peak_memory(batch.engine.device for batch in self.batches)
        yield from self._warm_up()
        for repeat in range(self.repeats):
            if self.batches and not self.stopped:
                yield from self._measure(repeat)
        if self.verify:
            yield from self._check()
        yield Finished(self._result())

    def _failed(self, failures: Mapping[int, str]) -> Iterator[RowFailed]:
        yield from (RowFailed(index, message) for index, message in sorted(failures.items()))

    def _asks_to_stop(self) -> bool:
        self.stopped = self.stopped or bool(self.should_stop())
        return self.stopped

    def _sort_out(self) -> tuple[list[dict], list[_Batch]]:
        """Give every request to its kind's engine, or write down why not."""
        rows, batches = [], {}
        for index, request in enumerate(self.requests):
            kind = workload.kind_of(request)
            request, errors = dataclasses.replace(request, ignore_eos=True), {}
            for method in self.methods:
                try:
                    if kind not in self.engines:
                        raise RequestError(f"no {kind} model is loaded to serve this {_THING[kind]}: start with one")
                    self.engines[kind].validate(request, method)
                except FloraError as error:
                    errors[method] = str(error)
            if errors:
                self.failures[index] = next(iter(errors.values()))
            else:
                batch = batches.setdefault(kind, _Batch(kind, self.engines[kind], [], []))
                batch.indices.append(index)
                batch.requests.append(request)
            rows.append({"index": index, "kind": kind, "adapter": request.adapter, "method_errors": errors})
        return rows, [batches[kind] for kind in sorted(batches)]

    def _start(self, batch: _Batch, method: str, requests: Sequence[Request], seed: int) -> Generation | None:
        """Start a generation; where the engine refuses the batch as a whole, its requests fail and the other kind goes
        on.
        """
        try:
            return batch.engine.start(requests, method, seed=seed)
        except FloraError as error:
            self.failures |= dict.fromkeys(batch.indices, str(error))
            self.batches = [other for other in self.batches if other is not batch]
            return None

    def _warm_up(self) -> Iterator[CompareEvent]:
        """A short generation of every method on every kind, whose times and tokens are thrown away."""
        if not self.wanted_warmup_steps:
            self.warmups = [0]
            return
        lengths = {
            batch.kind: min(1 + self.wanted_warmup_steps, max(request.max_new_tokens for request in batch.requests))
            for batch in self.batches
        }
        done, total = 0, len(self.methods) * sum(lengths.values())
        for batch in self.batches:
            length = lengths[batch.kind]
            shortened = [dataclasses.replace(r, max_new_tokens=min(length, r.max_new_tokens)) for r in batch.requests]
            for method in self.methods:
                generation = self._start(batch, method, shortened, self.seed)
                if generation is None:
                    yield from self._failed({index: self.failures[index] for index in batch.indices})
                    break
                num_decode_steps = 0
                try:
                    while not generation.done and not self._asks_to_stop():
                        num_decode_steps += generation.phase == "decode"
                        timed(generation.step, batch.engine.device)
                        done += 1
                        yield Progress("warm-up", min(done, total), total)
                finally:
                    generation.close()
                self.warmups.append(num_decode_steps)

    def _measure(self, repeat: int) -> Iterator[CompareEvent]:
        """Generate the whole batch once with every method, their steps taking turns."""
        generations: dict[tuple[str, str], Generation] = {}  # (kind, method)
        try:
            for batch in self.batches:
                for method in self.methods:
                    with batch.engine.exclusive():
                        started = time.perf_counter()
                        generation = self._start(batch, method, batch.requests, self.seed + repeat)
                        seconds = time.perf_counter() - started
                    if generation is None:
                        yield from self._failed({index: self.failures[index] for index in batch.indices})
                        for key in [key for key in generations if key[0] == batch.kind]:
                            generations.pop(key).close()
                        break
                    self.prepare_s.setdefault((batch.kind, method), []).append(seconds)
                    generations[batch.kind, method] = generation
                    for index in batch.indices:
                        self.rows.setdefault((index, method), []).append(_Row())
            clocks = dict.fromkeys(generations, 0.0)
            while not self.stopped and not all(generation.done for generation in generations.values()):
                for method in self.methods:
                    yield from self._take_turn(repeat, method, generations, clocks)
                self.step += 1
            self.chosen_logits = {key: generation.chosen_logits for key, generation in generations.items()}
        finally:
            for generation in generations.values():
                generation.close()

    def _take_turn(
        self, repeat: int, method: str, generations: dict[tuple[str, str], Generation], clocks: dict[tuple[str, str], float]
    ) -> list[CompareEvent]:
        """One step of one method on every kind; then, off every clock, what came of it is noted and told.

        Every turn is the same sequence: the code model's step, the speech model's, the notes, the listeners. So a step finds the
        processor's caches as its neighbour left them, and that is the same neighbour for every method. Were two methods' steps of
        one model neighbours, or the notes taken once for both, one of them would have the better start.
        """
        timings: list[tuple[_Batch, StepTimed, list[TokenEvent | FinishEvent]]] = []
        for batch in self.batches:
            generation = generations[batch.kind, method]
            if not generation.done and not self._asks_to_stop():
                phase = generation.phase
                with batch.engine.exclusive():  # whoever else is on the device has its turn before the clock starts
                    news, seconds = timed(generation.step, batch.engine.device)
                num_new_tokens = sum(isinstance(event, TokenEvent) for event in news)
                timings.append((batch, StepTimed(self.step, batch.kind, method, phase, seconds, num_new_tokens, repeat), news))
        events: list[CompareEvent] = []
        for batch, timing, news in timings:
            self.steps.append(timing)
            clocks[batch.kind, method] += timing.seconds
            events += [timing, *self._note(batch, method, news, clocks[batch.kind, method])]
        if timings:
            turn = self.methods.index(method) + 1
            taken = self.step + (turn == len(self.methods))
            prefill = all(timing.phase == "prefill" for _, timing, _ in timings)
            events.append(
                Progress("prefill", turn, len(self.methods))
                if prefill
                else Progress("decode", taken, max(taken, self.planned_steps))
            )
        return events

    def _note(self, batch: _Batch, method: str, news: Sequence[TokenEvent | FinishEvent], clock: float) -> Iterator[RowText]:
        """Write a step's tokens down, row by row, at its kind's clock."""
        for event in news:
            index = batch.indices[event.index]
            row = self.rows[index, method][-1]
            if isinstance(event, FinishEvent):
                row.finish_reason = event.completion.finish_reason
                continue
            row.first_s = clock if row.first_s is None else row.first_s
            row.last_s = clock
            row.token_ids.append(event.token_id)
            row.text, row.stopped = event.text, event.stopped
            yield RowText(index, method, row.text, len(row.token_ids), row.stopped)

    def _check(self) -> Iterator[CompareEvent]:
        """Hold the last repeat's tokens against merged weights. Not after a stop: whoever stops wants to be done."""
        done, total = 0, len(self.batches) * len(self.methods)
        for batch in self.batches:
            for method in self.methods:
                if self._asks_to_stop():
                    return
                rows = [self.rows[index, method][-1] for index in batch.indices]
                token_ids, logits = [row.token_ids for row in rows], self.chosen_logits[batch.kind, method]
                requests = batch.requests
                if method == BASE:  # its reference is the base model too, whatever adapters were asked for
                    requests = [dataclasses.replace(request, adapter=None) for request in requests]
                self.agreements[batch.kind, method] = batch.engine.verify(requests, token_ids, method, logits)
                done += 1
                yield Progress("checking", done, total)

    # ------------------------------------------------------------------------------------------------- figures

    def _result(self) -> ComparisonResult:
        batches = [batch for batch in self.batches if any(step.kind == batch.kind for step in self.steps)]
        kinds = [batch.kind for batch in batches]
        methods: dict[str, MethodFigures] = {}
        for method in self.methods if batches else ():
            by_kind = {batch.kind: self._figures(method, [batch]) for batch in batches}
            methods[method] = dataclasses.replace(self._figures(method, batches), by_kind=by_kind)
        second = methods[self.methods[1]] if methods and len(self.methods) > 1 else None
        adapters = [request.adapter for batch in self.batches for request in batch.requests]
        peak_bytes, peak_of = hardware.peak_memory([batch.engine.device for batch in self.batches])
        used = {batch.kind: batch.engine for batch in self.batches}
        return ComparisonResult(
            methods=methods,
            ratio=second.ratio_to_first if second else None,
            ratio_by_kind={kind: second.by_kind[kind].ratio_to_first for kind in kinds} if second else {},
            rows=tuple(self._row_facts()),
            failures=dict(sorted(self.failures.items())),
            steps=tuple(self.steps),
            num_steps=len({step.step for step in self.steps if step.phase == "decode"}),
            warmup_steps=min(self.warmups, default=0),
            repeats=self.repeats,
            seed=self.seed,
            stopped=self.stopped,
            batch=len(adapters),
            popularity=workload.popularity(adapters),
            peak_memory_bytes=peak_bytes,
            peak_memory_of=peak_of,
            environment=hardware.environment(used),
            command=self.command,
        )

    def _figures(self, method: str, batches: Sequence[_Batch]) -> MethodFigures:
        kinds = {batch.kind for batch in batches}
        indices = [index for batch in batches for index in batch.indices]
        steps = [step for step in self.steps if step.method == method and step.kind in kinds]
        decode = [step for step in steps if step.phase == "decode"]
        rows = [row for index in indices for row in self.rows[index, method] if row.token_ids]
        own = self._decode_seconds(method, kinds)
        prefills = [
            median([step.seconds for step in steps if step.kind == kind and step.phase == "prefill"]) for kind in sorted(kinds)
        ]
        checked = [self.agreements[batch.kind, method] for batch in batches if (batch.kind, method) in self.agreements]
        num_new_tokens = sum(step.num_new_tokens for step in steps)
        s_per_token = [row.s_per_token for row in rows]
        return MethodFigures(
            method=method,
            num_requests=len(indices),
            num_new_tokens=num_new_tokens,
            tokens_per_s=_rate(steps),
            decode_tokens_per_s=_rate(decode),
            ttft_s=median([row.first_s for row in rows]),
            tpot_s=median([row.tpot_s for row in rows if row.tpot_s is not None]),
            s_per_token=float(np.mean(s_per_token)) if s_per_token else None,
            prepare_s=sum(median(self.prepare_s.get((kind, method), [])) or 0.0 for kind in kinds),
            prefill_s=sum(prefills) if None not in prefills else None,
            step_quantiles=quantiles(list(own.values())),
            ratio_to_first=self._ratio(method, self.methods[0], kinds),
            ratio_to_base=self._ratio(method, BASE, kinds) if BASE in self.methods else None,
            agreement=_sum_agreements(checked) if checked else None,
            ranks=tuple(_rank(batch.engine, request.adapter, method) for batch in batches for request in batch.requests),
        )

    def _decode_seconds(self, method: str, kinds: set[str]) -> dict[tuple[int, tuple[str, ...]], float]:
        """Step (and which of the kinds decoded in it) → the seconds of the method's decode steps on those kinds
        together.
        """
        by_step: dict[int, dict[str, float]] = {}
        for step in self.steps:
            if step.method == method and step.kind in kinds and step.phase == "decode":
                by_step.setdefault(step.step, {})[step.kind] = step.seconds
        return {(step, tuple(sorted(seconds))): sum(seconds.values()) for step, seconds in by_step.items()}

    def _ratio(self, method: str, reference: str, kinds: set[str]) -> Ratio | None:
        """The method's decode step over the reference's, of the steps in which both decoded on the same kinds."""
        if method == reference:
            return None
        own, others = self._decode_seconds(method, kinds), self._decode_seconds(reference, kinds)
        pairs = [key for key in own if key in others]
        repeat_of = {step.step: step.repeat for step in self.steps}  # each repeat has caches of its own
        repeats = [repeat_of[step] for step, _ in pairs]
        return paired_ratio([own[key] for key in pairs], [others[key] for key in pairs], self.seed, repeats)

    def _row_facts(self) -> Iterator[dict]:
        for batch in self.batches:
            for index, request in zip(batch.indices, batch.requests, strict=True):
                for method in self.methods:
                    runs = [row for row in self.rows.get((index, method), ()) if row.token_ids]
                    if runs:
                        yield {
                            "index": index,
                            "kind": batch.kind,
                            "adapter": request.adapter,
                            "method": method,
                            "text": runs[-1].text,
                            "num_new_tokens": len(runs[-1].token_ids),
                            "stopped": runs[-1].stopped,
                            "finish_reason": runs[-1].finish_reason,
                            "ttft_s": median([run.first_s for run in runs]),
                            "tpot_s": median([run.tpot_s for run in runs if run.tpot_s is not None]),
                        }


_THING = {"code": "prompt", "speech": "clip"}


def _rate(steps: Sequence[StepTimed]) -> float | None:
    """New tokens per second of engine time."""
    return sum(step.num_new_tokens for step in steps) / sum(step.seconds for step in steps) if steps else None


def _sum_agreements(agreements: Sequence[Agreement]) -> Agreement:
    differences = [a.max_logit_difference for a in agreements if a.max_logit_difference is not None]
    return Agreement(
        tokens=sum(agreement.tokens for agreement in agreements),
        agreeing=sum(agreement.agreeing for agreement in agreements),
        max_logit_difference=max(differences, default=None),
    )


def _rank(engine: Engine, adapter: str | None, method: str) -> int:
    """The rank of the adapter that serves a request under a method; 0 where none does."""
    if adapter is None or method == BASE:
        return 0
    ranks = engine.adapters[adapter].ranks
    family = FAMILY[method] or ("flora" if "flora" in ranks else "lora")  # merged: the fLoRA adapter where there is one
    return ranks[family]
