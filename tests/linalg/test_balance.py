"""balance(): loops in float64, balanced norms, size of the entries, batches, degenerate input, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lightning_muon.linalg import balance

ORDERS = ("sequential", "simultaneous")


def norm(line: Tensor, p: float) -> float:
    if math.isinf(p):
        return float(line.abs().max())
    largest = float(line.abs().max()) or 1.0
    return largest * float(((line.abs() / largest) ** p).sum()) ** (1 / p)


def looped(matrix: Tensor, p: float, exponent: float, order: str, sweeps: int) -> Tensor:
    """Balance one matrix in float64, element by element."""
    x = matrix.double() / (matrix.double().norm() or 1.0)
    for _ in range(sweeps):
        if order == "sequential":
            rows = [norm(x[i], p) ** exponent or 1.0 for i in range(x.shape[0])]
            x = torch.stack([x[i] / rows[i] for i in range(x.shape[0])])
            columns = [norm(x[:, j], p) ** exponent or 1.0 for j in range(x.shape[1])]
        else:
            rows = [norm(x[i], p) ** exponent or 1.0 for i in range(x.shape[0])]
            columns = [norm(x[:, j], p) ** exponent or 1.0 for j in range(x.shape[1])]
            x = torch.stack([x[i] / rows[i] for i in range(x.shape[0])])
        x = torch.stack([x[:, j] / columns[j] for j in range(x.shape[1])], dim=1)
    return x


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("p", [1, 1.5, 2.0, math.inf])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_equals_loops(p: float, exponent: float, order: str) -> None:
    x = torch.randn(3, 7, 5) * torch.logspace(-2, 2, 5)
    x[0, 2] = 0.0
    x[1, :, 3] = 0.0
    for sweeps in (1, 3):
        wanted = torch.stack([looped(matrix, p, exponent, order, sweeps) for matrix in x])
        out = balance(x, p, exponent, order, sweeps)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), wanted, rtol=2e-5, atol=0)
        torch.testing.assert_close(balance(x.double(), p, exponent, order, sweeps), wanted, rtol=1e-11, atol=0)


def test_one_sweep_equalises_columns_and_many_equalise_rows_too() -> None:
    x = torch.randn(16, 24, dtype=torch.float64)
    once, often = balance(x), balance(x, sweeps=30)
    torch.testing.assert_close(once.norm(dim=0), torch.ones(24, dtype=torch.float64))
    assert once.norm(dim=1).std() > 1e-3
    torch.testing.assert_close(often.norm(dim=0), torch.ones(24, dtype=torch.float64))
    torch.testing.assert_close(often.norm(dim=1), torch.full((16,), math.sqrt(24 / 16), dtype=torch.float64))


def test_simultaneous_treats_rows_and_columns_alike() -> None:
    x = torch.randn(4, 9, 6, dtype=torch.float64)
    for exponent in (0.5, 1.0):
        out = balance(x, exponent=exponent, order="simultaneous", sweeps=2)
        torch.testing.assert_close(balance(x.mT, exponent=exponent, order="simultaneous", sweeps=2), out.mT)
    assert not torch.allclose(balance(x.mT), balance(x).mT, rtol=1e-2)


def test_rows_and_columns_of_any_size_come_out_the_same() -> None:
    """The fixed point is invariant to positive diagonals, and each sweep to permutations and signs."""
    x = torch.randn(8, 12, dtype=torch.float64)
    rows, columns = torch.logspace(-3, 3, 8, dtype=torch.float64), torch.logspace(2, -2, 12, dtype=torch.float64)
    torch.testing.assert_close(balance(rows[:, None] * x * columns, sweeps=60), balance(x, sweeps=60))
    order, signs = torch.randperm(8), torch.randn(12, dtype=torch.float64).sign()
    torch.testing.assert_close(balance(x[order] * signs), balance(x)[order] * signs)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("p", "exponent"), [(1, 1.0), (2, 1.0), (3.5, 0.7), (math.inf, 1.0)])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_the_input_does_not_matter(scale: float, p: float, exponent: float, order: str) -> None:
    x = torch.randn(2, 6, 9)
    scaled = balance(x * scale, p, exponent, order, sweeps=2)
    torch.testing.assert_close(scaled, balance(x, p, exponent, order, sweeps=2), rtol=1e-4, atol=0)
    scaled = balance(x.double() * scale**9, p, exponent, order, sweeps=2)
    torch.testing.assert_close(scaled.float(), balance(x, p, exponent, order, sweeps=2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("exponent", [-90, -40, 40, 90])
def test_powers_of_two_change_no_bit(exponent: int) -> None:
    x = torch.randn(3, 12, 20)
    assert torch.equal(balance(x * 2.0**exponent), balance(x))


def test_lines_of_very_different_sizes_in_one_matrix() -> None:
    """Squares of the small row vanish in float32 next to those of the large one."""
    x = torch.randn(5, 8)
    sizes = torch.tensor([1e-30, 1e-15, 1.0, 1e3, 1e5])
    torch.testing.assert_close(balance(sizes[:, None] * x), balance(x), rtol=1e-5, atol=0)


def test_large_p_is_the_maximum() -> None:
    x = torch.randn(6, 9)
    torch.testing.assert_close(balance(x, p=1e6), balance(x, p=math.inf), rtol=1e-4, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_zeros_stay_zero(order: str) -> None:
    assert torch.equal(balance(torch.zeros(2, 3, 4), order=order), torch.zeros(2, 3, 4))
    x = torch.randn(6, 8)
    x[1], x[:, 5] = 0.0, 0.0
    out = balance(x, order=order, sweeps=4)
    assert torch.equal(out.sign(), x.sign())
    rest = [0, 2, 3, 4, 5]
    torch.testing.assert_close(out[rest][:, :5], balance(x[rest], order=order, sweeps=4)[:, :5])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_stays_in_its_matrix(bad: float) -> None:
    x = torch.randn(4, 6, 9)
    clean = balance(x)
    x[2, 3, 1] = bad
    out = balance(x)
    assert out[2].isnan().any()
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_batches_dtypes_and_strides(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 10, 7).to(dtype)
    before, out = x.clone(), balance(x)
    assert out.dtype == dtype
    assert torch.equal(x, before)
    for i, j in itertools.product(range(2), range(3)):
        assert torch.equal(out[i, j], balance(x[i, j]))
    assert torch.equal(balance(x.mT.contiguous().mT), out)
    assert torch.equal(balance(x.clone(), overwrite=True), out)
    exact = looped(x[0, 0], 2.0, 1.0, "sequential", 1)
    torch.testing.assert_close(out[0, 0].double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 6), (4, 0, 6), (4, 5, 0), (0, 0)])
def test_empty_input(shape: tuple[int, ...]) -> None:
    assert balance(torch.empty(shape)).shape == shape


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"p": 0.5}, "0.5"),
        ({"p": math.nan}, "nan"),
        ({"p": "fro"}, "fro"),
        ({"exponent": 0.0}, "0.0"),
        ({"exponent": -1.0}, "-1.0"),
        ({"exponent": math.inf}, "inf"),
        ({"exponent": math.nan}, "nan"),
        ({"order": "columns"}, "columns"),
        ({"sweeps": 0}, "0"),
        ({"sweeps": 1.5}, "1.5"),
        ({"sweeps": True}, "True"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(arguments))}.*{named}"):
        balance(torch.randn(4, 6), **arguments)


@pytest.mark.parametrize("bad", [torch.randn(5), torch.ones(4, 6, dtype=torch.int64)])
def test_input_without_matrices_or_not_real_is_refused(bad: Tensor) -> None:
    with pytest.raises(TypeError, match="balance"):
        balance(bad)
