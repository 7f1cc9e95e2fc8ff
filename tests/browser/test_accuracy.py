"""The Accuracy tab in a real browser, on made-up results and without a model: it shows what was recorded and needs nothing else."""

from __future__ import annotations

import csv
import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from accuracy_rows import NOT_GRADED, TAGS, code_answers, means, score, scores, write_results

from browser.conftest import ROOT
from flora.evaluate.rows import Answer, Item, write_rows
from profiling.dashboard import page as app_page

HOSTILE = '<img src=x onerror="alert(1)">'


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The results folder of the page: read anew whenever the tab is opened, so a test may put other files there."""
    folder = write_results(tmp_path_factory.mktemp("results"))
    item = Item("code", "lua", HOSTILE, HOSTILE, HOSTILE)
    answers = [Answer("code", "lua", HOSTILE, method, None, HOSTILE, False, "failed") for method in ("base",)]
    write_rows(folder / "answers_code.jsonl", [*code_answers(), item, *answers])
    return folder


@pytest.fixture(scope="module")
def app_url(chromium_path, results, tmp_path_factory) -> Iterator[str]:
    """The page without engines, served by this process: `open_page` opens this one here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        demo = app_page.build({}, results)
        options = app_page.launch_options(demo)
        demo.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, **options)
        yield f"http://127.0.0.1:{port}/"
        demo.close(verbose=False)


def open_tab(page, task: str = "code") -> None:
    page.get_by_role("tab", name="Accuracy").click()
    page.locator("#accuracy-measured .main-svg").first.wait_for()
    page.locator("#accuracy-headline table.means").wait_for()
    page.locator("#accuracy-task label", has_text=task.capitalize()).click()
    page.wait_for_function("task => document.querySelector('[data-cell=measured]').textContent.includes(task)", arg=task)
    page.wait_for_function("document.querySelectorAll('#accuracy-printed .point').length > 20")


def choose(page, menu: str, label: str) -> None:
    page.locator(f"{menu} input").click()
    page.locator("li[role=option]:visible").filter(has_text=label).first.click()


def verdicts(page) -> list[str]:
    return page.locator("#accuracy-answers h3 .verdict").all_inner_texts()


# ------------------------------------------------------------------------------------------------------------------- looks


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_tab(open_page, screenshot, theme):
    page = open_page(theme, 1280)
    for task in ("code", "speech"):
        open_tab(page, task)
        assert page.locator("#accuracy-matrix td.right").count() == len(set(TAGS[task]) - set(NOT_GRADED))
        assert page.locator("#accuracy-reproduce code").inner_text() == f"python -m flora.evaluate {task} --report"
        for width in (1280, 400):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_function(
                "document.querySelector('#accuracy-measured .main-svg').clientWidth < window.innerWidth / 1.9"
                if width == 1280
                else "document.querySelector('#accuracy-measured .main-svg').clientWidth < window.innerWidth"
            )
            assert not page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
            measured, printed = (page.locator(f"#accuracy-{side}").bounding_box() for side in ("measured", "printed"))
            if width == 1280:
                assert printed["x"] >= measured["x"] + measured["width"] and printed["y"] == measured["y"], "rows align"
            else:
                assert printed["y"] >= measured["y"] + measured["height"]
            screenshot(page, f"accuracy-{task}-{theme}-{width}")
        page.set_viewport_size({"width": 1280, "height": 900})


