"""The layers of a module in the order of computation, as far as registration and names show it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_muon.partition.linear import linear_shape, linear_weights
from lightning_muon.partition.sites import Site

_CONVS = nn.modules.conv._ConvNd
_COMPOSITES = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_SUFFIX = r"(_?[A-Za-z]?\d*|_[A-Za-z0-9]{1,3})$"
_PAIRS = (
    (
        re.compile(rf"(^|_)enc(oders?)?{_SUFFIX}", re.IGNORECASE),
        re.compile(rf"(^|_)dec(oders?)?{_SUFFIX}", re.IGNORECASE),
    ),
    (
        re.compile(rf"(^|_)(net_?)?(g|gen|generators?|actors?|policy|pi){_SUFFIX}", re.IGNORECASE),
        re.compile(rf"(^|_)(net_?)?(d|dis|disc|discriminators?|critics?){_SUFFIX}", re.IGNORECASE),
    ),
)
"""Names of pairs of parts whose first feeds the second: encoder and decoder; generator and discriminator or critic."""


@dataclass(frozen=True, eq=False)
class Leaf:
    """A layer that maps fan-in to fan-out features.

    Args:
        sites: its weights; more than one only for layers with several maps of the same sizes.
        fan_in: number of input features or channels.
        fan_out: number of output features or channels.
        kind: ``"linear"``, ``"conv"``, or ``"other"`` for layers that are never heads, such as a GRU.
    """

    sites: tuple[Site, ...]
    fan_in: int
    fan_out: int
    kind: str

    @property
    def site(self) -> Site:
        """The site of the layer's first weight."""
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
    """Return the layers among the sites.

    They are in the order of registration, but an encoder comes before the decoder beside it that takes its output, and
    a generator before its discriminator.
    """
    by_owner: dict[int, list[Site]] = {}
    for site in sites:
        if not any(name.startswith("lora_") for name in site.path):
            by_owner.setdefault(id(site.owner), []).append(site)
    leaves = [leaf for owned in by_owner.values() if (leaf := _leaf(owned)) is not None]
    for pair in range(len(_PAIRS)):
        leaves = _first_before_second(leaves, pair)
    return leaves


def is_hugging_face(module: nn.Module) -> bool:
    """Whether a module is a model of Hugging Face's transformers."""
    return any(base.__name__ == "PreTrainedModel" for base in type(module).__mro__)


def inside_known(leaf: Leaf) -> bool:
    """Whether the leaf is part of a Hugging Face model or of a transformer layer of torch."""
    return any(is_hugging_face(part) or isinstance(part, _COMPOSITES) for part in leaf.modules)


def is_repeated(leaf: Leaf, depth: int | None = None) -> bool:
    """Whether the leaf is inside one of several similar modules in a container, e.g. the blocks of a transformer.

    Similar modules have one type and end in the same width. So the last of several graph convolutions, which gives
    classes, is not similar to those before it.

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
    return bool(like) and any(_last_width(other) == _last_width(block) for other in like)


def is_first_of_pair(name: str) -> bool:
    """Whether a part's name is that of an encoder or a generator, which reads data or feeds another part."""
    return any(first.search(name) for first, _ in _PAIRS)


def paired_parts(leaves: Sequence[Leaf], pair: int) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Find parts that are side by side as encoder and decoder (pair 0) or generator and discriminator (pair 1).

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
    """Return the module that holds the leaf beside other layers, as (index into ``leaf.modules``, module).

    Modules around the leaf alone, such as ``Sequential(Linear, Softplus)``, are skipped.
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


def _last_width(module: nn.Module) -> int | None:
    """Fan-out of the last layer of a module, if it has one."""
    for part in reversed(list(module.modules())):
        if isinstance(part, _CONVS):
            return part.out_channels
        if shape := linear_shape(part):
            return shape[1]
    return None


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


def _first_before_second(leaves: list[Leaf], pair: int) -> list[Leaf]:
    """Move the leaves of a second part behind a first part that feeds it and is registered later."""
    parts = list(paired_parts(leaves, pair))
    for path in [path for path, is_second in parts if is_second]:
        second = [leaf for leaf in leaves if leaf.path[: len(path)] == path]
        for other in [other for other, is_second in parts if not is_second and other[:-1] == path[:-1]]:
            first = [leaf for leaf in leaves if leaf.path[: len(other)] == other]
            feeds = any(leaf.fan_out == second[0].fan_in for leaf in first)
            if feeds and leaves.index(second[0]) < leaves.index(first[0]):
                rest = [leaf for leaf in leaves if leaf not in second]
                place = rest.index(first[-1]) + 1
                leaves = [*rest[:place], *second, *rest[place:]]
    return leaves
