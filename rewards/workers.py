"""Killable worker processes for verifiers that can hang, blow up or die.

    parent thread --request (JSON line)--> worker process (one thread, own session, memory limit)
                  <--reply (JSON line)----

Why not a thread, a signal or a process pool: math-verify's own timeouts use SIGALRM, which raises in every thread but
the main one and cannot interrupt C code; interrupting SymPy in the middle leaves half-filled caches behind; and
multiprocessing re-imports the caller's ``__main__``. Here the parent keeps the deadline, and a worker that passes it is
killed and replaced, never interrupted. A second, later deadline is kept by the kernel (SIGALRM with its default
action), so that a worker cannot outlive a parent that was killed.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from memento.errors import UserError

Message = dict[str, Any]

STARTUP_TIMEOUT_S = 120.0
"""Importing SymPy on a busy machine. Not counted against the first job."""

MAX_REPLY_BYTES = 16 << 20
"""A verdict is small; a handler that returns more than this is broken."""

ORPHAN_GRACE_S = 5.0
"""How long after the parent's deadline the kernel kills the worker itself."""


class Status(StrEnum):
    """How a job ended."""

    DONE = "done"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out_of_memory"
    ERROR = "error"
    """The handler raised, or the worker died twice."""


class Reply(NamedTuple):
    """What came of a job: `value`, what the handler returned, for DONE; else `detail` says why."""

    status: Status
    value: Any
    detail: str = ""
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """What happened to the workers of a pool since it was made."""

    restarts: int = 0
    """Workers that died, or were killed for a job that hung or ran out of memory."""
    retries: int = 0
    """Jobs that were given to a second worker because the first one died."""
    timeouts: int = 0
    """Jobs that passed their deadline."""
    recycled: int = 0
    """Workers replaced after so many jobs, healthy."""

    def plus(self, other: WorkerCounts) -> WorkerCounts:
        """The counts of two pools together."""
        return WorkerCounts(
            self.restarts + other.restarts,
            self.retries + other.retries,
            self.timeouts + other.timeouts,
            self.recycled + other.recycled,
        )

    def minus(self, other: WorkerCounts) -> WorkerCounts:
        """What came on top of earlier counts."""
        return WorkerCounts(
            self.restarts - other.restarts,
            self.retries - other.retries,
            self.timeouts - other.timeouts,
            self.recycled - other.recycled,
        )


class WorkerDied(Exception):
    """The worker process ended in the middle of a job."""


class JobTimeout(Exception):
    """The deadline passed."""


