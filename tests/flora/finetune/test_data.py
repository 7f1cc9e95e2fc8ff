"""Data of one's own, good and bad: every kind of source, and every way in which a row can be unfit."""

from __future__ import annotations

import datasets
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from flora.errors import DataError
from flora.finetune.data import Clip, Source, Text, fingerprint, read_clips, read_texts, split_by_text

from .conftest import programs, write_clip, write_lines

EXPECTED = [Text(row["prompt"], row["completion"]) for row in programs(40)]


def any_length(text: str) -> None:
    return None


def texts(path, refuse=any_length, **options) -> list[Text]:
    return read_texts(Source(str(path), **options), refuse)[0]


def clips(path, window_s: float = 1.0, refuse=any_length, **options):
    return read_clips(Source(str(path), **options), window_s, refuse)


# ------------------------------------------------------------------------------------------------------- kinds of sources


def as_jsonl(folder):
    return write_lines(folder / "x.jsonl", programs(40))


def as_csv(folder):
    with (folder / "x.csv").open("w", newline="", encoding="utf-8-sig") as file:
        import csv

        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(programs(40))
    return folder / "x.csv"


def as_parquet(folder):
    parquet.write_table(pyarrow.Table.from_pylist(programs(40)), folder / "x.parquet", row_group_size=7)
    return folder / "x.parquet"


def as_folder_of_files(folder):
    write_lines(folder / "a.jsonl", programs(40)[:15])
    parquet.write_table(pyarrow.Table.from_pylist(programs(40)[15:]), folder / "b.parquet")
    return folder


def as_saved(folder):
    datasets.Dataset.from_list(programs(40)).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def as_saved_splits(folder):
    splits = {"train": datasets.Dataset.from_list(programs(40)), "test": datasets.Dataset.from_list(programs(3))}
    datasets.DatasetDict(splits).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("write", [as_jsonl, as_csv, as_parquet, as_folder_of_files, as_saved, as_saved_splits])
def test_every_kind_of_source_gives_the_same_texts(write, tmp_path):
    source = write(tmp_path)
    assert texts(source) == EXPECTED
    assert texts(source, limit=7) == EXPECTED[:7]


def test_a_split_is_found_by_its_name_and_missed_by_its_name(tmp_path):
    assert texts(as_saved_splits(tmp_path), split="test") == EXPECTED[:3]
    with pytest.raises(DataError, match="no split 'dev'; there are train, test"):
        texts(tmp_path / "saved", split="dev")


def test_plain_texts_have_no_prompt_and_columns_can_be_named(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", [{"content": "a = 1", "src": "b = 2", "lang": "lua"}] * 2)
    assert texts(file) == [Text("", "a = 1")] * 2
    assert texts(file, text="src") == [Text("", "b = 2")] * 2
    assert texts(file, prompt="lang", completion="src") == [Text("lua", "b = 2")] * 2
    with pytest.raises(DataError, match=r"no column 'nope'; its columns are content, lang, src: name .*--text-column"):
        texts(file, text="nope")
    with pytest.raises(DataError, match="no column 'completion'"):
        texts(file, prompt="lang")


def test_a_text_column_that_is_asked_for_wins_over_prompt_and_completion(code_file):
    assert texts(code_file, text="completion")[0] == Text("", "return x + 0")


def test_a_folder_of_sound_gives_clips(clips_folder):
    found, tally = clips(clips_folder)
    assert len(found) == 12 and not tally.bad
    assert found[5].audio == clips_folder / "5.wav" and found[5].text == "tři tři" and "5.wav" in found[5].place


def test_sound_inside_a_data_set_is_read(clips_folder, tmp_path):
    rows = [{"audio": str(clips_folder / f"{index}.wav"), "sentence": f"clip  {index}"} for index in range(3)]
    data = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False))
    data = data.map(lambda row: {"audio": {"bytes": open(row["audio"]["path"], "rb").read(), "path": None}})
    data.save_to_disk(str(tmp_path / "saved"))
    found, _ = clips(tmp_path / "saved")
    assert [clip.text for clip in found] == ["clip 0", "clip 1", "clip 2"]
    assert found[1].audio == (clips_folder / "1.wav").read_bytes()


