"""Evaluation: how often a model is right, and what its KV cache costs while it is.

The metrics are pure functions of scored groups; `evaluate` fills the groups from a rollout pool and a reward pool, and
`evaluate_model` is ``memento evaluate``. Accuracy is that of MEMENTO (arXiv 2604.09852, section 4): pass@1 is the mean
over samples, then over problems; maj@k breaks ties uniformly; peak KV and KV-AUC are computed from the tokens.

A sample whose verifier failed has no score. It is left out of every accuracy and counted in ``excluded``.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from pydantic import Field

from memento.config import FormatConfig, RewardsConfig, RolloutConfig
from memento.errors import UserError
from memento.format import MementoFormat, Trace, kv_profile, parse
from memento.problems import Problem, Record
from memento.trajectory import (
    Outcome,
    RewardResult,
    RolloutRequest,
    SamplingParams,
    ScoredGroup,
    Trajectory,
    append_jsonl,
)

if TYPE_CHECKING:
    from rich.table import Table


class Estimate(Record):
    """A mean over problems.

    Attributes:
        mean: in [0, 1].
        stderr: standard error over problems (sample standard deviation / sqrt(problems)); None for a single problem.
        problems: how many problems it is the mean of.
    """

    mean: float
    stderr: float | None
    problems: int


class KVStats(Record):
    """Resident KV tokens of sampled traces, against the same tokens without eviction.

    Attributes:
        peak_tokens, peak_tokens_full: mean over traces of the largest number of resident tokens, as sampled and
            without eviction.
        area_tokens, area_tokens_full: mean KV-AUC: resident tokens summed over the generated tokens.
        peak_ratio, area_ratio: without over with eviction, a ratio of these means; 1 where nothing is evicted.
        measured_peak_tokens: mean of what the engine itself reported, to compare with `peak_tokens`.
    """

    peak_tokens: float
    peak_tokens_full: float
    peak_ratio: float
    area_tokens: float
    area_tokens_full: float
    area_ratio: float
    measured_peak_tokens: float


class BlockStats(Record):
    """What the traces look like. Lengths are content tokens, averaged over blocks; None if there is no block.

    Attributes:
        compression: block tokens over memento tokens, over all complete blocks.
        malformed_rate: traces with a delimiter out of order, or ended (not truncated) with a block left open.
        truncation_rate: traces that ended at the length limit.
        forced_blocks_per_trace: how often the block cap closed a block (once per run of adjacent forced tokens).
    """

    blocks_per_trace: float
    block_tokens: float | None
    longest_block_tokens: int | None
    memento_tokens: float | None
    compression: float | None
    completion_tokens: float
    malformed_rate: float
    truncation_rate: float
    forced_blocks_per_trace: float


class EvalResult(Record):
    """One evaluation: how it was done, and what came out.

    Attributes:
        accuracy: pass@1, i.e. avg@k: the mean over samples, then over problems.
        pass_at_k: unbiased pass@k for k = 1, 2, 4, ... and k = samples.
        maj_at_k: accuracy of the majority answer among all samples of a problem.
        reward: mean score (differs from `accuracy` where a reward is partial).
        outcomes: how many samples ended with which outcome.
        excluded: samples without a score.
        weight_versions: the versions that sampled any token, so that a result is pinned to its weights.
    """

    model: str = ""
    problems: int
    samples: int
    sampling: SamplingParams
    seed: int
    evict: bool
    accuracy: Estimate
    pass_at_k: dict[int, Estimate]
    maj_at_k: Estimate
    reward: float
    outcomes: dict[str, int]
    excluded: int
    kv: KVStats
    blocks: BlockStats
    weight_versions: tuple[int, ...]
    seconds: float = Field(ge=0)

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        """Flat numbers for ``metrics.jsonl``; what has no value has no key."""
        values: dict[str, float | None] = {
            "accuracy": self.accuracy.mean,
            "accuracy_stderr": self.accuracy.stderr,
            f"pass_at_{self.samples}": self.pass_at_k[self.samples].mean if self.samples in self.pass_at_k else None,
            f"maj_at_{self.samples}": self.maj_at_k.mean,
            "reward": self.reward,
            "excluded": self.excluded,
            "kv_peak_tokens": self.kv.peak_tokens,
            "kv_peak_ratio": self.kv.peak_ratio,
            "kv_area_ratio": self.kv.area_ratio,
            **self.blocks.model_dump(),
            "seconds": self.seconds,
        }
        return {f"{prefix}/{name}": float(value) for name, value in values.items() if value is not None}


# ---------------------------------------------------------------------------------------------- accuracy


def mean_over_problems(per_problem: Sequence[float]) -> Estimate:
    """The mean of one number per problem, with its standard error.

    Raises:
        ValueError: for no problems: there is no number to report.
    """
    values = np.asarray(per_problem, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError("no problem has a scored sample, so there is no accuracy to report")
    stderr = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Estimate(mean=float(values.mean()), stderr=stderr, problems=len(values))


def avg_at_k(correct: Sequence[Sequence[bool]]) -> Estimate:
    """pass@1: the mean over samples, then over problems. Problems may have different numbers of samples.

    Args:
        correct: for each problem, whether each of its scored samples is right. Problems without one are left out.
    """
    return mean_over_problems([sum(samples) / len(samples) for samples in correct if samples])


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased probability that one of k samples is right, given ``right`` of n: ``1 - C(n-right, k) / C(n, k)``.

    Source: Chen et al., arXiv 2107.03374, section 2.1.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= right <= n and 1 <= k <= n, got n={n}, right={right}, k={k}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Probability that the majority answer is right when ties are broken uniformly.

    Right samples all vote for one answer, however they spell it; wrong ones vote for their extracted text. A sample
    without an answer (None) does not vote; with no votes at all the result is 0.

    Returns:
        1 / (number of tied leaders) if the right answer leads, else 0. ``["7", "7", "8", "8"]`` with 7 right gives 0.5.
    """
    votes: Counter[str | bool] = Counter()
    for answer, right in zip(answers, correct, strict=True):
        if right:
            votes[True] += 1
        elif answer is not None:
            votes[" ".join(answer.split())] += 1
    leaders = [answer for answer, count in votes.items() if count == max(votes.values())]
    return 1.0 / len(leaders) if True in leaders else 0.0


