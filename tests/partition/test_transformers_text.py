"""Text models of transformers: expected partitions written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.partition.expectations import assert_partition

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
EXPERTS = {**GROUPED, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8}
D_MODEL = {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
GROUPED_ATTENTION = """
model.layers.*.self_attn.q_proj.weight x2 hidden 32 x 32
model.layers.*.self_attn.k_proj.weight x2 hidden 16 x 32
model.layers.*.self_attn.v_proj.weight x2 hidden 16 x 32
model.layers.*.self_attn.o_proj.weight x2 hidden 32 x 32
"""


def build(name: str, **settings: Any) -> torch.nn.Module:
    """A model from its config class, on the meta device."""
    config = getattr(transformers, name).config_class(**settings)
    with torch.device("meta"):
        return getattr(transformers, name)(config)


def test_gpt2():
    """Fused and transposed Conv1D; k and v fused in cross attention; the head is tied."""
    model = build(
        "GPT2LMHeadModel", n_layer=2, n_embd=32, n_head=4, vocab_size=100, n_positions=16, add_cross_attention=True
    )
    partition = assert_partition(
        model,
        """
        transformer.wte.weight x1 embedding
        transformer.wpe.weight x1 embedding
        transformer.h.*.attn.c_attn.weight x2 hidden T 3 of 32 x 32
        transformer.h.*.attn.c_proj.weight x2 hidden T 32 x 32
        transformer.h.*.crossattention.c_attn.weight x2 hidden T 2 of 32 x 32
        transformer.h.*.crossattention.q_attn.weight x2 hidden T 32 x 32
        transformer.h.*.crossattention.c_proj.weight x2 hidden T 32 x 32
        transformer.h.*.mlp.c_fc.weight x2 hidden T 128 x 32
        transformer.h.*.mlp.c_proj.weight x2 hidden T 32 x 128
        *.bias x21 vector
        transformer.*ln_*.weight x7 vector
        """,
    )
    assert partition["transformer.wte.weight"].aliases == ("lm_head.weight",)


def test_llama():
    assert_partition(
        build("LlamaForCausalLM", **GROUPED),
        GROUPED_ATTENTION
        + """
        model.embed_tokens.weight x1 embedding
        model.layers.*.mlp.gate_proj.weight x2 hidden 48 x 32
        model.layers.*.mlp.up_proj.weight x2 hidden 48 x 32
        model.layers.*.mlp.down_proj.weight x2 hidden 32 x 48
        *norm.weight x5 vector
        lm_head.weight x1 head
        """,
    )


def test_gemma():
    """Embeddings of a subclass, tied to the head."""
    assert_partition(
        build("GemmaForCausalLM", **GROUPED, head_dim=8),
        GROUPED_ATTENTION
        + """
        model.embed_tokens.weight x1 embedding
        model.layers.*.mlp.gate_proj.weight x2 hidden 48 x 32
        model.layers.*.mlp.up_proj.weight x2 hidden 48 x 32
        model.layers.*.mlp.down_proj.weight x2 hidden 32 x 48
        *norm.weight x5 vector
        """,
    )


def test_phi3():
    """q, k and v of different sizes in one weight; gate and up in halves."""
    assert_partition(
        build("Phi3ForCausalLM", **GROUPED),
        """
        model.embed_tokens.weight x1 embedding
        model.layers.*.self_attn.qkv_proj.weight x2 hidden 32 x 32 + 16 x 32 + 16 x 32
        model.layers.*.self_attn.o_proj.weight x2 hidden 32 x 32
        model.layers.*.mlp.gate_up_proj.weight x2 hidden 2 of 48 x 32
        model.layers.*.mlp.down_proj.weight x2 hidden 32 x 48
        *norm.weight x5 vector
        lm_head.weight x1 head
        """,
    )


@pytest.mark.parametrize(
    ("name", "settings", "experts"),
    [
        ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}, "8 of 48 x 32 and 4 of 32 x 48"),
        ("Qwen3MoeForCausalLM", EXPERTS, "8 of 24 x 32 and 4 of 32 x 24"),
    ],
)
def test_stacked_experts(name, settings, experts):
    """Experts (E, fan-out, fan-in), gate above up; the router's gate is not the gate of the unit."""
    gate_up, down = experts.split(" and ")
    model = build(name, **settings)
    norms = sum("norm" in parameter for parameter, _ in model.named_parameters())
    assert_partition(
        model,
        GROUPED_ATTENTION
        + f"""
        model.embed_tokens.weight x1 embedding
        model.layers.*.mlp.gate.weight x2 router
        model.layers.*.mlp.experts.gate_up_proj x2 hidden {gate_up}
        model.layers.*.mlp.experts.down_proj x2 hidden {down}
        *norm.weight x{norms} vector
        lm_head.weight x1 head
        """,
    )


