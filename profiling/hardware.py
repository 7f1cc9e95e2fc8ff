"""What a number was measured on, without anything that names a person or a place: no host name, no user name, no
path.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from flora.names import public_name

if TYPE_CHECKING:
    from flora.engine import Engine


@cache
def cpu_model() -> str:
    """The processor's name as its maker gives it, or the architecture where the system does not tell."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
        return name or platform.machine()
    facts = Path("/proc/cpuinfo")
    for line in facts.read_text(encoding="utf-8", errors="replace").splitlines() if facts.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def num_cpus() -> int:
    """The processors this process may use, which in a container is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """The name of the device that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{cpu_model()} (GPU)"
    return cpu_model()


def model_facts(engine: Engine) -> dict:
    """Name, device, dtype and shapes of an engine's base model."""
    config = engine.model.config
    return {
        "name": public_name(engine.name),
        "device": engine.device.type,
        "device_name": device_name(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "weights": engine.weights,
        "quantize": engine.quantize,
        "llm_int8_threshold": engine.llm_int8_threshold,
        "num_parameters": engine.model.num_parameters(),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
    }


def environment(engines: Mapping[str, Engine] | None = None) -> dict:
    """The facts that go with every recorded number.

    engines: kind → engine, whose models are described under "models".
    """
    engines = engines or {}
    devices = {engine.device.type: engine.device for engine in engines.values()} or {"cpu": torch.device("cpu")}
    facts = {
        "device": " + ".join(devices),
        "device_name": " + ".join(dict.fromkeys(device_name(device) for device in devices.values())),
        "cpu": cpu_model(),
        "num_cpus": num_cpus(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": version("peft"),
        "models": {kind: model_facts(engine) for kind, engine in engines.items()},
    }
    if "cuda" in devices:
        facts["cuda"] = torch.version.cuda
    return facts


def summary(facts: Mapping) -> str:
    """One line of `environment(...)` for a head line: device, threads, dtype, versions."""
    dtypes = " + ".join(dict.fromkeys(_weights_of(model) for model in facts["models"].values()))
    parts = [
        facts["device_name"],
        "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads",
        dtypes,
        f"torch {facts['torch']}",
    ]
    parts += [f"transformers {facts['transformers']}", facts["platform"]]
    return " · ".join(part for part in parts if part)


def _weights_of(model: Mapping) -> str:
    """Such as float32, or: random int8, float32."""
    words = " ".join(word for word in ("random" if model["weights"] == "random" else None, model["quantize"]) if word)
    return ", ".join(part for part in (words, model["dtype"]) if part)


def reset_peak_memory(devices: Iterable[torch.device]) -> None:
    """Start the count of a GPU's peak anew; a process's peak of resident memory cannot be reset."""
    for device in set(devices):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)


def peak_memory(devices: Iterable[torch.device]) -> tuple[int, str]:
    """Peak memory in bytes, and what it is the peak of.

    On a GPU: the most that torch's tensors held on it since `reset_peak_memory`. Else: the most resident memory this
    whole process (models, page and all) has held since it started.
    """
    gpus = {device for device in devices if device.type == "cuda"}
    if gpus:
        return sum(torch.cuda.max_memory_allocated(device) for device in gpus), "tensors on the GPU"
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        largest if sys.platform == "darwin" else 1024 * largest,
        "resident memory of the process",
    )  # Linux counts in KiB
