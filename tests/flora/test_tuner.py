"""FloraConfig and the start of a fLoRA adapter: at the base model, and with components that can become different."""

from __future__ import annotations

import pytest
import torch

from flora import AdapterError, FloraConfig, ops
from flora.tuner import initial_factors

RANK, WIDTH = 4, 24


def fit(config: FloraConfig, steps: int = 300) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Fit one layer's adapter to a target modulation of rank 4; the factors and the last loss."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH, generator=generator)
    target_A, target_B = (torch.randn(RANK, WIDTH, generator=generator) for _ in range(2))
    target = ops.merge_flora(weight, target_A, target_B)
    A, B = (factor.requires_grad_() for factor in initial_factors(config, WIDTH, WIDTH, generator))
    optimizer = torch.optim.Adam([A, B], lr=3e-2)
    scale = 1.0 / config.r if config.combine == "mean" else 1.0
    for _ in range(steps):
        x = torch.randn(32, WIDTH, generator=generator)
        prediction = ops.flora(x[None], weight, A[None], scale * B[None], torch.tensor([0]))[0]
        loss = (prediction - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return A.detach(), B.detach(), loss.item()


def numerical_rank(A: torch.Tensor, B: torch.Tensor) -> int:
    singular_values = torch.linalg.svdvals(B.T @ A)
    return int((singular_values > 1e-3 * singular_values[0]).sum())


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_identity_start_is_the_base_layer(combine):
    config = FloraConfig(r=3, combine=combine)
    A, B = initial_factors(config, 5, 7, torch.Generator().manual_seed(0))
    scale = 1.0 / 3 if combine == "mean" else 1.0
    weight = torch.randn(7, 5)
    difference = (ops.merge_flora(weight, A, scale * B) - weight).abs().max().item()
    assert difference < 1e-6, f"max_diff {difference}"


def test_default_start_reaches_rank_four_and_beats_rank_one():
    A, B, loss = fit(FloraConfig(r=RANK))
    _, _, loss_of_rank_one = fit(FloraConfig(r=1))
    assert numerical_rank(A, B) == RANK
    assert loss < 0.5 * loss_of_rank_one, f"rank 4 ends at {loss}, rank 1 at {loss_of_rank_one}"


def test_all_ones_stays_at_rank_one():
    """The trap of the paper's released code: equal components get equal gradients for ever."""
    A, B, loss = fit(FloraConfig(r=RANK, init="ones"))
    assert numerical_rank(A, B) == 1
    _, _, loss_of_default = fit(FloraConfig(r=RANK))
    assert loss > 2 * loss_of_default, f"all ones ends at {loss}, the default at {loss_of_default}"


def test_config_survives_saving(tmp_path):
    FloraConfig(r=2, init="noise", init_std=0.1, target_modules=["c_attn"]).save_pretrained(tmp_path)
    loaded = FloraConfig.from_pretrained(tmp_path)
    assert (loaded.r, loaded.init, loaded.init_std, loaded.combine, loaded.target_modules) == (2, "noise", 0.1, "mean", ["c_attn"])
    assert loaded.peft_type == "FLORA"


@pytest.mark.parametrize("options", [{"r": 0}, {"init": "zeros"}, {"combine": "product"}])
def test_nonsense_is_refused(options):
    with pytest.raises(AdapterError):
        FloraConfig(**options)
