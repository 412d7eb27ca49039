"""The typed configuration tree: one frozen schema, YAML files, dotted overrides, unknown keys are errors.

    config = load_config("configs/rl/quickstart.yaml", ["learner.lr=1e-4", "steps=5"])

Every field's default and meaning is here and nowhere else. Nothing edits a config after it is loaded; the resolved
tree is saved in the run folder, and that file runs the same run again. This module imports no torch, vLLM or Ray, so
that `memento show` answers at once and a bad key fails before anything is allocated.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from memento.errors import UserError
from memento.format import MementoFormat
from memento.trajectory import SamplingParams


class Section(BaseModel):
    """A frozen section of the tree. Docstrings under the fields are part of the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FormatConfig(Section):
    """How the four delimiters are used (`memento.format.MementoFormat`)."""

    evict_delimiters: bool = False
    """Also evict a block's own delimiters. Qwen3 and Olmo 3: false, Phi: true."""
    keep_last_n: int = Field(default=0, ge=-1)
    """Completed blocks that stay visible. 0 is the method, -1 never evicts."""
    max_block_tokens: int | None = Field(default=None, gt=0)
    """Block cap: a longer block is closed by force. null for no cap."""

    def bind(self, tokenizer: Any) -> MementoFormat:
        """The format with the ids of this Hugging Face tokenizer. Errors as `MementoFormat.from_tokenizer`."""
        return MementoFormat.from_tokenizer(
            tokenizer,
            evict_delimiters=self.evict_delimiters,
            keep_last_n=self.keep_last_n,
            max_block_tokens=self.max_block_tokens,
        )


class ArithmeticConfig(Section):
    """The generated problem family of the quickstart: sums of two-digit terms, modulo a power of ten."""

    min_terms: int = Field(default=5, ge=2)
    max_terms: int = Field(default=7, ge=2)
    digits: int = Field(default=2, ge=1, le=4)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_terms < self.min_terms:
            raise ValueError(f"max_terms ({self.max_terms}) is smaller than min_terms ({self.min_terms})")
        return self


class ProblemsConfig(Section):
    """Where problems come from: a file, a folder, the hub, or the generated family (docs/rewards.md)."""

    path: Path | str | None = None
    """A file (JSONL, JSON, Parquet, CSV), a folder of them, the name of a known set (`gsm8k`, `math500`, ...) or a hub
    id (`organisation/name`)."""
    arithmetic: ArithmeticConfig | None = None
    """Generate them instead."""
    set: str = "auto"
    """How columns become problems: the name of a known set; `auto` recognises it by its columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """For a set that is not known: field of a problem -> column, e.g. {prompt: question, answer: final}. Fields: id,
    prompt, answer."""
    kind: Literal["math", "choice"] = "math"
    """Of problems read by `columns`."""
    subset: str | None = None
    """Configuration of a hub data set. null: the known one, or its only one."""
    split: str | None = None
    """Split of a hub data set or folder, e.g. test. null: the known one, or the only one there is."""
    instruction: str | None = None
    """Put below every prompt. null: what the known set asks for (a boxed answer); nothing for our own files."""
    exclude: tuple[str, ...] = ()
    """Leave out problems that are also here: files, folders, known sets or hub ids. By id and by normalised text."""
    skip_bad: bool = False
    """Leave out, and count, rows that are no problem and golds nobody could match. false: the first is an error."""
    count: int | None = Field(default=None, gt=0)
    """How many: the first that are left, or that many generated. null takes all (4096 generated)."""
    seed: int = 0
    """Seed of generated problems. Training and evaluation seeds give disjoint problems."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.arithmetic is None):
            raise ValueError("give either `path` (a file, folder, set or hub id) or `arithmetic` (generated problems)")
        if self.columns and not {"prompt", "answer"} <= set(self.columns) <= {"id", "prompt", "answer"}:
            raise ValueError(f"columns names prompt and answer, and perhaps id; got {', '.join(self.columns)}")
        if self.columns and self.set != "auto":
            raise ValueError(f"set {self.set} knows its columns; leave out either `set` or `columns`")
        return self


