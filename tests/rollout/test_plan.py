"""The plan of one request, without an engine: it must say the same as `memento.format`, token by token."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memento.format import NEVER, Eviction, MementoFormat, evictions, kv_profile
from memento.rollout.plan import (
    Compaction,
    ControlError,
    EvictionFault,
    EvictionPlan,
    EvictionStep,
    RequestControl,
)
from memento.rollout.request_statistics import EvictionStats, summarize

FMT = MementoFormat(1, 2, 3, 4, evict_delimiters=False)
TRACE = [9, 1, 7, 7, 2, 3, 8, 4, 9]  # the worked example of memento.format
FORMATS = [FMT, MementoFormat(1, 2, 3, 4, evict_delimiters=True), MementoFormat(1, 2, 3, 4, False, keep_last_n=1)]
# Half of the tokens are delimiters, so that most traces are malformed somewhere.
traces = st.lists(st.sampled_from([1, 2, 3, 4, 7, 8, 9, 10]), min_size=1, max_size=60)
formats = st.sampled_from(FORMATS)


def plan_of(token_ids: Sequence[int], fmt: MementoFormat = FMT, num_prompt_tokens: int = 0) -> EvictionPlan:
    plan = EvictionPlan(RequestControl(fmt), num_prompt_tokens)
    plan.observe(token_ids)
    return plan


def test_the_worked_example():
    plan = plan_of(TRACE)
    assert plan.events == [Eviction(8, 2, 4)]
    assert plan.first_evictable == 2
    assert [plan.resident_tokens(n) for n in range(len(TRACE) + 1)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 7]
    assert plan.peak_tokens(9) == 8
    assert plan.due(7) is None and plan.tokens_until_boundary(3) == 5
    assert plan.due(8) == (8, 2, 4)
    plan.advance(Eviction(8, 2, 4), pages_freed=0)
    assert (plan.evicted, plan.due(8), plan.tokens_until_boundary(8)) == (2, None, NEVER)
    plan.reset()
    assert (plan.evicted, plan.done) == (0, 1), "a preempted request starts again, and what was done stays on record"
    assert plan.tokens_until_boundary(0) == 8


@given(traces, formats, st.data())
def test_tokens_one_by_one_or_in_pieces_make_the_same_plan(trace, fmt, data):
    whole, pieces = plan_of(trace, fmt), EvictionPlan(RequestControl(fmt), 0)
    seen = 0
    while seen < len(trace):
        seen += data.draw(st.integers(1, len(trace) - seen))
        pieces.observe(trace[:seen])
        pieces.observe(trace[: seen // 2])  # a preempted request is read again from the start: no effect
    assert pieces.events == whole.events == [Eviction(*e) for e in evictions(trace, fmt)]
    assert pieces.first_evictable == whole.first_evictable


@given(traces, formats)
def test_physical_tokens_are_those_of_the_kv_profile(trace, fmt):
    plan, profile = plan_of(trace, fmt), kv_profile(trace, fmt)
    assert [plan.resident_tokens(n) for n in range(1, len(trace) + 1)] == profile.resident_T.tolist()
    assert plan.peak_tokens(len(trace)) == profile.peak_tokens
    assert all(start >= plan.first_evictable for _, start, _ in plan.events)


@given(traces, formats, st.integers(0, 60))
def test_statistics_are_those_of_the_kv_profile(trace, fmt, num_prompt_tokens):
    num_prompt_tokens = min(num_prompt_tokens, len(trace))
    plan = EvictionPlan(RequestControl(fmt, prompt_len=num_prompt_tokens), num_prompt_tokens)
    plan.observe(trace)
    for event in [event for event in plan.events if event.boundary <= len(trace) - 2]:
        plan.advance(event, pages_freed=1)
    stats = summarize(plan, len(trace), page_tokens=32, preemptions=2, kv_limit=False)
    profile = kv_profile(trace, fmt, num_prompt_tokens)
    assert (stats.peak_tokens, stats.area) == (profile.peak_tokens, profile.area)
    assert stats.evictions == tuple(e for e in plan.events if e.boundary <= len(trace) - 2)
    assert stats.pages_freed == len(stats.evictions)
    assert EvictionStats.from_dict(json.loads(json.dumps(stats.to_dict()))) == stats


def test_an_eviction_that_was_not_carried_out_is_a_fault():
    plan = plan_of([*TRACE, 9])
    with pytest.raises(EvictionFault, match="not those the tokens ask for"):
        summarize(plan, 10, page_tokens=32, preemptions=0, kv_limit=False)
    with pytest.raises(EvictionFault, match="late"):
        plan.due(9)
    with pytest.raises(EvictionFault, match="is due"):
        plan.tokens_until_boundary(8)
    with pytest.raises(EvictionFault, match="not the next"):
        plan.advance(Eviction(8, 2, 3), 0)


def test_a_prompt_that_is_not_scanned_neither_evicts_nor_hides_its_pages():
    plan = EvictionPlan(RequestControl(FMT, prompt_len=8), num_prompt_tokens=8)
    plan.observe([*TRACE[:8], *TRACE])
    assert plan.events == [Eviction(16, 10, 12)]
    assert plan.first_evictable == 10


def test_forced_positions_are_a_function_of_the_tokens():
    fmt = MementoFormat(1, 2, 3, 4, evict_delimiters=False, max_block_tokens=2)
    plan = plan_of([9, 1, 7, 7, 2, 3, 8, 4, 1, 7, 2, 9], fmt, num_prompt_tokens=1)
    assert plan.forced_positions == [4], "the second block closed itself before the cap"
    prompt = plan_of([1, 7, 7, 7, 7], fmt, num_prompt_tokens=5)
    assert prompt.forced_positions == [], "prompt tokens are given, not forced"
    prompt.observe([1, 7, 7, 7, 7, 2])
    assert prompt.forced_positions == [5]
    with pytest.raises(EvictionFault, match="BlockCap"):
        plan_of([9, 1, 7, 7, 7], fmt, num_prompt_tokens=1)


def test_what_a_request_may_choose():
    fmt = MementoFormat(1, 2, 3, 4, evict_delimiters=True, max_block_tokens=9)
    assert RequestControl.from_extra_args(None, fmt) == RequestControl(fmt)
    assert RequestControl.from_extra_args({"other": 1}, fmt) == RequestControl(fmt)
    chosen = RequestControl.from_extra_args({"memento": {"keep_last_n": 2, "prompt_len": 3}}, fmt)
    assert (chosen.fmt.keep_last_n, chosen.fmt.max_block_tokens, chosen.prompt_len) == (2, 9, 3)
    off = RequestControl.from_extra_args({"memento": {"evict": False, "max_block_tokens": None}}, fmt).fmt
    assert not off.evicts and off.max_block_tokens is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_last": 1}, "no key keep_last; the keys are"),
        ({"evict": 2}, "true or false"),
        ({"keep_last_n": -2}, "at least -1"),
        ({"max_block_tokens": 0}, "at least 1"),
        ({"prompt_len": True}, "integer"),
        ("on", "must be a dictionary"),
    ],
)
def test_malformed_settings_name_the_key(settings, message):
    with pytest.raises(ControlError, match=message):
        RequestControl.from_extra_args({"memento": settings}, FMT)


def test_prompt_len_beyond_the_prompt():
    with pytest.raises(ControlError, match="only 4 tokens"):
        EvictionPlan(RequestControl(FMT, prompt_len=5), num_prompt_tokens=4)


def test_a_step_crosses_processes():
    step = EvictionStep((Compaction("a", np.arange(3), np.arange(3), 1),), {"a": 3})
    back = pickle.loads(pickle.dumps(step))
    assert back.evicted == step.evicted
    assert back.compactions[0].source_slots.tolist() == [0, 1, 2]
