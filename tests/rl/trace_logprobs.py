"""Log-probabilities of one trace, by the learner and by whoever loads its export; each in a process of its own.

    python -m tests.rl.trace_logprobs learner RUN CHECKPOINT PORT    trains two steps, saves, exports to RUN/expected
    python -m tests.rl.trace_logprobs transformers RUN MODEL         stock, and with a dense mask
    python -m tests.rl.trace_logprobs evicting RUN MODEL             vLLM with the plugin, eviction on and off
    python -m tests.rl.trace_logprobs stock RUN MODEL                vLLM as it is

The trace lies in RUN/trace.json, see `write_trace`. Each leaves RUN/<program>.pt: ``causal`` and ``evicted``, fp32
[T - 1] without the first token; of the engines that evict also ``evictions``, how many there were. Engines get one half
of the trace as a prompt and generate the other.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from memento.arithmetic import make_traces
from memento.config import RlConfig
from memento.format import NEVER, MementoFormat, visible_until
from memento.preflight import load_tokenizer
from memento.run import load_run_config

TERMS = (9, 9)
"""Of the sum: about 400 tokens with eight blocks."""


def write_trace(run: Path) -> None:
    """A worked sum as the run's model would write it."""
    config = load_run_config(run)
    assert isinstance(config, RlConfig)
    tokenizer = load_tokenizer(config.model)
    problem, text = make_traces(1, seed=3, terms=TERMS)[0]
    messages = [{"role": "user", "content": problem.prompt}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    ids = [*prompt, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    fmt = config.format.bind(tokenizer)
    trace = {"ids": ids, "delimiters": fmt.delimiter_ids, "evict_delimiters": fmt.evict_delimiters}
    (run / "trace.json").write_text(json.dumps(trace), encoding="utf-8")


def read_trace(run: Path) -> tuple[list[int], MementoFormat]:
    """Token ids, and the format whose delimiters are among them."""
    trace = json.loads((run / "trace.json").read_text(encoding="utf-8"))
    return trace["ids"], MementoFormat(*trace["delimiters"], evict_delimiters=trace["evict_delimiters"])


def learner(run: Path, checkpoint: str, port: str) -> dict[str, Any]:
    """Two optimiser steps, because weights that nobody has moved would also come out of an export of the base model."""
    from memento.rl.batch import MicroBatch
    from memento.rl.learner import CHECKPOINT_FOLDER
    from memento.rl.learner_rank import LearnerRank

    config = load_run_config(run)
    assert isinstance(config, RlConfig)
    rank = LearnerRank(config, 0, "cpu")
    rank.start("127.0.0.1", int(port))
    ids, fmt = read_trace(run)
    size, ones = len(ids), torch.ones(len(ids))
    never = torch.full((size,), NEVER)
    first = torch.arange(size) > 0

    def row(visible: torch.Tensor) -> MicroBatch:
        return MicroBatch(
            token_ids=torch.tensor(ids),
            positions=torch.arange(size),
            document=torch.zeros(size, dtype=torch.int64),
            visible_until=visible,
            sampled_mask=first,
            loss_mask=first,
            rollout_logprobs=-ones,
            advantages=ones,
            loss_weights=first.float(),
        )

    evicted = row(torch.from_numpy(visible_until(ids, fmt)))
    for _ in range(2):
        rank.step([([evicted], size - 1)], 1.0)
    target = Path(checkpoint) / CHECKPOINT_FOLDER
    target.mkdir(parents=True)
    rank.save(str(target))
    rank.save_hf(str(run / "expected"))
    causal_T, evicted_T = rank.logprobs([row(never), evicted], 1.0)
    return {"causal": causal_T[1:], "evicted": evicted_T[1:]}


def reference(run: Path, model: str) -> dict[str, Any]:
    """Once as anybody would call the model, once with a dense mask and the original positions."""
    from transformers import AutoModelForCausalLM

    from tests.rollout.scripted import read_reference, reference_logprobs

    ids, fmt = read_trace(run)
    row = torch.tensor(ids)
    stock: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        causal = stock(row[None]).logits[0, :-1].log_softmax(-1).gather(-1, row[1:, None])[:, 0]
    return {"causal": causal, "evicted": reference_logprobs(read_reference(model), ids, visible_until(ids, fmt))}


def evicting(run: Path, model: str) -> dict[str, Any]:
    """One engine; the second request opts out of eviction."""
    from memento.rollout import eviction_stats
    from tests.rollout.scripted import make_engine

    ids, fmt = read_trace(run)
    evicted, causal = ask(make_engine(model, fmt, 64), ids, [{}, {"evict": False}])
    return {
        "causal": causal[1],
        "evicted": evicted[1],
        "evictions": len(eviction_stats(evicted[0]).evictions),
        "evictions of the other": len(eviction_stats(causal[0]).evictions),
    }


def stock(run: Path, model: str) -> dict[str, Any]:
    """vLLM without a flag of ours; only the completion is dictated."""
    from vllm import LLM

    from tests.rollout.scripted import PAGE, Scripted

    llm = LLM(
        model,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        block_size=PAGE,
        kv_cache_memory_bytes=64 << 20,
        max_model_len=1024,
        logits_processors=[Scripted],
    )
    return {"causal": ask(llm, read_trace(run)[0], [{}])[0][1]}


def ask(llm: Any, ids: list[int], settings: list[dict[str, Any]]) -> list[tuple[Any, torch.Tensor]]:
    """For each request its output and the log-probabilities of the whole trace."""
    from tests.rollout.scripted import Case

    half = len(ids) // 2
    cases = [Case(ids[:half], ids[half:], s, prompt_logprobs=True) for s in settings]
    prompts = [{"prompt_token_ids": case.prompt} for case in cases]
    found = []
    for output in llm.generate(prompts, [case.params() for case in cases], use_tqdm=False):
        assert list(output.outputs[0].token_ids) == ids[half:]
        records = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        values = [record[token].logprob for record, token in zip(records, ids[1:], strict=True)]
        found.append((output, torch.tensor(values)))
    return found


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    program: Any = {"learner": learner, "transformers": reference, "evicting": evicting, "stock": stock}[name]
    torch.save(program(folder, *sys.argv[3:]), folder / f"{name}.pt")
    sys.stdout.flush()
    os._exit(0)  # engines in this process have nothing left to say, and take their time over it
