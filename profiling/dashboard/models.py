"""Another model for everybody, chosen while the page is served."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flora.engine.device import apart
from flora.errors import ModelError, RequestError
from flora.models import KNOWN_MODELS
from flora.names import public_name
from profiling.dashboard.device import Device, in_line
from profiling.dashboard.engines import Engines
from profiling.dashboard.policy import Visitor
from profiling.loading import load_chosen

UPDATE_S = 0.5
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("no", "int8", "nf4")
WEIGHTS = ("pretrained", "random")
MAX_NAME_CHARACTERS = 300
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class ModelDesk:
    """Loads the models that visitors choose, one after another, in the comparisons' line for the device.

    In that line nothing is timed while a model is being loaded, and no comparison has an engine that is replaced. options: of the
    app's command line, which says where models run and what the page was started with.
    """

    def __init__(self, engines: Engines, device: Device, options: argparse.Namespace) -> None:
        self.engines, self._device, self._options = engines, device, options

    def choices(self) -> list[tuple[str, str]]:
        """Words and value of what a menu offers; any hub id or folder may be given besides."""
        known: list[tuple[str, str]] = []
        for kind in self.engines:
            started = getattr(self._options, f"{kind}_model")
            known.append((f"embedded {kind} model", f"embedded:{kind}"))
            if started is not None:
                known.append((f"{public_name(started)}, as started", f"as started:{kind}"))
        return known + [(name, name) for name in KNOWN_MODELS]

    def load(self, visitor: Visitor, name: str | None, quantize: str, dtype: str, weights: str) -> Iterator[str]:
        """Load a model and let it serve instead of the one of its kind; yields words on how far it is, at last on how it went.

        One "as started" is loaded with the command line's own quantisation, dtype and weights, whatever is chosen here.
        Raises PermissionRefused, or the FloraError that says what is wrong; the old model then goes on.
        """
        visitor.require("models")
        name, kind, label = self._named(visitor, (name or "").strip())
        for value, offered, words in (
            (quantize, QUANTIZATIONS, "quantisation"),
            (dtype, DTYPES, "dtype"),
            (weights, WEIGHTS, "weights"),
        ):
            if value not in offered:
                raise RequestError(f"there is no such {words}: choose among {', '.join(offered)}")
        given = {"quantize": None if quantize == "no" else quantize, "dtype": dtype, "weights": weights}
        if quantize != "int8":
            given["llm_int8_threshold"] = None  # the command line's is one of 8-bit weights
        options = argparse.Namespace(**vars(self._options) | ({} if name == "as started" else given))
        outcome = _Outcome()

        def job() -> Iterator[Any]:
            self._replace(name, kind, options, outcome)
            return iter(())

        run = self._device.start(job)
        try:
            started_s = time.monotonic()
            while not run.done:
                if not run.begun:
                    ahead, started_s = self._device.num_ahead(run), time.monotonic()
                    yield in_line(ahead)
                elif outcome.engine is None:
                    yield f"loading {label}, {time.monotonic() - started_s:.0f} s so far; the old model serves meanwhile"
                else:
                    yield f"{label} serves; the old model's last requests may finish"
                run.fetch(UPDATE_S)
        finally:  # also when the browser has gone: what has not begun need not
            run.abandoned = True
        if run.error is not None:
            raise run.error
        if outcome.engine is None:
            raise RequestError("the server is going down: try again later")
        yield outcome.words(label)

    def _named(self, visitor: Visitor, name: str) -> tuple[str, str | None, str]:
        """What `load_chosen` takes for it, and what it is called to everybody."""
        if not name or len(name) > MAX_NAME_CHARACTERS or "\0" in name:
            raise RequestError("choose a model, or give a hub id such as bigcode/starcoderbase-1b")
        known = {value: words for words, value in self.choices()}
        if name in known:
            which, _, kind = name.partition(":")
            return which, kind or None, known[name]
        if "folders" in visitor.rights:
            return name, None, name if _HUB_ID.fullmatch(name) else Path(name).name
        if not _HUB_ID.fullmatch(name):
            visitor.require("folders")
        if Path(name).exists():  # told as if it were not, which is nobody's business
            raise ModelError(f"model {name} is not on the hub: check its name")
        return name, None, name

    def _replace(self, name: str, kind: str | None, options: argparse.Namespace, outcome: _Outcome) -> None:
        try:
            # Its own thread ends with it, and with that the team of threads that computes for it.
            engine = apart(lambda: load_chosen(name, kind, options))
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ModelError(
                "the model does not fit into the memory beside the one that serves: load the embedded one first, or quantise it"
            ) from error
        if engine.kind not in self.engines:
            engine.close()
            raise ModelError(f"{engine.name} is a {engine.kind} model, and this page was started without one")
        outcome.engine, outcome.kind = engine.name, engine.kind
        outcome.left = self.engines.replace(engine)
        outcome.adapters = len(engine.adapters)


class _Outcome:
    """What became of a model that was asked for."""

    def __init__(self) -> None:
        self.engine: str | None = None
        self.kind = ""
        self.left: list[str] = []
        self.adapters = 0

    def words(self, label: str) -> str:
        adapters = f"{self.adapters} adapter{'s' if self.adapters != 1 else ''}"
        served = f"{label} is the {self.kind} model now, for everybody, with {adapters}"
        if not self.left:
            return f"{served}."
        listed = ", ".join(self.left[:10]) + (f" and {len(self.left) - 10:,} more" if len(self.left) > 10 else "")
        return f"{served}; could not be taken along: {listed}."
