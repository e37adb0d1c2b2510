"""Losses over the items of a catalogue, from states and the weights of the output layer.

In all of them the states (M, d) score item ``j`` by ``states @ weight[j] + bias[j]``, with ``weight`` (N, d) and
``bias`` (N,) or None. The ``targets`` (M,) are rows of ``weight``. Each returns the mean over the M targets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.recsys.models.layers import at_least_float32


def softmax_loss(states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Cross-entropy of the softmax over all N items."""
    return F.cross_entropy(F.linear(states, weight, bias), targets)


def sampled_softmax_loss(
    states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None = None, num_negatives: int = 1024
) -> Tensor:
    """Cross-entropy of the softmax over the target and ``num_negatives`` uniform items that all M targets share.

    The sampling is uniform, so the logits need no correction by the sampling probability. A negative that equals the
    target of a state does not count for that state.
    """
    negatives = torch.randint(len(weight), (num_negatives,), device=states.device)
    # Cosines divided by a small temperature are large; rounded to bfloat16, probabilities would be off by percents.
    with torch.autocast(states.device.type, enabled=False):
        states, rows = at_least_float32(states), at_least_float32(weight[negatives])
        positive = _pair_scores(states, targets[:, None], weight, bias)
        negative = F.linear(states, rows, None if bias is None else at_least_float32(bias[negatives]))
        negative = negative.masked_fill(negatives == targets[:, None], -torch.inf)
        logits = torch.cat([positive, negative], dim=1)
        return F.cross_entropy(logits, torch.zeros_like(targets))


def cosine_sampled_softmax_loss(
    states: Tensor, targets: Tensor, weight: Tensor, num_negatives: int = 128, temperature: float = 0.05
) -> Tensor:
    """:func:`sampled_softmax_loss` with the cosine of state and item, divided by ``temperature``, as score.

    From HSTU (arXiv 2402.17152), whose authors draw new negatives for each target.
    """
    states = F.normalize(states, dim=1) / temperature
    return sampled_softmax_loss(states, targets, F.normalize(weight, dim=1), num_negatives=num_negatives)


def binary_cross_entropy_loss(
    states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None = None, num_negatives: int = 1
) -> Tensor:
    """Binary cross-entropy of the target against ``num_negatives`` uniform other items, drawn for each target.

    It is the mean of the target's term and of the mean term of its negatives (SASRec, arXiv 1808.09781, with one
    negative).
    """
    # Draw from N - 1 items and shift those from the target on by one, so all other items are equally likely.
    negatives = torch.randint(len(weight) - 1, (len(targets), num_negatives), device=states.device)
    negatives = negatives + (negatives >= targets[:, None])
    positive = -F.logsigmoid(_pair_scores(states, targets[:, None], weight, bias))
    negative = -F.logsigmoid(-_pair_scores(states, negatives, weight, bias))
    return (positive.mean() + negative.mean()) / 2


def _pair_scores(states: Tensor, items: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Scores (M, K) of items (M, K), K per state, by states (M, d)."""
    scores = (weight[items].to(states.dtype) @ states[:, :, None]).squeeze(2)
    return scores if bias is None else scores + bias[items]
