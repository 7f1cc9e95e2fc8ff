"""python -m flora.evaluate code: pass@k of a code model, bare and with its adapters.

Every problem is answered by every method in turn through `flora.Engine`: problems of all languages, each with its own adapter,
run in one batch. The answers are cut at the problem's stop tokens, put between its prompt and its tests as MultiPL-E does, and the
programs run in a sandbox. A language without a toolchain is not graded.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from tqdm import tqdm

from flora import ops
from flora.engine import Engine, Request
from flora.engine.request import TokenEvent
from flora.errors import EvaluationError, RequestError, UnknownAdapterError
from flora.evaluate import command, intervals
from flora.evaluate.checkpoints import SERVED_BY, Checkpoint
from flora.evaluate.command import whole
from flora.evaluate.intervals import Interval
from flora.evaluate.pass_at_k import pass_at_k
from flora.evaluate.problems import BENCHMARKS, CORPUS, HUB, TAGS, Problem, held_out_problems, hub_problems, read_problems
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
from flora.evaluate.sandbox import Limits, Result, find_sandbox
from flora.evaluate.tasks import Key, Task, tasks_of
from flora.evaluate.toolchains import WALL_PER_CPU, Grader, recipe
from flora.names import public_name

CORPUS_PROBLEMS = 100
CONFUSION_PROBLEMS = 25
EXAMPLES = 8  # problems per language of which the answers are kept
CORPUS_TOKENS, MULTIPL_E_TOKENS = 160, 512  # new tokens; the corpus's longest completions take half of that
PROMISES = (  # of mean pass@1 over the graded languages
    Promise("base model: {mean} at most 45 %", "base", None, lambda mean: mean <= 0.45),
    Promise("fLoRA: {mean} at least 75 %", "flora", None, lambda mean: mean >= 0.75),
    Promise("fLoRA − LoRA at least −2 points", "flora", "lora", lambda lead: lead >= -0.02),
    Promise("fLoRA − IA3 above 0", "flora", "ia3", lambda lead: lead > 0.0),
)


# ------------------------------------------------------------------------------------------------------------ answering


ProblemTask = Task[Problem]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature: 0 is greedy. method: the engine's for all adapters, None for the one of each kind."""

    temperature: float = 0.0
    max_new_tokens: int = CORPUS_TOKENS
    seed: int = 1
    method: str | None = None


def answer(engine: Engine, tasks: Sequence[ProblemTask], sampling: Sampling) -> Iterator[tuple[ProblemTask, str | None]]:
    """Completions as batches are done, cut at the stop tokens; None for a prompt that the model's context does not hold.

    Adapters of one family and the base model share batches. What is sampled depends on the seed and on a task's place among those
    of its engine's method.
    """
    queues: dict[str, list[tuple[ProblemTask, Request]]] = {}
    for task in tasks:
        method = sampling.method or SERVED_BY[task.method]
        try:
            request = Request(task.item.prompt, None, None, task.adapter, sampling.max_new_tokens, sampling.temperature)
            engine.validate(request, method)
        except UnknownAdapterError:
            raise
        except RequestError:
            yield task, None
        else:
            queues.setdefault(method, []).append((task, request))
    for method, queue in queues.items():
        for first in range(0, len(queue), engine.max_batch_size):
            batch = queue[first : first + engine.max_batch_size]
            problems, requests = [task.item for task, _ in batch], [request for _, request in batch]
            texts = _generate(engine, problems, requests, method, sampling.seed, first)
            yield from ((task, text) for (task, _), text in zip(batch, texts, strict=True))


def _generate(
    engine: Engine, problems: Sequence[Problem], requests: Sequence[Request], method: str, seed: int, first_index: int
) -> list[str]:
    """One batch; a row ends at its problem's first stop token, or where the model ends it."""
    generation = engine.start(requests, method, seed, first_index)
    try:
        while not generation.done:
            for event in generation.step():
                # Decoding all tokens at every token would be quadratic: a row may run on for a few.
                if isinstance(event, TokenEvent) and event.num_new_tokens % 8 == 0 and problems[event.index].stop_tokens:
                    if problems[event.index].is_complete(event.text):
                        generation.cancel(event.index)
        completions = generation.completions
    finally:
        generation.close()
    return [problem.completion(completion.text) for problem, completion in zip(problems, completions, strict=True)]


# -------------------------------------------------------------------------------------------------------------- grading


