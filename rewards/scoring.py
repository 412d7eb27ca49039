"""`score(problem, completion)`: the one door to every verifier."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from memento.config import ProblemsConfig, RewardsConfig
from memento.errors import UserError
from memento.problems import Problem, ProblemKind
from memento.rewards.choice import letter_of, score_choice
from memento.rewards.code_verifier import CodeVerifier
from memento.rewards.composition import Term, compose, custom_result, format_term
from memento.rewards.format_terms import TraceShape
from memento.rewards.math_verifier import HANDLER, MathVerifier
from memento.rewards.workers import WorkerCounts, WorkerPool
from memento.sources import Loaded, load
from memento.trajectory import RewardResult


class Scorer:
    """Scores completions, `config.workers` jobs at a time. Thread-safe; blocks no longer than the deadlines.

    Processes start when first needed; `close` ends them.

    Args:
        search: folders in which custom terms are looked for first; then the working directory and the Python path.
    """

    def __init__(self, config: RewardsConfig | None = None, search: Sequence[str] = ()) -> None:
        self.config = config or RewardsConfig()
        self._math_workers = WorkerPool(
            HANDLER,
            workers=self.config.workers,
            timeout_s=self.config.timeout_s,
            memory_limit_mib=self.config.memory_limit_mib,
            recycle_after=self.config.recycle_after,
        )
        self._math = MathVerifier(self._math_workers)
        folders = [folder for folder in (*search, os.getcwd(), *sys.path) if folder]
        self._custom = {
            term.label: WorkerPool(
                term.function,
                workers=term.workers,
                timeout_s=term.timeout_s,
                memory_limit_mib=term.memory_limit_mib,
                recycle_after=self.config.recycle_after,
                search=tuple(dict.fromkeys(folders)),
            )
            for term in self.config.terms
            if term.function is not None
        }
        self.code = CodeVerifier(self.config)

    def score(self, problem: Problem, completion: str, shape: TraceShape | None = None) -> RewardResult:
        """The verdict on one completion. Whatever the completion holds, this returns; it does not raise.

        Args:
            shape: blocks and mementos of the trace the completion was sampled as, for format terms.

        Raises:
            UserError: a code problem where the configured sandbox is not to be had, or a format term without `shape`.
        """
        start = time.monotonic()
        # Lone surrogates cannot be written to a file, and what is judged is kept with the verdict.
        completion = str(completion).encode("utf-8", "replace").decode("utf-8")
        result = self._composed(problem, completion, shape) if self.config.terms else self._score(problem, completion)
        return result.model_copy(update={"seconds": time.monotonic() - start})

    def check(self, problem: Problem) -> None:
        """Fail on a problem that no completion could ever get right.

        Raises:
            UserError: naming the problem.
        """
        if problem.kind is ProblemKind.MATH:
            self._math.check(problem)
        elif problem.kind is ProblemKind.CHOICE:
            if letter_of(problem.answer or "") is None:
                raise UserError(f"problem {problem.id!r}: the answer {problem.answer!r} is not a letter A-J.")
        else:
            self.code.check(problem)

    def check_terms(self) -> None:
        """Start a worker of every custom term, to fail now and not in the first step.

        Raises:
            UserError: a function that cannot be imported.
        """
        for workers in self._custom.values():
            workers.check()

    @property
    def worker_counts(self) -> WorkerCounts:
        """What happened to the workers so far, those of custom terms included."""
        counts = WorkerCounts()
        for pool in self._pools:
            counts = counts.plus(pool.counts)
        return counts

    @property
    def worker_pids(self) -> list[int]:
        """Running workers, those of custom terms included."""
        return [pid for pool in self._pools for pid in pool.pids]

    def close(self) -> None:
        """End all worker processes."""
        for pool in self._pools:
            pool.close()
        self.code.close()

    @property
    def _pools(self) -> list[WorkerPool]:
        return [self._math_workers, *self._custom.values()]

    def _composed(self, problem: Problem, completion: str, shape: TraceShape | None) -> RewardResult:
        terms = []
        for term in self.config.terms:
            if term.kind == "verifier":
                result = self._score(problem, completion)
            elif term.kind == "custom":
                request = {"problem": problem.model_dump(mode="json"), "completion": completion}
                result = custom_result(term, self._custom[term.label].call(request))
            else:
                result = format_term(term, shape)
            terms.append(Term(term, result))
        return compose(terms)

    def _score(self, problem: Problem, completion: str) -> RewardResult:
        if problem.kind is ProblemKind.MATH:
            return self._math.score(problem, completion)
        if problem.kind is ProblemKind.CHOICE:
            return score_choice(problem, completion)
        return self.code.score(problem, completion)


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
    for complaint in bad_golds(problems, scorer).values():
        raise UserError(complaint)


def bad_golds(problems: Iterable[Problem], scorer: Scorer | None = None) -> dict[str, str]:
    """Problems that no completion could ever get right: id -> why, in order."""
    scorer = scorer or default_scorer()

    def complaint(problem: Problem) -> str | None:
        try:
            scorer.check(problem)
        except UserError as error:
            return str(error)
        return None

    problems = list(problems)
    with ThreadPoolExecutor(max_workers=scorer.config.workers) as threads:
        complaints = list(threads.map(complaint, problems))
    return {p.id: why for p, why in zip(problems, complaints, strict=True) if why is not None}


def check_terms(config: RewardsConfig) -> None:
    """Import every custom term, in the process that will run it, before anything else is started.

    Raises:
        UserError: a function that cannot be had.
    """
    if any(term.function is not None for term in config.terms):
        scorer = Scorer(config)
        try:
            scorer.check_terms()
        finally:
            scorer.close()


def load_verified(
    config: ProblemsConfig, rewards: RewardsConfig | None = None, *, exclude: Iterable[Loaded] = ()
) -> Loaded:
    """`memento.sources.load`, and every gold checked: what a run or an evaluation starts with.

    An answer that reads as nothing would be a reward of 0 for ever, so it is an error here, with its place. Answers
    that are words or plain numbers cost nothing; the others are parsed once, on all cores.

    Raises:
        UserError: as `memento.sources.load`; or the first bad gold with its place, unless ``config.skip_bad``.
    """
    loaded = load(config, exclude=exclude)
    rewards = (rewards or RewardsConfig()).model_copy(update={"workers": os.cpu_count() or 1, "terms": ()})
    scorer = Scorer(rewards)
    try:
        complaints = bad_golds(loaded.problems, scorer)
    finally:
        scorer.close()
    placed = {name: f"{loaded.where.get(name, 'generated')}: {why}" for name, why in complaints.items()}
    if placed and not config.skip_bad:
        more = f" {len(placed)} of {len(loaded.problems)} problems are bad;" if len(placed) > 1 else ""
        raise UserError(f"{next(iter(placed.values()))}{more} problems.skip_bad=true leaves such problems out.")
    left = loaded.without(placed)
    if not left.problems:
        raise UserError(f"{config.path} holds no problem with a gold that can be verified.")
    return left


def score_all(
    problem: Problem,
    completions: Sequence[str],
    scorer: Scorer | None = None,
    shapes: Sequence[TraceShape | None] | None = None,
) -> list[RewardResult]:
    """Score a group in parallel, in order."""
    scorer = scorer or default_scorer()
    shapes = shapes if shapes is not None else [None] * len(completions)
    with ThreadPoolExecutor(max_workers=scorer.config.workers) as threads:
        return list(threads.map(lambda text, shape: scorer.score(problem, text, shape), completions, shapes))
