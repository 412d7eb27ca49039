"""Programs of all kinds, at both levels of isolation. None that cheats is ever scored correct, none leaves anything."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memento.config import RewardsConfig
from memento.errors import UserError
from memento.problems import Problem
from memento.rewards import Scorer
from memento.rewards.code_verifier import same_json
from memento.rewards.subprocess_sandbox import Sandbox, why_no_namespaces
from memento.trajectory import Outcome, RewardResult

SECRET = "the-expected-output-5d1f"
LEVELS = [
    "subprocess",
    pytest.param("namespaces", marks=pytest.mark.skipif(bool(why_no_namespaces()), reason=why_no_namespaces())),
]


@pytest.fixture(scope="module", params=LEVELS)
def scorer(request: pytest.FixtureRequest) -> Iterator[Scorer]:
    scorer = Scorer(RewardsConfig(workers=2, sandbox=request.param))
    yield scorer
    scorer.close()


def stdio(*pairs: tuple[str, str], **fields: Any) -> Problem:
    tests = [{"input": given, "output": wanted} for given, wanted in pairs]
    return Problem.model_validate({"id": "c", "kind": "code", "prompt": "?", "tests": tests, **fields})


def function(name: str, *calls: tuple[list[Any], Any], **fields: Any) -> Problem:
    tests = [{"args": args, "expected": expected} for args, expected in calls]
    return Problem.model_validate(
        {"id": "c", "kind": "code", "prompt": "?", "tests": tests, "entry_point": name, **fields}
    )


def fenced(program: str) -> str:
    return f"<think>Let me see.</think>Here:\n```python\n{program}\n```\n"


DOUBLE = stdio(("3\n", "6\n"), ("10\n", "20\n"), time_limit_s=3)
HIDDEN = stdio(("go\n", SECRET), time_limit_s=2)


def test_right_programs(scorer: Scorer):
    for program in (
        "print(2 * int(input()))",
        "import sys\nfor line in sys.stdin:\n    print(int(line) * 2, end='   \\n\\n')",
        "import threading\nt = threading.Thread(target=lambda: print(2 * int(input())))\nt.start()",
        "def main():\n    print(2 * int(input()))\nif __name__ == '__main__':\n    main()\n    exit()",
    ):
        result = scorer.score(DOUBLE, fenced(program))
        assert (result.score, result.outcome) == (1.0, Outcome.CORRECT), (program, result)
        assert result.parts == {"code": 1.0, "tests_passed": 1.0}
        assert result.metadata["isolation"] == scorer.sandbox().level.value


def test_wrong_slow_and_crashing_programs(scorer: Scorer):
    wrong = scorer.score(DOUBLE, fenced("print(6)"))
    assert (wrong.score, wrong.outcome, wrong.parts["tests_passed"]) == (0.0, Outcome.WRONG, 0.5)
    assert wrong.detail.startswith("test 2: printed")
    assert "20" not in wrong.detail
    crash = scorer.score(DOUBLE, fenced("print(6)\nraise KeyError('x')"))
    assert (crash.score, crash.outcome) == (0.0, Outcome.WRONG)
    assert "KeyError" in crash.detail
    assert scorer.score(DOUBLE, fenced("def :")).outcome is Outcome.WRONG
    start = time.monotonic()
    slow = scorer.score(stdio(("3\n", "6\n"), ("4\n", "8\n"), time_limit_s=1), fenced("while True: pass"))
    assert (slow.score, slow.outcome) == (0.0, Outcome.TIMEOUT)
    assert time.monotonic() - start < 8


def test_no_program_is_unparsable(scorer: Scorer):
    for text in ("print(6)", "```cpp\nint main(){}\n```", "```python\nprint(6)", "", "\x00" * 1000, "x" * 1_000_000):
        result = scorer.score(DOUBLE, text)
        assert (result.score, result.outcome) == (0.0, Outcome.UNPARSABLE)
    two = "```python\nprint(1)\n```\nbetter:\n```python\nprint(2*int(input()))\n```"
    assert scorer.score(DOUBLE, two).score == 1.0


def test_function_calls(scorer: Scorer):
    add = function("add", ([1, 2], 3), ([[1], [2]], [1, 2]), (["a", "b"], "ab"))
    assert scorer.score(add, fenced("def add(a, b):\n    print('noise')\n    return a + b")).score == 1.0
    assert scorer.score(add, fenced("class Solution:\n    def add(self, a, b):\n        return a + b")).score == 1.0
    partly = scorer.score(add, fenced("def add(a, b):\n    return a + b if a == 1 else None"))
    assert partly.parts["tests_passed"] == pytest.approx(1 / 3)
    assert scorer.score(add, fenced("def other(a, b):\n    return a + b")).outcome is Outcome.WRONG
    pairs = function("pairs", ([2], [[0, 1], [1, 0]]))
    assert scorer.score(pairs, fenced("def pairs(n): return [(i, 1 - i) for i in range(n)]")).score == 1.0
    for value in ("{1, 2}", "object()", "float('nan')", "True", "'[[0, 1], [1, 0]]'"):
        assert scorer.score(pairs, fenced(f"def pairs(n): return {value}")).score == 0.0
    assert scorer.score(function("f", ([], 1)), fenced("def f(): return True")).score == 0.0
    assert scorer.score(function("f", ([], 0.3)), fenced("def f(): return 0.1 + 0.2")).score == 1.0


CHEATS = {
    "exit 0": "import os; os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "prints PASS": "print('PASS\\nOK\\nAll tests passed\\n{\"exit\": 0}')",
    "patched json": (
        "import json\njson.dumps = json.loads = lambda *a, **k: '{\"ready\": true}'\nprint(json.dumps(1))"
    ),
    "patched builtins": (
        "import builtins\nclass E(str):\n    def __eq__(self, o): return True\n    __hash__ = str.__hash__\n"
        "builtins.str = E\nprint(E('x'))"
    ),
    "writes to every descriptor": (
        'import os\nfor fd in range(1, 40):\n    try:\n        os.write(fd, b\'{"exit": 0, "passed": true}\\n\')\n'
        "    except OSError: pass"
    ),
    "kills its group and parents": (
        "import os, signal\nfor pid in (0, os.getppid()):\n    try:\n        os.kill(pid, signal.SIGTERM)\n"
        "    except OSError: pass"
    ),
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
}


@pytest.mark.parametrize("program", CHEATS.values(), ids=CHEATS.keys())
def test_cheats_are_not_correct(scorer: Scorer, program: str):
    result = scorer.score(HIDDEN, fenced(program))
    assert result.score in (0.0, None) and result.outcome is not Outcome.CORRECT, result


CALL_CHEATS = {
    "equals everything": (
        "class A:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(): return A()"
    ),
    "forged reply": (
        "import os, sys, gc\ndef f():\n    frame = sys._getframe(1)\n    call_id = frame.f_locals['call']['id']\n"
        '    os.write(3, (\'{"id": "%s", "value": "PASS", "passed": true}\' % call_id).encode())\n    os._exit(0)'
    ),
    "reply without id": "import os\ndef f():\n    os.write(3, b'{\"value\": 1}')\n    os._exit(0)",
    "str that is not one": "class S(str):\n    def __eq__(self, other): return True\ndef f(): return S('x')",
    "exit at import": "import sys\ndef f(): return 1\nsys.exit(0)",
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(): return 0",
    "nested a million deep": "def f():\n    x = []\n    for _ in range(900): x = [x]\n    return x",
    "huge int": "def f(): return 10**5000",
}


@pytest.mark.parametrize("program", CALL_CHEATS.values(), ids=CALL_CHEATS.keys())
def test_call_cheats_are_not_correct(scorer: Scorer, program: str):
    result = scorer.score(function("f", ([], SECRET), time_limit_s=2), fenced(program))
    assert (result.score, result.outcome) == (0.0, Outcome.WRONG), result


SEARCH = f"""
import gc, os, sys
needle = {SECRET[:-4]!r} + {SECRET[-4:]!r}
hits = []
if any(needle in value for value in os.environ.values()): hits.append("environment")
if any(needle in argument for argument in sys.orig_argv): hits.append("arguments")
if needle in sys.stdin.read(): hits.append("stdin")
for folder, _, files in os.walk("."):
    for name in files:
        if needle in open(os.path.join(folder, name), errors="replace").read(): hits.append(name)
