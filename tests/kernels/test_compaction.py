"""Moving the kept tokens of a paged cache, against a twin that moves one value at a time."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from memento.kernels.compaction import Moves, PagedCache, compact

Requests = list[tuple[np.ndarray, np.ndarray]]


def evictions(rng: random.Random, pages: int, page_tokens: int) -> Requests:
    """Requests on disjoint pages anywhere in the pool, each with one span that leaves; some move nothing."""
    free = list(range(pages))
    rng.shuffle(free)
    requests = []
    while free and len(requests) < 5:
        taken = [free.pop() for _ in range(min(len(free), rng.randint(1, 4)))]
        tokens = rng.randint(1, len(taken) * page_tokens)
        start = rng.randint(0, tokens)
        end = rng.randint(start, tokens)
        at = np.arange(tokens)
        slots = np.array(taken)[at // page_tokens] * page_tokens + at % page_tokens
        requests.append((slots[end:], slots[start : start + tokens - end]) if end > start else (slots[:0], slots[:0]))
    return requests


def twin(layer: torch.Tensor, elements: torch.Tensor | None, requests: Requests) -> torch.Tensor:
    """Read everything, then write everything, value by value."""
    pages, heads, page_tokens, content = layer.shape
    if elements is None:
        elements = torch.arange(page_tokens * content).view(page_tokens, content)
    flat, out = layer.reshape(pages, heads, -1), layer.clone().reshape(pages, heads, -1)
    for sources, targets in requests:
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            for head in range(heads):
                for a, b in zip(elements[source % page_tokens], elements[target % page_tokens], strict=True):
                    out[target // page_tokens, head, b] = flat[source // page_tokens, head, a]
    return out.view(layer.shape)


def caches(rng: random.Random, packed: bool) -> PagedCache:
    shape = rng.randint(4, 12), rng.randint(1, 3), rng.choice([3, 8]), 2 * rng.choice([2, 3])
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float8_e4m3fn])
    layers = tuple(torch.randn(shape).to(dtype) for _ in range(rng.randint(1, 3)))
    return PagedCache(layers, torch.randperm(shape[2] * shape[3]).view(shape[2], shape[3]) if packed else None)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_every_layer_is_what_the_twin_says(packed: bool, seed: int) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    cache = caches(rng, packed)
    pages, _, page_tokens, _ = cache.layers[0].shape
    for _ in range(2):
        requests = evictions(rng, pages, page_tokens)
        expected = [twin(layer.float(), cache.elements, requests) for layer in cache.layers]
        compact(cache, Moves.of(requests, "cpu"))
        assert all(torch.equal(layer.float(), e) for layer, e in zip(cache.layers, expected, strict=True))


def test_targets_that_are_sources_are_read_first() -> None:
    layer = torch.arange(24.0).view(3, 1, 4, 2).clone()
    moved = np.arange(1, 12)
    compact(PagedCache((layer,)), Moves.of([(moved, moved - 1)], "cpu"))
    assert layer.view(12, 2)[:, 0].tolist() == [*range(2, 24, 2), 22]


@pytest.mark.parametrize("memory", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)])
def test_strides_do_not_matter(memory: tuple[int, ...]) -> None:
    rng = random.Random(3)
    layer = torch.randn(6, 2, 4, 6)
    requests = evictions(rng, 6, 4)
    strided = layer.permute(memory).clone(memory_format=torch.contiguous_format).permute(tuple(np.argsort(memory)))
    compact(PagedCache((strided,)), Moves.of(requests, "cpu"))
    assert torch.equal(strided, twin(layer, None, requests))


def test_no_moves_touch_nothing() -> None:
    layer = torch.randn(2, 1, 4, 2)
    before, none = layer.clone(), np.empty(0, np.int64)
    compact(PagedCache((layer,)), Moves.of([(none, none)], "cpu"))
    compact(PagedCache((layer,)), Moves.of([], "cpu"))
    assert torch.equal(layer, before)


def test_what_does_not_fit_is_refused() -> None:
    layer = torch.zeros(2, 1, 4, 2)
    with pytest.raises(ValueError, match="numbers differ"):
        Moves.of([(np.arange(3), np.arange(2))], "cpu")
    with pytest.raises(ValueError, match="share shape, dtype and strides"):
        PagedCache((layer, layer.double()))
    with pytest.raises(ValueError, match="contiguous content"):
        PagedCache((layer.transpose(2, 3),))
    with pytest.raises(ValueError, match=r"elements must be \[page_tokens, content\] = \(4, 2\)"):
        PagedCache((layer,), torch.arange(6).view(3, 2))
    moves = Moves.of([(np.arange(1, 3), np.arange(2))], "cpu")
    with pytest.raises(ValueError, match="unknown implementation 'nope'"):
        compact(PagedCache((layer,)), moves, implementation="nope")
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="needs a GPU"):
        compact(PagedCache((layer,)), moves, implementation="triton")
    with pytest.raises(ValueError, match="scattered over a page"):
        compact(PagedCache((layer,), torch.arange(8).view(4, 2)), moves, implementation="triton")
