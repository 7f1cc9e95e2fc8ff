"""The engine beside what it has to beat, and its own time: the figures that decide whether serving many adapters at once pays.

Contestants take turns, round after round, in one process, on the same requests; a figure is the median of the rounds' ratios with
its bootstrap interval. `peft` is PEFT's own mixed batch, `PeftModel.generate(adapter_names=…)`, where it has one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
from peft import PeftModel, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from flora.corpus.code import example_prompts
from flora.engine import Engine, Request
from flora.engine.device import compute_on
from flora.engine.graphs import Capture, Captured
from flora.errors import RequestError
from flora.random_adapters import STRENGTH
from profiling import hardware, report, workload
from profiling.document import text_table
from profiling.load_metrics import figures_of
from profiling.load_runs import LoadSettings, MethodRun, run_load, sources_of
from profiling.loading import add_random_adapters, set_threads
from profiling.promise import Figure
from profiling.timing import median, paired_ratio
from profiling.traffic import Lengths, Traffic

METHODS = ("flora", "bmm-lora")
NUM_ADAPTERS = 8  # distinct ones in the batch beside PEFT's
BATCH = 16  # of the other parts
MANY_ADAPTERS = 2000
ROUNDS_OF_LOAD = 12  # requests under load, in batches
MODEL, ADAPTERS = workload.ASSETS / "models" / "code", workload.ASSETS / "adapters" / "code"
SLOWER = 0.9  # a capacity below this share of the one before: the machine has slowed down
GOODPUT_LIMITS = {"ttft": 0.5, "tpot": 0.05}  # seconds


Progress = Callable[[str], None]


def code_engine(tags: Sequence[str] = (), **options) -> Engine:
    """An engine of the embedded code model with these shipped adapters, of both families."""
    sources = {tag: [ADAPTERS / tag / "flora", ADAPTERS / tag / "lora"] for tag in tags}
    return Engine.from_pretrained(MODEL, sources, device="cpu", **options)


def _requests(tags: Sequence[str], num_new_tokens: int) -> list[Request]:
    """A prompt of its own language for each shipped tag, of any for others."""
    prompts = example_prompts()
    of_any = [texts[0] for texts in prompts.values()]
    return [
        Request(
            prompts[tag][0] if tag in prompts else of_any[place % len(of_any)],
            adapter=tag,
            max_new_tokens=num_new_tokens,
            ignore_eos=True,
        )
        for place, tag in enumerate(tags)
    ]


def _in_turn(contestants: Mapping[str, Callable[[], object]], rounds: int, tell: Progress) -> dict[str, list[float]]:
    """Seconds of each, round after round; one round before them is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(-1, rounds):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            if round_number >= 0:
                seconds[name].append(time.perf_counter() - started)
        tell(f"round {round_number + 1} of {rounds}")
    return seconds


# --------------------------------------------------------------------------------------------------------------- PEFT


class PeftBatch:
    """PEFT's own mixed batch: one base model with every tag's LoRA adapter, and a greedy `generate` of one prompt each."""

    def __init__(self, tags: Sequence[str], requests: Sequence[Request]) -> None:
        tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        first, *others = tags
        with warnings.catch_warnings():  # it suspects the tag `r` of being part of its own tensors' names
            warnings.filterwarnings("ignore", message="Adapter name")
            self.model = PeftModel.from_pretrained(model, ADAPTERS / first / "lora", adapter_name=first).eval()
            for tag in others:
                self.model.load_adapter(ADAPTERS / tag / "lora", adapter_name=tag)
        model.generation_config.eos_token_id = None  # as `ignore_eos`
        self.tags, self.num_new_tokens = list(tags), requests[0].max_new_tokens
        self.inputs = tokenizer([request.prompt for request in requests], return_tensors="pt", padding=True)

    @torch.inference_mode()
    def generate(self) -> list[list[int]]:
        """Each prompt's new tokens."""
        output = self.model.generate(
            **self.inputs, adapter_names=self.tags, max_new_tokens=self.num_new_tokens, do_sample=False, pad_token_id=0
        )
        return output[:, self.inputs["input_ids"].shape[1] :].tolist()


