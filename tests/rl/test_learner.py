"""The learner on its real parts: Ray actors, DeepSpeed, gloo. A Qwen3 of 30 K parameters, fp32.

Learners take seconds to start, so each configuration is started once and put back to its initial checkpoint by every
test. The optimiser's eps is large on purpose: Adam divides by |gradient|, and with the usual eps a gradient of 1e-12,
which is rounding, would move a weight as far as a real one.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memento.config import AlgorithmConfig, RlConfig, override_config
from memento.errors import UserError
from memento.format import visible_until
from memento.rl import learner_rank
from memento.rl.advantages import group_advantages
from memento.rl.batch import assemble
from memento.rl.export import SHARD_GB, _weights_of_checkpoint
from memento.rl.learner import FAILED_BATCH, Learner, LearnerError, NonFiniteLoss
from memento.rl.learner_rank import LearnerRank
from memento.rl.lora import ExportedTensor
from memento.rollout.channel_records import LOOPBACK, ChannelBroken, ChannelSettings
from memento.rollout.weight_channel import WeightChannel
from memento.rollout.weights import read_weights

TEMPERATURE = 0.7
BASE = {
    "lr": 1e-2,
    "eps": 1e-3,
    "betas": (0.9, 0.95),
    "warmup_steps": 2,
    "max_grad_norm": 0.05,  # small enough to clip
    "dtype": "float32",
    "cpus": 0.5,
    "start_timeout_s": 200,
    "step_timeout_s": 100,
}
LEARNERS = {
    "cispo": {"learner": {"ranks": 1, "zero_stage": 2}, "algorithm": {"loss": "cispo"}},
    "grpo": {
        "learner": {"ranks": 1, "zero_stage": 0, "gradient_checkpointing": True},
        "algorithm": {"loss": "grpo", "kl_coef": 0.1, "aggregation": "sequence", "advantage_std": "group"},
    },
    "two ranks": {"learner": {"ranks": 2, "zero_stage": 2}, "algorithm": {"loss": "cispo"}},
    "sharded": {
        "learner": {"ranks": 2, "zero_stage": 3},
        "algorithm": {"loss": "gspo", "aggregation": "constant", "aggregation_tokens": 20, "advantage_std": "none"},
    },
}
ALGORITHMS = {
    "cispo": "loss=cispo",
    "cispo, icepop": "loss=cispo aggregation=token sampler_correction=icepop sampler_mask_range=[0.8,1.3]",
    "grpo": "loss=grpo advantage_std=group aggregation=sequence kl_coef=0.1",
    "dapo": "loss=grpo clip_high=0.28 advantage_std=group aggregation=token",
    "dr. grpo": "loss=grpo advantage_std=none aggregation=constant aggregation_tokens=20",
    "gspo": "loss=gspo clip_low=0.003 clip_high=0.004 advantage_std=group aggregation=sequence sampler_correction=none",
    "rloo": "loss=cispo clip_low=0 clip_high=0 advantage_baseline=leave_one_out advantage_std=none "
    "aggregation=constant aggregation_tokens=1",
    "reinforce++": "loss=grpo advantage_baseline=batch aggregation=token kl_coef=0.01 kl_estimator=k2",
}
"""What the whole matrix of gradients runs over: every loss, aggregation, baseline and penalty."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("learner")


@pytest.fixture(scope="module")
def model(make, folder) -> Path:
    return make("model", folder / "model")


@pytest.fixture(scope="module")
def config_of(make, folder, model):
    def build(name: str, minibatches: int = 2, micro_batch_tokens: int = 64, groups: int = 4, **learner):
        sections = LEARNERS[name]
        learner = BASE | sections["learner"] | learner
        learner |= {"minibatches": minibatches, "micro_batch_tokens": micro_batch_tokens}
        return make(
            "config",
            folder / "run",
            model=str(model),
            groups_per_step=groups,
            group_size=3,
            sampling={"temperature": TEMPERATURE},
            algorithm=sections["algorithm"],
            learner=learner,
        )

    return build


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=8, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def started(cluster, config_of, folder) -> Iterator[dict[str, Learner]]:
    with ThreadPoolExecutor() as threads:
        learners = dict(zip(LEARNERS, threads.map(lambda name: Learner(config_of(name)), LEARNERS), strict=True))
    for name, learner in learners.items():
        learner.save(folder / "initial" / name)
    yield learners
    for learner in learners.values():
        learner.close()


@pytest.fixture
def learner_of(started, folder):
    def reset(name: str) -> Learner:
        started[name].load(folder / "initial" / name)
        return started[name]

    return reset