def reported_ks(samples: int) -> list[int]:
    """The k for which pass@k is reported: powers of two up to `samples`, and `samples` itself."""
    return sorted({samples, *(2**i for i in range(samples.bit_length()) if 2**i <= samples)})


# ---------------------------------------------------------------------------------------------- traces


class TraceKV(NamedTuple):
    """KV of one trace in tokens, as sampled and for the same tokens without eviction."""

    peak: int
    peak_full: int
    area: int
    area_full: int


def trace_kv(trajectory: Trajectory, fmt: MementoFormat) -> TraceKV:
    """Peak and KV-AUC of one trajectory, computed from its tokens (`memento.format.kv_profile`)."""
    ids, prompt_len = trajectory.token_ids, trajectory.prompt_len
    full = kv_profile(ids, fmt.without_eviction(), prompt_len)
    own = kv_profile(ids, fmt, prompt_len) if trajectory.evict else full
    return TraceKV(own.peak_tokens, full.peak_tokens, own.area, full.area)


def kv_stats(trajectories: Iterable[Trajectory], fmt: MementoFormat) -> KVStats:
    """Mean KV of some trajectories and the ratios to the same tokens without eviction."""
    trajectories = tuple(trajectories)
    if not trajectories:
        raise ValueError("KV statistics of no trajectories do not exist")
    peak, peak_full, area, area_full = np.array([trace_kv(t, fmt) for t in trajectories], dtype=np.float64).mean(axis=0)
    return KVStats(
        peak_tokens=peak,
        peak_tokens_full=peak_full,
        peak_ratio=peak_full / peak,
        area_tokens=area,
        area_tokens_full=area_full,
        area_ratio=area_full / area if area else 1.0,
        measured_peak_tokens=float(np.mean([t.peak_kv_tokens for t in trajectories])),
    )


