"""Log-probabilities and entropies of given tokens from hidden states and the output head, never holding [T, V] logits.

At 32 K tokens and a vocabulary of 151 K the fp32 logits alone are 19.9 GB. Here the logits exist one tile at a time, a
few hundred positions by a few thousand words. Forward folds each tile into three numbers a position (the running
maximum, sum of exponentials, and their mean logit: the online softmax of arXiv 1805.02867, which also gives the
entropy); backward makes the tile again, turns it into the gradient of the logits, and multiplies it into the gradients
of hidden states and head::

    d logprob_t / d logit_tv  =  [v = target_t] - p_tv
    d entropy_t / d logit_tv  =  -p_tv (log p_tv + entropy_t)

Logits, statistics and sums of gradients are fp32 (fp64 for fp64 input), whatever the dtype of the inputs. On GPUs
`memento.kernels.triton_logprobs` does what is done to a tile in one pass over it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

CHUNK_VOCABULARY = {"cpu": 2048, "cuda": 8192}
"""Words in a tile, where the caller does not say: on the CPU what its caches hold, on GPUs what fills a product."""


def linear_logprobs(
    hidden_TD: torch.Tensor,
    head_weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    chunk_vocabulary: int | None = None,
    *,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden @ head^T / temperature) at the targets, and the entropy of the same distribution.

    The head may be tied to the embedding: autograd adds the gradients of both uses. Results do not depend on the chunks
    beyond rounding, and are the same in every run.

    Args:
        hidden_TD: [T, D] last hidden states; position t predicts ``targets_T[t]`` (the caller has shifted).
        head_weight_VD: [V, D] output head, in the dtype of `hidden_TD` unless autocast is on.
        targets_T: int64 [T], within [0, V).
        temperature: divides the logits, as it did when the tokens were sampled. > 0.
        chunk_tokens, chunk_vocabulary: at most [chunk_tokens, chunk_vocabulary] fp32 logits exist at a time, one tile
            in forward and up to three of its size in backward.
        implementation: "torch", or "triton" (GPU) for what is done to a tile; None for "torch", until the kernels have
            run on a GPU.

    Returns:
        (logprobs_T, entropy_T), fp32 (fp64 for fp64 input), both differentiable in hidden and head. Entropy in nats.

    Raises:
        ValueError: temperature or a chunk <= 0, shapes or dtypes that do not fit, or an unknown implementation.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    device = hidden_TD.device.type
    chunk_vocabulary = CHUNK_VOCABULARY.get(device, 8192) if chunk_vocabulary is None else chunk_vocabulary
    if chunk_tokens < 1 or chunk_vocabulary < 1:
        raise ValueError(f"chunks must hold at least 1, got {chunk_tokens} tokens by {chunk_vocabulary} words")
    if hidden_TD.ndim != 2 or head_weight_VD.ndim != 2 or hidden_TD.shape[1] != head_weight_VD.shape[1]:
        raise ValueError(
            f"hidden must be [T, D] and head [V, D], got {tuple(hidden_TD.shape)} and {tuple(head_weight_VD.shape)}"
        )
    if targets_T.shape != hidden_TD.shape[:1]:
        raise ValueError(f"targets must be [{len(hidden_TD)}], got {tuple(targets_T.shape)}")
    if implementation not in (None, "torch", "triton"):
        raise ValueError(f"unknown implementation {implementation!r}; there are torch, triton")
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_TD, head_weight_VD = hidden_TD.to(dtype), head_weight_VD.to(dtype)
    if hidden_TD.dtype != head_weight_VD.dtype:
        raise ValueError(f"hidden is {hidden_TD.dtype}, the head {head_weight_VD.dtype}: they must be of one dtype")
    return _LinearLogprobs.apply(  # pyright: ignore[reportReturnType]
        hidden_TD, head_weight_VD, targets_T, 1 / temperature, (chunk_tokens, chunk_vocabulary), implementation
    )


def logits_logprobs(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `linear_logprobs`, from logits that exist already: the twin that it must equal."""
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)) / temperature
    normaliser_T = logits_TV.logsumexp(dim=-1)
    logprobs_T = logits_TV.gather(-1, targets_T[:, None])[:, 0] - normaliser_T
    probabilities_TV = (logits_TV - normaliser_T[:, None]).exp()
    return logprobs_T, normaliser_T - (probabilities_TV * logits_TV).sum(-1)


