"""`score(problem, completion)`: the one door to every verifier."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from memento.config import RewardsConfig
from memento.errors import UserError
from memento.problems import Problem, ProblemKind
from memento.rewards.choice import letter_of, score_choice
from memento.rewards.code_verifier import check_code_problem, score_code
from memento.rewards.math_verifier import HANDLER, check_math_gold, score_math
from memento.rewards.subprocess_sandbox import Sandbox
from memento.rewards.workers import WorkerPool
from memento.trajectory import Outcome, RewardResult


class Scorer:
    """Scores completions, `config.workers` jobs at a time. Thread-safe; blocks no longer than the deadlines.

    Processes start when first needed; `close` ends them.
    """

    def __init__(self, config: RewardsConfig | None = None) -> None:
        self.config = config or RewardsConfig()
        self._math = WorkerPool(
            HANDLER,
            workers=self.config.workers,
            timeout_s=self.config.timeout_s,
            memory_limit_mib=self.config.memory_limit_mib,
        )
        self._programs = threading.BoundedSemaphore(self.config.workers)
        self._sandbox: Sandbox | None = None
        self._sandbox_lock = threading.Lock()

    def score(self, problem: Problem, completion: str) -> RewardResult:
        """The verdict on one completion. Whatever the completion holds, this returns; it does not raise.

        Raises:
            UserError: only for a code problem where the configured sandbox is not to be had.
        """
        start = time.monotonic()
        completion = completion if isinstance(completion, str) else str(completion)
        result = self._score(problem, completion)
        return result.model_copy(update={"seconds": time.monotonic() - start})

    def check(self, problem: Problem) -> None:
        """Fail on a problem that no completion could ever get right.

        Raises:
            UserError: naming the problem.
        """
        if problem.kind is ProblemKind.MATH:
            check_math_gold(problem, self._math)
        elif problem.kind is ProblemKind.CHOICE:
            if letter_of(problem.answer or "") is None:
                raise UserError(f"problem {problem.id!r}: the answer {problem.answer!r} is not a letter A-J.")
        else:
            check_code_problem(problem)
            self.sandbox()

    def sandbox(self) -> Sandbox:
        """The code sandbox; made, and its level settled, on first use. Raises UserError where it is refused."""
        with self._sandbox_lock:
            if self._sandbox is None:
                self._sandbox = Sandbox(self.config.sandbox)
            return self._sandbox

    @property
    def worker_restarts(self) -> int:
        """Math workers that died or were killed in a job."""
        return self._math.restarts

    @property
    def worker_pids(self) -> list[int]:
        """Running math workers."""
        return self._math.pids

    def close(self) -> None:
        """End all worker processes."""
        self._math.close()

    def _score(self, problem: Problem, completion: str) -> RewardResult:
        if problem.kind is ProblemKind.MATH:
            return score_math(problem, completion, self._math)
        if problem.kind is ProblemKind.CHOICE:
            return score_choice(problem, completion)
        sandbox = self.sandbox()
        with self._programs:
            try:
                check_code_problem(problem)
            except UserError as error:
                return RewardResult(score=None, outcome=Outcome.VERIFIER_ERROR, detail=str(error))
            return score_code(problem, completion, sandbox, budget_s=self.config.code_timeout_s)


_default: Scorer | None = None
_default_lock = threading.Lock()


def default_scorer() -> Scorer:
    """The process-wide scorer behind `score`, with `RewardsConfig()` defaults; ended at exit."""
    global _default
    with _default_lock:
        if _default is None:
            _default = Scorer()
            atexit.register(_default.close)
        return _default


def _forget_in_child() -> None:
    # a forked child must not talk through its parent's pipes
    global _default, _default_lock
    _default, _default_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_in_child)


def score(problem: Problem, completion: str) -> RewardResult:
    r"""Verify one completion: math by equivalence, code by its tests, choice by its letter.

    Verification runs in killable worker processes, so it may be called from any thread and never hangs.

        >>> score(Problem(id="half", kind="math", prompt="1/2?", answer="0.5"), r"It is \boxed{\frac12}.").outcome
        <Outcome.CORRECT: 'correct'>

    Returns:
        A `RewardResult`; its `score` is None where there is no verdict (timeout of a math job, verifier error).
    """
    return default_scorer().score(problem, completion)


def check_gold(problem: Problem) -> None:
    """Fail, at load time, on a problem that no completion could ever get right.

    Raises:
        UserError: naming the problem.
    """
    default_scorer().check(problem)


def check_golds(problems: Iterable[Problem], scorer: Scorer | None = None) -> None:
    """`check_gold` for many, in parallel. Raises UserError for the first bad one in order."""
    scorer = scorer or default_scorer()
    with ThreadPoolExecutor(max_workers=scorer.config.workers) as threads:
        for _ in threads.map(scorer.check, problems):
            pass


def score_all(problem: Problem, completions: Sequence[str], scorer: Scorer | None = None) -> list[RewardResult]:
    """Score a group in parallel, in order."""
    scorer = scorer or default_scorer()
    with ThreadPoolExecutor(max_workers=scorer.config.workers) as threads:
        return list(threads.map(lambda completion: scorer.score(problem, completion), completions))
