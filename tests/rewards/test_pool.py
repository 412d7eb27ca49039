"""The Ray actor around the workers."""

import pickle

import pytest

from memento.config import RewardsConfig
from memento.errors import UserError
from memento.problems import Problem
from memento.rewards import RewardPool, score
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
        groups = [(HALF, [rf"\boxed{{{n}/{2 * n}}}", rf"\boxed{{{n}}}"]) for n in range(1, 80)]
        many = pool.score_many([*groups, (ECHO, ["```python\nprint(input())\n```", "print(input())"])])
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
