"""Arrivals, lengths, popularity, mixes and prompts: as their sources define them, and the same for the same seed."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from flora.errors import RequestError
from profiling.traffic import (
    Clip,
    Clips,
    EndlessTraffic,
    Lengths,
    Prompt,
    Prompts,
    Traffic,
    adapter_counts,
    arrival_times,
    assign_adapters,
    check_popularity,
    parse_mix,
)

VOCABULARY: dict[str, int] = {}


def encode(text):
    """A tokenizer of words, with a token before each text, as Llama's has."""
    return [-1, *(VOCABULARY.setdefault(word, len(VOCABULARY)) for word in text.split())]


def decode(ids):
    known = list(VOCABULARY)
    return " ".join(known[place] for place in ids if place >= 0)


@pytest.fixture
def sources():
    given = [Prompt(f"the {tag} prompt number {n} says hello", 8, 4 + n, tag) for tag in ("lua", "rb") for n in range(3)]
    clips = [Clip("cs_1.flac", 6, "cs", np.zeros(8, np.float32)), Clip("lt_1.flac", 7, "lt", np.ones(8, np.float32))]
    return {"code": Prompts(encode, decode, 200, given), "speech": Clips(clips, 20)}


ADAPTERS = {"code": ("lua", "rb", "other"), "speech": ("cs", "lt")}


def rng(seed=0):
    return np.random.default_rng(seed)


# ----------------------------------------------------------------------------------------------------------- arrivals


def test_the_times_are_vllms():
    """Its `get_request`, line by line, on the same draws."""
    rate, burstiness, n = 3.0, 0.7, 50
    between = rng(5).gamma(shape=burstiness, scale=1.0 / (rate * burstiness), size=n)
    delays = list(between)
    for i in range(1, n):
        delays[i] += delays[i - 1]
    factor = (n / rate) / delays[-1]
    assert arrival_times(n, rate, burstiness, rng(5)) == pytest.approx([delay * factor for delay in delays])


@pytest.mark.parametrize("burstiness", [0.01, 0.25, 1.0, 4.0, math.inf])
def test_n_requests_arrive_in_n_over_rate_seconds_in_order(burstiness):
    times = arrival_times(40, 8.0, burstiness, rng())
    assert times[-1] == pytest.approx(5.0) and (np.diff(times) >= 0).all() and times[0] >= 0


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_the_intervals_vary_as_the_burstiness_says(burstiness):
    """The squared coefficient of variation of a gamma distribution is 1 / shape; of an exponential one, 1."""
    between = np.diff(arrival_times(20_000, 10.0, burstiness, rng()))
    assert between.var() / between.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.08)


def test_at_an_infinite_rate_all_come_at_once_and_at_an_infinite_burstiness_at_equal_distances():
    assert arrival_times(5, math.inf, 1.0, rng()).tolist() == [0.0] * 5
    assert arrival_times(4, 2.0, math.inf, rng()) == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert arrival_times(0, 2.0, 1.0, rng()).tolist() == []


# --------------------------------------------------------------------------------------------------------- popularity


