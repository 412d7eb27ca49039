"""What a step looks like: its rollouts, from the records alone, and what it cost.

Accuracy as the only reward makes blocks drift (longer, fewer), which no reward curve shows; so the memento and KV
metrics are logged from the first step on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memento.format import MementoFormat, kv_profile, parse
from memento.trajectory import Outcome, ScoredGroup

if TYPE_CHECKING:
    from memento.rollout.channel_records import ChannelUpdate
    from memento.rollout.weights import WeightUpdate


def rollout_metrics(groups: Sequence[ScoredGroup], fmt: MementoFormat, version: int | None = None) -> dict[str, float]:
    """Statistics of one step's groups. Empty for no groups; a mean over nothing is left out, never 0.

    Args:
        groups: scored groups; samples without a score count in `outcome/*` but not in `reward/*`.
        fmt: what the engines evicted.
        version: the weight version that is about to be trained, for `lag/*`.

    Returns:
        name -> value: ``reward/{mean, std, zero_std_fraction}``, ``reward/part/<name>`` (mean of each part of the
        scores, over samples that have it), ``outcome/<outcome>`` (fractions),
        ``length/{prompt_mean, completion_mean, completion_max}`` and ``length/truncated_fraction``,
        ``memento/{blocks_per_trace, block_tokens, memento_tokens, compression, forced_rate, malformed_rate}``,
        ``kv/{peak_tokens, peak_ratio, area_ratio}`` (ratios: the same tokens without eviction, over with),
        ``preemptions`` (sum) and ``lag/{mean, max}`` in weight versions.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    if not trajectories:
        return {}
    metrics: dict[str, float] = {}
    rewards = [reward for group in groups for reward in group.rewards]
    scores = np.array([r.score for r in rewards if r.score is not None])
    if len(scores):
        metrics["reward/mean"] = float(scores.mean())
    if len(scores) > 1:
        metrics["reward/std"] = float(scores.std(ddof=1))
    complete = [group.scores for group in groups if group.complete]
    if complete:
        metrics["reward/zero_std_fraction"] = float(np.mean([len(set(scores)) == 1 for scores in complete]))
    for part in sorted({name for r in rewards for name in r.parts}):
        metrics[f"reward/part/{part}"] = float(np.mean([r.parts[part] for r in rewards if part in r.parts]))
    for outcome in Outcome:
        metrics[f"outcome/{outcome.value}"] = float(np.mean([r.outcome is outcome for r in rewards]))

    completions = np.array([len(t.completion_ids) for t in trajectories])
    metrics["length/prompt_mean"] = float(np.mean([t.prompt_len for t in trajectories]))
    metrics["length/completion_mean"] = float(completions.mean())
    metrics["length/completion_max"] = float(completions.max())
    metrics["length/truncated_fraction"] = float(np.mean([t.truncated for t in trajectories]))

    traces = [parse(t.token_ids, fmt, t.prompt_len) for t in trajectories]
    blocks = [block for trace in traces for block in trace.blocks]
    metrics["memento/blocks_per_trace"] = len(blocks) / len(traces)
    block_tokens, memento_tokens = (sum(b.block_tokens for b in blocks), sum(b.memento_tokens for b in blocks))
    if blocks:
        metrics["memento/block_tokens"] = block_tokens / len(blocks)
        metrics["memento/memento_tokens"] = memento_tokens / len(blocks)
    if memento_tokens:
        metrics["memento/compression"] = block_tokens / memento_tokens
    # A trace that the length limit cut inside a block is truncated, not malformed.
    malformed = [
        trace.anomalies > 0 or (trace.unfinished and not t.truncated)
        for trace, t in zip(traces, trajectories, strict=True)
    ]
    metrics["memento/malformed_rate"] = float(np.mean(malformed))
    metrics["memento/forced_rate"] = float(np.mean([bool(t.forced) for t in trajectories]))

    full = [kv_profile(t.token_ids, fmt.without_eviction(), t.prompt_len) for t in trajectories]
    metrics["kv/peak_tokens"] = float(np.mean([t.peak_kv_tokens for t in trajectories]))
    metrics["kv/peak_ratio"] = sum(p.peak_tokens for p in full) / sum(t.peak_kv_tokens for t in trajectories)
    metrics["kv/area_ratio"] = sum(p.area for p in full) / sum(t.kv_area_tokens for t in trajectories)
    metrics["preemptions"] = float(sum(t.preemptions for t in trajectories))
    if version is not None:
        lags = [version - t.oldest_version for t in trajectories]
        metrics["lag/mean"], metrics["lag/max"] = float(np.mean(lags)), float(max(lags))
    return metrics


def system_metrics(
    step_s: float, learner_s: float, sync_s: float, update: WeightUpdate | ChannelUpdate, tokens: int
) -> dict[str, float]:
    """Who worked, who waited, and what the weights cost, in one step.

    Args:
        step_s: wall seconds of the whole step.
        learner_s: seconds of it in which the learner trained.
        sync_s: seconds of it from asking the learner for its weights to the last engine's answer.
        update: the weights that were sent.
        tokens: completion tokens that were trained.

    Returns:
        ``idle/learner`` (fraction of the step), ``sync/{seconds, mib, gb_per_s}`` (seconds: gathering and writing, or
        sending; the rate is over all of `sync_s`), ``step/tokens_per_s`` and ``memory/driver_rss_mib``.
    """
    return {
        "idle/learner": 1.0 - learner_s / step_s,
        "sync/seconds": update.seconds,
        "sync/mib": update.bytes / 2**20,
        "sync/gb_per_s": update.bytes / 1e9 / sync_s,
        "step/tokens_per_s": tokens / step_s,
        "memory/driver_rss_mib": resident_mib(),
    }


def resident_mib() -> float:
    """Host memory that this process holds now (RSS), in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
