"""Records and configs for the learner's tests: small, real, and made from a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memento.config import RlConfig
from memento.format import MementoFormat, kv_profile
from memento.problems import Problem, ProblemKind
from memento.tiny import write_tiny_model
from memento.trajectory import FinishReason, Outcome, RewardResult, ScoredGroup, Trajectory, VersionSpan

FORMAT = MementoFormat(block_start=1, block_end=2, summary_start=3, summary_end=4, evict_delimiters=False)
VOCABULARY = 64


@pytest.fixture(scope="session")
def fmt() -> MementoFormat:
    return FORMAT


def make_config(out: Path | str = "unused", **sections: Any) -> RlConfig:
    tree: dict[str, Any] = {"out": str(out), "model": "unused", "problems": {"arithmetic": {}}, "groups_per_step": 2}
    return RlConfig.model_validate(tree | {"group_size": 2} | sections)


def make_model(folder: Path) -> Path:
    """A Qwen3 of 30 K parameters."""
    return write_tiny_model(
        folder, seed=0, hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate_size=64
    )


def make_trajectory(
    prompt: Sequence[int] = (9, 9),
    completion: Sequence[int] = (5, 6, 0),
    group: str = "0/p",
    sample: int = 0,
    **changes: Any,
) -> Trajectory:
    profile = kv_profile([*prompt, *completion], FORMAT, len(prompt))
    values: dict[str, Any] = {
        "problem_id": group,
        "group_id": group,
        "sample_index": sample,
        "prompt_ids": tuple(prompt),
        "completion_ids": tuple(completion),
        "rollout_logprobs": tuple(-0.5 - 0.01 * i for i in range(len(completion))),
        "text": "",
        "finish_reason": FinishReason.STOP,
        "weight_versions": (VersionSpan(0, len(completion), 0),),
        "peak_kv_tokens": profile.peak_tokens,
        "peak_kv_pages": 1,
        "kv_area_tokens": profile.area,
        "seed": 0,
        "temperature": 1.0,
        "seconds": 0.1,
    }
    return Trajectory.model_validate(values | changes)


def make_group(trajectories: Sequence[Trajectory], scores: Sequence[float | None]) -> ScoredGroup:
    name = trajectories[0].group_id
    results = [
        RewardResult(score=None, outcome=Outcome.VERIFIER_ERROR)
        if score is None
        else RewardResult(score=score, outcome=Outcome.CORRECT if score else Outcome.WRONG)
        for score in scores
    ]
    problem = Problem(id=name, kind=ProblemKind.MATH, prompt="?", answer="1")
    return ScoredGroup(problem=problem, trajectories=tuple(trajectories), rewards=tuple(results))


def random_groups(groups: int, group_size: int, seed: int = 0, logprob_noise: float = 0.1) -> list[ScoredGroup]:
    """Memento traces of uneven length: prompt, one to three blocks, some forced, an answer; random rewards."""
    rng = np.random.default_rng(seed)

    def words(low: int, high: int) -> list[int]:
        return rng.integers(5, VOCABULARY, rng.integers(low, high)).tolist()

    made = []
    for g in range(groups):
        prompt = words(3, 7)
        trajectories = []
        for sample in range(group_size):
            completion: list[int] = []
            forced = []
            for _ in range(rng.integers(1, 4)):
                completion += [1, *words(2, 9)]
                if rng.random() < 0.3:
                    forced.append(len(completion))
                completion += [2, 3, *words(1, 3), 4]
            completion += [*words(1, 4), 0]
            noise = logprob_noise * rng.standard_normal(len(completion))
            values = {"forced": tuple(forced), "rollout_logprobs": tuple((noise - np.log(VOCABULARY)).tolist())}
            trajectories.append(make_trajectory(prompt, completion, f"0/p{g}", sample, **values))
        made.append(make_group(trajectories, rng.integers(0, 2, group_size).astype(float).tolist()))
    return made


@pytest.fixture(scope="session")
def make() -> Callable[..., Any]:
    """The builders, by name: ``make("group", trajectories, scores)``."""
    builders = {
        "config": make_config,
        "model": make_model,
        "trajectory": make_trajectory,
        "group": make_group,
        "random_groups": random_groups,
    }
    return lambda name, *args, **kwargs: builders[name](*args, **kwargs)
