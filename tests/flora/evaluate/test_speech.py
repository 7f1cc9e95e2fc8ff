"""Word errors against hand counts and jiwer, who transcribes what, and whether the targets hold."""

from functools import partial
from itertools import product

import jiwer
import numpy as np
import pytest
from peft import IA3Config, get_peft_model
from tiny_models import load_plain

from flora import Engine, Request
from flora.evaluate import intervals, speech
from flora.evaluate.checkpoints import Checkpoint, shipped_model
from flora.evaluate.clips import Clip, example_clips
from flora.evaluate.results import mean_rows
from flora.evaluate.speech import (
    NORMALISED,
    RAW,
    Tally,
    answers_of,
    mean_of,
    measure,
    normaliser,
    scores_of,
    targets,
    transcribe,
    word_errors,
)
from flora.evaluate.tasks import tasks_of
from flora.names import PROJECT

from .test_rows import score

# -------------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    ("reference", "transcript", "errors", "words"),
    [
        ("dva tři", "dva tři", 0, 2),
        ("dva tři", "dva čtyři", 1, 2),  # one substituted
        ("dva tři", "dva", 1, 2),  # one deleted
        ("dva tři", "", 2, 2),
        ("dva", "dva tři čtyři", 2, 1),  # two inserted: a rate above 1
        ("a b c d", "b c d e", 2, 4),  # one deleted, one inserted
        ("", "", 0, 0),
        ("", "dva tři", 2, 0),
        ("Dva, tři.", "dva tři", 2, 2),  # raw: case and punctuation count
        ("dva\u00a0tři", "  dva\n\ttři ", 0, 2),  # the kind of white space does not
        ("ctyr\u030ci", "ctyři", 0, 1),  # nor how a letter is composed
        ("दोन तीन", "दोन तिन", 1, 2),
        ("एक", "दो तीन चार", 3, 1),
    ],
)
def test_word_errors_counted_by_hand(reference, transcript, errors, words):
    compared = word_errors(reference, transcript)
    assert (compared.errors, compared.words) == (errors, words)
    assert compared.rate == errors / max(1, words)


def test_a_tally_is_jiwers_word_error_rate():
    """Of all clips together, not the mean of the clips' rates."""
    random = np.random.default_rng(0)
    texts = [[" ".join(random.choice(list("abcdefg"), random.integers(1, 9))) for _ in range(60)] for _ in range(2)]
    tally = Tally()
    for reference, transcript in zip(*texts, strict=True):
        tally.add(reference, transcript, normaliser("cs"))
    assert tally.rate(RAW).value == pytest.approx(jiwer.wer(*texts), abs=1e-12)
    assert tally.rate(RAW).low < tally.rate(RAW).value < tally.rate(RAW).high and tally.rate(RAW).n == 60


def test_whispers_normaliser():
    """For English its own with numbers and spellings; for others the basic one, which takes Devanagari's vowel signs for marks."""
    english = normaliser("en", {"colour": "color"})
    assert english("The Colour's twenty-one!") == "the color is 21"
    basic = normaliser("cs")
    assert basic("Čtyři, <smích> PĚT!").split() == ["čtyři", "pět"]
    assert basic("तीन दो").split() == ["त", "न", "द"], "the reason for which the plain rate is the one to quote"
    tally = Tally()
    tally.add("Čtyři, PĚT!", "čtyři pět", basic)
    tally.add("(smích)", "ha", basic)
    assert (tally.errors[RAW], tally.words[RAW]) == ([2, 1], [2, 1])
    assert (tally.errors[NORMALISED], tally.words[NORMALISED]) == ([0, 1], [2, 0]), "a reference that leaves no words"
    assert tally.rate(NORMALISED).value == 0.5


def test_texts_of_which_nothing_is_left_have_no_rate():
    tally = Tally()
    tally.add("(…)", "", normaliser("cs"))
    assert tally.rate(RAW).value == 1.0 and tally.rate(NORMALISED) is None


