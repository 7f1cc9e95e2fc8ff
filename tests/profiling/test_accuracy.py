"""Recorded accuracy: reading what may be missing or broken, means and intervals, charts, and what the tab says of it."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from accuracy_rows import ITEMS, NOT_GRADED, TAGS, code_answers, means, score, scores, speech_answers, write_results
from test_dashboard import HOSTILE, Text, keys
from test_figures import luminance

import app
from flora.evaluate.rows import METHODS, Answer, Item, to_line, write_rows
from profiling import accuracy, report, workload
from profiling.accuracy import Estimate, Recorded, mean, own_scores, read_recorded
from profiling.accuracy_figures import ADAPTER_STYLES, marks, measured_dots, paper_dots, percent
from profiling.dashboard import accuracy as tab
from profiling.dashboard import accuracy_views as views
from profiling.dashboard import page
from profiling.dashboard.code_html import marked_transcript
from profiling.dashboard.results import REPRODUCE_TEMPLATE

TASKS = accuracy.TASKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(params=TASKS)
def recorded(request, folder) -> Recorded:
    return read_recorded(folder, request.param)


# ------------------------------------------------------------------------------------------------------------- the paper


def test_the_papers_tables_are_whole():
    assert [table.model for table in accuracy.PAPER_TABLES] == ["StarCoder 15B", "StarCoderBase 3B", "Whisper-large 1.5B"]
    for table in accuracy.PAPER_TABLES:
        assert tuple(table.values) == TAGS[table.task]
        assert all(set(row) == set(METHODS) for row in table.values.values())
    sums = [{method: sum(row[method] for row in table.values.values()) for method in METHODS} for table in accuracy.PAPER_TABLES]
    assert sums[0] == pytest.approx({"base": 148.06, "flora": 196.98, "ia3": 175.91, "lora": 195.36})
    assert sums[1] == pytest.approx({"base": 100.22, "flora": 128.33, "ia3": 108.02, "lora": 128.74})
    assert sums[2] == pytest.approx({"base": 358.76, "flora": 160.23, "ia3": 170.64, "lora": 158.78})
    large = accuracy.paper_tables("code")[0].values
    assert (large["rb"]["base"], large["rb"]["flora"], large["d"]["ia3"], large["lua"]["lora"]) == (1.39, 24.94, 15.26, 29.04)
    assert accuracy.paper_tables("speech")[0].values["mr"] == {"base": 84.84, "flora": 33.17, "ia3": 35.03, "lora": 31.94}


# --------------------------------------------------------------------------------------------------------------- reading


def test_what_was_written_is_read(recorded):
    assert recorded.complaints == ()
    assert set(row.language for row in recorded.scores) == set(TAGS[recorded.task]) == set(row.language for row in recorded.items)
    assert len(recorded.answers) == len(METHODS) * len(recorded.items)
    assert list(recorded.means) == means(recorded.task)


@pytest.mark.parametrize("task", TASKS)
def test_a_missing_folder_is_told_with_the_command(tmp_path, task):
    recorded = read_recorded(tmp_path / "nowhere", task)
    assert recorded == Recorded(task, complaints=recorded.complaints) and len(recorded.complaints) == 2
    words = Text(views.status(recorded)["cells"]["words"]).text
    assert f"accuracy_{task}.jsonl" in words and words.endswith(f"python -m flora.evaluate {task} --report makes them.")
    assert str(tmp_path) not in words


@pytest.mark.parametrize(
    "content, word",
    [
        ("", "empty"),
        ("\n\n", "empty"),
        ("not json\n", "line 1"),
        ('{"kind": "score"}\n', "line 1"),
        ('{"kind": "nonsense"}\n', "line 1"),
        ("[1, 2]\n", "line 1"),
        ("null\n", "line 1"),
        ("[" * 100_000, "line 1"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_broken_file_is_told_and_never_raised(tmp_path, content, word):
    path = tmp_path / "accuracy_code.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    recorded = read_recorded(tmp_path, "code")
    assert recorded.scores == () and word in recorded.complaints[0] and "accuracy_code.jsonl" in recorded.complaints[0]


def test_a_row_that_makes_no_sense_is_told(tmp_path):
    fact = json.loads(to_line(score("code", "lua", "flora", "lua", 0.7)))
    (tmp_path / "accuracy_code.jsonl").write_text(json.dumps(fact | {"value": math.nan}) + "\n")
    recorded = read_recorded(tmp_path, "code")
    assert recorded.scores == ()
    assert "accuracy_code.jsonl, line 1, of kind score, has a value that makes no sense" in recorded.complaints[0]


def test_one_broken_file_leaves_the_other(tmp_path, folder):
    (tmp_path / "answers_code.jsonl").write_bytes((folder / "answers_code.jsonl").read_bytes())
    (tmp_path / "accuracy_code.jsonl").mkdir()
    recorded = read_recorded(tmp_path, "code")
    assert recorded.answers and not recorded.scores and len(recorded.complaints) == 1
    assert views.answers(recorded, recorded.items[0])["classes"]["browser"] == "browser code"


def test_rows_of_the_other_task_are_left_out(tmp_path):
    write_rows(tmp_path / "accuracy_code.jsonl", scores("speech"))
    assert read_recorded(tmp_path, "code").scores == ()
    with pytest.raises(ValueError, match="code, speech"):
        read_recorded(tmp_path, "images")


# --------------------------------------------------------------------------------------------------------------- figures


def test_own_scores_are_of_the_right_adapter_only():
    own = own_scores(scores("code"), "pass@1")
    assert len(own) == 9 * 4
    assert all(row.adapter == (None if method == "base" else language) for (language, method), row in own.items())
    assert own_scores(scores("speech"), "WER, normalised")["cs", "flora"].metric == "WER, normalised"
    assert own_scores(scores("code"), "WER") == {}


def test_a_mean_is_over_graded_languages_and_its_interval_narrows_with_their_number():
    own = own_scores(scores("code"), "pass@1")
    tags = accuracy.common_languages(own)
    assert set(tags) == set(TAGS["code"]) - set(NOT_GRADED)
    alike = {(tag, "flora"): score("code", tag, "flora", tag, 0.5, low=0.4, high=0.7) for tag in "abcd"}
    estimate = mean(alike, "flora", list("abcd"))
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.5, 0.45, 0.6))
    without = alike | {("a", "flora"): score("code", "a", "flora", "a", 0.5, low=None, high=None)}
    assert mean(without, "flora", list("abcd")) == Estimate(0.5)
    with pytest.raises(ValueError, match="at least one"):
        mean(alike, "flora", [])


def test_the_interval_of_a_mean_is_that_of_a_resampled_one():
    """Against the truth by simulation: rates of several languages, items drawn again."""
    random = np.random.default_rng(0)
    rates, items = (0.3, 0.75, 0.85), 120
    own, drawn = {}, 0.0
    for tag, rate in zip("abc", rates, strict=True):
        resampled = random.binomial(items, rate, size=40_000) / items
        low, high = np.quantile(resampled, (0.025, 0.975))
        own[tag, "flora"] = score("code", tag, "flora", tag, rate, low=float(low), high=float(high))
        drawn = drawn + resampled / len(rates)
    estimate = mean(own, "flora", list("abc"))
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=0.004)


def test_a_difference_takes_both_sides_uncertainty():
    difference = Estimate(0.8, 0.77, 0.84) - Estimate(0.7, 0.66, 0.73)
    assert (difference.value, difference.low, difference.high) == pytest.approx(
        (0.1, 0.1 - math.hypot(3, 3) / 100, 0.1 + 4 / 100 * 2**0.5)
    )
    assert Estimate(0.8, 0.7, 0.9) - Estimate(0.5) == Estimate(0.8 - 0.5)


@pytest.mark.parametrize("task", TASKS)
def test_languages_stand_in_the_papers_order(task):
    shuffled = ["zz", *reversed(TAGS[task]), TAGS[task][0]]
    assert accuracy.languages(task, shuffled) == [*TAGS[task], "zz"]
    assert accuracy.language_name(task, "zz") == "zz" and accuracy.language_name("code", "rs") == "Rust"


def test_the_scores_frame_is_tidy_and_its_csv_runs_nothing():
    frame = accuracy.scores_frame(
        [score("code", "lua", "flora", "lua", 0.7, source="=1+1"), score("code", "swift", "base", None, None)]
    )
    assert len(frame) == 2 and "versions.torch" in frame.columns and frame.value.isna().tolist() == [False, True]
    rows = list(csv.DictReader(io.StringIO(report.frame_csv(frame))))
    assert rows[0]["source"] == "'=1+1" and rows[1]["value"] == "" and rows[1]["reason"] == "swift is not installed"
    assert list(accuracy.scores_frame([]).columns)[:2] == ["task", "language"]


# ---------------------------------------------------------------------------------------------------------------- charts


def test_every_method_has_a_mark_of_its_own_that_reads_on_both_pages():
    styles = ADAPTER_STYLES.values()
    assert tuple(ADAPTER_STYLES) == METHODS
    assert len({style.colour for style in styles}) == len({style.symbol for style in styles}) == 4
    assert len({mark for hollow in (False, True) for mark, _, _ in marks(hollow)}) == 8
    for style in styles:
        for background in ("#ffffff", "#14171a"):
            light, dark = sorted((luminance(style.colour), luminance(background)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3.0, (style.label, background)


@pytest.mark.parametrize("task", TASKS)
def test_measured_dots_are_filled_with_intervals_and_whole_json(task):
    rows = scores(task)
    chart = measured_dots(task, rows)
    assert json.loads(json.dumps(chart.figure, allow_nan=False)) == chart.figure
    assert [trace["name"] for trace in chart.figure["data"]] == ["base", "IA3", "LoRA", "fLoRA"]
    own, graded = own_scores(rows, accuracy.METRICS[task][0]), [tag for tag in TAGS[task] if tag not in NOT_GRADED]
    for method, trace in zip(METHODS, chart.figure["data"], strict=True):
        assert trace["x"] == pytest.approx([100 * own[tag, method].value for tag in graded], abs=0.01)
        assert not trace["marker"]["symbol"].endswith("-open")
        ends = np.add(trace["x"], trace["error_x"]["array"])
        assert ends == pytest.approx([100 * own[tag, method].high for tag in graded], abs=0.01)
    layout = chart.figure["layout"]
    assert layout["yaxis"]["range"][0] > layout["yaxis"]["range"][1], "the first language is on top"
    assert layout["xaxis"]["range"][0] < 0 and layout["xaxis"]["range"][1] > 100
    assert chart.description.endswith("is better.") and "\n" not in chart.description
    assert f"over {len(graded)} languages" in chart.description


def test_what_was_not_graded_is_said_and_has_no_dot_and_no_number():
    chart = measured_dots("code", scores("code"))
    texts = [note["text"] for note in chart.figure["layout"]["annotations"]]
    for tag, reason in NOT_GRADED.items():
        place = TAGS["code"].index(tag)
        assert f"not graded: {reason}" in texts
        assert not any(abs(y - place) < 0.5 for trace in chart.figure["data"] for y in trace["y"])
        lines = [line for line in chart.table if line[0] == tag]
        assert len(lines) == 4 and all(line[3] is None and line[-1] == reason for line in lines)
    assert "not graded: Swift, Julia" in chart.description


@pytest.mark.parametrize("task, models", [("code", 2), ("speech", 1)])
def test_printed_dots_are_hollow_on_axes_of_their_own_and_without_intervals(task, models):
    chart = paper_dots(task)
    assert len(chart.figure["data"]) == 4 * models and not any("error_x" in trace for trace in chart.figure["data"])
    assert all(trace["marker"]["symbol"].endswith("-open") for trace in chart.figure["data"])
    assert len({trace["xaxis"] for trace in chart.figure["data"]}) == models
    assert len(chart.table) - 1 == models * 4 * len(TAGS[task])
    assert "prints no intervals" in chart.description and "not the numbers" in chart.description
    everything = json.dumps(chart.figure) + json.dumps(measured_dots(task, scores(task)).figure)
    assert all(table.model in everything for table in accuracy.paper_tables(task))
    assert json.dumps(measured_dots(task, scores(task)).figure).count("StarCoder") == 0


def test_charts_of_nothing_and_of_strangers():
    empty = measured_dots("code", [])
    assert empty.figure["data"] == [] and "nothing recorded yet" in empty.description and len(empty.table) == 1
    strange = [
        score("code", "<b>zz", "flora", "<b>zz", 0.5, low=None, high=None, model="<img src=x>"),
        score("code", "yy", "base", None, None, reason="<script>"),
        score("code", "zz", "someone's", "zz", 0.5),
    ]
    text = json.dumps(measured_dots("code", strange).figure)
    assert "<img" not in text and "<script" not in text and "<b>zz" not in text and "&lt;b&gt;zz" in text


def test_an_axis_of_errors_holds_more_than_all_words_wrong():
    wild = [score("speech", "mn", "base", None, 1.6, low=1.4, high=1.9)]
    assert measured_dots("speech", wild).figure["layout"]["xaxis"]["range"][1] > 190


# ------------------------------------------------------------------------------------------------------------- the words


TEMPLATES = (
    views.STATUS_TEMPLATE,
    views.HEADLINE_TEMPLATE,
    views.MEASURED_TEMPLATE,
    views.PRINTED_TEMPLATE,
    views.RECIPE_TEMPLATE,
    views.MATRIX_TEMPLATE,
    views.ANSWERS_TEMPLATE,
    REPRODUCE_TEMPLATE,
)


def values(recorded: Recorded) -> list[dict]:
    everything = [views.status(recorded), views.headline(recorded), views.headings(recorded), views.matrix(recorded)]
    return everything + [views.answers(recorded, item) for item in (*recorded.items, None)]


def test_every_value_has_its_place_in_a_template(recorded, tmp_path):
    places = set().union(*map(keys, TEMPLATES))
    for value in values(recorded) + values(read_recorded(tmp_path, recorded.task)):
        used = set(value["cells"]) | set(value["classes"]) | set(value["attributes"])
        assert used <= places, used - places
    for template in TEMPLATES:
        assert not set("`\\") & set(template) and "${" not in template and "{{" not in template


def test_the_two_panels_are_told_apart(recorded):
    cells = views.headings(recorded)["cells"]
    assert cells["measured"] == f"measured here: embedded {recorded.task} model, 100 held-out items a language"
    assert cells["printed"].startswith("printed in the paper: " + ("StarCoder 15B" if recorded.task == "code" else "Whisper-large"))
    assert views.commands(recorded) == [f"python -m flora.evaluate {recorded.task} --report"]


def test_the_headline_has_means_with_intervals_and_says_what_they_are(recorded):
    cells = views.headline(recorded)["cells"]
    table = Text(cells["table"]).text
    for row in recorded.means:
        if row.versus is None:
            assert f"{percent(row.value)} [{100 * row.low:.1f}, {100 * row.high:.1f}]" in table
    for method in METHODS:
        assert all(percent(accuracy.paper_mean(paper, method) / 100) in table for paper in accuracy.paper_tables(recorded.task))
    assert "recorded, not live" in cells["facts"] and "float32" in cells["facts"] and "torch 2.13.0" in cells["facts"]
    assert "95\N{NARROW NO-BREAK SPACE}% intervals, the difference&#x27;s of the same items for both" in cells["facts"]
    assert ("swift is not installed" in cells["facts"]) == (recorded.task == "code")


def test_what_is_recorded_of_a_difference_is_what_is_said_of_it(recorded):
    """The languages' own intervals would call the same difference noise."""
    (lead,) = (
        row for row in recorded.means if (row.method, row.versus, row.metric) == ("flora", "lora", accuracy.METRICS[row.task][0])
    )
    clear = replace(lead, value=0.02, low=0.01, high=0.03)
    others = tuple(row for row in recorded.means if row is not lead)
    cells = views.headline(replace(recorded, means=(*others, clear)))["cells"]
    assert cells["difference"] == "+2.0 <small>points [+1.0, +3.0]</small>"
    assert cells["verdict"].endswith(f"fLoRA is {'better' if recorded.task == 'code' else 'worse'}")
    without = views.headline(replace(recorded, means=others))["cells"]
    assert "no difference beyond noise" in without["verdict"] and "as if its two were independent" in without["facts"]


