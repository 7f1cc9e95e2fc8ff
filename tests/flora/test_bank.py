"""Slots: who holds one, when it is reused, and that nothing a batch uses ever changes under it."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import pytest
import torch
from tiny_bank import LAYERS, NUM_FACTORS, SHAPES, D, Net, adapter, assert_holds, make_bank, make_net, pinned_batch

from flora import AdapterError, Request, UnknownAdapterError, ops
from flora.bank import IDENTITY_SLOT, AdapterBank
from flora.formats import Adapter
from flora.routing import route
from flora.store import AdapterCounters

LENGTHS = (3, 12, 7)  # new tokens: rows end apart, so the batch is compacted while it runs


@pytest.fixture
def net() -> Net:
    return make_net()


@pytest.fixture
def bank(net) -> AdapterBank:
    return make_bank(net)


def answer(bank: AdapterBank, net: Net, serving, x: torch.Tensor) -> torch.Tensor:
    with bank.serve(serving):
        return net(x)


def by_hand(net: Net, x: torch.Tensor, *adapters: Adapter | None) -> torch.Tensor:
    """Each row of x (n, l, d) through the net with that row's adapter merged into the weights."""
    rows = []
    for row, chosen in zip(x, adapters, strict=True):
        for name in LAYERS:
            base = getattr(net, name).base
            weight = base.weight
            if chosen is not None and name in chosen.factors:
                A, B = chosen.factors[name]
                weight = weight * (B.T @ A) if chosen.family == "flora" else weight + B.T @ A
            row = row @ weight.T + base.bias
        rows.append(row)
    return torch.stack(rows)


def assert_close(y: torch.Tensor, truth: torch.Tensor) -> None:
    max_diff = (y - truth).abs().max().item()
    assert max_diff < 1e-4 * truth.abs().max(), f"max_diff {max_diff:.3g} of {truth.abs().max():.3g}"


def contents(bank: AdapterBank) -> dict:
    """Everything that an add may change."""
    return {
        "info": bank.info,
        "slots_used": bank.slots_used,
        "host_bytes_used": bank.host_bytes_used,
        "counters": bank.counters(),
        "factors": {
            key: (stack.A.clone(), stack.B.clone(), list(stack.ranks), dict(stack.biases)) for key, stack in bank._stacks.items()
        },
    }


def assert_unchanged(bank: AdapterBank, before: dict) -> None:
    after = contents(bank)
    for what in ("info", "slots_used", "host_bytes_used", "counters"):
        assert after[what] == before[what], what
    assert after["factors"].keys() == before["factors"].keys()
    for key, (A, B, *rest) in after["factors"].items():
        assert torch.equal(A, before["factors"][key][0]) and torch.equal(B, before["factors"][key][1]), key
        assert rest == list(before["factors"][key][2:])


def pinned(bank: AdapterBank, names: list[str | None], method: str, family: str | None = None):
    """One tag per row, each pinned, arranged as a batch."""
    return bank.arrange([bank.pin_now(name, method) for name in names], method, family)


def use(bank: AdapterBank, name: str, method: str = "flora") -> int:
    """A request that comes and goes: the slot that it had."""
    slot = bank.pin(name, method)
    bank.unpin(slot)
    return slot


X = torch.linspace(-1, 1, 4 * 2 * D).reshape(4, 2, D)


# -------------------------------------------------------------------------------------------------------------- serving


@pytest.mark.parametrize("method", ["flora", "flora-expand", "flora-modulate", "bmm-lora", "loop-lora", "sgmv-lora"])
def test_a_batch_of_mixed_ranks_and_no_adapter(bank, net, method):
    family = "lora" if "lora" in method.split("-") else "flora"
    small, large = adapter(family, 1, 1), adapter(family, 5, 2)
    bank.add("small", [small])
    bank.add("large", [large])
    serving = pinned(bank, ["large", None, "small", "large"], method)
    assert_close(answer(bank, net, serving, X), by_hand(net, X, large, None, small, large))


def test_layers_that_an_adapter_does_not_touch_run_as_the_base_layer(bank, net):
    """`first` has factors for one tag, `second` for another; a third has both, and the fourth row none."""
    one, other, both = adapter("flora", 2, 1, ("first",)), adapter("flora", 3, 2, ("second",)), adapter("flora", 1, 3)
    for name, entry in (("one", one), ("other", other), ("both", both)):
        bank.add(name, [entry])
    serving = pinned(bank, ["one", "other", "both", None], "flora")
    assert_close(answer(bank, net, serving, X), by_hand(net, X, one, other, both, None))
    alone = pinned(bank, ["one"], "flora")
    assert alone.plan("second") is None, "a layer that no row adapts has something to do"


