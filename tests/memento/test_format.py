"""The eviction rule, by hand and against a twin that asks the question for every (query, key) pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memento.format import (
    DELIMITERS,
    NEVER,
    Block,
    BlockScanner,
    FormatError,
    MementoFormat,
    evictions,
    kv_profile,
    parse,
    visible_until,
)

B, E, S, Z = 1, 2, 3, 4
KEEP = MementoFormat(B, E, S, Z, evict_delimiters=False)
DROP = MementoFormat(B, E, S, Z, evict_delimiters=True)

ONE_BLOCK = [9, B, 7, 8, E, S, 5, Z, 6]
TWO_BLOCKS = [9, B, 7, 7, 7, E, S, 5, Z, B, 8, 8, E, S, 6, Z, 9]


def limits(length: int, **spans: int) -> list[int]:
    """[T] NEVER except for the given spans: ``limits(9, _2_4=8)`` is 8 in positions 2 and 3."""
    values = [NEVER] * length
    for span, boundary in spans.items():
        start, end = map(int, span.strip("_").split("_"))
        values[start:end] = [boundary] * (end - start)
    return values


@pytest.mark.parametrize(
    ("ids", "fmt", "expected"),
    [
        pytest.param(ONE_BLOCK, KEEP, limits(9, _2_4=8), id="the docstring's example"),
        pytest.param(ONE_BLOCK, DROP, limits(9, _1_5=8), id="delimiters evicted"),
        pytest.param(ONE_BLOCK, KEEP.without_eviction(), limits(9), id="no eviction"),
        pytest.param(TWO_BLOCKS, KEEP, limits(17, _2_5=9, _10_12=16), id="two blocks"),
        pytest.param(TWO_BLOCKS, DROP, limits(17, _1_6=9, _9_13=16), id="two blocks, delimiters evicted"),
        pytest.param(TWO_BLOCKS, MementoFormat(B, E, S, Z, False, keep_last_n=1), limits(17, _2_5=16), id="keep one"),
        pytest.param(TWO_BLOCKS, MementoFormat(B, E, S, Z, False, keep_last_n=2), limits(17), id="keep two"),
        pytest.param(ONE_BLOCK[:8], KEEP, limits(8, _2_4=8), id="ends with the memento: boundary is T"),
        pytest.param(ONE_BLOCK[:7], KEEP, limits(7), id="cut off inside the memento"),
        pytest.param([B, E, S, Z, 9], KEEP, limits(5), id="empty block, delimiters kept: nothing to evict"),
        pytest.param([B, E, S, Z, 9], DROP, limits(5, _0_2=4), id="empty block, delimiters evicted"),
        pytest.param([B, 7, B, 8, E, S, 5, Z, 9], KEEP, limits(9, _3_4=8), id="an abandoned block stays"),
        pytest.param([B, 7, E, 6, 6, S, 5, Z, 9], KEEP, limits(9, _1_2=8), id="text before the memento stays"),
        pytest.param([B, 7, E, B, 8, E, S, 5, Z, 9], KEEP, limits(10, _4_5=9), id="a block without memento stays"),
        pytest.param([B, 7, E, S, 5, B, 8, E, S, 5, Z, 9], KEEP, limits(12, _6_7=11), id="an abandoned memento stays"),
        pytest.param([B, 7, E, S, 5, B, 8, Z, 9], KEEP, limits(9), id="a new block forgets the memento that was open"),
        pytest.param([E, S, Z, 9, Z], KEEP, limits(5), id="delimiters out of order"),
        pytest.param([B, 7, S, 5, Z, 9], KEEP, limits(6), id="block never closed"),
        pytest.param([B, 7, E, E, S, S, 5, Z, 9], KEEP, limits(9, _1_2=8), id="doubled delimiters"),
        pytest.param([], KEEP, [], id="empty"),
        pytest.param([9, 9], KEEP, limits(2), id="plain"),
    ],
)
def test_visible_until_by_hand(ids: list[int], fmt: MementoFormat, expected: list[int]) -> None:
    result = visible_until(ids, fmt)
    assert result.dtype == np.int64
    assert result.tolist() == expected


def test_evictions_by_hand() -> None:
    assert evictions(ONE_BLOCK, KEEP) == [(8, 2, 4)]
    assert evictions(TWO_BLOCKS, DROP) == [(9, 1, 6), (16, 9, 13)]
    assert evictions(ONE_BLOCK[:8], KEEP) == [(8, 2, 4)], "it happens as soon as one more token is computed"
    assert evictions(ONE_BLOCK[:7], KEEP) == []


def test_kv_profile_by_hand() -> None:
    resident, peak, area = kv_profile(ONE_BLOCK, KEEP, prompt_len=1)
    assert resident.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 7]
    assert (peak, area) == (8, 2 + 3 + 4 + 5 + 6 + 7 + 8 + 7)
    plain = kv_profile(ONE_BLOCK, KEEP.without_eviction(), prompt_len=1)
    assert (plain.peak_tokens, plain.area) == (9, sum(range(2, 10)))
    assert kv_profile([], KEEP).peak_tokens == 0


def test_the_prompt_is_never_searched_nor_evicted() -> None:
    ids = [B, 7, E, S, 5, Z, *ONE_BLOCK]
    assert visible_until(ids, KEEP, prompt_len=6).tolist() == limits(15, _8_10=14)
    # A block that only closes after the prompt was never opened.
    assert evictions([B, 7, E, S, 5, Z, 9], KEEP, prompt_len=2) == []


def test_parse_names_spans_and_counts_what_is_malformed() -> None:
    trace = parse(TWO_BLOCKS, KEEP)
    assert trace.blocks == (Block(2, 5, 7, 8), Block(10, 12, 14, 15))
    assert (trace.blocks[0].block_tokens, trace.blocks[0].memento_tokens) == (3, 1)
    assert trace.well_formed
    for ids, anomalies, unfinished in [
        ([E], 1, False),
        ([S], 1, False),
        ([Z], 1, False),
        ([B], 0, True),
        ([B, B], 1, True),
        ([B, 7, E], 0, True),
        ([B, 7, E, S, S, Z], 1, False),
        ([B, 7, E, S, 5, B, 8, E, S, 5, Z], 1, False),
    ]:
        trace = parse(ids, KEEP)
        assert (trace.anomalies, trace.unfinished) == (anomalies, unfinished), ids
        assert not trace.well_formed


@pytest.mark.parametrize("prompt_len", [-1, 4])
def test_prompt_len_outside_the_trace(prompt_len: int) -> None:
    with pytest.raises(ValueError, match="prompt_len must be between 0 and the 3 tokens"):
        visible_until([1, 2, 3], KEEP, prompt_len)


def test_two_dimensional_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="one-dimensional"):
        parse(np.zeros((2, 3), dtype=np.int64), KEEP)


def brute_force(ids: list[int], fmt: MementoFormat, prompt_len: int) -> np.ndarray:
    """Which query sees which key, bool [T, T]: for every query, the prefix before it is read from the start again.

    It shares no code and no state machine with `memento.format`: a block is looked for backwards from each
    ``<|summary_end|>``, by regular structure of the delimiters between.
    """
    total = len(ids)
    sees = np.tril(np.ones((total, total), dtype=bool))
    marks = [(p, ids[p]) for p in range(prompt_len, total) if ids[p] in fmt.delimiter_ids]
    complete: list[tuple[int, int, int]] = []  # (position of Z, of B, of E)
    for at, (end, token) in enumerate(marks):
        if token != fmt.summary_end:
            continue
        opening = next((i for i in range(at - 1, -1, -1) if marks[i][1] == fmt.block_start), None)
        if opening is None:
            continue
        between = marks[opening + 1 : at]
        closes = [p for p, t in between if t == fmt.block_end]
        if not closes:
            continue
        mementos = [p for p, t in between if t == fmt.summary_start and p > closes[0]]
        # Only the first <|summary_end|> after the memento's start completes it.
        if not mementos or any(t == fmt.summary_end and p > mementos[0] for p, t in between):
            continue
        complete.append((end, marks[opening][0], closes[0]))
    if fmt.keep_last_n < 0:
        return sees
    for query in range(total):
        past = [block for block in complete if block[0] < query]
        for _, start, close in past[: max(0, len(past) - fmt.keep_last_n)]:
            if fmt.evict_delimiters:
                sees[query, start : close + 1] = False
            else:
                sees[query, start + 1 : close] = False
    return sees


PIECES = [[B], [E], [S], [Z], [9], [B, 9, E], [S, 9, Z], [B, 9, 9, E, S, 9, Z]]
TRACES = st.lists(st.sampled_from(PIECES), max_size=24).map(lambda pieces: [t for piece in pieces for t in piece])
"""Delimiters in any order, with enough order that blocks do complete."""


@settings(max_examples=300, deadline=None)
@given(
    ids=TRACES,
    evict_delimiters=st.booleans(),
    keep_last_n=st.integers(-1, 3),
    prompt=st.integers(0, 8),
)
@example(ids=[B, 9, E, S, B, Z, 9], evict_delimiters=False, keep_last_n=0, prompt=0)
@example(ids=TWO_BLOCKS, evict_delimiters=True, keep_last_n=1, prompt=0)
@example(ids=[B, E, S, Z, Z, B, E, S, Z, 9], evict_delimiters=True, keep_last_n=0, prompt=1)
def test_equals_a_brute_force_twin(ids: list[int], evict_delimiters: bool, keep_last_n: int, prompt: int) -> None:
    fmt = MementoFormat(B, E, S, Z, evict_delimiters, keep_last_n)
    prompt = min(prompt, len(ids))
    total = len(ids)
    expected = brute_force(ids, fmt, prompt)
    limit = visible_until(ids, fmt, prompt)
    query, key = np.arange(total)[:, None], np.arange(total)[None, :]
    assert np.array_equal((key <= query) & (query < limit), expected)

    profile = kv_profile(ids, fmt, prompt)
    counts = expected.sum(axis=1)
    assert np.array_equal(profile.resident_T, counts)
    assert profile.peak_tokens == (counts.max() if total else 0)
    assert profile.area == counts[prompt:].sum()

    events = evictions(ids, fmt, prompt)
    boundaries = [boundary for boundary, _, _ in events]
    assert boundaries == sorted(set(boundaries))
    assert all(prompt <= start < end < boundary for boundary, start, end in events)


@given(TRACES)
def test_reading_token_by_token_gives_the_same(ids: list[int]) -> None:
    scanner = BlockScanner(DROP)
    events = [event for p, token in enumerate(ids) if (event := scanner.feed(p, token))]
    assert events == evictions(ids, DROP)
    assert scanner.anomalies == parse(ids, DROP).anomalies


class Tokenizer:
    """The two methods of a Hugging Face tokenizer that the format uses."""

    def __init__(self, known: dict[str, int], unk: int | None = None) -> None:
        self.known, self.unk_token_id = known, unk

    def convert_tokens_to_ids(self, tokens: str) -> int | None:
        return self.known.get(tokens, self.unk_token_id)


@pytest.mark.parametrize("unk", [None, 0])
def test_from_tokenizer_names_what_is_missing(unk: int | None) -> None:
    full: dict[str, int] = dict(zip(DELIMITERS, (10, 11, 12, 13), strict=True))
    fmt = MementoFormat.from_tokenizer(Tokenizer(full, unk), evict_delimiters=False, max_block_tokens=5)
    assert fmt.delimiter_ids == (10, 11, 12, 13) and fmt.max_block_tokens == 5
    del full["<|summary_end|>"]
    with pytest.raises(FormatError, match=r"no token <\|summary_end\|>"):
        MementoFormat.from_tokenizer(Tokenizer(full, unk), evict_delimiters=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_end": 1}, "four different token ids"),
        ({"block_start": -1}, "four different token ids"),
        ({"keep_last_n": -2}, "keep_last_n"),
        ({"max_block_tokens": 0}, "max_block_tokens"),
    ],
)
def test_impossible_formats(arguments: dict[str, int], message: str) -> None:
    good = {"block_start": 1, "block_end": 2, "summary_start": 3, "summary_end": 4}
    with pytest.raises(FormatError, match=message):
        MementoFormat(**{**good, **arguments}, evict_delimiters=False)
