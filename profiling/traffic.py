"""Traffic: when requests arrive, how long they are, what they ask and which adapter each wants. All of it from one seed, so
that every method is given the same requests at the same times.

Arrivals are those of vLLM's `bench serve`. The popularity of adapters is Punica's (`get_lora_lens` of its benchmarks and tests),
which says how many of n requests each adapter gets:
    identical   all n for one adapter
    distinct    one each, an adapter of its own for every request
    uniform     ⌈√n⌉ adapters, equally often
    zipf:α      1, ⌊α⌋, ⌊α²⌋, … as long as there are requests, and the rest for one more: each adapter α times the one below it
    skewed      one request for one adapter, all others for another
    power:α     not Punica's: each request draws the k-th of all adapters with a probability in proportion to k^-α, as in S-LoRA
Where there are fewer adapters than that asks for, the adapters begin again with the first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from flora.corpus.code import LANGUAGES, problems, render
from flora.engine import Request
from flora.errors import RequestError

KINDS = ("code", "speech")
POPULARITIES = ("identical", "distinct", "uniform", "zipf:1.5", "skewed", "power:1.5")
EXPONENTS = ("zipf", "power")  # the popularities that take an α
SHUFFLED = ("distinct", "uniform")  # popularities under which no adapter is preferred: any may come first
CORPUS_PROBLEMS = 24  # per language
MAX_REQUESTS = 1_000_000  # of one run: a plan holds all of them
CUTTING_ATTEMPTS = 12


# ----------------------------------------------------------------------------------------------------------- arrivals


def arrival_times(num_requests: int, rate: float, burstiness: float, rng: np.random.Generator) -> np.ndarray:
    """Seconds after the start at which requests arrive, (num_requests,), ascending.

    rate: requests a second; infinite: all at 0. burstiness: the shape of the gamma distribution of the times between them: 1 is a
    Poisson process, below 1 they come in bursts, above 1 more evenly, infinite: at equal distances. The times are then stretched
    so that the last request arrives after num_requests / rate seconds, whatever was drawn. As vLLM's `bench serve` does.
    """
    if math.isinf(rate) or not num_requests:
        return np.zeros(num_requests)
    if math.isinf(burstiness):
        between = np.full(num_requests, 1.0 / rate)
    else:
        between = rng.gamma(burstiness, 1.0 / (rate * burstiness), num_requests)
    times = np.cumsum(between)
    return times * (num_requests / rate / times[-1]) if times[-1] > 0 else times


# --------------------------------------------------------------------------------------------------------- popularity


def check_popularity(popularity: str) -> str:
    """The popularity as given; RequestError for one that does not exist."""
    name, colon, exponent = popularity.partition(":")
    if name in EXPONENTS and colon:
        try:
            if math.isfinite(float(exponent)) and float(exponent) > (1.0 if name == "zipf" else 0.0):
                return popularity
        except ValueError:
            pass
        least = "above 1" if name == "zipf" else "above 0"
        raise RequestError(f"the popularity {popularity!r} needs a number {least} after the colon, such as {name}:1.5")
    if popularity not in POPULARITIES:
        raise RequestError(f"there is no popularity {popularity!r}: choose among {', '.join(POPULARITIES)}")
    return popularity


def adapter_counts(popularity: str, num_requests: int, num_adapters: int | None = None) -> list[int]:
    """How many of `num_requests` requests each adapter gets, Punica's popularities only, the most popular first.

    num_adapters: of `uniform`, how many share the requests; None: Punica's ⌈√n⌉. There may be more counts than adapters.
    """
    n = num_requests
    if n == 0:
        return []
    if popularity == "identical":
        return [n]
    if popularity == "distinct":
        return [1] * n
    if popularity == "uniform":
        groups = num_adapters or math.ceil(math.sqrt(n))
        return [n // groups + (group < n % groups) for group in range(groups) if n // groups or group < n % groups]
    if popularity == "skewed":
        return [n - 1, 1] if n >= 3 else [n]
    ratio = float(check_popularity(popularity).removeprefix("zipf:"))
    counts: list[int] = []
    size = 1.0
    while sum(counts) + math.floor(size) < n:
        counts.append(math.floor(size))
        size *= ratio
    return sorted([*counts, n - sum(counts)], reverse=True)


def assign_adapters(
    popularity: str, num_requests: int, adapters: Sequence[str], all_adapters: bool, rng: np.random.Generator
) -> list[str | None]:
    """The adapter of each request, (num_requests,); None for all where there are no adapters.

    adapters: the most popular first, where the popularity prefers any. all_adapters: `uniform` spreads the requests over all of
    them, and not over Punica's ⌈√n⌉.
    """
    if not adapters:
        return [None] * num_requests
    name, _, exponent = check_popularity(popularity).partition(":")
    if name == "power":
        weights = np.arange(1, len(adapters) + 1, dtype=float) ** -float(exponent)
        return [adapters[place] for place in rng.choice(len(adapters), num_requests, p=weights / weights.sum())]
    order = [adapters[place] for place in rng.permutation(len(adapters))] if name in SHUFFLED else list(adapters)
    counts = adapter_counts(popularity, num_requests, len(adapters) if all_adapters else None)
    chosen = [order[place % len(order)] for place, count in enumerate(counts) for _ in range(count)]
    if name == "distinct":
        return chosen  # in turns: no adapter comes again before all others came
    return [chosen[place] for place in rng.permutation(num_requests)]


# ------------------------------------------------------------------------------------------------------------ lengths


@dataclass(frozen=True)
class Lengths:
    """A distribution of numbers of tokens, at least 1.

    shape: "given" (as long as what is asked, or its known answer, is), "fixed" (first), "uniform" (first to second, both may come),
    "normal" and "lognormal" (mean first, standard deviation second), cut at 1 and at what the model's context holds.
    """

    shape: str = "given"
    first: float = 0.0
    second: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """From "given", "64", "uniform:16-64", "normal:64,16" or "lognormal:64,48"; RequestError that says so for anything else."""
        shape, colon, numbers = text.strip().partition(":")
        try:
            if not colon:
                return cls() if shape == "given" else cls._checked("fixed", int(shape), int(shape))
            first, second = numbers.split({"uniform": "-", "normal": ",", "lognormal": ","}[shape])
            if shape == "uniform":
                return cls._checked(shape, int(first), int(second))
            return cls._checked(shape, float(first), float(second))
        except (KeyError, ValueError) as error:
            raise RequestError(
                f"a length is given, a number of tokens, uniform:FEWEST-MOST, normal:MEAN,STD or lognormal:MEAN,STD, not {text!r}"
            ) from error

    @classmethod
    def _checked(cls, shape: str, first: float, second: float) -> Lengths:
        ordered = second >= first if shape in ("fixed", "uniform") else second >= 0
        if not (math.isfinite(first) and math.isfinite(second) and first >= 1 and ordered):
            raise ValueError(shape)
        return cls(shape, first, second)

    def __str__(self) -> str:
        if self.shape == "given":
            return "given"
        separator = "-" if self.shape == "uniform" else ","
        return f"{self.first:g}" if self.shape == "fixed" else f"{self.shape}:{self.first:g}{separator}{self.second:g}"

    @property
    def most(self) -> int | None:
        """The largest that can come; None where the distribution sets no end."""
        return int(self.second) if self.shape in ("fixed", "uniform") else None

    def draw(self, num: int, rng: np.random.Generator) -> list[int | None]:
        """(num,) numbers of tokens; None for each where they are given."""
        if self.shape == "given":
            return [None] * num
        if self.shape == "fixed":
            return [int(self.first)] * num
        if self.shape == "uniform":
            return rng.integers(int(self.first), int(self.second), num, endpoint=True).tolist()
        if self.shape == "normal":
            drawn = rng.normal(self.first, self.second, num)
        else:
            variance = math.log1p((self.second / self.first) ** 2)  # of the logarithm
            drawn = rng.lognormal(math.log(self.first) - variance / 2, math.sqrt(variance), num)
        return np.maximum(1, np.rint(drawn)).astype(int).tolist()


# ---------------------------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Prompt:
    """A text to go on with. num_answer_tokens: of the answer that is known for it."""

    text: str
    num_tokens: int
    num_answer_tokens: int
    language: str | None = None


@dataclass(frozen=True)
class Clip:
    """A clip to write down. samples: (n,) float32 mono. num_answer_tokens: of what is said in it."""

    name: str
    num_answer_tokens: int
    language: str | None = None
    samples: np.ndarray | None = field(default=None, compare=False, repr=False)
    sampling_rate: int = 16_000


@dataclass(frozen=True)
class PlannedRequest:
    """One request of a plan. Its prompt's tokens as the model counts them (a clip has none), and exactly so many new tokens."""

    index: int
    arrival_s: float  # after the start
    kind: str
    adapter: str | None
    asked: Prompt | Clip
    num_new_tokens: int

    @property
    def num_prompt_tokens(self) -> int:
        return self.asked.num_tokens if isinstance(self.asked, Prompt) else 0

    def request(self, with_adapter: bool = True) -> Request:
        """For an engine. with_adapter: False asks the base model."""
        adapter = self.adapter if with_adapter else None
        if isinstance(self.asked, Prompt):
            return Request(prompt=self.asked.text, adapter=adapter, max_new_tokens=self.num_new_tokens, ignore_eos=True)
        return Request(
            audio=self.asked.samples,
            sampling_rate=self.asked.sampling_rate,
            adapter=adapter,
            max_new_tokens=self.num_new_tokens,
            ignore_eos=True,
        )