def test_a_tag_of_two_families_serves_each_method_its_own(bank, net):
    flora, lora = adapter("flora", 2, 1), adapter("lora", 3, 2)
    info = bank.add("lua", [flora, lora])
    assert (info.families, info.ranks, info.layers) == (("flora", "lora"), {"flora": 2, "lora": 3}, {"flora": 2, "lora": 2})
    assert info.size_bytes == 4 * sum(A.numel() + B.numel() for entry in (flora, lora) for A, B in entry.factors.values())
    for method, truth in (("flora", flora), ("bmm-lora", lora), ("base", None)):
        assert_close(answer(bank, net, pinned(bank, ["lua"], method), X[:1]), by_hand(net, X[:1], truth))
    for family, truth in ((None, flora), ("flora", flora), ("lora", lora)):
        serving = pinned(bank, ["lua"], "merged", family)
        assert_close(answer(bank, net, serving, X[:1]), by_hand(net, X[:1], truth))


def biased(family: str, seed: int, layers: tuple[str, ...] = LAYERS) -> Adapter:
    """One that changes biases: a lora adapter adds to them, a flora one, as IA3, multiplies them."""
    made = adapter(family, 1, seed, layers)
    if family == "flora":
        return replace(made, scaled_biases=frozenset(layers))
    return replace(made, added_biases={layer: torch.arange(float(SHAPES[layer][1])) - 2 for layer in layers})


MIXED = {
    "multiplies": [adapter("flora", 3, 1)],
    "adds": [adapter("lora", 2, 2)],
    "adds more": [adapter("lora", 5, 3)],
    "both": [adapter("flora", 2, 4), adapter("lora", 2, 5)],  # its flora one is served
    "multiplies first": [adapter("flora", 1, 6, ("first",))],
    "adds second": [adapter("lora", 1, 7, ("second",))],
    "scales biases": [biased("flora", 8)],
    "adds biases": [biased("lora", 9)],
    "adds a bias second": [biased("lora", 10, ("second",))],
}


@pytest.mark.parametrize(
    "tags",
    [
        [*MIXED, None],
        ["adds", "multiplies"],
        ["adds", None, "adds more", "adds biases"],
        ["multiplies", "both", None],
        ["adds second", "multiplies first"],
        ["multiplies first", "multiplies first", None],
        ["scales biases", "adds biases", "scales biases"],
        ["adds a bias second", "scales biases", None],
        ["adds biases", "adds biases"],
        ["scales biases"],
        [None, None],
    ],
    ids=str,
)
def test_a_batch_of_both_families_serves_each_row_as_alone(bank, net, tags):
    """Whichever layers an adapter touches, and whatever it does to their biases."""
    for tag, adapters in MIXED.items():
        bank.add(tag, adapters)
    x = torch.randn(len(tags), 3, D)
    with pinned_batch(bank, tags, "mixed") as batch:
        together = answer(bank, net, batch, x)
    for place, tag in enumerate(tags):
        for method in ("merged", "base" if tag is None else {"flora": "flora-expand", "lora": "loop-lora"}[MIXED[tag][0].family]):
            with pinned_batch(bank, [tag], method) as alone:
                assert_close(together[place : place + 1], answer(bank, net, alone, x[place : place + 1]))
        if tag is not None and "bias" not in tag:
            assert_close(together[place : place + 1], by_hand(net, x[place : place + 1], MIXED[tag][0]))


def test_what_an_adapter_does_to_biases_is_done_and_undone(net):
    """On a layer with a bias and on one without, in half precision too; and the slot's next adapter has the layer's own."""
    net.second.bias = None
    bank = make_bank(net, dtype=torch.bfloat16, num_slots=1)
    own = {"first": net.first.base.bias, "second": torch.zeros(SHAPES["second"][1])}
    bank.add("adds", [biased("lora", 0)])
    bank.add("scales", [biased("flora", 1)])
    bank.add("plain", [adapter("lora", 1, 2)])
    for tag, method in (("adds", "bmm-lora"), ("scales", "flora"), ("plain", "bmm-lora"), ("adds", "merged")):
        with pinned_batch(bank, [tag], method) as batch:
            for layer in LAYERS:
                bias = batch.plan(layer).bias
                if tag == "plain" or (tag == "scales" and layer == "second"):
                    assert bias is None
                    continue
                made = biased("lora", 0) if tag == "adds" else biased("flora", 1)
                expected = own[layer] + made.added_biases[layer] if tag == "adds" else own[layer] * made.factors[layer][1].sum(0)
                assert torch.equal(bias, expected.to(torch.bfloat16)), f"{tag}, {layer}"


