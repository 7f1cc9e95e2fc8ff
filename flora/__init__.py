"""fLoRA Live: one foundation model, many users, each with an own low-rank adapter, all in one batch.

from flora import Engine, Request
engine = Engine.from_pretrained("assets/models/code", adapters={"lua": ["assets/adapters/code/lua/flora"]})
engine.generate([Request(prompt="-- Return the sum of a list\\nlocal function total(xs)\\n", adapter="lua")])
"""

import logging

# Where a CPU has bfloat16 products, bitsandbytes advises at its import to install a package that nothing here needs; its other
# messages stay.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))

from flora.engine import Completion, Engine, Request  # noqa: E402
from flora.errors import (  # noqa: E402
    AdapterError,
    AudioError,
    CheckpointError,
    FloraError,
    ModelError,
    RequestError,
    UnknownAdapterError,
)
from flora.tuner import FloraConfig  # noqa: E402

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
