"""The engines that a command line asks for: `--code-model`, `--code-adapters` and their like, by default what ships; and random
adapters, where more are wanted than there are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from flora.engine import Engine
from flora.engine.device import apart
from flora.errors import ModelError, RequestError
from flora.formats import Adapter
from flora.ops import FAMILY
from flora.random_adapters import FAMILIES, RandomAdapters
from profiling import workload

RANDOM_RANK = 4
"""Of random adapters that nobody asked another rank of."""


def set_threads(threads: int | None) -> None:
    """Torch's CPU threads, from `--threads`; RequestError for fewer than one."""
    if threads is not None:
        if threads < 1:
            raise RequestError("--threads must be at least 1")
        torch.set_num_threads(threads)


def load_engine(kind: str, options: argparse.Namespace, with_adapters: bool = True, **engine_options) -> Engine:
    """The engine of a kind with its adapters; engine_options: more arguments of `Engine.from_pretrained`.

    A model of one's own comes without the adapters that ship; one with random weights, for which none are given, with random ones
    under the languages' names. Raises ModelError where the model is of another kind.
    """
    model, embedded = getattr(options, f"{kind}_model"), workload.ASSETS / "models" / kind
    if model is None or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # the models that ship load in a blink
    adapters = {}
    if with_adapters and (given := getattr(options, f"{kind}_adapters")):
        adapters = workload.given_adapters(given)
    elif with_adapters and (model is None or Path(model).resolve() == embedded):
        adapters = workload.discover_adapters(workload.ASSETS / "adapters" / kind)
    engine = Engine.from_pretrained(
        model or embedded,
        adapters,
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        weights=options.weights,
        llm_int8_threshold=options.llm_int8_threshold,
        **engine_options,
    )
    if engine.kind != kind:
        raise ModelError(f"--{kind}-model names the {engine.kind} model {engine.name!r}: give a {kind} model")
    if with_adapters and not adapters and options.weights == "random":
        languages = workload.languages(kind)
        add_random_adapters(engine, len(languages), RANDOM_RANK, FAMILY, tags=languages)
    return engine


def add_random_adapters(
    engine: Engine,
    count: int,
    rank: int,
    methods: Iterable[str],
    seed: int = 0,
    folder: Path | None = None,
    tags: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Register `count` random adapters of a rank, each with all that the methods serve; their tags.

    tags: what to call them; None: random-r4-0000 and so on. folder: write them there as PEFT checkpoints, from which the engine
    reads them again where host memory does not hold them all; without, they are made again then. Raises AdapterError where the
    folder cannot be written to.
    """
    families = {FAMILY[method] for method in methods} - {None} or {"flora"}
    names = tuple(f"random-r{rank}-{number:04}" for number in range(count)) if tags is None else tuple(tags)

    def register() -> None:
        rows = [RandomAdapters(engine.bank.layers, family, rank, seed) for family in FAMILIES if family in families]
        written = [] if folder is None else [list(row.write(folder, count).values()) for row in rows]
        for number, tag in enumerate(names):
            if folder is None:
                make = partial(_made, rows, number)
                engine.bank.add(tag, make(), reload=make)
            else:
                engine.add_adapter(tag, [paths[number] for paths in written])

    apart(register)
    return names


def _made(rows: list[RandomAdapters], number: int) -> list[Adapter]:
    return [row.adapter(number) for row in rows]
