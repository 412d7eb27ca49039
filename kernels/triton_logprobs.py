"""What `memento.kernels.logprobs` does to a tile of logits, in one pass over it: Triton kernels, one program a row."""

# Launches are beyond the type checker.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

WORDS = 2048
"""Logits that a program holds at a time."""


def fold_tile(
    logits: torch.Tensor,
    targets: torch.Tensor,
    top: torch.Tensor,
    total: torch.Tensor,
    weighted: torch.Tensor,
    at_target: torch.Tensor,
) -> None:
    """Fold fp32 logits [t, v] into the statistics [t] of their rows; `targets` count from the tile."""
    _check(logits, _fold)
    _fold[(len(logits),)](logits, targets, top, total, weighted, at_target, logits.shape[1], WORDS=WORDS, num_warps=4)


def turn_tile(
    logits: torch.Tensor,
    targets: torch.Tensor,
    normaliser: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Turn fp32 logits [t, v] into the gradient of the loss in them, as `dtype`."""
    _check(logits, _turn)
    out = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    grid = (len(logits), triton.cdiv(logits.shape[1], WORDS))
    _turn[grid](
        logits, out, targets, normaliser, entropy, grad_logprobs,
        grad_logprobs if grad_entropy is None else grad_entropy, logits.shape[1],
        HAS_ENTROPY=grad_entropy is not None, WORDS=WORDS, num_warps=4,
    )  # fmt: skip
    return out


def _check(logits: torch.Tensor, kernel: object) -> None:
    if logits.dtype != torch.float32:
        raise ValueError(f'implementation "triton" has fp32 logits, got {logits.dtype}')
    if not logits.is_cuda and isinstance(kernel, triton.JITFunction):
        raise ValueError(f'implementation "triton" needs a GPU and the logits are on {logits.device}')


@triton.jit
def _fold(logits, targets, top, total, weighted, at_target, words, WORDS: tl.constexpr):
    """Online softmax over one row: the maximum, the sum of exponentials, and that of exponentials times logits."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * words
    target = tl.load(targets + row)
    high, sum_, mean = tl.load(top + row), tl.load(total + row), tl.load(weighted + row)
    for start in range(0, words, WORDS):
        word = start + tl.arange(0, WORDS)
        x = tl.load(logits + word, mask=word < words, other=float("-inf"))
        higher = tl.maximum(high, tl.max(x, 0))
        moved = high - higher
        x -= higher
        e = tl.exp(x)
        mean = (mean + moved * sum_) * tl.exp(moved) + tl.sum(tl.where(word < words, e * x, 0.0), 0)
        sum_ = sum_ * tl.exp(moved) + tl.sum(e, 0)
        high = higher
    tl.store(top + row, high)
    tl.store(total + row, sum_)
    tl.store(weighted + row, mean)
    if (target >= 0) & (target < words):
        tl.store(at_target + row, tl.load(logits + target))


@triton.jit
def _turn(
    logits, out, targets, normaliser, entropy, grad_logprobs, grad_entropy, words,
    HAS_ENTROPY: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    at = row.to(tl.int64) * words + word
    log_p = tl.load(logits + at, mask=word < words, other=float("-inf")) - tl.load(normaliser + row)
    p = tl.exp(log_p)
    g = tl.load(grad_logprobs + row)
    gradient = tl.where(word == tl.load(targets + row), g, 0.0) - g * p
    if HAS_ENTROPY:
        gradient -= tl.load(grad_entropy + row) * p * (log_p + tl.load(entropy + row))
    tl.store(out + at, gradient.to(out.dtype.element_ty), mask=word < words)
