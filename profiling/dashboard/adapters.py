"""Adapters that visitors add to the engines and remove again: who may, how many, from where, and what is left of them on disk."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from flora.bank import AdapterInfo
from flora.engine import Engine
from flora.engine.device import apart
from flora.errors import AdapterError, CheckpointError, RequestError, UnknownAdapterError
from flora.formats import CONFIG_FILE, PICKLE_FILES, WEIGHTS_FILE, Adapter, read_adapter
from profiling.dashboard.engines import Engines
from profiling.dashboard.policy import PermissionRefused, Visitor
from profiling.dashboard.uploads import MAX_UPLOAD_BYTES, check_config, check_header, unpack
from profiling.loading import add_checkpoint, kind_that_fits

MAX_ADDED = 128  # adapters of all visitors together
MAX_ADDED_BYTES = 1 << 30
MAX_RANK = 128  # of what is uploaded or fetched from the hub
MAX_SLOT_BYTES = 4 << 30  # of the device, for slots as wide as the ranks of all visitors' adapters
MAX_OF_ONE_VISITOR = 8
MAX_AT_ONCE = 3  # that are read and checked at once
STAY_S = 3600.0  # how long the adapters stay of visitors that may not manage others'
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_INDEX = re.compile(r"#\d{1,9}$")  # which one, of a checkpoint that holds several
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


Ranks = dict[tuple[str, str], int]
"""(family, layer) → rank."""


@dataclass(frozen=True)
class Added:
    """What a visitor added under a tag. folders: of ours, with the files of its checkpoints; they go when it goes."""

    session: str | None
    folders: tuple[Path, ...]
    size_bytes: int
    ranks: Ranks
    until_s: float | None  # on time.monotonic; None: it stays


class AdapterDesk:
    """Where visitors hand in adapters. It writes only into a folder of its own, which is gone after `close`."""

    def __init__(self, engines: Engines) -> None:
        self.engines = engines
        self._folder = tempfile.TemporaryDirectory(prefix="flora-live-adapters-")
        self._added: dict[tuple[str, str], Added] = {}  # (kind, tag) →
        self._coming: dict[str, str | None] = {}  # tag → the session that adds it at this moment
        self._ranks: dict[str, Ranks] = {}  # kind → the largest that came since its engine did: slots never shrink
        self._lock = threading.Lock()
        engines.when_replaced(self._forget_left)

    # --------------------------------------------------------------------------------------------------------- adding

    def upload(
        self, visitor: Visitor, tag: str, files: Sequence[Path], any_base_model: bool = False
    ) -> tuple[str, AdapterInfo]:
        """Add what was uploaded, as `uploads.unpack` takes it; the kind of model that it fits, and what it is.

        any_base_model: take it whatever model it says it was made for.
        Raises PermissionRefused, RequestError, CheckpointError or AdapterError, each in one sentence without a path of ours.
        """
        visitor.require("upload")
        with self._place(visitor, tag), self._new_folder(tag, "uploaded") as folder:  # what errors and commands call it
            unpack(files, folder)
            return self._add(visitor, tag, folder, any_base_model)

    def from_hub(self, visitor: Visitor, tag: str, name: str, any_base_model: bool = False) -> tuple[str, AdapterInfo]:
        """Add a checkpoint of the hub, owner/name. It is kept with the uploads, and not in the hub's cache."""
        visitor.require("hub")
        name = (name or "").strip()
        if not _HUB_ID.fullmatch(name):
            raise CheckpointError("a hub id is owner/name, such as bigcode/starcoder-lora")
        with self._place(visitor, tag), self._new_folder(*name.split("/")) as folder:
            # Whoever may manage the page is its owner, and may use its owner's login.
            _download(name, folder, token=None if "manage" in visitor.rights else False)
            check_config(folder / CONFIG_FILE)
            check_header(folder / WEIGHTS_FILE)
            return self._add(visitor, tag, folder, any_base_model)

    def from_folder(self, visitor: Visitor, tag: str, folder: str, any_base_model: bool = False) -> tuple[str, AdapterInfo]:
        """Add a checkpoint from a folder of the server, which stays where it is."""
        visitor.require("folders")
        place = os.path.expanduser((folder or "").strip())
        if not place:
            raise CheckpointError(f"name the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
        if not os.path.isdir(place) and not os.path.isdir(_INDEX.sub("", place)):
            raise CheckpointError("there is no such folder on the server")
        with self._place(visitor, tag):
            return self._add(visitor, tag, Path(place).absolute(), any_base_model)

    @contextmanager
    def _place(self, visitor: Visitor, tag: str) -> Iterator[None]:
        """During this context, the tag is the visitor's to add; an error where it may not be."""
        self.sweep()
        if not isinstance(tag, str) or not _TAG.fullmatch(tag):
            raise RequestError("a tag has 1 to 40 letters, digits, dots, dashes and underscores, and begins with a letter or digit")
        with self._lock:
            if tag in self._coming:
                raise RequestError(f"adapter {tag} is being added at this moment: choose another tag")
            self._check_replaces(visitor, tag)
            self._check_room(visitor)
            self._coming[tag] = visitor.session
        try:
            yield
        finally:
            with self._lock:
                del self._coming[tag]

    @contextmanager
    def _new_folder(self, *parts: str) -> Iterator[Path]:
        """An empty folder of ours that ends in these parts; it is removed where what happens in this context fails."""
        ours = Path(tempfile.mkdtemp(dir=self._folder.name))
        try:
            folder = ours.joinpath(*parts)
            folder.mkdir(parents=True)
            yield folder
        except BaseException:
            shutil.rmtree(ours, ignore_errors=True)
            raise

    def _check_replaces(self, visitor: Visitor, tag: str) -> None:
        for kind, engine in self.engines.items():
            if tag in engine.adapters and not self.may_remove(visitor, kind, tag):
                raise PermissionRefused(f"there is an adapter {tag} already, and it is not yours: choose another tag")

    def _check_room(self, visitor: Visitor) -> None:
        if len(self._added) + len(self._coming) >= MAX_ADDED:
            raise RequestError(f"visitors have added {MAX_ADDED} adapters, and there is room for no more: remove one, or try later")
        own = sum(one.session == visitor.session for one in self._added.values())
        own += sum(session == visitor.session for session in self._coming.values())
        if "manage" not in visitor.rights and own >= MAX_OF_ONE_VISITOR:
            raise RequestError(f"you have added {MAX_OF_ONE_VISITOR} adapters, and that is all a visitor may: remove one first")

    def _add(self, visitor: Visitor, tag: str, source: Path, any_base_model: bool) -> tuple[str, AdapterInfo]:
        adapter = apart(partial(read_adapter, source))
        sent = source.is_relative_to(self._folder.name)
        if sent and adapter.rank > MAX_RANK + (adapter.peft_type == "HIRA"):  # which has one more component
            raise AdapterError(f"adapter {tag} has rank {adapter.rank:,}, and one that is sent here may have {MAX_RANK} at most")
        kind = kind_that_fits(self.engines, adapter, tag)
        engine = self.engines[kind]
        size = adapter.num_parameters * engine.dtype.itemsize
        with self._lock:
            if size + sum(one.size_bytes for one in self._added.values()) > MAX_ADDED_BYTES:
                raise AdapterError(
                    f"visitors' adapters may take {MAX_ADDED_BYTES >> 20} MiB together, and this is too much: remove another first"
                )
        with self.engines.changing:
            if self.engines[kind] is not engine:
                raise RequestError(f"the {kind} model was replaced at this moment: add the adapter again")
            self._check_replaces(visitor, tag)  # a model may have brought a tag along
            ranks = _ranks(adapter) if sent else {}
            widest = _widest([self._ranks.get(kind, {}), ranks])
            if ranks and _slot_bytes(engine, widest) > MAX_SLOT_BYTES:
                raise AdapterError(
                    f"the slots of visitors' adapters may take {MAX_SLOT_BYTES >> 20} MiB of the {kind} model's device, and with "
                    f"{tag} they would take more: give a smaller rank, or whoever runs this page adds it with --adapters"
                )
            info = add_checkpoint(engine, tag, source, adapter.family, any_base_model)
            self.engines.changed()
            self._ranks[kind] = widest
            self._keep(visitor, kind, tag, info, ranks)
        return kind, info

    def _keep(self, visitor: Visitor, kind: str, tag: str, info: AdapterInfo, ranks: Ranks) -> None:
        """Remember whose it is, which of our folders it needs, and how wide its slot is."""
        ours = Path(self._folder.name)
        needed = {ours / Path(one).relative_to(ours).parts[0] for one in info.sources if Path(one).is_relative_to(ours)}
        until_s = None if "manage" in visitor.rights else time.monotonic() + STAY_S
        with self._lock:
            before = self._added.get((kind, tag))
            session = visitor.session if before is None else before.session
            ranks = _widest([ranks, {} if before is None else before.ranks])
            self._added[kind, tag] = Added(session, tuple(needed), info.size_bytes, ranks, until_s)
        for folder in () if before is None else set(before.folders) - needed:
            shutil.rmtree(folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------------- removing

    @property
    def added_by_visitors(self) -> list[tuple[str, str]]:
        """Kind and tag of each, the newest first."""
        return list(reversed(self._added))

    def may_remove(self, visitor: Visitor, kind: str, tag: str) -> bool:
        """Whether it is the visitor's own, or the visitor may manage all."""
        added = self._added.get((kind, tag))
        own = added is not None and added.session is not None and added.session == visitor.session
        return own or "manage" in visitor.rights

    def remove(self, visitor: Visitor, kind: str, tag: str) -> None:
        """Take an adapter away from everybody; requests that run with it finish with it."""
        if not isinstance(kind, str) or not isinstance(tag, str) or kind not in self.engines:
            raise RequestError(f"there is no model of that kind: {', '.join(self.engines)}")
        if tag not in self.engines[kind].adapters:
            raise UnknownAdapterError(f"there is no adapter {tag[:40]} of the {kind} model")
        if not self.may_remove(visitor, kind, tag):
            raise PermissionRefused(f"adapter {tag} is not yours to remove: whoever runs this page allows it with --allow manage")
        self._remove(kind, tag)

    def _remove(self, kind: str, tag: str) -> None:
        with self.engines.changing:
            if tag in self.engines[kind].adapters:
                self.engines[kind].remove_adapter(tag)
            self.engines.changed()
            self._let_go(kind, tag)

    def _let_go(self, kind: str, tag: str) -> None:
        with self._lock:
            added = self._added.pop((kind, tag), None)
        for folder in () if added is None else added.folders:
            shutil.rmtree(folder, ignore_errors=True)

    def leave(self, session: str | None) -> None:
        """The visitor's page was closed: its adapters go, unless they were to stay."""
        for (kind, tag), added in list(self._added.items()):
            if added.session == session and added.until_s is not None:
                self._remove(kind, tag)

    def sweep(self) -> None:
        """Remove what has been here for long enough."""
        now = time.monotonic()
        for (kind, tag), added in list(self._added.items()):
            if added.until_s is not None and added.until_s < now:
                self._remove(kind, tag)

    def _forget_left(self, kind: str) -> None:
        """An engine was replaced: keep nothing of the adapters that did not go along."""
        present = self.engines[kind].adapters
        for its_kind, tag in list(self._added):
            if its_kind == kind and tag not in present:
                self._let_go(kind, tag)
        self._ranks[kind] = _widest([added.ranks for (its_kind, _), added in self._added.items() if its_kind == kind])

    def close(self) -> None:
        """Remove all files. The engines keep what they hold in memory."""
        self._folder.cleanup()


def _ranks(adapter: Adapter) -> Ranks:
    return {(adapter.family, layer): len(B if A is None else A) for layer, (A, B) in adapter.factors.items()}


def _widest(several: Iterable[Ranks]) -> Ranks:
    widest: Ranks = {}
    for ranks in several:
        widest |= {place: max(rank, widest.get(place, 0)) for place, rank in ranks.items()}
    return widest


def _slot_bytes(engine: Engine, ranks: Ranks) -> int:
    """What all slots of an engine take with room for these ranks; layers that it does not have are its own to refuse."""
    layers = engine.bank.layers
    numbers = sum(
        rank * (layers[layer].in_features + layers[layer].out_features) for (_, layer), rank in ranks.items() if layer in layers
    )
    return (engine.bank.num_slots + 1) * numbers * engine.bank.dtype.itemsize


def _download(name: str, folder: Path, token: bool | None) -> None:
    """The two files of a checkpoint, into a folder; CheckpointError where they are too large, or cannot be had."""
    fetch = partial(hf_hub_download, name, local_dir=folder, token=token)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            if fetch(file, dry_run=True).file_size > MAX_UPLOAD_BYTES:
                raise CheckpointError(f"adapter {name}: {file} has more than the {MAX_UPLOAD_BYTES // 1000**2} MB allowed")
            fetch(file)
        except GatedRepoError as error:
            raise CheckpointError(f"adapter {name} is gated: this page's owner has to accept its licence on the hub") from error
        except RepositoryNotFoundError as error:
            raise CheckpointError(f"adapter {name}: there is no such repository on the hub, or it is private") from error
        except (LocalEntryNotFoundError, ConnectionError) as error:
            raise CheckpointError(f"adapter {name}: the hub cannot be reached from here; upload the adapter's files") from error
        except EntryNotFoundError as error:
            raise CheckpointError(
                f"adapter {name} has no {file} on the hub; pickles such as {PICKLE_FILES[0]} are never loaded"
            ) from error
        except OSError as error:
            raise CheckpointError(f"adapter {name} cannot be had from the hub ({type(error).__name__}): try again later") from error
