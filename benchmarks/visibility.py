"""How long it takes to read what every token may see from the ids of a large packed batch.

    python benchmarks/visibility.py                      # 1 M tokens on this machine
    python benchmarks/visibility.py --device cuda

`format` is `memento.format.visible_until`, document by document on the CPU; `traces` is `trace_visibility`, all at once
on the device; `window` the same with `lowest_visible` for sliding windows. All must agree. Times are medians.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import random
import statistics
import time

import numpy as np
import torch

from memento.format import NEVER, MementoFormat, visible_until
from memento.kernels import trace_visibility

FMT = MementoFormat(1, 2, 3, 4, evict_delimiters=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--blocks", type=int, default=9, help="a document")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: CPU seconds of this process")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rng = random.Random(0)
    documents: list[list[int]] = []
    while sum(map(len, documents)) < args.tokens:
        ids = [9] * 100
        for _ in range(args.blocks):
            ids += [1, *[7] * max(1, round(rng.gauss(1150, 290))), 2, 3, *[8] * max(1, round(rng.gauss(194, 50))), 4]
        documents.append(ids)
    lengths = [len(ids) for ids in documents]
    row = torch.tensor([[*itertools.chain(*documents)]], device=args.device)
    document = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(lengths))[None].to(args.device)
    arrays = [np.array(ids) for ids in documents]
    starts = [0, *itertools.accumulate(lengths)]

    def by_format() -> torch.Tensor:
        found = [visible_until(ids, FMT) for ids in arrays]
        parts = [np.where(u == NEVER, NEVER, u + at) for u, at in zip(found, starts, strict=False)]
        return torch.from_numpy(np.concatenate(parts))[None]

    works = {
        "format": by_format,
        "traces": lambda: trace_visibility(row, FMT, document=document).visible_until,
        "window": lambda: trace_visibility(row, FMT, document=document, window=args.window).visible_until,
    }
    expected = works["format"]()
    assert all(torch.equal(work().cpu(), expected) for work in works.values())
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(args.rounds):
        for name, work in works.items():
            start = time.process_time() if args.clock == "cpu" else time.perf_counter()
            work()
            if args.device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.process_time() if args.clock == "cpu" else time.perf_counter()) - start)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{machine}, torch {torch.__version__}, {row.numel():,} tokens in {len(documents)} documents, {args.clock} time"
    )
    for name, found in times.items():
        print(f"  {name:<8}{1e3 * statistics.median(found):>10,.1f} ms")


if __name__ == "__main__":
    main()
