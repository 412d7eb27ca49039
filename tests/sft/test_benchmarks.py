"""The benchmarks' own arithmetic: the probe, and when a phenomenon counts as shown."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def baselines() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "baselines.py"
    spec = importlib.util.spec_from_file_location("baselines_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_probe_reads_what_is_there_and_nothing_else(baselines: Any) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 600)
    noise = rng.normal(size=(600, 40))
    there = noise.copy()
    there[:, :10] += 4 * np.eye(10)[labels]
    assert baselines.cross_validated(there, labels) > 0.9
    assert baselines.cross_validated(noise, labels) < 0.1 + 4 * np.sqrt(0.09 / 600)


def run(**accuracy: float) -> dict[str, Any]:
    names = {
        "stage1": "stage 1, evicted",
        "stage2": "stage 2, evicted",
        "restart": "stage 2, restart mode",
        "control": "control, full attention",
        "trained": "stage 2 and RL, evicted",
    }
    peaks = {"control": 300.0}
    rows = {
        names[key]: {"accuracy": value, "stderr": 0.02, "peak_kv_tokens": peaks.get(key, 140.0)}
        for key, value in accuracy.items()
    }
    probe = {"before": 0.1, "own": 0.9, "next": 0.2, "second next": 0.11}
    return {"rows": rows, "probe": {"accuracy": probe, "stderr": 0.01}}


def test_a_phenomenon_shows_if_it_shows_in_every_run(baselines: Any) -> None:
    good = run(stage1=0.01, stage2=0.30, restart=0.20, control=0.32, trained=0.60)
    weak = run(stage1=0.01, stage2=0.30, restart=0.27, control=0.40, trained=0.42)
    shows = [verdict[1] for verdict in baselines.verdicts([good])]
    assert shows == [True, True, True, True, True, True, True, False, True]
    both = [verdict[1] for verdict in baselines.verdicts([good, weak])]
    assert both == [True, False, False, True, False, True, True, False, True]
