"""Weights on their way from the learner to the engines without a file: in packed buckets, from process to process.

    learner rank 0 ---- bucket, bucket, ..., [version, checksum] ----> every worker of every engine

Two transports, one protocol:

    broadcast   the bytes travel: by NCCL between GPUs, by Gloo between CPUs; also from machine to machine.
    ipc         the bytes stay where they are: an engine that shares the GPU of a learner rank maps that rank's bucket
                and copies it; only the handle travels. Between CPUs the bucket is a named block of shared memory.

Both ends cut the same list of tensors at the same places (`cut`), so nothing but bytes is sent, and neither end ever
holds more of the model than a bucket beside its own weights. A channel that failed is not used again: its owner sends
the weights by file (`memento.rollout.weights`) and opens another.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import torch
from torch import distributed
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # where torch exports them for type checkers

from memento.rollout.channel_records import ChannelBroken, ChannelSettings, TensorSpec
from memento.rollout.weights import WeightsCorrupt

ALIGNMENT = 16
"""Bytes at whose multiples the tensors of a bucket begin, so that each can be viewed in its own type."""

HANDLE_BYTES = 4096
"""Room for the pickled handle of a bucket."""


def open_store(timeout_s: float) -> TCPStore:
    """Where the ends of a channel find each other, on a free port of this machine."""
    return TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def cut(tensors: Sequence[TensorSpec], bucket_bytes: int) -> Iterator[list[TensorSpec]]:
    """The tensors in order, as buckets of at most `bucket_bytes`, or of one larger tensor."""
    bucket: list[TensorSpec] = []
    size = 0
    for tensor in tensors:
        size += _aligned(tensor.bytes)
        if bucket and size > bucket_bytes:
            yield bucket
            bucket, size = [], _aligned(tensor.bytes)
        bucket.append(tensor)
    if bucket:
        yield bucket


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _size(bucket: Iterable[TensorSpec]) -> int:
    return sum(_aligned(tensor.bytes) for tensor in bucket)


def mixed(checksum: int, bucket: torch.Tensor) -> int:
    """The checksum of all buckets so far and this one, uint8 and a multiple of 8 long: sums of 64-bit words, in order.

    It costs one reading of the memory, on the device, and finds buckets that were lost, damaged, repeated or taken from
    another version. It is no protection against someone who forges them.
    """
    return (checksum * 31 + int(bucket.view(torch.int64).sum())) % 2**63


class WeightChannel:
    """One process's end. Opening it waits for all others.

    Args:
        settings: the same at every end.
        rank: of this end: senders first.
        device: where its tensors are.
        host: this machine's address, as the others reach it.
        store: the first sender's own, from `open_store`; null connects to it.

    Raises:
        ChannelBroken: not everybody came in time.
    """

    def __init__(
        self,
        settings: ChannelSettings,
        rank: int,
        device: torch.device,
        host: str,
        store: Store | None = None,
    ) -> None:
        self.settings, self.rank, self.device = settings, rank, device
        self._timeout = timedelta(seconds=settings.timeout_s)
        self._buckets = list(cut(settings.tensors, settings.bucket_bytes))
        size = settings.senders + settings.receivers
        with _stage(f"open the channel, rank {rank} of {size}"):
            if store is None:
                store = TCPStore(settings.address, settings.port, is_master=False, timeout=self._timeout)
            self._store = store  # the first sender's must live as long as the channel
            gloo: Any = distributed.ProcessGroupGloo
            options = gloo._Options()
            options._timeout = self._timeout
            # By address: a name would have to be resolved, which containers often cannot.
            options._devices = [gloo.create_device(hostname=host)]
            self._control: Any = gloo(PrefixStore("control", store), rank, size, options)
            self._data: Any = self._control
            if settings.transport == "broadcast" and device.type == "cuda":
                self._control.barrier().wait(self._timeout)  # NCCL itself waits for ever
                nccl: Any = distributed.ProcessGroupNCCL
                self._data = nccl(PrefixStore("data", store), rank, size, nccl.Options())

    def send(self, tensors: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        """Send all tensors of the settings, as they come.

        Raises:
            ChannelBroken: an end is gone or too slow, or `tensors` are not those of the settings.
        """
        buckets = self._buckets
        largest = max(map(_size, buckets), default=0)
        checksum = 0
        with _Buffer(self.settings.transport, largest, self.device) as buffer:
            for index, bucket in enumerate(buckets):
                with _stage(f"send bucket {index + 1} of {len(buckets)}"):
                    whole, end = buffer.bytes[: _size(bucket)], 0
                    for spec in bucket:
                        name, tensor = next(tensors)
                        if TensorSpec.of(name, tensor) != spec:
                            raise ValueError(f"expected {spec}, got {TensorSpec.of(name, tensor)}")
                        values = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                        whole[end : end + spec.bytes].copy_(values)
                        end += _aligned(spec.bytes)
                    checksum = mixed(checksum, whole)
                    if self.settings.transport == "ipc":
                        self._gather(buffer.handle())
                        self._control.barrier().wait(self._timeout)  # they have their copies
                    else:
                        self._broadcast(self._data, whole)
        with _stage("send the checksum"):
            self._broadcast(self._control, torch.tensor([version, checksum]))

    def receive(self, version: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, as they arrive. Their memory is nobody else's.

        Raises:
            ChannelBroken: an end is gone or too slow.
            WeightsCorrupt: at the end, if they are not what was sent, or of another version.
        """
        buckets = self._buckets
        checksum = 0
        for index, bucket in enumerate(buckets):
            with _stage(f"receive bucket {index + 1} of {len(buckets)}"):
                whole = torch.empty(_size(bucket), dtype=torch.uint8, device=self.device)
                if self.settings.transport == "ipc":
                    _copy_shared(self._gather(b"")[: self.settings.senders], whole)
                    self._control.barrier().wait(self._timeout)
                else:
                    self._broadcast(self._data, whole)
                checksum = mixed(checksum, whole)
            end = 0
            for spec in bucket:
                yield spec.name, whole[end : end + spec.bytes].view(getattr(torch, spec.dtype)).reshape(spec.shape)
                end += _aligned(spec.bytes)
        with _stage("receive the checksum"):
            sent = torch.empty(2, dtype=torch.int64)
            self._broadcast(self._control, sent)
        if sent.tolist() != [version, checksum]:
            raise WeightsCorrupt(
                f"version {version} with checksum {checksum:#x} arrived, version {int(sent[0])} with checksum "
                f"{int(sent[1]):#x} was sent"
            )

    def _broadcast(self, group: Any, tensor: torch.Tensor) -> None:
        options: Any = distributed.BroadcastOptions()
        options.rootRank = 0
        group.broadcast([tensor], options).wait(self._timeout)

    def _gather(self, handle: bytes) -> list[bytes]:
        """What each rank put in, by rank."""
        if len(handle) + 2 > HANDLE_BYTES:
            raise ValueError(f"a handle of {len(handle)} bytes; there is room for {HANDLE_BYTES - 2}")
        text = len(handle).to_bytes(2, "little") + handle
        mine = torch.frombuffer(bytearray(text.ljust(HANDLE_BYTES, b"\0")), dtype=torch.uint8)
        everyone = [torch.empty_like(mine) for _ in range(self._control.size())]
        self._control.allgather([everyone], [mine]).wait(self._timeout)
        texts = [part.numpy().tobytes() for part in everyone]
        return [text[2 : 2 + int.from_bytes(text[:2], "little")] for text in texts]


