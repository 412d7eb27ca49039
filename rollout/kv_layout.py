"""Where a token's keys and values lie in the caches of a model runner, as `memento.kernels.compaction` takes them.

On GPUs vLLM binds every layer as ``[pages, kv_heads, page_tokens, content]`` whatever the strides, so a token is one
index. The CPU kernels pack K and V of a page by instruction set; the packing is learned once, by writing known values
through the kernel that fills the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from memento.kernels.compaction import PagedCache
from memento.rollout.plan import EvictionFault

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

PLAIN_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
"""Attention backends whose cache is indexed by token."""

_BASE = 64  # digits of this base are exact in bfloat16


def paged_caches(runner: GPUModelRunner) -> list[PagedCache]:
    """The layers of a model runner whose KV cache is allocated, by kind: almost always one.

    Raises:
        EvictionFault: for an attention backend that was never tried.
    """
    layers: dict[str, Any] = runner.compilation_config.static_forward_context
    kinds: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    seen = set()
    for group in runner.kv_cache_config.kv_cache_groups:
        for name in group.layer_names:
            layer, cache = layers[name], layers[name].kv_cache
            if cache.data_ptr() in seen:
                continue
            seen.add(cache.data_ptr())
            backend = layer.get_attn_backend().get_name()
            if backend == "CPU_ATTN":
                isa = layer.isa
            elif backend in PLAIN_BACKENDS:
                isa = None
            else:
                raise EvictionFault(f"attention backend {backend} of {name}: KV eviction knows {PLAIN_BACKENDS}")
            kinds.setdefault((isa, cache.shape, cache.dtype, cache.stride()), []).append(cache)
    return [
        PagedCache(tuple(caches), None if isa is None else learn_packing(isa, shape[2], shape[3], dtype))
        for (isa, shape, dtype, _), caches in kinds.items()
    ]


def learn_packing(isa: str, page_tokens: int, content: int, dtype: torch.dtype) -> torch.Tensor:
    """Find where the CPU kernel for `isa` puts each value of a page.

    Every (token, element) of a page gets a number; its digits are written through the kernel one after the other, and
    what lies in the page afterwards spells, place by place, which value went there.

    Returns:
        int64 [page_tokens, content]: the places, keys first.

    Raises:
        EvictionFault: if the page does not hold each value exactly once.
    """
    from vllm import _custom_ops as ops

    head_size, total = content // 2, page_tokens * content
    numbers = torch.arange(total).view(page_tokens, content)
    found = torch.zeros(total, dtype=torch.int64)
    scale = 1
    while scale < total:
        digits = (numbers // scale % _BASE).to(dtype)
        key, value = (half.reshape(page_tokens, 1, head_size).contiguous() for half in digits.split(head_size, dim=1))
        page = torch.zeros(1, 1, page_tokens, content, dtype=dtype)
        key_cache, value_cache = page.view(1, 1, 2 * page_tokens, head_size).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, torch.arange(page_tokens), isa)
        found += page.flatten().long() * scale
        scale *= _BASE
    if not torch.equal(found.sort().values, numbers.flatten()):
        raise EvictionFault(f"the packing of CPU attention {isa!r} ({dtype}) is not a permutation of a page")
    places = torch.empty(total, dtype=torch.int64)
    places[found] = torch.arange(total)
    return places.view(page_tokens, content)
