"""Fused projections of libraries that are not transformers, as their sources cut them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_muon.partition import ParameterAssignment, partition_parameters
from tests.partition.expectations import layout_text
from tests.partition.modules import Parts


def entry_of(module: nn.Module, name: str) -> ParameterAssignment:
    """The entry of a parameter of a block inside a model."""
    model = Parts(stem=nn.Conv2d(3, 16, 3), block=module, rest=nn.Linear(16, 16), norm=nn.LayerNorm(16))
    return partition_parameters(model)[f"block.{name}"]


def layout_of(module: nn.Module, name: str) -> str:
    entry = entry_of(module, name)
    assert (entry.role, entry.group) == ("hidden", "matrix"), entry.reason
    return layout_text(entry)


def attention(name: str, rows: int, kind: str = "Attention", out: int = 16, **attributes: object) -> nn.Module:
    """An attention of width 16 with a fused projection and an output projection, without code."""
    module = type(kind, (Parts,), {})(**{name: nn.Linear(16, rows), "to_out": nn.Linear(out, 16)})
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


CONFIG = SimpleNamespace(n_head=4, n_query_groups=2, head_size=8)

BY_SIZES = {
    "qkv (timm)": (attention("qkv", 48), "qkv", "3 of 16 x 16"),
    "Wqkv (flash-attn)": (attention("Wqkv", 48), "Wqkv", "3 of 16 x 16"),
    "Wqkv, grouped": (attention("Wqkv", 24, num_heads=4, num_heads_kv=1, head_dim=4), "Wqkv", "16 x 16 + 2 of 4 x 16"),
    "to_qkv, heads times their width (lucidrains)": (
        attention("to_qkv", 96, out=32, heads=4), "to_qkv", "3 of 32 x 16",
    ),
    "to_qkv as wide as its input": (attention("to_qkv", 48, heads=4, dim_head=4), "to_qkv", "3 of 16 x 16"),
    "to_kv": (attention("to_kv", 64, out=32, heads=4), "to_kv", "2 of 32 x 16"),
    "Wkv": (attention("Wkv", 32, num_heads=4, head_dim=4), "Wkv", "2 of 16 x 16"),
    "qkv_net (Transformer-XL)": (attention("qkv_net", 96, out=32, n_head=4, d_head=8), "qkv_net", "3 of 32 x 16"),
    "to_added_qkv (diffusers)": (attention("to_added_qkv", 48, heads=2), "to_added_qkv", "3 of 16 x 16"),
    "qkv_linears with shared values (neuralforecast)": (
        attention("qkv_linears", 36, out=4, n_head=4, d_head=4), "qkv_linears", "2 of 16 x 16 + 4 x 16",
    ),
    "wqkv (gpt-fast)": (
        attention("wqkv", 24, n_head=4, n_local_heads=1, head_dim=4), "wqkv", "16 x 16 + 2 of 4 x 16",
    ),
    "qkv (litgpt)": (attention("qkv", 64, out=32, config=CONFIG), "qkv", "32 x 16 + 2 of 16 x 16"),
    "attn (litgpt before 0.5.4)": (attention("attn", 64, out=32, config=CONFIG), "attn", "r2 2 of 16 x 16"),
    "wqkv (InternLM2)": (
        attention("wqkv", 32, "InternLM2Attention", num_heads=4, num_key_value_heads=2, head_dim=4), "wqkv", "groups",
    ),
    "qkv per head (LeViT)": (attention("qkv", 32, key_dim=2, val_dim=4, num_heads=4), "qkv", "heads"),
    "qkv per head (guided diffusion)": (
        attention("qkv", 48, num_heads=4, attention=type("QKVAttentionLegacy", (nn.Module,), {})()),
        "qkv",
        "r4 12 of 4 x 16",
    ),
    "1x1 convolution": (Parts(to_qkv=nn.Conv2d(16, 96, 1), to_out=nn.Conv2d(32, 16, 1)), "to_qkv", "3 of 32 x 16"),
    "a Sequential that ends in the layer": (
        Parts(to_qkv=nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 48))), "to_qkv.1", "3 of 16 x 16",
    ),
    "a layer with its norm": (
        Parts(qkv=Parts(linear=nn.Linear(16, 48), bn=nn.BatchNorm1d(48))), "qkv.linear", "3 of 16 x 16",
    ),
    "a gated activation beside (monai)": (
        Parts(linear1=nn.Linear(16, 64), linear2=nn.Linear(32, 16), fn=type("GEGLU", (nn.Module,), {})()),
        "linear1",
        "2 of 32 x 16",
    ),
    "a gated activation of its own in a Sequential (gluonts)": (
        nn.Sequential(nn.Linear(16, 64), type("GatedLinearUnit", (nn.Module,), {})()), "0", "2 of 32 x 16",
    ),
    "nn.GLU": (nn.Sequential(nn.Linear(16, 64), nn.Dropout(), nn.GLU()), "0", "2 of 32 x 16"),
}  # fmt: skip


@pytest.mark.parametrize(("module", "name", "expected"), BY_SIZES.values(), ids=BY_SIZES)
def test_by_names_and_sizes(module, name, expected):
    text = layout_of(module, f"{name}.weight")
    layout = entry_of(module, f"{name}.weight").layout
    if expected in {"groups", "heads"}:
        split, repeats = {"groups": ((8, 4, 4), 2), "heads": ((2, 2, 4), 4)}[expected]
        assert (layout.split, layout.repeats) == (split, repeats)
    elif "+" in expected:
        rows = [m for _, m, _ in layout.matrix_shapes((sum(layout.split), 16))]
        wanted = []
        for part in expected.split(" + "):
            count, _, size = part.rpartition(" of ")
            wanted += [int(size.split(" ")[0])] * int(count or 1)
        assert rows == wanted
    elif expected.startswith("r"):
        assert layout.repeats == int(expected[1])
    else:
        assert text == expected


UNSETTLED = {
    "q, k and v of unknown sizes": (attention("qkv", 40), "qkv", True),
    "five maps": (attention("to_qkv", 80), "to_qkv", True),
    "keys and values of unknown sizes": (attention("to_kv", 40), "to_kv", True),
    "latent keys and values (MLA)": (attention("kv_b_proj", 64, num_heads=4), "kv_b_proj", True),
    "q, k, v and an MLP": (attention("to_qkv_mlp_proj", 112), "to_qkv_mlp_proj", True),
    "a rearrangement behind": (
        Parts(to_qkv=nn.Sequential(nn.Linear(16, 48), type("Rearrange", (nn.Module,), {})())), "to_qkv.0", True,
    ),
    "a gated activation beside, and nothing takes a half": (
        Parts(wide=nn.Linear(16, 64), back=nn.Linear(64, 16), fn=type("GEGLU", (nn.Module,), {})()), "wide", False,
    ),
    "no such name": (attention("wide", 48), "wide", False),
}  # fmt: skip


@pytest.mark.parametrize(("module", "name", "noted"), UNSETTLED.values(), ids=UNSETTLED)
def test_one_matrix_where_nothing_settles_it(module, name, noted):
    entry = entry_of(module, f"{name}.weight")
    assert entry.layout.split == ()
    assert ("a rule can set split" in entry.reason) == noted


class Cut(nn.Module):
    """Layers whose outputs the code cuts, or does not."""

    def __init__(self) -> None:
        super().__init__()
        self.pack = nn.Linear(16, 96)
        self.gated = nn.Linear(16, 64)
        self.halves = nn.Sequential(nn.Dropout(), nn.Linear(16, 64))
        self.latent = nn.Linear(16, 8)
        self.along_tokens = nn.Linear(16, 64)
        self.twice = nn.Linear(16, 48)
        self.conv = nn.Conv2d(16, 48, 1)
        self.back = nn.Linear(32, 16)
        self.whole, self.dropout, self.glu = nn.Linear(16, 64), nn.Dropout(), nn.Linear(64, 32)

    def forward(self, x, image):
        packed = self.pack(x)
        q, k, v = packed.chunk(3, dim=-1)
        x = self.gated(x)
        x = F.glu(x)
        whole = self.glu(self.dropout(self.whole(x)))
        a, b = torch.chunk(self.halves(x), 2, -1)
        mean, variance = self.latent(x).chunk(2, -1)
        left, right = self.along_tokens(x).chunk(2, dim=1)
        c, d = self.twice(x).chunk(2, dim=-1)
        e, f, g = self.twice(x).chunk(3, dim=-1)
        return self.conv(image).chunk(3, dim=1), q, k, v, a, b, mean, variance, left, right, c, d, e, f, g, whole


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pack", "3 of 32 x 16"),
        ("gated", "2 of 32 x 16"),
        ("halves.1", "2 of 32 x 16"),
        ("latent", "2 of 4 x 16"),
        ("along_tokens", "64 x 16"),
        ("twice", "48 x 16"),
        ("whole", "64 x 16"),
        ("conv", "3 of 16 x 16"),
    ],
)
def test_as_the_code_cuts_it(name, expected):
    """Equal parts along the features, whatever the layer is called; not along tokens, not in two ways."""
    assert layout_of(Cut(), f"{name}.weight") == expected


class Split(nn.Module):
    """Layers whose outputs the code splits by sizes that it names, and gates of a recurrent cell."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.state, self.config = 4, 8, SimpleNamespace(width=16)
        self.uneven = nn.Linear(16, 20)
        self.film = nn.Linear(16, 32)
        self.computed = nn.Linear(16, 24)
        self.local = nn.Linear(16, 20)
        self.other_sum = nn.Linear(16, 24)
        self.along_tokens = nn.Linear(16, 32)
        self.rest = nn.Linear(16, 32)
        self.from_input, self.ln_input = nn.Linear(8, 64), nn.LayerNorm(64)
        self.from_state = nn.Linear(16, 64)

    def forward(self, x, h):
        dt, b, c = torch.split(self.uneven(x), [self.rank, self.state, self.state], dim=-1)
        beta, gamma = self.film(x).split(self.config.width, dim=-1)
        e, f = self.computed(x).split((2 * self.state, self.state * self.rank // 4), -1)
        size = self.rank
        g, i = self.local(x).split([size, 16], dim=-1)
        j, k = self.other_sum(x).split([self.rank, self.state], dim=-1)
        m, n = self.along_tokens(x).split([self.config.width, self.config.width], dim=0)
        o, *p = self.rest(x).split(self.config.width, dim=-1)
        gates_x = self.from_input(x)
        gates_x = self.ln_input(gates_x)
        gates = gates_x + self.from_state(h)
        q, r, s, t = gates.chunk(4, dim=1)
        return dt, b, c, beta, gamma, e, f, g, i, j, k, m, n, o, p, q, r, s, t


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("uneven", (4, 8, 8)),
        ("film", (16, 16)),
        ("computed", (16, 8)),
        ("local", ()),
        ("other_sum", ()),
        ("along_tokens", ()),
        ("rest", ()),
        ("from_input", (16,) * 4),
        ("from_state", (16,) * 4),
    ],
)
def test_as_the_code_splits_it(name, rows):
    """Sizes that attributes give and that add up; along the features; as many parts as names."""
    entry = entry_of(Split(), f"{name}.weight")
    assert (entry.role, entry.layout.split) == ("hidden", rows)