@dataclass
class Prompts:
    """Prompts for a code model, of their own length or cut to any.

    encode, decode: text → the ids the model reads, and back. context_length: positions for a prompt and its new tokens.
    """

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    context_length: int
    given: Sequence[Prompt]
    _streams: dict[str | None, list[int]] = field(default_factory=dict, repr=False)

    @classmethod
    def of_corpus(
        cls, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str], context_length: int
    ) -> Prompts:
        """The same held-out problems of the corpus in all its languages; an answer is as long as the reference's."""
        given = []
        for problem in itertools.islice(problems("held-out", seed=2024), CORPUS_PROBLEMS):
            for language in LANGUAGES:
                program = render(problem, language)
                given.append(Prompt(program.prompt, len(encode(program.prompt)), len(encode(program.completion)), language))
        return cls(encode, decode, context_length, [prompt for prompt in given if prompt.num_tokens < context_length])

    def draw(self, adapter: str | None, num_tokens: int | None, num_new_tokens: int | None, rng: np.random.Generator) -> Prompt:
        """A prompt in the adapter's language, where there is one of that name. num_tokens: how long it is to be; None: as given."""
        candidates = _of_language(self.given, adapter)
        prompt = candidates[rng.integers(len(candidates))]
        if num_tokens is None:
            return prompt
        room = self.context_length - min(num_new_tokens or prompt.num_answer_tokens, self.context_length - 1)
        text, count = self._cut(prompt.language, min(num_tokens, room), rng)
        return replace(prompt, text=text, num_tokens=count)

    def room(self, prompt: Prompt) -> int:
        """New tokens that fit into the context after the prompt."""
        return self.context_length - prompt.num_tokens

    def check(self, prompt_tokens: Lengths, new_tokens: Lengths) -> None:
        """RequestError where lengths are asked for that the model's context cannot hold."""
        needed = (prompt_tokens.most or 1) + (new_tokens.most or 1)
        if needed > self.context_length:
            raise RequestError(
                f"prompts of up to {prompt_tokens.most or 1} tokens with {new_tokens.most or 1} new ones need {needed} positions "
                f"and the code model has {self.context_length}: ask for shorter ones"
            )

    def _cut(self, language: str | None, num_tokens: int, rng: np.random.Generator) -> tuple[str, int]:
        """A text of the language of so many tokens, and how many they are: a tokenizer may read a cut text in another number of
        tokens, so the nearest of several attempts is taken, none longer than asked if one is not."""
        if language not in self._streams:
            texts = [f"{prompt.text}\n" for prompt in self.given if prompt.language == language]
            self._streams[language] = [token for text in texts for token in self.encode(text)]
        stream = self._streams[language]
        found: list[tuple[tuple[bool, int], str, int]] = []
        taken = num_tokens
        for attempt in range(CUTTING_ATTEMPTS):
            if attempt % 3 == 0:
                start = int(rng.integers(len(stream)))
            text = self.decode(list(itertools.islice(itertools.cycle(stream), start, start + taken)))
            count = len(self.encode(text)) if text.strip() else 0
            if count:
                found.append(((count > num_tokens, abs(count - num_tokens)), text, count))
            if count == num_tokens:
                break
            taken = max(1, taken + num_tokens - count)
        if not found:
            prompt = min((prompt for prompt in self.given if prompt.language == language), key=lambda prompt: prompt.num_tokens)
            return prompt.text, prompt.num_tokens
        _, text, count = min(found)
        return text, count


