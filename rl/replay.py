"""Halves of the loop, alone: to debug one without the other, and to see that nothing moves when nothing should.

    memento replay CONFIG --rollouts runs/rl/rollouts.jsonl out=runs/again     trains on recorded groups; no engine
    memento record CONFIG out=runs/recorded                                    rollouts and rewards; no learner
    memento drift CONFIG out=runs/drift                                        the whole loop at learning rate 0

A replay of a run's own rollouts from the model it started from gives its losses again, so a learner can be changed, or
looked at in a debugger, without an engine in the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from memento.cluster import connect
from memento.config import RlConfig, override_config
from memento.errors import RunFailed, UserError
from memento.preflight import check_model, check_reference, check_run, load_tokenizer
from memento.problems import Record, explain
from memento.rewards.pool import RewardPool
from memento.rewards.scoring import check_terms, load_verified
from memento.rl.checkpoint import RunState, latest_checkpoint, load_state, save_checkpoint
from memento.rl.export import finish_folder
from memento.rl.learner import Learner
from memento.rl.metrics import resident_mib, rollout_metrics
from memento.rl.train import (
    check_mismatch,
    is_due,
    learn,
    next_groups,
    open_window,
    profiled,
    restore,
    save,
    train,
    window_metrics,
)
from memento.rollout.pool import RolloutPool
from memento.run import Run, read_metrics
from memento.trajectory import ScoredGroup

# ---------------------------------------------------------------------------------------------- the learner alone


def replay(config: RlConfig, rollouts: str | Path, *, resume: bool = False) -> Path:
    """Train on the scored groups of a file, `groups_per_step` at a time and in its order. No engine is started.

    Args:
        config: as for `memento.rl.train.train`; ``steps`` is an upper bound. Of the engines only `format` is read.
        rollouts: a run's ``rollouts.jsonl``, or what `memento score --out` wrote.
        resume: go on from the newest checkpoint in ``config.out``.

    Returns:
        The folder of the exported model.

    Raises:
        UserError: the file holds no scored groups, or others than this config and model can be trained on.
        MismatchAlarm, LearnerError: as in training.
    """
    check_model(config.model)
    if config.reference is not None:
        check_reference(config.reference, config.model)
    fmt = config.format.bind(load_tokenizer(config.model))
    steps = min(config.steps, count_groups(rollouts, config) // config.groups_per_step)
    with Run.open(config, resume=resume) as run, ExitStack() as parts:
        run.total_steps = steps
        with run.phase("start"):
            connect()
            learner = Learner(config)
            parts.callback(learner.close)
            state = restore(run, learner) if resume else RunState()
        groups = read_groups(rollouts, config)
        for _ in islice(groups, state.step * config.groups_per_step):
            pass
        for step in range(state.step, steps):
            taken = list(islice(groups, config.groups_per_step))
            with profiled(run, learner, step + 1):
                stats = learn(run, taken, config, fmt, learner)
            run.log(step + 1, {**rollout_metrics(taken, fmt), **stats, "memory/driver_rss_mib": resident_mib()})
            check_mismatch(config, run, step + 1, stats, taken)
            if run.stopping or is_due(step + 1, config.checkpoint.interval, steps):
                with run.phase("checkpoint"):
                    save(run, state.model_copy(update={"step": step + 1}), learner)
            if run.stopping:
                run.stop()
        with run.phase("export"):
            model = learner.save_hf(run.folder / "hf")
            finish_folder(model, run.folder, step=steps)
        run.say(f"model: {model}")
        return model


def count_groups(rollouts: str | Path, config: RlConfig) -> int:
    """How many groups a file holds, the first of them looked at: what can be known before anything is started.

    Raises:
        UserError: no such file, no scored group in it, or fewer than a step takes; the first one does not fit.
    """
    path = Path(rollouts)
    if not path.is_file():
        raise UserError(f"there is no rollout file at {path}; a run's is rollouts.jsonl.")
    with path.open("rb") as lines:
        count = sum(1 for line in lines if line.strip())
    if count:
        next(read_groups(path, config), None)
    if count < config.groups_per_step:
        raise UserError(
            f"{path} holds {count} groups, and a step takes {config.groups_per_step}: lower groups_per_step."
        )
    return count


def read_groups(rollouts: str | Path, config: RlConfig) -> Iterator[ScoredGroup]:
    """The groups of a file one by one.

    Raises:
        UserError: a line that is no scored group, or one that this config and model cannot be trained on: a group of
            another size, without a score, sampled at another temperature, or with ids that the model does not have.
            The message names file and line.
    """
    rows = _vocabulary_rows(config.model)
    with Path(rollouts).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{rollouts}, line {number}"
            if '"trajectories"' not in line:
                raise UserError(f"{where}: no scored group. Trajectories get their rewards by `memento score --out`.")
            try:
                group = ScoredGroup.model_validate_json(line)
            except ValidationError as error:
                raise UserError(f"{where} is not a scored group: {explain(error)}.") from error
            fault = _fault(group, config, rows)
            if fault is not None:
                raise UserError(f"{where}: {fault}.")
            yield group


def _vocabulary_rows(model: str | Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(str(model)).get_text_config().vocab_size)


def _fault(group: ScoredGroup, config: RlConfig, rows: int) -> str | None:
    """Why a group cannot be replayed, or None."""
    if len(group.trajectories) != config.group_size:
        return f"a group of {len(group.trajectories)} completions, and group_size is {config.group_size}"
    if not group.complete:
        failed = sorted({reward.outcome.value for reward in group.rewards if reward.score is None})
        return f"a group with a completion that has no score ({', '.join(failed)})"
    for trajectory in group.trajectories:
        if trajectory.temperature != config.sampling.temperature:
            return f"sampled at {trajectory.temperature}, and sampling.temperature is {config.sampling.temperature}"
        if max(trajectory.token_ids) >= rows:
            return f"token id {max(trajectory.token_ids)}, and {config.model} has {rows}: another model's rollouts"
    return None


# ---------------------------------------------------------------------------------------------- the engines alone


class NoLearner:
    """What a checkpoint holds of the learner where there is none."""

    def save(self, folder: str | Path) -> None:
        """Nothing: the engines keep the weights of ``config.model``."""


def record(config: RlConfig, *, resume: bool = False) -> Path:
    """The rollouts and rewards of a run whose weights stay those of ``config.model``.

    The same problems and seeds as in training: at ``max_lag: 0`` the first step's completions are those of the run.

    Args:
        config: as for `memento.rl.train.train`; `algorithm` and `learner` are not read.
        resume: go on in ``config.out``.

    Returns:
        The file, ``config.out / "rollouts.jsonl"``, which `replay` trains on.
    """
    if config.save_rollouts != "all":
        raise UserError(f"a recording with save_rollouts: {config.save_rollouts} would record little; set it to all.")
    fmt = check_run(config)
    check_terms(config.rewards)
    problems = load_verified(config.problems, config.rewards).problems
    with Run.open(config, resume=resume) as run, ExitStack() as parts:
        with run.phase("start"):
            connect()
            engines = RolloutPool(config.rollout, config.format, str(config.model))
            parts.callback(engines.close)
            rewards = RewardPool(config.rewards)
            parts.callback(rewards.close)
            rewards.check()
            checkpoint = latest_checkpoint(run.folder) if resume else None
            state = load_state(checkpoint) if checkpoint is not None else RunState()
        stream, window = open_window(config, fmt, state, problems, engines, rewards)
        parts.callback(window.close)
        for step in range(state.step, config.steps):
            groups = next_groups(run, window, stream, config, step, version=0)
            done = step if groups is None else step + 1
            if groups is not None:
                run.save_groups(done, groups)
                metrics = rollout_metrics(groups, fmt, version=0) | window_metrics(window)
                run.log(done, metrics | engines.metrics() | rewards.metrics())
            if groups is None or is_due(done, config.checkpoint.interval, config.steps):
                save_checkpoint(run.folder, state.at(done, stream, window), NoLearner(), keep=config.checkpoint.keep)
            if groups is None:
                run.stop()
        run.say(f"rollouts: {run.folder / 'rollouts.jsonl'}")
        return run.folder / "rollouts.jsonl"


# ---------------------------------------------------------------------------------------------- nothing should move


DRIFT_KL = {"float32": 1e-6, "bfloat16": 1e-2}
"""Mean mismatch KL that rounding explains, by the learner's dtype, where the config names no limit."""