def punica_lora_lens(bs, popularity):
    """`get_lora_lens` as Punica's tests have it, retold with their loops."""
    if popularity == "identical":
        return [bs]
    if popularity == "distinct":
        return [1] * bs
    if popularity == "uniform":
        n = int(np.ceil(np.sqrt(bs)))
        lens = np.array([bs // n] * n)
        while (diff := bs - lens.sum()) != 0:
            lens[: abs(diff)] += np.sign(diff)
        return lens.tolist()
    if popularity.startswith("zipf:"):
        alpha, lens, a = float(popularity.split(":")[1]), [], 1
        while sum(lens) + int(np.floor(a)) < bs:
            lens.append(int(np.floor(a)))
            a *= alpha
        lens.append(bs - sum(lens))
        return sorted(lens, reverse=True)
    return [bs] if bs < 3 else [1, bs - 1]


@pytest.mark.parametrize("popularity", ["identical", "distinct", "uniform", "zipf:1.5", "zipf:2", "skewed"])
@pytest.mark.parametrize("num_requests", [1, 2, 3, 4, 7, 10, 16, 32, 64, 133, 1000])
def test_the_counts_are_punicas(popularity, num_requests):
    counts = adapter_counts(popularity, num_requests)
    assert counts == sorted(punica_lora_lens(num_requests, popularity), reverse=True) and sum(counts) == num_requests


def test_counts_worth_knowing():
    assert adapter_counts("zipf:1.5", 16) == [5, 4, 3, 2, 1, 1]
    assert adapter_counts("uniform", 16) == [4, 4, 4, 4] and adapter_counts("skewed", 16) == [15, 1]
    assert adapter_counts("uniform", 10, num_adapters=4) == [3, 3, 2, 2]
    assert adapter_counts("uniform", 3, num_adapters=2000) == [1, 1, 1] and adapter_counts("zipf:1.5", 0) == []


@pytest.mark.parametrize("popularity", ["identical", "distinct", "uniform", "zipf:1.5", "skewed"])
def test_each_adapter_gets_its_count(popularity):
    tags = [f"a{place}" for place in range(100)]
    chosen = assign_adapters(popularity, 60, tags, False, rng())
    assert sorted(Counter(chosen).values(), reverse=True) == adapter_counts(popularity, 60)
    if popularity in ("identical", "zipf:1.5", "skewed"):
        assert Counter(chosen).most_common(1)[0][0] == "a0", "the first is the most popular"


def test_requests_of_one_adapter_do_not_stand_together():
    chosen = assign_adapters("zipf:1.5", 200, ["a", "b", "c"], False, rng())
    assert sum(one == other for one, other in itertools.pairwise(chosen)) < 130  # grouped: 197
    assert chosen == assign_adapters("zipf:1.5", 200, ["a", "b", "c"], False, rng())
    assert chosen != assign_adapters("zipf:1.5", 200, ["a", "b", "c"], False, rng(1))


def test_fewer_adapters_than_a_popularity_asks_for_begin_again():
    chosen = assign_adapters("distinct", 9, ["a", "b", "c"], False, rng())
    assert all(len(set(chosen[start : start + 3])) == 3 for start in range(7)), "in turns, so that a batch has no adapter twice"
    counts = Counter(assign_adapters("zipf:1.5", 16, ["a", "b", "c"], False, rng()))
    assert counts == {"a": 5 + 2, "b": 4 + 1, "c": 3 + 1}


def test_uniform_is_over_all_adapters_where_asked_and_any_may_come():
    tags = [f"a{place}" for place in range(2000)]
    assert len(set(assign_adapters("uniform", 100, tags, False, rng()))) == 10
    once = assign_adapters("uniform", 100, tags, True, rng())
    assert len(set(once)) == 100 and once != tags[:100] and not set(once) <= set(tags[:1000])
    assert set(Counter(assign_adapters("uniform", 4000, tags, True, rng())).values()) == {2}


def test_a_power_law_reaches_far_down_the_list():
    tags = [f"a{place}" for place in range(2000)]
    counts = Counter(assign_adapters("power:1.5", 200_000, tags, False, rng()))
    zeta = sum(k**-1.5 for k in range(1, 2001))
    for place in (0, 1, 4):
        assert counts[tags[place]] == pytest.approx(200_000 / zeta * (place + 1) ** -1.5, rel=0.03)
    assert len(counts) > 1000


def test_without_adapters_the_base_model_is_asked():
    assert assign_adapters("uniform", 3, [], True, rng()) == [None] * 3


@pytest.mark.parametrize(
    "popularity", ["", "zipf", "zipf:", "zipf:1", "zipf:x", "zipf:nan", "zipf:inf", "power:0", "Uniform", "bmm"]
)
def test_an_unknown_popularity_is_refused(popularity):
    with pytest.raises(RequestError, match="popularity"):
        check_popularity(popularity)
    with pytest.raises(RequestError, match="popularity"):
        Traffic(popularity=popularity)


# ------------------------------------------------------------------------------------------------------------ lengths


@pytest.mark.parametrize(
    "text", ["given", "64", "uniform:16-64", "uniform:5-5", "normal:64,16", "normal:64,0", "lognormal:80,40.5"]
)
def test_lengths_are_written_as_they_are_read(text):
    assert str(Lengths.parse(text)) == text and Lengths.parse(str(Lengths.parse(text))) == Lengths.parse(text)


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "1.5", "many", "uniform:", "uniform:5", "uniform:9-5", "uniform:0-5", "uniform:5,9", "normal:5-9", "normal:0,1"]
    + ["normal:9,-1", "normal:nan,1", "lognormal:inf,1", "zipf:1.5", "given:5"],
)
def test_a_length_that_makes_no_sense_is_refused(text):
    with pytest.raises(RequestError, match="a length is"):
        Lengths.parse(text)


