"""Which implementation serves a device: Triton's kernels on a GPU, PyTorch's own products elsewhere. The one switch between them.

FLORA_KERNELS=off in the environment turns the kernels off. Where they are on and Triton is missing, that is said once in the log,
and `implementation` says it to whoever asks: no number should be taken for that of code that did not run.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from functools import cache
from types import ModuleType

logger = logging.getLogger(__name__)


@cache
def kernels_on(device_type: str) -> ModuleType | None:
    """`flora.kernels` where it serves devices of this type ("cuda"); None where PyTorch does. Decided once, at the first call."""
    if device_type != "cuda":
        return None
    if os.environ.get("FLORA_KERNELS", "on") == "off":
        logger.info("the Triton kernels are off (FLORA_KERNELS=off): PyTorch's own products serve every method")
        return None
    if importlib.util.find_spec("triton") is None:
        logger.warning("Triton is not installed: PyTorch's own products serve every method, more slowly; pip install triton")
        return None
    return importlib.import_module("flora.kernels")


def implementation(device_type: str) -> str:
    """ "triton" or "pytorch": what serves the methods that have kernels (flora, flora-expand, flora-modulate, sgmv-lora)."""
    return "pytorch" if kernels_on(device_type) is None else "triton"
