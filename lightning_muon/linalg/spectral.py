"""Statistics of the singular values of matrices: norms, ranks, distance from orthogonality."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muon.linalg.newton_schulz import exact_products
from lightning_muon.linalg.scale import check_matrices, largest_magnitude

_MIX = 0.1
"""Share of the fixed start that is added to a warm vector; the iterations undo the loss of precision."""


@dataclass(frozen=True)
class Spectra:
    """Results of one pass over matrices X (..., m, n) with r = min(m, n) singular values s_1 >= ... >= s_r.

    Args:
        size: r.
        spectral_norm: s_1, (...).
        frobenius_norm: root of the sum of the s_i^2, (...).
        orthogonality_error: see :func:`orthogonality_error`, (...); None where it was not measured.
        singular_values: (..., r), descending; None where the matrices were not decomposed.

    Raises:
        ValueError: by what needs a quantity that is None.
    """

    size: int
    spectral_norm: Tensor
    frobenius_norm: Tensor
    orthogonality_error: Tensor | None = None
    singular_values: Tensor | None = None

    @property
    def stable_rank(self) -> Tensor:
        """See :func:`stable_rank`, (...)."""
        rank = (self.frobenius_norm / self.spectral_norm).square()
        return torch.where(self.spectral_norm == 0, 0.0, rank)

    @property
    def participation_ratio(self) -> Tensor:
        """See :func:`participation_ratio`, (...)."""
        error = self._measured("orthogonality_error")
        return torch.where(self.frobenius_norm == 0, 0.0, self.size / (1 + error.square()))

    @property
    def effective_rank(self) -> Tensor:
        """See :func:`effective_rank`, (...)."""
        values = self._measured("singular_values")
        total = values.sum(-1)
        shares = values / torch.where(total == 0, 1.0, total)[..., None]
        return torch.where(total == 0, 0.0, torch.special.entr(shares).sum(-1).exp())

    def condition_number(self, quantile: float = 0.0) -> Tensor:
        """See :func:`condition_number`, (...)."""
        values = self._measured("singular_values")
        if not 0.0 <= quantile < 1.0:
            raise ValueError(f"quantile must be in [0, 1), got {quantile}.")
        position = (1 - quantile) * (self.size - 1)
        above = int(position)
        below = min(above + 1, self.size - 1)
        small = torch.lerp(values[..., above], values[..., below], position - above)
        return torch.where(small == 0, torch.inf, values[..., 0] / small)

    def _measured(self, name: str) -> Tensor:
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"These spectra hold no {name.replace('_', ' ')}: exact_spectra measures everything.")
        return value


def exact_spectra(matrices: Tensor) -> Spectra:
    """Compute all statistics from the singular values.

    Args:
        matrices: (..., m, n), floating point. bfloat16 and float16 are computed in float32.

    Returns:
        Spectra of batch shape (...), NaN for matrices that hold NaN or infinity.

    Raises:
        TypeError: if ``matrices`` is not a floating-point tensor (..., m, n).
    """
    check_matrices("exact_spectra", matrices)
    values = singular_values(matrices)
    size = values.shape[-1]
    norm = values[..., 0]
    scaled = values / torch.where(norm == 0, 1.0, norm)[..., None]
    frobenius = torch.linalg.vector_norm(scaled, dim=-1)
    square = scaled.square() * (size / torch.where(norm == 0, 1.0, frobenius).square())[..., None]
    error = torch.linalg.vector_norm(square - 1, dim=-1) / size**0.5
    return Spectra(size, norm, frobenius * norm, error, values)


def estimate_spectra(
    matrices: Tensor, vectors: Tensor | None = None, *, iterations: int = 16, gram: bool = True
) -> tuple[Spectra, Tensor]:
    """Compute the cheap statistics: no singular values, and the spectral norm by :func:`lanczos`.

    Args:
        matrices: (..., m, n), floating point. bfloat16 and float16 are computed in float32.
        vectors: (..., r), what an earlier call returned, for a warm start.
        iterations: of the Lanczos method.
        gram: whether to form the Gram matrices, which the orthogonality error and the participation ratio need.

    Returns:
        Spectra of batch shape (...), and the vectors for the next call.

    Raises:
        TypeError: if ``matrices`` is not a floating-point tensor (..., m, n).
        ValueError: for vectors of another shape, or less than one iteration.
    """
    check_matrices("estimate_spectra", matrices)
    scaled = _Scaled(matrices)
    frobenius = torch.linalg.vector_norm(scaled.matrices.flatten(1), dim=1)
    error = None
    product = None
    if gram:
        with _float_products(scaled.tall):
            product = scaled.tall.mT @ scaled.tall
    norm, vectors = _iterate(scaled.tall, product, scaled.start(vectors), iterations)
    if product is not None:
        product.mul_((scaled.size / torch.where(frobenius == 0, 1.0, frobenius).square())[:, None, None])
        product.diagonal(dim1=-2, dim2=-1).sub_(1)
        error = scaled.answer(torch.linalg.vector_norm(product.flatten(1), dim=1) / scaled.size**0.5)
    spectra = Spectra(scaled.size, scaled.rescaled(norm), scaled.rescaled(frobenius), error)
    return spectra, vectors.reshape((*scaled.batch, scaled.size))


def singular_values(matrices: Tensor) -> Tensor:
    """All singular values, descending: (..., m, n) -> (..., min(m, n)).

    Raises:
        TypeError: if ``matrices`` is not a floating-point tensor (..., m, n).
    """
    check_matrices("singular_values", matrices)
    scaled = _Scaled(matrices)
    return scaled.rescaled(_decompose(scaled.tall))


def lanczos(matrices: Tensor, vectors: Tensor | None = None, iterations: int = 16) -> tuple[Tensor, Tensor]:
    """The spectral norm from below, by the Lanczos method: the best vector in the span of all iterates with X^T X.

    Sixteen iterations came within 0.3 % on Gaussian matrices and updates of Muon, whose singular values lie close
    together. Without ``vectors`` it begins with a fixed vector, which takes no random numbers. With ``vectors`` it
    goes on from an earlier call, on matrices that may have changed a little. A tenth of the fixed vector is added, so
    that a new leading direction is found. Four iterations per call are then enough.

    Args:
        matrices: (..., m, n), floating point. bfloat16 and float16 are computed in float32.
        vectors: (..., r) with r = min(m, n), what an earlier call returned.
        iterations: products with X^T X.

    Returns:
        Norms (...) and vectors (..., r): right singular vectors of tall matrices, left ones of wide ones.

    Raises:
        TypeError: if ``matrices`` is not a floating-point tensor (..., m, n).
        ValueError: for vectors of another shape, or less than one iteration.
    """
    check_matrices("lanczos", matrices)
    spectra, vectors = estimate_spectra(matrices, vectors, iterations=iterations, gram=False)
    return spectra.spectral_norm, vectors


def spectral_norm(matrices: Tensor) -> Tensor:
    """Largest singular value s_1, exact: (..., m, n) -> (...)."""
    return singular_values(matrices)[..., 0]


def stable_rank(matrices: Tensor) -> Tensor:
    """||X||_F^2 / s_1^2: (..., m, n) -> (...), in [1, r]; 0 for zero.

    How many directions are about as large as the leading one.
    """
    return exact_spectra(matrices).stable_rank


def participation_ratio(matrices: Tensor) -> Tensor:
    """(sum s_i^2)^2 / sum s_i^4: (..., m, n) -> (...), in [1, r]; 0 for zero.

    How many directions share the energy s_i^2; equals (tr G)^2 / ||G||_F^2 for the Gram matrix G.
    """
    return estimate_spectra(matrices, iterations=1)[0].participation_ratio


def effective_rank(matrices: Tensor) -> Tensor:
    """exp(-sum p_i ln p_i) with p_i = s_i / sum s: (..., m, n) -> (...), in [1, r]; 0 for zero.

    The entropy rank of Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    return exact_spectra(matrices).effective_rank


