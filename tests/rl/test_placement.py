"""Where a run's actors land: Ray's own scheduler on two nodes of four GPUs, which only claim to have them.

`memento.rl.train.start` runs as in a run; what stands in the place of engines and ranks says where it is, and needs no
GPU for it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster

import tests.rl.test_placement as this
from memento import cluster as clusters
from memento.cluster import reserve
from memento.errors import UserError
from memento.preflight import check_resources, resource_plan
from memento.rl import learner, train
from memento.rl.learner_rank import CheckpointIdentity, RankInfo
from memento.rollout import pool
from memento.rollout.engine import EngineInfo

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

GPUS = 4
Place = tuple[str, tuple[str, ...]]


def here() -> Place:
    """Node, and the GPUs that Ray gave to this process."""
    return ray.get_runtime_context().get_node_id(), tuple(str(gpu) for gpu in ray.get_gpu_ids())


class Rank:
    """In the place of a `LearnerRank`."""

    def __init__(self, *_: Any) -> None: ...

    def node(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    def start(self, *_: Any) -> RankInfo:
        return RankInfo(1, CheckpointIdentity(1, 1, "float32", ""), 0.0)

    def where(self) -> Place:
        return here()


class Engine:
    """In the place of a `RolloutEngine`."""

    def __init__(self, *_: Any) -> None: ...

    def start(self, *_: Any) -> EngineInfo:
        return self.info()

    def info(self) -> EngineInfo:
        return EngineInfo(
            index=0, version=0, stage="ready", active=0, completions=0, tokens=0, preemptions=0, evictions=0, steps=0,
            busy_s=0.0, start_s=0.0, update_s={}, failure=None, pid=0, node="",
        )  # fmt: skip

    def where(self) -> Place:
        return here()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """Two raylets on this machine."""
    node = {"num_cpus": 2, "num_gpus": GPUS, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**node)
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def land(nodes: Cluster, make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Start a run with these sections: where its engines and where its ranks are, by index, and what it said."""
    cloudpickle.register_pickle_by_value(this)
    monkeypatch.setenv("RAY_ADDRESS", str(nodes.address))
    monkeypatch.setattr(learner, "LearnerRank", Rank)
    monkeypatch.setattr(pool, "RolloutEngine", Engine)
    with ExitStack() as parts:

        def start(
            engines: dict[str, Any], ranks: dict[str, Any], timeout_s: float = 200
        ) -> tuple[list[Place], list[Place], list[str]]:
            each = {"device": "cuda", "cpus": 0.1, "start_timeout_s": timeout_s}
            config = make("config", tmp_path, rollout=each | engines, learner=each | ranks)
            check_resources(config, clusters.node_resources())
            said: list[str] = []
            run: Any = SimpleNamespace(say=said.append)
            trained, sampled, *_ = train.start(config, run, parts)
            return (
                ray.get([engine.actor.where.remote() for engine in sampled._engines]),
                ray.get([rank.where.remote() for rank in trained._ranks]),
                said,
            )

        yield start
    deadline = time.monotonic() + 20
    while ray.available_resources().get("GPU") != 2 * GPUS:  # all of it comes back when the run has ended
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.2)


def test_an_engine_and_a_rank_share_each_gpu(land: Any) -> None:
    engines, ranks, said = land({"engines": 5, "gpu_fraction": 0.4}, {"ranks": 5, "gpu_fraction": 0.6})
    assert len(set(ranks)) == 5, "no two ranks on one GPU, which NCCL refuses"
    assert engines == ranks, "engine i beside rank i"
    assert Counter(node for node, _ in ranks).most_common()[0][1] == GPUS
    assert any(line.split()[:2] == ["asked", "for"] and line.split()[-1] == "5" for line in said), said


def test_halves_of_equal_size_do_not_meet_their_own_kind(land: Any) -> None:
    engines, ranks, _ = land({"engines": 4, "gpu_fraction": 0.5}, {"ranks": 4, "gpu_fraction": 0.5})
    assert len(set(ranks)) == 4 and engines == ranks


def test_two_engines_and_a_rank_on_one_gpu(land: Any) -> None:
    engines, ranks, _ = land({"engines": 4, "gpu_fraction": 0.25}, {"ranks": 2, "gpu_fraction": 0.5})
    assert len(set(ranks)) == 2 and Counter(engines) == {place: 2 for place in ranks}


def test_engines_of_several_gpus_and_ranks_of_one_are_apart(land: Any) -> None:
    """Three GPUs an engine leave one on each node. Placed one by one, both ranks may lie where an engine belongs."""
    engines, ranks, _ = land({"engines": 2, "tensor_parallel_size": 3}, {"ranks": 2})
    assert [len(gpus) for _, gpus in engines] == [3, 3] and [len(gpus) for _, gpus in ranks] == [1, 1]
    taken = [(node, gpu) for node, gpus in (*engines, *ranks) for gpu in gpus]
    assert len(set(taken)) == 2 * GPUS
    assert len({node for node, _ in engines}) == len({node for node, _ in ranks}) == 2


def test_room_that_others_hold_is_waited_for_and_then_said(
    land: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "PATIENCE_S", 1.0)
    actor: Any = ray.remote(Rank)
    other: Any = actor.options(num_cpus=0, num_gpus=1).remote()
    ray.get(other.where.remote())
    with pytest.raises(
        UserError, match=r"no place within 4 s.*asks for .* CPU and 8 GPU, of which .* and 7 GPU are free"
    ):
        land({"engines": 4}, {"ranks": 4}, timeout_s=4)
    said: list[str] = []
    each = {"device": "cuda", "cpus": 0.1}
    plan = resource_plan(make("config", rollout=each | {"engines": 4}, learner=each | {"ranks": 4}), gpus_there=8)

    def say(line: str) -> None:
        said.append(line)
        ray.kill(other)  # whoever held it is done

    room = reserve(plan, 60, say)
    assert len(said) == 1 and "waiting for room on the cluster, 60 s at most" in said[0]
    room.release()
