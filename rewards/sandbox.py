"""Runs model-written Python in isolation, a few milliseconds a run.

What the caller keeps to itself: the expected outputs, the verdict and the deadline. What a run gets: the program and
one input. Levels, weakest first:

    subprocess   own session, resource limits, scrubbed environment, a temporary folder, a system-call filter without
                 sockets, signals and new processes. It stops accidents. It can read and write what the caller can.
    namespaces   a user, pid, mount, network, IPC and host-name namespace of its own: no other processes, no network, a
                 private read-only root with only the system libraries and the Python it runs, private /tmp and /proc, a
                 user id nobody has, no capabilities and none to be gained, a system-call filter, resource limits; and a
                 memory cgroup where this machine lets us make one.

A `Sandbox` proves its level when it is made, by looking from inside, and never takes a weaker one than was asked for.

    Sandbox ──job, descriptors──> zygote (sandbox_zygote.py) ──forks──> one isolated process tree a run
            <──how it ended──────

Output goes to memory files that the kernel caps, so there are no pipes to keep drained and no path to be found.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import queue
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

from pydantic import JsonValue

from memento.errors import UserError
from memento.rewards.memory_cgroup import MemoryCgroup
from memento.rewards.syscall_filter import ARCHITECTURES, compile_filter

logger = logging.getLogger(__name__)

T = TypeVar("T")

ZYGOTE = Path(__file__).with_name("sandbox_zygote.py")

STARTUP_S = 60.0
"""How long a zygote may take to start on a busy machine. Not counted against a program."""

GRACE_S = 30.0
"""How long after the deadline the zygote may take to say that everything is dead, before it is killed itself."""

STDERR_BYTES = 1 << 16

VERDICT_BYTES = 1 << 16
"""Of an assert program's report."""

CGROUP_EXTRA_MIB = 64
"""Memory of the zygote, its supervisor and page tables, beside what a run may use."""


class Isolation(StrEnum):
    """How far a program is kept away from this machine."""

    SUBPROCESS = "subprocess"
    NAMESPACES = "namespaces"


class Limits(NamedTuple):
    """What one run of a program may use.

    `wall_s` is kept by the zygote and once more by the caller, the rest by the kernel. Memory is address space of each
    process, and, with a memory cgroup, what all of them and /tmp hold together.
    """

    wall_s: float
    memory_mib: int = 512
    output_bytes: int = 1 << 20
    file_mib: int = 16
    scratch_mib: int = 64
    processes: int = 64
    open_files: int = 128


class Run(NamedTuple):
    """How one run of a program ended, as seen from outside.

    Attributes:
        stdout, stderr: what it wrote, up to the caps.
        ended: "exit", "signal", "wall" (the deadline), "output" (the cap), "memory" (of its cgroup) or "stopped" (the
            asserts were done first).
        code: exit code or signal number, 0 otherwise. It can fail a test, never pass one.
        value: for a call, what the function returned; `returned` says whether it did.
    """

    stdout: bytes
    stderr: bytes
    ended: Literal["exit", "signal", "wall", "output", "memory", "stopped"]
    code: int
    seconds: float
    returned: bool = False
    value: JsonValue = None

    @property
    def clean(self) -> bool:
        """Whether it ran to its end without an error."""
        return self.ended == "exit" and self.code == 0

    @property
    def too_slow(self) -> bool:
        """Whether time was what it ran out of."""
        return self.ended == "wall" or (self.ended == "signal" and self.code == signal.SIGXCPU)

    def complaint(self) -> str:
        """One line for people on why it did not run to its end."""
        if self.ended == "wall":
            return f"still running after {self.seconds:.1f} s"
        if self.ended == "output":
            return "printed more than the cap"
        if self.ended == "memory":
            return "killed because it used more memory than it may"
        words = self.stderr.decode("utf-8", "replace").strip().splitlines()
        last = f": {words[-1][:300]}" if words else ""
        if self.ended == "signal":
            return f"killed by {_signal_name(self.code)}{last}"
        return f"exit code {self.code}{last}"


class AssertRun(NamedTuple):
    """How an assert program went, and the solution it asked.

    Attributes:
        passed: all asserts held, and the solution was asked at least once.
        broken: why the asserts themselves are at fault, or empty.
        reason: the first assert that failed: line and exception.
    """

    passed: bool
    broken: str
    reason: str
    solution: Run


class SandboxError(Exception):
    """The sandbox itself failed: no verdict on the program."""


