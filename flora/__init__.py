"""fLoRA Live: one foundation model, many users, each with an own low-rank adapter, all in one batch.

from flora import Engine, Request
engine = Engine.from_pretrained("assets/models/code", adapters={"lua": ["assets/adapters/code/lua/flora"]})
engine.generate([Request(prompt="-- Return the sum of a list\\nlocal function total(xs)\\n", adapter="lua")])
"""

from flora.engine import Completion, Engine, Request
from flora.errors import (
    AdapterError,
    AudioError,
    CheckpointError,
    FloraError,
    ModelError,
    RequestError,
    UnknownAdapterError,
)
from flora.tuner import FloraConfig

__all__ = [
    "AdapterError",
    "AudioError",
    "CheckpointError",
    "Completion",
    "Engine",
    "FloraConfig",
    "FloraError",
    "ModelError",
    "Request",
    "RequestError",
    "UnknownAdapterError",
]
