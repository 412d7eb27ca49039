"""Chunked log-probabilities against a plain log-softmax."""

from __future__ import annotations

import pytest
import torch

from memento.kernels import linear_logprobs


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(21, 6, generator=generator, dtype=dtype, requires_grad=True)
    head = torch.randn(17, 6, generator=generator, dtype=dtype, requires_grad=True)
    return hidden, head, torch.randint(0, 17, (21,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 8, 21, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_are_those_of_log_softmax(chunk: int, temperature: float) -> None:
    hidden, head, targets = inputs()
    full = (hidden @ head.T / temperature).log_softmax(-1)
    plain = full.gather(-1, targets[:, None])[:, 0], -(full.exp() * full).sum(-1)
    ours = linear_logprobs(hidden, head, targets, temperature, chunk)
    weight = torch.randn(2, 21, generator=torch.Generator().manual_seed(1))
    for a, b in zip(plain, ours, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    expected = torch.autograd.grad((torch.stack(plain) * weight).sum(), (hidden, head))
    got = torch.autograd.grad((torch.stack(ours) * weight).sum(), (hidden, head))
    for a, b in zip(expected, got, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_gradcheck() -> None:
    hidden, head, targets = inputs(torch.float64)
    torch.autograd.gradcheck(lambda h, w: linear_logprobs(h, w, targets, 0.8, 8), (hidden, head))


def test_no_tensor_of_all_logits_is_kept_for_backward() -> None:
    hidden, head, targets = inputs()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        logprobs, _ = linear_logprobs(hidden, head, targets, chunk_tokens=4)
        logprobs.sum()
    assert max(kept, default=0) < 4 * 17 * 2


def test_bf16_input_is_normalised_in_fp32() -> None:
    hidden, head, targets = inputs()
    logprobs, entropy = linear_logprobs(hidden.bfloat16(), head.bfloat16(), targets)
    assert logprobs.dtype == entropy.dtype == torch.float32


def test_bad_arguments_are_refused() -> None:
    hidden, head, targets = inputs()
    with pytest.raises(ValueError, match="temperature must be > 0"):
        linear_logprobs(hidden, head, targets, 0.0)
    with pytest.raises(ValueError, match=r"targets must be \[21\]"):
        linear_logprobs(hidden, head, targets[:-1])
