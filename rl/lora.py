"""Low-rank adapters (PEFT): put into the model, switched off for the reference, merged for engines and exports.

The adapter is injected in place, so the model keeps its class, and everything that asks it for its decoder or its
output head finds them. What leaves the learner never holds an adapter: ``W + alpha / rank * B A`` goes out under the
name that ``W`` had. Source: LoRA, arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memento.config import LoraConfig
from memento.errors import UserError

ADAPTER = "default"
"""PEFT's name of the only adapter there is."""


def add_adapter(model: Any, lora: LoraConfig, seed: int) -> None:
    """Freeze a transformers model and give its linear layers an adapter that does nothing yet (B is 0).

    Args:
        model: changed in place. Under ZeRO-3 its weights may be shards already.
        lora: rank, scale and layers.
        seed: of A. All ranks need the same: ZeRO-3 keeps each rank's own part of what that rank made.

    Raises:
        UserError: the model has no layer of a name in ``target_modules``.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    targets = list(lora.target_modules) or "all-linear"
    peft = PeftConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, bias="none")  # pyright: ignore[reportArgumentType]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(peft, model, adapter_name=ADAPTER)
        except ValueError as error:
            raise UserError(f"learner.lora.target_modules: {' '.join(str(error).split())}") from error


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes what it did before `add_adapter`."""
    layers: list[Any] = [module for module in model.modules() if _is_adapted(module)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@dataclass(frozen=True, slots=True, eq=False)
class ExportedTensor:
    """A tensor as engines and Hugging Face folders know it, and where its values are.

    Attributes:
        name: Hugging Face's.
        parameters: the weight, and the adapter's A and B where it has one: what ZeRO-3 must gather.
        scale: of the adapter.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    scale: float = 0.0

    def value(self) -> torch.Tensor:
        """The values, merged. The parameters must be whole. Without an adapter it shares the parameter's memory."""
        if len(self.parameters) == 1:
            return self.parameters[0].detach()
        weight, a, b = (parameter.detach() for parameter in self.parameters)
        return merged(weight, a, b, self.scale)


def exported_tensors(model: nn.Module) -> list[ExportedTensor]:
    """Every parameter of a model, with or without adapters, once (tied ones under their first name)."""
    adapted: dict[str, Any] = {name: module for name, module in model.named_modules() if _is_adapted(module)}
    found = []
    for name, parameter in model.named_parameters():
        owner, inside, leaf = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        if not inside:
            found.append(ExportedTensor(name, (parameter,)))
        elif leaf == "weight":
            layer = adapted[owner]
            pair = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
            found.append(ExportedTensor(f"{owner}.weight", (parameter, *pair), layer.scaling[ADAPTER]))
        else:
            found.append(ExportedTensor(f"{owner}.{leaf}", (parameter,)))
    return found


def merge_state(state: Mapping[str, torch.Tensor], lora: LoraConfig) -> dict[str, torch.Tensor]:
    """A state dict with adapters as one without, the same as `exported_tensors` gives."""
    whole = {}
    for name, tensor in state.items():
        owner, inside, leaf = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        if inside and leaf == "weight":
            a, b = (state[f"{owner}.lora_{which}.{ADAPTER}.weight"] for which in "AB")
            tensor = merged(tensor, a, b, lora.alpha / lora.rank)
        whole[f"{owner}.{leaf}" if inside else name] = tensor
    return whole


def merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """``weight + scale * b @ a`` in fp32, rounded once to the weight's dtype. [out, in], [rank, in], [out, rank]."""
    return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")
