r"""TRL's GRPOTrainer and this system, from the same model to the same reward: how long?

    python benchmarks/end_to_end.py --model runs/quickstart/stage1/hf --seeds 0 1 2
    python benchmarks/end_to_end.py --model runs/quickstart/stage1/hf --seeds 0 --sides trl --steps 2 --trl-batch 12

    memento sft configs/sft/quickstart_stage1.yaml model=runs/quickstart/stage1/hf out=runs/uneven \
        'phases=[{steps: 350, problems: {min_terms: 2, max_terms: 14}}]' micro_batch_tokens=4096 lr=2e-3 muon_lr=0.01
    python benchmarks/end_to_end.py --model runs/uneven/hf --terms 2 14 --groups 16 --max-tokens 896 --trl-batch 12 \
        --set learner.ranks=2 learner.cpus=0.5 learner.micro_batch_tokens=4096 rollout.max_num_seqs=96

Same machine, start weights, problems, prompts, verifier, group size, optimiser, learning rate and algorithm: the
clipped surrogate, advantages over the group's standard deviation, mean over the tokens of an optimiser step, two of
those for each batch of completions. Both generate with full attention (TRL has no eviction), from a model that was
trained so. The seeds are those of the problems' order and of the sampling. The quickstart's completions are of much
the same length; with `--terms 2 14`, and a model that was trained on such problems, they differ several times over.

The clock starts with the process. Reward is that of the completions that were trained on, the mean of two batches in a
row. TRL generates a whole batch at once with a KV cache, without gradient checkpointing; what else makes it fast on the
machine at hand (`--trl-batch`, `--trl-threads`, `--trl-generation`) is found with `--sides trl --steps 2`. Both stop
where they reach the threshold. With `--out` what was measured is kept, and not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_grpo import grpo_config

from memento.config import RlConfig, load_config
from memento.run import read_metrics
from memento.sources import read_problems

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "rl" / "quickstart.yaml"
ALGORITHM = (
    "algorithm.loss=grpo",
    "algorithm.advantage_std=group",
    "algorithm.aggregation=token",
    "algorithm.sampler_correction=none",
)
SIDES = ("ours", "trl")


class Point(NamedTuple):
    """A batch of completions, when it has been trained on."""

    seconds: float
    """Since the process was started."""
    reward: float
    rollout_s: float
    """Seconds in which nothing but rollouts happened."""


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
        f"problems.arithmetic.min_terms={options.terms[0]}",
        f"problems.arithmetic.max_terms={options.terms[1]}",
        "rollout.evict=false",
        "eval.problems=null",
        "tracking.mode=disabled",
        f"checkpoint.interval={options.steps}",
        *ALGORITHM,
    ]


def ours(options: argparse.Namespace, seed: int, folder: Path) -> list[Point]:
    """The curve of `memento rl`, as its metrics have it."""
    out = folder / f"run-ours-{seed}"
    command = [sys.executable, "-m", "memento.rl.train", str(CONFIG), *settings(options, seed, out), *options.set]
    log = out.with_suffix(".log")
    began = time.time()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    while process.poll() is None:
        time.sleep(0.5)
        if (out / "metrics.jsonl").is_file() and reached(curve_of(out, began), options.threshold) is not None:
            process.terminate()
            process.wait()
    if process.returncode not in (0, 128 + signal.SIGTERM):
        raise RuntimeError(f"ours failed:\n{log.read_text(errors='replace')[-4000:]}")
    return curve_of(out, began)


def curve_of(run: Path, began: float) -> list[Point]:
    """The curve of a run whose process was started at `began`, in seconds since the epoch."""
    # The first line's step begins with the run folder; imports come before that.
    seconds, points = (run / "config.yaml").stat().st_mtime - began, []
    for row in read_metrics(run):
        step_s, reward, rollout_s = row["seconds/step"], row["reward/mean"], row["seconds/rollout"]
        assert step_s is not None and reward is not None and rollout_s is not None
        seconds += step_s
        points.append(Point(seconds, reward, rollout_s))
    return points


def trl(options: argparse.Namespace, seed: int, folder: Path) -> list[Point]:
    """The same for TRL, in a process of its own."""
    command = [sys.executable, __file__, "--side", "trl", "--model", str(options.model), "--out", str(folder)]
    for name in ("steps", "groups", "group_size", "max_tokens", "threshold", *TRL):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--terms", *map(str, options.terms), "--seeds", str(seed), "--began", str(time.time())]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.trl_threads), "PYTHONWARNINGS": "ignore"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # TRL's colocated vLLM lives in the trainer's process
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"trl failed:\n{done.stderr[-3000:]}")
    return [Point(*point) for point in json.loads(done.stdout.strip().splitlines()[-1])]


TRL = ("trl_batch", "trl_threads", "trl_generation")
"""Settings of its side alone."""

GENERATION: dict[str, dict[str, Any]] = {
    "transformers": {},
    "static": {"cache_implementation": "static"},
    "continuous": {"use_transformers_continuous_batching": True},
    "vllm": {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.1},
}


def train_trl(options: argparse.Namespace, seed: int) -> list[Point]:
    """TRL's trainer on our problems and verifier, in this process."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.grpo_trainer import GRPOTrainer

    from memento.chat import encode_prompts
    from memento.config import RewardsConfig
    from memento.rewards.scoring import Scorer, score_all
    from memento.rl.window import ProblemStream

    torch.set_num_threads(options.trl_threads)
    config = load_config(CONFIG, settings(options, seed, options.out / "unused"))
    assert isinstance(config, RlConfig)
    # The order that our loop takes them in.
    stream = ProblemStream(read_problems(config.problems), seed).take(options.steps * options.groups)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    messages = [[{"role": "user", "content": problem.prompt}] for _, problem in stream]
    for prompt, ids in zip(messages, encode_prompts(tokenizer, [p.prompt for _, p in stream]), strict=True):
        if list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)) != ids:
            raise RuntimeError(f"TRL's prompt is not ours: {prompt}")
    scorer = Scorer(RewardsConfig(workers=1))
    points: list[Point] = []
    rewards: list[float] = []
    rollout_s: list[float] = []

    def reward(serial: list[int], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        scores: list[float] = []
        for start in range(0, len(serial), options.group_size):
            problem = stream[serial[start]][1]
            ids = completion_ids[start : start + options.group_size]
            texts = [tokenizer.decode(c[:-1] if c[-1] == tokenizer.eos_token_id else c) for c in ids]
            for result in score_all(problem, texts, scorer):
                if result.score is None:
                    raise RuntimeError(f"{problem.id}: {result.outcome}")
                scores.append(result.score)
        rewards.append(statistics.mean(scores))
        return list(scores)

    class Trainer(GRPOTrainer):
        """Times the generation of completions."""

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = super()._generate_single_turn(*args, **kwargs)
            rollout_s.append(time.perf_counter() - began)
            return result

    class Clock(TrainerCallback):
        """Notes when a batch of completions has been trained on."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % config.learner.minibatches == 0:
                points.append(Point(time.time() - options.began, rewards[-1], rollout_s[-1]))
                control.should_training_stop = reached(points, options.threshold) is not None

    learner = config.learner
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learner.lr, betas=learner.betas, eps=learner.eps, weight_decay=learner.weight_decay
    )
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / learner.warmup_steps))
    generation = dict(GENERATION[options.trl_generation])
    if "use_vllm" in generation:
        generation["vllm_max_model_length"] = config.rollout.max_model_len
    arguments = grpo_config(
        options.out / f"trl-{seed}",
        batch=options.trl_batch,
        completions=options.groups * options.group_size,
        minibatches=learner.minibatches,
        group_size=options.group_size,
        max_tokens=options.max_tokens,
        generations=options.steps,
        epsilon=config.algorithm.clip_high,
        max_grad_norm=learner.max_grad_norm,
        seed=seed,
        **generation,
    )
    trainer = Trainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": messages, "serial": list(range(len(stream)))}),
        processing_class=tokenizer,
        optimizers=(optimizer, warmup),
        callbacks=[Clock()],
    )
    trainer.train()
    scorer.close()
    return points


def reached(points: Sequence[Point], threshold: float) -> float | None:
    """Seconds until the mean reward of the last two batches was at the threshold; None if it never was."""
    for before, now in itertools.pairwise(points):
        if (before.reward + now.reward) / 2 >= threshold:
            return now.seconds
    return None


def curve(side: str, options: argparse.Namespace, seed: int) -> list[Point]:
    """One side with one seed: measured, or read from ``--out`` if it was measured before.

    Raises:
        ValueError: it was, with other settings.
    """
    unused = {"out", "seeds", "sides", "began", "side", *(TRL if side == "ours" else ("set",))}
    asked = {name: str(value) for name, value in vars(options).items() if name not in unused}
    file = options.out / f"{side}-{seed}.json"
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["settings"] != asked:
            raise ValueError(f"{file} was measured with other settings: {known['settings']}")
        return [Point(*point) for point in known["points"]]
    points = (ours if side == "ours" else trl)(options, seed, options.out)
    file.write_text(json.dumps({"settings": asked, "points": points}) + "\n", encoding="utf-8")
    return points


def show(side: str, seed: int, points: Sequence[Point], threshold: float) -> None:
    """Print one curve and where its time went."""
    print(f"seed {seed}  {side:<5}" + "  ".join(f"{p.seconds:.0f}s:{p.reward:.2f}" for p in points))
    steps = [after.seconds - before.seconds for before, after in itertools.pairwise(points)]
    time_to = reached(points, threshold)
    print(
        f"seed {seed}  {side:<5}reward {threshold:g} "
        + ("not reached" if time_to is None else f"after {time_to:.0f} s")
        + (f"; a batch takes {statistics.median(steps):.1f} s" if steps else "")
        + f", {statistics.median(p.rollout_s for p in points):.1f} of them rollouts; the first is through after "
        f"{points[0].seconds:.0f} s",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the curves and the ratio of the times for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--model", type=Path, required=True, help="a Hugging Face folder, e.g. the quickstart's stage 1"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=SIDES)
    parser.add_argument("--steps", type=int, default=12, help="batches of completions, at most")
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--group-size", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=768)
    parser.add_argument("--terms", type=int, nargs=2, default=[5, 7], help="a problem has; 5 to 7 is the quickstart's")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=c", help="further overrides of our side's config")
    parser.add_argument("--trl-batch", type=int, default=4, help="completions of TRL's forward pass")
    parser.add_argument("--trl-threads", type=int, default=2)
    parser.add_argument("--trl-generation", choices=GENERATION, default="transformers")
    parser.add_argument("--out", type=Path, help="keep the run folders and curves here")
    parser.add_argument("--side", choices=("trl",), help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
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
            curves = {side: curve(side, options, seed) for side in options.sides}
            for side, points in curves.items():
                show(side, seed, points, options.threshold)
            times = [reached(curves.get(side, ()), options.threshold) for side in SIDES]
            if times[0] is not None and times[1] is not None:
                ratios.append(times[1] / times[0])
                print(f"seed {seed}  TRL's time over ours: {ratios[-1]:.2f}", flush=True)
    if ratios:
        print(f"ours is {statistics.median(ratios):.2f}x faster to the threshold (median of {len(ratios)} seeds)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
