"""Spectral measures: against numpy in float64, torch, limits, scale, batches, degenerate input, warm starts, errors."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_muon.linalg import (
    Spectra,
    condition_number,
    effective_rank,
    estimate_spectra,
    exact_spectra,
    lanczos,
    orthogonality_error,
    participation_ratio,
    singular_values,
    spectral_norm,
    stable_rank,
)
from tests.linalg.matrices import CASES, with_spectrum

Measure = Callable[[Tensor], Tensor]
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.9)
MEASURES: dict[str, Measure] = {
    "spectral_norm": spectral_norm,
    "stable_rank": stable_rank,
    "participation_ratio": participation_ratio,
    "effective_rank": effective_rank,
    "orthogonality_error": orthogonality_error,
}
RANKS = ("stable_rank", "participation_ratio", "effective_rank")
# All that maps matrices (...) to numbers (...).
EVERYTHING: dict[str, Measure] = MEASURES | {
    "condition_number": condition_number,
    "condition_number of a quantile": lambda x: condition_number(x, 0.3),
    "largest singular value": lambda x: singular_values(x)[..., 0],
    "smallest singular value": lambda x: singular_values(x)[..., -1],
    "lanczos": lambda x: lanczos(x)[0],
    "exact": lambda x: exact_spectra(x).frobenius_norm,
    "estimate": lambda x: estimate_spectra(x)[0].stable_rank,
    "estimate without Gram": lambda x: estimate_spectra(x, gram=False)[0].stable_rank,
}


def written_out(matrix: Tensor) -> dict[str, float]:
    """The measures of one matrix in float64, by their formulas."""
    x = matrix.detach().double().numpy()
    m, n = x.shape
    r = min(m, n)
    if not x.any():
        return dict.fromkeys(MEASURES, 0.0) | {"orthogonality_error": 1.0}
    s = np.linalg.svd(x, compute_uv=False)
    gram = x.T @ x if m >= n else x @ x.T
    p = s[s > 0] / s.sum()
    return {
        "spectral_norm": float(s[0]),
        "stable_rank": float((x**2).sum() / s[0] ** 2),
        "participation_ratio": float(np.trace(gram) ** 2 / (gram**2).sum()),
        "effective_rank": float(np.exp(-(p * np.log(p)).sum())),
        "orthogonality_error": float(np.linalg.norm(gram / ((x**2).sum() / r) - np.eye(r)) / math.sqrt(r)),
    }


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in CASES for dtype in (torch.float64, torch.float32)]
    + [(case, dtype) for case in ("tall", "wide", "offset") for dtype in (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_equals_the_formula(case: str, dtype: torch.dtype) -> None:
    """The input may have low precision; the arithmetic never has."""
    x = CASES[case].to(dtype)
    wanted = written_out(x)
    # Where rounding adds up: the error of an orthogonal matrix, and the entropy of singular values that are 0.
    rtol, atol = (1e-9, 1e-12) if dtype == torch.float64 else (1e-4, 3e-6)
    for name, measure in MEASURES.items():
        out = measure(x)
        assert out.shape == (), name
        assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        assert float(out) == pytest.approx(wanted[name], rel=rtol, abs=atol), name
        torch.testing.assert_close(measure(x.mT), out, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_singular_values_equal_numpy(case: str, dtype: torch.dtype) -> None:
    x = CASES[case].to(dtype)
    out = singular_values(x)
    wanted = torch.from_numpy(np.linalg.svd(x.double().numpy(), compute_uv=False))
    # A backward stable decomposition is exact relative to the largest value.
    atol = (1e-13 if dtype == torch.float64 else 3e-6) * float(wanted[0])
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=atol)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("case", ["tall", "wide", "offset", "one row", "one number", "repeated", "orthogonal"])
def test_condition_number_of_a_quantile_of_numpy(case: str) -> None:
    x = CASES[case].float()
    s = np.linalg.svd(x.double().numpy(), compute_uv=False)
    for quantile in QUANTILES:
        wanted = float(s[0] / np.quantile(s, quantile))
        # The error of the smallest singular value is relative to the largest.
        assert float(condition_number(x, quantile)) == pytest.approx(wanted, rel=1e-4 + 1e-6 * wanted)
        assert float(condition_number(x.double(), quantile)) == pytest.approx(wanted, rel=1e-9)
        assert float(exact_spectra(x.double()).condition_number(quantile)) == pytest.approx(wanted, rel=1e-9)


def test_condition_number_of_graded_and_singular_matrices() -> None:
    graded = with_spectrum(8, 11, 10.0 ** -torch.arange(8.0, dtype=torch.float64))
    assert float(condition_number(graded)) == pytest.approx(1e7, rel=1e-6)
    assert float(condition_number(graded, 0.5)) == pytest.approx(1 / 5.5e-4, rel=1e-9)
    diagonal = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.0, 0.0]))
    for quantile, wanted in {0.0: math.inf, 0.25: math.inf, 0.5: 4.0, 0.375: 8.0, 0.75: 2.0}.items():
        assert float(condition_number(diagonal, quantile)) == pytest.approx(wanted)
    assert float(condition_number(torch.zeros(3, 4))) == math.inf
    assert float(condition_number(torch.zeros(3, 4), 0.7)) == math.inf


@pytest.mark.parametrize("case", ["tall", "wide", "square", "one row", "one column", "offset"])
def test_agrees_with_torch(case: str) -> None:
    x = CASES[case].float()
    torch.testing.assert_close(spectral_norm(x), torch.linalg.matrix_norm(x, ord=2), rtol=1e-5, atol=0)
    torch.testing.assert_close(singular_values(x), torch.linalg.svdvals(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(condition_number(x.double()), torch.linalg.cond(x.double()))
    frobenius = torch.linalg.matrix_norm(x)
    for found in (exact_spectra(x), estimate_spectra(x)[0], estimate_spectra(x, gram=False)[0]):
        torch.testing.assert_close(found.frobenius_norm, frobenius, rtol=1e-5, atol=0)
    assert bool(torch.allclose(stable_rank(x), (frobenius / torch.linalg.matrix_norm(x, ord=2)) ** 2, rtol=1e-5))


def test_limits() -> None:
    """Ranks are r for equal singular values and 1 for one; the error is 0 and sqrt(r - 1)."""
    for shape in ((16, 16), (40, 9), (9, 40)):
        r = min(shape)
        equal = with_spectrum(*shape, torch.full((r,), 0.3)).float()
        one = with_spectrum(*shape, torch.tensor([0.3])).float()
        for name in RANKS:
            assert float(MEASURES[name](equal)) == pytest.approx(r, rel=1e-5)
            assert float(MEASURES[name](one)) == pytest.approx(1, rel=1e-4)
        assert float(orthogonality_error(equal)) == pytest.approx(0, abs=1e-5)
        assert float(orthogonality_error(one)) == pytest.approx(math.sqrt(r - 1), rel=1e-5)
        assert float(condition_number(equal)) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-20])
@pytest.mark.parametrize("case", ["tall", "wide", "rank one", "one number", "orthogonal"])
def test_any_size_of_the_entries(case: str, scale: float) -> None:
    """Squares would leave the range of float32 far earlier, also beside matrices of other magnitudes in a batch."""
    x = CASES[case].float()
    batch = torch.stack([x, x * scale, x / scale])
    for name, measure in EVERYTHING.items():
        if case == "rank one" and name.startswith(("condition", "smallest")):
            continue  # rounding decides
        out, plain = measure(batch), float(measure(x))
        homogeneous = name in ("spectral_norm", "lanczos", "exact") or "singular value" in name
        factors = [1.0, scale, 1 / scale] if homogeneous else [1.0, 1.0, 1.0]
        for value, factor in zip(out.tolist(), factors, strict=True):
            assert value / factor == pytest.approx(plain, rel=1e-4, abs=1e-5 if "ortho" in name else 0), name
    torch.testing.assert_close(lanczos(batch, lanczos(batch)[1])[0], spectral_norm(batch), rtol=0.02, atol=0)


@pytest.mark.parametrize("shape", [(2, 3, 8, 5), (1, 2, 2, 4, 9), (2, 0, 6, 4)])
@pytest.mark.parametrize("name", EVERYTHING)
def test_batches_are_matrices_one_at_a_time(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * torch.logspace(-1, 1, shape[-1])
    out = EVERYTHING[name](x)
    assert out.shape == shape[:-2]
    for index in np.ndindex(*shape[:-2]):
        torch.testing.assert_close(out[index], EVERYTHING[name](x[index]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 8, 5), (0, 4, 6)])
def test_shapes_of_what_is_not_a_number_a_matrix(shape: tuple[int, ...]) -> None:
    x, r = torch.randn(shape), min(shape[-2:])
    _, vectors = lanczos(x)
    assert singular_values(x).shape == vectors.shape == (*shape[:-2], r)
    assert lanczos(x, vectors)[1].shape == vectors.shape
    assert estimate_spectra(x, vectors)[1].shape == vectors.shape
    for found in (exact_spectra(x), estimate_spectra(x)[0]):
        assert found.size == r
        assert found.spectral_norm.shape == found.frobenius_norm.shape == found.stable_rank.shape == shape[:-2]


@pytest.mark.parametrize("name", EVERYTHING)
def test_strides_do_not_matter_and_inputs_stay(name: str) -> None:
    measure, big = EVERYTHING[name], torch.randn(3, 14, 20)
    before = big.clone()
    views = [big.mT, big[..., ::2], big[:, 1::3, 2:9], big.permute(1, 0, 2), big[1].expand(2, 14, 20), big.flip(1)]
    for view in views:
        torch.testing.assert_close(measure(view), measure(view.clone(memory_format=torch.contiguous_format)))
    for dtype in (torch.float64, torch.bfloat16):
        same = big.to(dtype)
        copy = same.clone()
        measure(same)
        assert torch.equal(same, copy)
    assert torch.equal(big, before)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("name", EVERYTHING)
def test_nonfinite_stays_in_its_matrix(name: str, bad: float) -> None:
    measure, x = EVERYTHING[name], torch.randn(4, 6, 9)
    clean = measure(x)
    x[2, 3, 1] = bad
    out = measure(x)
    assert out[2].isnan()
    torch.testing.assert_close(out[[0, 1, 3]], clean[[0, 1, 3]], rtol=1e-6, atol=0)
    assert measure(x[2]).isnan()
    assert measure(torch.full((2, 3, 4), bad)).isnan().all()
    assert singular_values(x)[2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_decomposition_that_does_not_converge_ends_no_run(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(matrices: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("failed to converge")

    for name in ("svdvals", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, fail)
    x = torch.randn(2, 4, 6, dtype=dtype)
    values = singular_values(x)
    assert values.shape == (2, 4)
    assert values.dtype == dtype
    assert values.isnan().all()
    assert effective_rank(x).isnan().all()


def test_spectra_of_both_passes() -> None:
    x = torch.stack([CASES["tall"], with_spectrum(40, 12, torch.arange(12.0)), CASES["tall"] * 0]).float()
    exact, (estimate, vectors), lean = (
        exact_spectra(x),
        estimate_spectra(x, iterations=200),
        estimate_spectra(x, gram=False),
    )
    assert (exact.size, estimate.size, lean[0].size) == (12, 12, 12)
    assert torch.equal(exact.singular_values, singular_values(x))
    assert estimate.singular_values is None
    assert lean[0].singular_values is None
    assert lean[0].orthogonality_error is None
    for name, measure in MEASURES.items():
        torch.testing.assert_close(getattr(exact, name), measure(x), rtol=1e-4, atol=1e-5)
        if name != "effective_rank":
            torch.testing.assert_close(getattr(estimate, name), measure(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        estimate_spectra(x, vectors, gram=False)[0].spectral_norm, spectral_norm(x), rtol=0.01, atol=0
    )
    torch.testing.assert_close(exact.condition_number(0.2), condition_number(x, 0.2))
    torch.testing.assert_close(lean[0].stable_rank, stable_rank(x), rtol=0.1, atol=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        exact.size = 3


def test_spectra_say_what_was_not_measured() -> None:
    x = torch.randn(2, 5, 8)
    estimate, lean = estimate_spectra(x)[0], estimate_spectra(x, gram=False)[0]
    reads: list[tuple[Spectra, Callable[[Spectra], Tensor]]] = [
        (estimate, lambda spectra: spectra.effective_rank),
        (estimate, lambda spectra: spectra.condition_number()),
        (estimate, lambda spectra: spectra.condition_number(0.1)),
        (lean, lambda spectra: spectra.participation_ratio),
        (lean, lambda spectra: spectra.effective_rank),
    ]
    for spectra, read in reads:
        with pytest.raises(ValueError, match=r"measured|exact_spectra|gram"):
            read(spectra)


@pytest.mark.parametrize("name", EVERYTHING)
def test_global_state_is_neither_used_nor_changed(name: str) -> None:
    """Global state means random numbers and the precision of products."""
    measure, x = EVERYTHING[name], torch.randn(2, 64, 96) * torch.logspace(-1, 1, 96)
    before, wanted = torch.get_rng_state(), measure(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(measure(x), wanted)
    torch.set_float32_matmul_precision("medium")
    torch.testing.assert_close(measure(x), wanted, rtol=1e-6, atol=0)
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("name", EVERYTHING)
def test_defaults_of_new_tensors_do_not_matter(name: str) -> None:
    measure, x = EVERYTHING[name], torch.randn(2, 64, 96)
    wanted = measure(x)
    with torch.device("meta"):
        torch.testing.assert_close(measure(x), wanted)
    torch.set_default_dtype(torch.float64)
    torch.testing.assert_close(measure(x), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", EVERYTHING)
def test_autocast_does_not_make_it_coarse(name: str) -> None:
    measure, x = EVERYTHING[name], torch.randn(2, 64, 96) * torch.logspace(-1, 1, 96)
    wanted = measure(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(measure(x), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", EVERYTHING)
def test_parameters_are_welcome(name: str) -> None:
    weight = torch.nn.Parameter(torch.randn(2, 5, 7))
    torch.testing.assert_close(EVERYTHING[name](weight).detach(), EVERYTHING[name](weight.detach()))
    assert weight.grad is None


@pytest.mark.parametrize("bad", [-0.1, 1.0, 10, math.nan])
def test_bad_quantile_is_named(bad: float) -> None:
    x = torch.randn(4, 6)
    for run in (condition_number, lambda x, q: exact_spectra(x).condition_number(q)):
        with pytest.raises(ValueError, match=rf"quantile.*{bad}"):
            run(x, bad)


@pytest.mark.parametrize("bad", [torch.randn(5), torch.tensor(1.0), torch.ones(4, 6).int(), torch.ones(4, 6).cfloat()])
def test_input_without_matrices_or_not_real_is_refused(bad: Tensor) -> None:
    named = re.escape(str(tuple(bad.shape)) if bad.ndim < 2 else str(bad.dtype))
    for function in (*MEASURES.values(), condition_number):
        with pytest.raises(TypeError, match=named):
            function(bad)
    for run in (singular_values, lanczos, exact_spectra, estimate_spectra):
        with pytest.raises(TypeError, match=rf"{run.__name__}.*{named}"):
            run(bad)


@pytest.mark.parametrize("name", EVERYTHING)
def test_matrices_without_entries_are_refused(name: str) -> None:
    for shape in ((0, 4), (3, 0, 5), (0, 0)):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            EVERYTHING[name](torch.ones(shape))


@pytest.mark.parametrize(("shape", "condition", "rtol"), [((40, 12), 1e6, 1e-4), ((512, 256), 1e5, 1e-5)])
def test_small_singular_values_of_float32_matrices_are_not_rounded_away(
    shape: tuple[int, int], condition: float, rtol: float
) -> None:
    """Scaling loses no precision, although the largest entry is not a power of two."""
    generator = torch.Generator().manual_seed(3)
    m, n = shape
    left, _ = torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    matrix = (3.7 * (left * torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)) @ right).float()
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    assert float(condition_number(matrix)) == pytest.approx(expected[0] / expected[-1], rel=rtol)
