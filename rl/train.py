"""The RL loop: evicting rollouts, verifiable rewards, optimiser steps, weights back to the engines.

    memento rl configs/rl/quickstart.yaml learner.lr=1e-4
    ray job submit --working-dir . -- python -m memento.rl.train configs/rl/quickstart.yaml

Both are the same program: `memento.cluster.connect` starts a Ray, or joins the one it was launched on. `max_lag` alone
decides between synchronous (0) and asynchronous training; see `memento.rl.window`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from memento.cluster import connect, node_resources, reserve
from memento.command import run_config
from memento.config import RlConfig
from memento.errors import RunFailed
from memento.format import MementoFormat
from memento.preflight import ENGINE, LEARNER_RANK, REWARD_POOL, check_run, compared_resources, resource_plan
from memento.problems import Problem
from memento.rewards.format_terms import trace_shape
from memento.rewards.pool import RewardPool
from memento.rewards.scoring import check_terms, load_verified
from memento.rl.batch import assemble
from memento.rl.checkpoint import RunState, latest_checkpoint, load_state, save_checkpoint
from memento.rl.evaluate import EvalResult, evaluate
from memento.rl.export import finish_folder
from memento.rl.learner import Learner
from memento.rl.metrics import rollout_metrics, system_metrics
from memento.rl.weight_sync import WeightSync, open_sync
from memento.rl.window import GroupWindow, ProblemStream, scores_differ
from memento.rollout.pool import RolloutPool
from memento.run import Run
from memento.sources import Loaded
from memento.trajectory import RolloutRequest, SamplingParams, ScoredGroup

SIGNAL_POLL_S = 0.5
"""How long the loop may be deaf to Ctrl-C and SIGTERM while it waits for rollouts."""


class MismatchAlarm(RunFailed):
    """Engine and learner disagree about the same tokens by more than the config allows."""


def train(config: RlConfig, *, resume: bool = False) -> Path:
    """Train, and leave a run folder with metrics, rollouts, checkpoints and the exported model.

    Args:
        config: the run.
        resume: go on from the newest checkpoint in ``config.out``.

    Returns:
        The folder of the exported model, ``config.out / "hf"``.

    Raises:
        UserError: bad input, before anything is started.
        RunStopped: a signal arrived; a checkpoint was written and the run can be resumed.
        MismatchAlarm: see ``algorithm.mismatch_kl_limit``; the trajectories were saved.
    """
    fmt = check_run(config)
    training, evaluation = load_problem_sets(config)
    problems, held_out = training.problems, evaluation.problems if evaluation else ()

    with Run.open(config, resume=resume) as run, ExitStack() as parts:
        run.say(f"training on {training}" + (f", evaluated on {evaluation}" if evaluation else ""))
        with run.phase("start"):
            learner, engines, rewards, weights = start(config, run, parts)
            state = restore(run, learner) if resume else RunState()
            weights.push(version=state.step)  # a broken sync fails in the first minute

        def held_out_accuracy(step: int) -> EvalResult:
            with run.phase("eval"):
                return evaluate_held_out(config, fmt, engines, rewards, held_out, step)

        stream, window = open_window(config, fmt, state, problems, engines, rewards)
        parts.callback(window.close)
        if held_out and state.step == 0:
            before = held_out_accuracy(0).metrics()
            state = state.evaluated(0, before)
            run.log(0, before)

        for step in range(state.step, config.steps):
            began = time.perf_counter()
            groups = next_groups(run, window, stream, config, step, step, weights)
            if groups is None:
                save(run, state.at(step, stream, window), learner)
                run.stop()
            if config.rollout.sleep:
                engines.sleep()
            with profiled(run, learner, step + 1):
                stats = learn(run, groups, config, fmt, learner)
            syncing = time.perf_counter()
            with run.phase("sync"):
                engines.wake("weights")
                update = weights.push(version=step + 1)
                engines.wake("kv_cache")
            now = time.perf_counter()

            tokens = sum(len(t.completion_ids) for group in groups for t in group.trajectories)
            metrics = {
                **rollout_metrics(groups, fmt, version=step),
                **window_metrics(window),
                **engines.metrics(),
                **rewards.metrics(),
                **stats,
                **system_metrics(now - began, stats["learner/seconds"], now - syncing, update, tokens),
            }
            if held_out and is_due(step + 1, config.eval.interval, config.steps):
                metrics |= held_out_accuracy(step + 1).metrics()
            state = state.evaluated(step + 1, metrics)
            run.save_groups(step + 1, groups)
            run.log(step + 1, metrics)
            check_mismatch(config, run, step + 1, stats, groups)
            best = config.checkpoint.keep_best and state.best_step == step + 1
            if best or is_due(step + 1, config.checkpoint.interval, config.steps):
                with run.phase("checkpoint"):
                    save(run, state.at(step + 1, stream, window), learner)

        with run.phase("export"):
            model = learner.save_hf(run.folder / "hf")
            finish_folder(model, run.folder, step=config.steps)
        run.say(f"model: {model}")
        return model


def load_problem_sets(config: RlConfig) -> tuple[Loaded, Loaded | None]:
    """The problems to train on, without those of the evaluation, and the evaluation's. Every gold is checked.

    Raises:
        UserError: see `memento.rewards.scoring.load_verified`; or a custom reward that cannot be imported.
    """
    check_terms(config.rewards)
    evaluation = load_verified(config.eval.problems, config.rewards) if config.eval.problems else None
    exclude = [evaluation] if evaluation is not None and config.eval.decontaminate else []
    return load_verified(config.problems, config.rewards, exclude=exclude), evaluation


def start(config: RlConfig, run: Run, parts: ExitStack) -> tuple[Learner, RolloutPool, RewardPool, WeightSync]:
    """Bring learner, engines and verifiers up side by side: each takes seconds to minutes."""
    plan = resource_plan(config, gpus_there=connect().get("GPU", 0.0))
    for line in compared_resources(config):
        run.say(line)
    room = reserve(plan, min(config.rollout.start_timeout_s, config.learner.start_timeout_s), run.say)
    parts.callback(room.release)
    rank_places = room.options(LEARNER_RANK, config.learner.ranks)
    engine_places = room.options(ENGINE, config.rollout.engines)
    reward_places = room.options(REWARD_POOL, config.rewards.actors)
    with ThreadPoolExecutor(3) as threads:
        starting = (
            threads.submit(Learner, config, rank_places),
            threads.submit(RolloutPool, config.rollout, config.format, str(config.model), engine_places),
            threads.submit(RewardPool, config.rewards, reward_places),
        )
    for part in starting:
        if part.exception() is None:
            parts.callback(part.result().close)
    learner, engines, rewards = starting
    rewards.result().check()  # on a cluster a custom term may be missing where the actor is
    weights = open_sync(config, plan, len(node_resources()), learner.result(), engines.result(), run.say)
    parts.callback(weights.close)
    return learner.result(), engines.result(), rewards.result(), weights


def open_window(
    config: RlConfig,
    fmt: MementoFormat,
    state: RunState,
    problems: Sequence[Problem],
    engines: RolloutPool,
    rewards: RewardPool,
) -> tuple[ProblemStream, GroupWindow]:
    """Problems and groups from where the loop stands; groups that were in flight then are started again."""

    def rollout(request: RolloutRequest) -> ScoredGroup:
        trajectories = engines.generate(request)
        shapes = [trace_shape(t, fmt) for t in trajectories] if config.rewards.terms else None
        results = rewards.score(request.problem, [t.text for t in trajectories], shapes)
        return ScoredGroup(problem=request.problem, trajectories=trajectories, rewards=tuple(results))

    algorithm = config.algorithm
    keep = scores_differ if algorithm.dynamic_sampling else None
    max_filtered = int(algorithm.dynamic_sampling_cap * config.groups_per_step)
    window = GroupWindow(config.groups_per_step, config.max_lag, rollout, keep, max_filtered)
    for request in state.pending:
        window.start(request)
    return ProblemStream(problems, config.seed, cursor=state.cursor), window


def next_groups(
    run: Run,
    window: GroupWindow,
    stream: ProblemStream,
    config: RlConfig,
    step: int,
    version: int,
    weights: WeightSync | None = None,
) -> list[ScoredGroup] | None:
    """Keep the window full until a step's groups are ready, and take them; None when a signal arrived meanwhile.

    Args:
        step: steps that are done.
        version: weights that train next.
        weights: serves engines that come back meanwhile; null where weights never change.
    """
    left = (config.steps - step) * config.groups_per_step
    with run.phase("rollout"):
        fill(window, stream, config, left)
        while not run.stopping and not window.wait(version, SIGNAL_POLL_S):
            if weights is not None:
                weights.heal(version)
            fill(window, stream, config, left)
            run.within(window.ready(), config.groups_per_step)
    return None if run.stopping else window.take()


def restore(run: Run, learner: Learner) -> RunState:
    """Bring the learner to the newest whole checkpoint; where the loop goes on. A run without one starts over."""
    checkpoint = latest_checkpoint(run.folder)
    if checkpoint is None:
        return RunState()
    state = load_state(checkpoint)
    learner.load(checkpoint)
    return state


def learn(
    run: Run, groups: Sequence[ScoredGroup], config: RlConfig, fmt: MementoFormat, learner: Learner
) -> dict[str, float]:
    """Train one RL step on scored groups. The learner's statistics, see `Learner.step`."""
    with run.phase("batch"):
        batch, penalty = assemble(groups, config, fmt), {}
        if config.algorithm.kl_in == "reward":
            kl = learner.sequence_kl(batch)
            batch, penalty = assemble(groups, config, fmt, kl), {"reward/kl_mean": float(kl.mean())}
    with run.phase("train"):
        return learner.step(batch) | penalty


