"""What training and judging read in the same way."""

import csv

import datasets
import pytest

from flora.tables import NOT_AN_OBJECT, NOT_JSON, cells, json_lines, with_sound_as_files


def test_lines_of_json_keep_their_numbers_and_say_what_is_wrong():
    lines = ['{"text": "dva\u2028tři"}', " ", "{broken", "[1]", "[" * 100_000, '{"n": ' + "9" * 9999 + "}", '{"text": ""}']
    found = [(1, {"text": "dva\u2028tři"}), (3, NOT_JSON), (4, NOT_AN_OBJECT), (5, NOT_JSON), (6, NOT_JSON), (7, {"text": ""})]
    assert list(json_lines(lines)) == found
    assert list(json_lines([b"\xef\xbb\xbf" + lines[0].encode(), *(line.encode() for line in lines[1:])])) == found
    assert list(json_lines([b'{"text": "\xff"}', b'\xef\xbb\xbf{"text": "x"}'])) == [(1, NOT_JSON), (2, NOT_JSON)]


def test_quotation_marks_enclose_the_cells_of_a_csv_and_are_text_in_a_tsv():
    table = ["text,other\n", '"a ""b"",c",d\n', '"never,closed\n', "last,x\n"]
    rows = [row["text"] for row in cells(table, tabs=False)]
    assert rows[0] == 'a "b",c' and rows[1].startswith("never") and len(rows) == 2
    with pytest.raises(csv.Error):
        list(cells(table, tabs=False, strict=True))
    with_tabs = [line.replace(",", "\t") for line in table]
    assert [row["text"] for row in cells(with_tabs, tabs=True, strict=True)] == ['"a ""b""', '"never', "last"]
    assert [row["text"] for row in cells(["text,other\n", f"{'y' * 300_000},z\n"], tabs=False)] == ["y" * 300_000]


def test_sound_stays_a_file_and_other_columns_what_they_are():
    data = datasets.Dataset.from_list([{"audio": {"bytes": b"not sound", "path": "a.wav"}, "text": "dva"}])
    data = data.cast_column("audio", datasets.Audio())
    assert list(with_sound_as_files(data)) == [{"audio": {"bytes": b"not sound", "path": "a.wav"}, "text": "dva"}]
    assert list(with_sound_as_files(data.remove_columns("audio"))) == [{"text": "dva"}]
