"""The sandbox itself: levels and their refusal, interpreters, many at once, zygotes that die, nothing left behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import memento
from memento.config import RewardsConfig
from memento.errors import UserError
from memento.rewards.memory_cgroup import MemoryCgroup
from memento.rewards.sandbox import Limits, Sandbox, SandboxError, why_no_namespaces
from memento.rewards.syscall_filter import (
    ALLOW,
    ARCHITECTURES,
    DENY,
    FIRST_ARGUMENT,
    KILL,
    LD,
    NUMBER,
    RET,
    UNKNOWN,
    Instruction,
    allowed_numbers,
    filter_program,
)

EASY = Limits(wall_s=20)
ROOT = Path(memento.__file__).absolute().parents[1]

needs_namespaces = pytest.mark.skipif(bool(why_no_namespaces()), reason=why_no_namespaces())


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def gone(pids: list[int]) -> bool:
    for _ in range(200):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


# ------------------------------------------------------------------------------------------------ levels


@pytest.mark.parametrize("level", ["subprocess", pytest.param("namespaces", marks=needs_namespaces)])
def test_a_level_says_what_it_is_and_leaves_nothing(level: Any, scratch: Path, caplog: pytest.LogCaptureFixture):
    descriptors = len(os.listdir("/proc/self/fd"))
    with caplog.at_level("INFO"):
        sandbox = Sandbox(level, slots=2)
    assert sandbox.level.value == level and sandbox.description.startswith(f"{level} (system calls filtered")
    assert f"isolation level {level}" in caplog.text
    for _ in range(5):
        assert sandbox.run_program("print(input())", "a", EASY).stdout == b"a\n"
        assert sandbox.check_asserts("def f(): return 1", "assert f() == 1", EASY).passed
    assert list(scratch.iterdir()) == []
    pids = sandbox.pids
    assert len(pids) == 2
    below = [int(pid) for p in pids for pid in Path(f"/proc/{p}/task/{p}/children").read_text().split()]
    sandbox.close()
    sandbox.close()
    assert gone(pids + below)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert list(scratch.iterdir()) == []
    with pytest.raises(SandboxError, match="closed"):
        sandbox.run_program("", "", EASY)


REFUSE = """
import ctypes, struct, sys
sys.path[:0] = {path!r}
libc = ctypes.CDLL(None)
code = b"".join(struct.pack("<HBBI", *i) for i in {filter!r})
buffer = ctypes.create_string_buffer(code, len(code))
class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(code) // 8, ctypes.addressof(buffer))), 0, 0) == 0
from memento.errors import UserError
from memento.rewards.sandbox import Limits, Sandbox, why_no_namespaces
try:
    Sandbox("namespaces")
except UserError as error:
    print(error)
