"""The sandbox against programs that try what they must not, in every mode that works on this machine."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from flora.errors import EvaluationError
from flora.evaluate import sandbox as sandboxes
from flora.evaluate import supervisor
from flora.evaluate.sandbox import MODES, Limits, Result, Sandbox, SandboxFinder, Step, without_paths

PYTHON = os.path.realpath(sys.executable)
IS_ROOT = os.geteuid() == 0
SHORT = Limits(wall_s=20.0, cpu_s=1, memory_bytes=256 << 20, output_bytes=1 << 20, file_bytes=8 << 20, processes=24)
FINDER = SandboxFinder()

modes = pytest.mark.parametrize("mode", MODES)
apart = pytest.mark.parametrize("mode", ("bubblewrap", "namespaces"))
linux = pytest.mark.skipif(sys.platform != "linux", reason="it is read from /proc")


def sandbox(mode: str) -> Sandbox:
    fault = FINDER.fault(mode)
    if fault is not None:
        pytest.skip(f"{mode} does not work here: {fault}")
    return Sandbox(mode)


def python(mode: str) -> str:
    """An interpreter that a program can start: its user may not enter the folder of this one."""
    path = PYTHON if mode != "unsafe" or not IS_ROOT else shutil.which("python3", path="/usr/local/bin:/usr/bin")
    return path or pytest.skip("there is no Python that another user may start")


def run(mode: str, source: str, *arguments: str, limits: Limits = SHORT, **options) -> Result:
    """Run a Python program."""
    step = Step((python(mode), "-I", "-S", "program.py", *arguments), limits)
    return sandbox(mode).run({"program.py": source}, [step], **options)


def marked_processes(mark: str) -> list[int]:
    """The machine's processes that have `mark` in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_until(condition, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.05)
    return False


@modes
@pytest.mark.parametrize(
    ("source", "outcome", "exit_code"),
    [
        ("pass", "passed", 0),
        ("import sys; sys.exit(3)", "failed", 3),
        ("assert 1 == 2", "failed", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "error", None),
        ("while True: pass", "timeout", None),
        ("bytearray(1 << 30)", "memory", 1),
        ("import sys\nwhile True: sys.stdout.write('x' * 4096)", "output", None),
        ("import sys\nfor _ in range(100_000): sys.stderr.write('x' * 999 + '\\n')", "output", None),
        ("open('large', 'wb').write(bytes(16 << 20))", "failed", 1),  # Python ignores the signal and sees an error
    ],
)
def test_outcomes(mode, source, outcome, exit_code):
    result = run(mode, source)
    assert (result.outcome, result.exit_code, result.passed) == (outcome, exit_code, outcome == "passed"), result.detail


@modes
def test_a_program_that_sleeps_runs_into_the_wall(mode):
    started = time.monotonic()
    result = run(mode, "import time; time.sleep(60)", limits=Limits(wall_s=0.6))
    assert result.outcome == "timeout" and time.monotonic() - started < 15


@modes
def test_memory_of_all_processes_counts(mode):
    source = "import os, time\nfor _ in range(3): os.fork()\nheld = bytearray(64 << 20)\ntime.sleep(20)"
    assert run(mode, source, limits=Limits(wall_s=20.0, memory_bytes=200 << 20)).outcome == "memory"


FORKER = """
import os, sys, time
for started in range(60):
    try:
        if os.fork() == 0:
            time.sleep(3)
            os._exit(0)
    except BlockingIOError:
        sys.exit(f"refused after {started}")
time.sleep(3)
"""
FORK_BOMB = "import os  # {mark}\nwhile True:\n    try: os.fork()\n    except BlockingIOError: pass"


