"""Attention under ``visible_until``: the dense reference, and the faster implementations behind one function.

``dense`` is the definition; ``sdpa`` masks torch's SDPA document by document. The others compute only what is seen:
``segments`` on CPU (`memento.kernels.segments`), ``triton`` on GPU (`memento.kernels.triton_attention`), and ``flex``,
torch's FlexAttention (`memento.kernels.flex`). What they need to know about a batch is derived once, from the
`Visibility` that all layers share. Ours give the same bits in every run; there is no option to set.

The whole mask of a memento trace is one integer per key (MEMENTO, arXiv 2604.09852, section 3; as a column-wise mask
it is that of FlashMask, arXiv 2410.01359)::

    query q sees key k   <=>   lowest_visible[q] <= k <= q < visible_until[k]   and   document[q] == document[k]

All positions are indices into the row (0 .. T-1). A row that packs several documents therefore adds each document's
offset to its ``visible_until``; position ids, which RoPE reads, start again at 0 in each document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from memento.kernels.segments import RowPlan, plan_row, segments
from memento.kernels.tiles import Rule, TileLists, Tiling, key_order

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SEGMENTS_FROM_TOKENS = 384
"""Row length from which ``segments`` is the default on CPU."""


@dataclass(frozen=True, eq=False)
class Visibility:
    """Who sees whom in a batch of rows. Made once a batch; all layers share it, and what is derived from it is cached.

    Attributes:
        visible_until: int64 [B, T], the first query position that no longer sees each key.
        lowest_visible: int64 [B, T], the lowest key position each query sees (sliding windows), or None.
        document: int64 [B, T], ids of packed documents, padding having an id of its own; None if each row is one.
    """

    visible_until: torch.Tensor
    lowest_visible: torch.Tensor | None = None
    document: torch.Tensor | None = None
    _row_plans: dict[tuple[int, torch.dtype], tuple[RowPlan, ...]] = field(default_factory=dict, init=False, repr=False)
    _tile_lists: dict[Tiling, TileLists] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.visible_until.ndim != 2:
            raise ValueError(f"visible_until must be [B, T], got shape {tuple(self.visible_until.shape)}")
        for name in ("visible_until", "lowest_visible", "document"):
            value = getattr(self, name)
            if value is None:
                continue
            if value.is_floating_point() or value.shape != self.visible_until.shape:
                raise ValueError(
                    f"{name} must be an integer tensor of shape {tuple(self.visible_until.shape)}, "
                    f"got {value.dtype} {tuple(value.shape)}"
                )

    @cached_property
    def mask(self) -> torch.Tensor:
        """bool [B, 1, T, T]: True where query (row) sees key (column)."""
        return self._mask(0, self.visible_until.shape[1])

    def row_plans(self, width: int, dtype: torch.dtype) -> tuple[RowPlan, ...]:
        """For each row how `memento.kernels.segments` computes it, for queries of `width` = H * D and that dtype."""
        if (width, dtype) not in self._row_plans:
            until, lowest, document = (
                None if x is None else x.numpy(force=True).astype(np.int64, copy=False)
                for x in (self.visible_until, self.lowest_visible, self.document)
            )
            assert until is not None
            self._row_plans[width, dtype] = tuple(
                plan_row(
                    until[row],
                    None if lowest is None else lowest[row],
                    None if document is None else document[row],
                    width,
                    dtype,
                )
                for row in range(len(until))
            )
        return self._row_plans[width, dtype]

    def tile_lists(self, tiling: Tiling) -> TileLists:
        """Which tiles `memento.kernels.triton_attention` computes at these tile sizes."""
        if tiling not in self._tile_lists:
            self._tile_lists[tiling] = TileLists.of(self.rule, tiling, self.key_order)
        return self._tile_lists[tiling]

    @cached_property
    def rule(self) -> Rule:
        """The same, clamped to the row."""
        return Rule.of(self)

    @cached_property
    def key_order(self) -> torch.Tensor | None:
        """The order of keys in which tiles are full most often, see `memento.kernels.tiles`."""
        return key_order(self.rule)

    @cached_property
    def block_mask(self) -> BlockMask:
        """The same for FlexAttention."""
        from memento.kernels.flex import block_mask

        return block_mask(self.rule)

    @cached_property
    def spans(self) -> list[tuple[int, int]] | None:
        """The documents of a single row as half-open spans, or None where they are not one run of tokens each."""
        if self.document is None or self.visible_until.shape[0] != 1:
            return None
        ids, lengths = torch.unique_consecutive(self.document[0], return_counts=True)
        if len(torch.unique(ids)) != len(ids):
            return None
        ends = lengths.cumsum(0).tolist()
        return list(zip([0, *ends], ends, strict=False))

    @cached_property
    def span_masks(self) -> list[torch.Tensor | None]:
        """For each span a bool mask [1, 1, L, L], or None where the span is plain causal."""
        return [None if self._plain_causal(s, e) else self._mask(s, e) for s, e in self.spans or []]

    @cached_property
    def plain_causal(self) -> bool:
        """Whether every row is one document in which nothing is ever hidden from a later query."""
        return self.document is None and self._plain_causal(0, self.visible_until.shape[1])

    def _plain_causal(self, start: int, end: int) -> bool:
        hidden = (self.visible_until[:, start:end] < end).any()
        return self.lowest_visible is None and not bool(hidden)

    def _mask(self, start: int, end: int) -> torch.Tensor:
        at = torch.arange(start, end, device=self.visible_until.device)
        query, key = at[:, None], at[None, :]
        mask = (key <= query) & (query < self.visible_until[:, None, start:end])
        if self.lowest_visible is not None:
            mask &= self.lowest_visible[:, start:end, None] <= key
        if self.document is not None:
            mask &= self.document[:, start:end, None] == self.document[:, None, start:end]
        # Every query sees at least its own key. Without it a padding token would see nothing, and a softmax over
        # nothing is NaN.
        return (mask | (query == key))[:, None]


def memento_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible_until: torch.Tensor,
    *,
    lowest_visible: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """Causal attention in which a key expires. Differentiable in q, k and v; grouped-query heads are shared.

    Args:
        q: [B, H, T, D].
        k, v: [B, H_kv, T, D], H a multiple of H_kv.
        visible_until: int64 [B, T], see `memento.format.visible_until`; row positions, not document positions.
        lowest_visible: int64 [B, T] or None, the lowest key position each query sees.
        document: int64 [B, T] or None; tokens of different documents do not see each other.
        scale: of the scores, 1 / sqrt(D) by default.
        implementation: "segments" (CPU), "triton" (GPU), "flex" (GPU; on CPU without gradients), "sdpa", or "dense",
            the reference that materialises [B, H, T, T] scores; None for the fastest here, see
            `default_implementation`.

    Returns:
        [B, H, T, D].

    Raises:
        ValueError: shapes that do not fit, or an unknown implementation.
    """
    visibility = Visibility(visible_until, lowest_visible, document)
    return attend(q, k, v, visibility, scale=scale, implementation=implementation)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visibility: Visibility,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """`memento_attention` on a `Visibility` that several layers share.

    ``torch.compile`` leaves it alone: the plan differs from batch to batch, so every batch would be compiled anew.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}")
    if k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q must be [B, H, T, D], k and v [B, H_kv, T, D] with H a multiple of H_kv; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if tuple(visibility.visible_until.shape) != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"visible_until must be [B, T] = {(q.shape[0], q.shape[2])}, "
            f"got {tuple(visibility.visible_until.shape)}. A KV cache is not supported here: pass use_cache=False."
        )
    run = IMPLEMENTATIONS[implementation or default_implementation(q)]
    return _uncompiled(run, q, k, v, visibility, q.shape[-1] ** -0.5 if scale is None else scale)


