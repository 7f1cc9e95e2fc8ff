"""The Live load tab in a real browser on the real app: start, move the sliders, watch, stop, leave."""

from __future__ import annotations

import csv
import re

import pytest

from browser.conftest import RUN_MS
from browser.test_page import choose
from profiling.dashboard.live_load import UPDATE_S

HOSTILE = '-- <img src=x onerror="alert(1)">'
UPDATE_MS = 1000 * UPDATE_S
CHARTS = ("requests", "queue", "tokens", "ttft", "tpot", "batch")


def open_tab(page) -> None:
    page.get_by_role("tab", name="Live load").click()
    page.locator("#load-start").wait_for()


def start(page) -> None:
    """Press Start and wait for the first answers."""
    page.locator("#load-start").click()
    page.wait_for_function("() => /^[1-9]/.test(document.querySelector('#load-readouts [data-cell=requests]')?.textContent)")


def stop(page) -> None:
    page.locator("#load-stop").click()
    page.locator("#load-status .status.stopped").wait_for()


def put(page, name: str, value: str) -> None:
    """A number into a control's box."""
    box = page.locator(f"#load-{name} input[type=number]")
    box.fill(value)
    box.press("Tab")


def readout(page, name: str) -> str:
    return page.locator(f'#load-readouts [data-cell="{name}"]').inner_text()


def words(page) -> str:
    return page.locator("#load-status .words").inner_text()


def num_points(page, chart: str) -> int:
    return page.evaluate(f"document.querySelector('#load-{chart} [data-plot]').data[0].x.length")


