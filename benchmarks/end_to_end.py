"""TRL's GRPOTrainer and this system, from the same model to the same reward: how long?

    python benchmarks/end_to_end.py --model runs/quickstart/stage1/hf --seeds 0 1 2

Same machine, start weights, problems, prompts, verifier, group size, optimiser, learning rate and algorithm: the
clipped surrogate, advantages over the group's standard deviation, mean over the tokens of an optimiser step, two of
those for each batch of completions. Both generate with full attention (TRL has no eviction), from a model that was
trained so. TRL runs at its best on a CPU that we know of: generation of the whole batch at once with a KV cache, no
gradient checkpointing, and the `--trl-batch` that `benchmarks/learner.py` finds fastest. The seeds are those of the
problems' order and of the sampling. Reward is that of the completions that were trained on, the mean of two batches.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memento.config import RlConfig, load_config
from memento.run import read_metrics
from memento.sources import read_problems

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "rl" / "quickstart.yaml"
ALGORITHM = ("algorithm.loss=grpo", "algorithm.advantage_std=group", "algorithm.aggregation=token")


def settings(options: argparse.Namespace, seed: int, out: Path) -> list[str]:
    """Overrides of the quickstart's config that both sides are run by."""
    return [
        f"out={out}",
        f"model={options.model}",
        f"seed={seed}",
        f"steps={options.steps}",
        f"groups_per_step={options.groups}",
        f"group_size={options.group_size}",
        f"sampling.max_tokens={options.max_tokens}",
        f"max_lag={options.max_lag}",
        "rollout.evict=false",
        "eval.problems=null",
        "tracking.mode=disabled",
        f"checkpoint.interval={options.steps}",
        *ALGORITHM,
    ]


def ours(options: argparse.Namespace, seed: int, folder: Path) -> list[tuple[float, float]]:
    """(seconds since the process began, reward) after each batch, as `memento rl` reports them."""
    out = folder / f"ours-{seed}"
    command = [sys.executable, "-m", "memento.rl.train", str(CONFIG), *settings(options, seed, out)]
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ours failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    rows = read_metrics(out)
    # The first line's step covers everything since the run folder was made; imports come before that.
    first = json.loads((out / "environment.json").read_text(encoding="utf-8"))["time"]
    imports = max(0.0, time.mktime(time.strptime(first[:19], "%Y-%m-%dT%H:%M:%S")) - began)
    seconds, points = imports, []
    for row in rows:
        seconds += row["seconds/step"] or 0.0
        points.append((seconds, row["reward/mean"] or 0.0))
    return points


def trl(options: argparse.Namespace, seed: int, folder: Path) -> list[tuple[float, float]]:
    """The same for TRL, in a process of its own."""
    command = [sys.executable, __file__, "--side", "trl", "--model", str(options.model), "--out", str(folder)]
    for name in ("steps", "groups", "group_size", "max_tokens", "trl_batch", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--seeds", str(seed)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"trl failed:\n{done.stderr[-3000:]}")
    points = json.loads(done.stdout.strip().splitlines()[-1])
    return [(float(seconds), float(reward)) for seconds, reward in points]


def train_trl(options: argparse.Namespace, seed: int) -> list[tuple[float, float]]:
    """TRL's trainer on our problems and verifier, in this process."""
    began = time.perf_counter()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from memento.config import RewardsConfig
    from memento.rewards.scoring import Scorer, score_all
    from memento.rl.window import ProblemStream

    torch.set_num_threads(options.threads)
    config = load_config(CONFIG, settings(options, seed, options.out / "unused"))
    assert isinstance(config, RlConfig)
    problems = read_problems(config.problems)
    stream = ProblemStream(problems, seed).take(options.steps * options.groups)  # the order that our loop takes them in
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    points: list[tuple[float, float]] = []
    learner, batch = config.learner, options.trl_batch
    completions = options.groups * options.group_size
    scorer = Scorer(RewardsConfig(workers=1))

    def reward(serial: list[int], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        scores: list[float] = []
        for start in range(0, len(serial), options.group_size):
            problem = stream[serial[start]][1]
            ids = completion_ids[start : start + options.group_size]
            texts = [tokenizer.decode(c[:-1] if c[-1] == tokenizer.eos_token_id else c) for c in ids]
            scores += [float(result.score or 0.0) for result in score_all(problem, texts, scorer)]
        pending.append(statistics.mean(scores))
        return list(scores)

    pending: list[float] = []

    class Trainer(GRPOTrainer):
        """Notes the time when a batch of completions has been trained on."""

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            result = super().training_step(*args, **kwargs)
            if self._step % (completions // batch) == 0 and pending:
                points.append((time.perf_counter() - began, pending.pop()))
            return result

    accumulate = completions // learner.minibatches // batch
    arguments = GRPOConfig(
        output_dir=str(options.out / f"trl-{seed}"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        steps_per_generation=completions // batch,
        num_generations=options.group_size,
        max_completion_length=config.sampling.max_tokens,
        max_steps=options.steps * learner.minibatches,
        learning_rate=learner.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=learner.warmup_steps,
        adam_beta1=learner.betas[0],
        adam_beta2=learner.betas[1],
        weight_decay=learner.weight_decay,
        max_grad_norm=learner.max_grad_norm,
        loss_type="dapo",
        scale_rewards="group",
        epsilon=config.algorithm.clip_high,
        beta=0.0,
        temperature=config.sampling.temperature,
        top_k=0,
        top_p=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    rows = {
        "prompt": [[{"role": "user", "content": problem.prompt}] for _, problem in stream],
        "serial": list(range(len(stream))),
    }
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    scorer.close()
    return points


def reached(points: Sequence[tuple[float, float]], threshold: float) -> float | None:
    """Seconds until the mean reward of the last two batches was at the threshold; None if it never was."""
    for (_, before), (seconds, now) in itertools.pairwise(points):
        if (before + now) / 2 >= threshold:
            return seconds
    return None


def main(arguments: list[str] | None = None) -> int:
    """Print the two curves and the ratio of the times for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--model", type=Path, required=True, help="a Hugging Face folder, e.g. the quickstart's stage 1"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=12, help="batches of completions")
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--group-size", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=768)
    parser.add_argument("--max-lag", type=int, default=0, help="of our side")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2, help="of TRL's process")
    parser.add_argument("--trl-batch", type=int, default=2, help="completions of TRL's forward pass")
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    parser.add_argument("--side", choices=("trl",), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        with contextlib.redirect_stdout(sys.stderr):
            points = train_trl(options, options.seeds[0])
        print(json.dumps(points))
        return 0
    ratios = []
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as temporary:
        options.out = options.out or Path(temporary)
        options.out.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            curves = {"ours": ours(options, seed, options.out), "trl": trl(options, seed, options.out)}
            times = {side: reached(points, options.threshold) for side, points in curves.items()}
            for side, points in curves.items():
                shown = "  ".join(f"{seconds:.0f}s:{reward:.2f}" for seconds, reward in points)
                print(f"seed {seed}  {side:<5} {shown}", flush=True)
                print(f"seed {seed}  {side:<5} threshold {options.threshold:g}: {_seconds(times[side])}", flush=True)
            if times["ours"] and times["trl"]:
                ratios.append(times["trl"] / times["ours"])
                print(f"seed {seed}  ratio {ratios[-1]:.2f}", flush=True)
    if ratios:
        print(f"ours is {statistics.median(ratios):.2f}x faster to the threshold (median of {len(ratios)} seeds)")
    return 0


def _seconds(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
