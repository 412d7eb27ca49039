"""Optimisers and schedules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from memento.config import SftConfig
from memento.sft.optimizer import MuonWithAdamW, learning_rate, make_optimizer


def config(**changes: object) -> SftConfig:
    phases = [{"steps": 1, "problems": {}}]
    return SftConfig.model_validate({"stage": "stage1", "out": "unused", "phases": phases} | changes)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 4)
        self.inner = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 5, bias=False)

    def loss(self) -> torch.Tensor:
        return self.lm_head(self.norm(self.inner(self.embed(torch.arange(5))))).logsumexp(-1).sum()


def train(network: Network, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        network.zero_grad()
        network.loss().backward()
        optimizer.step()


def test_muon_takes_the_inner_matrices_only() -> None:
    network = Network()
    optimizer = make_optimizer(network, config(optimizer="muon", lr=1e-3, muon_lr=0.1))
    muon, adam = optimizer.param_groups
    assert [id(p) for p in muon["params"]] == [id(network.inner.weight)]
    assert {id(p) for p in adam["params"]} == {id(p) for p in network.parameters()} - {id(network.inner.weight)}
    assert (muon["lr"], adam["lr"]) == (0.1, 1e-3)


def test_muon_with_adamw_is_each_of_them_on_its_part() -> None:
    ours, theirs = Network(), Network()
    optimizer = make_optimizer(ours, config(optimizer="muon", lr=1e-2, muon_lr=0.05))
    assert isinstance(optimizer, MuonWithAdamW)
    train(ours, optimizer, 3)
    matrix, others = [theirs.inner.weight], [p for p in theirs.parameters() if p is not theirs.inner.weight]
    parts = [
        torch.optim.Muon(matrix, lr=0.05, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=1e-2, weight_decay=0.0),
    ]
    for _ in range(3):
        theirs.zero_grad()
        theirs.loss().backward()
        for part in parts:
            part.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_saved_and_loaded_optimizer_goes_on_as_before(name: str) -> None:
    straight = Network()
    optimizer = make_optimizer(straight, config(optimizer=name, lr=1e-2))
    train(straight, optimizer, 2)
    resumed = copy.deepcopy(straight)
    again = make_optimizer(resumed, config(optimizer=name, lr=1e-2))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(straight, optimizer, 2)
    train(resumed, again, 2)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedules_by_hand() -> None:
    flat = learning_rate(config(schedule="flat_linear", warmup=10), 101)
    assert [flat(0), flat(4), flat(9), flat(60)] == [0.1, 0.5, 1.0, 1.0]
    assert flat(100) == pytest.approx(0.03)
    assert 0.5 < flat(80) < 0.53
    cosine = learning_rate(config(schedule="cosine", warmup=0.05), 100)
    assert cosine(0) == pytest.approx(0.2)
    assert cosine(5) == 1.0
    assert cosine(52) == pytest.approx(0.5, abs=0.01)
    assert cosine(99) == pytest.approx(0.0, abs=0.001)
