"""What generative recommenders share: items as semantic ids, and beam search over those of the catalogue."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from examples.recsys.checks import check_positive
from examples.recsys.data.sequences import PADDING
from examples.recsys.decoding import NextLogProbs, PrefixTree, beam_search, item_scores
from examples.recsys.models.base import Batch, Recommender
from examples.recsys.models.layers import at_least_float32, check_not_empty
from examples.recsys.semantic_ids.codes import SemanticIds


class GenerativeRecommender(Recommender):
    """A recommender that writes the codes of the next item one after the other, and only those of real items.

    An item's score is the log-probability of its codes, or -inf where no beam reached it. Items with equal codes tie,
    which counts against the model.

    Args:
        num_items: size of the catalogue; ids are 1..num_items, 0 is padding.
        semantic_ids: path of the codes of all items, as :meth:`SemanticIds.read` reads them.
        num_beams: beams of the search; a target that none of them reaches counts as ranked last. The models here attend
            among all beams of a user, so time and memory grow with the square of many hundreds.
        mask_history: whether validation leaves the items of the history out of the ranking.

    Raises:
        FileNotFoundError: if there are no such codes.
        ValueError: if they are of another catalogue, or ``num_beams`` is below 1.
    """

    codes: Tensor
    """(num_items + 1, levels) int64, by item id; the padding has zeros."""

    def __init__(self, num_items: int, semantic_ids: str, num_beams: int = 50, mask_history: bool = True) -> None:
        super().__init__(num_items=num_items, mask_history=mask_history)
        check_positive(num_beams=num_beams)
        self.num_beams = num_beams
        ids = SemanticIds.read(semantic_ids, num_items)
        self.levels = ids.levels
        self.codebook_size = ids.codebook_size
        self.register_buffer("codes", torch.cat([ids.codes.new_zeros(1, ids.levels), ids.codes]))
        self.tree = PrefixTree(ids.codes, ids.codebook_size)
        # DDP would send these constants to all processes at every step, and the tables are larger than many models.
        constants = ["codes", *(f"tree.{name}" for name, _ in self.tree.named_buffers())]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, constants)

    @abstractmethod
    def next_code_scorer(self, batch: Batch) -> NextLogProbs:
        """What scores the next code of the beams of each user of a batch; what all beams share is computed here."""

    def forward(self, history: Tensor) -> Tensor:
        return self.score_batch({"history": history})

    def score_batch(self, batch: Batch) -> Tensor:
        history = batch["history"]
        check_not_empty(history)
        scorer = self.next_code_scorer(batch)
        leaves, scores = beam_search(scorer, self.tree, len(history), self.num_beams)
        return item_scores(leaves, scores, self.tree)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        codes = checkpoint["state_dict"].get("codes")
        if codes is None or not torch.equal(codes.cpu(), self.codes.cpu()):
            raise ValueError(
                "The checkpoint was trained on other semantic ids than those of semantic_ids: its codes would mean "
                "other items. Give the file it was trained with, or train anew."
            )


def draw_targets(history: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """One target of each row, all equally likely, and the history before it: (B, T) twice -> (B, T), (B,)."""
    drawn = (targets != PADDING).float().multinomial(1)
    later = torch.arange(history.shape[1], device=history.device) > drawn
    return history.masked_fill(later, PADDING), targets.gather(1, drawn).squeeze(1)


def token_log_probs(states: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
    """Log-probabilities (..., C) of the tokens (C,) after states (..., d), among the whole vocabulary.

    ``weight`` (vocabulary, d) and ``bias`` (vocabulary,) or None are the output layer's.
    """
    with torch.autocast(states.device.type, enabled=False):
        states, weight = at_least_float32(states), at_least_float32(weight)
        logits = F.linear(states, weight, None if bias is None else at_least_float32(bias))
        return logits[..., tokens] - logits.logsumexp(-1, keepdim=True)
