"""What eviction does to an engine, in vLLM's Prometheus metrics.

    engine core    EvictingScheduler counts --> SchedulerStats of the step
    API server     EvictionStatLogger       --> /metrics

`EvictionStatLogger` is an entry point of the group ``vllm.stat_logger_plugins``, so every ``AsyncLLM`` and every
server has it; where nothing evicts it does nothing. Among the fields of vLLM's ``SchedulerStats``,
``waiting_lora_adapters`` is the one dictionary of integers that the engine core never fills: the counts travel there,
and are taken out before anybody else looks. Preemptions, waiting requests and the use of the pool are vLLM's own.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge
from vllm.v1.metrics.loggers import StatLoggerBase

from memento.rollout.options import CONFIG_KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

    from memento.rollout.admission import Admission
    from memento.rollout.request_statistics import EvictionStats

COUNTERS = {
    "evictions": "Finished blocks that left the KV cache, replays after preemptions included",
    "evicted_tokens": "Tokens they removed",
    "pages_freed": "KV pages they returned",
    "requests": "Requests that ended by themselves",
    "request_evictions": "Their evictions, replays not counted twice",
    "request_peak_tokens": "Sum of their largest resident tokens: divide by memento:requests",
    "request_peak_pages": "Sum of the most KV pages each of them held",
    "request_kv_area_tokens": "KV-AUC: sum of resident tokens over their generated tokens",
    "request_preemptions": "How often they lost their KV and were computed again",
    "forced_tokens": "Block ends that the block cap forced",
    "kv_limit_stops": "Requests stopped because their open block outgrew the cache",
    "held_back": "Admissions put off because running requests will need the pages",
    "sat_out": "Steps that running requests sat out because the last free pages were another's",
}
GAUGES = {"expected_pages": "KV pages that the running requests are expected to need at their worst moment"}

_PREFIX, _LABELS = "memento:", ("model_name", "engine")


class EngineCounters:
    """Counts of one engine core since they were last attached to a step's statistics."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._sent = {"held_back": 0, "sat_out": 0}

    def evicted(self, tokens: int, pages: int) -> None:
        """An eviction was carried out."""
        self._counts["evictions"] += 1
        self._counts["evicted_tokens"] += tokens
        self._counts["pages_freed"] += pages

    def finished(self, stats: EvictionStats) -> None:
        """A request ended by itself."""
        counts = self._counts
        counts["requests"] += 1
        counts["request_evictions"] += len(stats.evictions)
        counts["request_peak_tokens"] += stats.peak_tokens
        counts["request_peak_pages"] += stats.peak_pages
        counts["request_kv_area_tokens"] += stats.area
        counts["request_preemptions"] += stats.preemptions
        counts["forced_tokens"] += len(stats.forced_positions)
        counts["kv_limit_stops"] += stats.kv_limit

    def attach(self, stats: SchedulerStats, admission: Admission | None) -> None:
        """Send them with the statistics of this step, and begin again at 0."""
        if admission is not None:
            for name, total in (("held_back", admission.held_back), ("sat_out", admission.sat_out)):
                self._counts[name] += total - self._sent[name]
                self._sent[name] = total
            stats.waiting_lora_adapters[f"{_PREFIX}expected_pages"] = admission.expected_pages
        for name, count in self._counts.items():
            if count:
                stats.waiting_lora_adapters[f"{_PREFIX}{name}"] = count
                self._counts[name] = 0


class EvictionStatLogger(StatLoggerBase):
    """The Prometheus side. Counters are named ``memento:<name>_total`` and labelled with model and engine."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        config = vllm_config.additional_config
        self._evicts = isinstance(config, dict) and CONFIG_KEY in config
        if not self._evicts:
            return
        labels = (str(vllm_config.model_config.served_model_name), str(engine_index))
        self._counters = {name: _counter(name).labels(*labels) for name in COUNTERS}
        self._gauges = {name: _gauge(name).labels(*labels) for name in GAUGES}

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        if not self._evicts or scheduler_stats is None:
            return
        there = scheduler_stats.waiting_lora_adapters
        for name, counter in self._counters.items():
            if count := there.pop(f"{_PREFIX}{name}", 0):
                counter.inc(count)
        for name, gauge in self._gauges.items():
            if (value := there.pop(f"{_PREFIX}{name}", None)) is not None:
                gauge.set(value)

    def log_engine_initialized(self) -> None: ...


# A process registers each name once, whatever number of engines it has.


@cache
def _counter(name: str) -> Counter:
    return Counter(f"{_PREFIX}{name}", COUNTERS[name], labelnames=_LABELS)


@cache
def _gauge(name: str) -> Gauge:
    return Gauge(f"{_PREFIX}{name}", GAUGES[name], labelnames=_LABELS, multiprocess_mode="mostrecent")
