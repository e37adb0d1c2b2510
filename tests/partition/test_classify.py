"""The partition of plain torch layers: every parameter, by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_muon.partition import partition_parameters
from tests.partition.expectations import assert_partition
from tests.partition.modules import Parts, mlp, roles

# Layers


def test_recurrent_layers():
    module = Parts(
        rnn=nn.RNN(4, 8),
        gru=nn.GRU(4, 8, bidirectional=True),
        lstm=nn.LSTM(4, 8, proj_size=5),
        rnn_cell=nn.RNNCell(4, 8),
        gru_cell=nn.GRUCell(4, 8),
        lstm_cell=nn.LSTMCell(4, 8),
    )
    assert_partition(
        module,
        """
        rnn*.weight_ih* x2 hidden 8 x 4
        rnn*.weight_hh* x2 hidden 8 x 8
        gru*.weight_ih* x3 hidden 3 of 8 x 4
        gru*.weight_hh* x3 hidden 3 of 8 x 8
        lstm.weight_hh_l0 x1 hidden 4 of 8 x 5
        lstm.weight_hr_l0 x1 hidden 5 x 8
        lstm*.weight_ih* x2 hidden 4 of 8 x 4
        lstm_cell.weight_hh x1 hidden 4 of 8 x 8
        *.bias_* x14 vector
        """,
    )


def test_transformer():
    assert_partition(
        nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
        """
        *.in_proj_weight x3 hidden 3 of 16 x 16
        *.out_proj.weight x3 hidden 16 x 16
        *.linear1.weight x2 hidden 32 x 16
        *.linear2.weight x2 hidden 16 x 32
        *norm*.weight x7 vector
        *bias x17 vector
        """,
    )


def test_attention_with_keys_and_values_of_other_widths():
    assert_partition(
        nn.MultiheadAttention(16, 2, kdim=12, vdim=10, add_bias_kv=True),
        """
        q_proj_weight x1 hidden 16 x 16
        k_proj_weight x1 hidden 16 x 12
        v_proj_weight x1 hidden 16 x 10
        out_proj.weight x1 hidden 16 x 16
        *bias* x4 vector
        """,
    )


def test_normalised_weights():
    """Magnitudes are vectors; directions are what the module's own type says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.weight_norm(nn.Linear(8, 16))
        lstm = nn.utils.weight_norm(nn.LSTM(16, 16), "weight_hh_l0")
        spectral = nn.utils.spectral_norm(nn.Linear(16, 16))
    module = Parts(
        old=old,
        new=parametrizations.weight_norm(nn.Conv1d(16, 16, 3)),
        embed=parametrizations.weight_norm(nn.Embedding(50, 16)),
        lstm=lstm,
        spectral=spectral,
        orthogonal=parametrizations.orthogonal(nn.Linear(16, 16)),
        out=nn.Linear(16, 3),
    )
    assert_partition(
        module,
        """
        old.weight_g x1 vector
        old.weight_v x1 hidden 16 x 8
        new.parametrizations.weight.original0 x1 vector
        new.parametrizations.weight.original1 x1 hidden 16 x 48
        embed.parametrizations.weight.original0 x1 vector
        embed.parametrizations.weight.original1 x1 embedding
        lstm.weight_hh_l0_g x1 vector
        lstm.weight_hh_l0_v x1 hidden 4 of 16 x 16
        lstm.weight_ih_l0 x1 hidden 4 of 16 x 16
        lstm.bias_* x2 vector
        spectral.weight_orig x1 hidden 16 x 16
        orthogonal.parametrizations.weight.original x1 other
        out.weight x1 head
        *.bias x5 vector
        """,
    )


def test_convolutions():
    """Grouped filters are separate maps, depthwise ones no matrices; a pointwise last one is the head."""
    module = Parts(
        stem=nn.Conv2d(3, 16, 3),
        norm=nn.BatchNorm2d(16),
        grouped=nn.Conv2d(16, 32, 3, groups=4),
        grouped_up=nn.ConvTranspose2d(32, 16, 3, groups=4),
        depthwise=nn.Conv2d(16, 16, 3, groups=16),
        depthwise_up=nn.ConvTranspose2d(16, 16, 3, groups=16),
        volume=nn.Conv3d(16, 8, 3),
        up=nn.ConvTranspose2d(8, 4, 2),
        out=nn.Conv2d(4, 2, 1),
    )
    assert_partition(
        module,
        """
        stem.weight x1 input
        norm.weight x1 vector
        grouped.weight x1 hidden g4 4 of 8 x 36
        grouped_up.weight x1 hidden T g4 4 of 36 x 8
        depthwise*.weight x2 other
        volume.weight x1 hidden 8 x 432
        up.weight x1 hidden T 16 x 8
        out.weight x1 head
        *.bias x9 vector
        """,
    )


def test_convolutions_over_embeddings_are_no_stems():
    module = Parts(words=nn.Embedding(50, 4), conv=nn.Conv1d(4, 8, 3), out=nn.Linear(8, 2))
    assert roles(module) == {"words.weight": "embedding", "conv.weight": "hidden", "out.weight": "head"}


def test_unet_that_returns_an_image():
    module = Parts(down=nn.Conv2d(3, 8, 3), up=nn.ConvTranspose2d(8, 8, 2, 2), out=nn.Conv2d(16, 3, 3))
    assert roles(module) == {"down.weight": "input", "up.weight": "hidden", "out.weight": "head"}


def test_headless_convolutional_encoder_keeps_its_last_filters():
    assert roles(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3)))["2.weight"] == "hidden"


