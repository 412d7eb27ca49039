"""How much memory and time a run will take, from sizes alone: the lower half of ``memento show``.

Every formula is here and in docs/launch.md. P is the number of parameters, N the number of learner ranks, b the bytes
of a value (2 for bfloat16, 4 for float32), T the tokens of the largest row (`learner.micro_batch_tokens`, or one whole
trajectory where that is longer).

    learner, each rank   weights        bP; ZeRO-3: bP/N
                         gradients      in fp32: 4P, ZeRO-2 and 3: 4P/N; ZeRO 0 and 1 have bf16 ones beside: + bP
                         optimiser      master weights (bf16 only) and two moments, fp32: 12P or 8P; ZeRO-1 to 3: /N
                         reference      bP (whole on every rank)
                         activations    one layer whole; with checkpointing also the input of each: T x hidden x b
                         logits         3 x chunk x vocabulary x 4
    engine, each GPU     weights        bP / tensor_parallel_size
                         KV of a token  2 x layers x KV heads x head size x b, sliding layers up to their window
    learner step         at least       FLOPs / (N x peak); 6P a token, + 2P for each of: recomputation, reference,
                                        log-probabilities before a second minibatch
    decoding             at most        sequences / seconds to read the weights and their KV once from memory

Buffers, fragmentation and the CUDA context are not in it: keep 10 to 15 % of the memory free. The times are those of
perfect hardware; `LEARNER_EFFICIENCY` and `DECODE_EFFICIENCY` make them what to expect. None of this has been measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memento.config import RlConfig
from memento.errors import UserError
from memento.metrics import nearest
from memento.preflight import machine_resources, read_model_config, resource_plan

GIB = 2**30

LEARNER_EFFICIENCY = 0.4
"""Fraction of peak FLOP/s that dense training of this size reaches where it is tuned well. An assumption."""

DECODE_EFFICIENCY = 0.6
"""Fraction of memory bandwidth that decoding reaches. An assumption."""

ENGINE_OVERHEAD = 3 * GIB
"""Of an engine's share of the GPU: CUDA context, graphs, activations. An assumption."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a data sheet says: memory in GiB, dense bf16 FLOP/s, bytes of memory bandwidth a second."""

    memory_gib: float
    flops: float
    bandwidth: float


