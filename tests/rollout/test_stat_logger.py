"""Eviction counts travel from the engine core to Prometheus, and leave nothing behind for vLLM's own loggers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import msgspec
from prometheus_client import REGISTRY
from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories
from vllm.v1.metrics.stats import SchedulerStats

from memento.format import Eviction
from memento.rollout.admission import Admission
from memento.rollout.request_statistics import EvictionStats
from memento.rollout.stat_logger import COUNTERS, EngineCounters, EvictionStatLogger

FINISHED = EvictionStats(
    evictions=(Eviction(8, 2, 4),),
    tokens_evicted=2,
    pages_freed=1,
    page_tokens=32,
    peak_pages=3,
    peak_tokens=90,
    area=1000,
    preemptions=1,
    forced_positions=(5, 9),
    kv_limit=True,
)


def logger(evicts: bool, engine: int) -> EvictionStatLogger:
    config: Any = SimpleNamespace(
        additional_config={"memento": {}} if evicts else {}, model_config=SimpleNamespace(served_model_name="tiny")
    )
    return EvictionStatLogger(config, engine)


def value(name: str, engine: int) -> float | None:
    return REGISTRY.get_sample_value(f"memento:{name}", {"model_name": "tiny", "engine": str(engine)})


def test_counts_arrive_once():
    counters, admission, log = EngineCounters(), Admission(32, held_back=3, expected_pages=17), logger(True, engine=7)
    for steps in range(2):
        counters.evicted(tokens=2, pages=1)
        counters.finished(FINISHED)
        sent = SchedulerStats()
        counters.attach(sent, admission)
        received = msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=SchedulerStats)
        log.record(received, None)
        assert received.waiting_lora_adapters == {}, "nobody else may find them"
        assert value("evictions_total", 7) == value("requests_total", 7) == steps + 1
        assert value("forced_tokens_total", 7) == 2 * (steps + 1)
        assert value("request_kv_area_tokens_total", 7) == 1000 * (steps + 1)
        assert value("held_back_total", 7) == 3, "the admission counts on, and is not counted twice"
        assert value("expected_pages", 7) == 17
    assert all(value(f"{name}_total", 7) is not None for name in COUNTERS)
    idle = SchedulerStats()
    counters.attach(idle, None)
    assert idle.waiting_lora_adapters == {}


def test_every_server_finds_the_logger_and_it_is_silent_where_nothing_evicts():
    assert EvictionStatLogger in load_stat_logger_plugin_factories()
    stats = SchedulerStats(waiting_lora_adapters={"adapter": 2})
    logger(False, engine=8).record(stats, None)
    assert stats.waiting_lora_adapters == {"adapter": 2}
    assert value("requests_total", 8) is None
