"""Heads in the space of the data: the last layers of decoders and generators.

A layer is such a head by shape or by name. By shape: it ends a branch of the module, and its output is as wide as the
input of a layer that reads data. By name: it ends a decoder beside an encoder, a generator beside a discriminator, or
an actor beside a critic. Names decide where shapes cannot: a generator reads noise, and a conditional encoder reads
the data with covariates appended.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from lightning_muon.partition.branches import data_readers, is_fused, is_normed_or_embedded, parallel_ends
from lightning_muon.partition.leaves import Leaf, inside_known, is_first_of_pair, is_repeated, paired_parts
from lightning_muon.partition.sites import Site

_ROLES = (("encoder", "decoder"), ("generator or actor", "discriminator or critic"))
_ENCODER = re.compile(r"(^|_)enc(oders?)?(_|$)", re.IGNORECASE)
_MOST_FIELDS = 64
"""Most embeddings whose concatenation a width is taken for: the input of a tabular or click-through model."""

_MOST_STATES = 8
"""Most hidden states whose concatenation a width is taken for."""


def data_space_heads(leaves: Sequence[Leaf], sites: Sequence[Site], known: set[Leaf]) -> list[tuple[Leaf, str]]:
    """Return the layers that end in the space of the data, with a sentence for each.

    Args:
        leaves: all layers.
        sites: all sites.
        known: layers that are already known to be heads.
    """
    others = [leaf for leaf in leaves if leaf not in known]
    by_shape = _by_shape(others, sites)
    by_name = [(leaf, reason) for leaf, reason in _by_name(leaves, sites) if leaf not in known]
    return [*by_shape, *by_name, *_beside([leaf for leaf, _ in by_shape], others, sites)]


def _by_shape(leaves: Sequence[Leaf], sites: Sequence[Site]) -> list[tuple[Leaf, str]]:
    readers = data_readers(leaves)
    first: dict[int, Leaf] = {}
    for reader in readers:
        if not _may_read_hidden_states(reader, leaves):
            first.setdefault(reader.fan_in, reader)
    found: dict[Leaf, Leaf] = {}
    for leaf in leaves:
        if leaf.fan_out not in first or not _may_end(leaf):
            continue
        reader = first[leaf.fan_out]
        if leaves.index(reader) >= leaves.index(leaf):
            continue
        if (reader.kind == "conv") != (leaf.kind == "conv") or _is_inverted_bottleneck(reader, leaf, leaves):
            continue
        if (
            is_fused(leaf)
            or _is_read(leaf, leaves, readers)
            or _is_chained(leaf, leaves)
            or _is_hidden_width(leaf, reader, sites)
        ):
            continue
        found[leaf] = reader
    # A layer as wide whose output is read later: in the other of two towers, or in an earlier block of the same kind.
    hidden = [leaf for leaf in leaves if leaf not in found and leaf.fan_out in first and _may_end(leaf)]
    return [
        (
            leaf,
            f"Output head: ends a branch in the space of the data, as wide as the input of {'.'.join(reader.path)!r}.",
        )
        for leaf, reader in found.items()
        if not any((o.fan_out, o.kind) == (leaf.fan_out, leaf.kind) and _ends_a_part(o, leaves) for o in hidden)
    ]


def _by_name(leaves: Sequence[Leaf], sites: Sequence[Site]) -> list[tuple[Leaf, str]]:
    found: list[tuple[Leaf, str]] = []
    for pair, (first, second) in enumerate(_ROLES):
        for path, is_second in paired_parts(leaves, pair):
            part = [leaf for leaf in leaves if leaf.path[: len(path)] == path]
            if pair == 0 and not is_second:
                continue
            for leaf in _ends(part):
                if not _may_end(leaf, square=pair == 1) or is_fused(leaf):
                    continue
                if pair == 0 and (_is_taken(leaf, part, leaves) or _is_made_elsewhere(leaf, leaves, sites)):
                    continue
                role, beside = (second, first) if is_second else (first, second)
                name = ".".join(path)
                found.append((leaf, f"Output head: the last layer of {name!r}, a {role} beside {_an(beside)}."))
    return found


def _beside(heads: Sequence[Leaf], leaves: Sequence[Leaf], sites: Sequence[Site]) -> list[tuple[Leaf, str]]:
    """Return layers parallel to heads in data space, with other widths: further parameters of a likelihood."""
    found = {}
    for head in heads:
        for leaf in parallel_ends(head, leaves):
            taken = any(other.fan_in == leaf.fan_out for other in leaves[leaves.index(leaf) + 1 :])
            if leaf not in heads and not taken and not is_normed_or_embedded(leaf.fan_out, sites):
                found[leaf] = f"Output head: takes the same input as {'.'.join(head.path)!r}, which outputs data."
    return list(found.items())


def _may_end(leaf: Leaf, *, square: bool = False) -> bool:
    """Whether a layer can be a head. A square layer may not: it stays in its input's space, as residual layers do."""
    return leaf.kind != "other" and not inside_known(leaf) and (square or leaf.fan_in != leaf.fan_out)


