"""Code problems: every test is a run in the sandbox, and the comparison happens out here.

Expected outputs and values stay in this process; those of assert programs in a second sandbox, where no model's code
runs. A program that prints PASS, exits with 0, patches `json` or returns an object that equals everything has only
produced a wrong output. docs/rewards.md has the threat model.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

from pydantic import JsonValue

from memento.config import RewardsConfig
from memento.errors import UserError
from memento.problems import AssertTest, CallTest, Problem, StdioTest
from memento.rewards.programs import find_program
from memento.rewards.sandbox import Limits, Run, Sandbox, SandboxError
from memento.trajectory import Outcome, RewardResult

EXTRACTED_CHARS = 4000
"""How much of a program the record keeps."""

FLOAT_TOLERANCE = 1e-9
"""Relative (and, near zero, absolute) difference at which two JSON numbers are equal if one of them is a float."""

NUMBER_CHARS = 100
"""Longer words are compared as text."""


class Failure(NamedTuple):
    """Why a test was not passed."""

    outcome: Outcome
    reason: str


class BrokenTest(Exception):
    """A test that fails, or passes, whatever the program does."""


class CodeVerifier:
    """Runs programs of completions against tests, `config.workers` at a time. Thread-safe.

    The sandbox is made, and its level settled, on first use; `close` ends its processes.
    """

    def __init__(self, config: RewardsConfig) -> None:
        self._config = config
        self._sandbox: Sandbox | None = None
        self._lock = threading.Lock()

    def score(self, problem: Problem, completion: str) -> RewardResult:
        """The verdict on one completion; see `score_code`.

        Raises:
            UserError: the configured sandbox is not to be had.
        """
        if problem.language.lower() not in LANGUAGES:
            return RewardResult(score=None, outcome=Outcome.VERIFIER_ERROR, detail=_unsupported(problem))
        return score_code(
            problem,
            completion,
            self.sandbox(),
            budget_s=self._config.code_timeout_s,
            fraction=self._config.code_score == "fraction",
        )

    def check(self, problem: Problem) -> None:
        """Fail on a problem that cannot be run here, or whose asserts accept a program that does nothing.

        Raises:
            UserError: naming the problem; or the configured sandbox is not to be had.
        """
        if problem.language.lower() not in LANGUAGES:
            raise UserError(_unsupported(problem))
        sandbox = self.sandbox()
        limits = Limits(wall_s=problem.time_limit_s, memory_mib=problem.memory_limit_mib)
        for number, test in enumerate(problem.tests, 1):
            if isinstance(test, AssertTest):
                try:
                    run = sandbox.check_asserts(
                        "", test.program, limits, setup=test.setup, remote=_names(problem), prelude=problem.prelude
                    )
                except SandboxError as error:
                    raise UserError(f"problem {problem.id!r}, test {number}: the sandbox failed: {error}.") from error
                if run.passed or run.broken:
                    why = run.broken or "the asserts accept an empty program"
                    raise UserError(f"problem {problem.id!r}, test {number}: {why}.")

    def sandbox(self) -> Sandbox:
        """The sandbox. Raises UserError where the level that was asked for is refused."""
        with self._lock:
            if self._sandbox is None:
                config = self._config
                self._sandbox = Sandbox(
                    config.sandbox,
                    slots=config.workers,
                    python=config.sandbox_python,
                    preload=config.sandbox_preload,
                )
            return self._sandbox

    @property
    def pids(self) -> list[int]:
        """Of the sandbox's processes out here."""
        return self._sandbox.pids if self._sandbox else []

    def close(self) -> None:
        """End the sandbox. Idempotent."""
        with self._lock:
            if self._sandbox is not None:
                self._sandbox.close()


LANGUAGES = ("python", "python3", "py")


def _unsupported(problem: Problem) -> str:
    return f"problem {problem.id!r}: language {problem.language!r} is not supported, only python."


