"""Start a local Ray, or join the cluster this process was launched on. The only place that calls `ray.init`."""

from __future__ import annotations

import logging
import os


def connect() -> dict[str, float]:
    """Join the cluster named by ``RAY_ADDRESS`` (set inside `ray job submit`), else start Ray on this machine.

    Calling it again is free.

    Returns:
        The cluster's total resources, e.g. ``{"CPU": 2.0, "GPU": 8.0}``.
    """
    import ray

    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # an actor without GPUs keeps the variable
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
        # Ray nices its workers by 15, which starves engines and learner beside any other work on a small machine.
        os.environ.setdefault("RAY_worker_niceness", "0")
        address = os.environ.get("RAY_ADDRESS")
        if address:
            ray.init(address=address, logging_level=logging.WARNING)
        else:
            ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)
    return {name: float(amount) for name, amount in ray.cluster_resources().items()}


def node_resources() -> list[dict[str, float]]:
    """Resources of each machine of the cluster that is joined, by Ray's names."""
    import ray

    return [{k: float(v) for k, v in node["Resources"].items()} for node in ray.nodes() if node["Alive"]]


def disconnect() -> None:
    """Leave the cluster; a Ray that `connect` started ends."""
    import ray

    if ray.is_initialized():
        ray.shutdown()
