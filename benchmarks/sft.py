"""SFT throughput: stages 1 and 2 in packed rows, against plain TRL with padding and a dense 4-D mask.

    python benchmarks/sft.py                                     # 2 K, 4 K and 8 K tokens on this machine
    python benchmarks/sft.py --tokens 2048 --rounds 5 --clock cpu --threads 1 --json sft.json
    python benchmarks/sft.py --device cuda --dtype bfloat16 --hidden 4096 --layers 36 --heads 32 --kv-heads 8 \\
        --head-dim 128 --intermediate 12288 --vocabulary 151936 --tokens 8192 32768 --only "stage 1" "stage 2"

Both sides train the same traces with TRL's own loss (`SFTTrainer.compute_loss`); what differs is the collator and the
attention. Traces have the average block and memento lengths of OpenMementos (arXiv 2604.09852, section 2: 1,150
and 194 tokens) and lengths between half of and the whole of `--tokens`. Ours are packed into rows of `--tokens`; the
dense side pads `--batch` traces to the longest and masks [B, 1, T, T], as a custom collator for `transformers`
has to do. Counted are real tokens, forward and backward, in turn, medians over rounds. On a GPU also the peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from memento.format import MementoFormat
from memento.kernels.hf import attach
from memento.sft.data import Examples, RowCollator, Stage, Tokens, pack_steps

FMT = MementoFormat(1, 2, 3, 4, evict_delimiters=False)
PROMPT_TOKENS = 100


def traces(args: argparse.Namespace, longest: int, stage: str) -> Examples:
    """`args.traces` random traces, the same for every stage."""
    rng = random.Random(args.seed)

    def some(mean: int) -> list[int]:
        return [rng.randrange(10, args.vocabulary) for _ in range(max(1, round(rng.gauss(mean, 0.25 * mean))))]

    found = []
    for _ in range(args.traces):
        length, ids = rng.randint(longest // 2, longest), [9] * PROMPT_TOKENS
        while len(ids) < length:
            ids += [FMT.block_start, *some(args.block_tokens), FMT.block_end]
            ids += [FMT.summary_start, *some(args.memento_tokens), FMT.summary_end]
        found.append(Tokens(np.array(ids[:length], dtype=np.int32), PROMPT_TOKENS))
    examples = Examples(Stage(stage, FMT))
    examples.add(found, examples.dropped, 0)
    return examples


def dense_batches(examples: Examples, batch: int) -> list[dict[str, torch.Tensor]]:
    """Padded batches with additive masks [B, 1, T, T], as a collator of one's own would make them."""
    batches = []
    for first in range(0, len(examples), batch):
        chosen = examples[first : first + batch]
        width = max(map(len, chosen))
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        labels = torch.full((len(chosen), width), -100)
        seen = torch.zeros(len(chosen), 1, width, width, dtype=torch.bool)
        at = torch.arange(width)
        for i, example in enumerate(chosen):
            n, start = len(example), example.prompt_len
            ids[i, :n] = torch.from_numpy(example.token_ids).long()
            labels[i, start:n] = ids[i, start:n]
            until = torch.from_numpy(example.visible_until)
            seen[i, 0, :n, :n] = (at[None, :n] <= at[:n, None]) & (at[:n, None] < until[None])
            seen[i, 0, n:, 0] = True  # a row that sees nothing would be NaN
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def packed_rows(examples: Examples, tokens: int) -> list[dict[str, torch.Tensor]]:
    """Our rows, as `memento.sft.train` makes them."""
    rows, _ = pack_steps([list(range(len(examples)))], examples.lengths, tokens, 1)
    collate = RowCollator(examples)
    return [{k: v for k, v in collate([{"examples": row}]).items() if k != "region"} for row in rows]