def score_code(
    problem: Problem, completion: str, sandbox: Sandbox, *, budget_s: float, fraction: bool = False
) -> RewardResult:
    """Run the program of a completion against the tests.

    Args:
        budget_s: for all tests together; those that did not get their turn count as not passed.
        fraction: score the share of tests that are passed, and so run all of them; a timeout ends it all the same.
            Else score 1 if every test is passed, and stop at the first that is not.

    Returns:
        CORRECT; WRONG or TIMEOUT, as the first failing test; UNPARSABLE (0) without a program; VERIFIER_ERROR (no
        score) if the sandbox failed or a test is at fault. ``parts["tests_passed"]`` is the share of all tests that
        were passed (before the first failure, where that ended it), `detail` the first failure, `metadata` the
        isolation level and how many tests there are and were run.
    """
    program = find_program(completion)
    metadata: dict[str, JsonValue] = {
        "isolation": sandbox.level.value,
        "sandbox": sandbox.description,
        "tests": len(problem.tests),
    }
    if program.source is None:
        return RewardResult(
            score=0.0,
            outcome=Outcome.UNPARSABLE,
            parts={"code": 0.0, "tests_passed": 0.0},
            detail=program.missing,
            metadata=metadata | {"tests_run": 0},
        )
    deadline = time.monotonic() + budget_s
    run, passed, first_failure = 0, 0, None
    for number, test in enumerate(problem.tests, 1):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            failure = Failure(Outcome.TIMEOUT, f"not run: all tests together took longer than {budget_s:g} s")
        else:
            try:
                run += 1
                failure = run_test(problem, program.source, test, sandbox, wall_s=min(problem.time_limit_s, left_s))
            except (SandboxError, BrokenTest) as error:
                return RewardResult(
                    score=None,
                    outcome=Outcome.VERIFIER_ERROR,
                    extracted=program.source[:EXTRACTED_CHARS],
                    detail=f"test {number}: {error}",
                    metadata=metadata | {"tests_run": run},
                )
        if failure is None:
            passed += 1
        else:
            first_failure = first_failure or failure._replace(reason=f"test {number}: {failure.reason}")
            if failure.outcome is Outcome.TIMEOUT or not fraction:
                break
    share = passed / len(problem.tests)
    score = share if fraction else float(first_failure is None)
    return RewardResult(
        score=score,
        outcome=first_failure.outcome if first_failure else Outcome.CORRECT,
        parts={"code": score, "tests_passed": share},
        extracted=program.source[:EXTRACTED_CHARS],
        detail=first_failure.reason if first_failure else "",
        metadata=metadata | {"tests_run": run},
    )


def run_test(
    problem: Problem, program: str, test: StdioTest | CallTest | AssertTest, sandbox: Sandbox, *, wall_s: float
) -> Failure | None:
    """One test; None if it is passed.

    Raises:
        SandboxError: the sandbox failed.
        BrokenTest: the test is at fault.
    """
    limits = Limits(wall_s=wall_s, memory_mib=problem.memory_limit_mib)
    prelude = problem.prelude
    if isinstance(test, StdioTest):
        limits = limits._replace(output_bytes=max(limits.output_bytes, 2 * len(test.output.encode("utf-8", "replace"))))
        run = sandbox.run_program(program, test.input, limits, prelude=prelude)
        return _crash(run) or _differs(test.output, run)
    if isinstance(test, AssertTest):
        checked = sandbox.check_asserts(
            program, test.program, limits, setup=test.setup, remote=_names(problem), prelude=prelude
        )
        if checked.broken:
            raise BrokenTest(checked.broken)
        if checked.passed:
            return None
        return Failure(Outcome.TIMEOUT if checked.solution.too_slow else Outcome.WRONG, checked.reason)
    assert problem.entry_point is not None, "checked when the problem was made"
    run = sandbox.call_function(program, problem.entry_point, test.args, test.kwargs, limits, prelude=prelude)
    crash = _crash(run)
    if crash:
        return crash
    if not run.returned:
        return Failure(Outcome.WRONG, f"{problem.entry_point} returned nothing that JSON can hold")
    if not any(same_json(run.value, expected) for expected in (test.expected, *test.alternatives)):
        return Failure(Outcome.WRONG, f"{problem.entry_point} returned {_shown(run.value)}")
    return None


def _names(problem: Problem) -> Sequence[str]:
    """What is the solution's even if a set-up defines it, as HumanEval's prompt does."""
    return (problem.entry_point,) if problem.entry_point else ()


def _crash(run: Run) -> Failure | None:
    if run.clean:
        return None
    return Failure(Outcome.TIMEOUT if run.too_slow else Outcome.WRONG, run.complaint())


def _differs(expected: str, run: Run) -> Failure | None:
    printed = run.stdout.decode("utf-8", "replace")
    if same_output(printed, expected):
        return None
    return Failure(Outcome.WRONG, f"printed {_short(repr(printed))}")


def same_output(printed: str, expected: str) -> bool:
    """Whether lines agree, trailing white space and empty lines at the end apart; or, word for word, plain numbers.

    ``2.50`` is ``2.5``, as LiveCodeBench's judge has it; ``2.5000001`` is not.
    """
    ours, golds = _lines(printed), _lines(expected)
    return len(ours) == len(golds) and all(a == b or _same_words(a, b) for a, b in zip(ours, golds, strict=True))


def _lines(text: str) -> list[str]:
    """Lines without trailing white space, nor empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


_PLAIN_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)", re.ASCII)


def _same_words(printed: str, expected: str) -> bool:
    ours, golds = printed.split(), expected.split()
    return len(ours) == len(golds) and all(a == b or _same_number(a, b) for a, b in zip(ours, golds, strict=True))


def _same_number(a: str, b: str) -> bool:
    if max(len(a), len(b)) > NUMBER_CHARS or not (_PLAIN_NUMBER.fullmatch(a) and _PLAIN_NUMBER.fullmatch(b)):
        return False
    try:
        return Decimal(a) == Decimal(b)
    except InvalidOperation:
        return False


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."


def _shown(value: JsonValue) -> str:
    try:
        return _short(repr(value))
    except RecursionError:
        return "something nested too deep to be shown"


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
