"""A small decoder-only language model of semantic ids: MiniOneRec (arXiv 2510.24431) without text."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.recsys.data.sequences import PADDING
from examples.recsys.decoding import NextLogProbs
from examples.recsys.models.base import Batch
from examples.recsys.models.causal import IGNORED, align_right, next_code_scorer, small_qwen3, token_loss
from examples.recsys.models.generative import GenerativeRecommender
from lightning_muon import MuonMixin

PAD_TOKEN, START_TOKEN, FIRST_CODE_TOKEN = range(3)


class SemanticIdLM(MuonMixin, GenerativeRecommender):
    """Qwen3 with random weights that reads the codes of a history and continues with those of the next item.

    The sequence is ``start c1 c2 ... c1 c2 ...``, oldest item first. Code ``c`` of level ``l`` is the token
    ``2 + l * codebook_size + c``. With four levels of 256 codes there are 1,026 tokens and 1.1 M parameters.

    One pass trains every code of every target. So with ``samples: sequence`` in the data a user costs as much as one
    sample of ``samples: prefix``.

    Args:
        num_items: size of the catalogue; ids are 1..num_items, 0 is padding.
        semantic_ids: path of the codes of all items, as :meth:`SemanticIds.read` reads them.
        hidden_size: width d.
        num_layers: number of layers.
        num_heads: number of attention heads.
        num_kv_heads: number of key and value heads; groups of query heads share them.
        intermediate_size: inner width of the feed-forward.
        tied: whether the output layer is the embedding of the tokens.
        dropout: dropout of the embeddings and of each half block's output.
        attention_dropout: dropout of the attention weights.
        num_beams: number of beams.
        mask_history: whether validation leaves the items of the history out of the ranking.
        **kwargs: optimizers, schedule and rules of :class:`lightning_muon.MuonMixin`.

    Raises:
        FileNotFoundError: if there is no file ``semantic_ids``.
        ValueError: if the codes are of another catalogue, a size is below 1, or a number of heads does not divide.
    """

    code_tokens: Tensor
    """(levels, codebook_size) the token of each code."""

    def __init__(
        self,
        num_items: int,
        semantic_ids: str,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        intermediate_size: int = 512,
        tied: bool = True,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        num_beams: int = 50,
        mask_history: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_items=num_items, semantic_ids=semantic_ids, num_beams=num_beams, mask_history=mask_history, **kwargs
        )
        self.save_hyperparameters()
        tokens = torch.arange(self.levels * self.codebook_size).view(self.levels, -1)
        self.register_buffer("code_tokens", FIRST_CODE_TOKEN + tokens, persistent=False)
        self.lm = small_qwen3(
            FIRST_CODE_TOKEN + tokens.numel(),
            hidden_size,
            num_layers,
            num_heads,
            num_kv_heads,
            intermediate_size,
            tied,
            dropout,
            attention_dropout,
        )

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        history, targets = batch["history"], batch["targets"]
        lengths = (history != PADDING).sum(1, keepdim=True)
        items = F.pad(history, (0, 1)).scatter(1, lengths, targets.gather(1, lengths - 1))
        tokens = self.tokens(items)
        counts = F.pad(targets != PADDING, (1, 0)).repeat_interleave(self.levels, dim=1)
        labels = tokens[:, 1:].where(counts, IGNORED)
        # The padding is on the right, so the causal mask hides it.
        states = self.lm.base_model(tokens[:, :-1], use_cache=False).last_hidden_state
        loss = token_loss(self.lm, states, labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(history))
        return loss

    def tokens(self, items: Tensor) -> Tensor:
        """Input tokens: (B, T) item ids, padded on the right -> (B, 1 + T * levels) tokens, padded on the right."""
        levels = torch.arange(self.levels, device=items.device)
        tokens = self.code_tokens[levels, self.codes[items]].masked_fill((items == PADDING)[:, :, None], PAD_TOKEN)
        return F.pad(tokens.flatten(1), (1, 0), value=START_TOKEN)

    def next_code_scorer(self, batch: Batch) -> NextLogProbs:
        tokens = self.tokens(batch["history"])
        return next_code_scorer(self.lm, *align_right(tokens, tokens != PAD_TOKEN), self.code_tokens)
