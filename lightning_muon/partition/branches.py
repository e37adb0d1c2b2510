"""How the layers of a module are connected, judged by widths: which end a branch, read data, or are parallel."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from lightning_muon.partition.fused import Blocks, fused_blocks
from lightning_muon.partition.leaves import Leaf, holder
from lightning_muon.partition.sites import Site

_SKIP = re.compile(r"(^|_)(skip|short_?cut|residual|bypass)(_|$)", re.IGNORECASE)


def data_readers(leaves: Sequence[Leaf]) -> list[Leaf]:
    """Return the layers that read data: no layer before them has an output as wide as their input."""
    readers, given = [], set()
    for leaf in leaves:
        if leaf.fan_in not in given and not _follows_in_sequential(leaf, leaves):
            readers.append(leaf)
        given.add(leaf.fan_out)
    return readers


def ends_in_hidden_width(last: Leaf, leaves: Sequence[Leaf], sites: Sequence[Site]) -> bool:
    """Whether a layer's output is as wide as an embedding, a norm or another layer's input, or holds fused maps."""
    if is_normed_or_embedded(last.fan_out, sites):
        return True
    readers = [leaf for leaf in data_readers(leaves) if not _may_read_feature_map(leaf, leaves)]
    if any(leaf.fan_in == last.fan_out and leaf not in readers for leaf in leaves):
        return True
    return is_fused(last)


def _may_read_feature_map(reader: Leaf, leaves: Sequence[Leaf]) -> bool:
    """Whether a Linear may read a flattened feature map with the channels of a convolution before it."""
    if reader.kind == "conv":
        return False
    channels = {leaf.fan_out for leaf in leaves[: leaves.index(reader)] if leaf.kind == "conv"}
    return any(count > 1 and reader.fan_in % count == 0 for count in channels)


def is_fused(leaf: Leaf) -> bool:
    """Whether a layer fuses or may fuse several maps: q, k and v, or a value and its gate."""
    blocks = fused_blocks(leaf.site, leaf.fan_out, leaf.fan_in)
    return blocks != Blocks() and blocks.inner


def is_normed_or_embedded(width: int, sites: Sequence[Site]) -> bool:
    """Whether an embedding or a norm has this width."""
    for site in sites:
        owner, shape = site.owner, site.parameter.shape
        if isinstance(owner, nn.Embedding) and owner.embedding_dim == width:
            return True
        if "norm" in type(owner).__name__.lower() and site.local == "weight" and shape[-1:] == (width,):
            return True
    return False


def ends_branch(last: Leaf, leaves: Sequence[Leaf]) -> bool:
    """Whether another branch ends in the same width: two towers that meet in a dot product.

    Branches that begin with the same hidden state are not towers, but heads of several tasks.
    """
    for leaf in leaves:
        if leaf is last or (leaf.fan_out, leaf.kind) != (last.fan_out, last.kind):
            continue
        depth = _fork(leaf, last)
        if leaf.modules[depth] is leaf.site.parent is last.site.parent or _is_around(leaf, last, depth):
            continue
        branch = _within(leaves, leaf.path[: depth + 1])
        if branch[-1] is leaf and not _are_parallel(branch, _within(leaves, last.path[: depth + 1]), leaves):
            return True
    return False


def _is_around(leaf: Leaf, last: Leaf, depth: int) -> bool:
    """Whether one of two branches is a skip connection around the other: outputs are added, so these are no towers."""
    return any(len(path) == depth + 1 and _SKIP.search(path[depth]) for path in (leaf.path, last.path))


def parallel_ends(last: Leaf, leaves: Sequence[Leaf]) -> list[Leaf]:
    """Return layers that end branches beside that of ``last`` and take the same input: heads of other tasks.

    The branches are either single layers, perhaps with an activation, or branches of several layers whose first layers
    read the same width, which is the output width of an earlier layer. They are registered next to each other.
    """
    depth, parent = holder(last)
    if isinstance(parent, nn.Sequential):
        return _parallel_branches(last, depth, leaves)
    found: list[Leaf] = []
    place = leaves.index(last)
    for others in (reversed(leaves[:place]), leaves[place + 1 :]):
        for leaf in others:
            same = holder(leaf)[1] is parent and leaf.fan_in == last.fan_in and leaf.kind == last.kind
            if not same or leaf.fan_out == last.fan_in or is_read_within(leaf, leaves, parent):
                break
            found.append(leaf)
    return found or _parallel_branches(last, depth, leaves)


def _parallel_branches(last: Leaf, depth: int, leaves: Sequence[Leaf]) -> list[Leaf]:
    """Return the last layers of the branches beside that of ``last``, if all begin with the same hidden state."""
    while depth > 0 and isinstance(last.modules[depth], nn.Sequential):
        depth -= 1
    parent = last.modules[depth]
    if isinstance(parent, nn.Sequential):
        return []
    own = _within(leaves, last.path[: depth + 1])
    if own[-1] is not last or len(own) < 2:
        return []
    names = list(dict.fromkeys(leaf.path[depth] for leaf in leaves if _is_inside(leaf, parent, depth)))
    found: list[Leaf] = []
    for name in reversed(names[: names.index(last.path[depth])]):
        branch = _within(leaves, (*last.path[:depth], name))
        if not _are_parallel(branch, own, leaves) or branch[-1].kind != last.kind:
            break
        found.append(branch[-1])
    return found


def _are_parallel(branch: Sequence[Leaf], other: Sequence[Leaf], leaves: Sequence[Leaf]) -> bool:
    """Whether two branches begin with the same hidden state, the output of a layer before both."""
    first = min(leaves.index(branch[0]), leaves.index(other[0]))
    given = {leaf.fan_out for leaf in leaves[:first]}
    return branch[0].fan_in == other[0].fan_in and branch[0].fan_in in given


def _is_inside(leaf: Leaf, parent: nn.Module, depth: int) -> bool:
    return depth < len(leaf.path) and leaf.modules[depth] is parent


def is_read_within(leaf: Leaf, leaves: Sequence[Leaf], parent: nn.Module) -> bool:
    """Whether a later layer of ``parent`` has the width that a layer returns as its fan-in."""
    later = leaves[leaves.index(leaf) + 1 :]
    return any(parent in other.modules and other.fan_in == leaf.fan_out for other in later)


def _within(leaves: Sequence[Leaf], path: tuple[str, ...]) -> list[Leaf]:
    return [leaf for leaf in leaves if leaf.path[: len(path)] == path]


def _fork(leaf: Leaf, other: Leaf) -> int:
    """Index of the first name in which two paths differ."""
    return next((i for i, (a, b) in enumerate(zip(leaf.path, other.path, strict=False)) if a != b), 0)


def _follows_in_sequential(leaf: Leaf, leaves: Sequence[Leaf]) -> bool:
    """Whether another layer comes before this one in an ``nn.Sequential`` around it."""
    for depth, module in enumerate(leaf.site.parents):
        if isinstance(module, nn.Sequential) and _within(leaves, leaf.path[:depth])[0] is not leaf:
            first = _within(leaves, leaf.path[:depth])[0]
            if first.path[depth] != leaf.path[depth]:
                return True
    return False
