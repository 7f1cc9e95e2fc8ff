"""One HTML file that needs nothing from anywhere else, light and dark; and the same tables on a terminal. All text is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

from profiling.figures import Chart

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #57606a; --line: #d5d9de; --page: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8ea; --soft: #9aa4ae; --line: #353b42; --page: #14171a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1240px; margin:
2rem auto; padding: 0 1rem; } h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 0.25rem 0.9rem 0.25rem 0; border-bottom: 1px solid var(--line);
} th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td { white-space: nowrap; }
td.written { white-space: pre-wrap; font-family: ui-monospace, monospace; min-width: 20rem; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); padding: 0.6rem; }
.soft { color: var(--soft); }
.js-plotly-plot svg text { fill: var(--text) !important; }
"""


class HtmlDocument:
    """A page that is written from top to bottom, then rendered with plotly.js inside; nothing is fetched."""

    def __init__(self, title: str, heading: str) -> None:
        self._title = title
        self._parts = [f"<h1>{html.escape(heading)}</h1>"]
        self._calls: list[str] = []

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str, soft: bool = False) -> None:
        """soft: in the quieter colour, for what stands beside the finding."""
        self._parts.append(f"<p{_SOFT if soft else ''}>{html.escape(text)}</p>")

    def table(self, heads: Sequence[str], lines: Sequence[Sequence[str]], written: str | None = None) -> None:
        """written: the column that holds generated text, whose line breaks and spaces are kept."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
        body = ""
        for line in lines:
            cells = (
                f'<td class="written">{html.escape(cell)}</td>' if name == written else f"<td>{html.escape(cell)}</td>"
                for name, cell in zip(heads, line, strict=True)
            )
            body += f"<tr>{''.join(cells)}</tr>"
        self._parts.append(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')

    def chart(self, title: str, chart: Chart) -> None:
        """A heading, the sentence that says what the chart shows, and the chart."""
        name, sentence = f"chart-{len(self._calls)}", html.escape(chart.description)
        self.heading(title)
        self.paragraph(chart.description, soft=True)
        self._parts.append(f'<div id="{name}" role="img" aria-label="{sentence}"></div>')
        figure = _script_json({**chart.figure, "config": {"responsive": True, "displaylogo": False, "showSendToCloud": False}})
        self._calls.append(f'Plotly.newPlot("{name}", {figure});')

    def code(self, text: str) -> None:
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def render(self) -> str:
        """The whole file."""
        from plotly.offline import get_plotlyjs  # only here: a machine that measures may have none

        return "\n".join(
            [
                '<!doctype html><html lang="en"><head><meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{html.escape(self._title)}</title><style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body>",
                *self._parts,
                f"<script>{''.join(self._calls)}</script></body></html>",
            ]
        )


_SOFT = ' class="soft"'


def _script_json(value: object) -> str:
    """JSON that may stand inside a <script> element."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def text_table(heads: Sequence[str], lines: Sequence[Sequence[str]], num_names: int = 2) -> str:
    """For a terminal: aligned columns, the first `num_names` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    rows = []
    for line in (heads, *lines):
        cells = (
            cell.ljust(width) if i < num_names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        rows.append("  ".join(cells).rstrip())
    return "\n".join(rows)