def test_a_mean_over_other_languages_is_not_shown(recorded):
    metric = accuracy.METRICS[recorded.task][0]
    fewer = [replace(row, languages=row.languages[1:], value=0.123) for row in recorded.means]
    own = own_scores(recorded.scores, metric)
    found = accuracy.means(recorded.scores, fewer, metric)
    assert found.combined and list(found.tags) == accuracy.common_languages(own)
    for method in METHODS:
        assert found.estimates[method, None] == mean(own, method, found.tags)
    assert found.estimates["flora", "ia3"] == mean(own, "flora", found.tags) - mean(own, "ia3", found.tags)
    shuffled = [replace(row, languages=row.languages[::-1]) for row in recorded.means]
    known = accuracy.means(recorded.scores, shuffled, metric)
    assert not known.combined and set(known.estimates) == {(row.method, row.versus) for row in recorded.means}
    assert accuracy.means((), recorded.means, metric).estimates == {}


def test_the_sentence_of_the_chart_and_the_table_say_the_same(recorded):
    metric = accuracy.METRICS[recorded.task][0]
    rows = [replace(row, value=row.value + 0.1) if row.versus is None else row for row in recorded.means]
    sentence = measured_dots(recorded.task, recorded.scores, rows).description
    table = Text(views.headline(replace(recorded, means=tuple(rows)))["cells"]["table"]).text
    for row in rows:
        if row.versus is None and row.metric == metric:
            assert percent(row.value) in sentence and percent(row.value) in table


