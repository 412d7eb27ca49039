"""The reward pool of a run: Ray actors over killable worker processes.

    driver --groups--> RewardActor (asyncio, threads) --JSON lines--> math workers, custom terms
              ^                                       --processes---> code sandbox
              at most `pending_groups` an actor: whoever submits more waits

Verification has no state, so an actor that dies is started again by Ray and its calls are repeated. `metrics` says what
the pool did since it was last asked: every sample is counted there by its outcome, also those whose group never reached
the learner because a sample in it has no score.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from memento.config import RewardsConfig
from memento.problems import Problem
from memento.rewards.format_terms import TraceShape
from memento.rewards.workers import WorkerCounts
from memento.trajectory import Outcome, RewardResult

KEPT_LATENCIES = 100_000
"""Latencies an actor remembers between two calls of `metrics`; of more samples, the last so many."""

METRICS_TIMEOUT_S = 10.0


class ScoreRequest(NamedTuple):
    """A group to verify: a problem, completions of it, and the shapes of their traces where format terms read them."""

    problem: Problem
    completions: Sequence[str]
    shapes: Sequence[TraceShape] | None = None


class ActorReport(NamedTuple):
    """What one actor did: outcomes and worker counts since it started, latencies since it was last asked."""

    outcomes: Mapping[str, int]
    workers: WorkerCounts
    seconds: tuple[float, ...]


NOTHING_YET = ActorReport({}, WorkerCounts(), ())


class RewardActor:
    """What runs in the actor: a `Scorer` and as many threads as it has workers. Every method returns soon or awaits."""

    def __init__(self, config: RewardsConfig, search: Sequence[str] = ()) -> None:
        from memento.rewards.scoring import Scorer

        self._scorer = Scorer(config, search)
        width = config.workers + sum(term.workers for term in config.terms if term.function is not None)
        self._threads = ThreadPoolExecutor(max_workers=width, thread_name_prefix="verify")
        self._outcomes: Counter[str] = Counter()
        self._seconds: deque[float] = deque(maxlen=KEPT_LATENCIES)

    async def score(
        self, problem: Problem, completions: Sequence[str], shapes: Sequence[TraceShape] | None = None
    ) -> list[RewardResult]:
        """Verdicts in the order of the completions."""
        loop = asyncio.get_running_loop()
        of = shapes if shapes is not None else [None] * len(completions)
        jobs = [
            loop.run_in_executor(self._threads, self._scorer.score, problem, text, shape)
            for text, shape in zip(completions, of, strict=True)
        ]
        results = list(await asyncio.gather(*jobs))
        self._outcomes.update(result.outcome.value for result in results)
        self._seconds.extend(result.seconds for result in results)
        return results

    async def check(self, problems: Sequence[Problem]) -> None:
        """Raise UserError for a custom term that cannot be had, or a problem that no completion could get right."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, self._scorer.check_terms)
        await asyncio.gather(
            *(loop.run_in_executor(self._threads, self._scorer.check, problem) for problem in problems)
        )

    async def report(self) -> ActorReport:
        """Counts so far, and the latencies since the last call."""
        seconds = tuple(self._seconds)
        self._seconds.clear()
        return ActorReport(dict(self._outcomes), self._scorer.worker_counts, seconds)

    async def close(self) -> None:
        """End the worker processes."""
        self._scorer.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


@dataclass(slots=True, eq=False)
class _Actor:
    """The pool's view of one actor. Guarded by the pool's condition."""

    handle: Any
    pending: int = 0  # groups
    last: ActorReport = NOTHING_YET  # what it said when `metrics` was last called


