"""vLLM's V2 model runner on a machine without a GPU: its Triton kernels run in Triton's interpreter.

    python -m tests.rollout.v2_on_cpu asynchronous short

runs the cases of `tests/rollout/test_eviction_v2.py` and prints what was compared. It is a process of its own, because
Triton looks at TRITON_INTERPRET when it is imported. What the CPU build leaves out is put in here: a Triton driver it
counts, streams and events that do nothing, and asynchronous scheduling, which its CPU platform switches off. The
eviction code is the one that runs on GPUs; streams, CUDA graphs and GPU attention kernels are what this cannot show.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")

import torch
from triton.backends import backends


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


class _Immediate:
    """A stream or an event of a device that finishes before it returns."""

    device = torch.device("cpu")

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def query(self) -> bool:
        return True


def install() -> None:
    """Make the V2 runner start here."""
    backends["cpu"] = SimpleNamespace(driver=_Driver, compiler=None)  # type: ignore[assignment]
    torch.cuda.Stream = torch.cuda.Event = torch.Event = _Immediate  # type: ignore[assignment,misc]
    torch.cuda.stream = lambda *_: contextlib.nullcontext()  # type: ignore[assignment]
    torch.cuda.current_stream = lambda *_: _Immediate()  # type: ignore[assignment]

    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        stock(cls, vllm_config)
        scheduler = vllm_config.scheduler_config
        scheduler.async_scheduling = str(scheduler.scheduler_cls).endswith("EvictingAsyncScheduler")

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)  # type: ignore[assignment]


def main(scheduling: str, length: str, admission: str = "free") -> None:
    """Preemption, chunked prefill, prefix caching, blocks in prompts, opt-outs, the cap, abort and reset.

    The interpreter takes about 0.1 s of CPU a step, so what is sampled is greedy (no noise is computed) and short.
    """
    from memento.format import MementoFormat
    from memento.rollout import eviction_stats
    from tests.rollout.scripted import (
        CLOSE,
        DELIMITERS_TOO,
        END,
        START,
        SUMMARY,
        TALLY,
        Case,
        assert_pool_is_full,
        block,
        blocks,
        check,
        check_output,
        make_engine,
        malformed,
        qwen3,
        run,
        scheduler_of,
        words,
    )

    is_async, is_long = scheduling == "asynchronous", length == "long"
    ahead = int(is_async)
    folder, reference = qwen3()
    fmt = MementoFormat(*DELIMITERS_TOO.delimiter_ids, evict_delimiters=False)
    if admission == "reserving":  # let in more than there is room for, so that some have to sit out steps
        mock.patch("memento.rollout.admission.MARGIN_SIGMAS", -4.0).start()
    options: dict[str, Any] = {"async_scheduling": is_async, "reserve_peaks": admission == "reserving"}
    tight = make_engine(folder, fmt, 22 if is_long else 15, options=options, max_num_batched_tokens=96, max_num_seqs=12)
    config = tight.llm_engine.vllm_config
    assert config.use_v2_model_runner and bool(config.scheduler_config.async_scheduling) == is_async
    assert (config.max_concurrent_batches == 2) == is_async

    rng = random.Random(21)
    greedy: dict[str, Any] = {"temperature": 0.0}
    choices: list[dict[str, Any]] = [{}, {"keep_last_n": 1}, {"evict": False}]
    prompts = [[*words(rng, 40, 70), *blocks(rng, 1 + i % 2, 40, 60)] for i in range(4 if is_long else 2)]
    cases = [
        Case(prompt, [*blocks(rng, 1, 20, 30), 9, 9], choice, **greedy) for prompt in prompts for choice in choices
    ]
    whole = [Case([*c.prompt, *(c.script or [])], [9, 9], c.settings, prompt_logprobs=True, **greedy) for c in cases]
    # The cap, with the closing token forced while the one before it may still be on the device.
    open_ended = [START, *[9] * 20, SUMMARY, 8, CLOSE]
    cap = {"max_block_tokens": 12}
    capped = [
        Case(words(rng, 20, 20), [*open_ended, 7, 7], cap, **greedy),
        Case([*words(rng, 20, 20), START, *[9] * 30], [9, SUMMARY, 8, CLOSE, 9, 9], cap, **greedy),
        Case(words(rng, 20, 20), [START, *[9] * 12, END, SUMMARY, 8, CLOSE, 9], cap, **greedy),
        Case(words(rng, 20, 20), [START, *[9] * 20, 9], {"max_block_tokens": None}, **greedy),
        *[
            Case([*words(rng, 60, 90), *block(rng)], [*open_ended, 7, 7], cap, **greedy)
            for _ in range(6 if is_long else 3)
        ],
    ]
    forced = 0
    for case, output in zip([*capped, *whole], run(tight, [*capped, *whole]), strict=True):
        stats = check_output(reference, case, output, fmt, ahead=ahead)
        completion = output.outputs[0].token_ids
        assert all(completion[p] == END for p in stats.forced_positions)
        assert bool(stats.forced_positions) == (case.settings.get("max_block_tokens") == 12)
        forced += len(stats.forced_positions)

    # A weight update in the middle (everybody is replayed), and aborts.
    engine = tight.llm_engine
    for i, case in enumerate(cases):
        engine.add_request(f"r-{i}", {"prompt_token_ids": case.prompt}, case.params())
    compared = 0
    for step in range(10_000):
        for output in engine.step():
            if output.finished:
                check_output(reference, cases[int(output.request_id[2:])], output, fmt, ahead=ahead)
                compared += 1
        if step == 25:
            assert scheduler_of(tight).reset_prefix_cache(reset_running_requests=True)
        if step in (12, 40):
            engine.abort_request([f"r-{step // 12}"])
        if not engine.has_unfinished_requests():
            break
    engine.step()
    assert_pool_is_full(tight)
    assert compared >= len(cases) - 2

    if is_long:
        more = [Case(words(rng, 5, 90), [*blocks(rng, 3), *words(rng, 1, 9)], **greedy) for _ in range(12)]
        check(tight, reference, more, fmt, ahead)
        check(tight, reference, [Case(words(rng, 5, 30), trace, **greedy) for trace in malformed(rng)], fmt, ahead)
        check(tight, reference, [Case(words(rng, 20, 40), sampled=40, seed=i) for i in range(4)], fmt, ahead)
        endless = Case(words(rng, 20, 20), [START, *words(rng, 1500, 1500)], **greedy)
        stopped = run(tight, [endless])[0]
        assert stopped.outputs[0].stop_reason == "memento_kv_limit" and eviction_stats(stopped).kv_limit
    reserved = scheduler_of(tight)._manager.admission
    sat_out = None if reserved is None else reserved.sat_out
    print(json.dumps({**TALLY.__dict__, "forced": forced, "sat_out": sat_out}))


if __name__ == "__main__":
    install()
    main(*sys.argv[1:])
