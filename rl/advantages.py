"""Advantages: how much better a completion is than its group.

Pure functions on the rewards of a whole step. They run once, on the driver, before anything is split over ranks or
minibatches, so the number of ranks cannot change them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

EPS = 1e-4
"""Added to a standard deviation before dividing by it."""


def group_advantages(
    rewards_N: torch.Tensor, groups_N: torch.Tensor, std: str = "batch", eps: float = EPS, baseline: str = "group"
) -> torch.Tensor:
    """The reward minus a baseline, divided by a standard deviation.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1]), std="none")
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])

    Sources: group mean and standard deviation are those of GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2); no
    division is Dr. GRPO (arXiv 2503.20783, section 3.2); the standard deviation of the whole batch is Lite PPO
    (arXiv 2508.08221, section 4.1); the mean of the other completions as the baseline is RLOO (arXiv 2402.14740,
    section 2); mean and standard deviation of the batch are REINFORCE++ (arXiv 2501.03262, section 3), the group's
    mean and then the standard deviation of what is left its variant with a baseline (same section).

    Args:
        rewards_N: [N] one reward per completion.
        groups_N: int64 [N] group of each completion; any ids, in any order.
        std: "batch" divides by the standard deviation of all rewards, "centred" by that of all rewards minus their
            baselines, "group" by that of the completion's own group, "none" by nothing. Standard deviations have one
            degree of freedom less (ddof 1).
        eps: added to the standard deviation.
        baseline: "group" is the mean of the completion's group, "leave_one_out" that of the group's other completions,
            "batch" that of all rewards.

    Returns:
        [N] fp32. Exactly 0 where all rewards of a group are equal, and in a group of one; with the baseline "batch",
        where all rewards are equal.

    Raises:
        ValueError: shapes that do not agree, an unknown `std` or `baseline`, the baseline "batch" with the standard
            deviation of a group (0 in a group of equal rewards, whose distance from the batch is not), or a reward that
            is not finite.
    """
    if rewards_N.ndim != 1 or rewards_N.shape != groups_N.shape:
        raise ValueError(
            f"rewards and groups must be [N], got shapes {tuple(rewards_N.shape)} and {tuple(groups_N.shape)}"
        )
    if std not in STD:
        raise ValueError(f"unknown std {std!r}; there are {', '.join(STD)}")
    if baseline not in BASELINES:
        raise ValueError(f"unknown baseline {baseline!r}; there are {', '.join(BASELINES)}")
    if baseline == "batch" and std == "group":
        raise ValueError("the baseline of the batch goes with the standard deviation of the batch, not of a group")
    if not bool(torch.isfinite(rewards_N).all()):
        raise ValueError("a reward is not finite; a sample without a score must not reach the advantages")
    rewards_N = rewards_N.double()
    _, index_N = torch.unique(groups_N, return_inverse=True)
    centred_N = torch.zeros_like(rewards_N)
    part_N = torch.zeros_like(index_N) if baseline == "batch" else index_N
    for part in part_N.unique():
        members = part_N == part
        of_part = rewards_N[members]
        # The mean of equal floats may differ from them in the last bit, and eps would blow that up to a gradient.
        if bool((of_part != of_part[0]).any()):
            centred_N[members] = BASELINES[baseline](of_part)
    std_N = STD[std](centred_N if std == "centred" else rewards_N, index_N)
    return (centred_N if std == "none" else centred_N / (std_N + eps)).float()


def overlong_penalty(
    lengths_N: torch.Tensor, truncated_N: torch.Tensor, max_tokens: int, buffer_tokens: int
) -> torch.Tensor:
    """What a completion pays for running into the length limit, [N] fp64 in [-1, 0].

    0 up to ``max_tokens - buffer_tokens``, then linear down to -1 at `max_tokens`. A truncated completion pays 1,
    whichever limit cut it. Source: soft overlong punishment, DAPO, arXiv 2503.14476, section 3.4, equation 13.

    >>> overlong_penalty(torch.tensor([60, 90, 100]), torch.tensor([False, False, True]), 100, 20)
    tensor([ 0.0000, -0.5000, -1.0000], dtype=torch.float64)

    Args:
        lengths_N: [N] completion tokens.
        truncated_N: bool [N] the completion hit a length limit.
        max_tokens: completion tokens, at most.
        buffer_tokens: the stretch before it in which the penalty grows; in [1, max_tokens].
    """
    if lengths_N.ndim != 1 or lengths_N.shape != truncated_N.shape:
        raise ValueError(f"lengths and truncated must be [N], got {tuple(lengths_N.shape)}, {tuple(truncated_N.shape)}")
    if not 1 <= buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens must be in [1, {max_tokens}] (max_tokens), got {buffer_tokens}")
    penalty_N = ((max_tokens - buffer_tokens - lengths_N.double()) / buffer_tokens).clamp(-1.0, 0.0)
    return penalty_N.masked_fill(truncated_N, -1.0)


def _batch_std(rewards_N: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
    return (rewards_N.std() if len(rewards_N) > 1 else rewards_N.new_zeros(())).expand_as(rewards_N)


def _group_std(rewards_N: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
    std_N = torch.zeros_like(rewards_N)
    for group in index_N.unique():
        members = index_N == group
        if int(members.sum()) > 1:
            std_N[members] = rewards_N[members].std()
    return std_N


def _no_std(rewards_N: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(rewards_N)


STD: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "batch": _batch_std,
    "centred": _batch_std,
    "group": _group_std,
    "none": _no_std,
}
"""What a centred reward may be divided by: (rewards_N, group index_N) -> [N]. "centred" is given the centred ones."""

BASELINES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "group": lambda rewards_G: rewards_G - rewards_G.mean(),
    "leave_one_out": lambda rewards_G: (rewards_G - rewards_G.mean()) * (len(rewards_G) / (len(rewards_G) - 1)),
    "batch": lambda rewards_G: rewards_G - rewards_G.mean(),
}
"""Rewards minus their baseline, of one group (of the whole step for "batch") whose rewards are not all equal."""