def block_stats(trajectories: Iterable[Trajectory], fmt: MementoFormat) -> BlockStats:
    """Numbers and lengths of blocks and mementos, and the rates of what went wrong with them."""
    trajectories = tuple(trajectories)
    if not trajectories:
        raise ValueError("block statistics of no trajectories do not exist")
    traces = [parse(t.token_ids, fmt, t.prompt_len) for t in trajectories]
    blocks = [block for trace in traces for block in trace.blocks]
    block_tokens, memento_tokens = (sum(b.block_tokens for b in blocks), sum(b.memento_tokens for b in blocks))
    forced = [position for t in trajectories for position in _run_starts(t.forced)]
    return BlockStats(
        blocks_per_trace=len(blocks) / len(traces),
        block_tokens=block_tokens / len(blocks) if blocks else None,
        longest_block_tokens=max(b.block_tokens for b in blocks) if blocks else None,
        memento_tokens=memento_tokens / len(blocks) if blocks else None,
        compression=block_tokens / memento_tokens if memento_tokens else None,
        completion_tokens=float(np.mean([len(t.completion_ids) for t in trajectories])),
        malformed_rate=sum(_malformed(t, trace) for t, trace in zip(trajectories, traces, strict=True)) / len(traces),
        truncation_rate=sum(t.truncated for t in trajectories) / len(traces),
        forced_blocks_per_trace=len(forced) / len(traces),
    )


def _malformed(trajectory: Trajectory, trace: Trace) -> bool:
    """A trace that the length limit cut inside a block is truncated, not malformed."""
    return trace.anomalies > 0 or (trace.unfinished and not trajectory.truncated)


def _run_starts(positions: Sequence[int]) -> list[int]:
    return [p for i, p in enumerate(positions) if i == 0 or p != positions[i - 1] + 1]


def summarise(
    groups: Sequence[ScoredGroup],
    fmt: MementoFormat,
    *,
    samples: int,
    sampling: SamplingParams,
    seed: int,
    evict: bool = True,
    seconds: float = 0.0,
    model: str = "",
) -> EvalResult:
    """All metrics of some scored groups. Pure: the same groups from a file give the same result.

    Raises:
        ValueError: no group, or no sample with a score.
    """
    scored = [[r for r in group.rewards if r.score is not None] for group in groups]
    correct = [[r.outcome is Outcome.CORRECT for r in rewards] for rewards in scored]
    trajectories = [t for group in groups for t in group.trajectories]
    outcomes = Counter(r.outcome.value for group in groups for r in group.rewards)
    enough = {k: [c for c in correct if len(c) >= k] for k in reported_ks(samples)}
    return EvalResult(
        model=model,
        problems=len(groups),
        samples=samples,
        sampling=sampling,
        seed=seed,
        evict=evict,
        accuracy=avg_at_k(correct),
        pass_at_k={k: mean_over_problems([pass_at_k(len(c), sum(c), k) for c in of]) for k, of in enough.items() if of},
        maj_at_k=mean_over_problems(
            [maj_at_k([r.extracted for r in rs], c) for rs, c in zip(scored, correct, strict=True) if rs]
        ),
        reward=mean_over_problems([_mean_score(rewards) for rewards in scored if rewards]).mean,
        outcomes=dict(sorted(outcomes.items())),
        excluded=sum(r.score is None for group in groups for r in group.rewards),
        kv=kv_stats(trajectories, fmt),
        blocks=block_stats(trajectories, fmt),
        weight_versions=tuple(sorted({span.version for t in trajectories for span in t.weight_versions})),
        seconds=seconds,
    )