def test_the_two_panels_are_told_apart_and_the_other_tab_stays_as_it_was(open_page):
    page = open_page()
    assert page.locator("#accuracy-measured").count() == 0, "nothing is built until the tab is opened"
    page.evaluate("window.firstPlot = document.querySelector('#chart [data-plot]')")
    open_tab(page)
    assert page.locator("[data-cell=measured]").inner_text().startswith("measured here: embedded code model, 100 held-out items")
    assert page.locator("[data-cell=printed]").inner_text().startswith("printed in the paper: StarCoder 15B")
    symbols = "id => [...new Set(document.querySelector(id + ' [data-plot]').data.map(trace => trace.marker.symbol))]"
    assert not any(symbol.endswith("-open") for symbol in page.evaluate(symbols, "#accuracy-measured"))
    assert all(symbol.endswith("-open") for symbol in page.evaluate(symbols, "#accuracy-printed"))
    assert "not graded: swift is not installed" in page.locator("#accuracy-measured [data-plot]").text_content()
    for side in ("measured", "printed"):
        assert len(page.locator(f"#accuracy-{side} [data-plot]").get_attribute("aria-label")) > 80
    page.get_by_role("tab", name="Compare").click()
    page.locator("#run").wait_for()
    assert page.evaluate("document.querySelector('#chart [data-plot]') === window.firstPlot")
    assert page.locator("#accuracy-measured").is_hidden()


NAMELESS = """() => [...document.querySelectorAll('button, input, textarea, select, [role=img], [role=region]')]
    .filter(e => e.offsetParent && e.type !== 'file')
    .filter(e => !(e.getAttribute('aria-label') || e.getAttribute('title') || e.textContent.trim()))
    .filter(e => !(e.labels && e.labels.length))
    .map(e => e.outerHTML.slice(0, 160))"""


# ----------------------------------------------------------------------------------------------------------------- answers


def test_reading_a_problem_and_its_answers(shared_page):
    page = shared_page
    open_tab(page)
    choose(page, "#accuracy-language", "rb · Ruby")
    page.wait_for_function("document.querySelector('#accuracy-answers [data-cell=problem]').textContent.includes('def ')")
    places = """() => ['#accuracy-answers', '#accuracy-matrix', '#accuracy-answers section:nth-of-type(6)']
        .map(name => JSON.stringify(document.querySelector(name).getBoundingClientRect())).join()"""
    before, shown = page.evaluate(places), page.locator("#accuracy-answers [data-cell=problem]").inner_text()
    page.locator("#accuracy-item input").click()
    page.locator("li[role=option]:visible").nth(1).click()
    page.wait_for_function("text => document.querySelector('#accuracy-answers [data-cell=problem]').innerText !== text", arg=shown)
    assert page.evaluate(places) == before, "nothing jumps from one item to the next"
    assert verdicts(page) == ["✗ failed", "✗ failed", "✓ passed", "✓ passed"]
    assert page.locator("#accuracy-answers pre.code span[class]").count() > 8, "code is highlighted"
    assert page.locator("#accuracy-clip").is_hidden()
    assert not page.evaluate(NAMELESS)
    choose(page, "#accuracy-language", "swift · Swift")
    page.locator("#accuracy-answers .verdict", has_text="not graded").first.wait_for()
    assert verdicts(page) == ["– not graded"] * 4
    choose(page, "#accuracy-language", "lua · Lua")
    choose(page, "#accuracy-item", "<img")
    page.locator("#accuracy-answers [data-cell=answer_base]", has_text=HOSTILE).wait_for()
    assert page.locator("#accuracy-answers img").count() == 0


def test_listening_to_a_clip_and_its_transcripts(shared_page):
    page = shared_page
    open_tab(page, "speech")
    choose(page, "#accuracy-language", "cs · Czech")
    page.locator("#accuracy-answers [data-cell=reference]", has_text="dva devět tři").wait_for()
    assert verdicts(page) == ["✗ failed", "✗ failed", "✓ passed", "✓ passed"]
    assert page.locator("#accuracy-answers [data-cell=answer_ia3] del").all_inner_texts() == ["tři"]
    assert page.locator("#accuracy-answers [data-cell=answer_ia3] ins").all_inner_texts() == ["nula"]
    assert "WER 33.3" in page.locator("#accuracy-answers [data-cell=verdict_ia3]").inner_text()
    page.locator("#accuracy-clip .waveform-container").wait_for()
    assert not page.evaluate(NAMELESS)
    page.locator("#accuracy-clip .play-pause-button").click()
    playing = "[...document.querySelectorAll('#accuracy-clip audio')].some(audio => audio.currentTime > 0)"
    button = "document.querySelector('#accuracy-clip .play-pause-button').getAttribute('aria-label')"
    page.wait_for_function(f"{playing} || {button} === 'Pause'")


