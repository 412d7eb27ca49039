"""Policy-gradient losses: pure functions on tensors, one value per token.

Every function takes the loss tokens of a microbatch, flattened to ``[N]`` (prompt, forced and otherwise masked tokens
are already out), and returns terms per token. The learner sums ``loss_N * weights_N`` over all microbatches and ranks
and divides once, by the number of loss tokens of the whole optimiser step, so neither the packing nor the number of
ranks can change a gradient.

Three policies appear, and their names never change:

* ``rollout_logprobs``: the sampler, as it generated the tokens;
* ``old_logprobs``: the proximal policy, the learner's weights before the first update of this step;
* ``logprobs``: the current policy, the only one that carries a gradient.

The importance ratio of a loss is ``exp(logprobs - old_logprobs)``. The step from the sampler to the proximal policy is
corrected by its own weight (`truncated_importance_weight`), so the two corrections multiply to
``exp(logprobs - rollout_logprobs)`` and nothing is corrected twice (decoupled objective, arXiv 2110.00641).

Some functions look at whole sequences. They take ``sequences_N``, which sequence each token belongs to (any ids, in any
order); a sequence never spans two microbatches, so the tokens of one microbatch are all they need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this magnitude before `exp`: e^20 is 5e8, far from overflow and from anything healthy."""


class PolicyTerms(NamedTuple):
    """What a policy loss returns for each token. Only `loss_N` carries a gradient."""

    loss_N: torch.Tensor
    """[N] loss, to be weighted, summed and divided by the global number of loss tokens."""
    ratio_N: torch.Tensor
    """[N] importance ratio current / proximal, before any clipping."""
    clipped_low_N: torch.Tensor
    """bool [N]: the lower bound was active."""
    clipped_high_N: torch.Tensor
    """bool [N]: the upper bound was active."""


def importance_ratio(logprobs_N: torch.Tensor, old_logprobs_N: torch.Tensor) -> torch.Tensor:
    """``exp(logprobs - old_logprobs)``, [N], the log-ratio clamped to `MAX_LOG_RATIO`."""
    _same_shape(logprobs_N, old_logprobs_N)
    return (logprobs_N - old_logprobs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_log_ratio(
    logprobs_N: torch.Tensor, other_logprobs_N: torch.Tensor, sequences_N: torch.Tensor, *, mean: bool
) -> torch.Tensor:
    """Sum or mean of ``logprobs - other_logprobs`` over each sequence, given to all its tokens: [N], without gradient.

    The sum is the log-ratio of the whole sequence, the mean that of the geometric mean of its token ratios. Summed in
    fp64, so that neither the order nor the neighbours of a sequence matter; the result is clamped to `MAX_LOG_RATIO`.
    """
    _same_shape(logprobs_N, other_logprobs_N, sequences_N)
    _, index_N, counts_S = torch.unique(sequences_N, return_inverse=True, return_counts=True)
    log_ratio_N = (logprobs_N.detach() - other_logprobs_N.detach()).double()
    log_ratio_S = log_ratio_N.new_zeros(len(counts_S)).index_add(0, index_N, log_ratio_N)
    if mean:
        log_ratio_S = log_ratio_S / counts_S
    return log_ratio_S.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)[index_N].to(logprobs_N.dtype)


def grpo(
    logprobs_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    clip_low: float,
    clip_high: float,
    sequences_N: torch.Tensor | None = None,
) -> PolicyTerms:
    """The clipped surrogate ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``.

    A token whose ratio has left the interval in the direction of its advantage has no gradient. Sources: PPO, arXiv
    1707.06347, equation 7; per token with group advantages GRPO, arXiv 2402.03300, equation 3; two separate bounds
    DAPO, arXiv 2503.14476, section 3.1.

    Args:
        logprobs_N: [N] current log-probabilities, with gradient.
        old_logprobs_N: [N] proximal log-probabilities, without.
        advantages_N: [N].
        clip_low, clip_high: widths of the interval below and above 1.
        sequences_N: not used, every token has a ratio of its own.
    """
    _same_shape(logprobs_N, old_logprobs_N, advantages_N)
    return _clipped_surrogate(importance_ratio(logprobs_N, old_logprobs_N.detach()), advantages_N, clip_low, clip_high)


