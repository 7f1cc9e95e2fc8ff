"""How a method that PEFT does not ship becomes one of PEFT's.

PEFT looks everything up by a config's `peft_type`: the configuration's class and the tuner's, the prefix of its parameters, how its
state is saved. `register_peft_method` fills those tables, but only for members of the enum `PeftType`, and an enum cannot be added
to by ordinary means. So the enum gets one more member here, and all else goes through PEFT's own door.
"""

from __future__ import annotations

from enum import EnumMeta

import peft
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method


def enum_member(enum: EnumMeta, name: str) -> str:
    """The member `name` of an enum of strings, made if there is none: found by name, by value and in the enum's order, as any."""
    if name not in enum.__members__:
        member = str.__new__(enum, name)
        member._name_ = member._value_ = name
        setattr(enum, name, member)
        enum._member_names_.append(name)
        enum._member_map_[name] = member
        enum._value2member_map_[name] = member
    return enum[name]


FLORA = enum_member(PeftType, "FLORA")


def register(config_class: type, model_class: type) -> None:
    """Make PEFT look fLoRA up as its own methods. ImportError where this PEFT cannot, or has a method of that name already."""
    reason = None
    if FLORA not in list(PeftType) or PeftType("FLORA") is not FLORA:
        reason = "its types take no new member"
    else:
        try:
            register_peft_method(name="flora", config_cls=config_class, model_cls=model_class, prefix=model_class.prefix)
        except (KeyError, ValueError, TypeError) as error:
            reason = f"its register_peft_method refuses ({error})"
    tables = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, config_class),
        (PEFT_TYPE_TO_TUNER_MAPPING, model_class),
        (PEFT_TYPE_TO_PREFIX_MAPPING, model_class.prefix),
    )
    if reason is None and any(table.get("FLORA") != entry for table, entry in tables):
        reason = "its tables of methods are elsewhere"
    if reason is not None:
        raise ImportError(f"fLoRA cannot become a method of PEFT {peft.__version__}: {reason}; install a PEFT that README.md names")
