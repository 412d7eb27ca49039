"""Checkpoints are whole or absent; weight sync believes only what the engines answer."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from memento.errors import UserError
from memento.problems import Problem, ProblemKind
from memento.rl.checkpoint import RunState, latest_checkpoint, load_state, save_checkpoint
from memento.rl.weight_sync import WeightSync, WeightSyncError
from memento.rollout.weights import WeightUpdate, read_weights, write_weights
from memento.trajectory import RolloutRequest, SamplingParams


class Files:
    """A learner that saves one file, or dies while it does."""

    def __init__(self, dies: bool = False) -> None:
        self.dies = dies

    def save(self, folder: str | Path) -> None:
        (Path(folder) / "learner").mkdir()
        (Path(folder) / "learner" / "weights.pt").write_bytes(b"x" * 100)
        if self.dies:
            raise KeyboardInterrupt


def pending() -> RolloutRequest:
    problem = Problem(id="p", kind=ProblemKind.MATH, prompt="1+1?", answer="2")
    sampling = SamplingParams(temperature=1.0, max_tokens=8)
    return RolloutRequest(problem=problem, group_id="3/p", group_size=2, sampling=sampling, seed=1)


def test_what_is_saved_comes_back(tmp_path):
    state = RunState(step=7, cursor=91, pending=(pending(),), best_metric=0.5, wandb_id="abc")
    folder = save_checkpoint(tmp_path, state, Files(), keep=2)
    assert folder == tmp_path / "checkpoints" / "step-000007" == latest_checkpoint(tmp_path)
    assert load_state(folder) == state
    assert (folder / "learner" / "weights.pt").stat().st_size == 100


def test_a_checkpoint_of_a_newer_version_is_named(tmp_path):
    class Newer(RunState):
        curriculum: str = "hard"

    folder = save_checkpoint(tmp_path, Newer(step=1), Files(), keep=2)
    with pytest.raises(UserError, match=r"newer version.*does not know its curriculum\. Install the newer one"):
        load_state(folder)


def test_only_the_newest_stay(tmp_path):
    for step in (1, 2, 10, 100):
        save_checkpoint(tmp_path, RunState(step=step), Files(), keep=2)
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["step-000010", "step-000100"]
    again = save_checkpoint(tmp_path, RunState(step=100, cursor=5), Files(), keep=2)  # after a resume
    assert load_state(again).cursor == 5


def test_the_best_one_outlives_newer_ones_and_a_resume(tmp_path):
    accuracy = {1: 0.2, 2: 0.6, 3: 0.4, 4: 0.5, 5: 0.6, 6: 0.7, 7: 0.1}

    def go_on(*steps: int) -> list[str]:
        newest = latest_checkpoint(tmp_path)
        state = load_state(newest) if newest else RunState()
        for step in steps:
            state = state.evaluated(step, {"eval/accuracy": accuracy[step]}).model_copy(update={"step": step})
            save_checkpoint(tmp_path, state, Files(), keep=1, keep_best=True)
        return sorted(f.name.removeprefix("step-00000") for f in (tmp_path / "checkpoints").iterdir())

    assert go_on(1, 2) == ["2"]
    assert go_on(3) == ["2", "3"]
    assert go_on(4, 5) == ["2", "5"], "as good is not better"
    assert load_state(tmp_path / "checkpoints" / "step-000002").best_metric == 0.6
    assert go_on(6) == ["6"], "a better one takes its place"
    assert go_on(7) == ["6", "7"]
    state = load_state(tmp_path / "checkpoints" / "step-000007")
    assert (state.best_step, state.best_metric) == (6, 0.7)


def test_an_interrupted_save_leaves_the_last_one(tmp_path):
    whole = save_checkpoint(tmp_path, RunState(step=1), Files(), keep=1)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, RunState(step=2), Files(dies=True), keep=1)
    assert latest_checkpoint(tmp_path) == whole
    # A kill -9 cleans nothing up; the next save does.
    (tmp_path / "checkpoints" / ".writing-step-000002" / "learner").mkdir(parents=True)
    assert latest_checkpoint(tmp_path) == whole
    save_checkpoint(tmp_path, RunState(step=2), Files(), keep=2)
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("damage", ["shorter", "missing", "no manifest", "no number"])
def test_a_torn_checkpoint_is_passed_over_and_refused_by_name(tmp_path, damage, caplog):
    whole = save_checkpoint(tmp_path, RunState(step=1), Files(), keep=2)
    torn = save_checkpoint(tmp_path, RunState(step=2), Files(), keep=2)
    weights, manifest = torn / "learner" / "weights.pt", torn / "manifest.json"
    match damage:
        case "shorter":
            weights.write_bytes(b"x" * 99)
        case "missing":
            weights.unlink()
        case "no manifest":
            manifest.unlink()
        case _:
            manifest.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == whole
    assert "step-000002 is torn" in caplog.text
    with pytest.raises(UserError, match="step-000002 is torn"):
        load_state(torn)


def test_a_run_without_checkpoints(tmp_path):
    assert latest_checkpoint(tmp_path) is None


class Exporter:
    def __init__(self) -> None:
        self.weight = torch.arange(6.0)

    def export_weights(self, folder: str | Path, version: int) -> WeightUpdate:
        return write_weights({"w": self.weight}, folder, version)


class Engines:
    """Reads what it is sent; `stuck` engines keep their old version."""

    def __init__(self, count: int = 2, stuck: tuple[int, ...] = ()) -> None:
        self.count, self.stuck, self.loaded = count, stuck, torch.empty(0)

    def update_weights(self, update: WeightUpdate) -> list[int]:
        self.loaded = read_weights(update)["w"]
        return [0 if engine in self.stuck else update.version for engine in range(self.count)]


def test_a_push_arrives_and_is_cleaned_up():
    engines, exporter = Engines(), Exporter()
    sync = WeightSync(exporter, engines)
    assert sync.push(version=3).version == 3
    assert torch.equal(engines.loaded, exporter.weight)
    assert sync.folder.exists()
    sync.close()
    assert not sync.folder.exists()


@pytest.mark.parametrize(
    ("engines", "match"),
    [(Engines(stuck=(1,)), "sent version 3, but engine 1 runs 0"), (Engines(count=0), "no engine answered")],
)
def test_an_engine_on_old_weights_is_an_error(engines, match, tmp_path):
    with pytest.raises(WeightSyncError, match=match):
        WeightSync(Exporter(), engines, tmp_path).push(version=3)
