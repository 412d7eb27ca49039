"""The Ray actor around the workers."""

import asyncio
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from memento.config import RewardsConfig
from memento.errors import UserError
from memento.problems import Problem
from memento.rewards import RewardPool, score
from memento.rewards.pool import ScoreRequest
from memento.trajectory import Outcome

ray = pytest.importorskip("ray")

HALF = Problem.model_validate({"id": "half", "kind": "math", "prompt": "?", "answer": "1/2"})
ECHO = Problem.model_validate(
    {"id": "echo", "kind": "code", "prompt": "?", "tests": [{"input": "hi\n", "output": "hi\n"}]}
)
BROKEN = Problem.model_validate({"id": "broken", "kind": "math", "prompt": "?", "answer": "?"})


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_pool_scores_groups_in_order_and_counts():
    pool = RewardPool(RewardsConfig(workers=2, timeout_s=2.0))
    try:
        results = pool.score(
            HALF, [r"\boxed{0.5}", r"\boxed{2}", "no idea", r"\boxed{9^{9^{9^9}}}", r"\boxed{\frac12}"]
        )
        assert [result.outcome for result in results] == [
            Outcome.CORRECT,
            Outcome.WRONG,
            Outcome.UNPARSABLE,
            Outcome.TIMEOUT,
            Outcome.CORRECT,
        ]
        assert [result.score for result in results] == [1.0, 0.0, 0.0, None, 1.0]
        groups = [ScoreRequest(HALF, [rf"\boxed{{{n}/{2 * n}}}", rf"\boxed{{{n}}}"]) for n in range(1, 80)]
        many = pool.score_many([*groups, ScoreRequest(ECHO, ["```python\nprint(input())\n```", "print(input())"])])
        assert [[result.score for result in group] for group in many] == [[1.0, 0.0]] * 80
        assert many[-1][0].metadata["isolation"] in ("namespaces", "subprocess")
        pool.check([HALF, ECHO])
        with pytest.raises(UserError, match="'broken'"):
            pool.check([HALF, BROKEN])
        counts = pool.counts()
        assert counts["correct"] == 82 and counts["timeout"] == 1 and counts["worker_restarts"] == 1
    finally:
        pool.close()
        pool.close()


GARBAGE: tuple[Any, ...] = (
    "",
    "\x00" * 1000,
    "\ud800\udfff" * 50,
    bytes(range(256)).decode("latin-1") * 50,
    "x" * (1 << 20),
    "\\boxed{" * 100_000,
    "\\boxed{\\frac{\ud800}{" + "2" * 5000 + "}}",
    "```python\nprint('\x00\ud800\U0010ffff')\n```",
    "```cpp\nint main() {}\n```\n```python\nprint(",
    b"\xff\xfe\x00",
)


def test_whatever_a_completion_holds_a_verdict_comes_back():
    """Through the actor, and from there into a file."""
    choice = Problem.model_validate({"id": "b", "kind": "choice", "prompt": "?", "answer": "B"})
    pool = RewardPool(RewardsConfig(workers=2, timeout_s=2.0))
    try:
        groups = pool.score_many([ScoreRequest(problem, GARBAGE) for problem in (HALF, ECHO, choice)])
    finally:
        pool.close()
    assert [len(group) for group in groups] == [len(GARBAGE)] * 3
    for result in (result for group in groups for result in group):
        assert result.outcome in (Outcome.WRONG, Outcome.UNPARSABLE, Outcome.TIMEOUT) and not result.score, result
        assert type(result).model_validate_json(result.model_dump_json()) == result


def test_score_inside_an_async_actor():
    class Caller:
        async def run(self) -> list[float | None]:
            return [score(HALF, text).score for text in (r"\boxed{\frac{2}{4}}", r"\boxed{3}")]

    actor = ray.remote(Caller).options(num_cpus=0, max_concurrency=4).remote()
    assert ray.get(actor.run.remote(), timeout=60) == [1.0, 0.0]


def test_results_cross_processes():
    result = score(HALF, r"\boxed{0.5}")
    assert pickle.loads(pickle.dumps(result)) == result
    assert type(result).model_validate_json(result.model_dump_json()) == result


CUSTOM = """
import os, signal, time

def slow(problem, completion):
    time.sleep(0.2)
    return 1.0

def dies(problem, completion):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_pool_rewards.py").write_text(CUSTOM)
    monkeypatch.chdir(tmp_path)


def config(name: str, **keys: object) -> RewardsConfig:
    term = {"kind": "custom", "function": f"my_pool_rewards:{name}"}
    return RewardsConfig.model_validate({"terms": [term], "workers": 1, **keys})


def test_a_full_pool_makes_its_callers_wait(here: None):
    """Two actors that hold one group each: the third group waits, nothing is refused, all are counted."""
    pool = RewardPool(config("slow", actors=2, pending_groups=1))
    try:
        pool.check([HALF])
        pool.metrics()
        began = time.monotonic()
        with ThreadPoolExecutor(6) as threads:
            groups = [threads.submit(pool.score, HALF, ["a", "b"]) for _ in range(6)]
            time.sleep(0.3)
            busy = pool.metrics()
            results = [group.result() for group in groups]
        assert time.monotonic() - began > 0.2 * 2 * 6 / 2, "two at a time, each 0.4 s"
        assert (busy["verifier/pending"], busy["verifier/waiting"]) == (2.0, 4.0)
        assert [[r.score for r in group] for group in results] == [[1.0, 1.0]] * 6
        after = pool.metrics()
        assert busy["verifier/correct"] + after["verifier/correct"] == 12
        assert after["verifier/p50_s"] > 0.19 and after["verifier/samples_per_s"] > 0
        assert (after["verifier/pending"], after["verifier/waiting"], after["verifier/restarts"]) == (0.0, 0.0, 0.0)
        assert asyncio.run(pool.score_async(HALF, ["c"]))[0].score == 1.0
        assert pool.metrics()["verifier/correct"] == 1
    finally:
        pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.score(HALF, ["d"])


def test_workers_that_die_are_counted_and_score_nothing(here: None):
    pool = RewardPool(config("dies"))
    try:
        results = pool.score(HALF, ["x", "y"])
        assert [(r.score, r.outcome) for r in results] == [(None, Outcome.VERIFIER_ERROR)] * 2
        metrics = pool.metrics()
        assert (metrics["verifier/verifier_error"], metrics["verifier/retries"], metrics["verifier/restarts"]) == (
            2,
            2,
            4,
        )
        assert pool.counts()["verifier_error"] == 2
    finally:
        pool.close()
    with pytest.raises(UserError, match="my_pool_rewards:nothing"):
        broken = RewardPool(config("nothing"))
        try:
            broken.check()
        finally:
            broken.close()
