"""A module whose parameters hold several matrices each, and where they lie."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_muon import MuonMixin
from tests.lightning_helpers import NUM_ITEMS, Bare


class FusedLayers(nn.Module):
    """Attention with q, k and v in one tensor, a GRU with its gates in one, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(NUM_ITEMS, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gru = nn.GRU(8, 6, batch_first=True)
        self.mix = nn.Conv1d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, NUM_ITEMS)

    def forward(self, items: Tensor) -> Tensor:
        hidden = self.embed(items)
        hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        return self.head(self.mix(self.gru(hidden)[0].mT).mT)


class Fused(MuonMixin, Bare):
    """The same to be trained."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.layers = FusedLayers()


def fused_matrices(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The hidden matrices in a state dict of :class:`Fused`, cut by hand, in the module's order."""
    blocks = {}
    for name, size in (("attention.in_proj_weight", 8), ("attention.out_proj.weight", 8)):
        blocks[f"layers.{name}"] = torch.split(state[f"layers.{name}"], size)
    for name in ("gru.weight_ih_l0", "gru.weight_hh_l0"):
        blocks[f"layers.{name}"] = torch.split(state[f"layers.{name}"], 6)
    blocks["layers.mix.weight"] = (state["layers.mix.weight"].flatten(1),)
    return {
        name if len(parts) == 1 else f"{name}.{index}": part
        for name, parts in blocks.items()
        for index, part in enumerate(parts)
    }
