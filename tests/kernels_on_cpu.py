"""`flora.kernels` for tests: compiled where there is a GPU, else run by Triton's interpreter, number by number, on the CPU.

Whether a kernel is interpreted is settled when it is defined. So the variable is set for that moment alone, and no other test, and
no process that one starts, sees it.
"""

from __future__ import annotations

import importlib

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

with pytest.MonkeyPatch.context() as patch:
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")
    kernels = importlib.import_module("flora.kernels")
