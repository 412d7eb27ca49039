"""TRL's GRPOTrainer as our benchmarks run it: its settings, once for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig


def grpo_config(
    out: Path,
    *,
    batch: int,
    completions: int,
    minibatches: int,
    group_size: int,
    max_tokens: int,
    generations: int,
    **others: Any,
) -> GRPOConfig:
    """The algorithm that TRL and we share, in fp32 on the CPU: the clipped surrogate, advantages over the group's
    standard deviation, the mean over the tokens of an optimiser step, no KL penalty, sampling at temperature 1.

    Args:
        out: TRL's output folder; nothing is saved there.
        batch: completions of one forward pass.
        completions: that are generated at once, and trained on in `minibatches` optimiser steps.
        group_size: completions of a prompt.
        max_tokens: of a completion.
        generations: how often that is done.
        others: further settings of TRL's, or others than these.
    """
    from trl.trainer.grpo_config import GRPOConfig

    settings: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": completions // minibatches // batch,
        "steps_per_generation": completions // batch,
        "num_generations": group_size,
        "max_completion_length": max_tokens,
        "max_steps": generations * minibatches,
        "lr_scheduler_type": "constant",
        "loss_type": "dapo",
        "scale_rewards": "group",
        "epsilon": 0.2,
        "beta": 0.0,
        "max_grad_norm": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return GRPOConfig(**settings | others)