class _LinearLogprobs(torch.autograd.Function):
    """The vocabulary is the outer loop: the sum over positions of the head's gradient is then complete chunk by chunk,
    and only that of the hidden states is kept in fp32 as a whole."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        scale: float,
        chunks: tuple[int, int],
        implementation: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fold, _ = _tile_functions(implementation)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        tokens, words = len(hidden), len(head)
        with torch.autocast(hidden.device.type, enabled=False):
            # Finite, so that the first tile rescales nothing by exp(-inf - -inf).
            top = hidden.new_full((tokens,), torch.finfo(wide).min, dtype=wide)
            total, weighted, at_target = (hidden.new_zeros(tokens, dtype=wide) for _ in range(3))
            tile = hidden.new_empty(min(tokens, chunks[0]) * min(words, chunks[1]), dtype=wide)
            for first in range(0, words, chunks[1]):
                part = _operand(head[first : first + chunks[1]])
                for start in range(0, tokens, chunks[0]):
                    here = slice(start, start + chunks[0])
                    logits = _multiply(_operand(hidden[here]), part.T, tile, scale)
                    fold(logits, targets[here] - first, top[here], total[here], weighted[here], at_target[here])
        # `weighted` sums exp(x - top) (x - top): relative to the maximum nothing cancels.
        log_total = total.log()
        logprobs, entropy = at_target - top - log_total, log_total - weighted / total
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, head, targets, top + log_total, entropy)
        ctx.scale, ctx.chunks, ctx.implementation = scale, chunks, implementation
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, head, targets, normaliser, entropy = ctx.saved_tensors
        _, turn = _tile_functions(ctx.implementation)
        need_hidden, need_head = ctx.needs_input_grad[:2]
        wide, (chunk_tokens, chunk_words) = normaliser.dtype, ctx.chunks
        tokens, words = len(hidden), len(head)
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 6
        zeros = torch.zeros_like(normaliser) if grad_logprobs is None else grad_logprobs
        with torch.autocast(hidden.device.type, enabled=False):
            d_hidden = torch.zeros_like(hidden, dtype=wide) if need_hidden else None
            d_head = torch.empty_like(head) if need_head else None
            d_part = head.new_empty(min(words, chunk_words), head.shape[1], dtype=wide) if need_head else None
            tile = hidden.new_empty(min(tokens, chunk_tokens) * min(words, chunk_words), dtype=wide)
            for first in range(0, words, chunk_words):
                rows = slice(first, min(first + chunk_words, words))
                part = _operand(head[rows])
                if d_part is not None:
                    d_part = d_part[: len(part)].zero_()
                for start in range(0, tokens, chunk_tokens):
                    here = slice(start, start + chunk_tokens)
                    states = _operand(hidden[here])
                    logits = _multiply(states, part.T, tile, ctx.scale)
                    # The gradient of the product, whose factor `scale` the logits already hold.
                    gradient = turn(
                        logits, targets[here] - first, normaliser[here], entropy[here], zeros[here] * ctx.scale,
                        None if grad_entropy is None else grad_entropy[here] * ctx.scale, states.dtype,
                    )  # fmt: skip
                    if d_hidden is not None:
                        _add_product(d_hidden[here], gradient, part)
                    if d_part is not None:
                        _add_product(d_part, gradient.T, states)
                if d_head is not None and d_part is not None:
                    d_head[rows] = d_part
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_head, None, None, None, None


def _operand(x: torch.Tensor) -> torch.Tensor:
    """What is multiplied: tensor cores take bf16 and fp16 and give fp32, the CPU's products round to their inputs."""
    return x if x.is_cuda or x.dtype == torch.float64 else x.float()


def _multiply(a: torch.Tensor, b: torch.Tensor, memory: torch.Tensor, scale: float) -> torch.Tensor:
    """a @ b * scale, in the dtype and within the space of `memory`."""
    out = memory[: len(a) * b.shape[1]].view(len(a), b.shape[1])
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=0, alpha=scale, out=out)
    torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out if scale == 1 else out.mul_(scale)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, without rounding the product to the dtype of its factors."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _tile_functions(implementation: str | None) -> tuple[Any, Any]:
    if implementation != "triton":
        return _fold_tile, _turn_tile
    try:
        from memento.kernels import triton_logprobs
    except ImportError as error:
        raise ValueError('implementation "triton" needs the package triton, which is not installed here') from error
    return triton_logprobs.fold_tile, triton_logprobs.turn_tile


def _fold_tile(
    logits: torch.Tensor,
    targets: torch.Tensor,
    top: torch.Tensor,
    total: torch.Tensor,
    weighted: torch.Tensor,
    at_target: torch.Tensor,
) -> None:
    """Fold logits [t, v], which are destroyed, into the statistics [t] of their rows; `targets` count from the tile."""
    words = logits.shape[1]
    inside = (targets >= 0) & (targets < words)
    found = logits.gather(1, targets.clamp(0, words - 1)[:, None])[:, 0]
    at_target.copy_(torch.where(inside, found, at_target))
    higher = torch.maximum(top, logits.amax(-1))
    moved = top - higher
    shrink = moved.exp()
    logits.sub_(higher[:, None])
    exponentials = logits.exp()
    weighted.add_(moved * total).mul_(shrink).add_(torch.linalg.vecdot(exponentials, logits))
    total.mul_(shrink).add_(exponentials.sum(-1))
    top.copy_(higher)


def _turn_tile(
    logits: torch.Tensor,
    targets: torch.Tensor,
    normaliser: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Turn logits [t, v], which are destroyed, into the gradient of the loss in them, as `dtype`."""
    words = logits.shape[1]
    log_p = logits.sub_(normaliser[:, None])
    if grad_entropy is None:
        gradient = log_p.exp_().mul_(-grad_logprobs[:, None])
    else:
        p = log_p.exp()
        # -p (g + e (log p + H)) for gradients g of the log-probability and e of the entropy
        inner = log_p.mul_(grad_entropy[:, None]).add_((grad_logprobs + grad_entropy * entropy)[:, None])
        gradient = inner.mul_(p).neg_()
    inside = (targets >= 0) & (targets < words)
    at = targets.clamp(0, words - 1)[:, None]
    at_target = gradient.gather(1, at)[:, 0] + torch.where(inside, grad_logprobs, 0)
    return gradient.scatter_(1, at, at_target[:, None]).to(dtype)
