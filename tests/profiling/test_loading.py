"""Random adapters on an engine, and the threads that they may not leave behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
print("read again", sum(counter.loads for counter in engine.bank.counters().values()) >= 4)
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