@pytest.mark.parametrize("change", ["shape", "layer", "value"])
def test_a_bias_that_fits_no_layer_is_refused(bank, change):
    wrong = {
        "shape": {"first": torch.zeros(D)},
        "layer": {"second": torch.zeros(D)},
        "value": {"first": torch.full((D + 2,), torch.inf)},
    }
    made = replace(adapter("lora", 1, 0, ("first",)), added_biases=wrong[change])
    message = {"value": "NaN or infinite weights on layer first"}.get(change, r"its bias of shape \(6,\) is not that of a layer")
    with pytest.raises(AdapterError, match=message):
        bank.add("new", [made])
    assert bank.info == {}


def test_weights_are_merged_with_one_adapter_at_a_time(bank):
    bank.add("lua", [adapter("flora")])
    with pytest.raises(AdapterError, match="one adapter at a time"):
        pinned(bank, ["lua", None], "merged")


@pytest.mark.parametrize("method, family", [("flora-expand", "flora"), ("bmm-lora", "lora")])
def test_a_rank_costs_what_it_is(bank, method, family):
    """Beside a slot of rank 9, a row of rank 2 is expanded twice and a row without an adapter once."""
    for name, rank in (("small", 2), ("large", 9), ("also small", 2)):
        bank.add(name, [adapter(family, rank)])
    routing = pinned(bank, ["small", None, "also small"], method).plan("first").routing
    assert len(routing.expanded_row) == 2 + 1 + 2
    pinned(bank, ["large"], method)
    routing = pinned(bank, ["small", None, "large", "small"], method).plan("first").routing
    assert len(routing.expanded_row) == 2 + 1 + 9 + 2
    assert {group.rank: len(group.slots) for group in routing.rank_groups} == {2: 2, 9: 1}


def test_layers_of_the_same_ranks_share_what_is_worked_out(bank, monkeypatch):
    """A batch is routed once for all layers of the same ranks, and its plans are made once for all steps."""
    made = []
    monkeypatch.setattr("flora.bank.route", lambda *args: made.append(args) or route(*args))
    for seed in range(4):
        bank.add(f"both{seed}", [adapter("flora", 3, seed)])
    bank.add("first", [adapter("flora", 3, 5, ("first",))])
    alike = pinned(bank, ["both0", "both1", None, "both2", "both0"], "flora")
    plans = [alike.plan(layer) for layer in LAYERS]
    assert plans[0].routing.segments is plans[1].routing.segments and len(made) == 1
    assert [alike.plan(layer) for layer in LAYERS] == plans and len(made) == 1
    mixed = pinned(bank, ["both0", "first"], "flora")
    assert mixed.plan("first").routing.uniform_rank == 3 and mixed.plan("second").routing.uniform_rank is None
    assert len(made) == 3


def test_merged_weights_are_shared_by_all_batches_of_the_adapter_and_gone_with_the_last(bank, net):
    old, new = adapter("flora", 2, 1), adapter("flora", 2, 2)
    bank.add("lua", [old, adapter("lora", 1, 3)])
    first = pinned(bank, ["lua"], "merged")
    second = pinned(bank, ["lua", "lua"], "merged")
    assert first.plan("first").merged_weight is second.plan("first").merged_weight
    assert pinned(bank, ["lua"], "merged", "lora").plan("first").merged_weight is not first.plan("first").merged_weight
    bank.add("lua", [new])
    third = pinned(bank, ["lua"], "merged")
    assert_close(answer(bank, net, third, X[:1]), by_hand(net, X[:1], new))
    assert_close(answer(bank, net, second, X[:2]), by_hand(net, X[:2], old, old))
    assert len(bank._merged_weights) == 2
    del first, second, third
    gc.collect()
    assert not bank._merged_weights


def test_only_what_is_pinned_and_of_the_family_is_arranged(bank):
    """Anything else would run as the base model, and nobody would notice."""
    bank.add("lua", [adapter("flora")])
    slot = bank.pin("lua", "flora")
    for method in ("bmm-lora", "loop-lora"):
        with pytest.raises(AdapterError, match=rf"'lua' has no lora checkpoint, which method {method} needs"):
            bank.arrange([slot, IDENTITY_SLOT], method)
    with pytest.raises(AdapterError, match="'lua' has no lora checkpoint"):
        bank.arrange([slot], "merged", "lora")
    bank.unpin(slot)
    for unpinned in (slot, slot + 1, 999):
        with pytest.raises(AdapterError, match=f"slot {unpinned} is pinned by no request"):
            bank.arrange([IDENTITY_SLOT, unpinned], "flora")


