"""Log-probabilities by tiles against a plain log-softmax in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from memento.kernels import linear_logprobs
from memento.kernels.logprobs import logits_logprobs

TOKENS, WIDTH, WORDS = 21, 6, 17


def inputs(dtype: torch.dtype = torch.float32, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) * spread for n in (TOKENS, WORDS))
    targets = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), targets


def errors(
    dtype: torch.dtype, temperature: float = 1.0, chunks: tuple[int, int] = (8, 5), spread: float = 1.0
) -> list[float]:
    """Relative, of log-probabilities, entropies, and the gradients of hidden states and head."""
    hidden, head, targets = inputs(dtype, spread)
    weight = torch.randn(2, TOKENS, generator=torch.Generator().manual_seed(1))
    results = []
    for leaves in ((hidden, head), (hidden.detach().double(), head.detach().double())):
        h, w = (x.requires_grad_() for x in leaves)
        if h.dtype == dtype:
            out = linear_logprobs(h, w, targets, temperature, *chunks)
        else:
            out = logits_logprobs(h @ w.T, targets, temperature)
        results.append((*out, *torch.autograd.grad((torch.stack(out) * weight).sum(), (h, w))))
    return [float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("chunks", [(1, 1), (8, 5), (21, 17), (5, 17), (100, 100)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_are_those_of_log_softmax(chunks: tuple[int, int], temperature: float) -> None:
    assert max(errors(torch.float32, temperature, chunks)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_exact_but_for_its_results(dtype: torch.dtype) -> None:
    logprobs, entropy, *gradients = errors(dtype, 0.7)
    assert max(logprobs, entropy) < 1e-5, "logits are never rounded to the dtype of the inputs"
    assert max(gradients) < 1e-2


def test_large_logits_do_not_overflow_or_cancel() -> None:
    # fp32 logits of about 2,000 are 1e-4 apart, and that is all that may be lost.
    assert max(errors(torch.float32, spread=30.0)[:2]) < 2e-4
    hidden, head, targets = inputs(spread=1e4)
    out = linear_logprobs(hidden, head, targets, 1.0, 8, 5)
    assert all(torch.isfinite(x).all() for x in out)
    assert (out[1] >= 0).all()


def test_gradcheck() -> None:
    hidden, head, targets = inputs(torch.float64)
    torch.autograd.gradcheck(lambda h, w: linear_logprobs(h, w, targets, 0.8, 8, 5), (hidden, head))
    torch.autograd.gradcheck(lambda h, w: linear_logprobs(h, w, targets, 0.8, 8, 5)[1], (hidden, head))


def test_a_tied_head_gets_both_gradients() -> None:
    _, head, targets = inputs(torch.float64)
    ids = torch.arange(TOKENS) % WORDS
    tied = torch.autograd.grad(linear_logprobs(head[ids].tanh(), head, targets, 0.7, 8, 5)[0].sum(), head)
    plain = torch.autograd.grad(logits_logprobs(head[ids].tanh() @ head.T, targets, 0.7)[0].sum(), head)
    assert torch.allclose(tied[0], plain[0])


def test_only_what_is_asked_for_is_computed() -> None:
    hidden, head, targets = inputs()
    both = torch.autograd.grad(linear_logprobs(hidden, head, targets, 0.7, 8, 5)[0].sum(), (hidden, head))
    (alone,) = torch.autograd.grad(linear_logprobs(hidden, head.detach(), targets, 0.7, 8, 5)[0].sum(), hidden)
    (other,) = torch.autograd.grad(linear_logprobs(hidden.detach(), head, targets, 0.7, 8, 5)[0].sum(), head)
    assert torch.equal(both[0], alone)
    assert torch.equal(both[1], other)
    with torch.no_grad():
        assert not linear_logprobs(hidden, head, targets)[0].requires_grad


def test_the_same_in_every_run_and_under_checkpointing() -> None:
    hidden, head, targets = inputs()

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.stack(linear_logprobs(h, w, targets, 0.7, 8, 5)).square().sum()

    results = [torch.autograd.grad(loss(hidden, head), (hidden, head)) for _ in range(2)]
    saved: Any = checkpoint(loss, hidden, head, use_reentrant=False)
    for a, b, c in zip(*results, torch.autograd.grad(saved, (hidden, head)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_is_larger_than_a_tile_or_a_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 4, generator=generator, requires_grad=True) for n in (300, 500))
    with Largest() as seen:
        logprobs, entropy = linear_logprobs(hidden, head, torch.arange(300), 0.7, 50, 60)
        (logprobs.sum() + entropy.sum()).backward()
    assert 0 < seen.elements <= 50 * 60


def test_autocast_multiplies_in_its_dtype_and_sums_in_fp32() -> None:
    hidden, head, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropy = linear_logprobs(hidden, head, targets)
    expected = linear_logprobs(hidden.bfloat16(), head.bfloat16(), targets)
    assert torch.equal(logprobs, expected[0])
    assert torch.equal(entropy, expected[1])
    assert logprobs.dtype == entropy.dtype == torch.float32
    logprobs.sum().backward()
    assert head.grad is not None
    assert head.grad.dtype == torch.float32


def test_bad_arguments_are_refused() -> None:
    hidden, head, targets = inputs()
    with pytest.raises(ValueError, match="temperature must be > 0"):
        linear_logprobs(hidden, head, targets, 0.0)
    with pytest.raises(ValueError, match=r"targets must be \[21\]"):
        linear_logprobs(hidden, head, targets[:-1])
    with pytest.raises(ValueError, match="chunks must hold at least 1"):
        linear_logprobs(hidden, head, targets, chunk_tokens=0)
    with pytest.raises(ValueError, match="must be of one dtype"):
        linear_logprobs(hidden, head.bfloat16(), targets)
    with pytest.raises(ValueError, match="unknown implementation 'nope'"):
        linear_logprobs(hidden, head, targets, implementation="nope")
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="needs a GPU"):
        linear_logprobs(hidden, head, targets, implementation="triton")
