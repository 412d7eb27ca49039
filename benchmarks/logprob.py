"""Log-probs and entropies from hidden states and output head: time and peak memory, forward and backward.

    python benchmarks/logprob.py                                                       # this machine, a small model
    python benchmarks/logprob.py --device cuda --dtype bfloat16 --tokens 32768 --width 4096 --words 151936

    matmul      the three products alone (logits, and the gradients of hidden states and head), chunked over tokens so
                that they fit: what no method can do without. A method that does not keep the logits makes them again in
                backward, a fourth product.
    ours        memento.kernels.linear_logprobs
    triton      the same with Triton kernels for what is done to a tile (GPU)
    trl         the function behind TRL's fused head, `trl.kernels.ChunkedLogProbFunction`
    full        fp32 logits of all tokens at once, then log-softmax, as OpenRLHF's `log_probs_from_logits` does
    liger       LigerFusedLinearCrossEntropyLoss, if `liger_kernel` is installed (GPU): the mean negative
                log-probability alone, without entropy, its gradients made in forward
    liger-grpo  LigerFusedLinearGRPOLoss, likewise (also on CPU): the whole GRPO loss in chunks, without entropy

The loss is sum(a_t logprob_t) + sum(b_t entropy_t) with random a and b (`--no-entropy` leaves the second out). Peak
memory is what is allocated beyond inputs and gradients. Methods take turns; times are medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile

from memento.kernels.logprobs import linear_logprobs

Pair = tuple[torch.Tensor, torch.Tensor | None]
Method = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Pair]


def methods(args: argparse.Namespace) -> dict[str, Method]:
    def ours(implementation: str) -> Method:
        def run(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> Pair:
            return linear_logprobs(
                hidden, head, targets, 1.0, args.chunk_tokens, args.chunk_words, implementation=implementation
            )

        return run

    def full(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> Pair:
        logits = (hidden @ head.T).float()
        log_p = logits.log_softmax(-1)
        chosen = log_p.gather(-1, targets[:, None])[:, 0]
        return chosen, None if args.no_entropy else -(log_p.exp() * log_p).sum(-1)

    def trl(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> Pair:
        from trl.kernels import ChunkedLogProbFunction

        outputs = () if args.no_entropy else ("entropy",)
        out: Any = ChunkedLogProbFunction.apply(hidden, head, None, targets, 1.0, 8192, None, 1.0, outputs)
        return out[0], out[1]

    def liger(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> Pair:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

        return -LigerFusedLinearCrossEntropyLoss(reduction="mean")(head, hidden, targets)[None], None

    def liger_grpo(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> Pair:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # pyright: ignore[reportMissingImports]

        # It makes the logits of `chunk_size` whole sequences at a time: here a sequence is a chunk.
        rows = max(1, len(hidden) // args.chunk_tokens)
        mask, advantages = torch.ones_like(targets.view(rows, -1)), torch.randn(rows, device=hidden.device)
        loss: Any = LigerFusedLinearGRPOLoss(beta=0.0, chunk_size=1, compiled=False, use_ref_model=False)(
            hidden.view(rows, -1, hidden.shape[1]), head, targets.view(rows, -1), mask, advantages
        )
        return loss[0][None], None

    every: dict[str, Method] = {"ours": ours("torch"), "triton": ours("triton"), "trl": trl, "full": full}
    every |= {"liger": liger, "liger-grpo": liger_grpo}
    return {name: every[name] for name in args.only if name in every}


def products(args: argparse.Namespace, hidden: torch.Tensor, head: torch.Tensor) -> None:
    """The three products and nothing else."""
    d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head)
    for start in range(0, len(hidden), args.product_tokens):
        here = hidden[start : start + args.product_tokens]
        logits = here @ head.T
        torch.mm(logits, head, out=d_hidden[start : start + args.product_tokens])
        d_head.addmm_(logits.T, here)


def peak_bytes(work: Callable[[], None], cuda: bool) -> int:
    """Peak of what `work` allocates, over what was there before."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    events = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    for event in sorted((e for e in cast(Any, events) if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--words", type=int, default=32000)
    parser.add_argument("--chunk-tokens", type=int, default=1024)
    parser.add_argument("--chunk-words", type=int, default=None)
    parser.add_argument("--product-tokens", type=int, default=4096, help="chunk of `matmul`")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: CPU seconds of this process")
    parser.add_argument("--only", nargs="+", choices=["ours", "triton", "trl", "full", "liger", "liger-grpo"])
    parser.add_argument("--no-entropy", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    args.only = args.only or ["ours", *(["triton"] if cuda else ["trl"]), "full"]
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.tokens, args.width, device=args.device).to(dtype).requires_grad_()
    head = (torch.randn(args.words, args.width, device=args.device) / args.width**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, args.words, (args.tokens,), device=args.device)
    weights = torch.randn(2, args.tokens, device=args.device)

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.process_time() if args.clock == "cpu" else time.perf_counter()

    def one_pass(method: Method) -> tuple[float, float]:
        start = clock()
        logprobs, entropy = method(hidden, head, targets)
        middle = clock()
        loss = (logprobs * weights[0, : len(logprobs)]).sum()
        if entropy is not None and not args.no_entropy:
            loss = loss + (entropy * weights[1]).sum()
        torch.autograd.grad(loss, (hidden, head))
        return middle - start, clock() - middle

    def only_products() -> tuple[float, float]:
        start = clock()
        with torch.no_grad():
            products(args, hidden, head)
        return 0.0, clock() - start

    machine = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    print(
        f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}, {args.tokens:,} "
        f"tokens, {args.words:,} words, width {args.width:,}, medians of {args.rounds}, {args.clock} time"
        f"{', log-probs alone' if args.no_entropy else ''}"
    )
    works: dict[str, Callable[[], tuple[float, float]]] = {"matmul": only_products}
    works |= {name: (lambda m=method: one_pass(m)) for name, method in methods(args).items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    peaks, needed = {}, hidden.nbytes + head.nbytes
    for name, work in list(works.items()):
        try:
            work()  # compilation and first touches
            peaks[name] = peak_bytes(lambda w=work: w() and None, cuda) - needed
        except torch.cuda.OutOfMemoryError:
            print(f"  {name}: out of memory")
            del works[name], times[name]
    for _ in range(args.rounds):
        for name, work in works.items():
            times[name].append(work())
    bound = statistics.median(sum(pair) for pair in times["matmul"])
    print(f"  {'':<8}{'forward':>12}{'backward':>12}{'both':>12}   over three products (over four)   peak memory")
    results: dict[str, Any] = {}
    for name, pairs in times.items():
        forward, backward = (statistics.median(x) for x in zip(*pairs, strict=True))
        both = statistics.median(sum(pair) for pair in pairs)
        row = "".join(f"{1e3 * x:>9,.1f} ms" for x in (forward, backward, both))
        over = f"{both / bound:.2f}x ({both / bound * 0.75:.2f}x)"
        print(f"  {name:<8}{row}   {over:<34}{peaks[name] / 2**20:>9,.1f} MiB")
        results[name] = {"forward_s": forward, "backward_s": backward, "total_s": both, "peak_bytes": peaks[name]}
        results[name] |= {"over_three_products": both / bound, "over_four_products": 0.75 * both / bound}
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"command": sys.argv, "machine": machine, "torch": torch.__version__, "results": results},
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
