"""orthogonalize(): documented singular values, scale, symmetry, batches, degenerate input, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_muon.linalg import orthogonalize
from tests.live_memory import LiveMemory
from tests.optim import reference

# Range of the composed polynomial over singular values of X / ||X||_F from `lowest` to 1, by dense sampling in float64.
RANGES = {
    ("jordan", 1e-2): (0.682, 1.134),
    ("jordan", 3e-3): (0.682, 1.202),
    ("you", 1e-2): (0.978, 1.032),
    ("you", 3e-3): (0.978, 1.145),
    ("polar_express", 1e-2): (0.876, 1.124),
    ("polar_express", 3e-3): (0.876, 1.124),
    ("gram", 1e-2): (0.876, 1.124),
    ("gram", 3e-3): (0.876, 1.124),
    ("cans", 1e-2): (0.867, 1.113),
    ("cans", 3e-3): (0.867, 1.113),
    ("deepseek", 1e-2): (1.000, 1.001),
    ("deepseek", 3e-3): (1.000, 1.001),
    ("simple", 1e-2): (1.000, 1.000),
    ("simple", 3e-3): (1.000, 1.000),
    ("cubic", 1e-2): (0.774, 1.300),
    ("cubic", 3e-3): (0.353, 1.300),
    ("qdwh", 1e-2): (1.0, 1.0),
    ("qdwh", 3e-3): (1.0, 1.0),
    ("svd", 1e-2): (1.0, 1.0),
    ("svd", 3e-3): (1.0, 1.0),
}
SHAPES = [(16, 64), (32, 32), (64, 16)]
# One of each way to compute: with and without the fifth power, by Gram matrices, by factorizations. What the
# coefficients decide is tried on all methods.
ALGORITHMS = ("jordan", "cubic", "gram", "qdwh", "svd")
# Beyond the three printed digits of the ranges: rounding of the products.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}


def matrix_with_spectrum(
    m: int, n: int, singular_values: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(X, U, V) in float64 with X = U diag(singular_values) V^T."""
    rank = min(m, n)
    u = torch.linalg.qr(torch.randn(m, rank, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q
    return u @ torch.diag(singular_values.double()) @ v.T, u, v


def spectrum_down_to(lowest: float, count: int) -> Tensor:
    """Log-spaced singular values of Frobenius norm 1 whose smallest is ``lowest``."""
    ratio = lowest
    for _ in range(60):
        values = torch.logspace(math.log10(ratio), 0, count, dtype=torch.float64)
        ratio = lowest * float(values.norm())
    return values / values.norm()


@pytest.mark.parametrize(("method", "lowest"), [key for key in RANGES if key[0] in reference.ITERATIVE_METHODS])
def test_reference_ranges(method: str, lowest: float) -> None:
    """Checks the tables of this file: the scalar polynomials have these ranges."""
    sigma = torch.logspace(math.log10(lowest), 0, 20_001, dtype=torch.float64)
    sigma = sigma / reference.SAFETY.get(method, 1.0)
    for a, b, c in reference.polynomials(method):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    low, high = RANGES[method, lowest]
    assert sigma.min() == pytest.approx(low, abs=1e-3)
    assert sigma.max() == pytest.approx(high, abs=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("method", "lowest", "dtype"),
    # float64 follows the polynomials below to 1e-9; bfloat16 rounds singular values below 0.004 of the largest.
    [(*key, torch.float32) for key in RANGES] + [(*key, torch.bfloat16) for key in RANGES if key[1] == 1e-2],
)
def test_singular_values_lie_in_the_promised_range(
    method: str, lowest: float, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    x, _, _ = matrix_with_spectrum(*shape, spectrum_down_to(lowest, min(shape)), generator)
    out = orthogonalize(x.to(dtype), method=method, dtype=dtype)
    assert out.dtype == dtype
    values = torch.linalg.svdvals(out.double())
    low, high = RANGES[method, lowest]
    assert values.min() >= low - TOLERANCE[dtype]
    assert values.max() <= high + TOLERANCE[dtype]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", reference.METHODS)
def test_singular_vectors_are_kept_and_values_follow_the_polynomial(
    method: str, shape: tuple[int, int], generator: torch.Generator
) -> None:
    values = spectrum_down_to(1e-3, min(shape))
    x, u, v = matrix_with_spectrum(*shape, values, generator)
    expected = values.clone()
    if method in reference.EXACT_METHODS:
        expected = torch.ones_like(values)
    else:
        expected = values / reference.SAFETY.get(method, 1.0)
        for a, b, c in reference.polynomials(method):
            expected = a * expected + b * expected**3 + c * expected**5
    out = orthogonalize(x, method=method, dtype=torch.float64)
    torch.testing.assert_close(out, u @ torch.diag(expected) @ v.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 3, 14])
@pytest.mark.parametrize("shape", [(7, 12), (24, 6)])
@pytest.mark.parametrize("method", reference.ITERATIVE_METHODS)
def test_steps_truncate_or_repeat_the_last_polynomial(method: str, shape: tuple[int, int], steps: int) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    out = orthogonalize(x, method=method, steps=steps, dtype=torch.float64)
    torch.testing.assert_close(out, reference.orthogonalize(x, method, steps), rtol=1e-9, atol=1e-9)


# Slowly and quickly falling singular values, a null space, rank one, nothing.
SPECTRA = {
    "moderate": lambda count: torch.logspace(-1, 0, count, dtype=torch.float64),
    "millionth": lambda count: torch.logspace(-6, 0, count, dtype=torch.float64),
    "half rank": lambda count: torch.logspace(-2, 0, count, dtype=torch.float64) * (torch.arange(count) % 2),
    "rank one": lambda count: (torch.arange(count) == 0).double(),
    "zero": lambda count: torch.zeros(count, dtype=torch.float64),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(8, 128), (64, 16), (20, 24)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_gram_equals_the_plain_iteration(
    spectrum: str, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Restarts are necessary: without them the null space of a float32 Gram matrix would grow."""
    x = matrix_with_spectrum(*shape, SPECTRA[spectrum](min(shape)), generator)[0].to(dtype)
    for steps in (1, 2, 3, 5, 8, 12):
        out = orthogonalize(x, "gram", steps, dtype)
        plain = orthogonalize(x, "polar_express", steps, dtype)
        # From step 9 on each repeats x -> 1.875 x for what is rounding error in both.
        noise = 3e-4 if steps <= 8 else 3e-3
        torch.testing.assert_close(out, plain, rtol=0, atol=noise if dtype == torch.float32 else 1e-9)


def test_gram_of_imprecise_products_is_the_plain_iteration(generator: torch.Generator) -> None:
    """Products after ``torch.set_float32_matmul_precision`` would be too imprecise for Gram matrices."""
    x = matrix_with_spectrum(64, 128, SPECTRA["half rank"](64), generator)[0].float()
    torch.set_float32_matmul_precision("medium")
    for steps in (5, 8):
        assert torch.linalg.svdvals(orthogonalize(x, "gram", steps, torch.float32)).max() < 1.2


def test_qdwh_stays_exact_beside_imprecise_products() -> None:
    """It also restores the setting."""
    x = torch.randn(48, 64)
    torch.set_float32_matmul_precision("medium")
    values = torch.linalg.svdvals(orthogonalize(x, "qdwh", dtype=torch.float32).double())
    assert torch.get_float32_matmul_precision() == "medium"
    torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-5)


@pytest.mark.parametrize("smallest", [1e-1, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_qdwh_is_the_polar_factor(
    shape: tuple[int, int], dtype: torch.dtype, smallest: float, generator: torch.Generator
) -> None:
    values = torch.logspace(math.log10(smallest), 0, min(shape), dtype=torch.float64)
    x = matrix_with_spectrum(*shape, values, generator)[0].to(dtype)
    out = orthogonalize(x, "qdwh", dtype=dtype).double()
    gram = out.mT @ out if shape[0] > shape[1] else out @ out.mT
    exact = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(gram, torch.eye(min(shape), dtype=torch.float64), rtol=0, atol=exact)
    # One rounding of x turns its polar factor by as much over the smallest singular value, whoever computes it.
    attainable = 10 * torch.finfo(dtype).eps / smallest
    torch.testing.assert_close(out, reference.polar(x.double()), rtol=0, atol=max(exact, attainable))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spectrum", ["half rank", "rank one"])
@pytest.mark.parametrize("shape", [(8, 128), (128, 8), (96, 96)])
def test_qdwh_keeps_a_null_space_as_svd_does(
    shape: tuple[int, int], spectrum: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Weights that raise 1e-5 to 1 also raise rounding errors of float32 to a tenth."""
    values = SPECTRA[spectrum](min(shape))
    x, u, v = matrix_with_spectrum(*shape, values, generator)
    out = orthogonalize(x.to(dtype), "qdwh", dtype=dtype).double()
    expected = u @ torch.diag((values > 0).double()) @ v.T
    torch.testing.assert_close(out, expected, rtol=0, atol=3e-3 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_qdwh_steps_are_those_of_the_scalar_iteration(steps: int, generator: torch.Generator) -> None:
    """With fewer or more steps, too, the singular values are those of the published weights."""
    values = spectrum_down_to(1e-4, 12)
    x, u, v = matrix_with_spectrum(12, 40, values, generator)
    low = torch.finfo(torch.float64).eps ** (2 / 3)
    for _ in range(steps):
        d = (4 * (1 - low**2) / low**4) ** (1 / 3)
        a = math.sqrt(1 + d) + 0.5 * math.sqrt(8 - 4 * d + 8 * (2 - low**2) / (low**2 * math.sqrt(1 + d)))
        b = (a - 1) ** 2 / 4
        values, low = (s * (a + b * s**2) / (1 + (a + b - 1) * s**2) for s in (values, low))
        low = min(low, 1.0)
    out = orthogonalize(x, "qdwh", steps)
    torch.testing.assert_close(out, u @ torch.diag(values) @ v.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ALGORITHMS)
def test_scale_of_the_input_does_not_matter(method: str, dtype: torch.dtype, scale: float) -> None:
    x = torch.randn(2, 12, 20)
    plain = orthogonalize(x, method=method, dtype=dtype)
    scaled = orthogonalize(x * scale, method=method, dtype=dtype)
    # In bfloat16 the entries of the normalized matrix may round to the neighbour.
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("exponent", [-90, 90])
@pytest.mark.parametrize("method", ALGORITHMS)
def test_powers_of_two_change_no_bit(method: str, exponent: int) -> None:
    x = torch.randn(3, 12, 20)
    assert torch.equal(orthogonalize(x * 2.0**exponent, method), orthogonalize(x, method))


@pytest.mark.parametrize("scale", [1e-7, 1e4])
@pytest.mark.parametrize("method", ALGORITHMS)
def test_float16_input_of_any_size(method: str, scale: float) -> None:
    """Fault 5: a large finite half-precision gradient overflows if it is squared before it is normalized."""
    x = (torch.randn(12, 20) * scale).half()
    out = orthogonalize(x, method=method, dtype=torch.float32)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), reference.orthogonalize(x, method), rtol=0, atol=5e-3)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (2, 3, 4, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ALGORITHMS)
def test_zero_stays_zero(method: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Fault 1."""
    out = orthogonalize(torch.zeros(shape, dtype=dtype), method=method)
    assert out.shape == shape
    assert torch.equal(out, torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((6, 40), torch.float32), ((40, 6), torch.float32), ((16, 16), torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("method", reference.METHODS)
def test_rank_one_stays_rank_one(method: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Fault 6: nothing grows in the null space, and the one singular value is the image of 1 under the polynomial."""
    m, n = shape
    x = torch.outer(torch.randn(m), torch.randn(n))
    values = torch.linalg.svdvals(orthogonalize(x, method=method, dtype=dtype).double())
    low, high = RANGES[method, 1e-2]
    noise = 1e-3 if dtype == torch.float32 else 0.1
    assert low - noise <= values[0] <= high + noise
    # What is left elsewhere is the rounding error of x, times the polynomials' slope at zero (up to 8e4 for deepseek).
    if dtype == torch.float32:
        limit = 0.05 if method == "deepseek" else 1e-3
        assert values[1:].max() < limit
    else:
        assert values[1:].max() < 1.4


@pytest.mark.parametrize(
    ("shape", "dtype"), [((24, 96), torch.float32), ((96, 24), torch.float32), ((24, 24), torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("method", reference.METHODS)
def test_spectrum_down_to_a_millionth_stays_bounded(
    method: str, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Fault 6."""
    x, _, _ = matrix_with_spectrum(*shape, torch.logspace(-6, 0, min(shape), dtype=torch.float64), generator)
    values = torch.linalg.svdvals(orthogonalize(x.float(), method=method, dtype=dtype).double())
    assert values.max() < 1.5


@pytest.mark.parametrize("method", reference.METHODS)
def test_rank_deficient_keeps_its_null_space(method: str) -> None:
    left, right = torch.randn(12, 3, dtype=torch.float64), torch.randn(3, 20, dtype=torch.float64)
    x = left @ right
    out = orthogonalize(x, method=method, dtype=torch.float64)
    torch.testing.assert_close(out, reference.orthogonalize(x, method), rtol=0, atol=1e-8)
    assert torch.linalg.matrix_rank(out, rtol=1e-6) == 3


@pytest.mark.parametrize("method", reference.METHODS)
def test_top_direction_survives_bfloat16(method: str) -> None:
    """Near a zero of a polynomial, rounding decides the largest singular value and its sign."""
    for top in torch.arange(0.5, 1.0, 0.02).tolist():
        rest = math.sqrt((1 - top**2) / 7)
        for seed in range(3):
            values, generator = torch.tensor([top] + [rest] * 7), torch.Generator().manual_seed(seed)
            x, u, v = matrix_with_spectrum(8, 24, values, generator)
            aligned = (u.T @ orthogonalize(x, method=method, dtype=torch.bfloat16) @ v).diagonal()
            assert aligned[0] > RANGES[method, 1e-2][0] - 0.15, f"sigma {top:.2f} became {float(aligned[0]):.3f}"


@pytest.mark.parametrize(
    ("shape", "dtype"), [((8, 20), torch.float32), ((20, 8), torch.float32), ((12, 12), torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("method", ALGORITHMS)
def test_batch_equals_one_at_a_time(method: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Fault 27: matrices of other magnitudes in a batch have no effect."""
    scales = torch.tensor([1e-20, 1.0, 1e20, 1e-3, 0.0, 7.0]).view(2, 3, 1, 1)
    x = torch.randn(2, 3, *shape) * scales
    together = orthogonalize(x, method=method, dtype=dtype)
    assert together.shape == x.shape
    for i in range(2):
        for j in range(3):
            alone = orthogonalize(x[i, j], method=method, dtype=dtype)
            torch.testing.assert_close(together[i, j], alone, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("neighbour", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("method", ALGORITHMS)
def test_a_strange_neighbour_changes_no_bit(method: str, neighbour: float) -> None:
    """The values of one matrix in a batch must not change how the others are computed."""
    x = torch.randn(4, 6, 9)
    plain = orthogonalize(x, method=method, dtype=torch.float32)
    x[1] *= neighbour
    assert torch.equal(orthogonalize(x, method=method, dtype=torch.float32)[[0, 2, 3]], plain[[0, 2, 3]])


@pytest.mark.parametrize("scale", [1e-300, 1e-40, 1e300])
@pytest.mark.parametrize("method", ALGORITHMS)
def test_scale_of_float64_input_does_not_matter(method: str, scale: float) -> None:
    x = torch.randn(2, 6, 9, dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(x * scale, method), orthogonalize(x, method), rtol=0, atol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("method", ALGORITHMS)
def test_nonfinite_stays_in_its_matrix(method: str, bad: float) -> None:
    x = torch.randn(4, 6, 9)
    clean = orthogonalize(x, method=method, dtype=torch.float32)
    x[2, 3, 1] = bad
    out = orthogonalize(x, method=method, dtype=torch.float32)
    assert out[2].isnan().any()
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("method", ALGORITHMS)
def test_input_is_not_modified(method: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Fault 7: ``.bfloat16()`` of a bfloat16 tensor is that tensor."""
    x = torch.randn(shape).to(dtype)
    before, version = x.clone(), x._version
    out = orthogonalize(x, method=method, dtype=dtype)
    assert torch.equal(x, before)
    assert x._version == version
    assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-25])
@pytest.mark.parametrize("method", ALGORITHMS)
def test_overwriting_changes_no_bit_and_nothing_else(method: str, scale: float, dtype: torch.dtype) -> None:
    """If the matrices are part of a larger tensor, the rest of it does not change."""
    base = torch.randn(5, 8, 24) * scale
    for cut in (base[1:3], base[1:3].mT, base[1:3, :, ::2], base[1:3, :4], base[1].expand(3, 8, 24)):
        mine = base.clone()
        view = mine.as_strided(cut.shape, cut.stride(), cut.storage_offset())
        out = orthogonalize(view, method, dtype=dtype, overwrite=True)
        assert torch.equal(out, orthogonalize(cut, method, dtype=dtype))
        untouched = torch.ones_like(base, dtype=torch.bool)
        untouched.as_strided(cut.shape, cut.stride(), cut.storage_offset()).fill_(False)
        assert torch.equal(mine[untouched], base[untouched])


@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 16, 128), (3, 128, 16), (3, 48, 96)])
@pytest.mark.parametrize("method", [method for method in ALGORITHMS if method != "svd"])
def test_temporary_memory_is_two_stacks(method: str, shape: tuple[int, ...]) -> None:
    """Two stacks with ``overwrite=True``, a third one without."""
    small = 0.05
    for overwrite, stacks in ((True, 2), (False, 3)):
        x = torch.randn(shape)
        with LiveMemory() as live:
            orthogonalize(x, method, dtype=torch.float32, overwrite=overwrite)
        assert 0 < live.peak <= (stacks + small) * x.nbytes


@pytest.mark.parametrize("method", ALGORITHMS)
def test_strides_do_not_matter(method: str) -> None:
    base = torch.randn(3, 20, 24)
    for view in (base.mT, base[:, ::2, ::3], base[:, 3], base[:, :5].expand(3, 5, 24), torch.randn(1, 9).expand(4, 9)):
        torch.testing.assert_close(
            orthogonalize(view, method=method, dtype=torch.float32),
            orthogonalize(view.contiguous(), method=method, dtype=torch.float32),
            rtol=0,
            atol=1e-4,
        )


@pytest.mark.parametrize("shape", [(0, 5, 6), (4, 0, 6), (4, 5, 0), (0, 0), (0, 7)])
def test_empty_input(shape: tuple[int, ...]) -> None:
    for method in reference.METHODS:
        assert orthogonalize(torch.empty(shape), method=method).shape == shape


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("method", ALGORITHMS)
def test_a_vector_becomes_its_direction(method: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    out = orthogonalize(x, method=method, dtype=torch.float64)
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    length = torch.linalg.matrix_norm(out, keepdim=True)
    torch.testing.assert_close(out / length, x / norm, rtol=0, atol=1e-10)
    low, high = RANGES[method, 1e-2]
    assert length.min() >= low - 1e-2
    assert length.max() <= high + 1e-2


def test_default_dtype_keeps_the_input_dtype_and_is_right() -> None:
    """Fault 35: the default dtype on this device is fast but precise enough."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(16, 24).to(dtype)
        out = orthogonalize(x, method="deepseek")
        assert out.dtype == dtype
        gram = out.double() @ out.double().T
        torch.testing.assert_close(gram, torch.eye(16, dtype=torch.float64), rtol=0, atol=0.06)


def test_float64_is_computed_in_float64_by_default() -> None:
    x = torch.randn(8, 12, dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(x), reference.orthogonalize(x), rtol=0, atol=1e-10)


def test_builds_no_graph() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    assert not orthogonalize(x).requires_grad


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"method": "newton"}, "newton"),
        ({"method": "jordan", "steps": 0}, "0"),
        ({"method": "jordan", "steps": -1}, "-1"),
        ({"method": "jordan", "steps": 100}, "100"),
        ({"method": "jordan", "steps": 2.5}, "2.5"),
        ({"dtype": torch.int32}, "int32"),
        ({"dtype": torch.float16}, "float16"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        orthogonalize(torch.randn(4, 6), **arguments)


def test_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"jordan.*svd"):
        orthogonalize(torch.randn(4, 6), method="newton")


@pytest.mark.parametrize(
    "bad",
    [torch.randn(5), torch.tensor(1.0), torch.ones(4, 6, dtype=torch.int64), torch.randn(4, 6, dtype=torch.complex64)],
)
def test_input_without_matrices_or_not_real_is_refused(bad: Tensor) -> None:
    with pytest.raises((TypeError, ValueError), match="orthogonalize"):
        orthogonalize(bad)