def test_norms_over_several_dimensions_are_gains():
    assert_partition(nn.LayerNorm((4, 8, 8)), "weight x1 vector\nbias x1 vector")


def test_raw_parameters():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls = nn.Parameter(torch.zeros(1, 1, 8))
            self.pos_embed = nn.Parameter(torch.zeros(1, 9, 8))
            self.codebook = nn.Parameter(torch.zeros(2, 50, 8))
            self.probe = nn.Parameter(torch.zeros(3, 8))
            self.scale = nn.Parameter(torch.zeros(()))

    assert_partition(
        Tokens(), "cls x1 vector\npos_embed x1 embedding\ncodebook x1 embedding\nprobe x1 other\nscale x1 vector"
    )


def test_raw_experts():
    """Biases beside the weights tell that they are stored (E, fan-in, fan-out); without biases the reason says so."""

    class Experts(nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.w_in = nn.Parameter(torch.zeros(4, 8, 16))
            self.w_out = nn.Parameter(torch.zeros(4, 16, 8))
            if bias:
                self.w_in_bias = nn.Parameter(torch.zeros(4, 16))

    assert_partition(
        Experts(bias=True), "w_in x1 hidden T 4 of 16 x 8\nw_out x1 hidden T 4 of 8 x 16\nw_in_bias x1 vector"
    )
    partition = assert_partition(Experts(bias=False), "w_in x1 hidden 4 of 8 x 16\nw_out x1 hidden 4 of 16 x 8")
    assert "(experts, fan-out, fan-in)" in partition["w_in"].reason


def test_linear_layers_of_other_libraries():
    """A module with the attributes and the weight of nn.Linear is one."""

    class ColumnParallelLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 8, 16
            self.weight = nn.Parameter(torch.zeros(16, 8))

    assert_partition(ColumnParallelLinear(), "weight x1 hidden 16 x 8")


@pytest.mark.parametrize(
    ("attributes", "fan_out", "expected"),
    [
        ({}, 48, "3 of 16 x 16"),
        ({"num_heads": 4, "num_kv_heads": 1}, 24, "16 x 16 + 4 x 16 + 4 x 16"),
        ({}, 40, "40 x 16"),
    ],
)
def test_fused_attention_of_unknown_classes(attributes, fan_out, expected):
    """Thirds, or the sizes that the module tells; else one matrix, and the reason says that it may be several."""
    attention = Parts(qkv=nn.Linear(16, fan_out, bias=False))
    for name, value in attributes.items():
        setattr(attention, name, value)
    module = Parts(attention=attention, out=nn.Linear(16, 16, bias=False), norm=nn.LayerNorm(16, bias=False))
    partition = assert_partition(
        module, f"attention.qkv.weight x1 hidden {expected}\nout.weight x1 hidden 16 x 16\nnorm.weight x1 vector"
    )
    assert ("rule can set split" in partition["attention.qkv.weight"].reason) == (fan_out == 40)


# Shared, frozen, odd


def test_tied_and_shared_modules():
    shared = nn.Linear(16, 16, bias=False)
    module = Parts(embed=nn.Embedding(100, 16), first=shared, second=shared, lm_head=nn.Linear(16, 100, bias=False))
    module.lm_head.weight = module.embed.weight
    partition = assert_partition(module, "embed.weight x1 embedding\nfirst.weight x1 hidden 16 x 16")
    assert partition["second.weight"] is partition["first.weight"]
    assert partition["lm_head.weight"].aliases == ("lm_head.weight",)
    assert "Shared with lm_head.weight" in partition["embed.weight"].reason


def test_tied_weight_registered_as_a_linear_layer_first():
    module = Parts(
        lm_head=nn.Linear(16, 100, bias=False), body=nn.Linear(16, 16, bias=False), embed=nn.Embedding(100, 16)
    )
    module.lm_head.weight = module.embed.weight
    assert_partition(module, "lm_head.weight x1 embedding\nbody.weight x1 hidden 16 x 16")


def test_frozen_parameters_are_listed_but_join_no_group():
    module = mlp(8, 16, 16, 4)
    module[0].requires_grad_(False)
    partition = partition_parameters(module)
    assert partition["0.weight"].frozen
    assert partition["0.weight"].group == "matrix"
    assert [name for group in partition.param_groups("matrix") for name in group["param_names"]] == ["2.weight"]


def test_frozen_modules_behind_the_head_do_not_count():
    """A frozen teacher registered last does not take the head's place."""
    module = Parts(encoder=mlp(20, 32, 24), out=nn.Linear(24, 7), teacher=mlp(20, 40, 9).requires_grad_(False))
    assert roles(module)["out.weight"] == "head"


def test_quantised_weights_do_not_crash():
    module = mlp(8, 16, 4)
    module[0].weight = nn.Parameter(torch.zeros(16, 4, dtype=torch.uint8), requires_grad=False)
    entry = partition_parameters(module)["0.weight"]
    assert (entry.role, entry.group) == ("other", "other")
    assert "uint8" in entry.reason


def test_a_module_without_parameters():
    assert len(partition_parameters(nn.ReLU())) == 0


def test_a_square_gate_beside_experts_is_no_router() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(16, 3)
            self.attn_gate = nn.Linear(16, 16)
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    partition = partition_parameters(nn.ModuleList([Block(), Block()]))
    assert partition["0.gate.weight"].role == "router"
    assert partition["0.attn_gate.weight"].role == "hidden"
