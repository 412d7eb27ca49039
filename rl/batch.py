"""From scored groups to packed tensors: minibatches -> ranks -> microbatches.

::

    ScoredGroup ... --assemble--> TrainBatch
                                    MiniBatch            one optimiser step, whole groups, ONE count of loss tokens
                                      ranks[r]           the same number of microbatches on every rank
                                        MicroBatch       one packed row [T] without padding, at most
                                                         `micro_batch_tokens`, or one longer trajectory

Everything that depends on the whole step (advantages, weights, the number of loss tokens) is computed here, once, on
the final mask, so that ranks and microbatches only ever sum.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from memento.config import RlConfig
from memento.format import NEVER, MementoFormat, visible_until
from memento.rl.advantages import group_advantages, overlong_penalty
from memento.rl.losses import aggregation_weights, kl_divergence
from memento.trajectory import FinishReason, ScoredGroup, Trajectory


class BatchError(ValueError):
    """Groups that must not reach the loss. The message names the group and what is wrong with it."""


@dataclass(frozen=True, eq=False, slots=True)
class MicroBatch:
    """One packed row; all tensors are [T]. Two documents ``a b c`` (prompt a) and ``d e`` (prompt d)::

        token_ids         a     b     c     d     e
        positions         0     1     2     0     1      logical, what RoPE reads
        document          0     0     0     1     1
        visible_until     -     -     -     -     -      row positions; NEVER stays NEVER
        sampled_mask      0     1     1     0     1      the sampler chose this token
        loss_mask         0     1     1     0     1      sampled, and not masked for another reason

    Attributes:
        rollout_logprobs: fp32, of completion tokens; NaN at prompt tokens, which have none.
        advantages: fp32, of the token's sequence; 0 outside the loss mask.
        loss_weights: fp32, see `memento.rl.losses.aggregation_weights`; 0 outside the loss mask.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    document: torch.Tensor
    visible_until: torch.Tensor
    sampled_mask: torch.Tensor
    loss_mask: torch.Tensor
    rollout_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_weights: torch.Tensor

    def __post_init__(self) -> None:
        shapes = {f.name: tuple(getattr(self, f.name).shape) for f in fields(self)}
        if self.token_ids.ndim != 1 or len(set(shapes.values())) != 1:
            raise ValueError(f"the tensors of a microbatch must all be [T], got {shapes}")

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.token_ids)


@dataclass(frozen=True, eq=False, slots=True)
class MiniBatch:
    """One optimiser step.

    Attributes:
        ranks: for each rank its microbatches, the same number on every rank.
        loss_tokens: loss tokens over all ranks, of the final mask: the one denominator. 0 if everything is masked.
        sequences: for each microbatch of `ranks` which completions its documents are, counted over the whole step.
    """

    ranks: tuple[tuple[MicroBatch, ...], ...]
    loss_tokens: int
    sequences: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, eq=False, slots=True)
class TrainBatch:
    """All of one RL step. `tokens` counts real tokens, prompts included."""

    minibatches: tuple[MiniBatch, ...]
    temperature: float
    tokens: int

    def for_rank(self, rank: int) -> tuple[tuple[tuple[MicroBatch, ...], int], ...]:
        """What one rank needs: for each minibatch its microbatches and the global number of loss tokens."""
        return tuple((minibatch.ranks[rank], minibatch.loss_tokens) for minibatch in self.minibatches)


@dataclass(frozen=True, eq=False, slots=True)
class _Sequence:
    trajectory: Trajectory
    index: int
    advantage: float
    group: int
    sampled_mask: torch.Tensor
    loss_mask: torch.Tensor


def assemble(
    groups: Sequence[ScoredGroup], config: RlConfig, fmt: MementoFormat, kl: torch.Tensor | None = None
) -> TrainBatch:
    """Pack scored groups for `config.learner.ranks` ranks.

    Groups keep their order: minibatch i holds the i-th equal share of them. Advantages are those of the whole step.

    Args:
        groups: the step's.
        config: `algorithm`, `learner`, `sampling` and `group_size` are read.
        fmt: what the engines evicted.
        kl: [groups x group_size] KL of each completion to the reference (`sequence_kl`), where it is a part of the
            reward: ``reward - algorithm.kl_coef * kl``. None leaves the rewards alone. Nothing but the advantages
            depends on it.

    Raises:
        BatchError: fewer groups than minibatches, an incomplete or ragged group, an aborted or empty completion, a
            log-probability that is not finite, or another sampling temperature than the config's.
    """
    minibatches = config.learner.minibatches
    if len(groups) < minibatches:
        raise BatchError(f"{len(groups)} groups cannot fill {minibatches} minibatches (learner.minibatches)")
    for group in groups:
        _check(group, config)
    algorithm = config.algorithm
    rewards = _rewards(groups, config, kl)
    members = torch.tensor([index for index, group in enumerate(groups) for _ in group.rewards])
    advantages = group_advantages(
        rewards, members, algorithm.advantage_std, baseline=algorithm.advantage_baseline
    ).tolist()
    sequences = [
        [
            _sequence(trajectory, (at := index * config.group_size + sample), advantages[at], index, config)
            for sample, trajectory in enumerate(group.trajectories)
        ]
        for index, group in enumerate(groups)
    ]
    bounds = [round(i * len(groups) / minibatches) for i in range(minibatches + 1)]
    return TrainBatch(
        tuple(
            _minibatch([s for group in sequences[start:end] for s in group], config, fmt)
            for start, end in itertools.pairwise(bounds)
        ),
        config.sampling.temperature,
        sum(len(t.prompt_ids) + len(t.completion_ids) for group in groups for t in group.trajectories),
    )