@pytest.fixture(scope="module")
def groups(make):
    """Twelve traces of uneven length, with log-probabilities near those of the untrained model (uniform over 416)."""
    made = []
    for group in make("random_groups", 4, 3, seed=3, logprob_noise=0.3):
        trajectories = []
        for t in group.trajectories:
            nearer = tuple(p + math.log(64 / 416) for p in t.rollout_logprobs)
            trajectories.append(t.model_copy(update={"rollout_logprobs": nearer, "temperature": TEMPERATURE}))
        made.append(group.model_copy(update={"trajectories": tuple(trajectories)}))
    assert any(t.forced for group in made for t in group.trajectories)
    assert all(len(set(group.scores)) > 1 for group in made[:2])
    return made


def plain_logprobs(model, trajectory, fmt) -> torch.Tensor:
    """[C] log-probabilities of one completion: one sequence, a dense mask, transformers' own eager attention."""
    ids = torch.tensor(trajectory.token_ids)
    at = torch.arange(len(ids))
    until = torch.from_numpy(visible_until(trajectory.token_ids, fmt, trajectory.prompt_len))
    seen = (at[None] <= at[:, None]) & (at[:, None] < until[None])
    mask = torch.zeros(len(ids), len(ids)).masked_fill(~seen, torch.finfo(torch.float32).min)
    logits = model(ids[None], attention_mask=mask[None, None], position_ids=at[None], use_cache=False).logits[0]
    logprobs = (logits / TEMPERATURE).log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
    return logprobs[trajectory.prompt_len - 1 :]


def plain_step(folder, groups, config, fmt) -> dict[str, torch.Tensor]:
    """One RL step in plain torch, from the definitions: two minibatches, AdamW with warm-up and clipping."""
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    algorithm, learner = config.algorithm, config.learner
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=learner.lr, betas=learner.betas, eps=learner.eps, weight_decay=0.0
    )
    rewards = torch.tensor([s for g in groups for s in g.scores])
    members = torch.arange(len(groups)).repeat_interleave(3)
    advantages = group_advantages(rewards, members, algorithm.advantage_std).view(len(groups), 3)
    with torch.no_grad():
        old = [[plain_logprobs(policy, t, fmt) for t in g.trajectories] for g in groups]
    for step, half in enumerate(([0, 1], [2, 3])):
        group_means, sequence_means, sums = [], [], []
        for g in half:
            tokens = []
            for s, t in enumerate(groups[g].trajectories):
                keep = torch.tensor([i not in t.forced for i in range(len(t.completion_ids))])
                logprobs, before = plain_logprobs(policy, t, fmt)[keep], old[g][s][keep]
                sampler = torch.tensor(t.rollout_logprobs)[keep]
                ratio, advantage = (logprobs - before).exp(), advantages[g, s]
                clipped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
                if algorithm.loss == "gspo":  # its form for weights that differ within a sequence
                    ratio = (logprobs - before).mean().exp().detach() * (logprobs - logprobs.detach()).exp()
                    clipped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
                if algorithm.loss == "cispo":
                    loss = -clipped.detach() * advantage * logprobs
                else:
                    loss = -torch.min(ratio * advantage, clipped * advantage)
                loss = loss * (before - sampler).exp().clamp(max=2.0)
                if algorithm.kl_coef:  # the reference is the initial policy, and so is `before` here
                    loss = loss + algorithm.kl_coef * ((before - logprobs).exp() - 1 - (before - logprobs))
                tokens.append(loss)
                sequence_means.append(loss.mean())
                sums.append(loss.sum() / (algorithm.aggregation_tokens or 1))
            group_means.append(torch.cat(tokens).mean())
        means = {"group": group_means, "sequence": sequence_means, "constant": sums}[algorithm.aggregation]
        total = torch.stack(means).mean()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), learner.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learner.lr * min(1.0, (step + 1) / learner.warmup_steps)
        optimizer.step()
    return {name: p.detach() for name, p in policy.named_parameters()}


def weights_of(learner: Learner, folder: Path) -> dict[str, torch.Tensor]:
    return read_weights(learner.export_weights(folder, version=1))


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_step_is_that_of_plain_torch(name, learner_of, config_of, groups, model, fmt, tmp_path):
    config, learner = config_of(name), learner_of(name)
    before = weights_of(learner, tmp_path / "before")
    stats = learner.step(assemble(groups, config, fmt))
    after = weights_of(learner, tmp_path / "after")
    assert furthest(before, after) > 5e-3
    assert furthest(after, plain_step(model, groups, config, fmt)) < 1e-6
    assert stats["train/optimizer_steps"] == 2 and stats["train/lr"] == config.learner.lr
    assert stats["ratio/min"] < 1 < stats["ratio/max"] and stats["train/grad_norm"] > config.learner.max_grad_norm


