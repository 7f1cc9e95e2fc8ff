"""Who answers what, what counts as passed, which rows it makes, and `python -m flora.evaluate code` as its users call it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from peft import IA3Config, get_peft_model
from tiny_models import load_plain

from flora import Engine, Request
from flora.errors import EvaluationError, UnknownAdapterError
from flora.evaluate import __main__ as command
from flora.evaluate import code
from flora.evaluate.checkpoints import Checkpoint
from flora.evaluate.code import (
    EXAMPLES,
    Grades,
    Sampling,
    Tally,
    answer,
    answers_of,
    grade,
    mean_of,
    scores_of,
    tables,
    targets,
)
from flora.evaluate.problems import CORPUS, TAGS, Problem, held_out_problems
from flora.evaluate.report import Target
from flora.evaluate.results import mean_rows
from flora.evaluate.rows import Answer, Item, Mean, Score, read_rows
from flora.evaluate.sandbox import Result, find_sandbox
from flora.evaluate.tasks import tasks_of
from flora.evaluate.toolchains import Grader
from flora.names import PROJECT

from .test_rows import score as made_score


def problems_of(tag: str, count: int, **fields) -> list[Problem]:
    return [Problem(f"problem {number}", tag, f"{tag} {number}\n", "right", **fields) for number in range(count)]


class FakeGrader:
    """Programs with the word "right" pass; Swift is not installed, nor what a test with the word "library" imports."""

    def __init__(self, *_, **__) -> None:
        self.graded: list[tuple[str, str]] = []

    def reason(self, tag: str, program: str = "") -> str | None:
        if tag == "swift" or "library" in program:
            return f"{'Swift' if tag == 'swift' else 'the library'} is not installed"
        return None

    def grade_all(self, programs: Iterable[tuple[str, str]], workers: int | None = None) -> Iterator:
        for program in dict.fromkeys(programs):
            self.graded.append(program)
            passes = "right" in program[1]
            yield program, Result("passed", 0, "") if passes else Result("timeout", None, "longer than 5 s")


# -------------------------------------------------------------------------------------------------------------- answering

LUA, LUA_LORA, RUBY = Checkpoint("lua", "flora", "a"), Checkpoint("lua", "lora", "b"), Checkpoint("rb", "flora", "c")


def test_who_answers_what():
    tasks = list(tasks_of({"lua": problems_of("lua", 3), "rb": problems_of("rb", 2)}, [LUA, LUA_LORA, RUBY], confusion=2))
    keys = [task.key for task in tasks]
    assert {key: keys.count(key) for key in keys} == {
        ("lua", "base", None): 3,
        ("lua", "flora", "lua"): 3,
        ("lua", "lora", "lua"): 3,
        ("lua", "flora", "rb"): 2,
        ("rb", "base", None): 2,
        ("rb", "flora", "rb"): 2,
        ("rb", "flora", "lua"): 2,
    }
    assert [task.item.language for task in tasks[:7]] == ["lua"] * 4 + ["rb"] * 3, "languages take turns"
    assert len(set(tasks)) == len(tasks)


def test_every_sample_is_a_task_and_the_base_model_can_stay_out():
    tasks = list(tasks_of({"lua": problems_of("lua", 2)}, [LUA], base=False, samples=3))
    assert [(task.item.name, task.sample) for task in tasks] == [
        (f"problem {number}", sample) for number in (0, 1) for sample in (0, 1, 2)
    ]
    assert {task.method for task in tasks} == {"flora"}


@pytest.fixture(scope="module")
def judged(checkpoints, tmp_path_factory) -> tuple[Engine, list[Checkpoint]]:
    """A tiny code model with adapters of two languages, under the names that an evaluation gives them."""
    tiny = checkpoints["code"]
    folder = tmp_path_factory.mktemp("ia3")
    model = get_peft_model(load_plain(tiny.model), IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"]))
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data.fill_(0.4)
    model.save_pretrained(folder)
    found = [Checkpoint("lua", method, str(path)) for method, path in tiny.adapters["aa"].items()]
    found += [Checkpoint("rb", method, str(path)) for method, path in tiny.adapters["bb"].items()]
    found.append(Checkpoint("lua", "ia3", str(folder)))
    sources = {checkpoint.name: checkpoint.source for checkpoint in found}
    return Engine.from_pretrained(tiny.model, sources, device="cpu", max_batch_size=5), found


def test_answers_are_those_of_one_request_at_a_time(judged):
    engine, checkpoints = judged
    tasks = list(tasks_of({"lua": problems_of("lua", 3), "rb": problems_of("rb", 3)}, checkpoints, confusion=1))
    texts = dict(answer(engine, tasks, Sampling(max_new_tokens=7)))
    assert texts.keys() == set(tasks) and len({text for text in texts.values()}) > 5
    for task in tasks:
        adapter = task.checkpoint.name if task.checkpoint else None
        method = {"lora": "loop-lora"}.get(task.method, "flora")
        (alone,) = engine.generate([Request(task.item.prompt, None, None, adapter, 7)], method)
        assert texts[task] == alone.text, task.key


def test_answers_end_before_a_stop_token_and_the_rest_is_not_generated(judged, monkeypatch):
    engine, _ = judged
    (plain,) = (text for _, text in answer(engine, tasks_of({"lua": problems_of("lua", 1)}, []), Sampling(max_new_tokens=60)))
    stop = plain[5:7]
    problems = {"lua": problems_of("lua", 1, stop_tokens=(stop,)) + problems_of("lua", 2)[1:]}
    steps = []
    start = Engine.start

    def counted(*arguments, **options):
        generation = start(*arguments, **options)
        step = generation.step
        monkeypatch.setattr(generation, "step", lambda: steps.append(1) or step(), raising=False)
        return generation

    monkeypatch.setattr(Engine, "start", counted)
    (cut,) = (text for task, text in answer(engine, list(tasks_of(problems, []))[:1], Sampling(max_new_tokens=60)))
    assert cut == plain[: plain.index(stop)]
    assert 0 < len(steps) < 30


def test_a_prompt_longer_than_the_context_has_no_answer(judged):
    engine, _ = judged
    long = Problem("long", "lua", "x" * 500, "right")
    texts = {
        task.item.name: text for task, text in answer(engine, tasks_of({"lua": [long, *problems_of("lua", 1)]}, []), Sampling())
    }
    assert texts["long"] is None and texts["problem 0"]


def test_an_adapter_that_is_not_loaded_is_no_missing_answer(judged):
    engine, _ = judged
    tasks = list(tasks_of({"lua": problems_of("lua", 1)}, [Checkpoint("lua", "other", "x")]))
    with pytest.raises(UnknownAdapterError, match="lua/other"):
        list(answer(engine, tasks, Sampling(method="flora")))


def test_what_is_sampled_depends_on_the_seed_and_not_on_the_batch(judged, checkpoints):
    engine, _ = judged
    tasks = list(tasks_of({"lua": problems_of("lua", 3)}, [], samples=3))
    hot = Sampling(temperature=1.0, max_new_tokens=6, seed=5)
    drawn = dict(answer(engine, tasks, hot))
    assert dict(answer(engine, tasks, hot)) == drawn
    other_batches = Engine.from_pretrained(checkpoints["code"].model, device="cpu", max_batch_size=2)
    assert dict(answer(other_batches, tasks, hot)) == drawn
    assert dict(answer(engine, tasks, replace(hot, seed=6))) != drawn
    assert len({drawn[task] for task in tasks[:3]}) > 1, "samples of one problem differ"


# ---------------------------------------------------------------------------------------------------------------- grading


def test_a_tally_is_pass_at_k_over_problems():
    tally = Tally()
    for problem, passed in (("a", True), ("a", False), ("b", False), ("b", False)):
        tally.add(problem, passed)
    assert tally.rates(1) == {"a": 0.5, "b": 0.0} and tally.rates(2) == {"a": 1.0, "b": 0.0}
    assert tally.rate(1).value == 0.25 and tally.rate(2).value == 0.5 and tally.rate(1).n == 2


def test_answers_are_graded_once_each_and_counted_by_who_gave_them():
    problems = {"lua": [Problem("one", "lua", "p\n", "t"), Problem("two", "lua", "q\n", "t")]}
    tasks = list(tasks_of(problems, [LUA, LUA_LORA]))
    texts = {task: "right" if task.method != "base" and task.item.name == "one" else "wrong" for task in tasks}
    texts[next(task for task in tasks if task.method == "lora" and task.item.name == "two")] = None
    grader = FakeGrader()
    grades = grade(grader, tasks, texts)
    assert sorted(grader.graded) == [("lua", "p\nright\nt"), ("lua", "p\nwrong\nt"), ("lua", "q\nwrong\nt")]
    rates = {key[1]: tally.rates() for key, tally in grades.tallies.items()}
    assert rates == {"base": {"one": 0, "two": 0}, "flora": {"one": 1, "two": 0}, "lora": {"one": 1, "two": 0}}
    assert grades.unanswered == 1 and grades.reasons == {}
    assert (("lua", "lora", "lua"), "two") not in grades.answers
    assert grades.answers[("lua", "base", None), "two"] == ("wrong", Result("timeout", None, "longer than 5 s"))


def test_what_cannot_be_graded_counts_neither_way():
    problems = {"swift": problems_of("swift", 2), "lua": [Problem("one", "lua", "p", "library")], "rb": problems_of("rb", 1)}
    tasks = list(tasks_of(problems, []))
    grader = FakeGrader()
    grades = grade(grader, tasks, dict.fromkeys(tasks, "right"))
    assert grades.reasons == {"swift": "Swift is not installed", "lua": "the library is not installed"}
    assert set(grades.tallies) == {("rb", "base", None)} and {tag for tag, _ in grader.graded} == {"rb"}
    assert grades.answers[("swift", "base", None), "problem 1"] == ("right", None)
    assert set(grades.keys) == {(tag, "base", None) for tag in problems}


def test_of_many_samples_the_first_is_kept_to_be_read():
    tasks = list(tasks_of({"lua": [Problem("one", "lua", "p\n", "t")]}, [], samples=3))
    grades = grade(FakeGrader(), tasks, dict(zip(tasks, ("wrong", "right", "right"), strict=True)))
    assert grades.answers[("lua", "base", None), "one"][0] == "wrong"
    assert grades.tallies["lua", "base", None].rates(1)["one"] == pytest.approx(2 / 3)


def test_answers_written_by_hand_pass_and_fail_in_the_sandbox():
    try:
        grader = Grader(find_sandbox())
    except EvaluationError as error:
        pytest.skip(str(error))
    tags = [tag for tag in ("lua", "pl", "rb", "r") if grader.reason(tag) is None] or pytest.skip("there is no toolchain")
    problems = {tag: held_out_problems([tag], 2, seed=5) for tag in tags}
    tasks = list(tasks_of(problems, [Checkpoint(tag, "flora", "x") for tag in tags]))
    texts = {task: task.item.reference if task.method == "flora" else "" for task in tasks}
    grades = grade(grader, tasks, texts)
    for tag in tags:
        assert grades.tallies[tag, "flora", tag].rate().value == 1.0
        assert grades.tallies[tag, "base", None].rate().value == 0.0
        assert {result.outcome for (key, _), (_, result) in grades.answers.items() if key[1] == "base"} <= {"failed", "error"}


# ------------------------------------------------------------------------------------------------------------------ rows

FACTS = {"model": "assets/models/code", "temperature": 0.0, "seed": 1, "command": "python -m flora.evaluate code"}


def test_a_row_for_every_number(judged):
    engine, checkpoints = judged
    problems = {"swift": problems_of("swift", 2), "lua": problems_of("lua", 4)}
    tasks = list(tasks_of(problems, checkpoints, confusion=2, samples=2))
    # Two of the four, in both samples; every other test has its answer in the first sample alone.
    right = {"problem 0": (0, 1), "problem 1": (0,), "problem 2": (), "problem 3": (0, 1)}
    tasks = [replace(task, item=replace(task.item, tests="t")) for task in tasks]
    texts = {task: "right" if task.sample in right[task.item.name] and task.checkpoint else "wrong" for task in tasks}
    grades = grade(FakeGrader(), tasks, texts)
    scores = scores_of(grades, engine, checkpoints, {"swift": "x.jsonl", "lua": CORPUS}, (1, 2), 2, FACTS)
    keys = [(score.language, score.method, score.adapter) for score in scores[::2]]
    assert keys == [
        ("swift", "base", None),
        ("swift", "flora", "lua"),
        ("swift", "flora", "rb"),
        ("lua", "base", None),
        ("lua", "ia3", "lua"),
        ("lua", "lora", "lua"),
        ("lua", "flora", "lua"),
        ("lua", "flora", "rb"),
    ]
    assert [score.metric for score in scores] == ["pass@1", "pass@2"] * len(keys)
    by_key = {(score.language, score.method, score.adapter, score.metric): score for score in scores}
    own = by_key["lua", "flora", "lua", "pass@1"]
    assert (own.value, by_key["lua", "flora", "lua", "pass@2"].value) == (0.625, 0.75)
    assert 0 <= own.low <= own.value <= own.high <= 1 and own.confidence == 0.95
    assert (own.items, own.samples, own.graded, own.reason, own.source) == (4, 2, True, None, CORPUS)
    assert own.rank == 1 and by_key["lua", "flora", "rb", "pass@1"].rank == 3 and by_key["lua", "lora", "lua", "pass@1"].rank == 8
    assert by_key["lua", "ia3", "lua", "pass@1"].rank == 1
    assert own.checkpoint.endswith("flora") and not Path(own.checkpoint).is_absolute()
    assert (own.device, own.dtype) == ("cpu", "float32") and own.versions["torch"]
    wrong_adapter = by_key["lua", "flora", "rb", "pass@1"]
    assert (wrong_adapter.items, wrong_adapter.value) == (2, 0.75)
    base = by_key["lua", "base", None, "pass@1"]
    assert (base.value, base.low, base.checkpoint, base.rank) == (0.0, 0.0, None, None) and base.high > 0.2
    swift = by_key["swift", "flora", "rb", "pass@1"]
    assert (swift.graded, swift.value, swift.low, swift.high, swift.items) == (False, None, None, None, 0)
    assert swift.reason == "Swift is not installed" and swift.source == "x.jsonl"


def test_answers_to_the_first_problems_of_each_language():
    problems = {"lua": [replace(problem, tests="t", reference="r") for problem in problems_of("lua", EXAMPLES + 3)],
                "swift": problems_of("swift", 1)}  # fmt: skip
    tasks = list(tasks_of(problems, [LUA, RUBY], confusion=2))
    grades = grade(FakeGrader(), tasks, {task: "right" if task.checkpoint else "wrong" for task in tasks})
    rows = answers_of(grades, problems)
    items = [row for row in rows if isinstance(row, Item)]
    assert [item.item for item in items if item.language == "lua"] == [f"problem {number}" for number in range(EXAMPLES)]
    assert items[0] == Item("code", "lua", "problem 0", "lua 0\n", "r") and items[-1].reference == ""
    answers = [row for row in rows if isinstance(row, Answer) and row.item == "problem 0"]
    assert [(a.language, a.method, a.adapter, a.text, a.passed, a.outcome) for a in answers] == [
        ("lua", "base", None, "wrong", False, "timeout"),
        ("lua", "flora", "lua", "right", True, "passed"),
        ("swift", "base", None, "wrong", None, "not graded"),
    ]


# ---------------------------------------------------------------------------------------------------------------- targets


def tallies_of(rates: dict[tuple[str, str | None], float], tags: tuple[str, ...] = ("lua", "rb"), count: int = 20) -> dict:
    """(method, "own", "other" or None) → a share of problems that pass, in every language."""
    made = {}
    for tag in tags:
        for (method, whose), share in rates.items():
            adapters = {None: [None], "own": [tag], "other": [other for other in tags if other != tag]}[whose]
            for adapter in adapters:
                tally = made[tag, method, adapter] = Tally()
                for number in range(count):
                    tally.add(f"problem {number}", number < share * count)
    return made


def means_of(tallies: dict, ks: tuple[int, ...] = (1,)) -> list[Mean]:
    """The means that the scores of these tallies have."""
    scores = [
        made_score(tag, method, tally.rate(k).value, adapter, metric=f"pass@{k}", items=len(tally.samples), source=f"{tag}.jsonl")
        for (tag, method, adapter), tally in tallies.items()
        for k in ks
    ]
    return mean_rows(scores, partial(mean_of, tallies))


def judged_targets(tallies: dict, languages: tuple[str, ...], adapters: tuple[str, ...] = TAGS) -> list[Target]:
    return targets(tallies, means_of(tallies), languages, adapters)


GOOD = {("base", None): 0.45, ("ia3", "own"): 0.7, ("lora", "own"): 0.8, ("flora", "own"): 0.8, ("flora", "other"): 0.2}


@pytest.mark.parametrize(
    ("changed", "met"),
    [
        ({}, [True, True, True, True, True]),
        ({("base", None): 0.5}, [False, True, True, True, True]),
        ({("flora", "own"): 0.75, ("lora", "own"): 0.75}, [True, True, True, True, True]),
        ({("flora", "own"): 0.7, ("lora", "own"): 0.7, ("ia3", "own"): 0.65}, [True, False, True, True, True]),
        ({("lora", "own"): 0.85}, [True, True, False, True, True]),
        ({("ia3", "own"): 0.8}, [True, True, True, False, True]),
        ({("flora", "other"): 0.75}, [True, True, True, True, False]),
    ],
)
def test_targets_hold_or_not(changed, met):
    assert [target.met for target in judged_targets(tallies_of(GOOD | changed), ("lua", "rb"), ("lua", "rb"))] == met


def test_two_points_behind_lora_are_allowed():
    tallies = tallies_of({("lora", "own"): 0.80, ("flora", "own"): 0.78}, count=50)
    target = judged_targets(tallies, ("lua", "rb"))[2]
    assert target.met and "−2 points" in target.what and target.measured.startswith("-2.0 points [")
    assert mean_of(tallies, "flora", "lora", "pass@1", ("lua", "rb")).value == pytest.approx(-0.02)


def test_what_was_not_measured_is_no_promise_kept():
    assert [target.met for target in targets({}, [], ())] == [None] * 5
    without_lora = {key: tally for key, tally in tallies_of(GOOD).items() if key[1] != "lora"}
    assert [target.met for target in judged_targets(without_lora, ("lua", "rb"), ("lua", "rb"))] == [True, True, None, True, True]
    one_language_more = judged_targets(tallies_of(GOOD), ("lua", "rb", "pl"), ("lua", "rb"))
    assert [target.met for target in one_language_more] == [None] * 5
    assert judged_targets(tallies_of(GOOD), ("lua", "rb"), TAGS)[4].met is None, "an adapter that was not tried on every language"


def test_means_are_of_languages_with_intervals_of_problems():
    tallies = tallies_of({("base", None): 0.25}, count=40)
    mean = mean_of(tallies, "base", None, "pass@1", ("lua", "rb"))
    assert mean.value == 0.25 and mean.low < 0.25 < mean.high
    # The same problems pass in both languages: two languages tell no more than one.
    alone = mean_of(tallies, "base", None, "pass@1", ("lua",))
    assert (mean.low, mean.high) == (alone.low, alone.high)


def test_languages_count_the_same_however_many_problems_they_have():
    tallies = {**tallies_of({("base", None): 1.0}, ("lua",), 30), **tallies_of({("base", None): 0.0}, ("rb",), 10)}
    mean = mean_of(tallies, "base", None, "pass@1", ("lua", "rb"))
    assert mean.value == pytest.approx(0.5) and mean.low < 0.5 < mean.high
    tallies |= {**tallies_of({("flora", "own"): 1.0}, ("lua",), 30), **tallies_of({("flora", "own"): 0.6}, ("rb",), 10)}
    assert mean_of(tallies, "flora", "base", "pass@1", ("lua", "rb")).value == pytest.approx(0.3)


def test_every_method_that_has_all_languages_has_a_mean_of_each_metric():
    tallies = tallies_of({("base", None): 0.4, ("lora", "own"): 0.8, ("flora", "own"): 0.6}) | tallies_of(
        {("ia3", "own"): 0.5}, ("lua",)
    )
    for tally in tallies.values():
        for problem in list(tally.samples):
            tally.add(problem, False)
    made = means_of(tallies, (1, 2))
    assert [(mean.metric, mean.method, mean.versus) for mean in made] == [
        (metric, method, versus)
        for metric in ("pass@1", "pass@2")
        for method, versus in (("base", None), ("lora", None), ("flora", None), ("flora", "base"), ("flora", "lora"))
    ], "IA3 was tried on one language only"
    values = {(mean.metric, mean.method, mean.versus): mean.value for mean in made}
    assert values["pass@1", "flora", None] == 0.3 and values["pass@2", "flora", None] == 0.6
    assert values["pass@1", "flora", "lora"] == -0.1 and values["pass@2", "flora", "base"] == 0.2
    assert {(mean.languages, mean.items, mean.source) for mean in made} == {(("lua", "rb"), 40, "lua.jsonl rb.jsonl")}
    (lead,) = (mean for mean in made if (mean.metric, mean.method, mean.versus) == ("pass@1", "flora", "lora"))
    assert lead.low == pytest.approx(mean_of(tallies, "flora", "lora", "pass@1", ("lua", "rb")).low, abs=1e-6)
    assert mean_rows([], partial(mean_of, {})) == []


def test_tables_say_what_was_not_graded(judged):
    engine, checkpoints = judged
    tasks = list(tasks_of({"lua": problems_of("lua", 2), "swift": problems_of("swift", 1)}, checkpoints, confusion=1))
    grades = grade(FakeGrader(), tasks, dict.fromkeys(tasks, "x"))
    scores = scores_of(grades, engine, checkpoints, {"lua": CORPUS, "swift": CORPUS}, (1,), 1, FACTS)
    shown = tables(grades, scores, mean_rows(scores, partial(mean_of, grades.tallies)), (1,))
    assert "not graded: swift, Swift is not installed" in shown
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert "100.0 %" in lines["lua"] or "100.0" in lines["lua"]
    assert "rb's" in shown


def test_tables_of_nothing_are_empty():
    assert tables(Grades(), [], [], (1,)) == ""


# ---------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def tiny(checkpoints, tmp_path) -> list[str]:
    """The arguments that name the tiny model, its adapters for two languages, and three problems in each and one in Swift."""
    rows = [
        {"name": f"{tag} {number}", "language": tag, "prompt": f"{tag} {number}\n", "tests": tests, "stop_tokens": ["\n\n"]}
        for tag, tests in (("lua", "right"), ("rb", "wrong"), ("swift", "right"))
        for number in range(1 if tag == "swift" else 3)
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["code", "--model", str(checkpoints["code"].model), "--data", str(path), "--device", "cpu", "--max-new-tokens", "5"]
    for tag, name in (("lua", "aa"), ("rb", "bb")):
        for method, folder in checkpoints["code"].adapters[name].items():
            words += ["--adapter", f"{tag}/{method}={folder}"]
    return words


@pytest.fixture
def fake_grader(monkeypatch) -> None:
    monkeypatch.setattr(code, "Grader", FakeGrader)


def refused(capsys, words) -> str:
    """The one line of an exit with 2."""
    with pytest.raises(SystemExit) as stopped:
        command.main(words)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and not captured.out
    (line,) = captured.err.splitlines()
    assert line.startswith("python -m flora.evaluate")
    return line


@pytest.mark.usefixtures("fake_grader")
def test_a_file_is_scored_for_each_method(tiny, tmp_path, capsys):
    path = tmp_path / "scores.jsonl"
    assert command.main([*tiny, "--json", str(path), "--batch-size", "4"]) == 0
    printed = capsys.readouterr()
    assert "not graded: swift, Swift is not installed" in printed.out and "mean pass@1 of 2 languages" in printed.out
    assert "adapter's" not in printed.out and not printed.err
    rows = read_rows(path)
    scores = [row for row in rows if isinstance(row, Score)]
    means = {(row.method, row.versus): row for row in rows if isinstance(row, Mean)}
    assert set(means) == {("base", None), ("lora", None), ("flora", None), ("flora", "base"), ("flora", "lora")}
    assert means["flora", None].languages == ("lua", "rb") and means["flora", None].value == 0.5, "Swift is not graded"
    assert f"flora   50.0 % [{100 * means['flora', None].low:.1f}, " in printed.out, "what is printed is what is recorded"
    assert [(s.language, s.method, s.adapter, s.value) for s in scores] == [
        ("lua", "base", None, 1.0), ("lua", "lora", "lua", 1.0), ("lua", "flora", "lua", 1.0),
        ("rb", "base", None, 0.0), ("rb", "lora", "rb", 0.0), ("rb", "flora", "rb", 0.0),
        ("swift", "base", None, None),
    ]  # fmt: skip
    for score in scores:
        assert isinstance(score, Score) and (score.seed, score.samples, score.temperature) == (1, 1, 0.0)
        assert score.source == f"{tmp_path.name}/problems.jsonl"
        assert score.command.startswith("python -m flora.evaluate code --model ")
    assert str(tmp_path.parent) not in path.read_text(), "no folder of this machine"


@pytest.mark.usefixtures("fake_grader")
def test_rows_on_the_terminal_stand_alone(tiny, capsys):
    words = [*tiny, "--json", "-", "--languages", "rb", "lua", "--problems", "2", "--confusion", "1", "--methods", "flora"]
    assert command.main([*words, "-n", "2", "-k", "1", "2", "--temperature", "0.8"]) == 0
    printed = capsys.readouterr()
    rows = [row for row in map(json.loads, printed.out.splitlines()) if row["kind"] == "score"]
    assert [(r["language"], r["adapter"], r["metric"], r["items"], r["samples"]) for r in rows] == [
        (tag, adapter, f"pass@{k}", 2 if adapter == tag else 1, 2)
        for tag, other in (("rb", "lua"), ("lua", "rb"))
        for adapter in (tag, other)
        for k in (1, 2)
    ]
    assert {row["temperature"] for row in rows} == {0.8} and "lua's" in printed.err, "the tables go elsewhere"


@pytest.mark.usefixtures("fake_grader")
def test_a_report_merges_into_what_is_there(tiny, tmp_path, capsys):
    results = tmp_path / "results"
    for methods in (["base"], ["lora", "flora"]):
        assert command.main([*tiny, "--report", "--results", str(results), "--methods", *methods]) == 0
    assert sorted(path.name for path in results.iterdir()) == ["accuracy_code.jsonl", "answers_code.jsonl"]
    rows = read_rows(results / "accuracy_code.jsonl")
    scores = [row for row in rows if isinstance(row, Score)]
    means = [(row.method, row.versus) for row in rows if isinstance(row, Mean)]
    assert means == [("base", None), ("lora", None), ("flora", None), ("flora", "lora")], "each of one run"
    assert {(s.method, s.adapter) for s in scores if s.language == "lua"} == {
        ("base", None), ("lora", "lua"), ("flora", "lua"), ("flora", "rb"),
    }  # fmt: skip
    rows = read_rows(results / "answers_code.jsonl")
    assert [row.item for row in rows if isinstance(row, Item)] == [
        *(f"lua {n}" for n in range(3)),
        *(f"rb {n}" for n in range(3)),
        "swift 0",
    ]
    answers = [row for row in rows if isinstance(row, Answer)]
    assert {(row.language, row.outcome) for row in answers} == {("lua", "passed"), ("rb", "timeout"), ("swift", "not graded")}
    assert {row.method for row in answers if row.language == "lua"} == {"base", "lora", "flora"}
    base, others = capsys.readouterr().out.split("\ntarget")[1:]
    assert base.count("NOT MET") == 1 and base.count("not measured") == 4, "half of the base model's answers are right"
    assert others.count("not measured") == 3, "neither the base model's nor IA3's, nor all the other languages' adapters"


@pytest.mark.usefixtures("fake_grader")
def test_adapters_that_are_not_there_are_left_out_by_name(checkpoints, tiny, tmp_path, capsys):
    folder = tmp_path / "adapters"
    (folder / "lua").mkdir(parents=True)
    (folder / "lua" / "flora").symlink_to(checkpoints["code"].adapters["aa"]["flora"])
    words = [*tiny[: tiny.index("--adapter")], "--adapters", str(folder), "--languages", "lua", "rb", "--json", "-"]
    assert command.main(words) == 0
    printed = capsys.readouterr()
    assert "left out, since there is no such adapter: lua/ia3, lua/lora, rb/ia3, rb/lora, rb/flora" in printed.err
    scores = [row for row in map(json.loads, printed.out.splitlines()) if row["kind"] == "score"]
    assert [row["method"] for row in scores] == ["base", "flora", "base"]


@pytest.mark.usefixtures("fake_grader")
def test_broken_lines_of_a_file_are_named(tiny, tmp_path, capsys):
    path = tmp_path / "problems.jsonl"
    lines = path.read_text().splitlines()
    renamed = [lines[0].replace("lua 0", f"lua {number}") for number in range(100)]
    path.write_text("\n".join([*renamed[:40], '{"name": "cut off', *renamed[40:]]))
    assert command.main([*tiny[: tiny.index("--adapter")], "--problems", "1"]) == 0
    assert capsys.readouterr().err == "left out: problems.jsonl, line 41: not JSON\n"
    path.write_text("\n".join([*lines, "{"]))
    assert "1 of the 8 problems of problems.jsonl cannot be used" in refused(capsys, tiny)


@pytest.mark.usefixtures("fake_grader")
def test_prompts_longer_than_the_context_are_counted(tiny, tmp_path, capsys):
    path = tmp_path / "problems.jsonl"
    path.write_text(path.read_text().replace("rb 1\\n", "rb 1" + "x" * 200))
    assert command.main([*tiny, "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert "3 prompts are longer than the model's context and count as not passed" in printed.err
    rows = map(json.loads, printed.out.splitlines())
    assert {row["items"] for row in rows if row["kind"] == "score"} == {3, 0}


def test_an_interrupted_run_says_so(tiny, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(code, "measure", interrupted)
    monkeypatch.setattr(code, "Grader", FakeGrader)
    assert command.main(tiny) == 130


def test_without_a_sandbox_it_refuses(tiny, monkeypatch, capsys):
    def find(unsafe: bool):
        raise EvaluationError("generated programs cannot be kept apart here: install bubblewrap")

    monkeypatch.setattr(code, "find_sandbox", find)
    assert "install bubblewrap" in refused(capsys, tiny)


SAME_TWICE = {"name": "one", "language": "lua", "prompt": "x", "tests": "y", "stop_tokens": []}


@pytest.mark.usefixtures("fake_grader")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--problems", "0"], "--problems: must be a whole number of at least 1, not '0'"),
        (["--samples", "x"], "must be a whole number of at least 1, not 'x'"),
        (["--temperature", "nan"], "--temperature: must be a number of at least 0, not 'nan'"),
        (["--temperature", "-1"], "must be a number of at least 0"),
        (["--memory-limit", "1"], "must be a whole number of at least 256"),
        (["--methods", "prefix"], "invalid choice: 'prefix'"),
        (["--method", "prefix"], "invalid choice: 'prefix'"),
        (["--dataset", "other"], "invalid choice: 'other'"),
        (["-k", "5"], "pass@5 needs at least as many answers to each problem: give --samples 5"),
        (["-n", "3"], "3 greedy answers are all the same: give a --temperature above 0"),
        (["--languages", "cobol"], "no language 'cobol'; there are d, pl"),
        (["--languages", "py"], "nothing to evaluate: there is no adapter of py"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl cannot be read: No such file or directory"),
        (["--data", "here.jsonl", "--dataset", "mbpp"], "problems come from --data or from --dataset, not from both"),
        (["--data", "here.jsonl", "--languages", "rb"], "there are no problems in rb; there are some in lua"),
        (["--data", "here.jsonl", "--data", "here.jsonl"], "there are two problems 'one' in lua"),
        (["--data", "here.jsonl", "--report"], "name a folder with --results"),
        (["--model", "assets/models/code", "--report"], "name a folder with --results"),
        (["--adapters", "nowhere"], "there is no folder 'nowhere'"),
        (["--adapter", "lua"], "an adapter is given as TAG=FOLDER"),
        (["--adapter", "lua=nowhere"], "adapter nowhere has no adapter_config.json here; name its method"),
        (["--adapter", "lua/prefix=nowhere"], "adapter lua/prefix: the method 'prefix' is unknown"),
        (["--adapter", "rb/lora=x", "--languages", "lua"], "adapter rb/lora has no problems: they are in lua"),
        (["--adapter", "lua/lora=nowhere", "--languages", "lua"], "adapter nowhere: there is no such folder"),
        (["--model", "nowhere", "--languages", "lua"], "model 'nowhere' is neither a folder here nor a hub id"),
        (["--model", "assets/models/speech", "--languages", "lua"], "--model names the speech model 'speech'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(words, said, capsys, monkeypatch, tmp_path):
    (tmp_path / "here.jsonl").write_text(json.dumps(SAME_TWICE) + "\n")
    words = [str(tmp_path / word) if word == "here.jsonl" else word for word in words]
    words = [*words, "--methods", "flora"] if "py" in words else words
    monkeypatch.chdir(PROJECT)
    assert said in refused(capsys, ["code", *words])


def test_the_embedded_model_is_judged_on_the_corpus(capsys, tmp_path):
    """Two languages, few problems, base and fLoRA, the other languages' adapters: the shape of the report, not its numbers."""
    try:
        find_sandbox()
    except EvaluationError as error:
        pytest.skip(str(error))
    words = ["code", "--report", "--languages", "lua", "pl", "--methods", "base", "flora", "--problems", "3", "--confusion", "1"]
    assert command.main([*words, "--results", str(tmp_path), "--max-new-tokens", "24"]) == 0
    rows = read_rows(tmp_path / "accuracy_code.jsonl")
    scores = [row for row in rows if isinstance(row, Score)]
    assert {row.languages for row in rows if isinstance(row, Mean)} <= {("lua", "pl"), ("lua",), ("pl",)}
    assert {(s.method, s.adapter) for s in scores if s.language == "lua"} == {("base", None), *(("flora", tag) for tag in TAGS)}
    own = next(score for score in scores if (score.language, score.adapter) == ("lua", "lua"))
    assert own.checkpoint == "assets/adapters/code/lua/flora" and own.model == "assets/models/code" and own.source == CORPUS
    items = [row for row in read_rows(tmp_path / "answers_code.jsonl") if isinstance(row, Item)]
    assert [item.language for item in items] == ["lua"] * 3 + ["pl"] * 3 and all(item.reference for item in items)
    printed = capsys.readouterr().out
    assert "rkt's" in printed and "base model: mean pass@1 of" in printed


def test_help_names_what_is_there(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["code", "--report", "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    for option in ("--data", "--dataset", "--model", "--adapter", "--methods", "--report", "--results", "--json", "--unsafe"):
        assert option in shown