class Sandbox:
    """Runs programs at one level of isolation, up to `slots` at a time. Thread-safe; a caller waits for a free slot.

    Args:
        level: what is asked for; nothing weaker is taken.
        slots: runs at once. Each slot is a zygote, and a second one for asserts when they are first needed.
        python: the interpreter that runs the programs, with the packages it has; its files must be readable by
            everybody. Default: the one this virtual environment is made from.
        preload: modules that the zygote imports once, so that programs need not (e.g. numpy).

    Raises:
        UserError: the level, the interpreter or a preloaded module is not to be had, with the reason and the way out.
    """

    def __init__(
        self,
        level: Literal["namespaces", "subprocess"] = "namespaces",
        *,
        slots: int = 1,
        python: Path | str | None = None,
        preload: Sequence[str] = (),
    ) -> None:
        self.level = Isolation(level)
        interpreter = _interpreter(python)
        self._slots = [_Slot(self.level, interpreter, tuple(preload)) for _ in range(slots)]
        self._idle: queue.LifoQueue[_Slot] = queue.LifoQueue()
        for slot in self._slots:
            self._idle.put(slot)
        self._end = weakref.finalize(self, _close_all, self._slots)  # also at exit, for one that nobody closed
        self._closed = False
        try:
            self._prove()
        except SandboxError as error:
            self.close()
            raise UserError(_refusal(self.level, interpreter, str(error))) from error
        except BaseException:
            self.close()
            raise
        logger.info("code sandbox: isolation level %s", self.description)

    @property
    def description(self) -> str:
        """The level, and what comes with it here."""
        return f"{self.level.value} ({', '.join(self._extras)})"

    def run_program(self, program: str, stdin: str, limits: Limits, *, prelude: str = "") -> Run:
        """Run a script with `stdin`.

        Raises:
            SandboxError: the sandbox failed, twice.
        """
        request = _request(program=program, prelude=prelude)
        return self._with_slot(lambda slot: slot.program.run("program", request, stdin, limits))

    def call_function(
        self,
        program: str,
        entry_point: str,
        args: Sequence[JsonValue],
        kwargs: Mapping[str, JsonValue],
        limits: Limits,
        *,
        prelude: str = "",
    ) -> Run:
        """Define what the script defines, call a function of it and bring its return value back as JSON.

        Raises:
            SandboxError: the sandbox failed, twice.
        """
        request = _request(
            program=program, prelude=prelude, entry_point=entry_point, args=list(args), kwargs=dict(kwargs)
        )

        def call(slot: _Slot) -> Run:
            with _memory_file("reply") as reply:
                run = slot.program.run("call", request, "", limits, channels=(reply,))
                if not run.clean:
                    return run
                value, valid = _json(_head(reply, limits.output_bytes))
                return run._replace(returned=valid, value=value)

        return self._with_slot(call)

    def check_asserts(
        self,
        program: str,
        asserts: str,
        limits: Limits,
        *,
        setup: str = "",
        remote: Sequence[str] = (),
        prelude: str = "",
    ) -> AssertRun:
        """Run asserts in one sandbox, against a solution that runs in another.

        Names that asserts and set-up do not define are the solution's; so are those in `remote`, even if the set-up
        defines them. Only plain data crosses, and arrives as exact built-in types.

        Raises:
            SandboxError: the sandbox failed, twice.
        """
        asked = _request(setup=setup, asserts=asserts, remote=list(remote))
        request = _request(program=program, prelude=prelude)

        def check(slot: _Slot) -> AssertRun:
            return slot.check(asked, request, limits)

        return self._with_slot(check)

    def close(self) -> None:
        """End all zygotes, and with them whatever runs. Idempotent."""
        self._closed = True
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Of the zygotes' launchers that are running."""
        zygotes = (zygote for slot in self._slots for zygote in (slot.program, slot.asserts))
        return [zygote.pid for zygote in zygotes if zygote.pid is not None]

    def _with_slot(self, work: Callable[[_Slot], T]) -> T:
        """Run `work` on a free slot; once more on a fresh one if the zygote failed it."""
        slot = self._idle.get()
        failure: Exception = SandboxError("not tried")
        try:
            for _ in range(2):
                if self._closed:
                    raise SandboxError("the sandbox was closed")
                try:
                    return work(slot)
                except (SandboxError, OSError) as error:
                    slot.close()
                    failure = error
            raise SandboxError(str(failure)) from failure
        finally:
            self._idle.put(slot)

    def _prove(self) -> None:
        """Look from inside whether the level is what it says."""
        run = self._with_slot(
            lambda slot: slot.program.run("program", _request(program=_PROBE, prelude=""), "", Limits(wall_s=20.0))
        )
        found, valid = _json(run.stdout)
        if not (run.clean and valid and isinstance(found, dict)):
            raise SandboxError(f"a first program did not run: {run.complaint()}")
        zygote = self._slots[-1].program  # the one the probe ran on
        self._extras = ["system calls filtered" if found["filter"] == 2 else "system calls NOT filtered"]
        self._extras.append("memory cgroup" if zygote.memory_cgroup else "no memory cgroup")
        self._extras.append(f"Python {zygote.python_version}")
        if self.level is Isolation.NAMESPACES:
            wanted = {"pid": 2, "no_new_privileges": 1, "filter": 2, "reads_etc": False, "interfaces": ["lo"]}
            wrong = {name: found[name] for name, value in wanted.items() if found[name] != value}
            if wrong or found["capabilities"]:
                raise SandboxError(f"from inside it looks open: {wrong or found['capabilities']}")
        elif found["filter"] != 2:
            logger.warning(
                "no system-call filter on this machine: sockets, signals and new processes are open to programs"
            )


