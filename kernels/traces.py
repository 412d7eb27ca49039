"""`Visibility` from token ids, on the device that holds them: the rule of `memento.format` without a loop over tokens.

`memento.format` reads a trace with a state machine, token by token. Here the same rule is a handful of scans over all
rows at once. Between one ``<|block_start|>`` and the next (or the document's end) at most one block can complete, and
it does with the first ``<|block_end|>``, the first ``<|summary_start|>`` after that and the first ``<|summary_end|>``
after that: everything else is a plain token or an anomaly. Nothing is read back from the device.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from memento.format import NEVER, MementoFormat
from memento.kernels.attention import Visibility
from memento.kernels.tiles import runs


def trace_visibility(
    token_ids: torch.Tensor,
    fmt: MementoFormat,
    *,
    document: torch.Tensor | None = None,
    prompt: torch.Tensor | None = None,
    window: int | None = None,
) -> Visibility:
    """What `memento.format.visible_until` says about every document of packed rows, in row positions.

    Args:
        token_ids: integer [B, T].
        fmt: the delimiters and what they evict.
        document: int64 [B, T], ids of packed documents, one run of tokens each; None if each row is one.
        prompt: bool [B, T], True at prompt tokens: always visible, and not searched for delimiters.
        window: sliding windows of this many tokens, counted among the keys that are still in the cache, as an engine
            counts them that has really dropped the others; None for full attention.

    Returns:
        `Visibility` with ``visible_until`` (`NEVER` where nothing evicts a key), ``lowest_visible`` if there is a
        window, and `document` as given.

    Raises:
        ValueError: shapes that do not fit, or a window below 1.
    """
    if token_ids.ndim != 2:
        raise ValueError(f"token_ids must be [B, T], got shape {tuple(token_ids.shape)}")
    for name, value in (("document", document), ("prompt", prompt)):
        if value is not None and value.shape != token_ids.shape:
            raise ValueError(f"{name} must be of shape {tuple(token_ids.shape)}, got {tuple(value.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    tokens = token_ids.shape[1]
    at = torch.arange(tokens, device=token_ids.device).expand(token_ids.shape)
    run, ends = (torch.zeros_like(at), torch.full_like(at, tokens)) if document is None else runs(document)
    start, end, boundary = _evictions(token_ids, fmt, at, run, ends, prompt)
    # Spans of different blocks never overlap, so a step up at each start and down at each end spells them out.
    steps = torch.zeros(len(at), tokens + 1, dtype=torch.int64, device=at.device)
    steps.scatter_add_(1, start, boundary).scatter_add_(1, end, -boundary)
    evicted_at = steps.cumsum(1)[:, :tokens]
    until = torch.where(evicted_at > 0, evicted_at, NEVER)
    if window is None:
        return Visibility(until, None, document)
    return Visibility(until, _lowest(at, run, start, end, boundary, window), document)


def _evictions(
    token_ids: torch.Tensor,
    fmt: MementoFormat,
    at: torch.Tensor,
    run: torch.Tensor,
    ends: torch.Tensor,
    prompt: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(start, end, boundary), int64 [B, T] each: the i-th block of a row that completes, and when it is evicted.

    Blocks that are not evicted within their row, and the columns without a block, have an empty span at T; boundary is
    T there.
    """
    tokens = at.shape[1]
    searched = torch.ones_like(at, dtype=torch.bool) if prompt is None else ~prompt

    def upcoming(token: int) -> torch.Tensor:
        """[B, T + 2]: the first position at or after each where this delimiter stands, T if there is none."""
        found = torch.where((token_ids == token) & searched, at, tokens)
        return pad(found.flip(1).cummin(1).values.flip(1) if tokens else found, (0, 2), value=tokens)

    starts = upcoming(fmt.block_start)
    # In turn the first of each, the search starting behind the one before; T once there is none.
    block_end = upcoming(fmt.block_end)[:, 1 : tokens + 1]
    summary_start = upcoming(fmt.summary_start).gather(1, block_end + 1)
    summary_end = upcoming(fmt.summary_end).gather(1, summary_start + 1)
    limit = torch.minimum(starts[:, 1 : tokens + 1], ends)
    complete = (starts[:, :tokens] == at) & (summary_end < limit)

    # Compress to one column a block; the spare last column takes what is not a block.
    index = torch.where(complete, complete.cumsum(1) - 1, tokens)
    spare = torch.full((len(at), tokens + 1), tokens, dtype=torch.int64, device=at.device)
    margin = int(fmt.evict_delimiters)
    start = spare.scatter(1, index, at + 1 - margin)[:, :tokens]
    end = spare.scatter(1, index, block_end + margin)[:, :tokens]
    boundary = spare.scatter(1, index, summary_end + 1)[:, :tokens]
    of_run = (spare * 0 - 1).scatter(1, index, run)[:, :tokens]
    if fmt.keep_last_n:
        # Block i leaves when block i + keep_last_n of the same document completes; with -1 never.
        later = fmt.keep_last_n if fmt.evicts else tokens
        ahead = min(later, tokens)
        boundary = pad(boundary[:, ahead:], (0, ahead), value=tokens)
        same = pad(of_run[:, ahead:], (0, ahead), value=-1) == of_run
    else:
        same = of_run >= 0
    evicted = same & (of_run >= 0) & (start < end)
    none = torch.full_like(at, tokens)
    return torch.where(evicted, start, none), torch.where(evicted, end, none), torch.where(evicted, boundary, none)


def _lowest(
    at: torch.Tensor, run: torch.Tensor, start: torch.Tensor, end: torch.Tensor, boundary: torch.Tensor, window: int
) -> torch.Tensor:
    """int64 [B, T]: the lowest key among the last `window` visible ones of each query.

    Evictions of a row have ascending spans and ascending boundaries, so the keys that are gone at a query are the first
    n spans. Physical positions count the keys that are left; a span's own is the same at every query that follows it.
    """
    tokens = at.shape[1]
    # Empty columns may lie between: push them to the end, in order.
    order = (start == tokens).int().argsort(dim=1, stable=True)
    start, end, boundary = (x.gather(1, order) for x in (start, end, boundary))
    gone = pad((end - start).cumsum(1), (1, 0))  # [B, T + 1]: tokens in the first n spans
    boundary = torch.where(start == tokens, tokens + 1, boundary)
    carried_out = torch.searchsorted(boundary, at.contiguous(), right=True)  # spans gone at each query
    first = torch.zeros_like(at).scatter_reduce_(1, run, at, "amin", include_self=False).gather(1, run)
    before_first = torch.searchsorted(boundary, first.contiguous(), right=True)
    # No span of an earlier document may be counted as late: all of them are gone where the next document begins.
    lowest = torch.maximum(at - gone.gather(1, carried_out) - (window - 1), first - gone.gather(1, before_first))
    physical_start = torch.where(start == tokens, 2 * tokens + 1, start - gone[:, :-1])
    spans_below = torch.searchsorted(physical_start, lowest, right=True)
    return lowest + gone.gather(1, torch.minimum(spans_below, carried_out))
