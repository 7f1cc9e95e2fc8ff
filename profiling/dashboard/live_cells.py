"""An HTML component whose named cells change in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

_JS_ON_LOAD = "".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("csv.js", "live_cells.js"))


def cells_value(
    cells: Mapping[str, str] | None = None,
    classes: Mapping[str, str] | None = None,
    attributes: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """The value of a LiveCells: key -> HTML (escaped by the caller), key -> class names, key -> attributes (style, hidden…)."""
    return {
        "cells": dict(cells or {}),
        "classes": dict(classes or {}),
        "attributes": {key: dict(value) for key, value in (attributes or {}).items()},
    }


class LiveCells(gr.HTML):
    """Static HTML with nodes marked `data-cell="key"`; each new value patches only the nodes that changed.

    `template` must hold no `${…}`, no backtick, no backslash and no `{{…}}`: gradio reads those as its own template language.
    A key that a value leaves out keeps what it shows. A `data-copy="key"` button copies that cell's text, and a
    `data-save="key"` button with a `data-file` saves the table in that cell as CSV. A `data-trigger="select"` button is that event
    of this component with the button's other data, once more after a `data-confirm="sure?"`.
    """

    def __init__(self, template: str = "", value: Mapping[str, Any] | None = None, **keywords: Any):
        super().__init__(
            value=dict(value) if value is not None else cells_value(),
            html_template=template,
            js_on_load=_JS_ON_LOAD,
            apply_default_css=False,
            **keywords,
        )

    def api_info(self) -> dict[str, Any]:
        return {"type": "object", "properties": {"cells": {}, "classes": {}, "attributes": {}}}
