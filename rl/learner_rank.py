"""One data-parallel rank of the learner: a DeepSpeed engine inside a Ray actor.

The driver's side is `memento.rl.learner`. Ranks talk to each other only through DeepSpeed's collectives; statistics go
back to the driver as tallies and are merged there.

What one optimiser step does, on every rank::

    for row in microbatches:                         the same number on every rank
        logprobs = policy(row)
        loss     = sum(loss_N * weights_N) / loss_tokens * ranks      DeepSpeed averages over ranks, so this is the sum
        backward                                     reduced over ranks at the boundary, i.e. after the last row
    clip, AdamW
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import random
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from memento.config import LearnerConfig, RlConfig
from memento.errors import UserError
from memento.rl.batch import MicroBatch
from memento.rl.lora import ExportedTensor, adapter_off, add_adapter, exported_tensors
from memento.rl.metrics import resident_mib
from memento.rl.objective import row_objective
from memento.rollout.channel_records import ChannelBroken, ChannelSettings, TensorSpec, address_for
from memento.rollout.weight_channel import Store, WeightChannel, open_store
from memento.rollout.weights import WeightUpdate, write_weights

if TYPE_CHECKING:
    from memento.kernels.hf import PackedPolicy

GATHER_BYTES = 256 * 2**20
"""ZeRO-3: parameters are made whole this many bytes at a time, never the model."""

CHECKPOINT_TAG = "deepspeed"


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite. The message says where."""


@dataclass(slots=True)
class Tally:
    """Count, sum and extremes of a quantity; tallies of microbatches and ranks merge exactly."""

    count: int = 0
    total: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def add(self, values: torch.Tensor) -> None:
        """Count every element of `values`."""
        if values.numel():
            values = values.detach().double()
            self.merge(Tally(values.numel(), values.sum().item(), values.min().item(), values.max().item()))

    def merge(self, other: Tally) -> None:
        """Count what `other` has counted."""
        self.count += other.count
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    @property
    def mean(self) -> float:
        """NaN if nothing was counted: the caller leaves such a metric out."""
        return self.total / self.count if self.count else math.nan


