"""The compilers and interpreters that run generated programs, and `Grader`, which says of a program whether it passes.

A language is graded where its toolchain is installed and a small program of it passes in the sandbox; otherwise it is not graded,
for a reason that is told, and never counted as wrong.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

from flora.errors import EvaluationError
from flora.evaluate.sandbox import Limits, Result, Sandbox, Step

WALL_PER_CPU = 12  # a machine that is busy with something else makes a program slow, not wrong: what loops is ended by its CPU time
RUN = Limits(wall_s=WALL_PER_CPU * Limits.cpu_s)
COMPILE = Limits(wall_s=WALL_PER_CPU * 20, cpu_s=20, memory_bytes=1 << 30, processes=64)
"""Compilers need more than what they compile: rustc and ldc2 take some 250 MB and start a linker."""


@dataclass(frozen=True)
class Library:
    """What a test may import: the text that shows it does, a program that imports it and nothing else, and Debian's package."""

    name: str
    marker: str
    program: str
    package: str


@dataclass(frozen=True)
class Recipe:
    """How one language's programs are compiled and run.

    executables: names to look for, the first found is taken. compile, run: words of a command; "{}" stands for the executable's
    path. compile may differ by executable. trivial: a program that passes if anything does. passes_quietly: a program that wrote to
    stderr has failed, whatever its exit code.
    """

    name: str
    file: str
    executables: tuple[str, ...]
    run: tuple[str, ...]
    trivial: str
    compile: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    libraries: tuple[Library, ...] = ()
    package: str | None = None  # of Debian
    passes_quietly: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


_D = ("{}", "-unittest", "-of=program", "program.d")

RECIPES: dict[str, Recipe] = {
    "d": Recipe(
        "D", "program.d", ("ldc2", "dmd", "gdc"), ("./program",), "void main() {}",
        compile={"ldc2": _D, "dmd": _D, "gdc": ("{}", "-funittest", "-o", "program", "program.d")}, package="ldc",
    ),
    "pl": Recipe(
        "Perl", "program.pl", ("perl",), ("{}", "program.pl"), "exit 0;", package="perl",
        libraries=(Library("Test::Deep", "use Test::Deep", "use Test::Deep;", "libtest-deep-perl"),),
    ),
    "rb": Recipe(
        "Ruby", "program.rb", ("ruby",), ("{}", "program.rb"), "exit 0", package="ruby",
        libraries=(Library("test-unit", "test/unit", "require 'test/unit'", "ruby-test-unit"),),
    ),
    "rs": Recipe(
        "Rust", "program.rs", ("rustc",), ("./program",), "fn main() {}",
        compile={"rustc": ("{}", "-A", "warnings", "-C", "codegen-units=1", "-o", "program", "program.rs")}, package="rustc",
    ),
    "rkt": Recipe(
        "Racket", "program.rkt", ("racket",), ("{}", "program.rkt"), "#lang racket\n", package="racket",
        # A check of rackunit that fails is told on stderr, and the exit code is 0 all the same.
        passes_quietly=True,
        libraries=(Library("rackunit", "rackunit", "#lang racket\n(require rackunit)\n", "racket"),),
    ),
    "swift": Recipe(
        "Swift", "program.swift", ("swiftc",), ("./program",), "assert(1 + 1 == 2)",
        compile={"swiftc": ("{}", "-module-cache-path", "cache", "-o", "program", "program.swift")},
    ),
    "jl": Recipe(
        "Julia", "program.jl", ("julia",), ("{}", "--startup-file=no", "--history-file=no", "program.jl"), "exit(0)",
        environment={"JULIA_DEPOT_PATH": "depot:"},
    ),
    "lua": Recipe(
        "Lua", "program.lua", ("lua5.4", "lua5.3", "lua"), ("{}", "program.lua"), "os.exit(0)", package="lua5.4",
        libraries=(Library("luaunit", "luaunit", "require('luaunit')", "lua-unit"),),
    ),
    "r": Recipe("R", "program.R", ("Rscript",), ("{}", "--vanilla", "program.R"), "quit(status = 0)", package="r-base-core"),
    "py": Recipe("Python", "program.py", (os.path.realpath(sys.executable),), ("{}", "-I", "program.py"), "pass"),
}  # fmt: skip
"""By MultiPL-E's tags, and Python, which the embedded model knows best."""


def recipe(tag: str) -> Recipe:
    """The recipe of a language; EvaluationError with the known ones."""
    if tag not in RECIPES:
        raise EvaluationError(f"no language {tag!r}; there are {', '.join(RECIPES)}")
    return RECIPES[tag]


