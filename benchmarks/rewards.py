"""How fast model-written code is verified, beside the plain ways that contain nothing. Interleaved, on all cores.

    python benchmarks/rewards.py
    python benchmarks/rewards.py --rounds 10 --runs 200 --threads 2

Every way runs the same programs with the same inputs and compares their outputs; a wrong output ends the benchmark.

    namespaces   our sandbox at its full level (docs/rewards.md)
    asserts      the same for assert programs: two sandboxes at once, the asserts in one, the solution in the other
    subprocess   our weaker level: limits, a system-call filter, daemons reaped; files of this machine can be read
    fresh        a fresh `python -I` in its own session and temporary folder, with resource limits and a timeout:
                 what open-instruct, verl and SkyRL do where they run code on the machine itself. It contains nothing:
                 daemons stay, files can be read and written, sockets opened
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from memento.rewards.sandbox import Limits, Sandbox

LIMITS = Limits(wall_s=10)

PROGRAMS = (
    ("a, b = map(int, input().split())\nprint(a + b)", "17 25\n", "42\n"),
    (
        "import heapq, sys\nfrom collections import defaultdict\n"
        "lines = sys.stdin.read().split('\\n')\nn = int(lines[0])\nedges = defaultdict(list)\n"
        "for line in lines[1:n]:\n    a, b, w = map(int, line.split())\n    edges[a].append((b, w))\n"
        "seen, heap = {}, [(0, 0)]\nwhile heap:\n    d, v = heapq.heappop(heap)\n    if v in seen: continue\n"
        "    seen[v] = d\n    for u, w in edges[v]: heapq.heappush(heap, (d + w, u))\nprint(seen[n - 1])",
        "200\n" + "".join(f"{v} {v + 1} {v % 7 + 1}\n" for v in range(199)),
        f"{sum(v % 7 + 1 for v in range(199))}\n",
    ),
    (
        "from functools import lru_cache\n@lru_cache(None)\ndef ways(n):\n"
        "    return 1 if n < 2 else ways(n - 1) + ways(n - 2)\nprint(ways(int(input())))",
        "80\n",
        "37889062373143906\n",
    ),
)

ASSERTS = (
    "def merged(a, b):\n    return sorted(a + b)",
    "assert merged([3, 1], [2]) == [1, 2, 3]\nassert merged([], []) == []\nassert merged([5], [5, 4]) == [4, 5, 5]",
)


def in_sandbox(sandbox: Sandbox) -> Callable[[int], bool]:
    def run(n: int) -> bool:
        program, given, wanted = PROGRAMS[n % len(PROGRAMS)]
        return sandbox.run_program(program, given, LIMITS).stdout.decode() == wanted

    return run


def with_asserts(sandbox: Sandbox) -> Callable[[int], bool]:
    return lambda n: sandbox.check_asserts(*ASSERTS, LIMITS).passed


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMITS.memory_mib << 20, LIMITS.memory_mib << 20))
    resource.setrlimit(resource.RLIMIT_CPU, (10, 11))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMITS.file_mib << 20, LIMITS.file_mib << 20))


def fresh(n: int) -> bool:
    program, given, wanted = PROGRAMS[n % len(PROGRAMS)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "solution.py").write_text(program)
        process = subprocess.Popen(
            [os.path.realpath(sys.executable), "-I", "solution.py"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=limit,
            text=True,
        )
        try:
            out, _ = process.communicate(given, timeout=LIMITS.wall_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return False
        return out == wanted


def cpu_seconds(*sandboxes: Sandbox) -> float:
    """User and system time so far: of this process, of children that ended, and of zygotes with all their runs."""
    ours = os.times()
    ticks = 0
    for launcher in [pid for sandbox in sandboxes for pid in sandbox.pids]:
        for pid in (launcher, *map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split())):
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return sum(ours[:4]) + ticks / os.sysconf("SC_CLK_TCK")


def timed(way: Callable[[int], bool], runs: int, threads: int) -> tuple[float, list[float]]:
    """Seconds of all runs together, and of each one."""

    def one(n: int) -> float:
        start = time.perf_counter()
        if not way(n):
            raise SystemExit(f"run {n} had the wrong output")
        return time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        seconds = list(pool.map(one, range(runs)))
    return time.perf_counter() - start, seconds


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def code(rounds: int, runs: int, threads: int) -> None:
    """Print runs a second and latencies of every way, round by round in turns."""
    strong, weak = Sandbox("namespaces", slots=threads), Sandbox("subprocess", slots=threads)
    ways: dict[str, Callable[[int], bool]] = {
        "namespaces": in_sandbox(strong),
        "asserts": with_asserts(strong),
        "subprocess": in_sandbox(weak),
        "fresh": fresh,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    latencies: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, float] = dict.fromkeys(ways, 0.0)
    try:
        for way in ways.values():
            timed(way, 2 * threads, threads)  # zygotes start on first use
        for _ in range(rounds):
            for name, way in ways.items():
                before = cpu_seconds(strong, weak)
                seconds, each = timed(way, runs, threads)
                work[name] += cpu_seconds(strong, weak) - before
                rates[name].append(runs / seconds)
                latencies[name] += each
    finally:
        strong.close()
        weak.close()
    print(f"{strong.description}; {threads} threads, {os.cpu_count()} cores, {rounds} rounds of {runs} runs in turns")
    print(f"load {os.getloadavg()[0]:.1f}\n")
    print("| way | runs/s (median of rounds) | best | to fresh, a round | p50 ms | p99 ms | CPU ms a run |")
    print("|---|---|---|---|---|---|---|")
    for name in ways:
        ratio = statistics.median(a / b for a, b in zip(rates[name], rates["fresh"], strict=True))
        low, high = (1000 * percentile(latencies[name], share) for share in (0.5, 0.99))
        median, best = statistics.median(rates[name]), max(rates[name])
        cpu = 1000 * work[name] / (rounds * runs)
        print(f"| {name} | {median:.0f} | {best:.0f} | {ratio:.2f}x | {low:.1f} | {high:.1f} | {cpu:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--runs", type=int, default=200, help="of each way in each round")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="runs at once")
    arguments = parser.parse_args()
    code(arguments.rounds, arguments.runs, arguments.threads)


if __name__ == "__main__":
    main()
