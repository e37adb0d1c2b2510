"""What decoder-only models of semantic ids share: a small model from sizes, the loss of tokens, the scores of codes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from examples.recsys.checks import check_positive
from examples.recsys.decoding import NextLogProbs
from examples.recsys.models.generative import token_log_probs

IGNORED = -100
"""The label of a token that no loss counts."""


def small_qwen3(
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    tied: bool,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> PreTrainedModel:
    """A Qwen3 (arXiv 2505.09388) with random weights, and with dropout of embeddings and of what each half block adds.

    Raises:
        ValueError: if a size is below 1 or heads do not fit.
    """
    check_positive(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=intermediate_size,
    )
    if hidden_size % (2 * num_heads):  # rotary positions turn pairs
        raise ValueError(f"num_heads={num_heads} does not divide hidden_size={hidden_size} into even widths.")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}.")
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=hidden_size // num_heads,
            intermediate_size=intermediate_size,
            tie_word_embeddings=tied,
            attention_dropout=attention_dropout,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
    )
    halves = [half for layer in model.base_model.layers for half in (layer.self_attn.o_proj, layer.mlp)]
    for module in (model.get_input_embeddings(), *halves):
        module.register_forward_hook(partial(_drop, dropout))
    return model


def _drop(rate: float, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return F.dropout(output, rate, module.training)


def token_loss(model: PreTrainedModel, states: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the vocabulary of the tokens that count; logits are made for these alone.

    Args:
        model: whose output embedding scores the tokens.
        states: (B, S, d) from the model's base; the one at position s is to predict the label at s.
        labels: (B, S) tokens, or ``IGNORED``.
    """
    counts = labels != IGNORED
    return F.cross_entropy(model.get_output_embeddings()(states[counts]).float(), labels[counts])


def align_right(tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding from the right to the left: (B, P) tokens and where they are real, twice.

    Example::

        >>> align_right(torch.tensor([[7, 8, 0], [5, 6, 9]]), torch.tensor([[True, True, False], [True, True, True]]))
        (tensor([[7, 7, 8],
                [5, 6, 9]]), tensor([[False,  True,  True],
                [ True,  True,  True]]))
    """
    width = tokens.shape[1]
    index = torch.arange(width, device=tokens.device) - (width - real.sum(1, keepdim=True))
    return tokens.gather(1, index.clamp(min=0)), index >= 0


def next_code_scorer(model: PreTrainedModel, prompts: Tensor, real: Tensor, code_tokens: Tensor) -> NextLogProbs:
    """What scores the next code of the beams of each prompt, which is encoded once, here.

    The K beams of a prompt are K * l further positions of its row. A mask lets each see the prompt and its own codes,
    and the cache is cut back to the prompt after every call, so that nothing is repeated K times.

    Args:
        model: a causal language model of ``transformers`` that has a cache, rotary or learned positions, attention by
            ``scaled_dot_product_attention`` without a window shorter than the prompts, and is in evaluation mode.
        prompts: (B, P) tokens, padded on the left.
        real: (B, P) where they are no padding.
        code_tokens: (levels, codebook_size) the token of each code.
    """
    lengths = real.sum(1)
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    encoded = model.base_model(input_ids=prompts, attention_mask=real.long(), position_ids=positions, use_cache=True)
    cache, head = encoded.past_key_values, model.get_output_embeddings()
    # Once: where peft trains some rows of the weight it puts them together, and scores are made in float32.
    weight, bias = head.weight.float(), getattr(head, "bias", None)
    first = token_log_probs(encoded.last_hidden_state[:, -1], weight, bias, code_tokens[0])

    def next_log_probs(prefixes: Tensor) -> Tensor:
        users, beams, depth = prefixes.shape
        if depth == 0:
            return first[:, None].expand(-1, beams, -1)
        levels = torch.arange(depth, device=prefixes.device)
        tokens = code_tokens[levels, prefixes].flatten(1)
        positions = (lengths[:, None, None] + levels).expand(-1, beams, -1).flatten(1)
        beam = torch.arange(beams, device=prefixes.device).repeat_interleave(depth)
        own = (beam[:, None] == beam).tril()
        seen = torch.cat([real[:, None].expand(-1, len(own), -1), own.expand(users, -1, -1)], dim=2)
        states = model.base_model(
            input_ids=tokens,
            attention_mask=seen[:, None],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        cache.crop(-tokens.shape[1])
        return token_log_probs(states.unflatten(1, (beams, depth))[:, :, -1], weight, bias, code_tokens[depth])

    return next_log_probs