@pytest.mark.parametrize(
    "task, flora, lora, words",
    [
        ("code", 0.9, 0.5, "fLoRA is better"),
        ("code", 0.5, 0.9, "fLoRA is worse"),
        ("speech", 0.9, 0.5, "fLoRA is worse"),
        ("speech", 0.1, 0.5, "fLoRA is better"),
    ],
)
def test_a_verdict_knows_which_way_is_better(task, flora, lora, words):
    rows = [score(task, tag, method, tag, value) for tag in TAGS[task][:2] for method, value in (("flora", flora), ("lora", lora))]
    cells = views.headline(Recorded(task, tuple(rows)))["cells"]
    assert cells["verdict"].endswith(words) and "points [" in cells["difference"]
    assert cells["difference"].startswith(f"{'+' if flora > lora else chr(0x2212)}40.0 ")


def test_the_matrix_shows_the_right_adapter_and_what_the_wrong_ones_do(recorded):
    cells, task = views.matrix(recorded)["cells"], recorded.task
    graded = [tag for tag in TAGS[task] if tag not in NOT_GRADED]
    assert cells["matrix"].count('class="right"') == len(graded)
    assert cells["matrix"].count("<tr>") == 1 + len(TAGS[task]) and ">base</th>" in cells["matrix"]
    own = own_scores(recorded.scores, accuracy.METRICS[task][0])
    for tag in graded:
        assert f'data-value="{100 * own[tag, "flora"].value:.2f}">{100 * own[tag, "flora"].value:.0f}</td>' in cells["matrix"]
    assert f"beats every wrong one in {len(graded)} of {len(graded)} languages" in cells["sentence"]
    assert f"on {ITEMS} items of each language" in cells["sentence"]
    for tag, reason in NOT_GRADED.items():
        assert (f'colspan="10">not graded: {reason}</td>' in cells["matrix"]) == (tag in TAGS[task])


