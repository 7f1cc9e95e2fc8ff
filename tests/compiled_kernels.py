"""What a GPU would run, without one: how a launch is specialised, and what it is compiled to for compute capability 9.0."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from kernels_on_cpu import triton
from triton._utils import find_paths_if, get_iterable_path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from flora.kernels.launch import Launch

H100 = GPUTarget("cuda", 90, 32)


@cache
def jit_function(kernel) -> JITFunction:
    """A kernel as it is on a GPU; the interpreter has another thing in its place, which keeps what it was made with."""
    return kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)


def specialised(launch: Launch) -> tuple[ASTSource, dict, str]:
    """What Triton compiles for a launch: the source with its types, constants and attributes, the options, and the key of both."""
    kernel, backend = jit_function(launch.kernel), make_backend(H100)
    bound, specialisation, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *launch.arguments, **launch.meta
    )
    types, attributes = [one[0] for one in specialisation], [one[1] for one in specialisation]
    signature = dict(zip(kernel.arg_names, types, strict=True))
    constant_paths = find_paths_if(types, lambda _, one: one == "constexpr")
    constants = {path: get_iterable_path(list(bound.values()), path) for path in constant_paths}
    attributes = [None if kind == "constexpr" else one for kind, one in zip(types, attributes, strict=True)]
    found = {
        path: backend.parse_attr(get_iterable_path(attributes, path))
        for path in find_paths_if(attributes, lambda _, one: isinstance(one, str))
    }
    return ASTSource(kernel, signature, constants, found), options, f"{specialisation} {options}"


@dataclass(frozen=True)
class Compiled:
    shared: int  # bytes
    registers: int  # of a thread
    spilled: int  # bytes of a thread's that did not fit into registers
    ptx: str = field(repr=False)


def compiled(launch: Launch) -> Compiled:
    source, options, _ = specialised(launch)
    built = triton.compile(source, target=H100, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        used = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", used).group(1)) for name in ("REG", "STACK"))
    return Compiled(built.metadata.shared, registers, stack, built.asm["ptx"])
