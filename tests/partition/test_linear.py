"""Linear layers that are not torch's: which way they store their weights, by class, sizes or code."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_muon.partition import partition_parameters
from tests.partition.expectations import layout_text
from tests.partition.modules import Parts


def read(module: nn.Module) -> dict[str, str]:
    """Layout of each hidden matrix and role of everything else but vectors, by name."""
    entries = (entry for entry in partition_parameters(module) if entry.role != "vector")
    return {entry.name: layout_text(entry) if entry.role == "hidden" else entry.role for entry in entries}


class Raw(nn.Module):
    """Raw parameters of these shapes, and attributes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], **attributes: object) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))
        for name, value in attributes.items():
            setattr(self, name, value)


class GraphLinear(Raw):
    """As in torch_geometric: (fan-out, fan-in) under other names of the sizes."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__({"weight": (fan_out, fan_in), "bias": (fan_out,)}, in_channels=fan_in, out_channels=fan_out)

    def forward(this, x):
        return F.linear(x, this.weight, this.bias)


class GraphConvolution(Raw):
    """As in Kipf's GCN and DGL: (fan-in, fan-out)."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__({"weight": (fan_in, fan_out)}, in_features=fan_in, out_features=fan_out)

    def forward(self, x, adjacency):
        support = torch.mm(x, self.weight)
        return torch.spmm(adjacency, support)


class Dense(Raw):
    """As in Keras: a kernel, and no sizes at all."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__({"kernel": (fan_in, fan_out), "bias": (fan_out,)})

    def call(self, x):
        return torch.matmul(x, self.kernel) + self.bias


class Flipped(Raw):
    """Transposed on the way, under a local name."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__({"W": (fan_out, fan_in)})

    def forward(self, x):
        w = self.W.to(x.dtype)
        return x @ w.t()


class Contraction(Raw):
    """An einsum over the second dimension."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__({"w": (fan_out, fan_in)})

    def forward(self, x):
        return torch.einsum("bti,oi->bto", x, self.w)


@pytest.mark.parametrize(
    ("layer", "name", "transposed"),
    [
        (GraphLinear, "weight", False),
        (GraphConvolution, "weight", True),
        (Dense, "kernel", True),
        (Flipped, "W", False),
        (Contraction, "w", False),
    ],
)
def test_linear_layers_by_sizes_or_code(layer, name, transposed):
    """Square ones too: their shape does not tell, their code does. The last one is a head like any last layer."""
    sizes = [16, 64, 64, 5]
    module = nn.Sequential(
        *itertools.chain.from_iterable((layer(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes))
    )
    flag = "T " if transposed else ""
    assert read(module) == {f"0.{name}": f"{flag}64 x 16", f"2.{name}": f"{flag}64 x 64", f"4.{name}": "head"}
    reason = partition_parameters(module)[f"2.{name}"].reason
    assert f"{__name__}.{layer.__name__}" in reason
    assert ("stored transposed" in reason) == transposed


class Right(Raw):
    """(fan-in, fan-out), and what subclasses make of it."""

    def __init__(self) -> None:
        super().__init__({"weight": (16, 16)})

    def forward(self, x):
        return x @ self.weight


class Overridden(Right):
    def forward(self, x):
        return torch.einsum("bi,oi->bo", x, self.weight)


class OverriddenTwice(Overridden):
    def forward(self, x):
        return super().forward(x) + 1


class OverriddenBack(Overridden):
    def forward(self, x):
        return Right.forward(self, x)


class Extended(Right):
    def forward(self, x):
        return super().forward(x).relu()


class ExtendedByName(Right):
    def forward(self, x):
        return Right.forward(self, x).relu()


class CalledElsewhere(Right):
    def forward(self, x):
        return self.mapped(x)

    def mapped(self, x):
        return [super(CalledElsewhere, self).forward(part) for part in x]


class Both(Right):
    """Applied both ways: by its own code and by that of its base."""

    def forward(self, x):
        return F.linear(super().forward(x), self.weight)


class AppliedFromTheLeft:
    def forward(self, x):
        return F.linear(x, self.weight)


class MixedIn(AppliedFromTheLeft, Right):
    pass


class Passing:
    def forward(self, x):
        return super().forward(x)


class PassedOn(Passing, Right):
    pass


class ExtendedElsewhere(Right):
    """What it calls of its base is another method: the base's forward is dead."""

    def extra_repr(self):
        return super().extra_repr()

    def forward(self, x):
        return F.linear(x, self.weight)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Right, "T 16 x 16"),
        (Overridden, "16 x 16"),
        (OverriddenTwice, "16 x 16"),
        (OverriddenBack, "T 16 x 16"),
        (Extended, "T 16 x 16"),
        (ExtendedByName, "T 16 x 16"),
        (CalledElsewhere, "T 16 x 16"),
        (Both, "other"),
        (MixedIn, "16 x 16"),
        (PassedOn, "T 16 x 16"),
        (ExtendedElsewhere, "16 x 16"),
    ],
)
def test_overridden_methods_say_nothing(layer, expected):
    assert read(Parts(layer=layer(), norm=nn.LayerNorm(16))) == {"layer.weight": expected}


