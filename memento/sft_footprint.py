"""How much memory and time an SFT stage will take, from sizes alone: the lower half of ``memento show`` for SFT.

Formulas (P parameters, N ranks, b bytes of a value, T tokens of the largest row: `micro_batch_tokens`, or one whole
trace where `max_length` is more)::

    each rank     weights      bP; ZeRO-3: bP/N
                  gradients    bP; ZeRO-2 and 3: bP/N
                  optimiser    master weights (bf16 only) and two moments in fp32: 12P or 8P; ZeRO-1 to 3: /N
                  activations  one layer whole; with checkpointing also the input of each: T x hidden x b
                  logits       3 x 1,024 x vocabulary x 4 (TRL's head works in chunks)
    time          at least     (6P, with checkpointing 8P, + attention) x tokens / (N x peak FLOP/s)
                  attention    12 x layers x hidden x visible keys a token, x 4/3 with checkpointing; in stage 2 a token
                               sees about 29 % of what causal attention shows it at 8 K tokens (benchmarks/attention.py)

The numbers of the data (`MEAN_TOKENS`, `TRACES`) are those of the paper's SFT (MEMENTO, arXiv 2604.09852), whatever the
config names. Times are for `memento.footprint.LEARNER_EFFICIENCY` of the peak. None of this has been measured.
"""

from __future__ import annotations

from collections.abc import Iterator

from memento.config import SftConfig
from memento.errors import UserError
from memento.footprint import GIB, GPUS, LEARNER_EFFICIENCY, Architecture, Gpu, architecture_of
from memento.metrics import nearest

TRACES = 31_000
"""Traces of the paper's SFT."""
MEAN_TOKENS = 13_000
"""Of one trace with blocks, mementos and answer: 10,900 + 1,850 and the rest."""
STAGE2_VISIBLE = 0.29
"""Share of the causal (query, key) pairs that memento attention computes, at traces of this kind."""


def stage_memory(config: SftConfig, model: Architecture) -> dict[str, float]:
    """Bytes of one rank by what they hold; see the module."""
    P, N, stage = model.parameters, config.ranks, config.zero_stage
    b = 2 if config.dtype == "bfloat16" else 4
    T = max(config.micro_batch_tokens, config.max_length)
    inside = 8 * model.hidden + 3 * model.intermediate + 2 * (model.heads + 2 * model.kv_heads) * model.head_dim
    kept, whole = (model.layers, 1) if config.gradient_checkpointing else (0, model.layers)
    return {
        "weights": b * P / (N if stage == 3 else 1),
        "gradients": b * P / (N if stage >= 2 else 1),
        "optimiser": (12 if b == 2 else 8) * P / (N if stage >= 1 else 1),
        "activations": T * b * (kept * model.hidden + whole * inside),
        "logits": 3 * min(1024, T) * model.vocabulary * 4,
    }


def stage_seconds(config: SftConfig, model: Architecture, gpu: Gpu, traces: float, mean_tokens: float) -> float:
    """Seconds to train on so many traces."""
    again = 4 / 3 if config.gradient_checkpointing else 1.0
    keys = mean_tokens / 2 * (STAGE2_VISIBLE if config.stage == "stage2" else 1.0)
    near = min(keys, model.window) if model.sliding_layers else keys
    seen = (model.layers - model.sliding_layers) * keys + model.sliding_layers * near
    attention = 12 * model.heads * model.head_dim * seen
    flops = again * (6 * model.parameters + attention) * traces * mean_tokens
    return flops / (config.ranks * gpu.flops * LEARNER_EFFICIENCY)


def sft_plan_lines(config: SftConfig, like: str | None = None, gpu_name: str | None = None) -> Iterator[str]:
    """What a stage trains on, holds and takes, as lines for people.

    Raises:
        UserError: an unknown `gpu_name` or `like`.
    """
    if gpu_name is not None and gpu_name not in GPUS:
        raise UserError(f"--gpu: {gpu_name} is not known{nearest(gpu_name, GPUS)}.")
    steps = sum(phase.steps for phase in config.phases)
    length = f"{steps} steps" if steps else f"{config.epochs:g} epochs"
    tokens = config.batch_size * config.max_length
    yield f"SFT {config.stage}: {length} of {config.batch_size} traces (at most {tokens:,} tokens a step)"
    yield (
        f"{config.ranks} rank{'s' if config.ranks > 1 else ''}, ZeRO-{config.zero_stage}, {config.dtype}"
        + (", gradient checkpointing" if config.gradient_checkpointing else "")
        + (f": torchrun --nproc-per-node ... -m memento.sft.train, {config.ranks} GPUs" if config.ranks > 1 else "")
    )
    if config.model is None and like is None:
        return  # the tiny model: nothing to plan
    model = architecture_of(str(config.model), like)
    if model is None:
        yield f"Memory: unknown until {config.model} is there (or name a model of these sizes by --like)"
        return
    yield f"Model: {model.parameters / 1e9:.2f} billion parameters"
    parts = stage_memory(config, model)
    total = sum(parts.values())
    shown = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    yield f"Memory, each rank: {total / GIB:.1f} GiB ({shown})"
    fitting = [name for name, gpu in GPUS.items() if total <= 0.9 * gpu.memory_gib * GIB]
    yield f"  fits into 90 % of: {', '.join(fitting) or 'none; raise zero_stage or ranks, lower micro_batch_tokens'}"
    for name in (gpu_name,) if gpu_name else ("H100",):
        hours = stage_seconds(config, model, GPUS[name], TRACES * config.epochs, MEAN_TOKENS) / 3600
        yield (
            f"Time on {config.ranks} x {name}: about {hours:,.1f} h for {config.epochs:g} epochs of {TRACES:,} traces "
            f"of {MEAN_TOKENS:,} tokens, at {LEARNER_EFFICIENCY:.0%} of the peak (not measured)"
        )