def _mean_score(rewards: Sequence[RewardResult]) -> float:
    return float(np.mean([r.score for r in rewards if r.score is not None]))


# ---------------------------------------------------------------------------------------------- running it


class Generator(Protocol):
    """What evaluation needs of `memento.rollout.pool.RolloutPool`."""

    def generate(self, request: RolloutRequest) -> tuple[Trajectory, ...]: ...


class Scorer(Protocol):
    """What evaluation needs of `memento.rewards.pool.RewardPool`."""

    def score(self, problem: Problem, completions: Sequence[str]) -> list[RewardResult]: ...


def _silent(_: ScoredGroup) -> None:
    """The progress callback of nobody watching."""


def evaluate(
    pool: Generator,
    rewards: Scorer,
    problems: Sequence[Problem],
    sampling: SamplingParams,
    *,
    fmt: MementoFormat,
    samples: int,
    seed: int,
    evict: bool = True,
    group_prefix: str = "eval",
    progress: Callable[[ScoredGroup], None] = _silent,
    concurrency: int = 64,
    model: str = "",
) -> tuple[EvalResult, list[ScoredGroup]]:
    """Sample every problem `samples` times, score the samples, summarise.

    Args:
        fmt: the delimiters and what they evict; for the KV and block metrics.
        group_prefix: group ids are ``<group_prefix>/<problem id>``. Seeds follow from them, so the same prefix and
            seed sample the same completions, on however many engines.
        progress: called with each scored group as it finishes, from the calling thread.
        concurrency: groups in flight.

    Returns:
        The result, and the groups in the order of `problems`.

    Raises:
        Whatever the pools raise; groups not started by then are not started.
    """
    if not problems:
        raise UserError("there are no problems to evaluate on.")

    def one(problem: Problem) -> ScoredGroup:
        request = RolloutRequest(
            problem=problem,
            group_id=f"{group_prefix}/{problem.id}",
            group_size=samples,
            sampling=sampling,
            seed=seed,
            evict=evict,
        )
        trajectories = pool.generate(request)
        scores = rewards.score(problem, [t.text for t in trajectories])
        return ScoredGroup(problem=problem, trajectories=tuple(trajectories), rewards=tuple(scores))

    started = time.monotonic()
    threads = ThreadPoolExecutor(min(concurrency, len(problems)), thread_name_prefix="evaluate")
    try:
        futures = [threads.submit(one, problem) for problem in problems]
        waiting = set(futures)
        while waiting:
            # Wake up now and then, so that progress shows and Ctrl-C is heard.
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
            for future in done:
                progress(future.result())
    finally:
        # Not `with`: after an error nobody should wait for groups in flight, which may take minutes.
        threads.shutdown(wait=False, cancel_futures=True)
    groups = [future.result() for future in futures]
    result = summarise(
        groups,
        fmt,
        samples=samples,
        sampling=sampling,
        seed=seed,
        evict=evict,
        seconds=time.monotonic() - started,
        model=model,
    )
    return result, groups


