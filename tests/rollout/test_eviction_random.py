"""Random loads on an evicting engine: every log-prob, eviction and page must be as computed from the tokens.

A load is a number of requests with random traces (most of them malformed somewhere) and settings, arriving over time,
on a pool, a chunk size and a batch limit that are drawn too; some requests are aborted, and sometimes all of them lose
their cache at once, as in a weight update. The short run is part of `make test`; the long one is

    pytest -m long -s tests/rollout/test_eviction_random.py

of 1,000 loads, or in pieces: ``MEMENTO_RANDOM_LOADS=250 pytest ... --hypothesis-seed=1``.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("vllm")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memento.format import visible_until
from memento.rollout import admission
from memento.rollout.plan import RequestControl
from tests.rollout.scripted import (
    CLOSE,
    END,
    FMT,
    PAGE,
    START,
    SUMMARY,
    TALLY,
    Case,
    Limits,
    assert_pool_is_full,
    check_output,
    engine,
    qwen3,
    scheduler_of,
    words,
)


@dataclass(frozen=True)
class Load:
    """What hypothesis draws. Word tokens come from `seed`: their values do not matter."""

    engine: str
    pages: int
    chunk_tokens: int
    batch: int
    requests: tuple[Request, ...]
    aborts: tuple[tuple[int, int], ...]
    """(step, request)."""
    resets: tuple[int, ...]
    """Steps at which every running request loses its cache."""
    margin_sigmas: float
    """Of the engine that reserves: with few, or less than none, requests enter that have to sit out steps."""
    seed: int


@dataclass(frozen=True)
class Request:
    """`prompt` and `script` are pieces: a delimiter, or a number of words as a negative integer."""

    prompt: tuple[int, ...]
    script: tuple[int, ...]
    settings: tuple[tuple[str, Any], ...]
    prompt_logprobs: bool
    arrives: int


_words = st.integers(-40, -1)
_delimiter = st.sampled_from([START, END, SUMMARY, CLOSE])
_block = st.tuples(_words, _words).map(lambda w: (START, w[0], END, SUMMARY, max(w[1], -6), CLOSE))
_piece = st.one_of(_block, _block, _words.map(lambda w: (w,)), _delimiter.map(lambda d: (d,)))
_setting = st.sampled_from(
    [(), (), (), (("evict", False),), (("keep_last_n", 1),), (("keep_last_n", 2),), (("scan_prompt", False),)]
)


def _pieces(least: int, most: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(_piece, min_size=least, max_size=most).map(lambda ps: tuple(x for p in ps for x in p))


_request = st.builds(
    Request,
    prompt=_pieces(1, 4),
    script=_pieces(1, 2),
    settings=_setting,
    prompt_logprobs=st.booleans(),
    arrives=st.integers(0, 30),
)
loads = st.builds(
    Load,
    engine=st.sampled_from(["tight", "reserving"]),
    pages=st.integers(3, 14),
    chunk_tokens=st.sampled_from([6, 16, 33, 48]),
    batch=st.integers(2, 8),
    requests=st.lists(_request, min_size=3, max_size=7).map(tuple),
    aborts=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 5)), max_size=3).map(tuple),
    resets=st.lists(st.integers(1, 60), max_size=2).map(tuple),
    margin_sigmas=st.sampled_from([admission.MARGIN_SIGMAS, 0.0, -4.0]),
    seed=st.integers(0, 2**16),
)


def expand(pieces: tuple[int, ...], rng: random.Random) -> list[int]:
    return [token for p in pieces for token in ([p] if p > 0 else words(rng, -p, -p))]


def cases_of(load: Load) -> list[Case]:
    rng = random.Random(load.seed)
    shared = words(rng, 40, 40)  # a prefix that the cache may give to several of them
    cases = []
    for index, request in enumerate(load.requests):
        prompt = [*(shared if index % 2 else words(rng, 1, 9)), *expand(request.prompt, rng)]
        script = expand(request.script, rng)
        cases.append(Case(prompt, script, dict(request.settings), request.prompt_logprobs))
    return cases


def run_load(load: Load, limits: Limits = visible_until) -> int:
    """Run it, compare everything, and say how many requests were preempted."""
    with mock.patch.object(admission, "MARGIN_SIGMAS", load.margin_sigmas):
        return _run_load(load, limits)


def _run_load(load: Load, limits: Limits) -> int:
    llm, (_, reference) = engine(load.engine), qwen3()
    scheduler, llm_engine = scheduler_of(llm), llm.llm_engine
    cases = cases_of(load)
    # The drawn pool and limits, in an engine that is there already: the rest of its pages is taken away.
    pool, kept = scheduler.kv_cache_manager.block_pool, load.pages
    hidden = pool.get_new_blocks(pool.num_gpu_blocks - 1 - kept)
    batch_limit = "max_num_active_reqs" if hasattr(scheduler, "max_num_active_reqs") else "max_num_running_reqs"
    before = {
        name: getattr(scheduler, name)
        for name in ("_page_limit", "_limit_tokens", "max_num_scheduled_tokens", batch_limit)
    }
    scheduler._page_limit, scheduler._limit_tokens = kept, kept * PAGE
    scheduler.max_num_scheduled_tokens = max(load.chunk_tokens, load.batch)
    setattr(scheduler, batch_limit, load.batch)
    finished: dict[int, Any] = {}
    alive: set[int] = set()
    try:
        for step in range(20_000):
            for index, request in enumerate(load.requests):
                if request.arrives == step:
                    case = cases[index]
                    llm_engine.add_request(f"{index}-of-load", {"prompt_token_ids": case.prompt}, case.params())
                    alive.add(index)
            for when, index in load.aborts:
                if when == step and index in alive:
                    llm_engine.abort_request([f"{index}-of-load"])
                    alive.discard(index)
            if step in load.resets:
                pool.free_blocks(hidden)  # or vLLM would find pages in use
                assert scheduler.reset_prefix_cache(reset_running_requests=True)
                hidden = pool.get_new_blocks(len(hidden))
            for output in llm_engine.step():
                if output.finished:
                    index = int(output.request_id.split("-")[0])
                    if index in alive:
                        finished[index] = output
                        alive.discard(index)
            if step > 30 and not llm_engine.has_unfinished_requests():
                break
        else:
            raise AssertionError(f"requests {sorted(alive)} never finished")
        llm_engine.step()
    finally:
        leftovers = list(scheduler.requests)
        if leftovers:  # of a failure: the engine serves the next example, too
            llm_engine.abort_request(leftovers, internal=True)
            llm_engine.step()
        pool.free_blocks(hidden)
        scheduler.reset_prefix_cache()
        for name, value in before.items():
            setattr(scheduler, name, value)
    assert_pool_is_full(llm)
    preempted = 0
    for index, output in finished.items():
        case = cases[index]
        if output.outputs[0].finish_reason == "error":
            assert "KV pages" in output.outputs[0].stop_reason
            assert too_long(case, kept)
            continue
        stats = check_finished(reference, case, output, limits, kept)
        preempted += bool(stats.preemptions)
    return preempted


def too_long(case: Case, pages: int) -> bool:
    """Whether the prompt alone holds more pages at once than there are."""
    from memento.format import kv_profile

    peak = kv_profile(case.prompt, case.format(FMT), case.unscanned).peak_tokens
    return -(-peak // PAGE) > pages


def check_finished(reference: Any, case: Case, output: Any, limits: Limits, pages: int) -> Any:
    if output.outputs[0].stop_reason == "memento_kv_limit":  # it outgrew the pool: the script ends there
        case = Case(case.prompt, list(output.outputs[0].token_ids), case.settings, case.prompt_logprobs)
        stats = check_output(reference, case, output, limits=limits)
        assert stats.kv_limit and stats.peak_pages == pages
        return stats
    return check_output(reference, case, output, limits=limits)


_common: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=50, derandomize=True, **_common)
@given(loads)
def test_random_loads(load):
    run_load(load)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_random_loads_for_long():
    requests = preempted = 0

    @settings(max_examples=int(os.environ.get("MEMENTO_RANDOM_LOADS", "1000")), **_common)
    @given(loads)
    def run_many(load):
        nonlocal requests, preempted
        requests += len(load.requests)
        preempted += run_load(load)

    run_many()
    sat_out = scheduler_of(engine("reserving"))._manager.admission.sat_out
    assert sat_out > 0
    print(f"\n{requests} requests, {preempted} of them preempted, {sat_out} steps sat out; {TALLY}")


def test_a_mask_wrong_by_one_query_would_be_seen():
    """The same machinery, with a reference whose blocks disappear one query too early."""

    def shifted(*args: Any) -> Any:
        correct = visible_until(*args)
        return correct - (correct < len(correct))

    block = (START, -40, END, SUMMARY, -5, CLOSE)
    request = Request(prompt=(-20, *block), script=(-5, *block, -5), settings=(), prompt_logprobs=False, arrives=0)
    load = Load("tight", 20, 48, 4, (request,) * 3, (), (), admission.MARGIN_SIGMAS, seed=1)
    run_load(load)
    worst = TALLY.worst
    with pytest.raises(AssertionError):
        run_load(load, shifted)
    TALLY.worst = worst  # what was wrong on purpose is no finding of the session


def test_settings_of_the_loads_are_valid():
    for setting in ((), (("evict", False),), (("keep_last_n", 1),), (("scan_prompt", False),)):
        RequestControl.from_extra_args({"memento": dict(setting)}, FMT)
