"""How a tensor is read as a stack of matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class MatrixView(NamedTuple):
    """A strided view of a parameter-shaped tensor whose dimensions are (batch..., rows..., columns...).

    Rows are fan-out, columns fan-in. ``shape`` is the shape with each of the three kinds of dimensions flattened.
    """

    tensor: Tensor
    batch_dims: int
    row_dims: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, m, n): number of matrices, fan-out, fan-in."""
        size = self.tensor.shape
        rows_end = self.batch_dims + self.row_dims
        return (
            math.prod(size[: self.batch_dims]),
            math.prod(size[self.batch_dims : rows_end]),
            math.prod(size[rows_end:]),
        )


@dataclass(frozen=True)
class MatrixLayout:
    """How a parameter is read as a stack of matrices of m rows (fan-out) and n columns (fan-in).

    The default reads a 2-D tensor as it is, and a convolution ``(out, in, *kernel)`` as ``(out, in * prod(kernel))``.

    Args:
        batch_dims: leading dimensions that count matrices: 1 for stacked experts ``(E, m, n)``.
        groups: consecutive slices of the next dimension that are separate maps, as in grouped convolution.
        transposed: the tensor is stored ``(fan-in, fan-out, ...)``, as in Hugging Face ``Conv1D`` and
            ``nn.ConvTranspose2d``.
        split: sizes along fan-out of the maps that are fused into one tensor, e.g. ``(d, d, d)`` for q/k/v; empty for
            one map.
        repeats: how often the pattern ``split`` recurs along fan-out: 1 for contiguous blocks, the number of heads
            where each head keeps its q, k and v together, fan-out / 2 for interleaved gate and up projections.

    Example::

        >>> MatrixLayout(split=(64, 64, 64)).describe((192, 64))  # in_proj_weight of nn.MultiheadAttention
        '3 of 64 x 64'
        >>> MatrixLayout(transposed=True, split=(768, 768, 768)).describe((768, 2304))  # c_attn of GPT-2
        '3 of 768 x 768'
        >>> experts = MatrixLayout(batch_dims=1, transposed=True, split=(1, 1), repeats=2880)  # gate_up_proj of GPT-OSS
        >>> experts.describe((32, 2880, 5760))
        '64 of 2880 x 2880'
    """

    batch_dims: int = 0
    groups: int = 1
    transposed: bool = False
    split: tuple[int, ...] = ()
    repeats: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "split", tuple(self.split))
        if self.batch_dims < 0:
            raise ValueError(f"batch_dims must be 0 or more, got {self.batch_dims}.")
        if self.groups < 1 or self.repeats < 1:
            raise ValueError(f"groups and repeats must be 1 or more, got groups={self.groups}, repeats={self.repeats}.")
        if any(size < 1 for size in self.split):
            raise ValueError(f"Every size in split must be 1 or more, got {self.split}.")
        if self.repeats > 1 and not self.split:
            raise ValueError(f"repeats={self.repeats} needs split: the sizes of the blocks that recur.")

    def views(self, tensor: Tensor) -> list[MatrixView]:
        """Views of ``tensor`` (any strides) that together hold each of its elements once; writing to them writes to it.

        One view if all blocks have the same size, else one view per block.

        Raises:
            ValueError: if a tensor of this shape cannot be read in this layout.
        """
        self.check(tensor.shape)
        batch_dims = self.batch_dims
        if self.groups > 1:
            tensor = torch.unflatten(tensor, batch_dims, (self.groups, tensor.shape[batch_dims] // self.groups))
            batch_dims += 1
        row_dims = 1
        if self.transposed:
            row_dims = tensor.ndim - batch_dims - 1
            tensor = tensor.movedim(batch_dims, -1)
        if len(self.split) < 2:
            return [MatrixView(tensor, batch_dims, row_dims)]
        if len(set(self.split)) == 1:
            blocks = torch.unflatten(tensor, batch_dims, (self.repeats, len(self.split), self.split[0]))
            return [MatrixView(blocks.movedim(batch_dims + 1, batch_dims), batch_dims + 1, row_dims + 1)]
        periods = torch.unflatten(tensor, batch_dims, (self.repeats, sum(self.split)))
        return [
            MatrixView(block, batch_dims, row_dims + 1)
            for block in torch.split(periods, list(self.split), dim=batch_dims + 1)
        ]

    def matrix_shapes(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """(B, m, n) of each view of a tensor of this shape."""
        return [view.shape for view in self.views(torch.empty(tuple(shape), device="meta"))]

    def read(self, tensor: Tensor) -> list[Tensor]:
        """The matrices of ``tensor``: one (B, m, n) tensor per view, copied if strides require it."""
        return [view.tensor.reshape(view.shape) for view in self.views(tensor)]

    def write(self, matrices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The inverse of :meth:`read`: a new tensor of ``shape`` that reads as ``matrices``."""
        out = torch.empty(tuple(shape), dtype=matrices[0].dtype, device=matrices[0].device)
        for view, block in zip(self.views(out), matrices, strict=True):
            view.tensor.copy_(block.reshape(view.tensor.shape))
        return out

    def check(self, shape: Sequence[int]) -> None:
        """Raise ``ValueError`` with the fix if a tensor of ``shape`` cannot be read in this layout."""
        shape = tuple(shape)
        if len(shape) < self.batch_dims + 2:
            raise ValueError(
                f"A tensor of shape {shape} has no matrices after {self.batch_dims} batch dimensions: "
                "a matrix needs two more. Send it to the group 'other'."
            )
        if shape[self.batch_dims] % self.groups:
            raise ValueError(f"groups={self.groups} does not divide dimension {self.batch_dims} of shape {shape}.")
        if self.split:
            fan_out = shape[self.batch_dims + 1] if self.transposed else shape[self.batch_dims] // self.groups
            if self.repeats * sum(self.split) != fan_out:
                times = f"{self.repeats} x " if self.repeats > 1 else ""
                raise ValueError(
                    f"split={list(self.split)} covers {times}{sum(self.split)} rows, but the fan-out of shape "
                    f"{shape} is "
                    f"{fan_out}. The sizes must add up to the fan-out."
                )

    def describe(self, shape: Sequence[int]) -> str:
        """A short text for tables, e.g. ``"3 of 64 x 64"``."""
        return " + ".join(f"{m} x {n}" if b == 1 else f"{b} of {m} x {n}" for b, m, n in self.matrix_shapes(shape))
