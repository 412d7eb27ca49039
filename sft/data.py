"""From traces to packed rows: checking, tokenising, and the plan of which trace is trained on when.

    rows (`memento.sft.rows`) ──check──> token ids ──> in memory, or an Arrow file that later runs map into memory
                                             │
             plan of all steps ──> packed rows, each document with its own ``visible_until`` ──> model

A row packs whole traces without padding and carries ``visible_until``; each optimiser step is a fixed number of rows.
The whole plan is made before training starts, so it is the same on every rank and in every run of a seed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray

from memento.arithmetic import SPLITS, make_traces
from memento.chat import encode_prompts, end_of_turn, opens_thinking
from memento.config import SftConfig, SftPhase
from memento.errors import UserError
from memento.format import NEVER, MementoFormat, parse, visible_until
from memento.kernels.hf import pack
from memento.sft.rows import Row, check_response, read_rows, split_source, strip_blocks

IGNORED = -100
"""The label of a token without loss."""

PLAIN_STAGES = ("stage0", "control")
"""Stages that train on reasoning without blocks and mementos, and need no delimiters in the tokenizer."""

BATCH_ROWS = 512
"""Rows that are tokenised at once."""


class Region(IntEnum):
    """What a token belongs to; the loss is reported for each."""

    PROMPT = 0
    BLOCK = 1
    MEMENTO = 2
    DELIMITER = 3
    ANSWER = 4
    """Everything else of a completion: think tags, what stands between blocks, the answer."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One tokenised trace.

    Attributes:
        token_ids: int32 [T], prompt, completion and end of turn.
        prompt_len: tokens of the prompt; they carry no loss.
        visible_until: int64 [T] in positions of this trace.
        region: int8 [T], a `Region` each.
    """

    token_ids: NDArray[np.int32]
    prompt_len: int
    visible_until: NDArray[np.int64]
    region: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.token_ids)


class Tokens(NamedTuple):
    """A tokenised trace before anything is derived from it."""

    token_ids: NDArray[np.int32]
    prompt_len: int


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """What a stage makes of token ids.

    Attributes:
        name: ``stage0``, ``stage1``, ``stage2`` or ``control``.
        fmt: the delimiters and what stage 2 evicts; None in a plain stage whose tokenizer lacks them.
    """

    name: str
    fmt: MementoFormat | None

    @property
    def plain(self) -> bool:
        """Whether blocks and mementos are taken out of the traces."""
        return self.name in PLAIN_STAGES

    def example(self, tokens: Tokens) -> Example:
        """The example with its visibility and regions."""
        ids, prompt_len = tokens
        if self.fmt is None:
            until, region = np.full(len(ids), NEVER), _without_blocks(len(ids), prompt_len)
        else:
            shown = self.fmt if self.name == "stage2" else self.fmt.without_eviction()
            until, region = visible_until(ids, shown, prompt_len), regions(ids, self.fmt, prompt_len)
        return Example(ids, prompt_len, until, region)


class TokenFile(Sequence[Tokens]):
    """Tokenised traces in an Arrow file, mapped into memory: only what is read takes any."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._starts = [0]  # of each batch, in traces
        self._batches: list[tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]] = []
        for number in range(self._reader.num_record_batches):
            batch = self._reader.get_batch(number)
            ids: Any = batch.column(0)
            offsets = np.asarray(ids.offsets)
            self._batches.append((np.asarray(ids.values), offsets, np.asarray(batch.column(1))))
            self._starts.append(self._starts[-1] + len(offsets) - 1)

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tokens]: ...
    def __getitem__(self, index: int | slice) -> Tokens | list[Tokens]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._starts, index) - 1
        values, offsets, prompts = self._batches[number]
        at = index - self._starts[number]
        return Tokens(values[offsets[at] : offsets[at + 1]], int(prompts[at]))

    def lengths(self) -> list[int]:
        """Tokens of each trace, without reading them."""
        return [int(n) for _, offsets, _ in self._batches for n in np.diff(offsets)]


