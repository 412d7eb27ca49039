"""How an engine's workers take new weights: vLLM's own weight transfer, with a backend of ours.

vLLM's backends (``nccl``, ``ipc``, ...) are for GPUs only, check nothing and know no file to fall back to. This module
registers one more, ``memento``, when it is imported; every worker imports it because `WorkerExtension` is its
``worker_extension_cls``. The calls stay vLLM's own (``init_weight_transfer_engine``, ``start_weight_update``,
``update_weights``, ``finish_weight_update``). An update is a file (`memento.rollout.weights`) or comes through a
channel (`memento.rollout.weight_channel`): the load is the same.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from memento.rollout.channel_records import ChannelBroken, ChannelSettings, ChannelUpdate
from memento.rollout.engine_process import PARENT_VARIABLE
from memento.rollout.weight_channel import WeightChannel
from memento.rollout.weights import WeightUpdate, read_weights

BACKEND = "memento"


class WeightsIncomplete(RuntimeError):
    """An update lacks parameters of the model: part of the engine would go on with old ones."""


@dataclass
class ChannelInitInfo(WeightTransferInitInfo):
    """A channel to open; a file needs none.

    Attributes:
        settings: `ChannelSettings` as plain values, as they travel to the worker processes.
        first_rank: of this engine's workers in the channel.
        host: this machine's address, as the others reach it.
    """

    settings: dict[str, Any]
    first_rank: int
    host: str


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """The `WeightUpdate` or `ChannelUpdate` as plain values."""

    update: dict[str, Any]


class WeightTransfer(WeightTransferEngine[ChannelInitInfo, UpdateInfo]):
    """A whole update happens in `receive_weights`, so a file that cannot be read changes nothing."""

    init_info_cls = ChannelInitInfo
    update_info_cls = UpdateInfo
    _channel: WeightChannel | None = None

    def init_transfer_engine(self, init_info: ChannelInitInfo) -> None:
        """Join the learner and the other workers."""
        self._channel = None  # the one before, before it: its sockets
        rank = init_info.first_rank + self.parallel_config.rank
        settings = ChannelSettings.model_validate(init_info.settings)
        self._channel = WeightChannel(settings, rank, self.device, init_info.host)

    def start_weight_update(self) -> None:
        """Nothing to prepare."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # the base class does this always, and torch.accelerator has no CPU
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        tensors = self._tensors(update_info.update)
        names = {name for name, _ in self.model.named_parameters()}
        # On CPU the linear layers keep a packed copy and drop their weight: a plain load_weights() has nothing to write
        # to. The layerwise reload restores, loads and packs them again.
        initialize_layerwise_reload(self.model)
        model: Any = self.model  # vLLM's models take Hugging Face names
        loaded = model.load_weights(tensors)
        finalize_layerwise_reload(self.model, self.model_config)
        if missing := names - set(loaded):
            raise WeightsIncomplete(f"the weights lack {', '.join(sorted(missing)[:3])} ({len(missing)} in all)")
        if self.device.type == "cpu":
            _pack_heads_again(self.model)

    def _tensors(self, update: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        if "path" in update:
            return iter(read_weights(WeightUpdate.model_validate(update)).items())
        if self._channel is None:
            raise ChannelBroken("weights were announced through a channel that this engine never joined")
        return self._channel.receive(ChannelUpdate.model_validate(update).version)

    def finish_weight_update(self) -> None:
        """Nothing left to do."""

    def shutdown(self) -> None:
        """Leave the channel."""
        self._channel = None


def _pack_heads_again(model: torch.nn.Module) -> None:
    """A tied head keeps the packed copy of its *old* weights over a reload (log-probs off by 1, without an error)."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def end_with_parent() -> None:
    """In an engine core that an actor started: die when the actor does, even by SIGKILL, and free memory and GPU."""
    if os.environ.get(PARENT_VARIABLE) == str(os.getppid()):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


end_with_parent()

if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, WeightTransfer)


class WorkerExtension:
    """vLLM mixes this into its worker. Naming it is what makes every worker process import this module."""
