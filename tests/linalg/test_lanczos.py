"""Power iteration: direction, bounds, fixed and warm starts, drift, overtaking, old start vectors, errors."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_muon.linalg import estimate_spectra, lanczos, spectral_norm
from tests.linalg.matrices import CASES, with_spectrum


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (20, 20), (1, 9), (9, 1)])
def test_power_iteration_finds_norm_and_direction(shape: tuple[int, int]) -> None:
    """The vector is the leading singular vector on the smaller side."""
    r = min(shape)
    x = with_spectrum(*shape, 0.5 ** torch.arange(r)).float()
    norm, vector = lanczos(x)
    assert float(norm) == pytest.approx(1.0, rel=1e-5)
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    sides = [u[:, 0]] if shape[0] < shape[1] else [v[0]] if shape[0] > shape[1] else [u[:, 0], v[0]]
    cosines = [abs(float(vector.double() @ side) / float(vector.norm())) for side in sides]
    assert max(cosines) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_power_iteration_stays_below_and_comes_near(case: str) -> None:
    x = CASES[case].float()
    exact = float(spectral_norm(x))
    # An average over the spectrum at worst, within what 100 iterations cannot tell apart at best.
    for iterations, lowest in {1: 0.5, 2: 0.6, 16: 0.9, 100: 0.999}.items():
        norm, vectors = lanczos(x, iterations=iterations)
        warm = float(lanczos(x, vectors, iterations=iterations)[0])
        assert vectors.isfinite().all()
        assert lowest * exact <= float(norm) <= exact * (1 + 1e-6)
        assert lowest * exact <= warm <= exact * (1 + 1e-6)


@pytest.mark.parametrize("direction", ["first", "last", "alternating", "difference", "halves", "wave", "squares"])
@pytest.mark.parametrize("size", [2, 17])
def test_fixed_start_is_blind_to_no_likely_direction(size: int, direction: str) -> None:
    index = torch.arange(size, dtype=torch.float32)
    v = {
        "first": (index == 0).float(),
        "last": (index == size - 1).float(),
        "alternating": (-1.0) ** index,
        "difference": (index == 0).float() - (index == 1).float(),
        "halves": (index < size // 2).float() / (size // 2) - (index >= size // 2).float() / (size - size // 2),
        "wave": torch.cos(math.pi * (index + 0.5) / size),
        "squares": index**2 - (index**2).mean(),
    }[direction]
    v = v / v.norm()
    for x in (torch.outer(v, v), torch.eye(size) + 3 * torch.outer(v, v), torch.outer(v, torch.ones(20))):
        torch.testing.assert_close(lanczos(x)[0], spectral_norm(x), rtol=1e-3, atol=0)


def test_warm_start_continues() -> None:
    x = torch.randn(3, 200, 300)
    exact, vectors = spectral_norm(x), None
    cold = lanczos(x, iterations=1)[0]
    for _ in range(60):
        _, vectors = lanczos(x, vectors, iterations=4)
    warm, _ = lanczos(x, vectors, iterations=1)
    assert (cold < 0.85 * exact).all()
    torch.testing.assert_close(warm, exact, rtol=0.01, atol=0)
    assert (warm <= exact * (1 + 1e-6)).all()
    estimate, _ = estimate_spectra(x, vectors, iterations=1)
    torch.testing.assert_close(estimate.spectral_norm, warm, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("shape", "estimate"), [((512, 512), False), ((128, 512), True), ((512, 128), False)], ids=str)
def test_drifting_gaussian_is_followed_to_one_percent(shape: tuple[int, int], estimate: bool) -> None:
    """The spectrum has no gap at the top, and the weights change by one percent between calls."""
    x, vectors, errors = torch.randn(shape), None, []
    for call in range(40):
        if estimate:
            spectra, vectors = estimate_spectra(x, vectors)
            norm = spectra.spectral_norm
        else:
            norm, vectors = lanczos(x, vectors, iterations=4)
        if call >= 19 and call % 5 == 4:
            errors.append(1 - float(norm / torch.linalg.matrix_norm(x, ord=2)))
        x = math.sqrt(1 - 1e-4) * x + 1e-2 * torch.randn(shape)
    assert max(errors) < 0.01
    assert min(errors) > -1e-6


@pytest.mark.parametrize("grows", [1.05, 10.0])
@pytest.mark.parametrize("diagonal", [True, False])
def test_direction_that_overtakes_is_found(diagonal: bool, grows: float) -> None:
    """For a diagonal matrix nothing, not even rounding, turns the old direction to the new one."""
    sizes = torch.full((64,), 0.5)
    sizes[5], sizes[40] = 2.0, 1.0
    u, v = (torch.eye(64), torch.eye(64)) if diagonal else (torch.linalg.qr(torch.randn(64, 64)).Q for _ in range(2))
    vectors = None
    for _ in range(50):
        norm, vectors = lanczos((u * sizes) @ v.T, vectors, iterations=4)
    assert float(norm) == pytest.approx(2.0, rel=1e-3)
    sizes[40] = 2.0 * grows
    for _ in range(20):
        norm, vectors = lanczos((u * sizes) @ v.T, vectors, iterations=4)
    assert float(norm) == pytest.approx(2.0 * grows, rel=0.01)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_vectors_of_a_useless_matrix_do_no_harm_later(bad: float) -> None:
    """After a zero-initialized weight or a bad step come good weights."""
    x = with_spectrum(8, 12, 0.5 ** torch.arange(8)).float().expand(3, 8, 12).clone()
    useless = x.clone()
    useless[1] = bad
    _, vectors = lanczos(useless)
    torch.testing.assert_close(lanczos(x, vectors)[0], torch.ones(3), rtol=1e-5, atol=0)
    _, vectors = estimate_spectra(useless, vectors)
    torch.testing.assert_close(estimate_spectra(x, vectors)[0].spectral_norm, torch.ones(3), rtol=1e-5, atol=0)


def test_vectors_carry_no_graph_and_are_not_modified() -> None:
    """They are kept between steps, so a graph would keep the graphs of all steps alive."""
    weight = torch.nn.Parameter(torch.randn(2, 5, 7))
    for run in (lanczos, estimate_spectra):
        _, vectors = run(weight)
        before = vectors.clone()
        _, again = run(weight, vectors)
        assert not vectors.requires_grad
        assert not again.requires_grad
        assert torch.equal(vectors, before)


@pytest.mark.parametrize("kept", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_vectors_may_have_another_dtype(dtype: torch.dtype, kept: torch.dtype) -> None:
    """It changes with a checkpoint, or a cast of the model after training."""
    x = torch.randn(2, 5, 7).to(dtype)
    norm, vectors = lanczos(x, lanczos(x)[1].to(kept))
    assert norm.dtype == vectors.dtype == lanczos(x)[0].dtype
    torch.testing.assert_close(norm, spectral_norm(x), rtol=0.01, atol=0)


@pytest.mark.parametrize("shape", [(3,), (8,), (2, 6), (1, 5), (3, 5), (5, 2), (2, 5, 1)])
def test_vectors_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 5, 8)
    for run in (lanczos, estimate_spectra):
        with pytest.raises(ValueError, match=r"vectors.*\(2, 5\)"):
            run(x, torch.ones(shape))


@pytest.mark.parametrize("bad", [0, -3])
def test_bad_iterations_are_named(bad: int) -> None:
    for run in (lanczos, estimate_spectra):
        with pytest.raises(ValueError, match=rf"iterations.*{bad}"):
            run(torch.randn(4, 6), iterations=bad)
