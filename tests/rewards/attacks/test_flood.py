"""Ten thousand hostile jobs through one scorer: none correct, nothing left of any, memory flat."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from memento.config import RewardsConfig
from memento.problems import Problem
from memento.rewards import Scorer
from memento.trajectory import Outcome

from .conftest import cgroups_of_ours, children, leftovers

JOBS = int(os.environ.get("MEMENTO_HOSTILE_JOBS", "10000"))
SECRET = "the-expected-output-5d1f"

QUICK = (
    "import os; os._exit(0)",
    "import sys; sys.exit(0)",
    "print('PASS')",
    "raise MemoryError",
    "x = bytearray(1 << 40)",
    "import os\nif os.fork() == 0:\n    os.setsid()\n    import time; time.sleep(600)",
    "import os\nfor _ in range(3):\n    if os.fork() == 0:\n        import time; time.sleep(600)",
    "import threading as t, time\nfor _ in range(99): t.Thread(target=time.sleep, args=(600,), daemon=True).start()",
    "import os\nfor n in range(10000): os.mkdir(f'/tmp/{n}')",
    "with open('/tmp/x', 'wb') as f:\n    while True: f.write(bytes(1 << 20))",
    "while True: print('x' * 100000)",
    "import sys\nfor _ in range(300): sys.stderr.write('e' * 100000)",
    "import os, signal\nfor pid in (1, os.getppid(), -1): os.kill(pid, signal.SIGKILL)",
    "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
    "import socket\nsocket.socket()",
    "import ctypes\nctypes.string_at(0)",
    "import sys\nsys.setrecursionlimit(10 ** 4)\ndef g(): g()\ng()",
    "import os\nwhile True: os.pipe()",
    "import os\nfor fd in range(64):\n    try: os.write(fd, b'forged')\n    except OSError: pass",
    "import os\nfor fd in range(64):\n    try: os.close(fd)\n    except OSError: pass",
    "import os\nos.chdir('/proc/self/fd')\nopen('/etc/passwd')",
    "import builtins, json\njson.dumps = None\ndel builtins.__import__",
    "def",
    "\x00",
    "import os\nos.execv('/bin/sh', ['sh', '-c', 'sleep 600 & sleep 600 & exit 0'])",
)
SLOW = (
    "while True: pass",
    "import time; time.sleep(600)",
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "import signal\nfor s in (1, 2, 3, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "import os\ntry:\n    while True: os.fork() or os._exit(0)\nexcept OSError: os._exit(0)",
    "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "x = []\nwhile True: x.append(x)",
)


def problems() -> list[Problem]:
    tests = (
        {"tests": [{"input": "go", "output": SECRET}]},
        {"tests": [{"args": [], "expected": SECRET}], "entry_point": "f"},
        {"tests": [{"program": f"assert f(1) == {SECRET!r}"}]},
    )
    fields = {"id": "p", "kind": "code", "prompt": "?", "memory_limit_mib": 128}
    return [
        Problem.model_validate({**fields, "time_limit_s": limit, **test}) for limit in (10.0, 0.15) for test in tests
    ]


def resident_mib(pids: list[int]) -> float:
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_ten_thousand_hostile_jobs(scratch: Path):
    rng = random.Random(0)
    quick_or_slow = problems()
    scorer = Scorer(RewardsConfig(workers=2))
    sandbox = scorer.code.sandbox()
    outcomes: Counter[Outcome] = Counter()
    wrong: list[str] = []

    def job(n: int) -> None:
        slow = rng.random() < 0.04
        problem = quick_or_slow[3 * slow + n % 3]
        program = rng.choice(SLOW if slow else QUICK)
        body = "\n    ".join(program.split("\n"))
        if n % 3:  # called, not only run
            program = f"def f(*a):\n    {body}" if n % 2 else f"{program}\ndef f(*a): return 0"
        result = scorer.score(problem, f"```python\n{program}\n```")
        outcomes[result.outcome] += 1
        if result.outcome is Outcome.CORRECT or result.score not in (0.0, None):
            wrong.append(program)
        if result.outcome is Outcome.VERIFIER_ERROR:
            wrong.append(f"{result.detail}\n{program}")

    def measured() -> dict[str, float]:
        zygotes = [pid for launcher in sandbox.pids for pid in children(launcher)]
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "scorer MiB": resident_mib([os.getpid()]),
            "zygotes MiB": resident_mib(zygotes),
            "zygotes": len(zygotes),
            "left over": len(leftovers(sandbox)),
            "files": len(list(scratch.iterdir())),
        }

    reports: list[dict[str, float]] = []
    start = time.monotonic()
    for part in range(5):
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(job, range(part * JOBS // 5, (part + 1) * JOBS // 5)))
        reports.append(measured())
        print({name: round(value, 1) for name, value in reports[-1].items()}, f"{time.monotonic() - start:.0f} s")
    print(dict(outcomes), f"{JOBS / (time.monotonic() - start):.0f} jobs a second", sandbox.description)
    launchers = sandbox.pids
    groups = cgroups_of_ours()
    scorer.close()

    assert not wrong, wrong[0]
    assert sum(outcomes.values()) == JOBS
    first, last = reports[0], reports[-1]
    assert first["descriptors"] == last["descriptors"] and first["zygotes"] == last["zygotes"]
    assert last["left over"] == last["files"] == 0
    assert last["scorer MiB"] < first["scorer MiB"] + 32
    assert last["zygotes MiB"] < first["zygotes MiB"] + 8
    assert not any(Path(f"/proc/{pid}").exists() for pid in launchers)
    assert not groups & cgroups_of_ours()
