"""A set of weights on its way from the learner to the engines: one safetensors file and its checksum.

    learner  --write_weights-->  <folder>/weights-00000012.safetensors  --read_weights-->  every engine

The folder is shared memory on one machine (`shared_memory_folder`) and a shared file system across machines. A file
appears under its name only when it is complete, and whoever reads it checks its size and its checksum first.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from memento.problems import Record

if TYPE_CHECKING:
    import torch

_PIECE_BYTES = 64 << 20
_KEEP = 2


class WeightsCorrupt(RuntimeError):
    """A weight file is missing, or is not what its sender wrote. Nothing was loaded."""


class WeightUpdate(Record):
    """Where the weights of one version lie.

    Attributes:
        version: how many optimiser steps they have seen (the run's step); the model a run started from is version 0.
        path: the safetensors file, in Hugging Face names, each tied tensor once. It must stay until the next version
            has reached every engine: an engine that is restarted meanwhile reads it again.
        bytes: size of the file.
        checksum: `file_checksum` of the file.
        seconds: what it took to gather and write them.
    """

    version: int = Field(ge=0)
    path: Path
    bytes: int
    checksum: str
    seconds: float


def shared_memory_folder() -> Path:
    """A new private folder for weight files, in shared memory where the system has it. The caller removes it."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="memento-weights-", dir=memory if os.access(memory, os.W_OK) else None))


def write_weights(
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    folder: str | Path,
    version: int,
    *,
    started: float | None = None,
) -> WeightUpdate:
    """Write a version, and delete all but the version before it.

    Args:
        tensors: Hugging Face parameter names and full tensors, each tied tensor once.
        folder: where; created if it is not there.
        version: see `WeightUpdate`.
        started: ``time.perf_counter()`` when the gathering began; null counts the writing alone.
    """
    from safetensors.torch import save_file

    started = time.perf_counter() if started is None else started
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"weights-{version:08d}.safetensors"
    part = target.with_suffix(".part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in dict(tensors).items()}, part)
    checksum, size = file_checksum(part), part.stat().st_size
    os.replace(part, target)
    others = sorted((p for p in folder.glob("weights-*.safetensors") if p != target), key=lambda p: p.stat().st_mtime)
    for old in others[: len(others) - (_KEEP - 1)]:
        old.unlink()
    return WeightUpdate(
        version=version, path=target, bytes=size, checksum=checksum, seconds=time.perf_counter() - started
    )


def read_weights(update: WeightUpdate) -> dict[str, torch.Tensor]:
    """The tensors of a version, on the CPU.

    Raises:
        WeightsCorrupt: the file is not there, or its size or checksum is another.
    """
    from safetensors.torch import load_file

    if not update.path.is_file():
        raise WeightsCorrupt(f"weights {update.version}: no file at {update.path} on this machine")
    size = update.path.stat().st_size
    if size != update.bytes:
        raise WeightsCorrupt(f"weights {update.version}: {update.path} has {size} bytes, {update.bytes} were written")
    checksum = file_checksum(update.path)
    if checksum != update.checksum:
        raise WeightsCorrupt(
            f"weights {update.version}: {update.path} has checksum {checksum}, {update.checksum} was written"
        )
    return load_file(update.path)


def file_checksum(path: str | Path) -> str:
    """BLAKE2b over the BLAKE2b digests of 64 MiB pieces: hashlib lets go of the GIL, so the pieces hash in parallel."""
    path = Path(path)

    def digest(offset: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return hashlib.blake2b(file.read(_PIECE_BYTES), digest_size=16).digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        digests = threads.map(digest, range(0, max(path.stat().st_size, 1), _PIECE_BYTES))
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()
