"""The row of buttons that offers a measurement's report: its rows, a table, Markdown, a page that opens offline."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr

from profiling import report
from profiling.report import Report

_FORMATS = {"JSONL": ".jsonl", "CSV": ".csv", "Markdown": ".md", "report.html": ".html"}


class Downloads:
    """A button per format; grey until there is a report. name: of the files, and the beginning of the elements' ids."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.buttons = [
            gr.DownloadButton(
                label, size="sm", scale=0, min_width=70, interactive=False, elem_id=f"{name}-download-{suffix.removeprefix('.')}"
            )
            for label, suffix in _FORMATS.items()
        ]

    def none(self) -> list[gr.DownloadButton]:
        """Values for `buttons`: nothing to download."""
        return [gr.DownloadButton(value=None, interactive=False) for _ in _FORMATS]

    @contextmanager
    def offer(self, found: Report | None) -> Iterator[list[gr.DownloadButton]]:
        """Values for `buttons` that offer the report, or nothing. Gradio copies the files: yield the values in this context."""
        if found is None:
            yield self.none()
            return
        with tempfile.TemporaryDirectory(prefix="flora-live-") as folder:
            paths = [Path(folder) / f"{self._name}{suffix}" for suffix in _FORMATS.values()]
            for path in paths:
                report.write(found, path)
            yield [gr.DownloadButton(value=str(path), interactive=True) for path in paths]