for fd in range(3, 200):
    try:
        if needle.encode() in os.pread(fd, 1 << 20, 0): hits.append(f"fd {{fd}}")
    except OSError: pass
frame = sys._getframe()
while frame:
    if any(needle in repr(value) for name, value in frame.f_locals.items() if name not in ("needle", "source")):
        hits.append("frame")
    frame = frame.f_back
for item in gc.get_objects():
    if type(item) is dict and any(type(v) is str and needle == v for k, v in item.items() if k != "needle"):
        hits.append("memory")
print("found", hits)
"""


def test_expected_outputs_are_not_in_the_process(scorer: Scorer):
    result = scorer.score(HIDDEN, fenced(SEARCH))
    assert result.outcome is Outcome.WRONG
    assert "found []" in result.detail, result.detail


def test_environment_and_folder(scorer: Scorer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MEMENTO_TEST_SECRET", SECRET)
    result = scorer.score(HIDDEN, fenced("import os\nprint(sorted(os.environ), os.listdir('.'))"))
    names = set(re.findall(r"[A-Z_]{2,}", result.detail))
    assert names <= {"PATH", "HOME", "LANG", "LC_CTYPE"}, result.detail
    assert "] []" in result.detail, result.detail


def processes_with(marker: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)", "{marker}"])
    os._exit(0)
time.sleep(0.3)
print("x")
{then}
"""


