"""What the eviction plugin supports, checked at start-up: by name, never by silence."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import TYPE_CHECKING

from memento.errors import UserError
from memento.rollout.options import EvictionOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LOWEST, BELOW, TESTED = (0, 29), (0, 33), "0.32.0"

SCHEDULER_HOOKS = {
    "schedule": ("throttle_prefills",),
    "add_request": ("request",),
    "update_from_output": ("scheduler_output", "model_runner_output"),
    "_update_request_with_output": ("request", "new_token_ids"),
    "_free_request": ("request",),
    "_reserve_prefill_lookahead": ("request", "num_computed_tokens", "num_new_tokens"),
    "_get_local_prefix_cache_hit": ("request",),
}
MANAGER_HOOKS = {
    "get_num_blocks_to_allocate": ("request_id", "num_tokens", "new_computed_blocks", "apply_admission_cap"),
    "allocate_new_blocks": ("request_id", "num_tokens", "num_tokens_main_model"),
    "cache_blocks": ("request", "num_tokens"),
    "pop_blocks_for_free": ("request_id",),
}
_BOTH_RUNNERS_HOOKS: dict[str, tuple[str, ...]] = {
    "get_kv_cache_spec": (),
    "initialize_kv_cache": ("kv_cache_config",),
    "execute_model": ("scheduler_output",),
}
V1_RUNNER_HOOKS = _BOTH_RUNNERS_HOOKS | {
    "_prepare_inputs": ("scheduler_output", "num_scheduled_tokens"),
    "_sample": ("logits",),
    "_bookkeeping_sync": ("scheduler_output", "sampler_output"),
}
V2_RUNNER_HOOKS = _BOTH_RUNNERS_HOOKS | {
    "prepare_attn": ("input_batch",),
    "sample": ("hidden_states", "input_batch"),
}


class Unsupported(UserError):
    """The installed vLLM, or this configuration of it, cannot evict. The message names what and what to do."""


def check_vllm() -> None:
    """Check the version of the installed vLLM and the signatures of the methods that eviction overrides.

    Raises:
        Unsupported: naming the version or the method.
    """
    import vllm
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    check_version(vllm.__version__)
    check_hooks(Scheduler, SCHEDULER_HOOKS)
    check_hooks(FullAttentionManager, MANAGER_HOOKS)


def check_version(version: str) -> None:
    """`version` must lie in the supported range."""
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        raise Unsupported(f"vLLM {version!r} has no version number that KV eviction can check") from None
    if not LOWEST <= (major, minor) < BELOW:
        lowest, below = (".".join(map(str, v)) for v in (LOWEST, BELOW))
        raise Unsupported(f"KV eviction supports vLLM >= {lowest}, < {below} (tested: {TESTED}); this is {version}")


def check_hooks(cls: type, hooks: dict[str, tuple[str, ...]]) -> None:
    """Every overridden method must exist on `cls` and still take the parameters that the override names."""
    for name, wanted in hooks.items():
        method = getattr(cls, name, None)
        there = () if method is None else inspect.signature(method).parameters
        missing = [parameter for parameter in wanted if parameter not in there]
        if method is None or missing:
            what = f"{cls.__name__}.{name}" + (f" without parameter {', '.join(missing)}" if method else " is gone")
            raise Unsupported(f"KV eviction cannot hook into this vLLM: {what} (tested: vLLM {TESTED})")


def check_runner(cls: type, v2: bool) -> None:
    """The model runner must be vLLM's own, V1 or V2, with all hooks."""
    if v2:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Runner
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner as Runner
    if not issubclass(cls, Runner):
        raise Unsupported(f"KV eviction supports the model runners of vLLM, not {cls.__module__}.{cls.__name__}")
    check_hooks(cls, V2_RUNNER_HOOKS if v2 else V1_RUNNER_HOOKS)


_SYNC, _V1 = "async_scheduling=False", "VLLM_USE_V2_MODEL_RUNNER=0"
# There the block cap would need a token that is still on the device.
_SYNC_OR_V2 = f"{_SYNC}, or VLLM_USE_V2_MODEL_RUNNER=1"


def check_config(vllm_config: VllmConfig) -> None:
    """Refuse what would make eviction silently wrong.

    Raises:
        Unsupported: naming the feature.
    """
    parallel, cache, model = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.model_config
    scheduler_cls, worker_cls = vllm_config.scheduler_config.scheduler_cls, parallel.worker_cls
    on_cpu = vllm_config.device_config.device_type == "cpu"
    is_async, v2 = bool(vllm_config.scheduler_config.async_scheduling), vllm_config.use_v2_model_runner
    options = EvictionOptions.of(vllm_config)
    refused = {
        f"asynchronous scheduling with the V1 model runner ({_SYNC_OR_V2})": is_async and not v2,
        "speculative decoding": vllm_config.speculative_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "dual-batch overlap": bool(getattr(parallel, "enable_dbo", False)),
        "KV connectors": vllm_config.kv_transfer_config is not None,
        "encoder connectors": vllm_config.ec_transfer_config is not None,
        "pooling models": model.runner_type == "pooling",
        "encoder-decoder models": model.is_encoder_decoder,
        f"restart mode with asynchronous scheduling ({_SYNC})": options.restart and is_async,
        f"restart mode with the V2 model runner ({_V1})": options.restart and v2,
        f"the V2 model runner of vLLM before 0.31, which takes no logits processors ({_V1})": v2
        and find_spec("vllm.v1.worker.gpu.sample.logits_processor") is None,
        f"KV cache dtype {cache.cache_dtype} on CPU": on_cpu and str(cache.cache_dtype).startswith("fp8"),
        f"scheduler {scheduler_cls} (use eviction_args())": not _is_ours(scheduler_cls, "scheduler"),
        f"worker {worker_cls} (use eviction_args())": not _is_ours(worker_cls, "worker"),
    }
    named = [what for what, present in refused.items() if present]
    if named:
        raise Unsupported("KV eviction does not support " + "; ".join(named))


def _is_ours(reference: object, module: str) -> bool:
    """Whether a class or its dotted name is that of `memento.rollout.<module>`, or derived from it."""
    if isinstance(reference, str):
        if reference.startswith(f"memento.rollout.{module}."):
            return True
        from vllm.utils.import_utils import resolve_obj_by_qualname

        reference = resolve_obj_by_qualname(reference)
    bases = getattr(reference, "__mro__", ())
    return any(base.__module__ == f"memento.rollout.{module}" for base in bases)


def check_attention_spec(layer: str, spec: object) -> None:
    """Only full attention and sliding windows can be evicted.

    Raises:
        Unsupported: naming the layer and what it is.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    if type(spec) not in (FullAttentionSpec, SlidingWindowSpec):
        raise Unsupported(
            f"KV eviction supports layers with full attention or a sliding window; {layer} is {type(spec).__name__}"
        )
    if getattr(spec, "attention_chunk_size", None) is not None:
        raise Unsupported(f"KV eviction does not support the chunked local attention of {layer}")
    if getattr(spec, "non_causal", False):
        raise Unsupported(f"KV eviction does not support the non-causal attention of {layer}")
