"""Every algorithm against the definitions: fp64, one completion at a time, no packing, no weights, no masks.

The log-probabilities are the leaves. So what is compared, value and gradient, is all that lies between the models'
outputs and the optimiser: rewards, advantages, loss, corrections, penalty, aggregation, minibatches, ranks, rows.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from memento.config import AlgorithmConfig, RlConfig, override_config
from memento.rl.batch import assemble, sequence_kl
from memento.rl.objective import row_objective
from memento.trajectory import FinishReason, ScoredGroup

DOCS = Path(__file__).resolve().parents[2] / "docs" / "algorithms.md"
ROWS = re.findall(r"^\| ([^|]+) \| `([^`]+)` \|", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
BASE = RlConfig.model_validate({"out": "unused", "model": "unused", "problems": {"arithmetic": {}}})
GROUPS, SIZE, MAX_TOKENS = 8, 3, 40

# Bounds at which every branch is taken, and combinations that no paper has.
MORE = {
    "gspo, wide": "loss=gspo clip_low=0.02 clip_high=0.03 aggregation=group",
    "gspo, token correction": "loss=gspo clip_low=0.02 clip_high=0.03 sampler_correction=tis aggregation=token",
    "overlong": "loss=grpo overlong_buffer_tokens=20 overlong_penalty=0.5",
    "overlong, masked": "loss=cispo overlong_buffer_tokens=20 mask_truncated=true aggregation=sequence",
    "constant, masked": "loss=grpo aggregation=constant aggregation_tokens=100 mask_truncated=true",
    "icepop, narrow": "loss=cispo sampler_correction=icepop sampler_mask_range=[0.9,1.2]",
    "sequence mask alone": "loss=grpo sampler_correction=none sampler_mask=sequence sampler_mask_range=[0.7,1.5]",
    "geometric, narrow": "loss=cispo sampler_mask=geometric sampler_mask_range=[0.97,1.02]",
    "kl k1": "loss=cispo kl_coef=0.1 kl_estimator=k1",
    "kl k2": "loss=grpo kl_coef=0.1 kl_estimator=k2",
    "kl k3": "loss=grpo kl_coef=0.1 kl_estimator=k3",
    "kl k2 in the reward": "loss=grpo kl_in=reward kl_coef=0.1 kl_estimator=k2 advantage_std=group",
    "kl k3 in the reward": "loss=cispo kl_in=reward kl_coef=0.1 kl_estimator=k3 advantage_baseline=leave_one_out",
}
CASES = {name: keys for name, keys in ROWS} | MORE


def config_of(keys: str, ranks: int = 1, tokens: int = 10_000) -> RlConfig:
    overrides = [
        f"groups_per_step={GROUPS}",
        f"group_size={SIZE}",
        f"learner.ranks={ranks}",
        f"learner.micro_batch_tokens={tokens}",
        "learner.minibatches=2",
        *(f"algorithm.{key}" for key in keys.split()),
    ]
    overrides.append(f"sampling.max_tokens={20_480 if 'overlong_buffer_tokens=4096' in keys else MAX_TOKENS}")
    config = override_config(BASE, overrides, "test")
    assert isinstance(config, RlConfig)
    return config


@pytest.fixture(scope="module")
def groups(make) -> list[ScoredGroup]:
    """Ragged groups with forced tokens, truncated completions, and a group of equal scores."""
    made = []
    for g, group in enumerate(make("random_groups", GROUPS, SIZE, seed=1)):
        trajectories = [
            t.model_copy(update={"finish_reason": FinishReason.LENGTH}) if (g + 3 * i) % 5 == 0 else t
            for i, t in enumerate(group.trajectories)
        ]
        scores = [1.0] * SIZE if g == 2 else [float((g + i) % 2) + 0.25 * i for i in range(SIZE)]
        made.append(make("group", trajectories, scores))
    assert any(t.forced for group in made for t in group.trajectories)
    assert any(len(t.completion_ids) > MAX_TOKENS - 20 and not t.truncated for g in made for t in g.trajectories)
    return made


class Policies:
    """Log-probabilities of each completion under each policy, fp64 [prompt + completion]."""

    def __init__(self, groups: list[ScoredGroup]) -> None:
        rng = np.random.default_rng(7)
        self.current: list[torch.Tensor] = []
        self.old: list[torch.Tensor] = []
        self.reference: list[torch.Tensor] = []
        for t in (t for group in groups for t in group.trajectories):
            rollout = np.concatenate([np.zeros(t.prompt_len), t.rollout_logprobs])
            drift = rng.normal(0, 0.03)  # of the completion as a whole, so that sequence ratios leave their bounds
            old = rollout + drift + 0.1 * rng.standard_normal(len(rollout))
            current = old + rng.normal(0, 0.03) + 0.2 * rng.standard_normal(len(rollout))
            self.old.append(torch.from_numpy(old))
            self.current.append(torch.from_numpy(current).requires_grad_())
            self.reference.append(torch.from_numpy(old + 0.3 * rng.standard_normal(len(rollout))))


def kl(estimator: str, d: torch.Tensor) -> torch.Tensor:
    return {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[estimator]


def sampled(t) -> torch.Tensor:
    """Positions of the completion's tokens that were sampled, in the whole sequence."""
    return torch.tensor([t.prompt_len + i for i in range(len(t.completion_ids)) if i not in t.forced])


