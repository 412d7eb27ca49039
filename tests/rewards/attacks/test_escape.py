"""Attacks on the walls: files, processes, network and kernel outside of the run's own namespaces."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from memento.rewards.sandbox import Run, Sandbox
from memento.rewards.syscall_filter import PROCESSES, allowed_numbers
from memento.trajectory import RewardResult

Attack = Callable[..., tuple[Run, RewardResult]]

TRY = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def tried(what, *args):
    try:
        result = what(*args)
        return "refused" if isinstance(result, int) and result < 0 else f"DONE {result!r}"[:200]
    except (OSError, ValueError, RuntimeError) as error:
        return "refused"
"""


def refused(run: Run) -> bool:
    """Whether each line the program printed says so, and there is at least one."""
    lines = run.stdout.decode().splitlines()
    return bool(lines) and all(line == "refused" for line in lines)


def test_files_of_this_machine(attack: Attack, tmp_path: Path):
    (tmp_path / "problems.jsonl").write_text("secret")
    paths = [tmp_path / "problems.jsonl", Path(__file__), Path.home(), "/etc/passwd", "/etc/shadow", "/sys", "/root"]
    paths += ["/home", "/var", "/boot", "/run", "/work", "/proc/../etc/hostname", os.getcwd()]
    prefix = str(Path(sys.base_prefix).resolve())
    outside = [str(path) for path in paths if not prefix.startswith(str(path))]
    run, _ = attack(f"import os\nprint([path for path in {outside!r} if os.path.exists(path)])")
    assert run.stdout == b"[]\n"


def test_parents_of_the_interpreter_are_empty(attack: Attack):
    program = (
        "import os, sys\npath, seen = sys.base_prefix, []\nwhile path != '/':\n    below, path = path, "
        "os.path.dirname(path)\n    seen += [name for name in os.listdir(path) if os.path.join(path, name) != below]\n"
        "print(sorted(set(seen)))"
    )
    names = set(eval(attack(program)[0].stdout))
    assert names <= {"usr", "lib", "lib32", "lib64", "bin", "dev", "proc", "tmp", *os.listdir("/usr")}


def test_writing_outside_of_tmp(attack: Attack):
    program = f"""{TRY}
for path in ("/x", "/usr/x", "/dev/x", "/proc/x", "/lib/x", sys.base_prefix + "/x", os.__file__, "/dev/shm/../../x"):
    print(tried(open, path, "a"))
print(tried(os.unlink, os.__file__), tried(os.rename, "/tmp", "/x"), tried(os.chmod, "/usr", 0o777), sep="\\n")
"""
    assert refused(attack(program)[0])


def test_ways_up_and_out(attack: Attack):
    program = f"""{TRY}
os.symlink("/etc/passwd", "/tmp/link")
os.mkdir("/tmp/d")
print(tried(open, "/tmp/link"), tried(os.chroot, "/tmp/d"), tried(os.link, os.__file__, "/tmp/hard"), sep="\\n")
print(tried(open, "../../../../../../etc/passwd"), tried(open, "/proc/self/root/etc/passwd"), sep="\\n")
print(tried(open, "/proc/1/root/etc/passwd"), tried(open, "/proc/self/cwd/../etc/passwd"), sep="\\n")
"""
    assert refused(attack(program)[0])


