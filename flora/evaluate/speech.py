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
from itertools import zip_longest
from pathlib import Path

import jiwer
import numpy as np
import torch
from tqdm import tqdm
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
from transformers.utils import logging as transformers_logging

from flora.corpus.speech import LANGUAGES, SAMPLING_RATE
from flora.engine import Engine, Request
from flora.errors import AdapterError, EvaluationError, ModelError
from flora.evaluate import intervals
from flora.evaluate.checkpoints import (
    SERVED_BY,
    Checkpoint,
    find_checkpoints,
    given_checkpoints,
    shipped_adapters,
    shipped_model,
)
from flora.evaluate.clips import Clip, Clips, corpus_clips, dataset_clips, example_clips, folder_clips
from flora.evaluate.intervals import Interval
from flora.evaluate.rows import (
    METHODS,
    PROJECT,
    Answer,
    Item,
    Row,
    Score,
    Target,
    confusion_table,
    environment,
    public_name,
    score_table,
    target_table,
    to_line,
    write_rows,
)

RAW, NORMALISED = METRICS = ("WER", "WER, normalised")
TAGS = tuple(tag for tag in LANGUAGES if tag != "en")  # English is what the embedded model knows without an adapter
EXAMPLES = "assets/clips"  # of the project
CORPUS_CLIPS = 200
CONFUSION_CLIPS = 50
BASE_AT_LEAST, FLORA_AT_MOST, BEHIND_LORA_AT_MOST = 0.40, 0.10, 0.01  # mean WER over the six languages

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


Tallies = dict[tuple[str, str, str | None], Tally]
"""(language, method, adapter's language or None) → its word errors."""


# ---------------------------------------------------------------------------------------------------------- transcribing


@dataclass(frozen=True)
class Task:
    """A clip and who transcribes it: a method with a checkpoint, or the base model with None."""

    clip: Clip
    checkpoint: Checkpoint | None

    @property
    def method(self) -> str:
        return self.checkpoint.method if self.checkpoint else "base"

    @property
    def key(self) -> tuple[str, str, str | None]:
        return (self.clip.language, self.method, self.checkpoint.language if self.checkpoint else None)


def tasks_of(
    clips: Mapping[str, Iterable[Clip]], checkpoints: Sequence[Checkpoint], base: bool = True, confusion: int = 0
) -> Iterator[Task]:
    """Who transcribes what: every clip the base model and its language's adapters, and the first `confusion` clips of each language
    the fLoRA adapters of all others too. Languages take turns, so that a batch holds clips and adapters of several.
    """
    own = {tag: [checkpoint for checkpoint in checkpoints if checkpoint.language == tag] for tag in clips}
    others = {tag: [c for c in checkpoints if c.language != tag and c.method == "flora"] for tag in clips}
    for index, row in enumerate(zip_longest(*clips.values())):
        for clip in filter(None, row):
            if base:
                yield Task(clip, None)
            for checkpoint in own[clip.language] + (others[clip.language] if index < confusion else []):
                yield Task(clip, checkpoint)