@pytest.mark.parametrize(("name", "tokens"), [("cispo", 64), ("cispo", 1), ("two ranks", 10_000), ("two ranks", 40)])
def test_neither_packing_nor_ranks_change_the_gradient(name, tokens, learner_of, config_of, groups, fmt, tmp_path):
    one_row = learner_of("cispo")
    expected = one_row.step(assemble(groups, config_of("cispo", 1, 10_000), fmt))
    reference = weights_of(one_row, tmp_path / "reference")
    learner = learner_of(name)
    batch = assemble(groups, config_of(name, 1, tokens), fmt)
    stats = learner.step(batch)
    assert furthest(weights_of(learner, tmp_path / "other"), reference) < 1e-6
    for metric in (
        "train/loss",
        "train/grad_norm",
        "train/entropy",
        "mismatch/kl_mean",
        "mismatch/max_abs_logprob_diff",
        "train/loss_tokens",
    ):
        assert stats[metric] == pytest.approx(expected[metric], rel=1e-5, abs=1e-7), metric


@pytest.mark.parametrize(
    ("name", "transport"), [("two ranks", "broadcast"), ("sharded", "broadcast"), ("sharded", "ipc")]
)
def test_weights_that_are_sent_are_those_that_are_written(name, transport, learner_of, tmp_path):
    learner = learner_of(name)
    expected = weights_of(learner, tmp_path)
    settings = ChannelSettings(
        transport=transport,
        address=LOOPBACK,
        port=learner.open_store(30)[1],
        senders=2 if transport == "ipc" else 1,
        receivers=1,
        tensors=learner.tensor_specs(),
        bucket_bytes=20_000,
        timeout_s=30,
    )
    with ThreadPoolExecutor(1) as threads:
        joining = threads.submit(learner.join_channel, settings)
        channel = WeightChannel(settings, settings.senders, torch.device("cpu"), LOOPBACK)
        joining.result()
        for version in (4, 5):
            sending = threads.submit(learner.send_weights, version)
            got = dict(channel.receive(version))
            sending.result()
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in expected.items())
    del channel
    with pytest.raises(ChannelBroken, match="learner rank 0: send"):  # the engine is gone
        learner.send_weights(6)
    assert furthest(weights_of(learner, tmp_path), expected) == 0, "the ranks go on"


@pytest.fixture(scope="module")
def sixteen(make):
    """Four groups of four: two minibatches of eight completions."""
    return [
        group.model_copy(
            update={
                "trajectories": tuple(
                    t.model_copy(
                        update={
                            "rollout_logprobs": tuple(p + math.log(64 / 416) for p in t.rollout_logprobs),
                            "temperature": TEMPERATURE,
                        }
                    )
                    for t in group.trajectories
                )
            }
        )
        for group in make("random_groups", 4, 4, seed=5, logprob_noise=0.3)
    ]


def in_rows(rows: int, config: RlConfig, groups, fmt):
    """The step as two minibatches of `rows` microbatches on each rank, and the config that packs it so."""
    lengths = [len(t.token_ids) for group in groups for t in group.trajectories]
    for tokens in [1, *range(max(lengths), sum(lengths) + 1)]:
        learner = config.learner.model_copy(update={"micro_batch_tokens": tokens})
        packed = config.model_copy(update={"learner": learner, "group_size": len(groups[0].trajectories)})
        batch = assemble(groups, packed, fmt)
        if all(len(rank) == rows for minibatch in batch.minibatches for rank in minibatch.ranks):
            return batch, packed
    raise AssertionError(f"nothing packs into {rows} rows")


def keep_gradients(rank: Any, config: RlConfig) -> None:
    """In the actor: train by another algorithm, and keep the whole gradient of each optimiser step, before clipping."""
    from deepspeed.utils import safe_get_full_grad

    rank.config, rank.gradients = config, []
    own_step = type(rank)._optimizer_step

    def step(stats: Any) -> None:
        named = rank.policy.model.named_parameters()
        whole: list[tuple[str, Any]] = [(name, safe_get_full_grad(p)) for name, p in named if p.requires_grad]
        rank.gradients.append({name: gradient.float().clone() for name, gradient in whole})
        own_step(rank, stats)

    rank._optimizer_step = step


def gradients_of(learner: Learner, batch, config: RlConfig) -> list[dict[str, torch.Tensor]]:
    ray.get([rank.__ray_call__.remote(keep_gradients, config) for rank in learner._ranks])
    learner.step(batch)
    return ray.get(learner._ranks[0].__ray_call__.remote(lambda rank: rank.gradients))