def test_qwen2_moe():
    """A shared expert beside the stacked ones, with a gate of one row."""
    assert_partition(
        build("Qwen2MoeForCausalLM", **EXPERTS, shared_expert_intermediate_size=40),
        GROUPED_ATTENTION
        + """
        model.embed_tokens.weight x1 embedding
        model.layers.*.self_attn.*.bias x6 vector
        model.layers.*.mlp.gate.weight x2 router
        model.layers.*.mlp.shared_expert_gate.weight x2 router
        model.layers.*.mlp.experts.gate_up_proj x2 hidden 8 of 24 x 32
        model.layers.*.mlp.experts.down_proj x2 hidden 4 of 32 x 24
        model.layers.*.mlp.shared_expert.gate_proj.weight x2 hidden 40 x 32
        model.layers.*.mlp.shared_expert.up_proj.weight x2 hidden 40 x 32
        model.layers.*.mlp.shared_expert.down_proj.weight x2 hidden 32 x 40
        *norm.weight x5 vector
        lm_head.weight x1 head
        """,
    )


def test_gpt_oss():
    """Experts stored (E, fan-in, fan-out), gate and up interleaved row by row, with 2-D stacks of biases."""
    assert_partition(
        build("GptOssForCausalLM", **GROUPED, num_local_experts=4, head_dim=8),
        GROUPED_ATTENTION
        + """
        model.embed_tokens.weight x1 embedding
        model.layers.*.self_attn.sinks x2 vector
        model.layers.*.self_attn.*.bias x8 vector
        model.layers.*.mlp.router.weight x2 router
        model.layers.*.mlp.router.bias x2 vector
        model.layers.*.mlp.experts.gate_up_proj x2 hidden T r48 8 of 48 x 32
        model.layers.*.mlp.experts.gate_up_proj_bias x2 vector
        model.layers.*.mlp.experts.down_proj x2 hidden T 4 of 32 x 48
        model.layers.*.mlp.experts.down_proj_bias x2 vector
        *norm.weight x5 vector
        lm_head.weight x1 head
        """,
    )


def test_llama4():
    """Experts stored transposed, gate and up in halves."""
    assert_partition(
        build("Llama4ForCausalLM", **GROUPED, num_local_experts=4, head_dim=8, interleave_moe_layer_step=1),
        GROUPED_ATTENTION
        + """
        model.embed_tokens.weight x1 embedding
        model.layers.*.feed_forward.router.weight x2 router
        model.layers.*.feed_forward.experts.gate_up_proj x2 hidden T 8 of 48 x 32
        model.layers.*.feed_forward.experts.down_proj x2 hidden T 4 of 32 x 48
        model.layers.*.feed_forward.shared_expert.gate_proj.weight x2 hidden 48 x 32
        model.layers.*.feed_forward.shared_expert.up_proj.weight x2 hidden 48 x 32
        model.layers.*.feed_forward.shared_expert.down_proj.weight x2 hidden 32 x 48
        *norm.weight x5 vector
        lm_head.weight x1 head
        """,
    )


def test_t5():
    """The shared embedding has four names; relative positions are an embedding."""
    partition = assert_partition(
        build("T5ForConditionalGeneration", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=100),
        """
        shared.weight x1 embedding
        *coder.block.0.layer.0.SelfAttention.relative_attention_bias.weight x2 embedding
        *coder.block.*.layer.*.*Attention.?.weight x24 hidden 32 x 32
        *coder.block.*.layer.*.DenseReluDense.wi.weight x4 hidden 48 x 32
        *coder.block.*.layer.*.DenseReluDense.wo.weight x4 hidden 32 x 48
        *norm.weight x12 vector
        """,
    )
    names = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    assert set(partition["shared.weight"].aliases) == names
    assert "3 other names" in partition["lm_head.weight"].reason


BERT = """
{0}embeddings.*_embeddings.weight x3 embedding
{0}encoder.layer.*.attention.self.*.weight x6 hidden 32 x 32
{0}encoder.layer.*.attention.output.dense.weight x2 hidden 32 x 32
{0}encoder.layer.*.intermediate.dense.weight x2 hidden 48 x 32
{0}encoder.layer.*.output.dense.weight x2 hidden 32 x 48
*LayerNorm.weight x{1} vector
"""


def test_bert_without_a_head():
    """A base model keeps its last matrix, the pooler's."""
    assert_partition(
        build("BertModel", **SMALL),
        BERT.format("", 5) + "pooler.dense.weight x1 hidden 32 x 32\n*.bias x18 vector",
    )


