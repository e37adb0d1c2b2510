"""HSTU: hierarchical sequential transduction units (Zhai et al. 2024, arXiv 2402.17152)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.recsys.checks import check_positive
from examples.recsys.models.base import Batch, NextItemRecommender
from examples.recsys.models.layers import RealPositions, SequenceEmbedding
from examples.recsys.models.losses import cosine_sampled_softmax_loss
from lightning_muon import MuonMixin, ParameterRule

LOG_BUCKET = 0.301
"""Width of a time bucket in the natural logarithm of seconds: each is 1.35 times as long as the one before."""
NORM_EPS = 1e-6


class HSTU(MuonMixin, NextItemRecommender):
    """Attention without softmax, gated element by element and aware of when things happened; no feed-forward.

    Items are scored by the cosine of state and embedding. Where batches hold ``times``, the attention also goes by the
    time between two items; where they do not, by their distance in the sequence alone. The authors' code measures from
    the time of the item to predict; here it is from that of the latest item, so that nothing of the target is known.

    The four maps of a block are one parameter, ``uvqk``, stored (fan-in, fan-out), that no module type explains. A
    parameter rule of the model says how it is read as matrices; rules of the user apply after it.

    Args:
        num_items: size of the catalogue; ids are 1..num_items, 0 is padding.
        max_length: longest history.
        hidden_size: width d.
        num_blocks: how many blocks.
        num_heads: heads of the attention.
        attention_size: width of the queries and keys of a head; None for ``hidden_size / num_heads``.
        linear_size: width of the values and gates of a head; None for ``hidden_size / num_heads``.
        dropout: of embeddings and what each block adds, before its last map.
        num_negatives: the softmax is over the target and so many uniform negatives shared by the batch.
        temperature: cosines are divided by it in the softmax.
        time_buckets: how many buckets there are for times above that of bucket 0, which is up to 1.35 seconds; longer
            ones share the last. None where there are no times; DDP then needs it, as it waits for every gradient.
        mask_history: whether validation leaves the items of the history out of the ranking.
        **kwargs: optimizers, schedule and rules of :class:`lightning_muon.MuonMixin`.

    Raises:
        ValueError: if a size is below 1, ``temperature`` is not positive, or ``num_heads`` does not divide
            ``hidden_size`` where a width is left to them; if a history is longer than ``max_length`` or its times have
            another shape.
    """

    def __init__(
        self,
        num_items: int,
        max_length: int = 50,
        hidden_size: int = 64,
        num_blocks: int = 2,
        num_heads: int = 1,
        attention_size: int | None = None,
        linear_size: int | None = None,
        dropout: float = 0.2,
        num_negatives: int = 128,
        temperature: float = 0.05,
        time_buckets: int | None = 128,
        mask_history: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_items=num_items, mask_history=mask_history, **kwargs)
        self.save_hyperparameters()
        check_positive(
            max_length=max_length,
            hidden_size=hidden_size,
            num_blocks=num_blocks,
            num_heads=num_heads,
            attention_size=attention_size,
            linear_size=linear_size,
            num_negatives=num_negatives,
            time_buckets=time_buckets,
        )
        if not temperature > 0.0:
            raise ValueError(f"temperature must be above 0, got {temperature}.")
        if None in (attention_size, linear_size) and hidden_size % num_heads:
            raise ValueError(
                f"num_heads={num_heads} does not divide hidden_size={hidden_size}: give attention_size and linear_size."
            )
        self.num_negatives = num_negatives
        self.temperature = temperature
        self.time_buckets = time_buckets
        attention_size = attention_size or hidden_size // num_heads
        linear_size = linear_size or hidden_size // num_heads
        # Scaled as in the authors' code: the item table is small, since only its directions score.
        self.embedding = SequenceEmbedding(num_items, max_length, hidden_size, dropout, item_scale=hidden_size**0.5)
        self.embedding.reset_parameters(std=0.02, position_std=hidden_size**-0.5)
        self.blocks = nn.ModuleList(
            HSTUBlock(hidden_size, num_heads, attention_size, linear_size, max_length, time_buckets, dropout)
            for _ in range(num_blocks)
        )
        self.parameter_rules = [
            ParameterRule(pattern="blocks.*.uvqk", group="matrix", split=self.blocks[0].maps, transposed=True),
            *self.parameter_rules,
        ]

    def encode(self, history: Tensor, times: Tensor | None = None) -> Tensor:
        """States (M, d); ``times`` (B, T) in seconds, or None where they are not known."""
        if times is not None and times.shape != history.shape:
            raise ValueError(
                f"times must have the shape of the history, {tuple(history.shape)}, got {tuple(times.shape)}."
            )
        x, real = self.embedding(history)
        gaps = None if times is None or self.time_buckets is None else log_time_gaps(times, self.time_buckets)
        for block in self.blocks:
            x = block(x, real, gaps)
        return x

    def encode_batch(self, batch: Batch) -> Tensor:
        return self.encode(batch["history"], batch.get("times"))

    def output_layer(self) -> tuple[Tensor, None]:
        return F.normalize(self.embedding.items.weight[1:], dim=1), None

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        weight = self.embedding.items.weight[1:]
        return cosine_sampled_softmax_loss(states, targets, weight, self.num_negatives, self.temperature)


def log_time_gaps(times: Tensor, time_buckets: int) -> Tensor:
    """Logarithmic bucket, 0..time_buckets, of the time from item j to item i: (B, T) seconds -> (B, T, T) by (i, j).

    Whatever is not later than a second falls into bucket 0.
    """
    gaps = times[:, :, None] - times[:, None, :]
    return (gaps.clamp(min=1).log() / LOG_BUCKET).long().clamp(max=time_buckets)


# As in SASRec, the maps work on the M real positions alone and only the attention unpacks them to (B, T).


class HSTUBlock(nn.Module):
    """``x + output(u * norm(attention(q, k, v)))`` with ``u, v, q, k = silu(norm(x) @ uvqk)``: (M, d) -> (M, d).

    The attention weights are ``silu(q k + bias) / max_length``, without a softmax: they need not sum to 1. The norms
    have neither gain nor bias.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        attention_size: int,
        linear_size: int,
        max_length: int,
        time_buckets: int | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.max_length = max_length
        self.maps = [num_heads * size for size in (linear_size, linear_size, attention_size, attention_size)]
        self.uvqk = nn.Parameter(torch.empty(hidden_size, sum(self.maps)).normal_(std=0.02))
        self.relative = RelativeBias(max_length, time_buckets)
        self.output = nn.Linear(num_heads * linear_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.output.weight)

    def forward(self, x: Tensor, real: RealPositions, gaps: Tensor | None) -> Tensor:
        u, v, q, k = F.silu(_norm(x) @ self.uvqk).split(self.maps, dim=1)
        v, q, k = (real.unpack(part).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (v, q, k))
        weights = F.silu(q @ k.mT + self.relative(q.shape[2], gaps)) / self.max_length
        # A position sees itself and earlier ones, and so no padding, which is on the right.
        attended = real.pack((weights.tril() @ v).transpose(1, 2).flatten(2))
        return x + self.output(self.dropout(u * _norm(attended)))


class RelativeBias(nn.Module):
    """A number for each distance in the sequence, plus one for each bucket of time where there are times.

    Only distances back are kept, as the attention looks nowhere else.
    """

    def __init__(self, max_length: int, time_buckets: int | None) -> None:
        super().__init__()
        self.position_bias = nn.Parameter(torch.empty(max_length).normal_(std=0.02))
        self.time_bias = None if time_buckets is None else nn.Parameter(torch.empty(time_buckets + 1).normal_(std=0.02))

    def forward(self, length: int, gaps: Tensor | None) -> Tensor:
        """What position i adds for position j <= i: buckets (B, T, T) or None -> (T, T) or (B, 1, T, T)."""
        positions = torch.arange(length, device=self.position_bias.device)
        bias = self.position_bias[(positions[:, None] - positions).clamp(min=0)]
        return bias if gaps is None else bias + self.time_bias[gaps][:, None]


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
