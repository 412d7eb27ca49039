"""Loss and gradients of one packed row of stage 2, under ZeRO 0 to 3 and by a dense mask: their differences as JSON.

    python tests/sft/zero_gradients.py FAMILY [FAMILY ...]

A process of its own, because DeepSpeed wants one. Test data of tests/sft/test_families.py.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from typing import Any

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ |= {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": str(port),
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
}

import deepspeed
import deepspeed.ops
import torch
from deepspeed.utils import safe_get_full_grad
from transformers import AutoModelForCausalLM, AutoTokenizer

from memento.arithmetic import make_traces
from memento.config import SftConfig
from memento.format import MementoFormat, visible_until
from memento.kernels.hf import attach
from memento.sft.data import Examples, RowCollator, read_examples
from memento.sft.train import deepspeed_config
from memento.tiny import write_tiny_model


def dense_masks(ids: Any, fmt: MementoFormat, prompt_len: int, window: int | None) -> dict[str, torch.Tensor]:
    """Additive masks [1, 1, T, T] of full and of sliding layers, from the definition, key by key."""
    until = visible_until(ids, fmt, prompt_len)
    length = len(ids)
    seen = torch.zeros(length, length, dtype=torch.bool)
    near = torch.zeros(length, length, dtype=torch.bool)
    for q in range(length):
        resident = [k for k in range(q + 1) if q < until[k]]
        seen[q, resident] = True
        near[q, resident[-window:] if window else resident] = True
    least = torch.finfo(torch.float32).min
    masks = {"full_attention": seen, "sliding_attention": near}
    return {name: torch.where(mask, 0.0, least)[None, None] for name, mask in masks.items()}


def reference(folder: str, data: Examples, fmt: MementoFormat) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss and its gradients: eager attention, a dense mask, one trace at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    window = getattr(model.config, "sliding_window", None)
    total = 0.0
    for example in data:
        ids = torch.from_numpy(example.token_ids).long()[None]
        masks: Any = dense_masks(example.token_ids, fmt, example.prompt_len, window)
        mask = masks if model.config.model_type == "olmo3" else masks["full_attention"]
        logits = model(ids, attention_mask=mask, use_cache=False).logits[0, example.prompt_len - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, example.prompt_len :], reduction="sum")
        loss.backward()
        total += float(loss)
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def main(families: list[str]) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    differences = {}
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            write_tiny_model(folder, seed=0, family=family)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            fmt = MementoFormat.from_tokenizer(tokenizer, evict_delimiters=family == "phi3")
            rows = [(p.prompt, t) for p, t in make_traces(3, 0, terms=(3, 5))]
            data = read_examples(rows, tokenizer, fmt, "stage2", 2048)
            row = RowCollator(data)([{"examples": [0, 1, 2]}])
            row.pop("region")
            labels = row.pop("labels")[0]
            expected, gradients = reference(folder, data, fmt)
            for stage in range(4):
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                attach(model)
                model.gradient_checkpointing_enable()
                model.train()
                tree = {"stage": "stage2", "out": "x", "data": "x", "dtype": "float32", "zero_stage": stage}
                settings = deepspeed_config(SftConfig.model_validate(tree), 1)
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
                engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
                logits = engine(**row).logits[0]
                loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
                engine.backward(loss)
                worst = 0.0
                module: Any = engine.module
                for name, parameter in module.named_parameters():
                    gradient: Any = parameter.grad if stage == 0 else safe_get_full_grad(parameter)
                    size = gradients[name].abs().max()
                    worst = max(worst, float((gradient - gradients[name]).abs().max() / (1 + size)))
                differences[f"{family} zero{stage}"] = [abs(float(loss) - expected) / expected, worst]
                engine.destroy()
    print("RESULT " + json.dumps(differences))


if __name__ == "__main__":
    main(sys.argv[1:])