@linux
@modes
def test_a_fork_bomb_is_ended_and_leaves_nothing(mode):
    few = Limits(wall_s=1.5, cpu_s=1, processes=24)
    bounded = run(mode, FORKER, limits=replace(few, wall_s=20.0))
    if mode == "unsafe" and not IS_ROOT:  # the user's own processes count too, so that the kernel is told a higher limit
        assert (bounded.outcome, bounded.detail) == ("error", "more than 24 processes")
        return
    # A few short of the limit where the supervisor is counted too. Only what the kernel binds is let loose.
    assert (bounded.outcome, bounded.detail.rpartition(" ")[0]) == ("failed", "refused after"), bounded
    assert 20 <= int(bounded.detail.split()[-1]) < 24
    mark = secrets.token_hex(8)
    step = Step((python(mode), "-I", "-S", "-c", FORK_BOMB.format(mark=mark)), few)
    started = time.monotonic()
    result = sandbox(mode).run({}, [step])
    assert result.outcome == "timeout" or result.detail == "more than 24 processes", result
    assert time.monotonic() - started < 15
    assert wait_until(lambda: not marked_processes(mark), 2.0)


@linux
@modes
def test_a_daemon_dies_with_the_program(mode):
    mark = f"61.{secrets.randbelow(10**9):09}"
    source = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 64)
        os.execv("/bin/sleep", ["sleep", sys.argv[1]])
    os._exit(0)
os.wait()
time.sleep(0.1)
"""
    assert run(mode, source, mark).passed
    assert wait_until(lambda: not marked_processes(mark), 2.0)


@linux
@modes
def test_everything_dies_with_who_asked(mode):
    made, mark = sandbox(mode), f"62.{secrets.randbelow(10**9):09}"
    asker = os.fork()
    if asker == 0:
        try:
            made.run({}, [Step(("/bin/sleep", mark), Limits(wall_s=60.0))])
        finally:
            os._exit(1)
    try:
        assert wait_until(lambda: marked_processes(mark))
    finally:
        os.kill(asker, signal.SIGKILL)
        os.waitpid(asker, 0)
    assert wait_until(lambda: not marked_processes(mark))


@linux
@apart
def test_a_program_that_kills_all_it_can_has_not_passed(mode):
    source = """
import os, signal, sys
if sum(name.isdigit() for name in os.listdir("/proc")) > 8:
    sys.exit("these are the machine's processes")
try:
    os.kill(-1, signal.SIGKILL)
except OSError:
    pass  # there is nobody whom it may kill
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run(mode, source).outcome == "error"


@linux
def test_a_program_that_kills_its_supervisor_has_not_passed():
    result = run("unsafe", "import os, signal; os.kill(os.getppid(), signal.SIGKILL)")
    if IS_ROOT:  # the program is another user
        assert result.outcome == "failed" and "PermissionError" in result.detail
    else:
        assert (result.outcome, result.detail) == ("error", "the program ended the sandbox it ran in")


@modes
def test_a_program_cannot_write_the_report(mode):
    source = """
import os
for pid in {os.getppid(), 1}:
    for descriptor in range(8):
        try:
            with open(f"/proc/{pid}/fd/{descriptor}", "w") as stream:
                stream.write('[{"ended_by": null, "status": 0, "cpu_s": 0, "stdout": "", "stderr": ""}]\\n')
        except OSError:
            continue
os._exit(7)
"""
    assert run(mode, source).exit_code == 7


@modes
def test_a_home_folder_cannot_be_written(mode):
    source = "import os; open(os.path.join(os.environ['HOME'], 'flora-was-here'), 'w')"
    assert run(mode, source).outcome == "failed"


REACHES_OUT = """
import os, socket, sys
folder, port, kind = sys.argv[1:]
if kind == "file":
    open(os.path.join(folder, "written"), "w").write("from inside")
elif kind == "network":
    socket.create_connection(("127.0.0.1", int(port)), timeout=2).close()
elif kind == "secret":
    assert "FLORA_SECRET" in os.environ or "FLORA_SECRET" in open(f"/proc/{os.getppid()}/environ").read()
elif kind == "listing":
    os.listdir(folder)
"""


@pytest.mark.parametrize("kind", ("file", "network", "listing"))
@modes
def test_nothing_of_the_machine_is_in_reach(mode, kind):
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        result = run(mode, REACHES_OUT, folder, str(server.getsockname()[1]), kind)
        server.settimeout(0.1)
        if mode == "unsafe":  # where it is in reach: the program does what it says
            assert result.passed, result.detail
            assert os.listdir(folder) == (["written"] if kind == "file" else [])
        else:
            assert result.outcome == "failed", result
            assert os.listdir(folder) == []
            with pytest.raises(TimeoutError):
                server.accept()


