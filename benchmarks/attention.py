"""Memento attention against causal and dense-mask attention: time and memory, forward and backward.

    python benchmarks/attention.py                                   # this machine, 1 K to 8 K tokens
    python benchmarks/attention.py --tokens 4096 --rounds 7 --json attention.json
    python benchmarks/attention.py --tokens 16384 --blocks 6 --block-tokens 42 --memento-tokens 8 \\
        --prompt-tokens 30 --heads 4 --kv-heads 2 --head-dim 32      # packed rows of the quickstart
    python benchmarks/attention.py --device cuda --dtype bfloat16 --heads 32 --kv-heads 8 --head-dim 128 \\
        --tokens 4096 8192 16384 32768 65536

Traces have the average block and memento lengths of OpenMementos (MEMENTO, arXiv 2604.09852, section 2: 1,150 and
194 tokens). For each length the ideal speed-up is the number of (query, key) pairs of causal attention over the number
that the trace sees; the reached one is a ratio of times, and `of ideal` is reached over ideal. The implementations
run in turn, round by round, so that a busy machine slows all of them; times are medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from memento.format import NEVER, MementoFormat
from memento.kernels import Visibility, trace_visibility
from memento.kernels.attention import IMPLEMENTATIONS, attend

FMT = MementoFormat(1, 2, 3, 4, evict_delimiters=False)
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def traces(args: argparse.Namespace, tokens: int) -> Visibility:
    """A row of exactly `tokens` tokens: one long trace, or packed ones of `args.blocks` blocks."""
    rng = random.Random(args.seed)

    def length(mean: int) -> int:
        return max(1, round(rng.gauss(mean, args.spread * mean)))

    documents: list[list[int]] = []
    while sum(map(len, documents)) < tokens:
        ids = [9] * args.prompt_tokens
        while (args.blocks == 0 and len(ids) < tokens) or ids.count(FMT.block_start) < args.blocks:
            ids += [1] + [7] * length(args.block_tokens) + [2, 3] + [8] * length(args.memento_tokens) + [4]
        documents.append(ids + [9] * args.prompt_tokens)
    documents[-1] = documents[-1][: len(documents[-1]) - (sum(map(len, documents)) - tokens)]
    token_ids = torch.tensor([[*itertools.chain(*documents)]], device=args.device)
    if len(documents) == 1:
        return trace_visibility(token_ids, FMT)
    numbers = [[i] * len(d) for i, d in enumerate(documents)]
    document = torch.tensor([[*itertools.chain(*numbers)]], device=args.device)
    return trace_visibility(token_ids, FMT, document=document)


def visible_pairs(visibility: Visibility) -> int:
    until, document = visibility.visible_until[0].cpu(), visibility.document
    ends = torch.full_like(until, len(until))
    if document is not None:
        lengths = torch.unique_consecutive(document[0].cpu(), return_counts=True)[1]
        ends = lengths.cumsum(0).repeat_interleave(lengths)
    return int((torch.minimum(until, ends) - torch.arange(len(until))).sum())


def contestants(args: argparse.Namespace, seen: Visibility, causal: Visibility) -> dict[str, Attention]:
    """name -> attention. `causal` computes something else: it is the yardstick."""
    mask = seen.mask if "dense mask" in args.only else None

    def dense_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # Heads are repeated, as transformers does it: with a mask no fused GPU kernel shares them.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def whole_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    found: dict[str, Attention] = {}
    for name in args.only:
        if name == "causal":
            found[name] = (
                whole_row if causal.document is None else partial(attend, visibility=causal, implementation="sdpa")
            )
        elif name == "dense mask":
            found[name] = dense_mask
        else:
            found[name] = partial(attend, visibility=seen, implementation=name)
    return found


def one_pass(
    attention: Attention, inputs: list[torch.Tensor], grad: torch.Tensor, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds of one forward and one backward."""
    start = clock()
    out = attention(*inputs)
    middle = clock()
    torch.autograd.grad(out, inputs, grad)
    return middle - start, clock() - middle