class Examples(Sequence[Example]):
    """Tokenised traces, and what became of those that were read. What a stage derives from the ids is made on access.

    Attributes:
        dropped: reason (`memento.sft.rows.REASONS`) -> how many.
        truncated: traces cut at the maximum length.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.dropped: Counter[str] = Counter()
        self.truncated = 0
        self._parts: list[Sequence[Tokens]] = []
        self._starts = [0]
        self._lengths: list[int] = []

    def add(self, tokens: Sequence[Tokens], dropped: Counter[str], truncated: int) -> range:
        """Append traces; returns their indices."""
        lengths = tokens.lengths() if isinstance(tokens, TokenFile) else [len(t.token_ids) for t in tokens]
        first = len(self)
        self._parts.append(tokens)
        self._starts.append(first + len(tokens))
        self._lengths += lengths
        self.dropped += dropped
        self.truncated += truncated
        return range(first, len(self))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._starts, index) - 1
        return self.stage.example(self._parts[part][index - self._starts[part]])

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each trace."""
        return self._lengths

    def report(self) -> str:
        """One line for a person: how many traces and tokens, what was dropped and why."""
        parts = [f"{len(self)} traces, {sum(self._lengths):,} tokens"]
        parts += [f"{count} dropped ({reason})" for reason, count in self.dropped.most_common()]
        parts += [f"{self.truncated} truncated"] if self.truncated else []
        return ", ".join(parts)


def read_examples(
    rows: Iterable[Row | tuple[str, str]],
    tokenizer: Any,
    fmt: MementoFormat | None,
    stage: str,
    max_length: int,
    *,
    strict: bool = True,
) -> Examples:
    """Check and tokenise traces.

    In every stage a response with delimiters must hold complete blocks only; in stage 0 and the control they are then
    taken out, so that all stages see the same source traces.

    Args:
        rows: `memento.sft.rows.Row`s, or (problem, response) pairs.
        tokenizer: holds the delimiters, but for the plain stages.
        fmt: what stage 2 evicts. The other stages evict nothing, whatever it says.
        stage: ``stage0``, ``stage1``, ``stage2`` or ``control``.
        max_length: longer traces are cut there, and counted; a prompt that fills it is dropped.
        strict: also drop traces with text between blocks.

    Returns:
        The examples in order, and counts of what was dropped.
    """
    result = Examples(Stage(stage, fmt))
    dropped: Counter[str] = Counter()
    found = list(_tokenise(rows, tokenizer, result.stage, max_length, strict, dropped))
    result.add([tokens for tokens, _ in found], dropped, sum(cut for _, cut in found))
    return result


def _tokenise(
    rows: Iterable[Row | tuple[str, str]],
    tokenizer: Any,
    stage: Stage,
    max_length: int,
    strict: bool,
    dropped: Counter[str],
) -> Iterator[tuple[Tokens, bool]]:
    """(token ids, whether they were cut) of each usable trace."""
    end, opened = end_of_turn(tokenizer), opens_thinking(tokenizer)
    foreign = _foreign_tokens(tokenizer, stage.fmt)
    stream = iter(rows)
    while batch := list(islice(stream, BATCH_ROWS)):
        kept: list[tuple[str, str]] = []
        for row in batch:
            problem, response = row[0], row[1]
            reason = (None if problem.strip() else "empty") or check_response(
                response, blocks=not stage.plain, strict=strict
            )
            if reason is None:
                kept.append((problem, strip_blocks(response) if stage.plain else response))
            else:
                dropped[reason] += 1
        prompts = encode_prompts(tokenizer, [problem for problem, _ in kept])
        texts = [_after_opening(response) if opened else response for _, response in kept]
        completions = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        for prompt, completion in zip(prompts, completions, strict=True):
            if len(prompt) >= max_length:
                dropped["prompt too long"] += 1
            elif not foreign.isdisjoint(completion):
                dropped["special token in the response"] += 1
            else:
                ids = np.array([*prompt, *completion, end], dtype=np.int32)
                yield Tokens(ids[:max_length], len(prompt)), len(ids) > max_length


def _after_opening(response: str) -> str:
    """The response without the ``<think>`` that the prompt ends with."""
    return response.partition("<think>")[2].removeprefix("\n")


def _foreign_tokens(tokenizer: Any, fmt: MementoFormat | None) -> frozenset[int]:
    """Special tokens that no response may hold: all but think tags and delimiters."""
    allowed = set(fmt.delimiter_ids) if fmt is not None else set()
    allowed |= {tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "</think>")}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    return frozenset(special - allowed)


