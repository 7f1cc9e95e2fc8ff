"""Everything that can go wrong by a user's hand, by name.

Every message is one sentence that names the thing and the way out, and is safe to show to a visitor: it repeats what the visitor
gave (a tag, a file's name, a number), never a path of the server.
"""

from __future__ import annotations

import reprlib


class FloraError(ValueError):
    """Base of every error this package raises on purpose."""


class ModelError(FloraError):
    """A base model that cannot be loaded, or is of an architecture the engine does not serve."""


class AdapterError(FloraError):
    """An adapter that does not fit: wrong shapes, an unknown layer, a method without a matching family."""


class CheckpointError(AdapterError):
    """An adapter folder that cannot be read: missing files, missing tensors, a pickle, a truncated file, an unsupported type."""


class RequestError(FloraError):
    """A request that cannot be served: empty or over-long prompt, nonsense limits, nothing to do."""


class UnknownAdapterError(RequestError):
    """A request names an adapter tag the engine does not hold."""


class BusyError(RequestError):
    """An engine that takes no more requests now: its queue is full, or it is shutting down."""


class DeadlineError(RequestError):
    """A request that was not done when its time was up."""


class ServingError(RequestError):
    """A request that failed while it ran: its forward raised, the memory did not suffice, its logits were no numbers."""


class AudioError(RequestError):
    """A clip that cannot be transcribed: silent, corrupt, empty, not finite, longer than the window."""


class EvaluationError(FloraError):
    """An evaluation that cannot be made or kept: data that is missing or too broken, a results file that cannot be written."""


class DataError(FloraError):
    """Training data that cannot be had or is too broken: no such source, no such column, too many bad rows."""


class TrainingError(FloraError):
    """A training run that cannot start or go on: unknown layers, a folder that is in use, a loss that is no number, a full disk."""


class DivergenceError(TrainingError):
    """A loss or an adapter that became NaN or infinite."""


def quoted(value: object) -> str:
    """What a file of somebody else's says, as Python writes it, short enough to be quoted in a sentence."""
    return reprlib.repr(value)[:80]


def first_line(error: Exception | str) -> str:
    """The first line of what another library says went wrong, short enough to be quoted in a sentence."""
    return str(error).strip().partition("\n")[0][:200]
