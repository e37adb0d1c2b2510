"""Small modules for tests of the partition."""

from __future__ import annotations

import itertools

from torch import nn

from lightning_muon.partition import partition_parameters


class Parts(nn.Module):
    """A module of the given parts, registered in this order."""

    def __init__(self, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class Block(Parts):
    """A transformer block without a telling name."""

    def __init__(self, width: int) -> None:
        super().__init__(
            attention=nn.MultiheadAttention(width, 2),
            norm=nn.LayerNorm(width),
            up=nn.Linear(width, 4 * width),
            down=nn.Linear(4 * width, width),
        )


BLOCK = """
*.attention.in_proj_weight x{0} hidden 3 of 16 x 16
*.attention.out_proj.weight x{0} hidden 16 x 16
*.up.weight x{0} hidden 64 x 16
*.down.weight x{0} hidden 16 x 64
*.attention.* x{1} vector
*.bias x{2} vector
*norm.weight x{0} vector
"""


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLUs between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def roles(module: nn.Module) -> dict[str, str]:
    """Roles of the weights."""
    return {entry.name: entry.role for entry in partition_parameters(module) if entry.parameter.ndim > 1}
