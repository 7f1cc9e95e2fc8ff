"""The engines that serve now. Whoever asks for one gets the current one, so nothing may keep an engine longer than it uses it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Mapping

import torch

from flora.engine import Engine
from flora.errors import AdapterError

FINISH_S = 10.0  # how long the requests of an engine that was replaced may still run


class Engines(Mapping[str, Engine]):
    """kind ("code", "speech") → its engine. The kinds stay; the engines, and their adapters, may change at any moment.

    number: grows with every change, so that a page can tell whether what it shows is still true. changing: held by whoever
    changes something; an adapter that is added while its engine is replaced would be lost.
    """

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = dict(engines)
        self._listeners: list[Callable[[str], None]] = []
        self.changing = threading.RLock()
        self.number = 0

    def __getitem__(self, kind: str) -> Engine:
        return self._engines[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._engines)

    def __len__(self) -> int:
        return len(self._engines)

    def changed(self) -> None:
        """An adapter was added or removed."""
        with self.changing:
            self.number += 1

    def when_replaced(self, listener: Callable[[str], None]) -> None:
        """From now on call the listener with the kind of every engine that was replaced, before the old one is closed."""
        self._listeners.append(listener)

    def replace(self, engine: Engine) -> list[str]:
        """Let `engine` serve its kind, with those of the old engine's adapters that fit it; the tags of the others.

        Requests of the old engine may finish for `FINISH_S`, then they fail by name. Its memory is free when this returns, as
        far as nobody holds it otherwise.
        """
        with self.changing:
            old = self._engines[engine.kind]
            left = _take_along(old, engine)
            self._engines[engine.kind] = engine
            self.number += 1
        for listener in self._listeners:
            listener(engine.kind)
        old.close(FINISH_S)
        del old
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return left


def _take_along(old: Engine, new: Engine) -> list[str]:
    """Add the old engine's adapters to the new one, except tags that it has; those that do not fit."""
    left = []
    present = new.adapters
    for tag, info in old.adapters.items():
        if tag not in present:
            try:
                new.add_adapter(tag, info.sources, check_base_model=not info.any_base_model)
            except AdapterError:
                left.append(tag)
    return left
