"""`memento inspect`: counts, lengths and compression by hand; a plot that shows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memento.arithmetic import make_traces
from memento.cli import app
from memento.errors import UserError
from memento.sft.inspection import ALL, inspect_data

B, E, S, Z = "<|block_start|>", "<|block_end|>", "<|summary_start|>", "<|summary_end|>"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"problem": "p", "response": f"<think>{B}1234 56{E}{S}12{Z}{B}99{E}{S}9{Z}</think>3", "domain": "math"},
        {"problem": "p", "response": f"<think>{B}1 2 3 4{E}{S}4{Z}</think>3", "domain": "code"},
        {"problem": "p", "response": "<think>plain</think>3", "domain": "code"},
        {"problem": "p", "response": f"<think>{B}open</think>3", "domain": "code"},
        {"problem": "", "response": "x"},
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_counts_and_lengths_by_hand(data: Path) -> None:
    found = inspect_data(str(data))
    assert (found.rows, found.usable, found.plain) == (5, 2, 1)
    assert found.dropped == {"no blocks": 1, "malformed blocks": 1, "empty": 1}
    assert found.values["math"]["blocks"] == [2]
    assert found.values["math"]["block_tokens"] == [6, 2], "digits count alone"
    assert found.values["math"]["memento_tokens"] == [2, 1]
    assert found.values["math"]["compression"] == [8 / 3]
    assert found.values["code"]["compression"] == [4]
    assert found.values["math"]["character_ratio"] == [3 / 9]
    assert sorted(found.values[ALL]["blocks"]) == [1, 2]
    mean = next(d for d in found.distributions if d.domain == ALL and d.measure == "compression")
    assert (mean.count, mean.mean, mean.quantiles[3]) == (2, (8 / 3 + 4) / 2, 4)
    assert inspect_data(str(data), limit=1).usable == 1


def test_the_tokenizer_counts_if_one_is_named(tiny: Path, tmp_path: Path, tokenizer) -> None:
    problem, trace = make_traces(1, 0)[0]
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"problem": problem.prompt, "response": trace}) + "\n")
    found = inspect_data(str(file), tokenizer=str(tiny))
    assert found.values[ALL]["trace_tokens"] == [len(tokenizer(trace)["input_ids"])]
    first = trace.split(B)[1].split(E)[0]
    assert found.values[ALL]["block_tokens"][0] == len(tokenizer(first)["input_ids"])


def test_the_command_prints_plots_and_writes(data: Path, tmp_path: Path) -> None:
    plot, out = tmp_path / "plot.png", tmp_path / "numbers.json"
    result = CliRunner().invoke(app, ["inspect", str(data), "--plot", str(plot), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "5 rows, 2 in memento format" in " ".join(result.output.split())
    assert "1 dropped: malformed blocks" in result.output
    assert plot.read_bytes()[:4] == b"\x89PNG" and plot.stat().st_size > 10_000
    assert json.loads(out.read_text())["usable"] == 2
    again = CliRunner().invoke(app, ["inspect", str(data), "--out", str(out)])
    assert isinstance(again.exception, UserError), "nothing is overwritten"
