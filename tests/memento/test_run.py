"""The run folder: what it holds, what it refuses, how it goes on, and how signals end it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from memento.config import RlConfig, load_config
from memento.errors import UserError
from memento.problems import Problem, ProblemKind
from memento.run import Run, load_run_config, read_metrics
from memento.trajectory import (
    FinishReason,
    Outcome,
    RewardResult,
    ScoredGroup,
    Trajectory,
    VersionSpan,
    read_trajectories,
)


def make_config(out: Path, *overrides: str) -> RlConfig:
    tree = {"out": out, "model": "m", "problems": {"path": "p.jsonl"}, "steps": 5, "tracking": {"mode": "disabled"}}
    config = RlConfig.model_validate(tree)
    return config if not overrides else _override(config, overrides)


def _override(config: RlConfig, overrides: Sequence[str]) -> RlConfig:
    from memento.config import override_config

    changed = override_config(config, overrides, "test")
    assert isinstance(changed, RlConfig)
    return changed


def group(step: int, samples: int = 1) -> ScoredGroup:
    problem = Problem(id="a", kind=ProblemKind.MATH, prompt="1 + 1?", answer="2")
    trajectory = Trajectory(
        problem_id="a",
        group_id=f"{step}/a",
        sample_index=0,
        prompt_ids=(1,),
        completion_ids=(2,),
        rollout_logprobs=(-0.5,),
        text="2",
        finish_reason=FinishReason.STOP,
        weight_versions=(VersionSpan(0, 1, step),),
        peak_kv_tokens=2,
        peak_kv_pages=1,
        kv_area_tokens=2,
        seed=0,
        temperature=1.0,
        seconds=0.1,
    )
    reward = RewardResult(score=1.0, outcome=Outcome.CORRECT)
    return ScoredGroup(problem=problem, trajectories=(trajectory,) * samples, rewards=(reward,) * samples)


def train(config: RlConfig, steps: Sequence[int], value: float, *, resume: bool = False) -> None:
    with Run.open(config, resume=resume) as run:
        for step in steps:
            run.save_groups(step, [group(step), group(step)])
            run.log(step, {"reward/mean": value})


def trained_steps(folder: Path) -> list[str]:
    return [t.group_id.split("/")[0] for t in read_trajectories(folder / "rollouts.jsonl")]


def test_a_run_explains_itself(tmp_path: Path) -> None:
    config = make_config(tmp_path / "runs" / "a")
    with Run.open(config) as run:
        for _ in range(2):
            with run.phase("rollout"):
                time.sleep(0.01)
        run.log(1, {"reward/mean": 0.5, "kl": float("nan")})
    folder = tmp_path / "runs" / "a"
    assert load_run_config(folder) == config == load_config(folder / "config.yaml")
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["numpy"] and environment["python"] and environment["command"]
    (row,) = read_metrics(folder)
    assert row["step"] == 1 and row["reward/mean"] == 0.5 and row["kl"] is None
    seconds, whole = row["seconds/rollout"], row["seconds/step"]
    assert seconds is not None and whole is not None and 0.02 <= seconds <= whole
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["seconds"]["rollout"] == pytest.approx(seconds)
    assert [p.name for p in folder.parent.iterdir()] == ["a"], "no draft is left behind"


def test_what_is_said_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "a peer is gone [/gloo/transport/tcp/pair.cc:553] " + "and no line is broken " * 10
    with Run.open(make_config(tmp_path / "run")) as run:
        run.say(said)
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


def test_a_folder_with_anything_in_it_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"not empty.*--resume"):
        Run.open(make_config(tmp_path))
    with pytest.raises(UserError, match=r"no run folder: it has no config\.yaml"):
        Run.open(make_config(tmp_path), resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file"):
        Run.open(make_config(tmp_path / "thesis.txt"))


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    train(make_config(tmp_path / "run"), [1], 0.0)
    assert len(read_metrics(tmp_path / "run")) == 1


def test_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    train(config, [1, 2, 3], 0.1)
    with (tmp_path / "run" / "rollouts.jsonl").open("a") as file:
        file.write('{"problem": half a li')  # killed while it wrote
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    train(config, [2, 3, 4, 5], 0.9, resume=True)  # the checkpoint was that of step 1
    rows = read_metrics(tmp_path / "run")
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(1, 0.1), (2, 0.9), (3, 0.9), (4, 0.9), (5, 0.9)]
    assert trained_steps(tmp_path / "run") == [str(step) for step in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5)]
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())["resumes"]) == 1


def test_resume_from_the_beginning_and_of_nothing(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    train(config, [0, 1], 0.1, resume=True)  # no folder yet: it is made
    train(config, [0], 0.2, resume=True)
    assert [row["reward/mean"] for row in read_metrics(tmp_path / "run")] == [0.2]
    assert trained_steps(tmp_path / "run") == ["0", "0"]


def test_resume_names_what_changed(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    train(config, [1], 0.1)
    with pytest.raises(UserError, match=r"learner\.lr was 1e-06, is 0\.1.*group_size|group_size.*learner\.lr"):
        Run.open(_override(config, ["learner.lr=0.1", "group_size=3"]), resume=True)
    longer = _override(config, ["steps=9", "checkpoint.keep=7"])
    train(longer, [2], 0.2, resume=True)
    assert load_run_config(tmp_path / "run") == longer


@pytest.mark.parametrize(("mode", "kept"), [("all", 2), ("sample", 1), ("none", 0)])
def test_save_rollouts(tmp_path: Path, mode: str, kept: int) -> None:
    train(make_config(tmp_path / "run", f"save_rollouts={mode}"), [1, 2], 0.0)
    file = tmp_path / "run" / "rollouts.jsonl"
    assert (len(file.read_text().splitlines()) if file.exists() else 0) == 2 * kept


def test_a_failed_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Run.open(make_config(tmp_path / "run")) as run:
        run.log(1, {"x": 1 / 0})
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "ZeroDivisionError" in summary["error"]


LOOP = """
import sys, time
from memento.config import RlConfig
from memento.run import Run
config = RlConfig.model_validate(
    {"out": sys.argv[1], "model": "m", "problems": {"path": "p"}, "tracking": {"mode": "disabled"}})
