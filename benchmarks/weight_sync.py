"""How long new weights take from the learner's memory into running engines, stage by stage.

    python benchmarks/weight_sync.py                          # 100 M parameters in fp32, one engine on the CPU
    python benchmarks/weight_sync.py --engines 2 --in-flight --json weight_sync.json
    python benchmarks/weight_sync.py --kinds thread process   # the engine core in the actor, or in its own process
    python benchmarks/weight_sync.py --transports file broadcast ipc
    python benchmarks/weight_sync.py --layers 2 --hidden 192  # is it all in order?

The whole path of `memento rl`: `write_weights` as a learner rank does (to shared memory, with checksum), then
`RolloutPool.update_weights`: every engine verifies the file while it goes on sampling, pauses, loads, drops the old
keys and resumes. With `--in-flight` completions run meanwhile, and go on. `total` is what the training loop waits for.

The other transports send the same weights from this process, which stands for learner rank 0, in buckets; their `load`
is receiving, checking and loading together.
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

from memento.config import FormatConfig, RolloutConfig, WeightSyncConfig
from memento.problems import Problem, ProblemKind
from memento.rl.weight_sync import ChannelSync, WeightSync
from memento.rollout.channel_records import LOOPBACK, ChannelSettings, TensorSpec
from memento.rollout.pool import RolloutPool
from memento.rollout.weights import WeightUpdate, shared_memory_folder, write_weights
from memento.tiny import write_tiny_model
from memento.trajectory import RolloutRequest, SamplingParams


class OneRank:
    """A learner of one rank, as far as weight sync sees it.

    Attributes:
        tensors: its weights, by Hugging Face's names.
    """

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.tensors = tensors

    def export_weights(self, folder: str | Path, version: int) -> WeightUpdate:
        """See `memento.rl.learner.Learner`, as for all that follow."""
        return write_weights(self.tensors, folder, version)

    def tensor_specs(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec.of(name, tensor) for name, tensor in self.tensors.items())

    def open_store(self, timeout_s: float) -> tuple[str, int]:
        from memento.rollout.weight_channel import open_store

        self.store = open_store(timeout_s)
        return LOOPBACK, self.store.port

    def join_channel(self, settings: ChannelSettings) -> None:
        import torch

        from memento.rollout.weight_channel import WeightChannel

        self.channel = WeightChannel(settings, 0, torch.device("cpu"), LOOPBACK, self.store)

    def send_weights(self, version: int) -> None:
        self.channel.send(iter(self.tensors.items()), version)


def no_fallback(message: str) -> None:
    """Weights that went by file after all are no measurement of something else."""
    raise RuntimeError(message)


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
    learner = OneRank(tensors)
    ways = [f"{kind}, {transport}" for kind in args.kinds for transport in args.transports]
    found: dict[str, Any] = {way: {"rounds": [], "tokens_per_s": []} for way in ways}
    with ExitStack() as pools, ThreadPoolExecutor(1) as threads:
        push: dict[str, Any] = {}
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
            pool = pools.enter_context(RolloutPool(config, FormatConfig(), str(model)))
            for transport in args.transports:
                way = f"{kind}, {transport}"
                running[way], found[way]["start_s"] = pool, pool.start_s
                if transport == "file":
                    push[way] = WeightSync(learner, pool, weights).push
                    continue
                sync = ChannelSync(
                    learner,
                    pool,
                    weights,
                    transport=transport,
                    config=WeightSyncConfig(bucket_mib=args.bucket_mib),
                    ranks=1,
                    one_machine=True,
                    say=no_fallback,
                )
                push[way] = sync.push
        update, version = None, 0
        for round_number in range(args.rounds + 1):
            for tensor in tensors.values():
                tensor += 0.001 * torch.randn(())
            for way, pool in running.items():
                version += 1
                began = time.perf_counter()
                tokens = sum(len(trajectory.completion_ids) for trajectory in pool.generate(request))
                tokens_per_s = tokens / (time.perf_counter() - began)
                flight = threads.submit(pool.generate, request) if args.in_flight else None
                while flight and not flight.done() and not all(info and info.active for info in pool.infos()):
                    time.sleep(0.02)
                began = time.perf_counter()
                update = push[way](version)
                ended = time.perf_counter()
                stages = [info.update_s for info in pool.infos() if info]
                if flight is not None:
                    flight.result()
                if round_number > 0:  # the first one finds cold pages, compiles, opens channels
                    slowest = {name: max(stage[name] for stage in stages) for name in stages[0]}
                    written = {"write": update.seconds} if isinstance(update, WeightUpdate) else {}
                    found[way]["rounds"].append({**written, **slowest, "total": ended - began})
                    found[way]["tokens_per_s"].append(tokens_per_s)
    assert update is not None
    return {"parameters": sum(tensor.numel() for tensor in tensors.values()), "bytes": update.bytes, "ways": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kinds", nargs="+", choices=["thread", "process"], default=["thread"], help="where the engine core runs"
    )
    parser.add_argument("--transports", nargs="+", choices=["file", "broadcast", "ipc"], default=["file"])
    parser.add_argument("--bucket-mib", type=int, default=WeightSyncConfig().bucket_mib, help="of broadcast and ipc")
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
    for way, found in result["ways"].items():
        print(
            f"{args.engines} engines, core in a {way}: started in {found['start_s']:.1f} s, "
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
