"""What the driver says of a GPU: its version, clocks, power and temperature, which tell two runs on cards of one name apart."""

from __future__ import annotations

import subprocess

import torch

ASKED = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "max_sm_clock_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
}
"""What rows call it → what nvidia-smi calls it."""
PATIENCE_S = 10.0


def board_facts(device: torch.device) -> dict[str, str | float]:
    """At this moment; empty on a CPU, and without what nvidia-smi does not tell or where there is no nvidia-smi."""
    if device.type != "cuda":
        return {}
    card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={card}", f"--query-gpu={','.join(ASKED.values())}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return read_board(said)


def read_board(said: str) -> dict[str, str | float]:
    """From nvidia-smi's line; what it puts in brackets, such as [N/A], is left out."""
    words = [word.strip() for word in said.strip().split(",")]
    if len(words) != len(ASKED):
        return {}
    found: dict[str, str | float] = {}
    for name, word in zip(ASKED, words, strict=True):
        if name == "driver":
            found[name] = word
            continue
        try:
            found[name] = float(word)
        except ValueError:
            continue
    return found
