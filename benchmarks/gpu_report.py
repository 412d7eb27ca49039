"""The Markdown table of what `benchmarks/gpu.sh` has measured, with the targets it is held against.

python benchmarks/gpu_report.py FOLDER
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any


def load(folder: Path, name: str) -> dict[str, Any] | None:
    file = folder / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def attention(found: dict[str, Any]) -> str:
    rows = [
        [
            f"{at['tokens']:,}",
            f"{at['visible_fraction']:.1%}",
            f"{at['ideal_speed_up']:.2f}x",
            name,
            f"{1e3 * r['forward_s']:.2f}",
            f"{1e3 * r['backward_s']:.2f}",
            f"{r['speed_up_over_causal']:.2f}x",
            f"{r['of_ideal']:.0%}",
            "-" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 2**20:,.0f} MiB",
        ]
        for at in found["lengths"]
        for name, r in at["results"].items()
    ]
    return table(
        ["tokens", "visible", "ideal", "", "forward ms", "backward ms", "over causal", "of ideal", "extra memory"], rows
    )


def targets(folder: Path) -> list[tuple[str, str, bool]]:
    """(what, found, whether it is reached)."""
    found: list[tuple[str, str, bool]] = []
    if long := load(folder, "attention"):
        for at in long["lengths"]:
            r = at["results"]
            if at["tokens"] == 32768 and "triton" in r:
                speed, ideal = r["triton"]["speed_up_over_causal"], r["triton"]["of_ideal"]
                found.append(("attention at 32 K at least 3x as fast as causal", f"{speed:.2f}x", speed >= 3))
                found.append(("at least 70 % of causal's FLOP/s on the visible pairs", f"{ideal:.0%}", ideal >= 0.7))
                if "flex" in r:
                    over = r["flex"]["total_s"] / r["triton"]["total_s"]
                    found.append(("ahead of FlexAttention", f"{over:.2f}x", over > 1))
    if head := load(folder, "logprob"):
        r = head["results"]
        best = min((n for n in ("ours", "triton") if n in r), key=lambda n: r[n]["total_s"], default=None)
        if best:
            gib, over = r[best]["peak_bytes"] / 2**30, r[best]["over_three_products"]
            found.append((f"log-probs ({best}): peak below 1 GiB over inputs and gradients", f"{gib:.2f} GiB", gib < 1))
            found.append(("log-probs: at most 1.1x the three products", f"{over:.2f}x", over <= 1.1))
            four = r[best]["over_four_products"]
            found.append(("log-probs: at most 1.1x the four products it does", f"{four:.2f}x", four <= 1.1))
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    print("# Kernels on a GPU\n")
    for name in ("tests", "attention", "dense_mask", "logprob", "compaction", "step"):
        code = folder / f"{name}.rc"
        if not code.exists():
            print(f"- {name}: not run")
        elif name == "tests":
            last = re.findall(r"^.*(?:passed|failed|error).*$", (folder / "tests.log").read_text(), re.MULTILINE)
            print(f"- tests: {last[-1].strip('= ') if last else 'no result'}")
        elif code.read_text().strip() != "0":
            print(f"- {name}: **failed** ({code.read_text().strip()}), see {name}.log")
    print()
    if reached := targets(folder):
        print(table(["target", "found", ""], [[a, b, "reached" if ok else "**not reached**"] for a, b, ok in reached]))
    for name, title in (("attention", "Attention"), ("dense_mask", "Attention against a dense mask")):
        if found := load(folder, name):
            print(f"\n## {title}\n\n{found['machine']}, torch {found['torch']}: `{' '.join(found['command'])}`\n")
            print(attention(found))
    if found := load(folder, "logprob"):
        print(f"\n## Log-probabilities\n\n`{' '.join(found['command'])}`\n")
        rows = [
            [
                name,
                f"{1e3 * r['forward_s']:.1f}",
                f"{1e3 * r['backward_s']:.1f}",
                f"{r['over_three_products']:.2f}x",
                f"{r['over_four_products']:.2f}x",
                f"{r['peak_bytes'] / 2**20:,.0f} MiB",
            ]
            for name, r in found["results"].items()
        ]
        print(table(["", "forward ms", "backward ms", "over three products", "over four", "peak memory"], rows))
    if found := load(folder, "compaction"):
        print(f"\n## KV compaction\n\n`{' '.join(found['command'])}`\n")
        rows = [
            [
                str(at["requests"]),
                f"{at['bytes'] / 2**20:,.1f} MiB",
                f"{at['results']['copy_us']:.0f}",
                name,
                f"{r['us']:.0f}",
                f"{r['over_copy']:.2f}x",
                f"{r['kernel_us']:.0f}",
                f"{r['kernel_over_copy']:.2f}x",
            ]
            for at in found["batches"]
            for name, r in at["results"].items()
            if name != "copy_us"
        ]
        print(table(["requests", "moved", "copy us", "", "us", "over copy", "kernel us", "over copy"], rows))
    if (log := folder / "visibility.log").exists():
        print(f"\n## Visibility from token ids\n\n```\n{log.read_text().strip()}\n```")
    if found := load(folder, "step"):
        print(f"\n## A training step\n\n`{' '.join(found['command'])}`\n")
        seconds = found["seconds"]
        print(
            table(["", "ms", ""], [[n, f"{1e3 * s:.0f}", f"{seconds['before'] / s:.2f}x"] for n, s in seconds.items()])
        )


if __name__ == "__main__":
    main()
