"""The scheduler that evicts: one mixin over vLLM's synchronous and asynchronous schedulers.

    schedule()                       a running request reached a boundary: compact its pages (free for this very step)
      super().schedule()             ... no chunk crosses a boundary, prefix hits end before the first block content
      attach an EvictionStep         slot copies and evicted counts, for the workers
    update_from_output()             each sampled token is read by the request's plan

A request's plan (`memento.rollout.plan`) is all the state there is; it lives in the `EvictingManager`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request, RequestStatus

from memento.rollout.admission import Admission
from memento.rollout.compatibility import check_config, check_vllm
from memento.rollout.kv_manager import EvictingManager, manager_of
from memento.rollout.options import EvictionOptions
from memento.rollout.plan import Compaction, ControlError, EvictionPlan, EvictionStep, RequestControl
from memento.rollout.request_statistics import SampleStatistics, summarize
from memento.rollout.stat_logger import EngineCounters

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.outputs import ModelRunnerOutput

    _Base = Scheduler
else:
    _Base = object

logger = init_logger("vllm.memento")

KV_LIMIT = "memento_kv_limit"
"""``stop_reason`` of a request that outgrew the cache: its open block never closed."""


class EvictionMixin(_Base):
    """See the module. Everything not overridden here is stock vLLM."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_vllm()
        check_config(self.vllm_config)
        self.eviction = EvictionOptions.of(self.vllm_config)
        self._rejected: dict[str, str] = {}
        self._rejections: list[tuple[int, EngineCoreOutput]] = []
        self._manager: EvictingManager = manager_of(self.kv_cache_manager.coordinator.single_type_managers)
        self._samples = SampleStatistics()
        self._counters = EngineCounters()
        manager, pool = self._manager, self.kv_cache_manager.block_pool
        if self.eviction.reserve_peaks:
            manager.admission = Admission(manager.block_size)
            self.scheduler_reserve_full_isl = True  # the seam at which admission asks how much a request needs
        # One page of the pool is vLLM's null page.
        self._page_limit = pool.num_gpu_blocks - 1
        if self.eviction.max_resident_tokens is not None:
            self._page_limit = min(self._page_limit, -(-self.eviction.max_resident_tokens // manager.block_size))
        self._limit_tokens = self._page_limit * manager.block_size
        fmt = self.eviction.fmt
        logger.info(
            "KV eviction is live: finished blocks leave the cache (keep_last_n=%d, evict_delimiters=%s, "
            "max_block_tokens=%s, %s); %s scheduling, V%d model runner, admission by %s; at most %d pages of %d tokens "
            "a request. Supported: prompt prefix caching, chunked prefill, preemption, n > 1, prompt_logprobs, tensor "
            "parallelism, full and sliding-window attention",
            fmt.keep_last_n,
            fmt.evict_delimiters,
            fmt.max_block_tokens,
            "restart: kept tokens are computed again" if self.eviction.restart else "mementos keep their KV",
            "asynchronous" if self.scheduler_config.async_scheduling else "synchronous",
            2 if self.vllm_config.use_v2_model_runner else 1,
            "expected peaks" if self.eviction.reserve_peaks else "free pages",
            self._page_limit,
            manager.block_size,
        )

    # Requests come and go.

    def add_request(self, request: Request) -> None:
        # Raising here would kill an engine that runs in its own process, so a request that cannot run is taken in and
        # finished with an error by the next step.
        try:
            plan = self._plan(request)
        except ControlError as error:
            self._rejected[request.request_id] = str(error)
            params = self.eviction.fmt.without_eviction()
            plan = EvictionPlan(RequestControl(params), request.num_prompt_tokens)
        if request.request_id not in self.requests:  # else super() complains, and the first one keeps its plan
            self._manager.plans[request.request_id] = plan
        super().add_request(request)

    def _plan(self, request: Request) -> EvictionPlan:
        params = request.sampling_params
        if params is None or request.prompt_token_ids is None or request.resumable:
            raise ControlError("this engine evicts KV and takes plain token prompts for generation only")
        control = RequestControl.from_extra_args(params.extra_args, self.eviction.fmt)
        plan = EvictionPlan(control, request.num_prompt_tokens, request.max_tokens)
        plan.observe(request._all_token_ids)
        if self.eviction.restart and plan.events and params.prompt_logprobs is not None:
            raise ControlError(
                "prompt_logprobs of a prompt with blocks are computed twice in restart mode: leave them out"
            )
        pages = self._pages(plan.peak_tokens(request.num_tokens))
        if pages > self._page_limit:
            raise ControlError(
                f"the prompt of {request.num_tokens} tokens needs {pages} KV pages at its peak, and a request may hold "
                f"{self._page_limit}: raise kv_cache_memory_bytes (or max_resident_tokens), or shorten the prompt"
            )
        return plan

    def _finish_rejected(self) -> None:
        for request_id, message in self._rejected.items():
            for request in self.finish_requests(request_id, RequestStatus.FINISHED_ERROR):
                output = EngineCoreOutput(request_id, [], finish_reason=FinishReason.ERROR, stop_reason=message)
                self._rejections.append((request.client_index, output))
            logger.error("request %s was refused: %s", request_id, message)
        self._rejected.clear()

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client_index, output in self._rejections:
            outputs.setdefault(client_index, EngineCoreOutputs()).outputs.append(output)
        self._rejections.clear()
        return outputs

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        new_token_ids, stopped = super()._update_request_with_output(request, new_token_ids, *args, **kwargs)
        plan = self._manager.plans[request.request_id]
        plan.observe(request._all_token_ids)
        # A block that never closes would need more pages than there are, preempt everybody, itself last, and start
        # again for ever.
        if (
            not stopped
            and request.num_tokens - plan.evicted > self._limit_tokens  # a bound, and cheap
            and plan.resident_tokens(request.num_tokens) > self._limit_tokens
        ):
            request.status = RequestStatus.FINISHED_LENGTH_CAPPED
            request.stop_reason = KV_LIMIT
            stopped = True
        return new_token_ids, stopped

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> tuple[dict[str, Any] | None, Any]:
        transfer, other = super()._free_request(request, *args, **kwargs)
        plan = self._manager.plans.pop(request.request_id)
        if request.status not in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED):
            return transfer, other
        stats = summarize(
            plan,
            request.num_tokens,
            page_tokens=self._manager.block_size,
            preemptions=request.num_preemptions,
            kv_limit=request.stop_reason == KV_LIMIT,
        )
        if self._manager.admission is not None:
            self._manager.admission.finished(plan, request.num_tokens)
        self._counters.finished(stats)
        return {**(transfer or {}), **self._samples.payload(request.request_id, stats)}, other

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            self._counters.attach(stats, self._manager.admission)
        return stats

    # One step.

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._finish_rejected()
        compactions = self._compact_due()
        admission = self._manager.admission
        if admission is not None:
            admission.begin_step(self.kv_cache_manager.block_pool.get_num_free_blocks(), len(self.running))
        output = super().schedule(*args, **kwargs)
        plans = self._manager.plans
        # A request preempted by this very call has no pages any more, and nothing to move.
        still_held = tuple(c for c in compactions if plans[c.request_id].applied)
        evicted = {
            request_id: tokens for request_id in output.num_scheduled_tokens if (tokens := plans[request_id].evicted)
        }
        output.memento = EvictionStep(still_held, evicted)  # type: ignore[attr-defined]
        return output

    def _compact_due(self) -> list[Compaction]:
        if self._pause_state == PauseState.PAUSED_ALL:
            return []
        manager, compactions = self._manager, []
        plans, admission = manager.plans, manager.admission
        for request in self.running:
            plan = plans[request.request_id]
            if plan.applied == len(plan.events):
                continue
            event = plan.due(request.num_computed_tokens)
            if event is None:
                continue
            first_time = plan.applied == plan.done  # and no replay
            if self.eviction.restart:
                compactions.append(manager.rewind(request.request_id, event))
                request.num_computed_tokens = event.end
            else:
                compactions.append(manager.compact(request.request_id, event))
            self._counters.evicted(event.end - event.start, plan.pages_freed[plan.applied - 1])
            if admission is not None and first_time:
                admission.evicted(plan)
        return compactions

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        if self.num_prefill_lookahead:
            num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if num_new_tokens > 1:  # a boundary that is due was dealt with, so one token crosses none
            plan = self._manager.plans[request.request_id]
            num_new_tokens = min(num_new_tokens, plan.tokens_until_boundary(num_computed_tokens))
        # vLLM leaves out of the step whoever gets 0 tokens here, and takes nobody in after the first such answer to a
        # request that waits.
        admission = self._manager.admission
        if admission is not None and admission.scarce and num_new_tokens > 0:
            if request.status != RequestStatus.RUNNING:
                return 0 if admission.somebody_waits else num_new_tokens
            if self._sits_out(admission, request.request_id, num_computed_tokens + num_new_tokens):
                return 0
        return num_new_tokens

    def _sits_out(self, admission: Admission, request_id: str, num_tokens: int) -> bool:
        """Whether a running request must not be computed up to `num_tokens` now."""
        manager = self._manager
        wanted = self._pages(num_tokens - manager.plans[request_id].evicted) - len(manager.req_to_blocks[request_id])
        return wanted > 0 and admission.sits_out(
            request_id,
            wanted,
            self.kv_cache_manager.block_pool.get_num_free_blocks(),
            self._held,
        )

    def _held(self) -> Iterator[tuple[str, EvictionPlan, int]]:
        """(request id, plan, pages held) of the running requests, oldest first."""
        for request in self.running:
            request_id = request.request_id
            yield request_id, self._manager.plans[request_id], len(self._manager.req_to_blocks[request_id])

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        blocks, num_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        page, plan = self._manager.block_size, self._manager.plans[request.request_id]
        pages = plan.first_evictable // page
        if num_tokens > pages * page:
            num_tokens = pages * page
            blocks = self.kv_cache_manager.create_kv_cache_blocks(tuple(list(group[:pages]) for group in blocks.blocks))
        return blocks, num_tokens, boundary, diverged

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._manager.block_size)


class EvictingScheduler(EvictionMixin, Scheduler):
    """``scheduler_cls`` of a synchronous engine."""


class EvictingAsyncScheduler(EvictionMixin, AsyncScheduler):
    """``scheduler_cls`` of an engine with asynchronous scheduling."""
