"""Advantages: golden vectors computed by hand, and the degenerate groups."""

import math

import pytest
import torch

from memento.rl.advantages import group_advantages, overlong_penalty

REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
CENTRED = torch.tensor([2 / 3, -1 / 3, -1 / 3, 1 / 3, 1 / 3, -2 / 3])


def test_golden_vectors():
    # Batch: mean 1/2, squared deviations 6 x 1/4, ddof 1 -> sqrt(1.5 / 5). Each group: mean 1/3 or 2/3,
    # squared deviations 4/9 + 1/9 + 1/9 = 2/3, ddof 1 -> sqrt(1/3). eps is 1e-4.
    for std, divisor in {"batch": math.sqrt(0.3) + 1e-4, "group": math.sqrt(1 / 3) + 1e-4, "none": 1.0}.items():
        torch.testing.assert_close(group_advantages(REWARDS, GROUPS, std), CENTRED / divisor, rtol=0, atol=1e-6)


def test_golden_vectors_of_rloo():
    # The mean of the two others: (1 - 0, 0 - 1/2, 0 - 1/2) and (1 - 1/2, 1 - 1/2, 0 - 1).
    expected = torch.tensor([1.0, -0.5, -0.5, 0.5, 0.5, -1.0])
    got = group_advantages(REWARDS, GROUPS, "none", baseline="leave_one_out")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_golden_vectors_of_reinforce_plus_plus():
    # Mean 1/2, standard deviation sqrt(6 x 1/4 / 5), eps 1e-4.
    got = group_advantages(REWARDS, GROUPS, "batch", baseline="batch")
    torch.testing.assert_close(got, (REWARDS - 0.5) / (math.sqrt(0.3) + 1e-4), rtol=0, atol=1e-6)
    # With the group as baseline: what is left has mean 0 and squared deviations 2 x 2/3, over 5.
    got = group_advantages(REWARDS, GROUPS, "centred")
    torch.testing.assert_close(got, CENTRED / (math.sqrt(4 / 15) + 1e-4), rtol=0, atol=1e-6)


def test_the_batch_as_baseline_has_no_groups():
    for std in ("batch", "centred", "none"):
        first = group_advantages(REWARDS, GROUPS, std, baseline="batch")
        torch.testing.assert_close(first, group_advantages(REWARDS, torch.arange(6), std, baseline="batch"))
        assert group_advantages(torch.full((6,), 0.1), GROUPS, std, baseline="batch").tolist() == [0.0] * 6
        assert group_advantages(torch.tensor([1.0]), torch.tensor([0]), std, baseline="batch").tolist() == [0.0]


@pytest.mark.parametrize("std", ["batch", "centred", "group", "none"])
def test_leave_one_out_of_equal_rewards_and_of_one_is_zero(std: str):
    rewards = torch.tensor([0.1, 0.1, 0.1, 1.0, 0.0, 0.5])
    assert group_advantages(rewards, GROUPS, std, baseline="leave_one_out")[:3].tolist() == [0.0] * 3
    groups = torch.tensor([0, 1, 1])
    assert group_advantages(torch.tensor([1.0, 1.0, 0.0]), groups, std, baseline="leave_one_out")[0] == 0


def test_overlong_penalty_by_hand():
    lengths = torch.tensor([10, 80, 85, 100, 120, 40])
    truncated = torch.tensor([False, False, False, False, False, True])
    # max 100, buffer 20: free up to 80, then a twentieth a token; a truncated one pays whatever cut it.
    assert overlong_penalty(lengths, truncated, 100, 20).tolist() == [0.0, 0.0, -0.25, -1.0, -1.0, -1.0]
    with pytest.raises(ValueError, match=r"buffer_tokens must be in \[1, 100\]"):
        overlong_penalty(lengths, truncated, 100, 0)
    with pytest.raises(ValueError, match=r"\[N\]"):
        overlong_penalty(lengths, truncated[:2], 100, 20)


@pytest.mark.parametrize("std", ["batch", "group", "none"])
def test_equal_rewards_are_exactly_zero(std: str):
    # 0.1 + 0.1 + 0.1 is not 0.3: the mean differs from its members in the last bit.
    rewards = torch.tensor([0.1, 0.1, 0.1, 1.0, 0.0, 0.5])
    advantages = group_advantages(rewards, GROUPS, std)
    assert advantages[:3].tolist() == [0.0, 0.0, 0.0]
    assert (advantages[3:] != 0).sum() == 2  # the mean reward of its group has advantage 0
    assert group_advantages(torch.full((6,), 0.7), GROUPS, std).tolist() == [0.0] * 6


@pytest.mark.parametrize("std", ["batch", "group", "none"])
def test_a_group_of_one_is_zero(std: str):
    assert group_advantages(torch.tensor([1.0]), torch.tensor([0]), std).tolist() == [0.0]
    assert group_advantages(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0, 1, 1]), std)[0] == 0


def test_order_and_ids_of_groups_do_not_matter():
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for std in ("batch", "group", "none"):
        shuffled = group_advantages(REWARDS[order], 7 - 3 * GROUPS[order], std)
        torch.testing.assert_close(shuffled, group_advantages(REWARDS, GROUPS, std)[order], rtol=0, atol=1e-7)


def test_bad_input():
    with pytest.raises(ValueError, match="not finite"):
        group_advantages(torch.tensor([1.0, float("nan")]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"\[N\]"):
        group_advantages(REWARDS, GROUPS[:3])
    with pytest.raises(ValueError, match="unknown std"):
        group_advantages(REWARDS, GROUPS, "median")
    with pytest.raises(ValueError, match="unknown baseline"):
        group_advantages(REWARDS, GROUPS, baseline="critic")
    with pytest.raises(ValueError, match="not of a group"):
        group_advantages(REWARDS, GROUPS, "group", baseline="batch")
