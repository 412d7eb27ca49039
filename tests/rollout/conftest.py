"""A tiny model whose samples hold complete blocks, for every test that needs evictions without a script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memento.config import FormatConfig
from memento.format import MementoFormat


@pytest.fixture(scope="session")
def block_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's tiny Qwen3 with two layers, after a few seconds of learning where delimiters may come."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from memento.tiny import write_tiny_model

    folder = write_tiny_model(tmp_path_factory.mktemp("model"), seed=0, layers=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    teach_blocks(model, FormatConfig().bind(tokenizer), (tokenizer.eos_token_id, tokenizer.pad_token_id))
    model.save_pretrained(folder)
    file = folder / "generation_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"eos_token_id": [tokenizer.eos_token_id, tokenizer.pad_token_id]})
    )
    return folder


def teach_blocks(model: Any, fmt: MementoFormat, ends: tuple[int, int]) -> None:
    """Fit a table of bigrams: delimiters are likely, ``<|block_end|>`` is followed by ``<|summary_start|>``."""
    import torch

    start, end, summary, close = fmt.delimiter_ids
    size = model.config.vocab_size
    table = torch.zeros(size, size)
    table[:, 20:] = 1 / size
    table[:, [start, end, close]] = 0.15
    table[:, list(ends)] = 0.002
    table[end] = 0
    table[end, summary] = 1
    table /= table.sum(1, keepdim=True)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        ids = torch.randint(20, size, (8, 96))
        marked = torch.rand(ids.shape) < 0.4
        ids[marked] = torch.tensor(fmt.delimiter_ids)[torch.randint(4, (int(marked.sum()),))]
        loss = -(table[ids] * model(ids).logits.log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