@dataclass
class Tally:
    """The answers of one method with one adapter on one language: by problem, how many samples there are and how many passed."""

    passed: dict[str, int] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)

    def add(self, problem: str, passed: bool) -> None:
        self.samples[problem] = self.samples.get(problem, 0) + 1
        self.passed[problem] = self.passed.get(problem, 0) + passed

    def rates(self, k: int = 1) -> dict[str, float]:
        """pass@k of each problem."""
        return {name: pass_at_k(self.samples[name], self.passed[name], k) for name in self.samples}

    def rate(self, k: int = 1) -> Interval:
        return intervals.pass_rate(list(self.rates(k).values()))


@dataclass
class Grades:
    """What was answered and how it did. reasons: language → why it is not graded. unanswered: prompts longer than the context."""

    tallies: dict[Key, Tally] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    answers: dict[tuple[Key, str], tuple[str, Result | None]] = field(default_factory=dict)  # first samples only
    keys: list[Key] = field(default_factory=list)
    unanswered: int = 0


def grade(
    grader: Grader, tasks: Sequence[ProblemTask], texts: Mapping[ProblemTask, str | None], workers: int | None = None
) -> Grades:
    """Run the programs of all answers, equal ones once, with a progress bar on a terminal."""
    programs = {task: (task.item.language, task.item.program(texts[task])) for task in tasks if texts[task] is not None}
    results: dict[tuple[str, str], Result | None] = {}
    grades = Grades(keys=list(dict.fromkeys(task.key for task in tasks)), unanswered=len(tasks) - len(programs))
    for task in tasks:
        reason = grader.reason(task.item.language, task.item.tests)
        if reason is not None:
            grades.reasons.setdefault(task.item.language, reason)
    graded = list(dict.fromkeys(program for program in programs.values() if program[0] not in grades.reasons))
    running = grader.grade_all(graded, workers)
    for program, result in tqdm(running, total=len(graded), unit="program", leave=False, disable=None):
        results[program] = result
    for task in tasks:
        text, result = texts[task], results.get(programs[task]) if task in programs else None
        if task.item.language not in grades.reasons:
            grades.tallies.setdefault(task.key, Tally()).add(task.item.name, result is not None and result.passed)
        if task.sample == 0 and text is not None:
            grades.answers[task.key, task.item.name] = (text, result)
    return grades


def measure(engine: Engine, grader: Grader, tasks: Sequence[ProblemTask], sampling: Sampling, workers: int | None = None) -> Grades:
    """Answer all tasks, then grade the answers."""
    answering = tqdm(answer(engine, tasks, sampling), total=len(tasks), unit="answer", leave=False, disable=None)
    return grade(grader, tasks, dict(answering), workers)


# -------------------------------------------------------------------------------------------------------------- results


def scores_of(
    grades: Grades,
    engine: Engine,
    checkpoints: Sequence[Checkpoint],
    sources: Mapping[str, str],
    ks: Sequence[int],
    samples: int,
    facts: Mapping[str, object],
) -> list[Score]:
    """A row for each k of every language, method and adapter, languages and methods in order.

    sources: language → where its problems are from. facts: the Score fields that are the same in all rows.
    """
    measured = {}
    for key in grades.keys:
        tally, reason = grades.tallies.get(key), grades.reasons.get(key[0])
        measured[key] = {
            f"pass@{k}": Measured(None, 0, reason) if tally is None else Measured(tally.rate(k), len(tally.samples), reason)
            for k in ks
        }
    return score_rows("code", measured, engine, checkpoints, sources, {"samples": samples, **facts})


def answers_of(grades: Grades, problems: Mapping[str, Sequence[Problem]]) -> list[Row]:
    """An Item for the first problems of each language, and an Answer for what each method with the right adapter wrote."""
    rows: list[Row] = []
    for tag, part in problems.items():
        for problem in part[:EXAMPLES]:
            rows.append(Item("code", tag, problem.name, problem.prompt, problem.reference or ""))
            for method in METHODS:
                key = (tag, method, None if method == "base" else tag)
                if (key, problem.name) in grades.answers:
                    text, result = grades.answers[key, problem.name]
                    passed, outcome = (None, "not graded") if result is None else (result.passed, result.outcome)
                    rows.append(Answer("code", tag, problem.name, method, key[2], text, passed, outcome))
    return rows


def mean_of(
    tallies: Mapping[Key, Tally], method: str, versus: str | None, metric: str, languages: Sequence[str]
) -> Interval | None:
    """Mean pass@k over languages, each with its own adapter and counted the same; or how far it lies above that of `versus`.

    None where one of the languages is missing, or has not the same problems for both. Languages share their problems: what is drawn
    again for the interval is the problem, in all languages at once, and of a difference in both methods.
    """
    k = int(metric.removeprefix("pass@"))
    rates = _own_rates(tallies, method, k, languages)
    if rates is None:
        return None
    numbers = Counter(tag for tag, _ in rates)
    weights = [max(numbers.values()) / numbers[tag] for tag, _ in rates]
    clusters = [name for _, name in rates]
    if versus is None:
        return intervals.pass_rate(list(rates.values()), clusters, weights)
    others = _own_rates(tallies, versus, k, languages)
    if others is None or others.keys() != rates.keys():
        return None
    first, second = (np.multiply([part[place] for place in rates], weights) for part in (rates, others))
    return intervals.ratio_difference(first, second, weights, clusters)