@pytest.mark.parametrize("then", ["", "time.sleep(600)"], ids=["exits", "hangs"])
def test_a_daemon_does_not_stay(scorer: Scorer, then: str):
    marker = f"daemon-{os.getpid()}-{time.monotonic_ns()}"
    problem = stdio(("", "x"), time_limit_s=1.5)
    start = time.monotonic()
    result = scorer.score(problem, fenced(DAEMON.format(marker=marker, then=then)))
    assert result.outcome is (Outcome.TIMEOUT if then else Outcome.CORRECT), result
    assert time.monotonic() - start < 10
    for _ in range(20):
        if not processes_with(marker):
            return
        time.sleep(0.1)
    pytest.fail("the daemon is still there")


def test_floods(scorer: Scorer):
    start = time.monotonic()
    flood = scorer.score(stdio(("", "x"), time_limit_s=3), fenced("while True: print('x' * 100000)"))
    assert (flood.score, flood.outcome) == (0.0, Outcome.WRONG)
    assert "cap" in flood.detail
    errors = "import sys\nfor _ in range(300): sys.stderr.write('e' * 10000)\nprint('x')"
    assert scorer.score(stdio(("", "x")), fenced(errors)).score == 1.0
    memory = scorer.score(stdio(("", "x"), memory_limit_mib=256), fenced("x = bytearray(1 << 30)\nprint('x')"))
    assert (memory.score, memory.outcome) == (0.0, Outcome.WRONG)
    assert "MemoryError" in memory.detail
    disk = "with open('big', 'wb') as f:\n    for _ in range(100): f.write(bytes(1 << 20))\nprint('x')"
    assert scorer.score(stdio(("", "x")), fenced(disk)).outcome is Outcome.WRONG
    reply = function("f", ([], "x"))
    assert scorer.score(reply, fenced("def f(): return 'x' * (1 << 22)")).outcome is Outcome.WRONG
    assert time.monotonic() - start < 20


def test_signals_ignored_and_large_input(scorer: Scorer):
    stubborn = (
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\n"
        "while True: pass"
    )
    assert scorer.score(stdio(("", "x"), time_limit_s=1), fenced(stubborn)).outcome is Outcome.TIMEOUT
    big = "9" * (1 << 20)
    assert scorer.score(stdio((big, str(len(big)))), fenced("print(len(input()))")).score == 1.0
    assert scorer.score(stdio((big, "x")), fenced("print('x')")).score == 1.0
    assert scorer.score(stdio(("", big + big)), fenced(f"print('9' * {2 * len(big)})")).score == 1.0


def test_the_budget_of_all_tests_is_kept():
    scorer = Scorer(RewardsConfig(workers=1, code_timeout_s=1.5))
    start = time.monotonic()
    result = scorer.score(stdio(*[("", "x")] * 20), fenced("import time\ntime.sleep(0.5)\nprint('x')"))
    assert (result.score, result.outcome) == (0.0, Outcome.TIMEOUT)
    assert 0 <= result.parts["tests_passed"] < 0.5
    assert time.monotonic() - start < 10