def plain_gradients(folder, groups, config: RlConfig, fmt) -> list[dict[str, torch.Tensor]]:
    """The gradients of both minibatches in plain torch, by definition: a dense mask, one completion at a time."""
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    a, learner = config.algorithm, config.learner
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=learner.lr, betas=learner.betas, eps=learner.eps, weight_decay=0.0
    )
    size = len(groups[0].trajectories)
    rewards = torch.tensor([s for g in groups for s in g.scores])
    members = torch.arange(len(groups)).repeat_interleave(size)
    advantages = group_advantages(rewards, members, a.advantage_std, baseline=a.advantage_baseline)
    with torch.no_grad():
        old = [[plain_logprobs(policy, t, fmt) for t in g.trajectories] for g in groups]
    found = []
    for step, half in enumerate(([0, 1], [2, 3])):
        by_group = []
        for g in half:
            by_group.append([])
            for s, t in enumerate(groups[g].trajectories):
                keep = torch.tensor([i not in t.forced for i in range(len(t.completion_ids))])
                logprobs, before = plain_logprobs(policy, t, fmt)[keep], old[g][s][keep]
                sampler, advantage = torch.tensor(t.rollout_logprobs)[keep], advantages[g * size + s]
                ratio = (logprobs - before).exp()
                if a.loss == "gspo":
                    ratio = (logprobs - before).mean().exp().detach() * (logprobs - logprobs.detach()).exp()
                clipped = ratio.clamp(1 - a.clip_low, 1 + a.clip_high)
                if a.loss == "cispo":
                    loss = -clipped.detach() * advantage * logprobs
                else:
                    loss = -torch.min(ratio * advantage, clipped * advantage)
                weight = (before - sampler).exp()
                if a.sampler_correction == "tis":
                    loss = loss * weight.clamp(max=a.sampler_correction_cap)
                elif a.sampler_correction == "icepop":
                    low, high = a.sampler_mask_range or (0.0, 0.0)
                    loss = loss * torch.where((weight >= low) & (weight <= high), weight, 0.0)
                d = logprobs - before  # the reference is the initial policy, and so is `before` in this step
                penalty = d.square() / 2 if a.kl_estimator == "k2" else (-d).exp() - 1 + d
                by_group[-1].append(loss + a.kl_coef * penalty)
        flat = [tokens for group in by_group for tokens in group]
        if a.aggregation == "token":
            total = torch.cat(flat).mean()
        elif a.aggregation == "sequence":
            total = torch.stack([tokens.mean() for tokens in flat]).mean()
        elif a.aggregation == "group":
            total = torch.stack([torch.cat(group).mean() for group in by_group]).mean()
        else:
            total = torch.cat(flat).sum() / (len(flat) * (a.aggregation_tokens or 0))
        optimizer.zero_grad()
        total.backward()
        found.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
        torch.nn.utils.clip_grad_norm_(policy.parameters(), learner.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learner.lr * min(1.0, (step + 1) / learner.warmup_steps)
        optimizer.step()
    return found


def check_gradients(learner: Learner, config: RlConfig, rows: int, groups, fmt, expected) -> float:
    batch, packed = in_rows(rows, config, groups, fmt)
    got = gradients_of(learner, batch, packed)
    assert len(got) == len(expected) == 2
    largest = [max(float(g.abs().max()) for g in of_step.values()) for of_step in expected]
    assert min(largest) > 1e-3
    # Rounding grows with the gradient: RLOO, which sums over tokens instead of averaging, has one of 10.
    return max(
        furthest(ours, plain) / max(1.0, scale) for ours, plain, scale in zip(got, expected, largest, strict=True)
    )


@pytest.fixture(scope="module")
def plain(model, sixteen, fmt):
    """The plain gradients of an algorithm, computed once."""
    known: dict[str, list[dict[str, torch.Tensor]]] = {}

    def of(config: RlConfig):
        key = config.algorithm.model_dump_json()
        if key not in known:
            known[key] = plain_gradients(model, sixteen, config, fmt)
        return known[key]

    return of


@pytest.mark.parametrize("shape", ["1x8", "2x4", "8x1"])
@pytest.mark.parametrize("name", LEARNERS)
def test_gradients_are_those_of_plain_torch(name, shape, learner_of, config_of, sixteen, plain, fmt):
    """Of microbatches x completions on one rank; two ranks take half the completions each."""
    config, learner = config_of(name), learner_of(name)
    rows = int(shape[0]) if shape != "8x1" else 8 // config.learner.ranks
    assert check_gradients(learner, config, rows, sixteen, fmt, plain(config)) < 1e-6


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_whole_matrix_of_gradients(ranks, stage, cluster, config_of, sixteen, plain, fmt, folder):
    base = config_of("grpo", ranks=ranks, zero_stage=stage, gradient_checkpointing=False)  # with a reference
    learner = Learner(base)
    worst = {}
    try:
        learner.save(folder / f"matrix-{ranks}-{stage}")
        for name, keys in ALGORITHMS.items():
            fresh = base.model_copy(update={"algorithm": AlgorithmConfig()})
            config = override_config(fresh, [f"algorithm.{key}" for key in keys.split()], name)
            assert isinstance(config, RlConfig)
            for rows in (1, 2, 8 // ranks):
                learner.load(folder / f"matrix-{ranks}-{stage}")
                worst[name, rows] = check_gradients(learner, config, rows, sixteen, fmt, plain(config))
    finally:
        learner.close()
    print(f"ranks {ranks}, ZeRO-{stage}: {len(worst)} cases, worst gradient error {max(worst.values()):.2g}")
    assert len(worst) == 24 and max(worst.values()) < 1e-6, worst


LORA = {"rank": 4, "alpha": 8.0}
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    "placement",
    [{"ranks": 1, "zero_stage": 2}, pytest.param({"ranks": 2, "zero_stage": 3}, marks=pytest.mark.long)],
    ids=["ZeRO-2", "ZeRO-3 on two ranks"],
)
def test_an_adapter_is_trained_merged_saved_and_switched_off(
    placement, cluster, config_of, groups, sixteen, plain, model, fmt, tmp_path
):
    config = config_of("grpo", lora=LORA, **placement)
    learner = Learner(config)
    try:
        untrained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        base = {name: p.detach() for name, p in untrained.named_parameters()}
        before = weights_of(learner, tmp_path / "before")
        assert furthest(before, base) == 0, "B is 0: nothing is added yet"
        learner.save(tmp_path / "start")

        # The gradient of W = W0 + scale * B A with respect to B is scale * (that of W) A^T.
        batch, packed = in_rows(1, config, sixteen, fmt)
        adapters = ray.get([rank.__ray_call__.remote(adapter_weights) for rank in learner._ranks])[0]
        of_weights, of_adapters = plain(packed)[0], gradients_of(learner, batch, packed)[0]
        for name, a in adapters.items():
            expected = LORA["alpha"] / LORA["rank"] * of_weights[f"{name}.weight"] @ a.T
            torch.testing.assert_close(of_adapters[f"{name}.lora_B.default.weight"], expected, rtol=0, atol=1e-6)
            assert float(of_adapters[f"{name}.lora_A.default.weight"].abs().max()) == 0

        learner.load(tmp_path / "start")
        batch = assemble(groups, config, fmt)
        reference = torch.cat([r for rank in learner.logprobs(batch, reference=True)[0] for r in rank])
        learner.step(batch)
        after = weights_of(learner, tmp_path / "after")
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved == {name for name in after if any(f".{layer}." in name for layer in ADAPTED)}
        still = torch.cat([r for rank in learner.logprobs(batch, reference=True)[0] for r in rank])
        assert torch.equal(still, reference), "the reference is the model without its adapter"
        assert not torch.equal(torch.cat([r for rank in learner.logprobs(batch)[0] for r in rank]), reference)

        # Engines, Hugging Face folder and an export from the checkpoint: the same merged weights.
        learner.save(tmp_path / "trained")
        exported = tmp_path / "exported"
        _weights_of_checkpoint(tmp_path / "trained", config, exported, None, SHARD_GB)
        for folder in (learner.save_hf(tmp_path / "hf"), exported):
            policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            assert furthest({name: p.detach() for name, p in policy.named_parameters()}, after) == 0
        alone = assemble(groups[:1], config_of("grpo", 1, 1, groups=1, lora=LORA, **placement), fmt)
        rows = {
            tuple(row.token_ids.tolist()): logprobs
            for rank, answers in zip(alone.minibatches[0].ranks, learner.logprobs(alone)[0], strict=True)
            for row, logprobs in zip(rank, answers, strict=True)
        }
        t = groups[0].trajectories[0]
        with torch.no_grad():
            torch.testing.assert_close(
                rows[t.token_ids][t.prompt_len :], plain_logprobs(policy, t, fmt), rtol=0, atol=1e-5
            )
        expected = learner.step(batch)
        learner.load(tmp_path / "trained")
        assert learner.step(batch)["train/loss"] == expected["train/loss"]
    finally:
        learner.close()


def adapter_weights(rank: Any) -> dict[str, torch.Tensor]:
    """In the actor, on all ranks at once: A of every adapted layer."""
    import deepspeed

    found = {}
    for name, p in rank.policy.model.named_parameters():
        if ".lora_A." in name:
            with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
                found[name.partition(".lora_A.")[0]] = p.detach().clone()
    return found


def test_shards_are_gathered_a_bucket_at_a_time(monkeypatch):
    def shard(name: str, numel: int) -> ExportedTensor:
        parameter = torch.nn.Parameter(torch.zeros(0))
        cast(Any, parameter).ds_numel = numel  # what ZeRO-3 calls the size of the whole
        return ExportedTensor(name, (parameter,))

    monkeypatch.setattr(learner_rank, "GATHER_BYTES", 400)
    tensors = [shard("a", 60), shard("b", 60), shard("c", 500), shard("d", 10), shard("e", 10)]
    buckets = [[tensor.name for tensor in bucket] for bucket in learner_rank._buckets(tensors)]
    assert buckets == [["a", "b"], ["c"], ["d", "e"]]


def test_layers_that_an_adapter_cannot_find_are_named(cluster, config_of):
    with pytest.raises(UserError, match=r"learner\.lora\.target_modules: .*attention_proj"):
        Learner(config_of("cispo", lora=LORA | {"target_modules": ["attention_proj"]}))


@pytest.mark.parametrize(
    ("saved", "placement"),
    [
        ("two ranks", {"ranks": 1}),
        pytest.param("cispo", {"ranks": 3}, marks=pytest.mark.long),
        pytest.param("sharded", {"ranks": 1}, marks=pytest.mark.long),
        pytest.param("sharded", {"ranks": 3}, marks=pytest.mark.long),
        pytest.param("grpo", {"ranks": 2}, marks=pytest.mark.long),
    ],
)
def test_another_number_of_ranks_goes_on_from_the_checkpoint(
    saved, placement, learner_of, started, config_of, groups, fmt, tmp_path
):
    source = learner_of(saved)
    for _ in range(2):
        source.step(assemble(groups, config_of(saved), fmt))
    source.save(tmp_path / "step-2")
    expected = [source.step(assemble(groups, config_of(saved), fmt)) for _ in range(2)]
    reference = weights_of(source, tmp_path / "expected")

    config = config_of(saved, **placement)
    own = saved != "two ranks"  # one rank of ZeRO-2 is running already
    learner = Learner(config) if own else started["cispo"]
    try:
        learner.load(tmp_path / "step-2")
        assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == [], "nothing is left behind"
        again = [learner.step(assemble(groups, config, fmt)) for _ in range(2)]
        assert furthest(weights_of(learner, tmp_path / "again"), reference) < 1e-6
    finally:
        if own:
            learner.close()
    for a, b in zip(expected, again, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/lr", "train/optimizer_steps"):
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-7), name


@pytest.mark.long
@pytest.mark.parametrize(
    "placement",
    [
        {"ranks": 1, "zero_stage": 1, "offload_optimizer": True},
        {"ranks": 2, "zero_stage": 2, "offload_optimizer": True},
        {"ranks": 2, "zero_stage": 3, "offload_optimizer": True},
        {"ranks": 2, "zero_stage": 3, "offload_parameters": True},
        {"ranks": 2, "zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
        {"ranks": 1, "zero_stage": 1, "offload_reference": True},
    ],
    ids=lambda placement: ", ".join(f"{key} {value}" for key, value in placement.items()),
)
def test_offload_changes_nothing(placement, cluster, config_of, groups, model, fmt, tmp_path):
    config = config_of("grpo", gradient_checkpointing=False, **placement)
    learner = Learner(config)
    try:
        learner.step(assemble(groups, config, fmt))
        assert furthest(weights_of(learner, tmp_path), plain_step(model, groups, config, fmt)) < 1e-6
    finally:
        learner.close()


def test_an_idle_rank_takes_part(learner_of, config_of, groups, fmt, tmp_path):
    one_row = learner_of("cispo")
    expected = one_row.step(assemble(groups[:1], config_of("cispo", 1, 10_000, groups=1), fmt))
    # Three traces, two ranks, one trace a row: the fourth row has nothing to train.
    batch = assemble(groups[:1], config_of("two ranks", 1, 1, groups=1), fmt)
    assert sorted(int(row.loss_mask.any()) for rank in batch.minibatches[0].ranks for row in rank) == [0, 1, 1, 1]
    learner = learner_of("two ranks")
    assert learner.step(batch)["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
    assert furthest(weights_of(learner, tmp_path / "a"), weights_of(one_row, tmp_path / "b")) < 1e-6


def _without_weight(row):
    nothing = torch.zeros_like(row.loss_mask)
    return dataclasses.replace(row, loss_mask=nothing, sampled_mask=nothing, loss_weights=row.loss_weights * 0)


def test_the_first_minibatch_meets_itself(learner_of, config_of, groups, fmt):
    stats = learner_of("grpo").step(assemble(groups, config_of("grpo", 1), fmt))
    assert (stats["ratio/min"], stats["ratio/mean"], stats["ratio/max"]) == (1.0, 1.0, 1.0)
    assert stats["clip/low_fraction"] == stats["clip/high_fraction"] == 0
    assert stats["train/kl_reference"] == pytest.approx(0, abs=1e-12)
    assert 0.9 * math.log(416) < stats["train/entropy"] < math.log(416)  # an untrained model is nearly uniform


def test_the_kl_of_a_completion_is_that_of_plain_torch(learner_of, config_of, groups, model, fmt, tmp_path):
    learner = learner_of("grpo")
    batch = assemble(groups, config_of("grpo", 1, 64), fmt)
    assert learner.sequence_kl(batch).tolist() == [0.0] * 12  # the policy is the reference
    learner.step(batch)
    got = learner.sequence_kl(batch)
    folders = (learner.save_hf(tmp_path / "hf"), model)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32, attn_implementation="eager") for f in folders
    )
    expected = []
    for t in (t for group in groups for t in group.trajectories):
        keep = torch.tensor([i not in t.forced for i in range(len(t.completion_ids))])
        with torch.no_grad():
            d = (plain_logprobs(policy, t, fmt) - plain_logprobs(reference, t, fmt))[keep].double()
        expected.append(((-d).exp() - 1 + d).sum())
    assert got.min() > 0
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-3, atol=1e-7)