@dataclass
class Clips:
    """Clips for a speech model. max_new_tokens: what its decoder has room for."""

    given: Sequence[Clip]
    max_new_tokens: int

    def draw(self, adapter: str | None, num_tokens: int | None, num_new_tokens: int | None, rng: np.random.Generator) -> Clip:
        """A clip in the adapter's language, where there is one of that name. Lengths in tokens say nothing of a clip."""
        candidates = _of_language(self.given, adapter)
        return candidates[rng.integers(len(candidates))]

    def room(self, clip: Clip) -> int:
        """New tokens that fit into the decoder's context."""
        return self.max_new_tokens

    def check(self, prompt_tokens: Lengths, new_tokens: Lengths) -> None:
        """A transcript has an end of its own: what is asked for beyond the decoder's room is cut there."""


Source = Prompts | Clips


def _of_language(given: Sequence, adapter: str | None) -> Sequence:
    return [one for one in given if one.language == adapter] or given


# --------------------------------------------------------------------------------------------------------------- plans


def parse_mix(text: str) -> dict[str, float]:
    """Shares by kind, summing to 1, from "code=0.8,speech=0.2" or "speech"; RequestError for anything else."""
    mix: dict[str, float] = {}
    for part in text.split(","):
        kind, equals, share = part.strip().partition("=")
        if kind not in KINDS or kind in mix:
            raise RequestError(f"a mix names {' and '.join(KINDS)} once each, such as code=0.8,speech=0.2, not {text!r}")
        try:
            mix[kind] = float(share) if equals else 1.0
        except ValueError:
            mix[kind] = math.nan
        if not (math.isfinite(mix[kind]) and mix[kind] >= 0):
            raise RequestError(f"the share of {kind} in a mix is a number of at least 0, not {share!r}")
    total = sum(mix.values())
    if not total:
        raise RequestError("a mix of nothing but zeros has no requests: give a kind a share")
    return {kind: share / total for kind, share in mix.items() if share}


