"""Every form of every method against the plain float64 reference."""

from __future__ import annotations

import math
from copy import copy
from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from flora import ops
from flora.cost import cheaper_form
from flora.routing import gather_components

FORMS = {
    "flora": (ops.flora, ops.flora_expand, ops.flora_modulate),
    "lora": (ops.bmm_lora, ops.loop_lora, ops.sgmv_lora),
}
REFERENCE = {"flora": ops.flora_reference, "lora": ops.lora_reference}
ALL_FORMS = [(family, form) for family, forms in FORMS.items() for form in forms]
FORM_IDS = [form.__name__ for _, form in ALL_FORMS]

TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1.2e-2}
"""Largest |error| as a share of Σ |terms|, what the same product gives when nothing cancels: a few roundings of the dtype, √d
of them where a product of one row with a weight that is stored by input sums d terms one after another."""

RANK = 8
RANKS = [0, 1, 2, 3, 4, 5, 6, 7, 8]
"""True rank by slot: slot 0 is the identity, slot r has rank r."""

SIZES = [
    (batch, l, d_in, d_out) for batch in (1, 3, 7, 33) for l in (1, 5) for d_in, d_out in ((1, 1), (129, 129), (1, 129), (129, 1))
] + [(33, 1, 2049, 129), (3, 5, 129, 2049), (7, 1, 2049, 1), (1, 5, 1, 2049), (7, 1, 2049, 1031)]


class Problem:
    """Random inputs of one size, and for each family the truth and the size of its terms.

    A (slots, RANK, d_in), B (slots, RANK, d_out): slot s has RANKS[s] components and behind them NaN, which nobody may read.
    """

    def __init__(self, batch: int, l: int, d_in: int, d_out: int, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.dtype = dtype
        self.x, self.weight, self.bias = normal(batch, l, d_in), normal(d_out, d_in) / math.sqrt(d_in), normal(d_out)
        self.A, self.B = normal(len(RANKS), RANK, d_in), normal(len(RANKS), RANK, d_out)
        # Neighbouring rows have different ranks, and from nine rows on every rank is there and slots repeat.
        self.slots = torch.tensor([(5 * row + 3) % len(RANKS) for row in range(batch)])
        self.routing = ops.route(self.slots.tolist(), RANKS, RANK)
        for slot, rank in enumerate(RANKS):
            self.A[slot, rank:] = self.B[slot, rank:] = torch.nan
        self.A[0, 0] = self.B[0, 0] = 1.0

    def truth(self, family: str, bias: bool, size_of_terms: bool = False) -> torch.Tensor:
        """The reference in float64 (n, l, d_out); size_of_terms: the same with every number's absolute value."""
        A, B = self.A.double().nan_to_num(0.0), self.B.double().nan_to_num(0.0)
        if family == "lora":
            A[0] = B[0] = 0.0  # the identity adds nothing
        arguments = [self.x.double(), self.weight.double(), A, B]
        if size_of_terms:
            arguments = [argument.abs() for argument in arguments]
        y = REFERENCE[family](*arguments, self.slots)
        return y + (self.bias.double().abs() if size_of_terms else self.bias.double()) if bias else y


@cache
def problem_and_truths(batch: int, l: int, d_in: int, d_out: int, dtype: torch.dtype):
    problem = Problem(batch, l, d_in, d_out, dtype)
    truths = {
        (family, bias): (problem.truth(family, bias), problem.truth(family, bias, size_of_terms=True))
        for family in FORMS
        for bias in (False, True)
    }
    return problem, truths


def assert_close(y: torch.Tensor, truth: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    assert y.shape == truth.shape
    difference = (y.double() - truth).abs()
    share = (difference / scale.clamp_min(1e-300)).max().item()
    assert share <= TOLERANCE[dtype], (
        f"{what}: max_diff {difference.max():.3g}, at most {share:.3g} of the terms' size, allowed is {TOLERANCE[dtype]:g}"
    )


# ----------------------------------------------------------------------------------------------------------- the truth


def test_references_are_the_formulas():
    generator = torch.Generator().manual_seed(1)
    x, weight, A, B, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 2, 4), (5, 4), (2, 3, 4), (2, 3, 5), (5,))
    )
    slots = torch.tensor([1, 0, 1])
    merged = torch.einsum("nko,nki->noi", B[slots], A[slots])  # (n, d_out, d_in), Bᵀ A of every row
    flora = torch.einsum("nli,noi->nlo", x, weight * merged) + bias
    lora = torch.einsum("nli,noi->nlo", x, weight + merged) + bias
    for name, y, truth in (
        ("flora", ops.flora_reference(x, weight, A, B, slots, bias), flora),
        ("lora", ops.lora_reference(x, weight, A, B, slots, bias), lora),
    ):
        max_diff = (y - truth).abs().max().item()
        assert max_diff < 1e-13, f"{name}: max_diff {max_diff:.3g}"


