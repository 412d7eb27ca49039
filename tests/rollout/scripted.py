"""Requests with scripted completions for an evicting engine, and what they must give: log-probs, evictions, pages.

The reference knows nothing of pages: one eager fp32 forward of Hugging Face's own model over the whole trace, a dense
mask from `memento.format.visible_until` and the original position ids. The engine generates the script token by token
(or samples), under batching, chunked prefill, prefix caching and preemption.

Engines live in this process and share its distributed groups, which the first one that is shut down takes away. So all
tests of a process share them (`engine`), and they end with it.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

# One thread, and no process of its own: engines start in a second, and several fit on a small machine.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",
    VLLM_LOGGING_LEVEL="ERROR",
)

import numpy as np
import torch
from transformers import PreTrainedModel
from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from memento.format import MementoFormat, evictions, kv_profile, lowest_visible, visible_until
from memento.rollout import EvictionStats, eviction_args, eviction_stats
from memento.rollout.block_cap import V2Processor

PAGE, VOCAB, LAYERS, KV_HEADS, HEAD = 32, 64, 3, 2, 32
FMT = MementoFormat(1, 2, 3, 4, evict_delimiters=False)
START, END, SUMMARY, CLOSE = FMT.delimiter_ids
TOLERANCE = 1e-4

Limits = Callable[[Sequence[int], MementoFormat, int], np.ndarray]


@dataclass
class Tally:
    """What all tests of a session compared."""

    scored_tokens: int = 0
    worst: float = 0.0
    evictions: int = 0
    preemptions: int = 0


TALLY = Tally()


class Scripted(AdapterLogitsProcessor):
    """Makes a request generate ``extra_args["script"]``, so that blocks lie where a test wants them (V1 runner)."""

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


class ScriptedV2(V2Processor):
    """The same for the V2 runner: by position, because the last token may not have left the device."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._states, self._scripts = req_states, {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        self._scripts[req_idx] = (sampling_params.extra_args or {}).get("script")
        return self._scripts[req_idx] is not None

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        for row, (slot, position) in enumerate(zip(ctx.expanded_idx_mapping.tolist(), ctx.pos.tolist(), strict=True)):
            script = self._scripts[slot]
            index = position + 1 - int(self._states.prompt_len.np[slot])
            if script is not None and 0 <= index < len(script):
                logits[row] = float("-inf")
                logits[row, script[index]] = 0.0
        return logits


