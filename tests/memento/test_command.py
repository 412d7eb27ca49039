"""What a training program says, and with which code it ends."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from memento.command import run_config

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "rl" / "quickstart.yaml")


def test_a_full_disk_is_said_with_the_way_on(capsys: pytest.CaptureFixture[str]) -> None:
    def train(config: Any, *, resume: bool) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/rl/rollouts.jsonl")

    assert run_config("rl", "", train, [CONFIG]) == 1
    message = capsys.readouterr().err
    assert "the disk is full (/runs/rl/rollouts.jsonl)" in message and "--resume" in message


def test_any_other_error_of_the_system_is_not_hidden() -> None:
    def train(config: Any, *, resume: bool) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        run_config("rl", "", train, [CONFIG])
