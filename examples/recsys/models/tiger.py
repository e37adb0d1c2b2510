"""TIGER: generative retrieval of semantic ids by an encoder-decoder (Rajput et al. 2023, arXiv 2305.05065)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from examples.recsys.checks import check_positive
from examples.recsys.data.sequences import PADDING
from examples.recsys.decoding import NextLogProbs
from examples.recsys.models.base import Batch
from examples.recsys.models.generative import GenerativeRecommender, draw_targets, token_log_probs
from lightning_muon import MuonMixin

PAD_TOKEN, START_TOKEN, END_TOKEN, FIRST_CODE_TOKEN = range(4)


class TIGER(MuonMixin, GenerativeRecommender):
    """T5 that reads the codes of a history and writes those of the next item.

    The encoder reads ``[user] c1 c2 ... c1 c2 ... end``, oldest item first, the decoder writes ``c1 c2 ...``. Code
    ``c`` of level ``l`` is the token ``3 + l * codebook_size + c``; ``num_user_tokens`` more stand for the users. With
    four levels of 256 codes and no user tokens there are 1,027 tokens and 4.6 M parameters.

    Training takes one target a row of the batch. Where a row has several (``samples: sequence``) one of them is drawn
    in each epoch, and its history is what came before it.

    Args:
        num_items: size of the catalogue; ids are 1..num_items, 0 is padding.
        semantic_ids: path of the codes of all items, as :meth:`SemanticIds.read` reads them.
        hidden_size: width d.
        num_layers: layers of the encoder, and as many of the decoder.
        num_heads: heads of the attention.
        head_size: width of a head.
        feedforward_size: inner width of the feed-forward.
        dropout: of embeddings, attention and feed-forward.
        num_user_tokens: users share so many tokens, by the remainder of their number in the data; 0 for none. The paper
            has 2,000 and hashes, which does not depend on the order of the users.
        attention: implementation in transformers; on a CPU ``"eager"`` trains faster and decodes slower.
        num_beams: beams of the search.
        mask_history: whether validation leaves the items of the history out of the ranking.
        **kwargs: optimizers, schedule and rules of :class:`lightning_muon.MuonMixin`.

    Raises:
        FileNotFoundError: if there are no such codes.
        ValueError: if they are of another catalogue, or a size is below 1; with user tokens, if a batch does not say
            whose its histories are.
    """

    code_tokens: Tensor
    """(levels, codebook_size) the token of each code."""

    def __init__(
        self,
        num_items: int,
        semantic_ids: str,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 6,
        head_size: int = 64,
        feedforward_size: int = 1024,
        dropout: float = 0.1,
        num_user_tokens: int = 0,
        attention: Literal["sdpa", "eager"] = "sdpa",
        num_beams: int = 50,
        mask_history: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_items=num_items, semantic_ids=semantic_ids, num_beams=num_beams, mask_history=mask_history, **kwargs
        )
        self.save_hyperparameters()
        check_positive(
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            head_size=head_size,
            feedforward_size=feedforward_size,
        )
        if num_user_tokens < 0:
            raise ValueError(f"num_user_tokens must be 0 or more, got {num_user_tokens}.")
        self.num_user_tokens = num_user_tokens
        tokens = FIRST_CODE_TOKEN + torch.arange(self.levels * self.codebook_size)
        self.register_buffer("code_tokens", tokens.view(self.levels, -1), persistent=False)
        self.first_user_token = FIRST_CODE_TOKEN + len(tokens)
        self.t5 = T5ForConditionalGeneration(
            T5Config(
                vocab_size=self.first_user_token + num_user_tokens,
                d_model=hidden_size,
                d_kv=head_size,
                d_ff=feedforward_size,
                num_layers=num_layers,
                num_heads=num_heads,
                dropout_rate=dropout,
                pad_token_id=PAD_TOKEN,
                decoder_start_token_id=START_TOKEN,
                eos_token_id=END_TOKEN,
                use_cache=False,
                attn_implementation=attention,
            )
        )

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        history, target = draw_targets(batch["history"], batch["targets"])
        tokens = self.encoder_tokens({**batch, "history": history})
        labels = self.written(self.codes[target])
        loss = self.t5(input_ids=tokens, attention_mask=tokens != PAD_TOKEN, labels=labels).loss
        self.log("train/loss", loss, prog_bar=True, batch_size=len(history))
        return loss

    def written(self, codes: Tensor) -> Tensor:
        """Tokens of codes (..., l), the first l of an item."""
        return self.code_tokens[torch.arange(codes.shape[-1], device=codes.device), codes]

    def encoder_tokens(self, batch: Batch) -> Tensor:
        """What the encoder reads for the histories (B, T) of a batch: (B, S), padded on the right."""
        history = batch["history"]
        real = history != PADDING
        items = self.written(self.codes[history]).masked_fill(~real[:, :, None], PAD_TOKEN).flatten(1)
        tokens = nn.functional.pad(items, (0, 1), value=PAD_TOKEN)
        tokens = tokens.scatter(1, self.levels * real.sum(1, keepdim=True), END_TOKEN)
        if not self.num_user_tokens:
            return tokens
        if "user" not in batch:
            raise ValueError("The batch has no `user`, and this model has user tokens: it needs to know whose it is.")
        return torch.cat([self.first_user_token + batch["user"][:, None] % self.num_user_tokens, tokens], dim=1)

    def next_code_scorer(self, batch: Batch) -> NextLogProbs:
        tokens = self.encoder_tokens(batch)
        real = tokens != PAD_TOKEN
        encoded = self.t5.encoder(input_ids=tokens, attention_mask=real).last_hidden_state

        def next_log_probs(prefixes: Tensor) -> Tensor:
            begun = nn.functional.pad(self.written(prefixes), (1, 0), value=START_TOKEN)
            states = decode_beams(self.t5, begun, encoded, real)[:, :, -1]
            states = states * self.t5.model_dim**-0.5  # as T5 does where its head is tied to the embedding
            return token_log_probs(states, self.t5.lm_head.weight, None, self.code_tokens[prefixes.shape[2]])

        return next_log_probs


def decode_beams(t5: T5ForConditionalGeneration, tokens: Tensor, encoded: Tensor, real: Tensor) -> Tensor:
    """States (B, K, l, d) of the decoder for K beams a user, each of which sees the user and its own tokens.

    The beams of a user are positions of one row, kept apart by the mask, so that the keys and values of the encoder's
    states are computed once a user and not once a beam.

    Args:
        t5: the model.
        tokens: (B, K, l) what the beams have written, from the start token on.
        encoded: (B, S, d) states of the encoder.
        real: (B, S) where they are no padding.
    """
    _, beams, length = tokens.shape
    decoder = t5.decoder
    x = decoder.dropout(decoder.embed_tokens(tokens.flatten(1)))
    place = torch.arange(beams * length, device=tokens.device)
    own = (place[:, None] // length == place // length) & (place[:, None] >= place)
    self_mask, cross_mask = _additive(own[None, None], x.dtype), _additive(real[:, None, None], x.dtype)
    # Distances count within a beam.
    bias = decoder.block[0].layer[0].SelfAttention.compute_bias(length, length, device=x.device)
    bias, cross_bias = bias.to(x.dtype).repeat(1, 1, beams, beams), None
    for block in decoder.block:
        x, _, cross_bias = block(x, self_mask, bias, encoded, cross_mask, cross_bias)
    return decoder.dropout(decoder.final_layer_norm(x)).unflatten(1, (beams, length))


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to attention scores: 0 where ``allowed``, the lowest number of the type elsewhere."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