def test_packing_changes_no_logprob(learner_of, config_of, groups, model, fmt):
    learner = learner_of("cispo")
    by_trace = {}
    for tokens in (10_000, 1):
        batch = assemble(groups, config_of("cispo", 1, tokens), fmt)
        for rank, answers in zip(batch.minibatches[0].ranks, learner.logprobs(batch)[0], strict=True):
            for row, logprobs in zip(rank, answers, strict=True):
                for d in range(int(row.document[-1]) + 1):
                    of_document = row.document == d
                    by_trace.setdefault(tuple(row.token_ids[of_document].tolist()), []).append(logprobs[of_document])
    assert len(by_trace) == 12
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    for t in (t for group in groups for t in group.trajectories):
        packed, alone = by_trace[t.token_ids]
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
        with torch.no_grad():
            plain = plain_logprobs(policy, t, fmt)
        torch.testing.assert_close(packed[t.prompt_len :], plain, rtol=0, atol=1e-5)


def test_a_neighbour_in_the_row_changes_no_bit(learner_of, config_of, groups, fmt):
    learner = learner_of("cispo")
    batch = assemble(groups, config_of("cispo", 1, 10_000), fmt)
    row = batch.minibatches[0].ranks[0][0]
    other = row.token_ids.clone()
    changed = row.document == 5
    other[changed] = (other[changed] + 7) % 400
    minibatch = dataclasses.replace(batch.minibatches[0], ranks=((dataclasses.replace(row, token_ids=other),),))
    before, after = (
        learner.logprobs(b)[0][0][0] for b in (batch, dataclasses.replace(batch, minibatches=(minibatch,)))
    )
    assert torch.equal(before[~changed], after[~changed])
    assert not torch.equal(before[changed], after[changed])


