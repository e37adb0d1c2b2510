"""Output heads and recommenders of plain torch: every parameter, by hand."""

from __future__ import annotations

from torch import nn

from lightning_muon.partition import ParameterRule, partition_parameters
from tests.partition.expectations import assert_partition
from tests.partition.modules import BLOCK, Block, Parts, mlp, roles

# Output heads


def test_head_of_a_sequential_model():
    assert_partition(mlp(8, 16, 16, 4), "4.weight x1 head\n*.weight x2 hidden 16 x 8 | 16 x 16\n*.bias x3 vector")


def test_head_of_a_sequential_model_is_its_last_layer_whatever_its_width():
    assert roles(mlp(16, 16, 16)) == {"0.weight": "hidden", "2.weight": "head"}


def test_head_called_anything():
    module = Parts(encoder=mlp(20, 32, 32), banana=nn.Linear(32, 7))
    assert roles(module) == {"encoder.0.weight": "hidden", "encoder.2.weight": "hidden", "banana.weight": "head"}
    assert "7" in partition_parameters(module)["banana.weight"].reason


def test_a_rule_overrides_the_guess():
    module = Parts(encoder=mlp(20, 32, 32), banana=nn.Linear(32, 7))
    entry = partition_parameters(module, [ParameterRule(role="head", group="matrix")])["banana.weight"]
    assert (entry.role, entry.group, entry.group_name) == ("head", "matrix", "matrix/head")


def test_head_registered_first():
    """A common name counts at any place of registration, unless the layer is as wide as a hidden state."""
    module = Parts(out=nn.Linear(16, 16), first=nn.Linear(16, 16), norm=nn.LayerNorm(16))
    assert roles(module)["out.weight"] == "hidden"
    assert roles(Parts(out=nn.Linear(64, 10), first=nn.Linear(784, 64))) == {
        "out.weight": "head",
        "first.weight": "hidden",
    }


def test_heads_of_several_tasks():
    heads = nn.ModuleDict({"rating": nn.Linear(32, 5), "genre": nn.Linear(32, 3)})
    assert roles(Parts(trunk=mlp(16, 32), heads=heads)) == {
        "trunk.0.weight": "hidden",
        "heads.rating.weight": "head",
        "heads.genre.weight": "head",
    }


def test_head_with_a_known_number_of_classes():
    """A layer as wide as others is a head if the module has that number of classes."""
    module = Parts(first=nn.Linear(16, 16), last=nn.Linear(16, 16))
    assert roles(module) == {"first.weight": "hidden", "last.weight": "hidden"}
    module.num_classes = 16
    assert roles(module)["last.weight"] == "head"


def test_a_bare_layer_is_hidden():
    assert_partition(nn.Linear(8, 8), "weight x1 hidden 8 x 8\nbias x1 vector")


def test_encoders_keep_their_last_matrix():
    """Repeated blocks, library layers, fused maps and two towers end in hidden states."""
    assert roles(Parts(out=nn.Linear(16, 16), qkv=nn.Linear(16, 48)))["qkv.weight"] == "hidden"
    assert_partition(nn.Sequential(Block(16), Block(16)), BLOCK.format(2, 4, 6))
    assert set(roles(nn.TransformerEncoderLayer(16, 2, 32)).values()) == {"hidden"}
    towers = Parts(user=mlp(16, 32, 24), item=mlp(12, 32, 24))
    assert set(roles(towers).values()) == {"hidden"}


def test_attention_scores_do_not_hide_the_head():
    module = Parts(encoder=mlp(20, 32), score=nn.Linear(32, 1), out=nn.Linear(32, 7))
    assert roles(module)["out.weight"] == "head"


def test_named_head_counts_only_where_it_is_last():
    module = Parts(head=nn.Linear(20, 32), body=mlp(32, 48, 32), out=nn.Linear(32, 7))
    assert roles(module)["head.weight"] == "hidden"
    assert roles(module)["out.weight"] == "head"


def test_adaptive_softmax():
    module = Parts(
        embed=nn.Embedding(100, 16), body=nn.Linear(16, 16), loss=nn.AdaptiveLogSoftmaxWithLoss(16, 100, [10, 50])
    )
    assert_partition(
        module, "embed.weight x1 embedding\nbody.weight x1 hidden 16 x 16\nbody.bias x1 vector\nloss.*.weight x5 head"
    )


