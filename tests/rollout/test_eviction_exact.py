"""A stock vLLM that evicts, against a Hugging Face forward with the memento mask: the same log-prob for every token.

The reference knows nothing of pages: one eager fp32 forward over the whole trace, a dense mask from `visible_until` and
the original position ids. The engine generates scripted tokens (or samples), one by one, under batching, chunked
prefill, prefix caching and preemption. The largest difference anywhere must stay below 1e-4; a mask that is wrong by a
single query row gives about 0.1, which the last test of this file checks.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
# In-process, one thread: engines start in two seconds and several of them fit on a small machine. They share the
# process's distributed groups, and the first one that is shut down takes these away: hence module-wide fixtures.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",
    VLLM_LOGGING_LEVEL="ERROR",
)

from transformers import Qwen3Config, Qwen3ForCausalLM
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from memento.format import MementoFormat, evictions, kv_profile, visible_until
from memento.kernels.compaction import Moves, PagedCache, compact
from memento.rollout import EvictionStats, eviction_args, eviction_stats
from memento.rollout.kv_layout import learn_packing
from memento.rollout.request_statistics import MissingStats

PAGE, VOCAB, LAYERS, KV_HEADS, HEAD = 32, 64, 3, 2, 32
FMT = MementoFormat(1, 2, 3, 4, evict_delimiters=False)
START, END, SUMMARY, CLOSE = FMT.delimiter_ids
TOLERANCE = 1e-4


class Scripted(AdapterLogitsProcessor):
    """Makes a request generate ``extra_args["script"]``, so that blocks lie where a test wants them."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        script = (params.extra_args or {}).get("script")
        if script is None:
            return None

        def force(output_ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
            if len(output_ids) < len(script):
                logits[:] = float("-inf")
                logits[script[len(output_ids)]] = 0.0
            return logits

        return force


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("qwen3"))
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        max_position_embeddings=4096,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(model_dir: str) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(model_dir, attn_implementation="eager", dtype=torch.float32).eval()


@torch.no_grad()
def reference_logprobs(model: Qwen3ForCausalLM, token_ids: Sequence[int], limits: np.ndarray) -> torch.Tensor:
    """[T - 1]: the log-prob of each token but the first, under ``k <= q < limits[k]``."""
    ids = torch.tensor(token_ids)
    query = torch.arange(len(ids))
    visible = (query[None] <= query[:, None]) & (query[:, None] < torch.from_numpy(limits)[None])
    bias = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    logits = model(ids[None], attention_mask=bias[None, None], position_ids=query[None]).logits[0]
    return logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def engine(model_dir: str, fmt: MementoFormat, pages: int, **settings: Any) -> LLM:
    page_bytes = LAYERS * 2 * KV_HEADS * HEAD * 4 * PAGE
    everywhere: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": PAGE,
        "kv_cache_memory_bytes": pages * page_bytes,
        "max_model_len": 2048,
        "max_num_seqs": 24,
    }
    return LLM(model_dir, **everywhere | eviction_args(fmt, logits_processors=[Scripted]) | settings)


@pytest.fixture(scope="module")
def roomy(model_dir: str) -> Iterator[LLM]:
    """Everything fits."""
    llm = engine(model_dir, FMT, pages=400)
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def tight(model_dir: str) -> Iterator[LLM]:
    """25 usable pages, 800 tokens, for requests of up to 2048; prompts enter in chunks of at most 48 tokens."""
    llm = engine(model_dir, FMT, pages=26, max_num_batched_tokens=48, max_num_seqs=16)
    yield llm
    llm.llm_engine.engine_core.shutdown()


DELIMITERS_TOO = MementoFormat(*FMT.delimiter_ids, evict_delimiters=True, max_block_tokens=64)


@pytest.fixture(scope="module")
def delimiters_too(model_dir: str) -> Iterator[LLM]:
    """Evicts the block's own delimiters and caps every block."""
    llm = engine(model_dir, DELIMITERS_TOO, pages=40, max_num_batched_tokens=64, max_num_seqs=16)
    yield llm
    llm.llm_engine.engine_core.shutdown()


def scheduler_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]


def assert_pool_is_full(llm: LLM) -> None:
    pool, manager = scheduler_of(llm).kv_cache_manager.block_pool, scheduler_of(llm)._manager
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert not manager.plans and not manager.req_to_blocks


@dataclass
class Case:
    """One request: `prompt`, then `script` as its completion (or `sampled` tokens), with its own settings."""

    prompt: list[int]
    script: list[int] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    prompt_logprobs: bool = False
    sampled: int = 0
    seed: int | None = None

    def params(self) -> SamplingParams:
        extra: dict[str, Any] = {"memento": self.settings} if self.settings else {}
        if self.script is not None:
            extra["script"] = self.script
        return SamplingParams(
            max_tokens=len(self.script) if self.script is not None else self.sampled,
            temperature=1.0,
            seed=self.seed,
            logprobs=0,
            prompt_logprobs=0 if self.prompt_logprobs else None,
            ignore_eos=True,
            detokenize=False,
            extra_args=extra or None,
        )


