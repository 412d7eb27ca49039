"""Evaluation: how often a model is right, and what its KV cache costs while it is.

The metrics are pure functions of scored groups; `evaluate` fills the groups from a rollout pool and a reward pool, and
`evaluate_model` is ``memento evaluate``. Accuracy is that of MEMENTO (arXiv 2604.09852, section 4): pass@1 is the mean
over samples, then over problems; maj@k breaks ties uniformly; peak KV and KV-AUC are computed from the tokens.

A sample whose verifier failed has no score. It is left out of every accuracy and counted in ``excluded``.

An evaluation of hours is worth resuming: `evaluate_model` appends every scored group to a file as it finishes, beside a
note of what was being evaluated and how. The same command goes on from there, and refuses if anything differs.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from pydantic import Field, ValidationError

from memento.config import FormatConfig, RewardsConfig, RolloutConfig
from memento.errors import UserError
from memento.format import MementoFormat, Trace, kv_profile, parse
from memento.problems import Problem, Record
from memento.rewards.format_terms import TraceShape, trace_shape
from memento.rewards.math_verifier import normalise
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
        parts: mean of each part of the scores, e.g. the terms of a composed reward, over samples that have it.
        weight_versions: the versions that sampled any token, so that a result is pinned to its weights.
        weights: digest of the model folder's weights (`weights_digest`); empty for a hub id.
        restart: the ablation in which kept tokens are computed again without the evicted blocks.
        kv_bytes_per_token: of this model; None where its config does not say.
    """

    model: str = ""
    weights: str = ""
    problems: int
    samples: int
    sampling: SamplingParams
    seed: int
    evict: bool
    restart: bool = False
    accuracy: Estimate
    pass_at_k: dict[int, Estimate]
    maj_at_k: Estimate
    reward: float
    parts: dict[str, float] = Field(default_factory=dict)
    outcomes: dict[str, int]
    excluded: int
    kv: KVStats
    blocks: BlockStats
    weight_versions: tuple[int, ...]
    kv_bytes_per_token: int | None = None
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
            **{f"part/{name}": value for name, value in self.parts.items()},
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

    Right samples all vote for one answer, however they spell it; wrong ones vote for their extracted text, compared as
    the math verifier compares strings. A sample without an answer (None) does not vote; with no votes at all the result
    is 0.

    Returns:
        1 / (number of tied leaders) if the right answer leads, else 0. ``["7", "7", "8", "8"]`` with 7 right gives 0.5.
    """
    votes: Counter[str | bool] = Counter()
    for answer, right in zip(answers, correct, strict=True):
        if right:
            votes[True] += 1
        elif answer is not None:
            votes[normalise(answer)] += 1
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
        parts=_mean_parts([r for rewards in scored for r in rewards]),
        outcomes=dict(sorted(outcomes.items())),
        excluded=sum(r.score is None for group in groups for r in group.rewards),
        kv=kv_stats(trajectories, fmt),
        blocks=block_stats(trajectories, fmt),
        weight_versions=tuple(sorted({span.version for t in trajectories for span in t.weight_versions})),
        seconds=seconds,
    )


def _mean_parts(rewards: Sequence[RewardResult]) -> dict[str, float]:
    names = sorted({name for reward in rewards for name in reward.parts})
    return {name: float(np.mean([r.parts[name] for r in rewards if name in r.parts])) for name in names}


def _mean_score(rewards: Sequence[RewardResult]) -> float:
    return float(np.mean([r.score for r in rewards if r.score is not None]))


# ---------------------------------------------------------------------------------------------- running it


class Generator(Protocol):
    """What evaluation needs of `memento.rollout.pool.RolloutPool`."""

    def generate(self, request: RolloutRequest) -> tuple[Trajectory, ...]: ...


class Scorer(Protocol):
    """What evaluation needs of `memento.rewards.pool.RewardPool`."""

    def score(
        self, problem: Problem, completions: Sequence[str], shapes: Sequence[TraceShape] | None = None
    ) -> list[RewardResult]: ...


class WrongWeights(RuntimeError):
    """Samples came from other weights than those that were to be evaluated."""


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
    done: Mapping[str, ScoredGroup] | None = None,
    weight_version: int | None = None,
) -> tuple[EvalResult, list[ScoredGroup]]:
    """Sample every problem `samples` times, score the samples, summarise.

    Args:
        fmt: the delimiters and what they evict; for the KV and block metrics.
        group_prefix: group ids are ``<group_prefix>/<problem id>``. Seeds follow from them, so the same prefix and
            seed sample the same completions, on however many engines.
        progress: called with each scored group as it finishes, from the calling thread.
        concurrency: groups in flight.
        done: groups by problem id that were evaluated before; they are not generated again, nor shown to `progress`.
        weight_version: every token must come from these weights; None takes what the engines hold.

    Returns:
        The result, and the groups in the order of `problems`.

    Raises:
        WrongWeights: see `weight_version`.
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
        versions = {span.version for t in trajectories for span in t.weight_versions}
        if weight_version is not None and versions != {weight_version}:
            raise WrongWeights(
                f"problem {problem.id!r} was sampled by weights {sorted(versions)}, not {weight_version}"
            )
        shapes = [trace_shape(t, fmt) for t in trajectories]
        scores = rewards.score(problem, [t.text for t in trajectories], shapes)
        return ScoredGroup(problem=problem, trajectories=tuple(trajectories), rewards=tuple(scores))

    started = time.monotonic()
    groups = dict(done or {})
    missing = [problem for problem in problems if problem.id not in groups]
    threads = ThreadPoolExecutor(max(1, min(concurrency, len(missing))), thread_name_prefix="evaluate")
    try:
        waiting = {threads.submit(one, problem) for problem in missing}
        while waiting:
            # Wake up now and then, so that progress shows and Ctrl-C is heard.
            finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
            # What is whole is kept, before an error among them ends the evaluation.
            for future in sorted(finished, key=lambda f: f.exception() is not None):
                group = future.result()
                groups[group.problem.id] = group
                progress(group)
    finally:
        # Not `with`: after an error nobody should wait for groups in flight, which may take minutes.
        threads.shutdown(wait=False, cancel_futures=True)
    in_order = [groups[problem.id] for problem in problems]
    result = summarise(
        in_order,
        fmt,
        samples=samples,
        sampling=sampling,
        seed=seed,
        evict=evict,
        seconds=time.monotonic() - started,
        model=model,
    )
    return result, in_order