def test_the_item_shown_first_is_one_where_flora_makes_the_difference(recorded):
    for tag in TAGS[recorded.task]:
        first = views.telling_item(recorded, tag)
        items = [item.item for item in recorded.items if item.language == tag]
        passed = {(answer.item, answer.method): answer.passed for answer in recorded.answers if answer.language == tag}
        telling = [item for item in items if passed[item, "flora"] is True and passed[item, "base"] is False]
        assert first == (telling[0] if telling else items[0])
    assert views.telling_item(recorded, "no such language") is None


def test_a_right_adapter_that_does_not_win_is_not_counted():
    rows = [score("code", tag, "flora", other, 0.5 if tag == other else 0.4) for tag in ("lua", "rb") for other in ("lua", "rb")]
    rows[1] = replace(rows[1], value=0.5)  # rb's adapter does as well on lua
    assert "in 1 of 2 languages" in views.matrix(Recorded("code", tuple(rows)))["cells"]["sentence"]
    none = views.matrix(Recorded("code", tuple(row for row in rows if row.adapter == row.language)))
    assert "No adapter has been tried" in none["cells"]["matrix"] and none["classes"]["save"] == "absent"


def test_the_colour_of_the_matrix_is_darker_where_it_is_better():
    def shade(task: str, value: float) -> float:
        rows = (score(task, TAGS[task][0], "flora", TAGS[task][1], value),)
        return float(views.matrix(Recorded(task, rows))["cells"]["matrix"].split(" / ")[1].split("%")[0])

    assert shade("code", 1.0) == 70 > shade("code", 0.5) > shade("code", 0.0) == 0
    assert shade("speech", 0.0) == 70 > shade("speech", 0.5) > shade("speech", 1.0) == shade("speech", 1.7) == 0