def _run(run: Callable[..., torch.Tensor], *args: object) -> torch.Tensor:
    return run(*args)


_uncompiled = cast(Callable[..., torch.Tensor], torch.compiler.disable(_run))


def default_implementation(q: torch.Tensor) -> str:
    """The name of the implementation that is fastest for these queries [B, H, T, D].

    On CPU ``segments``, but for rows so short that what it skips does not pay for its calls (measured break-even).
    ``sdpa`` elsewhere: ``triton`` is exact in Triton's interpreter and compiles for sm_80 and sm_90, but it becomes the
    default on GPUs only when its tests (tests/kernels, marked gpu) and benchmarks/attention.py have run on one.
    """
    return "segments" if q.device.type == "cpu" and q.shape[2] >= SEGMENTS_FROM_TOKENS else "sdpa"


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visibility: Visibility, scale: float) -> torch.Tensor:
    """The ten lines that every other implementation must equal. Softmax in fp32 or wider."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * scale
    scores = scores.masked_fill(~visibility.mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return weights @ v


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visibility: Visibility, scale: float) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with a boolean mask, document by document in a packed row.

    A packed row costs the sum of its documents' squares and not the square of their sum, in time and in mask memory.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if visibility.plain_causal:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    if visibility.spans is None or len(visibility.spans) == 1:
        return scaled_dot_product_attention(q, k, v, attn_mask=visibility.mask, scale=scale)
    # split, not slices: its backward is one concatenation, that of n slices is n full-size additions.
    lengths = [end - start for start, end in visibility.spans]
    documents = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), visibility.span_masks, strict=True)
    return torch.cat(
        [
            scaled_dot_product_attention(q1, k1, v1, attn_mask=mask, is_causal=mask is None, scale=scale)
            for q1, k1, v1, mask in documents
        ],
        dim=2,
    )


def triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visibility: Visibility, scale: float) -> torch.Tensor:
    """`memento.kernels.triton_attention`, imported on use: Triton is not on every machine."""
    try:
        from memento.kernels.triton_attention import triton_attention
    except ImportError as error:
        raise ValueError('implementation "triton" needs the package triton, which is not installed here') from error
    return triton_attention(q, k, v, visibility, scale)


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visibility: Visibility, scale: float) -> torch.Tensor:
    """`memento.kernels.flex`, imported on use."""
    from memento.kernels.flex import flex_attention

    return flex_attention(q, k, v, visibility, scale)


IMPLEMENTATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Visibility, float], torch.Tensor]] = {
    "dense": dense,
    "sdpa": sdpa,
    "segments": segments,
    "triton": triton,
    "flex": flex,
}
