"""Below the device: what stays in host memory, what is read again from disk, and that it is always what was added."""

from __future__ import annotations

import gc
import os
import random
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_bank import LAYERS, NUM_FACTORS, D, adapter, assert_holds, make_bank

from flora import store as store_module
from flora.bank import AdapterBank
from flora.errors import AdapterError, UnknownAdapterError
from flora.formats import CONFIG_FILE, WEIGHTS_FILE, Adapter, read_adapter, write_flora
from flora.store import AdapterStore, StoredAdapter, pack

SIZE = 2 * NUM_FACTORS * 4
"""Bytes of an adapter of rank 2 in float32."""

PATIENCE_S = 30.0
"""A thread that has not come so far by then never will."""


def stored(name: str, seed: int = 0, rank: int = 2, reload: Callable | None = None) -> StoredAdapter:
    packed = pack(name, [adapter("flora", rank, seed)], torch.float32)
    return StoredAdapter(name, packed, packed.size_bytes, reload, packed.digest())


def readable(name: str, seed: int = 0, rank: int = 2) -> StoredAdapter:
    return stored(name, seed, rank, lambda: [adapter("flora", rank, seed)])


def in_memory(*entries: StoredAdapter) -> str:
    return "".join(entry.name for entry in entries if entry.packed is not None)


class Gate:
    """A checkpoint whose reading waits until it is let through."""

    def __init__(self, *versions: Adapter, fail: bool = False) -> None:
        self.adapters, self.fail = list(versions), fail
        self.reached, self.opened = threading.Event(), threading.Event()
        self.num_reads = 0

    def __call__(self) -> list[Adapter]:
        self.num_reads += 1
        self.reached.set()
        assert self.opened.wait(PATIENCE_S)
        if self.fail:
            raise OSError("gone")
        return self.adapters


def pin_when_read(bank: AdapterBank, name: str, method: str = "flora") -> int:
    """Pin as an engine does that has nothing else to do."""
    for _ in range(100):
        slot = bank.pin(name, method)
        if slot is not None:
            return slot
        assert bank.wait_until_ready(PATIENCE_S), f"{name} was never read"
    raise AssertionError(f"{name} never came")


def come_and_go(bank: AdapterBank, *names: str) -> None:
    for name in names:
        bank.unpin(pin_when_read(bank, name))