def regions(token_ids: NDArray[np.integer], fmt: MementoFormat, prompt_len: int) -> NDArray[np.int8]:
    """The `Region` of each token, int8 [T]. A block or memento that the end of the trace cuts off counts as one."""
    region = _without_blocks(len(token_ids), prompt_len)
    # With the delimiters that would have come, whatever is still open is complete; out of order they change nothing.
    closed = np.concatenate([token_ids, [fmt.block_end, fmt.summary_start, fmt.summary_end]])
    for block in parse(closed, fmt, prompt_len).blocks:
        region[block.start : block.end] = Region.BLOCK
        region[block.memento_start : block.memento_end] = Region.MEMENTO
    region[prompt_len:][np.isin(token_ids[prompt_len:], fmt.delimiter_ids)] = Region.DELIMITER
    return region


def _without_blocks(length: int, prompt_len: int) -> NDArray[np.int8]:
    region = np.full(length, Region.ANSWER, dtype=np.int8)
    region[:prompt_len] = Region.PROMPT
    return region


# ---------------------------------------------------------------------------------------------- on disk


def tokenised(config: SftConfig, tokenizer: Any, stage: Stage) -> tuple[Sequence[Tokens], Counter[str], int]:
    """The traces of ``config.data``: (tokens, dropped, truncated), through ``config.cache`` if there is one.

    The file's name is a hash of all that shapes it: source, tokenizer, chat template, length, stage. Of several ranks
    the first writes it and the others wait.
    """
    assert config.data is not None
    dropped: Counter[str] = Counter()
    rows = islice(read_rows(config.data, dropped=dropped, streaming=config.streaming), config.max_traces)
    found = _tokenise(rows, tokenizer, stage, config.max_length, config.strict_blocks, dropped)
    if config.cache is None:
        kept = list(found)
        return [tokens for tokens, _ in kept], dropped, sum(cut for _, cut in kept)
    folder = config.cache / _cache_key(config, tokenizer, stage)
    config.cache.mkdir(parents=True, exist_ok=True)
    with (config.cache / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "about.json").is_file():
            _write_tokens(found, folder, dropped)
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    return TokenFile(folder / "traces.arrow"), Counter(about["dropped"]), about["truncated"]