def test_answers_stand_beside_their_problem(recorded):
    item = next(item for item in recorded.items if item.language in ("lua", "cs"))
    cells = views.answers(recorded, item)["cells"]
    found = {a.method: a for a in recorded.answers if (a.language, a.item) == (item.language, item.item)}
    assert Text(cells["reference"]).text == item.reference
    if recorded.task == "code":
        assert Text(cells["problem"]).text == item.prompt
        assert all(Text(cells[f"answer_{method}"]).text == answer.text for method, answer in found.items())
        assert "✗ failed" in cells["verdict_base"] and "✓ passed" in cells["verdict_flora"]
    else:
        assert "WER 100.0" in cells["verdict_base"] and "✗ failed" in cells["verdict_ia3"] and "✓ passed" in cells["verdict_lora"]
        assert "<del>" in cells["answer_ia3"] and "<ins>nula</ins>" in cells["answer_ia3"]
        assert "<del>" not in cells["answer_flora"]


def test_the_words_of_every_outcome():
    def words(passed, outcome):
        return Text(views._verdict_words(Answer("code", "d", "1", "base", None, "", passed, outcome))).text

    assert [words(None, "not graded"), words(True, "passed"), words(False, "failed")] == ["– not graded", "✓ passed", "✗ failed"]
    assert [words(False, cause) for cause in ("error", "timeout", "memory")] == [
        "✗ failed: error",
        "✗ failed: timeout",
        "✗ failed: out of memory",
    ]


