"""Admission that knows peaks: how much memory the running requests are going to need, from what finished ones needed.

A request that evicts rises and falls like a saw. When one falls its pages are free, and a scheduler that gives them to
the next request in line at once has none when the first rises again: it preempts, and computes the same tokens twice.
So a request enters only if the largest *expected* sum of all saws, over the time to come, fits into the pool::

    tokens   what is kept for good + the saw's mean height        expected of one request from now on,
             rising by `slope` a token                            if it still runs then:
             x the part of finished requests of its age           (the survival curve of their lengths)
               that were not over by then

The sum can fall only where somebody ends, so it is evaluated just before, and a margin of `MARGIN_SIGMAS` standard
deviations is added, up to what everybody together would hold. Requests that began together will end together, and are
held back more than those of mixed ages.

When the pool runs full all the same, nobody loses anything: a running request that needs a page and would take it from
the one whose next fall is nearest sits out a step (`Admission.sits_out`), with its cache intact. It goes on when that
one has fallen, which is soon. Only if even the nearest finds no page is a request preempted, as in stock vLLM.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memento.rollout.plan import EvictionPlan

MARGIN_SIGMAS = 2.0
"""Standard deviations of the sum that stay free. With fewer more requests run, but they sit out more steps than that is
worth: one that waits for a page holds its cache, and generates nothing."""

WINDOW_REQUESTS = 64
"""Finished requests after which an observation fades: lengths drift while a policy is trained."""

WINDOW_EVICTIONS = 512
"""The same for evictions."""

PEAK_TIMES = 33
"""Moments at which the sum of all saws is looked at: quantiles of those at which a request may end."""

PRIOR_GROWTH = 0.25
"""Before anything was evicted: the part of what an evicting request generates that stays."""

OVERTIME = 0.25
"""A block that outlived the mean is expected to go on for this part of it."""

SPARE_PAGES = 1
"""Kept for the request that falls next beyond what it is expected to need."""

TURN_STEPS = 8
"""Steps after which the request that falls next is chosen again, if it has not fallen."""


class Outlook(NamedTuple):
    """What one request is expected to hold.

    Attributes:
        start_tokens: now, on average over a saw.
        slope: tokens more for every token it generates.
        variance: of what it holds while it runs, in tokens squared.
        ends: in how many tokens it may end: equally likely each, in ascending order.
    """

    start_tokens: float
    slope: float
    variance: float
    ends: NDArray[np.float64]


@dataclass(slots=True)
class PeakForecast:
    """What is known of the requests of one kind (those that evict alike): running means, and the last lengths."""

    count: int = 0
    """Finished requests."""
    lengths: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW_REQUESTS))
    """Tokens that the last of them generated."""
    in_order: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """The same in ascending order."""
    length: float = 0.0
    """Mean of all, the last ones weighing most."""
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
        self.lengths.append(length)
        self.in_order = np.sort(np.array(self.lengths, dtype=np.float64))
        self.length += weight * (length - self.length)
        self.saw += weight * (float(above.mean()) - self.saw)
        self.saw_variance += weight * (float(above.var()) - self.saw_variance)

    def evicted(self, tokens: int, since_last: int) -> None:
        """A running request evicted `tokens`, and had generated `since_last` since its last eviction."""
        self.evictions += 1
        weight = 1.0 / min(self.evictions, WINDOW_EVICTIONS)
        self.block += weight * (tokens - self.block)
        self.cycle += weight * (since_last - self.cycle)

    def ends(self, plan: EvictionPlan) -> NDArray[np.float64]:
        """In how many tokens a request may end: where longer ones of the last finished requests did, and at its limit.

        The limit counts as one request. It rules the first wave, and whoever has outgrown all others.
        """
        age = max(0, plan.scanned - plan.num_prompt_tokens)
        first, last = self.in_order.searchsorted((age + 1, plan.max_tokens))
        return np.append(self.in_order[first:last] - age, max(plan.max_tokens - age, 1))

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
        return Outlook(start, slope, self.saw_variance + self.kept_variance, self.ends(plan))

    def until_release(self, plan: EvictionPlan) -> float:
        """Tokens that a running request is expected to generate until an eviction, or its end, gives pages back."""
        remaining = float(self.ends(plan).mean())
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


def reserved_tokens(outlooks: Sequence[Outlook]) -> float:
    """Tokens to keep for requests: what they hold together at the worst moment, now or later.

    That is the expected sum and `MARGIN_SIGMAS` standard deviations, but no more than if everybody still ran then.

    >>> soon, late = np.array([5.0]), np.array([40.0])
    >>> reserved_tokens([Outlook(10, 1.0, 0.0, soon), Outlook(20, 1.0, 0.0, late)])  # 20 + 40 when the second one ends
    60.0
    """
    if not outlooks:
        return 0.0
    # The sum falls only where somebody may end, so it is looked at just before.
    all_ends = np.concatenate([outlook.ends for outlook in outlooks])
    times = np.sort(all_ends)[np.linspace(0, len(all_ends) - 1, PEAK_TIMES).astype(int)]
    start, slope, spread = np.array([outlook[:3] for outlook in outlooks]).T[:, :, None]
    counts = np.array([len(outlook.ends) for outlook in outlooks])
    ends = np.full((len(outlooks), counts.max()), -np.inf)
    ends[np.arange(counts.max()) < counts[:, None]] = all_ends
    runs = (ends[:, :, None] >= times).sum(axis=1) / counts[:, None]
    holds = start + slope * times
    sigma = np.sqrt((runs * (spread + (1 - runs) * holds * holds)).sum(axis=0))
    peak = np.minimum((runs * holds).sum(axis=0) + MARGIN_SIGMAS * sigma, holds.sum(axis=0)).max()
    return max(float(peak), float(start.sum()))


class Turn(NamedTuple):
    """Who may take the last free pages, and how many of them are kept for it."""

    request_id: str
    plan: EvictionPlan
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
        scarce: whether a step may run out of pages; only then anybody can have to sit it out.
        somebody_waits: whether a running request sits out the present step. Nobody may enter it then.
    """

    page_tokens: int
    forecasts: dict[int, PeakForecast] = field(default_factory=dict)
    held_back: int = 0
    sat_out: int = 0
    expected_pages: int = 0
    scarce: bool = False
    somebody_waits: bool = False
    _turn: Turn | None = None
    _turn_steps: int = 0

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
        # Half a page at the end of each request is empty.
        self.expected_pages = math.ceil(reserved_tokens(outlooks) / self.page_tokens + len(outlooks) / 2)
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
                best = Turn(request_id, plan, plan.applied, missing)
        return best

    def begin_step(self, free_pages: int, num_running: int) -> None:
        """A step is about to be scheduled."""
        longest = max((forecast.cycle for forecast in self.forecasts.values()), default=0.0)
        self.scarce = free_pages < num_running + math.ceil(longest / self.page_tokens) + SPARE_PAGES
        self.somebody_waits = False
        self._turn_steps -= 1

    def sits_out(
        self, request_id: str, wanted: int, free_pages: int, held: Callable[[], Iterable[tuple[str, EvictionPlan, int]]]
    ) -> bool:
        """Whether a running request must not be computed in this step, for the sake of the one that falls next.

        Args:
            request_id: the request.
            wanted: pages that it needs beyond those it holds.
            free_pages: of the pool.
            held: gives what `turn` needs; called only if a turn is over.
        """
        if self._turn_steps <= 0 or (self._turn is not None and self._turn.plan.applied != self._turn.applied):
            self._turn, self._turn_steps = self.turn(held()), TURN_STEPS
        turn = self._turn
        if turn is None or turn.request_id == request_id or free_pages - wanted >= turn.pages:
            return False
        self.sat_out += 1
        self.somebody_waits = True
        return True

    def left(self, request_id: str) -> None:
        """A request gave all its pages back: it ended, or was preempted."""
        if self._turn is not None and self._turn.request_id == request_id:
            self._turn_steps = 0

    def _forecast(self, plan: EvictionPlan) -> PeakForecast:
        return self.forecasts.setdefault(plan.control.fmt.keep_last_n, PeakForecast())
