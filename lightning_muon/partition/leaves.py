"""The layers of a module in the order of computation, as far as registration and names tell it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_muon.partition.linear import linear_shape, linear_weights
from lightning_muon.partition.sites import Site

_CONVS = nn.modules.conv._ConvNd
_COMPOSITES = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_PAIRS = (
    (re.compile(r"(^|_)enc(oders?)?(_|\d*$)", re.IGNORECASE), re.compile(r"(^|_)dec(oders?)?(_|\d*$)", re.IGNORECASE)),
    (
        re.compile(r"(^|_)(net)?(g|gen|generators?)(_|\d*$)", re.IGNORECASE),
        re.compile(r"(^|_)(net)?(d|dis|disc|discriminators?|critics?)(_|\d*$)", re.IGNORECASE),
    ),
)
"""Names of parts of which the first feeds the second: encoder and decoder, generator and discriminator."""


@dataclass(frozen=True, eq=False)
class Leaf:
    """A layer that maps fan-in to fan-out features.

    Args:
        sites: its weights; one, but for layers that keep several maps of the same sizes.
        fan_in: features, or channels, that it takes.
        fan_out: features, or channels, that it gives.
        kind: ``"linear"``, ``"conv"``, or ``"other"`` for layers that are never heads, such as a GRU.
    """

    sites: tuple[Site, ...]
    fan_in: int
    fan_out: int
    kind: str

    @property
    def site(self) -> Site:
        """Where the layer's first weight sits."""
        return self.sites[0]

    @property
    def path(self) -> tuple[str, ...]:
        """Names of the modules around the layer and of the layer, outermost first."""
        return self.site.path

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules around the layer and the layer, outermost first; one more than ``path``."""
        return (*self.site.parents, self.site.owner)

    @property
    def trainable(self) -> bool:
        """Whether any of its weights takes a gradient."""
        return any(site.parameter.requires_grad for site in self.sites)


def find_leaves(sites: Sequence[Site]) -> list[Leaf]:
    """The layers among the sites.

    In the order of registration, but an encoder beside a decoder comes first, and a generator before its discriminator.
    """
    by_owner: dict[int, list[Site]] = {}
    for site in sites:
        if not any(name.startswith("lora_") for name in site.path):
            by_owner.setdefault(id(site.owner), []).append(site)
    leaves = [leaf for owned in by_owner.values() if (leaf := _leaf(owned)) is not None]
    return sorted(leaves, key=_order)


def is_hugging_face(module: nn.Module) -> bool:
    """Whether a module is a model of Hugging Face's transformers."""
    return any(base.__name__ == "PreTrainedModel" for base in type(module).__mro__)


def inside_known(leaf: Leaf) -> bool:
    """Whether the leaf is part of a Hugging Face model or of a transformer layer of torch."""
    return any(is_hugging_face(part) or isinstance(part, _COMPOSITES) for part in leaf.modules)


def is_repeated(leaf: Leaf, depth: int | None = None) -> bool:
    """Whether the leaf lies inside one of several like modules in a container, e.g. the blocks of a transformer.

    A wrapper around a single layer, as graph convolutions are, is a block only among wrappers of the same sizes.

    Args:
        leaf: the leaf.
        depth: index into ``leaf.modules`` of the container; all containers if it is None.
    """
    if depth is None:
        return any(is_repeated(leaf, index) for index in range(len(leaf.path)))
    if depth >= len(leaf.path) - 1:
        return False
    container, block = leaf.modules[depth], leaf.modules[depth + 1]
    if not isinstance(container, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return False
    like = [other for other in container.children() if other is not block and type(other) is type(block)]
    own = _layer_shapes(block)
    return any(len(own) != 1 or _layer_shapes(other) == own for other in like)


def is_first_of_pair(name: str) -> bool:
    """Whether a part's name says that it reads data or feeds another part: an encoder or a generator."""
    return any(first.search(name) for first, _ in _PAIRS)


def paired_parts(leaves: Sequence[Leaf], pair: int) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Paths of parts that stand side by side as encoder and decoder (pair 0) or generator and discriminator (pair 1).

    Yields:
        The path, and whether the part is the second of the pair.
    """
    first, second = _PAIRS[pair]
    seen: set[tuple[str, ...]] = set()
    for leaf in leaves:
        for depth, name in enumerate(leaf.path):
            path = leaf.path[: depth + 1]
            if path in seen or not (first.search(name) or second.search(name)):
                continue
            seen.add(path)
            siblings = [other for other, child in leaf.modules[depth]._modules.items() if child is not None]
            if any(map(first.search, siblings)) and any(map(second.search, siblings)):
                yield path, second.search(name) is not None


def holder(leaf: Leaf) -> tuple[int, nn.Module]:
    """The module that holds the leaf beside others: (index into ``leaf.modules``, module).

    What wraps the leaf alone, such as ``Sequential(Linear, Softplus)``, is looked through.
    """
    depth = len(leaf.path) - 1
    while depth > 0 and _is_alone(leaf, depth):
        depth -= 1
    return max(depth, 0), leaf.modules[max(depth, 0)]


def _is_alone(leaf: Leaf, depth: int) -> bool:
    """Whether the leaf is the only layer in the module of this depth."""
    owners = {
        id(module) for module in leaf.modules[depth].modules() if linear_shape(module) or isinstance(module, _CONVS)
    }
    return owners == {id(leaf.site.owner)}


def _layer_shapes(module: nn.Module) -> set[tuple[int, int]]:
    shapes: set[tuple[int, int]] = set()
    for part in module.modules():
        shape = (part.in_channels, part.out_channels) if isinstance(part, _CONVS) else linear_shape(part)
        if shape is not None:
            shapes.add(shape)
    return shapes


def _leaf(sites: Sequence[Site]) -> Leaf | None:
    owner = sites[0].owner
    if isinstance(owner, _CONVS):
        weights = [site for site in sites if site.local == "weight" and site.part != "magnitude"]
        return Leaf(tuple(weights[:1]), owner.in_channels, owner.out_channels, "conv") if weights else None
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        directions = 2 if getattr(owner, "bidirectional", False) else 1
        width = getattr(owner, "proj_size", 0) or owner.hidden_size
        return Leaf(tuple(sites[:1]), owner.input_size, directions * width, "other")
    if isinstance(owner, nn.MultiheadAttention):
        return Leaf(tuple(sites[:1]), owner.embed_dim, owner.embed_dim, "other")
    if isinstance(owner, nn.Bilinear):
        return Leaf(tuple(sites[:1]), owner.in1_features, owner.out_features, "other")
    shape = linear_shape(owner)
    if shape is None:
        return None
    names = {"weight"} if isinstance(owner, nn.Linear) else set(linear_weights(owner))
    weights = [site for site in sites if site.local in names and site.part != "magnitude"]
    return Leaf(tuple(weights), *shape, "linear") if weights else None


def _order(leaf: Leaf) -> tuple[float, ...]:
    """Places of the modules around a leaf among their siblings, a decoder no earlier than its encoder."""
    places = []
    for parent, name in zip(leaf.site.parents, leaf.path, strict=True):
        siblings = list(parent._modules)
        place = float(siblings.index(name)) if name in siblings else 0.0
        if not isinstance(parent, nn.Sequential):
            for first, second in _PAIRS:
                firsts = [index for index, other in enumerate(siblings) if first.search(other)]
                if firsts and second.search(name):
                    place = max(place, firsts[-1] + 0.5)
        places.append(place)
    return tuple(places)
