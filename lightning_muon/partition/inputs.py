"""Finds input stems: layers that read raw pixels, samples or spectra, not hidden states."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from lightning_muon.partition.linear import linear_shape
from lightning_muon.partition.sites import Site

_PATCHES = re.compile(r"patch(es)?_(to_)?(embed|proj)", re.IGNORECASE)
_RAW_CHANNELS = (1, 3, 4)
_CHANNEL_COUNTS = ("num_channels", "num_mel_bins", "in_channels", "in_chans", "input_channels")
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def find_input_stems(sites: Sequence[Site]) -> dict[int, str]:
    """Find the input stems of a module.

    A convolution is a stem if it is the first layer of the model. It is also one if no layer before it outputs its
    number of input channels, and that number is 1, 3 or 4 (samples, pixels) or the channel count in a config around
    it. A convolution over one channel beside an embedding is not a stem: convolutional recommenders treat embedded
    items as an image. A Linear is a stem only as the first layer of a patch embedding; the first Linear of an MLP stays
    a hidden matrix.

    Returns:
        A sentence for each stem, by ``id`` of its weight.
    """
    stems: dict[int, str] = {}
    widths: set[int] = set()
    first, patch_embeddings = True, set()
    for site in sites:
        owner = site.owner
        if site.local != "weight" or site.part == "magnitude":
            continue
        if isinstance(owner, nn.modules.conv._ConvTransposeNd):
            widths.add(owner.out_channels)
        elif isinstance(owner, _CONVS):
            if owner.groups == 1 and (reason := _conv_reason(site, owner.in_channels, widths, first)):
                stems[id(site.parameter)] = reason
            widths.add(owner.out_channels)
        elif shape := linear_shape(owner):
            patches = _patch_embedding(site)
            if patches is not None and id(patches) not in patch_embeddings and shape[0] not in widths:
                patch_embeddings.add(id(patches))
                stems[id(site.parameter)] = "Input stem: the first layer of a patch embedding."
            widths.add(shape[1])
        elif isinstance(owner, nn.Embedding):
            widths.add(owner.embedding_dim)
        first = False
    return stems


def _patch_embedding(site: Site) -> nn.Module | None:
    """Return the patch embedding around a layer, found by its class or by the name of an ``nn.Sequential``."""
    for name, part in zip((*site.path, ""), (*site.parents, site.owner), strict=True):
        inner = part._modules.get(name) if name else None
        if "PatchEmbed" in type(part).__name__:
            return part
        if isinstance(inner, nn.Sequential) and _PATCHES.search(name):
            return inner
    return None


def _conv_reason(site: Site, channels: int, widths: set[int], first: bool) -> str:
    if first:
        return "Input stem: the first layer of the model, a convolution."
    if channels in widths:
        return ""
    for module in reversed(site.parents):
        config = getattr(module, "config", None)
        for name in _CHANNEL_COUNTS:
            if getattr(config, name, None) == channels:
                return f"Input stem: a convolution over the {name} = {channels} channels of the input."
    if channels in _RAW_CHANNELS and not (channels == 1 and _beside_embedding(site)):
        return f"Input stem: a convolution over {channels} raw input channel{'s' if channels > 1 else ''}."
    return ""


def _beside_embedding(site: Site) -> bool:
    nearest = [part for part in site.parents if not isinstance(part, (nn.ModuleList, nn.ModuleDict, nn.Sequential))]
    return any(isinstance(child, nn.Embedding) for part in nearest[-1:] for child in part.children())
