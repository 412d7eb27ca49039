"""The memento format: which tokens open and close a block, and what every later token may still see.

A trace is written in blocks, and each block is closed with a short memento::

    <|block_start|> reasoning <|block_end|> <|summary_start|> memento <|summary_end|>

When a memento is complete, its block leaves the KV cache; the memento's own KV, computed while the block was
still visible, stays. All of it is one integer per token (MEMENTO, arXiv 2604.09852, section 3)::

    visible_until[k]  =  the first query position that no longer sees key k  (NEVER if none)
    query q sees key k   <=>   k <= q < visible_until[k]

A worked example, ``keep_last_n=0``, delimiters kept (B E S Z are the four delimiters)::

    position        0  1  2  3  4  5  6  7  8
    token           p  B  x  y  E  S  m  Z  a
    visible_until   -  -  8  8  -  -  -  -  -        (- is NEVER)
    resident        1  2  3  4  5  6  7  8  7        x and y leave before position 8 is computed

The query of ``<|summary_end|>`` itself (position 7) still sees the block, the next token does not. This module is
the only place where that rule is written: the attention masks of training, the engine's scheduler, the metrics and
the viewer all read it from here. It imports numpy and nothing heavier.

**Malformed traces** have one meaning. A block is evicted if and only if its four delimiters arrive in order:

* ``<|block_start|>`` always opens a block. A block or memento that was still open is abandoned: it stays visible.
* ``<|block_end|>`` without an open block, ``<|summary_start|>`` without a closed one and ``<|summary_end|>`` without
  an open memento are plain tokens. Each is counted as an anomaly.
* Text between ``<|block_end|>`` and ``<|summary_start|>`` is plain text and stays visible.
* A trace cut off anywhere simply lacks the eviction that had not happened yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from memento.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

NEVER: int = 2**62
"""``visible_until`` of a key that is never evicted: larger than any position, and still far from int64 overflow."""

BLOCK_START, BLOCK_END = "<|block_start|>", "<|block_end|>"
SUMMARY_START, SUMMARY_END = "<|summary_start|>", "<|summary_end|>"
DELIMITERS: tuple[str, str, str, str] = (BLOCK_START, BLOCK_END, SUMMARY_START, SUMMARY_END)
"""The four added tokens, in the order in which a well-formed block uses them."""


class FormatError(UserError, ValueError):
    """The tokenizer or the configuration cannot express the memento format. The message names the token or key."""


class _Tokenizer(Protocol):
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...

    @property
    def unk_token_id(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class MementoFormat:
    """The ids of the four delimiters and the three choices that fill ``visible_until``.

    Attributes:
        block_start, block_end, summary_start, summary_end: token ids.
        evict_delimiters: also evict a block's own ``<|block_start|>`` and ``<|block_end|>``. It has no default because
            it is a property of the trained model (Qwen3 and Olmo 3: False, Phi: True).
        keep_last_n: how many of the last completed blocks stay visible. 0 is the method, -1 never evicts.
        max_block_tokens: the block cap: a block with this many content tokens is closed by force. None for no cap.
    """

    block_start: int
    block_end: int
    summary_start: int
    summary_end: int
    evict_delimiters: bool
    keep_last_n: int = 0
    max_block_tokens: int | None = None

    def __post_init__(self) -> None:
        if len(set(self.delimiter_ids)) != 4 or min(self.delimiter_ids) < 0:
            named = dict(zip(DELIMITERS, self.delimiter_ids, strict=True))
            raise FormatError(f"the four delimiters need four different token ids, got {named}")
        if self.keep_last_n < -1:
            raise FormatError(f"keep_last_n must be -1 (never evict), 0 or more, got {self.keep_last_n}")
        if self.max_block_tokens is not None and self.max_block_tokens < 1:
            raise FormatError(f"max_block_tokens must be at least 1 or null, got {self.max_block_tokens}")

    @property
    def delimiter_ids(self) -> tuple[int, int, int, int]:
        """The four ids in the order of `DELIMITERS`."""
        return (self.block_start, self.block_end, self.summary_start, self.summary_end)

    @property
    def evicts(self) -> bool:
        """Whether this format ever evicts anything."""
        return self.keep_last_n >= 0

    def without_eviction(self) -> MementoFormat:
        """The same tokens with nothing evicted: plain causal attention."""
        return replace(self, keep_last_n=-1)

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: _Tokenizer,
        *,
        evict_delimiters: bool,
        keep_last_n: int = 0,
        max_block_tokens: int | None = None,
    ) -> MementoFormat:
        """Look the four delimiters up in a Hugging Face tokenizer.

        Raises:
            FormatError: naming each delimiter that the tokenizer does not hold as one token.
        """
        ids = [tokenizer.convert_tokens_to_ids(token) for token in DELIMITERS]
        unknown = tokenizer.unk_token_id
        missing = [t for t, i in zip(DELIMITERS, ids, strict=True) if i is None or i == unknown]
        if missing:
            raise FormatError(
                f"the tokenizer has no token {', '.join(missing)}. Start from a model that went through `memento sft` "
                "(it adds the four tokens), or add them to the tokenizer as special tokens."
            )
        return cls(
            *(int(i) for i in ids if i is not None),
            evict_delimiters=evict_delimiters,
            keep_last_n=keep_last_n,
            max_block_tokens=max_block_tokens,
        )


class Eviction(NamedTuple):
    """Before position ``boundary`` is computed, the KV of positions ``[start, end)`` leaves the cache."""

    boundary: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Block:
    """One complete block and its memento, as half-open spans of content tokens (delimiters excluded).

    ``<|block_start|>`` sits at ``start - 1``, ``<|block_end|>`` at ``end``, ``<|summary_start|>`` at
    ``memento_start - 1`` and ``<|summary_end|>`` at ``memento_end``.
    """

    start: int
    end: int
    memento_start: int
    memento_end: int

    @property
    def block_tokens(self) -> int:
        """Content tokens of the block."""
        return self.end - self.start

    @property
    def memento_tokens(self) -> int:
        """Content tokens of the memento."""
        return self.memento_end - self.memento_start


@dataclass(slots=True)
class BlockScanner:
    """Reads a trace token by token and says when a block must be evicted. The one state machine of this project.

    >>> fmt = MementoFormat(1, 2, 3, 4, evict_delimiters=False)
    >>> scanner = BlockScanner(fmt)
    >>> [e for p, t in enumerate([9, 1, 7, 7, 2, 3, 8, 4, 9]) if (e := scanner.feed(p, t))]
    [Eviction(boundary=8, start=2, end=4)]

    Attributes:
        blocks: the complete blocks so far, in order.
        block_start: content start of the block that is open now, else None.
        anomalies: delimiters that came out of order, and blocks or mementos abandoned by a new ``<|block_start|>``.
    """

    fmt: MementoFormat
    blocks: list[Block] = field(default_factory=list)
    block_start: int | None = None
    anomalies: int = 0
    _closed: tuple[int, int] | None = None  # a block's span, waiting for its memento
    _memento_start: int | None = None

    @property
    def unfinished(self) -> bool:
        """Whether a block or its memento is still being written."""
        return self.block_start is not None or self._closed is not None

    def feed(self, position: int, token_id: int) -> Eviction | None:
        """Take the token at `position`; return the eviction that its completion triggers, if any.

        Tokens that are no delimiter change nothing and may be skipped.
        """
        fmt = self.fmt
        if token_id == fmt.block_start:
            if self.unfinished:
                self.anomalies += 1
            self.block_start, self._closed, self._memento_start = position + 1, None, None
        elif token_id == fmt.block_end:
            if self.block_start is None:
                self.anomalies += 1
            else:
                self._closed, self.block_start = (self.block_start, position), None
        elif token_id == fmt.summary_start:
            if self._closed is None or self._memento_start is not None:
                self.anomalies += 1
            else:
                self._memento_start = position + 1
        elif token_id == fmt.summary_end:
            if self._closed is None or self._memento_start is None:
                self.anomalies += 1
            else:
                self.blocks.append(Block(*self._closed, self._memento_start, position))
                self._closed, self._memento_start = None, None
                return self._eviction_at(position + 1)
        return None

    def _eviction_at(self, boundary: int) -> Eviction | None:
        index = len(self.blocks) - 1 - self.fmt.keep_last_n
        if not self.fmt.evicts or index < 0:
            return None
        block, margin = self.blocks[index], int(self.fmt.evict_delimiters)
        start, end = block.start - margin, block.end + margin
        return Eviction(boundary, start, end) if start < end else None


@dataclass(frozen=True, slots=True)
class Trace:
    """What a whole trace holds: its complete blocks, the evictions they cause, and what was malformed."""

    blocks: tuple[Block, ...]
    evictions: tuple[Eviction, ...]
    open_block: int | None
    """Content start of a block that was opened and never closed, else None."""
    unfinished: bool
    """Whether the trace ends inside a block, or before the memento of its last block is complete."""
    anomalies: int

    @property
    def well_formed(self) -> bool:
        """No delimiter out of order and nothing left open."""
        return self.anomalies == 0 and not self.unfinished


def parse(token_ids: Sequence[int] | NDArray[np.integer], fmt: MementoFormat, prompt_len: int = 0) -> Trace:
    """Read a whole trace.

    Args:
        token_ids: [T] token ids, prompt and completion.
        fmt: the delimiters and what they evict.
        prompt_len: the first ``prompt_len`` tokens are a prompt: always visible, and not searched for delimiters.

    Raises:
        ValueError: for ids that are not one-dimensional, or a ``prompt_len`` outside ``[0, T]``.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.ndim != 1:
        raise ValueError(f"token_ids must be one-dimensional [T], got shape {ids.shape}")
    if not 0 <= prompt_len <= len(ids):
        raise ValueError(f"prompt_len must be between 0 and the {len(ids)} tokens of the trace, got {prompt_len}")
    scanner = BlockScanner(fmt)
    events: list[Eviction] = []
    # Only the delimiters move the state machine, so a trace of 32 K tokens costs a few hundred Python steps.
    for position in np.flatnonzero(np.isin(ids[prompt_len:], fmt.delimiter_ids)) + prompt_len:
        event = scanner.feed(int(position), int(ids[position]))
        if event is not None:
            events.append(event)
    return Trace(tuple(scanner.blocks), tuple(events), scanner.block_start, scanner.unfinished, scanner.anomalies)


