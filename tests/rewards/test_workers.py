"""Workers that hang, die and lie: the job is retried or reported, never invented."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memento.config import RewardsConfig
from memento.problems import Problem
from memento.rewards import Scorer
from memento.rewards.workers import Status, Worker, WorkerPool
from memento.trajectory import Outcome, RewardResult


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerPool]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    pool = WorkerPool("misbehaving:act", workers=1, timeout_s=1.0, memory_limit_mib=1024)
    yield pool
    pool.close()


def test_every_misbehaviour_has_its_status(pool: WorkerPool, tmp_path: Path):
    first = pool.call({"what": "nothing"})
    assert first.status is Status.DONE
    again = pool.call({"what": "print"})
    assert again == first, "the same process, and what it prints is not a reply"

    assert pool.call({"what": "raise"})[::2] == (Status.ERROR, "ValueError: no")
    assert pool.call({"what": "hang"}).status is Status.TIMEOUT
    assert pool.call({"what": "memory"}).status is Status.OUT_OF_MEMORY

    dead = pool.call({"what": "die"})
    assert (dead.status, dead.attempts) == (Status.ERROR, 2)
    assert "signal 9" in dead.detail
    revived = pool.call({"what": "die once", "flag": str(tmp_path / "flag")})
    assert (revived.status, revived.value, revived.attempts) == (Status.DONE, {"survived": True}, 2)
    assert (pool.counts.restarts, pool.counts.retries, pool.counts.timeouts) == (5, 2, 1)

    last = pool.call({"what": "nothing"}).value["pid"]
    assert last != first.value["pid"]
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)
    assert pool.call({"what": "nothing"}).status is Status.ERROR


def test_recycled_after_so_many_jobs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    worker = Worker("misbehaving:act", memory_limit_mib=1024, recycle_after=2)
    try:
        pids = [worker.call({"what": "nothing"}, 5.0)["value"]["pid"] for _ in range(4)]
    finally:
        worker.kill()
    assert pids[0] == pids[1] != pids[2] == pids[3]


def test_a_handler_that_cannot_be_imported_is_an_error():
    pool = WorkerPool("no_such_module:f", workers=1, timeout_s=1.0, memory_limit_mib=1024)
    reply = pool.call({})
    assert reply.status is Status.ERROR
    assert "no_such_module" in reply.detail


def test_workers_end_with_a_killed_parent():
    script = (
        "import os, signal; from memento.rewards.scoring import default_scorer, score; "
        "from memento.problems import Problem; "
        "score(Problem(id='a', kind='math', prompt='?', answer='x'), r'\\boxed{y}'); "
        "print(*default_scorer().worker_pids, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": root}
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert pids, done.stderr
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return
        time.sleep(0.1)
    pytest.fail(f"workers {pids} outlived their parent")


def test_killed_workers_never_score_zero():
    """A right answer under random SIGKILLs: correct, or no score; never 0."""
    scorer = Scorer(RewardsConfig(workers=2, timeout_s=10.0))
    done = threading.Event()
    rng = random.Random(0)
    results: list[RewardResult] = []

    def killer() -> None:
        next_kill = 10
        while not done.wait(0.002):
            if len(results) >= next_kill:
                next_kill = len(results) + rng.randint(20, 40)
                for pid in scorer.worker_pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        for n in range(150):
            problem = Problem.model_validate({"id": "p", "kind": "math", "prompt": "?", "answer": f"{n}x+1"})
            results.append(scorer.score(problem, f"\\boxed{{1+{n}x}}"))
    finally:
        done.set()
        thread.join()
        scorer.close()
    assert {result.outcome for result in results} <= {Outcome.CORRECT, Outcome.VERIFIER_ERROR}
    assert sum(result.score == 1.0 for result in results) >= 140, "one death costs no job"