def test_environment_of_the_caller(attack: Attack, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MEMENTO_SECRET", "s3cret-value")
    program = """
import glob, os
text = repr(dict(os.environ))
for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline"):
    try: text += open(path).read()
    except OSError: pass
print("s3cret" in text, sorted(os.environ))
"""
    found, names = attack(program)[0].stdout.decode().split(" ", 1)
    assert found == "False"
    assert set(eval(names)) <= {"PATH", "HOME", "LANG", "LC_CTYPE", "OPENBLAS_NUM_THREADS"}


def test_other_processes(attack: Attack):
    run, _ = attack(
        "import os\nprint(sorted(p for p in os.listdir('/proc') if p.isdigit()), os.getpid(), os.getppid())"
    )
    assert run.stdout == b"['1', '2'] 2 1\n"


def test_proc_of_the_kernel(attack: Attack):
    program = f"""{TRY}
for path in ("sys/kernel/core_pattern", "sysrq-trigger", "kcore", "kallsyms", "keys", "1/mem", "1/environ", "1/maps"):
    print(tried(open, "/proc/" + path, "rb"))
print(tried(open, "/proc/self/oom_score_adj", "w"), tried(open, "/proc/1/oom_score_adj", "w"), sep="\\n")
"""
    assert refused(attack(program)[0])


def test_killing_what_is_outside(attack: Attack):
    program = f"""
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for pid in (0, -1):
    try: os.kill(pid, signal.SIGTERM)
    except OSError: pass
for pid in (1, {os.getpid()}, {os.getppid()}):
    for number in range(1, 65):
        try: os.kill(pid, number)
        except OSError: pass
print("still here")
"""
    run, _ = attack(program)
    assert run.stdout == b"still here\n"  # pid 1 of the namespace does not take signals from inside


def test_killing_its_supervisor_by_its_real_id(attack: Attack, watched: Sandbox):
    ids = [pid for launcher in watched.pids for pid in (launcher, launcher + 1, launcher + 2)]
    program = f"import os, signal\nfor pid in {ids}:\n    try: os.kill(pid, signal.SIGKILL)\n    except OSError: pass"
    attack(program)  # the fixture finds the zygotes alive


def test_ptrace_and_memory_of_others(attack: Attack):
    program = f"""{TRY}
print(tried(libc.ptrace, 16, 1, 0, 0), tried(libc.ptrace, 0x4206, 1, 0, 0), sep="\\n")
print(tried(libc.syscall, 310, 1, 0, 0, 0, 0, 0), tried(libc.syscall, 311, 1, 0, 0, 0, 0, 0), sep="\\n")
print(tried(libc.syscall, 438, 1, 0, 0), tried(open, "/proc/1/mem", "rb+"), sep="\\n")
"""
    assert refused(attack(program)[0])


def test_network(attack: Attack):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"""{TRY}
import socket
print(tried(socket.create_connection, ("127.0.0.1", {port}), 1))
print(tried(socket.socket), tried(socket.socket, socket.AF_INET, socket.SOCK_DGRAM), sep="\\n")
print(tried(socket.socket, socket.AF_INET6), tried(socket.socket, 16, 3), tried(socket.socket, 17, 3), sep="\\n")
print(tried(socket.getaddrinfo, "example.org", 80), tried(socket.socket, 38), tried(socket.socket, 40), sep="\\n")
"""
        assert refused(attack(program)[0])
        server.settimeout(0.0)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_unix_sockets(attack: Attack, tmp_path: Path):
    with socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as named:
        abstract.bind(f"\0memento-attack-{os.getpid()}")
        abstract.listen()
        named.bind(str(tmp_path / "s"))
        named.listen()
        program = f"""{TRY}
import socket
def connect(address):
    s = socket.socket(socket.AF_UNIX); s.connect(address)
print(tried(connect, "\\0memento-attack-{os.getpid()}"), tried(connect, {str(tmp_path / "s")!r}), sep="\\n")
print(tried(socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM), sep="\\n")
a, b = socket.socketpair()
print(tried(a.connect, "\\0memento-attack-{os.getpid()}"), tried(a.bind, "\\0mine"), tried(a.listen), sep="\\n")
"""
        assert refused(attack(program)[0])


def test_nested_namespaces(attack: Attack):
    program = f"""{TRY}
for flag in (0x10000000, 0x20000, 0x20000000, 0x40000000, 0x8000000, 0x4000000, 0x2000000, 0x80):
    print(tried(libc.unshare, flag))
for flag in (0x10000000, 0x20000, 0x20000000, 0x40000000):
    print(tried(libc.syscall, {clone_number()}, flag | 17, 0, 0, 0, 0))
arguments = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)
print(tried(libc.syscall, 435, arguments, 88))
print(tried(libc.setns, os.open("/proc/1/ns/net", os.O_RDONLY) if os.path.exists("/proc/1/ns/net") else 0, 0))
"""
    run, _ = attack(program)
    lines = run.stdout.decode().splitlines()
    assert (len(lines) == 14 and set(lines) == {"refused"}) or b"PermissionError" in run.stderr


def clone_number() -> int:
    return allowed_numbers(os.uname().machine, processes=True)["clone"]


def test_mounts(attack: Attack):
    program = f"""{TRY}
print(tried(libc.mount, b"none", b"/tmp", b"tmpfs", 0, b""), tried(libc.umount2, b"/proc", 2), sep="\\n")
print(tried(libc.mount, b"/usr", b"/tmp", b"", 4096, None), tried(libc.umount2, b"/tmp", 2), sep="\\n")
print(tried(libc.mount, b"none", b"/usr", b"", 32 | 4096, None), sep="\\n")  # remount, writable
for number in (155, 428, 429, 430, 431, 432, 433, 442, 41, 40):
    if number not in {sorted(allowed_numbers(os.uname().machine, processes=True).values())!r}:
        print(tried(libc.syscall, number, 0, 0, 0, 0, 0))
"""
    assert refused(attack(program)[0])


def test_capabilities_and_user_ids(attack: Attack):
    program = f"""{TRY}
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print([status[name].strip().strip("0") for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")])
print(status["NoNewPrivs"].strip(), status["Seccomp"].strip(), os.getuid(), os.getgid())
print(os.getgroups() in ([], [65534]))
print(tried(os.setuid, 0), tried(os.setgid, 0), tried(os.setgroups, [0]), tried(os.chown, "/tmp", 0, 0), sep="\\n")
print(tried(libc.prctl, 24, 0, 0, 0, 0), tried(os.nice, -5), tried(libc.sethostname, b"x", 1), sep="\\n")
"""
    run, _ = attack(program)
    first, second, third, *rest = run.stdout.decode().splitlines()
    assert first == "['', '', '', '', '']"
    assert (second, third) == ("1 2 1000 1000", "True")
    assert rest and set(rest) == {"refused"}


def test_a_user_id_nobody_has(attack: Attack, watched: Sandbox):
    """Out here the program is neither root nor anybody who has files."""
    if os.geteuid() != 0:
        pytest.skip("an ordinary user has no other id to give")
    launcher = watched.pids[0]
    owner = os.stat(f"/proc/{launcher}").st_uid
    assert owner != 0


def test_programs_with_more_rights(attack: Attack):
    program = f"""{TRY}
import shutil, stat, subprocess
found = [p for folder in ("/usr/bin", "/bin", "/usr/sbin") if os.path.isdir(folder) for p in os.scandir(folder)
         if p.is_file() and p.stat().st_mode & (stat.S_ISUID | stat.S_ISGID)]
for entry in found[:3]:
    done = subprocess.run([entry.path, "--help"], capture_output=True)
shutil.copy(shutil.which("true") or "/usr/bin/true", "/tmp/mine")
os.chmod("/tmp/mine", 0o6755)
child = subprocess.run([sys.executable, "-c", "import os; print(os.getresuid())"], capture_output=True, text=True)
print(child.stdout.strip())
"""
    assert attack(program, wall_s=5)[0].stdout == b"(1000, 1000, 1000)\n"


def test_devices(attack: Attack):
    program = f"""{TRY}
print(sorted(os.listdir("/dev")), flush=True)
import stat
print(tried(os.mknod, "/tmp/disk", 0o660 | stat.S_IFBLK, os.makedev(254, 0)))
print(tried(open, "/dev/mem"), tried(open, "/dev/kmsg"), tried(open, "/dev/tty"), sep="\\n")
"""
    first, *rest = attack(program)[0].stdout.decode().splitlines()
    assert set(eval(first)) <= {"null", "zero", "random", "urandom", "shm", "fd"}
    assert rest == ["refused"] * 4


def test_kernel_interfaces(attack: Attack):
    allowed = sorted(allowed_numbers(os.uname().machine, processes=True).values())
    uprobes = (335, 336)  # which no filter is asked about; from anywhere but a uprobe's own code they are fatal
    program = f"""{TRY}
for number in range(500):
    if number not in {[*allowed, *uprobes]!r} and libc.syscall(number, -1, -1, -1, -1, -1, -1) >= 0:
        print("DONE", number)
print("refused")
"""
    assert refused(attack(program)[0])


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="instructions of x86")
def test_system_calls_by_the_back_door(attack: Attack):
    """32-bit calls (int 0x80) have other numbers: 20 is getpid there, writev here."""
    program = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
