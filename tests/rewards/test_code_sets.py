"""Public sets of programming problems: their columns, and that their own solutions pass and broken ones do not.

The rows in code_sets/ are of our own making, in the columns of each set. The real sets are tried where a file is given:
``MEMENTO_HUMANEVAL``, ``MEMENTO_MBPP``, ``MEMENTO_LIVECODEBENCH``, ``MEMENTO_APPS`` (`make test-long`).
"""

from __future__ import annotations

import ast
import base64
import json
import os
import pickle
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from memento import code_sets
from memento.code_sets import pickled_text, reference_program
from memento.config import RewardsConfig
from memento.errors import UserError
from memento.problem_sets import read_rows
from memento.problems import Problem, load_problems
from memento.rewards import Scorer
from memento.rewards.sandbox import why_no_namespaces
from memento.rows import BadRow
from memento.trajectory import Outcome

FOLDER = Path(__file__).parent / "code_sets"
SETS = ("humaneval", "mbpp", "livecodebench", "apps", "taco")


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    scorer = Scorer(RewardsConfig(workers=2, sandbox="subprocess" if why_no_namespaces() else "namespaces"))
    yield scorer
    scorer.close()


def pairs(path: Path) -> list[tuple[Problem, str]]:
    """Problems of a file, and the set's own program for each."""
    rows = [located.row for located in read_rows(path)]
    return [
        (problem, row["solution"] if "solution" in row else reference_program(row))
        for problem, row in zip(load_problems(path), rows, strict=True)
    ]


class Mutant(ast.NodeTransformer):
    """Every return statement returns `not` what it did, which equals it in no case; every print prints a word."""

    def visit_Return(self, node: ast.Return) -> ast.AST:
        return ast.Return(ast.UnaryOp(ast.Not(), node.value or ast.Constant(None)))

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        printing = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "print"
        return ast.parse("print('mutant')").body[0] if printing else node


def mutated(program: str, function: str | None = None) -> str:
    """The program with other results; those of one function, if it is there: two that turn a verdict around cancel."""
    tree = ast.parse(program)
    of = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function] or [tree]
    Mutant().visit(of[-1])
    return ast.unparse(ast.fix_missing_locations(tree))


@pytest.mark.parametrize("name", SETS)
def test_their_solutions_pass_and_mutants_fail(scorer: Scorer, name: str):
    for problem, program in pairs(FOLDER / f"{name}.jsonl"):
        assert problem.source == name
        scorer.check(problem)
        right = scorer.score(problem, f"```python\n{program}\n```")
        assert (right.outcome, right.score) == (Outcome.CORRECT, 1.0), (problem.id, right.detail)
        wrong = scorer.score(problem, f"```python\n{mutated(program, problem.entry_point)}\n```")
        assert (wrong.outcome, wrong.score) == (Outcome.WRONG, 0.0), (problem.id, wrong.detail)


REAL = {name: os.environ.get(f"MEMENTO_{name.upper()}") for name in ("humaneval", "mbpp", "apps", "taco")}


@pytest.mark.long
@pytest.mark.parametrize("name", REAL)
def test_the_real_set(scorer: Scorer, name: str):
    """All but a few canonical solutions pass (sets have faulty rows; each is printed), and no mutant does."""
    path = REAL[name]
    if not path:
        pytest.skip(f"MEMENTO_{name.upper()} names no file")
    found = pairs(Path(path))

    def judge(pair: tuple[Problem, str]) -> tuple[str, str, str]:
        problem, program = pair
        right = scorer.score(problem, f"```python\n{program}\n```")
        wrong = scorer.score(problem, f"```python\n{mutated(program, problem.entry_point)}\n```")
        return right.outcome.value, wrong.outcome.value, f"{problem.id}: {right.detail} / {wrong.detail}"

    with ThreadPoolExecutor(2) as threads:
        judged = list(threads.map(judge, found))
    for right, wrong, text in judged:
        if right != "correct" or wrong == "correct":
            print(right, wrong, text)
    assert sum(right == "correct" for right, _, _ in judged) >= 0.98 * len(judged)
    assert not [text for right, wrong, text in judged if right == "correct" == wrong]


