"""Ray on this machine, and tiny models whose samples hold complete blocks, so that evictions need no script.

Both models are the quickstart's Qwen3 with two layers after a few seconds of fitting a table of bigrams.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from memento.config import FormatConfig
from memento.format import MementoFormat

if TYPE_CHECKING:
    import torch

FIRST_TEXT = 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of two CPUs, unless there is one already."""
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    if started:
        ray.shutdown()


@pytest.fixture(scope="session")
def block_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Delimiters are likely anywhere, so samples are malformed in every way, and hold complete blocks all the same."""
    return taught_model(tmp_path_factory.mktemp("model"), anywhere)


@pytest.fixture(scope="session")
def grammar_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks and mementos of a few tokens each follow each other, also in greedy decoding."""
    return taught_model(tmp_path_factory.mktemp("model"), in_turn)


def anywhere(fmt: MementoFormat, ends: list[int], size: int) -> torch.Tensor:
    """[V, V]: delimiters everywhere; ``<|block_end|>`` is followed by ``<|summary_start|>``."""
    import torch

    start, end, summary, close = fmt.delimiter_ids
    table = torch.zeros(size, size)
    table[:, FIRST_TEXT:] = 1 / size
    table[:, [start, end, close]] = 0.15
    table[:, ends] = 0.002
    table[end] = 0
    table[end, summary] = 1
    return table


def in_turn(fmt: MementoFormat, ends: list[int], size: int) -> torch.Tensor:
    """[V, V]: block tokens and memento tokens are two halves of the text; every third of either may be its last."""
    import torch

    start, end, summary, close = fmt.delimiter_ids
    middle = (FIRST_TEXT + size) // 2
    table = torch.zeros(size, size)
    table[:, start] = 1
    table[[start, *range(FIRST_TEXT, middle)], FIRST_TEXT:middle] = 1
    table[[summary, *range(middle, size)], middle:] = 1
    table[FIRST_TEXT:, start] = 0
    table[start, start] = table[summary, start] = table[end, start] = 0
    table[FIRST_TEXT:middle:3, end] = 100
    table[middle::3, close] = 100
    table[end, summary] = 1
    table[close, ends[0]] = 0.05
    return table


def taught_model(folder: Path, make_table: Callable[[MementoFormat, list[int], int], torch.Tensor]) -> Path:
    """Fit the rows of a table of next-token weights, and save the model with both of its end tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from memento.tiny import write_tiny_model

    write_tiny_model(folder, seed=0, layers=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    fmt, ends = FormatConfig().bind(tokenizer), [tokenizer.eos_token_id, tokenizer.pad_token_id]
    size = model.config.vocab_size
    table = make_table(fmt, ends, size)
    table /= table.sum(1, keepdim=True)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        ids = torch.randint(FIRST_TEXT, size, (8, 96))
        marked = torch.rand(ids.shape) < 0.4
        ids[marked] = torch.tensor(fmt.delimiter_ids)[torch.randint(4, (int(marked.sum()),))]
        loss = -(table[ids] * model(ids).logits.log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": ends}))
    return folder