class SamplingConfig(Section):
    """How training rollouts are sampled. top-p and top-k are absent on purpose: truncated sampling biases the ratio."""

    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits in the engine and in the learner alike."""
    max_tokens: int = Field(default=31_744, gt=0)
    """Completion tokens, at most."""
    top_p: float = 1.0
    """Must be 1 in training: the learner's log-probabilities are those of the full distribution."""
    top_k: int = -1
    """Must be -1 in training, for the same reason."""

    @model_validator(mode="after")
    def _untruncated(self) -> Self:
        if self.top_p != 1.0 or self.top_k != -1:
            raise ValueError(
                "training samples from the full distribution: top_p must be 1 and top_k -1, otherwise sampler and "
                "learner log-probabilities differ by the log of the kept mass. Use them in `eval` instead"
            )
        return self

    def params(self) -> SamplingParams:
        """The record that goes to the engine."""
        return SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens)


class RolloutConfig(Section):
    """The vLLM engines."""

    engines: int = Field(default=1, gt=0)
    """Number of engines, each a Ray actor."""
    evict: bool = True
    """Evict finished blocks. false runs the same requests with full attention."""
    restart: bool = False
    """An ablation, for evaluation only: after an eviction what is kept is computed again, so that mementos no longer
    hold what they saw of their block."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    cpus: float = Field(default=1.0, ge=0)
    """CPU cores reserved for one engine."""
    tensor_parallel_size: int = Field(default=1, gt=0)
    """GPUs of one engine (ignored on CPU)."""
    gpu_fraction: float = Field(default=1.0, gt=0, le=1)
    """Of its GPU that an engine takes. Below 1 it shares the GPU with a learner rank, or with other engines, whose
    shares leave room for it: lower gpu_memory_utilization too."""
    max_model_len: int | None = Field(default=None, gt=0)
    """Logical tokens of prompt and completion together. null: the model's own limit."""
    kv_cache_mib: int | None = Field(default=None, gt=0)
    """KV pool. null: vLLM's own rule (`gpu_memory_utilization`); on CPU 1024."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    block_size: int | None = Field(default=None, gt=0)
    """Tokens of a KV page. null: vLLM's default. Small pages free more of a block (32 on CPU)."""
    max_num_seqs: int = Field(default=256, gt=0)
    """Requests that run at once in one engine."""
    max_num_batched_tokens: int | None = Field(default=None, gt=0)
    enforce_eager: bool = True
    """No CUDA graphs, no compilation."""
    sleep: bool = False
    """While the learner trains, engines move their weights to host memory and give up the KV pool (vLLM's sleep mode):
    for engines that share a GPU with a rank. Needs max_lag 0. On a CPU it frees nothing."""
    engine_process: bool = False
    """Run the engine core in a process of its own (vLLM's AsyncLLM), apart from the actor's Python."""
    start_timeout_s: float = Field(default=600, gt=0)
    """An engine that is not up by then fails the run, with the reason."""
    progress_timeout_s: float = Field(default=300, gt=0)
    """An engine that has work and makes no step for so long, or does not answer, is killed and started again."""
    request_timeout_s: float = Field(default=3600, gt=0)
    """A group that is not finished by then is retried on another engine."""
    max_restarts: int = Field(default=3, ge=0)
    """How often Ray restarts a dead engine. It gets the current weights before it takes work."""

    @property
    def gpus(self) -> float:
        """GPUs that one engine reserves, where its device is cuda."""
        return self.tensor_parallel_size * self.gpu_fraction

    @model_validator(mode="after")
    def _whole_gpus(self) -> Self:
        if self.tensor_parallel_size > 1 and self.gpu_fraction < 1:
            raise ValueError(
                f"gpu_fraction ({self.gpu_fraction:g}) is for engines of one GPU; tensor_parallel_size is "
                f"{self.tensor_parallel_size}"
            )
        return self


