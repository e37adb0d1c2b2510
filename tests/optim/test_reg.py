"""REG: what holds of row-and-column scaling whichever variant is chosen, and what holds of each."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import REG, SinkGD
from tests.optim.rule_cases import distance, normal, rotation, signed_permutation, updates

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (7, 7)}
# Every combination of the first three is that of balance(), which has tests of its own.
VARIANTS: list[dict[str, Any]] = [
    {"p": p, "exponent": exponent, "order": order, "sweeps": 3 if p == 1.0 else 1}
    for p, exponent, order in itertools.product((1.0, 2.0, math.inf), (0.5, 1.0), ("sequential", "simultaneous"))
]
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
over_variants = pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda variant: "-".join(str(value) for value in variant.values())
)


def skewed(m: int, n: int, count: int = 1) -> list[Tensor]:
    """Gradients whose rows and columns differ in size by orders of magnitude."""
    rows, columns = 3 ** torch.linspace(-2, 2, m).double(), 5 ** torch.linspace(1, -1, n).double()
    return [rows[:, None] * matrix * columns for matrix in normal(m, n, count)]


def momenta(grads: list[Tensor], mu: float = 0.95) -> list[Tensor]:
    """Nesterov's look-ahead of each step."""
    buffer, looked = torch.zeros_like(grads[0]), []
    for grad in grads:
        buffer = mu * buffer + (1 - mu) * grad
        looked.append(mu * buffer + (1 - mu) * grad)
    return looked


def spread(norms: Tensor) -> float:
    return float((norms.max() - norms.min()) / norms.mean())


@over_variants
@over_shapes
def test_every_variant(shape: tuple[int, int], variant: dict[str, Any]) -> None:
    """RMS exactly as told, signs of the momentum, zeros kept, and no scale but its own."""
    grads = skewed(*shape, 3)
    for grad in grads:
        grad[1] = 0
        grad[:, 3] = 0
    ours = updates(REG, grads, rms=0.3, **variant)
    for update, looked in zip(ours, momenta(grads), strict=True):
        assert float(update.square().mean().sqrt()) == pytest.approx(0.3, rel=1e-12)
        assert torch.equal(update.sign(), looked.sign())
    assert distance(updates(REG, [1e7 * grad for grad in grads], rms=0.3, **variant), ours) < 1e-12


@over_variants
def test_every_variant_follows_permutations_and_signs_but_no_rotation(variant: dict[str, Any]) -> None:
    grads = skewed(5, 8, 2)
    plain = updates(REG, grads, **variant)
    for turn, follows in ((signed_permutation, True), (rotation, False)):
        left, right = turn(5), turn(8)
        turned = updates(REG, [left @ grad @ right for grad in grads], **variant)
        error = distance(turned, [left @ update @ right for update in plain])
        assert (error < 1e-12) if follows else (error > 0.1)


@over_variants
def test_only_simultaneous_scaling_treats_rows_and_columns_alike(variant: dict[str, Any]) -> None:
    grads = skewed(5, 8, 2)
    transposed = updates(REG, [grad.T for grad in grads], **variant)
    error = distance(transposed, [update.T for update in updates(REG, grads, **variant)])
    if variant["order"] == "simultaneous":
        assert error < 1e-12
    elif variant["sweeps"] == 1:
        assert error > 1e-2


@over_shapes
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_sequential_scaling_leaves_columns_of_equal_norm(shape: tuple[int, int], p: float) -> None:
    """Of equal p-norm, and of no other. Rows are scaled first, so theirs differ; only the largest entries of rows
    survive as 1, each in a column whose largest is 1 too.
    """
    (update,) = updates(REG, skewed(*shape), p=p)
    assert spread(torch.linalg.vector_norm(update, p, dim=0)) < 1e-12
    assert spread(torch.linalg.vector_norm(update, 4.0, dim=0)) > 1e-2
    rows = spread(torch.linalg.vector_norm(update, p, dim=1))
    assert (rows < 1e-12) if p == math.inf else (rows > 1e-2)


@over_shapes
@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_many_sweeps_balance_rows_and_columns(shape: tuple[int, int], order: str) -> None:
    """Whole sequential sweeps and half simultaneous ones (Ruiz) end at the same matrix, which is SinkGD's too."""
    exponent = 1.0 if order == "sequential" else 0.5
    (update,) = updates(REG, skewed(*shape), order=order, exponent=exponent, sweeps=200)
    assert spread(update.norm(dim=0)) < 1e-8
    assert spread(update.norm(dim=1)) < 1e-8
    assert distance([update], updates(SinkGD, skewed(*shape), sweeps=200)) < 1e-8


@over_shapes
def test_many_sweeps_forget_the_scales_of_rows_and_columns(shape: tuple[int, int]) -> None:
    grads = normal(*shape, 2)
    rows, columns = normal(shape[0], 1, seed=1)[0].exp(), normal(1, shape[1], seed=2)[0].exp()
    scaled = [rows * grad * columns for grad in grads]
    assert distance(updates(REG, scaled, sweeps=200), updates(REG, grads, sweeps=200)) < 1e-8
    assert distance(updates(REG, scaled, sweeps=1), updates(REG, grads, sweeps=1)) > 1e-2


@over_shapes
@pytest.mark.parametrize("sweeps", [1, 5])
def test_is_sinkgd_without_momentum(shape: tuple[int, int], sweeps: int) -> None:
    grads = skewed(*shape, 3)
    reg = updates(REG, grads, momentum=0.0, sweeps=sweeps)
    assert distance(reg, updates(SinkGD, grads, sweeps=sweeps)) < 1e-12
    assert distance(updates(REG, grads, sweeps=sweeps), reg) > 0.1


@over_variants
def test_balanced_gradients_pass_unchanged(variant: dict[str, Any]) -> None:
    hadamard = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    (update,) = updates(REG, [7 * hadamard], rms=0.2, **variant)
    torch.testing.assert_close(update, 0.2 * hadamard)


@over_variants
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_float32_gradients_of_any_size(variant: dict[str, Any], size: float) -> None:
    """Their squares are beyond float32."""
    (grad,) = normal(5, 8)
    (wanted,) = updates(REG, [grad], **variant)
    (update,) = updates(REG, [size * grad], dtype=torch.float32, **variant)
    assert distance([update.double()], [wanted]) < 1e-5


@over_variants
def test_a_zero_gradient_moves_nothing(variant: dict[str, Any]) -> None:
    (update,) = updates(REG, [torch.zeros(4, 6)], **variant)
    assert torch.equal(update, torch.zeros(4, 6, dtype=torch.float64))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("p", -2.0),
        ("p", "two"),
        ("exponent", -1.0),
        ("order", "columns"),
        ("sweeps", 0),
        ("sweeps", 1.5),
        ("rms", -0.2),
        ("rms", math.inf),
        ("momentum", 1.0),
    ],
)
def test_names_a_bad_value(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key}.*{value}"):
        REG([nn.Parameter(torch.randn(3, 4))], **{key: value})


def test_it_says_once_that_it_is_a_reconstruction() -> None:
    code = (
        "import warnings, torch\n"
        "from lightning_muon import REG\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3):\n"
        "        REG([torch.nn.Parameter(torch.ones(2, 2))])\n"
        "print(*(warning.message for warning in caught), sep='|')\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "reconstruction of arXiv 2510.03691" in printed
    assert "|" not in printed
