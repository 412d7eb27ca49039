"""Restart mode, the ablation: after an eviction the kept tokens are computed again, without the block.

The reference is one Hugging Face forward for every stretch between two evictions: in it the blocks evicted so far are
invisible to everything behind them, mementos included.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from memento.format import NEVER, MementoFormat, evictions, visible_until
from memento.rollout import eviction_stats
from tests.rollout.scripted import (
    FMT,
    PAGE,
    TOLERANCE,
    Case,
    block,
    blocks,
    differences,
    make_engine,
    qwen3,
    reference_logprobs,
    run,
    words,
)


@pytest.fixture(scope="module")
def restarting() -> Any:
    options = {"restart": True, "reserve_peaks": False}
    return make_engine(qwen3()[0], FMT, 20, options=options, max_num_batched_tokens=48, max_num_seqs=12)


def restart_logprobs(model: Any, trace: Sequence[int], fmt: MementoFormat, unscanned: int) -> torch.Tensor:
    """[T - 1]: the log-prob of each token but the first, as restart mode gives it."""
    events = evictions(trace, fmt, unscanned)
    limits = np.full(len(trace), NEVER, dtype=np.int64)
    parts = []
    for done, (first, after) in enumerate(pairwise([0, *(e[0] for e in events), len(trace)])):
        if done:
            _, start, end = events[done - 1]
            limits[start:end] = end
        if first < after:
            parts.append(reference_logprobs(model, trace, limits)[first:after])
    return torch.cat(parts)


def test_restart_mode_recomputes_what_is_kept(restarting):
    rng, (_, reference) = random.Random(31), qwen3()
    choices: list[dict[str, Any]] = [{}, {}, {"keep_last_n": 1}, {"evict": False}]
    cases = [
        Case([*words(rng, 20, 90), *blocks(rng, i % 3, 20, 60)], [*blocks(rng, 3), *words(rng, 1, 9)], choice)
        for i, choice in enumerate(choices * 3)
    ]
    preemptions = compared = 0
    for case, output in zip(cases, run(restarting, cases), strict=True):
        completion, stats = output.outputs[0], eviction_stats(output)
        trace, fmt = [*case.prompt, *completion.token_ids], case.format(FMT)
        assert list(completion.token_ids) == case.script
        expected = restart_logprobs(reference, trace, fmt, 0)
        for i, token in enumerate(completion.token_ids):
            got = completion.logprobs[i][token].logprob
            assert abs(got - expected[len(case.prompt) + i - 1].item()) < TOLERANCE
        assert list(stats.evictions) == [e for e in evictions(trace, fmt) if e[0] <= len(trace) - 2]
        if len(stats.evictions) > 1:
            # Mementos that kept their KV are another policy: the difference is no rounding.
            assert differences(reference, case, output, visible_until(trace, fmt), tally=False) > 0.01
            compared += 1
        preemptions += stats.preemptions
    assert compared > 5 and preemptions > 5


def test_prompt_logprobs_of_blocks_are_refused(restarting):
    rng = random.Random(32)
    refused = Case([*words(rng, 5, 9), *block(rng), 9], [9, 9], prompt_logprobs=True)
    fine = Case(words(rng, PAGE, PAGE), [9, 9], prompt_logprobs=True)
    outputs = run(restarting, [refused, fine])
    assert [o.outputs[0].finish_reason for o in outputs] == ["error", "length"]
    assert "restart mode" in outputs[0].outputs[0].stop_reason
