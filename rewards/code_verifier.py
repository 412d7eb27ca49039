"""Code problems: every test is a run in the sandbox, and the comparison happens out here.

The expected outputs stay in this process. A program that prints PASS, exits with 0, patches `json` or returns an
object that equals everything has only produced a wrong output.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

from pydantic import JsonValue

from memento.errors import UserError
from memento.problems import CallTest, Problem, StdioTest
from memento.rewards.answers import find_program
from memento.rewards.subprocess_sandbox import Limits, Run, Sandbox, SandboxError
from memento.trajectory import Outcome, RewardResult

EXTRACTED_CHARS = 4000
"""How much of a program the record keeps."""

FLOAT_TOLERANCE = 1e-9
"""Relative (and, near zero, absolute) difference at which two JSON numbers are equal if one of them is a float."""


class Failure(NamedTuple):
    """Why a test was not passed."""

    outcome: Outcome
    reason: str


def score_code(problem: Problem, completion: str, sandbox: Sandbox, *, budget_s: float) -> RewardResult:
    """Run the program of a completion against all tests.

    Score 1 if every test passes, else 0; ``parts["tests_passed"]`` is the passed fraction. After a test that ran out of
    time, and after `budget_s` seconds altogether, the remaining tests are not run and count as not passed.

    Returns:
        CORRECT; WRONG or TIMEOUT (0) after the first failing test; UNPARSABLE (0) without a program; VERIFIER_ERROR (no
        score) if the sandbox failed. `metadata` has the isolation level, `detail` the first failure.
    """
    metadata: dict[str, JsonValue] = {"isolation": sandbox.level.value, "tests": len(problem.tests)}
    program = find_program(completion)
    if program is None:
        return RewardResult(
            score=0.0,
            outcome=Outcome.UNPARSABLE,
            parts={"code": 0.0, "tests_passed": 0.0},
            detail="no closed ```python fence",
            metadata=metadata,
        )
    deadline = time.monotonic() + budget_s
    passed, first_failure = 0, None
    for number, test in enumerate(problem.tests, 1):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            failure = Failure(Outcome.TIMEOUT, f"not run: all tests together took longer than {budget_s:g} s")
        else:
            try:
                failure = run_test(problem, program, test, sandbox, wall_s=min(problem.time_limit_s, left_s))
            except SandboxError as error:
                return RewardResult(
                    score=None,
                    outcome=Outcome.VERIFIER_ERROR,
                    extracted=program[:EXTRACTED_CHARS],
                    detail=f"test {number}: {error}",
                    metadata=metadata,
                )
        if failure is None:
            passed += 1
        else:
            first_failure = first_failure or failure._replace(reason=f"test {number}: {failure.reason}")
            if failure.outcome is Outcome.TIMEOUT:
                break
    score = float(first_failure is None)
    return RewardResult(
        score=score,
        outcome=first_failure.outcome if first_failure else Outcome.CORRECT,
        parts={"code": score, "tests_passed": passed / len(problem.tests)},
        extracted=program[:EXTRACTED_CHARS],
        detail=first_failure.reason if first_failure else "",
        metadata=metadata,
    )


def run_test(
    problem: Problem, program: str, test: StdioTest | CallTest, sandbox: Sandbox, *, wall_s: float
) -> Failure | None:
    """One test; None if it is passed. Raises SandboxError."""
    limits = Limits(wall_s=wall_s, memory_mib=problem.memory_limit_mib)
    if isinstance(test, StdioTest):
        limits = limits._replace(output_bytes=max(limits.output_bytes, 2 * len(test.output.encode())))
        run = sandbox.run_program(program, test.input, limits)
        return _crash(run) or _differs(test.output, run)
    assert problem.entry_point is not None, "checked when the problem was made"
    run = sandbox.call_function(program, problem.entry_point, test.args, test.kwargs, limits)
    crash = _crash(run)
    if crash:
        return crash
    if not run.returned:
        return Failure(Outcome.WRONG, f"{problem.entry_point} returned nothing that JSON can hold")
    if not same_json(run.value, test.expected):
        return Failure(Outcome.WRONG, f"{problem.entry_point} returned {_short(repr(run.value))}")
    return None


def _crash(run: Run) -> Failure | None:
    if run.clean:
        return None
    return Failure(Outcome.TIMEOUT if run.too_slow else Outcome.WRONG, run.complaint())


def _differs(expected: str, run: Run) -> Failure | None:
    printed = run.stdout.decode("utf-8", "replace")
    if _lines(printed) == _lines(expected):
        return None
    return Failure(Outcome.WRONG, f"printed {_short(repr(printed))}")


def _lines(text: str) -> list[str]:
    """Lines without trailing white space, nor empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."


def same_json(value: JsonValue, expected: JsonValue) -> bool:
    """Equality of JSON values: true is not 1, but 1 is 1.0; floats within `FLOAT_TOLERANCE`."""
    pairs: list[tuple[JsonValue, JsonValue]] = [(value, expected)]
    while pairs:  # not recursive: the depth of `value` is the program's choice
        a, b = pairs.pop()
        if (
            isinstance(a, bool)
            or isinstance(b, bool)
            or not isinstance(a, int | float)
            or not isinstance(b, int | float)
        ):
            if type(a) is not type(b):
                return False
            if isinstance(a, list) and isinstance(b, list):
                if len(a) != len(b):
                    return False
                pairs.extend(zip(a, b, strict=True))
            elif isinstance(a, dict) and isinstance(b, dict):
                if a.keys() != b.keys():
                    return False
                pairs.extend((a[key], b[key]) for key in a)
            elif a != b:
                return False
        elif isinstance(a, int) and isinstance(b, int):
            if a != b:
                return False
        elif not _close(a, b):
            return False
    return True


def _close(a: float, b: float) -> bool:
    try:
        return math.isclose(a, b, rel_tol=FLOAT_TOLERANCE, abs_tol=FLOAT_TOLERANCE) or (a != a and b != b)
    except OverflowError:  # an int beyond the floats
        return False


def check_code_problem(problem: Problem) -> None:
    """Fail on a code problem that cannot be run here.

    Raises:
        UserError: naming the problem.
    """
    if problem.language.lower() not in ("python", "python3", "py"):
        raise UserError(f"problem {problem.id!r}: language {problem.language!r} is not supported, only python.")
