"""SASRec: self-attentive sequential recommendation (Kang and McAuley 2018, arXiv 1808.09781), in two forms."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from examples.recsys.models.base import NextItemRecommender
from examples.recsys.models.layers import RealPositions, SequenceEmbedding
from examples.recsys.models.losses import binary_cross_entropy_loss, sampled_softmax_loss, softmax_loss
from lightning_muon import MuonMixin


class SASRec(MuonMixin, NextItemRecommender):
    """SASRec in the form that does best today: pre-norm blocks, tied output, softmax over the items.

    Args:
        num_items: size of the catalogue; ids are 1..num_items, 0 is padding.
        max_length: longest history.
        hidden_size: width d.
        num_blocks: number of blocks of attention and feed-forward.
        num_heads: number of attention heads; divides ``hidden_size``.
        ffn_size: inner width of the feed-forward.
        dropout: dropout of the embeddings, the attention weights and each half block's output.
        num_negatives: number of uniform negatives in the softmax, shared by the batch; None takes all items.
        mask_history: whether validation leaves the items of the history out of the ranking.
        **kwargs: optimizers, schedule and rules of :class:`lightning_muon.MuonMixin`.

    Raises:
        ValueError: if ``num_heads`` does not divide ``hidden_size``, or a history is longer than ``max_length``.
    """

    def __init__(
        self,
        num_items: int,
        max_length: int = 50,
        hidden_size: int = 64,
        num_blocks: int = 2,
        num_heads: int = 2,
        ffn_size: int = 256,
        dropout: float = 0.3,
        num_negatives: int | None = None,
        mask_history: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_items=num_items, mask_history=mask_history, **kwargs)
        self.save_hyperparameters()
        self.num_negatives = num_negatives
        self.embedding = SequenceEmbedding(num_items, max_length, hidden_size, dropout)
        self.blocks = nn.ModuleList(PreNormBlock(hidden_size, num_heads, ffn_size, dropout) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(hidden_size)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.embedding.reset_parameters(std=0.02)

    def encode(self, history: Tensor) -> Tensor:
        x, real = self.embedding(history)
        for block in self.blocks:
            x = block(x, real)
        return self.norm(x)

    def output_layer(self) -> tuple[Tensor, None]:
        return self.embedding.items.weight[1:], None

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        weight, _ = self.output_layer()
        if self.num_negatives is None:
            return softmax_loss(states, targets, weight)
        return sampled_softmax_loss(states, targets, weight, num_negatives=self.num_negatives)


class PaperSASRec(MuonMixin, NextItemRecommender):
    """SASRec as in the MuonRec study (arXiv 2603.00416): one block, one head, untied output, binary cross-entropy.

    The queries come from the normalized input, keys and values from the input itself. There is no output projection,
    and the residual connections add normalized inputs. The feed-forward is two linear maps (convolutions of width 1 in
    the study). Item embeddings start from N(0, 0.01²) and positions from N(0, 1), as in the study's code. The study
    uses ``samples: prefix`` and ``max_length: 10`` in the data.

    Args:
        num_items: size of the catalogue; ids are 1..num_items, 0 is padding.
        max_length: longest history.
        hidden_size: width d.
        dropout: dropout of the embeddings, the attention weights and the feed-forward.
        mask_history: whether validation leaves the items of the history out of the ranking.
        **kwargs: optimizers, schedule and rules of :class:`lightning_muon.MuonMixin`.

    Raises:
        ValueError: if a history is longer than ``max_length``.
    """

    def __init__(
        self,
        num_items: int,
        max_length: int = 10,
        hidden_size: int = 64,
        dropout: float = 0.3,
        mask_history: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_items=num_items, mask_history=mask_history, **kwargs)
        self.save_hyperparameters()
        self.embedding = SequenceEmbedding(num_items, max_length, hidden_size, dropout)
        self.embedding.reset_parameters(std=0.01, position_std=1.0)
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention = CausalAttention(hidden_size, num_heads=1, dropout=dropout, output_projection=False)
        self.ffn_norm = nn.LayerNorm(hidden_size)
        self.ffn = nn.Sequential(
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.Dropout(dropout),
        )
        self.block_norm = nn.LayerNorm(hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, num_items)

    def encode(self, history: Tensor) -> Tensor:
        x, real = self.embedding(history)
        queries = self.attention_norm(x)
        x = self.ffn_norm(queries + self.attention(queries, x, real))
        return self.norm(self.block_norm(x + self.ffn(x)))

    def output_layer(self) -> tuple[Tensor, Tensor]:
        return self.head.weight, self.head.bias

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        return binary_cross_entropy_loss(states, targets, *self.output_layer())


class CausalAttention(nn.Module):
    """Multi-head attention in which a position sees itself and earlier ones.

    Histories are padded on the right, so causality also hides the padding from every real position.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, output_projection: bool = True) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide hidden_size={hidden_size}.")
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size) if output_projection else nn.Identity()

    def forward(self, queries: Tensor, inputs: Tensor, real: RealPositions) -> Tensor:
        """Queries from ``queries``, keys and values from ``inputs``: both (M, d) -> (M, d)."""
        q, k, v = (
            real.unpack(projected).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.query(queries), self.key(inputs), self.value(inputs))
        )
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.output(real.pack(attended.transpose(1, 2).flatten(2)))


class PreNormBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + ffn(norm(x))``, with dropout on each branch: (M, d) -> (M, d)."""

    def __init__(self, hidden_size: int, num_heads: int, ffn_size: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention = CausalAttention(hidden_size, num_heads, dropout)
        self.ffn_norm = nn.LayerNorm(hidden_size)
        self.ffn = nn.Sequential(nn.Linear(hidden_size, ffn_size), nn.GELU(), nn.Linear(ffn_size, hidden_size))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, real: RealPositions) -> Tensor:
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, normed, real))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))