_PROBE = """
import ctypes, json, os, socket
libc = ctypes.CDLL(None)
status = dict(line.split(":", 1) for line in open("/proc/self/status")) if os.path.exists("/proc/self/status") else {}
print(json.dumps({
    "pid": os.getpid(),
    "no_new_privileges": libc.prctl(39, 0, 0, 0, 0),
    "filter": libc.prctl(21, 0, 0, 0, 0),
    "capabilities": int(status.get("CapEff", "0").strip(), 16),
    "reads_etc": os.path.exists("/etc/passwd"),
    "interfaces": os.listdir("/sys/class/net") if os.path.exists("/sys/class/net") else ["lo"],
}))
"""


class _Slot:
    """A zygote for programs, and one for asserts, which never runs a model's code."""

    def __init__(self, level: Isolation, python: str, preload: tuple[str, ...]) -> None:
        self.program = _Zygote(level, python, preload)
        self.asserts = _Zygote(level, python, preload)

    def check(self, asked: bytes, request: bytes, limits: Limits) -> AssertRun:
        """Both sides of an assert program at once; the asserts' end is the end."""
        try:
            with _memory_file("verdict") as verdict_fd:
                with contextlib.ExitStack() as pipes:
                    calls_r, calls_w = _pipe(pipes)
                    answers_r, answers_w = _pipe(pipes)
                    solution = self.program.start("serve", request, "", limits, channels=(calls_r, answers_w))
                    asserts = self.asserts.start("check", asked, "", limits, channels=(answers_r, calls_w, verdict_fd))
                judged = asserts.wait()
                solution.stop()
                ran = solution.wait()
                verdict, valid = _json(_head(verdict_fd, VERDICT_BYTES))
        except BaseException:
            self.close()  # one side without the other
            raise
        return _assert_run(judged, ran, verdict if valid and isinstance(verdict, dict) else None)

    def close(self) -> None:
        self.program.close()
        self.asserts.close()


def _assert_run(judged: Run, solution: Run, verdict: dict[str, Any] | None) -> AssertRun:
    if judged.ended == "wall" or judged.too_slow:
        return AssertRun(False, "", judged.complaint(), solution._replace(ended="wall", seconds=judged.seconds))
    if verdict is None:
        return AssertRun(False, f"the asserts ended without a verdict ({judged.complaint()})", "", solution)
    if verdict["passed"]:
        broken = "" if verdict["asked"] else "the asserts pass without asking the solution anything"
        return AssertRun(not broken, broken, "", solution)
    where = f"line {verdict['line']}: " if verdict["line"] else "set-up: "
    if verdict["broken"]:
        return AssertRun(False, f"the asserts fail by themselves, {where}{verdict['error']}", "", solution)
    reason = f"{where}{verdict['error']}"
    if solution.ended not in ("stopped", "exit") or solution.code:
        reason = solution.complaint()
    return AssertRun(False, "", reason, solution)


