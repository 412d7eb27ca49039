"""The RL loop: evicting rollouts, verifiable rewards, optimiser steps, weights back to the engines.

    memento rl configs/rl/quickstart.yaml learner.lr=1e-4
    ray job submit --working-dir . -- python -m memento.rl.train configs/rl/quickstart.yaml

Both are the same program: `memento.cluster.connect` starts a Ray, or joins the one it was launched on. `max_lag` alone
decides between synchronous (0) and asynchronous training; see `memento.rl.window`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from memento.cluster import connect
from memento.config import RlConfig, load_config
from memento.errors import UserError
from memento.format import MementoFormat
from memento.preflight import check_run
from memento.problems import Problem
from memento.rewards.pool import RewardPool
from memento.rl.batch import assemble
from memento.rl.checkpoint import RunState, latest_checkpoint, load_state, save_checkpoint
from memento.rl.evaluate import EvalResult, evaluate
from memento.rl.export import finish_folder
from memento.rl.learner import Learner
from memento.rl.metrics import rollout_metrics
from memento.rl.weight_sync import WeightSync
from memento.rl.window import GroupWindow, ProblemStream, scores_differ
from memento.rollout.pool import RolloutPool
from memento.run import Run
from memento.sources import read_problems
from memento.trajectory import RolloutRequest, SamplingParams, ScoredGroup

SIGNAL_POLL_S = 0.5
"""How long the loop may be deaf to Ctrl-C and SIGTERM while it waits for rollouts."""


class MismatchAlarm(RuntimeError):
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
    problems = read_problems(config.problems)
    held_out = read_problems(config.eval.problems) if config.eval.problems else []
    fmt = check_run(config)

    with Run.open(config, resume=resume) as run, ExitStack() as parts:
        with run.phase("start"):
            learner, engines, rewards = start(config, run, parts)
            weights = WeightSync(learner, engines)
            parts.callback(weights.close)
            state = RunState()
            if (checkpoint := latest_checkpoint(run.folder) if resume else None) is not None:
                state = load_state(checkpoint)
                learner.load(checkpoint)
            update = weights.push(version=state.step)  # a broken sync fails in the first minute

        def rollout(request: RolloutRequest) -> ScoredGroup:
            trajectories = engines.generate(request)
            results = rewards.score(request.problem, [trajectory.text for trajectory in trajectories])
            return ScoredGroup(problem=request.problem, trajectories=trajectories, rewards=tuple(results))

        def held_out_accuracy(step: int) -> EvalResult:
            with run.phase("eval"):
                return evaluate_held_out(config, fmt, engines, rewards, held_out, step)

        stream = ProblemStream(problems, config.seed, cursor=state.cursor)
        algorithm = config.algorithm
        keep = scores_differ if algorithm.dynamic_sampling else None
        max_filtered = int(algorithm.dynamic_sampling_cap * config.groups_per_step)
        window = GroupWindow(config.groups_per_step, config.max_lag, rollout, keep, max_filtered)
        parts.callback(window.close)
        for request in state.pending:
            window.start(request)
        if held_out and state.step == 0:
            run.log(0, held_out_accuracy(0).metrics())

        for step in range(state.step, config.steps):
            with run.phase("rollout"):
                fill(window, stream, config)
                while not window.wait(step, SIGNAL_POLL_S):
                    if run.stopping:
                        break
                    fill(window, stream, config)
            if run.stopping:
                save(run, step, stream, window, learner, config)
                run.stop()
            groups = window.take()
            with run.phase("batch"):
                batch, penalty = assemble(groups, config, fmt), {}
                if algorithm.kl_in == "reward":
                    kl = learner.sequence_kl(batch)
                    batch, penalty = assemble(groups, config, fmt, kl), {"reward/kl_mean": float(kl.mean())}
            with run.phase("train"):
                stats = learner.step(batch)
            with run.phase("sync"):
                update = weights.push(version=step + 1)

            metrics = {
                **rollout_metrics(groups, fmt, version=step),
                **window_metrics(window),
                **engines.metrics(),
                **stats,
                **penalty,
                "sync/seconds": update.seconds,
                "sync/mib": update.bytes / 2**20,
            }
            if held_out and is_due(step + 1, config.eval.interval, config.steps):
                metrics |= held_out_accuracy(step + 1).metrics()
            run.save_groups(step + 1, groups)
            run.log(step + 1, metrics)
            check_mismatch(config, run, step + 1, stats, groups)
            if is_due(step + 1, config.checkpoint.interval, config.steps):
                with run.phase("checkpoint"):
                    save(run, step + 1, stream, window, learner, config)

        with run.phase("export"):
            model = learner.save_hf(run.folder / "hf")
            finish_folder(model, run.folder, step=config.steps)
            return model


def start(config: RlConfig, run: Run, parts: ExitStack) -> tuple[Learner, RolloutPool, RewardPool]:
    """Bring learner, engines and verifiers up side by side: each takes seconds to minutes."""
    connect()
    with ThreadPoolExecutor(3) as threads:
        starting = (
            threads.submit(Learner, config),
            threads.submit(RolloutPool, config.rollout, config.format, str(config.model)),
            threads.submit(RewardPool, config.rewards),
        )
    for part in starting:
        if part.exception() is None:
            parts.callback(part.result().close)
    learner, engines, rewards = starting
    return learner.result(), engines.result(), rewards.result()


def fill(window: GroupWindow, stream: ProblemStream, config: RlConfig) -> None:
    """Start as many groups as the window has room for."""
    for serial, problem in stream.take(window.room()):
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
    )
    return result


def save(run: Run, step: int, stream: ProblemStream, window: GroupWindow, learner: Learner, config: RlConfig) -> None:
    """Write a checkpoint from which the next step goes on as if nothing had happened."""
    state = RunState(step=step, cursor=stream.cursor, pending=tuple(window.pending()))
    save_checkpoint(run.folder, state, learner, keep=config.checkpoint.keep)


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
    parser = argparse.ArgumentParser(prog="python -m memento.rl.train", description="An RL run under eviction.")
    parser.add_argument("config", help="a YAML file, e.g. configs/rl/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="e.g. learner.lr=1e-4 steps=100")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run folder")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        if not isinstance(config, RlConfig):
            raise UserError(f"{options.config} describes a {config.kind} run. `memento {config.kind}` runs it.")
        folder = train(config, resume=options.resume)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"model: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
