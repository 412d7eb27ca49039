"""Trajectories cross processes and files unchanged, and refuse to be inconsistent."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from memento.errors import UserError
from memento.format import Eviction
from memento.problems import Problem, ProblemKind
from memento.trajectory import (
    FinishReason,
    Outcome,
    RewardResult,
    RolloutRequest,
    SamplingParams,
    ScoredGroup,
    Trajectory,
    VersionSpan,
    append_jsonl,
    read_trajectories,
    sample_seed,
)

PROBLEM = Problem(id="sum-1", kind=ProblemKind.MATH, prompt="1 + 1?", answer="2")


def make(**changes: Any) -> Trajectory:
    fields: dict[str, Any] = {
        "problem_id": "sum-1",
        "group_id": "0/sum-1",
        "sample_index": 0,
        "prompt_ids": (1, 2, 3),
        "completion_ids": (4, 5, 6, 7),
        "rollout_logprobs": (-0.1, -1e-9, -17.25, -0.3333333333333333),
        "forced": (2,),
        "text": "zwei — \u2028 \U0001f600 \x00",
        "finish_reason": FinishReason.STOP,
        "weight_versions": (VersionSpan(0, 2, 3), VersionSpan(2, 4, 4)),
        "evictions": (Eviction(6, 4, 5),),
        "evicted_tokens": 1,
        "peak_kv_tokens": 6,
        "peak_kv_pages": 1,
        "kv_area_tokens": 21,
        "preemptions": 1,
        "seed": 2**62 + 1,
        "temperature": 1.0,
        "engine": 1,
        "seconds": 0.25,
    }
    return Trajectory(**{**fields, **changes})


def scored() -> ScoredGroup:
    rewards = (
        RewardResult(score=1.0, outcome=Outcome.CORRECT, extracted="2", parts={"math": 1.0}),
        RewardResult(score=None, outcome=Outcome.VERIFIER_ERROR, detail="worker died"),
    )
    return ScoredGroup(problem=PROBLEM, trajectories=(make(), make(sample_index=1)), rewards=rewards)


def test_pickle_and_jsonl_round_trips_are_exact(tmp_path: Path) -> None:
    trajectory = make()
    back = pickle.loads(pickle.dumps(trajectory))
    assert back == trajectory and isinstance(back.evictions[0], Eviction)
    file = tmp_path / "t.jsonl"
    append_jsonl([trajectory, make(sample_index=1)], file)
    append_jsonl([make(sample_index=2)], file)
    read = list(read_trajectories(file))
    assert read == [make(sample_index=i) for i in range(3)]
    assert isinstance(read[0].evictions[0], Eviction) and isinstance(read[0].weight_versions[0], VersionSpan)
    assert len(file.read_bytes().splitlines()) == 3, "one line each, whatever the text holds"


def test_scored_groups_and_requests_round_trip(tmp_path: Path) -> None:
    group = scored()
    assert pickle.loads(pickle.dumps(group)) == group
    assert ScoredGroup.model_validate_json(group.model_dump_json()) == group
    append_jsonl([group], tmp_path / "rollouts.jsonl")
    assert tuple(read_trajectories(tmp_path / "rollouts.jsonl")) == group.trajectories
    sampling = SamplingParams(temperature=1.0, max_tokens=8)
    request = RolloutRequest(problem=PROBLEM, group_id="0/sum-1", group_size=2, sampling=sampling, seed=0)
    assert pickle.loads(pickle.dumps(request)) == request
    assert RolloutRequest.model_validate_json(request.model_dump_json()) == request


def test_derived_properties() -> None:
    trajectory = make()
    assert trajectory.token_ids == (1, 2, 3, 4, 5, 6, 7) and trajectory.prompt_len == 3
    assert trajectory.oldest_version == 3 and not trajectory.truncated
    assert make(finish_reason="length").truncated


def test_a_missing_logprob_is_an_error() -> None:
    with pytest.raises(ValidationError, match="4 completion tokens but 3 rollout_logprobs"):
        make(rollout_logprobs=(-0.1, -0.2, -0.3))


def test_a_failure_is_never_a_number() -> None:
    with pytest.raises(ValidationError, match="no score"):
        RewardResult(score=0.0, outcome=Outcome.VERIFIER_ERROR)
    with pytest.raises(ValidationError, match="needs a score"):
        RewardResult(score=None, outcome=Outcome.WRONG)
    group = scored()
    assert not group.complete
    with pytest.raises(ValueError, match="without a score"):
        _ = group.scores
    with pytest.raises(ValidationError, match="2 trajectories but 1 rewards"):
        ScoredGroup(problem=PROBLEM, trajectories=group.trajectories, rewards=group.rewards[:1])


def test_records_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make().seed = 1  # pyright: ignore[reportAttributeAccessIssue]  # the point of the test
    with pytest.raises(ValidationError, match="Extra inputs"):
        make(reward=1.0)


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    append_jsonl([make()], file)
    with file.open("a") as lines:
        lines.write('{"problem_id": "x"}\n')
    with pytest.raises(UserError, match=r"t\.jsonl, line 2 is not a trajectory"):
        list(read_trajectories(file))
    with pytest.raises(UserError, match="no trajectory file"):
        list(read_trajectories(tmp_path / "nowhere.jsonl"))


def test_seeds_differ_by_run_group_and_index_alone() -> None:
    seeds = {
        sample_seed(run, group, index) for run in range(3) for group in ("0/a", "1/a", "0/b") for index in range(4)
    }
    assert len(seeds) == 36 and all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(0, "0/a", 0) == 530597490709943877, "old runs could not be resumed"
