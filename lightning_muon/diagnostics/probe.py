"""MatrixProbe: one pass over weights and updates per step, shared by all monitors of a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain
from typing import Literal, TypeAlias

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_muon.diagnostics.matrices import WatchedParameter
from lightning_muon.diagnostics.updates import UpdateCapture
from lightning_muon.linalg import Spectra, estimate_spectra, exact_spectra
from lightning_muon.partition import MatrixLayout

Kind: TypeAlias = Literal["weight", "update"]

MAX_STACK_ELEMENTS = 2**24
"""Matrices are decomposed together up to this many elements, which bounds temporary memory."""

ITERATIONS = 16
"""Iterations of the Lanczos method. For weights it starts from the last vectors; updates change too fast for that."""


class Depth(IntEnum):
    """How much of a matrix is measured: each level contains those before it."""

    NORM = 0
    """Spectral and Frobenius norm."""
    GRAM = 1
    """Also the quantities of the Gram matrix."""
    SPECTRUM = 2
    """All singular values; the norm is exact."""


Plan: TypeAlias = Mapping[tuple[Kind, str], Depth]
"""What to measure: (kind, name of the matrix) -> depth."""


@dataclass(frozen=True)
class Measurement:
    """The spectra of a stack of matrices of one shape.

    Args:
        kind: whether they are weights or updates.
        names: of the matrices.
        shape: (m, n).
        depth: what was measured.
        spectra: with batch shape (len(names),), on the CPU.
    """

    kind: Kind
    names: list[str]
    shape: tuple[int, int]
    depth: Depth
    spectra: Spectra


class MatrixProbe:
    """Captures the updates of a step and measures matrices, each once.

    Sharded parameters (``DTensor``) are gathered whole on every process, one after the other.

    Args:
        parameters: what may be asked for.
        demands: what each monitor wants measured after a step; asked once for each optimizer that steps.
    """

    def __init__(self, parameters: list[WatchedParameter], demands: Sequence[Callable[[int], Plan]]) -> None:
        self.parameters = parameters
        self.demands = demands
        self.vectors: dict[str, Tensor] = {}
        """Start vectors of the next Lanczos iteration, by name of the weight."""
        self._warned: set[str] = set()
        self._captures: dict[Optimizer, UpdateCapture] = {}
        self._step = -1
        self._plan: Plan = {}
        self._measured: list[Measurement] = []

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Prepare for a step of an optimizer; the first monitor that calls does so for all."""
        if step != self._step:
            self._step, self._measured, self._plan = step, [], {}
        if optimizer in self._captures:
            return
        # Once for each optimizer: in manual optimization the parameters of the others may be frozen meanwhile.
        self._plan = _union([self._plan, *(demand(step) for demand in self.demands)])
        wanted = {watched.parameter for watched in self._asked_for("update")}
        self._captures[optimizer] = UpdateCapture(optimizer, wanted)

    def after_step(self, step: int) -> list[Measurement]:
        """The measurements of this step, made when the first monitor calls; empty if no optimizer stepped."""
        if self._captures:
            captures = [capture for capture in self._captures.values() if capture.stepped]
            self.close()
            self._warn(captures)
            self._measured = list(self._measure(captures)) if captures else []
        return self._measured if step == self._step else []

    def close(self) -> None:
        """Remove the observers, whether or not the optimizers stepped."""
        for capture in self._captures.values():
            capture.close()
        self._captures.clear()

    def _warn(self, captures: Sequence[UpdateCapture]) -> None:
        """Warn once of rounding and weight decay that the measured updates contain."""
        if any(capture.rounded for capture in captures) and "rounding" not in self._warned:
            self._warned.add("rounding")
            rank_zero_warn(
                "Updates are measured as differences of weights in half precision, where rounding takes a large part. "
                "Keep the weights in float32 (precision='bf16-mixed') to see what the optimizer does."
            )
        for name in set().union(*(capture.unknown for capture in captures)) - self._warned:
            self._warned.add(name)
            rank_zero_warn(
                f"How {name} decays the weights is not known here: its updates are measured with the decay in them. "
                "Train with weight_decay=0 to see them without."
            )

    @torch.no_grad()
    def _measure(self, captures: Sequence[UpdateCapture]) -> Iterator[Measurement]:
        stacks: dict[tuple[Kind, torch.Size, Depth, torch.dtype, torch.device], _Stack] = {}
        for kind, names, matrices in chain(self._weights(), self._updates(captures)):
            for depth in Depth:
                index = [i for i, name in enumerate(names) if self._plan.get((kind, name)) is depth]
                if not index:
                    continue
                chosen = matrices if len(index) == len(names) else matrices[index]
                key = (kind, matrices.shape[1:], depth, matrices.dtype, matrices.device)
                stack = stacks.setdefault(key, _Stack())
                stack.add([names[i] for i in index], chosen)
                if stack.elements >= MAX_STACK_ELEMENTS:
                    yield self._measure_stack(kind, depth, stacks.pop(key))
        for (kind, _, depth, _, _), stack in stacks.items():
            yield self._measure_stack(kind, depth, stack)

    def _weights(self) -> Iterator[tuple[Kind, list[str], Tensor]]:
        """Names of weights and their matrices (b, m, n), one matrix per name."""
        for watched in self._asked_for("weight"):
            for names, matrices in zip(watched.matrices, watched.read(_whole(watched.parameter.detach())), strict=True):
                yield "weight", names, matrices

    def _updates(self, captures: Sequence[UpdateCapture]) -> Iterator[tuple[Kind, list[str], Tensor]]:
        """The same for updates: stacks as the step had them, then the parameters that are in no stack."""
        asked_for: dict[tuple[Tensor, MatrixLayout], WatchedParameter] = {
            (watched.parameter, watched.layout): watched for watched in self._asked_for("update")
        }
        done = set()
        for stack in (stack for capture in captures for stack in capture.stacks):
            names = []
            for member in stack.members:
                watched = asked_for.get((member.parameter, member.layout))
                names += [""] * member.count if watched is None else watched.matrices[member.view]
                done.add((member.parameter, member.layout))
            yield "update", names, stack.direction
        for key, watched in asked_for.items():
            if key in done:
                continue
            # The optimizer has no observers, or the monitor's rules read the parameter in another layout.
            found = [u for capture in captures if (u := capture.in_shape_of(watched.parameter)) is not None]
            if found:
                for names, matrices in zip(watched.matrices, watched.read(_whole(found[-1])), strict=True):
                    yield "update", names, matrices

    def _asked_for(self, kind: Kind) -> list[WatchedParameter]:
        return [watched for watched in self.parameters if any((kind, name) in self._plan for name in watched.shapes)]

    def _measure_stack(self, kind: Kind, depth: Depth, stack: _Stack) -> Measurement:
        matrices = stack.join()
        m, n = matrices.shape[1:]
        if depth is Depth.SPECTRUM:
            spectra = exact_spectra(matrices)
        else:
            warm = self._warm_vectors(stack.names, matrices) if kind == "weight" else None
            spectra, vectors = estimate_spectra(matrices, warm, iterations=ITERATIONS, gram=depth is Depth.GRAM)
            if kind == "weight":
                self.vectors.update(zip(stack.names, vectors.unbind(), strict=True))
        return Measurement(kind, stack.names, (m, n), depth, _on_cpu(spectra))

    def _warm_vectors(self, names: list[str], matrices: Tensor) -> Tensor | None:
        """The last vectors of these matrices; None unless each has been measured in this shape."""
        size = min(matrices.shape[1:])
        known = [v for name in names if (v := self.vectors.get(name)) is not None and len(v) == size]
        return torch.stack(known).to(matrices.device) if len(known) == len(names) else None


class _Stack:
    """Matrices of one shape, collected for one measurement."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.elements = 0
        self._parts: list[Tensor] = []

    def add(self, names: list[str], matrices: Tensor) -> None:
        self.names.extend(names)
        self.elements += matrices.numel()
        self._parts.append(matrices)

    def join(self) -> Tensor:
        return self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)


def _union(plans: Sequence[Plan]) -> Plan:
    """The union of the plans; each matrix at the greatest depth of any plan."""
    union: dict[tuple[Kind, str], Depth] = {}
    for plan in plans:
        for matrix, depth in plan.items():
            union[matrix] = max(depth, union.get(matrix, depth))
    return union


def _whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered if it is sharded; every process of its mesh must call this."""
    gather = getattr(tensor, "full_tensor", None)
    whole: Tensor = tensor if gather is None else gather()
    return whole


def _on_cpu(spectra: Spectra) -> Spectra:
    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.cpu()

    return Spectra(
        spectra.size,
        spectra.spectral_norm.cpu(),
        spectra.frobenius_norm.cpu(),
        move(spectra.orthogonality_error),
        move(spectra.singular_values),
    )