# --------------------------------------------------------------------------------------------------------- every size


@pytest.fixture(params=["training", "serving"])
def stored(request):
    """How a weight is stored. While serving, no gradient is kept, and what is intermediate is overwritten."""
    if request.param == "training":
        yield lambda weight: weight
        return
    with torch.inference_mode():
        yield lambda weight: weight.T.contiguous().T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES, ids=["x".join(map(str, size)) for size in SIZES])
def test_every_form_with_ranks_mixed(size, dtype, stored):
    """Ranks 0 (no adapter) to 8 in one batch, by their true ranks; NaN behind them is never touched."""
    problem, truths = problem_and_truths(*size, dtype)
    weight = stored(problem.weight)
    for family, form in ALL_FORMS:
        for bias in (None, problem.bias):
            y = form(problem.x, weight, problem.A, problem.B, problem.slots, bias, problem.routing)
            assert y.dtype == dtype
            assert_close(y, *truths[family, bias is not None], dtype, f"{form.__name__}, bias {bias is not None}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [(1, 1, 129, 129), (3, 5, 129, 1), (7, 1, 1, 129), (33, 5, 129, 129)], ids=str)
def test_every_form_without_routing(size, dtype):
    """The public signature alone: every slot has the full rank, zeros behind its own components."""
    problem, truths = problem_and_truths(*size, dtype)
    A, B = problem.A.nan_to_num(0.0), problem.B.nan_to_num(0.0)
    for family, form in ALL_FORMS:
        if family == "lora":
            A, B = A.clone(), B.clone()
            A[0] = B[0] = 0.0
        for bias in (None, problem.bias):
            y = form(problem.x, problem.weight, A, B, problem.slots, bias)
            assert_close(y, *truths[family, bias is not None], dtype, f"{form.__name__}, bias {bias is not None}")


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("l", [1, 5], ids=["decode", "prefill"])
def test_every_form_with_one_rank(l, rank, stored):
    """Batches whose rows all have one rank take shortcuts of their own."""
    problem = Problem(7, l, 33, 17, torch.float32)
    problem.weight = stored(problem.weight)
    problem.slots = torch.full((7,), rank)
    problem.routing = ops.route([rank] * 7, RANKS, RANK)
    assert problem.routing.uniform_rank == rank
    for family, form in ALL_FORMS:
        y = form(problem.x, problem.weight, problem.A, problem.B, problem.slots, problem.bias, problem.routing)
        assert_close(
            y, problem.truth(family, True), problem.truth(family, True, True), torch.float32, f"{form.__name__}, rank {rank}"
        )


@pytest.mark.parametrize("slots", [None, [4] * 7], ids=["ranks mixed", "one rank"])
def test_a_routing_for_one_layer_keeps_its_factors_and_gathers_them_once(slots, monkeypatch):
    """Step after step of one layer is what the reference says of that step's rows; another layer's factors are not mixed in."""
    gathered = []
    monkeypatch.setattr("flora.routing.gather_components", lambda *args: gathered.append(args) or gather_components(*args))
    steps = [Problem(7, 1, 33, 17, torch.float32, seed) for seed in range(2)]
    shared = ops.route(slots or steps[0].slots.tolist(), RANKS, RANK)
    gathering = [(family, form) for family, form in ALL_FORMS if form in (ops.flora, ops.flora_expand, ops.bmm_lora)]
    for family, form in gathering:
        for layer in steps:  # each problem's factors are a layer of their own
            routing = shared.for_one_layer()
            for step in steps:
                now = copy(layer)
                now.x, now.slots = step.x, shared.slots
                y = form(now.x, now.weight, now.A, now.B, now.slots, now.bias, routing)
                assert_close(y, now.truth(family, True), now.truth(family, True, True), torch.float32, form.__name__)
            if slots is not None:
                assert len(gathered) == 2, "A and B once each, for all steps"
            gathered.clear()


@pytest.mark.parametrize("slots", [None, [4] * 7], ids=["ranks mixed", "one rank"])
@pytest.mark.parametrize("l", [1, 5], ids=["decode", "prefill"])
def test_inputs_are_left_as_they_were(l, slots, stored):
    """And what a routing keeps for a layer's next step."""
    problem = Problem(7, l, 33, 17, torch.float32)
    weight, slots = stored(problem.weight), slots or problem.slots.tolist()
    inputs = (problem.x, weight, problem.A, problem.B, problem.bias)
    before = [tensor.clone() for tensor in inputs]
    for _, form in ALL_FORMS:
        routing = ops.route(slots, RANKS, RANK).for_one_layer()
        first, second = (
            form(problem.x, weight, problem.A, problem.B, routing.slots, problem.bias, routing).clone() for _ in range(2)
        )
        assert torch.equal(first, second), form.__name__
        for tensor, was in zip(inputs, before, strict=True):
            assert torch.equal(tensor.nan_to_num(7.0), was.nan_to_num(7.0)), form.__name__


def test_adapters_are_modulated_together_as_far_as_memory_goes(monkeypatch):
    """Segments of 2, 1, 1, 3, 1 and 1 rows, one of them the bare layer: the same answers, however many are formed at once."""
    problem = Problem(9, 5, 33, 17, torch.float32)
    problem.slots = torch.tensor([3, 1, 2, 5, 3, 0, 5, 4, 5])
    problem.routing = ops.route(problem.slots.tolist(), [0, 2, 2, 2, 3, 2, 2, 2, 2], RANK)
    for slot, rank in enumerate([0, 2, 2, 2, 3, 2]):
        for side in (problem.A, problem.B):
            side[slot, max(1, rank) :] = torch.nan
            side[slot, :rank] = side[slot, :rank].nan_to_num(0.5)
    assert [(block.rank, block.slots.tolist()) for block in problem.routing.blocks] == [
        (2, [3]),
        (2, [1, 2]),
        (2, [5]),
        (0, [0]),
        (3, [4]),
    ]
    merge, sizes = ops.merge_flora, []
    monkeypatch.setattr(ops, "merge_flora", lambda weight, A, B: sizes.append(A.shape[0]) or merge(weight, A, B))
    for at_once, expected in ((1, [1, 1, 1, 1, 1]), (2, [1, 2, 1, 1])):
        sizes.clear()
        monkeypatch.setitem(ops.MODULATED_BYTES, "cpu", at_once * problem.weight.numel() * 4)
        y = ops.flora_modulate(problem.x, problem.weight, problem.A, problem.B, problem.slots, problem.bias, problem.routing)
        assert_close(y, problem.truth("flora", True), problem.truth("flora", True, True), torch.float32, f"{at_once} at once")
        assert sizes == expected


@pytest.mark.parametrize("l, form", [(1, "flora-expand"), (64, "flora-modulate")])
def test_flora_is_the_form_it_picks(l, form):
    problem = Problem(7, l, 33, 17, torch.float32)
    tokens_and_ranks = [(segment.rows.numel() * l, segment.rank) for segment in problem.routing.segments]
    assert cheaper_form(tokens_and_ranks, 4, "cpu") == form, "the example no longer shows what it should"
    arguments = (problem.x, problem.weight, problem.A, problem.B, problem.slots, problem.bias, problem.routing)
    picked, same, other = ops.flora(*arguments), ops.function_of(form)(*arguments), None
    other = (ops.flora_modulate if form == "flora-expand" else ops.flora_expand)(*arguments)
    assert torch.equal(picked, same)
    assert not torch.equal(picked, other), "both forms round alike here: the comparison says nothing"


# ----------------------------------------------------------------------------------------------------------- relations


def relation_problem(rank: int):
    generator = torch.Generator().manual_seed(rank)
    shapes = {"x": (4, 3, 21), "weight": (13, 21), "A": (rank, 21), "B": (rank, 13), "inwards": (21,), "outwards": (13,)}
    return {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def served(p: dict, A: torch.Tensor, B: torch.Tensor, form) -> torch.Tensor:
    return form(p["x"], p["weight"], A[None], B[None], torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("form", FORMS["flora"], ids=lambda form: form.__name__)
class TestRelations:
    """PAPER's list: other adapters are fLoRA with some factors at one."""

    def test_ia3_that_scales_the_output(self, form):
        p = relation_problem(1)
        y = served(p, torch.ones(1, 21).double(), p["outwards"][None], form)
        max_diff = (y - p["outwards"] * (p["x"] @ p["weight"].T)).abs().max().item()
        assert max_diff < 1e-12, f"max_diff {max_diff:.3g}"

    def test_ia3_that_scales_the_input(self, form):
        p = relation_problem(1)
        y = served(p, p["inwards"][None], torch.ones(1, 13).double(), form)
        max_diff = (y - (p["inwards"] * p["x"]) @ p["weight"].T).abs().max().item()
        assert max_diff < 1e-12, f"max_diff {max_diff:.3g}"

    def test_hira_is_one_more_component_of_ones(self, form):
        p, scale = relation_problem(3), 0.7
        A = torch.cat([torch.ones(1, 21).double(), p["A"]])
        B = torch.cat([torch.ones(1, 13).double(), scale * p["B"]])
        hira = p["weight"] + p["weight"] * (scale * p["B"].T @ p["A"])
        max_diff = (served(p, A, B, form) - p["x"] @ hira.T).abs().max().item()
        assert max_diff < 1e-12, f"max_diff {max_diff:.3g}"

    def test_no_adapter_is_one_component_of_ones(self, form):
        p = relation_problem(1)
        y = served(p, torch.ones(1, 21).double(), torch.ones(1, 13).double(), form)
        max_diff = (y - p["x"] @ p["weight"].T).abs().max().item()
        assert max_diff < 1e-12, f"max_diff {max_diff:.3g}"


@pytest.mark.parametrize("family", FORMS)
def test_merged_weights_are_the_same_layer(family):
    p = relation_problem(4)
    merge = {"flora": ops.merge_flora, "lora": ops.merge_lora}[family]
    y = p["x"] @ merge(p["weight"], p["A"], p["B"]).T
    truth = REFERENCE[family](p["x"], p["weight"], p["A"][None], p["B"][None], torch.zeros(4, dtype=torch.int64))
    max_diff = (y - truth).abs().max().item()
    assert max_diff < 1e-12, f"max_diff {max_diff:.3g}"


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("family, form", ALL_FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("routed", [True, False], ids=["routed", "unrouted"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_gradients_are_the_references(family, form, routed, dtype, frozen):
    """With respect to the input, both factors and the bias, and to a base weight that is trained too; the ranks are 1, 3 and 3."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"x": (5, 3, 17), "weight": (11, 17), "A": (3, 3, 17), "B": (3, 3, 11), "bias": (11,)}
    p = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    upstream = torch.randn(5, 3, 11, generator=generator, dtype=torch.float64)
    slots, ranks = [2, 0, 1, 2, 0], [1, 3, 3]
    p["A"][0, 1:] = p["B"][0, 1:] = 0.0

    def gradients(function, dtype, **options):
        wanted = ["x", "A", "B", "bias"] + ([] if frozen else ["weight"])
        leaves = {name: tensor.to(dtype).requires_grad_(name in wanted) for name, tensor in p.items()}
        y = function(leaves["x"], leaves["weight"], leaves["A"], leaves["B"], torch.tensor(slots), leaves["bias"], **options)
        return dict(
            zip(wanted, torch.autograd.grad((y * upstream.to(dtype)).sum(), [leaves[name] for name in wanted]), strict=True)
        )

    truth = gradients(REFERENCE[family], torch.float64)
    options = {"routing": ops.route(slots, ranks, 3)} if routed else {}
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for name, gradient in gradients(form, dtype, **options).items():
        if routed and name in "AB":  # components beyond a slot's rank take no part: nothing trains them
            assert not gradient[0, 1:].any(), f"{name}: gradient behind the true rank"
            truth[name][0, 1:] = 0.0
        max_diff = (gradient.double() - truth[name]).abs().max().item()
        assert max_diff <= tolerance * truth[name].abs().max(), f"{form.__name__}, gradient of {name}: max_diff {max_diff:.3g}"


# ---------------------------------------------------------------------------------------------------------- properties


@st.composite
def batches(draw):
    """(x, weight, A, B, slots, ranks) in float64, with NaN behind every slot's true rank."""
    slots = draw(st.lists(st.integers(0, 4), min_size=1, max_size=9))
    ranks = [0] + draw(st.lists(st.integers(0, 4), min_size=4, max_size=4))
    l, d_in, d_out = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = ((len(slots), l, d_in), (d_out, d_in), (5, 4, d_in), (5, 4, d_out))
    x, weight, A, B = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    for slot, rank in enumerate(ranks):
        A[slot, rank:] = B[slot, rank:] = torch.nan
        if rank == 0:
            A[slot, 0] = B[slot, 0] = 1.0
    return x, weight, A, B, slots, ranks


def serve(form, batch, bias=None) -> torch.Tensor:
    x, weight, A, B, slots, ranks = batch
    return form(x, weight, A, B, torch.tensor(slots), bias, ops.route(slots, ranks, A.shape[1]))


def assert_same(y: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    max_diff = (y - expected).abs().max().item()
    assert max_diff <= 1e-11 * (1 + expected.abs().max().item()), f"{what}: max_diff {max_diff:.3g}"


properties = settings(max_examples=40)
each_form = pytest.mark.parametrize("form", [form for _, form in ALL_FORMS], ids=FORM_IDS)


@each_form
@properties
@given(batch=batches(), data=st.data())
def test_permuting_the_rows_permutes_the_answers(form, batch, data):
    x, weight, A, B, slots, ranks = batch
    order = data.draw(st.permutations(range(len(slots))))
    shuffled = (x[order], weight, A, B, [slots[row] for row in order], ranks)
    assert_same(serve(form, shuffled), serve(form, batch)[order], f"{form.__name__}, order {order}")


@each_form
@properties
@given(batch=batches(), data=st.data())
def test_it_does_not_matter_in_which_slot_an_adapter_lies(form, batch, data):
    x, weight, A, B, slots, ranks = batch
    order = data.draw(st.permutations(range(5)))  # new slot → old slot
    moved = (x, weight, A[order], B[order], [order.index(slot) for slot in slots], [ranks[old] for old in order])
    assert_same(serve(form, moved), serve(form, batch), f"{form.__name__}, slots {order}")


@each_form
@properties
@given(batch=batches(), copies=st.integers(2, 4))
def test_rows_with_the_same_slot_and_input_get_the_same_answer(form, batch, copies):
    x, weight, A, B, slots, ranks = batch
    repeated = (x.repeat_interleave(copies, 0), weight, A, B, [slot for slot in slots for _ in range(copies)], ranks)
    assert_same(serve(form, repeated), serve(form, batch).repeat_interleave(copies, 0), form.__name__)


@each_form
@properties
@given(batch=batches(), data=st.data())
def test_a_row_does_not_depend_on_its_neighbours(form, batch, data):
    x, weight, A, B, slots, ranks = batch
    row = data.draw(st.integers(0, len(slots) - 1))
    alone = (x[row : row + 1], weight, A, B, slots[row : row + 1], ranks)
    assert_same(serve(form, batch)[row : row + 1], serve(form, alone), f"{form.__name__}, row {row} of {slots}, ranks {ranks}")


@each_form
@properties
@given(batch=batches(), with_bias=st.booleans())
def test_a_batch_without_adapters_is_the_bare_layer_exactly(form, batch, with_bias):
    x, weight, A, B, slots, _ = batch
    bias = torch.linspace(-1, 1, weight.shape[0], dtype=torch.float64) if with_bias else None
    identity = (x, weight, A, B, [0] * len(slots), [0] * 5)
    assert torch.equal(serve(form, identity, bias), linear(x, weight, bias)), form.__name__


# ------------------------------------------------------------------------------------------------------------- routing


@properties
@given(slots=st.lists(st.integers(0, 5), min_size=1, max_size=12), ranks=st.lists(st.integers(0, 4), min_size=6, max_size=6))
def test_routing_covers_every_row_once(slots, ranks):
    routing = ops.route(slots, ranks, 4)
    assert routing.slots.tolist() == slots
    assert sorted(row for segment in routing.segments for row in segment.rows.tolist()) == list(range(len(slots)))
    for segment in routing.segments:
        assert segment.rank == ranks[segment.slot]
        assert all(slots[row] == segment.slot for row in segment.rows.tolist())
    grouped = []
    for group in routing.rank_groups:
        rows = list(range(len(slots))) if group.rows is None else group.rows.tolist()
        assert group.slots.tolist() == [slots[row] for row in rows]
        assert group.rank > 0 and all(ranks[slots[row]] == group.rank for row in rows)
        grouped += rows
    assert sorted(grouped) == [row for row, slot in enumerate(slots) if ranks[slot] > 0]
    laid_out = []
    for block in routing.blocks:
        rows = list(range(len(slots))) if block.rows is None else block.rows.tolist()
        each = len(rows) // len(block.slots)
        assert [slots[row] for row in rows] == [slot for slot in block.slots.tolist() for _ in range(each)]
        assert all(ranks[slot] == block.rank for slot in block.slots.tolist())
        laid_out += rows
    restore = list(range(len(slots))) if routing.restore is None else routing.restore.tolist()
    assert [laid_out[place] for place in restore] == list(range(len(slots)))
    # No row pays for another row's rank: each is copied max(rank, 1) times, once per component of its own slot.
    copies = [(row, 4 * slot + k) for row, slot in enumerate(slots) for k in range(max(1, ranks[slot]))]
    assert list(zip(routing.expanded_row.tolist(), routing.expanded_component.tolist(), strict=True)) == copies


def mixed_problem(size, dtype, adds):
    """A problem whose rows marked in `adds` are of the lora family: what `mixed` needs, its truth and the size of its terms."""
    problem, truths = problem_and_truths(*size, dtype)
    multiplied, added = (
        ops.route([slot if one is wanted else 0 for slot, one in zip(problem.slots.tolist(), adds, strict=True)], RANKS, RANK)
        for wanted in (False, True)
    )
    chosen = torch.tensor(adds)[:, None, None]
    truth, scale = (torch.where(chosen, truths["lora", True][i], truths["flora", True][i]) for i in (0, 1))
    return problem, multiplied, ops.AddedRows(problem.A, problem.B, added), truth, scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 129, 129), (3, 5, 129, 2049), (7, 1, 2049, 129), (33, 5, 129, 1)], ids=str)
def test_rows_of_both_families_share_one_product_with_the_weight(size, dtype, monkeypatch):
    products = []

    def counted(x, weight, bias=None):
        products.append(x.shape)
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(ops, "linear", counted)
    rows = range(size[0])
    for adds in ([row % 2 == 0 for row in rows], [row % 3 != 0 for row in rows], [True for _ in rows], [False for _ in rows]):
        problem, routing, added, truth, scale = mixed_problem(size, dtype, adds)
        products.clear()
        y = ops.mixed(problem.x, problem.weight, problem.A, problem.B, routing.slots, problem.bias, routing, added)
        assert_close(y, truth, scale, dtype, f"mixed, {sum(adds)} of {len(adds)} rows add")
        assert len(products) == 1
        product = partial(counted, weight=problem.weight)
        around = ops.mixed_around(product, problem.x, problem.A, problem.B, routing, problem.bias, added)
        assert_close(around, truth, scale, dtype, "mixed around a layer")
        assert len(products) == 2


def test_mixed_without_rows_that_add_is_expand():
    problem, _ = problem_and_truths(7, 5, 129, 129, torch.float32)
    arguments = (problem.x, problem.weight, problem.A, problem.B, problem.slots, problem.bias, problem.routing)
    assert torch.equal(ops.mixed(*arguments), ops.flora_expand(*arguments))


def test_methods_and_functions_go_by_the_same_names():
    assert ops.METHODS == (
        "flora",
        "flora-expand",
        "flora-modulate",
        "bmm-lora",
        "loop-lora",
        "sgmv-lora",
        "mixed",
        "merged",
        "base",
    )
    for method, family in ops.FAMILY.items():
        if family is not None:
            assert ops.function_of(method) is getattr(ops, method.replace("-", "_"))
            assert ops.function_of(method) in FORMS[family]
    assert ops.function_of("mixed") is ops.mixed and ops.around_function_of("mixed") is ops.mixed_around
