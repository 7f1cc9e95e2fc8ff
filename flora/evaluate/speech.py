"""python -m flora.evaluate speech: the word error rate of a speech model, bare and with its adapters.

WER = (substitutions + deletions + insertions) / words of the references, summed over clips, by jiwer. Two of them are measured:

    WER              of the texts as they are, but for the kind of white space and of Unicode composition: the headline
    WER, normalised  of what Whisper's own normaliser makes of both texts, as its authors report it

Whisper's normaliser for languages other than English puts a space in the place of every mark, and the vowel signs of Devanagari are
marks: it cuts Hindi and Marathi words into consonants and scores those. That is why the plain one is the headline.

Every clip is transcribed by every method in turn, greedily, through `flora.Engine`: clips of all languages, each with its own
adapter, run in one batch.
"""

from __future__ import annotations

import argparse
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jiwer
import numpy as np
from tqdm import tqdm
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from flora.corpus.speech import LANGUAGES, SAMPLING_RATE
from flora.engine import Engine, Request
from flora.errors import EvaluationError
from flora.evaluate import command, intervals
from flora.evaluate.checkpoints import SERVED_BY, Checkpoint
from flora.evaluate.clips import Clip, Clips, corpus_clips, dataset_clips, example_clips, folder_clips
from flora.evaluate.command import whole
from flora.evaluate.intervals import Interval
from flora.evaluate.report import (
    Promise,
    Target,
    confusion_table,
    mean_targets,
    means_table,
    needed_target,
    score_table,
    target_table,
)
from flora.evaluate.results import Measured, mean_rows, score_rows
from flora.evaluate.rows import METHODS, Answer, Item, Mean, Row, Score
from flora.evaluate.tasks import Key, Task, number_of_tasks, tasks_of
from flora.names import PROJECT, public_name

RAW, NORMALISED = METRICS = ("WER", "WER, normalised")
TAGS = tuple(tag for tag in LANGUAGES if tag != "en")  # English is what the embedded model knows without an adapter
EXAMPLES = "assets/clips"  # of the project
CORPUS_CLIPS = 200
CONFUSION_CLIPS = 50
PROMISES = (  # of mean WER over the six languages
    Promise("base model: {mean} at least 40 %", "base", None, lambda mean: mean >= 0.40),
    Promise("fLoRA: {mean} at most 10 %", "flora", None, lambda mean: mean <= 0.10),
    Promise("fLoRA − LoRA at most 1 point", "flora", "lora", lambda difference: difference <= 0.01),
    Promise("fLoRA − IA3 below 0", "flora", "ia3", lambda difference: difference < 0.0),
)

NORMALISED_NOTE = (
    f"{NORMALISED}: Whisper's normaliser cuts the words of Hindi and Marathi at every vowel sign; {RAW} is the number to quote."
)


# --------------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class WordErrors:
    """How a transcript differs from its reference of `words` words: the fewest substitutions, deletions and insertions."""

    errors: int
    words: int

    @property
    def rate(self) -> float:
        """WER of this clip alone; of a reference without words, the number of words heard in it."""
        return self.errors / max(1, self.words)


def word_errors(reference: str, transcript: str) -> WordErrors:
    """Compare two texts word by word. Words are what white space divides; texts are compared in Unicode's composed form, NFC."""
    reference, transcript = (" ".join(unicodedata.normalize("NFC", text).split()) for text in (reference, transcript))
    output = jiwer.process_words(reference, transcript)
    return WordErrors(output.substitutions + output.deletions + output.insertions, len(reference.split()))


