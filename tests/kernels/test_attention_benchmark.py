"""The attention benchmark runs, counts pairs rightly and writes what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "attention.py"


def test_a_small_run_writes_its_results(tmp_path: Path) -> None:
    file = tmp_path / "attention.json"
    lengths = ["--block-tokens", "20", "--memento-tokens", "4", "--prompt-tokens", "2", "--spread", "0"]
    command = [sys.executable, str(SCRIPT), "--tokens", "60", "--rounds", "1", "--head-dim", "8", *lengths]
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(file.read_text())["lengths"]
    # 2 prompt tokens, then blocks of 1 + 20 + 2 + 4 + 1 = 28 tokens, of which 20 leave: at 30 and at 58.
    visible = 60 * 61 // 2 - 20 * (60 - 30) - 20 * (60 - 58)
    assert found["visible_fraction"] == visible / (60 * 61 // 2)
    assert set(found["results"]) == {"causal", "dense mask", "segments"}
    for result in found["results"].values():
        assert result["total_s"] > 0
        assert result["extra_bytes"] > 0
    assert "ideal speed-up" in done.stdout
