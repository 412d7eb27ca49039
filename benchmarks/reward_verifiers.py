"""How fast answers are verified, beside plain math-verify. Two processes each, interleaved, medians over rounds.

    python benchmarks/reward_verifiers.py
    python benchmarks/reward_verifiers.py --rounds 9 --workers 2 --group 8

The answers are those of tests/rewards/triples.jsonl: 528 golds, each with an equivalent and a different boxed answer.

    ours      `Scorer`: what is written plainly in this process, the rest in killable workers, the deadline kept here
    sympy     the same, only the answers that need a worker
    groups    the same answers as an RL step has them: groups of one gold and `--group` samples, half of them right
    plain     math-verify's own parse and verify, its SIGALRM timeouts on, in as many processes; a bomb or a
              segmentation fault takes the process along, and in a thread it raises

Every way starts a round with nothing remembered. Verdicts of `ours` are checked against the file. CPU seconds are those
of all processes of a way, so they say more than wall time on a machine that does other work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memento.config import RewardsConfig
from memento.problems import Problem, ProblemKind
from memento.rewards.answers import last_boxed
from memento.rewards.math_verifier import gold_text, same_without_sympy
from memento.rewards.scoring import Scorer

TRIPLES = Path(__file__).parent.parent / "tests" / "rewards" / "triples.jsonl"


class Job(NamedTuple):
    """One verification, and whether it must come out right."""

    problem: Problem
    completion: str
    right: bool


class Measured(NamedTuple):
    """One round of one way."""

    per_s: float
    per_cpu_s: float
    p50_ms: float
    p99_ms: float


def jobs_of(triples: Sequence[dict[str, str]], group: int) -> list[Job]:
    """`group` samples of every triple, alternately its equivalent and its different answer."""
    jobs = []
    for number, triple in enumerate(triples):
        problem = Problem(id=str(number), kind=ProblemKind.MATH, prompt="?", answer=triple["gold"])
        for sample in range(group):
            answer = triple["equivalent" if sample % 2 == 0 else "different"]
            jobs.append(Job(problem, f"Therefore it is \\boxed{{{answer}}}.", sample % 2 == 0))
    return jobs


def needs_sympy(job: Job) -> bool:
    """Whether a worker is asked about it."""
    return same_without_sympy(gold_text(job.problem), last_boxed(job.completion) or "") is None


def cpu_of(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def with_scorer(jobs: Sequence[Job], workers: int) -> Measured:
    """Our way, from as many threads as there are workers. Their start is not counted: it happens once a run."""
    scorer = Scorer(RewardsConfig(workers=workers))
    warm = Problem(id="warm", kind=ProblemKind.MATH, prompt="?", answer="x+y")
    with ThreadPoolExecutor(workers) as threads:
        try:
            while len(scorer.worker_pids) < workers:
                answers = [f"\\boxed{{y+x+{n}}}" for n in range(100 * workers)]
                list(threads.map(lambda text: scorer.score(warm, text), answers))
            pids = scorer.worker_pids
            before, own = sum(map(cpu_of, pids)), time.process_time()
            began = time.perf_counter()
            results = list(threads.map(lambda job: scorer.score(job.problem, job.completion), jobs))
            wall = time.perf_counter() - began
            cpu = sum(map(cpu_of, pids)) - before + time.process_time() - own
        finally:
            scorer.close()
    wrong = [job for job, result in zip(jobs, results, strict=True) if result.score != float(job.right)]
    if wrong:
        raise SystemExit(f"{len(wrong)} verdicts are not those of {TRIPLES.name}, first: {wrong[0]}")
    p50, p99 = np.percentile([result.seconds for result in results], [50, 99])
    return Measured(len(jobs) / wall, len(jobs) / max(cpu, 1e-9), 1000 * float(p50), 1000 * float(p99))


def plain_share(pairs: Sequence[tuple[str, str]]) -> tuple[list[float], float]:
    """What a trainer without workers does with its share of answers: seconds of each, and CPU seconds."""
    import math_verify

    math_verify.verify(math_verify.parse("$x+1$"), math_verify.parse("$1+x$"))  # imports and tables are not counted
    seconds, cpu = [], time.process_time()
    for gold, completion in pairs:
        began = time.perf_counter()
        math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(completion))
        seconds.append(time.perf_counter() - began)
    return seconds, time.process_time() - cpu


def plain(jobs: Sequence[Job], processes: ProcessPoolExecutor, workers: int) -> Measured:
    """Plain math-verify, the jobs dealt out to processes that run already."""
    pairs = [(gold_text(job.problem), job.completion) for job in jobs]
    began = time.perf_counter()
    shares = list(processes.map(plain_share, [pairs[n::workers] for n in range(workers)]))
    wall = time.perf_counter() - began
    seconds = [s for share, _ in shares for s in share]
    p50, p99 = np.percentile(seconds, [50, 99])
    return Measured(len(jobs) / wall, len(jobs) / sum(c for _, c in shares), 1000 * float(p50), 1000 * float(p99))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--group", type=int, default=8, help="samples of a problem in `groups`")
    parser.add_argument("--limit", type=int, default=None, help="about so many golds, of every kind")
    options = parser.parse_args()
    triples = [json.loads(line) for line in TRIPLES.read_text(encoding="utf-8").splitlines()]
    triples = triples[:: max(1, len(triples) // (options.limit or len(triples)))]  # of every kind
    jobs, groups = jobs_of(triples, 2), jobs_of(triples, options.group)
    hard = [job for job in jobs if needs_sympy(job)]
    print(f"{len(triples)} golds, {len(jobs)} answers, {len(hard)} of them need SymPy; {os.cpu_count()} cores")
    rounds: dict[str, list[Measured]] = {}
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as processes:
        plain(jobs[:8], processes, options.workers)
        ways: dict[str, Callable[[], Measured]] = {
            "ours": lambda: with_scorer(jobs, options.workers),
            "sympy": lambda: with_scorer(hard, options.workers),
            "groups": lambda: with_scorer(groups, options.workers),
            "plain": lambda: plain(jobs, processes, options.workers),
        }
        for number in range(options.rounds):
            for name, way in ways.items():
                rounds.setdefault(name, []).append(way())
            print(
                f"round {number + 1}: " + ", ".join(f"{n} {m[-1].per_s:.0f}/s" for n, m in rounds.items()), flush=True
            )
    print(f"\n{'':8}{'a second':>10}{'a CPU second':>14}{'p50 ms':>9}{'p99 ms':>9}")
    for name, measured in rounds.items():
        per_s, per_cpu_s, p50, p99 = (statistics.median(values) for values in zip(*measured, strict=True))
        print(f"{name:8}{per_s:10.0f}{per_cpu_s:14.0f}{p50:9.2f}{p99:9.2f}")


if __name__ == "__main__":
    main()
