"""Random adapters for models so large that each adapter takes seconds to make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from flora.bank import PreparedAdapter
from flora.engine import Engine
from flora.engine.device import apart
from flora.ops import FAMILY
from flora.random_adapters import FAMILIES, RandomAdapters
from flora.store import StoredAdapter


def add_random_copies(engine: Engine, count: int, rank: int, methods: Iterable[str], seed: int = 0) -> tuple[str, ...]:
    """As `profiling.loading.add_random_adapters`, but all tags have the same numbers: made once, in host memory once, in a slot of
    the device each. What a step costs does not depend on what an adapter holds.
    """
    families = {FAMILY[method] for method in methods} - {None} or {"flora"}
    tags = tuple(f"random-r{rank}-{number:04}" for number in range(count))

    def register() -> None:
        rows = [RandomAdapters(engine.bank.layers, family, rank, seed) for family in FAMILIES if family in families]
        first = engine.bank.prepare(tags[0], [row.adapter(0) for row in rows])
        for tag in tags:
            stored = StoredAdapter(tag, first.stored.packed, first.info.size_bytes, reload=None, digest=None)
            engine.bank.commit(PreparedAdapter(replace(first.info, name=tag), stored))

    apart(register)
    return tags
