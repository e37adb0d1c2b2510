"""Stacks: matrices of one shape in a param group as one (B, m, n) tensor, with their optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_muon.partition import MatrixLayout

InitState: TypeAlias = Callable[[Tensor, dict[str, Any]], dict[str, Tensor]]

MAX_STACK_ELEMENTS = 2**26
"""Largest number of elements of a stack, which bounds temporary memory. A larger matrix is a stack of its own."""

MAX_STACK_ELEMENTS_CPU = 2**19
"""The same on a CPU, where larger stacks are not faster and do not fit into the caches."""


@dataclass(frozen=True, eq=False)
class StackMember:
    """Some matrices of a stack (B, m, n): those of one view of one parameter.

    Args:
        parameter: the parameter.
        name: its name; unique in its optimizer.
        layout: how the parameter is read as matrices.
        view: index of the view among those of the layout.
        views: number of views of the layout; more than one if fused blocks differ in size.
        count: number of matrices.
        start: index of the first matrix in the stack.
    """

    parameter: Tensor
    name: str
    layout: MatrixLayout
    view: int
    views: int
    count: int
    start: int = 0
    plain: bool = field(init=False)
    """Whether the parameter itself is the matrix."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "plain", self.layout == MatrixLayout() and self.parameter.ndim == 2)

    @property
    def slice(self) -> slice:
        """Position of the matrices in the stack: ``stack[member.slice]`` is (count, m, n)."""
        return slice(self.start, self.start + self.count)

    def matrices(self, tensor: Tensor) -> Tensor:
        """The matrices (b, m, n) of a tensor of the parameter's shape; a view if the strides allow."""
        if self.plain:
            return tensor.unsqueeze(0)
        view = self.layout.views(tensor)[self.view]
        return view.tensor.reshape(view.shape)

    def target(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of the parameter's shape that this member covers, as a writable view."""
        return tensor if self.plain else self.layout.views(tensor)[self.view].tensor

    def state_key(self, key: str) -> str:
        """Name of a state entry of the parameter, with the number of the view if the layout has several."""
        return key if self.views == 1 else f"{key}.{self.view}"

    def state_view(self, tensor: Tensor, elementwise: bool) -> Tensor:
        """The part of a stack's state for this parameter, in the parameter's shape if that can be a view."""
        part = tensor[self.slice]
        if not elementwise:
            return part
        if self.plain:
            return part[0]
        shaped = _as_parameter(part, self.parameter.shape, self.layout) if self.views == 1 else None
        return part if shaped is None else shaped


class MatrixStack:
    """The matrices of one call of a rule, and their state.

    The state is kept in tensors of the whole stack. ``optimizer.state[parameter]`` holds views of them, so that nothing
    is copied. If it holds other tensors, e.g. after a checkpoint was loaded, these are copied into the stack.

    Args:
        members: the views of parameters in the stack.
        shape: shape (m, n) of the matrices.
        dtype: dtype of the state and of the gathered gradients.
    """

    def __init__(self, members: Sequence[StackMember], shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.members = consecutive(members)
        self.shape = shape
        self.dtype = dtype
        self.state: dict[str, Tensor] = {}
        self.plain = all(member.plain for member in self.members)
        self.size = sum(member.count for member in self.members)
        self._initialized = False
        self._bound: list[dict[str, Tensor]] = [{} for _ in self.members]

    def gather(
        self, members: Sequence[StackMember], tensors: Sequence[Tensor], dtype: torch.dtype | None = None
    ) -> Tensor:
        """A new (B, m, n) tensor from tensors of the parameters' shapes, in ``dtype`` or the dtype of the stack."""
        dtype = dtype or self.dtype
        if self.plain:
            return torch.stack(list(tensors)).to(dtype)
        parts = [member.matrices(tensor) for member, tensor in zip(members, tensors, strict=True)]
        return torch.cat(parts).to(dtype)

    def gather_grads(self, members: Sequence[StackMember]) -> Tensor:
        """The gradients of some members as a new (B, m, n) tensor. All of them must have gradients."""
        return self.gather(members, [m.parameter.grad for m in members if m.parameter.grad is not None])

    def bind(
        self,
        optimizer_state: MutableMapping[Tensor, dict[str, Any]],
        init_state: InitState,
        group: dict[str, Any],
    ) -> None:
        """Let ``optimizer_state`` and the state of this stack share memory.

        Other tensors in ``optimizer_state``, e.g. from a checkpoint, are copied into the stack. Entries that were
        removed from it are initialized again.
        """
        if not self._initialized:
            self.state = self._initial_state(self.members, init_state, group)
            self._initialized = True
        for member, bound in zip(self.members, self._bound, strict=True):
            entries = optimizer_state[member.parameter]
            for key, tensor in self.state.items():
                name = member.state_key(key)
                current = entries.get(name)
                if current is not None and current is bound.get(key):
                    continue
                view = member.state_view(tensor, elementwise=tensor.shape == (self.size, *self.shape))
                if current is not None:
                    _copy_saved(view, current, member.name, name)
                elif key in bound:
                    tensor[member.slice] = self._initial_state([member], init_state, group)[key]
                entries[name] = bound[key] = view

    def take(self, members: Sequence[StackMember]) -> tuple[dict[str, Tensor], Tensor]:
        """Copies of the state of some members, and their indices in the stack."""
        index = torch.cat([torch.arange(member.start, member.start + member.count) for member in members])
        device_index = index.to(self.members[0].parameter.device)
        return {key: tensor[device_index.to(tensor.device)] for key, tensor in self.state.items()}, device_index

    def put(self, index: Tensor, state: Mapping[str, Tensor]) -> None:
        """Write back the state that :meth:`take` copied."""
        for key, tensor in state.items():
            self.state[key].index_copy_(0, index.to(tensor.device), tensor)

    def _initial_state(
        self, members: Sequence[StackMember], init_state: InitState, group: dict[str, Any]
    ) -> dict[str, Tensor]:
        weights = self.gather(members, [member.parameter for member in members])
        return _checked_state(init_state(weights, group), len(weights))


def build_stacks(
    parameters: Sequence[Tensor],
    names: Sequence[str],
    layouts: Sequence[MatrixLayout],
    state_dtype: torch.dtype | None,
) -> list[MatrixStack]:
    """Sort the matrices of a param group into stacks by shape, dtype and device.

    Args:
        parameters: tensors of at least two dimensions.
        names: one per parameter.
        layouts: one per parameter.
        state_dtype: dtype of the state; None for the dtype of each parameter. float64 parameters have float64 state.
    """
    members: dict[tuple[int, int, torch.dtype, torch.device], list[StackMember]] = {}
    for parameter, name, layout in zip(parameters, names, layouts, strict=True):
        if parameter.numel() == 0:
            continue
        shapes = layout.matrix_shapes(parameter.shape)
        for view, (count, m, n) in enumerate(shapes):
            member = StackMember(parameter, name, layout, view, len(shapes), count)
            members.setdefault((m, n, parameter.dtype, parameter.device), []).append(member)
    stacks: list[MatrixStack] = []
    for (m, n, dtype, _), same in members.items():
        stack_dtype = torch.float64 if dtype == torch.float64 else (state_dtype or dtype)
        stacks.extend(MatrixStack(chunk, (m, n), stack_dtype) for chunk in _chunks(same))
    return stacks


def consecutive(members: Sequence[StackMember]) -> list[StackMember]:
    """The same members, numbered one after the other from the start of a stack."""
    starts = accumulate((member.count for member in members), initial=0)
    return [replace(member, start=start) for member, start in zip(members, starts, strict=False)]


def _chunks(members: list[StackMember]) -> list[list[StackMember]]:
    on_cpu = members[0].parameter.device.type == "cpu"
    limit = MAX_STACK_ELEMENTS_CPU if on_cpu else MAX_STACK_ELEMENTS
    chunks: list[list[StackMember]] = [[]]
    elements = 0
    for member in members:
        if chunks[-1] and elements + member.parameter.numel() > limit:
            chunks.append([])
            elements = 0
        chunks[-1].append(member)
        elements += member.parameter.numel()
    return chunks


def _as_parameter(part: Tensor, shape: torch.Size, layout: MatrixLayout) -> Tensor | None:
    """View matrices (b, m, n) in the parameter's shape; None if no strides allow it (interleaved blocks)."""
    view = layout.views(torch.empty(shape, device="meta"))[0]
    matrices = part.as_strided(part.shape, part.stride(), part.storage_offset())
    batch, rows = view.batch_dims, view.batch_dims + view.row_dims
    sizes = view.tensor.shape
    for dim, dims in ((2, sizes[rows:]), (1, sizes[batch:rows]), (0, sizes[:batch])):
        matrices = torch.unflatten(matrices, dim, tuple(dims)) if dims else matrices.squeeze(dim)
    pieces = sorted(zip(view.tensor.stride(), sizes, matrices.stride(), strict=True))
    strides = []
    for size, first in zip(shape, torch.empty(shape, device="meta").stride(), strict=True):
        inside = [piece for piece in pieces if piece[1] > 1 and first <= piece[0] < first * size]
        for inner, outer in pairwise(inside):
            if outer[2] != inner[2] * inner[1]:
                return None
        strides.append(inside[0][2] if inside else 1)
    return part.as_strided(shape, strides, part.storage_offset())


def _checked_state(state: Any, size: int) -> dict[str, Tensor]:
    if not isinstance(state, dict):
        raise ValueError(f"init_state must return a dict of tensors, got {type(state).__name__}.")
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.shape[:1] != (size,):
            found = f"has shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"is {type(tensor).__name__}"
            raise ValueError(f"init_state must return tensors of shape (B, ...) with B = {size} here; {key!r} {found}.")
    return state


def _copy_saved(view: Tensor, saved: Any, parameter: str, key: str) -> None:
    if not isinstance(saved, Tensor) or saved.shape != view.shape:
        found = f"a tensor of shape {tuple(saved.shape)}" if isinstance(saved, Tensor) else f"{type(saved).__name__}"
        raise ValueError(
            f"The optimizer state {key!r} of {parameter!r} is {found}, but this model and layout need shape "
            f"{tuple(view.shape)}. The checkpoint belongs to another model, partition or rule."
        )
    view.copy_(saved)