@pytest.mark.parametrize("method", ["flora", "bmm-lora", "merged", "base"])
def test_rows_without_adapters_are_the_base_layer_and_take_no_slot(bank, net, method):
    bank.add("lua", [adapter("flora"), adapter("lora")])
    serving = pinned(bank, [None, None], method)
    assert serving.slots == (IDENTITY_SLOT, IDENTITY_SLOT) and serving.plan("first") is None
    assert torch.equal(answer(bank, net, serving, X[:2]), net(X[:2]))
    assert bank.pin("lua", "base") == IDENTITY_SLOT and bank.slots_used == 0
    bank.unpin(IDENTITY_SLOT)


def test_a_batch_narrows_to_the_rows_that_are_left_and_the_others_let_go(bank, net):
    added = {name: adapter("flora", rank, rank) for name, rank in (("small", 1), ("large", 5))}
    for name, entry in added.items():
        bank.add(name, [entry])
    names = ["large", "small", None, "large"]
    serving = pinned(bank, names, "flora")
    assert_close(answer(bank, net, serving, X), by_hand(net, X, *map(added.get, names)))
    for gone in (0, 2):
        bank.unpin(serving.slots[gone])
    narrowed = bank.arrange([serving.slots[1], serving.slots[3]], "flora")
    assert_close(answer(bank, net, narrowed, X[[1, 3]]), by_hand(net, X[[1, 3]], added["small"], added["large"]))
    for slot in narrowed.slots:
        bank.unpin(slot)
    with pytest.raises(AdapterError, match="is pinned by no request"):
        bank.arrange(narrowed.slots, "flora")


def test_a_batch_of_more_adapters_than_slots_is_refused_and_pins_none(net):
    bank = make_bank(net, num_slots=2)
    for seed in range(3):
        bank.add(f"tag{seed}", [adapter("flora", 1, seed)])
    with pytest.raises(AdapterError, match="'tag2' has to wait: all 2 adapter slots are in use"):
        with pinned_batch(bank, ["tag0", "tag1", "tag0", "tag2"], "flora"):
            pass
    assert bank.pin("tag2", "flora") is not None, "pins are left behind"


# ----------------------------------------------------------------------------------------------------------------- slots


def stocked_with(num_slots: int, *names: str, rank: int = 2) -> tuple[AdapterBank, dict[str, Adapter]]:
    """A bank of few slots and fLoRA adapters that differ."""
    bank = make_bank(num_slots=num_slots)
    added = {name: adapter("flora", rank, seed) for seed, name in enumerate(names)}
    for name, entry in added.items():
        bank.add(name, [entry])
    return bank, added


def test_adapters_take_slots_when_they_are_wanted_and_no_more_than_there_are():
    bank, added = stocked_with(3, *"abcdef")
    assert (bank.slot_capacity, bank.num_slots, bank.slots_used) == (3, 3, 0) and not bank._stacks
    for name in "abcdefabc":
        slot = bank.pin(name, "flora")
        assert_holds(bank, slot, added[name])
        bank.unpin(slot)
    assert bank.slots_used == 3
    assert all(stack.A.shape[0] == stack.B.shape[0] == len(stack.ranks) == 4 for stack in bank._stacks.values())


def test_the_least_recently_used_gives_its_slot():
    bank, _ = stocked_with(3, *"abcde")
    slots = {name: use(bank, name) for name in "abc"}
    assert use(bank, "a") == slots["a"], "an adapter that is on the device is put there again"
    assert use(bank, "d") == slots["b"]
    held = bank.pin("c", "flora")
    use(bank, "a")
    bank.unpin(held)  # its last user left after that of `a`
    assert use(bank, "e") == slots["b"] and use(bank, "b") == slots["a"] and use(bank, "c") == slots["c"]


