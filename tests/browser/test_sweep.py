"""The Sweep tab in a real browser on the real app: the recorded one first, then points as they come, stopped and gone on with."""

from __future__ import annotations

import json


def chip(page, group: str, label: str):
    return page.locator(f"#sweep-{group} label", has_text=label).first


def test_a_sweep_comes_point_by_point_and_goes_on_where_it_was_stopped(open_page, screenshot, tmp_path):
    page = open_page()
    page.get_by_role("tab", name="Sweep").click()
    headline = page.locator("#sweep-headline .sweep-headline")
    page.locator("#sweep-headline .sweep-facts", has_text="not measured here").wait_for()
    assert "fLoRA loses to" in headline.inner_text()
    assert page.get_by_role("button", name="Run", exact=True).count() == 0, "nothing of another tab"
    chip(page, "measures", "throughput").click()
    for rank in ("4", "8", "16"):
        chip(page, "ranks", rank).click()
    page.locator("#sweep-batch input[type=number]").fill("2")
    page.locator("#sweep-new-tokens input[type=number]").fill("8")
    page.locator("#sweep-new-tokens input[type=number]").press("Tab")
    page.locator("#sweep-start").click()
    page.locator("#sweep-status .status.done").wait_for()
    assert "live, measured here" in page.locator("#sweep-headline .sweep-facts").inner_text()
    assert page.locator("#sweep-details tbody tr").count() == 6
    chip(page, "ranks", "64").click()
    page.locator("#sweep-start").click()
    page.wait_for_function("document.querySelectorAll('#sweep-details tbody tr').length === 9")
    page.locator("#sweep-status .status.done").wait_for()
    screenshot(page, "sweep-done")
    page.wait_for_function("!document.querySelector('#sweep-download-jsonl button, button#sweep-download-jsonl')?.disabled")
    with page.expect_download() as download:
        page.locator("#sweep-download-jsonl").click()
    download.value.save_as(tmp_path / "sweep.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert sorted({row["rank"] for row in rows}) == [1, 2, 64] and len({json.dumps(row["setting"]) for row in rows}) == 1
    page.locator("#sweep-start").click()
    page.locator("#sweep-status .words", has_text="measured already").wait_for()
    page.locator("#sweep-new-tokens input[type=number]").fill("128")
    page.locator("#sweep-new-tokens input[type=number]").press("Tab")
    page.locator("#sweep-start").click()
    page.wait_for_function("[1, 2, 3, 4, 5, 6].includes(document.querySelectorAll('#sweep-details tbody tr').length)")
    page.locator("#sweep-stop").click()
    page.locator("#sweep-status .status.stopped").wait_for()
    assert 1 <= page.locator("#sweep-details tbody tr").count() < 9, "what was measured is kept"
    assert page.locator("#sweep-start").is_enabled() and page.locator("#sweep-stop").is_disabled()