def beside_peft(num_new_tokens: int, rounds: int, tell: Progress) -> Iterator[Figure]:
    """Tokens a second of the engine over those of PEFT's mixed batch, eight distinct adapters of rank 4 in one batch.

    And the share of bmm-lora's tokens that are PEFT's, which has the same adapters: below all of them it is no comparison.
    """
    tags = sorted(path.name for path in ADAPTERS.iterdir())[:NUM_ADAPTERS]
    requests = _requests(tags, num_new_tokens)
    engine, compute = code_engine(tags), compute_on(torch.device("cpu"))  # the same thread for all: none is slowed by another's
    batch = compute(lambda: PeftBatch(tags, requests))
    yield _same_tokens("peft", "bmm-lora", engine, requests, compute(batch.generate))
    served = {method: partial(engine.generate, requests, method) for method in (*METHODS, "base")}
    contestants = {"peft": lambda: compute(batch.generate), **served}
    seconds = _in_turn(contestants, rounds, tell)
    for method in METHODS:
        what = f"{method}: tokens/s over PEFT's mixed batch, {len(tags)} adapters"
        yield Figure.of_ratio("peft", what, paired_ratio(seconds["peft"], seconds[method]), 3.0)
    yield Figure.of_ratio("peft", "base: the same, without adapters", paired_ratio(seconds["peft"], seconds["base"]), None)
    for name, taken in seconds.items():
        yield Figure("peft", f"{name}: a step", 1000 * median(taken) / num_new_tokens, None, None, rounds, None, unit=" ms")
    engine.close()


def _same_tokens(part: str, method: str, engine: Engine, requests: Sequence[Request], theirs: list[list[int]]) -> Figure:
    """The share of a method's tokens that are PEFT's: below all of them, what comes after is no comparison."""
    ours = itertools.chain(*(completion.token_ids for completion in engine.generate(requests, method)))
    pairs = list(zip(ours, itertools.chain(*theirs), strict=True))
    agreeing = sum(own == their for own, their in pairs)
    return Figure(part, f"{method}'s tokens that are PEFT's", agreeing / len(pairs), None, None, len(pairs), 1.0, unit="%")


# --------------------------------------------------------------------------------------------------------------- HiRA