def gspo(
    logprobs_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    clip_low: float,
    clip_high: float,
    sequences_N: torch.Tensor,
) -> PolicyTerms:
    """The clipped surrogate with one ratio a sequence: the geometric mean of its token ratios.

    A sequence whose ratio has left the interval in the direction of its advantage has no gradient at any token. In the
    form whose gradient reaches every token by itself (``s`` times ``logprobs / stop_gradient``), which for advantages
    that are equal within a sequence has the value and, under weights that are too, the gradient of the plain form.
    Source: GSPO, arXiv 2507.18071, equations 5 and 7, and section 4.3, equations 13 and 14. Its bounds (3e-4 and 4e-4)
    are far narrower than those of token ratios, and it averages over sequences (aggregation "sequence").

    Args:
        logprobs_N, old_logprobs_N, advantages_N, clip_low, clip_high: as for `grpo`.
        sequences_N: int64 [N] sequence of each token. Its length is the number of its loss tokens.
    """
    _same_shape(logprobs_N, old_logprobs_N, advantages_N, sequences_N)
    log_ratio_N = sequence_log_ratio(logprobs_N, old_logprobs_N, sequences_N, mean=True)
    ratio_N = (log_ratio_N + (logprobs_N - logprobs_N.detach())).exp()
    return _clipped_surrogate(ratio_N, advantages_N, clip_low, clip_high)


def _clipped_surrogate(
    ratio_N: torch.Tensor, advantages_N: torch.Tensor, clip_low: float, clip_high: float
) -> PolicyTerms:
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    loss_N = -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    ratio_N = ratio_N.detach()
    return PolicyTerms(
        loss_N,
        ratio_N,
        (ratio_N < 1 - clip_low) & (advantages_N < 0),
        (ratio_N > 1 + clip_high) & (advantages_N > 0),
    )


def cispo(
    logprobs_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    clip_low: float,
    clip_high: float,
    sequences_N: torch.Tensor | None = None,
) -> PolicyTerms:
    """REINFORCE with a clipped weight: ``-stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) A logprobs``.

    No token is ever dropped: the clip bounds how much a token weighs, its gradient is always ``weight * A``. Source:
    MiniMax-M1, arXiv 2506.13585, section 3.1, equations 4 and 5 (the bounds are distances from 1, not the bounds
    themselves). With both bounds 0 the weight is 1: plain REINFORCE. Arguments as for `grpo`.
    """
    _same_shape(logprobs_N, old_logprobs_N, advantages_N)
    ratio_N = importance_ratio(logprobs_N.detach(), old_logprobs_N.detach())
    weight_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    loss_N = -weight_N * advantages_N * logprobs_N
    return PolicyTerms(loss_N, ratio_N, ratio_N < 1 - clip_low, ratio_N > 1 + clip_high)


PolicyLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, float, torch.Tensor], PolicyTerms]

POLICY_LOSSES: dict[str, PolicyLoss] = {"grpo": grpo, "cispo": cispo, "gspo": gspo}
"""Losses by the name that `algorithm.loss` takes."""


def k1(log_ratio_N: torch.Tensor) -> torch.Tensor:
    """``d``: unbiased, high variance. As a loss its gradient is 0 in expectation: it belongs into a reward or a log."""
    return log_ratio_N


def k2(log_ratio_N: torch.Tensor) -> torch.Tensor:
    """``d^2 / 2``: biased value, low variance; on-policy its gradient is that of the KL."""
    return log_ratio_N.square() / 2


def k3(log_ratio_N: torch.Tensor) -> torch.Tensor:
    """``exp(-d) - 1 + d``: unbiased, low variance, never negative (GRPO, arXiv 2402.03300, equation 4)."""
    return torch.expm1(-log_ratio_N) + log_ratio_N