def test_what_the_records_hold():
    humaneval = load_problems(FOLDER / "humaneval.jsonl")
    (test,) = humaneval[1].model_dump()["tests"]
    assert test["program"].endswith("check(root)\n") and "def value_at" in test["setup"] == humaneval[1].prelude
    assert humaneval[1].entry_point == "root" and "```python" in humaneval[1].prompt
    mbpp = load_problems(FOLDER / "mbpp.jsonl")
    assert [len(problem.tests) for problem in mbpp] == [3, 2, 2, 2, 2, 2, 3]
    assert [problem.entry_point for problem in mbpp[2:5]] == ["height", "half", "sum"]
    assert mbpp[3].model_dump()["tests"][0] == {"setup": "import math", "program": "assert math.isclose(half(3), 1.5)"}
    assert "assert count_vowels('Banana') == 3" in mbpp[0].prompt
    stdin, call = load_problems(FOLDER / "livecodebench.jsonl")
    assert len(stdin.tests) == 3 and stdin.entry_point is None and not stdin.prelude
    assert call.entry_point == "twoSum" and "from typing import" in call.prelude
    assert call.model_dump()["tests"][1]["args"] == ([3, 2, 4], 6)
    lines, function = load_problems(FOLDER / "apps.jsonl")
    assert lines.model_dump()["tests"][1] == {"input": "5 6\n7", "output": "11\n7"}
    expected = [(test["expected"], test["alternatives"]) for test in function.model_dump()["tests"]]
    assert expected == [([3, 2, 1], ([[3, 2, 1]],)), ([], ([[]],)), (7, ([7],))]
    (taco,) = load_problems(FOLDER / "taco.jsonl")
    assert (taco.time_limit_s, taco.memory_limit_mib) == (6.0, 1024)


# ------------------------------------------------------------------------------------------------ bad input