@pytest.mark.parametrize("name", ["cispo", "sharded"])
def test_what_is_exported_is_what_is_trained(name, learner_of, config_of, groups, model, fmt, tmp_path):
    learner = learner_of(name)
    learner.step(assemble(groups, config_of(name), fmt))
    sent = weights_of(learner, tmp_path)
    folder = learner.save_hf(tmp_path / "hf")
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    saved = {n: p.detach() for n, p in policy.named_parameters()}
    assert saved.keys() == sent.keys() and all(torch.equal(saved[n], sent[n]) for n in sent)
    assert "lm_head.weight" not in sent  # tied: the embedding is sent once
    batch = assemble(groups, config_of(name, 1, 1), fmt)
    t = groups[0].trajectories[0]
    ours = next(
        logprobs[t.prompt_len :]
        for rank, answers in zip(batch.minibatches[0].ranks, learner.logprobs(batch)[0], strict=True)
        for row, logprobs in zip(rank, answers, strict=True)
        if tuple(row.token_ids.tolist()) == t.token_ids
    )
    with torch.no_grad():
        torch.testing.assert_close(ours, plain_logprobs(policy, t, fmt), rtol=0, atol=1e-5)
    # The folder is an ordinary one: generation uses its cache, the tokenizer has its template and the delimiters.
    assert policy.config.use_cache and policy.generation_config.eos_token_id is not None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template and tokenizer.convert_tokens_to_ids("<|summary_end|>") is not None


