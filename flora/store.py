"""AdapterStore: the adapters below the device, in host memory as long as they fit and read again from disk where they do not.

An adapter is kept packed: one flat tensor per family, in the device's dtype, so that a slot is filled by few copies. What was
dropped from host memory comes back by a read in the background, on a thread that starts with the first of them and ends when it
has been idle for a while, or in place. What comes back must be what was added: it is compared by a digest of all its numbers.

Everything here may be called from any thread, and in a process that was forked.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from flora.errors import AdapterError, FloraError
from flora.formats import Adapter

Reload = Callable[[], Sequence[Adapter]]
"""Reads a tag's adapters again: what they were added as, one of each family."""


@dataclass
class AdapterCounters:
    """What happened to one tag since it was added; it goes on counting where the tag is replaced by another version."""

    hits: int = 0  # pins that found it in a slot
    misses: int = 0  # pins that had to copy it to a slot; hits + misses: all pins that were given a slot
    evictions: int = 0  # times it lost its slot to another adapter
    loads: int = 0  # times it was read from disk because host memory had dropped it; reads that failed are none
    load_s: float = 0.0  # seconds those reads took, in the background or not
    copy_s: float = 0.0  # seconds its copies to slots took on the calling thread; on a GPU they may end later


# ------------------------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True)
class PackedLayer:
    """What a packed adapter holds of one layer: A (rank, d_in), then B (rank, d_out), then what it adds to the bias (d_out,)."""

    layer: str
    rank: int
    size_A: int  # rank · d_in, or 0 for a side that is all ones
    size_B: int
    size_bias: int  # d_out, or 0 where nothing is added
    scales_bias: bool


@dataclass(frozen=True, eq=False)
class Layout:
    """What a packed adapter of one family holds, and where. Adapters that were made alike share one object, so that a thousand of
    them are described once and a batch of them is routed once."""

    family: str
    layers: tuple[PackedLayer, ...]
    ranks: dict[str, int] = field(init=False)  # by layer
    sizes: list[int] = field(init=False)  # of the sides that are not all ones and the added biases, in their order

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", {part.layer: part.rank for part in self.layers})
        sizes = [size for part in self.layers for size in (part.size_A, part.size_B, part.size_bias) if size]
        object.__setattr__(self, "sizes", sizes)


_LAYOUTS: WeakValueDictionary[tuple, Layout] = WeakValueDictionary()


@dataclass(frozen=True)
class PackedFactors:
    """One family's factors of an adapter."""

    layout: Layout
    numbers: Tensor  # (Σ layout.sizes,), on the host, in the device's dtype
    bias_scales: dict[str, Tensor]  # layer → (d_out,) float32, where the adapter multiplies the layer's bias


@dataclass(frozen=True)
class PackedAdapter:
    """All that a tag holds: the factors of each of its families."""

    factors: tuple[PackedFactors, ...]

    @property
    def size_bytes(self) -> int:
        return sum(factors.numbers.nbytes for factors in self.factors)

    def digest(self) -> bytes:
        """Equal for two adapters exactly where a model serves them alike, to the last bit."""
        hashed = blake2b(digest_size=16)
        for factors in self.factors:
            hashed.update(repr((factors.layout.family, factors.layout.layers)).encode())
            hashed.update(factors.numbers.view(torch.uint8).numpy())
        return hashed.digest()


@torch.no_grad()
def pack(name: str, adapters: Sequence[Adapter], dtype: torch.dtype, pin_memory: bool = False) -> PackedAdapter:
    """Copy a tag's adapters, one of each family, to host memory in the form that slots are filled from.

    dtype: what the device keeps factors in. pin_memory: for copies to a GPU that nobody waits for. Raises AdapterError, naming the
    tag and the layer, where a number is not finite, or not any more in `dtype`.
    """
    with torch.inference_mode(False):  # else what is added during a forward could not be copied outside of one
        return PackedAdapter(tuple(_pack_family(name, adapter, dtype, pin_memory) for adapter in adapters))


def _pack_family(name: str, adapter: Adapter, dtype: torch.dtype, pin_memory: bool) -> PackedFactors:
    parts: list[PackedLayer] = []
    sides: list[Tensor] = []
    bias_scales: dict[str, Tensor] = {}
    for layer, (A, B) in adapter.factors.items():
        held = (A, B, adapter.added_biases.get(layer))
        sizes = (0 if numbers is None else numbers.numel() for numbers in held)
        parts.append(PackedLayer(layer, len(B if A is None else A), *sizes, layer in adapter.scaled_biases))
        sides += [numbers.reshape(-1).to("cpu") for numbers in held if numbers is not None]
        if layer in adapter.scaled_biases:
            bias_scales[layer] = B.float().sum(0).to("cpu")
    numbers = torch.cat(sides).to(dtype)
    if pin_memory:
        numbers = numbers.pin_memory()
    if not numbers.isfinite().all():
        ends = accumulate(part.size_A + part.size_B + part.size_bias for part in parts)
        place = int((~numbers.isfinite()).nonzero()[0])
        layer = next(part.layer for part, end in zip(parts, ends, strict=True) if place < end)
        raise AdapterError(
            f"adapter {name!r} has NaN or infinite weights on layer {layer}, as {str(dtype).removeprefix('torch.')}: train it again"
        )
    key = (adapter.family, tuple(parts))
    layout = _LAYOUTS.get(key)
    if layout is None:
        layout = _LAYOUTS[key] = Layout(*key)
    return PackedFactors(layout, numbers, bias_scales)


