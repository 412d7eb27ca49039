"""Memento attention by torch's FlexAttention (arXiv 2412.05496): a `BlockMask` made from tile extremes, once a batch.

FlexAttention's own `create_block_mask` evaluates the rule for every pair, T² of them; the tiles of
`memento.kernels.tiles` need (T / 128)². The kernel it generates is Triton on GPUs, forward and backward, and C++ on
CPUs, forward only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from memento.kernels.tiles import Rule

if TYPE_CHECKING:
    from memento.kernels.attention import Visibility

BLOCK = 128
"""Tile edge, in queries and in keys: FlexAttention's default, and the smallest that its backward always takes."""


def block_mask(rule: Rule) -> BlockMask:
    """The tiles and the rule itself, as FlexAttention takes them: for all heads, [B, 1, T / 128, T / 128] tiles."""
    visible, full = rule.tiles(BLOCK, BLOCK)
    tokens = rule.until.shape[1]
    return BlockMask.from_kv_blocks(
        *_listed(visible & ~full),
        *_listed(full),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_mask_mod(rule),
        seq_lengths=(tokens, tokens),
    )


def flex_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visibility: Visibility, scale: float
) -> torch.Tensor:
    """FlexAttention under the rule of `visibility`; grouped heads are shared. Compiled on first use.

    Raises:
        ValueError: gradients are wanted on the CPU, where FlexAttention has none.
    """
    if q.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise ValueError(
                'implementation "flex" has no backward pass on the CPU; leave the implementation out there'
            )
        q, k, v = (x.detach() for x in (q, k, v))  # it refuses leaves that require gradients even where none are taken
    attend, grouped = compiled(q.device.type), q.shape[1] != k.shape[1]
    return attend(q, k, v, block_mask=visibility.block_mask, scale=scale, enable_gqa=grouped)


@cache
def compiled(device_type: str) -> Callable[..., torch.Tensor]:
    """FlexAttention's generated kernel; without compilation it would materialise all scores.

    On the CPU each shape is compiled for itself: where a size is a variable, torch 2.13 generates C++ that does not
    compile ("cur_qSplitSize8 was not declared").
    """
    return torch.compile(torch_flex_attention, dynamic=False if device_type == "cpu" else None)


def _listed(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [B, n, m] -> how many in each row, int32 [B, 1, n], and which, those first, int32 [B, 1, n, m]."""
    which = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None], which.int()[:, None]


def _mask_mod(rule: Rule) -> Callable[[Any, Any, Any, Any], Any]:
    until, lowest, document = rule.until, rule.lowest, rule.document

    def seen(row: Any, _head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (query < until[row, key])

    def seen_from(row: Any, head: Any, query: Any, key: Any) -> Any:
        assert lowest is not None
        return seen(row, head, query, key) & (lowest[row, query] <= key)

    bounded = seen if lowest is None else seen_from

    def seen_within(row: Any, head: Any, query: Any, key: Any) -> Any:
        assert document is not None
        return bounded(row, head, query, key) & (document[row, query] == document[row, key])

    return bounded if document is None else seen_within
