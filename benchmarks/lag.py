"""Rollouts ahead of the learner against rollouts in step with it: throughput, idle time, what it reaches.

    python benchmarks/lag.py --model runs/quickstart/stage2/hf --seeds 0 1 2

The quickstart's RL run twice for each seed, with ``max_lag`` 0 and with another, in turns. Throughput and idle time are
those of the steps after the first one, evaluation not counted; accuracy is that of the last evaluation.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from memento.run import read_metrics

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "rl" / "quickstart.yaml"
COLUMNS = {
    "step/tokens_per_s": "tokens/s",
    "seconds/rollout": "waiting, s",
    "seconds/train": "training, s",
    "idle/learner": "learner idle",
    "engine/busy_fraction": "engines busy",
    "lag/mean": "lag",
    "groups/stale": "stale",
    "reward/mean": "reward",
}
"""Metric -> column; medians over steps, but for the last two, which are a sum and the last step's value."""


def run(out: Path, lag: int, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """One run; its columns and its last accuracy."""
    settings = [f"out={out}", f"model={options.model}", f"seed={seed}", f"max_lag={lag}", f"steps={options.steps}"]
    settings += [f"eval.interval={options.steps}", "tracking.mode=disabled", *options.set]
    command = [sys.executable, "-m", "memento.rl.train", str(CONFIG), *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"max_lag {lag}, seed {seed} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    rows = [row for row in read_metrics(out) if (row["step"] or 0) > 0]
    values = {name: [float(row[name] or 0.0) for row in rows[1:]] for name in COLUMNS}
    found = {name: statistics.median(series) for name, series in values.items()}
    accuracy = [float(value) for row in rows if (value := row.get("eval/accuracy")) is not None]
    found |= {"groups/stale": sum(values["groups/stale"]), "reward/mean": values["reward/mean"][-1]}
    return found | {"eval/accuracy": accuracy[-1] if accuracy else float("nan")}


def main(arguments: list[str] | None = None) -> int:
    """Print a line a run, and the ratios of the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="the quickstart's stage-2 model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lag", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=c", help="further overrides of both runs")
    options = parser.parse_args(arguments)
    print(f"{'seed':>4} {'max_lag':>8}" + "".join(f"{title:>14}" for title in COLUMNS.values()) + f"{'accuracy':>10}")
    by_lag: dict[int, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="lag-") as folder:
        for seed in options.seeds:
            for lag in (0, options.lag):
                found = run(Path(folder) / f"{seed}-{lag}", lag, seed, options)
                by_lag[lag].append(found)
                shown = "".join(f"{found[name]:>14.3f}" for name in COLUMNS)
                print(f"{seed:>4} {lag:>8}{shown}{found['eval/accuracy']:>10.3f}", flush=True)
    for name, title in (("step/tokens_per_s", "throughput"), ("idle/learner", "learner idle")):
        before, after = (statistics.median(found[name] for found in by_lag[lag]) for lag in (0, options.lag))
        print(f"{title}: {before:.3g} at max_lag 0, {after:.3g} at {options.lag} ({after / before:.2f}x)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
