"""Fused attention of transformers, each family in its own order: expected tables written by hand."""

from __future__ import annotations

import pytest

from tests.partition.expectations import assert_partition
from tests.partition.test_transformers_text import SMALL, build

pytest.importorskip("transformers")


def test_gpt_neox():
    """Each head keeps its q, k and v together."""
    assert_partition(
        build("GPTNeoXForCausalLM", **SMALL),
        """
        gpt_neox.embed_in.weight x1 embedding
        gpt_neox.layers.*.attention.query_key_value.weight x2 hidden r4 3 of 32 x 32
        gpt_neox.layers.*.attention.dense.weight x2 hidden 32 x 32
        gpt_neox.layers.*.mlp.dense_h_to_4h.weight x2 hidden 48 x 32
        gpt_neox.layers.*.mlp.dense_4h_to_h.weight x2 hidden 32 x 48
        *norm.weight x5 vector
        *.bias x13 vector
        lm_head.weight x1 head
        """,
    )


def test_bloom():
    assert_partition(
        build("BloomForCausalLM", vocab_size=100, hidden_size=32, n_layer=2, n_head=4),
        """
        transformer.word_embeddings.weight x1 embedding
        transformer.h.*.self_attention.query_key_value.weight x2 hidden r4 3 of 32 x 32
        transformer.h.*.self_attention.dense.weight x2 hidden 32 x 32
        transformer.h.*.mlp.dense_h_to_4h.weight x2 hidden 128 x 32
        transformer.h.*.mlp.dense_4h_to_h.weight x2 hidden 32 x 128
        *norm.weight x5 vector
        transformer.ln_f.weight x1 vector
        *.bias x14 vector
        """,
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"multi_query": False}, "r4 3 of 32 x 32"),
        ({"multi_query": True}, "32 x 32 + 8 x 32 + 8 x 32"),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, "r2 32 x 32 + 16 x 32 + 16 x 32"),
    ],
)
def test_falcon_has_three_ways_to_fuse(settings, expected):
    old = {"new_decoder_architecture": False}
    model = build("FalconForCausalLM", **{**SMALL, **old, **settings, "num_hidden_layers": 1}, ffn_hidden_size=128)
    norms = sum("ln_" in name or "layernorm" in name for name, _ in model.named_parameters())
    assert_partition(
        model,
        f"""
        transformer.word_embeddings.weight x1 embedding
        transformer.h.0.self_attention.query_key_value.weight x1 hidden {expected}
        transformer.h.0.self_attention.dense.weight x1 hidden 32 x 32
        transformer.h.0.mlp.dense_h_to_4h.weight x1 hidden 128 x 32
        transformer.h.0.mlp.dense_4h_to_h.weight x1 hidden 32 x 128
        transformer.* x{norms} vector
        """,
    )


@pytest.mark.parametrize(("multi_query", "expected"), [(True, "32 x 32 + 8 x 32 + 8 x 32"), (False, "r4 3 of 32 x 32")])
def test_gpt_bigcode_has_two_ways_to_fuse(multi_query, expected):
    model = build("GPTBigCodeForCausalLM", vocab_size=100, n_embd=32, n_layer=1, n_head=4, multi_query=multi_query)
    assert_partition(
        model,
        f"""
        transformer.w?e.weight x2 embedding
        transformer.h.0.attn.c_attn.weight x1 hidden {expected}
        transformer.h.0.attn.c_proj.weight x1 hidden 32 x 32
        transformer.h.0.mlp.c_fc.weight x1 hidden 128 x 32
        transformer.h.0.mlp.c_proj.weight x1 hidden 32 x 128
        transformer.* x10 vector
        """,
    )
