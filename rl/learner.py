"""The learner, seen from the driver: a handle over one Ray actor per DeepSpeed rank.

    learner = Learner(config)
    stats   = learner.step(assemble(groups, config, fmt))
    update  = learner.export_weights(folder, version)

Every call reaches all ranks, has a deadline, and names its stage when a rank dies, hangs or refuses. After such a
failure the ranks are gone: what they held may be half a step, so the way on is the last checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from memento.config import RlConfig
from memento.errors import RunFailed, UserError
from memento.rl.batch import TrainBatch, sequence_kl
from memento.rl.checkpoint import UNIVERSAL, replace_folder
from memento.rl.learner_rank import CHECKPOINT_TAG, LearnerRank, NonFiniteError, RankInfo, RankStats, Tally
from memento.rollout.channel_records import LOOPBACK, ChannelBroken, ChannelSettings, TensorSpec
from memento.rollout.weights import WeightUpdate

CHECKPOINT_FOLDER = "learner"
"""Where the learner's part of a checkpoint lies inside the checkpoint's folder."""

FAILED_BATCH = "failed_batch.pt"
"""In the run folder: the batch that gave a loss that is no number."""


class LearnerError(RunFailed):
    """A rank died, hung or failed. The message names the stage and the rank. The learner is closed."""


class NonFiniteLoss(LearnerError):
    """The loss or the gradient is NaN or infinite. The message names the file that the batch was saved to."""


class Learner:
    """Trains one policy on `config.learner.ranks` ranks.

    Args:
        config: the run. `model`, `learner` and `algorithm` are read; `out` is where a failed batch is saved.
        places: further Ray options of each rank, from `memento.cluster.Reservation`. Empty: Ray places the ranks one by
            one.

    Raises:
        UserError: the model cannot be trained, or the cluster lacks the resources.
        LearnerError: the ranks did not come up in `learner.start_timeout_s`.

    Attributes:
        parameters: how many the policy has.
        start_s: seconds until all ranks were ready.
    """

    def __init__(self, config: RlConfig, places: Sequence[Mapping[str, Any]] = ()) -> None:
        import ray

        started = time.monotonic()
        self._config = config
        self._ranks: list[Any] = []
        learner = config.learner
        device = _device(learner.device, ray.cluster_resources())
        gpus = learner.gpu_fraction if device == "cuda" else 0.0
        options = {"num_cpus": learner.cpus, "num_gpus": gpus, "max_restarts": 0}
        _check_resources(learner.ranks, options, ray.cluster_resources())
        actor: Any = ray.remote(LearnerRank)
        where = places or [{}] * learner.ranks
        self._ranks = [actor.options(**options, **where[r]).remote(config, r, device) for r in range(learner.ranks)]
        nodes = self._call("placement", "node", timeout_s=learner.start_timeout_s)
        address, port = nodes[0]
        if len({node for node, _ in nodes}) == 1:
            address = LOOPBACK  # needs no name resolution, which containers often lack
        left_s = max(1.0, learner.start_timeout_s - (time.monotonic() - started))
        infos: list[RankInfo] = self._call("start", "start", address, port, timeout_s=left_s)
        self.parameters = infos[0].parameters
        self._identity = infos[0].identity
        self.start_s = time.monotonic() - started

    def step(self, batch: TrainBatch) -> dict[str, float]:
        """One RL step: an optimiser step for each minibatch.

        Returns:
            Over the step's loss tokens: ``train/{loss, grad_norm}`` (means over minibatches), ``train/{lr, entropy}``,
            ``ratio/{min, mean, max}``, ``clip/{low_fraction, high_fraction}``, ``advantage/{min, mean, max}``,
            ``train/kl_reference`` (k3; only with a KL penalty in the loss), ``train/loss_tokens``, and the sampler
            correction's ``mismatch/weight_mean``, ``mismatch/capped_fraction`` and, where it masks,
            ``mismatch/masked_fraction``. Over all sampled tokens, the sampler against the learner's weights before the
            step: ``mismatch/kl_mean`` and ``mismatch/kl_max`` (k3), ``mismatch/ratio_{min, mean, max}`` (learner over
            sampler), ``mismatch/max_abs_logprob_diff``. Beside them ``train/optimizer_steps`` (since the start of the
            run), ``train/skipped_minibatches`` (all tokens masked), ``learner/{seconds, tokens_per_s}`` and
            ``memory/learner_rss_mib`` (of the largest rank). A metric without tokens is left out.

        Raises:
            NonFiniteLoss: the loss or gradient is NaN or infinite; the batch is saved in the run folder.
            LearnerError: a rank died, hung or failed.
        """
        import ray

        started = time.monotonic()
        if any(len(m.ranks) != len(self._ranks) for m in batch.minibatches):
            raise ValueError(f"the batch was not assembled for {len(self._ranks)} ranks")
        shares = [ray.put(batch.for_rank(rank)) for rank in range(len(self._ranks))]
        references = [
            actor.step.remote(share, batch.temperature) for actor, share in zip(self._ranks, shares, strict=True)
        ]
        try:
            stats: list[RankStats] = self._collect("step", references, self._config.learner.step_timeout_s)
        except NonFiniteError as error:
            file = Path(self._config.out) / FAILED_BATCH
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(batch, file)
            raise NonFiniteLoss(
                f"{error}. Training stopped before the weights were saved; the batch is in {file}, and the last "
                "checkpoint is intact."
            ) from error
        seconds = time.monotonic() - started
        return merge_stats(stats) | {
            "train/loss_tokens": float(sum(m.loss_tokens for m in batch.minibatches)),
            "learner/seconds": seconds,
            "learner/tokens_per_s": batch.tokens / seconds,
        }

    def logprobs(self, batch: TrainBatch, *, reference: bool = False) -> list[list[list[torch.Tensor]]]:
        """Log-probabilities under the current weights, shaped like the batch: minibatch, rank, microbatch, fp32 [T].

        0 at the first token of each document, which has no distribution. With `reference` those of the reference
        policy, which there is only with ``algorithm.kl_coef`` > 0.
        """
        limit = self._config.learner.step_timeout_s
        return [
            self._collect(
                "logprobs",
                [
                    actor.logprobs.remote(rows, batch.temperature, reference=reference)
                    for actor, rows in zip(self._ranks, minibatch.ranks, strict=True)
                ],
                limit,
            )
            for minibatch in batch.minibatches
        ]

    def sequence_kl(self, batch: TrainBatch) -> torch.Tensor:
        """KL(policy || reference) of each completion, [groups x group_size], for ``algorithm.kl_in: reward``.

        `assemble` takes it off the rewards; see `memento.rl.batch.sequence_kl`.
        """
        reference = self.logprobs(batch, reference=True)
        return sequence_kl(batch, self.logprobs(batch), reference, self._config.algorithm.kl_estimator)

    def export_weights(self, folder: str | Path, version: int) -> WeightUpdate:
        """Write the current weights for the engines; see `memento.rollout.weights`."""
        updates = self._call("export_weights", "export_weights", str(folder), version)
        return next(update for update in updates if update is not None)

    def tensor_specs(self) -> tuple[TensorSpec, ...]:
        """The tensors of the model, as `send_weights` sends them."""
        return tuple(self._call("tensor_specs", "tensor_specs")[0])

    def open_store(self, timeout_s: float) -> tuple[str, int]:
        """Address and port on rank 0 where the ends of a weight channel find each other; the one before is closed."""
        limit = self._config.learner.step_timeout_s
        return self._collect("open_store", [rank.open_store.remote(timeout_s) for rank in self._ranks[:1]], limit)[0]

    def join_channel(self, settings: ChannelSettings) -> None:
        """Open the learner's ends of a channel. Returns when all ends are there.

        Raises:
            ChannelBroken: they were not. The learner goes on.
        """
        self._raise_broken(self._call("join_channel", "join_channel", settings))

    def send_weights(self, version: int) -> None:
        """Send the current weights through the channel.

        Raises:
            ChannelBroken: they did not get through. The learner goes on.
        """
        self._raise_broken(self._call("send_weights", "send_weights", version))

    def _raise_broken(self, reasons: Sequence[str | None]) -> None:
        if found := [reason for reason in reasons if reason]:
            raise ChannelBroken("; ".join(found))

    def start_profile(self) -> None:
        """Record the ranks with torch's profiler from here on."""
        self._call("start_profile", "start_profile")

    def stop_profile(self, folder: str | Path) -> Path:
        """Stop recording, and write a Chrome trace a rank into `folder`."""
        self._call("stop_profile", "stop_profile", str(folder))
        return Path(folder)

    def save(self, folder: str | Path) -> None:
        """Write weights, optimiser, step count and random states into ``folder/learner``."""
        target = Path(folder) / CHECKPOINT_FOLDER
        target.mkdir(parents=True, exist_ok=True)
        self._call("save", "save", str(target))

    def load(self, folder: str | Path) -> None:
        """Go on exactly where `save` left off.

        Raises:
            UserError: no checkpoint, a torn one, or one of another model, adapter, ZeRO stage or dtype. Another number
                of ranks is taken, by way of DeepSpeed's universal checkpoint.
        """
        source = Path(folder) / CHECKPOINT_FOLDER
        try:
            saved = json.loads((source / "identity.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is not a complete checkpoint: {error}.") from error
        names = {"zero_stage": "learner.zero_stage", "dtype": "learner.dtype"}
        here = asdict(self._identity)
        for key in ("zero_stage", "dtype", "model"):
            if saved.get(key) != here[key]:
                what = f"{names[key]} = {saved.get(key)}, this run has {here[key]}" if key in names else "another model"
                raise UserError(f"the checkpoint {folder} was written with {what}.")
        if saved.get("ranks") == here["ranks"] or here["zero_stage"] == 0:  # without ZeRO every rank has everything
            self._call("load", "load", str(source))
            return
        # Beside the checkpoint: on a cluster the ranks read it from there, and this machine's own disk may be small.
        with tempfile.TemporaryDirectory(prefix=UNIVERSAL, dir=Path(folder).parent) as aside:
            to_universal(source / CHECKPOINT_TAG, Path(aside) / CHECKPOINT_TAG)
            self._call("load", "load", str(source), aside)

    def save_hf(self, folder: str | Path) -> Path:
        """Write a plain Hugging Face folder: safetensors, config, generation config, tokenizer, chat template.

        A folder that is there already is replaced once the new one is complete.
        """
        with replace_folder(Path(folder)) as aside:
            self._call("save_hf", "save_hf", str(aside))
        return Path(folder)

    def close(self) -> None:
        """End the ranks. Calling it again does nothing."""
        import ray

        ranks, self._ranks = self._ranks, []
        for actor in ranks:
            ray.kill(actor)

    def _call(self, stage: str, method: str, *arguments: object, timeout_s: float | None = None) -> list[Any]:
        references = [getattr(actor, method).remote(*arguments) for actor in self._ranks]
        return self._collect(stage, references, timeout_s or self._config.learner.step_timeout_s)

    def _collect(self, stage: str, references: Sequence[Any], timeout_s: float) -> list[Any]:
        """The answers of all ranks. The first failure ends the rest: they may wait for the failed one for ever."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        if not references:
            raise LearnerError(f"the learner was asked for {stage}, but it is closed")
        deadline = time.monotonic() + timeout_s
        waiting = list(references)
        try:
            while waiting:
                done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
                if not done:
                    late = ", ".join(str(references.index(reference)) for reference in waiting)
                    raise LearnerError(f"learner rank {late} did not finish {stage} within {timeout_s:g} s")
                for reference in done:
                    rank = references.index(reference)
                    try:
                        ray.get(reference)
                    except RayTaskError as error:
                        if isinstance(error.cause, UserError | NonFiniteError):
                            raise error.cause from None
                        raise LearnerError(f"learner rank {rank} failed during {stage}: {error.cause!r}") from error
                    except RayActorError as error:
                        raise LearnerError(f"learner rank {rank} died during {stage}: {error}") from error
            return ray.get(list(references))
        except BaseException:
            self.close()
            raise


def to_universal(checkpoint: Path, target: Path) -> None:
    """Write DeepSpeed's ZeRO checkpoint in its universal form: one file for each parameter and optimiser state.

    Raises:
        UserError: the checkpoint is torn.
    """
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal

    arguments = Namespace(
        input_folder=str(checkpoint),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # what only Megatron's models bring along; there is none of it here
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # progress bars
            ds_to_universal.main(arguments)
    except (OSError, EOFError, RuntimeError, AssertionError, KeyError) as error:
        raise UserError(
            f"the checkpoint {checkpoint.parent} cannot be read ({error!r}). Resume from an older one."
        ) from error


def merge_stats(ranks: Sequence[RankStats]) -> dict[str, float]:
    """The metrics of one step from what each rank reports; see `Learner.step`."""
    tallies: dict[str, Tally] = {}
    for stats in ranks:
        for name, tally in stats.tallies.items():
            tallies.setdefault(name, Tally()).merge(tally)
    first = ranks[0]
    metrics: dict[str, float] = {
        "train/optimizer_steps": first.optimizer_steps,
        "train/skipped_minibatches": first.skipped_minibatches,
        "memory/learner_rss_mib": max(stats.resident_mib for stats in ranks),
    }
    if first.losses:
        losses = [sum(shares) for shares in zip(*(stats.losses for stats in ranks), strict=True)]
        metrics |= {"train/loss": sum(losses) / len(losses), "train/lr": first.lr}
        metrics["train/grad_norm"] = sum(first.grad_norms) / len(first.grad_norms)
    means = {
        "entropy": "train/entropy",
        "ratio": "ratio/mean",
        "clip_low": "clip/low_fraction",
        "clip_high": "clip/high_fraction",
        "advantage": "advantage/mean",
        "kl_reference": "train/kl_reference",
        "mismatch/kl": "mismatch/kl_mean",
        "mismatch/ratio": "mismatch/ratio_mean",
        "mismatch/weight": "mismatch/weight_mean",
        "mismatch/capped": "mismatch/capped_fraction",
        "mismatch/masked": "mismatch/masked_fraction",
    }
    lows = {"ratio": "ratio/min", "advantage": "advantage/min", "mismatch/ratio": "mismatch/ratio_min"}
    highs = {
        "ratio": "ratio/max",
        "advantage": "advantage/max",
        "mismatch/kl": "mismatch/kl_max",
        "mismatch/ratio": "mismatch/ratio_max",
        "mismatch/abs_logprob_diff": "mismatch/max_abs_logprob_diff",
    }
    for name, tally in tallies.items():
        for names, value in ((means, tally.mean), (lows, tally.low), (highs, tally.high)):
            if name in names and math.isfinite(value):
                metrics[names[name]] = value
    return {name: float(value) for name, value in metrics.items()}


def _device(wanted: str, resources: Mapping[str, float]) -> str:
    if wanted != "auto":
        return wanted
    return "cuda" if resources.get("GPU", 0) >= 1 else "cpu"


def _check_resources(ranks: int, each: Mapping[str, float], there: Mapping[str, float]) -> None:
    """A pending actor waits for ever, without a word."""
    for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        if ranks * each[key] > there.get(name, 0):
            raise UserError(
                f"{ranks} learner ranks need {ranks * each[key]:g} {name}, the Ray cluster has {there.get(name, 0):g} "
                "in total. Lower learner.ranks or learner.cpus, or start a larger cluster."
            )
