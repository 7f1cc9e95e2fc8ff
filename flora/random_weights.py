"""Random weights at a model's true shapes, so that speed can be measured where the weights are not: allocated once, in their final
dtype, and quantised as they are made."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from flora.quantised import is_quantised_weight, prepare_layers, quantised_parameter


def random_weights(
    auto_model: Any,
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    quantisation: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """A model of `config`'s shapes with normal weights (0, initializer_range), in `dtype`, on `device`.

    quantisation: for its linear layers but the output head; of them, some rows at a time exist unquantised.
    """
    config._attn_implementation = "sdpa"
    build = getattr(auto_model, "_from_config", None) or auto_model.from_config
    with init_empty_weights(include_buffers=False):  # rotary frequencies and causal masks are computed, not learnt
        model = build(config)
    model.tie_weights()
    model.config.dtype = dtype
    if quantisation is not None:
        prepare_layers(model, quantisation)
    generator = torch.Generator(device).manual_seed(seed)
    std = getattr(config, "initializer_range", None) or getattr(config, "init_std", 0.02)
    made: dict[int, nn.Parameter] = {}  # by the id of the parameter without storage: tied weights stay one
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            if is_quantised_weight(empty):

                def draw(count: int, width: int = module.in_features) -> Tensor:
                    return torch.empty(count, width, dtype=dtype, device=device).normal_(0.0, std, generator=generator)

                setattr(module, name, quantised_parameter(draw, empty, module, device))
                continue
            if id(empty) not in made:
                values = _fill(torch.empty(empty.shape, dtype=dtype, device=device), module, name, std, generator)
                made[id(empty)] = nn.Parameter(values, requires_grad=False)
            setattr(module, name, made[id(empty)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    return model


def _fill(values: Tensor, module: nn.Module, name: str, std: float, generator: torch.Generator) -> Tensor:
    if isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower():
        return values.fill_(0.0 if name == "bias" else 1.0)
    return values.zero_() if values.ndim < 2 else values.normal_(0.0, std, generator=generator)
