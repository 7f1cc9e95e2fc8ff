"""The Op lab in a real browser: choose a layer, measure, read who wins, download it; what makes no sense is a sentence."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
from fake_costs import fake_costs

from profiling.dashboard import op_lab as op_lab_tab
from profiling.dashboard import page as app_page
from profiling.op_lab import Setting, measure
from profiling.report import lines_of


@pytest.fixture(scope="module")
def app_url(chromium_path, tmp_path_factory) -> Iterator[str]:
    """The page without engines, on a machine whose costs are known, with one recorded point: `open_page` opens this one here."""
    results = tmp_path_factory.mktemp("results")
    setting = Setting.of_model("whisper-large-v3", rows=2, rank=1, adapters=2)
    recorded = measure(setting, op_lab_tab.torch.device("cpu"), fake_costs(), ("flora", "bmm-lora"), budget_s=0.1)
    (results / "oplab.jsonl").write_text(lines_of(recorded.to_rows()) + "{}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))

        def known(device, dtype):
            yield 0.5
            return fake_costs(dtype=str(dtype).removeprefix("torch."))

        patch.setattr(op_lab_tab, "costs_in_steps", known)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        demo = app_page.build({}, results)
        options = app_page.launch_options(demo)
        demo.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, **options)
        yield f"http://127.0.0.1:{port}/"
        demo.close(verbose=False)


def test_a_layer_is_measured_told_and_downloaded(open_page, screenshot):
    page = open_page()
    page.get_by_role("tab", name="Op lab").click()
    recorded = page.locator("#oplab-recorded")
    recorded.locator("tbody tr", has_text="whisper-large-v3 k_proj, 1280 → 1280").wait_for()
    assert "1 points" not in recorded.inner_text() and "1 of 4 lines of oplab.jsonl are no rows" in recorded.inner_text()
    page.locator("#oplab-model input").click()
    page.locator("li[role=option]:visible", has_text="free widths").click()
    page.locator("#oplab-d-in input").fill("160")
    page.locator("#oplab-d-out input").fill("96")
    page.locator("#oplab-start").click()
    page.locator("#oplab-table tbody tr").nth(6).wait_for()
    assert "160 → 96 · 8 rows of 1 token, rank 4, 8 adapters · float32 · live" in page.locator("#oplab-table h2").inner_text()
    assert page.locator("#oplab-verdict").inner_text().startswith("Fastest here: ")
    assert page.locator("#oplab-found .wrong").count() == 0
    for chart in ("roofline", "predictions"):
        page.wait_for_function(f"document.querySelectorAll('#oplab-{chart} .point').length >= 7")
    assert "--d-in 160 --d-out 96" in page.locator("#oplab-reproduce").inner_text()
    page.locator("#oplab-download-jsonl:not([disabled])").wait_for()
    with page.expect_download() as download:
        page.locator("#oplab-download-jsonl").click()
    rows = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    assert len(rows) == 7 and all(row["agrees"] and row["d_in"] == 160 for row in rows)
    before = page.locator("#oplab-table").inner_text()
    page.locator("#oplab-adapters input").fill("9")
    page.locator("#oplab-start").click()
    page.locator("#oplab-status", has_text="8 rows cannot have 9 adapters").wait_for()
    assert page.locator("#oplab-table").inner_text() == before, "what was measured stays"
    assert recorded.locator("tbody tr").count() == 1, "nothing live is among what was recorded"
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(300)
        assert not page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
        screenshot(page, f"op-lab-{width}")
