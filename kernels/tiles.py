"""Which tiles of the score matrix are computed, found by comparing extremes once a batch.

The scores of a row are a grid of tiles of queries and keys. From the smallest and largest ``visible_until`` of a tile's
keys and the positions on its edges follows, without looking at pairs, that a tile is

* invisible: no query of it sees a key of it. It is on no list, so it is neither loaded nor computed;
* full: every query sees every key. No mask arithmetic;
* partial: anything between; the rule is evaluated pair by pair.

Mementos are short and lie anywhere, so in the order of the row most tiles that hold one also hold keys of its
neighbours. Attention does not depend on the order of keys: with `key_order` the keys that stay come first, the keys of
blocks after them, and nearly every visible tile is full::

    row order     prompt | block 1 | m1 | block 2 | m2 | block 3 | m3
    key slots     prompt   m1   m2   m3 | block 1 | block 2 | block 3

`memento.kernels.triton_attention` and `memento.kernels.flex` read this; it is plain torch on any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from memento.kernels.attention import Visibility


class Tiling(NamedTuple):
    """Tile sizes in queries and keys, and Triton's warps and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, eq=False)
class Rule:
    """A `Visibility` whose values are clamped to the row, and in which contiguous documents are expiries.

    Attributes:
        until: int64 [B, T], within [key + 1, T].
        lowest: int64 [B, T], within [0, query], or None.
        document: int64 [B, T] numbered from 0, where some document is not one run of tokens; else None.
        ends: int64 [B, T], one past the last token of each key's document (T where `document` is not None).
    """

    until: torch.Tensor
    lowest: torch.Tensor | None
    document: torch.Tensor | None
    ends: torch.Tensor

    @classmethod
    def of(cls, visibility: Visibility) -> Rule:
        """Clamp and fold. Reads one flag back from the device if there are documents."""
        tokens = visibility.visible_until.shape[1]
        at = torch.arange(tokens, device=visibility.visible_until.device)
        until = torch.maximum(visibility.visible_until, at + 1).clamp(max=tokens)
        lowest = visibility.lowest_visible
        lowest = None if lowest is None else torch.minimum(lowest.clamp(min=0), at)
        ends, document = torch.full_like(until, tokens), visibility.document
        if document is not None:
            run, run_ends = runs(document)
            ids = document.sort(-1).values
            distinct = (ids[:, 1:] != ids[:, :-1]).sum(-1)
            if bool((distinct == run[:, -1:].sum(-1)).all()):
                until, ends, document = torch.minimum(until, run_ends), run_ends, None
            else:
                document = torch.unique(document, return_inverse=True)[1]
        return cls(until, lowest, document, ends)

    def tiles(self, queries: int, keys: int, position: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tiles of `queries` by `keys` are (visible at all, seen in full): bool [B, T / queries, T / keys].

        Visible errs on the side of yes, full on the side of no.

        Args:
            position: int64 [B, T], the row position of the key in each slot, see `key_order`; None for row order.
        """
        tokens = self.until.shape[1]
        at = torch.arange(tokens, device=self.until.device).expand_as(self.until)
        by_slot = at if position is None else position

        def tiled(x: torch.Tensor, size: int, fill: int) -> torch.Tensor:
            return pad(x, (0, -tokens % size), value=fill).unflatten(-1, (-1, size))

        first_query = torch.arange(0, tokens, queries, device=self.until.device)[:, None]
        last_query = (first_query + queries).clamp(max=tokens) - 1
        first_key = tiled(by_slot, keys, tokens).amin(-1)[:, None]
        last_key = tiled(by_slot, keys, 0).amax(-1)[:, None]
        until = tiled(self.until.gather(1, by_slot), keys, 0)  # slots beyond the row: never visible, so never full
        visible = (first_key <= last_query) & (until.amax(-1)[:, None] > first_query)
        full = (last_key <= first_query) & (until.amin(-1)[:, None] > last_query)
        if self.lowest is not None:
            visible &= tiled(self.lowest, queries, tokens).amin(-1)[..., None] <= last_key
            full &= tiled(self.lowest, queries, 0).amax(-1)[..., None] <= first_key
        if self.document is not None:
            of_query, of_key = tiled(self.document, queries, -1), tiled(self.document.gather(1, by_slot), keys, -1)
            low, high = of_query.amin(-1)[..., None], of_query.amax(-1)[..., None]
            full &= (low == high) & (of_key.amin(-1)[:, None] == low) & (of_key.amax(-1)[:, None] == low)
        return visible, full


def runs(document: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs of equal ids: (number of the run, one past its last token), int64 [B, T] each."""
    at = torch.arange(document.shape[1], device=document.device).expand_as(document)
    run = pad((document[:, 1:] != document[:, :-1]).long(), (1, 0)).cumsum(-1)[:, : document.shape[1]]
    ends = torch.zeros_like(run).scatter_reduce_(1, run, at + 1, "amax").gather(1, run)
    return run, ends


def key_order(rule: Rule) -> torch.Tensor | None:
    """The row position of the key in each slot, int64 [B, T]: keys that stay first, then those that are evicted.

    None where row order is as good: nothing is evicted, or windows make near keys the visible ones. Reads one flag
    back from the device.
    """
    evicted = rule.until < rule.ends
    if rule.lowest is not None or not bool(evicted.any()):
        return None
    return evicted.int().argsort(dim=-1, stable=True)


class TileList(NamedTuple):
    """For n tiles of one kind the tiles of the other kind that concern them, in compressed rows.

    Attributes:
        bounds: int32 [B * n, 2, 2]. Of tile i the full ones are ``tiles[low:high]`` with ``low, high = bounds[i, 0]``,
            the partial ones with ``bounds[i, 1]``. Every low is the high before it, but a kernel must not know: where
            its two loops share a bound, ptxas (CUDA 13, sm_90a) serializes the tensor cores' asynchronous products.
        tiles: int32, ascending within each of the two.
    """

    bounds: torch.Tensor
    tiles: torch.Tensor

    @classmethod
    def of(cls, full: torch.Tensor, partial: torch.Tensor) -> TileList:
        """From bool [B, n, m] each."""
        wanted = torch.stack([full, partial], dim=2)  # [B, n, 2, m]
        counts = wanted.sum(-1, dtype=torch.int32).flatten()
        highs = counts.cumsum(0, dtype=torch.int32)
        return cls(torch.stack([highs - counts, highs], -1).view(-1, 2, 2), wanted.nonzero()[:, 3].int())


@dataclass(frozen=True, eq=False)
class TileLists:
    """Which tiles are computed and which of them need a mask; and the vectors the masks are made from.

    Attributes:
        of_queries: for each query tile its key tiles.
        of_keys: for each key tile its query tiles.
        position: int32 [B, T], the row position of the key in each slot; None where slots are positions.
        until, lowest, document: int32 [B, T] by row position, see `Rule`.
    """

    tiling: Tiling
    of_queries: TileList
    of_keys: TileList
    position: torch.Tensor | None
    until: torch.Tensor
    lowest: torch.Tensor | None
    document: torch.Tensor | None

    @classmethod
    def of(cls, rule: Rule, tiling: Tiling, position: torch.Tensor | None = None) -> TileLists:
        """All lists, from [B, T / queries, T / keys] booleans."""
        visible, full = rule.tiles(tiling.queries, tiling.keys, position)
        partial = visible & ~full
        return cls(
            tiling,
            TileList.of(full, partial),
            TileList.of(full.transpose(1, 2), partial.transpose(1, 2)),
            None if position is None else position.int(),
            rule.until.int(),
            None if rule.lowest is None else rule.lowest.int(),
            None if rule.document is None else rule.document.int(),
        )