def trainer(args: argparse.Namespace, ours: bool, folder: str) -> Any:
    """TRL's trainer around a random Qwen3: attached to memento attention, or as it is."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from memento.tiny import make_tokenizer

    torch.manual_seed(args.seed)
    config = Qwen3Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=65_536,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).to(args.device, getattr(torch, args.dtype))
    if ours:
        attach(model)
    else:
        model.set_attn_implementation("sdpa")
    settings = SFTConfig(
        output_dir=folder,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        gradient_checkpointing=args.checkpointing,
        use_cpu=args.device == "cpu",
        bf16=False,
        report_to="none",
    )
    return SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_dict({"examples": [[0]]}),
        data_collator=lambda items: items[0],
        processing_class=make_tokenizer(),
    )


def one_pass(side: Any, batches: list[dict[str, torch.Tensor]], clock: Callable[[], float]) -> float:
    """Seconds of one forward and backward over all batches."""
    device, model = next(side.model.parameters()).device, side.model
    model.train()
    started = clock()
    for batch in batches:
        batch = {k: v.to(device) for k, v in batch.items()}
        if batch.get("attention_mask") is not None:
            batch["attention_mask"] = batch["attention_mask"].to(model.dtype)
        side.compute_loss(model, batch).backward()
    seconds = clock() - started
    model.zero_grad(set_to_none=True)
    return seconds


def measure(args: argparse.Namespace, tokens: int, ours: Any, plain: Any) -> dict[str, Any]:
    data = {stage: traces(args, tokens, stage) for stage in ("stage1", "stage2")}
    sides = {
        "stage 1": (ours, packed_rows(data["stage1"], tokens)),
        "stage 2": (ours, packed_rows(data["stage2"], tokens)),
        "dense stage 1": (plain, dense_batches(data["stage1"], args.batch)),
        "dense stage 2": (plain, dense_batches(data["stage2"], args.batch)),
    }
    sides = {name: side for name, side in sides.items() if name in args.only}

    def wall() -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    clock = time.process_time if args.clock == "cpu" else wall
    real = sum(data["stage1"].lengths)
    times: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, float] = {}
    for name, (side, batches) in sides.items():
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        one_pass(side, batches, clock)
        peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else float("nan")
    for _ in range(args.rounds):
        for name, (side, batches) in sides.items():
            times[name].append(one_pass(side, batches, clock))
    print(f"\n{args.traces} traces of {tokens // 2:,} to {tokens:,} tokens, {real:,} real tokens")
    print(f"  {'':<16}{'tokens/s':>12}{'over dense':>12}{'peak GiB':>10}")
    results = {}
    for name in sides:
        seconds, twin = statistics.median(times[name]), f"dense {name}"
        ratio = statistics.median(times[twin]) / seconds if twin in times else float("nan")
        over = f"{ratio:.2f}x" if twin in times else ""
        peak = f"{peaks[name]:.1f}" if args.device == "cuda" else "-"
        print(f"  {name:<16}{real / seconds:>12,.0f}{over:>12}{peak:>10}", flush=True)
        results[name] = {"tokens_per_s": real / seconds, "over_dense": ratio, "peak_gib": peaks[name]}
    return {"tokens": tokens, "real_tokens": real, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192], help="longest trace, and row")
    parser.add_argument("--traces", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2, help="padded traces in a dense batch")
    parser.add_argument("--block-tokens", type=int, default=1150)
    parser.add_argument("--memento-tokens", type=int, default=194)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: CPU seconds of this process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["stage 1", "stage 2", "dense stage 1", "dense stage 2"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}, {args.layers} "
        f"layers of {args.hidden}, medians of {args.rounds}, {args.clock} time"
    )
    with tempfile.TemporaryDirectory() as folder:
        ours, plain = trainer(args, True, folder), trainer(args, False, folder)
        results = [measure(args, tokens, ours, plain) for tokens in args.tokens]
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"command": sys.argv, "machine": machine, "lengths": results}, file, indent=1)


if __name__ == "__main__":
    main()
