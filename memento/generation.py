"""Generation in plain `transformers` with real KV deletion: finished blocks leave the cache of a stock model.

    model  = AutoModelForCausalLM.from_pretrained("models/mine")
    result = generate(model, prompt_ids, fmt, max_new_tokens=512)

For looking, checking and small machines: one sequence at a time. For speed there is vLLM with the eviction plugin,
which does the same to its paged cache. Of memento-rl it needs nothing but the format.

What makes it the method and not a cheaper relative: a memento's keys and values stay as they were computed, while its
block was visible, and positions do not close up. The next token is computed at its position in the whole trace, over a
cache that is shorter than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memento.format import BlockScanner, Eviction, MementoFormat

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Generated:
    """One completion.

    Attributes:
        completion_ids: with the end token, if it ended.
        logprobs: of each completion token under the distribution it was taken from (temperature 1 where it is greedy).
        evictions: what left the cache, in absolute positions.
        peak_tokens: the most keys that any computed token saw, itself included.
        ended: by an end token, and not by `max_new_tokens`.
    """

    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    evictions: tuple[Eviction, ...]
    peak_tokens: int
    ended: bool


def generate(
    model: Any,
    prompt_ids: Sequence[int],
    fmt: MementoFormat,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    eos_token_ids: Sequence[int] | None = None,
    seed: int | None = None,
) -> Generated:
    """Complete one prompt; each block leaves the cache when its memento is complete.

    Args:
        model: a causal language model of `transformers`, as `from_pretrained` gives it. A sliding window counts the
            keys that are still there.
        prompt_ids: token ids of the rendered prompt; it stays visible and is not searched for delimiters.
        fmt: the delimiters and what they evict. Its block cap is not applied.
        max_new_tokens: completion tokens, at most.
        temperature: 0 is greedy.
        eos_token_ids: tokens that end the completion. None: those of the model's generation config.
        seed: of the sampling.

    Raises:
        ValueError: an empty prompt, or no room for a completion.
    """
    import torch
    from transformers import DynamicCache

    if not prompt_ids or max_new_tokens < 1:
        raise ValueError(f"nothing to generate: {len(prompt_ids)} prompt tokens, max_new_tokens {max_new_tokens}")
    ends = set(_end_ids(model) if eos_token_ids is None else eos_token_ids)
    generator = torch.Generator(device=model.device)
    if seed is not None:
        generator.manual_seed(seed)
    # Without a config: every layer keeps all its keys until they are dropped here.
    cache, scanner, due = DynamicCache(), BlockScanner(fmt), None
    ids, resident, pending = list(prompt_ids), list[int](), list(range(len(prompt_ids)))
    completion, logprobs, evictions, peak = list[int](), list[float](), list[Eviction](), 0
    with torch.inference_mode():
        while True:
            logits_V = _compute(model, cache, [ids[p] for p in pending], pending)
            resident += pending
            peak = max(peak, len(resident))
            if due is not None:  # `<|summary_end|>` was just computed and saw its block; the next token must not
                resident = _drop(cache, resident, due)
                evictions.append(due)
            token, logprob = _sample(logits_V, temperature, generator)
            completion.append(token)
            logprobs.append(logprob)
            pending = [len(ids)]
            due = scanner.feed(len(ids), token)
            ids.append(token)
            if token in ends or len(completion) == max_new_tokens:
                return Generated(tuple(completion), tuple(logprobs), tuple(evictions), peak, token in ends)


def _compute(model: Any, cache: Any, token_ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    """Compute tokens at their positions in the trace; they enter the cache. Logits after the last one, fp32 [V]."""
    import torch

    row = {"device": model.device, "dtype": torch.int64}
    out = model(
        input_ids=torch.tensor([token_ids], **row),
        position_ids=torch.tensor([positions], **row),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits[0, -1].float()


def _drop(cache: Any, resident: Sequence[int], event: Eviction) -> list[int]:
    """Delete the keys and values of an eviction from every layer; the positions that are left."""
    import torch

    kept = [slot for slot, position in enumerate(resident) if not event.start <= position < event.end]
    for layer in cache.layers:
        index = torch.tensor(kept, device=layer.keys.device)
        layer.keys, layer.values = (x.index_select(-2, index) for x in (layer.keys, layer.values))
    return [resident[slot] for slot in kept]


def _sample(logits_V: torch.Tensor, temperature: float, generator: torch.Generator) -> tuple[int, float]:
    import torch

    logprobs_V = torch.log_softmax(logits_V / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = int(logprobs_V.argmax())
    else:
        token = int(torch.multinomial(logprobs_V.exp(), 1, generator=generator))
    return token, float(logprobs_V[token])


def _end_ids(model: Any) -> Sequence[int]:
    ids = model.generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
