"""Sampled traces as an engine would leave them, built from worked traces of the arithmetic family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from memento.arithmetic import make_traces
from memento.chat import encode_prompt
from memento.config import FormatConfig
from memento.format import evictions, kv_profile
from memento.problems import Problem
from memento.tiny import make_tokenizer
from memento.trajectory import Eviction, FinishReason, Outcome, RewardResult, ScoredGroup, Trajectory, VersionSpan


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


def sampled(tokenizer: Any, problem: Problem, text: str, **more: Any) -> Trajectory:
    """The record of `text` as a completion of `problem`, with the evictions its tokens call for."""
    prompt = encode_prompt(tokenizer, problem.prompt)
    completion = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids, fmt = prompt + completion, FormatConfig().bind(tokenizer)
    kv = kv_profile(ids, fmt, len(prompt))
    record: dict[str, Any] = {
        "problem_id": problem.id,
        "group_id": f"0/{problem.id}",
        "sample_index": 0,
        "prompt_ids": tuple(prompt),
        "completion_ids": tuple(completion),
        "rollout_logprobs": (-0.1,) * len(completion),
        "text": text,
        "finish_reason": FinishReason.STOP,
        "weight_versions": (VersionSpan(0, len(completion), 3),),
        "evictions": tuple(Eviction(*e) for e in evictions(ids, fmt, len(prompt))),
        "peak_kv_tokens": kv.peak_tokens,
        "peak_kv_pages": 5,
        "kv_area_tokens": kv.area,
        "seed": 1,
        "temperature": 1.0,
        "seconds": 0.5,
    }
    return Trajectory.model_validate(record | more)


@pytest.fixture(scope="session")
def groups(tokenizer: Any) -> Sequence[ScoredGroup]:
    """Four groups of three samples; the second sample of each is right."""
    made = []
    for problem, text in make_traces(4, seed=0):
        trajectories = tuple(sampled(tokenizer, problem, text, sample_index=i) for i in range(3))
        outcomes = (Outcome.WRONG, Outcome.CORRECT, Outcome.VERIFIER_ERROR)
        scores = (0.0, 1.0, None)
        rewards = tuple(
            RewardResult(score=s, outcome=o, extracted=problem.answer) for s, o in zip(scores, outcomes, strict=True)
        )
        made.append(ScoredGroup(problem=problem, trajectories=trajectories, rewards=rewards))
    return made
