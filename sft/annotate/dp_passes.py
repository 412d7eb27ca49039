"""The inner loops of `memento.sft.annotate.segmentation`, compiled by numba (a dependency of vLLM) and kept on disk.

All arrays have one entry for each of the n + 1 places where a block may begin or end: before the first sentence,
between two, after the last.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def next_row(place, gain, latest, score_weight, mu, value, score, square, source):
    """From the best segmentations with k - 1 blocks, for each place where they may end, to those with k; in place.

    The maximum over the last cut i of ``value_i + gain_i - mu (P_j - P_i)^2`` is one over straight lines in P_j with
    slope 2 mu P_i. Slopes and queries both grow, so the upper envelope is a queue.
    """
    n = len(place)
    line = np.empty(n, dtype=np.int32)
    slope = np.empty(n)
    height = np.empty(n)
    head, tail, added = 0, 0, 0
    new_value = np.full(n, -np.inf)
    new_score = np.full(n, np.nan)
    new_square = np.full(n, np.nan)
    for j in range(1, n):
        while added <= latest[j]:
            i = added
            added += 1
            if value[i] == -np.inf:
                continue
            a = 2.0 * mu * place[i]
            b = value[i] - mu * place[i] * place[i] + score_weight * gain[i]
            covered = False
            while tail > head:
                last = tail - 1
                if slope[last] == a:
                    if height[last] >= b:
                        covered = True
                        break
                    tail -= 1
                    continue
                if last == head:
                    break
                before = last - 1
                # `last` is nowhere on top if the new line meets `before` no later than `last` does.
                meets_new = (height[before] - b) * (slope[last] - slope[before])
                meets_last = (height[before] - height[last]) * (a - slope[before])
                if meets_new > meets_last:
                    break
                tail -= 1
            if not covered:
                line[tail], slope[tail], height[tail] = i, a, b
                tail += 1
        x = place[j]
        while tail - head > 1 and slope[head + 1] * x + height[head + 1] >= slope[head] * x + height[head]:
            head += 1
        if tail > head:
            i = line[head]
            size = place[j] - place[i]
            source[j] = i
            new_score[j] = score[i] + gain[i]
            new_square[j] = square[i] + size * size
            new_value[j] = score_weight * new_score[j] - mu * new_square[j]
    for j in range(n):
        value[j], score[j], square[j] = new_value[j], new_score[j], new_square[j]


@njit(cache=True)
def best_totals(place, gain, latest, most, score_weight, mu):
    """For each number of blocks up to `most` the sums (scores of the cuts, squared sizes) that maximise
    ``score_weight * scores - mu * squares``; NaN where no segmentation exists. Two arrays [most + 1]."""
    n = len(place)
    value = np.full(n, -np.inf)
    score = np.full(n, np.nan)
    square = np.full(n, np.nan)
    value[0], score[0], square[0] = 0.0, 0.0, 0.0
    totals = np.full(most + 1, np.nan)
    squares = np.full(most + 1, np.nan)
    source = np.empty(n, dtype=np.int32)
    for k in range(1, most + 1):
        next_row(place, gain, latest, score_weight, mu, value, score, square, source)
        totals[k], squares[k] = score[n - 1], square[n - 1]
    return totals, squares


@njit(cache=True)
def best_cuts(place, gain, latest, count, score_weight, mu):
    """The places [count + 1] at which the best segmentation with `count` blocks begins, cuts and ends."""
    n = len(place)
    value = np.full(n, -np.inf)
    score = np.full(n, np.nan)
    square = np.full(n, np.nan)
    value[0], score[0], square[0] = 0.0, 0.0, 0.0
    source = np.empty((count + 1, n), dtype=np.int32)
    for k in range(1, count + 1):
        next_row(place, gain, latest, score_weight, mu, value, score, square, source[k])
    cuts = np.empty(count + 1, dtype=np.int64)
    cuts[count] = n - 1
    for k in range(count, 0, -1):
        cuts[k - 1] = source[k, cuts[k]]
    return cuts