def _is_read(leaf: Leaf, leaves: Sequence[Leaf], readers: Sequence[Leaf]) -> bool:
    """Whether a later layer takes a layer's output; a later encoder or discriminator reads its own data instead."""
    for other in leaves[leaves.index(leaf) + 1 :]:
        if other.fan_in != leaf.fan_out or other in readers:
            continue
        depth = next((i for i, (a, b) in enumerate(zip(leaf.path, other.path, strict=False)) if a != b), None)
        if depth is None or not _reads_data_by_name(other, depth):
            return True
    return False


def _reads_data_by_name(leaf: Leaf, depth: int) -> bool:
    names = leaf.path[depth:]
    return any(
        is_first_of_pair(name)
        or (_ENCODER.search(name) and "dec" not in name.lower())
        or "discr" in name.lower()
        or "critic" in name.lower()
        for name in names
    )


def _is_chained(leaf: Leaf, leaves: Sequence[Leaf]) -> bool:
    """Whether the leaf is in one of several blocks of one type, and its output is as wide as a block's input."""
    for depth in range(len(leaf.site.parents)):
        if is_repeated(leaf, depth):
            container, block = leaf.modules[depth], leaf.modules[depth + 1]
            like = [other for other in container.children() if type(other) is type(block)]
            if any(other.fan_in == leaf.fan_out for other in leaves if not set(like).isdisjoint(other.modules)):
                return True
    return False


def _may_read_hidden_states(reader: Leaf, leaves: Sequence[Leaf]) -> bool:
    """Whether a first layer may read concatenated hidden states of one width, or a flattened feature map."""
    if reader.kind == "conv":
        return False
    for leaf in leaves[: leaves.index(reader)]:
        most = reader.fan_in if leaf.kind == "conv" else _MOST_STATES
        if leaf.fan_out > 1 and reader.fan_in % leaf.fan_out == 0 and reader.fan_in // leaf.fan_out <= most:
            return True
    return False


def _is_inverted_bottleneck(reader: Leaf, leaf: Leaf, leaves: Sequence[Leaf]) -> bool:
    """Whether the two are the up- and down-projection of one feed-forward block, which may work on any axis."""
    follows = leaves.index(leaf) == leaves.index(reader) + 1
    return follows and reader.fan_out == leaf.fan_in and reader.fan_out >= leaf.fan_out


def _is_hidden_width(leaf: Leaf, reader: Leaf, sites: Sequence[Site]) -> bool:
    """Whether an embedding, a concatenation of embeddings, or a norm not of the input has the leaf's width."""
    width = leaf.fan_out
    start = next(index for index, site in enumerate(sites) if site.owner is reader.site.owner)
    inner = [site for site in sites[start:] if not isinstance(site.owner, (nn.Embedding, nn.BatchNorm1d))]
    if is_normed_or_embedded(width, inner):
        return True
    dims = [site.owner.embedding_dim for site in sites if isinstance(site.owner, nn.Embedding)]
    return any(width % dim == 0 and width // dim <= _MOST_FIELDS for dim in dims if dim > 1) or sum(dims) == width


def _ends(part: Sequence[Leaf]) -> list[Leaf]:
    """Return the last layer of a part, and others with the same input whose output no layer of the part takes."""
    last = part[-1]
    taken = {leaf.fan_in for leaf in part}
    others = (leaf for leaf in part[:-1] if (leaf.kind, leaf.fan_in) == (last.kind, last.fan_in))
    return [last, *(leaf for leaf in others if leaf.fan_out not in taken)]


def _is_taken(leaf: Leaf, part: Sequence[Leaf], leaves: Sequence[Leaf]) -> bool:
    """Whether a layer outside a part takes the leaf's output: alone, concatenated or reshaped.

    A layer whose input is as wide as no layer's output may take it; an encoder or discriminator reads its own data.
    """
    given = {other.fan_out for other in leaves}
    for other in leaves[leaves.index(part[-1]) + 1 :]:
        unexplained = other.fan_in not in given and not _reads_data_by_name(other, 0)
        if other.fan_in == leaf.fan_out or unexplained:
            return True
    return False


def _is_made_elsewhere(leaf: Leaf, leaves: Sequence[Leaf], sites: Sequence[Site]) -> bool:
    """Whether the leaf has the width of a hidden state: of a norm, an embedding, or a layer's input elsewhere."""
    readers = data_readers(leaves)
    inner = any(other.fan_in == leaf.fan_out and other not in readers for other in leaves)
    return inner or is_normed_or_embedded(leaf.fan_out, sites)


def _ends_a_part(leaf: Leaf, leaves: Iterable[Leaf]) -> bool:
    """Whether the leaf is the last layer of the module around it."""
    part = [other for other in leaves if other.path[:-1] == leaf.path[:-1]]
    return part[-1] is leaf


def _an(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
