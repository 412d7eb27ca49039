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
    rewards_N: torch.Tensor, groups_N: torch.Tensor, std: str = "batch", eps: float = EPS
) -> torch.Tensor:
    """The reward minus its group's mean, divided by a standard deviation.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1]), std="none")
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])

    Sources: group mean and standard deviation are those of GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2); no
    division is Dr. GRPO (arXiv 2503.20783, section 3.2); the standard deviation of the whole batch is Lite PPO
    (arXiv 2508.08221, section 4.1).

    Args:
        rewards_N: [N] one reward per completion.
        groups_N: int64 [N] group of each completion; any ids, in any order.
        std: "batch" divides by the standard deviation of all rewards, "group" by that of the completion's own group,
            "none" by nothing. Standard deviations have one degree of freedom less (ddof 1).
        eps: added to the standard deviation.

    Returns:
        [N] fp32. Exactly 0 where all rewards of a group are equal, and in a group of one.

    Raises:
        ValueError: shapes that do not agree, an unknown `std`, or a reward that is not finite.
    """
    if rewards_N.ndim != 1 or rewards_N.shape != groups_N.shape:
        raise ValueError(
            f"rewards and groups must be [N], got shapes {tuple(rewards_N.shape)} and {tuple(groups_N.shape)}"
        )
    if std not in STD:
        raise ValueError(f"unknown std {std!r}; there are {', '.join(STD)}")
    if not bool(torch.isfinite(rewards_N).all()):
        raise ValueError("a reward is not finite; a sample without a score must not reach the advantages")
    rewards_N = rewards_N.double()
    _, index_N = torch.unique(groups_N, return_inverse=True)
    centred_N, std_N = torch.zeros_like(rewards_N), STD[std](rewards_N, index_N)
    for group in index_N.unique():
        members = index_N == group
        of_group = rewards_N[members]
        # The mean of equal floats may differ from them in the last bit, and eps would blow that up to a gradient.
        if bool((of_group != of_group[0]).any()):
            centred_N[members] = of_group - of_group.mean()
    return (centred_N if std == "none" else centred_N / (std_N + eps)).float()


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
    "group": _group_std,
    "none": _no_std,
}
"""What a centred reward may be divided by: (rewards_N, group index_N) -> [N]."""
