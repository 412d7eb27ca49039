r"""The best blocks for given boundary scores, exactly.

The objective is that of the released OpenMementos pipeline (MEMENTO, arXiv 2604.09852, section on data)::

    S / K  -  weight * std(block tokens) / mean(block tokens),        every block of at least `min_tokens`

S sums the scores of the K - 1 cuts; dividing by K (the first block counts 0) keeps a single perfect cut from winning.

The released code keeps one best prefix for each (sentence, number of blocks), compared by the objective so far. That is
a heuristic: a prefix that looks uneven now may be even in the end. Here the optimum is found, and proven to be it:

* For a fixed K the mean block size is T / K, so with ``Q = sum(size^2)`` the objective is
  ``S / K - weight * sqrt(K Q / T^2 - 1)``: linear in S and **convex** in Q. Its maximum lies on a corner of the convex
  hull of all reachable (S, Q), and every such corner maximises ``S - mu Q`` for some ``mu``.
* ``S - mu Q`` is a sum over blocks, so one DP over (blocks, sentences) maximises it for all K at once, in
  O(sentences x blocks) (`memento.sft.annotate.dp_passes`).
* Each pass also bounds every K from above: ``S <= mu Q + h_mu(K)``. Where the lines of two neighbouring passes meet is
  the only place between them that may beat what was found; its objective is the bound, and the chord of the two
  points the next ``mu``. The search ends when no bound is left above the best segmentation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_BLOCK_TOKENS = 200
VARIANCE_WEIGHT = 0.5
TOLERANCE = 1e-7
"""The search ends when what may be left to find is worth less. (Rounding of an even split is worth 1e-8.)"""
MOST_PASSES = 1000
"""Far more than any trace took; if one does take them all, `Segmentation.bound` says what is open."""


@dataclass(frozen=True, slots=True)
class Segmentation:
    """Blocks of a trace.

    Attributes:
        blocks: inclusive (first, last) sentence indices, as OpenMementos writes them; they cover all sentences.
        objective: see the module.
        bound: no segmentation has a higher objective. Within `TOLERANCE` of `objective`: it is the optimum.
        passes: DP passes it took.
    """

    blocks: tuple[tuple[int, int], ...]
    objective: float
    bound: float
    passes: int


def objective(
    blocks: Sequence[tuple[int, int]], scores: Sequence[float], tokens: Sequence[int], weight: float = VARIANCE_WEIGHT
) -> float:
    """The objective of given blocks, computed from its definition.

    Args:
        blocks: inclusive (first, last) sentence indices.
        scores: ``scores[i]`` of the boundary between sentences i and i + 1.
        tokens: of each sentence.
    """
    sizes = np.array([sum(tokens[first : last + 1]) for first, last in blocks], dtype=np.float64)
    total = sum(scores[first - 1] for first, _ in blocks[1:])
    return float(total / len(blocks) - weight * sizes.std() / sizes.mean())


def segment(
    scores: Sequence[float],
    tokens: Sequence[int],
    *,
    min_tokens: int = MIN_BLOCK_TOKENS,
    weight: float = VARIANCE_WEIGHT,
    max_blocks: int | None = None,
) -> Segmentation:
    """Cut a trace into the blocks with the highest objective.

    Args:
        scores: [n - 1], of each boundary.
        tokens: [n] tokens of each sentence, at least 1 each.
        min_tokens: of every block. A trace shorter than twice that is one block.
        weight: of the variation of block sizes.
        max_blocks: at most so many blocks; None for as many as fit.

    Raises:
        ValueError: lengths that do not fit, a sentence without tokens, no sentence.
    """
    n = len(tokens)
    if not n or len(scores) != n - 1:
        raise ValueError(f"{n} sentences have {max(n - 1, 0)} boundaries, got {len(scores)} scores")
    if min(tokens) < 1:
        raise ValueError("every sentence has at least one token")
    counts = np.concatenate([[0], np.cumsum(np.asarray(tokens, dtype=np.int64))])
    most = min(n, max(1, int(counts[-1]) // max(min_tokens, 1)), max_blocks or n)
    if most == 1:
        return Segmentation(((0, n - 1),), 0.0, 0.0, 0)
    gain = np.concatenate([[0.0], np.asarray(scores, dtype=np.float64), [0.0]])
    # The last place from which a block that ends at place j is long enough; -1 where there is none.
    latest = np.searchsorted(counts, counts - min_tokens, side="right") - 1
    return _Search(counts.astype(np.float64), gain, latest, weight).run(most)


class _Pass(NamedTuple):
    """What one DP pass found, for each number of blocks K."""

    slope: float
    """``mu``; infinity where only Q counted."""
    height: NDArray[np.float64]
    """max of S - mu Q (of -Q for infinity)."""
    total: NDArray[np.float64]
    """S of the segmentation that reaches it, NaN if there is none."""
    squares: NDArray[np.float64]
    """Its Q."""


class _Search:
    """DP passes over one trace, and what they prove."""

    def __init__(
        self, place: NDArray[np.float64], gain: NDArray[np.float64], latest: NDArray[np.int64], weight: float
    ) -> None:
        self.place, self.gain, self.latest, self.weight = place, gain, latest, weight
        self.passes: list[_Pass] = []  # in order of their slopes

    def run(self, most: int) -> Segmentation:
        """Alternate passes and bounds until they meet."""
        alive = np.arange(2, most + 1)
        best, count, best_slope = 0.0, 1, 0.0  # one block
        slope, bound = 0.0, math.inf
        while len(self.passes) < MOST_PASSES:
            found = self._pass(slope, most)
            values = self._value(found.total[2:], found.squares[2:], np.arange(2, most + 1))
            if np.isfinite(values).any() and np.nanmax(values) > best:
                count = int(np.nanargmax(values)) + 2
                best, best_slope = float(values[count - 2]), slope
            if len(self.passes) == 1:
                slope = math.inf
                continue
            bounds, chords = self._bounds(alive)
            open_ = bounds > best + TOLERANCE
            alive, bounds, chords = alive[open_], bounds[open_], chords[open_]
            if not len(alive):
                bound = best
                break
            bound = float(bounds.max())
            slope, most = float(chords[int(np.argmax(bounds))]), int(alive.max())
        return Segmentation(self._blocks(best_slope, count), best, bound, len(self.passes))

    def _pass(self, slope: float, most: int) -> _Pass:
        from memento.sft.annotate.dp_passes import best_totals

        score_weight, mu = (0.0, 1.0) if math.isinf(slope) else (1.0, slope)
        total, squares = best_totals(self.place, self.gain, self.latest, most, score_weight, mu)
        found = _Pass(slope, score_weight * total - mu * squares, total, squares)
        self.passes.append(found)
        self.passes.sort(key=lambda p: p.slope)
        return found

    def _value(
        self, total: NDArray[np.float64], squares: NDArray[np.float64], blocks: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        tokens = self.place[-1] ** 2
        return total / blocks - self.weight * np.sqrt(np.maximum((squares * blocks - tokens) / tokens, 0.0))

    def _bounds(self, alive: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For each number of blocks the highest objective that is still possible, and the slope to try for it."""
        bounds, chords = np.full(len(alive), -math.inf), np.zeros(len(alive))
        least = self.place[-1] ** 2 / alive  # Q of blocks of one size
        for low, high in zip(self.passes[:-1], self.passes[1:], strict=True):
            height, total, squares = low.height[alive], low.total[alive], low.squares[alive]
            with np.errstate(invalid="ignore", divide="ignore"):
                if math.isinf(high.slope):
                    tip_squares = -high.height[alive]
                else:
                    tip_squares = (high.height[alive] - height) / (low.slope - high.slope)
                tip_squares = np.maximum(tip_squares, least)
                value = self._value(height + low.slope * tip_squares, tip_squares, alive)
                chord = (total - high.total[alive]) / (squares - high.squares[alive])
            # Both passes reached one point, or a point on the other's line: nothing lies between them.
            inside = (squares > high.squares[alive]) & (chord > low.slope) & (chord < high.slope)
            value = np.where(inside & np.isfinite(value), value, -math.inf)
            better = value > bounds
            bounds, chords = np.where(better, value, bounds), np.where(better, chord, chords)
        return bounds, chords

    def _blocks(self, slope: float, count: int) -> tuple[tuple[int, int], ...]:
        """The blocks of the best segmentation with `count` blocks at this slope."""
        if count == 1:
            return ((0, len(self.place) - 2),)
        from memento.sft.annotate.dp_passes import best_cuts

        score_weight, mu = (0.0, 1.0) if math.isinf(slope) else (1.0, slope)
        cuts = best_cuts(self.place, self.gain, self.latest, count, score_weight, mu).tolist()
        return tuple((first, end - 1) for first, end in pairwise(cuts))
