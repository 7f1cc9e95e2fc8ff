"""Adapter checkpoints ↔ bank entries: PEFT's LoRA, IA3 and HiRA, this project's fLoRA and the paper's authors', from a folder or
the hub, safetensors only.

A checkpoint is a PEFT folder: adapter_config.json and adapter_model.safetensors. `files` reads and writes such folders, `kinds`
knows what each kind of adapter means, `base_model` whether it was made for the model it is to be served with. No pickle is ever
opened: a folder that has only adapter_model.bin is refused by name.
"""

from flora.formats.adapter import Adapter, read_adapter, write_flora, write_lora
from flora.formats.base_model import require_base_model
from flora.formats.files import CONFIG_FILE, PICKLE_FILES, WEIGHTS_FILE

__all__ = [
    "CONFIG_FILE",
    "PICKLE_FILES",
    "WEIGHTS_FILE",
    "Adapter",
    "require_base_model",
    "read_adapter",
    "write_flora",
    "write_lora",
]
