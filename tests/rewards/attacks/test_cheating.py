"""Attacks on the verdict: programs that do not solve the problem and want to be told that they did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from memento.problems import Problem
from memento.rewards.code_verifier import score_code
from memento.rewards.sandbox import Run, Sandbox
from memento.trajectory import Outcome, RewardResult

Attack = Callable[..., tuple[Run, RewardResult]]

SECRET = "the-expected-output-5d1f"
CALL: dict[str, Any] = {"args": [], "expected": SECRET}
ASSERT: dict[str, Any] = {"program": "assert f(1) == 2\nassert f(2) == 3\nassert f(-5) == -4"}


@pytest.mark.parametrize("how", ["import sys\nsys.exit(0)", "import os\nos._exit(0)", "raise SystemExit", "quit()"])
def test_exit_0(attack: Attack, how: str):
    attack(how)
    attack(f"def f(*a):\n    {how.replace(chr(10), '; ')}", test=CALL)
    attack(f"def f(*a):\n    {how.replace(chr(10), '; ')}", test=ASSERT)
    attack(how, test=ASSERT)


def test_printed_verdicts(attack: Attack):
    words = 'PASS\\nOK\\nAll tests passed\\n{"passed": true, "exit": 0, "end": "exit", "value": 1, "ready": true}\\n'
    attack(f"print('{words}' * 100)")
    attack(f"def f(*a):\n    print('{words}')", test=CALL)
    attack(f"print('{words}')\ndef f(*a):\n    print('{words}')", test=ASSERT)


WRITE_EVERYWHERE = """
import json, os, struct
lines = [{"passed": True, "asked": 3, "line": None, "error": "", "broken": False}, {"value": 1}]
lines.append({"end": "exit", "code": 0})
for fd in range(1, 256):
    for line in lines:
        data = json.dumps(line).encode()
        for message in (data, data + b"\\n", struct.pack(">I", len(data)) + data):
            try: os.write(fd, message)
            except OSError: pass
"""


def test_forged_replies_on_every_descriptor(attack: Attack):
    attack(WRITE_EVERYWHERE)
    attack(WRITE_EVERYWHERE + "\ndef f(*a): return 0", test=CALL)
    attack(WRITE_EVERYWHERE + "\ndef f(*a): return 0", test=ASSERT)


def test_a_forged_reply_and_gone(attack: Attack):
    body = 'import json, os\nos.write(3, b\'{"value": 1, "passed": true}\')\nos._exit(0)'
    attack(body, test=CALL)
    attack(body, test=ASSERT)


def test_expected_outputs_are_nowhere(attack: Attack):
    """Not in memory, environment, arguments, open files, or files it can read."""
    program = f"""
import ctypes, os, re
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # may be looked at, by itself
needle = re.compile(b"{SECRET[:-1]}[{SECRET[-1]}]")  # does not find itself
hits, searched = [], 0
for name in ("environ", "cmdline", "maps", "status"):
    hits += needle.findall(open("/proc/self/" + name, "rb").read())
for fd in range(64):
    try: hits += needle.findall(os.pread(fd, 1 << 20, 0))
    except OSError: pass
for folder, _, files in os.walk("/tmp"):
    hits += files
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb") as memory:
    for line in maps:
        match = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
        if match and "[v" not in line:
            memory.seek(int(match[1], 16))
            try: text = memory.read(min(int(match[2], 16) - int(match[1], 16), 64 << 20))
            except OSError: continue
            searched += len(text)
            hits += needle.findall(text)
print("found", hits, searched > 1 << 20, flush=True)  # the run may be stopped once its answer is there
def f(*a): return 0
"""
    for test in (None, CALL, {"program": f"assert f(1) == {SECRET!r}"}):
        run, _ = attack(program, test=test)
        assert run.stdout == b"found [] True\n", run


@pytest.mark.parametrize("test", [CALL, ASSERT], ids=["call", "asserts"])
@pytest.mark.parametrize(
    "base", ["object", "str", "int", "float", "list", "dict", "tuple"], ids=lambda base: f"equal-{base}"
)
def test_objects_that_equal_everything(attack: Attack, base: str, test: dict[str, Any]):
    methods = "\n    ".join(
        f"def __{name}__(self, *other): return True"
        for name in ("eq", "bool", "contains", "lt", "le", "gt", "ge", "instancecheck")
    )
    attack(
        f"class AlwaysEqual({base}):\n    {methods}\n    def __ne__(self, other): return False\n"
        f"    def __hash__(self): return 2\n    def __len__(self): return 1\ndef f(*a): return AlwaysEqual()",
        test=test,
    )


@pytest.mark.parametrize(
    "check",
    [
        "assert f(1) == 2",
        "assert f(1) != 3",
        "assert not f(1)",
        "assert 2 == f(1)",
        "assert f(1) in [2]",
        "assert len(f(1)) == 2",
        "assert f(1) < 3",
        "assert str(f(1)) == '2'",
        "assert f(1) + 0 == 2",
        "assert all(x == 2 for x in f(1))",
        "assert isinstance(f(1), int)",
        "assert f(1).x == 2 and f(1).y() == 3",
    ],
)
def test_objects_are_not_asked(attack: Attack, check: str):
    """What an assert wants of an object that is not plain data is not the object's to say, but for its truth: an object
    that says it is true has passed as much as True would have."""
    program = """
