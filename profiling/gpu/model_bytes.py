"""What a decode step of the bare model must read at least: that over the copy bandwidth is the time that physics allows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from flora.engine import Engine
from flora.engine.cache import RowCache, SpeechCache

ONCE_A_CLIP = ("encoder_attn.k_proj", "encoder_attn.v_proj")
"""Of a Whisper decoder: they read what the encoder heard, once; a step reads what came of it."""


@dataclass(frozen=True)
class DecodeBytes:
    """weights: that the step multiplies with, adapted: of those, the layers' that adapters act on; keys_and_values: of all rows."""

    weights: int
    adapted: int
    keys_and_values: int

    @property
    def all(self) -> int:
        return self.weights + self.keys_and_values


def decode_bytes(engine: Engine, cache: RowCache | SpeechCache, batch: int, positions: float) -> DecodeBytes:
    """Of one step for `batch` rows with `positions` tokens each. cache: of a generation after a step, which knows its shapes."""
    model = engine.model
    decoder = model.get_decoder() if isinstance(cache, SpeechCache) else model
    read: dict[int, Tensor] = {}  # by identity: an output head that is the table of embeddings is one
    for name, module in decoder.named_modules():
        if not (isinstance(module, nn.Embedding) or any(part in name for part in ONCE_A_CLIP)):
            read |= {id(parameter): parameter for parameter in module.parameters(recurse=False)}
    head = model.get_output_embeddings()
    read |= {id(parameter): parameter for parameter in head.parameters(recurse=False)}
    adapted = [parameter for layer in engine.bank.layers.values() for parameter in layer.base.parameters()]
    own = cache.own if isinstance(cache, SpeechCache) else cache
    keys_and_values = sum(2 * batch * positions * layer.keys[0, :, 0].nbytes for layer in own.layers)
    if isinstance(cache, SpeechCache):
        keys_and_values += sum(batch * 2 * layer.keys[0].nbytes for layer in cache.cross_attention_cache.layers)
    return DecodeBytes(
        weights=_num_bytes(read.values()),
        adapted=_num_bytes(one for one in adapted if id(one) in read),
        keys_and_values=round(keys_and_values),
    )


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