class RewardTermConfig(Section):
    """One term of a composed reward: a score, how much it weighs, whether it is a gate (docs/rewards.md)."""

    kind: Literal["verifier", "well_formed", "memento_length", "block_length", "custom"]
    """verifier: that of the problem's kind (math, code, choice). well_formed: complete blocks over blocks and faults.
    memento_length, block_length: how well lengths keep to [low, high]. custom: a Python function."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z][\w-]*$")
    """In metrics: reward/part/<name>. null: the kind."""
    weight: float = 1.0
    """The reward is the sum of weight x score."""
    gate: float | None = None
    """The whole reward is 0 where this term scores less. null: no gate."""
    part: str | None = None
    """Of a verifier or custom term: take this part of its result, e.g. tests_passed, where it has it."""
    low: int | None = Field(default=None, gt=0)
    """Tokens a memento or block should have at least."""
    high: int | None = Field(default=None, gt=0)
    """Tokens it should have at most."""
    function: str | None = Field(default=None, pattern=r"^[\w.]+:[\w.]+$")
    """Of a custom term: `module:function`, called as function(problem=..., completion=...) in a worker of its own."""
    workers: int = Field(default=1, gt=0)
    """Worker processes of a custom term, in each reward actor."""
    timeout_s: float = Field(default=6.0, gt=0)
    """Wall seconds of one call of a custom function; then its worker is killed."""
    memory_limit_mib: int | None = Field(default=None, gt=0)
    """Address space of a custom term's worker. null: no limit."""

    @property
    def label(self) -> str:
        """Its name in metrics."""
        return self.name or self.kind

    @property
    def judges(self) -> bool:
        """Whether it says right or wrong, and not only how the completion looks."""
        return self.kind in ("verifier", "custom")

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Self:
        lengths = self.kind in ("memento_length", "block_length")
        if lengths and self.low is None and self.high is None:
            raise ValueError(f"{self.kind} needs `low` or `high`, or both")
        if not lengths and (self.low is not None or self.high is not None):
            raise ValueError(f"`low` and `high` are read by memento_length and block_length, not by {self.kind}")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low ({self.low}) is more than high ({self.high})")
        if (self.kind == "custom") != (self.function is not None):
            raise ValueError("kind custom needs `function: module:function`, and no other kind reads it")
        if self.part is not None and not self.judges:
            raise ValueError(f"`part` is read by verifier and custom terms, not by {self.kind}")
        return self


class RewardsConfig(Section):
    """The verifiers, and what a reward is made of."""

    terms: tuple[RewardTermConfig, ...] = ()
    """The reward as a weighted sum with gates. Empty: the verifier's score alone."""
    actors: int = Field(default=1, gt=0)
    """Ray actors that verify; each has its own workers. More than one spreads them over a cluster."""
    pending_groups: int = Field(default=64, gt=0)
    """Groups one actor holds at a time; whoever submits more waits."""
    workers: int = Field(default=2, gt=0)
    """Killable worker processes of one actor."""
    recycle_after: int = Field(default=5000, gt=0)
    """Verifications after which a worker is replaced by a fresh process: SymPy's caches grow."""
    timeout_s: float = Field(default=6.0, gt=0)
    """Wall seconds of one math verification, kept by the parent."""
    code_timeout_s: float = Field(default=30.0, gt=0)
    """Wall seconds of all tests of one program together."""
    code_score: Literal["all", "fraction"] = "all"
    """all: 1 if a program passes every test, and it is done at the first it does not. fraction: the share it passes."""
    memory_limit_mib: int = Field(default=2048, gt=0)
    """Address space of one math worker."""
    sandbox: Literal["namespaces", "subprocess"] = "namespaces"
    """Isolation of model-written code, in the log and in every result. `namespaces` contains hostile programs, and
    refuses to start where the kernel does not allow them. `subprocess` stops accidents only (docs/rewards.md)."""
    sandbox_python: Path | None = None
    """The interpreter of model-written code (3.9 or later), with its packages. null: the one below this environment."""
    sandbox_preload: tuple[str, ...] = ()
    """Modules loaded once, before programs import them, e.g. numpy."""
    cpus: float = Field(default=0.0, ge=0)
    """CPU cores reserved for one actor."""

    @model_validator(mode="after")
    def _terms_agree(self) -> Self:
        labels = [term.label for term in self.terms]
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise ValueError(f"two terms are called {repeated[0]}; give each its own `name`")
        if sum(term.kind == "verifier" for term in self.terms) > 1:
            raise ValueError("the verifier runs once a sample: there can be one verifier term only")
        if self.terms and not any(term.judges for term in self.terms):
            raise ValueError("terms need a verifier or a custom term: format alone does not tell right from wrong")
        return self