def test_a_wrong_adapters_answer_is_nobodys():
    item = Item("code", "lua", "1", "p", "r")
    other = Answer("code", "lua", "1", "flora", "rb", "of rb", True, "passed")
    cells = views.answers(Recorded("code", (), (item,), (other,)), item)["cells"]
    assert cells["verdict_flora"] == "" and "no answer recorded" in cells["answer_flora"]
    silent = replace(other, adapter="lua", text="\n")
    assert "it wrote nothing" in views.answers(Recorded("code", (), (item,), (silent,)), item)["cells"]["answer_flora"]


@pytest.mark.parametrize("task", TASKS)
def test_nothing_in_a_row_gets_through_as_html(task):
    item = Item(task, HOSTILE, HOSTILE, HOSTILE if task == "code" else None, HOSTILE, HOSTILE)
    rows = [score(task, tag, "flora", adapter, 0.5, model=HOSTILE, source=HOSTILE, device=HOSTILE, command=HOSTILE)
            for tag in (HOSTILE, "x") for adapter in (HOSTILE, "x")]  # fmt: skip
    rows.append(score(task, "y", "base", None, None, reason=HOSTILE))
    given = (Answer(task, HOSTILE, HOSTILE, "flora", HOSTILE, HOSTILE, False, HOSTILE, 1.0),)
    hostile = Recorded(task, tuple(rows), (item,), given, (HOSTILE,))
    for value in values(hostile):
        for cell in value["cells"].values():
            assert "script" not in Text(cell).tags, cell