class Everything:
    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return self
    def __call__(self, *a, **k): return self
    def __eq__(self, other): return True
    def __ne__(self, other): return True
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __bool__ = __eq__
    def __bool__(self): return True
    def __len__(self): return 2
    def __iter__(self): return iter([])
    def __str__(self): return "2"
    def __add__(self, other): return 2
    __hash__ = None
    __class__ = int
def f(*a): return Everything()
"""
    attack(program, test={"program": check})


def test_patched_json_and_builtins(attack: Attack):
    patches = """
import builtins, json, os, struct, sys
json.dumps = json.dump = json.loads = json.load = lambda *a, **k: '{"value": 2, "passed": true}'
json.JSONEncoder.encode = lambda self, o: '"%s"'
struct.pack = lambda *a: b"\\0\\0\\0\\0"
os.write = os.read = lambda *a: 0
for name in ("isinstance", "len", "type", "abs", "all", "any", "sorted", "print", "repr", "range"):
    setattr(builtins, name, lambda *a, **k: True)
def f(*a): return 0
"""
    attack(patches, test=CALL)
    attack(patches, test=ASSERT, wall_s=0.5)
    attack(patches)


def test_patched_eq_of_built_in_types(attack: Attack):
    """`int.__eq__` cannot be set from Python, but its slot can through ctypes: in that process, and only there."""
    program = """
import ctypes, gc
slots = gc.get_referents(int.__dict__)[0]
slots["__eq__"] = slots["__ne__"] = lambda self, other: True
ctypes.pythonapi.PyType_Modified(ctypes.py_object(int))
def f(*a): return 0
"""
    attack(program, test=ASSERT)
    attack(program, test={"args": [], "expected": 1})


def test_import_hooks(attack: Attack):
    program = """
import sys
class Hook:
    def find_spec(self, *a): raise SystemExit(0)
sys.meta_path.insert(0, Hook())
sys.modules["json"] = sys.modules["os"] = sys.modules["builtins"] = None
sys.settrace(lambda *a: sys.exit(0))
sys.setprofile(lambda *a: None)
sys.excepthook = sys.unraisablehook = lambda *a: None
def f(*a): return 0
"""
    for test in (CALL, ASSERT, None):
        attack(program, test=test)


def test_frames_and_garbage_of_the_runner(attack: Attack):
    program = """
import gc, os, sys
def f(*a):
    frame = sys._getframe()
    while frame:
        for name, value in list(frame.f_locals.items()):
            if callable(value) and name in ("dumps", "write", "send_frame", "encode", "leave"):
                frame.f_locals[name] = lambda *a, **k: None
        frame = frame.f_back
    for item in gc.get_objects():
        if isinstance(item, dict) and ("expected" in item or "verdict" in item or "asserts" in item):
            print("GOLD", item)
    return 0
"""
    for test in (CALL, ASSERT):
        run, _ = attack(program, test=test)
        assert b"GOLD {" not in run.stdout


def test_a_later_tests_input(watched: Sandbox):
    """A program that waits for, or looks for, the next test's input finds its own only."""
    program = """
import os, sys
mine = sys.stdin.read().strip()
rest = sys.stdin.read() + "".join(os.listdir("/tmp"))
found = []
for fd in range(1, 64):
    try: found.append(os.pread(fd, 1 << 20, 0))
    except OSError: pass
os.lseek(0, 0, 0)
again = os.read(0, 1 << 20).decode().strip()
print("seen" if "later" in mine + rest + again + repr(found) else "alone", mine if mine != "later" else "")
"""
    tests = [{"input": "now", "output": "alone now"}, {"input": "later-one", "output": SECRET}]
    asked = Problem.model_validate({"id": "p", "kind": "code", "prompt": "?", "tests": tests})
    result = score_code(asked, f"```python\n{program}\n```", watched, budget_s=20)
    assert (result.outcome, result.parts["tests_passed"]) == (Outcome.WRONG, 0.5)
    assert "seen" in result.detail  # the second run sees its own input, which says "later"