def peak_extra_bytes(attention: Attention, inputs: list[torch.Tensor], grad: torch.Tensor) -> int:
    """Peak of what is allocated during forward and backward, without the output and the three gradients."""
    needed = sum(x.nbytes for x in (*inputs, grad))
    if inputs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_pass(attention, inputs, grad, time.perf_counter)
        return torch.cuda.max_memory_allocated() - before - needed
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        one_pass(attention, inputs, grad, time.perf_counter)
    held = peak = 0
    events = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    for event in sorted((e for e in cast(Any, events) if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak - needed


def measure(args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    seen = traces(args, tokens)
    causal = Visibility(torch.full_like(seen.visible_until, NEVER), None, seen.document)
    pairs, causal_pairs = visible_pairs(seen), visible_pairs(causal)
    ideal = causal_pairs / pairs
    dtype = getattr(torch, args.dtype)
    inputs = [
        torch.randn(1, tokens, heads, args.head_dim, device=args.device, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (args.heads, args.kv_heads, args.kv_heads)
    ]
    grad = torch.randn_like(inputs[0])

    def wall() -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    clock = time.process_time if args.clock == "cpu" else wall
    attentions = contestants(args, seen, causal)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in attentions}
    extra: dict[str, int] = {}
    for name, attention in attentions.items():
        one_pass(attention, inputs, grad, clock)  # plans, compilation, first touches
        if not args.no_memory:
            extra[name] = peak_extra_bytes(attention, inputs, grad)
            if name == "dense mask":
                extra[name] += seen.mask.nbytes
    for _ in range(args.rounds):
        for name, attention in attentions.items():
            times[name].append(one_pass(attention, inputs, grad, clock))

    results: dict[str, Any] = {}
    medians = {name: statistics.median(f + b for f, b in passes) for name, passes in times.items()}
    print(
        f"\n{tokens:,} tokens: {pairs / causal_pairs:.1%} of the causal pairs are visible, ideal speed-up {ideal:.2f}x"
    )
    print(f"  {'':<12}{'forward':>12}{'backward':>12}{'both':>12}{'extra memory':>16}   over causal (of ideal)")
    for name, passes in times.items():
        forward, backward = (statistics.median(x) for x in zip(*passes, strict=True))
        reached = medians["causal"] / medians[name] if "causal" in medians else float("nan")
        memory = f"{extra[name] / 2**20:,.1f} MiB" if name in extra else "-"
        row = "".join(f"{1e3 * x:>9,.1f} ms" for x in (forward, backward, medians[name]))
        print(f"  {name:<12}{row}{memory:>16}   {reached:.2f}x ({reached / ideal:.0%})", flush=True)
        results[name] = {
            "forward_s": forward,
            "backward_s": backward,
            "total_s": medians[name],
            "extra_bytes": extra.get(name),
            "speed_up_over_causal": reached,
            "of_ideal": reached / ideal,
            "speed_up_over_dense_mask": medians["dense mask"] / medians[name] if "dense mask" in medians else None,
        }
    return {"tokens": tokens, "visible_fraction": pairs / causal_pairs, "ideal_speed_up": ideal, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="row lengths")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's own choice)")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: CPU seconds of this process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument(
        "--tiling",
        type=int,
        nargs=8,
        metavar="N",
        help="of triton: queries, keys, warps, stages, of both passes",
    )
    parser.add_argument("--only", nargs="+", help="causal, 'dense mask', " + ", ".join(IMPLEMENTATIONS))
    parser.add_argument(
        "--blocks", type=int, default=0, help="blocks a trace, traces being packed; 0: one endless trace"
    )
    parser.add_argument("--block-tokens", type=int, default=1150)
    parser.add_argument("--memento-tokens", type=int, default=194)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--spread", type=float, default=0.25, help="standard deviation of lengths over their mean")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args()
    ours = ["triton", "flex"] if args.device == "cuda" else ["segments"]
    args.only = args.only or ["causal", "dense mask", *ours]
    if unknown := set(args.only) - {"causal", "dense mask", *IMPLEMENTATIONS}:
        parser.error(f"unknown in --only: {', '.join(sorted(unknown))}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.tiling:
        from memento.kernels import tiles, triton_attention

        chosen = tiles.Tiling(*args.tiling[:4]), tiles.Tiling(*args.tiling[4:])
        triton_attention.tilings = lambda *_: chosen
    torch.manual_seed(args.seed)

    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}, "
        f"{args.heads} heads of {args.head_dim}, {args.kv_heads} KV heads, medians of {args.rounds}, {args.clock} time"
    )
    results = [measure(args, tokens) for tokens in args.tokens]
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"command": sys.argv, "machine": machine, "torch": torch.__version__, "lengths": results},
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