# Recommenders


def test_sasrec_scored_against_its_embedding():
    """No layer is tied, but the last one ends in the embedding's space, so it is hidden, also in a single block."""
    for count in (1, 2):
        module = Parts(
            items=nn.Embedding(100, 16),
            positions=nn.Embedding(10, 16),
            blocks=nn.ModuleList(Block(16) for _ in range(count)),
        )
        assert_partition(
            module, "items.* x1 embedding\npositions.* x1 embedding" + BLOCK.format(count, 2 * count, 3 * count)
        )


def test_gru4rec():
    """Gates are separate maps; the layer that scores the items is the head, or hidden if it scores by the embedding."""
    gru = """
    items.weight x1 embedding
    gru.weight_ih_l0 x1 hidden 3 of 24 x 16
    gru.weight_ih_l1 x1 hidden 3 of 24 x 24
    gru.weight_hh_l? x2 hidden 3 of 24 x 24
    gru.bias_* x4 vector
    last.bias x1 vector
    """
    parts = {"items": nn.Embedding(100, 16), "gru": nn.GRU(16, 24, num_layers=2)}
    assert_partition(Parts(**parts, last=nn.Linear(24, 100)), gru + "last.weight x1 head")
    assert_partition(Parts(**parts, last=nn.Linear(24, 16)), gru + "last.weight x1 hidden 16 x 24")


def test_caser():
    """Filters over the embedded sequence are hidden: beside an embedding one channel is not a raw input."""
    module = Parts(
        users=nn.Embedding(50, 16),
        items=nn.Embedding(100, 16),
        vertical=nn.Conv2d(1, 4, (5, 1)),
        horizontal=nn.ModuleList(nn.Conv2d(1, 8, (height, 16)) for height in (1, 2)),
        dense=nn.Linear(4 * 16 + 2 * 8, 16),
        item_weights=nn.Embedding(100, 32),
        item_biases=nn.Embedding(100, 1),
    )
    assert_partition(
        module,
        """
        users.weight x1 embedding
        items.weight x1 embedding
        item_*.weight x2 embedding
        vertical.weight x1 hidden 4 x 5
        horizontal.?.weight x2 hidden 8 x 16 | 8 x 32
        dense.weight x1 hidden 16 x 80
        *.bias x4 vector
        """,
    )


def test_ncf_with_a_bilinear_term():
    module = Parts(
        users=nn.Embedding(50, 8),
        items=nn.Embedding(60, 8),
        bilinear=nn.Bilinear(8, 8, 3),
        mlp=mlp(16, 8, 4),
        predict=nn.Linear(4, 1),
    )
    assert_partition(
        module,
        """
        users.weight x1 embedding
        items.weight x1 embedding
        bilinear.weight x1 hidden 3 of 8 x 8
        mlp.0.weight x1 hidden 8 x 16
        mlp.2.weight x1 hidden 4 x 8
        predict.weight x1 head
        *.bias x4 vector
        """,
    )


def test_mmoe():
    """Gates beside experts are routers, also inside a Sequential; towers are not."""
    module = Parts(
        embed=nn.Embedding(50, 16),
        experts=nn.ModuleList(mlp(16, 32) for _ in range(3)),
        gates=nn.ModuleList(nn.Sequential(nn.Linear(16, 3), nn.Softmax(-1)) for _ in range(2)),
        towers=nn.ModuleList(mlp(32, 16, 2) for _ in range(2)),
    )
    assert_partition(
        module,
        """
        embed.weight x1 embedding
        experts.*.weight x3 hidden 32 x 16
        gates.*.weight x2 router
        towers.*.0.weight x2 hidden 16 x 32
        towers.*.2.weight x2 hidden 2 x 16
        *.bias x9 vector
        """,
    )


def test_autoencoder():
    """The layer that scores all items is the head, although the first layer is as wide."""
    assert_partition(
        Parts(encoder=mlp(784, 64, 8), decoder=mlp(8, 64, 784)),
        """
        encoder.0.weight x1 hidden 64 x 784
        encoder.2.weight x1 hidden 8 x 64
        decoder.0.weight x1 hidden 64 x 8
        decoder.2.weight x1 head
        *.bias x4 vector
        """,
    )
