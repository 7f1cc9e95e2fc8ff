"""A table that the visitor sorts and filters in the browser."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gradio as gr

_JS_ON_LOAD = "".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("csv.js", "sortable_table.js"))


@dataclass(frozen=True)
class Column:
    """digits: after the point; None for words. swatches: word → colour. choose: whether a menu leaves one of its words."""

    name: str
    title: str = ""
    digits: int | None = None
    swatches: Mapping[str, str] | None = None
    choose: bool = False


def table_value(columns: Sequence[Column] = (), lines: Sequence[Sequence[str | float]] = ()) -> dict[str, Any]:
    """The value of a SortableTable; whatever the cells hold is shown as text."""
    return {"columns": [asdict(column) for column in columns], "lines": [list(line) for line in lines]}


class SortableTable(gr.HTML):
    """A table whose value is `table_value(columns, lines)`, in the lines' order until a head is clicked.

    Its `data` button downloads the lines that are shown as CSV, in the order shown. label: its accessible name.
    """

    def __init__(self, label: str, *, file_name: str = "table.csv", **keywords: Any):
        name, file = html.escape(label), html.escape(file_name)
        template = (
            '<div class="table-tools"><input type="search" data-search placeholder="filter, such as mm 8×256" '
            f'aria-label="filter {name}"><select data-menu aria-label="filter {name} by category"></select>'
            '<span class="table-count" data-count role="status"></span>'
            '<button type="button" class="quiet-button" data-save title="download what the table shows as CSV">data</button></div>'
            f'<div class="table-scroll" data-table data-file="{file}" tabindex="0" role="region" aria-label="{name}"></div>'
        )
        super().__init__(
            value=table_value(), html_template=template, js_on_load=_JS_ON_LOAD, apply_default_css=False, **keywords
        )

    def api_info(self) -> dict[str, Any]:
        return {"type": "object", "properties": {"columns": {}, "lines": {}}}