def asked_of_the_server(page) -> list[str]:
    """The addresses of what the page asks for from now on, in a list that grows."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "heartbeat" not in request.url else None)
    return asked


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 400)])
def test_before_the_start_and_while_it_runs(open_page, screenshot, tmp_path, theme, width):
    page = open_page(theme, width)
    open_tab(page)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, [role=img]')].filter(e => e.offsetParent)
        .filter(e => !(e.getAttribute('aria-label') || e.getAttribute('title') || e.textContent.trim() || e.labels?.length))
        .map(e => e.outerHTML.slice(0, 160))"""
    )
    assert not nameless
    assert page.locator("#load-explanation").is_visible() and not page.locator("#load-charts").is_visible()
    assert page.locator("#load-stop").is_disabled()
    assert "float32" in page.locator("#load-readouts").inner_text() and "live" in page.locator("#load-readouts").inner_text()
    assert page.locator("#load-reproduce code").inner_text().startswith("python -m profiling load --methods flora --rate 4 ")
    asked = asked_of_the_server(page)
    page.wait_for_timeout(2 * UPDATE_MS)
    assert not asked, "an idle tab asks for nothing"
    screenshot(page, f"load-idle-{theme}-{width}")

    put(page, "new-tokens", "8")
    start(page)
    page.locator("#load-batch .main-svg").first.wait_for()
    page.evaluate(f"window.plots = {list(CHARTS)}.map(n => document.querySelector(`#load-${{n}} [data-plot]`))")
    before = num_points(page, "tokens")
    page.wait_for_function(f"document.querySelector('#load-tokens [data-plot]').data[0].x.length > {before + 2}")
    assert page.evaluate(f"{list(CHARTS)}.every((n, i) => document.querySelector(`#load-${{n}} [data-plot]`) === window.plots[i])")
    for name in CHARTS:
        host = page.locator(f"#load-{name} [data-plot]")
        assert host.get_attribute("role") == "img" and host.get_attribute("aria-label").endswith(".")
        assert page.evaluate(f"document.querySelector('#load-{name} [data-plot]').layout.xaxis.range.join()") == "-60,0"
    assert readout(page, "ttft").endswith("s") and readout(page, "goodput").endswith("%")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert not page.locator("#load-explanation").is_visible() and page.locator("#load-start").is_disabled()
    screenshot(page, f"load-running-{theme}-{width}")

    stop(page)
    page.wait_for_timeout(UPDATE_MS)
    asked.clear()
    page.wait_for_timeout(2 * UPDATE_MS)
    assert not asked, "after the end the page asks for nothing more"
    with page.expect_download() as download:
        page.locator("#load-ttft [data-download]").click()
    download.value.save_as(tmp_path / "run.csv")
    with (tmp_path / "run.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) >= before and lines[0].keys() >= {"time_s", "method", "tokens_per_s", "waiting", "ttft_p99_ms"}
    for suffix, beginning in (("html", "<!doctype html>"), ("md", "# "), ("jsonl", "{")):
        with page.expect_download() as download:
            page.locator(f"#load-download-{suffix}").click()
        download.value.save_as(tmp_path / f"report.{suffix}")
        report = (tmp_path / f"report.{suffix}").read_text(encoding="utf-8")
        assert report.lower().startswith(beginning) and "python -m profiling load" in report
    screenshot(page, f"load-stopped-{theme}-{width}")


def test_every_control_takes_effect_at_once_and_mistakes_are_told(open_page):
    page = open_page()
    open_tab(page)
    put(page, "new-tokens", "4")
    start(page)
    put(page, "rate", "9")
    page.wait_for_function("document.querySelector('#load-reproduce code').textContent.includes('--rate 9 ')")
    page.locator("#load-method input").click()
    page.locator("li[role=option]:visible").filter(has_text=re.compile(r"^\W*bmm-LoRA")).first.click()
    page.wait_for_function("document.querySelector('#load-tokens [data-plot]').data.some(trace => trace.name === 'bmm-LoRA')")
    page.wait_for_function(
        "document.querySelector('#load-requests [data-plot]').layout.annotations.some(one => one.text.includes('bmm-LoRA'))"
    )
    page.wait_for_function("parseFloat(document.querySelector('#load-readouts [data-cell=arriving]').textContent) > 5.5")
    put(page, "ttft-limit", "")
    page.locator("#load-status .notice:not(.absent)", has_text="limit of TTFT").wait_for()
    assert "running" in page.locator("#load-status .status").get_attribute("class"), "the load goes on as it was"
    put(page, "ttft-limit", "900")
    page.wait_for_function("document.querySelector('#load-readouts [data-cell=goodput_small]').textContent.includes('900 ms')")
    page.locator("#load-status .notice.absent").wait_for(state="attached")
    stop(page)
    start(page)
    stop(page)


def test_a_comparison_and_another_visitor_run_beside_it(open_page, screenshot):
    first, second = open_page(), open_page()
    for page in (first, second):
        open_tab(page)
        put(page, "new-tokens", "4")
        put(page, "rate", "1")  # the comparison and the load take turns: an engine that falls behind makes every turn a long one
    start(first)
    start(second)
    first.locator("#load-status .since", has_text="1 other visitor").wait_for()
    first.wait_for_function(  # both of them's
        """() => {
            const yours = parseFloat(document.querySelector('#load-readouts [data-cell=arriving]').textContent);
            const all = document.querySelector('#load-readouts [data-cell=arriving_small]').textContent.match(/[\\d.]+/)[0];
            return parseFloat(all) > 1.3 * yours && yours > 0;
        }"""
    )
    second.get_by_role("tab", name="Compare").click()
    choose(second, "#examples", "code only: all prompts")
    second.locator("#speech-row-0").wait_for(state="hidden")
    second.locator("#max-new-tokens input").fill("3")
    second.locator("#run").click()
    second.locator("#status .status.done").wait_for(timeout=RUN_MS)
    assert second.locator('#figures [data-cell="left_agreement"]').inner_text().startswith("✓")
    second.get_by_role("tab", name="Live load").click()
    points = num_points(second, "tokens")
    second.wait_for_function(f"document.querySelector('#load-tokens [data-plot]').data[0].x.length > {points}")
    screenshot(second, "load-after-compare")
    second.context.close()  # who leaves sends no more
    first.wait_for_function("!document.querySelector('#load-status .since').textContent.includes('other visitor')")
    stop(first)


def test_an_over_saturated_engine_is_said_in_words(shared_page, screenshot):
    page = shared_page
    open_tab(page)
    put(page, "new-tokens", "128")
    put(page, "prompt-tokens", "192")
    put(page, "rate", "50")
    page.locator("#load-start").click()
    page.locator("#load-status .status.saturated").wait_for(timeout=RUN_MS)
    assert words(page).startswith("Over-saturated: ") and "Lower the rate" in words(page)
    screenshot(page, "load-saturated")
    stop(page)
    page.wait_for_function("/^0 run/.test(document.querySelector('#load-readouts [data-cell=engine]').textContent.trim())")


def own_words(page) -> str:
    return page.locator("#own-answer .words").inner_text()


def test_visitors_requests_of_their_own_run_together(open_page, screenshot):
    loader, visitor = open_page(), open_page("dark", 400)
    for page in (loader, visitor):
        open_tab(page)
        put(page, "new-tokens", "48" if page is loader else "24")
    put(loader, "rate", "12")
    start(loader)
    visitor.locator("#own-adapter input").click()
    visitor.locator("li[role=option]:visible").filter(has_text=re.compile(r"^\W*lua")).first.click()
    visitor.wait_for_function("document.querySelector('#own-prompt textarea').value.includes('local function')")
    for page in (loader, visitor):
        page.locator("#own-send").click()
    for page in (loader, visitor):
        page.locator("#own-answer .own.done").wait_for()
        prompt = page.locator("#own-prompt textarea").input_value()
        answer = page.locator("#own-answer pre.code").inner_text()
        assert answer.startswith(prompt) and len(answer) > len(prompt)
        assert page.locator("#own-answer pre.code span[class]").count() > 2, "code is highlighted"
        assert re.match(r"\d+ tokens, the first after [\d.]+ m?s, then [\d.]+ m?s a token\. ", own_words(page))
        assert int(re.search(r"(\d+) at most", own_words(page))[1]) > 1
        assert page.locator("#own-send").is_enabled() and page.locator("#own-stop").is_disabled()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    screenshot(visitor, "load-own-dark-400")
    for name in ("new-tokens", "prompt-tokens"):
        put(loader, name, "128")
    put(loader, "rate", "50")  # more than any machine answers: a request among so many takes long enough for Stop
    put(visitor, "new-tokens", "128")
    loader.wait_for_function("/run ([1-9]\\d+) wait/.test(document.querySelector('#load-readouts [data-cell=engine]').textContent)")
    for _ in range(5):  # where the browser takes longer than the engine, the answer is there before Stop is
        visitor.locator("#own-send").click()
        visitor.locator("#own-answer").locator(".own.waiting, .own.running").wait_for()
        assert visitor.locator("#own-send").is_disabled(), "one at a time"
        visitor.locator("#own-stop").click()
        visitor.locator("#own-answer").locator(".own.stopped, .own.done").wait_for()
        if own_words(visitor).startswith("Stopped "):
            break
    assert own_words(visitor).startswith("Stopped ") and visitor.locator("#own-send").is_enabled()
    stop(loader)


def test_a_request_of_ones_own_is_refused_in_place_and_never_run_by_the_page(shared_page, screenshot):
    page = shared_page
    open_tab(page)
    box = page.locator("#own-prompt textarea")
    for text, word in (("", "The prompt is empty"), ("x" * 20_001, "20,001 characters"), ("x " * 2000, "tokens")):
        box.fill(text)
        page.locator("#own-send").click()
        page.locator("#own-answer .own.failed .words", has_text=word).wait_for()
        assert own_words(page).endswith(".") and not page.locator("#own-answer .output").is_visible()
    screenshot(page, "load-own-refused")
    box.fill(HOSTILE)
    page.locator("#own-send").click()
    page.locator("#own-answer .own.done").wait_for()
    assert HOSTILE in page.locator("#own-answer pre.code").inner_text() and page.locator("#own-answer img").count() == 0
