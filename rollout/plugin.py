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
        logits_processors: the engine's other logits processors; the block cap comes last, so none of them can undo it.
        additional_config: the engine's other ``additional_config`` entries.
    """
    options = EvictionOptions(fmt, max_resident_tokens)
    return {
        "scheduler_cls": "memento.rollout.scheduler.EvictingScheduler",
        "worker_cls": "memento.rollout.worker.EvictingWorker",
        "async_scheduling": False,
        "enable_prefix_caching": True,
        "logits_processors": [*logits_processors, BLOCK_CAP],
        "additional_config": {**(additional_config or {}), CONFIG_KEY: options.to_dict()},
    }


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``: make the KV cache spec known in every vLLM process."""
    from memento.rollout import kv_manager

    kv_manager.register()
