"""Where a token's keys and values lie inside a page, and how to move them.

On GPUs vLLM binds every layer as ``[pages, kv_heads, page_tokens, content]`` whatever the strides, so a token is one
index. The CPU kernels pack K and V of a page by instruction set; the packing is learned once, by writing known values
through the kernel that fills the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from memento.rollout.plan import EvictionFault

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

PLAIN_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
"""Attention backends whose cache is indexed by token."""

_BASE = 64  # digits of this base are exact in bfloat16


@dataclass(frozen=True, slots=True)
class PageLayout:
    """The cache of one layer.

    Attributes:
        cache: [pages, kv_heads, page_tokens, content]; `content` is keys and values together.
        elements: [page_tokens, content] places of a token's values in the flattened ``page_tokens * content`` of one
            page and head, or None where they are simply ``cache[page, :, offset]``.
    """

    cache: torch.Tensor
    elements: torch.Tensor | None

    def move(self, source_slots: torch.Tensor, target_slots: torch.Tensor) -> None:
        """Copy tokens between slots: all are read before any is written.

        Args:
            source_slots, target_slots: int64 [N] ``page * page_tokens + offset``; targets are distinct.
        """
        page_tokens = self.cache.shape[2]
        source_page, source_offset = source_slots // page_tokens, source_slots % page_tokens
        target_page, target_offset = target_slots // page_tokens, target_slots % page_tokens
        if self.elements is None:
            self.cache[target_page, :, target_offset] = self.cache[source_page, :, source_offset]
            return
        flat = self.cache.view(*self.cache.shape[:2], -1)
        tokens = flat[source_page[:, None], :, self.elements[source_offset]]  # [N, content, kv_heads]
        flat[target_page[:, None], :, self.elements[target_offset]] = tokens

    @classmethod
    def of_runner(cls, runner: GPUModelRunner) -> list[PageLayout]:
        """The layouts of all layers of a model runner whose KV cache is allocated.

        Raises:
            EvictionFault: for an attention backend that was never tried.
        """
        layers: dict[str, Any] = runner.compilation_config.static_forward_context
        layouts, learned, seen = [], {}, set()
        for group in runner.kv_cache_config.kv_cache_groups:
            for name in group.layer_names:
                layer, cache = layers[name], layers[name].kv_cache
                if cache.data_ptr() in seen:
                    continue
                seen.add(cache.data_ptr())
                backend = layer.get_attn_backend().get_name()
                if backend == "CPU_ATTN":
                    key = (layer.isa, cache.shape[2:], cache.dtype)
                    if key not in learned:
                        learned[key] = learn_packing(layer.isa, cache.shape[2], cache.shape[3], cache.dtype)
                    layouts.append(cls(cache, learned[key]))
                elif backend in PLAIN_BACKENDS:
                    layouts.append(cls(cache, None))
                else:
                    raise EvictionFault(f"attention backend {backend} of {name}: KV eviction knows {PLAIN_BACKENDS}")
        return layouts


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