@dataclass(frozen=True)
class Traffic:
    """What is to arrive. RequestError for what makes no sense.

    rate: requests a second, infinite: all at once. mix: kind → share. all_adapters: `uniform` over all there are.
    """

    num_requests: int = 200
    rate: float = math.inf
    burstiness: float = 1.0
    prompt_tokens: Lengths = Lengths()
    new_tokens: Lengths = Lengths("uniform", 16, 64)
    popularity: str = "zipf:1.5"
    all_adapters: bool = False
    mix: Mapping[str, float] = field(default_factory=lambda: {"code": 1.0})
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_requests <= MAX_REQUESTS:
            raise RequestError(f"there must be at least 1 request and at most {MAX_REQUESTS:,}, not {self.num_requests:,}")
        if not self.rate > 0:
            raise RequestError(f"the rate must be a number of requests a second above 0, or inf, not {self.rate:g}")
        if not self.burstiness > 0:
            raise RequestError(f"the burstiness must be above 0, not {self.burstiness:g}; 1 is a Poisson process")
        if self.seed < 0:
            raise RequestError(f"the seed must be at least 0, not {self.seed}")
        check_popularity(self.popularity)

    def plan(
        self, sources: Mapping[str, Source], adapters: Mapping[str, Sequence[str]], block: int = 0
    ) -> tuple[PlannedRequest, ...]:
        """The requests, in order of arrival; the same for the same traffic, sources and adapters.

        sources, adapters: by kind; adapters: the tags that may be asked for, the most popular first. block: another draw of the
        same traffic for each number. What arrives does not depend on when: another rate asks the same at other times.
        """
        n = self.num_requests
        names = ("arrivals", "kinds", "adapters", "prompt lengths", "new lengths", "prompts")
        streams = np.random.SeedSequence([self.seed, block]).spawn(len(names))
        rng = {name: np.random.default_rng(stream) for name, stream in zip(names, streams, strict=True)}
        for kind in self.mix:
            sources[kind].check(self.prompt_tokens, self.new_tokens)
        times = arrival_times(n, self.rate, self.burstiness, rng["arrivals"])
        kinds = self._kinds(rng["kinds"])
        wanted = {
            kind: iter(
                assign_adapters(self.popularity, kinds.count(kind), adapters.get(kind, ()), self.all_adapters, rng["adapters"])
            )
            for kind in self.mix
        }
        prompt_lengths = self.prompt_tokens.draw(n, rng["prompt lengths"])
        new_lengths = self.new_tokens.draw(n, rng["new lengths"])
        planned = []
        for index, kind in enumerate(kinds):
            source, adapter = sources[kind], next(wanted[kind])
            asked = source.draw(adapter, prompt_lengths[index], new_lengths[index], rng["prompts"])
            num_new_tokens = max(1, min(new_lengths[index] or asked.num_answer_tokens, source.room(asked)))
            planned.append(PlannedRequest(index, float(times[index]), kind, adapter, asked, num_new_tokens))
        return tuple(planned)

    def _kinds(self, rng: np.random.Generator) -> list[str]:
        """The kind of each request: every kind has its share to the nearest request, in random order."""
        ends = np.rint(np.cumsum(list(self.mix.values())) * self.num_requests).astype(int)
        counts = np.diff(ends, prepend=0)
        kinds = [kind for kind, count in zip(self.mix, counts, strict=True) for _ in range(count)]
        return [kinds[place] for place in rng.permutation(len(kinds))]


