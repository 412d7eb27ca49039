"""A stock vLLM that evicts, against a Hugging Face forward with the memento mask: the same log-prob for every token.

`tests.rollout.scripted` has the reference and the requests. The largest difference anywhere must stay below 1e-4; a
mask that is wrong by a single query row gives about 0.1, which one test of this file checks.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from transformers import PreTrainedModel
from vllm import LLM
from vllm.exceptions import VLLMValidationError

from memento.format import visible_until
from memento.kernels.compaction import Moves, PagedCache, compact
from memento.rollout import eviction_stats
from memento.rollout.kv_layout import learn_packing
from memento.rollout.request_statistics import MissingStats
from tests.rollout.scripted import (
    CLOSE,
    DELIMITERS_TOO,
    END,
    FMT,
    PAGE,
    START,
    SUMMARY,
    TALLY,
    TOLERANCE,
    Case,
    assert_pool_is_full,
    block,
    blocks,
    check,
    check_output,
    differences,
    engine,
    malformed,
    qwen3,
    run,
    scheduler_of,
    words,
)


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return qwen3()[1]


@pytest.fixture(scope="module")
def roomy() -> LLM:
    return engine("roomy")


@pytest.fixture(scope="module")
def tight() -> LLM:
    return engine("tight")


@pytest.fixture(scope="module")
def delimiters_too() -> LLM:
    return engine("delimiters_too")


def test_concurrent_sequences(roomy, reference):
    rng = random.Random(1)
    cases = [Case(words(rng, 5, 60), [*blocks(rng, 2 + i % 4), *words(rng, 1, 9)]) for i in range(24)]
    stats = check(roomy, reference, cases)
    assert sum(len(s.evictions) for s in stats) > 60
    assert sum(s.pages_freed for s in stats) > 80
    assert all(s.preemptions == 0 and not s.kv_limit and not s.forced_positions for s in stats)


def test_malformed_traces(roomy, reference):
    rng = random.Random(2)
    traces = malformed(rng)
    check(roomy, reference, [Case(words(rng, 5, 40), trace) for trace in traces])
    check(roomy, reference, [Case([*words(rng, 5, 40), *trace], [9, 9], prompt_logprobs=True) for trace in traces])


def test_requests_choose_for_themselves(roomy, reference):
    rng = random.Random(3)
    prompt = words(rng, 30, 40)
    choices: list[dict[str, Any]] = [
        {},
        {"evict": False},
        {"keep_last_n": 1},
        {"keep_last_n": 2},
        {"keep_last_n": -1},
        {"prompt_len": 30},
    ]
    stats = check(roomy, reference, [Case(prompt, [*blocks(rng, 4), 9, 9], choice) for choice in choices])
    assert [len(s.evictions) for s in stats] == [4, 0, 3, 2, 0, 4]
    # Whole traces as prompts: also one whose first blocks are a prompt that nobody scans.
    trace = [*prompt, *blocks(rng, 4), 9]
    cut = len(prompt) + 100
    cases = [Case(trace, [9, 9], choice, prompt_logprobs=True) for choice in [*choices, {"prompt_len": cut}]]
    check(roomy, reference, cases)


def test_prefix_cache_of_prompts(roomy, reference):
    rng = random.Random(4)
    prompts = [words(rng, 70, 130) for _ in range(4)]
    prompts[3] = [*words(rng, 40, 50), *block(rng), *words(rng, 80, 90)]  # only 32 tokens before its first block
    cases = [Case(prompt, [*blocks(rng, 2), 9]) for prompt in prompts for _ in range(4)]
    assert roomy.reset_prefix_cache()
    check(roomy, reference, cases)
    outputs = run(roomy, cases)
    cached = [output.num_cached_tokens for output in outputs]
    assert cached == [len(c.prompt) // PAGE * PAGE if c.prompt is not prompts[3] else PAGE for c in cases]
    check(roomy, reference, cases)
    # A completion is evicted, so only its tokens before the first block may ever be found again.
    first = cases[0]
    assert first.script is not None
    again = Case([*first.prompt, *first.script], [9, 9])
    assert run(roomy, [again])[0].num_cached_tokens == (len(first.prompt) + 1) // PAGE * PAGE
    check(roomy, reference, [again])
    # The pages of a request that did not evict are full attention: of them, too, only those before the first block.
    check(roomy, reference, [Case(again.prompt, [9, 9], {"evict": False})])
    assert run(roomy, [again])[0].num_cached_tokens == (len(first.prompt) + 1) // PAGE * PAGE
    check(roomy, reference, [again])


def test_block_cap(roomy, reference):
    rng = random.Random(5)
    # The script never closes its first block, closes the second in time and the third exactly at the cap.
    script = [START, *words(rng, 49, 49), SUMMARY, 9, 9, CLOSE, *words(rng, 3, 3)]
    script += [
        START,
        *words(rng, 20, 20),
        END,
        SUMMARY,
        9,
        CLOSE,
        START,
        *words(rng, 40, 40),
        END,
        SUMMARY,
        9,
        CLOSE,
        8,
        8,
    ]
    prompt = words(rng, 20, 20)
    capped, free, off = check(
        roomy,
        reference,
        [
            Case(prompt, script, {"max_block_tokens": 40}),
            Case(prompt, script, {"max_block_tokens": None}),
            Case([*prompt, START, *words(rng, 50, 50)], [9, SUMMARY, 9, CLOSE, 9, 9], {"max_block_tokens": 40}),
        ],
    )
    third = script.index(START, script.index(START, 1) + 1)
    assert capped.forced_positions == (41, third + 41)
    assert free.forced_positions == ()
    assert off.forced_positions == (0,), "a block that the prompt already overfilled is closed by the first token"
    assert len(off.evictions) == 1


def test_preemption_replays_evictions(tight, reference):
    rng = random.Random(6)
    cases = [Case(words(rng, 5, 90), [*blocks(rng, 4), *words(rng, 1, 9)]) for _ in range(14)]
    stats = check(tight, reference, cases)
    assert sum(s.preemptions for s in stats) > 20
    assert all(len(s.evictions) == 4 for s in stats)


def test_everything_at_once(tight, reference):
    """Blocks in prompts that enter in chunks, groups over a cached prompt, opt-outs, and too few pages."""
    rng = random.Random(7)
    prompts = [[*words(rng, 40, 70), *blocks(rng, i % 3, 30, 60)] for i in range(8)]
    choices: list[dict[str, Any]] = [{}, {"keep_last_n": 1}, {"evict": False}]
    cases = [Case(prompt, [*blocks(rng, 2), 9, 9], choice) for prompt in prompts for choice in choices]
    stats = check(tight, reference, cases)
    assert sum(s.preemptions for s in stats) > 15
    check(
        tight, reference, [Case([*c.prompt, *(c.script or [])], [9], c.settings, prompt_logprobs=True) for c in cases]
    )


def test_sampled_and_seeded_requests_survive_preemption(tight, roomy, reference):
    rng = random.Random(8)
    cases = [Case([*words(rng, 5, 60), *block(rng)], sampled=150, seed=i) for i in range(12)]
    stats = check(tight, reference, cases)
    assert sum(s.preemptions for s in stats) > 5
    calm, pressed = run(roomy, cases), run(tight, cases)
    assert [o.outputs[0].token_ids for o in calm] == [o.outputs[0].token_ids for o in pressed]
    unlike = {tuple(o.outputs[0].token_ids[:20]) for o in calm}
    assert len(unlike) == len(cases)


def test_logical_length_may_exceed_the_pool_and_physical_may_not(tight, reference):
    rng = random.Random(9)
    long = Case(words(rng, 20, 20), [*blocks(rng, 15, 60, 90), 9])
    assert len(long.script or ()) > 1000 > 25 * PAGE
    endless = Case(words(rng, 20, 20), [START, *words(rng, 1500, 1500)])
    others = [Case(words(rng, 20, 60), [*blocks(rng, 3), 9]) for _ in range(4)]
    outputs = run(tight, [long, endless, *others])
    assert [len(o.outputs[0].token_ids) for o in outputs[2:]] == [len(c.script or ()) for c in others]
    stopped = outputs[1]
    stats = eviction_stats(stopped)
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("length", "memento_kv_limit")
    assert stats.kv_limit and stats.peak_pages == 25
    assert len(stopped.outputs[0].token_ids) + 20 == 25 * PAGE + 1, "the last token is sampled and never stored"
    for case, output in zip([long, endless], outputs[:2], strict=True):
        trace = [*case.prompt, *output.outputs[0].token_ids]
        assert differences(reference, case, output, visible_until(trace, FMT)) < TOLERANCE


def test_requests_that_cannot_run_fail_alone(tight, reference):
    rng = random.Random(10)
    good = Case(words(rng, 20, 20), [*blocks(rng, 2), 9])
    too_long = Case(words(rng, 900, 900), [9])
    too_short = Case(words(rng, 20, 20), [9], {"prompt_len": 21})
    outputs = run(tight, [good, too_long, too_short, good])
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error", "error", "length"]
    assert "needs 29 KV pages" in outputs[1].outputs[0].stop_reason
    assert "only 20 tokens" in outputs[2].outputs[0].stop_reason
    with pytest.raises(MissingStats, match="carries no eviction statistics"):
        eviction_stats(outputs[1])
    with pytest.raises(VLLMValidationError, match="has no key evicts"):
        run(tight, [Case(good.prompt, [9], {"evicts": False})])
    # 900 prompt tokens fit as soon as they hold blocks: physical tokens count, not logical ones.
    check(tight, reference, [Case([*words(rng, 20, 20), *blocks(rng, 14, 60, 90)], [9, 9])])


def test_abort(tight, reference):
    rng = random.Random(11)
    llm_engine = tight.llm_engine
    cases = [Case(words(rng, 20, 60), [*blocks(rng, 4), 9]) for _ in range(12)]
    for i, case in enumerate(cases):
        llm_engine.add_request(f"abort-{i}", {"prompt_token_ids": case.prompt}, case.params())
    for _ in range(150):
        llm_engine.step()
    assert any(r.num_preemptions for r in scheduler_of(tight).requests.values()), "abort preempted requests, too"
    llm_engine.abort_request([f"abort-{i}" for i in range(12)])
    while llm_engine.has_unfinished_requests():
        llm_engine.step()
    llm_engine.step()
    assert_pool_is_full(tight)
    check(tight, reference, cases[:3])


def test_samples_of_one_request(tight, reference):
    """n > 1: every sample evicts for itself, over one prompt, and the statistics of all of them come back."""
    rng = random.Random(15)
    prompt = [*words(rng, 70, 70), *block(rng)]
    cases = [
        Case(prompt, [*blocks(rng, 3), 9, 9]),
        Case(prompt, sampled=120, seed=5),
        Case(prompt, [*blocks(rng, 2), 9], prompt_logprobs=True),
    ]
    outputs = tight.generate(
        [{"prompt_token_ids": case.prompt} for case in cases], [case.params(n=4) for case in cases], use_tqdm=False
    )
    assert_pool_is_full(tight)
    for case, output in zip(cases, outputs, strict=True):
        for sample in range(4):
            assert check_output(reference, case, output, sample=sample).evictions
        with pytest.raises(MissingStats, match="has 4 samples"):
            eviction_stats(output)
    assert len({tuple(completion.token_ids) for completion in outputs[1].outputs}) == 4


def test_a_users_text_may_spell_a_delimiter(roomy, reference):
    """What a user wrote is a prompt and not a trace: it stays visible, whatever tokens it holds."""
    rng = random.Random(16)
    prompt = [*words(rng, 20, 20), *block(rng), START, *words(rng, 30, 30)]
    script = [END, SUMMARY, 9, CLOSE, *blocks(rng, 2), 9]
    opaque, counted, scanned = check(
        roomy,
        reference,
        [
            Case(prompt, script, {"scan_prompt": False}),
            Case(prompt, script, {"prompt_len": len(prompt)}),
            Case(prompt, script),
        ],
    )
    assert opaque.evictions == counted.evictions and len(opaque.evictions) == 2
    assert len(scanned.evictions) == 4, "as a trace, it holds one block and the beginning of another"


def test_aborts_at_every_stage(tight, reference):
    """Waiting, in the middle of a chunked prompt, before and after an eviction, preempted: nothing is left over."""
    rng = random.Random(17)
    llm_engine = tight.llm_engine
    cases = [Case([*words(rng, 60, 90), *block(rng)], [*blocks(rng, 2, 20, 40), 9]) for _ in range(40)]
    alive, serial, stages = {}, 0, set()
    for step in range(220):
        if serial < len(cases) and step % 4 == 0:
            llm_engine.add_request(f"a-{serial}", {"prompt_token_ids": cases[serial].prompt}, cases[serial].params())
            alive[f"a-{serial}"] = serial
            serial += 1
        if alive and step % 5 == 3:
            there = {
                name: r for name in alive for i, r in scheduler_of(tight).requests.items() if i.startswith(f"{name}-")
            }
            preempted = sorted(name for name, r in there.items() if r.status.name == "PREEMPTED")
            victim = rng.choice(preempted or sorted(there))
            request = there[victim]
            plan = scheduler_of(tight)._manager.plans[request.request_id]
            stages.add((request.status.name, bool(plan.applied), request.num_computed_tokens < len(cases[0].prompt)))
            del alive[victim]
            llm_engine.abort_request([victim])
        for output in llm_engine.step():
            if output.finished and output.request_id in alive:
                check_output(reference, cases[alive.pop(output.request_id)], output)
    llm_engine.abort_request(list(alive))
    while llm_engine.has_unfinished_requests():
        llm_engine.step()
    llm_engine.step()
    assert_pool_is_full(tight)
    assert {"WAITING", "RUNNING", "PREEMPTED"} <= {status for status, *_ in stages}
    assert {True, False} == {evicted for _, evicted, _ in stages}


def test_reset_of_running_requests_replays_them(tight, reference):
    """What a weight update does: every running request loses its cache and is computed again, evictions included."""
    rng = random.Random(12)
    llm_engine = tight.llm_engine
    cases = [Case(words(rng, 20, 60), [*blocks(rng, 3), 9]) for _ in range(4)]
    for i, case in enumerate(cases):
        llm_engine.add_request(f"reset-{i}", {"prompt_token_ids": case.prompt}, case.params())
    finished = {}
    for step in range(10_000):
        for output in llm_engine.step():
            if output.finished:
                finished[output.request_id] = output
        if step in (60, 130):
            assert scheduler_of(tight).reset_prefix_cache(reset_running_requests=True)
        if not llm_engine.has_unfinished_requests():
            break
    for i, case in enumerate(cases):
        output = finished[f"reset-{i}"]
        trace = [*case.prompt, *output.outputs[0].token_ids]
        assert differences(reference, case, output, visible_until(trace, FMT)) < TOLERANCE
        assert eviction_stats(output).preemptions >= 1
    assert_pool_is_full(tight)


def test_delimiters_evicted_and_a_cap_for_the_whole_engine(delimiters_too, reference):
    llm, fmt = delimiters_too, DELIMITERS_TOO
    rng = random.Random(13)
    cases = [Case(words(rng, 5, 90), [*blocks(rng, 4, 20, 60), 9]) for _ in range(12)]
    stats = check(llm, reference, cases, fmt)
    assert sum(s.preemptions for s in stats) > 0
    check(llm, reference, [Case([*c.prompt, *(c.script or [])], [9], prompt_logprobs=True) for c in cases[:4]], fmt)
    # Every block that would run on is closed, over and over, and the memory stays bounded.
    closing = [START, *[9] * 64, SUMMARY, 9, CLOSE]
    script = [token for _ in range(5) for token in closing]
    output = run(llm, [Case(words(rng, 20, 20), script)])[0]
    forced = eviction_stats(output).forced_positions
    assert forced and all(output.outputs[0].token_ids[p] == END for p in forced)
    trace = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    assert differences(reference, Case(output.prompt_token_ids, []), output, visible_until(trace, fmt)) < TOLERANCE


def test_a_mask_wrong_by_one_query_would_be_seen(roomy, reference):
    rng = random.Random(14)
    case = Case(words(rng, 20, 20), [*blocks(rng, 3), 9])
    output = run(roomy, [case])[0]
    limits = visible_until([*case.prompt, *(case.script or [])], FMT)
    shifted = np.where(limits < len(limits), limits - 1, limits)
    late = np.where(limits < len(limits), limits + 1, limits)
    assert differences(reference, case, output, limits) < TOLERANCE
    assert differences(reference, case, output, shifted, tally=False) > 0.01
    assert differences(reference, case, output, late, tally=False) > 0.01
    assert differences(reference, case, output, np.full_like(limits, len(limits)), tally=False) > 0.01


@pytest.mark.parametrize(("isa", "page_tokens"), [("vec", 32), ("vec", 128), ("vec16", 16), ("vec16", 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moving_tokens_is_the_same_as_writing_them_elsewhere(isa, page_tokens, dtype):
    from vllm import _custom_ops as ops

    torch.manual_seed(0)
    heads, head_size, pages = 2, 64, 5
    key, value = (torch.randn(page_tokens, heads, head_size).to(dtype) for _ in range(2))
    source = torch.randperm(pages * page_tokens)[:page_tokens]
    target = torch.randperm(pages * page_tokens)[:page_tokens]

    def written(slots: torch.Tensor) -> torch.Tensor:
        cache = torch.zeros(pages, heads, page_tokens, 2 * head_size, dtype=dtype)
        key_cache, value_cache = cache.view(pages, heads, 2 * page_tokens, head_size).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)
        return cache

    moved, expected = written(source), written(target)
    packing = learn_packing(isa, page_tokens, 2 * head_size, dtype)
    compact(PagedCache((moved,), packing), Moves.of([(source.numpy(), target.numpy())], "cpu"))
    # Compare where the tokens went; what they left behind stays in the other slots.
    page, element = target[:, None] // page_tokens, learn_packing(isa, page_tokens, 2 * head_size, dtype)
    place = page, slice(None), element[target % page_tokens]
    assert torch.equal(moved.view(pages, heads, -1)[place], expected.view(pages, heads, -1)[place])


def test_zzz_enough_was_compared():
    """Last in this file: all of the above, in tokens."""
    assert TALLY.scored_tokens >= 10_000
    assert TALLY.worst < TOLERANCE
    assert TALLY.preemptions > 50
