"""A job in a process of its own: it tells how far it is, its failures are sentences, and it never outlives whoever started it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import closing

import fake_trace
import psutil
import pytest

from profiling import profile_job
from profiling.profile_job import PROFILE, JobFailed, OpenJob, do
from profiling.trace_file import write_trace
from profiling.trace_profile import TraceProfile


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "job"
    made.mkdir()
    return made


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "given.json.gz"
    write_trace(path, fake_trace.two_methods().document)
    return path


@pytest.fixture
def slow_trace(tmp_path):
    """A file whose reading does not end: a pipe that nobody writes to."""
    path = tmp_path / "slow.json"
    os.mkfifo(path)
    return path


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "profiling.profile_job" in " ".join(child.cmdline())]


def test_a_trace_is_opened_without_torch_and_told_about(trace, folder):
    told = list(do(OpenJob(str(trace)), folder))
    assert [progress.words for progress in told] == ["reading the file", "reading the trace"]
    assert [progress.share for progress in told] == sorted(progress.share for progress in told)
    profile = TraceProfile.from_dict(json.loads((folder / PROFILE).read_text()))
    assert [group.method for group in profile.groups] == ["flora", "bmm-lora"]
    assert not children()
    seen = subprocess.run(
        [sys.executable, "-c", "import sys, profiling.profile_job, profiling.trace; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=profile_job._PROJECT,
    )
    assert seen.stdout.strip() == "False"


def test_what_is_wrong_with_a_trace_is_a_sentence(tmp_path, folder):
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(JobFailed) as error:
        list(do(OpenJob(str(path)), folder))
    assert "'broken.json' is not JSON" in error.value.words and str(tmp_path) not in error.value.words
    assert not error.value.ours


def test_a_process_that_breaks_off_is_a_fault_of_ours(trace, folder, monkeypatch, caplog):
    monkeypatch.setattr(profile_job.json, "dumps", lambda document: "nonsense")
    with pytest.raises(JobFailed) as error:
        list(do(OpenJob(str(trace)), folder))
    assert error.value.ours and "JSONDecodeError" in caplog.text


def test_a_stopped_job_is_killed(slow_trace, folder):
    stopped = []
    for progress in do(OpenJob(str(slow_trace)), folder, lambda: bool(stopped)):
        assert len(children()) == 1
        stopped.append(progress)
    assert stopped and not children() and not (folder / PROFILE).exists()


def test_a_job_that_nobody_reads_is_killed(slow_trace, folder):
    with closing(do(OpenJob(str(slow_trace)), folder)) as job:
        next(job)
    assert not children()


def test_a_job_that_takes_too_long_is_ended(slow_trace, folder, monkeypatch):
    monkeypatch.setattr(profile_job, "OPEN_LIMIT_S", 1.0)
    with pytest.raises(JobFailed, match="within 1 s"):
        list(do(OpenJob(str(slow_trace)), folder))


def test_the_process_ends_with_whoever_started_it(slow_trace, folder):
    job = {"do": "open", "folder": str(folder), "path": str(slow_trace)}
    process = subprocess.Popen(
        [sys.executable, "-m", "profiling.profile_job"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=profile_job._PROJECT,
    )
    process.stdin.write(json.dumps(job).encode() + b"\n")
    process.stdin.flush()
    time.sleep(0.5)
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(timeout=10) == 1