# --------------------------------------------------------------------------------------------------------- transcribing


def made_clips(clips, *languages):
    return {
        tag: [Clip(f"{tag} {index}", tag, f"word {index}", samples) for index, samples in enumerate(clips)] for tag in languages
    }


@pytest.fixture(scope="module")
def judged(checkpoints, tmp_path_factory):
    """A tiny Whisper with adapters under the names that an evaluation gives them, and these checkpoints."""
    tiny = checkpoints["speech"]
    found = [Checkpoint(tag, method, str(folder)) for tag, made in tiny.adapters.items() for method, folder in made.items()]
    folder = tmp_path_factory.mktemp("ia3")
    model = get_peft_model(load_plain(tiny.model), IA3Config(target_modules=["k_proj", "fc1"], feedforward_modules=["fc1"]))
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data.fill_(0.3)
    model.save_pretrained(folder)
    found.append(Checkpoint("aa", "ia3", str(folder)))
    sources = {checkpoint.name: checkpoint.source for checkpoint in found}
    return Engine.from_pretrained(tiny.model, sources, device="cpu", max_batch_size=5), found


def test_who_transcribes_what(clips, judged):
    _, checkpoints = judged
    tasks = list(tasks_of(made_clips(clips, "aa", "bb"), checkpoints, confusion=2))
    keys = [task.key for task in tasks]
    assert keys.count(("aa", "base", None)) == keys.count(("bb", "lora", "bb")) == keys.count(("aa", "ia3", "aa")) == 4
    assert keys.count(("aa", "flora", "bb")) == keys.count(("bb", "flora", "cc")) == 2, "the wrong adapters' share"
    assert ("aa", "lora", "bb") not in keys and ("bb", "ia3", "aa") not in keys
    assert [task.item.language for task in tasks[:7]] == ["aa"] * 6 + ["bb"], "languages take turns"
    without = list(tasks_of(made_clips(clips, "bb", "dd"), checkpoints, base=False))
    assert {task.key for task in without} == {("bb", "flora", "bb"), ("bb", "lora", "bb")}


def test_in_mixed_batches_everybody_hears_what_he_hears_alone(clips, judged):
    engine, checkpoints = judged
    tasks = list(tasks_of(made_clips(clips, "aa", "bb", "cc"), checkpoints, confusion=4))
    heard = list(transcribe(engine, tasks, max_new_tokens=12))
    assert len(heard) == len(tasks) and len({text for _, text in heard}) > 20
    for (language, method, adapter), task_index in product(
        [("aa", "ia3", "aa"), ("bb", "flora", "cc"), ("cc", "lora", "cc")], [0, 3]
    ):
        task, text = [pair for pair in heard if pair[0].key == (language, method, adapter)][task_index]
        request = Request(audio=task.item.samples, sampling_rate=16000, adapter=f"{adapter}/{method}", max_new_tokens=12)
        (alone,) = engine.generate([request], method="loop-lora" if method == "lora" else "flora")
        assert alone.text == text
    order = [task.item.name for task, _ in heard if task.key == ("cc", "base", None)]
    assert order == [f"cc {index}" for index in range(4)], "a method's clips stay in their order, so that methods can be paired"


