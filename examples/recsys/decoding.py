"""Beam search over the semantic ids of a catalogue. Every beam is a prefix of a real item, so none is invalid."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

NextLogProbs: TypeAlias = Callable[[Tensor], Tensor]
"""Maps codes (B, K, l) int64, of K beams per user, to log-probabilities (B, K, C) of the C codes at level l."""


class PrefixTree(nn.Module):
    """A prefix tree of the codes of all items, as one table per level.

    The nodes at depth l are the distinct prefixes of l codes, numbered in sorted order. The nodes at the last depth are
    the leaves. Items with equal codes share a leaf. The tables are non-persistent buffers.

    Args:
        codes: (num_items, levels) int64 in [0, codebook_size); row ``j`` is item ``j + 1``.
        codebook_size: number of codes per level, C.

    Raises:
        ValueError: if a code is outside [0, codebook_size).
    """

    leaf_of_item: Tensor
    """(num_items,) the leaf of each item."""

    def __init__(self, codes: Tensor, codebook_size: int) -> None:
        super().__init__()
        if codes.min() < 0 or codes.max() >= codebook_size:
            raise ValueError(
                f"codes must be from 0 to codebook_size - 1 = {codebook_size - 1}, got {codes.min()} to {codes.max()}."
            )
        self.levels = codes.shape[1]
        node = codes.new_zeros(len(codes))
        for level in range(self.levels):
            # The number of the parent comes first, so sorting these keys sorts the prefixes.
            keys, child = (node * codebook_size + codes[:, level]).unique(return_inverse=True)
            table = codes.new_full((int(node.max()) + 1, codebook_size), -1)
            table.view(-1)[keys] = torch.arange(len(keys), device=codes.device)
            self.register_buffer(f"successors_{level}", table, persistent=False)
            node = child
        self.num_leaves = len(keys)
        self.register_buffer("leaf_of_item", node, persistent=False)

    def successors(self, level: int) -> Tensor:
        """Node of the next depth for each code at ``level``, -1 where no item has that prefix: (nodes, C) int64."""
        return self.get_buffer(f"successors_{level}")

    def num_nodes(self, depth: int) -> int:
        """Number of distinct prefixes of ``depth`` codes."""
        return len(self.successors(depth)) if depth < self.levels else self.num_leaves


def beam_search(
    next_log_probs: NextLogProbs, tree: PrefixTree, batch_size: int, num_beams: int
) -> tuple[Tensor, Tensor]:
    """Find the most likely leaves of a tree for each user. Exact if there are as many beams as leaves.

    A leaf's score is the sum of the log-probabilities of its codes. All beams of all users advance by table look-ups,
    level after level, without synchronizing with the device.

    Args:
        next_log_probs: the model, called once per level.
        tree: prefix tree of the catalogue.
        batch_size: number of users, B.
        num_beams: number of beams per user; K is at most this.

    Returns:
        Leaves (B, K) int64 and their scores (B, K) float32, best first. K is ``num_beams``, or less where the tree has
        fewer leaves. Beams without a leaf of their own have the score -inf.
    """
    device = tree.leaf_of_item.device
    nodes = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
    scores = torch.zeros(batch_size, 1, device=device)
    prefixes = torch.zeros(batch_size, 1, 0, dtype=torch.long, device=device)
    for level in range(tree.levels):
        children = tree.successors(level)[nodes]
        log_probs = next_log_probs(prefixes).float()
        # topk ranks NaN above all other values.
        impossible = (children < 0) | log_probs.isnan()
        candidates = (scores[:, :, None] + log_probs).masked_fill(impossible, -torch.inf)
        beams = min(num_beams, tree.num_nodes(level + 1), candidates[0].numel())
        scores, index = candidates.flatten(1).topk(beams)
        parents, codes = index // children.shape[2], index % children.shape[2]
        nodes = children.flatten(1).gather(1, index).clamp(min=0)
        prefixes = prefixes.gather(1, parents[:, :, None].expand(-1, -1, level))
        prefixes = torch.cat([prefixes, codes[:, :, None]], dim=2)
    return nodes, scores


def item_scores(leaves: Tensor, scores: Tensor, tree: PrefixTree) -> Tensor:
    """Turn leaves (B, K) and their scores into scores (B, num_items) of all items, -inf for items that no beam reached.

    Items that share a leaf have equal scores.
    """
    by_leaf = scores.new_full((len(leaves), tree.num_nodes(tree.levels)), -torch.inf)
    # A beam with the score -inf may have the leaf of another beam, so take the larger score.
    return by_leaf.scatter_reduce(1, leaves, scores, "amax")[:, tree.leaf_of_item]
