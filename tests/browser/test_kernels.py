"""The Kernels tab in a real browser: one profile of the embedded model, all that is drawn of it, Perfetto, and traces of others."""

from __future__ import annotations

import csv
import gzip
import json

import fake_trace
import pytest

from profiling.trace_file import write_trace

HOSTILE = '<img src=x onerror="alert(1)">'
# A window that answers as ui.perfetto.dev does, and keeps what it is sent.
PERFETTO = """
window.sent = [];
window.open = (url) => {
  const opened = document.body.appendChild(document.createElement('iframe')).contentWindow;
  opened.postMessage = (data, origin) => {
    const { buffer, title } = data.perfetto || {};
    window.sent.push([buffer ? { bytes: buffer.byteLength, first: new Uint8Array(buffer)[0], title } : data, origin]);
    if (data === 'PING') window.dispatchEvent(new MessageEvent('message', { data: 'PONG', source: opened }));
  };
  window.opened = url;
  return opened;
};
"""


def lines(page) -> int:
    return page.locator("#kernels-table tbody tr").count()


def test_a_profile_is_drawn_sorted_filtered_opened_in_perfetto_and_downloaded(open_page, screenshot):
    page = open_page()
    page.get_by_role("tab", name="Kernels").click()
    page.locator("#kernels-start").click()
    page.locator("#kernels-status .words").filter(has_text="done").wait_for(timeout=120_000)
    page.locator("#kernels-timeline .main-svg").first.wait_for()
    finding = page.locator("#kernels-headline .kernels-finding").inner_text()
    assert "fLoRA runs 20 GEMMs of 32 rows" in finding and "bmm-LoRA runs 21 GEMMs of 8 rows and 40 bmm" in finding
    facts = page.locator("#kernels-headline .facts").inner_text()
    assert "live, on this machine" in facts and "8 decode steps" in facts and "float32" in facts
    assert "32×256 · 256×768" in page.locator("#kernels-diff [data-cell=instead]").inner_text()
    page.wait_for_function("document.querySelectorAll('#kernels-tree .slice').length > 20")
    page.wait_for_function("document.querySelectorAll('#kernels-timeline .point').length > 300")

    everything = lines(page)
    assert everything > 100
    page.locator("#kernels-table [data-search]").fill("mm 32×256")
    assert 0 < lines(page) < everything
    page.locator("#kernels-table [data-search]").fill("")
    page.locator("#kernels-table [data-menu]").select_option("bmm")
    assert {cell.inner_text() for cell in page.locator("#kernels-table tbody td:nth-child(3)").all()} == {"bmm"}
    page.locator("#kernels-table [data-sort='3']").click()  # calls per step, the most first
    calls = [float(cell.inner_text()) for cell in page.locator("#kernels-table tbody td:nth-child(4)").all()]
    assert calls == sorted(calls, reverse=True) and len(set(calls)) > 1
    with page.expect_download() as download:
        page.locator("#kernels-table [data-save]").click()
    saved = list(csv.reader(download.value.path().open(encoding="utf-8")))
    assert saved[0][0] == "kernel" and len(saved) == 1 + len(calls)

    page.evaluate(PERFETTO)
    page.locator("#kernels-exports [data-open]").click()
    page.wait_for_function("window.sent.some(([data]) => data.bytes)")
    assert page.evaluate("window.opened") == "https://ui.perfetto.dev"
    (data, origin) = page.evaluate("window.sent.at(-1)")
    assert data["bytes"] > 100_000 and data["first"] == 0x1F and origin == "https://ui.perfetto.dev"
    with page.expect_download() as download:
        page.locator("#kernels-exports [data-run]").click()
    assert download.value.suggested_filename.endswith(".pt.trace.json.gz")
    document = json.loads(gzip.decompress(download.value.path().read_bytes()))
    assert document["floraLive"]["methods"] == ["flora", "bmm-lora"] and "host_name" not in document

    page.locator("#kernels-phase label", has_text="prefill").click()
    page.locator("#kernels-headline .kernels-finding", has_text="prefill").wait_for()
    page.locator("#kernels-method label", has_text="bmm-LoRA").click()
    page.locator("#kernels-tree [data-caption]", has_text="bmm-LoRA's prefill step").wait_for()
    screenshot(page, "kernels")
    page.set_viewport_size({"width": 400, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.fixture
def traces(tmp_path):
    trace = fake_trace.two_methods()
    trace.events += [event | {"name": f"lib::{HOSTILE}"} for event in trace.events if event["name"] == "aten::mul"]
    trace.events[-1]["ts"] += 10
    write_trace(tmp_path / "hostile.json.gz", trace.document)
    (tmp_path / "broken.json").write_text("{")
    return tmp_path


def test_a_trace_of_a_visitors_own_is_opened_and_a_broken_one_is_named(open_page, traces):
    page = open_page(theme="dark")
    page.get_by_role("tab", name="Kernels").click()
    upload, words = page.locator("#kernels-file input[type=file]"), page.locator("#kernels-open-status .words")
    page.locator("#kernels-open-start").click()
    words.filter(has_text="Choose a trace first").wait_for()
    upload.set_input_files(str(traces / "broken.json"))
    page.locator("#kernels-file", has_text="broken.json").wait_for()
    page.locator("#kernels-open-start").click()
    words.filter(has_text="is not JSON").wait_for()
    page.locator("#kernels-file button[aria-label='Clear']").click()
    upload.set_input_files(str(traces / "hostile.json.gz"))
    page.locator("#kernels-file", has_text="hostile.json").wait_for()
    page.locator("#kernels-open-start").click()
    page.locator("#kernels-table tbody th", has_text=HOSTILE).first.wait_for()
    assert "opened from a file of yours, not measured here" in page.locator("#kernels-headline .facts").inner_text()
    assert page.locator("#flora-page img[src=x]").count() == 0
