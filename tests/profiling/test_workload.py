"""The ready batch, batch files, and the adapters on disk."""

import json

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from flora.engine import Request
from flora.errors import RequestError
from profiling import workload


def spoken(rate, seconds=0.5):
    """A 440 Hz tone: (frames,) float64."""
    return 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)


# --------------------------------------------------------------------------------------------------------------- clips


def test_the_clips_that_ship_can_all_be_read():
    clips = workload.example_clips()
    assert {clip["tag"] for clip in clips} >= {"ar", "cs", "lt", "mr", "mn", "hi"}
    for clip in clips:
        samples, rate = workload.load_audio(workload.ASSETS / "clips" / clip["file"])
        assert 0.3 < len(samples) / rate < 30, clip


# ------------------------------------------------------------------------------------------------------------ adapters


def test_adapters_are_found_by_tag_and_family_and_nothing_else_is(tmp_path):
    for folder in ("lua/flora", "lua/ia3", "lua/lora", "rb/lora", "pl/ia3", "own", "empty", "notes/flora"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("lua/flora", "lua/ia3", "lua/lora", "rb/lora", "pl/ia3", "own"):
        (tmp_path / folder / "adapter_config.json").write_text("{}")
    found = workload.discover_adapters(tmp_path)
    assert {tag: [path.relative_to(tmp_path).as_posix() for path in paths] for tag, paths in found.items()} == {
        "lua": ["lua/flora", "lua/lora"],
        "rb": ["rb/lora"],
        "pl": ["pl/ia3"],
        "own": ["own"],
    }
    assert workload.discover_adapters(tmp_path / "nowhere") == {}


# ------------------------------------------------------------------------------------------------------------- batches


def test_the_ready_batch_prefers_languages_with_an_adapter():
    rows = workload.ready_rows({"code": ["lua", "rb", "d", "r", "jl"], "speech": ["cs"]})
    code, speech = [row for row in rows if "prompt" in row], [row for row in rows if "audio" in row]
    assert len(code) == len(speech) == 4 and all(row["adapter"] in ("lua", "rb", "d", "r", "jl") for row in code)
    assert [row["adapter"] for row in speech] == ["cs", None, None, None], "the rest asks the base model"
    assert all(workload.request_from_row(row).max_new_tokens == 48 for row in rows)
    assert all("audio" not in row for row in workload.ready_rows({"code": ["lua"]})), "a kind without an engine has no rows"


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_a_batch_is_read_from_a_file(tmp_path, form):
    soundfile.write(tmp_path / "own.wav", spoken(16000), 16000)
    rows = [{"prompt": "def f", "adapter": "rb", "max_new_tokens": 7}, {"audio": "own.wav", "adapter": None}]
    path = tmp_path / f"batch.{form}"
    path.write_text(json.dumps(rows, indent=1) if form == "json" else "\n\n".join(map(json.dumps, rows)) + "\n")
    requests = [workload.request_from_row(row, tmp_path, 9) for row in workload.read_rows(path)]
    assert (requests[0].prompt, requests[0].adapter, requests[0].max_new_tokens) == ("def f", "rb", 7)
    assert requests[1].sampling_rate == 16000 and requests[1].max_new_tokens == 9


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no rows"),
        ("[]", "no rows"),
        ('{"prompt": "a"}\n{oops}', "line 2"),
        ("[1,\n2", "line 2"),
        ("\xff\xfe\0", "cannot be read"),
    ],
)
def test_a_bad_batch_file_is_named_with_its_line(tmp_path, content, words):
    path = tmp_path / "batch.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RequestError, match=words) as caught:
        workload.read_rows(path)
    assert "batch.jsonl" in str(caught.value) and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"prompt": "a", "audio": "b.wav"},
        {"prompt": 3},
        {"prompt": "a", "adaptor": "lua"},
        {"prompt": "a", "max_new_tokens": "many"},
        {"prompt": "a", "max_new_tokens": True},
        {"prompt": "a", "max_new_tokens": 0},
        {"prompt": "a", "temperature": -1},
        ["prompt", "a"],
        {"audio": "nowhere.wav"},
    ],
)
def test_a_row_that_makes_no_sense_is_refused(row):
    with pytest.raises(RequestError):
        workload.request_from_row(row)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), st.lists, max_leaves=4)
fields = st.sampled_from(["prompt", "audio", "adapter", "max_new_tokens", "temperature", "other"])


@given(st.dictionaries(fields, json_values) | json_values)
def test_any_row_makes_a_request_or_a_request_error(row):
    try:
        assert isinstance(workload.request_from_row(row), Request)
    except RequestError as error:
        assert str(error)


def test_popularity_in_words():
    assert workload.popularity(["a", "b", None]) == "distinct"
    assert workload.popularity(["a", "a"]) == "identical"
    assert workload.popularity(["a", "a", "b"]) == "as given"
    assert workload.popularity([None, None]) == workload.popularity([]) == "no"
