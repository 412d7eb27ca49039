"""The inside of the code sandbox: a small Python that forks itself for every run. Never imported by the project.

    PYTHON -I -B sandbox_zygote.py CONTROL_FD        (standard library only, one thread, Python 3.9 or later)

    sandbox.py ──> launcher        makes the zygote's namespaces and waits
                     └─ zygote     pid 1 in them; private read-only root, no network; the standard library is loaded
                          └─ supervisor   one a run: pid 1 of the run's own namespaces; empty /tmp, own /proc; waits
                               └─ program      no capabilities, limits, system-call filter; runs untrusted code

What the zygote never holds, its children cannot find: programs, inputs and calls reach it as descriptors that only the
program's process reads, and expected outputs stay in the caller. It serves one run at a time; a run is over when every
process of it is dead.

At level "subprocess" there are no namespaces, and the filter forbids signals and new processes; where there is no
filter either, zygote and supervisor are "subreapers", which inherit the daemons a program leaves behind and kill them.
That level limits accidents, not attacks.

Modes of a run: "program" (a script with standard input), "call" (one call of a function, its value as JSON), "serve" (a
solution that answers calls) and "check" (the asserts that make those calls; they are the data set's, not the model's).
"""

import atexit
import builtins
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import types
from typing import Any

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = (
    1,
    4,
    22,
    24,
    36,
    38,
)
SECCOMP_MODE_FILTER = 2
SYSTEM_CALLS = {"x86_64": (56, 126, 155), "aarch64": (220, 91, 41)}
"""clone, capset, pivot_root."""
SYS_MOUNT_SETATTR = 442
AT_RECURSIVE, AT_FDCWD = 0x8000, -100
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2

ZYGOTE_NAMESPACES = (
    CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
)
RUN_NAMESPACES = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNET
"""Fresh for every run, inside those of the zygote."""

INSIDE_ID = 1000
"""User and group id of a program, in its namespace."""

MAX_FILES = 256
HIGH_FD = 64
"""Descriptors are moved from here on before they take their final numbers."""

FRAME_BYTES = 16 << 20
"""The largest message between asserts and solution."""

PRELOADED = """
array ast bisect calendar cmath collections collections.abc contextlib copy dataclasses datetime decimal enum fractions
functools hashlib heapq io itertools json keyword linecache math numbers operator queue random re statistics string
struct textwrap threading time traceback types typing unicodedata
"""

libc = ctypes.CDLL(None, use_errno=True)
libc_with_gil = ctypes.PyDLL(None, use_errno=True)  # a child must not wake up waiting for the interpreter's lock


def check(result, what):
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def mount(source, target, kind, flags, options=""):
    done = libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    check(done, "mount " + target)


def prctl(option, value, more: object = 0):
    check(libc.prctl(option, ctypes.c_ulong(value), more, 0, 0), f"prctl {option}")


def write_proc(path, text):
    with open("/proc/" + path, "w") as file:
        file.write(text)


# ------------------------------------------------------------------------------------------------ the zygote's world


def spare_id():
    """A user id nobody has, where we are root and may give ids away; else None."""
    if os.geteuid() != 0:
        return None
    with open("/proc/self/uid_map") as file:
        ranges = [[int(word) for word in line.split()] for line in file]
    mapped = max(first + count for first, _, count in ranges)
    if mapped >= 1 << 31:
        return (1 << 20) + int.from_bytes(os.urandom(4), "little") % (1 << 29)
    return 65534 if mapped > 65534 else None


def write_id_maps(pid, outside_uid, outside_gid):
    write_proc(f"{pid}/setgroups", "deny")
    write_proc(f"{pid}/uid_map", f"{INSIDE_ID} {outside_uid} 1")
    write_proc(f"{pid}/gid_map", f"{INSIDE_ID} {outside_gid} 1")


