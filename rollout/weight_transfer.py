"""How an engine's workers take a weight file: vLLM's own weight transfer, with a backend of ours.

vLLM ships backends for GPUs only (``nccl``, ``ipc``, ...). This module registers one more, ``safetensors``, when it is
imported; every worker imports it because `WorkerExtension` is its ``worker_extension_cls``. The calls stay vLLM's own
(``start_weight_update``, ``update_weights``, ``finish_weight_update``), so another backend is a matter of
``weight_transfer_config`` and of what `update_info` holds.
"""

from __future__ import annotations

import ctypes
import os
import signal
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from memento.rollout.engine_process import PARENT_VARIABLE
from memento.rollout.weights import WeightUpdate, read_weights

BACKEND = "safetensors"


class WeightsIncomplete(RuntimeError):
    """A weight file lacks parameters of the model: part of the engine would go on with old ones."""


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """A file needs no rendezvous."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """The `WeightUpdate` as plain values, as it travels to the worker processes."""

    update: dict[str, Any]


class FileWeightTransfer(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Load one safetensors file. A whole update happens in `receive_weights`, so a bad file changes nothing."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Nothing to prepare."""

    def start_weight_update(self) -> None:
        """Nothing to prepare."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # the base class does this always, and torch.accelerator has no CPU
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        tensors = read_weights(WeightUpdate.model_validate(update_info.update))
        names = {name for name, _ in self.model.named_parameters()}
        # On CPU the linear layers keep a packed copy and drop their weight: a plain load_weights() has nothing to write
        # to. The layerwise reload restores, loads and packs them again.
        initialize_layerwise_reload(self.model)
        model: Any = self.model  # vLLM's models take Hugging Face names
        loaded = model.load_weights(iter(tensors.items()))
        finalize_layerwise_reload(self.model, self.model_config)
        if missing := names - set(loaded):
            raise WeightsIncomplete(f"the weights lack {', '.join(sorted(missing)[:3])} ({len(missing)} in all)")
        if self.device.type == "cpu":
            _pack_heads_again(self.model)

    def finish_weight_update(self) -> None:
        """Nothing left to do."""

    def shutdown(self) -> None:
        """Nothing to release."""


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
    WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransfer)


class WorkerExtension:
    """vLLM mixes this into its worker. Naming it is what makes every worker process import this module."""
