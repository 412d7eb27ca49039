"""Attacks that use something up. The limit holds, the run ends in time, and the next one is as good as the first."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from memento.rewards.sandbox import Run, Sandbox
from memento.trajectory import Outcome, RewardResult

Attack = Callable[..., tuple[Run, RewardResult]]

SOON_S = 8.0
"""More than any of these takes, and less than what they would take if nothing stopped them."""


@pytest.fixture(autouse=True)
def in_time():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < SOON_S


def test_fork_bomb(attack: Attack):
    run, result = attack("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", wall_s=0.4)
    assert result.outcome is Outcome.TIMEOUT and run.ended in ("wall", "memory")


def test_fork_bomb_is_counted(attack: Attack):
    program = """
import os, time
made = 0
try:
    while made < 1000:
        if os.fork() == 0:
            time.sleep(30)
        made += 1
except OSError as error:
    print(made, error.errno, flush=True)
    os._exit(0)
"""
    made, error = attack(program)[0].stdout.split()
    assert int(made) <= 64 and int(error) == 11


def test_thread_bomb(attack: Attack):
    program = """
import threading, time
made = 0
try:
    while made < 1000:
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
        made += 1
except RuntimeError:
    print(made, flush=True)
    __import__("os")._exit(0)
"""
    assert int(attack(program)[0].stdout) <= 64


def test_zombies(attack: Attack):
    program = (
        "import os\nfor _ in range(5000):\n    try:\n        if os.fork() == 0: os._exit(0)\n    except OSError: pass"
    )
    attack(program, wall_s=1.0)


def test_daemon(attack: Attack):
    program = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3): os.close(fd)
        time.sleep(600)
    os._exit(0)
os.wait()
print("left one behind")
"""
    assert attack(program)[0].stdout == b"left one behind\n"  # the fixture finds that it is gone


def test_memory(attack: Attack):
    run, _ = attack("x = bytearray(1 << 34)", memory_limit_mib=256)
    assert b"MemoryError" in run.stderr
    run, _ = attack("x = []\nwhile True: x.append(bytearray(1 << 20))", memory_limit_mib=128)
    assert b"MemoryError" in run.stderr


def test_memory_of_many_processes_together(attack: Attack, watched: Sandbox):
    if "no memory cgroup" in watched.description:
        pytest.skip("no memory cgroup here")
    program = """
import os, time
for _ in range(16):
    if os.fork() == 0:
        x = bytearray(b"x") * (40 << 20)
        time.sleep(30)
time.sleep(1.5)
try:
    while True: os.waitpid(-1, os.WNOHANG) == (0, 0) and 1 / 0
except (ChildProcessError, ZeroDivisionError): pass
print("all fit")
"""
    before = available_mib()
    run, _ = attack(program, wall_s=4, memory_limit_mib=64)
    # the kernel kills the largest again and again; what is left at the end never held more than the limit
    assert before - available_mib() < 500
    assert run.ended in ("memory", "exit", "signal", "wall")


def available_mib() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("MemAvailable"))


def test_memory_that_is_no_address_space(attack: Attack):
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.memfd_create(b"x", 0), libc.shmget(0, 1 << 30, 0o1600), libc.mq_open(b"/q", 66, 0o600, None))
"""
    assert attack(program)[0].stdout == b"-1 -1 -1\n"


def test_disk_flood(attack: Attack):
    free = shutil.disk_usage("/tmp").free
    program = """
import os
written = 0
try:
    for n in range(10000):
        with open(f"/tmp/{n}", "wb") as file:
            file.write(bytes(8 << 20))
        written += 8
except OSError as error:
    print(written, error.errno)
"""
    written, error = attack(program)[0].stdout.split()
    assert int(written) <= 64 and int(error) == 28
    assert free - shutil.disk_usage("/tmp").free < 1 << 30


def test_one_large_file(attack: Attack):
    run, _ = attack("f = open('/tmp/x', 'wb', buffering=0)\nwhile f.write(bytes(1 << 20)): pass")
    assert b"OSError" in run.stderr or run.ended == "signal"


def test_inode_flood(attack: Attack):
    program = """
