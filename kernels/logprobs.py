"""Log-probabilities and entropies of given tokens, without ever holding [T, V] logits.

At 32 K tokens and a vocabulary of 151 K the fp32 logits alone are 19.9 GB. Here the output head is applied to a few
hundred positions at a time, in fp32 from the logits on, and applied again in the backward pass.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint


def linear_logprobs(
    hidden_TD: torch.Tensor,
    head_weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden @ head^T / temperature) at the targets, and the entropy of the same distribution.

    Args:
        hidden_TD: [T, D] last hidden states; position t predicts ``targets_T[t]`` (the caller has shifted).
        head_weight_VD: [V, D] output head.
        targets_T: int64 [T].
        temperature: divides the logits, as it did when the tokens were sampled. > 0.
        chunk_tokens: positions per chunk; at most [chunk_tokens, V] fp32 logits exist at a time.

    Returns:
        (logprobs_T, entropy_T), fp32 (fp64 for fp64 input), both differentiable in hidden and head. Entropy in nats.

    Raises:
        ValueError: temperature <= 0, or shapes that do not fit.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if hidden_TD.ndim != 2 or head_weight_VD.ndim != 2 or hidden_TD.shape[1] != head_weight_VD.shape[1]:
        raise ValueError(
            f"hidden must be [T, D] and head [V, D], got {tuple(hidden_TD.shape)} and {tuple(head_weight_VD.shape)}"
        )
    if targets_T.shape != hidden_TD.shape[:1]:
        raise ValueError(f"targets must be [{len(hidden_TD)}], got {tuple(targets_T.shape)}")
    chunks = [
        # The logits of a chunk are computed again in backward instead of kept; nothing random, so no RNG to restore.
        checkpoint(
            _chunk_logprobs, hidden, head_weight_VD, targets, temperature, use_reentrant=False, preserve_rng_state=False
        )
        for hidden, targets in zip(hidden_TD.split(chunk_tokens), targets_T.split(chunk_tokens), strict=True)
    ]
    logprobs, entropy = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def logits_logprobs(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `linear_logprobs`, from logits that exist already."""
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)) / temperature
    normaliser_T = logits_TV.logsumexp(dim=-1)
    logprobs_T = logits_TV.gather(-1, targets_T[:, None])[:, 0] - normaliser_T
    probabilities_TV = (logits_TV - normaliser_T[:, None]).exp()
    return logprobs_T, normaliser_T - (probabilities_TV * logits_TV).sum(-1)


def _chunk_logprobs(
    hidden: torch.Tensor, head_weight: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return logits_logprobs(hidden @ head_weight.T, targets, temperature)