def sequence_kl(
    batch: TrainBatch,
    logprobs: Sequence[Sequence[Sequence[torch.Tensor]]],
    reference_logprobs: Sequence[Sequence[Sequence[torch.Tensor]]],
    estimator: str = "k1",
) -> torch.Tensor:
    """KL(policy || reference) of each completion, [groups x group_size] fp64: the sum over its sampled tokens.

    With k1 that is ``log policy(completion) - log reference(completion)``, what RLOO (arXiv 2402.14740, section 2)
    takes off the reward. REINFORCE++ (arXiv 2501.03262) charges each token with the KL of those after it alone; what
    came before a token adds variance to its gradient, and nothing in expectation.

    Args:
        batch: the step.
        logprobs, reference_logprobs: by minibatch, rank and microbatch, [T] each.
        estimator: see `memento.rl.losses.KL_ESTIMATORS`.
    """
    kl: dict[int, float] = {}
    for minibatch, of_policy, of_reference in zip(batch.minibatches, logprobs, reference_logprobs, strict=True):
        for r, rows in enumerate(minibatch.ranks):
            for m, row in enumerate(rows):
                kl_T = kl_divergence(of_policy[r][m].double(), of_reference[r][m].double(), estimator)
                for document, index in enumerate(minibatch.sequences[r][m]):
                    kl[index] = float(kl_T[row.sampled_mask & (row.document == document)].sum())
    return torch.tensor([kl[index] for index in range(len(kl))], dtype=torch.float64)