def test_measuring_counts_the_errors_of_what_was_heard(clips, judged, checkpoints):
    """References that are the bb/flora transcripts: that adapter makes no error, the others do."""
    engine, found = judged
    perfect = [c for c in found if c.name == "bb/flora"]
    truth = transcribe(engine, tasks_of(made_clips(clips, "bb"), perfect, base=False))
    said = {task.item.name: text for task, text in truth}
    heard = {"bb": _Known([Clip(c.name, "bb", said[c.name], c.samples) for c in made_clips(clips, "bb")["bb"]])}
    tallies = measure(engine, heard, found, confusion=3)
    assert set(tallies) == {
        ("bb", "base", None), ("bb", "flora", "bb"), ("bb", "lora", "bb"), ("bb", "flora", "aa"), ("bb", "flora", "cc"),
    }  # fmt: skip
    assert sum(tallies["bb", "flora", "bb"].errors[RAW]) == 0 < sum(tallies["bb", "base", None].errors[RAW])
    assert len(tallies["bb", "flora", "aa"].errors[RAW]) == 3 and len(tallies["bb", "lora", "bb"].errors[RAW]) == 4

    facts = {"model": "tiny", "seed": 1, "command": "python"}
    scores = scores_of(tallies, engine, found, {"bb": "folder"}, facts)
    assert [(s.method, s.adapter, s.metric) for s in scores[:6:2]] == [
        ("base", None, RAW), ("lora", "bb", RAW), ("flora", "bb", RAW),
    ]  # fmt: skip
    own = scores[4]
    assert (own.value, own.low, own.rank, own.items, own.samples, own.graded) == (0.0, 0.0, 3, 4, 1, True)
    assert own.source == "folder" and own.versions["jiwer"] and own.checkpoint.endswith("bb/flora")
    assert (scores[0].rank, scores[0].checkpoint, scores[1].metric) == (None, None, NORMALISED)


class _Known(list):
    """A list that says how many it has, as `Clips` does."""

    @property
    def number(self):
        return len(self)


def test_answers_say_who_heard_what(clips, judged):
    engine, found = judged
    examples = [Clip(c.name, c.language, c.text, c.samples, f"{c.name}.flac") for c in made_clips(clips[:2], "aa", "bb")["aa"]]
    rows = answers_of(engine, examples, found, "somewhere/clips")
    items, answers = [row for row in rows if row.kind == "item"], [row for row in rows if row.kind == "answer"]
    assert [item.clip for item in items] == ["somewhere/clips/aa 0.flac", "somewhere/clips/aa 1.flac"]
    assert [(a.item, a.method, a.adapter) for a in answers[:4]] == [
        ("aa 0", "base", None), ("aa 0", "ia3", "aa"), ("aa 0", "lora", "aa"), ("aa 0", "flora", "aa"),
    ]  # fmt: skip
    assert len(answers) == 8
    for answer in answers:
        reference = next(item.reference for item in items if item.item == answer.item)
        assert answer.wer == pytest.approx(word_errors(reference, answer.text).rate, abs=1e-6)
        assert answer.passed is (answer.wer == 0) and answer.outcome is None


def test_the_embedded_adapters_hear_the_clips_that_ship():
    """Loosely: better than the base model."""
    folder = PROJECT / "assets" / "adapters" / "speech"
    found = [Checkpoint(tag, "flora", str(folder / tag / "flora")) for tag in ("cs", "hi")]
    engine = Engine.from_pretrained(shipped_model("speech"), {c.name: c.source for c in found}, device="cpu")
    examples = [clip for clip in example_clips(PROJECT / speech.EXAMPLES) if clip.language in ("cs", "hi")]
    answers = [row for row in answers_of(engine, examples, found, speech.EXAMPLES) if row.kind == "answer"]
    mean = {method: np.mean([a.wer for a in answers if a.method == method]) for method in ("base", "flora")}
    assert mean["flora"] < mean["base"], mean


# -------------------------------------------------------------------------------------------------------------- targets


@pytest.fixture
def few_resamples(monkeypatch):
    """Enough to tell sixths and thirds apart; `test_intervals` is about the intervals themselves."""
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 1_000)


def tally(errors, words=3):
    made = Tally()
    for metric in speech.METRICS:
        made.errors[metric], made.words[metric] = list(errors), [words] * len(errors)
    return made


