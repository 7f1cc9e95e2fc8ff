"""Every kernel against the plain float64 reference, on the GPU or in Triton's interpreter; how it is chosen and handed over."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from compiled_kernels import compiled, jit_function, specialised
from kernels_on_cpu import DEVICE, kernels
from torch import nn
from torch.library import opcheck
from transformers.pytorch_utils import Conv1D

from flora import backend, ops
from flora.errors import AdapterError
from flora.kernels import choices, compilation, launch, operators, tuning
from flora.kernels import decode as decode_kernel
from flora.kernels import modulate as modulate_kernel
from flora.kernels.compilation import LayerShape
from flora.kernels.decode import _sum_parts_kernel, decode
from flora.kernels.launch import Config
from flora.kernels.modulate import modulate
from flora.kernels.sgmv import sgmv_add_
from flora.layers import AdaptedLinear, LayerPlan, ServingHolder

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
"""Largest |error| as a share of Σ |terms|: as in `test_ops`, a few roundings of the dtype."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float16, "int8-bf16": torch.bfloat16}
MIXED = [0, 1, 2, 3, 4, 5, 6, 7, 8]
"""True rank by slot: slot 0 is the identity."""


class Problem:
    """Random inputs, and the truth. Behind every slot's true rank are NaN, and slot 0, the identity, has nothing else."""

    def __init__(self, slots, l, d_in, d_out, kind="fp32", ranks=MIXED, conv1d=False, seed=0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.dtype, stride = DTYPES[kind], max(1, *ranks)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype).to(DEVICE)

        self.x, self.bias = normal(len(slots), l, d_in), normal(d_out)
        self.weight, self.scales = normal(d_out, d_in) / math.sqrt(d_in), None
        self.true_weight = self.weight.double()
        if kind.startswith("int8"):  # bitsandbytes' layout: whole numbers of at most 127, and each row's largest value
            self.scales = self.weight.float().abs().amax(1)
            self.weight = (self.weight.float() * (127 / self.scales[:, None])).round().to(torch.int8)
            self.true_weight = self.weight.double() * self.scales.double()[:, None] / 127
        if conv1d:
            self.weight = self.weight.T.contiguous().T
        self.A, self.B = normal(len(ranks), stride, d_in), normal(len(ranks), stride, d_out)
        for slot, rank in enumerate(ranks):
            self.A[slot, rank:] = self.B[slot, rank:] = torch.nan
        self.slots, self.routing = slots, ops.route(slots, ranks, stride, DEVICE)

    def truth(self, family: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference in float64 (n, l, d_out), and the same of every number's absolute value."""
        A, B = self.A.double().nan_to_num(0.0), self.B.double().nan_to_num(0.0)
        if family == "flora":
            for slot in set(self.slots):
                if self.A[slot].isnan().all():
                    A[slot, 0] = B[slot, 0] = 1.0
        numbers, slots = [self.x.double(), self.true_weight, A, B], torch.tensor(self.slots)
        reference = ops.flora_reference if family == "flora" else ops.lora_reference
        bias = self.bias.double()
        return reference(*numbers, slots, bias), reference(*(one.abs() for one in numbers), slots, bias.abs())

    def serve(self, form: str) -> torch.Tensor:
        product = partial(nn.functional.linear, weight=self.true_weight.to(self.dtype))
        return kernels.serve(form, self.x, (self.weight, self.scales), product, self.A, self.B, self.routing, self.bias)

    def decode(self, config: Config) -> torch.Tensor:
        tiles = self.routing.expanded_tiles()
        lists = (tiles.row, tiles.component, tiles.owner, tiles.tile_row)
        y = decode(self.x[:, 0], self.weight, self.scales, self.A, self.B, self.bias, *lists, tiles.num_tiles, config)
        return y.unsqueeze(1)

    def modulate(self, num_tokens: int | None, config: Config) -> torch.Tensor:
        tiles = self.routing.segment_tiles(self.x.shape[1], num_tokens)
        lists = (tiles.order, tiles.slot, tiles.rank, tiles.first, tiles.count)
        numbers = (self.x, self.weight, self.scales, self.A, self.B, self.bias)
        return modulate(*numbers, *lists, tiles.num_tokens, tiles.rank_tile, config)

    def sgmv(self, shrink: Config, expand: Config) -> torch.Tensor:
        tiles = self.routing.segment_tiles(self.x.shape[1], 16)
        y = nn.functional.linear(self.x, self.true_weight.to(self.dtype), self.bias)
        lists = (tiles.order, tiles.slot, tiles.rank, tiles.first, tiles.count)
        sgmv_add_(y, self.x, self.A, self.B, *lists, tiles.rank_tile, (shrink, expand))
        return y


def assert_true(y: torch.Tensor, problem: Problem, family: str = "flora") -> None:
    truth, scale = problem.truth(family)
    assert y.shape == truth.shape and y.dtype == problem.dtype
    difference = (y.double() - truth).abs()
    share = (difference / scale.clamp_min(1e-300)).max().item()
    allowed = TOLERANCE[problem.dtype]
    assert share <= allowed, f"max_diff {difference.max():.3g}, at most {share:.3g} of the terms' size, allowed is {allowed:g}"


def rows(number: int) -> list[int]:
    """Slots of rows whose neighbours differ: from nine rows on all ranks are there, and slots repeat."""
    return [(5 * row + 3) % len(MIXED) for row in range(number)]


# -------------------------------------------------------------------------------------------------------------- decode


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(
    "n, d_in, d_out, split_k, conv1d",
    [
        *((1, 1, 1, 1, False), (3, 16, 257, 1, True), (7, 129, 33, 2, False), (7, 129, 33, 2, True)),
        *((16, 257, 16, 3, True), (33, 33, 129, 1, False), (7, 128, 40, 2, True)),
    ],
    ids=str,
)
def test_decode_with_ranks_mixed(n, d_in, d_out, split_k, kind, conv1d):
    problem = Problem(rows(n), 1, d_in, d_out, kind, conv1d=conv1d)
    assert_true(problem.decode(Config(block_n=64, block_k=64 if d_in < 129 else 32, split_k=split_k)), problem)


@pytest.mark.parametrize("ranks", [[0, 16, 64, 1], [0, 128, 5, 3], [1, 1, 0, 1], [0, 0, 0, 0]], ids=str)
def test_decode_with_large_ranks_and_with_one_component_each(ranks):
    problem = Problem([1, 0, 2, 3, 1], 1, 33, 40, ranks=ranks)
    assert problem.routing.expanded_tiles().num_rows == (16 if max(ranks) > 1 else 0)
    assert_true(problem.serve("decode"), problem)


@pytest.mark.parametrize("rows_of_tile", [64, 128])
def test_decode_with_many_rows_in_a_tile(rows_of_tile):
    """Nearly as many rows as places: one row has a second component."""
    problem = Problem([2] + [1] * (rows_of_tile - 3), 1, 17, 18, ranks=[0, 1, 2], conv1d=True)
    assert problem.routing.expanded_tiles().num_rows == rows_of_tile
    assert_true(problem.decode(Config(16, 16, split_k=2)), problem)


def test_a_sum_in_parts_is_the_same_every_time():
    problem = Problem(rows(7), 1, 257, 33)
    first, second = (problem.decode(Config(64, 16, split_k=4)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter's NumPy
def test_a_row_that_is_not_finite_spoils_no_other():
    """Its neighbours in the tile get what they get without it, to the last bit; itself, nothing that looks like an answer."""
    problem = Problem([3, 4, 2, 3], 1, 33, 17)
    before = problem.serve("decode")
    for broken in (math.inf, math.nan):
        problem.x[1, 0, 5] = broken
        y = problem.serve("decode")
        assert torch.equal(y[[0, 2, 3]], before[[0, 2, 3]])
        assert not y[1].isfinite().any()


def test_factors_of_higher_precision_than_the_layer():
    problem = Problem(rows(3), 1, 33, 17, "bf16")
    problem.A, problem.B = problem.A.float(), problem.B.float()
    for form in ("decode", "modulate"):
        assert_true(problem.serve(form), problem)


# ------------------------------------------------------------------------------------------------------------ modulate


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(
    "slots, l, d_in, d_out, conv1d",
    [
        *(([0], 1, 1, 1, False), (rows(7), 1, 129, 33, False), (rows(7), 1, 129, 33, True)),
        *(([3, 0, 3, 8], 10, 33, 257, True), ([5, 2, 5, 0, 5], 8, 128, 16, False)),
    ],
    ids=str,
)
def test_modulate_segments_of_1_to_40_tokens(slots, l, d_in, d_out, kind, conv1d):
    problem = Problem(slots, l, d_in, d_out, kind, conv1d=conv1d)
    assert_true(problem.modulate(None, Config(block_n=128, block_k=64)), problem)


@pytest.mark.parametrize("num_tokens", [16, 64])
def test_modulate_with_large_ranks_and_more_bands_than_one(num_tokens):
    problem = Problem([1, 0, 2, 1], 9, 33, 150, ranks=[0, 64, 17])
    assert_true(problem.modulate(num_tokens, Config(block_n=16, block_k=32)), problem)


def test_modulate_a_tile_of_256_tokens_of_a_rank_above_64():
    problem = Problem([1], 200, 17, 18, ranks=[0, 65])
    assert problem.routing.segment_tiles(200, 256).rank_tile == 128
    assert_true(problem.modulate(256, Config(block_n=32, block_k=32)), problem)


# ---------------------------------------------------------------------------------------------------------------- sgmv


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "slots, l, d_in, d_out, split_k",
    [([1], 1, 1, 1, 1), (rows(33), 1, 129, 33, 2), ([3, 0, 3, 8], 10, 33, 257, 1), ([5, 2, 5, 0, 5], 8, 192, 16, 3)],
    ids=str,
)
def test_sgmv_segments_of_1_to_40_tokens(slots, l, d_in, d_out, split_k, kind):
    problem = Problem(slots, l, d_in, d_out, kind)
    assert_true(problem.sgmv(Config(0, 64, split_k), Config(128, 0)), problem, "lora")


def test_sgmv_with_large_ranks():
    problem = Problem([1, 0, 2, 3, 1], 5, 33, 40, ranks=[0, 16, 64, 128])
    assert_true(problem.serve("sgmv"), problem, "lora")


# ----------------------------------------------------------------------------------------------------- every kernel's


@pytest.mark.parametrize("form", ["decode", "modulate", "sgmv"])
def test_of_a_view_and_without_a_bias(form):
    """Rows that lie apart, tokens that lie apart in pieces of another width, and an x whose own numbers are not side by side."""
    problem = Problem([2, 0, 1], 1 if form == "decode" else 2, 16, 24)
    problem.bias = None
    with_bias = Problem([2, 0, 1], problem.x.shape[1], 16, 24)
    with_bias.bias.zero_()
    family = "lora" if form == "sgmv" else "flora"
    wide = torch.full((3, 4, 40), torch.nan, device=DEVICE)
    wide[:, : problem.x.shape[1], 8:24] = problem.x
    for x in (wide[:, : problem.x.shape[1], 8:24], problem.x.transpose(1, 2).contiguous().transpose(1, 2)):
        problem.x = x
        assert_true(problem.serve(form), with_bias, family)


@pytest.mark.parametrize("form", ["decode", "modulate", "sgmv"])
def test_nothing_to_do(form):
    """No outputs, or no tokens."""
    problem = Problem([1, 2], 1, 5, 7)
    problem.weight, problem.true_weight, problem.bias = problem.weight[:0], problem.true_weight[:0], problem.bias[:0]
    problem.B = problem.B[..., :0].contiguous()
    assert problem.serve(form).shape == (2, 1, 0)


def test_tensors_that_do_not_fit_are_refused_by_name():
    def refused(form: str, match: str, **changed) -> None:
        problem = Problem([1, 2], 1, 16, 24)
        vars(problem).update(changed)
        with pytest.raises(ValueError, match=match):
            problem.serve(form)

    wide, narrow = torch.zeros(9, 8, 17, device=DEVICE), torch.zeros(9, 8, 48, device=DEVICE)[..., ::2]
    for form in ("decode", "modulate"):
        refused(form, "x must be", x=torch.zeros(2, 1, 17, device=DEVICE))
        refused(form, "x must be", x=torch.zeros(2, 1, 16, device=DEVICE, dtype=torch.float64))
        refused(form, "the weight must be", weight=torch.zeros(24, 16, device=DEVICE, dtype=torch.bfloat16))
        refused(form, "int8 weights need", weight=torch.zeros(24, 16, device=DEVICE, dtype=torch.int8), scales=torch.zeros(7))
        refused(form, "the bias must be", bias=torch.zeros(25, device=DEVICE))
        refused(form, "do not fit a 16 → 24 layer", A=wide)
        refused(form, "contiguous", B=narrow)
    refused("sgmv", "do not fit a 16 → 24 layer", A=wide)


@pytest.mark.parametrize("form", ["decode", "modulate", "sgmv"])
def test_operators_keep_pytorchs_rules(form):
    """Schema, fake implementation, and what torch.compile traces: `torch.library.opcheck`."""
    problem = Problem([1, 0, 2], 1, 16, 24)
    numbers = (problem.x, problem.weight, None, problem.A.nan_to_num(0.0), problem.B.nan_to_num(0.0), problem.bias)
    if form == "decode":
        tiles = problem.routing.expanded_tiles()
        lists = (tiles.row, tiles.component, tiles.owner, tiles.tile_row)
        opcheck(operators.decode, (problem.x[:, 0], *numbers[1:], *lists, tiles.num_tiles))
        return
    tiles = problem.routing.segment_tiles(1, 16)
    lists = (tiles.order, tiles.slot, tiles.rank, tiles.first, tiles.count)
    if form == "modulate":
        opcheck(operators.modulate, (*numbers, *lists, tiles.num_tokens, tiles.rank_tile))
    else:
        opcheck(operators.sgmv_add_, (torch.zeros(3, 1, 24, device=DEVICE), problem.x, *numbers[3:5], *lists, tiles.rank_tile))


# ---------------------------------------------------------------------------------------------- for a GPU, without one

CPU = torch.device("cpu")


@pytest.fixture
def as_on_an_h100(monkeypatch):
    """Launches as they are made for one: 132 processors, and products in bfloat16."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "num_processors", lambda device: 132)


def launches_of(form: str, layer: LayerShape, routing: ops.Routing, length: int = 1) -> list[launch.Launch]:
    return compilation.launches_of(form, layer, length, routing, torch.bfloat16, torch.bfloat16, CPU)


WIDE = LayerShape(6144, 6144, has_bias=True)
NARROW = LayerShape(2816, 1280, is_int8=True)
SHIPPED = {  # what is widest of every kernel: rank of each row, rows, tokens of a row
    **{f"decode-{places}": ("decode", WIDE, 4, places // 4, 1) for places in (16, 64, 128)},
    "decode-int8": ("decode", NARROW, 4, 32, 1),
    "decode-without-sums": ("decode", WIDE, 1, 64, 1),
    "modulate-256": ("modulate", WIDE, 64, 1, 512),
    "modulate-int8": ("modulate", NARROW, 128, 1, 512),
    "modulate-16": ("modulate", WIDE, 4, 2, 16),
    "sgmv-1": ("sgmv", WIDE, 64, 1, 1),
}

SPILLED = {"modulate-256": 32, "modulate-int8": 192}
"""Bytes of a thread's that may lie outside of registers, where some do: ranks of 64 and more leave too few of them."""


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
def test_shipped_configurations_compile_for_an_h100(name, tmp_path, monkeypatch, as_on_an_h100):
    """The interpreter runs Python; what a GPU runs is compiled, which needs none: to machine code for compute capability 9.0."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    form, layer, rank, rows, length = SHIPPED[name]
    routing = ops.route(range(1, rows + 1), [0] + [rank] * rows, rank)
    for one in launches_of(form, layer, routing, length):
        built = compiled(one)
        assert built.shared <= 227 << 10
        assert built.spilled <= SPILLED.get(name, 0), f"too much of a thread's does not fit into registers: {built}"
        if one.kernel is not _sum_parts_kernel:
            assert "mma" in built.ptx, "no tensor cores"


BATCHES = [[1], [1, 2], [1, 1, 2], [3, 1, 2, 2, 1], [1] * 7, [2, 0, 1] * 4]


@pytest.mark.parametrize("form, lengths", [("decode", [1]), ("modulate", [1, 3, 16, 37]), ("sgmv", [1, 3, 16, 37])])
def test_a_batch_like_none_before_is_served_by_what_is_compiled(form, lengths, as_on_an_h100):
    """Rows, adapters, tokens and tiles are no reason to compile: one variant for each tile, and how many parts a sum has."""
    keys: dict[tuple, set[str]] = {}
    for slots in BATCHES:
        for length in lengths:
            routing = ops.route(slots, [0, 2, 2, 2], 2)
            tiles = kernels.tiles_of(form, length, routing)
            assert all(one.data_ptr() % 16 == 0 for one in tiles.lists)
            meta = {name: one for one in launches_of(form, WIDE, routing, length) for name, one in [(one.kernel, one)]}
            for kernel, one in meta.items():
                real = replace(one, arguments=tuple(given_lists(one.arguments, tiles.lists)))
                constants = tuple(sorted((name, str(value)) for name, value in one.meta.items()))
                is_split = form == "decode" and len(meta) > 1
                keys.setdefault((jit_function(kernel).__name__, constants, is_split), set()).add(specialised(real)[2])
    assert all(len(found) == 1 for found in keys.values()), {name: len(found) for name, found in keys.items()}
    assert len(keys) <= 12


def given_lists(arguments: tuple, lists: tuple[torch.Tensor, ...]) -> list:
    """The arguments of a launch with the real lists in the place of those that hold nothing."""
    rest = iter(lists)
    return [next(rest) if getattr(one, "dtype", None) == torch.int32 else one for one in arguments]


def test_a_shape_of_the_layer_is_a_reason_to_compile(as_on_an_h100):
    """Else the test before could not fail."""
    routing = ops.route([1, 2], [0, 2, 2], 2)
    one, other = (specialised(launches_of("decode", LayerShape(width, 64), routing)[0])[2] for width in (64, 65))
    assert one != other


def test_nothing_is_compiled_ahead_without_a_gpu():
    assert compilation.prepare(CPU, [WIDE], torch.bfloat16, compilation.batches([1, 4], [1, 2])) == 0
    assert compilation.num_compiled() == (0 if DEVICE == "cpu" else compilation.num_compiled())


def test_batches_go_from_one_adapter_to_each_rows_own():
    found = [(len(routing.row_slots), routing.max_rank, len(routing.segments)) for routing in compilation.batches([2], [1, 6])]
    assert found == [(1, 2, 1), (6, 2, 1), (6, 2, 2), (6, 2, 4), (6, 2, 6)]


def test_a_choice_is_kept_and_taken_only_while_it_is_a_candidate(tmp_path, monkeypatch):
    file = tmp_path / "kernels.json"
    monkeypatch.setattr(choices, "_file", lambda device: file)
    choices._kept.cache_clear()
    problem = Problem([1, 2], 1, 16, 24, "bf16")
    key, candidates = tuning.candidates("decode", problem.x, (problem.weight, None), problem.B, problem.routing)
    assert choices.chosen(CPU, key, candidates) == candidates[0]
    choices.remember(CPU, key, candidates[1])
    choices._kept.cache_clear()
    assert choices.chosen(CPU, key, candidates) == candidates[1] and choices.chosen(CPU, key, candidates[2:]) == candidates[2]
    assert tuning.used("decode", problem.x, (problem.weight, None), problem.B, problem.routing) == choices.described(candidates[1])
    for broken in ("no JSON", "[]", '{"choices": 3}'):
        file.write_text(broken)
        choices._kept.cache_clear()
        assert choices.chosen(CPU, key, candidates) == candidates[0]
    choices._kept.cache_clear()


@pytest.mark.skipif(DEVICE == "cuda", reason="there it measures")
def test_nothing_is_tuned_without_a_gpu():
    problem = Problem([1, 2], 1, 16, 24)
    assert tuning.tune("decode", problem.x, (problem.weight, None), problem.A, problem.B, problem.routing) == []


@pytest.mark.parametrize("programs, d_in, split", [(96, 6144, 2), (24, 2816, 8), (1, 64, 1), (500, 6144, 1), (48, 6144 + 1, 4)])
def test_a_sum_is_cut_in_a_power_of_two_of_equal_parts(programs, d_in, split, as_on_an_h100):
    config = Config(64, 64 if d_in != 2816 else 32, split_k=0, resident=2)
    assert launch.split_of(config, programs, d_in, CPU, most=8, fewest_steps=4) == split


@pytest.mark.parametrize("limit", [227 << 10, 163 << 10, 99 << 10], ids=["h100", "a100", "rtx"])
def test_tile_sizes_fit_the_devices_shared_memory(limit, monkeypatch):
    """By the bytes of what lies there at once: steps under way and operands, and, when a row's places are summed, the sums."""
    monkeypatch.setattr(launch, "shared_memory", lambda device: limit)
    monkeypatch.setattr(decode_kernel, "shared_memory", lambda device: limit)
    monkeypatch.setattr(modulate_kernel, "shared_memory", lambda device: limit)
    for places in (16, 32, 64, 128):
        config = decode_kernel.configs_for.__wrapped__(places, 2, torch.device(DEVICE))[0]
        step, operands = (2 * places + config.block_n) * config.block_k * 2, (places + config.block_n) * config.block_k * 2
        assert (config.num_stages - 1) * step + operands <= limit and 4 * places * config.block_n <= limit
        assert config.num_stages >= 3 or limit < 227 << 10, "an H100 has room for three, of two programs at once"
    for tokens in (16, 64, 256):
        for rank in (16, 64, 128):
            config = modulate_kernel.configs_for.__wrapped__(tokens, rank, 2, torch.device(DEVICE))[0]
            step = (tokens + config.block_n + rank) * config.block_k * 2
            operands = (tokens * config.block_k + config.block_k * config.block_n + rank * config.block_n) * 2
            assert (config.num_stages - 1) * step + operands <= limit


# ------------------------------------------------------------------------------------------------------ how it is used


@pytest.fixture
def on_every_device(monkeypatch):
    """As if the CPU were a GPU: layers are served by the kernels."""
    monkeypatch.setattr(backend, "kernels_on", lambda device_type: kernels)


class NoMatrix(nn.Linear):
    """A layer whose weight only it can read."""


def int8_layer(d_in: int, d_out: int) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain = nn.Linear(d_in, d_out)
    layer = bitsandbytes.nn.Linear8bitLt(d_in, d_out, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    return layer.to(DEVICE)


LAYERS = {"linear": nn.Linear, "conv1d": lambda d_in, d_out: Conv1D(d_out, d_in), "int8": int8_layer, "no-matrix": NoMatrix}


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", ["flora", "flora-expand", "flora-modulate", "sgmv-lora", "bmm-lora"])
def test_every_kind_of_layer_is_served(method, kind, length, on_every_device, monkeypatch):
    torch.manual_seed(0)
    base, holder = LAYERS[kind](16, 24).to(DEVICE), ServingHolder()
    layer = AdaptedLinear(base, "mlp", holder)
    x, A, B = torch.randn(4, length, 16), torch.randn(3, 4, 16), torch.randn(3, 4, 24)
    A[0, 0] = B[0, 0] = 1.0
    A[0, 1:] = B[0, 1:] = A[1, 2:] = B[1, 2:] = 0.0
    x, A, B = x.to(DEVICE), A.to(DEVICE), B.to(DEVICE)
    plan = LayerPlan(A, B, ops.route([2, 0, 1, 2], [0, 2, 4], 4, DEVICE))
    served, serve = [], kernels.serve
    monkeypatch.setattr(kernels, "serve", lambda form, *rest: served.append(form) or serve(form, *rest))

    class OnePlan:
        def plan(self, name):
            return plan

    holder.current = OnePlan()
    holder.current.method = method
    with torch.inference_mode():
        if kind == "no-matrix" and method == "flora-modulate":
            with pytest.raises(AdapterError, match="mlp is quantised"):
                layer(x)
            return
        y = layer(x)
    with_matrix = kind != "no-matrix"
    expected = {
        "flora": "decode" if length == 1 else None,
        "flora-expand": "decode" if length == 1 else None,
        "flora-modulate": "modulate",
        "sgmv-lora": "sgmv",
        "bmm-lora": None,
    }[method]
    expected = expected if with_matrix or method == "sgmv-lora" else None
    assert served == ([] if expected is None else [expected])
    if kind == "int8":
        weight = (
            base.weight.data.double() * (base.state.SCB if base.weight.SCB is None else base.weight.SCB).double()[:, None] / 127
        )
    else:
        weight = (base.weight.T if kind == "conv1d" else base.weight).double()
    lora_A = A.clone()
    lora_A[0] = 0.0
    flora = ops.FAMILY[method] == "flora"
    reference, sides = (ops.flora_reference, (A, B)) if flora else (ops.lora_reference, (lora_A, B))
    truth = reference(x.double(), weight, *(side.double() for side in sides), plan.routing.slots, base.bias.double())
    max_diff = (y.double() - truth).abs().max().item()
    # An int8 layer's own product rounds x to 8 bits; the kernels do not.
    allowed = 3e-2 if kind == "int8" and expected in (None, "sgmv") else 1e-5
    assert max_diff <= allowed * truth.abs().max(), f"max_diff {max_diff:.3g} of {truth.abs().max():.3g}"


@pytest.mark.parametrize("form", ["decode", "modulate", "sgmv"])
def test_what_layers_call_is_one_graph_to_torch_compile(form):
    problem = Problem([1, 0, 2], 1, 16, 24)
    tiles = kernels.tiles_of(form, 1, problem.routing)  # worked out before, on the host, as a step's first layer does

    def call(x: torch.Tensor) -> torch.Tensor:
        numbers = (problem.weight, None, problem.A, problem.B, problem.bias, *tiles.lists)
        if form == "decode":
            return 2 * operators.decode(x[:, 0], *numbers, tiles.num_tiles).unsqueeze(1)
        if form == "modulate":
            return 2 * operators.modulate(x, *numbers, tiles.num_tokens, tiles.rank_tile)
        y = nn.functional.linear(x, problem.weight, problem.bias)
        operators.sgmv_add_(y, x, problem.A, problem.B, *tiles.lists, tiles.rank_tile)
        return 2 * y

    with torch.inference_mode():
        compiled_call = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert_true(compiled_call(problem.x) / 2, problem, "lora" if form == "sgmv" else "flora")


def test_gradients_are_left_to_pytorch(on_every_device):
    layer = AdaptedLinear(nn.Linear(16, 24).to(DEVICE), "mlp", ServingHolder())
    routing = ops.route([1], [0, 2], 2, DEVICE)
    assert layer._kernel("flora", 1, routing) is None
    with torch.no_grad():
        assert layer._kernel("flora", 1, routing) == "decode"


def test_which_kernel_serves_a_batch():
    def form(method: str, slots: list[int], length: int, rank: int, has_matrix: bool = True) -> str | None:
        return kernels.form_of(method, length, ops.route(slots, [0, *[rank] * 64], max(1, rank)), has_matrix)

    distinct, same = list(range(1, 33)), [1] * 32
    assert form("flora", distinct, 1, 4) == "decode"
    assert form("flora", same, 1, 16) == "modulate", "one adapter for all: 32 + 16 rows are fewer than 512"
    assert form("flora", distinct, 512, 4) == form("flora", distinct, 512, 64) == "modulate"
    assert form("flora", distinct, 512, 1) is None, "at rank 1 nothing is cheaper than the expanded form, several tokens long"
    assert form("flora-expand", same, 1, 16) == "decode" and form("flora-expand", same, 5, 16) is None
    assert form("flora-modulate", distinct, 1, 4) == "modulate"
    assert form("sgmv-lora", distinct, 1, 4, has_matrix=False) == "sgmv"
    assert form("flora", distinct, 1, 4, has_matrix=False) is None
    for method in ("bmm-lora", "loop-lora", "merged", "base"):
        assert form(method, distinct, 1, 4) is None


def test_a_rank_that_no_kernel_is_made_for_is_told_of_once(caplog):
    kernels._tell_of_rank.cache_clear()
    routing = ops.route([1, 2], [0, 129, 1], 129)
    for method in ("flora", "flora-expand", "flora-modulate", "sgmv-lora", "bmm-lora"):
        assert kernels.form_of(method, 1, routing) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "rank above 128" in caplog.text


@pytest.fixture
def undecided():
    """What `kernels_on` decided is forgotten, before and after."""
    backend.kernels_on.cache_clear()
    yield
    backend.kernels_on.cache_clear()


def test_kernels_serve_gpus_and_can_be_turned_off(undecided, monkeypatch, caplog):
    assert backend.kernels_on("cuda") is kernels and backend.implementation("cuda") == "triton"
    assert backend.kernels_on("cpu") is None and backend.implementation("cpu") == "pytorch"
    backend.kernels_on.cache_clear()
    monkeypatch.setenv("FLORA_KERNELS", "off")
    assert backend.implementation("cuda") == "pytorch"


def test_a_gpu_without_triton_is_told_of_once(undecided, monkeypatch, caplog):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    for _ in range(3):
        assert backend.implementation("cuda") == "pytorch"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Triton is not installed" in caplog.text and "pip install triton" in caplog.text
