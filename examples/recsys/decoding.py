"""Beam search over the semantic ids of a catalogue: every beam is the beginning of an item, none is ever invalid."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

NextLogProbs: TypeAlias = Callable[[Tensor], Tensor]
"""Codes (B, K, l) of K beams a user, int64 -> log-probabilities (B, K, C) of the code at level l, for all C codes."""


class PrefixTree(nn.Module):
    """Which codes may follow which, as one table a level.

    The nodes of a depth are the distinct beginnings of that many codes, numbered in their order; those of the last
    depth are the leaves. Items with equal codes share a leaf. The tables are buffers that checkpoints leave out.

    Args:
        codes: (num_items, levels) int64 in [0, codebook_size); row ``j`` is item ``j + 1``.
        codebook_size: codes a level, C.

    Raises:
        ValueError: if a code is outside of that range.
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
            # Number of the parent first, so that sorting these keys sorts the beginnings.
            keys, child = (node * codebook_size + codes[:, level]).unique(return_inverse=True)
            table = codes.new_full((int(node.max()) + 1, codebook_size), -1)
            table.view(-1)[keys] = torch.arange(len(keys), device=codes.device)
            self.register_buffer(f"successors_{level}", table, persistent=False)
            node = child
        self.num_leaves = len(keys)
        self.register_buffer("leaf_of_item", node, persistent=False)

    def successors(self, level: int) -> Tensor:
        """(nodes, C) int64: node of the next depth for each code at ``level``, -1 where no item goes on so."""
        return self.get_buffer(f"successors_{level}")

    def num_nodes(self, depth: int) -> int:
        """How many distinct beginnings of ``depth`` codes there are."""
        return len(self.successors(depth)) if depth < self.levels else self.num_leaves


def beam_search(
    next_log_probs: NextLogProbs, tree: PrefixTree, batch_size: int, num_beams: int
) -> tuple[Tensor, Tensor]:
    """The likeliest leaves of a tree for each user: exact where ``num_beams`` is no less than the leaves.

    A leaf's score is the sum of the log-probabilities of its codes. All beams of all users advance by table look-ups,
    level after level, without a word to the host.

    Args:
        next_log_probs: the model, called once a level.
        tree: of the catalogue.
        batch_size: users, B.
        num_beams: beams a user, K at most.

    Returns:
        Leaves (B, K) int64 and their scores (B, K) float32, best first. K is ``num_beams`` or what the tree allows;
        beams that found no leaf of their own have the score -inf.
    """
    device = tree.leaf_of_item.device
    nodes = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
    scores = torch.zeros(batch_size, 1, device=device)
    prefixes = torch.zeros(batch_size, 1, 0, dtype=torch.long, device=device)
    for level in range(tree.levels):
        children = tree.successors(level)[nodes]
        log_probs = next_log_probs(prefixes).float()
        # For topk a NaN is the largest of all.
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
    """Scores (B, num_items) of all items from leaves (B, K) and their scores; -inf for items that no beam reached.

    Items that share a leaf have equal scores.
    """
    by_leaf = scores.new_full((len(leaves), tree.num_nodes(tree.levels)), -torch.inf)
    # A beam that found nothing may stand on the leaf of another: the larger score is the leaf's.
    return by_leaf.scatter_reduce(1, leaves, scores, "amax")[:, tree.leaf_of_item]
