"""Every report format, and that nothing a user sends gets through unescaped."""

import csv
import dataclasses
import io
import json
import re

import pytest
from plotly.offline import get_plotlyjs

from flora.engine import Request
from flora.errors import RequestError
from profiling import compare_report, report
from profiling.compare import compare
from profiling.compare_report import report_of
from profiling.events import Finished

NASTY = "</script><script>alert(1)</script> | `x` *b* \n=1+1 <img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def result(engines):
    requests = [Request(prompt=NASTY, adapter="lua", max_new_tokens=4), Request(prompt="a", adapter=NASTY, max_new_tokens=4)]
    *_, last = compare(engines, requests, ("flora", "bmm-lora", "base"), warmup_steps=1)
    assert isinstance(last, Finished)
    rows = tuple(row | {"text": NASTY} for row in last.result.rows)
    return dataclasses.replace(last.result, rows=rows)


def test_the_html_report_is_whole_and_harmless(result):
    page = report.html_page(report_of(result))
    assert "Plotly.newPlot" in page and result.environment["torch"] in page and "plotly.js v" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page), "nothing is fetched"
    own = page.replace(get_plotlyjs(), "")
    assert "alert(1)</script>" not in own and "<img" not in own and own.count("<script>") == 2
    assert "&lt;/script&gt;" in own


def test_the_markdown_report_keeps_its_tables_whole(result):
    page = report.markdown(report_of(result))
    for table in re.findall(r"(?:^\|.*\n)+", page, re.M):
        rows = table.splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, rows
    prose, command = page.split("## Reproduce")
    assert "<script>" not in prose and "<img" not in prose
    assert all(line.startswith("    ") for line in command.strip("\n").splitlines()), "a command is a block of code"


def test_the_csv_report_opens_in_a_spreadsheet_without_running_anything(result):
    risky = dataclasses.replace(result, command="=HYPERLINK(1)")
    rows = list(csv.DictReader(io.StringIO(report.csv(report_of(risky)))))
    assert len(rows) == 6 and {row["method"] for row in rows} == {"flora", "bmm-lora", "base"}
    assert all(row["command"] == "'=HYPERLINK(1)" for row in rows)
    assert float(rows[0]["tokens_per_s"]) > 0


def test_the_terminal_text_is_aligned_and_complete(result):
    text = report.text(report_of(result))
    table = text.split("\n\n")[0].splitlines()
    assert table[0].split()[:2] == ["kind", "method"] and "step / base model" in table[0]
    assert len({line.index("fLoRA") for line in table[1:] if " fLoRA " in line}) == 1
    assert "n = 3 paired decode steps, 1 warm-up steps" in text and "python -m profiling compare" in text
    assert "4 / 4 tokens" in text


@pytest.mark.parametrize(
    ("low", "median", "high", "words"),
    [
        (1.05, 1.1, 1.2, "fLoRA is faster"),
        (0.8, 0.85, 0.9, "bmm-LoRA is faster"),
        (0.9, 1.02, 1.1, "No difference shown"),
    ],
)
def test_the_headline_claims_only_what_the_interval_allows(result, low, median, high, words):
    ratio = dataclasses.replace(result.ratio, low=low, median=median, high=high)
    assert compare_report.headline(dataclasses.replace(result, ratio=ratio)).startswith(words)


def test_a_report_is_written_in_the_format_its_suffix_names(result, tmp_path):
    for suffix in (".html", ".md", ".csv", ".jsonl"):
        report.write(report_of(result), tmp_path / f"report{suffix}")
    lines = (tmp_path / "report.jsonl").read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines] == ["flora"] * 2 + ["bmm-lora"] * 2 + ["base"] * 2
    with pytest.raises(RequestError, match="choose .html"):
        report.write(report_of(result), tmp_path / "report.pdf")
    with pytest.raises(RequestError, match="cannot write"):
        report.write(report_of(result), tmp_path / "nowhere" / "report.md")


def test_an_empty_result_still_makes_every_report(engines):
    *_, last = compare(engines, [Request(prompt="a", adapter="klingon")])
    for suffix in (".html", ".md", ".csv", ".jsonl"):
        assert isinstance(report.render(report_of(last.result), f"empty{suffix}"), str)
    assert "Nothing to compare" in report.text(report_of(last.result))