@pytest.mark.parametrize("name", ["cispo", pytest.param("sharded", marks=pytest.mark.slow)])
def test_two_and_two_steps_are_four(name, learner_of, config_of, groups, fmt, tmp_path):
    batch = assemble(groups, config_of(name), fmt)
    learner = learner_of(name)
    whole = [learner.step(batch) for _ in range(4)]
    learner = learner_of(name)
    for _ in range(2):
        learner.step(batch)
    learner.save(tmp_path)
    fresh = Learner(config_of(name))  # new processes
    try:
        fresh.load(tmp_path)
        again = [fresh.step(batch) for _ in range(2)]
    finally:
        fresh.close()
    for a, b in zip(whole[2:], again, strict=True):
        assert [a[k] for k in ("train/loss", "train/grad_norm", "train/lr", "train/optimizer_steps", "ratio/max")] == [
            b[k] for k in ("train/loss", "train/grad_norm", "train/lr", "train/optimizer_steps", "ratio/max")
        ]


def test_a_minibatch_without_loss_tokens_is_skipped(learner_of, config_of, groups, fmt, tmp_path):
    learner = learner_of("cispo")
    before = weights_of(learner, tmp_path / "before")
    batch = assemble(groups, config_of("cispo"), fmt)
    empty = dataclasses.replace(
        batch.minibatches[0],
        ranks=tuple(tuple(_without_weight(row) for row in rank) for rank in batch.minibatches[0].ranks),
        loss_tokens=0,
    )
    stats = learner.step(dataclasses.replace(batch, minibatches=(empty,)))
    assert stats["train/skipped_minibatches"] == 1 and "train/loss" not in stats and stats["train/optimizer_steps"] == 0
    assert furthest(before, weights_of(learner, tmp_path / "after")) == 0