def plain_advantages(groups: list[ScoredGroup], policies: Policies, config: RlConfig) -> np.ndarray:
    """[groups, samples], from the rewards of the definitions."""
    a = config.algorithm
    rewards = np.array([group.scores for group in groups])
    for g, group in enumerate(groups):
        for i, t in enumerate(group.trajectories):
            at, n = sampled(t), g * SIZE + i
            if a.overlong_buffer_tokens:
                free = config.sampling.max_tokens - a.overlong_buffer_tokens
                over = 1.0 if t.truncated else (len(t.completion_ids) - free) / a.overlong_buffer_tokens
                rewards[g, i] -= a.overlong_penalty * min(max(over, 0.0), 1.0)
            if a.kl_in == "reward":
                distance = policies.old[n][at] - policies.reference[n][at]
                rewards[g, i] -= a.kl_coef * kl(a.kl_estimator, distance).sum().item()
    if a.advantage_baseline == "group":
        centred = rewards - rewards.mean(1, keepdims=True)
    elif a.advantage_baseline == "leave_one_out":
        others = [[np.delete(row, i).mean() for i in range(SIZE)] for row in rewards]
        centred = rewards - np.array(others)
    else:
        centred = rewards - rewards.mean()
    if a.advantage_std == "none":
        return centred
    of = {"batch": rewards.std(ddof=1), "centred": centred.std(ddof=1)}.get(a.advantage_std)
    return centred / ((rewards.std(1, ddof=1, keepdims=True) if of is None else of) + 1e-4)


def plain_tokens(t, n: int, advantage: float, policies: Policies, a: AlgorithmConfig) -> torch.Tensor:
    """[C] loss of each sampled token of one completion."""
    at = sampled(t)
    logprobs, old, reference = (p[n][at] for p in (policies.current, policies.old, policies.reference))
    rollout = torch.tensor(t.rollout_logprobs, dtype=torch.float64)[at - t.prompt_len]
    low, high = 1 - a.clip_low, 1 + a.clip_high
    if a.loss == "cispo":
        loss = -(logprobs - old).exp().clamp(low, high).detach() * advantage * logprobs
    elif a.loss == "grpo":
        ratio = (logprobs - old).exp()
        loss = -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
    else:
        ratio = (logprobs - old).mean().exp()
        if a.sampler_correction == "tis":  # weights that differ within a sequence: GSPO-token
            ratio = ratio.detach() * (logprobs - logprobs.detach()).exp()
        loss = -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage).expand(len(at))
    of_token, of_sequence = (old - rollout).exp(), (old - rollout).sum().exp()
    if a.sampler_correction == "tis":
        loss = loss * of_token.clamp(max=a.sampler_correction_cap)
    elif a.sampler_correction == "icepop":
        assert a.sampler_mask_range is not None
        loss = loss * of_token * ((of_token >= a.sampler_mask_range[0]) & (of_token <= a.sampler_mask_range[1]))
    elif a.sampler_correction == "sequence_tis":
        loss = loss * of_sequence.clamp(max=a.sampler_correction_cap)
    if a.sampler_mask != "none":
        assert a.sampler_mask_range is not None
        ratio = of_sequence if a.sampler_mask == "sequence" else (old - rollout).mean().exp()
        loss = loss * float(a.sampler_mask_range[0] <= ratio <= a.sampler_mask_range[1])
    if a.kl_coef and a.kl_in == "loss":
        loss = loss + a.kl_coef * kl(a.kl_estimator, logprobs - reference)
    return loss