def _own_rates(tallies: Mapping[Key, Tally], method: str, k: int, languages: Sequence[str]) -> dict[tuple[str, str], float] | None:
    """(language, problem) → pass@k."""
    keys = {tag: (tag, method, None if method == "base" else tag) for tag in languages}
    if any(key not in tallies for key in keys.values()):
        return None
    return {(tag, name): rate for tag, key in keys.items() for name, rate in tallies[key].rates(k).items()}


def targets(
    tallies: Mapping[Key, Tally], means: Sequence[Mean], languages: Sequence[str], adapters: Sequence[str] = TAGS
) -> list[Target]:
    """What the embedded model and its adapters promise, over all graded `languages`, and whether it holds; see `Target`.

    Another of the `adapters` is clearly worse where the interval of the right one's lead, on the same problems, leaves out 0.
    """
    held = mean_targets(PROMISES, means, "pass@1", languages)
    return [*held, needed_target(tallies, languages, adapters, _worse_by, " behind")]


def _worse_by(right: Tally, wrong: Tally) -> Interval:
    """How far the wrong adapter's pass@1 lies below the right one's, on the problems of the wrong one."""
    rates, of_wrong = right.rates(), wrong.rates()
    return intervals.ratio_difference([rates[name] for name in of_wrong], list(of_wrong.values()))


def tables(grades: Grades, scores: Sequence[Score], means: Sequence[Mean], ks: Sequence[int]) -> str:
    """The scores for a terminal: a table for each k, each method's mean with its interval, the confusion matrix, the reasons."""
    parts = [score_table(scores, f"pass@{k}") for k in ks]
    parts += [means_table(means, "pass@1"), confusion_table(scores, "pass@1")]
    parts += [f"not graded: {tag}, {reason}" for tag, reason in grades.reasons.items()]
    return "\n\n".join(filter(None, parts))


# ------------------------------------------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m flora.evaluate code`."""
    parser.description = (
        "Measure pass@k of a code model and its adapters, with confidence intervals. Without --data and --dataset: on held-out "
        "problems of the project's own corpus. Without --model: the embedded model and the adapters that ship."
    )
    data = parser.add_argument_group("what is asked")
    data.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="FILE",
        help="problems in MultiPL-E's format: JSONL rows {name, language, prompt, tests, stop_tokens}; may be given many times",
    )
    data.add_argument("--dataset", choices=BENCHMARKS, help=f"problems of {HUB} on the hub: {' or '.join(BENCHMARKS)}")
    data.add_argument("--languages", nargs="+", metavar="TAG", help=f"default: those of --data, else {' '.join(TAGS)}")
    data.add_argument(
        "--problems", type=whole(1), metavar="N", help=f"per language; default: {CORPUS_PROBLEMS} of the corpus, else all"
    )
    who = command.add_who(parser, "who answers", "code", "problems", CONFUSION_PROBLEMS)
    who.add_argument(
        "--method", choices=ops.METHODS, metavar="METHOD", help="of the engine, for all adapters; default: flora, for LoRA bmm-lora"
    )
    how = parser.add_argument_group("how")
    how.add_argument("-n", "--samples", type=whole(1), default=1, metavar="N", help="answers to each problem; default: 1")
    how.add_argument("-k", "--k", nargs="+", type=whole(1), default=[1], metavar="K", help="pass@k for each; default: 1")
    how.add_argument("--temperature", type=command.temperature, default=0.0, metavar="T", help="0 is greedy; default: 0")
    lengths = f"default: {CORPUS_TOKENS} for the corpus, else {MULTIPL_E_TOKENS}"
    how.add_argument("--max-new-tokens", type=whole(1), metavar="N", help=lengths)
    how.add_argument("--seed", type=whole(0), default=1, metavar="N", help="of the corpus's problems and of sampling; default: 1")
    command.add_how(how, "answers")
    limits = parser.add_argument_group("how programs run")
    limits.add_argument("--workers", type=whole(1), metavar="N", help="programs at a time; default: one per processor")
    cpu_s, megabytes = Limits.cpu_s, Limits.memory_bytes >> 20
    limits.add_argument("--cpu-limit", type=whole(1), default=cpu_s, metavar="S", help=f"seconds of computing; default: {cpu_s}")
    limits.add_argument("--memory-limit", type=whole(256), default=megabytes, metavar="MB", help=f"default: {megabytes}")
    limits.add_argument(
        "--unsafe",
        action="store_true",
        help="where neither bubblewrap nor namespaces work: run generated programs all the same, with limits alone",
    )
    command.add_out(parser, "code", "a few problems")