GPUS = {
    "A100": Gpu(80, 312e12, 2.0e12),
    "H100": Gpu(80, 989e12, 3.35e12),
    "H200": Gpu(141, 989e12, 4.8e12),
    "B200": Gpu(180, 2250e12, 8.0e12),
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes of a dense decoder. `sliding_layers` of its `layers` see `window` tokens only."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    sliding_layers: int = 0
    window: int = 0

    @classmethod
    def of(cls, model_config: dict[str, Any]) -> Architecture | None:
        """Read them from a ``config.json``. None for a mixture of experts, or where it names them otherwise."""
        text = model_config.get("text_config", model_config)
        if any(key.startswith("num_") and "expert" in key for key in text):
            return None
        try:
            heads = int(text["num_attention_heads"])
            types = list(text.get("layer_types") or [])
            return cls(
                layers=int(text["num_hidden_layers"]),
                hidden=int(text["hidden_size"]),
                heads=heads,
                kv_heads=int(text.get("num_key_value_heads") or heads),
                head_dim=int(text.get("head_dim") or text["hidden_size"] // heads),
                intermediate=int(text["intermediate_size"]),
                vocabulary=int(text["vocab_size"]),
                tied=bool(text.get("tie_word_embeddings", False)),
                sliding_layers=types.count("sliding_attention"),
                window=int(text.get("sliding_window") or 0),
            )
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def parameters(self) -> int:
        """All weights; biases and norms are left out (below 0.1 %)."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        mlp = 3 * self.hidden * self.intermediate
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.layers * (attention + mlp)

    def kv_bytes(self, tokens: int, value_bytes: int) -> int:
        """KV cache of one sequence with so many resident tokens; a sliding layer holds its window at most."""
        each = 2 * self.kv_heads * self.head_dim * value_bytes
        sliding = self.sliding_layers * min(tokens, self.window or tokens)
        return each * ((self.layers - self.sliding_layers) * tokens + sliding)


KNOWN = {
    "Qwen/Qwen3-0.6B": Architecture(28, 1024, 16, 8, 128, 3072, 151_936, tied=True),
    "Qwen/Qwen3-8B": Architecture(36, 4096, 32, 8, 128, 12_288, 151_936),
    "Qwen/Qwen3-32B": Architecture(64, 5120, 64, 8, 128, 25_600, 151_936),
    "Qwen/Qwen2.5-7B": Architecture(28, 3584, 28, 4, 128, 18_944, 152_064),
    "microsoft/Phi-4-reasoning": Architecture(40, 5120, 40, 10, 128, 17_920, 100_352),
    "allenai/Olmo-3-7B-Think": Architecture(32, 4096, 32, 32, 128, 11_008, 100_278, sliding_layers=24, window=4096),
}
"""Sizes from the ``config.json`` of the models that configs/ names, to plan before anything was downloaded."""


def architecture_of(model: str, like: str | None = None) -> Architecture | None:
    """The sizes of a run's model: of `like` if it is given, else of its folder, else of a known hub id.

    Args:
        model: `RlConfig.model`.
        like: a folder, or a key of `KNOWN`.

    Raises:
        UserError: `like` is neither.
    """
    name = like if like is not None else model
    if (Path(name) / "config.json").is_file():
        return Architecture.of(read_model_config(Path(name)))
    if name in KNOWN:
        return KNOWN[name]
    if like is not None:
        raise UserError(f"--like: {like} is no model folder and no known model{nearest(like, KNOWN)}.")
    return None


@dataclass(frozen=True, slots=True)
class LearnerMemory:
    """Bytes of one learner rank. `host` lies in main memory instead of on the device."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    activations: float
    logits: float
    host: float

    @property
    def device(self) -> float:
        """All that lies on the device."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.activations + self.logits


def learner_memory(config: RlConfig, model: Architecture) -> LearnerMemory:
    """Memory of one learner rank; see the module for the formulas."""
    learner = config.learner
    P, N, stage = model.parameters, learner.ranks, learner.zero_stage
    b = 2 if learner.dtype == "bfloat16" else 4
    trained = P if learner.lora is None else _adapter_parameters(config, model)
    weights = b * P / (N if stage == 3 else 1)
    gradients = 4 * trained / (N if stage >= 2 else 1) + (b * trained if stage < 2 and b == 2 else 0)
    optimizer = (12 if b == 2 else 8) * trained / (N if stage >= 1 else 1)
    # An adapter that is switched off is the reference, unless another one is named: no second model.
    second = config.algorithm.kl_coef > 0 and (learner.lora is None or config.reference is not None)
    reference = b * P if second else 0
    host = 0.0
    if learner.offload_optimizer:
        host, optimizer = host + optimizer, 0.0
    if learner.offload_parameters:
        host, weights = host + weights, 0.0
    if learner.offload_reference:
        host, reference = host + reference, 0.0
    T = max(learner.micro_batch_tokens, trajectory_tokens(config))
    inside = 8 * model.hidden + 3 * model.intermediate + 2 * (model.heads + 2 * model.kv_heads) * model.head_dim
    kept, whole = (model.layers, 1) if learner.gradient_checkpointing else (0, model.layers)
    activations = T * b * (kept * model.hidden + whole * inside)
    logits = 3 * min(learner.logprob_chunk_tokens, T) * model.vocabulary * 4
    return LearnerMemory(weights, gradients, optimizer, reference, activations, logits, host)


def _adapter_parameters(config: RlConfig, model: Architecture) -> int:
    """Parameters of a low-rank adapter on all linear layers: rank x (inputs + outputs) each."""
    assert config.learner.lora is not None
    h, q, kv, m = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim, model.intermediate
    pairs = (h + q) + 2 * (h + kv) + (q + h) + 3 * (h + m)
    return config.learner.lora.rank * pairs * model.layers


def trajectory_tokens(config: RlConfig) -> int:
    """Tokens of the longest trajectory: the engine's limit, or the completion's where there is none."""
    return config.rollout.max_model_len or config.sampling.max_tokens


def learner_seconds(config: RlConfig, model: Architecture, gpu: Gpu, tokens: float) -> float:
    """Seconds of a learner step of so many tokens at `LEARNER_EFFICIENCY`. Attention is left out."""
    passes = 6 + 2 * config.learner.gradient_checkpointing
    passes += 2 * (config.algorithm.kl_coef > 0)
    passes += 2 * (config.learner.minibatches > 1) * (1 - 1 / config.learner.minibatches)
    return passes * model.parameters * tokens / (config.learner.ranks * gpu.flops * LEARNER_EFFICIENCY)


def decode_tokens_per_s(config: RlConfig, model: Architecture, gpu: Gpu, sequences: int, resident: int) -> float:
    """Tokens a second of one engine that decodes so many sequences with so many resident tokens each, at
    `DECODE_EFFICIENCY` of the memory bandwidth of its GPUs."""
    b = 4 if config.rollout.dtype == "float32" else 2
    read = b * model.parameters + sequences * model.kv_bytes(resident, b)
    return sequences * config.rollout.tensor_parallel_size * gpu.bandwidth * DECODE_EFFICIENCY / read


def plan_lines(config: RlConfig, like: str | None = None, gpu_name: str | None = None) -> Iterator[str]:
    """What a run reserves, holds and takes, as lines for people.

    Raises:
        UserError: an unknown `gpu_name` or `like`.
    """
    if gpu_name is not None and gpu_name not in GPUS:
        raise UserError(f"--gpu: {gpu_name} is not known{nearest(gpu_name, GPUS)}.")
    there = machine_resources()
    planned = {"CPU": there["CPU"], "GPU": there["GPU"] or float(gpu_name is not None)}
    plan = resource_plan(config, gpus_there=planned["GPU"])
    yield "Actors:"
    for a in plan.actors:
        yield f"  {a.count} × {a.kind:<13} {a.count * a.cpus:g} CPU, {a.count * a.gpus:g} GPU"
    yield f"  together {plan.cpus:g} CPU and {plan.gpus:g} GPU; this machine has {there['CPU']:g} and {there['GPU']:g}"
    sequences = config.groups_per_step * config.group_size
    yield (
        f"Each step: {config.groups_per_step} problems × {config.group_size} completions = {sequences:,}, "
        f"at most {sequences * config.sampling.max_tokens:,} completion tokens"
    )
    model = architecture_of(str(config.model), like)
    if model is None:
        yield f"Memory: unknown until {config.model} is there (or name a model of these sizes by --like)"
        return
    yield from _memory_lines(config, model, GPUS.get(gpu_name or ""))
    if gpu_name is not None:
        yield from _time_lines(config, model, GPUS[gpu_name], sequences)


def pool_bytes(config: RlConfig, model: Architecture, gpu: Gpu | None) -> int:
    """The KV pool of one engine: as configured, else what weights and `ENGINE_OVERHEAD` leave of its GPUs. 0: unknown,
    or there is none left."""
    rollout = config.rollout
    if rollout.kv_cache_mib:
        return rollout.kv_cache_mib * 2**20
    if gpu is None:
        return 0
    each = gpu.memory_gib * GIB * rollout.gpu_memory_utilization - ENGINE_OVERHEAD
    return max(0, int(rollout.tensor_parallel_size * each - _rollout_bytes(config) * model.parameters))


def _rollout_bytes(config: RlConfig) -> int:
    return 4 if config.rollout.dtype == "float32" else 2


def _memory_lines(config: RlConfig, model: Architecture, gpu: Gpu | None) -> Iterator[str]:
    b, longest, learner = _rollout_bytes(config), config.sampling.max_tokens, config.learner
    yield f"Model: {model.parameters / 1e9:.2f} billion parameters"
    one, pool = model.kv_bytes(longest, b), pool_bytes(config, model, gpu)
    fits = f"; the pool of {pool / 2**20:,.0f} MiB holds {pool / one:.1f} of them at full length" if pool else ""
    if gpu is not None and pool < one:
        fits = "; beside the weights there is no room for one such completion: raise rollout.tensor_parallel_size"
    yield (
        f"KV cache: {model.kv_bytes(1, b):,} bytes a token, {one / 2**20:,.1f} MiB for a whole completion without "
        f"eviction{fits}"
    )
    m = learner_memory(config, model)
    parts = {
        "weights": m.weights,
        "gradients": m.gradients,
        "optimiser": m.optimizer,
        "reference": m.reference,
        "activations": m.activations,
        "logits": m.logits,
    }
    shown = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
    host = f"; {m.host / GIB:.1f} GiB in main memory" if m.host else ""
    yield f"Learner, each rank: {m.device / GIB:.1f} GiB ({shown}){host}"
    if gpu is not None and m.device > 0.9 * gpu.memory_gib * GIB:
        yield (
            f"  that is more than 90 % of {gpu.memory_gib:g} GiB: raise learner.ranks or zero_stage, lower "
            "micro_batch_tokens or logprob_chunk_tokens, or set offload_optimizer"
            + ("" if learner.gradient_checkpointing else ", gradient_checkpointing=true")
        )


def _time_lines(config: RlConfig, model: Architecture, gpu: Gpu, sequences: int) -> Iterator[str]:
    longest, pool, engines = config.sampling.max_tokens, pool_bytes(config, model, gpu), config.rollout.engines

    def rate(resident: int) -> tuple[int, float]:
        """Sequences that run at once in an engine, and tokens a second of all engines."""
        room = pool // model.kv_bytes(resident, _rollout_bytes(config))
        running = min(config.rollout.max_num_seqs, -(-sequences // engines), room)
        return running, engines * decode_tokens_per_s(config, model, gpu, running, resident) if running else 0.0

    # A completion holds half its length on average without eviction; a third of that where eviction saves a factor 3.
    (many, full), (more, evicted) = rate(longest // 2), rate(longest // 6)
    yield (
        f"Engines: about {full:,.0f} tokens/s with {many} sequences each without eviction, {evicted:,.0f} with {more} "
        "at a third of the KV"
    )
    tokens = sequences * longest / 2
    yield (
        f"Learner: about {learner_seconds(config, model, gpu, tokens):,.0f} s a step of {tokens:,.0f} tokens "
        "(completions of half the longest length)"
    )
