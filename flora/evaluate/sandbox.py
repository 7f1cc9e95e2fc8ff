"""Where generated programs run: without network, home or privileges, under limits, and gone without a trace when they are done.

    sandbox = find_sandbox()
    result = sandbox.run({"program.lua": source}, [Step(("/usr/bin/lua", "program.lua"))])
    result.outcome        # "passed", "failed", "error", "timeout", "memory" or "output"

What each mode guarantees, from the strongest down:

- `bubblewrap` and `namespaces` (unshare): own namespaces of processes, mounts, network, IPC and host name. The program sees the
  system's programs and libraries, read-only, and one writable folder that is in memory, bounded, and gone with it; no home, no
  other file of the machine, and no network, not even the machine's own. It has no capabilities and cannot gain any. Run by root, it
  has a user of its own. When it is done, or whoever asked is, every process is killed by the kernel, daemons included.
- `unsafe`: the limits alone, in a temporary folder: the program can read and write what its user can, and reach the network. Run by
  root, it has a user of its own; else it is the user who asks. When it is done, its descendants are stopped and killed. Only for
  programs that are trusted.

In every mode a program is killed over its limits of wall and CPU time, memory, output, file size and processes. The kernel counts
its processes, so that one which starts more and more soon cannot; that does not bind root, and nothing runs as the machine's root.
A supervisor that finds itself outside of the namespaces it should be in runs nothing, and it signals its own descendants alone.
Nothing of a program passes through a shell: commands are lists of words, programs are files.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flora.errors import EvaluationError

MODES = ("bubblewrap", "namespaces", "unsafe")
OUTCOMES = ("passed", "failed", "error", "timeout", "memory", "output")

WORK = "/sandbox"  # the writable folder inside, which is also where tools put their temporary files
WORK_BYTES = 192 << 20
HOME = "/home"  # inside: there, empty, read-only
SUPERVISOR = Path(__file__).with_name("supervisor.py")
START_S = 20.0  # for the sandbox itself, on top of its steps' wall time
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
SYSTEM += tuple(f"/etc/{name}" for name in ("alternatives", "ld.so.cache", "localtime"))
SYSTEM += tuple(f"/etc/{name}" for name in ("R", "racket", "perl", "ldc2.conf", "dmd.conf"))
"""What a program sees of the machine, where it is there. Of /etc only what the toolchains read."""

FIRST_USER, NUM_USERS = 61184, 4335
"""User ids for programs that root runs: those that systemd sets aside for services of a moment, so nobody's files are theirs."""

USERS_OTHER_WORK = 256
"""Processes that a user may start meanwhile, where the kernel counts them and a program's together."""

OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|cannot allocate (memory|vector)|failed to allocate memory|memory allocation (of|failed)"
    r"|OutOfMemory|MemoryError|NoMemoryError|bad_alloc",
    re.IGNORECASE,
)
"""How the toolchains say that an allocation was refused."""


@dataclass(frozen=True)
class Limits:
    """What one step may use. memory_bytes: of each process's own memory, and of all together. output_bytes: stdout plus stderr."""

    wall_s: float = 15.0
    cpu_s: int = 5
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20
    file_bytes: int = 32 << 20
    processes: int = 32

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0 or (name != "wall_s" and not isinstance(value, int)):
                raise EvaluationError(f"the limit {name} must be a number above 0, not {value!r}")


@dataclass(frozen=True)
class Step:
    """A command: a program by its absolute path or `./name`, then its arguments."""

    command: tuple[str, ...]
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Result:
    """How a program ended.

    outcome: "passed" (exit code 0), "failed" (another one), "error" (a step before the last failed, such as the compiler, or a
    signal or the limit of processes ended it), "timeout", "memory" or "output". exit_code: of the step that ended it, None where
    it was killed. detail: the end of what it wrote to stderr, or else to stdout, without the sandbox's own paths. noisy: whether
    it wrote to stderr.
    """

    outcome: str
    exit_code: int | None
    detail: str
    noisy: bool = False

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