def test_answers_that_are_no_values(attack: Attack):
    """Whatever the solution's end of the pipe sends, the asserts fail; they do not hang, and do not pass."""
    head = "import os, struct, sys\ndef send(data): os.write(4, struct.pack('>I', len(data)) + data)\n"
    for body in (
        "send(b'')",
        "send(b'null')",
        "send(b'[]')",
        'send(b\'{"value": {"set": [[1]]}}\')',
        'send(b\'{"value": {"nothing": 1}}\')',
        'send(b\'{"value": {"int": "zz"}}\')',
        'send(b\'{"value": {"object": "x"}}\')',
        'send(b\'{"raised": "SystemExit", "text": "0"}\')',
        'send(b\'{"raised": "KeyboardInterrupt", "text": ""}\')',
        'send(b\'{"raised": "__import__", "text": "os"}\')',
        "send(b'[' * 1000000)",
        "send(b'{\"value\":' * 100000 + b'1' + b'}' * 100000)",
        "os.write(4, struct.pack('>I', 1 << 31))",
        "os.write(4, b'\\xff\\xff')",
        "os.close(4)",
    ):
        attack(f"{head}{body}\nos._exit(0)", test=ASSERT, wall_s=1.0)


def test_answers_ahead_of_the_questions(attack: Attack):
    """Answers written before the calls come are answers all the same: guessing them is solving the problem."""
    program = """
import os, struct
for _ in range(3):
    data = b'{"value": 2}'
    os.write(4, struct.pack(">I", len(data)) + data)
os._exit(0)
"""
    attack(program, test=ASSERT)


def test_helpers_of_the_test_cannot_be_replaced(attack: Attack):
    """HumanEval tests use functions of the prompt; the solution's own of that name is not asked."""
    test = {
        "setup": "def poly(xs, x): return sum(c * x ** i for i, c in enumerate(xs))\ndef f(xs): '''root'''",
        "program": "def check(candidate):\n    assert abs(poly([-6, 2], candidate([-6, 2]))) < 1e-6\ncheck(f)",
    }
    cheat = "def poly(xs, x): return 0.0\ndef abs(x): return 0\ndef check(c): pass\ndef f(xs): return 1.0"
    attack(cheat, test=test)


def test_arguments_cannot_be_changed_for_the_asserts(attack: Attack):
    test = {"program": "golds = [3, 1, 2]\nassert f(golds) == [1, 2, 3]\nassert golds == [3, 1, 2]"}
    attack("def f(x):\n    x.clear()\n    return x", test=test)


def test_asserts_that_catch_exceptions(attack: Attack):
    """A test that expects an exception is not content with a solution that is gone."""
    test = {"program": "try:\n    f(0)\nexcept Exception:\n    pass\nassert f(1) == 1"}
    attack("import os\ndef f(x): os._exit(0)", test=test)
    attack("def f(x): raise SystemExit(0)", test=test)


def test_endless_answers(attack: Attack):
    attack("def f(x):\n    while True: yield 2", test=ASSERT, wall_s=0.5, memory_limit_mib=128)
    attack("def f(x): return [[2] * 1000] * 100000", test=ASSERT, wall_s=2.0)


def test_unicode_and_locale(attack: Attack):
    """What looks like the expected output is not it."""
    for text, gold in (
        ("１２", "12"),  # full-width digits
        ("٣", "3"),  # an Arabic digit
        ("1\u200b", "1"),  # a zero-width space
        ("a\u0301", "\u00e1"),  # decomposed
        ("\u0430", "a"),  # Cyrillic
        ("\ufeff1", "1"),
        ("1\x00", "1"),
        ("\u202e21", "12"),
        ("İ", "i"),
    ):
        attack(f"import sys\nsys.stdout.buffer.write({text!r}.encode())", test={"input": "", "output": gold})
        attack(f"def f(): return {text!r}", test={"args": [], "expected": gold})
    attack(
        "import locale, sys\nlocale.setlocale(locale.LC_ALL, 'C')\nsys.stdout.reconfigure(encoding='utf-16')\nprint(1)",
        test={"input": "", "output": "1"},
    )
    attack("def f(): return '\\ud800'", test={"args": [], "expected": "?"})
    attack("import os\nos.write(1, b'\\xff\\xfe\\x00')", test={"input": "", "output": "\ufffd"})


def test_numbers_that_look_alike(attack: Attack):
    for printed, gold in (("nan", "0"), ("inf", "1"), ("1e0", "1"), ("0x1", "1"), ("1_0", "10"), ("1.0000001", "1")):
        attack(f"print({printed!r})", test={"input": "", "output": gold})
    for value, gold in (("True", 1), ("float('nan')", 0), ("float('inf')", 1), ("1.001", 1), ("'1'", 1), ("[1]", 1)):
        attack(f"def f(): return {value}", test={"args": [], "expected": gold})


def test_values_nested_without_end(attack: Attack):
    attack("def f():\n    x = []\n    for _ in range(900): x = [x]\n    return x", test=CALL)
    attack("def f():\n    x = []\n    x.append(x)\n    return x", test=CALL)
    attack("def f(n):\n    x = []\n    x.append(x)\n    return x", test=ASSERT)


def test_exceptions_that_misbehave(attack: Attack):
    program = """
class Evil(Exception):
    def __str__(self): raise SystemExit(0)
    __repr__ = __str__
def f(*a): raise Evil
"""
    for test in (CALL, ASSERT):
        attack(program, test=test)
    attack(program + "\nf()")
