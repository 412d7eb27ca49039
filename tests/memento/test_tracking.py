"""Trackers: what a W&B run and an event file hold, read back from the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from memento.config import RlConfig, TrackingConfig
from memento.errors import UserError
from memento.tracking import (
    COLUMNS,
    TABLE,
    TRACE,
    TensorBoardTracker,
    Trackers,
    check_tracking,
    package_files,
    table_rows,
)
from memento.trajectory import ScoredGroup, append_jsonl

SCRIPT = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from memento.config import RlConfig
    from memento.run import Run
    from memento.trajectory import ScoredGroup

    groups = [ScoredGroup.model_validate_json(line) for line in open(sys.argv[2])]
    tree = {"out": sys.argv[1], "model": "m", "problems": {"path": "p"}, "steps": 3,
            "tracking": {"mode": "offline", "trajectories": 3, "trajectories_interval": 2, "tensorboard": True}}
    config = RlConfig.model_validate(tree)
    for start in (1, 3):
        with Run.open(config, resume=start > 1) as run:
            for step in (1, 2) if start == 1 else (3,):
                run.save_groups(step, groups)
                run.log(step, {"reward/mean": 0.25 * step, "bad/number": float("nan")})
            (run.folder / "checkpoints" / f"step-{step}").mkdir(parents=True)
            run.saved(step, run.folder / "checkpoints" / f"step-{step}")
            if start == 1:
                run.save_alarm(2, groups)
    """
)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, groups: Sequence[ScoredGroup]) -> Path:
    """A run that was stopped after two steps and went on for one, cut off from any network."""
    folder = tmp_path_factory.mktemp("tracked")
    append_jsonl(groups, folder / "groups.jsonl")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(folder / "home")}
    cut_off = ["unshare", "--user", "--map-root-user", "--net"]  # not even a loopback device
    if subprocess.run([*cut_off, "true"], capture_output=True, check=False).returncode:
        cut_off = []
    command = [*cut_off, sys.executable, "-c", SCRIPT, str(folder / "run"), str(folder / "groups.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def files(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)


def test_a_wandb_run_keeps_its_id_and_has_every_line(tracked: Path, wandb_file: Any) -> None:
    run_id = json.loads((tracked / "environment.json").read_text())["run_id"]
    assert {file.name for file in files(tracked)} == {f"run-{run_id}.wandb"}
    lines = [line for file in files(tracked) for line in wandb_file.history(file)]
    assert [(line["step"], line["reward/mean"]) for line in lines] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert all("seconds/step" in line for line in lines)


def test_tables_and_pages_come_every_so_many_steps(tracked: Path, wandb_file: Any) -> None:
    lines = [line for file in files(tracked) for line in wandb_file.history(file)]
    assert [TABLE in line for line in lines] == [True, False, True]
    media = [next(file.parent.glob("files/media/table/rollouts/*.table.json")) for file in files(tracked)]
    table = json.loads(media[0].read_text())
    assert table["columns"] == list(COLUMNS) and len(table["data"]) == 3
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert row["step"] == 1 and row["outcome"] == "wrong" and row["reward"] == 0
    assert row["blocks"] > 0 and row["mementos"] and row["peak KV"] < row["peak KV without eviction"]
    page = next(files(tracked)[0].parent.glob("files/media/html/rollouts/*.html")).read_text()
    assert TRACE in lines[0] and "<svg" in page and "data-trace" in page


def test_config_code_checkpoints_and_alerts_are_in_it(tracked: Path, wandb_file: Any) -> None:
    records = [record for file in files(tracked) for record in wandb_file.records(file)]
    of = {kind: [r for r in records if r.WhichOneof("record_type") == kind] for kind in ("run", "artifact", "alert")}
    config = {item.key: json.loads(item.value_json) for item in of["run"][0].run.config.update}
    assert config["algorithm"]["loss"] == "cispo" and config["steps"] == 3
    artifacts = [(r.artifact.type, r.artifact.name.split("-")[0]) for r in of["artifact"]]
    assert artifacts.count(("checkpoint", "checkpoint")) == 2 and ("code", "memento") in artifacts
    code = next(r.artifact for r in of["artifact"] if r.artifact.type == "code")
    assert "memento/rl/train.py" in {entry.path for entry in code.manifest.contents}
    assert [r.alert.title for r in of["alert"]] == ["Alarm at step 2"]
    axes = {
        r.metric.glob_name or r.metric.name: r.metric.step_metric
        for r in records
        if r.WhichOneof("record_type") == "metric"
    }
    assert axes["*"] == "step"


def test_nothing_is_written_outside_of_the_run_folder(tracked: Path) -> None:
    home = tracked.parent / "home"
    assert not (home / ".local" / "share" / "wandb").exists(), "artifacts are staged in the run folder"


def test_event_files_hold_the_same_numbers(tracked: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "tensorboard"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert scalars == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert any("text_summary" in tag for tag in events.Tags()["tensors"])


def test_a_tracker_that_fails_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        calls = 0

        def __getattr__(self, name: str) -> Any:
            def fail(*_: Any) -> None:
                self.calls += 1
                raise ConnectionResetError("Connection lost")

            return fail

    broken: Any = Broken()
    both = Trackers([broken, TensorBoardTracker(TrackingConfig(), tmp_path)])
    both.log(1, {"reward/mean": 0.5})
    both.checkpoint(1, tmp_path)
    both.finish(0)
    assert broken.calls == 1 and list((tmp_path / "tensorboard").iterdir())
    assert capsys.readouterr().err == "Broken no longer follows this run: Connection lost. metrics.jsonl goes on.\n"


def test_rows_take_one_of_each_group_first(groups: Sequence[ScoredGroup]) -> None:
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in table_rows(7, groups, 6)]
    assert [row["sample"] for row in rows] == [0, 0, 0, 0, 1, 1]
    assert len(list(table_rows(7, groups, 100))) == 12


def test_the_code_artifact_follows_the_links() -> None:
    names = [name for _, name in package_files()]
    assert {"memento/format.py", "memento/rl/train.py", "memento/configs/rl/quickstart.yaml"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]


def test_no_key_no_network_and_no_package_are_said_before_a_folder_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from memento.run import Run

    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    tree = {"out": tmp_path / "run", "model": "m", "problems": {"path": "p"}, "tracking": {"mode": "online"}}
    with pytest.raises(UserError, match=r"no W&B key.*WANDB_API_KEY.*offline"):
        Run.open(RlConfig.model_validate(tree))
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match="TensorBoard is not installed"):
        check_tracking(TrackingConfig(mode="disabled", tensorboard=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.long  # W&B tries for ten seconds
def test_a_server_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached"):
        check_tracking(TrackingConfig(mode="online"))
