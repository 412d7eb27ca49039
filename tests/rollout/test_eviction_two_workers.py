"""Two tensor-parallel workers on CPU carry out the same evictions, exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")


@pytest.mark.long
def test_two_workers_are_exact():
    command = [sys.executable, "-m", "tests.rollout.two_workers"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["scored_tokens"] > 3000 and report["worst"] < 1e-4
    assert report["evictions"] > 30 and report["preemptions"] > 0
