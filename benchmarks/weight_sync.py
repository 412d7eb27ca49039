"""How long new weights take from the learner's memory into running engines, stage by stage.

    python benchmarks/weight_sync.py                          # 100 M parameters in fp32, one engine on the CPU
    python benchmarks/weight_sync.py --engines 2 --in-flight --json weight_sync.json
    python benchmarks/weight_sync.py --kinds thread process   # the engine core in the actor, or in its own process
    python benchmarks/weight_sync.py --layers 2 --hidden 192  # is it all in order?

The whole path of `memento rl`: `write_weights` as a learner rank does (to shared memory, with checksum), then
`RolloutPool.update_weights`: every engine verifies the file while it goes on sampling, pauses, loads, drops the old
keys and resumes. With `--in-flight` completions run meanwhile, and go on. `total` is what the training loop waits for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from memento.config import FormatConfig, RolloutConfig
from memento.problems import Problem, ProblemKind
from memento.rollout.pool import RolloutPool
from memento.rollout.weights import shared_memory_folder, write_weights
from memento.tiny import write_tiny_model
from memento.trajectory import RolloutRequest, SamplingParams


def measure(args: argparse.Namespace, model: Path, weights: Path) -> dict[str, Any]:
    """All rounds, the kinds of engines in turn."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(model / "model.safetensors")
    request = RolloutRequest(
        problem=Problem(id="p", kind=ProblemKind.MATH, prompt="Count.", answer="1"),
        group_id="p",
        group_size=args.completions,
        sampling=SamplingParams(temperature=1.0, max_tokens=args.tokens),
        seed=0,
    )
    kinds: dict[str, Any] = {kind: {"rounds": [], "tokens_per_s": []} for kind in args.kinds}
    with ExitStack() as pools, ThreadPoolExecutor(1) as threads:
        running = {}
        for kind in args.kinds:
            config = RolloutConfig(
                engines=args.engines,
                device=args.device,
                dtype="float32",
                kv_cache_mib=args.kv_cache_mib,
                max_num_seqs=args.completions,
                max_model_len=2000,
                engine_process=kind == "process",
                cpus=0.5,
            )
            running[kind] = pools.enter_context(RolloutPool(config, FormatConfig(), str(model)))
            kinds[kind]["start_s"] = running[kind].start_s
        update = None
        for version in range(1, args.rounds + 2):
            for tensor in tensors.values():
                tensor += 0.001 * torch.randn(())
            for kind, pool in running.items():
                began = time.perf_counter()
                tokens = sum(len(trajectory.completion_ids) for trajectory in pool.generate(request))
                tokens_per_s = tokens / (time.perf_counter() - began)
                flight = threads.submit(pool.generate, request) if args.in_flight else None
                while flight and not flight.done() and not all(info and info.active for info in pool.infos()):
                    time.sleep(0.02)
                began = time.perf_counter()
                update = write_weights(tensors, weights, version)
                written = time.perf_counter()
                pool.update_weights(update)
                ended = time.perf_counter()
                stages = [info.update_s for info in pool.infos() if info]
                if flight is not None:
                    flight.result()
                if version > 1:  # the first one finds cold pages and compiles
                    slowest = {name: max(stage[name] for stage in stages) for name in stages[0]}
                    kinds[kind]["rounds"].append({"write": written - began, **slowest, "total": ended - began})
                    kinds[kind]["tokens_per_s"].append(tokens_per_s)
    assert update is not None
    return {"parameters": sum(tensor.numel() for tensor in tensors.values()), "bytes": update.bytes, "kinds": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kinds", nargs="+", choices=["thread", "process"], default=["thread"], help="where the engine core runs"
    )
    parser.add_argument("--engines", type=int, default=1, help="of each kind")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=15, help="default: 103 M parameters")
    parser.add_argument("--completions", type=int, default=16, help="a round, timed between two updates")
    parser.add_argument("--tokens", type=int, default=50, help="a completion, at most")
    parser.add_argument("--in-flight", action="store_true", help="generate the same once more during each update")
    parser.add_argument("--kv-cache-mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(
            Path(folder) / "model",
            seed=0,
            hidden_size=args.hidden,
            layers=args.layers,
            heads=args.hidden // 64,
            kv_heads=max(args.hidden // 192, 1),
            head_dim=64,
            intermediate_size=3 * args.hidden,
        )
        weights = shared_memory_folder()
        try:
            result = measure(args, model, weights)
        finally:
            shutil.rmtree(weights, ignore_errors=True)
    machine = f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"
    size = result["bytes"] / 1e9
    print(f"{machine}; {result['parameters'] / 1e6:.1f} M parameters in fp32 ({size:.2f} GB), {args.rounds} rounds")
    for kind, found in result["kinds"].items():
        print(
            f"{args.engines} engines, core in a {kind}: started in {found['start_s']:.1f} s, "
            f"{statistics.median(found['tokens_per_s']):,.0f} tokens/s with {args.completions} completions"
        )
        for stage in found["rounds"][0]:
            seconds = [entry[stage] for entry in found["rounds"]]
            median = statistics.median(seconds)
            rate = f"  {size / median:5.1f} GB/s" if stage in ("write", "verify", "load", "total") else ""
            print(f"  {stage:<26}{median:7.3f} s ({min(seconds):.3f} - {max(seconds):.3f}){rate}")
    if args.json:
        Path(args.json).write_text(json.dumps({"command": sys.argv, "machine": machine, **result}, indent=1))


if __name__ == "__main__":
    main()
