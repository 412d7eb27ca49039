"""The engine whose core is a process of its own: the same tokens, the same exact weight updates, and kill -9."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("ray")

from memento.config import FormatConfig, RolloutConfig
from memento.problems import Problem, ProblemKind
from memento.rollout.pool import RolloutPool
from memento.rollout.weights import WeightUpdate, write_weights
from memento.trajectory import RolloutRequest, SamplingParams

pytestmark = pytest.mark.long


def config(**changes: Any) -> RolloutConfig:
    settings: dict[str, Any] = {
        "engines": 1,
        "device": "cpu",
        "dtype": "float32",
        "kv_cache_mib": 24,
        "block_size": 32,
        "max_num_seqs": 32,
        "max_model_len": 640,
        "progress_timeout_s": 60,
    }
    return RolloutConfig(**settings | changes)


def request(name: str, tokens: int = 200) -> RolloutRequest:
    return RolloutRequest(
        problem=Problem(id=name, kind=ProblemKind.MATH, prompt=f"What is 12+{len(name)}?", answer="1"),
        group_id=f"0/{name}",
        group_size=4,
        sampling=SamplingParams(temperature=1.0, max_tokens=tokens),
        seed=7,
    )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()] + [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        if task.name != str(pid)
        for child in (task / "children").read_text().split()
    ]


def core_of(pid: int) -> int:
    """The process of the engine core among an actor's children."""
    cores = [child for child in children(pid) if Path(f"/proc/{child}/comm").read_text().startswith("VLLM::Engine")]
    assert len(cores) == 1, {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children(pid)}
    return cores[0]


def new_weights(model: Path, folder: Path, version: int) -> WeightUpdate:
    import torch
    from safetensors.torch import load_file

    torch.manual_seed(version)
    tensors = load_file(model / "model.safetensors")
    return write_weights(
        {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in tensors.items()}, folder, version
    )


def test_a_core_in_its_own_process(cluster: None, block_model: Path, tmp_path: Path) -> None:
    requests = [request(f"p{i}") for i in range(4)]
    update = new_weights(block_model, tmp_path, 1)

    def generate_all(pool: RolloutPool) -> list[Any]:
        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(pool.generate, requests))

    with RolloutPool(config(cpus=0.5), FormatConfig(), str(block_model)) as pool:
        expected = generate_all(pool)
        pool.update_weights(update)
        expected_after = generate_all(pool)
    assert any(t.evictions for group in expected for t in group)

    with RolloutPool(config(cpus=0.5, engine_process=True), FormatConfig(), str(block_model)) as pool:
        (info,) = pool.infos()
        assert info is not None
        core = core_of(info.pid)
        got = generate_all(pool)
        assert [[t.completion_ids for t in group] for group in got] == [
            [t.completion_ids for t in group] for group in expected
        ]
        assert [[t.evictions for t in group] for group in got] == [[t.evictions for t in group] for group in expected]
        (info,) = pool.infos()
        assert info is not None and info.steps > 100 and info.busy_s > 0 and info.active == 0

        # In flight: running requests go on under the new weights, and both spans are labelled.
        with ThreadPoolExecutor(4) as threads:
            groups = [threads.submit(pool.generate, request(f"long{i}", tokens=500)) for i in range(4)]
            deadline = time.monotonic() + 60
            while not all(i and i.active >= 12 and i.steps > info.steps + 60 for i in pool.infos()):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert pool.update_weights(update) == [1]
            crossed = [t for group in groups for t in group.result() if len(t.weight_versions) == 2]
        assert crossed and all([span.version for span in t.weight_versions] == [0, 1] for t in crossed)
        assert [[t.completion_ids for t in group] for group in generate_all(pool)] == [
            [t.completion_ids for t in group] for group in expected_after
        ]

        # Its core is killed while it works: the group is requeued, and served by a new core with the current weights.
        with ThreadPoolExecutor(len(requests)) as threads:
            groups = [threads.submit(pool.generate, r) for r in requests]
            while not all(i and i.active for i in pool.infos()):
                time.sleep(0.01)
            os.kill(core, signal.SIGKILL)
            delivered = [group.result(timeout=180) for group in groups]
        assert [[t.completion_ids for t in group] for group in delivered] == [
            [t.completion_ids for t in group] for group in expected_after
        ]
        assert all(t.oldest_version == 1 for group in delivered for t in group)
        metrics = pool.metrics()
        assert metrics["engine/restarts"] == 1 and metrics["engine/requeued"] >= 1 and metrics["engine/dropped"] == 0

        # The actor is killed: its core must not go on holding memory.
        (info,) = pool.infos()
        assert info is not None
        core = core_of(info.pid)
        os.kill(info.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while Path(f"/proc/{core}").exists() and "zombie" not in Path(f"/proc/{core}/status").read_text():
            assert time.monotonic() < deadline, "the core outlived its actor"
            time.sleep(0.1)
