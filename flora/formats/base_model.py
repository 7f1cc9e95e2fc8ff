"""Whether an adapter was made for the model it is to be served with, as far as names can tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from flora.errors import AdapterError
from flora.formats.adapter import Adapter
from flora.models import KNOWN_MODELS


def require_base_model(tag: str, adapters: Sequence[Adapter], model_names: Iterable[str]) -> None:
    """Raise AdapterError where an adapter says that it was made for another model than any of these names.

    A model has many names: a short one, a hub id, a folder on the machine it was trained on. What is compared is the last part of
    each, as `short_name` tells it. An adapter that names no model passes.
    """
    engine_names = {short_name(name).lower(): name for name in model_names}
    for adapter in adapters:
        made_for = short_name(adapter.base_model or "")
        if made_for and made_for.lower() not in engine_names:
            served = short_name(next(iter(engine_names.values()), "another"))
            raise AdapterError(
                f"adapter {tag!r} was made for the base model {made_for[:80]!r} and this engine serves {served!r}: if both have "
                "the same weights, correct base_model_name_or_path in its adapter_config.json, or add it with "
                "check_base_model=False (--any-base-model, or the box in the page)"
            )


def short_name(name: str) -> str:
    """The last part of a model's hub id or path, of whatever system and in the hub's cache too; empty where it tells nothing."""
    parts = [part for part in re.split(r"[/\\]+", name.strip()) if part not in ("", ".", "..")]
    cached = [part for part in parts if part.startswith("models--")]  # models--owner--name/snapshots/revision
    last = cached[-1].rpartition("--")[2] if cached else parts[-1] if parts else ""
    return KNOWN_MODELS.get(last.lower(), last).rpartition("/")[2]
