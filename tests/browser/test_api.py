"""The endpoints as a program meets them, and what the server must refuse. No browser is needed here, only the app."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import numpy as np
import pytest
import soundfile
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from browser.conftest import ROOT


@pytest.fixture(scope="module")
def client(app_url) -> Client:
    return Client(app_url, verbose=False)


@pytest.fixture
def clip(tmp_path):
    soundfile.write(tmp_path / "tone.wav", (0.3 * np.sin(np.arange(12_000) / 8)).astype(np.float32), 16_000)
    return tmp_path / "tone.wav"


def test_adapters(client):
    adapters = client.predict(api_name="/adapters")
    assert set(adapters) == {"code", "speech"}
    for tags in adapters.values():
        assert len(tags) >= 3
        for facts in tags.values():
            assert set(facts) == {"families", "types", "ranks", "size_bytes", "layers", "base_models"}
            assert set(facts["ranks"]) == set(facts["families"])


def test_compare(client, clip):
    adapters = client.predict(api_name="/adapters")
    code_tag, speech_tag = next(iter(adapters["code"])), next(iter(adapters["speech"]))
    requests = [
        {"prompt": "", "adapter": code_tag},
        {"prompt": "def total(xs)", "adapter": code_tag},
        {"audio": handle_file(str(clip)), "adapter": speech_tag},
        {"prompt": "x = 1", "adapter": "no such tag"},
        {"prompt": "x = 1", "adapter": None},
    ]
    result = client.predict(requests, ["flora", "bmm-lora"], 5, api_name="/compare")
    assert set(result["failures"]) == {"0", "3"} and "no such tag" in result["failures"]["3"]
    assert {(row["index"], row["method"]) for row in result["rows"]} == {(i, m) for i in (1, 2, 4) for m in ("flora", "bmm-lora")}
    assert all(row["num_new_tokens"] == 5 for row in result["rows"])
    assert set(result["methods"]) == {"flora", "bmm-lora"} and result["ratio"]["n"] == 4
    assert str(ROOT) not in json.dumps(result)


@pytest.mark.parametrize(
    "requests, methods, number, word",
    [
        ([], ["flora", "bmm-lora"], 5, "at least one"),
        ([{"prompt": "x"}], ["flora", "flora"], 5, "flora"),
        ([{"prompt": "x"}], ["flora", "nonsense"], 5, "nonsense"),
        ([{"prompt": "x"}], ["flora", "base"], 100_000, "256"),
        ([{"prompt": "x"}] * 200, ["flora", "base"], 5, "200"),
        ("x", ["flora", "base"], 5, "list"),
    ],
)
def test_nonsense_is_named(client, requests, methods, number, word):
    with pytest.raises(AppError, match=word):
        client.predict(requests, methods, number, api_name="/compare")


@pytest.mark.parametrize(
    "audio", ["/etc/passwd", {"path": "/etc/passwd"}, {"path": str(ROOT / "assets/clips/cs_1.flac")}, 7, ["x"]]
)
def test_only_uploaded_files_are_read(client, audio):
    result = client.predict([{"audio": audio}], ["flora", "bmm-lora"], 3, api_name="/compare")
    assert "uploaded" in result["failures"]["0"]
    assert "/etc" not in result["failures"]["0"]


@pytest.mark.parametrize("path", ["/etc/passwd", "app.py", "http://127.0.0.1:1/secret.wav", "../../etc/passwd"])
def test_a_forged_upload_is_refused(app_url, path):
    """Past gradio_client, which would upload its own file of that name: the wire itself."""
    forged = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [[{"audio": forged}], ["flora", "bmm-lora"], 3]}).encode()
    call = urllib.request.Request(f"{app_url}gradio_api/call/compare", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=30) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{app_url}gradio_api/call/compare/{event}", timeout=60) as answer:
        stream = answer.read().decode()
    assert "event: error" in stream or "uploaded file" in stream, stream
    assert "root:" not in stream and str(ROOT) not in stream and "Traceback" not in stream, stream


def test_private_events_are_not_listed(client):
    listed = set(client.view_api(return_format="dict")["named_endpoints"])
    assert listed == {"/compare", "/generate", "/adapters", "/add_adapter", "/remove_adapter"}


def test_files_outside_are_not_served(app_url):
    for path in (ROOT / "app.py", ROOT / "assets" / "models", "/etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(f"{app_url}gradio_api/file={path}", timeout=10)
        assert refusal.value.code in (403, 404)


def test_plotly_is_served_from_here_and_cached(app_url):
    with urllib.request.urlopen(f"{app_url}gradio_api/instrument/plotly.min.js", timeout=30) as answer:
        assert "immutable" in answer.headers["cache-control"] and answer.headers["content-type"].startswith("text/javascript")
        assert len(answer.read()) > 1_000_000
    with urllib.request.urlopen(app_url, timeout=30) as answer:
        page = answer.read().decode()
    assert "fonts.googleapis" not in page and "cdn." not in page
