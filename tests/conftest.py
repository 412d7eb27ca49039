"""What tests of several folders share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported. On models of these sizes a second thread does little but spin at barriers: engine tests that
# take a minute with one thread take eight with two that share their cores with other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")


class WandbFile:
    """Reads a ``.wandb`` file: a header of 7 bytes, then LevelDB's log format around protobuf: blocks
    of 32 KiB; each fragment has 4 bytes of checksum, 2 of length, and 1 that says whole, first, middle or last."""

    BLOCK = 32_768

    @classmethod
    def records(cls, file: Path) -> Iterator[Any]:
        """All records, in order."""
        from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

        data, at, parts = file.read_bytes(), 7, b""
        while at < len(data):
            if cls.BLOCK - at % cls.BLOCK < 7:  # the rest of a block is padding
                at += cls.BLOCK - at % cls.BLOCK
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            parts += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                record: Any = Record()
                record.ParseFromString(parts)
                yield record
                parts = b""

    @classmethod
    def history(cls, file: Path) -> list[dict[str, Any]]:
        """The lines of the run, W&B's own keys left out."""
        rows = []
        for record in cls.records(file):
            if record.WhichOneof("record_type") == "history":
                items = {
                    (item.nested_key or [item.key])[0]: json.loads(item.value_json) for item in record.history.item
                }
                rows.append({key: value for key, value in items.items() if not key.startswith("_")})
        return rows


@pytest.fixture(scope="session")
def wandb_file() -> type[WandbFile]:
    """The reader of W&B's own files."""
    return WandbFile


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished quickstart: MEMENTO_QUICKSTART, or a small one that is run once for all tests."""
    if finished := os.environ.get("MEMENTO_QUICKSTART"):
        return Path(finished)
    out = tmp_path_factory.mktemp("run") / "quickstart"
    command = [sys.executable, "-m", "memento.cli", "quickstart", "--size", "small", "--out", str(out)]
    repository = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return out