KL_ESTIMATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""Estimators of KL(p || q) per token from ``d = log p - log q`` of tokens sampled from p."""


def kl_divergence(logprobs_N: torch.Tensor, other_logprobs_N: torch.Tensor, estimator: str = "k3") -> torch.Tensor:
    """KL(policy || other) per token, estimated on tokens that the first argument's policy sampled.

    Source: John Schulman, "Approximating KL Divergence" (2020). The log-ratio is clamped to `MAX_LOG_RATIO`, because k3
    exponentiates it.

    Args:
        logprobs_N: [N] of the policy that sampled the tokens; gradients flow through it.
        other_logprobs_N: [N] of the reference.
        estimator: "k1", "k2" or "k3".
    """
    _same_shape(logprobs_N, other_logprobs_N)
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"unknown KL estimator {estimator!r}; there are {', '.join(KL_ESTIMATORS)}")
    return KL_ESTIMATORS[estimator]((logprobs_N - other_logprobs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def truncated_importance_weight(
    old_logprobs_N: torch.Tensor, rollout_logprobs_N: torch.Tensor, cap: float
) -> torch.Tensor:
    """``min(exp(old - rollout), cap)``, detached: what a sampled token weighs under the learner's own proximal policy.

    Engine and learner compute the same log-probability with different kernels, precision and, with lag, weights.
    Source: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025); the truncation
    is that of Ionides, "Truncated Importance Sampling" (2008), section 2.
    """
    return importance_ratio(old_logprobs_N.detach(), rollout_logprobs_N.detach()).clamp(max=cap)


def masked_importance_weight(
    old_logprobs_N: torch.Tensor, rollout_logprobs_N: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """``k = exp(old - rollout)`` where ``low <= k <= high``, else 0: a token that engine and learner see differently is
    left out instead of capped. [N], detached. Source: IcePop, in Ring-1T, arXiv 2510.18855 (0.5 and 5).
    """
    ratio_N = importance_ratio(old_logprobs_N.detach(), rollout_logprobs_N.detach())
    return torch.where((ratio_N >= low) & (ratio_N <= high), ratio_N, 0.0)


def sequence_importance_weight(
    old_logprobs_N: torch.Tensor, rollout_logprobs_N: torch.Tensor, sequences_N: torch.Tensor, cap: float
) -> torch.Tensor:
    """``min(product of exp(old - rollout) over the sequence, cap)`` for each of its tokens, [N], detached.

    The importance weight of a whole completion: unbiased up to the cap, where that of single tokens is not, and of high
    variance on long ones. Source: Liu et al., "When Speed Kills Stability: Demystifying RL Collapse from the
    Training-Inference Mismatch" (2025), Seq-TIS.
    """
    return sequence_log_ratio(old_logprobs_N, rollout_logprobs_N, sequences_N, mean=False).exp().clamp(max=cap)


def sequence_mask(
    old_logprobs_N: torch.Tensor,
    rollout_logprobs_N: torch.Tensor,
    sequences_N: torch.Tensor,
    low: float,
    high: float,
    *,
    geometric: bool,
) -> torch.Tensor:
    """1 for every token of a sequence whose ratio proximal / sampler lies in [low, high], else 0. [N], detached.

    The ratio is the product over the sequence's tokens, or with `geometric` their geometric mean, which does not grow
    with the length. Source: Liu et al. (see `sequence_importance_weight`): times that weight, the product's mask is
    Seq-MIS; the geometric mean's is geometric rejection sampling.
    """
    log_ratio_N = sequence_log_ratio(old_logprobs_N, rollout_logprobs_N, sequences_N, mean=geometric)
    ratio_N = log_ratio_N.exp()
    return ((ratio_N >= low) & (ratio_N <= high)).to(ratio_N.dtype)


def token_loss(
    terms: PolicyTerms, correction_N: torch.Tensor | None = None, kl_N: torch.Tensor | None = None, kl_coef: float = 0.0
) -> torch.Tensor:
    """The whole loss of each token, [N]: policy term times sampler correction, plus the KL penalty (not corrected)."""
    loss_N = terms.loss_N if correction_N is None else terms.loss_N * correction_N
    return loss_N if kl_N is None else loss_N + kl_coef * kl_N


def aggregation_weights(
    sequences_N: torch.Tensor, groups_N: torch.Tensor, aggregation: str = "group", constant: float | None = None
) -> torch.Tensor:
    """How much each loss token weighs in the mean, [N] fp32. The weights sum to N, but for "constant".

    ``sum(loss_N * weights_N) / N`` is then, by name:

    * "token": the mean over all tokens (DAPO, arXiv 2503.14476, section 3.3);
    * "sequence": the mean over sequences of the mean over their tokens (GRPO, arXiv 2402.03300, equation 3);
    * "group": the mean over groups of the mean over all tokens of the group, so a problem with long answers weighs as
      much as one with short answers, and within a group every token weighs the same;
    * "constant": the sum over all tokens divided by `constant`, sequences times a length that does not depend on them,
      so that no answer weighs less for being long (Dr. GRPO, arXiv 2503.20783, section 3.2 and listing 1).

    A sequence or group without loss tokens does not count.

    Args:
        sequences_N: int64 [N] sequence of each loss token of the optimiser step, over all ranks.
        groups_N: int64 [N] group of each.
        constant: the divisor of "constant", in tokens; greater than 0.

    Raises:
        ValueError: shapes that do not agree, an unknown name, or "constant" without its constant.
    """
    _same_shape(sequences_N, groups_N)
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {aggregation!r}; there are {', '.join(AGGREGATIONS)}")
    if aggregation == "token":
        return torch.ones(len(sequences_N))
    if aggregation == "constant":
        if constant is None or constant <= 0:
            raise ValueError(f"aggregation constant needs a constant above 0, got {constant}")
        return torch.full((len(sequences_N),), len(sequences_N) / constant)
    parts_N = sequences_N if aggregation == "sequence" else groups_N
    _, index_N, counts_P = torch.unique(parts_N, return_inverse=True, return_counts=True)
    return (len(parts_N) / (len(counts_P) * counts_P.double()))[index_N].float()


AGGREGATIONS = ("token", "sequence", "group", "constant")
"""Names that `algorithm.aggregation` takes."""


def _same_shape(*tensors: torch.Tensor) -> None:
    if any(t.shape != tensors[0].shape or t.ndim != 1 for t in tensors):
        raise ValueError(f"per-token tensors must all be [N], got {', '.join(str(tuple(t.shape)) for t in tensors)}")
