"""A Plotly chart that is updated on one node: it does not flicker and keeps its zoom. Also serves plotly.js itself."""

from __future__ import annotations

import gzip
import html
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
import plotly
from gradio.route_utils import API_PREFIX
from plotly.io.json import to_json_plotly
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_JS_ON_LOAD = "".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("csv.js", "live_plot.js"))
# Below gradio's own prefix: with server-side rendering only that reaches Python, the rest is taken for a page.
_PLOTLY_ROUTE = f"{API_PREFIX}/instrument/plotly.min.js"
_ONE_YEAR_S = 365 * 24 * 3600


@cache
def _plotly_js() -> tuple[bytes, bytes]:
    """plotly.js out of the installed plotly package, plain and gzipped."""
    plain = (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_bytes()
    return plain, gzip.compress(plain, compresslevel=6, mtime=0)


def _serve_plotly_js(request: Request) -> Response:
    plain, gzipped = _plotly_js()
    headers = {"Cache-Control": f"public, max-age={_ONE_YEAR_S}, immutable", "Vary": "Accept-Encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(gzipped, media_type="text/javascript", headers=headers | {"Content-Encoding": "gzip"})
    return Response(plain, media_type="text/javascript", headers=headers)


def plotly_route() -> Route:
    """The route that serves plotly.js; the address in the page carries its version, so it may be cached for a year."""
    return Route(_PLOTLY_ROUTE, _serve_plotly_js, methods=["GET", "HEAD"])


def plot_value(figure: Any, summary: str, table: Sequence[Sequence[Any]] | None = None) -> dict[str, Any]:
    """The value of a LivePlot: `figure` (a plotly figure or its dict) and the sentence that says what it shows.

    table: lines of cells, heads first, for the `data` button; None: the points as they are drawn.
    """
    if not isinstance(figure, dict):
        figure = figure.to_plotly_json()
    value = {"data": list(figure["data"]), "layout": dict(figure["layout"]), "summary": summary}
    return value if table is None else value | {"table": [list(line) for line in table]}


class LivePlot(gr.HTML):
    """A chart whose value is `plot_value(figure, summary)`.

    The figure's `layout.uirevision` decides what survives: while it stays the same so does the visitor's zoom. Colours of ink,
    grid and background come from the page's theme, light or dark, unless the layout sets them. The sentence under the chart is
    also its accessible name. The `data` button downloads what the chart shows as CSV.

    file_name: the name of that CSV file. height_px: the fixed height of the chart.
    """

    def __init__(self, value: dict[str, Any] | None = None, *, file_name: str = "chart.csv", height_px: int = 220, **keywords: Any):
        # gradio makes the component anew without its value, at an update that has none, such as gr.skip().
        value = value or plot_value({"data": [], "layout": {}}, "Nothing is drawn yet.")
        source = f"{_PLOTLY_ROUTE.removeprefix('/')}?v={plotly.__version__}"
        template = (
            '<figure class="live-plot">'
            f'<div class="live-plot-host" data-plot data-plotly="{source}" data-file="{html.escape(file_name)}" role="img"'
            f' style="height: {height_px}px" aria-label="{html.escape(value["summary"])}"></div>'
            "<figcaption><span data-caption></span>"
            '<button type="button" class="quiet-button" data-download title="download what the chart shows as CSV">data</button>'
            "</figcaption></figure>"
        )
        super().__init__(value=value, html_template=template, js_on_load=_JS_ON_LOAD, apply_default_css=False, **keywords)

    def postprocess(self, value: dict[str, Any] | None) -> dict[str, str] | None:
        """As one text: gradio looks at every value that it sends, and the browser at every value that it gets, point by point."""
        return None if value is None else {"json": to_json_plotly(value)}

    def api_info(self) -> dict[str, Any]:
        return {"type": "object", "properties": {"json": {"type": "string"}}}