def normaliser(language: str, spellings: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """Whisper's text normaliser: for English with `spellings` (British → American, of the tokenizer), for others the basic one."""
    return EnglishTextNormalizer(dict(spellings or {})) if language == "en" else BasicTextNormalizer()


@dataclass
class Tally:
    """The word errors of one method with one adapter on one language, a value per clip, by metric."""

    errors: dict[str, list[int]] = field(default_factory=lambda: {metric: [] for metric in METRICS})
    words: dict[str, list[int]] = field(default_factory=lambda: {metric: [] for metric in METRICS})

    def add(self, reference: str, transcript: str, normalise: Callable[[str], str]) -> None:
        for metric, change in ((RAW, str), (NORMALISED, normalise)):
            compared = word_errors(change(reference), change(transcript))
            self.errors[metric].append(compared.errors)
            self.words[metric].append(compared.words)

    def rate(self, metric: str = RAW) -> Interval | None:
        """The WER over all clips; None where the references have no words."""
        return intervals.ratio(self.errors[metric], self.words[metric]) if sum(self.words[metric]) else None


Tallies = dict[Key, Tally]


# ---------------------------------------------------------------------------------------------------------- transcribing


def transcribe(engine: Engine, tasks: Iterable[Task[Clip]], max_new_tokens: int | None = None) -> Iterator[tuple[Task[Clip], str]]:
    """Transcripts as they come, greedy; adapters of one family and the base model share batches of the engine's full size.

    max_new_tokens: per clip, by default what the model's context holds.
    """
    waiting: dict[str, list[Task[Clip]]] = {}
    limit = engine.context_length if max_new_tokens is None else max_new_tokens

    def run(method: str) -> Iterator[tuple[Task[Clip], str]]:
        batch = waiting.pop(method)
        requests = [
            Request(audio=task.item.samples, sampling_rate=SAMPLING_RATE, adapter=task.adapter, max_new_tokens=limit)
            for task in batch
        ]
        completions = engine.generate(requests, method=method)
        yield from ((task, completion.text) for task, completion in zip(batch, completions, strict=True))

    for task in tasks:
        method = SERVED_BY[task.method]
        waiting.setdefault(method, []).append(task)
        if len(waiting[method]) == engine.max_batch_size:
            yield from run(method)
    for method in list(waiting):
        yield from run(method)


def measure(
    engine: Engine,
    clips: Mapping[str, Clips],
    checkpoints: Sequence[Checkpoint],
    base: bool = True,
    confusion: int = 0,
    max_new_tokens: int | None = None,
) -> Tallies:
    """Transcribe all clips, with a progress bar on a terminal, and count the word errors. Raises what `Clips` raises."""
    spellings = getattr(engine.tokenizer, "english_spelling_normalizer", None)
    normalisers = {tag: normaliser(tag, spellings) for tag in clips}
    tallies: Tallies = {}
    tasks = tasks_of(clips, checkpoints, base, confusion)
    total = number_of_tasks({tag: part.number for tag, part in clips.items()}, checkpoints, base, confusion)
    for task, text in tqdm(transcribe(engine, tasks, max_new_tokens), total=total, unit="clip", leave=False, disable=None):
        tallies.setdefault(task.key, Tally()).add(task.item.text, text, normalisers[task.item.language])
    return tallies


# -------------------------------------------------------------------------------------------------------------- results


def scores_of(
    tallies: Tallies, engine: Engine, checkpoints: Sequence[Checkpoint], sources: Mapping[str, str], facts: Mapping[str, object]
) -> list[Score]:
    """Two rows, one for each metric, of every tally, languages and methods in order.

    sources: language → where its clips are from. facts: the Score fields that are the same in all rows: model, seed, command.
    """
    nothing_left = "the normaliser leaves no words of these texts"
    measured = {}
    for key, tally in tallies.items():
        rates = {metric: tally.rate(metric) for metric in METRICS}
        measured[key] = {
            metric: Measured(rate, len(tally.errors[metric]), None if rate else nothing_left) for metric, rate in rates.items()
        }
    return score_rows("speech", measured, engine, checkpoints, sources, {"samples": 1, "temperature": 0.0, **facts}, "jiwer")


def answers_of(
    engine: Engine, examples: Sequence[Clip], checkpoints: Sequence[Checkpoint], folder: str, base: bool = True
) -> list[Row]:
    """An Item for each example clip, and an Answer for what each method with the clip's own language heard.

    folder: of the clips, seen from the project's.
    """
    by_language: dict[str, list[Clip]] = {}
    for clip in examples:
        by_language.setdefault(clip.language, []).append(clip)
    rows: list[Row] = [
        Item("speech", clip.language, clip.name, prompt=None, reference=clip.text, clip=f"{folder}/{clip.file}")
        for clip in examples
    ]
    heard = []
    for task, text in transcribe(engine, tasks_of(by_language, checkpoints, base)):
        compared = word_errors(task.item.text, text)
        heard.append(
            Answer(
                "speech",
                task.item.language,
                task.item.name,
                task.method,
                task.key[2],
                text,
                passed=compared.errors == 0,
                wer=round(compared.rate, 6),
            )
        )
    places = {clip.name: index for index, clip in enumerate(examples)}
    return rows + sorted(heard, key=lambda answer: (places[answer.item], METHODS.index(answer.method)))


def mean_of(tallies: Tallies, method: str, versus: str | None, metric: str, languages: Sequence[str]) -> Interval | None:
    """Mean WER over languages, each with its own adapter and counted the same; or how far it lies above that of `versus`.

    None where one of the languages is missing. A clip is drawn again within its language, of a difference in both methods.
    """
    first, second = (_own(tallies, name, languages) for name in (method, versus or method))
    if first is None or second is None:
        return None
    errors, words = [tally.errors[metric] for tally in first], [tally.words[metric] for tally in first]
    if versus is not None:
        errors = [np.subtract(one, tally.errors[metric]) for one, tally in zip(errors, second, strict=True)]
    elif not any(map(any, errors)):  # every resample would be the same: the end is that of 0 of all clips
        return intervals.ratio(sum(errors, []), sum(words, []))
    return intervals.mean_of_ratios(errors, words)


def _own(tallies: Tallies, method: str, languages: Sequence[str]) -> list[Tally] | None:
    keys = [(tag, method, None if method == "base" else tag) for tag in languages]
    return [tallies[key] for key in keys] if all(key in tallies for key in keys) else None


def targets(tallies: Tallies, means: Sequence[Mean], languages: Sequence[str] = TAGS) -> list[Target]:
    """What the embedded model and its adapters promise, over all `languages`, and whether it holds; see `Target`.

    Another language's adapter is clearly worse where the interval of its difference to the right one, on the same clips, leaves
    out 0.
    """
    return [*mean_targets(PROMISES, means, RAW, languages), needed_target(tallies, languages, languages, _worse_by)]


def _worse_by(right: Tally, wrong: Tally) -> Interval:
    """How far the wrong adapter's WER lies above the right one's, on the clips of the wrong one."""
    number = len(wrong.errors[RAW])
    return intervals.ratio_difference(wrong.errors[RAW], right.errors[RAW][:number], wrong.words[RAW])


def tables(scores: Sequence[Score], means: Sequence[Mean]) -> str:
    """The scores for a terminal: a table for each metric, each method's mean with its interval, the confusion matrix, a note."""
    parts = [score_table(scores, metric) for metric in METRICS]
    parts += [means_table(means, RAW), confusion_table(scores, RAW), NORMALISED_NOTE]
    return "\n\n".join(filter(None, parts))


# ------------------------------------------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m flora.evaluate speech`."""
    parser.description = (
        "Measure the word error rate of a Whisper model and its adapters, with confidence intervals. Without --data and --dataset: "
        "on held-out clips of the project's own spoken corpus. Without --model: the embedded model and the adapters that ship."
    )
    data = parser.add_argument_group("what is heard")
    data.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="TAG=FOLDER",
        help="clips of a language: a folder with metadata.csv, .jsonl or .tsv (file_name, text), or NAME.wav with NAME.txt; "
        "or such a table itself, for instance Common Voice's test.tsv; may be given many times",
    )
    data.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="TAG=ID[:CONFIG[:SPLIT]]",
        help="clips of a language from a data set of the hub or a folder in its format, streamed; CONFIG is by default the TAG, "
        "of a folder none, SPLIT is test",
    )
    data.add_argument("--languages", nargs="+", metavar="TAG", help=f"of the project's corpus; default: {' '.join(TAGS)}")
    data.add_argument("--clips", type=whole(1), metavar="N", help=f"per language; default: {CORPUS_CLIPS} of the corpus, else all")
    data.add_argument(
        "--corpus", type=Path, default=Path("runs/speech"), metavar="FOLDER", help="cache of spoken clips; default: runs/speech"
    )
    command.add_who(parser, "who transcribes", "speech", "clips", CONFUSION_CLIPS)
    how = parser.add_argument_group("how")
    how.add_argument("--max-new-tokens", type=whole(1), metavar="N", help="per clip; default: the model's context")
    how.add_argument("--seed", type=whole(0), default=1, metavar="N", help="of which clips are taken; default: 1")
    command.add_how(how, "clips")
    command.add_out(parser, "speech", "the clips that ship")