@contextmanager
def profiled(run: Run, learner: Learner, step: int) -> Iterator[None]:
    """Open and close the profiler's window, `profile_steps`, around the steps it names."""
    assert isinstance(run.config, RlConfig)
    first, last = run.config.profile_steps or (0, 0)
    if step == first:
        learner.start_profile()
    yield
    if step == last:
        run.say(f"profile of steps {first} to {last}: {learner.stop_profile(run.folder / 'profile')}")


def fill(window: GroupWindow, stream: ProblemStream, config: RlConfig, left: int) -> None:
    """Start as many groups as the window has room for: with rollouts that run ahead, none beyond the last step."""
    for serial, problem in stream.take(window.room(left)):
        window.start(
            RolloutRequest(
                problem=problem,
                group_id=f"{serial}/{problem.id}",
                group_size=config.group_size,
                sampling=config.sampling.params(),
                seed=config.seed,
                evict=config.rollout.evict,
            )
        )


def evaluate_held_out(
    config: RlConfig,
    fmt: MementoFormat,
    engines: RolloutPool,
    rewards: RewardPool,
    problems: Sequence[Problem],
    step: int,
) -> EvalResult:
    """Accuracy on the held-out problems under the weights the engines hold now."""
    sampling = SamplingParams(
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        top_k=config.eval.top_k,
        max_tokens=config.eval.max_tokens or config.sampling.max_tokens,
    )
    result, _ = evaluate(
        engines,
        rewards,
        problems,
        sampling,
        fmt=fmt,
        samples=config.eval.samples,
        seed=config.seed,
        evict=config.rollout.evict,
        group_prefix=f"eval-{step}",
        weight_version=step,
    )
    return result


