"""A set of weights on its way from the learner to the engines: one safetensors file and its checksum.

    learner  --write_weights-->  <folder>/weights-00000012.safetensors  --read_weights-->  every engine

The folder is shared memory on one machine (`shared_memory_folder`) and a shared file system across machines. A file
appears under its name only when it is complete, and whoever reads it checks its size and its checksum first.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from memento.problems import Record

if TYPE_CHECKING:
    import torch

_PIECE_BYTES = 16 << 20
_KEEP = 2
_HEADER_BYTES = 256 << 10
"""Left free for the header, which is known last: about 2,000 tensors."""

_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}
"""As the safetensors format names them."""


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
    """Write a version; only the one before it stays. Older ones are free by then, and their file is written over:
    new shared memory costs as much as the copy into it.

    An iterable is written as it comes, so that a model gathered in buckets is never in memory as a whole.

    Args:
        tensors: Hugging Face parameter names and full tensors, each tied tensor once.
        folder: where; created if it is not there.
        version: see `WeightUpdate`.
        started: ``time.perf_counter()`` when the gathering began; null counts from this call.
    """
    started = time.perf_counter() if started is None else started
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"weights-{version:08d}.safetensors"
    part = target.with_suffix(".part")
    others = sorted((p for p in folder.glob("weights-*.safetensors") if p != target), key=lambda p: p.stat().st_mtime)
    for old in others[: 1 - _KEEP]:
        os.replace(old, part)  # of several all but the last are gone with this
    pairs: Any = tensors.items() if isinstance(tensors, Mapping) else tensors
    _write_safetensors(pairs, part)
    checksum, size = file_checksum(part), part.stat().st_size
    os.replace(part, target)
    return WeightUpdate(
        version=version, path=target, bytes=size, checksum=checksum, seconds=time.perf_counter() - started
    )


def _write_safetensors(tensors: Iterable[tuple[str, torch.Tensor]], path: Path) -> None:
    """One pass: the data behind a gap, then the header into the gap, filled up with spaces as the format allows."""
    import torch

    header: dict[str, Any] = {}
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0) as file:
        file.seek(8 + _HEADER_BYTES)
        end = 0
        for name, tensor in tensors:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
            header[name] = {
                "dtype": _DTYPES[str(tensor.dtype)],
                "shape": list(tensor.shape),
                "data_offsets": [end, end + data.nbytes],
            }
            end += data.nbytes
            while data.nbytes:
                data = data[file.write(data) :]
        text = json.dumps(header, separators=(",", ":")).encode()
        gap = max(_HEADER_BYTES, -(-len(text) // 8) * 8)
        if gap > _HEADER_BYTES:  # tens of thousands of tensors: move the data up, from its end
            for start in range((end - 1) // _PIECE_BYTES * _PIECE_BYTES, -1, -_PIECE_BYTES):
                file.seek(8 + _HEADER_BYTES + start)
                piece = file.read(min(_PIECE_BYTES, end - start))
                file.seek(8 + gap + start)
                file.write(piece)
        file.truncate(8 + gap + end)
        file.seek(0)
        file.write(len(text.ljust(gap)).to_bytes(8, "little") + text.ljust(gap))


def verify_weights(update: WeightUpdate) -> None:
    """Compare the file with what its sender wrote.

    Raises:
        WeightsCorrupt: it is not there, or its size or checksum is another.
    """
    _check_size(update)
    checksum = file_checksum(update.path)
    if checksum != update.checksum:
        raise WeightsCorrupt(
            f"weights {update.version}: {update.path} has checksum {checksum}, {update.checksum} was written"
        )


def read_weights(update: WeightUpdate) -> dict[str, torch.Tensor]:
    """The tensors of a version that `verify_weights` found whole on this machine, on the CPU.

    Raises:
        WeightsCorrupt: the file is gone, or has another size by now.
    """
    from safetensors.torch import load_file

    _check_size(update)
    return load_file(update.path)


def _check_size(update: WeightUpdate) -> None:
    if not update.path.is_file():
        raise WeightsCorrupt(f"weights {update.version}: no file at {update.path} on this machine")
    size = update.path.stat().st_size
    if size != update.bytes:
        raise WeightsCorrupt(f"weights {update.version}: {update.path} has {size} bytes, {update.bytes} were written")


def file_checksum(path: str | Path) -> str:
    """XXH3 (128 bits) over the XXH3 digests of pieces, which are hashed in parallel: as fast as memory is read.

    It finds a torn or damaged file; it is no protection against someone who forges one.
    """
    import xxhash

    path = Path(path)
    size = path.stat().st_size
    if size == 0:
        return xxhash.xxh3_128_hexdigest(b"")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):

        def digest(offset: int) -> bytes:
            with view[offset : offset + _PIECE_BYTES] as piece:
                return xxhash.xxh3_128_digest(piece)

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            digests = list(threads.map(digest, range(0, size, _PIECE_BYTES)))
    return xxhash.xxh3_128_hexdigest(b"".join(digests))
