"""What one request evicts and when: a function of its token ids and nothing else.

The engine keeps logical positions everywhere (RoPE, stop checks, sampling). The plan says which logical span
``[start, end)`` leaves the cache before position ``boundary`` is computed; physical tokens are logical tokens minus
evicted ones::

    logical    p B x y E S m Z | a        boundary = 8, start = 2, end = 4
    physical   0 1 2 3 4 5 6 7 |          before
    physical   0 1     2 3 4 5 | 6        after: E S m Z moved down by 2, `a` is written behind them

Because it depends on the token ids alone, a preempted request that is computed again from position 0 evicts at the same
boundaries, and its mementos are encoded exactly as the first time. This module imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from memento.errors import UserError
from memento.format import NEVER, BlockScanner, Eviction, MementoFormat

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONTROL_KEY = "memento"
"""The key of ``SamplingParams.extra_args`` that holds a request's own settings, and of the dictionary that brings the
statistics back."""


class ControlError(UserError, ValueError):
    """``SamplingParams.extra_args["memento"]`` is malformed. The message names the key."""


class EvictionFault(RuntimeError):
    """An invariant of the eviction broke. Log-probs from here on could be wrong, so nothing catches this."""


@dataclass(frozen=True, slots=True)
class RequestControl:
    """What one request may choose, from ``SamplingParams.extra_args["memento"]``.

    Attributes:
        fmt: the engine's format with this request's ``keep_last_n`` and ``max_block_tokens``; ``evict=False`` makes it
            a format that never evicts (the block cap stays).
        prompt_len: the first ``prompt_len`` prompt tokens are always visible and not searched for delimiters. The
            default 0 reads the whole prompt; give the prompt's length where a user's text may spell a delimiter.
        scan_prompt: False reads nothing of the prompt, for callers that do not count tokens.
    """

    fmt: MementoFormat
    prompt_len: int = 0
    scan_prompt: bool = True

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None, fmt: MementoFormat) -> RequestControl:
        """Read and check a request's settings.

        ``{"memento": {"keep_last_n": 1}}`` and ``{"memento_keep_last_n": 1}`` mean the same; the second form is for
        ``vllm_xargs`` of the OpenAI API, which holds plain values only.

        Args:
            extra_args: ``SamplingParams.extra_args``; other keys are none of our business.
            fmt: the engine's format, which fills what the request leaves out.

        Raises:
            ControlError: for an unknown key or a value of the wrong type or range.
        """
        settings = _settings(extra_args or {})
        if not settings:
            return cls(fmt)
        unknown = sorted(str(key) for key in settings if key not in _KEYS)
        if unknown:
            raise ControlError(
                f'extra_args["{CONTROL_KEY}"] has no key {", ".join(unknown)}; the keys are {", ".join(_KEYS)}'
            )
        keep_last_n = _integer(settings, "keep_last_n", fmt.keep_last_n, lowest=-1)
        cap = settings.get("max_block_tokens", fmt.max_block_tokens)
        max_block_tokens = None if cap is None else _integer(settings, "max_block_tokens", cap, lowest=1)
        prompt_len = _integer(settings, "prompt_len", 0, lowest=0)
        scan_prompt = _truth(settings, "scan_prompt")
        if prompt_len and not scan_prompt:
            raise ControlError(f'extra_args["{CONTROL_KEY}"]: give prompt_len or scan_prompt=false, not both')
        fmt = replace(fmt, keep_last_n=keep_last_n, max_block_tokens=max_block_tokens)
        return cls(fmt if _truth(settings, "evict") else fmt.without_eviction(), prompt_len, scan_prompt)

    def unscanned(self, num_prompt_tokens: int) -> int:
        """How many tokens from the front are not searched for delimiters.

        Raises:
            ControlError: if `prompt_len` exceeds the prompt.
        """
        if self.prompt_len > num_prompt_tokens:
            raise ControlError(
                f'extra_args["{CONTROL_KEY}"]["prompt_len"] is {self.prompt_len}, '
                f"but the prompt has only {num_prompt_tokens} tokens"
            )
        return self.prompt_len if self.scan_prompt else num_prompt_tokens


_KEYS = ("evict", "keep_last_n", "max_block_tokens", "prompt_len", "scan_prompt")


def _settings(extra_args: Mapping[str, Any]) -> dict[str, Any]:
    nested = extra_args.get(CONTROL_KEY)
    if nested is not None and not isinstance(nested, Mapping):
        raise ControlError(f'extra_args["{CONTROL_KEY}"] must be a dictionary, got {nested!r}')
    prefix = f"{CONTROL_KEY}_"
    flat = {key.removeprefix(prefix): value for key, value in extra_args.items() if str(key).startswith(prefix)}
    twice = sorted(set(flat) & set(nested or {}))
    if twice:
        raise ControlError(f'{", ".join(twice)} is both in extra_args["{CONTROL_KEY}"] and as "{prefix}{twice[0]}"')
    return {**(nested or {}), **flat}


def _truth(settings: Mapping[str, Any], key: str) -> bool:
    value = settings.get(key, True)
    # 0 and 1, because vllm_xargs has no booleans.
    if not (isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))):
        raise ControlError(f'extra_args["{CONTROL_KEY}"]["{key}"] must be true or false, got {value!r}')
    return bool(value)


def _integer(settings: Mapping[str, Any], key: str, default: int, lowest: int) -> int:
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ControlError(
            f'extra_args["{CONTROL_KEY}"]["{key}"] must be an integer of at least {lowest}, got {value!r}'
        )
    return value


@dataclass(slots=True)
class EvictionPlan:
    """The evictions of one request, found as its tokens arrive and carried out as they become due.

    `observe` reads tokens (once each, whatever is recomputed); `due`, `advance` and `reset` follow the computation, and
    `reset` forgets what was carried out because a preempted request starts again with an empty cache.

    Attributes:
        control: the request's settings.
        num_prompt_tokens: T_p; positions below it were not generated.
        max_tokens: the most tokens it may generate.
        events: the evictions known so far, boundaries strictly increasing.
        first_evictable: the first position that may ever be evicted (`NEVER` while no block was opened). Pages that end
            at or before it are the same in every request with these tokens; no other page may be shared.
        forced_positions: the generated positions at which the block cap forced ``<|block_end|>``.
        applied: how many of `events` the cache now reflects.
        evicted: tokens they removed: physical = logical - `evicted`.
        done: the most of `events` ever carried out, which `reset` keeps.
        pages_freed: pages returned by each carried-out event.
        peak_pages: the most pages ever held.
        opened_at: content start of the block that is being written or waits for its memento, -1 if there is none.
        closed_at: position of its ``<|block_end|>``, -1 while it is being written.
    """

    control: RequestControl
    num_prompt_tokens: int
    max_tokens: int = 0
    events: list[Eviction] = field(default_factory=list)
    first_evictable: int = NEVER
    forced_positions: list[int] = field(default_factory=list)
    applied: int = 0
    evicted: int = 0
    done: int = 0
    pages_freed: dict[int, int] = field(default_factory=dict)
    peak_pages: int = 0
    opened_at: int = -1
    closed_at: int = -1
    scanned: int = field(init=False)
    _scanner: BlockScanner = field(init=False)
    _delimiters: frozenset[int] = field(init=False)
    _indifferent: bool = field(init=False)
    """Whether no token can make a difference: nothing is evicted and no block is capped."""

    def __post_init__(self) -> None:
        fmt = self.control.fmt
        self.scanned = self.control.unscanned(self.num_prompt_tokens)
        self._scanner = BlockScanner(fmt)
        self._delimiters = frozenset(fmt.delimiter_ids)
        self._indifferent = not fmt.evicts and fmt.max_block_tokens is None

    def observe(self, token_ids: Sequence[int]) -> None:
        """Read the tokens that arrived since the last call; `token_ids` is the whole sequence, prompt first.

        Raises:
            EvictionFault: if a block ran past the cap, so the logits processor that closes it is not at work.
        """
        first, last = self.scanned, len(token_ids)
        if first >= last:
            return
        self.scanned = last
        if self._indifferent:
            return
        fmt, scanner, delimiters = self.control.fmt, self._scanner, self._delimiters
        capped = fmt.max_block_tokens is not None
        for position in range(first, last):
            token = token_ids[position]
            if token not in delimiters and not (capped and scanner.block_start is not None):
                continue  # nearly every token, once a step and request
            if capped and position >= self.num_prompt_tokens and cap_reached(scanner, position):
                if token != fmt.block_end:
                    raise EvictionFault(
                        f"the block cap of {fmt.max_block_tokens} tokens did not close the block at {position}: "
                        "is memento.rollout.block_cap:BlockCap among the engine's logits_processors?"
                    )
                self.forced_positions.append(position)
            event = scanner.feed(position, token)
            if event is not None:
                self.events.append(event)
            elif token == fmt.block_start and fmt.evicts and self.first_evictable == NEVER:
                self.first_evictable = position + (0 if fmt.evict_delimiters else 1)
            if scanner.block_start is not None:
                self.opened_at, self.closed_at = scanner.block_start, -1
            elif not scanner.unfinished:
                self.opened_at = self.closed_at = -1
            elif self.closed_at < 0:
                self.closed_at = position

    def due(self, num_computed_tokens: int) -> Eviction | None:
        """The eviction that must happen before position `num_computed_tokens` is computed, if any.

        Raises:
            EvictionFault: if its boundary was already passed.
        """
        if self.applied == len(self.events):
            return None
        event = self.events[self.applied]
        if event.boundary < num_computed_tokens:
            raise EvictionFault(f"{event} is late: {num_computed_tokens} tokens were computed without it")
        return event if event.boundary == num_computed_tokens else None

    def advance(self, event: Eviction, pages_freed: int) -> None:
        """Record that `event`, which was due, was carried out."""
        if self.applied == len(self.events) or self.events[self.applied] != event:
            raise EvictionFault(f"{event} is not the next eviction")
        self.pages_freed[self.applied] = pages_freed
        self.applied += 1
        self.done = max(self.done, self.applied)
        self.evicted += event.end - event.start

    def reset(self) -> None:
        """The cache of this request is empty again (preempted or finished)."""
        self.applied = self.evicted = 0

    def tokens_until_boundary(self, num_computed_tokens: int) -> int:
        """How many tokens from `num_computed_tokens` on may be computed together: no step crosses a boundary."""
        if self.applied == len(self.events):
            return NEVER
        distance = self.events[self.applied].boundary - num_computed_tokens
        if distance <= 0:
            raise EvictionFault(f"{self.events[self.applied]} is due, yet position {num_computed_tokens} is scheduled")
        return distance

    @property
    def open_tokens(self) -> int:
        """Content tokens of the block that is being written or waits for its memento."""
        if self.opened_at < 0:
            return 0
        return (self.closed_at if self.closed_at >= 0 else self.scanned) - self.opened_at

    def resident_tokens(self, num_tokens: int) -> int:
        """Physical tokens in the cache once the first `num_tokens` tokens are computed."""
        return num_tokens - sum(end - start for boundary, start, end in self.events if boundary < num_tokens)

    def peak_tokens(self, num_tokens: int) -> int:
        """The most physical tokens held at any time while the first `num_tokens` tokens are computed."""
        peak = evicted = 0
        for boundary, start, end in self.events:
            if boundary >= num_tokens:
                break
            peak = max(peak, boundary - evicted)
            evicted += end - start
        return max(peak, num_tokens - evicted)


def cap_reached(scanner: BlockScanner, position: int) -> bool:
    """Whether the token at `position` must be ``<|block_end|>`` because the open block is full."""
    cap = scanner.fmt.max_block_tokens
    return cap is not None and scanner.block_start is not None and position - scanner.block_start >= cap


@dataclass(frozen=True, slots=True)
class Compaction:
    """How a worker carries out one eviction: move the tokens behind the span down, then forget the freed pages.

    A slot is ``page * page_tokens + offset``. Sources and targets may overlap: read all, then write all.
    """

    request_id: str
    source_slots: NDArray[np.int64]
    target_slots: NDArray[np.int64]
    num_pages: int
    """Pages that the request keeps, from the front of its block table."""


@dataclass(frozen=True, slots=True)
class EvictionStep:
    """What the scheduler tells the workers with every step."""

    compactions: tuple[Compaction, ...] = ()
    evicted: dict[str, int] = field(default_factory=dict)
    """Request id -> evicted tokens so far, for the scheduled requests that have any."""
