"""The reward pool of a run: a Ray actor over killable worker processes.

driver --completions--> RewardActor (asyncio, threads) --JSON lines--> math workers
                                                       --processes---> code sandbox
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from memento.config import RewardsConfig
from memento.problems import Problem
from memento.trajectory import Outcome, RewardResult

if TYPE_CHECKING:
    from ray import ObjectRef

MAX_PENDING_GROUPS = 64
"""Groups one actor takes at a time; the driver's further calls wait in `score_many`."""

Completions = tuple[Problem, Sequence[str]]


class RewardActor:
    """What runs in the actor: a `Scorer` and as many threads as it has workers. Every method returns soon or awaits."""

    def __init__(self, config: RewardsConfig) -> None:
        from memento.rewards.scoring import Scorer

        self._scorer = Scorer(config)
        self._threads = ThreadPoolExecutor(max_workers=config.workers, thread_name_prefix="verify")
        self._outcomes: Counter[Outcome] = Counter()

    async def score(self, problem: Problem, completions: Sequence[str]) -> list[RewardResult]:
        """Verdicts in the order of the completions."""
        loop = asyncio.get_running_loop()
        jobs = [loop.run_in_executor(self._threads, self._scorer.score, problem, text) for text in completions]
        results = list(await asyncio.gather(*jobs))
        self._outcomes.update(result.outcome for result in results)
        return results

    async def check(self, problems: Sequence[Problem]) -> None:
        """Raise UserError for a problem that no completion could get right."""
        loop = asyncio.get_running_loop()
        await asyncio.gather(
            *(loop.run_in_executor(self._threads, self._scorer.check, problem) for problem in problems)
        )

    async def counts(self) -> dict[str, int]:
        """Outcomes so far, and how many workers had to be replaced."""
        return {**_zero_counts(), **dict(self._outcomes), "worker_restarts": self._scorer.worker_restarts}

    async def close(self) -> None:
        """End the worker processes."""
        self._scorer.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _zero_counts() -> dict[str, int]:
    return {outcome.value: 0 for outcome in Outcome}


class RewardPool:
    """Scores groups of completions outside the driver. Needs a running Ray; the actor starts here.

    The actor is restarted if its process dies, and the calls it was serving are repeated: verification has no state.
    """

    def __init__(self, config: RewardsConfig) -> None:
        import ray

        actor = ray.remote(RewardActor)
        self._actor: Any = actor.options(
            num_cpus=config.cpus, max_concurrency=MAX_PENDING_GROUPS, max_restarts=4, max_task_retries=2
        ).remote(config)

    def submit(self, problem: Problem, completions: Sequence[str]) -> ObjectRef[list[RewardResult]]:
        """Start scoring a group; the reference resolves to the verdicts. It returns at once."""
        return self._actor.score.remote(problem, list(completions))

    def score(self, problem: Problem, completions: Sequence[str]) -> list[RewardResult]:
        """Score a group and wait for it."""
        import ray

        return ray.get(self.submit(problem, completions))

    async def score_async(self, problem: Problem, completions: Sequence[str]) -> list[RewardResult]:
        """`score` for asyncio callers."""
        return await self.submit(problem, completions)

    def score_many(self, groups: Iterable[Completions]) -> list[list[RewardResult]]:
        """Score many groups, in order, with at most `MAX_PENDING_GROUPS` of them in flight."""
        import ray

        pending: list[Any] = []
        results: list[list[RewardResult]] = []
        for problem, completions in groups:
            if len(pending) - len(results) >= MAX_PENDING_GROUPS:
                results.append(ray.get(pending[len(results)]))
            pending.append(self.submit(problem, completions))
        return results + ray.get(pending[len(results) :])

    def check(self, problems: Sequence[Problem]) -> None:
        """Fail on problems that no completion could ever get right.

        Raises:
            UserError: naming the problem.
        """
        import ray
        from ray.exceptions import RayTaskError

        try:
            ray.get(self._actor.check.remote(list(problems)))
        except RayTaskError as error:
            raise error.cause if error.cause is not None else error from None

    def counts(self) -> dict[str, int]:
        """How many verdicts of each outcome so far, and ``worker_restarts``."""
        import ray

        return ray.get(self._actor.counts.remote())

    def close(self) -> None:
        """End the workers and the actor. Idempotent."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        if self._actor is None:
            return
        with contextlib.suppress(RayActorError, GetTimeoutError):  # gone, or stuck: the kill below settles both
            ray.get(self._actor.close.remote(), timeout=30)
        ray.kill(self._actor)
        self._actor = None