class Sandbox:
    """Runs programs in one of `MODES`. Safe to use from several threads at once."""

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise EvaluationError(f"a sandbox is one of {', '.join(MODES)}, not {mode!r}")
        self.mode = mode
        self._numbers = itertools.count(os.getpid() * 61)

    def run(
        self,
        files: Mapping[str, str],
        steps: Sequence[Step],
        visible: Sequence[str | Path] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Result:
        """Write `files` (name → text) into an empty folder and run the steps there, one after another while they exit with 0.

        visible: files or folders that the program may read, besides the system's. environment: variables besides PATH, HOME, TMPDIR
        and the locale. EvaluationError where the sandbox itself cannot be started.
        """
        for name in files:
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.]*", name):
                raise EvaluationError(f"a file in the sandbox has a plain name, not {name!r}")
        if self.mode != "unsafe":
            return self._run(WORK, files, steps, visible, environment)
        with tempfile.TemporaryDirectory(prefix="flora-") as work:
            try:
                return self._run(os.path.realpath(work), files, steps, visible, environment)
            finally:
                _make_removable(work)

    def _run(self, work, files, steps, visible, environment) -> Result:
        paths = _visible_paths([sys.base_prefix, sys.base_exec_prefix, str(SUPERVISOR), *map(str, visible)])
        is_root = os.geteuid() == 0
        user = FIRST_USER + next(self._numbers) % NUM_USERS if is_root else None
        command = [os.path.realpath(sys.executable), "-I", "-S", str(SUPERVISOR)]
        home = HOME if self.mode != "unsafe" else "/nonexistent"
        base = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": home, "TMPDIR": work, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
        request = {
            "work": work,
            "root": {"visible": paths, "work": WORK, "size": WORK_BYTES} if self.mode == "namespaces" else None,
            "files": dict(files),
            "steps": [asdict(step) for step in steps],
            "user": user,
            "environment": {**base, **(environment or {})},
            "outside": _namespaces(is_root) if self.mode != "unsafe" else None,
            # The kernel counts a user's processes on the whole machine, or since Linux 5.14 in each namespace of users.
            "processes_beside": 0 if is_root or (self.mode != "unsafe" and _kernel() >= (5, 14)) else _processes_of_user(),
        }
        if self.mode == "bubblewrap":
            command = [*_bubblewrap(paths, is_root), *command]
        elif self.mode == "namespaces":
            command = [*_unshare(is_root), *command]
        reports = _ask(command, request, sum(step.limits.wall_s for step in steps) + START_S)
        return _result(reports, steps, work, paths)


def _bubblewrap(paths: Sequence[str], is_root: bool) -> list[str]:
    """bubblewrap's command line, up to the program."""
    spaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command = [_tool("bubblewrap"), *spaces, "--die-with-parent", "--new-session"]
    if is_root:  # the supervisor gives the program another user, and watches it
        command += ["--cap-drop", "ALL"]
        command += [word for name in ("SETUID", "SETGID", "KILL", "CHOWN") for word in ("--cap-add", f"CAP_{name}")]
    else:
        command += ["--unshare-user"]
    made = set()
    for path in paths:
        for parent in reversed(Path(path).parents[:-1]):
            if parent not in made:
                made.add(parent)
                command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--perms", "0755", "--dir", HOME]
    return [*command, "--size", str(WORK_BYTES), "--perms", "0755", "--tmpfs", WORK, "--remount-ro", "/", "--chdir", WORK, "--"]


def _unshare(is_root: bool) -> list[str]:
    """unshare's command line, up to the program; the supervisor makes the root."""
    spaces = ["--mount", "--pid", "--fork", "--kill-child", "--net", "--ipc", "--uts"]
    return [_tool("namespaces"), *spaces, *([] if is_root else ["--user", "--map-root-user"]), "--"]


def _tool(mode: str) -> str:
    """The program that makes a mode's namespaces, by its path; EvaluationError where it is not installed."""
    name = {"bubblewrap": "bwrap", "namespaces": "unshare"}[mode]
    path = shutil.which(name)
    if path is None or sys.platform != "linux":
        raise EvaluationError(f"{name} is not installed")
    return path


def _visible_paths(more: Sequence[str]) -> list[str]:
    """The system's paths that are here and `more`, without those that lie in another one."""
    found: list[str] = []
    for path in [*SYSTEM, *more]:
        if os.path.lexists(path) and not any(path == other or path.startswith(f"{other}/") for other in found):
            found.append(path)
    return found


def _namespaces(is_root: bool) -> dict[str, str]:
    """This process's namespaces, by their names in /proc/self/ns, of those that a program must not share."""
    names = ("pid", "net", "mnt", "ipc", "uts") + (() if is_root else ("user",))
    return {name: os.readlink(f"/proc/self/ns/{name}") for name in names}


def _processes_of_user() -> int | None:
    """How many processes and threads the user may come to have without the program; None where that is not known."""
    if sys.platform != "linux":
        return None
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            facts = dict(line.split(":", 1) for line in (folder / "status").read_text(errors="replace").splitlines())
            total += int(facts["Threads"]) if int(facts["Uid"].split()[0]) == os.getuid() else 0
    return total + USERS_OTHER_WORK


def _kernel() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