@modes
def test_the_environment_stays_outside(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_SECRET", "not to be told")
    result = run(mode, REACHES_OUT, str(tmp_path), "0", "secret")
    assert result.outcome == "failed" and "not to be told" not in result.detail
    told = run(mode, "import os; assert os.environ['COLOUR'] == 'blue'", environment={"COLOUR": "blue"})
    assert told.passed, told.detail


@apart
def test_only_the_work_folder_is_writable(mode):
    source = """
import os
written = []
for folder in ("/", "/usr", "/etc", "/dev", "/home", "/proc", "/proc/sys/kernel", os.environ["HOME"], os.path.dirname(os.__file__)):
    try:
        open(os.path.join(folder, "flora-was-here"), "x")
        written.append(folder)
    except OSError:
        pass
open("here", "w").write("x")
assert not written, written
assert os.listdir("/home") == []
assert sorted(os.listdir(".")) == ["here", "program.py"]
"""
    result = run(mode, source)
    assert result.passed, result.detail


@apart
def test_the_work_folder_is_bounded(mode):
    source = """
import errno
part = bytes(4 << 20)
try:
    for number in range(100):
        open(f"part{number}", "wb").write(part)
except OSError as error:
    raise SystemExit(0 if error.errno == errno.ENOSPC else 1)
raise SystemExit(2)
"""
    assert run(mode, source).passed


@linux
@modes
def test_no_privilege_is_left_or_gained(mode):
    source = """
import os
facts = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
assert all(int(facts[name], 16) == 0 for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")), facts
assert int(facts["NoNewPrivs"]) == 1
try:
    os.chroot("/")
except PermissionError:
    raise SystemExit(0)
raise SystemExit(2)
"""
    result = run(mode, source)
    assert result.passed, result.detail


@modes
def test_root_gives_each_program_a_user_of_its_own(mode):
    if not IS_ROOT:
        pytest.skip("only root has other users to give")
    made = sandbox(mode)
    step = Step((python(mode), "-I", "-S", "-c", "import os; print(os.getuid(), os.getgid(), os.getgroups())"))
    users = {made.run({}, [step]).detail for _ in range(3)}
    assert len(users) == 3
    for user in users:
        number, group, groups = user.split(" ")
        assert number == group and int(number) >= sandboxes.FIRST_USER and groups == "[]"


@modes
def test_steps_run_in_order_until_one_fails(mode):
    made = sandbox(mode)

    def step(source: str, limits: Limits = SHORT) -> Step:
        return Step((python(mode), "-I", "-S", "-c", source), limits)

    built = "open('built', 'w').write('#!/bin/sh\\nexit 0\\n'); import os; os.chmod('built', 0o755)"
    assert made.run({}, [step(built), Step(("./built",), SHORT)]).passed
    refused = made.run({}, [step("import sys; sys.exit('no such type')"), step("raise SystemExit(5)")])
    assert (refused.outcome, refused.exit_code, refused.detail) == ("error", 1, "no such type")
    slow = made.run({}, [step("import time; time.sleep(60)", Limits(wall_s=0.5)), step("pass")])
    assert slow.outcome == "timeout"
    left = "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(30); open('late', 'w')"
    assert made.run({}, [step(left), step("import os; assert not os.path.exists('late')")]).passed


@modes
def test_a_command_that_is_not_there_is_an_error_of_its_own(mode):
    result = sandbox(mode).run({}, [Step(("/usr/bin/no-such-tool",), SHORT)])
    assert result.outcome == "failed" and result.exit_code == 127
    assert result.detail == "no-such-tool cannot be started: No such file or directory"


@modes
def test_details_hold_no_path_of_the_machine(mode):
    source = "import os, sys; sys.exit(f'{os.getcwd()}/program.py is wrong, so is {sys.prefix} and ' + os.getcwd())"
    detail = run(mode, source).detail
    assert detail.startswith("program.py is wrong")
    for path in (sandboxes.WORK, "/tmp/", "flora-", str(Path.home()) + "/"):
        assert path not in detail
    if not sys.base_prefix.startswith(tuple(sandboxes.SYSTEM)):
        assert sys.base_prefix not in detail


def test_paths_are_taken_out_of_a_text():
    text = "/srv/x1/program.rs:3: see /opt/rust/lib/core.rs and /usr/lib/libc.so in /srv/x1"
    shown = "program.rs:3: see …/lib/core.rs and /usr/lib/libc.so in ."
    assert without_paths(text, "/srv/x1", ["/usr", "/opt/rust"]) == shown


@modes
def test_the_end_of_a_long_message_is_kept(mode):
    source = "import sys\nfor number in range(2000): print('line', number, 'ünïcödé', file=sys.stderr)\nsys.exit(1)"
    detail = run(mode, source).detail
    assert detail.endswith("line 1999 ünïcödé") and len(detail.encode()) <= 4096 + 2


@modes
def test_source_is_a_file_and_never_a_command(mode):
    source = "$(touch owned); `touch owned`; \"'\n\0é\ud800"
    check = "import os, sys; assert open('a.txt', 'rb').read() == bytes.fromhex(sys.argv[1]) and len(os.listdir('.')) == 1"
    step = Step((python(mode), "-I", "-S", "-c", check, source.encode("utf-8", "surrogatepass").hex()), SHORT)
    result = sandbox(mode).run({"a.txt": source}, [step])
    assert result.passed, result.detail


def test_unsafe_leaves_no_folder_behind(monkeypatch):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setattr(sandboxes.tempfile, "tempdir", folder)
        source = "import os; os.makedirs('a/b/c'); open('a/b/c/d', 'w'); os.chmod('a/b', 0); os.chmod('a', 0)"
        result = run("unsafe", source)
        assert result.passed, result.detail
        assert os.listdir(folder) == []


def test_many_at_once_do_not_meet():
    made = FINDER.find(unsafe=True)
    source = """
import os, sys, time
open(sys.argv[1], "w")
time.sleep(0.05)
assert len(os.listdir(".")) == 2
sys.exit(int(sys.argv[1]))
"""

    def exit_code(number: int) -> int | None:
        step = Step((python(made.mode), "-I", "-S", "program.py", str(number)), Limits(wall_s=20.0))
        return made.run({"program.py": source}, [step]).exit_code

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(exit_code, range(12))) == list(range(12))


