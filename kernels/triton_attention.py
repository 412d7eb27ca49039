"""Memento attention in Triton, forward and backward: tiles that nobody sees are never touched.

The scores are a grid of tiles, `Tiling.queries` by `Tiling.keys`. From the smallest and largest ``visible_until`` of a
key tile (and ``lowest_visible`` of a query tile) follows, without looking at pairs, that a tile is

* invisible: no query of it sees a key of it. It is on no list, so it is neither loaded nor computed;
* full: every query sees every key. No mask arithmetic;
* partial: anything between; the rule is evaluated pair by pair.

The lists are made once a batch on the device (`TileLists`); all layers and heads share them. The passes are those of
FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2). Gradients of keys and values are summed by one program per key
tile over all queries and the heads of its group, without atomics: results are the same in every run.

The kernels also run on the CPU under Triton's interpreter (``TRITON_INTERPRET=1`` before the first import).
"""

# Launches and the constants that kernels pass to each other are beyond the type checker.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from memento.kernels.attention import Visibility

LOG2_E = 1.4426950408889634


class Tiling(NamedTuple):
    """Tile sizes in queries and keys, and Triton's warps and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


def tilings(head_dim: int, dtype: torch.dtype, hopper: bool) -> tuple[Tiling, Tiling]:
    """Tiles of the forward and the backward pass.

    Chosen by compiling for sm_80 and sm_90 and reading registers, spills and shared memory; not tuned by time.
    """
    if dtype == torch.float32:
        return Tiling(64 if head_dim <= 64 else 32, 32, 4, 1), Tiling(32, 32, 4, 1)
    if head_dim <= 64:
        return Tiling(128, 64, 4, 3), Tiling(64, 64, 4, 2)
    if head_dim <= 128:
        return Tiling(128, 64, 8, 2), Tiling(128, 64, 8, 2) if hopper else Tiling(64, 64, 8, 2)
    return Tiling(64, 32, 8, 1), Tiling(32, 32, 8, 1)


class TileList(NamedTuple):
    """For n tiles of one kind the tiles of the other kind that concern them, in compressed rows.

    Attributes:
        offsets: int32 [B * n + 1].
        tiles: int32 [offsets[-1]], ascending within each row.
    """

    offsets: torch.Tensor
    tiles: torch.Tensor

    @classmethod
    def of(cls, wanted: torch.Tensor) -> TileList:
        """From bool [B, n, m]."""
        counts = wanted.sum(-1, dtype=torch.int32).flatten()
        offsets = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(offsets, wanted.nonzero()[:, 2].int())


@dataclass(frozen=True, eq=False)
class TileLists:
    """Which tiles are computed and which of them need a mask; and the vectors the masks are made from.

    Attributes:
        full_keys, partial_keys: for each query tile its key tiles.
        full_queries, partial_queries: for each key tile its query tiles.
        until: int32 [B, T], within [key + 1, T]; the ends of contiguous documents are folded in.
        lowest: int32 [B, T], within [0, query], or None.
        document: int32 [B, T] where some document is not one run of tokens, else None.
    """

    tiling: Tiling
    full_keys: TileList
    partial_keys: TileList
    full_queries: TileList
    partial_queries: TileList
    until: torch.Tensor
    lowest: torch.Tensor | None
    document: torch.Tensor | None

    @classmethod
    def of(cls, visibility: Visibility, tiling: Tiling) -> TileLists:
        """Compare the tiles' extremes with each other: [B, T / queries, T / keys] booleans, once a batch."""
        until = visibility.visible_until
        tokens = until.shape[1]
        at = torch.arange(tokens, device=until.device)
        until = torch.maximum(until, at + 1).clamp(max=tokens)
        lowest = visibility.lowest_visible
        lowest = None if lowest is None else torch.minimum(lowest.clamp(min=0), at)
        document = visibility.document
        if document is not None:
            # Runs of equal ids, numbered; the last token of each run + 1 is the run's end.
            run = torch.nn.functional.pad((document[:, 1:] != document[:, :-1]).long(), (1, 0)).cumsum(-1)
            ends = torch.zeros_like(run).scatter_reduce_(1, run, (at + 1).expand_as(run), "amax").gather(1, run)
            ids = document.sort(-1).values
            distinct = (ids[:, 1:] != ids[:, :-1]).sum(-1)
            if bool((distinct == run[:, -1]).all()):
                until, document = torch.minimum(until, ends), None

        def tiles(x: torch.Tensor, size: int, fill: int) -> torch.Tensor:
            return torch.nn.functional.pad(x, (0, -tokens % size), value=fill).unflatten(-1, (-1, size))

        first_query = torch.arange(0, tokens, tiling.queries, device=until.device)[:, None]
        last_query = (first_query + tiling.queries).clamp(max=tokens) - 1
        first_key = torch.arange(0, tokens, tiling.keys, device=until.device)[None]
        last_key = first_key + tiling.keys - 1
        by_key = tiles(until, tiling.keys, 0)  # keys beyond the row: never visible, so their tile is never full
        visible = (first_key <= last_query) & (by_key.amax(-1)[:, None] > first_query)
        full = (last_key <= first_query) & (by_key.amin(-1)[:, None] > last_query)
        if lowest is not None:
            visible &= tiles(lowest, tiling.queries, tokens).amin(-1)[..., None] <= last_key
            full &= tiles(lowest, tiling.queries, 0).amax(-1)[..., None] <= first_key
        if document is not None:
            of_query, of_key = (tiles(document, n, -(2**40)) for n in (tiling.queries, tiling.keys))
            one = (of_query.amin(-1) == of_query.amax(-1))[..., None] & (of_key.amin(-1) == of_key.amax(-1))[:, None]
            full &= one & (of_query.amin(-1)[..., None] == of_key.amin(-1)[:, None])
        partial = visible & ~full
        if document is not None:
            document = torch.unique(document, return_inverse=True)[1]
        return cls(
            tiling,
            TileList.of(full),
            TileList.of(partial),
            TileList.of(full.transpose(1, 2)),
            TileList.of(partial.transpose(1, 2)),
            until.int(),
            None if lowest is None else lowest.int(),
            None if document is None else document.int(),
        )