# ---------------------------------------------------------------------------------------------- resuming it


class EvalSettings(Record):
    """What an evaluation is of, and how it is done: written beside its groups, and compared when it is resumed."""

    model: str
    weights: str
    problems: str
    samples: int
    sampling: SamplingParams
    seed: int
    evict: bool
    restart: bool
    format: FormatConfig
    rewards: RewardsConfig


def weights_digest(model: str | Path) -> str:
    """Sixteen hex digits that change when the weights in a model folder do; empty for a hub id.

    Of each weight file the name, the size, and its first and last 64 KiB: reading all of it would take minutes.
    """
    folder, digest = Path(model), hashlib.blake2b(digest_size=8)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]) if folder.is_dir() else []
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as data:
            digest.update(data.read(1 << 16))
            data.seek(max(0, size - (1 << 16)))
            digest.update(data.read())
    return digest.hexdigest() if files else ""


def problems_digest(problems: Sequence[Problem]) -> str:
    """Sixteen hex digits of a list of problems."""
    digest = hashlib.blake2b(digest_size=8)
    for problem in problems:
        digest.update(problem.model_dump_json().encode("utf-8", "replace") + b"\n")
    return digest.hexdigest()


class GroupFile:
    """Scored groups of an evaluation in a JSONL file, each appended when it is finished.

    ``FILE`` holds the groups, as `memento view` reads them; ``FILE.settings.json`` says what was evaluated and how.
    """

    def __init__(self, path: Path, settings: EvalSettings) -> None:
        self.path = path
        self._settings_path = path.with_name(path.name + ".settings.json")
        self._settings = settings

    def read(self) -> dict[str, ScoredGroup]:
        """The groups that an earlier call left, by problem id; empty where there was none.

        Raises:
            UserError: the file holds something else, or an evaluation of something else; it is not touched.
        """
        if not self.path.exists():
            return {}
        if not self._settings_path.is_file():
            raise UserError(f"{self.path} exists already and is not overwritten; choose another file.")
        before = json.loads(self._settings_path.read_text(encoding="utf-8"))
        now = self._settings.model_dump(mode="json")
        differ = [key for key in now if before.get(key) != now[key]]
        if differ:
            raise UserError(
                f"{self.path} holds an evaluation with other settings ({', '.join(differ)} differ). Choose another "
                "file, or remove this one to start over."
            )
        whole = self.path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):  # a process that was killed had not finished its last line
            with self.path.open("r+b") as file:
                file.truncate(end)
        groups: dict[str, ScoredGroup] = {}
        for number, line in enumerate(whole[:end].splitlines(), 1):
            try:
                group = ScoredGroup.model_validate_json(line)
            except ValidationError as error:
                raise UserError(
                    f"{self.path}, line {number} is no scored group. Remove the file to start over."
                ) from error
            groups[group.problem.id] = group
        return groups

    def append(self, group: ScoredGroup) -> None:
        """Add a group that is finished."""
        if not self._settings_path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._settings_path.write_text(self._settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
        append_jsonl([group], self.path)

    def remove(self) -> None:
        """Both files, once nobody needs them."""
        self.path.unlink(missing_ok=True)
        self._settings_path.unlink(missing_ok=True)


def _kv_bytes_per_token(folder: Path, dtype: str) -> int | None:
    """KV bytes of one resident token in an engine of this dtype; None where the model's config does not say."""
    from memento.footprint import Architecture
    from memento.preflight import read_model_config

    model_config = read_model_config(folder)
    architecture = Architecture.of(model_config)
    if architecture is None:
        return None
    chosen = str(model_config.get("dtype") or "bfloat16") if dtype == "auto" else dtype
    return architecture.kv_bytes(1, 4 if "32" in chosen else 2)


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
    resume_file: Path | None = None,
) -> EvalResult:
    """``memento evaluate``: start engines and verifiers, evaluate with a progress bar on stderr, stop them.

    Args:
        model: Hugging Face folder or hub id.
        rollout, fmt, rewards: how engines, eviction and verifiers are set up; None for the defaults.
        trajectories: write the scored groups there as they finish (JSONL), for `memento view`, and go on from what an
            interrupted call left there.
        resume_file: the same, but removed in the end. None for neither: an interrupted call starts over.

    Raises:
        UserError: no such model, no delimiters in its tokenizer, too few resources, a file of another evaluation.
    """
    from memento.preflight import check_model, load_tokenizer

    folder = check_model(model)
    config, engine, verifiers = fmt or FormatConfig(), rollout or RolloutConfig(), rewards or RewardsConfig()
    bound = config.bind(load_tokenizer(model))
    settings = EvalSettings(
        model=model,
        weights=weights_digest(model),
        problems=problems_digest(problems),
        samples=samples,
        sampling=sampling,
        seed=seed,
        evict=evict,
        restart=engine.restart,
        format=config,
        rewards=verifiers,
    )
    path = trajectories or resume_file
    file = GroupFile(path, settings) if path is not None else None
    done = file.read() if file is not None else {}

    def run(engines: Generator, scorer: Scorer, progress: Callable[[ScoredGroup], None]) -> EvalResult:
        result, _ = evaluate(
            engines,
            scorer,
            problems,
            sampling,
            fmt=bound,
            samples=samples,
            seed=seed,
            evict=evict,
            progress=progress,
            model=model,
            done=done,
        )
        more = {
            "weights": settings.weights,
            "restart": settings.restart,
            "kv_bytes_per_token": _kv_bytes_per_token(folder, engine.dtype) if folder else None,
        }
        return result.model_copy(update=more)

    if all(problem.id in done for problem in problems):
        result = run(_Nobody(), _Nobody(), _silent)
    else:
        result = _with_engines(run, model, problems, config, engine, verifiers, file, done)
    if file is not None and trajectories is None:
        file.remove()
    return result