def wait_until_idle(bank: AdapterBank) -> None:
    """Until the reader has read all that it was asked for."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with bank._store.lock:
            if not bank._store._wanted and not bank._store._ahead and bank._store._reading is None:
                return
        bank.wait_until_ready(0.01)
    raise AssertionError("the reader never comes to an end")


# ------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_packed_is_one_flat_copy_in_the_devices_precision(dtype):
    entries = [adapter("flora", 3, 1), adapter("lora", 2, 2, ("second",))]
    packed = pack("lua", entries, dtype)
    assert packed.size_bytes == (3 * NUM_FACTORS + 2 * (2 * D + 2)) * dtype.itemsize
    for factors, entry in zip(packed.factors, entries, strict=True):
        assert factors.layout.family == entry.family and factors.layout.ranks == {
            layer: len(A) for layer, (A, _) in entry.factors.items()
        }
        expected = torch.cat([side.flatten() for pair in entry.factors.values() for side in pair])
        assert factors.numbers.dtype == dtype and torch.equal(factors.numbers, expected.to(dtype))
        assert [len(part) for part in factors.numbers.split(factors.layout.sizes)] == [
            side.numel() for pair in entry.factors.values() for side in pair
        ]


def test_a_side_that_is_all_ones_takes_no_memory():
    scales = Adapter(
        "flora", {"first": (torch.ones(1, D), None), "second": (None, torch.full((1, D), 2.0))}, None, "", frozenset(["second"])
    )
    packed = pack("ia3", [scales], torch.float32)
    assert packed.size_bytes == 2 * D * 4
    assert packed.factors[0].layout.sizes == [D, D]
    assert torch.equal(packed.factors[0].bias_scales["second"], torch.full((D,), 2.0))


def test_adapters_that_were_made_alike_share_their_layout():
    alike = [pack(str(seed), [adapter("flora", 2, seed)], torch.float32).factors[0].layout for seed in range(3)]
    others = [
        pack("other", [entry], torch.float32).factors[0].layout
        for entry in (adapter("flora", 11), adapter("lora", 2), adapter("flora", 2, 0, ("first",)))
    ]
    assert alike[0] is alike[1] is alike[2] and len({alike[0], *others}) == 4
    kept = weakref.ref(others.pop(0))
    gc.collect()
    assert kept() is None, "the layout of adapters that are gone stays"


def test_a_digest_tells_apart_what_is_served_differently():
    def digest(*entries: Adapter) -> bytes:
        return pack("any", entries, torch.float32).digest()

    def changed(side: int, at: tuple[int, int]) -> Adapter:
        entry = adapter("flora", 2, 1)
        entry.factors["second"][side][at] += 1e-6
        return entry

    flora, lora = adapter("flora", 2, 1), adapter("lora", 2, 1)
    layers = flora.factors
    renamed = Adapter("flora", {"second": layers["first"], "first": layers["second"]}, None, "")
    scaling = Adapter("flora", layers, None, "", frozenset(["first"]))
    transposed = Adapter(
        "flora", {"first": (layers["first"][0].reshape(4, 3), layers["first"][1]), "second": layers["second"]}, None, ""
    )
    different = [[flora], [lora], [flora, lora], [lora, flora], [renamed], [scaling], [transposed]]
    different += [[changed(0, (0, 0))], [changed(1, (1, D - 1))], [adapter("flora", 2, 2)]]
    assert len({digest(*entries) for entries in different}) == len(different)
    assert digest(flora) == digest(Adapter("flora", dict(layers), "another base", "another source"))


# --------------------------------------------------------------------------------------------------------- host memory


def test_the_least_recently_used_are_dropped_from_host_memory():
    store = AdapterStore(3 * SIZE, torch.float32)
    a, b, c, d, e = (readable(name) for name in "abcde")
    for entry in (a, b, c):
        store.put(entry)
    assert in_memory(a, b, c) == "abc" and store.bytes_used == 3 * SIZE
    assert store.use(a) is a.packed
    store.put(d)
    assert in_memory(a, b, c, d) == "acd" and store.use(b) is None
    store.put(e)
    assert in_memory(a, b, c, d, e) == "ade" and store.bytes_used == 3 * SIZE
    store.forget(d)
    store.forget(b)
    assert in_memory(a, b, c, d, e) == "ae" and store.bytes_used == 2 * SIZE


def test_what_cannot_be_read_again_is_never_dropped():
    store = AdapterStore(2 * SIZE, torch.float32)
    only, a, b = stored("o"), readable("a"), readable("b")
    for entry in (only, a, b):
        store.put(entry)
    assert in_memory(only, a, b) == "ob" and store.bytes_used == 2 * SIZE
    more = [stored(str(number)) for number in range(4)]
    for entry in more:
        store.put(entry)
    assert in_memory(only, b, *more) == "o0123" and store.bytes_used == 5 * SIZE
    for entry in (only, *more):
        store.forget(entry)
    assert store.bytes_used == 0


@pytest.mark.parametrize("capacity", [0, SIZE - 1, 3 * SIZE])
def test_one_that_is_larger_than_host_memory_stays_until_the_next_comes(capacity):
    store = AdapterStore(capacity, torch.float32)
    small, large = readable("s"), readable("l", rank=9)
    for entry in (small, large):
        store.put(entry)
        assert in_memory(entry) == entry.name
    assert in_memory(small, large) == "l"


def test_replaced_versions_leave_host_memory():
    bank = make_bank(num_slots=1, host_bytes=2 * SIZE)
    for seed in range(5):
        bank.add("lua", [adapter("flora", 2, seed)])
        assert bank.host_bytes_used == SIZE
    bank.unpin(bank.pin("lua", "flora"))
    bank.remove("lua")
    assert bank.host_bytes_used == 0 and bank.slots_used == 0


# ------------------------------------------------------------------------------------------------------- back from disk


class Shelf:
    """Checkpoints in a folder, and a bank that has room for fewer of them."""

    def __init__(self, folder: Path, num_slots: int = 1, host_adapters: int = 1) -> None:
        self.folder = folder
        self.bank = make_bank(num_slots=num_slots, host_bytes=host_adapters * SIZE)

    def write(self, name: str, seed: int, rank: int = 2) -> Adapter:
        entry = adapter("flora", rank, seed)
        write_flora(self.folder / name, entry.factors, {"r": rank})
        return entry

    def add(self, name: str, seed: int, rank: int = 2) -> Adapter:
        entry = self.write(name, seed, rank)
        self.bank.add(name, [read_adapter(self.folder / name)], reload=lambda: [read_adapter(self.folder / name)])
        return entry


@pytest.fixture
def shelf(tmp_path) -> Shelf:
    """Adapters `a` and `b`, of which one is on the device and in host memory at a time: the last one, `b`."""
    made = Shelf(tmp_path)
    for seed, name in enumerate("ab"):
        made.add(name, seed)
        made.bank.unpin(made.bank.pin(name, "flora"))
    assert made.bank.host_bytes_used == SIZE and made.bank.slots_used == 1
    return made


def test_what_was_dropped_comes_back_from_disk(shelf):
    bank = shelf.bank
    expected = {name: adapter("flora", 2, seed) for seed, name in enumerate("ab")}
    for name in "aba":
        assert bank.pin(name, "flora") is None, "it was not read: the test shows nothing"
        slot = pin_when_read(bank, name)
        assert_holds(bank, slot, expected[name])
        bank.unpin(slot)
    counters = bank.counters()
    assert {name: (entry.hits, entry.misses, entry.evictions, entry.loads) for name, entry in counters.items()} == {
        "a": (0, 3, 2, 2),
        "b": (0, 2, 2, 1),
    }
    assert counters["a"].load_s > 0 and counters["b"].load_s > 0
    assert bank.host_bytes_used == SIZE


def test_in_place_where_somebody_cannot_wait(shelf):
    expected = {name: adapter("flora", 2, seed) for seed, name in enumerate("ab")}
    for name in "abba":
        slot = shelf.bank.pin_now(name, "flora")
        assert_holds(shelf.bank, slot, expected[name])
        shelf.bank.unpin(slot)
    assert (shelf.bank.counters()["a"].loads, shelf.bank.counters()["b"].loads) == (2, 1)
    assert shelf.bank._store._thread is None


def rewrite(shelf: Shelf) -> None:
    shelf.write("a", 77)


def rewrite_with_another_rank(shelf: Shelf) -> None:
    shelf.write("a", 0, rank=3)


def change_one_number(shelf: Shelf) -> None:
    path = shelf.folder / "a" / WEIGHTS_FILE
    times, content = path.stat(), bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # of the same size and age


def take_the_mean(shelf: Shelf) -> None:
    path = shelf.folder / "a" / CONFIG_FILE
    path.write_text(path.read_text().replace('"sum"', '"mean"'))


def delete(shelf: Shelf) -> None:
    shutil.rmtree(shelf.folder / "a")


def delete_weights(shelf: Shelf) -> None:
    (shelf.folder / "a" / WEIGHTS_FILE).unlink()


def truncate(shelf: Shelf) -> None:
    path = shelf.folder / "a" / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-5])


def poison(shelf: Shelf) -> None:
    entry = adapter("flora", 2, 0)
    entry.factors["first"][0][0, 0] = torch.nan
    write_flora(shelf.folder / "a", entry.factors, {"r": 2})


CHANGED = "adapter 'a' has changed on disk since it was added: add it again"
UNREADABLE = "adapter 'a' could not be read again: adapter "
DAMAGE = {
    rewrite: CHANGED,
    rewrite_with_another_rank: CHANGED,
    change_one_number: CHANGED,
    take_the_mean: CHANGED,
    delete: UNREADABLE + ".*there is no such folder",
    delete_weights: UNREADABLE + ".*is missing",
    truncate: UNREADABLE + ".*is truncated",
    poison: UNREADABLE + ".*NaN or infinite weights",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_checkpoint_that_is_not_what_was_added_is_refused_by_name(shelf, damage):
    bank, message = shelf.bank, DAMAGE[damage]
    before = bank.counters()
    damage(shelf)
    for _ in range(2):  # each time it is tried again
        with pytest.raises(AdapterError, match=message) as caught:
            pin_when_read(bank, "a")
        assert str(shelf.folder.parent) not in str(caught.value), "the error shows the server's folders"
    with pytest.raises(AdapterError, match=message):
        bank.pin_now("a", "flora")
    come_and_go(bank, "b", "b")
    assert bank.counters()["a"] == before["a"] and not bank._users
    entry = shelf.add("a", 5)
    assert_holds(bank, pin_when_read(bank, "a"), entry)


def test_the_same_numbers_written_again_are_no_change(shelf):
    shutil.rmtree(shelf.folder / "a")
    entry = shelf.write("a", 0)
    os.utime(shelf.folder / "a" / WEIGHTS_FILE, (1, 1))
    assert_holds(shelf.bank, pin_when_read(shelf.bank, "a"), entry)


def test_a_checkpoint_that_is_back_is_read_at_the_next_attempt(shelf):
    delete(shelf)
    with pytest.raises(AdapterError, match="could not be read again"):
        pin_when_read(shelf.bank, "a")
    entry = shelf.write("a", 0)
    assert_holds(shelf.bank, pin_when_read(shelf.bank, "a"), entry)


@pytest.mark.parametrize("error", [OSError("/srv/secret"), ZeroDivisionError("/srv/secret"), MemoryError()], ids=repr)
def test_whatever_a_read_raises_is_the_error_of_that_adapter_alone(error):
    def fail() -> list[Adapter]:
        raise error

    bank = make_bank(num_slots=1, host_bytes=SIZE)
    bank.add("a", [adapter("flora", 2, 0)], reload=fail)
    bank.add("b", [adapter("flora", 2, 1)], reload=lambda: [adapter("flora", 2, 1)])
    for attempt in (pin_when_read, AdapterBank.pin_now):
        with pytest.raises(AdapterError, match=rf"adapter 'a' could not be read again \({type(error).__name__}\)$"):
            attempt(bank, "a", "flora")
    come_and_go(bank, "b")


def test_nobody_is_refused_for_a_failure_that_nobody_waited_for():
    """What was to be fetched ahead was not there; when it is wanted, it is."""
    gate = Gate(adapter("flora", 2, 0), fail=True)
    bank = make_bank(num_slots=1, host_bytes=2 * SIZE)
    bank.add("a", [adapter("flora", 2, 0)], reload=gate)
    for seed, name in enumerate("bc", 1):
        bank.add(name, [adapter("flora", 2, seed)], reload=partial(list, [adapter("flora", 2, seed)]))
    gate.opened.set()
    bank.prefetch(["a"])
    assert bank.wait_until_ready(PATIENCE_S)
    gate.fail = False
    assert_holds(bank, pin_when_read(bank, "a"), adapter("flora", 2, 0))
    assert gate.num_reads == 2


def test_a_failure_that_nobody_was_told_of_is_forgotten_once_it_was_read(shelf):
    bank = shelf.bank
    delete(shelf)
    assert bank.pin("a", "flora") is None
    assert bank.wait_until_ready(PATIENCE_S)  # and whoever asked has gone
    shelf.write("a", 0)
    bank.unpin(bank.pin_now("a", "flora"))
    come_and_go(bank, "b", "a")


# ------------------------------------------------------------------------------- changes while a read is under way


@pytest.fixture
def gated() -> tuple[AdapterBank, Gate]:
    """A read of `a`, seed 0, is under way in the background and waits at the gate."""
    gate = Gate(adapter("flora", 2, 0))
    bank = make_bank(num_slots=2, host_bytes=SIZE)
    bank.add("a", [adapter("flora", 2, 0)], reload=gate)
    bank.add("b", [adapter("flora", 2, 1)], reload=lambda: [adapter("flora", 2, 1)])
    assert bank.pin("a", "flora") is None
    assert gate.reached.wait(PATIENCE_S)
    yield bank, gate
    gate.opened.set()
    bank.close()


def test_others_run_while_one_is_read(gated):
    bank, gate = gated
    for _ in range(3):
        assert bank.pin("a", "flora") is None
        bank.unpin(bank.pin("b", "flora"))
    assert not bank.wait_until_ready(0.01) and gate.num_reads == 1
    gate.opened.set()
    assert_holds(bank, pin_when_read(bank, "a"), adapter("flora", 2, 0))


@pytest.mark.parametrize("new_seed", [0, 9], ids=["same numbers", "other numbers"])
def test_replaced_while_it_is_read(gated, new_seed):
    bank, gate = gated
    new = adapter("flora", 3, new_seed)
    bank.add("a", [new], reload=lambda: [new])
    assert_holds(bank, bank.pin("a", "flora"), new)
    bank.unpin(1 if bank.slots_used == 1 else 2)
    gate.opened.set()
    assert bank.wait_until_ready(PATIENCE_S)
    assert_holds(bank, pin_when_read(bank, "a"), new)
    assert bank.host_bytes_used == 3 * NUM_FACTORS * 4, "the old version is in host memory"
    assert bank.counters()["a"].loads == 0, "a read that came to nothing is counted"


def test_replaced_while_it_is_read_and_dropped_before_it_was_used(gated):
    bank, gate = gated
    new = adapter("flora", 2, 9)
    bank.add("a", [new], reload=lambda: [new])
    bank.add("c", [adapter("flora", 2, 3)], reload=lambda: [adapter("flora", 2, 3)])
    assert bank.pin("a", "flora") is None, "it was not dropped: the test shows nothing"
    gate.opened.set()
    assert_holds(bank, pin_when_read(bank, "a"), new)


def test_removed_while_it_is_read(gated):
    bank, gate = gated
    bank.remove("a")
    gate.opened.set()
    assert bank.wait_until_ready(PATIENCE_S), "whoever waits for it sleeps on"
    assert bank.host_bytes_used == SIZE and "a" not in bank.counters()
    new = adapter("flora", 2, 9)
    bank.add("a", [new])
    assert_holds(bank, bank.pin("a", "flora"), new)


def test_a_failure_of_the_old_version_is_none_of_the_new_ones(gated):
    bank, gate = gated
    gate.fail = True
    new = adapter("flora", 2, 9)
    bank.add("a", [new], reload=lambda: [new])
    gate.opened.set()
    assert bank.wait_until_ready(PATIENCE_S)
    assert_holds(bank, pin_when_read(bank, "a"), new)


def test_who_cannot_wait_takes_what_is_being_read_already(gated):
    bank, gate = gated
    slots = []
    thread = threading.Thread(target=lambda: slots.append(bank.pin_now("a", "flora")))
    thread.start()
    bank.unpin(bank.pin("b", "flora"))  # the bank is free meanwhile
    gate.opened.set()
    thread.join(PATIENCE_S)
    assert_holds(bank, slots[0], adapter("flora", 2, 0))
    assert gate.num_reads == 1 and bank.counters()["a"].loads == 1


def test_who_could_not_wait_answers_for_those_who_asked_before(gated):
    """`c` is asked for, and then read in place: nobody waits for a failure of its later reads ahead."""
    bank, gate = gated
    later = Gate(adapter("flora", 2, 2))
    later.opened.set()
    bank.add("c", [adapter("flora", 2, 2)], reload=later)
    bank.add("d", [adapter("flora", 2, 3)], reload=lambda: [adapter("flora", 2, 3)])
    assert bank.pin("c", "flora") is None
    bank.unpin(bank.pin_now("c", "flora"))
    gate.opened.set()
    come_and_go(bank, "a", "b", "d", "b", "d")
    later.fail = True
    bank.prefetch(["c"])
    wait_until_idle(bank)
    assert later.num_reads == 2
    later.fail = False
    assert_holds(bank, pin_when_read(bank, "c"), adapter("flora", 2, 2))


def test_fetched_ahead_and_then_wanted_before_it_came():
    """Its failure is the answer to whoever waits for it by then."""
    gate = Gate(fail=True)
    bank = make_bank(num_slots=1, host_bytes=SIZE)
    bank.add("a", [adapter("flora", 2, 0)], reload=gate)
    bank.add("b", [adapter("flora", 2, 1)], reload=lambda: [adapter("flora", 2, 1)])
    bank.prefetch(["a"])
    assert gate.reached.wait(PATIENCE_S)
    assert bank.pin("a", "flora") is None
    gate.opened.set()
    assert bank.wait_until_ready(PATIENCE_S)
    with pytest.raises(AdapterError, match="'a' could not be read again"):
        bank.pin("a", "flora")
    assert gate.num_reads == 1


# ------------------------------------------------------------------------------------------------------------ prefetch


class Library:
    """Adapters `a` … `h` of which `host_adapters` are in host memory; which were read, and in which order."""

    def __init__(self, host_adapters: int, num_slots: int = 8) -> None:
        self.reads: list[str] = []
        self.first = Gate(adapter("flora", 2, 0))  # the reader stands here until it is let through
        self.bank = make_bank(num_slots=num_slots, host_bytes=host_adapters * SIZE)
        self.bank.add("gate", [adapter("flora", 2, 0)], reload=self.first)
        for seed, name in enumerate("abcdefgh"):
            self.bank.add(name, [adapter("flora", 2, seed)], reload=partial(self.read, name, seed))
        assert self.bank.pin("gate", "flora") is None
        assert self.first.reached.wait(PATIENCE_S)

    def read(self, name: str, seed: int) -> list[Adapter]:
        self.reads.append(name)
        return [adapter("flora", 2, seed)]

    def let_through(self) -> str:
        """What the reader has read when it has nothing left to do."""
        self.first.opened.set()
        wait_until_idle(self.bank)
        return "".join(self.reads)


def test_what_somebody_waits_for_is_read_first():
    library = Library(host_adapters=8)
    for name in "abcdefgh":
        library.bank._store._drop(library.bank._adapters[name].stored)
    library.bank.prefetch(["a", "b", None, "unknown", "c", "b", "d"])
    for name in "dea":
        assert library.bank.pin(name, "flora") is None
    assert library.let_through() == "deabc"


def test_ahead_is_read_only_what_displaces_nothing_that_is_still_to_be_used():
    library = Library(host_adapters=3)
    bank = library.bank
    bank.prefetch("abcdefg")
    assert library.let_through() == "ab", "beside what somebody waits for, there is room for two"
    for name in "ab":
        assert bank.pin(name, "flora") is not None
    bank.prefetch("abcdefg")
    assert library.let_through() == "ab", "what somebody waited for first is dropped before it was used"
    assert bank.pin("gate", "flora") is not None
    bank.prefetch("abcdefg")
    assert library.let_through() == "abcde", "what is on the device by now may be dropped from host memory"
    assert bank.host_bytes_used == 3 * SIZE


def test_what_is_on_the_device_is_not_fetched():
    library = Library(host_adapters=2)
    library.bank.pin("h", "flora")
    for name in "xy":
        library.bank.add(name, [adapter("flora", 2, 9)], reload=list)
    assert library.bank._adapters["h"].stored.packed is None, "it is in host memory: the test shows nothing"
    library.bank.prefetch("h")
    assert library.let_through() == ""
    assert library.bank.pin("h", "flora") is not None


def test_no_slot_free_is_no_reason_to_displace_what_others_wait_for():
    library = Library(host_adapters=1, num_slots=1)
    held = library.bank.pin("h", "flora")
    for name in "abc":
        assert library.bank.pin(name, "flora") is None
    assert library.let_through() == ""
    library.bank.unpin(held)
    come_and_go(library.bank, "gate", *"abc")
    assert library.reads == list("abc")


# -------------------------------------------------------------------------------------------------- the reader's thread


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "adapter-reader"]


def test_the_reader_lives_while_there_is_something_to_read(shelf):
    before = reader_threads()
    come_and_go(shelf.bank, "b", "b")
    assert reader_threads() == before, "it is started though nothing is to be read"
    for name in "aba":
        come_and_go(shelf.bank, name)
        thread = shelf.bank._store._thread
        if thread is not None:
            thread.join(PATIENCE_S)
        assert shelf.bank._store._thread is None and reader_threads() == before
    assert shelf.bank.counters()["a"].loads == 2


def test_a_closed_bank_serves_what_it_has_and_says_so_of_the_rest(shelf):
    bank = shelf.bank
    come_and_go(bank, "a", "b")
    for _ in range(2):
        bank.close()
        assert bank._store._thread is None
    come_and_go(bank, "b")
    bank.prefetch("a")
    with pytest.raises(AdapterError, match="adapter 'a' is not in memory, and the engine that would read it is closed"):
        bank.pin("a", "flora")
    assert bank._store._thread is None
    assert bank.wait_until_ready(PATIENCE_S), "whoever waits is woken"
    assert_holds(bank, bank.pin_now("a", "flora"), adapter("flora", 2, 0))


def test_closing_does_not_wait_for_a_read_that_hangs(gated):
    bank, gate = gated
    bank.close(timeout_s=0.01)
    assert bank.wait_until_ready(0) and not gate.opened.is_set()


def test_a_bank_that_is_forgotten_is_gone(shelf):
    come_and_go(shelf.bank, "a")
    thread = shelf.bank._store._thread
    number = len(store_module._STORES)
    shelf.bank = None
    if thread is not None:
        thread.join(PATIENCE_S)
    gc.collect()
    assert len(store_module._STORES) < number


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def exit_status_of_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; 0 where it came through."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the forked process hangs")


@needs_fork
def test_a_forked_process_reads_on_a_thread_of_its_own(shelf):
    come_and_go(shelf.bank, "a", "b")

    def work() -> None:
        assert not reader_threads()
        for name, seed in (("a", 0), ("b", 1), ("a", 0)):
            slot = pin_when_read(shelf.bank, name)
            assert_holds(shelf.bank, slot, adapter("flora", 2, seed))
            shelf.bank.unpin(slot)

    assert exit_status_of_child(work) == 0
    come_and_go(shelf.bank, "a", "b")


@needs_fork
def test_a_process_is_forked_in_the_midst_of_reads_and_changes(shelf):
    """The lock is somebody else's most of the time: a child that inherited it so would hang at its first pin."""
    ended = threading.Event()

    def change() -> None:
        seed = 0
        while not ended.is_set():
            seed += 1
            shelf.bank.add("other", [adapter("flora", 2, seed)])
            shelf.bank.prefetch("ab")
            shelf.bank.counters()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(5):
            assert exit_status_of_child(lambda: come_and_go(shelf.bank, "a", "b", "a")) == 0
    finally:
        ended.set()
        thread.join()
    come_and_go(shelf.bank, "a", "b")


