"""The report and the result record: read from the files of a run, silent about what is not there."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from memento import charts
from memento.charts import Series, line_chart, ticks
from memento.config import RlConfig, SftConfig, dump_config
from memento.errors import UserError
from memento.report import last_groups, pick_trajectory, write_report
from memento.results import ROWS, QuickstartResults, read_results, result_table, write_results
from memento.trajectory import ScoredGroup, append_jsonl


def metrics(folder: Path, rows: Sequence[dict[str, float | None]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_rl(folder: Path, groups: Sequence[ScoredGroup], tokenizer: Any) -> None:
    folder.mkdir(parents=True)
    tree = {"out": folder, "model": "base/model", "problems": {"arithmetic": {}}, "steps": 3}
    dump_config(RlConfig.model_validate(tree), folder / "config.yaml")
    metrics(
        folder,
        [
            {"step": 0, "eval/accuracy": 0.25},
            {"step": 1, "reward/mean": 0.3, "mismatch/kl_mean": 1e-8, "kv/peak_ratio": 2.1, "seconds/rollout": 2.0},
            {"step": 2, "reward/mean": None, "mismatch/kl_mean": 0.0, "kv/peak_ratio": 2.2, "seconds/rollout": 1.0},
            {"step": 3, "reward/mean": 0.9, "mismatch/kl_mean": 3e-8, "eval/accuracy": 0.75, "seconds/step": 9.0},
        ],
    )
    append_jsonl(groups, folder / "rollouts.jsonl")
    tokenizer.save_pretrained(folder / "hf")


def make_quickstart(folder: Path, groups: Sequence[ScoredGroup], tokenizer: Any) -> None:
    make_rl(folder / "rl", groups, tokenizer)
    for stage in ("stage1", "stage2", "control"):
        (folder / stage).mkdir()
        tree = {"out": folder / stage, "stage": stage, "phases": [{"steps": 2, "problems": {}}]}
        dump_config(SftConfig.model_validate(tree), folder / stage / "config.yaml")
        metrics(folder / stage, [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 0.5}])
    (folder / "eval").mkdir()
    for place, row in enumerate(ROWS):
        for temperature, accuracy in (("1.0", 0.1 * place), ("0.6", 0.5), ("greedy", 1.0)):
            kv = {"peak_ratio": 2.0 + place, "area_ratio": 1.5, "peak_tokens": 100.0, "peak_tokens_full": 210.0, "x": 1}
            result = {
                "accuracy": {"mean": accuracy, "stderr": 0.01, "problems": 400},
                "kv": kv,
                "problems": 400 if temperature == "1.0" else 200,
            }
            (folder / "eval" / f"{row}_t{temperature}.json").write_text(json.dumps(result))
    (folder / "phases.json").write_text(json.dumps({"stage1": 10.0, "rl": 20.5, "total": 25.0}))


class Balanced(HTMLParser):
    """Fails on tags that do not match."""

    VOID = ("meta", "input", "br", "path", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def check_page(page: str) -> None:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert not re.search(r"(?:src|href)\s*=|@import|url\(|https?://", page)  # loads nothing
    assert "nan" not in re.sub(r"<script.*?</script>", "", page, flags=re.S).lower().replace("finance", "")


def test_results_come_from_the_files(tmp_path: Path, groups: Sequence[ScoredGroup], tokenizer: Any) -> None:
    make_quickstart(tmp_path, groups, tokenizer)
    found = QuickstartResults.read(tmp_path, seed=3)
    assert found.accuracy.rl_evicted == pytest.approx(0.3)
    assert found.kv.peak_ratio == 5.0  # of the model after RL
    assert found.mismatch_kl.mean == pytest.approx(4e-8 / 3)
    assert found.mismatch_kl.max == 3e-8
    assert found.seconds == {"total": 25.0, "stage1": 10.0, "rl": 20.5}
    assert (found.problems, found.cool_problems, found.seed) == (400, 200, 3)
    write_results(found, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == found
    written = json.loads((tmp_path / "results.json").read_text())
    assert set(written["accuracy"]) == set(ROWS)
    assert written["accuracy_by_temperature"]["rl_evicted"] == {"1.0": pytest.approx(0.3), "0.6": 0.5, "greedy": 1.0}
    console = Console(width=100, record=True, file=(tmp_path / "table.txt").open("w"))
    console.print(result_table(found))
    text = console.export_text()
    assert "30.0 ± 1.0" in text
    assert "5.00× lower (210 → 100 tokens)" in text


def test_a_missing_evaluation_is_named_not_made_up(
    tmp_path: Path, groups: Sequence[ScoredGroup], tokenizer: Any
) -> None:
    make_quickstart(tmp_path, groups, tokenizer)
    (tmp_path / "eval" / "control_full_tgreedy.json").unlink()  # may be missing
    assert QuickstartResults.read(tmp_path, seed=0).cell("control_full", "greedy") is None
    (tmp_path / "eval" / "control_full_t1.0.json").unlink()
    with pytest.raises(UserError, match=r"control_full_t1\.0\.json"):
        QuickstartResults.read(tmp_path, seed=0)


def test_quickstart_report(tmp_path: Path, groups: Sequence[ScoredGroup], tokenizer: Any) -> None:
    make_quickstart(tmp_path, groups, tokenizer)
    write_results(QuickstartResults.read(tmp_path, seed=0), tmp_path / "results.json")
    file = write_report(tmp_path)
    page = file.read_text()
    assert file == tmp_path / "report.html"
    check_page(page)
    for part in (
        "30.0 ±&nbsp;1.0",
        "Reward and held-out accuracy",
        "Training loss",
        "KV sawtooth",
        "data-trace",
        "prefers-color",
    ):
        assert part in page, part
    assert page.index("stage1: config") < page.index("stage2: config") < page.index("control: config")
    assert [f.name for f in tmp_path.glob(".report*")] == []
    write_report(tmp_path)  # again


def test_report_of_an_rl_run_alone(tmp_path: Path, groups: Sequence[ScoredGroup], tokenizer: Any) -> None:
    make_rl(tmp_path / "run", groups, tokenizer)
    page = write_report(tmp_path / "run").read_text()
    check_page(page)
    assert "Mean reward <b>0.300</b> at step 1, <b>0.900</b> at step 3" in page
    assert "<h2>Result</h2>" not in page


def test_what_is_missing_is_left_out(tmp_path: Path, groups: Sequence[ScoredGroup], tokenizer: Any) -> None:
    run = tmp_path / "run"
    make_rl(run, groups, tokenizer)
    (run / "rollouts.jsonl").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # cut off by a crash
    page = write_report(run).read_text()
    check_page(page)
    assert "Reward and held-out accuracy" in page
    assert "One trajectory" not in page
    (run / "metrics.jsonl").unlink()
    check_page(write_report(run).read_text())
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no run"):
        write_report(empty)
    with pytest.raises(UserError, match="no folder"):
        write_report(tmp_path / "nothing")
    assert list(empty.iterdir()) == []


def test_the_trajectory_shown_is_a_right_one(tmp_path: Path, groups: Sequence[ScoredGroup]) -> None:
    file = tmp_path / "rollouts.jsonl"
    assert pick_trajectory(file) is None
    append_jsonl(groups, file)
    chosen = pick_trajectory(file)
    assert chosen
    trajectory, rewards, place = chosen
    assert rewards[place].score == 1.0
    assert len(trajectory.evictions) == max(len(t.evictions) for g in groups for t in g.trajectories)


def test_only_the_end_of_a_large_file_is_read(tmp_path: Path, groups: Sequence[ScoredGroup]) -> None:
    file = tmp_path / "rollouts.jsonl"
    append_jsonl(groups, file)
    lengths = [len(line) for line in file.read_bytes().splitlines(keepends=True)]
    assert list(last_groups(file, lengths[-1] + 10)) == list(groups[-1:])
    assert list(last_groups(file, 10)) == list(groups[-1:])  # never less than one
    assert list(last_groups(file)) == list(groups)
    with file.open("a") as handle:
        handle.write('{"trajectories": [')  # being written
    assert list(last_groups(file)) == list(groups)


def test_ticks_are_round_and_cover() -> None:
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0, 370, 5) == [0, 100, 200, 300, 400]
    assert ticks(3, 3, 5)[0] <= 3 < ticks(3, 3, 5)[-1]


def test_a_chart_of_nothing_is_empty_and_gaps_are_gaps() -> None:
    empty = Series("a", [1, 2], [None, float("nan")])
    assert line_chart([empty], x_label="x", y_label="y") == ""
    assert line_chart([Series("a", [1], [0.0])], x_label="x", y_label="y", log=True) == ""
    chart = line_chart([Series("a", [1, 2, 3], [1.0, None, 2.0]), empty], x_label="x", y_label="y (s)")
    assert chart.count("<circle") == 2 * 2  # two points, two widths
    assert "y (s)" in chart
    assert "legend" not in chart  # one line needs none


def test_the_sawtooth_touches_its_peaks() -> None:
    import numpy as np

    resident = np.array([1, 2, 3, 4, 2, 3, 4])
    chart = charts.sawtooth(resident, [(4, 1, 4)], 1)
    assert chart.count("−3") == 2
    assert "tokens 1 to 3 leave (3 tokens)" in chart
    assert "peak 4" in chart
    assert "peak 7" in chart
