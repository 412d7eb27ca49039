"""How a run sends its weights: which way `auto` takes, where files lie, and what is left of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memento.errors import UserError
from memento.preflight import resource_plan
from memento.rl.weight_sync import ChannelSync, WeightSync, choose_transport, open_sync

SHARED = {"rollout": {"gpu_fraction": 0.4}, "learner": {"gpu_fraction": 0.6}}
NOBODY: Any = None


@pytest.mark.parametrize(
    ("sections", "gpus", "machines", "expected"),
    [
        ({}, 0, 1, "file"),
        ({}, 0, 2, "broadcast"),
        ({}, 2, 1, "broadcast"),
        (SHARED, 1, 1, "ipc"),
        ({"rollout": {"gpu_fraction": 0.4, "engines": 2}, "learner": {"gpu_fraction": 0.6, "ranks": 2}}, 2, 1, "ipc"),
        ({"rollout": {"gpu_fraction": 0.4, "engines": 2}, "learner": {"gpu_fraction": 0.6}}, 2, 1, "broadcast"),
        (SHARED | {"weight_sync": {"transport": "file"}}, 1, 1, "file"),
        ({"rollout": {"device": "cpu"}}, 1, 1, "file"),
        ({"learner": {"device": "cpu"}}, 1, 2, "file"),
    ],
)
def test_auto_takes_the_shortest_way_there_is(
    sections: dict[str, Any], gpus: int, machines: int, expected: str, make: Any
):
    config = make("config", **sections)
    assert choose_transport(config, resource_plan(config, gpus_there=gpus), machines) == expected


def test_no_channel_joins_a_gpu_and_a_cpu(make: Any):
    config = make("config", rollout={"device": "cpu"}, weight_sync={"transport": "broadcast"})
    with pytest.raises(UserError, match=r"broadcast needs engines and learner on the same kind of device"):
        choose_transport(config, resource_plan(config, gpus_there=1), 1)


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("transport", ["file", "broadcast"])
def test_files_lie_where_every_machine_sees_them_and_do_not_stay(
    transport: str, machines: int, tmp_path: Path, make: Any
):
    config = make("config", tmp_path / "run", weight_sync={"transport": transport})
    plan = resource_plan(config, gpus_there=0)
    sync = open_sync(config, plan, machines, NOBODY, NOBODY, print)
    assert isinstance(sync, ChannelSync) == (transport == "broadcast") and isinstance(sync, WeightSync)
    assert (sync.folder == tmp_path / "run" / "weights") == (machines == 2)
    sync.folder.mkdir(parents=True, exist_ok=True)
    sync.close()
    assert not sync.folder.exists()


def test_a_folder_that_was_named_stays(tmp_path: Path, make: Any):
    config = make("config", tmp_path / "run", weight_sync={"transport": "file", "folder": str(tmp_path)})
    sync = open_sync(config, resource_plan(config, gpus_there=0), 2, NOBODY, NOBODY, print)
    assert sync.folder == tmp_path
    sync.close()
    assert tmp_path.exists()


def test_engines_cannot_sleep_while_rollouts_run_ahead(make: Any):
    with pytest.raises((UserError, ValueError), match=r"rollout\.sleep needs max_lag 0"):
        make("config", rollout={"sleep": True}, max_lag=1)
