"""The table of metrics against what is logged, both ways; tests/test_quickstart.py does so on finished runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from memento.config import FormatConfig
from memento.metrics import METRICS, SECTIONS, Metric, find, metrics_reference, missing, nearest, undocumented
from memento.trajectory import Outcome, SamplingParams, ScoredGroup


def test_names_are_unique_and_described() -> None:
    counts = Counter((m.name, part == "sft") for part, (_, metrics) in SECTIONS.items() for m in metrics)
    assert max(counts.values()) == 1, counts.most_common(1)
    assert all(metric.unit and metric.meaning for metric in METRICS)


def test_a_condition_belongs_to_some() -> None:
    with pytest.raises(ValueError, match="only"):
        Metric("x/y", "1", "z", when="some")
    with pytest.raises(ValueError, match="only"):
        Metric("x/y", "1", "z", only="sometimes")


def test_look_up() -> None:
    found = find("eval/pass_at_16")
    assert found is not None and found.name == "eval/pass_at_*"
    assert find("eval/pass_at_") is not None and find("reward/median") is None
    assert undocumented(["step", "reward/mean", "reward/median"]) == ["reward/median"]
    assert "reward/mean" in missing(["train/loss"], "step") and "train/loss" not in missing(["train/loss"], "step")


def test_a_misspelt_name_is_met_with_the_nearest() -> None:
    assert nearest("reward/men", ["reward/mean", "train/loss"]) == " (did you mean reward/mean?)"
    assert nearest("zzz", ["reward/mean"]) == " (there are: reward/mean)"


def test_rollouts_and_evaluation_log_what_is_documented(groups: Sequence[ScoredGroup], tokenizer: Any) -> None:
    from memento.rl.evaluate import summarise
    from memento.rl.metrics import rollout_metrics

    fmt = FormatConfig().bind(tokenizer)
    rollouts = rollout_metrics(groups, fmt, version=4)
    assert undocumented(rollouts) == []
    sections = {"reward", "outcome", "length", "memento", "kv", "lag"}
    lacking = [name for name in missing(rollouts, "step") if name.split("/")[0] in sections or name == "preemptions"]
    assert lacking == ["reward/zero_std_fraction"], "no group of this fixture is complete; all else is logged"
    sampling = SamplingParams(temperature=1.0, max_tokens=10)
    evaluation = summarise(groups, fmt, samples=3, sampling=sampling, seed=0).metrics()
    assert undocumented(evaluation) == [] and missing(evaluation, "eval") == []


def test_every_outcome_has_its_metric() -> None:
    assert all(find(f"outcome/{outcome.value}") is not None for outcome in Outcome)


def test_the_page_has_every_metric() -> None:
    page = metrics_reference()
    assert all(f"| `{metric.name}` |" in page for metric in METRICS)
    # Four cells a row: a bare | inside a formula would make a fifth.
    rows = [line.replace("\\|", "") for line in page.splitlines() if line.startswith("| `")]
    assert {row.count("|") for row in rows} == {5}