def save(run: Run, state: RunState, learner: Learner) -> None:
    """Write a checkpoint from which the next step goes on as if nothing had happened."""
    assert isinstance(run.config, RlConfig)
    checkpoint = run.config.checkpoint
    folder = save_checkpoint(run.folder, state, learner, keep=checkpoint.keep, keep_best=checkpoint.keep_best)
    run.saved(state.step, folder)


def window_metrics(window: GroupWindow) -> dict[str, float]:
    """Groups that were dropped since the last step, by reason."""
    counts = window.take_counts()
    return {
        "groups/stale": counts.stale,
        "groups/incomplete": counts.incomplete,
        "groups/failed": counts.failed,
        "groups/filtered": counts.filtered,
        "groups/pending": len(window.pending()),
    }


def check_mismatch(
    config: RlConfig, run: Run, step: int, stats: dict[str, float], groups: Sequence[ScoredGroup]
) -> None:
    """Stop when the sampler's and the learner's log-probabilities drift apart: nothing after that can be trusted."""
    limit, reached = config.algorithm.mismatch_kl_limit, stats.get("mismatch/kl_mean", 0.0)
    if limit is None or reached <= limit:
        return
    file = run.save_alarm(step, groups)
    raise MismatchAlarm(
        f"step {step}: the mean mismatch KL between engine and learner is {reached:.3g}, above "
        f"algorithm.mismatch_kl_limit = {limit:.3g}. The step's trajectories are in {file}."
    )


def is_due(step: int, interval: int, last: int) -> bool:
    """Whether something that happens every `interval` steps, and at the end, happens after this step."""
    return step % interval == 0 or step == last


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m memento.rl.train CONFIG [a.b=c ...] [--resume]``. Returns the exit code."""
    return run_config("rl", "An RL run under eviction.", train, arguments)


if __name__ == "__main__":
    sys.exit(main())
