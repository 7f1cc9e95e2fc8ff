"""The sandbox's first process: it makes the place, runs the steps one after another, watches them, and ends whatever is left.

`flora.evaluate.sandbox` runs this file by its path, so it imports the standard library alone. One line of JSON comes in on stdin;
the line "ready" and then one line of JSON go out on stdout. stdin stays open behind its line: its end means that whoever asked is
gone, and everything is ended.

It harms nothing but what it started. Before anything else it makes sure that it is in namespaces of its own where it should be, and
that programs do not run as the machine's root. What it signals are its own descendants, each proven to be one, wherever it runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time

LOOK_S = 0.05  # between two looks at memory and processes
TAIL_BYTES = 4096  # of each stream that is kept

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 36, 38
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_MOVE, MS_REC = 1, 2, 4, 8, 4096, 8192, 16384
AT_FDCWD, AT_RECURSIVE, MOUNT_SETATTR = -100, 0x8000, 442  # the system call has this number on every architecture
LAST_CAPABILITY, CAPABILITY_VERSION = 63, 0x20080522
DEVICES = ("null", "zero", "full", "random", "urandom")

_libc = ctypes.CDLL(None, use_errno=True)
_is_linux = sys.platform == "linux"


def main() -> None:
    request = json.loads(sys.stdin.buffer.readline())
    if (fault := why_not_apart(request["outside"], request["user"])) is not None:
        sys.exit(fault)
    if request["root"] is not None:
        make_root(**request["root"])
    if _is_linux:
        if os.readlink("/proc/self") != str(os.getpid()):
            sys.exit("/proc tells of another namespace's processes")
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a daemon leaves behind comes to this process
        _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # same user or not, nobody looks into this process
    os.chdir(request["work"])
    for name, text in request["files"].items():
        with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
    if request["user"] is not None:
        os.chown(".", request["user"], request["user"])
    print("ready", flush=True)
    supervisor = Supervisor(request)
    reports = []
    for step in request["steps"]:
        reports.append(supervisor.run(step))
        if reports[-1]["ended_by"] is not None or reports[-1]["status"] != 0:
            break
    print(json.dumps(reports), flush=True)
    os._exit(0)  # in a namespace of processes everything else ends with this one or its parent


def why_not_apart(outside: dict[str, str] | None, user: int | None) -> str | None:
    """Why programs must not run here, None where they may.

    outside: the namespaces that this process must not be in, by their names in /proc/self/ns; None where it shares the machine's.
    user: whom programs run as, None for the user of this process, who must not be the machine's root: limits do not bind it.
    """
    for name, link in (outside or {}).items():
        if os.readlink(f"/proc/self/ns/{name}") == link:
            return f"it has no {name} namespace of its own"
    if user == 0 or (user is None and os.geteuid() == 0 and "user" not in (outside or {})):
        return "root runs no generated programs"
    return None


# ----------------------------------------------------------------------------------------------------------------- root


def make_root(visible: list[str], work: str, size: int) -> None:
    """A new root of the paths in `visible`, all read-only, and an empty writable `work` of `size` bytes in memory."""
    opened = [(path, os.open(path, os.O_PATH)) for path in visible if not os.path.islink(path)]
    links = [(path, os.readlink(path)) for path in visible if os.path.islink(path)]
    devices = [(f"/dev/{name}", os.open(f"/dev/{name}", os.O_PATH)) for name in DEVICES]
    root = "/tmp"  # any folder that is on every machine: what it holds is covered
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for path, descriptor in opened + devices:
        place = root + path
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            os.makedirs(place, mode=0o755, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(place), mode=0o755, exist_ok=True)
            os.close(os.open(place, os.O_CREAT, 0o644))
        _mount(f"/proc/self/fd/{descriptor}", place, None, MS_BIND | MS_REC)
        os.close(descriptor)
    for path, target in links:
        os.makedirs(os.path.dirname(root + path), mode=0o755, exist_ok=True)
        os.symlink(target, root + path)
    for folder in ("/proc", "/home", work):
        os.makedirs(root + folder, mode=0o755, exist_ok=True)
    _mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    read_only = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID, 0, 0, 0)  # struct mount_attr, whose bits are these two's
    attributes = ctypes.byref(read_only)
    _check(_libc.syscall(MOUNT_SETATTR, AT_FDCWD, root.encode(), AT_RECURSIVE, attributes, ctypes.sizeof(read_only)), root)
    _mount("tmpfs", root + work, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=755,size={size}")
    os.chdir(root)
    _mount(".", "/", None, MS_MOVE)
    os.chroot(".")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    _check(_libc.mount(*words, ctypes.c_ulong(flags), data.encode() or None), target)


def _check(result: int, path: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


# ---------------------------------------------------------------------------------------------------------------- steps


class Supervisor:
    """Runs steps under their limits. Single-threaded: one `select` waits for output, ended processes, the clock and the asker."""

    def __init__(self, request: dict) -> None:
        self.user, self.environment, self.beside = request["user"], request["environment"], request["processes_beside"]
        self.child, self.ended = 0, None  # the step's first process, and its (status, cpu seconds) once it has ended
        self.wake, wake_end = os.pipe()
        for end in (self.wake, wake_end):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # with a handler, an ended child writes to the wake-up pipe
        signal.set_wakeup_fd(wake_end)

    def run(self, step: dict) -> dict:
        """{"ended_by": None or the limit that was met, "status": exit code or -signal, "cpu_s", "stdout", "stderr"}."""
        limits = step["limits"]
        self.ended = None
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        self.child = os.fork()
        if self.child == 0:
            self._become(step["command"], limits, out_end, err_end)
        for end in (out_end, err_end):
            os.close(end)
        for stream in (out, err):
            os.set_blocking(stream, False)
        tails, written, ended_by = {out: b"", err: b""}, 0, None
        open_streams, deadline, look = {out, err}, time.monotonic() + limits["wall_s"], 0.0
        while self.ended is None and ended_by is None:
            now = time.monotonic()
            if now >= deadline:
                ended_by = "timeout"
                break
            if now >= look:
                ended_by, look = self._over(limits), time.monotonic() + LOOK_S
            ready, _, _ = select.select([*open_streams, self.wake, 0], [], [], max(0.0, min(deadline, look) - now))
            if 0 in ready:  # the asker is gone
                self._end_all()
                os._exit(1)
            if self.wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.wake, 4096)
                self._reap()
            written += self._read(open_streams.intersection(ready), open_streams, tails)
            if written > limits["output_bytes"]:
                ended_by = "output"
        self._end_all()
        while ended_by is None and (count := self._read(list(open_streams), open_streams, tails)):  # written, not yet read
            written += count
            if written > limits["output_bytes"]:
                ended_by = "output"
        for stream in (out, err):
            os.close(stream)
        status, cpu_s = self.ended or (-signal.SIGKILL, 0.0)
        if ended_by is None and (cpu_s >= limits["cpu_s"] or status == -signal.SIGXCPU):
            ended_by = "timeout"
        texts = {name: tails[stream].decode("utf-8", "replace") for name, stream in (("stdout", out), ("stderr", err))}
        return {"ended_by": ended_by, "status": status, "cpu_s": cpu_s, **texts}

    def _become(self, command: list[str], limits: dict, out: int, err: int) -> None:
        """In the forked child: the limits, another user where there is one, nothing of this process left, then the command."""
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out, 1)
            os.dup2(err, 2)
            for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD):  # Python's own choices are not the program's
                signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            _limit(resource.RLIMIT_CORE, 0)
            _limit(resource.RLIMIT_CPU, limits["cpu_s"], limits["cpu_s"] + 1)
            _limit(resource.RLIMIT_FSIZE, limits["file_bytes"])
            _limit(resource.RLIMIT_NOFILE, 256)
            _limit(resource.RLIMIT_DATA, limits["memory_bytes"])
            if self.beside is not None:
                _limit(resource.RLIMIT_NPROC, limits["processes"] + self.beside)
            if _is_linux:
                for capability in range(LAST_CAPABILITY + 1):
                    _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
            if self.user is not None:
                os.setgroups([])
                os.setresgid(self.user, self.user, self.user)
                os.setresuid(self.user, self.user, self.user)
            if _is_linux:
                _libc.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())  # none, not even to hand on
                _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
                _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            os.execve(command[0], command, self.environment)
        except OSError as error:
            os.write(2, f"{os.path.basename(command[0])} cannot be started: {error.strerror}\n".encode())
        finally:
            os._exit(127)

    def _read(self, ready, open_streams: set[int], tails: dict[int, bytes]) -> int:
        """Read what each ready stream holds, keep its end, forget the streams that are closed. Returns the number of bytes."""
        total = 0
        for stream in ready:
            try:
                data = os.read(stream, 65536)
            except BlockingIOError:
                continue
            if not data:
                open_streams.discard(stream)
            total += len(data)
            tails[stream] = (tails[stream] + data)[-TAIL_BYTES:]
        return total

    def _reap(self) -> None:
        """Take the exit of every ended child, and note that of the step's first process."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.child:
                self.ended = (os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime)

    def _over(self, limits: dict) -> str | None:
        """The limit that all processes together are over, if any."""
        living, waiting = [], _children_of(os.getpid())
        while waiting:
            living += waiting
            waiting = [child for pid in waiting for child in _children_of(pid)]
        if len(living) > limits["processes"]:
            return "processes"
        return "memory" if sum(map(_memory_of, living)) > limits["memory_bytes"] else None

    def _end_all(self) -> None:
        """Kill every descendant, daemons too; give up after five seconds where something will not go.

        They are stopped before they are killed: what is stopped starts nothing and keeps its place under the limit of processes.
        Once a round finds only what the last one stopped, nothing is left that could start another.
        """
        until, number, last = time.monotonic() + 5.0, signal.SIGSTOP, set()
        while time.monotonic() < until:
            self._reap()
            if _is_linux:
                found = _signal_descendants(number)
            else:  # the children of children are not to be had: those of the program's own group must do
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.child, signal.SIGKILL)
                found = {self.child} if self.ended is None else set()
            if not found:
                return
            if found == last:
                number = signal.SIGKILL
            last = found
            if number == signal.SIGKILL:
                time.sleep(0.001)