# --------------------------------------------------------------------------------------------------------------- downloads


def test_every_chart_gives_its_data_and_the_rows_come_as_files(shared_page, tmp_path):
    page = shared_page
    open_tab(page)

    titles = " ".join(page.evaluate("[...document.querySelectorAll('.modebar-btn')].map(e => e.dataset.title)"))
    assert "PNG" in titles and not re.search("share|cloud|edit", titles, re.IGNORECASE), "no button sends the data elsewhere"

    def saved(button: str) -> str:
        page.locator(f"{button}:enabled").wait_for()
        with page.expect_download() as download:
            page.locator(button).click()
        download.value.save_as(tmp_path / "file")
        return (tmp_path / "file").read_text(encoding="utf-8")

    measured = list(csv.DictReader(saved("#accuracy-measured [data-download]").splitlines()))
    assert len(measured) == 9 * 4 and {row["language"] for row in measured if row["value"] == ""} == set(NOT_GRADED)
    printed = list(csv.DictReader(saved("#accuracy-printed [data-download]").splitlines()))
    assert len(printed) == 9 * 4 * 2 and printed[0]["model"] == "StarCoder 15B"
    matrix = list(csv.reader(saved("#accuracy-matrix [data-save]").splitlines()))
    assert len(matrix) == 10 and {len(line) for line in matrix} == {11} and matrix[0][-1] == "base"
    assert float(matrix[1][1]) > 80 and matrix[6][:2] == ["Swift", "not graded: swift is not installed"]
    rows = [json.loads(line) for line in saved("#accuracy-scores-JSONL").splitlines()]
    kinds = [row["kind"] for row in rows]
    assert kinds.count("score") == len(scores("code")) == len(saved("#accuracy-scores-CSV").splitlines()) - 1
    assert kinds.count("mean") == len(means("code")) == len(rows) - kinds.count("score")
    assert {json.loads(line)["kind"] for line in saved("#accuracy-answers-JSONL").splitlines()} == {"item", "answer"}


def test_the_results_folder_itself_is_not_served(app_url, results):
    for path in (results / "accuracy_code.jsonl", ROOT / "assets" / "results" / "targets.jsonl"):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(f"{app_url}gradio_api/file={path}", timeout=10)
        assert refusal.value.code in (403, 404)


# ----------------------------------------------------------------------------------------------------- nothing to be shown


def test_missing_and_broken_results_are_a_calm_sentence(open_page, screenshot, results, tmp_path):
    names = [path.name for path in results.iterdir()]
    for name in names:
        (results / name).rename(tmp_path / name)
    try:
        page = open_page()
        open_tab(page)
        note = page.locator("#accuracy-status p.note")
        note.wait_for()
        assert "there is no accuracy_code.jsonl" in note.inner_text() and "evaluate code --report makes them" in note.inner_text()
        assert page.locator("#accuracy-scores-JSONL").is_disabled()
        assert "nothing recorded yet" in page.locator("#accuracy-measured [data-caption]").inner_text()
        assert page.locator("#accuracy-answers .empty").is_visible()
        screenshot(page, "accuracy-nothing-recorded")
        (results / "accuracy_code.jsonl").write_text('{"kind": "score", broken\n')
        page.get_by_role("tab", name="Compare").click()
        page.get_by_role("tab", name="Accuracy").click()
        note.filter(has_text="accuracy_code.jsonl, line 1 ").wait_for()
        write_rows(results / "accuracy_code.jsonl", [score("code", "lua", "flora", "lua", 0.5)])
        page.get_by_role("tab", name="Compare").click()
        page.get_by_role("tab", name="Accuracy").click()
        note.filter(has_text="there is no answers_code.jsonl").wait_for()
        page.wait_for_function("document.querySelector('#accuracy-measured [data-plot]').data[0]?.x[0] === 50")
        assert page.locator(".toast-body").count() == 0, "it is no error"
    finally:
        for name in names:
            (tmp_path / name).replace(results / name)