with Run.open(config) as run:
    print("ready", flush=True)
    for step in range(10_000):
        with run.phase("work"):
            time.sleep(0.02)
        if run.stopping and sys.argv[2] == "polite":
            time.sleep(1)
            run.say("saved")
            run.stop()
"""


@pytest.mark.parametrize(
    ("numbers", "manner", "code", "status"),
    [
        ([signal.SIGINT], "polite", 130, "stopped"),
        ([signal.SIGTERM], "polite", 143, "stopped"),
        ([signal.SIGINT, signal.SIGINT], "deaf", 130, "stopped"),
        ([signal.SIGTERM, signal.SIGINT], "deaf", 130, "stopped"),
        ([signal.SIGTERM, signal.SIGTERM], "polite", 143, "stopped"),  # one wish that came twice
    ],
)
def test_signals_stop_the_run(
    tmp_path: Path, numbers: list[signal.Signals], manner: str, code: int, status: str
) -> None:
    command = [sys.executable, "-c", LOOP, str(tmp_path / "run"), manner]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.3)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == code
    if manner == "polite":
        assert "saved" in output and "Stopped by" in output and "--resume" in output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == status


def test_handlers_survive_a_library_that_replaces_them_and_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Run.open(make_config(tmp_path / "run")) as run:
        with run.phase("start"):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as ray.init() does
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stopping
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_person_at_a_terminal_sees_a_bar_and_what_is_left(tmp_path: Path) -> None:
    run = Run.open(make_config(tmp_path / "run"))
    file = StringIO()
    run.console = Console(file=file, force_terminal=True, width=120, soft_wrap=True, highlight=False)
    with run:
        for step in (1, 2, 3):
            with run.phase("rollout"):
                run.within(3, 4)
                time.sleep(0.3)  # the bar is drawn four times a second
            run.log(step, {"reward/mean": 0.5})
    shown = file.getvalue()
    assert "rollout" in shown and "3/4" in shown and "2/5" in shown
    assert "0:01 left" in shown
    lines = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", shown).splitlines() if "reward 0.500" in line]
    assert [line.split()[1] for line in lines] == ["1/5", "2/5", "3/5"], "the line of each step stays"


def test_without_a_terminal_there_is_one_line_a_step(tmp_path: Path) -> None:
    run = Run.open(make_config(tmp_path / "run"))
    file = StringIO()
    run.console = Console(file=file, soft_wrap=True, highlight=False)
    with run:
        with run.phase("rollout"):
            run.within(3, 4)
        run.log(1, {"reward/mean": 0.5})
    assert file.getvalue().count("\n") == 1 and "\x1b" not in file.getvalue()