class PeftHira:
    """PEFT on HiRA adapters, adapter after adapter: it serves no mixed batch of them. One base model with all of them on it.

    tags: of the adapters that are made, of rank 4 on every linear layer, random and strong enough to change the answers.
    """

    def __init__(self, tags: Sequence[str], requests: Sequence[Request]) -> None:
        if not hasattr(peft, "HiraConfig"):
            raise RequestError("HiRA came with PEFT 0.20, and this one is older: upgrade peft, or leave the part hira out")
        config = peft.HiraConfig(r=4, target_modules="all-linear")
        self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), config, adapter_name=tags[0])
        for tag in tags[1:]:
            self.model.add_adapter(tag, config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, factor in self.model.named_parameters():
                if "hira_" in name:
                    factor.normal_(0.0, STRENGTH / math.sqrt(config.r) if "hira_B" in name else 1.0, generator=generator)
        self.model.eval().generation_config.eos_token_id = None  # as `ignore_eos`
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.inputs = {request.adapter: tokenizer(request.prompt, return_tensors="pt") for request in requests}
        self.num_new_tokens = requests[0].max_new_tokens

    def save(self, folder: Path) -> dict[str, Path]:
        """tag → its checkpoint, as PEFT writes it."""
        self.model.save_pretrained(folder)
        return {tag: folder / tag for tag in self.inputs}

    @torch.inference_mode()
    def generate(self) -> list[list[int]]:
        """Each prompt's new tokens."""
        answers = []
        for tag, inputs in self.inputs.items():
            self.model.set_adapter(tag)
            output = self.model.generate(**inputs, max_new_tokens=self.num_new_tokens, do_sample=False, pad_token_id=0)
            answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
        return answers


def beside_peft_hira(num_new_tokens: int, rounds: int, tell: Progress) -> Iterator[Figure]:
    """Tokens a second over PEFT's, eight distinct HiRA adapters of rank 4: in one batch here, adapter after adapter there."""
    tags = [f"hira-{number}" for number in range(NUM_ADAPTERS)]
    requests, compute = _requests(tags, num_new_tokens), compute_on(torch.device("cpu"))
    by_peft = compute(lambda: PeftHira(tags, requests))
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine.from_pretrained(MODEL, by_peft.save(Path(folder)), device="cpu")
    yield _same_tokens("hira", "flora", engine, requests, compute(by_peft.generate))
    contestants = {"peft": lambda: compute(by_peft.generate), "flora": partial(engine.generate, requests, "flora")}
    seconds = _in_turn(contestants, rounds, tell)
    what = f"flora: tokens/s over PEFT, which serves HiRA adapter by adapter, {len(tags)} adapters"
    yield Figure.of_ratio("hira", what, paired_ratio(seconds["peft"], seconds["flora"]), 8.0)
    for name, taken in seconds.items():
        tokens_per_s = len(tags) * num_new_tokens / median(taken)
        yield Figure("hira", f"{name}: tokens a second", tokens_per_s, None, None, rounds, None, unit=" tokens/s")
    engine.close()


# ----------------------------------------------------------------------------------------------------------- own time


class _TimedCapture:
    """Another `Capture`, whose replays are noted: when each began, and how long it took, in seconds."""

    def __init__(self, capture: Capture) -> None:
        self.on_host, self.first_steps, self.most = capture.on_host, capture.first_steps, capture.most
        self._capture = capture
        self.begun: list[float] = []
        self.spent: list[float] = []

    def __call__(self, *arguments) -> Captured:
        captured = self._capture(*arguments)
        return SimpleNamespace(replay=partial(self._replay, captured), forget_batch=captured.forget_batch)

    def _replay(self, captured: Captured) -> torch.Tensor:
        self.begun.append(time.perf_counter())
        output = captured.replay()
        self.spent.append(time.perf_counter() - self.begun[-1])
        return output


def own_time(num_new_tokens: int, rounds: int, tell: Progress) -> Iterator[Figure]:
    """The engine's share of a decode step at batch 16, everything but the model's captured calls, measured on its own thread."""
    tags = sorted(path.name for path in ADAPTERS.iterdir())
    requests = _requests([tags[place % len(tags)] for place in range(BATCH)], num_new_tokens)
    engine = code_engine(tags)
    timed = _TimedCapture(engine.new_capture())
    engine.new_capture = lambda: timed
    for method in METHODS:
        engine.generate(requests, method)  # captures the steps, which are replayed from then on
        shares = []
        for round_number in range(rounds):
            timed.begun.clear(), timed.spent.clear()
            engine.generate(requests, method)
            # A step is from one replay's beginning to the next one's.
            steps = zip(timed.begun, timed.begun[1:], timed.spent, strict=False)
            shares += [1 - forward / (end - begin) for begin, end, forward in steps]
            tell(f"{method}, round {round_number + 1} of {rounds}")
        what = f"{method}: the engine's own share of a decode step, batch {BATCH}"
        yield Figure("overhead", what, median(shares), None, None, len(shares), 0.15, at_most=True, unit="%")
    engine.close()


# ------------------------------------------------------------------------------------------------------------- merged


def beside_merged(num_new_tokens: int, rounds: int, tell: Progress) -> Iterator[Figure]:
    """A batch of 16 distinct adapters over the same requests one after another, each with its adapter merged into the weights."""
    engine = code_engine()
    tags = add_random_adapters(engine, BATCH, 4, METHODS)
    requests = _requests(tags, num_new_tokens)

    def one_by_one() -> None:
        for request in requests:
            engine.generate([request], "merged")

    contestants = {"merged": one_by_one, **{method: partial(engine.generate, requests, method) for method in METHODS}}
    seconds = _in_turn(contestants, rounds, tell)
    for method in METHODS:
        what = f"{method}: {BATCH} distinct adapters in a batch, over merged weights one after another"
        yield Figure.of_ratio("merged", what, paired_ratio(seconds["merged"], seconds[method]), 5.0)
    engine.close()


# ----------------------------------------------------------------------------------------------------------- under load


def _run(engine: Engine, tags: Sequence[str], method: str, traffic: Traffic, **settings) -> MethodRun:
    engines = {"code": engine}
    options = LoadSettings(traffic, methods=(method,), **settings)
    runs = [event for event in run_load(engines, sources_of(engines), {"code": tags}, options) if isinstance(event, MethodRun)]
    return runs[0]


def _tokens_per_s(run: MethodRun) -> float:
    return sum(len(record.token_s) for record in run.records) / run.duration_s


def many_adapters(num_new_tokens: int, rounds: int, tell: Progress) -> Iterator[Figure]:
    """Throughput with 2,000 registered adapters over that with 16, the same number of requests always in flight.

    Punica's `zipf:1.5` asks for some dozen of them only, however many there are; `power:1.5` has a tail, and `uniform` asks
    for another adapter with every request: each has to be copied to the device.
    """
    few, many = code_engine(max_batch_size=BATCH), code_engine(max_batch_size=BATCH)
    few_tags = add_random_adapters(few, BATCH, 4, METHODS)
    many_tags = add_random_adapters(many, MANY_ADAPTERS, 4, METHODS)
    lengths = Lengths("fixed", num_new_tokens, num_new_tokens)
    base = Traffic(num_requests=ROUNDS_OF_LOAD * BATCH, new_tokens=lengths, popularity="uniform")
    settings = (
        ("16", few, few_tags, base),
        ("zipf:1.5", many, many_tags, replace(base, popularity="zipf:1.5")),
        ("power:1.5", many, many_tags, replace(base, popularity="power:1.5")),
        ("uniform", many, many_tags, replace(base, all_adapters=True)),
    )
    for method in METHODS:
        rates: dict[str, list[float]] = {name: [] for name, *_ in settings}
        asked_for: dict[str, list[int]] = {name: [] for name, *_ in settings}
        for round_number in range(rounds):
            for name, engine, tags, traffic in settings:
                run = _run(engine, tags, method, replace(traffic, seed=round_number), concurrency=2 * BATCH)
                rates[name].append(_tokens_per_s(run))
                asked_for[name].append(len({record.planned.adapter for record in run.records}))
            tell(f"{method}, round {round_number + 1} of {rounds}")
        for name, target in (("zipf:1.5", 0.8), ("power:1.5", 0.8), ("uniform", None)):
            count = f"{median(asked_for[name]):.0f} asked for"
            what = f"{method}: tokens/s with {MANY_ADAPTERS:,} adapters, {name} ({count}), over {BATCH}"
            yield Figure.of_ratio("adapters", what, paired_ratio(rates[name], rates["16"]), target)
    few.close()
    many.close()


def goodput(num_new_tokens: int, rounds: int, tell: Progress) -> Iterator[Figure]:
    """The share of requests within 0.5 s to the first token and 50 ms per further token, at 80 % of what the engine can do.

    Requests are of different lengths: of one length, those that were admitted together would end together, and their successors'
    prompts be read in one forward, as no arrivals are. What the engine can do is measured before and after. Where it was less
    afterwards by more than a tenth, the machine had less to give meanwhile, and more than 80 % of that was asked for: such a round
    says nothing and is made again, as often as there are rounds.
    """
    engine = code_engine()
    rows = engine.max_batch_size
    tags = add_random_adapters(engine, BATCH, 4, METHODS)
    lengths = Lengths("uniform", num_new_tokens // 2, num_new_tokens + num_new_tokens // 2)
    traffic = Traffic(num_requests=ROUNDS_OF_LOAD * rows, new_tokens=lengths)

    def capacity(method: str, seed: int) -> float:
        """Requests a second."""
        full = _run(engine, tags, method, replace(traffic, seed=seed), concurrency=2 * rows)
        return len(full.records) / full.duration_s

    for method in METHODS:
        shares, num_slower = [], 0
        before = capacity(method, 0)
        while len(shares) < rounds and num_slower <= rounds:
            seed = len(shares) + num_slower
            run = _run(engine, tags, method, replace(traffic, seed=seed, rate=0.8 * before), stop_when_saturated=False)
            after = capacity(method, seed + 1)
            if after < SLOWER * before:
                num_slower += 1
            else:
                shares.append(figures_of(run.records, run.duration_s, GOODPUT_LIMITS).goodput.share)
            before = after
            tell(f"{method}, round {len(shares)} of {rounds}")
        limits = ", ".join(f"{name.upper()} {1000 * most:.0f} ms" for name, most in GOODPUT_LIMITS.items())
        left_out = f"; {num_slower} more rounds on a machine that slowed down meanwhile" if num_slower else ""
        what = f"{method}: goodput at 80 % of capacity (at most {rows} rows, {limits}){left_out}"
        middle, *ends = (median(shares), min(shares), max(shares)) if shares else (None, None, None)
        yield Figure("goodput", what, middle, *ends, len(shares), 0.95, unit="%")
    engine.close()


MEASURES: dict[str, Callable[[int, int, Progress], Iterator[Figure]]] = {
    "peft": beside_peft,
    "hira": beside_peft_hira,
    "overhead": own_time,
    "merged": beside_merged,
    "adapters": many_adapters,
    "goodput": goodput,
}


def run(options: argparse.Namespace) -> int:
    """What `python -m profiling serving` does; 1 where a figure misses its target. Raises a FloraError for bad input."""
    if options.max_new_tokens < 8 or options.rounds < 1:
        raise RequestError("--max-new-tokens must be at least 8 and --rounds at least 1")
    set_threads(options.threads)
    transformers_logging.disable_progress_bar()
    facts = hardware.environment()
    print(hardware.summary(facts), end="\n\n", flush=True)
    figures: list[Figure] = []
    with tqdm(leave=False, disable=None, bar_format="{desc}") as bar:
        for part in options.part:
            figures += MEASURES[part](options.max_new_tokens, options.rounds, bar.set_description)
    print(text_table(("part", "figure", "measured", "target", "holds"), [figure.cells() for figure in figures]))
    if options.json:
        shared = {"max_new_tokens": options.max_new_tokens, "seed": 0, "hardware": facts, "command": report.own_command()}
        rows = [json.dumps(figure.as_row() | shared, ensure_ascii=False, allow_nan=False) for figure in figures]
        report.write_text(options.json, "\n".join(rows) + "\n")
    return 1 if any(figure.holds is False for figure in figures) else 0
