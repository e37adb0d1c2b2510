"""What a parameter is (role), where it goes (group) and how its tensor is read as matrices (layout)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from rich.table import Table

Role: TypeAlias = Literal["hidden", "embedding", "head", "input", "router", "vector", "other"]
Group: TypeAlias = Literal["matrix", "other"]

LAYOUTS_KEY = "matrix_layouts"
"""Where a checkpoint keeps :meth:`Partition.layouts`."""


class MatrixView(NamedTuple):
    """A strided view of a parameter-shaped tensor whose dimensions are (batch..., rows..., columns...).

    Rows are fan-out, columns fan-in. ``shape`` is what the view holds once each of the three kinds is flattened.
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

        MatrixLayout(split=(64, 64, 64))                        # nn.MultiheadAttention.in_proj_weight, d = 64
        MatrixLayout(transposed=True, split=(768, 768, 768))    # GPT-2's c_attn
        MatrixLayout(batch_dims=1, transposed=True, split=(1, 1), repeats=2880)   # GPT-OSS's gate_up_proj
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

        One view where all blocks have the same size, one a block otherwise.

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
        """The matrices of ``tensor``: one (B, m, n) tensor a view, copied where strides make it necessary."""
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


@dataclass(frozen=True, eq=False)
class ParameterAssignment:
    """One parameter of a module: what it is, where it goes and why.

    Args:
        name: name in ``module.named_parameters()``, without the prefixes that wrappers add (``_orig_mod.`` and the
            like).
        parameter: the parameter itself.
        role: what it is.
        group: which optimizer takes it.
        layout: how it is read as matrices; None in the group ``"other"``.
        reason: a sentence for the user.
        options: param-group options set by rules, e.g. ``{"lr": 3e-3}``.
        group_name: name of its param group, e.g. ``"other/embedding"``; unique for each set of options.
        aliases: other names of the same parameter, where modules share it.
        unknown: whether it goes to ``"other"`` for want of knowledge: it may be a hidden matrix, and no rule decided.
    """

    name: str
    parameter: nn.Parameter
    role: Role
    group: Group
    layout: MatrixLayout | None
    reason: str
    options: Mapping[str, Any] = field(default_factory=dict)
    group_name: str = ""
    aliases: tuple[str, ...] = ()
    unknown: bool = False

    @property
    def frozen(self) -> bool:
        """Whether the parameter takes no gradient; frozen parameters are listed but join no param group."""
        return not self.parameter.requires_grad


class Partition:
    """The answer of :func:`partition_parameters`: every parameter of a module once, in the module's order.

    Args:
        assignments: one entry a parameter; tied parameters have one entry with aliases.

    Raises:
        KeyError: on ``partition[name]`` for a name that the module does not have; lists near names.
    """

    def __init__(self, assignments: Sequence[ParameterAssignment]) -> None:
        self.assignments = list(assignments)
        self._by_name = {name: entry for entry in self.assignments for name in (entry.name, *entry.aliases)}

    def __getitem__(self, name: str) -> ParameterAssignment:
        try:
            return self._by_name[name]
        except KeyError:
            from lightning_muon.partition.rules import near_names

            raise KeyError(f"No parameter {name!r}. {near_names(name, self._by_name)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[ParameterAssignment]:
        return iter(self.assignments)

    def __len__(self) -> int:
        return len(self.assignments)

    def param_groups(self, group: Group) -> list[dict[str, Any]]:
        """Param groups for an optimizer, of the trainable parameters of one group.

        Returns:
            Dicts with ``name``, ``params``, ``param_names``, ``layouts`` (group ``"matrix"`` only; one
            :class:`MatrixLayout` a parameter) and the options that rules set.
        """
        groups: dict[str, dict[str, Any]] = {}
        for entry in self.assignments:
            if entry.group != group or entry.frozen:
                continue
            param_group = groups.setdefault(
                entry.group_name, {"name": entry.group_name, "params": [], "param_names": [], **entry.options}
            )
            param_group["params"].append(entry.parameter)
            param_group["param_names"].append(entry.name)
            if group == "matrix":
                param_group.setdefault("layouts", []).append(entry.layout)
        return list(groups.values())

    def layouts(self) -> dict[str, dict[str, Any]]:
        """How the group ``"matrix"`` is read, as plain data for a checkpoint.

        Returns:
            Name -> what differs from the defaults of :class:`MatrixLayout`, of which ``MatrixLayout(**fields)`` makes
            the layout again.
        """
        return {entry.name: _changed_fields(entry.layout) for entry in self if entry.group == "matrix" and entry.layout}

    def warnings(self) -> list[str]:
        """What a user may not expect: a group ``"matrix"`` that is nearly empty although there may be many matrices.

        Counted are the trainable elements of hidden matrices and of tensors that may be some but are not known to be;
        embeddings, heads, input stems, routers, vectors, depthwise filters and what a rule sends to ``"other"`` have a
        reason to be left out and do not count. There is a warning if less than a tenth of these elements is in
        ``"matrix"``.

        Returns:
            Sentences, each with the largest tensors left out, why, and the rule that would send them; often none.
        """
        from lightning_muon.partition.left_out import left_out

        return left_out(self)

    def table(self) -> Table:
        """A Rich table of counts and reasons, one row a pattern of names (``blocks.*.q_proj.weight x12``)."""
        from lightning_muon.partition.table import partition_table

        return partition_table(self)


def _changed_fields(layout: MatrixLayout) -> dict[str, Any]:
    changed = {key: value for key, value in vars(layout).items() if value != getattr(MatrixLayout(), key)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in changed.items()}
