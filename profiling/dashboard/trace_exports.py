"""A visitor's trace as a file, as a run of TensorBoard's, and in Perfetto's own page."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.route_utils import API_PREFIX
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

_JS_ON_LOAD = (Path(__file__).parent / "trace_exports.js").read_text(encoding="utf-8")
_ROUTE = f"{API_PREFIX}/instrument/trace"


@dataclass(frozen=True)
class ServedTrace:
    """A trace that is served to whoever knows its address. file: what it is called when it is saved."""

    path: Path
    url: str
    file: str

    def value(self, title: str, run: str) -> dict[str, Any]:
        """The value of a TraceExports. run: what TensorBoard's plugin expects it to be called."""
        return {"url": self.url, "file": self.file, "run": run, "title": title}


class ServedTraces:
    """The traces that are served, by addresses that nobody guesses."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._traces: dict[str, ServedTrace] = {}

    def add(self, path: Path, file: str) -> ServedTrace:
        """Serve a file from now on."""
        token = secrets.token_urlsafe(16)
        trace = ServedTrace(path, f"{_ROUTE.removeprefix('/')}/{token}", file)
        with self._lock:
            self._traces[token] = trace
        return trace

    def remove(self, trace: ServedTrace) -> None:
        """Serve it no longer; the file is its owner's to remove."""
        with self._lock:
            self._traces.pop(trace.url.rpartition("/")[2], None)

    def route(self) -> Route:
        """Where they are served, below gradio's own prefix."""
        return Route(f"{_ROUTE}/{{token}}", self._serve, methods=["GET", "HEAD"])

    def _serve(self, request: Request) -> Response:
        trace = self._traces.get(request.path_params["token"])
        if trace is None or not trace.path.is_file():
            return PlainTextResponse("this trace is no longer on the server", 404)
        headers = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}
        headers["Content-Disposition"] = "attachment"  # without a name: that is the link's to give, which has two
        return FileResponse(trace.path, media_type="application/octet-stream", headers=headers)


class TraceExports(gr.HTML):
    """Links to a trace and the button that opens it in Perfetto; grey until its value is a `ServedTrace.value(…)`."""

    def __init__(self, **keywords: Any):
        template = (
            '<div class="trace-exports"><a class="quiet-button" data-file aria-disabled="true">trace.json.gz</a>'
            '<button type="button" class="quiet-button" data-open disabled title="opens ui.perfetto.dev in a new window; '
            'the trace goes from this page to that one and to no server">open in Perfetto</button>'
            '<a class="quiet-button" data-run aria-disabled="true" title="the trace under a name that TensorBoard\'s plugin '
            'looks for">TensorBoard run</a><span class="hint">save the run into a folder of its own in <code>logs/</code>, then '
            '<code>make tensorboard</code></span><span class="words" data-words role="status"></span></div>'
        )
        super().__init__(value=None, html_template=template, js_on_load=_JS_ON_LOAD, apply_default_css=False, **keywords)

    def api_info(self) -> dict[str, Any]:
        return {"type": "object", "properties": {}}
