"""What `benchmarks/learner.py` compares is the same: TRL's loss and gradient norm on the same rollouts are ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "learner.py"


@pytest.mark.long
def test_loss_and_gradient_norm_are_those_of_trl() -> None:
    size = ["--hidden", "64", "--layers", "2", "--lengths", "16", "40", "24", "64"]
    once = ["--threads", "1", "--steps", "1", "--rounds", "1", "--trl-batch", "2"]
    done = subprocess.run([sys.executable, str(BENCHMARK), *size, *once], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]  # 1: they differ by more than 1e-5
    lines = done.stdout.splitlines()
    ours, trl = (next(line for line in lines if line.startswith(side)) for side in ("ours", "trl, batch 2"))
    loss, norm = (float(value) for value in ours.split()[-2:])
    assert abs(loss) > 0.1 and norm > 0.1
    assert [loss, norm] == pytest.approx([float(value) for value in trl.split()[-2:]], rel=1e-5)
