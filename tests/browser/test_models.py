"""The Models tab in a real browser on the real app: an adapter comes, is used in another tab and by another visitor, and goes."""

from __future__ import annotations

import zipfile

import pytest
from gradio_client import Client

from browser.conftest import ROOT
from browser.test_page import choose, clear_batch, entries, outputs, press_run, scrolls_sideways, wait_until_ended

ADAPTER = ROOT / "assets" / "adapters" / "code" / "lua" / "flora"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    file = tmp_path_factory.mktemp("upload") / "mine.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for path in ADAPTER.iterdir():
            archive.write(path, f"mine/{path.name}")
    return file


def open_tab(page) -> None:
    """On a narrow screen the last tabs are in a menu of their own."""
    if page.viewport_size["width"] > 600:
        page.get_by_role("tab", name="Models").click()
    else:
        page.get_by_label("More tabs").click()
        page.locator(".overflow-dropdown").get_by_text("Models", exact=True).click()
    page.locator("#adapters table").wait_for()


def add(page, tag: str, file) -> str:
    """Upload a file under a tag; what the page says to it."""
    if (clear := page.locator('#adapter-files button[aria-label="Clear"]')).count():
        clear.click()
    page.locator('#adapter-files input[type="file"]').set_input_files(str(file))
    page.locator("#adapter-files .file-preview").wait_for()
    page.locator("#adapter-tag input").fill(tag)
    words = page.locator("#adapter-status .words")
    before = words.text_content()  # what was said to the last file, which stands there until this one is begun
    page.locator("#adapter-add").click()
    page.wait_for_function(
        """before => document.querySelector('#adapter-status .words').textContent !== before
        && document.querySelector('#adapter-status .status').matches('.done, .failed')""",
        arg=before,
    )
    return words.inner_text()


def tags(page) -> list[str]:
    return page.locator("#adapters tbody th").all_inner_texts()


def test_an_adapter_comes_is_used_and_goes(open_page, app_url, packed, screenshot, tmp_path):
    page, other = open_page("dark", 400), open_page()
    open_tab(page)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, [role=img]')].filter(e => e.offsetParent && e.type !== 'file')
        .filter(e => !(e.getAttribute('aria-label') || e.getAttribute('title') || e.textContent.trim() || e.labels?.length))
        .map(e => e.outerHTML.slice(0, 160))"""
    )
    assert not nameless
    assert "GPTBigCode" in page.locator("#model-code").inner_text() and "Whisper" in page.locator("#model-speech").inner_text()
    assert page.locator("#rights").inner_text().strip() == "", "whoever sits at the machine may do everything"
    screenshot(page, "models-dark-400")

    tag = "mine-1"
    broken = tmp_path / "broken.zip"
    broken.write_bytes(packed.read_bytes()[:-500])
    assert "zip" in add(page, tag, broken)
    assert "letters, digits" in add(page, "<b>mine</b>", packed)
    assert tag not in tags(page) and not scrolls_sideways(page)
    screenshot(page, "models-error-dark-400")
    words = add(page, tag, packed)
    assert words.startswith(f"Added {tag}, fLoRA, rank 4, ") and tags(page)[0] == tag
    assert page.locator("#adapter-tag input").input_value() == ""
    assert not scrolls_sideways(page)
    page.set_viewport_size({"width": 1280, "height": 900})
    assert not scrolls_sideways(page)
    screenshot(page, "models-added-dark-1280")

    # Another visitor's page was open all the time: its menus know the adapter once they are opened.
    clear_batch(other)
    for row in (0, 1):
        other.locator("#add-code").click()
        other.locator(f"#code-row-{row} textarea").fill("local function total(xs)\n")
        offered = entries(other, f"#code-row-{row} .adapter-menu")
        offered.filter(has_text=tag).wait_for()
        offered.filter(has_text=tag if row == 0 else "lua · Lua").click()
    choose(other, "#right-method", "base")
    other.locator("#max-new-tokens input").fill("24")
    press_run(other)
    assert wait_until_ended(other) == "done"
    mine, lua = outputs(other, "left")
    assert mine == lua, "it is the very adapter that ships as lua"

    page.locator("#adapter-filter input").fill(tag)
    page.locator("#adapters .table-count", has_text="1 of").wait_for()
    remove = page.locator("#adapters tbody button")
    remove.click()
    assert remove.inner_text() == "for everybody?"
    remove.click()
    page.locator("#adapters .nothing").wait_for()
    assert tag not in Client(app_url, verbose=False).predict(api_name="/adapters")["code"]
    entries(other, "#code-row-0 .adapter-menu").filter(has_text=f"{tag} · not here").wait_for()


def test_another_model_for_everybody(open_page, screenshot):
    page, other = open_page(), open_page()
    open_tab(page)
    page.locator("#model-name input").fill("no/such-model-anywhere")
    page.locator("#model-name input").press("Enter")
    page.locator("#model-load").click()
    page.locator("#model-status .status.failed").wait_for()
    assert "no/such-model-anywhere could not be loaded" in page.locator("#model-status .words").inner_text()
    try:
        for dtype, name in (("bfloat16", "embedded speech"), ("auto", "embedded speech")):
            choose(page, "#model-name", name)
            choose(page, "#model-dtype", dtype)
            page.locator("#model-load").click()
            page.locator("#model-status .status.running").wait_for()
            page.locator("#model-status .status.done").wait_for()
            shown = "bfloat16" if dtype == "bfloat16" else "float32"
            page.wait_for_function(f"document.querySelector('#model-speech [data-cell=dtype]').textContent === '{shown}'")
            if dtype == "bfloat16":
                other.get_by_role("tab", name="Live load").click()
                other.locator("#load-readouts", has_text="bfloat16").wait_for()
                assert "bfloat16" in other.locator("#head").inner_text()
                screenshot(page, "models-loaded")
    finally:
        other.reload()  # begins with the ready batch of what there is now
    other.locator(".request-row.speech:visible").nth(3).wait_for()
    assert other.locator("#speech-row-0 .adapter-menu input").input_value().startswith("ar")


def test_what_is_off_is_not_offered_and_says_how_it_is_switched_on(open_page, screenshot):
    """Through a proxy the same page is somebody else's."""
    page = open_page()
    page.context.set_extra_http_headers({"X-Forwarded-For": "203.0.113.7"})
    page.reload()
    open_tab(page)
    page.locator("#rights", has_text="--allow upload hub folders models manage").wait_for()
    assert not page.locator("#adapter-way").is_visible() and not page.locator("#model-load").is_visible()
    assert page.locator("#adapter-add").is_visible() and page.locator("#adapter-files").is_visible()
    assert page.locator("#adapters tbody button").count() == 0, "nothing that ships is this visitor's to remove"
    screenshot(page, "models-guest")