def _write_tokens(found: Iterator[tuple[Tokens, bool]], folder: Path, dropped: Counter[str]) -> None:
    import pyarrow as pa

    schema = pa.schema([("token_ids", pa.large_list(pa.int32())), ("prompt_len", pa.int32())])
    aside = folder.with_name(f"{folder.name}.tmp")
    aside.mkdir(parents=True, exist_ok=True)
    truncated = 0
    with pa.OSFile(str(aside / "traces.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        while batch := list(islice(found, BATCH_ROWS)):
            truncated += sum(cut for _, cut in batch)
            offsets = np.concatenate([[0], np.cumsum([len(t.token_ids) for t, _ in batch])]).astype(np.int64)
            values = pa.array(np.concatenate([t.token_ids for t, _ in batch]))
            ids = pa.LargeListArray.from_arrays(pa.array(offsets), values)
            prompts = pa.array([t.prompt_len for t, _ in batch], pa.int32())
            writer.write_batch(pa.record_batch([ids, prompts], schema=schema))
    about = {"dropped": dict(dropped), "truncated": truncated}
    (aside / "about.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    os.replace(aside, folder)


def _cache_key(config: SftConfig, tokenizer: Any, stage: Stage) -> str:
    name = split_source(str(config.data))[0]
    files = sorted(p for p in Path(name).rglob("*") if p.is_file()) if Path(name).is_dir() else [Path(name)]
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {
        "version": 1,
        "data": str(config.data),
        "files": stats,
        "tokenizer": hashlib.blake2b((backend.to_str() if backend else repr(tokenizer)).encode()).hexdigest(),
        "template": tokenizer.chat_template,
        "plain": stage.plain,
        "max_length": config.max_length,
        "max_traces": config.max_traces,
        "strict": config.strict_blocks,
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


# ---------------------------------------------------------------------------------------------- the plan


def training_examples(config: SftConfig, tokenizer: Any, fmt: MementoFormat | None) -> tuple[Examples, list[list[int]]]:
    """Every trace of a run, and for each optimiser step the indices of the ``batch_size`` traces it trains on.

    Raises:
        UserError: the data holds no usable trace, or fewer than one batch over all epochs.
    """
    total = Examples(Stage(config.stage, fmt))
    steps: list[list[int]] = []
    stream: Iterator[int] | None = None
    count = 0
    if config.data is not None:
        indices = total.add(*tokenised(config, tokenizer, total.stage))
        if not indices:
            raise UserError(f"{config.data} holds no usable trace: {total.report()}.")
        stream, count = _shuffled(indices, config.seed), len(indices)
    phases = config.phases or (SftPhase(steps=_epoch_steps(config, count)),)
    for number, phase in enumerate(phases):
        if phase.problems is None:
            assert stream is not None  # the schema asks for `data` where a phase generates nothing
            steps += [[next(stream) for _ in range(config.batch_size)] for _ in range(phase.steps)]
        else:
            family = phase.problems
            traces = make_traces(
                phase.steps * config.batch_size,
                config.seed + number * SPLITS,  # the same share of all sums, other traces than the phase before
                terms=(family.min_terms, family.max_terms),
                digits=family.digits,
            )
            rows = [Row(problem.prompt, trace) for problem, trace in traces]
            dropped: Counter[str] = Counter()
            found = list(_tokenise(rows, tokenizer, total.stage, config.max_length, config.strict_blocks, dropped))
            indices = total.add([tokens for tokens, _ in found], dropped, sum(cut for _, cut in found))
            assert len(indices) == len(traces), f"generated traces must all be usable: {total.report()}"
            steps += [list(indices[i : i + config.batch_size]) for i in range(0, len(indices), config.batch_size)]
    return total, steps


def _epoch_steps(config: SftConfig, examples: int) -> int:
    steps = int(config.epochs * examples // config.batch_size)
    if steps < 1:
        raise UserError(
            f"{config.data}: {examples} usable traces x {config.epochs:g} epochs are less than one batch of "
            f"{config.batch_size}. Lower batch_size or raise epochs."
        )
    return steps


def _shuffled(indices: range, seed: int) -> Iterator[int]:
    """Epoch after epoch, each in its own order, without end."""
    for epoch in range(10**9):
        order = list(indices)
        Random(f"epoch/{seed}/{epoch}").shuffle(order)
        yield from order


def pack_steps(
    steps: Sequence[Sequence[int]], lengths: Sequence[int], micro_batch_tokens: int, ranks: int
) -> tuple[list[list[int]], int]:
    """Spread each step's traces over rows of about equal length.

    Args:
        steps: for each optimiser step the indices of its traces.
        lengths: tokens of each trace.
        micro_batch_tokens: rows stay below it, except where a single trace is longer.
        ranks: data-parallel ranks.

    Returns:
        (rows, rows per rank and step). The rows of step ``s`` are ``rows[s * ranks * n : (s + 1) * ranks * n]``.

    Raises:
        UserError: a step has fewer traces than ranks.
    """
    per_rank = 1
    while True:
        packed = [_balance(step, lengths, ranks * per_rank) for step in steps]
        if any(not row for rows in packed for row in rows):
            raise UserError(f"batch_size ({len(steps[0])}) is too small for {ranks} ranks: every rank needs a trace.")
        fits = all(
            len(row) == 1 or sum(lengths[i] for i in row) <= micro_batch_tokens for rows in packed for row in rows
        )
        if fits or ranks * (per_rank + 1) > min(map(len, steps)):
            return [row for rows in packed for row in rows], per_rank
        per_rank += 1


def _balance(step: Sequence[int], lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Longest trace first, each into the shortest row so far."""
    packed: list[list[int]] = [[] for _ in range(rows)]
    filled = [0] * rows
    for index in sorted(step, key=lambda i: (-lengths[i], i)):
        row = min(range(rows), key=lambda r: (filled[r], r))
        packed[row].append(index)
        filled[row] += lengths[index]
    return packed


@dataclass(frozen=True, slots=True)
class RowCollator:
    """Makes one packed row of the examples that a data-set item names: ``{"examples": [3, 17, 4]}``.

    The row is what a model with memento attention is called with (`memento.kernels.hf.pack`), and ``labels`` and
    ``region``, int64 [1, T].
    """

    examples: Sequence[Example]

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`items` holds one item: the batch size counts rows."""
        if len(items) != 1:
            raise ValueError(f"one packed row at a time, got {len(items)}")
        chosen = [self.examples[i] for i in items[0]["examples"]]
        # A copy of its own type: what lies in a cache file is mapped read-only.
        row = pack([e.token_ids.astype(np.int64) for e in chosen], [e.visible_until for e in chosen])
        region = torch.from_numpy(np.concatenate([e.region for e in chosen])).long()[None]
        labels = torch.where(region == Region.PROMPT, IGNORED, row["input_ids"])
        return {**row, "labels": labels, "region": region}