def test_a_pinned_slot_is_never_given_away():
    bank, added = stocked_with(2, *"abc")
    slots = [bank.pin("a", "flora"), bank.pin("a", "flora"), bank.pin("b", "flora")]
    assert slots[0] == slots[1] != slots[2]
    for _ in range(3):
        assert bank.pin("c", "flora") is None
        with pytest.raises(AdapterError, match="adapter 'c' has to wait: all 2 adapter slots are in use"):
            bank.pin_now("c", "flora")
    assert bank.pin("b", "flora") == slots[2], "what is there can be shared though nothing is free"
    bank.unpin(slots[2])
    bank.unpin(slots[0])
    assert bank.pin("c", "flora") is None, "one request of two let go, and the slot is given away"
    assert_holds(bank, slots[0], added["a"])
    assert_holds(bank, slots[2], added["b"])
    bank.unpin(slots[0])
    assert bank.pin("c", "flora") == slots[0]
    assert_holds(bank, slots[0], added["c"])
    assert_holds(bank, slots[2], added["b"])


@pytest.mark.parametrize("times", [0, 1, 2])
def test_letting_go_more_often_than_pinned_is_an_error(times):
    bank, _ = stocked_with(2, "a")
    slot = 1
    for _ in range(times):
        slot = bank.pin("a", "flora")
    for _ in range(times):
        bank.unpin(slot)
    with pytest.raises(ValueError, match=f"slot {slot} is not pinned"):
        bank.unpin(slot)
    assert bank.pin("a", "flora") is not None


@pytest.mark.parametrize("users", [1, 3])
@pytest.mark.parametrize("change", ["replaced", "removed", "removed and added again"])
def test_who_has_it_pinned_keeps_the_version_and_who_comes_later_gets_the_new_one(net, change, users):
    bank = make_bank(net, num_slots=2)
    old, new = adapter("flora", 3, 1), adapter("flora", 2, 2)
    bank.add("lua", [old])
    serving = pinned(bank, ["lua"] * users, "flora")  # it has not run yet: its plans are made afterwards
    if change != "replaced":
        bank.remove("lua")
        with pytest.raises(UnknownAdapterError):
            bank.pin("lua", "flora")
    if change != "removed":
        bank.add("lua", [new])
        later = bank.pin("lua", "flora")
        assert later != serving.slots[0]
        assert_holds(bank, later, new)
        bank.unpin(later)
    bank.add("rb", [adapter("flora", 5, 3)])
    use(bank, "rb")
    for slot in serving.slots:
        assert_holds(bank, slot, old)
    assert_close(answer(bank, net, serving, X[:users]), by_hand(net, X[:users], *[old] * users))
    used = bank.slots_used
    for slot in serving.slots:
        assert bank.slots_used == used, "the slot is given up before its last user"
        bank.unpin(slot)
    assert bank.slots_used == used - 1, "the old version keeps its slot"
    if change != "removed":
        assert_holds(bank, bank.pin("lua", "flora"), new)


def test_a_version_that_is_replaced_again_and_again_takes_one_slot_for_each_user():
    bank = make_bank(num_slots=4)
    versions = [adapter("flora", 1 + seed % 4, seed) for seed in range(4)]
    slots = []
    for version in versions:
        bank.add("lua", [version])
        slots.append(bank.pin("lua", "flora"))
    assert len(set(slots)) == 4
    for slot, version in zip(slots, versions, strict=True):
        assert_holds(bank, slot, version)
    for slot in slots:
        bank.unpin(slot)
    assert bank.slots_used == 1, "versions that nobody can ask for any more keep their slots"


def test_a_slot_that_is_used_again_holds_nothing_of_its_former_adapter(net):
    """Neither components beyond the new rank, nor layers or a family that the new adapter does not have."""
    bank = make_bank(net, num_slots=1)
    bank.add("lua", [adapter("flora", 5, 1), adapter("lora", 4, 2)])
    new = adapter("flora", 2, 3, ("first",))
    bank.add("rb", [new])
    assert use(bank, "lua") == use(bank, "rb")
    serving = pinned(bank, ["rb"], "flora")
    assert_holds(bank, serving.slots[0], new)
    assert_close(answer(bank, net, serving, X[:1]), by_hand(net, X[:1], new))
    with pytest.raises(AdapterError, match="no lora checkpoint"):
        bank.pin("rb", "bmm-lora")


def test_slot_0_is_the_identity_whatever_comes_and_goes():
    bank = make_bank(num_slots=2)
    for seed, rank in enumerate((1, 4, 2, 8, 3)):
        bank.add(f"tag{seed}", [adapter("flora", rank, seed), adapter("lora", rank, seed)])
        assert use(bank, f"tag{seed}") != IDENTITY_SLOT
    for (family, layer), stack in bank._stacks.items():
        assert stack.ranks[IDENTITY_SLOT] == 0
        if family == "flora":
            assert stack.A[IDENTITY_SLOT, 0].eq(1).all() and stack.B[IDENTITY_SLOT, 0].eq(1).all(), layer


