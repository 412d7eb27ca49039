"""Kill any part of an RL run at a random moment, resume it, and see that it finishes with every problem trained once.

    python benchmarks/kill.py --runs 20 --seed 0
    python benchmarks/kill.py --first 7 --runs 3 --start-s 20      # runs 7 to 9 of the same twenty, on their own

Each run has two engines and two learner ranks on a tiny model. The victim is the driver, the first learner rank, any
rank, an engine, or everything at once, always by SIGKILL. What it checks after the end:

* the metrics hold each step once, and the run folder an exported model;
* no group was trained twice, and each group that was handed out was trained or is counted as dropped.

Processes that stay for a minute and a half after the kill ("orphans") are named and ended before the run is resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from memento.run import read_metrics
from memento.tiny import write_tiny_model
from memento.trajectory import read_trajectories

MARK = "MEMENTO_KILL_RUN"
"""Environment variable by which the processes of a run are found; Ray's processes inherit it."""

STEPS, GROUPS = 8, 4

VICTIMS = {
    "driver": "memento.rl.train",
    "first rank": "ray::LearnerRank",
    "a rank": "ray::LearnerRank",
    "an engine": "ray::RolloutEngine",
    "everything": "",
}
"""What is killed, and how its command line begins (or, for the driver, what it holds)."""

SETTINGS = (
    f"steps={STEPS}",
    f"groups_per_step={GROUPS}",
    "group_size=4",
    "sampling.max_tokens=48",
    "rollout.max_model_len=128",
    "rollout.engines=2",
    "rollout.cpus=0.5",
    "rollout.kv_cache_mib=32",
    "learner.ranks=2",
    "learner.cpus=0.5",
    "learner.minibatches=1",
    "learner.zero_stage=1",
    "checkpoint.interval=1",
    "checkpoint.keep=2",
    "eval.problems=null",
    "tracking.mode=disabled",
    # An untrained model solves nothing: what it is rewarded for is to stop early.
    "algorithm.overlong_buffer_tokens=40",
)


