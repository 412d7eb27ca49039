"""Memento attention on CPU that computes only what is seen, forward and backward, in O(T) extra memory.

Cut a row wherever a key expires or a document begins. Within one such segment ``[start, end)`` nothing expires, so its
queries see two kinds of keys, and neither needs a mask:

* the *kept* keys before ``start`` (prompt, delimiters, mementos): all of them, from every query of the segment;
* its *own* keys: causally.

::

                   keys:   prompt  block 1  memento 1  block 2  memento 2  ...
    segment 1     queries: |------ own ------------|
    segment 2              | kept |        | kept  |--- own -----------|

Both parts are stock flash attention (``aten``'s CPU kernel, which shares grouped heads), merged by their log-sum-exps.
The backward pass hands the same kernel's backward the merged output and log-sum-exp, with which each part's gradient
is exact: FlashAttention-2 (arXiv 2307.08691, section 3.1.2) needs only those two to recompute a tile.

The kept keys of successive segments of one document only grow in a well-formed trace: they are gathered once (a
`Chain`), and each segment sees a prefix. Where cutting costs more than it saves (tiny documents, malformed traces,
sliding windows), segments are merged, and what is then seen by some queries only is masked, tile by tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from memento.kernels.attention import Visibility

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Costs(NamedTuple):
    """What forward plus backward cost, in ns: per (query, key) pair and per token at H * D = 512, and per segment.

    They decide only where to cut, never the result. The defaults were measured on one Zen 4 core in fp32.
    """

    pair_ns: float = 88.0
    causal_pair_ns: float = 125.0
    masked_pair_ns: float = 112.0
    masked_causal_pair_ns: float = 145.0
    merge_token_ns: float = 2e3
    segment_ns: float = 60e3
    merge_ns: float = 120e3


MEASURED = Costs()
_WIDTH = 512
"""The H * D of `Costs`."""

_MIN_CUT_TOKENS = 32
_MAX_CUTS = 512
_WINDOW_CUT_TOKENS = 256
_MASK_BYTES_PER_TOKEN = 8192


@dataclass(frozen=True, eq=False)
class Segment:
    """Queries ``[start, end)`` of a row and what they see.

    Attributes:
        kept: how many keys of the chain are seen by all of these queries. They are a prefix of it.
        partial: int64 [P], keys before ``start`` that only some of these queries see; None if there are none.
        masked: whether own and partial keys need a mask beyond causality.
        mask: additive [end - start, P + end - start], 0 or -inf, over partial then own keys, where it was worth
            keeping; None if there is none, or if it is made at each use.
    """

    start: int
    end: int
    kept: int
    partial: torch.Tensor | None
    masked: bool
    mask: torch.Tensor | None = None

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """Of keys or values [1, H, T, D] the partial ones and then the own ones."""
        own = x[:, :, self.start : self.end]
        return own if self.partial is None else torch.cat([x.index_select(2, self.partial), own], dim=2)


@dataclass(frozen=True, eq=False)
class Chain:
    """Segments whose kept keys are prefixes of one list, int64 [K], which is gathered once."""

    kept: torch.Tensor
    segments: tuple[Segment, ...]


@dataclass(frozen=True, eq=False)
class RowPlan:
    """How one row is computed: its chains, in the order of its queries, and the vectors that masks are made from.

    Attributes:
        until: int64 [T], first query that no longer sees the key; never below the key's own position + 1.
        lowest: int64 [T] or None, never above the query's own position.
    """

    chains: tuple[Chain, ...]
    until: torch.Tensor
    lowest: torch.Tensor | None

    def mask(self, segment: Segment, dtype: torch.dtype) -> torch.Tensor | None:
        """The additive mask of a segment over its partial and own keys, or None where causality is all."""
        if not segment.masked or segment.mask is not None:
            return segment.mask
        own = torch.arange(segment.start, segment.end)
        keys = own if segment.partial is None else torch.cat([segment.partial, own])
        query = own[:, None]
        seen = (keys <= query) & (query < self.until[keys])
        if self.lowest is not None:
            seen &= self.lowest[own][:, None] <= keys
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))


def plan_row(
    until: NDArray[np.int64],
    lowest: NDArray[np.int64] | None,
    document: NDArray[np.int64] | None,
    width: int,
    dtype: torch.dtype,
    costs: Costs = MEASURED,
) -> RowPlan:
    """Cut one row into segments.

    Args:
        until, lowest, document: [T], as in `Visibility`; any values.
        width: H * D of the queries; wide heads are worth more cuts.
        dtype: of the masks that are kept.
        costs: of what is computed.
    """
    tokens = len(until)
    at = np.arange(tokens)
    until = np.maximum(until, at + 1)  # every query sees its own key, as in the dense mask
    lowest = None if lowest is None else np.clip(lowest, 0, at)
    if document is None:
        document = np.zeros(tokens, np.int64)
    starts = np.flatnonzero(np.r_[True, document[1:] != document[:-1]]) if tokens else at
    earlier: dict[int, list[NDArray[np.int64]]] = {}

    chains: list[tuple[NDArray[np.int64], list[Segment]]] = []
    for start, end in zip(starts, [*starts[1:], tokens], strict=True):
        pieces = earlier.setdefault(int(document[start]), [])
        before = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
        pieces.append(at[start:end])
        cuts = _cuts(int(start), int(end), before, until, lowest, width / _WIDTH, costs)
        for low, high in pairwise(cuts):
            kept, partial, masked = _seen(low, high, np.concatenate([before, at[start:low]]), until, lowest)
            segment = Segment(low, high, len(kept), torch.from_numpy(partial) if len(partial) else None, masked)
            if not chains:
                chains.append((kept, [segment]))
                continue
            known, segments = chains[-1]
            shared = min(len(known), len(kept))
            if np.array_equal(known[:shared], kept[:shared]):
                chains[-1] = (max(known, kept, key=len), [*segments, segment])
            else:
                chains.append((kept, [segment]))

    plan = RowPlan(
        tuple(Chain(torch.from_numpy(kept), tuple(segments)) for kept, segments in chains),
        torch.from_numpy(until),
        None if lowest is None else torch.from_numpy(lowest),
    )
    return _with_masks(plan, dtype)


def _with_masks(plan: RowPlan, dtype: torch.dtype) -> RowPlan:
    """The plan with its masks made, if all of them together stay within O(T) memory."""
    elements = sum(
        (s.end - s.start) * (s.end - s.start + (0 if s.partial is None else len(s.partial)))
        for chain in plan.chains
        for s in chain.segments
        if s.masked
    )
    if elements * dtype.itemsize > _MASK_BYTES_PER_TOKEN * len(plan.until):
        return plan
    chains = tuple(
        Chain(
            chain.kept,
            tuple(Segment(s.start, s.end, s.kept, s.partial, s.masked, plan.mask(s, dtype)) for s in chain.segments),
        )
        for chain in plan.chains
    )
    return RowPlan(chains, plan.until, plan.lowest)


def _seen(
    low: int, high: int, before: NDArray[np.int64], until: NDArray[np.int64], lowest: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
    """(keys of `before` that all queries of [low, high) see, those that some see, whether a mask is needed)."""
    floor, ceiling = (0, 0) if lowest is None else (int(lowest[low:high].min()), int(lowest[low:high].max()))
    all_see = (until[before] >= high) & (before >= ceiling)
    some_see = (until[before] > low) & (before >= floor) & ~all_see
    masked = bool(some_see.any()) or ceiling > low or bool((until[low:high] < high).any())
    return before[all_see], before[some_see], masked


def _cuts(
    start: int,
    end: int,
    before: NDArray[np.int64],
    until: NDArray[np.int64],
    lowest: NDArray[np.int64] | None,
    scale: float,
    costs: Costs,
) -> list[int]:
    """Where to cut a document's run [start, end): the cheapest way over all expiries, by dynamic programming."""
    keys = np.concatenate([before, np.arange(start, end)])
    expiries = np.unique(until[keys])
    bounds = [start]
    wanted = expiries[(expiries > start) & (expiries < end)]
    if lowest is not None and (lowest[start:end] > start).any():
        apart = max(_WINDOW_CUT_TOKENS, (end - start) // (_MAX_CUTS // 2))
        wanted = np.union1d(wanted, np.arange(start, end, apart)[1:])
    # Malformed traces may expire a key at every token: thin those out, or planning would cost more than attention.
    apart = max(_MIN_CUT_TOKENS, (end - start) // _MAX_CUTS) if len(wanted) > _MAX_CUTS else 1
    for cut in wanted.tolist():
        if cut - bounds[-1] >= apart:
            bounds.append(cut)
    if len(bounds) == 1:
        return [start, end]
    edges = np.array([*bounds, end])

    # last[k]: the last edge that key k's visibility reaches; a segment [i, j) sees it wholly if last >= j.
    last = np.searchsorted(edges, until[keys], side="right") - 1
    reaching = np.bincount(np.clip(last[: len(before)], 0, None), minlength=len(edges))
    best = np.full(len(edges), np.inf)
    best[0] = 0.0
    came_from = np.zeros(len(edges), np.int64)
    for i in range(len(edges) - 1):
        low = edges[i]
        if i:
            own = last[len(before) + edges[i - 1] - start : len(before) + low - start]
            reaching += np.bincount(np.clip(own, 0, None), minlength=len(edges))
        ends = edges[i + 1 :]
        length = (ends - low).astype(np.float64)
        seen_to = reaching[i + 1 :].cumsum()  # keys gone at or before each end, not counting those gone before `low`
        kept = seen_to[-1] - np.r_[0, seen_to[:-1]]
        partial = seen_to[-1] - kept
        if lowest is not None:
            kept = np.minimum(kept, low - lowest[low])
        hidden = np.minimum.accumulate(until[low:end])[(ends - 1) - low] < ends
        masked = hidden | (partial > 0)
        causal_ns = np.where(masked, costs.masked_causal_pair_ns, costs.causal_pair_ns)
        pairs_ns = length * (length + 1) / 2 * causal_ns + length * kept * costs.pair_ns
        # With partial keys the kernel's causal skipping is lost: the own part costs its full square.
        pairs_ns = np.where(
            partial > 0, length * (length + partial) * costs.masked_pair_ns + length * kept * costs.pair_ns, pairs_ns
        )
        merge_ns = np.where(kept > 0, costs.merge_ns + costs.merge_token_ns * scale * length, 0.0)
        cost = best[i] + pairs_ns * scale + costs.segment_ns + merge_ns
        better = cost < best[i + 1 :]
        best[i + 1 :] = np.where(better, cost, best[i + 1 :])
        came_from[i + 1 :] = np.where(better, i, came_from[i + 1 :])
    cuts = [len(edges) - 1]
    while cuts[-1]:
        cuts.append(int(came_from[cuts[-1]]))
    return [int(edges[i]) for i in reversed(cuts)]


def segments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visibility: Visibility, scale: float) -> torch.Tensor:
    """Attention segment by segment; see this module.

    Raises:
        ValueError: tensors that are not on the CPU.
    """
    if q.device.type != "cpu":
        raise ValueError(f'implementation "segments" runs on the CPU only, the queries are on {q.device}')
    plans = visibility.row_plans(q.shape[1] * q.shape[3], q.dtype)
    return _SegmentAttention.apply(q, k, v, plans, scale)  # pyright: ignore[reportReturnType]


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plans: tuple[RowPlan, ...], scale: float
    ) -> torch.Tensor:
        rows, heads, tokens, width = q.shape
        # [B, T, H, D] in memory, as the kernel and the caller's next transpose have it; the log-sum-exp likewise.
        out = q.new_empty(rows, tokens, heads, width).transpose(1, 2)
        lse_dtype = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_empty(rows, tokens, heads, dtype=lse_dtype).transpose(1, 2)
        for row, plan in enumerate(plans):
            q1, k1, v1, out1, lse1 = (x[row : row + 1] for x in (q, k, v, out, lse))
            for chain in plan.chains:
                k_kept, v_kept = (x.index_select(2, chain.kept) for x in (k1, v1))
                for s in chain.segments:
                    query = q1[:, :, s.start : s.end]
                    mask = plan.mask(s, q.dtype)
                    o, norm = _flash(query, s.own(k1), s.own(v1), 0.0, s.partial is None, attn_mask=mask, scale=scale)
                    if s.kept:
                        kept = k_kept[:, :, : s.kept], v_kept[:, :, : s.kept]
                        o_kept, norm_kept = _flash(query, *kept, 0.0, False, attn_mask=None, scale=scale)
                        o = torch.lerp(o.to(lse_dtype), o_kept.to(lse_dtype), (norm_kept - norm).sigmoid_()[..., None])
                        norm = torch.logaddexp(norm, norm_kept)
                    out1[:, :, s.start : s.end] = o
                    lse1[:, :, s.start : s.end] = norm
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plans, ctx.scale = plans, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for row, plan in enumerate(ctx.plans):
            q1, k1, v1, out1, lse1, grad1, dq1, dk1, dv1 = (
                x[row : row + 1] for x in (q, k, v, out, lse, grad, dq, dk, dv)
            )
            for chain in plan.chains:
                k_kept, v_kept = (x.index_select(2, chain.kept) for x in (k1, v1))
                dk_kept, dv_kept = (torch.zeros_like(x, dtype=lse.dtype) for x in (k_kept, v_kept))
                for s in chain.segments:
                    here = slice(s.start, s.end)
                    query, of_out = q1[:, :, here], (out1[:, :, here], lse1[:, :, here], 0.0)
                    mask = plan.mask(s, q.dtype)
                    causal = s.partial is None
                    dq_own, dk_own, dv_own = _flash_backward(
                        grad1[:, :, here], query, s.own(k1), s.own(v1), *of_out, causal, attn_mask=mask, scale=ctx.scale
                    )
                    for total, part in ((dk1, dk_own), (dv1, dv_own)):
                        # Each position is some segment's own, once, and that segment comes before all that see it.
                        earlier = part.shape[2] - (s.end - s.start)
                        total[:, :, here] = part[:, :, earlier:]
                        if s.partial is not None:
                            total.index_add_(2, s.partial, part[:, :, :earlier])
                    if s.kept:
                        kept = k_kept[:, :, : s.kept], v_kept[:, :, : s.kept]
                        dq_kept, dk_part, dv_part = _flash_backward(
                            grad1[:, :, here], query, *kept, *of_out, False, attn_mask=None, scale=ctx.scale
                        )
                        dq_own = dq_own.add_(dq_kept)
                        dk_kept[:, :, : s.kept] += dk_part
                        dv_kept[:, :, : s.kept] += dv_part
                    dq1[:, :, here] = dq_own
                dk1.index_add_(2, chain.kept, dk_kept.to(k.dtype))
                dv1.index_add_(2, chain.kept, dv_kept.to(v.dtype))
        return dq, dk, dv, None, None
