"""Two tensor-parallel workers on CPU (gloo and shared memory): `python -m tests.rollout.two_workers`.

A process of its own: the workers are its children, and vLLM starts them by running the main module again.
"""

from __future__ import annotations

import json
import random


def main() -> None:
    from tests.rollout.scripted import FMT, TALLY, Case, blocks, check, make_engine, qwen3, words

    folder, reference = qwen3()
    llm = make_engine(
        folder,
        FMT,
        26,
        options={"reserve_peaks": False},
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        max_num_batched_tokens=48,
        max_num_seqs=12,
    )
    rng = random.Random(61)
    choices = [{}, {"keep_last_n": 1}, {"evict": False}, {"max_block_tokens": 30}]
    cases = [
        Case([*words(rng, 20, 70), *blocks(rng, i % 3, 20, 60)], [*blocks(rng, 2, 20, 60), 9, 9], choices[i % 4])
        for i in range(12)
    ]
    check(llm, reference, cases)
    check(
        llm, reference, [Case([*c.prompt, *(c.script or [])], [9, 9], c.settings, prompt_logprobs=True) for c in cases]
    )
    print(json.dumps(TALLY.__dict__))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