class Bomb:
    """A pickle of this runs a command where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/memento-unpickled",)


def lcb(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = json.loads((FOLDER / "livecodebench.jsonl").read_text().splitlines()[1])
    return row | changes


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


def test_pickles_are_read_but_never_loaded(tmp_path: Path):
    text = json.dumps([{"input": "1", "output": "é" * 300}])
    for protocol in range(2, 6):
        assert pickled_text(pickle.dumps(text, protocol=protocol)) == text
    for evil in (Bomb(), [text], {"a": text}, (text, text), 7, b"x", None, Path("x")):
        with pytest.raises(BadRow, match="pickle"):
            pickled_text(pickle.dumps(evil))
    for broken in (b"", b"\x80", b"\x80\x04", pickle.dumps(text)[:-20], b"\x80\x04\x8d" + b"\xff" * 8, os.urandom(200)):
        with pytest.raises(BadRow):
            pickled_text(broken)
    with pytest.raises(BadRow, match="pickle with"):
        code_sets.livecodebench(lcb(private_test_cases=packed(pickle.dumps(Bomb()))))
    assert not Path("/tmp/memento-unpickled").exists()


def bad() -> dict[str, tuple[dict[str, Any], str]]:
    """Rows that are no problem, and what is said of each."""

    def call(**changes: str) -> dict[str, Any]:
        return lcb(public_test_cases=json.dumps([{"testtype": "functional", **changes}]))

    human = json.loads((FOLDER / "humaneval.jsonl").read_text().splitlines()[0])
    mbpp = json.loads((FOLDER / "mbpp.jsonl").read_text().splitlines()[0])
    apps = json.loads((FOLDER / "apps.jsonl").read_text().splitlines()[1])
    own = {"id": "a", "kind": "code", "prompt": "?"}
    return {
        "no check": (human | {"test": "assert True"}, "no function `check`"),
        "unparsable check": (human | {"test": "def check(c):\n    assert c("}, "test 1 is not Python: line 2"),
        "no tests": (mbpp | {"test_list": []}, "test_list is empty"),
        "unparsable assert": (mbpp | {"test_list": ["assert f(1) == 1", "assert f(2"]}, "test 2 is not Python"),
        "unparsable setup": (mbpp | {"test_setup_code": "import"}, "in its setup"),
        "neither JSON nor packed": (lcb(private_test_cases="?"), "neither JSON nor base64"),
        "cut off": (lcb(private_test_cases=packed(b"x" * 9999)[:-20]), "private_test_cases"),
        "a bomb": (lcb(private_test_cases=packed(b"[" * (4 << 20))), "larger than 1 MiB unpacked"),
        "no list": (lcb(public_test_cases='{"input": 1}'), "is no list of tests"),
        "an argument": (call(input="[1", output="1"), "test 1, an argument is not JSON"),
        "a number too long": (call(input="9" * 5000, output="1"), "digits"),
        "no output": (call(input="1"), "test 1 has no output"),
        "no name": (lcb(metadata="{}", starter_code=""), "neither metadata.func_name"),
        "unequal": (apps | {"input_output": '{"inputs": [1], "outputs": []}'}, "1 inputs and 0 outputs"),
        "not JSON": (apps | {"input_output": "{"}, "input_output is not JSON"),
        "empty": (apps | {"input_output": "{}"}, "0 inputs and 0 outputs"),
        "no arguments": (
            apps | {"input_output": '{"fn_name": "f", "inputs": [1], "outputs": [1]}'},
            "arguments of a call",
        ),
        "contradiction": (
            own | {"tests": [{"input": i, "output": o} for i, o in (("1\n", "1"), ("2", "x"), ("1", "2"))]},
            "tests 1 and 3 contradict each other",
        ),
        "contradicting calls": (
            own | {"entry_point": "f", "tests": [{"args": [1], "expected": 1}, {"args": [1], "expected": 2}]},
            "tests 1 and 2 contradict",
        ),
        "nothing expected": (own | {"tests": [{"input": "1", "output": " \n"}]}, "no test expects any output"),
        "no tests at all": (own | {"tests": []}, "needs `tests`"),
        "an empty program": (own | {"tests": [{"program": "  \n"}]}, "test 1 is an empty program"),
        "half a test": (own | {"tests": [{"input": "1"}]}, "tests.0"),
        "too deep": (own | {"tests": [{"program": "(" * 5000 + ")" * 5000}]}, "test 1 is not Python"),
        "a broken prelude": (
            own | {"tests": [{"program": "assert f()"}], "prelude": "import ("},
            "`prelude` is not Python",
        ),
    }


@pytest.mark.parametrize("name", bad().keys())
def test_bad_rows_are_named_with_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(code_sets, "UNPACKED_BYTES", 1 << 20)
    row, why = bad()[name]
    good = {"id": "good", "kind": "math", "prompt": "1 + 1?", "answer": "2"}
    path = tmp_path / "set.jsonl"
    first = row if "kind" not in row else good
    path.write_text(f"{json.dumps(first)}\n\n{json.dumps(row)}\n")
    line = 1 if first is row else 3
    with pytest.raises(UserError) as caught:
        load_problems(path)
    assert f"set.jsonl, line {line}: " in str(caught.value) and why in str(caught.value), caught.value


def test_tests_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("memento.problems.TEST_BYTES", 1000)
    monkeypatch.setattr("memento.problems.TESTS_BYTES", 5000)
    for tests in (
        [{"input": "x" * 1001, "output": "y"}],
        [{"input": str(n) * 600, "output": "y" * 900} for n in range(9)],
    ):
        path = tmp_path / "large.jsonl"
        path.write_text(json.dumps({"id": "a", "kind": "code", "prompt": "?", "tests": tests}))
        with pytest.raises(UserError, match=r"large\.jsonl, line 1: .*too large"):
            load_problems(path)