def format_of(case: Case, fmt: MementoFormat) -> MementoFormat:
    keep = case.settings.get("keep_last_n", fmt.keep_last_n) if case.settings.get("evict", True) else -1
    return MementoFormat(*fmt.delimiter_ids, fmt.evict_delimiters, keep_last_n=keep)


def run(llm: LLM, cases: Sequence[Case]) -> list[Any]:
    outputs = llm.generate(
        [{"prompt_token_ids": case.prompt} for case in cases], [case.params() for case in cases], use_tqdm=False
    )
    assert_pool_is_full(llm)
    return outputs


def differences(model: Qwen3ForCausalLM, case: Case, output: Any, limits: np.ndarray) -> float:
    """The largest |engine - reference| over all log-probs that the output carries."""
    completion = output.outputs[0]
    trace = [*case.prompt, *completion.token_ids]
    expected = reference_logprobs(model, trace, limits)
    worst = 0.0
    for i, token in enumerate(completion.token_ids):
        worst = max(worst, abs(completion.logprobs[i][token].logprob - expected[len(case.prompt) + i - 1].item()))
    if case.prompt_logprobs:
        for position in range(1, len(case.prompt)):
            got = output.prompt_logprobs[position][trace[position]].logprob
            worst = max(worst, abs(got - expected[position - 1].item()))
    return worst


def check(llm: LLM, model: Qwen3ForCausalLM, cases: Sequence[Case], fmt: MementoFormat = FMT) -> list[EvictionStats]:
    """Run the cases together; compare every log-prob, every eviction and every count with the expected ones."""
    all_stats = []
    for case, output in zip(cases, run(llm, cases), strict=True):
        completion = list(output.outputs[0].token_ids)
        if case.script is not None and not case.settings.get("max_block_tokens"):
            assert completion == case.script
        trace, case_fmt = [*case.prompt, *completion], format_of(case, fmt)
        unscanned = case.settings.get("prompt_len", 0)
        assert differences(model, case, output, visible_until(trace, case_fmt, unscanned)) < TOLERANCE
        stats, profile = eviction_stats(output), kv_profile(trace, case_fmt, unscanned)
        # The last sampled token is never computed, so nothing is evicted for its sake.
        expected = [event for event in evictions(trace, case_fmt, unscanned) if event[0] <= len(trace) - 2]
        assert list(stats.evictions) == expected
        assert stats.tokens_evicted == sum(end - start for _, start, end in expected)
        assert stats.peak_pages == -(-int(profile.resident_T[:-1].max()) // PAGE), "more pages held than the ideal"
        assert stats.peak_tokens == profile.peak_tokens
        assert stats.area == int(profile.resident_T[len(case.prompt) :].sum())
        all_stats.append(stats)
    return all_stats


# Traces.


def words(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(5, VOCAB) for _ in range(rng.randint(low, high))]


def block(rng: random.Random, low: int = 20, high: int = 90) -> list[int]:
    return [START, *words(rng, low, high), END, SUMMARY, *words(rng, 3, 12), CLOSE]


def blocks(rng: random.Random, count: int, low: int = 20, high: int = 90) -> list[int]:
    """`count` blocks with a little plain text around them."""
    return [token for _ in range(count) for token in [*block(rng, low, high), *words(rng, 0, 6)]]


def malformed(rng: random.Random) -> list[list[int]]:
    x = [words(rng, 15, 40) for _ in range(4)]
    return [
        [START, *x[0], START, *x[1], END, SUMMARY, *x[2], CLOSE, *x[3]],  # a block abandoned by a new one
        [START, *x[0], END, *x[1], SUMMARY, *x[2], CLOSE, *x[3]],  # text before the memento
        [*x[0], END, SUMMARY, *x[1], CLOSE, *x[2], *block(rng), *x[3]],  # a memento of nothing
        [START, *x[0], END, SUMMARY, *x[1], START, *x[2], END, SUMMARY, *x[3], CLOSE, 7, 8],  # an abandoned memento
        [START, END, SUMMARY, *x[0], CLOSE, *block(rng), SUMMARY, *x[1], CLOSE, 9],  # an empty block
        [START, *x[0], END, SUMMARY, SUMMARY, *x[1], END, CLOSE, CLOSE, *x[2]],  # everything twice
        [*block(rng), START, *x[0]],  # never closed
        [*block(rng), *x[0], CLOSE],  # ends with a delimiter out of order
        block(rng),  # ends with the one that would evict
        [*block(rng), 7],  # the evicting token is the last but one
        [*block(rng), 7, 8],
    ]


# The tests.


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
    assert differences(reference, case, output, shifted) > 0.01
    assert differences(reference, case, output, late) > 0.01
    assert differences(reference, case, output, np.full_like(limits, len(limits))) > 0.01


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
