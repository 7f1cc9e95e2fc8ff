"""FloraConfig: what a fLoRA adapter is, as a PEFT configuration, and how its factors start.

The released code of the paper starts every factor at one and takes the mean over components: all r components then get the same
gradient and stay the same for ever, a rank-1 adapter at r times the cost. The default here starts exactly at the base model and
breaks the symmetry: component 1 is all ones, the others have A ~ N(0, init_std²) and B = 0, and components are summed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor

from flora.errors import AdapterError

INITS = ("identity", "noise", "ones")


@dataclass
class FloraConfig(PeftConfig):
    """A fLoRA adapter's configuration; saved beside its weights as adapter_config.json.

    r: rank, the number of components. target_modules: names (or name ends) of the linear layers. init: "identity" (default),
    "noise" (ones plus N(0, init_std²)) or "ones" (the paper's code; every component stays equal). combine: "sum" or "mean" over
    components.
    """

    r: int = field(default=4, metadata={"help": "rank: the number of components"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "linear layers to adapt"})
    init: str = field(default="identity", metadata={"help": "identity, noise or ones"})
    init_std: float = field(default=1.0, metadata={"help": "standard deviation of the random part of the start"})
    combine: str | None = field(default=None, metadata={"help": "sum or mean over components; by default what fits init"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "FLORA"
        if self.r < 1:
            raise AdapterError(f"rank {self.r} is not possible: r must be at least 1")
        if self.init not in INITS:
            raise AdapterError(f"init {self.init!r} is unknown: choose one of {', '.join(INITS)}")
        if self.combine is None:
            self.combine = "sum" if self.init == "identity" else "mean"
        if self.combine not in ("sum", "mean"):
            raise AdapterError(f"combine {self.combine!r} is unknown: choose sum or mean")


# PEFT's enum of types is closed, but the table that `PeftConfig.from_pretrained` looks a type up in takes any key.
PEFT_TYPE_TO_CONFIG_MAPPING["FLORA"] = FloraConfig


def initial_factors(config: FloraConfig, d_in: int, d_out: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """The start of one layer's A (r, d_in) and B (r, d_out), float32. With identity and sum, the layer starts as its base layer."""
    A, B = torch.ones(config.r, d_in), torch.ones(config.r, d_out)
    if config.init == "noise":
        A += config.init_std * torch.randn(A.shape, generator=generator)
        B += config.init_std * torch.randn(B.shape, generator=generator)
    if config.init == "identity":
        A[1:] = config.init_std * torch.randn(config.r - 1, d_in, generator=generator)
        B[1:] = 0.0
        if config.combine == "mean":
            B[0] = float(config.r)
    return A, B
