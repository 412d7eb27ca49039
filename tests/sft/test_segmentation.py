"""The segmentation is optimal: against all segmentations, against the released rule, and by its own bound."""

from __future__ import annotations

import itertools
import math
import time
from random import Random

import pytest

from memento.sft.annotate.segmentation import TOLERANCE, objective, segment

Blocks = list[tuple[int, int]]


def blocks_of(cuts: list[int], n: int) -> Blocks:
    edges = [0, *cuts, n]
    return [(a, b - 1) for a, b in itertools.pairwise(edges)]


def random_trace(seed: int, n: int, mean_tokens: float = 20) -> tuple[list[float], list[int]]:
    rng = Random(seed)
    tokens = [max(1, int(rng.gauss(mean_tokens, mean_tokens / 2))) for _ in range(n)]
    levels = (0, 0, 0, 1, 1, 2, 3)
    return [(rng.choice(levels) + rng.choice(levels)) / 2 for _ in range(n - 1)], tokens


def released_rule(scores: list[float], tokens: list[int], min_tokens: int, weight: float, most: int) -> float:
    """The objective that the released pipeline's rule reaches (arXiv 2604.09852): for each (sentence, number of blocks)
    it keeps the prefix with the best objective so far, and takes the best number of blocks at the end."""
    n = len(tokens)
    counts = [0, *itertools.accumulate(tokens)]
    kept: dict[tuple[int, int], tuple[float, float, float]] = {(0, 0): (0.0, 0.0, 0.0)}  # objective, S, Q
    for k in range(1, most + 1):
        for end in range(1, n + 1):
            best = None
            for start in range(end):
                size = counts[end] - counts[start]
                if size < min_tokens or (start, k - 1) not in kept:
                    continue
                _, total, squares = kept[start, k - 1]
                total, squares = total + (scores[start - 1] if start else 0.0), squares + size * size
                mean = counts[end] / k
                value = total / k - weight * math.sqrt(max(0.0, squares / k - mean * mean)) / mean
                if best is None or value > best[0]:
                    best = (value, total, squares)
            if best is not None:
                kept[end, k] = best
    return max((kept[n, k][0] for k in range(1, most + 1) if (n, k) in kept), default=0.0)


def test_against_every_segmentation_of_short_traces() -> None:
    for seed in range(150):
        rng = Random(seed)
        n = rng.randint(1, 10)
        tokens = [rng.randint(1, 8) for _ in range(n)]
        scores = [rng.choice([0, 0.5, 1, 1.5, 2, 2.5, 3]) for _ in range(n - 1)]
        least, weight, most = rng.choice([1, 3, 6]), rng.choice([0.2, 0.5, 1.5]), rng.choice([None, 2, 3])
        candidates = [
            blocks_of([i + 1 for i, cut in enumerate(cuts) if cut], n)
            for cuts in itertools.product([0, 1], repeat=n - 1)
        ]
        allowed = [
            b
            for b in candidates
            if len(b) == 1 or (min(sum(tokens[x : y + 1]) for x, y in b) >= least and (not most or len(b) <= most))
        ]
        best = max(objective(b, scores, tokens, weight) for b in allowed)
        found = segment(scores, tokens, min_tokens=least, weight=weight, max_blocks=most)
        assert list(found.blocks) in allowed
        assert objective(found.blocks, scores, tokens, weight) == pytest.approx(found.objective, abs=TOLERANCE)
        assert found.objective == pytest.approx(best, abs=TOLERANCE)


def test_never_below_the_released_rule_and_often_above_it() -> None:
    above = 0
    for seed in range(200):
        scores, tokens = random_trace(seed, n=Random(seed).randint(20, 60), mean_tokens=50)
        most = max(1, sum(tokens) // 200)
        theirs, ours = released_rule(scores, tokens, 200, 0.5, most), segment(scores, tokens)
        assert ours.objective >= theirs - TOLERANCE
        above += ours.objective > theirs + 1e-4
    assert above >= 3, "the rule is a heuristic, so an exact search must beat it somewhere"


def test_the_optimum_is_proven_and_the_blocks_are_legal() -> None:
    for seed in range(5):
        scores, tokens = random_trace(seed, 187)
        found = segment(scores, tokens)
        assert found.bound - found.objective <= TOLERANCE
        assert [first for first, _ in found.blocks] == [0, *(last + 1 for _, last in found.blocks[:-1])]
        assert found.blocks[-1][1] == 186
        assert min(sum(tokens[a : b + 1]) for a, b in found.blocks) >= 200
        assert objective(found.blocks, scores, tokens) == pytest.approx(found.objective, abs=TOLERANCE)


def test_ten_thousand_sentences_in_under_a_second() -> None:
    segment(*random_trace(0, 60))  # compiles
    scores, tokens = random_trace(1, 10_000)
    started = time.process_time()
    found = segment(scores, tokens)
    assert time.process_time() - started < 1.0
    assert found.bound - found.objective <= TOLERANCE


def test_short_and_even_traces_and_bad_input() -> None:
    assert segment([], [500]).blocks == ((0, 0),)
    assert segment([3.0], [100, 100]).blocks == ((0, 1),), "two blocks of 200 tokens do not fit"
    assert segment([3.0], [200, 200]).blocks == ((0, 0), (1, 1))
    even = segment([3.0] * 9, [200] * 10)
    assert len(even.blocks) == 10 and even.objective == pytest.approx(2.7)
    assert segment([0.0] * 9, [200] * 10).objective == 0
    for scores, tokens in (([1.0], [1]), ([], []), ([1.0], [0, 5])):
        with pytest.raises(ValueError, match=r"boundaries|at least one token"):
            segment(scores, tokens)
