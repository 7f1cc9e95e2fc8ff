"""Right and wrong programs in every language that this machine can grade, and what is said of the others."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flora.errors import EvaluationError
from flora.evaluate import toolchains
from flora.evaluate.problems import TAGS, held_out_problems
from flora.evaluate.sandbox import Limits, Result, Sandbox, SandboxFinder, Step
from flora.evaluate.toolchains import RECIPES, Grader, Library, find_toolchain, num_processors, recipe

SHORT = Limits(wall_s=30.0, cpu_s=1, processes=16)
FINDER = SandboxFinder()
languages = pytest.mark.parametrize("tag", RECIPES)


def find_sandbox() -> Sandbox:
    try:
        return FINDER.find()
    except EvaluationError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def grader() -> Grader:
    return Grader(find_sandbox(), SHORT)


@pytest.fixture
def grade(grader, tag):
    """Grades a program of the language `tag`, which is skipped where it cannot be graded."""
    if (reason := grader.reason(tag)) is not None:
        pytest.skip(reason)
    return lambda program: grader.grade(tag, program)


# -------------------------------------------------------------------------------------------------- right and wrong programs


WRONG = {
    "d": 'void main() { if (1 + 1 != 3) throw new Exception("wrong"); }',
    "pl": "exit 1 if 1 + 1 != 3;",
    "rb": "raise 'wrong' if 1 + 1 != 3",
    "rs": "fn main() { assert_eq!(1 + 1, 3); }",
    "rkt": "#lang racket\n(unless (equal? (+ 1 1) 3) (exit 1))",
    "swift": "assert(1 + 1 == 3)",
    "jl": "@assert 1 + 1 == 3",
    "lua": "assert(1 + 1 == 3)",
    "r": "stopifnot(1 + 1 == 3)",
    "py": "assert 1 + 1 == 3",
}
BROKEN = dict.fromkeys(RECIPES, ")(") | {"rkt": "#lang racket\n)("}
LOOP = {  # each takes its second of processor time; Python's is among `test_sandbox`'s outcomes
    "rs": "fn main() { loop {} }",
    "rkt": "#lang racket\n(let loop () (loop))",
    "swift": "while true {}",
    "jl": "while true end",
    "r": "while (TRUE) {}",
}
GIGABYTE = {
    "d": "void main() { auto held = new ubyte[1 << 30]; held[] = 1; }",
    "pl": 'my $held = "x" x (1 << 30);',
    "rb": "held = 'x' * (1 << 30)",
    "rs": "fn main() { let held = vec![1u8; 1 << 30]; assert!(held.len() > 9); }",
    "rkt": "#lang racket\n(define held (make-bytes (expt 2 30) 1))",
    "swift": "let held = [UInt8](repeating: 1, count: 1 << 30)\nassert(held.count > 9)",
    "jl": "held = ones(UInt8, 1 << 30)",
    "lua": "local held = string.rep('x', 1 << 30)",
    "r": "held <- raw(2^30)",
    "py": "held = bytearray(1 << 30)",
}
OUTPUT = {  # 100 MB
    "d": "import std.stdio, std.array; void main() { foreach (i; 0 .. 100) write(replicate(`x`, 1 << 20)); }",
    "pl": 'print "x" x (1 << 20) for 1 .. 100;',
    "rb": "100.times { print 'x' * (1 << 20) }",
    "rs": 'fn main() { for _ in 0..100 { print!("{}", "x".repeat(1 << 20)); } }',
    "rkt": "#lang racket\n(for ([i 100]) (write-string (make-string (expt 2 20) #\\x)))",
    "swift": 'for _ in 0..<100 { print(String(repeating: "x", count: 1 << 20)) }',
    "jl": 'for _ in 1:100 print("x" ^ (1 << 20)) end',
    "lua": "for i = 1, 100 do io.write(string.rep('x', 1 << 20)) end",
    "r": "for (i in 1:100) cat(strrep('x', 2^20))",
    "py": "for _ in range(100): print('x' * (1 << 20))",
}
HOME = {  # fails unless the file is there afterwards
    "d": 'import std.file, std.process; void main() { write(environment["HOME"] ~ "/flora-was-here", "x"); }',
    "pl": 'open(my $file, ">", "$ENV{HOME}/flora-was-here") or die "not written";',
    "rb": "File.write(File.join(ENV['HOME'], 'flora-was-here'), 'x')",
    "rs": 'fn main() { std::fs::write(format!("{}/flora-was-here", std::env::var("HOME").unwrap()), "x").unwrap(); }',
    "rkt": '#lang racket\n(display-to-file "x" (build-path (getenv "HOME") "flora-was-here"))',
    "swift": 'import Foundation\ntry! "x".write(toFile: NSHomeDirectory() + "/flora-was-here", atomically: false, encoding: .utf8)',
    "jl": 'write(joinpath(ENV["HOME"], "flora-was-here"), "x")',
    "lua": "assert(io.open(os.getenv('HOME') .. '/flora-was-here', 'w'))",
    "r": "writeLines('x', file.path(Sys.getenv('HOME'), 'flora-was-here'))",
    "py": "import os; open(os.path.join(os.environ['HOME'], 'flora-was-here'), 'w')",
}
NETWORK = {  # fails unless there is a connection
    "d": 'import std.socket; void main() { new TcpSocket(new InternetAddress("127.0.0.1", PORT)); }',
    "pl": 'use IO::Socket::INET; IO::Socket::INET->new(PeerAddr => "127.0.0.1", PeerPort => PORT) or die "no connection";',
    "rb": "require 'socket'; TCPSocket.new('127.0.0.1', PORT)",
    "rs": 'fn main() { std::net::TcpStream::connect("127.0.0.1:PORT").unwrap(); }',
    "rkt": '#lang racket\n(define-values (in out) (tcp-connect "127.0.0.1" PORT))',
    "jl": 'using Sockets; connect("127.0.0.1", PORT)',
    "lua": "assert(os.execute(\"bash -c 'exec 3<>/dev/tcp/127.0.0.1/PORT'\"))",  # it has no sockets of its own
    "r": "socketConnection('127.0.0.1', PORT, timeout = 2, blocking = TRUE, open = 'r+')",
    "py": "import socket; socket.create_connection(('127.0.0.1', PORT), timeout=2)",
}
FORK_BOMB = {
    "d": "import core.sys.posix.unistd; void main() { while (true) fork(); }",
    "pl": "while (1) { fork; }",
    "rb": "loop { begin; fork; rescue SystemCallError; end }",
    "rs": "fn main() { loop { let _ = std::process::Command::new(std::env::current_exe().unwrap()).spawn(); } }",
    "rkt": """#lang racket