def pack(lengths: Sequence[int], capacity: int, ranks: int) -> list[list[list[int]]]:
    """Which sequence goes where: for each rank, for each of its microbatches, the indices of its sequences.

    First-fit decreasing gives the number of microbatches, which is rounded up to a multiple of `ranks`; the longest
    sequences are then dealt to the emptiest microbatch, so that all are about equally full. Where that overflows one,
    the first-fit packing is kept, and a rank may get an empty microbatch.

    Args:
        lengths: tokens of each sequence.
        capacity: tokens of one microbatch. A longer sequence gets one of its own.
        ranks: every rank gets the same number of microbatches.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        fits = next((b for b, free in enumerate(room) if lengths[i] <= free), None)
        if fits is None:
            bins.append([i])
            room.append(capacity - lengths[i])
        else:
            bins[fits].append(i)
            room[fits] -= lengths[i]
    count = max(1, math.ceil(len(bins) / ranks)) * ranks
    even: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, b) for b in range(count)]
    for i in order:
        load, emptiest = heapq.heappop(loads)
        even[emptiest].append(i)
        heapq.heappush(loads, (load + lengths[i], emptiest))
    if all(len(b) == 1 or sum(lengths[i] for i in b) <= capacity for b in even if b):
        bins = even
    bins += [[] for _ in range(count - len(bins))]
    # Fullest first to the rank with the least work so far, among those that still have room.
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    work = [0] * ranks
    for b in sorted(bins, key=lambda b: -sum(lengths[i] for i in b)):
        rank = min((r for r in range(ranks) if len(dealt[r]) < count // ranks), key=lambda r: (work[r], r))
        dealt[rank].append(b)
        work[rank] += sum(lengths[i] for i in b)
    return dealt


def _check(group: ScoredGroup, config: RlConfig) -> None:
    name = group.trajectories[0].group_id
    if not group.complete:
        failed = [r.outcome.value for r in group.rewards if r.score is None]
        raise BatchError(f"group {name} is incomplete ({', '.join(failed)}); it must be dropped or retried as a whole")
    if len(group.trajectories) != config.group_size:
        raise BatchError(f"group {name} has {len(group.trajectories)} samples, group_size is {config.group_size}")
    for t in group.trajectories:
        where = f"group {name}, sample {t.sample_index}"
        if t.finish_reason is FinishReason.ABORT or not t.completion_ids or not t.prompt_ids:
            raise BatchError(f"{where}: an aborted or empty completion cannot be trained on")
        if t.temperature != config.sampling.temperature:
            raise BatchError(
                f"{where} was sampled at temperature {t.temperature}, sampling.temperature is "
                f"{config.sampling.temperature}: its log-probabilities would not be comparable"
            )
        if not np.isfinite(t.rollout_logprobs).all():
            bad = int(np.flatnonzero(~np.isfinite(t.rollout_logprobs))[0])
            raise BatchError(f"{where}: rollout_logprobs[{bad}] is {t.rollout_logprobs[bad]}")
        if t.forced and not 0 <= min(t.forced) <= max(t.forced) < len(t.completion_ids):
            raise BatchError(f"{where}: forced positions {t.forced} lie outside its {len(t.completion_ids)} tokens")


def _rewards(groups: Sequence[ScoredGroup], config: RlConfig, kl: torch.Tensor | None) -> torch.Tensor:
    """[groups x group_size] fp64: the scores, less what their length and their KL cost."""
    algorithm = config.algorithm
    rewards = torch.tensor([score for group in groups for score in group.scores], dtype=torch.float64)
    if algorithm.overlong_buffer_tokens:
        trajectories = [t for group in groups for t in group.trajectories]
        rewards = rewards + algorithm.overlong_penalty * overlong_penalty(
            torch.tensor([len(t.completion_ids) for t in trajectories]),
            torch.tensor([t.truncated for t in trajectories]),
            config.sampling.max_tokens,
            algorithm.overlong_buffer_tokens,
        )
    if kl is not None:
        if kl.shape != rewards.shape:
            raise ValueError(f"kl must be [{len(rewards)}], one a completion, got {tuple(kl.shape)}")
        rewards = rewards - algorithm.kl_coef * kl
    return rewards


def _sequence(trajectory: Trajectory, index: int, advantage: float, group: int, config: RlConfig) -> _Sequence:
    sampled = torch.zeros(len(trajectory.token_ids), dtype=torch.bool)
    sampled[trajectory.prompt_len :] = True
    sampled[[trajectory.prompt_len + i for i in trajectory.forced]] = False
    masked = config.algorithm.mask_truncated and trajectory.truncated
    return _Sequence(trajectory, index, advantage, group, sampled, torch.zeros_like(sampled) if masked else sampled)


def _minibatch(sequences: Sequence[_Sequence], config: RlConfig, fmt: MementoFormat) -> MiniBatch:
    counts = torch.stack([s.loss_mask.sum() for s in sequences])
    of_token = torch.repeat_interleave(torch.arange(len(sequences)), counts)
    of_group = torch.tensor([s.group for s in sequences])[of_token]
    # Completions that are masked as a whole count here: a constant must not depend on what was sampled.
    constant = len(sequences) * (config.algorithm.aggregation_tokens or config.sampling.max_tokens)
    weight_of_token = aggregation_weights(of_token, of_group, config.algorithm.aggregation, constant)
    weights = torch.zeros(len(sequences)).index_put((of_token,), weight_of_token)  # the same for a sequence's tokens
    learner = config.learner
    plan = pack([len(s.sampled_mask) for s in sequences], learner.micro_batch_tokens, learner.ranks)
    # A rank without work must still take part in every collective: two tokens without weight.
    idle = torch.tensor(sequences[0].trajectory.token_ids[:2])
    return MiniBatch(
        tuple(
            tuple(_row([(sequences[i], weights[i]) for i in row], fmt) if row else _idle(idle) for row in rows)
            for rows in plan
        ),
        len(of_token),
        tuple(tuple(tuple(sequences[i].index for i in row) for row in rows) for rows in plan),
    )


def _row(sequences: Sequence[tuple[_Sequence, torch.Tensor]], fmt: MementoFormat) -> MicroBatch:
    """One packed row of (sequence, weight of each of its loss tokens)."""
    columns: dict[str, list[torch.Tensor]] = {f.name: [] for f in fields(MicroBatch)}
    offset = 0
    for number, (sequence, weight) in enumerate(sequences):
        trajectory = sequence.trajectory
        ids, prompt = trajectory.token_ids, trajectory.prompt_len
        until = visible_until(ids, fmt if trajectory.evict else fmt.without_eviction(), prompt)
        logprobs = torch.full((len(ids),), float("nan"))
        logprobs[prompt:] = torch.tensor(trajectory.rollout_logprobs)
        columns["token_ids"].append(torch.tensor(ids))
        columns["positions"].append(torch.arange(len(ids)))
        columns["document"].append(torch.full((len(ids),), number))
        columns["visible_until"].append(torch.from_numpy(np.where(until == NEVER, NEVER, until + offset)))
        columns["sampled_mask"].append(sequence.sampled_mask)
        columns["loss_mask"].append(sequence.loss_mask)
        columns["rollout_logprobs"].append(logprobs)
        columns["advantages"].append(sequence.loss_mask * sequence.advantage)
        columns["loss_weights"].append(sequence.loss_mask * weight)
        offset += len(ids)
    return MicroBatch(**{name: torch.cat(parts) for name, parts in columns.items()})


def _idle(ids: torch.Tensor) -> MicroBatch:
    nothing, zero = torch.zeros(len(ids), dtype=torch.bool), torch.zeros(len(ids))
    return MicroBatch(
        token_ids=ids,
        positions=torch.arange(len(ids)),
        document=torch.zeros(len(ids), dtype=torch.int64),
        visible_until=torch.full((len(ids),), NEVER),
        sampled_mask=nothing,
        loss_mask=nothing,
        rollout_logprobs=torch.full((len(ids),), float("nan")),
        advantages=zero,
        loss_weights=zero,
    )