def tallies_of(base=(3, 1), ia3=(1, 1), lora=(0, 1), flora=(0, 1), wrong=(3, 2), languages=("cs", "hi")):
    """Two values of clips that alternate, 40 clips (20 for the wrong adapters) of 3 words."""
    made = {}
    for tag in languages:
        made[tag, "base", None] = tally(base * 20)
        for method, errors in (("ia3", ia3), ("lora", lora), ("flora", flora)):
            made[tag, method, tag] = tally(errors * 20)
        for other in languages:
            if other != tag:
                made[tag, "flora", other] = tally(wrong * 10)
    return made


def means_of(tallies):
    """The means that the scores of these tallies have."""
    scores = [
        score(tag, method, of_tag.rate(metric).value, adapter, task="speech", metric=metric, items=len(of_tag.errors[metric]))
        for (tag, method, adapter), of_tag in tallies.items()
        for metric in speech.METRICS
    ]
    return mean_rows(scores, partial(mean_of, tallies))


def judged_targets(tallies, languages=("cs", "hi")):
    return targets(tallies, means_of(tallies), languages)


def met(**changes):
    return [target.met for target in judged_targets(tallies_of(**changes))]


@pytest.mark.usefixtures("few_resamples")
def test_the_targets():
    """Means: base 2/3, IA3 1/3, LoRA and fLoRA 1/6; the wrong adapter 5/6."""
    held = judged_targets(tallies_of())
    assert [target.met for target in held] == [True, False, True, True, True]
    assert held[0].measured.startswith("66.7 % [") and held[1].measured.startswith("16.7 % [")
    assert held[2].measured == "+0.0 points [+0.0, +0.0]" and held[3].measured.startswith("-16.7 points [")
    assert held[4].measured.startswith("2 of 2; nearest: ")
    assert met(flora=(0, 0)) == [True] * 5
    assert met(base=(1, 1)) == [False, False, True, True, True]
    assert met(lora=(0, 0)) == [True, False, False, True, True], "fLoRA is 17 points behind LoRA"
    assert met(ia3=(0, 1))[3] is False, "as good as IA3 is not better"
    assert met(wrong=(0, 1))[4] is False and met(wrong=(0, 2))[4] is True


@pytest.mark.usefixtures("few_resamples")
def test_a_target_that_was_not_measured_is_neither_met_nor_missed():
    made = tallies_of()
    del made["hi", "ia3", "hi"], made["cs", "flora", "hi"]
    held = judged_targets(made)
    assert [target.met for target in held] == [True, False, True, None, None]
    assert [target.measured for target in held[3:]] == [None, None]
    assert [target.met for target in targets({}, [], ("cs", "hi"))] == [None] * 5
    six = targets(made, means_of(made))
    assert len(six) == 5 and six[0].met is None, "by default over the six languages"


@pytest.mark.usefixtures("few_resamples")
def test_every_method_that_has_all_languages_has_a_mean_of_each_metric():
    """Of paired clips: fLoRA errs where LoRA does, so their difference is known better than either."""
    made = tallies_of(flora=(0, 2))
    del made["hi", "ia3", "hi"]
    means = {(mean.metric, mean.method, mean.versus): mean for mean in means_of(made)}
    pairs = [("base", None), ("lora", None), ("flora", None), ("flora", "base"), ("flora", "lora")]
    assert list(means) == [(metric, *pair) for metric in speech.METRICS for pair in pairs]
    lead, alone = means[RAW, "flora", "lora"], means[RAW, "flora", None]
    assert (lead.value, alone.value) == pytest.approx((1 / 6, 1 / 3), abs=1e-6)
    assert (alone.task, alone.languages, alone.items, alone.confidence) == ("speech", ("cs", "hi"), 80, 0.95)
    assert 0 < lead.low < lead.value < lead.high and lead.high - lead.low < alone.high - alone.low
    perfect = means_of(tallies_of(flora=(0, 0)))
    (best,) = (mean for mean in perfect if (mean.metric, mean.method, mean.versus) == (RAW, "flora", None))
    assert (best.value, best.low) == (0.0, 0.0) and best.high > 0.01, "80 clips do not prove that there is never an error"
