"""How good a cut each boundary is: a language model rates them in windows, twice, with windows that do not line up.

Two passes with coprime window sizes (16 and 11 boundaries) see every boundary in two different surroundings; their
scores are averaged (MEMENTO, arXiv 2604.09852, section on data).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from memento.sft.annotate.endpoint import Endpoint, Malformed
from memento.sft.annotate.messages import read_object, render

Result = TypeVar("Result")

WINDOWS = (16, 11)
"""Boundaries rated in one request, in each pass."""
HIGHEST = 3


async def score_boundaries(endpoint: Endpoint, units: Sequence[str], windows: Sequence[int] = WINDOWS) -> list[float]:
    """The mean score of each boundary, [n - 1], between 0 and 3.

    A boundary after a colon or an equals sign is 0 whatever the model says.

    Raises:
        NoAnswer: a window got no usable rating.
    """
    boundaries = len(units) - 1
    spans = [(first, min(first + size, boundaries)) for size in windows for first in range(0, boundaries, size)]
    rated = await gather(*(_score_window(endpoint, units, first, end) for first, end in spans))
    totals = [0.0] * boundaries
    for (first, _), scores in zip(spans, rated, strict=True):
        for place, score in enumerate(scores, first):
            totals[place] += score / len(windows)
    return [0.0 if units[i].rstrip().endswith((":", "=")) else total for i, total in enumerate(totals)]


async def _score_window(endpoint: Endpoint, units: Sequence[str], first: int, end: int) -> list[int]:
    """Scores of the boundaries first .. end - 1."""
    count = end - first
    listed = "\n\n".join(f"[{i}] {units[i].strip()}" for i in range(first, end + 1))
    system, user = render(
        "boundaries",
        first=first,
        last=end - 1,
        units=listed,
        count=count,
        example=", ".join(["0"] * min(count, 3)) + (", ..." if count > 3 else ""),
    )

    def read(text: str) -> list[int]:
        scores = read_object(text).get("scores")
        if not isinstance(scores, list) or len(scores) != count:
            found = len(scores) if isinstance(scores, list) else "no list of"
            raise Malformed(f"{found} scores for {count} boundaries")
        if not all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s <= HIGHEST for s in scores):
            raise Malformed(f"scores must be whole numbers from 0 to {HIGHEST}, got {scores}")
        return scores

    return await endpoint.ask("boundaries", system, user, read)


async def gather(*parts: Awaitable[Result]) -> list[Result]:
    """`asyncio.gather` that leaves nothing running: the first error cancels the rest and is raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