class _Zygote:
    """One zygote process, its socket and its memory cgroup. Used by one thread at a time; starts on first use."""

    _numbers = itertools.count(1)

    def __init__(self, level: Isolation, python: str, preload: tuple[str, ...]) -> None:
        self._level, self._python, self._preload = level, python, preload
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._folder: str | None = None
        self._stderr: Any = None
        self._lock = threading.Lock()
        self.memory_cgroup: MemoryCgroup | None = None
        self.python_version = ""

    @property
    def pid(self) -> int | None:
        """Of its launcher, if it runs."""
        return self._process.pid if self._process else None

    def run(self, mode: str, request: bytes, stdin: str, limits: Limits, channels: Sequence[int] = ()) -> Run:
        """One run, from start to the death of its last process. Raises SandboxError or OSError."""
        return self.start(mode, request, stdin, limits, channels).wait()

    def start(self, mode: str, request: bytes, stdin: str, limits: Limits, channels: Sequence[int] = ()) -> _Pending:
        """Begin a run; its `wait` must follow. `channels` become descriptors 3, 4, ... of the program."""
        if self._process is None or self._process.poll() is not None:
            self._launch()
        assert self._socket is not None
        if self.memory_cgroup:
            self.memory_cgroup.limit(limits.memory_mib + limits.scratch_mib + CGROUP_EXTRA_MIB)
        files = contextlib.ExitStack()
        try:
            descriptors = [
                files.enter_context(_memory_file("request", request)),
                files.enter_context(_memory_file("stdin", stdin.encode("utf-8", "surrogatepass"))),
                stdout := files.enter_context(_memory_file("stdout")),
                stderr := files.enter_context(_memory_file("stderr")),
                *channels,
            ]
            folder = None
            if self._level is Isolation.SUBPROCESS:
                folder = files.enter_context(_temporary_folder())
            job = {
                "mode": mode,
                "folder": folder,
                "cpu_s": ceil(limits.wall_s),
                **limits._asdict(),
                "file_mib": max(limits.file_mib, (limits.output_bytes >> 20) + 1),
            }
            socket.send_fds(self._socket, [json.dumps(job).encode()], descriptors)
        except BaseException:
            files.close()
            raise
        return _Pending(self, limits, stdout, stderr, files)

    def stop(self) -> None:
        """Ask for the end of the current run."""
        if self._socket is not None:
            self._socket.send(b'{"stop": true}')

    def reply(self, timeout_s: float) -> dict[str, Any]:
        """The zygote's next message. Raises SandboxError, after killing it, if there is none in time."""
        assert self._socket is not None
        poll = select.poll()  # not select.select: a busy process has more than 1024 descriptors
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            self.close()
            raise SandboxError(f"the zygote did not answer within {timeout_s:.0f} s")
        message = self._socket.recv(1 << 16)
        if not message:
            epitaph = self._epitaph()
            self.close()
            raise SandboxError(f"the zygote died{epitaph}")
        answer = json.loads(message)
        if "failed" in answer:
            raise SandboxError(answer["failed"])
        return answer

    def close(self) -> None:
        """Kill the zygote; the kernel kills what runs in it. Idempotent."""
        with self._lock:
            process, self._process = self._process, None
            control, self._socket = self._socket, None
            cgroup, self.memory_cgroup = self.memory_cgroup, None
            folder, self._folder = self._folder, None
            stderr, self._stderr = self._stderr, None
        if control is not None:
            control.close()
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)  # at the end of its socket it kills what runs, and goes
            process.kill()
            process.wait()
        if stderr is not None:
            stderr.close()
        if cgroup is not None:
            cgroup.remove()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def _launch(self) -> None:
        self.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        try:
            self._folder = tempfile.mkdtemp(prefix="memento-sandbox-")
            os.chmod(self._folder, 0o755)  # a mount point, for whoever the zygote will be; it stays empty
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
            self._process = subprocess.Popen(
                [self._python, "-I", "-B", "-X", "utf8", str(ZYGOTE), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=(theirs.fileno(),),
                cwd="/",
                env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C in the terminal is for the caller to handle
            )
            theirs.close()
            if self._level is Isolation.NAMESPACES:
                self.memory_cgroup = MemoryCgroup.create(f"{os.getpid()}-{next(self._numbers)}", self._process.pid)
            machine = os.uname().machine
            filtered = b""
            if machine in ARCHITECTURES:
                filtered = compile_filter(machine, processes=self._level is Isolation.NAMESPACES)
            elif self._level is Isolation.NAMESPACES:
                raise SandboxError(f"no list of system calls for {machine}, only for {' and '.join(ARCHITECTURES)}")
            config = {"level": self._level.value, "root": self._folder, "preload": list(self._preload)}
            self._socket.send(json.dumps({**config, "filter": filtered.hex()}).encode())
            self.python_version = self.reply(STARTUP_S)["python"]
            # the mounts are in the zygote's own namespace: out here the folder was never anything but empty
            shutil.rmtree(self._folder, ignore_errors=True)
        except BaseException:
            theirs.close()
            self.close()
            raise

    def _epitaph(self) -> str:
        """The last thing it wrote on stderr."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1.0)
        self._stderr.seek(0)
        words = self._stderr.read(STDERR_BYTES).decode("utf-8", "replace").strip().splitlines()
        return f": {words[-1]}" if words else ""


class _Pending:
    """A run in progress."""

    def __init__(self, zygote: _Zygote, limits: Limits, stdout: int, stderr: int, files: contextlib.ExitStack) -> None:
        self._zygote, self._limits, self._files = zygote, limits, files
        self._stdout, self._stderr = stdout, stderr

    def stop(self) -> None:
        """End it now, if it has not ended."""
        self._zygote.stop()

    def wait(self) -> Run:
        """How it ended. Raises SandboxError."""
        with self._files:
            answer = self._zygote.reply(self._limits.wall_s + GRACE_S)
            stdout = _head(self._stdout, self._limits.output_bytes + 1)
            stderr = _tail(self._stderr, STDERR_BYTES)
            ended: Any = answer["end"]
            cgroup = self._zygote.memory_cgroup
            if ended == "signal" and answer["code"] == signal.SIGKILL and cgroup and cgroup.was_exceeded():
                ended = "memory"
            elif ended == "signal" and answer["code"] == signal.SIGKILL and answer["seconds"] >= self._limits.wall_s:
                ended = "wall"  # the hard limit on CPU time
            elif len(stdout) > self._limits.output_bytes:
                ended = "output"
            return Run(stdout[: self._limits.output_bytes], stderr, ended, answer["code"], answer["seconds"])


@cache
def why_no_namespaces() -> str:
    """Empty where level "namespaces" can be had, else the reason. Found out once, by making such a sandbox."""
    try:
        Sandbox("namespaces").close()
    except UserError as error:
        return str(error)
    return ""


def _close_all(slots: Sequence[_Slot]) -> None:
    for slot in slots:
        slot.close()


def _refusal(level: Isolation, python: str, reason: str) -> str:
    if level is Isolation.SUBPROCESS:
        return f"cannot run programs with {python} (rewards.sandbox_python): {reason}."
    if "lies under /tmp" in reason:
        return f"rewards.sandbox_python: {reason}. Choose a Python that is installed elsewhere."
    return (
        f"rewards.sandbox is 'namespaces', which this machine does not allow ({reason}). Allow user namespaces (sysctl "
        "user.max_user_namespaces above 0, kernel.unprivileged_userns_clone=1 and "
        "kernel.apparmor_restrict_unprivileged_userns=0 where they exist; in a container --privileged, or a seccomp "
        "profile that permits clone, unshare and mount), or set rewards.sandbox=subprocess, which does not contain "
        "hostile programs."
    )


def _interpreter(python: Path | str | None) -> str:
    if python is None:
        return os.path.realpath(sys.executable)  # not the virtual environment's link: its packages stay outside
    path = shutil.which(str(python))
    if path is None:
        raise UserError(f"rewards.sandbox_python: there is no executable {python}.")
    return os.path.abspath(path)  # links are kept: that of a virtual environment makes its packages importable


def _request(**fields: JsonValue) -> bytes:
    return json.dumps(fields).encode()  # ASCII, also for lone surrogates that byte-level decoding leaves


def _json(data: bytes) -> tuple[Any, bool]:
    """The value of an untrusted JSON text, and whether it is one."""
    try:
        return json.loads(data), True
    except (ValueError, RecursionError):
        return None, False


@contextlib.contextmanager
def _memory_file(name: str, content: bytes = b"") -> Iterator[int]:
    """A file that exists only as a descriptor."""
    descriptor = os.memfd_create(name)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    return ends


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="memento-sandbox-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _head(descriptor: int, count: int) -> bytes:
    """The first bytes of a file, at most `count`."""
    return os.pread(descriptor, count, 0)


def _tail(descriptor: int, count: int) -> bytes:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, count, max(0, size - count))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