def plain_losses(groups: list[ScoredGroup], policies: Policies, config: RlConfig) -> list[torch.Tensor]:
    """The loss of each minibatch."""
    a, advantages, losses = config.algorithm, plain_advantages(groups, policies, config), []
    for half in (range(GROUPS // 2), range(GROUPS // 2, GROUPS)):
        by_group: list[list[torch.Tensor]] = []
        for g in half:
            kept = [
                plain_tokens(t, g * SIZE + i, float(advantages[g, i]), policies, a)
                for i, t in enumerate(groups[g].trajectories)
                if not (a.mask_truncated and t.truncated)
            ]
            by_group += [kept] if kept else []
        flat = [tokens for kept in by_group for tokens in kept]
        if a.aggregation == "token":
            losses.append(torch.cat(flat).mean())
        elif a.aggregation == "sequence":
            losses.append(torch.stack([tokens.mean() for tokens in flat]).mean())
        elif a.aggregation == "group":
            losses.append(torch.stack([torch.cat(kept).mean() for kept in by_group]).mean())
        else:
            length = a.aggregation_tokens or config.sampling.max_tokens
            losses.append(torch.cat(flat).sum() / (len(half) * SIZE * length))
    return losses


def packed(of_sequence: list[torch.Tensor], batch) -> list[list[list[torch.Tensor]]]:
    """[T] of each row from what belongs to each completion; a row without work gets zeros."""
    return [
        [
            [
                torch.cat([of_sequence[i] for i in members]) if members else torch.zeros(row.tokens).double()
                for row, members in zip(rows, of_rank, strict=True)
            ]
            for rows, of_rank in zip(minibatch.ranks, minibatch.sequences, strict=True)
        ]
        for minibatch in batch.minibatches
    ]


def gradient(losses: list[torch.Tensor], policies: Policies) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(torch.stack(losses).sum(), policies.current, materialize_grads=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("ranks", "tokens"), [(1, 10_000), (2, 100), (3, 1)])
def test_value_and_gradient_are_those_of_the_definition(name, ranks, tokens, groups, fmt):
    config, policies = config_of(CASES[name], ranks, tokens), Policies(groups)
    expected = plain_losses(groups, policies, config)
    wanted = gradient(expected, policies)

    batch = assemble(groups, config, fmt)
    old, reference = packed(policies.old, batch), packed(policies.reference, batch)
    if config.algorithm.kl_in == "reward":
        batch = assemble(groups, config, fmt, sequence_kl(batch, old, reference, config.algorithm.kl_estimator))
    current = packed(policies.current, batch)
    with_penalty = config.algorithm.kl_coef > 0 and config.algorithm.kl_in == "loss"
    losses = []
    for b, minibatch in enumerate(batch.minibatches):
        total = torch.zeros((), dtype=torch.float64)
        for r, rows in enumerate(minibatch.ranks):
            for m, row in enumerate(rows):
                of_row = (current[b][r][m], old[b][r][m], reference[b][r][m] if with_penalty else None)
                total = total + row_objective(row, *of_row, config.algorithm)[0]
        losses.append(total / minibatch.loss_tokens)
    got = gradient(losses, policies)

    assert [loss.item() for loss in losses] == pytest.approx([loss.item() for loss in expected], rel=1e-6, abs=1e-6)
    for ours, plain in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    scale = max(float(plain.abs().max()) for plain in wanted)
    assert max(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True)) < 2e-6 * scale


def fractions(name: str, groups, fmt) -> dict[str, float]:
    config, policies = config_of(CASES[name]), Policies(groups)
    batch = assemble(groups, config, fmt)
    current, old = packed(policies.current, batch), packed(policies.old, batch)
    of_rows = [
        row_objective(minibatch.ranks[0][0], current[b][0][0], old[b][0][0], None, config.algorithm)[1]
        for b, minibatch in enumerate(batch.minibatches)
    ]
    return {key: float(torch.cat([of_row[key] for of_row in of_rows]).double().mean()) for key in of_rows[0]}


def test_the_cases_take_every_branch(groups, fmt):
    for name in ("GRPO", "gspo, wide"):
        seen = fractions(name, groups, fmt)
        assert 0 < seen["clip_low"] < 1 and 0 < seen["clip_high"] < 1, name
    for name in ("icepop, narrow", "sequence mask alone", "geometric, narrow"):
        assert 0 < fractions(name, groups, fmt)["mismatch/masked"] < 1, name
    assert "mismatch/masked" not in fractions("GRPO", groups, fmt)
    assert "mismatch/weight" not in fractions("none", groups, fmt)


@pytest.mark.parametrize("keys", [keys for _, keys in ROWS], ids=[name for name, _ in ROWS])
def test_every_row_of_the_tables_loads(keys):
    values, defaults = config_of(keys).algorithm, AlgorithmConfig()
    changed = {name for name in AlgorithmConfig.model_fields if getattr(values, name) != getattr(defaults, name)}
    assert changed <= {pair.partition("=")[0] for pair in keys.split()}


def test_the_tables_are_read():
    assert len(ROWS) == 15 and {"GRPO", "DAPO", "GSPO", "RLOO", "REINFORCE++", "IcePop"} <= CASES.keys()
    for _, keys in ROWS:
        assert keys.split()[0].startswith(("loss=", "sampler_correction="))


def test_kl_of_the_wrong_shape_is_refused(groups, fmt):
    with pytest.raises(ValueError, match=r"kl must be \[24\]"):
        assemble(groups, config_of("kl_in=reward kl_coef=0.1"), fmt, torch.zeros(3))