assert why_no_namespaces()
sandbox = Sandbox("subprocess")
print(sandbox.run_program("print(6 * 7)", "", Limits(wall_s=20)).stdout, sandbox.level.value)
sandbox.close()
"""


@needs_namespaces
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the number of unshare")
def test_where_namespaces_are_forbidden_it_refuses_and_says_what_to_do():
    """As in a container: a seccomp profile under which unshare is not permitted."""
    profile = [(0x20, 0, 0, NUMBER), (0x15, 0, 1, 272), (0x06, 0, 0, DENY), (0x06, 0, 0, ALLOW)]
    code = REFUSE.format(path=sys.path, filter=profile)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    refusal, weaker = done.stdout.splitlines()
    assert "rewards.sandbox is 'namespaces'" in refusal and "Operation not permitted" in refusal
    assert "user.max_user_namespaces" in refusal and "rewards.sandbox=subprocess" in refusal
    assert weaker == "b'42\\n' subprocess"


def test_there_is_no_level_that_weakens_itself():
    with pytest.raises(ValueError, match="namespaces"):
        RewardsConfig.model_validate({"sandbox": "auto"})
    assert RewardsConfig().sandbox == "namespaces"


ORDINARY = {
    "an ordinary user": ([], {"user": 12345, "group": 12345, "extra_groups": []}),
    # what root is in most containers
    "root that may not mount": (["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all"], {}),
}


@needs_namespaces
@pytest.mark.parametrize("who", ORDINARY)
def test_those_with_fewer_rights_have_it_too(tmp_path: Path, who: str):
    prefix, options = ORDINARY[who]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    python = next((p for p in (f"/usr/bin/{version}", f"/usr/local/bin/{version}") if os.access(p, os.X_OK)), None)
    if os.geteuid() != 0 or python is None or (prefix and shutil.which(prefix[0]) is None):
        pytest.skip("needs root, to become somebody else, and a Python that everybody may run")
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents:
        if folder.owner() == "root" and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o001)
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT), *[p for p in sys.path if p.endswith('site-packages')]]!r}\n"
        "from memento.rewards.sandbox import Sandbox, Limits\n"
        "sandbox = Sandbox('namespaces')\n"
        'look = \'import os; print(os.getuid(), os.listdir("/tmp"), os.path.exists("/etc"))\'\n'
        "print(sandbox.run_program(look, '', Limits(wall_s=20)).stdout, sandbox.level.value)\n"
        "import os; print(os.stat(f'/proc/{sandbox.pids[0]}').st_uid)\nsandbox.close()"
    )
    done = subprocess.run(
        [*prefix, python, "-c", code],
        cwd="/",
        env={"TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": "/tmp"},
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )
    if "Permission denied" in done.stderr and "memento" in done.stderr:
        pytest.skip("this checkout can be read by its owner only")
    assert done.stdout.startswith("b'1000 [] False\\n' namespaces\n"), done.stderr
    assert int(done.stdout.split()[-1]) != 0


# ------------------------------------------------------------------------------------------------ interpreters


@needs_namespaces
def test_the_interpreter_and_its_packages_are_configurable():
    pytest.importorskip("numpy")
    where = "import sys\nprint(sys.prefix, 'numpy' in sys.modules)"
    with Sandbox() as plain:
        assert plain.run_program(where, "", EASY).stdout.decode() == f"{os.path.realpath(sys.base_prefix)} False\n"
    if sys.prefix.startswith("/tmp/"):
        with pytest.raises(UserError, match="lies under /tmp, which is private to each run"):
            Sandbox("namespaces", python=sys.executable)
        return
    with Sandbox(python=sys.executable, preload=["numpy"]) as mine:
        assert mine.run_program(where, "", EASY).stdout.decode() == f"{sys.prefix} True\n"
        product = "import numpy as np\nprint(np.arange(4).sum(), np.ones((9, 9)) @ np.ones(9))"
        assert mine.run_program(product, "", Limits(wall_s=20, memory_mib=1024)).stdout.startswith(b"6 [9.")
        call = mine.call_function("import numpy as np\ndef f(): return [np.int64(3), np.eye(2)]", "f", [], {}, EASY)
        assert (call.returned, call.value) == (True, [3, [[1.0, 0.0], [0.0, 1.0]]]), call


def test_an_interpreter_that_is_none():
    with pytest.raises(UserError, match=r"sandbox_python: there is no executable /nowhere/python"):
        Sandbox("subprocess", python="/nowhere/python")
    with pytest.raises(UserError, match="sandbox_python"):
        Sandbox("subprocess", python="/bin/true")
    with pytest.raises(UserError, match="no_such_module"):
        Sandbox("subprocess", preload=["no_such_module"])


# ------------------------------------------------------------------------------------------------ many, and deaths


@needs_namespaces
def test_answers_reach_their_callers():
    sandbox = Sandbox(slots=2)
    with ThreadPoolExecutor(8) as threads:
        runs = threads.map(lambda n: sandbox.run_program("print(int(input()) ** 2)", str(n), EASY), range(60))
        assert [int(run.stdout) for run in runs] == [n * n for n in range(60)]
        checked = threads.map(
            lambda n: sandbox.check_asserts(f"def f(): return {n}", f"assert f() == {n - n % 3}", EASY), range(12)
        )
        assert [run.passed for run in checked] == [n % 3 == 0 for n in range(12)]
    sandbox.close()


@needs_namespaces
def test_a_killed_zygote_costs_no_run():
    sandbox = Sandbox(slots=2)
    stop, rng, kills = threading.Event(), random.Random(0), []

    def killer() -> None:
        while not stop.wait(rng.uniform(0.3, 0.9)):
            for pid in rng.sample(sandbox.pids, k=min(1, len(sandbox.pids))):
                os.kill(pid, signal.SIGKILL)
                kills.append(pid)

    thread = threading.Thread(target=killer)
    thread.start()
    failed, n, end = 0, 0, time.monotonic() + 60
    while n < 120 or (len(kills) < 4 and time.monotonic() < end):
        n += 1
        try:
            assert sandbox.run_program("print(int(input()) + 1)", str(n), EASY).stdout == f"{n + 1}\n".encode()
        except SandboxError:
            failed += 1  # hit twice in a row: no verdict, and no wrong one
    stop.set()
    thread.join()
    sandbox.close()
    assert len(kills) >= 4 and failed <= len(kills) // 2
    assert gone(kills)


@pytest.mark.parametrize("level", ["subprocess", pytest.param("namespaces", marks=needs_namespaces)])
def test_everything_ends_with_a_killed_caller(level: str, tmp_path: Path):
    code = (
        "import os, signal, sys, threading, time\nfrom memento.rewards.sandbox import Limits, Sandbox\n"
        f"sandbox = Sandbox({level!r}, slots=2)\n"
        "def run(program):\n    sandbox.run_program(program, '', Limits(wall_s=60))\n"
        "def both(program):\n    threads = [threading.Thread(target=run, args=(program,), daemon=True) for _ in '12']\n"
        "    for thread in threads: thread.start()\n    return threads\n"
        "for thread in both('import time; time.sleep(5)'): thread.join()\n"  # both slots have started
        "both('while True: pass')\ntime.sleep(1)\n"
        "def tree(pid):\n    below = open(f'/proc/{pid}/task/{pid}/children').read().split()\n"
        "    return [pid, *(p for child in below for p in tree(int(child)))]\n"
        "print(*(p for launcher in sandbox.pids for p in tree(launcher)), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == (8 if level == "namespaces" else 6), done.stderr
    assert gone(pids)
    assert list(tmp_path.iterdir()) == []


@needs_namespaces
def test_memory_cgroup(scratch: Path):
    others = cgroups()  # of sandboxes that other tests have open in this process
    sandbox = Sandbox()
    if "no memory cgroup" in sandbox.description:
        sandbox.close()
        pytest.skip("no memory cgroup here")
    limits = Limits(wall_s=6, memory_mib=128)
    # seven processes of 100 MiB each: the kernel kills some, and the last to write is one of the few left
    greedy = (
        "import os, time\nfor _ in range(6):\n    if os.fork() == 0: break\nx = b'x' * (100 << 20)\ntime.sleep(1)\n"
        "open('/tmp/alive', 'a').write('.')\ntime.sleep(1)\nprint(len(open('/tmp/alive').read()))"
    )
    run = sandbox.run_program(greedy, "", limits)
    assert run.ended == "memory" or int(run.stdout.split()[-1]) < 3, run
    alone = sandbox.run_program("x = b'x' * (80 << 20)\nprint(len(x))", "", limits)
    assert alone.stdout == b"83886080\n"
    assert len(cgroups()) > len(others)
    sandbox.close()
    assert cgroups() == others


def cgroups() -> list[Path]:
    return sorted(p for p in Path("/sys/fs/cgroup").glob(f"**/memento-sandbox-{os.getpid()}-*") if p.is_dir())


def test_cgroups_of_the_dead_are_cleared_away():
    process = subprocess.Popen(["sleep", "60"])
    try:
        cgroup = MemoryCgroup.create(f"{os.getpid()}-t", process.pid)
        if cgroup is None:
            pytest.skip("no memory cgroup here")
        (folder,) = [path for path in cgroups() if path.name.endswith("-t")]
        abandoned = folder.with_name("memento-sandbox-999999999-1")
        abandoned.mkdir()
        other = MemoryCgroup.create(f"{os.getpid()}-u", process.pid)
        assert other is not None and not abandoned.exists() and folder.exists()
    finally:
        process.kill()
        process.wait()
    cgroup.remove()
    other.remove()
    assert not folder.exists()


# ------------------------------------------------------------------------------------------------ the filter


def judged(program: list[Instruction], number: int, *args: int, architecture: int) -> int:
    """What the kernel's interpreter makes of one call: classic BPF over struct seccomp_data."""
    words = {NUMBER: number, 4: architecture}
    words |= {FIRST_ARGUMENT + 8 * n: value & 0xFFFFFFFF for n, value in enumerate(args)}
    at, accumulator = 0, 0
    while True:
        code, if_true, if_false, constant = program[at]
        at += 1
        if code == RET:
            return constant
        if code == LD:
            accumulator = words[constant]
        elif code == 0x54:
            accumulator &= constant
        else:
            test = {0x15: accumulator == constant, 0x25: accumulator > constant, 0x35: accumulator >= constant}
            at += if_true if test.get(code, bool(accumulator & constant)) else if_false


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize("processes", [True, False])
def test_the_filter_says_what_its_list_says(machine: str, processes: bool):
    architecture = ARCHITECTURES[machine][1]
    program = filter_program(machine, processes=processes)
    numbers = allowed_numbers(machine, processes=processes)
    assert len(program) < 4096 and all(0 <= jump < 256 for _, *jumps, _ in program for jump in jumps)

    def verdict(number: int, *args: int) -> int:
        return judged(program, number, *args, *[0] * (3 - len(args)), architecture=architecture)

    special = {numbers["clone"], numbers["ioctl"], numbers["socketpair"]}
    for number in range(600):
        if number in special:
            continue
        expected = UNKNOWN if number > 450 or number == 435 else ALLOW if number in numbers.values() else DENY
        assert verdict(number) == expected, number
    assert verdict(0x40000000 + 1) == (DENY if machine == "x86_64" else UNKNOWN)
    assert judged(program, 1, 0, 0, 0, architecture=0x40000003) == KILL

    assert verdict(numbers["clone"], 17) == (ALLOW if processes else DENY), "a process"
    assert verdict(numbers["clone"], 0x3D0F00) == ALLOW, "a thread"
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict(numbers["clone"], 17 | flag) == DENY
    assert verdict(numbers["ioctl"], 0, 0x5401) == ALLOW
    assert verdict(numbers["ioctl"], 0, 0x5412) == verdict(numbers["ioctl"], 0, 0x541C) == DENY
    assert verdict(numbers["socketpair"], 1, 1) == verdict(numbers["socketpair"], 1, 1 | 0o2000000) == ALLOW
    assert verdict(numbers["socketpair"], 1, 2) == verdict(numbers["socketpair"], 2, 1) == DENY


