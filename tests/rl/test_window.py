"""The window bounds lag, drops what must not be trained and counts it; the stream resumes from a number."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from memento.problems import Problem, ProblemKind
from memento.rl.window import GroupWindow, ProblemStream, RolloutFailure, scores_differ
from memento.trajectory import (
    FinishReason,
    Outcome,
    RewardResult,
    RolloutRequest,
    SamplingParams,
    ScoredGroup,
    Trajectory,
    VersionSpan,
)


def problem(index: int) -> Problem:
    return Problem(id=f"p{index}", kind=ProblemKind.MATH, prompt="1+1?", answer="2")


def request(index: int) -> RolloutRequest:
    sampling = SamplingParams(temperature=1.0, max_tokens=8)
    return RolloutRequest(problem=problem(index), group_id=f"{index}/p", group_size=1, sampling=sampling, seed=0)


def scored(request: RolloutRequest, version: int = 0, outcome: Outcome = Outcome.CORRECT) -> ScoredGroup:
    trajectory = Trajectory(
        problem_id=request.problem.id,
        group_id=request.group_id,
        sample_index=0,
        prompt_ids=(1,),
        completion_ids=(2, 3),
        rollout_logprobs=(-1.0, -1.0),
        text="2",
        finish_reason=FinishReason.STOP,
        weight_versions=(VersionSpan(0, 2, version),),
        peak_kv_tokens=3,
        peak_kv_pages=1,
        kv_area_tokens=5,
        seed=1,
        temperature=1.0,
        seconds=0.0,
    )
    score = None if outcome is Outcome.VERIFIER_ERROR else 1.0
    return ScoredGroup(
        problem=request.problem,
        trajectories=(trajectory,),
        rewards=(RewardResult(score=score, outcome=outcome),),
    )


def window(rollout: Callable[[RolloutRequest], ScoredGroup], groups: int = 2, max_lag: int = 0) -> GroupWindow:
    return GroupWindow(groups, max_lag, rollout)


def wait_until_ready(window: GroupWindow, version: int = 0) -> None:
    deadline = time.monotonic() + 10
    while not window.wait(version, 0.05):
        assert time.monotonic() < deadline, "the window never became ready"


def test_the_synchronous_window_holds_one_step_in_order_of_admission() -> None:
    release = {0: threading.Event(), 1: threading.Event()}

    def rollout(request: RolloutRequest) -> ScoredGroup:
        release[int(request.group_id[0])].wait(10)
        return scored(request)

    groups = window(rollout)
    groups.start(request(0))
    groups.start(request(1))
    assert groups.room() == 0
    with pytest.raises(ValueError, match="holds 2 groups"):
        groups.start(request(2))
    release[1].set()  # the second finishes first
    assert not groups.wait(0, 0.05)
    release[0].set()
    wait_until_ready(groups)
    assert [group.problem.id for group in groups.take()] == ["p0", "p1"]
    assert groups.room() == 2
    groups.close()


def test_max_lag_admits_that_many_steps_ahead() -> None:
    groups = window(scored, groups=2, max_lag=3)
    assert groups.room() == 8
    for index in range(8):
        groups.start(request(index))
    wait_until_ready(groups)
    groups.take()
    assert groups.room() == 2
    assert [r.problem.id for r in groups.pending()] == [f"p{i}" for i in range(2, 8)]
    # Nothing is generated that no step would train: three steps are left, and their groups are in flight.
    assert [groups.room(left) for left in (10, 8, 7, 6, 2)] == [2, 2, 1, 0, -4]
    groups.close()


@pytest.mark.parametrize(
    ("make", "counter"),
    [
        (lambda r: scored(r, version=3), "stale"),
        (lambda r: scored(r, version=5, outcome=Outcome.VERIFIER_ERROR), "incomplete"),
    ],
)
def test_unusable_groups_are_dropped_counted_and_make_room(
    make: Callable[[RolloutRequest], ScoredGroup], counter: str
) -> None:
    def rollout(request: RolloutRequest) -> ScoredGroup:
        return make(request) if request.problem.id == "p0" else scored(request, version=5)

    groups = window(rollout, groups=2, max_lag=1)
    for index in range(3):
        groups.start(request(index))
    wait_until_ready(groups, version=5)
    deadline = time.monotonic() + 10
    while getattr(groups.counts, counter) == 0 and time.monotonic() < deadline:
        groups.wait(5, 0.05)
    assert [group.problem.id for group in groups.take()] == ["p1", "p2"]
    counts = groups.take_counts()
    assert getattr(counts, counter) == 1
    assert counts.stale + counts.incomplete + counts.failed == 1
    assert getattr(groups.counts, counter) == 0, "counts start over"
    groups.close()


def test_a_step_of_failures_ends_the_run_with_its_cause() -> None:
    def rollout(request: RolloutRequest) -> ScoredGroup:
        raise OSError("engine 3 is gone")

    groups = window(rollout, groups=2)
    groups.start(request(0))
    groups.start(request(1))
    with pytest.raises(RolloutFailure, match="engine 3 is gone"):
        wait_until_ready(groups)
    groups.close()


def fill_and_take(groups: GroupWindow, first: int, version: int = 0) -> tuple[list[str], int]:
    """Train one step as the loop does: refill until it is ready. Returns the problems and the next index."""
    deadline = time.monotonic() + 10
    while True:
        for _ in range(groups.room()):
            groups.start(request(first))
            first += 1
        if groups.wait(version, 0.05):
            return [group.problem.id for group in groups.take()], first
        assert time.monotonic() < deadline, "the window never became ready"


def keep_multiples_of_3(group: ScoredGroup) -> bool:
    return int(group.problem.id[1:]) % 3 == 0


@pytest.mark.parametrize("slow", ["none", "even", "odd"])
def test_the_filter_replaces_groups_whatever_finishes_first(slow: str) -> None:
    def rollout(request: RolloutRequest) -> ScoredGroup:
        if slow != "none" and int(request.problem.id[1:]) % 2 == (slow == "odd"):
            time.sleep(0.02)
        return scored(request)

    groups = GroupWindow(3, 0, rollout, keep_multiples_of_3, max_filtered=100)
    taken, admitted = fill_and_take(groups, 0)
    assert taken == ["p0", "p3", "p6"] and admitted == 7, "not one group more than it takes"
    assert groups.take_counts().filtered == 4 and groups.pending() == [] and groups.room() == 3
    assert fill_and_take(groups, admitted) == (["p9", "p12", "p15"], 16)
    groups.close()


@pytest.mark.parametrize("slow", ["none", "even", "odd"])
def test_past_the_cap_the_oldest_refused_groups_fill_up_the_step(slow: str) -> None:
    def rollout(request: RolloutRequest) -> ScoredGroup:
        if slow != "none" and int(request.problem.id[1:]) % 2 == (slow == "odd"):
            time.sleep(0.02)
        return scored(request)

    groups = GroupWindow(3, 0, rollout, keep_multiples_of_3, max_filtered=2)
    # Five are admitted, 1 to 5: only 3 is kept, and 1 and 2 are the oldest of the others.
    assert fill_and_take(groups, 1) == (["p1", "p2", "p3"], 6)
    assert groups.take_counts().filtered == 2
    groups.close()


def test_the_cap_holds_ahead_of_the_learner_too() -> None:
    groups = GroupWindow(2, 1, scored, lambda _: False, max_filtered=4)
    taken, admitted = fill_and_take(groups, 0)
    assert len(taken) == 2 and admitted == 8, "two steps' worth, and four in place of refused ones"
    assert 4 <= groups.take_counts().filtered <= 6
    groups.close()


def test_refused_groups_are_not_pending() -> None:
    groups = GroupWindow(3, 0, scored, keep_multiples_of_3, max_filtered=5)
    for index in range(3):
        groups.start(request(index))
    deadline = time.monotonic() + 10
    while groups.room() < 2 and time.monotonic() < deadline:
        assert not groups.wait(0, 0.05)
    assert [r.problem.id for r in groups.pending()] == ["p0"] and groups.room() == 2
    with pytest.raises(ValueError, match="only 1 of 3"):
        groups.take()
    groups.close()


def test_the_filter_of_dynamic_sampling() -> None:
    group = scored(request(0))
    assert not scores_differ(group)
    wrong = RewardResult(score=0.0, outcome=Outcome.WRONG)
    both = ScoredGroup(problem=group.problem, trajectories=group.trajectories * 2, rewards=(group.rewards[0], wrong))
    assert scores_differ(both)


def test_the_stream_resumes_from_its_cursor_and_reshuffles_each_epoch() -> None:
    problems = [problem(index) for index in range(10)]
    whole = ProblemStream(problems, seed=7)
    first, second = whole.take(10), whole.take(10)
    assert sorted(p.id for _, p in first) == sorted(p.id for p in problems), "an epoch holds each problem once"
    assert [p.id for _, p in first] != [p.id for _, p in second]
    assert [serial for serial, _ in first + second] == list(range(20))
    resumed = ProblemStream(problems, seed=7, cursor=6)
    assert resumed.take(14) == (first + second)[6:]
    assert whole.take(0) == []
