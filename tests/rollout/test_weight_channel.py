"""Weights from process to process: what arrives is what was sent, or an error that names the stage. Over real Gloo.

The ends of a channel are mostly threads here; tests/rl/test_learner.py has them in a learner's ranks and
tests/rollout/test_channel_sync.py in vLLM's workers.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import reduce
from typing import Any

import pytest
import torch

from memento.rollout import weight_channel
from memento.rollout.channel_records import LOOPBACK, ChannelBroken, ChannelSettings, TensorSpec
from memento.rollout.weight_channel import WeightChannel, cut, mixed, open_store
from memento.rollout.weights import WeightsCorrupt

CPU = torch.device("cpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """All shapes and types that models have, and sizes that are no multiple of anything."""
    torch.manual_seed(seed)
    return {
        "embed.weight": torch.randn(31, 7),
        "norm.weight": torch.randn(7, dtype=torch.bfloat16),
        "odd": torch.randint(0, 255, (3,), dtype=torch.uint8),
        "scale": torch.tensor(0.5 + seed),
        "nothing": torch.empty(0, 4),
        "turned": torch.randn(4, 6).T,
        "half": torch.randn(5, 5, dtype=torch.float16),
    }


def specs(of: dict[str, torch.Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec.of(name, tensor) for name, tensor in of.items())


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens shared memory here is also who made it, and removes it."""
    monkeypatch.setattr(weight_channel, "_forget", lambda block: None)


def channels(
    transport: str, *, senders: int = 1, receivers: int = 2, bucket_bytes: int = 256, timeout_s: float = 20.0
) -> list[WeightChannel]:
    """All ends of a channel, in one process."""
    store = open_store(timeout_s)
    settings = ChannelSettings.model_validate(
        {
            "transport": transport,
            "address": LOOPBACK,
            "port": store.port,
            "senders": senders,
            "receivers": receivers,
            "tensors": specs(tensors()),
            "bucket_bytes": bucket_bytes,
            "timeout_s": timeout_s,
        }
    )
    size = senders + receivers
    with ThreadPoolExecutor(size) as threads:
        ends = [
            threads.submit(WeightChannel, settings, rank, CPU, LOOPBACK, store if rank == 0 else None)
            for rank in range(size)
        ]
        return [end.result(timeout=60) for end in ends]


def transfer(
    ends: Sequence[WeightChannel], sent: dict[str, torch.Tensor], version: int, expected: int | None = None
) -> tuple[list[Future[None]], list[Future[dict[str, torch.Tensor]]]]:
    """Send through a channel; what became of it at every end."""
    senders = ends[0].settings.senders
    with ThreadPoolExecutor(len(ends)) as threads:
        sending = [threads.submit(end.send, iter(sent.items()), version) for end in ends[:senders]]
        wanted = version if expected is None else expected
        received = [threads.submit(lambda e=end: dict(e.receive(wanted))) for end in ends[senders:]]
    return sending, received


@pytest.mark.parametrize("transport", ["broadcast", "ipc"])
@pytest.mark.parametrize("bucket_bytes", [1, 256, 1 << 20])
def test_what_arrives_is_what_was_sent_version_after_version(transport: str, bucket_bytes: int) -> None:
    ends = channels(transport, senders=2 if transport == "ipc" else 1, bucket_bytes=bucket_bytes)
    kept = []
    for version in (1, 2, 7):
        sent = tensors(version)
        sending, received = transfer(ends, sent, version)
        for future in sending:
            future.result()
        for future in received:
            got = future.result()
            assert list(got) == list(sent)
            for name, tensor in sent.items():
                assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
            kept.append((sent, got))
    for sent, got in kept:  # later versions did not write over it
        assert all(torch.equal(got[name], tensor) for name, tensor in sent.items())


def test_buckets_keep_the_order_and_hold_no_more_than_they_may_but_for_one_large_tensor() -> None:
    sizes = [10, 10, 300, 5, 90, 16, 16]
    many = [TensorSpec(name=str(i), dtype="uint8", shape=(size,), bytes=size) for i, size in enumerate(sizes)]
    buckets = list(cut(many, 128))
    assert [tensor for bucket in buckets for tensor in bucket] == many
    assert [[tensor.bytes for tensor in bucket] for bucket in buckets] == [[10, 10], [300], [5, 90, 16], [16]]
    assert list(cut([], 128)) == []


def test_another_version_than_the_announced_one_is_noticed() -> None:
    sending, received = transfer(channels("broadcast"), tensors(), 3, expected=4)
    sending[0].result()
    for future in received:
        with pytest.raises(WeightsCorrupt, match=r"version 4 .* arrived, version 3 .* was sent"):
            future.result()


class OneBitWrong:
    """A process group whose broadcasts arrive with a bit of their last byte turned over, once."""

    def __init__(self, group: Any) -> None:
        self.group, self.done = group, False

    def broadcast(self, values: list[torch.Tensor], options: Any) -> Any:
        work = self.group.broadcast(values, options)
        work.wait()
        if not self.done and values[0].dtype == torch.uint8:
            values[0][-1] ^= 1
            self.done = True
        return work


