"""Admission that knows peaks: how much memory the running requests are going to need, from what finished ones needed.

A request that evicts rises and falls like a saw. When one falls its pages are free, and a scheduler that gives them to
the next request in line at once has none when the first rises again: it preempts, and computes the same tokens twice.
So a request enters only if the largest *expected* sum of all saws, over the time to come, fits into the pool::

    tokens   what is kept for good + the saw's mean height        expected of one request from now on
             rising by `slope` a token, until it ends at the mean length of finished requests

The sum is largest just before one of them ends, so it is evaluated there, and a margin of `MARGIN_SIGMAS` standard
deviations is added, because saws of many requests hardly ever peak together. Requests that began together will end
together, and are held back more than those of mixed ages.

When the pool runs full all the same, nobody loses anything: a running request that needs a page and would take it from
the one whose next fall is nearest sits out a step (`Admission.turn`), with its cache intact. It goes on when that one
has fallen, which is soon. Only if even the nearest finds no page is a request preempted, as in stock vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from memento.rollout.plan import EvictionPlan

MARGIN_SIGMAS = 0.5
"""Standard deviations of the sum that stay free. Few are enough, because who finds no page waits for one."""

WINDOW_REQUESTS = 64
"""Finished requests after which an observation fades: lengths drift while a policy is trained."""

WINDOW_EVICTIONS = 512
"""The same for evictions."""

PRIOR_GROWTH = 0.25
"""Before anything was evicted: the part of what an evicting request generates that stays."""

OVERTIME = 0.25
"""Whatever outlived its mean, a request or a block, is expected to go on for this part of it."""

SPARE_PAGES = 1
"""Kept for the request that falls next beyond what it is expected to need."""


class Outlook(NamedTuple):
    """What one request is expected to hold.

    Attributes:
        start_tokens: now, on average over a saw.
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
    """Running means over the requests of one kind (those that evict alike)."""

    count: int = 0
    """Finished requests."""
    length: float = 0.0
    """Tokens they generated."""
    kept: float = 0.0
    """Tokens of them that were resident at the end."""
    kept_variance: float = 0.0
    saw: float = 0.0
    """Mean height of the saw above the straight line from the prompt to what was kept."""
    saw_variance: float = 0.0
    """Of that height, while a request runs."""
    evictions: int = 0
    """Of running requests too."""
    block: float = 0.0
    """Tokens that one eviction removes."""
    cycle: float = 0.0
    """Tokens generated from one eviction to the next."""

    def observe(self, plan: EvictionPlan, num_tokens: int) -> None:
        """A request finished with `num_tokens` tokens."""
        prompt = plan.num_prompt_tokens
        length = num_tokens - prompt
        if length < 1:
            return
        resident = np.arange(1, length + 1, dtype=np.float64)
        for boundary, start, end in plan.events[: plan.done]:
            if boundary > prompt:
                resident[boundary - prompt :] -= end - start
        kept = float(resident[-1])
        above = resident - np.arange(1, length + 1) * (kept / length)
        self.count += 1
        weight = 1.0 / min(self.count, WINDOW_REQUESTS)
        delta = kept - self.kept
        self.kept += weight * delta
        self.kept_variance = (1 - weight) * (self.kept_variance + weight * delta * delta)
        self.length += weight * (length - self.length)
        self.saw += weight * (float(above.mean()) - self.saw)
        self.saw_variance += weight * (float(above.var()) - self.saw_variance)

    def evicted(self, tokens: int, since_last: int) -> None:
        """A running request evicted `tokens`, and had generated `since_last` since its last eviction."""
        self.evictions += 1
        weight = 1.0 / min(self.evictions, WINDOW_EVICTIONS)
        self.block += weight * (tokens - self.block)
        self.cycle += weight * (since_last - self.cycle)

    def length_of(self, plan: EvictionPlan) -> float:
        """Tokens that a request is expected to generate in all."""
        # The prior counts as one request: it rules the first wave and then fades.
        seen = min(self.count, WINDOW_REQUESTS)
        return max(1.0, min(plan.max_tokens, (plan.max_tokens + seen * self.length) / (1 + seen)))

    def remaining(self, plan: EvictionPlan) -> float:
        """Tokens that it is expected to generate from now on."""
        length, age = self.length_of(plan), max(0, plan.scanned - plan.num_prompt_tokens)
        return min(max(length - age, OVERTIME * length), max(plan.max_tokens - age, 0))

    def outlook(self, plan: EvictionPlan) -> Outlook:
        """What a request is expected to hold from now on."""
        evicts, seen = plan.control.fmt.evicts, min(self.count, WINDOW_REQUESTS)
        prior = 1.0
        if evicts:
            prior = max(0.0, 1 - self.block / self.cycle) if self.evictions else PRIOR_GROWTH
        finished = self.kept / self.length if seen else 0.0
        slope = min(1.0, (prior + seen * finished) / (1 + seen))
        saw = self.saw if seen else self.block / 2
        # Also of a preempted request, which holds nothing at the moment.
        now, open_tokens = plan.resident_tokens(plan.scanned), plan.open_tokens if evicts else 0
        # An open block that outgrew the usual ones is counted as it is.
        start = now if open_tokens > 2 * self.block else now - open_tokens + saw
        return Outlook(start, slope, self.remaining(plan), self.saw_variance + self.kept_variance)

    def until_release(self, plan: EvictionPlan) -> float:
        """Tokens that a running request is expected to generate until an eviction, or its end, gives pages back."""
        remaining = self.remaining(plan)
        if not plan.control.fmt.evicts or not self.evictions:
            return remaining
        closing = max(1.0, self.cycle - self.block)
        if plan.closed_at >= 0:
            fall = max(closing - (plan.scanned - plan.closed_at), 1.0)
        elif plan.opened_at >= 0:
            fall = max(self.block - plan.open_tokens, OVERTIME * self.block) + closing
        else:
            fall = self.cycle
        return min(fall, remaining)


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


