"""Rollouts ahead of the learner against rollouts in step with it: throughput, idle time, what it reaches.

    python benchmarks/lag.py --model runs/quickstart/stage2/hf --seeds 0 1 2 --set algorithm.loss=grpo

The quickstart's RL run twice for each seed, with ``max_lag`` 0 and with another, in turns. Throughput and idle time are
those of all steps together, from the first rollout on; evaluation is not counted. Accuracy is that of the evaluation
after the last step. With ``--out`` the run folders are kept, and a run that is finished there is not run again.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from memento.config import load_config, to_yaml
from memento.run import read_metrics

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "rl" / "quickstart.yaml"
COLUMNS = (
    ("tokens_per_s", "tokens/s", ".0f"),
    ("steps_s", "steps, s", ".1f"),
    ("waiting_s", "waiting, s", ".1f"),
    ("training_s", "training, s", ".1f"),
    ("sync_s", "sync, s", ".1f"),
    ("idle", "learner idle", ".3f"),
    ("busy", "engines busy", ".3f"),
    ("lag", "lag", ".2f"),
    ("stale", "stale", ".0f"),
    ("reward", "reward", ".3f"),
    ("accuracy", "accuracy", ".4f"),
)
"""Name, title and format: seconds and stale groups of all steps, means of the rest, reward of the last step."""


def run(out: Path, lag: int, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """One run; its columns."""
    settings = [f"out={out}", f"model={options.model}", f"seed={seed}", f"max_lag={lag}", f"steps={options.steps}"]
    settings += [f"eval.interval={options.steps}", f"eval.problems.count={options.problems}"]
    settings += ["tracking.mode=disabled", *options.set]
    if not (out / "hf" / "model.safetensors").is_file():
        command = [sys.executable, "-m", "memento.rl.train", str(CONFIG), *settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"max_lag {lag}, seed {seed} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    elif (out / "config.yaml").read_text(encoding="utf-8") != to_yaml(load_config(CONFIG, settings)):
        raise RuntimeError(f"{out} holds a run with another configuration")
    return columns([row for row in read_metrics(out) if row["step"]])


def columns(rows: Sequence[dict[str, float | None]]) -> dict[str, float]:
    """From the lines of all steps."""

    def all_of(name: str) -> list[float]:
        values = [value for row in rows if (value := row[name]) is not None]
        if len(values) != len(rows):
            raise RuntimeError(f"{name} is missing from a step")
        return values

    phases = {name: sum(all_of(f"seconds/{name}")) for name in ("rollout", "batch", "train", "sync")}
    steps_s = sum(phases.values())
    accuracy = rows[-1]["eval/accuracy"]
    assert accuracy is not None
    return {
        "tokens_per_s": sum(all_of("train/loss_tokens")) / steps_s,
        "steps_s": steps_s,
        "waiting_s": phases["rollout"],
        "training_s": phases["train"],
        "sync_s": phases["sync"],
        "idle": 1 - sum(all_of("learner/seconds")) / steps_s,
        "busy": statistics.mean(all_of("engine/busy_fraction")),
        "lag": statistics.mean(all_of("lag/mean")),
        "stale": sum(all_of("groups/stale")),
        "reward": all_of("reward/mean")[-1],
        "accuracy": accuracy,
    }


def main(arguments: list[str] | None = None) -> int:
    """Print a line a run, and what the medians of the seeds say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="the quickstart's stage-2 model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lag", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--problems", type=int, default=400, help="of the evaluation")
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=c", help="further overrides of both runs")
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    options = parser.parse_args(arguments)
    print(f"{'seed':>4} {'max_lag':>8}" + "".join(f"{title:>14}" for _, title, _ in COLUMNS))
    by_lag: dict[int, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="lag-") as temporary:
        folder = options.out or Path(temporary)
        for seed in options.seeds:
            for lag in (0, options.lag):
                found = run(folder / f"{seed}-{lag}", lag, seed, options)
                by_lag[lag].append(found)
                print(f"{seed:>4} {lag:>8}" + "".join(f"{found[name]:>14{form}}" for name, _, form in COLUMNS))
                sys.stdout.flush()
    ratios = [ahead["tokens_per_s"] / still["tokens_per_s"] for still, ahead in zip(*by_lag.values(), strict=True)]
    print(f"throughput: {statistics.median(ratios):.2f}x ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")
    for name, title in (("idle", "learner idle"), ("accuracy", "accuracy")):
        before, after = (statistics.mean(found[name] for found in by_lag[lag]) for lag in (0, options.lag))
        print(f"{title}: {before:.3f} at max_lag 0, {after:.3f} at {options.lag} (means of {len(ratios)} seeds)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
