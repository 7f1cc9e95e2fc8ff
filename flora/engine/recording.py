"""A decode step's calls to PyTorch, recorded once and repeated without the model's Python in between: a CPU's CUDA graph.

A step of a small model is some hundred calls of a few microseconds each, and a third of its time goes to what stands between them:
modules with their arguments, the choice of an attention, the cache's bookkeeping. A `Recording` is those calls alone, one after
another in one function. What they compute follows from the tensors that they are given; all that Python worked out besides, such as
shapes and branches, is fixed.

Not every call is repeated at every step. Views of the weights, of the cache and of the step's inputs are made once. What the rows
gather of their adapters' factors is made when the batch has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from flora.bank import KEPT_BYTES

_SHAPE_METHODS = ("size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "is_contiguous", "is_floating_point")
_TELLS_A_SHAPE = {"__get__", "__len__", *_SHAPE_METHODS}
"""What answers by a tensor's shape and type alone; `__get__` is that of properties. Any other that answers with no tensor has read
its values."""

_WRITES_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_WRITES_IN_PLACE |= {"__setitem__"}


class RecordedCapture:
    """A `flora.engine.graphs.Capture` in recorded calls. RuntimeError where the function reads a tensor's values into Python."""

    on_host, first_steps = True, 3
    most = 512  # a few kB of code each: as many as 64 rows have shapes at 512 positions

    def __call__(self, function: Callable[[], Tensor], of_batch: Sequence[Tensor]) -> Recording:
        with _Recorder() as recorder:
            output = function()
        return Recording(recorder.calls, output, of_batch)


