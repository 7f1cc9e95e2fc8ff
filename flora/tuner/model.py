"""FloraModel: the tuner that PEFT puts around a model for a FloraConfig."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from torch import nn

from flora.errors import AdapterError, RequestError, UnknownAdapterError
from flora.layers import is_adaptable
from flora.tuner.config import FloraConfig
from flora.tuner.layer import BASE_ROW, FloraLinear

WHISPER_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
"""Every fully-connected layer, as in the paper's speech experiments; PEFT has no default for Whisper."""


class FloraModel(BaseTuner):
    """A model whose linear layers have fLoRA adapters; made by `get_peft_model` and `PeftModel.from_pretrained`.

    Beyond PEFT's own methods, a forward or generate in evaluation mode takes adapter_names, for each row of the batch the adapter
    that serves it, or "__base__" for none; the whole batch goes through each layer once.
    """

    prefix = "flora_"
    tuner_layer_cls = FloraLinear
    target_module_mapping = {**TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "whisper": WHISPER_LAYERS}

    def _create_and_replace(
        self,
        peft_config: FloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        pattern = get_pattern_key(peft_config.rank_pattern.keys(), current_key)
        rank = peft_config.rank_pattern.get(pattern, peft_config.r)
        if isinstance(target, FloraLinear):
            target.update_layer(adapter_name, peft_config, rank)
            return
        if not is_adaptable(target):
            raise AdapterError(
                f"layer {current_key} is {type(target).__name__}, and fLoRA adapts linear layers: leave it out of target_modules"
            )
        if _is_read_by_its_parent(parent, target_name):
            raise AdapterError(
                f"layer {current_key} cannot be adapted: {type(parent).__name__} multiplies by its weight in a kernel of its own "
                "and does not call the layer: leave it out of target_modules, or name it in exclude_modules"
            )
        layer = FloraLinear(target, adapter_name, peft_config, rank)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    # --------------------------------------------------------------------------------------------------------- merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's own, with an UnknownAdapterError for names that are none, where PEFT merges nothing and says nothing."""
        self._check_adapter_names(adapter_names or [])
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """PEFT's own, with an UnknownAdapterError for names that are none, where PEFT returns the base model and says nothing."""
        self._check_adapter_names(adapter_names or [])
        return super().merge_and_unload(progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Always an AdapterError: what LoRA's and IA3's adapters have, to be added up into a new one."""
        raise AdapterError(
            "fLoRA adapters multiply, add_weighted_adapter adds: make several active with model.base_model.set_adapter([…]) instead"
        )

    # --------------------------------------------------------------------------------------------- an adapter per row

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around every forward and generate, with their arguments."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        self._check_row_names(adapter_names)
        with_names = partial(_with_adapter_names, list(adapter_names), _copies_of_a_row(kwargs, self.model))
        with ExitStack() as hooks:
            for module in self.model.modules():
                if isinstance(module, FloraLinear | AuxiliaryTrainingWrapper):
                    hooks.callback(module.register_forward_pre_hook(with_names, with_kwargs=True).remove)
            yield

    def _check_row_names(self, adapter_names: Sequence[str]) -> None:
        if not adapter_names:
            raise RequestError("adapter_names is empty: give a list with one name per row")
        if self.training:
            raise RequestError(
                "adapter_names serves mixed batches in evaluation only: call eval() first, or train with set_adapter"
            )
        self._check_adapter_names(adapter_names, {BASE_ROW})

    def _check_adapter_names(self, adapter_names: Sequence[str], besides: Set[str] = frozenset()) -> None:
        if isinstance(adapter_names, str):
            raise RequestError(f"adapter_names is {adapter_names!r}: give a list of names")
        unknown = sorted(set(adapter_names) - set(self.peft_config) - besides)
        if unknown:
            raise UnknownAdapterError(f"unknown adapters {', '.join(unknown)}; loaded: {', '.join(self.peft_config)}")


def _is_read_by_its_parent(parent: nn.Module, name: str) -> bool:
    """Whether a module may compute with a linear layer's weight without calling the layer, so that an adapter on it does nothing.

    torch's own attention and encoder layers do, and so do the fused kernels of state-space mixers (Mamba and its kin).
    """
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return True
    return hasattr(parent, "A_log") and hasattr(parent, "D") and name in ("x_proj", "dt_proj", "out_proj")


def _copies_of_a_row(arguments: dict[str, Any], model: nn.Module) -> set[int]:
    """How often `generate` may repeat every row, by its arguments, its generation_config among them, or else the model's.

    Before an encoder it repeats none, Whisper each for its sequences; before a decoder each for its beams, or for its sequences.
    """
    configs = arguments.get("generation_config"), getattr(model, "generation_config", None)

    def number(name: str) -> int:
        given = (arguments.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in given if value is not None), 1)

    beams, sequences = number("num_beams"), number("num_return_sequences")
    return {1, beams, sequences, beams * sequences}


def _with_adapter_names(
    adapter_names: list[str], copies: set[int], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A module's arguments with the names of its rows, which stand in the batch's order, the copies of a row side by side."""
    times, rest = divmod(args[0].shape[0], len(adapter_names)) if args else (1, 0)
    if rest == 0 and times in copies:
        adapter_names = [name for name in adapter_names for _ in range(times)]
    return args, {**kwargs, "adapter_names": adapter_names}
