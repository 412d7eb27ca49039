"""One sandbox at level "namespaces" for all attacks. After each of them nothing may be left of it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memento.problems import Problem
from memento.rewards.code_verifier import score_code
from memento.rewards.sandbox import AssertRun, Limits, Run, Sandbox, why_no_namespaces
from memento.trajectory import Outcome, RewardResult

SECRET = "the-expected-output-5d1f"

EASY = Limits(wall_s=10)

Attack = Callable[..., tuple[Run, RewardResult]]


class Watched(Sandbox):
    """A sandbox that remembers what it saw of the last run."""

    last: Run

    def run_program(self, *args: Any, **kwargs: Any) -> Run:
        self.last = super().run_program(*args, **kwargs)
        return self.last

    def call_function(self, *args: Any, **kwargs: Any) -> Run:
        self.last = super().call_function(*args, **kwargs)
        return self.last

    def check_asserts(self, *args: Any, **kwargs: Any) -> AssertRun:
        checked = super().check_asserts(*args, **kwargs)
        self.last = checked.solution
        return checked


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder for temporary files of this process, and of nobody else."""
    folder = tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        yield folder


@pytest.fixture(scope="session")
def watched(scratch: Path) -> Iterator[Watched]:
    if why_no_namespaces():
        pytest.skip(why_no_namespaces())
    sandbox = Watched("namespaces")
    cgroups = cgroups_of_ours()
    yield sandbox
    sandbox.close()
    assert not cgroups_of_ours() & cgroups


@pytest.fixture
def attack(watched: Watched, scratch: Path) -> Iterator[Attack]:
    """``attack(program, test=..., wall_s=...)``: what the program did, and its verdict, which is never "correct".

    Afterwards no process, file or descriptor of it is left, and the zygotes are those of before.
    """

    def run(
        program: str, test: dict[str, Any] | None = None, wall_s: float = 2.0, **fields: Any
    ) -> tuple[Run, RewardResult]:
        test = test or {"input": "go\n", "output": SECRET}
        asked = Problem.model_validate(
            {"id": "p", "kind": "code", "prompt": "?", "tests": [test], "entry_point": "f"}
            | {"time_limit_s": wall_s, **fields}
        )
        result = score_code(asked, f"```python\n{program}\n```", watched, budget_s=60)
        assert result.outcome in (Outcome.WRONG, Outcome.TIMEOUT) and result.score == 0.0, result
        assert result.metadata["isolation"] == "namespaces"
        return watched.last, result

    watched.run_program("", "", EASY)
    watched.check_asserts("def f(): return 1", "assert f() == 1", EASY)
    zygotes, descriptors = watched.pids, os.listdir("/proc/self/fd")
    yield run
    assert watched.pids == zygotes, "the attack ended a zygote"
    assert leftovers(watched) == []
    for _ in range(50):  # other threads of this process open a file now and then
        if len(os.listdir("/proc/self/fd")) <= len(descriptors):
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f"descriptors stayed open: {len(descriptors)} before, {os.listdir('/proc/self/fd')} after")
    assert list(scratch.iterdir()) == []
    assert watched.run_program("print(6 * 7)", "", EASY).stdout == b"42\n"


def leftovers(sandbox: Sandbox) -> list[int]:
    """Processes below the zygotes. A zygote is the one child of each launcher, and has none between runs."""
    found: list[int] = []
    for _ in range(50):
        zygotes = [child for launcher in sandbox.pids for child in children(launcher)]
        assert len(zygotes) == len(sandbox.pids)
        found = [pid for zygote in zygotes for pid in children(zygote)]
        if not found:
            break
        time.sleep(0.02)
    return found


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cgroups_of_ours() -> set[Path]:
    return set(Path("/sys/fs/cgroup").glob(f"**/memento-sandbox-{os.getpid()}-*"))
