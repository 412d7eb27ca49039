"""Admission that knows peaks: how much memory the running requests are going to need, from what finished ones needed.

A request that evicts rises and falls like a saw. When one falls its pages are free, and a scheduler that gives them to
the next request in line at once has none when the first rises again: it preempts, and computes the same tokens twice.
So a request enters only if the largest *expected* sum of all saws, over the time to come, fits into the pool::

    tokens   prompt + mementos so far + half a block         expected of one request at age a (tokens generated)
             = start + slope * a,  until it ends at the mean length of finished requests

The sum is largest just before one of them ends, so it is evaluated there, and a margin of `MARGIN_SIGMAS` standard
deviations is added, because saws of many requests hardly ever peak together. Requests that began together will end
together, and are held back more than those of mixed ages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from memento.rollout.plan import EvictionPlan

MARGIN_SIGMAS = 2.0
"""Standard deviations of the sum that stay free."""

WINDOW_REQUESTS = 64
"""Finished requests after which an observation fades: lengths drift while a policy is trained."""

PRIOR_GROWTH = 0.25
"""Before any request has finished: the part of ``max_tokens`` that is resident at the peak of a request that evicts."""

OVERTIME = 0.25
"""A request that outlived the mean length is expected to go on for this part of it."""


class Outlook(NamedTuple):
    """What one request is expected to hold.

    Attributes:
        start_tokens: now, between two evictions.
        slope: tokens more for every token it generates.
        remaining: tokens until it ends.
        variance: of what it holds, in tokens squared.
    """

    start_tokens: float
    slope: float
    remaining: float
    variance: float


@dataclass(slots=True)
class PeakForecast:
    """Running means over finished requests of one kind (those that evict alike)."""

    count: int = 0
    length: float = 0.0
    """Tokens generated."""
    growth: float = 0.0
    """Resident tokens at the peak, less the prompt."""
    growth_variance: float = 0.0
    block: float = 0.0
    """Tokens that one eviction removes."""

    def observe(self, length: int, growth: int, block: float) -> None:
        """A request finished: it generated `length` tokens, grew by `growth`, and evicted `block` at a time."""
        self.count += 1
        weight = 1.0 / min(self.count, WINDOW_REQUESTS)
        delta = growth - self.growth
        self.growth += weight * delta
        self.growth_variance = (1 - weight) * (self.growth_variance + weight * delta * delta)
        self.length += weight * (length - self.length)
        self.block += weight * (block - self.block)

    def outlook(self, plan: EvictionPlan) -> Outlook:
        """What a request is expected to hold from now on."""
        limit, evicts = plan.max_tokens, plan.control.fmt.evicts
        # The prior counts as one request: it rules the first wave and then fades.
        seen = min(self.count, WINDOW_REQUESTS)
        length = min(limit, (limit + seen * self.length) / (1 + seen))
        growth = min(length, (limit * (PRIOR_GROWTH if evicts else 1.0) + seen * self.growth) / (1 + seen))
        block = min(growth, seen * self.block / (1 + seen)) if evicts else 0.0
        age = max(0, plan.scanned - plan.num_prompt_tokens)
        kept = growth - block  # mementos, at the end
        slope = kept / max(length, 1.0)
        start = plan.num_prompt_tokens + block / 2 + slope * min(age, length)
        now = plan.resident_tokens(plan.scanned)  # also of a preempted request, which holds nothing at the moment
        if now > plan.num_prompt_tokens + growth:  # it outgrew what was expected: count what it holds
            start = now
        remaining = min(max(length - age, OVERTIME * length), max(limit - age, 0))
        return Outlook(start, slope, remaining, block * block / 12 + self.growth_variance)


def expected_peak(outlooks: Iterable[Outlook]) -> tuple[float, float]:
    """The largest expected sum of what requests hold, now or later, and the standard deviation of it, in tokens.

    >>> expected_peak([Outlook(10, 1.0, 5, 9.0), Outlook(20, 1.0, 40, 16.0)])  # 20 + 40 when the second one ends
    (60.0, 5.0)
    """
    table = np.array(list(outlooks), dtype=np.float64).reshape(-1, 4)
    if not len(table):
        return 0.0, 0.0
    start, slope, remaining, variance = table[np.argsort(table[:, 2])].T
    alive_start, alive_slope = (np.cumsum(column[::-1])[::-1] for column in (start, slope))
    at_ends = alive_start + alive_slope * remaining
    return float(max(at_ends.max(), alive_start[0])), float(np.sqrt(variance.sum()))


@dataclass(slots=True)
class Admission:
    """The forecasts of an engine, one for each kind of request, and what became of them.

    Attributes:
        held_back: how often a request that had room now was not admitted because of what others will need.
        expected_pages: the forecast at the last admission, margin included.
    """

    page_tokens: int
    forecasts: dict[int, PeakForecast] = field(default_factory=dict)
    held_back: int = 0
    expected_pages: int = 0

    def finished(self, plan: EvictionPlan, num_tokens: int) -> None:
        """Learn from a request that ended by itself."""
        evicted = [event.end - event.start for event in plan.events[: plan.done]]
        self._forecast(plan).observe(
            num_tokens - plan.num_prompt_tokens,
            max(0, plan.peak_tokens(num_tokens) - plan.num_prompt_tokens),
            sum(evicted) / len(evicted) if evicted else 0.0,
        )

    def pages(self, plans: Iterable[EvictionPlan]) -> int:
        """Pages that requests, all together, are expected to hold at the worst moment to come."""
        outlooks = [self._forecast(plan).outlook(plan) for plan in plans]
        peak, sigma = expected_peak(outlooks)
        # Half a page at the end of each request is empty.
        self.expected_pages = int(np.ceil((peak + MARGIN_SIGMAS * sigma) / self.page_tokens + len(outlooks) / 2))
        return self.expected_pages

    def _forecast(self, plan: EvictionPlan) -> PeakForecast:
        return self.forecasts.setdefault(plan.control.fmt.keep_last_n, PeakForecast())
