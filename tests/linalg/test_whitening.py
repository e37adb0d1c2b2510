"""whiten(): against the coupled iteration in float64, the limit, scale, batches, degenerate input, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_muon.linalg import whiten
from tests.optim import reference

SHAPES = [(8, 32), (12, 12), (30, 6), (1, 9), (9, 1)]


def coupled(matrix: Tensor, beta: float, steps: int) -> Tensor:
    """Whiten one matrix in float64 by the published iteration for the inverse square root of the Gram matrix."""
    x = matrix.double()
    if x.shape[0] > x.shape[1]:
        return coupled(x.T, beta, steps).T
    x = x / x.norm()
    eye = torch.eye(x.shape[0], dtype=torch.float64)
    y, z = x @ x.T, eye
    for _ in range(steps):
        t = 3 * eye - z @ y
        y, z = beta * y @ t, beta * t @ z
    return z @ x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("beta", "steps"), [(0.5, 1), (0.4, 2), (0.8, 10)])
def test_equals_the_coupled_iteration(beta: float, steps: int, shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    wanted = coupled(x, beta, steps)
    torch.testing.assert_close(whiten(x.double(), beta, steps), wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(whiten(x, beta, steps).double(), wanted, rtol=0, atol=2e-4)


def test_defaults_are_ten_steps_of_one_half() -> None:
    x = torch.randn(8, 20, dtype=torch.float64)
    torch.testing.assert_close(whiten(x), coupled(x, 0.5, 10))


@pytest.mark.parametrize("shape", SHAPES)
def test_one_half_converges_to_the_polar_factor(shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(whiten(x.double(), steps=30), reference.polar(x.double()), rtol=0, atol=1e-8)
    torch.testing.assert_close(whiten(x, steps=30).double(), reference.polar(x.double()), rtol=0, atol=1e-4)


def test_rows_become_uncorrelated() -> None:
    x = torch.randn(6, 6, dtype=torch.float64) @ torch.randn(6, 200, dtype=torch.float64)
    white = whiten(x, steps=40)
    torch.testing.assert_close(white @ white.T, torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize(("beta", "steps"), [(0.5, 30), (0.8, 10), (0.8, 30)])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (64, 64)])
def test_a_null_space_stays_bounded(shape: tuple[int, int], beta: float, steps: int) -> None:
    """Standardized rows of a tall matrix have one. There a float32 Gram matrix would be negative and diverge."""
    x = torch.randn(shape)
    x = x - x.mean(dim=1, keepdim=True)
    x[:, : shape[1] // 2] = x[:, -(shape[1] // 2) :]
    assert torch.linalg.svdvals(whiten(x, beta, steps)).max() < 1.8


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_the_input_does_not_matter(scale: float) -> None:
    x = torch.randn(2, 6, 9)
    torch.testing.assert_close(whiten(x * scale), whiten(x), rtol=0, atol=1e-5)


def test_zero_stays_zero() -> None:
    for beta in (0.5, 0.8):
        assert torch.equal(whiten(torch.zeros(2, 5, 7), beta, 30), torch.zeros(2, 5, 7))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_stays_in_its_matrix(bad: float) -> None:
    x = torch.randn(4, 6, 9)
    clean = whiten(x)
    x[2, 3, 1] = bad
    out = whiten(x)
    assert out[2].isnan().any()
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_batches_and_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 10, 7).to(dtype)
    before, out = x.clone(), whiten(x)
    assert out.dtype == dtype
    assert torch.equal(x, before)
    assert torch.equal(whiten(x.clone(), overwrite=True), out)
    for i in range(2):
        for j in range(3):
            wanted = coupled(x[i, j], 0.5, 10)
            torch.testing.assert_close(out[i, j].double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5, 6), (4, 0, 6), (4, 5, 0), (0, 0)])
def test_empty_input(shape: tuple[int, ...]) -> None:
    assert whiten(torch.empty(shape)).shape == shape


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"beta": 0.0}, "0.0"),
        ({"beta": 0.9}, "0.9"),
        ({"beta": math.nan}, "nan"),
        ({"beta": "half"}, "half"),
        ({"steps": 0}, "0"),
        ({"steps": 2.5}, "2.5"),
        ({"steps": 100}, "100"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(arguments))}.*{named}"):
        whiten(torch.randn(4, 6), **arguments)


@pytest.mark.parametrize("bad", [torch.randn(5), torch.ones(4, 6, dtype=torch.int64)])
def test_input_without_matrices_or_not_real_is_refused(bad: Tensor) -> None:
    with pytest.raises(TypeError, match="whiten"):
        whiten(bad)
