"""The same recorded rollouts through TRL's GRPOTrainer and through our learner: agreement, speed, memory.

    python benchmarks/learner.py                                  uneven completions of 128 to 4,096 tokens
    python benchmarks/learner.py --vocabulary 151936              where the logits dominate

Both train a Qwen3 of the same weights in fp32 on the CPU, on the same token ids and rewards, without eviction (which
TRL does not have), by the algorithm that they share: the clipped surrogate with group-normalised advantages, averaged
over the tokens of the step (TRL's ``loss_type="dapo"``, our ``loss=grpo advantage_std=group aggregation=token``). TRL
gets its rollouts through ``rollout_func``. Each side runs in a process of its own, in turns; the learning rate is 0, so
that every step is the same. A step is what both call one: rollouts in, optimiser step done.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from trl_grpo import grpo_config

from memento.config import RlConfig
from memento.format import kv_profile
from memento.preflight import load_tokenizer
from memento.problems import Problem, ProblemKind
from memento.trajectory import FinishReason, Outcome, RewardResult, ScoredGroup, Trajectory, VersionSpan, append_jsonl

LENGTHS = (128, 192, 256, 384, 512, 1024, 2048, 4096)
"""Completion tokens: one group of four from the first of every two, one from the second."""

GROUP_SIZE = 4


def write_model(folder: Path, vocabulary: int, hidden: int, layers: int) -> None:
    """A Qwen3 from a seed, with the tiny tokenizer; the embedding has as many rows as the vocabulary asks for."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from memento.tiny import make_tokenizer

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=max(vocabulary, len(tokenizer)),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=int(tokenizer.eos_token_id),  # pyright: ignore[reportArgumentType]
        pad_token_id=int(tokenizer.pad_token_id),  # pyright: ignore[reportArgumentType]
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rollouts(file: Path, model: Path, lengths: Sequence[int]) -> None:
    """Groups of four random completions; half of each is right. Ids are ordinary ones of the tiny tokenizer."""
    tokenizer = load_tokenizer(model)
    fmt = RlConfig.model_validate(tree(model, lengths)).format.bind(tokenizer).without_eviction()
    rng = np.random.default_rng(0)
    groups = []
    for g in range(len(lengths) // GROUP_SIZE):
        prompt = tuple(rng.integers(20, 400, 24).tolist())
        trajectories = []
        for sample in range(GROUP_SIZE):
            tokens = lengths[sample * (len(lengths) // GROUP_SIZE) + g]
            completion = (*rng.integers(20, 400, tokens - 1).tolist(), tokenizer.eos_token_id)
            profile = kv_profile([*prompt, *completion], fmt, len(prompt))
            trajectories.append(
                Trajectory(
                    problem_id=f"p{g}",
                    group_id=f"{g}/p{g}",
                    sample_index=sample,
                    prompt_ids=prompt,
                    completion_ids=completion,
                    rollout_logprobs=tuple([-6.0] * tokens),
                    text="",
                    finish_reason=FinishReason.STOP,
                    weight_versions=(VersionSpan(0, tokens, 0),),
                    peak_kv_tokens=profile.peak_tokens,
                    peak_kv_pages=1,
                    kv_area_tokens=profile.area,
                    seed=0,
                    temperature=1.0,
                    evict=False,
                    seconds=0.0,
                )
            )
        rewards = [
            RewardResult(score=float(i % 2), outcome=Outcome.CORRECT if i % 2 else Outcome.WRONG)
            for i in range(GROUP_SIZE)
        ]
        problem = Problem(id=f"p{g}", kind=ProblemKind.MATH, prompt="?", answer="1")
        groups.append(ScoredGroup(problem=problem, trajectories=tuple(trajectories), rewards=tuple(rewards)))
    append_jsonl(groups, file)


def tree(model: Path, lengths: Sequence[int], threads: int = 2) -> dict[str, Any]:
    """Our config of the shared algorithm."""
    return {
        "out": "unused",
        "model": str(model),
        "problems": {"arithmetic": {}},
        "groups_per_step": len(lengths) // GROUP_SIZE,
        "group_size": GROUP_SIZE,
        "sampling": {"max_tokens": max(lengths)},
        "algorithm": {
            "loss": "grpo",
            "advantage_std": "group",
            "aggregation": "token",
            "sampler_correction": "none",
        },
        "learner": {
            "device": "cpu",
            "cpus": threads,
            "zero_stage": 0,
            "dtype": "float32",
            "lr": 0.0,
            "warmup_steps": 0,
            "micro_batch_tokens": max(4096, max(lengths) + 32),
            "logprob_chunk_tokens": 512,
        },
    }


# ---------------------------------------------------------------------------------------------- one side, one process


def ours(folder: Path, lengths: Sequence[int], threads: int, steps: int) -> dict[str, Any]:
    """Our learner's rank, in this process."""
    from memento.rl.batch import assemble
    from memento.rl.learner_rank import LearnerRank

    config = RlConfig.model_validate(tree(folder / "model", lengths, threads))
    groups = [ScoredGroup.model_validate_json(line) for line in (folder / "rollouts.jsonl").open(encoding="utf-8")]
    fmt = config.format.bind(load_tokenizer(folder / "model"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rank = LearnerRank(config, 0, "cpu")
    rank.start("127.0.0.1", port)
    idle = reset_peak()
    seconds, losses, norms = [], [], []
    for _ in range(steps + 1):
        began = time.perf_counter()
        batch = assemble(groups, config, fmt)
        stats = rank.step(batch.for_rank(0), 1.0)
        seconds.append(time.perf_counter() - began)
        losses += stats.losses
        norms += stats.grad_norms
    return {"seconds": seconds[1:], "losses": losses, "norms": norms, "idle_mib": idle, "peak_mib": memory("VmHWM")}


def trl(folder: Path, lengths: Sequence[int], threads: int, steps: int, batch: int) -> dict[str, Any]:
    """TRL's trainer with `batch` completions a forward pass."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl.trainer.grpo_trainer import GRPOTrainer

    torch.set_num_threads(threads)
    groups = [ScoredGroup.model_validate_json(line) for line in (folder / "rollouts.jsonl").open(encoding="utf-8")]
    seconds: list[float] = []
    losses: list[float] = []

    def recorded(prompts: list[str], _trainer: Any) -> dict[str, list[Any]]:
        served: dict[str, int] = defaultdict(int)
        out: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "score": []}
        for prompt in prompts:
            group, sample = groups[int(prompt)], served[prompt]
            served[prompt] += 1
            trajectory = group.trajectories[sample]
            out["prompt_ids"].append(list(trajectory.prompt_ids))
            out["completion_ids"].append(list(trajectory.completion_ids))
            out["logprobs"].append(list(trajectory.rollout_logprobs))
            out["score"].append(group.scores[sample])
        return out

    def reward(score: list[float], **_: Any) -> list[float | None]:
        return list(score)

    class Timer(TrainerCallback):
        """Seconds of each optimiser step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    class Trainer(GRPOTrainer):
        """Keeps the loss before the Trainer rounds it for its log."""

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            loss = super()._compute_loss(model, inputs)
            losses.append(float(loss.detach()))
            return loss

    completions = len(groups) * GROUP_SIZE
    arguments = grpo_config(
        folder / "trl",
        batch=batch,
        completions=completions,
        minibatches=1,
        group_size=GROUP_SIZE,
        max_tokens=max(lengths),
        generations=steps + 1,
        learning_rate=0.0,
    )
    tokenizer = load_tokenizer(folder / "model")
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        reward_funcs=reward,
        rollout_func=recorded,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [str(g) for g in range(len(groups))]}),
        processing_class=tokenizer,
        callbacks=[Timer()],
    )
    idle = reset_peak()
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    accumulate = completions // batch
    whole = [sum(losses[i : i + accumulate]) for i in range(0, len(losses), accumulate)]
    norms = [float(row["grad_norm"]) for row in trainer.state.log_history if "grad_norm" in row]
    peak = memory("VmHWM")
    return {"seconds": seconds[1:], "losses": whole, "norms": norms, "idle_mib": idle, "peak_mib": peak}


def memory(name: str) -> float:
    """``VmHWM`` (peak) or ``VmRSS`` (now) of this process, MiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


def reset_peak() -> float:
    """Forget the peak so far; memory held now, MiB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return memory("VmRSS")


# ---------------------------------------------------------------------------------------------- both sides


def run_side(side: str, folder: Path, options: argparse.Namespace, batch: int = 1) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--trl-batch", str(batch)]
    command += ["--threads", str(options.threads), "--steps", str(options.steps)]
    command += ["--lengths", *map(str, options.lengths)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if loss and gradient norm agree to 1e-5."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vocabulary", type=int, default=416)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process, after one that is not")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of processes")
    parser.add_argument("--trl-batch", type=int, nargs="+", default=[1, 2], help="completions of TRL's forward pass")
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        run = (options.folder, options.lengths, options.threads, options.steps)
        with contextlib.redirect_stdout(sys.stderr):
            result = ours(*run) if options.side == "ours" else trl(*run, options.trl_batch[0])
        print(json.dumps(result))
        return 0
    if len(options.lengths) % GROUP_SIZE:
        parser.error(f"--lengths must be a multiple of {GROUP_SIZE}")
    with tempfile.TemporaryDirectory(prefix="learner-") as temporary:
        folder = Path(temporary)
        write_model(folder / "model", options.vocabulary, options.hidden, options.layers)
        write_rollouts(folder / "rollouts.jsonl", folder / "model", options.lengths)
        sides = [("ours", 0), *(("trl", batch) for batch in options.trl_batch)]
        results: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
        for _ in range(options.rounds):
            for side in sides:
                results[side].append(run_side(side[0], folder, options, max(side[1], 1)))
    return report(results, options)


def report(results: dict[tuple[str, int], list[dict[str, Any]]], options: argparse.Namespace) -> int:
    """Print the table and the ratios."""
    tokens = sum(options.lengths)
    spread = f"{min(options.lengths)} to {max(options.lengths)} tokens, {tokens} in all"
    print(f"{len(options.lengths)} completions of {spread}; vocabulary {options.vocabulary},")
    print(f"hidden {options.hidden}, {options.layers} layers, fp32, {options.threads} threads")
    print(f"{'':<16}{'s/step':>9}{'tokens/s':>10}{'peak MiB':>10}{'above idle':>12}{'loss':>14}{'grad norm':>13}")
    medians = {}
    for (side, batch), runs in results.items():
        seconds = statistics.median(s for run in runs for s in run["seconds"])
        peak = statistics.median(run["peak_mib"] for run in runs)
        above = statistics.median(run["peak_mib"] - run["idle_mib"] for run in runs)
        name = side if side == "ours" else f"trl, batch {batch}"
        loss, norm = runs[0]["losses"][0], runs[0]["norms"][0]
        print(
            f"{name:<16}{seconds:>9.2f}{tokens / seconds:>10.0f}{peak:>10.0f}{above:>12.0f}{loss:>14.8f}{norm:>13.7f}"
        )
        medians[side, batch] = (seconds, peak, above, loss, norm)
    mine = medians["ours", 0]
    others = [value for (side, _), value in medians.items() if side == "trl"]
    fastest, smallest = min(value[0] for value in others), min(value[1] for value in others)
    above = min(value[2] for value in others)
    worst = max(
        abs(a - b) / max(abs(b), 1e-12) for value in others for a, b in ((mine[3], value[3]), (mine[4], value[4]))
    )
    paired = [
        min(statistics.median(results["trl", batch][i]["seconds"]) for batch in options.trl_batch)
        / statistics.median(run["seconds"])
        for i, run in enumerate(results["ours", 0])
    ]
    print(
        f"faster than TRL at its best batch: {fastest / mine[0]:.2f}x (pairs: {', '.join(f'{r:.2f}' for r in paired)})"
    )
    print(f"peak memory: {mine[1] / smallest:.2f} of TRL's smallest; above what is held idle: {mine[2] / above:.2f}")
    print(f"largest relative difference of loss and gradient norm: {worst:.2g}")
    return 0 if worst < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