import os
made = 0
try:
    while made < 100000:
        os.close(os.open(f"/tmp/{made}", os.O_CREAT | os.O_WRONLY)); made += 1
except OSError as error:
    print(made, error.errno)
"""
    made, error = attack(program)[0].stdout.split()
    assert int(made) < 5000 and int(error) == 28


def test_deep_folders(attack: Attack):
    attack("import os\nfor _ in range(3000):\n    os.mkdir('d' * 200); os.chdir('d' * 200)")


def test_output_flood(attack: Attack):
    run, _ = attack("while True: print('x' * 100000)")
    assert run.ended == "output" and len(run.stdout) <= 1 << 20
    run, _ = attack("import os\nwhile True:\n    try: os.write(1, b'x' * 65536)\n    except OSError: pass", wall_s=0.3)
    assert len(run.stdout) <= 1 << 20


def test_error_flood(attack: Attack):
    run, _ = attack("import sys\nfor _ in range(3000): sys.stderr.write('e' * 100000)\nprint('x')")
    assert len(run.stderr) <= 1 << 16


def test_sparse_output(attack: Attack):
    run, _ = attack("import os\nos.ftruncate(1, 10 << 20)")
    assert run.ended == "output" and len(run.stdout) <= 1 << 20


def test_reply_flood(attack: Attack):
    run, _ = attack("def f(): return 'x' * (1 << 23)", test={"expected": "x"})
    assert not run.returned


def test_infinite_loop_with_signals_ignored(attack: Attack):
    program = (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass"
    )
    assert attack(program, wall_s=0.3)[1].outcome is Outcome.TIMEOUT


def test_sleeping_and_stopped(attack: Attack):
    assert attack("import time\ntime.sleep(600)", wall_s=0.3)[1].outcome is Outcome.TIMEOUT
    assert attack("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", wall_s=0.3)[1].outcome is Outcome.TIMEOUT


def test_threads_that_never_end(attack: Attack):
    program = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()"
    assert attack(program, wall_s=0.3)[1].outcome is Outcome.TIMEOUT


def test_at_exit_for_ever(attack: Attack):
    program = "import atexit, time\natexit.register(time.sleep, 600)"
    assert attack(program, wall_s=0.3)[1].outcome is Outcome.TIMEOUT


def test_descriptors(attack: Attack):
    program = (
        "import os\nn = 0\ntry:\n    while n < 10000:\n        os.pipe(); n += 1\nexcept OSError as error:\n"
        "    print(n, error.errno)"
    )
    pipes, error = attack(program)[0].stdout.split()
    assert int(pipes) < 128 and int(error) == 24


def test_huge_integers(attack: Attack):
    assert attack("x = 9 ** 9 ** 9\nprint(x)", wall_s=0.4)[1].outcome is not Outcome.CORRECT
    attack("def f(): return 10 ** 200000", test={"expected": 1})
    attack("def f(): return 1 << (1 << 40)", test={"expected": 1})


def test_recursion(attack: Attack):
    attack("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()", wall_s=1.0)


def test_stack_overflow_in_c(attack: Attack):
    program = "import sys\nsys.setrecursionlimit(10 ** 8)\nx = []\nfor _ in range(10 ** 6): x = [x]\nprint(repr(x)[:1])"
    run, _ = attack(program)
    assert run.ended in ("signal", "wall") or b"Error" in run.stderr


def test_source_that_blows_up_the_compiler(attack: Attack):
    attack("(" * 100_000 + ")" * 100_000)
    attack("x = " + "-" * 200_000 + "1")
    attack("1" + "**9" * 50)


def test_exhausted_entropy_and_timers(attack: Attack):
    program = (
        "import os, signal\nfor _ in range(200): os.urandom(1 << 16)\n"
        "signal.setitimer(signal.ITIMER_REAL, 1e-6, 1e-6)\nwhile True: pass"
    )
    run, _ = attack(program, wall_s=0.5)
    assert run.ended == "signal"


def test_cpu_of_many_processes(attack: Attack):
    program = "import os\nfor _ in range(8): os.fork()\nwhile True: pass"
    start = os.times()
    attack(program, wall_s=0.4)
    end = os.times()
    assert end.elapsed - start.elapsed < 5