class _Nobody:
    """In the place of engines and verifiers where there is nothing left to do."""

    def generate(self, request: RolloutRequest) -> tuple[Trajectory, ...]:
        raise AssertionError(f"{request.group_id} was evaluated already")

    def score(
        self, problem: Problem, completions: Sequence[str], shapes: Sequence[TraceShape] | None = None
    ) -> list[RewardResult]:
        raise AssertionError(f"{problem.id} was evaluated already")


def _with_engines(
    run: Callable[[Generator, Scorer, Callable[[ScoredGroup], None]], EvalResult],
    model: str,
    problems: Sequence[Problem],
    config: FormatConfig,
    engine: RolloutConfig,
    verifiers: RewardsConfig,
    file: GroupFile | None,
    done: Mapping[str, ScoredGroup],
) -> EvalResult:
    """Start what `run` needs, show its progress, keep what is finished, and stop everything."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from memento.cluster import connect, disconnect
    from memento.preflight import check_vllm_version
    from memento.rewards.pool import RewardPool
    from memento.rollout.pool import RolloutPool

    check_vllm_version()
    connect()
    try:
        with ExitStack() as parts:
            scorer = RewardPool(verifiers)
            parts.callback(scorer.close)
            scorer.check(problems)
            engines = RolloutPool(engine, config, model)
            parts.callback(engines.close)
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            progress = parts.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
            bar = progress.add_task("evaluating", total=len(problems), completed=len(done))
            judged = [r for group in done.values() for r in group.rewards if r.score is not None]
            right, scored = sum(r.outcome is Outcome.CORRECT for r in judged), len(judged)

            def advance(group: ScoredGroup) -> None:
                nonlocal right, scored
                if file is not None:
                    file.append(group)
                right += sum(r.outcome is Outcome.CORRECT for r in group.rewards)
                scored += sum(r.score is not None for r in group.rewards)
                so_far = f", {right / scored:.1%} right so far" if scored else ""
                progress.update(bar, advance=1, description=f"evaluating{so_far}")

            return run(engines, scorer, advance)
    finally:
        disconnect()


def result_table(result: EvalResult) -> Table:
    """The result as a table for people."""
    from rich.table import Table

    attention = "restart mode" if result.restart else "eviction" if result.evict else "full attention"
    how = f"temperature {result.sampling.temperature:g}, {attention}"
    table = Table(title=f"{result.model or 'model'} · {result.problems} problems × {result.samples} samples · {how}")
    table.add_column("metric")
    table.add_column("value", justify="right")

    def percent(estimate: Estimate) -> str:
        error = "" if estimate.stderr is None else f" ± {100 * estimate.stderr:.1f}"
        return f"{100 * estimate.mean:.1f}{error} %"

    table.add_row("pass@1" if result.samples == 1 else f"pass@1 (avg@{result.samples})", percent(result.accuracy))
    for k, estimate in result.pass_at_k.items():
        if k > 1:
            table.add_row(f"pass@{k}", percent(estimate))
    if result.samples > 1:
        table.add_row(f"maj@{result.samples}", percent(result.maj_at_k))
    table.add_section()
    kv, blocks = result.kv, result.blocks
    table.add_row("peak KV", f"{kv.peak_tokens:.0f} tokens ({kv.peak_ratio:.2f}× less than {kv.peak_tokens_full:.0f})")
    if result.kv_bytes_per_token is not None:
        table.add_row("", _memory(kv.peak_tokens * result.kv_bytes_per_token))
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
    if len(result.parts) > 1:
        table.add_row("parts of the reward", ", ".join(f"{name} {mean:.3f}" for name, mean in result.parts.items()))
    table.add_row("outcomes", ", ".join(f"{count} {name}" for name, count in result.outcomes.items()))
    if result.excluded:
        table.add_row("[yellow]without a score[/]", f"{result.excluded} (excluded)")
    table.add_row("seconds", f"{result.seconds:.1f}")
    return table


def _memory(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
