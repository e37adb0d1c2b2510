"""Vision, audio, state-space and adapted models of transformers: expected partitions written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_muon.partition import partition_parameters
from tests.partition.expectations import assert_partition
from tests.partition.test_transformers_text import BERT, D_MODEL, SMALL, build

transformers = pytest.importorskip("transformers")

VISION = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
VIT = """
{0}embeddings.cls_token x1 vector
{0}embeddings.position_embeddings x1 embedding
{0}embeddings.patch_embeddings.projection.weight x1 input
{0}*.?_proj.weight x8 hidden 32 x 32
{0}*.fc1.weight x2 hidden 48 x 32
{0}*.fc2.weight x2 hidden 32 x 48
{0}*norm*.weight x5 vector
"""


def test_vit_for_image_classification():
    assert_partition(
        build("ViTForImageClassification", **VISION),
        VIT.format("vit.") + "classifier.weight x1 head\n*.bias x19 vector",
    )


def test_vit_without_a_head():
    """A base model keeps its last matrix, the pooler's."""
    assert_partition(
        build("ViTModel", **VISION), VIT.format("") + "pooler.dense.weight x1 hidden 32 x 32\n*.bias x19 vector"
    )


def test_swin():
    """Bias tables are embeddings; patch merging is hidden; the patch embedding is the stem."""
    assert_partition(
        build(
            "SwinForImageClassification",
            embed_dim=16,
            depths=[1, 1],
            num_heads=[2, 4],
            image_size=32,
            window_size=4,
            patch_size=2,
        ),
        """
        swin.embeddings.patch_embeddings.projection.weight x1 input
        *.relative_position_bias_table x2 embedding
        swin.encoder.layers.*.?_proj.weight x8 hidden 16 x 16 | 32 x 32
        swin.encoder.layers.*.fc1.weight x2 hidden 64 x 16 | 128 x 32
        swin.encoder.layers.*.fc2.weight x2 hidden 16 x 64 | 32 x 128
        swin.encoder.layers.0.downsample.reduction.weight x1 hidden 32 x 64
        *norm*.weight x7 vector
        classifier.weight x1 head
        *.bias x21 vector
        """,
    )


def test_convnext():
    """Depthwise filters are not matrices; pointwise ones are Linear layers; downsampling ones are flattened."""
    partition = assert_partition(
        build("ConvNextForImageClassification", hidden_sizes=[8, 16, 24], depths=[1, 2, 1], num_stages=3),
        """
        convnext.embeddings.patch_embeddings.weight x1 input
        *.dwconv.weight x4 other
        *.layer_scale_parameter x4 vector
        *.pwconv1.weight x4 hidden 32 x 8 | 64 x 16 | 96 x 24
        *.pwconv2.weight x4 hidden 8 x 32 | 16 x 64 | 24 x 96
        *.downsampling_layer.1.weight x2 hidden 16 x 32 | 24 x 64
        *.downsampling_layer.0.weight x2 vector
        *norm.weight x6 vector
        classifier.weight x1 head
        *.bias x24 vector
        """,
    )
    assert "Depthwise" in partition["convnext.encoder.stages.0.layers.0.dwconv.weight"].reason


def test_resnet():
    assert_partition(
        build(
            "ResNetForImageClassification",
            embedding_size=8,
            hidden_sizes=[16, 32],
            depths=[1, 1],
            layer_type="basic",
        ),
        """
        resnet.embedder.embedder.convolution.weight x1 input
        resnet.encoder.stages.*.shortcut.convolution.weight x2 hidden 16 x 8 | 32 x 16
        resnet.encoder.stages.0.*.convolution.weight x2 hidden 16 x 72 | 16 x 144
        resnet.encoder.stages.1.*.convolution.weight x2 hidden 32 x 144 | 32 x 288
        *.normalization.weight x7 vector
        classifier.1.weight x1 head
        *.bias x8 vector
        """,
    )


def test_segformer_for_segmentation():
    """A convolution as the head, one stem of four patch embeddings, depthwise filters between Linear layers."""
    assert_partition(
        build(
            "SegformerForSemanticSegmentation",
            num_encoder_blocks=2,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_attention_heads=[1, 2],
            sr_ratios=[4, 1],
            patch_sizes=[7, 3],
            strides=[4, 2],
            mlp_ratios=[4, 4],
            decoder_hidden_size=16,
        ),
        """
        segformer.stages.0.patch_embeddings.proj.weight x1 input
        segformer.stages.1.patch_embeddings.proj.weight x1 hidden 16 x 72
        *.dwconv.weight x2 other
        *.?_proj.weight x8 hidden 8 x 8 | 16 x 16
        *.sequence_reduction.weight x1 hidden 8 x 128
        *.fc1.weight x2 hidden 32 x 8 | 64 x 16
        *.fc2.weight x2 hidden 8 x 32 | 16 x 64
        decode_head.linear_projections.*.proj.weight x2 hidden 16 x 8 | 16 x 16
        decode_head.linear_fuse.weight x1 hidden 16 x 32
        decode_head.classifier.weight x1 head
        *norm*.weight x10 vector
        *.bias x30 vector
        """,
    )


