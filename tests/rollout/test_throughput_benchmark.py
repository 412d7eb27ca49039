"""The throughput benchmark: what it counts, and that a small run holds together.

Every run checks its tokens and evictions itself.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from memento.format import MementoFormat, evictions

FILE = Path(__file__).parents[2] / "benchmarks" / "rollout_throughput.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rollout_throughput", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_area_is_that_of_the_pages_held(benchmark: ModuleType) -> None:
    #          prompt   start 2 tokens    end sum memento  close  answer
    script = benchmark.Script([20, 20], [1, 30, 30, 2, 3, 40, 4, 50, 50])
    # Resident tokens while each of the 9 is computed, without eviction: 3, 4, ... 11.
    assert benchmark.area_pages(script, benchmark.FMT.without_eviction(), 1) == sum(range(3, 12))
    assert benchmark.area_pages(script, benchmark.FMT.without_eviction(), 4) == 1 + 1 + 2 + 2 + 2 + 2 + 3 + 3 + 3
    # Behind the memento (after 9 tokens) the 2 of the block are gone.
    assert benchmark.area_pages(script, benchmark.FMT, 1) == sum(range(3, 10)) + 8 + 9


def test_traces_have_the_statistics_they_claim(benchmark: ModuleType) -> None:
    args: Namespace = benchmark.with_defaults(benchmark.parser().parse_args(["--requests", "400", "--scale", "0.25"]))
    scripts = benchmark.make_scripts(args, seed=1)
    assert scripts == benchmark.make_scripts(args, seed=1) != benchmark.make_scripts(args, seed=2)
    assert len(scripts) == 400 and all(len(s.prompt + s.completion) < args.max_model_len for s in scripts)
    assert len({tuple(s.prompt) for s in scripts}) == 400 // args.group_size
    fmt: MementoFormat = benchmark.FMT
    spans = [e for s in scripts for e in evictions(s.completion, fmt)]
    assert abs(len(spans) / 400 - 9) < 0.5
    assert abs(sum(end - start for _, start, end in spans) / len(spans) / (1150 / 4) - 1) < 0.05
    plain = benchmark.make_scripts(args, seed=1, blocks=False)
    assert [len(s.completion) for s in plain] == [len(s.completion) for s in scripts]
    assert not any(evictions(s.completion, fmt) for s in plain)


@pytest.mark.long
def test_a_small_run_writes_table_plot_and_numbers(tmp_path: Path) -> None:
    small = ["--quick", "--scale", "0.04", "--requests", "8", "--pools", "3", "--slice-s", "0.1", "--no-overhead"]
    done = subprocess.run(
        [sys.executable, str(FILE), *small, "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads((tmp_path / "rollout_throughput.json").read_text())
    (pool,) = result["pools"]
    (round_,) = pool["rounds"]
    assert round_["ours"]["tokens"] == round_["stock"]["tokens"] > 2000
    assert round_["ours"]["evictions"] > 40 and round_["stock"]["evictions"] == 0
    assert round_["ours"]["running"] > round_["stock"]["running"], "the pool was meant to bind"
    assert (tmp_path / "rollout_throughput.md").read_text() in done.stdout
    assert (tmp_path / "rollout_throughput.png").stat().st_size > 1000