def transcribe(engine: Engine, tasks: Iterable[Task], max_new_tokens: int | None = None) -> Iterator[tuple[Task, str]]:
    """Transcripts as they come, greedy; adapters of one family and the base model share batches of the engine's full size.

    max_new_tokens: per clip, by default what the model's context holds.
    """
    waiting: dict[str, list[Task]] = {}
    limit = engine.context_length if max_new_tokens is None else max_new_tokens

    def run(method: str) -> Iterator[tuple[Task, str]]:
        batch = waiting.pop(method)
        requests = [
            Request(
                audio=task.clip.samples,
                sampling_rate=SAMPLING_RATE,
                adapter=task.checkpoint.name if task.checkpoint else None,
                max_new_tokens=limit,
            )
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
    total = _number_of_tasks(clips, checkpoints, base, confusion)
    for task, text in tqdm(transcribe(engine, tasks, max_new_tokens), total=total, unit="clip", leave=False, disable=None):
        tallies.setdefault(task.key, Tally()).add(task.clip.text, text, normalisers[task.clip.language])
    return tallies


def _number_of_tasks(clips: Mapping[str, Clips], checkpoints: Sequence[Checkpoint], base: bool, confusion: int) -> int | None:
    """How many transcripts there will be if no clip is bad; None where a number of clips is not known."""
    total = 0
    for tag, part in clips.items():
        if part.number is None:
            return None
        own = sum(checkpoint.language == tag for checkpoint in checkpoints)
        others = sum(checkpoint.language != tag and checkpoint.method == "flora" for checkpoint in checkpoints)
        total += part.number * (base + own) + min(part.number, confusion) * others
    return total


# -------------------------------------------------------------------------------------------------------------- results


def scores_of(
    tallies: Tallies, engine: Engine, checkpoints: Sequence[Checkpoint], sources: Mapping[str, str], facts: Mapping[str, object]
) -> list[Score]:
    """Two rows, one for each metric, of every tally, languages and methods in order.

    sources: language → where its clips are from. facts: the Score fields that are the same in all rows: model, seed, command.
    """
    by_name = {checkpoint.name: checkpoint for checkpoint in checkpoints}
    surroundings = environment(engine, "jiwer")
    order = {tag: index for index, tag in enumerate(sources)}
    scores = []
    keys = sorted(tallies, key=lambda key: (order[key[0]], METHODS.index(key[1]), key[2] not in (None, key[0]), key[2] or ""))
    for language, method, adapter in keys:
        checkpoint = by_name.get(f"{adapter}/{method}")
        rank = None if checkpoint is None else max(engine.adapters[checkpoint.name].ranks.values())
        for metric in METRICS:
            tally = tallies[language, method, adapter]
            interval = tally.rate(metric)
            scores.append(
                Score(
                    task="speech",
                    language=language,
                    method=method,
                    adapter=adapter,
                    metric=metric,
                    value=None if interval is None else round(interval.value, 6),
                    low=None if interval is None or interval.low is None else round(interval.low, 6),
                    high=None if interval is None or interval.high is None else round(interval.high, 6),
                    confidence=intervals.CONFIDENCE,
                    items=len(tally.errors[metric]),
                    samples=1,
                    temperature=0.0,
                    graded=interval is not None,
                    reason=None if interval is not None else "the normaliser leaves no words of these texts",
                    checkpoint=None if checkpoint is None else public_name(checkpoint.source),
                    rank=rank,
                    source=sources[language],
                    **facts,
                    **surroundings,
                )
            )
    return scores


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
        compared = word_errors(task.clip.text, text)
        heard.append(
            Answer(
                "speech",
                task.clip.language,
                task.clip.name,
                task.method,
                task.key[2],
                text,
                passed=compared.errors == 0,
                wer=round(compared.rate, 6),
            )
        )
    places = {clip.name: index for index, clip in enumerate(examples)}
    return rows + sorted(heard, key=lambda answer: (places[answer.item], METHODS.index(answer.method)))


def targets(tallies: Tallies, languages: Sequence[str] = TAGS) -> list[Target]:
    """What the embedded model and its adapters promise, over all `languages`, and whether it holds; see `Target`.

    Differences are of the same clips. Another language's adapter is clearly worse where the interval of its difference to the right
    one, on the same clips, leaves out 0.
    """

    def own(method: str) -> list[Tally] | None:
        keys = [(tag, method, None if method == "base" else tag) for tag in languages]
        return [tallies[key] for key in keys] if all(key in tallies for key in keys) else None

    base, ia3, lora, flora = (own(method) for method in METHODS)
    mean_of_base, mean_of_flora = _mean(base), _mean(flora)
    behind_lora, behind_ia3 = _mean_difference(flora, lora), _mean_difference(flora, ia3)
    number = f"mean {RAW} of {len(languages)} languages"
    return [
        Target(
            f"base model: {number} at least {100 * BASE_AT_LEAST:.0f} %",
            _per_cent(mean_of_base),
            None if mean_of_base is None else mean_of_base.value >= BASE_AT_LEAST,
        ),
        Target(
            f"fLoRA: {number} at most {100 * FLORA_AT_MOST:.0f} %",
            _per_cent(mean_of_flora),
            None if mean_of_flora is None else mean_of_flora.value <= FLORA_AT_MOST,
        ),
        Target(
            f"fLoRA − LoRA at most {100 * BEHIND_LORA_AT_MOST:.0f} point",
            _points(behind_lora),
            None if behind_lora is None else behind_lora.value <= BEHIND_LORA_AT_MOST,
        ),
        Target("fLoRA − IA3 below 0", _points(behind_ia3), None if behind_ia3 is None else behind_ia3.value < 0.0),
        _needed(tallies, languages),
    ]


def _mean(tallies: list[Tally] | None) -> Interval | None:
    if tallies is None:
        return None
    return intervals.mean_of_ratios([tally.errors[RAW] for tally in tallies], [tally.words[RAW] for tally in tallies])


def _mean_difference(first: list[Tally] | None, second: list[Tally] | None) -> Interval | None:
    if first is None or second is None:
        return None
    errors = [np.subtract(one.errors[RAW], other.errors[RAW]) for one, other in zip(first, second, strict=True)]
    return intervals.mean_of_ratios(errors, [tally.words[RAW] for tally in first])


def _needed(tallies: Tallies, languages: Sequence[str]) -> Target:
    """Each adapter is needed: on no language does another one's come near its own."""
    what = "every other language's fLoRA adapter is clearly worse"
    pairs = [(tag, other) for tag in languages for other in languages if other != tag]
    if not pairs or any((tag, "flora", adapter) not in tallies for tag, other in pairs for adapter in (tag, other)):
        return Target(what, None, None)
    differences = {}
    for tag, other in pairs:
        wrong, right = tallies[tag, "flora", other], tallies[tag, "flora", tag]
        n = len(wrong.errors[RAW])
        differences[tag, other] = intervals.ratio_difference(wrong.errors[RAW], right.errors[RAW][:n], wrong.words[RAW])
    worse = sum(difference.low is not None and difference.low > 0.0 for difference in differences.values())
    (tag, other), nearest = min(differences.items(), key=lambda pair: pair[1].value)
    measured = f"{worse} of {len(pairs)}; nearest: {other}'s on {tag} {_points(nearest)}"
    return Target(what, measured, worse == len(pairs))


def _per_cent(interval: Interval | None) -> str | None:
    return None if interval is None else f"{100 * interval.value:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _points(interval: Interval | None) -> str | None:
    if interval is None:
        return None
    ends = "" if interval.low is None else f" [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
    return f"{100 * interval.value:+.1f} points{ends}"


def tables(scores: Sequence[Score]) -> str:
    """The scores for a terminal: a table for each metric, the confusion matrix, and what to know about them."""
    parts = [score_table(scores, metric) for metric in METRICS] + [confusion_table(scores, RAW), NORMALISED_NOTE]
    return "\n\n".join(filter(None, parts))


# ------------------------------------------------------------------------------------------------------------- command


def _at_least(lowest: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = lowest - 1
        if number < lowest:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {lowest}, not {text!r}")
        return number

    return whole


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
    data.add_argument(
        "--clips", type=_at_least(1), metavar="N", help=f"per language; default: {CORPUS_CLIPS} of the corpus, else all"
    )
    data.add_argument(
        "--corpus", type=Path, default=Path("runs/speech"), metavar="FOLDER", help="cache of spoken clips; default: runs/speech"
    )
    who = parser.add_argument_group("who transcribes")
    who.add_argument("--model", metavar="MODEL", help="folder, hub id or short name; default: the embedded speech model")
    who.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="TAG[/METHOD]=FOLDER",
        help="an adapter of a language, folder or hub id; may be given many times",
    )
    who.add_argument("--adapters", type=Path, metavar="FOLDER", help="folder of adapters TAG/METHOD; default: those that ship")
    who.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=f"default: {' '.join(METHODS)}"
    )
    who.add_argument(
        "--confusion",
        type=_at_least(0),
        metavar="N",
        help=f"every language's fLoRA adapter on N clips of every other; default: {CONFUSION_CLIPS} with --report, else 0",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda; default: auto")
    how.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16; default: auto")
    how.add_argument("--quantize", choices=("int8", "nf4"), help="load the base model quantised")
    how.add_argument("--batch-size", type=_at_least(1), default=32, metavar="N", help="clips at once; default: 32")
    how.add_argument("--max-new-tokens", type=_at_least(1), metavar="N", help="per clip; default: the model's context")
    how.add_argument("--seed", type=_at_least(0), default=1, metavar="N", help="of which clips are taken; default: 1")
    how.add_argument("--threads", type=_at_least(1), metavar="N", help="torch's CPU threads; default: torch's own choice")
    out = parser.add_argument_group("what is left behind")
    out.add_argument("--json", metavar="FILE", help="write the scores as JSONL rows; - for the terminal")
    out.add_argument(
        "--report",
        action="store_true",
        help="also the confusion matrix, answers to the clips that ship, and whether each target holds; written to --results",
    )
    out.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="where --report merges accuracy_speech.jsonl and answers_speech.jsonl; default: assets/results",
    )


