"""The line that says how something stands: a thin bar, words, a remark at their right, and what is wrong with the controls."""

from __future__ import annotations

import html
from typing import Any

from profiling.dashboard.live_cells import cells_value

STATUS_TEMPLATE = (
    '<div class="status idle" data-cell="status"><div class="track"><div class="bar" data-cell="bar"></div></div>'
    '<div class="load-words"><div class="words" data-cell="words" role="status" aria-live="polite"></div>'
    '<div class="since" data-cell="since"></div></div><div class="notice absent" data-cell="notice" role="alert"></div></div>'
)


def plain_status(state: str, words: str) -> dict[str, Any]:
    """Words alone, where nothing is under way. state: idle | waiting | running | done | stopped | failed."""
    return cells_value(
        cells={"words": html.escape(words), "since": "", "notice": ""},
        classes={"status": f"status {state}", "notice": "notice absent"},
        attributes={"bar": {"style": "width: 0%"}},
    )


def status(state: str, words: str, share: float, since: str = "") -> dict[str, Any]:
    """Words, the share of the bar that is full (0 to 1), and the remark; a notice stays as it is."""
    return cells_value(
        cells={"words": html.escape(words), "since": html.escape(since)},
        classes={"status": f"status {state}"},
        attributes={"bar": {"style": f"width: {100 * min(1.0, share):.1f}%"}},
    )


def notice(words: str) -> dict[str, Any]:
    """What is wrong with the controls, beside whatever the status says; empty: nothing."""
    return cells_value({"notice": html.escape(words)}, {"notice": "notice" if words else "notice absent"})


def clock(seconds: float) -> str:
    """Seconds as "1:05"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
