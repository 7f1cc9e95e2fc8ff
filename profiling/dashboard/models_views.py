"""How the *Models* tab says what serves and what is added: engines in, values of the page's live components out. No gradio."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from flora.bank import AdapterInfo
from flora.engine import Engine
from flora.names import public_name
from profiling.dashboard.live_cells import cells_value
from profiling.dashboard.policy import Visitor

MAX_ROWS = 50  # of the table; of more adapters, those that the filter finds first
_NOTHING = "–"
_TYPES = {"FLORA": "fLoRA", "LORA": "LoRA", "HIRA": "HiRA"}
_FAMILIES = {"flora": "multiplies", "lora": "adds"}
_FACTS = {
    "parameters": "parameters",
    "layers": "layers adapted",
    "dtype": "dtype",
    "quantised": "quantised",
    "device": "device",
    "weights": "weights",
    "adapters": "adapters",
}


# ----------------------------------------------------------------------------------------------------------- the models


def model_template(kind: str) -> str:
    """The place of one model's facts."""
    facts = "".join(f'<div><dt>{words}</dt><dd data-cell="{name}">{_NOTHING}</dd></div>' for name, words in _FACTS.items())
    name = '<p class="model-name"><b data-cell="name"></b> <span data-cell="architecture"></span></p>'
    return f'<h2 class="panel-title">{kind} model</h2>{name}<dl class="model-facts">{facts}</dl>'


def model(engine: Engine) -> dict[str, Any]:
    """What one engine is and holds."""
    adapters = engine.adapters
    device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else engine.device.type.upper()
    size = sum(info.size_bytes for info in adapters.values())
    facts = {
        "name": "embedded" if engine.name == engine.kind else public_name(engine.name),  # their folders are called by their kinds
        "architecture": type(engine.model).__name__,
        "parameters": count(engine.model.num_parameters()),
        "layers": f"{len(engine.bank.layers):,}",
        "dtype": str(engine.dtype).removeprefix("torch."),
        "quantised": quantisation(engine) or "no",
        "device": device,
        "weights": num_bytes(engine.model.get_memory_footprint()),
        "adapters": f"{len(adapters):,}" + (f", {num_bytes(size)}" if adapters else ""),
    }
    return cells_value({name: html.escape(words) for name, words in facts.items()})


def quantisation(engine: Engine) -> str | None:
    """ "int8", "nf4" or whatever else its weights were loaded as; None for weights as they are."""
    config = getattr(engine.model.config, "quantization_config", None)
    if config is None:
        return None
    facts: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    if facts.get("load_in_8bit"):
        return "int8"
    return str(facts.get("bnb_4bit_quant_type")) if facts.get("load_in_4bit") else str(facts.get("quant_method"))


def count(number: int) -> str:
    """A large number as "7.1 M" or "15.5 B"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def num_bytes(number: int) -> str:
    """Bytes as "412 kB", "28.3 MB" or "31 GB"."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} bytes"


# --------------------------------------------------------------------------------------------------------- the adapters

TABLE_TEMPLATE = (
    '<p class="table-count" data-cell="count"></p>'
    '<div class="table-scroll" data-cell="table" tabindex="0" role="region" aria-label="adapters"></div>'
)
_HEAD = (
    ("tag", "what requests call it", ""),
    ("model", "the kind of model that it is for", ""),
    ("type", "what its checkpoint calls itself: fLoRA, IA3 and HiRA multiply the weights, LoRA adds to them", ""),
    ("rank", "the largest over its layers", "number"),
    ("layers", "that it changes", "number"),
    ("size", "of its numbers, as they are served", "number"),
    ("made for", "the base model that its checkpoint names", ""),
    ("requests", "that were admitted with it since it was added", "number"),
)