class _Call:
    """One recorded call. It holds all that it was given and returned, so that no two tensors of a recording share an address."""

    def __init__(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        self.function, self.args, self.kwargs, self.result = function, args, kwargs, result
        self.given = _tensors((args, kwargs))
        self.made = [one for one in _tensors(result) if not any(one is given for given in self.given)]
        if self.made and not isinstance(result, Tensor) and not all(one is None or isinstance(one, Tensor) for one in result):
            raise RuntimeError(f"{_name(function)} returns tensors in a form that is not recorded")
        self.written: list[Tensor] = []
        name = _name(function)
        if (name.endswith("_") and not name.endswith("__")) or name in _WRITES_IN_PLACE or kwargs.get("inplace"):
            self.written = self.given[:1]
        elif "out" in kwargs:
            self.written = _tensors(kwargs["out"])


class _Recorder(TorchFunctionMode):
    """Notes every call that makes or changes a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if _name(function) in _TELLS_A_SHAPE and not isinstance(result, Tensor):
            return result
        call = _Call(function, args, kwargs or {}, result)
        if call.made or call.written:
            self.calls.append(call)
        elif call.given and not _tensors(result):
            raise RuntimeError(f"{_name(function)} reads a tensor's values into Python, and what comes after may depend on them")
        return result


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


class Recording:
    """Recorded calls, to be repeated on the tensors that they were recorded with, wherever those lie.

    output: what the recorded function returned. of_batch: tensors whose values change with the batch alone.
    """

    def __init__(self, calls: Sequence[_Call], output: Tensor, of_batch: Sequence[Tensor]) -> None:
        when = _when(calls, of_batch)
        at_each_step = _needed([call for call in calls if when[call] is _When.STEP], [output])
        once_a_batch = [call for call in calls if when[call] is _When.BATCH]
        wanted = {id(one) for call in at_each_step for one in call.given} | {id(output)}
        kept = [one for call in once_a_batch for one in call.made if id(one) in wanted]
        self._prepare = _compiled(_needed(once_a_batch, kept), [], kept)
        self._repeat = _compiled(at_each_step, kept, [output])
        self._kept: tuple[Tensor, ...] | None = None

    def replay(self) -> Tensor:
        """Repeat the calls; what the last one returns."""
        if self._kept is None:
            self._kept = self._prepare()
        return self._repeat(*self._kept)[0]

    def forget_batch(self) -> None:
        """The tensors `of_batch` hold other values from now on."""
        self._kept = None


# ------------------------------------------------------------------------------------------------------ what is done when


class _When(Enum):
    ONCE = "once"  # as the recording is made
    BATCH = "batch"  # when the batch has changed
    STEP = "step"


def _when(calls: Sequence[_Call], of_batch: Sequence[Tensor]) -> dict[_Call, _When]:
    """When each call has to be done again.

    A view is made once: it sees whatever is written there later. A result of its own is as lasting as what it was made of, unless
    somebody writes into it. Nothing is known of memory that was there before, the weights' among it, but that of the batch.
    """
    memory = {id(one): _memory(one) for call in calls for one in (*call.given, *call.made)}
    written = {memory[id(one)] for call in calls for one in call.written}
    changes = {_memory(one): _When.BATCH for one in of_batch}  # memory → when its values change; not named: at each step
    made: dict[int, _When] = {}  # id of a tensor → when it is made; not named: before
    when: dict[_Call, _When] = {}
    num_kept_bytes = 0
    for call in calls:
        sources, places = {memory[id(one)] for one in call.given}, {memory[id(one)] for one in call.made}
        changing = {changes.get(source, _When.STEP) for source in sources}
        if call.written:
            when[call] = _When.STEP
        elif call.given and places <= sources and all(made.get(id(one), _When.ONCE) is _When.ONCE for one in call.given):
            when[call] = _When.ONCE
        elif _When.STEP in changing or places & written:
            when[call] = _When.STEP
        else:
            when[call] = _When.BATCH if _When.BATCH in changing else _When.ONCE
        for one in call.made:
            made[id(one)] = when[call]
            if memory[id(one)] not in written | sources:
                changes[memory[id(one)]] = when[call]
                num_kept_bytes += one.untyped_storage().nbytes() if when[call] is _When.BATCH else 0
    if num_kept_bytes > KEPT_BYTES:
        return {call: _When.STEP if of is _When.BATCH else of for call, of in when.items()}
    return when


def _memory(tensor: Tensor) -> int:
    """Where its values lie, the same for all views of them; a tensor without values has a number of its own."""
    return tensor.untyped_storage().data_ptr() or -id(tensor)


def _needed(calls: Sequence[_Call], outputs: Sequence[Tensor]) -> list[_Call]:
    """Those calls that make the outputs, and those that write somewhere."""
    wanted, needed = {id(one) for one in outputs}, []
    for call in reversed(calls):
        if call.written or any(id(one) in wanted for one in call.made):
            wanted.update(id(one) for one in call.given)
            needed.append(call)
    return needed[::-1]


# --------------------------------------------------------------------------------------------------------------- compile


def _compiled(calls: Sequence[_Call], given: Sequence[Tensor], outputs: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """A function of the given tensors that does the calls, one after another, and returns the outputs.

    All other tensors are those of the recording. A result's variable is used again once nobody reads it, which frees its memory.
    """
    last_read = {id(one): place for place, call in enumerate(calls) for one in call.given}
    last_read |= {id(one): len(calls) for one in outputs}
    variables = {id(one): f"given_{place}" for place, one in enumerate(given)}
    parameters = ", ".join(variables.values())
    constants: dict[str, Any] = {}
    free: list[str] = []
    num_variables = 0

    def constant(value: Any) -> str:
        name = f"constant_{len(constants)}"
        constants[name] = value
        return name

    def expression(value: Any) -> str:
        if id(value) in variables:
            return variables[id(value)]
        if isinstance(value, Tensor) or not _tensors(value):
            return constant(value)
        if isinstance(value, slice):
            return f"slice({expression(value.start)}, {expression(value.stop)}, {expression(value.step)})"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key!r}: {expression(one)}' for key, one in value.items())}}}"
        inner = "".join(f"{expression(one)}, " for one in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"

    def target(result: Any, place: int) -> str:
        nonlocal num_variables
        if id(result) in variables or last_read.get(id(result), -1) <= place:
            return "_"
        if not free:
            free.append(f"made_{num_variables}")
            num_variables += 1
        variables[id(result)] = free.pop()
        return variables[id(result)]

    lines = []
    for place, call in enumerate(calls):
        words = [expression(one) for one in call.args] + [f"{name}={expression(one)}" for name, one in call.kwargs.items()]
        line = f"{constant(call.function)}({', '.join(words)})"
        read = {variables.pop(id(one), "") for one in call.given if last_read[id(one)] == place}
        free += sorted(name for name in read if name.startswith("made_"))
        if call.made:
            several = not isinstance(call.result, Tensor)
            targets = [target(one, place) for one in (call.result if several else [call.result])]
            line = f"{', '.join(targets)}{',' * several} = {line}"
        lines.append(line)
    lines.append(f"return ({''.join(f'{expression(one)}, ' for one in outputs)})")
    source = f"def repeat({parameters}):\n    " + "\n    ".join(lines)
    exec(compile(source, "<recorded calls>", "exec"), constants)
    return constants["repeat"]


def _tensors(value: Any) -> list[Tensor]:
    """Those in arguments or a result, in their order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for one in value for tensor in _tensors(one)]