class Relational(Raw):
    """A map for each relation, as in RGCN: (relations, fan-in, fan-out)."""

    def __init__(self, count: int, fan_in: int, fan_out: int) -> None:
        shapes = {"weight": (count, fan_in, fan_out), "root": (fan_in, fan_out), "comp": (9, count)}
        super().__init__(shapes, num_relations=count)

    def forward(self, x, relations):
        out = x @ self.root
        for relation in relations:
            out = out + x @ self.weight[relation]
        return out


class Bases(Raw):
    """Relations mixed of bases: only the sizes tell."""

    def __init__(self, count: int, fan_in: int, fan_out: int) -> None:
        shapes = {"basis": (count, fan_in, fan_out)}
        super().__init__(shapes, num_bases=count, in_channels=fan_in, out_channels=fan_out)


class Selected(Raw):
    """A map for each type, picked by index and applied by einsum."""

    def __init__(self, count: int, fan_in: int, fan_out: int) -> None:
        super().__init__({"weight": (count, fan_in, fan_out)})

    def forward(self, x, types):
        w = self.weight[types]
        return torch.einsum("btd,btde->bte", x, w)


class Ensemble(Raw):
    """A map and a bias for each member, applied to all members at once: as in TabM of deeptab."""

    def __init__(self, count: int, fan_in: int, fan_out: int) -> None:
        super().__init__({"weight": (count, fan_in, fan_out), "bias": (count, fan_out)})

    def forward(self, x):
        return (x.transpose(0, 1) @ self.weight).transpose(0, 1) + self.bias


class Unexplained(Raw):
    """No bias says that the first dimension counts maps."""

    def __init__(self) -> None:
        super().__init__({"weight": (5, 16, 32)})

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Ensemble(5, 16, 32), {"weight": "T 5 of 32 x 16"}),
        (Ensemble(5, 16, 16), {"weight": "T 5 of 16 x 16"}),
        (Unexplained(), {"weight": "other"}),
        (Relational(3, 16, 32), {"weight": "T 3 of 32 x 16", "root": "T 32 x 16", "comp": "other"}),
        (Relational(3, 16, 16), {"weight": "T 3 of 16 x 16", "root": "T 16 x 16", "comp": "other"}),
        (Bases(4, 16, 32), {"basis": "T 4 of 32 x 16"}),
        (Bases(4, 16, 16), {"basis": "other"}),
        (Selected(5, 16, 16), {"weight": "T 5 of 16 x 16"}),
    ],
)
def test_stacked_maps(layer, expected):
    module = Parts(layer=layer, norms=nn.ModuleList([nn.LayerNorm(16), nn.LayerNorm(32)]))
    assert read(module) == {f"layer.{name}": text for name, text in expected.items()}


class Attention(Raw):
    """Rows that inputs are compared with are no layers, unless they are applied as one."""

    def __init__(self) -> None:
        shapes = ("keys", "memory", "prototypes", "rows", "trend_basis", "query", "mixing", "mask")
        super().__init__(dict.fromkeys(shapes, (16, 16)))

    def forward(self, x):
        scores = x @ self.keys.T + F.linear(x, self.memory) + torch.matmul(x, self.prototypes.t())
        q = x @ self.query
        product = self.keys @ self.mixing
        product = product + F.linear(F.one_hot(x.long()).float(), self.rows) + x @ self.trend_basis
        return scores * self.mask + q @ product.T


def test_raw_parameters_by_their_use():
    others = dict.fromkeys(("keys", "memory", "prototypes", "rows", "trend_basis", "mixing", "mask"), "other")
    assert read(Attention()) == others | {"query": "T 16 x 16"}


class Tied(Raw):
    def __init__(self) -> None:
        super().__init__({"weight": (8, 16)})

    def forward(self, x):
        return F.linear(F.linear(x, self.weight), self.weight.t())


def test_a_weight_that_is_applied_both_ways_is_not_known():
    assert read(Tied()) == {"weight": "other"}


def test_sizes_that_are_no_numbers():
    """HGTConv names a dictionary of sizes, others a tuple."""
    layer = GraphLinear(16, 32)
    layer.in_channels = {"author": 16}
    assert read(Parts(block=Parts(qkv=nn.Linear(16, 40), layer=layer), norm=nn.LayerNorm(32))) == {
        "block.qkv.weight": "40 x 16",
        "block.layer.weight": "32 x 16",
    }


def test_square_weights_whose_direction_nothing_tells():
    module = Raw({"weight": (16, 16)}, in_channels=16, out_channels=16)
    assert read(module) == {"weight": "other"}
    assert "Not known to be a matrix" in partition_parameters(module)["weight"].reason


