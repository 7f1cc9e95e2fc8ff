"""What an open page costs the engine, as the server sees a page: charts are really asked for, and it says so where they are not."""

import gradio as gr
import pytest

from flora.errors import FloraError
from profiling.dashboard import page, page_overhead


def test_an_empty_queue_is_looked_into_as_seldom_as_is_set():
    """It is gradio's own setting, under a name that it does not promise."""
    with gr.Blocks() as plain:
        assert 0 < plain.queue()._queue.sleep_when_free < page.QUEUE_LOOKS_EVERY_S
    assert page.build({})._queue.sleep_when_free == page.QUEUE_LOOKS_EVERY_S


def test_the_charts_are_asked_for_and_move(monkeypatch):
    monkeypatch.setattr(page_overhead, "SETTLE_S", 0.0)
    monkeypatch.setattr(page_overhead, "UPDATE_S", 0.2)
    ratio = page_overhead.measure(2, 1.0)
    assert ratio.n == 2 and 0.05 < ratio.median < 20
    # A page whose answers hold no charts would cost nothing.
    monkeypatch.setattr(page_overhead, "SMALLEST", 10**9)
    with pytest.raises(FloraError, match="did not move: [1-9][0-9]* answers where"):
        page_overhead.measure(1, 0.5)