class EndlessTraffic(Iterator[PlannedRequest]):
    """One block of traffic after the other, without end; indices and arrival times go on counting."""

    def __init__(self, traffic: Traffic, sources: Mapping[str, Source], adapters: Mapping[str, Sequence[str]]) -> None:
        self._sources = sources
        self._wanted = (traffic, adapters)  # replaced as a whole: another thread may change it
        self._used: tuple | None = None
        self._block: Iterator[PlannedRequest] = iter(())
        self._num_blocks = self._index = 0
        self._start_s = self._last_s = 0.0

    def change(self, traffic: Traffic, adapters: Mapping[str, Sequence[str]] | None = None) -> None:
        """Go on with other traffic from the next request on; from any thread."""
        self._wanted = (traffic, self._wanted[1] if adapters is None else adapters)

    def __next__(self) -> PlannedRequest:
        if self._used is not self._wanted:
            self._block = iter(())
        while True:
            planned = next(self._block, None)
            if planned is not None:
                break
            self._used = self._wanted
            traffic, adapters = self._used
            self._block = iter(traffic.plan(self._sources, adapters, block=self._num_blocks))
            self._num_blocks += 1
            self._start_s = self._last_s
        self._last_s = self._start_s + planned.arrival_s
        self._index += 1
        return replace(planned, index=self._index - 1, arrival_s=self._last_s)
