"""`memento compare`: what differs, what it says about accuracy, and a metric that is not there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from memento.compare import accuracy_differences, chosen_metrics, comparison, config_differences, read_runs
from memento.config import RlConfig, dump_config
from memento.errors import UserError


def make_run(folder: Path, rows: Sequence[dict[str, float | None]], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    tree = {"out": folder, "model": "m", "problems": {"path": "p.jsonl"}} | changes
    dump_config(RlConfig.model_validate(tree), folder / "config.yaml")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    first = [
        {"step": 0, "eval/accuracy": 0.25, "eval/accuracy_stderr": 0.03},
        {"step": 1, "reward/mean": 0.3, "mismatch/kl_mean": 1e-9},
        {"step": 2, "reward/mean": 0.6, "mismatch/kl_mean": None, "eval/accuracy": 0.5, "eval/accuracy_stderr": 0.03},
        {"step": 3, "reward/mean": 0.4},
    ]
    second = [
        {"step": 0, "eval/accuracy": 0.25, "eval/accuracy_stderr": 0.03},
        {"step": 2, "reward/mean": 0.8, "eval/accuracy": 0.62, "eval/accuracy_stderr": 0.04, "kv/peak_ratio": 2.5},
    ]
    return [
        make_run(tmp_path / "a" / "rl", first),
        make_run(tmp_path / "b" / "rl", second, learner={"lr": 1e-4, "betas": [0.9, 0.95]}, seed=1),
    ]


def shown(folders: Sequence[Path], metrics: Sequence[str] = ()) -> str:
    console = Console(width=140, file=StringIO())
    console.print(comparison(folders, metrics))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_two_runs_side_by_side(pair: list[Path]) -> None:
    text = shown(pair)
    assert "a/rl" in text and "b/rl" in text, "named by what tells them apart"
    assert "learner.lr" in text and "1e-06" in text and "0.0001" in text and "out" not in text.split("Metrics")[0]
    assert "0.3 → 0.4 (0.6, 2)" in text and "0.25 → 0.62 ± 0.04" in text
    assert "+12.0 ± 5.0 points" in text and "2.4 standard errors" in text


def test_what_differs(pair: list[Path]) -> None:
    runs = read_runs(pair)
    assert {key: values for key, values in config_differences(runs)} == {
        "seed": [0, 1],
        "learner.lr": [1e-6, 1e-4],
        "learner.betas": [[0.9, 0.999], [0.9, 0.95]],
    }


def test_a_difference_within_chance_is_called_that(pair: list[Path], tmp_path: Path) -> None:
    third = make_run(tmp_path / "c", [{"step": 5, "eval/accuracy": 0.55, "eval/accuracy_stderr": 0.03}])
    fourth = make_run(tmp_path / "d", [{"step": 5, "eval/accuracy": 0.55}])
    close, unknown = accuracy_differences(read_runs([pair[0], third, fourth]))
    assert close.stderr == pytest.approx((0.03**2 + 0.03**2) ** 0.5)
    assert close.verdict == "1.2 standard errors: no difference that can be told from chance"
    assert unknown.stderr is None and "no standard error" in unknown.verdict


def test_an_unknown_metric_is_met_with_the_nearest(pair: list[Path]) -> None:
    runs = read_runs(pair)
    assert chosen_metrics(runs, ["kv/peak_ratio"]) == ["kv/peak_ratio"]
    with pytest.raises(UserError, match=r"none of these runs has logged 'reward/men' \(did you mean reward/mean\?\)"):
        comparison(pair, ["reward/men"])


def test_bad_input(pair: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two run folders"):
        comparison(pair[:1])
    with pytest.raises(UserError, match="twice"):
        comparison([pair[0], pair[0]])
    with pytest.raises(UserError, match="is no run folder"):
        comparison([pair[0], tmp_path])