def _signal_descendants(number: int) -> set[int]:
    """Send a signal to each descendant of this process, parents before their children, and return who they are.

    A pid may become another process's at any time, so none is trusted. A child of this process keeps its pid until this process
    waits for it. A deeper one is held by a file descriptor of the process itself and signalled through that, once it is seen to
    have a parent that is a descendant. Where it cannot be held it is left until it is a child of this one.
    """
    own = os.getpid()
    handles: dict[int, int | None] = {}
    waiting = [own]
    try:
        while waiting:
            parent = waiting.pop()
            for pid in _children_of(parent):
                if pid in handles:
                    continue
                handle = None
                with contextlib.suppress(OSError):  # ended, too many to hold, or a kernel before 5.3
                    handle = os.pidfd_open(pid)
                if parent != own and (handle is None or _parent_of(pid) != parent or not _is_there(handles[parent])):
                    if handle is not None:
                        os.close(handle)
                    continue
                with contextlib.suppress(OSError):
                    if parent == own:
                        os.kill(pid, number)
                    else:
                        signal.pidfd_send_signal(handle, number)
                handles[pid] = handle
                waiting.append(pid)
        return set(handles)
    finally:
        for handle in filter(None, handles.values()):
            os.close(handle)


def _is_there(handle: int | None) -> bool:
    """Whether a process has not been waited for, so that its pid is still its own; None: a child of this process."""
    if handle is None:
        return True
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(handle, 0)
        return True
    return False


def _parent_of(pid: int) -> int | None:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])
    return None


def _limit(which: int, soft: int, hard: int | None = None) -> None:
    """A limit that cannot be raised again; never above one that is there already."""
    _, highest = resource.getrlimit(which)
    hard = soft if hard is None else hard
    if highest != resource.RLIM_INFINITY:
        soft, hard = min(soft, highest), min(hard, highest)
    resource.setrlimit(which, (soft, hard))


def _memory_of(pid: int) -> int:
    """Bytes of a process that are its own or shared memory, not a file's; 0 once it has ended."""
    total = 0
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += 1024 * int(line.split()[1])
    return total


def _children_of(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                children += map(int, file.read().split())
    return children


if __name__ == "__main__":
    main()