def processes(mark: str) -> dict[int, str]:
    """Process id -> command line of all processes of a run."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it ended meanwhile
            continue
    return found


def kill(victim: str, mark: str, driver: int, choose: random.Random) -> int:
    """Kill the victim; how many processes that was (0: it was not there yet)."""
    running = processes(mark)
    if victim == "driver":
        chosen = [driver]
    elif victim == "everything":
        chosen = list(running)
    else:
        chosen = sorted(pid for pid, line in running.items() if line.startswith(VICTIMS[victim]))
        if chosen:
            chosen = chosen[:1] if victim == "first rank" else [choose.choice(chosen)]
    for pid in chosen:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return len(chosen)


def sweep(mark: str, patience_s: float) -> list[str]:
    """Wait until the processes of a run are gone, and end those that are not; how their command lines begin."""
    deadline = time.monotonic() + patience_s
    while (left := processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return [line[:80].strip() for line in left.values()]


def start(
    out: Path,
    model: Path,
    mark: str,
    config: Path,
    seed: int,
    *,
    resume: bool,
    settings: Sequence[str] = SETTINGS,
) -> subprocess.Popen[bytes]:
    """The run as a process of its own; what it says goes to a file beside its folder."""
    command = [sys.executable, "-m", "memento.rl.train", str(config), f"out={out}", f"model={model}", f"seed={seed}"]
    environment = os.environ | {MARK: mark}
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*command, *settings, *(["--resume"] if resume else [])], env=environment, stdout=log, stderr=log
        )


def faults(out: Path) -> list[str]:
    """What is wrong with a finished run; empty for nothing."""
    found = []
    rows = read_metrics(out)
    steps = [row["step"] for row in rows]
    if steps != list(range(1, STEPS + 1)):
        found.append(f"steps {steps}")
    if not (out / "hf" / "model.safetensors").is_file():
        found.append("no exported model")
    samples = Counter((t.group_id, t.sample_index) for t in read_trajectories(out / "rollouts.jsonl"))
    twice = [name for name, count in samples.items() if count > 1]
    serials = {int(group.partition("/")[0]) for group, _ in samples}
    dropped = sum(int(row.get(f"groups/{why}") or 0) for row in rows for why in ("stale", "incomplete", "failed"))
    lost = max(serials) + 1 - len(serials) - dropped
    if twice:
        found.append(f"{len(twice)} samples trained twice, e.g. {twice[0]}")
    if lost != 0 or len(serials) != STEPS * GROUPS:
        found.append(f"{len(serials)} groups trained, {dropped} dropped, {lost} lost")
    return found


def steps_done(out: Path) -> int:
    """How many lines the metrics of a run have."""
    return len(read_metrics(out)) if (out / "metrics.jsonl").is_file() else 0


def one_run(number: int, folder: Path, model: Path, config: Path, seed: int, start_s: float) -> list[str]:
    """Start, kill, resume until it ends; prints a line and returns what was wrong."""
    choose = random.Random(f"{seed}/{number}")
    victim = choose.choice(list(VICTIMS))
    # While it starts, or so many seconds after some step: starting takes longer than all steps together.
    after = choose.choice([None, *range(1, STEPS), *range(1, STEPS)])
    moment = choose.uniform(2.0, start_s) if after is None else choose.uniform(0.0, 3.0)
    out, mark = folder / f"run-{number}", secrets.token_hex(8)
    began = time.monotonic()
    process = start(out, model, mark, config, number, resume=False)
    killed = 0
    try:
        while after is not None and steps_done(out) < after and process.poll() is None:
            time.sleep(0.1)
            began = time.monotonic()
        while time.monotonic() - began < moment and process.poll() is None:
            time.sleep(0.1)
        reached = steps_done(out)
        while process.poll() is None and not (killed := kill(victim, mark, process.pid, choose)):
            time.sleep(0.2)  # it is not up yet
        code, resumes, orphans = process.wait(600), 0, []
        while code != 0 and resumes < 4:
            orphans += sweep(mark, 90)  # Ray's agents try for a minute to tell the dead head node of their end
            resumes += 1
            process = start(out, model, mark, config, number, resume=True)
            code = process.wait(600)
        wrong = faults(out) if code == 0 else [f"ended with exit code {code}, see {out.with_suffix('.log')}"]
    finally:
        if process.poll() is None:
            process.kill()
        left = sweep(mark, 30)
    if left:
        wrong.append(f"{len(left)} processes stayed after the end: {left}")
    when = "at its start" if after is None else f"after step {reached}"
    what = f"{victim} ({killed} processes) {when}, {moment:.1f} s" if killed else "nothing: it ended before"
    print(
        f"{number:>3}  killed {what:<52} {resumes} resumes, {len(orphans)} orphans: {'; '.join(wrong) or 'whole'}",
        flush=True,
    )
    for line in orphans:
        print(f"     orphan: {line}", flush=True)
    return wrong


def untouched(folder: Path, model: Path, config: Path) -> list[str]:
    """A run that nobody disturbs; prints a line and returns what was wrong."""
    began, mark = time.monotonic(), secrets.token_hex(8)
    try:
        code = start(folder / "untouched", model, mark, config, 0, resume=False).wait(900)
    finally:
        sweep(mark, 30)
    wrong = faults(folder / "untouched") if code == 0 else [f"exit code {code}"]
    print(f"untouched: {time.monotonic() - began:.0f} s: {'; '.join(wrong) or 'whole'}", flush=True)
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if every run finished whole."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=1, help="number of the first run: victim and moment depend on it")
    parser.add_argument(
        "--start-s",
        type=float,
        help="seconds of a start, in which a run may be killed too; default: an untouched run's",
    )
    small = Path(__file__).resolve().parents[1] / "configs" / "rl" / "small.yaml"
    parser.add_argument("--config", type=Path, default=small, help="of the run, whose sizes are set here")
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="kill-") as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = write_tiny_model(Path(temporary) / "model", seed=0)
        start_s = options.start_s
        if start_s is None:
            wrong = untouched(folder, model, options.config)
            if wrong:
                print((folder / "untouched.log").read_text(errors="replace")[-3000:])
                return 1
            start_s = read_metrics(folder / "untouched")[0]["seconds/start"] or 0.0
        numbers = range(options.first, options.first + options.runs)
        results = [one_run(number, folder, model, options.config, options.seed, start_s) for number in numbers]
    whole = sum(not wrong for wrong in results)
    print(json.dumps({"runs": len(results), "whole": whole, "seed": options.seed, "first": options.first}))
    return 0 if whole == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
