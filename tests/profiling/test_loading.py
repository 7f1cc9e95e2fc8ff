"""Engines as a command line asks for them; random adapters, and the threads that they may not leave behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flora import models, shapes
from profiling.__main__ import _parser
from profiling.loading import load_engine
from profiling.options import weight_words
from profiling.workload import command_line, languages, ready_rows, request_from_row

ROOT = Path(__file__).resolve().parents[2]

COUNT_TEAMS = """
import os, sys, threading, time
import torch
from flora import Engine, Request
from profiling.loading import add_random_adapters

def others():
    "Threads that Python did not start: OpenMP's teams, and pools of libraries."
    return len(os.listdir("/proc/self/task")) - threading.active_count()

def left_behind():
    "How many more than before; those of a thread that has just ended take a moment to go."
    end = time.monotonic() + 3
    while others() > before and time.monotonic() < end:
        time.sleep(0.01)
    return max(0, others() - before)

torch.set_num_threads(2)
engine = Engine.from_pretrained("assets/models/code", device="cpu", host_adapter_bytes=1)
requests = [Request("def add(a, b):", max_new_tokens=4, ignore_eos=True)] * 8
engine.generate(requests, "base")
before = others()
tags = add_random_adapters(engine, 4, 4, ("flora", "bmm-lora"))
print("registered", left_behind())
engine.generate([Request("x = 1", adapter=tag, max_new_tokens=4) for tag in tags])
print("read and served", left_behind())
print("read again", any(counter.loads for counter in engine.bank.counters().values()))
engine.add_adapter("lua", "assets/adapters/code/lua/flora")
print("added", left_behind())
engine.close()
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not list a process's threads")
def test_only_the_compute_thread_has_a_team():
    """A second team of OpenMP threads, whoever has it, makes every decode step twice as long on two cores."""
    process = subprocess.run([sys.executable, "-c", COUNT_TEAMS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == ["registered 0", "read and served 0", "read again True", "added 0"], process.stdout


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_random_weights_come_with_random_adapters_under_the_languages_names(quantize, monkeypatch):
    """As `--code-model starcoderbase-1b --weights random`, narrower: the ready batch finds its languages, nothing is downloaded."""
    monkeypatch.setattr(models, "SHAPES", {"bigcode/starcoderbase-1b": lambda: shapes._starcoder(128, 2)})
    words = ["compare", "--code-model", "starcoderbase-1b", "--weights", "random", "--device", "cpu"]
    options = _parser().parse_args(words + (["--quantize", quantize, "--llm-int8-threshold", "0"] if quantize else []))
    engine = load_engine("code", options)
    assert (engine.weights, engine.quantize) == ("random", quantize)
    assert set(engine.adapters) == set(languages("code"))
    rows = ready_rows({"code": engine.adapters}, max_new_tokens=2)
    assert all(row["adapter"] for row in rows)
    command = command_line({"code": engine}, [request_from_row(row) for row in rows], ["flora"], 1, 1, 0, {}, {})
    assert "--weights random" in command and ("--quantize int8 --llm-int8-threshold 0" in command) == (quantize == "int8")
    assert len(engine.generate([request_from_row(row) for row in rows], "bmm-lora")) == 4
    assert weight_words(options) == weight_words(engine)
    engine.close()
