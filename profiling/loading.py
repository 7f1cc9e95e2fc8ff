"""The engines that a command line asks for: `--code-model`, `--code-adapters` and their like, by default what ships."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from flora.engine import Engine
from flora.errors import ModelError, RequestError
from profiling import workload


def set_threads(threads: int | None) -> None:
    """Torch's CPU threads, from `--threads`; RequestError for fewer than one."""
    if threads is not None:
        if threads < 1:
            raise RequestError("--threads must be at least 1")
        torch.set_num_threads(threads)


def load_engine(kind: str, options: argparse.Namespace, **engine_options) -> Engine:
    """The engine of a kind with its adapters; engine_options: more arguments of `Engine.from_pretrained`.

    A model of one's own comes without the adapters that ship. Raises ModelError where the model is of another kind.
    """
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    model, given = getattr(options, f"{kind}_model"), getattr(options, f"{kind}_adapters")
    embedded = workload.ASSETS / "models" / kind
    is_embedded = model is None or Path(model).resolve() == embedded
    shipped = workload.discover_adapters(workload.ASSETS / "adapters" / kind) if is_embedded else {}
    adapters = workload.given_adapters(given) if given else shipped
    engine = Engine.from_pretrained(model or embedded, adapters, device=options.device, dtype=options.dtype, **engine_options)
    if engine.kind != kind:
        raise ModelError(f"--{kind}-model names the {engine.kind} model {engine.name!r}: give a {kind} model")
    return engine
