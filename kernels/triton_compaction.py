"""The Triton kernel of `memento.kernels.compaction`: one launch for all layers and requests."""

# Launches are beyond the type checker.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from memento.kernels.compaction import Moves, PagedCache

WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
"""A value is moved as an integer of its size, whatever its type."""

TILE_BYTES = 32 * 1024
"""Of one program's registers: 64 a thread at 4 warps."""


def tile_of(longest: int, content: int, element_size: int) -> tuple[int, int]:
    """(tokens, values of a token) that a program moves at a time; both powers of two.

    As many tokens as there are, so that most programs need one tile; the content is split among programs.
    """
    tokens = min(256, max(16, triton.next_power_of_2(longest)))
    values = TILE_BYTES // element_size // tokens
    return tokens, min(triton.next_power_of_2(content), max(16 // element_size, values))


def launch(cache: PagedCache, moves: Moves) -> None:
    """Raises ValueError for tensors that are not on a GPU, unless Triton's interpreter runs."""
    first = cache.layers[0]
    if not first.is_cuda and isinstance(_compact, triton.JITFunction):
        raise ValueError(f'implementation "triton" needs a GPU and the cache is on {first.device}')
    _, heads, page_tokens, content = first.shape
    tokens, values = tile_of(moves.longest, content, first.element_size())
    splits = triton.cdiv(content, values)
    grid = (len(moves.offsets) - 1, len(cache.layers) * heads, splits)
    _compact[grid](
        cache.addresses, *moves.slots, moves.offsets, *first.stride()[:3], heads, page_tokens, content,
        WORD=WORDS[first.element_size()], TOKENS=tokens, VALUES=values, ALIGNED=cache.aligned, num_warps=4,
    )  # fmt: skip


@triton.jit
def _compact(
    addresses, source, target, offsets, page_stride, head_stride, token_stride, heads, page_tokens, content,
    WORD: tl.constexpr, TOKENS: tl.constexpr, VALUES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The moves of one request in one head of one layer, `VALUES` of each token."""
    low, high = tl.load(offsets + tl.program_id(0)), tl.load(offsets + tl.program_id(0) + 1)
    layer, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    base = tl.load(addresses + layer).to(tl.pointer_type(WORD))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    column = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    base += head.to(tl.int64) * head_stride
    for start in range(low, high, TOKENS):
        move = start + tl.arange(0, TOKENS)
        source_slot = tl.load(source + move, mask=move < high, other=0)
        target_slot = tl.load(target + move, mask=move < high, other=0)
        source_row = source_slot // page_tokens * page_stride + source_slot % page_tokens * token_stride
        target_row = target_slot // page_tokens * page_stride + target_slot % page_tokens * token_stride
        inside = (move[:, None] < high) & (column[None, :] < content)
        values = tl.load(base + source_row[:, None] + column[None, :], mask=inside)
        tl.debug_barrier()  # every thread has read before any writes
        tl.store(base + target_row[:, None] + column[None, :], values, mask=inside)
