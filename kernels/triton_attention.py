"""Memento attention in Triton, forward and backward: tiles that nobody sees are never touched.

Which tiles of queries and keys are computed, and which of them need a mask, comes from `memento.kernels.tiles`: lists
made once a batch on the device, shared by all layers and heads. Keys and values are brought into the order of their
slots once a layer, so that kept keys and the keys of a block lie together.

The passes are those of FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2). Gradients of keys and values are summed
by one program per key tile over all queries and the heads of its group, without atomics: results are the same in every
run, with or without ``torch.use_deterministic_algorithms``.

The kernels also run on the CPU under Triton's interpreter (``TRITON_INTERPRET=1`` before the first import).
"""

# Launches, static ranges and the constants that kernels pass to each other are beyond the type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from memento.kernels.tiles import TileLists, Tiling

if TYPE_CHECKING:
    from memento.kernels.attention import Visibility

LOG2_E = 1.4426950408889634


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
        k, v = (_by_slot(x, lists.position) for x in (k, v))
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        rows, heads, tokens, width = q.shape
        out = q.new_empty(rows, tokens, heads, width).transpose(1, 2)
        lse = q.new_empty(rows, heads, tokens, dtype=torch.float32)
        if tokens:
            _forward[triton.cdiv(tokens, lists.tiling.queries), rows * heads](
                q, k, v, out, lse, *lists.of_queries, *_vectors(lists), *_strides(q, k, v, out),
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
            delta = (grad.float() * out.float()).sum(-1).contiguous()  # [B, H, T]
            inputs = q, k, v, grad, lse, delta
            numbers = ctx.scale, ctx.scale * LOG2_E, tokens, heads
            constants = _constants(lists, q, k)
            _backward_queries[triton.cdiv(tokens, lists.tiling.queries), rows * heads](
                *inputs, dq, *lists.of_queries, *_vectors(lists), *_strides(q, k, v, grad, dq), *numbers, **constants
            )
            _backward_keys[triton.cdiv(tokens, lists.tiling.keys), rows * k.shape[1]](
                *inputs, dk, dv, *lists.of_keys, *_vectors(lists), *_strides(q, k, v, grad, dk, dv), *numbers,
                **constants,
            )  # fmt: skip
        return dq, dk, dv, None, None


def _by_slot(x: torch.Tensor, position: torch.Tensor | None) -> torch.Tensor:
    """Keys or values [B, H, T, D] in the order of their slots."""
    if position is None:
        return x
    rows = torch.arange(len(position), device=position.device)[:, None]
    return x.transpose(1, 2)[rows, position].transpose(1, 2)


def _vectors(lists: TileLists) -> tuple[torch.Tensor, ...]:
    """Pointers for the four vectors; one that is absent is never read."""
    return tuple(lists.until if x is None else x for x in (lists.position, lists.until, lists.lowest, lists.document))


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Of rows, heads and tokens."""
    return tuple(n for x in tensors for n in x.stride()[:3])


def _constants(lists: TileLists, q: torch.Tensor, k: torch.Tensor) -> dict[str, Any]:
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[-1],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[-1])),
        "QUERIES": lists.tiling.queries,
        "KEYS": lists.tiling.keys,
        "HAS_POSITION": lists.position is not None,
        "HAS_LOWEST": lists.lowest is not None,
        "HAS_DOCUMENT": lists.document is not None,
        # Of fp32 only. Three TF32 products keep about 21 bits on tensor cores; plain TF32 would keep 10, and IEEE
        # products spill (12 KB a thread at head size 128).
        "PRECISION": "ieee" if torch.version.hip else "tf32x3",
        "num_warps": lists.tiling.warps,
        "num_stages": lists.tiling.stages,
    }


# In the kernels: _MD is [queries, D], _ND [keys, D], _MN [queries, keys]; scores are in units of log 2. A `slot` says
# where a key lies in k and v, a `key` its position in the row.


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
def _program(heads, QUERIES_FIRST: tl.constexpr):
    """(tile, row of the batch, head, index of the tile's lists) of this program."""
    tile = tl.program_id(0)
    if QUERIES_FIRST:
        tile = tl.num_programs(0) - 1 - tile  # late queries see most and start first
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    return tile, row, head, 4 * (row * tl.num_programs(0) + tile)


@triton.jit
def _key_of(slot, position, tokens, HAS_POSITION: tl.constexpr):
    """Row positions of the keys in these slots; `tokens` or more beyond the row."""
    key = slot
    if HAS_POSITION:
        key = tl.load(position + slot, mask=slot < tokens, other=tokens)
    return key


@triton.jit
def _scores(
    q_MD, k_ND, query, slot, position, until, lowest, document, scale_log2, tokens, MASKED: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_LOWEST: tl.constexpr, HAS_DOCUMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of a tile; in a masked one those of pairs that are not visible are -inf. Vectors are those of the row."""
    scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION) * scale_log2
    if MASKED:
        key = _key_of(slot, position, tokens, HAS_POSITION)
        key_until = tl.load(until + key, mask=key < tokens, other=0)
        seen = (key[None, :] <= query[:, None]) & (query[:, None] < key_until[None, :])
        if HAS_LOWEST:
            seen = seen & (tl.load(lowest + query, mask=query < tokens, other=0)[:, None] <= key[None, :])
        if HAS_DOCUMENT:
            of_query = tl.load(document + query, mask=query < tokens, other=-1)
            of_key = tl.load(document + key, mask=key < tokens, other=-1)
            seen = seen & (of_query[:, None] == of_key[None, :])
        scores_MN = tl.where(seen, scores_MN, float("-inf"))
    return scores_MN


@triton.jit
def _attend_tiles(
    acc_MD, total_M, top_M, q_MD, k, v, tiles, low, high, query, position, until, lowest, document, k_stride, v_stride,
    scale_log2, tokens, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_LOWEST: tl.constexpr, HAS_DOCUMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over listed key tiles."""
    for i in range(low, high):
        slot = tl.load(tiles + i) * KEYS + tl.arange(0, KEYS)
        k_ND = _load(k, slot, tokens, k_stride, D, BLOCK_D)
        scores_MN = _scores(
            q_MD, k_ND, query, slot, position, until, lowest, document, scale_log2, tokens, MASKED,
            HAS_POSITION, HAS_LOWEST, HAS_DOCUMENT, PRECISION,
        )  # fmt: skip
        new_top_M = tl.maximum(top_M, tl.max(scores_MN, 1))
        # A query that has seen nothing so far has the maximum -inf, and -inf - -inf is NaN.
        finite_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M) if MASKED else new_top_M
        p_MN = tl.exp2(scores_MN - finite_M[:, None])
        shrink_M = tl.exp2(top_M - finite_M)
        total_M = total_M * shrink_M + tl.sum(p_MN, 1)
        v_ND = _load(v, slot, tokens, v_stride, D, BLOCK_D)
        acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None], input_precision=PRECISION)
        top_M = new_top_M
    return acc_MD, total_M, top_M