def save_model(folder: Path, config: Any) -> str:
    """A model of random weights, at `folder`."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return str(folder)


def tiny_qwen3(folder: Path) -> str:
    from transformers import Qwen3Config

    return save_model(
        folder,
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD,
            max_position_embeddings=4096,
        ),
    )


def read_reference(folder: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    # vLLM runs Olmo 3 through transformers' own class and decorates it for torch.compile, also for us.
    decoder: Any = model.get_decoder()
    decoder.do_not_compile = True
    return model


@torch.no_grad()
def reference_logprobs(model: PreTrainedModel, token_ids: Sequence[int], limits: np.ndarray) -> torch.Tensor:
    """[T - 1]: the log-prob of each token but the first, under ``k <= q < limits[k]`` and, in sliding-window layers,
    the last ``sliding_window`` of those."""
    ids = torch.tensor(token_ids)
    query = torch.arange(len(ids))
    visible = (query[None] <= query[:, None]) & (query[:, None] < torch.from_numpy(limits)[None])
    masks = {"full_attention": _bias(visible)}
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
        lowest = torch.from_numpy(lowest_visible(limits, model.config.sliding_window))
        masks["sliding_attention"] = _bias(visible & (query[None] >= lowest[:, None]))
    mask: Any = masks if len(masks) > 1 else masks["full_attention"]
    logits = model(ids[None], attention_mask=mask, position_ids=query[None], use_cache=False).logits[0]
    return logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def _bias(visible: torch.Tensor) -> torch.Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]


def make_engine(model: str, fmt: MementoFormat, pages: int, *, options: dict[str, Any] | None = None, **settings: Any):
    """An engine of `pages` KV pages (one of them is vLLM's own), whatever the model's shape."""
    everywhere: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": PAGE,
        "num_gpu_blocks_override": pages,
        "kv_cache_memory_bytes": 64 << 20,
        "max_model_len": 2048,
        "max_num_seqs": 24,
    }
    processor = ScriptedV2 if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" else Scripted
    llm = LLM(model, **everywhere | eviction_args(fmt, logits_processors=[processor], **options or {}) | settings)
    _ALIVE.append(llm)
    return llm


_ALIVE: list[LLM] = []
"""An engine that nobody holds is shut down, and takes the groups of the others with it."""


@cache
def qwen3() -> tuple[str, PreTrainedModel]:
    """The tiny Qwen3 of these tests: its folder and the reference."""
    folder = tiny_qwen3(Path(tempfile.mkdtemp(prefix="qwen3-")))
    return folder, read_reference(folder)


DELIMITERS_TOO = MementoFormat(*FMT.delimiter_ids, evict_delimiters=True, max_block_tokens=64)


@cache
def engine(name: str) -> LLM:
    """The engines that tests share.

    ``roomy``: everything fits. ``tight``: 25 pages, 800 tokens, for requests of up to 2048, prompts in chunks of at
    most 48 tokens, and vLLM's own admission, so that requests are preempted. ``reserving``: the same with expected
    peaks reserved. ``delimiters_too``: evicts a block's own delimiters and caps every block.
    """
    folder, _ = qwen3()
    tight: dict[str, Any] = {"max_num_batched_tokens": 48, "max_num_seqs": 16}
    stock: dict[str, Any] = {"reserve_peaks": False}
    if name == "roomy":
        return make_engine(folder, FMT, 400)
    if name == "tight":
        return make_engine(folder, FMT, 26, options=stock, **tight)
    if name == "reserving":
        return make_engine(folder, FMT, 26, **tight)
    if name == "delimiters_too":
        return make_engine(folder, DELIMITERS_TOO, 40, options=stock, max_num_batched_tokens=64, max_num_seqs=16)
    raise KeyError(name)


def scheduler_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]


def assert_pool_is_full(llm: LLM) -> None:
    """Every page is free again, and nothing of any request is left."""
    pool, manager = scheduler_of(llm).kv_cache_manager.block_pool, scheduler_of(llm)._manager
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert not manager.plans and not manager.req_to_blocks and not manager.num_cached_block


@dataclass
class Case:
    """One request: `prompt`, then `script` as its completion (or `sampled` tokens), with its own settings."""

    prompt: list[int]
    script: list[int] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    prompt_logprobs: bool = False
    sampled: int = 0
    seed: int | None = None
    temperature: float = 1.0

    def params(self, n: int = 1) -> SamplingParams:
        extra: dict[str, Any] = {"memento": self.settings} if self.settings else {}
        if self.script is not None:
            extra["script"] = self.script
        return SamplingParams(
            n=n,
            max_tokens=len(self.script) if self.script is not None else self.sampled,
            temperature=self.temperature,
            seed=self.seed,
            logprobs=0,
            prompt_logprobs=0 if self.prompt_logprobs else None,
            ignore_eos=True,
            detokenize=False,
            extra_args=extra or None,
        )

    def format(self, fmt: MementoFormat) -> MementoFormat:
        """What this request makes of the engine's format."""
        keep = self.settings.get("keep_last_n", fmt.keep_last_n) if self.settings.get("evict", True) else -1
        return MementoFormat(*fmt.delimiter_ids, fmt.evict_delimiters, keep_last_n=keep)

    @property
    def unscanned(self) -> int:
        """Prompt tokens that are not searched for delimiters."""
        return len(self.prompt) if not self.settings.get("scan_prompt", True) else self.settings.get("prompt_len", 0)


def run(llm: LLM, cases: Sequence[Case]) -> list[Any]:
    outputs = llm.generate(
        [{"prompt_token_ids": case.prompt} for case in cases], [case.params() for case in cases], use_tqdm=False
    )
    assert_pool_is_full(llm)
    return outputs


def differences(
    model: PreTrainedModel, case: Case, output: Any, limits: np.ndarray, sample: int = 0, tally: bool = True
) -> float:
    """The largest |engine - reference| over all log-probs that the output carries."""
    completion = output.outputs[sample]
    trace = [*case.prompt, *completion.token_ids]
    expected = reference_logprobs(model, trace, limits)
    gaps = [
        completion.logprobs[i][token].logprob - expected[len(case.prompt) + i - 1].item()
        for i, token in enumerate(completion.token_ids)
    ]
    if case.prompt_logprobs and sample == 0:
        gaps += [
            output.prompt_logprobs[position][trace[position]].logprob - expected[position - 1].item()
            for position in range(1, len(case.prompt))
        ]
    worst = max(map(abs, gaps), default=0.0)
    assert not math.isnan(worst)
    if tally:
        TALLY.scored_tokens += len(gaps)
        TALLY.worst = max(TALLY.worst, worst)
    return worst


def check_output(
    model: PreTrainedModel,
    case: Case,
    output: Any,
    fmt: MementoFormat = FMT,
    *,
    sample: int = 0,
    ahead: int = 0,
    limits: Limits = visible_until,
) -> EvictionStats:
    """Compare every log-prob, every eviction and every count of one finished output with the expected ones.

    Args:
        ahead: tokens that an asynchronous scheduler may have computed beyond the end.
        limits: `visible_until`, or something else that the engine must *not* agree with.
    """
    completion = list(output.outputs[sample].token_ids)
    if case.script is not None and case.settings.get("max_block_tokens") is None and fmt.max_block_tokens is None:
        assert completion == case.script
    trace, case_fmt = [*case.prompt, *completion], case.format(fmt)
    assert differences(model, case, output, limits(trace, case_fmt, case.unscanned), sample) < TOLERANCE
    stats = eviction_stats(output, sample if len(output.outputs) > 1 else None)
    profile = kv_profile(trace, case_fmt, case.unscanned)
    # The last sampled token is never computed, so nothing is evicted for its sake.
    expected = [event for event in evictions(trace, case_fmt, case.unscanned) if event[0] <= len(trace) - 2]
    assert list(stats.evictions) == expected, "evictions done are not those expected"
    assert stats.tokens_evicted == sum(end - start for _, start, end in expected)
    ideal = [-(-int(profile.resident_T[: len(trace) - 1 + more].max()) // PAGE) for more in (0, ahead)]
    assert ideal[0] <= stats.peak_pages <= ideal[1], "more pages held than the ideal"
    assert stats.peak_tokens == profile.peak_tokens
    assert stats.area == int(profile.resident_T[len(case.prompt) :].sum())
    TALLY.evictions += len(expected)
    TALLY.preemptions += stats.preemptions
    return stats


def check(
    llm: LLM, model: PreTrainedModel, cases: Sequence[Case], fmt: MementoFormat = FMT, ahead: int = 0
) -> list[EvictionStats]:
    """Run the cases together and compare everything; the pool must be full again."""
    outputs = run(llm, cases)
    return [check_output(model, c, o, fmt, ahead=ahead) for c, o in zip(cases, outputs, strict=True)]


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
