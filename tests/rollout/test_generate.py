"""Samples to a file, without engines: what happens when the disk is full."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from memento.trajectory import read_trajectories

# In a process of its own, because the limit on file sizes is the process's. A write over it fails as one to a full disk
# does: in the middle of a line.
SCRIPT = """
import resource, signal, sys
from memento.errors import UserError
from memento.problems import Problem, ProblemKind
from memento.rollout.generate import generate_into
from memento.trajectory import FinishReason, SamplingParams, Trajectory, VersionSpan, sample_seed

class Pool:
    def generate(self, request, indices):
        return tuple(
            Trajectory(
                problem_id=request.problem.id, group_id=request.group_id, sample_index=i, prompt_ids=(1, 2),
                completion_ids=(3,) * 50, rollout_logprobs=(-0.5,) * 50, text="x" * 50,
                finish_reason=FinishReason.STOP, weight_versions=(VersionSpan(0, 50, 0),), peak_kv_tokens=52,
                peak_kv_pages=2, kv_area_tokens=1, seed=sample_seed(request.seed, request.group_id, i),
                temperature=1.0, seconds=0.1,
            )
            for i in indices
        )

if int(sys.argv[2]):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
problems = [Problem(id=f"p{i}", kind=ProblemKind.MATH, prompt="?", answer="1") for i in range(20)]
try:
    result = generate_into(Pool(), problems, 2, sys.argv[1], SamplingParams(temperature=1.0, max_tokens=50))
    print("generated", result.generated, result.skipped)
except UserError as error:
    print("error:", error)
"""


@pytest.mark.parametrize("limit", [100, 9000])
def test_a_full_disk_stops_clearly_and_loses_nothing(tmp_path: Path, limit: int) -> None:
    out = tmp_path / "samples.jsonl"

    def run(limit: int) -> str:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(out), str(limit)], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert f"error: {out} cannot be written: File too large." in run(limit)
    whole = out.read_bytes()
    there = whole.count(b"\n")
    assert len(whole) == limit and not whole.endswith(b"\n"), "the limit was meant to tear a line"
    assert run(0) == f"generated {40 - there} {there}"
    samples = {(t.problem_id, t.sample_index) for t in read_trajectories(out)}
    assert len(samples) == 40 and out.read_bytes().startswith(whole[: whole.rfind(b"\n") + 1])