def test_drawn_lengths_have_their_distribution():
    assert Lengths.parse("given").draw(2, rng()) == [None, None] and Lengths.parse("7").draw(3, rng()) == [7, 7, 7]
    uniform = Lengths.parse("uniform:3-5").draw(3000, rng())
    assert set(uniform) == {3, 4, 5} and all(900 < count < 1100 for count in Counter(uniform).values())
    for shape in ("normal", "lognormal"):
        drawn = np.array(Lengths.parse(f"{shape}:200,40").draw(20_000, rng()))
        assert drawn.mean() == pytest.approx(200, rel=0.01) and drawn.std() == pytest.approx(40, rel=0.05)
    assert min(Lengths.parse("normal:2,50").draw(1000, rng())) == 1
    assert np.median(Lengths.parse("lognormal:200,200").draw(20_000, rng())) == pytest.approx(200 / math.sqrt(2), rel=0.03)


# ------------------------------------------------------------------------------------------------------------ prompts


def test_a_prompt_is_in_the_adapters_language_where_it_has_one(sources):
    assert {sources["code"].draw("rb", None, None, rng(seed)).language for seed in range(20)} == {"rb"}
    assert {sources["code"].draw("other", None, None, rng(seed)).language for seed in range(20)} == {"lua", "rb"}
    assert {sources["speech"].draw("lt", 50, 9, rng(seed)).name for seed in range(20)} == {"lt_1.flac"}


@pytest.mark.parametrize("num_tokens", [2, 3, 17, 64, 150])
def test_a_prompt_is_cut_to_any_length(sources, num_tokens):
    """Longer than all that is given, too: the text begins again."""
    prompts = [sources["code"].draw("lua", num_tokens, 10, rng(seed)) for seed in range(10)]
    for prompt in prompts:
        assert len(encode(prompt.text)) == prompt.num_tokens == num_tokens and prompt.language == "lua"
    assert len({prompt.text for prompt in prompts}) > 1


def test_a_cut_prompt_leaves_room_for_the_new_tokens(sources):
    prompt = sources["code"].draw("lua", 500, 30, rng())
    assert prompt.num_tokens == 170 and sources["code"].room(prompt) == 30


def test_a_tokenizer_that_cannot_make_the_length_gives_the_nearest():
    source = Prompts(lambda text: list(text.encode()) * 2, lambda ids: bytes(ids[::2]).decode(), 99, [Prompt("abcdef", 12, 3)])
    assert source.draw(None, 7, 1, rng()).num_tokens == 6
    blank = Prompts(lambda text: list(text.encode()), lambda ids: " " * len(ids), 99, [Prompt("abc", 3, 3)])
    assert blank.draw(None, 2, 1, rng()).text == "abc", "a prompt of nothing but spaces is none"


def test_the_corpus_asks_the_same_in_every_language():
    source = Prompts.of_corpus(encode, decode, 10_000)
    by_language = Counter(prompt.language for prompt in source.given)
    assert set(by_language) >= {"lua", "rb", "d"} and set(by_language.values()) == {24}
    assert all(prompt.num_tokens == len(encode(prompt.text)) and prompt.num_answer_tokens > 1 for prompt in source.given)
    short = Prompts.of_corpus(encode, decode, 20)
    assert 0 < len(short.given) < len(source.given) and all(prompt.num_tokens < 20 for prompt in short.given)


def test_lengths_beyond_the_context_are_refused(sources):
    for prompt_tokens, new_tokens in (("190", "11"), ("uniform:1-300", "given"), ("given", "uniform:1-200")):
        traffic = Traffic(prompt_tokens=Lengths.parse(prompt_tokens), new_tokens=Lengths.parse(new_tokens))
        with pytest.raises(RequestError, match="has 200: ask for shorter"):
            traffic.plan(sources, ADAPTERS)


# --------------------------------------------------------------------------------------------------------------- plans


def test_the_same_seed_plans_the_same_and_another_does_not(sources):
    traffic = Traffic(num_requests=60, rate=5.0, mix={"code": 0.7, "speech": 0.3}, prompt_tokens=Lengths.parse("uniform:4-20"))
    plan = traffic.plan(sources, ADAPTERS)
    assert plan == traffic.plan(sources, ADAPTERS) and [one.index for one in plan] == list(range(60))
    assert plan != replace(traffic, seed=1).plan(sources, ADAPTERS) and plan != traffic.plan(sources, ADAPTERS, block=1)


def test_another_rate_asks_the_same_at_other_times(sources):
    slow, fast = (Traffic(num_requests=30, rate=rate).plan(sources, ADAPTERS) for rate in (1.0, 10.0))
    assert [replace(one, arrival_s=0.0) for one in slow] == [replace(one, arrival_s=0.0) for one in fast]
    assert [one.arrival_s for one in slow] == pytest.approx([10 * one.arrival_s for one in fast])


