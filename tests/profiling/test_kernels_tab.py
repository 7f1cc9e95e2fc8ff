"""The Kernels tab without a browser: what a visitor may ask for, what the page is sent, and who may fetch which trace."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import fake_trace
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from flora.errors import RequestError
from profiling import __main__ as command_line
from profiling.dashboard import kernels_views as views
from profiling.dashboard.kernel_profiles import KernelProfiles, ProfileWish, ProfileWork
from profiling.kernels_report import rows_of
from profiling.profile_job import PROFILE, TRACE, JobFailed, JobProgress, RecordJob
from profiling.report import lines_of
from profiling.trace import read_profile
from profiling.trace_file import write_trace

METHODS = ["flora", "bmm-lora"]
HOSTILE = '<img src=x onerror="alert(1)">'


@pytest.fixture
def results(tmp_path):
    """A folder with one recording of two methods, and one whose rows make no sense."""
    folder = tmp_path / "results"
    folder.mkdir()
    profile = read_profile(fake_trace.two_methods().document | {"floraLive": FACTS})
    (folder / "kernels_cpu.jsonl").write_text(lines_of(rows_of(profile)))
    (folder / "broken.jsonl").write_text(json.dumps({"command": "python -m profiling kernels", "group": 7}) + "\n")
    return folder


@pytest.fixture
def profiles(engines, results):
    profiles = KernelProfiles(engines, results)
    yield profiles
    profiles.close()


@pytest.fixture
def jobs(monkeypatch):
    """The jobs that would run in a process of their own; each leaves the profile and the trace of two methods."""
    seen = []

    def do(job, folder, should_stop):
        seen.append(job)
        yield JobProgress("under the profiler", 0.5)
        document = fake_trace.two_methods().document
        (folder / PROFILE).write_text(json.dumps(read_profile(document).as_dict()))
        if isinstance(job, RecordJob):
            write_trace(folder / TRACE, document)

    monkeypatch.setattr("profiling.dashboard.kernel_profiles.do", do)
    return seen


def run(work: ProfileWork, should_stop=lambda: False):
    told = list(work.measure(should_stop))
    for event in told:
        if not hasattr(event, "share"):
            work.take(event)
    return told


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (("code", ["flora"], 8, 0, False), "two to 4 methods"),
        (("code", None, 8, 0, False), "two to 4 methods"),
        (("code", ["flora", "base", "merged", "mixed", "loop-lora"], 8, 0, False), "two to 4 methods"),
        (("code", ["flora", "rm -rf"], 8, 0, False), "no method 'rm -rf'"),
        (("code", ["flora", "flora"], 8, 0, False), "given twice"),
        (("code", METHODS, 0, 0, False), "from 1 to 32"),
        (("code", METHODS, float("nan"), 0, False), "from 1 to 32"),
        (("code", METHODS, None, 0, False), "from 1 to 32"),
        (("code", METHODS, 8, 500, False), "rank of random adapters"),
        (("image", METHODS, 8, 0, False), "no model of this kind"),
    ],
)
def test_nonsense_is_refused_by_name(profiles, wish, words):
    with pytest.raises(RequestError, match=words):
        profiles.record("a", ProfileWish(*wish))


@pytest.mark.parametrize("path", [None, "", 7, "/etc/passwd", "trace.txt"])
def test_what_is_no_trace_is_not_opened(profiles, path):
    with pytest.raises(RequestError, match="a .json or .json.gz file"):
        profiles.open("a", path)


def test_the_other_process_is_told_where_what_serves_lies(profiles, engines, model_folders):
    job = profiles.job(ProfileWish("code", METHODS, 4, 0, False))
    folder, adapters = model_folders["code"]
    assert job.model == str(folder.resolve())
    assert job.adapters == {tag: [str(path.resolve()) for path in own] for tag, own in adapters.items()}
    assert (job.rows, job.rank, job.captured, job.dtype, job.device) == (4, None, False, "float32", "cpu")
    assert profiles.job(ProfileWish("code", METHODS, 4, 8, True)).rank == 8
    words = shlex.split(job.command)
    assert words[:3] == ["python", "-m", "profiling"]
    options = command_line._parser().parse_args(words[3:])  # the page's command is one that the command line takes
    assert (options.methods, options.kind, options.rows, options.rank, options.captured) == (METHODS, "code", 4, None, False)
    assert str(folder.parent) not in job.command


def test_a_result_is_kept_until_the_next_one_or_until_the_visitor_leaves(profiles, jobs, tmp_path):
    work = profiles.record("a", ProfileWish("code", METHODS, 4, 0, False))
    told = run(work)
    assert told[0].words == "under the profiler" and work.found is profiles.of("a")
    first = work.found
    assert first.folder.is_dir() and "live" in first.source
    given = tmp_path / "own.json"
    write_trace(given, fake_trace.two_methods().document)
    run(profiles.open("a", str(given)))
    assert not first.folder.exists() and "not measured here" in profiles.of("a").source and given.exists()
    second = profiles.of("a").folder
    profiles.forget("a")
    assert profiles.of("a") is None and not second.exists()


def test_a_job_that_was_stopped_or_failed_leaves_nothing(profiles, jobs, monkeypatch):
    work = profiles.record("a", ProfileWish("code", METHODS, 4, 0, False))
    run(work, should_stop=lambda: True)
    assert work.found is None and profiles.of("a") is None

    def fail(job, folder, should_stop):
        raise JobFailed("the device has no room")
        yield

    monkeypatch.setattr("profiling.dashboard.kernel_profiles.do", fail)
    with pytest.raises(RequestError, match="the device has no room"):
        run(profiles.record("a", ProfileWish("code", METHODS, 4, 0, False)))
    assert profiles.of("a") is None and not list(Path(profiles.root.name).iterdir())


def test_a_trace_is_served_to_whoever_knows_its_address_while_it_is_looked_at(profiles, jobs):
    run(profiles.record("a", ProfileWish("code", METHODS, 4, 0, False)))
    found = profiles.of("a")
    client = TestClient(Starlette(routes=[profiles.traces.route()]))
    answer = client.get("/" + found.trace.url)
    assert answer.status_code == 200 and answer.content[:2] == b"\x1f\x8b"
    assert answer.headers["content-disposition"] == "attachment" and answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/" + found.trace.url[:-1]).status_code == 404
    assert client.get("/" + found.trace.url.rpartition("/")[0] + "/..%2f..%2fetc%2fpasswd").status_code == 404
    profiles.forget("a")
    assert client.get("/" + found.trace.url).status_code == 404


def test_names_from_a_trace_are_text(tmp_path):
    trace = fake_trace.two_methods()
    for event in trace.events:
        if event["name"] == "aten::mul":
            event["name"] = f"lib::{HOSTILE}"
    document = trace.document | {"floraLive": {"command": HOSTILE}}
    profile = read_profile(document)
    assert profile.facts == {}  # not what we wrote
    cells = views.difference(profile, "decode")["cells"]
    assert "<img" not in json.dumps(cells) and "&lt;img" in cells["instead"]
    assert "<img" not in json.dumps(views.headline(profile, "decode", "opened")["cells"])
    assert any(HOSTILE in str(line[0]) for line in views.kernels_table(profile, "decode")["lines"])  # the table writes text nodes


def test_every_number_says_on_what_it_was_measured():
    profile = read_profile(fake_trace.two_methods().document | {"floraLive": FACTS})
    cells = views.headline(profile, "decode", "live, on this machine")["cells"]
    for words in ("live, on this machine", "a CPU, 2 threads", "float32", "batch of 8", "8 decode steps", "3 warm-up steps"):
        assert words in cells["facts"]
    assert "0.09 ms" in cells["table"]  # without the profiler
    assert cells["finding"].startswith("bmm-LoRA&#x27;s decode step is 0.02 ms shorter (20 %)")


FACTS = {
    "methods": METHODS, "kind": "code", "batch": 8, "adapters": 8, "popularity": "distinct",
    "ranks": {"flora": [4], "bmm-lora": [4]}, "prefills": 4, "steps": 8, "warmup": 3,
    "plain_ms": {"flora decode": 0.09}, "implementation": "pytorch", "captured": False,
    "command": "python -m profiling kernels",
    "hardware": {
        "device": "cpu", "device_name": "a CPU", "threads": 2, "torch": "2.8",
        "models": {"code": {"name": "code", "dtype": "float32"}},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"ranks": []}, {"ranks": {"flora": ["4"]}}, {"plain_ms": {"x": "y"}}, {"hardware": {}}, {"command": 7}, {"batch": "8"}],
)
def test_facts_that_make_no_sense_are_none(change):
    assert read_profile(fake_trace.two_methods().document | {"floraLive": FACTS | change}).facts == {}


def test_the_page_is_sent_less_than_2_mb(profiles, tmp_path):
    """All that a tick sends of 200,000 events; of many methods as well."""
    trace = fake_trace.FakeTrace()
    for step, method in enumerate(("flora", "bmm-lora", "sgmv-lora", "merged") * 3):
        start = 10_000.0 * step
        trace.annotation(f"step | {method} | decode", start, 9_000)
        for place in range(600):
            dims = [[8, place], [place, 320]]
            trace.op(("aten::mm", "aten::mul", "aten::bmm", "aten::sum")[place % 4], start + 15 * place, 10, dims)
    profile = read_profile(trace.document)
    sent = [
        views.headline(profile, "decode", "live"),
        views.charts(profile, "decode", None, None, 1),
        views.difference(profile, "decode"),
        views.kernels_table(profile, "decode"),
    ]
    assert len(profile.groups) == 4
    assert len(json.dumps(sent)) < 2_000_000


def test_the_first_method_is_compared_with_any_of_the_others():
    trace = fake_trace.FakeTrace()
    for step, (method, operator) in enumerate({"flora": "mm", "bmm-lora": "bmm", "loop-lora": "index_select"}.items()):
        trace.annotation(f"step | {method} | decode", 100.0 * step, 90)
        trace.op(f"aten::{operator}", 100.0 * step, 10.0 * (step + 1), [[8, 4], [4, 4]])
    profile = read_profile(trace.document)
    for other, name, operator in ((None, "bmm-LoRA", "bmm"), ("loop-lora", "loop-LoRA", "index_select"), ("?", "bmm-LoRA", "bmm")):
        assert f"time against {name}" in views.charts(profile, "decode", None, other, 1)["gains"]["summary"]
        cells = views.difference(profile, "decode", other)["cells"]
        assert operator in cells["no_longer"] and cells["no_longer_head"].endswith(f"and {name} does")


def test_a_recording_is_shown_as_one(profiles):
    assert {one.name for one in profiles.recorded()} == {"kernels_cpu", "broken"}
    found = profiles.look_at_recorded("a", "kernels_cpu")
    assert (found.source, found.trace, found.folder) == ("recorded, not live: kernels_cpu", None, None)
    assert found.profile == read_profile(fake_trace.two_methods().document | {"floraLive": FACTS})
    assert profiles.of("a") is found
    profiles.forget("a")
    for name, words in (("broken", "the recorded rows"), ("../kernels_cpu", "no longer there")):
        with pytest.raises(RequestError, match=words):
            profiles.look_at_recorded("a", name)


def test_the_temporary_folder_goes_with_the_page(engines, results):
    profiles = KernelProfiles(engines, results)
    folder = Path(profiles.root.name)
    assert folder.is_dir()
    profiles.close()
    assert not folder.exists()