@dataclass(slots=True)
class RankStats:
    """What one rank reports about one RL step.

    Attributes:
        tallies: per-token quantities over this rank's tokens.
        losses: for each minibatch this rank's share of the loss; the sum over ranks is the loss.
        grad_norms: of each optimiser step, over all ranks, before clipping.
        lr: of the last optimiser step.
        resident_mib: host memory of the rank's process, see `memento.rl.metrics.resident_mib`.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    lr: float = math.nan
    skipped_minibatches: int = 0
    optimizer_steps: int = 0
    resident_mib: float = 0.0

    def tally(self, name: str, values: torch.Tensor) -> None:
        """Count `values` under `name`."""
        self.tallies.setdefault(name, Tally()).add(values)


@dataclass(frozen=True, slots=True)
class CheckpointIdentity:
    """What must agree between a checkpoint and the learner that loads it."""

    ranks: int
    zero_stage: int
    dtype: str
    model: str
    """Digest of all parameter names and shapes."""


@dataclass(frozen=True, slots=True)
class RankInfo:
    """What a rank says once it is up."""

    parameters: int
    identity: CheckpointIdentity
    seconds: float


class LearnerRank:
    """The actor. Heavy imports happen in `start`, after the environment that DeepSpeed reads is set."""

    def __init__(self, config: RlConfig, rank: int, device: str) -> None:
        self.config, self.rank, self.ranks = config, rank, config.learner.ranks
        self.device = torch.device(device)
        self.profiler: torch.profiler.profile | None = None
        self.store: Store | None = None
        self.channel: WeightChannel | None = None

    def node(self) -> tuple[str, int]:
        """This machine's address and a free port on it, for the ranks' rendezvous."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, address: str, port: int) -> RankInfo:
        """Join the other ranks, load the model, build the DeepSpeed engine.

        Raises:
            UserError: a model with dropout, or one that the attention does not support.
        """
        started = time.monotonic()
        learner = self.config.learner
        on_cpu = self.device.type == "cpu"
        local = {"LOCAL_RANK": self.rank, "LOCAL_WORLD_SIZE": self.ranks} if on_cpu else {"LOCAL_RANK": 0}
        environment = {"RANK": self.rank, "WORLD_SIZE": self.ranks, "MASTER_ADDR": address, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in (environment | local).items()}
        if on_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
            torch.set_num_threads(max(1, int(learner.cpus)))
        import deepspeed
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed still uses names of collectives that torch has renamed: two lines a call, nothing we can act on.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        # Else it compiles a C++ extension for half a minute, even for one rank; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend="gloo" if on_cpu else "nccl",
            timeout=timedelta(seconds=learner.step_timeout_s),
            verbose=False,
        )
        # Before the policy: once ZeRO-3 is announced to transformers, every model it loads is sharded.
        self.reference = self._load_reference()
        settings = deepspeed_config(learner)
        if learner.zero_stage == 3:
            from transformers.integrations.deepspeed import HfDeepSpeedConfig

            self._keep = HfDeepSpeedConfig(settings)  # it announces ZeRO-3 for as long as it lives
        policy = self._load_model(self.config.model, lora=True)
        policy.model.train()
        if learner.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if learner.zero_stage == 3:
            # The head's weight is read outside of its own module's forward, where ZeRO-3 would not gather it.
            head: Any = policy.model.get_output_embeddings()
            deepspeed.zero.register_external_parameter(policy, head.weight)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=learner.lr, betas=learner.betas, eps=learner.eps, weight_decay=learner.weight_decay
        )
        # A client optimizer: DeepSpeed's own AdamW is a CUDA extension that it would compile first.
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory tables
            self.engine: Any = deepspeed.initialize(model=policy, optimizer=optimizer, config=settings)[0]
        self.policy = policy
        self.optimizer_steps = 0
        shapes = [(n, tuple(getattr(p, "ds_shape", p.shape))) for n, p in policy.model.named_parameters()]
        digest = hashlib.blake2b(json.dumps(shapes).encode(), digest_size=8).hexdigest()
        self.identity = CheckpointIdentity(self.ranks, learner.zero_stage, learner.dtype, digest)
        return RankInfo(sum(math.prod(s) for _, s in shapes), self.identity, time.monotonic() - started)

    def step(self, work: Sequence[tuple[Sequence[MicroBatch], int]], temperature: float) -> RankStats:
        """Train on this rank's part of one RL step: one optimiser step for each minibatch.

        Args:
            work: for each minibatch this rank's rows and the number of loss tokens over all ranks.
            temperature: at which all completions were sampled.

        Raises:
            NonFiniteError: before the optimiser step that it would have spoiled.
        """
        stats = RankStats()
        # The first minibatch meets the proximal policy itself, so its log-probabilities need no forward of their own.
        old = [
            [self._logprobs(self.engine, row, temperature) for row in rows] if i > 0 else [None] * len(rows)
            for i, (rows, _) in enumerate(work)
        ]
        reference: list[list[torch.Tensor]] | None = None
        if self.config.algorithm.kl_coef > 0 and self.config.algorithm.kl_in == "loss":
            with self._reference_policy() as policy:
                reference = [[self._logprobs(policy, row, temperature) for row in rows] for rows, _ in work]
        for i, (rows, loss_tokens) in enumerate(work):
            if loss_tokens == 0:  # everything masked: no mean exists, and AdamW would still move by its momentum
                stats.skipped_minibatches += 1
                continue
            stats.losses.append(0.0)
            for j, row in enumerate(rows):
                self.engine.set_gradient_accumulation_boundary(j == len(rows) - 1)
                reference_T = None if reference is None else reference[i][j]
                total = self._backward(row, old[i][j], reference_T, loss_tokens, temperature, stats)
                if not math.isfinite(total):
                    raise NonFiniteError(
                        f"the loss is {total} (minibatch {i}, microbatch {j} of rank {self.rank}, {row.tokens} tokens)"
                    )
                stats.losses[-1] += total / loss_tokens
                if j < len(rows) - 1:
                    self.engine.step()  # between boundaries it only counts
            self._optimizer_step(stats)
        stats.optimizer_steps = self.optimizer_steps
        stats.resident_mib = resident_mib()
        return stats

    def logprobs(
        self, rows: Sequence[MicroBatch], temperature: float, *, reference: bool = False
    ) -> list[torch.Tensor]:
        """Current log-probabilities of each row's tokens, fp32 [T] on the CPU; 0 at the first token of a document.

        With `reference` those of the reference policy, which there is only with ``algorithm.kl_coef`` > 0.
        """
        with self._reference_policy() if reference else contextlib.nullcontext(self.engine) as policy:
            return [self._logprobs(policy, row, temperature).cpu() for row in rows]

    def export_weights(self, folder: str, version: int) -> WeightUpdate | None:
        """Write all weights to `folder`; the update from rank 0, None from the others, which only help to gather."""
        if self.rank == 0:
            return write_weights(self._whole_parameters(), folder, version)
        for _ in self._whole_parameters():
            pass
        return None

    def tensor_specs(self) -> list[TensorSpec]:
        """What `export_weights` and `send_weights` give out, in order. All ranks must be asked together."""
        return [TensorSpec.of(name, tensor) for name, tensor in self._whole_parameters()]

    def open_store(self, timeout_s: float) -> tuple[str, int]:
        """Address and port of a new store on this machine, where the ends of a weight channel find each other."""
        import ray

        self.store = open_store(timeout_s)
        return ray.util.get_node_ip_address(), self.store.port

    def join_channel(self, settings: ChannelSettings) -> str | None:
        """Open this rank's end of a weight channel, if it has one; the reason if that failed."""
        self.channel = None
        if self.rank >= settings.senders:
            return None
        try:
            store = self.store if self.rank == 0 else None
            self.channel = WeightChannel(settings, self.rank, self.device, address_for(settings.address), store)
        except ChannelBroken as error:
            return f"learner rank {self.rank}: {error}"
        return None

    def send_weights(self, version: int) -> str | None:
        """Send all weights through the channel; the reason if they did not get through. All ranks must be asked."""
        tensors, reason = self._whole_parameters(), None
        if self.channel is not None:
            try:
                self.channel.send(tensors, version)
            except ChannelBroken as error:
                reason, self.channel = f"learner rank {self.rank}: {error}", None
        for _ in tensors:  # the other ranks gather them with this one
            pass
        return reason

    def start_profile(self) -> None:
        """Record what this rank does with torch's profiler until `stop_profile`."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities)
        self.profiler.start()

    def stop_profile(self, folder: str) -> None:
        """Write ``rank-R.json.gz``, a Chrome trace. Nothing if none was started (a run resumed inside the window)."""
        profiler, self.profiler = self.profiler, None
        if profiler is not None:
            profiler.stop()
            Path(folder).mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(Path(folder) / f"rank-{self.rank}.json.gz"))

    def save(self, folder: str) -> None:
        """Weights, optimiser, step count and this rank's random state, to `folder`."""
        path = Path(folder)
        client_state = {"optimizer_steps": self.optimizer_steps}
        self.engine.save_checkpoint(folder, tag=CHECKPOINT_TAG, client_state=client_state, save_latest=False)
        torch.save(_random_state(), path / f"random-{self.rank}.pt")
        if self.rank == 0:
            (path / "identity.json").write_text(json.dumps(asdict(self.identity)), encoding="utf-8")

    def load(self, folder: str, universal: str | None = None) -> None:
        """Go on exactly where `save` left off.

        Args:
            folder: of the checkpoint.
            universal: folder of its universal form, where it was written by another number of ranks.

        Raises:
            UserError: the checkpoint is torn.
        """
        random_file = Path(folder) / f"random-{self.rank}.pt"
        try:
            self.engine._config.load_universal_checkpoint = universal is not None
            loaded, client_state = self.engine.load_checkpoint(universal or folder, tag=CHECKPOINT_TAG)
            # A rank that was not there then has no state to go on with; training draws no random numbers.
            random_state = torch.load(random_file, weights_only=False) if random_file.exists() else None
        except (OSError, EOFError, RuntimeError) as error:
            raise UserError(f"the checkpoint {folder} cannot be read ({error}). Resume from an older one.") from error
        finally:
            self.engine._config.load_universal_checkpoint = False
        if loaded is None:
            raise UserError(f"the checkpoint {folder} holds no learner state. Resume from an older one.")
        self.optimizer_steps = int(client_state["optimizer_steps"])
        if random_state is not None:
            _set_random_state(random_state)

    def save_hf(self, folder: str) -> None:
        """A plain Hugging Face folder: safetensors, config, generation config, tokenizer. Rank 0 writes it."""
        state: dict[str, torch.Tensor] = {}
        for name, tensor in self._whole_parameters():
            if self.rank == 0:
                state[name] = tensor.to("cpu", copy=True)
        if self.rank != 0:
            return
        from transformers import AutoTokenizer

        model = self.policy.model
        # Off in training, where it would switch packing off; whoever loads the folder wants the model's own setting.
        model.config.use_cache = self._use_cache
        model.save_pretrained(folder, state_dict=state)
        model.config.use_cache = False
        AutoTokenizer.from_pretrained(self.config.model).save_pretrained(folder)

    def _load_reference(self) -> PackedPolicy | None:
        """The reference as a model of its own; None where there is none, or where it is the policy without adapter."""
        algorithm, learner = self.config.algorithm, self.config.learner
        if algorithm.kl_coef == 0 or (learner.lora is not None and self.config.reference is None):
            return None
        reference = self._load_model(self.config.reference or self.config.model).requires_grad_(False)
        return reference.cpu() if learner.offload_reference else reference

    @contextlib.contextmanager
    def _reference_policy(self) -> Iterator[nn.Module]:
        """The reference, ready for forward passes within the block."""
        if self.reference is not None:
            yield self.reference.to(self.device)
            if self.config.learner.offload_reference:
                self.reference.cpu()
        elif self.config.algorithm.kl_coef > 0:
            with adapter_off(self.policy.model):
                yield self.engine
        else:
            raise ValueError("there is no reference policy; algorithm.kl_coef is 0")

    def _load_model(self, source: Path | str, *, lora: bool = False) -> PackedPolicy:
        from transformers import AutoModelForCausalLM

        from memento.kernels.hf import PackedPolicy

        dtype = getattr(torch, self.config.learner.dtype)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        dropout = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
        if dropout:
            raise UserError(
                f"{source} has dropout in {dropout[0]}: the learner's log-probabilities would differ from "
                "the sampler's by chance. Set every dropout in its config.json to 0."
            )
        self._use_cache = model.config.use_cache
        if lora and self.config.learner.lora is not None:
            add_adapter(model, self.config.learner.lora, self.config.seed)
        try:
            return PackedPolicy(model).to(self.device)
        except ValueError as error:  # layers that the attention does not support: the message names them
            raise UserError(f"{source}: {error}") from error

    def _forward(self, policy: nn.Module, row: MicroBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        to = {"device": self.device, "non_blocking": True}
        return policy(
            input_ids=row.token_ids[None].to(**to),
            position_ids=row.positions[None].to(**to),
            visible_until=row.visible_until[None].to(**to),
            document=row.document[None].to(**to),
            temperature=temperature,
            chunk_tokens=self.config.learner.logprob_chunk_tokens,
        )

    @torch.no_grad()
    def _logprobs(self, policy: nn.Module, row: MicroBatch, temperature: float) -> torch.Tensor:
        return self._forward(policy, row, temperature)[0]

    def _backward(
        self,
        row: MicroBatch,
        old_T: torch.Tensor | None,
        reference_T: torch.Tensor | None,
        loss_tokens: int,
        temperature: float,
        stats: RankStats,
    ) -> float:
        """Accumulate the gradient of one row; returns the sum of its weighted token losses. NaN: nothing was done."""
        algorithm = self.config.algorithm
        logprobs_T, entropy_T = self._forward(self.engine, row, temperature)
        old_T = logprobs_T.detach() if old_T is None else old_T
        total, quantities = row_objective(row, logprobs_T, old_T, reference_T, algorithm)
        for name, values in quantities.items():
            stats.tally(name, values)
        stats.tally("entropy", entropy_T[row.loss_mask.to(self.device)])
        if math.isfinite(total.item()):
            self.engine.backward(total * (self.ranks / loss_tokens))
        return total.item()

    def _optimizer_step(self, stats: RankStats) -> None:
        """Close the accumulation window: clip, step. Called after the last backward of a minibatch."""
        learner = self.config.learner
        lr = learner.lr * min(1.0, (self.optimizer_steps + 1) / max(1, learner.warmup_steps))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        if learner.zero_stage == 0:  # without ZeRO DeepSpeed reports no norm; its clipping is off, see deepspeed_config
            norm = nn.utils.clip_grad_norm_(self.policy.parameters(), learner.max_grad_norm).item()
            self._refuse_non_finite(norm)
            self.engine.step()
        else:
            self.engine.step()
            norm = float(self.engine.get_global_grad_norm() or 0.0)  # None where every gradient is zero
            self._refuse_non_finite(norm)
        self.optimizer_steps += 1
        stats.grad_norms.append(norm)
        stats.lr = lr

    def _refuse_non_finite(self, norm: float) -> None:
        if not math.isfinite(norm):
            raise NonFiniteError(f"the gradient norm is {norm} (optimiser step {self.optimizer_steps + 1})")

    def _whole_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the model once under its Hugging Face name (tied ones under their first), adapters merged.

        All ranks must iterate. Under ZeRO-3 a tensor is whole only until the next one is asked for.
        """
        tensors = exported_tensors(self.policy.model)
        if self.config.learner.zero_stage < 3:
            for tensor in tensors:
                yield tensor.name, tensor.value()
            return
        import deepspeed

        for bucket in _buckets(tensors):
            parameters = [parameter for tensor in bucket for parameter in tensor.parameters]
            with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
                for tensor in bucket:
                    yield tensor.name, tensor.value().clone()


def _buckets(tensors: Sequence[ExportedTensor]) -> Iterator[list[ExportedTensor]]:
    """Cut at `GATHER_BYTES`; a larger tensor is a bucket of its own."""
    bucket: list[ExportedTensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += sum(cast(Any, p).ds_numel * p.element_size() for p in tensor.parameters)
        if size >= GATHER_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def deepspeed_config(learner: LearnerConfig) -> dict[str, Any]:
    """What DeepSpeed is told. Batch sizes are 1 because the accumulation boundary is set by hand (see the module)."""
    zero: dict[str, Any] = {"stage": learner.zero_stage}
    if learner.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if learner.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": learner.ranks,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": learner.max_grad_norm if learner.zero_stage > 0 else 0.0,
        "communication_data_type": "fp32",
    }
    if learner.dtype == "bfloat16":
        settings["bf16"] = {"enabled": True}
        if learner.zero_stage > 0:
            # Without it gradients of microbatches add up in bf16, and 8 x 1 no longer equals 1 x 8.
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _random_state() -> dict[str, Any]:
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
