"""Which tensors of a module are linear maps, and whether they are stored (fan-out, fan-in) or transposed.

Evidence, from most to least certain:

1. The class: ``nn.Linear``, Hugging Face ``Conv1D``, and listed layers of other libraries.
2. Sizes: the module names its fan-in and fan-out (``in_channels`` and ``out_channels``, ...), and only one order fits.
3. The module's code: ``F.linear(x, self.weight)`` or ``x @ self.weight``. See :mod:`~lightning_muon.partition.code`.
4. ``in_features`` and ``out_features``, the names of ``nn.Linear``, with the convention of ``nn.Linear``.

Without any of these a tensor is not treated as a map, even if it is square and only its orientation is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from lightning_muon.partition.code import ONLY_MAP, applied_maps

_SIZES = (
    ("in_features", "out_features"),
    ("in_channels", "out_channels"),
    ("in_feats", "out_feats"),
    ("_in_feats", "_out_feats"),
    ("_in_src_feats", "_out_feats"),
    ("in_dim", "out_dim"),
    ("dim_in", "dim_out"),
    ("d_in", "d_out"),
    ("in_size", "out_size"),
    ("input_dim", "output_dim"),
    ("input_size", "output_size"),
    ("input_features", "output_features"),
    ("input_dim", "units"),
    ("n_in", "n_out"),
)
# Attributes that count the maps of a stack: relations, types of nodes or edges, bases.
_COUNTS = (
    "num_relations",
    "num_rels",
    "num_types",
    "num_node_types",
    "num_edge_types",
    "num_bases",
    "n_relations",
    "n_types",
    "num_heads",
    "num_groups",
    "groups",
    "n_groups",
    "num_experts",
    "n_experts",
    "num_domains",
    "num_fields",
)
# From the code of torch_geometric 2.8 and dgl 2.1: all compute x @ weight, and store (fan-in, fan-out).
_TRANSPOSED = {
    "torch_geometric": {
        ("HeteroLinear", "weight"),
        ("RGCNConv", "weight"),
        ("RGCNConv", "root"),
        ("CuGraphRGCNConv", "weight"),
        ("RGATConv", "weight"),
        ("RGATConv", "basis"),
        ("Linear", "weight"),  # torch_geometric.nn.conv.dna_conv.Linear; dense.linear.Linear has another rank
    },
    "dgl": {
        ("GraphConv", "weight"),
        ("TypedLinear", "W"),
        ("RelGraphConv", "loop_weight"),
        ("RelGraphConv", "weight"),
    },
}


# One row per node of the graph: a table.
_TABLES = {"torch_geometric": {("SparseLinear", "weight")}}
_LAYERS_OF_TORCH = (
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
)


class StoredMap(NamedTuple):
    """How a module stores a linear map, or a stack of them.

    Args:
        batch_dims: leading dimensions that count maps.
        transposed: whether each map is stored (fan-in, fan-out).
    """

    batch_dims: int
    transposed: bool


def stored_map(owner: nn.Module, local: str, shape: Sequence[int]) -> StoredMap | None:
    """Return how a module stores the map ``local``; None if it is not known to be a linear map."""
    if len(shape) < 2:
        return None
    if isinstance(owner, nn.Linear):
        return StoredMap(0, False) if local == "weight" and len(shape) == 2 else None
    if is_hf_conv1d(owner):
        return StoredMap(0, True) if local == "weight" and len(shape) == 2 else None
    if isinstance(owner, _LAYERS_OF_TORCH) or type(owner).__module__.startswith("torch."):
        return None
    if _listed(_TABLES, owner, local) is not None:
        return None
    return _of_known_class(owner, local, shape) or _by_sizes_or_code(owner, local, shape)


def linear_weights(module: nn.Module) -> list[str]:
    """Return the names of the maps of a linear layer, which all have the same sizes; empty for other modules."""
    if any(True for child in module.children() for _ in child.parameters()):
        return []
    names, fans = [], set()
    for name, tensor in _tensors(module):
        fan = _fans(module, name, tensor.shape)
        if fan is not None:
            names.append(name)
            fans.add(fan)
    return names if len(fans) == 1 else []


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (fan-in, fan-out) of a linear layer, e.g. ``nn.Linear`` or Hugging Face ``Conv1D``; None for others."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    names = linear_weights(module)
    return _fans(module, names[0], dict(_tensors(module))[names[0]].shape) if names else None


def is_hf_conv1d(module: nn.Module) -> bool:
    """Whether a module is Hugging Face's ``Conv1D``, a linear layer with a transposed weight."""
    return any(base.__name__ == "Conv1D" for base in type(module).__mro__) and hasattr(module, "nf")