class AlgorithmConfig(Section):
    """Which policy gradient, and what corrects it."""

    loss: Literal["cispo", "grpo", "gspo"] = "cispo"
    """cispo: REINFORCE with a clipped weight. grpo: PPO's clipped surrogate. gspo: that with one ratio a sequence."""
    clip_low: float = Field(default=0.2, ge=0)
    """The importance ratio is clipped to [1 - clip_low, 1 + clip_high] (CISPO: the weight; GRPO, GSPO: the surrogate).
    GSPO's ratio is a mean over a sequence and needs far narrower bounds: 3e-4 and 4e-4 in its paper."""
    clip_high: float = Field(default=0.2, ge=0)
    advantage_baseline: Literal["group", "leave_one_out", "batch"] = "group"
    """What is taken off a reward: the mean of its group, of the other completions of its group (RLOO), or of the whole
    batch (REINFORCE++)."""
    advantage_std: Literal["batch", "centred", "group", "none"] = "batch"
    """Divide the centred reward by the standard deviation of the whole batch's rewards, of the whole batch's centred
    rewards (REINFORCE++ with the group as baseline), of its group's rewards, or not at all."""
    aggregation: Literal["token", "sequence", "group", "constant"] = "group"
    """token: mean over all tokens. sequence: mean over tokens, then over sequences. group: every group weighs the same,
    its tokens share that weight. constant: the sum over tokens, divided by sequences x `aggregation_tokens`."""
    aggregation_tokens: int | None = Field(default=None, gt=0)
    """The length in the divisor of `aggregation: constant`. null: `sampling.max_tokens`."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of KL(policy || reference). 0 needs no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """k2 and k3 are meant for the loss (the gradient of k1 is 0 in expectation), k1 for the reward."""
    kl_in: Literal["loss", "reward"] = "loss"
    """loss: a penalty on every token. reward: the KL of a whole completion is taken off its reward, before advantages;
    that costs a forward pass of policy and reference."""
    sampler_correction: Literal["tis", "icepop", "sequence_tis", "none"] = "tis"
    """Against the mismatch between the engine's and the learner's log-probabilities. tis: every token is weighted by
    its ratio learner / engine, at most the cap (truncated importance sampling). icepop: by its ratio, and by 0 outside
    of `sampler_mask_range`. sequence_tis: by the ratio of its whole sequence, at most the cap."""
    sampler_correction_cap: float = Field(default=2.0, ge=1)
    """Largest weight of tis and sequence_tis."""
    sampler_mask: Literal["none", "sequence", "geometric"] = "none"
    """Leave out whole sequences whose ratio learner / engine lies outside of `sampler_mask_range`. sequence: the
    product over its tokens. geometric: their geometric mean. Comes on top of `sampler_correction`."""
    sampler_mask_range: tuple[float, float] | None = None
    """Ratios that icepop, or `sampler_mask`, keeps: [low, high] around 1. IcePop's paper: [0.5, 5]."""
    mask_truncated: bool = False
    """Leave completions that hit the length limit out of the loss."""
    overlong_buffer_tokens: int = Field(default=0, ge=0)
    """Completions pay for the last so many tokens before `sampling.max_tokens`: from 0 linearly to `overlong_penalty`,
    which truncated ones pay in full (DAPO's overlong shaping). 0: none pays."""
    overlong_penalty: float = Field(default=1.0, gt=0)
    """Reward that a truncated completion loses. Read only with `overlong_buffer_tokens`."""
    dynamic_sampling: bool = False
    """Replace groups whose scores are all equal by groups of further problems (DAPO)."""
    dynamic_sampling_cap: float = Field(default=4.0, gt=0)
    """A step drops at most this many times `groups_per_step` groups; what is missing then is filled up with them."""
    mismatch_kl_limit: float | None = Field(default=None, gt=0)
    """Stop the run, and save the trajectories, when the mean mismatch KL of a step passes this. null: never."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.advantage_baseline == "batch" and self.advantage_std == "group":
            raise ValueError(
                "advantage_baseline batch and advantage_std group: a group of equal rewards lies off the batch's mean, "
                "and its standard deviation is 0. Use advantage_std: batch"
            )
        if self.aggregation_tokens is not None and self.aggregation != "constant":
            raise ValueError(f"aggregation_tokens is read by aggregation: constant, not by {self.aggregation}")
        if self.kl_in == "reward" and self.kl_coef == 0:
            raise ValueError("kl_in: reward with kl_coef 0 penalises nothing; set kl_coef")
        if self.sampler_correction == "icepop" and self.sampler_mask != "none":
            raise ValueError(
                "icepop masks tokens and sampler_mask sequences, by the same sampler_mask_range; use one of the two"
            )
        masks = self.sampler_correction == "icepop" or self.sampler_mask != "none"
        if masks and self.sampler_mask_range is None:
            name = "icepop" if self.sampler_correction == "icepop" else f"sampler_mask: {self.sampler_mask}"
            raise ValueError(f"{name} needs sampler_mask_range, e.g. [0.5, 5]")
        if not masks and self.sampler_mask_range is not None:
            raise ValueError("sampler_mask_range is read by icepop and by sampler_mask, and neither is on")
        if self.sampler_mask_range is not None and not 0 <= self.sampler_mask_range[0] < 1 < self.sampler_mask_range[1]:
            raise ValueError(
                f"sampler_mask_range {list(self.sampler_mask_range)} must hold 1, where engine and learner agree"
            )
        return self


class LoraConfig(Section):
    """A low-rank adapter (PEFT). Engines and exports get the merged weights; the reference is the model without it."""

    rank: int = Field(default=32, gt=0)
    alpha: float = Field(default=64.0, gt=0)
    """The adapter's output is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers, e.g. q_proj. Empty: all but the output head."""


