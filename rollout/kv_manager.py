"""The KV pages of requests that evict: a spec and a manager beside vLLM's own for full attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from memento.format import Eviction
from memento.rollout.admission import Admission
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
    def of(cls, spec: AttentionSpec) -> EvictingAttentionSpec:
        """The same layer, managed by `EvictingManager`.

        A layer with a sliding window keeps all pages too: its window counts resident tokens, so it reaches further back
        with every eviction.
        """
        kept = {f.name: getattr(spec, f.name) for f in fields(AttentionSpec) if f.init}
        return cls(**kept, sliding_window=getattr(spec, "sliding_window", None))

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


_LOOK_AGAIN_STEPS = 16
"""Steps between two looks at whether a request may enter, while none leaves: a forecast is not free."""


class EvictingManager(FullAttentionManager):
    """Counts pages by physical tokens. The scheduler puts a plan here for each request it accepts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: dict[str, EvictionPlan] = {}
        self.admission: Admission | None = None
        """Set by the scheduler where peaks are reserved."""
        self._held_back = 0
        """Admissions that are refused without looking again, until a request gives its pages back."""
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
        if not apply_admission_cap:
            if request_id in self.num_cached_block:  # running: vLLM's own shortcut, without two calls a token
                pages = -(-(num_tokens - plan.evicted) // self.block_size)
                return max(pages - len(self.req_to_blocks[request_id]), 0)
            return super().get_num_blocks_to_allocate(request_id, num_tokens - plan.evicted, *args, **kwargs)
        # Admission asks about the whole sequence. A long request that was preempted holds at most its replay's peak;
        # with its logical length it would never be admitted again.
        peak = plan.peak_tokens(num_tokens)
        pages = super().get_num_blocks_to_allocate(request_id, peak, *args, apply_admission_cap=True, **kwargs)
        return max(pages, self._pages_to_wait_for(request_id, pages, -(-peak // self.block_size)))

    def _pages_to_wait_for(self, request_id: str, pages: int, peak_pages: int) -> int:
        """How many pages must be free before a request enters, for the sake of those that run; 0 if any number will do.

        Args:
            request_id: the request that wants to enter.
            pages: that it needs for what is known of it.
            peak_pages: the same without what it shares with requests that run.
        """
        running = [i for i, blocks in self.req_to_blocks.items() if blocks and i != request_id]
        free = self.block_pool.get_num_free_blocks()
        if self.admission is None or not running or pages > free:
            return 0
        if self._held_back > 0:
            self._held_back -= 1
            return free + 1
        used = self.block_pool.num_gpu_blocks - 1 - free
        # Prompts of a group lie in the same pages, and are counted once.
        shared = sum(len(self.req_to_blocks[i]) for i in running) - used + peak_pages - pages
        expected = self.admission.pages(self.plans[i] for i in [*running, request_id]) - shared
        if free < expected - used:
            self.admission.held_back += 1
            self._held_back = _LOOK_AGAIN_STEPS
        return expected - used

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        plan, held = self.plans[request_id], self.req_to_blocks[request_id]
        physical = num_tokens - plan.evicted
        if physical <= len(held) * self.block_size:
            blocks = []
        else:
            blocks = super().allocate_new_blocks(request_id, physical, num_tokens_main_model - plan.evicted)
        if len(held) > plan.peak_pages:
            plan.peak_pages = len(held)
        return blocks

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        # Only pages that no eviction of this request ever touches are published: they hold the same keys for every
        # request with the same tokens, evicting or not.
        plan = self.plans[request.request_id]
        plan.observe(request._all_token_ids)
        num_tokens = min(num_tokens, plan.first_evictable)
        if num_tokens // self.block_size > self.num_cached_block.get(request.request_id, 0):
            super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        # Finished and preempted requests both pass here.
        plan = self.plans.get(request_id)
        if plan is not None:
            plan.reset()
        if self.admission is not None:
            self.admission.left(request_id)
        self._held_back = 0
        return super().pop_blocks_for_free(request_id)

    def compact(self, request_id: str, event: Eviction) -> Compaction:
        """Evict `event` (due now) from the page bookkeeping; the worker moves the tokens before anything is written.

        The freed pages may be handed out in this very step: workers apply all compactions first.

        Raises:
            EvictionFault: if a page that would be written is shared or published.
        """
        plan, page = self.plans[request_id], self.block_size
        # All earlier evictions lie before `start`, so one subtraction maps logical to physical.
        first, behind, held = (position - plan.evicted for position in (event.start, event.end, event.boundary))
        blocks = self.req_to_blocks[request_id]
        ids = np.fromiter((block.block_id for block in blocks), dtype=np.int64, count=len(blocks))
        kept = self._release(request_id, event, held, first, first + held - behind)
        source, target = np.arange(behind, held), np.arange(first, first + held - behind)
        return Compaction(
            request_id,
            ids[source // page] * page + source % page,
            ids[target // page] * page + target % page,
            kept,
        )

    def rewind(self, request_id: str, event: Eviction) -> Compaction:
        """Evict `event` (due now) and forget what was computed behind it: it is computed again, from ``event.end`` on.

        Errors as for `compact`.
        """
        plan = self.plans[request_id]
        first, held = event.start - plan.evicted, event.boundary - plan.evicted
        nothing = np.empty(0, dtype=np.int64)
        return Compaction(request_id, nothing, nothing, self._release(request_id, event, held, first, first))

    def _release(self, request_id: str, event: Eviction, held: int, first: int, kept_tokens: int) -> int:
        """Free the pages behind the first `kept_tokens` of a request that holds `held`; it writes from `first` on.

        Returns:
            Pages it keeps.
        """
        page, blocks = self.block_size, self.req_to_blocks[request_id]
        if len(blocks) != -(-held // page):
            raise EvictionFault(f"request {request_id} holds {len(blocks)} pages for {held} tokens at {event}")
        kept = -(-kept_tokens // page)
        for index in range(first // page, kept):
            if not self.block_pool.is_block_writable(blocks[index]):
                raise EvictionFault(
                    f"page {index} of request {request_id} is shared or published, {event} writes to it"
                )
        freed = blocks[kept:]
        del blocks[kept:]
        self.block_pool.free_blocks(reversed(freed))
        self.plans[request_id].advance(event, len(freed))
        return kept


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