def test_layers_without_a_source():
    """Typed at a prompt or piped in, a class has no source; the kind of its products still tells."""
    names: dict[str, type[nn.Module]] = {}
    for name, product in (
        ("Left", "F.linear(x, self.w)"),
        ("Right", "x @ self.w"),
        ("Both", "F.linear(x @ self.w, self.w)"),
    ):
        code = f"class {name}(Raw):\n    def forward(self, x):\n        return {product}\n"
        exec(compile(code, "<stdin>", "exec"), {"Raw": Raw, "F": F, "__name__": "__main__"}, names)
    assert read(names["Left"]({"w": (8, 16)})) == {"w": "8 x 16"}
    assert read(names["Right"]({"w": (8, 16)})) == {"w": "T 16 x 8"}
    assert read(names["Both"]({"w": (16, 16)})) == {"w": "other"}


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        square = [nn.Parameter(torch.zeros(16, 16)) for _ in range(2)]
        self.weights = nn.ParameterList(square)
        self.kernels = nn.ParameterList(nn.Parameter(torch.zeros(8, 16)) for _ in range(2))
        self.factors = nn.ParameterList(nn.Parameter(torch.zeros(8, 16)) for _ in range(2))
        self.item_tables = nn.ParameterList(nn.Parameter(torch.zeros(50, 16)) for _ in range(2))
        self.embeddings = nn.ParameterDict({"user": nn.Parameter(torch.zeros(9, 4))})
        self.fields = nn.ParameterDict({"user_emb": nn.Parameter(torch.zeros(9, 4))})
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(3, 16)) for _ in range(2))
        self.gains = nn.ParameterList(nn.Parameter(torch.zeros(16)) for _ in range(2))

    def forward(self, x):
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = F.linear(x, weight, bias)
        return x @ self.kernels[0]


def test_lists_of_parameters_go_by_the_name_of_the_list():
    """Tables by name; maps where the code of the module applies the elements; else other, with a reason."""
    partition = partition_parameters(Lists())
    assert read(Lists()) == {
        "weights.0": "16 x 16",
        "weights.1": "16 x 16",
        "kernels.0": "T 16 x 8",
        "kernels.1": "T 16 x 8",
        "factors.0": "other",
        "factors.1": "other",
        "item_tables.0": "embedding",
        "item_tables.1": "embedding",
        "embeddings.user": "embedding",
        "fields.user_emb": "embedding",
    }
    assert f"weights[0] of {__name__}.Lists, which its code applies" in partition["weights.0"].reason
    assert f"factors[1] of {__name__}.Lists" in partition["factors.1"].reason


def test_layers_of_torch_geometric():
    """By class: what was read in its sources. Their names and modules, without the package."""

    def layer(path: str, shapes: dict[str, tuple[int, ...]]) -> nn.Module:
        module, _, name = path.rpartition(".")
        return type(name, (Raw,), {"__module__": module})(shapes)

    module = Parts(
        linear=layer("torch_geometric.nn.dense.linear.Linear", {"weight": (16, 16)}),
        hetero=layer("torch_geometric.nn.dense.linear.HeteroLinear", {"weight": (3, 16, 16)}),
        rgcn=layer(
            "torch_geometric.nn.conv.rgcn_conv.RGCNConv", {"weight": (3, 16, 16), "root": (16, 16), "comp": (5, 3)}
        ),
        blocks=layer("torch_geometric.nn.conv.rgcn_conv.RGCNConv", {"weight": (3, 4, 8, 8)}),
        links=layer("torch_geometric.nn.models.linkx.SparseLinear", {"weight": (90, 16)}),
        dgl=layer("dgl.nn.pytorch.conv.graphconv.GraphConv", {"weight": (8, 16)}),
        norm=nn.LayerNorm(16),
    )
    assert read(module) == {
        "linear.weight": "16 x 16",
        "hetero.weight": "T 3 of 16 x 16",
        "rgcn.weight": "T 3 of 16 x 16",
        "rgcn.root": "T 16 x 16",
        "rgcn.comp": "other",
        "blocks.weight": "T 12 of 8 x 8",
        "links.weight": "other",
        "dgl.weight": "T 16 x 8",
    }
    assert "torch_geometric.nn.dense.linear.Linear" in partition_parameters(module)["linear.weight"].reason


def test_the_head_of_an_ensemble_is_its_last_map():
    module = Parts(body=nn.Linear(16, 32), final_layer=Ensemble(5, 32, 3))
    assert read(module) == {"body.weight": "32 x 16", "final_layer.weight": "head"}


def test_graph_networks_have_a_head():
    """The last convolution of a list of them gives the classes: a wrapper around one layer is no repeated block."""

    class Convolution(nn.Module):
        def __init__(self, fan_in: int, fan_out: int) -> None:
            super().__init__()
            self.lin_l, self.lin_r = GraphLinear(fan_in, fan_out), GraphLinear(fan_in, fan_out)

    sizes = [16, 64, 64, 7]
    module = Parts(convs=nn.ModuleList(Convolution(a, b) for a, b in itertools.pairwise(sizes)))
    assert read(module) == {
        **{f"convs.0.lin_{side}.weight": "64 x 16" for side in "lr"},
        **{f"convs.1.lin_{side}.weight": "64 x 64" for side in "lr"},
        **{f"convs.2.lin_{side}.weight": "head" for side in "lr"},
    }