def test_a_single_wrong_bit_is_noticed() -> None:
    ends = channels("broadcast")
    ends[1]._data = OneBitWrong(ends[1]._data)
    sending, (damaged, whole) = transfer(ends, tensors(), 3)
    sending[0].result()
    assert whole.result().keys() == tensors().keys()
    with pytest.raises(WeightsCorrupt, match="checksum"):
        damaged.result()


@pytest.mark.parametrize("change", ["swapped", "repeated", "lost"])
def test_the_checksum_sees_whole_buckets(change: str) -> None:
    a, b = torch.arange(64, dtype=torch.uint8), torch.arange(64, 128, dtype=torch.uint8)
    other = {"swapped": [b, a], "repeated": [a, a, b], "lost": [a]}[change]
    assert reduce(mixed, [a, b], 0) != reduce(mixed, other, 0)


def test_tensors_that_are_not_those_that_were_agreed_on_are_named() -> None:
    wrong = tensors() | {"norm.weight": torch.randn(8, dtype=torch.bfloat16)}
    ends = channels("broadcast", timeout_s=2.0)
    sending, received = transfer(ends, wrong, 1)
    with pytest.raises(ChannelBroken, match=r"send bucket 2 of .*norm.weight"):
        sending[0].result()
    with pytest.raises(ChannelBroken, match="receive bucket 2 of"):
        received[0].result()


def test_who_waits_for_somebody_who_never_comes_is_told_in_time() -> None:
    store = open_store(1.0)
    settings = ChannelSettings(
        transport="broadcast",
        address=LOOPBACK,
        port=store.port,
        senders=1,
        receivers=1,
        tensors=specs(tensors()),
        bucket_bytes=64,
        timeout_s=1.0,
    )
    began = time.monotonic()
    with pytest.raises(ChannelBroken, match="open the channel, rank 0 of 2"):
        WeightChannel(settings, 0, CPU, LOOPBACK, store)
    assert time.monotonic() - began < 20


def test_a_receiver_that_is_gone_is_noticed_at_a_bucket() -> None:
    ends = channels("broadcast", receivers=1, bucket_bytes=64, timeout_s=3.0)
    del ends[1]

    with pytest.raises(ChannelBroken, match=r"send bucket \d of|send the checksum"):
        ends[0].send(iter(tensors().items()), 1)


def test_ipc_needs_a_sender_on_the_same_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    handle = weight_channel._Buffer.handle

    def elsewhere(self: Any) -> bytes:
        return pickle.dumps(("GPU-elsewhere", pickle.loads(handle(self))[1]))

    monkeypatch.setattr(weight_channel._Buffer, "handle", elsewhere)
    sending, received = transfer(channels("ipc", receivers=1, timeout_s=2.0), tensors(), 1)
    with pytest.raises(ChannelBroken, match="no learner rank is on this engine's device cpu, but on GPU-elsewhere"):
        received[0].result()
    with pytest.raises(ChannelBroken, match="send bucket 1"):
        sending[0].result()


def receive_elsewhere(settings: dict[str, Any], device: str) -> list[tuple[str, str, bytes]]:
    """Runs in a process of its own: what arrives there, for two versions."""
    end = WeightChannel(ChannelSettings.model_validate(settings), 1, torch.device(device), LOOPBACK)
    got = [pair for version in (1, 2) for pair in end.receive(version)]
    return [
        (name, str(t.dtype), t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) for name, t in got
    ]


@pytest.mark.parametrize(
    ("transport", "device"),
    [("broadcast", "cpu"), ("ipc", "cpu"), pytest.param("ipc", "cuda:0", marks=gpu)],
)
def test_two_processes(transport: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # here each process has its own tracker of shared memory
    store = open_store(60)
    settings = ChannelSettings.model_validate(
        {
            "transport": transport,
            "address": LOOPBACK,
            "port": store.port,
            "senders": 1,
            "receivers": 1,
            "tensors": specs(tensors()),
            "bucket_bytes": 256,
            "timeout_s": 60,
        }
    )
    sent = [{name: t.to(device) for name, t in tensors(seed).items()} for seed in (1, 2)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        elsewhere = processes.submit(receive_elsewhere, settings.model_dump(mode="json"), device)
        end = WeightChannel(settings, 0, torch.device(device), LOOPBACK, store)
        for version, weights in enumerate(sent, 1):
            end.send(iter(weights.items()), version)
        got = elsewhere.result(timeout=120)
    expected = [(name, t) for weights in sent for name, t in weights.items()]
    assert [(name, dtype) for name, dtype, _ in got] == [(name, str(t.dtype)) for name, t in expected]
    for (name, _, data), (_, t) in zip(got, expected, strict=True):
        assert data == t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), name
