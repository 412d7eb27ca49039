"""What one eviction costs against the time to copy as many bytes.

    python benchmarks/compaction.py                                         # this machine, 4 layers
    python benchmarks/compaction.py --device cuda --dtype bfloat16 --layers 36 --kv-heads 8 --head-dim 128

A batch of requests whose blocks are finished in the same step: in each, `--block-tokens` leave and the `--tokens`
behind them move down, in every layer. Pages are scattered over the pool. The copy bound is the time of a plain copy of
the same bytes, measured here between two buffers that are not in any cache. Times are medians; implementations take
turns.

`packed` is the layout of vLLM's CPU kernels, where a page's values are permuted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch

from memento.kernels.compaction import Moves, PagedCache, compact


def requests(args: argparse.Namespace, count: int, seed: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """(sources and targets of each request, pages of the pool)."""
    rng = np.random.default_rng(seed)
    held = args.prompt_tokens + args.block_tokens + args.tokens
    pages = -(-held // args.page_tokens)
    shuffled = rng.permutation(pages * count)
    moves = []
    for i in range(count):
        at = np.arange(held)
        slots = shuffled[i * pages : (i + 1) * pages][at // args.page_tokens] * args.page_tokens + at % args.page_tokens
        moves.append((slots[held - args.tokens :], slots[args.prompt_tokens : args.prompt_tokens + args.tokens]))
    return moves, pages * count


def measure(args: argparse.Namespace, count: int) -> dict[str, Any]:
    dtype = getattr(torch, args.dtype)
    given, pages = requests(args, count, args.seed)
    content = 2 * args.head_dim
    caches: dict[str, PagedCache] = {}
    for name in args.only:
        layers = tuple(
            torch.ones(pages, args.kv_heads, args.page_tokens, content, device=args.device, dtype=dtype)
            for _ in range(args.layers)
        )
        elements = torch.randperm(args.page_tokens * content).view(args.page_tokens, content)
        caches[name] = PagedCache(layers, elements.to(args.device) if name == "packed" else None)
    moved = count * args.tokens * next(iter(caches.values())).token_bytes
    # As much again on each side as any cache holds, so that a copy reads and writes memory; touched once before.
    copies = max(1, 2**28 // moved)
    a, b = (torch.ones(copies, moved, dtype=torch.uint8, device=args.device) for _ in range(2))

    def clock() -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if args.clock == "cpu" else time.perf_counter()

    def seconds(work: Any, *given: Any) -> float:
        start = clock()
        work(*given)
        return clock() - start

    def whole(cache: PagedCache, implementation: str) -> None:
        """As the engine does it: the plan's arrays go to the device first."""
        compact(cache, Moves.of(given, args.device), implementation=implementation)

    on_device = Moves.of(given, args.device)
    times: dict[str, list[float]] = {name: [] for name in ("copy", *args.only)}
    kernel: dict[str, list[float]] = {name: [] for name in args.only}
    for turn in range(args.rounds + 1):
        found = {"copy": seconds(b[turn % copies].copy_, a[turn % copies])}
        for name, cache in caches.items():
            implementation = "triton" if name == "triton" else "torch"
            found[name] = seconds(whole, cache, implementation)
            kernel[name].append(seconds(lambda c, i: compact(c, on_device, implementation=i), cache, implementation))
        if turn:
            for name, value in found.items():
                times[name].append(value)
    bound = statistics.median(times["copy"])
    print(f"\n{count} requests, {moved / 2**20:,.1f} MiB: a copy takes {1e6 * bound:,.0f} us", end="")
    print(f" ({2 * moved / bound / 1e9:,.1f} GB/s read and written)")
    results: dict[str, Any] = {"copy_us": 1e6 * bound}
    for name in args.only:
        took, alone = statistics.median(times[name]), statistics.median(kernel[name][1:])
        print(
            f"  {name:<8}{1e6 * took:>12,.0f} us {1e6 * took / count:>10,.0f} us an eviction"
            f"   {took / bound:>6.2f}x the copy; plan on the device before {1e6 * alone:,.0f} us ({alone / bound:.2f}x)"
        )
        results[name] = {"us": 1e6 * took, "us_per_eviction": 1e6 * took / count, "kernel_us": 1e6 * alone}
        results[name] |= {"over_copy": took / bound, "kernel_over_copy": alone / bound}
    return {"requests": count, "bytes": moved, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-tokens", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=500)
    parser.add_argument("--block-tokens", type=int, default=1150, help="tokens that leave")
    parser.add_argument("--tokens", type=int, default=200, help="tokens behind them, which move")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="+", choices=["torch", "packed", "triton"])
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: CPU seconds of this process")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args()
    args.only = args.only or (["torch", "triton"] if args.device == "cuda" else ["torch", "packed"])
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{machine}, torch {torch.__version__}, {args.dtype}, {args.layers} layers, {args.kv_heads} KV heads of "
        f"{args.head_dim}, pages of {args.page_tokens}, {args.tokens} tokens move, medians of {args.rounds}, "
        f"{args.clock} time"
    )
    found = [measure(args, count) for count in args.requests]
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"command": sys.argv, "machine": machine, "torch": torch.__version__, "batches": found}, file)


if __name__ == "__main__":
    main()