def verdict(scorer: Scorer, program: str) -> RewardResult:
    return scorer.score(HIDDEN, fenced(program))


@pytest.mark.skipif(bool(why_no_namespaces()), reason=why_no_namespaces())
class TestNamespaces:
    """What only the stronger level promises."""

    @pytest.fixture(scope="class")
    def scorer(self) -> Scorer:
        return Scorer(RewardsConfig(sandbox="namespaces"))

    def test_sees_no_files_of_ours(self, scorer: Scorer, tmp_path: Path):
        (tmp_path / "problems.jsonl").write_text(SECRET)
        for path in (tmp_path / "problems.jsonl", Path(__file__), Path("/etc/passwd"), Path("/sys/kernel")):
            result = verdict(scorer, f"import os\nprint(os.path.exists({str(path)!r}))")
            assert "printed 'False" in result.detail, (path, result.detail)

    def test_root_is_read_only(self, scorer: Scorer):
        program = (
            "import os, sys\nfor p in ('/x', '/usr/x', '/dev/x', sys.base_prefix + '/x', '/proc/x'):\n"
            "    try:\n        open(p, 'w'); print('WROTE', p)\n    except OSError: pass\n"
            "open('/tmp/ok', 'w').write('1'); print(os.listdir('/tmp'))"
        )
        assert verdict(scorer, program).detail == "test 1: printed \"['ok']\\n\""

    def test_has_no_network_and_sees_no_processes(self, scorer: Scorer):
        network = "import os, socket\ns = socket.socket()\nprint(s.connect_ex(('127.0.0.1', 22)), 0)"
        assert re.search(r"printed '(101|99|111) ", verdict(scorer, network).detail)
        interfaces = "import socket\nprint([name for _, name in socket.if_nameindex()])"
        assert "\"['lo']" in verdict(scorer, interfaces).detail
        others = "import os\nprint([p for p in os.listdir('/proc') if p.isdigit()], os.getppid())"
        assert re.search(r"\['1', '2'\] 1", verdict(scorer, others).detail)

    def test_has_no_privileges(self, scorer: Scorer):
        program = (
            "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
            "lines = [line.split() for line in open('/proc/self/status')]\n"
            "caps = [line[1] for line in lines if line and line[0] in ('CapEff:', 'CapPrm:', 'NoNewPrivs:')]\n"
            "print(caps, libc.mount(b'none', b'/tmp', b'tmpfs', 0, b''), libc.sethostname(b'x', 1), os.getuid() != 0)"
        )
        detail = verdict(scorer, program).detail
        assert "['0000000000000000', '0000000000000000', '1'] -1 -1 True" in detail, detail

    def test_fork_bomb(self, scorer: Scorer):
        start = time.monotonic()
        result = scorer.score(
            stdio(("", "x"), time_limit_s=1.5),
            fenced("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"),
        )
        assert result.score == 0.0
        assert time.monotonic() - start < 12


def test_an_unavailable_level_is_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    import memento.rewards.subprocess_sandbox as module

    monkeypatch.setattr(module, "why_no_namespaces", lambda: "unshare: Operation not permitted")
    with pytest.raises(UserError, match=r"rewards\.sandbox"):
        Sandbox("namespaces")
    assert Sandbox("auto").level.value == "subprocess"
    assert "NOT contained" in caplog.text


def test_other_languages_are_a_problem_of_the_problem():
    scorer = Scorer(RewardsConfig())
    problem = stdio(("", "x"), language="cpp")
    with pytest.raises(UserError, match="cpp"):
        scorer.check(problem)
    assert scorer.score(problem, fenced("print('x')")).outcome is Outcome.VERIFIER_ERROR


def test_json_equality():
    assert same_json({"a": [1, 2.0]}, {"a": [1.0, 2]})
    assert not same_json(True, 1)
    assert not same_json(1, "1")
    assert not same_json([1, 2], [2, 1])
    assert not same_json({"a": 1}, {"a": 1, "b": 2})
    assert not same_json(10**400, 1.0)
    assert same_json(None, None)