def orthogonality_error(matrices: Tensor) -> Tensor:
    """||G / q^2 - I||_F / sqrt(r): (..., m, n) -> (...), in [0, sqrt(r - 1)]; 1 for zero.

    G is the r x r Gram matrix of rows or columns, whichever are fewer, and q^2 = ||X||_F^2 / r the mean of the s_i^2,
    so that the scale of X does not matter. 0 if and only if all singular values are equal.
    """
    error = estimate_spectra(matrices, iterations=1)[0].orthogonality_error
    assert error is not None
    return error


def condition_number(matrices: Tensor, quantile: float = 0.0) -> Tensor:
    """s_1 over a quantile of the singular values: (..., m, n) -> (...), 1 or more; infinity if that is 0.

    Args:
        matrices: (..., m, n), floating point.
        quantile: 0 for the smallest singular value; 0.1 for the one that a tenth lies below, interpolated linearly.

    Raises:
        ValueError: for a quantile outside [0, 1).
    """
    return exact_spectra(matrices).condition_number(quantile)


class _Scaled:
    """Matrices (B, m, n) in float32 at least, their largest entry brought near 1; zero where they are not finite."""

    def __init__(self, matrices: Tensor) -> None:
        self.batch = matrices.shape[:-2]
        self.size = min(matrices.shape[-2:])
        if self.size == 0:
            raise ValueError(f"Matrices without entries have no singular values, got shape {tuple(matrices.shape)}.")
        wide = matrices.detach().to(torch.promote_types(matrices.dtype, torch.float32))
        wide = wide.reshape(self.batch.numel(), *matrices.shape[-2:])
        largest = largest_magnitude(wide.flatten(1), 1).squeeze(1)
        self._finite = largest.isfinite()
        # A power of two, which rounds nothing; within what float32 has without denormals.
        exponent = torch.frexp(torch.where(self._finite, largest, 1.0)).exponent.clamp_(-126, 127)
        self._scale = torch.ldexp(torch.ones_like(largest), exponent)
        self.matrices = wide / self._scale[:, None, None]
        if not bool(self._finite.all()):
            self.matrices = torch.where(self._finite[:, None, None], self.matrices, 0.0)

    @property
    def tall(self) -> Tensor:
        """(B, m, n) or its transpose, with r columns, for Gram matrices and the Lanczos method."""
        m, n = self.matrices.shape[-2:]
        return self.matrices if m >= n else self.matrices.mT

    def start(self, vectors: Tensor | None) -> Tensor:
        """Unit vectors (B, r) to begin with."""
        like = self.matrices
        # A generator of its own leaves the global random state alone.
        generator = torch.Generator("cpu").manual_seed(0)
        fixed: Tensor = torch.randn(self.size, generator=generator, dtype=torch.float32, device="cpu").to(like)
        fixed = (fixed / torch.linalg.vector_norm(fixed)).expand(like.shape[0], -1)
        if vectors is None:
            return fixed
        if vectors.shape != (*self.batch, self.size):
            raise ValueError(
                f"vectors must have shape {(*self.batch, self.size)}, one of length min(m, n) a matrix, got "
                f"{tuple(vectors.shape)}."
            )
        return torch.add(vectors.reshape_as(fixed).to(like).nan_to_num(0.0, 0.0, 0.0), fixed, alpha=_MIX)

    def answer(self, values: Tensor) -> Tensor:
        """(B, ...) values that do not depend on the scale, in the batch's shape; NaN where X is not finite."""
        values = torch.where(self._finite.reshape(-1, *(1,) * (values.ndim - 1)), values, torch.nan)
        return values.reshape((*self.batch, *values.shape[1:]))

    def rescaled(self, values: Tensor) -> Tensor:
        """The same for values (B, ...) that are as large as the matrices."""
        return self.answer(values * self._scale.reshape(-1, *(1,) * (values.ndim - 1)))


