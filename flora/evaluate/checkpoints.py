"""Which adapters are judged: those that ship, or those a command line names, by language and method."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flora.errors import AdapterError
from flora.evaluate.rows import METHODS
from flora.formats import CONFIG_FILE
from flora.names import PROJECT

SERVED_BY = {"base": "flora", "ia3": "flora", "flora": "flora", "lora": "bmm-lora"}
"""Method of an adapter → the engine's method that serves it. The base model is a row without adapter in a batch of any method."""


@dataclass(frozen=True)
class Checkpoint:
    """An adapter to judge: the language and method it was trained for, and its folder or hub id."""

    language: str
    method: str
    source: str

    @property
    def name(self) -> str:
        """What the engine calls it: a tag of its own, since a tag holds one checkpoint of each family."""
        return f"{self.language}/{self.method}"


def shipped_model(task: str) -> Path:
    """The embedded base model of "code" or "speech"."""
    return PROJECT / "assets" / "models" / task


def shipped_adapters(task: str) -> Path:
    """The folder of the adapters that ship for "code" or "speech": TAG/METHOD."""
    return PROJECT / "assets" / "adapters" / task


def find_checkpoints(folder: str | Path, languages: Iterable[str], methods: Sequence[str]) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints `folder`/LANGUAGE/METHOD that are there, and the names, LANGUAGE/METHOD, of those that are not."""
    found, missing = [], []
    for language in languages:
        for method in methods:
            if method == "base":
                continue
            place = Path(folder) / language / method
            if (place / CONFIG_FILE).is_file():
                found.append(Checkpoint(language, method, str(place)))
            else:
                missing.append(f"{language}/{method}")
    return found, missing


def given_checkpoints(entries: Sequence[str]) -> list[Checkpoint]:
    """The adapters that a command line names as TAG=FOLDER, or TAG/METHOD=FOLDER where the method is not to be read from it.

    AdapterError for another form, an unknown method, or two adapters of one language and method.
    """
    checkpoints: dict[str, Checkpoint] = {}
    for entry in entries:
        tag, equals, source = entry.partition("=")
        language, slash, method = tag.partition("/")
        if not (language and equals and source) or (slash and not method):
            raise AdapterError(f"an adapter is given as TAG=FOLDER or TAG/METHOD=FOLDER, not {entry!r}")
        method = method or _method_of(source)
        if method not in METHODS[1:]:
            raise AdapterError(f"adapter {tag}: the method {method!r} is unknown; methods are {', '.join(METHODS[1:])}")
        checkpoint = Checkpoint(language, method, source)
        if checkpoint.name in checkpoints:
            raise AdapterError(f"there are two adapters {checkpoint.name}: give one for each language and method")
        checkpoints[checkpoint.name] = checkpoint
    return list(checkpoints.values())


def _method_of(source: str) -> str:
    """ia3, lora or flora, as the checkpoint's configuration says."""
    path, name = Path(source) / CONFIG_FILE, Path(source).name
    if not path.is_file():
        raise AdapterError(f"adapter {name} has no {CONFIG_FILE} here; name its method, TAG/METHOD={name}, where it is on the hub")
    try:
        return json.loads(path.read_text(encoding="utf-8"))["peft_type"].lower()
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"adapter {name}: {CONFIG_FILE} does not say its peft_type; save the adapter again with PEFT") from error