def test_sound_inside_a_table_is_read(clips_folder, tmp_path):
    content = (clips_folder / "1.wav").read_bytes()
    rows = [{"audio": {"bytes": content, "path": "1.wav"}, "text": str(number)} for number in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    found, tally = clips(tmp_path / "x.parquet")
    assert [clip.audio for clip in found] == [content] * 3 and not tally.bad


def test_a_program_may_be_longer_than_a_cell_usually_is(tmp_path):
    (tmp_path / "x.csv").write_text(f"text\n{'y' * 300_000}\nz\n")
    assert [len(text.completion) for text in texts(tmp_path / "x.csv")] == [300_000, 1]


def test_quotation_marks_are_text_in_a_tsv_and_enclose_cells_in_a_csv(tmp_path):
    (tmp_path / "x.tsv").write_text('id\ttext\n1\t"never closed\n2\tsays "hello"\n')
    (tmp_path / "x.csv").write_text('id,text\n1,"two,\nlines"\n')
    assert [text.completion for text in texts(tmp_path / "x.tsv")] == ['"never closed', 'says "hello"']
    assert [text.completion for text in texts(tmp_path / "x.csv")] == ["two,\nlines"]


# ----------------------------------------------------------------------------------------------------------------- bad rows

BAD_LINES = {
    "{broken": "is not JSON",
    "[1, 2]": "is not a JSON object",
    '{"prompt": "-- x"}': "has no completion",
    '{"prompt": "-- x", "completion": " \\n"}': "has an empty completion",
    '{"prompt": "-- x", "completion": 7}': "has a completion that is not text",
    '{"prompt": "-- x", "completion": null}': "has no completion",
    '{"prompt": "' + "y" * 300 + '", "completion": "z"}': "is too long",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_one_bad_line_in_a_hundred_is_named_and_left_out(line, tmp_path):
    file = write_lines(tmp_path / "x.jsonl", [*programs(99)[:41], line, "", *programs(99)[41:]])
    found, tally = read_texts(Source(str(file)), lambda prompt: "is too long" if len(prompt) > 200 else None)
    assert len(found) == 99 and tally.read == 100, "an empty line is no row"
    assert tally.bad == [f"line 42 {BAD_LINES[line]}"]
    assert str(tally) == f"1 of 100 rows left out (line 42 {BAD_LINES[line]})"


def test_more_than_one_in_a_hundred_is_too_many(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", [*programs(98), "{", "{"])
    with pytest.raises(DataError, match=r"2 of 100 rows left out \(line 99 is not JSON; line 100 .* more than 1% are bad"):
        texts(file)
    file = write_lines(tmp_path / "y.jsonl", [*programs(3), *["{"] * 9])
    with pytest.raises(DataError, match="line 8 is not JSON; and 4 more"):
        texts(file)


def test_bytes_that_are_no_text_are_a_bad_row(tmp_path):
    good = "".join(f'{{"text": "{number}"}}\n' for number in range(200)).encode()
    (tmp_path / "x.jsonl").write_bytes(good + b'{"text": "\xff"}\n')
    assert read_texts(Source(str(tmp_path / "x.jsonl")), any_length)[1].bad == ["line 201 is not JSON"]
    good = "".join(f"{number},a\n" for number in range(200)).encode()
    (tmp_path / "x.csv").write_bytes(b"text,other\n" + good + b"\xff,a\n1,2,3\n")
    assert read_texts(Source(str(tmp_path / "x.csv")), any_length)[1].bad == [
        "line 202 is not UTF-8",
        "line 203 has more cells than there are columns",
    ]


def bad_clip(kind: str, folder):
    path = folder / "bad.wav"
    if kind == "silent":
        import numpy
        import soundfile

        soundfile.write(path, numpy.zeros(9000), 16_000)
    elif kind == "too long":
        write_clip(path, 1.5)
    elif kind == "truncated":
        path.write_bytes(write_clip(path).read_bytes()[:30])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no sound":
        path.write_text("hello")
    return path


@pytest.mark.parametrize("kind", ["silent", "too long", "truncated", "empty", "no sound", "missing"])
def test_a_clip_that_cannot_be_used_is_named_and_left_out(kind, tmp_path):
    good, bad = write_clip(tmp_path / "good.wav"), bad_clip(kind, tmp_path)
    rows = [{"audio": good.name, "text": str(number)} for number in range(99)] + [{"audio": bad.name, "text": "pět"}]
    found, tally = clips(write_lines(tmp_path / "x.jsonl", rows))
    assert len(found) == 99 and len(tally.bad) == 1
    assert tally.bad[0].startswith("line 100 has audio that cannot be used: ") and "bad.wav" in tally.bad[0]
    assert str(tmp_path) not in tally.bad[0]


def test_a_clip_without_a_text_or_with_too_long_a_one_is_left_out(tmp_path):
    write_clip(tmp_path / "a.wav")
    rows = [{"audio": "a.wav", "text": str(number)} for number in range(300)]
    rows += [{"audio": "a.wav", "text": ""}, {"audio": "a.wav", "text": "x" * 50}, {"audio": None, "text": "x"}]
    found, tally = clips(write_lines(tmp_path / "x.jsonl", rows), refuse=lambda text: "is too long" if len(text) > 40 else None)
    assert len(found) == 300
    assert tally.bad == ["line 301 has an empty text", "line 302 is too long", "line 303 has no audio"]


# -------------------------------------------------------------------------------------------------------------- bad sources


def test_a_source_that_is_not_one_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "none.jsonl").write_text("\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    (tmp_path / "hollow").mkdir()
    for name, said in {
        "x.pkl": "data x.pkl is of no known kind: give .jsonl",
        "x.parquet": "data x.parquet is truncated or not a Parquet file",
        "none.jsonl": "data none.jsonl holds no rows",
        "broken": "data folder broken is not whole, or not what datasets saved",
        "hollow": "data folder hollow holds no metadata.csv",
        "absent.jsonl": "data 'absent.jsonl' is neither a file or folder here nor a data set's id",
    }.items():
        with pytest.raises(DataError) as error:
            texts(tmp_path / name)
        assert str(error.value).startswith(said) and "\n" not in str(error.value)
        assert str(tmp_path) not in str(error.value)


def test_a_data_set_of_the_hub_that_cannot_be_reached_says_what_to_check():
    with pytest.raises(DataError, match="data set no-one/nothing could not be read from the hub: check the name"):
        texts("no-one/nothing")


def test_a_data_set_of_the_hub_is_read_only_as_far_as_needed(monkeypatch):
    read = []

    def endless(*names, **options):
        assert names == ("bigcode/the-stack", None) and options["data_dir"] == "data/lua" and options["streaming"]
        return datasets.IterableDataset.from_generator(rows)

    def rows():
        for number in range(10**9):
            read.append(number)
            yield {"content": f"return {number}"}

    monkeypatch.setattr(datasets, "load_dataset", endless)
    source = Source("bigcode/the-stack", directory="data/lua", enough=60)
    found, _ = read_texts(source, any_length)
    assert len(found) == 60 and len(read) <= 61


# ------------------------------------------------------------------------------------------------------------- holding out


@given(st.lists(st.tuples(st.text(max_size=2), st.text(min_size=1, max_size=2)), min_size=2, max_size=30), st.floats(0.01, 0.99))
def test_no_text_is_both_learnt_and_held_out(pairs, share):
    examples = [Text(*pair) for pair in pairs]
    if len(set(examples)) < 2:
        with pytest.raises(DataError, match="fewer than two different texts"):
            split_by_text(examples, share)
        return
    train, held_out = split_by_text(examples, share)
    assert train and held_out and not set(train) & set(held_out)
    assert sorted(map(str, train + held_out)) == sorted(map(str, examples))
    assert split_by_text(examples[::-1], share)[1] == held_out[::-1], "the order of the rows does not matter"


def test_clips_of_the_same_text_are_held_out_together():
    examples = [Clip(b"", f"text {number % 10}", str(number)) for number in range(40)]
    train, held_out = split_by_text(examples, 0.2)
    assert len(held_out) == 8 and not {clip.text for clip in train} & {clip.text for clip in held_out}


def test_a_fingerprint_tells_other_data_apart():
    first, second = Text("a", "b"), Text("ab", "")
    prints = {fingerprint(rows) for rows in ([first], [second], [first, first], [first, second], [second, first], [])}
    assert len(prints) == 6
    assert fingerprint([Clip(b"1", "x", "row 1")]) != fingerprint([Clip(b"1", "x", "row 2")])
