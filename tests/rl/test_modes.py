"""`memento record`, `replay` and `drift`, and the best checkpoint, as a user runs them: real parts, a model that solves
some of its problems."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from memento.cluster import connect, disconnect
from memento.config import RlConfig
from memento.preflight import load_tokenizer
from memento.rl.batch import assemble
from memento.rl.learner import Learner
from memento.run import load_run_config, read_metrics
from memento.trajectory import ScoredGroup

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = str(REPOSITORY / "configs" / "rl" / "small.yaml")
SETTINGS = (
    "groups_per_step=4",
    "group_size=4",
    "eval.problems=null",
    "tracking.mode=disabled",
    "algorithm.mismatch_kl_limit=0.01",
)
pytestmark = [pytest.mark.long, pytest.mark.timeout(3000)]


def memento(command: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "memento.cli", command, *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=900,
        check=False,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


def groups_of(folder: Path) -> list[ScoredGroup]:
    return [ScoredGroup.model_validate_json(line) for line in (folder / "rollouts.jsonl").open(encoding="utf-8")]


def sampled(groups: Sequence[ScoredGroup]) -> list[tuple[Any, ...]]:
    return [(t.group_id, t.completion_ids, group.scores) for group in groups for t in group.trajectories]


def test_a_recording_is_what_the_run_samples_and_a_replay_gives_its_losses(quickstart: Path, tmp_path: Path) -> None:
    settings = [f"model={quickstart / 'stage2' / 'hf'}", *SETTINGS]
    ran, recorded = tmp_path / "run", tmp_path / "recorded"
    memento("rl", CONFIG, f"out={ran}", "steps=2", *settings)
    memento("record", CONFIG, f"out={recorded}", "steps=1", *settings)
    memento("record", CONFIG, f"out={recorded}", "steps=2", "--resume", *settings)

    of_run, of_record = groups_of(ran), groups_of(recorded)
    assert len(of_run) == len(of_record) == 8
    assert sampled(of_record[:4]) == sampled(of_run[:4]), "the first step's completions"
    assert [g.problem for g in of_record] == [g.problem for g in of_run], "and the same problems after it"
    versions = [{t.oldest_version for g in groups[4:] for t in g.trajectories} for groups in (of_run, of_record)]
    assert versions == [{1}, {0}], "whose weights have moved in the one and not in the other"
    assert any(t.evictions for g in of_record for t in g.trajectories)
    rows = read_metrics(recorded)
    assert [row["step"] for row in rows] == [1, 2] and not any("train/loss" in row for row in rows)
    assert not (recorded / "hf").exists()

    again = tmp_path / "again"
    memento("replay", CONFIG, f"--rollouts={ran / 'rollouts.jsonl'}", f"out={again}", "steps=2", *settings)
    for name in ("train/loss", "train/grad_norm", "train/entropy", "mismatch/kl_mean", "reward/mean"):
        replayed, original = ([row[name] for row in read_metrics(folder)] for folder in (again, ran))
        assert replayed == original, name
    assert any((row["train/grad_norm"] or 0) > 1e-3 for row in read_metrics(again))

    # What was recorded can be trained on too. In its second step the weights are no longer those that sampled.
    other = tmp_path / "other"
    memento("replay", CONFIG, f"--rollouts={recorded / 'rollouts.jsonl'}", f"out={other}", *settings)
    rows = read_metrics(other)
    assert [row["step"] for row in rows] == [1, 2] and (other / "hf" / "model.safetensors").is_file()
    first, second = (row["mismatch/kl_mean"] or 0 for row in rows)
    assert first < 1e-9 < 1e-6 < second


def test_nothing_drifts_at_learning_rate_0(quickstart: Path, tmp_path: Path) -> None:
    settings = [f"model={quickstart / 'stage2' / 'hf'}", *SETTINGS, "--steps", "2"]
    done = memento("drift", CONFIG, f"out={tmp_path / 'still'}", *settings)
    assert done.stdout.rstrip().endswith("weights: unchanged, bit by bit"), done.stdout
    # A limit below rounding: the report names what it objects to, after the whole run.
    settings += ["algorithm.mismatch_kl_limit=1e-30"]
    failed = memento("drift", CONFIG, f"out={tmp_path / 'strict'}", *settings, code=1)
    assert "failed: the mean mismatch KL reached" in failed.stderr and "unchanged" in failed.stdout


def test_the_best_checkpoint_stays_over_newer_ones_and_a_resume(quickstart: Path, tmp_path: Path) -> None:
    settings = [
        f"model={quickstart / 'stage2' / 'hf'}",
        f"out={tmp_path}",
        *(setting for setting in SETTINGS if not setting.startswith("eval.")),
        "eval.problems.count=24",
        "eval.interval=1",
        "checkpoint.interval=10",
        "checkpoint.keep=1",
        "checkpoint.keep_best=true",
    ]

    def best_and_kept() -> tuple[int, set[int]]:
        accuracy = {int(row["step"] or 0): row["eval/accuracy"] or 0.0 for row in read_metrics(tmp_path)}
        kept = {int(folder.name.removeprefix("step-")) for folder in (tmp_path / "checkpoints").iterdir()}
        return max(accuracy, key=lambda step: (accuracy[step], -step)), kept

    memento("rl", CONFIG, "steps=4", *settings)
    best, kept = best_and_kept()
    assert kept == {best, 4} - {0}
    memento("rl", CONFIG, "steps=6", "--resume", *settings)
    later, kept = best_and_kept()
    assert kept == {later, 6} - {0}
    assert 0 < later < 6 or 0 < best < 4, "else nothing was shown: all the time the newest was the best"


def test_every_token_has_the_learners_logprob_under_the_version_that_sampled_it(
    quickstart: Path, tmp_path: Path
) -> None:
    """Also when rollouts run ahead, and updates meet completions in flight: the run is replayed version by version."""
    settings = [setting for setting in SETTINGS if not setting.startswith("group")]
    sizes = ["max_lag=1", "steps=5", "groups_per_step=6", "group_size=6", "algorithm.mismatch_kl_limit=null"]
    memento("rl", CONFIG, f"out={tmp_path}", f"model={quickstart / 'stage2' / 'hf'}", *settings, *sizes)
    config = load_run_config(tmp_path)
    assert isinstance(config, RlConfig)
    fmt = config.format.bind(load_tokenizer(config.model))
    groups, size = groups_of(tmp_path), config.groups_per_step
    steps = [groups[start : start + size] for start in range(0, len(groups), size)]
    batches = [assemble(step, config, fmt) for step in steps]
    worst, tokens, behind = 0.0, 0, 0
    connect()
    learner = Learner(config)
    try:
        for version, batch in enumerate(batches):
            for at in range(version, min(version + 2, len(steps))):
                trajectories = [t for group in steps[at] for t in group.trajectories]
                for minibatch, (answers,) in zip(batches[at].minibatches, learner.logprobs(batches[at]), strict=True):
                    for row, of_row, logprobs_T in zip(
                        minibatch.ranks[0], minibatch.sequences[0], answers, strict=True
                    ):
                        for document, index in enumerate(of_row):
                            t = trajectories[index]
                            learners = logprobs_T[row.document == document][t.prompt_len :]
                            off = (learners - torch.tensor(t.rollout_logprobs)).abs()
                            for span in t.weight_versions:
                                if span.version == version and span.end > span.start:
                                    worst = max(worst, float(off[span.start : span.end].max()))
                                    tokens += span.end - span.start
                                    behind += (span.end - span.start) * (at > version)
            learner.step(batch)
    finally:
        learner.close()
        disconnect()
    print(f"{tokens} tokens, {behind} of them a version behind: the worst is {worst:.1e} off")
    assert tokens == sum(len(t.completion_ids) for group in groups for t in group.trajectories)
    assert behind > tokens / 4 and worst < 5e-4
