"""How a method that PEFT does not ship becomes one of PEFT's.

PEFT looks everything up by a configuration's `peft_type`: the class of the configuration and of the tuner, the prefix of the
parameters, how the state is saved. `register_peft_method` fills those tables, but for members of the enum `PeftType` only, and an
enum takes no new member by ordinary means. So the enum is given one here, and all else goes through PEFT's own door.
"""

from __future__ import annotations

from enum import EnumMeta

import peft

NAME = "FLORA"
TESTED = ">=0.18,<0.22"
"""The versions of PEFT that this is tested with, as in requirements.txt. With another it is tried, and says if it cannot join."""


def register(config_class: type, model_class: type) -> None:
    """Make PEFT look fLoRA up as one of its own methods.

    ImportError, one sentence, where this PEFT has no such tables, refuses the entry, or has a method of that name already.
    """
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
        from peft.utils import register_peft_method

        add_member(peft.PeftType, NAME)
        register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class, prefix=model_class.prefix)
        entries = [
            (PEFT_TYPE_TO_CONFIG_MAPPING.get(NAME), config_class),
            (PEFT_TYPE_TO_TUNER_MAPPING.get(NAME), model_class),
            (PEFT_TYPE_TO_PREFIX_MAPPING.get(NAME), model_class.prefix),
        ]
    except (ImportError, AttributeError, TypeError, ValueError, KeyError) as error:
        raise _not_this_peft(f"{type(error).__name__}: {error}") from error
    if any(found != meant for found, meant in entries):
        raise _not_this_peft("its tables of methods are not where they were")


def add_member(enum: EnumMeta, name: str) -> None:
    """Give an enum of strings the member `name`, found by name, by value and in the enum's order as any other."""
    if name in enum.__members__:
        return
    member = str.__new__(enum, name)
    member._name_ = member._value_ = name
    setattr(enum, name, member)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member


def _not_this_peft(reason: str) -> ImportError:
    return ImportError(f"fLoRA cannot join the methods of peft {peft.__version__} ({reason}): install peft{TESTED}")
