"""Runs one untrusted Python program. Started by `memento.rewards.subprocess_sandbox`, never imported.

    python -I sandbox_launcher.py REQUEST_FD STATUS_FD REPLY_FD      (standard library only, one thread)

    launcher              unshares namespaces, waits
      `- supervisor       pid 1 of the new pid namespace: mounts a private root, waits, reports; all die with it
           `- program     other uid where possible, no capabilities, resource limits; runs the model's code

Without namespaces (level "subprocess") launcher and supervisor are one process, a "subreaper" that inherits daemons the
program leaves behind and kills them; that level limits accidents, not attacks.

What a program could gain by lying to this file: nothing. Expected outputs are not in this process, on its disk or in
its environment; the parent compares. The status pipe reports only how the program ended, which can cost a point but
never give one.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import types

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWCGROUP = 0x10000000, 0x20000000, 0x40000000, 0x2000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 1, 38, 36
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
SYS_MOUNT_SETATTR = 442
AT_RECURSIVE, AT_FDCWD = 0x8000, -100
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2

libc = ctypes.CDLL(None, use_errno=True)


def check(result, what):
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def mount(source, target, kind, flags, options=""):
    done = libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    check(done, f"mount {target}")


def prctl(option, value):
    check(libc.prctl(option, value, 0, 0, 0), f"prctl {option}")


def enter_namespaces():
    """Unshare everything. As real root without a user namespace, so that a program can be given a uid of its own."""
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 and libc.unshare(flags) == 0:
        return
    check(libc.unshare(flags | CLONE_NEWUSER), "unshare user, pid, network, ipc and mount namespaces")
    for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {uid} 1"), ("gid_map", f"65534 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def private_root(root, scratch_mib):
    """A root file system of its own: system libraries and this Python read-only, empty /tmp, a few devices.

    No home, no working tree, no /etc, no data sets: what is not mounted cannot be read.
    """
    machine = os.uname().machine
    mount("none", "/", "none", MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    for path in dict.fromkeys(["/usr", "/lib", "/lib32", "/lib64", "/bin", sys.base_prefix, sys.base_exec_prefix]):
        inside = root + path
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
        elif os.path.isdir(path) and not os.path.exists(inside):
            os.makedirs(inside)
            mount(path, inside, "none", MS_BIND | MS_REC)
    os.mkdir(root + "/dev")
    for device in ("null", "zero", "random", "urandom"):
        open(f"{root}/dev/{device}", "w").close()
        mount(f"/dev/{device}", f"{root}/dev/{device}", "none", MS_BIND)
    os.mkdir(root + "/proc")
    # While the old /proc can still be seen: the kernel allows a new one only then. Where a container hides parts of
    # its /proc it is refused; an empty /proc is the stricter choice.
    with contextlib.suppress(OSError):
        mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.mkdir(root + "/tmp")
    os.chdir(root)
    check(libc.syscall(SYS_PIVOT_ROOT[machine], b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount the old root")
    os.chdir("/")
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    done = libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    check(done, "mount_setattr read-only")
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={scratch_mib}m,nr_inodes=4096,mode=1777")
    os.chdir("/tmp")


def drop_privileges():
    """In the program's process: another uid if we are real root, no capabilities, none to be gained."""
    if os.geteuid() == 0:
        # a uid of its own, so that the process limit counts this program alone
        stranger = (1 << 20) + int.from_bytes(os.urandom(4), "little") % (1 << 29)
        try:
            os.setgroups([])
            os.setresgid(stranger, stranger, stranger)
            os.setresuid(stranger, stranger, stranger)
        except OSError:  # inside a container that maps only 65,536 ids
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
    else:
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        check(libc.syscall(SYS_CAPSET[os.uname().machine], header, nothing), "capset")


def limit(request):
    def both(which, value, hard=None):
        resource.setrlimit(which, (value, value if hard is None else hard))

    both(resource.RLIMIT_CPU, request["cpu_s"], request["cpu_s"] + 1)
    both(resource.RLIMIT_FSIZE, request["file_mib"] << 20)
    both(resource.RLIMIT_NOFILE, request["open_files"])
    both(resource.RLIMIT_CORE, 0)
    both(resource.RLIMIT_NPROC, request["processes"])
    both(resource.RLIMIT_AS, request["memory_mib"] << 20)


def report(status, **message):
    os.write(status, json.dumps(message).encode() + b"\n")


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


def supervise(program, status, namespaces):
    """Wait for the program, adopting what it leaves behind; report how it ended."""
    while True:
        pid, code = os.waitpid(-1, 0)
        if pid == program:
            break
    how = {"exit": os.WEXITSTATUS(code)} if os.WIFEXITED(code) else {"signal": os.WTERMSIG(code)}
    if not namespaces:
        kill_children()
    report(status, **how)


def stop(*_):
    """The deadline: the parent sends SIGTERM, or the launcher's own alarm rings because the parent is gone."""
    kill_children()
    os._exit(0)


def launch(request, status, reply):
    """Returns in the program's process only."""
    namespaces = request["level"] == "namespaces"
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, request["wall_s"] + 15)
    try:
        if namespaces:
            enter_namespaces()
            supervisor = os.fork()
            if supervisor:
                os.close(status)
                os.waitpid(supervisor, 0)
                os._exit(0)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # whoever kills the launcher kills the whole pid namespace
            signal.setitimer(signal.ITIMER_REAL, request["wall_s"] + 15)  # timers do not survive a fork
            private_root(request["root"], request["scratch_mib"])
        else:
            prctl(PR_SET_CHILD_SUBREAPER, 1)
        program = os.fork()
    except OSError as error:
        report(status, failed=str(error))
        os._exit(0)
    if program:
        report(status, ready=True, group=None if namespaces else program)
        os.close(reply)
        supervise(program, status, namespaces)
        os._exit(0)  # pid 1 of the namespace: the kernel kills whatever is left in it
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        os.setsid()
        if namespaces:
            drop_privileges()
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        limit(request)
    except OSError as error:
        report(status, failed=str(error))
        os._exit(0)


def find_function(namespace, name):
    """A top-level function, or a method of the class `Solution` (the LeetCode form)."""
    if name in namespace:
        return namespace[name]
    return getattr(namespace["Solution"](), name)


def main():
    request_fd, status, reply = (int(argument) for argument in sys.argv[1:4])
    with open(request_fd, encoding="utf-8") as file:
        request = json.load(file)
    launch(request, status, reply)

    call = request.pop("call")
    if call:
        os.dup2(reply, 3)
    os.closerange(4 if call else 3, 1 << 20)
    source, dumps, write = request.pop("program"), json.dumps, os.write
    module = types.ModuleType("solution" if call else "__main__")
    sys.modules[module.__name__] = module
    sys.argv = ["solution.py"]
    exec(compile(source, "solution.py", "exec"), module.__dict__)
    if call:
        value = find_function(module.__dict__, call["entry_point"])(*call["args"], **call["kwargs"])
        payload = dumps({"id": call["id"], "value": value}).encode()
        while payload:
            payload = payload[write(3, payload) :]


if __name__ == "__main__":
    main()