class LearnerConfig(Section):
    """The DeepSpeed learner."""

    ranks: int = Field(default=1, gt=0)
    """Data-parallel processes, each a Ray actor (with one GPU where the device is cuda)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus: float = Field(default=1.0, ge=0)
    """CPU cores reserved for one rank; also its torch threads."""
    gpu_fraction: float = Field(default=1.0, gt=0, le=1)
    """Of its GPU that a rank takes. Below 1 engines share it whose shares leave room. Two ranks never do."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    lr: float = Field(default=1e-6, ge=0)
    """0 trains nothing: what `memento drift` uses."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=10, ge=0)
    """Linear warm-up, counted in optimiser steps; constant after it."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    minibatches: int = Field(default=1, gt=0)
    """Optimiser steps per RL step; each takes an equal share of the groups."""
    micro_batch_tokens: int = Field(default=32_768, gt=0)
    """Packed tokens of one forward and backward pass. A longer trajectory gets a pass of its own."""
    gradient_checkpointing: bool = False
    logprob_chunk_tokens: int = Field(default=4096, gt=0)
    """Rows of logits that exist at once."""
    offload_optimizer: bool = False
    """The optimiser's states, and the step itself, in host memory."""
    offload_parameters: bool = False
    """Parameters lie in host memory until a layer needs them. With zero_stage 3."""
    offload_reference: bool = False
    """A reference model lies in host memory, and comes to the device once a step for its forward pass."""
    lora: LoraConfig | None = None
    """Train an adapter in place of the weights. null: all weights."""
    start_timeout_s: float = Field(default=600, gt=0)
    step_timeout_s: float = Field(default=7200, gt=0)

    @model_validator(mode="after")
    def _accumulates_in_fp32(self) -> Self:
        if self.zero_stage == 0 and self.dtype == "bfloat16":
            raise ValueError(
                "zero_stage 0 adds up gradients of microbatches in bfloat16, so the packing would change the result. "
                "Use zero_stage 1 (on one rank it costs nothing) or dtype float32"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3: without ZeRO nothing can be offloaded")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"offload_parameters needs zero_stage 3, which splits them; this is {self.zero_stage}")
        return self


class WeightSyncConfig(Section):
    """New weights from the learner to the engines (`memento.rl.weight_sync`)."""

    transport: Literal["auto", "file", "broadcast", "ipc"] = "auto"
    """file: written to `folder`, read by every engine. broadcast: sent in buckets, by NCCL between GPUs and by Gloo
    between CPUs. ipc: engines map the memory of the learner rank on their GPU. auto: file on the CPUs of one machine,
    ipc where every engine shares its GPU with a rank, else broadcast. Where these two fail, a version goes by file."""
    bucket_mib: int = Field(default=32, gt=0)
    """Sent at a time by broadcast and ipc. A larger tensor is sent whole."""
    timeout_s: float = Field(default=120, gt=0)
    """For all ends of a broadcast or ipc to appear, and for each bucket."""
    folder: Path | None = None
    """Where files lie: reachable from learner rank 0 and all engines. null: shared memory on one machine, `out`/weights
    across several."""


class EvalConfig(Section):
    """Evaluation during training, on the engines, under eviction."""

    problems: ProblemsConfig | None = None
    """null: no evaluation."""
    decontaminate: bool = True
    """Leave these problems out of training, by id and by normalised text."""
    interval: int = Field(default=25, gt=0)
    """Every so many steps; also before the first and after the last one."""
    samples: int = Field(default=1, gt=0)
    """Completions a problem."""
    temperature: float = Field(default=0.6, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    top_k: int = Field(default=20, ge=-1)
    max_tokens: int | None = Field(default=None, gt=0)
    """null: as in training."""


class CheckpointConfig(Section):
    """Everything a run needs to go on as if nothing had happened."""

    interval: int = Field(default=25, gt=0)
    keep: int = Field(default=2, gt=0)
    """How many of the newest checkpoints stay."""
    keep_best: bool = False
    """Also write a checkpoint when an evaluation is better than all before it, and keep the best one."""


class TrackingConfig(Section):
    """W&B and TensorBoard. `metrics.jsonl` is always written."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    """Of W&B. offline: into the run folder, `wandb sync` uploads it later. online needs a key."""
    project: str = "memento-rl"
    entity: str | None = None
    """The W&B team or user. null: the default of the key."""
    name: str | None = None
    """The run's name in W&B. null: that of its folder."""
    tensorboard: bool = False
    """Also write TensorBoard event files to `out`/tensorboard."""
    trajectories: int = Field(default=8, ge=0)
    """Completions in each table of trajectories. 0: no tables and no pages."""
    trajectories_interval: int = Field(default=10, gt=0)
    """Steps from one table to the next; the first step has one."""
    artifacts: Literal["none", "reference", "upload"] = "reference"
    """reference: W&B gets this package's code, and the place of each checkpoint. upload: the checkpoints themselves."""


class RlConfig(Section):
    """An RL run: `memento rl CONFIG`."""

    kind: Literal["rl"] = "rl"
    out: Path
    """The run folder. A non-empty one is refused unless the run is resumed."""
    model: Path | str
    """Hugging Face folder or hub id, from SFT stage 2: its tokenizer holds the four delimiters."""
    reference: Path | str | None = None
    """The model that `algorithm.kl_coef` holds the policy to. null: `model`, where the run started."""
    problems: ProblemsConfig
    seed: int = 0
    steps: int = Field(default=350, gt=0)
    groups_per_step: int = Field(default=240, gt=0)
    """Problems per step."""
    group_size: int = Field(default=8, gt=0)
    """Completions per problem."""
    max_lag: int = Field(default=0, ge=0)
    """Steps by which rollouts may be older than the weights they train. 0: on-policy; n: rollouts run ahead."""
    save_rollouts: Literal["all", "sample", "none"] = "all"
    """What goes to rollouts.jsonl each step: every group, the first one, or nothing."""
    profile_steps: tuple[int, int] | None = None
    """First and last step of a window that torch's profiler records: OUT/profile/rank-R.json.gz, a trace a rank."""
    format: FormatConfig = FormatConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.groups_per_step % self.learner.minibatches:
            raise ValueError(
                f"groups_per_step ({self.groups_per_step}) must be a multiple of learner.minibatches "
                f"({self.learner.minibatches}): every minibatch holds whole groups"
            )
        if self.group_size == 1 and self.algorithm.advantage_std == "group":
            raise ValueError("group_size 1 has no group standard deviation; use advantage_std: batch or none")
        if self.group_size == 1 and self.algorithm.advantage_baseline == "leave_one_out":
            raise ValueError("group_size 1 leaves no other completion for advantage_baseline: leave_one_out")
        if self.group_size == 1 and self.algorithm.dynamic_sampling:
            raise ValueError("dynamic_sampling drops groups of equal scores, and with group_size 1 every group is one")
        if self.rollout.sleep and self.max_lag > 0:
            raise ValueError(
                "rollout.sleep needs max_lag 0: with rollouts that run ahead engines work while others train"
            )
        if self.reference is not None and self.algorithm.kl_coef == 0:
            raise ValueError("reference is read by a KL penalty, and algorithm.kl_coef is 0")
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(f"profile_steps {list(self.profile_steps)}: steps count from 1, and the first comes first")
        if self.algorithm.overlong_buffer_tokens > self.sampling.max_tokens:
            raise ValueError(
                f"algorithm.overlong_buffer_tokens ({self.algorithm.overlong_buffer_tokens}) is more than "
                f"sampling.max_tokens ({self.sampling.max_tokens})"
            )
        return self


class SftPhase(Section):
    """A stretch of training on one kind of data; phases follow each other under one optimiser and schedule."""

    steps: int = Field(gt=0)
    """Optimiser steps."""
    problems: ArithmeticConfig | None = None
    """Generated traces of this length range. null: rows of `data`."""


class SftEvalConfig(Section):
    """Evaluation by rollouts while a stage trains; `out`/hf is then the checkpoint that did best."""

    problems: Path | None = None
    """JSONL of problems. null: no evaluation, and the last weights are the result."""
    interval: int = Field(default=100, gt=0)
    """Optimiser steps between two evaluations; there is one after the last step too."""
    samples: int = Field(default=1, gt=0)
    """Completions a problem."""
    temperature: float = Field(default=0.6, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    top_k: int = Field(default=20, ge=-1)
    max_tokens: int = Field(default=31_744, gt=0)
    rollout: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Engine settings, as for `memento evaluate --set rollout.KEY=VALUE`. The trainer keeps its memory meanwhile: leave
    the engine little enough with gpu_memory_utilization."""


class SftConfig(Section):
    """One SFT stage: `memento sft CONFIG`."""

    kind: Literal["sft"] = "sft"
    stage: Literal["stage0", "stage1", "stage2", "control"]
    """stage0: plain reasoning traces, for a base model that does not reason yet. stage1: full attention on memento
    traces. stage2: the same traces with memento attention. control: full attention on the same source traces without
    blocks and mementos (the SFT-only baseline)."""
    out: Path
    """The run folder; the model is saved in `out`/hf."""
    model: Path | str | None = None
    """Where to start: a Hugging Face folder or hub id. null: the tiny Qwen3 of the quickstart, made from `seed`."""
    data: Path | str | None = None
    """JSONL or Parquet file, folder or hub data set (`name:subset@split`) in the columns of OpenMementos or
    OpenThoughts (docs/data.md). null: the generated arithmetic traces of `phases`."""
    max_traces: int | None = Field(default=None, gt=0)
    """Only the first so many rows of `data`. null: all."""
    streaming: bool = False
    """Read a hub data set as it arrives instead of downloading all of it first."""
    cache: Path | None = None
    """Folder for tokenised traces, which later stages and runs map into memory. null: they are kept in memory."""
    strict_blocks: bool = True
    """Drop traces whose thinking has text between blocks. false: keep them; that text stays visible."""
    chat_template: Literal["auto", "chatml", "own"] = "auto"
    """auto: plain ChatML without a system prompt, but Phi-4 keeps its own (`memento.chat.install_template`)."""
    seed: int = 42
    phases: tuple[SftPhase, ...] = ()
    """Steps and data of each phase. Empty: `epochs` over `data`."""
    epochs: float = Field(default=5.0, gt=0)
    format: FormatConfig = FormatConfig()
    max_length: int = Field(default=32_768, gt=0)
    """Longer traces are truncated, and counted."""
    batch_size: int = Field(default=512, gt=0)
    """Traces per optimiser step, over all ranks."""
    micro_batch_tokens: int = Field(default=32_768, gt=0)
    """Packed tokens of one forward and backward pass."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices, AdamW for the rest."""
    lr: float = Field(default=8e-5, gt=0)
    muon_lr: float = Field(default=0.02, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.05, ge=0)
    """Warm-up: a fraction of all steps below 1, else a number of steps."""
    schedule: Literal["cosine", "flat_linear"] = "cosine"
    """flat_linear: flat to 60 % of the steps, then linear to 3 %."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    zero_stage: Literal[0, 1, 2, 3] = 0
    ranks: int = Field(default=1, gt=0)
    """GPUs the stage is meant for: `memento show` plans with them. How many there are is up to torchrun; with another
    number the batch stays the same."""
    gradient_checkpointing: bool = True
    threads: int | None = Field(default=None, gt=0)
    """torch threads on CPU. null: all cores."""
    logging_steps: int = Field(default=10, gt=0)
    checkpoint_steps: int | None = Field(default=None, gt=0)
    """Write a checkpoint every so many steps, for `--resume`; the newest is kept. null: only when a signal stops it."""
    eval: SftEvalConfig = SftEvalConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        generated = self.phases and all(phase.problems is not None for phase in self.phases)
        if self.data is None and not generated:
            raise ValueError("give `data`, or `phases` whose `problems` are generated")
        return self


Config = RlConfig | SftConfig


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply dotted overrides (``learner.lr=1e-4``), check it against the schema.

    Args:
        path: the file. Its ``kind`` (``rl`` or ``sft``) picks the schema. ``base: other.yaml`` (relative to the file)
            is read first and overridden by the rest.
        overrides: ``a.b=c``; the value is YAML.

    Raises:
        UserError: no such file, not YAML, an unknown key (the message names the nearest known one), a wrong type, or
            values that contradict each other.
    """
    tree = _read_yaml(Path(path), seen=())
    try:
        merged = OmegaConf.merge(OmegaConf.create(tree), OmegaConf.from_dotlist(_checked(overrides)))
        resolved: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    return validate_config(resolved, str(path))


def override_config(config: Config, overrides: Sequence[str], where: str) -> Config:
    """Another config with dotted overrides applied. Errors as for `load_config`, naming `where`."""
    try:
        merged = OmegaConf.merge(
            OmegaConf.create(config.model_dump(mode="json")), OmegaConf.from_dotlist(_checked(overrides))
        )
        resolved: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error
    return validate_config(resolved, where)


def validate_config(tree: dict[str, Any], where: str) -> Config:
    """Check a plain tree against the schema. Errors as for `load_config`."""
    kind = tree.get("kind")
    if kind not in ("rl", "sft"):
        raise UserError(f"{where}: `kind` must be `rl` or `sft`, got {kind!r}.")
    schema: type[RlConfig] | type[SftConfig] = RlConfig if kind == "rl" else SftConfig
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error, schema)}") from error


def dump_config(config: Config, path: str | Path) -> None:
    """Write the resolved tree as YAML, so that `load_config` gives the same config back."""
    Path(path).write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: BaseModel) -> str:
    """The resolved tree as YAML text."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _checked(overrides: Sequence[str]) -> list[str]:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key or key.startswith("-"):
            raise UserError(f"override {override!r} is not of the form a.b=value, e.g. learner.lr=1e-4.")
    return list(overrides)


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> Any:
    if not path.is_file():
        raise UserError(
            f"no config file at {path}. The shipped ones are in configs/ (e.g. configs/rl/quickstart.yaml)."
        )
    if path.resolve() in seen:
        raise UserError(f"{path}: `base` points back to itself.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no keys.")
    base = tree.pop("base", None)
    if base is None:
        return tree
    below = _read_yaml(path.parent / str(base), (*seen, path.resolve()))
    return OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(below), OmegaConf.create(tree)), resolve=False)


def _explain(error: ValidationError, schema: type[BaseModel]) -> str:
    parts = []
    for complaint in error.errors():
        loc = [part for part in complaint["loc"] if isinstance(part, str)]
        key = ".".join(str(part) for part in complaint["loc"])
        if complaint["type"] == "extra_forbidden":
            parts.append(f"unknown key `{key}`{_nearest(loc, schema)}")
        elif complaint["type"] == "missing":
            parts.append(f"`{key}` is missing")
        else:
            message = complaint["msg"].removeprefix("Value error, ")
            parts.append(f"`{key}`: {message} (got {complaint['input']!r})" if key else message)
    return "; ".join(parts[:5]) + "."


def _nearest(loc: Sequence[str], schema: type[BaseModel]) -> str:
    section = schema
    for part in loc[:-1]:
        field = section.model_fields.get(part)
        found = _section_of(field.annotation) if field else None
        if found is None:
            return ""
        section = found
    close = difflib.get_close_matches(loc[-1], section.model_fields, n=1, cutoff=0.5)
    prefix = ".".join([*loc[:-1], ""])
    if close:
        return f" (did you mean `{prefix}{close[0]}`?)"
    return f" (known here: {', '.join(section.model_fields)})"


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


ConfigAdapter: TypeAdapter[Config] = TypeAdapter(Annotated[Config, Field(discriminator="kind")])
"""For JSON Schema of the whole tree (the configuration reference is generated from it)."""
