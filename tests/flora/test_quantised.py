"""8 and 4 bits, honestly: what a row's answer depends on, how far it may move, and what bitsandbytes cannot do."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import tiny_models
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from tiny_bank import pinned_batch

from flora import Engine, ModelError, Request
from flora.engine.engine import INT8_LOGIT_TOLERANCE
from flora.engine.runner import PromptPiece
from flora.layers import AdaptedLinear, LayerPlan, ServingHolder
from flora.models import load_model
from flora.ops import route
from flora.quantised import LLM_INT8_THRESHOLD, check_layers, quantised_parameter, threshold_of

ASSETS = Path(__file__).resolve().parents[2] / "assets"
D_IN, D_OUT, RANK = 128, 96, 3
EIGHT_BIT_METHODS = ["base", "flora", "bmm-lora", "loop-lora"]


def eight_bit_layer(threshold: float) -> Linear8bitLt:
    generator = torch.Generator().manual_seed(0)
    layer = Linear8bitLt(D_IN, D_OUT, bias=True, has_fp16_weights=False, threshold=threshold)
    layer.weight.data = torch.randn(D_OUT, D_IN, generator=generator) * 0.05
    layer.bias.data = torch.randn(D_OUT, generator=generator)
    return layer.to("cpu").eval().requires_grad_(False)


class Serving:
    """Rows 0 … n - 1, each with an adapter of its own."""

    def __init__(self, method: str, num_rows: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.method = method
        A = torch.randn(num_rows, RANK, D_IN, generator=generator)
        B = torch.randn(num_rows, RANK, D_OUT, generator=generator) * 0.1
        self.factors = (A, B)

    def only(self, rows: list[int]) -> LayerPlan:
        A, B = (factor[rows] for factor in self.factors)
        return LayerPlan(A, B, route(range(len(rows)), [RANK] * len(rows), RANK, "cpu"))


@torch.inference_mode()
def outputs(layer: Linear8bitLt, method: str, x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """(len(rows), l, d_out): these rows of x, together in one forward of the layer with their adapters."""
    holder = ServingHolder()
    adapted = AdaptedLinear(layer, "layer", holder)
    if method == "base":
        return adapted(x[rows])
    serving = Serving(method, x.shape[0])
    plan = serving.only(rows)
    holder.current = type("One", (), {"method": method, "plan": lambda self, name: plan})()
    return adapted(x[rows])


def inputs_with_an_outlier() -> torch.Tensor:
    """(4, 2, d_in): quiet rows, but for the last, which has one input of 40."""
    x = torch.randn(4, 2, D_IN, generator=torch.Generator().manual_seed(2)) * 0.5
    x[3, 1, 7] = 40.0
    return x


@pytest.mark.parametrize("method", EIGHT_BIT_METHODS)
def test_without_a_threshold_a_row_does_not_depend_on_the_others(method):
    layer, x = eight_bit_layer(0.0), inputs_with_an_outlier()
    together = outputs(layer, method, x, [0, 1, 2, 3])
    for row in range(4):
        alone = outputs(layer, method, x, [row])[0]
        if method == "flora":  # the sum over components is taken in another order
            torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-5)
        else:
            torch.testing.assert_close(together[row], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", EIGHT_BIT_METHODS)
def test_with_a_threshold_others_outliers_move_a_row_by_no_more_than_its_rounding(method):
    """The columns of others' outliers are computed unquantised for all: a row loses its rounding there, and nothing else moves."""
    layer, x = eight_bit_layer(LLM_INT8_THRESHOLD), inputs_with_an_outlier()
    moved = (outputs(layer, method, x, [0, 1, 2, 3])[0] - outputs(layer, method, x, [0])[0]).abs()  # (l, d_out)
    assert moved.max() > 1e-5, "the outliers of the other rows changed nothing"
    A, B = Serving(method, 4).factors  # (n, r, d_in), (n, r, d_out)
    if method != "flora":
        A, B = torch.ones(4, 1, D_IN), torch.ones(4, 1, D_OUT)
    copies = A[:, :, None] * x[:, None]  # (n, r, l, d_in): what the layer sees
    is_outlier = copies.abs() >= LLM_INT8_THRESHOLD
    of_others = is_outlier[1:].flatten(0, 2).any(0) & ~is_outlier[0].flatten(0, 1).any(0)  # (d_in,)
    step = copies[0].masked_fill(is_outlier[0], 0).abs().amax(-1) / 127  # (r, l): of 8 bits
    weight = (layer.state.CB.float() * layer.state.SCB[:, None] / 127).abs()  # (d_out, d_in)
    rounding = torch.einsum("ko,kl,o->lo", B[0].abs(), step / 2, weight[:, of_others].sum(-1))
    excess = moved - rounding * 1.02 - 1e-3  # inputs are read through float16
    assert (excess <= 0).all(), f"{excess.max():.1e} above the rounding of {of_others.sum()} inputs"