def test_another_checkpoint_is_refused(learner_of, folder, tmp_path):
    learner = learner_of("cispo")
    with pytest.raises(UserError, match=r"learner\.zero_stage = 0, this run has 2"):
        learner.load(folder / "initial" / "grpo")
    with pytest.raises(UserError, match="not a complete checkpoint"):
        learner.load(tmp_path)


def test_a_loss_that_is_no_number_stops_the_run(cluster, config_of, groups, fmt):
    config = config_of("cispo")
    learner = Learner(config)
    batch = assemble(groups, config, fmt)
    (row, *rest), second = batch.minibatches[0].ranks[0], batch.minibatches[1]
    poisoned = dataclasses.replace(row, advantages=row.advantages * float("nan"))
    first = dataclasses.replace(batch.minibatches[0], ranks=((*rest, poisoned),))
    with pytest.raises(NonFiniteLoss, match=r"the loss is nan \(minibatch 0.*failed_batch\.pt"):
        learner.step(dataclasses.replace(batch, minibatches=(first, second)))
    saved = torch.load(Path(config.out) / FAILED_BATCH, weights_only=False)
    assert saved.minibatches[0].ranks[0][-1].advantages.isnan().all()
    with pytest.raises(LearnerError, match="closed"):
        learner.save_hf(Path(config.out) / "hf")
    assert not (Path(config.out) / "hf").exists()


def test_a_dead_rank_is_named(cluster, config_of, groups, fmt):
    config = config_of("two ranks")
    learner = Learner(config)
    pid: Any = ray.get(learner._ranks[1].__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(LearnerError, match=r"learner rank [01] (died|failed) during step"):
        learner.step(assemble(groups, config, fmt))


def test_a_start_that_takes_too_long_is_named(cluster, config_of):
    with pytest.raises(LearnerError, match=r"did not finish (placement|start) within"):
        Learner(config_of("cispo", start_timeout_s=0.2))


def test_more_ranks_than_resources(cluster, config_of):
    with pytest.raises(UserError, match=r"64 learner ranks need 32 CPU, the Ray cluster has 8.*learner\.ranks"):
        Learner(config_of("cispo", ranks=64))


def test_dropout_is_refused(config_of, model, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(model)
    policy.config.attention_dropout = 0.1
    policy.save_pretrained(tmp_path)
    config = config_of("cispo").model_copy(update={"model": str(tmp_path)})
    with pytest.raises(UserError, match=r"dropout"):
        LearnerRank(config, 0, "cpu")._load_model(config.model)


def test_bf16_without_fp32_accumulation_is_refused(config_of):
    with pytest.raises(ValueError, match="Use zero_stage 1"):
        config_of("grpo", dtype="bfloat16")
