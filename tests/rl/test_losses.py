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
    gspo,
    kl_divergence,
    masked_importance_weight,
    sequence_importance_weight,
    sequence_log_ratio,
    sequence_mask,
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


def test_cispo_without_width_is_reinforce():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    cispo(logprobs, torch.tensor([-3.0, -1.0]), torch.tensor([0.5, -2.0]), 0.0, 0.0).loss_N.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-0.5, 2.0]


def test_gspo_by_hand():
    # Three sequences, their tokens in disorder. Mean log-ratios: (0.2 + 0.4) / 2, -0.1, (-0.9 + 0.1) / 2.
    sequences = torch.tensor([7, 1, 7, 3, 3])
    logprobs = torch.tensor([-0.8, -1.1, -0.6, -1.9, -0.9], requires_grad=True)
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0])
    advantages = torch.tensor([2.0, -1.0, 2.0, 3.0, 3.0])
    terms = gspo(logprobs, old, advantages, 0.2, 0.3, sequences)
    terms.loss_N.sum().backward()
    above, near, below = math.exp(0.3), math.exp(-0.1), math.exp(-0.4)  # 1.35, 0.90, 0.67
    assert terms.ratio_N.tolist() == pytest.approx([above, near, above, below, below], rel=1e-5)
    assert terms.loss_N.tolist() == pytest.approx([-2.6, near, -2.6, -3 * below, -3 * below], rel=1e-5)
    assert logprobs.grad is not None  # below its bound with a positive advantage: the pessimistic side is not clipped
    assert logprobs.grad.tolist() == pytest.approx([0.0, near, 0.0, -3 * below, -3 * below], rel=1e-5)
    assert terms.clipped_high_N.tolist() == [True, False, True, False, False]
    assert not terms.clipped_low_N.any()


def test_gspo_is_equation_5():
    # The mean over sequences of -min(s A, clip(s) A), s = exp(mean log-ratio), differentiated as it stands.
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 9, 3]
    sequences = torch.arange(4).repeat_interleave(torch.tensor(lengths))
    old = -torch.rand(18, generator=generator, dtype=torch.float64)
    noise = torch.randn(18, generator=generator, dtype=torch.float64)
    ours, plain = ((old + 0.3 * noise).requires_grad_() for _ in range(2))
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0], dtype=torch.float64)
    weights = aggregation_weights(sequences, sequences, "sequence")
    loss = (gspo(ours, old, advantages[sequences], 0.1, 0.1, sequences).loss_N * weights).sum() / 18
    loss.backward()
    ratios = torch.stack([(a - b).mean().exp() for a, b in zip(plain.split(lengths), old.split(lengths), strict=True)])
    expected = -torch.minimum(ratios * advantages, ratios.clamp(0.9, 1.1) * advantages).mean()
    expected.backward()
    assert 0 < ((ratios < 0.9) | (ratios > 1.1)).sum() < 4  # both branches
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_on_policy_every_loss_is_reinforce(name: str):
    logprobs = torch.tensor([-0.3, -2.0, -7.0], requires_grad=True)
    advantages = torch.tensor([1.0, -0.5, 0.25])
    terms = POLICY_LOSSES[name](logprobs, logprobs.detach(), advantages, 0.2, 0.2, torch.tensor([4, 4, 2]))
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


def test_icepop_by_hand():
    old, rollout = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True), torch.tensor([-1.2, -3.0, -0.2])
    weight = masked_importance_weight(old, rollout, 0.5, 5.0)  # ratios e^0.2, e^2 = 7.4, e^-0.8 = 0.45
    torch.testing.assert_close(weight, torch.tensor([math.exp(0.2), 0.0, 0.0]))
    assert not weight.requires_grad


def test_sequence_weights_and_masks_by_hand():
    sequences = torch.tensor([0, 1, 0, 2])
    rollout = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    old = torch.tensor([-0.7, -1.4, -0.5, -0.9], requires_grad=True)  # summed log-ratios 0.8, -0.4, 0.1
    torch.testing.assert_close(
        sequence_log_ratio(old, rollout, sequences, mean=False), torch.tensor([0.8, -0.4, 0.8, 0.1])
    )
    torch.testing.assert_close(
        sequence_importance_weight(old, rollout, sequences, 2.0),  # e^0.8 = 2.2
        torch.tensor([2.0, math.exp(-0.4), 2.0, math.exp(0.1)]),
    )
    masks = {
        False: [0.0, 1.0, 0.0, 1.0],  # e^0.8 = 2.2, e^-0.4 = 0.67, e^0.1 = 1.1
        True: [1.0, 1.0, 1.0, 1.0],  # the first one's mean is 0.4: e^0.4 = 1.5
    }
    for geometric, expected in masks.items():
        mask = sequence_mask(old, rollout, sequences, 0.5, 2.0, geometric=geometric)
        assert mask.tolist() == expected and not mask.requires_grad
    assert sequence_mask(old, rollout, sequences, 0.7, 1.2, geometric=True).tolist() == [0.0, 0.0, 0.0, 1.0]


def test_a_long_sequence_overflows_nothing():
    old, rollout = torch.zeros(10_000), torch.full((10_000,), -1.0)
    sequences = torch.zeros(10_000, dtype=torch.int64)
    assert sequence_log_ratio(old, rollout, sequences, mean=False)[0] == MAX_LOG_RATIO
    assert sequence_log_ratio(old, rollout, sequences, mean=True)[0] == 1.0
    assert gspo(torch.zeros(0), torch.zeros(0), torch.zeros(0), 0.1, 0.1, sequences[:0]).loss_N.shape == (0,)


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
    # Constant: 3 sequences x 10 tokens, whatever their lengths are.
    weights = aggregation_weights(sequences, groups, "constant", constant=30)
    assert (losses * weights).sum().item() / 6 == pytest.approx(18 / 30)
    with pytest.raises(ValueError, match="needs a constant"):
        aggregation_weights(sequences, groups, "constant")
    with pytest.raises(ValueError, match="unknown aggregation"):
        aggregation_weights(sequences, groups, "batch")


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\[N\]"):
        cispo(torch.zeros(3), torch.zeros(2), torch.zeros(3), 0.2, 0.2)
    with pytest.raises(ValueError, match=r"\[N\]"):
        gspo(torch.zeros(3), torch.zeros(3), torch.zeros(3), 0.2, 0.2, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[N\]"):
        sequence_mask(
            torch.zeros(3), torch.zeros(3), torch.zeros(1, dtype=torch.int64), low=0.5, high=2.0, geometric=True
        )
