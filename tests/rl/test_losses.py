"""Losses against numbers computed by hand."""

import math

import pytest
import torch

from memento.rl.losses import (
    MAX_LOG_RATIO,
    POLICY_LOSSES,
    aggregation_weights,
    cispo,
    grpo,
    kl_divergence,
    token_loss,
    truncated_importance_weight,
)

RATIOS = (0.1, 1.0, 5.0)


def at_ratio(ratio: float, advantage: float, loss):
    logprob = torch.tensor([-1.0], requires_grad=True)
    terms = loss(logprob, torch.tensor([-1.0 - math.log(ratio)]), torch.tensor([advantage]), 0.2, 0.3)
    terms.loss_N.sum().backward()
    assert logprob.grad is not None
    return terms, logprob.grad.item()


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(("ratio", "weight"), list(zip(RATIOS, (0.8, 1.0, 1.3), strict=True)))
def test_cispo_bounds_are_distances_from_one(ratio: float, weight: float, advantage: float):
    terms, gradient = at_ratio(ratio, advantage, cispo)
    assert terms.loss_N.item() == pytest.approx(-weight * advantage * -1.0, rel=1e-5)
    assert gradient == pytest.approx(-weight * advantage, rel=1e-5)  # the weight is a constant to the gradient
    assert terms.ratio_N.item() == pytest.approx(ratio, rel=1e-5)
    assert (terms.clipped_low_N.item(), terms.clipped_high_N.item()) == (ratio == 0.1, ratio == 5.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (0.1, 2.0, -0.2, -0.2, (False, False)),  # -r A, and d/dlogp of it: -r A
        (1.0, 2.0, -2.0, -2.0, (False, False)),
        (5.0, 2.0, -2.6, 0.0, (False, True)),  # already likelier: no further gradient
        (0.1, -2.0, 1.6, 0.0, (True, False)),  # already less likely
        (1.0, -2.0, 2.0, 2.0, (False, False)),
        (5.0, -2.0, 10.0, 10.0, (False, False)),  # the pessimistic side is not clipped
    ],
)
def test_grpo_by_hand(ratio: float, advantage: float, loss: float, gradient: float, clipped: tuple[bool, bool]):
    terms, got = at_ratio(ratio, advantage, grpo)
    assert terms.loss_N.item() == pytest.approx(loss, rel=1e-5)
    assert got == pytest.approx(gradient, rel=1e-5)
    assert (terms.clipped_low_N.item(), terms.clipped_high_N.item()) == clipped


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_on_policy_every_loss_is_reinforce(name: str):
    logprobs = torch.tensor([-0.3, -2.0, -7.0], requires_grad=True)
    advantages = torch.tensor([1.0, -0.5, 0.25])
    terms = POLICY_LOSSES[name](logprobs, logprobs.detach(), advantages, 0.2, 0.2)
    terms.loss_N.sum().backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -advantages)
    assert terms.ratio_N.tolist() == [1.0, 1.0, 1.0]
    assert not (terms.clipped_low_N | terms.clipped_high_N).any()


def test_kl_estimators_by_hand():
    logprobs, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])  # d = 0.5, -1
    expected = {"k1": [0.5, -1.0], "k2": [0.125, 0.5], "k3": [math.exp(-0.5) - 1 + 0.5, math.e - 1 - 1]}
    for estimator, values in expected.items():
        torch.testing.assert_close(kl_divergence(logprobs, reference, estimator), torch.tensor(values))
    assert kl_divergence(logprobs, logprobs).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_divergence(logprobs, reference, "k4")


def test_kl_of_an_impossible_token_is_finite():
    value = kl_divergence(torch.tensor([-500.0]), torch.tensor([0.0]), "k3")
    assert value.item() == pytest.approx(math.exp(MAX_LOG_RATIO), rel=1e-5)


def test_k3_is_unbiased():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    exact = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * kl_divergence(p.log(), q.log(), "k3")).sum(), exact)
    torch.testing.assert_close((p * kl_divergence(p.log(), q.log(), "k1")).sum(), exact)


def test_truncated_importance_weight_by_hand():
    old, rollout = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True), torch.tensor([-1.0, -3.0, -0.5])
    weight = truncated_importance_weight(old, rollout, cap=2.0)
    torch.testing.assert_close(weight, torch.tensor([1.0, 2.0, math.exp(-0.5)]))
    assert not weight.requires_grad


def test_the_sampler_correction_is_applied_once():
    # current/proximal from the loss times proximal/sampler from the correction is current/sampler.
    logprobs = torch.tensor([-1.0], requires_grad=True)
    old, rollout = torch.tensor([-1.1]), torch.tensor([-1.25])
    terms = cispo(logprobs, old, torch.tensor([1.0]), 0.2, 0.2)
    token_loss(terms, truncated_importance_weight(old, rollout, 2.0)).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(-math.exp(-1.0 + 1.25), rel=1e-5)


def test_token_loss_adds_the_penalty_uncorrected():
    terms = cispo(torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([3.0]), 0.2, 0.2)
    total = token_loss(terms, torch.tensor([2.0]), torch.tensor([5.0]), kl_coef=0.1)
    assert total.item() == pytest.approx(3.0 * 2 + 0.5)


def test_aggregation_weights_by_hand():
    # Group 0: sequences of 1 and 3 tokens. Group 1: one of 2.
    sequences, groups = torch.tensor([0, 1, 1, 1, 2, 2]), torch.tensor([0, 0, 0, 0, 1, 1])
    losses = torch.tensor([6.0, 3.0, 3.0, 3.0, 1.0, 2.0])
    means = {"token": 18 / 6, "sequence": (6 + 3 + 1.5) / 3, "group": (15 / 4 + 1.5) / 2}
    for name, mean in means.items():
        weights = aggregation_weights(sequences, groups, name)
        assert weights.sum().item() == pytest.approx(6)
        assert (losses * weights).sum().item() / 6 == pytest.approx(mean)
    with pytest.raises(ValueError, match="unknown aggregation"):
        aggregation_weights(sequences, groups, "batch")


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\[N\]"):
        cispo(torch.zeros(3), torch.zeros(2), torch.zeros(3), 0.2, 0.2)
