"""The stream of problems in, the window of scored groups out.

`GroupWindow` is what makes one loop both synchronous and asynchronous. It admits at most
``groups_per_step * (max_lag + 1)`` groups that are not trained yet::

    max_lag = 0    | rollout s          | train s | push | rollout s+1        | ...
    max_lag = 1    | rollout s, s+1 ... | train s | push | train s+1 | push | ...
                                          ^ rollouts go on while the learner trains

Admission bounds how old a group can become; what is too old all the same (a straggler under in-flight updates) is
dropped and counted, never trained.

Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) is a filter, `keep`: what it refuses makes room for groups of
further problems, up to a cap a step. Refused groups wait until the step is taken: if the cap was reached they fill it
up, the oldest first. So at max_lag 0 what is trained depends on the problems alone, not on which group finished first.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from memento.errors import RunFailed
from memento.problems import Problem
from memento.trajectory import RolloutRequest, ScoredGroup


class RolloutFailure(RunFailed):
    """So many groups failed that going on makes no sense. The cause is the last one's error."""


class ProblemStream:
    """Problems in an order that depends on the seed and the epoch alone, so that a cursor is all it takes to resume.

    Attributes:
        cursor: how many problems were handed out, over all epochs.
    """

    def __init__(self, problems: Sequence[Problem], seed: int, cursor: int = 0) -> None:
        if not problems:
            raise ValueError("a problem stream needs problems")
        self.cursor = cursor
        self._problems = problems
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def take(self, count: int) -> list[tuple[int, Problem]]:
        """The next `count` problems, each with its serial number (unique over epochs)."""
        taken = []
        for serial in range(self.cursor, self.cursor + max(count, 0)):
            epoch, index = divmod(serial, len(self._problems))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, list(range(len(self._problems)))
                random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
            taken.append((serial, self._problems[self._order[index]]))
        self.cursor += len(taken)
        return taken


@dataclass(slots=True)
class WindowCounts:
    """What happened to groups since the last `GroupWindow.take_counts`."""

    stale: int = 0
    """Dropped: sampled by weights older than the lag allows."""
    incomplete: int = 0
    """Dropped: a sample has no score because its verifier failed."""
    failed: int = 0
    """Dropped: generation or verification raised."""
    filtered: int = 0
    """Dropped: refused by the window's filter, and not needed to fill up a step."""


@dataclass(slots=True, eq=False)
class _Entry:
    request: RolloutRequest
    future: Future[ScoredGroup]
    group: ScoredGroup | None = None  # set once it is finished and was found fit to train
    refused: bool = False  # fit to train, but the filter would rather have another


def scores_differ(group: ScoredGroup) -> bool:
    """The filter of dynamic sampling: completions of equal score have no advantage over their group."""
    return len(set(group.scores)) > 1


@dataclass
class GroupWindow:
    """Groups in flight, and finished ones waiting to be trained.

    Args:
        groups_per_step: how many groups a step trains.
        max_lag: steps by which a group's oldest weights may lag behind the weights it trains.
        rollout: generates and scores one group; runs in a thread of the window, so it may block.
        keep: whether a finished group is worth training; None keeps all.
        max_filtered: groups that `keep` may cost a step. Further ones it refuses are trained.
    """

    groups_per_step: int
    max_lag: int
    rollout: Callable[[RolloutRequest], ScoredGroup]
    keep: Callable[[ScoredGroup], bool] | None = None
    max_filtered: int = 0
    counts: WindowCounts = field(default_factory=WindowCounts)
    _entries: list[_Entry] = field(default_factory=list)  # in order of admission
    _last_error: BaseException | None = None

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(self.capacity, thread_name_prefix="rollout")

    @property
    def capacity(self) -> int:
        """Groups admitted and not yet trained, at most."""
        return self.groups_per_step * (self.max_lag + 1)

    def room(self, left: int | None = None) -> int:
        """How many more groups may start now, if no more than `left` are to be trained any more (null: no end)."""
        admitted = self.capacity if left is None else min(self.capacity, left)
        return admitted - len(self._entries) + min(self._refused(), self.max_filtered)

    def start(self, request: RolloutRequest) -> None:
        """Admit a group and begin generating it."""
        if self.room() <= 0:
            raise ValueError(f"the window holds {self.capacity} groups already")
        self._entries.append(_Entry(request, self._threads.submit(self.rollout, request)))

    def pending(self) -> list[RolloutRequest]:
        """Requests admitted, not yet trained and not refused, in order: what a checkpoint must remember."""
        return [entry.request for entry in self._entries if not entry.refused]

    def ready(self) -> int:
        """How many admitted groups are finished and were found fit to train, refused ones only beyond the cap."""
        return sum(entry.group is not None for entry in self._entries) - min(self._refused(), self.max_filtered)

    def wait(self, version: int, timeout_s: float) -> bool:
        """Wait until enough groups are ready to train, or room was made by dropping one.

        Args:
            version: the weights that would train now; older than ``version - max_lag`` is stale.
            timeout_s: return after this long in any case, so that the caller can look at signals.

        Returns:
            Whether `take` would succeed now.

        Raises:
            RolloutFailure: as many groups as a step holds failed since the last `take_counts`.
        """
        self._collect(version)
        running = [entry.future for entry in self._entries if entry.group is None]
        if running and self.ready() < self.groups_per_step:
            wait(running, timeout=timeout_s, return_when=FIRST_COMPLETED)
            self._collect(version)
        if self.counts.failed >= self.groups_per_step:
            raise RolloutFailure(
                f"{self.counts.failed} groups failed in this step, the last one with: {self._last_error}"
            ) from self._last_error
        return self.ready() >= self.groups_per_step

    def take(self) -> list[ScoredGroup]:
        """The oldest `groups_per_step` ready groups, in order of admission; refused ones only where others lack."""
        if self.ready() < self.groups_per_step:
            raise ValueError(f"only {self.ready()} of {self.groups_per_step} groups are ready; call wait() first")
        finished = [entry for entry in self._entries if entry.group is not None]
        chosen = sorted(finished, key=lambda entry: entry.refused)[: self.groups_per_step]  # stable: the oldest first
        taken = [entry for entry in finished if entry in chosen]
        self._entries = [entry for entry in self._entries if entry not in taken]
        self.counts.filtered += self._refused()
        self._entries = [entry for entry in self._entries if not entry.refused]
        return [entry.group for entry in taken if entry.group is not None]

    def take_counts(self) -> WindowCounts:
        """The counts since the last call, and start over."""
        counts, self.counts = self.counts, WindowCounts()
        return counts

    def close(self) -> None:
        """Forget what has not started; threads inside a generation end with it."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _collect(self, version: int) -> None:
        """Look at what has finished: mark it ready, or drop and count it. What was ready may have become stale."""
        kept = []
        for entry in self._entries:
            if not entry.future.done():
                kept.append(entry)
            elif (error := entry.future.exception()) is not None:
                self.counts.failed += 1
                self._last_error = error
            elif not (group := entry.future.result()).complete:
                self.counts.incomplete += 1
            elif min(t.oldest_version for t in group.trajectories) < version - self.max_lag:
                self.counts.stale += 1
            else:
                entry.refused = self.keep is not None and not self.keep(group)
                entry.group = group
                kept.append(entry)
        self._entries = kept

    def _refused(self) -> int:
        return sum(entry.refused for entry in self._entries)
