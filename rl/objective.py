"""The objective of one packed row: which loss, corrections and penalty the config asks for, put together.

Pure functions: the learner runs the models and the backward pass, this is what lies between, and it is tested without
either. A row's objective is a sum, to be added to that of all rows of all ranks and divided once by the loss tokens of
the optimiser step; whatever is computed per sequence needs that sequence alone, and a sequence lies in one row.
"""

from __future__ import annotations

import torch

from memento.config import AlgorithmConfig
from memento.rl.batch import MicroBatch
from memento.rl.losses import (
    POLICY_LOSSES,
    importance_ratio,
    kl_divergence,
    masked_importance_weight,
    sequence_importance_weight,
    sequence_mask,
    token_loss,
    truncated_importance_weight,
)


def row_objective(
    row: MicroBatch,
    logprobs_T: torch.Tensor,
    old_T: torch.Tensor,
    reference_T: torch.Tensor | None,
    algorithm: AlgorithmConfig,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sum of a row's weighted token losses, and the per-token quantities that are worth a statistic.

    Args:
        row: the packed row.
        logprobs_T: [T] current log-probabilities, with gradient.
        old_T: [T] proximal ones, without.
        reference_T: [T] those of the reference, for the KL penalty in the loss; None without one.
        algorithm: what to compute.

    Returns:
        The sum (a scalar with gradient), and tensors without gradient by the learner's tally names. Over loss tokens:
        ``ratio``, ``clip_low``, ``clip_high``, ``advantage``, ``kl_reference`` (k3), ``mismatch/weight``,
        ``mismatch/capped``, ``mismatch/masked``. Over all sampled tokens: ``mismatch/kl``, ``mismatch/ratio``,
        ``mismatch/abs_logprob_diff``.
    """
    device = logprobs_T.device
    mask_T, sampled_T = row.loss_mask.to(device), row.sampled_mask.to(device)
    rollout_T = row.rollout_logprobs.to(device)
    old_N, rollout_N, logprobs_N = old_T[mask_T], rollout_T[mask_T], logprobs_T[mask_T]
    advantages_N = row.advantages.to(device)[mask_T]
    sequences_N = row.document.to(device)[mask_T]

    policy_loss = POLICY_LOSSES[algorithm.loss]
    terms = policy_loss(logprobs_N, old_N, advantages_N, algorithm.clip_low, algorithm.clip_high, sequences_N)
    correction_N, quantities = sampler_weight(old_N, rollout_N, sequences_N, algorithm)
    kl_N = None
    if reference_T is not None:
        reference_N = reference_T[mask_T]
        kl_N = kl_divergence(logprobs_N, reference_N, algorithm.kl_estimator)
        quantities["kl_reference"] = kl_divergence(logprobs_N.detach(), reference_N, "k3")
    loss_N = token_loss(terms, correction_N, kl_N, algorithm.kl_coef)
    total = (loss_N * row.loss_weights.to(device)[mask_T]).sum()

    quantities |= {
        "ratio": terms.ratio_N,
        "clip_low": terms.clipped_low_N.float(),
        "clip_high": terms.clipped_high_N.float(),
        "advantage": advantages_N,
    }
    # Sampler against learner, over everything the sampler chose, under the weights before this step's updates.
    sampler_N, learner_N = rollout_T[sampled_T], old_T[sampled_T]
    quantities["mismatch/kl"] = kl_divergence(sampler_N, learner_N, "k3")
    quantities["mismatch/ratio"] = importance_ratio(learner_N, sampler_N)
    quantities["mismatch/abs_logprob_diff"] = (sampler_N - learner_N).abs()
    return total, quantities


def sampler_weight(
    old_N: torch.Tensor, rollout_N: torch.Tensor, sequences_N: torch.Tensor, algorithm: AlgorithmConfig
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """What each loss token weighs because engine and learner disagree about it: correction times mask.

    A token of weight 0 stays in the denominator, which is known before any log-probability is.

    Returns:
        [N] weights or None where nothing is corrected, and their statistics by tally name.
    """
    cap, bounds = algorithm.sampler_correction_cap, algorithm.sampler_mask_range or (0.0, float("inf"))
    weight_N: torch.Tensor | None = None
    quantities: dict[str, torch.Tensor] = {}
    if algorithm.sampler_correction == "tis":
        weight_N = truncated_importance_weight(old_N, rollout_N, cap)
    elif algorithm.sampler_correction == "sequence_tis":
        weight_N = sequence_importance_weight(old_N, rollout_N, sequences_N, cap)
    elif algorithm.sampler_correction == "icepop":
        weight_N = masked_importance_weight(old_N, rollout_N, *bounds)
    if weight_N is not None and algorithm.sampler_correction != "icepop":
        quantities["mismatch/capped"] = (weight_N >= cap).float()
    if algorithm.sampler_mask != "none":
        geometric = algorithm.sampler_mask == "geometric"
        kept_N = sequence_mask(old_N, rollout_N, sequences_N, *bounds, geometric=geometric)
        weight_N = kept_N if weight_N is None else weight_N * kept_N
    if weight_N is not None:
        quantities["mismatch/weight"] = weight_N
        if algorithm.sampler_mask_range is not None:
            quantities["mismatch/masked"] = (weight_N == 0).float()
    return weight_N, quantities
