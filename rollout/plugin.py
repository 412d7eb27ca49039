"""How an engine is told to evict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memento.format import MementoFormat
from memento.rollout.options import CONFIG_KEY, EvictionOptions

BLOCK_CAP = "memento.rollout.block_cap:BlockCap"


def eviction_args(
    fmt: MementoFormat,
    *,
    max_resident_tokens: int | None = None,
    reserve_peaks: bool = True,
    restart: bool = False,
    async_scheduling: bool = False,
    logits_processors: Sequence[str | type] = (),
    additional_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Keyword arguments that make a stock vLLM engine evict finished blocks.

    >>> from vllm import LLM
    >>> llm = LLM(model, **eviction_args(MementoFormat.from_tokenizer(tokenizer, evict_delimiters=False)))

    They suit ``vllm.LLM``, ``vllm.EngineArgs`` and ``vllm.AsyncEngineArgs``. Prefix caching (of the prompt) and chunked
    prefill stay on. ``max_model_len`` bounds the logical length and may exceed what the KV pool holds. A request
    chooses for itself through ``SamplingParams.extra_args["memento"]`` (`memento.rollout.plan.RequestControl`), and
    `memento.rollout.eviction_stats` reads what happened from its output.

    Args:
        fmt: the delimiters and the default eviction of every request.
        max_resident_tokens: physical tokens that one request may hold; a request that outgrows them stops with finish
            reason ``length``. None for as many as the KV pool has.
        reserve_peaks: admit a request only if the expected peak of all running ones fits with it, and let a request
            sit out a step for one that is about to evict: hardly any is ever preempted (`memento.rollout.admission`).
        restart: after an eviction compute everything behind the block again, without it. An ablation, synchronous and
            on the V1 model runner only.
        async_scheduling: schedule a step while the last one runs; needs the V2 model runner.
        logits_processors: the engine's other logits processors; the block cap comes last, so none of them can undo it.
        additional_config: the engine's other ``additional_config`` entries.
    """
    options = EvictionOptions(fmt, max_resident_tokens, reserve_peaks, restart)
    scheduler = "EvictingAsyncScheduler" if async_scheduling else "EvictingScheduler"
    return {
        "scheduler_cls": f"memento.rollout.scheduler.{scheduler}",
        "worker_cls": "memento.rollout.worker.EvictingWorker",
        "async_scheduling": async_scheduling,
        "enable_prefix_caching": True,
        "logits_processors": [*logits_processors, BLOCK_CAP],
        "additional_config": {**(additional_config or {}), CONFIG_KEY: options.to_dict()},
    }


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``: make the KV cache spec known in every vLLM process."""
    from memento.rollout import kv_manager

    kv_manager.register()