def _iterate(tall: Tensor, gram: Tensor | None, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Norms (B,) and unit vectors (B, r): the best in the span of all iterates of the start (Lanczos).

    It takes as many products as plain power iteration, and where the largest singular values lie close together a
    fraction of the iterations.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be 1 or more, got {iterations}.")
    first = start / torch.linalg.vector_norm(start, dim=1, keepdim=True)
    basis = first[:, None]
    products: list[Tensor] = []
    dimensions = min(iterations + 1, first.shape[1])
    scale = torch.zeros_like(first[:, :1, None])
    with _float_products(tall):
        while True:
            last = basis[:, -1:].mT
            product = (tall.mT @ (tall @ last) if gram is None else gram @ last).mT
            products.append(product)
            if len(products) == dimensions:
                break
            scale = torch.maximum(scale, torch.linalg.vector_norm(product, dim=2, keepdim=True))
            for _ in range(2):  # once does not make it orthogonal in floating point
                product = product - (product @ basis.mT) @ basis
            length = torch.linalg.vector_norm(product, dim=2, keepdim=True)
            new = length > 100 * torch.finfo(first.dtype).eps * scale  # less is rounding: nothing is left to find
            basis = torch.cat([basis, torch.where(new, product / length, 0.0)], dim=1)
        images = torch.cat(products, dim=1)
        projected = images @ basis.mT
        mixture = torch.linalg.eigh(projected + projected.mT).eigenvectors[:, :, -1:].mT
        vectors, images = (mixture @ basis).squeeze(1), (mixture @ images).squeeze(1)
    length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    norm = (vectors * images).sum(1).clamp_(min=0).sqrt_() / length.squeeze(1)
    found = length > 0  # not of a matrix of zeros
    return torch.where(found.squeeze(1), norm, 0.0), torch.where(found, vectors / length, first)


def _decompose(tall: Tensor) -> Tensor:
    """Singular values (B, r) of finite matrices (B, l, r); NaN where no algorithm converges."""
    try:
        if tall.dtype == torch.float64 or tall.device.type == "mps":  # which has no float64
            values: Tensor = torch.linalg.svdvals(tall)
            return values
        # Accurate to about 1e-8 of the largest; a decomposition in float32 is to about 1e-7, and takes longer.
        wide = tall.double()
        with _float_products(wide):
            squares: Tensor = torch.linalg.eigvalsh(wide.mT @ wide)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # rare, and must not end a run
        return tall.new_full(tall[:, 0].shape, torch.nan)
    return squares.clamp_(min=0).sqrt_().flip(-1).to(tall.dtype)


@contextmanager
def _float_products(matrices: Tensor) -> Iterator[None]:
    """Multiply in the dtype of the matrices meanwhile, whatever the user's settings, and also under autocast."""
    with exact_products(), torch.autocast(matrices.device.type, enabled=False):
        yield