def main(options: argparse.Namespace) -> int:
    """Evaluate as the options say, print a table, write rows; 0 for done. Raises a FloraError for bad input."""
    embedded = not (options.model or options.adapter or options.adapters or options.data or options.dataset)
    if options.report and options.results is None and not embedded:
        raise EvaluationError("name a folder with --results: only the embedded model's own report goes to assets/results")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    said = sys.stderr if options.json == "-" else sys.stdout  # rows on stdout stay alone there
    confusion = options.confusion if options.confusion is not None else CONFUSION_CLIPS if options.report else 0
    base = "base" in options.methods

    sources = _sources(options)
    checkpoints, missing = _checkpoints(options, list(sources), confusion)
    if not base and not checkpoints:
        raise EvaluationError(f"nothing to evaluate: there is no adapter of {', '.join(sources)} by {', '.join(options.methods)}")
    model = options.model or shipped_model("speech")
    engine = Engine.from_pretrained(
        model,
        {checkpoint.name: checkpoint.source for checkpoint in checkpoints},
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        max_batch_size=options.batch_size,
    )
    if engine.kind != "speech":
        raise ModelError(f"--model names the code model {engine.name!r}: give a Whisper model")

    clips = _clips(options, sources, engine.window_s)
    if missing:
        print(f"left out, since there is no such adapter: {', '.join(missing)}", file=sys.stderr)
    tallies = measure(engine, clips, checkpoints, base, confusion, options.max_new_tokens)
    for sentence in (sentence for part in clips.values() for sentence in part.skipped):
        print(f"left out: {sentence}", file=sys.stderr)
    facts = {"model": public_name(model), "seed": options.seed, "command": options.command}
    scores = scores_of(tallies, engine, checkpoints, {tag: part.source for tag, part in clips.items()}, facts)
    print(tables(scores), file=said)
    if options.json == "-":
        sys.stdout.writelines(to_line(score) + "\n" for score in scores)
    elif options.json:
        write_rows(options.json, scores)
    if options.report:
        results = options.results or PROJECT / "assets" / "results"
        write_rows(results / "accuracy_speech.jsonl", scores, merge=True)
        if not (options.data or options.dataset):
            examples = [clip for clip in example_clips(PROJECT / EXAMPLES) if clip.language in clips]
            write_rows(results / "answers_speech.jsonl", answers_of(engine, examples, checkpoints, EXAMPLES, base), merge=True)
        print(f"\n{target_table(targets(tallies))}", file=said)
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


def _checkpoints(options: argparse.Namespace, languages: Sequence[str], confusion: int) -> tuple[list[Checkpoint], list[str]]:
    """The adapters to judge on `languages`, with `confusion` the fLoRA adapters of others too; the names of what is missing."""
    missing: list[str] = []
    if options.adapter:
        checkpoints = [checkpoint for checkpoint in given_checkpoints(options.adapter) if checkpoint.method in options.methods]
    elif options.model and not options.adapters:
        return [], []
    else:
        folder = options.adapters or shipped_adapters("speech")
        if not folder.is_dir():
            raise AdapterError(f"there is no folder {folder.name!r}: give one that holds adapters as TAG/METHOD")
        checkpoints, missing = find_checkpoints(folder, dict.fromkeys([*languages, *TAGS]), options.methods)
        missing = [name for name in missing if name.partition("/")[0] in languages]
    used = [c for c in checkpoints if c.language in languages or (confusion and c.method == "flora")]
    if options.adapter and len(used) < len(checkpoints):
        idle = next(checkpoint for checkpoint in checkpoints if checkpoint not in used)
        raise EvaluationError(f"adapter {idle.name} has no clips: give some with --data {idle.language}=FOLDER")
    return used, missing


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