def test_detr():
    """Two heads side by side, one of them three layers deep."""
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    assert_partition(
        build("DetrForObjectDetection", **D_MODEL, backbone_config=backbone, backbone=None, use_timm_backbone=False),
        """
        model.backbone.model.embedder.embedder.convolution.weight x1 input
        model.backbone.*.shortcut.convolution.weight x2 hidden 16 x 8 | 32 x 16
        model.backbone.*.convolution.weight x4 hidden 16 x 72 | 16 x 144 | 32 x 144 | 32 x 288
        model.query_position_embeddings.weight x1 embedding
        model.input_projection.weight x1 hidden 32 x 32
        model.*.?_proj.weight x12 hidden 32 x 32
        model.*.fc1.weight x2 hidden 48 x 32
        model.*.fc2.weight x2 hidden 32 x 48
        class_labels_classifier.weight x1 head
        bbox_predictor.layers.2.weight x1 head
        bbox_predictor.layers.?.weight x2 hidden 32 x 32
        *norm*.weight x6 vector
        *.bias x27 vector
        """,
    )


def test_clip():
    """The projections into the joint space are hidden: nothing suggests classes."""
    vision = dict(VISION)
    assert_partition(
        build("CLIPModel", text_config=SMALL, vision_config=vision, projection_dim=24),
        """
        logit_scale x1 vector
        text_model.embeddings.*_embedding.weight x2 embedding
        vision_model.embeddings.class_embedding x1 vector
        vision_model.embeddings.patch_embedding.weight x1 input
        vision_model.embeddings.position_embedding.weight x1 embedding
        *_model.encoder.layers.*_proj.weight x16 hidden 32 x 32
        *_model.encoder.layers.*.fc1.weight x4 hidden 48 x 32
        *_model.encoder.layers.*.fc2.weight x4 hidden 32 x 48
        *_projection.weight x2 hidden 24 x 32
        *norm*.weight x11 vector
        *.bias x35 vector
        """,
    )


def test_whisper():
    """The first convolution reads the spectrum; the head is tied."""
    assert_partition(
        build("WhisperForConditionalGeneration", **D_MODEL, num_mel_bins=80, pad_token_id=0),
        """
        model.encoder.conv1.weight x1 input
        model.encoder.conv2.weight x1 hidden 32 x 96
        model.*.embed_*.weight x3 embedding
        model.*.?_proj.weight x9 hidden 32 x 32
        model.*.out_proj.weight x3 hidden 32 x 32
        model.*.fc1.weight x2 hidden 48 x 32
        model.*.fc2.weight x2 hidden 32 x 48
        *norm.weight x7 vector
        *.bias x22 vector
        """,
    )