def triton_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visibility: Visibility, scale: float
) -> torch.Tensor:
    """Attention by tiles; see this module. bf16, fp16, and fp32 as three TF32 products; head sizes 1 to 256.

    Raises:
        ValueError: another dtype or head size, or CPU tensors without Triton's interpreter.
    """
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f'implementation "triton" takes float32, bfloat16 or float16, got {q.dtype}, {k.dtype}, {v.dtype}'
        )
    if q.shape[-1] > 256:
        raise ValueError(f'implementation "triton" takes heads of up to 256, got {q.shape[-1]}')
    if not q.is_cuda and isinstance(_forward, triton.JITFunction):
        raise ValueError(
            f'implementation "triton" needs a GPU and the queries are on {q.device}; leave the implementation out, or '
            "set TRITON_INTERPRET=1 before starting Python to run the kernels in Triton's interpreter"
        )
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    lists = tuple(visibility.tile_lists(tiling) for tiling in tilings(q.shape[-1], q.dtype, hopper))
    return _TiledAttention.apply(q, k, v, lists, scale)  # pyright: ignore[reportReturnType]


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        forward_and_backward: tuple[TileLists, TileLists],
        scale: float,
    ) -> torch.Tensor:
        lists, ctx.lists = forward_and_backward
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        rows, heads, tokens, width = q.shape
        out = q.new_empty(rows, tokens, heads, width).transpose(1, 2)
        lse = q.new_empty(rows, heads, tokens, dtype=torch.float32)
        grid = (triton.cdiv(tokens, lists.tiling.queries), rows * heads)
        if tokens:
            _forward[grid](
                q, k, v, out, lse, *lists.full_keys, *lists.partial_keys, *_vectors(lists),
                *(n for x in (q, k, v, out) for n in x.stride()[:3]),
                scale * LOG2_E, tokens, heads, **_constants(lists, q, k),
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        lists: TileLists = ctx.lists
        rows, heads, tokens, _ = q.shape
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        if tokens:
            delta = (grad.float() * out.float()).sum(-1)  # [B, H, T]
            common = (
                *(n for x in (q, k, v, grad) for n in x.stride()[:3]), ctx.scale, ctx.scale * LOG2_E, tokens, heads,
            )  # fmt: skip
            constants = _constants(lists, q, k)
            _backward_queries[triton.cdiv(tokens, lists.tiling.queries), rows * heads](
                q, k, v, grad, lse, delta.contiguous(), dq, *lists.full_keys, *lists.partial_keys, *_vectors(lists),
                *dq.stride()[:3], *common, **constants,
            )  # fmt: skip
            _backward_keys[triton.cdiv(tokens, lists.tiling.keys), rows * k.shape[1]](
                q, k, v, grad, lse, delta.contiguous(), dk, dv, *lists.full_queries, *lists.partial_queries,
                *_vectors(lists), *dk.stride()[:3], *dv.stride()[:3], *common, **constants,
            )  # fmt: skip
        return dq, dk, dv, None, None


def _vectors(lists: TileLists) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pointers for the three vectors; one that is absent is never read."""
    until = lists.until
    return until, until if lists.lowest is None else lists.lowest, until if lists.document is None else lists.document


def _constants(lists: TileLists, q: torch.Tensor, k: torch.Tensor) -> dict[str, Any]:
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[-1],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[-1])),
        "QUERIES": lists.tiling.queries,
        "KEYS": lists.tiling.keys,
        "HAS_LOWEST": lists.lowest is not None,
        "HAS_DOCUMENT": lists.document is not None,
        # Of fp32 only. Three TF32 products keep about 21 bits on tensor cores; plain TF32 would keep 10, and IEEE
        # products spill (12 KB a thread at head size 128).
        "PRECISION": "ieee" if torch.version.hip else "tf32x3",
        "num_warps": lists.tiling.warps,
        "num_stages": lists.tiling.stages,
    }


# In the kernels: _MD is [queries, D], _ND [keys, D], _MN [queries, keys]; scores are in units of log 2.


@triton.jit
def _load(base, at, tokens, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `at` of a [T, D] matrix, zero beyond its edges."""
    column = tl.arange(0, BLOCK_D)
    pointers = base + at[:, None].to(tl.int64) * stride + column[None, :]
    return tl.load(pointers, mask=(at[:, None] < tokens) & (column[None, :] < D), other=0.0)


@triton.jit
def _store(base, x, at, tokens, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    pointers = base + at[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=(at[:, None] < tokens) & (column[None, :] < D))


@triton.jit
def _hide(scores_MN, query, key, until, lowest, document, tokens, HAS_LOWEST: tl.constexpr, HAS_DOCUMENT: tl.constexpr):
    """Scores of pairs that are not visible become -inf. The vectors are those of this row of the batch."""
    key_until = tl.load(until + key, mask=key < tokens, other=0)
    seen = (key[None, :] <= query[:, None]) & (query[:, None] < key_until[None, :])
    if HAS_LOWEST:
        seen = seen & (tl.load(lowest + query, mask=query < tokens, other=0)[:, None] <= key[None, :])
    if HAS_DOCUMENT:
        of_query = tl.load(document + query, mask=query < tokens, other=-1)
        of_key = tl.load(document + key, mask=key < tokens, other=-1)
        seen = seen & (of_query[:, None] == of_key[None, :])
    return tl.where(seen, scores_MN, float("-inf"))


@triton.jit
def _attend_tiles(
    acc_MD, total_M, top_M, q_MD, k, v, tiles, low, high, query, until, lowest, document, k_stride, v_stride,
    scale_log2, tokens, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
    HAS_LOWEST: tl.constexpr, HAS_DOCUMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over listed key tiles."""
    for i in range(low, high):
        key = tl.load(tiles + i) * KEYS + tl.arange(0, KEYS)
        k_ND = _load(k, key, tokens, k_stride, D, BLOCK_D)
        scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION) * scale_log2
        if MASKED:
            scores_MN = _hide(
                scores_MN, query, key, until, lowest, document, tokens, HAS_LOWEST, HAS_DOCUMENT
            )  # fmt: skip
        new_top_M = tl.maximum(top_M, tl.max(scores_MN, 1))
        # A query that has seen nothing so far has the maximum -inf, and -inf - -inf is NaN.
        finite_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M) if MASKED else new_top_M
        p_MN = tl.exp2(scores_MN - finite_M[:, None])
        shrink_M = tl.exp2(top_M - finite_M)
        total_M = total_M * shrink_M + tl.sum(p_MN, 1)
        v_ND = _load(v, key, tokens, v_stride, D, BLOCK_D)
        acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None], input_precision=PRECISION)
        top_M = new_top_M
    return acc_MD, total_M, top_M


@triton.jit
def _forward(
    q, k, v, out, lse, full_offsets, full_tiles, partial_offsets, partial_tiles, until, lowest, document,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, o_row, o_head, o_token,
    scale_log2, tokens, heads,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    HAS_LOWEST: tl.constexpr, HAS_DOCUMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query tile of one head."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late queries see most and start first
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    listed = row * tl.num_programs(0) + tile
    until += row * tokens
    lowest += row * tokens
    document += row * tokens
    k += row * k_row + head // GROUP * k_head
    v += row * v_row + head // GROUP * v_head
    query = tile * QUERIES + tl.arange(0, QUERIES)
    q_MD = _load(q + row * q_row + head * q_head, query, tokens, q_token, D, BLOCK_D)

    acc_MD = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    total_M = tl.zeros([QUERIES], tl.float32)
    top_M = tl.full([QUERIES], float("-inf"), tl.float32)
    low, high = tl.load(full_offsets + listed), tl.load(full_offsets + listed + 1)
    acc_MD, total_M, top_M = _attend_tiles(
        acc_MD, total_M, top_M, q_MD, k, v, full_tiles, low, high, query, until, lowest, document, k_token, v_token,
        scale_log2, tokens, False, D, BLOCK_D, KEYS, HAS_LOWEST, HAS_DOCUMENT, PRECISION,
    )  # fmt: skip
    low, high = tl.load(partial_offsets + listed), tl.load(partial_offsets + listed + 1)
    acc_MD, total_M, top_M = _attend_tiles(
        acc_MD, total_M, top_M, q_MD, k, v, partial_tiles, low, high, query, until, lowest, document, k_token, v_token,
        scale_log2, tokens, True, D, BLOCK_D, KEYS, HAS_LOWEST, HAS_DOCUMENT, PRECISION,
    )  # fmt: skip
    total_M = tl.where(total_M == 0.0, 1.0, total_M)  # rows beyond the end: never stored
    _store(
        out + row * o_row + head * o_head, acc_MD / total_M[:, None], query, tokens, o_token, D, BLOCK_D
    )  # fmt: skip
    tl.store(lse + tl.program_id(1).to(tl.int64) * tokens + query, top_M + tl.log2(total_M), mask=query < tokens)


@triton.jit
def _query_gradient(
    dq_MD, q_MD, grad_MD, lse_M, delta_M, k, v, tiles, low, high, query, until, lowest, document, k_stride, v_stride,
    scale_log2, tokens, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
    HAS_LOWEST: tl.constexpr, HAS_DOCUMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for i in range(low, high):
        key = tl.load(tiles + i) * KEYS + tl.arange(0, KEYS)
        k_ND = _load(k, key, tokens, k_stride, D, BLOCK_D)
        scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION) * scale_log2
        if MASKED:
            scores_MN = _hide(
                scores_MN, query, key, until, lowest, document, tokens, HAS_LOWEST, HAS_DOCUMENT
            )  # fmt: skip
        p_MN = tl.exp2(scores_MN - lse_M[:, None])
        v_ND = _load(v, key, tokens, v_stride, D, BLOCK_D)
        dp_MN = tl.dot(grad_MD, tl.trans(v_ND), input_precision=PRECISION)
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        dq_MD = tl.dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision=PRECISION)
    return dq_MD


@triton.jit
def _backward_queries(
    q, k, v, grad, lse, delta, dq, full_offsets, full_tiles, partial_offsets, partial_tiles, until, lowest, document,
    dq_row, dq_head, dq_token,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, g_row, g_head, g_token,
    scale, scale_log2, tokens, heads,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    HAS_LOWEST: tl.constexpr, HAS_DOCUMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one query tile of one head."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    listed = row * tl.num_programs(0) + tile
    until += row * tokens
    lowest += row * tokens
    document += row * tokens
    k += row * k_row + head // GROUP * k_head
    v += row * v_row + head // GROUP * v_head
    query = tile * QUERIES + tl.arange(0, QUERIES)
    q_MD = _load(q + row * q_row + head * q_head, query, tokens, q_token, D, BLOCK_D)
    grad_MD = _load(grad + row * g_row + head * g_head, query, tokens, g_token, D, BLOCK_D)
    at = tl.program_id(1).to(tl.int64) * tokens + query
    lse_M = tl.load(lse + at, mask=query < tokens, other=0.0)
    delta_M = tl.load(delta + at, mask=query < tokens, other=0.0)

    dq_MD = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    low, high = tl.load(full_offsets + listed), tl.load(full_offsets + listed + 1)
    dq_MD = _query_gradient(
        dq_MD, q_MD, grad_MD, lse_M, delta_M, k, v, full_tiles, low, high, query, until, lowest, document,
        k_token, v_token, scale_log2, tokens, False, D, BLOCK_D, KEYS, HAS_LOWEST, HAS_DOCUMENT, PRECISION,
    )  # fmt: skip
    low, high = tl.load(partial_offsets + listed), tl.load(partial_offsets + listed + 1)
    dq_MD = _query_gradient(
        dq_MD, q_MD, grad_MD, lse_M, delta_M, k, v, partial_tiles, low, high, query, until, lowest, document,
        k_token, v_token, scale_log2, tokens, True, D, BLOCK_D, KEYS, HAS_LOWEST, HAS_DOCUMENT, PRECISION,
    )  # fmt: skip
    _store(dq + row * dq_row + head * dq_head, dq_MD * scale, query, tokens, dq_token, D, BLOCK_D)


@triton.jit
def _key_gradient(
    dk_ND, dv_ND, k_ND, v_ND, q, grad, lse, delta, tiles, low, high, key, until, lowest, document, q_stride, g_stride,
    scale_log2, tokens, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
    HAS_LOWEST: tl.constexpr, HAS_DOCUMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for i in range(low, high):
        query = tl.load(tiles + i) * QUERIES + tl.arange(0, QUERIES)
        # Queries beyond the row have q = grad = delta = 0: whatever their p is, they add 0.
        q_MD = _load(q, query, tokens, q_stride, D, BLOCK_D)
        grad_MD = _load(grad, query, tokens, g_stride, D, BLOCK_D)
        lse_M = tl.load(lse + query, mask=query < tokens, other=0.0)
        delta_M = tl.load(delta + query, mask=query < tokens, other=0.0)
        scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION) * scale_log2
        if MASKED:
            scores_MN = _hide(
                scores_MN, query, key, until, lowest, document, tokens, HAS_LOWEST, HAS_DOCUMENT
            )  # fmt: skip
        p_MN = tl.exp2(scores_MN - lse_M[:, None])
        dv_ND = tl.dot(tl.trans(p_MN.to(grad_MD.dtype)), grad_MD, dv_ND, input_precision=PRECISION)
        dp_MN = tl.dot(grad_MD, tl.trans(v_ND), input_precision=PRECISION)
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        dk_ND = tl.dot(tl.trans(ds_MN.to(q_MD.dtype)), q_MD, dk_ND, input_precision=PRECISION)
    return dk_ND, dv_ND


@triton.jit
def _backward_keys(
    q, k, v, grad, lse, delta, dk, dv,
    full_offsets, full_tiles, partial_offsets, partial_tiles, until, lowest, document,
    dk_row, dk_head, dk_token, dv_row, dv_head, dv_token,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, g_row, g_head, g_token,
    scale, scale_log2, tokens, heads,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    HAS_LOWEST: tl.constexpr, HAS_DOCUMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one key tile of one key head, over all query heads of its group."""
    tile = tl.program_id(0)
    kv_heads = heads // GROUP
    row = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    listed = row * tl.num_programs(0) + tile
    until += row * tokens
    lowest += row * tokens
    document += row * tokens
    key = tile * KEYS + tl.arange(0, KEYS)
    k_ND = _load(k + row * k_row + kv_head * k_head, key, tokens, k_token, D, BLOCK_D)
    v_ND = _load(v + row * v_row + kv_head * v_head, key, tokens, v_token, D, BLOCK_D)

    dk_ND = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv_ND = tl.zeros([KEYS, BLOCK_D], tl.float32)
    full_low, full_high = tl.load(full_offsets + listed), tl.load(full_offsets + listed + 1)
    low, high = tl.load(partial_offsets + listed), tl.load(partial_offsets + listed + 1)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_head_base = q + row * q_row + head * q_head
        g_head_base = grad + row * g_row + head * g_head
        lse_base = lse + (row * heads + head) * tokens
        delta_base = delta + (row * heads + head) * tokens
        dk_ND, dv_ND = _key_gradient(
            dk_ND, dv_ND, k_ND, v_ND, q_head_base, g_head_base, lse_base, delta_base, full_tiles, full_low, full_high,
            key, until, lowest, document, q_token, g_token, scale_log2, tokens, False, D, BLOCK_D, QUERIES,
            HAS_LOWEST, HAS_DOCUMENT, PRECISION,
        )  # fmt: skip
        dk_ND, dv_ND = _key_gradient(
            dk_ND, dv_ND, k_ND, v_ND, q_head_base, g_head_base, lse_base, delta_base, partial_tiles, low, high,
            key, until, lowest, document, q_token, g_token, scale_log2, tokens, True, D, BLOCK_D, QUERIES,
            HAS_LOWEST, HAS_DOCUMENT, PRECISION,
        )  # fmt: skip
    _store(dk + row * dk_row + kv_head * dk_head, dk_ND * scale, key, tokens, dk_token, D, BLOCK_D)
    _store(dv + row * dv_row + kv_head * dv_head, dv_ND, key, tokens, dv_token, D, BLOCK_D)
