"""Slots: who holds one, when it is reused, and that nothing a batch uses ever changes under it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flora import AdapterError, Request, UnknownAdapterError
from flora.bank import IDENTITY_SLOT, AdapterBank
from flora.formats import Adapter
from flora.layers import ServingHolder, inject

D = 6
LAYERS = ("first", "second")
LENGTHS = (3, 12, 7)  # new tokens: rows end apart, so the batch is compacted while it runs


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D + 2), nn.Linear(D + 2, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


SHAPES = {"first": (D, D + 2), "second": (D + 2, D)}


def adapter(family: str, rank: int = 1, seed: int = 0, layers: tuple[str, ...] = LAYERS, shapes: dict | None = None) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in layers:
        d_in, d_out = (shapes or SHAPES)[layer]
        factors[layer] = (torch.randn(rank, d_in, generator=generator), torch.randn(rank, d_out, generator=generator))
    return Adapter(family, factors, None, f"{family}-{seed}")


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


@pytest.fixture
def bank(net) -> AdapterBank:
    holder = ServingHolder()
    return AdapterBank(inject(net, holder), holder, torch.device("cpu"), torch.float32)


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
    stacks = {key: (stack.A.clone(), stack.B.clone(), list(stack.ranks)) for key, stack in bank._stacks.items()}
    return {
        "info": bank.info,
        "num_slots": bank.num_slots,
        "free": list(bank._free),
        "slot_of": dict(bank._slot_of),
        "stacks": stacks,
    }


def assert_unchanged(bank: AdapterBank, before: dict) -> None:
    after = contents(bank)
    for what in ("info", "num_slots", "free", "slot_of"):
        assert after[what] == before[what], what
    assert after["stacks"].keys() == before["stacks"].keys()
    for key, (A, B, ranks) in after["stacks"].items():
        assert torch.equal(A, before["stacks"][key][0]) and torch.equal(B, before["stacks"][key][1]), key
        assert ranks == before["stacks"][key][2]


X = torch.linspace(-1, 1, 4 * 2 * D).reshape(4, 2, D)


# -------------------------------------------------------------------------------------------------------------- serving


@pytest.mark.parametrize("method", ["flora", "flora-expand", "flora-modulate", "bmm-lora", "loop-lora"])
def test_a_batch_of_mixed_ranks_and_no_adapter(bank, net, method):
    family = "lora" if "lora" in method.split("-") else "flora"
    small, large = adapter(family, 1, 1), adapter(family, 5, 2)
    bank.add("small", [small])
    bank.add("large", [large])
    serving = bank.serving(["large", None, "small", "large"], method)
    assert_close(answer(bank, net, serving, X), by_hand(net, X, large, None, small, large))


def test_layers_that_an_adapter_does_not_touch_run_as_the_base_layer(bank, net):
    """`first` has factors for one tag, `second` for another; a third has both, and the fourth row none."""
    one, other, both = adapter("flora", 2, 1, ("first",)), adapter("flora", 3, 2, ("second",)), adapter("flora", 1, 3)
    for name, entry in (("one", one), ("other", other), ("both", both)):
        bank.add(name, [entry])
    serving = bank.serving(["one", "other", "both", None], "flora")
    assert_close(answer(bank, net, serving, X), by_hand(net, X, one, other, both, None))
    alone = bank.serving(["one"], "flora")
    assert alone.plan("second") is None, "a layer that no row adapts has something to do"


def test_a_tag_of_two_families_serves_each_method_its_own(bank, net):
    flora, lora = adapter("flora", 2, 1), adapter("lora", 3, 2)
    info = bank.add("lua", [flora, lora])
    assert (info.families, info.ranks, info.layers) == (("flora", "lora"), {"flora": 2, "lora": 3}, {"flora": 2, "lora": 2})
    assert info.size_bytes == 4 * sum(A.numel() + B.numel() for entry in (flora, lora) for A, B in entry.factors.values())
    for method, truth in (("flora", flora), ("bmm-lora", lora), ("base", None)):
        assert_close(answer(bank, net, bank.serving(["lua"], method), X[:1]), by_hand(net, X[:1], truth))
    for family, truth in ((None, flora), ("flora", flora), ("lora", lora)):
        serving = bank.serving(["lua"], "merged", family)
        assert_close(answer(bank, net, serving, X[:1]), by_hand(net, X[:1], truth))


def test_weights_are_merged_with_one_adapter_at_a_time(bank):
    bank.add("lua", [adapter("flora")])
    with pytest.raises(AdapterError, match="one adapter at a time"):
        bank.serving(["lua", None], "merged")


def test_a_narrowed_batch_keeps_its_rows(bank, net):
    small, large = adapter("flora", 1, 1), adapter("flora", 5, 2)
    bank.add("small", [small])
    bank.add("large", [large])
    serving = bank.serving(["large", "small", None, "large"], "flora")
    answer(bank, net, serving, X)
    narrowed = bank.narrow(serving, [1, 3])
    assert_close(answer(bank, net, narrowed, X[[1, 3]]), by_hand(net, X[[1, 3]], small, large))
    bank.release(narrowed)
    assert not bank._users, "pins are left behind"


# ----------------------------------------------------------------------------------------------------------------- slots


def test_a_slot_is_reused_only_after_its_last_batch(bank, net):
    old = adapter("flora", 2, 1)
    bank.add("lua", [old])
    slot = bank._slot_of["lua"]
    first, second = bank.serving(["lua", None], "flora"), bank.serving(["lua"], "flora")
    bank.remove("lua")
    bank.add("rb", [adapter("flora", 2, 2)])
    assert bank._slot_of["rb"] != slot
    bank.release(first)
    bank.add("jl", [adapter("flora", 2, 3)])
    assert bank._slot_of["jl"] != slot, "one batch of two let go, and the slot is given away"
    assert_close(answer(bank, net, second, X[:1]), by_hand(net, X[:1], old))
    bank.release(second)
    bank.add("pl", [adapter("flora", 2, 4)])
    assert bank._slot_of["pl"] == slot, "a free slot is left unused"


def test_a_reused_slot_holds_nothing_of_its_former_adapter(bank, net):
    """Neither components beyond the new rank, nor layers or a family that the new adapter does not have."""
    bank.add("lua", [adapter("flora", 5, 1), adapter("lora", 4, 2)])
    bank.remove("lua")
    new = adapter("flora", 2, 3, ("first",))
    bank.add("rb", [new])
    assert bank.num_slots == 2
    assert_close(answer(bank, net, bank.serving(["rb"], "flora"), X[:1]), by_hand(net, X[:1], new))
    with pytest.raises(AdapterError, match="no lora checkpoint"):
        bank.serving(["rb"], "bmm-lora")


def test_many_replacements_take_no_more_memory(bank):
    for seed in range(20):
        bank.add("lua", [adapter("flora", 1 + seed % 4, seed)])
    assert bank.num_slots == 3, "a tag and the identity, and one slot to write a replacement to before the old one is let go"
    bank.remove("lua")
    assert sorted(bank._free) == [1, 2]


def test_slot_0_is_the_identity_whatever_comes_and_goes(bank, net):
    for seed, rank in enumerate((1, 4, 2, 8, 3)):
        bank.add(f"tag{seed}", [adapter("flora", rank, seed), adapter("lora", rank, seed)])
        assert bank._slot_of[f"tag{seed}"] != IDENTITY_SLOT
    for (family, layer), stack in bank._stacks.items():
        assert stack.ranks[IDENTITY_SLOT] == 0
        if family == "flora":
            assert stack.A[IDENTITY_SLOT, 0].eq(1).all() and stack.B[IDENTITY_SLOT, 0].eq(1).all(), layer


def test_growth_of_slots_and_ranks_leaves_all_others_as_they_were(bank, net):
    """Thirteen tags of ranks up to 9, added one by one: everyone still answers as alone, batches that began before included."""
    added: dict[str, Adapter] = {}
    began: list[tuple[str, object]] = []
    for seed in range(13):
        name = f"tag{seed}"
        added[name] = adapter("flora", 1 + (seed * 5) % 9, seed)
        bank.add(name, [added[name]])
        serving = bank.serving([name], "flora")
        if seed % 2:
            answer(bank, net, serving, X[:1])  # half of them have run before the bank grows, half begin afterwards
        began.append((name, serving))
    for name, serving in began:
        assert_close(answer(bank, net, serving, X[:1]), by_hand(net, X[:1], added[name]))
        assert_close(answer(bank, net, bank.serving([name], "flora"), X[:1]), by_hand(net, X[:1], added[name]))


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
    assert not engine.bank._users and not engine.bank._retired


# ----------------------------------------------------------------------------------------------------------- what is said


@pytest.fixture
def stocked(bank) -> AdapterBank:
    bank.add("lua", [adapter("flora", 2, 1)])
    bank.add("rb", [adapter("lora", 3, 2)])
    bank.add("jl", [adapter("flora", 4, 3), adapter("lora", 1, 4)])
    return bank


def test_which_family_a_method_serves(stocked):
    methods = ("flora", "flora-expand", "flora-modulate", "bmm-lora", "loop-lora", "merged", "base")
    of_both = ("flora", "flora", "flora", "lora", "lora", "flora", None)
    assert [stocked.family_for("jl", method) for method in methods] == list(of_both)
    assert stocked.family_for("rb", "merged") == "lora"


def test_a_missing_family_is_an_error_that_says_who_has_it(stocked):
    with pytest.raises(AdapterError, match=r"adapter 'rb' has no flora checkpoint.*method flora-expand.*: jl, lua$"):
        stocked.family_for("rb", "flora-expand")
    with pytest.raises(AdapterError, match=r"adapter 'lua' has no lora checkpoint.*method bmm-lora.*: jl, rb$"):
        stocked.serving(["jl", "lua"], "bmm-lora")
    stocked.remove("jl")
    stocked.remove("rb")
    with pytest.raises(AdapterError, match="no tag has one"):
        stocked.family_for("lua", "bmm-lora")
    assert not stocked._users


@pytest.mark.parametrize("method", ["flora", "bmm-lora", "merged", "base"])
def test_an_unknown_tag_is_an_error_that_says_what_is_loaded(stocked, method):
    with pytest.raises(UnknownAdapterError, match="unknown adapter 'pl'; loaded: jl, lua, rb"):
        stocked.serving(["lua", "pl"] if method == "flora" else ["pl"], method)
    with pytest.raises(UnknownAdapterError, match="'pl'"):
        stocked.remove("pl")
    assert not stocked._users


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
    "transposed": ([adapter("flora", layers=("first",), shapes={"first": (D + 2, D)})], "does not fit layer first"),
}


@pytest.mark.parametrize("name", ["new", "lua"], ids=["new tag", "tag that exists"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_refused_adapter_changes_nothing(stocked, name, wrong):
    adapters, message = WRONG[wrong]
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