# --------------------------------------------------------------------------------------------------------------- store


@dataclass(eq=False)
class StoredAdapter:
    """One version of one tag: a tag that is added again gets a new one, and nothing of the old one is ever taken for it."""

    name: str
    packed: PackedAdapter | None  # None: dropped from host memory
    size_bytes: int  # of `packed`, while it is dropped too
    reload: Reload | None  # None: it cannot be read again and is never dropped
    digest: bytes | None  # of what was added; None where it is never read again
    counters: AdapterCounters = field(default_factory=AdapterCounters)
    is_current: bool = True  # False once its tag was removed or replaced
    is_awaited: bool = False  # somebody asked for it who waits for the answer
    failure: AdapterError | None = None  # that answer, where it is not the adapter


class AdapterStore:
    """Packed adapters in host memory; where they take more than `capacity_bytes`, the least recently used are dropped.

    One that cannot be read again is never dropped. One that has just come stays until the next one comes, however large it is.
    """

    def __init__(self, capacity_bytes: int, dtype: torch.dtype, pin_memory: bool = False) -> None:
        self.capacity_bytes = capacity_bytes
        self.bytes_used = 0
        self.dtype, self.pin_memory = dtype, pin_memory
        self._droppable: OrderedDict[StoredAdapter, None] = OrderedDict()  # in host memory, least recently used first
        self._unused: set[StoredAdapter] = set()  # read in the background and not used since
        self._wanted: dict[StoredAdapter, None] = {}  # to be read, in this order: somebody waits
        self._ahead: dict[StoredAdapter, None] = {}  # to be read after those, as far as there is room
        self._reading: StoredAdapter | None = None  # what the background reader is at
        self._num_ended = self._num_noticed = 0  # background reads, and how many of them `wait` has told of
        self._is_closed = False
        self._make_lock()
        with _STORES_LOCK:
            _STORES.add(self)

    def _make_lock(self) -> None:
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------------- host memory

    def put(self, stored: StoredAdapter) -> None:
        """Take in a version with its packed adapter, as the most recently used."""
        with self.lock:
            self.bytes_used += stored.size_bytes
            if stored.reload is not None:
                self._droppable[stored] = None
            while self.bytes_used > self.capacity_bytes:
                oldest = next(iter(self._droppable), stored)
                if oldest is stored:
                    break
                self._drop(oldest)

    def _drop(self, stored: StoredAdapter) -> None:
        stored.packed = None
        self.bytes_used -= stored.size_bytes
        self._unused.discard(stored)
        self._droppable.pop(stored, None)

    def use(self, stored: StoredAdapter) -> PackedAdapter | None:
        """The packed adapter, now the most recently used; None where it is not in host memory."""
        with self.lock:
            if stored in self._droppable:
                self._droppable.move_to_end(stored)
                self._unused.discard(stored)
            return stored.packed

    def forget(self, stored: StoredAdapter) -> None:
        """Let go of a version whose tag was removed or replaced; a read of it that is under way comes to nothing."""
        with self.lock:
            stored.is_current = False
            self._wanted.pop(stored, None)
            self._ahead.pop(stored, None)
            if stored.packed is not None:
                self._drop(stored)

    # --------------------------------------------------------------------------------------------------- from disk

    def ask(self, stored: StoredAdapter, ahead: bool = False) -> None:
        """Have a version that is not in host memory read in the background; returns at once.

        ahead: nobody waits for it yet. It is read after all that somebody waits for, and only where that does not drop what was
        read in the background and not used yet; why it failed is not kept. After `close`, AdapterError, or nothing if ahead.
        """
        with self._changed:
            if stored.packed is not None or not stored.is_current:
                return
            if self._is_closed:
                if ahead:
                    return
                raise AdapterError(f"adapter {stored.name!r} is not in memory, and the engine that would read it is closed")
            stored.is_awaited |= not ahead
            if stored is self._reading or stored in self._wanted:
                return
            if not ahead:
                self._ahead.pop(stored, None)
            (self._ahead if ahead else self._wanted)[stored] = None
            if self._thread is None:
                self._thread = threading.Thread(target=self._read_in_background, name="adapter-reader", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def take_failure(self, stored: StoredAdapter) -> AdapterError | None:
        """Why the background read that somebody waited for has failed; told once."""
        with self.lock:
            failure, stored.failure = stored.failure, None
            return failure

    def read_now(self, stored: StoredAdapter) -> None:
        """Bring a version back to host memory on the caller's thread, which must not hold the lock. AdapterError where it cannot
        be read or has changed."""
        with self._changed:
            self._changed.wait_for(lambda: self._reading is not stored)
            if stored.packed is not None or not stored.is_current:
                return
            self._wanted.pop(stored, None)
            self._ahead.pop(stored, None)
            stored.is_awaited = False
        started_s = time.perf_counter()
        packed = self._read(stored)
        with self.lock:
            self._take(stored, packed, time.perf_counter() - started_s)

    def wait(self, timeout_s: float | None) -> bool:
        """Sleep until a background read has ended, well or not, since the last call; False where none has within `timeout_s`.
        True at once after `close`."""
        with self._changed:
            ended = self._changed.wait_for(lambda: self._is_closed or self._num_ended != self._num_noticed, timeout_s)
            self._num_noticed = self._num_ended
            return ended

    def close(self, timeout_s: float = 5.0) -> None:
        """End the background reader; a read that it is at is waited for, `timeout_s` at most. Idempotent.

        What is in host memory can still be used, and `read_now` still reads.
        """
        with self._changed:
            self._is_closed = True
            self._wanted.clear()
            self._ahead.clear()
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)

    def _read(self, stored: StoredAdapter) -> PackedAdapter:
        """AdapterError, whatever goes wrong: it belongs to whoever asked for this adapter, and the others go on."""
        try:
            packed = pack(stored.name, stored.reload(), self.dtype, self.pin_memory)
        except FloraError as error:
            raise AdapterError(f"adapter {stored.name!r} could not be read again: {error}") from error
        except Exception as error:
            raise AdapterError(f"adapter {stored.name!r} could not be read again ({type(error).__name__})") from error
        if packed.digest() != stored.digest:
            raise AdapterError(f"adapter {stored.name!r} has changed on disk since it was added: add it again")
        return packed

    def _take(self, stored: StoredAdapter, packed: PackedAdapter, seconds: float) -> None:
        """What was read, unless the tag was removed or replaced meanwhile or somebody else was faster."""
        if stored.is_current and stored.packed is None:
            stored.counters.loads += 1
            stored.counters.load_s += seconds
            stored.packed, stored.failure = packed, None
            self.put(stored)

    # -------------------------------------------------------------------------------------------- background reader

    def _read_in_background(self) -> None:
        """Read what is wanted, and end: a thread that has computed keeps a team of OpenMP threads, which slows every step down."""
        while True:
            with self._changed:
                if self._is_closed or not (self._wanted or self._ahead):
                    self._thread = None
                    return
                stored = self._reading = self._next()
            if stored is None:
                continue
            started_s, packed, failure = time.perf_counter(), None, None
            try:
                packed = self._read(stored)
            except AdapterError as error:
                logging.getLogger(__name__).info("reading adapter %s in the background failed", stored.name, exc_info=error)
                failure = AdapterError(str(error))  # without the traceback, which holds on to what was read
            with self._changed:
                self._reading = None
                if packed is not None:
                    self._take(stored, packed, time.perf_counter() - started_s)
                    if stored.packed is packed:
                        self._unused.add(stored)
                elif stored.is_awaited:
                    stored.failure = failure
                stored.is_awaited = False
                self._num_ended += 1
                self._changed.notify_all()

    def _next(self) -> StoredAdapter | None:
        """What is to be read now; None where the next that nobody waits for has no room and is passed over."""
        if self._wanted:
            stored = next(iter(self._wanted))
            del self._wanted[stored]
            return stored
        stored = next(iter(self._ahead))
        del self._ahead[stored]
        room = self.capacity_bytes - self.bytes_used
        for oldest in self._droppable:
            if room >= stored.size_bytes or oldest in self._unused:
                break
            room += oldest.size_bytes
        return stored if room >= stored.size_bytes else None

    def _after_fork(self) -> None:
        """In the child, where the reader's thread does not exist: what it was asked for is asked for again by whoever needs it."""
        self._make_lock()
        self._wanted.clear()
        self._ahead.clear()
        self._reading = None


# A process is forked only where no store is being changed: the child would get it half changed, and its lock held for ever.

_STORES: WeakSet[AdapterStore] = WeakSet()
_STORES_LOCK = threading.Lock()
_held: list[AdapterStore] = []


def _before_fork() -> None:
    _STORES_LOCK.acquire()
    _held.extend(_STORES)
    for store in _held:
        store.lock.acquire()


def _after_fork_in_parent() -> None:
    for store in _held:
        store.lock.release()
    _held.clear()
    _STORES_LOCK.release()


def _after_fork_in_child() -> None:
    for store in _held:
        store._after_fork()
    _held.clear()
    _STORES_LOCK.release()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