@pytest.mark.parametrize("name", ("", ".", "..", "a/b", "/etc/passwd", "a b", "-x", "a\0"))
def test_file_names_are_plain(name):
    with pytest.raises(EvaluationError, match="plain name"):
        Sandbox("unsafe").run({name: ""}, [Step((PYTHON, "-c", "pass"))])


@pytest.mark.parametrize("field", ("wall_s", "cpu_s", "memory_bytes", "output_bytes", "file_bytes", "processes"))
def test_limits_are_above_nothing(field):
    for value in (0, -1, float("nan")):
        with pytest.raises(EvaluationError, match=field):
            Limits(**{field: value})
    if field != "wall_s":
        with pytest.raises(EvaluationError, match=field):
            Limits(**{field: 1.5})


def test_an_unknown_mode_is_named():
    with pytest.raises(EvaluationError, match="'chroot'"):
        Sandbox("chroot")


def test_without_a_way_to_keep_programs_apart_it_refuses(monkeypatch):
    monkeypatch.setattr(sandboxes.shutil, "which", lambda *_, **__: None)
    finder = SandboxFinder()
    with pytest.raises(EvaluationError) as error:
        finder.find()
    assert "bwrap is not installed" in str(error.value) and "--unsafe" in str(error.value)
    assert finder.find(unsafe=True).mode == "unsafe"


def fake_tool(folder: Path, script: str) -> str:
    """A program in the place of bubblewrap, whose command line it gets."""
    path = folder / "bwrap"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@linux