def _tensors(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, tensor) for name, tensor in module._parameters.items() if tensor is not None]


def _fans(module: nn.Module, name: str, shape: Sequence[int]) -> tuple[int, int] | None:
    stored = stored_map(module, name, shape)
    if stored is None:
        return None
    rows, columns = shape[-2:]
    return (rows, columns) if stored.transposed else (columns, rows)


def _of_known_class(owner: nn.Module, local: str, shape: Sequence[int]) -> StoredMap | None:
    base = _listed(_TRANSPOSED, owner, local)
    if base is None:
        return None
    if base == "Linear" and len(shape) == 2:
        return StoredMap(0, False)
    return StoredMap(len(shape) - 2, True)


def _listed(listed: Mapping[str, set[tuple[str, str]]], owner: nn.Module, local: str) -> str | None:
    """Return the name of the owner's class or base that a list by package has with this tensor."""
    for base in type(owner).__mro__:
        if (base.__name__, local) in listed.get(base.__module__.partition(".")[0], ()):
            return base.__name__
    return None


def _by_sizes_or_code(owner: nn.Module, local: str, shape: Sequence[int]) -> StoredMap | None:
    maps = applied_maps(type(owner))
    applied = maps.get(local) or (maps.get(ONLY_MAP) if _is_only_map(owner, local) else None)
    directions = _directions(owner, shape)
    if len(shape) == 2:
        if len(directions) == 1 and (applied is not None or _is_only_map(owner, local)):
            return StoredMap(0, directions.pop())
        if applied is not None and not applied.indexed:
            return StoredMap(0, applied.transposed)
        if directions and _has_sizes_of_linear(owner, shape) and local == "weight":
            return StoredMap(0, False)
    if len(shape) == 3:
        counted = any(getattr(owner, name, None) == shape[0] for name in _COUNTS)
        if len(directions) == 1 and (counted or applied is not None):
            return StoredMap(1, directions.pop())
        if applied is not None and (applied.indexed or directions or _has_biases(owner, shape, applied.transposed)):
            return StoredMap(1, applied.transposed)
    return None


def _has_biases(owner: nn.Module, shape: Sequence[int], transposed: bool) -> bool:
    """Whether a stack of biases beside a tensor shows that its first dimension counts maps."""
    fan_out = shape[-1] if transposed else shape[-2]
    return any("bias" in name and tuple(tensor.shape) == (shape[0], fan_out) for name, tensor in _tensors(owner))


def _directions(owner: nn.Module, shape: Sequence[int]) -> set[bool]:
    """Return the values of ``transposed`` with which a map fits the sizes that its owner names."""
    fits: set[bool] = set()
    for fan_in, fan_out in _SIZES:
        sizes = getattr(owner, fan_in, None), getattr(owner, fan_out, None)
        if sizes == tuple(shape[-2:]):
            fits.add(True)
        if sizes == (shape[-1], shape[-2]):
            fits.add(False)
    return fits


def _has_sizes_of_linear(owner: nn.Module, shape: Sequence[int]) -> bool:
    return (getattr(owner, "in_features", None), getattr(owner, "out_features", None)) == (shape[1], shape[0])


def _is_only_map(owner: nn.Module, local: str) -> bool:
    """Whether its owner holds no other tensor except vectors, so that the owner's sizes are those of this tensor."""
    return all(name == local or sum(size > 1 for size in tensor.shape) < 2 for name, tensor in _tensors(owner))