class Worker:
    """One process that runs ``handler(**request)`` for JSON requests. Used by one thread at a time.

    Args:
        handler: ``"module:function"``, imported in the worker; takes and returns what JSON can hold. A function
            ``warm_up`` of that module is called before the first job.
        memory_limit_mib: RLIMIT_AS of the process; None for no limit.
        recycle_after: a fresh process after so many jobs, because SymPy's caches grow.
        search: further folders in which the worker looks for `handler`, after its own path.
    """

    def __init__(
        self, handler: str, *, memory_limit_mib: int | None, recycle_after: int = 5000, search: Sequence[str] = ()
    ) -> None:
        self.recycled = 0
        """How often the process was replaced because it had done `recycle_after` jobs."""
        self._handler = handler
        self._memory_limit_mib = memory_limit_mib
        self._recycle_after = recycle_after
        self._search = tuple(search)
        self._ids = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: Any = None
        self._buffer = b""
        self._jobs_done = 0

    @property
    def pid(self) -> int | None:
        """Of the running process, if there is one."""
        return self._process.pid if self._process else None

    def call(self, request: Message, timeout_s: float) -> Message:
        """Run one job.

        Raises:
            JobTimeout: after `timeout_s`; the process is killed.
            WorkerDied: the process died or broke the protocol; it is gone too.
        """
        self.start()
        job_id = next(self._ids)
        message = {"id": job_id, "kernel_limit_s": timeout_s + ORPHAN_GRACE_S, "request": request}
        try:
            deadline = time.monotonic() + timeout_s
            self._send(message, deadline)
            reply = self._receive(deadline)
            if reply.get("id") != job_id:
                raise WorkerDied(f"answered job {reply.get('id')} instead of {job_id}")
        except BaseException:  # also KeyboardInterrupt: a half-read reply must never meet the next request
            self.kill()
            raise
        self._jobs_done += 1
        return reply

    def start(self) -> None:
        """Have a process that is ready for a job. Raises WorkerDied if there is none to be had."""
        worn = self._jobs_done >= self._recycle_after
        if self._process is None or self._process.poll() is not None or worn:
            self._start()
            self.recycled += worn

    def kill(self) -> None:
        """End the process and close its pipes. The next call starts another."""
        process, self._process, self._buffer, self._jobs_done = self._process, None, b"", 0
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, self._stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _start(self) -> None:
        self.kill()
        environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_import_root(), os.environ.get("PYTHONPATH")]))
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [
                sys.executable,
                *("-m", __name__, self._handler, str(self._memory_limit_mib or 0)),
                *self._search,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal is for the parent to handle
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        try:
            ready = self._receive(time.monotonic() + STARTUP_TIMEOUT_S)
        except JobTimeout:
            self.kill()
            raise WorkerDied(f"did not start within {STARTUP_TIMEOUT_S:.0f} s") from None
        except BaseException:
            self.kill()
            raise
        if "error" in ready:
            self.kill()
            raise WorkerDied(f"cannot load {self._handler}: {ready['error']}")

    def _send(self, message: Message, deadline: float) -> None:
        assert self._process is not None and self._process.stdin is not None
        descriptor, data = self._process.stdin.fileno(), memoryview(_encode(message))
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        try:
            while data:  # more than the pipe holds waits for the worker to read
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not poll.poll(left_s * 1000 + 1):
                    raise JobTimeout
                with contextlib.suppress(BlockingIOError):
                    data = data[os.write(descriptor, data) :]
        except OSError as error:
            raise WorkerDied(self._epitaph()) from error

    def _receive(self, deadline: float) -> Message:
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poll = select.poll()  # not select.select: a busy process has more than 1024 descriptors
        poll.register(descriptor, select.POLLIN | select.POLLHUP)
        while b"\n" not in self._buffer:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not poll.poll(left_s * 1000 + 1):
                raise JobTimeout
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                raise WorkerDied(self._epitaph())
            self._buffer += chunk
            if len(self._buffer) > MAX_REPLY_BYTES:
                raise WorkerDied(f"answered more than {MAX_REPLY_BYTES >> 20} MiB")
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            return json.loads(line)
        except ValueError as error:
            raise WorkerDied(f"wrote something that is not JSON: {line[:100]!r}") from error

    def _epitaph(self) -> str:
        """How the process ended and the last thing it wrote on stderr."""
        process = self._process
        if process is None:
            return "was closed"
        try:
            code = process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - 500))
        words = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
        return f"{how}{': ' + words[-1] if words else ''}"


