"""The engines that a command line asks for: `--code-model`, `--code-adapters` and their like, by default what ships; adapters that
find the engine they fit; and random ones, where more are wanted than there are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from flora.bank import AdapterInfo
from flora.engine import Engine
from flora.engine.device import apart
from flora.errors import AdapterError, ModelError, RequestError
from flora.formats import Adapter, read_adapter
from flora.models import KNOWN_MODELS
from flora.names import public_name
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
    if adapters:
        engine_options["check_base_model"] = not options.any_base_model
    engine = _load(model or embedded, adapters, options, **engine_options)
    if engine.kind != kind:
        raise ModelError(f"--{kind}-model names the {engine.kind} model {engine.name!r}: give a {kind} model")
    return _with_random_adapters(engine, options) if with_adapters else engine


def source_of(engine: Engine) -> str:
    """What loads the model of this engine again, wherever that is done: its folder, seen from anywhere, or its name or hub id."""
    given = engine.model.name_or_path
    is_folder = bool(given) and Path(given).is_dir() and engine.name not in KNOWN_MODELS
    return str(Path(given).resolve()) if is_folder else engine.name


def load_chosen(name: str, kind: str | None, options: argparse.Namespace) -> Engine:
    """The engine of a model that was chosen while another serves: "embedded" or "as started" of a kind, with its adapters, or a
    short name, hub id or folder of any kind, without. options: as for `load_engine`."""
    if name in ("embedded", "as started"):
        model = {f"{kind}_model": None, f"{kind}_adapters": None} if name == "embedded" else {}
        return load_engine(kind, argparse.Namespace(**vars(options) | model))
    return _with_random_adapters(_load(name, {}, options), options)


def _load(name: str | Path, adapters: Mapping, options: argparse.Namespace, **engine_options) -> Engine:
    return Engine.from_pretrained(
        name,
        adapters,
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        weights=options.weights,
        llm_int8_threshold=options.llm_int8_threshold,
        **engine_options,
    )


def _with_random_adapters(engine: Engine, options: argparse.Namespace) -> Engine:
    """Random weights that came without adapters get random ones, under the languages' tags: speed can be measured with them."""
    if options.weights == "random" and not engine.adapters:
        languages = workload.languages(engine.kind)
        add_random_adapters(engine, len(languages), RANDOM_RANK, FAMILY, tags=languages)
    return engine


def kind_that_fits(engines: Mapping[str, Engine], adapter: Adapter, tag: str) -> str:
    """The kind of the engine that has the adapter's layers; AdapterError where none has. Their shapes are the engine's to check."""
    for kind, engine in engines.items():
        if adapter.factors.keys() & engine.bank.layers.keys():
            return kind
    models = " and ".join(f"the {kind} model {public_name(engine.name)}" for kind, engine in engines.items())
    layer = next(iter(adapter.factors), "none")
    raise AdapterError(f"adapter {tag!r} does not fit {models}: it was made for another one, with layers such as {layer[:100]}")


def add_checkpoint(engine: Engine, tag: str, source: str | Path, family: str, any_base_model: bool = False) -> AdapterInfo:
    """Add a checkpoint of this family to a tag, beside the tag's checkpoint of the other family, in place of one of its own.

    any_base_model: take it whatever model it says it was made for; so is one beside a checkpoint that was taken like that.
    Raises AdapterError, and leaves the tag as it was, where it does not fit.
    """
    present = engine.adapters.get(tag)
    beside = [] if present is None else [one for one, its in zip(present.sources, present.families, strict=True) if its != family]
    unchecked = any_base_model or (bool(beside) and present.any_base_model)
    return engine.add_adapter(tag, [*beside, source], check_base_model=not unchecked)


def add_where_it_fits(engines: Mapping[str, Engine], entries: Iterable[str], any_base_model: bool = False) -> None:
    """Add each TAG=SOURCE of a command line's `--adapters` to the engine that it fits. any_base_model: as in `add_checkpoint`."""
    for tag, sources in workload.given_adapters(list(entries)).items():
        for source in sources:
            adapter = apart(partial(read_adapter, source))
            add_checkpoint(engines[kind_that_fits(engines, adapter, tag)], tag, source, adapter.family, any_base_model)


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