@triton.jit
def _forward(
    q, k, v, out, lse, bounds, tiles, position, until, lowest, document,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, o_row, o_head, o_token,
    scale_log2, tokens, heads,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_LOWEST: tl.constexpr, HAS_DOCUMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query tile of one head."""
    tile, row, head, listed = _program(heads, True)
    k += row * k_row + head // GROUP * k_head
    v += row * v_row + head // GROUP * v_head
    query = tile * QUERIES + tl.arange(0, QUERIES)
    q_MD = _load(q + row * q_row + head * q_head, query, tokens, q_token, D, BLOCK_D)

    acc_MD = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    total_M = tl.zeros([QUERIES], tl.float32)
    top_M = tl.full([QUERIES], float("-inf"), tl.float32)
    for MASKED in tl.static_range(2):
        low, high = tl.load(bounds + listed + 2 * MASKED), tl.load(bounds + listed + 2 * MASKED + 1)
        acc_MD, total_M, top_M = _attend_tiles(
            acc_MD, total_M, top_M, q_MD, k, v, tiles, low, high, query, position + row * tokens, until + row * tokens,
            lowest + row * tokens, document + row * tokens, k_token, v_token, scale_log2, tokens,
            MASKED, D, BLOCK_D, KEYS, HAS_POSITION, HAS_LOWEST, HAS_DOCUMENT, PRECISION,
        )  # fmt: skip
    total_M = tl.where(total_M == 0.0, 1.0, total_M)  # rows beyond the end: never stored
    _store(out + row * o_row + head * o_head, acc_MD / total_M[:, None], query, tokens, o_token, D, BLOCK_D)
    tl.store(lse + (row * heads + head) * tokens + query, top_M + tl.log2(total_M), mask=query < tokens)


@triton.jit
def _query_gradient(
    dq_MD, q_MD, grad_MD, lse_M, delta_M, k, v, tiles, low, high, query, position, until, lowest, document,
    k_stride, v_stride, scale_log2, tokens, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_LOWEST: tl.constexpr, HAS_DOCUMENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for i in range(low, high):
        slot = tl.load(tiles + i) * KEYS + tl.arange(0, KEYS)
        k_ND = _load(k, slot, tokens, k_stride, D, BLOCK_D)
        scores_MN = _scores(
            q_MD, k_ND, query, slot, position, until, lowest, document, scale_log2, tokens, MASKED,
            HAS_POSITION, HAS_LOWEST, HAS_DOCUMENT, PRECISION,
        )  # fmt: skip
        p_MN = tl.exp2(scores_MN - lse_M[:, None])
        v_ND = _load(v, slot, tokens, v_stride, D, BLOCK_D)
        dp_MN = tl.dot(grad_MD, tl.trans(v_ND), input_precision=PRECISION)
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        dq_MD = tl.dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision=PRECISION)
    return dq_MD


@triton.jit
def _backward_queries(
    q, k, v, grad, lse, delta, dq, bounds, tiles, position, until, lowest, document,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, g_row, g_head, g_token,
    dq_row, dq_head, dq_token, scale, scale_log2, tokens, heads,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_LOWEST: tl.constexpr, HAS_DOCUMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one query tile of one head."""
    tile, row, head, listed = _program(heads, True)
    k += row * k_row + head // GROUP * k_head
    v += row * v_row + head // GROUP * v_head
    query = tile * QUERIES + tl.arange(0, QUERIES)
    q_MD = _load(q + row * q_row + head * q_head, query, tokens, q_token, D, BLOCK_D)
    grad_MD = _load(grad + row * g_row + head * g_head, query, tokens, g_token, D, BLOCK_D)
    at = (row * heads + head) * tokens + query
    lse_M = tl.load(lse + at, mask=query < tokens, other=0.0)
    delta_M = tl.load(delta + at, mask=query < tokens, other=0.0)

    dq_MD = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for MASKED in tl.static_range(2):
        low, high = tl.load(bounds + listed + 2 * MASKED), tl.load(bounds + listed + 2 * MASKED + 1)
        dq_MD = _query_gradient(
            dq_MD, q_MD, grad_MD, lse_M, delta_M, k, v, tiles, low, high, query, position + row * tokens,
            until + row * tokens, lowest + row * tokens, document + row * tokens, k_token, v_token, scale_log2, tokens,
            MASKED, D, BLOCK_D, KEYS, HAS_POSITION, HAS_LOWEST, HAS_DOCUMENT, PRECISION,
        )  # fmt: skip
    _store(dq + row * dq_row + head * dq_head, dq_MD * scale, query, tokens, dq_token, D, BLOCK_D)


@triton.jit
def _key_gradient(
    dk_ND, dv_ND, k_ND, v_ND, q, grad, lse, delta, tiles, low, high, slot, position, until, lowest, document,
    q_stride, g_stride, scale_log2, tokens, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_LOWEST: tl.constexpr, HAS_DOCUMENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for i in range(low, high):
        query = tl.load(tiles + i) * QUERIES + tl.arange(0, QUERIES)
        # Queries beyond the row have q = grad = delta = 0: whatever their p is, they add 0.
        q_MD = _load(q, query, tokens, q_stride, D, BLOCK_D)
        grad_MD = _load(grad, query, tokens, g_stride, D, BLOCK_D)
        lse_M = tl.load(lse + query, mask=query < tokens, other=0.0)
        delta_M = tl.load(delta + query, mask=query < tokens, other=0.0)
        scores_MN = _scores(
            q_MD, k_ND, query, slot, position, until, lowest, document, scale_log2, tokens, MASKED,
            HAS_POSITION, HAS_LOWEST, HAS_DOCUMENT, PRECISION,
        )  # fmt: skip
        p_MN = tl.exp2(scores_MN - lse_M[:, None])
        dv_ND = tl.dot(tl.trans(p_MN.to(grad_MD.dtype)), grad_MD, dv_ND, input_precision=PRECISION)
        dp_MN = tl.dot(grad_MD, tl.trans(v_ND), input_precision=PRECISION)
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        dk_ND = tl.dot(tl.trans(ds_MN.to(q_MD.dtype)), q_MD, dk_ND, input_precision=PRECISION)
    return dk_ND, dv_ND


@triton.jit
def _backward_keys(
    q, k, v, grad, lse, delta, dk, dv, bounds, tiles, position, until, lowest, document,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, g_row, g_head, g_token,
    dk_row, dk_head, dk_token, dv_row, dv_head, dv_token, scale, scale_log2, tokens, heads,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_LOWEST: tl.constexpr, HAS_DOCUMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one key tile of one key head, over all query heads of its group."""
    tile, row, kv_head, listed = _program(heads // GROUP, False)
    slot = tile * KEYS + tl.arange(0, KEYS)
    k_ND = _load(k + row * k_row + kv_head * k_head, slot, tokens, k_token, D, BLOCK_D)
    v_ND = _load(v + row * v_row + kv_head * v_head, slot, tokens, v_token, D, BLOCK_D)

    dk_ND = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv_ND = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        at = (row * heads + head) * tokens
        for MASKED in tl.static_range(2):
            low, high = tl.load(bounds + listed + 2 * MASKED), tl.load(bounds + listed + 2 * MASKED + 1)
            dk_ND, dv_ND = _key_gradient(
                dk_ND, dv_ND, k_ND, v_ND, q + row * q_row + head * q_head, grad + row * g_row + head * g_head,
                lse + at, delta + at, tiles, low, high, slot, position + row * tokens, until + row * tokens,
                lowest + row * tokens, document + row * tokens, q_token, g_token, scale_log2, tokens,
                MASKED, D, BLOCK_D, QUERIES, HAS_POSITION, HAS_LOWEST, HAS_DOCUMENT, PRECISION,
            )  # fmt: skip
    key = _key_of(slot, position + row * tokens, tokens, HAS_POSITION)
    _store(dk + row * dk_row + kv_head * dk_head, dk_ND * scale, key, tokens, dk_token, D, BLOCK_D)
    _store(dv + row * dv_row + kv_head * dv_head, dv_ND, key, tokens, dv_token, D, BLOCK_D)