def test_the_copies_of_flora_have_outliers_of_their_own():
    """A row without outliers gets some when its copies are scaled by A: the layer sees what r·n rows hold, not what n do."""
    layer, x = eight_bit_layer(LLM_INT8_THRESHOLD), inputs_with_an_outlier()[:3]
    seen = []
    layer.register_forward_pre_hook(lambda module, given: seen.append(given[0].abs().max().item()))
    for method in ("bmm-lora", "flora"):
        outputs(layer, method, 4 * x, [0, 1, 2])
    assert x.abs().max() * 4 >= seen[0] > 0 and seen[1] > 1.5 * seen[0]


@pytest.mark.parametrize("d_out", [96, 128, 200])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_weight_quantised_in_pieces_is_the_weight_quantised_whole(kind, d_out, monkeypatch):
    monkeypatch.setattr("flora.quantised._QUANTISED_AT_ONCE", 64 * D_IN)  # pieces of 64 rows, the last one shorter
    weight = torch.randn(d_out, D_IN, generator=torch.Generator().manual_seed(3))
    make = {
        "int8": lambda: Linear8bitLt(D_IN, d_out, bias=False, has_fp16_weights=False),
        "nf4": lambda: Linear4bit(D_IN, d_out, bias=False, compress_statistics=False, quant_type="nf4"),
    }[kind]
    whole, pieces = make(), make()
    whole.weight.data = weight.clone()
    whole = whole.to("cpu").eval()
    rows = iter(weight)
    pieces.weight = quantised_parameter(
        lambda count: torch.stack([next(rows) for _ in range(count)]), pieces.weight, pieces, torch.device("cpu")
    )
    assert next(rows, None) is None, "rows are left"
    assert torch.equal(pieces.weight.data.flatten(), whole.weight.data.flatten())
    x = torch.randn(3, D_IN, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        assert torch.equal(pieces.eval()(x), whole(x))


# ----------------------------------------------------------------------------------------------------------- whole models


PROMPTS = ["def f(", "x", "local function total(xs)", "-- the largest of three numbers\n"]


def eight_bit_engine(threshold: float | None = None) -> Engine:
    adapters = {tag: [ASSETS / "adapters" / "code" / tag / family for family in ("flora", "lora")] for tag in ("lua", "rb")}
    return Engine.from_pretrained(ASSETS / "models" / "code", adapters, device="cpu", quantize="int8", llm_int8_threshold=threshold)


def logits(engine: Engine, method: str, rows: list[int]) -> torch.Tensor:
    """(len(rows), vocabulary) after these prompts, read in one forward, every other one of them with an adapter."""
    encoded = [engine.runner.encode(Request(PROMPTS[row])) for row in rows]
    with pinned_batch(engine.bank, [("lua", None, "rb", None)[row] for row in rows], method) as batch, torch.inference_mode():
        cache = engine.runner.new_cache(max_rows=len(rows))
        cache.reserve(len(rows), 64)
        return engine.runner.prefill([PromptPiece(row, 0, len(row.prompt_ids)) for row in encoded], cache, 0, batch)


@pytest.mark.parametrize("threshold", [None, 0.0])
def test_a_request_alone_and_in_a_batch(threshold):
    """The outliers of others move a logit of the model that ships by hundredths; without a threshold, only rounding is left."""
    engine = eight_bit_engine(threshold)
    assert engine.llm_int8_threshold == threshold_of(engine.model) == (LLM_INT8_THRESHOLD if threshold is None else threshold)
    for method in EIGHT_BIT_METHODS:
        together = logits(engine, method, [0, 1, 2, 3])
        moved = torch.cat([together[row] - logits(engine, method, [row])[0] for row in range(4)]).abs()
        said = f"{method}: median {moved.median():.1e}, at most {moved.max():.1e}"
        assert moved.max() < INT8_LOGIT_TOLERANCE, said
        if threshold is None:
            assert moved.median() > 1e-3, said
        else:  # a float's rounding, and here and there an input that it carries over to the next of 8 bits' steps
            assert moved.median() < 1e-3, said


def test_bitsandbytes_does_not_speak_at_every_call(caplog):
    engine = eight_bit_engine()
    with caplog.at_level(logging.DEBUG, logger="bitsandbytes"):
        engine.generate([Request("x", max_new_tokens=3, ignore_eos=True)], "base")
        logging.getLogger("bitsandbytes.autograd._functions").warning("something else")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("bitsandbytes")] == ["something else"]


@pytest.mark.parametrize(("width", "inner_width", "layer"), [(96, 128, r"c_attn is 96 → 144"), (128, 80, r"c_fc is 128 → 80")])
def test_four_bits_of_widths_that_this_cpu_cannot_pack_are_refused_by_name(width, inner_width, layer, tmp_path, monkeypatch):
    """As on a CPU with bfloat16 products, where bitsandbytes itself fails by an AssertionError at the first forward."""
    folder = tiny_models.save_code_model(tmp_path / "narrow", width=width, inner_width=inner_width)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    with pytest.raises(
        ModelError, match=rf"model narrow cannot be served in nf4 on this CPU: layer transformer\.h\.0\..*{layer} wide"
    ):
        load_model(folder, device="cpu", quantize="nf4")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    check_layers(load_model(folder, device="cpu", quantize="nf4").model, "narrow")
