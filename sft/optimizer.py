"""Optimisers and learning-rate schedules of SFT."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn

from memento.config import SftConfig


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the hidden matrices, AdamW for embeddings, head, norms and biases, as one optimiser.

    Muon (Jordan et al., 2024) orthogonalises a matrix's momentum, so it needs whole matrices: it works where the
    optimiser sees the model's own parameters (ZeRO stage 0), not flattened shards of them.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        *,
        muon_lr: float,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        self._parts = [
            torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=weight_decay),
            torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay),
        ]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The parts work on this optimiser's groups and state, so that schedules and checkpoints see one optimiser."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups = [group]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self._parts:
            part.step()
        return loss


def make_optimizer(model: nn.Module, config: SftConfig) -> torch.optim.Optimizer:
    """The optimiser of a stage, over all trainable parameters of `model`."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trainable if p.ndim == 2 and id(p) not in embeddings and "lm_head" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in trainable if id(p) not in chosen]
    if config.optimizer == "muon":
        return MuonWithAdamW(
            matrices,
            others,
            muon_lr=config.muon_lr,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(
        [p for _, p in trainable], lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )


def learning_rate(config: SftConfig, steps: int) -> Callable[[int], float]:
    """Factor of the learning rate for each optimiser step, counted from 0.

    Warm-up rises linearly and already moves at step 0. Then ``cosine`` falls to 0; ``flat_linear`` stays at 1 to 60 %
    of the steps and falls linearly to 3 %.
    """
    warmup = config.warmup * steps if config.warmup < 1 else config.warmup

    def factor(step: int) -> float:
        if step + 1 < warmup:
            return (step + 1) / warmup
        if config.schedule == "cosine":
            progress = (step - warmup) / max(1.0, steps - warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
        flat = 0.6 * steps
        return 1.0 if step <= flat else max(0.03, 1 - 0.97 * (step - flat) / max(1.0, steps - 1 - flat))

    return factor
