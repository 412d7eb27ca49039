"""The KV pages of requests that evict: a spec and a manager beside vLLM's own for full attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from memento.format import Eviction
from memento.rollout.options import EvictionOptions
from memento.rollout.plan import Compaction, EvictionFault, EvictionPlan

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request


@dataclass(frozen=True, kw_only=True)
class EvictingAttentionSpec(FullAttentionSpec):
    """Full attention whose pages shrink: the logical length of a request says little about its memory."""

    @classmethod
    def of(cls, spec: FullAttentionSpec) -> EvictingAttentionSpec:
        """The same layer, managed by `EvictingManager`."""
        return cls(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init})

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes that one request may need. vLLM refuses to start with a pool below them.

        ``max_model_len`` bounds the logical length and may exceed what the pool holds; what bounds a request is
        ``max_resident_tokens``, or the pool itself (the scheduler stops a request that outgrows it).
        """
        limit = EvictionOptions.of(vllm_config).max_resident_tokens
        if limit is None:
            return self.page_size_bytes
        tokens = min(limit, vllm_config.model_config.max_model_len)
        return -(-tokens // self.block_size) * self.page_size_bytes


class EvictingManager(FullAttentionManager):
    """Counts pages by physical tokens. The scheduler puts a plan here for each request it accepts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: dict[str, EvictionPlan] = {}
        if self.block_pool.hash_block_size != self.block_size:
            raise EvictionFault(
                f"pages of {self.block_size} tokens with prefix hashes of {self.block_pool.hash_block_size} tokens"
            )

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        plan = self.plans[request_id]
        # Admission asks about the whole sequence. A long request that was preempted holds at most its replay's peak;
        # with its logical length it would never be admitted again.
        physical = plan.peak_tokens(num_tokens) if apply_admission_cap else num_tokens - plan.evicted
        return super().get_num_blocks_to_allocate(
            request_id, physical, *args, apply_admission_cap=apply_admission_cap, **kwargs
        )

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        plan = self.plans[request_id]
        blocks = super().allocate_new_blocks(
            request_id, num_tokens - plan.evicted, num_tokens_main_model - plan.evicted
        )
        plan.peak_pages = max(plan.peak_pages, len(self.req_to_blocks[request_id]))
        return blocks

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        # Only pages that no eviction of this request ever touches are published: they hold the same keys for every
        # request with the same tokens, evicting or not.
        plan = self.plans[request.request_id]
        plan.observe(request._all_token_ids)
        super().cache_blocks(request, min(num_tokens, plan.first_evictable), *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        # Finished and preempted requests both pass here.
        plan = self.plans.get(request_id)
        if plan is not None:
            plan.reset()
        return super().pop_blocks_for_free(request_id)

    def compact(self, request_id: str, event: Eviction) -> Compaction:
        """Evict `event` (due now) from the page bookkeeping; the worker moves the tokens before anything is written.

        The freed pages may be handed out in this very step: workers apply all compactions first.

        Raises:
            EvictionFault: if a page that would be written is shared or published.
        """
        plan, page, blocks = self.plans[request_id], self.block_size, self.req_to_blocks[request_id]
        # All earlier evictions lie before `start`, so one subtraction maps logical to physical.
        first, behind, held = (position - plan.evicted for position in (event.start, event.end, event.boundary))
        if len(blocks) != -(-held // page):
            raise EvictionFault(f"request {request_id} holds {len(blocks)} pages for {held} tokens at {event}")
        ids = np.fromiter((block.block_id for block in blocks), dtype=np.int64, count=len(blocks))
        source, target = np.arange(behind, held), np.arange(first, first + held - behind)
        kept_tokens = held - (behind - first)
        kept = -(-kept_tokens // page)
        for index in range(first // page, kept):
            if not self.block_pool.is_block_writable(blocks[index]):
                raise EvictionFault(
                    f"page {index} of request {request_id} is shared or published, {event} writes to it"
                )
        freed = blocks[kept:]
        del blocks[kept:]
        self.block_pool.free_blocks(reversed(freed))
        plan.advance(event, len(freed))
        return Compaction(
            request_id,
            ids[source // page] * page + source % page,
            ids[target // page] * page + target % page,
            kept,
        )


def manager_of(managers: Sequence[object]) -> EvictingManager:
    """The one manager of a KV cache that evicts.

    Raises:
        EvictionFault: if the workers did not install `EvictingAttentionSpec` for all layers.
    """
    if len(managers) != 1 or not isinstance(managers[0], EvictingManager):
        names = ", ".join(type(manager).__name__ for manager in managers) or "none"
        raise EvictionFault(f"the KV cache is managed by {names}, expected one EvictingManager: is worker_cls set?")
    return managers[0]


def register() -> None:
    """Make the spec known to vLLM, in every process that imports this module. Safe to call again."""
    # Registering into an empty registry would make vLLM believe that its own specs are already there.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(
        EvictingAttentionSpec, manager_class=EvictingManager, uniform_type_base_spec=FullAttentionSpec
    )


register()