DANGEROUS = """
socket connect bind listen accept accept4 ptrace process_vm_readv process_vm_writev unshare setns mount
umount2 pivot_root chroot bpf perf_event_open userfaultfd io_uring_setup io_uring_enter keyctl add_key
request_key memfd_create shmget msgget semget mq_open kexec_load init_module finit_module open_by_handle_at
name_to_handle_at personality setuid setgid setresuid setgroups capset seccomp reboot swapon acct quotactl
pidfd_getfd kcmp move_pages mbind clone3 splice vmsplice mlock syslog sethostname clock_settime settimeofday
"""


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_nothing_dangerous_is_on_the_list(machine: str):
    names = set(allowed_numbers(machine, processes=True))
    numbers = list(allowed_numbers(machine, processes=True).values())
    assert len(numbers) == len(set(numbers)), "a number stands under two names"
    for word in DANGEROUS.split():
        assert word not in names


HEADERS = {
    "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
    "aarch64": "/usr/include/asm-generic/unistd.h",
}


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_numbers_are_the_kernels(machine: str):
    header = Path(HEADERS[machine])
    if not header.exists():
        pytest.skip(f"no {header}")
    real: dict[str, int] = {}
    for line in header.read_text().splitlines():
        words = line.split()
        if len(words) >= 3 and words[0] == "#define" and words[1].startswith("__NR") and words[2].isdigit():
            real[words[1].removeprefix("__NR3264_").removeprefix("__NR_")] = int(words[2])
    if machine == "aarch64":
        real["newfstatat"] = real.pop("fstatat")
    ours = allowed_numbers(machine, processes=True)
    assert {name: real.get(name) for name in ours} == ours