def enter_namespaces(root):
    """Unshare everything and become the zygote: returns in pid 1 of the new namespaces, as a user id nobody has.

    As root the mounts are made first, with root's rights, because the interpreter may lie in a folder that others
    cannot enter; then root is given up for good. A root that may not mount, as in most containers, gives up first.
    """
    stranger = spare_id()
    if stranger is not None and libc.unshare(CLONE_NEWNS) < 0:
        os.setgroups([])
        os.setresgid(stranger, stranger, stranger)
        os.setresuid(stranger, stranger, stranger)
        prctl(PR_SET_DUMPABLE, 1)  # else /proc/self belongs to root, and the maps cannot be written
        stranger = None
    if stranger is None:
        uid, gid = os.geteuid(), os.getegid()
        check(libc.unshare(ZYGOTE_NAMESPACES), "unshare user, pid, network, ipc and mount namespaces")
        write_id_maps("self", uid, gid)
        become_pid_1()
        private_root(root)
    else:
        private_root(root)
        os.setgroups([])
        unshared_r, unshared_w = os.pipe()
        launcher = os.getpid()
        helper = os.fork()
        if helper == 0:  # stays root outside, to say who we are inside
            code = 1
            try:
                os.close(unshared_w)
                if os.read(unshared_r, 1):
                    write_id_maps(launcher, stranger, stranger)
                    code = 0
            finally:
                os._exit(code)
        check(libc.unshare(ZYGOTE_NAMESPACES), "unshare user, pid, network, ipc and mount namespaces")
        os.write(unshared_w, b".")
        if os.waitpid(helper, 0)[1] != 0:
            raise OSError("cannot map a user id into the new user namespace")
        os.close(unshared_r)
        os.close(unshared_w)
        os.setresgid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
        os.setresuid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
        become_pid_1()
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    check(libc.sethostname(b"sandbox", 7), "sethostname")


