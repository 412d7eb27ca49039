"""A training step with and without the kernels, on the same batch: what SFT stage 2 and the learner gain from them.

    python benchmarks/step.py runs/quickstart/stage1/hf                        # the quickstart's own stage-2 batch
    python benchmarks/step.py runs/quickstart/stage1/hf --micro-batch-tokens 16384
    python benchmarks/step.py --tokens 8192                                    # one long trace, a model of 4 x 512

Forward and backward of all rows of one optimiser step. `before` masks torch's SDPA and makes all logits of a row in
fp32; `attention` and `log-probs` exchange one of the two for what training uses by default here, `after` both. For SFT
the log-probs are TRL's (`--head trl`), as in `memento sft`; for the learner `linear_logprobs`. The losses of all four
must agree. Times are medians; the four take turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from memento.format import MementoFormat, visible_until
from memento.kernels.hf import attach, pack
from memento.kernels.logprobs import linear_logprobs, logits_logprobs

Row = dict[str, torch.Tensor]
Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def quickstart_rows(args: argparse.Namespace) -> tuple[Any, list[Row]]:
    """The model in `args.model`, and the rows of the first step that stage 2 of the quickstart trains on."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from memento.config import SftConfig, load_config
    from memento.sft.data import RowCollator, pack_steps, training_examples

    config = load_config(args.config, [f"model={args.model}"])
    assert isinstance(config, SftConfig)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data, steps = training_examples(config, tokenizer, config.format.bind(tokenizer))
    limit = args.micro_batch_tokens or config.micro_batch_tokens
    rows, per_step = pack_steps(steps[:1], data.lengths, limit, 1)
    collate = RowCollator(data)
    made = [collate([{"examples": row}]) for row in rows[:per_step]]
    for row in made:
        row["wanted"] = row.pop("labels") >= 0
        del row["region"]
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)), made


def long_row(args: argparse.Namespace) -> tuple[Any, list[Row]]:
    """A small Qwen3 and one trace with the average block and memento of OpenMementos (arXiv 2604.09852)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    rng = random.Random(args.seed)
    ids = [9] * 100
    while len(ids) < args.tokens:
        block, memento = (max(1, round(rng.gauss(mean, mean / 4))) for mean in (1150, 194))
        ids += [1, *rng.choices(range(9, 32000), k=block), 2, 3, *rng.choices(range(9, 32000), k=memento), 4]
    ids = ids[: args.tokens]
    limits = visible_until(ids, MementoFormat(1, 2, 3, 4, evict_delimiters=False), 100)
    config = Qwen3Config(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        dtype=args.dtype,
    )
    row = pack([ids], [limits])
    return Qwen3ForCausalLM(config), [{**row, "wanted": torch.arange(len(ids))[None] >= 100}]


def heads(args: argparse.Namespace) -> tuple[Head, Head]:
    """Log-probabilities before and after."""

    def full(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits_logprobs(hidden @ head.T, targets)[0]

    def ours(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return linear_logprobs(hidden, head, targets)[0]

    def trl(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from trl.kernels import ChunkedLogProbFunction

        out: Any = ChunkedLogProbFunction.apply(
            hidden, head, None, targets, 1.0, 8192, None, 1.0, ("entropy", "is_top1")
        )
        return out[0]

    return full, trl if args.head == "trl" else ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a model with the four delimiters")
    parser.add_argument("--config", default="configs/sft/quickstart_stage2.yaml", help="whose first step is measured")
    parser.add_argument("--micro-batch-tokens", type=int, help="instead of the config's")
    parser.add_argument("--tokens", type=int, default=8192, help="of the long trace, without a model folder")
    parser.add_argument("--head", default="ours", choices=["ours", "trl"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--attention", help="instead of the default of this device, e.g. triton")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: CPU seconds of this process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model, rows = long_row(args) if args.model is None else quickstart_rows(args)
    model = model.to(args.device)
    attach(model)
    rows = [{name: x.to(args.device) for name, x in row.items()} for row in rows]
    full, chunked = heads(args)
    variants = {
        "before": ("sdpa", full),
        "attention": (args.attention, full),
        "log-probs": ("sdpa", chunked),
        "after": (args.attention, chunked),
    }

    def clock() -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if args.clock == "cpu" else time.perf_counter()

    def step(attention: str | None, head: Head) -> float:
        """Loss; gradients are left in the model."""
        model.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for row in rows:
            inputs = {name: x for name, x in row.items() if name != "wanted"}
            hidden = model.get_decoder()(**inputs, memento_implementation=attention).last_hidden_state[0]
            logprobs = head(hidden[:-1], model.get_output_embeddings().weight, row["input_ids"][0, 1:])
            part = -(logprobs * row["wanted"][0, 1:]).sum()
            part.backward()
            loss += part.detach().cpu().double()
        return float(loss / sum(int(row["wanted"].sum()) for row in rows))

    losses = {name: step(*variant) for name, variant in variants.items()}
    spread = max(losses.values()) - min(losses.values())
    assert spread < (1e-4 if args.dtype == "float32" else 1e-2) * abs(losses["before"]), losses
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name, variant in variants.items():
            start = clock()
            step(*variant)
            times[name].append(clock() - start)
    medians = {name: statistics.median(found) for name, found in times.items()}
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    lengths = ", ".join(str(row["input_ids"].shape[1]) for row in rows[:4])
    print(
        f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}, {len(rows)} rows "
        f"({lengths}{', ...' if len(rows) > 4 else ''} tokens), log-probs of {args.head}, medians of {args.rounds}, "
        f"{args.clock} time; losses {losses['before']:.6f}, {spread:.1e} apart"
    )
    for name, seconds in medians.items():
        print(f"  {name:<10}{1e3 * seconds:>10,.0f} ms   {medians['before'] / seconds:.2f}x as fast as before")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"command": sys.argv, "machine": machine, "torch": torch.__version__, "seconds": medians}, file)


if __name__ == "__main__":
    main()