def table(
    engines: Mapping[str, Engine],
    wanted: str = "",
    first: Sequence[tuple[str, str]] = (),
    may_remove: Callable[[str, str], bool] = lambda kind, tag: False,
) -> dict[str, Any]:
    """The adapters whose tags contain `wanted`, `MAX_ROWS` of them at most. first: kind and tag of those that stand at the top.

    may_remove: whether a kind's tag is for this visitor to remove.
    """
    wanted = wanted.strip().lower()
    infos = {(kind, tag): info for kind, engine in engines.items() for tag, info in engine.adapters.items()}
    counters = {kind: engine.bank.counters() for kind, engine in engines.items()}
    ordered = dict.fromkeys([*(one for one in first if one in infos), *infos])
    found = [(kind, tag) for kind, tag in ordered if wanted in tag.lower()]
    total, rows = len(infos), []
    for kind, tag in found[:MAX_ROWS]:
        if (its := counters[kind].get(tag)) is not None:  # else it has just been removed
            rows.append(_row(kind, tag, infos[kind, tag], its.hits + its.misses, may_remove(kind, tag)))
    if not rows:
        body = f'<p class="nothing">{"No tag contains that." if wanted else "There are no adapters yet: add one."}</p>'
    else:
        head = "".join(f'<th scope="col" class="{sort}"><abbr title="{title}">{name}</abbr></th>' for name, title, sort in _HEAD)
        head = f'<thead><tr>{head}<th scope="col"><span class="sr-only">remove</span></th></tr></thead>'
        body = f'<table class="adapters">{head}<tbody>{"".join(rows)}</tbody></table>'
    words = f"{total:,} adapter{'s' if total != 1 else ''}"
    if wanted:
        words = f"{len(found):,} of {words}"
    if len(found) > MAX_ROWS:
        words += f", the first {MAX_ROWS} shown: filter by tag for others"
    return cells_value({"count": words, "table": body})


def _row(kind: str, tag: str, info: AdapterInfo, requests: int, removable: bool) -> str:
    name = html.escape(tag)
    remove = (
        f'<button class="quiet-button" data-trigger="select" data-kind="{kind}" data-tag="{name}" data-confirm="for everybody?" '
        f'aria-label="remove {name}">remove</button>'
        if removable
        else ""
    )
    cells = [
        kind,
        _together(types(info)),
        _together(str(info.ranks[family]) for family in info.families),
        _together(str(info.layers[family]) for family in info.families),
        num_bytes(info.size_bytes),
        _together(bases(info)),
        f"{requests:,}",
    ]
    columns = "".join(f'<td class="{sort}">{cell}</td>' for cell, (_, _, sort) in zip(cells, _HEAD[1:], strict=True))
    return f'<tr><th scope="row"><code>{name}</code></th>{columns}<td>{remove}</td></tr>'


def types(info: AdapterInfo) -> list[str]:
    """Of each checkpoint, its PEFT type as people write it; for one that was read from none, how it acts."""
    return [
        _TYPES.get(peft_type, peft_type) if peft_type else _FAMILIES[family]
        for family, peft_type in zip(info.families, info.peft_types, strict=True)
    ]


def bases(info: AdapterInfo) -> list[str]:
    """What the checkpoints say they were made for, as far as that is anybody's business."""
    return [public_name(base)[:80] if isinstance(base, str) and base else _NOTHING for base in info.base_models]


def _together(words: Iterator[str] | list[str]) -> str:
    """One word where all are alike, else all of them."""
    return html.escape(", ".join(dict.fromkeys(words)))


# --------------------------------------------------------------------------------------------------------------- status

STATUS_TEMPLATE = (
    '<div class="status idle" data-cell="status"><div class="track"><div class="bar"></div></div>'
    '<div class="words" data-cell="words" role="status" aria-live="polite"></div></div>'
)


TABLE_STATUS_TEMPLATE = '<div class="status" data-cell="status"><p class="words" data-cell="words" role="status"></p></div>'


def status(state: str, words: str) -> dict[str, Any]:
    """state: idle | running | done | failed."""
    return cells_value({"words": html.escape(words)}, {"status": f"status {state}"})


def added(kind: str, tag: str, info: AdapterInfo) -> str:
    """That an adapter is there, and what it is, in a sentence."""
    kinds = " and ".join(types(info))
    layers = " and ".join(dict.fromkeys(str(info.layers[family]) for family in info.families))
    ranks = " and ".join(dict.fromkeys(str(info.ranks[family]) for family in info.families))
    facts = f"{kinds}, rank {ranks}, {layers} layers, {num_bytes(info.size_bytes)}"
    return f"Added {tag}, {facts}: it is in every menu of the {kind} model."


RIGHTS_TEMPLATE = '<p class="rights" data-cell="rights"></p>'


def rights(visitor: Visitor, stay_s: float) -> dict[str, Any]:
    """What is switched off for the visitor, how it is switched on, and for how long what such a visitor adds stays."""
    off = visitor.refusals
    if not off:
        return cells_value({"rights": ""})
    switch = "all" if not visitor.rights else " ".join([*visitor.ordered, *off])
    words = f"Switched off here: {html.escape('; '.join(off.values()))}. Whoever runs this page switches all of it on with"
    words += f" <code>--allow {switch}</code>, or only some of it."
    if "manage" in off and visitor.rights & {"upload", "hub", "folders"}:
        words += f" What you add is yours to remove, and stays while your page is open, for {stay_s / 3600:g} h at most."
    return cells_value({"rights": words})