class HSTU(nn.Module):
    """A raw parameter, an activation, and a split by sizes that attributes give: as in RecTools and Meta's code."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.value_dim, self.key_dim = 2, 6, 4
        self.uvqk = nn.Parameter(torch.zeros(16, 40))
        self.silu = nn.SiLU()
        self.output = nn.Linear(12, 16)

    def forward(self, x):
        packed = torch.matmul(x, self.uvqk)
        packed = self.silu(packed)
        u, v, q, k = torch.split(
            packed,
            [self.value_dim * self.heads, self.value_dim * self.heads, self.key_dim * self.heads, self.key_dim * 2],
            dim=1,
        )
        return self.output(u * v), q, k


def test_raw_parameters_as_the_code_splits_them():
    assert layout_of(HSTU(), "uvqk") == "T 12 x 16 + 12 x 16 + 8 x 16 + 8 x 16"


def test_a_projection_at_the_end_of_a_decoder_that_the_code_splits_stays_hidden():
    """Interpretable attention of neuralforecast, whose output projection is as wide as its input."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.values = 16, 4
            self.qkv_linears = nn.Linear(16, 36)

        def forward(self, x):
            return self.qkv_linears(x).split((self.queries, self.queries, self.values), dim=-1)

    module = Parts(encoder=nn.Linear(5, 16), decoder=Parts(attention=Attention()), head=nn.Linear(16, 3))
    entry = partition_parameters(module)["decoder.attention.qkv_linears.weight"]
    assert (entry.role, entry.layout.split) == ("hidden", (16, 16, 4))