print(ctypes.CFUNCTYPE(ctypes.c_int)(address)())
"""
    run, _ = attack(program)
    assert (run.ended, run.code) in (("signal", signal.SIGSYS), ("signal", signal.SIGSEGV)) and not run.stdout
    x32 = "import ctypes, os\nprint(ctypes.CDLL(None, use_errno=True).syscall(0x40000000 | 39))"
    assert attack(x32)[0].stdout == b"-1\n"


def test_terminal_injection(attack: Attack):
    program = f"""{TRY}
import fcntl, termios
for fd in range(3):
    print(tried(fcntl.ioctl, fd, termios.TIOCSTI, b"x"), tried(fcntl.ioctl, fd, 0x541C, b"\\x02"), sep="\\n")
"""
    assert refused(attack(program)[0])


def test_clock_and_priority(attack: Attack):
    program = f"""{TRY}
import time
print(tried(time.clock_settime, time.CLOCK_REALTIME, 0.0), sep="\\n")
print(tried(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(50)), tried(os.setpriority, 0, 0, -10), sep="\\n")
"""
    assert refused(attack(program)[0])


def test_raising_its_limits(attack: Attack):
    program = f"""{TRY}
import resource
for name in ("AS", "NPROC", "FSIZE", "NOFILE", "CPU"):
    limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    print(tried(resource.setrlimit, getattr(resource, "RLIMIT_" + name), limits))