def main(options: argparse.Namespace) -> int:
    """Evaluate as the options say, print a table, write rows; 0 for done. Raises a FloraError for bad input."""
    said = command.begin(options)
    confusion = command.number_of_confusion(options, CONFUSION_CLIPS)
    base = "base" in options.methods

    sources = _sources(options)
    checkpoints, missing = command.chosen_checkpoints(
        options, list(sources), TAGS, confusion, lambda tag: f"clips: give some with --data {tag}=FOLDER"
    )
    engine = command.load_engine(options, checkpoints, "a Whisper model")

    clips = _clips(options, sources, engine.window_s)
    command.say_what_is_missing(missing)
    tallies = measure(engine, clips, checkpoints, base, confusion, options.max_new_tokens)
    for sentence in (sentence for part in clips.values() for sentence in part.skipped):
        print(f"left out: {sentence}", file=sys.stderr)
    facts = {"model": public_name(command.model_name(options)), "seed": options.seed, "command": options.command}
    scores = scores_of(tallies, engine, checkpoints, {tag: part.source for tag, part in clips.items()}, facts)
    means = mean_rows(scores, partial(mean_of, tallies))
    print(tables(scores, means), file=said)
    command.write_json(options, [*scores, *means])
    if options.report:
        command.merge_results(options, "accuracy", [*scores, *means])
        if not (options.data or options.dataset):
            examples = [clip for clip in example_clips(PROJECT / EXAMPLES) if clip.language in clips]
            command.merge_results(options, "answers", answers_of(engine, examples, checkpoints, EXAMPLES, base))
        print(f"\n{target_table(targets(tallies, means))}", file=said)
    return 0