def test_a_head_that_the_code_splits_is_a_head():
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.boxes, self.classes = 4, 7
            self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU())
            self.last = nn.Linear(32, 11)

        def forward(self, x):
            boxes, classes = self.last(self.body(x)).split([self.boxes, self.classes], dim=-1)
            return boxes, classes

    assert partition_parameters(Detector())["last.weight"].role == "head"


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pack, self.back = nn.Linear(16, 48), nn.Linear(8, 16)

    def forward(self, x):
        return self.pack(x).chunk(2, dim=-1)


class CutInThree(Halved):
    def forward(self, x):
        return self.pack(x).chunk(3, dim=-1)


class CutBothWays(Halved):
    def forward(self, x):
        return super().forward(x), self.pack(x).chunk(3, dim=-1)


@pytest.mark.parametrize(
    ("layer", "expected"), [(Halved, "2 of 24 x 16"), (CutInThree, "3 of 16 x 16"), (CutBothWays, "48 x 16")]
)
def test_cuts_of_overridden_methods_do_not_count(layer, expected):
    entry = partition_parameters(Parts(layer=layer(), norm=nn.LayerNorm(16)))["layer.pack.weight"]
    assert layout_text(entry) == expected


def test_raw_input_projection_of_fairseq():
    class MultiheadAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj_weight = nn.Parameter(torch.zeros(48, 16))

    assert layout_of(MultiheadAttention(), "in_proj_weight") == "3 of 16 x 16"
