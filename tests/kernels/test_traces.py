"""`Visibility` from token ids on a device, against `memento.format` and against brute force."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from memento.format import NEVER, MementoFormat, visible_until
from memento.kernels.traces import trace_visibility

FORMATS = [
    MementoFormat(1, 2, 3, 4, evict_delimiters=evict, keep_last_n=keep)
    for evict in (False, True)
    for keep in (0, 1, -1)
]


def tokens(rng: random.Random, malformed: float) -> list[int]:
    """Blocks with mementos, and with probability `malformed` delimiters in any order between and inside."""
    ids: list[int] = []
    for _ in range(rng.randint(0, 6)):
        ids += [1, *[7] * rng.randint(0, 4), 2, *[9] * rng.randint(0, 1), 3, *[8] * rng.randint(0, 3), 4]
        while rng.random() < malformed:
            ids.insert(rng.randint(0, len(ids)), rng.choice([1, 2, 3, 4, 9]))
    return ids[: rng.randint(1, len(ids))] if ids and rng.random() < 0.5 else [*ids, 9]


def packed(seed: int, malformed: float, count: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """(token_ids, document, prompt) [1, T] and the lengths of the prompts."""
    rng = random.Random(seed)
    documents = [tokens(rng, malformed) for _ in range(count)]
    prompts = [rng.randint(0, len(d)) if rng.random() < 0.5 else 0 for d in documents]
    return (
        torch.tensor([[*itertools.chain(*documents)]]),
        torch.tensor([[i for i, d in enumerate(documents) for _ in d]]),
        torch.tensor([[p < n for d, n in zip(documents, prompts, strict=True) for p in range(len(d))]]),
        prompts,
    )


def of_format(ids: torch.Tensor, document: torch.Tensor, prompts: list[int], fmt: MementoFormat) -> torch.Tensor:
    limits, start = [], 0
    for number, prompt in enumerate(prompts):
        here = ids[0, document[0] == number].numpy()
        until = visible_until(here, fmt, prompt)
        limits.append(np.where(until == NEVER, NEVER, until + start))
        start += len(here)
    return torch.from_numpy(np.concatenate(limits))[None]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("malformed", [0.0, 0.5, 0.9])
def test_packed_traces_are_read_as_the_format_reads_them(fmt: MementoFormat, malformed: float) -> None:
    evicting = 0
    for seed in range(30):
        ids, document, prompt, prompts = packed(seed, malformed)
        expected = of_format(ids, document, prompts, fmt)
        found = trace_visibility(ids, fmt, document=document, prompt=prompt)
        assert torch.equal(found.visible_until, expected), seed
        evicting += bool((expected != NEVER).any())
    assert evicting > 10 or not fmt.evicts


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_any_tokens_at_all(fmt: MementoFormat) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 6, (40, 60), generator=generator)
    expected = torch.stack([torch.from_numpy(visible_until(row.numpy(), fmt)) for row in ids])
    assert torch.equal(trace_visibility(ids, fmt).visible_until, expected)


@pytest.mark.parametrize("window", [1, 3, 10, 1000])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_window_counts_the_keys_that_are_left(fmt: MementoFormat, window: int) -> None:
    for seed in range(6):
        ids, document, prompt, _ = packed(seed, 0.3)
        found = trace_visibility(ids, fmt, document=document, prompt=prompt, window=window)
        assert found.lowest_visible is not None
        until, ids_of = found.visible_until[0].tolist(), document[0].tolist()
        for query, lowest in enumerate(found.lowest_visible[0].tolist()):
            visible = [k for k in range(query + 1) if query < until[k] and ids_of[k] == ids_of[query]]
            inside = [k for k in visible if k >= lowest]
            assert inside == visible[-window:], (seed, query)


def test_empty_rows_and_single_tokens() -> None:
    fmt = FORMATS[0]
    assert trace_visibility(torch.empty(2, 0, dtype=torch.int64), fmt).visible_until.shape == (2, 0)
    assert trace_visibility(torch.tensor([[4], [1]]), fmt, window=2).visible_until.tolist() == [[NEVER], [NEVER]]


def test_a_million_tokens() -> None:
    """No loop over tokens, and exact at the size of a large packed batch."""
    rng = random.Random(0)
    documents: list[list[int]] = []
    while sum(map(len, documents)) < 1_000_000:
        ids = [9] * 100
        for _ in range(rng.randint(1, 30)):
            ids += [1, *[7] * rng.randint(500, 1800), 2, 3, *[8] * rng.randint(50, 350), 4]
        documents.append(ids)
    fmt = FORMATS[0]
    row = torch.tensor([[*itertools.chain(*documents)]], dtype=torch.int32)
    document = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor([*map(len, documents)]))[None]
    found = trace_visibility(row, fmt, document=document)
    assert torch.equal(found.visible_until, of_format(row, document, [0] * len(documents), fmt))


def test_bad_arguments_are_refused() -> None:
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"token_ids must be \[B, T\]"):
        trace_visibility(ids[0], FORMATS[0])
    with pytest.raises(ValueError, match="prompt must be of shape"):
        trace_visibility(ids, FORMATS[0], prompt=torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="window must be at least 1"):
        trace_visibility(ids, FORMATS[0], window=0)
