"""Runs model-written Python in an isolated process, one process a test.

What the parent keeps to itself: the expected outputs, the verdict, the wall clock and the cap on output. What the
process gets: the program and one input. Levels, weakest first:

    subprocess   fresh temporary folder, own session, resource limits, scrubbed environment, isolated Python; daemons
                 are reaped. It stops accidents. It can read files and open sockets as the caller can.
    namespaces   all of that, and: no network, no other processes, a private read-only root with only the system
                 libraries and this Python, private /tmp, no capabilities, an own uid where the caller is root.

`Sandbox` settles the level once, by running a program at it, and never weakens it silently: `auto` logs what it took.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import JsonValue

from memento.errors import UserError

logger = logging.getLogger(__name__)

LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")

STARTUP_S = 20.0
"""How long the launcher may take to reach the program; not counted against it."""

STOP_GRACE_S = 2.0
"""Between asking the launcher to clean up and killing it."""

STDERR_BYTES = 1 << 16


class Isolation(StrEnum):
    """How far a program is kept away from this machine."""

    SUBPROCESS = "subprocess"
    NAMESPACES = "namespaces"


class Limits(NamedTuple):
    """What one run of a program may use.

    `wall_s` is kept by the parent, the rest by the kernel. Memory is address space of each process.
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
        value: for a call, what the function returned; `returned` says whether it did.
        ended: "exit", "signal", "wall" (the deadline) or "output" (the cap).
        code: exit code or signal number, 0 otherwise. It can fail a test, never pass one.
    """

    stdout: bytes
    stderr: bytes
    ended: Literal["exit", "signal", "wall", "output"]
    code: int
    seconds: float
    returned: bool = False
    value: JsonValue = None

    @property
    def clean(self) -> bool:
        """Whether it ran to its end without an error."""
        return self.ended == "exit" and self.code == 0

    def complaint(self) -> str:
        """One line for people on why it did not run to its end."""
        if self.ended == "wall":
            return f"still running after {self.seconds:.1f} s"
        if self.ended == "output":
            return "printed more than the cap"
        words = self.stderr.decode("utf-8", "replace").strip().splitlines()
        last = f": {words[-1][:300]}" if words else ""
        if self.ended == "signal":
            return f"killed by {signal.Signals(self.code).name}{last}"
        return f"exit code {self.code}{last}"

    @property
    def too_slow(self) -> bool:
        """Whether time was what it ran out of."""
        return self.ended == "wall" or (self.ended == "signal" and self.code in (signal.SIGXCPU, signal.SIGKILL))


class SandboxError(Exception):
    """The sandbox itself failed: no verdict on the program."""


class Sandbox:
    """Runs programs at one level of isolation. Thread-safe: every run is a process of its own.

    Raises:
        UserError: `namespaces` was asked for and the kernel does not allow them.
    """

    def __init__(self, level: Literal["auto", "subprocess", "namespaces"] = "auto") -> None:
        self.level = Isolation.SUBPROCESS
        if level != "subprocess":
            refused = why_no_namespaces()
            if not refused:
                self.level = Isolation.NAMESPACES
            elif level == "namespaces":
                raise UserError(
                    f"rewards.sandbox is 'namespaces', which this machine does not allow ({refused}). Allow user "
                    "namespaces (sysctl user.max_user_namespaces and kernel.unprivileged_userns_clone; in a container "
                    "a seccomp profile that permits unshare), or set rewards.sandbox=subprocess, which does not "
                    "contain hostile programs."
                )
            else:
                logger.warning("no namespaces here (%s): model-written code is NOT contained", refused)
        logger.info("code sandbox: isolation level %s", self.level.value)

    def run_program(self, program: str, stdin: str, limits: Limits) -> Run:
        """Run a script with `stdin`."""
        return _run(self.level, program, stdin, None, limits)

    def call_function(
        self, program: str, entry_point: str, args: Sequence[JsonValue], kwargs: Mapping[str, JsonValue], limits: Limits
    ) -> Run:
        """Define what the script defines, call a function of it and bring its return value back as JSON."""
        call = {"id": secrets.token_hex(16), "entry_point": entry_point, "args": list(args), "kwargs": dict(kwargs)}
        return _run(self.level, program, "", call, limits)


@cache
def why_no_namespaces() -> str:
    """Empty where namespaces work, else the kernel's reason. Found out once, by running a program in them."""
    try:
        run = _run(Isolation.NAMESPACES, "print(6 * 7)", "", None, Limits(wall_s=10.0))
    except SandboxError as error:
        return str(error)
    return "" if run.stdout == b"42\n" else run.complaint()


