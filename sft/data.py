"""From traces to packed rows: reading, checking, tokenising, and the plan of which trace is trained on when.

A row packs whole traces without padding and carries ``visible_until``; each optimiser step is a fixed number of rows.
The whole plan is made before training starts, so it is the same on every rank and in every run of a seed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memento.arithmetic import SPLITS, make_traces
from memento.chat import encode_prompts, end_of_turn
from memento.config import SftConfig, SftPhase
from memento.errors import UserError
from memento.format import BLOCK_END, BLOCK_START, SUMMARY_END, SUMMARY_START, MementoFormat, parse, visible_until
from memento.kernels.hf import pack

IGNORED = -100
"""The label of a token without loss."""

_ANNOTATION = re.compile(
    rf"{re.escape(SUMMARY_START)}.*?{re.escape(SUMMARY_END)}|{re.escape(BLOCK_START)}|{re.escape(BLOCK_END)}", re.DOTALL
)


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


@dataclass(slots=True)
class Examples:
    """Tokenised traces, and what became of those that were read."""

    examples: list[Example] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> how many."""
    truncated: int = 0

    def report(self) -> str:
        """One line for a person: how many traces and tokens, what was dropped and why."""
        tokens = sum(map(len, self.examples))
        parts = [f"{len(self.examples)} traces, {tokens:,} tokens"]
        parts += [f"{count} dropped ({reason})" for reason, count in self.dropped.most_common()]
        parts += [f"{self.truncated} truncated"] if self.truncated else []
        return ", ".join(parts)


def strip_blocks(response: str) -> str:
    """The same reasoning without blocks and mementos: what the SFT-only control is trained on."""
    return _ANNOTATION.sub("", response)


def read_rows(data: Path | str) -> Iterator[tuple[str, str]]:
    """(problem, response) pairs of a JSONL file or a hub data set (its ``train`` split).

    Raises:
        UserError: no such file; a line that is not JSON or lacks a column (file and line are named); a data set that
            cannot be loaded.
    """
    path = Path(data)
    if path.suffix in (".jsonl", ".json") or path.is_file():
        if not path.is_file():
            raise UserError(f"no data file at {path}. `data` takes a JSONL file with `problem` and `response`.")
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})."
                    ) from error
                yield _columns(row, f"{path}, line {number}")
        return
    import datasets

    try:
        rows = datasets.load_dataset(str(data), split="train")
    except Exception as error:  # many kinds: no network, no such set, no such split
        raise UserError(f"cannot load the data set {data}: {error}. `data` takes a JSONL file or a hub id.") from error
    for number, row in enumerate(rows):
        yield _columns(row, f"{data}, row {number}")


def _columns(row: Any, where: str) -> tuple[str, str]:
    missing = [c for c in ("problem", "response") if not isinstance(row, dict) or not isinstance(row.get(c), str)]
    if missing:
        raise UserError(f"{where}: `{missing[0]}` is missing or no text; each line needs `problem` and `response`.")
    return row["problem"], row["response"]


def read_examples(
    rows: Sequence[tuple[str, str]], tokenizer: Any, fmt: MementoFormat, stage: str, max_length: int
) -> Examples:
    """Check and tokenise (problem, response) pairs.

    In every stage a response must hold complete blocks only; in the control they are then taken out, so that all stages
    see the same source traces.

    Args:
        rows: responses in memento format; in the control, plain ones are taken as they are.
        tokenizer: holds the delimiters.
        fmt: what stage 2 evicts. Stage 1 and the control evict nothing, whatever it says.
        stage: ``stage1``, ``stage2`` or ``control``.
        max_length: longer traces are cut there, and counted; a prompt that fills it is dropped.

    Returns:
        The examples in order, and counts of what was dropped: ``empty``, ``no blocks``, ``malformed blocks``,
        ``prompt too long``.
    """
    result = Examples()
    kept = [(problem, response) for problem, response in rows if problem.strip() and response.strip()]
    if len(kept) < len(rows):
        result.dropped["empty"] = len(rows) - len(kept)
    if not kept:
        return result
    prompts = encode_prompts(tokenizer, [problem for problem, _ in kept])
    responses = _encode(tokenizer, [response for _, response in kept])
    end, shown = end_of_turn(tokenizer), fmt if stage == "stage2" else fmt.without_eviction()
    for (_, response), prompt, completion in zip(kept, prompts, responses, strict=True):
        trace = parse(completion, fmt)
        plain = stage == "control" and not any(i in fmt.delimiter_ids for i in completion)
        if not plain and not trace.well_formed:
            result.dropped["malformed blocks"] += 1
            continue
        if not plain and not trace.blocks:
            result.dropped["no blocks"] += 1
            continue
        if len(prompt) >= max_length:
            result.dropped["prompt too long"] += 1
            continue
        if stage == "control" and not plain:
            completion = _encode(tokenizer, [strip_blocks(response)])[0]
        ids = np.array([*prompt, *completion, end], dtype=np.int32)
        result.truncated += len(ids) > max_length
        ids = ids[:max_length]
        until = visible_until(ids, shown, len(prompt))
        result.examples.append(Example(ids, len(prompt), until, regions(ids, fmt, len(prompt))))
    return result


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def regions(token_ids: NDArray[np.integer], fmt: MementoFormat, prompt_len: int) -> NDArray[np.int8]:
    """The `Region` of each token, int8 [T]."""
    region = np.full(len(token_ids), Region.ANSWER, dtype=np.int8)
    for block in parse(token_ids, fmt, prompt_len).blocks:
        region[block.start : block.end] = Region.BLOCK
        region[block.memento_start : block.memento_end] = Region.MEMENTO
    region[np.isin(token_ids, fmt.delimiter_ids)] = Region.DELIMITER
    region[:prompt_len] = Region.PROMPT
    return region


def training_examples(config: SftConfig, tokenizer: Any, fmt: MementoFormat) -> tuple[Examples, list[list[int]]]:
    """Every trace of a run, and for each optimiser step the indices of the ``batch_size`` traces it trains on.

    Raises:
        UserError: the data holds no usable trace, or fewer than one batch over all epochs.
    """
    total, steps = Examples(), []

    def add(rows: Sequence[tuple[str, str]]) -> range:
        new = read_examples(rows, tokenizer, fmt, config.stage, config.max_length)
        first = len(total.examples)
        total.examples += new.examples
        total.dropped += new.dropped
        total.truncated += new.truncated
        return range(first, len(total.examples))

    stream: Iterator[int] | None = None
    count = 0
    if config.data is not None:
        indices = add(list(read_rows(config.data)))
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
            indices = add([(problem.prompt, trace) for problem, trace in traces])
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
        row = pack([e.token_ids for e in chosen], [e.visible_until for e in chosen])
        region = torch.from_numpy(np.concatenate([e.region for e in chosen])).long()[None]
        labels = torch.where(region == Region.PROMPT, IGNORED, row["input_ids"])
        return {**row, "labels": labels, "region": region}
