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
from memento.rewards.code_verifier import same_json, same_output
from memento.rewards.sandbox import why_no_namespaces
from memento.trajectory import Outcome

SECRET = "the-expected-output-5d1f"
LEVELS = [
    "subprocess",
    pytest.param("namespaces", marks=pytest.mark.skipif(bool(why_no_namespaces()), reason=why_no_namespaces())),
]


@pytest.fixture(scope="module", params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def scorer(level: Any) -> Iterator[Scorer]:
    scorer = Scorer(RewardsConfig(workers=2, sandbox=level))
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
        assert result.metadata["isolation"] == scorer.code.sandbox().level.value


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
        assert (result.score, result.outcome, result.metadata["tests_run"]) == (0.0, Outcome.UNPARSABLE, 0)
        assert result.detail
    two = "```python\nprint(1)\n```\nbetter:\n```python\nprint(2*int(input()))\n```"
    assert scorer.score(DOUBLE, two).score == 1.0


GARBAGE = {
    "zeros": "\x00" * 1000,
    "a megabyte of one line": "x" * 1_000_000,
    "a megabyte of statements": "x = 1\n" * 170_000,
    "surrogates": "print('\ud800\udfff')",
    "control characters": "".join(map(chr, range(32))) * 100,
    "latin bytes": bytes(range(128, 256)).decode("latin-1") * 100,
    "an encoding": "# -*- coding: utf-7 -*-\nprint(6)",
    "another language": "#include <stdio.h>\nint main() { return 0; }",
    "too long": "#" * ((1 << 20) + 1),
}


@pytest.mark.parametrize("text", GARBAGE.values(), ids=GARBAGE.keys())
def test_whatever_is_in_the_fence_has_a_verdict(scorer: Scorer, text: str):
    result = scorer.score(DOUBLE, fenced(text))
    assert result.score == 0.0
    assert result.outcome in (Outcome.WRONG, Outcome.UNPARSABLE, Outcome.TIMEOUT)


def test_function_calls(scorer: Scorer):
    add = function("add", ([1, 2], 3), ([[1], [2]], [1, 2]), (["a", "b"], "ab"))
    assert scorer.score(add, fenced("def add(a, b):\n    print('noise')\n    return a + b")).score == 1.0
    assert scorer.score(add, fenced("class Solution:\n    def add(self, a, b):\n        return a + b")).score == 1.0
    partly = scorer.score(add, fenced("def add(a, b):\n    return a + b if a == 1 else None"))
    assert partly.parts["tests_passed"] == pytest.approx(1 / 3)
    assert (partly.metadata["tests"], partly.metadata["tests_run"]) == (3, 2), "done at the first failure"
    either = function("f", ([], [3]), prelude="from collections import deque")
    either = either.model_copy(update={"tests": (either.tests[0].model_copy(update={"alternatives": (3,)}),)})
    for value in ("3", "[3]", "(3,)", "deque([3])", "range(3, 4)"):
        assert scorer.score(either, fenced(f"def f(): return {value}")).score == 1.0, value
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
    assert names <= {"PATH", "HOME", "LANG", "LC_CTYPE", "OPENBLAS_NUM_THREADS"}, result.detail
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
    allowed = scorer.code.sandbox().level.value == "namespaces"  # the weaker level has no second process at all
    assert result.outcome is (Outcome.WRONG if not allowed else Outcome.TIMEOUT if then else Outcome.CORRECT), result
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


def test_the_budget_of_all_tests_is_kept(level: Any):
    scorer = Scorer(RewardsConfig(workers=1, code_timeout_s=1.5, sandbox=level))
    start = time.monotonic()
    result = scorer.score(
        stdio(*[(str(n), "x") for n in range(20)]), fenced("import time\ntime.sleep(0.5)\nprint('x')")
    )
    scorer.close()
    assert (result.score, result.outcome) == (0.0, Outcome.TIMEOUT)
    assert 0 <= result.parts["tests_passed"] < 0.5
    assert time.monotonic() - start < 15


def test_fraction_of_the_tests(level: Any):
    scorer = Scorer(RewardsConfig(workers=1, code_score="fraction", sandbox=level))
    four = stdio(*[(str(n), str(n % 2)) for n in range(4)])
    half = scorer.score(four, fenced("print(0)"))
    assert (half.score, half.outcome, half.metadata["tests_run"]) == (0.5, Outcome.WRONG, 4)
    assert half.detail.startswith("test 2: printed")
    assert scorer.score(four, fenced("print(int(input()) % 2)")).score == 1.0
    slow = scorer.score(
        four.model_copy(update={"time_limit_s": 0.3}), fenced("if input() != '0':\n    while 1: pass\nprint(0)")
    )
    assert (slow.score, slow.outcome, slow.metadata["tests_run"]) == (0.25, Outcome.TIMEOUT, 2)
    scorer.close()


def asserts(*programs: str, setup: str = "", **fields: Any) -> Problem:
    tests = [{"program": program, "setup": setup} for program in programs]
    return Problem.model_validate({"id": "c", "kind": "code", "prompt": "?", "tests": tests, **fields})


def test_assert_programs(scorer: Scorer):
    add = asserts("assert add(1, 2) == 3", "import math\nassert math.isclose(add(0.1, 0.2), 0.3)")
    assert scorer.score(add, fenced("def add(a, b):\n    print('noise')\n    return a + b")).score == 1.0
    wrong = scorer.score(add, fenced("def add(a, b): return 3"))
    assert (wrong.outcome, wrong.parts["tests_passed"]) == (Outcome.WRONG, 0.5)
    assert wrong.detail == "test 2: line 2: AssertionError"
    missing = scorer.score(add, fenced("def plus(a, b): return a + b"))
    assert missing.outcome is Outcome.WRONG and "name 'add' is not defined" in missing.detail
    crash = scorer.score(add, fenced("import no_such_module\ndef add(a, b): return a + b"))
    assert crash.outcome is Outcome.WRONG and "no_such_module" in crash.detail
    assert scorer.score(add, fenced("def add(a, b) return")).outcome is Outcome.WRONG
    quick = add.model_copy(update={"time_limit_s": 0.4})
    assert scorer.score(quick, fenced("def add(a, b):\n    while True: pass")).outcome is Outcome.TIMEOUT
    assert scorer.score(quick, fenced("while True: pass")).outcome is Outcome.TIMEOUT


VALUES = (
    "None, True, 0, -1, 2**70, 0.5, 1e308, float('inf'), 1j, '', 'é\U0001f600', b'\\x00\\xff', [], [1, [2]], (), "
    "(1, (2,)), {}, {1: 'a', (2, 3): [4]}, set(), {1, 'b'}, frozenset({2}), range(3), {None: {'x': (1,)}}"
)


def test_plain_data_crosses_as_it_is(scorer: Scorer):
    """Arguments and results of every built-in type, into the solution and back."""
    same = (
        f"for value in ({VALUES}):\n    answer = f(value)\n    assert answer == value and type(answer) is type(value)"
    )
    nan = "assert f(float('nan')) != f(float('nan'))\nassert list(f(range(5))) == [0, 1, 2, 3, 4]"
    assert scorer.score(asserts(same, nan), fenced("def f(x): return x")).score == 1.0
    kinds = fenced(
        "from collections import *\nclass S(str): pass\n"
        "def f(n):\n    return [Counter('aab'), OrderedDict(a=1), S('s'), (x for x in [1, 2]), {1: 2}.keys(), "
        "zip([1], [2]), namedtuple('P', 'a b')(1, 2), defaultdict(int, a=1)][n]"
    )
    checks = (
        "assert f(0) == {'a': 2, 'b': 1} and f(1) == {'a': 1} and type(f(2)) is str and list(f(3)) == [1, 2]\n"
        "assert f(4) == {1} and list(f(5)) == [(1, 2)] and f(6) == (1, 2) and f(7)['a'] == 1"
    )
    result = scorer.score(asserts(checks), kinds)
    assert result.score == 1.0, result.detail


def test_objects_of_the_solution(scorer: Scorer):
    """As MBPP has them: classes that the solution defines, used by the asserts."""
    tree = asserts(
        "root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(3)\nassert height(root) == 3\n"
        "assert root.left.value == 2\nassert Solution().twice(height(root)) == 6"
    )
    program = (
        "class Node:\n    def __init__(self, value): self.value, self.left, self.right = value, None, None\n"
        "def height(n): return 0 if n is None else 1 + max(height(n.left), height(n.right))\n"
        "class Solution:\n    def twice(self, x): return 2 * x"
    )
    result = scorer.score(tree, fenced(program))
    assert result.score == 1.0, result.detail


def test_exceptions_of_the_solution(scorer: Scorer):
    raises = asserts(
        "try:\n    f(0)\nexcept ValueError as error:\n    assert 'zero' in str(error)\n"
        "else:\n    assert False\nassert f(1) == 1"
    )
    assert scorer.score(raises, fenced("def f(x):\n    if x == 0: raise ValueError('zero')\n    return x")).score == 1.0
    for other in ("raise KeyError('zero')", "return 0", "raise type('E', (Exception,), {})('zero')"):
        assert scorer.score(raises, fenced(f"def f(x):\n    if x == 0: {other}\n    return x")).score == 0.0


def test_asserts_at_fault_are_no_verdict(scorer: Scorer):
    right = fenced("def f(x): return x")
    for program, why in (
        ("assert 1 == 2", "fail by themselves"),
        ("import no_such_module\nassert f(1) == 1", "fail by themselves"),
        ("x = 1", "without asking"),
        ("def check(c):\n    assert c(1) == 1", "without asking"),
        ("assert f(lambda: 1) == 1", "not plain data"),
        ("import os\nos._exit(0)", "without a verdict"),
        ("assert f", "fail by themselves"),
    ):
        broken = asserts(program)
        result = scorer.score(broken, right)
        assert (result.score, result.outcome) == (None, Outcome.VERIFIER_ERROR), program
        assert why in result.detail, result.detail
    for program in ("assert 1 == 2", "x = 1", "assert f is not None"):
        with pytest.raises(UserError, match="problem 'c', test 1"):
            scorer.check(asserts(program))
    with pytest.raises(UserError, match="accept an empty program"):
        scorer.check(asserts("try:\n    f(1)\nexcept NameError:\n    pass"))
    scorer.check(asserts("assert f(1) == 1"))


def test_prelude(scorer: Scorer):
    problem = function("f", ([[3, 1]], [1, 3]), prelude="from typing import *\nimport heapq")
    assert (
        scorer.score(problem, fenced("def f(x: List[int]):\n    heapq.heapify(x)\n    return sorted(x)")).score == 1.0
    )


def test_the_ways_a_program_may_end_well(scorer: Scorer):
    for program in (
        "import atexit, os\natexit.register(os.write, 1, b'6\\n')",
        "import sys\nsys.stdout.write('6')\nsys.stdout.close()",
        "import os, sys\nos.write(1, b'6')\nsys.stdout = None",
        "import asyncio\nasync def main(): print(6)\nasyncio.run(main())",
        "import tempfile\nwith tempfile.TemporaryFile('w+') as f:\n    f.write('6'); f.seek(0); print(f.read())",
        "import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return n and 1 + f(n - 1)\nprint(f(50000) - 49994)",
        "print(open(0).read().strip() and 6)",
        "import sys, io\nsys.stdin = io.BytesIO(open(0, 'rb').read())\nprint(len(sys.stdin.read()) * 3)",
    ):
        result = scorer.score(stdio(("3\n", "6\n"), memory_limit_mib=1024), fenced(program))
        assert result.score == 1.0, (program, result.detail)


def test_processes_of_its_own(scorer: Scorer):
    contained = scorer.code.sandbox().level.value == "namespaces"
    for program in (
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'print(6)'], check=True)",
        "from multiprocessing import Pool\nwith Pool(2) as pool: print(sum(pool.map(abs, [1, -5])))",
    ):
        result = scorer.score(stdio(("3\n", "6\n"), memory_limit_mib=1024), fenced(program))
        assert result.outcome is (Outcome.CORRECT if contained else Outcome.WRONG), result
        assert contained or "Operation not permitted" in result.detail


def test_other_languages_are_a_problem_of_the_problem(scorer: Scorer):
    problem = stdio(("", "x"), language="cpp")
    with pytest.raises(UserError, match="cpp"):
        scorer.check(problem)
    assert scorer.score(problem, fenced("print('x')")).outcome is Outcome.VERIFIER_ERROR


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("a b \n\n", "a b", True),
        ("a  b", "a b", True),
        ("a\nb", "a b", False),
        ("2.50 x", "2.5 x", True),
        ("-0", "0", True),
        ("2.5000001", "2.5", False),
        ("1e3", "1000", False),
        ("", "", True),
        ("1", "", False),
        ("１", "1", False),
        ("9" * 5000, "9" * 5000, True),
        ("9" * 5000 + ".0", "9" * 5000, False),
    ],
)
def test_output_equality(printed: str, expected: str, same: bool):
    assert same_output(printed, expected) is same


def test_json_equality():
    assert same_json({"a": [1, 2.0]}, {"a": [1.0, 2]})
    assert not same_json(True, 1)
    assert not same_json(1, "1")
    assert not same_json([1, 2], [2, 1])
    assert not same_json({"a": 1}, {"a": 1, "b": 2})
    assert not same_json(10**400, 1.0)
    assert same_json(None, None)