def evaluate_model(
    model: str,
    problems: Sequence[Problem],
    sampling: SamplingParams,
    *,
    samples: int,
    seed: int,
    evict: bool = True,
    rollout: RolloutConfig | None = None,
    fmt: FormatConfig | None = None,
    rewards: RewardsConfig | None = None,
    trajectories: Path | None = None,
) -> EvalResult:
    """``memento evaluate``: start engines and verifiers, evaluate with a progress bar on stderr, stop them.

    Args:
        model: Hugging Face folder or hub id.
        rollout, fmt, rewards: how engines, eviction and verifiers are set up; None for the defaults.
        trajectories: also write the scored groups there (JSONL), for `memento view`.

    Raises:
        UserError: no such model, no delimiters in its tokenizer, too few resources, a problem nobody could solve.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from memento.cluster import connect, disconnect
    from memento.preflight import check_model, check_vllm_version, load_tokenizer
    from memento.rewards.pool import RewardPool
    from memento.rollout.pool import RolloutPool

    if trajectories is not None and trajectories.exists():
        raise UserError(f"{trajectories} exists already and is not overwritten.")
    check_vllm_version()
    check_model(model)
    config = fmt or FormatConfig()
    bound = config.bind(load_tokenizer(model))
    connect()
    try:
        with ExitStack() as parts:
            verifiers = RewardPool(rewards or RewardsConfig())
            parts.callback(verifiers.close)
            verifiers.check(problems)
            engines = RolloutPool(rollout or RolloutConfig(), config, model)
            parts.callback(engines.close)
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            progress = parts.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
            bar, right, done = progress.add_task("evaluating", total=len(problems)), 0, 0

            def advance(group: ScoredGroup) -> None:
                nonlocal right, done
                right += sum(r.outcome is Outcome.CORRECT for r in group.rewards)
                done += sum(r.score is not None for r in group.rewards)
                so_far = f", {right / done:.1%} right so far" if done else ""
                progress.update(bar, advance=1, description=f"evaluating{so_far}")

            result, groups = evaluate(
                engines,
                verifiers,
                problems,
                sampling,
                fmt=bound,
                samples=samples,
                seed=seed,
                evict=evict,
                progress=advance,
                model=model,
            )
    finally:
        disconnect()
    if trajectories is not None:
        trajectories.parent.mkdir(parents=True, exist_ok=True)
        append_jsonl(groups, trajectories)
    return result


def result_table(result: EvalResult) -> Table:
    """The result as a table for people."""
    from rich.table import Table

    how = f"temperature {result.sampling.temperature:g}, {'eviction' if result.evict else 'full attention'}"
    table = Table(title=f"{result.model or 'model'} · {result.problems} problems × {result.samples} samples · {how}")
    table.add_column("metric")
    table.add_column("value", justify="right")

    def percent(estimate: Estimate) -> str:
        error = "" if estimate.stderr is None else f" ± {100 * estimate.stderr:.1f}"
        return f"{100 * estimate.mean:.1f}{error} %"

    table.add_row("pass@1", percent(result.accuracy))
    for k, estimate in result.pass_at_k.items():
        if k > 1:
            table.add_row(f"pass@{k}", percent(estimate))
    if result.samples > 1:
        table.add_row(f"maj@{result.samples}", percent(result.maj_at_k))
    table.add_section()
    kv, blocks = result.kv, result.blocks
    table.add_row("peak KV", f"{kv.peak_tokens:.0f} tokens ({kv.peak_ratio:.2f}× less than {kv.peak_tokens_full:.0f})")
    table.add_row("KV-AUC", f"{kv.area_tokens:,.0f} token² ({kv.area_ratio:.2f}× less than {kv.area_tokens_full:,.0f})")
    table.add_section()
    table.add_row("blocks a trace", f"{blocks.blocks_per_trace:.2f}")
    if blocks.block_tokens is not None and blocks.memento_tokens is not None:
        ratio = "" if blocks.compression is None else f" ({blocks.compression:.1f}× shorter)"
        table.add_row("block → memento", f"{blocks.block_tokens:.1f} → {blocks.memento_tokens:.1f} tokens{ratio}")
    table.add_row("completion", f"{blocks.completion_tokens:.0f} tokens")
    table.add_row("malformed / truncated", f"{blocks.malformed_rate:.1%} / {blocks.truncation_rate:.1%}")
    if blocks.forced_blocks_per_trace:
        table.add_row("blocks closed by force", f"{blocks.forced_blocks_per_trace:.2f} a trace")
    table.add_section()
    table.add_row("outcomes", ", ".join(f"{count} {name}" for name, count in result.outcomes.items()))
    if result.excluded:
        table.add_row("[yellow]without a score[/]", f"{result.excluded} (excluded)")
    table.add_row("seconds", f"{result.seconds:.1f}")
    return table