def become_pid_1():
    zygote = os.fork()
    if zygote:
        os.closerange(0, MAX_FILES)
        os.waitpid(zygote, 0)
        os._exit(0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # whoever kills the launcher kills all namespaces with all runs


def private_root(root):
    """A root file system of its own: system libraries and this Python read-only, a few devices, nothing else.

    No home, no working tree, no /etc, no data sets: what is not mounted cannot be read.
    """
    mount("none", "/", "none", MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    prefixes = [sys.base_prefix, sys.base_exec_prefix, sys.prefix, sys.exec_prefix]
    for prefix in prefixes:
        if (prefix + "/").startswith("/tmp/"):
            raise OSError(
                prefix + ", the Python of rewards.sandbox_python, lies under /tmp, which is private to each run"
            )
    for path in dict.fromkeys(["/usr", "/lib", "/lib32", "/lib64", "/bin", *prefixes]):
        inside = root + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            os.symlink(os.readlink(path), inside)
        elif os.path.isdir(path) and not os.path.exists(inside):
            os.makedirs(inside)
            mount(path, inside, "none", MS_BIND | MS_REC)
    os.mkdir(root + "/dev")
    for device in ("null", "zero", "random", "urandom"):
        open(f"{root}/dev/{device}", "w").close()
        mount("/dev/" + device, f"{root}/dev/{device}", "none", MS_BIND)
    os.symlink("/tmp", root + "/dev/shm")  # semaphores of multiprocessing
    os.symlink("/proc/self/fd", root + "/dev/fd")
    os.mkdir(root + "/proc")
    # while the old /proc can still be seen: the kernel allows a new one only then
    mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.mkdir(root + "/tmp")
    os.chdir(root)
    check(libc.syscall(SYSTEM_CALLS[os.uname().machine][2], b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount the old root")
    os.chdir("/")
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    for tree in ("/usr", "/lib", "/lib32", "/lib64", "/bin", *prefixes, "/"):
        # not /proc: the zygote writes there, and every run gets its own
        if tree == "/" or (os.path.ismount(tree) and not os.path.islink(tree)):
            recursive = 0 if tree == "/" else AT_RECURSIVE
            done = libc.syscall(
                SYS_MOUNT_SETATTR, AT_FDCWD, tree.encode(), recursive, attributes, ctypes.sizeof(attributes)
            )
            check(done, "mount_setattr read-only " + tree)


def drop_bounding_set():
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
            return  # past the last one of this kernel


class FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


# ------------------------------------------------------------------------------------------------------ serving runs


def report(status, message):
    os.write(status, json.dumps(message).encode() + b"\n")


def serve(control, level, filter_program):
    """The zygote's loop: one message with descriptors in, one message out. Ends with the caller."""
    while True:
        message, fds, _, _ = socket.recv_fds(control, 1 << 16, 8)
        if not message:
            os._exit(0)
        job = json.loads(message)
        if job.get("stop"):
            continue  # meant for a run that ended by itself in the meantime
        try:
            outcome = run(job, fds, control, level, filter_program)
        except EOFError:
            if job["folder"]:
                importlib.import_module("shutil").rmtree(job["folder"], ignore_errors=True)
            os._exit(0)
        except OSError as error:
            outcome = {"failed": f"the zygote: {error}"}
        finally:
            for fd in fds:
                os.close(fd)
        control.send(json.dumps(outcome).encode())


def run(job, fds, control, level, filter_program):
    """One run from fork to the death of its last process."""
    reader, status = os.pipe()
    namespaces = level == "namespaces"
    try:
        if namespaces:
            number = SYSTEM_CALLS[os.uname().machine][0]
            supervisor = libc_with_gil.syscall(number, RUN_NAMESPACES | signal.SIGCHLD, 0, 0, 0, 0)
            check(supervisor, "clone with new namespaces")
        else:
            supervisor = os.fork()
        if supervisor == 0:
            try:
                supervise(job, status, namespaces)
                become_program(job, fds, filter_program)
            except Exception as error:
                report(status, {"failed": str(error)})
                os._exit(0)
            run_mode(job["mode"], fds)
    finally:
        os.close(status)
    try:
        outcome = watch(reader, control, job["wall_s"])
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(
                supervisor, signal.SIGKILL
            )  # pid 1 of its namespace: all die, and waitpid returns when all are dead
        os.waitpid(supervisor, 0)
        if not namespaces:
            kill_children()
    return outcome


def watch(reader, control, wall_s):
    """Wait for the end of the run, the deadline or the caller."""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    poll.register(control, select.POLLIN)
    text, started, deadline = b"", None, time.monotonic() + wall_s + 10
    while True:
        ready = [fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000 + 1)]
        if control.fileno() in ready:
            if not control.recv(1 << 16):
                raise EOFError("the caller is gone")
            return {"end": "stopped", "code": 0, "seconds": 0.0 if started is None else time.monotonic() - started}
        if reader in ready:
            chunk = os.read(reader, 1 << 12)
            text += chunk
            if started is None and b"\n" in text:
                started = time.monotonic()
                deadline = started + wall_s
            if not chunk or text.count(b"\n") > 1:
                break
        elif time.monotonic() >= deadline:
            if started is None:
                return {"failed": "the supervisor did not start the program"}
            return {"end": "wall", "code": 0, "seconds": time.monotonic() - started}
    lines = [json.loads(line) for line in text.split(b"\n") if line.strip()]
    for line in lines:
        if "failed" in line:
            return line
    if started is None:
        return {"failed": "the supervisor died before it started the program"}
    end = lines[1] if len(lines) > 1 else {"end": "signal", "code": int(signal.SIGKILL)}  # somebody shot the supervisor
    return dict(end, seconds=time.monotonic() - started)


def supervise(job, status, namespaces):
    """In the supervisor: prepare the run, start the program, wait for it. Returns in the program's process only."""
    if namespaces:
        with contextlib.suppress(OSError):
            write_proc("self/oom_score_adj", "1000")  # when memory runs out it hits the run, not the zygote
        mount("proc", "/proc", "proc", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "subset=pid")
        scratch = "size={}m,nr_inodes=4096,mode=1777".format(job["scratch_mib"])
        mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, scratch)
        os.chdir("/tmp")
    else:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.chdir(job["folder"])
    program = os.fork()
    if program == 0:
        return
    report(status, {"ready": True})
    while True:
        pid, code = os.waitpid(-1, 0)
        if pid == program:
            break
    if os.WIFEXITED(code):
        report(status, {"end": "exit", "code": os.WEXITSTATUS(code)})
    else:
        report(status, {"end": "signal", "code": os.WTERMSIG(code)})
    if not namespaces:
        kill_children()
    os._exit(0)


def kill_children():
    """SIGKILL every child until none is left; orphans of the killed become children in their turn."""
    while True:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                children = [int(pid) for pid in file.read().split()]
        except OSError:
            children = []
        for pid in children:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0 if children else os.WNOHANG)
        except ChildProcessError:
            return
        if not children:
            return


def become_program(job, fds, filter_program):
    """In the program's process: descriptors, limits, and the last rights given up."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # without a pid namespace nobody else ends it with its supervisor
    os.setsid()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, HIGH_FD) for fd in fds]
    for number, fd in enumerate(high[1:]):  # 0, 1, 2, then what the mode needs
        os.dup2(fd, number)
    os.dup2(high[0], HIGH_FD - 1)
    os.closerange(len(fds) - 1, HIGH_FD - 1)
    os.closerange(HIGH_FD, MAX_FILES)

    def both(which, value, hard=None):
        resource.setrlimit(which, (value, value if hard is None else hard))

    both(resource.RLIMIT_CPU, job["cpu_s"], job["cpu_s"] + 1)
    both(resource.RLIMIT_FSIZE, job["file_mib"] << 20)
    both(resource.RLIMIT_NOFILE, job["open_files"])
    both(resource.RLIMIT_CORE, 0)
    both(resource.RLIMIT_NPROC, job["processes"])
    both(resource.RLIMIT_AS, job["memory_mib"] << 20)
    with contextlib.suppress(ValueError, OSError):  # a lower hard limit is as good
        both(resource.RLIMIT_STACK, min(64, job["memory_mib"] // 4) << 20)

    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    check(libc.syscall(SYSTEM_CALLS[os.uname().machine][1], header, nothing), "capset")
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if filter_program:
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filter_program))


# ------------------------------------------------------------------------------------------------------ untrusted code


def run_mode(mode, fds):
    """Run the code and end the process as Python would, without taking the interpreter apart."""
    with open(HIGH_FD - 1, encoding="utf-8") as file:
        request = json.load(file)
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogateescape")  # noqa: SIM115 - Python's own
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115
    sys.argv = ["solution.py"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code, stdout, leave = 0, sys.stdout, os._exit
    try:
        {"program": run_program, "call": run_call, "serve": run_solution, "check": run_asserts}[mode](request)
    except SystemExit as error:
        code = exit_code(error.code)
    except BaseException:
        code = 1
        traceback.print_exc(limit=-10)  # of a million frames of a recursion, the last
    try:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        for stream in {id(stream): stream for stream in (sys.stdout, stdout)}.values():
            if not getattr(stream, "closed", True):
                stream.flush()
    except BaseException:
        code = code or 1
    leave(code)


def exit_code(value):
    """What `sys.exit(value)` means."""
    if value is None:
        return 0
    if isinstance(value, int):
        return value & 0xFF
    print(value, file=sys.stderr)
    return 1


def define(request, name):
    """Execute prelude and program in a fresh module of this name; return its namespace."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    if request["prelude"]:
        exec(compile(request["prelude"], "prelude.py", "exec"), module.__dict__)
    exec(compile(request["program"], "solution.py", "exec"), module.__dict__)
    return module.__dict__


def run_program(request):
    define(request, "__main__")


def find_function(namespace, name):
    """A top-level name, or a method of the class `Solution` (the LeetCode form)."""
    if name in namespace:
        return namespace[name]
    if "Solution" in namespace and hasattr(namespace["Solution"], name):
        return getattr(namespace["Solution"](), name)
    raise NameError(f"name {name!r} is not defined")


def plain(value):
    """For `json.dumps`: what it does not know but data sets mean as lists and numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()  # numpy
    if isinstance(value, (set, frozenset, dict)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{type(value).__name__} is not a JSON value")
    return list(value)


def run_call(request):
    dumps, write = json.dumps, os.write
    namespace = define(request, "solution")
    value = find_function(namespace, request["entry_point"])(*request["args"], **request["kwargs"])
    payload = dumps(value, default=plain).encode()
    while payload:
        payload = payload[write(3, payload) :]


# ------------------------------------------------------------------- asserts in one process, the solution in another
#
# check (asserts)  ──call: name or object, arguments──>  serve (solution)
#                  <──value, object number or exception──
#
# Values cross as plain data and arrive as exact built-in types, so no __eq__ of the solution's is ever asked.


def send_frame(fd, message):
    payload = json.dumps(message).encode()
    payload = struct.pack(">I", len(payload)) + payload
    while payload:
        payload = payload[os.write(fd, payload) :]


def receive_frame(fd):
    """A message, or None at the end of the pipe."""
    head = receive_bytes(fd, 4)
    if head is None:
        return None
    (size,) = struct.unpack(">I", head)
    if size > FRAME_BYTES:
        raise ValueError(f"a message of {size} bytes")
    body = receive_bytes(fd, size)
    return None if body is None else json.loads(body)


def receive_bytes(fd, count):
    parts = []
    while count:
        part = os.read(fd, min(count, 1 << 16))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def encode(value: Any, other) -> Any:
    """Plain data as JSON: lists, strings, small numbers as they are, other types as {tag: content}.

    Args:
        other: called with a value that is not plain data; returns its JSON.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -(2**53) < value < 2**53 else {"int": hex(value)}
    if isinstance(value, float):
        return float(value) if abs(value) < 1e300 else {"float": repr(float(value))}  # infinities and nan are no JSON
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(item, other) for item in list.__iter__(value)]
    if isinstance(value, tuple):
        return {"tuple": [encode(item, other) for item in tuple.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, other), encode(item, other)] for key, item in dict.items(value)]}
    if isinstance(value, (set, frozenset)):
        return {"frozenset" if isinstance(value, frozenset) else "set": [encode(item, other) for item in value]}
    if isinstance(value, complex):
        return {"complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, range):
        return {"range": [encode(number, other) for number in (value.start, value.stop, value.step)]}
    if isinstance(value, types.GeneratorType) or type(value) in (map, filter, zip, enumerate, reversed):
        return {"iterator": [encode(item, other) for item in value]}
    if type(value) is type({}.keys()):
        return {"set": [encode(item, other) for item in value]}
    if type(value) in (type({}.values()), type({}.items())):
        return {"iterator": [encode(item, other) for item in value]}
    if type(value).__module__ == "numpy" and hasattr(value, "item") and not getattr(value, "shape", ()):
        return encode(value.item(), other)
    return other(value)


def decode(data: Any, other) -> Any:
    """The value of `encode`: exact built-in types only. `other` turns {"object": number} back into something."""
    if isinstance(data, list):
        return [decode(item, other) for item in data]
    if not isinstance(data, dict):
        return data
    ((tag, content),) = data.items()
    if tag == "object":
        return other(content)
    if tag == "int":
        return int(content, 16)
    if tag == "float":
        return float(content)
    if tag == "complex":
        return complex(float(content[0]), float(content[1]))
    if tag == "bytes":
        return bytes.fromhex(content)
    if tag == "range":
        return range(*decode(content, other))
    if tag == "dict":
        return {decode(key, other): decode(item, other) for key, item in content}
    make = {"tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}[tag]
    return make(decode(item, other) for item in content) if tag != "iterator" else iter(decode(content, other))


def run_solution(request):
    """Answer calls on descriptors 3 (in) and 4 (out) until the asserts are done."""
    namespace = define(request, "solution")
    objects = []

    def as_object(value):
        objects.append(value)
        return {"object": len(objects) - 1}

    def find(target):
        return find_function(namespace, target) if isinstance(target, str) else objects[target]

    def given(target):
        return getattr(builtins, target) if isinstance(target, str) else objects[target]

    while True:
        message = receive_frame(3)
        if message is None:
            return
        try:
            target = find(message["target"])
            if message["do"] == "call":
                args = decode(message["args"], given)
                kwargs = {name: decode(item, given) for name, item in message["kwargs"].items()}
                value = target(*args, **kwargs)
            elif message["do"] == "get":
                value = getattr(target, message["name"])
            elif message["do"] == "truth":
                value = bool(target)
            else:
                value = setattr(target, message["name"], decode(message["value"], given))
            answer = {"value": encode(value, as_object)}
        except Exception as error:
            answer = {"raised": type(error).__name__, "text": str(error)[:300]}
        send_frame(4, answer)


class SolutionGone(BaseException):
    """The solution's process ended, or sent what no honest one sends. Not for a test's `except Exception`."""


class SolutionError(Exception):
    """The solution raised an exception of a type that is not built in."""


class NotPlainData(TypeError):
    """The asserts passed something that cannot cross to the solution."""


class Solution:
    """The asserts' side of the pipe."""

    def __init__(self):
        self.asked = 0

    def ask(self, **message):
        self.asked += 1
        try:
            send_frame(4, message)
            answer = receive_frame(3)
        except (OSError, ValueError, RecursionError) as error:
            raise SolutionGone(str(error)) from None
        if answer is None:
            raise SolutionGone("the solution ended in the middle of a call")
        try:
            if "raised" not in answer:
                return decode(answer["value"], lambda number: Remote(self, int(number)))
            name, text = str(answer["raised"]), str(answer["text"])
        except Exception as error:
            raise SolutionGone(f"an answer that is no value: {error}") from None
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                error = kind(text)
            except TypeError:  # UnicodeDecodeError and its like want more
                error = SolutionError(name + ": " + text)
            raise error
        raise SolutionError(name + ": " + text)


def refused(name):
    def refuse(self, *args):
        raise TypeError(f"the solution returned an object that is not plain data; {name} is not asked")

    return refuse


class Remote:
    """A function or an object of the solution's. It can be called, and its attributes read and set.

    Comparing it, or asking for its length, raises: those answers would be the solution's own. Its truth is asked, for
    tests like ``assert matches("ab")``: a solution that lies there might have returned True.
    """

    def __init__(self, solution, target):
        object.__setattr__(self, "_solution", solution)
        object.__setattr__(self, "_target", target)

    def __call__(self, *args, **kwargs):
        args = [encode(value, as_remote) for value in args]
        kwargs = {name: encode(value, as_remote) for name, value in kwargs.items()}
        return self._solution.ask(do="call", target=self._target, args=args, kwargs=kwargs)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._solution.ask(do="get", target=self._target, name=name)

    def __setattr__(self, name, value):
        self._solution.ask(do="set", target=self._target, name=name, value=encode(value, as_remote))

    def __bool__(self):
        if isinstance(self._target, str):
            raise TypeError(f"the truth of {self._target} itself; it is not called")
        answer = self._solution.ask(do="truth", target=self._target)
        if not isinstance(answer, bool):
            raise SolutionGone("an answer that is no truth value")
        return answer


NOT_ASKED = "hash eq ne lt le gt ge len iter contains getitem index int float add radd sub mul str repr"
for _name in NOT_ASKED.split():
    setattr(Remote, f"__{_name}__", refused(_name))


def as_remote(value):
    if isinstance(value, Remote) and isinstance(value._target, int):
        return {"object": value._target}
    if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
        return {"object": value.__name__}
    raise NotPlainData(f"the test passes a {type(value).__name__}, which is not plain data")


class AssertNamespace(dict):
    """Globals of the asserts: a name that neither they nor Python define is the solution's."""

    def __init__(self, solution):
        super().__init__(__name__="tests", __builtins__=builtins)
        self.solution = solution

    def __missing__(self, name):
        if hasattr(builtins, name):
            raise KeyError(name)
        return Remote(self.solution, name)


def run_asserts(request):
    """Run set-up and asserts; report on descriptor 5 whether they passed. What they print is ignored."""
    solution = Solution()
    namespace = AssertNamespace(solution)
    verdict = {"passed": False, "line": None, "error": "", "broken": False}
    try:
        exec(compile(request["setup"], "setup.py", "exec"), namespace)
        for name in request["remote"]:
            namespace[name] = Remote(solution, name)  # also where it is a built-in's name
        exec(compile(request["asserts"], "tests.py", "exec"), namespace)
        verdict["passed"] = True
    except BaseException as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == "tests.py"]
        verdict["line"] = frames[-1].lineno if frames else None
        verdict["error"] = f"{type(error).__name__}: {str(error)[:300]}".rstrip(": ")
        # what fails before the solution was asked anything, fails by itself
        verdict["broken"] = solution.asked == 0 or isinstance(error, NotPlainData)
    verdict["asked"] = solution.asked
    payload = json.dumps(verdict).encode()
    while payload:
        payload = payload[os.write(5, payload) :]


# ---------------------------------------------------------------------------------------------------------------- start


def main():
    control = socket.socket(fileno=int(sys.argv[1]))
    config = json.loads(control.recv(1 << 20))
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_FILES, MAX_FILES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a program may send it to its supervisor
    try:
        if config["level"] == "namespaces":
            enter_namespaces(config["root"])
            drop_bounding_set()
        else:
            prctl(PR_SET_CHILD_SUBREAPER, 1)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        for name in PRELOADED.split() + config["preload"]:
            importlib.import_module(name)
    except (OSError, ImportError, KeyError) as error:
        control.send(json.dumps({"failed": str(error)}).encode())
        return
    # a child of an immortal heap copies fewer pages
    gc.collect()
    gc.freeze()
    control.send(json.dumps({"ready": True, "python": sys.version.split()[0]}).encode())
    code = bytes.fromhex(config["filter"])
    serve(control, config["level"], FilterProgram(len(code) // 8, code) if code else None)


if __name__ == "__main__":
    main()
