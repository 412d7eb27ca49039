"""What a run trains and evaluates on, and the parts of its rewards as metrics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memento.errors import UserError
from memento.format import MementoFormat
from memento.problems import Problem, ProblemKind, save_problems
from memento.rl.metrics import rollout_metrics
from memento.rl.train import load_problem_sets
from memento.trajectory import Outcome, RewardResult


def problems(folder: Path, name: str, *prompts: str, answer: str = "2") -> str:
    made = [Problem(id=f"{name}-{n}", kind=ProblemKind.MATH, prompt=p, answer=answer) for n, p in enumerate(prompts)]
    save_problems(made, folder / f"{name}.jsonl")
    return str(folder / f"{name}.jsonl")


def test_a_run_does_not_train_on_what_it_is_evaluated_on(make: Callable[..., Any], tmp_path: Path) -> None:
    training, held_out = (
        problems(tmp_path, "a", "What is 1+1?", "What is 3-1?"),
        problems(tmp_path, "b", "what is $1+1$"),
    )
    sections = {"problems": {"path": training}, "eval": {"problems": {"path": held_out}}}
    trained, evaluated = load_problem_sets(make("config", **sections))
    assert [p.id for p in trained.problems] == ["a-1"]
    assert evaluated is not None and [p.id for p in evaluated.problems] == ["b-0"]
    assert str(trained) == "1 problems (2 read; 1 also in what is held out)"
    sections["eval"]["decontaminate"] = False
    assert len(load_problem_sets(make("config", **sections))[0].problems) == 2
    assert load_problem_sets(make("config", problems={"path": training}))[1] is None


def test_bad_golds_and_missing_functions_stop_a_run_before_it_starts(make: Callable[..., Any], tmp_path: Path) -> None:
    fine, broken = problems(tmp_path, "a", "What is 1+1?"), problems(tmp_path, "b", "x", "y", answer="\\frac{1}{")
    with pytest.raises(UserError, match=r"b\.jsonl, line 1: problem 'b-0'.* 2 of 2 problems are bad"):
        load_problem_sets(make("config", problems={"path": broken}))
    with pytest.raises(UserError, match=r"b\.jsonl, line 1"):
        load_problem_sets(make("config", problems={"path": fine}, eval={"problems": {"path": broken}}))
    rewards = {"terms": [{"kind": "custom", "function": "no_such_module_here:f"}]}
    with pytest.raises(UserError, match="no_such_module_here:f"):
        load_problem_sets(make("config", problems={"path": fine}, rewards=rewards))


def test_every_part_of_a_reward_is_a_metric(make: Callable[..., Any], fmt: MementoFormat) -> None:
    group = make("group", [make("trajectory", sample=n) for n in range(3)], [1.0, 0.0, None])
    parts = ({"math": 1.0, "terse": 0.5}, {"math": 0.0, "terse": 1.0}, {"terse": 0.0})
    rewards = tuple(r.model_copy(update={"parts": p}) for r, p in zip(group.rewards, parts, strict=True))
    assert isinstance(rewards[0], RewardResult) and rewards[2].outcome is Outcome.VERIFIER_ERROR
    metrics = rollout_metrics([group.model_copy(update={"rewards": rewards})], fmt)
    assert (metrics["reward/part/math"], metrics["reward/part/terse"]) == (0.5, 0.5)
    assert metrics["outcome/verifier_error"] == pytest.approx(1 / 3)