def test_a_plan_keeps_the_mix_the_popularity_and_the_lengths(sources):
    traffic = Traffic(
        num_requests=40, mix={"code": 0.8, "speech": 0.2}, popularity="zipf:2", new_tokens=Lengths.parse("uniform:5-30")
    )
    plan = traffic.plan(sources, ADAPTERS)
    kinds = [one.kind for one in plan]
    assert Counter(kinds) == {"code": 32, "speech": 8} and "speech" in kinds[:20] and "speech" in kinds[20:]
    code = Counter(one.adapter for one in plan if one.kind == "code")
    assert sorted(code.values(), reverse=True) == [16 + 2, 8 + 1, 4 + 1]  # 16 8 4 2 1 1 over three adapters
    assert all(5 <= one.num_new_tokens <= (20 if one.kind == "speech" else 30) for one in plan), "a decoder has 20 places here"
    assert max(one.num_new_tokens for one in plan if one.kind == "speech") == 20
    assert all(one.num_prompt_tokens == (8 if one.kind == "code" else 0) for one in plan)


def test_given_lengths_are_the_prompts_own_and_their_answers(sources):
    plan = Traffic(num_requests=20, new_tokens=Lengths(), mix={"code": 0.5, "speech": 0.5}).plan(sources, ADAPTERS)
    assert all(one.num_new_tokens == one.asked.num_answer_tokens for one in plan)


def test_a_planned_request_asks_the_engine_for_exactly_its_tokens(sources):
    plan = Traffic(num_requests=10, mix={"code": 0.5, "speech": 0.5}).plan(sources, ADAPTERS)
    for planned in plan:
        request = planned.request()
        assert request.ignore_eos and request.max_new_tokens == planned.num_new_tokens and request.adapter == planned.adapter
        assert request.prompt == planned.asked.text if planned.kind == "code" else request.audio is planned.asked.samples


def test_a_mix_is_read_and_brought_to_one():
    assert parse_mix("code=0.8,speech=0.2") == pytest.approx({"code": 0.8, "speech": 0.2})
    assert parse_mix("speech") == {"speech": 1.0} and parse_mix("code=3, speech=1") == {"code": 0.75, "speech": 0.25}
    assert parse_mix("code=1,speech=0") == {"code": 1.0}


@pytest.mark.parametrize("text", ["", "video=1", "code=much", "code=-1", "code=nan", "code=inf", "code=0", "code,code", "code=1,"])
def test_a_mix_that_makes_no_sense_is_refused(text):
    with pytest.raises(RequestError, match="mix"):
        parse_mix(text)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_requests", 0, "at least 1 request"),
        ("rate", 0.0, "rate"),
        ("rate", -1.0, "rate"),
        ("rate", math.nan, "rate"),
        ("burstiness", 0.0, "burstiness"),
        ("burstiness", math.nan, "burstiness"),
        ("seed", -1, "seed"),
    ],
)
def test_traffic_that_makes_no_sense_is_refused(field, value, said):
    with pytest.raises(RequestError, match=said):
        Traffic(**{field: value})


# ------------------------------------------------------------------------------------------------------------- endless


def test_endless_traffic_goes_on_block_after_block(sources):
    traffic = Traffic(num_requests=10, rate=5.0)
    endless = EndlessTraffic(traffic, sources, ADAPTERS)
    taken = list(itertools.islice(endless, 35))
    assert [one.index for one in taken] == list(range(35))
    assert [one.arrival_s for one in taken[9::10]] == pytest.approx([2.0, 4.0, 6.0]), "every block lasts n / rate"
    assert (np.diff([one.arrival_s for one in taken]) >= 0).all()
    first, second = taken[:10], taken[10:20]
    assert tuple(first) == traffic.plan(sources, ADAPTERS)
    assert [one.asked for one in first] != [one.asked for one in second], "another draw"
    assert taken == list(itertools.islice(EndlessTraffic(traffic, sources, ADAPTERS), 35)), "and the same again from the seed"


def test_endless_traffic_changes_at_once(sources):
    endless = EndlessTraffic(Traffic(num_requests=10, rate=5.0, popularity="identical"), sources, ADAPTERS)
    before = list(itertools.islice(endless, 3))
    endless.change(Traffic(num_requests=10, rate=5.0, popularity="distinct"))
    after = list(itertools.islice(endless, 12))
    assert {one.adapter for one in before} == {"lua"} and {one.adapter for one in after[:3]} == {"lua", "rb", "other"}
    assert [one.index for one in (*before, *after)] == list(range(15)) and after[0].arrival_s >= before[-1].arrival_s
    endless.change(Traffic(num_requests=10, popularity="identical"), {"code": ("rb",)})
    assert next(endless).adapter == "rb"
