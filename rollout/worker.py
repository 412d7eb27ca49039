"""The worker side of eviction: move KV inside the cache, and hide the evicted tokens from attention.

A worker's `init_device` puts `EvictingRunnerV1` or `EvictingRunnerV2` on the class of the model runner it built, so the
same few hooks serve the CPU and the GPU runner. Positions, token ids and sampling stay logical; physical are only
``seq_lens``, ``slot_mapping`` and the block table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker as StockWorker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as StockWorker

from memento.kernels.compaction import Moves, PagedCache, compact
from memento.rollout.compatibility import check_attention_spec, check_config, check_runner, check_vllm
from memento.rollout.kv_layout import paged_caches
from memento.rollout.kv_manager import EvictingAttentionSpec
from memento.rollout.plan import EvictionFault, EvictionStep

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheSpec
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

    _Runner = RunnerV1
else:
    _Runner = RunnerV1 = RunnerV2 = object

logger = init_logger("vllm.memento")


class EvictingRunner(_Runner):
    """The hooks that both model runners share. `self` is a stock runner whose class was extended."""

    _evicted: dict[str, int]
    _caches: list[PagedCache]

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        specs = super().get_kv_cache_spec()
        for layer, spec in specs.items():
            check_attention_spec(layer, spec)
        return {layer: EvictingAttentionSpec.of(spec) for layer, spec in specs.items()}  # type: ignore[arg-type]

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)
        # Here and not at the first eviction, so that an attention backend nobody tried is refused at start-up. While
        # memory is profiled the cache is a stand-in that soon goes.
        self._caches = [] if kwargs.get("is_profiling") or len(args) > 1 else paged_caches(self)

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        step: EvictionStep | None = getattr(scheduler_output, "memento", None)
        if step is None:
            # A dummy run is the V2 runner warming up or capturing graphs, not a step.
            if scheduler_output.total_num_scheduled_tokens and not kwargs.get("dummy_run"):
                raise EvictionFault("a step came without its evictions: is scheduler_cls set by eviction_args()?")
            step = EvictionStep()
        if step.compactions:
            self._compact(step)
        self._evicted = step.evicted
        return super().execute_model(scheduler_output, *args, **kwargs)

    @torch.inference_mode()
    def _compact(self, step: EvictionStep) -> None:
        # All requests at once: their pages are disjoint. This runs before the step writes anything, so a page freed by
        # a compaction and given to another request in the same step is still intact.
        moves = Moves.of(
            [(c.source_slots, c.target_slots) for c in step.compactions if len(c.source_slots)], self.device
        )
        for cache in self._caches:
            compact(cache, moves)
        for compaction in step.compactions:
            self._truncate(compaction.request_id, compaction.num_pages)

    def _truncate(self, request_id: str, num_pages: int) -> None:
        """Forget the freed pages: the request's block table has `num_pages` now."""
        raise NotImplementedError