def test_wav2vec2():
    """The positional embedding has a weight-normalized, grouped convolution."""
    assert_partition(
        build(
            "Wav2Vec2ForCTC",
            **SMALL,
            conv_dim=(16, 16),
            conv_stride=(2, 2),
            conv_kernel=(3, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=4,
        ),
        """
        wav2vec2.masked_spec_embed x1 vector
        wav2vec2.feature_extractor.conv_layers.0.conv.weight x1 input
        wav2vec2.feature_extractor.conv_layers.1.conv.weight x1 hidden 16 x 48
        wav2vec2.feature_projection.projection.weight x1 hidden 32 x 16
        wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0 x1 vector
        wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1 x1 hidden g4 4 of 8 x 64
        wav2vec2.encoder.layers.*_proj.weight x8 hidden 32 x 32
        wav2vec2.encoder.layers.*.intermediate_dense.weight x2 hidden 48 x 32
        wav2vec2.encoder.layers.*.output_dense.weight x2 hidden 32 x 48
        *norm.weight x7 vector
        lm_head.weight x1 head
        *.bias x22 vector
        """,
    )


def test_mamba():
    """x and z in one weight, dt, B and C in another; A_log is a matrix in shape only."""
    assert_partition(
        build("MambaForCausalLM", vocab_size=100, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=3),
        """
        backbone.embeddings.weight x1 embedding
        backbone.layers.*.mixer.A_log x2 other
        backbone.layers.*.mixer.D x2 vector
        backbone.layers.*.mixer.conv1d.weight x2 other
        backbone.layers.*.mixer.in_proj.weight x2 hidden 2 of 64 x 32
        backbone.layers.*.mixer.x_proj.weight x2 hidden 3 x 64 + 4 x 64 + 4 x 64
        backbone.layers.*.mixer.dt_proj.weight x2 hidden 64 x 3
        backbone.layers.*.mixer.out_proj.weight x2 hidden 32 x 64
        *norm*.weight x3 vector
        *.bias x4 vector
        """,
    )


def test_mamba2():
    assert_partition(
        build(
            "Mamba2ForCausalLM",
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            num_heads=8,
            head_dim=8,
            n_groups=2,
        ),
        """
        backbone.embeddings.weight x1 embedding
        backbone.layers.*.mixer.A_log x2 vector
        backbone.layers.*.mixer.D x2 vector
        backbone.layers.*.mixer.dt_bias x2 vector
        backbone.layers.*.mixer.conv1d.weight x2 other
        backbone.layers.*.mixer.in_proj.weight x2 hidden 64 x 32 + 64 x 32 + 8 x 32 + 8 x 32 + 8 x 32
        backbone.layers.*.mixer.out_proj.weight x2 hidden 32 x 64
        *norm*.weight x5 vector
        *.bias x2 vector
        lm_head.weight x1 head
        """,
    )


def test_rwkv():
    """Vectors of shape (1, 1, d) are not matrices."""
    partition = assert_partition(
        build("RwkvForCausalLM", vocab_size=100, hidden_size=32, num_hidden_layers=2),
        """
        rwkv.embeddings.weight x1 embedding
        rwkv.blocks.*.time_* x14 vector
        rwkv.blocks.*.attention.*.weight x8 hidden 32 x 32
        rwkv.blocks.*.feed_forward.key.weight x2 hidden 128 x 32
        rwkv.blocks.*.feed_forward.receptance.weight x2 hidden 32 x 32
        rwkv.blocks.*.feed_forward.value.weight x2 hidden 32 x 128
        *ln*.weight x6 vector
        *ln*.bias x6 vector
        head.weight x1 head
        """,
    )
    assert "(1, 1, 32)" in partition["rwkv.blocks.0.attention.time_mix_key"].reason


def test_xlnet_keeps_its_raw_attention_weights_with_other():
    """They are (d, heads, head_dim) tensors of a class that does not explain them; a rule can flatten them."""
    assert_partition(
        build("XLNetForSequenceClassification", vocab_size=100, d_model=32, n_layer=1, n_head=4, d_inner=48),
        """
        transformer.mask_emb x1 vector
        transformer.word_embedding.weight x1 embedding
        transformer.layer.0.rel_attn.r_?_bias x3 vector
        transformer.layer.0.rel_attn.seg_embed x1 embedding
        transformer.layer.0.rel_attn.? x5 other
        transformer.layer.0.ff.layer_1.weight x1 hidden 48 x 32
        transformer.layer.0.ff.layer_2.weight x1 hidden 32 x 48
        sequence_summary.summary.weight x1 hidden 32 x 32
        logits_proj.weight x1 head
        *norm.weight x2 vector
        *.bias x6 vector
        """,
    )


class Classifier(nn.Module):
    """A headless encoder of transformers under the user's own head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.banana = nn.Linear(32, classes, device="meta")


def test_encoder_under_a_head_called_anything():
    assert_partition(
        Classifier(build("BertModel", **SMALL), 7),
        BERT.format("encoder.", 5)
        + """
        encoder.pooler.dense.weight x1 hidden 32 x 32
        banana.weight x1 head
        *.bias x19 vector
        """,
    )


def test_lora():
    """Both factors of an adapter are matrices, those of an embedding and a magnitude are not; the rest is frozen."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["query", "value", "word_embeddings"], use_dora=False, task_type="SEQ_CLS"
    )
    model = peft.get_peft_model(build("BertForSequenceClassification", **SMALL), config)
    partition = assert_partition(
        model,
        """
        *.base_layer.bias x4 vector
        *.attention.self.*.base_layer.weight x4 hidden 32 x 32
        *.lora_embedding_?.default x2 embedding
        *.lora_A.default.weight x4 hidden 4 x 32
        *.lora_B.default.weight x4 hidden 32 x 4
        *_embeddings*.weight x3 embedding
        *.attention.self.key.weight x2 hidden 32 x 32
        *.attention.output.dense.weight x2 hidden 32 x 32
        *.intermediate.dense.weight x2 hidden 48 x 32
        *.output.dense.weight x2 hidden 32 x 48
        *.pooler.dense.weight x1 hidden 32 x 32
        *.classifier.original_module.weight x1 head
        *.classifier.modules_to_save.default.weight x1 head
        *.LayerNorm.weight x5 vector
        *.bias x16 vector
        """,
    )
    trained = {entry.role for entry in partition if not entry.frozen}
    assert trained == {"hidden", "embedding", "head", "vector"}
    assert all("lora_" in name for group in partition.param_groups("matrix") for name in group["param_names"])


def test_dora_magnitudes_are_vectors():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["qkv_proj"], use_dora=True)
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**SMALL, num_key_value_heads=2, pad_token_id=0))
    partition = partition_parameters(peft.get_peft_model(model, config))
    magnitudes = [entry for entry in partition if "lora_magnitude_vector" in entry.name]
    assert len(magnitudes) == 2
    assert {entry.role for entry in magnitudes} == {"vector"}
    fused = next(entry for entry in partition if entry.name.endswith("qkv_proj.base_layer.weight"))
    assert fused.layout is not None
    assert fused.layout.split == (32, 16, 16)


def test_large_models_are_partitioned_quickly_on_the_meta_device():
    """The tables of a model of 7 billion parameters, too large for a test machine."""
    partition = partition_parameters(build("LlamaForCausalLM"))
    assert sum(entry.parameter.numel() for entry in partition) > 6e9
    assert all(entry.parameter.device == torch.device("meta") for entry in partition)
