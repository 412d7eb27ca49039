"""What eviction did to one request, as it comes back with the request's output."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memento.errors import UserError
from memento.format import Eviction
from memento.rollout.plan import CONTROL_KEY, EvictionFault, EvictionPlan

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput


class MissingStats(UserError, LookupError):
    """An output carries no eviction statistics."""


@dataclass(frozen=True, slots=True)
class EvictionStats:
    """One finished request of T tokens, T_p of them prompt.

    They travel in ``RequestOutput.kv_transfer_params["memento"]``, the one free dictionary that vLLM brings from the
    engine core to the caller, in-process and across processes. An aborted request has none.

    Attributes:
        evictions: those carried out, in order: every one whose boundary was computed. The last sampled token is never
            computed, so an eviction that only it would trigger (boundary T - 1 or T) is not among them.
        tokens_evicted: tokens they removed.
        pages_freed: KV pages they returned; those of a replay after a preemption are not counted twice.
        page_tokens: tokens a page.
        peak_pages: the most pages held at once, measured.
        peak_tokens: the most tokens visible to one query, as `memento.format.kv_profile` counts them.
        area: KV-AUC, the sum of the visible tokens over the generated ones (T_p and on), likewise.
        preemptions: how often the request lost its cache and was computed again.
        forced_positions: completion-relative positions of ``<|block_end|>`` tokens that the block cap forced. They
            were not sampled: keep them out of the loss, the ratio, the entropy and the token count.
        kv_limit: whether it was stopped (finish reason ``length``) because it outgrew the cache.
    """

    evictions: tuple[Eviction, ...]
    tokens_evicted: int
    pages_freed: int
    page_tokens: int
    peak_pages: int
    peak_tokens: int
    area: int
    preemptions: int
    forced_positions: tuple[int, ...]
    kv_limit: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for msgpack and JSON."""
        return asdict(self) | {
            "evictions": [list(event) for event in self.evictions],
            "forced_positions": list(self.forced_positions),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> EvictionStats:
        """The inverse of `to_dict`."""
        return cls(
            **fields
            | {
                "evictions": tuple(Eviction(*event) for event in fields["evictions"]),
                "forced_positions": tuple(fields["forced_positions"]),
            }
        )


_SAMPLES_KEY = f"{CONTROL_KEY}_samples"


class SampleStatistics:
    """Brings the statistics of all samples of a request with ``n > 1`` together.

    vLLM runs each sample as a request of its own, called ``<index>_<id of the request>``, and hands the caller the
    dictionary of the sample that finishes last. So every sample brings along those of the samples before it.
    """

    def __init__(self) -> None:
        self._families: OrderedDict[str, dict[str, dict[str, Any]]] = OrderedDict()

    def payload(self, request_id: str, stats: EvictionStats) -> dict[str, Any]:
        """What the output of this request, or sample, carries."""
        fields = stats.to_dict()
        member = re.fullmatch(r"(\d+)_(.+)", request_id)
        if member is None:
            return {CONTROL_KEY: fields}
        index, family_id = member.groups()
        family = self._families.setdefault(family_id, {})
        family[index] = fields
        self._families.move_to_end(family_id)
        if len(self._families) > _FAMILIES_KEPT:  # aborted half-way, or no family at all but an id that looks like one
            self._families.popitem(last=False)
        return {CONTROL_KEY: fields, _SAMPLES_KEY: dict(family)}


_FAMILIES_KEPT = 1024


def eviction_stats(request_output: RequestOutput, sample: int | None = None) -> EvictionStats:
    """The statistics of a finished request.

    Args:
        request_output: as vLLM returns it.
        sample: which of its samples, where ``SamplingParams.n > 1``.

    Raises:
        MissingStats: if there are none: the request is unfinished or was aborted, or its engine does not evict.
    """
    transfer = request_output.kv_transfer_params or {}
    if sample is None and len(request_output.outputs) > 1:
        raise MissingStats(
            f"request {request_output.request_id} has {len(request_output.outputs)} samples: say which, sample=0, ..."
        )
    fields = transfer.get(CONTROL_KEY) if sample is None else transfer.get(_SAMPLES_KEY, {}).get(str(sample))
    if fields is None and sample == 0 and len(request_output.outputs) == 1:
        fields = transfer.get(CONTROL_KEY)
    if fields is None:
        state = "finished" if request_output.finished else "not finished"
        raise MissingStats(
            f"request {request_output.request_id} ({state}) carries no eviction statistics. Was it aborted, or was its "
            "engine built without eviction_args()?"
        )
    return EvictionStats.from_dict(fields)


def summarize(
    plan: EvictionPlan, num_tokens: int, *, page_tokens: int, preemptions: int, kv_limit: bool
) -> EvictionStats:
    """The statistics of a request that ends with `num_tokens` tokens.

    Raises:
        EvictionFault: if what was carried out is not what the tokens ask for.
    """
    expected = [event for event in plan.events if event.boundary <= num_tokens - 2]
    carried_out = [event for event in plan.events[: plan.done] if event.boundary <= num_tokens - 2]
    if carried_out != expected:
        raise EvictionFault(f"evictions carried out {carried_out} are not those the tokens ask for, {expected}")
    resident = np.arange(1, num_tokens + 1, dtype=np.int64)
    for boundary, start, end in plan.events:
        resident[boundary:] -= end - start
    return EvictionStats(
        evictions=tuple(expected),
        tokens_evicted=sum(end - start for _, start, end in expected),
        pages_freed=sum(plan.pages_freed[index] for index in range(len(expected))),
        page_tokens=page_tokens,
        peak_pages=plan.peak_pages,
        peak_tokens=int(resident.max(initial=0)),
        area=int(resident[plan.num_prompt_tokens :].sum()),
        preemptions=preemptions,
        forced_positions=tuple(position - plan.num_prompt_tokens for position in plan.forced_positions),
        kv_limit=kv_limit,
    )
