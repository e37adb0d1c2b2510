"""A small module of every kind of parameter, and how the tests train it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_muon.optim import HybridOptimizer, Muon

exact_muon = partial(Muon, lr=0.02, orthogonalize_dtype="float32")
plain_adamw = partial(AdamW, lr=0.003)


def adamw(params: Any) -> Optimizer:
    return AdamW(params, lr=0.01)


class Net(nn.Module):
    """Embedding tied to the head, attention with a fused projection, convolution, norm, linears."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.conv(x.mT).mT
        return self.head(self.norm(x + self.body(x)))


TOKENS = torch.arange(24).reshape(4, 6) * 7 % 11


def train(net: nn.Module, optimizer: Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = net(TOKENS[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def build(net: nn.Module, **options: Any) -> HybridOptimizer:
    return HybridOptimizer.from_module(net, **{"matrix": exact_muon, "other": plain_adamw, **options})


def names_of(optimizer: Optimizer) -> dict[str, str]:
    """Parameter name -> group name."""
    return {name: group["name"] for group in optimizer.param_groups for name in group["param_names"]}


def assert_linked(optimizer: HybridOptimizer) -> None:
    """The groups are the children's very dicts, in order, and all share one state."""
    own = [group for child in optimizer.optimizers.values() for group in child.param_groups]
    assert len(own) == len(optimizer.param_groups)
    assert all(first is second for first, second in zip(own, optimizer.param_groups, strict=True))
    assert all(child.state is optimizer.state for child in optimizer.optimizers.values())


def assert_linked_in_any_order(optimizer: HybridOptimizer) -> None:
    own = {id(group) for child in optimizer.optimizers.values() for group in child.param_groups}
    assert own == {id(group) for group in optimizer.param_groups}
    assert len(own) == len(optimizer.param_groups)
    assert all(child.state is optimizer.state for child in optimizer.optimizers.values())