def _sources(options: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Language → ("data", folder), ("dataset", name) or ("corpus", ""). EvaluationError where it makes no sense."""
    given = [("data", entry) for entry in options.data] + [("dataset", entry) for entry in options.dataset]
    if not given:
        return dict.fromkeys(options.languages or TAGS, ("corpus", ""))
    if options.languages:
        raise EvaluationError("--languages chooses of the project's corpus: the languages of --data and --dataset are their tags")
    sources: dict[str, tuple[str, str]] = {}
    for kind, entry in given:
        tag, equals, place = entry.partition("=")
        if not (tag and equals and place):
            form = "TAG=FOLDER" if kind == "data" else "TAG=ID[:CONFIG[:SPLIT]]"
            raise EvaluationError(f"--{kind} takes {form}, not {entry!r}")
        if tag in sources:
            raise EvaluationError(f"there are two sources of {tag}: give one for each language")
        sources[tag] = (kind, place)
    return sources


def _clips(options: argparse.Namespace, sources: Mapping[str, tuple[str, str]], window_s: float) -> dict[str, Clips]:
    """The clips of each language."""
    if all(kind == "corpus" for kind, _ in sources.values()):
        return corpus_clips(list(sources), options.clips or CORPUS_CLIPS, options.seed, options.corpus, window_s)
    clips = {}
    for tag, (kind, place) in sources.items():
        if kind == "data":
            clips[tag] = folder_clips(tag, place, window_s, options.clips, options.seed)
        else:
            name, _, rest = place.partition(":")
            config, _, split = rest.partition(":")
            config = config or (None if Path(name).exists() else tag)  # Common Voice's configurations are its languages
            clips[tag] = dataset_clips(tag, name, config, split or "test", window_s, options.clips)
    return clips