@dataclass(frozen=True)
class Toolchain:
    """A recipe with an executable found on this machine. visible: what the sandbox shows of it, besides the system."""

    recipe: Recipe
    executable: str
    visible: tuple[str, ...]
    run_limits: Limits = RUN
    compile_limits: Limits = COMPILE

    def grade(self, sandbox: Sandbox, source: str) -> Result:
        """Compile and run a program. Raises EvaluationError where the sandbox cannot be started."""
        name = os.path.basename(self.executable)
        steps = []
        for command, limits in ((self.recipe.compile.get(name), self.compile_limits), (self.recipe.run, self.run_limits)):
            if command is not None:
                steps.append(Step(tuple(self.executable if word == "{}" else word for word in command), limits))
        result = sandbox.run({self.recipe.file: source}, steps, self.visible, self.recipe.environment)
        if result.passed and result.noisy and self.recipe.passes_quietly:
            return replace(result, outcome="failed")
        return result


def find_toolchain(tag: str, run_limits: Limits = RUN, compile_limits: Limits = COMPILE) -> Toolchain | None:
    """A language's toolchain on this machine, None where none of its executables is installed."""
    made = recipe(tag)
    found = next((path for name in made.executables if (path := shutil.which(name))), None)
    if found is None:
        return None
    executable = Path(found)
    if tag == "rs":  # rustup's rustc is a door to the real one, and needs a home
        answer = subprocess.run([found, "--print", "sysroot"], capture_output=True, text=True, timeout=60, check=False)
        inner = Path(answer.stdout.strip()) / "bin" / "rustc"
        executable = inner if answer.returncode == 0 and inner.is_file() else executable
    real = Path(os.path.realpath(executable))
    # A toolchain outside of the system's folders is shown whole, and by the name it was found under.
    prefix = real.parent.parent if real.parent.name == "bin" else real.parent
    return Toolchain(made, str(executable), (str(prefix), str(executable)), run_limits, compile_limits)


class Grader:
    """Judges programs of all languages in one sandbox. Safe to use from several threads."""

    def __init__(self, sandbox: Sandbox, run_limits: Limits = RUN, compile_limits: Limits = COMPILE) -> None:
        self.sandbox = sandbox
        self._limits = (run_limits, compile_limits)
        self._toolchains: dict[str, Toolchain | None] = {}
        self._faults: dict[tuple[str, str], str | None] = {}
        self._lock = threading.Lock()

    def reason(self, tag: str, program: str = "") -> str | None:
        """Why programs of this language cannot be graded, None where they can. program: one of them, for what it imports."""
        with self._lock:
            made = recipe(tag)
            if tag not in self._toolchains:
                self._toolchains[tag] = find_toolchain(tag, *self._limits)
            if self._toolchains[tag] is None:
                return f"{made.name} is not installed{_package(made.package)}"
            fault = self._fault(tag, made.trivial, f"{made.name} does not work in the sandbox")
            for library in made.libraries:
                if fault is None and library.marker in program:
                    fault = self._fault(tag, library.program, f"{library.name} is not installed{_package(library.package)}")
            return fault

    def _fault(self, tag: str, program: str, words: str) -> str | None:
        """`words` where a program that should pass does not; tried once."""
        if (tag, program) not in self._faults:
            toolchain = self._toolchains[tag]
            generous = replace(toolchain.run_limits, wall_s=COMPILE.wall_s, cpu_s=COMPILE.cpu_s)  # it starts from a cold disk
            toolchain = replace(toolchain, run_limits=generous)
            self._faults[tag, program] = None if toolchain.grade(self.sandbox, program).passed else words
        return self._faults[tag, program]

    def grade(self, tag: str, program: str) -> Result:
        """Run a program. EvaluationError where its language cannot be graded here."""
        if (reason := self.reason(tag, program)) is not None:
            raise EvaluationError(f"programs in {recipe(tag).name} cannot be graded: {reason}")
        return self._toolchains[tag].grade(self.sandbox, program)

    def grade_all(
        self, programs: Iterable[tuple[str, str]], workers: int | None = None
    ) -> Iterator[tuple[tuple[str, str], Result | None]]:
        """Grade many programs (tag, source) at once and yield each with its result as it is done; None: not graded.

        Equal programs are graded once and yielded once. workers: programs that run at a time, one per processor unless told.
        """
        waiting = list(dict.fromkeys(programs))
        for program in [program for program in waiting if self.reason(*program) is not None]:
            yield program, None
        waiting = [program for program in waiting if self.reason(*program) is None]
        with ThreadPoolExecutor(max_workers=workers or num_processors()) as pool:
            futures: dict[Future[Result], tuple[str, str]] = {pool.submit(self.grade, *program): program for program in waiting}
            try:
                while futures:
                    done, _ = wait(futures, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield futures.pop(future), future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def num_processors() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _package(name: str | None) -> str:
    return f" (Debian's package: {name})" if name else ""