class WorkerPool:
    """A few workers shared by any number of threads. Bounded: a caller waits while all of them are busy.

    A worker that is killed in the middle of a job does not cost the job: it is tried once more on a fresh process.
    """

    def __init__(
        self,
        handler: str,
        *,
        workers: int,
        timeout_s: float,
        memory_limit_mib: int | None,
        recycle_after: int = 5000,
        search: Sequence[str] = (),
    ) -> None:
        self.handler = handler
        self.timeout_s = timeout_s
        self._counts = WorkerCounts()
        self._workers = [
            Worker(handler, memory_limit_mib=memory_limit_mib, recycle_after=recycle_after, search=search)
            for _ in range(workers)
        ]
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()  # last in, first out: keeps few workers warm
        for worker in self._workers:
            self._idle.put(worker)
        self._lock = threading.Lock()
        self._closed = False

    def call(self, request: Message) -> Reply:
        """Run one job; every way it can end is a `Reply`, none an exception."""
        worker = self._idle.get()
        try:
            died = ""
            for attempt in (1, 2):
                if self._closed:
                    return Reply(Status.ERROR, {}, "the pool was closed", attempt)
                try:
                    answer = worker.call(request, self.timeout_s)
                except JobTimeout:
                    self._count(restarts=1, timeouts=1)
                    return Reply(Status.TIMEOUT, {}, f"no verdict within {self.timeout_s:g} s", attempt)
                except (WorkerDied, OSError) as error:
                    self._count(restarts=1, retries=int(attempt == 1))
                    died = str(error)
                    continue
                if answer.get("out_of_memory"):
                    self._count(restarts=1)
                    worker.kill()  # after a MemoryError nothing in that process is to be trusted
                    return Reply(Status.OUT_OF_MEMORY, {}, "ran into the memory limit of the worker", attempt)
                if "error" in answer:
                    return Reply(Status.ERROR, {}, answer["error"], attempt)
                return Reply(Status.DONE, answer["value"], attempts=attempt)
            return Reply(Status.ERROR, {}, f"the worker died twice; last time it {died}", 2)
        finally:
            self._idle.put(worker)

    def check(self) -> None:
        """Start one worker, to see that the handler can be had.

        Raises:
            UserError: it cannot be imported, or the process does not start.
        """
        worker = self._idle.get()
        try:
            worker.start()
        except (WorkerDied, OSError) as error:
            raise UserError(
                f"the verifier {self.handler} does not start: {error}. It is looked for in the working directory and "
                "on the Python path of this process, as `module:function`."
            ) from error
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Kill all workers, those in a job too; their callers get an ERROR reply."""
        self._closed = True
        for worker in self._workers:
            worker.kill()

    @property
    def pids(self) -> list[int]:
        """Of the running workers."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    @property
    def counts(self) -> WorkerCounts:
        """What happened to the workers so far."""
        with self._lock:
            return replace(self._counts, recycled=sum(worker.recycled for worker in self._workers))

    def _count(self, *, restarts: int = 0, retries: int = 0, timeouts: int = 0) -> None:
        with self._lock:
            self._counts = self._counts.plus(WorkerCounts(restarts, retries, timeouts))


def _import_root() -> str:
    """Where `memento` is imported from: the folder that must be on the worker's path."""
    return str(Path(sys.modules["memento"].__file__ or "").absolute().parents[1])


def _encode(message: Message) -> bytes:
    # lone surrogates, which byte-level decoding can leave in a completion, would not encode
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def serve(handler: Callable[..., Any], requests: int, replies: int) -> None:
    """The worker's loop: answer JSON lines until the parent closes the pipe."""
    with open(requests, "rb", closefd=False) as lines, open(replies, "wb", buffering=0, closefd=False) as out:
        _write(out, _encode({"ready": True}))
        for line in lines:
            message = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, message["kernel_limit_s"])
            try:
                # Encoded in here: what JSON cannot hold is the handler's error, not the end of the worker.
                reply = _encode({"id": message["id"], "value": handler(**message["request"])})
            except MemoryError:
                reply = _encode({"id": message["id"], "out_of_memory": True})
            except BaseException as error:  # also SystemExit: a handler does not decide when its worker ends
                words = f"{type(error).__name__}: {str(error)[:500]}"
                reply = _encode({"id": message["id"], "error": words})
            signal.setitimer(signal.ITIMER_REAL, 0)
            _write(out, reply)


def _write(out: FileIO, data: bytes) -> None:
    """All of it: a raw pipe may take less than it is given."""
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]


def main() -> None:
    """``python -m memento.rewards.workers module:function MEMORY_MIB [folder ...]``."""
    import resource

    handler_name, memory_mib = sys.argv[1], int(sys.argv[2])
    # Behind everything else: what a driver has on its path must not hide a library from the worker.
    sys.path += [folder for folder in sys.argv[3:] if folder not in sys.path]
    if memory_mib:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies = os.dup(1)
    os.dup2(2, 1)  # a library that prints must not write into the protocol
    try:
        module, _, function = handler_name.partition(":")
        loaded = importlib.import_module(module)
        handler = getattr(loaded, function)
        getattr(loaded, "warm_up", lambda: None)()
    except BaseException as error:  # a module may well call sys.exit() when it is imported
        os.write(replies, _encode({"error": repr(error)}))
        return
    serve(handler, 0, replies)


if __name__ == "__main__":
    main()
