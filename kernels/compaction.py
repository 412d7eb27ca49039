"""KV compaction: when a block is evicted, the tokens behind it move down inside the paged cache.

::

    slots of one request    p p p x x x x m m m .        x is evicted
    moves                   source 7 8 9 -> target 3 4 5
    afterwards              p p p m m m . . . . .        the pages behind are free

All requests of a step are moved together, in all layers. A *slot* is ``page * page_tokens + offset``; pages lie
anywhere, so neighbouring tokens of a request may be far apart, and a target may be the source of another move. Hence
everything is read before anything is written over it:

* ``torch``, on any device: gathers all sources of a layer, then scatters them;
* ``triton``, on GPUs: one launch for all layers and requests, without a temporary copy. One program moves the tokens
  of one request, layer and head, a tile at a time: a tile is read whole before it is written, and moves go downwards,
  so what a tile overwrites was read with it or before it.

vLLM's CPU kernels pack K and V of a page by instruction set: there `PagedCache.elements` says where each value lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Moves:
    """Which slots go where. The moves of a request are in the order of its tokens, and go downwards.

    Attributes:
        slots: int64 [2, N], sources and targets. Targets are distinct; no request reads a slot that an earlier move of
            its own has written, and none touches the targets of another.
        offsets: int64 [requests + 1]; the moves of request r are ``offsets[r]`` to ``offsets[r + 1]``.
        longest: the most moves of one request.
    """

    slots: torch.Tensor
    offsets: torch.Tensor
    longest: int

    @classmethod
    def of(cls, requests: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], device: torch.device | str) -> Moves:
        """From (sources, targets) of each request; one copy to the device.

        Raises:
            ValueError: sources and targets of different lengths.
        """
        lengths = [len(source) for source, _ in requests]
        if lengths != [len(target) for _, target in requests]:
            raise ValueError("every move needs a source and a target: their numbers differ")
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        flat = np.concatenate([offsets, *(s for s, _ in requests), *(t for _, t in requests)])
        on_device = torch.from_numpy(flat).to(device, non_blocking=True)
        return cls(on_device[len(offsets) :].view(2, -1), on_device[: len(offsets)], max(lengths, default=0))


@dataclass(frozen=True, eq=False)
class PagedCache:
    """The KV cache of layers that share a shape, a dtype and strides.

    Attributes:
        layers: [pages, kv_heads, page_tokens, content] each, any strides but the last, which is 1; `content` is keys
            and values together.
        elements: int64 [page_tokens, content] places of a token's values in the flattened ``page_tokens * content`` of
            one page and head, or None where they are simply ``layer[page, :, offset]``.
    """

    layers: tuple[torch.Tensor, ...]
    elements: torch.Tensor | None = None

    def __post_init__(self) -> None:
        first = self.layers[0]
        for layer in self.layers:
            if layer.ndim != 4 or layer.stride(-1) != 1:
                raise ValueError(
                    "a layer of the cache must be [pages, kv_heads, page_tokens, content] with contiguous content, got "
                    f"shape {tuple(layer.shape)}, strides {layer.stride()}"
                )
            if (layer.shape, layer.dtype, layer.stride()) != (first.shape, first.dtype, first.stride()):
                raise ValueError("the layers of a PagedCache share shape, dtype and strides: make one for each kind")
        if self.elements is not None:
            if tuple(self.elements.shape) != tuple(first.shape[2:]):
                raise ValueError(
                    f"elements must be [page_tokens, content] = {tuple(first.shape[2:])}, got "
                    f"{tuple(self.elements.shape)}"
                )
            if not all(layer.is_contiguous() for layer in self.layers):
                raise ValueError("a cache whose pages are packed must be contiguous")

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        first = self.layers[0]
        return len(self.layers) * first.shape[1] * first.shape[3] * first.element_size()

    @cached_property
    def words(self) -> tuple[torch.Tensor, ...]:
        """The layers as integers, which every operation knows and none rounds; as wide as whole tokens allow."""
        size = 8 if self.elements is None and self._in_steps_of(8) else self.layers[0].element_size()
        return tuple(layer.view(_WORDS[size]) for layer in self.layers)

    @cached_property
    def addresses(self) -> torch.Tensor:
        """int64 [layers], where each layer begins."""
        return torch.tensor([layer.data_ptr() for layer in self.layers], device=self.layers[0].device)

    @cached_property
    def aligned(self) -> bool:
        """Whether the values of every token begin at a multiple of 16 bytes."""
        return self._in_steps_of(16)

    def _in_steps_of(self, size: int) -> bool:
        first = self.layers[0]
        steps = [n * first.element_size() for n in (first.shape[3], *first.stride()[:3])]
        return all(n % size == 0 for n in (*steps, *(layer.data_ptr() for layer in self.layers)))


def compact(cache: PagedCache, moves: Moves, *, implementation: str | None = None) -> None:
    """Carry out `moves` in every layer of `cache`, in place.

    Args:
        implementation: "torch" or "triton"; None for "torch", until the kernel has run on a GPU.

    Raises:
        ValueError: an unknown implementation, or "triton" for a packed cache or without a GPU.
    """
    if implementation not in (None, "torch", "triton"):
        raise ValueError(f"unknown implementation {implementation!r}; there are torch, triton")
    if not moves.longest:
        return
    if implementation == "triton":
        _compact_triton(cache, moves)
    elif cache.elements is None:
        _compact_plain(cache, moves)
    else:
        _compact_packed(cache, cache.elements, moves)


def _compact_plain(cache: PagedCache, moves: Moves) -> None:
    page_tokens = cache.layers[0].shape[2]
    (source_page, target_page), (source, target) = moves.slots // page_tokens, moves.slots % page_tokens
    for layer in cache.words:
        layer[target_page, :, target] = layer[source_page, :, source]


def _compact_packed(cache: PagedCache, elements: torch.Tensor, moves: Moves) -> None:
    _, heads, page_tokens, content = cache.layers[0].shape
    of_page = page_tokens * content
    # Places in a flattened layer, int64 [2, N * content]: those of the first head; the others follow, a page apart.
    first = moves.slots // page_tokens * (heads * of_page)
    source, target = (first[..., None] + elements[moves.slots % page_tokens]).flatten(1)
    for layer in cache.words:
        for head in range(heads):
            flat = layer.view(-1)[head * of_page :]
            flat.scatter_(0, target, flat.gather(0, source))


def _compact_triton(cache: PagedCache, moves: Moves) -> None:
    try:
        from memento.kernels.triton_compaction import launch
    except ImportError as error:
        raise ValueError('implementation "triton" needs the package triton, which is not installed here') from error
    if cache.elements is not None:
        raise ValueError('implementation "triton" moves whole tokens; in a packed cache they are scattered over a page')
    launch(cache, moves)
