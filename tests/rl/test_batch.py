"""Packing: what reaches the learner, and what is refused."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memento.format import NEVER
from memento.rl.batch import BatchError, assemble, pack
from memento.rl.metrics import rollout_metrics
from memento.trajectory import FinishReason


def rows(batch):
    return [row for minibatch in batch.minibatches for rank in minibatch.ranks for row in rank]


def test_one_row_by_hand(make, fmt):
    # p B x E S m Z a: x leaves when a is computed. The E of the first sample was written by the cap.
    first = make("trajectory", [9], [1, 7, 2, 3, 8, 4, 5], forced=(2,))
    second = make("trajectory", [9], [1, 7, 2, 3, 8, 4, 6], sample=1)
    batch = assemble([make("group", [first, second], [1.0, 0.0])], make("config", groups_per_step=1), fmt)
    (row,) = rows(batch)
    assert row.token_ids.tolist() == [9, 1, 7, 2, 3, 8, 4, 5, 9, 1, 7, 2, 3, 8, 4, 6]
    assert row.positions.tolist() == [*range(8), *range(8)]
    assert row.document.tolist() == [0] * 8 + [1] * 8
    until = [NEVER] * 16
    until[2], until[10] = 7, 15
    assert row.visible_until.tolist() == until
    assert row.sampled_mask.tolist() == [False, True, True, False, *[True] * 4, False, *[True] * 7]
    assert torch.equal(row.loss_mask, row.sampled_mask)
    assert row.rollout_logprobs.isnan().tolist() == [True] + [False] * 7 + [True] + [False] * 7
    # batch std of (1, 0), ddof 1, is sqrt(1/2); the group's 13 loss tokens share its weight, so each weighs 1.
    advantage = 0.5 / (0.5**0.5 + 1e-4)
    assert row.advantages[:8].tolist() == pytest.approx([0, advantage, advantage, 0, *[advantage] * 4])
    assert row.advantages[8:].tolist() == pytest.approx([0, *[-advantage] * 7])
    assert row.loss_weights[row.loss_mask].tolist() == pytest.approx([1.0] * 13)
    assert batch.minibatches[0].loss_tokens == 13 and batch.tokens == 16


@pytest.mark.parametrize("aggregation", ["token", "sequence", "group"])
@pytest.mark.parametrize(("ranks", "tokens"), [(1, 10_000), (1, 64), (2, 100), (3, 1)])
def test_packing_changes_nothing_but_the_place(make, fmt, ranks, tokens, aggregation):
    groups = make("random_groups", 6, 3)
    learner = {"ranks": ranks, "micro_batch_tokens": tokens, "minibatches": 2}
    config = make("config", group_size=3, groups_per_step=6, learner=learner, algorithm={"aggregation": aggregation})
    batch = assemble(groups, config, fmt)
    seen = []
    for i, minibatch in enumerate(batch.minibatches):
        assert len({len(rank) for rank in minibatch.ranks}) == 1
        of_minibatch = [row for rank in minibatch.ranks for row in rank]
        assert minibatch.loss_tokens == sum(int(row.loss_mask.sum()) for row in of_minibatch)
        assert sum(float(row.loss_weights.sum()) for row in of_minibatch) == pytest.approx(minibatch.loss_tokens)
        for row in of_minibatch:
            documents = int(row.document[-1]) + 1
            assert row.tokens <= tokens or documents == 1
            assert (row.visible_until[row.visible_until != NEVER] <= row.tokens).all()
            for d in range(documents):
                if row.sampled_mask[row.document == d].any():
                    seen.append((i, row.token_ids[row.document == d].tolist()))
    expected = [(g // 3, list(t.token_ids)) for g, group in enumerate(groups) for t in group.trajectories]
    assert sorted(seen) == sorted(expected)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 60),
    st.integers(1, 4),
)
def test_pack_properties(lengths, capacity, ranks):
    plan = pack(lengths, capacity, ranks)
    assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1
    placed = sorted(i for rank in plan for row in rank for i in row)
    assert placed == list(range(len(lengths)))
    for row in (row for rank in plan for row in rank):
        assert len(row) <= 1 or sum(lengths[i] for i in row) <= capacity
    # First-fit decreasing needs at most 11/9 of the optimum + 1, the rounding adds less than a row a rank.
    fitting = [n for n in lengths if n <= capacity]
    bound = 2 * sum(fitting) / capacity + 1 + (len(lengths) - len(fitting)) + ranks
    assert sum(len(rank) for rank in plan) <= bound


def test_work_is_balanced_over_ranks():
    plan = pack([100, 90, 80, 70, 60, 50, 40, 30, 20, 10], capacity=150, ranks=2)
    lengths = [100, 90, 80, 70, 60, 50, 40, 30, 20, 10]
    work = [sum(lengths[i] for row in rank for i in row) for rank in plan]
    assert abs(work[0] - work[1]) <= 20


def test_truncated_samples_leave_the_denominator(make, fmt):
    cut = make("trajectory", [9], [5, 6, 7], finish_reason=FinishReason.LENGTH)
    whole = make("trajectory", [9], [5, 0], sample=1)
    group = make("group", [cut, whole], [0.0, 1.0])
    keep = assemble([group], make("config", groups_per_step=1), fmt)
    drop = assemble([group], make("config", groups_per_step=1, algorithm={"mask_truncated": True}), fmt)
    assert keep.minibatches[0].loss_tokens == 5 and drop.minibatches[0].loss_tokens == 2
    (row,) = rows(drop)
    assert row.loss_weights.sum().item() == pytest.approx(2)
    assert int(row.sampled_mask.sum()) == 5  # still compared with the sampler
    # The advantage of the other sample still counts the truncated one as a failure.
    assert row.advantages[row.loss_mask][0].item() == pytest.approx(0.5 / (0.5**0.5 + 1e-4))
    everything = make("group", [cut, cut], [0.0, 0.0])
    empty = assemble([everything], make("config", groups_per_step=1, algorithm={"mask_truncated": True}), fmt)
    assert empty.minibatches[0].loss_tokens == 0


def test_a_rollout_without_eviction_is_trained_without_it(make, fmt):
    t = make("trajectory", [9], [1, 7, 2, 3, 8, 4, 5], evict=False)
    batch = assemble([make("group", [t, t], [1.0, 0.0])], make("config", groups_per_step=1), fmt)
    assert (rows(batch)[0].visible_until == NEVER).all()


def test_what_must_not_reach_the_loss(make, fmt):
    good = make("trajectory")
    config = make("config", groups_per_step=1)

    def refused(match, trajectories, scores=(1.0, 0.0), config=config):
        with pytest.raises(BatchError, match=match):
            assemble([make("group", trajectories, scores)], config, fmt)

    refused("incomplete.*verifier_error", [good, good], (1.0, None))
    refused("1 samples, group_size is 2", [good], (1.0,))
    refused("aborted", [good, make("trajectory", finish_reason=FinishReason.ABORT)])
    refused("temperature 0.6", [good, make("trajectory", temperature=0.6)])
    refused(r"rollout_logprobs\[1\] is nan", [good, make("trajectory", rollout_logprobs=(-1.0, float("nan"), -1.0))])
    refused("outside", [good, make("trajectory", forced=(3,))])
    refused("1 groups cannot fill 2", [good, good], config=make("config", learner={"minibatches": 2}))


def test_the_end_token_is_trained_whatever_it_also_means(make, fmt):
    # 0 ends the completions, as it does where a tokenizer pads with its end token; it also stands inside of one.
    first, second = make("trajectory", [0, 9], [5, 0, 6, 0]), make("trajectory", [0, 9], [7, 0], sample=1)
    batch = assemble([make("group", [first, second], [1.0, 0.0])], make("config", groups_per_step=1), fmt)
    (row,) = rows(batch)
    assert row.token_ids[row.loss_mask].tolist() == [5, 0, 6, 0, 7, 0] and batch.minibatches[0].loss_tokens == 6


def test_a_batch_pickles(make, fmt):
    batch = assemble(make("random_groups", 2, 2), make("config"), fmt)
    copy = pickle.loads(pickle.dumps(batch))
    for a, b in zip(rows(batch), rows(copy), strict=True):
        assert torch.equal(a.visible_until, b.visible_until) and torch.equal(a.loss_weights, b.loss_weights)


def test_rollout_metrics_by_hand(make, fmt):
    # p B x y E S m Z a 0: resident 1..8, then two tokens leave: 7, 8. Without eviction 1..10.
    trace = make("trajectory", [9], [1, 7, 7, 2, 3, 8, 4, 5, 0])
    broken = make("trajectory", [9], [1, 7, 1, 7, 2], sample=1, forced=(4,))
    cut = make("trajectory", [9], [1, 7], "1/p", finish_reason=FinishReason.LENGTH, weight_versions=((0, 2, 3),))
    groups = [make("group", [trace, broken], [1.0, 0.0]), make("group", [cut, cut], [0.0, 0.0])]
    metrics = rollout_metrics(groups, fmt, version=4)
    assert metrics["reward/mean"] == 0.25 and metrics["reward/zero_std_fraction"] == 0.5
    assert metrics["outcome/correct"] == 0.25 and metrics["outcome/timeout"] == 0
    assert metrics["memento/blocks_per_trace"] == 0.25
    assert (metrics["memento/block_tokens"], metrics["memento/memento_tokens"]) == (2, 1)
    assert metrics["memento/compression"] == 2
    assert metrics["memento/malformed_rate"] == 0.25 and metrics["memento/forced_rate"] == 0.25
    assert metrics["length/truncated_fraction"] == 0.5 and metrics["length/completion_max"] == 9
    assert metrics["kv/peak_tokens"] == (8 + 6 + 3 + 3) / 4
    assert metrics["kv/peak_ratio"] == pytest.approx((10 + 6 + 3 + 3) / (8 + 6 + 3 + 3))
    full, evicted = sum(range(2, 11)), sum(range(2, 9)) + 7 + 8
    rest = sum(range(2, 7)) + 2 * (2 + 3)
    assert metrics["kv/area_ratio"] == pytest.approx((full + rest) / (evicted + rest))
    assert metrics["lag/max"] == 4 and metrics["lag/mean"] == (4 + 4 + 1 + 1) / 4
    assert rollout_metrics([], fmt) == {}


def test_a_group_without_scores_gives_no_reward_metric(make, fmt):
    t = make("trajectory")
    metrics = rollout_metrics([make("group", [t, t], [None, None])], fmt)
    assert "reward/mean" not in metrics and metrics["outcome/verifier_error"] == 1