class DriftReport(Record):
    """What a run at learning rate 0 did. Weights and ratio must not move; the mismatch is rounding, at every step.

    Attributes:
        weights_unchanged: every tensor of the exported model equals that of the model it started from, bit by bit.
        mismatch_kl: mean KL between engine and learner, each step.
        max_abs_logprob_diff: largest difference of a token, each step.
        ratio_min, ratio_max: of the importance ratio over all steps; 1 up to rounding.
        limit: what `mismatch_kl` may be.
    """

    weights_unchanged: bool
    mismatch_kl: tuple[float, ...]
    max_abs_logprob_diff: tuple[float, ...]
    ratio_min: float
    ratio_max: float
    limit: float

    @property
    def faults(self) -> tuple[str, ...]:
        """What moved that should not have."""
        found = [] if self.weights_unchanged else ["the weights changed at learning rate 0"]
        if max(self.mismatch_kl) > self.limit:
            found.append(f"the mean mismatch KL reached {max(self.mismatch_kl):.3g}, above {self.limit:.3g}")
        if not 0.999 < self.ratio_min <= self.ratio_max < 1.001:
            found.append(f"the importance ratio went from {self.ratio_min:.6g} to {self.ratio_max:.6g}")
        return tuple(found)


def drift(config: RlConfig, steps: int = 3) -> DriftReport:
    """Run the whole loop, weight sync included, at learning rate 0, and look at what moved.

    Args:
        config: as for training; learning rate, steps, evaluation and the mismatch limit are replaced.
        steps: how many.
    """
    names = ["learner.lr=0", f"steps={steps}", "eval.problems=null", "algorithm.mismatch_kl_limit=null"]
    still = override_config(config, names, "drift")
    assert isinstance(still, RlConfig)
    model = train(still)
    rows = [row for row in read_metrics(still.out) if "mismatch/kl_mean" in row]

    def column(name: str) -> tuple[float, ...]:
        values = [row.get(name) for row in rows]
        if not values or any(value is None for value in values):
            raise RunFailed(f"{still.out}: {name} is missing from a step's metrics; see rollouts.jsonl there.")
        return tuple(float(value) for value in values if value is not None)

    return DriftReport(
        weights_unchanged=_same_weights(config.model, model, config.learner.dtype),
        mismatch_kl=column("mismatch/kl_mean"),
        max_abs_logprob_diff=column("mismatch/max_abs_logprob_diff"),
        ratio_min=min(column("ratio/min")),
        ratio_max=max(column("ratio/max")),
        limit=config.algorithm.mismatch_kl_limit or DRIFT_KL[config.learner.dtype],
    )


def drift_table(report: DriftReport) -> Sequence[str]:
    """The report as lines for a terminal."""
    lines = [f"{'step':>4}  {'mismatch KL, mean':>18}  {'worst token':>12}"]
    for step, (kl, worst) in enumerate(zip(report.mismatch_kl, report.max_abs_logprob_diff, strict=True), 1):
        lines.append(f"{step:>4}  {kl:>18.3g}  {worst:>12.3g}")
    lines.append(f"importance ratio {report.ratio_min:.7g} to {report.ratio_max:.7g}")
    lines.append("weights: " + ("unchanged, bit by bit" if report.weights_unchanged else "CHANGED"))
    return lines


def _same_weights(before: str | Path, after: str | Path, dtype: str) -> bool:
    import torch
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(str(folder), dtype=getattr(torch, dtype)) for folder in (before, after)
    ]
    one, other = (dict(model.named_parameters()) for model in models)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