# ---------------------------------------------------------------------------------------------------------- at random


@pytest.mark.parametrize("seed", range(3))
def test_three_hundred_adapters_over_four_slots(seed):
    """Random requests, versions, removals and reads ahead, held against a dict of what each tag is: whatever slot a pin gives holds
    exactly that, and goes on holding it until the last request lets go."""
    rng = random.Random(seed)
    bank = make_bank(num_slots=4, host_bytes=12 * SIZE)
    current: dict[str, Adapter] = {}  # tag → the version that was added last
    pins: list[tuple[str, int, Adapter]] = []  # running requests: what each got
    waiting: list[str] = []  # tags that were asked for and not given a slot
    expected = {}  # tag → hits, misses
    next_seed = iter(range(10**6))

    def add(name: str) -> None:
        layers = rng.choice([LAYERS, LAYERS, ("first",), ("second",)])
        version = adapter("flora", rng.choice([1, 2, 2, 3]), next(next_seed), layers)
        bank.add(name, [version], reload=lambda: [version])
        current[name] = version
        expected.setdefault(name, [0, 0])

    names = [f"tag{number}" for number in range(300)]
    for name in names:
        add(name)
    for _ in range(2000):
        action = rng.random()
        name = names[min(int(rng.paretovariate(0.7)) - 1, 299)]  # a few are popular
        if action < 0.4:
            if waiting and rng.random() < 0.5:
                name = waiting.pop(rng.randrange(len(waiting)))
            if name not in current:
                with pytest.raises(UnknownAdapterError):
                    bank.pin(name, "flora")
                continue
            was_there = any(bank._held[slot][0] is bank._adapters[name].stored for slot in bank._held)
            slot = bank.pin(name, "flora")
            if slot is not None:
                pins.append((name, slot, current[name]))
                expected[name][0 if was_there else 1] += 1
            else:
                assert not was_there
                waiting.append(name)
        elif action < 0.83:
            if pins:
                bank.unpin(pins.pop(rng.randrange(len(pins)))[1])
        elif action < 0.88:
            add(name)
        elif action < 0.9 and name in current:
            bank.remove(name)
            del current[name], expected[name]
        elif action < 0.93:
            bank.prefetch(rng.choices(names, k=5))
        else:
            bank.wait_until_ready(0.002)
        for _, slot, version in pins:
            assert_holds(bank, slot, version)
        assert bank.slots_used <= 4 and len({slot for _, slot, _ in pins}) <= 4
        assert bank.host_bytes_used <= bank.host_bytes
    counters = bank.counters()
    assert {name: [entry.hits, entry.misses] for name, entry in counters.items()} == expected
    assert sum(entry.loads for entry in counters.values()) > 50 and sum(entry.evictions for entry in counters.values()) > 50
    for _, slot, _ in pins:
        bank.unpin(slot)
    assert not bank._users and bank.slots_used == len(bank._idle) <= 4
    for name in rng.sample(sorted(current), 20):
        slot = pin_when_read(bank, name)
        assert_holds(bank, slot, current[name])
        bank.unpin(slot)
    bank.close()