def main(options: argparse.Namespace) -> int:
    """Evaluate as the options say, print a table, write rows; 0 for done. Raises a FloraError for bad input."""
    said = command.begin(options)
    if max(options.k) > options.samples:
        k = max(options.k)
        raise EvaluationError(f"pass@{k} needs at least as many answers to each problem: give --samples {k}")
    if options.samples > 1 and options.temperature == 0.0:
        raise EvaluationError(f"{options.samples} greedy answers are all the same: give a --temperature above 0, such as 0.2")
    confusion = command.number_of_confusion(options, CONFUSION_PROBLEMS)
    base, ks = "base" in options.methods, sorted(set(options.k))

    run_limits = Limits(wall_s=WALL_PER_CPU * options.cpu_limit, cpu_s=options.cpu_limit, memory_bytes=options.memory_limit << 20)
    grader = Grader(find_sandbox(options.unsafe), run_limits)
    problems, source = _problems(options)
    checkpoints, missing = command.chosen_checkpoints(
        options, list(problems), TAGS, confusion, lambda tag: f"problems: they are in {', '.join(problems)}"
    )
    command.say_what_is_missing(missing)
    engine = command.load_engine(options, checkpoints, "one that continues text")

    # Of a language that is not graded a few answers are enough to read.
    asked = {
        tag: part if all(grader.reason(tag, problem.tests) is None for problem in part) else part[:EXAMPLES]
        for tag, part in problems.items()
    }
    tasks = list(tasks_of(asked, checkpoints, base, confusion, options.samples))
    max_new_tokens = options.max_new_tokens or (CORPUS_TOKENS if source == CORPUS else MULTIPL_E_TOKENS)
    sampling = Sampling(options.temperature, max_new_tokens, options.seed, options.method)
    grades = measure(engine, grader, tasks, sampling, options.workers)
    facts = {
        "model": public_name(command.model_name(options)),
        "temperature": options.temperature,
        "seed": options.seed,
        "command": options.command,
    }
    scores = scores_of(grades, engine, checkpoints, dict.fromkeys(problems, source), ks, options.samples, facts)
    means = mean_rows(scores, partial(mean_of, grades.tallies))
    print(tables(grades, scores, means, ks), file=said)
    if grades.unanswered:
        print(f"{grades.unanswered} prompts are longer than the model's context and count as not passed", file=sys.stderr)
    command.write_json(options, [*scores, *means])
    if options.report:
        command.merge_results(options, "accuracy", [*scores, *means])
        command.merge_results(options, "answers", answers_of(grades, problems))
        languages = [tag for tag in problems if tag not in grades.reasons]
        print(f"\n{target_table(targets(grades.tallies, means, languages))}", file=said)
    return 0


def _problems(options: argparse.Namespace) -> tuple[dict[str, list[Problem]], str]:
    """Problems by language, and where they are from."""
    for tag in options.languages or ():
        recipe(tag)
    if options.data and options.dataset:
        raise EvaluationError("problems come from --data or from --dataset, not from both")
    if not options.data and not options.dataset:
        found = held_out_problems(options.languages or TAGS, options.problems or CORPUS_PROBLEMS, options.seed)
        source, skipped = CORPUS, []
    elif options.dataset:
        found, skipped = hub_problems(options.languages or TAGS, options.dataset)
        source = f"{HUB} {options.dataset}"
    else:
        parts = [read_problems(path) for path in options.data]
        found, skipped = [problem for good, _ in parts for problem in good], [sentence for _, bad in parts for sentence in bad]
        source = " ".join(public_name(path) for path in options.data)
    for sentence in skipped:
        print(f"left out: {sentence}", file=sys.stderr)
    by_language: dict[str, list[Problem]] = {}
    for problem in found:
        by_language.setdefault(problem.language, []).append(problem)
    chosen = {}
    for tag in options.languages or by_language:
        if tag not in by_language:
            raise EvaluationError(f"there are no problems in {tag}; there are some in {', '.join(by_language)}")
        part = by_language[tag][: options.problems]
        names = [problem.name for problem in part]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise EvaluationError(f"there are two problems {twice!r} in {tag}: give each a name of its own")
        chosen[tag] = part
    return chosen, source
