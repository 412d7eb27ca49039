"""Start a local Ray, or join the cluster this process was launched on. The only place that calls `ray.init`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memento.errors import UserError

if TYPE_CHECKING:
    from memento.preflight import ResourcePlan

PATIENCE_S = 5.0
"""A reservation that takes longer says what it waits for."""


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


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room for all actors of a run: a Ray placement group, and where in it each actor belongs.

    Attributes:
        group: None where nothing is to be reserved.
        bundles: kind and index of an actor -> its bundle in the group.
    """

    group: Any
    bundles: Mapping[tuple[str, int], int]

    def options(self, kind: str, count: int) -> list[dict[str, Any]]:
        """For each actor of a kind, by index: what its `options` get beside its own CPUs and GPUs."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return [
            {"scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)}
            if (bundle := self.bundles.get((kind, index))) is not None
            else {}
            for index in range(count)
        ]

    def release(self) -> None:
        """Give the room back. What still runs in it ends."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if self.group is not None and ray.is_initialized():
            remove_placement_group(self.group)


def reserve(plan: ResourcePlan, timeout_s: float, say: Callable[[str], None] = lambda _: None) -> Reservation:
    """Take room for all actors of a run at once, before the first of them starts.

    Actors that Ray places one by one, as they come, get in each other's way: learner ranks take the last GPU of every
    machine and leave no two together for an engine; of actors that take half a GPU each, two ranks meet on one.

    Args:
        plan: the actors.
        timeout_s: how long others may hold what is asked for.
        say: told once what is missing, after `PATIENCE_S`.

    Raises:
        UserError: it is not free in time; the message says what is asked for and what is free.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    bundles = [bundle for bundle in plan.bundles if bundle.cpus or bundle.gpus]
    if not bundles:
        return Reservation(None, {})
    wanted = [{name: amount for name, amount in (("CPU", b.cpus), ("GPU", b.gpus)) if amount} for b in bundles]
    group = placement_group(wanted, strategy="PACK")
    began, told = time.monotonic(), False
    while not group.wait(1):
        waited_s, free = time.monotonic() - began, ray.available_resources()
        lack = (
            f"the run asks for {plan.cpus:g} CPU and {plan.gpus:g} GPU, of which {free.get('CPU', 0):g} CPU and "
            f"{free.get('GPU', 0):g} GPU are free"
        )
        if waited_s >= timeout_s:
            remove_placement_group(group)
            raise UserError(
                f"the actors of this run found no place within {timeout_s:g} s (the smaller of rollout.start_timeout_s "
                f"and learner.start_timeout_s): {lack}. Other jobs hold the rest (`ray status`): wait for them, lower "
                "rollout.engines or learner.ranks, or launch it on a larger cluster."
            )
        if waited_s >= PATIENCE_S and not told:
            told = True
            say(f"waiting for room on the cluster, {timeout_s:g} s at most: {lack}")
    return Reservation(group, {member: i for i, bundle in enumerate(bundles) for member in bundle.members})


def disconnect() -> None:
    """Leave the cluster; a Ray that `connect` started ends."""
    import ray

    if ray.is_initialized():
        ray.shutdown()