def test_bert_for_masked_language_modelling():
    """The decoder is tied to the embedding, its transform is hidden, its bias is a vector."""
    assert_partition(
        build("BertForMaskedLM", **SMALL),
        BERT.format("bert.", 6) + "cls.predictions.transform.dense.weight x1 hidden 32 x 32\n*bias x20 vector",
    )


def test_bert_for_pretraining():
    """Two heads: one tied, one recognized only by its number of labels."""
    partition = assert_partition(
        build("BertForPreTraining", **SMALL),
        BERT.format("bert.", 6)
        + """
        bert.pooler.dense.weight x1 hidden 32 x 32
        cls.predictions.transform.dense.weight x1 hidden 32 x 32
        cls.seq_relationship.weight x1 head
        *bias x22 vector
        """,
    )
    assert "num_labels = 2" in partition["cls.seq_relationship.weight"].reason


def test_bert_for_sequence_classification():
    assert_partition(
        build("BertForSequenceClassification", **SMALL, num_labels=3),
        BERT.format("bert.", 5)
        + """
        bert.pooler.dense.weight x1 hidden 32 x 32
        classifier.weight x1 head
        *.bias x19 vector
        """,
    )


def test_distilbert_for_sequence_classification():
    """The layer before the classifier is hidden."""
    assert_partition(
        build("DistilBertForSequenceClassification", vocab_size=100, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
        """
        distilbert.embeddings.*_embeddings.weight x2 embedding
        distilbert.transformer.layer.*.attention.*_lin.weight x8 hidden 32 x 32
        distilbert.transformer.layer.*.ffn.lin1.weight x2 hidden 48 x 32
        distilbert.transformer.layer.*.ffn.lin2.weight x2 hidden 32 x 48
        *norm.weight x4 vector
        *LayerNorm.weight x1 vector
        pre_classifier.weight x1 hidden 32 x 32
        classifier.weight x1 head
        *.bias x19 vector
        """,
    )


def test_deberta():
    """The first version fuses q, k and v per head; positions are an embedding."""
    assert_partition(
        build("DebertaForMaskedLM", **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        """
        deberta.embeddings.*_embeddings.weight x2 embedding
        deberta.encoder.rel_embeddings.weight x1 embedding
        deberta.encoder.layer.*.attention.self.in_proj.weight x2 hidden r4 3 of 32 x 32
        deberta.encoder.layer.*.attention.self.pos*proj.weight x4 hidden 32 x 32
        deberta.encoder.layer.*.attention.self.?_bias x4 vector
        deberta.encoder.layer.*.attention.output.dense.weight x2 hidden 32 x 32
        deberta.encoder.layer.*.intermediate.dense.weight x2 hidden 48 x 32
        deberta.encoder.layer.*.output.dense.weight x2 hidden 32 x 48
        cls.predictions.transform.dense.weight x1 hidden 32 x 32
        *LayerNorm.weight x6 vector
        *bias x16 vector
        """,
    )


def test_deberta_v2_for_sequence_classification():
    assert_partition(
        build("DebertaV2ForSequenceClassification", **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        """
        deberta.embeddings.*_embeddings.weight x2 embedding
        deberta.encoder.rel_embeddings.weight x1 embedding
        deberta.encoder.layer.*.attention.self.*_proj.weight x10 hidden 32 x 32
        deberta.encoder.layer.*.attention.output.dense.weight x2 hidden 32 x 32
        deberta.encoder.layer.*.intermediate.dense.weight x2 hidden 48 x 32
        deberta.encoder.layer.*.output.dense.weight x2 hidden 32 x 48
        pooler.dense.weight x1 hidden 32 x 32
        classifier.weight x1 head
        *LayerNorm.weight x5 vector
        *.bias x23 vector
        """,
    )


BART = """
model.shared.weight x1 embedding
model.*coder.embed_positions.weight x2 embedding
model.*.?_proj.weight x9 hidden 32 x 32
model.*.out_proj.weight x3 hidden 32 x 32
model.*.fc1.weight x2 hidden 48 x 32
model.*.fc2.weight x2 hidden 32 x 48
*norm*.weight x7 vector
"""


def test_bart():
    assert_partition(build("BartForConditionalGeneration", **D_MODEL), BART + "*.bias x23 vector")


def test_bart_for_sequence_classification():
    """Of the two layers of the classification head, the last one is the head."""
    assert_partition(
        build("BartForSequenceClassification", **D_MODEL, num_labels=3),
        BART
        + """
        classification_head.dense.weight x1 hidden 32 x 32
        classification_head.out_proj.weight x1 head
        *.bias x25 vector
        """,
    )