def test_growth_of_ranks_leaves_all_others_as_they_were(bank, net):
    """Thirteen tags of ranks up to 9, added one by one: everyone still answers as alone, batches that began before included."""
    added: dict[str, Adapter] = {}
    began: list[tuple[str, object]] = []
    for seed in range(13):
        name = f"tag{seed}"
        added[name] = adapter("flora", 1 + (seed * 5) % 9, seed)
        bank.add(name, [added[name]])
        serving = pinned(bank, [name], "flora")
        if seed % 2:
            answer(bank, net, serving, X[:1])  # half of them have run before the bank grows, half begin afterwards
        began.append((name, serving))
    for name, serving in began:
        assert_close(answer(bank, net, serving, X[:1]), by_hand(net, X[:1], added[name]))
        assert_close(answer(bank, net, pinned(bank, [name], "flora"), X[:1]), by_hand(net, X[:1], added[name]))


def test_a_slot_that_is_filled_during_a_forward_can_be_filled_again_outside_of_one():
    """Tensors that are made in inference mode can never be written outside of it."""
    bank, added = stocked_with(1, *"ab")
    with torch.inference_mode():
        bank.add("c", [adapter("flora", 4, 7)])
        assert_holds(bank, use(bank, "a"), added["a"])
    for name in "bca":
        assert use(bank, name) == 1
    assert_holds(bank, 1, added["a"])


def test_factors_that_are_parameters_in_training_are_copied(bank):
    entry = adapter("flora", 2, 1)
    parameters = {layer: tuple(torch.nn.Parameter(side.clone()) for side in pair) for layer, pair in entry.factors.items()}
    bank.add("lua", [Adapter("flora", parameters, None, "in training")])
    with torch.no_grad():
        for pair in parameters.values():
            pair[0].zero_()
    assert_holds(bank, use(bank, "lua"), entry)


def test_half_precision_is_rounded_once(net):
    bank = make_bank(net.bfloat16(), torch.bfloat16)
    entry = adapter("flora", 3, 1)
    info = bank.add("lua", [entry])
    assert info.size_bytes == bank.host_bytes_used == 3 * NUM_FACTORS * 2
    rounded = {layer: tuple(side.bfloat16() for side in pair) for layer, pair in entry.factors.items()}
    assert_holds(bank, use(bank, "lua"), Adapter("flora", rounded, None, ""))


@pytest.mark.parametrize(
    "error, raised, message",
    [
        (torch.OutOfMemoryError("no memory"), AdapterError, "adapter 'b' does not fit on the device.*fewer adapter slots"),
        (KeyboardInterrupt("stopped"), KeyboardInterrupt, "stopped"),
    ],
    ids=["full device", "interrupted"],
)
def test_an_adapter_that_cannot_be_copied_to_the_device_takes_no_slot(monkeypatch, error, raised, message):
    def fail(*args) -> None:
        raise error

    bank, added = stocked_with(2, *"abc")
    held = bank.pin("a", "flora")
    with monkeypatch.context() as patched:
        patched.setattr(torch, "_foreach_copy_", fail)
        for _ in range(3):
            with pytest.raises(raised, match=message):
                bank.pin("b", "flora")
            assert bank.slots_used == 1
    assert_holds(bank, held, added["a"])
    assert_holds(bank, bank.pin("c", "flora"), added["c"])
    assert bank.counters()["b"] == AdapterCounters()


def test_what_is_counted():
    bank, _ = stocked_with(2, *"abc")
    for name in "aab":  # a miss, a hit, a miss
        use(bank, name)
    held = [bank.pin("a", "flora"), bank.pin("b", "flora")]  # two hits
    assert bank.pin("c", "flora") is None  # counts when it is given a slot
    bank.unpin(held[0])
    use(bank, "c")  # a miss, and `a` is evicted
    use(bank, "a")  # a miss, and `c` is evicted
    bank.add("b", [adapter("flora", 1, 9)])  # pinned: it keeps its slot until it is let go
    bank.pin("b", "flora")  # a miss of the new version, and `a` is evicted
    bank.unpin(held[1])
    counters = bank.counters()
    assert all(entry.copy_s > 0 for entry in counters.values())
    assert {name: (entry.hits, entry.misses, entry.evictions) for name, entry in counters.items()} == {
        "a": (2, 2, 2), "b": (1, 2, 0), "c": (0, 1, 1),
    }  # fmt: skip
    assert all((entry.loads, entry.load_s) == (0, 0) for entry in counters.values()), "nothing was dropped from host memory"
    counters["a"].hits = 99
    assert bank.counters()["a"].hits == 2, "a reader can change what is counted"
    bank.remove("a")
    bank.add("a", [adapter("flora")])
    assert bank.counters()["a"] == AdapterCounters(), "a tag that was removed is counted on"


