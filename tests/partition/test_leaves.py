"""Parts that are called a head: which of their layers are output heads."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_muon.partition import partition_parameters
from tests.partition.modules import Parts, mlp, roles


class ProjectionHead(Parts):
    """As in self-supervised learning: ends in an embedding that is compared with others."""


class PredictionHead(Parts):
    """As in BYOL: from the space of the projections back to it."""


class Head(Parts):
    """A head of attention."""

    def __init__(self) -> None:
        super().__init__(key=nn.Linear(16, 8), query=nn.Linear(16, 8), value=nn.Linear(16, 8))


def body() -> nn.Module:
    return mlp(20, 32)


CASES = {
    "a deep head": (Parts(body=body(), head=mlp(32, 24, 16, 5)), {"head.4"}),
    "a head of two tasks behind shared layers": (
        Parts(body=body(), head=Parts(shared=mlp(32, 16), label=nn.Linear(16, 5), box=nn.Linear(16, 4))),
        {"head.label", "head.box"},
    ),
    "deep heads in a dictionary": (
        Parts(body=body(), heads=nn.ModuleDict({"rating": mlp(32, 16, 5), "genre": mlp(32, 16, 3)})),
        {"heads.rating.2", "heads.genre.2"},
    ),
    "deep heads side by side": (Parts(trunk=body(), click=mlp(32, 16, 4), buy=mlp(32, 16, 4)), {"click.2", "buy.2"}),
    "a head that another layer follows": (Parts(head=mlp(20, 32), rest=mlp(32, 24, 3)), {"rest.2"}),
    "projection head of another width": (
        Parts(backbone=body(), projection_head=ProjectionHead(layers=mlp(32, 32, 10))), set(),
    ),
    "projection head called head": (Parts(backbone=body(), head=ProjectionHead(layers=mlp(32, 32, 10))), set()),
    "predictor of BYOL": (
        Parts(
            backbone=body(),
            projection_head=ProjectionHead(layers=mlp(32, 24)),
            prediction_head=PredictionHead(layers=mlp(24, 64, 24)),
        ),
        set(),
    ),
    "prototypes of DINO": (
        Parts(backbone=body(), head=ProjectionHead(layers=mlp(32, 24), last_layer=nn.Linear(24, 50, bias=False))),
        {"head.last_layer"},
    ),
    "prototypes of SwAV": (
        Parts(backbone=body(), head=ProjectionHead(layers=mlp(32, 24)), prototypes=nn.Linear(24, 32, bias=False)),
        {"prototypes"},
    ),
    "heads of attention": (
        Parts(
            words=nn.Embedding(40, 16),
            heads=nn.ModuleList([Head(), Head()]),
            proj=nn.Linear(16, 16),
            lm_head=nn.Linear(16, 40),
        ),
        {"lm_head"},
    ),
    "head registered first, as wide as a hidden state": (
        Parts(lm_head=nn.Linear(16, 32), words=nn.Embedding(32, 16), up=nn.Linear(16, 32), down=nn.Linear(32, 16)),
        {"lm_head"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("module", "expected"), CASES.values(), ids=CASES)
def test_output_heads(module, expected):
    found = {name.removesuffix(".weight") for name, role in roles(module).items() if role == "head"}
    assert found == expected


def test_every_head_that_a_model_declares():
    """timm's distilled models return two heads, some of them with a norm around the layer."""

    class Distilled(Parts):
        def get_classifier(self):
            return self.last, self.other

    module = Distilled(
        last=nn.Linear(16, 10), other=Parts(bn=nn.BatchNorm1d(16), linear=nn.Linear(16, 10)), body=mlp(16, 10, 16)
    )
    expected = {"last.weight": "head", "other.linear.weight": "head", "body.0.weight": "hidden"}
    assert roles(module).items() >= expected.items()
    path = f"{__name__}.test_every_head_that_a_model_declares.<locals>"
    assert path not in (reason := partition_parameters(module)["last.weight"].reason)
    assert f"{__name__}.Distilled.get_classifier() returns it" in reason