def _ask(command: Sequence[str], request: dict, deadline_s: float) -> list[dict] | None:
    """Start the supervisor, hand it the request, and wait for its reports; None where it was ended before it gave them."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, cwd="/", start_new_session=True
    )
    timer = threading.Timer(deadline_s, _kill, [process])
    timer.daemon = True
    timer.start()
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        answer = process.stdout.read()  # stdin stays open: its end would tell the supervisor that nobody waits
        message = process.stderr.read()
    finally:
        timer.cancel()
        timer.join()  # it must not kill once the process's number is free for another
        _kill(process)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    ready, _, reports = answer.partition(b"\n")
    if ready != b"ready":
        lines = message.decode("utf-8", "replace").strip().splitlines() or ["it gave no reason"]
        raise EvaluationError(f"the sandbox cannot be started: {lines[-1]}")
    return json.loads(reports) if reports.endswith(b"\n") else None


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _result(reports: list[dict] | None, steps: Sequence[Step], work: str, paths: Sequence[str]) -> Result:
    if reports is None:
        return Result("error", None, "the program ended the sandbox it ran in")
    report = reports[-1]
    limits, status = steps[len(reports) - 1].limits, report["status"]
    noisy, detail = bool(report["stderr"]), without_paths(report["stderr"].strip() or report["stdout"].strip(), work, paths)
    exit_code = status if status >= 0 and report["ended_by"] is None else None
    if report["ended_by"] == "timeout":
        return Result("timeout", exit_code, f"longer than {limits.cpu_s} s of computing or {limits.wall_s:g} s in all", noisy)
    if report["ended_by"] == "memory":
        return Result("memory", None, f"more than {limits.memory_bytes >> 20} MB of memory", noisy)
    if report["ended_by"] == "output" or status == -signal.SIGXFSZ:
        return Result("output", None, "more output than is allowed", noisy)
    if report["ended_by"] == "processes":
        return Result("error", None, f"more than {limits.processes} processes", noisy)
    if status == 0:
        return Result("passed", 0, detail, noisy)
    if OUT_OF_MEMORY.search(report["stderr"]):
        return Result("memory", exit_code, detail, noisy)
    if len(reports) < len(steps):
        return Result("error", exit_code, detail, noisy)
    if status < 0:
        return Result("error", None, detail or f"ended by {signal.Signals(-status).name}", noisy)
    return Result("failed", exit_code, detail, noisy)


def without_paths(text: str, work: str, paths: Sequence[str] = ()) -> str:
    """The text with files in the work folder by their names, and no path of the machine that is not every machine's."""
    text = text.replace(f"{work}/", "").replace(work, ".")
    for path in sorted({*paths, str(Path.home()), str(SUPERVISOR.parent)} - set(SYSTEM) - {"/"}, key=len, reverse=True):
        text = text.replace(path, "…")
    return text


def _make_removable(folder: str) -> None:
    """Give back what a program may have taken: folders that nobody may enter cannot be deleted."""
    for parent, folders, _ in os.walk(folder):
        for name in folders:
            with contextlib.suppress(OSError):
                os.chmod(os.path.join(parent, name), 0o700, follow_symlinks=False)


# -------------------------------------------------------------------------------------------------------------- choosing

PROBE = """
import os, socket, sys
open("probe", "w").write("here is writable")
for folder in [os.environ["HOME"], sys.argv[1], "/", "/usr", "/dev"]:
    try:
        open(os.path.join(folder, "flora-probe"), "x")
    except OSError:
        continue
    os.remove(os.path.join(folder, "flora-probe"))
    sys.exit("a file could be written outside")
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[2])), timeout=1)
except OSError:
    sys.exit(0)
sys.exit("the network could be reached")
"""


class SandboxFinder:
    """Which modes work here, each tried once by a program that attempts what it must not."""

    def __init__(self) -> None:
        self._faults: dict[str, str | None] = {}
        self._lock = threading.Lock()

    def fault(self, mode: str) -> str | None:
        """Why a mode does not work here, in a few words; None where it does."""
        with self._lock:
            if mode not in self._faults:
                self._faults[mode] = self._try(mode)
            return self._faults[mode]

    def _try(self, mode: str) -> str | None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            words = (str(Path.home()), str(server.getsockname()[1]))
            step = Step((os.path.realpath(sys.executable), "-I", "-S", "probe.py", *words))
            if mode == "unsafe":  # which holds nothing back
                step = Step(("/bin/sh", "-c", "exit 0"))
            try:
                result = Sandbox(mode).run({"probe.py": PROBE}, [step])
            except (EvaluationError, OSError) as error:
                return without_paths(str(error), WORK)
        return None if result.passed else result.detail or result.outcome

    def find(self, unsafe: bool = False) -> Sandbox:
        """The strongest sandbox that works here. EvaluationError where none does, unless `unsafe` allows limits alone."""
        for mode in MODES if unsafe else MODES[:-1]:
            if self.fault(mode) is None:
                return Sandbox(mode)
        if unsafe:
            raise EvaluationError(f"generated programs cannot be run here, not even with limits alone: {self.fault('unsafe')}")
        raise EvaluationError(
            f"generated programs cannot be kept apart here (bubblewrap: {self.fault('bubblewrap')}; namespaces: "
            f"{self.fault('namespaces')}): install bubblewrap, or run them with limits alone with --unsafe"
        )


find_sandbox = SandboxFinder().find
