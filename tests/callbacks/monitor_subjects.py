"""Subjects of the monitors' tests: a module with every kind of matrix, and slices of it written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, TypeAlias

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from lightning_muon import MuonMixin
from tests.lightning_helpers import NUM_ITEMS

WIDTH = 8
MakeOptimizer: TypeAlias = Callable[[Iterable[Any]], torch.optim.Optimizer]


class GroupedQuery(nn.Module):
    """Attention with four heads of queries and two of keys and values, fused in unequal blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = 4, 2, 2
        self.qkv = nn.Linear(WIDTH, 16)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(x).split([8, 4, 4], -1)
        )
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        scores = (query @ key.mT / math.sqrt(self.head_dim)).softmax(-1)
        return self.mix((scores @ value).transpose(1, 2).flatten(-2))


class Experts(nn.Module):
    """Three experts, all of which see every token."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.up = nn.Parameter(torch.randn(3, 10, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(3, WIDTH, 10) / 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bld,emd->blem", x, self.up).relu()
        return torch.einsum("blem,edm->bld", hidden, self.down)


class Zoo(pl.LightningModule):
    """Every kind of matrix between an embedding and a head that is tied to it.

    ``make_optimizer`` is called with all parameters, the frozen ones too.
    """

    def __init__(
        self, make_optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None = None, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        self.make_optimizer = make_optimizer
        torch.manual_seed(11)
        self.embed = nn.Embedding(NUM_ITEMS, WIDTH)
        self.square = nn.Linear(WIDTH, WIDTH)
        self.tall = nn.Linear(WIDTH, 20)
        self.wide = nn.Linear(20, WIDTH)
        self.conv = nn.Conv1d(WIDTH, 12, 3, padding=1)
        self.grouped = nn.Conv1d(12, WIDTH, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.query = GroupedQuery()
        self.gru = nn.GRU(WIDTH, 6, batch_first=True)
        self.back = nn.Linear(6, WIDTH)
        self.experts = Experts()
        self.shared_a = nn.Linear(WIDTH, WIDTH)
        self.shared_b = nn.Linear(WIDTH, WIDTH)
        self.shared_b.weight = self.shared_a.weight
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, NUM_ITEMS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, items: Tensor) -> Tensor:
        x = self.embed(items)
        x = x + self.square(x).tanh()
        x = x + self.wide(self.tall(x).relu())
        x = x + self.grouped(self.conv(x.mT).relu()).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.query(x)
        x = x + self.back(self.gru(x)[0])
        x = x + self.experts(x)
        x = x + self.shared_b(self.shared_a(x).tanh()) + self.frozen(x)
        return self.head(self.norm(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        items, targets = batch
        loss = nn.functional.cross_entropy(self(items).flatten(0, 1), targets.flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


class MuonZoo(MuonMixin, Zoo):
    """The same with the mixin."""


class Pair(pl.LightningModule):
    """Two matrices, ``tall`` (20, 8) and ``wide`` (8, 20), for tests in which the kind of matrix does not matter."""

    def __init__(
        self, make_optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None = None, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        self.make_optimizer = make_optimizer
        torch.manual_seed(5)
        self.embed = nn.Embedding(NUM_ITEMS, WIDTH)
        self.tall = nn.Linear(WIDTH, 20)
        self.wide = nn.Linear(20, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, NUM_ITEMS)

    forward_wide = True

    def forward(self, items: Tensor) -> Tensor:
        x = self.embed(items)
        hidden = self.tall(x).relu()
        x = x + (self.wide(hidden) if self.forward_wide else hidden[..., :WIDTH])
        return self.head(self.norm(x))

    training_step = Zoo.training_step
    configure_optimizers = Zoo.configure_optimizers


class MuonPair(MuonMixin, Pair):
    """The same with the mixin."""


class GaussianLayers(pl.LightningModule):
    """Gaussian matrices, whose leading singular values lie close together: hard for power iteration."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.embed = nn.Embedding(NUM_ITEMS, 128)
        self.square = nn.Linear(128, 128)
        self.tall = nn.Linear(128, 200)
        self.wide = nn.Linear(200, 128)
        self.head = nn.Linear(128, NUM_ITEMS)
        for layer in (self.square, self.tall, self.wide):
            nn.init.normal_(layer.weight, std=0.05)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self.head(self.wide(self.tall(self.square(self.embed(batch[0])))))
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def _rows(*bounds: int) -> list[Callable[[np.ndarray], np.ndarray]]:
    """Consecutive slices of the first dimension, the rest flattened."""
    return [lambda w, a=a, b=b: w[a:b].reshape(b - a, -1) for a, b in pairwise(bounds)]


_BLOCKS: dict[str, list[Callable[[np.ndarray], np.ndarray]]] = {
    "square.weight": [lambda w: w],
    "tall.weight": [lambda w: w],
    "wide.weight": [lambda w: w],
    "conv.weight": [lambda w: w.reshape(12, 24)],
    "grouped.weight": _rows(0, 4, 8),
    "attention.in_proj_weight": _rows(0, 8, 16, 24),
    "attention.out_proj.weight": [lambda w: w],
    "query.qkv.weight": _rows(0, 8, 12, 16),
    "query.mix.weight": [lambda w: w],
    "gru.weight_ih_l0": _rows(0, 6, 12, 18),
    "gru.weight_hh_l0": _rows(0, 6, 12, 18),
    "back.weight": [lambda w: w],
    "experts.up": [lambda w, i=i: w[i] for i in range(3)],
    "experts.down": [lambda w, i=i: w[i] for i in range(3)],
    "shared_a.weight": [lambda w: w],
    "frozen.weight": [lambda w: w],
    "embed.weight": [lambda w: w],
    "head.weight": [lambda w: w],
}
PAIR_MATRICES = ["tall.weight", "wide.weight"]
_BLOCK_NAMES = {
    "attention.in_proj_weight": "qkv",
    "query.qkv.weight": "qkv",
    "gru.weight_ih_l0": "rzn",
    "gru.weight_hh_l0": "rzn",
}


def _names(parameter: str) -> list[str]:
    """What the matrices of a parameter are called."""
    count = len(_BLOCKS[parameter])
    return [parameter] if count == 1 else [f"{parameter}.{end}" for end in _BLOCK_NAMES.get(parameter, range(count))]


ZOO_MATRICES = [
    name
    for parameter in _BLOCKS
    if parameter not in ("frozen.weight", "embed.weight", "head.weight")
    for name in _names(parameter)
]


def matrices(tensors: dict[str, Tensor], among: Iterable[str]) -> dict[str, np.ndarray]:
    """The float64 matrices of named tensors, by matrix name, of those that are asked for."""
    found = {}
    for name, tensor in tensors.items():
        if name not in _BLOCKS:
            continue
        for matrix_name, block in zip(_names(name), _BLOCKS[name], strict=True):
            if matrix_name in among:
                found[matrix_name] = block(tensor.detach().double().numpy())
    return found