class EvictingRunnerV1(EvictingRunner):
    """The hooks over the V1 runner: the CPU's default, elsewhere with ``VLLM_USE_V2_MODEL_RUNNER=0``."""

    def _truncate(self, request_id: str, num_pages: int) -> None:
        for block_ids in self.requests[request_id].block_ids:
            del block_ids[num_pages:]
        row = self.input_batch.req_id_to_index.get(request_id)
        if row is None:
            return  # not in the batch now; it will be added again from `block_ids`
        for table in self.input_batch.block_table.block_tables:
            table.block_table.np[row, num_pages : table.num_blocks_per_row[row]] = 0
            table.num_blocks_per_row[row] = num_pages

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray) -> Any:
        result = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        if not self._evicted:
            return result
        num_reqs, num_tokens = self.input_batch.num_reqs, scheduler_output.total_num_scheduled_tokens
        evicted = torch.tensor(
            [self._evicted.get(r, 0) for r in self.input_batch.req_ids[:num_reqs]], dtype=torch.int32
        )
        self.optimistic_seq_lens_cpu[:num_reqs] -= evicted
        evicted = evicted.to(self.device, non_blocking=True)
        self.seq_lens[:num_reqs] -= evicted
        physical = self.positions[:num_tokens] - evicted[self.req_indices.gpu[:num_tokens].long()]
        self.input_batch.block_table.compute_slot_mapping(
            num_reqs, self.query_start_loc.gpu[: num_reqs + 1], physical.to(self.positions.dtype)
        )
        return result

    # A seeded request that is prefilled in chunks, or again after a preemption, samples tokens that are thrown away.
    # The stock runner winds its generator back by an offset, which the CPU's generators do not have: it raises.

    def _discarded_generators(self) -> dict[int, torch.Generator]:
        generators = self.input_batch.generators
        if not generators:
            return {}
        discarded = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0]
        return {int(row): generators[int(row)] for row in discarded if int(row) in generators}

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        if self.device.type != "cpu" or not (discarded := self._discarded_generators()):
            return super()._sample(*args, **kwargs)
        states = [(generator, generator.get_state()) for generator in discarded.values()]
        output = super()._sample(*args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        if self.device.type != "cpu" or not (discarded := self._discarded_generators()):
            return super()._bookkeeping_sync(*args, **kwargs)
        generators = self.input_batch.generators
        self.input_batch.generators = {row: g for row, g in generators.items() if row not in discarded}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            self.input_batch.generators = generators


class EvictingRunnerV2(EvictingRunner, RunnerV2):  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    """The hooks over the V2 runner, whose requests live in slots of persistent tensors.

    ``seq_lens`` is such a tensor, and CUDA graphs read it: it is made physical in place before attention is prepared,
    and logical again before sampling, which compares it with prompt lengths. ``positions`` stays logical for RoPE.
    """

    _hidden: tuple[torch.Tensor, torch.Tensor] | None
    """int32 [num_reqs], on the host and on the device: what `seq_lens` lacks at the moment."""

    def _truncate(self, request_id: str, num_pages: int) -> None:
        self.block_tables.num_blocks.np[:, self.req_states.req_id_to_index[request_id]] = num_pages

    def prepare_attn(self, input_batch: InputBatch) -> Any:
        if not self._evicted:
            self._hidden = None
            return super().prepare_attn(input_batch)
        evicted = np.array([self._evicted.get(request_id, 0) for request_id in input_batch.req_ids], dtype=np.int32)
        on_host = torch.from_numpy(evicted)
        self._hidden = on_host, on_host.to(self.device)
        self._shift_lengths(input_batch, -1)
        logical = input_batch.positions
        physical = logical.clone()
        of_tokens = torch.from_numpy(np.repeat(evicted, input_batch.num_scheduled_tokens))
        physical[: len(of_tokens)] -= of_tokens.to(self.device, logical.dtype)
        input_batch.positions = physical
        try:
            return super().prepare_attn(input_batch)
        finally:
            input_batch.positions = logical

    def sample(self, hidden_states: torch.Tensor, input_batch: InputBatch, *args: Any, **kwargs: Any) -> Any:
        if self._hidden is not None:
            self._shift_lengths(input_batch, +1)
            self._hidden = None
        return super().sample(hidden_states, input_batch, *args, **kwargs)

    def _shift_lengths(self, input_batch: InputBatch, sign: int) -> None:
        assert self._hidden is not None
        on_host, on_device = self._hidden
        input_batch.seq_lens[: input_batch.num_reqs] += sign * on_device
        upper_bound = input_batch.seq_lens_cpu_upper_bound
        if upper_bound is not None:
            upper_bound[: input_batch.num_reqs] += sign * on_host


class EvictingWorker(StockWorker):
    """``worker_cls``: the platform's own worker with a runner that evicts."""

    def init_device(self) -> None:
        check_vllm()
        check_config(self.vllm_config)
        super().init_device()
        runner: Any = self.model_runner
        v2 = self.vllm_config.use_v2_model_runner
        check_runner(type(runner), v2)
        hooks = EvictingRunnerV2 if v2 else EvictingRunnerV1
        runner.__class__ = type(f"Evicting{type(runner).__name__}", (hooks, type(runner)), {})
        runner._evicted = {}
        runner._caches = []
        runner._hidden = None
        logger.info("KV eviction is live in worker %d (%s)", self.rank, type(runner).__name__)
