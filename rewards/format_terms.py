"""Format terms: what a trace looks like, as numbers between 0 and 1 that a reward can be composed of.

Accuracy as the only reward says nothing about blocks and mementos, and they drift. These terms read the token ids
through `memento.format.parse`, never the text, so they agree with what the engine evicted. They are pure and need no
process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from memento.format import MementoFormat, parse
from memento.trajectory import Trajectory


class TraceShape(NamedTuple):
    """Lengths and faults of one trace: all that the format terms need of it.

    Attributes:
        block_tokens, memento_tokens: content tokens of each complete block and of its memento, in order.
        anomalies: delimiters out of order, and blocks or mementos abandoned for a new block.
        left_open: the trace ended, by itself, inside a block or before its memento was complete. One that the length
            limit cut is truncated, not left open.
    """

    block_tokens: tuple[int, ...]
    memento_tokens: tuple[int, ...]
    anomalies: int
    left_open: bool


def trace_shape(trajectory: Trajectory, fmt: MementoFormat) -> TraceShape:
    """The shape of a sampled trace."""
    trace = parse(trajectory.token_ids, fmt, trajectory.prompt_len)
    return TraceShape(
        block_tokens=tuple(block.block_tokens for block in trace.blocks),
        memento_tokens=tuple(block.memento_tokens for block in trace.blocks),
        anomalies=trace.anomalies,
        left_open=trace.unfinished and not trajectory.truncated,
    )


def well_formed(shape: TraceShape) -> float:
    """Complete blocks as a fraction of complete blocks and faults; 0 for a trace without a complete block.

    >>> well_formed(TraceShape((40, 42, 41), (6, 6, 6), anomalies=1, left_open=False))
    0.75
    """
    complete = len(shape.block_tokens)
    return complete / (complete + shape.anomalies + shape.left_open) if complete else 0.0


def length_score(lengths: Sequence[int], low: int | None, high: int | None) -> float:
    """How well lengths keep to ``[low, high]`` tokens, averaged; 0 for no length at all.

    A length inside counts 1. A shorter one counts length / low, a longer one high / length, so that twice too long is
    as bad as half too short, and there is a slope wherever the model is.

    >>> length_score([10, 5, 40], low=10, high=20)
    0.6666666666666666
    """

    def one(length: int) -> float:
        if low is not None and length < low:
            return length / low
        if high is not None and length > high:
            return high / length
        return 1.0

    return sum(map(one, lengths)) / len(lengths) if lengths else 0.0