(define me (find-executable-path (find-system-path 'exec-file)))
(let loop () (with-handlers ([exn:fail? void]) (subprocess #f #f #f me "program.rkt")) (loop))""",
    "lua": "local me = arg[-1] .. ' ' .. arg[0] .. ' &'\nwhile true do os.execute(me) end",
    "r": "while (TRUE) try(parallel:::mcfork(), silent = TRUE)",
    "py": "import os\nwhile True:\n    try: os.fork()\n    except BlockingIOError: pass",
}


@languages
def test_a_right_program_passes(grade, tag):
    assert grade(recipe(tag).trivial).passed


@languages
@pytest.mark.parametrize("programs", (WRONG, BROKEN), ids=("wrong answer", "broken syntax"))
def test_a_wrong_program_does_not_pass(grade, tag, programs):
    result = grade(programs[tag])
    is_compiled = bool(recipe(tag).compile)
    expected = ("error",) if is_compiled and programs is BROKEN else ("failed", "error")  # Swift's assert is a signal
    assert result.outcome in expected, result
    assert result.detail or programs is WRONG


@pytest.mark.parametrize("tag", TAGS)
def test_the_corpus_passes_with_its_reference_and_not_without(grade, tag):
    (problem,) = held_out_problems([tag], 1, seed=7)
    right, wrong = grade(problem.program(problem.reference)), grade(problem.program(""))
    assert right.passed, right
    assert not wrong.passed


@pytest.mark.parametrize("tag", LOOP)
def test_a_loop_without_end_is_a_timeout(grade, tag):
    assert grade(LOOP[tag]).outcome == "timeout"


@languages
def test_a_gigabyte_is_not_to_be_had(grade, tag):
    result = grade(GIGABYTE[tag])
    assert result.outcome == "memory", result


@languages
def test_a_hundred_megabytes_are_not_written(grade, tag):
    assert grade(OUTPUT[tag]).outcome == "output"


@languages
def test_the_home_folder_is_not_written(grade, tag):
    result = grade(HOME[tag])
    assert result.outcome == "failed" and result.exit_code > 0, result
    assert not (Path.home() / "flora-was-here").exists()


@pytest.mark.parametrize("tag", NETWORK)
def test_the_network_is_not_reached(grade, tag):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        program = NETWORK[tag].replace("PORT", str(server.getsockname()[1]))
        result = grade(program)
        assert result.outcome == "failed" and result.exit_code > 0, result
        with pytest.raises(TimeoutError):
            server.accept()
        # The same program where nothing keeps it apart: that is what the sandbox held back.
        open_result = find_toolchain(tag, SHORT).grade(Sandbox("unsafe"), program)
        if "cannot be started: Permission denied" not in open_result.detail:  # a toolchain in root's own folder
            assert open_result.passed, open_result
            server.accept()[0].close()


@pytest.fixture(scope="module")
def bound(grader) -> None:
    """Only where the kernel refuses a program that starts 40 processes and no more, bombs are let loose."""
    source = "import os, time\nfor _ in range(40):\n    if os.fork() == 0: time.sleep(2); os._exit(0)"
    step = Step((os.path.realpath(sys.executable), "-I", "-S", "-c", source), SHORT)
    result = grader.sandbox.run({}, [step])
    if not (result.outcome == "failed" and "BlockingIOError" in result.detail):
        pytest.skip("the kernel does not count a program's processes here")


@pytest.mark.parametrize("tag", FORK_BOMB)
def test_a_fork_bomb_is_ended(grader, bound, tag):
    if (reason := grader.reason(tag)) is not None:
        pytest.skip(reason)
    toolchain = find_toolchain(tag, replace(SHORT, wall_s=2.0 if tag in ("rkt", "r") else 0.7))
    result = toolchain.grade(grader.sandbox, FORK_BOMB[tag])
    assert result.outcome in ("timeout", "memory") or result.detail == "more than 16 processes", result


def test_what_a_racket_check_tells_on_stderr_is_a_failure(grader):
    if (reason := grader.reason("rkt", "rackunit")) is not None:
        pytest.skip(reason)
    checked = "#lang racket\n(require rackunit)\n(check-equal? (+ 1 1) {})\n"
    assert grader.grade("rkt", checked.format(2)).passed
    failed = grader.grade("rkt", checked.format(3))
    assert (failed.outcome, failed.exit_code) == ("failed", 0) and "FAILURE" in failed.detail


# ------------------------------------------------------------------------------------------------------------- toolchains


class RecordingSandbox:
    """Runs nothing: a program passes unless it has the word "wrong", and every one is noted."""

    def __init__(self) -> None:
        self.ran: list[tuple[dict, list, tuple, dict]] = []
        self._lock = threading.Lock()

    def run(self, files, steps, visible=(), environment=None) -> Result:
        with self._lock:
            self.ran.append((dict(files), list(steps), tuple(visible), dict(environment)))
        (source,) = files.values()
        return Result("failed", 1, "") if "wrong" in source else Result("passed", 0, "")


def executable(path: Path, script: str = "exit 1") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def installed(monkeypatch) -> dict[str, str]:
    """The toolchains that are found, by name, instead of this machine's; empty at first."""
    found: dict[str, str] = {}
    names = {name for made in RECIPES.values() for name in made.executables}
    which = toolchains.shutil.which
    monkeypatch.setattr(toolchains.shutil, "which", lambda name: found.get(name) if name in names else which(name))
    return found


@languages
def test_a_missing_toolchain_is_not_graded(installed, tag):
    grader = Grader(RecordingSandbox())
    reason = grader.reason(tag)
    assert reason.startswith(f"{recipe(tag).name} is not installed")
    assert (recipe(tag).package is None) or reason.endswith(f"(Debian's package: {recipe(tag).package})")
    assert find_toolchain(tag) is None and list(grader.grade_all([(tag, "x")])) == [((tag, "x"), None)]
    with pytest.raises(EvaluationError, match=f"in {recipe(tag).name} cannot be graded: {recipe(tag).name} is not installed"):
        grader.grade(tag, "x")
    assert grader.sandbox.ran == []


def test_a_toolchain_that_does_not_work_is_not_graded(installed, tmp_path):
    tmp_path.chmod(0o755)
    installed["lua5.4"] = str(executable(tmp_path / "bin" / "lua5.4"))
    grader = Grader(find_sandbox())
    assert grader.reason("lua") == "Lua does not work in the sandbox"
    assert list(grader.grade_all([("lua", "os.exit(0)")])) == [(("lua", "os.exit(0)"), None)]


def test_a_missing_library_is_not_graded_and_only_where_it_is_imported(monkeypatch, grader):
    if (reason := grader.reason("lua")) is not None:
        pytest.skip(reason)
    library = Library("nowhere", "require('nowhere')", "require('nowhere')", "lua-nowhere")
    monkeypatch.setitem(RECIPES, "lua", replace(RECIPES["lua"], libraries=(library,)))
    fresh = Grader(grader.sandbox)
    assert fresh.reason("lua", "print(1)") is None
    assert fresh.reason("lua", "require('nowhere')") == "nowhere is not installed (Debian's package: lua-nowhere)"
    results = dict(fresh.grade_all([("lua", "os.exit(0)"), ("lua", "require('nowhere')")]))
    assert results["lua", "os.exit(0)"].passed and results["lua", "require('nowhere')"] is None


def test_an_unknown_language_is_named_with_the_known_ones():
    with pytest.raises(EvaluationError, match="no language 'cobol'; there are d, pl"):
        recipe("cobol")
    with pytest.raises(EvaluationError, match="cobol"):
        Grader(RecordingSandbox()).reason("cobol")


def test_the_first_executable_that_is_found_is_taken(installed, tmp_path):
    installed["lua"] = str(executable(tmp_path / "usr" / "bin" / "lua"))
    assert find_toolchain("lua").executable == installed["lua"]
    installed["lua5.3"] = str(executable(tmp_path / "usr" / "bin" / "lua5.3"))
    assert find_toolchain("lua").executable == installed["lua5.3"]


def test_a_toolchain_is_shown_whole_and_by_the_name_it_was_found_under(installed, tmp_path):
    real = executable(tmp_path / "opt" / "ruby-9" / "bin" / "ruby")
    link = tmp_path / "bin" / "ruby"
    link.parent.mkdir()
    link.symlink_to(real)
    installed["ruby"] = str(link)
    sandbox = RecordingSandbox()
    assert find_toolchain("rb").grade(sandbox, "exit 0").passed
    files, steps, visible, _ = sandbox.ran[0]
    assert visible == (str(tmp_path / "opt" / "ruby-9"), str(link)) and files == {"program.rb": "exit 0"}
    assert [step.command for step in steps] == [(str(link), "program.rb")]


def test_rustups_door_is_passed_through(installed, tmp_path):
    door = executable(tmp_path / "cargo" / "bin" / "rustc", f'[ "$1 $2" = "--print sysroot" ] && echo {tmp_path}/rust')
    installed["rustc"] = str(door)
    assert find_toolchain("rs").executable == str(door)
    inner = executable(tmp_path / "rust" / "bin" / "rustc")
    assert find_toolchain("rs").executable == str(inner) and str(tmp_path / "rust") in find_toolchain("rs").visible
    executable(door, "echo 'no default toolchain' >&2; exit 1")
    assert find_toolchain("rs").executable == str(door)


def test_compilers_and_programs_have_limits_of_their_own(installed, tmp_path):
    installed["rustc"] = str(executable(tmp_path / "bin" / "rustc"))
    run_limits, compile_limits = Limits(cpu_s=2), Limits(cpu_s=9)
    sandbox = RecordingSandbox()
    find_toolchain("rs", run_limits, compile_limits).grade(sandbox, "fn main() {}")
    (_, (compile_step, run_step), _, _) = sandbox.ran[0]
    assert (compile_step.limits, run_step.limits) == (compile_limits, run_limits)
    assert compile_step.command[0] == installed["rustc"] and run_step.command == ("./program",)


def test_equal_programs_are_graded_once(installed, tmp_path):
    installed["perl"] = str(executable(tmp_path / "bin" / "perl"))
    sandbox = RecordingSandbox()
    grader = Grader(sandbox)

    def programs() -> Iterator[tuple[str, str]]:
        yield from [("pl", "right"), ("pl", "wrong"), ("jl", "right"), ("pl", "right"), ("pl", "wrong"), ("jl", "right")]

    yielded = list(grader.grade_all(programs(), workers=3))
    assert len(yielded) == 3
    results = dict(yielded)
    assert results["pl", "right"].passed and not results["pl", "wrong"].passed and results["jl", "right"] is None
    sources = [source for files, *_ in sandbox.ran for source in files.values()]
    assert sorted(sources) == sorted([recipe("pl").trivial, "right", "wrong"])


def test_a_sandbox_that_breaks_down_is_an_error_and_no_grade(installed, tmp_path):
    installed["perl"] = str(executable(tmp_path / "bin" / "perl"))

    class Breaking(RecordingSandbox):
        def run(self, *arguments, **options) -> Result:
            if len(self.ran) == 2:
                raise EvaluationError("the sandbox cannot be started: no space left")
            return super().run(*arguments, **options)

    with pytest.raises(EvaluationError, match="no space left"):
        list(Grader(Breaking()).grade_all([("pl", str(number)) for number in range(20)], workers=1))


def test_as_many_programs_run_at_once_as_there_are_processors():
    assert 1 <= num_processors() <= os.cpu_count()