def test_a_mode_whose_tool_fails_does_not_work_here(tmp_path, monkeypatch):
    path = fake_tool(tmp_path, "echo 'bwrap: No permissions to create new namespace' >&2\nexit 1")
    monkeypatch.setattr(sandboxes.shutil, "which", lambda *_, **__: path)
    fault = SandboxFinder().fault("bubblewrap")
    assert fault == "the sandbox cannot be started: bwrap: No permissions to create new namespace"


@linux
def test_a_tool_that_makes_no_namespaces_does_not_work_here(tmp_path, monkeypatch):
    path = fake_tool(tmp_path, 'while [ "$1" != "--" ]; do shift; done\nshift\nexec "$@"')
    monkeypatch.setattr(sandboxes.shutil, "which", lambda *_, **__: path)
    monkeypatch.setattr(sandboxes, "WORK", str(tmp_path))
    assert SandboxFinder().fault("bubblewrap") == "the sandbox cannot be started: it has no pid namespace of its own"
    assert not (tmp_path / "probe.py").exists()


@linux
def test_a_tool_that_hides_no_files_does_not_work_here(tmp_path, monkeypatch):
    FINDER.fault("namespaces") and pytest.skip("unshare does not work here")
    spaces = "--mount --pid --fork --kill-child --net --ipc --uts --mount-proc" + ("" if IS_ROOT else " --user --map-root-user")
    unshare, open_to_all = shutil.which("unshare"), python("unsafe")
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o777)
        path = fake_tool(tmp_path, f'while [ "$1" != "--" ]; do shift; done\nshift\nexec {unshare} {spaces} -- "$@"')
        monkeypatch.setattr(sandboxes.shutil, "which", lambda *_, **__: path)
        monkeypatch.setattr(sandboxes, "WORK", work)
        monkeypatch.setattr(sandboxes, "HOME", home)
        monkeypatch.setattr(sandboxes.sys, "executable", open_to_all)  # what it finds open is to be the only reason
        assert SandboxFinder().fault("bubblewrap") == "a file could be written outside"
        assert os.listdir(home) == []


def test_the_strongest_mode_is_chosen(monkeypatch):
    faults = {"bubblewrap": "broken", "namespaces": None}
    finder = SandboxFinder()
    monkeypatch.setattr(finder, "fault", faults.get)
    assert finder.find().mode == "namespaces"
    faults["bubblewrap"] = None
    assert finder.find(unsafe=True).mode == "bubblewrap"


def test_where_limits_cannot_be_set_unsafe_refuses_too(monkeypatch):
    finder = SandboxFinder()
    monkeypatch.setattr(finder, "fault", {mode: f"{mode} is broken" for mode in MODES}.get)
    with pytest.raises(EvaluationError, match="bubblewrap is broken; namespaces: namespaces is broken"):
        finder.find()
    with pytest.raises(EvaluationError, match="not even with limits alone: unsafe is broken"):
        finder.find(unsafe=True)


def test_the_report_of_the_supervisor_is_all_that_is_believed(monkeypatch):
    answers = iter((None, [{"ended_by": "processes", "status": -9, "cpu_s": 0.0, "stdout": "", "stderr": ""}]))
    monkeypatch.setattr(sandboxes, "_ask", lambda *_: json.loads(json.dumps(next(answers))))
    step = Step((PYTHON,), Limits(processes=3))
    assert Sandbox("unsafe").run({}, [step]) == Result("error", None, "the program ended the sandbox it ran in")
    assert Sandbox("unsafe").run({}, [step]).detail == "more than 3 processes"


# ----------------------------------------------------------------------------------------------------------- supervisor


def namespaces(*names: str) -> dict[str, str]:
    return {name: os.readlink(f"/proc/self/ns/{name}") for name in names}


@linux
@pytest.mark.parametrize("name", ("pid", "net", "mnt", "ipc", "uts", "user"))
def test_the_supervisor_runs_nothing_in_the_machines_namespaces(name, monkeypatch):
    # Every door out of `main` is shut, so that nothing happens if it goes on.
    outside = {"pid": "another", "net": "another", "mnt": "another", "ipc": "another", "uts": "another"} | namespaces(name)
    asked = {"outside": outside, "user": 61184, "root": {}, "files": {}, "steps": [], "work": "/nowhere", "environment": {}}
    done = []
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(asked).encode() + b"\n")))
    for place, function in ((supervisor, "make_root"), (supervisor, "Supervisor"), (os, "chdir"), (os, "chown"), (os, "_exit")):
        monkeypatch.setattr(place, function, lambda *_, function=function, **__: done.append(function))
    monkeypatch.setattr(supervisor, "_is_linux", False)
    with pytest.raises(SystemExit, match=f"it has no {name} namespace of its own"):
        supervisor.main()
    assert done == []


