"""Runs that are killed, with all their real parts, on an untrained model.

Minutes each. What the daily tests have of it: resumed learners and replays, equal to the bit, and a pipeline that is
stopped by a signal (`test_learner.py`, `test_replay.py`, `tests/test_quickstart.py`).
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from memento.run import read_metrics
from memento.tiny import write_tiny_model
from memento.trajectory import ScoredGroup

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def kill() -> ModuleType:
    specification = importlib.util.spec_from_file_location("kill", REPOSITORY / "benchmarks" / "kill.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("resume") / "model", seed=0)


@pytest.fixture
def mark(kill: ModuleType) -> Iterator[str]:
    token = secrets.token_hex(8)
    yield token
    kill.sweep(token, 30)


def recorded(out: Path) -> list[dict[str, Any]]:
    """What was sampled and how it was judged, without clock and place."""
    groups = [ScoredGroup.model_validate_json(line) for line in (out / "rollouts.jsonl").open(encoding="utf-8")]
    return [
        {
            "group": t.group_id,
            "ids": t.completion_ids,
            "logprobs": t.rollout_logprobs,
            "versions": t.weight_versions,
            "score": score,
        }
        for group in groups
        for t, score in zip(group.trajectories, group.scores, strict=True)
    ]


def test_kill_everything_and_go_on(kill: ModuleType, model: Path, mark: str, tmp_path: Path) -> None:
    """Six steps, and three, kill -9 of every process, three: the same losses and rollouts, to the bit."""
    config = REPOSITORY / "configs" / "rl" / "small.yaml"
    # One request at a time: which requests share an engine step depends on the clock, and the last bit on that.
    one = ["rollout.engines=1", "rollout.max_num_seqs=1", "learner.ranks=1", "learner.minibatches=2"]
    settings = [*kill.SETTINGS, *one, "steps=6", "checkpoint.interval=3", "sampling.max_tokens=40"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert kill.start(whole, model, mark, config, 7, resume=False, settings=settings).wait(900) == 0

    process = kill.start(parts, model, mark, config, 7, resume=False, settings=settings)
    deadline = time.monotonic() + 900
    while not (parts / "checkpoints" / "step-000003").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    for pid in kill.processes(mark):
        os.kill(pid, 9)
    assert process.wait(60) == -9 and not (parts / "hf").exists()
    kill.sweep(mark, 60)
    assert kill.start(parts, model, mark, config, 7, resume=True, settings=settings).wait(900) == 0

    before, after = read_metrics(whole), read_metrics(parts)
    assert [row["step"] for row in after] == [1, 2, 3, 4, 5, 6]
    assert any((row["train/grad_norm"] or 0) > 1e-3 for row in before[3:]), "it really trains"
    for name in (
        "train/loss",
        "train/grad_norm",
        "train/lr",
        "train/entropy",
        "mismatch/kl_mean",
        "length/completion_mean",
    ):
        assert [row[name] for row in after] == [row[name] for row in before], name
    assert recorded(parts) == recorded(whole)


def test_whatever_is_killed_every_run_finishes(kill: ModuleType) -> None:
    """MEMENTO_KILL_RUNS sets how many; `benchmarks/kill.py` does the same by hand."""
    assert kill.main(["--runs", os.environ.get("MEMENTO_KILL_RUNS", "5"), "--seed", "1"]) == 0