# ---------------------------------------------------------------------------------------------------------- many threads


def test_tags_come_and_go_on_other_threads_while_requests_run():
    """Each version's numbers are all equal, so that a slot that was written in part, or to two at once, would show."""

    def version(number: int) -> Adapter:
        factors = {
            layer: (torch.full((2, widths[0]), float(number)), torch.full((2, widths[1]), float(number)))
            for layer, widths in SHAPES.items()
        }
        return Adapter("flora", factors, None, str(number))

    bank = make_bank(num_slots=3)
    names = [f"tag{place}" for place in range(6)]
    for name in names:
        bank.add(name, [version(0)])
    newest = dict.fromkeys(names, 0)  # what was there before each pin, at least
    ended, failures = threading.Event(), []

    def change(place: int) -> None:
        try:
            number = 0
            while not ended.is_set():
                number += 1
                name = names[place + 3 * (number % 2)]
                if number % 7 == 0:
                    bank.remove(name)
                bank.add(name, [version(number)])
                newest[name] = number
                bank.prefetch(names)
                assert bank.counters().keys() <= set(names) and bank.info.keys() <= set(names)
        except Exception as error:  # shown by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=change, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    try:
        for step in range(600):
            name = names[step % 6]
            at_least = newest[name]
            try:
                slot = bank.pin(name, "flora")
            except UnknownAdapterError:
                continue  # between removed and added again
            values = {
                value
                for layer in LAYERS
                for side in ("A", "B")
                for value in getattr(bank.stack("flora", layer), side)[slot].unique().tolist()
            }
            assert len(values) == 1 and min(values) >= at_least, (
                f"step {step}: {name} in slot {slot} holds {values}, not {at_least} or newer"
            )
            bank.unpin(slot)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not failures, failures
    assert not bank._users and bank.slots_used <= 3


# ------------------------------------------------------------------------------------------- changes while a batch runs


@pytest.mark.parametrize("steps_before", [0, 1, 5])
@pytest.mark.parametrize("change", ["replaced", "removed", "removed and slot wanted"])
@pytest.mark.parametrize("method", ["flora", "bmm-lora", "merged"])
def test_a_running_batch_never_sees_a_change_of_its_adapters(checkpoints, method, change, steps_before):
    engine = checkpoints["code"].engine("aa", "bb")
    other = checkpoints["code"].sources("cc")["cc"]
    requests = [
        Request(prompt, adapter=tag, max_new_tokens=length, ignore_eos=True)
        for prompt, tag, length in zip(("def a", "x = [", "while"), ("aa", "bb", None), LENGTHS, strict=True)
    ]
    undisturbed = [completion.token_ids for completion in engine.generate(requests, method)]
    generation = engine.start(requests, method)
    for _ in range(steps_before):
        generation.step()
    if change == "replaced":
        engine.add_adapter("aa", other)
        engine.add_adapter("bb", other)
    else:
        engine.remove_adapter("aa")
        engine.remove_adapter("bb")
        if "wanted" in change:
            engine.add_adapter("new", other)
            engine.add_adapter("newer", other)
    while not generation.done:
        generation.step()
    assert [completion.token_ids for completion in generation.completions] == undisturbed
    if change == "replaced":
        later = [completion.token_ids for completion in engine.generate(requests, method)]
        assert later[0] != undisturbed[0] and later[2] == undisturbed[2], "batches that start later get the new adapter"
    assert not engine.bank._users


# ----------------------------------------------------------------------------------------------------------- what is said


@pytest.fixture
def stocked(bank) -> AdapterBank:
    bank.add("lua", [adapter("flora", 2, 1)])
    bank.add("rb", [adapter("lora", 3, 2)])
    bank.add("jl", [adapter("flora", 4, 3), adapter("lora", 1, 4)])
    return bank


def test_which_family_a_method_serves(stocked):
    of_both = ("flora", "flora", "flora", "lora", "lora", "lora", "flora", "flora", None)
    assert [stocked.family_for("jl", method) for method in ops.METHODS] == list(of_both)
    assert stocked.family_for("rb", "merged") == "lora"