class RewardPool:
    """Scores groups of completions outside the driver. Needs a running Ray; the actors start here. Thread-safe.

    `places`: further Ray options of each actor, from `memento.cluster.Reservation`.
    """

    def __init__(self, config: RewardsConfig, places: Sequence[Mapping[str, Any]] = ()) -> None:
        import ray

        self._config = config
        actor: Any = ray.remote(RewardActor)
        options: dict[str, Any] = {
            "num_cpus": config.cpus,
            "max_concurrency": config.pending_groups + 8,  # beside the groups: check, report, close
            "max_restarts": 4,
            "max_task_retries": 2,
        }
        self._condition = threading.Condition()
        self._actors = [
            _Actor(actor.options(**options, **where).remote(config, (os.getcwd(),)))
            for where in places or [{}] * config.actors
        ]
        self._closed = False
        self._waiting = 0
        self._began = time.monotonic()

    def submit(
        self, problem: Problem, completions: Sequence[str], shapes: Sequence[TraceShape] | None = None
    ) -> Future[list[RewardResult]]:
        """Start scoring a group on the actor that has the fewest. Waits while all of them are full.

        Returns:
            The verdicts, in order. Every completion gets one: a verifier that hangs, dies or raises gives a verdict
            without a score.
        """
        actor = self._acquire()
        try:
            done = actor.handle.score.remote(problem, list(completions), shapes).future()
        except BaseException:
            self._release(actor)
            raise
        done.add_done_callback(lambda _: self._release(actor))
        return done

    def score(
        self, problem: Problem, completions: Sequence[str], shapes: Sequence[TraceShape] | None = None
    ) -> list[RewardResult]:
        """Score a group and wait for it."""
        return _unwrapped(self.submit(problem, completions, shapes))

    async def score_async(
        self, problem: Problem, completions: Sequence[str], shapes: Sequence[TraceShape] | None = None
    ) -> list[RewardResult]:
        """`score` for asyncio callers; a full pool does not block their loop."""
        submitted = await asyncio.to_thread(self.submit, problem, completions, shapes)
        return await asyncio.wrap_future(submitted)

    def score_many(self, groups: Iterable[ScoreRequest]) -> list[list[RewardResult]]:
        """Score many groups, in order; at most `pending_groups` an actor are in flight."""
        submitted = [self.submit(*group) for group in groups]
        return [_unwrapped(future) for future in submitted]

    def check(self, problems: Sequence[Problem] = ()) -> None:
        """Fail on custom terms that cannot be had, and on problems that no completion could ever get right.

        Raises:
            UserError: naming the function or the problem.
        """
        share = [problems[i :: len(self._actors)] for i in range(len(self._actors))]
        checks = [a.handle.check.remote(list(part)).future() for a, part in zip(self._actors, share, strict=True)]
        for check in checks:
            _unwrapped(check)

    def counts(self) -> dict[str, int]:
        """Verdicts of each outcome so far, and what happened to the workers."""
        reports = self._reports()
        workers = _together(report.workers for report in reports)
        outcomes: Counter[str] = Counter()
        for report in reports:
            outcomes.update(report.outcomes)
        return {
            **{outcome.value: outcomes[outcome.value] for outcome in Outcome},
            "worker_restarts": workers.restarts,
            "worker_retries": workers.retries,
            "worker_timeouts": workers.timeouts,
            "workers_recycled": workers.recycled,
        }

    def metrics(self) -> dict[str, float]:
        """Numbers for the run's log, all since the last call.

        ``verifier/{samples_per_s, p50_s, p99_s}``; ``verifier/<outcome>``: samples; ``verifier/{restarts, retries,
        timeouts, recycled}``: workers; and, now, ``verifier/pending`` groups inside and ``verifier/waiting`` callers.
        """
        reports = self._reports(METRICS_TIMEOUT_S)
        outcomes: Counter[str] = Counter()
        workers = WorkerCounts()
        seconds: list[float] = []
        with self._condition:
            for actor, report in zip(self._actors, reports, strict=True):
                before = actor.last
                if sum(report.outcomes.values()) < sum(before.outcomes.values()):  # started again: counts from 0
                    before = NOTHING_YET
                outcomes.update({k: v - before.outcomes.get(k, 0) for k, v in report.outcomes.items()})
                workers = workers.plus(report.workers.minus(before.workers))
                seconds.extend(report.seconds)
                actor.last = report
            now = time.monotonic()
            wall_s, self._began = now - self._began, now
            pending, waiting = sum(actor.pending for actor in self._actors), self._waiting
        metrics = {f"verifier/{outcome.value}": float(outcomes[outcome.value]) for outcome in Outcome}
        metrics["verifier/samples_per_s"] = sum(outcomes.values()) / wall_s if wall_s > 0 else 0.0
        if seconds:
            p50, p99 = np.percentile(seconds, [50, 99])
            metrics |= {"verifier/p50_s": float(p50), "verifier/p99_s": float(p99)}
        return metrics | {
            "verifier/restarts": float(workers.restarts),
            "verifier/retries": float(workers.retries),
            "verifier/timeouts": float(workers.timeouts),
            "verifier/recycled": float(workers.recycled),
            "verifier/pending": float(pending),
            "verifier/waiting": float(waiting),
        }

    def close(self) -> None:
        """End the workers and the actors. Callers that wait for room fail. Idempotent."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        with self._condition:
            if self._closed:
                return
            self._closed = True
            self._condition.notify_all()
        closing = [actor.handle.close.remote() for actor in self._actors]
        for actor, done in zip(self._actors, closing, strict=True):
            with contextlib.suppress(RayActorError, GetTimeoutError):  # gone, or stuck: the kill below settles both
                ray.get(done, timeout=30)
            ray.kill(actor.handle)

    # Inside.

    def _acquire(self) -> _Actor:
        with self._condition:
            self._waiting += 1
            try:
                while True:
                    if self._closed:
                        raise RuntimeError("the reward pool was closed")
                    actor = min(self._actors, key=lambda a: a.pending)
                    if actor.pending < self._config.pending_groups:
                        actor.pending += 1
                        return actor
                    self._condition.wait(1.0)
            finally:
                self._waiting -= 1

    def _release(self, actor: _Actor) -> None:
        with self._condition:
            actor.pending -= 1
            self._condition.notify()

    def _reports(self, timeout_s: float | None = None) -> list[ActorReport]:
        """What every actor says; what it said last time, of one that does not answer in time."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        asked = [actor.handle.report.remote() for actor in self._actors]
        reports = []
        for actor, reference in zip(self._actors, asked, strict=True):
            try:
                reports.append(ray.get(reference, timeout=timeout_s))
            except (GetTimeoutError, RayActorError):
                reports.append(actor.last._replace(seconds=()))
        return reports


def _together(counts: Iterable[WorkerCounts]) -> WorkerCounts:
    total = WorkerCounts()
    for one in counts:
        total = total.plus(one)
    return total


def _unwrapped(future: Future[Any]) -> Any:
    """The result, or the actor's own exception instead of Ray's wrapper around it."""
    from ray.exceptions import RayTaskError

    try:
        return future.result()
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