@pytest.mark.parametrize(("outside", "user"), [(None, None), ({"pid": "another"}, None), (None, 0), ({"user": "another"}, 0)])
def test_the_supervisor_runs_no_program_as_root(outside, user, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "readlink", lambda path: "this one")
    assert supervisor.why_not_apart(outside, user) == "root runs no generated programs"


def test_the_supervisor_runs_what_is_kept_apart(monkeypatch):
    monkeypatch.setattr(os, "readlink", lambda path: "this one")
    assert supervisor.why_not_apart({"pid": "another", "user": "another"}, None) is None
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert supervisor.why_not_apart({"pid": "another", "user": "another"}, None) is None  # root of its own namespace of users
    assert supervisor.why_not_apart({"pid": "another"}, 61184) is None
    assert supervisor.why_not_apart(None, 61184) is None


@pytest.fixture
def recorded(monkeypatch) -> list[tuple[int, int]]:
    """(pid, signal) of every signal that would have been sent; none is."""
    sent, pidfds = [], {}
    look, opened = signal.pidfd_send_signal, os.pidfd_open

    def pidfd_open(pid: int) -> int:
        handle = opened(pid)
        pidfds[handle] = pid
        return handle

    def pidfd_send_signal(handle: int, number: int) -> None:
        look(handle, 0) if number == 0 else sent.append((pidfds[handle], number))

    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(os, "killpg", lambda pid, number: sent.append((-pid, number)))
    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    monkeypatch.setattr(signal, "pidfd_send_signal", pidfd_send_signal)
    return sent


def descendants(pid: int) -> set[int]:
    children = {int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()}
    return children.union(*map(descendants, children))


@contextlib.contextmanager
def family():
    """A child with two children of its own, which end with it or after a few seconds."""
    with subprocess.Popen(["/bin/sh", "-c", "sleep 9 & sleep 9 & read line; kill %1 %2"], stdin=subprocess.PIPE) as child:
        assert wait_until(lambda: len(descendants(child.pid)) == 2)
        yield child
        child.communicate(b"\n")


@linux
def test_the_supervisor_signals_its_descendants_and_nobody_else(recorded):
    with family() as child:
        own = descendants(os.getpid())
        assert {child.pid, *descendants(child.pid)} <= own
        assert supervisor._signal_descendants(signal.SIGSTOP) == own
    assert sorted(recorded) == [(pid, signal.SIGSTOP) for pid in sorted(own)]
    assert not own & {0, 1, os.getpid(), os.getppid()}


@linux
def test_the_supervisor_signals_nobody_whose_pid_has_passed_on(recorded, monkeypatch):
    # The list of the child's children is late: its numbers are other processes' by now.
    with family() as child, subprocess.Popen(["/bin/sh", "-c", "read line"], stdin=subprocess.PIPE) as other:
        late = {os.getpid(): [child.pid], child.pid: [os.getppid(), other.pid, 1]}
        monkeypatch.setattr(supervisor, "_children_of", lambda pid: late.get(pid, []))
        assert supervisor._signal_descendants(signal.SIGKILL) == {child.pid}
        other.communicate(b"\n")
    assert recorded == [(child.pid, signal.SIGKILL)]


@linux
def test_without_file_descriptors_of_processes_children_are_signalled_alone(recorded, monkeypatch):
    def refuse(pid: int) -> int:
        raise OSError

    monkeypatch.setattr(os, "pidfd_open", refuse)
    with family() as child:
        assert child.pid in supervisor._signal_descendants(signal.SIGKILL)
        assert not {pid for pid, _ in recorded} & descendants(child.pid)
