"""Eviction under vLLM's V2 model runner, synchronous and asynchronous, as `test_eviction_exact.py` does under V1.

Streams, CUDA graphs and the attention kernels of GPUs are what this cannot show; see `tests.rollout.v2_on_cpu`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("triton")


def on_cpu(*how: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.rollout.v2_on_cpu", *how]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["worst"] < 1e-4
    return report


@pytest.mark.long
def test_asynchronous_scheduling_is_exact():
    report = on_cpu("asynchronous", "short")
    assert report["scored_tokens"] > 1000
    assert report["evictions"] > 15 and report["preemptions"] > 0 and report["forced"] > 4


@pytest.mark.long
def test_requests_that_sit_out_a_step_are_exact():
    report = on_cpu("asynchronous", "short", "reserving")
    assert report["scored_tokens"] > 1000 and report["evictions"] > 15
    assert report["sat_out"] > 0


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scheduling", ["synchronous", "asynchronous"])
def test_the_v2_runner_is_exact(scheduling):
    report = on_cpu(scheduling, "long")
    assert report["scored_tokens"] > 5000
    assert report["evictions"] > 60 and report["preemptions"] > 5 and report["forced"] > 5
