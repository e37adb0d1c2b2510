"""Muon in float64, one matrix and one equation at a time. It shares no code with the package.

W parameter, G gradient, M momentum buffer, O orthogonalized momentum, all read as matrices of m rows (fan-out) and
n columns (fan-in):

    M <- mu M + (1 - mu) G
    N  = mu M + (1 - mu) G     with Nesterov, else M
    O  = p_k(... p_1(N / ||N||_F)),  p(X) = a X + b (X X^T) X + c (X X^T)^2 X
    W <- (1 - lr wd) W - lr s(m, n) O
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

JORDAN = (3.4445, -4.7750, 2.0315)
HALLEY = (2.0, -1.5, 0.5)
POLYNOMIALS: dict[str, list[tuple[float, float, float]]] = {
    "jordan": [JORDAN] * 5,
    "you": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    "polar_express": [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ],
    "cans": [
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ],
    "deepseek": [JORDAN] * 8 + [HALLEY] * 2,
    "simple": [HALLEY] * 12,
    "cubic": [
        (3.3656576, -3.3420992, 0.0),
        (2.5744352, -1.4957376, 0.0),
        (2.5368962, -1.4312570, 0.0),
        (2.4418906, -1.2764040, 0.0),
        (2.2230472, -0.9630650, 0.0),
    ],
}
POLYNOMIALS["gram"] = POLYNOMIALS["polar_express"]  # the same by other products
DEFAULT_STEPS = dict.fromkeys(POLYNOMIALS, 5) | {"deepseek": 10, "simple": 12}
ITERATIVE_METHODS = tuple(POLYNOMIALS)
EXACT_METHODS = ("qdwh", "svd")
METHODS = (*ITERATIVE_METHODS, *EXACT_METHODS)
# These grow above 1 (their first polynomial is steep there): what is rounded up would diverge without a margin.
SAFETY = {"polar_express": 1.01, "gram": 1.01, "cans": 1.01}
LR_SCALES = ("match_rms_adamw", "original", "spectral", "none")


def polynomials(method: str, steps: int | None = None) -> list[tuple[float, float, float]]:
    """The polynomials of a run of ``steps``, with the safety factor in the argument of all but the last."""
    listed = POLYNOMIALS[method]
    count = DEFAULT_STEPS[method] if steps is None else steps
    chosen = [listed[step] if step < len(listed) else listed[-1] for step in range(count)]
    s = SAFETY.get(method, 1.0)
    return [(a / s, b / s**3, c / s**5) if k < count - 1 else (a, b, c) for k, (a, b, c) in enumerate(chosen)]


def normalizer(method: str, matrix: Tensor) -> float:
    """What a matrix is divided by before the first polynomial."""
    return float(matrix.norm()) * SAFETY.get(method, 1.0)


def polar(matrix: Tensor) -> Tensor:
    """U V^T of the thin SVD, without the directions whose singular value is rounding error."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    if s.numel() == 0 or s[0] == 0:
        return torch.zeros_like(matrix)
    rank = int((s > s[0] * 1e-12).sum())
    return u[:, :rank] @ vh[:rank]


def orthogonalize(matrix: Tensor, method: str = "jordan", steps: int | None = None) -> Tensor:
    """(m, n) -> (m, n) in float64."""
    x = matrix.double()
    if method in EXACT_METHODS:
        return polar(x)
    norm = normalizer(method, x)
    if norm == 0:
        return torch.zeros_like(x)
    x = x / norm
    for a, b, c in polynomials(method, steps):
        if x.shape[0] <= x.shape[1]:
            gram = x @ x.T
            x = a * x + b * (gram @ x) + c * (gram @ (gram @ x))
        else:
            gram = x.T @ x
            x = a * x + b * (x @ gram) + c * ((x @ gram) @ gram)
    return x


def shape_scale(lr_scale: str, m: int, n: int) -> float:
    return {
        "match_rms_adamw": 0.2 * math.sqrt(max(m, n)),
        "original": math.sqrt(max(1.0, m / n)),
        "spectral": math.sqrt(m / n),
        "none": 1.0,
    }[lr_scale]


@dataclass(frozen=True)
class Layout:
    """The same words as ``MatrixLayout``, read by :func:`matrix_indices` alone."""

    batch_dims: int = 0
    groups: int = 1
    transposed: bool = False
    split: tuple[int, ...] = ()
    repeats: int = 1


def matrix_indices(shape: Sequence[int], layout: Layout) -> list[Tensor]:
    """For each matrix of a tensor the (m, n) flat indices of its elements, collected row by row."""
    if math.prod(shape) == 0:
        return []
    index = torch.arange(math.prod(shape)).reshape(tuple(shape))
    matrices = []
    for position in itertools.product(*(range(size) for size in shape[: layout.batch_dims])):
        maps = index[position]
        size = maps.shape[0] // layout.groups
        for group in range(layout.groups):
            matrices += _blocks(maps[group * size : (group + 1) * size], layout)
    return matrices


def _blocks(one_map: Tensor, layout: Layout) -> list[Tensor]:
    rows_of: list[list[Tensor]] = []  # by output unit: one row, or one a kernel position where fan-in comes first
    if layout.transposed:
        for unit in range(one_map.shape[1]):
            rows_of.append(list(one_map[:, unit].reshape(one_map.shape[0], -1).T))
    else:
        for unit in range(one_map.shape[0]):
            rows_of.append([one_map[unit].flatten()])
    sizes = layout.split or (len(rows_of),)
    matrices = []
    for block in range(len(sizes)):
        rows = []
        for repeat in range(layout.repeats):
            start = repeat * sum(sizes) + sum(sizes[:block])
            for unit in range(start, start + sizes[block]):
                rows += rows_of[unit]
        matrices.append(torch.stack(rows))
    return matrices


@dataclass
class ReferenceMuon:
    """The whole step. Parameters are float64 tensors, replaced in place of ``self.params``."""

    params: list[Tensor]
    layouts: list[Layout] | None = None
    lr: float = 1e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    method: str = "jordan"
    steps: int | None = None
    lr_scale: str = "match_rms_adamw"
    cautious: bool = False
    buffers: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.params = [p.detach().double().clone() for p in self.params]
        self.layouts = self.layouts or [Layout()] * len(self.params)
        self.buffers = [torch.zeros_like(p) for p in self.params]

    def step(self, grads: Sequence[Tensor | None], lr: float | None = None) -> None:
        lr = self.lr if lr is None else lr
        for k, grad in enumerate(grads):
            if grad is None:
                continue
            self.buffers[k] = self.momentum * self.buffers[k] + (1 - self.momentum) * grad.double()
            look_ahead = self.buffers[k]
            if self.nesterov:
                look_ahead = self.momentum * self.buffers[k] + (1 - self.momentum) * grad.double()
            self.params[k] = self._updated(self.params[k], look_ahead, self.layouts[k], lr)

    def _updated(self, param: Tensor, momentum: Tensor, layout: Layout, lr: float) -> Tensor:
        new = param.flatten().clone()
        for index in matrix_indices(param.shape, layout):
            weight = param.flatten()[index]
            m, n = weight.shape
            update = orthogonalize(momentum.flatten()[index], self.method, self.steps) * shape_scale(
                self.lr_scale, m, n
            )
            decayed = weight
            if self.cautious:
                decayed = torch.where(weight * update >= 0, weight, torch.zeros_like(weight))
            new[index] = weight - lr * self.weight_decay * decayed - lr * update
        return new.view(param.shape)


def settings(**overrides: Any) -> dict[str, Any]:
    """Keyword arguments that both the package's and this Muon take."""
    return {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, **overrides}
