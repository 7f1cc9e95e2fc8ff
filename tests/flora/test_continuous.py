"""Requests that come, go and are cancelled at random while adapters are added, replaced and removed: every token is right.

The truth is a plain transformers model with the adapter merged into its weights. It reads each answer in one forward, alone in its
row: an answer whose every token is the likeliest after those before it is the greedy one, token by token.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import WhisperProcessor

from flora import Engine, Request, ops
from flora.engine import Ticket
from flora.errors import BusyError, FloraError, UnknownAdapterError

TIE = 1e-4
"""Two tokens whose logits the reference itself has closer than this are a tie, which any order of additions may decide."""

STOPS = [0, *range(100, 116)]
"""So many stop tokens that answers of random weights do stop."""

METHODS = ("flora", "flora", "bmm-lora", "bmm-lora", "mixed", "merged", "base")
NUM_TAGS = 8
SLOTS = 3


# ------------------------------------------------------------------------------------------------------------ reference


@dataclass
class Reference:
    """Plain models with one adapter merged in, each made when it is first asked for."""

    folder: Path
    is_speech: bool
    models: dict[Path | None, torch.nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.is_speech:
            self.processor = WhisperProcessor.from_pretrained(self.folder)
        self.tokenizer = self.processor.tokenizer if self.is_speech else tiny_models.byte_tokenizer()

    @torch.no_grad()
    def wrong(self, adapter: Path | None, answers: list[tuple[Request, list[int], str]]) -> tuple[list[str], int]:
        """What is not as the model with this adapter alone would answer, in words for each such answer, and the number of ties."""
        if adapter not in self.models:
            self.models[adapter] = tiny_models.load_merged(self.folder, adapter)
        model, wrong, ties = self.models[adapter], [], 0
        for at in range(0, len(answers), 32):
            part = answers[at : at + 32]
            starts = [[1] if self.is_speech else self.tokenizer(request.prompt)["input_ids"] for request, _, _ in part]
            rows = [[*start, *tokens] for start, (_, tokens, _) in zip(starts, part, strict=True)]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])  # causal: what is behind a row is not seen
            if self.is_speech:
                clips = [request.audio for request, _, _ in part]
                features = self.processor(clips, sampling_rate=16000, return_tensors="pt").input_features
                logits = model(input_features=features, decoder_input_ids=ids).logits
            else:
                logits = model(input_ids=ids).logits
            for place, (start, (request, tokens, reason)) in enumerate(zip(starts, part, strict=True)):
                own = logits[place, len(start) - 1 : len(rows[place])]  # (tokens + 1, vocabulary)
                next_ids = own.argmax(-1).tolist()
                told = [*tokens, next_ids[-1]]
                gaps = (own.max(-1).values - own.gather(1, torch.tensor(told)[:, None])[:, 0]).tolist()
                stops = [token in STOPS for token in told]
                room = (40 if self.is_speech else 96) - len(start)
                if max(gaps) > TIE:
                    bad = next(index for index, gap in enumerate(gaps) if gap > TIE)
                    wrong.append(f"token {bad} is {told[bad]}, not {next_ids[bad]}: its logit is {gaps[bad]:.3g} below the best")
                elif not request.ignore_eos and any(stops[:-1]):
                    wrong.append("it goes on after the stop token")
                elif reason == "stop" and (request.ignore_eos or not stops[-1]):
                    wrong.append("it stops where the model does not")
                elif reason == "length" and len(tokens) != min(request.max_new_tokens, room):
                    wrong.append(f"it has {len(tokens)} tokens and should have {min(request.max_new_tokens, room)}")
                ties += told != next_ids
        return wrong, ties


# ---------------------------------------------------------------------------------------------------------------- world


@dataclass
class Version:
    """What a tag stood for, from a moment in `began` to a moment in `ended`. sources: family → folder; None: no such tag."""

    sources: dict[str, Path] | None
    began: tuple[float, float]
    ended: tuple[float, float] = (float("inf"), float("inf"))

    def may_be_that_of(self, time_s: float) -> bool:
        return self.began[0] <= time_s <= self.ended[1]


class Adapters:
    """The tags of an engine, changed while it serves, and what each stood for when."""

    def __init__(self, flora: list[Path], lora: list[Path], choose: random.Random) -> None:
        self.choices = [{"flora": a, "lora": b} for a, b in product(flora, lora)]
        self.choose = choose
        self.versions: dict[str, list[Version]] = {}
        start = (float("-inf"), float("-inf"))
        for place in range(NUM_TAGS):
            self.versions[f"t{place}"] = [Version(choose.choice(self.choices), start)]

    def change(self, engine: Engine, stop: threading.Event) -> None:
        """Replace, remove and add tags until told to stop."""
        while not stop.wait(self.choose.uniform(0.02, 0.08)):
            history = self.versions[self.choose.choice(list(self.versions))]
            tag = next(tag for tag, versions in self.versions.items() if versions is history)
            remove = history[-1].sources is not None and self.choose.random() < 0.15
            self._put(engine, tag, None if remove else self.choose.choice(self.choices))

    def complete(self, engine: Engine) -> None:
        """Add the tags that are removed at the moment."""
        for tag, history in self.versions.items():
            if history[-1].sources is None:
                self._put(engine, tag, self.choose.choice(self.choices))

    def _put(self, engine: Engine, tag: str, sources: dict[str, Path] | None) -> None:
        began = time.perf_counter()
        if sources is None:
            engine.remove_adapter(tag)
        else:
            engine.add_adapter(tag, list(sources.values()))
        moment = (began, time.perf_counter())
        self.versions[tag][-1].ended = moment
        self.versions[tag].append(Version(sources, moment))


class Crowd:
    """Callers on threads of their own."""

    def __init__(self, engine: Engine, is_speech: bool, clips: list, adapters: Adapters) -> None:
        self.engine, self.is_speech, self.clips, self.adapters = engine, is_speech, clips, adapters
        self.tickets: list[tuple[Ticket, str]] = []
        self.left: list[tuple[Ticket, list[int]]] = []  # tickets whose iteration was left, with what it had told
        self.num_refused: dict[type, int] = {BusyError: 0, UnknownAdapterError: 0}

    def call(self, seed: int, count: int) -> None:
        choose = random.Random(seed)
        mine: list[tuple[Ticket, str]] = []
        while len(mine) < count:
            request, method = self._request(choose)
            try:
                ticket = self.engine.submit(request, method, session=choose.choice((None, seed, "both")))
            except (BusyError, UnknownAdapterError) as error:
                self.num_refused[type(error)] += 1
                time.sleep(0.005)
                continue
            mine.append((ticket, method))
            fate = choose.random()
            if fate < 0.08:
                time.sleep(choose.uniform(0, 0.04))
                ticket.cancel()
            elif fate < 0.16:
                self._leave_early(ticket, choose.randint(1, 6))
            elif fate < 0.25:
                try:
                    ticket.result(60)
                except UnknownAdapterError:
                    pass
            elif fate < 0.6:
                time.sleep(choose.uniform(0, 0.01))
            if fate > 0.97:
                choose.choice(mine)[0].cancel()
        self.tickets += mine

    def call_in_turn(self, tags: Iterable[str]) -> None:
        """Ask once with each tag, one after another: with fewer slots than tags, adapters make room for each other."""
        for tag in tags:
            request, _ = self._request(random.Random(tag))
            ticket = self.engine.submit(replace(request, adapter=tag), "flora")
            self.tickets.append((ticket, "flora"))
            ticket.result(60)

    def _leave_early(self, ticket: Ticket, after: int) -> None:
        told = []
        try:
            for event in ticket:
                told.append(getattr(event, "token_id", None))
                if len(told) == after:
                    break
        except UnknownAdapterError:
            return
        self.left.append((ticket, [token for token in told if token is not None]))

    def _request(self, choose: random.Random) -> tuple[Request, str]:
        if self.is_speech:
            asked = {"audio": choose.choice(self.clips), "sampling_rate": 16000}
        else:
            length = choose.choice((1, 2, 7, 20, 33, 60, 94, choose.randint(1, 95)))
            asked = {"prompt": "".join(choose.choices("abcxyz(): =\n", k=length - 1)) + "x"}
        method = choose.choice(METHODS)
        return Request(
            **asked,
            adapter=choose.choice([*self.adapters.versions, None]),
            max_new_tokens=choose.choice((1, 2, 3, 5, 8, 12, 200 if choose.random() < 0.15 else 4)),
            ignore_eos=choose.random() < 0.5,
        ), method


@pytest.mark.parametrize(("name", "count"), [("code", 320), ("speech", 240), ("llama", 80), ("qwen2", 60)])
def test_every_answer_is_that_of_its_request_alone(name, count, checkpoints, clips, tmp_path):
    made, is_speech = checkpoints[name], name == "speech"
    folder = tiny_models.copy_with_generation_options(made.model, tmp_path / "model" / name, eos_token_id=STOPS)
    plain = tiny_models.load_plain(folder)
    flora = [made.adapters[tag]["flora"] for tag in made.adapters] + [
        tiny_models.save_flora_adapter(tmp_path / str(rank), plain, made.layers, rank, seed=40 + rank) for rank in (2, 5)
    ]
    lora = [made.adapters[tag]["lora"] for tag in made.adapters]
    adapters = Adapters(flora, lora, random.Random(f"adapters {name}"))
    engine = Engine.from_pretrained(
        folder,
        {tag: list(versions[0].sources.values()) for tag, versions in adapters.versions.items()},
        device="cpu",
        max_batch_size=6,
        adapter_slots=SLOTS,
        host_adapter_bytes=100_000,  # three of them or so: the others are read from disk again and again
        max_waiting=40,
        max_batch_tokens=120 if is_speech else 24,  # two clips at once; prompts in pieces
    )
    crowd = Crowd(engine, is_speech, clips, adapters)
    served, stop = 4, threading.Event()
    changing = threading.Thread(target=adapters.change, args=(engine, stop))
    changing.start()
    try:
        with ThreadPoolExecutor(served) as pool:
            list(pool.map(crowd.call, range(served), [count // served] * served))
        stop.set()
        changing.join()
        adapters.complete(engine)
        crowd.call_in_turn(adapters.versions)
        by_adapter, ends = _answers(crowd, adapters)
    finally:
        stop.set()
        changing.join()
        engine.close()

    assert ends["stop"] > count / 50 and ends["length"] > count / 4 and ends["cancelled"] > count / 50, ends
    reference = Reference(folder, is_speech)
    ties = 0
    for candidates, answers in by_adapter.items():
        attempts = [reference.wrong(adapter, answers) for adapter in candidates]
        wrong, some_ties = min(attempts, key=lambda attempt: len(attempt[0]))
        assert not wrong, f"{len(wrong)} of {len(answers)} answers with {candidates}: {wrong[:3]}"
        ties += some_ties
    assert ties <= count / 100, f"{ties} ties"
    longest = max(by_adapter.items(), key=lambda item: len(item[1]))
    (another,) = [model for model in reference.models if model not in longest[0]][:1]
    assert len(reference.wrong(another, longest[1])[0]) > len(longest[1]) / 2, "the answers do not tell one adapter from another"

    for ticket, told in crowd.left:
        assert ticket.token_ids[: len(told)] == told
    snapshot = engine.snapshot()
    assert (snapshot.waiting, snapshot.running, snapshot.batch) == (0, 0, {})
    assert snapshot.num_arrived == len(crowd.tickets) == snapshot.num_finished + snapshot.num_failed + snapshot.num_cancelled
    assert (snapshot.num_cancelled, snapshot.num_failed) == (ends["cancelled"], ends["failed"])
    assert not engine.bank._users, "a slot is still pinned"
    counters = engine.bank.counters().values()
    evictions = sum(counter.evictions for counter in counters)
    assert evictions >= NUM_TAGS - SLOTS, "the slots were enough for all: the test shows nothing"
    assert sum(counter.loads for counter in counters) > 1, "host memory was enough for all: the test shows nothing"


def _answers(crowd: Crowd, adapters: Adapters) -> tuple[dict[tuple[Path | None, ...], list], dict[str, int]]:
    """The answers by the adapter that they were given with, and how many ended how.

    Where a tag was being replaced in the very moment of a request's admission, each of both adapters is a candidate.
    """
    by_adapter: dict[tuple[Path | None, ...], list] = {}
    ends = dict.fromkeys(("stop", "length", "cancelled", "failed"), 0)
    for ticket, method in crowd.tickets:
        request, times = ticket.request, ticket.times
        try:
            completion = ticket.result(60)
        except FloraError as error:
            assert isinstance(error, UnknownAdapterError), error
            history = adapters.versions[request.adapter]
            assert any(version.sources is None and version.may_be_that_of(times.finished_s) for version in history), error
            assert not ticket.token_ids and times.admitted_s is None, "it ran, and then its adapter was unknown"
            ends["failed"] += 1
            continue
        ends[completion.finish_reason] += 1
        assert completion.token_ids == ticket.token_ids
        assert len(completion.token_ids) <= request.max_new_tokens
        if times.admitted_s is None:
            assert (completion.finish_reason, completion.token_ids) == ("cancelled", [])
            continue
        family = "flora" if method in ("merged", "mixed") else ops.FAMILY[method]
        if request.adapter is None or family is None:
            candidates = (None,)
        else:
            history = [version for version in adapters.versions[request.adapter] if version.sources is not None]
            possible = [version.sources[family] for version in history if version.may_be_that_of(times.admitted_s)]
            candidates = tuple(dict.fromkeys(possible))
            assert candidates, f"{request.adapter} was admitted while there was no such adapter"
        answer = (request, completion.token_ids, completion.finish_reason)
        by_adapter.setdefault(candidates, []).append(answer)
    return by_adapter, ends