def test_a_missing_family_is_an_error_that_says_who_has_it(stocked):
    with pytest.raises(AdapterError, match=r"adapter 'rb' has no flora checkpoint.*method flora-expand.*: jl, lua$"):
        stocked.family_for("rb", "flora-expand")
    with pytest.raises(AdapterError, match=r"adapter 'lua' has no lora checkpoint.*method bmm-lora.*: jl, rb$"):
        stocked.pin("lua", "bmm-lora")
    stocked.remove("jl")
    stocked.remove("rb")
    with pytest.raises(AdapterError, match="no tag has one"):
        stocked.family_for("lua", "bmm-lora")
    assert not stocked._users


@pytest.mark.parametrize("method", ["flora", "bmm-lora", "merged", "base"])
def test_an_unknown_tag_is_an_error_that_says_what_is_loaded(stocked, method):
    with pytest.raises(UnknownAdapterError, match="unknown adapter 'pl'; loaded: jl, lua, rb"):
        stocked.pin("pl", method)
    with pytest.raises(UnknownAdapterError, match="'pl'"):
        stocked.remove("pl")
    assert not stocked._users


def test_of_very_many_tags_an_error_lists_the_first(bank):
    for number in range(1234):
        bank.add(f"tag{number:04}", [adapter("flora", layers=("first",))])
    with pytest.raises(UnknownAdapterError, match=r"loaded: tag0000, .*, tag0019 and 1,214 more$"):
        bank.pin("pl", "flora")
    with pytest.raises(AdapterError, match="no tag has one$"):
        bank.pin("tag0000", "bmm-lora")


def with_numbers(family: str, layer: str, side: int, value: float) -> Adapter:
    entry = adapter(family, 2, 1)
    entry.factors[layer][side][1, 2] = value
    return entry


WRONG = {
    "no checkpoint": ([], "has no checkpoint"),
    "two of a family": ([adapter("flora"), adapter("lora"), adapter("lora", 2)], "two checkpoints of the family lora"),
    "unknown layer": (
        [adapter("flora", layers=("third",), shapes={"third": (D, D)})],
        "'third', which this model does not have",
    ),
    "second of two does not fit": (
        [adapter("flora"), adapter("lora", shapes={"first": (D, D + 2), "second": (D, D)})],
        rf"does not fit layer second: it maps {D} → {D}, the model's layer maps {D + 2} → {D}",
    ),
    "NaN": ([with_numbers("flora", "second", 0, torch.nan)], "NaN or infinite weights on layer second, as float32"),
    "infinity": ([adapter("flora"), with_numbers("lora", "first", 1, -torch.inf)], "NaN or infinite weights on layer first"),
    "sides of two ranks": (
        [Adapter("flora", {"first": (torch.ones(2, D), torch.ones(3, D + 2))}, None, "")],
        "layer first has rank 2 on its A side and 3 on its B side",
    ),
    "a rank that no layer needs": ([adapter("lora", 65)], "has rank 65 on layer first, which maps 6 → 8 and takes 64 at most"),
    "no weights": ([Adapter("flora", {}, None, "")], "has no weights"),
    "transposed": ([adapter("flora", layers=("first",), shapes={"first": (D + 2, D)})], "does not fit layer first"),
}


@pytest.mark.parametrize("name", ["new", "lua"], ids=["new tag", "tag that exists"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_refused_adapter_changes_nothing(stocked, name, wrong):
    adapters, message = WRONG[wrong]
    use(stocked, "lua")
    before = contents(stocked)
    with pytest.raises(AdapterError, match=message) as caught:
        stocked.add(name, adapters)
    assert repr(name) in str(caught.value), "the error does not name the tag"
    assert_unchanged(stocked, before)


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_a_tag_that_no_request_can_name_is_refused(bank, name):
    before = contents(bank)
    with pytest.raises(AdapterError, match="tag must be a word"):
        bank.add(name, [adapter("flora")])
    assert_unchanged(bank, before)


def test_a_number_that_is_too_large_for_the_models_precision_is_refused(net):
    large = with_numbers("lora", "second", 1, 1e5)
    make_bank(make_net()).add("lua", [large])
    with pytest.raises(AdapterError, match="adapter 'lua' has NaN or infinite weights on layer second, as float16"):
        make_bank(net.half(), torch.float16).add("lua", [large])


@pytest.mark.parametrize(
    "options, message", [({"num_slots": 0}, "slots must be at least 1, not 0"), ({"host_bytes": -1}, "not -1")]
)
def test_a_bank_of_nonsense_size_is_refused(options, message):
    with pytest.raises(AdapterError, match=message):
        make_bank(**options)