"""
    assert refused(attack(program)[0])


def test_the_next_run_finds_nothing(attack: Attack):
    attack("""
import builtins, json, os, sys, subprocess
for folder in ("/tmp", "/dev/shm"):
    open(folder + "/left-" + folder.replace("/", ""), "w").write("gold")
open("/tmp/sitecustomize.py", "w").write("raise SystemExit")
os.environ["LEFT"] = "gold"
builtins.left = json.left = sys.left = "gold"
json.dumps = lambda *a, **k: "1"
sys.path.insert(0, "/tmp")
""")
    program = """
import builtins, json, os, sys
print(os.listdir("/tmp"), os.environ.get("LEFT"), [hasattr(m, "left") for m in (builtins, json, sys)], json.dumps([2]))
"""
    run, _ = attack(program)
    assert run.stdout == b"[] None [False, False, False] [2]\n"


def test_earlier_runs_are_not_in_memory(attack: Attack):
    """The zygote, whose memory every run gets a copy of, never holds a program or an input."""
    attack("x = 'earlier-program-77c1'\nprint(x)", test={"input": "earlier-input-77c1", "output": "never-printed-77c1"})
    program = """
import ctypes, re
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # may be looked at, by itself
needle = re.compile(b"(?:earlier-program|earlier-input|never-printed)-77c[1]")  # does not find itself
found, searched = [], 0
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb") as memory:
    for line in maps:
        match = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
        if match and "[v" not in line:
            start, end = (int(x, 16) for x in match.groups())
            memory.seek(start)
            try: text = memory.read(min(end - start, 64 << 20))
            except OSError: continue
            searched += len(text)
            found += needle.findall(text)
print(found, searched > 1 << 20)
"""
    run, _ = attack(program)
    assert run.stdout == b"[] True\n", run


def test_what_the_weaker_level_takes_away():
    """Exactly the calls that signal or start other processes."""
    machine = os.uname().machine
    difference = set(allowed_numbers(machine, processes=True)) - set(allowed_numbers(machine, processes=False))
    assert difference <= PROCESSES and "kill" in difference
    assert ctypes.sizeof(ctypes.c_void_p) == 8
