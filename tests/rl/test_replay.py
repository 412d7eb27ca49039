"""The learner alone, on recorded groups: Ray, DeepSpeed, run folder and checkpoints; no engine.

Learners take seconds to start, so one recording serves several questions: its third step's log-probabilities are off,
so that a run with a limit ends there.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from memento.cluster import disconnect
from memento.config import RlConfig
from memento.errors import UserError
from memento.rl.checkpoint import latest_checkpoint, load_state
from memento.rl.learner import FAILED_BATCH, NonFiniteLoss
from memento.rl.replay import DriftReport, drift_table, replay
from memento.rl.train import MismatchAlarm
from memento.run import read_metrics
from memento.trajectory import ScoredGroup, append_jsonl

VOCABULARY = 416
SAME = ("train/loss", "train/grad_norm", "train/lr", "train/entropy", "ratio/max", "mismatch/kl_mean", "reward/mean")


@pytest.fixture(scope="module")
def model(make, tmp_path_factory) -> Path:
    return make("model", tmp_path_factory.mktemp("replay") / "model")


@pytest.fixture(scope="module")
def groups(make) -> list[ScoredGroup]:
    """Three steps of two groups of three, log-probabilities near those of the untrained model; of the last two off."""
    made = []
    for g, group in enumerate(make("random_groups", 6, 3, seed=2, logprob_noise=0.05)):
        shift = math.log(64 / VOCABULARY) + (2.0 if g >= 4 else 0.0)
        trajectories = [
            t.model_copy(update={"rollout_logprobs": tuple(p + shift for p in t.rollout_logprobs)})
            for t in group.trajectories
        ]
        made.append(make("group", trajectories, [float((g + i) % 2) for i in range(3)]))
    return made


@pytest.fixture(scope="module")
def rollouts(groups, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("recorded") / "rollouts.jsonl"
    append_jsonl(groups, file)
    return file


@pytest.fixture
def config_of(make, model, monkeypatch) -> Iterator[Callable[..., RlConfig]]:
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")

    def build(out: Path, **sections: Any) -> RlConfig:
        learner = {"lr": 1e-2, "eps": 1e-3, "warmup_steps": 2, "dtype": "float32", "minibatches": 2, "cpus": 0.5}
        tree = {
            "model": str(model),
            "steps": 10,
            "group_size": 3,
            "algorithm": {"mismatch_kl_limit": 0.2},
            "learner": learner | {"start_timeout_s": 200} | sections.pop("learner", {}),
            "checkpoint": {"interval": 1, "keep": 1},
            "tracking": {"mode": "disabled"},
        }
        return make("config", out, **(tree | sections))

    yield build
    disconnect()


@pytest.mark.slow
def test_a_replay_is_resumed_profiled_and_ended_by_the_alarm(config_of, rollouts, tmp_path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with pytest.raises(MismatchAlarm, match=r"step 3: the mean mismatch KL .*alarm-3\.jsonl"):
        replay(config_of(whole, profile_steps=(2, 2)), rollouts)
    # The step is in the metrics and its trajectories are saved; the last checkpoint is that of the step before.
    rows = read_metrics(whole)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert max(row["mismatch/kl_mean"] or 1 for row in rows[:2]) < 0.05 < 0.2 < (rows[2]["mismatch/kl_mean"] or 0)
    saved = [ScoredGroup.model_validate_json(line) for line in (whole / "alarm-3.jsonl").read_text().splitlines()]
    assert [t.token_ids for g in saved for t in g.trajectories] == [
        t.token_ids
        for line in rollouts.read_text().splitlines()[4:]
        for t in ScoredGroup.model_validate_json(line).trajectories
    ]
    checkpoint = latest_checkpoint(whole)
    assert checkpoint is not None and load_state(checkpoint).step == 2
    events = json.loads(gzip.decompress((whole / "profile" / "rank-0.json.gz").read_bytes()))["traceEvents"]
    assert any("mm" in event.get("name", "") for event in events), "the trace holds the matrix products of the step"

    hf = replay(config_of(parts, steps=2), rollouts)
    assert (hf / "model.safetensors").is_file() and len(read_metrics(parts)) == 2
    with pytest.raises(MismatchAlarm):  # goes on with the third step, in new processes
        replay(config_of(parts), rollouts, resume=True)
    for before, after in zip(rows, read_metrics(parts), strict=True):
        assert [after[name] for name in SAME] == [before[name] for name in SAME]
    assert (rows[0]["memory/learner_rss_mib"] or 0) > 100


@pytest.mark.slow
def test_a_loss_that_is_no_number_leaves_the_last_checkpoint(config_of, rollouts, tmp_path) -> None:
    config = config_of(tmp_path, learner={"lr": 1e25, "eps": 1e-8, "warmup_steps": 0, "minibatches": 1})
    with pytest.raises(NonFiniteLoss, match=r"the (loss|gradient norm) is .*failed_batch\.pt"):
        replay(config, rollouts)
    batch = torch.load(tmp_path / FAILED_BATCH, weights_only=False)
    assert batch.minibatches[0].loss_tokens > 0
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and load_state(checkpoint).step == 1
    assert not (tmp_path / "hf").exists()


@pytest.mark.long
def test_memory_does_not_grow(config_of, groups, tmp_path) -> None:
    file = tmp_path / "rollouts.jsonl"
    append_jsonl([group for _ in range(100) for group in groups[:4]], file)
    config = config_of(tmp_path / "run", steps=200, checkpoint={"interval": 1000}, algorithm={})
    replay(config, file)
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 200
    for name in ("memory/learner_rss_mib", "memory/driver_rss_mib"):
        values = [float(row[name] or 0) for row in rows]
        print(name, values[49], values[-1])
        assert 0 < values[-1] < values[49] + 10, name  # MiB over the last 150 steps


def changed(groups: list[ScoredGroup], **update: Any) -> list[ScoredGroup]:
    first = groups[0]
    trajectories = tuple(t.model_copy(update=update) for t in first.trajectories)
    return [first.model_copy(update={"trajectories": trajectories}), *groups[1:]]


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda groups: [t for g in groups for t in g.trajectories], r"line 1: no scored group.*memento score"),
        (lambda groups: groups[:1], r"holds 1 groups, and a step takes 2"),
        (lambda groups: changed(groups, temperature=0.6), r"line 1: sampled at 0\.6, and sampling\.temperature is 1"),
        (lambda groups: changed(groups, prompt_ids=(900,)), r"line 1: token id 900, and .* has \d+"),
        (lambda groups: [], "holds 0 groups"),
    ],
)
def test_recordings_that_do_not_fit_are_refused_before_anything_starts(damage, match, groups, config_of, tmp_path):
    file = tmp_path / "rollouts.jsonl"
    append_jsonl(damage(groups), file)
    file.touch()
    with pytest.raises(UserError, match=match):
        replay(config_of(tmp_path / "run"), file)
    with pytest.raises(UserError, match="no rollout file"):
        replay(config_of(tmp_path / "run"), tmp_path / "absent.jsonl")
    assert not (tmp_path / "run").exists()


def test_groups_of_another_size_or_without_a_score_are_refused(groups, make, config_of, tmp_path):
    file = tmp_path / "rollouts.jsonl"
    append_jsonl([make("group", groups[0].trajectories, [None, 1.0, 0.0]), *groups], file)
    with pytest.raises(UserError, match=r"line 1: a group with a completion that has no score \(verifier_error\)"):
        replay(config_of(tmp_path / "run"), file)
    with pytest.raises(UserError, match="a group of 3 completions, and group_size is 4"):
        replay(config_of(tmp_path / "run", group_size=4), file)


def test_what_a_drift_report_objects_to():
    still = {"mismatch_kl": (1e-12, 2e-12), "max_abs_logprob_diff": (1e-6, 1e-6), "ratio_min": 1.0, "ratio_max": 1.0}
    report = DriftReport(weights_unchanged=True, limit=1e-6, **still)
    assert report.faults == () and drift_table(report)[-1] == "weights: unchanged, bit by bit"
    moved = report.model_copy(update={"weights_unchanged": False, "mismatch_kl": (0.1, 0.2), "ratio_max": 1.2})
    assert [fault.split()[1] for fault in moved.faults] == ["weights", "mean", "importance"]
    assert drift_table(moved)[-1] == "weights: CHANGED"