def evictions(
    token_ids: Sequence[int] | NDArray[np.integer], fmt: MementoFormat, prompt_len: int = 0
) -> list[tuple[int, int, int]]:
    """All evictions of a trace as ``(boundary, start, end)``, boundaries strictly increasing.

    An eviction whose boundary is ``T`` (the trace ends with ``<|summary_end|>``) is included: it happens as soon as
    one more token is computed. Arguments and errors as for `parse`.
    """
    return list(parse(token_ids, fmt, prompt_len).evictions)


def visible_until(
    token_ids: Sequence[int] | NDArray[np.integer], fmt: MementoFormat, prompt_len: int = 0
) -> NDArray[np.int64]:
    """For each key, the first query position that no longer sees it (`NEVER` if there is none).

    Returns:
        int64 [T]. Arguments and errors as for `parse`. Source: arXiv 2604.09852, section 3; the column-wise form of
        the mask is that of FlashMask, arXiv 2410.01359.
    """
    limits = np.full(len(token_ids), NEVER, dtype=np.int64)
    for boundary, start, end in parse(token_ids, fmt, prompt_len).evictions:
        limits[start:end] = boundary
    return limits


def lowest_visible(limits: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """For each query, the lowest key it sees in a layer whose window holds the last `window` *resident* keys.

    The distance counts what is in the cache: evicted keys leave no hole, because the engine moves the keys behind them
    down. Without evictions this is the usual window, ``max(0, q - window + 1)``.

    >>> limits = visible_until([9, 1, 7, 7, 2, 3, 8, 4, 9], MementoFormat(1, 2, 3, 4, evict_delimiters=False))
    >>> lowest_visible(limits, 6).tolist()  # position 8 no longer sees 2 and 3: its window reaches down to 1
    [0, 0, 0, 0, 0, 0, 1, 2, 1]

    Args:
        limits: int64 [T], `visible_until` of one document.
        window: keys that a query sees at most, itself included.

    Returns:
        int64 [T]: query q sees key k in such a layer if ``lowest_visible[q] <= k <= q < visible_until[k]``.
    """
    if window < 1:
        raise ValueError(f"a window holds at least 1 key, got {window}")
    length = len(limits)
    lowest = np.empty(length, dtype=np.int64)
    boundaries = np.unique(limits[limits < length])
    for start, end in pairwise([0, *boundaries.tolist(), length]):
        # Between two boundaries nothing expires: what is visible at `start` stays, and every query adds itself.
        visible = np.concatenate([np.flatnonzero(limits[:start] > start), np.arange(start, end)])
        own = np.arange(len(visible) - (end - start), len(visible))
        lowest[start:end] = visible[np.maximum(own - window + 1, 0)]
    return lowest


class KVProfile(NamedTuple):
    """How many tokens are resident in the KV cache over a trace (see `kv_profile`)."""

    resident_T: NDArray[np.int64]
    """[T] keys that the query at each position sees, itself included."""
    peak_tokens: int
    """The largest of them."""
    area: int
    """KV-AUC: the sum over the generated tokens (positions from ``prompt_len`` on)."""


def kv_profile(token_ids: Sequence[int] | NDArray[np.integer], fmt: MementoFormat, prompt_len: int = 0) -> KVProfile:
    """The KV sawtooth of a trace, its peak and its area, in tokens.

    Multiply by the KV bytes of one token (2 x layers x KV heads x head size x bytes per value) for memory. Arguments
    and errors as for `parse`; with ``fmt.without_eviction()`` the result is that of the same tokens in a plain cache.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    resident = np.arange(1, len(ids) + 1, dtype=np.int64)
    for boundary, start, end in parse(ids, fmt, prompt_len).evictions:
        resident[boundary:] -= end - start
    peak = int(resident.max()) if len(resident) else 0
    return KVProfile(resident, peak, int(resident[prompt_len:].sum()))
