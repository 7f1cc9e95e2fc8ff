"""FloraConfig: what a fLoRA adapter is, as a PEFT configuration, and how its factors start.

The released code of the paper starts every factor at one and takes the mean over components: all r components then get the same
gradient and stay the same for ever, a rank-1 adapter at r times the cost. The default here starts exactly at the base model and
breaks the symmetry: component 1 is all ones, the others have A ~ N(0, init_std²) and B = 0, and components are summed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from peft import PeftConfig, PeftType
from torch import Tensor

from flora.errors import AdapterError
from flora.tuner.registration import NAME

DEFAULT_STD = {"identity": 1.0, "noise": 0.1, "ones": 0.0}
"""init → the standard deviation of its random part; what did best in PAPER.md's trial of each."""


@dataclass
class FloraConfig(PeftConfig):
    """A fLoRA adapter's configuration; saved beside its weights as adapter_config.json.

    target_modules, exclude_modules, layers_to_transform, layers_pattern, rank_pattern and modules_to_save mean what they mean in
    PEFT's LoraConfig. AdapterError for a rank, init or combine that cannot be.
    """

    r: int = field(default=4, metadata={"help": "rank: the number of components"})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "names or name ends of linear layers, a regular expression, or all-linear; None: the architecture's own"},
    )
    init: str = field(
        default="identity",
        metadata={"help": "identity: the base model; noise: ones plus noise; ones: the paper's code, whose rank stays 1 for ever"},
    )
    init_std: float | None = field(
        default=None, metadata={"help": "standard deviation of the random part of the start; by default what fits init"}
    )
    combine: str | None = field(default=None, metadata={"help": "sum or mean over components; by default what fits init"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to leave out of target_modules"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "indices of the blocks to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list that blocks are counted in"})
    rank_pattern: dict[str, int] | None = field(
        default_factory=dict, metadata={"help": "layer name or regular expression → rank, where it is not r"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules trained and saved whole, beside the adapter"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(NAME)
        self.rank_pattern = self.rank_pattern or {}
        if not isinstance(self.rank_pattern, dict):
            raise AdapterError(f"rank_pattern {self.rank_pattern!r} is not possible: it must map layer names to ranks")
        for name, rank in {"r": self.r, **{f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise AdapterError(f"rank {rank!r} is not possible: {name} must be a whole number, at least 1")
        if self.init not in tuple(DEFAULT_STD):
            raise AdapterError(f"init {self.init!r} is unknown: choose one of {', '.join(DEFAULT_STD)}")
        if self.init_std is None:
            self.init_std = DEFAULT_STD[self.init]
        if not isinstance(self.init_std, int | float) or not math.isfinite(self.init_std) or self.init_std < 0:
            raise AdapterError(f"init_std {self.init_std!r} is not possible: it must be a number, at least 0")
        if self.combine is None:
            self.combine = "sum" if self.init == "identity" else "mean"
        if self.combine not in ("sum", "mean"):
            raise AdapterError(f"combine {self.combine!r} is unknown: choose sum or mean")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise AdapterError("layers_to_transform picks among named layers: give target_modules as a list, not as one expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise AdapterError("layers_pattern says where layers_to_transform counts: give that too")

    def to_dict(self) -> dict:
        """PEFT turns lists of layers into sets; in the file their order is always the same."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}


def initial_factors(
    config: FloraConfig, d_in: int, d_out: int, generator: torch.Generator | None = None, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """The start of one layer's A (rank, d_in) and B (rank, d_out), float32; rank: config.r, unless given.

    With the identity start, the layer starts as its base layer, by sum and by mean.
    """
    r = config.r if rank is None else rank
    A, B = torch.ones(r, d_in), torch.ones(r, d_out)
    if config.init == "noise":
        A += config.init_std * torch.randn(A.shape, generator=generator)
        B += config.init_std * torch.randn(B.shape, generator=generator)
    if config.init == "identity":
        A[1:] = config.init_std * torch.randn(r - 1, d_in, generator=generator)
        B[1:] = 0.0
        if config.combine == "mean":
            B[0] = float(r)
    return A, B
