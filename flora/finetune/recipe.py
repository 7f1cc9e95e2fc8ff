"""Recipe: everything that decides what an adapter becomes, and the values that suit a method and a model."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from torch import nn

from flora.errors import TrainingError
from flora.quantised import QUANTIZATIONS
from flora.tuner.config import DEFAULT_STD

KINDS = ("code", "speech")
METHODS = ("flora", "lora", "ia3")
INITS = tuple(DEFAULT_STD)
"""Starts of a fLoRA adapter, the best first."""
MODELS = {"code": "assets/models/code", "speech": "assets/models/speech"}
"""The embedded base models."""

NARROW = 20_000_000
"""Parameters. Below, a model is narrow, as the embedded ones are: it wants larger learning rates, and all its layers adapted."""

LEARNING_RATES = {
    ("code", "flora"): 1e-2,
    ("code", "lora"): 5e-3,
    ("code", "ia3"): 2e-2,
    ("speech", "flora"): 3e-2,
    ("speech", "lora"): 5e-3,
    ("speech", "ia3"): 3e-2,
}
"""Tuned on the embedded models. A multiplicative adapter wants the larger rate."""

PAPER_LEARNING_RATES = {
    ("code", "flora"): 8e-3,
    ("code", "lora"): 1e-4,
    ("code", "ia3"): 5e-3,
    ("speech", "flora"): 6e-3,
    ("speech", "lora"): 2e-4,
    ("speech", "ia3"): 4e-3,
}
"""The paper's, on StarCoder and Whisper large."""

NARROW_LENGTHS = {"code": (800, 16), "speech": (400, 16)}
PAPER_LENGTHS = {"code": (1500, 8), "speech": (5000, 6)}
"""Steps, and examples in each."""


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how. None: what suits the method and the model, filled in by `for_model`.

    kind: "code" (a language model) or "speech" (Whisper). language: a tag of the project's corpus; with `data`, the language of
    that data. data: a file, a folder or a data set's hub id, instead of the corpus. validation: the share of the data that is held
    out, or another source. target_layers: ("default",), the architecture's PEFT default; ("all",) linear layers but the output
    head; or names. init, init_std: of fLoRA. limit: rows to read at most. clips: of the spoken corpus. held_out: items to score on.
    max_length: tokens of an example.
    """

    kind: str
    language: str | None = None
    model: str | None = None
    quantize: str | None = None
    llm_int8_threshold: float | None = None
    method: str = "flora"
    rank: int | None = None
    init: str | None = None
    init_std: float | None = None
    target_layers: tuple[str, ...] | None = None
    data: str | None = None
    data_split: str = "train"
    data_config: str | None = None
    data_dir: str | None = None
    text_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    audio_column: str | None = None
    validation: str = "0.05"
    limit: int | None = None
    max_length: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    warmup: int | None = None
    seed: int = 0
    bfloat16: bool = False
    clips: int = 2000
    held_out: int = 100

    def __post_init__(self) -> None:
        _refuse_unless(self.kind in KINDS, f"there is no kind {self.kind!r}: choose one of {', '.join(KINDS)}")
        _refuse_unless(self.method in METHODS, f"there is no method {self.method!r}: choose one of {', '.join(METHODS)}")
        _refuse_unless(self.quantize in QUANTIZATIONS, f"--quantize {self.quantize} is unknown: use int8 or nf4")
        _refuse_unless(self.init is None or self.init in INITS, f"--init {self.init} is unknown: choose one of {', '.join(INITS)}")
        for name in ("rank", "limit", "steps", "batch_size", "gradient_accumulation", "clips", "held_out"):
            value = getattr(self, name)
            _refuse_unless(value is None or value >= 1, f"{option(name)} must be at least 1, not {value}")
        for name in ("learning_rate", "init_std"):
            value = getattr(self, name)
            _refuse_unless(value is None or (math.isfinite(value) and value > 0), f"{option(name)} must be above 0, not {value}")
        _refuse_unless(self.max_length is None or self.max_length >= 8, "--max-length must be at least 8 tokens")
        _refuse_unless(self.warmup is None or self.warmup >= 0, "--warmup must be at least 0 steps")
        _refuse_unless(self.seed >= 0, f"--seed must be at least 0, not {self.seed}")
        _refuse_unless(self.target_layers != (), "--target-layers needs at least one name")
        if self.method != "flora":
            for name in ("init", "init_std"):
                _refuse_unless(getattr(self, name) is None, f"{option(name)} is fLoRA's: leave it out with --method {self.method}")
        if self.method == "ia3":
            _refuse_unless(self.rank is None, "IA3 has no rank: leave --rank out")
        if self.data is None:
            _refuse_unless(self.language is not None, "say what to learn from: a language of the corpus, or --data SOURCE")

    def for_model(self, model: nn.Module) -> Recipe:
        """The recipe with every open value filled in for the base model as it was loaded."""
        narrow = is_narrow(model)
        rates = LEARNING_RATES if narrow else PAPER_LEARNING_RATES
        steps, batch_size = (NARROW_LENGTHS if narrow else PAPER_LENGTHS)[self.kind]
        steps = steps if self.steps is None else self.steps
        filled = {
            "model": MODELS[self.kind],
            "rank": 1 if self.method == "ia3" else 4,
            "target_layers": ("all",) if narrow or self.kind == "speech" else ("default",),
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": rates[self.kind, self.method],
            "warmup": max(1, steps // 20),
        }
        if self.method == "flora":
            filled["init"] = INITS[0]
        # IA3's rank is the reader's to know, not an option of it: it is left open.
        if self.method == "ia3":
            del filled["rank"]
        return replace(self, **{name: value for name, value in filled.items() if getattr(self, name) is None})

    @property
    def num_examples(self) -> int:
        """How many examples a run takes, repeats among them."""
        return self.steps * self.batch_size * self.gradient_accumulation

    def as_dict(self) -> dict:
        """What JSON can hold."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def arguments(self) -> list[str]:
        """The command line's words that make this recipe, defaults left out."""
        words = [self.kind, *([self.language] if self.language else [])]
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            if value == field.default:
                continue
            words.append(option(field.name))
            if isinstance(value, tuple):
                words += value
            elif value is not True:
                words.append(f"{value:g}" if isinstance(value, float) else str(value))
        return words


def option(name: str) -> str:
    """The command line's name of a field."""
    return "--" + name.replace("_", "-")


def is_narrow(model: nn.Module) -> bool:
    """Whether a model is so small that the embedded models' settings suit it better than the paper's."""
    return sum(parameter.numel() for parameter in model.parameters()) < NARROW


def model_fingerprint(model: nn.Module) -> str:
    """Which weights a base model has: a hash of the first values of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def run_identity(recipe: Recipe, model: nn.Module, data_fingerprint: str) -> dict:
    """What must be the same for a run to go on from another's checkpoint."""
    return {"recipe": recipe.as_dict(), "model": model_fingerprint(model), "data": data_fingerprint}


def short_hash(identity: dict) -> str:
    """Eight letters that tell runs apart."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def label(recipe: Recipe) -> str:
    """A name for people and folders: the language, or what the data is called."""
    return recipe.language or Path(recipe.data or "").stem or "data"


def _refuse_unless(condition: bool, message: str) -> None:
    if not condition:
        raise TrainingError(message)