@pytest.mark.parametrize(
    "reference, text, expected",
    [
        ("dva tři pět", "dva tři pět", "dva tři pět"),
        ("dva tři pět", "dva čtyři", "dva <del>tři</del> <ins>čtyři</ins> <del>pět</del>"),
        ("dva", "& dva", "<ins>&amp;</ins> dva"),
        ("dva tři", "", "<del>dva tři</del>"),
        ("", "dva", "<ins>dva</ins>"),
        ("", "", ""),
        ("<b>", "<i>", "<del>&lt;b&gt;</del> <ins>&lt;i&gt;</ins>"),
    ],
)
def test_word_by_word(reference, text, expected):
    assert marked_transcript(reference, text, "cs") == f'<p class="transcript" dir="auto" lang="cs">{expected}</p>'


# --------------------------------------------------------------------------------------------------------------- the tab


def test_titles_of_items_are_short_and_tell_them_apart():
    rows = code_answers()
    recorded = Recorded("code", (), tuple(row for row in rows if isinstance(row, Item)), ())
    titles = dict(views.item_titles(recorded, "lua"))
    assert len(titles) == 3 and all(len(title) <= 64 and "--" not in title for title in titles)
    assert views.item_languages(recorded)[0] == ("d · D", "d") and views.item_titles(recorded, None) == []


@pytest.mark.parametrize("tag, name", [("lua", None), ("nonsense", "nonsense"), (None, None), ("d", "nonsense")])
def test_a_choice_that_is_gone_becomes_one_that_is_there(folder, tag, name):
    recorded = read_recorded(folder, "code")
    languages, items, clip, _ = tab._browse(recorded, tag, name)
    expected = tag if tag in TAGS["code"] else "d"
    assert languages.value == expected and clip.value is None and not clip.visible
    assert items.value == views.telling_item(recorded, expected)


def test_only_clips_that_ship_are_played():
    shipped = next(row for row in speech_answers() if isinstance(row, Item))
    assert Path(tab._clip_file(shipped)) == (workload.ASSETS / "clips" / Path(shipped.clip).name).resolve()
    for clip in (
        None,
        "/etc/passwd",
        "assets/clips/../models/code/config.json",
        "assets/clips/none.flac",
        "assets/clips",
        "app.py",
    ):
        assert tab._clip_file(replace(shipped, clip=clip)) is None


def test_an_item_without_its_clip_says_so(folder):
    recorded = read_recorded(folder, "speech")
    assert "cannot be played" in views.answers(recorded, recorded.items[0])["cells"]["legend"]
    assert "cannot be played" not in views.answers(recorded, recorded.items[0], playable=True)["cells"]["legend"]


def test_downloads_hold_the_rows(recorded, tmp_path):
    buttons = tab._downloads(recorded, tmp_path)
    assert all(button.interactive for button in buttons)
    lines = (tmp_path / f"accuracy_{recorded.task}.jsonl").read_text().splitlines()
    assert len(lines) == len(recorded.scores) + len(recorded.means)
    assert len((tmp_path / f"accuracy_{recorded.task}.csv").read_text().splitlines()) == len(recorded.scores) + 1
    assert read_recorded(tmp_path, recorded.task) == recorded
    assert not any(button.interactive for button in tab._downloads(Recorded("code"), tmp_path))


def test_the_page_reads_no_results_before_the_tab_is_opened(monkeypatch):
    def refuse(*_):
        raise AssertionError("read too early")

    monkeypatch.setattr(tab, "read_recorded", refuse)
    demo = page.build({}, "nowhere")
    labels = [block.label for block in demo.blocks.values() if type(block).__name__ == "Tab"]
    assert labels == ["Compare", "Op lab", "Accuracy"]
    demo.close(verbose=False)


def test_the_app_takes_another_folder_of_results(monkeypatch):
    given = []
    monkeypatch.setattr(app, "load_engines", lambda options: {})
    monkeypatch.setattr(page, "build", lambda engines, folder, *_: given.append(folder))
    for arguments in (["--results", "elsewhere"], []):
        app.build_demo(app.parser().parse_args(arguments))
    assert given == ["elsewhere", None]