class _Buffer:
    """Memory for the buckets of a sender; with ipc others can map it."""

    def __init__(self, transport: str, size: int, device: torch.device) -> None:
        self._shared: SharedMemory | None = None
        if transport == "ipc" and device.type == "cpu":
            self._shared = SharedMemory(create=True, size=max(size, 1))
            self.bytes = torch.frombuffer(self._shared.buf, dtype=torch.uint8)[:size]
        else:
            self.bytes = torch.empty(size, dtype=torch.uint8, device=device)

    def handle(self) -> bytes:
        """What `_copy_shared` finds it by."""
        if self._shared is not None:
            return pickle.dumps(("cpu", self._shared.name))
        from torch.multiprocessing.reductions import reduce_tensor

        torch.cuda.synchronize(self.bytes.device)
        return pickle.dumps((_gpu(self.bytes.device), reduce_tensor(self.bytes)[1]))

    def __enter__(self) -> _Buffer:
        return self

    def __exit__(self, *_: object) -> None:
        del self.bytes
        if self._shared is not None:
            self._shared.close()
            self._shared.unlink()


def _copy_shared(handles: Sequence[bytes], target: torch.Tensor) -> None:
    """Fill `target` from the sender's bucket that lies on its device."""
    shared = dict(pickle.loads(handle) for handle in handles)  # of our own ranks, over our own connection
    here = "cpu" if target.device.type == "cpu" else _gpu(target.device)
    if here not in shared:
        raise ValueError(f"no learner rank is on this engine's device {here}, but on {', '.join(map(str, shared))}")
    if here == "cpu":
        block = SharedMemory(name=shared[here])
        _forget(block)
        source = torch.frombuffer(block.buf, dtype=torch.uint8)
        target.copy_(source[: len(target)])
        del source
        block.close()
        return
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    arguments = list(shared[here])
    arguments[6] = target.device.index  # the sender's number of the same GPU may be another
    target.copy_(rebuild_cuda_tensor(*arguments)[: len(target)])
    torch.cuda.synchronize(target.device)


def _forget(block: SharedMemory) -> None:
    """Python 3.11 takes whoever opens a block for its owner, and would remove it when this process ends."""
    from multiprocessing import resource_tracker

    resource_tracker.unregister(block._name, "shared_memory")  # type: ignore[attr-defined]


def _gpu(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


@contextmanager
def _stage(what: str) -> Iterator[None]:
    """Name the stage in whatever goes wrong there."""
    try:
        yield
    except ChannelBroken:
        raise
    except Exception as error:
        reason = re.sub(r"\[\S*\.cc:\d+\] *", "", " ".join(str(error).split()))  # where in Gloo's source it was noticed
        raise ChannelBroken(f"{what}: {reason[:300] or type(error).__name__}") from error