class Turn(NamedTuple):
    """Who may take the last free pages, and how many of them are kept for it."""

    request_id: str
    applied: int
    """Evictions that it had carried out: with the next one its turn is over."""
    pages: int


@dataclass(slots=True)
class Admission:
    """The forecasts of an engine, one for each kind of request, and what became of them.

    Attributes:
        held_back: how often a request that had room now was not admitted because of what others will need.
        sat_out: how often a running request sat out a step because the last free pages were another's.
        expected_pages: the forecast at the last admission, margin included.
    """

    page_tokens: int
    forecasts: dict[int, PeakForecast] = field(default_factory=dict)
    held_back: int = 0
    sat_out: int = 0
    expected_pages: int = 0

    def finished(self, plan: EvictionPlan, num_tokens: int) -> None:
        """Learn from a request that ended by itself."""
        self._forecast(plan).observe(plan, num_tokens)

    def evicted(self, plan: EvictionPlan) -> None:
        """Learn from the eviction that `plan` has just carried out, if it is not the replay of one."""
        if plan.applied < plan.done or not plan.applied:
            return
        event = plan.events[plan.applied - 1]
        last = plan.events[plan.applied - 2].boundary if plan.applied > 1 else 0
        since_last = event.boundary - max(last, plan.num_prompt_tokens)
        if since_last > 0:  # else it lay in the prompt
            self._forecast(plan).evicted(event.end - event.start, since_last)

    def pages(self, plans: Iterable[EvictionPlan]) -> int:
        """Pages that requests, all together, are expected to hold at the worst moment to come."""
        outlooks = [self._forecast(plan).outlook(plan) for plan in plans]
        peak, sigma = expected_peak(outlooks)
        # Half a page at the end of each request is empty.
        self.expected_pages = math.ceil((peak + MARGIN_SIGMAS * sigma) / self.page_tokens + len(outlooks) / 2)
        return self.expected_pages

    def turn(self, held: Iterable[tuple[str, EvictionPlan, int]]) -> Turn | None:
        """The request that gives pages back with the fewest more of its own; None if all are far from it.

        Args:
            held: (request id, plan, pages held) of the running requests, oldest first.
        """
        best: Turn | None = None
        for request_id, plan, pages in held:
            forecast = self._forecast(plan)
            until = forecast.until_release(plan)
            if until > max(self.page_tokens, forecast.cycle if plan.control.fmt.evicts else 0.0):
                continue
            to_come = plan.resident_tokens(plan.scanned) + until
            missing = max(0, math.ceil(to_come / self.page_tokens) - pages) + SPARE_PAGES
            if best is None or missing < best.pages:
                best = Turn(request_id, plan.applied, missing)
        return best

    @property
    def cycle_pages(self) -> int:
        """Pages that a request fills from one eviction to the next: with fewer free ones, turns matter."""
        longest = max((forecast.cycle for forecast in self.forecasts.values()), default=0.0)
        return math.ceil(longest / self.page_tokens) + SPARE_PAGES

    def _forecast(self, plan: EvictionPlan) -> PeakForecast:
        return self.forecasts.setdefault(plan.control.fmt.keep_last_n, PeakForecast())