def _run(level: Isolation, program: str, stdin: str, call: dict[str, Any] | None, limits: Limits) -> Run:
    folder = tempfile.mkdtemp(prefix="memento-sandbox-")
    try:
        with contextlib.ExitStack() as stack:
            request = {
                "level": level.value,
                "root": folder,
                "program": program,
                "call": call,
                "cpu_s": ceil(limits.wall_s),
                **limits._asdict(),
            }
            request_fd = stack.enter_context(_memory_file("request", json.dumps(request).encode()))
            stdin_fd = stack.enter_context(_memory_file("stdin", stdin.encode("utf-8", "replace")))
            job = _Job(folder, request_fd, stdin_fd, limits)
            stack.callback(job.end)
            return job.watch(call["id"] if call else None)
    except OSError as error:
        raise SandboxError(f"cannot run a sandbox: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _memory_file(name: str, content: bytes):
    """A file that exists only as a descriptor: no pipe to keep fed, no path to be found."""
    descriptor = os.memfd_create(name)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


class _Job:
    """One launcher process and the four pipes that come out of it."""

    def __init__(self, folder: str, request_fd: int, stdin_fd: int, limits: Limits) -> None:
        self._limits = limits
        self._caps = {"stdout": limits.output_bytes, "stderr": STDERR_BYTES, "reply": limits.output_bytes}
        self._data = {"stdout": bytearray(), "stderr": bytearray(), "reply": bytearray(), "status": bytearray()}
        self._program_group: int | None = None
        self._readers: dict[int, str] = {}
        writers: dict[str, int] = {}
        for name in self._data:
            reader, writers[name] = os.pipe()
            os.set_blocking(reader, False)
            self._readers[reader] = name
        try:
            self._launcher = subprocess.Popen(
                [
                    *(_base_python(), "-I", "-B", "-X", "utf8", str(LAUNCHER)),
                    *(str(request_fd), str(writers["status"]), str(writers["reply"])),
                ],
                stdin=stdin_fd,
                stdout=writers["stdout"],
                stderr=writers["stderr"],
                pass_fds=(request_fd, writers["status"], writers["reply"]),
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"},
                start_new_session=True,
            )
        except BaseException:
            for reader in self._readers:
                os.close(reader)
            raise
        finally:
            for writer in writers.values():
                os.close(writer)

    def watch(self, call_id: str | None) -> Run:
        """Read until the supervisor is gone, the deadline passes or the output is too much."""
        deadline, started = time.monotonic() + STARTUP_S, None
        cut: Literal["wall", "output"] | None = None
        with selectors.DefaultSelector() as selector:
            for reader in self._readers:
                selector.register(reader, selectors.EVENT_READ)
            while cut is None:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                supervisor_gone = False
                for key, _ in ready:
                    name = self._readers[key.fd]
                    if not self._read(key.fd):
                        selector.unregister(key.fd)
                        supervisor_gone |= name == "status"
                    if name in ("stdout", "reply") and len(self._data[name]) > self._caps[name]:
                        cut = "output"
                if started is None and b"\n" in self._data["status"]:
                    first = json.loads(self._data["status"].partition(b"\n")[0])
                    if "failed" in first:
                        raise SandboxError(first["failed"])
                    self._program_group, started = first["group"], time.monotonic()
                    deadline = started + self._limits.wall_s
                if supervisor_gone:
                    break
                if cut is None and time.monotonic() >= deadline:
                    cut = "wall"
        seconds = time.monotonic() - started if started is not None else 0.0
        self.end()
        if started is None:
            words = bytes(self._data["stderr"]).decode("utf-8", "replace").strip().splitlines()
            raise SandboxError(f"the launcher never reached the program{': ' + words[-1] if words else ''}")
        return self._result(cut, seconds, call_id)

    def end(self) -> None:
        """Kill everything that was started and drain the pipes. Idempotent."""
        if self._readers:
            if self._launcher.poll() is None:
                self._launcher.terminate()  # the launcher kills what it adopted, then itself
                try:
                    self._launcher.wait(STOP_GRACE_S)
                except subprocess.TimeoutExpired:
                    self._launcher.kill()
                    self._launcher.wait()
            for group in (self._launcher.pid, self._program_group):
                if group is not None:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(group, signal.SIGKILL)
            for reader in self._readers:
                while self._read(reader) and len(self._data[self._readers[reader]]) <= 1 << 22:
                    pass
                os.close(reader)
            self._readers = {}

    def _read(self, reader: int) -> bool:
        """Take what is there, at most 64 KiB; False at the end of the pipe or when nothing is left."""
        try:
            chunk = os.read(reader, 1 << 16)
        except BlockingIOError:
            return False
        name = self._readers[reader]
        room = self._caps.get(name, 1 << 16) + 1 - len(self._data[name])
        self._data[name] += chunk[: max(0, room)]
        return bool(chunk)

    def _result(self, cut: Literal["wall", "output"] | None, seconds: float, call_id: str | None) -> Run:
        stdout, stderr = bytes(self._data["stdout"]), bytes(self._data["stderr"])
        if cut is None and len(stdout) > self._limits.output_bytes:
            cut = "output"
        if cut is not None:
            return Run(stdout, stderr, cut, 0, seconds)
        last = self._data["status"].strip().rpartition(b"\n")[2]
        end = json.loads(last)
        if "failed" in end:
            raise SandboxError(end["failed"])
        if "exit" not in end and "signal" not in end:
            return Run(stdout, stderr, "signal", signal.SIGKILL, seconds)  # it killed its supervisor
        ended, code = ("exit", end["exit"]) if "exit" in end else ("signal", end["signal"])
        run = Run(stdout, stderr, ended, code, seconds)
        if call_id is None:
            return run
        try:
            reply = json.loads(bytes(self._data["reply"]))
            if isinstance(reply, dict) and reply.get("id") == call_id and "value" in reply:
                return run._replace(returned=True, value=reply["value"])
        except (ValueError, RecursionError):
            pass
        return run


def _base_python() -> str:
    """The interpreter itself, not the virtual environment's link: the environment's packages stay outside."""
    return os.path.realpath(sys.executable)
